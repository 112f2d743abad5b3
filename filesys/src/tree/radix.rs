//! Trees by number: element `n` lies in leaf `n / elements per leaf`, and inner pages take eight bits of the leaf's number each.
//!
//! ```text
//!   level 2           [ child 0 | child 1 | … | child 255 ]           256 × 256 leaves each
//!   level 1           [ leaf | run of 256 clusters | nothing | … ]    runs need no page at any level
//!   level 0           entries, bits, checksums, roots
//! ```
//!
//! A tree is as high as its highest element needs. Whatever is uniform (a run of consecutive clusters in one state, all bits set, nothing) is
//! one [`Child`] and no page, at any level, so a file written in order costs 16 bytes for 16 MiB, and later for 4 GiB.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::codec::{Kind, MAX_LEVEL};
use super::leaf::MapLeaf;
use super::node::{Body, Child, FANOUT, Missing, Node, Pages, Place, Root};
use crate::entry::Entry;

/// Elements are numbered below this.
const MOST_ELEMENTS: u64 = 1 << 44;
/// Bits of a child's number within an inner page.
const STEP: u32 = 8;

impl Kind {
    /// A leaf has 2 to the power of this elements.
    pub(crate) fn leaf_bits(self) -> u32 {
        match self {
            Self::Map | Self::Objects => 8,
            Self::Sums => 10,
            Self::Bits => 15,
            Self::Table => 0,
        }
    }
}

/// A tree by number.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Rc<RefCell<Child>>,
    level: Cell<u8>,
    kind: Kind,
}

/// What is found for an element.
#[derive(Debug, Clone)]
pub(crate) enum Look {
    /// There is no page: holes, clear bits.
    Empty,
    /// There is no page: the entry of the element; or bits that are set.
    Run(Entry),
    /// The page with the element.
    Leaf(Rc<Node>),
}

/// As [`Look`], of a page that is only looked at: costs no counters of references.
pub(crate) enum View<'a> {
    Empty,
    Run(Entry),
    Leaf(&'a Body),
}

/// A part of a tree that is not empty.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// First element.
    pub(crate) start: u64,
    /// How many elements.
    pub(crate) count: u64,
}

/// What a change is made to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The content of a leaf.
    Leaf,
    /// The child of this level, as a whole.
    Child(u8),
}

impl Tree {
    pub(crate) fn new(kind: Kind) -> Self {
        Self::from_root(Root {
            child: Child::Empty,
            level: 0,
            kind,
        })
    }

    pub(crate) fn from_root(root: Root) -> Self {
        Self {
            root: Rc::new(RefCell::new(root.child)),
            level: Cell::new(root.level),
            kind: root.kind,
        }
    }

    /// The tree as it is now; later changes do not show in it.
    pub(crate) fn to_root(&self) -> Root {
        Root {
            child: self.root.borrow().clone(),
            level: self.level.get(),
            kind: self.kind,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.root.borrow().is_empty()
    }

    /// Elements under a child of a page of this level.
    pub(crate) fn elements(&self, level: u8) -> u64 {
        1_u64
            .checked_shl(self.kind.leaf_bits() + STEP * u32::from(level))
            .unwrap_or(u64::MAX)
    }

    fn slot(&self, index: u64, level: u8) -> usize {
        let shift = self.kind.leaf_bits() + STEP * u32::from(level.saturating_sub(1));
        usize::try_from(index.checked_shr(shift).unwrap_or(0) % FANOUT as u64).unwrap_or(0)
    }

    fn reaches(&self, index: u64) -> bool {
        index < self.elements(self.level.get())
    }

    /// Looks for an element.
    pub(crate) fn look(&self, index: u64) -> Result<Look, Missing> {
        if !self.reaches(index) {
            return Ok(Look::Empty);
        }
        let mut level = self.level.get();
        let mut node = match &*self.root.borrow() {
            Child::Loaded(node) => Rc::clone(node),
            other => return self.look_at(other, index, level, || Place::Root(Rc::clone(&self.root))),
        };
        loop {
            if level == 0 {
                node.use_it();
                return Ok(Look::Leaf(node));
            }
            let slot = self.slot(index, level);
            level -= 1;
            let next = {
                let body = node.body.borrow();
                let Body::Inner(children) = &*body else {
                    return Ok(Look::Empty);
                };
                match &children[slot] {
                    Child::Loaded(next) => Rc::clone(next),
                    other => {
                        return self.look_at(other, index, level, || Place::Inner(Rc::clone(&node), slot));
                    }
                }
            };
            node = next;
        }
    }

    fn look_at(
        &self,
        child: &Child,
        index: u64,
        level: u8,
        place: impl FnOnce() -> Place,
    ) -> Result<Look, Missing> {
        match child {
            Child::Run(first) => Ok(Look::Run(first.nth(index % self.elements(level)))),
            Child::Media(ptr) => Err(Missing {
                ptr: *ptr,
                kind: self.kind,
                place: place(),
            }),
            Child::Empty | Child::Loaded(_) => Ok(Look::Empty),
        }
    }

    /// Looks at an element. Every request comes here several times.
    pub(crate) fn view<R>(&self, index: u64, look: impl Fn(View<'_>) -> R) -> Result<R, Missing> {
        if !self.reaches(index) {
            return Ok(look(View::Empty));
        }
        if let Some(seen) = self.view_below(&self.root.borrow(), index, self.level.get(), &look) {
            return Ok(seen);
        }
        Ok(match self.look(index)? {
            Look::Empty => look(View::Empty),
            Look::Run(entry) => look(View::Run(entry)),
            Look::Leaf(node) => look(View::Leaf(&node.body.borrow())),
        })
    }

    /// An element below a child, if all on the way is in memory.
    fn view_below<R>(
        &self,
        child: &Child,
        index: u64,
        level: u8,
        look: &impl Fn(View<'_>) -> R,
    ) -> Option<R> {
        let node = match child {
            Child::Loaded(node) => node,
            Child::Empty => return Some(look(View::Empty)),
            Child::Run(first) => return Some(look(View::Run(first.nth(index % self.elements(level))))),
            Child::Media(_) => return None,
        };
        let body = node.body.borrow();
        if level == 0 {
            node.use_it();
            return Some(look(View::Leaf(&body)));
        }
        match &*body {
            Body::Inner(children) => {
                self.view_below(&children[self.slot(index, level)], index, level - 1, look)
            }
            _ => Some(look(View::Empty)),
        }
    }

    /// All on the way to an element is in memory.
    pub(crate) fn ensure(&self, index: u64) -> Result<(), Missing> {
        self.view(index, |_| ())
    }

    /// An entry of a map.
    pub(crate) fn entry(&self, index: u64) -> Result<Entry, Missing> {
        self.view(index, |view| match view {
            View::Run(entry) => entry,
            View::Leaf(Body::Map(leaf)) => leaf.get(usize::try_from(index % FANOUT as u64).unwrap_or(0)),
            View::Empty | View::Leaf(_) => Entry::HOLE,
        })
    }

    /// Changes the leaf with an element. What becomes uniform loses its page.
    pub(crate) fn change<R>(
        &self,
        pages: &Pages,
        index: u64,
        change: impl FnOnce(&mut Body) -> R,
    ) -> Result<R, Missing> {
        self.ensure(index)?;
        self.grow(pages, index);
        let mut change = Some(change);
        let mut result = None;
        let mut at_leaf = |child: &mut Child| {
            if let (Child::Loaded(node), Some(change)) = (&mut *child, change.take()) {
                pages.touch(node);
                result = Some(change(&mut node.body.borrow_mut()));
            }
            collapse(child, self.kind, 0);
        };
        let mut root = self.root.borrow_mut();
        self.descend(
            pages,
            &mut root,
            self.level.get(),
            index,
            Target::Leaf,
            &mut at_leaf,
        );
        // The path was looked at above, so the leaf was reached.
        result.ok_or_else(|| unreachable_leaf(self))
    }

    /// Puts `new` in place of the child of level `level` (0: a leaf) that has the element, and gives what was there. `new` comes
    /// from the same place of a tree of the same kind, or has no page.
    pub(crate) fn replace(&self, pages: &Pages, index: u64, level: u8, new: Child) -> Result<Child, Missing> {
        self.look_above(index, level)?;
        self.grow(pages, index.max(self.elements(level).saturating_sub(1)));
        let mut new = Some(new);
        let mut old = Child::Empty;
        let mut at_child = |child: &mut Child| {
            if let Some(new) = new.take() {
                old = std::mem::replace(child, new);
            }
        };
        let mut root = self.root.borrow_mut();
        self.descend(
            pages,
            &mut root,
            self.level.get(),
            index,
            Target::Child(level),
            &mut at_child,
        );
        Ok(old)
    }

    /// Everything on the way to the child of this level is in memory.
    pub(crate) fn look_above(&self, index: u64, level: u8) -> Result<(), Missing> {
        if !self.reaches(index) || level >= self.level.get() {
            return Ok(());
        }
        self.child(index, level).map(|_| ())
    }

    /// The child of this level that has the element, and its first element is `index` rounded down; a part of a run is a run.
    pub(crate) fn child(&self, index: u64, level: u8) -> Result<Child, Missing> {
        if !self.reaches(index) {
            return Ok(Child::Empty);
        }
        let mut at = self.level.get();
        if at <= level {
            return Ok(self.root.borrow().clone());
        }
        let mut child = self.root.borrow().clone();
        let mut place = Place::Root(Rc::clone(&self.root));
        while at > level {
            let node = match child {
                Child::Loaded(node) => node,
                Child::Empty => return Ok(Child::Empty),
                Child::Run(first) => {
                    let start = index % self.elements(at) / self.elements(level) * self.elements(level);
                    return Ok(Child::Run(first.nth(start)));
                }
                Child::Media(ptr) => {
                    return Err(Missing {
                        ptr,
                        kind: self.kind,
                        place,
                    });
                }
            };
            let slot = self.slot(index, at);
            child = match &*node.body.borrow() {
                Body::Inner(children) => children[slot].clone(),
                _ => Child::Empty,
            };
            place = Place::Inner(node, slot);
            at -= 1;
        }
        Ok(child)
    }

    /// Makes the tree high enough for an element.
    fn grow(&self, pages: &Pages, index: u64) {
        debug_assert!(
            index < MOST_ELEMENTS,
            "numbers on media are bounded when they are read"
        );
        while !self.reaches(index) && self.level.get() < MAX_LEVEL {
            let level = self.level.get() + 1;
            let mut root = self.root.borrow_mut();
            if !root.is_empty() {
                let mut body = Body::empty_inner();
                if let Body::Inner(children) = &mut body {
                    children[0] = std::mem::replace(&mut *root, Child::Empty);
                }
                let node = pages.created(level, body);
                pages.note_leaves(&node);
                *root = Child::Loaded(node);
            }
            self.level.set(level);
        }
    }

    /// Runs `use_child` on the target with the element. All on the way becomes pages of its own that are dirty.
    fn descend(
        &self,
        pages: &Pages,
        child: &mut Child,
        level: u8,
        index: u64,
        target: Target,
        use_child: &mut dyn FnMut(&mut Child),
    ) {
        if target == Target::Child(level) {
            return use_child(child);
        }
        self.materialise(pages, child, level);
        if level == 0 {
            return use_child(child);
        }
        let Child::Loaded(node) = child else { return };
        pages.touch(node);
        let slot = self.slot(index, level);
        if let Body::Inner(children) = &mut *node.body.borrow_mut() {
            let new_leaf = level == 1 && !matches!(children[slot], Child::Loaded(_));
            self.descend(pages, &mut children[slot], level - 1, index, target, use_child);
            if new_leaf && matches!(children[slot], Child::Loaded(_)) {
                pages.now_resident(node, slot);
            }
        }
        collapse(child, self.kind, level);
    }

    /// A page instead of nothing or of a run.
    fn materialise(&self, pages: &Pages, child: &mut Child, level: u8) {
        let run = match child {
            Child::Empty => None,
            Child::Run(first) => Some(*first),
            Child::Media(_) | Child::Loaded(_) => return,
        };
        let mut body = if level == 0 {
            Body::empty_leaf(self.kind)
        } else {
            Body::empty_inner()
        };
        if let Some(first) = run {
            match &mut body {
                Body::Inner(children) => {
                    let below = self.elements(level - 1);
                    for (number, child) in (0..).zip(children.iter_mut()) {
                        *child = Child::Run(first.nth(number * below));
                    }
                }
                Body::Map(leaf) => {
                    *leaf = MapLeaf::of(&std::array::from_fn(|number| first.nth(number as u64)));
                }
                Body::Bits(words) => words.fill(u64::MAX),
                Body::Sums(_) | Body::Table(_) | Body::Objects(_) => {}
            }
        }
        *child = Child::Loaded(pages.created(level, body));
    }

    /// The first part of the tree that is not empty and ends behind `from`.
    pub(crate) fn next(&self, from: u64) -> Result<Option<Span>, Missing> {
        let root = self.root.borrow().clone();
        let place = Place::Root(Rc::clone(&self.root));
        self.next_in(&root, &place, self.level.get(), 0, from)
    }

    fn next_in(
        &self,
        child: &Child,
        place: &Place,
        level: u8,
        start: u64,
        from: u64,
    ) -> Result<Option<Span>, Missing> {
        let count = self.elements(level);
        let end = start.saturating_add(count);
        if from >= end {
            return Ok(None);
        }
        let node = match child {
            Child::Empty => return Ok(None),
            Child::Run(_) => {
                let skip = from.saturating_sub(start);
                return Ok(Some(Span {
                    start: start + skip,
                    count: count - skip,
                }));
            }
            Child::Media(ptr) => {
                return Err(Missing {
                    ptr: *ptr,
                    kind: self.kind,
                    place: place.clone(),
                });
            }
            Child::Loaded(node) => node,
        };
        if level == 0 {
            node.warm.set(true);
            return Ok(Some(Span { start, count }));
        }
        let body = node.body.borrow();
        let Body::Inner(children) = &*body else {
            return Ok(None);
        };
        let below = self.elements(level - 1);
        let first = usize::try_from(from.saturating_sub(start) / below).unwrap_or(0);
        for (slot, child) in children.iter().enumerate().skip(first) {
            if child.is_empty() {
                continue;
            }
            let start = start + slot as u64 * below;
            let place = Place::Inner(Rc::clone(node), slot);
            let found = self.next_in(child, &place, level - 1, start, from)?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

impl Tree {
    /// All inner pages are in memory, as [`Self::drop_pages`] needs them.
    pub(crate) fn ensure_inner(&self) -> Result<(), Missing> {
        self.inner(&self.root.borrow(), &|| Place::Root(Rc::clone(&self.root)))
    }

    fn inner(&self, child: &Child, place: &dyn Fn() -> Place) -> Result<(), Missing> {
        match child {
            Child::Media(ptr) if ptr.level > 0 => Err(Missing {
                ptr: *ptr,
                kind: self.kind,
                place: place(),
            }),
            Child::Loaded(node) => match &*node.body.borrow() {
                Body::Inner(children) => children
                    .iter()
                    .enumerate()
                    .try_for_each(|(slot, child)| self.inner(child, &|| Place::Inner(Rc::clone(node), slot))),
                _ => Ok(()),
            },
            Child::Media(_) | Child::Empty | Child::Run(_) => Ok(()),
        }
    }

    /// The leaf with this element is written by the next checkpoint, as it is.
    pub(crate) fn rewrite(&self, pages: &Pages, index: u64) -> Result<(), Missing> {
        match self.look(index)? {
            Look::Leaf(_) => self.change(pages, index, |_| ()),
            Look::Empty | Look::Run(_) => Ok(()),
        }
    }

    /// The tree is gone, with all its pages.
    pub(crate) fn drop_pages(&self, pages: &Pages) {
        let root = std::mem::replace(&mut *self.root.borrow_mut(), Child::Empty);
        drop_child(pages, &root);
    }
}

fn drop_child(pages: &Pages, child: &Child) {
    if let Child::Loaded(node) = child
        && let Body::Inner(children) = &*node.body.borrow()
    {
        children.iter().for_each(|child| drop_child(pages, child));
    }
    pages.dropped(child);
}

/// `change` looked at the whole path, so its leaf is there.
#[cold]
fn unreachable_leaf(tree: &Tree) -> Missing {
    debug_assert!(false, "a path that was looked at is not there");
    Missing {
        ptr: super::node::Ptr {
            block: 0,
            crc: 0,
            aux: 0,
            level: 0,
        },
        kind: tree.kind,
        place: Place::Root(Rc::clone(&tree.root)),
    }
}

/// A page whose content is uniform becomes none. It is dirty and ours, so no block is left behind.
fn collapse(child: &mut Child, kind: Kind, level: u8) {
    let Child::Loaded(node) = &*child else { return };
    if !node.is_dirty() {
        return;
    }
    let uniform = match &*node.body.borrow() {
        Body::Map(entries) => uniform_map(entries),
        Body::Bits(words) => uniform_bits(&words[..]),
        Body::Inner(children) if level > 0 => uniform_children(children, kind, level),
        _ => None,
    };
    if let Some(uniform) = uniform {
        *child = uniform;
    }
}

/// Looks at three of them first, then at what is cheap to compare: most pages are not uniform.
fn uniform_map(leaf: &MapLeaf) -> Option<Child> {
    let first = leaf.get(0);
    let all = first.continues(leaf.get(255), 255)
        && leaf.has_equal_subs()
        && first.continues(leaf.get(127), 127)
        && (0_u64..)
            .zip(leaf.iter())
            .all(|(number, entry)| first.continues(entry, number));
    if !all {
        return None;
    }
    Some(if first.is_hole() {
        Child::Empty
    } else {
        Child::Run(first)
    })
}

fn uniform_bits(words: &[u64]) -> Option<Child> {
    let first = *words.first()?;
    if (first != 0 && first != u64::MAX) || words.last() != Some(&first) {
        return None;
    }
    words.iter().all(|word| *word == first).then_some(if first == 0 {
        Child::Empty
    } else {
        Child::Run(Entry::HOLE)
    })
}

fn uniform_children(children: &[Child; FANOUT], kind: Kind, level: u8) -> Option<Child> {
    match &children[0] {
        Child::Empty => children.iter().all(Child::is_empty).then_some(Child::Empty),
        Child::Run(first) => {
            let below = 1_u64 << (kind.leaf_bits() + STEP * u32::from(level - 1));
            let continues = |number: u64, child: &Child| matches!(child, Child::Run(run) if kind == Kind::Bits || first.continues(*run, number * below));
            let all = continues(255, &children[255])
                && (0..)
                    .zip(children)
                    .all(|(number, child)| continues(number, child));
            all.then_some(Child::Run(*first))
        }
        _ => None,
    }
}
