//! Servers from Debian: qemu-nbd (package qemu-utils) and nbdkit.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use block_io::{NbdAddress, NbdServer};

/// A running server with its socket in a folder of its own.
pub(crate) struct Server {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Server {
    /// Starts `program`; `None`, said aloud, if this machine has no such program.
    pub(crate) fn start(program: &str, socket: &Path, arguments: &[&str]) -> Option<Self> {
        // A server that was killed leaves it behind.
        drop(std::fs::remove_file(socket));
        let mut server = Self::spawn(program, arguments)?;
        server.socket = socket.to_owned();
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < end, "{program} does not listen");
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("{program} ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(server)
    }

    /// Starts `program`, and does not wait until it listens.
    pub(crate) fn spawn(program: &str, arguments: &[&str]) -> Option<Self> {
        let spawned = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match spawned {
            Ok(child) => Some(Self {
                child,
                socket: PathBuf::new(),
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("skipped: {program} is not installed");
                None
            }
            Err(error) => panic!("cannot start {program}: {error}"),
        }
    }

    pub(crate) fn qemu(image: &Path, socket: &Path, more: &[&str]) -> Option<Self> {
        let socket_argument = format!("--socket={}", socket.display());
        let mut arguments = vec!["--persistent", "--format=raw", "--shared=0", &socket_argument];
        arguments.extend(more);
        arguments.push(image.to_str().unwrap());
        Self::start("qemu-nbd", socket, &arguments)
    }

    pub(crate) fn nbdkit(socket: &Path, more: &[&str]) -> Option<Self> {
        let mut arguments = vec!["--foreground", "--unix", socket.to_str().unwrap()];
        arguments.extend(more);
        Self::start("nbdkit", socket, &arguments)
    }

    pub(crate) fn address(&self) -> NbdAddress {
        address(&self.socket)
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: no memory is involved; the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn address(socket: &Path) -> NbdAddress {
    NbdAddress {
        server: NbdServer::Unix(socket.to_owned()),
        export: String::new(),
    }
}
