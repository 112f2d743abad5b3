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

    /// The name of a signal that has arrived, if one has: for commands that look now and then.
    pub(crate) fn arrived(&self) -> Option<&'static str> {
        self.wait(Some(Instant::now())).map(name)
    }

    /// Waits for a signal; its name.
    pub(crate) fn next(&self) -> &'static str {
        self.wait(None).map_or("the wait for a signal failed", name)
    }

    /// Starts the thread that turns signals into requests to `vm`; `on_start` runs first on it.
    pub(crate) fn serve(
        self,
        vm: Arc<dyn Vm>,
        patience: Duration,
        on_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        std::thread::Builder::new()
            .name("signals".to_owned())
            .stack_size(128 << 10)
            .spawn(move || match on_start() {
                Ok(()) => self.attend(&*vm, patience),
                Err(error) => warn!(%error, "signals cannot be waited for; only SIGKILL ends this process"),
            })
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;

    use api::virtual_disk::TransferRequest;
    use api::{
        DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventLog, NetConfig, NetStatus, Problem,
        ProblemKind, StorageAnswer, StorageRequest, Transfer, VmStatus,
    };

    use super::*;

    /// A guest that ignores its power button.
    #[derive(Default)]
    struct Stubborn {
        calls: Mutex<Vec<String>>,
        events: EventLog,
    }

    impl Stubborn {
        fn note<T>(&self, call: &str, result: T) -> Result<T, Problem> {
            self.calls.lock().unwrap().push(call.to_owned());
            Ok(result)
        }

        fn wait_for(&self, count: usize) -> Vec<String> {
            let limit = Instant::now() + Duration::from_secs(10);
            loop {
                let calls = self.calls.lock().unwrap().clone();
                if calls.len() >= count || Instant::now() > limit {
                    return calls;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn never<T>() -> Result<T, Problem> {
        Err(Problem::new(ProblemKind::Conflict, "signals do not do this"))
    }

    impl Vm for Stubborn {
        fn status(&self) -> VmStatus {
            unreachable!("signals do not ask")
        }

        fn power_button(&self) -> Result<(), Problem> {
            self.note("power button", ())
        }

        fn stop(&self, cause: &str) -> Result<(), Problem> {
            self.note(cause, ())
        }

        fn reset(&self) -> Result<(), Problem> {
            never()
        }

        fn pause(&self) -> Result<(), Problem> {
            never()
        }

        fn resume(&self) -> Result<(), Problem> {
            never()
        }

        fn attach_disk(&self, _disk: DiskConfig) -> Result<DiskStatus, Problem> {
            never()
        }

        fn attach_net(&self, _net: NetConfig) -> Result<NetStatus, Problem> {
            never()
        }

        fn detach(&self, _id: &DeviceId) -> Result<(), Problem> {
            never()
        }

        fn change_disk(&self, _id: &DeviceId, _change: &DiskChange) -> Result<DiskStatus, Problem> {
            never()
        }

        fn change_limits(&self, _group: &DeviceId, _change: &DiskLimits) -> Result<DiskLimits, Problem> {
            never()
        }

        fn storage(&self, _request: StorageRequest) -> Result<StorageAnswer, Problem> {
            never()
        }

        fn transfer(&self, _request: TransferRequest) -> Result<Transfer, Problem> {
            never()
        }

        fn events(&self) -> &EventLog {
            &self.events
        }
    }

    /// A thread that attends to signals of its own, and the means to send it one.
    fn attend(patience: Duration) -> (Arc<Stubborn>, impl Fn(i32)) {
        let vm = Arc::new(Stubborn::default());
        let (sender, receiver) = mpsc::channel();
        let machine = Arc::clone(&vm);
        std::thread::spawn(move || {
            let signals = Signals::block().unwrap();
            // SAFETY: gettid has no preconditions.
            sender.send(unsafe { libc::gettid() }).unwrap();
            signals.attend(&*machine, patience);
        });
        let thread = receiver.recv().unwrap();
        let send = move |signal: i32| {
            // SAFETY: sends a signal that the thread has blocked and waits for.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
            assert_eq!(result, 0);
        };
        (vm, send)
    }

    #[test]
    fn a_second_signal_stops_the_machine_at_once() {
        let (vm, send) = attend(Duration::from_secs(60));
        send(libc::SIGTERM);
        assert_eq!(vm.wait_for(1), ["power button"]);
        send(libc::SIGINT);
        assert_eq!(vm.wait_for(2), ["power button", "a second signal"]);
    }

    #[test]
    fn a_guest_that_does_not_shut_down_in_time_is_stopped() {
        let (vm, send) = attend(Duration::from_secs(1));
        send(libc::SIGHUP);
        assert_eq!(
            vm.wait_for(2),
            ["power button", "it did not shut down within 1 seconds"]
        );
    }
}
