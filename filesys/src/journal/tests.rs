//! The journal alone, and in the simulator.

mod crash;
mod hostile;
mod stories;
mod swarm;
mod table;

use std::cell::Cell;
use std::rc::Rc;

use block_io::sim::{DiskOptions, RunOptions, Sim, SimDisk, World};
use block_io::{IoError, Operation};

use super::*;
use crate::superblock::Region;

pub(super) const FIRST: u64 = 3;
pub(super) const UUID: [u8; 16] = *b"the file system!";
/// Where a fresh log begins.
pub(super) const BEGIN: Position = Position {
    group: 1,
    block: 0,
    previous: 0x1234,
};

/// A ring of so many blocks, from block [`FIRST`] of the disk on.
pub(super) fn ring(blocks: u64) -> Ring {
    Ring {
        region: Region { first: FIRST, blocks },
        uuid: UUID,
    }
}

pub(super) fn world(blocks: u64, sector: u32) -> World {
    World::new([DiskOptions::with_sector(
        "meta",
        (FIRST + blocks + 2) * 4096,
        sector,
    )])
}

/// Counts the calls, and fails at one.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    pub(super) calls: Cell<u64>,
    pub(super) fails: Cell<bool>,
}

impl BeforeWrite for Flushes {
    async fn prepare(&self, group: u64) -> Result<(), IoError> {
        self.calls.set(self.calls.get() + 1);
        if self.fails.get() {
            let cause = std::io::Error::from_raw_os_error(5);
            return Err(IoError::new(&"data".into(), Operation::Flush, group, 0, cause));
        }
        Ok(())
    }
}

pub(super) fn journal(sim: &Sim, blocks: u64, begin: Position, incarnation: u64) -> Rc<Journal<SimDisk>> {
    Rc::new(Journal::new(
        Rc::new(sim.disk(0)),
        ring(blocks),
        &begin,
        begin,
        incarnation,
    ))
}

/// Spawns the task that writes.
pub(super) fn start(journal: &Rc<Journal<SimDisk>>) -> Rc<Flushes> {
    let flushes = Rc::new(Flushes::default());
    let (journal, before) = (Rc::clone(journal), Rc::clone(&flushes));
    let spawned = block_io::spawn_local(async move {
        let _ = journal.run(&*before).await;
    });
    assert!(spawned.is_ok());
    flushes
}

/// Groups as bytes, and where the next one begins.
pub(super) type Log = (Vec<Vec<u8>>, Position);

pub(super) async fn read(
    sim: &Sim,
    ring: &Ring,
    from: Position,
    limit: u64,
) -> Result<Log, ReplayError<std::convert::Infallible>> {
    let mut groups = Vec::new();
    let end = replay(&sim.disk(0), ring, from, limit, async |bytes: &[u8]| {
        groups.push(bytes.to_vec());
        Ok(())
    })
    .await?;
    Ok((groups, end))
}

/// Runs a script in order on a blank disk with a ring of so many blocks.
pub(super) fn on_disk<T: 'static>(blocks: u64, script: impl AsyncFnOnce(Sim) -> T) -> T {
    let ran = world(blocks, 512).run(&RunOptions::in_order(), |sim| async move { script(sim).await });
    ran.unwrap().ended.done().unwrap()
}
