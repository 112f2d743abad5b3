//! What threads may ask of the kernel: one table of system calls per purpose, and which tables each kind of thread has.
//!
//! To add a call: find the table whose heading says who needs it, add a line with the reason. A thread that is started inside
//! the sandbox can do no more than the one that started it ([`Kind::starters`]), a test sees to that.

mod kvm;
mod program;
mod runtime;
mod work;

use super::kind::Kind;
use super::rules::Rule;

/// The request that is worth a shortcut, because it is made at each exit of the guest and its argument is looked at.
pub(super) fn hot(kind: Kind) -> Option<&'static Rule> {
    match kind {
        // vCPU threads also go through the filter of the main thread, which starts them.
        Kind::Main | Kind::Vcpu => kvm::RUN.first(),
        Kind::Management
        | Kind::Signals
        | Kind::DiskWorker
        | Kind::PoolWorker
        | Kind::NetQueue
        | Kind::DiskLink => None,
    }
}

/// Those of all threads of a program that is no machine.
pub(super) const PROGRAM: &[&[Rule]] = &[
    runtime::EVERY_THREAD,
    work::EVENT_LOOP,
    work::SIGNALS,
    work::SERVE_CLIENTS,
    program::NETWORK,
    program::FILES,
];

/// The tables of a kind of thread.
pub(super) fn of(kind: Kind) -> &'static [&'static [Rule]] {
    match kind {
        Kind::Main => &[
            runtime::EVERY_THREAD,
            kvm::RUN,
            kvm::BUILD,
            work::EVENT_LOOP,
            work::GUEST_FACING,
            work::NET_QUEUE,
            work::MAIN_LOOP,
            runtime::NO_FILES,
        ],
        Kind::Management => &[
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::DISK,
            work::NET_QUEUE,
            work::OPEN_DEVICES,
            work::SERVE_CLIENTS,
        ],
        Kind::Signals => &[runtime::EVERY_THREAD, work::SIGNALS, runtime::NO_FILES],
        Kind::Vcpu => &[
            kvm::RUN,
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::GUEST_FACING,
            work::NET_QUEUE,
            runtime::NO_FILES,
        ],
        Kind::DiskWorker => &[
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::DISK,
            runtime::NO_FILES,
        ],
        Kind::PoolWorker => &[
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::DISK,
            work::REMOTE_DEVICE,
            runtime::NO_FILES,
        ],
        Kind::NetQueue => &[
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::NET_QUEUE,
            runtime::NO_FILES,
        ],
        Kind::DiskLink => &[
            runtime::EVERY_THREAD,
            work::EVENT_LOOP,
            work::DISK_LINK,
            runtime::NO_FILES,
        ],
    }
}
