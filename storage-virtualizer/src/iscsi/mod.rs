//! An iSCSI target (RFC 7143): the disks of [`crate::scsi`] for initiators on a network.
//!
//! ```text
//!   socket ──► server: listen, deadlines, pings, stop
//!                │
//!                ▼
//!          life ── login: Login, a machine without I/O ──► Agreement ──► session (new, or joined, or put anew)
//!                │           text, keys, chap
//!                │
//!                ├─ receive ─► pdu: Head ─► session: in which order? ─► task: data-out, R2T ─► scsi::execute ─► the disk
//!                │                                                        │
//!                └─ link: queue of PDUs ◄──────────── Data-In, responses ◄┘
//! ```
//!
//! Everything of a target lives on one worker, as the disks do: nothing is shared between threads, nothing is locked.
//! A connection has a task that reads and one that writes; each command has one of its own, so that commands run
//! side by side and are answered in the order in which they end.
//!
//! Supported is error recovery level 0: whatever is lost ends the connection, and the initiator begins a new session.
//!
//! # Hazards
//! - Initiators are hostile. What they send is checked before it means something. Before a login has ended they may send text
//!   of limited length, for limited time, and only few may try at once. Afterwards commands, their memory and what waits
//!   to be sent are limited (`session`, `link`), and who takes nothing or says nothing is cut off (`server`).
//! - Memory of a command belongs to the disk until the disk is done, however the command or its connection ends (`task`).
//! - A command is executed once and in the order of its number, over whichever connection of its session it came (`session`).
//! - Who may see what is decided at login by the initiator's name, which is proved only by CHAP ([`Access`]).
//!   Nothing is encrypted: RFC 7143 §9 leaves that to IPsec.

mod access;
mod chap;
mod connection;
mod control;
mod counted;
mod keys;
mod life;
mod link;
mod login;
mod manage;
mod md5;
mod options;
mod pdu;
mod receive;
mod server;
mod session;
mod task;
mod text;

pub use access::{Access, AccessError, Chap, NameError, Secret, SecretError, check_name};
pub use control::{IscsiControl, IscsiManageError, SessionState, UnitState};
pub use options::{IscsiOptions, IscsiServerError, IscsiTarget, IscsiUnit, MAX_TRANSFER};
pub use server::IscsiServer;
