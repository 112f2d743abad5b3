//! The peers: images that qemu-storage-daemon serves as NBD.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use block_io::{NbdAddress, NbdDevice, NbdOptions, NbdServer};

use crate::load::Disk;

pub(crate) fn is_there() -> bool {
    let started = Command::new("qemu-storage-daemon")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    started.is_ok_and(|status| status.success())
}

/// CPU seconds of a process.
pub(crate) fn cpu(process: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let nanoseconds = tasks.flatten().map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let first = text
            .split(' ')
            .next()
            .and_then(|number| number.parse::<f64>().ok());
        first.unwrap_or(0.0)
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// What the daemon serves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Image {
    /// The base itself.
    Raw,
    /// An overlay on it, in clusters of 64 KiB.
    Overlay,
    /// The same with sub-clusters.
    Extended,
}

impl Image {
    pub(crate) const ALL: [Self; 3] = [Self::Raw, Self::Overlay, Self::Extended];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw file, NBD",
            Self::Overlay => "qcow2 overlay, NBD",
            Self::Extended => "qcow2 extended_l2, NBD",
        }
    }
}

/// A daemon that runs.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SAFETY: a signal to a child that was not waited for yet.
        unsafe {
            libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM);
        }
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes an overlay on a raw file; `room` bytes of it are allocated by the host.
pub(crate) fn overlay(directory: &Path, base: &str, name: &str, image: Image, room: u64) -> PathBuf {
    let path = directory.join(name);
    let _ = std::fs::remove_file(&path);
    let options = match image {
        Image::Extended => "cluster_size=64k,extended_l2=on",
        _ => "cluster_size=64k",
    };
    let (base, text) = (directory.join(base), path.display().to_string());
    let base = base.display().to_string();
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-o", options, "-b", &base, "-F", "raw", &text,
        ],
    );
    run("fallocate", &["-n", "-l", &room.to_string(), &text]);
    path
}

/// Serves a file.
pub(crate) fn serve(path: &Path, image: Image) -> Daemon {
    let socket = path.with_extension("sock");
    let mut command = Command::new("qemu-storage-daemon");
    let file = format!(
        "driver=file,node-name=file,filename={},aio=io_uring,cache.direct=on",
        path.display()
    );
    command.args(["--blockdev", &file]);
    let node = if image == Image::Raw {
        "file"
    } else {
        command.args([
            "--blockdev",
            "driver=qcow2,node-name=image,file=file,cache.direct=on",
        ]);
        "image"
    };
    command.args([
        "--nbd-server",
        &format!("addr.type=unix,addr.path={}", socket.display()),
        "--export",
        &format!("type=nbd,id=export,node-name={node},name=disk,writable=on"),
    ]);
    let child = command.spawn().unwrap();
    Daemon { child, socket }
}

impl Daemon {
    pub(crate) fn connect(&self) -> Disk {
        let address = NbdAddress {
            server: NbdServer::Unix(self.socket.clone()),
            export: "disk".into(),
        };
        // Without a memory of what is not flushed, which would cost the peer another copy.
        let options = NbdOptions {
            unflushed_limit: 0,
            lock: false,
            ..NbdOptions::default()
        };
        for _ in 0..500 {
            if let Ok(device) = NbdDevice::open(&address, &options) {
                return Disk::Nbd(Rc::new(device), self.child.id());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("qemu-storage-daemon does not answer at {}", self.socket.display());
    }
}
