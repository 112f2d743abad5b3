//! A server of vhost-user-blk or vhost-user-scsi that answers anything, with any descriptors, at any time, and hangs up when it likes; its successors are no better.
//!
//! Must hold: the front-end lives, its device comes to rest when the server has hung up, it ends at once when it is told to, and no
//! descriptor stays that a server has sent.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arbitrary::Unstructured;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::SendFlags;
use storage_virtualizer::vhost_user::front_end::{
    Dial, Dialled, FrontEndKind, FrontEndOptions, LinkEvents, VhostUserDevice,
};
use storage_virtualizer::vhost_user::message::{
    F_PROTOCOL_FEATURES, Header, InflightArea, backend_request, config, request,
};
use storage_virtualizer::vhost_user::socket::{receive, send};
use storage_virtualizer::virtio_blk::blk_feature;
use virtio_core::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use virtio_core::{GuestMemory, VirtioDevice, feature};

use crate::device::activate;
use crate::memory::LOW_SIZE;
use crate::patience::{assert_no_panics, wait_until};
use crate::ring::{MAX_SIZE, Ring};

/// How long the front-end waits for an answer here.
const LIMIT: Duration = Duration::from_millis(20);
/// Bytes of what a server keeps of requests in flight.
const RECORD: u64 = 1 << 16;
const FEATURES: u64 = feature::VERSION_1 | feature::RING_EVENT_IDX | blk_feature::FLUSH | F_PROTOCOL_FEATURES;

/// The servers that follow each other: what each will do, and those that run.
#[derive(Default)]
struct Servers {
    scripts: Mutex<VecDeque<Vec<u8>>>,
    running: Mutex<Vec<(UnixStream, JoinHandle<()>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Servers {
    /// Connects to the next one, if there is one.
    fn dial(&self) -> io::Result<Dialled> {
        let script = lock(&self.scripts).pop_front();
        let script = script.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (socket, server) = UnixStream::pair()?;
        let (ours, theirs) = UnixStream::pair()?;
        for end in [&socket, &ours, &server] {
            end.set_read_timeout(Some(LIMIT))?;
            end.set_write_timeout(Some(LIMIT))?;
        }
        // A server waits for as long as its front-end likes.
        server.set_read_timeout(None)?;
        let cut = server.try_clone()?;
        let thread = std::thread::spawn(move || {
            serve(&server, &script);
        });
        lock(&self.running).push((cut, thread));
        Ok(Dialled { socket, ours, theirs })
    }

    /// All hang up.
    fn end(&self) {
        lock(&self.scripts).clear();
        for (socket, thread) in std::mem::take(&mut *lock(&self.running)) {
            // It may have done so itself.
            let _ = socket.shutdown(Shutdown::Both);
            assert!(thread.join().is_ok(), "the harness's server panicked");
        }
    }
}

impl LinkEvents for Servers {
    fn lost(&self, reason: &str) {
        assert!(!reason.is_empty());
    }

    fn back(&self) {}
}

/// What a decent server answers; nothing where it only confirms.
fn answer_to(kind: u32, body: &[u8]) -> Option<Vec<u8>> {
    let number = |number: u64| Some(number.to_le_bytes().to_vec());
    match kind {
        request::GET_FEATURES => number(FEATURES),
        request::GET_PROTOCOL_FEATURES => number(u64::MAX),
        request::GET_QUEUE_NUM => number(4),
        request::GET_CONFIG => {
            let mut space = vec![0; body.len().saturating_sub(12)];
            if let Some(sectors) = space.first_chunk_mut() {
                *sectors = 2048_u64.to_le_bytes();
            }
            Some(config(0, &space))
        }
        request::GET_VRING_BASE => Some(body.to_vec()),
        request::GET_INFLIGHT_FD => {
            let area = InflightArea {
                size: RECORD,
                offset: 0,
                queues: 1,
                entries: 64,
            };
            Some(area.encode_padded().to_vec())
        }
        _ => None,
    }
}

/// Answers until the front-end hangs up, or the script says so; a server whose script is over is decent.
fn serve(socket: &UnixStream, script: &[u8]) -> Option<()> {
    let mut script = Unstructured::new(script);
    let mut channel: Option<OwnedFd> = None;
    let record = memfd_create("fuzz-server-record", MemfdFlags::CLOEXEC).ok()?;
    ftruncate(&record, RECORD).ok()?;
    loop {
        let mut asked = receive(socket).ok()?;
        let kind = asked.header.request;
        if kind == request::SET_BACKEND_REQ_FD {
            channel = asked.fds.pop();
        }
        let reply = |request: u32| Header {
            request,
            is_reply: true,
            needs_reply: false,
            size: 0,
        };
        let proper = match answer_to(kind, &asked.body) {
            None if !asked.header.needs_reply => None,
            answer => Some(answer.unwrap_or_else(|| vec![0; 8])),
        };
        let files: &[BorrowedFd<'_>] = match kind {
            request::GET_INFLIGHT_FD => &[record.as_fd()],
            _ => &[],
        };
        let say = |header: Header, body: &[u8], files: &[BorrowedFd<'_>]| {
            send(socket, header, body, files, SendFlags::NOSIGNAL).ok()
        };
        match script.arbitrary::<u8>().unwrap_or(0) {
            // With a byte that is another.
            200..=214 => {
                let mut body = proper.unwrap_or_default();
                if let Some(last) = body.len().checked_sub(1) {
                    let at = script.int_in_range(0..=last).unwrap_or(0);
                    body[at] = script.arbitrary().unwrap_or(0xff);
                }
                say(reply(kind), &body, files)?;
            }
            // Of any length, with any descriptors.
            215..=224 => {
                let mut body = vec![0; script.int_in_range(0..=80).unwrap_or(0)];
                script.fill_buffer(&mut body).ok()?;
                let all = [record.as_fd(); 3];
                let count = script.int_in_range(0..=3).unwrap_or(0);
                say(reply(kind), &body, &all[..count])?;
            }
            // To another question, or no reply at all.
            225..=229 => {
                let header = Header {
                    is_reply: script.arbitrary().unwrap_or(false),
                    ..reply(script.int_in_range(0..=45).unwrap_or(0))
                };
                say(header, &[0; 8], files)?;
            }
            // Nothing.
            230..=232 => {}
            // Bytes.
            233..=235 => {
                let bytes: [u8; 24] = script.arbitrary().unwrap_or([0xaa; 24]);
                let length = script.int_in_range(1..=bytes.len()).unwrap_or(1);
                rustix::net::send(socket, &bytes[..length], SendFlags::NOSIGNAL).ok()?;
            }
            236..=239 => return None,
            // Of its own accord, on the way back that it was given, and then what it should.
            240..=255 => {
                if let Some(channel) = &channel {
                    let known = [backend_request::CONFIG_CHANGE_MSG, 0, 3, 7];
                    let header = Header {
                        request: *script.choose(&known).unwrap_or(&0),
                        is_reply: script.ratio(1, 8).unwrap_or(false),
                        needs_reply: script.arbitrary().unwrap_or(false),
                        size: 0,
                    };
                    let length = script.int_in_range(0..=20).unwrap_or(0);
                    let count = script.int_in_range(0..=1).unwrap_or(0);
                    let files = [record.as_fd()];
                    // The front-end may have let go of it.
                    let _ = send(
                        channel,
                        header,
                        &vec![0; length],
                        &files[..count],
                        SendFlags::NOSIGNAL,
                    );
                }
                if script.ratio(1, 16).unwrap_or(false) {
                    channel = None;
                }
                if let Some(body) = proper {
                    say(reply(kind), &body, files)?;
                }
            }
            _ => {
                if let Some(body) = proper {
                    say(reply(kind), &body, files)?;
                }
            }
        }
    }
}

/// Memory that can be shared with a server.
fn shared_memory() -> GuestMemory {
    let file = memfd_create("fuzz-guest", MemfdFlags::CLOEXEC).expect("memory");
    ftruncate(&file, LOW_SIZE).expect("memory's size");
    let place = FileOffset::new(file.into(), 0);
    let size = usize::try_from(LOW_SIZE).expect("a small size");
    let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), size, Some(place))]);
    Arc::new(memory.expect("one region"))
}

/// Descriptors of this process that a server has sent.
fn records() -> usize {
    let Ok(folder) = std::fs::read_dir("/proc/self/fd") else {
        return 0;
    };
    folder
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter(|link| link.to_string_lossy().contains("memfd:fuzz-server-record"))
        .count()
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let servers = Arc::new(Servers::default());
    for _ in 0..input.int_in_range(1..=3)? {
        let mut script = vec![0; input.int_in_range(0..=60)?];
        input.fill_buffer(&mut script)?;
        lock(&servers.scripts).push_back(script);
    }
    let dialler = Arc::clone(&servers);
    let dial: Dial = Arc::new(move || dialler.dial());
    let kind = *input.choose(&[FrontEndKind::Blk, FrontEndKind::Scsi])?;
    let options = FrontEndOptions {
        kind,
        name: "fuzz".to_owned(),
        queues: 1,
        queue_size: 64,
        on_start: None,
        observer: Arc::clone(&servers) as Arc<dyn LinkEvents>,
    };
    if let Ok(mut device) = VhostUserDevice::open(dial, options) {
        let memory = shared_memory();
        while !input.is_empty() && live(&mut device, kind, &memory, &servers, input)? {}
    }
    servers.end();
    wait_until("what servers sent is let go of", || records() == 0);
    assert_no_panics();
    Ok(())
}

/// One life of the device, from activation to reset; whether there can be another.
fn live(
    device: &mut VhostUserDevice,
    kind: FrontEndKind,
    memory: &GuestMemory,
    servers: &Servers,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<bool> {
    let mut ring = Ring::new(memory, 0, MAX_SIZE, true);
    // SCSI's first two are for control and events.
    let first = if kind == FrontEndKind::Scsi { 2 } else { 0 };
    let features = FEATURES & device.features();
    let (_events, active) = activate(device, memory, features, vec![ring.active(first)]);
    assert!(active);
    for _ in 0..input.int_in_range(0..=3)? {
        match input.int_in_range(0..=3)? {
            // The guest has a request, which nobody answers.
            0 => {
                ring.make_available(0);
                ring.publish();
            }
            1 => ring.ring_doorbell(),
            2 => {
                let mut bytes = [0; 8];
                device.read_config(input.int_in_range(0..=70)?, &mut bytes);
            }
            _ => std::thread::sleep(Duration::from_micros(input.int_in_range(0..=2000)?)),
        }
    }
    if input.ratio(1, 4)? {
        // The disk ends while it is in use.
        return Ok(false);
    }
    device.reset();
    let decent = input.ratio(3, 4)?;
    let mut rounds = 0;
    wait_until("the device to become idle", || {
        rounds += 1;
        // A server that does not say that its queues stand still may go on writing, until it hangs up.
        if !decent || rounds > 200 {
            let running = lock(&servers.running);
            running
                .iter()
                .for_each(|(socket, _)| drop(socket.shutdown(Shutdown::Both)));
        }
        device.is_idle()
    });
    Ok(true)
}
