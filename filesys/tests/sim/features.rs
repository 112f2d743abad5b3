//! What files can do beside being read and written.

use std::ops::ControlFlow;

use block_io::sim::{Failure, Sim};
use block_io::{BlockDevice, ZeroMode};
use filesys::{
    Access, Attributes, Event, FsError, NewFile, RangeKind, Relocation, Snapshot, Target, VolumeIndex,
};

use crate::harness::*;

const CLUSTER: u64 = filesys::CLUSTER;

async fn filled(fs: &SimFs, path: &str, size: u64, fill: u8) -> Result<SimFile, Failure> {
    fs.create(path, &thin(size)).await.map_err(failed)?;
    let file = fs.open_file(path, Access::Write).await.map_err(failed)?;
    write(&file, 0, &pattern(0, usize::try_from(size).unwrap(), fill))
        .await
        .map_err(failed)?;
    Ok(file)
}

async fn holds(file: &SimFile, size: u64, fill: u8) -> Result<(), Failure> {
    let length = usize::try_from(size).unwrap();
    let found = read(file, 0, length).await.map_err(failed)?;
    same(&found, &pattern(0, length, fill))
}

fn refused<T: std::fmt::Debug>(result: Result<T, FsError>, words: &str) -> Result<(), Failure> {
    match result {
        Err(error) if error.to_string().contains(words) => Ok(()),
        other => Err(format!("expected an error about {words:?}, found {other:?}")
            .as_str()
            .into()),
    }
}

#[test]
fn a_file_follows_its_attributes_to_another_volume_and_a_drained_volume_leaves() {
    run(world(2, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        let attributes = Attributes {
            target: Target::Volume(VolumeIndex(0)),
            ..Attributes::default()
        };
        fs.make_directory("/d", Some(attributes.clone()), 0)
            .await
            .map_err(failed)?;
        let file = filled(&fs, "/d/a", 1 << 20, 7).await?;
        let on = async |fs: &SimFs| fs.usage("/d/a").await.map(|usage| usage.volumes);
        assert_eq!(on(&fs).await.map_err(failed)?, [(VolumeIndex(0), 1 << 20)].into());
        let other = Attributes {
            target: Target::Volume(VolumeIndex(1)),
            ..attributes
        };
        fs.set_attributes("/d/a", other).await.map_err(failed)?;
        let done = fs
            .relocate(file.id(), Relocation::ToTarget, 0, |_| ControlFlow::Continue(()))
            .await
            .map_err(failed)?;
        assert_eq!(done.moved, 1 << 20);
        assert_eq!(on(&fs).await.map_err(failed)?, [(VolumeIndex(1), 1 << 20)].into());
        holds(&file, 1 << 20, 7).await?;
        fs.sync().await.map_err(failed)?;
        fs.remove_volume([1; 16]).await.map_err(failed)?;
        refused(fs.remove_volume([2; 16]).await, "files have")?;
        assert_eq!(fs.volumes().len(), 1);
        // The file was written where the volume was, and is flushed nevertheless: also when another one has its number.
        file.flush().await.map_err(failed)?;
        fs.add_volume(given(&sim, 1)).await.map_err(failed)?;
        file.flush().await.map_err(failed)?;
        holds(&file, 1 << 20, 7).await?;
        drop(file);
        fs.close().await.map_err(failed)
    });
}

#[test]
fn defragmentation_puts_a_scattered_file_in_order() {
    run(world(1, 48 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        fs.create("/a", &thin(4 << 20)).await.map_err(failed)?;
        fs.create("/b", &thin(4 << 20)).await.map_err(failed)?;
        let a = fs.open_file("/a", Access::Write).await.map_err(failed)?;
        let b = fs.open_file("/b", Access::Write).await.map_err(failed)?;
        // No group is free, so single clusters are taken in turn.
        fs.create("/c", &thin(48 << 20)).await.map_err(failed)?;
        let c = fs.open_file("/c", Access::Write).await.map_err(failed)?;
        for group in 0..3 {
            write(&c, group * (16 << 20), &pattern(0, 4096, 9))
                .await
                .map_err(failed)?;
        }
        for cluster in (0..64).rev() {
            write(&a, cluster * CLUSTER, &pattern(cluster * CLUSTER, 65536, 1))
                .await
                .map_err(failed)?;
            write(&b, cluster * CLUSTER, &pattern(cluster * CLUSTER, 65536, 2))
                .await
                .map_err(failed)?;
        }
        drop((b, c));
        fs.delete("/b").await.map_err(failed)?;
        fs.delete("/c").await.map_err(failed)?;
        let extents = async |fs: &SimFs| {
            fs.file_extents("/a", 0, 4 << 20)
                .await
                .map(|extents| extents.len())
        };
        let before = extents(&fs).await.map_err(failed)?;
        sim.clock();
        while fs.volumes()[0].free < 40 << 20 {
            fs.sync().await.map_err(failed)?;
            block_io::Clock::sleep(&sim.clock(), std::time::Duration::from_millis(1)).await;
        }
        fs.relocate(a.id(), Relocation::Defragment, 0, |_| ControlFlow::Continue(()))
            .await
            .map_err(failed)?;
        let after = extents(&fs).await.map_err(failed)?;
        assert!(
            before > 32 && after == 1,
            "{before} extents before, {after} after"
        );
        holds(&a, 4 << 20, 1).await?;
        fs.close().await.map_err(failed)
    });
}

#[test]
fn a_pin_holds_a_frozen_image_and_its_ancestors_over_a_restart() {
    run(world(2, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        let file = filled(&fs, "/a", 1 << 20, 1).await?;
        let snapshot = Snapshot {
            path: "/a",
            layer: "/b",
            handle: Some(&file),
        };
        fs.snapshot(&[snapshot], 0).await.map_err(failed)?;
        refused(fs.pin("/b", 100).await, "frozen")?;
        let pin = fs.pin("/a", 100).await.map_err(failed)?;
        let before = fs.file_extents("/a", 0, 1 << 20).await.map_err(failed)?;
        refused(fs.absorb("/b", true).await, "pin")?;
        drop(file);
        refused(fs.delete("/a").await, "pin")?;
        fs.close().await.map_err(failed)?;

        let fs = open(&sim).await.map_err(failed)?;
        assert_eq!(fs.pins(), [pin]);
        let base = fs.stat("/a").await.map_err(failed)?;
        let moved = fs
            .relocate(base.id, Relocation::Defragment, 0, |_| ControlFlow::Continue(()))
            .await;
        refused(moved, "pin")?;
        assert_eq!(fs.file_extents("/a", 0, 1 << 20).await.map_err(failed)?, before);
        assert!(fs.expire_pins(99).await.map_err(failed)?.is_empty());
        assert_eq!(fs.expire_pins(100).await.map_err(failed)?, [pin]);
        fs.absorb("/b", true).await.map_err(failed)?;
        assert_eq!(fs.list("/").await.map_err(failed)?.len(), 1);
        fs.close().await.map_err(failed)
    });
}

#[test]
fn changed_ranges_and_usage_tell_what_a_layer_has() {
    run(world(1, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        let file = filled(&fs, "/a", 1 << 20, 1).await?;
        let snapshot = |layer| Snapshot {
            path: "/a",
            layer,
            handle: Some(&file),
        };
        fs.snapshot(&[snapshot("/b")], 0).await.map_err(failed)?;
        write(&file, 8192, &pattern(8192, 4096, 2))
            .await
            .map_err(failed)?;
        write(&file, 128 << 10, &pattern(128 << 10, 65536, 2))
            .await
            .map_err(failed)?;
        file.write_zeroes(512 << 10, 12288, ZeroMode::MayUnmap)
            .await
            .map_err(failed)?;
        let (changed, rest) = fs.changed("/b", Some("/a"), 0, 100).await.map_err(failed)?;
        let found: Vec<_> = changed
            .iter()
            .map(|range| (range.offset, range.length, range.kind))
            .collect();
        let expected = [
            (8192, 4096, RangeKind::Data),
            (128 << 10, 65536, RangeKind::Data),
            (512 << 10, 12288, RangeKind::Zero),
        ];
        assert_eq!((found.as_slice(), rest), (expected.as_slice(), None));
        let usage = fs.usage("/a").await.map_err(failed)?;
        // The cluster that the layer has wholly is needed by nobody else.
        assert_eq!((usage.exclusive, usage.shared), (CLUSTER, 15 * CLUSTER));
        assert_eq!(fs.usage("/b").await.map_err(failed)?.exclusive, 2 * CLUSTER);
        drop(file);
        fs.close().await.map_err(failed)
    });
}

#[test]
fn rot_is_noticed_where_a_file_has_checksums() {
    run(world(1, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        let attributes = Attributes {
            checksums: true,
            ..Attributes::default()
        };
        let new = NewFile {
            size: 1 << 20,
            attributes: Some(attributes),
            now: 0,
        };
        fs.create("/a", &new).await.map_err(failed)?;
        let file = fs.open_file("/a", Access::Write).await.map_err(failed)?;
        write(&file, 0, &pattern(0, 65536, 1)).await.map_err(failed)?;
        write(&file, 512, &pattern(512, 1024, 2)).await.map_err(failed)?;
        file.flush().await.map_err(failed)?;
        drop(file);
        fs.close().await.map_err(failed)?;

        let fs = open(&sim).await.map_err(failed)?;
        let file = fs.open_file("/a", Access::Read).await.map_err(failed)?;
        same(
            &read(&file, 512, 1024).await.map_err(failed)?,
            &pattern(512, 1024, 2),
        )?;
        let at = fs.file_extents("/a", 8192, 4096).await.map_err(failed)?[0].start;
        sim.disk(1)
            .write_bytes(at + 512, &[0xee; 512], block_io::Durability::Durable)
            .await
            .map_err(failed)?;
        let error = read(&file, 8192, 512).await.expect_err("rot");
        assert!(format!("{:?}", error.cause()).contains("Checksum"), "{error:?}");
        assert!(matches!(
            fs.take_events().as_slice(),
            [Event::Corrupt { offset: 8192, .. }]
        ));
        read(&file, 0, 8192).await.map_err(failed)?;
        drop(file);
        fs.close().await.map_err(failed)
    });
}

#[test]
fn thick_files_have_their_space_and_a_full_volume_says_so() {
    run(world(1, 4 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        let thick = Attributes {
            thick: true,
            ..Attributes::default()
        };
        let new = |size| NewFile {
            size,
            attributes: Some(thick.clone()),
            now: 0,
        };
        refused(fs.create("/big", &new(8 << 20)).await, "no space left")?;
        assert!(fs.list("/").await.map_err(failed)?.is_empty());
        while fs.volumes()[0].free < 4 << 20 {
            block_io::Clock::sleep(&sim.clock(), std::time::Duration::from_millis(1)).await;
        }
        fs.create("/thick", &new(3 << 20)).await.map_err(failed)?;
        assert_eq!(fs.stat("/thick").await.map_err(failed)?.allocated, 3 << 20);
        let thin_file = filled(&fs, "/thin", 1 << 20, 3).await?;
        fs.create("/more", &thin(1 << 20)).await.map_err(failed)?;
        let more = fs.open_file("/more", Access::Write).await.map_err(failed)?;
        let error = write(&more, 0, &[1; 4096]).await.expect_err("full");
        assert!(error.to_string().contains("write"), "{error}");
        let thick_file = fs.open_file("/thick", Access::Write).await.map_err(failed)?;
        write(&thick_file, 0, &pattern(0, 3 << 20, 4))
            .await
            .map_err(failed)?;
        holds(&thick_file, 3 << 20, 4).await?;
        // What is discarded can be written elsewhere at once.
        thin_file.discard(0, 1 << 20).await.map_err(failed)?;
        write(&more, 0, &pattern(0, 1 << 20, 5)).await.map_err(failed)?;
        holds(&more, 1 << 20, 5).await?;
        assert!(
            fs.take_events()
                .iter()
                .any(|event| matches!(event, Event::LowSpace { .. }))
        );
        drop((thick_file, thin_file, more));
        fs.close().await.map_err(failed)
    });
}

#[test]
fn the_metadata_volume_can_grow() {
    let mut small = world(1, 8 << 20);
    run_world(&mut small, async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        filled(&fs, "/a", 1 << 20, 1).await?;
        fs.close().await.map_err(failed)
    });
    small.media[0].grow(2 * META);
    run_world(&mut small, async |sim: Sim| {
        for round in 0..2 {
            let fs = open(&sim).await.map_err(failed)?;
            assert_eq!(fs.metadata().size, 2 * META);
            assert!(fs.metadata().free > META);
            let file = fs.open_file("/a", Access::Read).await.map_err(failed)?;
            holds(&file, 1 << 20, 1).await?;
            drop(file);
            filled(&fs, &format!("/b{round}"), 65536, 2).await?;
            fs.close().await.map_err(failed)?;
        }
        Ok(())
    });
}
