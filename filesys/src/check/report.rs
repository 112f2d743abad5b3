//! What a check finds, and how it tells.

use std::cell::Cell;
use std::fmt;

use super::mend::Mend;

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Space is lost, or a number is wrong. Nothing can be damaged by that.
    Minor,
    /// Metadata contradict each other: going on may damage data.
    Major,
    /// Something is damaged or lost already.
    Loss,
}

impl fmt::Display for Severity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Minor => "minor",
            Self::Major => "major",
            Self::Loss => "loss",
        })
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: a file with its number, a volume, a table.
    pub object: String,
    /// What is wrong with it, in words.
    pub problem: String,
    /// Whether a repair mends it. It is not so where data would have to be guessed.
    pub repairable: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            severity,
            object,
            problem,
            ..
        } = self;
        write!(formatter, "{severity}: {object}: {problem}")
    }
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Metadata pages that were read and verified.
    pub pages: u64,
    /// Metadata pages that are in use, as far as is known: what `pages` grows to.
    pub pages_in_all: u64,
    /// Files that were looked at.
    pub files: u64,
    /// Directories that were looked at.
    pub directories: u64,
    /// Names in them.
    pub names: u64,
    /// Clusters that files have.
    pub clusters: u64,
    /// Findings so far.
    pub findings: u64,
}

/// How a file system is checked.
#[derive(Clone, Copy)]
pub struct CheckOptions<'a> {
    /// What can be mended without guessing is. Nobody else may change the file system meanwhile.
    pub repair: bool,
    /// Most findings that are kept in words; the others are counted.
    pub most_findings: usize,
    /// Is told now and then how far it is.
    pub progress: Option<&'a dyn Fn(&Progress)>,
}

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        Self {
            repair: false,
            most_findings: 10_000,
            progress: None,
        }
    }
}

impl fmt::Debug for CheckOptions<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("CheckOptions")
            .field("repair", &self.repair)
            .field("most_findings", &self.most_findings)
            .finish_non_exhaustive()
    }
}

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// What was wrong, before anything was mended.
    pub findings: Vec<Finding>,
    /// How many more there were than were kept.
    pub unlisted: u64,
    /// What is still wrong after the repair; without a repair, nothing is said here.
    pub left: Vec<Finding>,
    /// How many changes were made to mend what was wrong.
    pub repaired: u64,
    /// What was looked at.
    pub totals: Progress,
}

impl Report {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.unlisted == 0
    }
}

/// Findings while they are made, with what would mend them.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) list: Vec<Finding>,
    pub(super) mends: Vec<Mend>,
    pub(super) unlisted: Cell<u64>,
    most: usize,
}

impl Findings {
    pub(super) fn new(most: usize) -> Self {
        Self {
            list: Vec::new(),
            mends: Vec::new(),
            unlisted: Cell::new(0),
            most: most.max(1),
        }
    }

    /// Something that nothing mends.
    pub(super) fn add(&mut self, severity: Severity, object: impl ToString, problem: impl ToString) {
        self.put(severity, object, problem, false);
    }

    /// Something that is mended by this.
    pub(super) fn mendable(
        &mut self,
        severity: Severity,
        object: impl ToString,
        problem: impl ToString,
        mends: impl IntoIterator<Item = Mend>,
    ) {
        // What is not listed is mended in the next round.
        if self.put(severity, object, problem, true) {
            self.mends.extend(mends);
        }
    }

    fn put(
        &mut self,
        severity: Severity,
        object: impl ToString,
        problem: impl ToString,
        repairable: bool,
    ) -> bool {
        if self.list.len() >= self.most {
            self.unlisted.set(self.unlisted.get() + 1);
            return false;
        }
        let finding = Finding {
            severity,
            object: object.to_string(),
            problem: problem.to_string(),
            repairable,
        };
        tracing::debug!(%finding, repairable, "check");
        self.list.push(finding);
        true
    }

    pub(super) fn count(&self) -> u64 {
        self.list.len() as u64 + self.unlisted.get()
    }
}
