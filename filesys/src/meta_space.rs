//! Which blocks of the metadata volume are in use: a bitmap in memory, and two on the volume that are written in turn.
//!
//! ```text
//!   life of checkpoint N           allocate …  free …   store ──► flush ──► superblock ──► committed
//!   blocks freed in N              in use                                                  may be handed out
//!
//!   bitmap A   N-2 ───────────────────────────── N         the superblock names number and checksum of the one that counts
//!   bitmap B            N-1 ─────────────────────────── N+1
//! ```
//!
//! While a bitmap is being written, the other one is what the superblock names, so a crash leaves that untouched. Only pages
//! that differ from what their place holds are written.
//!
//! Blocks freed since the last superblock are still referred to by it. They are clear in the bitmap that is stored next, but
//! are not handed out before [`MetaSpace::committed`] says that the superblock which names that bitmap is durable.
//!
//! Each page tells that it is undamaged, of this file system, and in its place; the checksum in the superblock tells that all
//! of them are of the right time, so that a lost write is noticed as well.

mod hold;
mod page;
mod store;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block_io::IoError;

pub(crate) use hold::Hold;

use crate::superblock::layout::{BITS_PER_PAGE, COPIES, bitmap_pages, copy_place};
use crate::superblock::{Layout, Region};

/// Which bitmap counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SpaceState {
    /// Counts the bitmaps that were stored; this one is in area `number % 2`.
    pub(crate) number: u64,
    /// CRC-32C of its bits, padding included.
    pub(crate) checksum: u32,
}

/// Why the bitmap cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum MetaSpaceError {
    #[error("the bitmap of the metadata volume cannot be read or written")]
    Device(#[source] Arc<IoError>),
    #[error(
        "page {page} of the metadata bitmap, block {block} of the volume, is damaged: {problem}; restore the volume's redundancy and check the file system"
    )]
    Damaged {
        page: u64,
        block: u64,
        problem: &'static str,
    },
    #[error(
        "the metadata bitmap number {number} is not the one that the superblock names: writes to the volume were lost; check the file system"
    )]
    Stale { number: u64 },
    #[error(
        "block {block} of the metadata volume cannot be freed, as it is {problem}: check the file system"
    )]
    NotFreeable { block: u64, problem: &'static str },
}

/// The blocks of the metadata volume.
#[derive(Debug)]
pub(crate) struct MetaSpace<V> {
    device: Rc<V>,
    layout: Layout,
    uuid: [u8; 16],
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    /// What will be stored: bit `b % 64` of word `b / 64` says that block `b` is in use.
    image: Vec<u64>,
    /// What may not be handed out: `image`, and the freed blocks that are waiting.
    busy: Vec<u64>,
    /// Blocks that may be handed out.
    free: u64,
    /// Freed since the last store.
    freed: Vec<u64>,
    /// Freed before the last store, whose superblock is not durable yet.
    stored: Vec<u64>,
    /// Free, but kept for who still reads them: see [`hold`].
    held: hold::Held,
    /// Per area and page, whether the place holds something else than `image`.
    differs: [Vec<bool>; 2],
    /// Where the next search begins.
    cursor: u64,
    current: SpaceState,
}

const WORDS_PER_PAGE: usize = 4064 / 8;

fn index_of(block: u64) -> usize {
    usize::try_from(block / 64).unwrap_or(usize::MAX)
}

fn is_set(words: &[u64], block: u64) -> bool {
    words
        .get(index_of(block))
        .is_none_or(|word| word >> (block % 64) & 1 == 1)
}

fn set(words: &mut [u64], block: u64, value: bool) {
    if let Some(word) = words.get_mut(index_of(block)) {
        let bit = 1 << (block % 64);
        *word = if value { *word | bit } else { *word & !bit };
    }
}

/// The bitmap of a volume on which only the reserved regions are in use. Bits beyond its end are set.
fn blank(layout: &Layout) -> Vec<u64> {
    let pages = usize::try_from(bitmap_pages(layout.size_blocks)).unwrap_or(usize::MAX);
    let mut words = vec![0; pages.saturating_mul(WORDS_PER_PAGE)];
    let end = words.len() as u64 * 64;
    let beyond = Region {
        first: layout.size_blocks,
        blocks: end.saturating_sub(layout.size_blocks),
    };
    for region in layout.reserved().chain([beyond]) {
        // Whole words at once: most of a small volume's bitmap is beyond its end.
        let first = region.first.next_multiple_of(64).min(region.end());
        let last = (region.end() / 64 * 64).max(first);
        if let Some(words) = words.get_mut(index_of(first)..index_of(last)) {
            words.fill(u64::MAX);
        }
        (region.first..first)
            .chain(last..region.end())
            .for_each(|block| set(&mut words, block, true));
    }
    words
}

impl<V> MetaSpace<V> {
    /// How much of a volume of this size can be used: as far as the places of the bitmaps reach.
    pub(crate) fn reach(&self, size_blocks: u64) -> u64 {
        let reach = self.layout.bitmaps[0].blocks.saturating_mul(BITS_PER_PAGE);
        size_blocks.min(reach).max(self.layout.size_blocks)
    }

    /// The space of a volume that has grown. Counts from the next [`Self::store`] and the superblock that names it on.
    pub(crate) fn grown(self, size_blocks: u64) -> Self {
        let old = self.layout;
        let layout = Layout {
            size_blocks: self.reach(size_blocks),
            ..old
        };
        let state = self.state.into_inner();
        let mut image = blank(&layout);
        let gone = copy_place(COPIES - 1, old.size_blocks);
        for block in (0..old.size_blocks).filter(|block| *block != gone) {
            if is_set(&state.image, block) {
                set(&mut image, block, true);
            }
        }
        block_io::cover!("metadata space: it has grown");
        let pages = image.len() / WORDS_PER_PAGE;
        let differs = [vec![true; pages], vec![true; pages]];
        Self {
            device: self.device,
            layout,
            uuid: self.uuid,
            state: RefCell::new(State::new(image, differs, state.current)),
        }
    }

    /// Where everything is.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }
}

impl State {
    fn new(image: Vec<u64>, differs: [Vec<bool>; 2], current: SpaceState) -> Self {
        let free = image.iter().map(|word| u64::from(word.count_zeros())).sum();
        Self {
            busy: image.clone(),
            image,
            free,
            freed: Vec::new(),
            stored: Vec::new(),
            held: hold::Held::default(),
            differs,
            cursor: 0,
            current,
        }
    }

    fn end(&self) -> u64 {
        self.busy.len() as u64 * 64
    }

    /// The first free block from `from` on.
    fn next_free(&self, from: u64) -> Option<u64> {
        let first = index_of(from);
        let words = self.busy.get(first..)?;
        for (number, word) in words.iter().enumerate() {
            // Blocks of the first word before `from` do not count.
            let before = if number == 0 { (1 << (from % 64)) - 1 } else { 0 };
            let taken = word | before;
            if taken != u64::MAX {
                return Some((first + number) as u64 * 64 + u64::from(taken.trailing_ones()));
            }
        }
        None
    }

    /// Free blocks from `block` on without a gap, at most `most`.
    fn run(&self, block: u64, most: u64) -> u64 {
        (0..most)
            .take_while(|ahead| {
                block
                    .checked_add(*ahead)
                    .is_some_and(|block| !is_set(&self.busy, block))
            })
            .count() as u64
    }

    /// Where a run of `count` free blocks begins, at or after `from` and before `to`.
    fn find_run(&self, from: u64, to: u64, count: u64) -> Option<u64> {
        let mut at = from;
        for _ in 0..TRIES {
            at = self.next_free(at).filter(|block| *block < to)?;
            let run = self.run(at, count);
            if run == count {
                return Some(at);
            }
            at += run + 1;
        }
        None
    }

    fn take(&mut self, block: u64) {
        if self.held.is_wanted() {
            self.held.note_taken(block);
        }
        set(&mut self.busy, block, true);
        self.change(block, true);
        self.free -= 1;
        self.cursor = block + 1;
    }

    /// These may be handed out from now on.
    fn hand_out(&mut self, blocks: &[u64]) {
        for block in blocks {
            set(&mut self.busy, *block, false);
            self.free += 1;
        }
    }

    fn change(&mut self, block: u64, value: bool) {
        set(&mut self.image, block, value);
        let page = index_of(block) / WORDS_PER_PAGE;
        for differs in &mut self.differs {
            if let Some(differs) = differs.get_mut(page) {
                *differs = true;
            }
        }
    }
}

/// Gaps looked at for a contiguous run before scattered blocks do.
const TRIES: u32 = 256;

impl<V> MetaSpace<V> {
    /// Blocks that may be handed out now.
    pub(crate) fn free_count(&self) -> u64 {
        self.state.borrow().free
    }

    /// Blocks that are handed out after the next commits: freed, but still referred to by the superblock.
    pub(crate) fn waiting_count(&self) -> u64 {
        let state = self.state.borrow();
        (state.freed.len() + state.stored.len()) as u64
    }

    /// The bitmap that was stored last.
    pub(crate) fn current(&self) -> SpaceState {
        self.state.borrow().current
    }

    /// Whether a block is in use, reserved ones and those beyond the end included.
    pub(crate) fn is_used(&self, block: u64) -> bool {
        is_set(&self.state.borrow().image, block)
    }

    /// Appends `count` blocks to `blocks`, in one run if one is found; next fit. False, with nothing taken, if there are not
    /// so many.
    pub(crate) fn allocate(&self, count: u64, blocks: &mut Vec<u64>) -> bool {
        let mut state = self.state.borrow_mut();
        if count > state.free {
            block_io::cover!("metadata space: no room");
            return false;
        }
        let (cursor, end) = (state.cursor, state.end());
        let run = state
            .find_run(cursor, end, count)
            .or_else(|| state.find_run(0, cursor, count));
        let mut at = run.unwrap_or(cursor);
        if run.is_none() {
            block_io::cover!("metadata space: scattered blocks");
        }
        for _ in 0..count {
            let Some(block) = state.next_free(at).or_else(|| state.next_free(0)) else {
                debug_assert!(false, "fewer free blocks than counted");
                return false;
            };
            state.take(block);
            blocks.push(block);
            at = block + 1;
        }
        true
    }

    /// Frees blocks; they are handed out again after the next [`Self::store`] and [`Self::committed`].
    ///
    /// # Errors
    /// A block is reserved, beyond the end or not in use; then none is freed.
    pub(crate) fn free(&self, blocks: &[u64]) -> Result<(), MetaSpaceError> {
        let mut state = self.state.borrow_mut();
        let refused = |block, problem| Err(MetaSpaceError::NotFreeable { block, problem });
        for (number, block) in blocks.iter().copied().enumerate() {
            let inside = |region: Region| (region.first..region.end()).contains(&block);
            let problem = if block >= self.layout.size_blocks {
                Some("beyond the end")
            } else if self.layout.reserved().any(inside) {
                Some("reserved")
            } else if !is_set(&state.image, block) {
                Some("not in use")
            } else {
                None
            };
            if let Some(problem) = problem {
                blocks[..number]
                    .iter()
                    .for_each(|block| state.change(*block, true));
                return refused(block, problem);
            }
            // Cleared at once, so that a block that is named twice is noticed.
            state.change(block, false);
        }
        state.freed.extend_from_slice(blocks);
        Ok(())
    }

    /// The superblock that names the bitmap stored last is durable: what was freed before it was stored may be handed out.
    pub(crate) fn committed(&self) {
        let mut state = self.state.borrow_mut();
        let stored = std::mem::take(&mut state.stored);
        if state.held.is_wanted() {
            state.held.keep(stored);
            return;
        }
        state.hand_out(&stored);
    }
}

/// Parses a block as a page of a bitmap, with its checksum computed, and writes it again: for fuzzing.
pub(crate) fn survives(block: &[u8]) -> bool {
    use crate::meta_io::{put, take_u64};
    let mut block = block.to_vec();
    block.resize(4096, 0);
    let checksum = crate::checksum::crc32c(block.get(8..).unwrap_or_default());
    put(&mut block, 4, &checksum.to_le_bytes());
    let (number, index) = (take_u64(&block, 8), take_u64(&block, 24));
    let mut uuid = [0; 16];
    put(&mut uuid, 0, &take_u64(&block, 16).to_le_bytes());
    let Ok(words) = page::decode(&block, index, number, uuid) else {
        return false;
    };
    let mut again = vec![0; 4096];
    page::encode(&mut again, index, number, uuid, &words);
    assert_eq!(again, block);
    true
}
