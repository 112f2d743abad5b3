//! The connection to the server: what QEMU's vhost-user-blk device says, in the same order.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use storage_virtualizer::vhost_user::client::Client;
use storage_virtualizer::vhost_user::message::{
    self, Body, F_PROTOCOL_FEATURES, InflightArea, Region, RingAddresses, protocol_feature, request,
};
use storage_virtualizer::virtio_blk::blk_feature;
use virtio_core::feature;
use virtio_core::vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::queue::{Layout, Queue};

/// Where the front-end claims to see its memory: any address will do, as only the server's translation uses it.
const USER_BASE: u64 = 0x7f00_0000_0000;
/// Bytes of a virtio-blk configuration space.
const CONFIG_LENGTH: usize = 60;

/// What is asked of the server.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// Virtqueues.
    pub queues: u16,
    /// Entries of each, a power of two.
    pub queue_size: u16,
    /// Bytes of the largest request.
    pub block_size: u32,
    /// Bytes of each segment of a request's data, none of which follows the one before; all of it is one by default.
    pub segment: Option<u32>,
    /// Have the server keep a record of what is in flight, if it can.
    pub inflight: bool,
    /// How long to wait for a server that is not there.
    pub patience: Duration,
    /// What is said on a new connection before it speaks vhost-user.
    pub greeting: Option<Greeting>,
}

/// What is said on a new connection before it speaks vhost-user, for servers that are asked for a disk. An error means: not now.
#[derive(Clone)]
pub struct Greeting(pub Arc<Greet>);

/// What a [`Greeting`] does.
pub type Greet = dyn Fn(&UnixStream) -> Result<()> + Send + Sync;

impl fmt::Debug for Greeting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Greeting")
    }
}

/// The guest's memory and virtqueues, and the server that uses them.
#[derive(Debug)]
pub struct FrontEnd {
    options: Options,
    client: Client,
    memory: File,
    size: u64,
    mapping: Arc<MmapRegion>,
    layouts: Vec<Layout>,
    events: Vec<(EventFd, EventFd)>,
    inflight: Option<(InflightArea, OwnedFd)>,
    features: u64,
    capacity: u64,
    read_only: bool,
}

impl FrontEnd {
    /// Connects, shares memory, starts all queues.
    ///
    /// # Errors
    /// There is no server, or it cannot do what is needed.
    pub fn connect(options: &Options) -> Result<Self> {
        ensure!(
            options.queue_size.is_power_of_two(),
            "a queue has a power of two entries"
        );
        let mut layouts = Vec::new();
        let mut end = 0;
        for _ in 0..options.queues {
            let block_size = options.block_size;
            let segment = options.segment.unwrap_or(block_size);
            let layout = Layout::new(end, options.queue_size, block_size, segment)?;
            end = layout.end();
            layouts.push(layout);
        }
        let size = end.next_multiple_of(2 << 20);
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, size as u64)?;
        // All of it is there from the start: a server may hold it.
        fallocate(&memory, FallocateFlags::empty(), 0, size as u64)?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW)?;
        let memory = File::from(memory);
        let mapping = MmapRegion::from_file(FileOffset::new(memory.try_clone()?, 0), size)
            .map_err(|error| anyhow::anyhow!("cannot map the memory: {error}"))?;
        let events = (0..options.queues)
            .map(|_| Ok((EventFd::new(0)?, EventFd::new(0)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut front_end = Self {
            client: Client::new(dial(options, options.patience)?),
            options: options.clone(),
            memory,
            size: size as u64,
            mapping: Arc::new(mapping),
            layouts,
            events,
            inflight: None,
            features: 0,
            capacity: 0,
            read_only: false,
        };
        front_end.set_up()?;
        Ok(front_end)
    }

    /// The driver's side of all queues; once.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn queues(&self) -> Result<Vec<Queue>> {
        let has = |feature| self.features & feature != 0;
        self.layouts
            .iter()
            .zip(&self.events)
            .map(|(layout, (kick, call))| {
                Ok(Queue::new(
                    Arc::clone(&self.mapping),
                    *layout,
                    kick.try_clone()?,
                    call.try_clone()?,
                    has(feature::RING_EVENT_IDX),
                    has(feature::RING_INDIRECT_DESC),
                ))
            })
            .collect()
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether the disk takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the server keeps a record of what is in flight.
    pub fn has_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    /// The socket, to notice that the server has gone.
    pub fn socket(&self) -> &UnixStream {
        self.client.socket()
    }

    /// Stops all queues, as at power-off; waits until nothing is in flight.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn stop(&mut self) -> Result<()> {
        for index in 0..self.options.queues {
            let body = message::ring_state(index.into(), 0);
            self.client.ask(request::GET_VRING_BASE, &body)?;
        }
        Ok(())
    }

    /// Connects again to a server that was restarted; the queues go on.
    ///
    /// # Errors
    /// There is no server within [`Options::patience`], or it cannot do what the first one did.
    pub fn reconnect(&mut self) -> Result<()> {
        let end = Instant::now() + self.options.patience;
        loop {
            let again =
                dial(&self.options, end.saturating_duration_since(Instant::now())).and_then(|socket| {
                    self.client = Client::new(socket);
                    self.set_up()
                });
            match again {
                Ok(()) => return Ok(()),
                // It may have been the old one's last breath.
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn set_up(&mut self) -> Result<()> {
        let offered = self.client.ask_number(request::GET_FEATURES)?;
        ensure!(
            offered & F_PROTOCOL_FEATURES != 0,
            "the server has no protocol features"
        );
        let wanted = feature::VERSION_1
            | feature::RING_EVENT_IDX
            | feature::RING_INDIRECT_DESC
            | F_PROTOCOL_FEATURES
            | blk_feature::FLUSH
            | blk_feature::SEG_MAX
            | blk_feature::BLK_SIZE
            | blk_feature::MQ
            | blk_feature::RO
            | blk_feature::DISCARD
            | blk_feature::WRITE_ZEROES;
        self.features = offered & wanted;
        self.read_only = offered & blk_feature::RO != 0;
        let mut wanted = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::CONFIG;
        if self.options.inflight {
            wanted |= protocol_feature::INFLIGHT_SHMFD;
        }
        self.client.agree(wanted)?;
        if self.client.has(protocol_feature::MQ) {
            let queues = self.client.ask_number(request::GET_QUEUE_NUM)?;
            ensure!(
                queues >= u64::from(self.options.queues),
                "the server has {queues} queues only"
            );
        }
        self.client.tell(request::SET_OWNER, &[], &[])?;
        self.read_config()?;
        self.set_up_inflight()?;
        let features = self.features.to_le_bytes();
        self.client.tell(request::SET_FEATURES, &features, &[])?;
        self.share_memory()?;
        (0..self.options.queues).try_for_each(|index| self.start_queue(index))?;
        // What was made available meanwhile has been announced to a server that is gone.
        for (kick, _) in &self.events {
            kick.write(1)?;
        }
        Ok(())
    }

    fn read_config(&mut self) -> Result<()> {
        let body = message::config(0, &[0; CONFIG_LENGTH]);
        let answer = self.client.ask(request::GET_CONFIG, &body)?;
        let (_, space) = Body::new(request::GET_CONFIG, &answer.body).config()?;
        let sectors = space.first_chunk::<8>().context("no capacity")?;
        self.capacity = u64::from_le_bytes(*sectors) * 512;
        Ok(())
    }

    fn set_up_inflight(&mut self) -> Result<()> {
        if !self.client.has(protocol_feature::INFLIGHT_SHMFD) {
            return Ok(());
        }
        if self.inflight.is_none() {
            let asked = InflightArea {
                size: 0,
                offset: 0,
                queues: self.options.queues,
                entries: self.options.queue_size,
            };
            let mut answer = self
                .client
                .ask(request::GET_INFLIGHT_FD, &asked.encode_padded())?;
            let area = Body::new(request::GET_INFLIGHT_FD, &answer.body).inflight()?;
            let fd = answer
                .fds
                .pop()
                .context("no descriptor of the in-flight record")?;
            self.inflight = Some((area, fd));
        }
        if let Some((area, fd)) = &self.inflight {
            let body = area.encode_padded();
            self.client.tell(request::SET_INFLIGHT_FD, &body, &[fd.as_fd()])?;
        }
        Ok(())
    }

    fn share_memory(&self) -> Result<()> {
        let region = Region {
            guest: 0,
            size: self.size,
            user: USER_BASE,
            offset: 0,
        };
        let body = message::memory_table(&[region]);
        let memory = [self.memory.as_fd()];
        Ok(self.client.tell(request::SET_MEM_TABLE, &body, &memory)?)
    }

    fn start_queue(&self, index: u16) -> Result<()> {
        let layout = &self.layouts[usize::from(index)];
        let (kick, call) = &self.events[usize::from(index)];
        let tell = |request, body: &[u8], fds: &[BorrowedFd<'_>]| self.client.tell(request, body, fds);
        let state = |number: u32| message::ring_state(index.into(), number);
        tell(request::SET_VRING_NUM, &state(layout.entries.into()), &[])?;
        // Like QEMU after its back-end has gone: what was not answered is to be done.
        let used = layout.used_index(&self.mapping);
        tell(request::SET_VRING_BASE, &state(used.into()), &[])?;
        let user = |offset: usize| USER_BASE + offset as u64;
        let addresses = RingAddresses {
            descriptors: user(layout.descriptors()),
            used: user(layout.used()),
            available: user(layout.available()),
        };
        tell(request::SET_VRING_ADDR, &addresses.encode(index.into()), &[])?;
        let number = u64::from(index).to_le_bytes();
        tell(request::SET_VRING_CALL, &number, &[borrow(call)])?;
        tell(request::SET_VRING_KICK, &number, &[borrow(kick)])?;
        Ok(tell(request::SET_VRING_ENABLE, &state(1), &[])?)
    }
}

pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn dial(options: &Options, patience: Duration) -> Result<UnixStream> {
    let end = Instant::now() + patience;
    loop {
        match call(options) {
            Ok(socket) => return Ok(socket),
            Err(error) if Instant::now() >= end => {
                return Err(error).with_context(|| format!("no server at {}", options.socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn call(options: &Options) -> Result<UnixStream> {
    let socket = UnixStream::connect(&options.socket)?;
    // A server that does not answer is a failure, not a reason to wait for ever.
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    if let Some(Greeting(greet)) = &options.greeting {
        greet(&socket)?;
    }
    Ok(socket)
}
