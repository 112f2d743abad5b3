//! Several paths to one device: two device nodes of one disk, two addresses of one NBD export.
//!
//! One path is *active* and gets all requests. When a request fails because of its path ([`crate::IoError::is_transport`], or
//! EIO while a probe fails here and succeeds on another path), the path is *down*, the next one becomes active, and the
//! request is repeated there. A path that is down is probed with growing pauses, and is a candidate again when a read
//! succeeds. When all are down, requests wait; after [`MultiPathOptions::patience`] they fail, as do new ones, with an error
//! that is itself one of transport.
//!
//! # What was written over a path that is gone
//! With [`MultiPathOptions::unflushed_limit`] other than 0, the paths may end in different caches (two NBD servers, or one
//! that was restarted): a write that completed on one path may be lost with it. Such writes are remembered until a flush,
//! and written again on the next path before it is used. While that happens the *epoch* changes: a write or flush that
//! began before and succeeds on the old path afterwards proves nothing and is repeated, else an older write that is
//! written again could replace a newer one. The devices below must not do the same on their own
//! ([`crate::NbdOptions::unflushed_limit`] = 0), and must fail at least one request when a connection with unflushed writes
//! was lost, however soon there is a new one.
//!
//! With 0, the paths lead to one cache that survives any of them: a disk with two ports.

mod select;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::buffer::{AlignedBuffer, IoBuf, list};
use crate::clock::{Clock, WorkerClock};
use crate::cover;
use crate::device::{BlockDevice, Durability, Geometry, ZeroMode};
use crate::error::{IoCause, IoError, Operation};

use select::State;

/// How to use paths.
#[derive(Debug, Clone)]
pub struct MultiPathOptions {
    /// How long requests wait when all paths are down.
    pub patience: Duration,
    /// First pause before a path that is down is probed.
    pub first_pause: Duration,
    /// Longest pause between probes.
    pub longest_pause: Duration,
    /// Bytes of completed writes that are remembered until they are flushed; 0 if all paths lead to one cache.
    pub unflushed_limit: u64,
}

impl Default for MultiPathOptions {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(30),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
            unflushed_limit: 8 << 20,
        }
    }
}

/// Paths that cannot be used together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MultiPathError {
    /// There is none.
    #[error("no path to the device was given")]
    NoPath,
    /// They lead to different devices.
    #[error(
        "the paths {first} and {other} lead to different devices: {what} is {first_has} there and {other_has} here"
    )]
    Different {
        /// Name of the first path.
        first: String,
        /// Name of another one.
        other: String,
        /// What differs.
        what: &'static str,
        /// What the first path says.
        first_has: String,
        /// What the other one says.
        other_has: String,
    },
}

/// All paths are down.
#[derive(Debug, thiserror::Error)]
#[error("all {count} paths are down, the last one failed")]
struct AllDown {
    count: usize,
    source: Arc<IoError>,
}

/// One path.
#[derive(Debug)]
pub struct DevicePath<D> {
    /// The device, as seen over this path.
    pub device: D,
    /// For messages.
    pub name: String,
    /// What no other device has, a serial number or the like, where it is known.
    pub identity: Option<String>,
}

/// A device behind several paths.
///
/// Requests are made by tasks of a [`crate::Worker`], or of the simulator.
#[derive(Debug)]
pub struct MultiPath<D, C = WorkerClock> {
    shared: Arc<Shared<D, C>>,
}

#[derive(Debug)]
struct Shared<D, C> {
    name: Arc<str>,
    paths: Vec<DevicePath<D>>,
    geometry: Geometry,
    clock: C,
    options: MultiPathOptions,
    /// A remembered write could not be written again.
    flush_failed: AtomicBool,
    state: Mutex<State>,
}

impl<D, C> Shared<D, C> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request, so that it can be made again.
#[derive(Clone, Copy)]
enum Request<'a> {
    Read(u64, &'a [IoBuf]),
    Write(u64, &'a [IoBuf], Durability),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, ZeroMode),
}

impl Request<'_> {
    async fn make(self, device: &impl BlockDevice) -> Result<(), IoError> {
        match self {
            Self::Read(offset, buffers) => device.read(offset, buffers).await,
            Self::Write(offset, buffers, durability) => device.write(offset, buffers, durability).await,
            Self::Flush => device.flush().await,
            Self::Discard(offset, length) => device.discard(offset, length).await,
            Self::WriteZeroes(offset, length, mode) => device.write_zeroes(offset, length, mode).await,
        }
    }

    fn describe(self) -> (Operation, u64, u64) {
        match self {
            Self::Read(offset, buffers) => (Operation::Read, offset, list::total_length(buffers)),
            Self::Write(offset, buffers, _) => (Operation::Write, offset, list::total_length(buffers)),
            Self::Flush => (Operation::Flush, 0, 0),
            Self::Discard(offset, length) => (Operation::Discard, offset, length),
            Self::WriteZeroes(offset, length, _) => (Operation::WriteZeroes, offset, length),
        }
    }

    /// Whether its success is worth nothing if the path has changed meanwhile.
    fn is_tied_to_path(self) -> bool {
        !matches!(self, Self::Read(..) | Self::Discard(..))
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> MultiPath<D, C> {
    /// The device behind `paths`; the first is preferred at the start.
    ///
    /// # Errors
    /// There is none, or they differ in size, in what they allow, or in what identifies the device.
    pub fn new(
        paths: Vec<DevicePath<D>>,
        options: MultiPathOptions,
        clock: C,
    ) -> Result<Self, MultiPathError> {
        let first = paths.first().ok_or(MultiPathError::NoPath)?;
        let mut geometry = first.device.geometry();
        for other in &paths[1..] {
            let here = other.device.geometry();
            let differ = |what, first_has: String, other_has: String| {
                Err(MultiPathError::Different {
                    first: first.name.clone(),
                    other: other.name.clone(),
                    what,
                    first_has,
                    other_has,
                })
            };
            if here.size != geometry.size {
                return differ(
                    "the size in bytes",
                    geometry.size.to_string(),
                    here.size.to_string(),
                );
            }
            if here.read_only != geometry.read_only {
                return differ(
                    "read-only",
                    geometry.read_only.to_string(),
                    here.read_only.to_string(),
                );
            }
            if let (Some(one), Some(two)) = (&first.identity, &other.identity)
                && one != two
            {
                return differ("the identity", one.clone(), two.clone());
            }
            geometry.logical_block = geometry.logical_block.max(here.logical_block);
            geometry.physical_block = geometry.physical_block.max(here.physical_block);
            geometry.optimal_io = geometry.optimal_io.max(here.optimal_io);
            geometry.discard_granularity = geometry.discard_granularity.max(here.discard_granularity);
        }
        geometry.size -= geometry.size % u64::from(geometry.logical_block);
        let names: Vec<&str> = paths.iter().map(|path| path.name.as_str()).collect();
        Ok(Self {
            shared: Arc::new(Shared {
                name: names.join(",").into(),
                state: Mutex::new(State::new(paths.len())),
                paths,
                geometry,
                clock,
                options,
                flush_failed: AtomicBool::new(false),
            }),
        })
    }

    /// The names of all paths, for messages.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The devices of all paths, and whether each is up.
    pub fn paths(&self) -> Vec<(&D, bool)> {
        let state = self.shared.lock();
        let devices = self.shared.paths.iter().map(|path| &path.device);
        devices.zip(state.up.iter().copied()).collect()
    }

    /// Whether a write could not be repeated on another path, so that flushes and durable writes are refused.
    pub fn own_flush_has_failed(&self) -> bool {
        self.shared.flush_failed.load(Ordering::Relaxed)
    }

    /// An administrator knows of the failed flush and wants to go on. The devices below have to be asked on their own.
    pub fn acknowledge_own_flush_failure(&self) {
        self.shared.flush_failed.store(false, Ordering::Relaxed);
    }

    fn error(&self, request: Request<'_>, cause: IoCause) -> IoError {
        let (operation, offset, length) = request.describe();
        IoError::new(&self.shared.name, operation, offset, length, cause)
    }

    /// Makes a request on the active path, and on the next one if that fails.
    async fn request(&self, request: Request<'_>) -> Result<(), IoError> {
        let shared = &self.shared;
        let mut failing_since = None;
        loop {
            let (path, epoch) = match select::active(shared).await {
                Ok(chosen) => chosen,
                Err(cause) => return Err(self.error(request, cause)),
            };
            let mark = shared.lock().unflushed.mark();
            match request.make(&shared.paths[path].device).await {
                Ok(()) if self.note(request, epoch, mark) => return Ok(()),
                Ok(()) => cover!("multipath: a success of an old epoch repeated"),
                Err(error) if error.is_transport() || self.is_path_dead(path, &error).await => {
                    cover!("multipath: a request repeated on another path");
                    let now = shared.clock.now();
                    let since = *failing_since.get_or_insert(now);
                    select::failed(shared, path, epoch, error);
                    if now.saturating_sub(since) > shared.options.patience {
                        let cause = shared.lock().all_down();
                        return Err(self.error(request, cause));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Notes what a request that succeeded means for the writes to remember; `false` if it must be repeated.
    fn note(&self, request: Request<'_>, epoch: u64, mark: u64) -> bool {
        if self.shared.options.unflushed_limit == 0 {
            return true;
        }
        let mut state = self.shared.lock();
        if request.is_tied_to_path() && state.epoch != epoch {
            return false;
        }
        let unflushed = &mut state.unflushed;
        match request {
            Request::Read(..) | Request::Discard(..) => {}
            Request::Write(offset, buffers, Durability::Volatile) => unflushed.wrote(offset, buffers),
            Request::Write(offset, buffers, Durability::Durable) => {
                unflushed.wrote_durably(offset, buffers);
            }
            Request::WriteZeroes(offset, length, mode) => unflushed.zeroed(offset, length, mode),
            Request::Flush => unflushed.flushed(mark),
        }
        true
    }

    /// EIO may come from the medium or from the way to it: dead is a path that answers no probe while another one does.
    async fn is_path_dead(&self, path: usize, error: &IoError) -> bool {
        let is_eio = matches!(error.cause(), IoCause::Os(error) if error.raw_os_error() == Some(libc::EIO));
        if !is_eio || select::probe(&self.shared, path).await {
            return false;
        }
        for other in 0..self.shared.paths.len() {
            if other != path && select::probe(&self.shared, other).await {
                return true;
            }
        }
        false
    }

    async fn flush_all(&self) -> Result<(), IoError> {
        let failed = || self.shared.flush_failed.load(Ordering::Relaxed);
        if !failed() {
            self.request(Request::Flush).await?;
            if !failed() {
                return Ok(());
            }
        }
        Err(self.error(Request::Flush, IoCause::EarlierFlushFailed))
    }

    /// Flushes when too much is remembered. The write itself has completed: an error shows again at the next flush, but for
    /// one of transport.
    async fn limit_unflushed(&self) -> Result<(), IoError> {
        let limit = self.shared.options.unflushed_limit;
        let bytes = self.shared.lock().unflushed.bytes();
        if bytes <= limit {
            return Ok(());
        }
        match self.flush_all().await {
            Err(error) if error.is_transport() => Err(error),
            Err(_) => {
                self.shared.flush_failed.store(true, Ordering::Relaxed);
                self.shared.lock().unflushed.clear();
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Reads the first block, which tells whether a path works.
async fn read_first_block(device: &impl BlockDevice) -> bool {
    let geometry = device.geometry();
    if geometry.size == 0 {
        return device.flush().await.is_ok();
    }
    let length = usize::try_from(geometry.logical_block).unwrap_or(4096);
    let buffer = AlignedBuffer::new(length);
    // SAFETY: the buffer lives until the read has ended.
    let piece = [unsafe { buffer.io(0, length) }];
    device.read(0, &piece).await.is_ok()
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> BlockDevice for MultiPath<D, C> {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            ..self.shared.geometry
        }
    }

    fn size(&self) -> u64 {
        let block = u64::from(self.shared.geometry.logical_block);
        let sizes = self.shared.paths.iter().map(|path| path.device.size());
        sizes.min().map_or(0, |size| size - size % block)
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.request(Request::Read(offset, buffers)).await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let request = Request::Write(offset, buffers, durability);
        if durability == Durability::Durable && self.shared.flush_failed.load(Ordering::Relaxed) {
            return Err(self.error(request, IoCause::EarlierFlushFailed));
        }
        self.request(request).await?;
        self.limit_unflushed().await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.flush_all().await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.request(Request::Discard(offset, length)).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.request(Request::WriteZeroes(offset, length, mode)).await?;
        self.limit_unflushed().await
    }
}
