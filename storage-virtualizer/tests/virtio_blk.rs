//! A virtio-blk device on real files and real workers, driven like a guest drives it, or worse.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod driver;

use std::sync::Arc;
use std::time::Duration;

use block_io::{EngineKind, HostDevice, OpenOptions, Worker, WorkerOptions};
use driver::{
    Descriptor, Driver, Events, INDIRECT, NEXT, WRITE, activate, memory, readable, reset_and_wait, writable,
};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, blk_feature, kind};
use tempfile::NamedTempFile;
use virtio_core::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use virtio_core::{GuestMemory, VirtioDevice, feature};

const DISK: u64 = 16 << 20;
const MEMORY: usize = 8 << 20;
/// Where tests put headers, status bytes and data.
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
const DATA: u64 = 0x20_0000;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A device with one running queue.
struct Machine {
    driver: Driver,
    events: Arc<Events>,
    device: VirtioBlk<Arc<HostDevice>>,
    file: NamedTempFile,
    _worker: Worker,
}

struct Setup {
    engine: EngineKind,
    read_only: bool,
    features: u64,
    queue_size: u16,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            engine: EngineKind::Uring,
            read_only: false,
            features: feature::RING_EVENT_IDX
                | feature::RING_INDIRECT_DESC
                | blk_feature::FLUSH
                | blk_feature::CONFIG_WCE,
            queue_size: 128,
        }
    }
}

impl Setup {
    fn start(self) -> Machine {
        let options = WorkerOptions {
            engine: Some(self.engine),
            ..Default::default()
        };
        let worker = Worker::start("blk-test", options).unwrap();
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(DISK).unwrap();
        let open = OpenOptions {
            read_only: self.read_only,
            ..Default::default()
        };
        let disk = Arc::new(HostDevice::open(file.path(), &open).unwrap());
        let options = VirtioBlkOptions {
            serial: "smsvmm-disk".into(),
            ..Default::default()
        };
        let mut device = VirtioBlk::new(disk, &options, vec![worker.handle().clone()]).unwrap();
        let memory = memory(MEMORY);
        let driver = Driver::new(
            &memory,
            0x1000,
            self.queue_size,
            self.features & feature::RING_EVENT_IDX != 0,
        );
        let events = activate(&mut device, &memory, self.features, vec![driver.active(0)]);
        Machine {
            driver,
            events,
            device,
            file,
            _worker: worker,
        }
    }
}

/// Runs `test` with both engines.
fn on_both_engines(test: impl Fn(Machine)) {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        test(
            Setup {
                engine,
                ..Default::default()
            }
            .start(),
        );
    }
}

fn header(memory: &GuestMemory, address: u64, kind: u32, sector: u64) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(address)).unwrap();
}

impl Machine {
    fn memory(&self) -> &GuestMemory {
        &self.driver.memory
    }

    /// One request with `middle` between header and status; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, middle: &[Descriptor]) -> (u8, u32) {
        header(self.memory(), HEADER, kind, sector);
        self.memory().write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![readable(HEADER, 16)];
        chain.extend_from_slice(middle);
        chain.push(writable(STATUS, 1));
        self.driver.submit(0, &chain);
        let (head, length) = self.driver.wait_used();
        assert_eq!(head, 0);
        (self.status(), length)
    }

    fn status(&self) -> u8 {
        self.memory().read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// The ranges of a discard or write zeroes request, at [`DATA`].
    fn put_ranges(&self, ranges: &[(u64, u32, u32)]) -> Descriptor {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.fill(DATA, &bytes);
        readable(DATA, bytes.len())
    }
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index / 5) as u8 ^ seed).collect()
}

#[test]
fn what_is_written_is_read_back() {
    on_both_engines(|mut machine| {
        let data = pattern(64 << 10, 1);
        machine.fill(DATA, &data);
        assert_eq!(
            machine.request(kind::OUT, 8, &[readable(DATA, data.len())]),
            (OK, 1)
        );
        assert_eq!(machine.request(kind::FLUSH, 0, &[]), (OK, 1));
        let target = DATA + (1 << 20);
        let read = machine.request(
            kind::IN,
            8,
            &[writable(target, 4096), writable(target + 8192, 61440)],
        );
        assert_eq!(read, (OK, 65537));
        assert_eq!(machine.bytes(target, 4096), data[..4096]);
        assert_eq!(machine.bytes(target + 8192, 61440), data[4096..]);
        let queue = machine.device.handle().counters()[0];
        let counters = queue.counts;
        assert_eq!(
            (
                counters.reads,
                counters.read_bytes,
                counters.writes,
                counters.flushes
            ),
            (1, 65536, 1, 1)
        );
        assert_eq!(counters.errors, 0);
        let all = counters.reads + counters.writes + counters.flushes + counters.others;
        assert_eq!(queue.latencies.iter().sum::<u64>(), all, "each took its time");
    });
}

#[test]
fn memory_that_is_not_aligned_works_too() {
    on_both_engines(|mut machine| {
        let data = pattern(5 * 512, 2);
        machine.fill(DATA + 3, &data);
        let pieces = [readable(DATA + 3, 700), readable(DATA + 703, 5 * 512 - 700)];
        assert_eq!(machine.request(kind::OUT, 1, &pieces), (OK, 1));
        let target = DATA + (1 << 20) + 1;
        assert_eq!(
            machine.request(kind::IN, 1, &[writable(target, 5 * 512)]),
            (OK, 5 * 512 + 1)
        );
        assert_eq!(machine.bytes(target, 5 * 512), data);
    });
}

#[test]
fn header_data_and_status_may_share_descriptors() {
    let mut machine = Setup::default().start();
    let data = pattern(1024, 3);
    header(machine.memory(), HEADER, kind::OUT, 4);
    machine.fill(HEADER + 16, &data);
    machine.driver.submit(
        0,
        &[
            readable(HEADER, 10),
            readable(HEADER + 10, 6 + 1024),
            writable(STATUS, 1),
        ],
    );
    assert_eq!(machine.driver.wait_used(), (0, 1));
    header(machine.memory(), HEADER, kind::IN, 4);
    machine
        .driver
        .submit(0, &[readable(HEADER, 16), writable(DATA, 1025)]);
    assert_eq!(machine.driver.wait_used(), (0, 1025));
    assert_eq!(machine.bytes(DATA, 1024), data);
    assert_eq!(machine.bytes(DATA + 1024, 1), [OK]);
}

#[test]
fn an_indirect_table_carries_a_request_of_many_segments() {
    on_both_engines(|mut machine| {
        const SEGMENTS: usize = 254;
        let table = 0x8_0000;
        let data = pattern(SEGMENTS * 4096, 4);
        for (segment, bytes) in data.chunks(4096).enumerate() {
            machine.fill(DATA + segment as u64 * 8192, bytes);
        }
        for (what, flags) in [(kind::OUT, 0), (kind::IN, WRITE)] {
            header(machine.memory(), HEADER, what, 16);
            let mut chain = vec![readable(HEADER, 16)];
            for segment in 0..SEGMENTS as u64 {
                chain.push(Descriptor {
                    flags,
                    ..readable(DATA + segment * 8192, 4096)
                });
            }
            chain.push(writable(STATUS, 1));
            machine.driver.store_chain_in(table, 0, &chain);
            if what == kind::IN {
                machine.fill(DATA, &vec![0; SEGMENTS * 8192]);
            }
            let indirect = Descriptor {
                flags: INDIRECT,
                ..readable(table, chain.len() * 16)
            };
            machine.driver.submit(5, &[indirect]);
            assert_eq!(machine.driver.wait_used().0, 5);
            assert_eq!(machine.status(), OK);
        }
        for (segment, bytes) in data.chunks(4096).enumerate() {
            assert_eq!(machine.bytes(DATA + segment as u64 * 8192, 4096), bytes);
        }
    });
}

#[test]
fn the_identifier_is_the_serial() {
    let mut machine = Setup::default().start();
    machine.fill(DATA, &[0xff; 20]);
    assert_eq!(machine.request(kind::GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    assert_eq!(machine.bytes(DATA, 20), b"smsvmm-disk\0\0\0\0\0\0\0\0\0");
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zero() {
    on_both_engines(|mut machine| {
        for (what, flags) in [
            (kind::DISCARD, 0),
            (kind::WRITE_ZEROES, 0),
            (kind::WRITE_ZEROES, 1),
        ] {
            let data = pattern(64 << 10, 6);
            machine.fill(DATA, &data);
            assert_eq!(
                machine.request(kind::OUT, 0, &[readable(DATA, data.len())]),
                (OK, 1)
            );
            let ranges = machine.put_ranges(&[(8, 16, flags), (64, 8, flags)]);
            assert_eq!(machine.request(what, 0, &[ranges]), (OK, 1));
            assert_eq!(machine.request(kind::IN, 0, &[writable(DATA, data.len())]).0, OK);
            let mut expected = data;
            expected[8 * 512..24 * 512].fill(0);
            expected[64 * 512..72 * 512].fill(0);
            assert_eq!(machine.bytes(DATA, expected.len()), expected);
        }
    });
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let mut machine = Setup::default().start();
    let cases = [
        (kind::DISCARD, (0, 8, 1), UNSUPPORTED),
        (kind::WRITE_ZEROES, (0, 8, 2), UNSUPPORTED),
        (kind::WRITE_ZEROES, (DISK / 512, 8, 0), IO_ERROR),
        (kind::WRITE_ZEROES, (u64::MAX, 8, 0), IO_ERROR),
        (kind::DISCARD, (0, u32::MAX, 0), IO_ERROR),
        (kind::DISCARD, (u64::MAX / 512, 8, 0), IO_ERROR),
    ];
    for (what, range, status) in cases {
        let ranges = machine.put_ranges(&[range]);
        assert_eq!(machine.request(what, 0, &[ranges]).0, status, "{range:?}");
    }
    machine.put_ranges(&[(0, 8, 0); 17]);
    for length in [0, 15, 17, 17 * 16] {
        assert_eq!(
            machine.request(kind::DISCARD, 0, &[readable(DATA, length)]).0,
            IO_ERROR
        );
    }
    assert_eq!(machine.request(kind::IN, 0, &[writable(DATA, 512)]).0, OK);
}

#[test]
fn impossible_requests_are_answered_with_an_error() {
    on_both_engines(|mut machine| {
        let read = |machine: &mut Machine, sector, length| {
            machine.request(kind::IN, sector, &[writable(DATA, length)]).0
        };
        assert_eq!(read(&mut machine, DISK / 512, 512), IO_ERROR);
        assert_eq!(read(&mut machine, DISK / 512 - 1, 1024), IO_ERROR);
        assert_eq!(read(&mut machine, u64::MAX, 512), IO_ERROR);
        assert_eq!(read(&mut machine, 1 << 55, 512), IO_ERROR);
        assert_eq!(read(&mut machine, 0, 511), IO_ERROR);
        assert_eq!(machine.request(77, 0, &[writable(DATA, 512)]).0, UNSUPPORTED);
        assert_eq!(read(&mut machine, DISK / 512 - 1, 512), OK);
        assert_eq!(machine.device.handle().counters()[0].counts.errors, 6);
        assert!(machine.events.reset_reasons.lock().unwrap().is_empty());
    });
}

#[test]
fn a_read_only_disk_reads_and_flushes_but_takes_no_writes() {
    let mut machine = Setup {
        read_only: true,
        ..Default::default()
    }
    .start();
    assert_ne!(machine.device.features() & blk_feature::RO, 0);
    assert_eq!(machine.request(kind::OUT, 0, &[readable(DATA, 512)]).0, IO_ERROR);
    let ranges = machine.put_ranges(&[(0, 8, 0)]);
    assert_eq!(machine.request(kind::DISCARD, 0, &[ranges]).0, IO_ERROR);
    assert_eq!(machine.request(kind::FLUSH, 0, &[]).0, OK);
    assert_eq!(machine.request(kind::IN, 0, &[writable(DATA, 512)]).0, OK);
}

#[test]
fn write_through_is_possible() {
    let mut machine = Setup::default().start();
    machine.device.write_config(32, &[0]);
    let mut writeback = [9];
    machine.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
    assert_eq!(machine.request(kind::OUT, 0, &[readable(DATA, 4096)]).0, OK);
    reset_and_wait(&mut machine.device);
    machine.device.read_config(32, &mut writeback);
    assert_eq!(writeback, [1]);
}

/// What a driver can get wrong so that the device must give up, and a word of the reason.
fn broken_chains() -> Vec<(&'static str, Vec<Descriptor>, &'static str)> {
    let header = readable(HEADER, 16);
    let linked = |descriptor: Descriptor, next| Descriptor {
        flags: descriptor.flags | NEXT,
        next,
        ..descriptor
    };
    let status = writable(STATUS, 1);
    vec![
        (
            "a loop",
            vec![linked(header, 1), linked(readable(DATA, 512), 0)],
            "loop",
        ),
        ("a self loop", vec![linked(header, 0)], "loop"),
        (
            "next beyond the table",
            vec![linked(header, 9999)],
            "not in the table",
        ),
        (
            "no status",
            vec![linked(header, 1), readable(DATA, 512)],
            "status",
        ),
        ("no header", vec![status], "header"),
        (
            "a short header",
            vec![linked(readable(HEADER, 15), 1), status],
            "header",
        ),
        (
            "data outside of memory",
            vec![linked(header, 1), linked(readable(1 << 40, 512), 2), status],
            "not guest memory",
        ),
        (
            "data past the end",
            vec![
                linked(header, 1),
                linked(readable(MEMORY as u64 - 256, 512), 2),
                status,
            ],
            "not guest",
        ),
        (
            "an overflowing address",
            vec![linked(header, 1), linked(readable(u64::MAX - 5, 512), 2), status],
            "not guest",
        ),
        (
            "readable after writable",
            vec![linked(status, 1), header],
            "readable",
        ),
        (
            "4 GiB",
            vec![
                linked(readable(0, u32::MAX as usize), 1),
                linked(header, 2),
                status,
            ],
            "",
        ),
        (
            "an empty indirect table",
            vec![Descriptor {
                flags: INDIRECT,
                ..readable(DATA, 0)
            }],
            "indirect",
        ),
        (
            "an indirect table of odd length",
            vec![Descriptor {
                flags: INDIRECT,
                ..readable(DATA, 17)
            }],
            "indirect",
        ),
        (
            "an indirect table outside of memory",
            vec![Descriptor {
                flags: INDIRECT,
                ..readable(1 << 40, 32)
            }],
            "not guest memory",
        ),
        (
            "an indirect descriptor with a successor",
            vec![
                linked(
                    Descriptor {
                        flags: INDIRECT,
                        ..readable(DATA, 32)
                    },
                    1,
                ),
                status,
            ],
            "indirect",
        ),
    ]
}

#[test]
fn a_broken_chain_is_given_back_unanswered_and_the_queue_stops() {
    for (what, chain, reason) in broken_chains() {
        let mut machine = Setup::default().start();
        header(machine.memory(), HEADER, kind::OUT, 0);
        for (place, descriptor) in (0..).zip(&chain) {
            machine.driver.store(machine.driver.base, place, *descriptor);
        }
        machine.driver.add(0);
        machine.driver.publish();
        machine.driver.kick();
        let given = machine.events.wait_for_reset_reason();
        assert!(given.contains(reason), "{what}: {given}");
        assert_eq!(machine.driver.wait_used(), (0, 0), "{what}");
        // Nothing more is served, until a reset.
        machine
            .driver
            .submit(8, &[readable(HEADER, 16), writable(STATUS, 1)]);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.driver.used_index(), 1, "{what}");
        reset_and_wait(&mut machine.device);
        assert_eq!(machine.events.reset_reasons.lock().unwrap().len(), 1);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_refused() {
    let mut machine = Setup::default().start();
    machine.driver.store(
        DATA,
        0,
        Descriptor {
            flags: INDIRECT,
            ..readable(DATA, 16)
        },
    );
    machine.driver.submit(
        0,
        &[Descriptor {
            flags: INDIRECT,
            ..readable(DATA, 16)
        }],
    );
    assert!(machine.events.wait_for_reset_reason().contains("indirect"));
}

#[test]
fn a_chain_in_flight_cannot_be_added_again() {
    let mut machine = Setup::default().start();
    header(machine.memory(), HEADER, kind::IN, 0);
    machine.driver.store_chain(
        0,
        &[readable(HEADER, 16), writable(DATA, 4096), writable(STATUS, 1)],
    );
    for _ in 0..3 {
        machine.driver.add(0);
    }
    machine.driver.publish();
    machine.driver.kick();
    assert!(machine.events.wait_for_reset_reason().contains("twice"));
    reset_and_wait(&mut machine.device);
}

#[test]
fn impossible_indices_of_the_ring_stop_the_queue() {
    for index in [129, 0x8000, 0xffff] {
        let machine = Setup::default().start();
        machine.driver.publish_index(index);
        machine.driver.kick();
        assert!(!machine.events.wait_for_reset_reason().is_empty());
    }
    let mut machine = Setup::default().start();
    machine.driver.add(500);
    machine.driver.publish();
    machine.driver.kick();
    assert!(machine.events.wait_for_reset_reason().contains("500"));
}

/// A driver that keeps `depth` requests in flight and checks what it reads.
fn load(driver: &mut Driver, depth: u16, requests: u32, sectors: u64) {
    let memory: &GuestMemoryMmap = &Arc::clone(&driver.memory);
    let data = |slot: u16| DATA + u64::from(slot) * 4096;
    let mut started = 0;
    let mut ended = 0;
    let submit = |driver: &mut Driver, slot: u16, number: u32| {
        let writes = number.is_multiple_of(3);
        let place = GuestAddress(HEADER + u64::from(slot) * 16);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&(if writes { kind::OUT } else { kind::IN }).to_le_bytes());
        bytes[8..].copy_from_slice(&(u64::from(number) * 8 % sectors).to_le_bytes());
        memory.write_slice(&bytes, place).unwrap();
        let middle = if writes {
            readable(data(slot), 4096)
        } else {
            writable(data(slot), 4096)
        };
        driver.store_chain(
            slot * 3,
            &[
                readable(place.0, 16),
                middle,
                writable(STATUS + u64::from(slot), 1),
            ],
        );
        driver.add(slot * 3);
    };
    while ended < requests {
        let old = driver.available_index();
        if started < depth.into() {
            for slot in 0..depth {
                submit(driver, slot, started);
                started += 1;
            }
        }
        let mut used = Vec::new();
        while started >= u32::from(depth) && ended < requests {
            match driver.take_used() {
                Some((head, _)) => used.push(head),
                None => break,
            }
            ended += 1;
        }
        for head in used {
            let slot = head / 3;
            assert_eq!(
                memory
                    .read_obj::<u8>(GuestAddress(STATUS + u64::from(slot)))
                    .unwrap(),
                OK
            );
            if started < requests {
                submit(driver, slot, started);
                started += 1;
            }
        }
        if driver.available_index() != old {
            driver.publish();
            if driver.needs_kick(old) {
                driver.kick();
            }
        } else if ended < requests {
            driver.enable_interrupt();
            if driver.used_index() == old.wrapping_sub((started - ended) as u16) {
                assert!(
                    driver.wait_for_interrupt(driver::PATIENCE),
                    "no interrupt after {ended} of {started}"
                );
            }
        }
    }
}

#[test]
fn a_deep_queue_loses_no_request_and_no_interrupt() {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        for event_index in [feature::RING_EVENT_IDX, 0] {
            let features = event_index | blk_feature::FLUSH;
            let mut machine = Setup {
                engine,
                features,
                ..Default::default()
            }
            .start();
            load(&mut machine.driver, 32, 5000, DISK / 512);
            reset_and_wait(&mut machine.device);
        }
    }
}

#[test]
fn chains_that_came_at_once_need_one_doorbell_and_those_that_were_there_before_none() {
    on_both_engines(|mut machine| {
        for rings in [true, false] {
            for slot in 0..40_u16 {
                header(machine.memory(), HEADER + u64::from(slot) * 16, kind::IN, 0);
                let chain = [
                    readable(HEADER + u64::from(slot) * 16, 16),
                    writable(DATA + u64::from(slot) * 4096, 4096),
                    writable(STATUS + u64::from(slot), 1),
                ];
                machine.driver.store_chain(slot * 3, &chain);
                machine.driver.add(slot * 3);
            }
            machine.driver.publish();
            if rings {
                machine.driver.kick();
            } else {
                let memory = Arc::clone(machine.memory());
                let features = feature::RING_EVENT_IDX | blk_feature::FLUSH;
                let queues = vec![machine.driver.active(0)];
                machine.events = activate(&mut machine.device, &memory, features, queues);
            }
            for _ in 0..40 {
                machine.driver.wait_used();
            }
            reset_and_wait(&mut machine.device);
            machine.driver = Driver::new(&Arc::clone(machine.memory()), 0x1000, 128, true);
        }
    });
}

#[test]
fn a_reset_under_load_ends_what_is_in_flight_and_the_device_starts_again() {
    on_both_engines(|mut machine| {
        for _ in 0..50 {
            for slot in 0..40_u16 {
                header(machine.memory(), HEADER + u64::from(slot) * 16, kind::IN, 0);
                let chain = [
                    readable(HEADER + u64::from(slot) * 16, 16),
                    writable(DATA + u64::from(slot) * 65536, 65536),
                    writable(STATUS, 1),
                ];
                machine.driver.store_chain(slot * 3, &chain);
                machine.driver.add(slot * 3);
            }
            machine.driver.publish();
            machine.driver.kick();
            reset_and_wait(&mut machine.device);
            let used = machine.driver.used_index();
            // Whatever was taken was answered, and nothing moves any more.
            assert!(used <= 40);
            machine.driver = Driver::new(&Arc::clone(machine.memory()), 0x1000, 128, true);
            let memory = Arc::clone(machine.memory());
            let features = feature::RING_EVENT_IDX | blk_feature::FLUSH;
            machine.events = activate(
                &mut machine.device,
                &memory,
                features,
                vec![machine.driver.active(0)],
            );
        }
        assert_eq!(machine.request(kind::IN, 0, &[writable(DATA, 512)]).0, OK);
    });
}

#[test]
fn a_resized_disk_tells_the_guest() {
    let mut machine = Setup::default().start();
    let handle = machine.device.handle();
    machine.file.as_file().set_len(2 * DISK).unwrap();
    handle.disk().refresh_size().unwrap();
    handle.size_changed();
    assert_eq!(
        machine
            .events
            .config_changes
            .load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    let mut capacity = [0; 8];
    machine.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * DISK / 512);
    assert_eq!(
        machine.request(kind::IN, DISK / 512, &[writable(DATA, 512)]).0,
        OK
    );
}

#[test]
fn several_queues_are_served_by_several_workers() {
    let workers: Vec<_> = (0..2)
        .map(|_| Worker::start("blk-test", WorkerOptions::default()).unwrap())
        .collect();
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK).unwrap();
    let disk = Arc::new(HostDevice::open(file.path(), &OpenOptions::default()).unwrap());
    let options = VirtioBlkOptions {
        queues: 4,
        ..Default::default()
    };
    let handles = workers.iter().map(|worker| worker.handle().clone()).collect();
    let mut device = VirtioBlk::new(disk, &options, handles).unwrap();
    assert_ne!(device.features() & blk_feature::MQ, 0);
    let memories: Vec<_> = (0..4).map(|_| memory(MEMORY)).collect();
    // Each with its own memory here, so that the loads do not meet; one memory with four rings for the device.
    let memory = Arc::clone(&memories[0]);
    assert!(memory.num_regions() == 1);
    let mut drivers: Vec<_> = (0..4)
        .map(|n| Driver::new(&memory, 0x1000 + n * 0x4000, 128, true))
        .collect();
    let queues = drivers
        .iter()
        .zip(0..)
        .map(|(driver, index)| driver.active(index))
        .collect();
    let events = activate(
        &mut device,
        &memory,
        feature::RING_EVENT_IDX | blk_feature::FLUSH,
        queues,
    );
    for driver in &mut drivers {
        load(driver, 16, 500, DISK / 512);
    }
    assert!(
        device
            .handle()
            .counters()
            .iter()
            .all(|counters| counters.counts.reads + counters.counts.writes == 500)
    );
    assert!(events.reset_reasons.lock().unwrap().is_empty());
    reset_and_wait(&mut device);
}
