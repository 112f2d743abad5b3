//! The expanded API: storage management through vendor-specific commands on a SCSI disk.
//!
//! ```text
//!   guest: sms-agent, sg_raw …                       host: storage-manager
//!     Request ── JSON ── fragments ── EXPANDED API OUT: SEND ─────►  parse, may it?, do it
//!     Outcome ◄── JSON ── pieces ──── EXPANDED API IN: RECEIVE ───   kept under the request's tag
//!                                     EXPANDED API IN: EVENTS
//!     Page  ◄──────────────────────── INQUIRY, page E5h
//! ```
//!
//! This crate is what both sides must agree on: it does no input or output. The format is described in
//! `docs/src/formats/expanded-api.md`; all numbers are big-endian, as in SCSI.

mod answer;
mod cdb;
mod header;
mod needs;
mod page;
mod request;

pub use answer::{
    Answer, AttachedDisk, Description, Extent, GuestDisk, GuestEvent, GuestEvents, GuestVolume, Image,
    ImageDisk, Outcome, Quota,
};
pub use cdb::{Action, Cdb, Fault, IN, OUT};
pub use header::{Header, State};
pub use needs::{Needs, check_disk_path, check_snapshot_name, split_snapshot};
pub use page::Page;
pub use request::{DiskAttributes, Request};

/// The version of the commands; another major version is another language.
pub const MAJOR: u8 = 1;
/// Grows with each command or field that is added.
pub const MINOR: u8 = 1;
/// The number of the page of vital product data that tells of them.
pub const PAGE: u8 = 0xe5;
/// Most bytes of a request, and of an answer.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Longest time that a command waits for something to happen, in milliseconds.
pub const MAX_WAIT_MS: u16 = 4000;
/// Requests whose answers are kept.
pub const KEPT: usize = 256;
