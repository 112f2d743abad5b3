//! Frozen-image backup.
//!
//! ```text
//!   guest                         mover (the host, or another machine)              store
//!   sms-agent ── plan, TLS ─────► smsvmm mover serve ── archive ──────────────────► VM/NAME.smsbackup
//!   files ─► extents of            │ where is that?           │ reads
//!   virtual disks, frozen          ▼                          ▼
//!                                 management socket of the VM   devices of the pool
//! ```
//!
//! An agent freezes an image of its disks, finds which ranges of them its files are, and tells these to a mover, which reads them while
//! the guest goes on, and writes an archive. [`plan`], [`message`] and [`client`] are what both sides share.

pub mod client;
pub mod frame;
pub mod message;
pub mod plan;
mod raw_text;

pub use raw_text::RawText;
