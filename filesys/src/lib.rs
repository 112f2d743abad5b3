//! The built-in file system: one name space over all volumes of a pool, made for few and huge files, the virtual disks.
//!
//! The code is plain `async fn` over [`BlockDevice`](block_io::BlockDevice) and [`Clock`](block_io::Clock); it runs on the pool's
//! worker in production, and in the simulator in tests. See `docs/src/filesys.md` for pictures, `docs/src/formats/filesys.md` for the
//! media.

mod checksum;
mod entry;
mod tree;
mod units;

pub use units::{CLUSTER, FileId, Location, MAX_FILE, MAX_NAME, MAX_VOLUMES, SUB_CLUSTER, VolumeIndex};
mod file_core;
mod gate;
mod hash;
mod inode;
mod record;
mod state;
mod volume;
mod wire;
