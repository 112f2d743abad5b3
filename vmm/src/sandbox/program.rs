//! The sandbox of a program that is no machine, and speaks to the network: a gateway, a mover.
//!
//! It is coarser than that of a machine. All threads have the same rights, as they do the same things: they serve clients, connect to
//! sockets of this host, and read and write files in a few places. It is entered by the thread that starts all others, before it does; whoever takes over one of
//! them can start no program, connect to no other host, listen to nothing else, and open nothing that the configuration does not name.
//!
//! `SMSVMM_SECCOMP=log` lets everything pass and has the kernel log what would not; `SMSVMM_SECCOMP=off` goes without.

use std::env;
use std::path::PathBuf;

use landlock::{Access, AccessFs, RulesetCreated};
use rustix::thread::CapabilitySet;

use super::files::{self, Enforced, NEWEST};
use super::filter::Filter;
use super::{SandboxError, privileges, tables, violation};
use crate::config::Seccomp;

/// Where a program finds its files.
#[derive(Debug, Clone, Default)]
pub struct ProgramPlaces {
    /// Files, and folders with all that is below, that it reads.
    pub read: Vec<PathBuf>,
    /// Folders in which it makes, changes, renames and removes files.
    pub write: Vec<PathBuf>,
}

/// Confines the calling thread, and all that it starts from now on. What is open stays so. What this kernel cannot do is told as a warning, and
/// not missed.
///
/// # Errors
/// A place does not exist, or `SMSVMM_SECCOMP` is something else than `on`, `log` and `off`.
pub fn confine_program(places: &ProgramPlaces) -> Result<(), SandboxError> {
    let mode = mode()?;
    let rules = rules(places)?;
    // Sockets of machines, whose users are others, and their files, as far as root could reach them before.
    let dropped = privileges::drop_but(CapabilitySet::DAC_OVERRIDE);
    if let Err(error) = dropped {
        tracing::warn!(%error, "capabilities cannot be dropped");
    }
    match files::restrict(&rules) {
        Ok(Enforced::Fully(_) | Enforced::Partly(_)) => {}
        Ok(Enforced::Not) => tracing::warn!("files are not restricted: this kernel has no Landlock"),
        Err(error) => tracing::warn!(%error, "files are not restricted: Landlock is refused"),
    }
    if mode == Seccomp::On {
        let prepared = violation::install_handler().and_then(|()| privileges::hide_memory());
        if let Err(error) = prepared {
            tracing::warn!(%error, "the memory is not hidden");
        }
    }
    let compiled = Filter::of_program(tables::PROGRAM, mode);
    let installed = compiled.map(|filter| filter.map_or(Ok(()), |filter| filter.install()));
    match installed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "system calls are not restricted: the filter is refused"),
        Err(error) => tracing::warn!(%error, "system calls are not restricted: the filter cannot be made"),
    }
    Ok(())
}

/// What `SMSVMM_SECCOMP` wants.
pub(super) fn mode() -> Result<Seccomp, SandboxError> {
    match env::var("SMSVMM_SECCOMP").as_deref() {
        Err(_) | Ok("" | "on") => Ok(Seccomp::On),
        Ok("log") => Ok(Seccomp::Log),
        Ok("off") => Ok(Seccomp::Off),
        Ok(other) => Err(SandboxError::Mode(other.to_owned())),
    }
}

fn rules(places: &ProgramPlaces) -> Result<RulesetCreated, SandboxError> {
    let read = (AccessFs::from_read(NEWEST) & !AccessFs::Execute) | AccessFs::IoctlDev;
    let kinds = AccessFs::MakeChar
        | AccessFs::MakeBlock
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::MakeSym;
    let write = AccessFs::from_all(NEWEST) & !(AccessFs::Execute | AccessFs::IoctlDev) & !kinds;
    let rules = files::allow_all(files::ruleset(false)?, "sandbox", &places.read, read)?;
    files::allow_all(rules, "sandbox", &places.write, write)
}
