//! How a server ends: it is told by another thread, which waits; its tasks hear of it; and it waits until all of them are gone.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block_io::{Clock, EventWatch, WorkerClock, spawn_local};
use vmm_sys_util::eventfd::EventFd;

use super::slot;

/// A running server, for any thread. Dropping it tells the server to stop, and waits until everything of it is gone.
#[derive(Debug)]
pub(crate) struct Running {
    /// For the log.
    name: &'static str,
    stop: EventFd,
    /// Hangs up when everything is gone.
    ended: mpsc::Receiver<()>,
}

/// What a server will be told by to stop: made before anything of it runs, so that nothing is left running where the host has none.
#[derive(Debug)]
pub(crate) struct Bell {
    stop: EventFd,
    watch: EventWatch,
}

impl Bell {
    /// # Errors
    /// The host's.
    pub(crate) fn new() -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_CLOEXEC)?;
        let watch = EventWatch::new(stop.try_clone()?)?;
        Ok(Self { stop, watch })
    }
}

impl Running {
    /// Starts the task `end` on the worker whose task calls this. It is given what wakes it when the server shall stop; when it is done,
    /// the server has ended.
    ///
    /// # Errors
    /// No worker.
    pub(crate) fn start<F>(
        name: &'static str,
        Bell { stop, watch }: Bell,
        end: impl FnOnce(EventWatch) -> F,
    ) -> io::Result<Self>
    where
        F: Future<Output = ()> + 'static,
    {
        let task = end(watch);
        let (end, ended) = mpsc::channel();
        start_task(async move {
            task.await;
            drop(end);
        })?;
        Ok(Self { name, stop, ended })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot tell the {} to stop", self.name);
            return;
        }
        // An error is what it waits for: the other side is gone.
        let _ = self.ended.recv();
    }
}

/// Starts a task of the server.
///
/// # Errors
/// This is no task of a worker.
pub(crate) fn start_task(task: impl Future<Output = ()> + 'static) -> io::Result<()> {
    spawn_local(task).map_err(|_| io::ErrorKind::NotConnected.into())
}

/// Whether a server is about to end, for its tasks.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    begun: Cell<bool>,
    wakers: RefCell<Vec<Waker>>,
    /// Who waits for tasks to end.
    left: RefCell<Option<Waker>>,
}

impl Ending {
    pub(crate) fn has_begun(&self) -> bool {
        self.begun.get()
    }

    /// Has all that [`Self::or`] waits for give up.
    pub(crate) fn begin(&self) {
        self.begun.set(true);
        self.wakers.take().into_iter().for_each(Waker::wake);
    }

    /// `task`, or `None` if the server stops first.
    pub(crate) async fn or<T>(&self, task: impl Future<Output = T>) -> Option<T> {
        let mut task = pin!(task);
        poll_fn(|context| {
            if self.begun.get() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(output) = task.as_mut().poll(context) {
                return Poll::Ready(Some(output));
            }
            let mut wakers = self.wakers.borrow_mut();
            if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                wakers.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// A task has ended.
    pub(crate) fn someone_left(&self) {
        slot::wake(&self.left);
    }

    /// Waits until all are gone, as `is_empty` says; it is asked whenever [someone left](Self::someone_left).
    pub(crate) async fn everyone_left(&self, is_empty: impl Fn() -> bool) {
        poll_fn(|context| {
            if is_empty() {
                return Poll::Ready(());
            }
            slot::keep(&self.left, context.waker());
            Poll::Pending
        })
        .await;
    }

    /// The same for at most this time; whether they are gone.
    pub(crate) async fn left_within(&self, time: Duration, is_empty: impl Fn() -> bool) -> bool {
        let clock = WorkerClock::new();
        let mut all = pin!(self.everyone_left(is_empty));
        let mut time = pin!(clock.sleep(time));
        poll_fn(|context| {
            if all.as_mut().poll(context).is_ready() {
                return Poll::Ready(true);
            }
            time.as_mut().poll(context).map(|()| false)
        })
        .await
    }
}
