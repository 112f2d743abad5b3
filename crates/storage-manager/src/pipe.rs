//! A queue between a thread that may block and a task of a worker that must not.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

struct State<T> {
    items: VecDeque<T>,
    /// One side has gone.
    closed: bool,
    task: Option<Waker>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, state: &mut State<T>) {
        self.changed.notify_all();
        if let Some(task) = state.task.take() {
            task.wake();
        }
    }
}

/// One side of the queue; the thread and the task have one each, and either direction is possible. When one is dropped, the other
/// one takes what is left, and then finds the end.
pub(crate) struct Pipe<T>(Arc<Shared<T>>);

impl<T> Drop for Pipe<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.notify(&mut state);
    }
}

/// Both sides of a queue that holds `capacity` items.
pub(crate) fn pipe<T>(capacity: usize) -> (Pipe<T>, Pipe<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            items: VecDeque::new(),
            closed: false,
            task: None,
        }),
        changed: Condvar::new(),
        capacity,
    });
    (Pipe(Arc::clone(&shared)), Pipe(shared))
}

/// Ends a queue from outside.
pub(crate) struct Closer<T>(Arc<Shared<T>>);

impl<T> Closer<T> {
    /// What is in the queue can still be taken; nothing more comes.
    pub(crate) fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        self.0.notify(&mut state);
    }
}

impl<T> Pipe<T> {
    /// Something that can end the queue.
    pub(crate) fn closer(&self) -> Closer<T> {
        Closer(Arc::clone(&self.0))
    }

    /// For the thread: gives an item. The item comes back if the other side has gone.
    pub(crate) fn put(&self, item: T) -> Result<(), T> {
        let mut state = self.0.lock();
        while state.items.len() >= self.0.capacity && !state.closed {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        self.0.notify(&mut state);
        Ok(())
    }

    /// For the thread: takes an item. None at the end.
    pub(crate) fn take(&self) -> Option<T> {
        let mut state = self.0.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                self.0.notify(&mut state);
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For the task: gives an item. The item comes back if the other side has gone.
    pub(crate) async fn send(&self, item: T) -> Result<(), T> {
        let mut item = Some(item);
        poll_fn(|context| {
            let mut state = self.0.lock();
            if !state.closed && state.items.len() >= self.0.capacity {
                state.task = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(match item.take() {
                Some(item) if state.closed => Err(item),
                Some(item) => {
                    state.items.push_back(item);
                    self.0.notify(&mut state);
                    Ok(())
                }
                None => Ok(()),
            })
        })
        .await
    }

    /// For the task: takes an item. None at the end.
    pub(crate) async fn receive(&self) -> Option<T> {
        poll_fn(|context| {
            let mut state = self.0.lock();
            if let Some(item) = state.items.pop_front() {
                self.0.notify(&mut state);
                return Poll::Ready(Some(item));
            }
            if state.closed {
                return Poll::Ready(None);
            }
            state.task = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use block_io::{Worker, WorkerOptions};

    use super::*;

    #[test]
    fn all_items_arrive_in_order_and_the_end_is_seen() {
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        let (there, here) = pipe(2);
        let (answers, answered) = pipe(1000);
        let thread = std::thread::spawn(move || {
            for number in 0..1000 {
                there.put(number).unwrap();
            }
            drop(there);
            let mut sum = 0;
            while let Some(number) = answered.take() {
                sum += number;
            }
            sum
        });
        worker.run(move || async move {
            let mut expected = 0;
            while let Some(number) = here.receive().await {
                assert_eq!(number, expected);
                expected += 1;
                answers.send(number).await.unwrap();
            }
            assert_eq!(expected, 1000);
        });
        assert_eq!(thread.join().unwrap(), 499_500);
    }

    #[test]
    fn who_gives_to_nobody_gets_it_back() {
        let (there, here) = pipe(1);
        drop(here);
        assert_eq!(there.put(7), Err(7));
    }
}
