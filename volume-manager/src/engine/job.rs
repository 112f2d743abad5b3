//! How a long operation is steered while it runs: progress, throttle, priority, pause, cancel.
//!
//! What jobs of different priorities leave to each other is time: while one of a higher priority is at work, a job rests three times as long as each
//! of its pieces took, fifteen times if the other one is two levels above. So it has a quarter of the time, or a sixteenth, whatever its devices
//! can do, and nothing is lost where the other one waits by itself: for its throttle, for its turn, or paused.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use block_io::{BlockDevice, Clock};

use super::core::{Core, Refused};
use super::meter::{Meter, Pace};
use crate::model::{Job, JobState, Priority};

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
    priority: Cell<Priority>,
    /// Its turn has come: it works on its volumes.
    begun: Cell<bool>,
    /// It has done a piece and does not wait for anything but devices; `levels` counts it then.
    at_work: Cell<bool>,
    /// When the piece that is being done began; none before the first.
    piece: Cell<Option<Duration>>,
    levels: Rc<Levels>,
}

/// How many jobs of a pool are at work, by priority.
#[derive(Default)]
pub(crate) struct Levels([Cell<u32>; 3]);

impl Levels {
    fn of(&self, priority: Priority) -> &Cell<u32> {
        &self.0[priority as usize]
    }

    /// How many times as long as it works a job rests, as things are.
    fn rest(&self, priority: Priority) -> u32 {
        let busy = |other: Priority| other > priority && self.of(other).get() > 0;
        match priority {
            Priority::Low if busy(Priority::High) => 15,
            Priority::Low | Priority::Normal if busy(Priority::Normal) || busy(Priority::High) => 3,
            _ => 0,
        }
    }
}

/// Between looks at whether a paused job goes on.
const LOOK: Duration = Duration::from_millis(50);
/// A piece that took longer counts as this: a device that does not answer for a minute is no reason to rest for many.
const LONGEST_PIECE: Duration = Duration::from_secs(1);

impl Control {
    pub(crate) fn new(job: &Job, levels: Rc<Levels>) -> Self {
        Self {
            done: Cell::new(job.done),
            total: Cell::new(job.total),
            worked: Cell::new(0),
            meter: Cell::default(),
            throttle: Cell::new(job.throttle),
            wanted: RefCell::new(job.state.clone()),
            closing: Cell::new(false),
            next: Cell::new(Duration::ZERO),
            priority: Cell::new(job.priority),
            begun: Cell::new(false),
            at_work: Cell::new(false),
            piece: Cell::new(None),
            levels,
        }
    }

    /// Whether its turn has come.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun.get()
    }

    /// Its turn has come.
    pub(crate) fn begin(&self) {
        self.begun.set(true);
    }

    pub(crate) fn priority(&self) -> Priority {
        self.priority.get()
    }

    pub(crate) fn set_priority(&self, priority: Priority) {
        let at_work = self.at_work.get();
        self.be_at_work(false);
        self.priority.set(priority);
        self.be_at_work(at_work);
    }

    fn be_at_work(&self, at_work: bool) {
        let count = self.levels.of(self.priority.get());
        match (self.at_work.replace(at_work), at_work) {
            (false, true) => count.set(count.get() + 1),
            (true, false) => count.set(count.get().saturating_sub(1)),
            _ => {}
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

    /// Counts `bytes` of work, and waits as long as the job is paused, faster than it may be, or has to leave time to others.
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
        let took = self
            .piece
            .get()
            .map_or(Duration::ZERO, |begun| now.saturating_sub(begun));
        let took = if bytes > 0 {
            took.min(LONGEST_PIECE)
        } else {
            Duration::ZERO
        };
        self.wait(clock, now, took).await?;
        self.piece.set(Some(clock.now()));
        self.be_at_work(bytes > 0 || self.at_work.get());
        Ok(())
    }

    /// Waits until the next piece may begin; the last one has ended at `ended` and took `took`.
    async fn wait(&self, clock: &impl Clock, ended: Duration, took: Duration) -> Result<(), Stop> {
        let worked = self.at_work.get();
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
            // What is at work may have changed since the last look.
            let rested = ended + took * self.levels.rest(self.priority.get());
            let wait = self.next.get().max(rested).saturating_sub(now);
            if !paused && wait.is_zero() {
                self.be_at_work(worked);
                return Ok(());
            }
            self.be_at_work(false);
            clock.sleep(if paused { LOOK } else { wait.min(LOOK) }).await;
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.be_at_work(false);
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
