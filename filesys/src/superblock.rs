//! The superblock: the one thing that says which state of the metadata volume counts. Four copies; three to commit, two to open.
//!
//! ```text
//!   write:  two copies (FUA, together)  →  the other two (FUA, together)        done when 3 of the 4 are written
//!           first those that do not hold the present state
//!   open:   read all four; the highest sequence that at least 2 agree on, byte by byte
//! ```
//!
//! # Why this is right
//! - *Nothing acknowledged is lost.* A write that was acknowledged is in 3 copies. One of them may be damaged: 2 are left. If two
//!   are damaged, the one that is left and the older fourth agree with nobody: that is an error, never the old state.
//! - *A crash leaves the old or the new.* The body is within one sector of 512 bytes, so a copy is old or new. In the first step
//!   two copies of the old state are not touched, and in the second step two of the new one, or (if a copy could not be written)
//!   one of the new and two that are each old or new: some two always agree. That is why the order matters: after several
//!   crashes only two copies may hold the present state, and writing over one of them first would leave four that differ.
//! - *A single newer copy is ignored*, and could come back when its neighbour can be read again. So the owner, before it
//!   changes anything else, writes a superblock of its own with [`Opened::next_sequence`], which is above everything seen.
//!   A sequence is never used for two contents.
//!
//! A write that fails leaves the old or the new state: the owner must stop writing, and open again.
//!
//! The places are computed in [`layout`]; `docs/src/formats/filesys-journal.md` is the specification of the bytes.

mod choose;
mod codec;
pub(crate) mod layout;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError, cover};

pub(crate) use choose::Found;
pub(crate) use codec::VERSION;
pub(crate) use layout::{Layout, LayoutError, LayoutOptions, Region, layout};

use crate::heal::Healer;
use crate::journal::Position;
use crate::meta_io::{self, BLOCK, MOST};
use crate::meta_space::SpaceState;
use layout::{COPIES, MIN_BLOCKS, copy_place};

/// Features that a program must know to open the file system at all.
pub(crate) const KNOWN_INCOMPATIBLE: u64 = 0;
/// Features that a program must know to write to it.
pub(crate) const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;

/// A compatible feature: [`Superblock::unbroken`] and [`Superblock::has_tail`] are kept.
pub(crate) const UNBROKEN: u64 = 1;

/// What is turned on, as bits. Who does not know an incompatible one must not open the file system, who does not know a
/// read-only compatible one must not write to it, compatible ones may be ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Features {
    pub(crate) incompatible: u64,
    pub(crate) read_only_compatible: u64,
    pub(crate) compatible: u64,
}

/// Where the object table begins: opaque here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Root {
    pub(crate) slot: [u8; 16],
    pub(crate) level: u8,
}

/// The body of the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Superblock {
    pub(crate) features: Features,
    /// Identity of the file system; also in every block of its journal and bitmap.
    pub(crate) uuid: [u8; 16],
    /// Counts writes of the superblock; may leave numbers out.
    pub(crate) sequence: u64,
    /// Counts writable openings.
    pub(crate) incarnation: u64,
    pub(crate) layout: Layout,
    /// Where replay begins.
    pub(crate) replay: Position,
    /// Which bitmap counts.
    pub(crate) space: SpaceState,
    pub(crate) root: Root,
    pub(crate) next_object: u64,
    pub(crate) name_hash_seed: u64,
    /// It was closed in order: the journal is empty from `replay` on.
    pub(crate) clean: bool,
    /// Whoever has it open keeps a tail of the journal, and answers before the journal is durable.
    pub(crate) has_tail: bool,
    /// The incarnation since which nothing is missing that was answered; 0: not known.
    pub(crate) unbroken: u64,
}

impl Superblock {
    /// It is opened for changes, by the incarnation that it has now; `is_whole`: what a tail has of the one before is made good. `has_tail` as above. Whether
    /// something that was answered may be missing.
    pub(crate) fn opened(&mut self, is_whole: bool, has_tail: bool) -> bool {
        let may_miss = self.has_tail && !self.clean && !is_whole;
        if may_miss {
            cover!("superblock: what was answered may be missing");
            self.unbroken = self.incarnation;
        }
        if self.unbroken == 0 {
            self.unbroken = self.incarnation;
        }
        (self.clean, self.has_tail) = (false, has_tail);
        self.features.compatible |= UNBROKEN;
        may_miss
    }
}

/// Which copies hold the present state: none when a file system is made, then what [`open`] found and [`write`] left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Holders(pub(crate) [bool; COPIES]);

impl Holders {
    /// Two steps of two copies each: first those that hold something else.
    fn steps(self) -> [[usize; 2]; 2] {
        let mut order: [usize; COPIES] = std::array::from_fn(|copy| copy);
        order.sort_by_key(|copy| self.0[*copy]);
        let [a, b, c, d] = order;
        [[a, b], [c, d]]
    }

    /// The volume has another size now: the last copy goes to another place.
    pub(crate) fn resized(&mut self) {
        self.0[COPIES - 1] = false;
    }
}

/// What [`open`] found.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(crate) superblock: Superblock,
    /// The sequence for the next write: above all that any copy has, also those that do not count.
    pub(crate) next_sequence: u64,
    /// Read-only compatible features that this program does not know. If there are any, nothing may be written.
    pub(crate) unknown_read_only: u64,
    /// Which copies hold it: for [`write`], which repairs the others.
    pub(crate) holders: Holders,
}

/// Why there is no superblock, or none was written.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum SuperblockError {
    #[error(
        "the metadata volume has {bytes} bytes; a file system needs at least 1 MiB: this is not its volume"
    )]
    TooSmall { bytes: u64 },
    #[error(
        "the volume holds no file system: none of the 4 places of its superblock has the magic number; make one, or name the right volume"
    )]
    NotAFileSystem,
    #[error(
        "the file system has format version {version}; this program knows version {VERSION}: use a newer one"
    )]
    ForeignVersion { version: u32 },
    #[error(
        "the file system uses features that this program does not know (incompatible feature bits {bits:#x}): use a newer one"
    )]
    UnknownFeature { bits: u64 },
    #[error(
        "fewer than 2 of the 4 copies of the superblock agree: {found}; restore the volume's redundancy or a backup"
    )]
    TooFewCopies { found: Summary },
    #[error("no copy of the superblock is valid: {found}; restore the volume's redundancy or a backup")]
    Damaged { found: Summary },
    #[error(
        "two pairs of copies of the superblock, both with sequence {sequence}, contradict each other; restore a backup"
    )]
    Conflict { sequence: u64 },
    #[error(
        "the file system has {expected} blocks of 4 KiB, but the metadata volume only {found}: it was truncated; make it as large as it was"
    )]
    Truncated { expected: u64, found: u64 },
    #[error("a superblock of sequence {sequence} cannot be written")]
    Invalid {
        sequence: u64,
        #[source]
        source: LayoutError,
    },
    #[error(
        "the superblock of sequence {sequence} is in fewer than 3 places, so nobody knows whether it counts: open the file system again"
    )]
    NotDurable {
        sequence: u64,
        #[source]
        source: Arc<IoError>,
    },
}

/// What the four places held, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summary(pub(crate) [String; COPIES]);

impl fmt::Display for Summary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (copy, text) in self.0.iter().enumerate() {
            let comma = if copy == 0 { "" } else { ", " };
            write!(formatter, "{comma}copy {copy} {text}")?;
        }
        Ok(())
    }
}

/// Writes all four copies of `superblock`. Its sequence must be one that was never written. `holders` are those of the state
/// before, and then of this one.
///
/// # Errors
/// Fewer than three are written: after a crash or a new opening, the old or the new state counts.
pub(crate) async fn write<V: BlockDevice>(
    device: &V,
    superblock: &Superblock,
    holders: &mut Holders,
) -> Result<(), SuperblockError> {
    let sequence = superblock.sequence;
    let checked = superblock.layout.check();
    checked.map_err(|source| SuperblockError::Invalid { sequence, source })?;
    let steps = holders.steps();
    let mut missing = 0;
    for pair in steps {
        let written = meta_io::join_all(pair.map(|copy| write_copy(device, superblock, copy))).await;
        for (copy, result) in pair.into_iter().zip(written) {
            holders.0[copy] = result.is_ok();
            let Err(source) = result else { continue };
            missing += 1;
            if missing > 1 {
                cover!("superblock: too few copies are written");
                let source = Arc::new(source);
                return Err(SuperblockError::NotDurable { sequence, source });
            }
            cover!("superblock: one copy cannot be written");
            tracing::warn!(error = %source, cause = %source.cause(), copy, "a copy of the superblock cannot be written");
        }
    }
    Ok(())
}

/// Whether a block is this copy of a superblock.
pub(crate) fn is_copy_of(block: &[u8], copy: usize, place: u64, superblock: &Superblock) -> bool {
    codec::decode(block, copy, place).superblock() == Some(superblock)
}

async fn write_copy<V: BlockDevice>(device: &V, superblock: &Superblock, copy: usize) -> Result<(), IoError> {
    let mut block = AlignedBuffer::new(BLOCK);
    codec::encode(superblock, copy, block.as_mut_slice());
    let place = copy_place(copy, superblock.layout.size_blocks);
    meta_io::write_blocks(device, place, &block, 0..1, Durability::Durable).await
}

/// Finds the superblock that counts. Reads only.
///
/// # Errors
/// There is none, or this program must not open the file system; see [`SuperblockError`].
pub(crate) async fn open<V: BlockDevice>(device: &V) -> Result<Opened, SuperblockError> {
    open_healed(device, &Healer::default()).await
}

/// As [`open`]. Of each of the four, the newest valid one is taken that any copy which the volume keeps of it holds.
///
/// # Errors
/// Those of [`open`].
pub(crate) async fn open_healed<V: BlockDevice>(
    device: &V,
    healer: &Healer,
) -> Result<Opened, SuperblockError> {
    let bytes = device.size();
    let size = meta_io::blocks_of(bytes);
    if size < MIN_BLOCKS {
        return Err(SuperblockError::TooSmall { bytes });
    }
    let places: [u64; COPIES] = std::array::from_fn(|copy| copy_place(copy, size));
    let reads = (0..COPIES).map(|copy| read_newest(device, copy, places[copy], healer));
    let read = meta_io::join_all(reads).await;
    let mut found: [Found; COPIES] =
        std::array::from_fn(|copy| read.get(copy).cloned().unwrap_or(Found::NoMagic));
    // The volume may have grown since: then the last copy is where it ended before.
    let newest = found[..COPIES - 1]
        .iter()
        .filter_map(Found::superblock)
        .max_by_key(|superblock| superblock.sequence);
    if let Some(before) = newest.map(|superblock| superblock.layout.size_blocks)
        && before < size
        && found[COPIES - 1].superblock().is_none()
    {
        cover!("superblock: the volume has grown");
        found[COPIES - 1] = read_newest(device, COPIES - 1, copy_place(COPIES - 1, before), healer).await;
    }
    let opened = choose::choose(&found)?;
    let expected = opened.superblock.layout.size_blocks;
    if expected > size {
        return Err(SuperblockError::Truncated {
            expected,
            found: size,
        });
    }
    Ok(opened)
}

/// What counts of all that the volume has in one of the four places. Who opens the file system for writing writes all four anew.
async fn read_newest<V: BlockDevice>(device: &V, copy: usize, place: u64, healer: &Healer) -> Found {
    let mut newest = read_copy(device, copy, place).await;
    for other in 0..healer.copies(place) {
        let Some(block) = healer.read(other, place).await else {
            continue;
        };
        let found = codec::decode(block.as_slice(), copy, place);
        let sequence = |found: &Found| found.superblock().map(|superblock| superblock.sequence);
        if sequence(&found) > sequence(&newest) {
            cover!("superblock: another leg has a newer or a valid one");
            newest = found;
        }
    }
    newest
}

async fn read_copy<V: BlockDevice>(device: &V, copy: usize, place: u64) -> Found {
    match meta_io::read_blocks(device, place, 1).await {
        Ok(block) => codec::decode(block.as_slice(), copy, place),
        Err(source) => {
            cover!("superblock: a copy cannot be read");
            tracing::warn!(error = %source, cause = %source.cause(), copy, "a copy of the superblock cannot be read");
            Found::Unreadable(Arc::new(source))
        }
    }
}

/// Whether a decoded superblock can be counted on from.
fn counters_are_possible(superblock: &Superblock) -> bool {
    [
        superblock.sequence,
        superblock.incarnation,
        superblock.replay.group,
        superblock.replay.block,
        superblock.space.number,
        superblock.next_object,
        superblock.unbroken,
    ]
    .iter()
    .all(|counter| *counter < MOST)
        && superblock.replay.group > 0
}

/// Parses a block as a copy in its place, with its checksum computed, and writes it again: for fuzzing.
pub(crate) fn survives(block: &[u8]) -> bool {
    let mut block = block.to_vec();
    block.resize(BLOCK, 0);
    let checksum = crate::checksum::crc32c(block.get(16..512).unwrap_or_default());
    meta_io::put(&mut block, 8, &checksum.to_le_bytes());
    let copy = usize::from(u16::from_le_bytes(meta_io::take(&block, 12)));
    let size = meta_io::take_u64(&block, 80);
    if copy >= COPIES {
        return false;
    }
    let Found::Valid(superblock, _) = codec::decode(&block, copy, copy_place(copy, size)) else {
        return false;
    };
    let mut again = vec![0; BLOCK];
    codec::encode(&superblock, copy, &mut again);
    let found = codec::decode(&again, copy, copy_place(copy, size));
    assert_eq!(found.superblock(), Some(&*superblock));
    true
}
