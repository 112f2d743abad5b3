//! What is left to do after deletions and merges, in the background and after a crash: files without a name are reaped, parents
//! that lost their name are absorbed by the last child that needs them.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::error::FsError;
use crate::file_core::FileCore;
use crate::inode::Flags;
use crate::record::{LARGEST, Record};
use crate::tree::node::FANOUT;

const PAGE: u64 = FANOUT as u64;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Does all that can be done now.
    pub(crate) async fn settle_orphans(&self) -> Result<(), FsError> {
        let mut again = true;
        while again {
            again = false;
            for id in self.look(|state| Ok(state.orphan_ids()?)).await? {
                if self.closing.get() {
                    return Ok(());
                }
                let Some(file) = self.look(|state| Ok(state.find_file(id)?)).await? else {
                    continue;
                };
                again |= self.settle(&file).await?;
            }
        }
        Ok(())
    }

    /// Whether something was done.
    async fn settle(&self, file: &Rc<FileCore>) -> Result<bool, FsError> {
        let (flags, children) = {
            let inode = file.inode.borrow();
            (inode.flags, inode.children)
        };
        if file.opens.get() > 0 {
            return Ok(false);
        }
        if flags.has(Flags::DYING) {
            self.reap(file).await?;
            return Ok(true);
        }
        if flags.has(Flags::UNLINKED) && children == 1 && !flags.has(Flags::ABSORBED) {
            let pinned = self.look(|_| Ok(self.pin_of(file)?)).await?;
            if pinned.is_some() {
                return Ok(false);
            }
            block_io::cover!("filesys: the last child absorbs a parent without a name");
            self.transact(LARGEST, Need::Freeing, |_| {
                Ok((vec![Record::Absorb { parent: file.id }], ()))
            })
            .await?;
            self.absorb_parent(file.id, false).await?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Frees all that a file has, and forgets it.
    async fn reap(&self, file: &Rc<FileCore>) -> Result<(), FsError> {
        loop {
            let next = self
                .look(|_| match file.map() {
                    Some(map) => Ok(map.next(0)?.map(|span| span.start / PAGE * PAGE)),
                    None => Ok(None),
                })
                .await?;
            let Some(first) = next else { break };
            let first = u32::try_from(first).unwrap_or(u32::MAX);
            self.transact(LARGEST, Need::Freeing, |_| {
                let count = u32::try_from(PAGE).unwrap_or(0);
                Ok((
                    vec![Record::Reap {
                        file: file.id,
                        first,
                        count,
                    }],
                    (),
                ))
            })
            .await?;
        }
        self.transact(LARGEST, Need::Freeing, |_| {
            Ok((vec![Record::Reaped { file: file.id }], ()))
        })
        .await?;
        Ok(())
    }
}
