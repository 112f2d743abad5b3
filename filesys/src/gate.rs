//! Waiting for each other on one thread.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, Waker};

/// Where futures wait until something has changed.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    waiting: RefCell<Vec<Waker>>,
}

impl Signal {
    /// Something has changed: all that wait look again.
    pub(crate) fn notify(&self) {
        if self.waiting.borrow().is_empty() {
            return;
        }
        let mut woken = self.waiting.take();
        woken.drain(..).for_each(Waker::wake);
        // The memory is kept: those who wait come again.
        let mut waiting = self.waiting.borrow_mut();
        woken.append(&mut waiting);
        *waiting = woken;
    }

    /// Waits until `ready` has an answer; asks now, and after each [`Self::notify`].
    pub(crate) async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| match ready() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut waiting = self.waiting.borrow_mut();
                if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                    waiting.push(context.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}

/// Buckets of a [`Gate`].
const BUCKETS: usize = 32;

/// Writers of a file share it; who rearranges a part of the file's map has that part alone.
///
/// Parts are pages of the map, thrown together by their number's last bits: two that meet wait for each other without need, which does no
/// harm. Buckets are taken in ascending order, so nobody waits in a circle.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    buckets: [Bucket; BUCKETS],
    changed: Signal,
}

#[derive(Debug, Default)]
struct Bucket {
    shared: Cell<u32>,
    alone: Cell<bool>,
}

/// The right to write to, or to rearrange, parts of a file.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    buckets: u32,
    alone: bool,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        for bucket in self.gate.of(self.buckets) {
            if self.alone {
                bucket.alone.set(false);
            } else {
                bucket.shared.set(bucket.shared.get() - 1);
            }
        }
        self.gate.changed.notify();
    }
}

impl Gate {
    fn of(&self, mut buckets: u32) -> impl Iterator<Item = &Bucket> {
        std::iter::from_fn(move || {
            let bucket = self.buckets.get(buckets.trailing_zeros() as usize)?;
            buckets &= buckets - 1;
            Some(bucket)
        })
    }

    /// The buckets of pages `first..=last`.
    fn buckets(first: u64, last: u64) -> u32 {
        if last - first >= BUCKETS as u64 - 1 {
            return u32::MAX;
        }
        (first..=last).fold(0, |buckets, page| buckets | 1 << (page % BUCKETS as u64))
    }

    /// To write within pages `first..=last`.
    pub(crate) async fn share(&self, first: u64, last: u64) -> Pass<'_> {
        let buckets = Self::buckets(first, last);
        let is_free = || self.of(buckets).all(|bucket| !bucket.alone.get());
        if !is_free() {
            self.changed.until(|| is_free().then_some(())).await;
        }
        for bucket in self.of(buckets) {
            bucket.shared.set(bucket.shared.get() + 1);
        }
        Pass {
            gate: self,
            buckets,
            alone: false,
        }
    }

    /// To rearrange pages `first..=last`: nobody writes there.
    pub(crate) async fn alone(&self, first: u64, last: u64) -> Pass<'_> {
        let wanted = Self::buckets(first, last);
        let mut pass = Pass {
            gate: self,
            buckets: 0,
            alone: true,
        };
        for (number, bucket) in (0_u32..).zip(&self.buckets) {
            if wanted >> number & 1 == 0 {
                continue;
            }
            // New writers wait from now on.
            self.changed
                .until(|| (!bucket.alone.replace(true)).then_some(()))
                .await;
            pass.buckets |= 1 << number;
        }
        self.changed
            .until(|| {
                self.of(wanted)
                    .all(|bucket| bucket.shared.get() == 0)
                    .then_some(())
            })
            .await;
        pass
    }

    /// To freeze the file: nobody writes at all.
    pub(crate) async fn all(&self) -> Pass<'_> {
        self.alone(0, u64::MAX - 1).await
    }
}

/// A future in a list.
pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Runs all and gives their results in order.
pub(crate) async fn all<'a, T>(mut futures: Vec<Boxed<'a, T>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut pending = false;
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => *result = Some(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// Which of two ended first.
#[derive(Debug)]
pub(crate) enum Either<A, B> {
    First(A),
    Second(B),
}

/// Runs both until one ends; the other is dropped.
pub(crate) async fn first<A: Future, B: Future>(one: A, other: B) -> Either<A::Output, B::Output> {
    let (mut one, mut other) = (std::pin::pin!(one), std::pin::pin!(other));
    poll_fn(|context| {
        if let Poll::Ready(output) = one.as_mut().poll(context) {
            return Poll::Ready(Either::First(output));
        }
        other.as_mut().poll(context).map(Either::Second)
    })
    .await
}
