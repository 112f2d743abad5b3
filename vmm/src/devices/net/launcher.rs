//! Starts passt for a process that may not start programs any more.
//!
//! Inside the sandbox no thread may start a program, and passt could not set up its own sandbox inside of ours. So a VM that
//! can be managed has a helper, forked before the sandbox is entered and before there is anything to be inherited: no guest
//! memory, no open files. It knows one request, a network card's settings, and answers with passt's socket. Who takes over
//! the VM's process can have more passts started, with arguments of a fixed form, and nothing else.
//!
//! ```text
//!   VM ── settings of a card (TOML) ──► launcher ── fork, exec ──► passt
//!      ◄── 1, process number, socket, pipe with its words ── or ── 0, why not
//! ```
//!
//! The helper ends when the VM's end of their socket closes, however that happens.

use std::error::Error;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::{Mutex, PoisonError};

use api::{MacAddress, PortForward};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::backend::NetError;
use super::passt::{Passt, PasstOptions};

/// Longest message, both ways.
const LONGEST: usize = 64 << 10;
/// How long an answer may take, in seconds: much longer than the helper waits for passt.
const ANSWER_TIMEOUT: i64 = 10;
/// First byte of an answer that comes with a socket.
const STARTED: u8 = 1;

/// What a VM asks of its launcher.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Request {
    mac: MacAddress,
    mtu: Option<u16>,
    forward: Vec<PortForward>,
}

/// The helper that starts passt. Dropping it ends the helper; what it started goes on.
#[derive(Debug)]
pub struct Launcher {
    /// None when the helper failed us: its next answer might be to an old question.
    socket: Mutex<Option<OwnedFd>>,
    #[cfg(test)]
    process_id: i32,
}

impl Launcher {
    /// Forks the helper. To be called early: it keeps the memory that this process has by now.
    ///
    /// # Errors
    /// The system is out of processes or descriptors.
    pub fn start() -> io::Result<Self> {
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
                let served = std::panic::catch_unwind(|| serve(&theirs));
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
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let connected = socket.as_ref().ok_or(Errno::PIPE.into());
        match connected.and_then(|socket| ask(socket, options)) {
            Ok(Answer::Started {
                process_id,
                socket,
                output,
            }) => Ok((Passt::launched(process_id, output), socket)),
            Ok(Answer::Failed(text)) => Err(NetError::Launcher(text)),
            Err(source) => {
                *socket = None;
                Err(NetError::Passt {
                    action: "reach the helper that starts passt",
                    source,
                })
            }
        }
    }
}

enum Answer {
    Started {
        process_id: u32,
        socket: UnixStream,
        output: OwnedFd,
    },
    Failed(String),
}

fn ask(socket: &OwnedFd, options: &PasstOptions) -> io::Result<Answer> {
    let request = Request {
        mac: options.mac,
        mtu: options.mtu,
        forward: options.forward.clone(),
    };
    let text = toml::to_string(&request).map_err(io::Error::other)?;
    rustix::net::send(socket, text.as_bytes(), SendFlags::NOSIGNAL)?;

    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
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
        Some([0, text @ ..]) => Ok(Answer::Failed(String::from_utf8_lossy(text).into_owned())),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The helper's life.
fn serve(socket: &OwnedFd) {
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
        let sent = match start(&bytes[..count]) {
            Ok((passt, ours)) => {
                let mut answer = vec![STARTED];
                answer.extend_from_slice(&passt.process_id().to_le_bytes());
                let sent = send(socket, &answer, &[ours.as_fd(), passt.output_pipe()]);
                children.extend(passt.into_child().and_then(|child| {
                    let process = Pid::from_child(&child);
                    Some((child, pidfd_open(process, PidfdFlags::empty()).ok()?))
                }));
                sent
            }
            Err(text) => send(socket, &[&[0], text.as_bytes()].concat(), &[]),
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

/// Starts passt as `request` says. The error is for the VM's log.
fn start(request: &[u8]) -> Result<(Passt, UnixStream), String> {
    let text = std::str::from_utf8(request).map_err(|error| error.to_string())?;
    let request: Request = toml::from_str(text).map_err(|error| error.to_string())?;
    let options = PasstOptions {
        mtu: request.mtu,
        forward: request.forward,
        ..PasstOptions::new(request.mac)
    };
    Passt::start(&options).map_err(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text.truncate(text.floor_char_boundary(LONGEST - 1));
        text
    })
}

fn send(
    socket: &OwnedFd,
    bytes: &[u8],
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
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
        let mac = "02:00:00:00:00:01".parse().unwrap();
        let request = Request {
            mac,
            mtu: Some(9000),
            forward: vec!["tcp:8022:22".parse().unwrap()],
        };
        let text = toml::to_string(&request).unwrap();
        let back: Request = toml::from_str(&text).unwrap();
        assert_eq!(
            (back.mac, back.mtu, back.forward),
            (request.mac, request.mtu, request.forward)
        );
    }

    #[test]
    fn nonsense_is_refused_with_words() {
        assert!(start(b"\xff").is_err());
        assert!(start(b"program = \"/bin/sh\"").is_err());
    }

    #[test]
    fn the_helper_ends_with_its_owner_and_not_before() {
        let launcher = Launcher::start().unwrap();
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
        let launcher = Launcher::start().unwrap();
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
