//! Records about parents and children.

use std::rc::Rc;

use block_io::BlockDevice;

use super::apply::{MAP_PAGE, entries_of, leaf_child};
use super::{Damage, Effects, State, Stop, inode_key};
use crate::entry::Entry;
use crate::file_core::FileCore;
use crate::inode::{Flags, Kind};
use crate::tree::node::Child;
use crate::units::{FileId, SubMask};

impl<V: BlockDevice> State<V> {
    /// A file and the child that absorbs it.
    pub(crate) fn absorption(&self, parent: FileId) -> Result<(Rc<FileCore>, Rc<FileCore>), Stop> {
        let parent = self.file(parent)?;
        let (child, children, absorbed) = {
            let inode = parent.inode.borrow();
            (
                inode.first_child,
                inode.children,
                inode.flags.has(Flags::ABSORBED),
            )
        };
        match (child, children, absorbed) {
            (Some(child), 1, true) => Ok((parent, self.file(child)?)),
            _ => Err(Damage::new(parent.id, "is absorbed without a single child").into()),
        }
    }

    /// Puts a child first in the list of its parent's children.
    pub(super) fn adopt(&self, parent: &FileCore, child: &FileCore) -> Result<(), Stop> {
        let first = parent.inode.borrow().first_child;
        if let Some(first) = first {
            self.file(first)?
                .change(|inode| inode.previous_sibling = Some(child.id));
        }
        child.change(|inode| {
            inode.parent = Some(parent.id);
            inode.next_sibling = first;
            inode.previous_sibling = None;
        });
        parent.change(|inode| {
            inode.first_child = Some(child.id);
            inode.children += 1;
        });
        Ok(())
    }

    fn prepare_disown(&self, child: &FileCore) -> Result<(), Stop> {
        let links = {
            let inode = child.inode.borrow();
            [inode.parent, inode.next_sibling, inode.previous_sibling]
        };
        for link in links.into_iter().flatten() {
            self.file(link)?;
        }
        Ok(())
    }

    /// Takes a child out of the list of its parent's children.
    fn disown(&self, child: &FileCore) -> Result<Option<Rc<FileCore>>, Stop> {
        let (parent, next, previous) = {
            let inode = child.inode.borrow();
            (inode.parent, inode.next_sibling, inode.previous_sibling)
        };
        let Some(parent) = parent else { return Ok(None) };
        let parent = self.file(parent)?;
        match previous {
            Some(previous) => self.file(previous)?.change(|inode| inode.next_sibling = next),
            None => parent.change(|inode| inode.first_child = next),
        }
        if let Some(next) = next {
            self.file(next)?.change(|inode| inode.previous_sibling = previous);
        }
        parent.change(|inode| inode.children = inode.children.saturating_sub(1));
        child.change(|inode| {
            inode.parent = None;
            inode.next_sibling = None;
            inode.previous_sibling = None;
        });
        Ok(Some(parent))
    }

    pub(super) fn prepare_unlink(&self, id: FileId) -> Result<(), Stop> {
        let file = self.file(id)?;
        self.prepare_unname(&file)?;
        self.orphans.ensure(inode_key(id))?;
        if file.inode.borrow().kind == Kind::Directory {
            return self.prepare_forget(id);
        }
        let mut file = file;
        for _ in 0..crate::file_core::MOST_LAYERS {
            self.prepare_disown(&file)?;
            let parent = file.inode.borrow().parent;
            let Some(parent) = parent else { return Ok(()) };
            file = self.file(parent)?;
        }
        Err(Damage::new(id, "has itself among its parents").into())
    }

    pub(super) fn unlink(&self, id: FileId, effects: &mut Effects) -> Result<(), Stop> {
        let file = self.file(id)?;
        self.unname(&file)?;
        let (kind, children, size) = {
            let inode = file.inode.borrow();
            (inode.kind, inode.children, inode.size)
        };
        if kind == Kind::Directory {
            if size > 0 {
                return Err(Damage::new(id, "is a directory that goes with what is in it").into());
            }
            return self.forget(id);
        }
        effects.orphans = true;
        self.add_orphan(id)?;
        if children > 0 {
            file.change(|inode| inode.flags.set(Flags::UNLINKED, true));
            return Ok(());
        }
        self.die(file)
    }

    /// A file without name and children is deleted; so is its parent, if it waited for that.
    fn die(&self, file: Rc<FileCore>) -> Result<(), Stop> {
        let mut file = file;
        loop {
            if file.inode.borrow().flags.has(Flags::ABSORBED) {
                block_io::cover!("filesys: a file goes with the layer that had begun to absorb it");
            }
            file.change(|inode| {
                for flag in [Flags::UNLINKED, Flags::ABSORBED, Flags::GIVES_NAME] {
                    inode.flags.set(flag, false);
                }
                inode.flags.set(Flags::DYING, true);
            });
            let Some(parent) = self.disown(&file)? else {
                return Ok(());
            };
            let waited = {
                let inode = parent.inode.borrow();
                inode.children == 0 && inode.flags.has(Flags::UNLINKED)
            };
            if !waited {
                return Ok(());
            }
            file = parent;
        }
    }

    /// The leaf of the parent becomes the child's.
    pub(super) fn absorb_child(&self, parent: FileId, first: u64, effects: &mut Effects) -> Result<(), Stop> {
        let (parent, child) = self.absorption(parent)?;
        effects.map_changes(&parent);
        effects.map_changes(&child);
        let (from, to) = (Self::map_of(&parent)?, Self::map_of(&child)?);
        if !to.child(first, 0)?.is_empty() {
            return Err(Damage::new(child.id, "has a page where it is to get one").into());
        }
        let leaf = from.replace(&self.pages, first, 0, Child::Empty)?;
        let moved = match &leaf {
            Child::Run(entry) => entry.location().map_or(0, |_| MAP_PAGE),
            page => page.aux(),
        };
        to.replace(&self.pages, first, 0, leaf)?;
        parent.change(|inode| inode.allocated = inode.allocated.saturating_sub(moved));
        child.change(|inode| {
            inode.allocated += moved;
            inode.placement += 1;
        });
        Ok(())
    }

    pub(super) fn prepare_absorb_leaf(&self, parent: FileId, first: u64) -> Result<(), Stop> {
        let (parent, child) = self.absorption(parent)?;
        for file in [parent, child] {
            for entry in entries_of(Self::map_of(&file)?, first)? {
                if let Some(at) = entry.location() {
                    self.prepare_place(at)?;
                }
            }
        }
        Ok(())
    }

    /// Both have something in this leaf.
    pub(super) fn absorb_leaf(
        &self,
        parent: FileId,
        first: u64,
        keep: &[u8; 32],
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        let (parent, child) = self.absorption(parent)?;
        effects.map_changes(&parent);
        effects.map_changes(&child);
        let (from, to) = (Self::map_of(&parent)?, Self::map_of(&child)?);
        let (below, mut above) = (entries_of(from, first)?, entries_of(to, first)?);
        let mut gained = 0;
        for (number, (entry, old)) in above.iter_mut().zip(below).enumerate() {
            let keep = keep[number / 8] >> (number % 8) & 1 == 1;
            let before = *entry;
            *entry = absorb_entry(before, old, keep);
            let stays = |at| entry.location() == Some(at);
            if let Some(at) = old.location() {
                if stays(at) {
                    gained += 1;
                    parent.change(|inode| inode.allocated = inode.allocated.saturating_sub(1));
                } else {
                    self.lose(&parent, at, effects)?;
                }
            }
            if let Some(at) = before.location().filter(|at| !stays(*at)) {
                self.lose(&child, at, effects)?;
            }
        }
        let old = to.replace(&self.pages, first, 0, leaf_child(self, &above))?;
        self.pages.dropped(&old);
        let old = from.replace(&self.pages, first, 0, Child::Empty)?;
        self.pages.dropped(&old);
        parent.dirty.set(true);
        child.change(|inode| {
            inode.allocated += gained;
            inode.placement += 1;
        });
        Ok(())
    }

    pub(super) fn prepare_absorbed(&self, parent: FileId) -> Result<(), Stop> {
        let (parent, child) = self.absorption(parent)?;
        self.prepare_unname(&parent)?;
        self.prepare_unname(&child)?;
        self.prepare_disown(&parent)?;
        let grand = parent.inode.borrow().parent;
        if let Some(grand) = grand {
            let first = self.file(grand)?.inode.borrow().first_child;
            if let Some(first) = first {
                self.file(first)?;
            }
        }
        self.orphans.ensure(inode_key(parent.id))?;
        self.prepare_forget(parent.id)
    }

    pub(super) fn absorbed(&self, parent: FileId, named: bool, effects: &mut Effects) -> Result<(), Stop> {
        let (parent, child) = self.absorption(parent)?;
        if !Self::map_of(&parent)?.is_empty() {
            return Err(Damage::new(parent.id, "is absorbed with clusters left").into());
        }
        self.disown(&child)?;
        let grand = self.disown(&parent)?;
        if let Some(grand) = grand {
            self.adopt(&grand, &child)?;
        }
        let (linked, directory, name) = {
            let inode = parent.inode.borrow();
            (inode.is_linked(), inode.directory, inode.name.clone())
        };
        if linked {
            self.unname(&parent)?;
            if named {
                self.unname(&child)?;
                self.name(&child, directory, &name)?;
                // Who knows the file by this means what has the name.
                let identity = parent.inode.borrow().identity;
                if identity.is_some() {
                    child.change(|inode| inode.identity = identity);
                }
            }
        }
        self.remove_orphan(parent.id)?;
        self.forget(parent.id)?;
        // Its parent may wait for having one child.
        effects.orphans = true;
        Ok(())
    }
}

/// What the child has afterwards of a cluster, if `keep` says whose place is kept.
pub(crate) fn absorb_entry(child: Entry, parent: Entry, keep: bool) -> Entry {
    let valid = child.valid() | parent.valid() & child.holes();
    let zero = child.zero() | parent.zero() & child.holes();
    let place = match (child.location(), parent.location()) {
        (Some(child), Some(parent)) => Some(if keep { parent } else { child }),
        (child, parent) => child.or(parent),
    };
    let kept = child.is_kept() || parent.is_kept();
    match place {
        Some(at) if valid != 0 || kept => Entry::at(at)
            .with_kept(kept)
            .with_checked(child.is_checked() || parent.is_checked())
            .with_subs(valid, zero),
        _ => Entry::HOLE.with_subs(0, zero),
    }
}

/// Sub-clusters that have to be copied into the place that is kept, before [`absorb_entry`] is true.
pub(crate) fn absorb_copies(child: Entry, parent: Entry, keep: bool) -> SubMask {
    if child.location().is_none() || parent.location().is_none() {
        return SubMask::NONE;
    }
    SubMask(if keep {
        child.valid()
    } else {
        parent.valid() & child.holes()
    })
}
