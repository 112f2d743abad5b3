//! The check: a sound file system has no findings whatever is in it, and every kind of damage is found, named and mended.

use block_io::BlockDevice;
use block_io::sim::{Failure, Sim, World};
use filesys::{
    Access, Attributes, CheckOptions, FileId, Finding, Harm, NewFile, Report, Snapshot, VolumeIndex,
};

use crate::harness::*;

pub(crate) async fn check(fs: &SimFs) -> Result<Report, Failure> {
    fs.check(CheckOptions::default()).await.map_err(failed)
}

pub(crate) async fn repair(fs: &SimFs) -> Result<Report, Failure> {
    let options = CheckOptions {
        repair: true,
        ..CheckOptions::default()
    };
    fs.check(options).await.map_err(failed)
}

pub(crate) fn clean(report: &Report) -> Result<(), Failure> {
    if report.is_clean() {
        return Ok(());
    }
    Err(format!("{:#?}", report.findings).as_str().into())
}

/// Files with everything in them: directories, layers, clones, thick files, discards, checksums, orphans.
pub(crate) async fn everything(sim: &Sim) -> Result<SimFs, Failure> {
    let fs = format(sim, 2).await.map_err(failed)?;
    fs.make_directory("/vm", None, 1).await.map_err(failed)?;
    fs.make_directory("/vm/old", None, 1).await.map_err(failed)?;
    fs.create("/vm/a", &thin(40 << 20)).await.map_err(failed)?;
    let file = fs.open_file("/vm/a", Access::Write).await.map_err(failed)?;
    for part in 0..20_u64 {
        write(&file, part * 97 * 4096, &pattern(part, 12 << 10, 3))
            .await
            .map_err(failed)?;
    }
    write(&file, 1 << 20, &pattern(1 << 20, 1 << 20, 3))
        .await
        .map_err(failed)?;
    file.discard(1 << 20, 512 << 10).await.map_err(failed)?;
    for layer in ["/vm/a1", "/vm/a2", "/vm/a3"] {
        let below = match layer {
            "/vm/a1" => "/vm/a",
            "/vm/a2" => "/vm/a1",
            _ => "/vm/a2",
        };
        let snapshot = Snapshot {
            path: below,
            layer,
            handle: Some(&file),
        };
        fs.snapshot(&[snapshot], 1).await.map_err(failed)?;
        write(&file, 65536, &pattern(65536, 8192, 9))
            .await
            .map_err(failed)?;
    }
    drop(file);
    for clone in ["/vm/c1", "/vm/c2", "/vm/c3"] {
        fs.clone_file("/vm/a1", clone, 1).await.map_err(failed)?;
    }
    fs.absorb("/vm/a3", false).await.map_err(failed)?;
    let new = |attributes| NewFile {
        size: 1 << 20,
        attributes: Some(attributes),
        now: 1,
    };
    let thick = Attributes {
        thick: true,
        ..Attributes::default()
    };
    fs.create("/thick", &new(thick)).await.map_err(failed)?;
    let sums = Attributes {
        checksums: true,
        ..Attributes::default()
    };
    fs.create("/sums", &new(sums)).await.map_err(failed)?;
    let file = fs.open_file("/sums", Access::Write).await.map_err(failed)?;
    write(&file, 4096, &pattern(0, 40 << 10, 1))
        .await
        .map_err(failed)?;
    drop(file);
    for number in 0..40 {
        let name = format!("/vm/old/file-with-a-long-name-{number}");
        fs.create(&name, &thin(1 << 20)).await.map_err(failed)?;
    }
    for number in 0..20 {
        fs.delete(&format!("/vm/old/file-with-a-long-name-{}", number * 2))
            .await
            .map_err(failed)?;
    }
    Ok(fs)
}

pub(crate) fn big() -> World {
    world(2, 32 << 20)
}

#[test]
fn a_sound_file_system_has_no_findings_open_or_opened_again() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        clean(&check(&fs).await?)?;
        fs.checkpoint().await.map_err(failed)?;
        let report = check(&fs).await?;
        clean(&report)?;
        assert!(report.totals.pages > 10 && report.totals.files > 20 && report.totals.clusters > 10);
        clean(&repair(&fs).await?)?;
        // Something deleted that waits for its children, and something that is being made.
        fs.delete("/vm/a1").await.map_err(failed)?;
        clean(&check(&fs).await?)?;
        fs.close().await.map_err(failed)?;
        let fs = open(&sim).await.map_err(failed)?;
        clean(&check(&fs).await?)?;
        fs.close().await.map_err(failed)
    });
}

/// Damages a file system, and wants a finding about it. Gives what a repair leaves.
async fn found(sim: &Sim, fs: SimFs, harms: &[Harm], words: &[&str]) -> Result<Report, Failure> {
    for harm in harms {
        fs.harm(harm).await.map_err(failed)?;
    }
    fs.checkpoint().await.map_err(failed)?;
    let report = check(&fs).await?;
    let says = |finding: &Finding| {
        let text = finding.to_string();
        words.iter().all(|word| text.contains(word))
    };
    if !report.findings.iter().any(says) {
        return Err(format!("no finding says {words:?}: {:#?}", report.findings)
            .as_str()
            .into());
    }
    let repaired = repair(&fs).await?;
    fs.close().await.map_err(failed)?;
    drop(fs);
    // What was mended stays so.
    let fs = open(sim).await.map_err(failed)?;
    let again = check(&fs).await?;
    let same = again.findings == repaired.left;
    if !same {
        return Err(
            format!("left {:#?}, and then {:#?}", repaired.left, again.findings)
                .as_str()
                .into(),
        );
    }
    fs.close().await.map_err(failed)?;
    Ok(repaired)
}

fn mended(harms: impl Fn(&Ids) -> Vec<Harm>, words: &[&str]) {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        let ids = Ids::of(&fs).await?;
        let report = found(&sim, fs, &harms(&ids), words).await?;
        if !report.left.is_empty() {
            return Err(format!("left: {:#?}", report.left).as_str().into());
        }
        Ok(())
    });
}

fn reported(harms: impl Fn(&Ids) -> Vec<Harm>, words: &[&str]) {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        let ids = Ids::of(&fs).await?;
        let report = found(&sim, fs, &harms(&ids), words).await?;
        if report.left.is_empty() {
            return Err("it was mended by guessing".into());
        }
        Ok(())
    });
}

pub(crate) struct Ids {
    pub(crate) a: FileId,
    pub(crate) a1: FileId,
    pub(crate) c1: FileId,
    pub(crate) c2: FileId,
    pub(crate) thick: FileId,
    pub(crate) vm: FileId,
    pub(crate) old: FileId,
    pub(crate) sums: FileId,
}

pub(crate) const ROOT: FileId = FileId(16);

impl Ids {
    pub(crate) async fn of(fs: &SimFs) -> Result<Self, Failure> {
        // Nothing is to be done in the background after this.
        fs.settle().await.map_err(failed)?;
        let id = async |path: &str| fs.stat(path).await.map(|stat| stat.id).map_err(failed);
        Ok(Self {
            a: id("/vm/a").await?,
            a1: id("/vm/a1").await?,
            c1: id("/vm/c1").await?,
            c2: id("/vm/c2").await?,
            thick: id("/thick").await?,
            vm: id("/vm").await?,
            old: id("/vm/old").await?,
            sums: id("/sums").await?,
        })
    }
}

#[test]
fn a_wrong_number_of_clusters_is_counted_anew() {
    mended(
        |ids| vec![Harm::Allocated(ids.a, 7)],
        &["file", "counts 7 clusters"],
    );
}

#[test]
fn a_wrong_number_of_names_is_counted_anew() {
    mended(
        |ids| vec![Harm::Size(ids.old, 7)],
        &["directory", "counts 7 names"],
    );
}

#[test]
fn clusters_that_nobody_has_are_free_again() {
    mended(
        |_| {
            vec![
                Harm::Bit(VolumeIndex(1), 200, true),
                Harm::Bit(VolumeIndex(1), 201, true),
            ]
        },
        &["volume v2", "clusters 200 to 201", "no file has them"],
    );
}

#[test]
fn a_cluster_of_a_file_that_is_not_marked_is_marked() {
    // Thick files begin in a group of their own.
    mended(
        |_| vec![Harm::Bit(VolumeIndex(0), 0, false)],
        &["volume v1", "cluster 0 is not marked"],
    );
}

#[test]
fn a_count_of_clear_bits_that_is_wrong_is_counted_anew() {
    // The objects of the first volume have the first two numbers.
    mended(
        |_| vec![Harm::Count(17, 99)],
        &["bitmap of volume v1", "is 99, and should be"],
    );
}

#[test]
fn two_owners_of_a_cluster_are_both_named_and_nothing_is_guessed() {
    reported(
        |ids| vec![Harm::Entry(ids.sums, 5, VolumeIndex(0), 0)],
        &[
            "volume v1",
            "cluster 0 belongs to file",
            "and to file",
            "at offset 327680",
        ],
    );
}

#[test]
fn a_cluster_behind_the_end_of_a_file_is_reported() {
    reported(
        |ids| {
            vec![
                Harm::Entry(ids.thick, 99, VolumeIndex(1), 201),
                Harm::Bit(VolumeIndex(1), 201, true),
            ]
        },
        &["has 1 clusters behind its end, from cluster 99 on"],
    );
}

#[test]
fn a_cluster_outside_of_its_volume_is_reported() {
    reported(
        |ids| vec![Harm::Entry(ids.thick, 3, VolumeIndex(1), 1 << 30)],
        &["file", "clusters 1073741824 to 1073741824 of volume v2"],
    );
    reported(
        |ids| vec![Harm::Entry(ids.thick, 3, VolumeIndex(77), 1)],
        &["file", "volume 77, which does not exist"],
    );
}

#[test]
fn metadata_blocks_that_no_tree_has_are_free_again() {
    mended(
        |_| vec![Harm::Leak(400), Harm::Leak(401)],
        &["bitmap of the metadata volume", "2 blocks are from 400 on marked"],
    );
}

#[test]
fn a_page_that_is_not_marked_is_marked() {
    mended(
        |ids| vec![Harm::Unmark(ids.a.0)],
        &["the map of file", "not marked in the metadata bitmap"],
    );
}

#[test]
fn a_page_with_two_owners_is_reported() {
    reported(
        |ids| vec![Harm::SameMap(ids.a, ids.c1)],
        &["the map of file", "used twice"],
    );
}

#[test]
fn an_orphan_without_its_entry_gets_it() {
    mended(
        |ids| {
            vec![
                Harm::Name(ids.vm, "a1".into(), ids.a1, false, false),
                Harm::Unlinked(ids.a1, true),
            ]
        },
        &[
            "file",
            "is waiting for its children, and is not in the table of orphans",
        ],
    );
}

#[test]
fn an_entry_of_an_orphan_that_is_none_goes() {
    mended(
        |ids| vec![Harm::Orphan(ids.thick, true)],
        &["file", "table of orphans, and is a file with a name"],
    );
    mended(
        |_| vec![Harm::Orphan(FileId(9999), true)],
        &["table of orphans", "file 9999"],
    );
}

#[test]
fn a_file_without_a_name_is_found_in_lost_and_found() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        let ids = Ids::of(&fs).await?;
        let harm = Harm::Name(ROOT, "thick".into(), ids.thick, false, false);
        let report = found(&sim, fs, &[harm], &["file", "has no name"]).await?;
        assert!(report.left.is_empty(), "{:#?}", report.left);
        let fs = open(&sim).await.map_err(failed)?;
        let stat = fs
            .stat(&format!("/lost+found/{}", ids.thick.0))
            .await
            .map_err(failed)?;
        assert_eq!((stat.id, stat.allocated), (ids.thick, 1 << 20));
        fs.close().await.map_err(failed)
    });
}

#[test]
fn names_of_nothing_second_names_and_names_that_are_not_found_go() {
    mended(
        |ids| vec![Harm::Name(ids.vm, "ghost".into(), FileId(9999), false, true)],
        &["\"ghost\"", "no such inode"],
    );
    mended(
        |ids| vec![Harm::Name(ids.old, "again".into(), ids.thick, false, true)],
        &["\"again\"", "another one"],
    );
    mended(
        |ids| vec![Harm::Misplaced(ids.vm, "nowhere".into(), ids.thick)],
        &["\"nowhere\"", "not found"],
    );
    mended(
        |ids| vec![Harm::Name(ids.vm, "a/b".into(), ids.thick, false, true)],
        &["\"a/b\"", "cannot be one"],
    );
}

#[test]
fn a_name_of_the_wrong_kind_is_set_right() {
    mended(
        |ids| {
            vec![
                Harm::Name(ROOT, "thick".into(), ids.thick, false, false),
                Harm::Name(ROOT, "thick".into(), ids.thick, true, true),
            ]
        },
        &["\"thick\" as something else than a file"],
    );
}

#[test]
fn an_inode_that_says_another_place_follows_its_name() {
    mended(
        |ids| vec![Harm::Place(ids.thick, ids.vm, "x".into())],
        &["file", "says that it is elsewhere"],
    );
}

#[test]
fn directories_within_themselves_are_cut_out() {
    mended(
        |ids| {
            vec![
                Harm::Name(ROOT, "vm".into(), ids.vm, true, false),
                Harm::Size(ROOT, 2),
                Harm::Name(ids.old, "vm".into(), ids.vm, true, true),
                Harm::Place(ids.vm, ids.old, "vm".into()),
                Harm::Size(ids.old, 21),
            ]
        },
        &["directory", "within itself"],
    );
}

#[test]
fn lists_of_children_are_made_anew() {
    let words = &["file", "child"];
    mended(|ids| vec![Harm::Children(ids.a1, None, 4)], words);
    mended(|ids| vec![Harm::Children(ids.a1, Some(ids.c1), 9)], words);
    mended(|ids| vec![Harm::Children(ids.a1, Some(ids.thick), 4)], words);
    // A circle of siblings.
    mended(
        |ids| vec![Harm::Links(ids.c1, Some(ids.a1), Some(ids.c2), Some(ids.c2))],
        words,
    );
    mended(
        |ids| vec![Harm::Links(ids.thick, None, Some(ids.c2), None)],
        &["siblings and no parent"],
    );
}

#[test]
fn a_parent_that_is_not_frozen_is_frozen() {
    mended(|ids| vec![Harm::Frozen(ids.a1, false)], &["file", "not frozen"]);
}

#[test]
fn a_file_among_its_own_parents_is_reported() {
    reported(
        |ids| vec![Harm::Links(ids.a, Some(ids.c1), None, None)],
        &["file", "itself among its parents"],
    );
}

#[test]
fn a_parent_that_is_missing_or_a_directory_is_reported() {
    reported(
        |ids| vec![Harm::Links(ids.c1, Some(FileId(9999)), None, None)],
        &["file 9999 as parent"],
    );
    reported(
        |ids| vec![Harm::Links(ids.c1, Some(ids.vm), None, None)],
        &["as parent, which is a directory"],
    );
}

#[test]
fn states_that_files_cannot_be_in_are_ended() {
    mended(|ids| vec![Harm::Dying(ids.vm, true)], &["directory in a state"]);
    mended(
        |ids| vec![Harm::Absorbed(ids.thick, true), Harm::Orphan(ids.thick, true)],
        &["being absorbed, and has 0"],
    );
}

#[test]
fn objects_of_nobody_go_and_missing_ones_are_reported() {
    mended(
        |_| vec![Harm::Object(9000)],
        &["object 9000", "belongs to no file"],
    );
    reported(
        |ids| vec![Harm::NoObject(ids.c1.0)],
        &["file", "not in the table of objects"],
    );
}

#[test]
fn pins_of_nothing_go_and_those_of_files_that_change_are_reported() {
    mended(
        |_| vec![Harm::Pin(5000, FileId(9999))],
        &["pin 5000", "does not exist"],
    );
    reported(
        |ids| vec![Harm::Pin(5000, ids.thick)],
        &["pin 5000", "not a frozen file"],
    );
}

#[test]
fn numbers_above_the_next_one_are_noted() {
    mended(|_| vec![Harm::NextId(30)], &["file", "is not below 30"]);
}

#[test]
fn an_inode_that_is_gone_leaves_names_and_objects_that_go() {
    mended(
        |ids| vec![Harm::NoInode(ids.sums)],
        &["\"sums\"", "no such inode"],
    );
}

#[test]
fn a_rotten_page_is_found_whatever_is_in_memory() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        fs.checkpoint().await.map_err(failed)?;
        let id = fs.stat("/vm/a").await.map_err(failed)?.id;
        let block = fs.block_of(id.0).ok_or("it has no page")?;
        sim.with_medium(0, |medium| medium.rot(block * 4096 + 99, 3));
        let report = check(&fs).await?;
        let says = |finding: &Finding| {
            finding.object.contains(&id.to_string())
                && finding.problem.contains("checksum")
                && !finding.repairable
        };
        assert!(report.findings.iter().any(says), "{:#?}", report.findings);
        // What only could not be looked at is not taken for free.
        assert!(report.findings.iter().all(|finding| !finding.repairable));
        fs.close().await.map_err(failed)
    });
}

#[test]
fn a_copy_of_the_superblock_that_differs_is_written_again() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        fs.checkpoint().await.map_err(failed)?;
        sim.with_medium(0, |medium| medium.rot(16 * 4096 + 99, 3));
        let report = repair(&fs).await?;
        assert!(
            report.findings[0].to_string().contains("copy 1 of 4"),
            "{:#?}",
            report.findings
        );
        assert!(report.left.is_empty(), "{:#?}", report.left);
        fs.close().await.map_err(failed)
    });
}

#[test]
fn nothing_is_left_of_a_volume_that_leaves() {
    run(big(), async |sim| {
        let fs = format(&sim, 2).await.map_err(failed)?;
        let new = NewFile {
            size: 16 << 20,
            attributes: Some(Attributes {
                checksums: true,
                ..Attributes::default()
            }),
            now: 1,
        };
        fs.create("/sums", &new).await.map_err(failed)?;
        let file = fs.open_file("/sums", Access::Write).await.map_err(failed)?;
        for part in 0..8_u64 {
            write(&file, part << 21, &pattern(0, 40 << 10, 1))
                .await
                .map_err(failed)?;
        }
        drop(file);
        fs.checkpoint().await.map_err(failed)?;
        fs.delete("/sums").await.map_err(failed)?;
        fs.settle().await.map_err(failed)?;
        fs.sync().await.map_err(failed)?;
        fs.remove_volume([1; 16]).await.map_err(failed)?;
        fs.checkpoint().await.map_err(failed)?;
        clean(&check(&fs).await?)?;
        fs.close().await.map_err(failed)
    });
}

#[test]
fn a_thick_file_that_shrinks_has_nothing_behind_its_end() {
    run(big(), async |sim| {
        let fs = everything(&sim).await?;
        fs.resize("/thick", 96 << 10).await.map_err(failed)?;
        clean(&check(&fs).await?)?;
        let stat = fs.stat("/thick").await.map_err(failed)?;
        assert_eq!((stat.size, stat.allocated), (96 << 10, 128 << 10));
        fs.resize("/thick", 1 << 20).await.map_err(failed)?;
        clean(&check(&fs).await?)?;
        assert_eq!(fs.stat("/thick").await.map_err(failed)?.allocated, 1 << 20);
        fs.close().await.map_err(failed)
    });
}
