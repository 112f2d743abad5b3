//! Mutual exclusion of writes on devices where a small write is a read-modify-write of a larger block.
//!
//! Writes of whole blocks need no exclusion from each other, only from those of parts of blocks, which are rare: guests write
//! sectors when they make a partition table. So whole writes are only counted while no part is written or about to be; whoever
//! writes a part closes that way first, waits for those that were counted, and then everybody holds ranges.
//!
//! ```text
//!            begin_whole                    hold(Part): closes          last part is let go: opens
//!   open ────────────────► counted … ended ──────────────► closed ────────────────────────────────► open
//!                                                          hold(Whole), hold(Part): ranges in a list
//! ```

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// In [`RangeLock::whole`]: somebody writes parts of blocks, or is about to.
const CLOSED: u64 = 1 << 63;

/// What a range is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Whole blocks are written.
    Whole,
    /// A part of the first or the last block is written: both are read before.
    Part,
}

/// Ranges that are held, and who waits.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    /// How many whole writes were counted and have not ended; [`CLOSED`] beside.
    whole: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<(u64, u64)>,
    /// Those who hold a range for a part, or wait for one.
    parts: usize,
    waiters: Vec<Waker>,
}

/// A write of whole blocks that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Counted<'a>(&'a RangeLock);

/// A range that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    lock: &'a RangeLock,
    extent: Extent,
    /// None while it is waited for.
    range: Option<(u64, u64)>,
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write of whole blocks may begin at once, without holding its range; or it must hold it.
    #[inline]
    pub(super) fn begin_whole(&self) -> Option<Counted<'_>> {
        let before = self.whole.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(self);
        (before & CLOSED == 0).then_some(counted)
    }

    /// Waits until nobody holds a byte from `start` to before `end`, then holds them.
    pub(super) async fn hold(&self, start: u64, end: u64, extent: Extent) -> Held<'_> {
        let mut held = Held {
            lock: self,
            extent,
            range: None,
        };
        if extent == Extent::Part {
            let mut state = self.state();
            state.parts += 1;
            self.whole.fetch_or(CLOSED, Ordering::SeqCst);
        }
        poll_fn(|context| {
            let mut state = self.state();
            let uncounted = extent == Extent::Whole || self.whole.load(Ordering::SeqCst) == CLOSED;
            if !uncounted || state.held.iter().any(|(from, to)| *from < end && start < *to) {
                state.waiters.push(context.waker().clone());
                return Poll::Pending;
            }
            state.held.push((start, end));
            Poll::Ready(())
        })
        .await;
        held.range = Some((start, end));
        held
    }
}

impl Drop for Counted<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.0.whole.fetch_sub(1, Ordering::SeqCst) == CLOSED + 1 {
            let waiters = std::mem::take(&mut self.0.state().waiters);
            waiters.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.lock.state();
            if let Some(range) = self.range
                && let Some(place) = state.held.iter().position(|held| *held == range)
            {
                state.held.swap_remove(place);
            }
            if self.extent == Extent::Part {
                state.parts -= 1;
                if state.parts == 0 {
                    self.lock.whole.fetch_and(!CLOSED, Ordering::SeqCst);
                }
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
        let Poll::Ready(first) = pin!(lock.hold(0, 4096, Extent::Part)).poll(&mut context) else {
            panic!("it is free")
        };
        let other = pin!(lock.hold(4096, 8192, Extent::Part)).poll(&mut context);
        assert!(other.is_ready());
        let mut second = pin!(lock.hold(4095, 4097, Extent::Whole));
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(second.as_mut().poll(&mut context).is_pending(), "4096 is held");
        drop(other);
        assert!(second.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn a_part_waits_for_whole_writes_and_keeps_new_ones_out() {
        let lock = RangeLock::default();
        let mut context = Context::from_waker(Waker::noop());
        let (first, second) = (lock.begin_whole(), lock.begin_whole());
        assert!(first.is_some() && second.is_some(), "nothing keeps them out");
        let mut part = pin!(lock.hold(0, 4096, Extent::Part));
        assert!(part.as_mut().poll(&mut context).is_pending());
        assert!(lock.begin_whole().is_none(), "a part is about to be written");
        drop(first);
        assert!(part.as_mut().poll(&mut context).is_pending());
        drop(second);
        let Poll::Ready(part) = part.as_mut().poll(&mut context) else {
            panic!("nobody writes")
        };
        assert!(lock.begin_whole().is_none(), "a part is being written");
        let mut whole = pin!(lock.hold(0, 4096, Extent::Whole));
        assert!(whole.as_mut().poll(&mut context).is_pending());
        drop(part);
        assert!(whole.as_mut().poll(&mut context).is_ready());
        assert!(lock.begin_whole().is_some(), "no part is written");
    }

    #[test]
    fn a_part_that_is_given_up_lets_whole_writes_in_again() {
        let lock = RangeLock::default();
        let mut context = Context::from_waker(Waker::noop());
        let counted = lock.begin_whole();
        {
            let mut part = pin!(lock.hold(0, 4096, Extent::Part));
            assert!(part.as_mut().poll(&mut context).is_pending());
        }
        assert!(lock.begin_whole().is_some(), "nobody wants to write a part");
        drop(counted);
    }
}
