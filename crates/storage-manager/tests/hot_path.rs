//! What a guest's request costs on its whole way, from the virtqueue over vhost-user to the devices of a pool: nothing is allocated, and
//! system calls are shared by many requests.
#![allow(clippy::unwrap_used)]
#![recursion_limit = "256"]

mod common;
#[path = "../../../storage-virtualizer/tests/counting/mod.rs"]
mod counting;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use api::StorageRequest;
use api::file::Target;
use api::storage::LayoutKind;
use api::virtual_disk::DiskOperation;
use block_io::{EngineKind, WorkerOptions};
use common::{go_on, pool, volume};
use counting::{ALLOCATIONS, COUNTS};
use storage_manager::{DiskOptions, HostedPool};
use storage_virtualizer::vhost_user::{VhostUserOptions, VhostUserServer};
use vhost_user_load::front_end;
use vhost_user_load::load::{Load, Pattern, run};

const DISK: u64 = 8 << 20;

/// What the pool's worker has done so far: allocations since counting began, and calls of io_uring_enter.
fn spent(pool: &HostedPool, counts: bool) -> (u64, u64) {
    let (sender, receiver) = mpsc::channel();
    pool.worker().spawn(move || async move {
        let turns = block_io::turns().unwrap();
        sender.send((ALLOCATIONS.load(Ordering::Relaxed), turns)).unwrap();
        COUNTS.set(counts);
    });
    receiver.recv().unwrap()
}

/// Allocations and calls per request of a load.
fn cost(pool: &HostedPool, load: &Load) -> (f64, f64) {
    let before = spent(pool, true);
    let report = run(load).unwrap();
    let after = spent(pool, false);
    #[expect(clippy::cast_precision_loss, reason = "for a ratio")]
    let ratio = |before: u64, after: u64| (after - before) as f64 / report.operations as f64;
    (ratio(before.0, after.0), ratio(before.1, after.1))
}

fn load(socket: &Path, pattern: Pattern, depth: u16) -> Load {
    Load {
        front_end: front_end::Options {
            socket: socket.to_owned(),
            queues: 1,
            queue_size: 128,
            block_size: 4096,
            inflight: true,
            patience: Duration::from_secs(20),
        },
        pattern,
        depth,
        duration: Duration::from_secs(60),
        range: None,
        once: true,
        stride: None,
        verify: false,
        flush_every: 0,
        reconnect: false,
        patience: Duration::from_secs(20),
        pid: None,
        seed: 7,
    }
}

fn create(devices: &[String], path: &str, volume: &str) {
    let create = DiskOperation::Create {
        path: path.into(),
        size: DISK,
        thick: false,
        target: Some(Target::Volume(volume.into())),
        checksums: None,
    };
    storage_manager::execute_disk(devices.to_vec(), create, &mut go_on).unwrap();
}

#[test]
fn a_request_allocates_nothing_and_shares_its_system_calls() {
    let folder = tempfile::tempdir().unwrap();
    let devices = pool(folder.path());
    volume(&devices, "plain", LayoutKind::Concat, 64 << 20);
    volume(&devices, "striped", LayoutKind::Stripe, 16 << 20);
    for (path, volume) in [
        ("/plain.dsk", "plain"),
        ("/striped.dsk", "striped"),
        ("/mirrored.dsk", "data"),
    ] {
        create(&devices, path, volume);
    }
    let pool = HostedPool::open("test", devices, WorkerOptions::default()).unwrap();
    for name in ["plain", "striped", "mirrored"] {
        let path = format!("/{name}.dsk");
        let disk = pool.disk(&path, DiskOptions::default()).unwrap();
        let socket = folder.path().join(format!("{name}.sock"));
        let options = VhostUserOptions::default();
        let worker = vec![pool.worker().clone()];
        let server = VhostUserServer::start(&socket, disk.handle().clone(), options, worker).unwrap();

        let snapshot = DiskOperation::Snapshot {
            paths: vec![path],
            name: "one".into(),
            description: String::new(),
        };
        // Warm: every request of the kind was there before.
        run(&load(&socket, Pattern::RandWrite, 32)).unwrap();
        pool.execute(StorageRequest::Disk(snapshot)).unwrap();
        let first = cost(&pool, &load(&socket, Pattern::RandWrite, 32));
        eprintln!("{name}: first writes: {first:?}");
        for depth in [32, 1] {
            for pattern in [
                Pattern::RandRead,
                Pattern::RandWrite,
                Pattern::Read,
                Pattern::Write,
            ] {
                let load = load(&socket, pattern, depth);
                run(&load).unwrap();
                let (allocations, calls) = cost(&pool, &load);
                eprintln!("{name}, {pattern}, depth {depth}: {allocations} allocations, {calls} calls");
            }
        }
        server.stop();
        drop(disk);
    }
    assert_eq!(pool.worker().engine(), EngineKind::Uring);
    pool.close().unwrap();
}
