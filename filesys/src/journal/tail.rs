//! The tail of the journal: what was appended and is not durable yet, in memory that outlives the process.
//!
//! Who is answered by a process that is killed then, and goes on with the next one (a guest behind vhost-user, a client that connects
//! again), must find there whatever was written before the answer. Its data are on the volumes, as their writes have completed; what is missing is what
//! the map says of them. To wait for the journal with each such write would cost two flushes. Here it costs a copy of the records:
//!
//! ```text
//!   append(records) ─┬─► open group … closed … written                on the medium: outlives a power cut
//!                    └─► tail: one entry per append                   in memory of the host: outlives the process
//!
//!   header ┊ half 0: entry 7, 8, 9, 10 ┊ half 1: entry 11, 12        a half is begun anew when the groups of all its entries are durable
//! ```
//!
//! After a power cut the tail is gone, and nobody is there any more to whom something was answered but a flush. After a kill, whoever opens makes the
//! entries again behind the journal's end, as one group, before anything else ([`Core::remake`](crate::core::Core)). Then the tail begins anew.
//!
//! # When it counts
//! The entries continue the journal if nobody else has written to the file system since: the superblock has the incarnation of the tail, or the one
//! that was announced in it by who was about to make it again and was killed as well. If the last group of the journal is of that incarnation, the
//! entries are in it. Of all entries, those count whose group is not in the journal; the first of them belongs to the very next one.
//!
//! # When there is no room
//! An append that finds both halves in use is not kept, nor what follows, until its group is durable: then [`Tail::keeps`] says no, and who has to be
//! sure waits for the group. So entries are always without a gap. As soon as one half is full, its groups are written without being asked for.
//!
//! # What a volume that fails takes back
//! Records of groups that are not durable may be changed ([`Journal::rewrite`](super::Journal::rewrite)). An entry without records says that all entries of
//! these groups are void.
//!
//! `docs/src/formats/filesys-tail.md` is the specification of the bytes.

use std::cell::RefCell;
use std::rc::Rc;

use block_io::{LastingMemory, cover};

use super::ring::Position;
use crate::checksum::crc32c;
use crate::meta_io::{MOST, put, take, take_u64};

const MAGIC: u64 = u64::from_le_bytes(*b"SMSFSTL1");
const HALF: usize = 8;
const UUID: usize = 16;
const INCARNATION: usize = 32;
const NEXT: usize = 40;
/// Bytes before the halves: a page.
const HEADER: usize = 4096;
/// Bytes of an entry before its records.
const ENTRY: usize = 32;
/// Smallest half that makes sense.
const LEAST: usize = 512;

fn get(memory: &dyn LastingMemory, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    memory.read(offset, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn set(memory: &dyn LastingMemory, offset: usize, value: u64) {
    memory.write(offset, &value.to_le_bytes());
}

/// Bytes of a half, if there is room for halves.
fn half_of(memory: &dyn LastingMemory) -> Option<usize> {
    let half = memory.size().checked_sub(HEADER)? / 2 / 8 * 8;
    (half >= LEAST).then_some(half)
}

/// Where the journal on the medium ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// Of the next group.
    pub(crate) position: Position,
    /// Incarnation of the last group; 0 if there is none.
    pub(crate) incarnation: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    number: u64,
    group: u64,
    records: Vec<u8>,
}

/// A tail that was left by a process.
#[derive(Debug)]
pub(crate) struct Found {
    incarnation: u64,
    next: u64,
    /// In order of their numbers, without a gap.
    entries: Vec<Entry>,
}

impl Found {
    /// What is in `memory`, if it is the tail of this file system.
    pub(crate) fn read(memory: &dyn LastingMemory, uuid: [u8; 16]) -> Option<Self> {
        let half = half_of(memory)?;
        let mut header = [0; NEXT + 8];
        memory.read(0, &mut header);
        let at = |offset| take_u64(&header, offset);
        let ours = at(0) == MAGIC && at(HALF) == half as u64 && take::<16>(&header, UUID) == uuid;
        if !ours || at(INCARNATION) >= MOST {
            return None;
        }
        let incarnation = at(INCARNATION);
        let mut halves = [0, 1].map(|index| entries_of(memory, HEADER + index * half, half, incarnation));
        halves.sort_by_key(|entries| entries.first().map(|entry| entry.number));
        let [older, newer] = halves;
        let follows = older.last().map(|entry| entry.number + 1) == newer.first().map(|entry| entry.number);
        let entries = match older.is_empty() || follows {
            true => older.into_iter().chain(newer).collect(),
            // Cannot be, so nothing of it is believed.
            false => Vec::new(),
        };
        Some(Self {
            incarnation,
            next: at(NEXT),
            entries,
        })
    }

    /// Whether nobody has written to the file system since but who knew of this tail; the superblock has this incarnation.
    pub(crate) fn goes_on(&self, incarnation: u64) -> bool {
        self.incarnation == incarnation || self.next == incarnation
    }

    /// An incarnation is about to make the entries again. Before its superblock is written.
    pub(crate) fn announce(memory: &dyn LastingMemory, incarnation: u64) {
        set(memory, NEXT, incarnation);
    }

    /// The records behind the end of the journal, one item for each append. None at all if the entries do not continue the journal, which cannot be.
    pub(crate) fn after(self, end: &End) -> Option<Vec<Vec<u8>>> {
        if end.incarnation > self.incarnation {
            cover!("journal: the tail had been made again");
            return Some(Vec::new());
        }
        let next = end.position.group;
        let mut left: Vec<Entry> = Vec::new();
        for entry in self.entries {
            if entry.records.is_empty() {
                cover!("journal: a part of the tail is void");
                left.retain(|kept| kept.group < entry.group);
            } else if entry.group >= next {
                left.push(entry);
            }
        }
        match left.first() {
            Some(first) if first.group != next => None,
            _ => Some(left.into_iter().map(|entry| entry.records).collect()),
        }
    }
}

/// The entries of a half, from its beginning to the first that does not follow.
fn entries_of(memory: &dyn LastingMemory, start: usize, half: usize, incarnation: u64) -> Vec<Entry> {
    let mut bytes = vec![0; half];
    memory.read(start, &mut bytes);
    let mut entries: Vec<Entry> = Vec::new();
    let mut rest = bytes.as_slice();
    while let Some(entry) = entry_at(rest, incarnation) {
        let follows = |last: &Entry| {
            last.number + 1 == entry.number && (last.group <= entry.group || entry.records.is_empty())
        };
        if !entries.last().is_none_or(follows) {
            break;
        }
        rest = rest.get(length_of(entry.records.len())..).unwrap_or_default();
        entries.push(entry);
    }
    entries
}

fn entry_at(bytes: &[u8], incarnation: u64) -> Option<Entry> {
    let header = bytes.get(..ENTRY)?;
    let length = usize::try_from(u32::from_le_bytes(take(header, 4))).ok()?;
    let whole = bytes.get(..ENTRY.checked_add(length)?)?;
    let right = crc32c(whole.get(4..)?) == u32::from_le_bytes(take(header, 0))
        && take_u64(header, 8) == incarnation
        && take_u64(header, 16) < MOST
        && take_u64(header, 24) < MOST;
    right.then(|| Entry {
        number: take_u64(header, 16),
        group: take_u64(header, 24),
        records: whole.get(ENTRY..).unwrap_or_default().to_vec(),
    })
}

/// Bytes that an entry with so many bytes of records takes.
fn length_of(records: usize) -> usize {
    ENTRY.saturating_add(records).next_multiple_of(8)
}

#[derive(Debug, Default, Clone, Copy)]
struct Half {
    used: usize,
    /// The newest group that it has something of.
    newest: u64,
}

#[derive(Debug, Default)]
struct Writing {
    halves: [Half; 2],
    /// The half that takes entries.
    active: usize,
    /// Entries so far.
    number: u64,
    /// From the first of these groups on, entries are missing; the last of them has to be durable before more are kept.
    missing: Option<(u64, u64)>,
    /// Empty, for the next entry.
    bytes: Vec<u8>,
}

/// The tail that is being written.
#[derive(Debug)]
pub(crate) struct Tail {
    memory: Rc<dyn LastingMemory>,
    incarnation: u64,
    half: usize,
    state: RefCell<Writing>,
}

impl Tail {
    /// Begins a tail of an incarnation; what was in the memory is not needed any more. None if the memory is too small.
    pub(crate) fn begin(memory: Rc<dyn LastingMemory>, uuid: [u8; 16], incarnation: u64) -> Option<Self> {
        let half = half_of(&*memory)?;
        let mut header = [0; 24];
        memory.read(8, &mut header);
        let known = get(&*memory, 0) == MAGIC
            && take_u64(&header, 0) == half as u64
            && take::<16>(&header, UUID - HALF) == uuid;
        if !known {
            set(&*memory, 0, 0);
            set(&*memory, HALF, half as u64);
            memory.write(UUID, &uuid);
        }
        // Entries of other incarnations do not count any more.
        set(&*memory, INCARNATION, incarnation);
        set(&*memory, NEXT, 0);
        set(&*memory, 0, MAGIC);
        Some(Self {
            memory,
            incarnation,
            half,
            state: RefCell::default(),
        })
    }

    /// Keeps what was appended to a group, if there is room; `durable` is the newest durable group. Returns the group that should be written soon.
    pub(super) fn append(&self, group: u64, records: &[u8], durable: u64) -> Option<u64> {
        let mut state = self.state.borrow_mut();
        if let Some((_, last)) = &mut state.missing {
            if *last > durable {
                *last = group.max(*last);
                return None;
            }
            state.missing = None;
        }
        // Always leaves room for saying that entries are void.
        let needed = length_of(records.len()).saturating_add(ENTRY);
        let mut filled = None;
        if state.halves[state.active].used.saturating_add(needed) > self.half {
            let other = 1 - state.active;
            if state.halves[other].newest > durable || needed > self.half {
                cover!("journal: there is no room in the tail");
                state.missing = Some((group, group));
                return Some(group);
            }
            cover!("journal: the tail goes on in its other half");
            filled = Some(state.halves[state.active].newest);
            state.halves[other] = Half::default();
            state.active = other;
        }
        self.put(&mut state, group, records);
        filled
    }

    fn put(&self, state: &mut Writing, group: u64, records: &[u8]) {
        let mut bytes = std::mem::take(&mut state.bytes);
        bytes.clear();
        bytes.resize(ENTRY, 0);
        let length = u32::try_from(records.len()).unwrap_or(0);
        put(&mut bytes, 4, &length.to_le_bytes());
        put(&mut bytes, 8, &self.incarnation.to_le_bytes());
        put(&mut bytes, 16, &state.number.to_le_bytes());
        put(&mut bytes, 24, &group.to_le_bytes());
        bytes.extend_from_slice(records);
        let checksum = bytes.get(4..).map_or(0, crc32c);
        put(&mut bytes, 0, &checksum.to_le_bytes());
        let active = state.active;
        let half = &mut state.halves[active];
        self.memory.write(HEADER + active * self.half + half.used, &bytes);
        half.used += length_of(records.len());
        half.newest = half.newest.max(group);
        state.number += 1;
        state.bytes = bytes;
    }

    /// The records of the groups `from..=to` are not any more what was kept.
    pub(super) fn void(&self, from: u64, to: u64) {
        let mut state = self.state.borrow_mut();
        // Nothing was kept since the last time.
        if state.missing.is_none_or(|(missing, _)| missing > from) {
            self.put(&mut state, from, &[]);
        }
        let (first, last) = state.missing.unwrap_or((from, to));
        state.missing = Some((first.min(from), last.max(to)));
    }

    /// Whether a kill would leave all of a group, and of those before it, that was appended so far.
    pub(super) fn keeps(&self, group: u64) -> bool {
        let state = self.state.borrow();
        state.missing.is_none_or(|(first, _)| group < first)
    }

    /// Everything is durable, and nothing more comes: the memory is given back.
    pub(crate) fn end(&self) {
        self.memory.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[derive(Debug)]
    struct Memory(RefCell<Vec<u8>>);

    impl LastingMemory for Memory {
        fn size(&self) -> usize {
            self.0.borrow().len()
        }
        fn read(&self, offset: usize, target: &mut [u8]) {
            let length = target.len();
            target.copy_from_slice(&self.0.borrow()[offset..offset + length]);
        }
        fn write(&self, offset: usize, source: &[u8]) {
            self.0.borrow_mut()[offset..offset + source.len()].copy_from_slice(source);
        }
        fn clear(&self) {
            self.0.borrow_mut().fill(0);
        }
    }

    const FS: [u8; 16] = [7; 16];
    const ROOM: usize = 4096;

    fn memory() -> Rc<Memory> {
        Rc::new(Memory(RefCell::new(vec![0; HEADER + 2 * ROOM])))
    }

    fn begin(memory: &Rc<Memory>, incarnation: u64) -> Tail {
        Tail::begin(Rc::clone(memory) as Rc<dyn LastingMemory>, FS, incarnation).unwrap()
    }

    fn end(group: u64, incarnation: u64) -> End {
        let position = Position {
            group,
            ..Position::default()
        };
        End {
            position,
            incarnation,
        }
    }

    fn left(memory: &Rc<Memory>, end: &End) -> Option<Vec<Vec<u8>>> {
        Found::read(&**memory, FS).unwrap().after(end)
    }

    #[test]
    fn what_is_not_durable_is_found_in_order() {
        let memory = memory();
        assert!(Found::read(&*memory, FS).is_none());
        let tail = begin(&memory, 3);
        for (group, records) in [(5, b"one".as_slice()), (5, b"two"), (6, b"three"), (8, b"four")] {
            assert_eq!(tail.append(group, records, 4), None);
            assert!(tail.keeps(group));
        }
        let all: Vec<Vec<u8>> = [b"one".as_slice(), b"two", b"three", b"four"]
            .map(Vec::from)
            .to_vec();
        assert_eq!(left(&memory, &end(5, 3)).unwrap(), all);
        assert_eq!(left(&memory, &end(6, 3)).unwrap(), all[2..]);
        assert_eq!(left(&memory, &end(9, 3)).unwrap(), [b""; 0]);
        // A gap, which cannot be, and a journal that has them.
        assert_eq!(left(&memory, &end(7, 3)), None);
        assert_eq!(left(&memory, &end(6, 4)).unwrap(), [b""; 0]);
        assert!(Found::read(&*memory, [8; 16]).is_none());
    }

    #[test]
    fn it_goes_on_only_with_who_knew_of_it() {
        let memory = memory();
        drop(begin(&memory, 3));
        let found = Found::read(&*memory, FS).unwrap();
        assert!(found.goes_on(3) && !found.goes_on(4) && !found.goes_on(2));
        Found::announce(&*memory, 4);
        let found = Found::read(&*memory, FS).unwrap();
        assert!(found.goes_on(3) && found.goes_on(4) && !found.goes_on(5));
        drop(begin(&memory, 4));
        assert!(!Found::read(&*memory, FS).unwrap().goes_on(3));
    }

    #[test]
    fn entries_of_earlier_incarnations_do_not_count() {
        let memory = memory();
        begin(&memory, 3).append(5, b"old", 4);
        let tail = begin(&memory, 4);
        assert_eq!(left(&memory, &end(5, 3)).unwrap(), [b""; 0]);
        tail.append(5, b"new", 4);
        assert_eq!(left(&memory, &end(5, 3)).unwrap(), [b"new"]);
    }

    #[test]
    fn halves_take_turns_and_what_finds_no_room_is_not_kept() {
        let memory = memory();
        let tail = begin(&memory, 3);
        let records = [1; 1000];
        // Three fit into a half.
        let kept = |tail: &Tail, group, durable| (tail.append(group, &records, durable), tail.keeps(group));
        for group in 5..8 {
            assert_eq!(kept(&tail, group, 4), (None, true));
        }
        assert_eq!(kept(&tail, 8, 4), (Some(7), true));
        assert_eq!(kept(&tail, 9, 4), (None, true));
        assert_eq!(kept(&tail, 10, 4), (None, true));
        assert_eq!(left(&memory, &end(5, 3)).unwrap().len(), 6);
        // The first half has groups that are not durable.
        assert_eq!(kept(&tail, 11, 6), (Some(11), false));
        assert!(tail.keeps(10) && !tail.keeps(12));
        assert_eq!(kept(&tail, 12, 10), (None, false));
        assert_eq!(left(&memory, &end(5, 3)).unwrap().len(), 6);
        // Durable up to 11 is not enough, as 12 is missing, too.
        assert_eq!(kept(&tail, 13, 11), (None, false));
        assert_eq!(kept(&tail, 14, 13), (Some(10), true));
        assert_eq!(left(&memory, &end(14, 3)).unwrap().len(), 1);
        assert_eq!(kept(&tail, 15, 13), (None, true));
        assert_eq!(left(&memory, &end(14, 3)).unwrap().len(), 2);
        assert_eq!(left(&memory, &end(15, 3)).unwrap().len(), 1);
        // One that never fits.
        assert_eq!(tail.append(16, &[1; ROOM], 15), Some(16));
        assert!(!tail.keeps(16));
    }

    #[test]
    fn a_torn_entry_ends_it() {
        let memory = memory();
        let tail = begin(&memory, 3);
        tail.append(5, b"one", 4);
        tail.append(5, b"two", 4);
        let second = HEADER + length_of(3);
        for byte in [0, 4, 8, 16, 24, ENTRY, ENTRY + 2] {
            memory.0.borrow_mut()[second + byte] ^= 1;
            assert_eq!(left(&memory, &end(5, 3)).unwrap(), [b"one"], "{byte}");
            memory.0.borrow_mut()[second + byte] ^= 1;
        }
        assert_eq!(left(&memory, &end(5, 3)).unwrap().len(), 2);
        // All that can be there is read without a panic.
        let mut rng = 1_u64;
        for _ in 0..2000 {
            rng = rng
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = usize::try_from(rng >> 33).unwrap() % memory.size();
            memory.0.borrow_mut()[at] = rng.to_le_bytes()[2];
            if let Some(found) = Found::read(&*memory, FS) {
                found.after(&end(5, 3));
            }
        }
    }

    #[test]
    fn what_was_changed_is_void_and_more_is_kept_when_that_is_durable() {
        let memory = memory();
        let tail = begin(&memory, 3);
        for group in [5, 6, 7] {
            tail.append(group, &group.to_le_bytes(), 4);
        }
        tail.void(6, 7);
        assert!(tail.keeps(5) && !tail.keeps(6));
        assert_eq!(left(&memory, &end(5, 3)).unwrap(), [5_u64.to_le_bytes()]);
        assert_eq!(tail.append(7, b"more", 5), None);
        assert!(!tail.keeps(7));
        // Once more, before anything is kept again.
        tail.void(6, 7);
        assert_eq!(tail.append(8, b"kept", 7), None);
        assert!(tail.keeps(8));
        assert_eq!(left(&memory, &end(8, 3)).unwrap(), [b"kept"]);
    }
}
