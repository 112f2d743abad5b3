//! A disk of the guest that another process serves, or a SCSI adapter with its disks: the front-end of vhost-user-blk and vhost-user-scsi, as a
//! [`VirtioDevice`].
//!
//! ```text
//!   guest ── doorbell ─ ioeventfd ─────────────► server ─► disk             data: nobody of this process in between
//!         ◄─ MSI-X ──── irqfd ◄──────────────────┘
//!   transport ── activate, reset ─► thread ── socket ─► server              control
//! ```
//!
//! The queues' own eventfds go to the server, which rings KVM by them and is rung by KVM. A thread per disk (`thread`) speaks with
//! the server (`link`), so that no vCPU ever waits for it.
//!
//! **If the server goes**, the guest's requests wait, and the device goes on as soon as there is a server at the socket again that
//! offers as much as the first: with the record of what is in flight (INFLIGHT_SHMFD), which is kept here, nothing is lost. A server
//! that has kept none can be followed only if nothing was in flight; else the device fails (DEVICE_NEEDS_RESET).
//!
//! # Hazards
//! * A server has all of the guest's memory, and can do to the guest what it likes. It cannot do more to this process than keep
//!   one thread waiting: what it says is checked, and guest memory is sealed so that it cannot be made shorter.
//! * As long as a server has not said that its queues stand still, a reset of the device does not end, as the server may still
//!   write to the guest's memory. The end of its connection counts as standing still.

mod link;
mod thread;

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtio_core::{Activation, DeviceError, VirtioDevice, device_type, read_config_bytes};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio_blk::{MAX_QUEUE_SIZE, MAX_QUEUES, SECTOR, VirtioBlkError, blk_feature};
use link::{CONFIG_LENGTH, Link, Offer};
pub use link::{Dialled, LinkError, dial};
use thread::Thread;

/// Fields of the configuration space that are ours (virtio 1.2 §5.2.4).
const SEG_MAX_OFFSET: usize = 12;
const QUEUES_OFFSET: usize = 34;
/// The same of a SCSI adapter (§5.6.4), whose number of queues comes first.
const SCSI_SEG_MAX_OFFSET: usize = 4;

/// What a server serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEndKind {
    /// A disk: vhost-user-blk.
    Blk,
    /// A SCSI adapter with its disks: vhost-user-scsi.
    Scsi,
}

impl FrontEndKind {
    /// Queues beside those of requests.
    fn other_queues(self) -> u16 {
        match self {
            Self::Blk => 0,
            // Control and events.
            Self::Scsi => 2,
        }
    }
}

/// How a connection to the server is had, the first one and all later ones.
pub type Dial = Arc<dyn Fn() -> io::Result<Dialled> + Send + Sync>;

/// Who wants to know how the disk fares.
pub trait LinkEvents: Send + Sync {
    /// The server is lost; requests wait.
    fn lost(&self, reason: &str);
    /// There is one again.
    fn back(&self);
}

/// What the device is like, beside its server.
pub struct FrontEndOptions {
    /// What is to be served.
    pub kind: FrontEndKind,
    /// In messages and the thread's name.
    pub name: String,
    /// Number of queues for requests, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Entries of each queue at most, a power of two from 4 to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Called first of all by the thread.
    pub on_start: Option<Box<dyn FnOnce() -> io::Result<()> + Send>>,
    /// Told of the server's going and coming.
    pub observer: Arc<dyn LinkEvents>,
}

impl fmt::Debug for FrontEndOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("FrontEndOptions")
            .field("kind", &self.kind)
            .field("name", &self.name)
            .field("queues", &self.queues)
            .field("queue_size", &self.queue_size)
            .finish_non_exhaustive()
    }
}

/// A disk cannot be had from a server.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The server.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// An option.
    #[error(transparent)]
    Options(#[from] VirtioBlkError),
    /// Nothing could be stored there.
    #[error("its disk is empty")]
    Empty,
    /// The thread.
    #[error("cannot start the thread that speaks with it")]
    Thread(#[source] io::Error),
}

/// What the guest's driver, or the device's end, wants of the thread.
enum Command {
    Activate(Box<Activation>),
    Reset,
    End,
}

/// What the device, its handles and its thread share.
struct Shared {
    kind: FrontEndKind,
    name: String,
    queues: u16,
    queue_size: u16,
    features: u64,
    config: Mutex<[u8; CONFIG_LENGTH]>,
    /// The connection, to cut it; none while there is none.
    connection: Mutex<Option<UnixStream>>,
    /// Nobody touches guest memory for the device.
    resting: AtomicBool,
}

impl Shared {
    fn all_queues(&self) -> u16 {
        self.queues + self.kind.other_queues()
    }

    fn config(&self) -> [u8; CONFIG_LENGTH] {
        *lock(&self.config)
    }

    /// The server's configuration space, with what is ours in it; whether the guest sees a difference.
    fn set_config(&self, mut config: [u8; CONFIG_LENGTH]) -> bool {
        let seg_max = match self.kind {
            FrontEndKind::Blk => {
                config[QUEUES_OFFSET..QUEUES_OFFSET + 2].copy_from_slice(&self.queues.to_le_bytes());
                SEG_MAX_OFFSET
            }
            FrontEndKind::Scsi => {
                config[..4].copy_from_slice(&u32::from(self.queues).to_le_bytes());
                SCSI_SEG_MAX_OFFSET
            }
        };
        // A request has a header and a status beside its segments, and must not be longer than its queue.
        let most = u32::from(self.queue_size).saturating_sub(2).max(1);
        let theirs = config[seg_max..]
            .first_chunk()
            .map_or(1, |bytes| u32::from_le_bytes(*bytes));
        config[seg_max..seg_max + 4].copy_from_slice(&theirs.clamp(1, most).to_le_bytes());
        let mut current = lock(&self.config);
        std::mem::replace(&mut *current, config) != config
    }

    fn set_link(&self, link: Option<&Link>) {
        // Without a duplicate there is nothing to be cut: then the end of the disk waits for the server's time-out.
        *lock(&self.connection) = link.and_then(|link| link.client.socket().try_clone().ok());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What can be known of a disk while its device belongs to a transport.
#[derive(Clone)]
pub struct FrontEndHandle(Arc<Shared>);

impl FrontEndHandle {
    /// Size of the disk in bytes, as the guest sees it; 0 for an adapter.
    pub fn size(&self) -> u64 {
        if self.0.kind == FrontEndKind::Scsi {
            return 0;
        }
        let sectors = self
            .0
            .config()
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        sectors.saturating_mul(SECTOR)
    }

    /// Whether the server offers no writes.
    pub fn is_read_only(&self) -> bool {
        self.0.kind == FrontEndKind::Blk && self.0.features & blk_feature::RO != 0
    }

    /// Whether there is a server.
    pub fn is_connected(&self) -> bool {
        lock(&self.0.connection).is_some()
    }
}

impl fmt::Debug for FrontEndHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("FrontEndHandle")
            .field("name", &self.0.name)
            .field("connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}

/// A device whose queues another process serves.
pub struct VhostUserDevice {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    commands: Sender<Command>,
    bell: EventFd,
    thread: Option<JoinHandle<()>>,
    active: bool,
}

impl fmt::Debug for VhostUserDevice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VhostUserDevice")
            .field("name", &self.shared.name)
            .field("queue_sizes", &self.queue_sizes)
            .finish_non_exhaustive()
    }
}

impl VhostUserDevice {
    /// Connects to the server, and learns what the disk is like. Waits for the server's answers.
    ///
    /// # Errors
    /// There is no server, it does not speak vhost-user, it has too few queues, or an option is impossible.
    pub fn open(dial: Dial, options: FrontEndOptions) -> Result<Self, FrontEndError> {
        let FrontEndOptions {
            kind,
            name,
            queues,
            queue_size,
            on_start,
            observer,
        } = options;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(VirtioBlkError::Queues { queues }.into());
        }
        if !queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(VirtioBlkError::QueueSize { queue_size }.into());
        }
        let dialled = dial().map_err(LinkError::Connect)?;
        let (link, offer) = Link::new(dialled, kind)?;
        offer.has_queues(queues + kind.other_queues())?;
        let shared = Arc::new(Shared {
            kind,
            name,
            queues,
            queue_size,
            features: features(&offer, kind, queues),
            config: Mutex::new(offer.config),
            connection: Mutex::default(),
            resting: AtomicBool::new(true),
        });
        shared.set_config(offer.config);
        if kind == FrontEndKind::Blk && FrontEndHandle(Arc::clone(&shared)).size() == 0 {
            return Err(FrontEndError::Empty);
        }
        let event = || EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let bell = event().map_err(FrontEndError::Thread)?;
        let theirs = bell.try_clone().map_err(FrontEndError::Thread)?;
        let (commands, received) = channel();
        let mut thread = Thread::new(
            Arc::clone(&shared),
            (dial, observer),
            (received, theirs),
            (link, offer),
        );
        let (told, started) = channel();
        let handle = std::thread::Builder::new()
            .name(format!("link-{}", shared.name))
            .spawn(move || {
                let ready = on_start.map_or(Ok(()), |on_start| on_start());
                let go = ready.is_ok();
                // Whoever opens the disk waits for this.
                let _ = told.send(ready);
                if go {
                    thread.run();
                }
            })
            .map_err(FrontEndError::Thread)?;
        match started.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(FrontEndError::Thread(error)),
            Err(_) => return Err(FrontEndError::Thread(io::Error::other("it ended at once"))),
        }
        Ok(Self {
            queue_sizes: vec![queue_size; usize::from(shared.all_queues())],
            shared,
            commands,
            bell,
            thread: Some(handle),
            active: false,
        })
    }

    /// What can be known of it later.
    pub fn handle(&self) -> FrontEndHandle {
        FrontEndHandle(Arc::clone(&self.shared))
    }

    /// A thread that has ended by a panic has let go of everything.
    fn tell(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // It does not block.
            let _ = self.bell.write(1);
        }
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

fn features(offer: &Offer, kind: FrontEndKind, queues: u16) -> u64 {
    if queues > 1 || kind != FrontEndKind::Blk {
        offer.features
    } else {
        offer.features & !blk_feature::MQ
    }
}

impl VirtioDevice for VhostUserDevice {
    fn device_type(&self) -> u32 {
        match self.shared.kind {
            FrontEndKind::Blk => device_type::BLOCK,
            FrontEndKind::Scsi => device_type::SCSI,
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Only CONFIG_WCE would make a field of a disk writable. An adapter's sizes of sense data and CDBs stay what they are, as reading them
        // shows: a driver that wants others is told no.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.is_empty() {
            return Err(DeviceError::MissingQueues {
                enabled: 0,
                needed: 1,
            });
        }
        if self.has_ended() {
            return Err(DeviceError::Host {
                action: "reach the disk's server".to_owned(),
                source: io::Error::other("the thread that speaks with it has panicked"),
            });
        }
        self.active = true;
        self.shared.resting.store(false, Ordering::Release);
        self.tell(Command::Activate(Box::new(activation)));
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            self.tell(Command::Reset);
        }
    }

    fn is_idle(&mut self) -> bool {
        !self.active && (self.shared.resting.load(Ordering::Acquire) || self.has_ended())
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        self.tell(Command::End);
        // The thread may be waiting for an answer.
        if let Some(connection) = &*lock(&self.shared.connection) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(disk = self.shared.name, "the thread of a disk's server panicked");
        }
    }
}
