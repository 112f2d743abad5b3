//! What the exit status tells.

use std::process::ExitCode;

use api::ExitReason;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// As asked; for `run`: the guest powered itself off.
    Success = 0,
    /// It failed.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// `run`: the guest crashed.
    GuestCrashed = 3,
    /// `run`: the machine was stopped hard.
    Stopped = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl From<&ExitReason> for Exit {
    fn from(reason: &ExitReason) -> Self {
        match reason {
            ExitReason::PowerOff | ExitReason::Reboot => Self::Success,
            ExitReason::Crash { .. } => Self::GuestCrashed,
            ExitReason::Stopped { .. } => Self::Stopped,
        }
    }
}

/// An error of the caller's, which ends with status 2.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct UsageError(pub(crate) Box<dyn std::error::Error + Send + Sync>);

impl UsageError {
    pub(crate) fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}
