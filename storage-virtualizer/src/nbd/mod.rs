//! An NBD server: disks for everybody who speaks the protocol (qemu, nbdkit's and libnbd's tools, the Linux kernel).
//!
//! ```text
//!   socket ──► server: accept, deadlines, stop
//!                │
//!                ▼
//!          connection ── negotiate: options ──► an Agreement: export, kinds of replies, metadata contexts
//!                │
//!                ├─ input ──► request: Head → Request, or Refusal ──► execute: operations on the Export's disk
//!                │                                                        │
//!                └─ link: queue of replies ◄──────────── reply ◄──────────┘
//! ```
//!
//! The specification is the NBD project's `proto.md`: fixed newstyle with all its options but `NBD_OPT_PEEK_EXPORT`, simple and
//! structured replies, extended headers, block status, flush, FUA, trim, write zeroes, TLS. Not offered: `NBD_CMD_CACHE`
//! (disks do not go through a cache), `NBD_CMD_RESIZE`, filters of contexts in a request, oldstyle.
//!
//! Disks, exports and connections live on one worker: nothing is shared between threads, nothing is locked. Exports come and go while clients
//! use others: `manage`.
//!
//! # Hazards
//! - Clients are hostile. What they send is checked before it means something; what they cost is limited (`link`); the time
//!   that they take is limited (`server`). They cannot make a request last longer than the disk does.
//! - Memory of a request belongs to the disk until the request has ended, however the connection ends; see `execute`.
//! - Nothing said before TLS counts after it, and nothing sent unencrypted is taken as encrypted (`connection`).
//! - There is no access control beside client certificates and the mode of a Unix socket.

mod connection;
mod execute;
mod export;
mod file;
mod link;
mod manage;
mod negotiate;
mod reply;
mod request;
mod server;
mod transport;

pub use access::{TlsError, TlsFiles};
pub use export::{Export, Extent, Extents};
pub use file::DeviceExport;
pub use manage::{ClientState, ExportState, NbdControl, NbdManageError};
pub use negotiate::TlsMode;
pub use server::{NbdOptions, NbdServer, NbdServerError};
