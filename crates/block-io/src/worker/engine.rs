//! The two ways to have a request done: the kernel's ring, or threads that block in system calls.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::Hook;
use super::helper::{Helper, Helpers};
use super::local::Shared;
use super::memory::Part;
use super::pool::PoolEngine;
use super::uring::UringEngine;

/// One system call's worth of work on an open file, with everything that the kernel needs. The memory that it points to
/// is kept alive by whoever awaits it; see `ops::Operation`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) file: RawFd,
    /// That of the file's [`super::FileNumber`], for files that are used often.
    pub(crate) number: Option<NonZeroU64>,
    pub(crate) call: Call,
}

/// What to do with the file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Call {
    /// preadv2(2).
    Read {
        offset: u64,
        buffers: *const libc::iovec,
        count: u32,
    },
    /// pwritev2(2); `flags` are RWF_*.
    Write {
        offset: u64,
        buffers: *const libc::iovec,
        count: u32,
        flags: i32,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate { mode: i32, offset: u64, length: u64 },
    /// ioctl(BLKDISCARD); the ring has no operation for it.
    DiscardBlocks { offset: u64, length: u64 },
    /// Waits until the file, a socket, is ready for one of `events` (POLL*), and gives what it is ready for. At most one
    /// such request per descriptor at a time. The only request that can be given up before its end.
    Poll { events: u32 },
}

// SAFETY: a `Request` goes to a pool thread; the memory behind its pointers stays valid until the request has ended,
// wherever it is executed (the contract of `IoBuf::new`).
unsafe impl Send for Request {}

/// Something has ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Completion {
    /// A request; a negative `result` is an errno.
    Operation { index: u32, result: i32 },
    /// A watched eventfd was written; not `armed` any more means that the watch must be renewed.
    Event { index: u32, result: i32, armed: bool },
}

/// Which engine a worker uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    Uring,
    /// A pool of blocking threads.
    Threads,
}

#[expect(clippy::large_enum_variant, reason = "there is one per worker")]
pub(super) enum Engine {
    Uring(UringEngine, Helpers),
    Threads(PoolEngine),
}

impl Engine {
    pub(super) fn kind(&self) -> EngineKind {
        match self {
            Self::Uring(..) => EngineKind::Uring,
            Self::Threads(_) => EngineKind::Threads,
        }
    }

    /// Gives the worker that `shared` is a part of so many helpers, if it has a ring.
    pub(super) fn help(
        &mut self,
        name: &str,
        count: usize,
        shared: &Arc<Shared>,
        hook: &Arc<Hook>,
    ) -> io::Result<()> {
        if let Self::Uring(_, helpers) = self {
            let start = |number| {
                let hook = Arc::clone(hook);
                Helper::start(&format!("{number}-{name}"), Arc::clone(shared), move || hook())
            };
            *helpers = Helpers::new((1..=count).map(start).collect::<io::Result<_>>()?);
        }
        Ok(())
    }

    /// Requests that helpers took.
    pub(super) fn helped(&self) -> u64 {
        match self {
            Self::Uring(_, helpers) => helpers.taken(),
            Self::Threads(_) => 0,
        }
    }

    /// What runs jobs on the helpers' threads.
    pub(super) fn helper_threads(&self) -> Vec<Arc<Shared>> {
        match self {
            Self::Uring(_, helpers) => helpers.threads(),
            Self::Threads(_) => Vec::new(),
        }
    }

    /// Has `request` done; it completes as operation `index`.
    pub(super) fn submit(&self, index: u32, request: &Request, shared: &Arc<Shared>) {
        match (self, request.call) {
            (Self::Threads(engine), Call::Poll { events }) => engine.poll(index, request.file, events),
            (Self::Threads(_), _) | (_, Call::DiscardBlocks { .. }) => {
                super::pool::submit(index, *request, Arc::clone(shared));
            }
            (Self::Uring(engine, helpers), _) => {
                if !helpers.take(index, request) {
                    engine.submit(index, request, shared);
                }
            }
        }
    }

    /// A file with a number is about to be closed.
    pub(super) fn forget_file(&self, number: NonZeroU64) {
        match self {
            Self::Uring(engine, _) => engine.forget_file(number),
            Self::Threads(_) => {}
        }
    }

    /// Has the ring and those of the helpers hold memory: [`Self::hold_next`].
    pub(super) fn hold(&self, part: Part) {
        if let Self::Uring(engine, helpers) = self {
            engine.hold(part);
            helpers.hold(part);
        }
    }

    /// Holds one more piece of memory; says whether there are others.
    pub(super) fn hold_next(&self) -> bool {
        match self {
            Self::Uring(engine, _) => engine.hold_next(),
            Self::Threads(_) => false,
        }
    }

    /// Lets go of memory: afterwards no ring has it.
    pub(super) fn release(&self, part: Part) {
        if let Self::Uring(engine, helpers) = self {
            engine.release(part);
            helpers.release(part);
        }
    }

    /// Gives up operation `index`, a [`Call::Poll`] on `file`; it completes soon.
    pub(super) fn cancel_poll(&self, index: u32, file: RawFd) {
        match self {
            Self::Uring(engine, _) => engine.cancel_poll(index),
            Self::Threads(engine) => engine.cancel_poll(index, file),
        }
    }

    /// Watches `event` as number `index`.
    pub(super) fn watch(&self, index: u32, event: &EventFd) {
        match self {
            Self::Uring(engine, _) => engine.watch(index, event.as_raw_fd()),
            Self::Threads(engine) => engine.watch(index, event.as_raw_fd()),
        }
    }

    /// Ends a watch. Says whether one more completion, not armed, will follow.
    pub(super) fn unwatch(&self, index: u32, event: &EventFd) -> bool {
        match self {
            Self::Uring(engine, _) => {
                engine.unwatch(index);
                true
            }
            Self::Threads(engine) => {
                engine.unwatch(event.as_raw_fd());
                false
            }
        }
    }

    /// Arms watches for one event only from now on; says whether that is a change.
    pub(super) fn without_multishot(&self) -> bool {
        match self {
            Self::Uring(engine, _) => engine.without_multishot(),
            Self::Threads(_) => false,
        }
    }

    /// Writes `event`, at the latest with the next [`Self::enter`].
    pub(super) fn signal(&self, event: &EventFd) -> io::Result<()> {
        match self {
            Self::Uring(engine, _) => {
                engine.signal(event.as_raw_fd());
                Ok(())
            }
            Self::Threads(_) => event.write(1),
        }
    }

    /// Hands everything prepared to the kernel; if `wait`, sleeps until there is a completion.
    pub(super) fn enter(&self, wait: bool) {
        match self {
            Self::Uring(engine, helpers) => {
                engine.enter(helpers.before_enter(wait));
                helpers.after_sleep();
            }
            Self::Threads(engine) => engine.enter(wait),
        }
    }

    /// Whether [`Self::enter`] and [`Self::next_completion`] would find something, as far as memory tells.
    pub(super) fn has_completion(&self) -> bool {
        match self {
            Self::Uring(engine, helpers) => engine.has_completion() || helpers.has_completion(),
            Self::Threads(_) => false,
        }
    }

    pub(super) fn next_completion(&self) -> Option<Completion> {
        match self {
            Self::Uring(engine, helpers) => engine.next_completion().or_else(|| helpers.next_completion()),
            Self::Threads(engine) => engine.next_completion(),
        }
    }
}
