//! Files grow and shrink.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use super::check_size;
use crate::core::{Core, Need};
use crate::error::FsError;
use crate::file_core::{FileCore, Kept};
use crate::open::FileSystem;
use crate::record::{LARGEST, Record};
use crate::tree::node::FANOUT;
use crate::units::{CLUSTER, SUB_CLUSTER, SUBS};

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Changes the size of a file. What lies behind a smaller size is lost; a larger one reads as zeroes there.
    ///
    /// # Errors
    /// There is none, it is frozen, or the size is impossible.
    pub async fn resize(&self, path: &str, size: u64) -> Result<(), FsError> {
        let core = self.core();
        check_size(path, size)?;
        let file = core.look(|_| core.find_regular(path)).await?;
        let _kept = Kept::new(&file);
        let _alone = file.gate.all().await;
        let (frozen, linked, old) = {
            let inode = file.inode.borrow();
            (inode.is_frozen(), inode.is_linked(), inode.size)
        };
        if frozen || !linked {
            return Err(FsError::Frozen {
                file: path.to_owned(),
            });
        }
        if size < old && !size.is_multiple_of(SUB_CLUSTER) {
            return Err(FsError::Path {
                path: path.to_owned(),
                problem: "the size of a file that shrinks becomes a multiple of 4 KiB",
            });
        }
        if size < old {
            core.shrink(&file, size, old).await?;
        } else {
            core.grow(&file, size, old).await?;
        }
        core.commit(core.journal.open_group()).await
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// The size comes first: after a crash, what is behind it is nobody's concern until the file grows, which clears it once more. The
    /// caller has the file alone.
    async fn shrink(&self, file: &Rc<FileCore>, size: u64, old: u64) -> Result<(), FsError> {
        // With a parent, what goes has to be hidden. Without one, the space goes as well, that of thick files, too.
        let whole = if file.parent().is_some() {
            old
        } else {
            size.next_multiple_of(CLUSTER).min(old)
        };
        let mut records = vec![Record::Resize { file: file.id, size }];
        for record in
            cleared(file, size, whole).chain(reaped(file, whole.div_ceil(CLUSTER), old.div_ceil(CLUSTER)))
        {
            records.push(record);
            // The size and what is near it go in one moment.
            if records.len() >= 3 {
                let some = std::mem::take(&mut records);
                self.transact(LARGEST, Need::Freeing, |_| Ok((some.clone(), ())))
                    .await?;
            }
        }
        self.transact(LARGEST, Need::Freeing, |_| Ok((records.clone(), ())))
            .await?;
        Ok(())
    }

    /// Whatever is behind the end goes, or is hidden, and the size comes last. The caller has the file alone.
    async fn grow(&self, file: &Rc<FileCore>, size: u64, old: u64) -> Result<(), FsError> {
        for clear in cleared(file, old, size) {
            self.transact(LARGEST, Need::Freeing, |_| Ok((vec![clear.clone()], ())))
                .await?;
        }
        if file.inode.borrow().attributes.thick {
            let filled = self.fill(file, old / CLUSTER, size).await;
            if filled.is_err() {
                block_io::cover!("filesys: a thick file found no space to grow");
                for reap in reaped(file, old.div_ceil(CLUSTER), size.div_ceil(CLUSTER)) {
                    self.transact(LARGEST, Need::Freeing, |_| Ok((vec![reap.clone()], ())))
                        .await?;
                }
            }
            filled?;
        }
        self.transact(LARGEST, Need::Freeing, |_| {
            Ok((vec![Record::Resize { file: file.id, size }], ()))
        })
        .await?;
        Ok(())
    }
}

/// Records that take the content of a range; ancestors must not show through.
fn cleared(file: &FileCore, start: u64, end: u64) -> impl Iterator<Item = Record> + use<> {
    const STEP: u64 = FANOUT as u64 * SUBS as u64 * 16;
    let (file, zero) = (file.id, file.parent().is_some());
    let (first, last) = (start.div_ceil(SUB_CLUSTER), end.div_ceil(SUB_CLUSTER));
    (first..last)
        .step_by(usize::try_from(STEP).unwrap_or(usize::MAX))
        .map(move |first| Record::Clear {
            file,
            first,
            count: (last - first).min(STEP),
            zero,
        })
}

/// Records that take whole clusters away, kept ones, too.
fn reaped(file: &FileCore, first: u64, last: u64) -> impl Iterator<Item = Record> + use<> {
    const STEP: usize = FANOUT * 16;
    let file = file.id;
    (first..last).step_by(STEP).map(move |first| Record::Reap {
        file,
        first: u32::try_from(first).unwrap_or(u32::MAX),
        count: u32::try_from((last - first).min(STEP as u64)).unwrap_or(u32::MAX),
    })
}
