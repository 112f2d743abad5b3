//! Who may touch which bytes of a volume: writes exclude overlapping writes, and copying excludes both.
//!
//! Fair: a request waits for those before it that overlap it, so a copy is not starved by a busy guest nor the guest by
//! a copy. Single-threaded, as everything here.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

#[derive(Debug)]
struct Claim {
    id: u64,
    start: u64,
    end: u64,
    /// Of one that waits.
    waker: Option<Waker>,
}

/// Claims on the ranges of one volume, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    claims: RefCell<Vec<Claim>>,
    next: Cell<u64>,
}

/// A range that is held, or waited for, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    ranges: &'a Ranges,
    id: u64,
}

impl Ranges {
    /// Waits until nobody who came earlier holds or wants a byte from `start` to before `end`, then holds them.
    pub(crate) async fn hold(&self, start: u64, end: u64) -> Held<'_> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.claims.borrow_mut().push(Claim {
            id,
            start,
            end,
            waker: None,
        });
        // Made before the first wait, so that a future that is dropped takes its claim along.
        let held = Held { ranges: self, id };
        poll_fn(|context| {
            let mut claims = self.claims.borrow_mut();
            let before = claims.iter().take_while(|claim| claim.id != id);
            let blocked = before
                .into_iter()
                .any(|claim| claim.start < end && start < claim.end);
            if !blocked {
                return Poll::Ready(());
            }
            if let Some(own) = claims.iter_mut().find(|claim| claim.id == id) {
                own.waker = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
        held
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut woken = Vec::new();
        {
            let mut claims = self.ranges.claims.borrow_mut();
            let Some(place) = claims.iter().position(|claim| claim.id == self.id) else {
                return;
            };
            let gone = claims.remove(place);
            for later in claims.iter_mut().skip(place) {
                if later.start < gone.end && gone.start < later.end {
                    woken.extend(later.waker.take());
                }
            }
        }
        woken.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<'a>(future: Pin<&mut impl Future<Output = Held<'a>>>) -> Option<Held<'a>> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(held) => Some(held),
            Poll::Pending => None,
        }
    }

    #[test]
    fn who_overlaps_an_earlier_claim_waits_even_if_that_one_waits_itself() {
        let ranges = Ranges::default();
        let mut first = pin!(ranges.hold(0, 4096));
        let mut second = pin!(ranges.hold(2048, 8192));
        let mut third = pin!(ranges.hold(4096, 4097));
        let mut apart = pin!(ranges.hold(8192, 9000));
        let held = poll(first.as_mut()).unwrap();
        assert!(poll(second.as_mut()).is_none());
        assert!(poll(third.as_mut()).is_none(), "it must not overtake the second");
        assert!(poll(apart.as_mut()).is_some());
        drop(held);
        let held = poll(second.as_mut()).unwrap();
        assert!(poll(third.as_mut()).is_none());
        drop(held);
        assert!(poll(third.as_mut()).is_some());
    }

    #[test]
    fn who_gives_up_waiting_is_not_waited_for() {
        let ranges = Ranges::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut first = Box::pin(ranges.hold(0, 10));
        let Poll::Ready(_held) = first.as_mut().poll(&mut context) else {
            panic!("free")
        };
        let mut second = Box::pin(ranges.hold(5, 20));
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(second);
        let mut third = pin!(ranges.hold(10, 20));
        assert!(third.as_mut().poll(&mut context).is_ready());
    }
}
