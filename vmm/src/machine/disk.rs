//! Opens a disk of the configuration: image, worker threads, virtual device; or has the pool do that, or another process.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::virtual_disk::TransferRequest;
use api::{
    ByteSize, DeviceId, DiskBus, DiskConfig, DiskSource, EventKind, EventLog, Problem, StorageAnswer,
    StorageRequest, Transfer,
};
use block_io::{BlockDevice, Cache, HostDevice, OpenOptions, Worker, WorkerHandle, WorkerOptions};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::vhost_user::front_end::{
    Dial, FrontEndError, FrontEndHandle, FrontEndKind, FrontEndOptions, LinkError, LinkEvents,
    VhostUserDevice,
};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkError, VirtioBlkOptions, fitting_serial};
use storage_virtualizer::virtio_scsi::{VirtioScsiError, VirtioScsiOptions};
use virtio_core::VirtioDevice;

use super::devices::DeviceOpener;
use super::managed::{self, ManagedScsi};
use super::manager::ManagerLink;
use super::scsi::{PoolUnit, ScsiAdapter, ScsiSource};
use super::settings::DiskSetting;
use crate::host::{CutOff, find_cut_off};
use crate::sandbox::{Kind, Sandbox};

/// Who has the disks that are not images of the host: the pool.
pub trait PoolDisks: Send + Sync + fmt::Debug {
    /// Opens a disk, and makes a [virtual device](guest_disk) on it, which obeys `controls`.
    ///
    /// # Errors
    /// There is no such disk, it is in use, or it cannot be used as the configuration wants it.
    fn open(
        &self,
        config: &DiskConfig,
        controls: Arc<DiskControls>,
    ) -> Result<PoolDisk, Box<dyn Error + Send + Sync>>;

    /// Makes the machine's SCSI adapter, for disks of the pool and for images, served by the pool's worker
    /// ([`super::scsi_adapter`]).
    ///
    /// # Errors
    /// The options are impossible.
    fn adapter(&self, options: &VirtioScsiOptions) -> Result<ScsiAdapter, VirtioScsiError>;

    /// Opens a disk that is to be a logical unit of that adapter.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn open_unit(&self, config: &DiskConfig) -> Result<PoolUnit, Box<dyn Error + Send + Sync>>;

    /// Does something with the pool while its disks are in use. Blocks until it is done.
    ///
    /// # Errors
    /// The request is refused or fails.
    fn execute(&self, request: StorageRequest) -> Result<StorageAnswer, Problem>;

    /// What moves data between the pool and who is at the other end of a connection, while its disks are in use.
    ///
    /// # Errors
    /// The request is impossible.
    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem>;
}

/// A disk of the pool.
pub struct PoolDisk {
    /// What the guest sees.
    pub device: Box<dyn VirtioDevice>,
    /// In bytes.
    pub size: ByteSize,
    /// Dropped when the guest has the disk no more, after the device: the disk is then closed, as at power-off.
    pub guard: Box<dyn Send>,
}

/// A disk and what serves it.
pub(super) struct OpenDisk {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) workers: Vec<Worker>,
    pub(super) size: ByteSize,
    pub(super) guard: Option<Box<dyn Send>>,
    /// Of a disk that another process serves: how that is going.
    pub(super) link: Option<FrontEndHandle>,
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
    /// A disk of the pool.
    #[error(transparent)]
    Pool(Box<dyn Error + Send + Sync>),
    /// There is no pool.
    #[error(
        "{file} is a disk of a pool, and this machine has none: give it a [pool] or a manager in vm.toml"
    )]
    NoPool {
        /// The disk.
        file: String,
    },
    /// There are no such common limits.
    #[error("limit-group: there is no {group} in [limit-groups] of vm.toml")]
    NoGroup {
        /// Their name.
        group: String,
    },
    /// The process that should serve it.
    #[error("the disk that is to be served at {} cannot be used", socket.display())]
    Served {
        /// Where it should be served.
        socket: PathBuf,
        /// Why not.
        source: FrontEndError,
    },
    /// The guest's memory is the VM's alone.
    #[error(
        "the disk at {} is served by another process, and this VM's memory is not shared with any; \
         set memory.shared = true in vm.toml and start the VM again",
        socket.display()
    )]
    NotShared {
        /// Where it is served.
        socket: PathBuf,
    },
    /// The manager does not give it.
    #[error("the manager at {} does not give the disk", socket.display())]
    Managed {
        /// The manager's socket.
        socket: PathBuf,
        /// What it says.
        source: io::Error,
    },
    /// Nobody can connect.
    #[error(
        "the disk at {} cannot be reached from inside of the sandbox without [management] in vm.toml",
        socket.display()
    )]
    NoHelper {
        /// Where it is served.
        socket: PathBuf,
    },
    /// It cannot be written, or can.
    #[error(
        "the disk at {} is served writable; read-only = true wants a server that takes no writes (`--read-only`)",
        socket.display()
    )]
    Writable {
        /// Where it is served.
        socket: PathBuf,
    },
    /// It is not said what the disk lies on.
    #[error("neither image nor file nor vhost-user says what the disk lies on")]
    NoSource,
    /// A worker thread.
    #[error(transparent)]
    Worker(#[from] block_io::WorkerError),
    /// The options of the virtual device.
    #[error(transparent)]
    Options(#[from] VirtioBlkError),
    /// The options of the SCSI adapter.
    #[error(transparent)]
    Adapter(#[from] VirtioScsiError),
    /// It cannot have its place on the SCSI adapter.
    #[error(transparent)]
    Place(#[from] Problem),
}

/// A disk as the guest sees it.
pub struct GuestDisk {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Tells the guest that the disk's size has changed, when the disk's handle knows it.
    pub resized: Box<dyn Fn() + Send>,
}

/// Makes the virtio block device that `config` wants on `disk`, served by `worker`.
///
/// # Errors
/// The configuration is impossible.
pub fn guest_disk<H: DiskHandle>(
    config: &DiskConfig,
    disk: H,
    controls: Arc<DiskControls>,
    worker: WorkerHandle,
) -> Result<GuestDisk, VirtioBlkError> {
    let device = VirtioBlk::new(disk, &blk_options(config, controls), vec![worker])?;
    let handle = device.handle();
    Ok(GuestDisk {
        device: Box::new(device),
        resized: Box::new(move || handle.size_changed()),
    })
}

/// What the virtio block device is like that `config` wants.
pub fn blk_options(config: &DiskConfig, controls: Arc<DiskControls>) -> VirtioBlkOptions {
    VirtioBlkOptions {
        serial: serial(config),
        queues: u16::from(config.queues),
        queue_size: config.queue_size.get(),
        controls,
    }
}

/// Opens what the disk lies on and makes a virtual device of it.
pub(super) fn open(
    config: &DiskConfig,
    setting: &Arc<DiskSetting>,
    opener: &DeviceOpener,
) -> Result<OpenDisk, DiskError> {
    let controls = setting.controls();
    match (config.source(), opener.pool.as_deref()) {
        (Some(DiskSource::Image(path)), _) => open_image(path, config, controls, &opener.sandbox),
        (Some(DiskSource::VhostUser(socket)), _) => open_served(socket, config, opener),
        (Some(DiskSource::File(file)), _) if opener.manager.is_some() => {
            open_managed(file, config, setting, opener)
        }
        (Some(DiskSource::File(_)), Some(pool)) => {
            let disk = pool.open(config, Arc::clone(controls)).map_err(DiskError::Pool)?;
            Ok(OpenDisk {
                device: disk.device,
                workers: Vec::new(),
                size: disk.size,
                guard: Some(disk.guard),
                link: None,
            })
        }
        (Some(DiskSource::File(file)), None) => Err(DiskError::NoPool {
            file: file.to_owned(),
        }),
        (None, _) => Err(DiskError::NoSource),
    }
}

/// Opens what a disk of the SCSI adapter lies on.
pub(super) fn open_unit(config: &DiskConfig, opener: &DeviceOpener) -> Result<ScsiSource, DiskError> {
    match (config.source(), opener.pool.as_deref()) {
        (Some(DiskSource::Image(path)), _) => {
            let image = open_host(path, config)?;
            Ok(ScsiSource::Image(Arc::new(image), path.display().to_string()))
        }
        (Some(DiskSource::File(_)), Some(pool)) => pool
            .open_unit(config)
            .map(ScsiSource::Pool)
            .map_err(DiskError::Pool),
        (Some(DiskSource::File(file)), None) => Err(DiskError::NoPool {
            file: file.to_owned(),
        }),
        // A disk of another process is no unit of the machine's own adapter.
        (Some(DiskSource::VhostUser(_)) | None, _) => Err(DiskError::NoSource),
    }
}

/// Opens an image, and sees that it can be a disk.
fn open_host(path: &Path, config: &DiskConfig) -> Result<HostDevice, DiskError> {
    let options = OpenOptions {
        read_only: config.read_only,
        cache: if config.direct {
            Cache::Direct
        } else {
            Cache::Buffered
        },
        ..Default::default()
    };
    let image = HostDevice::open(path, &options)?;
    // Looked at under the image's lock. What cannot be read here is an error of the guest's own reads.
    if let Ok(Some(cut_off)) = find_cut_off(path) {
        let path = path.to_owned();
        return Err(DiskError::CutOff { path, cut_off });
    }
    if image.geometry().size == 0 {
        let path = path.to_owned();
        return Err(DiskError::Empty { path });
    }
    Ok(image)
}

/// Opens the image, starts a confined worker, and makes a virtual device of both.
fn open_image(
    path: &Path,
    config: &DiskConfig,
    controls: &Arc<DiskControls>,
    sandbox: &Sandbox,
) -> Result<OpenDisk, DiskError> {
    let image = open_host(path, config)?;
    let size = ByteSize::from_bytes(image.geometry().size);
    let worker = Worker::start(
        &format!("io-{}", config.id),
        WorkerOptions {
            on_start: Some(Box::new(sandbox.thread(Kind::DiskWorker))),
            ..Default::default()
        },
    )?;
    let GuestDisk { device, .. } = guest_disk(
        config,
        Arc::new(image),
        Arc::clone(controls),
        worker.handle().clone(),
    )?;
    Ok(OpenDisk {
        device,
        workers: vec![worker],
        size,
        guard: None,
        link: None,
    })
}

/// Connects to the process that serves the disk.
fn open_served(socket: &Path, config: &DiskConfig, opener: &DeviceOpener) -> Result<OpenDisk, DiskError> {
    let path = || socket.to_owned();
    if !opener.shared_memory {
        return Err(DiskError::NotShared { socket: path() });
    }
    let Some(helper) = opener.helper.clone() else {
        return Err(DiskError::NoHelper { socket: path() });
    };
    let place = path();
    let dial = Arc::new(move || helper.connect(&place));
    let device = front_end(dial, config, opener).map_err(|source| DiskError::Served {
        socket: path(),
        source,
    })?;
    let link = device.handle();
    if config.read_only && !link.is_read_only() {
        return Err(DiskError::Writable { socket: path() });
    }
    Ok(served(device, link))
}

/// Has the manager serve a disk of one of its pools.
fn open_managed(
    file: &str,
    config: &DiskConfig,
    setting: &Arc<DiskSetting>,
    opener: &DeviceOpener,
) -> Result<OpenDisk, DiskError> {
    let Some(manager) = &opener.manager else {
        return Err(DiskError::NoPool {
            file: file.to_owned(),
        });
    };
    let (asking, setting) = (manager.clone(), Arc::clone(setting));
    let had = AtomicBool::new(false);
    // As it is set by then: a manager that was started again knows nothing of it.
    let settings = Arc::clone(&opener.settings);
    let dial = Arc::new(move || {
        let (config, goes_on) = (setting.config(), had.load(Ordering::Relaxed));
        let dialled = asking
            .attach(&config, settings.group_limits(&config), goes_on)
            .map_err(io::Error::other)?;
        had.store(true, Ordering::Relaxed);
        Ok(dialled)
    });
    let device = front_end(dial, config, opener).map_err(|source| {
        let socket = manager.socket().to_owned();
        match source {
            FrontEndError::Link(LinkError::Connect(source)) => DiskError::Managed { socket, source },
            source => DiskError::Served { socket, source },
        }
    })?;
    let link = device.handle();
    Ok(served(device, link))
}

/// A device whose queues the process serves to which `dial` leads.
fn front_end(
    dial: Dial,
    config: &DiskConfig,
    opener: &DeviceOpener,
) -> Result<VhostUserDevice, FrontEndError> {
    let kind = match config.bus {
        DiskBus::VirtioBlk => FrontEndKind::Blk,
        DiskBus::VirtioScsi => FrontEndKind::Scsi,
    };
    let queues = (u16::from(config.queues), config.queue_size.get());
    front_end_of(dial, (kind, config.id.clone()), queues, opener)
}

/// The same with so many queues of such a size.
fn front_end_of(
    dial: Dial,
    (kind, id): (FrontEndKind, DeviceId),
    (queues, queue_size): (u16, u16),
    opener: &DeviceOpener,
) -> Result<VhostUserDevice, FrontEndError> {
    let on_start = opener.sandbox.thread(Kind::DiskLink);
    let options = FrontEndOptions {
        kind,
        name: id.to_string(),
        queues,
        queue_size,
        on_start: Some(Box::new(on_start)),
        observer: Arc::new(Recorder {
            id,
            events: opener.events.clone(),
        }),
    };
    VhostUserDevice::open(dial, options)
}

/// The adapter of the SCSI disks that the manager serves.
pub(super) fn managed_adapter(
    bus: &Arc<ManagedScsi>,
    manager: &ManagerLink,
    opener: &DeviceOpener,
) -> Result<Box<dyn VirtioDevice>, DiskError> {
    let (asking, disks) = (manager.clone(), Arc::downgrade(bus));
    let dial = Arc::new(move || {
        let disks = disks.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let (pool, number) = disks.wanted();
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        asking.attach_adapter(pool, number).map_err(io::Error::other)
    });
    let VirtioScsiOptions {
        queues, queue_size, ..
    } = opener.scsi_options;
    let named = (FrontEndKind::Scsi, managed::adapter_id());
    let device = front_end_of(dial, named, (queues, queue_size), opener).map_err(|source| {
        let socket = manager.socket().to_owned();
        match source {
            FrontEndError::Link(LinkError::Connect(source)) => DiskError::Managed { socket, source },
            source => DiskError::Served { socket, source },
        }
    })?;
    Ok(Box::new(device))
}

fn served(device: VhostUserDevice, link: FrontEndHandle) -> OpenDisk {
    OpenDisk {
        device: Box::new(device),
        workers: Vec::new(),
        size: ByteSize::from_bytes(link.size()),
        guard: None,
        link: Some(link),
    }
}

/// Notes in the VM's log how it goes with a disk's server.
struct Recorder {
    id: DeviceId,
    events: Arc<EventLog>,
}

impl LinkEvents for Recorder {
    fn lost(&self, reason: &str) {
        self.events.record(EventKind::DiskServerLost {
            id: self.id.clone(),
            reason: reason.to_owned(),
        });
    }

    fn back(&self) {
        let id = self.id.clone();
        self.events.record(EventKind::DiskServerBack { id });
    }
}

/// What the guest reads as serial number: by default the identifier, as much of it as fits.
pub fn serial(config: &DiskConfig) -> String {
    let serial = config
        .serial
        .as_ref()
        .map_or_else(|| config.id.as_str(), |serial| serial.as_str());
    fitting_serial(serial)
}
