//! The allocator's manners during long explorations.

use std::sync::Once;

/// Keeps memory that is given back within the process, from the first call on. Every recovery allocates and frees the same
/// buffers again; without this, glibc returns their pages to the kernel each time and takes new ones, which costs more time than
/// all the rest.
pub(super) fn keep() {
    static ONCE: Once = Once::new();
    #[cfg(target_env = "gnu")]
    ONCE.call_once(|| {
        for (parameter, bytes) in [
            (libc::M_MMAP_THRESHOLD, 32 << 20),
            (libc::M_TRIM_THRESHOLD, 512 << 20),
        ] {
            // SAFETY: both are sizes that only decide when memory is returned. A refusal leaves it slow.
            unsafe { libc::mallopt(parameter, bytes) };
        }
    });
    #[cfg(not(target_env = "gnu"))]
    ONCE.call_once(|| {});
}
