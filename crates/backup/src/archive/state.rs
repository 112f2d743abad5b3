//! How far an archive is: the same for who writes it and for who reads it, so that one can go on where the other has come to.

use aws_lc_rs::digest::{Context, SHA256};

use super::record::{EntryEnd, hex};
use crate::frame::HEAD;
use crate::message::Progress;
use crate::raw_text::RawText;

/// A place in an archive to which one can go back. It is small, however many entries there are.
#[derive(Clone)]
pub(crate) struct Mark {
    /// Bytes up to here.
    pub(crate) position: u64,
    number: u64,
    entries: usize,
    progress: Progress,
    pub(crate) last: Option<RawText>,
    digest: Context,
    entry: Context,
    entry_progress: Progress,
}

impl std::fmt::Debug for Mark {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Mark({})", self.position)
    }
}

/// How far an archive is.
#[derive(Clone)]
pub struct State {
    /// Bytes up to here.
    pub position: u64,
    /// The number of the next frame.
    pub number: u64,
    /// The random number of all frames.
    pub stream: u64,
    /// Where entries begin.
    pub offsets: Vec<u64>,
    /// What there is.
    pub progress: Progress,
    /// The path of the last entry.
    pub last: Option<RawText>,
    digest: Context,
    entry: Context,
    entry_progress: Progress,
}

impl State {
    pub(super) fn new(stream: u64) -> Self {
        Self {
            position: 0,
            number: 0,
            stream,
            offsets: Vec::new(),
            progress: Progress::default(),
            last: None,
            digest: Context::new(&SHA256),
            entry: Context::new(&SHA256),
            entry_progress: Progress::default(),
        }
    }

    /// This place.
    pub(crate) fn mark(&self) -> Mark {
        Mark {
            position: self.position,
            number: self.number,
            entries: self.offsets.len(),
            progress: self.progress,
            last: self.last.clone(),
            digest: self.digest.clone(),
            entry: self.entry.clone(),
            entry_progress: self.entry_progress,
        }
    }

    /// Goes back to a place that was passed.
    pub(crate) fn go_back(&mut self, mark: Mark) {
        self.position = mark.position;
        self.number = mark.number;
        self.offsets.truncate(mark.entries);
        self.progress = mark.progress;
        self.last = mark.last;
        self.digest = mark.digest;
        self.entry = mark.entry;
        self.entry_progress = mark.entry_progress;
    }

    /// A frame is behind.
    pub(super) fn passed(&mut self, length: usize) {
        self.position += (HEAD + length) as u64;
        self.number += 1;
    }

    /// An entry begins here.
    pub(super) fn begin_entry(&mut self) {
        self.offsets.push(self.position);
        self.entry = Context::new(&SHA256);
        self.entry_progress = Progress {
            entries: 1,
            ..Progress::default()
        };
    }

    /// A frame of the entry, in parts.
    pub(super) fn of_entry(&mut self, kind: u16, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.entry.update(&kind.to_le_bytes());
        // A frame is never longer.
        self.entry
            .update(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        for part in parts {
            self.entry.update(part);
        }
    }

    pub(super) fn entry_progress(&mut self) -> &mut Progress {
        &mut self.entry_progress
    }

    /// The digest of the entry up to here, and what it adds.
    pub(super) fn end_entry(&self) -> (String, Progress) {
        (hex(self.entry.clone().finish().as_ref()), self.entry_progress)
    }

    /// The entry has ended.
    pub(super) fn ended(&mut self, end: &EntryEnd, payload: &[u8]) {
        add(&mut self.progress, &end.progress);
        self.of_archive(payload);
    }

    /// A frame that the digest of the archive is of.
    pub(super) fn of_archive(&mut self, payload: &[u8]) {
        self.digest.update(payload);
    }

    pub(super) fn digest(&self) -> String {
        hex(self.digest.clone().finish().as_ref())
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("State")
            .field("position", &self.position)
            .field("entries", &self.offsets.len())
            .finish_non_exhaustive()
    }
}

/// Numbers that come from a file may be anything.
fn add(sum: &mut Progress, more: &Progress) {
    for (sum, more) in [
        (&mut sum.entries, more.entries),
        (&mut sum.bytes, more.bytes),
        (&mut sum.from_devices, more.from_devices),
        (&mut sum.from_export, more.from_export),
        (&mut sum.from_agent, more.from_agent),
        (&mut sum.in_parent, more.in_parent),
        (&mut sum.moved, more.moved),
        (&mut sum.problems, more.problems),
    ] {
        *sum = sum.saturating_add(more);
    }
}
