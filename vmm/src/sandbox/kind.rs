//! The kinds of threads, and who starts whom.

/// A kind of thread. Each has its own filter of system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The main loop: builds machines, serves consoles.
    Main,
    /// Serves the management socket; opens what is attached while the VM runs.
    Management,
    /// Waits for signals.
    Signals,
    /// Runs a vCPU, and the part of the devices that answers the guest's accesses.
    Vcpu,
    /// Does the I/O of disks, and the threads that it starts where io_uring is refused.
    DiskWorker,
    /// Does everything of the machine's pool: as [`Self::DiskWorker`], and speaks to devices on other machines.
    PoolWorker,
    /// Moves the packets of a network card.
    NetQueue,
    /// Speaks with the process that serves a disk.
    DiskLink,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::Management,
        Self::Signals,
        Self::Vcpu,
        Self::DiskWorker,
        Self::PoolWorker,
        Self::NetQueue,
        Self::DiskLink,
    ];

    /// Kinds of threads that start one of this kind inside the sandbox. A filter is inherited and cannot be widened, so each
    /// of these must allow at least what this kind may do; a test sees to it.
    #[cfg(test)]
    pub(super) const fn starters(self) -> &'static [Self] {
        match self {
            // Started before the sandbox is entered.
            Self::Main | Self::Management | Self::Signals | Self::PoolWorker => &[],
            Self::Vcpu => &[Self::Main],
            // Also by whoever opens the VM, before the sandbox is entered.
            Self::DiskWorker | Self::DiskLink => &[Self::Management],
            Self::NetQueue => &[Self::Vcpu],
        }
    }

    /// In messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Management => "management",
            Self::Signals => "signals",
            Self::Vcpu => "vcpu",
            Self::DiskWorker => "disk worker",
            Self::PoolWorker => "pool worker",
            Self::NetQueue => "network queue",
            Self::DiskLink => "disk link",
        }
    }
}
