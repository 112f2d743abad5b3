//! Threads that block in system calls: for everything where io_uring is refused, and for the few calls that it lacks.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use super::engine::{Call, Completion, Request};
use super::local::{Shared, with_local};
use crate::background;

/// Most threads of the process's pool: as many requests can be in flight.
const MAX_THREADS: usize = 16;
const STACK_SIZE: usize = 128 << 10;

struct Job {
    index: u32,
    request: Request,
    worker: Arc<Shared>,
}

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static POOL: Pool = Pool {
    state: Mutex::new(State {
        jobs: VecDeque::new(),
        threads: 0,
        idle: 0,
    }),
    work: Condvar::new(),
};

/// Starts a first thread of the pool, so that no worker has to, whose seccomp filter may forbid it. `on_start` runs on the
/// thread first.
///
/// Needed before workers are confined if one of them may lack io_uring, or serves a block device that can discard.
///
/// # Errors
/// The host has no thread left, or `on_start` failed.
pub fn prepare_pool(on_start: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let (report, started) = mpsc::channel();
    let mut state = POOL.lock();
    start_thread(move || {
        let ready = on_start();
        let failed = ready.is_err();
        // The caller waits for it.
        drop(report.send(ready));
        if failed {
            POOL.lock().threads -= 1;
        } else {
            POOL.serve();
        }
    })?;
    state.threads += 1;
    drop(state);
    started
        .recv()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

fn start_thread(main: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("block-io-pool".into())
        .stack_size(STACK_SIZE)
        .spawn(main)
        .map(drop)
}

/// Has a thread execute `request`; operation `index` of `worker` completes with the result.
pub(super) fn submit(index: u32, request: Request, worker: Arc<Shared>) {
    let mut state = POOL.lock();
    state.jobs.push_back(Job {
        index,
        request,
        worker,
    });
    if state.idle < state.jobs.len() && state.threads < MAX_THREADS {
        let spawned = start_thread(|| {
            background::begin(|hooks| &*hooks.blocks);
            POOL.serve();
        });
        match spawned {
            Ok(()) => state.threads += 1,
            // One of those that run will do it; with none, this thread must.
            Err(error) if state.threads == 0 => {
                tracing::warn!(%error, "cannot start a thread for blocking I/O, the worker blocks instead");
                let jobs = std::mem::take(&mut state.jobs);
                drop(state);
                jobs.into_iter().for_each(Job::run);
                return;
            }
            Err(_) => {}
        }
    }
    drop(state);
    POOL.work.notify_one();
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job.run();
                state = self.lock();
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

impl Job {
    fn run(self) {
        let result = execute(&self.request);
        self.worker.complete(Completion::Operation {
            index: self.index,
            result,
        });
    }
}

/// Executes `request` on this thread, which must be a worker: for requests that are no more than a copy.
pub(crate) fn execute_at_once(request: &Request) -> Option<i32> {
    with_local(|_| execute(request))
}

/// Executes `request`, blocking. The result is as in io_uring: a number of bytes, or a negative errno.
fn execute(request: &Request) -> i32 {
    let file = request.file;
    loop {
        // SAFETY: descriptor and memory stay valid until the request has completed (contract of `IoBuf::new`).
        let result = unsafe {
            match request.call {
                Call::Read {
                    offset,
                    buffers,
                    count,
                } => libc::preadv2(file, buffers, count_of(count), offset_of(offset), 0),
                Call::Write {
                    offset,
                    buffers,
                    count,
                    flags,
                } => libc::pwritev2(file, buffers, count_of(count), offset_of(offset), flags),
                // Sockets are watched by the worker's epoll.
                Call::Poll { .. } => return -libc::EINVAL,
                Call::Sync => libc::fdatasync(file) as isize,
                Call::Allocate { mode, offset, length } => {
                    libc::fallocate(file, mode, offset_of(offset), offset_of(length)) as isize
                }
                Call::DiscardBlocks { offset, length } => {
                    let range = [offset, length];
                    libc::ioctl(file, BLKDISCARD, range.as_ptr()) as isize
                }
            }
        };
        if result >= 0 {
            return i32::try_from(result).unwrap_or(i32::MAX);
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            Some(errno) => return -errno,
            None => return -libc::EIO,
        }
    }
}

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;

fn count_of(count: u32) -> libc::c_int {
    libc::c_int::try_from(count).unwrap_or(libc::c_int::MAX)
}

/// The kernel refuses negative offsets, and so everything that does not fit.
fn offset_of(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).unwrap_or(-1)
}

/// Marks the events of [`Call::Poll`]; the others are eventfds.
const POLL: u64 = 1 << 32;

/// The part of the fallback engine that belongs to one worker: how it waits for eventfds and sockets.
pub(super) struct PoolEngine {
    epoll: OwnedFd,
    fired: RefCell<VecDeque<Completion>>,
}

impl PoolEngine {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and belongs to nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        Ok(Self {
            epoll,
            fired: RefCell::default(),
        })
    }

    /// Every write to the eventfd is an edge, so nobody needs to read it.
    pub(super) fn watch(&self, index: u32, event: RawFd) {
        #[expect(clippy::cast_sign_loss, reason = "bits")]
        let mut what = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLET) as u32,
            u64: index.into(),
        };
        // SAFETY: `what` lives during the call.
        if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, event, &raw mut what) } < 0 {
            let error = io::Error::last_os_error();
            tracing::error!(%error, "cannot watch an eventfd");
        }
    }

    /// Waits once for `events` of a socket. The registration stays, disarmed, until the socket is closed.
    pub(super) fn poll(&self, index: u32, file: RawFd, events: u32) {
        let mut what = libc::epoll_event {
            events: events | libc::EPOLLONESHOT as u32,
            u64: POLL | u64::from(index),
        };
        let mut control = |operation| {
            // SAFETY: `what` lives during the call.
            match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, file, &raw mut what) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let armed = match control(libc::EPOLL_CTL_ADD) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => control(libc::EPOLL_CTL_MOD),
            outcome => outcome,
        };
        if let Err(error) = armed {
            let result = -error.raw_os_error().unwrap_or(libc::EIO);
            self.fired
                .borrow_mut()
                .push_back(Completion::Operation { index, result });
        }
    }

    pub(super) fn cancel_poll(&self, index: u32, file: RawFd) {
        self.unwatch(file);
        let mut fired = self.fired.borrow_mut();
        let ended = |completion: &Completion| matches!(completion, Completion::Operation { index: other, .. } if *other == index);
        if !fired.iter().any(ended) {
            let result = -libc::ECANCELED;
            fired.push_back(Completion::Operation { index, result });
        }
    }

    pub(super) fn unwatch(&self, event: RawFd) {
        // SAFETY: no memory is involved.
        unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_DEL,
                event,
                std::ptr::null_mut(),
            )
        };
    }

    pub(super) fn enter(&self, wait: bool) {
        // What failed or was given up has completed already.
        let wait = wait && self.fired.borrow().is_empty();
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: `events` has room for 16.
        let count = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                events.as_mut_ptr(),
                16,
                if wait { -1 } else { 0 },
            )
        };
        let mut fired = self.fired.borrow_mut();
        for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
            #[expect(clippy::cast_possible_truncation, reason = "the lower half is the index")]
            let index = event.u64 as u32;
            fired.push_back(if event.u64 & POLL == 0 {
                Completion::Event {
                    index,
                    result: 0,
                    armed: true,
                }
            } else {
                let result = i32::try_from(event.events).unwrap_or(libc::POLLERR.into());
                Completion::Operation { index, result }
            });
        }
    }

    pub(super) fn next_completion(&self) -> Option<Completion> {
        self.fired.borrow_mut().pop_front()
    }
}
