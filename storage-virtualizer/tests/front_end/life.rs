//! What a guest may expect of a disk that a decent server serves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use storage_virtualizer::controls::{Rate, RateLimit};
use storage_virtualizer::vhost_user::VhostUserOptions;
use storage_virtualizer::virtio_blk::{blk_feature, kind};
use virtio_core::{VirtioDevice, feature};

use crate::driver::{Driver, activate, reset_and_wait};
use crate::place::{DISK, Place, Requests, open, shared_memory, wait_until};

const FEATURES: u64 =
    feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC | blk_feature::FLUSH;

fn field<const N: usize>(device: &dyn VirtioDevice, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_config(offset, &mut bytes);
    bytes
}

#[test]
fn a_guest_sees_the_servers_disk_with_the_queues_of_its_own_configuration() {
    let place = Place::new();
    let _served = place.serve();
    let (device, _) = open(&place.socket(), 2, 32).unwrap();
    assert_eq!(device.queue_max_sizes(), [32, 32]);
    assert_eq!(u64::from_le_bytes(field(&device, 0)), DISK / 512);
    assert_eq!(u16::from_le_bytes(field(&device, 34)), 2);
    assert_eq!(
        u32::from_le_bytes(field(&device, 12)),
        30,
        "segments that fit in a queue"
    );
    let wanted = FEATURES & !feature::VERSION_1 | blk_feature::MQ | blk_feature::WRITE_ZEROES;
    assert_eq!(device.features() & wanted, wanted);
    assert_eq!(
        device.features() & (feature::VERSION_1 | 1 << 30 | blk_feature::CONFIG_WCE),
        0,
        "what is the transport's, the protocol's, or too late"
    );
    drop(device);
    let (device, _) = open(&place.socket(), 1, 256).unwrap();
    assert_eq!(device.features() & blk_feature::MQ, 0);
}

#[test]
fn what_is_written_through_one_queue_is_read_through_another_and_over_a_reset() {
    let place = Place::new();
    let _served = place.serve();
    let (mut device, _) = open(&place.socket(), 3, 128).unwrap();
    for life in 0..3_u8 {
        let memory = shared_memory();
        let mut drivers: Vec<_> = (0..3)
            .map(|index| Driver::new(&memory, index * 0x1_0000, 64, true))
            .collect();
        let active = (0..)
            .zip(&drivers)
            .map(|(index, driver)| driver.active(index))
            .collect();
        let events = activate(&mut device, &memory, FEATURES | blk_feature::MQ, active);
        for (queue, driver) in (0_u8..).zip(&mut drivers) {
            let mut requests = Requests(driver);
            for slot in 0..8 {
                let number = queue * 8 + slot;
                requests.write(slot.into(), u64::from(number) * 8, 1 + number + life);
            }
            let answered: u16 = (0..8).map(|_| requests.wait()).sum();
            assert_eq!(answered, (0..8).sum::<u16>());
        }
        let mut requests = Requests(&mut drivers[1]);
        requests.submit(9, kind::IN, 23 * 8);
        assert_eq!(requests.wait(), 9);
        assert_eq!(requests.data(9), vec![24 + life; 4096]);
        reset_and_wait(&mut device);
        assert!(events.reset_reasons.lock().unwrap().is_empty());
        // Nobody serves the queue any more.
        let used = drivers[1].used_index();
        Requests(&mut drivers[1]).submit(10, kind::IN, 0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(drivers[1].used_index(), used);
    }
    let mut byte = [0];
    File::open(place.image())
        .unwrap()
        .read_exact_at(&mut byte, 23 * 4096)
        .unwrap();
    assert_eq!(byte, [26]);
}

#[test]
fn requests_wait_for_a_server_that_is_stopped_and_go_on_with_its_successor() {
    let place = Place::new();
    let mut served = place.serve();
    let (mut device, observer) = open(&place.socket(), 2, 128).unwrap();
    let memory = shared_memory();
    let mut driver = Driver::new(&memory, 0, 128, true);
    let events = activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    let mut requests = Requests(&mut driver);
    for round in 0..4_u64 {
        requests.write(0, round * 64, 1);
        requests.wait();
        served.server.stop();
        drop(served.disk);
        wait_until("the server is gone", || !device.handle().is_connected());
        for slot in 0..16 {
            requests.write(slot, round * 64 + u64::from(slot) * 8 % 64, slot as u8 + 1);
        }
        served = place.serve();
        let mut answered: Vec<u16> = (0..16).map(|_| requests.wait()).collect();
        answered.sort_unstable();
        assert_eq!(answered, (0..16).collect::<Vec<_>>());
    }
    let lines = observer.0.lock().unwrap().clone();
    assert_eq!(lines.len(), 8, "{lines:?}");
    assert!(
        lines[0].contains("closed the connection") && lines[1] == "back",
        "{lines:?}"
    );
    assert!(events.reset_reasons.lock().unwrap().is_empty());
}

#[test]
fn a_guest_is_reset_and_started_while_there_is_no_server() {
    let place = Place::new();
    let served = place.serve();
    let (mut device, _) = open(&place.socket(), 1, 64).unwrap();
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    served.server.stop();
    drop(served.disk);
    wait_until("the server is gone", || !device.handle().is_connected());
    reset_and_wait(&mut device);
    let mut driver = Driver::new(&memory, 0, 64, false);
    let without = FEATURES & !feature::RING_EVENT_IDX;
    activate(&mut device, &memory, without, vec![driver.active(0)]);
    let mut requests = Requests(&mut driver);
    requests.write(3, 8, 7);
    let _served = place.serve();
    assert_eq!(requests.wait(), 3);
}

#[test]
fn requests_that_a_limit_holds_back_do_not_hold_back_a_reset() {
    let place = Place::new();
    let options = VhostUserOptions::default();
    let rate = Rate {
        per_second: 1,
        burst: 1,
    };
    options.device.controls.set_limit(RateLimit {
        operations: Some(rate),
        bytes: None,
    });
    let _served = place.serve_as(options);
    let (mut device, _) = open(&place.socket(), 1, 128).unwrap();
    let memory = shared_memory();
    let mut driver = Driver::new(&memory, 0, 128, true);
    activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    let mut requests = Requests(&mut driver);
    (0..32).for_each(|slot| requests.write(slot, 0, 1));
    requests.wait();
    let start = std::time::Instant::now();
    reset_and_wait(&mut device);
    assert!(start.elapsed().as_secs() < 10);
}

#[test]
fn a_disk_that_grows_is_told_to_the_guest() {
    let place = Place::new();
    let served = place.serve();
    let (mut device, _) = open(&place.socket(), 1, 64).unwrap();
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    let events = activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    place.grow(2 * DISK);
    served.disk.refresh_size().unwrap();
    served.server.size_changed();
    wait_until("the guest is told", || {
        events.config_changes.load(Ordering::Relaxed) == 1
    });
    assert_eq!(u64::from_le_bytes(field(&device, 0)), 2 * DISK / 512);
    assert_eq!(device.handle().size(), 2 * DISK);
    // The same again is no news.
    served.server.size_changed();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(events.config_changes.load(Ordering::Relaxed), 1);
}

#[test]
fn a_disk_that_grows_before_the_driver_is_ready_is_told_to_it_then() {
    let place = Place::new();
    let served = place.serve();
    let (mut device, _) = open(&place.socket(), 1, 64).unwrap();
    place.grow(2 * DISK);
    served.disk.refresh_size().unwrap();
    served.server.size_changed();
    wait_until("the device knows", || {
        u64::from_le_bytes(field(&device, 0)) == 2 * DISK / 512
    });
    // A driver that has read the old size begins now.
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    let events = activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    wait_until("the guest is told", || {
        events.config_changes.load(Ordering::Relaxed) == 1
    });
}

#[test]
fn a_disk_that_grew_while_its_server_was_away_is_told_to_the_guest() {
    let place = Place::new();
    let served = place.serve();
    let (mut device, _) = open(&place.socket(), 1, 64).unwrap();
    let memory = shared_memory();
    let driver = Driver::new(&memory, 0, 64, true);
    let events = activate(&mut device, &memory, FEATURES, vec![driver.active(0)]);
    served.server.stop();
    drop(served.disk);
    place.grow(2 * DISK);
    let _served = place.serve();
    wait_until("the guest is told", || {
        events.config_changes.load(Ordering::Relaxed) == 1
    });
    assert_eq!(device.handle().size(), 2 * DISK);
}
