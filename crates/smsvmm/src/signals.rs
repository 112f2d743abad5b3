//! Signals to `smsvmm run`: first the power button, then the plug.
//!
//! ```text
//!   TERM, INT, HUP ──► power button ──► guest shuts down ──► the process ends
//!                        │ another one, or power.shutdown-timeout
//!                        ▼
//!                      stop hard ──► another one: exit at once
//! ```
//!
//! The signals are blocked in all threads (before any is started) and taken by one that waits for them: no handler, so
//! nothing that a handler must not do.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use api::Vm;
use tracing::warn;

use crate::exit::Exit;
use crate::logs;

const ENDING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Ending signals, blocked in this thread and all that it starts.
pub(crate) struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    /// Blocks the ending signals; to be called before the first thread is started.
    pub(crate) fn block() -> io::Result<Self> {
        // SAFETY: `set` is initialised by sigemptyset before it is used; all pointers are valid for the calls.
        let (set, result) = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in ENDING {
                libc::sigaddset(&raw mut set, signal);
            }
            (
                set,
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()),
            )
        };
        if result == 0 {
            Ok(Self { set })
        } else {
            Err(io::Error::from_raw_os_error(result))
        }
    }

    /// Starts the thread that turns signals into requests to `vm`.
    pub(crate) fn serve(self, vm: Arc<dyn Vm>, patience: Duration) -> anyhow::Result<()> {
        std::thread::Builder::new()
            .name("signals".to_owned())
            .stack_size(128 << 10)
            .spawn(move || self.attend(&*vm, patience))
            .context("cannot start the thread that waits for signals")?;
        Ok(())
    }

    fn attend(&self, vm: &dyn Vm, patience: Duration) {
        let Some(first) = self.wait(None) else { return };
        match vm.power_button() {
            Ok(()) => logs::say(&format!(
                "smsvmm: {}: the guest was asked to shut down; again to stop it at once",
                name(first)
            )),
            Err(problem) => warn!(%problem, "the power button cannot be pressed"),
        }
        let cause = match self.wait(Some(Instant::now() + patience)) {
            Some(_) => "a second signal".to_owned(),
            None => format!("it did not shut down within {} seconds", patience.as_secs()),
        };
        if let Err(problem) = vm.stop(&cause) {
            warn!(%problem, "the machine cannot be stopped");
        }
        if let Some(signal) = self.wait(None) {
            logs::say(&format!("smsvmm: {}: exit without clean-up", name(signal)));
            // SAFETY: ends the process; nothing of it is used any more.
            unsafe { libc::_exit(Exit::Stopped as i32) };
        }
    }

    /// The next ending signal, or none if `deadline` comes first.
    fn wait(&self, deadline: Option<Instant>) -> Option<i32> {
        loop {
            let signal = match deadline {
                // SAFETY: the set is initialised; the information on the signal is not asked for.
                None => unsafe { libc::sigwaitinfo(&raw const self.set, std::ptr::null_mut()) },
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let left = libc::timespec {
                        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                        tv_nsec: i64::from(left.subsec_nanos()),
                    };
                    // SAFETY: as above; the time is valid for the call.
                    unsafe { libc::sigtimedwait(&raw const self.set, std::ptr::null_mut(), &raw const left) }
                }
            };
            if signal > 0 {
                return Some(signal);
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                _ => return None,
            }
        }
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        _ => "signal",
    }
}
