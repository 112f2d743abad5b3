//! Virtual disks: a chain of files of the built-in file system, one of which is written.
//!
//! ```text
//!   /vm/root.dsk ◄── /vm/root-1.redo ◄── /vm/root-2.redo          the disk is what one reads through the last one
//!       ▲ snapshot       ▲ snapshot            ▲ head: writes go here
//!       │ "monday"       │ "friday"
//!       └── /vm/root-3.redo                                       a redo layer of a mode, or what a revert has left behind
//! ```
//!
//! The file system does the work: a layer is a file with a parent, a snapshot is one transaction, taking a layer away moves map entries
//! (`docs/src/filesys.md`). What is here is which layer means what. That stands in a small *descriptor* beside the disk
//! (`docs/src/formats/disk-descriptor.md`), and each change of it is made in steps that can be finished after a crash:
//!
//! ```text
//!   1 descriptor: "layer 3 is made on file 17, to be the head"      durable
//!   2 the transaction of the file system                            it happened or not, for all disks of a group
//!   3 descriptor: "the head is file 21"                             durable; else whoever opens the disk next looks whether
//!                                                                   layer 3 is there, and writes this, or forgets about it
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`Disks`] (`disks`) | all disks of a file system: who has which open; opening and power-off |
//! | [`VirtualDisk`] (`virtual_disk`) | an open disk: a `BlockDevice` that is its file and nothing more |
//! | `layers` | layers are made; what a crash has left is settled |
//! | `snapshots` | snapshots, reverts, clones |
//! | `decide` | commit and discard of redo layers; merging |
//! | `manage` | create, resize, delete, status, changed blocks |
//! | [`image`] | images outside of the pool are read and written, on a thread that may block |
//! | `descriptor`, `store` | the descriptor's bytes, and where they are kept |

mod decide;
mod descriptor;
mod disks;
mod error;
pub mod image;
mod layers;
mod manage;
mod name;
mod record;
mod reservations;
mod snapshots;
mod store;
mod turn;
mod virtual_disk;

pub use descriptor::MAX_SNAPSHOTS;
#[doc(hidden)]
pub use descriptor::{example, survives};
pub use disks::Disks;
pub use error::DiskError;
pub use manage::{DiskState, NewDisk, RedoState, SnapshotState};
pub use name::{DiskPath, MAX_DESCRIPTION, MAX_SNAPSHOT_NAME, SUFFIX, is_layer_of};
pub use record::{MAX_RECORD, Record};
pub use snapshots::NewSnapshot;
pub use virtual_disk::VirtualDisk;

/// What becomes of what is written to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskMode {
    /// It stays.
    #[default]
    Persistent,
    /// It goes to a redo layer, until somebody commits or discards it: at power-off, or by command.
    Undoable,
    /// It goes to a redo layer that is discarded at power-off, or at the next opening if there was a crash.
    Nonpersistent,
    /// It goes to a redo layer, which stays until it is committed or discarded by command.
    Append,
}

/// What becomes of the redo layer of an undoable disk at power-off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PowerOff {
    /// It stays until somebody decides.
    #[default]
    Keep,
    /// Its writes stay for good.
    Commit,
    /// Its writes go.
    Discard,
}

/// How a disk is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskOptions {
    /// What becomes of what is written.
    pub mode: DiskMode,
    /// For [`DiskMode::Undoable`]: what is done when the disk is closed.
    pub power_off: PowerOff,
    /// Somebody believes that it has been open all the time, since [`Disks::leave`] or a crash: what is in its redo layer stays, in every
    /// mode, and if it has none any more, the disk is not opened.
    pub goes_on: bool,
    /// Nothing is written. Several may have it open like this, and nobody for writing.
    pub read_only: bool,
    /// Opened for writing, a disk gets this identifier if it has none.
    pub identity: Option<[u8; 16]>,
    /// Seconds since 1970, for layers that are made.
    pub now: u64,
}
