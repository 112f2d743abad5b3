//! Archives that were cut, changed, forged; and what restoration makes of them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs;
use std::path::{Path, PathBuf};

use backup::archive::{
    ArchiveError, ArchiveReader, ArchiveWriter, Chain, From, Header, ImageIdentity, Record, Sink, VERSION,
};
use backup::frame::{FrameReader, HEAD};
use backup::plan::{Content, Entry, Extent, ImageDisk, Kind, Place, Plan, Time, Xattr};
use backup::restore::{TreeWriter, restore_disk, restore_tree};
use backup::store::{Store, StoreError};

fn header(name: &str) -> Header {
    Header {
        version: VERSION,
        incompatible: 0,
        compatible: 0,
        writer: "test".into(),
        principal: "vm".into(),
        plan: Plan {
            name: name.into(),
            parent: None,
            host: "guest".into(),
            description: String::new(),
            frozen: Time::default(),
            disks: vec![ImageDisk {
                disk: "/a.dsk".into(),
                snapshot: "s".into(),
                configuration: String::new(),
            }],
            sources: Vec::new(),
            resume: false,
        },
        image: vec![ImageIdentity {
            identity: "1".into(),
            size: 1 << 20,
        }],
        parent: None,
    }
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o755,
        uid: 0,
        gid: 0,
        modified: Time::default(),
        accessed: None,
        xattrs: Vec::new(),
        kind,
    }
}

fn file(path: &str, size: u64) -> Entry {
    let extents = vec![Extent {
        offset: 0,
        length: size,
        at: Some(Place { disk: 0, start: 4096 }),
    }];
    let content = Content::Extents { extents, more: false };
    entry(path, Kind::File { size, content })
}

/// An archive of a folder, a file of data and zeroes, a disk; and where its frames begin.
fn small() -> (Vec<u8>, Vec<usize>) {
    let mut writer = ArchiveWriter::begin(Vec::new(), 77, &header("a")).unwrap();
    writer.entry(&entry("d", Kind::Directory {})).unwrap();
    writer.end_entry(None).unwrap();
    writer.entry(&file("d/f", 10_000)).unwrap();
    writer.data(0, &[1; 4096], From::Devices).unwrap();
    writer.zeroes(4096, 4096).unwrap();
    writer.data(8192, &[3; 1808], From::Export).unwrap();
    writer.end_entry(None).unwrap();
    let disk = Kind::Disk {
        disk: 0,
        size: 1 << 20,
    };
    writer.entry(&entry("disk", disk)).unwrap();
    writer.data(65_536, &[9; 512], From::Devices).unwrap();
    writer.end_entry(None).unwrap();
    let (bytes, commit) = writer.commit().unwrap();
    assert_eq!(commit.entries, 3);
    let mut starts = Vec::new();
    let mut at = 0;
    let mut frames = FrameReader::new(&bytes[..], None, Some(0));
    while let Some(head) = frames.read().unwrap() {
        starts.push(at);
        at += HEAD + head.length;
    }
    assert_eq!(at, bytes.len());
    (bytes, starts)
}

/// How many entries are whole, and whether all of it is.
fn read(bytes: &[u8]) -> (u64, Result<(), ArchiveError>) {
    let mut reader = ArchiveReader::new(bytes);
    let mut whole = 0;
    loop {
        match reader.read() {
            Ok(Some(Record::EntryEnd(_))) => whole += 1,
            Ok(Some(_)) => {}
            Ok(None) => return (whole, Ok(())),
            Err(error) => return (whole, Err(error)),
        }
    }
}

#[test]
fn an_archive_that_ends_anywhere_but_at_its_end_is_none() {
    let (bytes, starts) = small();
    assert!(matches!(read(&bytes), (3, Ok(()))));
    for length in starts.iter().copied().chain((0..bytes.len()).step_by(97)) {
        let (whole, result) = read(&bytes[..length]);
        let error = result.unwrap_err();
        assert!(whole <= 3 && error.is_unfinished(), "{length}: {error}");
    }
    let longer = [bytes.as_slice(), &bytes[..starts[1]]].concat();
    assert!(read(&longer).1.is_err());
}

#[test]
fn no_flipped_bit_goes_unnoticed() {
    let (bytes, _) = small();
    for bit in (0..bytes.len() * 8).step_by(13) {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes).1.is_err(), "bit {bit}");
    }
}

/// Where a frame lies.
fn frame<'a>(bytes: &'a [u8], starts: &[usize], number: usize) -> &'a [u8] {
    &bytes[starts[number]..starts.get(number + 1).copied().unwrap_or(bytes.len())]
}

#[test]
fn frames_that_are_lost_doubled_or_swapped_are_noticed() {
    let (bytes, starts) = small();
    let order: Vec<usize> = (0..starts.len()).collect();
    let built = |order: &[usize]| -> Vec<u8> {
        order
            .iter()
            .flat_map(|number| frame(&bytes, &starts, *number).to_vec())
            .collect()
    };
    assert!(read(&built(&order)).1.is_ok());
    for number in 0..order.len() {
        let mut lost = order.clone();
        lost.remove(number);
        assert!(read(&built(&lost)).1.is_err(), "lost {number}");
        let mut doubled = order.clone();
        doubled.insert(number, number);
        assert!(read(&built(&doubled)).1.is_err(), "doubled {number}");
        if number > 0 {
            let mut swapped = order.clone();
            swapped.swap(number - 1, number);
            assert!(read(&built(&swapped)).1.is_err(), "swapped {number}");
        }
    }
}

#[test]
fn what_a_forged_archive_says_is_not_believed() {
    let zeroes = |offset: u64, length: u64| {
        let mut writer = ArchiveWriter::begin(Vec::new(), 1, &header("a")).unwrap();
        writer.entry(&file("f", 8192)).unwrap();
        writer.zeroes(offset, length).unwrap();
        writer.into_bytes()
    };
    assert!(!matches!(
        read(&zeroes(0, 8192)).1,
        Err(ArchiveError::Nonsense { .. })
    ));
    for (offset, length) in [(0, 8193), (8192, 1), (u64::MAX, 2), (4096, u64::MAX), (0, 0)] {
        let bytes = zeroes(offset, length);
        assert!(
            matches!(read(&bytes).1, Err(ArchiveError::Nonsense { .. })),
            "{offset} {length}"
        );
    }
    let mut writer = ArchiveWriter::begin(Vec::new(), 1, &header("a")).unwrap();
    writer.entry(&file("f", 8192)).unwrap();
    writer.zeroes(4096, 4096).unwrap();
    writer.zeroes(0, 4096).unwrap();
    assert!(matches!(
        read(&writer.into_bytes()).1,
        Err(ArchiveError::Nonsense { .. })
    ));
    // There is no parent that could have it.
    let mut writer = ArchiveWriter::begin(Vec::new(), 1, &header("a")).unwrap();
    writer.entry(&file("f", 8192)).unwrap();
    writer.in_parent(0, 4096, 0, 0).unwrap();
    assert!(matches!(
        read(&writer.into_bytes()).1,
        Err(ArchiveError::Nonsense { .. })
    ));
    for path in ["../x", "/etc/passwd", "a//b", "a/./b", ""] {
        let mut writer = ArchiveWriter::begin(Vec::new(), 1, &header("a")).unwrap();
        writer.entry(&file(path, 1)).unwrap();
        assert!(
            matches!(read(&writer.into_bytes()).1, Err(ArchiveError::Nonsense { .. })),
            "{path}"
        );
    }
    for strange in [
        Header {
            version: 2,
            ..header("a")
        },
        Header {
            incompatible: 1,
            ..header("a")
        },
    ] {
        let writer = ArchiveWriter::begin(Vec::new(), 1, &strange).unwrap();
        assert!(matches!(
            read(&writer.into_bytes()).1,
            Err(ArchiveError::Version { .. })
        ));
    }
    let known = Header {
        compatible: 1,
        ..header("a")
    };
    let writer = ArchiveWriter::begin(Vec::new(), 1, &known).unwrap();
    assert!(matches!(
        read(&writer.into_bytes()).1,
        Err(ArchiveError::Incomplete { .. })
    ));
}

#[test]
fn after_every_end_in_the_middle_one_goes_on_and_has_the_same_archive() {
    let (bytes, starts) = small();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().join("vm"));
    fs::create_dir(folder.path().join("vm")).unwrap();
    let partial = folder.path().join("vm/a.smsbackup.partial");
    for length in starts.iter().copied().chain((0..bytes.len()).step_by(501)) {
        let _ = fs::remove_file(store.path("a"));
        fs::write(&partial, &bytes[..length]).unwrap();
        let mut seen = 0;
        let resumed = store
            .resume(&header("a"), &mut |_| {
                seen += 1;
                Ok(())
            })
            .unwrap();
        let Some(mut draft) = resumed else {
            assert!(length < starts[1] && !partial.exists());
            continue;
        };
        assert_eq!(draft.writer.state().progress.entries, seen);
        if seen < 1 {
            draft.writer.entry(&entry("d", Kind::Directory {})).unwrap();
            draft.writer.end_entry(None).unwrap();
        }
        if seen < 2 {
            draft.writer.entry(&file("d/f", 10_000)).unwrap();
            draft.writer.data(0, &[1; 4096], From::Devices).unwrap();
            draft.writer.zeroes(4096, 4096).unwrap();
            draft.writer.data(8192, &[3; 1808], From::Export).unwrap();
            draft.writer.end_entry(None).unwrap();
        }
        if seen < 3 {
            let disk = Kind::Disk {
                disk: 0,
                size: 1 << 20,
            };
            draft.writer.entry(&entry("disk", disk)).unwrap();
            draft.writer.data(65_536, &[9; 512], From::Devices).unwrap();
            draft.writer.end_entry(None).unwrap();
        }
        assert!(draft.finish().unwrap().complete);
        assert!(fs::read(store.path("a")).unwrap() == bytes, "{length}");
    }
    // What is damaged in the middle is cut there, too.
    let _ = fs::remove_file(store.path("a"));
    let mut damaged = bytes.clone();
    damaged[starts[4] + HEAD + 100] ^= 1;
    fs::write(&partial, &damaged).unwrap();
    let draft = store.resume(&header("a"), &mut |_| Ok(())).unwrap().unwrap();
    assert_eq!(draft.writer.state().progress.entries, 1);
    assert!(matches!(
        store.resume(&header("a"), &mut |_| Ok(())),
        Err(StoreError::Busy(_))
    ));
}

fn stored(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("a.smsbackup");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_disk_and_a_tree_come_out_of_an_archive() {
    let folder = tempfile::tempdir().unwrap();
    let path = stored(folder.path(), &small().0);
    let raw = folder.path().join("raw");
    let done = restore_disk(&mut Chain::open(path.clone()).unwrap(), None, &raw).unwrap();
    assert_eq!((done.entries, done.bytes), (1, 512));
    let content = fs::read(&raw).unwrap();
    assert!(
        content.len() == 1 << 20 && content[65_536..66_048] == [9; 512] && content[..65_536] == [0; 65_536]
    );
    assert!(restore_disk(&mut Chain::open(path.clone()).unwrap(), None, &raw).is_err());
    assert!(fs::read(&raw).unwrap() == content);

    let to = folder.path().join("tree");
    restore_tree(&mut Chain::open(path.clone()).unwrap(), &["d".into()], &to).unwrap();
    let mut expected = vec![1; 4096];
    expected.extend([0; 4096]);
    expected.extend([3; 1808]);
    assert!(fs::read(to.join("d/f")).unwrap() == expected && !to.join("disk").exists());
    // A second time nothing is replaced.
    fs::write(to.join("d/f"), "mine").unwrap();
    let again = restore_tree(&mut Chain::open(path.clone()).unwrap(), &["d".into()], &to).unwrap();
    assert!(again.problem_count > 0 && fs::read(to.join("d/f")).unwrap() == b"mine");
    assert!(restore_tree(&mut Chain::open(path).unwrap(), &["x".into()], &to).is_err());
}

#[test]
fn a_damaged_archive_gives_no_backup_and_no_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (mut bytes, starts) = small();
    let path = stored(folder.path(), &bytes[..bytes.len() - 1]);
    assert!(Chain::open(path).is_err());
    let disk = starts[starts.len() - 4];
    bytes[disk + HEAD + 9] ^= 1;
    let path = stored(folder.path(), &bytes);
    let raw = folder.path().join("raw");
    assert!(restore_disk(&mut Chain::open(path.clone()).unwrap(), None, &raw).is_err());
    assert!(!raw.exists());
    assert!(backup::store::verify(&path, &mut |_| {}).is_err());
}

#[test]
fn a_restoration_never_leaves_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let to = folder.path().join("to");
    let link = |target: &str| Kind::Symlink {
        target: target.into(),
    };
    let mut tree = TreeWriter::new(&to).unwrap();
    let hostile = [
        entry("up", link("../outside")),
        file("up/new", 1),
        entry("up/dir", Kind::Directory {}),
        entry(
            "hard",
            Kind::HardLink {
                to: "up/secret".into(),
            },
        ),
        entry("file", link("../outside/secret")),
        file("file", 1),
        file("../outside/x", 1),
        file("/tmp/smsvmm-never", 1),
        entry("abs", link(outside.to_str().unwrap())),
        entry("abs", Kind::Directory {}),
        file("abs/y", 1),
        entry("here", Kind::Directory {}),
        entry("here/up", link("..")),
        file("here/up/z", 1),
    ];
    for entry in &hostile {
        if tree.entry(0, entry).unwrap() {
            tree.data(0, b"!").unwrap();
            tree.end(None).unwrap();
        }
    }
    let done = tree.finish();
    assert!(done.problem_count >= 9, "{done:?}");
    let left: Vec<_> = fs::read_dir(&outside)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["secret"]);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
    assert!(!to.join("z").exists() && !to.join("hard").exists());
}

#[test]
fn owners_that_cannot_be_set_take_their_rights_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut tree = TreeWriter::new(&folder.path().join("to")).unwrap();
    let program = Entry {
        mode: 0o4755,
        // Not this user, who is not root in CI; root may set it.
        uid: 12_345,
        xattrs: vec![Xattr {
            name: "user.comment".into(),
            value: backup::RawText(vec![0, 255, b'\\']),
        }],
        ..file("p", 1)
    };
    assert!(tree.entry(0, &program).unwrap());
    tree.data(0, b"!").unwrap();
    tree.end(None).unwrap();
    tree.finish();
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(folder.path().join("to/p")).unwrap();
    let is_setuid = found.mode() & 0o4000 != 0;
    assert_eq!(is_setuid, found.uid() == 12_345);
}
