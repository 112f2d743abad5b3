//! Physical storage is reconfigured, and long work is watched and steered, while disks of the pool are written.
#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "the module is shared with other tests")]

mod common;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::file::{FileAnswer, FileOperation, Target};
use api::storage::{
    FIRST_VOLATILE_JOB, JobPriority, JobState, JobStatus, LayoutKind, NewDevice, Operation, Outcome,
    PoolDeviceState, PoolEvent, PoolEventKind, PoolLoad, PoolStatus, ReadPolicy, Shape,
};
use api::virtual_disk::{DiskMode, DiskOperation};
use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use block_io::{AlignedBuffer, BlockDevice, Durability, WorkerOptions};
use common::{go_on, new_device, pool};
use storage_manager::{DiskOptions, HostedDisk, HostedPool, disk_mode};
use storage_virtualizer::{DiskHandle, PinnedDisk};

type Handle = PinnedDisk<storage_manager::VirtualDisk>;

const DISK: &str = "/root.dsk";
const SIZE: u64 = 4 << 20;
const PIECE: usize = 16384;

fn open(devices: &[String]) -> Arc<HostedPool> {
    Arc::new(HostedPool::open("test", devices.to_vec(), WorkerOptions::default()).unwrap())
}

/// A pool on two devices, with a disk on a mirror.
fn with_disk(folder: &Path) -> Vec<String> {
    let devices = pool(folder);
    let create = DiskOperation::Create {
        path: DISK.into(),
        size: SIZE,
        thick: false,
        target: None,
        checksums: None,
    };
    storage_manager::execute_disk(devices.clone(), create, &mut go_on).unwrap();
    devices
}

/// A file that may become a device.
fn blank(folder: &Path, name: &str) -> NewDevice {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    new_device(path.to_str().unwrap())
}

fn opened(pool: &HostedPool) -> HostedDisk {
    let options = DiskOptions {
        mode: disk_mode(DiskMode::Persistent),
        ..DiskOptions::default()
    };
    pool.disk(DISK, options).unwrap()
}

fn on_worker<T: Send + 'static, F: Future<Output = T> + 'static>(
    pool: &HostedPool,
    make: impl FnOnce() -> F + Send + 'static,
) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        sender.send(make().await).unwrap();
    });
    receiver.recv().unwrap()
}

fn write(pool: &HostedPool, handle: &Handle, offset: u64, byte: u8) {
    let handle = handle.clone();
    on_worker(pool, move || async move {
        let disk = handle.local().unwrap();
        let mut buffer = AlignedBuffer::new(PIECE);
        buffer.as_mut_slice().fill(byte);
        // SAFETY: the buffer outlives the request, which is awaited.
        let memory = [unsafe { buffer.io(0, PIECE) }];
        disk.write(offset, &memory, Durability::Volatile).await.unwrap();
        disk.flush().await.unwrap();
    });
}

fn read(pool: &HostedPool, handle: &Handle, offset: u64) -> Vec<u8> {
    let handle = handle.clone();
    on_worker(pool, move || async move {
        let disk = handle.local().unwrap();
        let buffer = AlignedBuffer::new(PIECE);
        // SAFETY: as above.
        let memory = [unsafe { buffer.io(0, PIECE) }];
        disk.read(offset, &memory).await.unwrap();
        buffer.as_slice().to_vec()
    })
}

/// Somebody who writes to a disk and reads it again, and knows what must be there.
struct Guest {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Vec<u8>>,
}

impl Guest {
    fn start(pool: &Arc<HostedPool>, disk: &HostedDisk) -> Self {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (pool, handle) = (Arc::clone(pool), disk.handle().clone());
        let thread = std::thread::spawn({
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            move || {
                let pieces = SIZE / PIECE as u64;
                let mut known = vec![0_u8; usize::try_from(pieces).unwrap()];
                let mut next = 1_u64;
                while !stop.load(Ordering::Relaxed) {
                    // Here and there, in an order that repeats itself late.
                    next = next * 48_271 % 2_147_483_647;
                    let piece = next % pieces;
                    let place = &mut known[usize::try_from(piece).unwrap()];
                    *place = u8::try_from(next % 255).unwrap() + 1;
                    write(&pool, &handle, piece * PIECE as u64, *place);
                    let other = (next / pieces) % pieces;
                    let found = read(&pool, &handle, other * PIECE as u64);
                    assert!(
                        found
                            .iter()
                            .all(|byte| *byte == known[usize::try_from(other).unwrap()])
                    );
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                known
            }
        });
        Self { stop, rounds, thread }
    }

    /// It does not stand still.
    fn goes_on(&self) {
        let (before, begun) = (self.rounds.load(Ordering::Relaxed), Instant::now());
        while self.rounds.load(Ordering::Relaxed) < before + 5 {
            assert!(!self.thread.is_finished(), "the guest has failed");
            assert!(begun.elapsed() < Duration::from_secs(20), "the guest waits");
            std::thread::yield_now();
        }
    }

    fn end(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn see_that_it_holds(pool: &HostedPool, disk: &HostedDisk, known: &[u8]) {
    for (piece, byte) in (0..).zip(known) {
        let found = read(pool, disk.handle(), piece * PIECE as u64);
        assert!(found.iter().all(|found| found == byte), "piece {piece}");
    }
}

fn perform(pool: &HostedPool, operation: Operation) -> Result<Outcome, Problem> {
    match pool.execute(StorageRequest::Pool(operation))? {
        StorageAnswer::Pool(outcome) => Ok(*outcome),
        other => panic!("{other:?}"),
    }
}

/// Does it, and sees that all of its jobs did what they should.
fn done(pool: &HostedPool, operation: Operation) -> PoolStatus {
    let outcome = perform(pool, operation).unwrap();
    for job in &outcome.jobs {
        assert_eq!(job.state, JobState::Done, "{job:?}");
    }
    outcome.pool
}

fn begin(pool: &HostedPool, operation: Operation) -> JobStatus {
    match pool.execute(StorageRequest::Begin(operation)).unwrap() {
        StorageAnswer::Pool(outcome) => outcome.jobs[0].clone(),
        other => panic!("{other:?}"),
    }
}

fn files(pool: &HostedPool, operation: FileOperation) -> Result<FileAnswer, Problem> {
    match pool.execute(StorageRequest::File(operation))? {
        StorageAnswer::File(outcome) => Ok(outcome.answer),
        other => panic!("{other:?}"),
    }
}

fn status(pool: &HostedPool) -> PoolStatus {
    match pool.execute(StorageRequest::Status).unwrap() {
        StorageAnswer::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

fn job(pool: &HostedPool, id: u32) -> JobStatus {
    status(pool).jobs.into_iter().find(|job| job.id == id).unwrap()
}

fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "it did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn shape(layout: LayoutKind) -> Shape {
    Shape {
        layout,
        columns: 0,
        copies: 0,
        stripe_unit: 0,
        class: String::new(),
        devices: Vec::new(),
    }
}

fn new_volume(name: &str) -> Operation {
    Operation::CreateVolume {
        name: name.into(),
        size: 16 << 20,
        block: 4096,
        shape: shape(LayoutKind::Concat),
        read_policy: ReadPolicy::default(),
        raw: false,
    }
}

fn names(pool: &PoolStatus) -> Vec<String> {
    let name = |path: &String| path.rsplit('/').next().unwrap().to_owned();
    pool.devices.iter().map(|device| name(&device.name)).collect()
}

#[test]
fn everything_is_changed_under_a_guest_that_writes() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    let guest = Guest::start(&pool, &disk);
    let throttle = 0;

    let added = vec![blank(folder.path(), "d2"), blank(folder.path(), "d3")];
    let now = done(&pool, Operation::AddDevices { devices: added });
    assert_eq!(names(&now), ["d0", "d1", "d2", "d3"]);
    guest.goes_on();
    let by = blank(folder.path(), "d4");
    let now = done(
        &pool,
        Operation::ReplaceDevice {
            device: "d0".into(),
            by,
            throttle,
        },
    );
    assert_eq!(names(&now), ["d1", "d2", "d3", "d4"]);
    guest.goes_on();
    // What has left is free at once, and known as what it was.
    let again = || NewDevice {
        force: true,
        ..new_device(&devices[0])
    };
    let now = done(
        &pool,
        Operation::AddDevices {
            devices: vec![again()],
        },
    );
    assert_eq!(names(&now), ["d1", "d2", "d3", "d4", "d0"]);
    done(
        &pool,
        Operation::EvacuateDevice {
            device: "d1".into(),
            to: None,
            throttle,
        },
    );
    let now = done(&pool, Operation::RemoveDevice { device: "d1".into() });
    assert_eq!(names(&now), ["d2", "d3", "d4", "d0"]);
    guest.goes_on();

    let name = || "data".to_owned();
    done(
        &pool,
        Operation::SetLayout {
            name: name(),
            shape: shape(LayoutKind::Raid5),
            throttle,
        },
    );
    guest.goes_on();
    done(
        &pool,
        Operation::SetLayout {
            name: name(),
            shape: shape(LayoutKind::Mirror),
            throttle,
        },
    );
    done(
        &pool,
        Operation::ResizeVolume {
            name: name(),
            size: 24 << 20,
            shrink: false,
        },
    );
    let here = status(&pool)
        .volumes
        .iter()
        .find(|volume| volume.name == "data")
        .unwrap()
        .members[0]
        .devices[0]
        .clone();
    done(
        &pool,
        Operation::MoveVolume {
            name: name(),
            from: Some(here),
            to: None,
            throttle,
        },
    );
    done(
        &pool,
        Operation::Scrub {
            volume: None,
            throttle,
        },
    );
    guest.goes_on();

    done(&pool, new_volume("more"));
    let to = Some(Target::Volume("more".into()));
    files(
        &pool,
        FileOperation::Relocate {
            path: DISK.into(),
            to,
        },
    )
    .unwrap();
    files(&pool, FileOperation::Defragment { path: DISK.into() }).unwrap();
    guest.goes_on();
    let known = guest.end();
    see_that_it_holds(&pool, &disk, &known);
    drop(disk);
    pool.close().unwrap();
    drop(pool);

    // And again, from the devices that are left.
    let left: Vec<String> = ["d2", "d3", "d4", "d0"]
        .map(|name| folder.path().join(name).to_str().unwrap().to_owned())
        .into();
    let pool = open(&left);
    let disk = opened(&pool);
    see_that_it_holds(&pool, &disk, &known);
    match files(&pool, FileOperation::Check { repair: false }).unwrap() {
        FileAnswer::Checked(report) => assert!(report.findings.is_empty(), "{report:?}"),
        other => panic!("{other:?}"),
    }
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn a_device_that_fails_under_a_guest_is_replaced_by_hand_or_by_a_spare() {
    for spare in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let devices = with_disk(folder.path());
        let pool = open(&devices);
        let disk = opened(&pool);
        let guest = Guest::start(&pool, &disk);
        if spare {
            let device = NewDevice {
                spare,
                ..blank(folder.path(), "d2")
            };
            done(
                &pool,
                Operation::AddDevices {
                    devices: vec![device],
                },
            );
        }
        // Nothing can be written there any more.
        File::options()
            .write(true)
            .open(&devices[0])
            .unwrap()
            .set_len(0)
            .unwrap();
        until(|| {
            let faulty = |device: &api::storage::PoolDevice| {
                device.name == devices[0] && device.state != PoolDeviceState::Active
            };
            status(&pool).devices.iter().any(faulty).then_some(())
        });
        guest.goes_on();
        if spare {
            until(|| {
                let now = status(&pool);
                (now.devices[0].used == 0 && now.jobs.iter().all(|job| !job.is_live())).then_some(())
            });
            done(&pool, Operation::RemoveDevice { device: "d0".into() });
        } else {
            let by = blank(folder.path(), "d2");
            done(
                &pool,
                Operation::ReplaceDevice {
                    device: "d0".into(),
                    by,
                    throttle: 0,
                },
            );
        }
        guest.goes_on();
        let known = guest.end();
        let now = status(&pool);
        assert_eq!(names(&now), ["d1", "d2"]);
        assert_eq!(now.state, api::storage::Health::Healthy, "{now:?}");
        // Nobody holds on to the broken one.
        File::options()
            .write(true)
            .open(&devices[0])
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        done(
            &pool,
            Operation::AddDevices {
                devices: vec![new_device(&devices[0])],
            },
        );
        see_that_it_holds(&pool, &disk, &known);
        drop(disk);
        pool.close().unwrap();
    }
}

#[test]
fn a_new_device_is_looked_at_before_it_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let add = |device: NewDevice| {
        perform(
            &pool,
            Operation::AddDevices {
                devices: vec![device],
            },
        )
        .unwrap_err()
    };
    let precious = blank(folder.path(), "precious");
    std::fs::write(
        &precious.path,
        [&[0; 1080][..], b"\x53\xef", &vec![0; 64 << 20]].concat(),
    )
    .unwrap();
    let problem = add(precious.clone());
    assert_eq!(problem.kind, ProblemKind::Conflict, "{problem}");
    assert!(problem.remedy.clone().unwrap().contains("--force"), "{problem}");
    let by = precious.clone();
    let replace = Operation::ReplaceDevice {
        device: "d0".into(),
        by,
        throttle: 0,
    };
    assert_eq!(perform(&pool, replace).unwrap_err().detail, problem.detail);
    let own = NewDevice {
        force: true,
        ..new_device(&devices[0])
    };
    let problem = add(own);
    assert!(problem.detail.contains("one of its pool's devices"), "{problem}");
    let absent = add(new_device(folder.path().join("absent").to_str().unwrap()));
    assert_eq!(absent.kind, ProblemKind::NotFound, "{absent}");
    // One that has not the room for what lies on the old one is refused before anything is moved.
    done(&pool, new_volume("full"));
    let tight = blank(folder.path(), "tight");
    File::options()
        .write(true)
        .open(&tight.path)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let used = |status: &PoolStatus| {
        status
            .devices
            .iter()
            .max_by_key(|device| device.used)
            .unwrap()
            .name
            .clone()
    };
    let replace = Operation::ReplaceDevice {
        device: used(&status(&pool)),
        by: tight.clone(),
        throttle: 0,
    };
    let problem = perform(&pool, replace).unwrap_err();
    assert!(problem.detail.contains("take a larger one"), "{problem}");
    assert_eq!(names(&status(&pool)), ["d0", "d1"]);
    // It is as it was.
    done(&pool, Operation::AddDevices { devices: vec![tight] });
    // Forced, it is taken.
    done(
        &pool,
        Operation::AddDevices {
            devices: vec![NewDevice {
                force: true,
                ..precious
            }],
        },
    );
    pool.close().unwrap();
}

#[test]
fn devices_are_added_by_several_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    let guest = Guest::start(&pool, &disk);
    let adding: Vec<_> = (0..4)
        .map(|number| {
            let (pool, device) = (Arc::clone(&pool), blank(folder.path(), &format!("n{number}")));
            std::thread::spawn(move || {
                done(
                    &pool,
                    Operation::AddDevices {
                        devices: vec![device],
                    },
                )
            })
        })
        .collect();
    adding.into_iter().for_each(|thread| drop(thread.join().unwrap()));
    let mut there = names(&status(&pool));
    there.sort();
    assert_eq!(there, ["d0", "d1", "n0", "n1", "n2", "n3"]);
    for old in ["d0", "d1"] {
        done(
            &pool,
            Operation::EvacuateDevice {
                device: old.into(),
                to: None,
                throttle: 0,
            },
        );
        done(&pool, Operation::RemoveDevice { device: old.into() });
    }
    let known = guest.end();
    see_that_it_holds(&pool, &disk, &known);
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn a_volume_is_deleted_under_guests_when_nothing_lies_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    let guest = Guest::start(&pool, &disk);
    guest.goes_on();
    let delete = |name: &str| perform(&pool, Operation::DeleteVolume { name: name.into() });
    let problem = delete("data").unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict, "{problem}");
    assert!(problem.remedy.unwrap().contains("file drain data"));
    assert_eq!(delete("fs-meta").unwrap_err().kind, ProblemKind::Conflict);
    assert_eq!(delete("nothing").unwrap_err().kind, ProblemKind::NotFound);

    done(&pool, new_volume("more"));
    let drain = FileOperation::Drain {
        volume: "data".into(),
        end: false,
    };
    files(&pool, drain).unwrap();
    // What was written meanwhile, and places that are given back late, may want another look.
    let now = until(|| delete("data").ok());
    assert!(now.pool.volumes.iter().all(|volume| volume.name != "data"));
    guest.goes_on();
    // The name and the space are free again.
    done(&pool, new_volume("data"));
    let known = guest.end();
    see_that_it_holds(&pool, &disk, &known);
    drop(disk);
    pool.close().unwrap();
    drop(pool);
    let pool = open(&devices);
    let disk = opened(&pool);
    see_that_it_holds(&pool, &disk, &known);
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn a_job_tells_how_fast_it_is_and_is_made_faster() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let scrub = Operation::Scrub {
        volume: Some("fs-meta".into()),
        throttle: 1 << 20,
    };
    let begun = begin(&pool, scrub);
    let running = until(|| Some(job(&pool, begun.id)).filter(|job| job.rate.is_some_and(|rate| rate > 0)));
    assert!(running.rate.unwrap() < 8 << 20, "{running:?}");
    assert!(running.seconds_left.is_some(), "{running:?}");
    done(
        &pool,
        Operation::ThrottleJob {
            job: begun.id,
            throttle: 100,
        },
    );
    assert_eq!(job(&pool, begun.id).throttle, 100);
    assert_eq!(job(&pool, begun.id).priority, JobPriority::Normal);
    let priority = Operation::SetJobPriority {
        job: begun.id,
        priority: JobPriority::Low,
    };
    done(&pool, priority.clone());
    pool.close().unwrap();
    drop(pool);

    // It stands in the pool, as the job does.
    let pool = open(&devices);
    assert_eq!(job(&pool, begun.id).throttle, 100);
    assert_eq!(job(&pool, begun.id).priority, JobPriority::Low);
    let throttle = Operation::ThrottleJob {
        job: begun.id,
        throttle: 0,
    };
    perform(&pool, throttle.clone()).unwrap();
    done(&pool, Operation::WaitJob { job: Some(begun.id) });
    assert_eq!(job(&pool, begun.id).rate, None);
    assert_eq!(job(&pool, begun.id).priority, JobPriority::Normal);
    assert_eq!(perform(&pool, throttle).unwrap_err().kind, ProblemKind::Conflict);
    assert_eq!(perform(&pool, priority).unwrap_err().kind, ProblemKind::Conflict);
    pool.close().unwrap();
}

/// A scrub of a pool of which a device was made shorter, to `left` bytes: the device is out of service, and the data are there.
fn scrub_after_truncation(left: u64) {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    let handle = disk.handle().clone();
    for piece in 0..16 {
        write(&pool, &handle, piece * PIECE as u64, 7);
    }
    // The first one: copies that differ are made equal to it.
    let file = File::options().write(true).open(&devices[0]).unwrap();
    file.set_len(left).unwrap();
    let scrub = Operation::Scrub {
        volume: None,
        throttle: 0,
    };
    let outcome = perform(&pool, scrub).unwrap();
    let of_kind = |kind| outcome.events.iter().find(|event| event.kind == kind);
    let failed = of_kind(PoolEventKind::DeviceFailed).unwrap();
    assert!(failed.text.contains("d0"), "{failed:?}");
    assert!(of_kind(PoolEventKind::Repaired).is_none(), "{outcome:?}");
    let states: Vec<_> = status(&pool).devices.iter().map(|device| device.state).collect();
    assert_eq!(states, [PoolDeviceState::Missing, PoolDeviceState::Active]);
    for piece in 0..16 {
        assert!(
            read(&pool, &handle, piece * PIECE as u64)
                .iter()
                .all(|byte| *byte == 7)
        );
    }
    write(&pool, &handle, 0, 8);
    drop((handle, disk));
    pool.close().unwrap();
}

#[test]
fn a_scrub_takes_a_device_out_of_service_that_has_lost_its_unused_end() {
    scrub_after_truncation(63 << 20);
}

#[test]
fn a_scrub_takes_a_device_out_of_service_that_has_lost_data() {
    scrub_after_truncation(1 << 20);
}

#[test]
fn what_happens_is_told_at_once_and_to_all() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    let guest = Guest::start(&pool, &disk);
    let heard = Arc::<Mutex<Vec<PoolEvent>>>::default();
    let ear = Arc::clone(&heard);
    pool.on_event(move |event| ear.lock().unwrap().push(event));
    let count = |kind| {
        heard
            .lock()
            .unwrap()
            .iter()
            .filter(|event| event.kind == kind)
            .count()
    };

    // Nobody asks for anything.
    File::options()
        .write(true)
        .open(&devices[0])
        .unwrap()
        .set_len(0)
        .unwrap();
    until(|| (count(PoolEventKind::DeviceFailed) == 1).then_some(()));
    until(|| (count(PoolEventKind::VolumeDegraded) >= 1).then_some(()));
    // Who asks is told as before.
    let by = blank(folder.path(), "d2");
    let outcome = perform(
        &pool,
        Operation::ReplaceDevice {
            device: "d0".into(),
            by,
            throttle: 0,
        },
    )
    .unwrap();
    let failed = |event: &&PoolEvent| event.kind == PoolEventKind::DeviceFailed;
    assert_eq!(outcome.events.iter().filter(failed).count(), 1);
    until(|| (count(PoolEventKind::DeviceRemoved) == 1).then_some(()));
    guest.end();
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn the_load_is_that_of_a_window() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let load = |window_ms: u32| -> Result<PoolLoad, Problem> {
        match pool.execute(StorageRequest::Load { window_ms })? {
            StorageAnswer::Load(load) => Ok(*load),
            other => panic!("{other:?}"),
        }
    };
    let disk = opened(&pool);
    let quiet = load(50).unwrap();
    assert_eq!((quiet.pool.as_str(), quiet.devices.len()), ("tank", 2));
    let guest = Guest::start(&pool, &disk);
    guest.goes_on();
    let busy = load(200).unwrap();
    assert!((200..2000).contains(&busy.window_ms), "{busy:?}");
    let data = |load: &PoolLoad| {
        load.volumes
            .iter()
            .find(|volume| volume.volume == "data")
            .unwrap()
            .clone()
    };
    let written = data(&busy).writes.bytes;
    assert!(written >= PIECE as u64, "{busy:?}");
    // A mirror writes everything twice.
    let devices: u64 = busy.devices.iter().map(|device| device.writes.bytes).sum();
    assert!(devices >= 2 * written, "{busy:?}");
    guest.end();
    assert!(
        data(&load(0).unwrap()).writes.bytes > written,
        "since the opening"
    );
    assert_eq!(load(3_600_000).unwrap_err().kind, ProblemKind::Invalid);
    drop(disk);
    pool.close().unwrap();
}

#[test]
fn what_ends_with_the_process_is_listed_and_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let disk = opened(&pool);
    (0..SIZE / PIECE as u64).for_each(|piece| write(&pool, disk.handle(), piece * PIECE as u64, 7));
    drop(disk);
    let request = api::virtual_disk::ExportRequest {
        path: DISK.into(),
        image: String::new(),
        format: api::virtual_disk::ImageFormat::Raw,
        force: false,
        verify: false,
    };
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let transfer = pool
        .transfer(api::virtual_disk::TransferRequest::Export(request))
        .unwrap();
    // Nobody reads at the other end: it stands still.
    let serving = std::thread::spawn(move || transfer(there));
    let listed = until(|| status(&pool).jobs.into_iter().find(|job| job.volatile));
    assert_eq!((listed.id, listed.kind.as_str()), (FIRST_VOLATILE_JOB, "export"));
    assert!(listed.what.contains(DISK), "{listed:?}");
    let id = listed.id;
    for operation in [
        Operation::PauseJob { job: id },
        Operation::ResumeJob { job: id },
        Operation::ThrottleJob { job: id, throttle: 1 },
        Operation::SetJobPriority {
            job: id,
            priority: JobPriority::High,
        },
    ] {
        assert_eq!(perform(&pool, operation).unwrap_err().kind, ProblemKind::Conflict);
    }
    drop(here);
    serving.join().unwrap();
    let ended = perform(&pool, Operation::WaitJob { job: Some(id) }).unwrap();
    assert_ne!(ended.jobs[0].state, JobState::Running);

    // What moves in the pool is there, too, and ends where it is when somebody wants that.
    done(&pool, new_volume("more"));
    let to = Some(Target::Volume("more".into()));
    files(&pool, FileOperation::Relocate { path: "/".into(), to }).unwrap();
    let last = status(&pool).jobs.pop().unwrap();
    assert_eq!((last.kind.as_str(), last.state), ("relocate", JobState::Done));
    let problem = perform(&pool, Operation::CancelJob { job: last.id }).unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Conflict, "{problem}");
    let problem = perform(
        &pool,
        Operation::WaitJob {
            job: Some(last.id + 7),
        },
    )
    .unwrap_err();
    assert_eq!(problem.kind, ProblemKind::NotFound, "{problem}");
    pool.close().unwrap();
}

#[test]
fn a_long_merge_is_listed_as_a_job() {
    let folder = tempfile::tempdir().unwrap();
    let devices = with_disk(folder.path());
    let pool = open(&devices);
    let ask = |operation| pool.execute(StorageRequest::Disk(operation)).map(drop);
    // Almost all of it is a hole.
    let grow = DiskOperation::Resize {
        path: DISK.into(),
        size: 64 << 20,
        force: false,
    };
    ask(grow).unwrap();
    let disk = opened(&pool);
    write(&pool, disk.handle(), 0, 1);
    write(&pool, disk.handle(), 40 << 20, 2);
    let snapshot = DiskOperation::Snapshot {
        paths: vec![DISK.into()],
        name: "monday".into(),
        description: String::new(),
    };
    ask(snapshot).unwrap();
    write(&pool, disk.handle(), 0, 3);
    let delete = DiskOperation::DeleteSnapshot {
        path: format!("{DISK}@monday"),
    };
    ask(delete).unwrap();
    let merged = until(|| {
        let jobs = status(&pool).jobs;
        jobs.into_iter().find(|job| job.kind == "merge" && !job.is_live())
    });
    assert_eq!(merged.state, JobState::Done, "{merged:?}");
    assert!(merged.volatile && merged.what.contains(DISK), "{merged:?}");
    assert_eq!(read(&pool, disk.handle(), 0)[0], 3);
    assert_eq!(read(&pool, disk.handle(), 40 << 20)[0], 2);
    drop(disk);
    pool.close().unwrap();
}
