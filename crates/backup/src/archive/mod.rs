//! Archives: what a backup is kept in. The format is described for other programs in `docs/src/formats/backup-archive.md`.
//!
//! ```text
//!   Header │ Entry  Data Data Zeroes .. EntryEnd │ Entry EntryEnd │ ... │ Index .. │ Commit
//! ```
//!
//! Everything is a [frame](crate::frame), and can be read strictly forward. An archive without its last frame is no backup. What is
//! complete in it is known by its `EntryEnd`s, and of the last entry by its frames, so that it can be gone on with.

mod chain;
mod read;
mod record;
mod state;
mod write;

pub use chain::{Chain, ChainError, Sink};
pub use read::{ArchiveError, ArchiveReader, Record, read_commit};
pub use record::{COMMIT_FRAME, Commit, EntryEnd, Header, ImageIdentity, Parent, VERSION};
pub(crate) use state::Mark;
pub use state::State;
pub use write::{ArchiveWriter, From};
