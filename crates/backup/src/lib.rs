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

pub mod archive;
pub mod check;
pub mod client;
mod file;
pub mod frame;
pub mod message;
pub mod mover;
pub mod plan;
mod raw_text;
pub mod restore;
pub mod store;

pub use file::WriteBehind;
pub use raw_text::RawText;

/// An error with its causes.
pub fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some say what their causes say.
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
