//! Single points that were wrong once.

use std::ops::ControlFlow;
use std::rc::Rc;

use block_io::sim::{Failure, Numbers, Sim};
use block_io::{BlockDevice, Clock};
use filesys::{
    Access, Attributes, FileSystem, FsError, NewFile, OpenOptions, Relocation, Snapshot, Target, VolumeIndex,
};

use crate::harness::*;
use crate::machine::is_sound;

const CLUSTER: u64 = filesys::CLUSTER;
/// Bytes of a file below one page of its map.
const PAGE: u64 = 256 * CLUSTER;

async fn snapshot(fs: &SimFs, file: &SimFile, path: &str, layer: &str) -> Result<(), Failure> {
    let snapshot = Snapshot {
        path,
        layer,
        handle: Some(file),
    };
    fs.snapshot(&[snapshot], 0).await.map(|_| ()).map_err(failed)
}

fn on(volume: u16) -> Attributes {
    Attributes {
        target: Target::Volume(VolumeIndex(volume)),
        ..Attributes::default()
    }
}

/// Reads remember where ancestors have their data.
#[test]
fn what_ancestors_have_is_found_after_it_was_relocated() {
    run(world(2, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        let new = NewFile {
            size: 1 << 20,
            attributes: Some(on(0)),
            ..NewFile::default()
        };
        fs.create("/0", &new).await.map_err(failed)?;
        let file = fs.open_file("/0", Access::Write).await.map_err(failed)?;
        let mut expected = pattern(0, 1 << 20, 1);
        write(&file, 0, &expected).await.map_err(failed)?;
        // Whole clusters, sub-clusters, and parts of these, in different layers.
        for (layer, (offset, length)) in (1..).zip([(0, 65536), (65536, 4096), (73728, 512), (69632, 8192)]) {
            snapshot(&fs, &file, &format!("/{}", layer - 1), &format!("/{layer}")).await?;
            let bytes = pattern(offset, length, layer);
            write(&file, offset, &bytes).await.map_err(failed)?;
            let offset = usize::try_from(offset).unwrap();
            expected[offset..offset + length].copy_from_slice(&bytes);
        }
        snapshot(&fs, &file, "/4", "/5").await?;
        let third = fs.stat("/3").await.map_err(failed)?.id;
        let fourth = fs.stat("/4").await.map_err(failed)?.id;
        fs.clone_file("/3", "/clone", 0).await.map_err(failed)?;
        let clone = fs.stat("/clone").await.map_err(failed)?.id;
        assert_eq!(fs.children_of(third).await.map_err(failed)?, [clone, fourth]);
        fs.delete("/clone").await.map_err(failed)?;
        assert_eq!(fs.children_of(third).await.map_err(failed)?, [fourth]);
        let all = async |file: &SimFile| {
            for (offset, length) in [(0, 1 << 20), (65536, 4096), (65536 + 8192, 4096), (131_072, 512)] {
                let found = read(file, offset, length).await.map_err(failed)?;
                let offset = usize::try_from(offset).unwrap();
                same(&found, &expected[offset..offset + length])?;
            }
            Ok::<(), Failure>(())
        };
        all(&file).await?;
        all(&file).await?;
        for layer in ["/0", "/1", "/2", "/3", "/4"] {
            fs.set_attributes(layer, on(1)).await.map_err(failed)?;
            let id = fs.stat(layer).await.map_err(failed)?.id;
            let done = fs.relocate(id, Relocation::ToTarget, 0, |_| ControlFlow::Continue(()));
            assert!(done.await.map_err(failed)?.moved > 0);
        }
        fs.sync().await.map_err(failed)?;
        // Somebody else gets the old places.
        let other = NewFile {
            size: 6 << 20,
            attributes: Some(on(0)),
            ..NewFile::default()
        };
        fs.create("/other", &other).await.map_err(failed)?;
        let noise = fs.open_file("/other", Access::Write).await.map_err(failed)?;
        write(&noise, 0, &pattern(0, 6 << 20, 99)).await.map_err(failed)?;
        all(&file).await?;
        fs.absorb("/2", false).await.map_err(failed)?;
        all(&file).await?;
        drop((file, noise));
        fs.close().await.map_err(failed)
    });
}

/// As it is after a crash: nothing ends in order.
#[test]
fn a_merge_that_a_crash_has_cut_goes_on_by_itself() {
    for named in [false, true] {
        run(world(1, 8 << 20), async |sim: Sim| {
            let fs = format(&sim, 1).await.map_err(failed)?;
            fs.create("/base", &thin(4 * PAGE)).await.map_err(failed)?;
            let file = fs.open_file("/base", Access::Write).await.map_err(failed)?;
            for page in 0..4 {
                write(&file, page * PAGE, &pattern(page * PAGE, 65536, 1))
                    .await
                    .map_err(failed)?;
            }
            snapshot(&fs, &file, "/base", "/layer").await?;
            for page in 0..4 {
                write(&file, page * PAGE, &pattern(page * PAGE, 4096, 2))
                    .await
                    .map_err(failed)?;
            }
            file.flush().await.map_err(failed)?;
            drop(file);
            let done = fs.absorb_while("/layer", named, || false).await.map_err(failed)?;
            assert!(!done && fs.stat("/base").await.map_err(failed)?.absorbed);
            drop(fs);
            let options = OpenOptions {
                resume_merges: true,
                ..options()
            };
            let fs = open_with(&sim, options).await.map_err(failed)?;
            fs.settled().await;
            let names: Vec<_> = fs.list("/").await.map_err(failed)?.into_iter().collect();
            let wanted = if named { "base" } else { "layer" };
            if names.len() != 1 || names.iter().any(|entry| entry.name != wanted) {
                return Err(format!("{named}: {names:?}").as_str().into());
            }
            let file = fs
                .open_file(&format!("/{wanted}"), Access::Write)
                .await
                .map_err(failed)?;
            for page in 0..4 {
                same(
                    &read(&file, page * PAGE, 4096).await.map_err(failed)?,
                    &pattern(page * PAGE, 4096, 2),
                )?;
                same(
                    &read(&file, page * PAGE + 4096, 61440).await.map_err(failed)?,
                    &pattern(page * PAGE, 65536, 1)[4096..],
                )?;
            }
            drop(file);
            fs.close().await.map_err(failed)
        });
    }
}

async fn open_with(sim: &Sim, options: OpenOptions) -> Result<SimFs, FsError> {
    FileSystem::open(Rc::new(sim.disk(0)), vec![given(sim, 1)], options, sim.clock()).await
}

#[test]
fn a_volume_that_has_left_is_not_asked_for_after_a_crash() {
    run(world(2, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        fs.create("/a", &thin(1 << 20)).await.map_err(failed)?;
        fs.remove_volume([2; 16]).await.map_err(failed)?;
        drop(fs);
        let given = vec![given(&sim, 1)];
        let opened = FileSystem::open(Rc::new(sim.disk(0)), given, options(), sim.clock()).await;
        let fs = opened.map_err(failed)?;
        assert_eq!(fs.volumes().len(), 1);
        fs.close().await.map_err(failed)
    });
}

/// What files in memory know takes pages when a checkpoint puts it into the tables.
#[test]
fn many_files_that_changed_find_room_in_the_checkpoint_of_a_nearly_full_metadata_volume() {
    run(world(1, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        let mut names = Vec::new();
        loop {
            let name = format!("/{:0>60}", names.len());
            match fs.create(&name, &thin(65536)).await {
                Ok(_) => names.push(name),
                Err(FsError::NoSpace { .. }) => break,
                Err(error) => return Err(failed(error)),
            }
        }
        for name in names.drain(..4) {
            fs.delete(&name).await.map_err(failed)?;
        }
        fs.settled().await;
        fs.checkpoint().await.map_err(failed)?;
        let mut changed = 0;
        for name in &names {
            match fs.set_attributes(name, on(0)).await {
                Ok(()) => changed += 1,
                Err(FsError::NoSpace { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        assert!(names.len() > 100 && changed > 50, "{changed} of {}", names.len());
        fs.checkpoint().await.map_err(failed)?;
        fs.close().await.map_err(failed)
    });
}

#[test]
fn what_files_give_up_is_discarded_and_what_others_took_meanwhile_is_not() {
    run(world(1, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        for name in ["/a", "/b"] {
            fs.create(name, &thin(1 << 20)).await.map_err(failed)?;
            let file = fs.open_file(name, Access::Write).await.map_err(failed)?;
            write(&file, 0, &pattern(0, 1 << 20, 7)).await.map_err(failed)?;
            file.flush().await.map_err(failed)?;
        }
        fs.delete("/a").await.map_err(failed)?;
        fs.settled().await;
        fs.sync().await.map_err(failed)?;
        sim.clock().sleep(std::time::Duration::from_secs(6)).await;
        assert_eq!(fs.volumes()[0].free, (8 << 20) - (1 << 20));
        // And when it is closed before.
        let file = fs.open_file("/b", Access::Write).await.map_err(failed)?;
        file.discard(0, 1 << 19).await.map_err(failed)?;
        write(&file, 0, &pattern(0, 65536, 9)).await.map_err(failed)?;
        drop(file);
        fs.close().await.map_err(failed)?;
        let fs = open(&sim).await.map_err(failed)?;
        let file = fs.open_file("/b", Access::Read).await.map_err(failed)?;
        same(
            &read(&file, 0, 65536).await.map_err(failed)?,
            &pattern(0, 65536, 9),
        )?;
        same(
            &read(&file, 1 << 19, 1 << 19).await.map_err(failed)?,
            &pattern(0, 1 << 20, 7)[1 << 19..],
        )?;
        drop(file);
        fs.close().await.map_err(failed)
    });
    let mut numbers = Numbers::default();
    numbers.collect();
    assert!(numbers.missing(&["filesys: free space is discarded"]).is_empty());
}

/// Somebody still needs the file as it is.
async fn is_not_deleted(fs: &SimFs, path: &str) -> Result<(), Failure> {
    match fs.delete(path).await {
        Err(FsError::Busy { .. }) => Ok(()),
        other => Err(format!("{other:?}").as_str().into()),
    }
}

/// A layer that is committed into its base gets the base's name at the end. Its own name cannot go before, even if others keep its content.
#[test]
fn a_layer_with_children_that_is_being_committed_keeps_its_name() {
    run(world(1, 8 << 20), async |sim: Sim| {
        let fs = format(&sim, 1).await.map_err(failed)?;
        fs.create("/base", &thin(4 * PAGE)).await.map_err(failed)?;
        let file = fs.open_file("/base", Access::Write).await.map_err(failed)?;
        for (path, layer) in [("/base", "/layer"), ("/layer", "/top")] {
            for page in 0..4 {
                let bytes = pattern(page * PAGE, 4096, 1);
                write(&file, page * PAGE, &bytes).await.map_err(failed)?;
            }
            snapshot(&fs, &file, path, layer).await?;
        }
        let done = fs.absorb_while("/layer", true, || false).await.map_err(failed)?;
        assert!(!done);
        is_not_deleted(&fs, "/layer").await?;
        fs.absorb("/layer", true).await.map_err(failed)?;
        same(
            &read(&file, PAGE, 4096).await.map_err(failed)?,
            &pattern(PAGE, 4096, 1),
        )?;
        drop(file);
        let names = fs.list("/").await.map_err(failed)?;
        let names: Vec<_> = names.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["base", "top"]);
        fs.close().await.map_err(failed)
    });
}

/// Pages of a map, of which a merge does four at once.
const MANY: u64 = 12;

fn by_hand() -> OpenOptions {
    OpenOptions {
        background: false,
        ..options()
    }
}

/// `/base`, `/layer` on it, `/top` on that. Nothing goes on in the background until something is deleted.
async fn three_layers(sim: &Sim) -> Result<SimFs, Failure> {
    format(sim, 1)
        .await
        .map_err(failed)?
        .close()
        .await
        .map_err(failed)?;
    let fs = open_with(sim, by_hand()).await.map_err(failed)?;
    fs.create("/base", &thin(MANY * PAGE)).await.map_err(failed)?;
    let file = fs.open_file("/base", Access::Write).await.map_err(failed)?;
    for (sub, path, layer) in [(0, "/base", "/layer"), (1, "/layer", "/top"), (2, "/top", "")] {
        for page in 0..MANY {
            // Parts of the same clusters, which a merge has to copy.
            let offset = page * PAGE + sub * 4096;
            write(&file, offset, &pattern(offset, 4096, 1))
                .await
                .map_err(failed)?;
        }
        if !layer.is_empty() {
            snapshot(&fs, &file, path, layer).await?;
        }
    }
    Ok(fs)
}

/// Nothing is left, and all space is free.
async fn is_empty(fs: &SimFs) -> Result<(), Failure> {
    is_sound(fs).await?;
    fs.settle().await.map_err(failed)?;
    fs.sync().await.map_err(failed)?;
    is_sound(fs).await?;
    let names = fs.list("/").await.map_err(failed)?;
    match names.is_empty() && fs.volumes()[0].free == 8 << 20 {
        true => Ok(()),
        false => Err(format!("{names:?}, {:?}", fs.volumes()).as_str().into()),
    }
}

/// Without a name it would go with the last file that needs it, and leave a parent behind that nobody absorbs.
#[test]
fn a_layer_that_absorbs_its_parent_keeps_its_name_until_that_has_ended() {
    for named in [false, true] {
        run(world(1, 8 << 20), async |sim: Sim| {
            let fs = three_layers(&sim).await?;
            let done = fs.absorb_while("/layer", named, || false).await.map_err(failed)?;
            assert!(!done);
            is_not_deleted(&fs, "/layer").await?;
            is_sound(&fs).await?;
            fs.absorb("/layer", named).await.map_err(failed)?;
            fs.delete(if named { "/base" } else { "/layer" })
                .await
                .map_err(failed)?;
            fs.settled().await;
            fs.delete("/top").await.map_err(failed)?;
            is_empty(&fs).await?;
            fs.close().await.map_err(failed)
        });
    }
}

/// Two snapshots next to each other are deleted, and at once all that is left.
#[test]
fn a_merge_at_work_is_not_left_without_the_layer_that_it_goes_to() {
    for layers in [["/base", "/layer"], ["/layer", "/base"]] {
        run(world(1, 8 << 20), async |sim: Sim| {
            let fs = three_layers(&sim).await?;
            for layer in layers {
                fs.delete(layer).await.map_err(failed)?;
            }
            is_not_deleted(&fs, "/top").await?;
            fs.settled().await;
            fs.delete("/top").await.map_err(failed)?;
            is_empty(&fs).await?;
            fs.close().await.map_err(failed)
        });
    }
}

#[test]
fn a_parent_without_a_name_goes_with_the_layer_that_had_begun_to_absorb_it() {
    for last in ["/layer", "/top"] {
        run(world(1, 8 << 20), async |sim: Sim| {
            let fs = three_layers(&sim).await?;
            if last == "/layer" {
                fs.delete("/top").await.map_err(failed)?;
                fs.settled().await;
            } else {
                fs.delete("/layer").await.map_err(failed)?;
            }
            fs.delete("/base").await.map_err(failed)?;
            // The background is in the middle of it.
            fs.close().await.map_err(failed)?;
            let fs = open_with(&sim, by_hand()).await.map_err(failed)?;
            fs.delete(last).await.map_err(failed)?;
            is_empty(&fs).await?;
            fs.close().await.map_err(failed)
        });
    }
    let mut numbers = Numbers::default();
    numbers.collect();
    let missing = numbers.missing(&["filesys: a file goes with the layer that had begun to absorb it"]);
    assert!(missing.is_empty(), "{missing:?}");
}
