//! Archives are read, strictly forward, and nothing in them is believed.

use std::io::{self, Read, Seek, SeekFrom};

use aws_lc_rs::digest::{Context, SHA256};
use serde::de::DeserializeOwned;

use super::record::{
    COMMIT, COMMIT_FRAME, Commit, DATA, ENTRY, ENTRY_END, EXTENTS, EntryEnd, HEADER, Header, IN_PARENT,
    INDEX, VERSION, ZEROES, numbers,
};
use super::state::State;
use crate::check::{self, PlanError};
use crate::frame::{FrameError, FrameReader, Head};
use crate::message::content;
use crate::plan::{Entry, Extent};

/// An archive that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A frame cannot be read.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It ends before its last frame: it was never complete, or its end is lost.
    #[error("it is not complete: it has {entries} whole entries and no end")]
    Incomplete {
        /// Entries that are whole.
        entries: u64,
    },
    /// It is of another version, or has features that this program does not know.
    #[error("it is of version {version} with features {features:#x}; this program reads version {VERSION}")]
    Version {
        /// Its version.
        version: u32,
        /// Features that are not known.
        features: u64,
    },
    /// A frame does not make sense where it is.
    #[error("frame {number}: {reason}")]
    Nonsense {
        /// The frame.
        number: u64,
        /// Why.
        reason: String,
    },
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

impl ArchiveError {
    /// Whether it may be that the archive only was not finished, so that one can go on with what there is.
    pub fn is_unfinished(&self) -> bool {
        !matches!(
            self,
            Self::Version { .. } | Self::Frame(FrameError::Io(_)) | Self::Nonsense { .. }
        )
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// The beginning.
    Header(Box<Header>),
    /// An entry, with its number, counted from 0.
    Entry(u64, Box<Entry>),
    /// More extents of it.
    Extents(Vec<Extent>),
    /// Bytes of it.
    Data {
        /// Where in the entry.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range of it that reads as zeroes.
    Zeroes {
        /// Where in the entry.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A range of it whose bytes are in the parent.
    InParent {
        /// Where in the entry.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The number of the parent's entry.
        entry: u64,
        /// Where in that entry.
        at: u64,
    },
    /// The entry is complete, and its digest right.
    EntryEnd(Box<EntryEnd>),
    /// The archive is complete, and its digest right.
    Commit(Box<Commit>),
}

/// What may come next.
#[derive(Clone, Copy)]
enum Place {
    Start,
    /// Between entries.
    Between,
    /// In an entry of so many bytes, of which these are done.
    Within {
        size: u64,
        done: u64,
    },
    Index,
    End,
}

/// Reads an archive.
pub struct ArchiveReader<R> {
    frames: FrameReader<R>,
    place: Place,
    state: State,
    /// Of the offsets of all entries, and of what the index says.
    offsets: (Context, Context),
    indexed: u64,
    has_parent: bool,
    index_at: u64,
}

impl<R: Read> ArchiveReader<R> {
    /// An archive from its first byte on.
    pub fn new(from: R) -> Self {
        Self {
            frames: FrameReader::new(from, None, Some(0)),
            place: Place::Start,
            state: State::new(0),
            offsets: (Context::new(&SHA256), Context::new(&SHA256)),
            indexed: 0,
            has_parent: false,
            index_at: 0,
        }
    }

    /// How far it is. After [`Record::EntryEnd`], a writer can go on from here.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The same, when nothing more is to be read.
    pub(crate) fn into_state(self) -> State {
        self.state
    }

    fn nonsense(&self, reason: impl Into<String>) -> ArchiveError {
        ArchiveError::Nonsense {
            number: self.state.number,
            reason: reason.into(),
        }
    }

    fn json<T: DeserializeOwned>(&self) -> Result<T, ArchiveError> {
        serde_json::from_slice(self.frames.payload()).map_err(|error| self.nonsense(error.to_string()))
    }

    /// What comes next; none after the end.
    ///
    /// # Errors
    /// See [`ArchiveError`]. Afterwards nothing that follows can be read.
    pub fn read(&mut self) -> Result<Option<Record<'_>>, ArchiveError> {
        loop {
            let Some(head) = self.frames.read()? else {
                return match self.place {
                    Place::End => Ok(None),
                    _ => Err(ArchiveError::Incomplete {
                        entries: self.state.progress.entries,
                    }),
                };
            };
            if matches!(self.place, Place::End) {
                return Err(self.nonsense("something follows the end"));
            }
            match head.kind {
                INDEX => {
                    self.index()?;
                    self.state.passed(head.length);
                }
                _ => return self.record(head).map(Some),
            }
        }
    }

    fn record(&mut self, head: Head) -> Result<Record<'_>, ArchiveError> {
        let length = head.length;
        match (head.kind, self.place) {
            (HEADER, Place::Start) => {
                let header: Header = self.json()?;
                self.check_header(&header)?;
                self.state.stream = self.frames.stream().unwrap_or_default();
                self.state.of_archive(self.frames.payload());
                self.state.passed(length);
                self.has_parent = header.parent.is_some();
                self.place = Place::Between;
                Ok(Record::Header(Box::new(header)))
            }
            (ENTRY, Place::Between) => {
                let entry: Entry = self.json()?;
                check::entry(&entry).map_err(|error| self.nonsense(error.to_string()))?;
                let number = self.state.offsets.len() as u64;
                if number >= crate::plan::MAX_ENTRIES {
                    return Err(self.nonsense("there are too many entries"));
                }
                self.offsets.0.update(&self.state.position.to_le_bytes());
                self.state.begin_entry();
                self.state.last = Some(entry.path.clone());
                self.of_entry(head);
                let size = entry.size();
                self.place = Place::Within { size, done: 0 };
                Ok(Record::Entry(number, Box::new(entry)))
            }
            (EXTENTS, Place::Within { .. }) => {
                let extents = self.json()?;
                self.of_entry(head);
                Ok(Record::Extents(extents))
            }
            (DATA, Place::Within { .. }) => {
                let range =
                    content(self.frames.payload()).map(|(offset, bytes)| (offset, bytes.len() as u64));
                let (offset, length) = self.within(range)?;
                let progress = self.state.entry_progress();
                progress.bytes = progress.bytes.saturating_add(length);
                self.of_entry(head);
                let bytes = self.frames.payload().get(8..).unwrap_or_default();
                Ok(Record::Data { offset, bytes })
            }
            (ZEROES, Place::Within { .. }) => {
                let range = numbers::<2>(self.frames.payload()).map(|[offset, length]| (offset, length));
                let (offset, length) = self.within(range)?;
                self.of_entry(head);
                Ok(Record::Zeroes { offset, length })
            }
            (IN_PARENT, Place::Within { .. }) => {
                let found = numbers::<4>(self.frames.payload());
                let (offset, length) = self.within(found.map(|[offset, length, ..]| (offset, length)))?;
                let [.., entry, at] = found.unwrap_or_default();
                if !self.has_parent || at.checked_add(length).is_none() {
                    return Err(self.nonsense("it names a parent that there is not"));
                }
                let progress = self.state.entry_progress();
                progress.bytes = progress.bytes.saturating_add(length);
                progress.in_parent = progress.in_parent.saturating_add(length);
                self.of_entry(head);
                Ok(Record::InParent {
                    offset,
                    length,
                    entry,
                    at,
                })
            }
            (ENTRY_END, Place::Within { .. }) => {
                let end: EntryEnd = self.json()?;
                if end.digest != self.state.end_entry().0 {
                    return Err(self.nonsense("the digest of the entry is wrong"));
                }
                self.state.ended(&end, self.frames.payload());
                self.state.passed(length);
                self.place = Place::Between;
                Ok(Record::EntryEnd(Box::new(end)))
            }
            (COMMIT, Place::Between | Place::Index) => {
                let commit: Commit = self.json()?;
                self.check_commit(&commit, head)?;
                self.state.passed(length);
                self.place = Place::End;
                Ok(Record::Commit(Box::new(commit)))
            }
            (kind, _) => Err(self.nonsense(format!("kind {kind} has no place here"))),
        }
    }

    fn of_entry(&mut self, head: Head) {
        self.state.of_entry(head.kind, &[self.frames.payload()]);
        self.state.passed(head.length);
    }

    /// Ranges ascend, and lie within the entry.
    fn within(&mut self, range: Option<(u64, u64)>) -> Result<(u64, u64), ArchiveError> {
        if let (Some((offset, length)), Place::Within { size, done }) = (range, &mut self.place)
            && offset >= *done
            && length > 0
            && let Some(end) = offset.checked_add(length).filter(|end| *end <= *size)
        {
            *done = end;
            return Ok((offset, length));
        }
        Err(self.nonsense("a range does not lie within its entry, behind those before it"))
    }

    fn check_header(&self, header: &Header) -> Result<(), ArchiveError> {
        if header.version != VERSION || header.incompatible != 0 {
            return Err(ArchiveError::Version {
                version: header.version,
                features: header.incompatible,
            });
        }
        check::plan(&header.plan).map_err(|error: PlanError| self.nonsense(error.to_string()))?;
        if header.image.len() != header.plan.disks.len() {
            return Err(self.nonsense("the disks are not those of the plan"));
        }
        Ok(())
    }

    fn index(&mut self) -> Result<(), ArchiveError> {
        match self.place {
            Place::Between => self.index_at = self.state.position,
            Place::Index => {}
            _ => return Err(self.nonsense("the index has no place here")),
        }
        self.place = Place::Index;
        let payload = self.frames.payload();
        if payload.is_empty() || !payload.len().is_multiple_of(8) {
            return Err(self.nonsense("it is no part of an index"));
        }
        self.indexed += (payload.len() / 8) as u64;
        self.offsets.1.update(payload);
        self.state.of_archive(payload);
        Ok(())
    }

    fn check_commit(&mut self, commit: &Commit, head: Head) -> Result<(), ArchiveError> {
        if matches!(self.place, Place::Between) {
            self.index_at = self.state.position;
        }
        let same = self.offsets.0.clone().finish().as_ref() == self.offsets.1.clone().finish().as_ref();
        let entries = self.state.offsets.len() as u64;
        if !same || self.indexed != entries || commit.entries != entries || commit.index != self.index_at {
            return Err(self.nonsense("the index is not that of the entries"));
        }
        if commit.digest != self.state.digest() || commit.progress != self.state.progress {
            return Err(self.nonsense("the digest of the archive is wrong"));
        }
        match (crate::frame::HEAD + head.length) as u64 == COMMIT_FRAME {
            true => Ok(()),
            false => Err(self.nonsense("the last frame has another length")),
        }
    }
}

/// The last frame of an archive, without reading what is before it. None if it has none.
///
/// # Errors
/// The file fails.
pub fn read_commit(file: &mut (impl Read + Seek)) -> io::Result<Option<(u64, Commit)>> {
    let length = file.seek(SeekFrom::End(0))?;
    let Some(start) = length.checked_sub(COMMIT_FRAME) else {
        return Ok(None);
    };
    file.seek(SeekFrom::Start(start))?;
    let mut frames = FrameReader::new(file, None, None);
    match frames.read() {
        Ok(Some(head)) if head.kind == COMMIT => {
            let commit = serde_json::from_slice::<Commit>(frames.payload()).ok();
            Ok(commit
                .filter(|commit| commit.index < start || commit.entries == 0)
                .map(|commit| (frames.stream().unwrap_or_default(), commit)))
        }
        Err(FrameError::Io(error)) => Err(error),
        _ => Ok(None),
    }
}
