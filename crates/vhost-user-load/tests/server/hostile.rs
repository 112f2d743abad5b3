//! Front-ends that mean harm: they harm nobody but themselves.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::SendFlags;
use storage_virtualizer::vhost_user::VhostUserOptions;
use storage_virtualizer::vhost_user::message::{
    F_PROTOCOL_FEATURES, Header, Region, protocol_feature, request,
};
use storage_virtualizer::vhost_user::socket::{receive, send};
use vhost_user_load::load::run;

use crate::place::{Place, serve};

/// Names the process that is there for [`rubbish`].
const ALONE: &str = "SMSVMM_TEST_RUBBISH";

struct Villain(UnixStream);

impl Villain {
    fn connect(place: &Place) -> Self {
        let socket = UnixStream::connect(place.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(socket)
    }

    fn say(
        &self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        needs_reply: bool,
    ) -> std::io::Result<()> {
        let header = Header {
            request,
            is_reply: false,
            needs_reply,
            size: 0,
        };
        send(&self.0, header, body, fds, SendFlags::empty())
    }

    /// Says it, and hears whether it was obeyed; nothing if the server hung up.
    fn ask(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u64> {
        self.say(request, body, fds, true).ok()?;
        let answer = receive(&self.0).ok()?;
        Some(
            answer
                .body
                .first_chunk::<8>()
                .map_or(0, |number| u64::from_le_bytes(*number)),
        )
    }

    /// With acknowledgements, so that what follows is answered.
    fn polite(place: &Place) -> Self {
        let villain = Self::connect(place);
        let features = protocol_feature::REPLY_ACK
            | protocol_feature::MQ
            | protocol_feature::CONFIG
            | protocol_feature::INFLIGHT_SHMFD
            | protocol_feature::CONFIGURE_MEM_SLOTS;
        villain
            .say(
                request::SET_PROTOCOL_FEATURES,
                &features.to_le_bytes(),
                &[],
                false,
            )
            .unwrap();
        villain
    }

    fn refused(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(
            self.ask(request, body, fds),
            Some(1),
            "message {request} was obeyed"
        );
    }
}

fn memory(size: u64) -> File {
    let memory = memfd_create("villain", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, size).unwrap();
    File::from(memory)
}

fn region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    let region = Region {
        guest,
        size,
        user,
        offset,
    };
    [[0; 8].as_slice(), &region.encode()].concat()
}

fn state(index: u32, number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// What the descriptors of this process stand for, in order.
fn descriptors() -> Vec<String> {
    let listed = std::fs::read_dir("/proc/self/fd").unwrap();
    let name = |entry: std::fs::DirEntry| {
        let target = std::fs::read_link(entry.path());
        target.map_or_else(|error| error.to_string(), |to| to.display().to_string())
    };
    let mut names: Vec<_> = listed.map(|entry| name(entry.unwrap())).collect();
    names.sort_unstable();
    names
}

/// A decent front-end gets its work done.
fn all_is_well(place: &Place) {
    let mut load = place.load();
    load.duration = Duration::from_millis(100);
    run(&load).unwrap();
}

#[test]
fn memory_that_does_not_exist_is_refused() {
    let place = Place::new();
    let _served = place.serve();
    let villain = Villain::polite(&place);
    let small = memory(4096);
    let null = File::open("/dev/null").unwrap();
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    let add = |body: &[u8], fd: BorrowedFd<'_>| villain.refused(request::ADD_MEM_REG, body, &[fd]);
    add(&region(0, 8192, 0, 0), small.as_fd());
    add(&region(0, 4096, 0, 4096), small.as_fd());
    add(&region(0, 4096, 0, u64::MAX - 100), small.as_fd());
    add(&region(0, u64::MAX, 0, 0), small.as_fd());
    add(&region(0, 0, 0, 0), small.as_fd());
    add(&region(u64::MAX - 4095, 4096, 0, 0), small.as_fd());
    add(&region(0, 4096, u64::MAX - 100, 0), small.as_fd());
    add(&region(0, 100, 0, 3), small.as_fd());
    add(&region(0, 4096, 0, 0), null.as_fd());
    add(&region(0, 4096, 0, 0), pipe.as_fd());
    add(&region(0, 4096, 0, 0), read_only.as_fd());
    villain.refused(request::ADD_MEM_REG, &region(0, 4096, 0, 0), &[]);
    // Two that lie upon each other, then one that is not there.
    assert_eq!(
        villain.ask(request::ADD_MEM_REG, &region(0, 4096, 0, 0), &[small.as_fd()]),
        Some(0)
    );
    add(&region(2048, 4096, 8192, 0), small.as_fd());
    villain.refused(request::REM_MEM_REG, &region(1 << 30, 4096, 0, 0), &[]);
    drop(villain);
    all_is_well(&place);
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let place = Place::new();
    let _served = place.serve();
    let villain = Villain::polite(&place);
    for (index, number) in [(0, 0), (0, 3), (0, 2048), (0, 1 << 20), (4, 128), (u32::MAX, 128)] {
        villain.refused(request::SET_VRING_NUM, &state(index, number), &[]);
    }
    let null = File::open("/dev/null").unwrap();
    let number = 0_u64.to_le_bytes();
    for request in [
        request::SET_VRING_KICK,
        request::SET_VRING_CALL,
        request::SET_VRING_ERR,
    ] {
        villain.refused(request, &number, &[null.as_fd()]);
        villain.refused(request, &number, &[]);
        villain.refused(request, &200_u64.to_le_bytes(), &[null.as_fd()]);
    }
    // Everything but rings in memory.
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let file = memory(1 << 20);
    let features = (1_u64 << 32 | F_PROTOCOL_FEATURES).to_le_bytes();
    assert_eq!(villain.ask(request::SET_FEATURES, &features, &[]), Some(0));
    villain.refused(request::SET_FEATURES, &u64::MAX.to_le_bytes(), &[]);
    let ask = |request, body: &[u8], fds: &[BorrowedFd<'_>]| villain.ask(request, body, fds);
    assert_eq!(
        ask(
            request::ADD_MEM_REG,
            &region(0, 1 << 20, 0x1000, 0),
            &[file.as_fd()]
        ),
        Some(0)
    );
    assert_eq!(ask(request::SET_VRING_NUM, &state(0, 128), &[]), Some(0));
    assert_eq!(ask(request::SET_VRING_KICK, &number, &[event.as_fd()]), Some(0));
    let addresses = |descriptors: u64, used: u64, available: u64| {
        let mut body = [0; 40];
        body[8..16].copy_from_slice(&descriptors.to_le_bytes());
        body[16..24].copy_from_slice(&used.to_le_bytes());
        body[24..32].copy_from_slice(&available.to_le_bytes());
        body
    };
    assert_eq!(ask(request::SET_VRING_ENABLE, &state(0, 1), &[]), Some(0));
    for (descriptors, used, available) in [
        (0, 0x2000, 0x3000),
        (0x1000, u64::MAX, 0x3000),
        (0x10_0ff0, 0x2000, 0x3000),
        (0x1008, 0x2000, 0x3000),
    ] {
        let body = addresses(descriptors, used, available);
        villain.refused(request::SET_VRING_ADDR, &body, &[]);
    }
    drop(villain);
    all_is_well(&place);
}

/// In a process of its own: the descriptors of a process are those of all tests that run in it.
#[test]
fn rubbish_ends_the_connection_and_leaves_no_descriptor_behind() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hostile::rubbish", "--nocapture"])
        .env(ALONE, "")
        .output()
        .unwrap();
    let printed = [child.stdout, child.stderr].concat();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&printed));
}

/// Not a test of its own: the child of the one above.
#[test]
fn rubbish() {
    if std::env::var_os(ALONE).is_none() {
        return;
    }
    let place = Place::new();
    let other = Place::new();
    let served = place.serve();
    let served_too = serve(&other.image(), &other.socket(), VhostUserOptions::default());
    let file = memory(1 << 16);
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let before = descriptors();
    let mut random = 88_172_645_463_325_252_u64;
    let mut draw = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for round in 0..150 {
        let villain = if round % 2 == 0 {
            Villain::polite(&place)
        } else {
            Villain::connect(&place)
        };
        for _ in 0..20 {
            let kind = (draw() % 45) as u32;
            let length = [0, 8, 12, 20, 24, 40, 8 + 32, 12 + 60, 4096][draw() as usize % 9];
            let small = draw() % 3 != 0;
            let body: Vec<u8> = (0..length)
                .map(|_| if small { (draw() % 3) as u8 } else { draw() as u8 })
                .collect();
            let all = [file.as_fd(), event.as_fd(), file.as_fd()];
            let fds = &all[..draw() as usize % 4];
            if villain.say(kind, &body, fds, false).is_err() {
                break;
            }
        }
        if round % 10 == 0 {
            // Not even a header.
            let _ = std::io::Write::write_all(&mut &villain.0, &[0xff; 5]);
        }
    }
    all_is_well(&other);
    all_is_well(&place);
    let start = Instant::now();
    loop {
        let now = descriptors();
        let gone = [&served, &served_too]
            .iter()
            .all(|one| one.server.front_ends() == 0);
        if gone && now.len() == before.len() {
            break;
        }
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "there were {before:#?}\nthere are {now:#?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Starts a queue in memory that can be truncated, then truncates it and rings.
#[test]
fn memory_that_is_cut_off_under_a_queue_kills_nobody() {
    let place = Place::new();
    let other = Place::new();
    let _served = place.serve();
    let _other = serve(&other.image(), &other.socket(), VhostUserOptions::default());
    let villain = Villain::polite(&place);
    let file = memory(1 << 20);
    let kick: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let features = (1_u64 << 32 | F_PROTOCOL_FEATURES).to_le_bytes();
    let ask = |request, body: &[u8], fds: &[BorrowedFd<'_>]| {
        assert_eq!(villain.ask(request, body, fds), Some(0), "message {request}");
    };
    ask(request::SET_FEATURES, &features, &[]);
    ask(request::ADD_MEM_REG, &region(0, 1 << 20, 0, 0), &[file.as_fd()]);
    ask(request::SET_VRING_NUM, &state(0, 128), &[]);
    let mut addresses = [0; 40];
    addresses[16..24].copy_from_slice(&0x2000_u64.to_le_bytes());
    addresses[24..32].copy_from_slice(&0x3000_u64.to_le_bytes());
    ask(request::SET_VRING_ADDR, &addresses, &[]);
    ask(request::SET_VRING_KICK, &0_u64.to_le_bytes(), &[kick.as_fd()]);
    ask(request::SET_VRING_ENABLE, &state(0, 1), &[]);
    file.set_len(0).unwrap();
    for _ in 0..10 {
        rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    // Set up again upon what is not there.
    for request in [request::SET_VRING_NUM, request::SET_VRING_BASE] {
        assert!(villain.ask(request, &state(0, 128), &[]).is_some());
    }
    all_is_well(&other);
    drop(villain);
    all_is_well(&place);
}
