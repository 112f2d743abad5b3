//! Metadata pages in memory: nodes of trees that share what has not changed.
//!
//! All maps and tables are trees of 4 KiB pages. In memory a page is a [`Node`] behind an `Rc`. A checkpoint takes the roots, which
//! costs nothing; who changes a node afterwards finds it shared and copies it first ([`Pages::touch`]), so the checkpoint goes on to
//! see the state of its beginning, while files are written.
//!
//! ```text
//!    live root ──► A' ──► leaf'        changed since the checkpoint began: copies
//!                   └─────────┐
//!    checkpoint ──► A ──► leaf │       what it writes
//!                   └──────────┴─► leaf, leaf …   shared by both
//! ```
//!
//! A node knows the block to which its content was written, if it was ([`Node::ptr`]); one without is dirty. Nodes that have a block can
//! be dropped from memory at any time: their place in the parent becomes [`Child::Media`], and who needs them gets [`Missing`], loads
//! the page, and looks again. So all changes are synchronous: first everything is there, then it is changed in one go.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use super::codec::Kind;
use super::leaf::MapLeaf;
use super::table::Item;
use crate::entry::Entry;

/// Children of an inner page, entries of a map page.
pub(crate) const FANOUT: usize = 256;
/// Words of a bitmap page.
pub(crate) const WORDS: usize = 512;
/// Bits of a bitmap page.
pub(crate) const BITS: u64 = 32768;
/// Checksums of a page of them.
pub(crate) const SUMS: usize = 1024;

/// Where a page lies on the metadata volume, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ptr {
    /// Number of the 4 KiB block.
    pub(crate) block: u64,
    /// CRC-32C of the page.
    pub(crate) crc: u32,
    /// Bitmap pages: their clear bits. Map pages: their entries with a place. Others: 0.
    pub(crate) aux: u16,
    /// 0 is a leaf; an inner page's children have lower levels.
    pub(crate) level: u8,
}

/// What a parent knows of one child.
#[derive(Debug, Clone)]
pub(crate) enum Child {
    /// Nothing: holes, clear bits, no items.
    Empty,
    /// All alike: a run of clusters that begins with this entry; in bitmaps, all bits set.
    Run(Entry),
    /// A page that is not in memory.
    Media(Ptr),
    /// A page that is.
    Loaded(Rc<Node>),
}

impl Child {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// What a parent keeps of a leaf: see [`Ptr::aux`].
    pub(crate) fn aux(&self) -> u64 {
        match self {
            Self::Media(ptr) => ptr.aux.into(),
            Self::Loaded(node) => match node.ptr.get() {
                Some(ptr) => ptr.aux.into(),
                None => super::codec::aux_of(&node.body.borrow()).into(),
            },
            Self::Empty | Self::Run(_) => 0,
        }
    }
}

/// The tree of an object as its slot in the object table has it.
#[derive(Debug, Clone)]
pub(crate) struct Root {
    pub(crate) child: Child,
    /// Level of the root page, whether there is one or not.
    pub(crate) level: u8,
    pub(crate) kind: Kind,
}

/// The content of a page.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    /// Children.
    Inner(Box<[Child; FANOUT]>),
    /// Entries of a file's map.
    Map(MapLeaf),
    /// Which clusters of a volume are in use.
    Bits(Box<[u64; WORDS]>),
    /// CRC-32C of sub-clusters of a volume; 0 is unknown.
    Sums(Box<[u32; SUMS]>),
    /// Items of a table, in order of their keys.
    Table(Vec<Item>),
    /// Roots of objects.
    Objects(Box<[Option<Root>; FANOUT]>),
}

impl Body {
    /// A leaf of a tree of this kind with nothing in it.
    pub(crate) fn empty_leaf(kind: Kind) -> Self {
        match kind {
            Kind::Map => Self::Map(MapLeaf::empty()),
            Kind::Bits => Self::Bits(Box::new([0; WORDS])),
            Kind::Sums => Self::Sums(Box::new([0; SUMS])),
            Kind::Table => Self::Table(Vec::new()),
            Kind::Objects => Self::Objects(Box::new([const { None }; FANOUT])),
        }
    }

    pub(crate) fn empty_inner() -> Self {
        Self::Inner(Box::new([const { Child::Empty }; FANOUT]))
    }
}

/// A page in memory.
#[derive(Debug)]
pub(crate) struct Node {
    /// The block that has this content; none: it is dirty.
    pub(crate) ptr: Cell<Option<Ptr>>,
    /// Used since the last look of who drops pages.
    pub(crate) warm: Cell<bool>,
    pub(crate) level: u8,
    /// A cell, since loading and dropping children does not change what a page means.
    pub(crate) body: RefCell<Body>,
}

impl Node {
    pub(crate) fn new(ptr: Option<Ptr>, level: u8, body: Body) -> Self {
        Self {
            ptr: Cell::new(ptr),
            warm: Cell::new(true),
            level,
            body: RefCell::new(body),
        }
    }

    /// It is used, so it stays in memory for a while.
    pub(crate) fn use_it(&self) {
        // Most are warm, and a write would take the cache line from who reads it.
        if !self.warm.get() {
            self.warm.set(true);
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.ptr.get().is_none()
    }
}

/// A page is needed that is not in memory: load it ([`Missing::ptr`]), put it in its place, and look again.
#[derive(Debug, Clone)]
pub(crate) struct Missing {
    pub(crate) ptr: Ptr,
    pub(crate) kind: Kind,
    pub(crate) place: Place,
}

/// Where a missing page belongs.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Root(Rc<RefCell<Child>>),
    Inner(Rc<Node>, usize),
}

impl Place {
    /// Runs on the child's place.
    pub(crate) fn with<R>(&self, use_child: impl FnOnce(&mut Child) -> R) -> Option<R> {
        match self {
            Self::Root(root) => Some(use_child(&mut root.borrow_mut())),
            Self::Inner(node, index) => match &mut *node.body.borrow_mut() {
                Body::Inner(children) => children.get_mut(*index).map(use_child),
                _ => None,
            },
        }
    }
}

/// Where a page in memory hangs, for who drops pages.
#[derive(Debug)]
struct Resident {
    parent: Weak<Node>,
    index: usize,
}

/// What all trees of a file system share: which pages changed, which blocks they leave, which are in memory.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    /// Blocks whose pages have changed or gone since the last checkpoint began.
    freed: RefCell<Vec<u64>>,
    /// Nodes that were copied to be changed: their blocks may become known only when the running checkpoint has written them.
    superseded: RefCell<Vec<Rc<Node>>>,
    /// Pages that became dirty since the last checkpoint began, at least.
    dirtied: Cell<u64>,
    /// Leaves in memory, oldest first.
    resident: RefCell<VecDeque<Resident>>,
}

impl Pages {
    /// Makes the node ours alone and dirty: it is about to be changed.
    pub(crate) fn touch(&self, node: &mut Rc<Node>) {
        if Rc::strong_count(node) > 1 {
            let copy = Rc::new(Node::new(None, node.level, node.body.borrow().clone()));
            self.dirtied.set(self.dirtied.get() + 1);
            self.note_leaves(&copy);
            let old = std::mem::replace(node, copy);
            self.superseded.borrow_mut().push(old);
        } else if let Some(ptr) = node.ptr.take() {
            self.freed.borrow_mut().push(ptr.block);
            self.dirtied.set(self.dirtied.get() + 1);
        }
    }

    /// The leaves under a copy can be dropped from there, too.
    pub(super) fn note_leaves(&self, copy: &Rc<Node>) {
        if copy.level != 1 {
            return;
        }
        if let Body::Inner(children) = &*copy.body.borrow() {
            for (index, child) in children.iter().enumerate() {
                if matches!(child, Child::Loaded(_)) {
                    self.now_resident(copy, index);
                }
            }
        }
    }

    /// A page comes into being.
    pub(crate) fn created(&self, level: u8, body: Body) -> Rc<Node> {
        self.dirtied.set(self.dirtied.get() + 1);
        Rc::new(Node::new(None, level, body))
    }

    /// A child is gone for good, and what is below it as well or elsewhere.
    pub(crate) fn dropped(&self, child: &Child) {
        match child {
            Child::Media(ptr) => self.freed.borrow_mut().push(ptr.block),
            Child::Loaded(node) => match node.ptr.get() {
                Some(ptr) if Rc::strong_count(node) == 1 => self.freed.borrow_mut().push(ptr.block),
                _ => self.superseded.borrow_mut().push(Rc::clone(node)),
            },
            Child::Empty | Child::Run(_) => {}
        }
    }

    /// How many pages the next checkpoint writes, at most.
    pub(crate) fn dirtied(&self) -> u64 {
        self.dirtied.get()
    }

    /// A checkpoint begins: the blocks that its trees do not use any more.
    pub(crate) fn begin_checkpoint(&self) -> Vec<u64> {
        self.dirtied.set(0);
        let mut freed = self.freed.take();
        let superseded = self.superseded.take();
        freed.extend(
            superseded
                .iter()
                .filter_map(|node| node.ptr.get())
                .map(|ptr| ptr.block),
        );
        freed
    }

    /// A leaf was put under an inner page.
    pub(crate) fn now_resident(&self, parent: &Rc<Node>, index: usize) {
        let parent = Rc::downgrade(parent);
        self.resident.borrow_mut().push_back(Resident { parent, index });
    }

    /// Puts a page that was loaded in its place, if that still waits for it.
    pub(crate) fn install(&self, missing: &Missing, node: Rc<Node>) {
        let there = missing.place.with(|child| {
            let wanted = matches!(child, Child::Media(ptr) if *ptr == missing.ptr);
            if wanted {
                *child = Child::Loaded(node);
            }
            wanted
        });
        if there == Some(true)
            && let Place::Inner(parent, index) = &missing.place
            && parent.level == 1
        {
            self.now_resident(parent, *index);
        }
    }

    /// Leaves in memory, about.
    pub(crate) fn resident(&self) -> usize {
        self.resident.borrow().len()
    }

    /// Drops clean leaves that were not used lately until at most `limit` are in memory, or all were looked at. Not while a
    /// checkpoint runs: what it has not written yet counts as clean.
    pub(crate) fn evict(&self, limit: usize) {
        let mut looks = self.resident.borrow().len();
        while looks > 0 && self.resident.borrow().len() > limit {
            looks -= 1;
            let Some(oldest) = self.resident.borrow_mut().pop_front() else {
                return;
            };
            if self.is_kept(&oldest) {
                self.resident.borrow_mut().push_back(oldest);
            }
        }
    }

    fn is_kept(&self, resident: &Resident) -> bool {
        let Some(parent) = resident.parent.upgrade() else {
            return false;
        };
        let Body::Inner(children) = &mut *parent.body.borrow_mut() else {
            return false;
        };
        let Some(Child::Loaded(node)) = children.get(resident.index) else {
            return false;
        };
        let Some(ptr) = node.ptr.get() else { return true };
        if node.warm.replace(false) || Rc::strong_count(node) > 1 {
            return true;
        }
        children[resident.index] = Child::Media(ptr);
        false
    }
}

impl Pages {
    /// Blocks of the last checkpoint that the trees do not use any more. Not while a checkpoint runs.
    pub(crate) fn left_blocks(&self) -> Vec<u64> {
        let mut left = self.freed.borrow().clone();
        let superseded = self.superseded.borrow();
        left.extend(
            superseded
                .iter()
                .filter_map(|node| node.ptr.get())
                .map(|ptr| ptr.block),
        );
        left
    }
}
