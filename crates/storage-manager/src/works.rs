//! What takes long and is no job of the pool: imports, merges, relocations and the like, which end with the process that does them.
//!
//! They are listed with the pool's jobs, can be waited for and cancelled. Their numbers begin far behind those of the pool's jobs, and are
//! given anew by each process, but for those that somebody was given ([`crate::owners`]).
//!
//! ```text
//!   who does it        Work ──note──► Entry ◄──list, cancel── who asks
//!                       └─ dropped: it has ended
//! ```

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::file::Moved;
use api::storage::{FIRST_VOLATILE_JOB, JobPriority, JobState, JobStatus};
use api::{Problem, ProblemKind};
use volume_manager::Meter;

use crate::conversation::Work;

/// Ended ones that are kept for who asks.
const KEPT: usize = 32;

/// Everything of this kind that a process does, and has done. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Works(Arc<Mutex<List>>);

struct List {
    next: u32,
    entries: VecDeque<Arc<Entry>>,
}

impl Default for List {
    fn default() -> Self {
        Self {
            next: FIRST_VOLATILE_JOB,
            entries: VecDeque::new(),
        }
    }
}

struct Entry {
    status: Mutex<(JobStatus, Meter)>,
    begun: Instant,
    cancelled: AtomicBool,
}

impl Entry {
    /// How it is, with how fast it gets on.
    fn status(&self) -> JobStatus {
        let (mut status, meter) = self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if status.is_live() {
            let done = status.done;
            let pace = meter.pace(self.begun.elapsed(), done, done, status.total.max(done));
            status.rate = (pace != volume_manager::Pace::default()).then_some(pace.rate);
            // Of what nobody knows the end there is no rest.
            status.seconds_left = pace.left.filter(|_| status.total > 0).map(|left| left.as_secs());
        }
        status
    }

    fn change(&self, change: impl FnOnce(&mut JobStatus, &mut Meter)) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, meter) = &mut *status;
        change(status, meter);
    }
}

impl List {
    fn enter(&mut self, status: JobStatus) -> Doing {
        let entry = Arc::new(Entry {
            status: Mutex::new((status, Meter::default())),
            begun: Instant::now(),
            cancelled: AtomicBool::new(false),
        });
        self.entries.push_back(Arc::clone(&entry));
        let ended = |entry: &Arc<Entry>| !entry.status().is_live();
        let surplus = self
            .entries
            .iter()
            .filter(|entry| ended(entry))
            .count()
            .saturating_sub(KEPT);
        for _ in 0..surplus {
            if let Some(oldest) = self.entries.iter().position(ended) {
                self.entries.remove(oldest);
            }
        }
        Doing(entry)
    }
}

/// Something that is being done; it has ended when this is dropped.
pub(crate) struct Doing(Arc<Entry>);

impl Works {
    /// No number before this one is given.
    pub(crate) fn number_from(&self, next: u32) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.next = list.next.max(next);
    }

    /// Something of this kind begins.
    pub(crate) fn begin(&self, kind: &str, what: String) -> Doing {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let status = JobStatus {
            id: list.next,
            kind: kind.to_owned(),
            what,
            state: JobState::Running,
            reason: None,
            done: 0,
            total: 0,
            throttle: 0,
            priority: JobPriority::Normal,
            rate: None,
            seconds_left: None,
            volatile: true,
            moved: None,
        };
        list.next = list.next.saturating_add(1);
        list.enter(status)
    }

    /// What another process had begun goes on, under its number.
    pub(crate) fn go_on(&self, status: &JobStatus) -> Doing {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.enter(JobStatus {
            done: 0,
            total: 0,
            ..status.clone()
        })
    }

    /// All that are known, in order of their numbers.
    pub(crate) fn list(&self) -> Vec<JobStatus> {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.entries.iter().map(|entry| entry.status()).collect()
    }

    fn find(&self, id: u32) -> Result<Arc<Entry>, Problem> {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = list.entries.iter().find(|entry| entry.status().id == id);
        found.map(Arc::clone).ok_or_else(|| {
            Problem::new(ProblemKind::NotFound, format!("this process has no job {id}"))
                .about(format!("job {id}"))
                .remedy("`smsvmm job list --all` shows them")
        })
    }

    /// How one is.
    pub(crate) fn status(&self, id: u32) -> Result<JobStatus, Problem> {
        self.find(id).map(|entry| entry.status())
    }

    /// Has one end where it is, as soon as it looks.
    pub(crate) fn cancel(&self, id: u32) -> Result<(), Problem> {
        let entry = self.find(id)?;
        if !entry.status().is_live() {
            let ended = Problem::new(ProblemKind::Conflict, format!("job {id} has ended"));
            return Err(ended.about(format!("job {id}")));
        }
        entry.cancelled.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// What can be done with the pool's jobs only.
    pub(crate) fn refuse(&self, id: u32, what: &str) -> Problem {
        let job = match self.status(id) {
            Ok(job) => job,
            Err(problem) => return problem,
        };
        let detail = format!(
            "job {id} ({}) cannot be {what}: it is no job of the pool, and ends with the process that does it",
            job.what
        );
        Problem::new(ProblemKind::Conflict, detail)
            .about(format!("job {id}"))
            .remedy(format!("`smsvmm job cancel {id}` ends it"))
    }
}

impl Doing {
    /// How far it is.
    pub(crate) fn note(&self, work: &Work) {
        let now: Duration = self.0.begun.elapsed();
        self.0.change(|status, meter| {
            status.done = work.done;
            status.total = work.total;
            meter.note(now, work.done, work.done);
        });
    }

    /// How it is.
    pub(crate) fn status(&self) -> JobStatus {
        self.0.status()
    }

    /// What was moved.
    pub(crate) fn moved(&self, moved: Moved) {
        self.0.change(|status, _| status.moved = Some(moved));
    }

    /// Whether somebody wants it to end.
    pub(crate) fn cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// It has ended. `whole` says whether all of it was done.
    pub(crate) fn end<T>(self, result: &Result<T, Problem>, whole: bool) {
        let cancelled = self.cancelled();
        self.0.change(|status, _| match result {
            Ok(_) if whole && !cancelled => status.state = JobState::Done,
            Ok(_) => status.state = JobState::Cancelled,
            Err(_) if cancelled => status.state = JobState::Cancelled,
            Err(problem) => {
                status.state = JobState::Failed;
                status.reason = Some(problem.detail.clone());
            }
        });
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        // Nobody has said how it ended.
        self.0.change(|status, _| {
            if status.is_live() {
                status.state = JobState::Cancelled;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(done: u64) -> Work {
        Work {
            what: "import /a".into(),
            done,
            total: 100,
        }
    }

    #[test]
    fn what_is_done_is_listed_steered_and_remembered_for_a_while() {
        let works = Works::default();
        let doing = works.begin("import", "import /a".into());
        doing.note(&work(50));
        let listed = works.list();
        assert_eq!((listed[0].id, listed[0].percent()), (FIRST_VOLATILE_JOB, 50));
        assert!(listed[0].volatile && listed[0].is_live() && !doing.cancelled());
        let refused = works.refuse(FIRST_VOLATILE_JOB, "paused");
        assert!(refused.detail.contains("import /a"), "{refused}");

        works.cancel(FIRST_VOLATILE_JOB).unwrap();
        assert!(doing.cancelled());
        doing.end(
            &Err::<(), _>(Problem::new(ProblemKind::Conflict, "broken off")),
            false,
        );
        assert_eq!(
            works.status(FIRST_VOLATILE_JOB).unwrap().state,
            JobState::Cancelled
        );
        assert_eq!(
            works.cancel(FIRST_VOLATILE_JOB).unwrap_err().kind,
            ProblemKind::Conflict
        );

        works.begin("copy", "copy".into()).end(&Ok(()), true);
        drop(works.begin("merge", "merge".into()));
        let states: Vec<JobState> = works.list().iter().map(|job| job.state).collect();
        assert_eq!(states, [JobState::Cancelled, JobState::Done, JobState::Cancelled]);
        let mut last = None;
        for _ in 0..100 {
            last = Some(works.begin("copy", "copy".into()));
        }
        assert_eq!(
            works.status(FIRST_VOLATILE_JOB).unwrap_err().kind,
            ProblemKind::NotFound
        );
        // One ends after the next has begun.
        assert_eq!(works.list().len(), KEPT + 2);
        drop(last);
    }
}
