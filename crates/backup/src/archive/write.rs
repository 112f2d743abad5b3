//! Archives are written.

use std::io::{self, Write};

use serde::Serialize;

use super::record::{
    COMMIT, COMMIT_FRAME, Commit, DATA, ENTRY, ENTRY_END, EXTENTS, EntryEnd, HEADER, Header, IN_PARENT,
    INDEX, ZEROES,
};
use super::state::{Mark, State};
use crate::frame::{FrameWriter, HEAD};
use crate::message::Progress;
use crate::plan::{Entry, Extent};

/// Entries in one frame of the index.
pub(super) const INDEX_ENTRIES: usize = 128 << 10;

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// From devices, directly.
    Devices,
    /// From the storage manager, or an image.
    Export,
    /// From the agent.
    Agent,
}

/// Writes an archive.
#[derive(Debug)]
pub struct ArchiveWriter<W: Write> {
    frames: FrameWriter<W>,
    state: State,
}

impl<W: Write> ArchiveWriter<W> {
    /// Begins an archive. `stream` is a random number.
    ///
    /// # Errors
    /// What is below fails; so for all methods.
    pub fn begin(to: W, stream: u64, header: &Header) -> io::Result<Self> {
        let mut writer = Self {
            frames: FrameWriter::new(to, stream, 0),
            state: State::new(stream),
        };
        let json = json(header)?;
        writer.state.of_archive(&json);
        writer.put(HEADER, &[&json])?;
        Ok(writer)
    }

    /// Goes on where [`super::ArchiveReader`] has come to. `to` writes behind that.
    pub fn resume(to: W, state: State) -> Self {
        Self {
            frames: FrameWriter::new(to, state.stream, state.number),
            state,
        }
    }

    /// Goes back to a place that was passed. What is below is to be cut there, before more is written.
    pub(crate) fn go_back(&mut self, mark: Mark) {
        self.state.go_back(mark);
        self.frames.set_number(self.state.number);
    }

    /// How far it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What is below.
    pub fn get_mut(&mut self) -> &mut W {
        self.frames.get_mut()
    }

    fn put(&mut self, kind: u16, parts: &[&[u8]]) -> io::Result<()> {
        self.frames.write(kind, parts)?;
        self.state.passed(parts.iter().map(|part| part.len()).sum());
        Ok(())
    }

    fn of_entry(&mut self, kind: u16, parts: &[&[u8]]) -> io::Result<()> {
        self.state.of_entry(kind, parts);
        self.put(kind, parts)
    }

    /// An entry begins; its content follows, then [`Self::end_entry`].
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        self.state.begin_entry();
        self.state.last = Some(entry.path.clone());
        self.of_entry(ENTRY, &[&json(entry)?])
    }

    /// More extents of the entry.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn extents(&mut self, extents: &[Extent]) -> io::Result<()> {
        self.of_entry(EXTENTS, &[&json(&extents)?])
    }

    /// Bytes of the entry, at most [`crate::message::MAX_CONTENT`]; offsets ascend.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn data(&mut self, offset: u64, bytes: &[u8], from: From) -> io::Result<()> {
        let length = bytes.len() as u64;
        let progress = self.state.entry_progress();
        progress.bytes += length;
        *match from {
            From::Devices => &mut progress.from_devices,
            From::Export => &mut progress.from_export,
            From::Agent => &mut progress.from_agent,
        } += length;
        self.of_entry(DATA, &[&offset.to_le_bytes(), bytes])
    }

    /// A range that reads as zeroes.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn zeroes(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.of_entry(ZEROES, &[&offset.to_le_bytes(), &length.to_le_bytes()])
    }

    /// A range whose bytes are in the parent, there in entry number `entry` at `at`.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn in_parent(&mut self, offset: u64, length: u64, entry: u64, at: u64) -> io::Result<()> {
        let progress = self.state.entry_progress();
        progress.bytes += length;
        progress.in_parent += length;
        let numbers = [offset, length, entry, at].map(u64::to_le_bytes);
        let [offset, length, entry, at] = &numbers;
        self.of_entry(IN_PARENT, &[offset, length, entry, at])
    }

    /// It was asked again where the entry's data are.
    pub fn moved(&mut self, times: u64) {
        self.state.entry_progress().moved += times;
    }

    /// The entry is complete.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn end_entry(&mut self, problem: Option<String>) -> io::Result<()> {
        if problem.is_some() {
            self.state.entry_progress().problems += 1;
        }
        let (digest, progress) = self.state.end_entry();
        let end = EntryEnd {
            digest,
            progress,
            problem,
        };
        let json = json(&end)?;
        self.put(ENTRY_END, &[&json])?;
        self.state.ended(&end, &json);
        Ok(())
    }

    /// Writes the index and the last frame. It is a backup when that is durable.
    ///
    /// # Errors
    /// See [`Self::begin`].
    pub fn commit(mut self) -> io::Result<(W, Commit)> {
        let index = self.state.position;
        let offsets = std::mem::take(&mut self.state.offsets);
        for part in offsets.chunks(INDEX_ENTRIES) {
            let bytes: Vec<u8> = part.iter().flat_map(|offset| offset.to_le_bytes()).collect();
            self.state.of_archive(&bytes);
            self.put(INDEX, &[&bytes])?;
        }
        let commit = Commit {
            entries: offsets.len() as u64,
            index,
            progress: self.state.progress,
            digest: self.state.digest(),
        };
        let mut json = json(&commit)?;
        let length = usize::try_from(COMMIT_FRAME).map_err(io::Error::other)? - HEAD;
        json.resize(length.max(json.len()), b' ');
        self.put(COMMIT, &[&json])?;
        self.frames.get_mut().flush()?;
        Ok((self.frames.into_inner(), commit))
    }

    /// What there is, without the entry that is being written.
    pub fn progress(&self) -> Progress {
        self.state.progress
    }
}

impl ArchiveWriter<Vec<u8>> {
    /// What was written so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.frames.into_inner()
    }
}

fn json(value: &impl Serialize) -> io::Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(io::Error::other)
}
