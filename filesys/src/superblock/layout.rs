//! Where things lie on the metadata volume.
//!
//! ```text
//!   0      16     32  33                                                                    size-1
//!   ├ SB 0 ┼ SB 1 ┼ SB 2 ┼ bitmap A ┼ journal ring ┼ bitmap B ┼ … metadata pages …          ┼ SB 3 ┤
//!     └──┬───┴──┬───┘
//!     metadata pages between them, too
//! ```
//!
//! The first three superblocks are at fixed places, 64 KiB apart, so that they are found without knowing anything and no bad
//! erase block or stray large write takes two of them. The fourth is the last block, so that what wipes the beginning of a
//! volume leaves a trace of what was there. The two bitmaps have the journal between them for the same reason.

use crate::meta_io::MOST;

/// Copies of the superblock.
pub(crate) const COPIES: usize = 4;
/// Smallest metadata volume: 1 MiB.
pub(crate) const MIN_BLOCKS: u64 = 256;
/// Smallest journal ring.
pub(crate) const MIN_JOURNAL: u64 = 4;
/// Largest: memory for replay is bounded by it. 4 GiB.
pub(crate) const MAX_JOURNAL: u64 = 1 << 20;
/// Blocks whose bits are in one page of the bitmap.
pub(crate) const BITS_PER_PAGE: u64 = 4064 * 8;

const FIXED: [u64; 3] = [0, 16, 32];
const DEFAULT_JOURNAL: std::ops::RangeInclusive<u64> = 64..=16384;

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Region {
    /// The first block.
    pub(crate) first: u64,
    /// How many.
    pub(crate) blocks: u64,
}

impl Region {
    /// The block after the last. What was decoded is checked, so it does not overflow.
    pub(crate) fn end(&self) -> u64 {
        self.first.saturating_add(self.blocks)
    }

    /// Whether it has a block with `other` in common.
    fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// What lies where. Block numbers count from the beginning of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Layout {
    /// Size of the metadata volume.
    pub(crate) size_blocks: u64,
    /// The journal's ring.
    pub(crate) journal: Region,
    /// The two bitmaps, written in turn; they may be longer than the volume's size needs.
    pub(crate) bitmaps: [Region; 2],
}

/// What [`layout`] may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LayoutOptions {
    /// Blocks of the journal; by default an eighth of the volume, at least 256 KiB, at most 64 MiB.
    pub(crate) journal_blocks: Option<u64>,
    /// The bitmaps are made so large that the volume can grow to so many blocks.
    pub(crate) grow_to_blocks: u64,
}

/// A layout that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    /// The volume is too small.
    #[error("the metadata volume has {size_blocks} blocks of 4 KiB, but needs {needed}: make it larger")]
    TooSmall {
        /// Its size.
        size_blocks: u64,
        /// What would do.
        needed: u64,
    },
    /// The journal's size is out of bounds.
    #[error("a journal of {blocks} blocks of 4 KiB is not possible: take {MIN_JOURNAL} to {MAX_JOURNAL}")]
    Journal {
        /// What was asked for.
        blocks: u64,
    },
    /// Decoded regions contradict each other.
    #[error("{0}")]
    Contradiction(&'static str),
}

/// Pages of a bitmap for so many blocks.
pub(crate) fn bitmap_pages(size_blocks: u64) -> u64 {
    size_blocks.div_ceil(BITS_PER_PAGE)
}

/// Computes what lies where on a fresh volume of `size_blocks`.
///
/// # Errors
/// It is too small for a file system, or for this journal.
pub(crate) fn layout(size_blocks: u64, options: &LayoutOptions) -> Result<Layout, LayoutError> {
    let wanted = size_blocks / 8;
    let journal = options
        .journal_blocks
        .unwrap_or(wanted.clamp(*DEFAULT_JOURNAL.start(), *DEFAULT_JOURNAL.end()));
    if !(MIN_JOURNAL..=MAX_JOURNAL).contains(&journal) {
        return Err(LayoutError::Journal { blocks: journal });
    }
    let pages = bitmap_pages(size_blocks.max(options.grow_to_blocks));
    let first = FIXED[2] + 1;
    let region = |first, blocks| Region { first, blocks };
    let a = region(first, pages);
    let ring = region(a.end(), journal);
    let b = region(ring.end(), pages);
    // A few pages and the last superblock must have room, too.
    let needed = b.end().saturating_add(16).max(MIN_BLOCKS);
    if size_blocks < needed {
        return Err(LayoutError::TooSmall { size_blocks, needed });
    }
    let layout = Layout {
        size_blocks,
        journal: ring,
        bitmaps: [a, b],
    };
    layout.check().map(|()| layout)
}

/// Where copy number `copy` of the superblock of a volume of `size_blocks` lies.
pub(crate) fn copy_place(copy: usize, size_blocks: u64) -> u64 {
    FIXED
        .get(copy)
        .copied()
        .unwrap_or_else(|| size_blocks.saturating_sub(1))
}

impl Layout {
    /// The blocks that hold copies of the superblock.
    pub(crate) fn superblocks(&self) -> [u64; COPIES] {
        std::array::from_fn(|copy| copy_place(copy, self.size_blocks))
    }

    /// Everything that never holds metadata pages.
    pub(crate) fn reserved(&self) -> impl Iterator<Item = Region> {
        let superblocks = self.superblocks().map(|first| Region { first, blocks: 1 });
        superblocks.into_iter().chain([self.journal]).chain(self.bitmaps)
    }

    /// Sees to it that all regions are within the volume and apart from each other.
    ///
    /// # Errors
    /// They are not; the text names what is wrong.
    pub(crate) fn check(&self) -> Result<(), LayoutError> {
        let wrong = |problem| Err(LayoutError::Contradiction(problem));
        if !(MIN_BLOCKS..MOST / BLOCKS_IN_BYTES).contains(&self.size_blocks) {
            return wrong("the volume's size is impossible");
        }
        if !(MIN_JOURNAL..=MAX_JOURNAL).contains(&self.journal.blocks) {
            return wrong("the journal's size is impossible");
        }
        let pages = bitmap_pages(self.size_blocks);
        if self.bitmaps.iter().any(|area| area.blocks < pages) {
            return wrong("a bitmap is too short for the volume");
        }
        let regions: Vec<Region> = self.reserved().collect();
        if regions.iter().any(|region| region.end() > self.size_blocks) {
            return wrong("a region lies beyond the volume's end");
        }
        for (index, region) in regions.iter().enumerate() {
            if regions[..index].iter().any(|other| other.overlaps(region)) {
                return wrong("two regions overlap");
            }
        }
        Ok(())
    }
}

const BLOCKS_IN_BYTES: u64 = 4096;
