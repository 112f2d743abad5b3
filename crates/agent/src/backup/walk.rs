//! What is in the folders of a frozen image: entries of a plan, each folder before what is in it, in an order that is the same each time.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use backup::RawText;
use backup::plan::{Content, Entry, Extent, Kind, MAX_EXTENTS_OF_ENTRY, MAX_PATH, Place};
use rustix::fs::{Dir, FileType, Stat};

use super::fiemap::{self, Piece};
use super::glob::Glob;
use super::locate::{System, Tree};
use super::meta::{Held, modified};
use super::{signals, snapshot};
use crate::host::AgentError;

/// Most extents of a file on a logical volume, whose stripes are extents of their own: the bytes of a file with more go through the agent, as
/// it would need much memory for them.
const MAX_RUNS: u64 = 1 << 20;

/// What takes the entries of a walk.
pub(crate) trait Sink {
    /// An entry; with its file if its content is to be sent.
    fn entry(&mut self, entry: Entry, content: Option<File>) -> Result<(), AgentError>;
    /// Something that cannot be backed up; the walk goes on.
    fn problem(&mut self, path: &[u8], reason: &str);
}

/// A walk through trees of one file system.
pub(crate) struct Walk<'a> {
    pub(crate) system: &'a System,
    /// The numbers of its disks in the plan.
    pub(crate) disks: &'a [u32],
    pub(crate) exclude: &'a [Glob],
    /// Names of files that have several: those that have been met, by their number in the file system.
    seen: HashMap<u64, RawText>,
}

/// A folder that is being walked through.
struct Level {
    folder: OwnedFd,
    path: Vec<u8>,
    /// What is still to come, the next one last.
    names: Vec<Vec<u8>>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(system: &'a System, disks: &'a [u32], exclude: &'a [Glob]) -> Self {
        Self {
            system,
            disks,
            exclude,
            seen: HashMap::new(),
        }
    }

    /// Walks through a tree of the file system with this root.
    ///
    /// # Errors
    /// Of the sink, or the tree is not there.
    pub(crate) fn tree(
        &mut self,
        root: &OwnedFd,
        tree: &Tree,
        sink: &mut impl Sink,
    ) -> Result<(), AgentError> {
        let here = |source: io::Error| AgentError::Here {
            what: format!("/{} in the frozen image", tree.name.display()),
            source,
        };
        // One part after the other: no symbolic link leads out of the image.
        let mut folder = inner_folder(root, b".").map_err(here)?;
        for part in tree.inner.parent().into_iter().flatten() {
            folder = inner_folder(&folder, part.as_bytes()).map_err(here)?;
        }
        let name = tree.inner.file_name().map_or(&b"."[..], |name| name.as_bytes());
        let path = tree.name.as_os_str().as_bytes();
        let held = Held::open(&folder, name).map_err(here)?;
        let mut levels: Vec<Level> = self
            .visit(&folder, name, &held, path, sink)?
            .into_iter()
            .collect();
        while let Some(level) = levels.last_mut() {
            signals::check()?;
            let Some(name) = level.names.pop() else {
                levels.pop();
                continue;
            };
            let mut path = level.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            if self.exclude.iter().any(|glob| glob.matches(&path)) {
                continue;
            }
            if path.len() > MAX_PATH {
                sink.problem(&path, "its path is longer than a backup takes");
                continue;
            }
            let inside = match Held::open(&level.folder, &name) {
                Ok(held) => self.visit(&level.folder, &name, &held, &path, sink)?,
                Err(error) => {
                    sink.problem(&path, &error.to_string());
                    None
                }
            };
            levels.extend(inside);
        }
        Ok(())
    }

    /// Tells of one name; what is in it, if it is a folder.
    fn visit(
        &mut self,
        folder: &OwnedFd,
        name: &[u8],
        held: &Held,
        path: &[u8],
        sink: &mut impl Sink,
    ) -> Result<Option<Level>, AgentError> {
        match self.look(folder, name, held, path) {
            Ok((None, _, _)) => Ok(None),
            Ok((Some(entry), content, level)) => {
                sink.entry(entry, content)?;
                Ok(level)
            }
            Err(error) => {
                sink.problem(path, &error.to_string());
                Ok(None)
            }
        }
    }

    #[allow(clippy::type_complexity)]
    fn look(
        &mut self,
        folder: &OwnedFd,
        name: &[u8],
        held: &Held,
        path: &[u8],
    ) -> io::Result<(Option<Entry>, Option<File>, Option<Level>)> {
        let stat = held.stat()?;
        let mut level = None;
        let mut content = None;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let known = self
            .seen
            .get(&stat.st_ino)
            .filter(|_| file_type != FileType::Directory)
            .cloned();
        let kind = match file_type {
            _ if known.is_some() => Kind::HardLink {
                to: known.unwrap_or_default(),
            },
            FileType::Directory => {
                level = Some(inside(folder, name, path)?);
                Kind::Directory {}
            }
            FileType::RegularFile => {
                let file = snapshot::open(folder, name)?;
                let kind = self.file(&file, &stat)?;
                if matches!(
                    &kind,
                    Kind::File {
                        content: Content::Stream {},
                        ..
                    }
                ) {
                    content = Some(file);
                }
                kind
            }
            FileType::Symlink => Kind::Symlink {
                target: RawText(held.link()?),
            },
            FileType::Fifo => Kind::Fifo {},
            FileType::CharacterDevice => Kind::CharacterDevice {
                major: libc::major(stat.st_rdev),
                minor: libc::minor(stat.st_rdev),
            },
            FileType::BlockDevice => Kind::BlockDevice {
                major: libc::major(stat.st_rdev),
                minor: libc::minor(stat.st_rdev),
            },
            // A socket is nothing without the program that has it open.
            _ => return Ok((None, None, None)),
        };
        let linked = matches!(kind, Kind::HardLink { .. });
        if stat.st_nlink > 1 && file_type != FileType::Directory && !linked {
            self.seen.insert(stat.st_ino, RawText(path.to_vec()));
        }
        let entry = Entry {
            path: RawText(path.to_vec()),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: modified(&stat),
            accessed: None,
            // Those of the first name are those of all.
            xattrs: if linked { Vec::new() } else { held.xattrs()? },
            kind,
        };
        Ok((Some(entry), content, level))
    }

    /// Where a piece is, in extents behind those that there are; false if it has no place, or there are too many.
    fn place(&self, piece: Piece, extents: &mut Vec<Extent>) -> bool {
        let most = match self.system.table {
            Some(_) => MAX_RUNS,
            None => MAX_EXTENTS_OF_ENTRY,
        };
        let mut push = |offset, length, at| {
            let has_room = (extents.len() as u64) < most;
            if has_room {
                extents.push(Extent { offset, length, at });
            }
            has_room
        };
        let on = |disk: usize, start| {
            let disk = self.disks.get(disk).copied()?;
            Some(Place { disk, start })
        };
        match (piece, &self.system.table) {
            (Piece::Content { .. }, _) => false,
            (Piece::Zeroes { offset, length }, _) => push(offset, length, None),
            #[rustfmt::skip]
            (Piece::Disk { offset, length, start }, None) => {
                on(0, start).is_some_and(|at| push(offset, length, Some(at)))
            },
            #[rustfmt::skip]
            (Piece::Disk { mut offset, length, start }, Some(table)) => {
                table.split(start, length, |disk, at, count| {
                    let from = offset;
                    offset += count;
                    on(disk, at).is_some_and(|at| push(from, count, Some(at)))
                })
            },
        }
    }

    /// Where the bytes of a file are.
    fn file(&self, file: &File, stat: &Stat) -> io::Result<Kind> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let pieces = fiemap::pieces(file, size, self.system.span)?;
        let mut extents = Vec::new();
        let all = pieces.into_iter().all(|piece| self.place(piece, &mut extents));
        if !all {
            return Ok(Kind::File {
                size,
                content: Content::Stream {},
            });
        }
        Ok(Kind::File {
            size,
            content: Content::Extents { extents, more: false },
        })
    }
}

fn inner_folder(folder: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

fn inside(parent: &OwnedFd, name: &[u8], path: &[u8]) -> io::Result<Level> {
    let folder = inner_folder(parent, name)?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    // The next one is taken from the end.
    names.sort_by(|a, b| b.cmp(a));
    Ok(Level {
        folder,
        path: path.to_vec(),
        names,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::backup::fiemap::Span;
    use crate::mounts::Mount;

    #[derive(Default)]
    struct Kept {
        entries: Vec<Entry>,
        contents: usize,
        problems: Vec<String>,
    }

    impl Sink for Kept {
        fn entry(&mut self, entry: Entry, content: Option<File>) -> Result<(), AgentError> {
            assert_eq!(content.is_some(), entry.is_streamed());
            self.contents += usize::from(content.is_some());
            self.entries.push(entry);
            Ok(())
        }

        fn problem(&mut self, path: &[u8], reason: &str) {
            self.problems
                .push(format!("{}: {reason}", String::from_utf8_lossy(path)));
        }
    }

    fn walk(folder: &Path, inner: &str, name: &str, exclude: &[&str]) -> Kept {
        let system = System {
            mount: Mount {
                device: (8, 1),
                root: "/".into(),
                point: "/".into(),
                kind: "ext4".into(),
            },
            disks: vec!["sda".into()],
            partition: None,
            span: Span {
                start: 0,
                length: u64::MAX,
            },
            table: None,
        };
        let exclude: Vec<Glob> = exclude.iter().map(|text| Glob::new(text)).collect();
        let tree = Tree {
            system: 0,
            inner: inner.into(),
            name: name.into(),
        };
        let root = OwnedFd::from(File::open(folder).unwrap());
        let mut kept = Kept::default();
        Walk::new(&system, &[3], &exclude)
            .tree(&root, &tree, &mut kept)
            .unwrap();
        kept
    }

    #[test]
    fn everything_in_a_tree_is_told_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("data/b/deep")).unwrap();
        fs::write(at("data/b/deep/file"), [1; 5000]).unwrap();
        fs::write(at("data/a"), "").unwrap();
        fs::hard_link(at("data/b/deep/file"), at("data/c")).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("data/link")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("data/pipe"), rustix::fs::Mode::RUSR).unwrap();
        fs::write(at("data/z.tmp"), "left out").unwrap();
        let odd = std::ffi::OsStr::from_bytes(b"data/odd\xff");
        fs::write(folder.path().join(odd), "x").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("data/socket")).unwrap();
        fs::write(at("other"), "not in it").unwrap();

        let kept = walk(folder.path(), "data", "srv/data", &["*.tmp"]);
        assert_eq!(kept.problems, Vec::<String>::new());
        let names: Vec<String> = kept.entries.iter().map(|entry| entry.path.to_string()).collect();
        let expected = [
            "srv/data",
            "srv/data/a",
            "srv/data/b",
            "srv/data/b/deep",
            "srv/data/b/deep/file",
            "srv/data/c",
            "srv/data/link",
            "srv/data/odd\\xff",
            "srv/data/pipe",
        ];
        assert_eq!(names, expected);
        let to = RawText(b"srv/data/b/deep/file".to_vec());
        assert_eq!(kept.entries[5].kind, Kind::HardLink { to });
        assert_eq!(kept.entries[4].size(), 5000);
        assert_eq!(kept.entries[8].kind, Kind::Fifo {});
        assert_eq!(
            kept.entries[6].kind,
            Kind::Symlink {
                target: "/nowhere".into()
            }
        );
    }

    #[test]
    fn a_source_may_be_one_file_or_the_root() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        let kept = walk(folder.path(), "file", "etc/file", &[]);
        assert_eq!(kept.entries.len(), 1);
        let kept = walk(folder.path(), "", "", &[]);
        let names: Vec<String> = kept.entries.iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(names, ["", "file"]);
        assert_eq!(kept.entries[0].kind, Kind::Directory {});
    }
}
