//! A guest of a few hundred bytes that proves whether this host's KVM can run a stock kernel.
//!
//! Hardware virtualisation runs every instruction. A software KVM (a paravirtual module on a machine without VT-x or AMD-V)
//! emulates the guest's kernel and lacks instructions that every distribution's kernel uses; a guest then hangs or dies
//! within the first second, without a word on its console. The micro-guest (`guest.s`) executes one kind of instruction per
//! step in real 64-bit mode with page tables, exceptions and a change to ring 3, and checks the results:
//!
//! ```text
//!   host                                  guest
//!   registers := step N  ──KVM_RUN──►     instructions, self-check
//!   next step            ◄──OUT 0x10──    0 passed, 1 wrong result
//!   exception            ◄──OUT 0x11──    vector
//!   cannot emulate       ◄──KVM_EXIT_INTERNAL_ERROR, with the bytes at RIP
//!   hangs                ◄──a timer's signal, which only KVM_RUN lets through (KVM_SET_SIGNAL_MASK)
//! ```
//!
//! All of it runs in a thread of its own and leaves nothing behind: no handler, no changed mask, no memory. The steps
//! take a quarter of a millisecond; ending the virtual machine takes forty times as long and happens in the background.

mod image;
mod run;

use std::fmt;
use std::time::Duration;

pub use run::{Remains, Verdict, check};

/// Longest time for all steps. Hardware needs a few milliseconds, software emulation tens.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// What one step of the micro-guest executes, in the order of its table, and the CPUID bit without which no kernel does.
const STEPS: [(&str, Option<Feature>); 16] = [
    ("integer arithmetic, stack, flags", None),
    ("lock-prefixed read-modify-write", None),
    ("cmpxchg16b", Some(Feature::ecx(13))),
    ("rep movsb, rep stosq", None),
    ("SSE moves and arithmetic", None),
    ("fxsave, fxrstor", None),
    ("xsave, xrstor", Some(Feature::ecx(26))),
    ("int3 and iretq", None),
    ("ud2 and iretq", None),
    ("page fault and iretq", None),
    ("rdmsr, wrmsr, swapgs", None),
    ("sysret, syscall", None),
    ("control registers, descriptor tables", None),
    ("cpuid, rdtsc", None),
    ("fences, clflush, sti", None),
    ("popcnt", Some(Feature::ecx(23))),
];

/// A bit of CPUID leaf 1, register ECX.
#[derive(Debug, Clone, Copy)]
struct Feature {
    bit: u32,
}

impl Feature {
    const fn ecx(bit: u32) -> Self {
        Self { bit }
    }

    const fn is_in(self, leaf_1_ecx: u32) -> bool {
        leaf_1_ecx >> self.bit & 1 == 1
    }
}

/// A step that this host's KVM does not get right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedStep {
    /// What it executes.
    pub instructions: &'static str,
    /// What happened.
    pub failure: Failure,
}

/// What happened instead of the right result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// KVM gave up (KVM_EXIT_INTERNAL_ERROR).
    Emulation {
        /// 1: its emulator does not know the instruction.
        suberror: u32,
        /// Address of the instruction in the guest.
        rip: u64,
        /// The bytes there.
        bytes: Vec<u8>,
    },
    /// The guest got an exception that real hardware does not raise.
    Exception(u8),
    /// The instruction did something else.
    WrongResult,
    /// The step did not end.
    Hang,
    /// KVM left the guest for a reason that these instructions never give.
    Exit(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emulation {
                suberror: 1,
                rip,
                bytes,
            } => {
                write!(formatter, "KVM cannot emulate the instruction at {rip:#x}:")?;
                bytes.iter().try_for_each(|byte| write!(formatter, " {byte:02x}"))
            }
            Self::Emulation { suberror, rip, .. } => {
                write!(
                    formatter,
                    "KVM gave up at {rip:#x} with internal error {suberror}"
                )
            }
            Self::Exception(vector) => write!(formatter, "exception {vector}"),
            Self::WrongResult => formatter.write_str("a wrong result"),
            Self::Hang => formatter.write_str("it does not end"),
            Self::Exit(exit) => write!(formatter, "KVM left the guest with {exit}"),
        }
    }
}

/// How far the check goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoroughness {
    /// Up to the first failure.
    FirstFailure,
    /// All steps, whatever fails.
    All,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_names_every_step_of_the_guest() {
        assert_eq!(image::Blob::get().steps(), STEPS.len());
    }

    #[test]
    fn failures_name_the_instruction() {
        let failure = Failure::Emulation {
            suberror: 1,
            rip: 0x8123,
            bytes: vec![0xf0, 0x48, 0x0f],
        };
        assert_eq!(
            failure.to_string(),
            "KVM cannot emulate the instruction at 0x8123: f0 48 0f"
        );
    }
}
