//! Disks for virtual machines of others: QEMU, Cloud Hypervisor, our own VM process (vhost-user-blk, vhost-user-scsi).
//!
//! A front-end connects to a Unix socket, shares its guest's memory and virtqueues, and the queues are served right there by
//! `queue::server`, the same as for a VM in this process: no copy, no proxy.
//!
//! ```text
//!   front-end ──socket──► session (a thread): features, memory, rings, configuration      control
//!       │                     │ starts and stops
//!       └─ shared memory ─► queue::server (on the disk's worker) ─► disk             data
//!          kick, call
//! ```
//!
//! * `message`, `socket`: the protocol, for both sides; `client` the conversation as a front-end has it.
//! * `front_end`: the other side, for our own VM process: a disk that somebody else serves.
//! * `listener`: a socket and its front-ends; `blk` and `scsi` say what they are shown.
//! * `connection`: a front-end whose connection somebody else has accepted, as the manager of a host does.
//! * `session`: one front-end; `rings` its queues, `memory` its memory, `sigbus` what protects from a memory that shrinks.
//!
//! # Hazards
//! * If the server dies, requests are in flight. The record of `inflight.rs` lies in memory that the front-end keeps,
//!   and the next server repeats them. A front-end without it (it does not offer INFLIGHT_SHMFD) would wait for them for ever.
//! * A front-end that is gone may have a successor at once, while requests of the first are still in flight: the second is
//!   served when these have ended. Only so many at a time ([`VhostUserOptions::front_ends`]) are served, one by default, as two
//!   guests that mount one disk destroy it.

mod blk;
pub mod client;
mod connection;
mod device;
pub mod front_end;
mod listener;
mod memory;
pub mod message;
mod rings;
mod scsi;
mod session;
mod sigbus;
pub mod socket;

use std::io;
use std::path::PathBuf;

pub use blk::{VhostUserOptions, VhostUserServer};
pub use connection::{Parting, serve_blk, serve_scsi};
pub use listener::{FrontEndState, ThreadHook};
pub use scsi::VhostUserScsiServer;

use crate::virtio_blk::VirtioBlkError;
use crate::virtio_scsi::{AddUnitError, VirtioScsiError};

/// A server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// The device.
    #[error(transparent)]
    Device(#[from] VirtioBlkError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] VirtioScsiError),
    /// A logical unit of it.
    #[error(transparent)]
    Unit(#[from] AddUnitError),
    /// The socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Someone listens there already.
    #[error("{} is in use by another server; stop it or choose another socket", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// There is something else.
    #[error("{} exists and is not a socket; choose another path", path.display())]
    NotSocket {
        /// Where.
        path: PathBuf,
    },
    /// A thread or eventfd.
    #[error("cannot start a vhost-user server")]
    Start(#[source] io::Error),
}
