//! Commands in flight, by address and tag, and what task management does with them (SAM-5 §7).
//!
//! Nobody can take a command back that the disk is doing. So a task management function has *ended* what it concerns when that
//! has ended by itself: it waits. A command that has not gone to the disk, since the disk is stopped or its rate limited,
//! ends at once. The function's answer comes after those of all commands that it concerned.
//!
//! ```text
//!   control queue's worker                       workers of the request queues
//!     Sweep ──► inbox of each queue ──► server looks at its tasks: marks those that are concerned
//!       ▲                                                    │
//!       └──────────── count reaches zero ◄── each that ends ─┘
//! ```

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use crate::scsi::decode_lun;

/// Which commands a function concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Concern {
    /// One.
    Task { address: [u8; 8], tag: u64 },
    /// All of a logical unit.
    Unit { address: [u8; 8] },
    /// All of a target.
    Target { target: u8 },
}

impl Concern {
    fn has(&self, address: [u8; 8], tag: u64) -> bool {
        match self {
            Self::Task {
                address: unit,
                tag: task,
            } => address == *unit && tag == *task,
            Self::Unit { address: unit } => means(address) == means(*unit),
            Self::Target { target } => address[1] == *target,
        }
    }
}

/// Target and LUN: an address can be written in several ways.
fn means(address: [u8; 8]) -> ([u8; 2], Option<u16>) {
    let [channel, target, high, low, ..] = address;
    ([channel, target], decode_lun([high, low, 0, 0, 0, 0, 0, 0]))
}

/// A function that waits for the commands that it concerns.
#[derive(Debug)]
pub(super) struct Sweep {
    concern: Concern,
    /// Whether the commands end; else it is only asked whether there are any.
    ends: bool,
    /// Commands, and queues that have not looked yet.
    left: AtomicUsize,
    /// It has concerned a command.
    found: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Sweep {
    /// A sweep over `queues` queues.
    pub(super) fn new(concern: Concern, ends: bool, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            concern,
            ends,
            left: AtomicUsize::new(queues),
            found: AtomicBool::new(false),
            waker: Mutex::default(),
        })
    }

    /// Whether there was a command that it concerned.
    pub(super) fn found(&self) -> bool {
        self.found.load(Ordering::Relaxed)
    }

    /// A queue need not look: nobody serves it. Or a command has ended.
    pub(super) fn done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake();
        }
    }

    /// Has whoever waits look again.
    pub(super) fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until everything that it concerns has ended, or `gives_up` says so: false.
    pub(super) async fn ended(&self, gives_up: impl Fn() -> bool) -> bool {
        poll_fn(|context| {
            *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
            match self.left.load(Ordering::Acquire) {
                0 => Poll::Ready(true),
                _ if gives_up() => Poll::Ready(false),
                _ => Poll::Pending,
            }
        })
        .await
    }
}

/// Where the functions for one queue arrive; for all threads.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    is_full: AtomicBool,
    sweeps: Mutex<Vec<Arc<Sweep>>>,
}

impl Inbox {
    pub(super) fn put(&self, sweep: Arc<Sweep>) {
        self.sweeps
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sweep);
        self.is_full.store(true, Ordering::Release);
    }

    pub(super) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Acquire)
    }

    pub(super) fn take(&self) -> Vec<Arc<Sweep>> {
        self.is_full.store(false, Ordering::Release);
        std::mem::take(&mut *self.sweeps.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A command in flight.
#[derive(Debug, Default)]
struct Task {
    address: [u8; 8],
    tag: u64,
    is_active: bool,
    is_ended: bool,
    /// Functions that wait for it.
    sweeps: Vec<Arc<Sweep>>,
}

/// The commands of one queue.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    tasks: RefCell<Vec<Task>>,
    free: RefCell<Vec<usize>>,
}

impl Tasks {
    /// Notes a command; returns its place. Once as many were in flight as ever are, this allocates nothing.
    pub(super) fn begin(&self, address: [u8; 8], tag: u64) -> usize {
        let mut tasks = self.tasks.borrow_mut();
        let place = self.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(Task::default());
            tasks.len() - 1
        });
        let task = &mut tasks[place];
        (task.address, task.tag, task.is_active, task.is_ended) = (address, tag, true, false);
        place
    }

    /// The command has ended; returns the functions that wait for it, to be told once its answer can be seen.
    #[must_use]
    pub(super) fn end(&self, place: usize) -> Vec<Arc<Sweep>> {
        let task = &mut self.tasks.borrow_mut()[place];
        task.is_active = false;
        self.free.borrow_mut().push(place);
        std::mem::take(&mut task.sweeps)
    }

    /// Whether task management has ended the command: it must not go to the disk any more.
    pub(super) fn is_ended(&self, place: usize) -> bool {
        self.tasks.borrow()[place].is_ended
    }

    /// Marks the commands that a function concerns.
    pub(super) fn sweep(&self, sweep: &Arc<Sweep>) {
        let mut tasks = self.tasks.borrow_mut();
        for task in tasks.iter_mut().filter(|task| task.is_active) {
            if sweep.concern.has(task.address, task.tag) {
                sweep.found.store(true, Ordering::Relaxed);
                if sweep.ends {
                    task.is_ended = true;
                    sweep.left.fetch_add(1, Ordering::AcqRel);
                    task.sweeps.push(Arc::clone(sweep));
                }
            }
        }
        sweep.done();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: [u8; 8] = [1, 0, 0x40, 0, 0, 0, 0, 0];
    const OTHER: [u8; 8] = [1, 0, 0x40, 1, 0, 0, 0, 0];

    #[test]
    fn a_function_ends_with_the_last_command_that_it_concerns() {
        let tasks = Tasks::default();
        let places = [(UNIT, 1), (UNIT, 2), (OTHER, 1)].map(|(unit, tag)| tasks.begin(unit, tag));
        let sweep = Sweep::new(Concern::Unit { address: UNIT }, true, 1);
        let left = || sweep.left.load(Ordering::Relaxed);
        let end = |place| tasks.end(place).iter().for_each(|sweep| sweep.done());
        tasks.sweep(&sweep);
        assert_eq!((left(), sweep.found()), (2, true));
        assert_eq!(places.map(|place| tasks.is_ended(place)), [true, true, false]);
        end(places[0]);
        end(places[2]);
        assert_eq!(left(), 1);
        end(places[1]);
        assert_eq!(left(), 0);
        // A place is used again, and begins anew.
        assert_eq!(tasks.begin(UNIT, 3), places[1]);
        assert!(!tasks.is_ended(places[1]));
    }

    #[test]
    fn a_query_finds_a_command_and_does_not_end_it() {
        let tasks = Tasks::default();
        let place = tasks.begin(UNIT, 7);
        let concern = |tag| Concern::Task { address: UNIT, tag };
        for (tag, found) in [(7, true), (8, false)] {
            let sweep = Sweep::new(concern(tag), false, 1);
            tasks.sweep(&sweep);
            assert_eq!(sweep.found(), found);
        }
        assert!(!tasks.is_ended(place));
    }
}
