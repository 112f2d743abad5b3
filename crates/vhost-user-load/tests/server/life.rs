//! What a decent front-end may expect.

use std::thread;
use std::time::{Duration, Instant};

use storage_virtualizer::vhost_user::{VhostUserError, VhostUserOptions, VhostUserServer};
use vhost_user_load::front_end::FrontEnd;
use vhost_user_load::load::{Report, run};
use vhost_user_load::pattern::Data;

use crate::place::{Place, SIZE, serve, until_reconnected};

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_is_written_is_read_through_several_queues() {
    let place = Place::new();
    let served = place.serve();
    let mut load = place.load();
    load.front_end.queues = 3;
    let report = run(&load).unwrap();
    assert!(report.operations > 100, "{report:?}");
    assert!(report.verified_blocks > 50, "{report:?}");
    // The next one finds the disk free, and every answer is counted.
    let mut load = place.load();
    load.duration = Duration::from_millis(100);
    load.front_end.inflight = false;
    load.data = Data::Words;
    let words = run(&load).unwrap();
    assert!(words.verified_blocks > 0, "{words:?}");
    wait_until("nobody is left", || served.server.front_ends() == 0);
    let counters = served.server.counters().counts;
    assert!(
        counters.reads + counters.writes >= report.operations,
        "{counters:?}"
    );
    assert!(counters.flushes > 0 && counters.errors == 0, "{counters:?}");
    served.server.stop();
    assert!(!place.socket().exists());
}

/// KiB that the kernel holds for this process, of which both sides are threads.
fn held() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_that_stays_is_held_while_its_queues_are_served_and_no_longer() {
    let place = Place::new();
    let options = VhostUserOptions {
        memory_stays: true,
        ..VhostUserOptions::default()
    };
    let served = serve(&place.image(), &place.socket(), options);
    let mut load = place.load();
    load.front_end.queues = 2;
    let running = thread::spawn(move || run(&load));
    wait_until("the memory is held", || held() > 0);
    let report = running.join().unwrap().unwrap();
    assert!(report.verified_blocks > 50, "{report:?}");
    wait_until("the memory is let go", || held() == 0);
    // The next one's memory lies where the first one's was, as a rule. Its requests have several segments each.
    let mut load = place.load();
    load.front_end.block_size = 16 << 10;
    load.front_end.segment = Some(3072);
    let report = run(&load).unwrap();
    assert!(report.verified_blocks > 50, "{report:?}");
    served.server.stop();
    wait_until("the memory is let go", || held() == 0);
}

#[test]
fn a_server_that_is_stopped_and_started_under_load_loses_nothing() {
    until_reconnected(3, [2, 10, 40], started_under_load);
}

/// The server is stopped and started three times.
fn started_under_load(duration: Duration) -> Report {
    let place = Place::new();
    let mut load = place.load();
    load.reconnect = true;
    load.duration = duration;
    let mut served = place.serve();
    let running = thread::spawn(move || run(&load));
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(400));
        served.server.stop();
        drop(served.disk);
        served = place.serve();
    }
    running.join().unwrap().unwrap()
}

#[test]
fn a_second_front_end_waits_for_the_first_to_go() {
    let place = Place::new();
    let _served = place.serve();
    let first = FrontEnd::connect(&place.load().front_end).unwrap();
    let load = place.load();
    let second =
        thread::spawn(move || FrontEnd::connect(&load.front_end).map(|front_end| front_end.capacity()));
    thread::sleep(Duration::from_millis(200));
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().unwrap().unwrap(), SIZE);
}

#[test]
fn a_socket_is_taken_over_only_from_the_dead() {
    let place = Place::new();
    let served = place.serve();
    let other = Place::new();
    let worker = block_io::Worker::start("io", block_io::WorkerOptions::default()).unwrap();
    let disk = std::sync::Arc::new(
        block_io::HostDevice::open(other.image(), &block_io::OpenOptions::default()).unwrap(),
    );
    let start = |path: &std::path::Path| {
        let workers = vec![worker.handle().clone()];
        VhostUserServer::start(path, disk.clone(), VhostUserOptions::default(), workers)
    };
    assert!(matches!(
        start(&place.socket()),
        Err(VhostUserError::InUse { .. })
    ));
    assert!(matches!(
        start(&place.image()),
        Err(VhostUserError::NotSocket { .. })
    ));
    drop(served);
    // As a killed server leaves it.
    drop(std::os::unix::net::UnixListener::bind(place.socket()).unwrap());
    start(&place.socket()).unwrap();
}

#[test]
fn a_disk_that_grows_is_seen_by_the_next_look() {
    let place = Place::new();
    let served = place.serve();
    let front_end = FrontEnd::connect(&place.load().front_end).unwrap();
    assert_eq!(front_end.capacity(), SIZE);
    drop(front_end);
    std::fs::File::options()
        .write(true)
        .open(place.image())
        .unwrap()
        .set_len(2 * SIZE)
        .unwrap();
    served.disk.refresh_size().unwrap();
    served.server.size_changed();
    let front_end = FrontEnd::connect(&place.load().front_end).unwrap();
    assert_eq!(front_end.capacity(), 2 * SIZE);
}

#[test]
fn a_limit_holds_and_can_be_changed_under_load() {
    use std::sync::Arc;
    use storage_virtualizer::controls::{DiskControls, Rate, RateLimit};
    let place = Place::new();
    let controls = Arc::new(DiskControls::default());
    let limit = |per_second| RateLimit {
        operations: Some(Rate {
            per_second,
            burst: 10,
        }),
        bytes: None,
    };
    controls.set_limit(limit(500));
    let mut options = VhostUserOptions::default();
    options.device.controls = Arc::clone(&controls);
    let _served = serve(&place.image(), &place.socket(), options);
    let mut load = place.load();
    load.verify = false;
    load.flush_every = 0;
    let most = |seconds: f64| 500.0 * seconds + 60.0;
    // A busy machine may not make use of all that it may, or end late: once it must come out.
    let reports: Vec<_> = (0..3).map(|_| run(&load).unwrap()).collect();
    let holds = reports
        .iter()
        .any(|report| (400..=560).contains(&report.operations));
    assert!(holds, "{reports:?}");
    for report in reports {
        assert!(report.iops * report.seconds <= most(report.seconds), "{report:?}");
    }
    let running = thread::spawn(move || run(&load));
    thread::sleep(Duration::from_millis(300));
    controls.set_limit(RateLimit::default());
    let report = running.join().unwrap().unwrap();
    assert!(report.operations > 1000, "{report:?}");
}
