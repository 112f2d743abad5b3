//! Copies of a range one by one, and repairs by who knows which is right: no rot of as many columns as the layout tolerates is beyond
//! repair, and none spreads.

use block_io::sim::{Failure, RunOptions, Sim, World};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf};
use volume_manager::model::{JobKind, Layout};

use crate::harness::{DISK, Model, UNIT, create, failed, new_volume, read_bytes, world};

const SIZE: usize = 256 << 10;

fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: the buffer lives until the requests of its owner have ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

fn content() -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(SIZE);
    for (number, sector) in buffer.as_mut_slice().chunks_mut(512).enumerate() {
        sector.fill(u8::try_from(number % 251).unwrap());
        sector[..8].copy_from_slice(&(0x5a5a_0000_0000 + number as u64).to_le_bytes());
    }
    buffer
}

/// Rots all that a disk has of a row's first and second unit: data, not parity.
fn rot(sim: &Sim, disk: usize, good: &[u8]) -> usize {
    let mut image = vec![0; usize::try_from(DISK).unwrap()];
    sim.with_medium(disk, |medium| medium.peek(0, &mut image));
    let mut rotten = 0;
    for (number, sector) in image.chunks(512).enumerate() {
        let is_ours = sector[2..6] == good[2..6] && sector[6..8] == [0, 0];
        if is_ours {
            sim.with_medium(disk, |medium| medium.rot(number as u64 * 512 + 99, 2));
            rotten += 1;
        }
    }
    rotten
}

async fn story(sim: Sim, layout: Layout, disks: usize, bad: Vec<usize>) -> Result<(), Failure> {
    let pool = create(&sim, &Model::default(), disks).await?;
    let volume = pool
        .create_volume(new_volume(layout, SIZE as u64))
        .await
        .map_err(failed)?;
    let good = content();
    volume
        .write(0, &memory(&good), Durability::Durable)
        .await
        .map_err(failed)?;
    let rotten: usize = bad.iter().map(|disk| rot(&sim, *disk, good.as_slice())).sum();
    assert!(rotten > 0);
    let mut repaired = 0;
    for offset in (0..SIZE as u64).step_by(usize::try_from(UNIT).unwrap()) {
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + UNIT).unwrap();
        let wanted = &good.as_slice()[range];
        let buffer = AlignedBuffer::new(wanted.len());
        let mut right = Vec::new();
        let copies = volume.copies(offset, UNIT);
        for copy in 0..copies {
            volume
                .read_copy(copy, offset, &memory(&buffer))
                .await
                .map_err(failed)?;
            if buffer.as_slice() == wanted {
                right.push(copy);
            }
        }
        assert!(!right.is_empty(), "no copy of {copies} is right at {offset}");
        if right.len() == copies {
            continue;
        }
        volume
            .read_copy(right[0], offset, &memory(&buffer))
            .await
            .map_err(failed)?;
        // Bad parity may be repaired only when all that is stored is right.
        if right[0] != 0 || bad.len() > 1 || matches!(layout, Layout::Mirror { .. }) {
            volume.repair(offset, &memory(&buffer)).await.map_err(failed)?;
            repaired += 1;
        }
    }
    assert!(repaired > 0);
    for offset in (0..SIZE as u64).step_by(usize::try_from(UNIT).unwrap()) {
        for copy in 0..volume.copies(offset, UNIT) {
            let at = usize::try_from(offset).unwrap();
            let buffer = AlignedBuffer::new(usize::try_from(UNIT).unwrap());
            volume
                .read_copy(copy, offset, &memory(&buffer))
                .await
                .map_err(failed)?;
            let same = buffer.as_slice() == &good.as_slice()[at..at + buffer.as_slice().len()];
            assert!(same, "copy {copy} at {offset}");
        }
    }
    assert_eq!(
        read_bytes(&volume, 0, SIZE).await.map_err(failed)?,
        good.as_slice()
    );
    // The pool's own scrub finds nothing to make equal.
    drop(pool.take_events());
    let job = pool
        .start(
            JobKind::Scrub {
                volume: Some(volume_id(&pool)),
            },
            0,
        )
        .await
        .map_err(failed)?;
    pool.wait(job).await.map_err(failed)?;
    let events = pool.take_events();
    let differed = events
        .iter()
        .any(|event| matches!(event, volume_manager::Event::Repaired { .. }));
    assert!(!differed, "{events:?}");
    Ok(())
}

fn volume_id(pool: &crate::harness::SimPool) -> volume_manager::model::VolumeId {
    pool.configuration().volumes[0].id
}

fn run(layout: Layout, disks: usize, bad: &[usize]) {
    let mut world: World = world(disks as u64);
    let bad = bad.to_vec();
    let ran = world
        .run(&RunOptions::in_order(), |sim| story(sim, layout, disks, bad))
        .unwrap_or_else(|failure| panic!("{failure}"));
    ran.ended
        .done()
        .unwrap()
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn rot_of_a_leg_is_repaired_from_the_other() {
    run(Layout::Mirror { legs: 2 }, 2, &[0]);
    run(Layout::Mirror { legs: 2 }, 2, &[1]);
}

#[test]
fn rot_of_one_column_is_repaired_from_parity() {
    for bad in 0..3 {
        run(Layout::Raid5 { columns: 3 }, 3, &[bad]);
    }
}

#[test]
fn rot_of_two_columns_is_repaired_from_both_parities() {
    for bad in [[0, 1], [1, 2], [0, 3]] {
        run(Layout::Raid6 { columns: 4 }, 4, &bad);
    }
}
