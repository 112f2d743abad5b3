//! The NBD server: with the clients that people have, with clients that mean no good, and with disks that fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod clients;
mod disk;
mod encrypted;
mod faults;
mod hostile;
mod managed;
mod own;
mod raw;
mod tools;

use std::path::{Path, PathBuf};

use block_io::{Device, DeviceOptions, EngineKind, ListenAddress, Worker, WorkerOptions};
use storage_virtualizer::nbd::{DeviceExport, Export, NbdOptions, NbdServer};

/// A server and what it needs, in a folder that goes with it.
struct Served {
    server: Option<NbdServer>,
    _worker: Worker,
    folder: tempfile::TempDir,
}

impl Served {
    /// Serves what `make` makes on a socket in a new folder.
    fn start<E: Export>(
        change: impl FnOnce(&mut NbdOptions),
        make: impl FnOnce(&Path) -> Vec<E> + Send + 'static,
    ) -> Self {
        Self::start_on(None, change, make)
    }

    fn start_on<E: Export>(
        engine: Option<EngineKind>,
        change: impl FnOnce(&mut NbdOptions),
        make: impl FnOnce(&Path) -> Vec<E> + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = WorkerOptions {
            engine,
            ..Default::default()
        };
        let worker = Worker::start("test", options).unwrap();
        let mut options = NbdOptions {
            listen: vec![ListenAddress::Unix(folder.path().join("socket"))],
            ..Default::default()
        };
        change(&mut options);
        let path = folder.path().to_owned();
        let server = NbdServer::start(worker.handle(), options, move || make(&path)).unwrap();
        Self {
            server: Some(server),
            _worker: worker,
            folder,
        }
    }

    /// Serves a sparse file of `size` bytes, called `disk`.
    fn file(size: u64, change: impl FnOnce(&mut NbdOptions)) -> Self {
        Self::start(change, move |folder| {
            vec![file(&folder.join("image"), "disk", size, false)]
        })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }
}

fn file(path: &Path, name: &str, size: u64, read_only: bool) -> DeviceExport {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
    let device = Device::open(path.to_str().unwrap(), &DeviceOptions::default()).unwrap();
    DeviceExport::new(name.to_owned(), device, read_only)
}

/// Bytes that look random, the same for the same seed.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
