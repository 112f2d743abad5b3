//! Sizes that do not fit: the last row of parity reaches beyond the end of the volume, and beyond its last region.

use block_io::sim::{Ended, Failure, Fault, FaultRule, RunOptions};
use std::ops::Range;

use block_io::{Durability, Operation};
use volume_manager::model::Layout;

use crate::harness::{self, Model, create, failed, flush, new_volume, open, verify, write};

#[test]
fn the_last_row_of_a_degraded_volume_may_be_partial() {
    const DISKS: usize = 6;
    // Rows of 20 KiB, regions of 16 KiB: the third row ends behind the third region, which is the last one.
    const SIZE: u64 = 48 << 10;
    let mut world = harness::world(DISKS as u64);
    let ran = world.run(&RunOptions::random(1), |sim| async move {
        let model = Model::default();
        let pool = create(&sim, &model, DISKS).await?;
        let volume = pool
            .create_volume(new_volume(Layout::Raid5 { columns: 6 }, SIZE))
            .await
            .map_err(failed)?;
        let whole = usize::try_from(SIZE).unwrap();
        write(&volume, &model, 0, 1, whole, Durability::Volatile).await?;
        flush(&volume, &model).await?;
        sim.detach(0);
        for fill in 2..5 {
            write(&volume, &model, SIZE - 512, fill, 512, Durability::Volatile).await?;
            write(&volume, &model, SIZE - 8192, fill, 8192, Durability::Durable).await?;
        }
        flush(&volume, &model).await?;
        verify(&volume, &model).await?;
        drop(volume);
        // Not closed: its logs are replayed.
        drop(pool);
        let pool = open(&sim, &model, |disk| disk != 0).await.map_err(failed)?;
        let volume = pool.volume("v").map_err(failed)?;
        verify(&volume, &model).await?;
        drop(volume);
        pool.close().await.map_err(failed)
    });
    match ran.unwrap_or_else(|failure| panic!("{failure}")).ended {
        Ended::Done(Ok(())) => {}
        Ended::Done(Err(failure)) => panic!("{failure}"),
        Ended::Crashed => panic!("no crash was asked for"),
    }
}

/// Opens a RAID-5 volume whose log is to be replayed on devices of which some fail all writes of data; whether it takes a write.
fn takes_writes_after_replay_without(devices: usize) -> bool {
    const DISKS: usize = 6;
    const SIZE: u64 = 40 << 10;
    /// Where the volume's data and its parity log are on each disk. Labels and configuration are elsewhere.
    const DATA: Range<u64> = 544 << 10..576 << 10;
    let mut world = harness::world(DISKS as u64);
    let ran = world.run(&RunOptions::random(1), |sim| async move {
        let model = Model::default();
        let pool = create(&sim, &model, DISKS).await?;
        let volume = pool
            .create_volume(new_volume(Layout::Raid5 { columns: 6 }, SIZE))
            .await
            .map_err(failed)?;
        write(&volume, &model, 0, 1, 8192, Durability::Durable).await?;
        drop(volume);
        // Not closed: its log is to be replayed.
        drop(pool);
        for disk in 0..devices {
            sim.inject(
                disk,
                FaultRule::always(Fault::Error, Operation::Write).within(DATA),
            );
        }
        let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
        let volume = pool.volume("v").map_err(failed)?;
        let taken = write(&volume, &model, 0, 2, 4096, Durability::Durable)
            .await
            .is_ok();
        drop(volume);
        let closed = pool.close().await;
        // With two devices the copies of the log are gone, too, and closing says so.
        if devices < 2 {
            closed.map_err(failed)?;
        }
        Ok::<_, Failure>(taken)
    });
    match ran.unwrap_or_else(|failure| panic!("{failure}")).ended {
        Ended::Done(Ok(taken)) => taken,
        Ended::Done(Err(failure)) => panic!("{failure}"),
        Ended::Crashed => panic!("no crash was asked for"),
    }
}

#[test]
fn a_parity_log_is_replayed() {
    assert!(takes_writes_after_replay_without(0));
}

#[test]
fn a_parity_log_is_replayed_without_a_device_that_fails_meanwhile() {
    assert!(takes_writes_after_replay_without(1));
}

#[test]
fn without_two_devices_writes_are_refused_and_nothing_goes_on_for_ever() {
    assert!(!takes_writes_after_replay_without(2));
}
