//! Files below a folder, and never outside of it: the kernel follows no symbolic link for this, and goes no step up (`openat2`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};

use super::{RestoreError, Restored, is_selected};
use crate::archive::{Chain, ChainError, Sink};
use crate::check;
use crate::plan::{Entry, Kind, Time};
use crate::raw_text::RawText;

/// Restores a backup, or `paths` and what is below them, to a folder, which is made if it is not there. What is there already is not
/// replaced.
///
/// # Errors
/// See [`RestoreError`].
pub fn restore_tree(chain: &mut Chain, paths: &[RawText], to: &Path) -> Result<Restored, RestoreError> {
    let failed = |source| RestoreError::Target {
        path: to.to_owned(),
        source,
    };
    let mut tree = TreeWriter::new(to).map_err(failed)?;
    tree.select(paths.to_vec());
    match chain.read(&mut tree) {
        Ok(()) => {}
        Err(ChainError::Sink(error)) => return Err(failed(error)),
        Err(error) => return Err(error.into()),
    }
    let restored = tree.finish();
    if restored.entries == 0 && !paths.is_empty() {
        let names: Vec<String> = paths.iter().map(RawText::to_string).collect();
        return Err(RestoreError::Nothing(format!(
            "the backup has nothing at {}",
            names.join(", ")
        )));
    }
    Ok(restored)
}

/// Writes entries below a folder. What cannot be restored as it was is told at the end, and does not keep the rest from being.
#[derive(Debug)]
pub struct TreeWriter {
    root: OwnedFd,
    selected: Vec<RawText>,
    /// The folder that was used last.
    folder: Option<(Vec<u8>, OwnedFd)>,
    open: Option<(Entry, File)>,
    /// What is to be set when nothing comes into them any more.
    folders: Vec<Entry>,
    restored: Restored,
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// The folder of a path, and its name there.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(cut) => (
            path.get(..cut).unwrap_or_default(),
            path.get(cut + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

impl TreeWriter {
    /// Below this folder, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be made, or is none.
    pub fn new(root: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(root)?;
        let root = fs::open(root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            root,
            selected: Vec::new(),
            folder: None,
            open: None,
            folders: Vec::new(),
            restored: Restored::default(),
        })
    }

    /// Only these, and what is below them; all if there are none.
    pub fn select(&mut self, paths: Vec<RawText>) {
        self.selected = paths;
    }

    /// Opens a folder below the root; it is made if it is not there.
    fn folder(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        if path.is_empty() {
            return Ok(fs::openat(&self.root, c".", flags, Mode::empty())?);
        }
        match fs::openat2(&self.root, path, flags, Mode::empty(), beneath()) {
            Ok(folder) => return Ok(folder),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mut at = fs::openat(&self.root, c".", flags, Mode::empty())?;
        for part in path.split(|byte| *byte == b'/') {
            match fs::mkdirat(&at, part, Mode::RWXU) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at = fs::openat2(&at, part, flags, Mode::empty(), beneath())?;
        }
        Ok(at)
    }

    fn folder_of(&mut self, path: &[u8]) -> io::Result<&OwnedFd> {
        let (above, _) = split(path);
        if self.folder.as_ref().is_none_or(|(known, _)| known != above) {
            let opened = self.folder(above)?;
            self.folder = Some((above.to_vec(), opened));
        }
        match &self.folder {
            Some((_, folder)) => Ok(folder),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Makes the entry; a file whose content comes if it is one.
    fn make(&mut self, entry: &Entry) -> io::Result<Option<File>> {
        let path = &entry.path.0;
        check::path(path).map_err(io::Error::other)?;
        if path.is_empty() {
            return Ok(None);
        }
        let (_, name) = split(path);
        let folder = self.folder_of(path)?;
        let secret = Mode::RUSR | Mode::WUSR;
        match &entry.kind {
            Kind::Directory {} => match fs::mkdirat(folder, name, Mode::RWXU) {
                Ok(()) => {}
                Err(rustix::io::Errno::EXIST) => {
                    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    drop(fs::openat(folder, name, flags, Mode::empty())?);
                }
                Err(error) => return Err(error.into()),
            },
            Kind::File { .. } | Kind::Disk { .. } => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                return Ok(Some(File::from(fs::openat(folder, name, flags, secret)?)));
            }
            Kind::Symlink { target } => fs::symlinkat(target.as_os_str(), folder, name)?,
            Kind::HardLink { to } => {
                check::path(&to.0).map_err(io::Error::other)?;
                let (above, other) = split(&to.0);
                let from = self.folder(above)?;
                let folder = self.folder_of(path)?;
                fs::linkat(&from, other, folder, name, AtFlags::empty())?;
            }
            Kind::Fifo {} => fs::mknodat(folder, name, FileType::Fifo, secret, 0)?,
            Kind::CharacterDevice { major, minor } => {
                let device = fs::makedev(*major, *minor);
                fs::mknodat(folder, name, FileType::CharacterDevice, secret, device)?;
            }
            Kind::BlockDevice { major, minor } => {
                let device = fs::makedev(*major, *minor);
                fs::mknodat(folder, name, FileType::BlockDevice, secret, device)?;
            }
        }
        Ok(None)
    }

    /// Owner, permissions, attributes and times of what was made.
    fn describe(&mut self, entry: &Entry) {
        if let Kind::HardLink { .. } = entry.kind {
            return;
        }
        let mut problems = Vec::new();
        if let Err(error) = self.set(entry, &mut problems) {
            problems.push(error.to_string());
        }
        for problem in problems {
            self.restored.problem(&entry.path, &problem);
        }
    }

    fn set(&mut self, entry: &Entry, problems: &mut Vec<String>) -> io::Result<()> {
        let path = &entry.path.0;
        let root = self.folder(b"")?;
        let is_root = path.is_empty();
        let (folder, name): (&OwnedFd, &[u8]) = match is_root {
            true => (&root, b"."),
            false => (self.folder_of(path)?, split(path).1),
        };
        let mut note = |what: &str, done: rustix::io::Result<()>| {
            if let Err(error) = &done {
                problems.push(format!("{what}: {error}"));
            }
            done.is_ok()
        };
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let now = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let owned = (now.st_uid, now.st_gid) == (entry.uid, entry.gid)
            || note(
                "its owner could not be set",
                fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW),
            );
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            // A program that acts for another owner than it did before would be a gift.
            let bits = if owned { 0o7777 } else { 0o1777 };
            let mode = Mode::from_raw_mode(entry.mode & bits);
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let is_plain = matches!(
                entry.kind,
                Kind::File { .. } | Kind::Disk { .. } | Kind::Directory {}
            );
            match is_plain {
                true => {
                    let file = fs::openat(folder, name, flags, Mode::empty())?;
                    for xattr in &entry.xattrs {
                        let set =
                            fs::fsetxattr(&file, xattr.name.as_os_str(), &xattr.value.0, XattrFlags::empty());
                        note(&format!("attribute {} could not be set", xattr.name), set);
                    }
                    note("its mode could not be set", fs::fchmod(&file, mode));
                }
                false => {
                    // It was made a moment ago, in a folder that is held open.
                    note(
                        "its mode could not be set",
                        fs::chmodat(folder, name, mode, AtFlags::empty()),
                    );
                }
            }
        }
        let times = Timestamps {
            last_access: timespec(entry.accessed.unwrap_or(entry.modified)),
            last_modification: timespec(entry.modified),
        };
        note(
            "its times could not be set",
            fs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW),
        );
        Ok(())
    }

    /// Sets what can only be set at the end, and tells what was done.
    pub fn finish(mut self) -> Restored {
        // Those below first: what is set in them changes the times of those above.
        for entry in std::mem::take(&mut self.folders).into_iter().rev() {
            self.describe(&entry);
        }
        if let Err(error) = fs::syncfs(self.root.as_fd()) {
            self.restored
                .problem(&RawText::default(), &format!("it may not be durable: {error}"));
        }
        self.restored
    }
}

fn timespec(time: Time) -> Timespec {
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}

impl Sink for TreeWriter {
    fn entry(&mut self, _number: u64, entry: &Entry) -> io::Result<bool> {
        self.open = None;
        if !is_selected(&self.selected, &entry.path) {
            return Ok(false);
        }
        match self.make(entry) {
            Ok(file) => {
                self.restored.entries += 1;
                match (file, &entry.kind) {
                    (Some(file), _) => {
                        self.open = Some((entry.clone(), file));
                        return Ok(true);
                    }
                    (None, Kind::Directory {}) => self.folders.push(entry.clone()),
                    (None, _) => self.describe(entry),
                }
            }
            Err(error) => self
                .restored
                .problem(&entry.path, &format!("could not be made: {error}")),
        }
        Ok(false)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some((_, file)) = &self.open {
            self.restored.bytes += bytes.len() as u64;
            file.write_all_at(bytes, offset)?;
        }
        Ok(())
    }

    fn zeroes(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        // The file is new: it is zero.
        Ok(())
    }

    fn end(&mut self, problem: Option<&str>) -> io::Result<()> {
        if let Some((entry, file)) = self.open.take() {
            file.set_len(entry.size())?;
            drop(file);
            self.describe(&entry);
            if let Some(problem) = problem {
                let text = format!("was not whole when the backup was made: {problem}");
                self.restored.problem(&entry.path, &text);
            }
        }
        Ok(())
    }
}
