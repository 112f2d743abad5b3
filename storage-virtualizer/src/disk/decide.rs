//! Redo layers are committed or discarded; layers that are not needed are merged.

use block_io::{BlockDevice, Clock};
use filesys::{FileId, FsError};

use super::DiskMode;
use super::descriptor::Purpose;
use super::disks::Disks;
use super::error::DiskError;
use super::name::DiskPath;

/// Merges of one disk that are done in one go, at most: more than there can be.
const MOST_MERGES: usize = 10_000;
/// What of a layer is merged before the caller is asked whether to go on ([`filesys::FileSystem::absorb_while`]).
const ABSORBED_AT_ONCE: u64 = 16 << 20;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Disks<V, C> {
    /// The writes in the redo layer stay for good. Done at once, whatever their number: the layer becomes a part of the disk, and
    /// [`Self::merge`] makes the chain short again. A disk that is in use gets a new redo layer.
    ///
    /// # Errors
    /// There is no redo layer, or the disk is nonpersistent.
    pub async fn commit(&self, path: &str, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        let Some(redo) = descriptor.redo else {
            return Err(DiskError::Decided {
                disk: path.to_string(),
            });
        };
        if redo.mode == DiskMode::Nonpersistent {
            return Err(DiskError::State {
                disk: path.to_string(),
                problem: "it is nonpersistent: what is written to it is discarded, and cannot be committed"
                    .into(),
            });
        }
        match entry.live() {
            Some(live) => {
                let purpose = Purpose::Redo { mode: redo.mode };
                Box::pin(self.make_layer(&path, &mut descriptor, redo.file, purpose, Some(&live), now))
                    .await?;
            }
            None => {
                let before = descriptor.head;
                descriptor.head = redo.file;
                descriptor.redo = None;
                descriptor.let_go(before);
                Box::pin(self.store(&path, &mut descriptor, now)).await?;
            }
        }
        Box::pin(self.tidy(&path, &mut descriptor, now)).await
    }

    /// The writes in the redo layer go.
    ///
    /// # Errors
    /// There is no redo layer, or the disk is open.
    pub async fn discard(&self, path: &str, now: u64) -> Result<(), DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        let _turn = entry.turn.take().await;
        entry.check_unused_but_snapshots(&path)?;
        let mut descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
        let Some(redo) = &mut descriptor.redo else {
            return Err(DiskError::Decided {
                disk: path.to_string(),
            });
        };
        redo.discarded = true;
        Box::pin(self.store(&path, &mut descriptor, now)).await?;
        Box::pin(self.tidy(&path, &mut descriptor, now)).await
    }

    /// Makes the chain of a disk short: the first layer, if it is no snapshot any more, goes into the one above it. That takes time, and
    /// the disk is used meanwhile. After a crash, or an error, it is called again.
    ///
    /// Tells whether nothing is left to merge; else something that is there for a time keeps a layer: a clone, a reader, a pin.
    ///
    /// # Errors
    /// A volume failed.
    pub async fn merge(&self, path: &str, now: u64) -> Result<bool, DiskError> {
        self.merge_while(path, now, |_, _| true).await
    }

    /// As [`Self::merge`]. `go_on` is told now and then how many bytes of the first layer have gone, and how many it has at most. Where it does
    /// not want more, false is returned, and the merge is to be asked for again, as after a crash.
    ///
    /// # Errors
    /// As [`Self::merge`].
    pub async fn merge_while(
        &self,
        path: &str,
        now: u64,
        mut go_on: impl FnMut(u64, u64) -> bool,
    ) -> Result<bool, DiskError> {
        let path = DiskPath::new(path)?;
        let entry = self.entry(&path);
        for _ in 0..MOST_MERGES {
            let turn = entry.turn.take().await;
            let descriptor = Box::pin(self.settle(&path, &entry, now)).await?;
            if descriptor.doomed.is_empty() {
                return Ok(true);
            }
            let base = self.files().stat(path.as_str()).await?;
            if !base.absorbed && !descriptor.doomed.contains(&base.id) {
                block_io::cover!("disk: the first layer stays, and another one waits to go");
                return Ok(false);
            }
            let Some(child) = Box::pin(self.child_of_base(&path, descriptor.top())).await? else {
                return Ok(false);
            };
            drop(turn);
            let size = base.size;
            let mut looked_at = 0;
            let told = || {
                looked_at = size.min(looked_at + ABSORBED_AT_ONCE);
                go_on(looked_at, size)
            };
            match Box::pin(self.files().absorb_while(&child, true, told)).await {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(FsError::Busy { .. } | FsError::NotFound { .. } | FsError::State { .. }) => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }

    /// The layer that can take over the first one, which is not needed.
    pub(super) async fn child_of_base(
        &self,
        path: &DiskPath,
        top: FileId,
    ) -> Result<Option<String>, DiskError> {
        let base = self.files().stat(path.as_str()).await?;
        if base.children != 1 {
            return Ok(None);
        }
        let mut at = top;
        for _ in 0..MOST_MERGES {
            let parent = self.files().stat_of(at).await?.and_then(|stat| stat.parent);
            match parent {
                // A layer without a name is on its way out by itself, and then another one is here.
                Some(parent) if parent == base.id => return Ok(self.files().path_of(at).await?),
                Some(parent) => at = parent,
                None => break,
            }
        }
        Ok(None)
    }
}
