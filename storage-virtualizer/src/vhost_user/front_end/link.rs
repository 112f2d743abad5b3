//! A connection to a server: what is agreed on, and what it is told to start and stop queues. In the order in which QEMU does it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_core::virtio_queue::QueueT;
use virtio_core::vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use virtio_core::{Activation, ActiveQueue, GuestMemory, feature};
use vmm_sys_util::eventfd::EventFd;

use super::super::client::{Client, ClientError};
use super::super::message::{
    self, Body, F_PROTOCOL_FEATURES, InflightArea, MAX_TABLE_REGIONS, Region, RingAddresses,
    protocol_feature, request,
};
use super::FrontEndKind;
use crate::virtio_blk::blk_feature;
use crate::virtio_scsi::scsi_feature;

/// The most bytes of the configuration space that are shown to the guest.
pub(super) const CONFIG_LENGTH: usize = 60;
/// How long a server may take for an answer. Longer than ours keeps a second front-end waiting before it hangs up.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// Where the server is told that we see guest address 0: any address will do, as it only translates. It is not our own, which
/// is nobody's business.
const USER_BASE: u64 = 1 << 46;

/// What is passed on to the guest, of what a server of virtio-blk offers. Not CONFIG_WCE: the driver may rely on what it sets at once, and
/// the server would hear of it a little later.
const BLK_FEATURES: u64 = feature::RING_INDIRECT_DESC
    | feature::RING_EVENT_IDX
    | blk_feature::SIZE_MAX
    | blk_feature::SEG_MAX
    | blk_feature::GEOMETRY
    | blk_feature::RO
    | blk_feature::BLK_SIZE
    | blk_feature::FLUSH
    | blk_feature::TOPOLOGY
    | blk_feature::MQ
    | blk_feature::DISCARD
    | blk_feature::WRITE_ZEROES;

/// The same of a server of virtio-scsi.
const SCSI_FEATURES: u64 =
    feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX | scsi_feature::HOTPLUG | scsi_feature::CHANGE;

impl FrontEndKind {
    fn features(self) -> u64 {
        match self {
            Self::Blk => BLK_FEATURES,
            Self::Scsi => SCSI_FEATURES,
        }
    }

    /// Bytes of the configuration space: up to the fields of WRITE_ZEROES (virtio 1.2 §5.2.4), all of §5.6.4.
    fn config_length(self) -> usize {
        match self {
            Self::Blk => CONFIG_LENGTH,
            Self::Scsi => 36,
        }
    }
}

const PROTOCOL_FEATURES: u64 = protocol_feature::MQ
    | protocol_feature::REPLY_ACK
    | protocol_feature::BACKEND_REQ
    | protocol_feature::CONFIG
    | protocol_feature::INFLIGHT_SHMFD
    | protocol_feature::RESET_DEVICE;

/// Why a server cannot be used, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers at the socket.
    #[error("nobody serves there")]
    Connect(#[source] io::Error),
    /// It does not speak as it should.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It lacks what is needed.
    #[error("it has no {0}")]
    Lacks(&'static str),
    /// It is smaller than its successor should be.
    #[error("it offers features {now:#x}, and the guest knows the disk with {before:#x}")]
    Offer {
        /// What it offers.
        now: u64,
        /// What was offered at first.
        before: u64,
    },
    /// Too few queues.
    #[error(
        "it has {offered} queues, and the disk is to have {wanted}; give the server more or the disk fewer"
    )]
    Queues {
        /// What it has.
        offered: u64,
        /// What is wanted.
        wanted: u16,
    },
    /// It does not say how large the disk is.
    #[error("it answered {} bytes of the configuration space, which are not those that were asked for", .0)]
    Config(usize),
    /// The record of what is in flight did not come.
    #[error("its record of what is in flight came without memory")]
    NoRecord,
    /// Guest memory cannot be shared.
    #[error(
        "guest memory is not shared with other processes, or lies in more than {MAX_TABLE_REGIONS} pieces"
    )]
    Memory,
    /// It spoke without being asked.
    #[error("it sent message {0} without being asked")]
    Unasked(u32),
    /// It hung up.
    #[error("it closed the connection")]
    Closed,
    /// This host refuses something.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

/// A connection that was just made: the way to the server, and one back for what it has to say.
#[derive(Debug)]
pub struct Dialled {
    /// To the server, with time-outs.
    pub socket: UnixStream,
    /// Our end of the way back, with time-outs.
    pub ours: UnixStream,
    /// The server's end of it.
    pub theirs: UnixStream,
}

/// Connects to the server at `path`. Does not wait for one that does not accept.
///
/// # Errors
/// Nobody serves there, or the system is out of descriptors.
pub fn dial(path: &Path) -> io::Result<Dialled> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    let (ours, theirs) = UnixStream::pair()?;
    for end in [&socket, &ours] {
        end.set_read_timeout(Some(ANSWER_LIMIT))?;
        end.set_write_timeout(Some(ANSWER_LIMIT))?;
    }
    Ok(Dialled { socket, ours, theirs })
}

/// What a server offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    /// Those that we know.
    pub(super) features: u64,
    pub(super) queues: u64,
    pub(super) config: [u8; CONFIG_LENGTH],
}

impl Offer {
    /// Whether a guest that knows `first` can go on with this.
    pub(super) fn can_follow(&self, first: &Offer, queues: u16) -> Result<(), LinkError> {
        let missing = first.features & !self.features != 0;
        if missing || (first.features ^ self.features) & blk_feature::RO != 0 {
            return Err(LinkError::Offer {
                now: self.features,
                before: first.features,
            });
        }
        self.has_queues(queues)
    }

    pub(super) fn has_queues(&self, wanted: u16) -> Result<(), LinkError> {
        if self.queues < u64::from(wanted) {
            let offered = self.queues;
            return Err(LinkError::Queues { offered, wanted });
        }
        Ok(())
    }
}

/// The record of what is in flight: the server's, kept here for its successor.
#[derive(Debug)]
pub(super) struct Record {
    area: InflightArea,
    fd: OwnedFd,
}

/// A server that is connected and understood.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: Client,
    kind: FrontEndKind,
    /// Where the server tells of changes; none when it has closed it.
    pub(super) channel: Option<UnixStream>,
}

impl Link {
    /// Finds out what the server is.
    pub(super) fn new(dialled: Dialled, kind: FrontEndKind) -> Result<(Self, Offer), LinkError> {
        let Dialled { socket, ours, theirs } = dialled;
        let mut client = Client::new(socket);
        let features = client.ask_number(request::GET_FEATURES)?;
        if features & feature::VERSION_1 == 0 {
            return Err(LinkError::Lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(LinkError::Lacks(
                "protocol features (VHOST_USER_F_PROTOCOL_FEATURES)",
            ));
        }
        client.agree(PROTOCOL_FEATURES)?;
        if !client.has(protocol_feature::CONFIG) {
            return Err(LinkError::Lacks(
                "configuration space (VHOST_USER_PROTOCOL_F_CONFIG)",
            ));
        }
        let queues = if client.has(protocol_feature::MQ) {
            client.ask_number(request::GET_QUEUE_NUM)?
        } else {
            1
        };
        client.tell(request::SET_OWNER, &[], &[])?;
        if client.has(protocol_feature::BACKEND_REQ) {
            client.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        }
        let link = Self {
            client,
            kind,
            channel: Some(ours),
        };
        let offer = Offer {
            features: features & kind.features(),
            queues,
            config: link.config()?,
        };
        Ok((link, offer))
    }

    /// Reads the configuration space.
    pub(super) fn config(&self) -> Result<[u8; CONFIG_LENGTH], LinkError> {
        let length = self.kind.config_length();
        let body = message::config(0, &[0; CONFIG_LENGTH][..length]);
        let answer = self.client.ask(request::GET_CONFIG, &body)?;
        if answer.body.is_empty() {
            return Err(LinkError::Config(0));
        }
        let (_, space) = Body::new(request::GET_CONFIG, &answer.body)
            .config()
            .map_err(ClientError::from)?;
        if space.len() != length {
            return Err(LinkError::Config(space.len()));
        }
        let mut config = [0; CONFIG_LENGTH];
        config[..length].copy_from_slice(space);
        Ok(config)
    }

    /// Whether the server keeps a record of what is in flight.
    pub(super) fn keeps_record(&self) -> bool {
        self.client.has(protocol_feature::INFLIGHT_SHMFD)
    }

    /// Tells the server what the queues of `activation` need. `record` is what an earlier server left, or becomes one.
    pub(super) fn prepare(
        &self,
        activation: &Activation,
        record: &mut Option<Record>,
    ) -> Result<(), LinkError> {
        let features = activation.features | F_PROTOCOL_FEATURES;
        self.client
            .tell(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        if self.keeps_record() {
            self.share_record(&activation.queues, record)?;
        }
        share_memory(&self.client, &activation.memory)
    }

    /// Has the server serve the queues of `activation` from now on; it writes to `errors` when one is broken.
    pub(super) fn start(&self, activation: &Activation, errors: &EventFd) -> Result<(), LinkError> {
        let client = &self.client;
        for queue in &activation.queues {
            start_queue(client, &activation.memory, queue, errors)?;
        }
        for queue in &activation.queues {
            let body = message::ring_state(queue.index.into(), 1);
            client.tell(request::SET_VRING_ENABLE, &body, &[])?;
        }
        if !client.has(protocol_feature::REPLY_ACK) {
            // Who obeys in silence has obeyed when it answers the next question.
            client.ask_number(request::GET_FEATURES)?;
        }
        Ok(())
    }

    fn share_record(&self, queues: &[ActiveQueue], record: &mut Option<Record>) -> Result<(), LinkError> {
        if record.is_none() {
            let asked = InflightArea {
                size: 0,
                offset: 0,
                queues: queues.iter().map(|queue| queue.index + 1).max().unwrap_or(1),
                entries: queues.iter().map(|queue| queue.queue.size()).max().unwrap_or(1),
            };
            let mut answer = self
                .client
                .ask(request::GET_INFLIGHT_FD, &asked.encode_padded())?;
            let area = Body::new(request::GET_INFLIGHT_FD, &answer.body)
                .inflight()
                .map_err(ClientError::from)?;
            let fd = answer.fds.pop().ok_or(LinkError::NoRecord)?;
            *record = Some(Record { area, fd });
        }
        if let Some(Record { area, fd }) = record {
            let body = area.encode_padded();
            self.client.tell(request::SET_INFLIGHT_FD, &body, &[fd.as_fd()])?;
        }
        Ok(())
    }

    /// Asks the server to stop queue `index`; the answer, to be waited for by who asks, comes when nothing of it is in flight.
    pub(super) fn ask_to_stop(&self, index: u16) -> Result<(), LinkError> {
        let body = message::ring_state(index.into(), 0);
        Ok(self.client.send(request::GET_VRING_BASE, &body, &[], false)?)
    }

    /// Has a device that stands still forget what its driver set.
    pub(super) fn forget(&self) -> Result<(), LinkError> {
        if self.client.has(protocol_feature::RESET_DEVICE) {
            self.client.tell(request::RESET_DEVICE, &[], &[])?;
        }
        Ok(())
    }
}

fn share_memory(client: &Client, memory: &GuestMemory) -> Result<(), LinkError> {
    let mut regions = Vec::new();
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(LinkError::Memory)?;
        let guest = region.start_addr().raw_value();
        regions.push(Region {
            guest,
            size: region.len(),
            user: USER_BASE + guest,
            offset: file.start(),
        });
        files.push(file.file().as_fd());
    }
    if regions.len() > MAX_TABLE_REGIONS {
        return Err(LinkError::Memory);
    }
    Ok(client.tell(request::SET_MEM_TABLE, &message::memory_table(&regions), &files)?)
}

fn start_queue(
    client: &Client,
    memory: &GuestMemory,
    active: &ActiveQueue,
    errors: &EventFd,
) -> Result<(), LinkError> {
    let ActiveQueue {
        index,
        queue,
        kick,
        call,
    } = active;
    let index = u32::from(*index);
    let state = |number: u16| message::ring_state(index, number.into());
    client.tell(request::SET_VRING_NUM, &state(queue.size()), &[])?;
    // Of a queue that is new both indices are 0. A server with a record knows better where to go on, and without one nothing
    // is in flight.
    client.tell(request::SET_VRING_BASE, &state(used_index(queue, memory)), &[])?;
    let addresses = RingAddresses {
        descriptors: USER_BASE + queue.desc_table(),
        used: USER_BASE + queue.used_ring(),
        available: USER_BASE + queue.avail_ring(),
    };
    client.tell(request::SET_VRING_ADDR, &addresses.encode(index), &[])?;
    let number = u64::from(index).to_le_bytes();
    client.tell(request::SET_VRING_CALL, &number, &[borrow(call)])?;
    client.tell(request::SET_VRING_ERR, &number, &[borrow(errors)])?;
    Ok(client.tell(request::SET_VRING_KICK, &number, &[borrow(kick)])?)
}

/// How many requests of `queue` were answered, modulo 2^16.
fn used_index(queue: &impl QueueT, memory: &GuestMemory) -> u16 {
    // The transport has seen that the rings are in guest memory, which does not change.
    queue
        .used_idx(&**memory, Ordering::Acquire)
        .map_or(0, |index| index.0)
}

/// Requests of `queue` that were not answered.
pub(super) fn unanswered(queue: &impl QueueT, memory: &GuestMemory) -> u16 {
    let available = queue
        .avail_idx(&**memory, Ordering::Acquire)
        .map_or(0, |index| index.0);
    available.wrapping_sub(used_index(queue, memory))
}

pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(features: u64, queues: u64) -> Offer {
        Offer {
            features,
            queues,
            config: [0; CONFIG_LENGTH],
        }
    }

    #[test]
    fn a_successor_offers_as_much_or_is_refused() {
        let known = blk_feature::FLUSH | blk_feature::MQ;
        let first = offer(known, 4);
        assert!(first.can_follow(&first, 4).is_ok());
        assert!(
            offer(known | blk_feature::DISCARD, 8)
                .can_follow(&first, 4)
                .is_ok()
        );
        for features in [blk_feature::MQ, known | blk_feature::RO] {
            let refused = offer(features, 4).can_follow(&first, 4);
            assert!(matches!(refused, Err(LinkError::Offer { .. })), "{features:#x}");
        }
        let refused = offer(known, 3).can_follow(&first, 4);
        assert!(matches!(
            refused,
            Err(LinkError::Queues {
                offered: 3,
                wanted: 4
            })
        ));
    }
}
