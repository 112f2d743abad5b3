//! What a simulation tells: numbers, and failures with the last events before them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;

use crate::IoError;

thread_local! {
    static FAULTS: RefCell<BTreeMap<&'static str, u64>> = const { RefCell::new(BTreeMap::new()) };
    /// Events, and crashes of worlds.
    static COUNTS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// Counts a run of so many events.
pub(super) fn count_events(count: u64) {
    let (events, crashes) = COUNTS.get();
    COUNTS.set((events + count, crashes));
}

/// Counts a crash into one state.
pub(super) fn count_crash() {
    let (events, crashes) = COUNTS.get();
    COUNTS.set((events, crashes + 1));
}

/// Counts a fault that happened on this thread.
pub(super) fn count_fault(name: &'static str) {
    FAULTS.with_borrow_mut(|faults| *faults.entry(name).or_default() += 1);
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
    /// Crash points with more states than the limit, which were sampled.
    pub sampled_points: u64,
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
        let (events, crashes) = COUNTS.take();
        self.events += events;
        self.crash_points += crashes;
        self.crash_states += crashes;
        for (name, count) in FAULTS.take() {
            *self.faults.entry(name).or_default() += count;
        }
        for (name, count) in crate::cover::take() {
            *self.marks.entry(name).or_default() += count;
        }
    }

    /// Adds those of another exploration.
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.crash_points += other.crash_points;
        self.crash_states += other.crash_states;
        self.nested_states += other.nested_states;
        self.sampled_points += other.sampled_points;
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
            "{} histories, {} crash points ({} sampled), {} crash states ({} nested), {} events",
            self.histories,
            self.crash_points,
            self.sampled_points,
            self.crash_states,
            self.nested_states,
            self.events
        )?;
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
