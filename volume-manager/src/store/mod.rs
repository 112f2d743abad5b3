//! The configuration of a pool on many devices: found, chosen, claimed, changed.
//!
//! ```text
//!   scan ──► Scan ──choose──► Choice ──claim──► Opened { store, … } ──commit──► commit ──► …
//!   reads only                reads only        writes                first one begins an incarnation
//! ```
//!
//! # Rules
//! - *Holders* of a configuration are its devices that are not faulty. A commit writes, on each holder, the slot that does
//!   not hold that device's newest valid configuration. When it is durable and what opens is in [`quorum`].
//! - A holder that does not take a commit is reported. Nothing may be acknowledged before it is faulty in a next
//!   configuration, and the store refuses a next one in which it is not. So no holder lags by more than one epoch, unless its
//!   content was exchanged: then it is *stale*, and its members are not what the configuration says.
//! - Every opening has a *term*, greater than any that its devices have seen; it is claimed on a majority before anything is
//!   written under it, so no two openings have the same. The configuration of the highest (term, epoch) that is found is the
//!   newest; all others must be its past or given up (`history`), or the history is split and nothing is chosen unasked.
//! - The claim brings every device that lags by one epoch up to the chosen configuration. A stale device gets nothing until
//!   the first commit, so that it stays stale if there is none.

mod choose;
mod commit;
mod history;
mod inspect;
mod media;
pub mod quorum;
mod readmit;
mod scan;
mod together;

pub use choose::{Choice, Force, OpenError, Opened, Present, Side, Standing};
pub use commit::{CommitError, Committed, Store};
pub use inspect::{Content, identity, inspect};
pub use media::{FormatError, MediaError, format_device};
pub use readmit::ReadmitError;
pub use scan::{Problem, ProblemKind, Scan, scan};
