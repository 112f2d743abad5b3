//! What can be wrong with a configuration, and where it stands.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1.
    Line {
        /// The file as it was named.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// An override of the command line.
    Override(String),
}

impl Place {
    pub(super) fn line(path: &Path, line: usize) -> Self {
        Self::Line {
            path: path.to_owned(),
            line,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { path, line } => write!(formatter, "{}:{line}", path.display()),
            Self::Override(text) => write!(formatter, "--set {text}"),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("{}: {size} bytes are too many for a configuration, the limit is {limit}; is this the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The largest size in bytes.
        limit: u64,
    },
    /// Not TOML.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What the parser expected.
        message: String,
    },
    /// A key that does not exist, a value that is impossible.
    #[error("{place}: {key}: {message}")]
    Value {
        /// Where it was written.
        place: Place,
        /// The key with dots, as `--set` takes it; arrays count from 0.
        key: String,
        /// What is wrong and what would be accepted.
        message: String,
    },
    /// An override that cannot be applied.
    #[error("--set {text}: {message}")]
    Override {
        /// The override.
        text: String,
        /// What is wrong and what would be accepted.
        message: String,
    },
}
