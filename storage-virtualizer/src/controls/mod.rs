//! What can be set for a disk while guests use it: limits of its rate, what happens when it fails, polling.
//!
//! The owner of a disk makes one [`DiskControls`] and gives it to every device and server that shows the disk
//! (as `VirtioBlkOptions::controls` does). A request looks at one word to see that nothing of this concerns it.

mod rate;

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use block_io::IoError;

use crate::queue::recorder::Recorder;
use crate::queue::{Counters, QueueStatistics};

pub use rate::{Rate, RateLimit, RateLimiter};

use rate::Ticket;

/// What happens when the disk fails a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorPolicy {
    /// The guest is told.
    #[default]
    Report,
    /// The disk stops: this request and all later ones wait until [`DiskControls::resume`], and are tried again then. For
    /// failures that someone can mend, such as a full pool.
    Stop,
}

/// What the owner of a disk is told. Called on the disk's worker; must not block.
pub trait DiskEvents: Send + Sync {
    /// The disk stopped because of `error`; requests wait. Told once until it is resumed.
    fn stopped(&self, error: &IoError);
}

const LIMITED: u32 = 1;
const GROUP: u32 = 1 << 1;
const STOPPED: u32 = 1 << 2;
const STOPS_ON_ERROR: u32 = 1 << 3;
/// Bits that a request must look into before it goes to the disk.
const GATE: u32 = LIMITED | GROUP | STOPPED;

/// The settings of one disk.
pub struct DiskControls {
    flags: AtomicU32,
    poll_micros: AtomicU32,
    limiter: RateLimiter,
    group: Option<Arc<RateLimiter>>,
    events: Option<Box<dyn DiskEvents>>,
    /// Servers that wait for [`Self::resume`].
    waiting: Mutex<Vec<Waker>>,
    /// What the queues of the device that shows the disk have done.
    statistics: Mutex<Vec<Arc<QueueStatistics>>>,
    recorder: Arc<Recorder>,
}

impl Default for DiskControls {
    fn default() -> Self {
        Self {
            flags: AtomicU32::default(),
            poll_micros: AtomicU32::default(),
            limiter: RateLimiter::default(),
            group: None,
            events: None,
            waiting: Mutex::default(),
            statistics: Mutex::default(),
            recorder: Recorder::new(),
        }
    }
}

impl fmt::Debug for DiskControls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DiskControls")
            .field(
                "flags",
                &format_args!("{:#x}", self.flags.load(Ordering::Relaxed)),
            )
            .field("limiter", &self.limiter)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl DiskControls {
    /// Controls of a disk that shares the limits of `group` with others, and whose owner hears of it by `events`.
    pub fn new(group: Option<Arc<RateLimiter>>, events: Option<Box<dyn DiskEvents>>) -> Self {
        Self {
            flags: AtomicU32::new(if group.is_some() { GROUP } else { 0 }),
            group,
            events,
            ..Self::default()
        }
    }

    /// Changes the limits of this disk alone, also for requests that wait already (within 50 ms).
    pub fn set_limit(&self, limit: RateLimit) {
        self.limiter.set(limit);
        self.put(LIMITED, self.limiter.is_active());
    }

    /// Says what happens when the disk fails a request from now on.
    pub fn set_error_policy(&self, policy: ErrorPolicy) {
        self.put(STOPS_ON_ERROR, policy == ErrorPolicy::Stop);
    }

    /// Has the disk's workers look for further requests for at most this long before they sleep, as long as that pays. What is
    /// beyond an hour is an hour.
    pub fn set_polling(&self, longest: Duration) {
        let micros = u32::try_from(longest.as_micros())
            .unwrap_or(u32::MAX)
            .min(3_600_000_000);
        self.poll_micros.store(micros, Ordering::Relaxed);
    }

    /// Whether requests wait because the disk failed.
    pub fn is_stopped(&self) -> bool {
        self.flags.load(Ordering::SeqCst) & STOPPED != 0
    }

    /// Has the requests that wait tried again.
    pub fn resume(&self) {
        self.put(STOPPED, false);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.into_iter().for_each(Waker::wake);
    }

    /// What the queues of the device that shows the disk alone have done, one entry for each; none if that is a SCSI adapter, whose
    /// queues are for all its disks.
    pub fn counters(&self) -> Vec<Counters> {
        let statistics = self.statistics.lock().unwrap_or_else(PoisonError::into_inner);
        statistics.iter().map(|queue| queue.counters()).collect()
    }

    /// The last requests of the disk, by whatever device or server that has these controls.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// A device with these queues shows the disk from now on.
    pub(crate) fn set_statistics(&self, queues: &[Arc<QueueStatistics>]) {
        *self.statistics.lock().unwrap_or_else(PoisonError::into_inner) = queues.to_vec();
    }

    fn put(&self, flag: u32, value: bool) {
        if value {
            self.flags.fetch_or(flag, Ordering::SeqCst);
        } else {
            self.flags.fetch_and(!flag, Ordering::SeqCst);
        }
    }

    pub(crate) fn polling(&self) -> Duration {
        Duration::from_micros(self.poll_micros.load(Ordering::Relaxed).into())
    }

    /// Whether a request must look further before it goes to the disk.
    pub(crate) fn gates(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & GATE != 0
    }

    /// The disk failed: whether the request waits instead of being answered.
    pub(crate) fn stops_on(&self, error: &IoError) -> bool {
        if self.flags.load(Ordering::Relaxed) & STOPS_ON_ERROR == 0 {
            return false;
        }
        if self.flags.fetch_or(STOPPED, Ordering::SeqCst) & STOPPED == 0
            && let Some(events) = &self.events
        {
            events.stopped(error);
        }
        true
    }

    /// `waker` is woken by the next [`Self::resume`].
    pub(crate) fn await_resume(&self, waker: Waker) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|kept| kept.will_wake(&waker)) {
            waiting.push(waker);
        }
    }

    /// Gets in line at the limits that there are.
    pub(crate) fn take(&self, bytes: u64) -> [Option<Ticket>; 2] {
        let now = Instant::now();
        self.limiters()
            .map(|limiter| limiter.map(|limiter| limiter.take(bytes, now)))
    }

    pub(crate) fn wait(&self, tickets: [Option<Ticket>; 2]) -> Duration {
        let now = Instant::now();
        self.limiters()
            .into_iter()
            .zip(tickets)
            .filter_map(|(limiter, ticket)| Some(limiter?.wait(ticket?, now)))
            .max()
            .unwrap_or_default()
    }

    fn limiters(&self) -> [Option<&RateLimiter>; 2] {
        [Some(&self.limiter), self.group.as_deref()]
            .map(|limiter| limiter.filter(|limiter| limiter.is_active()))
    }
}
