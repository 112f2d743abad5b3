//! A backup with those that it is built on: content that stays in a parent is fetched from there, by the parent's index.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::read::{ArchiveError, ArchiveReader, Record, read_commit};
use super::record::{Commit, DATA, ENTRY, EXTENTS, Header, IN_PARENT, ZEROES, numbers};
use crate::file::ReadAhead;
use crate::frame::{FrameReader, HEAD};
use crate::message::content;
use crate::plan::{Entry, Extent};

/// Most backups that are built on each other.
const MAX_CHAIN: usize = 64;

/// A backup that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// An archive cannot be read.
    #[error("{}", path.display())]
    Archive {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ArchiveError,
    },
    /// It is built on another one than is there.
    #[error("{} is built on backup {name}, and that is not there, or is another one now", path.display())]
    Parent {
        /// The archive.
        path: PathBuf,
        /// Its parent.
        name: String,
    },
    /// More than can be.
    #[error("{} is built on more than {MAX_CHAIN} backups, or on itself", path.display())]
    Long {
        /// The archive.
        path: PathBuf,
    },
    /// Who takes it cannot.
    #[error("what is read cannot be taken")]
    Sink(#[source] io::Error),
}

/// Who takes what is read. Errors end the reading.
pub trait Sink {
    /// An entry; whether its content is wanted.
    ///
    /// # Errors
    /// It cannot be taken; so for all methods.
    fn entry(&mut self, number: u64, entry: &Entry) -> io::Result<bool>;
    /// More extents of it.
    ///
    /// # Errors
    /// See [`Self::entry`].
    fn extents(&mut self, _extents: &[Extent]) -> io::Result<()> {
        Ok(())
    }
    /// Bytes of it.
    ///
    /// # Errors
    /// See [`Self::entry`].
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// A range of it that reads as zeroes.
    ///
    /// # Errors
    /// See [`Self::entry`].
    fn zeroes(&mut self, offset: u64, length: u64) -> io::Result<()>;
    /// It is complete; the agent could not read it to its end if there is a reason.
    ///
    /// # Errors
    /// See [`Self::entry`].
    fn end(&mut self, problem: Option<&str>) -> io::Result<()>;
}

/// An archive that is complete.
struct Link {
    path: PathBuf,
    file: File,
    stream: u64,
    header: Header,
    commit: Commit,
    /// Where reading of an entry has come to.
    cursor: Option<Cursor>,
}

struct Cursor {
    entry: u64,
    /// The next frame.
    position: u64,
    /// No byte before this one comes any more.
    offset: u64,
}

/// A backup with those that it is built on.
pub struct Chain {
    first: Link,
    /// What it is built on, the nearest first.
    below: Vec<Link>,
}

impl Chain {
    /// Opens an archive and those that it is built on, which are files of their names beside it.
    ///
    /// # Errors
    /// One is not complete, not there, or another one than it should be.
    pub fn open(path: PathBuf) -> Result<Self, ChainError> {
        let first = Link::open(path)?;
        let mut below: Vec<Link> = Vec::new();
        loop {
            let last = below.last().unwrap_or(&first);
            let Some(parent) = last.header.parent.clone() else {
                break;
            };
            let path = last.path.clone();
            if below.len() >= MAX_CHAIN {
                return Err(ChainError::Long { path });
            }
            let missing = || ChainError::Parent {
                path: path.clone(),
                name: parent.name.clone(),
            };
            crate::check::name(&parent.name).map_err(|_| missing())?;
            let beside = path.with_file_name(format!("{}.{}", parent.name, crate::store::ENDING));
            let link = Link::open(beside).map_err(|error| match error {
                ChainError::Archive {
                    source: ArchiveError::Frame(crate::frame::FrameError::Io(io)),
                    ..
                } if io.kind() == io::ErrorKind::NotFound => missing(),
                other => other,
            })?;
            if link.commit.digest != parent.digest {
                return Err(missing());
            }
            below.push(link);
        }
        Ok(Self { first, below })
    }

    /// The beginning of the backup.
    pub fn header(&self) -> &Header {
        &self.first.header
    }

    /// The end of the backup.
    pub fn commit(&self) -> &Commit {
        &self.first.commit
    }

    /// The archives that are needed, the backup's own first.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.first)
            .chain(&self.below)
            .map(|link| &link.path)
    }

    /// Finds all entries of the backup by its index, without reading their content. `take` also gets the extents that are not in the entry.
    ///
    /// # Errors
    /// Something is not as it was written, or `take` fails.
    pub fn entries(
        &mut self,
        mut take: impl FnMut(u64, &Entry, &[Extent]) -> io::Result<()>,
    ) -> Result<(), ChainError> {
        let path = self.first.path.clone();
        let failed = |source| ChainError::Archive {
            path: path.clone(),
            source,
        };
        for number in 0..self.first.commit.entries {
            let (entry, more) = self.first.entry(number).map_err(failed)?;
            take(number, &entry, &more).map_err(ChainError::Sink)?;
        }
        Ok(())
    }

    /// Reads all of the backup, and what it needs of those below it. All checksums of the backup itself are checked, and those of the frames
    /// that are read below it.
    ///
    /// # Errors
    /// Something is not as it was written, or `sink` fails. What `sink` got before is right up to the last entry that ended.
    pub fn read(&mut self, sink: &mut dyn Sink) -> Result<(), ChainError> {
        let Self { first, below } = self;
        let path = first.path.clone();
        let failed = |source| ChainError::Archive {
            path: path.clone(),
            source,
        };
        let ahead = ReadAhead::of(&first.file, &first.path).map_err(|error| failed(error.into()))?;
        let mut reader = ArchiveReader::new(ahead);
        let mut wanted = false;
        while let Some(record) = reader.read().map_err(failed)? {
            match record {
                Record::Header(_) | Record::Commit(_) => {}
                Record::Entry(number, entry) => {
                    wanted = sink.entry(number, &entry).map_err(ChainError::Sink)?;
                }
                Record::Extents(extents) if wanted => sink.extents(&extents).map_err(ChainError::Sink)?,
                Record::Data { offset, bytes } if wanted => {
                    sink.data(offset, bytes).map_err(ChainError::Sink)?;
                }
                Record::Zeroes { offset, length } if wanted => {
                    sink.zeroes(offset, length).map_err(ChainError::Sink)?;
                }
                Record::InParent {
                    offset,
                    length,
                    entry,
                    at,
                } if wanted => {
                    let want = Want {
                        entry,
                        at,
                        length,
                        offset,
                    };
                    fetch(below, &path, want, sink)?;
                }
                Record::EntryEnd(end) if wanted => {
                    sink.end(end.problem.as_deref()).map_err(ChainError::Sink)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Bytes of an entry of a parent, and where they belong.
#[derive(Debug, Clone, Copy)]
struct Want {
    entry: u64,
    at: u64,
    length: u64,
    offset: u64,
}

/// Finds bytes in the first of `links`, or in those below it.
fn fetch(links: &mut [Link], above: &Path, want: Want, sink: &mut dyn Sink) -> Result<(), ChainError> {
    let Some((link, below)) = links.split_first_mut() else {
        return Err(ChainError::Parent {
            path: above.to_owned(),
            name: String::new(),
        });
    };
    let path = link.path.clone();
    let failed = |source| ChainError::Archive {
        path: path.clone(),
        source,
    };
    let (mut at, end) = (want.at, want.at.saturating_add(want.length));
    while at < end {
        let found = link.piece(want.entry, at).map_err(failed)?;
        // What is in no piece is a hole.
        let (piece, covers) = match found {
            Some((_, covers)) if covers.0 > at => (Piece::Zeroes, (at, covers.0)),
            Some(found) => found,
            None => (Piece::Zeroes, (at, end)),
        };
        let stop = end.min(covers.1);
        let offset = want.offset + (at - want.at);
        match piece {
            Piece::Data(bytes) => {
                let range = usize::try_from(at - covers.0).unwrap_or(0)
                    ..usize::try_from(stop - covers.0).unwrap_or(0);
                let bytes = bytes.get(range).unwrap_or_default();
                sink.data(offset, bytes).map_err(ChainError::Sink)?;
            }
            Piece::Zeroes => sink.zeroes(offset, stop - at).map_err(ChainError::Sink)?,
            Piece::InParent { entry, at: there } => {
                let want = Want {
                    entry,
                    at: there + (at - covers.0),
                    length: stop - at,
                    offset,
                };
                fetch(below, &path, want, sink)?;
            }
        }
        at = stop;
    }
    Ok(())
}

/// A piece, and the bytes of the entry from and up to which it is.
type Found = (Piece, (u64, u64));

enum Piece {
    Data(Vec<u8>),
    Zeroes,
    InParent { entry: u64, at: u64 },
}

impl Link {
    fn open(path: PathBuf) -> Result<Self, ChainError> {
        let opened = (|| {
            let mut file = File::open(&path)?;
            let found = read_commit(&mut file)?;
            file.seek(SeekFrom::Start(0))?;
            let mut reader = ArchiveReader::new(BufReader::new(&file));
            let header = match reader.read()? {
                Some(Record::Header(header)) => *header,
                _ => return Err(ArchiveError::Incomplete { entries: 0 }),
            };
            let stream = reader.state().stream;
            match found {
                Some((of, commit)) if of == stream => Ok((file, stream, header, commit)),
                _ => Err(ArchiveError::Incomplete { entries: 0 }),
            }
        })();
        match opened {
            Ok((file, stream, header, commit)) => Ok(Self {
                path,
                file,
                stream,
                header,
                commit,
                cursor: None,
            }),
            Err(source) => Err(ChainError::Archive { path, source }),
        }
    }

    /// Where an entry begins, by the index.
    fn position_of(&mut self, entry: u64) -> Result<u64, ArchiveError> {
        let nonsense = |reason: &str| ArchiveError::Nonsense {
            number: 0,
            reason: reason.into(),
        };
        if entry >= self.commit.entries {
            return Err(nonsense("there is no such entry"));
        }
        let per_frame = super::write::INDEX_ENTRIES as u64;
        let (frame, place) = (entry / per_frame, entry % per_frame);
        let at = frame
            .checked_mul(HEAD as u64 + per_frame * 8)
            .and_then(|skip| self.commit.index.checked_add(skip))
            .ok_or_else(|| nonsense("there is no such entry"))?;
        self.file.seek(SeekFrom::Start(at + (HEAD as u64) + place * 8))?;
        let mut number = [0; 8];
        self.file.read_exact(&mut number)?;
        Ok(u64::from_le_bytes(number))
    }

    /// An entry, and its extents that are in frames of their own.
    fn entry(&mut self, number: u64) -> Result<(Entry, Vec<Extent>), ArchiveError> {
        let nonsense = |reason: String| ArchiveError::Nonsense { number: 0, reason };
        let position = self.position_of(number)?;
        self.file.seek(SeekFrom::Start(position))?;
        let mut frames = FrameReader::new(BufReader::new(&self.file), Some(self.stream), None);
        let mut found: Option<Entry> = None;
        let mut more = Vec::new();
        while let Some(head) = frames.read()? {
            match (head.kind, &found) {
                (ENTRY, None) => {
                    let entry: Entry = serde_json::from_slice(frames.payload())
                        .map_err(|error| nonsense(error.to_string()))?;
                    crate::check::entry(&entry).map_err(|error| nonsense(error.to_string()))?;
                    found = Some(entry);
                }
                (EXTENTS, Some(_)) => {
                    let extents: Vec<Extent> = serde_json::from_slice(frames.payload())
                        .map_err(|error| nonsense(error.to_string()))?;
                    more.extend(extents);
                }
                // Extents are among the content that came with them.
                (DATA | ZEROES | IN_PARENT, Some(entry)) if entry.has_more() => {}
                _ => break,
            }
        }
        let entry = found.ok_or_else(|| nonsense(format!("the index does not lead to entry {number}")))?;
        Ok((entry, more))
    }

    /// The first piece of an entry that ends behind byte `at`, and the bytes that it covers.
    fn piece(&mut self, entry: u64, at: u64) -> Result<Option<Found>, ArchiveError> {
        let nonsense = |reason: &str| ArchiveError::Nonsense {
            number: 0,
            reason: reason.into(),
        };
        let position = match &self.cursor {
            Some(cursor) if cursor.entry == entry && cursor.offset <= at => cursor.position,
            _ => self.position_of(entry)?,
        };
        self.file.seek(SeekFrom::Start(position))?;
        let mut frames = FrameReader::new(
            BufReader::with_capacity(64 << 10, &self.file),
            Some(self.stream),
            None,
        );
        let mut position = position;
        while let Some(head) = frames.read()? {
            let here = position;
            position += (HEAD + head.length) as u64;
            let payload = frames.payload();
            let found = match head.kind {
                ENTRY | EXTENTS => None,
                DATA => {
                    let (offset, bytes) =
                        content(payload).ok_or_else(|| nonsense("a piece makes no sense"))?;
                    let end = offset + bytes.len() as u64;
                    (end > at).then(|| (Piece::Data(bytes.to_vec()), (offset, end)))
                }
                ZEROES => {
                    let [offset, length] =
                        numbers(payload).ok_or_else(|| nonsense("a piece makes no sense"))?;
                    let end = offset.saturating_add(length);
                    (end > at).then_some((Piece::Zeroes, (offset, end)))
                }
                IN_PARENT => {
                    let [offset, length, entry, there] =
                        numbers(payload).ok_or_else(|| nonsense("a piece makes no sense"))?;
                    let end = offset.saturating_add(length);
                    there
                        .checked_add(length)
                        .ok_or_else(|| nonsense("a piece makes no sense"))?;
                    (end > at).then_some((Piece::InParent { entry, at: there }, (offset, end)))
                }
                _ => break,
            };
            if let Some((piece, covers)) = found {
                // The same piece may have the next byte as well.
                self.cursor = Some(Cursor {
                    entry,
                    position: here,
                    offset: covers.0,
                });
                return Ok(Some((piece, covers)));
            }
        }
        Ok(None)
    }
}
