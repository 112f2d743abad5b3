//! How a long operation is steered while it runs: progress, throttle, pause, cancel.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use block_io::{BlockDevice, Clock};

use super::core::{Core, Refused};
use super::meter::{Meter, Pace};
use crate::model::JobState;

/// Why a job ends or stops before its end.
#[derive(Debug, Clone)]
pub(crate) enum Stop {
    /// A person wants it.
    Cancelled,
    /// The pool is being closed; it goes on at the next open.
    Closing,
    /// It cannot go on; the text says why.
    Failed(String),
}

impl Stop {
    pub(crate) fn because(what: &str, error: &dyn std::error::Error) -> Self {
        Self::Failed(Refused::because(what, error).to_string())
    }
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Self::Failed(refused.to_string())
    }
}

/// A running job's state in memory.
pub(crate) struct Control {
    pub(crate) done: Cell<u64>,
    pub(crate) total: Cell<u64>,
    /// What of that was copied or read since the pool was opened; the rest needed no work.
    worked: Cell<u64>,
    meter: Cell<Meter>,
    /// Bytes per second; 0 for no limit.
    throttle: Cell<u64>,
    wanted: RefCell<JobState>,
    closing: Cell<bool>,
    /// When the next piece may begin.
    next: Cell<Duration>,
}

/// Between looks at whether a paused job goes on.
const LOOK: Duration = Duration::from_millis(50);

impl Control {
    pub(crate) fn new(done: u64, total: u64, throttle: u64, state: JobState) -> Self {
        Self {
            done: Cell::new(done),
            total: Cell::new(total),
            worked: Cell::new(0),
            meter: Cell::default(),
            throttle: Cell::new(throttle),
            wanted: RefCell::new(state),
            closing: Cell::new(false),
            next: Cell::new(Duration::ZERO),
        }
    }

    /// Has it pause, go on, or end.
    pub(crate) fn want(&self, state: JobState) {
        *self.wanted.borrow_mut() = state;
    }

    /// The pool is being closed.
    pub(crate) fn close(&self) {
        self.closing.set(true);
    }

    /// At most so many bytes per second; 0 for no limit.
    pub(crate) fn throttle(&self) -> u64 {
        self.throttle.get()
    }

    /// From now on at most so many bytes per second. What it waited for by the old rate is forgotten.
    pub(crate) fn set_throttle(&self, throttle: u64) {
        self.throttle.set(throttle);
        self.next.set(Duration::ZERO);
    }

    pub(crate) fn pace(&self, now: Duration) -> Pace {
        let done = self.done.get();
        let total = self.total.get().max(done);
        self.meter.get().pace(now, done, self.worked.get(), total)
    }

    /// Counts `bytes` that need no work.
    pub(crate) fn skip(&self, bytes: u64) {
        self.done.set(self.done.get().saturating_add(bytes));
    }

    /// Counts `bytes` of work, and waits as long as the job is paused or faster than it may be.
    pub(crate) async fn progress(&self, clock: &impl Clock, bytes: u64) -> Result<(), Stop> {
        self.done.set(self.done.get().saturating_add(bytes));
        self.worked.set(self.worked.get().saturating_add(bytes));
        let (now, throttle) = (clock.now(), self.throttle.get());
        let mut meter = self.meter.get();
        meter.note(now, self.done.get(), self.worked.get());
        self.meter.set(meter);
        if throttle > 0 {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(throttle);
            let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.next.set(self.next.get().max(now) + pause);
        }
        loop {
            if self.closing.get() {
                return Err(Stop::Closing);
            }
            let paused = match &*self.wanted.borrow() {
                JobState::Cancelled => return Err(Stop::Cancelled),
                JobState::Paused => true,
                _ => false,
            };
            let now = clock.now();
            let wait = self.next.get().saturating_sub(now);
            if !paused && wait.is_zero() {
                return Ok(());
            }
            clock.sleep(if paused { LOOK } else { wait.min(LOOK) }).await;
        }
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Core<D, C> {
    /// Whether the pool is open and working.
    pub(crate) fn go_on(&self) -> Result<(), Stop> {
        if self.closing.get() {
            return Err(Stop::Closing);
        }
        self.check().map_err(Stop::from)
    }
}
