//! Puts the user's terminal into raw mode, and back however the process ends.
//!
//! A process has one terminal, so the saved settings are global: [`restore`] may be called by anybody, any number of times,
//! also from a signal handler. It is called by the console's owner, by `exit`, by a panic hook, and by handlers for the
//! signals that end a process, as far as nobody else handles those.

use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{io, mem, ptr};

/// A terminal and its settings from before.
struct Saved {
    fd: RawFd,
    settings: libc::termios,
}

/// Null while no terminal is in raw mode. What it points to is never freed, because a signal handler may be using it.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

/// Signals that end a process by default, and whose handlers can go back to where they came from.
const ENDING_SIGNALS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSYS,
    libc::SIGPIPE,
];
/// Signals of a failing instruction, which fails again when the handler returns.
const FAULT_SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Whether a terminal is in raw mode, so that text for people needs `\r\n` at the ends of lines.
pub fn is_raw() -> bool {
    !SAVED.load(Ordering::SeqCst).is_null()
}

/// Whether `fd` is a terminal that this process may use: one in whose foreground it runs.
pub(super) fn is_usable(fd: BorrowedFd<'_>) -> bool {
    if !rustix::termios::isatty(fd) {
        return false;
    }
    // A terminal that does not control this process has no job control.
    rustix::termios::tcgetpgrp(fd).map_or(true, |foreground| foreground == rustix::process::getpgrp())
}

/// Puts the terminal `fd` into raw mode: every key goes to the guest as it is. [`restore`] ends it, and so does every end of
/// the process but SIGKILL.
///
/// # Errors
/// It is no terminal, or refuses.
pub fn enter_raw_mode(fd: BorrowedFd<'_>) -> io::Result<()> {
    // The handlers need a descriptor that lives as long as the process.
    let fd = fd.try_clone_to_owned()?.into_raw_fd();
    let mut settings = mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: `fd` is open and `settings` is writable; it is initialised when the call succeeds.
    let settings = unsafe {
        if libc::tcgetattr(fd, settings.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        settings.assume_init()
    };
    let mut raw = settings;
    // SAFETY: `raw` is a valid termios, which the call changes.
    unsafe { libc::cfmakeraw(&raw mut raw) };

    install_restorers();
    SAVED.store(Box::into_raw(Box::new(Saved { fd, settings })), Ordering::SeqCst);
    // SAFETY: `fd` is open and `raw` is a valid termios.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) } != 0 {
        let error = io::Error::last_os_error();
        restore();
        return Err(error);
    }
    Ok(())
}

/// Gives the terminal back as it was, if it is in raw mode.
pub fn restore() {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: what was stored is never freed.
    let Some(saved) = (unsafe { saved.as_ref() }) else {
        return;
    };
    // SAFETY: all calls are async-signal-safe and get valid pointers. SIGTTOU, which a process in the background would
    // get, and be stopped by, is blocked for the moment.
    unsafe {
        let mut block = mem::zeroed::<libc::sigset_t>();
        let mut before = mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut block);
        libc::sigaddset(&raw mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const block, &raw mut before);
        libc::tcsetattr(saved.fd, libc::TCSANOW, &raw const saved.settings);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
}

/// Sees to it, once, that every end of the process restores the terminal.
fn install_restorers() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            inner(panic);
        }));
        // SAFETY: the function takes nothing, returns nothing and does not unwind.
        unsafe { libc::atexit(at_exit) };
        for signal in ENDING_SIGNALS {
            handle(signal, ending_signal as *const () as libc::sighandler_t, |old| {
                old == libc::SIG_DFL
            });
        }
        for signal in FAULT_SIGNALS {
            handle(signal, fault_signal as *const () as libc::sighandler_t, |old| {
                old != libc::SIG_IGN
            });
        }
    });
}

extern "C" fn at_exit() {
    restore();
}

/// What was there before for each signal, for the handlers.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 32] = [const { AtomicPtr::new(ptr::null_mut()) }; 32];

/// Installs `handler` for `signal` if `wanted` says so of the present one.
fn handle(signal: libc::c_int, handler: libc::sighandler_t, wanted: fn(libc::sighandler_t) -> bool) {
    let Some(slot) = usize::try_from(signal)
        .ok()
        .and_then(|signal| PREVIOUS.get(signal))
    else {
        return;
    };
    // SAFETY: all pointers are valid; the handlers do only what a signal handler may.
    unsafe {
        let mut old = mem::zeroed::<libc::sigaction>();
        if libc::sigaction(signal, ptr::null(), &raw mut old) != 0 || !wanted(old.sa_sigaction) {
            return;
        }
        // Leaked: the handler may need it at any time.
        slot.store(Box::into_raw(Box::new(old)), Ordering::SeqCst);
        let mut new = mem::zeroed::<libc::sigaction>();
        new.sa_sigaction = handler;
        // On the alternate stack, if the thread has one: the fault may be a stack overflow.
        new.sa_flags = libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut new.sa_mask);
        libc::sigaction(signal, &raw const new, ptr::null_mut());
    }
}

/// Puts back what handled `signal` before.
fn unhandle(signal: libc::c_int) {
    let previous = usize::try_from(signal)
        .ok()
        .and_then(|signal| PREVIOUS.get(signal));
    let previous = previous.map_or(ptr::null_mut(), |slot| slot.load(Ordering::SeqCst));
    if !previous.is_null() {
        // SAFETY: it points to a sigaction that is never freed.
        unsafe { libc::sigaction(signal, previous, ptr::null_mut()) };
    }
}

/// Restores the terminal, then lets the signal do what it does.
extern "C" fn ending_signal(signal: libc::c_int) {
    restore();
    unhandle(signal);
    // SAFETY: always safe to call. The signal is blocked until this handler returns, and then ends the process.
    unsafe { libc::raise(signal) };
}

/// Restores the terminal; the failing instruction then meets the previous handler.
extern "C" fn fault_signal(signal: libc::c_int) {
    restore();
    unhandle(signal);
}

/// Puts `fd`, the user's end of a pseudo-terminal of ours, into raw mode, for as long as it exists.
pub(super) fn make_raw(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut settings = rustix::termios::tcgetattr(fd)?;
    settings.make_raw();
    rustix::termios::tcsetattr(fd, rustix::termios::OptionalActions::Now, &settings)?;
    Ok(())
}
