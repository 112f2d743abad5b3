//! A device on another machine, or in another process: an NBD client.
//!
//! ```text
//!   task: read ──┐                        ┌───────── worker ─────────┐
//!   task: write ─┼─► table of requests ──►│ task `requests`: sendmsg │──► socket ──► server
//!   task: flush ─┘     and queue     ◄────│ task `answers`: recv     │◄──
//!                        ▲  ▲             └──────────────────────────┘
//!                        │  └ connector: a thread that connects, repeats, and notices silence
//!                     `Link`, shared by workers; a lock that is held for no longer than one system call
//! ```
//!
//! The specification is the NBD project's `proto.md`: fixed newstyle handshake with `NBD_OPT_GO`, simple and structured
//! replies, flush, FUA, trim, write zeroes, block size constraints. TLS is not supported: use a Unix socket, a private
//! network or a tunnel.
//!
//! # Outages
//! When the connection is lost, requests wait. The connector tries to connect again, at first at once and then with growing
//! pauses. Requests that had no answer are then sent once more, all of which may be executed twice without harm. After
//! [`NbdOptions::patience`] they fail, as do new ones, with an error that is [`crate::IoError::is_transport`]; meanwhile
//! the connector goes on, and when the server is back requests succeed again. A server that has requests and answers none for
//! [`NbdOptions::silence`] is as good as gone. What breaks the protocol ends the connection, and the requests that were
//! sent on it fail at once.
//!
//! # What was written before an outage
//! A server that comes back may be the same process with the same caches, or one on a machine whose power failed: the
//! protocol does not tell, `NBD_FLAG_CAN_MULTI_CONN` does not either. A write that had completed and was not flushed might
//! be gone, and a flush that succeeds afterwards would be a lie. So every such write is remembered, at most about
//! [`NbdOptions::unflushed_limit`] bytes; when there is more, a flush is made unasked. A new connection begins with writing
//! all of that once more, in the order of completion, before any request. A write that then fails makes flushes fail, as
//! [`IoCause::EarlierFlushFailed`]. A server without flush (`NBD_FLAG_SEND_FLUSH`) claims to have no cache and is
//! believed; opening it logs a warning.
//!
//! One thing is beyond a client of NBD: a request on a dead connection that the server has already read, executed after its
//! repetition and after a later write to the same place. Servers finish or drop what they have read when a connection ends;
//! one that is stopped for longer than an outage and then goes on with old requests does harm.

mod address;
mod connector;
mod driver;
mod exchange;
mod handshake;
mod link;
mod lock;
mod proto;
pub mod protocol;
mod ranges;
mod receive;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::buffer::{AlignedBuffer, IoBuf, list};
use crate::device::{BlockDevice, Durability, Geometry, ZeroMode};
use crate::error::{IoCause, IoError, Operation};

pub use address::{NbdAddress, NbdAddressError, NbdServer};

use link::Link;
use proto::{Command, FLAG_FUA, FLAG_NO_HOLE, can};

/// The longest read or write that is made at once; longer ones take several turns.
const LARGEST: u32 = 4 << 20;
/// The same for requests without data.
const LARGEST_WITHOUT_DATA: u32 = 1 << 30;
/// Zeroes that are written at once where the server has nothing better.
const ZEROES: u64 = 1 << 20;

/// How to use an export.
#[derive(Debug, Clone)]
pub struct NbdOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// How long requests wait for a server that is gone.
    pub patience: Duration,
    /// How long a server may take for an answer before its connection counts as lost.
    pub silence: Duration,
    /// Bytes of completed writes that are remembered until they are flushed. With 0 none are: only for owners that do it
    /// themselves, as [`crate::MultiPath`]. Requests then do not outlive the connection, and if one with unflushed writes
    /// is lost, at least one request fails, so that the owner knows.
    pub unflushed_limit: u64,
    /// Take a lock, shared if read-only and else exclusive, so that no two processes of a user on this host use an address by
    /// mistake. The protocol has no locks: others are not noticed.
    pub lock: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            patience: Duration::from_secs(30),
            silence: Duration::from_secs(30),
            unflushed_limit: 8 << 20,
            lock: true,
        }
    }
}

/// What went wrong with a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// Another process of this user has the export.
    #[error("it is in use{}", .holder.as_ref().map(|holder| format!(" by {holder}")).unwrap_or_default())]
    InUse {
        /// Who, where that can be found.
        holder: Option<String>,
    },
    /// There is no connection to be had.
    #[error("cannot connect to the server")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection to the server failed")]
    Io(#[from] io::Error),
    /// The server ended the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server said that it is about to end.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The server has requests and answers none.
    #[error("the server has not answered for {0:?}")]
    Silent(Duration),
    /// Something else listens there.
    #[error("what listens there is no NBD server")]
    NotNbd,
    /// The server lacks something.
    #[error("the server is too old: {0}")]
    TooOld(&'static str),
    /// The server does not have the export.
    #[error("the server has no such export as {export:?}{said}")]
    NoExport {
        /// Name of the export.
        export: String,
        /// What it said, in brackets.
        said: String,
    },
    /// The server does not give the export.
    #[error("the server refuses the export {export:?}: {reason}{said}")]
    Refused {
        /// Name of the export.
        export: String,
        /// What its answer stands for.
        reason: &'static str,
        /// What it said, in brackets.
        said: String,
    },
    /// The server breaks the protocol.
    #[error("the server breaks the NBD protocol: it sent {0}")]
    Violation(&'static str),
    /// The export is smaller than it was.
    #[error("the export shrank from {before} to {now} bytes: it is not the same any more")]
    Shrunk {
        /// Size in bytes when it was open.
        before: u64,
        /// Size in bytes after connecting again.
        now: u64,
    },
    /// The export can do less than it could.
    #[error("the export came back with other abilities or block sizes: close it and open it again")]
    Changed,
}

/// An export of an NBD server, open as a disk.
///
/// Can be shared by workers. Requests are made by tasks of a [`crate::Worker`].
pub struct NbdDevice {
    link: Arc<Link>,
    flags: u16,
    _lock: Option<lock::Lock>,
}

impl std::fmt::Debug for NbdDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NbdDevice")
            .field("name", &self.link.name)
            .finish_non_exhaustive()
    }
}

impl NbdDevice {
    /// Connects to the server and opens the export. Blocks: for tools and set-up, not for tasks.
    ///
    /// # Errors
    /// There is no server, it does not give the export, or another process has it.
    pub fn open(address: &NbdAddress, options: &NbdOptions) -> Result<Self, NbdError> {
        let lock = match options.lock {
            true => lock::take(address, options.read_only)?,
            false => None,
        };
        let patience = options
            .patience
            .clamp(Duration::from_secs(1), Duration::from_secs(10));
        let (socket, export) = connector::connect(address, patience)?;
        let geometry = connector::geometry(&export, options)?;
        if !geometry.read_only && export.flags & can::FLUSH == 0 {
            tracing::warn!(device = %address, "the server has no flush: a completed write is taken for durable");
        }
        let largest = export.maximum_block.min(LARGEST);
        let link = Arc::new(Link::new(
            address.clone(),
            options.clone(),
            geometry,
            largest - largest % geometry.logical_block,
            export,
            socket,
        ));
        connector::start(Arc::clone(&link))?;
        Ok(Self {
            link,
            flags: export.flags,
            _lock: lock,
        })
    }

    /// The address that it was opened with, for messages.
    pub fn name(&self) -> &str {
        &self.link.name
    }

    /// Whether a flush failed, so that flushes and durable writes are refused.
    pub fn flush_has_failed(&self) -> bool {
        self.link.flush_failed.load(Ordering::Relaxed)
    }

    /// An administrator knows of the failed flush and wants to go on.
    pub fn acknowledge_flush_failure(&self) {
        self.link.flush_failed.store(false, Ordering::Relaxed);
    }

    fn can(&self, what: u16) -> bool {
        self.flags & what != 0
    }

    fn error(&self, operation: Operation, offset: u64, length: u64, cause: impl Into<IoCause>) -> IoError {
        IoError::new(&self.link.name, operation, offset, length, cause)
    }

    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let Geometry {
            size,
            logical_block: block,
            read_only,
            ..
        } = self.geometry();
        let cause = if offset.checked_add(length).is_none_or(|end| end > size) {
            IoCause::OutOfRange { size }
        } else if (offset | length) & u64::from(block - 1) != 0 {
            IoCause::Misaligned { block }
        } else if read_only && operation != Operation::Read {
            IoCause::ReadOnly
        } else {
            return Ok(());
        };
        Err(self.error(operation, offset, length, cause))
    }

    /// Makes a request, in as many pieces as the server wants.
    async fn request(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoCause> {
        let largest = match command {
            Command::Read | Command::Write | Command::WriteZeroes => u64::from(self.link.largest),
            _ => {
                let block = self.link.geometry.physical_block;
                u64::from(LARGEST_WITHOUT_DATA - LARGEST_WITHOUT_DATA % block)
            }
        };
        if length <= largest {
            return exchange::exchange(&self.link, command, flags, offset, length, buffers).await;
        }
        let mut done = 0;
        while done < length {
            let now = largest.min(length - done);
            let piece = part(buffers, done, now);
            let made = exchange::exchange(&self.link, command, flags, offset + done, now, &piece);
            made.await?;
            done += now;
        }
        Ok(())
    }

    async fn flush_server(&self) -> Result<(), IoCause> {
        if self.flush_has_failed() {
            return Err(IoCause::EarlierFlushFailed);
        }
        if self.geometry().read_only || !self.can(can::FLUSH) {
            return Ok(());
        }
        let outcome = self.request(Command::Flush, 0, 0, 0, &[]).await;
        if let Err(cause) = &outcome {
            self.failed_flush(cause);
            return outcome;
        }
        // A write that could not be repeated on a new connection: the flush waited for that one.
        match self.flush_has_failed() {
            true => Err(IoCause::EarlierFlushFailed),
            false => Ok(()),
        }
    }

    /// The server's error for a flush may be the only one that it ever gives for lost data. Without a connection nothing is
    /// lost: what is not flushed is remembered.
    fn failed_flush(&self, cause: &IoCause) {
        if !cause.is_transport() {
            self.link.flush_failed.store(true, Ordering::Relaxed);
            self.link.lock().unflushed.clear();
        }
    }

    /// Flushes when too much is remembered; one write at a time does that for all, or every one if that is too slow.
    async fn limit_unflushed(&self) -> Result<(), IoCause> {
        let first = {
            let mut state = self.link.lock();
            let bytes = state.unflushed.bytes();
            let limit = self.link.options.unflushed_limit;
            if bytes <= limit {
                return Ok(());
            }
            if self.flush_has_failed() {
                // There is nothing to be saved any more: flushes fail until somebody looks.
                state.unflushed.clear();
                return Ok(());
            }
            if state.trimming && bytes <= limit.saturating_mul(2) {
                return Ok(());
            }
            !std::mem::replace(&mut state.trimming, true)
        };
        let outcome = self.flush_server().await;
        if first {
            self.link.lock().trimming = false;
        }
        match outcome {
            // The write itself has completed; the next flush says what happened.
            Err(cause) if !cause.is_transport() => Ok(()),
            outcome => outcome,
        }
    }

    async fn write_pieces(
        &self,
        offset: u64,
        length: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> Result<(), IoCause> {
        if durability == Durability::Volatile {
            self.request(Command::Write, 0, offset, length, buffers).await?;
            return self.limit_unflushed().await;
        }
        if self.flush_has_failed() {
            return Err(IoCause::EarlierFlushFailed);
        }
        if !self.can(can::FUA) {
            self.request(Command::Write, 0, offset, length, buffers).await?;
            return self.flush_server().await;
        }
        let outcome = self
            .request(Command::Write, FLAG_FUA, offset, length, buffers)
            .await;
        if let Err(cause @ IoCause::Os(error)) = &outcome
            && error.raw_os_error() == Some(libc::EIO)
        {
            self.failed_flush(cause);
        }
        outcome
    }

    async fn write_real_zeroes(&self, offset: u64, length: u64) -> Result<(), IoCause> {
        let zeroes = AlignedBuffer::new(usize::try_from(length.min(ZEROES)).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < length {
            let now = (length - done).min(ZEROES);
            // SAFETY: the buffer is only read, and outlives the write that is awaited here.
            let piece = [unsafe { zeroes.io(0, usize::try_from(now).unwrap_or(usize::MAX)) }];
            self.write_pieces(offset + done, now, &piece, Durability::Volatile)
                .await?;
            done += now;
        }
        Ok(())
    }
}

/// `length` bytes of the list from byte `start` on.
fn part(buffers: &[IoBuf], start: u64, length: u64) -> Vec<IoBuf> {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let mut pieces = list::after(buffers, start);
    for piece in &mut pieces {
        *piece = piece.slice(0, left);
        left -= piece.len();
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

impl NbdError {
    /// Whether the server, or the export, is not there.
    pub fn is_absence(&self) -> bool {
        match self {
            Self::Connect(error) => !matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput
            ),
            Self::Io(_) | Self::Closed | Self::ShuttingDown | Self::Silent(_) | Self::NoExport { .. } => true,
            _ => false,
        }
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.link.close();
    }
}

impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            ..self.link.geometry
        }
    }

    fn size(&self) -> u64 {
        self.link.size.load(Ordering::Acquire)
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.check(Operation::Read, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let done = self.request(Command::Read, 0, offset, length, buffers).await;
        done.map_err(|cause| self.error(Operation::Read, offset, length, cause))
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.check(Operation::Write, offset, length)?;
        if length == 0 && (durability == Durability::Volatile || !self.flush_has_failed()) {
            return Ok(());
        }
        let done = self.write_pieces(offset, length, buffers, durability).await;
        done.map_err(|cause| self.error(Operation::Write, offset, length, cause))
    }

    async fn flush(&self) -> Result<(), IoError> {
        let done = self.flush_server().await;
        done.map_err(|cause| self.error(Operation::Flush, 0, 0, cause))
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.check(Operation::Discard, offset, length)?;
        if length == 0 || !self.can(can::TRIM) {
            return Ok(());
        }
        let done = self.request(Command::Trim, 0, offset, length, &[]).await;
        done.map_err(|cause| self.error(Operation::Discard, offset, length, cause))
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.check(Operation::WriteZeroes, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let flags = match mode {
            ZeroMode::MayUnmap => 0,
            ZeroMode::KeepAllocated => FLAG_NO_HOLE,
        };
        let done = if self.can(can::WRITE_ZEROES) {
            match self
                .request(Command::WriteZeroes, flags, offset, length, &[])
                .await
            {
                Ok(()) => self.limit_unflushed().await,
                failed => failed,
            }
        } else {
            self.write_real_zeroes(offset, length).await
        };
        done.map_err(|cause| self.error(Operation::WriteZeroes, offset, length, cause))
    }
}
