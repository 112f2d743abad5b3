//! A guest's memory, a server, and a device between them.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use storage_virtualizer::vhost_user::front_end::{
    Dialled, FrontEndError, FrontEndKind, FrontEndOptions, LinkEvents, VhostUserDevice, dial,
};
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserServer};
use storage_virtualizer::virtio_blk::kind;
use virtio_core::GuestMemory;
use virtio_core::vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::driver::{Driver, PATIENCE, readable, writable};

pub(crate) const DISK: u64 = 16 << 20;
const HIGH: u64 = 4 << 30;
/// Each slot has a header, a status byte, and data.
const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
/// In the region above the hole, so that both are used.
const DATA: u64 = HIGH;

/// Two regions with files, as the VM's.
pub(crate) fn shared_memory() -> GuestMemory {
    let region = |start: u64, size: usize| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size as u64).unwrap();
        let mapping = MmapRegion::from_file(FileOffset::new(file.into(), 0), size).unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    };
    let regions = vec![region(0, 16 << 20), region(HIGH, 4 << 20)];
    Arc::new(GuestMemoryMmap::from_regions(regions).unwrap())
}

/// What the device said of its server.
#[derive(Debug, Default)]
pub(crate) struct Observer(pub(crate) Mutex<Vec<String>>);

impl LinkEvents for Observer {
    fn lost(&self, reason: &str) {
        self.0.lock().unwrap().push(reason.to_owned());
    }

    fn back(&self) {
        self.0.lock().unwrap().push("back".to_owned());
    }
}

impl Observer {
    pub(crate) fn wait_for(&self, text: &str) {
        wait_until(text, || {
            self.0.lock().unwrap().iter().any(|line| line.contains(text))
        });
    }
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Connects with time-outs that tests can wait for.
pub(crate) fn dial_quickly(path: &Path) -> io::Result<Dialled> {
    let dialled = dial(path)?;
    for end in [&dialled.socket, &dialled.ours] {
        end.set_read_timeout(Some(Duration::from_millis(300)))?;
    }
    Ok(dialled)
}

pub(crate) fn open(
    socket: &Path,
    queues: u16,
    queue_size: u16,
) -> Result<(VhostUserDevice, Arc<Observer>), FrontEndError> {
    open_as(FrontEndKind::Blk, socket, queues, queue_size)
}

pub(crate) fn open_as(
    kind: FrontEndKind,
    socket: &Path,
    queues: u16,
    queue_size: u16,
) -> Result<(VhostUserDevice, Arc<Observer>), FrontEndError> {
    let observer = Arc::new(Observer::default());
    let options = FrontEndOptions {
        kind,
        name: "disk0".to_owned(),
        queues,
        queue_size,
        on_start: None,
        observer: observer.clone(),
    };
    let socket = socket.to_owned();
    let device = VhostUserDevice::open(Arc::new(move || dial_quickly(&socket)), options)?;
    Ok((device, observer))
}

/// A folder with an image in it.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = std::fs::File::create(folder.path().join("disk.img")).unwrap();
        image.set_len(DISK).unwrap();
        Self(folder)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.0.path().join("disk.img")
    }

    pub(crate) fn grow(&self, size: u64) {
        let file = File::options().write(true).open(self.image()).unwrap();
        file.set_len(size).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.path().join("disk.sock")
    }

    pub(crate) fn serve(&self) -> Served {
        let mut options = VhostUserOptions::default();
        options.device.queues = 4;
        options.device.serial = "served".to_owned();
        self.serve_as(options)
    }

    pub(crate) fn serve_as(&self, options: VhostUserOptions) -> Served {
        let disk = Arc::new(HostDevice::open(self.image(), &OpenOptions::default()).unwrap());
        let worker = Worker::start("io", WorkerOptions::default()).unwrap();
        let workers = vec![worker.handle().clone()];
        let server = VhostUserServer::start(&self.socket(), Arc::clone(&disk), options, workers).unwrap();
        Served {
            server,
            disk,
            _worker: worker,
        }
    }
}

pub(crate) struct Served {
    pub(crate) server: VhostUserServer<Arc<HostDevice>>,
    pub(crate) disk: Arc<HostDevice>,
    _worker: Worker,
}

/// Requests of a driver, one slot (three descriptors) each.
pub(crate) struct Requests<'a>(pub(crate) &'a mut Driver);

impl Requests<'_> {
    /// Makes a request for 4 KiB at `sector` available, and rings the doorbell.
    pub(crate) fn submit(&mut self, slot: u16, request: u32, sector: u64) {
        let header = HEADERS + u64::from(slot) * 16;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&request.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        let memory = Arc::clone(&self.0.memory);
        memory.write_slice(&bytes, GuestAddress(header)).unwrap();
        memory
            .write_obj(0xff_u8, GuestAddress(STATUS + u64::from(slot)))
            .unwrap();
        let data = match request {
            kind::OUT => readable(data(slot), 4096),
            _ => writable(data(slot), 4096),
        };
        let status = writable(STATUS + u64::from(slot), 1);
        self.0.submit(slot * 3, &[readable(header, 16), data, status]);
    }

    pub(crate) fn write(&mut self, slot: u16, sector: u64, fill: u8) {
        let memory = Arc::clone(&self.0.memory);
        memory
            .write_slice(&[fill; 4096], GuestAddress(data(slot)))
            .unwrap();
        self.submit(slot, kind::OUT, sector);
    }

    /// Waits for one answer by its interrupt; which slot it was. It must have succeeded.
    pub(crate) fn wait(&mut self) -> u16 {
        let slot = self.0.wait_used().0 / 3;
        let place = GuestAddress(STATUS + u64::from(slot));
        assert_eq!(self.0.memory.read_obj::<u8>(place).unwrap(), 0, "slot {slot}");
        slot
    }

    pub(crate) fn data(&self, slot: u16) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.0
            .memory
            .read_slice(&mut bytes, GuestAddress(data(slot)))
            .unwrap();
        bytes
    }
}

fn data(slot: u16) -> u64 {
    DATA + u64::from(slot) * 4096
}

/// Whether the other end of `socket` has closed.
pub(crate) fn is_closed(socket: &UnixStream) -> bool {
    use std::io::Read as _;
    let mut socket = socket;
    matches!(socket.read(&mut [0]), Ok(0))
}
