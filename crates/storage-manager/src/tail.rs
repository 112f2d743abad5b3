//! Where the tail of a file system's journal is kept: in memory of this host, by pool.
//!
//! Whoever opens a pool for changes looks there, as a server that was killed may have left something. Who serves disks to users that outlive the
//! process makes the file; others use it if it is there.

use std::path::PathBuf;
use std::rc::Rc;

use block_io::{LastingFile, LastingMemory};
use volume_manager::model::Uuid;

/// The place of files in memory on every Linux (shm_overview(7)).
const FOLDER: &str = "/dev/shm";
/// Two halves of 1 MiB, some ten thousand first writes each, and a page.
const SIZE: usize = 4096 + (2 << 20);

/// The file of a pool.
pub(crate) fn path(pool: Uuid) -> PathBuf {
    PathBuf::from(format!("{FOLDER}/smsvmm-{:032x}.tail", pool.0))
}

/// The memory of a pool, if there is one, or one can be made.
pub(crate) fn of_pool(pool: Uuid, make: bool) -> Option<Rc<dyn LastingMemory>> {
    let path = path(pool);
    match LastingFile::open(&path, SIZE, make) {
        Ok(file) => Some(Rc::new(file?)),
        Err(error) => {
            let path = path.display();
            if make {
                tracing::warn!(%path, %error, "cannot be used: whoever is answered waits for the journal with each write to new space");
            } else {
                tracing::warn!(%path, %error, "cannot be read: what a killed server had not made durable yet is not looked for");
            }
            None
        }
    }
}
