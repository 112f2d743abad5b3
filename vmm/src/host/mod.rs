//! What this host offers to virtual machines, and what to do where something is missing or wrong.
//!
//! Two users: `smsvmm host check` shows [`examine`]'s report; `smsvmm run` asks [`can_boot_stock_kernel`] before it starts
//! anything, because a guest on a KVM that lacks instructions hangs without a word.

mod features;
mod image;
mod kvm;
pub mod microguest;
mod report;

pub use features::{available_memory, find_program};
pub use image::{CutOff, find_cut_off};
pub use kvm::can_boot_stock_kernel;
pub use microguest::Remains;
pub use report::{Finding, Level, Report};

use std::path::PathBuf;

/// Why this host cannot boot a stock kernel. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostProblem {
    /// There is no /dev/kvm.
    #[error("this host has no {}; {remedy}", path.display())]
    NoKvm {
        /// The device.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// /dev/kvm may not be opened.
    #[error("no permission to use {}; {remedy}", path.display())]
    NoPermission {
        /// The device.
        path: PathBuf,
        /// What to do.
        remedy: String,
    },
    /// KVM speaks another language.
    #[error(
        "KVM has API version {found}, {expected} is needed; use a kernel that is not older than Linux 5.10"
    )]
    ApiVersion {
        /// What the host has.
        found: i32,
        /// What smsvmm speaks.
        expected: i32,
    },
    /// Something that every guest needs is missing.
    #[error("KVM lacks {}; use a newer kernel (Linux 6.1 has them all)", .0.join(", "))]
    MissingCapabilities(Vec<&'static str>),
    /// KVM does not run instructions that every kernel uses.
    #[error("KVM cannot run a stock kernel here: {step} fails ({failure}); {remedy}")]
    Instruction {
        /// What the micro-guest executed.
        step: &'static str,
        /// What happened.
        failure: microguest::Failure,
        /// What to do.
        remedy: &'static str,
    },
    /// The kernel refused something else.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// Examines everything; takes a few milliseconds on hardware, up to some seconds where KVM hangs.
pub fn examine() -> Report {
    let mut findings = kvm::examine();
    findings.extend(features::examine());
    Report { findings }
}
