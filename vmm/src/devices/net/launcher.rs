//! Starts passt, and connects to the servers of disks, for a process that may do neither any more.
//!
//! Inside the sandbox no thread may start a program, and passt could not set up its own sandbox inside of ours; nor may a thread
//! connect a socket. So a VM that can be managed, or has disks that other processes serve, has a helper, forked before the
//! sandbox is entered and before there is anything to be inherited: no guest memory, no open files. It knows three requests: a
//! network card's settings, which it answers with passt's socket, the path of a server's socket, which it answers with a
//! connection, and something to be asked of the host's manager, which it asks itself, as a machine may ask for little of what a manager does. Who takes over the VM's process can have more passts started, with arguments of a fixed form, and connections
//! made to sockets that the configuration allows, and nothing else.
//!
//! ```text
//!   VM ── settings of a card (TOML) ──► launcher ── fork, exec ──► passt
//!      ◄── 1, process number, socket, pipe with its words ── or ── 0, why not
//!   VM ── path of a socket (TOML) ────► launcher ── connect ──► server of a disk
//!      ◄── 2, connection, both ends of its way back ── or ── 0, error number, why not
//!   VM ── request (TOML) ─────────────► launcher ── connect, asks ──► manager of the host
//!      ◄── 2, connection, at which the answer comes, both ends of a way back ── or as above
//! ```
//!
//! The helper ends when the VM's end of their socket closes, however that happens.

use std::error::Error;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::{Component, Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};

use api::{MacAddress, PortForward};
use block_io::error_chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use storage_virtualizer::vhost_user::front_end::{Dialled, dial};

use super::backend::NetError;
use super::passt::{Passt, PasstOptions};

/// Longest message, both ways.
const LONGEST: usize = 64 << 10;
/// How long an answer may take, in seconds: much longer than the helper waits for passt.
const ANSWER_TIMEOUT: i64 = 10;
/// First byte of an answer that comes with passt's socket.
const STARTED: u8 = 1;
/// First byte of an answer that comes with a connection.
const CONNECTED: u8 = 2;
/// The most descriptors beside an answer.
const MOST_DESCRIPTORS: usize = 3;

/// What a VM asks of its launcher.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(tag = "want", rename_all = "kebab-case")]
enum Request {
    /// A passt for this card.
    Passt {
        mac: MacAddress,
        mtu: Option<u16>,
        forward: Vec<PortForward>,
    },
    /// A connection to the server of a disk.
    Connection { socket: PathBuf },
    /// A connection to the manager, at which this was asked.
    Manager { request: String },
}

/// The host's manager, and what may be said to it.
#[derive(Clone)]
pub struct ManagerDoor {
    /// Its socket.
    pub socket: PathBuf,
    /// The words for a request, if it is one that this machine may make.
    pub say: Arc<Say>,
}

/// What may be said, and how.
type Say = dyn Fn(&str) -> io::Result<Vec<u8>> + Send + Sync;

/// To which sockets the helper connects.
#[derive(Debug, Clone)]
pub enum Sockets {
    /// Those at or beneath these paths.
    At(Vec<PathBuf>),
    /// Any: the VM's sandbox does not look at files.
    Any,
}

impl Sockets {
    fn allow(&self, socket: &Path) -> bool {
        match self {
            Self::Any => true,
            Self::At(places) => {
                let strays = socket.components().any(|part| part == Component::ParentDir);
                places
                    .iter()
                    .any(|place| socket == place || (!strays && socket.starts_with(place)))
            }
        }
    }
}

/// The helper that starts passt and connects. Dropping it ends the helper; what it started goes on.
#[derive(Debug)]
pub struct Launcher {
    /// None when the helper failed us: its next answer might be to an old question.
    socket: Mutex<Option<OwnedFd>>,
    #[cfg(test)]
    process_id: i32,
}

impl Launcher {
    /// Forks the helper, which connects to `sockets`, and asks `manager`. To be called early: it keeps the memory that this process has by now.
    ///
    /// # Errors
    /// The system is out of processes or descriptors.
    pub fn start(sockets: &Sockets, manager: Option<&ManagerDoor>) -> io::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // SAFETY: the child runs `serve` and never returns from here. It uses the allocator, which the C library keeps
        // usable over fork, and no lock that another thread could hold: it writes no log.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(ours);
                // After a panic nothing of it is used any more.
                let life = AssertUnwindSafe(|| serve(&theirs, sockets, manager));
                let served = std::panic::catch_unwind(life);
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(i32::from(served.is_err())) }
            }
            _process_id => {
                rustix::net::sockopt::set_socket_timeout(
                    &ours,
                    rustix::net::sockopt::Timeout::Recv,
                    Some(std::time::Duration::from_secs(ANSWER_TIMEOUT.unsigned_abs())),
                )?;
                Ok(Self {
                    socket: Mutex::new(Some(ours)),
                    #[cfg(test)]
                    process_id: _process_id,
                })
            }
        }
    }

    /// Has the helper start passt. The program of `options` does not count, the search path decides.
    pub(super) fn passt(&self, options: &PasstOptions) -> Result<(Passt, UnixStream), NetError> {
        let request = Request::Passt {
            mac: options.mac,
            mtu: options.mtu,
            forward: options.forward.clone(),
        };
        let unreachable = |source| NetError::Passt {
            action: "reach the helper that starts passt",
            source,
        };
        match self.ask(&request).map_err(unreachable)? {
            Answer::Started {
                process_id,
                socket,
                output,
            } => Ok((Passt::launched(process_id, output), socket)),
            Answer::Failed(error) => Err(NetError::Launcher(error.to_string())),
            Answer::Connected(_) => Err(unreachable(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Has the helper connect to the server of a disk.
    ///
    /// # Errors
    /// Nobody serves there, or it is not allowed to look there, or it is gone.
    pub fn connect(&self, socket: &Path) -> io::Result<Dialled> {
        let request = Request::Connection {
            socket: socket.to_owned(),
        };
        match self.ask(&request)? {
            Answer::Connected(dialled) => Ok(dialled),
            Answer::Failed(error) => Err(error),
            Answer::Started { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Has the helper connect to the manager and ask for `request`, in the words of [`ManagerDoor::say`]. The answer is to be read from the
    /// connection.
    ///
    /// # Errors
    /// The manager is away, the request is not one of this machine's, or too long, or the helper is gone.
    pub fn ask_manager(&self, request: &str) -> io::Result<Dialled> {
        let request = Request::Manager {
            request: request.to_owned(),
        };
        match self.ask(&request)? {
            Answer::Connected(dialled) => Ok(dialled),
            Answer::Failed(error) => Err(error),
            Answer::Started { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn ask(&self, request: &Request) -> io::Result<Answer> {
        let text = toml::to_string(request).map_err(io::Error::other)?;
        if text.len() > LONGEST {
            return Err(io::Error::other("the request is too long for the helper"));
        }
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let connected = socket.as_ref().ok_or(Errno::PIPE.into());
        let answer = connected.and_then(|socket| ask(socket, &text));
        if answer.is_err() {
            *socket = None;
        }
        answer
    }
}

enum Answer {
    Started {
        process_id: u32,
        socket: UnixStream,
        output: OwnedFd,
    },
    Connected(Dialled),
    Failed(io::Error),
}

fn ask(socket: &OwnedFd, request: &str) -> io::Result<Answer> {
    rustix::net::send(socket, request.as_bytes(), SendFlags::NOSIGNAL)?;

    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut descriptors = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut descriptors,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = descriptors.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    match bytes.get(..received.bytes) {
        Some(&[STARTED, a, b, c, d]) => match (descriptors.next(), descriptors.next()) {
            (Some(socket), Some(output)) => Ok(Answer::Started {
                process_id: u32::from_le_bytes([a, b, c, d]),
                socket: socket.into(),
                output,
            }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        },
        Some(&[CONNECTED]) => match (descriptors.next(), descriptors.next(), descriptors.next()) {
            (Some(socket), Some(ours), Some(theirs)) => Ok(Answer::Connected(Dialled {
                socket: socket.into(),
                ours: ours.into(),
                theirs: theirs.into(),
            })),
            _ => Err(io::ErrorKind::InvalidData.into()),
        },
        // An error of the system by its number, so that it is the same on both sides; others by their words.
        Some([0, a, b, c, d, text @ ..]) => Ok(Answer::Failed(match i32::from_le_bytes([*a, *b, *c, *d]) {
            0 => io::Error::other(String::from_utf8_lossy(text).into_owned()),
            number => io::Error::from_raw_os_error(number),
        })),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The helper's life.
fn serve(socket: &OwnedFd, sockets: &Sockets, manager: Option<&ManagerDoor>) {
    let _ = rustix::thread::set_name(c"smsvmm-launcher");
    close_all_but(socket.as_raw_fd());
    let mut children: Vec<(Child, OwnedFd)> = Vec::new();
    let mut bytes = vec![0; LONGEST];
    while wait(socket, &mut children) {
        let Ok((_, count)) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty()) else {
            return;
        };
        if count == 0 {
            return;
        }
        let sent = match obey(&bytes[..count], sockets, manager) {
            Ok(Done::Started(passt, ours)) => {
                let mut answer = vec![STARTED];
                answer.extend_from_slice(&passt.process_id().to_le_bytes());
                let sent = send(socket, &answer, &[ours.as_fd(), passt.output_pipe()]);
                children.extend(passt.into_child().and_then(|child| {
                    let process = Pid::from_child(&child);
                    Some((child, pidfd_open(process, PidfdFlags::empty()).ok()?))
                }));
                sent
            }
            Ok(Done::Connected(Dialled {
                socket: connection,
                ours,
                theirs,
            })) => send(
                socket,
                &[CONNECTED],
                &[connection.as_fd(), ours.as_fd(), theirs.as_fd()],
            ),
            Err(error) => {
                let number = error.raw_os_error().unwrap_or(0);
                let text = chain(&error);
                send(
                    socket,
                    &[&[0], &number.to_le_bytes()[..], text.as_bytes()].concat(),
                    &[],
                )
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Waits for a request, and meanwhile for the end of children. False: there will be no more requests.
fn wait(socket: &OwnedFd, children: &mut Vec<(Child, OwnedFd)>) -> bool {
    loop {
        let mut polled = vec![PollFd::new(socket, PollFlags::IN)];
        polled.extend(
            children
                .iter()
                .map(|(_, process)| PollFd::new(process, PollFlags::IN)),
        );
        match poll(&mut polled, None::<&Timespec>) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return false,
        }
        if !polled[0].revents().is_empty() {
            return true;
        }
        children.retain_mut(|(child, _)| matches!(child.try_wait(), Ok(None)));
    }
}

/// What was asked for.
enum Done {
    Started(Passt, UnixStream),
    Connected(Dialled),
}

/// Does what `request` says. The error is for the VM's log.
fn obey(request: &[u8], sockets: &Sockets, manager: Option<&ManagerDoor>) -> io::Result<Done> {
    let text = std::str::from_utf8(request).map_err(io::Error::other)?;
    match toml::from_str(text).map_err(io::Error::other)? {
        Request::Passt { mac, mtu, forward } => {
            let options = PasstOptions {
                mtu,
                forward,
                ..PasstOptions::new(mac)
            };
            let started = Passt::start(&options).map_err(|error| io::Error::other(chain(&error)))?;
            Ok(Done::Started(started.0, started.1))
        }
        Request::Connection { socket } if !sockets.allow(&socket) => Err(io::Error::other(
            "it lies outside of sandbox.paths, and no disk of vm.toml is served there",
        )),
        Request::Connection { socket } if manager.is_some_and(|door| door.socket == socket) => Err(
            io::Error::other("it is the manager's socket, where only the manager's disks can be asked for"),
        ),
        Request::Connection { socket } => dial(&socket).map(Done::Connected),
        Request::Manager { request } => {
            let door = manager.ok_or_else(|| io::Error::other("this machine has no manager"))?;
            let words = (door.say)(&request)?;
            let mut dialled = dial(&door.socket)?;
            // They fit in the socket's buffer, and it has a time-out.
            dialled.socket.write_all(&words)?;
            Ok(Done::Connected(dialled))
        }
    }
}

/// An error and its causes in one line that fits in an answer.
fn chain(error: &dyn Error) -> String {
    let mut text = error_chain(error);
    text.truncate(text.floor_char_boundary(LONGEST / 2));
    text
}

fn send(
    socket: &OwnedFd,
    bytes: &[u8],
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
}

/// Closes what was inherited: sockets of the VM must not stay open when the VM ends. Standard input and output lead nowhere.
fn close_all_but(kept: std::os::fd::RawFd) {
    if let Ok(null) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    let Ok(kept) = u32::try_from(kept) else { return };
    for (first, last) in [(3, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: closes descriptors of the parent, which nothing in this process uses. Before Linux 5.9 this fails, and
            // they stay open until the helper ends, which is when the VM ends.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_its_way() {
        let request = Request::Passt {
            mac: "02:00:00:00:00:01".parse().unwrap(),
            mtu: Some(9000),
            forward: vec!["tcp:8022:22".parse().unwrap()],
        };
        let connection = Request::Connection {
            socket: "/run/a.sock".into(),
        };
        for request in [request, connection] {
            let text = toml::to_string(&request).unwrap();
            let back: Request = toml::from_str(&text).unwrap();
            assert_eq!(format!("{back:?}"), format!("{request:?}"));
        }
    }

    #[test]
    fn nonsense_is_refused_with_words() {
        assert!(obey(b"\xff", &Sockets::Any, None).is_err());
        assert!(obey(b"program = \"/bin/sh\"", &Sockets::Any, None).is_err());
    }

    #[test]
    fn connections_lead_to_sockets_that_are_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let allowed = inside.join("a.sock");
        let listener = std::os::unix::net::UnixListener::bind(&allowed).unwrap();
        let launcher = Launcher::start(&Sockets::At(vec![inside.clone()]), None).unwrap();
        let mut dialled = launcher.connect(&allowed).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut dialled.socket, b"x").unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut accepted, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert!(dialled.socket.read_timeout().unwrap().is_some());
        let missing = launcher.connect(&inside.join("b.sock")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        for outside in [folder.path().join("a.sock"), inside.join("../inside/a.sock")] {
            let refused = launcher.connect(&outside).unwrap_err().to_string();
            assert!(refused.contains("sandbox.paths"), "{refused}");
        }
    }

    #[test]
    fn the_manager_is_asked_what_may_be_asked_and_is_not_connected_to_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("host.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let door = ManagerDoor {
            socket: socket.clone(),
            say: Arc::new(|request| match request {
                "a disk" => Ok(b"please".to_vec()),
                _ => Err(io::Error::other("not this")),
            }),
        };
        let launcher = Launcher::start(&Sockets::At(Vec::new()), Some(&door)).unwrap();
        let _dialled = launcher.ask_manager("a disk").unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        let mut words = [0; 6];
        std::io::Read::read_exact(&mut accepted, &mut words).unwrap();
        assert_eq!(&words, b"please");
        let refused = launcher.ask_manager("the host").unwrap_err().to_string();
        assert!(refused.contains("not this"), "{refused}");
        assert!(launcher.connect(&socket).is_err());
        let anywhere = Launcher::start(&Sockets::Any, Some(&door)).unwrap();
        assert!(anywhere.connect(&socket).is_err());
        assert!(launcher.ask_manager(&"x".repeat(LONGEST)).is_err());
        assert!(launcher.ask_manager("a disk").is_ok(), "it lives on");
    }

    #[test]
    fn the_helper_ends_with_its_owner_and_not_before() {
        let launcher = Launcher::start(&Sockets::Any, None).unwrap();
        let socket = launcher.socket.lock().unwrap().take().unwrap();
        // An impossible request is answered, not fatal.
        for _ in 0..2 {
            rustix::net::send(&socket, b"mac = 7", SendFlags::NOSIGNAL).unwrap();
            let mut answer = [0; 1024];
            let (_, count) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty()).unwrap();
            assert!(count > 1 && answer[0] == 0);
        }
        drop(socket);
        // SAFETY: no status is asked for.
        let ended = unsafe { libc::waitpid(launcher.process_id, std::ptr::null_mut(), 0) };
        assert_eq!(ended, launcher.process_id);
    }

    #[test]
    fn passt_is_started_or_its_absence_explained() {
        let launcher = Launcher::start(&Sockets::Any, None).unwrap();
        let options = PasstOptions::new("02:00:00:00:00:01".parse().unwrap());
        match launcher.passt(&options) {
            Ok((passt, socket)) => {
                let process = format!("/proc/{}", passt.process_id());
                assert!(std::path::Path::new(&process).exists());
                // It ends when its socket does.
                drop(passt);
                drop(socket);
                let begin = std::time::Instant::now();
                while std::path::Path::new(&process).exists() {
                    assert!(begin.elapsed().as_secs() < 10, "{process} is still there");
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            Err(NetError::Launcher(text)) => assert!(text.contains("passt"), "{text}"),
            Err(error) => panic!("{error}"),
        }
    }
}
