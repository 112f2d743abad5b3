//! Trees by hash: items under 64-bit keys. A leaf holds the items of a range of keys; one that is full becomes an inner page whose 256
//! children take the next eight bits of the key.
//!
//! ```text
//!   [ leaf: up to 4096 bytes of items ]        grows into       [ inner page: child = next 8 bits of the key ]
//!                                                                  │       │
//!                                                                leaf    nothing …
//! ```
//!
//! The key of a directory's item is the hash of the name, keyed with a secret of the file system, so nobody can make names collide. The
//! key of an inode is its number with the bytes swapped, so that consecutive numbers spread. Several items may have one key; who looks
//! says which one is meant.

use std::cell::RefCell;
use std::rc::Rc;

use super::codec::{Kind, PAGE};
use super::node::{Body, Child, FANOUT, Missing, Node, Pages, Place, Root};
use crate::state::{Damage, Stop};

/// Bytes of an item beside its data.
const ITEM_HEADER: usize = 10;
/// Bytes of a leaf beside its items.
const PAGE_HEADER: usize = 8;
/// The largest data of an item: three fit into a leaf.
pub(crate) const MAX_DATA: usize = 1300;
/// The level of the root if it is an inner page: a key has eight bytes.
const TOP: u8 = 8;

/// An item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) key: u64,
    pub(crate) data: Rc<[u8]>,
}

impl Item {
    fn size(&self) -> usize {
        ITEM_HEADER + self.data.len()
    }
}

/// More items with one key than fit into a page. For hashes of names this takes about 2^32 names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// A tree by hash.
#[derive(Debug)]
pub(crate) struct Table {
    root: Rc<RefCell<Child>>,
}

fn slot(key: u64, level: u8) -> usize {
    let shift = 8 * u32::from(level.clamp(1, TOP) - 1);
    usize::try_from(key >> shift & 0xff).unwrap_or(0)
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            root: Rc::new(RefCell::new(Child::Empty)),
        }
    }

    pub(crate) fn from_root(root: Root) -> Self {
        Self {
            root: Rc::new(RefCell::new(root.child)),
        }
    }

    pub(crate) fn to_root(&self) -> Root {
        let child = self.root.borrow().clone();
        let level = match &child {
            Child::Loaded(node) => node.level,
            Child::Media(ptr) => ptr.level,
            Child::Empty | Child::Run(_) => 0,
        };
        Root {
            child,
            level,
            kind: Kind::Table,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.root.borrow().is_empty()
    }

    /// The leaf that has the items of a key, if there is one.
    fn leaf(&self, key: u64) -> Result<Option<Rc<Node>>, Missing> {
        let mut child = self.root.borrow().clone();
        let mut place = Place::Root(Rc::clone(&self.root));
        loop {
            let node = match child {
                Child::Loaded(node) => node,
                Child::Media(ptr) => {
                    return Err(Missing {
                        ptr,
                        kind: Kind::Table,
                        place,
                    });
                }
                Child::Empty | Child::Run(_) => return Ok(None),
            };
            let index = slot(key, node.level);
            let next = match &*node.body.borrow() {
                Body::Inner(children) => children[index].clone(),
                _ => {
                    node.warm.set(true);
                    return Ok(Some(Rc::clone(&node)));
                }
            };
            child = next;
            place = Place::Inner(node, index);
        }
    }

    /// The data of the item of a key that is meant.
    pub(crate) fn get(&self, key: u64, meant: impl Fn(&[u8]) -> bool) -> Result<Option<Rc<[u8]>>, Missing> {
        let Some(node) = self.leaf(key)? else {
            return Ok(None);
        };
        let body = node.body.borrow();
        let Body::Table(items) = &*body else {
            return Ok(None);
        };
        let found = items.iter().find(|item| item.key == key && meant(&item.data));
        Ok(found.map(|item| Rc::clone(&item.data)))
    }

    /// Everything that [`Self::put`] and [`Self::remove`] need for this key is in memory.
    pub(crate) fn ensure(&self, key: u64) -> Result<(), Missing> {
        self.leaf(key).map(|_| ())
    }

    /// Puts an item in place of the one that is meant, or beside the others.
    pub(crate) fn put(
        &self,
        pages: &Pages,
        key: u64,
        data: &[u8],
        meant: impl Fn(&[u8]) -> bool,
    ) -> Result<Result<(), Full>, Missing> {
        debug_assert!(data.len() <= MAX_DATA);
        self.ensure(key)?;
        let item = Item {
            key,
            data: data.into(),
        };
        Ok(put_into(pages, &mut self.root.borrow_mut(), TOP, item, &meant))
    }

    /// Takes the item out that is meant.
    pub(crate) fn remove(
        &self,
        pages: &Pages,
        key: u64,
        meant: impl Fn(&[u8]) -> bool,
    ) -> Result<bool, Missing> {
        if self.get(key, &meant)?.is_none() {
            return Ok(false);
        }
        remove_from(pages, &mut self.root.borrow_mut(), key, &meant);
        Ok(true)
    }

    /// Items in order of their keys from `from` on: those of one leaf at least, and all with the same key together. With the key from
    /// which to go on.
    ///
    /// # Errors
    /// A page is missing, or one is in a place where its keys do not belong.
    pub(crate) fn scan(&self, from: u64) -> Result<(Vec<Item>, Option<u64>), Stop> {
        let root = self.root.borrow().clone();
        let place = Place::Root(Rc::clone(&self.root));
        let mut found = Vec::new();
        let next = scan_in(&root, &place, (0, u64::MAX), from, &mut found)?;
        Ok((found, next))
    }
}

/// Returns the key behind the leaf that was read, or none at the end.
fn scan_in(
    child: &Child,
    place: &Place,
    (start, end): (u64, u64),
    from: u64,
    found: &mut Vec<Item>,
) -> Result<Option<u64>, Stop> {
    let node = match child {
        Child::Empty | Child::Run(_) => return Ok(None),
        Child::Media(ptr) => {
            return Err(Stop::Missing(Missing {
                ptr: *ptr,
                kind: Kind::Table,
                place: place.clone(),
            }));
        }
        Child::Loaded(node) => node,
    };
    let body = node.body.borrow();
    let children = match &*body {
        Body::Inner(children) => children,
        Body::Table(items) => {
            node.warm.set(true);
            if items.iter().any(|item| !(start..=end).contains(&item.key)) {
                return Err(Damage::new("a table", "has items in a page where they are not found").into());
            }
            found.extend(items.iter().filter(|item| item.key >= from).cloned());
            return Ok(None);
        }
        _ => return Ok(None),
    };
    let shift = 8 * u32::from(node.level.clamp(1, TOP) - 1);
    for (index, child) in (0_u64..).zip(children.iter()) {
        let first = start | index << shift;
        let last = first | ((1 << shift) - 1);
        if last < from || child.is_empty() {
            continue;
        }
        let place = Place::Inner(Rc::clone(node), usize::try_from(index).unwrap_or(0));
        let next = scan_in(child, &place, (first, last), from, found)?;
        let behind = next.or(last.checked_add(1));
        if !found.is_empty() {
            return Ok(behind);
        }
    }
    Ok(None)
}

fn put_into(
    pages: &Pages,
    child: &mut Child,
    level: u8,
    item: Item,
    meant: &dyn Fn(&[u8]) -> bool,
) -> Result<(), Full> {
    if child.is_empty() {
        *child = Child::Loaded(pages.created(0, Body::Table(Vec::new())));
    }
    let Child::Loaded(node) = child else {
        return Ok(());
    };
    pages.touch(node);
    let mut body = node.body.borrow_mut();
    match &mut *body {
        Body::Inner(children) => {
            let next = &mut children[slot(item.key, node.level)];
            return put_into(pages, next, node.level - 1, item, meant);
        }
        Body::Table(items) => {
            let before = items.clone();
            if let Some(old) = items
                .iter_mut()
                .find(|old| old.key == item.key && meant(&old.data))
            {
                *old = item;
            } else {
                let place = items.partition_point(|old| old.key <= item.key);
                items.insert(place, item);
            }
            if fits(items) {
                return Ok(());
            }
            match split(pages, items, level) {
                Ok(inner) => {
                    drop(body);
                    // A page that was touched is dirty: no block is left behind.
                    *child = inner;
                }
                Err(full) => {
                    *items = before;
                    return Err(full);
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn fits(items: &[Item]) -> bool {
    PAGE_HEADER + items.iter().map(Item::size).sum::<usize>() <= PAGE
}

/// A leaf's items as an inner page of this level; deeper, where all have one path.
fn split(pages: &Pages, items: &[Item], level: u8) -> Result<Child, Full> {
    if level == 0 {
        return Err(Full);
    }
    let mut body = Body::empty_inner();
    if let Body::Inner(children) = &mut body {
        for group in items.chunk_by(|a, b| slot(a.key, level) == slot(b.key, level)) {
            let index = group.first().map_or(0, |item| slot(item.key, level));
            children[index] = if fits(group) {
                Child::Loaded(pages.created(0, Body::Table(group.to_vec())))
            } else {
                split(pages, group, level - 1)?
            };
        }
    }
    Ok(Child::Loaded(pages.created(level, body)))
}

fn remove_from(pages: &Pages, child: &mut Child, key: u64, meant: &dyn Fn(&[u8]) -> bool) {
    let Child::Loaded(node) = child else { return };
    pages.touch(node);
    let empty = match &mut *node.body.borrow_mut() {
        Body::Inner(children) => {
            remove_from(pages, &mut children[slot(key, node.level)], key, meant);
            children.iter().all(Child::is_empty)
        }
        Body::Table(items) => {
            if let Some(index) = items.iter().position(|item| item.key == key && meant(&item.data)) {
                items.remove(index);
            }
            items.is_empty()
        }
        _ => false,
    };
    if empty {
        *child = Child::Empty;
    }
}

/// A leaf on media: u16 count, six zero bytes, then per item u64 key, u16 length, data.
pub(super) fn encode(items: &[Item], page: &mut [u8]) {
    page.fill(0);
    let count = u16::try_from(items.len()).unwrap_or(0);
    page[..2].copy_from_slice(&count.to_le_bytes());
    let mut rest = &mut page[PAGE_HEADER..];
    for item in items {
        let (head, tail) = rest.split_at_mut(item.size());
        head[..8].copy_from_slice(&item.key.to_le_bytes());
        let length = u16::try_from(item.data.len()).unwrap_or(0);
        head[8..ITEM_HEADER].copy_from_slice(&length.to_le_bytes());
        head[ITEM_HEADER..].copy_from_slice(&item.data);
        rest = tail;
    }
}

pub(super) fn decode(page: &[u8]) -> Result<Vec<Item>, &'static str> {
    let short = "items end too early";
    let (count, rest) = page.split_first_chunk::<2>().ok_or(short)?;
    let mut rest = rest.get(PAGE_HEADER - 2..).ok_or(short)?;
    let mut items: Vec<Item> = Vec::new();
    for _ in 0..u16::from_le_bytes(*count) {
        let (key, after) = rest.split_first_chunk::<8>().ok_or(short)?;
        let (length, after) = after.split_first_chunk::<2>().ok_or(short)?;
        let (data, after) = after
            .split_at_checked(usize::from(u16::from_le_bytes(*length)))
            .ok_or(short)?;
        let key = u64::from_le_bytes(*key);
        if items.last().is_some_and(|last| last.key > key) || data.len() > MAX_DATA {
            return Err("items out of order, or one too large");
        }
        items.push(Item {
            key,
            data: data.into(),
        });
        rest = after;
    }
    Ok(items)
}

const _: () = assert!(PAGE_HEADER + 3 * (ITEM_HEADER + MAX_DATA) <= PAGE && FANOUT == 256);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn all(table: &Table) -> Vec<Item> {
        let mut items = Vec::new();
        let mut from = Some(0);
        while let Some(key) = from {
            let (some, next) = table.scan(key).unwrap();
            items.extend(some);
            from = next;
        }
        items
    }

    #[test]
    fn a_table_holds_what_a_map_holds() {
        let (table, pages) = (Table::new(), Pages::default());
        let mut model = BTreeMap::new();
        let mut state = 1_u64;
        for round in 0..20_000_u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = if round % 3 == 0 {
                state >> 40
            } else {
                state.rotate_left(17)
            };
            let data = vec![u8::try_from(round % 251).unwrap(); usize::try_from(state >> 50).unwrap() % 200];
            if round % 4 == 3 {
                let known = model.keys().next().copied().unwrap_or(key);
                assert_eq!(
                    table.remove(&pages, known, |_| true).unwrap(),
                    model.remove(&known).is_some()
                );
            } else {
                table.put(&pages, key, &data, |_| true).unwrap().unwrap();
                model.insert(key, data);
            }
        }
        let items: Vec<_> = all(&table)
            .into_iter()
            .map(|item| (item.key, item.data.to_vec()))
            .collect();
        assert_eq!(items, model.clone().into_iter().collect::<Vec<_>>());
        for key in model.keys() {
            assert!(table.remove(&pages, *key, |_| true).unwrap());
        }
        assert!(table.is_empty());
    }

    #[test]
    fn one_key_has_room_for_a_page_of_items() {
        let (table, pages) = (Table::new(), Pages::default());
        let mut put = 0_u32;
        while table
            .put(&pages, 7, &put.to_le_bytes(), |_| false)
            .unwrap()
            .is_ok()
        {
            put += 1;
        }
        assert_eq!(put, 292);
    }
}
