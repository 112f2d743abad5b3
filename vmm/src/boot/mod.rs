//! From a kernel file to a vCPU that stands at its first instruction.
//!
//! Two ways in, as distributions ship kernels:
//!
//! ```text
//!   bzImage (vmlinuz)  ─► 64-bit entry point, zero page          Linux boot protocol, "64-bit boot protocol"
//!   ELF (vmlinux)      ─► 32-bit PVH entry point, start info     Xen PVH boot ABI, as the ELF note says
//! ```
//!
//! [`Kernel::open`] checks the file when the VM is prepared, so that a wrong or truncated one is an error before anything
//! has started. [`Kernel::load`] writes kernel, initrd, command line and tables into guest memory, and returns the
//! [`Entry`] from which [`registers`] makes the boot vCPU's state. Where things lie is told in [`crate::layout`].

mod kernel;
mod params;
pub mod registers;

use std::io;
use std::path::PathBuf;

pub use kernel::{BootFiles, Kernel};

/// Where and how the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, paging on, RSI points to the zero page (Linux boot protocol §1.14).
    Linux64 {
        /// Guest physical address of the first instruction.
        address: u64,
    },
    /// Protected mode, paging off, EBX points to the start info (PVH boot ABI).
    Pvh {
        /// Guest physical address of the first instruction.
        address: u64,
    },
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} {path}")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The file is no kernel.
    #[error(
        "{path} is not a kernel that can be booted: {reason}; a distribution's /boot/vmlinuz-* or an ELF vmlinux is needed"
    )]
    NotAKernel {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file ends too early.
    #[error("the kernel {path} is truncated: it has {size} bytes and its header promises {expected}")]
    Truncated {
        /// Path of the file.
        path: PathBuf,
        /// Bytes in the file.
        size: u64,
        /// Bytes that its header promises.
        expected: u64,
    },
    /// Kernel, initrd and what they need do not fit into the guest's memory.
    #[error("{what} of {size} MiB does not fit into the guest's memory; give the VM more `memory`")]
    DoesNotFit {
        /// `the kernel` or `the initrd`.
        what: &'static str,
        /// Its size in MiB, rounded up.
        size: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} characters, {limit} are possible with this kernel")]
    CommandLineTooLong {
        /// Characters in the command line.
        length: usize,
        /// Characters that fit.
        limit: usize,
    },
    /// Guest memory could not be written; cannot happen for addresses of [`crate::layout`].
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}
