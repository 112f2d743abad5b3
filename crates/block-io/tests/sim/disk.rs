//! The disk keeps its crash model.

use std::collections::BTreeSet;

use block_io::sim::{DiskOptions, Ended, RunOptions, World};
use block_io::{AlignedBuffer, BlockDevice, Durability, ZeroMode};

fn world() -> World {
    World::new([DiskOptions::new("disk", 1 << 40)])
}

/// First bytes of the first sectors in every state that a crash can leave.
fn outcomes(world: &World, sectors: usize) -> BTreeSet<Vec<u8>> {
    let states = world.crash_states();
    let count = states.count(10_000);
    assert_eq!(states.total(), Some(count), "few enough to see all");
    (0..count)
        .map(|index| {
            let media = states.nth(index, 10_000, 0);
            let mut bytes = vec![0; sectors * 512];
            media[0].peek(0, &mut bytes);
            bytes.iter().step_by(512).copied().collect()
        })
        .collect()
}

#[test]
fn a_write_is_lost_kept_or_torn_at_sectors() {
    let mut world = world();
    let run = world.run(&RunOptions::in_order(), async |sim| {
        sim.disk(0)
            .write_bytes(0, &[1; 1024], Durability::Volatile)
            .await
            .unwrap();
    });
    assert!(run.is_ok());
    let all = [[0, 0], [0, 1], [1, 0], [1, 1]].map(Vec::from);
    assert_eq!(outcomes(&world, 2), BTreeSet::from(all));
}

#[test]
fn a_flush_covers_what_completed_before_it_and_nothing_else() {
    let mut world = world();
    let run = world.run(&RunOptions::in_order(), async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[1; 512], Durability::Volatile)
            .await
            .unwrap();
        let other = disk.clone();
        sim.spawn("late writer", async move {
            other
                .write_bytes(512, &[2; 512], Durability::Volatile)
                .await
                .unwrap();
        });
        disk.flush().await.unwrap();
        disk.write_bytes(0, &[3; 512], Durability::Volatile)
            .await
            .unwrap();
    });
    assert!(run.is_ok());
    let all = [[1, 0], [1, 2], [3, 0], [3, 2]].map(Vec::from);
    assert_eq!(outcomes(&world, 2), BTreeSet::from(all));
}

#[test]
fn fua_makes_its_own_write_durable_and_older_ones_cannot_come_back() {
    let mut world = world();
    let run = world.run(&RunOptions::in_order(), async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[1; 1024], Durability::Volatile)
            .await
            .unwrap();
        disk.write_bytes(0, &[2; 512], Durability::Durable).await.unwrap();
    });
    assert!(run.is_ok());
    let all = [[2, 0], [2, 1]].map(Vec::from);
    assert_eq!(outcomes(&world, 2), BTreeSet::from(all));
}

#[test]
fn a_write_in_flight_may_be_there_in_part() {
    let mut world = world();
    let run = world.run(&RunOptions::in_order().crash_after(1), async |sim| {
        sim.disk(0).write_bytes(0, &[1; 1024], Durability::Durable).await
    });
    assert!(matches!(run.unwrap().ended, Ended::Crashed));
    assert_eq!(outcomes(&world, 2).len(), 4);
}

#[test]
fn terabytes_are_zeroed_and_discarded_without_memory() {
    let mut world = world();
    let run = world.run(&RunOptions::random(1), async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(1 << 39, &[1; 512], Durability::Volatile)
            .await
            .unwrap();
        disk.write_zeroes(0, 1 << 40, ZeroMode::MayUnmap).await.unwrap();
        disk.discard(0, 1 << 40).await.unwrap();
        disk.read_bytes(1 << 39, 512).await.unwrap()
    });
    let bytes = run.unwrap().ended.done().unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert!(world.crash_states().total().unwrap() > 1);
}

#[test]
fn a_discarded_range_reads_the_same_each_time() {
    let mut seen = BTreeSet::new();
    for seed in 0..20 {
        let run = world().run(&RunOptions::random(seed), async |sim| {
            let disk = sim.disk(0);
            disk.write_bytes(0, &[7; 512], Durability::Volatile)
                .await
                .unwrap();
            disk.discard(0, 512).await.unwrap();
            let first = disk.read_bytes(0, 512).await.unwrap();
            assert_eq!(first, disk.read_bytes(0, 512).await.unwrap());
            first
        });
        let bytes = run.unwrap().ended.done().unwrap();
        seen.insert(match bytes.as_slice() {
            bytes if bytes.iter().all(|byte| *byte == 7) => "old",
            bytes if bytes.iter().all(|byte| *byte == 0) => "zeroes",
            _ => "garbage",
        });
    }
    assert_eq!(seen.len(), 3);
}

#[test]
fn scatter_lists_work_and_requests_beyond_the_end_are_refused() {
    let run = world().run(&RunOptions::random(3), async |sim| {
        let disk = sim.disk(0);
        let memory = AlignedBuffer::new(2048);
        // SAFETY: `memory` outlives the requests, which are driven to their end, and is not accessed meanwhile.
        let (source, target) = unsafe { ([memory.io(0, 100), memory.io(100, 412)], [memory.io(1024, 512)]) };
        source[0].fill(1);
        source[1].fill(2);
        disk.write(512, &source, Durability::Volatile).await.unwrap();
        disk.read(512, &target).await.unwrap();
        let mut bytes = [0; 512];
        target[0].copy_to_slice(&mut bytes);
        assert!(bytes[..100].iter().all(|byte| *byte == 1) && bytes[100..].iter().all(|byte| *byte == 2));
        assert!(disk.read(disk.size(), &target).await.is_err());
        assert!(disk.read(1, &target).await.is_err());
        assert!(disk.discard(u64::MAX - 511, 512).await.is_err());
    });
    run.unwrap();
}
