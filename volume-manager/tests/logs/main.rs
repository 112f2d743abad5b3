//! The logs of the volumes survive every crash: proofs in the simulator.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bitmap;
mod hostile;
mod hot;
mod parity;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Runs all of them at once.
async fn together<'a, T>(futures: Vec<Pin<Box<dyn Future<Output = T> + 'a>>>) -> Vec<T> {
    let mut running: Vec<_> = futures.into_iter().map(Err).collect();
    poll_fn(|context| {
        let mut all = Poll::Ready(());
        for place in &mut running {
            if let Err(future) = place {
                match future.as_mut().poll(context) {
                    Poll::Ready(output) => *place = Ok(output),
                    Poll::Pending => all = Poll::Pending,
                }
            }
        }
        all
    })
    .await;
    running.into_iter().filter_map(Result::ok).collect()
}
