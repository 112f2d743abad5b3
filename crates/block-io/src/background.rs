//! Threads that this crate starts by itself, and what confines them: those that connect to servers again, and those that block in system calls for
//! workers. They may start at any time, by a thread that is not confined yet or by one that is more than they may be.

use std::sync::OnceLock;

use crate::worker::Hook;

/// What such threads run first; the place for a seccomp filter. An error is logged, and the thread does its work.
pub struct BackgroundHooks {
    /// On threads that connect to servers of devices.
    pub connects: Box<Hook>,
    /// On threads that do requests where io_uring is refused.
    pub blocks: Box<Hook>,
}

impl std::fmt::Debug for BackgroundHooks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("BackgroundHooks").finish_non_exhaustive()
    }
}

static HOOKS: OnceLock<BackgroundHooks> = OnceLock::new();

/// From now on, threads that this crate starts by itself run these first. To be called once, before a device is opened; later calls change
/// nothing.
pub fn hook_background(hooks: BackgroundHooks) {
    let _ = HOOKS.set(hooks);
}

/// Runs one of the hooks on this thread, if there are any.
pub(crate) fn begin(which: impl FnOnce(&BackgroundHooks) -> &Hook) {
    if let Some(hooks) = HOOKS.get()
        && let Err(error) = which(hooks)()
    {
        tracing::error!(%error, "a thread cannot be confined");
    }
}
