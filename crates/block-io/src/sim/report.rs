//! What a simulation tells: numbers, and failures with the last events before them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use super::crash::CrashStates;
use crate::IoError;

thread_local! {
    static COUNTS: RefCell<Counts> = const { RefCell::new(Counts::new()) };
}

/// What a thread counts while its simulations run.
#[derive(Debug, Default)]
pub(super) struct Counts {
    events: u64,
    /// Of worlds.
    crashes: u64,
    faults: BTreeMap<&'static str, u64>,
    marks: crate::cover::Marks,
}

impl Counts {
    const fn new() -> Self {
        Self {
            events: 0,
            crashes: 0,
            faults: BTreeMap::new(),
            marks: crate::cover::Marks::new(),
        }
    }

    /// Changes places with what the thread counts.
    pub(super) fn swap(&mut self) {
        let marks = std::mem::take(&mut self.marks);
        COUNTS.with_borrow_mut(|counts| std::mem::swap(counts, self));
        self.marks = crate::cover::replace(marks);
    }
}

/// Counts a run of so many events.
pub(super) fn count_events(count: u64) {
    COUNTS.with_borrow_mut(|counts| counts.events += count);
}

/// Counts a crash into one state.
pub(super) fn count_crash() {
    COUNTS.with_borrow_mut(|counts| counts.crashes += 1);
}

/// Counts a fault that happened on this thread.
pub(super) fn count_fault(name: &'static str) {
    COUNTS.with_borrow_mut(|counts| *counts.faults.entry(name).or_default() += 1);
}

/// What was explored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Scripts or histories run.
    pub histories: u64,
    /// Moments at which a crash was tried.
    pub crash_points: u64,
    /// Different states after crashes from which the system was opened again.
    pub crash_states: u64,
    /// Those of them that come from a crash during recovery.
    pub nested_states: u64,
    /// States beside these that were not tried, since one with equal disks and an equal model was.
    pub equal_states: u64,
    /// Crash points with more states than the limit, which were sampled.
    pub sampled_points: u64,
    /// Moments of recoveries at which no crash was tried, since only a share of them was asked for.
    pub left_out_points: u64,
    /// Events of all histories and recoveries.
    pub events: u64,
    /// Faults that happened, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Coverage marks reached, by name, and how often.
    pub marks: BTreeMap<&'static str, u64>,
}

impl Numbers {
    /// Adds what this thread counted of events, crashes of worlds, faults and marks since this was called last.
    pub fn collect(&mut self) {
        let mut counts = Counts::default();
        counts.swap();
        self.events += counts.events;
        self.crash_points += counts.crashes;
        self.crash_states += counts.crashes;
        for (name, count) in counts.faults {
            *self.faults.entry(name).or_default() += count;
        }
        for (name, count) in counts.marks {
            *self.marks.entry(name).or_default() += count;
        }
    }

    /// States after crashes that are known to be recovered from: those that were, and those equal to one of them.
    pub fn explored(&self) -> u64 {
        self.crash_states + self.equal_states
    }

    /// Counts a moment at which so many of these states are tried.
    pub(super) fn crash_point(&mut self, states: &CrashStates, limit: u64) {
        self.crash_points += 1;
        if states.total().is_none_or(|total| total > limit) {
            self.sampled_points += 1;
        }
    }

    /// Adds those of another exploration.
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.crash_points += other.crash_points;
        self.crash_states += other.crash_states;
        self.nested_states += other.nested_states;
        self.equal_states += other.equal_states;
        self.sampled_points += other.sampled_points;
        self.left_out_points += other.left_out_points;
        self.events += other.events;
        for (name, count) in &other.faults {
            *self.faults.entry(name).or_default() += count;
        }
        for (name, count) in &other.marks {
            *self.marks.entry(name).or_default() += count;
        }
    }

    /// The marks of `wanted` that were not reached: a test demands that there are none.
    pub fn missing<'a>(&self, wanted: &[&'a str]) -> Vec<&'a str> {
        let reached = |name: &&'a str| self.marks.contains_key(*name);
        wanted.iter().copied().filter(|name| !reached(name)).collect()
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} histories, {} crash points ({} sampled, {} left out), {} crash states ({} nested), {} events",
            self.histories,
            self.crash_points,
            self.sampled_points,
            self.left_out_points,
            self.crash_states,
            self.nested_states,
            self.events
        )?;
        if self.equal_states > 0 {
            write!(formatter, "; {} equal states skipped", self.equal_states)?;
        }
        for (title, counts) in [("faults", &self.faults), ("marks", &self.marks)] {
            if !counts.is_empty() {
                let list: Vec<String> = counts
                    .iter()
                    .map(|(name, count)| format!("{name} {count}"))
                    .collect();
                write!(formatter, "\n  {title}: {}", list.join(", "))?;
            }
        }
        Ok(())
    }
}

/// The system under test broke a promise, hung or panicked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What happened, and how to see it again.
    pub message: String,
    /// The last events before, oldest first, one line each.
    pub trace: Vec<String>,
}

impl Failure {
    /// Puts where it happened in front of the message.
    #[must_use]
    pub fn context(mut self, place: &str) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        let trace = Vec::new();
        Self { message, trace }
    }
}

impl From<&str> for Failure {
    fn from(message: &str) -> Self {
        message.to_owned().into()
    }
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        format!("{error}: {}", error.cause()).into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.message)?;
        for line in &self.trace {
            write!(formatter, "\n    {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}
