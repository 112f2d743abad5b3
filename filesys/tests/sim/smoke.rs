//! The thinnest slices.

use block_io::BlockDevice;
use filesys::{Access, Snapshot};

use crate::harness::*;

#[test]
fn what_is_written_is_read_again_after_closing_and_opening() {
    run(world(1, 8 << 20), async |sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        fs.make_directory("/vm", None, 1).await.map_err(failed)?;
        fs.create("/vm/a.dsk", &thin(4 << 20)).await.map_err(failed)?;
        let file = fs.open_file("/vm/a.dsk", Access::Write).await.map_err(failed)?;
        same(&read(&file, 0, 8192).await.map_err(failed)?, &vec![0; 8192])
            .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        write(&file, 4096, &pattern(4096, 4096, 1))
            .await
            .map_err(failed)?;
        write(&file, 65536 - 512, &pattern(65536 - 512, 1024, 2))
            .await
            .map_err(failed)?;
        write(&file, 1 << 20, &pattern(1 << 20, 300 << 10, 3))
            .await
            .map_err(failed)?;
        file.flush().await.map_err(failed)?;
        same(
            &read(&file, 4096, 4096).await.map_err(failed)?,
            &pattern(4096, 4096, 1),
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        drop(file);
        fs.close().await.map_err(failed)?;

        let fs = open(&sim).await.map_err(failed)?;
        let file = fs.open_file("/vm/a.dsk", Access::Write).await.map_err(failed)?;
        same(
            &read(&file, 4096, 4096).await.map_err(failed)?,
            &pattern(4096, 4096, 1),
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        same(
            &read(&file, 65536 - 512, 1024).await.map_err(failed)?,
            &pattern(65536 - 512, 1024, 2),
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        same(
            &read(&file, 65536 - 1024, 512).await.map_err(failed)?,
            &vec![0; 512],
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        same(
            &read(&file, 1 << 20, 300 << 10).await.map_err(failed)?,
            &pattern(1 << 20, 300 << 10, 3),
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        file.discard(1 << 20, 300 << 10).await.map_err(failed)?;
        same(
            &read(&file, 1 << 20, 300 << 10).await.map_err(failed)?,
            &vec![0; 300 << 10],
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        let stat = fs.stat("/vm/a.dsk").await.map_err(failed)?;
        assert_eq!((stat.size, stat.allocated), (4 << 20, 2 << 16));
        fs.rename("/vm/a.dsk", "/b.dsk").await.map_err(failed)?;
        drop(file);
        fs.delete("/b.dsk").await.map_err(failed)?;
        fs.delete("/vm").await.map_err(failed)?;
        assert!(fs.list("/").await.map_err(failed)?.is_empty());
        fs.close().await.map_err(failed)
    });
}

#[test]
fn a_layer_shows_its_parent_until_it_is_written_and_is_merged_back() {
    run(world(2, 8 << 20), async |sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        fs.create("/a", &thin(1 << 20)).await.map_err(failed)?;
        let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
        write(&file, 0, &pattern(0, 128 << 10, 1)).await.map_err(failed)?;
        for round in 0..5_u8 {
            let layer = format!("/layer{round}");
            let below = if round == 0 {
                "/a".to_owned()
            } else {
                format!("/layer{}", round - 1)
            };
            let snapshot = Snapshot {
                path: &below,
                layer: &layer,
                handle: Some(&file),
            };
            fs.snapshot(&[snapshot], 1).await.map_err(failed)?;
            let at = u64::from(round) * 8192 + 512;
            write(&file, at, &pattern(at, 512, 100 + round))
                .await
                .map_err(failed)?;
        }
        let mut expected = pattern(0, 128 << 10, 1);
        for round in 0..5_u8 {
            let at = usize::from(round) * 8192 + 512;
            expected[at..at + 512].copy_from_slice(&pattern(at as u64, 512, 100 + round));
        }
        same(&read(&file, 0, 128 << 10).await.map_err(failed)?, &expected)
            .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        let base = fs.open_file("/a", Access::Read).await.map_err(failed)?;
        same(
            &read(&base, 0, 128 << 10).await.map_err(failed)?,
            &pattern(0, 128 << 10, 1),
        )
        .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        drop(base);
        // The middle goes, then the rest is merged into the base.
        fs.absorb("/layer3", false).await.map_err(failed)?;
        same(&read(&file, 0, 128 << 10).await.map_err(failed)?, &expected)
            .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        fs.absorb("/layer1", true).await.map_err(failed)?;
        for (layer, named) in [("/layer3", false), ("/layer4", false), ("/layer4", true)] {
            fs.absorb(layer, named).await.map_err(failed)?;
            same(&read(&file, 0, 128 << 10).await.map_err(failed)?, &expected)
                .map_err(|failure| failure.context(&format!("line {}", line!())))?;
        }
        let names: Vec<_> = fs
            .list("/")
            .await
            .map_err(failed)?
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["a"]);
        drop(file);
        fs.close().await.map_err(failed)
    });
}
