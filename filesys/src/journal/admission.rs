//! Room in the ring: promised before it is used.
//!
//! Room is counted in blocks. A ticket for some bytes holds the blocks that they fill when they begin a group, and one more, as
//! they may be appended in two parts that end up in different groups. Appending uses room on top of what tickets hold, until the
//! ticket is dropped, so that whoever has a ticket never finds the ring full.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::error::JournalError;
use super::ring::{PAYLOAD, Ring, blocks_for};
use super::runtime::State;
use crate::gate::Signal;

/// Blocks that no ticket gets: a checkpoint appends a few records without one.
pub(super) const SPARE: u64 = 1;

/// What the tasks of a journal share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ring: Ring,
    pub(super) state: RefCell<State>,
    /// Opened whenever something has changed that somebody may wait for.
    pub(super) gate: Signal,
}

/// Who waits for room, in order.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Blocks that tickets hold.
    pub(super) held: u64,
    queue: VecDeque<u64>,
    next: u64,
}

impl Room {
    pub(super) fn somebody_waits(&self) -> bool {
        !self.queue.is_empty()
    }
}

/// A promise of room for what its holder is about to append. Dropping it gives back what was not used.
#[derive(Debug)]
#[must_use = "room is only promised while the ticket is held"]
pub(crate) struct Ticket {
    shared: Rc<Shared>,
    blocks: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.shared.state.borrow_mut();
        state.room.held -= self.blocks;
        // Most appends change nothing that anybody waits for; those who begin a block may have filled the ring.
        if state.has_news() {
            drop(state);
            self.shared.gate.notify();
        }
    }
}

/// A place in the queue.
struct Waiting<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared
            .state
            .borrow_mut()
            .room
            .queue
            .retain(|number| *number != self.number);
        self.shared.gate.notify();
    }
}

impl Shared {
    /// Blocks to hold for `bytes`.
    fn to_hold(&self, bytes: usize) -> Result<u64, JournalError> {
        let blocks = blocks_for(bytes) + 1;
        // The last block of the largest group is left out, so that a ticket can hold one more than its bytes need.
        let most = self.ring.most_blocks().saturating_sub(1 + SPARE);
        if blocks > most + 1
            || bytes
                > usize::try_from(most)
                    .unwrap_or(usize::MAX)
                    .saturating_mul(PAYLOAD)
        {
            let most = usize::try_from(most)
                .unwrap_or(usize::MAX)
                .saturating_mul(PAYLOAD);
            return Err(JournalError::TooLarge { bytes, most });
        }
        Ok(blocks)
    }

    fn hold(self: &Rc<Self>, blocks: u64) -> Option<Ticket> {
        let mut state = self.state.borrow_mut();
        let taken = state.used_blocks().saturating_add(state.room.held);
        if taken.saturating_add(blocks) + SPARE > self.ring.region.blocks {
            return None;
        }
        state.room.held += blocks;
        Some(Ticket {
            shared: Rc::clone(self),
            blocks,
        })
    }

    /// A ticket, if there is room at once and nobody waits for some.
    pub(super) fn reserve(self: &Rc<Self>, bytes: usize) -> Option<Ticket> {
        let blocks = self.to_hold(bytes).ok()?;
        let state = self.state.borrow();
        if state.failure.is_some() || state.room.somebody_waits() {
            return None;
        }
        drop(state);
        self.hold(blocks)
    }

    /// A ticket, as soon as there is room and everybody who came before has theirs.
    pub(super) async fn admit(self: &Rc<Self>, bytes: usize) -> Result<Ticket, JournalError> {
        let blocks = self.to_hold(bytes)?;
        self.state.borrow().check()?;
        if let Some(ticket) = self.reserve(bytes) {
            return Ok(ticket);
        }
        block_io::cover!("journal: somebody waits for room");
        let number = {
            let room = &mut self.state.borrow_mut().room;
            let number = room.next;
            room.next += 1;
            room.queue.push_back(number);
            number
        };
        let shared: &Rc<Self> = self;
        let waiting = Waiting { shared, number };
        shared.gate.notify();
        let ticket = shared
            .gate
            .until(|| {
                let state = shared.state.borrow();
                if let Err(error) = state.check() {
                    return Some(Err(error));
                }
                if state.room.queue.front() != Some(&waiting.number) {
                    return None;
                }
                drop(state);
                shared.hold(blocks).map(Ok)
            })
            .await;
        drop(waiting);
        ticket
    }
}
