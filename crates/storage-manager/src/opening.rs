//! Opening devices without holding up the worker: a server may take seconds to be reached, or not to be, while other devices
//! of the worker have requests that want to be served.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// What the thread and the task share.
enum State<T> {
    Busy(Option<Waker>),
    Done(T),
    Taken,
}

/// The result of a function that runs on a thread of its own; None if it panicked.
pub(crate) struct Blocking<T>(Arc<Mutex<State<T>>>);

/// Wakes the task whatever becomes of the function.
struct Ending<T>(Arc<Mutex<State<T>>>, Option<T>);

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let next = self.1.take().map_or(State::Taken, State::Done);
        let before = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, next)
        };
        if let State::Busy(Some(waker)) = before {
            waker.wake();
        }
    }
}

/// Runs `function`, which may block, and lets the worker go on meanwhile.
///
/// # Errors
/// There can be no more threads.
pub(crate) fn blocking<T: Send + 'static>(
    function: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<Blocking<T>> {
    let state = Arc::new(Mutex::new(State::Busy(None)));
    let ending = Ending(Arc::clone(&state), None);
    let run = move || {
        // All of it belongs to the thread, and ends with it.
        let mut ending = ending;
        ending.1 = Some(function());
    };
    std::thread::Builder::new()
        .name("open-device".into())
        .spawn(run)?;
    Ok(Blocking(state))
}

impl<T> Future for Blocking<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(result) => Poll::Ready(Some(result)),
            State::Taken => Poll::Ready(None),
            State::Busy(_) => {
                *state = State::Busy(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use block_io::{Worker, WorkerOptions};

    use super::blocking;

    #[test]
    fn results_come_from_other_threads_and_panics_are_none() {
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(|| async {
            let slow = blocking(|| {
                std::thread::sleep(Duration::from_millis(50));
                7
            });
            assert_eq!(blocking(|| 8).unwrap().await, Some(8));
            assert_eq!(slow.unwrap().await, Some(7));
            assert_eq!(blocking(|| panic!("on purpose")).unwrap().await, None::<()>);
        });
    }
}
