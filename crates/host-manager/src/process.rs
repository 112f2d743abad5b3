//! The process of a machine: started, or found; waited for; told to end.
//!
//! A process belongs to a machine if it listens on the machine's management socket, which it does before anything else: so a manager finds the
//! processes of the one before it, and nothing has to be written down that could be wrong.
//!
//! It is started as its machine's user, and in its control group. Until it has opened what its vm.toml names it may open any file, as that names files
//! of the administrator's; with the sandbox it loses that, as all capabilities, before the guest runs ([`vmm::sandbox`]). Its helper keeps it, to
//! connect to sockets that vm.toml names.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use api::VmState;
use management::blocking;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{
    Gid, Pid, PidfdFlags, Resource, Rlimit, Signal, Uid, WaitOptions, pidfd_open, pidfd_send_signal,
    setrlimit, waitpid,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

use crate::group::Group;
use crate::store::Files;
use crate::users::User;

/// How long a machine may take to say how it is.
const ANSWER: Duration = Duration::from_secs(2);

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

/// How a process is started.
pub(crate) struct Start<'a> {
    /// `smsvmm`.
    pub(crate) program: &'a Path,
    pub(crate) files: &'a Files,
    pub(crate) log: File,
    /// Where it asks for disks, if it has none of its own pool.
    pub(crate) manager: Option<&'a Path>,
    /// As whom, if not as this process.
    pub(crate) user: Option<User>,
    /// It has interfaces of the host to open.
    pub(crate) network: bool,
    pub(crate) group: Option<&'a Group>,
    /// What it says goes to the journal, too, by this name.
    pub(crate) journal: Option<&'a str>,
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
    pub(crate) fn start(start: Start<'_>) -> io::Result<Self> {
        let mut command = Command::new(start.program);
        command
            .arg("run")
            .arg("--report")
            .arg(&start.files.report)
            .arg(&start.files.config);
        if let Some(manager) = start.manager {
            command.arg("--set").arg(format!("manager={}", manager.display()));
        }
        if let Some(name) = start.journal {
            command.env("SMSVMM_JOURNAL", name);
        }
        command
            .stdin(Stdio::null())
            .stdout(start.log.try_clone()?)
            .stderr(start.log)
            // The manager's readiness is not its affair.
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            // What a terminal sends to the manager is not for the machine.
            .process_group(0);
        let entrance = start.group.map(Group::entrance).transpose()?;
        let (user, network) = (start.user, start.network);
        if entrance.is_some() || user.is_some() {
            let confine = move || {
                if let Some(entrance) = &entrance {
                    rustix::io::write(entrance, b"0")?;
                }
                user.map_or(Ok(()), |user| become_user(user, network))
            };
            // SAFETY: it runs between fork and exec, and does nothing but system calls: it allocates nothing, and takes no lock.
            unsafe { command.pre_exec(confine) };
        }
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Self {
            pid,
            handle: pidfd_open(pid, PidfdFlags::empty())?,
            child: Some(child),
        })
    }

    /// The process that listens on a machine's management socket, if one does: one of the manager's user, or of the machine's own.
    pub(crate) fn find(socket: &Path, user: Option<u32>) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        let peer = socket_peercred(&stream).ok()?;
        let pid = peer.pid;
        if peer.uid != rustix::process::geteuid() && Some(peer.uid.as_raw()) != user {
            return None;
        }
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

/// Makes the calling thread that of a user, with what a machine's process needs until its sandbox. Between fork and exec.
fn become_user(user: User, network: bool) -> io::Result<()> {
    let mut keep = CapabilitySet::DAC_OVERRIDE;
    if network {
        keep |= CapabilitySet::NET_ADMIN;
    }
    // What a process of root is not held to. Where root may not change it, it stays.
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let _ = setrlimit(Resource::Memlock, unlimited);
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_keep_capabilities(true)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    let sets = CapabilitySets {
        effective: keep,
        permitted: keep,
        inheritable: keep,
    };
    rustix::thread::set_capabilities(None, sets)?;
    for capability in [CapabilitySet::DAC_OVERRIDE, CapabilitySet::NET_ADMIN] {
        if keep.contains(capability) {
            rustix::thread::configure_capability_in_ambient_set(capability, true)?;
        }
    }
    Ok(())
}

/// As much of a machine's status as matters here: its process may be of another version.
#[derive(Deserialize)]
struct Said {
    state: VmState,
}

/// Whether a machine says, at its management socket, that its guest runs.
pub(crate) fn answers(socket: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(socket) else {
        return false;
    };
    let said = blocking::get::<Said>(&stream, "/v1/vm", ANSWER);
    said.is_ok_and(|said| said.state != VmState::Starting)
}

/// Sends a signal to a process; one that has ended does not mind.
pub(crate) fn signal(handle: &OwnedFd, signal: Signal) {
    if let Err(error) = pidfd_send_signal(handle, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(%error, ?signal, "a machine's process cannot be sent a signal");
    }
}
