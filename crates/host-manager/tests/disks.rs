//! Machines' disks over the connections that their processes have to the manager; the machines are front-ends without a guest.
#![allow(clippy::unwrap_used)]

mod host;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use api::virtual_disk::{DiskMode, DiskOperation};
use api::{
    AtPowerOff, AttachRequest, DiskChange, DiskConfig, DiskLimits, OnError, ProblemKind, StorageRequest,
};
use host::{Deaf, Manager, disk, make_pool};
use management::{Client, Scope, Target};
use storage_virtualizer::vhost_user::front_end::{FrontEndKind, FrontEndOptions, VhostUserDevice, dial};
use vhost_user_load::front_end::FrontEnd;
use vhost_user_load::load::{Load, Pattern, run};
use vhost_user_load::pattern::Data;
use vhost_user_load::queue::Queue;

const ROOT: &str = "/root.dsk";
const DATA: &str = "/data.dsk";
const READ: u32 = 0;
const WRITE: u32 = 1;

fn with_manager(story: impl FnOnce(Manager)) {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT, DATA]);
    story(Manager::start(folder.path(), &devices));
}

/// Does one request on the first block of a disk.
fn request(queue: &mut Queue, kind: u32) {
    queue.submit(0, kind, 0, 4096, kind == READ);
    queue.notify().unwrap();
    while queue.take_used().unwrap().is_none() {
        assert!(queue.wait(host::SOON).unwrap(), "no answer");
    }
    assert_eq!(queue.status(0), 0);
}

fn write(queue: &mut Queue, byte: u8) {
    queue.data(0, 4096).unwrap().copy_from(&[byte; 4096]);
    request(queue, WRITE);
}

fn read(queue: &mut Queue) -> u8 {
    request(queue, READ);
    let mut bytes = [0_u8; 4096];
    queue.data(0, 4096).unwrap().copy_to(&mut bytes);
    bytes[4095]
}

#[test]
fn a_disk_is_in_use_as_long_as_the_connection() {
    with_manager(|manager| {
        let machine = manager.machine("web1", &disk("root", ROOT));
        assert_eq!(machine.capacity(), 16 << 20);
        let mut queue = machine.queues().unwrap().remove(0);
        write(&mut queue, 7);
        assert_eq!(read(&mut queue), 7);
        let used = manager.disks().list();
        assert_eq!(
            (used.len(), used[0].vm.as_str(), used[0].file.as_str()),
            (1, "web1", ROOT)
        );
        let (_, counters) = manager.disks().counters().remove(0);
        assert_eq!((counters.counts.reads, counters.counts.writes), (1, 1));

        drop(machine);
        manager.wait_for(0);
        // At once, while the first one may still be being closed.
        let machine = manager.machine("web2", &disk("disk0", ROOT));
        assert_eq!(read(&mut machine.queues().unwrap().remove(0)), 7);
        drop(machine);
        manager.wait_for(0);
        manager.disks().close();
        assert_eq!(
            manager.happened(),
            [
                "web1 root has /root.dsk",
                "web1 root lets /root.dsk go",
                "web2 disk0 has /root.dsk",
                "web2 disk0 lets /root.dsk go"
            ]
        );
        manager.stop();
    });
}

fn wait_until(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < host::SOON, "{} KiB are held", held());
        thread::sleep(Duration::from_millis(5));
    }
}

/// KiB that the kernel holds for this process, of which both sides are threads.
fn held() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_memory_of_a_machine_is_held_if_it_stays_and_no_longer_than_the_connection() {
    with_manager(|manager| {
        let asked = host::request("web1", &disk("root", ROOT), false);
        let machine = manager.machine_that_asks(AttachRequest {
            memory_stays: true,
            ..asked
        });
        let mut queue = machine.queues().unwrap().remove(0);
        write(&mut queue, 7);
        assert_eq!(read(&mut queue), 7);
        wait_until(|| held() > 0);
        write(&mut queue, 8);
        assert_eq!(read(&mut queue), 8);
        drop(machine);
        manager.wait_for(0);
        wait_until(|| held() == 0);
        manager.stop();
    });
}

#[test]
fn two_machines_cannot_write_one_disk_and_many_can_read_one() {
    with_manager(|manager| {
        let machine = manager.machine("web1", &disk("root", ROOT));
        let refused = manager.attach("web2", &disk("root", ROOT)).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Conflict, "{refused}");
        assert!(refused.detail.contains("in use by machine `web1`"), "{refused}");
        // Nor one machine twice.
        let refused = manager.attach("web1", &disk("root", DATA)).unwrap_err();
        assert!(refused.detail.contains("disk `root`"), "{refused}");
        drop(machine);
        let reader = DiskConfig {
            read_only: true,
            ..disk("root", ROOT)
        };
        let readers = ["web2", "web3"].map(|vm| manager.machine(vm, &reader));
        assert!(readers.iter().all(FrontEnd::is_read_only));
        manager.stop();
    });
}

#[test]
fn a_machine_that_was_killed_has_its_disk_again_when_it_is_started_again() {
    with_manager(|manager| {
        let config = DiskConfig {
            mode: DiskMode::Nonpersistent,
            ..disk("root", ROOT)
        };
        for _ in 0..10 {
            // Nobody waits until the manager has noticed.
            let machine = manager.machine("web1", &config);
            let mut queue = machine.queues().unwrap().remove(0);
            assert_eq!(read(&mut queue), 0, "what was written is forgotten");
            write(&mut queue, 9);
        }
        manager.stop();
    });
}

#[test]
fn what_is_not_to_last_lasts_as_long_as_the_machine_whatever_the_manager_does() {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT, DATA]);
    let mut manager = Manager::start(folder.path(), &devices);
    let fleeting = DiskConfig {
        mode: DiskMode::Nonpersistent,
        ..disk("root", ROOT)
    };
    let undone = DiskConfig {
        mode: DiskMode::Undoable,
        at_power_off: Some(AtPowerOff::Discard),
        ..disk("data", DATA)
    };
    let mut machines: Vec<_> = [&fleeting, &undone]
        .map(|config| {
            let machine = manager.machine("web1", config);
            let mut queue = machine.queues().unwrap().remove(0);
            write(&mut queue, 5);
            (machine, queue)
        })
        .into();
    for _ in 0..2 {
        manager.stop();
        manager = Manager::start(folder.path(), &devices);
        for (machine, queue) in &mut machines {
            machine.reconnect().unwrap();
            assert_eq!(read(queue), 5);
        }
    }
    for (machine, _) in &mut machines {
        machine.stop().unwrap();
    }
    drop(machines);
    manager.wait_for(0);
    // They have ended in order: power-off.
    for config in [&fleeting, &undone] {
        let machine = manager.machine("web1", config);
        assert_eq!(read(&mut machine.queues().unwrap().remove(0)), 0);
    }
    manager.stop();
}

#[test]
fn a_machine_that_is_started_waits_for_those_that_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT]);
    let manager = Manager::start(folder.path(), &devices);
    let mut machine = manager.machine("web1", &disk("root", ROOT));
    let mut queue = machine.queues().unwrap().remove(0);
    write(&mut queue, 4);
    manager.stop();
    let manager = Manager::start(folder.path(), &devices);
    manager.disks().expect_machines(Duration::from_secs(2));
    thread::scope(|scope| {
        let late = scope.spawn(|| manager.attach("web2", &disk("root", ROOT)).unwrap_err());
        thread::sleep(Duration::from_millis(300));
        machine.reconnect().unwrap();
        let refused = late.join().unwrap();
        assert!(refused.detail.contains("in use by machine `web1`"), "{refused}");
    });
    assert_eq!(read(&mut queue), 4);
    manager.stop();
}

#[test]
fn an_undoable_disk_of_a_machine_that_was_killed_is_kept() {
    with_manager(|manager| {
        let config = DiskConfig {
            mode: DiskMode::Undoable,
            at_power_off: Some(AtPowerOff::Discard),
            ..disk("root", ROOT)
        };
        let machine = manager.machine("web1", &config);
        write(&mut machine.queues().unwrap().remove(0), 8);
        drop(machine);
        let machine = manager.machine("web1", &config);
        assert_eq!(read(&mut machine.queues().unwrap().remove(0)), 8);
        manager.stop();
    });
}

#[test]
fn requests_in_flight_survive_managers_that_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let devices = make_pool(folder.path(), &[ROOT]);
    let mut manager = Manager::start(folder.path(), &devices);
    let config = DiskConfig {
        queues: 2,
        ..disk("root", ROOT)
    };
    let mut front_end = manager.options("web1", &config);
    front_end.patience = Duration::from_secs(30);
    let load = Load {
        front_end,
        pattern: Pattern::Mixed,
        depth: 16,
        duration: Duration::from_secs(3),
        range: None,
        once: false,
        stride: None,
        data: Data::default(),
        verify: true,
        flush_every: 500,
        reconnect: true,
        patience: Duration::from_secs(30),
        pid: None,
        seed: 7,
    };
    let running = thread::spawn(move || run(&load));
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(600));
        manager.stop();
        manager = Manager::start(folder.path(), &devices);
    }
    let report = running.join().unwrap().unwrap();
    assert!(
        report.reconnects >= 2 && report.verified_blocks > 50,
        "{report:?}"
    );
    manager.stop();
}

#[test]
fn limits_are_changed_while_a_machine_uses_the_disk() {
    with_manager(|manager| {
        let limited = DiskConfig {
            limits: DiskLimits {
                iops: Some(10),
                iops_burst: Some(1),
                ..DiskLimits::default()
            },
            ..disk("root", ROOT)
        };
        let machine = manager.machine("web1", &limited);
        let mut queue = machine.queues().unwrap().remove(0);
        let mut time = |requests: u32| {
            let begin = Instant::now();
            (0..requests).for_each(|_| request(&mut queue, READ));
            begin.elapsed()
        };
        assert!(time(4) > Duration::from_millis(200));
        let free = DiskChange {
            limits: DiskLimits {
                iops: Some(0),
                ..DiskLimits::default()
            },
            ..DiskChange::default()
        };
        let (vm, device) = ("web1".parse().unwrap(), "root".parse().unwrap());
        manager.disks().change(&vm, &device, &free).unwrap();
        assert!(time(40) < Duration::from_secs(2));
        let stop = DiskChange {
            on_error: Some(OnError::Stop),
            ..DiskChange::default()
        };
        let refused = manager.disks().change(&vm, &device, &stop).unwrap_err();
        assert_eq!(refused.object.as_deref(), Some("on-error"), "{refused}");
        let other = "disk9".parse().unwrap();
        let refused = manager.disks().change(&vm, &other, &free).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::NotFound);
        manager.stop();
    });
}

#[test]
fn a_new_size_is_told_to_the_guest() {
    with_manager(|manager| {
        let options = manager.options("web1", &disk("root", ROOT));
        let dial = Arc::new(move || {
            let dialled = dial(&options.socket)?;
            let greeting = options.greeting.as_ref().unwrap();
            (greeting.0)(&dialled.socket).map_err(io::Error::other)?;
            Ok(dialled)
        });
        let front_end = FrontEndOptions {
            kind: FrontEndKind::Blk,
            name: "root".into(),
            queues: 1,
            queue_size: 128,
            on_start: None,
            observer: Arc::new(Deaf),
        };
        let machine = VhostUserDevice::open(dial, front_end).unwrap();
        assert_eq!(machine.handle().size(), 16 << 20);
        let resize = DiskOperation::Resize {
            path: ROOT.into(),
            size: 24 << 20,
            force: false,
        };
        manager.pool().execute(StorageRequest::Disk(resize)).unwrap();
        let begin = Instant::now();
        while machine.handle().size() != 24 << 20 {
            assert!(begin.elapsed() < host::SOON, "{}", machine.handle().size());
            thread::sleep(Duration::from_millis(5));
        }
        manager.stop();
    });
}

#[test]
fn what_a_manager_cannot_keep_is_refused_with_the_key() {
    with_manager(|manager| {
        let refusal = |change: &dyn Fn(&mut DiskConfig)| {
            let mut config = disk("root", ROOT);
            change(&mut config);
            let refused = manager.attach("web1", &config).unwrap_err();
            refused.object.unwrap_or_default()
        };
        assert_eq!(refusal(&|disk| disk.on_error = OnError::Stop), "on-error");
        assert_eq!(refusal(&|disk| disk.bus = api::DiskBus::VirtioScsi), "adapter");
        assert_eq!(
            refusal(&|disk| disk.limit_group = Some("bulk".parse().unwrap())),
            "group-limits"
        );
        assert_eq!(refusal(&|disk| disk.id = api::DeviceId::default()), "id");
        assert_eq!(
            refusal(&|disk| {
                disk.file = None;
                disk.image = Some("/etc/passwd".into());
            }),
            "file"
        );
        let refused = manager.attach("web1", &disk("root", "/nothing.dsk")).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::NotFound, "{refused}");
        assert!(manager.disks().list().is_empty());
        manager.stop();
    });
}

#[test]
fn garbage_and_silence_cost_the_one_who_sends_them_his_disk_and_nobody_else() {
    with_manager(|manager| {
        let good = manager.machine("web1", &disk("data", DATA));
        let mut queue = good.queues().unwrap().remove(0);
        let mut bad = manager.attach("web2", &disk("root", ROOT)).unwrap();
        bad.write_all(&[0xff; 4096]).unwrap();
        let mut rest = Vec::new();
        // It may be reset instead of being closed.
        let _ = bad.read_to_end(&mut rest);
        assert!(rest.is_empty());
        manager.wait_for(1);
        // Who sends before it was told that it may.
        let mut hasty = UnixStream::connect(manager.socket()).unwrap();
        let body = serde_json::to_string(&api::AttachRequest {
            vm: "web3".parse().unwrap(),
            pool: None,
            disk: disk("root", ROOT),
            adapter: None,
            group_limits: None,
            goes_on: false,
            memory_stays: false,
        })
        .unwrap();
        let request = format!(
            "POST /v1/attachments HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: smsvmm-vhost-user\r\ncontent-length: {}\r\n\r\n{body}garbage",
            body.len()
        );
        hasty.write_all(request.as_bytes()).unwrap();
        let _ = hasty.read_to_end(&mut rest);
        // Who says nothing keeps it, and can be interrupted.
        let silent = manager.attach("web4", &disk("root", ROOT)).unwrap();
        manager.wait_for(2);
        write(&mut queue, 3);
        assert_eq!(read(&mut queue), 3);
        drop(silent);
        manager.stop();
    });
}

#[test]
fn a_manager_that_ends_refuses_and_waits_for_nobody_who_is_there() {
    with_manager(|manager| {
        let silent = manager.attach("web1", &disk("root", ROOT)).unwrap();
        let machine = manager.machine("web2", &disk("data", DATA));
        let begin = Instant::now();
        manager.disks().close();
        assert!(begin.elapsed() < Duration::from_secs(5));
        let refused = manager.attach("web3", &disk("root", ROOT)).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Stopping, "{refused}");
        drop((silent, machine));
        manager.stop();
    });
}

/// Numbers for people: `cargo test -p host-manager --test disks -- --ignored --nocapture latency`.
#[test]
#[ignore = "measures; says nothing about right and wrong"]
fn latency_of_questions_while_eight_machines_work() {
    let names: Vec<String> = (0..8).map(|number| format!("/d{number}.dsk")).collect();
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<&str> = names.iter().map(String::as_str).collect();
    let devices = make_pool(folder.path(), &files);
    let manager = Manager::start(folder.path(), &devices);
    let seconds = 8;
    let loads = names.iter().enumerate().map(|(number, file)| Load {
        front_end: manager.options(&format!("vm{number}"), &disk("root", file)),
        pattern: Pattern::Mixed,
        depth: 8,
        duration: Duration::from_secs(seconds),
        range: Some(4 << 20),
        once: false,
        stride: None,
        data: Data::default(),
        verify: false,
        flush_every: 100,
        reconnect: false,
        patience: Duration::from_secs(30),
        pid: None,
        seed: number as u64,
    });
    let running: Vec<_> = loads.map(|load| thread::spawn(move || run(&load))).collect();
    let client = Client::new(Target::Manager(manager.socket().to_owned(), Scope::All)).unwrap();
    let begin = Instant::now();
    let mut times = [Vec::new(), Vec::new()];
    while begin.elapsed() < Duration::from_secs(seconds - 1) {
        let asked = Instant::now();
        client.host().unwrap();
        times[0].push(asked.elapsed());
        let asked = Instant::now();
        client.storage(&StorageRequest::Status).unwrap();
        times[1].push(asked.elapsed());
        thread::sleep(Duration::from_millis(5));
    }
    for one in running {
        one.join().unwrap().unwrap();
    }
    for (what, times) in ["GET /v1/host", "storage status"].iter().zip(&mut times) {
        times.sort();
        let at = |part: usize| times[(times.len() - 1) * part / 100];
        println!(
            "{what}: {} times, p50 {:?}, p99 {:?}, most {:?}",
            times.len(),
            at(50),
            at(99),
            at(100)
        );
    }
    manager.stop();
}
