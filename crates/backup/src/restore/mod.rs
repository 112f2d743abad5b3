//! Backups become files again, without any agent: a tree below a folder, or a raw disk.

mod disk;
mod tree;

use std::path::PathBuf;

pub use disk::restore_disk;
pub use tree::{TreeWriter, restore_tree};

use crate::archive::ChainError;
use crate::raw_text::RawText;

/// What cannot be restored at all. What of single files cannot be is told in [`Restored`].
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup cannot be read. What was restored before is right up to the last entry that is whole.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The target cannot be used.
    #[error("cannot write to {}", path.display())]
    Target {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The backup has no such thing.
    #[error("{0}")]
    Nothing(String),
}

/// What was restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Restored {
    /// Entries.
    pub entries: u64,
    /// Bytes of files, holes not counted.
    pub bytes: u64,
    /// What could not be restored as it was: the first hundred.
    pub problems: Vec<String>,
    /// How many there were.
    pub problem_count: u64,
}

impl Restored {
    fn problem(&mut self, path: &RawText, what: &str) {
        self.problem_count += 1;
        if self.problems.len() < 100 {
            self.problems.push(format!("{path}: {what}"));
        }
    }
}

/// Whether a path is one of these, or below one; all are if there are none.
pub(crate) fn is_selected(paths: &[RawText], path: &RawText) -> bool {
    paths.is_empty()
        || paths.iter().any(|wanted| {
            let rest = path.0.strip_prefix(wanted.0.as_slice());
            rest.is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'/') || wanted.0.is_empty())
        })
}
