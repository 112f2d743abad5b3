//! The conversation between who waits for an operation, on a thread that may block, and the task that does it on a worker.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use api::file::Moved;
use api::storage::JobStatus;
use api::{Problem, ProblemKind};
use block_io::{Worker, WorkerHandle, WorkerOptions};

use crate::works::Doing;

/// Between two looks at jobs and at whether the caller wants to stop.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// What the caller is told while an operation goes on.
#[derive(Debug)]
pub enum Notice<'a> {
    /// The jobs that are waited for.
    Progress(&'a [JobStatus]),
    /// How far it is.
    Work(&'a Work),
    /// Nothing new.
    Tick,
}

/// Whether the caller goes on waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Yes.
    GoOn,
    /// No: the pool is to be closed. Jobs go on when it is opened next.
    Stop,
}

/// Something long that is no job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// What is done to what.
    pub what: String,
    /// Bytes done.
    pub done: u64,
    /// All its bytes; 0 if that is not known.
    pub total: u64,
}

enum Message<T> {
    Progress(Vec<JobStatus>),
    Work(Work),
    Done(Result<T, Problem>),
}

/// The worker's side of the conversation.
pub(crate) struct Reporter<T> {
    sender: mpsc::Sender<Message<T>>,
    stop: Arc<AtomicBool>,
    /// It stands in the list of what is being done.
    listed: Option<Doing>,
}

impl<T> Reporter<T> {
    /// Nobody listens; it ends when `stop` is set.
    pub(crate) fn until(stop: &Arc<AtomicBool>) -> Self {
        Self {
            sender: mpsc::channel().0,
            stop: Arc::clone(stop),
            listed: None,
        }
    }

    /// How it gets on stands in a list, if it is in one, and who sees it there can cancel it.
    pub(crate) fn listed(self, listed: Option<Doing>) -> Self {
        Self { listed, ..self }
    }

    /// What was moved, of something that is listed.
    pub(crate) fn moved(&self, moved: Moved) {
        if let Some(doing) = &self.listed {
            doing.moved(moved);
        }
    }

    /// Whether somebody who saw it in the list wants it to end.
    pub(crate) fn cancelled(&self) -> bool {
        self.listed.as_ref().is_some_and(Doing::cancelled)
    }

    /// What is listed has ended: all of it was done unless it was stopped.
    pub(crate) fn ended<R>(mut self, result: &Result<R, Problem>) {
        let stopped = self.stopped();
        if let Some(doing) = self.listed.take() {
            doing.end(result, !stopped);
        }
    }

    /// Nobody listens, and nobody waits for what takes long.
    pub(crate) fn impatient() -> Self {
        Self {
            sender: mpsc::channel().0,
            stop: Arc::new(AtomicBool::new(true)),
            listed: None,
        }
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.cancelled()
    }

    pub(crate) fn progress(&self, jobs: Vec<JobStatus>) {
        // The caller waits for the end of the task.
        drop(self.sender.send(Message::Progress(jobs)));
    }

    pub(crate) fn work(&self, work: Work) {
        if let Some(doing) = &self.listed {
            doing.note(&work);
        }
        drop(self.sender.send(Message::Work(work)));
    }
}

/// Runs a task on a worker of its own, and tells the caller how it gets on.
pub(crate) fn on_worker<T, M, F>(notify: &mut dyn FnMut(Notice<'_>) -> Flow, make: M) -> Result<T, Problem>
where
    T: Send + 'static,
    M: FnOnce(Reporter<T>) -> F + Send + 'static,
    F: Future<Output = Result<T, Problem>> + 'static,
{
    let worker = Worker::start("storage", WorkerOptions::default())
        .map_err(|error| Problem::new(ProblemKind::Host, crate::problem::chain(&error)))?;
    on_handle(worker.handle(), &Arc::default(), notify, make)
}

/// As [`on_worker`], on a worker that there is; not to be called from it. Others may set `stop` as well.
pub(crate) fn on_handle<T, M, F>(
    worker: &WorkerHandle,
    stop: &Arc<AtomicBool>,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
    make: M,
) -> Result<T, Problem>
where
    T: Send + 'static,
    M: FnOnce(Reporter<T>) -> F + Send + 'static,
    F: Future<Output = Result<T, Problem>> + 'static,
{
    let (sender, receiver) = mpsc::channel();
    let reporter = Reporter {
        sender: sender.clone(),
        stop: Arc::clone(stop),
        listed: None,
    };
    worker.spawn(move || async move {
        let done = make(reporter).await;
        drop(sender.send(Message::Done(done)));
    });
    loop {
        let flow = match receiver.recv_timeout(TICK) {
            Ok(Message::Done(result)) => return result,
            Ok(Message::Progress(jobs)) => notify(Notice::Progress(&jobs)),
            Ok(Message::Work(work)) => notify(Notice::Work(&work)),
            Err(RecvTimeoutError::Timeout) => notify(Notice::Tick),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Problem::new(
                    ProblemKind::Host,
                    "the storage worker ended unexpectedly",
                ));
            }
        };
        if flow == Flow::Stop {
            stop.store(true, Ordering::Relaxed);
        }
    }
}
