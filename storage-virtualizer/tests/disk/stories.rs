//! Single stories: modes, snapshots, refusals.

use std::cell::Cell;
use std::rc::Rc;

use block_io::sim::{Failure, Numbers, Sim};
use block_io::{BlockDevice, Durability};
use storage_virtualizer::disk::{DiskMode, DiskOptions, Disks, NewDisk, NewSnapshot, PowerOff};

use crate::help::*;

const D: &str = "/root.dsk";

async fn disks(sim: &Sim) -> Result<(SimFs, SimDisks), Failure> {
    let fs = format(sim).await?;
    let disks = Disks::new(fs.clone());
    create(&disks, D, 4 * CLUSTER).await?;
    Ok((fs, disks))
}

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        description: format!("the snapshot {name}"),
        now: 7,
    }
}

#[test]
fn a_persistent_disk_keeps_what_is_written() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        write(&*disk, 1, 11).await?;
        refused(
            disks.open(D, writing(DiskMode::Persistent)).await,
            "is in use: it is open for writing",
        )?;
        refused(disks.open(D, reading()).await, "is in use")?;
        disks.close(disk, 1).await.map_err(failed)?;
        same(&look(&disks, D).await?, &vec![0, 11, 0, 0])?;
        // Without layers there is nothing but the disk.
        same(&names(&fs).await?, &vec!["root.dsk".to_owned()])?;
        // Readers, several of them, and no writer beside them.
        let one = disks.open(D, reading()).await.map_err(failed)?;
        let two = disks.open(D, reading()).await.map_err(failed)?;
        refused(
            disks.open(D, writing(DiskMode::Persistent)).await,
            "must not see it change",
        )?;
        drop((one, two));
        attach(&disks, D, DiskMode::Persistent).await.map(drop)
    });
}

#[test]
fn a_nonpersistent_disk_forgets_at_power_off_and_after_a_crash() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        write(&*disk, 0, 1).await?;
        disks.close(disk, 1).await.map_err(failed)?;
        for crash in [false, true] {
            let disk = attach(&disks, D, DiskMode::Nonpersistent).await?;
            write(&*disk, 0, 2).await?;
            same(&contents(&*disk).await?, &vec![2, 0, 0, 0])?;
            refused(disks.snapshot(&[D], &named("s")).await, "it is nonpersistent")?;
            refused(disks.commit(D, 1).await, "it is nonpersistent")?;
            match crash {
                true => drop(disk),
                false => disks.close(disk, 1).await.map_err(failed)?,
            }
            same(&look(&disks, D).await?, &vec![1, 0, 0, 0])?;
        }
        // The layer goes when the disk is opened next, and the disk is written as before.
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        same(
            &names(&fs).await?,
            &vec!["root.disk".to_owned(), "root.dsk".to_owned()],
        )?;
        write(&*disk, 0, 3).await?;
        disks.close(disk, 1).await.map_err(failed)?;
        same(&look(&disks, D).await?, &vec![3, 0, 0, 0])
    });
}

#[test]
fn who_goes_on_with_a_disk_finds_what_it_has_written_or_is_refused() {
    run(|sim| async move {
        let (_, disks) = disks(&sim).await?;
        let on = |mode| DiskOptions {
            goes_on: true,
            power_off: PowerOff::Discard,
            ..writing(mode)
        };
        refused(
            disks.open(D, on(DiskMode::Nonpersistent)).await,
            "committed or discarded meanwhile",
        )?;
        for (stamp, mode) in [
            (1, DiskMode::Persistent),
            (2, DiskMode::Nonpersistent),
            (3, DiskMode::Undoable),
        ] {
            let first = DiskOptions {
                power_off: PowerOff::Discard,
                ..writing(mode)
            };
            let disk = Rc::new(disks.open(D, first).await.map_err(failed)?);
            write(&*disk, 0, stamp).await?;
            disks.leave(disk).await.map_err(failed)?;
            let disk = Rc::new(disks.open(D, on(mode)).await.map_err(failed)?);
            same(&get(&*disk, 0).await?, &stamp)?;
            disks.close(disk, 1).await.map_err(failed)?;
            same(&look(&disks, D).await?, &vec![1, 0, 0, 0])?;
        }
        // Somebody else came in between.
        let disk = attach(&disks, D, DiskMode::Nonpersistent).await?;
        write(&*disk, 0, 4).await?;
        disks.leave(disk).await.map_err(failed)?;
        let disk = attach(&disks, D, DiskMode::Nonpersistent).await?;
        same(&get(&*disk, 0).await?, &1)?;
        disks.close(disk, 1).await.map_err(failed)?;
        refused(
            disks.open(D, on(DiskMode::Nonpersistent)).await,
            "committed or discarded meanwhile",
        )
    });
}

#[test]
fn an_undoable_disk_is_committed_or_discarded() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        // At power-off, as was decided.
        for (power_off, expected) in [(PowerOff::Commit, 5), (PowerOff::Discard, 5), (PowerOff::Keep, 7)] {
            let options = DiskOptions {
                power_off,
                ..writing(DiskMode::Undoable)
            };
            let disk = Rc::new(disks.open(D, options).await.map_err(failed)?);
            let stamp = if power_off == PowerOff::Discard {
                6
            } else {
                expected
            };
            write(&*disk, 0, stamp).await?;
            disks.close(disk, 1).await.map_err(failed)?;
            same(&look(&disks, D).await?, &vec![expected, 0, 0, 0])?;
        }
        // Nobody has decided: only the same kind of use is possible.
        refused(
            disks.open(D, writing(DiskMode::Persistent)).await,
            "commit them or discard them first",
        )?;
        refused(
            disks.open(D, writing(DiskMode::Nonpersistent)).await,
            "commit them or discard them first",
        )?;
        let disk = attach(&disks, D, DiskMode::Append).await?;
        write(&*disk, 1, 8).await?;
        refused(disks.discard(D, 1).await, "is in use")?;
        disks.close(disk, 1).await.map_err(failed)?;
        same(&look(&disks, D).await?, &vec![7, 8, 0, 0])?;
        disks.discard(D, 1).await.map_err(failed)?;
        same(&look(&disks, D).await?, &vec![5, 0, 0, 0])?;
        refused(disks.discard(D, 1).await, "has no redo layer")?;
        refused(disks.commit(D, 1).await, "has no redo layer")?;
        same(&disks.merge(D, 1).await.map_err(failed)?, &true)?;
        same(&names(&fs).await?.len(), &2)
    });
}

#[test]
fn a_redo_layer_is_committed_while_it_is_written() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Append).await?;
        write(&*disk, 0, 1).await?;
        disks.commit(D, 1).await.map_err(failed)?;
        write(&*disk, 1, 2).await?;
        same(&disks.merge(D, 1).await.map_err(failed)?, &true)?;
        same(&contents(&*disk).await?, &vec![1, 2, 0, 0])?;
        disks.close(disk, 1).await.map_err(failed)?;
        disks.discard(D, 1).await.map_err(failed)?;
        same(&look(&disks, D).await?, &vec![1, 0, 0, 0])?;
        same(&disks.merge(D, 1).await.map_err(failed)?, &true)?;
        same(
            &names(&fs).await?,
            &vec!["root.disk".to_owned(), "root.dsk".to_owned()],
        )
    });
}

#[test]
fn snapshots_are_kept_and_deleted_in_any_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        run(|sim| async move {
            let (fs, disks) = disks(&sim).await?;
            let disk = attach(&disks, D, DiskMode::Persistent).await?;
            let names_of = ["a", "b", "c"];
            let mut expected = Vec::new();
            for (number, name) in (0_u64..).zip(names_of) {
                write(&*disk, number, number + 1).await?;
                write(&*disk, 3, number + 1).await?;
                expected.push(contents(&*disk).await?);
                disks.snapshot(&[D], &named(name)).await.map_err(failed)?;
            }
            write(&*disk, 3, 9).await?;
            let state = disks.status(D).await.map_err(failed)?;
            same(&state.snapshots.len(), &3)?;
            same(&state.snapshots[1].parent, &Some("a".to_owned()))?;
            same(&state.snapshots[1].description, &"the snapshot b".to_owned())?;
            same(
                &(state.based_on, state.depth, state.in_use),
                &(Some("c".to_owned()), 4, true),
            )?;
            refused(
                disks.snapshot(&[D], &named("b")).await,
                "has a snapshot b already",
            )?;
            let reader = disks.open("/root.dsk@b", reading()).await.map_err(failed)?;
            refused(disks.delete_snapshot(D, "b", 1).await, "somebody reads it")?;
            refused(
                disks.open("/root.dsk@b", writing(DiskMode::Persistent)).await,
                "can only be read",
            )?;
            drop(reader);
            let mut left = vec![0, 1, 2];
            for deleted in order {
                disks
                    .delete_snapshot(D, names_of[deleted], 1)
                    .await
                    .map_err(failed)?;
                left.retain(|number| *number != deleted);
                for number in &left {
                    let path = format!("{D}@{}", names_of[*number]);
                    same(&look(&disks, &path).await?, &expected[*number])?;
                }
                fs.settled().await;
                same(&disks.merge(D, 1).await.map_err(failed)?, &true)?;
                same(&contents(&*disk).await?, &vec![1, 2, 3, 9])?;
                let state = disks.status(D).await.map_err(failed)?;
                same(&state.depth, &(left.len() + 1))?;
            }
            refused(disks.delete_snapshot(D, "a", 1).await, "has no snapshot a")?;
            same(
                &names(&fs).await?,
                &vec!["root.disk".to_owned(), "root.dsk".to_owned()],
            )?;
            is_sound(&fs).await
        });
    }
}

/// The file system is still merging what two snapshots have left when the disk is deleted as well.
#[test]
fn a_disk_is_deleted_right_after_its_snapshots() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        create(&disks, "/large.dsk", 4096 * CLUSTER).await?;
        let disk = attach(&disks, "/large.dsk", DiskMode::Persistent).await?;
        for (part, snapshot) in (0..).zip(["a", "b", "c", "d", ""]) {
            for page in 0..16 {
                // Parts of the same clusters, which a merge has to copy.
                let offset = page * 256 * CLUSTER + part * 4096;
                put(&*disk, offset, part + 1, Durability::Volatile).await?;
            }
            if !snapshot.is_empty() {
                disks
                    .snapshot(&["/large.dsk"], &named(snapshot))
                    .await
                    .map_err(failed)?;
            }
        }
        drop(disk);
        for snapshot in ["b", "c", "d"] {
            disks
                .delete_snapshot("/large.dsk", snapshot, 1)
                .await
                .map_err(failed)?;
        }
        disks.delete("/large.dsk", 1).await.map_err(failed)?;
        same(&names(&fs).await?, &vec!["root.dsk".to_owned()])?;
        is_sound(&fs).await
    });
    let mut numbers = Numbers::default();
    numbers.collect();
    assert!(
        numbers
            .missing(&["disk: a deletion waits for a merge"])
            .is_empty()
    );
}

#[test]
fn a_disk_is_reverted_and_keeps_its_other_snapshots() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        for (number, name) in (0_u64..).zip(["a", "b"]) {
            write(&*disk, 0, number + 1).await?;
            disks.snapshot(&[D], &named(name)).await.map_err(failed)?;
        }
        write(&*disk, 0, 9).await?;
        refused(disks.revert(D, "a", 1).await, "is in use")?;
        disks.close(disk, 1).await.map_err(failed)?;
        for (name, stamp) in [("a", 1), ("b", 2), ("a", 1)] {
            disks.revert(D, name, 1).await.map_err(failed)?;
            same(&look(&disks, D).await?, &vec![stamp, 0, 0, 0])?;
            let disk = attach(&disks, D, DiskMode::Persistent).await?;
            write(&*disk, 0, 8).await?;
            disks.close(disk, 1).await.map_err(failed)?;
        }
        same(&look(&disks, "/root.dsk@b").await?, &vec![2, 0, 0, 0])?;
        refused(
            disks.changed(D, "b", None, 0, 10).await,
            "is not built on snapshot b",
        )?;
        let state = disks.status(D).await.map_err(failed)?;
        same(&state.based_on, &Some("a".to_owned()))?;
        // The snapshot that is on a branch of its own.
        disks.delete_snapshot(D, "b", 1).await.map_err(failed)?;
        fs.settled().await;
        disks.delete_snapshot(D, "a", 1).await.map_err(failed)?;
        same(&disks.merge(D, 1).await.map_err(failed)?, &true)?;
        same(&look(&disks, D).await?, &vec![8, 0, 0, 0])?;
        same(
            &names(&fs).await?,
            &vec!["root.disk".to_owned(), "root.dsk".to_owned()],
        )?;
        is_sound(&fs).await
    });
}

#[test]
fn clones_are_disks_of_their_own() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        write(&*disk, 0, 1).await?;
        disks.snapshot(&[D], &named("a")).await.map_err(failed)?;
        write(&*disk, 0, 2).await?;
        disks
            .clone_disk(D, Some("a"), "/old.dsk", 1)
            .await
            .map_err(failed)?;
        // As it is now, while it is written.
        disks.clone_disk(D, None, "/new.dsk", 1).await.map_err(failed)?;
        write(&*disk, 0, 3).await?;
        refused(
            disks.clone_disk(D, None, "/new.dsk", 1).await,
            "/new.dsk exists already",
        )?;
        refused(
            disks.clone_disk(D, Some("x"), "/x.dsk", 1).await,
            "has no snapshot x",
        )?;
        same(&look(&disks, "/old.dsk").await?, &vec![1, 0, 0, 0])?;
        same(&look(&disks, "/new.dsk").await?, &vec![2, 0, 0, 0])?;
        let clone = attach(&disks, "/old.dsk", DiskMode::Persistent).await?;
        write(&*clone, 1, 7).await?;
        disks
            .snapshot(&["/old.dsk", D], &named("both"))
            .await
            .map_err(failed)?;
        write(&*clone, 1, 8).await?;
        disks.close(clone, 1).await.map_err(failed)?;
        disks.close(disk, 1).await.map_err(failed)?;
        same(&look(&disks, "/old.dsk@both").await?, &vec![1, 7, 0, 0])?;
        disks.delete(D, 1).await.map_err(failed)?;
        fs.settled().await;
        same(&look(&disks, "/old.dsk").await?, &vec![1, 8, 0, 0])?;
        same(&look(&disks, "/new.dsk").await?, &vec![2, 0, 0, 0])?;
        refused(disks.open(D, reading()).await, "there is no disk /root.dsk")?;
        create(&disks, D, CLUSTER).await?;
        same(&look(&disks, D).await?, &vec![0])?;
        is_sound(&fs).await
    });
}

#[test]
fn a_disk_grows_while_it_is_used_and_who_wants_to_know_is_told() {
    run(|sim| async move {
        let (_fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        let told = Rc::new(Cell::new(0));
        let tell = Rc::clone(&told);
        disk.on_resize(move |size| tell.set(size));
        disks.snapshot(&[D], &named("small")).await.map_err(failed)?;
        disks.resize(D, 6 * CLUSTER, false, 1).await.map_err(failed)?;
        same(&(told.get(), disk.size()), &(6 * CLUSTER, 6 * CLUSTER))?;
        write(&*disk, 5, 5).await?;
        refused(
            disks.resize(D, CLUSTER, false, 1).await,
            "would lose what lies behind",
        )?;
        disks.resize(D, CLUSTER, true, 1).await.map_err(failed)?;
        same(&(told.get(), disk.size()), &(CLUSTER, CLUSTER))?;
        disks.resize(D, 6 * CLUSTER, false, 1).await.map_err(failed)?;
        same(&get(&*disk, 5 * CLUSTER).await?, &0)?;
        same(&look(&disks, "/root.dsk@small").await?.len(), &4)?;
        disks.close(disk, 1).await.map_err(failed)
    });
}

#[test]
fn what_was_changed_is_known() {
    run(|sim| async move {
        let (_fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        write(&*disk, 0, 1).await?;
        disks.snapshot(&[D], &named("a")).await.map_err(failed)?;
        write(&*disk, 1, 2).await?;
        disks.snapshot(&[D], &named("b")).await.map_err(failed)?;
        write(&*disk, 3, 3).await?;
        disk.discard(0, CLUSTER).await?;
        let starts = |ranges: &[filesys::Range]| {
            ranges
                .iter()
                .map(|range| range.offset / CLUSTER)
                .collect::<Vec<_>>()
        };
        let (ranges, next) = disks.changed(D, "a", None, 0, 100).await.map_err(failed)?;
        same(&(starts(&ranges), next), &(vec![0, 1, 3], None))?;
        let (ranges, _) = disks.changed(D, "a", Some("b"), 0, 100).await.map_err(failed)?;
        same(&starts(&ranges), &vec![1])?;
        refused(disks.changed(D, "b", Some("a"), 0, 100).await, "is not built on")?;
        refused(disks.changed(D, "x", None, 0, 100).await, "has no snapshot x")?;
        disks.close(disk, 1).await.map_err(failed)
    });
}

#[test]
fn a_file_that_is_no_descriptor_is_not_taken_for_one() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let new = filesys::NewFile {
            size: 1 << 20,
            ..Default::default()
        };
        for path in ["/x.disk", "/root.disk"] {
            fs.create(path, &new).await.map_err(failed)?;
            let file = fs.open_file(path, filesys::Access::Write).await.map_err(failed)?;
            write(&file, 0, 1).await?;
            write(&file, 8, 1).await?;
        }
        let new = NewDisk {
            size: CLUSTER,
            ..NewDisk::default()
        };
        refused(disks.create("/x.dsk", &new).await, "/x.disk exists already")?;
        refused(disks.open(D, reading()).await, "it is no descriptor of a disk")?;
        refused(
            disks.snapshot(&[D], &named("a")).await,
            "it is no descriptor of a disk",
        )?;
        same(&names(&fs).await?.len(), &3)
    });
}

#[test]
fn snapshots_get_other_names() {
    run(|sim| async move {
        let (_fs, disks) = disks(&sim).await?;
        for name in ["a", "b"] {
            disks.snapshot(&[D], &named(name)).await.map_err(failed)?;
        }
        refused(
            disks.describe_snapshot(D, "a", &named("b")).await,
            "has a snapshot b already",
        )?;
        disks
            .describe_snapshot(D, "a", &named("c"))
            .await
            .map_err(failed)?;
        let state = disks.status(D).await.map_err(failed)?;
        let found: Vec<_> = state
            .snapshots
            .iter()
            .map(|snapshot| snapshot.name.as_str())
            .collect();
        same(&found, &vec!["c", "b"])?;
        for bad in ["", "a b", "a/b", "a@b", &"x".repeat(64)] {
            refused(disks.snapshot(&[D], &named(bad)).await, "the name of a snapshot")?;
        }
        refused(
            disks.snapshot(&[D, "/none.dsk"], &named("d")).await,
            "there is no disk /none.dsk",
        )?;
        // All or none.
        same(&disks.status(D).await.map_err(failed)?.snapshots.len(), &2)
    });
}

#[test]
fn without_space_nothing_is_half_done() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        write(&*disk, 0, 1).await?;
        // All that is left, but what writes to the disk's own clusters need not.
        create(&disks, "/fill.dsk", 64 << 20).await?;
        let fill = attach(&disks, "/fill.dsk", DiskMode::Persistent).await?;
        let mut filled = 0;
        while write(&*fill, filled, 7).await.is_ok() {
            filled += 1;
        }
        disks.close(fill, 1).await.ok();
        refused(disks.snapshot(&[D], &named("a")).await, "")?;
        same(&disks.status(D).await.map_err(failed)?.snapshots.len(), &0)?;
        write(&*disk, 0, 2).await?;
        same(&contents(&*disk).await?, &vec![2, 0, 0, 0])?;
        disks.delete("/fill.dsk", 1).await.map_err(failed)?;
        fs.settled().await;
        disks.snapshot(&[D], &named("a")).await.map_err(failed)?;
        write(&*disk, 0, 3).await?;
        same(&look(&disks, "/root.dsk@a").await?, &vec![2, 0, 0, 0])?;
        disks.close(disk, 1).await.map_err(failed)?;
        is_sound(&fs).await
    });
}

#[test]
fn a_merge_spares_a_first_layer_that_is_a_snapshot_while_another_one_waits_to_go() {
    run(|sim| async move {
        let (fs, disks) = disks(&sim).await?;
        let disk = attach(&disks, D, DiskMode::Persistent).await?;
        for (stamp, name) in [(1, "monday"), (2, "tuesday"), (3, "friday")] {
            write(&*disk, 0, stamp).await?;
            disks.snapshot(&[D], &named(name)).await.map_err(failed)?;
        }
        write(&*disk, 0, 4).await?;
        // Somebody has the layer of friday open as a file, so it cannot go now.
        let opened = fs.open_file("/root-2.redo", filesys::Access::Read).await;
        let opened = opened.map_err(failed)?;
        disks.delete_snapshot(D, "friday", 7).await.map_err(failed)?;
        same(&disks.merge(D, 7).await.map_err(failed)?, &false)?;
        for (stamp, name) in [(1, "monday"), (2, "tuesday")] {
            same(&look(&disks, &format!("{D}@{name}")).await?[0], &stamp)?;
        }
        drop(opened);
        disks.merge(D, 7).await.map_err(failed)?;
        fs.settled().await;
        same(&look(&disks, &format!("{D}@monday")).await?[0], &1)?;
        disks.close(disk, 7).await.map_err(failed)?;
        same(&look(&disks, D).await?[0], &4)?;
        is_sound(&fs).await
    });
}
