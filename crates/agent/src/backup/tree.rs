//! Files are written below one folder, and never anywhere else.
//!
//! Names come from a backup, and the folder may have been prepared by somebody: no name leads upwards, and no symbolic link is followed on
//! the way to a name (`openat2`, `RESOLVE_BENEATH`). A file has another name until all of it is there, so that what has its own name is
//! whole, and what was there before stays until then.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use backup::RawText;
use backup::plan::{Entry, Kind};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, linkat,
    makedev, mkdirat, mknodat, openat, openat2, renameat_with, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::meta::Held;

/// The folder below which everything is written.
#[derive(Debug)]
pub(crate) struct Target {
    root: OwnedFd,
    overwrite: bool,
    /// Folders that get their metadata when all is in them: a time of change, and permissions that forbid to write.
    folders: Vec<Entry>,
    /// Device and number of the files that were written.
    made: HashSet<(u64, u64)>,
    temporary: Vec<u8>,
}

/// A file or another name that is not finished.
#[derive(Debug)]
pub(crate) struct Unfinished {
    entry: Entry,
    parent: OwnedFd,
    name: Vec<u8>,
    temporary: Vec<u8>,
    /// A regular file.
    pub(crate) file: Option<File>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // It is not there any more if it was finished.
        let _ = unlinkat(&self.parent, &self.temporary[..], AtFlags::empty());
    }
}

/// Its parts; an error if it is not in its one spelling.
fn parts(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    match parts
        .iter()
        .any(|part| matches!(*part, b"" | b"." | b"..") || part.contains(&0))
    {
        true => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its path makes no sense",
        )),
        false => Ok(parts),
    }
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Something below a folder, held.
fn beneath(folder: impl AsFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat2(
        folder,
        if path.is_empty() { b"." } else { path },
        flags,
        Mode::empty(),
        BENEATH,
    )?)
}

fn there_already() -> io::Error {
    io::Error::new(
        io::ErrorKind::AlreadyExists,
        "it is there already; --overwrite replaces it",
    )
}

impl Target {
    /// Below this folder.
    pub(crate) fn new(root: File, overwrite: bool) -> Self {
        Self {
            root: root.into(),
            overwrite,
            folders: Vec::new(),
            made: HashSet::new(),
            temporary: format!(".sms-restore-{}", std::process::id()).into_bytes(),
        }
    }

    /// The folder of a path, made if it is not there, and its last part.
    fn parent(&self, path: &[u8]) -> io::Result<(OwnedFd, Vec<u8>)> {
        let parts = parts(path)?;
        let Some((name, above)) = parts.split_last() else {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        };
        let folder = path.get(..path.len() - name.len()).unwrap_or_default();
        let folder = folder.strip_suffix(b"/").unwrap_or(folder);
        let found = beneath(&self.root, folder, OFlags::DIRECTORY);
        let parent = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut folder = beneath(&self.root, b"", OFlags::DIRECTORY)?;
                for part in above {
                    match mkdirat(&folder, *part, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    folder = beneath(&folder, part, OFlags::DIRECTORY)?;
                }
                folder
            }
            found => found?,
        };
        Ok((parent, name.to_vec()))
    }

    /// Begins with an entry; none if it needs no more.
    ///
    /// # Errors
    /// It cannot be made here.
    pub(crate) fn begin(&mut self, entry: Entry) -> io::Result<Option<Unfinished>> {
        if matches!(entry.kind, Kind::Directory {}) {
            if !entry.path.bytes().is_empty() {
                self.folder(entry.path.bytes())?;
            }
            self.folders.push(entry);
            return Ok(None);
        }
        let (parent, name) = self.parent(entry.path.bytes())?;
        if !self.overwrite && Held::open(&parent, &name).is_ok() {
            return Err(there_already());
        }
        let temporary = self.temporary.clone();
        // A leftover of an earlier process of the same number.
        let _ = unlinkat(&parent, &temporary[..], AtFlags::empty());
        let mut made = Unfinished {
            entry,
            parent,
            name,
            temporary,
            file: None,
        };
        let (parent, temporary) = (&made.parent, &made.temporary[..]);
        let node = |kind, device| mknodat(parent, temporary, kind, Mode::from_raw_mode(0o600), device);
        match &made.entry.kind {
            Kind::Directory {} => {}
            Kind::File { .. } | Kind::Disk { .. } => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(parent, temporary, flags, Mode::from_raw_mode(0o600))?;
                made.file = Some(File::from(file));
            }
            Kind::Symlink { target } => symlinkat(target.bytes(), parent, temporary)?,
            Kind::HardLink { to } => self.link(to, parent, temporary)?,
            Kind::Fifo {} => node(FileType::Fifo, 0)?,
            Kind::CharacterDevice { major, minor } => {
                node(FileType::CharacterDevice, makedev(*major, *minor))?
            }
            Kind::BlockDevice { major, minor } => node(FileType::BlockDevice, makedev(*major, *minor))?,
        }
        Ok(Some(made))
    }

    /// Another name for a file that was written before.
    fn link(&self, to: &RawText, parent: &OwnedFd, temporary: &[u8]) -> io::Result<()> {
        let not_here = || io::Error::other(format!("it is another name of /{to}, which was not restored"));
        let parts = parts(to.bytes())?;
        let name = parts.last().ok_or_else(not_here)?;
        let folder = &to.bytes()[..to.bytes().len() - name.len()];
        let folder = beneath(
            &self.root,
            folder.strip_suffix(b"/").unwrap_or(folder),
            OFlags::DIRECTORY,
        )?;
        let stat = Held::open(&folder, name).map_err(|_| not_here())?.stat()?;
        // Not to what was here before.
        if !self.made.contains(&(stat.st_dev, stat.st_ino)) {
            return Err(not_here());
        }
        Ok(linkat(folder, *name, parent, temporary, AtFlags::empty())?)
    }

    fn folder(&self, path: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match mkdirat(&parent, &name[..], Mode::from_raw_mode(0o700)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let stat = Held::open(&parent, &name)?.stat()?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => Ok(()),
                    _ => Err(io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        "something that is no folder is there",
                    )),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives an entry its metadata and its name. What cannot be given of the metadata is told, and the entry is there.
    ///
    /// # Errors
    /// It is not there.
    pub(crate) fn finish(&mut self, mut made: Unfinished) -> io::Result<Vec<String>> {
        if let Some(file) = made.file.take() {
            file.set_len(made.entry.size())?;
        }
        let held = Held::open(&made.parent, &made.temporary)?;
        let problems = match &made.entry.kind {
            // It has those of its first name.
            Kind::HardLink { .. } => Vec::new(),
            _ => dress(&held, &made.entry),
        };
        let stat = held.stat()?;
        let flags = match self.overwrite {
            true => RenameFlags::empty(),
            false => RenameFlags::NOREPLACE,
        };
        match renameat_with(
            &made.parent,
            &made.temporary[..],
            &made.parent,
            &made.name[..],
            flags,
        ) {
            Ok(()) => {}
            Err(Errno::EXIST) if !self.overwrite => return Err(there_already()),
            Err(Errno::ISDIR) => return Err(io::Error::other("a folder is there")),
            Err(error) => return Err(error.into()),
        }
        self.made.insert((stat.st_dev, stat.st_ino));
        Ok(problems)
    }

    /// Gives folders their metadata; what cannot be given is told, with the path.
    pub(crate) fn end(&mut self) -> Vec<(RawText, String)> {
        let mut problems = Vec::new();
        // The inner ones first.
        while let Some(entry) = self.folders.pop() {
            match beneath(&self.root, entry.path.bytes(), OFlags::DIRECTORY) {
                Ok(held) => {
                    let all = dress(&Held::of(held), &entry);
                    problems.extend(all.into_iter().map(|problem| (entry.path.clone(), problem)));
                }
                Err(error) => problems.push((entry.path, error.to_string())),
            }
        }
        if let Err(error) = rustix::fs::syncfs(&self.root) {
            problems.push((RawText::default(), format!("it may not be durable: {error}")));
        }
        problems
    }
}

/// Gives a file what an entry says beside content: in this order, as each step may undo parts of the later ones.
fn dress(held: &Held, entry: &Entry) -> Vec<String> {
    let mut problems = Vec::new();
    let mut tell = |what: &str, done: io::Result<()>| {
        if let Err(error) = &done {
            problems.push(format!("its {what} cannot be set: {error}"));
        }
        done.is_ok()
    };
    let is_owned = tell("owner", held.set_owner(entry.uid, entry.gid));
    if !matches!(entry.kind, Kind::Symlink { .. }) {
        tell("access control list", held.drop_inherited_lists());
        // A program that acts for another owner than it did before would be a gift.
        let bits = if is_owned { 0o7777 } else { 0o1777 };
        tell("mode", held.set_mode(entry.mode & bits));
    }
    for xattr in &entry.xattrs {
        tell(&format!("attribute {}", xattr.name), held.set_xattr(xattr));
    }
    let time = |time: backup::plan::Time| Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    let as_it_is = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    let times = Timestamps {
        last_access: entry.accessed.map_or(as_it_is, time),
        last_modification: time(entry.modified),
    };
    tell(
        "time",
        utimensat(rustix::fs::CWD, held.path(), &times, AtFlags::empty()).map_err(Into::into),
    );
    problems
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;

    use backup::plan::{Content, Time};

    use super::*;

    fn entry(path: &[u8], kind: Kind) -> Entry {
        Entry {
            path: RawText(path.to_vec()),
            mode: 0o640,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            modified: Time {
                seconds: -5,
                nanoseconds: 123_456_789,
            },
            accessed: None,
            xattrs: Vec::new(),
            kind,
        }
    }

    fn file(path: &[u8], size: u64) -> Entry {
        let content = Content::Stream {};
        entry(path, Kind::File { size, content })
    }

    fn target(folder: &Path, overwrite: bool) -> Target {
        Target::new(File::open(folder).unwrap(), overwrite)
    }

    fn put(target: &mut Target, entry: Entry, bytes: &[u8]) -> io::Result<Vec<String>> {
        let Some(mut made) = target.begin(entry)? else {
            return Ok(Vec::new());
        };
        if let Some(file) = &mut made.file {
            file.write_all(bytes)?;
        }
        target.finish(made)
    }

    #[test]
    fn everything_comes_back_with_its_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let mut target = target(folder.path(), false);
        let closed = Entry {
            mode: 0o500,
            ..entry(b"a/closed", Kind::Directory {})
        };
        for (entry, bytes) in [
            (closed, &b""[..]),
            (file(b"a/closed/file\xff", 10), b"abc"),
            (
                entry(
                    b"a/name",
                    Kind::HardLink {
                        to: RawText(b"a/closed/file\xff".to_vec()),
                    },
                ),
                b"",
            ),
            (
                entry(
                    b"a/link",
                    Kind::Symlink {
                        target: "/etc/passwd".into(),
                    },
                ),
                b"",
            ),
            (entry(b"a/pipe", Kind::Fifo {}), b""),
        ] {
            assert_eq!(put(&mut target, entry, bytes).unwrap(), Vec::<String>::new());
        }
        assert_eq!(target.end(), []);
        let at = |name: &str| fs::symlink_metadata(folder.path().join(name)).unwrap();
        assert_eq!(
            fs::read(folder.path().join("a/name")).unwrap(),
            b"abc\0\0\0\0\0\0\0"
        );
        assert_eq!(
            (at("a/name").nlink(), at("a/name").permissions().mode() & 0o7777),
            (2, 0o640)
        );
        assert_eq!(
            (at("a/name").mtime(), at("a/name").mtime_nsec()),
            (-5, 123_456_789)
        );
        assert_eq!((at("a/link").mtime(), at("a/pipe").mtime()), (-5, -5));
        assert_eq!(
            (
                at("a/closed").permissions().mode() & 0o7777,
                at("a/closed").mtime()
            ),
            (0o500, -5)
        );
        assert_eq!(fs::read_dir(folder.path().join("a")).unwrap().count(), 4);
        fs::set_permissions(folder.path().join("a/closed"), fs::Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn nothing_is_inherited_from_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        // What is made in it may be read by user 1000.
        let mut list = 2_u32.to_le_bytes().to_vec();
        for (tag, id) in [
            (1_u16, u32::MAX),
            (2, 1000),
            (4, u32::MAX),
            (16, u32::MAX),
            (32, u32::MAX),
        ] {
            list.extend([tag.to_le_bytes(), 4_u16.to_le_bytes()].concat());
            list.extend(id.to_le_bytes());
        }
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::setxattr(folder.path(), "system.posix_acl_default", &list, flags) {
            // A file system without them.
            Err(Errno::NOTSUP) => return,
            set => set.unwrap(),
        }
        let mut target = target(folder.path(), false);
        put(&mut target, file(b"file", 0), b"").unwrap();
        put(&mut target, entry(b"inner", Kind::Directory {}), b"").unwrap();
        assert_eq!(target.end(), []);
        let open = File::open(folder.path()).unwrap();
        for name in [&b"file"[..], b"inner"] {
            let held = Held::open(&open, name).unwrap();
            let lists = held.xattrs().unwrap().into_iter();
            assert_eq!(
                lists
                    .filter(|xattr| xattr.name.bytes().starts_with(b"system."))
                    .count(),
                0
            );
            assert_eq!(held.stat().unwrap().st_mode & 0o7777, 0o640);
        }
    }

    #[test]
    fn nothing_is_written_outside_of_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        symlink(outside.path(), folder.path().join("out")).unwrap();
        symlink(outside.path().join("x"), folder.path().join("name")).unwrap();
        for overwrite in [false, true] {
            let mut target = target(folder.path(), overwrite);
            for path in [
                &b"out/x"[..],
                b"out/new/x",
                b"../x",
                b"a/../../x",
                b"/x",
                b"a//x",
                b"./x",
                b"x\0y",
                b"",
            ] {
                assert!(put(&mut target, file(path, 1), b"x").is_err(), "{path:?}");
            }
            assert!(put(&mut target, entry(b"out", Kind::Directory {}), b"").is_err());
            // A link in the backup itself, and then something behind it.
            let link = entry(
                b"in",
                Kind::Symlink {
                    target: RawText::from(outside.path().as_os_str()),
                },
            );
            put(&mut target, link, b"").unwrap();
            assert!(put(&mut target, file(b"in/x", 1), b"x").is_err());
            // What a link leads to is not written.
            assert_eq!(put(&mut target, file(b"name", 1), b"x").is_ok(), overwrite);
            let to = "name".into();
            assert_eq!(
                put(&mut target, entry(b"linked", Kind::HardLink { to }), b"").is_ok(),
                overwrite
            );
            target.end();
            fs::remove_file(folder.path().join("in")).unwrap();
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_was_there_stays_until_the_new_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "old").unwrap();
        let refused = put(&mut target(folder.path(), false), file(b"file", 3), b"new").unwrap_err();
        assert!(refused.to_string().contains("--overwrite"));
        let mut target = target(folder.path(), true);
        let half = target.begin(file(b"file", 3)).unwrap().unwrap();
        assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"old");
        drop(half);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        put(&mut target, file(b"file", 3), b"new").unwrap();
        assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
