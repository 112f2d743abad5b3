//! What the owner of a disk sets while a guest uses it: error policy, limits, polling; and the largest queues and requests.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod driver;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use block_io::{IoError, Operation, Worker, WorkerOptions};
use driver::fickle::Fickle;
use driver::{Descriptor, Driver, Events, PATIENCE, activate, memory, readable, reset_and_wait, writable};
use storage_virtualizer::controls::{DiskControls, DiskEvents, ErrorPolicy, Rate, RateLimit, RateLimiter};
use storage_virtualizer::recorder::{Ended, Position};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, kind};
use storage_virtualizer::{DiskHandle, PinnedDisk};
use virtio_core::feature;
use virtio_core::vm_memory::{Bytes, GuestAddress};

/// Notes what the owner is told.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

impl DiskEvents for Heard {
    fn stopped(&self, error: &IoError) {
        self.0.lock().unwrap().push(error.to_string());
    }
}

struct Machine {
    driver: Driver,
    device: VirtioBlk<Arc<Fickle>>,
    disk: Arc<Fickle>,
    controls: Arc<DiskControls>,
    events: Arc<Events>,
    _worker: Worker,
}

impl Machine {
    fn start(controls: DiskControls, entries: u16) -> Self {
        let worker = Worker::start("controls", WorkerOptions::default()).unwrap();
        let (disk, controls) = (Arc::<Fickle>::default(), Arc::new(controls));
        let options = VirtioBlkOptions {
            queue_size: entries,
            controls: Arc::clone(&controls),
            ..VirtioBlkOptions::default()
        };
        let mut device = VirtioBlk::new(Arc::clone(&disk), &options, vec![worker.handle().clone()]).unwrap();
        let memory = memory(4 << 20);
        let driver = Driver::new(&memory, 0x1000, entries, true);
        let features = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;
        let events = activate(&mut device, &memory, features, vec![driver.active(0)]);
        Self {
            driver,
            device,
            disk,
            controls,
            events,
            _worker: worker,
        }
    }

    /// Where the header, data and status of request `number` lie.
    fn place(number: u16) -> u64 {
        0x10_0000 + u64::from(number) * 1024
    }

    fn write(&mut self, number: u16) {
        let place = Self::place(number);
        self.driver
            .memory
            .write_obj(kind::OUT, GuestAddress(place))
            .unwrap();
        self.driver
            .memory
            .write_obj(0_u64, GuestAddress(place + 8))
            .unwrap();
        self.driver
            .memory
            .write_obj(0xee_u8, GuestAddress(place + 16))
            .unwrap();
        let chain = [
            readable(place, 16),
            readable(place + 512, 512),
            writable(place + 16, 1),
        ];
        self.driver.submit(number * 3, &chain);
    }

    fn status(&self, number: u16) -> u8 {
        self.driver
            .memory
            .read_obj(GuestAddress(Self::place(number) + 16))
            .unwrap()
    }

    fn answers(&mut self, count: u16) {
        for _ in 0..count {
            self.driver.wait_used();
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disk_that_reports_answers_with_an_error() {
    let mut machine = Machine::start(DiskControls::default(), 128);
    machine.disk.fails.store(true, Ordering::SeqCst);
    machine.write(0);
    machine.answers(1);
    assert_eq!(machine.status(0), 1);
}

#[test]
fn requests_and_how_they_ended_are_recorded() {
    let mut machine = Machine::start(DiskControls::default(), 128);
    machine.write(0);
    machine.answers(1);
    machine.disk.fails.store(true, Ordering::SeqCst);
    machine.write(1);
    machine.answers(1);
    let seen = machine.controls.recorder().after(&Position::default());
    let found: Vec<_> = seen
        .records
        .iter()
        .map(|record| (record.operation, record.offset, record.length, record.ended))
        .collect();
    let write = Some(Operation::Write);
    assert_eq!(
        found,
        [(write, 0, 512, Ended::Done), (write, 0, 512, Ended::Failed)]
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    for record in &seen.records {
        assert!(now - record.time_ns < 60_000_000_000, "{record}");
        assert!(record.latency_ns < 60_000_000_000, "{record}");
    }

    // Of a disk that stops each attempt is recorded, so that it can be seen why.
    machine.controls.set_error_policy(ErrorPolicy::Stop);
    machine.write(2);
    wait_until("the disk stops", || machine.controls.is_stopped());
    machine.disk.fails.store(false, Ordering::SeqCst);
    machine.controls.resume();
    machine.answers(1);
    // The device comes back as after a reboot: records stay, and go on.
    reset_and_wait(&mut machine.device);
    let later = machine.controls.recorder().after(&seen.position);
    let ends: Vec<_> = later.records.iter().map(|record| record.ended).collect();
    assert_eq!(ends, [Ended::Failed, Ended::Done]);
    assert!(later.records[1].latency_ns >= later.records[0].latency_ns);
}

#[test]
fn a_disk_that_stops_tells_once_and_repeats_when_it_is_resumed() {
    let heard = Heard::default();
    let mut machine = Machine::start(DiskControls::new(None, Some(Box::new(heard.clone()))), 128);
    machine.controls.set_error_policy(ErrorPolicy::Stop);
    machine.disk.fails.store(true, Ordering::SeqCst);
    (0..5).for_each(|number| machine.write(number));
    wait_until("the disk stops", || machine.controls.is_stopped());
    std::thread::sleep(Duration::from_millis(50));
    assert!(machine.driver.take_used().is_none());
    // Not mended yet: it stops again.
    machine.controls.resume();
    wait_until("it stops again", || heard.0.lock().unwrap().len() == 2);
    assert!(machine.driver.take_used().is_none());
    machine.disk.fails.store(false, Ordering::SeqCst);
    machine.controls.resume();
    machine.answers(5);
    assert!((0..5).all(|number| machine.status(number) == 0));
    assert_eq!(machine.disk.writes.load(Ordering::SeqCst), 5);
    let heard = heard.0.lock().unwrap();
    assert!(
        heard.iter().all(|line| line.contains("failed on fickle")),
        "{heard:?}"
    );
    assert!(machine.events.reset_reasons.lock().unwrap().is_empty());
}

#[test]
fn a_stopped_disk_can_be_reset() {
    let mut machine = Machine::start(DiskControls::default(), 128);
    machine.controls.set_error_policy(ErrorPolicy::Stop);
    machine.disk.fails.store(true, Ordering::SeqCst);
    (0..5).for_each(|number| machine.write(number));
    wait_until("the disk stops", || machine.controls.is_stopped());
    reset_and_wait(&mut machine.device);
    assert_eq!(machine.disk.writes.load(Ordering::SeqCst), 0);
    assert!(
        machine.driver.take_used().is_none(),
        "a request was answered after all"
    );
}

#[test]
fn disks_of_a_group_share_a_limit_in_the_order_of_their_requests() {
    let group = Arc::new(RateLimiter::new(RateLimit {
        operations: Some(Rate {
            per_second: 100,
            burst: 4,
        }),
        bytes: None,
    }));
    let mut machines: Vec<_> = (0..2)
        .map(|_| Machine::start(DiskControls::new(Some(Arc::clone(&group)), None), 128))
        .collect();
    let start = Instant::now();
    for machine in &mut machines {
        (0..12).for_each(|number| machine.write(number));
    }
    for machine in &mut machines {
        machine.answers(12);
    }
    // 24 requests, 4 of them at once.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(195), "{took:?}");
    group.set(RateLimit::default());
    // On a busy machine once may take as long.
    let is_faster = (0..10).any(|_| {
        let start = Instant::now();
        for machine in &mut machines {
            (0..12).for_each(|number| machine.write(number));
            machine.answers(12);
        }
        start.elapsed() < took
    });
    assert!(is_faster, "no limit is slower than one");
}

#[test]
fn bytes_are_limited_and_a_reset_does_not_wait_for_them() {
    let mut machine = Machine::start(DiskControls::default(), 128);
    let limit = Rate {
        per_second: 512,
        burst: 512,
    };
    machine.controls.set_limit(RateLimit {
        operations: None,
        bytes: Some(limit),
    });
    (0..20).for_each(|number| machine.write(number));
    machine.answers(1);
    let start = Instant::now();
    reset_and_wait(&mut machine.device);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(machine.disk.writes.load(Ordering::SeqCst) < 5);
}

#[test]
fn a_queue_of_1024_entries_takes_requests_of_128_segments() {
    let mut machine = Machine::start(DiskControls::default(), 1024);
    let place = Machine::place(0);
    let memory = Arc::clone(&machine.driver.memory);
    memory.write_obj(kind::OUT, GuestAddress(place)).unwrap();
    memory.write_obj(0_u64, GuestAddress(place + 8)).unwrap();
    // Apart from each other, so that they are not joined.
    let segments = (0..128_u64).map(|segment| readable(0x20_0000 + segment * 8192, 512));
    let chain: Vec<Descriptor> = std::iter::once(readable(place, 16))
        .chain(segments)
        .chain(std::iter::once(writable(place + 16, 1)))
        .collect();
    for first in [0, 1024 - chain.len() as u16] {
        machine.driver.submit(first, &chain);
        assert_eq!(machine.driver.wait_used().0, first);
        assert_eq!(machine.status(0), 0);
        assert_eq!(machine.disk.pieces.load(Ordering::SeqCst), 128);
    }
}

#[test]
fn a_disk_that_polls_answers_without_a_doorbell() {
    let mut machine = Machine::start(DiskControls::default(), 128);
    machine.controls.set_polling(Duration::from_secs(5));
    // Short sleeps make the worker spin for longer and longer; then nobody need ring.
    let mut unrung = 0;
    wait_until("a request is seen without a doorbell", || {
        machine.write(0);
        machine.answers(1);
        // A worker that does not poll sleeps by now, and wants to be rung for.
        std::thread::sleep(Duration::from_millis(2));
        let old = machine.driver.available_index();
        let needs = machine.driver.needs_kick(old.wrapping_sub(1));
        unrung += u32::from(!needs);
        unrung > 3
    });
    machine.controls.set_polling(Duration::ZERO);
    machine.write(0);
    machine.answers(1);
}

#[test]
fn a_pinned_disk_is_served_on_its_worker_and_refused_on_another() {
    let own = Worker::start("own", WorkerOptions::default()).unwrap();
    let other = Worker::start("other", WorkerOptions::default()).unwrap();
    let handle = own.handle().clone();
    let disk = own
        .run(move || async move { PinnedDisk::new(std::rc::Rc::new(Fickle::default()), &handle).unwrap() });
    assert_eq!(disk.geometry().size, 1 << 30);
    for (worker, works) in [(&own, true), (&other, false)] {
        let options = VirtioBlkOptions::default();
        let mut device = VirtioBlk::new(disk.clone(), &options, vec![worker.handle().clone()]).unwrap();
        let memory = memory(4 << 20);
        let mut driver = Driver::new(&memory, 0x1000, 128, false);
        let events = activate(&mut device, &memory, 0, vec![driver.active(0)]);
        if works {
            memory.write_obj(kind::FLUSH, GuestAddress(0x10_0000)).unwrap();
            driver.submit(0, &[readable(0x10_0000, 16), writable(0x10_0010, 1)]);
            assert_eq!(driver.wait_used().0, 0);
        } else {
            assert!(events.wait_for_reset_reason().contains("another worker"));
        }
        reset_and_wait(&mut device);
    }
}
