//! Waiting for devices with threads, and noticing when one of those dies.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Nothing takes this long but a hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// Panics of threads that devices made.
static PANICS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// This thread runs targets: its panics are failures without being counted.
    static RUNS_TARGETS: Cell<bool> = const { Cell::new(false) };
}

/// Counts panics from now on, on all threads but those that call this.
pub(crate) fn count_panics() {
    static HOOK: Once = Once::new();
    RUNS_TARGETS.set(true);
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !RUNS_TARGETS.get() {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            previous(panic);
        }));
    });
}

/// Fails if a thread has panicked: devices report the death of a thread of theirs in the log only.
pub(crate) fn assert_no_panics() {
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "a thread of a device panicked");
}

/// Waits until `done`, mostly some microseconds.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    for round in 0_u64.. {
        if done() {
            return;
        }
        if round < 50 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
            assert_no_panics();
            assert!(started.elapsed() < PATIENCE, "hang: waited in vain for {what}");
        }
    }
}
