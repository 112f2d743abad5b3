//! A virtio-scsi adapter on real workers, driven like a guest drives it, or worse.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod driver;

use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use block_io::{HostDevice, OpenOptions, Operation, Worker, WorkerOptions};
use driver::fickle::Fickle;
use driver::scsi::*;
use driver::{Driver, Events, PATIENCE, activate, memory, readable, reset_and_wait, writable};
use storage_virtualizer::controls::{DiskControls, ErrorPolicy};
use storage_virtualizer::recorder::{Ended, Position};
use storage_virtualizer::scsi::{Identity, Provisioning, TransportId, Unit, UnitOptions};
use storage_virtualizer::virtio_scsi::{
    AddUnitError, VirtioScsi, VirtioScsiHandle, VirtioScsiOptions, scsi_feature,
};
use storage_virtualizer::{DiskHandle, Either, PinnedDisk};
use tempfile::NamedTempFile;
use virtio_core::{GuestMemory, VirtioDevice, feature};

fn unit(name: &str) -> Arc<Unit> {
    Arc::new(Unit::new(UnitOptions::new(Identity::from_name(name, name))))
}

struct Machine<H: DiskHandle> {
    driver: Initiator,
    memory: GuestMemory,
    events: Arc<Events>,
    device: VirtioScsi<H>,
    handle: VirtioScsiHandle<H>,
    worker: Worker,
}

impl<H: DiskHandle> Deref for Machine<H> {
    type Target = Initiator;

    fn deref(&self) -> &Initiator {
        &self.driver
    }
}

impl<H: DiskHandle> DerefMut for Machine<H> {
    fn deref_mut(&mut self) -> &mut Initiator {
        &mut self.driver
    }
}

impl<H: DiskHandle> Machine<H> {
    fn start() -> Self {
        let worker = Worker::start("scsi-test", WorkerOptions::default()).unwrap();
        let options = VirtioScsiOptions {
            initiator: TransportId::sas(1),
            queues: 1,
            queue_size: 64,
            last_target: 3,
        };
        let mut device = VirtioScsi::new(&options, vec![worker.handle().clone()]).unwrap();
        let memory = memory(16 << 20);
        let driver = Initiator::new(&memory);
        let features = feature::RING_EVENT_IDX
            | feature::RING_INDIRECT_DESC
            | scsi_feature::HOTPLUG
            | scsi_feature::CHANGE;
        let queues = vec![
            driver.control.active(0),
            driver.event.active(1),
            driver.requests.active(2),
        ];
        let events = activate(&mut device, &memory, features, queues);
        Self {
            driver,
            memory,
            events,
            handle: device.handle(),
            device,
            worker,
        }
    }
}

/// An adapter with one disk of 16 MiB on a file.
fn with_disk() -> (Machine<Arc<HostDevice>>, NamedTempFile) {
    let mut machine = Machine::start();
    let (disk, file) = disk();
    machine
        .handle
        .add((0, 0), unit("disk"), disk, Arc::default(), None)
        .unwrap();
    machine.greet(lun(0, 0));
    (machine, file)
}

fn disk() -> (Arc<HostDevice>, NamedTempFile) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let disk = HostDevice::open(file.path(), &OpenOptions::default()).unwrap();
    (Arc::new(disk), file)
}

/// An adapter with one disk that stops when it fails, and fails from the beginning.
fn with_stopped_disk() -> (Machine<Arc<Fickle>>, Arc<Fickle>, Arc<DiskControls>) {
    let mut machine = Machine::start();
    let (disk, controls) = (Arc::<Fickle>::default(), Arc::<DiskControls>::default());
    controls.set_error_policy(ErrorPolicy::Stop);
    machine
        .handle
        .add(
            (0, 0),
            unit("stops"),
            Arc::clone(&disk),
            Arc::clone(&controls),
            None,
        )
        .unwrap();
    machine.greet(lun(0, 0));
    disk.fails.store(true, Ordering::SeqCst);
    (machine, disk, controls)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disk_is_found_written_and_read() {
    let (mut machine, file) = with_disk();
    let data = Some(writable(DATA, 96));
    let answer = machine.command(lun(0, 0), &INQUIRY, data);
    assert_eq!((answer.response, answer.status), (OK, GOOD));
    let mut inquiry = [0; 36];
    machine.get(DATA, &mut inquiry);
    assert_eq!(inquiry[0], 0);
    assert_eq!(&inquiry[8..20], b"SMSVMM  DISK");

    let pattern: Vec<u8> = (0..8192_u32).map(|byte| (byte * 7) as u8).collect();
    machine.put(DATA, &pattern);
    let data = Some(readable(DATA, 8192));
    assert_eq!(machine.command(lun(0, 0), &write(5, 16), data), Answer::good());
    machine.put(DATA, &[0; 8192]);
    let data = Some(writable(DATA, 8192));
    assert_eq!(machine.command(lun(0, 0), &read(5, 16), data), Answer::good());
    let mut back = vec![0; 8192];
    machine.get(DATA, &mut back);
    assert!(back == pattern);
    let stored = std::fs::read(file.path()).unwrap();
    assert!(stored[5 * 512..][..8192] == pattern);
    let counters = machine.handle.counters()[0].counts;
    assert_eq!((counters.reads, counters.writes), (1, 1));
    assert_eq!((counters.read_bytes, counters.written_bytes), (8192, 8192));
}

#[test]
fn what_goes_to_the_disk_of_a_unit_is_recorded_with_its_disk() {
    let (mut machine, disk, controls) = with_stopped_disk();
    disk.fails.store(false, Ordering::SeqCst);
    assert_eq!(
        machine.command(lun(0, 0), &write(5, 1), Some(readable(DATA, 512))),
        Answer::good()
    );
    machine.command(lun(0, 0), &INQUIRY, Some(writable(DATA, 96)));
    let seen = controls.recorder().after(&Position::default()).records;
    let found: Vec<_> = seen
        .iter()
        .map(|record| (record.operation, record.offset, record.length, record.ended))
        .collect();
    let write = Some(Operation::Write);
    assert_eq!(found, [(write, 5 * 512, 512, Ended::Done)]);
}

#[test]
fn what_there_was_no_room_for_or_was_not_used_is_told_as_residual() {
    let (mut machine, _file) = with_disk();
    let more = machine.command(lun(0, 0), &read(0, 4), Some(writable(DATA, 4096)));
    assert_eq!((more.response, more.status, more.residual), (OK, GOOD, 2048));
    let less = machine.command(lun(0, 0), &read(0, 8), Some(writable(DATA, 1024)));
    assert_eq!((less.response, less.residual), (OVERRUN, 3072));
}

#[test]
fn units_that_are_not_there_are_told_from_targets_that_are_not_there() {
    let (mut machine, _file) = with_disk();
    assert_eq!(
        machine.command(lun(1, 0), &INQUIRY, None),
        Answer::refused(BAD_TARGET)
    );
    assert_eq!(
        machine.command([9; 8], &INQUIRY, None),
        Answer::refused(BAD_TARGET)
    );
    let answer = machine.command(lun(0, 1), &TEST_UNIT_READY, None);
    assert_eq!(answer.status, CHECK_CONDITION);
    assert_eq!(answer.sense, Some((5, 0x25, 0)));
    machine.command(lun(0, 1), &INQUIRY, Some(writable(DATA, 96)));
    let mut first = [0];
    machine.get(DATA, &mut first);
    assert_eq!(first[0], 0x7f);
    let (other, _kept) = disk();
    let refused = machine
        .handle
        .add((4, 0), unit("far"), other, Arc::default(), None);
    assert_eq!(
        refused.err(),
        Some(AddUnitError::NoSuchTarget { target: 4, last: 3 })
    );
}

#[test]
fn units_come_and_go_while_the_driver_is_told() {
    let (mut machine, _file) = with_disk();
    // What was there at the beginning was told, too: nobody had offered a buffer yet.
    machine.offer_event(0);
    assert_eq!(machine.event(), (1, told(0, 0), 1));
    machine.offer_event(0);
    let (other, other_file) = disk();
    let handle = Arc::downgrade(&other);
    machine
        .handle
        .add((2, 300), unit("other"), other, Arc::default(), None)
        .unwrap();
    assert_eq!(machine.event(), (1, told(2, 300), 1));
    machine.greet(lun(2, 300));
    machine.command(lun(2, 300), &REPORT_LUNS, Some(writable(DATA, 256)));
    let mut list = [0; 16];
    machine.get(DATA, &mut list);
    assert_eq!(list, [0, 0, 0, 8, 0, 0, 0, 0, 0x41, 0x2c, 0, 0, 0, 0, 0, 0]);

    machine.offer_event(0);
    machine.offer_event(1);
    other_file.as_file().set_len(8 << 20).unwrap();
    machine.handle.size_changed(2, 300);
    assert_eq!(machine.event(), (3, told(2, 300), 0x092a));
    let answer = machine.command(lun(2, 300), &TEST_UNIT_READY, None);
    assert_eq!(answer.sense, Some((6, 0x2a, 0x09)));

    assert!(machine.handle.remove(2, 300).is_some());
    assert!(machine.handle.remove(2, 300).is_none());
    assert_eq!(machine.event(), (1, told(2, 300), 2));
    assert_eq!(
        machine.command(lun(2, 300), &TEST_UNIT_READY, None),
        Answer::refused(BAD_TARGET)
    );
    wait_until("the disk is let go of", || handle.strong_count() == 0);
}

#[test]
fn a_driver_that_is_told_of_a_removal_can_write_its_cache_before() {
    let (mut machine, _file) = with_disk();
    machine.offer_event(0);
    assert_eq!(machine.event(), (1, told(0, 0), 1));
    let (disk, _kept) = disk();
    let unit = unit("goes");
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let found = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let handle = machine.handle.clone();
    let controls = Arc::default();
    handle
        .add((0, 1), Arc::clone(&unit), disk, controls, Some(found))
        .unwrap();
    assert_eq!(handle.size(0, 1), Some(16 << 20));
    assert_eq!((handle.is_found(0, 1), count.load(Ordering::SeqCst)), (false, 0));
    machine.greet(lun(0, 1));
    machine.greet(lun(0, 0));
    assert_eq!((handle.is_found(0, 1), count.load(Ordering::SeqCst)), (true, 1));
    machine.offer_event(0);
    assert_eq!(machine.event(), (1, told(0, 1), 1));

    assert!(!handle.announce_removal(0, 2), "there is no such unit");
    assert!(handle.announce_removal(0, 1));
    machine.offer_event(0);
    machine.offer_event(1);
    assert_eq!(machine.event(), (1, told(0, 1), 2));
    let synchronize_cache = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        machine.command(lun(0, 1), &synchronize_cache, None),
        Answer::good()
    );
    assert_eq!(unit.synchronizations(), 1);
    let removed = handle.remove(0, 1).unwrap();
    wait_until("the disk is let go of", || removed.is_idle());
    // Nothing was said a second time: the next event is of something else.
    handle.size_changed(0, 0);
    assert_eq!(machine.event(), (3, told(0, 0), 0x092a));
    reset_and_wait(&mut machine.device);
    assert!(!handle.announce_removal(0, 0), "nobody listens");
}

#[test]
fn one_adapter_has_disks_of_one_worker_beside_disks_for_all() {
    let mut machine = Machine::<Either<Arc<HostDevice>, PinnedDisk<HostDevice>>>::start();
    let ((image, image_file), (pinned, pinned_file)) = (disk(), disk());
    image_file.as_file().write_all_at(b"image", 0).unwrap();
    pinned_file.as_file().write_all_at(b"pinned", 0).unwrap();
    let worker = machine.worker.handle().clone();
    let pinned = machine.worker.run(move || async move {
        let disk = Arc::into_inner(pinned).unwrap();
        PinnedDisk::new(std::rc::Rc::new(disk), &worker).unwrap()
    });
    for (number, disk) in [(0, Either::First(image)), (7, Either::Second(pinned))] {
        let unit = unit(&format!("unit {number}"));
        machine
            .handle
            .add((0, number), unit, disk, Arc::default(), None)
            .unwrap();
        machine.greet(lun(0, number));
    }
    machine.greet(lun(0, 0));
    for (number, content) in [(0, &b"image\0"[..]), (7, b"pinned")] {
        let data = Some(writable(DATA, 512));
        assert_eq!(machine.command(lun(0, number), &read(0, 1), data), Answer::good());
        let mut found = [0; 6];
        machine.get(DATA, &mut found);
        assert_eq!(found, content);
        let data = Some(readable(DATA, 512));
        assert_eq!(
            machine.command(lun(0, number), &write(8, 1), data),
            Answer::good()
        );
    }
    for (file, content) in [(image_file, &b"image"[..]), (pinned_file, b"pinned")] {
        let mut found = vec![0; content.len()];
        file.as_file().read_exact_at(&mut found, 4096).unwrap();
        assert_eq!(found, content);
    }
}

#[test]
fn a_removed_disk_is_let_go_of_without_a_further_command_though_commands_wait_for_it() {
    let (mut machine, disk, controls) = with_stopped_disk();
    machine.begin(0, lun(0, 0), &write(0, 8), Some(readable(DATA, 4096)));
    wait_until("the disk has stopped", || controls.is_stopped());
    let removed = machine.handle.remove(0, 0).unwrap();
    let (_, answer) = machine.end();
    assert_eq!(answer.status, CHECK_CONDITION);
    wait_until("the unit is idle", || removed.is_idle());
    wait_until("the disk is let go of", || Arc::strong_count(&disk) == 1);
}

#[test]
fn task_management_ends_what_has_not_gone_to_the_disk() {
    let (mut machine, disk, controls) = with_stopped_disk();
    let data = || Some(readable(DATA, 4096));
    let tags = [0, 4, 8].map(|place| machine.begin(place, lun(0, 0), &write(0, 8), data()));
    wait_until("the disk has stopped", || controls.is_stopped());
    // QUERY TASK finds it, ABORT TASK ends it and only it.
    assert_eq!(machine.function(6, lun(0, 0), tags[1]), FUNCTION_SUCCEEDED);
    assert_eq!(machine.function(6, lun(0, 0), 999), OK);
    assert_eq!(machine.function(0, lun(0, 0), tags[1]), OK);
    assert_eq!(machine.end(), (4, Answer::refused(ABORTED)));
    assert_eq!(machine.function(6, lun(0, 0), tags[1]), OK);
    assert_eq!(machine.function(7, lun(0, 0), 0), FUNCTION_SUCCEEDED);
    // LOGICAL UNIT RESET ends all, and the unit says so.
    assert_eq!(machine.function(5, lun(0, 0), 0), OK);
    let mut ended = [machine.end(), machine.end()].map(|(place, answer)| {
        assert_eq!(answer, Answer::refused(ABORTED));
        place
    });
    ended.sort_unstable();
    assert_eq!(ended, [0, 8]);
    disk.fails.store(false, Ordering::SeqCst);
    controls.resume();
    let answer = machine.command(lun(0, 0), &TEST_UNIT_READY, None);
    assert_eq!(answer.sense.map(|(key, code, _)| (key, code)), Some((6, 0x29)));
    assert_eq!(machine.command(lun(0, 0), &write(0, 8), data()), Answer::good());
    assert_eq!(disk.writes.load(Ordering::SeqCst), 1);
    assert_eq!(machine.function(2, lun(0, 0), 0), FUNCTION_REJECTED);
    assert_eq!(machine.function(5, lun(0, 9), 0), INCORRECT_LUN);
    assert_eq!(machine.function(5, lun(3, 0), 0), BAD_TARGET);
}

#[test]
fn what_a_disk_says_of_its_holes_reaches_the_driver() {
    let mut machine = Machine::start();
    let unit = Unit::new(UnitOptions {
        provisioning: Provisioning::ThinZeroes,
        ..UnitOptions::new(Identity::from_name("thin", "thin"))
    });
    let disk = Arc::<Fickle>::default();
    machine
        .handle
        .add((0, 0), Arc::new(unit), disk, Arc::default(), None)
        .unwrap();
    machine.greet(lun(0, 0));
    let get_lba_status = [0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 24, 0, 0];
    let data = Some(writable(DATA, 24));
    assert_eq!(machine.command(lun(0, 0), &get_lba_status, data), Answer::good());
    let mut status = [0; 24];
    machine.get(DATA, &mut status);
    // From block 8 to the end, deallocated.
    let blocks = ((1_u32 << 30) / 512 - 8).to_be_bytes();
    assert_eq!(status[8..16], [0, 0, 0, 0, 0, 0, 0, 8]);
    assert_eq!(status[16..20], blocks);
    assert_eq!(status[20], 1);
}

#[test]
fn a_stopped_disk_goes_on_when_it_is_resumed_and_an_idle_function_waits_for_nothing() {
    let (mut machine, disk, controls) = with_stopped_disk();
    machine.begin(0, lun(0, 0), &write(0, 8), Some(readable(DATA, 4096)));
    wait_until("the disk has stopped", || controls.is_stopped());
    disk.fails.store(false, Ordering::SeqCst);
    controls.resume();
    assert_eq!(machine.end(), (0, Answer::good()));
    assert_eq!(machine.function(1, lun(0, 0), 0), OK);
}

#[test]
fn a_reset_ends_everything_and_the_next_driver_begins_anew() {
    let (mut machine, disk, controls) = with_stopped_disk();
    machine.begin(0, lun(0, 0), &write(0, 8), Some(readable(DATA, 4096)));
    machine.offer_event(0);
    machine.offer_event(1);
    wait_until("the disk has stopped", || controls.is_stopped());
    reset_and_wait(&mut machine.device);
    disk.fails.store(false, Ordering::SeqCst);
    controls.resume();
    let memory = Arc::clone(&machine.memory);
    let [control, event, requests] =
        [0x1000, 0x4000, 0x8000].map(|base| Driver::new(&memory, base, 64, true));
    let queues = vec![control.active(0), event.active(1), requests.active(2)];
    machine.events = activate(&mut machine.device, &memory, feature::RING_EVENT_IDX, queues);
    (machine.control, machine.event, machine.requests) = (control, event, requests);
    machine.greet(lun(0, 0));
    let data = Some(readable(DATA, 4096));
    assert_eq!(machine.command(lun(0, 0), &write(0, 8), data), Answer::good());
}

#[test]
fn requests_that_cannot_be_answered_stop_the_queue_and_attributes_that_are_not_supported_do_not() {
    let (mut machine, _file) = with_disk();
    let mut request = [0; COMMAND];
    request[..8].copy_from_slice(&lun(0, 0));
    request[16] = 1;
    machine.put(REQUEST, &request);
    let chain = [readable(REQUEST, COMMAND), writable(RESPONSE, ANSWER)];
    machine.requests.submit(0, &chain);
    assert_eq!(machine.end().1.sense, Some((5, 0x49, 0)));
    machine
        .requests
        .submit(0, &[readable(REQUEST, COMMAND - 1), writable(RESPONSE, ANSWER)]);
    let reason = machine.events.wait_for_reset_reason();
    assert!(reason.contains("shorter than its header"), "{reason}");
}

#[test]
fn a_driver_may_want_shorter_commands_and_less_sense() {
    let (mut machine, _file) = with_disk();
    machine.device.write_config(24, &16_u32.to_le_bytes());
    machine.device.write_config(20, &18_u32.to_le_bytes());
    let mut request = [0; 35];
    request[..8].copy_from_slice(&lun(0, 1));
    machine.put(REQUEST, &request);
    // Cut in the middle of everything.
    let chain = [
        readable(REQUEST, 11),
        readable(REQUEST + 11, 24),
        writable(RESPONSE, 5),
        writable(RESPONSE + 5, 25),
    ];
    machine.requests.submit(0, &chain);
    let (_, length) = machine.requests.wait_used();
    assert_eq!(length, 30);
    let mut response = [0; 30];
    machine.get(RESPONSE, &mut response);
    assert_eq!(response[..4], [18, 0, 0, 0]);
    assert_eq!((response[10], response[11]), (CHECK_CONDITION, OK));
    assert_eq!((response[12], response[24]), (0x70, 0x25));
}
