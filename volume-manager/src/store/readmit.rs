//! A device that was out of service comes back while the pool is open.

use std::rc::Rc;

use block_io::{BlockDevice, cover};

use super::commit::Store;
use super::history::{Relation, relation};
use super::media::{Known, MediaError, open};
use crate::model::{DeviceId, Uuid};

/// Why a device cannot come back.
#[derive(Debug, thiserror::Error)]
pub enum ReadmitError {
    /// It cannot be read, or is no device of a pool.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// It is another one.
    #[error("it is device {found}, and {wanted} is missing")]
    Other {
        /// Its identity.
        found: Uuid,
        /// The identity that is missing.
        wanted: Uuid,
    },
    /// It was changed elsewhere meanwhile.
    #[error(
        "the pool was changed on it without the other devices: remove it from the pool, then add it anew, which loses its content"
    )]
    Split,
    /// It counts still.
    #[error("it is in service")]
    InService,
}

impl<D: BlockDevice> Store<D> {
    /// Has a device take part again from the next commit on, in which it may be a holder.
    ///
    /// # Errors
    /// It is not the device that is missing, or has a history of its own.
    pub async fn readmit(&mut self, id: DeviceId, device: &Rc<D>) -> Result<(), ReadmitError> {
        if self.is_holder(id) {
            return Err(ReadmitError::InService);
        }
        let (media, copies, held) = open(device, &Known::default()).await?;
        let Some(current) = self.configuration() else {
            return Err(ReadmitError::InService);
        };
        let wanted = current.device(id).map(|device| device.uuid).unwrap_or_default();
        if media.label.device != wanted || media.label.pool != current.pool {
            return Err(ReadmitError::Other {
                found: media.label.device,
                wanted,
            });
        }
        if let Some(held) = held
            && matches!(relation(current, &held.configuration), Relation::Foreign)
        {
            cover!("store: a device with a history of its own comes back");
            return Err(ReadmitError::Split);
        }
        media.repair_label(copies).await.map_err(MediaError::Io)?;
        self.put_back(id, media);
        Ok(())
    }
}
