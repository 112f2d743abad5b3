//! The journal: every change of metadata since the last checkpoint, in a ring of blocks that identify themselves.
//!
//! ```text
//!   tasks     admit ► Ticket … append(records) ──► open group ─┐                    commit(group) ◄── durable
//!                                                              │ cut: by the writer when somebody waits,
//!   checkpoint                      close_group() = Position ──┤      or by a checkpoint
//!                                                              ▼
//!   writer (one task: Journal::run)   closed groups ──► BeforeWrite::prepare ──► one FUA write ──► durable
//!                                                       (flush of the data volumes)
//!
//!   ring      … free ┊ group 7: 3 blocks ┊ group 8: 1 block ┊ group 9: 2 blocks (in flight) ┊ free …
//!                    ▲ released: replay begins here
//! ```
//!
//! # Promises
//! - A *group* is replayed as a whole or not at all, and only after all groups before it. What was appended by one call is
//!   never split over two groups. So what is replayed is a prefix of what was appended, at an append.
//! - One group is in flight at a time, and is written with FUA. So whoever sees a valid block of group `n + 1` knows that group
//!   `n` had been durable: a group that is not valid then is damage, not the end of the log ([`replay`](replay_healed)).
//! - A group that [`Journal::commit`] has acknowledged is found by [`replay`].
//! - After an error nothing is written any more: the error stays, and every later call returns it.
//!
//! - If there is a [tail](Tail), what was appended and not committed is found after the process was killed, but not after a power cut.
//!
//! # What the owner does when it opens
//! 1. [`superblock::open`](crate::superblock::open), [`replay`](replay_healed) from the position and up to the incarnation that it names.
//! 2. Flush the metadata volume and all data volumes: what was replayed may have been read from a volatile cache, and the data
//!    that it refers to may be in one. Nothing is acknowledged before that.
//! 3. Write a superblock with the incarnation plus one. Only then does a new group carry a new incarnation, so that the rest of a
//!    torn group, which has the same number as the first new one, is never mistaken for a part of it.
//! 4. [`Journal::new`] with the position that [`replay`] returned, and the new incarnation.
//! 5. If there is a [tail](FoundTail): announce the incarnation in it before 3; after 4, make its entries again, commit them, and only then let others
//!    change anything, with a new [`Tail`] in the journal.
//!
//! # What the owner does for a checkpoint
//! [`Journal::close_group`]; write pages and bitmap of that state; flush data and metadata volumes; write a superblock with the
//! returned position; [`Journal::release`].

mod admission;
mod error;
mod group;
mod replay;
mod ring;
mod runtime;
mod tail;
#[cfg(test)]
mod tests;

pub(crate) use admission::Ticket;
pub(crate) use error::{JournalError, ReplayError};
#[cfg(test)]
pub(crate) use replay::replay;
pub(crate) use replay::replay_healed;
pub(crate) use ring::{Position, Ring};
pub(crate) use runtime::{BeforeWrite, Journal};
pub(crate) use tail::{End, Found as FoundTail, Tail};

/// Parses a block as one of a ring, with its checksum computed, and writes it again: for fuzzing.
pub(crate) fn survives(block: &[u8]) -> bool {
    use crate::meta_io::{put, take};
    let mut block = block.to_vec();
    block.resize(crate::meta_io::BLOCK, 0);
    let checksum = crate::checksum::crc32c(block.get(12..).unwrap_or_default());
    put(&mut block, 8, &checksum.to_le_bytes());
    let ring = Ring {
        region: crate::superblock::Region {
            first: 40,
            blocks: 64,
        },
        uuid: take(&block, 16),
    };
    let Some((header, checksum)) = ring::decode(&block, &ring) else {
        return false;
    };
    let mut again = block.clone();
    assert_eq!(ring::encode(&header, ring.uuid, &mut again), checksum);
    true
}
