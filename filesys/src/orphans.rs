//! What is left to do after deletions and merges, in the background and after a crash: files without a name are reaped, parents
//! that lost their name are absorbed by the last child that needs them, and merges that a crash has cut go on.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::error::{FsError, Refusal};
use crate::file_core::{Absorbing, FileCore};
use crate::inode::Flags;
use crate::record::{LARGEST, Record};
use crate::tree::node::FANOUT;

const PAGE: u64 = FANOUT as u64;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Does all that can be done now.
    pub(crate) async fn settle_orphans(&self) -> Result<(), FsError> {
        let resumed = self.resuming.replace(false);
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
                again |= self.settle(&file, resumed).await?;
            }
        }
        Ok(())
    }

    /// Whether something was done. Resumed: merges that a crash has cut go on, too. (Others have somebody who asked for them, and whom an
    /// error has told to ask again.)
    async fn settle(&self, file: &Rc<FileCore>, resumed: bool) -> Result<bool, FsError> {
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
        let wanted = flags.has(Flags::UNLINKED) || (resumed && flags.has(Flags::ABSORBED));
        if !wanted || children != 1 {
            return Ok(false);
        }
        let pinned = self.look(|_| Ok(self.pin_of(file)?)).await?;
        if pinned.is_some() {
            return Ok(false);
        }
        self.settle_parent(file).await
    }

    /// The last child absorbs a parent that has no name any more, or goes on with it.
    async fn settle_parent(&self, file: &Rc<FileCore>) -> Result<bool, FsError> {
        let (group, begun) = self
            .transact(LARGEST, Need::Freeing, |state| {
                let (flags, children, child) = {
                    let inode = file.inode.borrow();
                    (inode.flags, inode.children, inode.first_child)
                };
                let wanted = flags.has(Flags::UNLINKED) || flags.has(Flags::ABSORBED);
                let (Some(child), 1, true) = (child, children, wanted) else {
                    return Ok((Vec::new(), None));
                };
                match self.check_apart("", &*state.file(child)?, file) {
                    // Its end makes us look again.
                    Err(Refusal::Error(FsError::Busy { .. })) => return Ok((Vec::new(), None)),
                    other => other?,
                }
                let Some(absorbing) = Absorbing::begin(file) else {
                    return Ok((Vec::new(), None));
                };
                if flags.has(Flags::ABSORBED) {
                    block_io::cover!("filesys: an absorption that a crash has interrupted goes on");
                    return Ok((Vec::new(), Some(absorbing)));
                }
                block_io::cover!("filesys: the last child absorbs a parent without a name");
                let record = Record::Absorb {
                    parent: file.id,
                    named: false,
                };
                Ok((vec![record], Some(absorbing)))
            })
            .await?;
        let Some(_absorbing) = begun else { return Ok(false) };
        // Other children must be gone for good before their parent's places are written to.
        self.commit(group).await?;
        self.absorb_parent(file.id, &mut || !self.closing.get()).await
    }

    /// Frees all that a file has, and forgets it.
    async fn reap(&self, file: &Rc<FileCore>) -> Result<(), FsError> {
        // Whoever relocates it notices that it is dying.
        let _alone = file.gate.all().await;
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
