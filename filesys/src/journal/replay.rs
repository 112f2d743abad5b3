//! Reading the journal: which groups are whole, where the log ends, and whether that is an end or damage.
//!
//! One lap is read, once, from the position that the superblock names. Each block is judged when it comes by:
//!
//! ```text
//!   looking for groups ──(the block is not the next one of the chain)──► looking for proof of damage ──► end of the lap
//! ```
//!
//! | a block that is whole and of this file system says | before the end | from the end on |
//! |---|---|---|
//! | the next block of the next group | it is taken | – |
//! | a group after the one that is missing, in a place that such a group can have, of a known incarnation | end, and: | `Damaged`: that group was in flight only after the missing one had been durable |
//! | the same of an incarnation that the superblock does not know | end, and: | `Newer`: the superblock is older than the log |
//! | anything else: the rest of a torn group, an older lap | end | nothing |
//!
//! The rest of a torn group can stay in the ring for long. It proves nothing, as its group's number is not above that of any group
//! that was missing since: the torn group's number was given again to the next group that was written.

use std::sync::Arc;

use block_io::{AlignedBuffer, BlockDevice, cover};

use super::error::ReplayError;
use super::ring::{self, HEADER, Header, Position, Ring};
use super::tail::End;
use crate::heal::Healer;
use crate::meta_io::{self, BLOCK};

/// Blocks per request: 1 MiB.
const AT_ONCE: u64 = 256;

#[cfg(test)]
/// Reads the log from `from` on, and gives the bytes of each whole group to `each`, in order. Returns where the next group
/// begins. Blocks of incarnations above `limit`, that of the superblock, do not count.
///
/// See the [module](super) for what the owner must do before it acknowledges anything.
///
/// # Errors
/// The device's; `each`'s; a group is missing that had been durable.
pub(crate) async fn replay<V: BlockDevice, E>(
    device: &V,
    ring: &Ring,
    from: Position,
    limit: u64,
    each: impl AsyncFnMut(&[u8]) -> Result<(), E>,
) -> Result<Position, ReplayError<E>> {
    let end = replay_healed(device, ring, from, limit, &Healer::default(), each).await;
    end.map(|end| end.position)
}

/// As [`replay`]. Before the log is taken to end, the block that should go on is looked for in the other copies, too, and put right.
///
/// A group that a crash tore can be in one copy as a whole and in another in part. Whoever keeps the copies makes them equal before
/// their first read after a crash, whichever it takes; so here they differ only where one of them is damaged.
pub(crate) async fn replay_healed<V: BlockDevice, E>(
    device: &V,
    ring: &Ring,
    from: Position,
    limit: u64,
    healer: &Healer,
    mut each: impl AsyncFnMut(&[u8]) -> Result<(), E>,
) -> Result<End, ReplayError<E>> {
    if !ring.is_possible(&from) {
        return Err(ReplayError::Impossible);
    }
    let lap = ring.region.blocks;
    let has_copies = healer.copies(ring.region.first) > 0;
    let mut log = Log::new(*ring, from, limit);
    let mut done = 0;
    while done < lap {
        let position = from.block + done;
        let until_end = lap - ring.index(position);
        let count = AT_ONCE.min(lap - done).min(until_end);
        let length = usize::try_from(count).unwrap_or(1);
        let read = meta_io::read_blocks(device, ring.place(position), length).await;
        let read = read.map_err(|source| ReplayError::Device(Arc::new(source)))?;
        for (position, block) in (position..).zip(read.as_slice().chunks(BLOCK)) {
            let place = ring.place(position);
            let other = if !has_copies || log.goes_on(position, block) {
                None
            } else {
                healer.find(place, |block| log.goes_on(position, block)).await
            };
            if let Some(good) = &other {
                cover!("journal: a block is taken from another copy");
                healer.repair(place, good).await;
            }
            let block = other.as_ref().map_or(block, AlignedBuffer::as_slice);
            match log.look(position, block) {
                Seen::Nothing => {}
                Seen::Group => {
                    let group = log.next.group - 1;
                    let applied = each(&log.bytes).await;
                    applied.map_err(|source| ReplayError::Apply { group, source })?;
                    log.bytes.clear();
                }
                Seen::Proof => {
                    cover!("journal: a group is missing that had been durable");
                    return Err(ReplayError::Damaged {
                        group: log.next.group,
                        block: ring.place(log.next.block),
                    });
                }
                Seen::Newer(incarnation) => {
                    cover!("journal: newer than the superblock");
                    let block = ring.place(position);
                    return Err(ReplayError::Newer {
                        block,
                        incarnation,
                        limit,
                    });
                }
            }
        }
        done += count;
    }
    Ok(End {
        position: log.next,
        incarnation: log.incarnation,
    })
}

/// What a block has told.
enum Seen {
    Nothing,
    /// It was the last of a group, whose bytes are there.
    Group,
    /// A later group was begun.
    Proof,
    /// The log is of an incarnation that the superblock does not know.
    Newer(u64),
}

/// What is known of the log so far.
struct Log {
    ring: Ring,
    limit: u64,
    /// First position after the lap.
    end: u64,
    /// Where the next group begins.
    next: Position,
    /// Of the last whole group.
    incarnation: u64,
    /// First block of the group that is being read.
    first: Option<Header>,
    /// Its bytes so far.
    bytes: Vec<u8>,
    /// No whole group follows.
    ended: bool,
}

impl Log {
    fn new(ring: Ring, from: Position, limit: u64) -> Self {
        Self {
            ring,
            limit,
            end: from.block + ring.region.blocks,
            next: from,
            incarnation: 0,
            first: None,
            bytes: Vec::new(),
            ended: false,
        }
    }

    /// Judges the block at `position`; positions come one after the other.
    fn look(&mut self, position: u64, block: &[u8]) -> Seen {
        let decoded = ring::decode(block, &self.ring).filter(|(header, _)| header.position == position);
        if !self.ended {
            if let Some((header, checksum)) = decoded
                && self.continues(&header)
            {
                return self.take(&header, checksum, block);
            }
            self.ended = true;
            if self.first.take().is_some() {
                cover!("journal: the last group is torn");
            }
            self.bytes = Vec::new();
        }
        decoded.map_or(Seen::Nothing, |(header, _)| self.judge(&header))
    }

    /// Whether the block goes on with the log, or the log has ended before.
    fn goes_on(&self, position: u64, block: &[u8]) -> bool {
        self.ended
            || ring::decode(block, &self.ring)
                .is_some_and(|(header, _)| header.position == position && self.continues(&header))
    }

    /// Whether it is the next block of the next group.
    fn continues(&self, header: &Header) -> bool {
        let expected = match &self.first {
            // All blocks of a group say the same, but for their number.
            Some(first) => Header {
                index: u16::try_from(header.position - first.position).unwrap_or(u16::MAX),
                position: header.position,
                used: header.used,
                ..*first
            },
            None => Header {
                index: 0,
                group: self.next.group,
                previous: self.next.previous,
                ..*header
            },
        };
        *header == expected
            && (self.incarnation..=self.limit).contains(&header.incarnation)
            && self.next.block + u64::from(header.count) <= self.end
    }

    fn take(&mut self, header: &Header, checksum: u32, block: &[u8]) -> Seen {
        self.first.get_or_insert(*header);
        let end = HEADER + usize::from(header.used);
        self.bytes
            .extend_from_slice(block.get(HEADER..end).unwrap_or_default());
        if header.index + 1 < header.count {
            return Seen::Nothing;
        }
        if self.incarnation != 0 && header.incarnation > self.incarnation {
            cover!("journal: a later incarnation goes on");
        }
        self.first = None;
        self.incarnation = header.incarnation;
        self.next = Position {
            group: header.group + 1,
            block: header.position + 1,
            previous: checksum,
        };
        Seen::Group
    }

    /// Whether a block that is not part of the log proves that the log had gone on.
    fn judge(&self, header: &Header) -> Seen {
        // Each group between has at least one block.
        let start = header.position - u64::from(header.index);
        let later = header.group.checked_sub(self.next.group);
        let room = start.checked_sub(self.next.block);
        let (Some(later), Some(room)) = (later, room) else {
            return Seen::Nothing;
        };
        if later > room || header.incarnation < self.incarnation {
            return Seen::Nothing;
        }
        if header.incarnation > self.limit {
            return Seen::Newer(header.incarnation);
        }
        if later > 0 { Seen::Proof } else { Seen::Nothing }
    }
}
