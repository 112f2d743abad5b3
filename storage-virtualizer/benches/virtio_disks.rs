//! What a request of a guest costs from the doorbell to the interrupt, without a guest: this thread is the driver, of a virtio-blk
//! device and of a virtio-scsi adapter on the same file, in turns.
//!
//! ```text
//! cargo bench -p storage-virtualizer --bench virtio_disks -- [FILE OR DIRECTORY] [--seconds N] [--rounds N] [--load NAME] [--busy-poll-us N]
//! ```
//! CPU time is that of the worker's thread alone. Doorbells and interrupts are what the guest would pay for in VM exits. The last
//! columns are virtio-scsi's IOPS and CPU time beside virtio-blk's: the medians of the rounds' ratios.

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
use storage_virtualizer::scsi::{Identity, TransportId, Unit, UnitOptions};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, blk_feature, kind};
use storage_virtualizer::virtio_scsi::{VirtioScsi, VirtioScsiOptions};
use virtio_core::vm_memory::{Bytes, GuestAddress};
use virtio_core::{GuestMemory, VirtioDevice, feature};

const SIZE: u64 = 1 << 30;
/// What a driver writes before the data, and what the device writes beside them; as far apart for each slot.
const REQUESTS: u64 = 0x10_0000;
const ANSWERS: u64 = 0x18_0000;
const STRIDE: u64 = 128;
const DATA: u64 = 0x20_0000;
const LUN: [u8; 8] = [1, 0, 0x40, 0, 0, 0, 0, 0];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Bus {
    Blk,
    Scsi,
}

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
    let (mut seconds, mut rounds, mut only, mut busy_poll) = (1.0, 3, None, Duration::ZERO);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => rounds = arguments.next().unwrap().parse().unwrap(),
            "--busy-poll-us" => busy_poll = Duration::from_micros(arguments.next().unwrap().parse().unwrap()),
            "--load" => only = arguments.next(),
            path => place = PathBuf::from(path),
        }
    }
    let file = if place.is_dir() {
        place.join("virtio-disks-bench.img")
    } else {
        place.clone()
    };
    prepare(&file);
    println!("{}", file.display());
    println!("load  bus  |     IOPS  CPU µs/IO  doorbells/IO  interrupts/IO | IOPS   CPU");
    for load in LOADS {
        if only.as_ref().is_some_and(|only| *only != load.name) {
            continue;
        }
        let mut ratios = Vec::new();
        let mut last = Vec::new();
        for _ in 0..rounds {
            let [blk, scsi] = [Bus::Blk, Bus::Scsi].map(|bus| run(&file, &load, bus, seconds, busy_poll));
            ratios.push([scsi.iops / blk.iops, scsi.cpu / blk.cpu]);
            last = vec![("blk", blk), ("scsi", scsi)];
        }
        let median = |which: usize| {
            let mut values: Vec<f64> = ratios.iter().map(|ratio| ratio[which]).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        for (bus, cost) in last {
            print!(
                "{:5} {bus:4} | {:8.0} {:10.2} {:13.3} {:14.3}",
                load.name, cost.iops, cost.cpu, cost.doorbells, cost.interrupts
            );
            match bus {
                "scsi" => println!(" | {:4.2}  {:4.2}", median(0), median(1)),
                _ => println!(" |"),
            }
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

/// What a request costs.
struct Cost {
    iops: f64,
    /// Microseconds.
    cpu: f64,
    doorbells: f64,
    interrupts: f64,
}

struct Generator {
    driver: Driver,
    memory: GuestMemory,
    random: u64,
    bus: Bus,
    kind: u32,
    block: usize,
}

impl Generator {
    fn put(&self, bytes: &[u8], address: u64) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn store(&self, slot: u16) {
        let request = REQUESTS + u64::from(slot) * STRIDE;
        let answer = ANSWERS + u64::from(slot) * STRIDE;
        let data = DATA + u64::from(slot) * self.block as u64;
        let reads = self.kind == kind::IN;
        let data = if reads {
            writable(data, self.block)
        } else {
            readable(data, self.block)
        };
        let (length, room) = match self.bus {
            Bus::Blk => {
                self.put(&self.kind.to_le_bytes(), request);
                (16, 1)
            }
            Bus::Scsi => {
                let blocks = u16::try_from(self.block / 512).unwrap().to_be_bytes();
                let opcode = if reads { 0x28 } else { 0x2a };
                let cdb = [opcode, 0, 0, 0, 0, 0, 0, blocks[0], blocks[1], 0];
                self.put(&LUN, request);
                self.put(&cdb, request + 19);
                (51, 108)
            }
        };
        let (request, answer) = (readable(request, length), writable(answer, room));
        let chain = match (self.bus, reads) {
            // virtio-scsi has the answer before what is read, virtio-blk at the end.
            (Bus::Scsi, true) => [request, answer, data],
            _ => [request, data, answer],
        };
        self.driver.store_chain(slot * 3, &chain);
    }

    fn add(&mut self, slot: u16) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let sector = self.random % (SIZE / self.block as u64) * (self.block as u64 / 512);
        let request = REQUESTS + u64::from(slot) * STRIDE;
        match self.bus {
            Bus::Blk => self.put(&sector.to_le_bytes(), request + 8),
            Bus::Scsi => self.put(&u32::try_from(sector).unwrap().to_be_bytes(), request + 19 + 2),
        }
        self.driver.add(slot * 3);
    }
}

/// A device on `disk`, served, with its request queue; and how many interrupts it has sent.
fn device(
    bus: Bus,
    disk: Arc<HostDevice>,
    worker: &Worker,
    memory: &GuestMemory,
) -> (Box<dyn VirtioDevice>, Driver, Box<dyn Fn() -> u64>) {
    let workers = vec![worker.handle().clone()];
    let driver = Driver::new(memory, 0x1000, 256, true);
    match bus {
        Bus::Blk => {
            let mut device = VirtioBlk::new(disk, &VirtioBlkOptions::default(), workers).unwrap();
            let features = feature::RING_EVENT_IDX | blk_feature::FLUSH;
            activate(&mut device, memory, features, vec![driver.active(0)]);
            let handle = device.handle();
            let interrupts = move || handle.counters()[0].interrupts;
            (Box::new(device), driver, Box::new(interrupts))
        }
        Bus::Scsi => {
            let options = VirtioScsiOptions {
                initiator: TransportId::sas(1),
                queues: 1,
                queue_size: 256,
                last_target: 0,
            };
            let mut device = VirtioScsi::new(&options, workers).unwrap();
            let handle = device.handle();
            let unit = Unit::new(UnitOptions::new(Identity::from_name("bench", "bench")));
            handle
                .add((0, 0), Arc::new(unit), disk, Arc::default(), None)
                .unwrap();
            let control = Driver::new(memory, 0x8000, 16, true);
            let queues = vec![control.active(0), driver.active(2)];
            activate(&mut device, memory, feature::RING_EVENT_IDX, queues);
            let interrupts = move || handle.counters()[0].interrupts;
            (Box::new(device), driver, Box::new(interrupts))
        }
    }
}

fn run(path: &std::path::Path, load: &Load, bus: Bus, seconds: f64, busy_poll: Duration) -> Cost {
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
    let memory = memory(64 << 20);
    let (mut device, driver, interrupts) = device(bus, disk, &worker, &memory);
    let mut generator = Generator {
        driver,
        memory,
        random: 88_172_645_463_325_252,
        bus,
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
    check(&generator, load);
    let per = |count: u64| count as f64 / requests as f64;
    let cost = Cost {
        iops: requests as f64 / elapsed,
        cpu: used * 1e6 / requests as f64,
        doorbells: per(doorbells),
        interrupts: per(interrupts()),
    };
    reset_and_wait(&mut *device);
    cost
}

/// The last answers are good ones.
fn check(generator: &Generator, load: &Load) {
    for slot in 0..load.depth {
        let mut answer = [0xff; 12];
        let answer = match generator.bus {
            Bus::Blk => &mut answer[..1],
            Bus::Scsi => &mut answer[4..12],
        };
        let at = ANSWERS + u64::from(slot) * STRIDE + if answer.len() == 1 { 0 } else { 4 };
        generator.memory.read_slice(answer, GuestAddress(at)).unwrap();
        assert!(answer.iter().all(|byte| *byte == 0), "{answer:?}");
    }
}
