//! The process of a machine: started, or found; waited for; told to end.
//!
//! A process belongs to a machine if it listens on the machine's management socket, which it does before anything else: so a manager finds the
//! processes of the one before it, and nothing has to be written down that could be wrong.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use serde::{Deserialize, Serialize};

use crate::store::Files;

/// How long a machine may take to say how it is.
const ANSWER: Duration = Duration::from_secs(2);
/// As much of what it says is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// How a process ended, as it says itself (`smsvmm run --report`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its exit status.
    pub status: u8,
    /// What happened, for people.
    pub text: String,
}

/// What an exit status of `smsvmm run` means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) kind: EndKind,
    pub(crate) text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndKind {
    /// The guest powered off.
    PoweredOff,
    /// The configuration cannot be used: it would be the same again.
    Usage,
    /// It was stopped hard, by its administrator or because its guest ignored the power button.
    Stopped,
    /// The guest crashed, or the process failed.
    Failed,
}

impl From<Report> for End {
    fn from(report: Report) -> Self {
        let kind = match report.status {
            0 => EndKind::PoweredOff,
            2 => EndKind::Usage,
            4 => EndKind::Stopped,
            _ => EndKind::Failed,
        };
        Self {
            kind,
            text: report.text,
        }
    }
}

/// A process that runs a machine.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    handle: OwnedFd,
    child: Option<Child>,
}

impl Process {
    /// Starts one.
    pub(crate) fn start(program: &Path, files: &Files, log: File) -> io::Result<Self> {
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg("--report")
            .arg(&files.report)
            .arg(&files.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // The manager's readiness is not its affair.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            // What a terminal sends to the manager is not for the machine.
            .process_group(0);
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Self {
            pid,
            handle: pidfd_open(pid, PidfdFlags::empty())?,
            child: Some(child),
        })
    }

    /// The process that listens on a machine's management socket, if one does.
    pub(crate) fn find(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        let pid = socket_peercred(&stream).ok()?.pid;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The connection was made with who listens; as long as that is so, the number means it.
        let again = UnixStream::connect(socket).ok()?;
        let same = socket_peercred(&again).is_ok_and(|peer| peer.pid == pid);
        same.then_some(Self {
            pid,
            handle,
            child: None,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// For who sends it signals while another thread waits for its end.
    pub(crate) fn handle(&self) -> io::Result<OwnedFd> {
        self.handle.try_clone()
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self, report: &Path) -> End {
        let mut fds = [PollFd::from_borrowed_fd(self.handle.as_fd(), PollFlags::IN)];
        while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
        let status = match &mut self.child {
            Some(child) => child.wait().ok().map(|status| status.to_string()),
            None => {
                // The manager before may have been this very process, which was executed anew.
                let status = waitpid(Some(self.pid), WaitOptions::NOHANG).ok().flatten();
                status.map(|(_, status)| format!("{status:?}"))
            }
        };
        let said = std::fs::read(report)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Report>(&bytes).ok());
        match said {
            Some(report) => report.into(),
            None => End {
                kind: EndKind::Failed,
                text: match status {
                    Some(status) => format!("its process ended: {status}"),
                    None => "its process ended without a word".to_owned(),
                },
            },
        }
    }
}

/// Whether a machine says, at its management socket, that its guest runs.
pub(crate) fn answers(socket: &Path) -> bool {
    let ask = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost: smsvmm\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
        io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200") && !answer.contains("\"state\":\"starting\""))
}

/// Sends a signal to a process; one that has ended does not mind.
pub(crate) fn signal(handle: &OwnedFd, signal: Signal) {
    if let Err(error) = pidfd_send_signal(handle, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(%error, ?signal, "a machine's process cannot be sent a signal");
    }
}
