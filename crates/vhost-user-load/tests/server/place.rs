//! A disk that is served, and loads for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserServer};
use vhost_user_load::front_end;
use vhost_user_load::load::{Load, Pattern, Report};
use vhost_user_load::pattern::Data;

pub(crate) const SIZE: u64 = 64 << 20;

/// A folder with an image in it.
pub(crate) struct Place {
    pub(crate) folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = std::fs::File::create(folder.path().join("disk.img")).unwrap();
        image.set_len(SIZE).unwrap();
        Self { folder }
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("disk.sock")
    }

    pub(crate) fn serve(&self) -> Served {
        serve(&self.image(), &self.socket(), VhostUserOptions::default())
    }

    /// A load of a second that checks everything.
    pub(crate) fn load(&self) -> Load {
        Load {
            front_end: front_end::Options {
                socket: self.socket(),
                queues: 1,
                queue_size: 128,
                block_size: 4096,
                segment: None,
                inflight: true,
                patience: Duration::from_secs(20),
                greeting: None,
            },
            pattern: Pattern::Mixed,
            depth: 32,
            duration: Duration::from_secs(1),
            range: None,
            once: false,
            stride: None,
            data: Data::default(),
            verify: true,
            flush_every: 50,
            reconnect: false,
            patience: Duration::from_secs(20),
            pid: None,
            seed: 7,
        }
    }
}

/// Runs something under a load, for longer and longer if the load has not connected again so often: on a busy machine a server takes its
/// time to start. The load verifies everything at its end.
pub(crate) fn until_reconnected(times: u32, seconds: [u64; 3], run: impl Fn(Duration) -> Report) {
    let mut reports: Vec<Report> = Vec::new();
    for seconds in seconds {
        reports.push(run(Duration::from_secs(seconds)));
        if reports.iter().any(|report| report.reconnects >= times) {
            break;
        }
    }
    let last = reports.last().unwrap();
    assert!(
        last.reconnects >= times && last.verified_blocks > 50,
        "{reports:?}"
    );
}

pub(crate) struct Served {
    pub(crate) server: VhostUserServer<Arc<HostDevice>>,
    pub(crate) disk: Arc<HostDevice>,
    _workers: Vec<Worker>,
}

pub(crate) fn serve(image: &Path, socket: &Path, mut options: VhostUserOptions) -> Served {
    options.device.queues = options.device.queues.max(4);
    let disk = Arc::new(HostDevice::open(image, &OpenOptions::default()).unwrap());
    let workers: Vec<_> = (0..2)
        .map(|_| Worker::start("io", WorkerOptions::default()).unwrap())
        .collect();
    let handles = workers.iter().map(|worker| worker.handle().clone()).collect();
    let server = VhostUserServer::start(socket, Arc::clone(&disk), options, handles).unwrap();
    Served {
        server,
        disk,
        _workers: workers,
    }
}
