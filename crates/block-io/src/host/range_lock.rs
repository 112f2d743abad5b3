//! Mutual exclusion of byte ranges: for devices where a small write is a read-modify-write of a larger block.

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Ranges that are held, and who waits.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<(u64, u64)>,
    waiters: Vec<Waker>,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    lock: &'a RangeLock,
    range: (u64, u64),
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody holds a byte from `start` to before `end`, then holds them.
    pub(super) async fn hold(&self, start: u64, end: u64) -> Held<'_> {
        poll_fn(|context| {
            let mut state = self.state();
            if state.held.iter().any(|(from, to)| *from < end && start < *to) {
                state.waiters.push(context.waker().clone());
                return Poll::Pending;
            }
            state.held.push((start, end));
            Poll::Ready(())
        })
        .await;
        Held {
            lock: self,
            range: (start, end),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.lock.state();
            if let Some(place) = state.held.iter().position(|range| *range == self.range) {
                state.held.swap_remove(place);
            }
            std::mem::take(&mut state.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn overlapping_ranges_wait_and_others_do_not() {
        let lock = RangeLock::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(lock.hold(0, 4096)).poll(&mut context) else {
            panic!("it is free")
        };
        assert!(pin!(lock.hold(4096, 8192)).poll(&mut context).is_ready());
        let mut second = pin!(lock.hold(4095, 4097));
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(second.as_mut().poll(&mut context).is_ready());
    }
}
