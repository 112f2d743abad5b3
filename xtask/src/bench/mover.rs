//! `cargo xtask bench mover`: the mover of backups beside programs that do the same job, on files in memory.
//!
//! XFS on zram, as past the page cache it behaves as a fast device does; the bench itself is `crates/smsvmm/benches/mover`.

use std::process::ExitCode;

use anyhow::Result;

use super::filesys::{InMemory, cargo_bench, in_memory};

/// Runs the bench; `arguments` are passed on.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    let made = InMemory::make();
    cargo_bench("smsvmm", "mover", &[&in_memory(&made)], arguments)
}
