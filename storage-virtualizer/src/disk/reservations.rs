//! What initiators know a disk by, and the reservations that they have on it: both stay while nobody has the disk open.
//!
//! The identifier is the file's own in the file system, and moves with it. Reservations are in the descriptor: rare, and too long for an
//! inode.

use block_io::{BlockDevice, Clock};

use super::descriptor::MAX_RESERVATIONS;
use super::disks::Disks;
use super::error::DiskError;
use super::name::DiskPath;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    /// Keeps the persistent reservations of a disk, which may be in use, instead of those that were kept before; none if they are
    /// empty. Durable afterwards.
    ///
    /// # Errors
    /// There is no such disk, they are longer than 192 KiB, or could not be written: then those before are kept, or these.
    pub async fn keep_reservations(
        &self,
        path: &str,
        reservations: &[u8],
        now: u64,
    ) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        if reservations.len() > MAX_RESERVATIONS {
            return Err(DiskError::State {
                disk: path.to_string(),
                problem: format!("{} bytes of reservations are too many", reservations.len()),
            });
        }
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        if descriptor.reservations == reservations {
            return Ok(());
        }
        descriptor.reservations = reservations.to_vec();
        Box::pin(self.store(&path, &mut descriptor, now)).await
    }

    /// The persistent reservations that are kept for a disk, which may be in use.
    ///
    /// # Errors
    /// There is no such disk, or its metadata cannot be read.
    pub async fn reservations(&self, path: &str) -> Result<Vec<u8>, DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        Ok(Box::pin(self.look(&path, &entry)).await?.reservations)
    }

    /// Gives a disk an identifier if it has none. Returns the one that it has.
    pub(super) async fn identify(
        &self,
        path: &DiskPath,
        identity: Option<[u8; 16]>,
    ) -> Result<Option<[u8; 16]>, DiskError> {
        let present = self.files().stat(path.as_str()).await?.identity;
        match (present, identity) {
            (None, Some(identity)) => {
                Box::pin(self.files().set_identity(path.as_str(), identity)).await?;
                Ok(Some(identity))
            }
            (present, _) => Ok(present),
        }
    }
}
