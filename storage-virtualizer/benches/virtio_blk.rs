//! What a request of a guest costs from the doorbell to the interrupt, without a guest: this thread is the driver.
//!
//! ```text
//! cargo bench -p storage-virtualizer --bench virtio_blk -- [FILE OR DIRECTORY] [--seconds N] [--load NAME] [--busy-poll-us N]
//! ```
//! CPU time is that of the worker's thread alone. Doorbells and interrupts are what the guest would pay for in VM exits.

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench fails by panicking")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a bench"
)]

#[path = "../tests/driver/mod.rs"]
mod driver;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};
use driver::{Driver, activate, memory, readable, reset_and_wait, writable};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, blk_feature, kind};
use virtio_core::vm_memory::{Bytes, GuestAddress};
use virtio_core::{GuestMemory, feature};

const SIZE: u64 = 1 << 30;
const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x18_0000;
const DATA: u64 = 0x20_0000;

struct Load {
    name: &'static str,
    kind: u32,
    block: usize,
    depth: u16,
}

const LOADS: [Load; 6] = [
    Load {
        name: "rr1",
        kind: kind::IN,
        block: 4096,
        depth: 1,
    },
    Load {
        name: "rw1",
        kind: kind::OUT,
        block: 4096,
        depth: 1,
    },
    Load {
        name: "rr32",
        kind: kind::IN,
        block: 4096,
        depth: 32,
    },
    Load {
        name: "rw32",
        kind: kind::OUT,
        block: 4096,
        depth: 32,
    },
    Load {
        name: "r128",
        kind: kind::IN,
        block: 131_072,
        depth: 32,
    },
    Load {
        name: "w128",
        kind: kind::OUT,
        block: 131_072,
        depth: 32,
    },
];

fn main() {
    let mut place = std::env::temp_dir();
    let (mut seconds, mut only, mut busy_poll) = (2.0, None, Duration::ZERO);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => seconds = arguments.next().unwrap().parse().unwrap(),
            "--busy-poll-us" => busy_poll = Duration::from_micros(arguments.next().unwrap().parse().unwrap()),
            "--load" => only = arguments.next(),
            path => place = PathBuf::from(path),
        }
    }
    let file = if place.is_dir() {
        place.join("virtio-blk-bench.img")
    } else {
        place.clone()
    };
    prepare(&file);
    println!("{}", file.display());
    println!("load |     IOPS  CPU µs/IO  doorbells/IO  interrupts/IO");
    for load in LOADS {
        if only.as_ref().is_none_or(|only| *only == load.name) {
            run(&file, &load, seconds, busy_poll);
        }
    }
    if place.is_dir() {
        std::fs::remove_file(&file).unwrap();
    }
}

fn prepare(path: &std::path::Path) {
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .unwrap();
    let block = vec![0; 1 << 20];
    for offset in (0..SIZE).step_by(block.len()) {
        std::os::unix::fs::FileExt::write_all_at(&file, &block, offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// User and system time of a thread, in seconds.
fn cpu_time(thread: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

struct Generator {
    driver: Driver,
    memory: GuestMemory,
    random: u64,
    kind: u32,
    block: usize,
}

impl Generator {
    fn store(&self, slot: u16) {
        let header = HEADERS + u64::from(slot) * 16;
        let data = DATA + u64::from(slot) * self.block as u64;
        let data = if self.kind == kind::IN {
            writable(data, self.block)
        } else {
            readable(data, self.block)
        };
        let chain = [readable(header, 16), data, writable(STATUS + u64::from(slot), 1)];
        self.driver.store_chain(slot * 3, &chain);
        self.memory.write_obj(self.kind, GuestAddress(header)).unwrap();
    }

    fn add(&mut self, slot: u16) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let sector = self.random % (SIZE / self.block as u64) * (self.block as u64 / 512);
        self.memory
            .write_obj(sector, GuestAddress(HEADERS + u64::from(slot) * 16 + 8))
            .unwrap();
        self.driver.add(slot * 3);
    }
}

fn run(path: &std::path::Path, load: &Load, seconds: f64, busy_poll: Duration) {
    let worker = Worker::start(
        "bench",
        WorkerOptions {
            busy_poll,
            ..Default::default()
        },
    )
    .unwrap();
    // SAFETY: gettid has no preconditions.
    let thread = worker.run(|| async { unsafe { libc::gettid() } });
    let disk = Arc::new(HostDevice::open(path, &OpenOptions::default()).unwrap());
    let options = VirtioBlkOptions::default();
    let mut device = VirtioBlk::new(disk, &options, vec![worker.handle().clone()]).unwrap();
    let memory = memory(64 << 20);
    let driver = Driver::new(&memory, 0x1000, 256, true);
    activate(
        &mut device,
        &memory,
        feature::RING_EVENT_IDX | blk_feature::FLUSH,
        vec![driver.active(0)],
    );
    let mut generator = Generator {
        driver,
        memory,
        random: 88_172_645_463_325_252,
        kind: load.kind,
        block: load.block,
    };
    for slot in 0..load.depth {
        generator.store(slot);
        generator.add(slot);
    }
    let (mut requests, mut doorbells) = (0_u64, 0_u64);
    let mut published = 0;
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(seconds);
    let cpu = cpu_time(thread);
    loop {
        generator.driver.publish();
        if generator.driver.needs_kick(published) {
            generator.driver.kick();
            doorbells += 1;
        }
        published = generator.driver.available_index();
        let mut any = false;
        while !any {
            while let Some((head, _)) = generator.driver.take_used() {
                requests += 1;
                generator.add(head / 3);
                any = true;
            }
            if !any {
                generator.driver.enable_interrupt();
                if generator.driver.used_index() == published.wrapping_sub(load.depth) {
                    assert!(generator.driver.wait_for_interrupt(driver::PATIENCE));
                }
            }
        }
        if requests.is_multiple_of(64) && Instant::now() >= end {
            break;
        }
    }
    let elapsed = start.elapsed().as_secs_f64();
    let used = cpu_time(thread) - cpu;
    let per = |count: u64| count as f64 / requests as f64;
    println!(
        "{:4} | {:8.0} {:10.2} {:13.3} {:14.3}",
        load.name,
        requests as f64 / elapsed,
        used * 1e6 / requests as f64,
        per(doorbells),
        per(device.handle().counters()[0].interrupts)
    );
    reset_and_wait(&mut device);
}
