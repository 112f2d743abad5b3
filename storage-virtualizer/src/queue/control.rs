//! How a device talks to a running server of one of its queues.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use vmm_sys_util::eventfd::EventFd;

/// What a server that stops does with requests that have not gone to the disk: it is stopped or its rate is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Waiting {
    /// They are not answered. Whoever serves the queue next finds them in [`Outcome::abandoned`].
    Abandon = 1,
    /// They are answered: done at once if only their rate is limited, failed if the disk is stopped.
    Finish = 2,
}

/// How a server left its queue.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The next entry of the available ring to be taken.
    pub(crate) next_avail: u16,
    /// Chains that were taken and not answered.
    pub(crate) abandoned: Vec<u16>,
}

/// How the device talks to a running server, from any thread.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// A [`Waiting`], or 0 while the server runs.
    stop: AtomicU8,
    waker: Mutex<Option<Waker>>,
    call_changed: AtomicBool,
    call: Mutex<Option<EventFd>>,
    done: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    ended: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Take no further requests, end when those in flight have ended.
    pub(crate) fn stop(&self, waiting: Waiting) {
        // What was said first stays.
        let _ = self
            .stop
            .compare_exchange(0, waiting as u8, Ordering::SeqCst, Ordering::SeqCst);
        self.wake();
    }

    /// Interrupt the driver by another eventfd from now on, and once at once: what the old one said may not have been heard.
    pub(crate) fn set_call(&self, call: EventFd) {
        *lock(&self.call) = Some(call);
        self.call_changed.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Has the server look around.
    pub(crate) fn wake(&self) {
        let waker = lock(&self.waker).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether guest memory is not touched any more.
    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until guest memory is not touched any more. For threads of a transport, not for tasks.
    pub(crate) fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        while !self.is_done() {
            outcome = self.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        outcome.clone().unwrap_or_default()
    }

    pub(super) fn stopping(&self) -> Option<Waiting> {
        match self.stop.load(Ordering::SeqCst) {
            0 => None,
            2 => Some(Waiting::Finish),
            _ => Some(Waiting::Abandon),
        }
    }

    pub(super) fn has_new_call(&self) -> bool {
        self.call_changed.load(Ordering::Relaxed)
    }

    pub(super) fn take_call(&self) -> Option<EventFd> {
        self.call_changed.store(false, Ordering::SeqCst);
        lock(&self.call).take()
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
    }

    pub(super) fn set_outcome(&self, outcome: Outcome) {
        *lock(&self.outcome) = Some(outcome);
    }
}

/// Says that a server is gone, however it went.
pub(crate) struct Done(pub(crate) Arc<Control>);

impl Drop for Done {
    fn drop(&mut self) {
        let _outcome = lock(&self.0.outcome);
        self.0.done.store(true, Ordering::Release);
        self.0.ended.notify_all();
    }
}
