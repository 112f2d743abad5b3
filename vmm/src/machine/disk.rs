//! Opens a disk of the configuration: image, worker threads, virtio-blk.

use std::sync::Arc;
use std::time::Duration;

use api::{ByteSize, DiskConfig};
use block_io::{BlockDevice, Cache, HostDevice, OpenOptions, Worker, WorkerOptions};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions};

use crate::host::{CutOff, find_cut_off};
use crate::sandbox::{Kind, Sandbox};

/// A disk and the threads that serve it.
pub(super) struct OpenDisk {
    pub(super) device: VirtioBlk<Arc<HostDevice>>,
    pub(super) workers: Vec<Worker>,
    pub(super) size: ByteSize,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    /// The image.
    #[error(transparent)]
    Image(#[from] block_io::OpenError),
    /// Nothing could be stored there.
    #[error("{} is empty; give it a size, for example by `truncate -s 10G`", path.display())]
    Empty {
        /// The image.
        path: std::path::PathBuf,
    },
    /// The image is smaller than what lies on it.
    #[error(
        "{} is cut off: it has {} bytes, and {} on it needs {}; copy it again",
        path.display(), cut_off.size, cut_off.contents, cut_off.needed
    )]
    CutOff {
        /// The image.
        path: std::path::PathBuf,
        /// What is missing.
        cut_off: CutOff,
    },
    /// A worker thread.
    #[error(transparent)]
    Worker(#[from] block_io::WorkerError),
    /// The options of the virtual device.
    #[error(transparent)]
    Options(#[from] storage_virtualizer::virtio_blk::VirtioBlkError),
}

/// Opens the image, starts a confined worker, and makes a virtio-blk device of both.
pub(super) fn open(config: &DiskConfig, sandbox: &Sandbox) -> Result<OpenDisk, DiskError> {
    let options = OpenOptions {
        read_only: config.read_only,
        cache: if config.direct {
            Cache::Direct
        } else {
            Cache::Buffered
        },
        ..Default::default()
    };
    let image = HostDevice::open(&config.image, &options)?;
    // Looked at under the image's lock. What cannot be read here is an error of the guest's own reads.
    if let Ok(Some(cut_off)) = find_cut_off(&config.image) {
        let path = config.image.clone();
        return Err(DiskError::CutOff { path, cut_off });
    }
    let size = ByteSize::from_bytes(image.geometry().size);
    if size.bytes() == 0 {
        let path = config.image.clone();
        return Err(DiskError::Empty { path });
    }
    let serial = config
        .serial
        .as_ref()
        .map_or_else(|| config.id.as_str(), |serial| serial.as_str());
    let options = VirtioBlkOptions {
        serial: serial
            .chars()
            .take(storage_virtualizer::virtio_blk::ID_LENGTH)
            .collect(),
        queues: u16::from(config.queues),
        queue_size: config.queue_size.get(),
        ..VirtioBlkOptions::default()
    };
    let worker = Worker::start(
        &format!("io-{}", config.id),
        WorkerOptions {
            on_start: Some(Box::new(sandbox.thread(Kind::DiskWorker))),
            busy_poll: Duration::from_micros(config.poll_us.unwrap_or(0).into()),
            ..Default::default()
        },
    )?;
    let device = VirtioBlk::new(Arc::new(image), &options, vec![worker.handle().clone()])?;
    Ok(OpenDisk {
        device,
        workers: vec![worker],
        size,
    })
}
