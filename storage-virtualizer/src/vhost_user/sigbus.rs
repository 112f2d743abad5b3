//! Survives a front-end that truncates its memory while it is mapped here.
//!
//! An access beyond the end of a mapped file is a SIGBUS, which kills the process and with it the disks of all other
//! front-ends. So mappings of front-ends are noted in a table, and a handler of the signal looks there: if the address lies in
//! one of them, it maps anonymous memory over the page and returns. The access then sees zeroes, which the code above checks as it
//! checks everything that a guest writes. Any other SIGBUS goes where it went before.
//!
//! The kernel's own accesses to such memory (io_uring) fail with EFAULT and need none of this.
//!
//! The handler does what is allowed in one: it reads atomics and calls `mmap` and `sigaction`.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};

/// The most mappings that are watched at once; those beyond it are used unwatched, with a warning.
const SLOTS: usize = 4096;
/// Large enough for every page size that matters: a huge page cannot be replaced in part, so the smallest is tried.
const PAGE: usize = 4096;

/// First byte and first byte behind; an end of 0 is a free slot.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
    }
}; SLOTS];
/// Slots beyond this were never used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// A mapping that is watched as long as this lives.
#[derive(Debug)]
pub(super) struct Guard {
    slot: Option<usize>,
}

impl Guard {
    /// Watches a mapping, which outlives the guard.
    pub(super) fn new(start: usize, length: usize) -> Self {
        install();
        let taken = TABLE.iter().position(|slot| {
            // Reserved by an empty range, then filled.
            slot.end
                .compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        });
        match taken {
            Some(slot) => {
                TABLE[slot].start.store(start, Ordering::SeqCst);
                TABLE[slot].end.store(start + length, Ordering::SeqCst);
                USED.fetch_max(slot + 1, Ordering::SeqCst);
            }
            None => tracing::warn!("too many memory regions: one is used that may be truncated under us"),
        }
        Self { slot: taken }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            TABLE[slot].start.store(usize::MAX, Ordering::SeqCst);
            TABLE[slot].end.store(0, Ordering::SeqCst);
        }
    }
}

/// What was done on SIGBUS before.
static mut PREVIOUS: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler has the signature that SA_SIGINFO asks for and is async-signal-safe; `PREVIOUS` is written
        // here, once, before the handler can run, as nothing is in the table yet.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, (&raw mut PREVIOUS).cast())
        };
        if result != 0 {
            tracing::warn!("cannot catch SIGBUS: a front-end that truncates its memory ends this process");
        }
    });
}

extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid `info` with SA_SIGINFO, and for SIGBUS of an access it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let watched = TABLE[..USED.load(Ordering::SeqCst).min(SLOTS)]
        .iter()
        .any(|slot| (slot.start.load(Ordering::SeqCst)..slot.end.load(Ordering::SeqCst)).contains(&address));
    // SAFETY: the page lies in a mapping of a front-end's memory, which is accessed only by volatile and atomic operations,
    // and whose owner is the thread that waits in this handler: nothing that Rust reasons about changes. Otherwise the old
    // action is put back and the access is repeated under it.
    unsafe {
        if watched {
            let page = ptr::without_provenance_mut(address & !(PAGE - 1));
            let mapped = libc::mmap(
                page,
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            );
            if mapped == page {
                return;
            }
        }
        libc::sigaction(signal, (&raw const PREVIOUS).cast(), ptr::null_mut());
    }
}
