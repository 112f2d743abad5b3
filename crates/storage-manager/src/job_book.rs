//! The jobs that somebody was given the number of, and whose they are: what a pool remembers of them, over the processes that have it open.
//!
//! Bounded: of each owner the last [`KEPT`] that have ended, of all together [`MAX_ENTRIES`]. What is kept is JSON, in the record
//! `/.sms-jobs` of the pool (`docs/src/formats/guest-jobs.md`).

use api::storage::{FIRST_VOLATILE_JOB, JobPriority, JobState, JobStatus};
use serde::{Deserialize, Serialize};
use storage_virtualizer::disk::MAX_RECORD;

/// Jobs of one owner that have ended and are kept.
pub(crate) const KEPT: usize = 32;
/// Jobs that are kept.
const MAX_ENTRIES: usize = 512;
/// Longest text of a job, in characters.
const MAX_TEXT: usize = 300;

/// A job, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Entry {
    /// Empty: the administrator.
    pub(crate) owner: String,
    /// As it was last noted.
    pub(crate) status: JobStatus,
    /// The disk that a move moves, which the next process goes on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<String>,
    /// Somebody wants it to end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) cancelled: bool,
}

/// All of them, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Book {
    /// Greater than all numbers of jobs that end with the process and somebody was given.
    pub(crate) next: u32,
    entries: Vec<Entry>,
}

impl Default for Book {
    fn default() -> Self {
        Self {
            next: FIRST_VOLATILE_JOB,
            entries: Vec::new(),
        }
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// Without what is true for a moment only.
fn settled(status: &JobStatus) -> JobStatus {
    JobStatus {
        what: clipped(&status.what),
        reason: status.reason.as_deref().map(clipped),
        rate: None,
        seconds_left: None,
        priority: if status.is_live() {
            status.priority
        } else {
            JobPriority::Normal
        },
        ..status.clone()
    }
}

impl Book {
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.status.is_live())
    }

    /// Whether one more fits.
    pub(crate) fn has_room(&self) -> bool {
        self.live().count() < MAX_ENTRIES / 2
    }

    /// Somebody is given a job's number.
    pub(crate) fn note(&mut self, owner: &str, status: &JobStatus, disk: Option<String>) {
        if self.entries.iter().any(|entry| entry.status.id == status.id) {
            return;
        }
        if status.id >= FIRST_VOLATILE_JOB {
            self.next = self.next.max(status.id.saturating_add(1));
        }
        self.entries.push(Entry {
            owner: owner.to_owned(),
            status: settled(status),
            disk,
            cancelled: false,
        });
        self.forget(owner);
    }

    fn forget(&mut self, owner: &str) {
        let mut drop_oldest = |most: usize, of: &dyn Fn(&Entry) -> bool| {
            let is_old = |entry: &Entry| !entry.status.is_live() && of(entry);
            let mut surplus = self.entries.iter().filter(|entry| is_old(entry)).count();
            self.entries.retain(|entry| {
                let goes = is_old(entry) && surplus > most;
                surplus -= usize::from(goes);
                !goes
            });
        };
        drop_oldest(KEPT, &|entry| entry.owner == owner);
        drop_oldest(MAX_ENTRIES / 2, &|_| true);
    }

    /// How a job is now; tells whose it is, if it has ended by that.
    pub(crate) fn update(&mut self, status: &JobStatus) -> Option<String> {
        let entries = self.entries.iter_mut();
        let entry = entries
            .into_iter()
            .find(|entry| entry.status.id == status.id && entry.status.is_live())?;
        entry.status = settled(status);
        let owner = (!status.is_live()).then(|| entry.owner.clone())?;
        self.forget(&owner);
        Some(owner)
    }

    /// Somebody wants a job to end; whether that is new.
    pub(crate) fn cancel(&mut self, job: u32) -> bool {
        let mut entries = self.entries.iter_mut();
        let found = entries.find(|entry| entry.status.id == job && entry.status.is_live());
        found.is_some_and(|entry| !std::mem::replace(&mut entry.cancelled, true))
    }

    /// As it is kept.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut kept = self.clone();
        loop {
            // There are string keys only and no fallible serializers: nothing can fail.
            let bytes = serde_json::to_vec(&kept).unwrap_or_default();
            let oldest = kept.entries.iter().position(|entry| !entry.status.is_live());
            match oldest {
                Some(oldest) if bytes.len() > MAX_RECORD => drop(kept.entries.remove(oldest)),
                _ => return bytes,
            }
        }
    }

    /// From what was kept. None if that is no book.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut book: Self = serde_json::from_slice(bytes).ok()?;
        book.next = book.next.max(FIRST_VOLATILE_JOB);
        book.entries.sort_by_key(|entry| entry.status.id);
        book.entries.dedup_by_key(|entry| entry.status.id);
        Some(book)
    }
}

/// A job that ended with the process that did it.
pub(crate) fn interrupted(status: &JobStatus) -> JobStatus {
    let reason = "it was interrupted: the process that did it has ended; have it done again";
    JobStatus {
        state: JobState::Failed,
        reason: Some(reason.to_owned()),
        ..status.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u32, state: JobState) -> JobStatus {
        JobStatus {
            id,
            kind: "move-disk".into(),
            what: "move /a.dsk".into(),
            state,
            reason: None,
            done: 1,
            total: 2,
            throttle: 0,
            priority: JobPriority::Normal,
            rate: Some(7),
            seconds_left: Some(1),
            volatile: true,
            moved: None,
        }
    }

    #[test]
    fn each_owner_has_the_last_ones_and_those_that_go_on() {
        let mut book = Book::default();
        book.note(
            "vm:a",
            &job(FIRST_VOLATILE_JOB + 3, JobState::Running),
            Some("/a.dsk".into()),
        );
        for number in 0..100 {
            book.note("vm:b", &job(number, JobState::Running), None);
            assert_eq!(book.update(&job(number, JobState::Done)), Some("vm:b".into()));
            // It ends once.
            assert_eq!(book.update(&job(number, JobState::Failed)), None);
        }
        let of =
            |book: &Book, owner: &str| book.entries().iter().filter(|entry| entry.owner == owner).count();
        assert_eq!((of(&book, "vm:a"), of(&book, "vm:b")), (1, KEPT));
        assert_eq!(book.next, FIRST_VOLATILE_JOB + 4);
        for number in 0..1000 {
            book.note(&format!("vm:{number}"), &job(1000 + number, JobState::Done), None);
        }
        assert!(book.entries().len() <= MAX_ENTRIES && of(&book, "vm:a") == 1);
        assert_eq!(
            Book::decode(&book.encode()).unwrap().entries().len(),
            book.entries().len()
        );
    }

    #[test]
    fn it_fits_its_record_and_comes_from_there() {
        let mut book = Book::default();
        for number in 0..300 {
            let mut long = job(
                number,
                if number < 200 {
                    JobState::Running
                } else {
                    JobState::Failed
                },
            );
            (long.what, long.reason) = ("\u{1}".repeat(5000), Some("é".repeat(5000)));
            book.note(&format!("vm:{number}"), &long, None);
        }
        let bytes = book.encode();
        assert!(bytes.len() <= MAX_RECORD, "{}", bytes.len());
        let back = Book::decode(&bytes).unwrap();
        assert!(back.live().count() == 200 && back.entries()[0].status.rate.is_none());
        for wrong in [&b""[..], b"{}", b"[1]", b"{\"next\": -1, \"entries\": []}"] {
            assert_eq!(Book::decode(wrong), None);
        }
        // What a later version adds is skipped.
        assert_eq!(
            Book::decode(br#"{"next": 3, "more": {}, "entries": []}"#),
            Some(Book::default())
        );
    }
}
