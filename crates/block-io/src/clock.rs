//! Time for code that must not ask the machine for it: the simulator has a clock of its own.

use std::future::Future;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::EventFd;

use crate::worker::EventWatch;

/// A clock that never goes back, and can wait.
pub trait Clock {
    /// Time since some moment that stays the same while the clock exists.
    fn now(&self) -> Duration;

    /// As [`Self::now`], but may be behind by what the worker has done since it last looked for completions: for counters of
    /// latency, which are asked for at the begin and the end of every request.
    fn moment(&self) -> Duration {
        self.now()
    }

    /// Waits at least so long.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()>;
}

/// The machine's clock, for tasks of a [`Worker`](crate::Worker).
#[derive(Debug, Clone, Copy)]
pub struct WorkerClock {
    start: Instant,
    /// The same as [`crate::moment_nanos`] counts.
    start_nanos: u64,
}

impl WorkerClock {
    /// A clock that shows zero now.
    pub fn new() -> Self {
        let start = Instant::now();
        Self {
            start,
            start_nanos: crate::worker::nanos_of(start),
        }
    }
}

impl Default for WorkerClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for WorkerClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn moment(&self) -> Duration {
        Duration::from_nanos(crate::worker::moment_nanos().saturating_sub(self.start_nanos))
    }

    async fn sleep(&self, duration: Duration) {
        let end = Instant::now() + duration;
        while let Some(rest) = end
            .checked_duration_since(Instant::now())
            .filter(|rest| !rest.is_zero())
        {
            let waited = match timer(rest) {
                Ok(timer) => match EventWatch::new(timer) {
                    Ok(mut watch) => watch.wait().await,
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            if let Err(error) = waited {
                tracing::warn!(%error, "no timer to be had: a block-io worker sleeps as a whole");
                std::thread::sleep(rest.min(Duration::from_millis(10)));
            }
        }
    }
}

/// A timer that fires once; it is read like an eventfd.
fn timer(duration: Duration) -> io::Result<EventFd> {
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    let once = Itimerspec {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: Timespec {
            tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: duration.subsec_nanos().into(),
        },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    // SAFETY: the descriptor is open and owned by nobody else. It is no eventfd, but a timer gives eight bytes to a
    // read, too, and polls the same.
    Ok(unsafe { EventFd::from_raw_fd(timer.into_raw_fd()) })
}
