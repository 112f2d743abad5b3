//! Backups: archives and plans that an agent, or somebody with access to the store, has made up. Checksums are right, so that what is behind
//! them is reached.

use arbitrary::Unstructured;
use backup::archive::{ArchiveReader, ArchiveWriter, From, Header, ImageIdentity, Parent, Record, VERSION};
use backup::check::{self, PlanChecker};
use backup::frame::{FrameReader, FrameWriter};
use backup::message::{Request, content};
use backup::plan::{Content, Entry, Extent, ImageDisk, Kind, Place, Plan, Time, Xattr};

const DISK: u64 = 1 << 20;

fn plan() -> Plan {
    Plan {
        name: "a".into(),
        parent: Some("p".into()),
        host: "h".into(),
        description: String::new(),
        frozen: Time::default(),
        disks: vec![ImageDisk {
            disk: "/a.dsk".into(),
            snapshot: "s".into(),
            configuration: String::new(),
        }],
        sources: Vec::new(),
        resume: false,
    }
}

fn entries() -> Vec<Entry> {
    let entry = |path: &str, kind| Entry {
        path: path.into(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        modified: Time::default(),
        accessed: None,
        xattrs: vec![Xattr {
            name: "user.x".into(),
            value: "\\".into(),
        }],
        kind,
    };
    let extent = |offset, start| Extent {
        offset,
        length: 4096,
        at: Some(Place { disk: 0, start }),
    };
    vec![
        entry("d", Kind::Directory {}),
        entry(
            "d/f",
            Kind::File {
                size: 8192,
                content: Content::Extents {
                    extents: vec![extent(0, 4096), extent(4096, 65536)],
                    more: false,
                },
            },
        ),
        entry("l", Kind::Symlink { target: "d".into() }),
        entry("h", Kind::HardLink { to: "d/f".into() }),
        entry("i", Kind::Disk { disk: 0, size: DISK }),
        entry(
            "s",
            Kind::File {
                size: 9,
                content: Content::Stream {},
            },
        ),
    ]
}

/// The frames of a good archive.
fn frames() -> Option<Vec<(u16, Vec<u8>)>> {
    let header = Header {
        version: VERSION,
        incompatible: 0,
        compatible: 0,
        writer: "fuzz".into(),
        principal: "vm".into(),
        plan: plan(),
        image: vec![ImageIdentity {
            identity: "1".into(),
            size: DISK,
        }],
        parent: Some(Parent {
            name: "p".into(),
            digest: "0".into(),
        }),
    };
    let mut writer = ArchiveWriter::begin(Vec::new(), 7, &header).ok()?;
    for entry in entries() {
        writer.entry(&entry).ok()?;
        if entry.size() >= 8192 {
            writer.data(0, &[1; 64], From::Devices).ok()?;
            writer.zeroes(64, 64).ok()?;
            writer.in_parent(128, 64, 0, 0).ok()?;
        }
        writer.end_entry(None).ok()?;
    }
    let (bytes, _) = writer.commit().ok()?;
    let mut reader = FrameReader::new(&bytes[..], None, Some(0));
    let mut frames = Vec::new();
    while let Some(head) = reader.read().ok()? {
        frames.push((head.kind, reader.payload().to_vec()));
    }
    Some(frames)
}

/// Changes a few bytes, or numbers in text.
fn change(input: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> arbitrary::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let place = input.int_in_range(0..=bytes.len().min(600) - 1)?;
    match input.int_in_range(0..=5_u8)? {
        0 => bytes.truncate(place),
        1 => bytes.insert(place, input.arbitrary()?),
        2 => {
            let wide: u64 = *input.choose(&[0, 1, 63, 64, 4096, 8192, DISK, u64::MAX - 5, u64::MAX])?;
            for (byte, new) in bytes.iter_mut().skip(place / 8 * 8).zip(wide.to_le_bytes()) {
                *byte = new;
            }
        }
        3 => {
            // A number of the text becomes another one.
            let digits: Vec<usize> = (0..bytes.len())
                .filter(|at| bytes[*at].is_ascii_digit())
                .collect();
            if let Some(at) = digits.get(place % digits.len().max(1)) {
                let text = *input.choose(&["18446744073709551615", "4294967296", "-1", "1e9", "0"])?;
                bytes.splice(*at..=*at, text.bytes());
            }
        }
        4 => {
            let text = *input.choose(&["../", "/", "\\\\x00", "\\\\xff", "\"", "}"])?;
            bytes.splice(place..place, text.bytes());
        }
        _ => bytes[place] = input.arbitrary()?,
    }
    Ok(())
}

/// What a reader tells of an archive is within its bounds.
pub(super) fn archive(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut frames = frames().unwrap_or_default();
    assert!(frames.len() > 10);
    for _ in 0..input.int_in_range(0..=4_u8)? {
        let number = input.int_in_range(0..=frames.len() - 1)?;
        match input.int_in_range(0..=5_u8)? {
            0 if frames.len() > 1 => drop(frames.remove(number)),
            1 => frames.insert(number, frames[number].clone()),
            2 => frames[number].0 = input.int_in_range(14..=26)?,
            _ => change(input, &mut frames[number].1)?,
        }
    }
    let mut writer = FrameWriter::new(Vec::new(), 7, 0);
    for (kind, payload) in &frames {
        if writer.write(*kind, &[payload]).is_err() {
            return Ok(());
        }
    }
    let mut bytes = writer.into_inner();
    if input.ratio(1, 8)? {
        let length = input.int_in_range(0..=bytes.len())?;
        bytes.truncate(length);
    }
    let mut reader = ArchiveReader::new(&bytes[..]);
    let (mut size, mut done, mut whole) = (0, 0, 0);
    while let Ok(Some(record)) = reader.read() {
        let range = match record {
            Record::Entry(number, entry) => {
                check::path(&entry.path.0).expect("a path that leaves its folder");
                assert_eq!(number, whole);
                (size, done) = (entry.size(), 0);
                continue;
            }
            Record::Data { offset, bytes } => (offset, bytes.len() as u64),
            Record::Zeroes { offset, length } => (offset, length),
            Record::InParent {
                offset, length, at, ..
            } => {
                assert!(at.checked_add(length).is_some());
                (offset, length)
            }
            Record::EntryEnd(_) => {
                whole += 1;
                continue;
            }
            Record::Commit(commit) => {
                assert_eq!(commit.entries, whole);
                continue;
            }
            Record::Header(_) | Record::Extents(_) => continue,
        };
        assert!(range.0 >= done && range.0 + range.1 <= size && range.1 > 0);
        done = range.0 + range.1;
    }
    Ok(())
}

/// What a checker lets pass lies within the disks, and below its folder.
pub(super) fn messages(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut checker = PlanChecker::new(vec![DISK], 100);
    for _ in 0..input.int_in_range(1..=6_u8)? {
        let request = match input.int_in_range(0..=4_u8)? {
            0 => Request::Begin(Box::new(plan())),
            1 => Request::Extents {
                extents: vec![Extent {
                    offset: 8192,
                    length: 1,
                    at: None,
                }],
                more: input.arbitrary()?,
            },
            _ => {
                let all = entries();
                let from = input.int_in_range(0..=all.len() - 1)?;
                Request::Entries(all[from..].to_vec())
            }
        };
        let mut json = serde_json::to_vec(&request).unwrap_or_default();
        for _ in 0..input.int_in_range(0..=3_u8)? {
            change(input, &mut json)?;
        }
        if let Some((offset, bytes)) = content(&json) {
            assert!(offset.checked_add(bytes.len() as u64).is_some());
        }
        match serde_json::from_slice(&json) {
            Ok(Request::Begin(plan)) => drop(check::plan(&plan)),
            Ok(Request::Extents { extents, more }) if checker.extents(&extents, more).is_ok() => {
                within(&extents);
            }
            Ok(Request::Entries(entries)) => {
                for entry in entries {
                    if checker.entry(&entry).is_err() {
                        break;
                    }
                    check::path(&entry.path.0).expect("a path that leaves its folder");
                    if let Kind::File {
                        size,
                        content: Content::Extents { extents, .. },
                    } = &entry.kind
                    {
                        within(extents);
                        assert!(
                            extents
                                .iter()
                                .all(|extent| extent.offset + extent.length <= *size)
                        );
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn within(extents: &[Extent]) {
    for extent in extents {
        if let Some(at) = extent.at {
            assert!(at.disk == 0 && at.start + extent.length <= DISK);
        }
    }
}
