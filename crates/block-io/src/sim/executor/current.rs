//! What belongs to the simulation of a thread: tasks that are spawned from within it, eventfds, poll sources, its clock.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::{Due, Sim, Sleep};
use crate::Clock;
use crate::worker::PollSource;

thread_local! {
    static CURRENT: RefCell<Option<Sim>> = const { RefCell::new(None) };
}

impl Sim {
    /// Makes this the simulation of the thread, until the guard goes.
    pub(in crate::sim) fn enter(&self) -> Entered {
        Entered(CURRENT.replace(Some(self.clone())))
    }
}

pub(super) fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid element, no waiting.
    let count = unsafe { libc::poll(&raw mut poll, 1, 0) };
    count > 0
}

pub(in crate::sim) struct Entered(Option<Sim>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.replace(self.0.take());
    }
}

fn current() -> Option<Sim> {
    CURRENT.with_borrow(Clone::clone)
}

/// [`spawn_local`](crate::spawn_local) for tasks of a simulation.
pub(crate) fn spawn_on_current<F: Future<Output = ()> + 'static>(future: F) -> Result<(), F> {
    match current() {
        Some(sim) => {
            sim.spawn("spawn_local", future);
            Ok(())
        }
        None => Err(future),
    }
}

/// Eventfds and poll sources of tasks of a simulation. They are looked at when all tasks wait, in order of registration:
/// deterministic as long as only tasks of the simulation write them.
pub(crate) mod watch {
    use super::{PollSource, RawFd, Rc, Waker, current, is_readable};

    /// Whether this thread runs a simulation.
    pub(crate) fn is_simulated() -> bool {
        current().is_some()
    }

    /// Whether `fd` can be read; if not, wakes `waker` when it can.
    pub(crate) fn readable(fd: RawFd, waker: &Waker) -> bool {
        let Some(sim) = current() else { return false };
        if is_readable(fd) {
            return true;
        }
        let mut watches = sim.0.watches.borrow_mut();
        watches.retain(|(other, _)| *other != fd);
        watches.push((fd, waker.clone()));
        false
    }

    /// Forgets `fd`, which is about to be closed.
    pub(crate) fn forget(fd: RawFd) {
        if let Some(sim) = current() {
            sim.0.watches.borrow_mut().retain(|(other, _)| *other != fd);
        }
    }

    /// Asks `source` whenever all tasks wait.
    pub(crate) fn add_source(source: &Rc<dyn PollSource>) {
        if let Some(sim) = current() {
            sim.0.sources.borrow_mut().push(Rc::downgrade(source));
        }
    }
}

/// The clock of a [`Sim`]: goes on only when nothing else can happen, or when the seed says so.
#[derive(Debug, Clone)]
pub struct SimClock(pub(super) Sim);

impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.0.now.get())
    }

    async fn sleep(&self, duration: Duration) {
        let core = &self.0.0;
        let id = core.next_id.replace(core.next_id.get() + 1);
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let sleep = Rc::new(Sleep::default());
        let due = core.now.get().saturating_add(nanos);
        core.due
            .borrow_mut()
            .insert((due, id), Due::Sleep(Rc::clone(&sleep)));
        poll_fn(|context| {
            if sleep.over.get() {
                return Poll::Ready(());
            }
            *sleep.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
