//! Sizes that do not fit: the last row of parity reaches beyond the end of the volume, and beyond its last region.

use block_io::Durability;
use block_io::sim::{Ended, RunOptions};
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
