//! Waiting for each other on one thread.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, Waker};

/// Where futures wait until something has changed.
#[derive(Debug, Default)]
pub(super) struct Gate {
    waiting: RefCell<Vec<Waker>>,
}

impl Gate {
    /// Something has changed: all that wait look again.
    pub(super) fn open(&self) {
        let waiting = self.waiting.take();
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits until `ready` has an answer; asks now, and whenever the gate was opened.
    pub(super) async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
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

    /// Waits until the gate is opened the next time.
    pub(super) async fn next(&self) {
        let mut polled = false;
        self.until(|| std::mem::replace(&mut polled, true).then_some(()))
            .await;
    }
}

/// Runs all of them at once; the results are in their order.
pub(super) async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<Result<F::Output, Pin<Box<F>>>> =
        futures.into_iter().map(|future| Err(Box::pin(future))).collect();
    poll_fn(|context| {
        let mut all = true;
        for place in &mut running {
            if let Err(future) = place {
                match future.as_mut().poll(context) {
                    Poll::Ready(output) => *place = Ok(output),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(Result::ok).collect()
}
