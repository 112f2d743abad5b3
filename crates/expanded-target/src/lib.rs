//! The expanded API on the host: does what a guest asks for by vendor-specific commands on its SCSI disks.
//!
//! ```text
//!   worker of a disk's queue            threads of this crate                      management
//!     SEND ──► session ── tag ──► look: parse, `allow` ──┬─► look:   what only reads ─────┐
//!       ◄── good, or sense data: may not ────────────────┤   change: one after the other ─┼─► Owner: as for
//!     RECEIVE ◄── session ◄── outcome ◄──────────────────┴── move:   what takes long ─────┘   the administrator
//!     EVENTS  ◄── the machine's log
//! ```
//!
//! The principal is the virtual machine: one [`ExpandedTarget`] serves all disks of a machine, and what one disk was sent another one can
//! be asked for. A worker of a disk never waits for storage management: it copies bytes, and commands that wait are futures with a
//! time limit. Commands that change something are done one after the other, so that quotas hold.
//!
//! # Hazards
//! - *A hostile guest.* What it sends is bounded in size, in number and in rate before it is looked at ([`expanded_api::MAX_PAYLOAD`],
//!   `session`, `audit`); it is parsed on a thread of this crate; all decisions are in `allow`.
//! - *An answer that is lost.* The same request under the same tag is not done again.

mod allow;
mod audit;
mod events;
mod look;
mod owner;
mod perform;
mod session;
mod target;
mod waits;

pub use owner::{JobListener, Owner};
pub use target::{ExpandedTarget, Hook, Running};
