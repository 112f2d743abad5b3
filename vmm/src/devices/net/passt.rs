//! User-mode networking by `passt`: a process that turns the guest's packets into ordinary sockets, without privilege.
//!
//! Debian 12 has the version of March 2023, which takes a connected socket (`--fd`) on which frames go as in
//! [`super::stream`]. It gets the socket as its standard input, so that no other descriptor has to be inherited. It ends
//! when the socket closes; so it dies with this process however that ends. Started as root it turns into `nobody`.
//!
//! It does not say when it is ready. An ARP request that it must answer shows that, and that the path works both ways; it
//! also tells it the guest's MAC address, so that forwarded connections reach a guest that has not spoken yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::{MacAddress, PortForward, Protocol};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::backend::NetError;

/// How long to wait for the first answer. It takes 15 ms, and does not come where the host has no IPv4.
const READY_TIMEOUT: Duration = Duration::from_millis(500);
/// How long it may take to end after its socket was closed.
const EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// How to start `passt`.
#[derive(Clone, Debug)]
pub struct PasstOptions {
    /// Name or path of the program.
    pub program: String,
    /// The guest's MAC address.
    pub mac: MacAddress,
    /// Ports of the host that lead to the guest.
    pub forward: Vec<PortForward>,
    /// MTU that the guest is told by DHCP, if not the largest possible.
    pub mtu: Option<u16>,
}

impl PasstOptions {
    /// No forwarded ports, the program from the search path.
    pub fn new(mac: MacAddress) -> Self {
        Self {
            program: "passt".into(),
            mac,
            forward: Vec::new(),
            mtu: None,
        }
    }
}

/// A running `passt`.
pub(super) struct Passt {
    /// None if it is another process's child: then the end of its socket is all that it is told.
    child: Mutex<Option<Child>>,
    process_id: u32,
    /// What it says on its standard error. Its end of the pipe does not block: nobody reads while all is well.
    output: OwnedFd,
}

impl Passt {
    /// Starts the program and waits until it answers. Returns our end of its socket.
    pub(super) fn start(options: &PasstOptions) -> Result<(Self, UnixStream), NetError> {
        let failed = |action| move |source| NetError::Passt { action, source };
        let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket pair"))?;
        let (output, errors) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(io::Error::from)
            .map_err(failed("make a pipe"))?;
        let mut command = Command::new(&options.program);
        command
            .args(["--foreground", "--quiet", "--fd", "0"])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(errors);
        for forward in &options.forward {
            command.args(forward_arguments(forward));
        }
        if let Some(mtu) = options.mtu {
            command.args(["--mtu", &mtu.to_string()]);
        }
        let child = command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NetError::PasstAbsent {
                program: options.program.clone(),
            },
            // What a search gives that met a folder which it may not enter, and found nothing elsewhere.
            io::ErrorKind::PermissionDenied if !options.program.contains('/') => NetError::PasstAbsent {
                program: options.program.clone(),
            },
            _ => NetError::Passt {
                action: "start passt",
                source,
            },
        })?;
        // The command holds our copies of the child's descriptors.
        drop(command);
        let passt = Self {
            process_id: child.id(),
            child: Mutex::new(Some(child)),
            output,
        };
        passt.wait_until_ready(options, &ours)?;
        Ok((passt, ours))
    }

    /// One that another process started for us.
    pub(super) fn launched(process_id: u32, output: OwnedFd) -> Self {
        Self {
            child: Mutex::new(None),
            process_id,
            output,
        }
    }

    /// What is left when it goes on for another process, which has its socket.
    pub(super) fn into_child(self) -> Option<Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The end of the pipe from which its words come.
    pub(super) fn output_pipe(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    pub(super) fn process_id(&self) -> u32 {
        self.process_id
    }

    /// What it wrote since the last call; at most what fits into a pipe.
    pub(super) fn output(&self) -> String {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        while bytes.len() < 65536 {
            match rustix::io::read(&self.output, &mut chunk) {
                Ok(count) if count > 0 => bytes.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                _ => break,
            }
        }
        // Where no system log runs it complains about that with every line.
        String::from_utf8_lossy(&bytes)
            .lines()
            .filter(|line| !line.contains("bytes to syslog") && !line.trim().is_empty())
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn wait_until_ready(&self, options: &PasstOptions, socket: &UnixStream) -> Result<(), NetError> {
        let failed = |action| {
            move |source: Errno| NetError::Passt {
                action,
                source: source.into(),
            }
        };
        let process = i32::try_from(self.process_id)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| NetError::Options("passt has no process number".into()))?;
        let process = pidfd_open(process, PidfdFlags::empty()).map_err(failed("watch passt"))?;
        // If it ended already the request goes nowhere, and the poll says so.
        let _ = rustix::net::send(
            socket,
            &arp_request(options.mac),
            rustix::net::SendFlags::NOSIGNAL,
        );
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let mut polled = [
                PollFd::new(&process, PollFlags::IN),
                PollFd::new(socket, PollFlags::IN),
            ];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => {
                    tracing::debug!("passt runs, but did not answer yet");
                    return Ok(());
                }
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(failed("wait for passt")(error)),
            }
            let ended = !polled[0].revents().is_empty();
            if ended || polled[1].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                return Err(self.why_it_ended(options));
            }
            // The answer stays in the socket: it may come along with other frames, and the guest ignores an answer that it
            // did not ask for.
            return Ok(());
        }
    }

    /// The program's own words about why it ended.
    fn why_it_ended(&self, options: &PasstOptions) -> NetError {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let status = child.as_mut().and_then(|child| wait(child, EXIT_TIMEOUT));
        NetError::PasstFailed {
            program: options.program.clone(),
            status: status.map_or_else(|| "it closed the connection".into(), |status| status.to_string()),
            output: self.output(),
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let Some(child) = self.child.get_mut().unwrap_or_else(PoisonError::into_inner) else {
            return;
        };
        // Its socket may be closed only after this; it has nothing to tidy up.
        let _ = child.kill();
        let _ = wait(child, EXIT_TIMEOUT);
    }
}

/// Waits for the end of `child`, but not for long.
fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            _ => return None,
        }
    }
}

/// A forwarded port in the program's notation: `-t 127.0.0.1/8022:22`.
fn forward_arguments(forward: &PortForward) -> [String; 2] {
    let option = match forward.protocol {
        Protocol::Tcp => "--tcp-ports",
        Protocol::Udp => "--udp-ports",
    };
    let address = forward
        .address
        .map(|address| format!("{address}/"))
        .unwrap_or_default();
    let ports = format!("{}:{}", forward.host_port, forward.guest_port);
    [option.to_owned(), format!("{address}{ports}")]
}

/// An ARP request (RFC 826) for a link-local address, from the guest without an address, as a frame with its length.
fn arp_request(mac: MacAddress) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac.octets());
    // Ethernet, IPv4, sizes of their addresses, request.
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac.octets());
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&[169, 254, 255, 254]);
    let mut bytes = vec![0, 0, 0, 42];
    bytes.extend_from_slice(&frame);
    bytes
}
