//! Signals that end a program have it give back first what it has taken.
//!
//! They are blocked, and a thread waits for them: the work looks now and then whether it shall end ([`check`]), and what it waits for
//! meanwhile is broken off by what it has left with [`on_stop`].

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::host::AgentError;

static STOPPED: AtomicBool = AtomicBool::new(false);
static SIGNAL: AtomicI32 = AtomicI32::new(0);
type Break = Box<dyn Fn() + Send>;
static BREAK: Mutex<Option<Break>> = Mutex::new(None);

/// From now on, signals only ask this program to end. To be called before it has other threads.
pub(crate) fn begin() -> Result<(), AgentError> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialised by the first call before it is used by the others.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    };
    let waiter = move || {
        loop {
            let mut signal = 0;
            // SAFETY: both are memory of this thread.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {
                return;
            }
            SIGNAL.store(signal, Ordering::Relaxed);
            STOPPED.store(true, Ordering::Release);
            eprintln!("sms-agent: ending; what was taken is given back first");
            if let Some(act) = BREAK.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                act();
            }
        }
    };
    let spawned = std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(waiter);
    let what = "a thread for signals".to_owned();
    spawned
        .map(drop)
        .map_err(|source| AgentError::Here { what, source })
}

/// What is done on the thread of signals to break off what is waited for.
pub(crate) fn on_stop(act: impl Fn() + Send + 'static) {
    *BREAK.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(act));
    if STOPPED.load(Ordering::Acquire)
        && let Some(act) = BREAK.lock().unwrap_or_else(PoisonError::into_inner).as_ref()
    {
        act();
    }
}

/// Whether to go on.
///
/// # Errors
/// A signal came.
pub(crate) fn check() -> Result<(), AgentError> {
    match STOPPED.load(Ordering::Acquire) {
        true => Err(AgentError::Text(format!(
            "ended by signal {}",
            SIGNAL.load(Ordering::Relaxed)
        ))),
        false => Ok(()),
    }
}
