//! What a hostile guest, peer or file may do to smsvmm, and what must hold then: the bodies of all fuzz targets.
//!
//! ```text
//!   bytes ──Target::execute──► Unstructured ──► a history: accesses, chains, frames …  ──► production code
//!                                                                                            │
//!                 panic ◄── the checker: no harm, no hang, nothing outside of guest memory ◄─┘
//! ```
//!
//! Two programs drive the same bodies: `fuzz/` hands them to libFuzzer, which looks for new ways through the code, and
//! the test `tests/replay.rs` runs the corpus and many pseudo-random inputs with every `cargo test`. A history is mostly
//! what a decent driver does and rarely what none would, because nonsense alone is refused at the first check.
//!
//! A body is a deterministic function of its bytes as far as the code under test is; the devices with threads of their
//! own are waited for. Failures are panics.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

pub mod memory;
pub mod random;

mod blk;
mod device;
mod disk;
mod filesys_image;
mod patience;
mod ring;
mod targets;

use arbitrary::Unstructured;

pub use targets::TARGETS;

/// One body.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name of the target and of its folder in `fuzz/corpus/`.
    pub name: &'static str,
    /// What it attacks.
    pub about: &'static str,
    /// Longest input that makes sense, in bytes.
    pub max_length: usize,
    /// Whether this machine can run it.
    pub is_possible: fn() -> bool,
    body: fn(&mut Unstructured<'_>) -> arbitrary::Result<()>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name)
    }
}

impl Target {
    /// The target called `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Makes a history of `data` and lives through it.
    ///
    /// # Panics
    /// Something does not hold that must.
    pub fn execute(&self, data: &[u8]) {
        patience::count_panics();
        let data = &data[..data.len().min(self.max_length)];
        // An error means that the bytes are used up before the history is complete: it ends there.
        let _ = (self.body)(&mut Unstructured::new(data));
        patience::assert_no_panics();
    }
}
