//! The record of what is in flight in a queue, in memory that outlives the process (vhost-user, "Inflight I/O tracking").
//!
//! The server of a queue notes in it which chains it has taken. If the process dies, the front-end hands the same memory to
//! the next one, which finds there what was taken and not answered, and repeats it: writes that were on their way are written
//! again, and nothing is forgotten. For a split virtqueue the region of one queue is
//!
//! ```text
//!   0   features u64   8   version u16 = 1   10  entries u16   12  last_batch_head u16   14  used_idx u16
//!   16  entries × { inflight u8, padding [u8; 5], next u16, counter u64 }
//! ```
//!
//! An answer takes three steps: its head goes to `last_batch_head`, the used ring's index moves, then the entry is cleared and
//! `used_idx` follows. Whoever finds the used ring ahead of `used_idx` knows that the last batch's entry was answered already.
//!
//! # What the record cannot bring back
//! What was answered is not in it. Another server has it if it is served from the same disk, and has found what the last one had not made durable.
//! Behind the regions of all queues follows a number of ours, 64 bytes for it, by which the next server knows
//! ([`continues`]); others leave it alone or make the memory without room for it.
//!
//! The memory belongs to the front-end as much as to us: what is read from it is checked, and it is accessed only by atomics.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_core::vm_memory::{Bytes, MmapRegion, VolatileMemory};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const COUNTER: usize = 8;
/// Regions of queues begin at multiples of this.
const ALIGNMENT: usize = 64;

/// Bytes that one queue needs.
pub(crate) fn queue_length(entries: u16) -> usize {
    (HEADER + usize::from(entries) * ENTRY).next_multiple_of(ALIGNMENT)
}

/// Bytes of the records of so many queues, with our number behind them.
pub(crate) fn length(queues: u16, entries: u16) -> usize {
    usize::from(queues) * queue_length(entries) + ALIGNMENT
}

/// Whether nothing that was answered by the server that had the records in `memory` before can be missing, as its disks' number was the same
/// ([`crate::DiskHandle::continuity`]), or is not known. From now on the number is `now`, if that is one.
pub(crate) fn continues(memory: &MmapRegion, queues: u16, entries: u16, now: u64) -> bool {
    let (memory, place) = (memory.as_volatile_slice(), length(queues, entries) - ALIGNMENT);
    if now == 0 || memory.len() < place + ALIGNMENT {
        return true;
    }
    let before = memory.load(place, Ordering::Acquire).unwrap_or(0_u64);
    let stored = memory.store(now, place, Ordering::Release);
    debug_assert!(stored.is_ok(), "within the memory, and aligned");
    before == 0 || before == now
}

/// Makes all records in `memory` empty ones.
pub(crate) fn forget(memory: &MmapRegion) {
    let zeroes = [0; 4096];
    let mut offset = 0;
    while offset < memory.size() {
        let length = (memory.size() - offset).min(zeroes.len());
        let written = memory.as_volatile_slice().write_slice(&zeroes[..length], offset);
        debug_assert!(written.is_ok(), "within the memory");
        offset += length;
    }
}

/// The record cannot be what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InflightError {
    /// It lies outside of the memory.
    #[error("the record of queue {queue} lies outside of its {length} bytes")]
    Outside { queue: u16, length: usize },
    /// Someone else's, or a later version.
    #[error("the in-flight record has version {version}, not 1")]
    Version { version: u16 },
    /// Made for another size of queue.
    #[error("the in-flight record has {found} entries, the queue has {entries}")]
    Size { found: u16, entries: u16 },
}

/// What a new server must know of the old one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Chains that were taken and not answered, in the order in which they were taken.
    pub(crate) unanswered: Vec<u16>,
    /// The next entry of the available ring to be taken.
    pub(crate) next_avail: u16,
}

/// One queue's record. Used by one server at a time.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    memory: Arc<MmapRegion>,
    start: usize,
    entries: u16,
    counter: Cell<u64>,
}

impl InflightQueue {
    /// The record of queue `queue` in `memory`, which has room for queues of `table_entries`; the queue itself has `entries`.
    /// Memory that is all zeroes becomes an empty record.
    pub(crate) fn open(
        memory: Arc<MmapRegion>,
        queue: u16,
        table_entries: u16,
        entries: u16,
    ) -> Result<Self, InflightError> {
        let length = memory.size();
        let start = usize::from(queue) * queue_length(table_entries);
        if entries > table_entries || start + queue_length(entries) > length {
            return Err(InflightError::Outside { queue, length });
        }
        let record = Self {
            memory,
            start,
            entries,
            counter: Cell::new(0),
        };
        match (record.load::<u16>(VERSION), record.load::<u16>(ENTRIES)) {
            (0, _) => {
                record.store(ENTRIES, table_entries);
                record.store(VERSION, 1_u16);
            }
            (1, found) if found >= entries => {}
            (1, found) => return Err(InflightError::Size { found, entries }),
            (version, _) => return Err(InflightError::Version { version }),
        }
        Ok(record)
    }

    /// What an earlier server left; `used` is the index of the used ring.
    pub(crate) fn recover(&self, used: u16) -> Recovered {
        if self.load::<u16>(USED_IDX) != used {
            let answered = self.load::<u16>(LAST_BATCH_HEAD);
            if answered < self.entries {
                self.store(self.entry(answered), 0_u8);
            }
            self.store(USED_IDX, used);
        }
        let mut taken: Vec<(u64, u16)> = (0..self.entries)
            .filter(|head| self.load::<u8>(self.entry(*head)) != 0)
            .map(|head| (self.load(self.entry(head) + COUNTER), head))
            .collect();
        taken.sort_unstable();
        let last = taken.last().map_or(0, |(counter, _)| *counter);
        self.counter.set(last.wrapping_add(1));
        // There are at most as many as entries.
        let count = u16::try_from(taken.len()).unwrap_or(self.entries);
        Recovered {
            unanswered: taken.into_iter().map(|(_, head)| head).collect(),
            next_avail: used.wrapping_add(count),
        }
    }

    /// Chain `head` was taken.
    pub(crate) fn begin(&self, head: u16) {
        let counter = self.counter.get();
        self.counter.set(counter.wrapping_add(1));
        self.store(self.entry(head) + COUNTER, counter);
        self.store(self.entry(head), 1_u8);
    }

    /// Chain `head` is about to go into the used ring.
    pub(crate) fn prepare_end(&self, head: u16) {
        self.store(LAST_BATCH_HEAD, head);
    }

    /// Chain `head` stands in the used ring, whose index is `used` now.
    pub(crate) fn end(&self, head: u16, used: u16) {
        self.store(self.entry(head), 0_u8);
        self.store(USED_IDX, used);
    }

    fn entry(&self, head: u16) -> usize {
        HEADER + usize::from(head) * ENTRY
    }

    fn load<T: virtio_core::vm_memory::AtomicAccess + Default>(&self, offset: usize) -> T {
        // Within the memory, as `open` checked and heads are below `entries`.
        self.memory
            .as_volatile_slice()
            .load(self.start + offset, Ordering::Acquire)
            .unwrap_or_default()
    }

    fn store<T: virtio_core::vm_memory::AtomicAccess>(&self, offset: usize, value: T) {
        let stored = self
            .memory
            .as_volatile_slice()
            .store(value, self.start + offset, Ordering::Release);
        debug_assert!(stored.is_ok(), "a record lies within its memory");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(memory: &Arc<MmapRegion>) -> InflightQueue {
        InflightQueue::open(Arc::clone(memory), 1, 128, 128).unwrap()
    }

    fn memory() -> Arc<MmapRegion> {
        Arc::new(MmapRegion::new(2 * queue_length(128)).unwrap())
    }

    #[test]
    fn what_was_taken_and_not_answered_is_found_again_in_its_order() {
        let memory = memory();
        let old = record(&memory);
        old.recover(65534);
        for head in [7, 3, 100, 5] {
            old.begin(head);
        }
        old.prepare_end(100);
        old.end(100, 65535);
        let recovered = record(&memory).recover(65535);
        assert_eq!(recovered.unanswered, [7, 3, 5]);
        assert_eq!(recovered.next_avail, 2);
    }

    #[test]
    fn an_answer_that_reached_the_used_ring_is_not_given_again() {
        let memory = memory();
        let old = record(&memory);
        old.recover(0);
        old.begin(1);
        old.begin(2);
        old.prepare_end(1);
        // The used ring's index became 1, and the process died.
        let recovered = record(&memory).recover(1);
        assert_eq!(recovered.unanswered, [2]);
        assert_eq!(recovered.next_avail, 2);
    }

    #[test]
    fn an_answer_that_did_not_reach_the_used_ring_is_repeated() {
        let memory = memory();
        let old = record(&memory);
        old.recover(0);
        old.begin(1);
        old.prepare_end(1);
        let recovered = record(&memory).recover(0);
        assert_eq!(recovered.unanswered, [1]);
        assert_eq!(recovered.next_avail, 1);
    }

    #[test]
    fn a_server_that_may_miss_what_was_answered_knows() {
        let memory = MmapRegion::new(length(2, 128)).unwrap();
        for (now, is_known) in [(7, true), (7, true), (0, true), (8, false), (8, true)] {
            assert_eq!(continues(&memory, 2, 128, now), is_known, "{now}");
        }
        // After a reset, nobody relies on what was answered.
        forget(&memory);
        assert!(continues(&memory, 2, 128, 9));
        // Made by somebody who has no room for it.
        let short = MmapRegion::new(2 * queue_length(128)).unwrap();
        assert!(continues(&short, 2, 128, 7) && continues(&short, 2, 128, 8));
    }

    #[test]
    fn records_that_cannot_be_ours_are_refused() {
        let memory = memory();
        let open =
            |queue, table, entries| InflightQueue::open(Arc::clone(&memory), queue, table, entries).err();
        assert!(matches!(open(2, 128, 128), Some(InflightError::Outside { .. })));
        assert!(matches!(open(0, 128, 256), Some(InflightError::Outside { .. })));
        record(&memory).store(VERSION, 2_u16);
        assert_eq!(open(1, 128, 128), Some(InflightError::Version { version: 2 }));
    }
}
