//! The parity log of a section: no partial-stripe write goes in place before its data *and* parity are durable here.
//!
//! A crash in the middle of such a write would leave data and parity that do not belong together, and the next loss of a device
//! would then destroy data that nobody was writing (the "write hole"). After a crash the log is replayed: every record holds the
//! new content of all pieces of a row that change, so that replaying it any number of times, in order, makes the row whole.
//!
//! # On media
//! A ring of 4 KiB blocks, the same on two devices (three for double parity). Blocks are numbered as if the log were endless: block
//! `n` is at `n mod ring length`. A record is a header block and its payload, rounded up to blocks; its *sequence* is the number
//! of its header block, so a header is valid in one place of one lap only. Records do not go across the ring's end. Numbers are
//! little-endian.
//!
//! | offset | size | header |
//! |---:|---:|---|
//! | 0 | 8 | magic `SMSVPLOG` |
//! | 8 | 4 | CRC-32C of bytes 12 to 4095 |
//! | 12 | 4 | format version, 1 |
//! | 16 | 8 | sequence |
//! | 24 | 8 | tail: records with a smaller sequence are never replayed |
//! | 32 | 16 | UUID of the volume |
//! | 48 | 8 | number of the section |
//! | 56 | 8 | row |
//! | 64 | 4 | bytes of payload |
//! | 68 | 4 | CRC-32C of the payload's blocks |
//! | 72 | 4 | pieces; 0 in a *checkpoint*, which only moves the tail |
//! | 76 | 20 | reserved, zero |
//! | 96 | 3072 | 192 pieces: column (4), length (4), offset within the unit (8) |
//! | 3168 | 928 | bit `n` (bit `n mod 8` of byte `n / 8`) says that payload block `n` begins with the magic, and has zeroes for it |
//!
//! The payload is the content of the pieces, one after the other, then zeroes. As no payload block begins with the magic, a guest
//! cannot forge a header by writing one.
//!
//! # Hazards
//! - *Torn group.* Records are judged one by one. One that is whole though its group is not was not acknowledged, its in-place
//!   writes have not begun, and replaying it is as if its write had just made it.
//! - *One copy lost or torn.* A record counts if it is whole on any copy. The newest valid header of any copy has the tail.
//! - *Stale copy.* A copy that fails is not written any more, and nothing is acknowledged until the owner has *first* made a
//!   configuration durable without it and *then* called [`ParityLog::remove_copy`]. It comes back only blank.
//! - *A record of an earlier lap.* Blocks are only overwritten when a *durable* header has a tail behind them, and such a header
//!   stays the newest or is followed by newer ones. So a replay never finds an old record without all that came after it.
//! - *Tail moved too early.* The tail passes a record only when the section was flushed since its in-place writes ended.
//! - *An unlogged write after a logged one.* A full-stripe write needs no log, but a replay would put the older record over it:
//!   [`ParityLog::has_live_record`] says so (by the durable tail, not by that in memory), and it is then logged, too.
//! - *A failed or dropped append* may be on media all the same. Its place is not used again, and its record counts as live until
//!   the tail has passed it.
//! - *A dropped in-place write.* A [`Ticket`] that is dropped unapplied keeps its record live for ever.
//! - *Crash during recovery.* Replaying does not change the log; only [`Recovery::restart`] does, when the replay was flushed, by
//!   a checkpoint after all headers that were found.
//!
//! # Use
//! One write to a row at a time: the owner locks rows. Records that are submitted while a group is being written form the next
//! group, which is one contiguous write to each copy.

mod format;
mod recovery;
mod ring;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block_io::{BlockDevice, Durability, IoError, ZeroMode, cover};

use self::format::{BLOCK, MAX_PAYLOAD_BLOCKS};
pub use self::format::{MAX_PIECES, Piece};
pub use self::recovery::Recovery;
#[doc(hidden)]
pub use self::recovery::parse_ring;
use self::ring::{Group, Obstacle, Outcome, Remedy, Ring};
pub use super::LogCopy;
use super::LogError;
use super::gate::{Gate, join_all};
use crate::bytes;
use crate::model::{DeviceId, Uuid};

/// Whose log it is: no other section, also of the past, may have the same on the same place of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: Uuid,
    /// Number of the section within the volume.
    pub section: u64,
}

/// Sizes of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Whose it is.
    pub identity: Identity,
    /// Bytes of each copy.
    pub length: u64,
    /// Bytes of a row, parity included: the largest record.
    pub row: usize,
}

/// The length that a log needs at least for rows of `row` bytes, parity included; none if rows are too large for any log.
pub fn least_length(row: usize) -> Option<u64> {
    let blocks = format::blocks(row);
    (blocks <= MAX_PAYLOAD_BLOCKS).then_some((4 * blocks as u64 + 1) * BLOCK as u64)
}

impl Shape {
    fn blocks(&self) -> Result<u64, LogError> {
        let needed = least_length(self.row);
        if needed.is_none_or(|needed| self.length < needed) {
            return Err(LogError::RingTooSmall {
                length: self.length,
                needed: needed.unwrap_or(0),
            });
        }
        Ok(self.length / BLOCK as u64)
    }
}

#[derive(Debug)]
struct Core {
    ring: RefCell<Ring>,
    /// A group has ended, a record was applied, the tail has moved.
    changed: Gate,
}

/// The log of a section with parity.
#[derive(Debug)]
pub struct ParityLog<D> {
    core: Rc<Core>,
    shape: Shape,
    blocks: u64,
    copies: RefCell<Vec<LogCopy<D>>>,
}

/// A durable record, whose in-place writes may begin.
#[derive(Debug)]
#[must_use = "the record stays in the log for ever unless it is applied"]
pub struct Ticket {
    core: Rc<Core>,
    sequence: u64,
    state: TicketState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TicketState {
    /// No in-place write has begun.
    Entered,
    /// In-place writes may be under way.
    Granted,
    Applied,
}

impl Ticket {
    /// All in-place writes have ended; they may still be volatile. Also if some failed, and the members are detached.
    pub fn applied(mut self) {
        self.state = TicketState::Applied;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        {
            let mut ring = self.core.ring.borrow_mut();
            match self.state {
                TicketState::Entered | TicketState::Applied => ring.applied(self.sequence),
                TicketState::Granted => {
                    cover!("parity log: an in-place write was given up");
                    ring.abandoned(self.sequence);
                }
            }
        }
        self.core.changed.open();
    }
}

impl<D: BlockDevice + 'static> ParityLog<D> {
    /// Makes an empty log; what was in its place is never read again.
    ///
    /// # Errors
    /// The log is too small for the rows; a device's.
    pub async fn format(shape: Shape, copies: Vec<LogCopy<D>>) -> Result<Self, LogError> {
        shape.blocks()?;
        for cleared in join_all(copies.iter().map(|copy| clear(copy, shape.length))).await {
            cleared?;
        }
        Self::begin(shape, copies, 0).await
    }

    /// Finds what a log holds: see [`Recovery`].
    ///
    /// # Errors
    /// A copy cannot be read (then open without it, if it may be left out); no copy holds a valid record; the log is too small
    /// for the rows.
    pub async fn open(shape: Shape, copies: Vec<LogCopy<D>>) -> Result<Recovery<D>, LogError> {
        Recovery::read(shape, copies).await
    }

    /// Begins with a checkpoint in block `head` of the endless log.
    async fn begin(shape: Shape, copies: Vec<LogCopy<D>>, head: u64) -> Result<Self, LogError> {
        let blocks = shape.blocks()?;
        let log = Self {
            core: Rc::new(Core {
                ring: RefCell::new(Ring::new(shape.identity, blocks, shape.row, head)),
                changed: Gate::default(),
            }),
            shape,
            blocks,
            copies: RefCell::new(copies),
        };
        log.checkpoint().await?;
        Ok(log)
    }

    /// Whether a record of the row may be replayed after a crash: a write of the full row must then be logged, too.
    pub fn has_live_record(&self, row: u64) -> bool {
        self.core.ring.borrow().has_live(row)
    }

    /// The rows of all records that may be replayed after a crash.
    pub fn live_rows(&self) -> Vec<u64> {
        self.core.ring.borrow().live_rows()
    }

    /// Blocks in use, and all blocks: [`Self::advance`] in time spares writers the wait.
    pub fn usage(&self) -> (u64, u64) {
        (self.core.ring.borrow().used(), self.blocks)
    }

    /// Makes a record durable on all copies. When the ring is full, `flush` is called, as by [`Self::advance`].
    ///
    /// # Errors
    /// A copy has failed: take it out of the configuration, then out of the log, and try again. The record is too large. The
    /// section cannot be flushed.
    pub async fn append(
        &self,
        row: u64,
        pieces: &[Piece<'_>],
        flush: &impl AsyncFn() -> Result<(), IoError>,
    ) -> Result<Ticket, LogError> {
        let bytes: usize = pieces.iter().map(|piece| piece.data.len()).sum();
        if pieces.is_empty() || pieces.len() > MAX_PIECES || bytes > self.shape.row {
            return Err(LogError::RecordTooLarge {
                pieces: pieces.len(),
                bytes,
            });
        }
        loop {
            let entered = self.core.ring.borrow_mut().enter(row, pieces);
            match entered {
                Ok(entered) => {
                    let mut ticket = Ticket {
                        core: Rc::clone(&self.core),
                        sequence: entered.sequence,
                        state: TicketState::Entered,
                    };
                    self.settle(&entered.outcome).await?;
                    ticket.state = TicketState::Granted;
                    return Ok(ticket);
                }
                Err(Obstacle::Never(error)) => return Err(error),
                Err(Obstacle::Group(outcome)) => self.settle(&outcome).await?,
                Err(Obstacle::Full(tail)) => self.make_room(tail, flush).await?,
            }
        }
    }

    /// The in-place writes of a record have ended: as [`Ticket::applied`].
    pub fn applied(&self, ticket: Ticket) {
        ticket.applied();
    }

    /// Calls `flush`, which makes durable what was written to the section before (on all members that are not detached), and
    /// moves the tail past all records that were applied before and have none unapplied before them.
    ///
    /// # Errors
    /// The flush's; a copy has failed.
    pub async fn advance(&self, flush: &impl AsyncFn() -> Result<(), IoError>) -> Result<(), LogError> {
        let _turn = self.turn().await;
        self.flush_applied(flush).await?;
        let gains = self.core.ring.borrow().gains_by_checkpoint();
        if gains { self.checkpoint().await } else { Ok(()) }
    }

    /// Takes a copy out of service. First make a configuration durable that does not name it.
    pub fn remove_copy(&self, device: DeviceId) {
        self.copies.borrow_mut().retain(|copy| copy.id != device);
        self.core.ring.borrow_mut().failed = None;
        self.core.changed.open();
    }

    /// Puts a new copy into service. When this returns, it holds all that the others hold, and may be named in the
    /// configuration.
    ///
    /// # Errors
    /// A copy has failed, or the section cannot be flushed; the new copy is not in service then.
    pub async fn add_copy(
        &self,
        copy: LogCopy<D>,
        flush: &impl AsyncFn() -> Result<(), IoError>,
    ) -> Result<(), LogError> {
        clear(&copy, self.shape.length).await?;
        let mut joining = Joining {
            log: self,
            device: Some(copy.id),
        };
        self.copies.borrow_mut().push(copy);
        let joined = self.core.ring.borrow().head;
        loop {
            {
                let _turn = self.turn().await;
                self.flush_applied(flush).await?;
                let moves = self.core.ring.borrow().remedy() == Remedy::Checkpoint;
                if moves {
                    self.checkpoint().await?;
                }
            }
            let (tail, remedy, more) = {
                let ring = self.core.ring.borrow();
                (ring.durable_tail, ring.remedy(), ring.has_applied())
            };
            if tail >= joined {
                joining.device = None;
                return Ok(());
            }
            if remedy == Remedy::Reopen {
                return Err(LogError::Abandoned);
            }
            if !more {
                cover!("parity log: a new copy waits for old records to end");
                self.core.changed.next().await;
            }
        }
    }

    /// Makes room when the ring was full with this durable tail.
    async fn make_room(
        &self,
        tail: u64,
        flush: &impl AsyncFn() -> Result<(), IoError>,
    ) -> Result<(), LogError> {
        let choose = || {
            let mut ring = self.core.ring.borrow_mut();
            if ring.durable_tail != tail || ring.failed.is_some() {
                return Some(None);
            }
            match ring.remedy() {
                Remedy::Reopen => Some(Some(Remedy::Reopen)),
                remedy if remedy != Remedy::Wait && !ring.advancing => {
                    ring.advancing = true;
                    Some(Some(remedy))
                }
                _ => {
                    cover!("parity log: full, and others must end first");
                    None
                }
            }
        };
        let remedy = self.core.changed.until(choose).await;
        match remedy {
            None => return Ok(()),
            Some(Remedy::Reopen) => return Err(LogError::Abandoned),
            Some(_) => {}
        }
        let _turn = Advancing { core: &self.core };
        if remedy == Some(Remedy::Flush) {
            cover!("parity log: full, flushed");
            self.flush_applied(flush).await?;
        }
        self.checkpoint().await
    }

    /// The right to move the tail.
    async fn turn(&self) -> Advancing<'_> {
        let free = || (!std::mem::replace(&mut self.core.ring.borrow_mut().advancing, true)).then_some(());
        self.core.changed.until(free).await;
        Advancing { core: &self.core }
    }

    async fn flush_applied(&self, flush: &impl AsyncFn() -> Result<(), IoError>) -> Result<(), LogError> {
        let number = {
            let mut ring = self.core.ring.borrow_mut();
            if !ring.has_applied() {
                return Ok(());
            }
            ring.flush_begins()
        };
        flush().await.map_err(|source| LogError::Flush {
            source: Arc::new(source),
        })?;
        self.core.ring.borrow_mut().flushed(number);
        Ok(())
    }

    /// A record without pieces: makes the tail durable.
    async fn checkpoint(&self) -> Result<(), LogError> {
        loop {
            let entered = self.core.ring.borrow_mut().enter(0, &[]);
            match entered {
                Ok(entered) => return self.settle(&entered.outcome).await,
                Err(Obstacle::Group(outcome)) => self.settle(&outcome).await?,
                Err(Obstacle::Never(error)) => return Err(error),
                // A block is left for it, unless the tail stands still, and then there is nothing to be told.
                Err(Obstacle::Full(tail)) if self.core.ring.borrow().remedy() == Remedy::Checkpoint => {
                    self.wait_for_block(tail).await?;
                }
                Err(Obstacle::Full(_)) => return Ok(()),
            }
        }
    }

    /// The block that is left for a header is in a group that is not durable yet: who entered it may have gone. Spinning would
    /// keep everybody from writing it.
    async fn wait_for_block(&self, tail: u64) -> Result<(), LogError> {
        cover!("parity log: no block is left for a header");
        let gathered = self.core.ring.borrow().gathered();
        if let Some(outcome) = gathered {
            return self.settle(&outcome).await;
        }
        let idle = {
            let ring = self.core.ring.borrow();
            !ring.writing && ring.durable_tail == tail && ring.failed.is_none()
        };
        if idle {
            // Nobody will ever make room: an error is better than a wait without end.
            return Err(LogError::Abandoned);
        }
        let ended = || {
            let ring = self.core.ring.borrow();
            (!ring.writing || ring.durable_tail != tail || ring.failed.is_some()).then_some(())
        };
        self.core.changed.until(ended).await;
        Ok(())
    }

    /// Waits until a group is durable: writes it, or lets another one.
    async fn settle(&self, outcome: &Outcome) -> Result<(), LogError> {
        loop {
            let next = self.core.changed.until(|| {
                if let Some(result) = outcome.get() {
                    return Some(Err(result.clone()));
                }
                let mut ring = self.core.ring.borrow_mut();
                (!std::mem::replace(&mut ring.writing, true)).then(|| Ok(ring.take_group()))
            });
            match next.await {
                Ok(group) => self.write(group).await,
                Err(result) => return result,
            }
        }
    }

    async fn write(&self, group: Group) {
        let mut writing = Writing {
            core: &self.core,
            group: Some(group),
        };
        let result = match &writing.group {
            Some(group) => self.write_copies(group).await,
            None => Ok(()),
        };
        writing.ended(result);
    }

    async fn write_copies(&self, group: &Group) -> Result<(), LogError> {
        let Some(buffer) = &group.buffer else {
            return Ok(());
        };
        let copies = self.copies.borrow().clone();
        if copies.is_empty() {
            let Identity { volume, section } = self.shape.identity;
            return Err(LogError::NoCopy { volume, section });
        }
        let at = group.start % self.blocks * BLOCK as u64;
        debug_assert!(
            at + group.used as u64 <= self.blocks * BLOCK as u64,
            "a group leaves the ring"
        );
        let write = |copy: LogCopy<D>| async move {
            let offset = copy.start + at;
            let written =
                bytes::write_start(&*copy.device, offset, buffer, group.used, Durability::Durable).await;
            written.map_err(|source| (copy.id, copy.failure(source)))
        };
        for result in join_all(copies.into_iter().map(write)).await {
            if let Err((id, error)) = result {
                cover!("parity log: a copy failed");
                // One that was taken out meanwhile does not matter.
                if self.copies.borrow().iter().any(|copy| copy.id == id) {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Makes a copy blank, durably.
async fn clear<D: BlockDevice>(copy: &LogCopy<D>, length: u64) -> Result<(), LogError> {
    let zeroed = copy
        .device
        .write_zeroes(copy.start, length, ZeroMode::KeepAllocated);
    zeroed.await.map_err(|source| copy.failure(source))?;
    copy.device.flush().await.map_err(|source| copy.failure(source))
}

/// The write of a group. If it ends early, the group is written again by another one.
struct Writing<'a> {
    core: &'a Core,
    group: Option<Group>,
}

impl Writing<'_> {
    fn ended(&mut self, result: Result<(), LogError>) {
        let Some(group) = self.group.take() else {
            return;
        };
        let mut ring = self.core.ring.borrow_mut();
        match result {
            Ok(()) => ring.written(group),
            Err(error) => ring.not_written(&group, &error),
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        {
            let mut ring = self.core.ring.borrow_mut();
            ring.writing = false;
            if let Some(group) = self.group.take() {
                cover!("parity log: a group is written again");
                ring.interrupted = Some(group);
            }
        }
        self.core.changed.open();
    }
}

/// The right to move the tail.
struct Advancing<'a> {
    core: &'a Core,
}

impl Drop for Advancing<'_> {
    fn drop(&mut self) {
        self.core.ring.borrow_mut().advancing = false;
        self.core.changed.open();
    }
}

/// A copy that is taken out again unless it comes to hold everything.
struct Joining<'a, D: BlockDevice + 'static> {
    log: &'a ParityLog<D>,
    device: Option<DeviceId>,
}

impl<D: BlockDevice + 'static> Drop for Joining<'_, D> {
    fn drop(&mut self) {
        if let Some(device) = self.device {
            self.log.copies.borrow_mut().retain(|copy| copy.id != device);
        }
    }
}
