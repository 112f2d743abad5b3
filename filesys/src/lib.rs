//! The built-in file system: one name space over all volumes of a pool, made for few and huge files, the virtual disks.
//!
//! The code is plain `async fn` over [`BlockDevice`](block_io::BlockDevice) and [`Clock`](block_io::Clock); it runs on the pool's
//! worker in production, and in the simulator in tests. See `docs/src/filesys.md` for pictures, `docs/src/formats/filesys.md` for the
//! media.

#[allow(dead_code, unused_imports)]
mod journal;
#[allow(dead_code, unused_imports)]
mod meta_io;
#[allow(dead_code, unused_imports)]
mod meta_space;
#[allow(dead_code, unused_imports)]
mod superblock;
