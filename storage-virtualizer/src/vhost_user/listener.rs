//! A socket at which a device is served: who connects gets a thread and a session, when there is room.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use block_io::{Hook, SocketFile, UnixSocketError, listen_unix};
use rustix::event::{PollFd, PollFlags, poll};
use virtio_core::DeviceEvents;
use vmm_sys_util::eventfd::EventFd;

use super::VhostUserError;
use super::device::ServedDevice;
use super::session::{Channel, Session};
use crate::queue::Counters;

/// How long a front-end waits for its predecessor to go before it is refused.
const SUCCESSION: Duration = Duration::from_secs(10);

/// What the threads of a server run before they hear a front-end: the place for a filter of system calls. If it fails, nobody is served.
#[derive(Clone)]
pub struct ThreadHook(Arc<Hook>);

impl ThreadHook {
    /// Has threads run `hook`.
    pub fn new(hook: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(hook))
    }
}

impl fmt::Debug for ThreadHook {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ThreadHook").finish_non_exhaustive()
    }
}

/// What front-ends are shown.
pub(super) trait Export: Send + Sync + 'static {
    /// The device that one front-end has.
    type Device: ServedDevice + Send;
    /// Management of that device while the front-end has it.
    type Handle: Send;

    /// See [`super::VhostUserOptions`].
    fn memory_stays(&self) -> bool;

    /// A device for one more front-end.
    ///
    /// # Errors
    /// It cannot be made.
    fn device(&self) -> io::Result<(Self::Device, Self::Handle)>;

    /// What a device's queues have done since it was made.
    fn counters(handle: &Self::Handle) -> Vec<Counters>;
}

/// A front-end that is connected, as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontEndState {
    /// By which it can be disconnected; never another one's at this socket.
    pub number: u64,
    /// Its process, if the host knows it.
    pub process: Option<i32>,
    /// When it came.
    pub since: SystemTime,
    /// What it has asked for; of a SCSI adapter nothing, as it counts over all front-ends.
    pub counters: Counters,
}

/// A front-end that is connected.
struct FrontEnd<T> {
    number: u64,
    since: SystemTime,
    socket: UnixStream,
    channel: Arc<Channel>,
    handle: T,
    thread: Option<JoinHandle<()>>,
}

struct Shared<E: Export> {
    path: PathBuf,
    export: E,
    /// The most front-ends at a time.
    front_ends: usize,
    stop: EventFd,
    state: Mutex<State<E::Handle>>,
    /// A front-end has gone, or the server stops.
    changed: Condvar,
}

struct State<T> {
    stopping: bool,
    next: u64,
    front_ends: Vec<FrontEnd<T>>,
    /// What those have done that are gone.
    past: Counters,
}

/// A socket that is listened at. Dropping it takes no further front-ends, ends what is in flight, closes all connections, and returns when no
/// memory of a front-end is used any more.
pub(super) struct Listener<E: Export> {
    shared: Arc<Shared<E>>,
    thread: Option<JoinHandle<()>>,
    /// Goes last, when nobody is served any more.
    _file: SocketFile,
}

impl<E: Export> Listener<E> {
    /// Listens at `path` and shows `export` to up to `front_ends` at a time, on threads that run `confine` first. The socket is for its owner
    /// only.
    ///
    /// # Errors
    /// Someone else is there, or the host has nothing left.
    pub(super) fn start(
        path: &Path,
        export: E,
        front_ends: usize,
        confine: Option<ThreadHook>,
    ) -> Result<Self, VhostUserError> {
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
            export,
            front_ends: front_ends.max(1),
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
        let thread = std::thread::Builder::new()
            .name("vhost-user".to_owned())
            // Those of front-ends are started by this one, and inherit what it may.
            .spawn(move || match confine.map_or(Ok(()), |confine| (confine.0)()) {
                Ok(()) => thread_shared.accept_all(&listener),
                Err(error) => {
                    tracing::error!(%error, "a thread that serves front-ends cannot be confined, and ends");
                }
            })
            .map_err(VhostUserError::Start)?;
        Ok(Self {
            shared,
            thread: Some(thread),
            _file: file,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.shared.path
    }

    pub(super) fn export(&self) -> &E {
        &self.shared.export
    }

    /// Tells the front-ends that the configuration space has changed.
    pub(super) fn config_changed(&self) {
        for front_end in &self.shared.state().front_ends {
            front_end.channel.config_changed();
        }
    }

    /// How many front-ends are connected.
    pub(super) fn front_ends(&self) -> usize {
        self.shared.state().front_ends.len()
    }

    /// Who is connected.
    pub(super) fn clients(&self) -> Vec<FrontEndState> {
        let state = self.shared.state();
        let shown = state.front_ends.iter().map(|front_end| FrontEndState {
            number: front_end.number,
            process: rustix::net::sockopt::socket_peercred(&front_end.socket)
                .ok()
                .map(|peer| peer.pid.as_raw_nonzero().get()),
            since: front_end.since,
            counters: E::counters(&front_end.handle)
                .into_iter()
                .fold(Counters::default(), Counters::plus),
        });
        shown.collect()
    }

    /// Closes the connection of a front-end, and returns when what it had in flight has ended. False if there is none of this number.
    pub(super) fn disconnect(&self, number: u64) -> bool {
        let mut state = self.shared.state();
        let Some(found) = state.front_ends.iter().find(|kept| kept.number == number) else {
            return false;
        };
        // It may be closed already.
        let _ = found.socket.shutdown(Shutdown::Both);
        while state.front_ends.iter().any(|kept| kept.number == number) {
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// What all front-ends have done, now and in the past.
    pub(super) fn counters(&self) -> Counters {
        let state = self.shared.state();
        let now = state
            .front_ends
            .iter()
            .flat_map(|front_end| E::counters(&front_end.handle));
        now.fold(state.past, Counters::plus)
    }
}

impl<E: Export> Drop for Listener<E> {
    fn drop(&mut self) {
        self.shared.state().stopping = true;
        self.shared.changed.notify_all();
        // An eventfd refuses only when its counter is full.
        let _ = self.shared.stop.write(1);
        let mut threads: Vec<_> = self.thread.take().into_iter().collect();
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

impl<E: Export> Shared<E> {
    fn state(&self) -> MutexGuard<'_, State<E::Handle>> {
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
        let full =
            |state: &mut State<E::Handle>| !state.stopping && state.front_ends.len() >= self.front_ends;
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
        let (device, handle) = self.export.device()?;
        let channel = Arc::<Channel>::default();
        let number = state.next;
        state.next += 1;
        let kept = socket.try_clone()?;
        let session = Session::new(socket, device, Arc::clone(&channel), self.export.memory_stays());
        let shared = Arc::clone(self);
        // The lock is held until the front-end is in the list from which its thread takes it.
        let thread = std::thread::Builder::new()
            .name("vhost-user-ctl".to_owned())
            .spawn(move || {
                let leave = Leave { shared, number };
                session.serve();
                drop(leave);
            })?;
        state.front_ends.push(FrontEnd {
            number,
            since: SystemTime::now(),
            socket: kept,
            channel,
            handle,
            thread: Some(thread),
        });
        Ok(())
    }
}

/// Takes a front-end from the list, however its thread ends.
struct Leave<E: Export> {
    shared: Arc<Shared<E>>,
    number: u64,
}

impl<E: Export> Drop for Leave<E> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let number = self.number;
        if let Some(place) = state.front_ends.iter().position(|kept| kept.number == number) {
            let gone = state.front_ends.swap_remove(place);
            let past = state.past;
            state.past = E::counters(&gone.handle).into_iter().fold(past, Counters::plus);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}
