//! A backup that is being made: entries come, their content is read, the archive grows.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::Instant;

use api::{Problem, ProblemKind};

use super::image::{Image, Piece, WINDOW};
use super::parent::{InParent, Part};
use crate::archive::From;
use crate::check::PlanChecker;
use crate::message::{MAX_CONTENT, Progress};
use crate::plan::{Content, Entry, Extent, Kind};
use crate::store::{Draft, StoreError};

/// Bytes that are read at a time.
const BATCH: usize = 32 << 20;
/// Pieces that are read at a time.
const BATCH_PIECES: usize = 4096;
/// Windows of disks that a batch touches.
const BATCH_WINDOWS: usize = 24;
/// Between two moments at which what is written is made durable.
const SYNC: std::time::Duration = std::time::Duration::from_secs(30);

/// What is to be written, in order.
enum Step {
    Entry(Box<Entry>),
    Extents(Vec<Extent>),
    /// At this offset of the entry, a piece of the batch.
    Piece(u64, usize),
    Zeroes(u64, u64),
    InParent {
        offset: u64,
        length: u64,
        entry: u64,
        at: u64,
    },
    End(Option<String>),
}

/// A backup that is being made.
pub(super) struct Work {
    pub(super) draft: Draft,
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
    begun: Instant,
    synced: Instant,
}

pub(super) fn of_store(error: &StoreError) -> Problem {
    let kind = match error {
        StoreError::Exists(_) | StoreError::Busy(_) | StoreError::OtherPlan(_) => ProblemKind::Conflict,
        StoreError::Missing(_) => ProblemKind::NotFound,
        _ => ProblemKind::Host,
    };
    Problem::new(kind, crate::chain_of(error))
}

fn written(error: io::Error) -> Problem {
    Problem::new(
        ProblemKind::Host,
        format!("the archive cannot be written: {error}"),
    )
    .remedy("see that the store has space; then go on with the backup")
}

fn invalid(text: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Invalid, text)
}

/// Told of how far it is; false: it is to end.
pub(super) type Tick<'a> = &'a mut dyn FnMut(&Progress) -> Result<(), Problem>;

impl Work {
    pub(super) fn new(draft: Draft, image: Image, checker: PlanChecker, parent: InParent) -> Self {
        Self {
            draft,
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
            synced: Instant::now(),
        }
    }

    pub(super) fn progress(&self) -> Progress {
        self.draft.writer.progress()
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
        self.flush(tick)
    }

    fn entry(&mut self, entry: &mut Entry, open: bool, tick: Tick<'_>) -> Result<(), Problem> {
        self.steps.push_back(Step::Entry(Box::new(entry.clone())));
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
        self.steps.push_back(Step::Extents(extents.clone()));
        self.content(&extents, tick)?;
        if !more {
            self.steps.push_back(Step::End(None));
        }
        self.flush(tick)
    }

    fn content(&mut self, extents: &[Extent], tick: Tick<'_>) -> Result<(), Problem> {
        for extent in extents {
            match extent.at {
                None => self.steps.push_back(Step::Zeroes(extent.offset, extent.length)),
                Some(at) => {
                    let disk = usize::try_from(at.disk).unwrap_or(usize::MAX);
                    self.range(disk, at.start, extent.length, extent.offset, tick)?;
                }
            }
        }
        Ok(())
    }

    fn whole_disk(&mut self, disk: usize, size: u64, tick: Tick<'_>) -> Result<(), Problem> {
        for window in 0..size.div_ceil(WINDOW) {
            for (start, end) in self.image.data_in(disk, window)? {
                self.range(disk, start, end - start, start, tick)?;
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
        self.steps.push_back(Step::Piece(offset, self.pieces.len()));
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

    /// Reads and writes what has been gathered.
    fn flush(&mut self, tick: Tick<'_>) -> Result<(), Problem> {
        tick(&self.progress())?;
        self.image.keep()?;
        let mut read = self.image.read(&self.pieces)?;
        let writer = &mut self.draft.writer;
        for step in self.steps.drain(..) {
            let done = match step {
                Step::Entry(entry) => writer.entry(&entry),
                Step::Extents(extents) => writer.extents(&extents),
                Step::Zeroes(offset, length) => writer.zeroes(offset, length),
                Step::InParent {
                    offset,
                    length,
                    entry,
                    at,
                } => writer.in_parent(offset, length, entry, at),
                Step::End(problem) => {
                    writer.moved(std::mem::take(&mut self.image.moved));
                    writer.end_entry(problem)
                }
                Step::Piece(offset, number) => {
                    let length = self.pieces.get(number).map_or(0, |piece| piece.length as u64);
                    match read.get_mut(number).and_then(Option::take) {
                        Some((bytes, from)) if bytes.iter().any(|byte| *byte != 0) => {
                            writer.data(offset, &bytes, from)
                        }
                        _ => writer.zeroes(offset, length),
                    }
                }
            };
            done.map_err(written)?;
        }
        self.pieces.clear();
        self.bytes = 0;
        self.windows.clear();
        if self.synced.elapsed() >= SYNC {
            self.draft.sync().map_err(|error| of_store(&error))?;
            self.synced = Instant::now();
        }
        self.slow_down(tick)
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
    pub(super) fn bytes(&mut self, offset: u64, bytes: &[u8], tick: Tick<'_>) -> Result<(), Problem> {
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
        let writer = &mut self.draft.writer;
        writer.data(offset, bytes, From::Agent).map_err(written)?;
        self.slow_down(tick)
    }

    /// The streamed entry is complete.
    pub(super) fn end_content(&mut self, problem: Option<String>) -> Result<(), Problem> {
        if self.streamed.take().is_none() {
            return Err(invalid("no content of an entry was to come"));
        }
        let problem = problem.map(|mut problem| {
            problem.truncate(problem.floor_char_boundary(1024));
            problem
        });
        self.draft.writer.end_entry(problem).map_err(written)
    }
}
