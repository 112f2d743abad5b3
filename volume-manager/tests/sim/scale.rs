//! Large pools: time and memory grow with what there is, not with its square.

use std::collections::BTreeSet;
use std::time::Instant;

use block_io::sim::{DiskOptions, Ended, Failure, RunOptions, World};
use block_io::{BlockDevice, Durability};
use volume_manager::NewVolume;
use volume_manager::model::{Layout, Uuid};

use crate::harness::{Model, UNIT, create, failed, flush, new_volume, open, verify, write};

const DEVICES: usize = 256;
const VOLUMES: u128 = 4096;

/// Resident bytes of this process.
fn memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident = pages
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    resident.unwrap_or(0) * 4096
}

fn volumes() -> Vec<NewVolume> {
    let layouts = [
        Layout::Mirror { legs: 2 },
        Layout::Stripe { columns: 3 },
        Layout::Concat,
        Layout::Mirror { legs: 3 },
    ];
    (0..VOLUMES)
        .zip(layouts.into_iter().cycle())
        .map(|(number, layout)| NewVolume {
            name: format!("v{number}"),
            uuid: Uuid(number),
            region: 0,
            ..new_volume(layout, 16 * UNIT)
        })
        .collect()
}

#[test]
fn a_pool_of_256_devices_and_4096_volumes_is_made_and_opened_in_seconds() {
    let disks = (0..DEVICES).map(|index| DiskOptions::new(&format!("d{index}"), 1 << 30));
    let (mut world, model) = (World::new(disks), Model::default());
    let before = memory();
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        let begun = Instant::now();
        let pool = create(&sim, &model, DEVICES).await?;
        println!("pool made after {:?}", begun.elapsed());
        let begun = Instant::now();
        let made = pool.create_volumes(volumes()).await.map_err(failed)?;
        println!("{} volumes made after {:?}", made.len(), begun.elapsed());
        drop(made);
        let volume = pool.volume("v4095").map_err(failed)?;
        let begun = Instant::now();
        let mut one = new_volume(Layout::Mirror { legs: 2 }, 16 * UNIT);
        one.uuid = Uuid(VOLUMES);
        drop(pool.create_volume(one).await.map_err(failed)?);
        println!("one more made after {:?}", begun.elapsed());
        write(&volume, &model, 0, 1, 8192, Durability::Volatile).await?;
        flush(&volume, &model).await?;
        drop(volume);
        let begun = Instant::now();
        pool.close().await.map_err(failed)?;
        println!("closed after {:?}", begun.elapsed());
        let (begun, held) = (Instant::now(), memory());
        let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
        let opened = begun.elapsed();
        println!(
            "opened after {opened:?}, {} KiB of memory for the open pool, {} MiB with the disks",
            memory().saturating_sub(held) >> 10,
            memory().saturating_sub(before) >> 20
        );
        let volume = pool.volume("v4095").map_err(failed)?;
        verify(&volume, &model).await?;
        assert_eq!(volume.size(), 16 * UNIT);
        let config = pool.configuration();
        assert_eq!(config.volumes.len(), 4097);
        let used: BTreeSet<_> = config.extents().map(|extent| extent.device).collect();
        assert_eq!(used.len(), DEVICES, "spread over all devices");
        drop(volume);
        let begun = Instant::now();
        pool.close().await.map_err(failed)?;
        println!("closed after {:?}", begun.elapsed());
        // Generous: other things run on the same machine, and this is no optimised build.
        assert!(opened.as_secs() < 60, "{opened:?}");
        Ok::<(), Failure>(())
    });
    match ran.unwrap_or_else(|failure| panic!("{failure}")).ended {
        Ended::Done(Ok(())) => {}
        Ended::Done(Err(failure)) => panic!("{failure}"),
        Ended::Crashed => panic!("no crash was asked for"),
    }
}
