//! Backups of a pool that is written and changed meanwhile, over a real connection, and what comes back from them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api::ProblemKind;
use api::storage::{LayoutKind, Operation, Shape};
use api::virtual_disk::{DiskAnswer, DiskOperation};
use backup::archive::Chain;
use backup::client::{ClientError, Event};
use backup::message::{BackupInfo, Selection};
use backup::plan::{Content, Entry, Kind, Plan};
use backup::restore::{restore_disk, restore_tree};
use common::{Guest, KINDS, SIZE, Setup, disk, entry, operate, plan, scattered};

/// Entries of all kinds, and what files have in them.
fn entries(setup: &Setup) -> (Vec<Entry>, Vec<(String, Vec<u8>)>) {
    let mut entries = vec![entry("", Kind::Directory {}), entry("srv", Kind::Directory {})];
    let mut files = Vec::new();
    for (number, kind) in (0..).zip(KINDS) {
        for seed in 0..3 {
            let (file, content) = scattered(number, seed + 1, &setup.content[kind]);
            let path = format!("srv/{kind}-{seed}");
            entries.push(entry(&path, file));
            files.push((path, content));
        }
    }
    (entries, files)
}

fn make(setup: &Setup, mover: &backup::mover::Mover, plan: &Plan) -> (BackupInfo, Vec<(String, Vec<u8>)>) {
    let (entries, files) = entries(setup);
    let mut client = setup.client(mover);
    let begun = client.begin(plan).unwrap();
    assert_eq!(begun.entries, 0);
    for entry in &entries {
        client.entry(entry).unwrap();
    }
    (client.finish().unwrap(), files)
}

/// All of it comes back, by the archive alone.
fn is_whole(setup: &Setup, name: &str, files: &[(String, Vec<u8>)]) {
    let to = setup.folder.path().join(format!("restored-{name}"));
    let mut chain = Chain::open(setup.archive(name)).unwrap();
    let restored = restore_tree(&mut chain, &[], &to).unwrap();
    assert_eq!(restored.problems, [""; 0]);
    for (path, content) in files {
        assert!(fs::read(to.join(path)).unwrap() == *content, "{name}: {path}");
    }
}

fn move_volume(name: &str, from: &str) -> Operation {
    Operation::MoveVolume {
        name: name.into(),
        from: Some(from.into()),
        to: None,
        throttle: 0,
    }
}

#[test]
fn devices_are_read_directly_while_the_disks_are_written() {
    let setup = Setup::new();
    let disks = KINDS.map(|kind| setup.open(kind));
    let guests: Vec<Guest> = disks.iter().map(|disk| Guest::start(&setup.pool, disk)).collect();
    // The first moment is not the content that is known: it is before the guests.
    drop(guests);
    setup.snapshot("before");
    let guests: Vec<Guest> = disks.iter().map(|disk| Guest::start(&setup.pool, disk)).collect();
    for guest in &guests {
        guest.wait(50);
    }
    let mover = setup.mover(true);
    let mut client = setup.client(&mover);
    let begun = client.begin(&plan("a", "before")).unwrap();
    assert_eq!(
        (begun.reads.as_str(), begun.notes.as_slice()),
        ("devices", [].as_slice())
    );
    for (number, kind) in (0..).zip(KINDS) {
        let whole = Kind::Disk {
            disk: number,
            size: SIZE,
        };
        client.entry(&entry(kind, whole)).unwrap();
    }
    let made = client.finish().unwrap();
    assert!(made.complete && made.progress.entries == 4, "{made:?}");
    assert_eq!((made.progress.from_export, made.progress.from_agent), (0, 0));
    assert!(made.progress.from_devices > 0, "{made:?}");
    drop(guests);
    // What the storage manager itself reads of the snapshot is the same.
    for kind in KINDS {
        let image = setup.folder.path().join(format!("{kind}.raw"));
        let mut chain = Chain::open(setup.archive("a")).unwrap();
        restore_disk(&mut chain, Some(&kind.into()), &image).unwrap();
        let snapshot = setup
            .pool
            .disk(
                &format!("/{kind}/a.dsk@before"),
                storage_manager::DiskOptions {
                    read_only: true,
                    ..storage_manager::DiskOptions::default()
                },
            )
            .unwrap();
        assert!(
            fs::read(&image).unwrap() == common::read_all(&setup.pool, &snapshot),
            "{kind}"
        );
    }
    // The pins are gone: the snapshot may be deleted.
    disk(
        &setup.pool,
        DiskOperation::DeleteSnapshot {
            path: "/raid5/a.dsk@before".into(),
        },
    )
    .unwrap();
}

#[test]
fn files_come_back_from_devices_and_from_the_storage_manager() {
    let setup = Setup::new();
    setup.snapshot("s");
    let (direct, files) = make(&setup, &setup.mover(true), &plan("direct", "s"));
    assert_eq!(direct.progress.from_export, 0, "{direct:?}");
    is_whole(&setup, "direct", &files);
    let (export, files) = make(&setup, &setup.mover(false), &plan("export", "s"));
    assert_eq!(export.progress.from_devices, 0, "{export:?}");
    assert!(export.progress.from_export > 0);
    is_whole(&setup, "export", &files);
}

#[test]
fn what_moves_between_the_questions_is_read_again() {
    let setup = Setup::new();
    setup.snapshot("s");
    let disks = KINDS.map(|kind| setup.open(kind));
    let guests: Vec<Guest> = disks.iter().map(|disk| Guest::start(&setup.pool, disk)).collect();
    let (pool, devices) = (Arc::clone(&setup.pool), setup.devices.clone());
    let places = move |pool: &_| {
        let places = DiskOperation::Places {
            path: "/mirror/a.dsk@s".into(),
            offset: 0,
            length: SIZE,
            unless: None,
        };
        match disk(pool, places).unwrap() {
            DiskAnswer::Places(places) => places.extents,
            other => panic!("{other:?}"),
        }
    };
    // The first four questions are before the batch, the next four after it. With the last one before it, what was told of two disks is
    // wrong already, and others have their places.
    let mover = setup.mover_with(true, move |number| match number {
        3 => {
            let before = places(&pool);
            operate(&pool, move_volume("mirror", &format!("d{}", before[0].device)));
            let after = places(&pool);
            for old in before {
                let is_left = after.iter().all(|new| {
                    let apart = new.start >= old.start + old.length || old.start >= new.start + new.length;
                    new.device != old.device || apart
                });
                assert!(is_left);
                let device = fs::File::options()
                    .write(true)
                    .open(&devices[old.device as usize])
                    .unwrap();
                device
                    .write_all_at(&common::noise(77, old.length as usize), old.start)
                    .unwrap();
            }
            let layout = Operation::SetLayout {
                name: "stripe".into(),
                shape: Shape {
                    layout: LayoutKind::Raid5,
                    columns: 4,
                    copies: 0,
                    stripe_unit: 0,
                    class: String::new(),
                    devices: Vec::new(),
                },
                throttle: 0,
            };
            operate(&pool, layout);
        }
        5 => operate(&pool, move_volume("raid5", "d0")),
        _ => {}
    });
    let (made, files) = make(&setup, &mover, &plan("a", "s"));
    assert!(made.progress.moved > 0, "{made:?}");
    assert_eq!(made.progress.from_export, 0, "{made:?}");
    drop(guests);
    is_whole(&setup, "a", &files);
}

#[test]
fn what_never_stands_still_is_read_by_the_storage_manager() {
    let setup = Setup::new();
    setup.snapshot("s");
    let pool = Arc::clone(&setup.pool);
    let next = Arc::new(AtomicU64::new(0));
    let mover = setup.mover_with(true, move |_| {
        let number = next.fetch_add(1, Ordering::Relaxed);
        // Away from where it is, and back.
        operate(&pool, move_volume("concat", &format!("d{}", number % 4)));
    });
    let mut client = setup.client(&mover);
    client.begin(&plan("a", "s")).unwrap();
    let (file, content) = scattered(3, 1, &setup.content["concat"]);
    client.entry(&entry("f", file)).unwrap();
    let made = client.finish().unwrap();
    assert!(
        made.progress.from_export > 0 || made.progress.moved > 0,
        "{made:?}"
    );
    is_whole(&setup, "a", &[("f".into(), content)]);
}

#[test]
fn an_incremental_backup_keeps_what_has_changed() {
    let setup = Setup::new();
    setup.snapshot("one");
    let mover = setup.mover(true);
    let (full, files) = make(&setup, &mover, &plan("one", "one"));
    assert_eq!(full.progress.in_parent, 0);
    // Twice built on each other: once without a change, once with.
    setup.snapshot("two");
    let two = Plan {
        parent: Some("one".into()),
        ..plan("two", "two")
    };
    let (same, _) = make(&setup, &mover, &two);
    assert_eq!(
        same.progress.from_devices + same.progress.from_export,
        0,
        "{same:?}"
    );
    assert_eq!(same.progress.in_parent, same.progress.bytes);
    assert!(same.archive < full.archive / 10, "{same:?}");
    is_whole(&setup, "two", &files);

    let disks = KINDS.map(|kind| setup.open(kind));
    let change = vec![0xab; 8192];
    common::write(&setup.pool, &disks[1], 512 * 1024, &change);
    setup.snapshot("three");
    let mut mirror = setup.content["mirror"].clone();
    mirror[512 * 1024..512 * 1024 + 8192].copy_from_slice(&change);
    let three = Plan {
        parent: Some("two".into()),
        ..plan("three", "three")
    };
    let mut client = setup.client(&mover);
    client.begin(&three).unwrap();
    let (old, old_content) = scattered(0, 2, &setup.content["stripe"]);
    client.entry(&entry("old", old)).unwrap();
    let whole = Kind::Disk { disk: 1, size: SIZE };
    client.entry(&entry("disk", whole)).unwrap();
    let made = client.finish().unwrap();
    assert!(
        made.progress.in_parent > 0 && made.progress.from_devices > 0,
        "{made:?}"
    );
    is_whole(
        &setup,
        "three",
        &[("old".into(), old_content), ("disk".into(), mirror)],
    );
    assert!(client.verify("three").unwrap().in_parent > 0);

    // With its parent replaced by another backup of the same name it is not readable, and says so.
    fs::rename(setup.archive("one"), setup.folder.path().join("kept")).unwrap();
    let refused = Chain::open(setup.archive("three")).err().unwrap().to_string();
    assert!(refused.contains("built on backup one"), "{refused}");
    let other = Plan {
        description: "another".into(),
        ..plan("one", "one")
    };
    make(&setup, &mover, &other);
    assert!(Chain::open(setup.archive("three")).is_err());
}

#[test]
fn an_agent_sends_what_has_no_place_and_gets_it_back() {
    let setup = Setup::new();
    setup.snapshot("s");
    let mover = setup.mover(true);
    let mut client = setup.client(&mover);
    client.begin(&plan("a", "s")).unwrap();
    let stream = |size| Kind::File {
        size,
        content: Content::Stream {},
    };
    client.entry(&entry("etc", Kind::Directory {})).unwrap();
    client.entry(&entry("etc/inline", stream(11))).unwrap();
    client.content(0, b"hello world").unwrap();
    client.end_content(None).unwrap();
    client.entry(&entry("etc/sparse", stream(5 << 20))).unwrap();
    let long = common::noise(9, 3 << 20);
    client.content(1 << 20, &long).unwrap();
    client.end_content(None).unwrap();
    client.entry(&entry("etc/broken", stream(100))).unwrap();
    client.content(0, b"some").unwrap();
    client.end_content(Some("Input/output error".into())).unwrap();
    let link = |to: &str| Kind::HardLink { to: to.into() };
    client.entry(&entry("etc/hard", link("etc/inline"))).unwrap();
    let soft = Kind::Symlink {
        target: "/etc/passwd".into(),
    };
    client.entry(&entry("etc/soft", soft)).unwrap();
    client.entry(&entry("etc/fifo", Kind::Fifo {})).unwrap();
    let made = client.finish().unwrap();
    assert_eq!((made.progress.problems, made.progress.from_devices), (1, 0));
    assert_eq!(client.list().unwrap(), [made]);

    let to = setup.folder.path().join("out");
    let restored = restore_tree(&mut Chain::open(setup.archive("a")).unwrap(), &[], &to).unwrap();
    assert_eq!(restored.problem_count, 1, "{restored:?}");
    assert!(
        restored.problems[0].contains("etc/broken: was not whole"),
        "{restored:?}"
    );
    assert_eq!(fs::read(to.join("etc/hard")).unwrap(), b"hello world");
    assert_eq!(
        fs::read_link(to.join("etc/soft")).unwrap().to_str(),
        Some("/etc/passwd")
    );
    let sparse = fs::read(to.join("etc/sparse")).unwrap();
    assert!(
        sparse.len() == 5 << 20 && sparse[1 << 20..4 << 20] == long[..] && sparse[..1 << 20] == [0; 1 << 20]
    );
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let inline = fs::metadata(to.join("etc/inline")).unwrap();
    assert_eq!((inline.mode() & 0o7777, inline.nlink()), (0o640, 2));
    assert_eq!(
        (inline.mtime(), inline.mtime_nsec()),
        (1_600_000_000, 123_456_789)
    );
    assert!(
        fs::symlink_metadata(to.join("etc/fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );

    // Over the connection, a part of it.
    let selection = Selection {
        name: "a".into(),
        paths: vec!["etc/sparse".into()],
        only_list: false,
    };
    client.restore(&selection).unwrap();
    let Event::Entry(entry) = client.next_event().unwrap() else {
        panic!()
    };
    assert_eq!(entry.path, "etc/sparse".into());
    let mut got = vec![0; entry.size() as usize];
    loop {
        match client.next_event().unwrap() {
            Event::Content { offset, bytes } => {
                got[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
            }
            Event::EntryEnd { problem } => assert_eq!(problem, None),
            Event::End(progress) => break assert_eq!(progress.entries, 1),
            Event::Entry(other) => panic!("{other:?}"),
        }
    }
    assert!(got == sparse);
}

#[test]
fn a_file_in_many_pieces_comes_in_parts() {
    let setup = Setup::new();
    setup.snapshot("s");
    setup.snapshot("t");
    let disk = &setup.content["raid5"];
    // Every second sector, from the end: no two lie together.
    let pieces = backup::plan::MAX_EXTENTS as u64 / 4 + 700;
    let (mut extents, mut content) = (Vec::new(), Vec::new());
    for number in 0..pieces {
        let start = (pieces - number) * 1024;
        for part in 0..5 {
            // Five in each sector.
            let (start, length) = (start + part * 100, 100);
            content.extend(&disk[start as usize..(start + length) as usize]);
            extents.push(backup::plan::Extent {
                offset: content.len() as u64 - length,
                length,
                at: Some(backup::plan::Place { disk: 2, start }),
            });
        }
    }
    let kind = Kind::File {
        size: content.len() as u64,
        content: Content::Extents { extents, more: false },
    };
    let mover = setup.mover(true);
    for (name, parent) in [("a", None), ("b", Some("a".to_owned()))] {
        let mut client = setup.client(&mover);
        let plan = Plan {
            parent: parent.clone(),
            ..plan(name, if parent.is_some() { "t" } else { "s" })
        };
        client.begin(&plan).unwrap();
        client.entry(&entry("f", kind.clone())).unwrap();
        client.entry(&entry("g", Kind::Directory {})).unwrap();
        let made = client.finish().unwrap().progress;
        assert_eq!(made.in_parent == made.bytes, parent.is_some(), "{made:?}");
        is_whole(&setup, name, &[("f".into(), content.clone())]);
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ProblemKind {
    match result {
        Err(ClientError::Refused(problem)) => problem.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_principal_has_its_own_disks_and_nothing_else() {
    let setup = Setup::new();
    setup.snapshot("s");
    let create = DiskOperation::Create {
        path: "/other.dsk".into(),
        size: SIZE,
        thick: false,
        target: None,
        checksums: None,
    };
    disk(&setup.pool, create).unwrap();
    let snapshot = DiskOperation::Snapshot {
        paths: vec!["/other.dsk".into()],
        name: "s".into(),
        description: String::new(),
    };
    disk(&setup.pool, snapshot).unwrap();
    let mover = setup.mover(true);
    assert_eq!(
        refusal(setup.client_with(&mover, "smsvmm_0")),
        ProblemKind::Forbidden
    );

    let mut client = setup.client(&mover);
    let mut foreign = plan("a", "s");
    foreign.disks[0].disk = "/other.dsk".into();
    assert_eq!(refusal(client.begin(&foreign)), ProblemKind::Forbidden);
    let mut missing = plan("a", "s");
    missing.disks[0].snapshot = "none".into();
    assert_eq!(refusal(client.begin(&missing)), ProblemKind::NotFound);
    let mut twice = plan("a", "s");
    twice.disks[0] = twice.disks[1].clone();
    assert_eq!(refusal(client.begin(&twice)), ProblemKind::Invalid);
    assert_eq!(refusal(client.begin(&plan("../../a", "s"))), ProblemKind::Invalid);
    assert_eq!(refusal(client.verify("../../a")), ProblemKind::NotFound);
    // Nothing was begun by all this, and the connection is as good as before.
    assert_eq!(client.list().unwrap(), []);

    let behind = Kind::File {
        size: 8192,
        content: Content::Extents {
            extents: vec![backup::plan::Extent {
                offset: 0,
                length: 8192,
                at: Some(backup::plan::Place {
                    disk: 0,
                    start: SIZE - 4096,
                }),
            }],
            more: false,
        },
    };
    client.begin(&plan("a", "s")).unwrap();
    client.entry(&entry("x", behind)).unwrap();
    assert_eq!(refusal(client.flush()), ProblemKind::Invalid);
    drop(client);
    let mut client = setup.client(&mover);
    client.begin(&plan("b", "s")).unwrap();
    client.entry(&entry("../x", Kind::Directory {})).unwrap();
    assert_eq!(refusal(client.flush()), ProblemKind::Invalid);
    assert!(
        setup
            .client(&mover)
            .list()
            .unwrap()
            .iter()
            .all(|info| !info.complete)
    );
}

#[test]
fn a_backup_that_broke_off_is_none_and_can_be_gone_on_with() {
    let setup = Setup::new();
    setup.snapshot("s");
    let (entries, files) = entries(&setup);
    let mover = setup.mover(true);
    let mut client = setup.client(&mover);
    client.begin(&plan("a", "s")).unwrap();
    for entry in &entries[..5] {
        client.entry(entry).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    drop(mover);
    assert!(!setup.archive("a").exists());

    let mover = setup.mover(true);
    let mut client = setup.client(&mover);
    let listed = client.list().unwrap();
    assert!(listed.len() == 1 && !listed[0].complete, "{listed:?}");
    assert_eq!(refusal(client.begin(&plan("a", "s"))), ProblemKind::Conflict);
    let resume = Plan {
        resume: true,
        ..plan("a", "s")
    };
    let other = Plan {
        description: "another".into(),
        ..resume.clone()
    };
    assert_eq!(refusal(client.begin(&other)), ProblemKind::Conflict);
    let begun = client.begin(&resume).unwrap();
    assert_eq!((begun.entries, begun.last), (5, Some(entries[4].path.clone())));
    for entry in &entries[5..] {
        client.entry(entry).unwrap();
    }
    let made = client.finish().unwrap();
    assert_eq!(made.progress.entries, entries.len() as u64);
    is_whole(&setup, "a", &files);
    assert_eq!(refusal(client.begin(&resume)), ProblemKind::Conflict);

    client.begin(&plan("b", "s")).unwrap();
    client.entry(&entries[0]).unwrap();
    client.abandon().unwrap();
    assert_eq!(client.list().unwrap().len(), 1);
}

/// Where frames of an archive begin, and its end.
fn frames(bytes: &[u8]) -> Vec<usize> {
    let mut starts = vec![0];
    while let Some(head) = bytes
        .get(*starts.last().unwrap()..)
        .filter(|rest| !rest.is_empty())
    {
        let length = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
        starts.push(starts.last().unwrap() + backup::frame::HEAD + length);
    }
    starts
}

#[test]
fn after_an_end_in_the_middle_of_an_entry_only_the_rest_of_it_is_read() {
    let setup = Setup::new();
    setup.snapshot("s");
    let whole = |disk| Kind::Disk { disk, size: SIZE };
    let (scattered, content) = scattered(0, 2, &setup.content["stripe"]);
    let entries = [entry("d", whole(1)), entry("f", scattered), entry("g", whole(2))];
    let mover = setup.mover(true);
    let make = |plan: &Plan, entries: &[Entry]| {
        let mut client = setup.client(&mover);
        let begun = client.begin(plan).unwrap();
        for entry in &entries[begun.entries as usize..] {
            client.entry(entry).unwrap();
        }
        client.finish().unwrap()
    };
    let full = make(&plan("a", "s"), &entries);
    let bytes = fs::read(setup.archive("a")).unwrap();
    let partial = setup.archive("a").with_extension("smsbackup.partial");
    let resume = Plan {
        resume: true,
        ..plan("a", "s")
    };
    let starts = frames(&bytes);
    let mut read_less = 0;
    for (number, length) in starts
        .iter()
        .flat_map(|start| [*start, start + 5])
        .enumerate()
        .skip(2)
        .step_by(3)
    {
        let _ = fs::remove_file(setup.archive("a"));
        fs::write(&partial, &bytes[..length.min(bytes.len())]).unwrap();
        let made = make(&resume, &entries);
        assert_eq!(made.progress.bytes, full.progress.bytes, "{number}");
        read_less += u32::from(made.progress.from_devices < full.progress.from_devices);
        assert!(fs::read(setup.archive("a")).unwrap()[..starts[1]] == bytes[..starts[1]]);
        let disk = setup.content["mirror"].clone();
        let other = setup.content["raid5"].clone();
        let _ = fs::remove_dir_all(setup.folder.path().join("restored-a"));
        is_whole(
            &setup,
            "a",
            &[
                ("d".into(), disk),
                ("f".into(), content.clone()),
                ("g".into(), other),
            ],
        );
    }
    assert!(read_less > 3, "{read_less}");

    // The agent has found something else than before at that place: what there is of the entry goes.
    let _ = fs::remove_file(setup.archive("a"));
    fs::write(&partial, &bytes[..starts[4]]).unwrap();
    let other = [entry("e", whole(2)), entry("d", whole(1))];
    let made = make(&resume, &other);
    assert_eq!(
        (made.progress.entries, made.progress.from_devices),
        (2, made.progress.bytes)
    );
    let _ = fs::remove_dir_all(setup.folder.path().join("restored-a"));
    let disks = [("e", "raid5"), ("d", "mirror")];
    let files = disks.map(|(name, kind)| (name.to_owned(), setup.content[kind].clone()));
    is_whole(&setup, "a", &files);
    assert!(!setup.folder.path().join("restored-a/f").exists());
}

#[test]
fn what_a_lost_device_had_is_computed_by_the_storage_manager() {
    let mut setup = Setup::new();
    setup.snapshot("s");
    setup.pool.close().unwrap();
    fs::remove_file(&setup.devices[0]).unwrap();
    setup.pool = Arc::new(common::hosted(&setup.devices));
    let mover = setup.mover(true);
    let mut client = setup.client(&mover);
    let mut image = plan("a", "s");
    image
        .disks
        .retain(|disk| disk.disk.contains("raid5") || disk.disk.contains("mirror"));
    client.begin(&image).unwrap();
    for (number, name) in [(0, "mirror"), (1, "raid5")] {
        let whole = Kind::Disk {
            disk: number,
            size: SIZE,
        };
        client.entry(&entry(name, whole)).unwrap();
    }
    let made = client.finish().unwrap().progress;
    assert!(made.from_devices > 0 && made.from_export > 0, "{made:?}");
    let files = ["mirror", "raid5"].map(|kind| (kind.to_owned(), setup.content[kind].clone()));
    is_whole(&setup, "a", &files);
}
