//! A backup that is being made: entries come, their content is read, the archive grows.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use api::{Problem, ProblemKind};

use super::image::{Image, Piece, WINDOW};
use super::parent::{InParent, Part};
use super::scribe::{Batch, Scribe, Step};
use crate::check::PlanChecker;
use crate::message::{MAX_CONTENT, Progress};
use crate::plan::{Content, Entry, Extent, Kind};
use crate::store::{Draft, OpenEntry, StoreError};

/// Bytes that are read at a time.
const BATCH: usize = 16 << 20;
/// Pieces that are read at a time.
const BATCH_PIECES: usize = 4096;
/// Windows of disks that a batch touches.
const BATCH_WINDOWS: usize = 24;

/// A backup that is being made.
pub(super) struct Work {
    scribe: Scribe,
    name: String,
    pub(super) image: Image,
    pub(super) checker: PlanChecker,
    pub(super) parent: InParent,
    pub(super) most_bytes: Option<u64>,
    /// Bytes per second.
    pub(super) rate: Option<u64>,
    steps: VecDeque<Step>,
    pieces: Vec<Piece>,
    bytes: usize,
    windows: BTreeSet<(usize, u64)>,
    /// All bytes that were read or sent.
    total: u64,
    /// Of the entry that is streamed: its size, and what came.
    streamed: Option<(u64, u64)>,
    /// What the archive has of the entry in which it was left, until that comes again; then, what of it is left out.
    open: Option<OpenEntry>,
    skipped: Option<OpenEntry>,
    begun: Instant,
}

pub(super) fn of_store(error: &StoreError) -> Problem {
    let kind = match error {
        StoreError::Exists(_) | StoreError::Busy(_) | StoreError::OtherPlan(_) => ProblemKind::Conflict,
        StoreError::Missing(_) => ProblemKind::NotFound,
        _ => ProblemKind::Host,
    };
    Problem::new(kind, crate::chain_of(error))
}

fn invalid(text: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Invalid, text)
}

/// Told of how far it is; false: it is to end.
pub(super) type Tick<'a> = &'a mut dyn FnMut(&Progress) -> Result<(), Problem>;

impl Work {
    pub(super) fn new(
        mut draft: Draft,
        image: Image,
        checker: PlanChecker,
        parent: InParent,
    ) -> Result<Self, Problem> {
        // What the agent sends is not known to be the same as before.
        if draft.open_entry().is_some_and(|open| open.entry.is_streamed()) {
            draft.leave_open_entry().map_err(|error| of_store(&error))?;
        }
        Ok(Self {
            open: draft.open_entry().cloned(),
            skipped: None,
            name: draft.name().to_owned(),
            scribe: Scribe::new(draft)?,
            image,
            checker,
            parent,
            most_bytes: None,
            rate: None,
            steps: VecDeque::new(),
            pieces: Vec::new(),
            bytes: 0,
            windows: BTreeSet::new(),
            total: 0,
            streamed: None,
            begun: Instant::now(),
        })
    }

    /// What the backup is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The entry in the middle of which it goes on, and how much of that is there.
    pub(super) fn goes_on_in(&self) -> Option<(&Entry, u64)> {
        self.open.as_ref().map(|open| (&open.entry, open.done))
    }

    /// The image, which is not needed any more, and the archive, with all that was to be written.
    pub(super) fn end(mut self, tick: Tick<'_>) -> Result<(Image, Draft), Problem> {
        if self.open.take().is_some() {
            self.steps.push_back(Step::LeaveOpen);
        }
        self.flush(tick)?;
        Ok((self.image, self.scribe.end(tick)?))
    }

    pub(super) fn progress(&self) -> Progress {
        self.scribe.progress()
    }

    /// Whether more of the last entry must come before there is an answer.
    pub(super) fn is_open(&self) -> bool {
        self.streamed.is_some() || self.checker.complete().is_err()
    }

    /// Entries came. They are read and written, but what must still come.
    pub(super) fn entries(&mut self, entries: Vec<Entry>, tick: Tick<'_>) -> Result<(), Problem> {
        if self.is_open() {
            return Err(invalid("the entry before these is not complete"));
        }
        if entries.is_empty() || entries.len() > crate::plan::MAX_BATCH {
            return Err(invalid("a message has 1 to 4096 entries"));
        }
        let last = entries.len() - 1;
        for (number, mut entry) in entries.into_iter().enumerate() {
            let open = entry.is_streamed() || entry.has_more();
            if open && number < last {
                return Err(invalid(format!(
                    "{}: only the last entry of a message has more to come",
                    entry.path
                )));
            }
            self.checker
                .entry(&entry)
                .map_err(|error| invalid(error.to_string()))?;
            self.entry(&mut entry, open, tick)?;
        }
        self.settle(tick)
    }

    /// The entry begins; or it goes on, if the archive has a part of it.
    fn begin_entry(&mut self, entry: &Entry) {
        self.skipped = None;
        match self.open.take() {
            Some(open) if open.entry == *entry => {
                self.steps.push_back(Step::GoOn);
                self.skipped = Some(open);
                return;
            }
            // The agent has found something else there.
            Some(_) => self.steps.push_back(Step::LeaveOpen),
            None => {}
        }
        self.steps.push_back(Step::Entry(Box::new(entry.clone())));
    }

    /// What of a range of the entry's content is not in the archive yet.
    fn left(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let done = self.skipped.as_ref().map_or(0, |open| open.done);
        let (start, end) = (offset.max(done), offset.saturating_add(length));
        (start < end).then(|| (start, end - start))
    }

    fn entry(&mut self, entry: &mut Entry, open: bool, tick: Tick<'_>) -> Result<(), Problem> {
        self.begin_entry(entry);
        match &entry.kind {
            Kind::File {
                content: Content::Extents { extents, .. },
                ..
            } => self.content(extents, tick)?,
            Kind::File {
                size,
                content: Content::Stream {},
            } => self.streamed = Some((*size, 0)),
            Kind::Disk { disk, size } => {
                self.whole_disk(usize::try_from(*disk).unwrap_or(usize::MAX), *size, tick)?
            }
            _ => {}
        }
        if !open {
            self.steps.push_back(Step::End(None));
        }
        Ok(())
    }

    /// More extents of the last entry.
    pub(super) fn extents(
        &mut self,
        extents: Vec<Extent>,
        more: bool,
        tick: Tick<'_>,
    ) -> Result<(), Problem> {
        self.checker
            .extents(&extents, more)
            .map_err(|error| invalid(error.to_string()))?;
        match self.skipped.as_mut().and_then(|open| open.extents.pop_front()) {
            Some(known) if known != extents => {
                let text = "what the archive has of this entry is of other extents: abandon the backup, and make a new one";
                return Err(Problem::new(ProblemKind::Conflict, text));
            }
            Some(_) => {}
            None => self.steps.push_back(Step::Extents(extents.clone())),
        }
        self.content(&extents, tick)?;
        if !more {
            self.steps.push_back(Step::End(None));
        }
        self.settle(tick)
    }

    fn content(&mut self, extents: &[Extent], tick: Tick<'_>) -> Result<(), Problem> {
        for extent in extents {
            let Some((offset, length)) = self.left(extent.offset, extent.length) else {
                continue;
            };
            match extent.at {
                None => self.steps.push_back(Step::Zeroes(offset, length)),
                Some(at) => {
                    let disk = usize::try_from(at.disk).unwrap_or(usize::MAX);
                    let start = at.start + (offset - extent.offset);
                    self.range(disk, start, length, offset, tick)?;
                }
            }
        }
        Ok(())
    }

    fn whole_disk(&mut self, disk: usize, size: u64, tick: Tick<'_>) -> Result<(), Problem> {
        for window in 0..size.div_ceil(WINDOW) {
            if self.left(window * WINDOW, WINDOW).is_none() {
                continue;
            }
            for (start, end) in self.image.data_in(disk, window)? {
                if let Some((start, length)) = self.left(start, end - start) {
                    self.range(disk, start, length, start, tick)?;
                }
            }
            self.image.keep()?;
        }
        Ok(())
    }

    /// A range of a disk belongs at `offset` of the entry.
    fn range(
        &mut self,
        disk: usize,
        start: u64,
        length: u64,
        offset: u64,
        tick: Tick<'_>,
    ) -> Result<(), Problem> {
        for part in self.parent.parts(disk, start, length) {
            match part {
                Part::InParent {
                    start: from,
                    length,
                    entry,
                    at,
                } => {
                    let offset = offset + (from - start);
                    self.steps.push_back(Step::InParent {
                        offset,
                        length,
                        entry,
                        at,
                    });
                }
                Part::Read { start: from, length } => {
                    let mut done = 0;
                    while done < length {
                        let most = MAX_CONTENT as u64;
                        let at = from + done;
                        // To the next multiple, so that pieces are whole blocks of devices but at their ends.
                        let part = (length - done).min(most - at % 4096);
                        self.piece(disk, at, part, offset + (at - start), tick)?;
                        done += part;
                    }
                }
            }
        }
        Ok(())
    }

    fn piece(
        &mut self,
        disk: usize,
        start: u64,
        length: u64,
        offset: u64,
        tick: Tick<'_>,
    ) -> Result<(), Problem> {
        self.count(length)?;
        let length = usize::try_from(length).map_err(|_| invalid("a piece is too long"))?;
        self.steps
            .push_back(Step::Piece(offset, length as u64, self.pieces.len()));
        let piece = Piece { disk, start, length };
        self.windows.extend(piece.windows());
        self.pieces.push(piece);
        self.bytes += length;
        let full =
            self.bytes >= BATCH || self.pieces.len() >= BATCH_PIECES || self.windows.len() >= BATCH_WINDOWS;
        match full {
            true => self.flush(tick),
            false => Ok(()),
        }
    }

    fn count(&mut self, length: u64) -> Result<(), Problem> {
        self.total = self.total.saturating_add(length);
        match self.most_bytes {
            Some(most) if self.total > most => Err(Problem::new(
                ProblemKind::TooLarge,
                format!("the backup has more than {most} bytes, which is the limit of this mover"),
            )),
            _ => Ok(()),
        }
    }

    /// Reads what has been gathered, and has it written.
    fn flush(&mut self, tick: Tick<'_>) -> Result<(), Problem> {
        tick(&self.progress())?;
        self.image.keep()?;
        let batch = Batch {
            read: self.image.read(&self.pieces)?,
            steps: std::mem::take(&mut self.steps),
            moved: std::mem::take(&mut self.image.moved),
        };
        self.scribe.write(batch, tick)?;
        self.pieces.clear();
        self.bytes = 0;
        self.windows.clear();
        self.slow_down(tick)
    }

    /// The same, and waits until everything is in the archive.
    fn settle(&mut self, tick: Tick<'_>) -> Result<(), Problem> {
        self.flush(tick)?;
        self.scribe.drain(tick)
    }

    /// Waits until so much may have been read.
    fn slow_down(&mut self, tick: Tick<'_>) -> Result<(), Problem> {
        let Some(rate) = self.rate.filter(|rate| *rate > 0) else {
            return Ok(());
        };
        let due = std::time::Duration::from_millis(self.total.saturating_mul(1000) / rate);
        while let Some(wait) = due.checked_sub(self.begun.elapsed()) {
            std::thread::sleep(wait.min(std::time::Duration::from_millis(500)));
            tick(&self.progress())?;
        }
        Ok(())
    }

    /// Bytes of the streamed entry came.
    pub(super) fn bytes(&mut self, offset: u64, bytes: Vec<u8>, tick: Tick<'_>) -> Result<(), Problem> {
        self.count(bytes.len() as u64)?;
        let end = offset.checked_add(bytes.len() as u64);
        match (&mut self.streamed, end) {
            (Some((size, done)), Some(end)) if offset >= *done && end <= *size && !bytes.is_empty() => {
                *done = end
            }
            _ => {
                let text = "content came that is not of the entry, or not behind what came before";
                return Err(invalid(text));
            }
        }
        self.bytes += bytes.len();
        self.steps.push_back(Step::Sent(offset, bytes));
        match self.bytes >= BATCH {
            true => self.flush(tick),
            false => self.slow_down(tick),
        }
    }

    /// The streamed entry is complete.
    pub(super) fn end_content(&mut self, problem: Option<String>, tick: Tick<'_>) -> Result<(), Problem> {
        if self.streamed.take().is_none() {
            return Err(invalid("no content of an entry was to come"));
        }
        let problem = problem.map(|mut problem| {
            problem.truncate(problem.floor_char_boundary(1024));
            problem
        });
        self.steps.push_back(Step::End(problem));
        self.settle(tick)
    }
}
