//! A device fails while many writes are on their way, comes back, and catches up: nothing of what it missed is forgotten, whatever the writes
//! were doing when they heard of it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Ended, Failure, Fault, FaultRule, Medium, RunOptions};
use block_io::{Clock, Durability, Operation};
use volume_manager::model::{DeviceId, Layout};

use crate::harness::{self, Model, check, create, failed, flush, new_volume, open, settle, write};

/// Places that are written, so far from each other that a device which catches up copies each by itself.
const PLACES: u64 = 16;
/// At least a row.
const LONG: usize = 12288;
/// Orders of events that are tried for each layout.
const SEEDS: u64 = 4;

/// Tells whether writes were on their way when the device failed.
fn run(layout: Layout, seed: u64) -> Result<bool, Failure> {
    let disks = usize::try_from(layout.columns() * layout.legs()).unwrap_or(2);
    // 256 KiB of each data column are copied at once.
    let apart = (256 << 10) * u64::from(layout.columns() - layout.parity());
    let mut world = harness::world(disks as u64);
    let ran = world.run(&RunOptions::random(seed), |sim| async move {
        let model = Model::default();
        let pool = create(&sim, &model, disks).await?;
        let volume = pool
            .create_volume(new_volume(layout, PLACES * apart))
            .await
            .map_err(failed)?;
        for place in 0..PLACES {
            write(&volume, &model, place * apart, 1, LONG, Durability::Volatile).await?;
        }
        drop(volume);
        // What is hot counts as missed, so nothing may be.
        pool.close().await.map_err(failed)?;
        let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
        let volume = pool.volume("v").map_err(failed)?;
        // Whoever reads before it writes may hear of it late.
        let slow = Fault::Slow(200);
        let rule = FaultRule {
            times: Some(6),
            ..FaultRule::once(slow, Operation::Read).after(seed % 7)
        };
        sim.inject(disks - 1, rule);
        let left = Rc::new(Cell::new(PLACES));
        for place in 0..PLACES {
            let (volume, model, left) = (volume.clone(), model.clone(), Rc::clone(&left));
            let clock = sim.clock();
            sim.spawn("writer", async move {
                clock.sleep(Duration::from_micros(place * 60)).await;
                // Parts of rows, and whole ones. Nothing is written twice: each write has to see to it itself that it is not forgotten.
                let length = if place % 4 == 3 { LONG } else { 1536 };
                let done = write(&volume, &model, place * apart, 2, length, Durability::Volatile);
                drop(done.await);
                left.set(left.get() - 1);
            });
        }
        let clock = sim.clock();
        clock.sleep(Duration::from_micros(seed * 137 % 1300)).await;
        sim.detach(0);
        let under_way = left.get() > 0;
        while left.get() > 0 {
            clock.sleep(Duration::from_micros(50)).await;
        }
        flush(&volume, &model).await?;
        check(&volume, &model).await?;
        sim.with_medium(0, Medium::repair);
        pool.readmit(DeviceId(0), "again", Rc::new(sim.disk(0)))
            .await
            .map_err(failed)?;
        settle(&pool).await?;
        check(&volume, &model).await?;
        // Now all depends on what came back.
        sim.detach(1);
        check(&volume, &model).await?;
        Ok::<_, Failure>(under_way)
    })?;
    match ran.ended {
        Ended::Done(done) => done,
        Ended::Crashed => Err("no crash was asked for".into()),
    }
}

#[test]
fn a_device_that_fails_under_writes_and_returns_has_all_of_them() {
    for layout in [
        Layout::Mirror { legs: 2 },
        Layout::Raid5 { columns: 4 },
        Layout::Raid6 { columns: 5 },
    ] {
        let mut under_way = 0;
        for seed in 0..SEEDS {
            match run(layout, seed) {
                Ok(some) => under_way += u64::from(some),
                Err(failure) => panic!("{layout}, seed {seed}: {failure}"),
            }
        }
        assert!(
            under_way * 3 > SEEDS,
            "{layout}: writes were under way in {under_way} of {SEEDS} runs"
        );
    }
}
