//! Pages on media: `docs/src/formats/filesys.md`. A page has no header. Its parent knows its checksum, so a page that is torn, old,
//! or somebody else's is not taken for good.

use super::leaf::MapLeaf;
use super::node::{Body, Child, FANOUT, Node, Ptr, Root};
use super::table;
use crate::checksum::crc32c;
use crate::entry::Entry;
use crate::units::SUB_CLUSTER;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
const SLOT: usize = 16;
/// Levels above a leaf: enough for numbers of 64 bits.
pub(crate) const MAX_LEVEL: u8 = 8;
/// Block numbers have 48 bits.
const MAX_BLOCK: u64 = (1 << 48) - 1;

const EMPTY: u8 = 0;
const PAGE_AT: u8 = 1;
const RUN: u8 = 2;

/// What a tree's leaves are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Map,
    Bits,
    Sums,
    Table,
    Objects,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Map => 1,
            Self::Bits => 2,
            Self::Sums => 3,
            Self::Table => 4,
            Self::Objects => 5,
        }
    }

    /// The highest level that a root can have: enough for all numbers that this kind of tree is asked for.
    fn most_level(self) -> u8 {
        match self {
            // 2^30 clusters of a file; 2^40 clusters of a volume; 2^40 objects; 2^44 sub-clusters; keys of eight bytes.
            Self::Map => 3,
            Self::Bits | Self::Objects => 4,
            Self::Sums => 5,
            Self::Table => MAX_LEVEL,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Map, Self::Bits, Self::Sums, Self::Table, Self::Objects]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

/// A page is not what its parent says.
#[derive(Debug, Clone, thiserror::Error)]
#[error("metadata page in block {block}: {problem}")]
pub(crate) struct BadPage {
    pub(crate) block: u64,
    pub(crate) problem: &'static str,
}

fn encode_slot(child: &Child, level: u8, kind: u8) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    let (code, aux, word, long) = match child {
        Child::Empty => (EMPTY, 0, 0, 0),
        Child::Run(entry) => {
            let (place, subs) = entry.to_parts();
            (RUN, 0, subs, place)
        }
        Child::Media(ptr) => (PAGE_AT, ptr.aux, ptr.crc, ptr.block),
        Child::Loaded(node) => match node.ptr.get() {
            Some(ptr) => (PAGE_AT, ptr.aux, ptr.crc, ptr.block),
            // Pages are written from the leaves up, so this cannot be; a reader would refuse it.
            None => (u8::MAX, 0, 0, 0),
        },
    };
    slot[0] = code;
    slot[1] = level;
    slot[2..4].copy_from_slice(&aux.to_le_bytes());
    slot[4..8].copy_from_slice(&word.to_le_bytes());
    slot[8..16].copy_from_slice(&long.to_le_bytes());
    // Only slots of objects say what kind of tree it is; inner pages know.
    slot[0] |= kind << 4;
    slot
}

fn decode_slot(slot: &[u8; SLOT], kind: Kind) -> Result<(Child, u8), &'static str> {
    let [code, level, aux @ ..] = slot;
    let (aux, rest) = aux.split_first_chunk::<2>().ok_or("a slot is short")?;
    let (word, rest) = rest.split_first_chunk::<4>().ok_or("a slot is short")?;
    let (long, _) = rest.split_first_chunk::<8>().ok_or("a slot is short")?;
    let (aux, word, long) = (
        u16::from_le_bytes(*aux),
        u32::from_le_bytes(*word),
        u64::from_le_bytes(*long),
    );
    if *level > kind.most_level() {
        return Err("a slot's level is too high");
    }
    let child = match *code & 0xf {
        EMPTY if aux == 0 && word == 0 && long == 0 => Child::Empty,
        RUN if aux == 0 => {
            let entry = Entry::from_parts(long, word).ok_or("a run is none")?;
            let fits = matches!(kind, Kind::Map) || (kind == Kind::Bits && entry.is_hole());
            if !fits {
                return Err("a run where none can be");
            }
            Child::Run(entry)
        }
        PAGE_AT if long <= MAX_BLOCK => Child::Media(Ptr {
            block: long,
            crc: word,
            aux,
            level: *level,
        }),
        _ => return Err("a slot is none"),
    };
    Ok((child, *level))
}

/// The slot of an object's tree, as the object table and the superblock have it.
pub(crate) fn encode_root(root: &Root) -> [u8; SLOT] {
    encode_slot(&root.child, root.level, root.kind.code())
}

/// `None` inside: there is no such object.
pub(crate) fn decode_root(slot: &[u8; SLOT]) -> Result<Option<Root>, &'static str> {
    let code = slot[0] >> 4;
    if code == 0 {
        return if *slot == [0; SLOT] {
            Ok(None)
        } else {
            Err("an object without a kind")
        };
    }
    let kind = Kind::from_code(code).ok_or("an object of an unknown kind")?;
    let (child, level) = decode_slot(slot, kind)?;
    // Inner pages of tables take the bits of keys from the first on.
    if kind == Kind::Table && !(level == 0 || level == MAX_LEVEL) {
        return Err("a table of an impossible level");
    }
    Ok(Some(Root { child, level, kind }))
}

/// A page as it goes to the medium. Its children's blocks are known.
pub(crate) fn encode(node: &Node, page: &mut [u8]) {
    debug_assert_eq!(page.len(), PAGE);
    match &*node.body.borrow() {
        Body::Inner(children) => {
            for (slot, child) in page.chunks_exact_mut(SLOT).zip(children.iter()) {
                slot.copy_from_slice(&encode_slot(child, child_level(child, node.level), 0));
            }
        }
        Body::Map(entries) => {
            for (slot, entry) in page.chunks_exact_mut(SLOT).zip(entries.iter()) {
                slot.copy_from_slice(&entry.to_bytes());
            }
        }
        Body::Bits(words) => {
            for (bytes, word) in page.chunks_exact_mut(8).zip(words.iter()) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        Body::Sums(sums) => {
            for (bytes, sum) in page.chunks_exact_mut(4).zip(sums.iter()) {
                bytes.copy_from_slice(&sum.to_le_bytes());
            }
        }
        Body::Table(items) => table::encode(items, page),
        Body::Objects(roots) => {
            for (slot, root) in page.chunks_exact_mut(SLOT).zip(roots.iter()) {
                slot.copy_from_slice(&root.as_ref().map_or([0; SLOT], encode_root));
            }
        }
    }
}

fn child_level(child: &Child, parent: u8) -> u8 {
    match child {
        Child::Media(ptr) => ptr.level,
        Child::Loaded(node) => node.level,
        Child::Empty | Child::Run(_) => parent.saturating_sub(1),
    }
}

/// What a parent keeps of a leaf: clear bits of a bitmap page, entries with a place of a map page.
pub(crate) fn aux_of(body: &Body) -> u16 {
    match body {
        Body::Map(entries) => {
            let placed = entries.iter().filter(|entry| entry.location().is_some()).count();
            u16::try_from(placed).unwrap_or(u16::MAX)
        }
        Body::Bits(words) => {
            let clear: u32 = words.iter().map(|word| word.count_zeros()).sum();
            u16::try_from(clear).unwrap_or(u16::MAX)
        }
        _ => 0,
    }
}

/// The page at `ptr` of a tree of this kind.
pub(crate) fn decode(ptr: Ptr, kind: Kind, page: &[u8]) -> Result<Node, BadPage> {
    let bad = |problem| BadPage {
        block: ptr.block,
        problem,
    };
    if page.len() != PAGE || crc32c(page) != ptr.crc {
        return Err(bad("its checksum is not the one that was written"));
    }
    let body = if ptr.level > 0 {
        decode_inner(ptr.level, kind, page).map_err(bad)?
    } else {
        decode_leaf(kind, page).map_err(bad)?
    };
    Ok(Node::new(Some(ptr), ptr.level, body))
}

fn decode_inner(level: u8, kind: Kind, page: &[u8]) -> Result<Body, &'static str> {
    let mut body = Body::empty_inner();
    if let Body::Inner(children) = &mut body {
        for (child, slot) in children.iter_mut().zip(page.as_chunks::<SLOT>().0) {
            let (decoded, below) = decode_slot(slot, kind)?;
            let right = below + 1 == level || (kind == Kind::Table && below == 0);
            if !right || slot[0] >> 4 != 0 {
                return Err("a child of a wrong level");
            }
            *child = decoded;
        }
        // Such a page is never written. With them, a few pages could pretend to be a tree that nobody gets to the end of.
        if children.iter().all(Child::is_empty) {
            return Err("a page without children");
        }
    }
    Ok(body)
}

fn decode_leaf(kind: Kind, page: &[u8]) -> Result<Body, &'static str> {
    let mut body = Body::empty_leaf(kind);
    match &mut body {
        Body::Map(leaf) => {
            let mut entries = [Entry::HOLE; FANOUT];
            for (entry, bytes) in entries.iter_mut().zip(page.as_chunks::<SLOT>().0) {
                *entry = Entry::from_bytes(bytes).ok_or("an entry is none")?;
            }
            if entries.iter().all(|entry| entry.is_hole()) {
                return Err("a page of holes");
            }
            *leaf = MapLeaf::of(&entries);
        }
        Body::Bits(words) => {
            for (word, bytes) in words.iter_mut().zip(page.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
        }
        Body::Sums(sums) => {
            for (sum, bytes) in sums.iter_mut().zip(page.as_chunks::<4>().0) {
                *sum = u32::from_le_bytes(*bytes);
            }
        }
        Body::Table(items) => {
            *items = table::decode(page)?;
            if items.is_empty() {
                return Err("a page without items");
            }
        }
        Body::Objects(roots) => {
            for (root, slot) in roots.iter_mut().zip(page.as_chunks::<SLOT>().0) {
                *root = decode_root(slot)?;
            }
        }
        Body::Inner(_) => {}
    }
    Ok(body)
}

const _: () = assert!(FANOUT * SLOT == PAGE && PAGE as u64 == SUB_CLUSTER);
