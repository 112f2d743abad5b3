//! Where the tail of a file system's journal is kept: in memory of this host, by pool.
//!
//! Whoever opens a pool for changes looks there, as a server that was killed may have left something. Who serves disks to users that outlive the
//! process makes the file; others use it if it is there.

use std::rc::Rc;

use block_io::{LastingFile, LastingMemory};
use volume_manager::model::Uuid;

/// Two halves of 1 MiB, some ten thousand first writes each, and a page.
const SIZE: usize = 4096 + (2 << 20);

/// The memory of a pool, if there is one, or one can be made.
pub(crate) fn of_pool(pool: Uuid, make: bool) -> Option<Rc<dyn LastingMemory>> {
    let name = format!("{:032x}.tail", pool.0);
    match LastingFile::open(&name, SIZE, make) {
        Ok(file) => Some(Rc::new(file?)),
        Err(error) => {
            if make {
                tracing::warn!(name, %error, "cannot be used in /dev/shm: whoever is answered waits for the journal with each write to new space");
            } else {
                tracing::warn!(name, %error, "cannot be read in /dev/shm: what a killed server had not made durable yet is not looked for");
            }
            None
        }
    }
}
