//! Images come into a pool that a machine has open, and go out of it.
//!
//! Who asks has the image open, knows its format, and has it checked; the process of the machine has only to do with the disk. Between
//! them goes nothing but data:
//!
//! ```text
//!   smsvmm disk import                                      smsvmm run
//!   image ─► thread ─► pipe ─► [ask] ── frames ── [serve] ─► pipe ─► task on the pool's worker ─► /vm/root.dsk.part
//!            ▲ compares ◄─ pipe ◄─┘ ◄── frames ──────┘ ◄─ pipe ◄─────┘   (--verify)
//!
//!   smsvmm disk export
//!   image ◄─ thread ◄─ pipe ◄─ [ask] ◄─ frames ── [serve] ◄─ pipe ◄─ task, which reads a moment of the disk
//! ```
//!
//! The threads and the tasks are those of a pool that nobody has open; the frames stand in for the pipe. The connection comes out of the
//! management socket by an upgrade of HTTP, so who may use it is decided there. Who asks breaks off by ending its direction of the
//! connection, or by ending; the task then leaves nothing behind, and says so if it is still heard.
//!
//! Why it is so: `docs/src/decisions/0016-images-and-running-machines.md`.

mod ask;
mod frame;
mod serve;

pub use ask::{Connect, Line, PoolAt};
pub(crate) use ask::{Side, converse};
pub(crate) use serve::{Transfers, transfer};
