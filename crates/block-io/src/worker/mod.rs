//! Workers: threads that run tasks and do their I/O.
//!
//! A worker sleeps in the kernel when it has nothing to do, and is woken by a completion, by a watched eventfd, or by
//! another thread that spawns a task on it. Nothing else wakes it.
//!
//! ```text
//!   ┌─► take the inbox (tasks and wakes from other threads)
//!   │   run all ready tasks: they prepare requests, add to rings of guests …
//!   │   look at poll sources: a virtqueue that has got more gives ready tasks again
//!   └── one io_uring_enter: submits everything prepared, and waits
//! ```
//!
//! # System calls
//! For seccomp filters, which [`WorkerOptions::on_start`] can install: a worker on io_uring calls `io_uring_enter`, `io_uring_register` (16,
//! IORING_REGISTER_BUFFERS_UPDATE, for [`HeldMemory`]; if it fails, nothing is held), `read` and `write` (eventfds, on kernels before 5.13), `futex`, `fstat`, and what the allocator and a thread's end need (`mmap`,
//! `munmap`, `madvise`, `brk`, `mremap`, `sched_yield`, `rt_sigprocmask`, `sigaltstack`, `close`, `exit`). Where the thread
//! pool is needed ([`prepare_pool`]) its threads call `preadv2`, `pwritev2`, `fdatasync`, `fallocate` and
//! `ioctl(BLKDISCARD)`, and a worker without io_uring calls `epoll_wait` and `epoll_ctl`. A worker with requests for an
//! [`crate::NbdDevice`] calls `recvfrom`, `readv`, `sendmsg`, `sendto` and `shutdown`; for a [`crate::MultiPath`] with a path
//! that is down, `timerfd_create` and `timerfd_settime`.

mod engine;
mod events;
mod files;
mod helper;
mod local;
mod memory;
mod ops;
mod pool;
mod rest;
mod scratch;
mod uring;

use std::future::Future;
use std::io;
use std::sync::{Arc, Once, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

pub use engine::EngineKind;
pub(crate) use engine::{Call, Request};
pub use events::{EventSignal, EventWatch};
pub(crate) use files::FileNumber;
pub use helper::default_helpers;
pub(crate) use local::nanos_of;
pub use local::{helped, moment_nanos, spawn_local, turns, wake_after_turn, yield_now};
pub use memory::HeldMemory;
pub(crate) use ops::Operation;
pub(crate) use pool::execute_at_once;
pub use pool::prepare_pool;
pub use rest::{PollSource, add_poll_source};
pub use scratch::ScratchBuffer;

use engine::Engine;
use helper::Helpers;
use local::{Local, Shared};
use pool::PoolEngine;
use uring::UringEngine;

/// Stack of a worker's thread. Tasks live on the heap, and nothing recurses; but futures of many layers are large, and builds
/// without optimisation move them over the stack when they are made. What is not touched costs nothing.
const STACK_SIZE: usize = 1 << 20;
/// Forces an engine for every worker of the process: `threads` or `uring`.
const ENGINE_VARIABLE: &str = "SMSVMM_IO_ENGINE";

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread or one of its descriptors could not be made.
    #[error("cannot start I/O worker {name}")]
    Start {
        /// Name of the worker.
        name: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The worker was to use io_uring and nothing else.
    #[error(
        "I/O worker {name} cannot use io_uring (needs kernel 5.6 and /proc/sys/kernel/io_uring_disabled = 0)"
    )]
    Uring {
        /// Name of the worker.
        name: String,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// See [`WorkerOptions::on_start`].
pub type Hook = dyn Fn() -> io::Result<()> + Send + Sync;

/// How a worker runs.
#[derive(Default)]
pub struct WorkerOptions {
    /// Uses this engine and no other. By default io_uring, and threads where it is refused; the environment variable
    /// `SMSVMM_IO_ENGINE` (`uring` or `threads`) decides for all workers without an engine here.
    pub engine: Option<EngineKind>,
    /// Spins for at most this long before it sleeps, as long as that pays; zero (the default) is never. Something like 50 µs
    /// makes disks faster at low depth, for CPU time that is burned.
    pub busy_poll: Duration,
    /// Runs on the worker's thread when its ring and descriptors stand and before its first task: the place for a seccomp
    /// filter, CPU affinity, scheduling. An error stops the start.
    /// Helpers run it too.
    pub on_start: Option<Box<Hook>>,
    /// Threads that call the kernel for it when it has much to do: a worker on a fast device spends most of its time there. They sleep as
    /// long as it has little. Only with io_uring.
    pub helpers: usize,
}

impl std::fmt::Debug for WorkerOptions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("WorkerOptions")
            .field("engine", &self.engine)
            .field("busy_poll", &self.busy_poll)
            .field("on_start", &self.on_start.is_some())
            .field("helpers", &self.helpers)
            .finish()
    }
}

/// A thread that runs tasks and does their I/O. Dropping it stops the thread: its tasks are dropped where they wait,
/// requests in flight are waited for.
#[derive(Debug)]
pub struct Worker {
    handle: WorkerHandle,
    thread: Option<JoinHandle<()>>,
}

/// Spawns tasks on a worker, from any thread. Does not keep the worker alive.
#[derive(Clone)]
pub struct WorkerHandle {
    shared: Arc<Shared>,
    engine: EngineKind,
}

impl std::fmt::Debug for WorkerHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("WorkerHandle")
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// Starts a thread called `name` (the kernel shows its first 15 bytes).
    ///
    /// # Errors
    /// The host has no thread or descriptor left, the start hook failed, or io_uring was demanded and is refused.
    pub fn start(name: &str, options: WorkerOptions) -> Result<Self, WorkerError> {
        let failed = |source| WorkerError::Start {
            name: name.to_owned(),
            source,
        };
        let wake = EventFd::new(libc::EFD_CLOEXEC).map_err(failed)?;
        let shared = Shared::new(wake);
        let (report, started) = mpsc::channel();
        let thread_shared = Arc::clone(&shared);
        let thread_name = name.to_owned();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let hook: Arc<Hook> = options.on_start.unwrap_or_else(|| Box::new(|| Ok(()))).into();
                let ready = engine_for(&thread_name, options.engine).and_then(|mut engine| {
                    let failed = |source| WorkerError::Start {
                        name: thread_name.clone(),
                        source,
                    };
                    // Before the hook, which may forbid threads.
                    engine
                        .help(&thread_name, options.helpers, &thread_shared, &hook)
                        .map_err(failed)?;
                    hook().map_err(failed)?;
                    Ok(engine)
                });
                match ready {
                    Ok(engine) => {
                        let kind = engine.kind();
                        let local = Local::new(thread_shared, engine, options.busy_poll);
                        if report.send(Ok(kind)).is_ok() {
                            local.run();
                        }
                    }
                    // If nobody listens any more, nobody wants to know.
                    Err(error) => drop(report.send(Err(error))),
                }
            })
            .map_err(failed)?;
        let outcome = started
            .recv()
            .unwrap_or_else(|_| Err(failed(io::ErrorKind::Other.into())));
        match outcome {
            Ok(engine) => Ok(Self {
                handle: WorkerHandle { shared, engine },
                thread: Some(thread),
            }),
            Err(error) => {
                // It has ended or is about to; there is nothing more to learn from it.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// A way to spawn tasks on it.
    pub fn handle(&self) -> &WorkerHandle {
        &self.handle
    }

    /// See [`WorkerHandle::spawn`].
    pub fn spawn<M, F>(&self, make: M)
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.handle.spawn(make);
    }

    /// Runs a task on the worker and waits for its result; for tools, tests and set-up, not for tasks.
    ///
    /// # Panics
    /// If the task panicked or the worker has ended.
    pub fn run<M, F>(&self, make: M) -> F::Output
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future + 'static,
        F::Output: Send + 'static,
    {
        let (answer, result) = mpsc::channel();
        self.spawn(move || async move {
            let output = make().await;
            // The receiver waits below.
            drop(answer.send(output));
        });
        match result.recv() {
            Ok(output) => output,
            Err(_) => panic!("the task did not end: the worker stopped"),
        }
    }

    /// Runs `job` on the worker's thread and on those of its helpers: the place for a seccomp filter when [`WorkerOptions::on_start`] would be too early.
    ///
    /// # Errors
    /// The first that `job` has.
    ///
    /// # Panics
    /// If the worker has ended.
    pub fn confine(&self, job: impl Fn() -> io::Result<()> + Clone + Send + 'static) -> io::Result<()> {
        self.confine_helpers(job.clone())?;
        self.run(move || async move { job() })
    }

    /// As [`Self::confine`], but on the threads of its helpers only: for who has a task of the worker confine its own.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn confine_helpers(
        &self,
        job: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> io::Result<()> {
        let threads = self.run(|| async { local::with_local(|local| local.engine.helper_threads()) });
        for thread in threads.into_iter().flatten() {
            let (answer, result) = mpsc::channel();
            let job = job.clone();
            thread.spawn(Box::new(move || drop(answer.send(job()))));
            result
                .recv()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.handle.shared.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an I/O worker ended by a panic");
        }
    }
}

impl WorkerHandle {
    /// Runs `make` on the worker, and the future that it returns as a task there. Nothing happens if the worker has ended.
    pub fn spawn<M, F>(&self, make: M)
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.shared.spawn(Box::new(move || {
            // It is a worker's thread that runs this.
            drop(spawn_local(make()));
        }));
    }

    /// Whether the caller runs on this worker.
    pub fn is_current(&self) -> bool {
        local::with_local(|local| local.is(&self.shared)).unwrap_or(false)
    }

    /// The engine that the worker uses.
    pub fn engine(&self) -> EngineKind {
        self.engine
    }
}

fn engine_for(name: &str, wanted: Option<EngineKind>) -> Result<Engine, WorkerError> {
    let wanted = wanted.or_else(|| match std::env::var(ENGINE_VARIABLE).as_deref() {
        Ok("threads") => Some(EngineKind::Threads),
        Ok("uring") => Some(EngineKind::Uring),
        _ => None,
    });
    let refusal = match wanted {
        Some(EngineKind::Threads) => None,
        _ => match UringEngine::new() {
            Ok(engine) => return Ok(Engine::Uring(engine, Helpers::default())),
            Err(source) if wanted == Some(EngineKind::Uring) => {
                return Err(WorkerError::Uring {
                    name: name.to_owned(),
                    source,
                });
            }
            Err(error) => Some(error),
        },
    };
    static SAID: Once = Once::new();
    SAID.call_once(|| match refusal {
        Some(error) => {
            tracing::warn!(%error, "io_uring is refused: disks use blocking threads and are slower")
        }
        None => tracing::warn!("disks use blocking threads instead of io_uring, as was asked for"),
    });
    let engine = PoolEngine::new().map_err(|source| WorkerError::Start {
        name: name.to_owned(),
        source,
    })?;
    Ok(Engine::Threads(engine))
}
