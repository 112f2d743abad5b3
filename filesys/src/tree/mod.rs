//! Trees of metadata pages: how maps, bitmaps, checksums and tables are kept.
//!
//! ```text
//!   node     pages in memory, shared with a running checkpoint; who is dirty, who can be dropped
//!   codec    pages on media
//!   leaf     entries of maps in few bytes
//!   radix    trees by number: maps of files, bitmaps and checksums of volumes, the table of objects
//!   table    trees by hash: directories, the table of inodes
//! ```

pub(crate) mod codec;
pub(crate) mod leaf;
pub(crate) mod node;
pub(crate) mod radix;
pub(crate) mod table;
