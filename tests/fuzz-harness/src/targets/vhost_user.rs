//! A vhost-user front-end that says anything, with any descriptors, and writes anything into the memory that it shares.
//!
//! Must hold: the server lives, lets go of the front-end when it hangs up, and of every descriptor that it was given.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arbitrary::Unstructured;
use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::SendFlags;
use storage_virtualizer::scsi::{Identity, TransportId, Unit, UnitOptions};
use storage_virtualizer::vhost_user::message::{Header, Region, request};
use storage_virtualizer::vhost_user::socket::send;
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserScsiServer, VhostUserServer};
use storage_virtualizer::virtio_scsi::{ScsiGroup, VirtioScsiOptions};
use vmm_sys_util::eventfd::EventFd;

use crate::patience::wait_until;

const MEMORY: u64 = 64 << 10;

struct Served {
    disk: VhostUserServer<Arc<HostDevice>>,
    adapter: VhostUserScsiServer<Arc<HostDevice>>,
    /// Of the disk and of the adapter.
    sockets: [PathBuf; 2],
    _worker: Worker,
}

/// The server of this process.
fn served() -> &'static Served {
    static SERVED: OnceLock<Served> = OnceLock::new();
    SERVED.get_or_init(|| {
        let path =
            |kind: &str| std::env::temp_dir().join(format!("fuzz-vhost-{}.{kind}", std::process::id()));
        let (image, sockets) = (path("img"), [path("sock"), path("scsi")]);
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(1 << 20).expect("an image's size");
        let disk = Arc::new(HostDevice::open(&image, &OpenOptions::default()).expect("a disk"));
        std::fs::remove_file(&image).expect("a name to remove");
        let worker = Worker::start("fuzz", WorkerOptions::default()).expect("an I/O worker");
        let workers = vec![worker.handle().clone()];
        let unit = Unit::new(UnitOptions::new(Identity::from_name("fuzz", "fuzz")));
        let (unit, own) = (Arc::new(unit), Arc::clone(&disk));
        let options = VirtioScsiOptions {
            initiator: TransportId::sas(1),
            queues: 1,
            queue_size: 128,
            last_target: 0,
        };
        let group = ScsiGroup::default();
        let adapter = VhostUserScsiServer::start(
            &sockets[1],
            &options,
            workers.clone(),
            &group,
            false,
            None,
            |adapter| adapter.add((0, 0), unit, own, Arc::default(), None),
        );
        let disk = VhostUserServer::start(&sockets[0], disk, VhostUserOptions::default(), workers);
        Served {
            disk: disk.expect("a server of a disk"),
            adapter: adapter.expect("a server of an adapter"),
            sockets,
            _worker: worker,
        }
    })
}

/// Descriptors of this process that lead to memory of front-ends. Other targets run beside this one, with files of their own.
fn memories() -> usize {
    let Ok(folder) = std::fs::read_dir("/proc/self/fd") else {
        return 0;
    };
    let is_memory = |link: PathBuf| {
        let link = link.to_string_lossy();
        link.contains("memfd:fuzz-front-end") || link.contains("memfd:smsvmm-inflight")
    };
    folder
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter(|link| is_memory(link.clone()))
        .count()
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let served = served();
    converse(served, input)?;
    wait_until("the front-end is gone", || {
        served.disk.front_ends() == 0 && !served.adapter.is_connected()
    });
    wait_until("its memory is let go of", || memories() == 0);
    Ok(())
}

fn converse(served: &Served, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let (place, queue) = match input.int_in_range(0..=5)? {
        queue @ 3..=5 => (1, queue - 3),
        _ => (0, 0),
    };
    let socket = UnixStream::connect(&served.sockets[place]).expect("a connection");
    // Answers are read by nobody; the server must not wait for ever to send them.
    socket
        .set_write_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout");
    let memory = memfd_create("fuzz-front-end", MemfdFlags::CLOEXEC).expect("memory");
    ftruncate(&memory, MEMORY).expect("memory's size");
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("an eventfd");
    // SAFETY: the descriptor is open as long as `event`, which outlives its use.
    let event_fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    if input.ratio(3, 4)? {
        for (kind, body, fds) in proper(&memory, event_fd, queue) {
            say(&socket, kind, &body, &fds);
        }
    }
    while !input.is_empty() {
        match input.int_in_range(0..=9)? {
            0 => {
                let at = input.int_in_range(0..=MEMORY)?;
                let bytes: [u8; 16] = input.arbitrary()?;
                // It may have been cut off.
                let _ = rustix::io::pwrite(&memory, &bytes, at);
            }
            1 => drop(event.write(1)),
            2 => drop(ftruncate(&memory, input.int_in_range(0..=2 * MEMORY)?)),
            3..=5 => {
                let proper = proper(&memory, event_fd, queue);
                let (kind, mut body, fds) = input.choose(&proper)?.clone();
                if let Some(byte) = body.len().checked_sub(1) {
                    let at = input.int_in_range(0..=byte)?;
                    body[at] = input.arbitrary()?;
                }
                say(&socket, kind, &body, &fds);
            }
            _ => {
                let kind = input.int_in_range(0..=45)?;
                let length = input.int_in_range(0..=80)?;
                let mut body = vec![0; length];
                input.fill_buffer(&mut body)?;
                let all = [memory.as_fd(), event_fd, memory.as_fd()];
                say(&socket, kind, &body, &all[..input.int_in_range(0..=3)?]);
            }
        }
    }
    Ok(())
}

/// A refused message ends the connection; what comes after it is lost.
fn say(socket: &UnixStream, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
    let header = Header {
        request,
        is_reply: false,
        needs_reply: false,
        size: 0,
    };
    drop(send(socket, header, body, fds, SendFlags::empty()));
}

type Message<'a> = (u32, Vec<u8>, Vec<BorrowedFd<'a>>);

/// What starts a queue whose rings lie in the shared memory.
fn proper<'a>(memory: &'a OwnedFd, event: BorrowedFd<'a>, queue: u32) -> Vec<Message<'a>> {
    let region = Region {
        guest: 0,
        size: MEMORY,
        user: 0,
        offset: 0,
    };
    let numbers = |numbers: &[u32]| {
        numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let addresses = numbers(&[queue, 0, 0, 0, 0x2000, 0, 0x3000, 0, 0, 0]);
    vec![
        (request::SET_FEATURES, numbers(&[0x7000_0000, 1]), vec![]),
        (
            request::ADD_MEM_REG,
            [[0; 8].as_slice(), &region.encode()].concat(),
            vec![memory.as_fd()],
        ),
        (
            request::GET_INFLIGHT_FD,
            numbers(&[0, 0, 0, 0, 0x0080_0001 + queue]),
            vec![],
        ),
        (request::SET_VRING_NUM, numbers(&[queue, 128]), vec![]),
        (request::SET_VRING_BASE, numbers(&[queue, 0]), vec![]),
        (request::SET_VRING_ADDR, addresses, vec![]),
        (request::SET_VRING_CALL, numbers(&[queue, 0]), vec![event]),
        (request::SET_VRING_KICK, numbers(&[queue, 0]), vec![event]),
        (request::SET_VRING_ENABLE, numbers(&[queue, 1]), vec![]),
        (request::GET_VRING_BASE, numbers(&[queue, 0]), vec![]),
    ]
}
