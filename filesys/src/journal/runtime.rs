//! The journal in use: records go into the open group, one task writes the closed ones, many wait for them.
//!
//! All waiting futures may be dropped at any time: they only look at the state, and the groups belong to the journal. The
//! future of [`Journal::run`] may be dropped and run again, too: a group stays in the queue until it is written, and writing
//! it once more puts the same bytes into the same place.

use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use block_io::{BlockDevice, IoError, cover};

use super::admission::{Room, SPARE, Shared, Ticket};
use super::error::JournalError;
use super::group::Group;
use super::ring::{PAYLOAD, Position, Ring, blocks_for};
use super::tail::Tail;
use crate::gate::Signal;
use crate::meta_io::MOST;

/// What must be durable before a group is.
pub(crate) trait BeforeWrite {
    /// Makes durable what the records of `group` and of all before rely on: flushes the data volumes that were written. The group
    /// was closed before this is called; whatever was appended to it had its data completed by then.
    fn prepare(&self, group: u64) -> impl Future<Output = Result<(), IoError>>;
}

/// A journal that takes records.
#[derive(Debug)]
pub(crate) struct Journal<V> {
    device: Rc<V>,
    incarnation: u64,
    shared: Rc<Shared>,
    tail: OnceCell<Tail>,
}

#[derive(Debug)]
pub(super) struct State {
    /// Bytes of the open group.
    open: Vec<u8>,
    /// Where the open group begins.
    next: Position,
    /// Groups to be written, in order.
    closed: VecDeque<Rc<Group>>,
    /// The first of them may be on the medium already, wholly or in part.
    writing: bool,
    /// The newest group that is durable.
    durable: u64,
    /// Groups up to here are waited for.
    wanted: u64,
    /// The ring is free up to this position, plus its length.
    released: u64,
    pub(super) room: Room,
    /// What [`Self::has_news`] saw.
    used_before: u64,
    pub(super) failure: Option<JournalError>,
    running: bool,
    stopping: bool,
}

impl State {
    pub(super) fn check(&self) -> Result<(), JournalError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn used_blocks(&self) -> u64 {
        (self.next.block + blocks_for(self.open.len())).saturating_sub(self.released)
    }

    /// Whether there is something to write, somebody waits for room, or more of the ring is in use than when this was asked last.
    pub(super) fn has_news(&mut self) -> bool {
        let used = self.used_blocks();
        let before = std::mem::replace(&mut self.used_before, used);
        used != before || !self.closed.is_empty() || self.room.somebody_waits()
    }

    /// The newest group with records in it, at most `group`.
    fn target(&self, group: u64) -> u64 {
        let newest = if self.open.is_empty() {
            self.next.group - 1
        } else {
            self.next.group
        };
        group.min(newest)
    }
}

impl<V: BlockDevice> Journal<V> {
    /// A journal whose next group is at `position`, in an incarnation that is already durable in the superblock.
    /// `released` is the position that the superblock names: the ring is in use from there to `position`.
    pub(crate) fn new(
        device: Rc<V>,
        ring: Ring,
        released: &Position,
        position: Position,
        incarnation: u64,
    ) -> Self {
        let state = State {
            open: Vec::new(),
            next: position,
            closed: VecDeque::new(),
            writing: false,
            durable: position.group.saturating_sub(1),
            wanted: 0,
            released: released.block,
            room: Room::default(),
            used_before: 0,
            failure: None,
            running: false,
            stopping: false,
        };
        let shared = Shared {
            ring,
            state: RefCell::new(state),
            gate: Signal::default(),
        };
        Self {
            device,
            incarnation,
            shared: Rc::new(shared),
            tail: OnceCell::new(),
        }
    }

    /// What is appended from now on is kept there, too. The open group is empty, and no tail was set before.
    pub(crate) fn keep_tail(&self, tail: Tail) {
        debug_assert!(
            self.shared.state.borrow().open.is_empty(),
            "what is open is not kept"
        );
        let set = self.tail.set(tail);
        debug_assert!(set.is_ok(), "a journal has one tail");
    }

    /// The tail, if there is one.
    pub(crate) fn tail(&self) -> Option<&Tail> {
        self.tail.get()
    }

    /// Adds whole records to the open group, all of them to one group; returns its number. They need a ticket that is held
    /// meanwhile.
    ///
    /// # Errors
    /// The journal has failed, or the records do not fit. Then none is added.
    pub(crate) fn append(&self, records: &[u8]) -> Result<u64, JournalError> {
        let mut state = self.shared.state.borrow_mut();
        state.check()?;
        let ring = &self.shared.ring;
        let bytes = records.len();
        let most_blocks = ring.most_blocks();
        if blocks_for(bytes) > most_blocks {
            let most = usize::try_from(most_blocks)
                .unwrap_or(usize::MAX)
                .saturating_mul(PAYLOAD);
            return Err(JournalError::TooLarge { bytes, most });
        }
        let joined = blocks_for(state.open.len().saturating_add(bytes));
        let separate = joined > most_blocks;
        let after = if separate {
            blocks_for(state.open.len()) + blocks_for(bytes)
        } else {
            joined
        };
        let start = state.next.block;
        if (start + after).saturating_sub(state.released) > ring.region.blocks {
            cover!("journal: the ring is full");
            return Err(JournalError::Full { bytes });
        }
        if state.next.group.max(start) >= MOST - 1 - ring.region.blocks {
            return Err(JournalError::Exhausted);
        }
        if separate {
            cover!("journal: a group is as large as can be");
            self.close(&mut state);
        }
        state.open.extend_from_slice(records);
        let group = state.next.group;
        let durable = state.durable;
        let full = self
            .tail
            .get()
            .and_then(|tail| tail.append(group, records, durable));
        if let Some(full) = full {
            state.wanted = state.wanted.max(full);
            drop(state);
            self.shared.gate.notify();
        }
        Ok(group)
    }

    /// The group that takes records now.
    pub(crate) fn open_group(&self) -> u64 {
        self.shared.state.borrow().next.group
    }

    /// The newest group that is durable.
    pub(crate) fn durable_group(&self) -> u64 {
        self.shared.state.borrow().durable
    }

    /// Blocks of the ring that the superblock still needs, the open group included.
    pub(crate) fn used_blocks(&self) -> u64 {
        self.shared.state.borrow().used_blocks()
    }

    /// The position behind the last group that is durable.
    pub(crate) fn durable_end(&self) -> u64 {
        let state = self.shared.state.borrow();
        let unwritten = state.closed.front().map(|group| group.start.block);
        unwritten.unwrap_or(state.next.block)
    }

    /// The block of the volume at a position.
    pub(crate) fn place(&self, position: u64) -> u64 {
        self.shared.ring.place(position)
    }

    /// Whether a block is a whole one of this journal, at its position.
    pub(crate) fn is_at(&self, position: u64, block: &[u8]) -> bool {
        let decoded = super::ring::decode(block, &self.shared.ring);
        decoded.is_some_and(|(header, _)| header.position == position)
    }

    /// Blocks of the ring.
    pub(crate) fn capacity(&self) -> u64 {
        self.shared.ring.region.blocks
    }

    #[cfg(test)]
    /// The error that ended it, if one did.
    pub(crate) fn failure(&self) -> Option<JournalError> {
        self.shared.state.borrow().failure.clone()
    }

    #[cfg(test)]
    /// Room for `bytes`, if there is some at once and nobody waits for it.
    pub(crate) fn reserve(&self, bytes: usize) -> Option<Ticket> {
        self.shared.reserve(bytes)
    }

    /// Room for `bytes`, to be appended in at most two parts; waits for [`Self::release`] if need be. First come, first served.
    ///
    /// # Errors
    /// The journal has failed, or never has so much room.
    pub(crate) async fn admit(&self, bytes: usize) -> Result<Ticket, JournalError> {
        self.shared.admit(bytes).await
    }

    /// Waits until a checkpoint is due: at least `blocks` are in use, or somebody waits for room that one would free.
    ///
    /// # Errors
    /// The journal has failed.
    pub(crate) async fn pressure(&self, blocks: u64) -> Result<(), JournalError> {
        let shared = &self.shared;
        shared
            .gate
            .until(|| {
                let state = shared.state.borrow();
                if let Err(error) = state.check() {
                    return Some(Err(error));
                }
                let used = state.used_blocks();
                (used >= blocks.max(1) || (used > 0 && state.room.somebody_waits())).then_some(Ok(()))
            })
            .await
    }

    /// Cuts for a checkpoint: whatever was appended so far belongs to groups before the returned position, whatever is appended
    /// later to that one or a later one. Waits for nothing: the groups are written by [`Self::run`].
    pub(crate) fn close_group(&self) -> Position {
        let mut state = self.shared.state.borrow_mut();
        self.close(&mut state);
        let position = state.next;
        drop(state);
        self.shared.gate.notify();
        position
    }

    /// The first group of which nothing can be on the medium yet, so that it can be rewritten.
    pub(crate) fn first_unwritten(&self) -> u64 {
        let state = self.shared.state.borrow();
        state.durable + 1 + u64::from(state.writing)
    }

    /// Gives groups other records: all from [`Self::first_unwritten`] on, in order, each of which `edit` gets as bytes; it gives the new ones, at least
    /// one, or none if the group stays as it is. Their positions and checksums change, so who has one of those from [`Self::close_group`] has
    /// to ask anew.
    ///
    /// # Errors
    /// The new records do not fit, or `edit` failed; then nothing is changed.
    pub(crate) fn rewrite<E: From<JournalError>>(
        &self,
        mut edit: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<(), E> {
        let mut state = self.shared.state.borrow_mut();
        state.check()?;
        let ring = &self.shared.ring;
        let fits = |bytes: &[u8]| match blocks_for(bytes.len()) <= ring.most_blocks() {
            true => Ok(()),
            false => Err(JournalError::Full { bytes: bytes.len() }),
        };
        let kept = usize::from(state.writing);
        let mut start = match state.closed.get(kept) {
            Some(group) => group.start,
            None => state.next,
        };
        let mut groups = Vec::new();
        for group in state.closed.iter().skip(kept) {
            let old = group.records();
            let bytes = edit(&old)?.unwrap_or(old);
            fits(&bytes)?;
            let group = Group::new(ring, self.incarnation, start, &bytes);
            start = group.end();
            groups.push(Rc::new(group));
        }
        let open = match state.open.is_empty() {
            true => None,
            false => edit(&state.open)?,
        };
        let open_bytes = open.as_deref().unwrap_or(&state.open);
        fits(open_bytes)?;
        let end = start.block + blocks_for(open_bytes.len()) + state.room.held + SPARE;
        if end.saturating_sub(state.released) > ring.region.blocks {
            let bytes = open_bytes.len();
            return Err(JournalError::Full { bytes }.into());
        }
        cover!("journal: groups were rewritten");
        state.closed.truncate(kept);
        state.closed.extend(groups);
        state.next = start;
        if let Some(open) = open {
            state.open = open;
        }
        if let Some(tail) = self.tail.get() {
            tail.void(state.durable + 1 + u64::from(state.writing), state.next.group);
        }
        Ok(())
    }

    fn close(&self, state: &mut State) {
        if state.open.is_empty() {
            return;
        }
        let group = Group::new(&self.shared.ring, self.incarnation, state.next, &state.open);
        state.open.clear();
        state.next = group.end();
        state.closed.push_back(Rc::new(group));
    }

    /// A superblock from which replay begins at `position` is durable: the blocks before are free.
    pub(crate) fn release(&self, position: &Position) {
        let mut state = self.shared.state.borrow_mut();
        debug_assert!(
            position.block <= state.next.block,
            "released beyond what is closed"
        );
        state.released = state.released.max(position.block.min(state.next.block));
        drop(state);
        self.shared.gate.notify();
    }

    /// Returns when `group` and all groups before it are durable. A group without records is.
    ///
    /// # Errors
    /// The journal failed before the group was durable.
    pub(crate) async fn commit(&self, group: u64) -> Result<(), JournalError> {
        let shared = &self.shared;
        let target = {
            let mut state = shared.state.borrow_mut();
            let target = state.target(group);
            state.wanted = state.wanted.max(target);
            target
        };
        if target > self.durable_group() {
            shared.gate.notify();
        }
        shared
            .gate
            .until(|| {
                let state = shared.state.borrow();
                if state.durable >= target {
                    return Some(Ok(()));
                }
                state.check().err().map(Err)
            })
            .await
    }

    /// Whether `group` and all before it are durable, or would be found if the process were killed now.
    ///
    /// # Errors
    /// The journal has failed.
    pub(crate) fn survives_a_kill(&self, group: u64) -> Result<bool, JournalError> {
        let state = self.shared.state.borrow();
        if group <= state.durable {
            return Ok(true);
        }
        state.check()?;
        Ok(self.tail.get().is_some_and(|tail| tail.keeps(group)))
    }

    /// Lets [`Self::run`] end when everything that is closed or waited for is durable. After that, nothing is taken any more.
    pub(crate) fn stop(&self) {
        self.shared.state.borrow_mut().stopping = true;
        self.shared.gate.notify();
    }

    /// Writes groups, one at a time, until [`Self::stop`]. The owner spawns it once; without it, nobody who waits in
    /// [`Self::commit`] goes on. While a group is being written, the next one takes what is appended.
    ///
    /// # Errors
    /// The failure that ends the journal.
    pub(crate) async fn run(&self, before: &impl BeforeWrite) -> Result<(), JournalError> {
        let _running = Running::begin(&self.shared);
        while let Some(number) = self.shared.gate.until(|| self.next_to_write()).await {
            let result = match before.prepare(number).await {
                Ok(()) => self.write_first().await.map_err(|source| JournalError::Write {
                    group: number,
                    source: Arc::new(source),
                }),
                Err(source) => Err(JournalError::Prepare {
                    group: number,
                    source: Arc::new(source),
                }),
            };
            self.written(number, &result);
            result?;
        }
        let ended = self.shared.state.borrow().check();
        if ended.is_ok() {
            self.shared.state.borrow_mut().failure = Some(JournalError::Stopped);
            self.shared.gate.notify();
        }
        ended
    }

    /// Writes the first closed group as it is now.
    async fn write_first(&self) -> Result<(), IoError> {
        let group = {
            let mut state = self.shared.state.borrow_mut();
            state.writing = true;
            state.closed.front().map(Rc::clone)
        };
        match group {
            Some(group) => group.write(&*self.device, &self.shared.ring).await,
            None => Ok(()),
        }
    }

    /// The number of the next group; that there will be none; or nothing yet.
    fn next_to_write(&self) -> Option<Option<u64>> {
        let mut state = self.shared.state.borrow_mut();
        if state.failure.is_some() {
            return Some(None);
        }
        if state.closed.is_empty() && state.wanted >= state.next.group {
            self.close(&mut state);
        }
        match state.closed.front() {
            Some(group) => Some(Some(group.start.group)),
            None => state.stopping.then_some(None),
        }
    }

    fn written(&self, group: u64, result: &Result<(), JournalError>) {
        let mut state = self.shared.state.borrow_mut();
        match result {
            Ok(()) => {
                state.durable = group;
                state.writing = false;
                state.closed.pop_front();
            }
            Err(error) => {
                cover!("journal: it has failed");
                tracing::error!(%error, "the journal takes no more changes");
                state.failure = Some(error.clone());
            }
        }
        drop(state);
        self.shared.gate.notify();
    }
}

/// Sees to it that one task writes.
struct Running<'a>(&'a Shared);

impl<'a> Running<'a> {
    fn begin(shared: &'a Shared) -> Self {
        let mut state = shared.state.borrow_mut();
        debug_assert!(!state.running, "two tasks write the journal");
        state.running = true;
        Self(shared)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().running = false;
    }
}
