//! Jobs of guests on a real pool: how far they are, their end by command, what becomes of them when the pool is closed, and whose they are.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::file::{FileOperation, Target};
use api::storage::{JobState, JobStatus, LayoutKind};
use api::virtual_disk::{DiskAnswer, DiskOperation};
use api::{EventKind, ExpandedPolicy, Problem, ProblemKind, Right, StorageAnswer, StorageRequest};
use block_io::{AlignedBuffer, BlockDevice, Durability, WorkerOptions};
use common::{FakeVm, Guest, go_on, make_pool};
use expanded_api::{Answer, Request};
use expanded_target::Owner;
use storage_manager::{DiskOptions, HostedDisk, HostedPool};
use storage_virtualizer::DiskHandle;

const DISK: &str = "/vm1/a.dsk";
/// Three of the steps in which a disk is moved, and a bit.
const SIZE: u64 = 56 << 20;

/// The devices of a pool with two volumes, and a disk on one of them.
fn make(folder: &Path) -> Vec<String> {
    let volumes = [
        ("safe", LayoutKind::Mirror, 128 << 20),
        ("fast", LayoutKind::Concat, 96 << 20),
        ("third", LayoutKind::Concat, 16 << 20),
    ];
    let paths = make_pool(folder, 256 << 20, &volumes);
    let folder = FileOperation::MakeDirectory {
        path: "/vm1".into(),
        parents: false,
        attributes: api::file::AttributeChanges::default(),
    };
    storage_manager::execute_file(paths.clone(), folder, &mut go_on).unwrap();
    for (path, size, thick, volume) in [(DISK, SIZE, false, "safe"), ("/b.dsk", 8 << 20, true, "third")] {
        let create = DiskOperation::Create {
            path: path.into(),
            size,
            thick,
            target: Some(Target::Volume(volume.into())),
            checksums: None,
        };
        storage_manager::execute_disk(paths.clone(), create, &mut go_on).unwrap();
    }
    paths
}

fn open(paths: &[String]) -> Arc<HostedPool> {
    Arc::new(HostedPool::open("test", paths.to_vec(), WorkerOptions::default()).unwrap())
}

/// Others can open it afterwards.
fn close(mut pool: Arc<HostedPool>) {
    pool.close().unwrap();
    // Threads of the guest's may still be about to end.
    while let Err(shared) = Arc::try_unwrap(pool) {
        pool = shared;
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn guest(pool: &Arc<HostedPool>) -> (Arc<FakeVm>, Guest) {
    let vm = FakeVm::on(pool);
    let policy = ExpandedPolicy {
        allow: Right::ALL.to_vec(),
        objects: vec!["/vm1/*".into()],
        volumes: vec!["*".into()],
        rate: 10_000,
        ..ExpandedPolicy::default()
    };
    let guest = Guest::new(vm.clone(), policy);
    (vm, guest)
}

/// Each megabyte of the disk gets a byte of its own, or is seen to have it.
fn fill(pool: &HostedPool, disk: &HostedDisk, seed: u8, write: bool) {
    let handle = disk.handle().clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.worker().spawn(move || async move {
        let disk = handle.local().unwrap();
        for (number, offset) in (0..SIZE).step_by(1 << 20).enumerate() {
            let byte = seed.wrapping_add(u8::try_from(number).unwrap());
            let mut buffer = AlignedBuffer::new(1 << 20);
            buffer.as_mut_slice().fill(byte);
            // SAFETY: the buffer outlives the request, which is awaited.
            let memory = [unsafe { buffer.io(0, 1 << 20) }];
            match write {
                true => disk.write(offset, &memory, Durability::Volatile).await.unwrap(),
                false => {
                    disk.read(offset, &memory).await.unwrap();
                    assert!(
                        buffer.as_slice().iter().all(|found| *found == byte),
                        "at {offset}"
                    );
                }
            }
        }
        sender.send(()).unwrap();
    });
    receiver.recv().unwrap();
}

fn move_disk(volume: &str, background: bool) -> Request {
    Request::MoveDisk {
        disk: DISK.into(),
        to: Target::Volume(volume.into()),
        background,
    }
}

fn jobs(answer: Result<Answer, Problem>) -> Vec<JobStatus> {
    match answer.unwrap() {
        Answer::Jobs(jobs) => jobs,
        other => panic!("{other:?}"),
    }
}

fn status(guest: &Guest, job: u32) -> JobStatus {
    jobs(guest.ask(&Request::JobStatus { job })).remove(0)
}

fn wait(guest: &Guest, job: u32) -> JobStatus {
    let begin = Instant::now();
    loop {
        let status = status(guest, job);
        if !status.is_live() {
            return status;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn volumes(guest: &Guest) -> Vec<String> {
    match guest.ask(&Request::ListDisks {}).unwrap() {
        Answer::Disks(disks) => disks[0].volumes.clone(),
        other => panic!("{other:?}"),
    }
}

fn slow_layout(layout: LayoutKind) -> Request {
    Request::SetLayout {
        volume: "third".into(),
        layout,
        columns: 0,
        copies: 0,
        stripe_unit: 0,
        devices: Vec::new(),
        throttle: 4096,
    }
}

#[test]
fn a_move_tells_how_far_it_is_and_ends_where_it_is_when_it_is_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let pool = open(&make(folder.path()));
    let (vm, guest) = guest(&pool);
    let disk = pool.disk(DISK, DiskOptions::default()).unwrap();
    fill(&pool, &disk, 1, true);
    let begun = jobs(guest.ask(&move_disk("fast", true))).remove(0);
    assert_eq!(
        (begun.kind.as_str(), begun.state),
        ("move-disk", JobState::Running)
    );
    assert!(
        begun.what.contains(DISK) && begun.what.contains("fast"),
        "{}",
        begun.what
    );
    // One at a time.
    let again = guest.ask(&move_disk("safe", true)).unwrap_err();
    assert!(again.kind == ProblemKind::Conflict && again.detail.contains(&format!("job {}", begun.id)));
    jobs(guest.ask(&Request::CancelJob { job: begun.id }));
    let ended = wait(&guest, begun.id);
    assert_eq!(ended.state, JobState::Cancelled);
    assert!(ended.done < ended.total && ended.total == SIZE, "{ended:?}");
    // Its disk works: what was moved is there, the rest is where it was.
    fill(&pool, &disk, 1, false);
    assert_eq!(volumes(&guest), ["fast", "safe"]);
    fill(&pool, &disk, 7, true);

    // Another one does not see it, nor can it end it, and is told what it would be told if there were none.
    let elsewhere = pool.jobs_of("vm:other").unwrap();
    assert_eq!(elsewhere, []);
    let unknown = guest.ask(&Request::JobStatus { job: 77 }).unwrap_err();
    let other = StorageRequest::Disk(DiskOperation::Move {
        path: DISK.into(),
        to: Target::Volume("fast".into()),
    });
    let StorageAnswer::Disk(outcome) = pool.execute_for("vm:other", other).unwrap() else {
        panic!()
    };
    let DiskAnswer::Job(foreign) = outcome.answer else {
        panic!()
    };
    for request in [
        Request::JobStatus { job: foreign.id },
        Request::CancelJob { job: foreign.id },
    ] {
        let refused = guest.ask(&request).unwrap_err();
        let same = refused.detail.replace(&foreign.id.to_string(), "77");
        assert_eq!((refused.kind, same), (unknown.kind, unknown.detail.clone()));
    }
    let begin = Instant::now();
    while pool.jobs_of("vm:other").unwrap()[0].is_live() {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }

    // The same again is nothing to do; back again, with somebody who waits for it.
    let moved = guest.ask(&move_disk("fast", false)).unwrap();
    assert!(
        matches!(moved, Answer::Moved(moved) if moved.moved == 0 && moved.stayed == 0),
        "{moved:?}"
    );
    let moved = guest.ask(&move_disk("safe", false)).unwrap();
    assert!(
        matches!(moved, Answer::Moved(moved) if moved.moved >= SIZE),
        "{moved:?}"
    );
    assert_eq!(volumes(&guest), ["safe"]);
    fill(&pool, &disk, 7, false);
    let all = jobs(guest.ask(&Request::ListJobs {}));
    assert_eq!(all.len(), 3, "{all:?}");
    let late = guest.ask(&Request::CancelJob { job: begun.id }).unwrap_err();
    assert_eq!(late.kind, ProblemKind::Conflict, "{late}");

    // What comes of the end of a snapshot is a job of the guest's, too.
    let snapshot = Request::Snapshot {
        disks: vec![DISK.into()],
        name: "monday".into(),
        description: String::new(),
    };
    guest.ask(&snapshot).unwrap();
    fill(&pool, &disk, 5, true);
    let snapshot = format!("{DISK}@monday");
    guest.ask(&Request::DeleteSnapshot { snapshot }).unwrap();
    let merges = || {
        let all = jobs(guest.ask(&Request::ListJobs {}));
        all.into_iter().find(|job| job.kind == "merge")
    };
    let begin = Instant::now();
    let merge = loop {
        if let Some(merge) = merges() {
            break merge;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
    };
    assert_eq!(wait(&guest, merge.id).state, JobState::Done);
    fill(&pool, &disk, 5, false);
    // A place that there is not is told before anything is begun.
    let nowhere = StorageRequest::Disk(DiskOperation::Move {
        path: DISK.into(),
        to: Target::Volume("none".into()),
    });
    assert_eq!(pool.execute(nowhere).unwrap_err().kind, ProblemKind::NotFound);

    let seen = |state: JobState| {
        let page = vm.events().page(0, 100).events;
        page.iter().any(
            |event| matches!(&event.kind, EventKind::GuestJobEnded { job, state: how, .. } if *job == begun.id && *how == state),
        )
    };
    let begin = Instant::now();
    while !seen(JobState::Cancelled) {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
    drop((guest, disk, vm));
    close(pool);
}

#[test]
fn jobs_go_on_or_are_told_of_when_the_pool_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let paths = make(folder.path());
    let pool = open(&paths);
    let (vm, this) = guest(&pool);
    let disk = pool.disk(DISK, DiskOptions::default()).unwrap();
    fill(&pool, &disk, 3, true);
    let slow = jobs(this.ask(&slow_layout(LayoutKind::Stripe))).remove(0);
    let begun = jobs(this.ask(&move_disk("fast", true))).remove(0);
    // Two at once, and no more.
    let many = this.ask(&slow_layout(LayoutKind::Mirror)).unwrap_err();
    assert_eq!(many.kind, ProblemKind::Exhausted, "{many}");
    drop((this, disk, vm));
    close(pool);

    let pool = open(&paths);
    let (vm, this) = guest(&pool);
    let ended = wait(&this, begun.id);
    assert_eq!(
        (ended.state, ended.what.as_str()),
        (JobState::Done, begun.what.as_str())
    );
    assert_eq!(volumes(&this), ["fast"]);
    let known = status(&this, slow.id);
    assert_eq!(
        (known.state, known.kind.as_str()),
        (JobState::Running, "set-layout")
    );
    jobs(this.ask(&Request::CancelJob { job: slow.id }));
    assert_eq!(wait(&this, slow.id).state, JobState::Cancelled);
    // No number is given twice.
    let next = jobs(this.ask(&move_disk("safe", true))).remove(0);
    assert!(next.id > begun.id);
    assert_eq!(wait(&this, next.id).state, JobState::Done);
    let disk = pool.disk(DISK, DiskOptions::default()).unwrap();
    fill(&pool, &disk, 3, false);
    drop((this, disk, vm));
    close(pool);

    // How they ended is answered for a while.
    let pool = open(&paths);
    let (vm, this) = guest(&pool);
    let all = jobs(this.ask(&Request::ListJobs {}));
    let ends: Vec<_> = all.iter().map(|job| (job.id, job.state)).collect();
    assert!(
        ends.contains(&(slow.id, JobState::Cancelled)) && ends.contains(&(next.id, JobState::Done)),
        "{ends:?}"
    );
    // But not for ever.
    for _ in 0..40 {
        this.ask(&move_disk("safe", false)).unwrap();
    }
    let forgotten = this.ask(&Request::JobStatus { job: slow.id }).unwrap_err();
    assert_eq!(forgotten.kind, ProblemKind::NotFound, "{forgotten}");
    drop((this, vm));
    close(pool);
}
