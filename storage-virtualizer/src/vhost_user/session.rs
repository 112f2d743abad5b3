//! One front-end: what it asks for, one message after the other, on a thread of its own.
//!
//! A front-end is not trusted. What it says is checked before it is used; what cannot be done is answered with a failure if
//! it asked for an answer, and else ends the connection. Its memory is mapped only as far as it exists (`memory`), its eventfds
//! are eventfds, and nothing that it does keeps the worker or another front-end waiting.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, ftruncate, memfd_create,
};
use rustix::net::SendFlags;
use virtio_core::{DeviceEvents, GuestMemory, feature};
use vmm_sys_util::eventfd::EventFd;

use super::connection::Parting;
use super::device::ServedDevice;
use super::memory::{MAX_REGIONS, Memory, MemoryError, map};
use super::message::{
    Body, F_PROTOCOL_FEATURES, Header, InflightArea, MessageError, Region, backend_request, protocol_feature,
    request,
};
use super::rings::{InflightRecord, RingError, Rings};
use super::sigbus::Guard;
use super::socket::{Received, SocketError, receive, send};
use crate::inflight::{length as record_length, queue_length};
use crate::queue::Waiting;
use crate::virtio_blk::MAX_QUEUE_SIZE;

const PROTOCOL_FEATURES: u64 = protocol_feature::MQ
    | protocol_feature::REPLY_ACK
    | protocol_feature::BACKEND_REQ
    | protocol_feature::CONFIG
    | protocol_feature::INFLIGHT_SHMFD
    | protocol_feature::RESET_DEVICE
    | protocol_feature::CONFIGURE_MEM_SLOTS;

/// The longest piece of a configuration space.
const MAX_CONFIG: usize = 256;

/// Why a message was not obeyed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("there is no queue {0}")]
    NoQueue(u64),
    #[error("a queue has a power of two up to {MAX_QUEUE_SIZE} entries, not {0}")]
    QueueSize(u32),
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("{found} descriptors came with message {request}, which takes {wanted}")]
    Descriptors {
        request: u32,
        found: usize,
        wanted: usize,
    },
    #[error("the descriptor of message {0} is not an eventfd")]
    NotEventFd(u32),
    #[error("an in-flight record of {} bytes for {} queues of {} entries is impossible", .0.size, .0.queues, .0.entries)]
    Inflight(InflightArea),
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
    #[error("message {0} is not known")]
    Unknown(u32),
}

/// How a connection ended, if it was not closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot send a reply")]
    Reply(#[source] io::Error),
    #[error("a message was refused")]
    Refused(#[from] Refusal),
}

/// The way back to the front-end, beside completions.
#[derive(Default)]
pub(super) struct Channel {
    backend: Mutex<Option<OwnedFd>>,
    errors: Mutex<Vec<Option<EventFd>>>,
}

impl DeviceEvents for Channel {
    fn config_changed(&self) {
        let backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backend) = &*backend {
            let header = Header {
                request: backend_request::CONFIG_CHANGE_MSG,
                is_reply: false,
                needs_reply: false,
                size: 0,
            };
            // A front-end that does not read does not learn of it; it must not be waited for.
            if let Err(error) = send(backend, header, &[], &[], SendFlags::DONTWAIT) {
                tracing::warn!(%error, "cannot tell a vhost-user front-end of a changed configuration");
            }
        }
    }

    fn needs_reset(&self, reason: &str) {
        // At most once per queue and start of it.
        tracing::warn!(reason, "a queue of a vhost-user front-end is not served any more");
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        for error in errors.iter().flatten() {
            // It does not block, and whoever does not read it does not want to know.
            let _ = error.write(1);
        }
    }
}

enum Answer {
    None,
    Number(u64),
    Bytes(Vec<u8>),
    BytesAndFile(Vec<u8>, OwnedFd),
}

/// The state of a connection.
pub(super) struct Session<D: ServedDevice> {
    socket: UnixStream,
    device: D,
    channel: Arc<Channel>,
    features: u64,
    protocol: u64,
    memory: Memory,
    guest: Option<GuestMemory>,
    rings: Rings,
    /// It was said that its memory is not held.
    told_of_memory: bool,
}

impl<D: ServedDevice> Session<D> {
    /// `memory_stays`: the front-end never gives memory back, nor puts other pages there, while it is shared.
    pub(super) fn new(socket: UnixStream, device: D, channel: Arc<Channel>, memory_stays: bool) -> Self {
        let queues = device.queue_max_sizes().len();
        channel
            .errors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .resize_with(queues, || None);
        device.connect(Arc::clone(&channel) as Arc<dyn DeviceEvents>);
        Self {
            socket,
            device,
            channel,
            features: 0,
            protocol: 0,
            memory: Memory::default(),
            guest: None,
            rings: Rings::new(queues, memory_stays),
            told_of_memory: false,
        }
    }

    /// Serves the front-end to its end, and says how that came. Afterwards nothing of its memory is used any more, and its connection is
    /// closed.
    pub(super) fn serve(mut self) -> Parting {
        let ended = self.run();
        let parting = if self.rings.are_served() {
            Parting::InUse
        } else {
            Parting::AtRest
        };
        match ended {
            Ok(()) => tracing::info!("a vhost-user front-end has gone"),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, cause, "a vhost-user front-end was disconnected");
            }
        }
        parting
    }

    /// Serves the front-end until it has gone, the socket is shut down, or it says what cannot be obeyed.
    fn run(&mut self) -> Result<(), SessionError> {
        loop {
            let received = match receive(&self.socket) {
                Ok(received) => received,
                Err(SocketError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let header = received.header;
            let acknowledges = header.needs_reply
                && self.protocol & protocol_feature::REPLY_ACK != 0
                && !answers(header.request);
            match self.handle(received) {
                Ok(Answer::None) if acknowledges => self.reply(header, &0_u64.to_le_bytes(), None)?,
                Ok(Answer::None) => {}
                Ok(Answer::Number(number)) => self.reply(header, &number.to_le_bytes(), None)?,
                Ok(Answer::Bytes(bytes)) => self.reply(header, &bytes, None)?,
                Ok(Answer::BytesAndFile(bytes, file)) => self.reply(header, &bytes, Some(file))?,
                Err(error) if acknowledges => {
                    tracing::warn!(%error, "a message of a vhost-user front-end was refused");
                    self.reply(header, &1_u64.to_le_bytes(), None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn reply(&self, header: Header, body: &[u8], file: Option<OwnedFd>) -> Result<(), SessionError> {
        let header = Header {
            is_reply: true,
            needs_reply: false,
            ..header
        };
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        send(&self.socket, header, body, &fds, SendFlags::empty()).map_err(SessionError::Reply)
    }

    fn handle(&mut self, received: Received) -> Result<Answer, Refusal> {
        let Received { header, body, fds } = received;
        let kind = header.request;
        let length = body.len();
        let body = Body::new(kind, &body);
        match kind {
            request::GET_FEATURES => {
                return Ok(Answer::Number(self.offered()));
            }
            request::SET_FEATURES => self.set_features(body.number()?)?,
            request::GET_PROTOCOL_FEATURES => return Ok(Answer::Number(PROTOCOL_FEATURES)),
            request::SET_PROTOCOL_FEATURES => {
                let features = body.number()?;
                if features & !PROTOCOL_FEATURES != 0 {
                    return Err(Refusal::Features(features & !PROTOCOL_FEATURES));
                }
                self.protocol = features;
            }
            request::SET_OWNER => {}
            request::GET_QUEUE_NUM => return Ok(Answer::Number(self.rings.rings.len() as u64)),
            request::GET_MAX_MEM_SLOTS => return Ok(Answer::Number(MAX_REGIONS as u64)),
            request::SET_MEM_TABLE => {
                let regions = body.regions()?;
                expect_descriptors(kind, &fds, regions.len())?;
                self.change_memory(|memory| {
                    *memory = Memory::from_table(&regions, fds)?;
                    Ok(())
                })?;
            }
            request::ADD_MEM_REG => {
                let region = body.region()?;
                let fd = one_descriptor(kind, fds)?;
                self.change_memory(|memory| memory.add(region, fd))?;
            }
            request::REM_MEM_REG => {
                let region = body.region()?;
                self.change_memory(|memory| memory.remove(region))?;
            }
            request::SET_VRING_NUM => {
                let (index, size) = body.ring_state()?;
                let size = u16::try_from(size)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE)
                    .ok_or(Refusal::QueueSize(size))?;
                self.change_ring(index.into(), |rings, index| rings.rings[index].size = size)?;
            }
            request::SET_VRING_ADDR => {
                let (index, addresses) = body.ring_addresses()?;
                self.change_ring(index.into(), |rings, index| {
                    rings.rings[index].addresses = Some(addresses);
                })?;
            }
            request::SET_VRING_BASE => {
                let (index, base) = body.ring_state()?;
                // The upper half belongs to packed queues.
                let base = u16::try_from(base & 0xffff).unwrap_or(0);
                self.change_ring(index.into(), |rings, index| rings.rings[index].set_base(base))?;
            }
            request::GET_VRING_BASE => {
                let (index, _) = body.ring_state()?;
                let place = self.ring(index.into())?;
                self.rings.stop(place, self.rings.waiting());
                self.rings.rings[place].kick = None;
                let base = u32::from(self.rings.rings[place].base);
                let bytes = [index.to_le_bytes(), base.to_le_bytes()].concat();
                return Ok(Answer::Bytes(bytes));
            }
            request::SET_VRING_KICK => {
                let (index, event) = self.ring_event(kind, body.number()?, fds)?;
                let event = event.map_or_else(|| EventFd::new(libc::EFD_CLOEXEC), Ok);
                let event = event.map_err(|error| Refusal::Host("make an eventfd", error))?;
                self.change_ring(index, |rings, index| rings.rings[index].kick = Some(event))?;
            }
            request::SET_VRING_CALL => {
                let (index, event) = self.ring_event(kind, body.number()?, fds)?;
                let index = self.ring(index)?;
                self.rings.rings[index].set_call(event)?;
            }
            request::SET_VRING_ERR => {
                let (index, event) = self.ring_event(kind, body.number()?, fds)?;
                let index = self.ring(index)?;
                self.channel.errors.lock().unwrap_or_else(PoisonError::into_inner)[index] = event;
            }
            request::SET_VRING_ENABLE => {
                let (index, enable) = body.ring_state()?;
                self.change_ring(index.into(), |rings, index| {
                    rings.rings[index].enabled = enable != 0;
                })?;
            }
            request::SET_BACKEND_REQ_FD => {
                let fd = one_descriptor(kind, fds)?;
                *self
                    .channel
                    .backend
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(fd);
            }
            request::GET_CONFIG => return self.get_config(body),
            request::SET_CONFIG => {
                let (offset, bytes) = body.config()?;
                self.device.write_config(offset.into(), bytes);
            }
            request::GET_INFLIGHT_FD => return self.get_inflight(body.inflight()?, length),
            request::SET_INFLIGHT_FD => {
                let area = body.inflight()?;
                let fd = one_descriptor(kind, fds)?;
                self.set_inflight(area, fd)?;
            }
            request::RESET_DEVICE | request::RESET_OWNER => self.reset(),
            _ => return Err(Refusal::Unknown(kind)),
        }
        Ok(Answer::None)
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | F_PROTOCOL_FEATURES
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        if features & !self.offered() != 0 {
            return Err(Refusal::Features(features & !self.offered()));
        }
        self.rings.stop_all(Waiting::Abandon);
        self.features = features;
        self.device.negotiated(features);
        if features & F_PROTOCOL_FEATURES == 0 {
            // There is no message to enable them then.
            self.rings.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.start_due()
    }

    /// Changes memory while no queue uses it.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut Memory) -> Result<(), MemoryError>,
    ) -> Result<(), Refusal> {
        self.rings.stop_all(Waiting::Abandon);
        let changed = change(&mut self.memory);
        self.guest = self.memory.guest()?;
        changed?;
        if self.guest.is_some()
            && self.rings.wants_memory_held()
            && !self.memory.is_all_there()
            && !std::mem::replace(&mut self.told_of_memory, true)
        {
            tracing::warn!(
                "a vhost-user front-end's memory is not held, as it was not taken from the host in full (QEMU: prealloc=on)"
            );
        }
        self.start_due()
    }

    /// Changes a queue while it is not served.
    fn change_ring(&mut self, index: u64, change: impl FnOnce(&mut Rings, usize)) -> Result<(), Refusal> {
        let index = self.ring(index)?;
        self.rings.stop(index, Waiting::Abandon);
        change(&mut self.rings, index);
        self.start_due()
    }

    fn start_due(&mut self) -> Result<(), Refusal> {
        let events = Arc::clone(&self.channel) as Arc<dyn DeviceEvents>;
        self.rings.start_due(
            &self.device,
            &self.memory,
            self.guest.as_ref(),
            self.features,
            &events,
        )?;
        Ok(())
    }

    fn ring(&self, index: u64) -> Result<usize, Refusal> {
        usize::try_from(index)
            .ok()
            .filter(|index| *index < self.rings.rings.len())
            .ok_or(Refusal::NoQueue(index))
    }

    /// A queue's index and an eventfd, unless the driver is to do without.
    fn ring_event(
        &self,
        kind: u32,
        number: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<(u64, Option<EventFd>), Refusal> {
        const INDEX: u64 = 0xff;
        const NO_FD: u64 = 0x100;
        if number & NO_FD != 0 {
            expect_descriptors(kind, &fds, 0)?;
            return Ok((number & INDEX, None));
        }
        let event = event_fd(kind, one_descriptor(kind, fds)?)?;
        Ok((number & INDEX, Some(event)))
    }

    fn get_config(&self, body: Body<'_>) -> Result<Answer, Refusal> {
        let (offset, bytes) = body.config()?;
        if bytes.len() > MAX_CONFIG {
            // So the specification says "no".
            return Ok(Answer::Bytes(Vec::new()));
        }
        let mut space = vec![0; bytes.len()];
        self.device.read_config(offset.into(), &mut space);
        let size = u32::try_from(space.len()).unwrap_or(0);
        let head = [offset.to_le_bytes(), size.to_le_bytes(), [0; 4]].concat();
        Ok(Answer::Bytes([head, space].concat()))
    }

    /// Makes memory for the record of what is in flight; the front-end keeps it and gives it to the next server.
    fn get_inflight(&mut self, asked: InflightArea, length: usize) -> Result<Answer, Refusal> {
        let InflightArea { queues, entries, .. } = asked;
        let most = u16::try_from(self.rings.rings.len()).unwrap_or(u16::MAX);
        if !(1..=most).contains(&queues) || !(1..=MAX_QUEUE_SIZE).contains(&entries) {
            return Err(Refusal::Inflight(asked));
        }
        let size = record_length(queues, entries);
        let make = || -> io::Result<OwnedFd> {
            let file = memfd_create("smsvmm-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, size as u64)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        let file = make().map_err(|error| Refusal::Host("make the in-flight record", error))?;
        let area = InflightArea {
            size: size as u64,
            offset: 0,
            queues,
            entries,
        };
        let ours = file
            .try_clone()
            .map_err(|error| Refusal::Host("clone a descriptor", error))?;
        self.set_inflight(area, ours)?;
        let mut bytes = area.encode().to_vec();
        bytes.resize(length, 0);
        Ok(Answer::BytesAndFile(bytes, file))
    }

    fn set_inflight(&mut self, area: InflightArea, fd: OwnedFd) -> Result<(), Refusal> {
        let needed = u64::from(area.queues) * queue_length(area.entries) as u64;
        if area.size < needed || area.size > 1 << 30 || area.entries > MAX_QUEUE_SIZE {
            return Err(Refusal::Inflight(area));
        }
        self.rings.stop_all(Waiting::Abandon);
        let impossible = || {
            MemoryError::Numbers(Region {
                guest: 0,
                size: area.size,
                user: 0,
                offset: area.offset,
            })
        };
        let memory = map(fd, area.offset, area.size, impossible)?;
        let record = InflightRecord {
            _guard: Guard::new(memory.as_ptr() as usize, memory.size()),
            memory: Arc::new(memory),
            queues: area.queues,
            entries: area.entries,
        };
        if !record.continues(self.device.continuity()) {
            self.tell_of_a_gap();
        }
        self.rings.inflight = Some(record);
        self.start_due()
    }

    /// The front-end goes on with disks of which another server had answered what we may not have.
    fn tell_of_a_gap(&self) {
        let address = self.socket.local_addr().ok();
        // That of a manager's connections has no name, but the process is a machine's.
        let socket = address.as_ref().and_then(|address| address.as_pathname());
        let peer = rustix::net::sockopt::socket_peercred(&self.socket).ok();
        tracing::error!(
            socket = socket.map(|path| path.display().to_string()),
            process = peer.map(|peer| peer.pid.as_raw_nonzero().get()),
            "a server before this one was killed, and what it had answered to this front-end and not made durable was not found: disks at this \
             socket may lack some of it, and the guest does not know. Reset the machine and have its file systems checked; run servers of a pool as \
             one user, with the host's /dev/shm"
        );
    }

    fn reset(&mut self) {
        self.rings.stop_all(Waiting::Abandon);
        let inflight = self.rings.inflight.take();
        // What a device had taken before a reset is nobody's any more.
        if let Some(record) = &inflight {
            record.forget(self.device.continuity());
        }
        self.rings = self.rings.fresh();
        self.rings.inflight = inflight;
        self.features = 0;
        self.device.reset();
        self.device
            .connect(Arc::clone(&self.channel) as Arc<dyn DeviceEvents>);
    }
}

impl<D: ServedDevice> Drop for Session<D> {
    fn drop(&mut self) {
        // Before memory goes.
        self.rings.stop_all(self.rings.waiting());
        self.device.disconnect();
        // The front-end learns that it is alone only now. Others may have the socket as well, to end it.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Whether a request has an answer of its own.
fn answers(kind: u32) -> bool {
    matches!(
        kind,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_VRING_BASE
            | request::GET_CONFIG
            | request::GET_INFLIGHT_FD
            | request::GET_MAX_MEM_SLOTS
    )
}

fn expect_descriptors(request: u32, fds: &[OwnedFd], wanted: usize) -> Result<(), Refusal> {
    if fds.len() == wanted {
        Ok(())
    } else {
        Err(Refusal::Descriptors {
            request,
            found: fds.len(),
            wanted,
        })
    }
}

fn one_descriptor(request: u32, fds: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
    expect_descriptors(request, &fds, 1)?;
    fds.into_iter().next().ok_or(Refusal::Descriptors {
        request,
        found: 0,
        wanted: 1,
    })
}

/// Only an eventfd is always ready to be written or tells when it is not: nothing else may come to the worker.
fn event_fd(request: u32, fd: OwnedFd) -> Result<EventFd, Refusal> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = fs::read_link(link).map_err(|error| Refusal::Host("look at a descriptor", error))?;
    if target.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Refusal::NotEventFd(request));
    }
    fcntl_getfl(&fd)
        .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
        .map_err(|error| Refusal::Host("set up an eventfd", error.into()))?;
    // SAFETY: the descriptor is ours and is given away here.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}
