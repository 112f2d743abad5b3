//! An open file: a disk to who uses it.
//!
//! ```text
//!   request ──► plan (in memory, waits for nothing) ──► requests to volumes, at once ──► map records, if places are new
//!
//!   handle    what is open: the file, its ancestors, the cache of who answers for what
//!   plan      where the bytes of a range are
//!   read      reads
//!   write     writes: into valid sub-clusters, into new ones, into parts of new ones
//!   allocate  which cluster a write gets
//!   zero      discards and zeroes
//! ```

mod allocate;
mod handle;
mod layer_cache;
mod memory;
mod plan;
mod read;
mod write;
mod zero;

pub(crate) use allocate::Places;
pub use handle::{Access, File};
pub(crate) use memory::whole;
pub(crate) use plan::Part;
pub(crate) use read::{data_sum, sum_of};
pub(crate) use write::{entry_of, note_written};
