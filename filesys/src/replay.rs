//! The changes since the last checkpoint are made again, when a file system is opened.
//!
//! Changes of maps wait and are made sorted ([`Sorted`]), and what they need is loaded by many requests at once; everything else is made in
//! order. Nothing else runs.

use block_io::BlockDevice;

use crate::core;
use crate::error::FsError;
use crate::gate::{self, Boxed};
use crate::heal::Healer;
use crate::journal::{self, End, Ring};
use crate::record::Record;
use crate::state::{Damage, Effects, Sorted, State, Stop};
use crate::superblock::Superblock;
use crate::tree::node::Missing;
use crate::wire::Reader;

/// Pages that are loaded at once.
const AT_ONCE: usize = 64;

/// Makes the changes of the journal again, and tells where it ends.
pub(crate) async fn replay<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    ring: &Ring,
    superblock: &Superblock,
    healer: &Healer,
) -> Result<End, FsError> {
    state.replaying.set(true);
    let mut sorted = Sorted::default();
    let each = async |bytes: &[u8]| -> Result<(), FsError> {
        block_io::cover!("filesys: a group was replayed");
        let mut reader = Reader(bytes);
        while !reader.is_empty() {
            let record = Record::decode(&mut reader).map_err(|error| Damage::new("the journal", error))?;
            if sorted.take(&record) {
                continue;
            }
            make_sorted(meta, state, &mut sorted, healer).await?;
            if !sorted.take(&record) {
                make(meta, state, &record, healer).await?;
            }
        }
        Ok(())
    };
    let (from, limit) = (superblock.replay, superblock.incarnation);
    let replayed = journal::replay_healed(meta, ring, from, limit, healer, each).await;
    let end = replayed.map_err(|error| match error {
        journal::ReplayError::Apply { source, .. } => source,
        other => FsError::Open(other.to_string()),
    })?;
    make_sorted(meta, state, &mut sorted, healer).await?;
    state.replaying.set(false);
    Ok(end)
}

async fn make<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    record: &Record,
    healer: &Healer,
) -> Result<(), FsError> {
    while let Err(stop) = state.prepare(record) {
        load(meta, state, stop, healer).await?;
    }
    // What it frees can be used at once: nobody reads yet.
    while let Err(stop) = state.apply(record, &mut Effects::default()) {
        load(meta, state, stop, healer).await?;
    }
    Ok(())
}

/// Makes all that waits.
async fn make_sorted<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    sorted: &mut Sorted,
    healer: &Healer,
) -> Result<(), FsError> {
    if sorted.is_empty() {
        return Ok(());
    }
    load_all(meta, state, || sorted.missing(state), healer).await?;
    let bits = match sorted.apply(state) {
        Ok(bits) => bits,
        Err(stop) => return Err(stop.left_out()),
    };
    load_all(meta, state, || bits.missing(state), healer).await?;
    bits.apply(state).map_err(Stop::left_out)
}

/// Loads pages, in order of their blocks, until none is missing.
async fn load_all<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    mut missing: impl FnMut() -> Result<Vec<Missing>, Damage>,
    healer: &Healer,
) -> Result<(), FsError> {
    loop {
        let pages = missing()?;
        if pages.is_empty() {
            return Ok(());
        }
        block_io::cover!("filesys: a replay loads pages");
        for pages in pages.chunks(AT_ONCE) {
            let loads = pages
                .iter()
                .map(|page| -> Boxed<'_, _> { Box::pin(core::load_page(meta, state, page, healer)) });
            gate::all(loads.collect())
                .await
                .into_iter()
                .collect::<Result<(), _>>()?;
        }
    }
}

/// Loads a page while nothing else runs.
pub(crate) async fn load<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    stop: Stop,
    healer: &Healer,
) -> Result<(), FsError> {
    match stop {
        Stop::Missing(missing) => core::load_page(meta, state, &missing, healer).await,
        Stop::Damaged(damage) => Err(damage.into()),
    }
}
