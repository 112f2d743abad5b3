//! SCSI disks: logical units as real initiators expect them (SPC-4, SBC-4), for any transport.
//!
//! A transport takes commands out of its queues or PDUs, finds the logical unit in its [`Target`], and has [`execute`] do the
//! command on the unit's disk. It gets a status, sense data and the numbers of bytes from which residuals follow; it does tags,
//! task management by tag, and hot-plug itself.
//!
//! ```text
//!   virtio-scsi, iSCSI …      Target: LUNs, who sees which          Nexus: an initiator port on a target port
//!        │ Command: CDB, scatter lists      │                          │
//!        └──────────► execute(disk, unit, nexus, command) ─────────────┘
//!                        │             │
//!      READ and WRITE with nothing     │ everything else: `dispatch`, driven by `table`
//!      special: straight to the disk   ├─ attentions, ports, `reservations`: may it run?
//!                        │             ├─ `block`, `compare`, `provision`: commands on blocks
//!                        │             ├─ `inquiry`, `report`, `supported`, `logs`: what the unit is
//!                        │             ├─ `mode`, `control`, `persistent`: how it works, who may use it
//!                        ▼             └─ each wrong field: `sense`, with its place
//!                   BlockDevice
//! ```
//!
//! [`Unit`] is everything of a logical unit but the disk, for all threads. The disk is where the transport has it: on one
//! worker, or everywhere.

mod block;
mod boxed;
mod compare;
mod control;
mod copy;
mod dispatch;
mod flight;
mod inquiry;
mod logs;
mod mode;
mod nexus;
mod persistent;
mod provision;
mod report;
mod reservations;
mod sense;
mod supported;
mod table;
mod target;
#[cfg(test)]
mod tests;
mod transfer;
mod unit;
mod vendor;

use block_io::{BlockDevice, IoBuf, list};

pub use nexus::{Nexus, TransportId};
pub use reservations::{ReservationStore, RestoreError, StoreError};
pub use sense::{Code, Field, Key, Sense, SenseData};
pub use target::{
    Found, Lun, MAX_LUNS, Target, TargetError, Visible, decode_lun, encode_lun, execute_without_unit,
};
pub use unit::{Identity, PortGroup, PortState, Provisioning, Reset, Unit, UnitOptions};
pub use vendor::{VENDOR_OPCODES, VENDOR_PAGE, VendorCommands};

use transfer::Moved;

/// How a command ended (SAM-5 §5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Good = 0x00,
    /// Not done, or done with something to say: sense data say what.
    CheckCondition = 0x02,
    /// Another initiator has reserved the unit.
    ReservationConflict = 0x18,
}

/// A command from an initiator.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    /// The command descriptor block; what follows its end is not looked at.
    pub cdb: &'a [u8],
    /// Memory with data from the initiator.
    pub data_out: &'a [IoBuf],
    /// Memory for data to the initiator.
    pub data_in: &'a [IoBuf],
}

/// What came of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// Sense data; not empty if and only if the status is [`Status::CheckCondition`].
    pub sense: SenseData,
    /// Bytes that the command would have moved if the buffers had been large enough; 0 if it failed.
    pub wanted: u64,
    /// Bytes that were moved: put into `data_in`, or used of `data_out`.
    pub moved: u64,
}

/// The difference between what the initiator expected to be moved and what the command moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// None.
    None,
    /// So many bytes of the buffer were not used.
    Underflow(u64),
    /// So many bytes more would have been moved, had there been room.
    Overflow(u64),
}

impl Outcome {
    fn good(moved: Moved) -> Self {
        Self {
            status: Status::Good,
            sense: SenseData::default(),
            wanted: moved.wanted,
            moved: moved.moved,
        }
    }

    /// A command that succeeded, would have moved `wanted` bytes, and moved `moved`.
    pub fn done(wanted: u64, moved: u64) -> Self {
        Self::good(Moved { wanted, moved })
    }

    /// A command that failed with `sense`, in the format that `unit` has been told to use.
    pub fn failed(unit: &Unit, sense: Sense) -> Self {
        Self::check(sense, unit.descriptor_sense())
    }

    fn check(sense: Sense, descriptors: bool) -> Self {
        Self {
            status: Status::CheckCondition,
            sense: sense.encode(descriptors),
            wanted: 0,
            moved: 0,
        }
    }

    fn conflict() -> Self {
        Self {
            status: Status::ReservationConflict,
            sense: SenseData::default(),
            wanted: 0,
            moved: 0,
        }
    }

    /// What to tell an initiator that expected `expected` bytes to be moved.
    pub fn residual(&self, expected: u64) -> Residual {
        match self.wanted.checked_sub(expected) {
            Some(0) => Residual::None,
            Some(more) => Residual::Overflow(more),
            None => Residual::Underflow(expected - self.wanted),
        }
    }
}

/// Why a command was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fail {
    Sense(Sense),
    Conflict,
}

impl From<Sense> for Fail {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

type Check<T> = Result<T, Fail>;

/// Executes `command`, which came by `nexus`, on `unit`, whose disk is `disk`.
///
/// Commands run concurrently; a transport that was asked for an order (SAM-5 §8: ordered and head-of-queue tasks) keeps it.
/// The memory of the scatter lists stays valid until the future has ended ([`IoBuf::new`]).
pub async fn execute<D: BlockDevice>(disk: &D, unit: &Unit, nexus: &Nexus, command: &Command<'_>) -> Outcome {
    if let Some(plain) = block::Plain::of(command.cdb)
        && let Some(outcome) = block::execute_plain(disk, unit, nexus, command, plain).await
    {
        return outcome;
    }
    Box::pin(dispatch::execute(&boxed::Boxed(disk), unit, nexus, command)).await
}

fn total(buffers: &[IoBuf]) -> u64 {
    list::total_length(buffers)
}
