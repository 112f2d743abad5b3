//! What a worker does when no task can run: look once more at what it polls itself, spin for a while if it was told to, sleep.
//!
//! A virtqueue is memory: whoever looks at it needs no doorbell. So a queue's server leaves the doorbell off while the
//! worker is awake anyway, and turns it on as the last thing before sleep ([`PollSource::prepare_sleep`]). A guest that is
//! busy then rings once for many requests.
//!
//! With [`super::WorkerOptions::busy_poll`], or if a source asks for it, the worker spins before it sleeps, which saves the doorbell, the interrupt of the
//! thread and two context switches per request at low depth, and costs CPU time. How long it spins adapts: not at all after a
//! sleep that was longer than spinning could have been, twice as long as before after a shorter one. So an idle worker sleeps.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use super::local::{Local, with_local};

/// Turns without the kernel, one after the other: a source that always has work must not starve requests.
const MAX_SKIPPED: u32 = 8;
/// Where spinning begins.
const SHORTEST_SPIN: Duration = Duration::from_micros(4);

/// Something in memory that a worker looks at itself.
pub trait PollSource {
    /// For how long at most the worker spins for the sake of this source before it sleeps; may change at any time.
    fn longest_spin(&self) -> Duration {
        Duration::ZERO
    }

    /// If there is work, wakes the task that does it and says `true`. Called often while the worker spins.
    fn poll(&self) -> bool;

    /// The worker is about to sleep: see to it that it is woken when work comes. If there is work already, like
    /// [`Self::poll`].
    fn prepare_sleep(&self) -> bool;
}

/// Has the worker of this thread look at `source` as long as it lives.
pub fn add_poll_source(source: &Rc<dyn PollSource>) {
    let added = with_local(|local| local.rest.sources.borrow_mut().push(Rc::downgrade(source)));
    #[cfg(feature = "sim")]
    if added.is_none() {
        crate::sim::watch::add_source(source);
    }
    #[cfg(not(feature = "sim"))]
    let _ = added;
}

/// A worker's way to rest.
pub(super) struct Rest {
    sources: RefCell<Vec<Weak<dyn PollSource>>>,
    skipped: Cell<u32>,
    longest_spin: Duration,
    spin: Cell<Duration>,
}

impl Rest {
    pub(super) fn new(longest_spin: Duration) -> Self {
        Self {
            sources: RefCell::default(),
            skipped: Cell::new(0),
            longest_spin,
            spin: Cell::default(),
        }
    }

    /// Returns when there may be something to do.
    pub(super) fn rest(&self, local: &Local) {
        if !self.spin.get().is_zero() {
            local.turn(false);
            if local.has_ready() || self.spin(local) {
                return;
            }
        }
        if self.any(|source| source.prepare_sleep()) {
            self.skipped.set(self.skipped.get() + 1);
            if self.skipped.get() >= MAX_SKIPPED {
                self.skipped.set(0);
                local.turn(false);
            }
            return;
        }
        self.skipped.set(0);
        let longest = self.longest_spin();
        if longest.is_zero() {
            local.turn(true);
            self.spin.set(Duration::ZERO);
        } else {
            let start = Instant::now();
            local.turn(true);
            self.adapt(start.elapsed(), longest);
        }
    }

    /// What the worker was told at its start, or the most that a source asks for.
    fn longest_spin(&self) -> Duration {
        let sources = self.sources.borrow();
        let asked = sources
            .iter()
            .filter_map(|source| Some(source.upgrade()?.longest_spin()))
            .max();
        asked.unwrap_or_default().max(self.longest_spin)
    }

    /// Whether there was something to do before the time was up.
    fn spin(&self, local: &Local) -> bool {
        let end = Instant::now() + self.spin.get();
        loop {
            for _ in 0..16 {
                if self.any(|source| source.poll()) || local.is_notified() {
                    return true;
                }
                if local.engine.has_completion() {
                    local.turn(false);
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    fn adapt(&self, slept: Duration, longest: Duration) {
        let spin = if slept > longest {
            Duration::ZERO
        } else {
            (self.spin.get() * 2).clamp(SHORTEST_SPIN.min(longest), longest)
        };
        self.spin.set(spin);
    }

    /// Asks all sources; those that are gone are forgotten.
    fn any(&self, ask: impl Fn(&dyn PollSource) -> bool) -> bool {
        let mut any = false;
        self.sources.borrow_mut().retain(|source| match source.upgrade() {
            Some(source) => {
                any |= ask(&*source);
                true
            }
            None => false,
        });
        any
    }
}
