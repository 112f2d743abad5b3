//! A file or directory in memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::gate::Gate;
use crate::inode::{Inode, Kind};
use crate::tree::codec::Kind as TreeKind;
use crate::tree::node::Root;
use crate::tree::radix::Tree;
use crate::tree::table::Table;
use crate::units::{FileId, Location, VolumeIndex};

/// Files in a chain, at most. Only in a damaged file system there are more.
pub(crate) const MOST_LAYERS: usize = 10_000;

/// What an inode's object holds.
#[derive(Debug)]
pub(crate) enum Content {
    /// Where the clusters of a file are.
    Map(Tree),
    /// The names in a directory.
    Names(Table),
}

/// A cluster that is reserved for data on their way, before the map has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) location: Location,
    /// Writes that are under way into it.
    pub(crate) writers: u32,
    /// The map has it.
    pub(crate) mapped: bool,
}

/// A file or directory in memory.
#[derive(Debug)]
pub(crate) struct FileCore {
    pub(crate) id: FileId,
    pub(crate) inode: RefCell<Inode>,
    pub(crate) content: Content,
    /// Inode or root differ from what the last checkpoint has.
    pub(crate) dirty: Cell<bool>,
    pub(crate) gate: Gate,
    pub(crate) pending: RefCell<BTreeMap<u32, Pending>>,
    /// Handles that are open.
    pub(crate) opens: Cell<u32>,
    /// Handles that write.
    pub(crate) writers: Cell<u32>,
    /// Its child is absorbing it just now.
    pub(crate) absorbing: Cell<bool>,
    /// Changes of its map while it was a parent.
    pub(crate) moves: Cell<u64>,
    /// The journal group with the last change of it.
    pub(crate) group: Cell<u64>,
    /// For each volume that was written to: how many writes it had seen then.
    pub(crate) written: RefCell<BTreeMap<VolumeIndex, u64>>,
}

impl FileCore {
    /// As an inode and the object table say.
    pub(crate) fn new(inode: Inode, root: Option<Root>) -> Self {
        let content = match (inode.kind, root) {
            (Kind::File, Some(root)) if root.kind == TreeKind::Map => Content::Map(Tree::from_root(root)),
            (Kind::Directory, Some(root)) if root.kind == TreeKind::Table => {
                Content::Names(Table::from_root(root))
            }
            (Kind::File, _) => Content::Map(Tree::new(TreeKind::Map)),
            (Kind::Directory, _) => Content::Names(Table::new()),
        };
        Self {
            id: inode.id,
            inode: RefCell::new(inode),
            content,
            dirty: Cell::new(false),
            gate: Gate::default(),
            pending: RefCell::default(),
            opens: Cell::new(0),
            writers: Cell::new(0),
            absorbing: Cell::new(false),
            moves: Cell::new(0),
            group: Cell::new(0),
            written: RefCell::default(),
        }
    }

    /// Its map; none if it is a directory.
    pub(crate) fn map(&self) -> Option<&Tree> {
        match &self.content {
            Content::Map(map) => Some(map),
            Content::Names(_) => None,
        }
    }

    /// Its names; none if it is a file.
    pub(crate) fn names(&self) -> Option<&Table> {
        match &self.content {
            Content::Names(names) => Some(names),
            Content::Map(_) => None,
        }
    }

    pub(crate) fn parent(&self) -> Option<FileId> {
        self.inode.borrow().parent
    }

    /// Changes the inode.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Inode)) {
        change(&mut self.inode.borrow_mut());
        self.dirty.set(true);
    }

    pub(crate) fn to_root(&self) -> Root {
        match &self.content {
            Content::Map(map) => map.to_root(),
            Content::Names(names) => names.to_root(),
        }
    }
}

/// Keeps a file from being deleted, as an open handle does.
pub(crate) struct Kept(Rc<FileCore>);

impl Kept {
    pub(crate) fn new(file: &Rc<FileCore>) -> Self {
        file.opens.set(file.opens.get() + 1);
        Self(Rc::clone(file))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.opens.set(self.0.opens.get() - 1);
    }
}

/// The right to absorb a file: one at a time has it.
pub(crate) struct Absorbing(Rc<FileCore>);

impl Absorbing {
    pub(crate) fn begin(parent: &Rc<FileCore>) -> Option<Self> {
        (!parent.absorbing.replace(true)).then(|| Self(Rc::clone(parent)))
    }
}

impl Drop for Absorbing {
    fn drop(&mut self) {
        self.0.absorbing.set(false);
    }
}

/// A file and its ancestors, the file first.
pub(crate) type Chain = Rc<[Rc<FileCore>]>;
