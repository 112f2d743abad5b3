//! Data that are moved are verified first: with the old place, its other copies go.

use std::ops::ControlFlow;

use super::*;
use filesys::Relocation;

/// A file whose clusters do not lie in order, and its content.
async fn scattered(fs: &HealFs) -> Result<(HealFile, Vec<u8>), Failure> {
    fs.create("/a", &checked()).await.map_err(failed)?;
    fs.create("/b", &checked()).await.map_err(failed)?;
    let a = fs.open_file("/a", Access::Write).await.map_err(failed)?;
    let b = fs.open_file("/b", Access::Write).await.map_err(failed)?;
    let content = pattern(0, usize::try_from(SIZE).unwrap(), 7);
    for (number, cluster) in (0_u64..).zip(content.chunks(65536)) {
        write(&a, number * 65536, cluster).await?;
        write(&b, number * 65536, &pattern(number * 65536, 65536, 8)).await?;
    }
    a.flush().await.map_err(failed)?;
    Ok((a, content))
}

#[test]
fn what_is_rotten_on_one_disk_is_moved_as_it_was_written() {
    for (disks, layout) in LAYOUTS {
        for bad in 0..disks {
            numbers(&mut world(disks as u64), async move |sim| {
                let rig = make(&sim, disks, layout).await?;
                let fs = format(&sim, &rig).await?;
                let (file, content) = scattered(&fs).await?;
                for sector in content.chunks(512).take(512) {
                    rot_all(&sim, bad, sector);
                }
                let done = fs.relocate(
                    file.id(),
                    Relocation::Defragment,
                    0,
                    |_| ControlFlow::Continue(()),
                );
                assert!(done.await.map_err(failed)?.moved > 0);
                let lost = |event: &Event| matches!(event, Event::Corrupt { .. });
                assert!(!fs.take_events().iter().any(lost));
                same(&read(&file, 0, SIZE).await?, &content)?;
                drop(file);
                fs.close().await.map_err(failed)
            });
        }
    }
}

#[test]
fn what_is_lost_stays_known_as_lost_where_it_is_moved_to() {
    let (disks, layout) = LAYOUTS[0];
    let numbers = numbers(&mut world(disks as u64), async move |sim| {
        let rig = make(&sim, disks, layout).await?;
        let fs = format(&sim, &rig).await?;
        let (file, content) = scattered(&fs).await?;
        for disk in 0..disks {
            for sector in content[4096..8192].chunks(512) {
                rot_all(&sim, disk, sector);
            }
        }
        let done = fs.relocate(
            file.id(),
            Relocation::Defragment,
            0,
            |_| ControlFlow::Continue(()),
        );
        assert!(done.await.map_err(failed)?.moved > 0);
        let told = |event: &Event| matches!(event, Event::Corrupt { offset: 4096, .. });
        assert!(fs.take_events().iter().any(told));
        assert!(read(&file, 4096, 4096).await.is_err());
        same(&read(&file, 8192, 4096).await?, &content[8192..12288])
    });
    demand(
        &numbers,
        &["filesys: data that are lost are copied with the checksum that says so"],
    );
}
