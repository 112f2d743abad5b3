//! Commands that wait for something to happen: each for a time of its own, at most.

use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Most commands that wait; others are answered at once.
const MAX_WAITING: usize = 64;

#[derive(Default)]
struct Waiting {
    next: u64,
    /// Number of the wait, its end, who is to be woken.
    wakers: Vec<(u64, Instant, Waker)>,
    closed: bool,
}

/// All that wait.
#[derive(Default)]
pub(crate) struct Waits {
    waiting: Mutex<Waiting>,
    bell: Condvar,
}

impl fmt::Debug for Waits {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Waits").finish_non_exhaustive()
    }
}

impl Waits {
    fn with<R>(&self, change: impl FnOnce(&mut Waiting) -> R) -> R {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has all look again.
    pub(crate) fn wake(&self) {
        let woken = self.with(|waiting| std::mem::take(&mut waiting.wakers));
        woken.into_iter().for_each(|(_, _, waker)| waker.wake());
    }

    /// Nobody waits any more.
    pub(crate) fn close(&self) {
        self.with(|waiting| waiting.closed = true);
        self.bell.notify_all();
        self.wake();
    }

    /// Waits until `look` finds something, but no longer than `patience`; what it found at last.
    pub(crate) async fn until<T>(&self, patience: Duration, look: impl Fn() -> Option<T>) -> Option<T> {
        let end = Instant::now() + patience;
        let number = self.with(|waiting| {
            waiting.next += 1;
            waiting.next
        });
        let wait = Wait { waits: self, number };
        let found = std::future::poll_fn(|context| {
            // Entered before it is looked, so that nothing is missed between.
            let enters = end > Instant::now() && self.enter(number, end, context.waker());
            match look() {
                Some(found) => Poll::Ready(Some(found)),
                None if enters => Poll::Pending,
                None => Poll::Ready(None),
            }
        })
        .await;
        drop(wait);
        found
    }

    fn enter(&self, number: u64, end: Instant, waker: &Waker) -> bool {
        let entered = self.with(|waiting| {
            waiting.wakers.retain(|(other, _, _)| *other != number);
            let room = !waiting.closed && waiting.wakers.len() < MAX_WAITING;
            if room {
                waiting.wakers.push((number, end, waker.clone()));
            }
            room
        });
        self.bell.notify_all();
        entered
    }

    /// Wakes those whose time is over, until closed: the body of a thread.
    pub(crate) fn keep_time(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while !waiting.closed {
            let now = Instant::now();
            let (late, rest) = std::mem::take(&mut waiting.wakers)
                .into_iter()
                .partition(|(_, end, _)| *end <= now);
            waiting.wakers = rest;
            let late: Vec<_> = late;
            if !late.is_empty() {
                drop(waiting);
                late.into_iter().for_each(|(_, _, waker)| waker.wake());
                waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let next = waiting.wakers.iter().map(|(_, end, _)| *end).min();
            waiting = match next {
                Some(end) => {
                    let pause = end.saturating_duration_since(now);
                    let woken = self.bell.wait_timeout(waiting, pause);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.bell.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// One that waits; it is forgotten when this is dropped.
struct Wait<'a> {
    waits: &'a Waits,
    number: u64,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.waits
            .with(|waiting| waiting.wakers.retain(|(number, _, _)| *number != self.number));
    }
}
