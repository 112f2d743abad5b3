//! What threads may ask of the kernel: one table of system calls per purpose, and which tables each kind of thread has.
//!
//! To add a call: find the table whose heading says who needs it, add a line with the reason. A thread that is started inside
//! the sandbox can do no more than the one that started it ([`Kind::starters`]), a test sees to that.

mod kvm;
mod program;
mod runtime;
mod server;
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

/// Those of threads of a program that serves disks, but for those that follow: clients can make them do what they want, as far as there are errors
/// in them, so they open nothing and connect to nobody.
pub(super) const SERVER: &[&[Rule]] = &[
    runtime::EVERY_THREAD,
    work::EVENT_LOOP,
    work::SIGNALS,
    work::DISK,
    server::CLIENTS,
    runtime::NO_FILES,
];

/// Those of its threads that connect to devices on other machines.
pub(super) const SERVER_CONNECTS: &[&[Rule]] = &[runtime::EVERY_THREAD, server::CONNECT];

/// Those of its threads that open what is served later, and start others of all kinds.
pub(super) const SERVER_OPENS: &[&[Rule]] = &[
    runtime::EVERY_THREAD,
    work::EVENT_LOOP,
    work::SIGNALS,
    work::DISK,
    server::CLIENTS,
    server::CONNECT,
    server::OPEN,
    work::OPEN_DISKS,
];

/// The call that serves all disks: the kernels that run a filter at each call (before 5.11) find it first.
pub(super) const SERVER_HOT: &Rule = &work::DISK[0];

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
            work::OPEN_DISKS,
            work::OPEN_TAPS,
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
