//! Wakes the main loop for a console, now or in a moment.
//!
//! A timer descriptor does both. "In a moment" lets a vCPU that writes character by character pile up a line before anybody
//! does a system call for it; "now" is for what cannot wait. While the bell has rung already, ringing costs nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

const QUIET: u8 = 0;
const SOON: u8 = 1;
const NOW: u8 = 2;

/// The bell. Rung from any thread, answered by the main loop, which polls it for input.
#[derive(Debug)]
pub(super) struct Doorbell {
    timer: OwnedFd,
    state: AtomicU8,
}

impl Doorbell {
    pub(super) fn new() -> std::io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        Ok(Self {
            timer,
            state: AtomicU8::new(QUIET),
        })
    }

    /// Wakes the main loop at once.
    pub(super) fn ring_now(&self) {
        if self.state.swap(NOW, Ordering::SeqCst) != NOW {
            self.arm(Duration::from_nanos(1));
        }
    }

    /// Wakes the main loop after `delay`, unless it will be woken anyway.
    pub(super) fn ring_after(&self, delay: Duration) {
        if self
            .state
            .compare_exchange(QUIET, SOON, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            self.arm(delay);
        }
    }

    /// The main loop answers, before it looks at what is to be done: whoever adds work later rings again.
    pub(super) fn answer(&self) {
        let mut count = [0; 8];
        // Nothing to read means that another ring re-armed the timer: the work gets done all the same.
        let _ = rustix::io::read(&self.timer, &mut count);
        self.state.store(QUIET, Ordering::SeqCst);
    }

    /// Wakes the main loop after `delay` in any case. For the main loop itself.
    pub(super) fn ring_at_latest(&self, delay: Duration) {
        self.arm(delay.max(Duration::from_nanos(1)));
        // Somebody who rang meanwhile may have been overruled.
        if self.state.load(Ordering::SeqCst) != QUIET {
            self.arm(Duration::from_nanos(1));
        }
    }

    fn arm(&self, delay: Duration) {
        let value = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(delay.subsec_nanos()),
            },
        };
        // It can fail only for a time that is not one, or a descriptor that is no timer.
        let result = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value);
        debug_assert!(result.is_ok(), "arming a console's timer: {result:?}");
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
