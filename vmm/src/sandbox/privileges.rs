//! Gives up what a process may have beyond an ordinary one: capabilities, the way to more of them, and its memory as a file.

use std::io;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Drops all capabilities of the calling thread, from all sets, and the possibility to gain any.
pub(super) fn drop_all() -> io::Result<()> {
    drop_but(CapabilitySet::empty())
}

/// The same, but for those of `kept` that it has.
pub(super) fn drop_but(kept: CapabilitySet) -> io::Result<()> {
    let present = rustix::thread::capabilities(None)?;
    let kept = kept & present.permitted;
    let none = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    if present.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    // A thread that is started inside the sandbox has none, and need not be allowed to set them.
    if present != none {
        // The ambient set follows: it has nothing that is not permitted.
        rustix::thread::set_capabilities(None, none)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// Drops the capabilities that programs started from here could get.
fn empty_bounding_set() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// No core dump, and no other process of the same user may look into this one's memory, which is also the guest's.
pub(super) fn hide_memory() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Whether this process runs as root.
pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
