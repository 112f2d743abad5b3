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
use vhost_user_load::pattern::Data;

const DISK: u64 = 4 << 20;

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

/// Allocations and calls of a load, and its requests.
fn cost(pool: &HostedPool, load: &Load) -> (u64, u64, u64) {
    let before = spent(pool, true);
    let report = run(load).unwrap();
    let after = spent(pool, false);
    (after.0 - before.0, after.1 - before.1, report.operations)
}

/// Allocations and calls per request, without what a connection costs: that of twice as many requests is the same.
fn cost_of_a_request(pool: &HostedPool, load: &Load) -> (f64, f64) {
    let half = Load {
        range: Some(DISK / 2),
        ..load.clone()
    };
    let (fewer, more) = (cost(pool, &half), cost(pool, load));
    #[expect(clippy::cast_precision_loss, reason = "for a ratio")]
    let per_request = |fewer: u64, more: u64, base: u64| more.saturating_sub(fewer) as f64 / base as f64;
    (
        per_request(fewer.0, more.0, more.2 - fewer.2),
        per_request(0, more.1, more.2),
    )
}

/// A load that uses each block of the disk once, at depth 32.
fn load(socket: &Path, pattern: Pattern) -> Load {
    Load {
        front_end: front_end::Options {
            socket: socket.to_owned(),
            queues: 1,
            queue_size: 128,
            block_size: 4096,
            segment: None,
            inflight: true,
            patience: Duration::from_secs(20),
            greeting: None,
        },
        pattern,
        depth: 32,
        duration: Duration::from_secs(60),
        range: None,
        once: true,
        stride: None,
        data: Data::default(),
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
    volume(&devices, "plain", LayoutKind::Concat, 16 << 20);
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
        // Warm: all that is needed once is there.
        run(&load(&socket, Pattern::RandWrite)).unwrap();
        for pattern in [
            Pattern::RandRead,
            Pattern::RandWrite,
            Pattern::Read,
            Pattern::Write,
        ] {
            let load = load(&socket, pattern);
            let (allocations, mut calls) = cost_of_a_request(&pool, &load);
            assert!(
                allocations < 0.01,
                "{name}, {pattern}: {allocations} allocations per request"
            );
            // A slow device, or a busy machine, answers one request after the other; then each costs a call. So what counts is how
            // few it can be.
            for _ in 0..30 {
                calls = calls.min(cost_of_a_request(&pool, &load).1);
                if calls < 0.5 {
                    break;
                }
            }
            assert!(calls < 0.5, "{name}, {pattern}: {calls} calls per request");
        }
        // A first write allocates nothing itself. The map in memory grows now and then, and what makes its record durable is done for all that
        // wait: so what counts is how few it can be, here too.
        let mut allocations = f64::MAX;
        for _ in 0..30 {
            let snapshot = DiskOperation::Snapshot {
                paths: vec![path.clone()],
                name: "one".into(),
                description: String::new(),
            };
            pool.execute(StorageRequest::Disk(snapshot)).unwrap();
            allocations = allocations.min(cost_of_a_request(&pool, &load(&socket, Pattern::RandWrite)).0);
            if allocations < 1.0 {
                break;
            }
            let delete = DiskOperation::DeleteSnapshot {
                path: format!("{path}@one"),
            };
            pool.execute(StorageRequest::Disk(delete)).unwrap();
        }
        assert!(
            allocations < 1.0,
            "{name}, first writes: {allocations} allocations per request"
        );
        server.stop();
        drop(disk);
    }
    assert_eq!(pool.worker().engine(), EngineKind::Uring);
    pool.close().unwrap();
}
