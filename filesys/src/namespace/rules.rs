//! What may be done to files and directories, and what not now.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::Core;
use crate::error::{FsError, Refusal};
use crate::file_core::FileCore;
use crate::inode::Flags;
use crate::state::{Damage, ROOT};
use crate::units::MAX_FILE;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Whether a file may lose its name or content.
    pub(crate) fn check_unused(&self, path: &str, file: &FileCore) -> Result<(), FsError> {
        let busy = |problem: String| FsError::Busy {
            object: path.to_owned(),
            problem,
        };
        if file.opens.get() > 0 {
            return Err(busy("it is open: close it first".into()));
        }
        if file.inode.borrow().flags.has(Flags::ABSORBED) {
            return Err(busy("it is being merged".into()));
        }
        if let Some(pin) = self.state.pins.borrow().values().find(|pin| pin.file == file.id) {
            return Err(busy(format!(
                "pin {} keeps it until it is released or its time is over",
                pin.pin
            )));
        }
        Ok(())
    }

    /// A layer that takes over its parent has parts of it already, so it cannot go now, be it that it is deleted or that it has waited for that, without a
    /// name. Nor may it lose its name while its parent has one: it may be about to get that, and by its own name it is asked to go on.
    pub(super) fn check_absorbs_nothing(&self, path: &str, file: &FileCore) -> Result<(), Refusal> {
        let (mut parent, mut goes) = {
            let inode = file.inode.borrow();
            (inode.parent, inode.children == 0)
        };
        while let Some(id) = parent {
            let above = self.state.file(id)?;
            let inode = above.inode.borrow();
            // Without a name, nobody wants the parent any more: both go, unless data are being copied just now.
            let cannot_go = inode.is_linked() || goes && above.absorbing.get();
            if inode.flags.has(Flags::ABSORBED) && cannot_go {
                block_io::cover!("filesys: a layer that absorbs its parent was not deleted");
                return Err(FsError::Busy {
                    object: path.to_owned(),
                    problem: "it, or a file that goes with it, is being merged with its parent".into(),
                }
                .into());
            }
            // As `State::die` does it.
            goes &= inode.children == 1 && inode.flags.has(Flags::UNLINKED);
            parent = inode.parent.filter(|_| goes);
        }
        Ok(())
    }

    pub(super) fn check_not_above(
        &self,
        from: &str,
        file: &FileCore,
        directory: &Rc<FileCore>,
    ) -> Result<(), Refusal> {
        let mut at = Rc::clone(directory);
        for depth in 0.. {
            check_depth(&at, depth)?;
            if at.id == file.id {
                return Err(FsError::Path {
                    path: from.to_owned(),
                    problem: "a directory cannot be moved into itself",
                }
                .into());
            }
            if at.id == ROOT {
                return Ok(());
            }
            let above = at.inode.borrow().directory;
            at = self.state.file(above)?;
        }
        Ok(())
    }
}

/// Directories in directories, at most, on the way up from one. Only in a damaged file system there are more.
const MOST_DEPTH: usize = 65_536;

pub(super) fn check_depth(at: &FileCore, depth: usize) -> Result<(), Damage> {
    if depth < MOST_DEPTH {
        return Ok(());
    }
    Err(Damage::new(at.id, "lies within itself"))
}

pub(crate) fn check_size(path: &str, size: u64) -> Result<(), FsError> {
    let problem = if size > MAX_FILE {
        "a file has at most 64 TiB"
    } else if !size.is_multiple_of(512) {
        "the size of a file is a multiple of 512 bytes"
    } else {
        return Ok(());
    };
    Err(FsError::Path {
        path: path.to_owned(),
        problem,
    })
}
