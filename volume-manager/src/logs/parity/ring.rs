//! The parity log in memory: plain data, no I/O.

use std::cell::OnceCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use block_io::AlignedBuffer;

use super::super::LogError;
use super::Identity;
use super::format::{self, BLOCK, Piece};

/// How the write of a group ended.
pub(super) type Outcome = Rc<OnceCell<Result<(), LogError>>>;

/// What has become of a record's in-place writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// They may be under way.
    Pending,
    /// They were given up half-way: only a replay makes the row whole.
    Abandoned,
    /// They ended before the flush with the next number began.
    Applied { flushes: u64 },
    /// They are durable.
    Flushed,
}

#[derive(Debug)]
struct Live {
    sequence: u64,
    row: u64,
    progress: Progress,
}

/// Records that are written together.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Block of the endless log where it begins.
    pub(super) start: u64,
    /// Bytes.
    pub(super) used: usize,
    /// In the last header.
    tail: u64,
    /// Checkpoints behind its last record.
    checkpoints: u64,
    pub(super) buffer: Option<AlignedBuffer>,
    pub(super) outcome: Outcome,
}

/// Why a record cannot be entered now.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// The group that is being gathered must be written first.
    Group(Outcome),
    /// The ring is full; this was the durable tail.
    Full(u64),
    /// It will not get better.
    Never(LogError),
}

/// A record in a group.
#[derive(Debug)]
pub(super) struct Entered {
    pub(super) sequence: u64,
    pub(super) outcome: Outcome,
}

/// What can be done about a full ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// A header with the tail as it is now.
    Checkpoint,
    /// A flush first.
    Flush,
    /// Wait for the oldest write to end.
    Wait,
    /// None: the oldest write never ends.
    Reopen,
}

#[derive(Debug)]
pub(super) struct Ring {
    identity: Identity,
    /// Blocks of the ring.
    blocks: u64,
    /// Bytes of a group's buffer.
    capacity: usize,
    /// Block of the endless log where the next record goes.
    pub(super) head: u64,
    /// Records before this block are behind the tail of a durable header: they are never replayed, and their blocks are free.
    pub(super) durable_tail: u64,
    /// From the durable tail on, in order.
    live: VecDeque<Live>,
    /// How many of these are of a row.
    rows: BTreeMap<u64, u32>,
    /// Flushes begun.
    flushes: u64,
    filling: Group,
    /// A group whose writer was dropped: it is written again, in the same place.
    pub(super) interrupted: Option<Group>,
    spare: Option<AlignedBuffer>,
    pub(super) writing: bool,
    pub(super) advancing: bool,
    pub(super) failed: Option<LogError>,
}

impl Ring {
    pub(super) fn new(identity: Identity, blocks: u64, row: usize, head: u64) -> Self {
        Self {
            identity,
            blocks,
            capacity: format::blocks(row).max(64) * BLOCK,
            head,
            durable_tail: head,
            live: VecDeque::new(),
            rows: BTreeMap::new(),
            flushes: 0,
            filling: Group::default(),
            interrupted: None,
            spare: None,
            writing: false,
            advancing: false,
            failed: None,
        }
    }

    /// Where the oldest record begins that may have to be replayed.
    pub(super) fn tail(&self) -> u64 {
        let waiting = self
            .live
            .iter()
            .find(|record| record.progress != Progress::Flushed);
        waiting.map_or(self.head, |record| record.sequence)
    }

    pub(super) fn used(&self) -> u64 {
        self.head - self.durable_tail
    }

    /// The rows whose records would be replayed after a crash.
    pub(super) fn live_rows(&self) -> Vec<u64> {
        self.rows.keys().copied().collect()
    }

    pub(super) fn has_live(&self, row: u64) -> bool {
        self.rows.contains_key(&row)
    }

    /// Puts a record into the group that is being gathered; one without pieces is a checkpoint. For a checkpoint that moves the
    /// tail a block is always left: nothing else may use it, else a full ring would stay full for ever.
    pub(super) fn enter(&mut self, row: u64, pieces: &[Piece<'_>]) -> Result<Entered, Obstacle> {
        if let Some(error) = &self.failed {
            return Err(Obstacle::Never(error.clone()));
        }
        let checkpoint = pieces.is_empty();
        let size = format::blocks(pieces.iter().map(|piece| piece.data.len()).sum());
        let left = self.blocks - self.head % self.blocks;
        let gap = if size as u64 > left { left } else { 0 };
        let bytes = size * BLOCK;
        // A group is contiguous, so a new one begins at the ring's start.
        let wraps = gap > 0 || left == self.blocks;
        if self.filling.used > 0 && (wraps || self.filling.used + bytes > self.capacity) {
            return Err(Obstacle::Group(Rc::clone(&self.filling.outcome)));
        }
        let reserve = u64::from(!checkpoint || self.tail() <= self.durable_tail);
        if self.used() + gap + size as u64 + reserve > self.blocks {
            return Err(Obstacle::Full(self.durable_tail));
        }
        let tail = self.tail();
        self.head += gap;
        let tail = if self.live.is_empty() { self.head } else { tail };
        if self.filling.used == 0 {
            self.filling.start = self.head;
        }
        let (spare, capacity) = (&mut self.spare, self.capacity);
        let buffer = self
            .filling
            .buffer
            .get_or_insert_with(|| spare.take().unwrap_or_else(|| AlignedBuffer::new(capacity)));
        let target = &mut buffer.as_mut_slice()[self.filling.used..][..bytes];
        let sequence = self.head;
        format::encode(target, self.identity, sequence, tail, row, pieces);
        self.filling.used += bytes;
        self.filling.tail = tail;
        self.head += size as u64;
        if checkpoint {
            self.filling.checkpoints += 1;
        } else {
            self.filling.checkpoints = 0;
            self.live.push_back(Live {
                sequence,
                row,
                progress: Progress::Pending,
            });
            *self.rows.entry(row).or_default() += 1;
        }
        Ok(Entered {
            sequence,
            outcome: Rc::clone(&self.filling.outcome),
        })
    }

    /// What waits for the group that is being gathered, if there is something in it, or in one whose writer has gone.
    pub(super) fn gathered(&self) -> Option<Outcome> {
        let waiting = self
            .interrupted
            .as_ref()
            .or((self.filling.used > 0).then_some(&self.filling));
        waiting.map(|group| Rc::clone(&group.outcome))
    }

    /// The group to be written next.
    pub(super) fn take_group(&mut self) -> Group {
        self.interrupted
            .take()
            .unwrap_or_else(|| std::mem::take(&mut self.filling))
    }

    /// A group is durable.
    pub(super) fn written(&mut self, group: Group) {
        self.durable_tail = self.durable_tail.max(group.tail);
        while self
            .live
            .front()
            .is_some_and(|record| record.sequence < self.durable_tail)
        {
            if let Some(record) = self.live.pop_front() {
                self.leave_row(record.row);
            }
        }
        let outcome = Rc::clone(&group.outcome);
        self.spare = group.buffer.or(self.spare.take());
        // It was not set before, as only the group's writer does so.
        let _ = outcome.set(Ok(()));
    }

    fn leave_row(&mut self, row: u64) {
        if let Some(count) = self.rows.get_mut(&row) {
            *count -= 1;
            if *count == 0 {
                self.rows.remove(&row);
            }
        }
    }

    /// A group is not durable. The place of its records is not used again, as they may be on some copy. That of checkpoints behind
    /// them is: a tail is no less true when it is replaced by a later one, and the block that is left for them would be used up.
    pub(super) fn not_written(&mut self, group: &Group, error: &LogError) {
        self.failed = Some(error.clone());
        let filling = std::mem::take(&mut self.filling);
        self.head -= filling.checkpoints;
        if filling.used as u64 == filling.checkpoints * BLOCK as u64 {
            self.head -= group.checkpoints;
        }
        for group in [group, &filling] {
            let _ = group.outcome.set(Err(error.clone()));
        }
    }

    /// The in-place writes of a record have ended, or never began.
    pub(super) fn applied(&mut self, sequence: u64) {
        let flushes = self.flushes;
        self.set(sequence, Progress::Applied { flushes });
    }

    /// The in-place writes of a record were given up.
    pub(super) fn abandoned(&mut self, sequence: u64) {
        self.set(sequence, Progress::Abandoned);
    }

    fn set(&mut self, sequence: u64, progress: Progress) {
        if let Ok(index) = self
            .live
            .binary_search_by_key(&sequence, |record| record.sequence)
        {
            self.live[index].progress = progress;
        }
    }

    /// What moves the durable tail.
    pub(super) fn remedy(&self) -> Remedy {
        if self.tail() > self.durable_tail {
            return Remedy::Checkpoint;
        }
        match self.live.front().map(|record| record.progress) {
            Some(Progress::Applied { .. }) => Remedy::Flush,
            Some(Progress::Abandoned) => Remedy::Reopen,
            _ => Remedy::Wait,
        }
    }

    /// Whether records are live only because no durable header says that they are not.
    pub(super) fn gains_by_checkpoint(&self) -> bool {
        let front = self.live.front();
        front.is_some_and(|record| record.progress == Progress::Flushed)
    }

    /// Whether a flush would be of use.
    pub(super) fn has_applied(&self) -> bool {
        let applied = |record: &Live| matches!(record.progress, Progress::Applied { .. });
        self.live.iter().any(applied)
    }

    /// A flush begins; its number.
    pub(super) fn flush_begins(&mut self) -> u64 {
        self.flushes += 1;
        self.flushes
    }

    /// The flush with this number has ended: what was applied before it began is durable.
    pub(super) fn flushed(&mut self, number: u64) {
        for record in &mut self.live {
            if matches!(record.progress, Progress::Applied { flushes } if flushes < number) {
                record.progress = Progress::Flushed;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Uuid;

    const IDENTITY: Identity = Identity {
        volume: Uuid(1),
        section: 1,
    };

    /// A ring of 17 blocks with records of row 0 until no more fit; all in-place writes are under way.
    fn full_ring() -> Ring {
        let data = [1; 2 * BLOCK];
        let mut ring = Ring::new(IDENTITY, 17, data.len(), 0);
        let piece = Piece {
            column: 0,
            offset: 0,
            data: &data,
        };
        while !matches!(ring.enter(0, &[piece]), Err(Obstacle::Full(_))) {
            let group = ring.take_group();
            ring.written(group);
        }
        // What a record of two blocks leaves.
        let piece = Piece {
            data: &data[..BLOCK],
            ..piece
        };
        while ring.enter(0, &[piece]).is_ok() {
            let group = ring.take_group();
            ring.written(group);
        }
        ring
    }

    /// All records are applied and flushed.
    fn settle_all(ring: &mut Ring) {
        let live: Vec<u64> = ring.live.iter().map(|record| record.sequence).collect();
        live.into_iter().for_each(|sequence| ring.applied(sequence));
        let number = ring.flush_begins();
        ring.flushed(number);
    }

    fn makes_room(ring: &mut Ring) -> bool {
        settle_all(ring);
        let entered = ring.enter(0, &[]).is_ok();
        if entered {
            let group = ring.take_group();
            ring.written(group);
        }
        entered && ring.used() < ring.blocks / 2
    }

    #[test]
    fn a_checkpoint_that_frees_nothing_leaves_the_last_block() {
        let mut ring = full_ring();
        // The oldest write has not ended, so the tail stands still.
        for _ in 0..3 {
            if ring.enter(0, &[]).is_ok() {
                let group = ring.take_group();
                ring.written(group);
            }
        }
        assert!(makes_room(&mut ring), "{} of {} used", ring.used(), ring.blocks);
    }

    #[test]
    fn a_checkpoint_that_fails_gives_its_block_back() {
        for settled in [false, true] {
            let mut ring = full_ring();
            settle_all(&mut ring);
            let entered = ring.enter(0, &[]).expect("a block is left");
            let group = ring.take_group();
            if settled {
                // Another one waits behind it.
                drop(ring.enter(0, &[]));
            }
            ring.not_written(&group, &LogError::Abandoned);
            assert!(entered.outcome.get().is_some_and(Result::is_err));
            ring.failed = None;
            assert!(makes_room(&mut ring), "{} of {} used", ring.used(), ring.blocks);
        }
    }

    #[test]
    fn no_group_goes_across_the_end_of_the_ring() {
        let data = [1; 2 * BLOCK];
        let piece = |length| Piece {
            column: 0,
            offset: 0,
            data: &data[..length],
        };
        let write = |ring: &mut Ring| {
            let group = ring.take_group();
            let end = group.start % ring.blocks + (group.used / BLOCK) as u64;
            assert!(
                group.used > 0 && end <= ring.blocks,
                "a group ends in block {end}"
            );
            ring.written(group);
        };
        // Records of two and of three blocks; wherever the log begins, some end at the ring's end, and some would not fit.
        for (head, lengths) in (0..18).flat_map(|head| [(head, [8192, 8192]), (head, [4096, 8192])]) {
            let mut ring = Ring::new(IDENTITY, 17, data.len(), head);
            for length in lengths.into_iter().cycle().take(100) {
                let entered = loop {
                    match ring.enter(0, &[piece(length)]) {
                        Ok(entered) => break entered,
                        Err(Obstacle::Group(_)) => write(&mut ring),
                        Err(Obstacle::Full(_)) => {
                            // Everything is flushed at once here.
                            let number = ring.flush_begins();
                            ring.flushed(number);
                            while ring.enter(0, &[]).is_err() {
                                write(&mut ring);
                            }
                            write(&mut ring);
                        }
                        Err(Obstacle::Never(error)) => panic!("{error}"),
                    }
                };
                ring.applied(entered.sequence);
            }
        }
    }
}
