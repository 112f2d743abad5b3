//! Disks for virtual machines of others: QEMU, Cloud Hypervisor, our own VM process (vhost-user-blk).
//!
//! A front-end connects to a Unix socket, shares its guest's memory and virtqueues, and the queues are served right there by
//! `queue::server`, the same as for a VM in this process: no copy, no proxy.
//!
//! ```text
//!   front-end ──socket──► session (a thread): features, memory, rings, configuration      control
//!       │                     │ starts and stops
//!       └─ shared memory ─► queue::server (on the disk's worker) ─► disk             data
//!          kick, call
//! ```
//!
//! * `message`, `socket`: the protocol, for both sides; `client` the conversation as a front-end has it.
//! * `front_end`: the other side, for our own VM process: a disk that somebody else serves.
//! * `session`: one front-end; `rings` its queues, `memory` its memory, `sigbus` what protects from a memory that shrinks.
//!
//! # Hazards
//! * If the server dies, requests are in flight. The record of `inflight.rs` lies in memory that the front-end keeps,
//!   and the next server repeats them. A front-end without it (it does not offer INFLIGHT_SHMFD) would wait for them for ever.
//! * A front-end that is gone may have a successor at once, while requests of the first are still in flight: the second is
//!   served when these have ended. Only so many at a time ([`VhostUserOptions::front_ends`]) are served, one by default, as two
//!   guests that mount one disk destroy it.

pub mod client;
pub mod front_end;
mod memory;
pub mod message;
mod rings;
mod session;
mod sigbus;
pub mod socket;

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use block_io::{SocketFile, UnixSocketError, WorkerHandle, listen_unix};
use rustix::event::{PollFd, PollFlags, poll};
use virtio_core::DeviceEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::disk_handle::DiskHandle;
use crate::queue::Counters;
use crate::virtio_blk::{VirtioBlk, VirtioBlkError, VirtioBlkHandle, VirtioBlkOptions};
use session::{Channel, Session};

/// How long a front-end waits for its predecessor to go before it is refused.
const SUCCESSION: Duration = Duration::from_secs(10);

/// How a disk is shown to front-ends.
#[derive(Debug, Clone)]
pub struct VhostUserOptions {
    /// The device. Its queue size is what a driver is told of segments; a front-end may have queues of up to
    /// [`crate::virtio_blk::MAX_QUEUE_SIZE`] entries in any case.
    pub device: VirtioBlkOptions,
    /// The most front-ends at a time. More than one is for disks that are read only, or for guests that know of each other.
    pub front_ends: usize,
}

impl Default for VhostUserOptions {
    fn default() -> Self {
        Self {
            device: VirtioBlkOptions {
                // What QEMU's own devices say, which every driver takes.
                queue_size: 128,
                ..VirtioBlkOptions::default()
            },
            front_ends: 1,
        }
    }
}

/// A server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// The device.
    #[error(transparent)]
    Device(#[from] VirtioBlkError),
    /// The socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Someone listens there already.
    #[error("{} is in use by another server; stop it or choose another socket", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// There is something else.
    #[error("{} exists and is not a socket; choose another path", path.display())]
    NotSocket {
        /// Where.
        path: PathBuf,
    },
    /// A thread or eventfd.
    #[error("cannot start a vhost-user server")]
    Start(#[source] io::Error),
}

/// A front-end that is connected.
struct FrontEnd<H> {
    number: u64,
    socket: UnixStream,
    channel: Arc<Channel>,
    device: VirtioBlkHandle<H>,
    thread: Option<JoinHandle<()>>,
}

struct Shared<H> {
    path: PathBuf,
    disk: H,
    options: VhostUserOptions,
    workers: Vec<WorkerHandle>,
    stop: EventFd,
    state: Mutex<State<H>>,
    /// A front-end has gone, or the server stops.
    changed: Condvar,
}

struct State<H> {
    stopping: bool,
    next: u64,
    front_ends: Vec<FrontEnd<H>>,
    /// What those have done that are gone.
    past: Counters,
}

/// A disk that is served at a socket. Dropping it is [`Self::stop`].
pub struct VhostUserServer<H: DiskHandle> {
    shared: Arc<Shared<H>>,
    listener: Option<JoinHandle<()>>,
    /// Goes last, when nobody is served any more.
    _file: SocketFile,
}

impl<H: DiskHandle> fmt::Debug for VhostUserServer<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VhostUserServer")
            .field("path", &self.shared.path)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

impl<H: DiskHandle> VhostUserServer<H> {
    /// Listens at `path` and serves `disk` to whoever connects; queue n is served by worker n modulo their number. The socket
    /// is for its owner only.
    ///
    /// # Errors
    /// Someone else is there, the options are impossible, or the host has nothing left.
    pub fn start(
        path: &Path,
        disk: H,
        options: VhostUserOptions,
        workers: Vec<WorkerHandle>,
    ) -> Result<Self, VhostUserError> {
        // What is wrong with the options is said here, not to a front-end.
        VirtioBlk::new(disk.clone(), &options.device, workers.clone())?;
        let (listener, file) = listen_unix(path).map_err(|error| {
            let path = path.to_owned();
            match error {
                UnixSocketError::Busy => VhostUserError::InUse { path },
                UnixSocketError::NotASocket => VhostUserError::NotSocket { path },
                UnixSocketError::System { source, .. } => VhostUserError::Listen { path, source },
            }
        })?;
        let stop = EventFd::new(libc::EFD_CLOEXEC).map_err(VhostUserError::Start)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            disk,
            options,
            workers,
            stop,
            state: Mutex::new(State {
                stopping: false,
                next: 0,
                front_ends: Vec::new(),
                past: Counters::default(),
            }),
            changed: Condvar::new(),
        });
        let thread_shared = Arc::clone(&shared);
        let listener = std::thread::Builder::new()
            .name("vhost-user".to_owned())
            .spawn(move || thread_shared.accept_all(&listener))
            .map_err(VhostUserError::Start)?;
        Ok(Self {
            shared,
            listener: Some(listener),
            _file: file,
        })
    }

    /// Takes no further front-ends, ends what is in flight, closes all connections, and returns when no memory of a front-end
    /// is used any more. A front-end that reconnects to another server finds all its requests answered.
    pub fn stop(self) {
        drop(self);
    }

    /// Tells the front-ends that the disk's size has changed; the disk itself knows already.
    pub fn size_changed(&self) {
        for front_end in &self.shared.state().front_ends {
            front_end.channel.config_changed();
        }
    }

    /// How many front-ends are connected.
    pub fn front_ends(&self) -> usize {
        self.shared.state().front_ends.len()
    }

    /// What all front-ends have done, now and in the past.
    pub fn counters(&self) -> Counters {
        let state = self.shared.state();
        let now = state
            .front_ends
            .iter()
            .flat_map(|front_end| front_end.device.counters());
        now.fold(state.past, Counters::plus)
    }
}

impl<H: DiskHandle> Drop for VhostUserServer<H> {
    fn drop(&mut self) {
        self.shared.state().stopping = true;
        self.shared.changed.notify_all();
        // An eventfd refuses only when its counter is full.
        let _ = self.shared.stop.write(1);
        let mut threads: Vec<_> = self.listener.take().into_iter().collect();
        for front_end in &mut self.shared.state().front_ends {
            // It may be closed already.
            let _ = front_end.socket.shutdown(Shutdown::Both);
            threads.extend(front_end.thread.take());
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of a vhost-user server ended by a panic");
            }
        }
    }
}

impl<H: DiskHandle> Shared<H> {
    fn state(&self) -> MutexGuard<'_, State<H>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_all(self: Arc<Self>, listener: &UnixListener) {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::from_borrowed_fd(
                    // SAFETY: the eventfd lives as long as `self`.
                    unsafe {
                        std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.stop))
                    },
                    PollFlags::IN,
                ),
            ];
            let polled = poll(&mut fds, None);
            if self.state().stopping {
                return;
            }
            let accepted = polled.map_err(io::Error::from).and_then(|_| listener.accept());
            let outcome = match accepted {
                Ok((socket, _)) => self.admit(socket),
                Err(error) => Err(error),
            };
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, path = %self.path.display(), "cannot serve a vhost-user front-end");
                    // For example no descriptor left: it would fail again at once.
                    std::thread::sleep(Duration::from_millis(100));
                }
                Ok(()) => {}
            }
        }
    }

    /// Gives a front-end a thread of its own, when there is room for it.
    fn admit(self: &Arc<Self>, socket: UnixStream) -> io::Result<()> {
        let full = |state: &mut State<H>| {
            !state.stopping && state.front_ends.len() >= self.options.front_ends.max(1)
        };
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(self.state(), SUCCESSION, full)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopping {
            return Ok(());
        }
        if timeout.timed_out() {
            tracing::warn!(path = %self.path.display(), "a vhost-user front-end was refused: the disk is in use");
            return Ok(());
        }
        let device = VirtioBlk::new(self.disk.clone(), &self.options.device, self.workers.clone())
            .map_err(io::Error::other)?;
        let channel = Arc::<Channel>::default();
        let number = state.next;
        state.next += 1;
        let handle = device.handle();
        let kept = socket.try_clone()?;
        let mut session = Session::new(socket, device, Arc::clone(&channel));
        let shared = Arc::clone(self);
        // The lock is held until the front-end is in the list from which its thread takes it.
        let thread = std::thread::Builder::new()
            .name("vhost-user-ctl".to_owned())
            .spawn(move || {
                let leave = Leave { shared, number };
                match session.run() {
                    Ok(()) => tracing::info!("a vhost-user front-end has gone"),
                    Err(error) => {
                        let cause = std::error::Error::source(&error).map(ToString::to_string);
                        tracing::warn!(%error, cause, "a vhost-user front-end was disconnected");
                    }
                }
                drop(session);
                drop(leave);
            })?;
        state.front_ends.push(FrontEnd {
            number,
            socket: kept,
            channel,
            device: handle,
            thread: Some(thread),
        });
        Ok(())
    }
}

/// Takes a front-end from the list, however its thread ends.
struct Leave<H: DiskHandle> {
    shared: Arc<Shared<H>>,
    number: u64,
}

impl<H: DiskHandle> Drop for Leave<H> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let number = self.number;
        if let Some(place) = state.front_ends.iter().position(|kept| kept.number == number) {
            let gone = state.front_ends.swap_remove(place);
            let past = state.past;
            state.past = gone.device.counters().into_iter().fold(past, Counters::plus);
            // The front-end learns that it is alone only when nothing of its memory is used any more.
            let _ = gone.socket.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}
