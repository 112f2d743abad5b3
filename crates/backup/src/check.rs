//! Nothing that an agent or an archive says is believed: names stay below their folder, ranges within their file and disk, numbers small.

use std::collections::HashMap;

use aws_lc_rs::digest::{SHA256, digest};

use crate::plan::{
    Content, Entry, Extent, Kind, MAX_DISKS, MAX_ENTRIES, MAX_EXTENTS, MAX_EXTENTS_OF_ENTRY, MAX_NAME,
    MAX_PATH, MAX_SIZE, MAX_SOURCES, MAX_XATTRS, Plan, Time,
};

/// What is wrong with a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {reason}")]
pub struct PlanError {
    /// The entry, disk or name.
    pub object: String,
    /// Why it cannot be.
    pub reason: String,
}

fn wrong(object: impl ToString, reason: impl Into<String>) -> PlanError {
    PlanError {
        object: object.to_string(),
        reason: reason.into(),
    }
}

/// Sees that a backup can be called `name`.
///
/// # Errors
/// It cannot.
pub fn name(name: &str) -> Result<(), PlanError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
    let fits = (1..=128).contains(&name.len());
    if fits && name.bytes().all(good) && !name.starts_with(['.', '-']) && !name.ends_with(".partial") {
        return Ok(());
    }
    let reason = "a name has 1 to 128 letters, digits and . _ - +, and begins with no . and no -";
    Err(wrong(format!("{name:?}"), reason))
}

/// Sees that a path is below its folder, in its one spelling; the empty path is the folder itself.
///
/// # Errors
/// It is not.
pub fn path(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > MAX_PATH {
        return Err("its path is too long");
    }
    for part in path.split(|byte| *byte == b'/') {
        if matches!(part, b"" | b"." | b"..") {
            return Err("its path begins with /, or has an empty part, `.` or `..`");
        }
        if part.len() > MAX_NAME {
            return Err("a part of its path is too long");
        }
        if part.contains(&0) {
            return Err("its path has a NUL");
        }
    }
    Ok(())
}

/// Sees that the beginning of a plan makes sense by itself.
///
/// # Errors
/// It does not.
pub fn plan(plan: &Plan) -> Result<(), PlanError> {
    name(&plan.name)?;
    if let Some(parent) = &plan.parent {
        name(parent)?;
        if *parent == plan.name {
            return Err(wrong(parent, "a backup cannot be built on itself"));
        }
    }
    time("the image", plan.frozen)?;
    for (what, text, most) in [
        ("the host", &plan.host, 1024),
        ("the description", &plan.description, 64 << 10),
    ] {
        if text.len() > most {
            return Err(wrong(what, "it is too long"));
        }
    }
    if plan.disks.len() > MAX_DISKS || plan.sources.len() > MAX_SOURCES {
        return Err(wrong(&plan.name, "it has too many disks or sources"));
    }
    for (number, disk) in plan.disks.iter().enumerate() {
        let bad = |text: &str| text.is_empty() || text.len() > 1024 || text.chars().any(char::is_control);
        let strange = disk
            .disk
            .strip_prefix('/')
            .is_none_or(|rest| path(rest.as_bytes()).is_err() || rest.is_empty());
        let marked = disk.disk.contains(".dsk@") || !disk.disk.ends_with(".dsk");
        if bad(&disk.disk) || strange || marked {
            return Err(wrong(format!("{:?}", disk.disk), "this is no path of a disk"));
        }
        if bad(&disk.snapshot) || disk.snapshot.contains(['/', '@']) || disk.configuration.len() > 1024 {
            return Err(wrong(&disk.disk, "this is no name of a snapshot"));
        }
        if plan
            .disks
            .iter()
            .take(number)
            .any(|other| other.disk == disk.disk)
        {
            return Err(wrong(&disk.disk, "it is named twice"));
        }
    }
    let long = plan.sources.iter().find(|source| {
        let texts = [&source.file_system, &source.uuid];
        source.path.0.len() > MAX_PATH || texts.into_iter().flatten().any(|text| text.len() > 256)
    });
    match long {
        Some(source) => Err(wrong(&source.path, "it is too long")),
        None => Ok(()),
    }
}

fn time(object: impl ToString, time: Time) -> Result<(), PlanError> {
    match time.nanoseconds < 1_000_000_000 {
        true => Ok(()),
        false => Err(wrong(object, "a second has no so many nanoseconds")),
    }
}

/// Sees that an entry makes sense by itself.
///
/// # Errors
/// It does not.
pub fn entry(entry: &Entry) -> Result<(), PlanError> {
    let failed = |reason: &str| wrong(&entry.path, reason);
    path(&entry.path.0).map_err(failed)?;
    if entry.mode > 0o7777 {
        return Err(failed("its mode has more than 12 bits"));
    }
    time(&entry.path, entry.modified)?;
    entry
        .accessed
        .map_or(Ok(()), |accessed| time(&entry.path, accessed))?;
    let bytes = entry.xattrs.iter();
    let bytes: usize = bytes.map(|xattr| xattr.name.0.len() + xattr.value.0.len()).sum();
    let bad_name = |name: &[u8]| name.is_empty() || name.len() > 255 || name.contains(&0);
    if bytes > MAX_XATTRS || entry.xattrs.iter().any(|xattr| bad_name(&xattr.name.0)) {
        return Err(failed("its extended attributes are too long, or have bad names"));
    }
    if entry.path.0.is_empty() && !matches!(entry.kind, Kind::Directory {}) {
        return Err(failed("only a folder has the empty path"));
    }
    match &entry.kind {
        Kind::File { size, .. } | Kind::Disk { size, .. } if *size > MAX_SIZE => {
            Err(failed("it is too large"))
        }
        Kind::File { size, content } => match content {
            Content::Extents { extents, .. } => {
                let mut end = 0;
                in_order(&mut end, extents, *size).map_err(|reason| wrong(&entry.path, reason))
            }
            Content::Stream {} => Ok(()),
        },
        Kind::Symlink { target }
            if target.0.is_empty() || target.0.len() >= MAX_PATH || target.0.contains(&0) =>
        {
            Err(failed("a symbolic link cannot say that"))
        }
        Kind::HardLink { to } => match path(&to.0) {
            Ok(()) if !to.0.is_empty() => Ok(()),
            _ => Err(failed("a hard link cannot lead there")),
        },
        _ => Ok(()),
    }
}

/// Extents ascend from `end` on, and lie within a file of `size` bytes.
fn in_order(end: &mut u64, extents: &[Extent], size: u64) -> Result<(), String> {
    if extents.len() > MAX_EXTENTS {
        return Err("it has too many extents in one message".into());
    }
    for extent in extents {
        let stop = extent
            .offset
            .checked_add(extent.length)
            .filter(|stop| *stop <= size);
        match stop {
            Some(stop) if extent.offset >= *end && extent.length > 0 => *end = stop,
            _ => {
                let Extent { offset, length, .. } = extent;
                return Err(format!(
                    "an extent of {length} bytes at {offset} is not within the file, behind those before it"
                ));
            }
        }
        if let Some(at) = extent.at
            && at.start.checked_add(extent.length).is_none()
        {
            return Err("an extent lies behind the end of its disk".into());
        }
    }
    Ok(())
}

/// What a path is known to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Directory,
    /// Something is below it, and it did not come itself.
    Implied,
    /// What a hard link can lead to.
    Linkable,
    Other,
}

/// Sees that entries make sense together.
#[derive(Debug)]
pub struct PlanChecker {
    /// Bytes of the disks.
    disks: Vec<u64>,
    /// By a digest of the path: 17 bytes for each, however long it is.
    paths: HashMap<u128, Known>,
    most_entries: u64,
    /// Of the last entry.
    open: Option<OpenEntry>,
}

#[derive(Debug)]
struct OpenEntry {
    path: String,
    size: u64,
    end: u64,
    extents: u64,
    more: bool,
}

fn key(path: &[u8]) -> u128 {
    let digest = digest(&SHA256, path);
    let first = digest.as_ref().first_chunk::<16>();
    first.map_or(0, |bytes| u128::from_le_bytes(*bytes))
}

impl PlanChecker {
    /// For disks of so many bytes, and at most so many entries.
    pub fn new(disks: Vec<u64>, most_entries: u64) -> Self {
        Self {
            disks,
            paths: HashMap::new(),
            most_entries: most_entries.min(MAX_ENTRIES),
            open: None,
        }
    }

    /// The next entry.
    ///
    /// # Errors
    /// It makes no sense, by itself or after those before it.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), PlanError> {
        self.complete()?;
        self::entry(entry)?;
        let failed = |reason: String| wrong(&entry.path, reason);
        if self.paths.len() as u64 >= self.most_entries.saturating_mul(2) {
            return Err(failed(format!(
                "a plan has at most {} entries",
                self.most_entries
            )));
        }
        self.know(entry)?;
        match &entry.kind {
            Kind::File {
                size,
                content: Content::Extents { extents, more },
            } => {
                self.open = Some(OpenEntry {
                    path: entry.path.to_string(),
                    size: *size,
                    end: extents.last().map_or(0, |last| last.offset + last.length),
                    extents: extents.len() as u64,
                    more: *more,
                });
                self.on_disks(extents).map_err(failed)
            }
            Kind::Disk { disk, size } => match self.disks.get(*disk as usize) {
                Some(known) if known == size => Ok(()),
                Some(known) => Err(failed(format!("the disk has {known} bytes, not {size}"))),
                None => Err(failed(format!("the image has no disk number {disk}"))),
            },
            _ => Ok(()),
        }
    }

    fn know(&mut self, entry: &Entry) -> Result<(), PlanError> {
        let failed = |reason: &str| Err(wrong(&entry.path, reason));
        let path = &entry.path.0;
        if let Kind::HardLink { to } = &entry.kind
            && self.paths.get(&key(&to.0)) != Some(&Known::Linkable)
        {
            return failed("it is a hard link to what did not come before, or is a folder");
        }
        let known = match &entry.kind {
            Kind::Directory {} => Known::Directory,
            Kind::Disk { .. } => Known::Other,
            _ => Known::Linkable,
        };
        match (self.paths.insert(key(path), known), known) {
            (None, _) | (Some(Known::Implied), Known::Directory) => {}
            (Some(Known::Implied), _) => return failed("it is no folder, and something is below it"),
            (Some(_), _) => return failed("there are two entries of this path"),
        }
        let mut above = path.as_slice();
        while let Some(cut) = above.iter().rposition(|byte| *byte == b'/') {
            above = above.get(..cut).unwrap_or_default();
            match self.paths.get(&key(above)) {
                Some(Known::Directory | Known::Implied) => break,
                Some(_) => return failed("it is below something that is no folder"),
                None => drop(self.paths.insert(key(above), Known::Implied)),
            }
        }
        Ok(())
    }

    /// More extents of the last entry.
    ///
    /// # Errors
    /// There can be none, or they make no sense.
    pub fn extents(&mut self, extents: &[Extent], more: bool) -> Result<(), PlanError> {
        let Some(open) = self.open.as_mut().filter(|open| open.more) else {
            return Err(wrong("extents", "there is no entry that they could be of"));
        };
        let path = open.path.clone();
        open.extents += extents.len() as u64;
        open.more = more;
        if open.extents > MAX_EXTENTS_OF_ENTRY || extents.is_empty() {
            return Err(wrong(
                path,
                "it has too many extents, or none where there should be",
            ));
        }
        in_order(&mut open.end, extents, open.size).map_err(|reason| wrong(&path, reason))?;
        self.on_disks(extents).map_err(|reason| wrong(path, reason))
    }

    fn on_disks(&self, extents: &[Extent]) -> Result<(), String> {
        for extent in extents {
            let Some(at) = extent.at else { continue };
            let size = self
                .disks
                .get(at.disk as usize)
                .ok_or_else(|| format!("the image has no disk number {}", at.disk))?;
            let end = at.start.checked_add(extent.length);
            if end.is_none_or(|end| end > *size) {
                return Err(format!(
                    "an extent of {} bytes at {} lies behind the end of disk {}, which has {size}",
                    extent.length, at.start, at.disk
                ));
            }
        }
        Ok(())
    }

    /// Sees that nothing is missing at the last entry.
    ///
    /// # Errors
    /// More extents were announced.
    pub fn complete(&self) -> Result<(), PlanError> {
        match &self.open {
            Some(open) if open.more => Err(wrong(&open.path, "more extents were announced and did not come")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{ImageDisk, Place};
    use crate::raw_text::RawText;

    fn of(path: &str, kind: Kind) -> Entry {
        Entry {
            path: path.into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified: Time::default(),
            accessed: None,
            xattrs: Vec::new(),
            kind,
        }
    }

    fn file(path: &str, size: u64, extents: &[(u64, u64, u32, u64)]) -> Entry {
        let extents = extents.iter().map(|(offset, length, disk, start)| Extent {
            offset: *offset,
            length: *length,
            at: Some(Place {
                disk: *disk,
                start: *start,
            }),
        });
        let extents = extents.collect();
        of(
            path,
            Kind::File {
                size,
                content: Content::Extents { extents, more: false },
            },
        )
    }

    fn dir(path: &str) -> Entry {
        of(path, Kind::Directory {})
    }

    fn all(entries: &[Entry]) -> Result<(), PlanError> {
        let mut checker = PlanChecker::new(vec![1 << 20, 4096], 100);
        entries.iter().try_for_each(|entry| checker.entry(entry))?;
        checker.complete()
    }

    #[test]
    fn a_plan_that_makes_sense_is_taken() {
        let link = |path: &str, to: &str| of(path, Kind::HardLink { to: to.into() });
        all(&[
            dir(""),
            dir("srv"),
            file("srv/a", 6000, &[(0, 4096, 0, 8192), (4096, 1904, 1, 0)]),
            link("srv/b", "srv/a"),
            of(
                "srv/c",
                Kind::Symlink {
                    target: "/etc/shadow".into(),
                },
            ),
            file("var/lib/x", 0, &[]),
            dir("var"),
            of("disk", Kind::Disk { disk: 1, size: 4096 }),
        ])
        .unwrap();
    }

    #[test]
    fn forged_plans_are_refused() {
        let link = |path: &str, to: &str| of(path, Kind::HardLink { to: to.into() });
        let forged: &[(&str, Vec<Entry>)] = &[
            ("above", vec![dir("../x")]),
            ("above within", vec![dir("a/../../x")]),
            ("absolute", vec![dir("/etc")]),
            ("empty part", vec![dir("a//b")]),
            ("dot", vec![dir("./a")]),
            ("slash at the end", vec![dir("a/")]),
            ("NUL", vec![dir("a\0b")]),
            ("long part", vec![dir(&"x".repeat(256))]),
            ("long path", vec![dir(&"x/".repeat(2049))]),
            ("file without a name", vec![file("", 0, &[])]),
            ("twice", vec![dir("a"), dir("a")]),
            ("twice, another kind", vec![dir("a"), file("a", 0, &[])]),
            ("below a file", vec![file("a", 0, &[]), dir("a/b")]),
            (
                "below a link",
                vec![of("a", Kind::Symlink { target: "/".into() }), dir("a/b/c")],
            ),
            ("file above something", vec![dir("a/b"), file("a", 0, &[])]),
            ("hard link to nothing", vec![link("a", "b")]),
            ("hard link to itself", vec![link("a", "a")]),
            ("hard link to a folder", vec![dir("a"), link("b", "a")]),
            ("hard link outside", vec![link("a", "../b")]),
            (
                "symlink of nothing",
                vec![of(
                    "a",
                    Kind::Symlink {
                        target: RawText::default(),
                    },
                )],
            ),
            (
                "overlap",
                vec![file("a", 8192, &[(0, 4096, 0, 0), (4095, 1, 0, 8192)])],
            ),
            (
                "backwards",
                vec![file("a", 8192, &[(4096, 4096, 0, 0), (0, 4096, 0, 8192)])],
            ),
            ("nothing", vec![file("a", 8192, &[(0, 0, 0, 0)])]),
            ("behind the file", vec![file("a", 4096, &[(0, 4097, 0, 0)])]),
            ("behind the disk", vec![file("a", 8192, &[(0, 8192, 1, 0)])]),
            (
                "far behind the disk",
                vec![file("a", 4096, &[(0, 4096, 0, u64::MAX - 5)])],
            ),
            ("wraps", vec![file("a", 4096, &[(u64::MAX, 2, 0, 0)])]),
            ("no such disk", vec![file("a", 4096, &[(0, 4096, 2, 0)])]),
            (
                "no such whole disk",
                vec![of("a", Kind::Disk { disk: 2, size: 4096 })],
            ),
            ("another size", vec![of("a", Kind::Disk { disk: 1, size: 8192 })]),
            (
                "huge",
                vec![of(
                    "a",
                    Kind::File {
                        size: u64::MAX,
                        content: Content::Stream {},
                    },
                )],
            ),
            (
                "mode",
                vec![Entry {
                    mode: 0o10_0644,
                    ..dir("a")
                }],
            ),
            (
                "time",
                vec![Entry {
                    modified: Time {
                        seconds: 0,
                        nanoseconds: 1_000_000_000,
                    },
                    ..dir("a")
                }],
            ),
            (
                "many",
                (0..201).map(|number| dir(&format!("d{number}"))).collect(),
            ),
        ];
        for (what, entries) in forged {
            assert!(all(entries).is_err(), "{what}");
        }
    }

    #[test]
    fn extents_that_were_announced_must_come_and_fit() {
        let more = |extents: Vec<Extent>| {
            of(
                "a",
                Kind::File {
                    size: 8192,
                    content: Content::Extents { extents, more: true },
                },
            )
        };
        let at = |offset, start| Extent {
            offset,
            length: 4096,
            at: Some(Place { disk: 0, start }),
        };
        let mut checker = PlanChecker::new(vec![1 << 20], 100);
        checker.entry(&more(vec![at(0, 0)])).unwrap();
        assert!(checker.complete().is_err() && checker.entry(&dir("b")).is_err());
        checker.extents(&[at(4096, 0)], false).unwrap();
        checker.complete().unwrap();
        assert!(checker.extents(&[at(4096, 0)], false).is_err());
        for wrong in [at(0, 0), at(4096, 1 << 20), at(8192, 0)] {
            let mut checker = PlanChecker::new(vec![1 << 20], 100);
            checker.entry(&more(vec![at(0, 0)])).unwrap();
            assert!(checker.extents(&[wrong], false).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn names_of_backups_and_disks_are_plain() {
        let plan = |name: &str, disk: &str, snapshot: &str| Plan {
            name: name.into(),
            parent: None,
            host: String::new(),
            description: String::new(),
            frozen: Time::default(),
            disks: vec![ImageDisk {
                disk: disk.into(),
                snapshot: snapshot.into(),
                configuration: String::new(),
            }],
            sources: Vec::new(),
            resume: false,
        };
        self::plan(&plan("monday-1.2_x+", "/vm/a.dsk", "s")).unwrap();
        for (name, disk, snapshot) in [
            ("", "/a.dsk", "s"),
            ("..", "/a.dsk", "s"),
            ("a/b", "/a.dsk", "s"),
            ("-a", "/a.dsk", "s"),
            ("a.partial", "/a.dsk", "s"),
            ("ü", "/a.dsk", "s"),
            ("a", "a.dsk", "s"),
            ("a", "/../a.dsk", "s"),
            ("a", "/a", "s"),
            ("a", "/a.dsk@x.dsk", "s"),
            ("a", "/a.dsk", ""),
            ("a", "/a.dsk", "a/b"),
            ("a", "/a.dsk", "a@b"),
            ("a", "/a.dsk", "a\nb"),
        ] {
            assert!(
                self::plan(&plan(name, disk, snapshot)).is_err(),
                "{name} {disk} {snapshot}"
            );
        }
    }
}
