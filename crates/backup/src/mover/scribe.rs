//! Writes a batch to the archive while the next one is read.
//!
//! ```text
//!   session   reads batch 3 │ waits for 2 │ reads batch 4 │ ...
//!   scribe    checksums, writes batch 2   │ batch 3       │ ...
//! ```
//! One batch is written while one is read: both are in memory, and not more. After the first error nothing more is written.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{Problem, ProblemKind};

use super::image::Bytes;
use super::work::{Tick, of_store};
use crate::archive::From;
use crate::file::is_zero;
use crate::message::Progress;
use crate::plan::{Entry, Extent};
use crate::store::Draft;

/// Between two moments at which what is written is made durable.
const SYNC: Duration = Duration::from_secs(30);
/// So often it is looked whether it is to be told that it takes longer.
const LOOK: Duration = Duration::from_secs(1);

/// What is to be written, in order.
pub(super) enum Step {
    Entry(Box<Entry>),
    Extents(Vec<Extent>),
    /// At this offset of the entry, so many bytes: a piece of the batch.
    Piece(u64, u64, usize),
    /// At this offset, what the agent has sent.
    Sent(u64, Vec<u8>),
    Zeroes(u64, u64),
    InParent {
        offset: u64,
        length: u64,
        entry: u64,
        at: u64,
    },
    End(Option<String>),
    /// The entry in the middle of which the archive was left goes on.
    GoOn,
    /// What there is of that entry goes.
    LeaveOpen,
}

/// Some steps, and the pieces in them.
pub(super) struct Batch {
    pub(super) steps: VecDeque<Step>,
    pub(super) read: Vec<Option<Bytes>>,
    /// How often it was asked again where these are.
    pub(super) moved: u64,
}

/// A thread that has the archive.
pub(super) struct Scribe {
    /// None when it is to end.
    batches: Option<SyncSender<Batch>>,
    done: Receiver<Result<Progress, Problem>>,
    thread: Option<JoinHandle<Draft>>,
    /// Batches that are being written.
    away: usize,
    progress: Progress,
}

fn gone() -> Problem {
    Problem::new(ProblemKind::Host, "the thread that writes the archive is gone")
}

fn written(error: io::Error) -> Problem {
    Problem::new(
        ProblemKind::Host,
        format!("the archive cannot be written: {error}"),
    )
    .remedy("see that the store has space; then go on with the backup")
}

impl Scribe {
    pub(super) fn new(draft: Draft) -> Result<Self, Problem> {
        let progress = draft.writer.progress();
        let (batches, to_do) = sync_channel::<Batch>(1);
        let (tell, done) = sync_channel(2);
        let write = move || {
            let mut writing = Writing {
                draft,
                moved: 0,
                synced: Instant::now(),
            };
            for batch in to_do {
                let result = writing.batch(batch);
                let ended = result.is_err();
                if tell.send(result).is_err() || ended {
                    break;
                }
            }
            writing.draft
        };
        let thread = std::thread::Builder::new().name("archive".into()).spawn(write);
        let failed = |error| Problem::new(ProblemKind::Host, format!("cannot start a thread: {error}"));
        Ok(Self {
            batches: Some(batches),
            done,
            thread: Some(thread.map_err(failed)?),
            away: 0,
            progress,
        })
    }

    /// What there is, without the entry that is being written.
    pub(super) fn progress(&self) -> Progress {
        self.progress
    }

    /// Has it written when the one before is.
    pub(super) fn write(&mut self, batch: Batch, tick: Tick<'_>) -> Result<(), Problem> {
        self.drain(tick)?;
        let sent = self
            .batches
            .as_ref()
            .is_some_and(|batches| batches.send(batch).is_ok());
        if !sent {
            return Err(gone());
        }
        self.away += 1;
        Ok(())
    }

    /// Waits until everything is in the archive.
    pub(super) fn drain(&mut self, tick: Tick<'_>) -> Result<(), Problem> {
        while self.away > 0 {
            match self.done.recv_timeout(LOOK) {
                Ok(result) => {
                    self.away -= 1;
                    self.progress = result?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
            tick(&self.progress)?;
        }
        Ok(())
    }

    /// The archive, with all that was to be written.
    pub(super) fn end(mut self, tick: Tick<'_>) -> Result<Draft, Problem> {
        self.drain(tick)?;
        self.batches = None;
        let thread = self.thread.take().and_then(|thread| thread.join().ok());
        thread.ok_or_else(gone)
    }
}

impl Drop for Scribe {
    /// What was handed over is written.
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Writing {
    draft: Draft,
    moved: u64,
    synced: Instant,
}

impl Writing {
    fn batch(&mut self, batch: Batch) -> Result<Progress, Problem> {
        let Batch {
            steps,
            mut read,
            moved,
        } = batch;
        self.moved += moved;
        for step in steps {
            self.step(step, &mut read)?;
        }
        if self.synced.elapsed() >= SYNC {
            self.draft.sync().map_err(|error| of_store(&error))?;
            self.synced = Instant::now();
        }
        Ok(self.draft.writer.progress())
    }

    fn step(&mut self, step: Step, read: &mut [Option<Bytes>]) -> Result<(), Problem> {
        let writer = &mut self.draft.writer;
        let done = match step {
            Step::LeaveOpen => return self.draft.leave_open_entry().map_err(|error| of_store(&error)),
            Step::GoOn => {
                self.draft.go_on_in_open_entry();
                return Ok(());
            }
            Step::Entry(entry) => writer.entry(&entry),
            Step::Extents(extents) => writer.extents(&extents),
            Step::Zeroes(offset, length) => writer.zeroes(offset, length),
            Step::Sent(offset, bytes) => writer.data(offset, &bytes, From::Agent),
            Step::InParent {
                offset,
                length,
                entry,
                at,
            } => writer.in_parent(offset, length, entry, at),
            Step::End(problem) => {
                writer.moved(std::mem::take(&mut self.moved));
                writer.end_entry(problem)
            }
            Step::Piece(offset, length, number) => match read.get_mut(number).and_then(Option::take) {
                Some((bytes, from)) if !is_zero(&bytes) => writer.data(offset, &bytes, from),
                _ => writer.zeroes(offset, length),
            },
        };
        done.map_err(written)
    }
}
