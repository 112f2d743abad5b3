//! Whose jobs are whose: who has begun one by name (a machine, an initiator) finds it again, and nobody else's, also in the next process that has
//! the pool open.
//!
//! ```text
//!   begun ──► book ──save──► /.sms-jobs            durable before the number is given away
//!     │                          │ opened again
//!     │    job of the pool ──────┴─► goes on by itself, and is watched until it ends
//!     │    move of a disk ─────────► is gone on with, under its number
//!     │    anything else ──────────► was interrupted
//!     ▼
//!   ended ──► book, save, who listens
//! ```
//!
//! What cannot be saved, because the pool takes no writes, is remembered by the process alone, and a warning says so: a job is not refused for
//! that.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use api::storage::{FIRST_VOLATILE_JOB, JobState, JobStatus};
use api::{Problem, ProblemKind, VmName};
use block_io::{Clock, WorkerClock, spawn_local};
use storage_virtualizer::disk::Record;
use volume_manager::model::JobId;

use crate::hosted::{Open, open_pool};
use crate::job_book::{Book, Entry, interrupted};
use crate::move_disk;
use crate::storage::{FileSystem, Volume, now};
use crate::view::view_job;

/// The file of the pool.
const PATH: &str = "/.sms-jobs";
const MAGIC: [u8; 8] = *b"SMSVJOBS";
/// Between two looks at a job of the pool.
const LOOK: Duration = Duration::from_millis(200);

/// Most of one owner that are told.
const MAX_LISTENERS: usize = 16;

/// Whose jobs those of a machine's guest are, wherever its disks are served.
pub fn owner_of_machine(vm: &VmName) -> String {
    format!("vm:{vm}")
}

/// Whose jobs those of an iSCSI initiator are.
pub fn owner_of_initiator(name: &str) -> String {
    format!("iscsi:{name}")
}

/// Told of a job that has ended, on the pool's worker; as long as it says so.
pub(crate) type Listener = Box<dyn Fn(&JobStatus) -> bool>;

/// What is known of jobs and their owners.
#[derive(Default)]
pub(crate) struct Owners {
    book: RefCell<Book>,
    record: Option<Record<Volume, WorkerClock>>,
    /// Grows with each change.
    version: Cell<u64>,
    /// The last that is durable.
    saved: Cell<u64>,
    /// The last that could not be made durable.
    refused: Cell<u64>,
    listeners: RefCell<Vec<(String, Listener)>>,
}

impl Owners {
    /// What the pool remembers.
    pub(crate) async fn load(files: &FileSystem) -> Self {
        match Record::open(files.clone(), PATH, MAGIC).await {
            Ok((record, content)) => {
                let book = content.as_deref().map(|content| {
                    Book::decode(content).unwrap_or_else(|| {
                        tracing::warn!("{PATH} of the pool says nothing of jobs that is understood here: it is begun anew");
                        Book::default()
                    })
                });
                Self {
                    book: RefCell::new(book.unwrap_or_default()),
                    record: Some(record),
                    ..Self::default()
                }
            }
            Err(error) => {
                tracing::warn!(%error, "who has begun which jobs cannot be read from the pool, and is not kept there");
                Self::default()
            }
        }
    }

    /// Greater than all numbers that were given to somebody.
    pub(crate) fn next(&self) -> u32 {
        self.book.borrow().next
    }

    pub(crate) fn has_room(&self) -> Result<(), Problem> {
        match self.book.borrow().has_room() {
            true => Ok(()),
            false => Err(
                Problem::new(ProblemKind::Exhausted, "too many jobs go on in this pool")
                    .remedy("wait for one, or cancel it"),
            ),
        }
    }

    /// The job that moves a disk.
    pub(crate) fn that_moves(&self, disk: &str) -> Option<u32> {
        let book = self.book.borrow();
        let mut live = book.live();
        live.find(|entry| entry.disk.as_deref() == Some(disk))
            .map(|entry| entry.status.id)
    }

    pub(crate) fn note(&self, owner: &str, status: &JobStatus, disk: Option<String>) {
        self.book.borrow_mut().note(owner, status, disk);
        self.changed();
    }

    /// Somebody wants a job to end: the next process does not go on with it.
    pub(crate) async fn cancelled(&self, job: u32) {
        if self.book.borrow_mut().cancel(job) {
            self.changed();
            self.save().await;
        }
    }

    fn changed(&self) {
        self.version.set(self.version.get() + 1);
    }

    /// What is known is durable, as far as the pool takes it.
    pub(crate) async fn save(&self) {
        let Some(record) = &self.record else { return };
        // What the pool does not take is not given to it again with each question.
        if self.version.get() <= self.saved.get().max(self.refused.get()) {
            return;
        }
        let taken = Cell::new(0);
        let content = || {
            taken.set(self.version.get());
            (self.saved.get() < taken.get()).then(|| self.book.borrow().encode())
        };
        match Box::pin(record.replace(content, now())).await {
            Ok(()) => self.saved.set(taken.get().max(self.saved.get())),
            Err(error) => {
                self.refused.set(taken.get());
                tracing::warn!(%error, "who has begun which jobs could not be kept in the pool");
            }
        }
    }

    /// `listener` is told when a job of `owner` ends.
    pub(crate) fn listen(&self, owner: String, listener: Listener) {
        let mut listeners = self.listeners.borrow_mut();
        // Those that want to be told no more are noticed when there is something to tell.
        if listeners.iter().filter(|(whose, _)| *whose == owner).count() >= MAX_LISTENERS
            && let Some(oldest) = listeners.iter().position(|(whose, _)| *whose == owner)
        {
            drop(listeners.remove(oldest));
        }
        listeners.push((owner, listener));
    }

    /// A job has ended.
    pub(crate) async fn ended(&self, status: &JobStatus) {
        let Some(owner) = self.book.borrow_mut().update(status) else {
            return;
        };
        self.changed();
        self.save().await;
        let mut listeners = self.listeners.borrow_mut();
        listeners.retain(|(whose, listener)| *whose != owner || listener(status));
    }

    fn entries(&self) -> Vec<Entry> {
        self.book.borrow().entries().to_vec()
    }
}

/// How a job of the pool is; none if the pool does not know it any more.
fn of_pool(open: &Open, job: u32) -> Option<JobStatus> {
    let pool = &open.storage.pool;
    let found = pool.job(JobId(job))?;
    Some(view_job(&pool.configuration(), &found, pool.pace(found.id)))
}

/// How a job is that somebody has begun.
fn at_present(open: &Open, entry: Entry) -> JobStatus {
    let known = entry.status;
    let present = match known.is_live() {
        false => None,
        true if known.id < FIRST_VOLATILE_JOB => of_pool(open, known.id),
        // One that was broken off by the end of the process has not ended.
        true => open.works.status(known.id).ok().filter(JobStatus::is_live),
    };
    present.unwrap_or(known)
}

/// The jobs of an owner, those that ended not long ago too, in the order in which they began. All have been made durable.
pub(crate) async fn jobs_of(open: &Open, owner: &str) -> Vec<JobStatus> {
    open.owners.save().await;
    let entries = open.owners.entries().into_iter();
    let own = entries.filter(|entry| entry.owner == owner);
    own.map(|entry| at_present(open, entry)).collect()
}

/// `owner` is about to be given the numbers of jobs of the pool.
pub(crate) async fn begun(open: &Open, owner: &str, jobs: &[JobStatus]) {
    for job in jobs {
        open.owners.note(owner, job, None);
        watch(job.id);
    }
    open.owners.save().await;
}

/// Sees how a job of the pool ends.
fn watch(job: u32) {
    let spawned = spawn_local(async move {
        let clock = WorkerClock::new();
        // The pool may be closed meanwhile, which waits for nobody who has it.
        while let Ok(open) = open_pool() {
            let ended = match of_pool(&open, job) {
                Some(status) if status.is_live() => None,
                Some(status) => Some(status),
                None => {
                    let entries = open.owners.entries();
                    let known = entries.into_iter().find(|entry| entry.status.id == job);
                    known.map(|entry| JobStatus {
                        state: JobState::Failed,
                        reason: Some("how it ended is not known any more".to_owned()),
                        ..entry.status
                    })
                }
            };
            if let Some(status) = ended {
                return open.owners.ended(&status).await;
            }
            drop(open);
            clock.sleep(LOOK).await;
        }
    });
    // This is a worker.
    drop(spawned);
}

/// Goes on with what the last process that had the pool open did not end.
pub(crate) async fn go_on(open: &Rc<Open>) {
    open.works.number_from(open.owners.next());
    for entry in open.owners.entries() {
        let status = entry.status;
        if !status.is_live() {
            continue;
        }
        match entry.disk {
            _ if status.id < FIRST_VOLATILE_JOB => watch(status.id),
            _ if entry.cancelled => {
                let state = JobState::Cancelled;
                open.owners.ended(&JobStatus { state, ..status }).await;
            }
            Some(disk) => move_disk::go_on(open, &status, disk),
            None => open.owners.ended(&interrupted(&status)).await,
        }
    }
}
