//! The bitmap on the volume: made, loaded, stored.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block_io::{AlignedBuffer, BlockDevice, Durability, cover};

use super::{MetaSpace, MetaSpaceError, SpaceState, State, WORDS_PER_PAGE, blank, page};
use crate::heal::Healer;
use crate::meta_io::{self, BLOCK, MOST};
use crate::superblock::layout::bitmap_pages;
use crate::superblock::{Layout, Region};

/// Pages per request: 1 MiB.
const AT_ONCE: u64 = 256;

fn area(layout: &Layout, number: u64) -> (usize, Region) {
    let index = usize::from(number % 2 == 1);
    (index, layout.bitmaps[index])
}

/// CRC-32C of all bits as they are on the volume.
fn checksum(words: &[u64]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    let mut bytes = [0; WORDS_PER_PAGE * 8];
    for chunk in words.chunks(WORDS_PER_PAGE) {
        for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(chunk) {
            *place = word.to_le_bytes();
        }
        digest.update(&bytes[..chunk.len() * 8]);
    }
    // The upper half of a 32-bit checksum is zero.
    u32::try_from(digest.finalize() & 0xffff_ffff).unwrap_or_default()
}

impl<V: BlockDevice> MetaSpace<V> {
    /// The bitmap of a fresh file system. Nothing is written: [`Self::store`] does, before the first superblock.
    pub(crate) fn format(device: Rc<V>, layout: Layout, uuid: [u8; 16]) -> Self {
        let image = blank(&layout);
        let pages = image.len() / WORDS_PER_PAGE;
        let differs = [vec![true; pages], vec![true; pages]];
        Self::with(
            device,
            layout,
            uuid,
            State::new(image, differs, SpaceState::default()),
        )
    }

    fn with(device: Rc<V>, layout: Layout, uuid: [u8; 16], state: State) -> Self {
        Self {
            device,
            layout,
            uuid,
            state: RefCell::new(state),
        }
    }

    #[cfg(test)]
    /// Loads the bitmap that the superblock names.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or is not the one that was stored.
    pub(crate) async fn load(
        device: Rc<V>,
        layout: Layout,
        uuid: [u8; 16],
        current: SpaceState,
    ) -> Result<Self, MetaSpaceError> {
        Self::load_healed(device, layout, uuid, current, &Healer::default()).await
    }

    /// As [`Self::load`]. Where pages are damaged, or writes to them were lost, the newest valid copy of each that the volume has is
    /// taken, and put right.
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub(crate) async fn load_healed(
        device: Rc<V>,
        layout: Layout,
        uuid: [u8; 16],
        current: SpaceState,
        healer: &Healer,
    ) -> Result<Self, MetaSpaceError> {
        let number = current.number;
        let (live, region) = area(&layout, number);
        let mut found = read_area(&*device, &layout, region, number, uuid).await?;
        if !is_current(&found, current) {
            heal_area(&mut found, region, number, uuid, healer).await;
        }
        let mut image = Vec::new();
        for page in found {
            image.extend(page?);
        }
        check_reserved(&image, &layout, region)?;
        if number >= MOST || checksum(&image) != current.checksum {
            cover!("metadata space: a stale bitmap is refused");
            return Err(MetaSpaceError::Stale { number });
        }
        // What the other one holds only spares writes: damage there does not matter.
        let (other, region) = area(&layout, number + 1);
        let held = read_area(&*device, &layout, region, number + 1, uuid).await;
        let mut differs = [Vec::new(), Vec::new()];
        let pages = image.chunks(WORDS_PER_PAGE);
        differs[live] = vec![false; pages.len()];
        differs[other] = match held {
            Ok(held) => pages
                .zip(held)
                .map(|(page, held)| held.map_or(true, |held| held != page))
                .collect(),
            Err(_) => vec![true; pages.len()],
        };
        Ok(Self::with(
            device,
            layout,
            uuid,
            State::new(image, differs, current),
        ))
    }

    /// Reads the bitmap that was stored last, and repairs it from other copies. Gives blocks and content, and how many were repaired; nothing
    /// if it is damaged. No checkpoint runs.
    pub(crate) async fn verify(
        &self,
        healer: &Healer,
    ) -> Result<(Option<Vec<(u64, AlignedBuffer)>>, u64), MetaSpaceError> {
        let current = self.state.borrow().current;
        let (_, region) = area(&self.layout, current.number);
        let mut found = read_stored(
            &*self.device,
            &self.layout,
            region,
            current.number,
            self.uuid,
            healer,
        )
        .await?;
        let mut repaired = 0;
        if !is_current(&found, current) {
            repaired = heal_area(&mut found, region, current.number, self.uuid, healer).await;
        }
        if !is_current(&found, current) {
            return Ok((None, repaired));
        }
        let mut blocks = Vec::new();
        for block in (region.first..).take(found.len()) {
            let bytes = match healer.copies(block) {
                0 => None,
                _ => healer.read(0, block).await,
            };
            if let Some(bytes) = bytes {
                blocks.push((block, bytes));
            }
        }
        Ok((Some(blocks), repaired))
    }

    /// Nobody knows what the places on the volume hold: the next bitmaps are written in full.
    pub(crate) fn forget_stored(&self) {
        let mut state = self.state.borrow_mut();
        state
            .differs
            .iter_mut()
            .flatten()
            .for_each(|differs| *differs = true);
    }

    /// Writes the next bitmap: what is in use now. Volatile: flush the metadata volume before the superblock that names the
    /// result. After that one is durable, call [`Self::committed`]. Not while another store is running.
    ///
    /// # Errors
    /// The device's; the bitmap that the superblock names is untouched, and this may be tried again.
    pub(crate) async fn store(&self) -> Result<SpaceState, MetaSpaceError> {
        let (next, index, region, pages) = self.plan();
        let mut runs = Vec::new();
        for (page, words) in pages {
            match runs.last_mut() {
                Some(Run { first, pages })
                    if *first + pages.len() as u64 == page && (pages.len() as u64) < AT_ONCE =>
                {
                    pages.push(words);
                }
                _ => runs.push(Run {
                    first: page,
                    pages: vec![words],
                }),
            }
        }
        let uuid = self.uuid;
        let mut unwritten = Unwritten {
            space: self,
            index,
            runs: &runs,
        };
        for run in &runs {
            let mut buffer = AlignedBuffer::new(run.pages.len() * BLOCK);
            for ((page, words), block) in (run.first..)
                .zip(&run.pages)
                .zip(buffer.as_mut_slice().chunks_mut(BLOCK))
            {
                page::encode(block, page, next.number, uuid, words);
            }
            let place = region.first + run.first;
            let written = meta_io::write_blocks(
                &*self.device,
                place,
                &buffer,
                0..run.pages.len(),
                Durability::Volatile,
            )
            .await;
            if let Err(source) = written {
                cover!("metadata space: a bitmap cannot be written");
                return Err(MetaSpaceError::Device(Arc::new(source)));
            }
        }
        unwritten.runs = &[];
        self.state.borrow_mut().current = next;
        Ok(next)
    }

    /// What to write where. From here on, what is freed belongs to the bitmap after this one.
    fn plan(&self) -> (SpaceState, usize, Region, Vec<(u64, Vec<u64>)>) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        state.stored.append(&mut state.freed);
        let next = SpaceState {
            number: state.current.number + 1,
            checksum: checksum(&state.image),
        };
        let (index, region) = area(&self.layout, next.number);
        let mut pages = Vec::new();
        for ((page, differs), words) in (0..)
            .zip(&mut state.differs[index])
            .zip(state.image.chunks(WORDS_PER_PAGE))
        {
            if std::mem::take(differs) {
                pages.push((page, words.to_vec()));
            }
        }
        (next, index, region, pages)
    }
}

/// Marks places as unknown when a store fails or is dropped.
struct Unwritten<'a, V> {
    space: &'a MetaSpace<V>,
    index: usize,
    runs: &'a [Run],
}

impl<V> Drop for Unwritten<'_, V> {
    fn drop(&mut self) {
        let mut state = self.space.state.borrow_mut();
        for run in self.runs {
            let first = usize::try_from(run.first).unwrap_or(usize::MAX);
            let places = state.differs[self.index].iter_mut().skip(first);
            places.take(run.pages.len()).for_each(|differs| *differs = true);
        }
    }
}

/// Pages that follow each other.
struct Run {
    first: u64,
    pages: Vec<Vec<u64>>,
}

type Page = Result<Vec<u64>, MetaSpaceError>;

/// Reads the pages of a bitmap.
async fn read_area<V: BlockDevice>(
    device: &V,
    layout: &Layout,
    region: Region,
    number: u64,
    uuid: [u8; 16],
) -> Result<Vec<Page>, MetaSpaceError> {
    let pages = bitmap_pages(layout.size_blocks);
    let mut found = Vec::new();
    let mut page = 0;
    while page < pages {
        let count = usize::try_from((pages - page).min(AT_ONCE)).unwrap_or(1);
        let read = meta_io::read_blocks(device, region.first + page, count).await;
        let read = read.map_err(|source| MetaSpaceError::Device(Arc::new(source)))?;
        for block in read.as_slice().chunks(BLOCK) {
            let damaged = |problem| {
                cover!("metadata space: a damaged page is refused");
                let block = region.first + page;
                MetaSpaceError::Damaged { page, block, problem }
            };
            found.push(page::decode(block, page, number, uuid).map_err(damaged));
            page += 1;
        }
    }
    Ok(found)
}

/// As [`read_area`], of the copies that are stored.
async fn read_stored<V: BlockDevice>(
    device: &V,
    layout: &Layout,
    region: Region,
    number: u64,
    uuid: [u8; 16],
    healer: &Healer,
) -> Result<Vec<Page>, MetaSpaceError> {
    let mut found = read_area(device, layout, region, number, uuid).await?;
    for (page, place) in (0_u64..).zip(&mut found) {
        let block = region.first + page;
        if healer.copies(block) == 0 {
            break;
        }
        let damaged = |problem| MetaSpaceError::Damaged { page, block, problem };
        *place = match healer.read(0, block).await {
            Some(bytes) => page::decode(bytes.as_slice(), page, number, uuid).map_err(damaged),
            None => continue,
        };
    }
    Ok(found)
}

/// Whether these are just the pages that the superblock names.
fn is_current(found: &[Page], current: SpaceState) -> bool {
    let words: Vec<u64> = found.iter().flatten().flatten().copied().collect();
    found.iter().all(Result::is_ok) && checksum(&words) == current.checksum
}

/// Takes the newest copy of each page: the last write to a place was acknowledged before the superblock named the bitmap.
async fn heal_area(found: &mut [Page], region: Region, number: u64, uuid: [u8; 16], healer: &Healer) -> u64 {
    let mut repaired = 0;
    for (page, place) in (0_u64..).zip(found) {
        let block = region.first + page;
        let mut newest: Option<(u64, Vec<u64>, AlignedBuffer)> = None;
        let mut differ = false;
        for copy in 0..healer.copies(block) {
            let Some(bytes) = healer.read(copy, block).await else {
                continue;
            };
            let Ok(words) = page::decode(bytes.as_slice(), page, number, uuid) else {
                differ = true;
                continue;
            };
            let written = page::number(bytes.as_slice());
            differ |= newest.as_ref().is_some_and(|(before, ..)| *before != written);
            if newest.as_ref().is_none_or(|(before, ..)| *before < written) {
                newest = Some((written, words, bytes));
            }
        }
        if let Some((_, words, bytes)) = newest.filter(|_| differ) {
            cover!("metadata space: a page is taken from another copy");
            repaired += u64::from(healer.repair(block, &bytes).await);
            *place = Ok(words);
        }
    }
    repaired
}

/// Reserved blocks, and those beyond the end, are in use.
fn check_reserved(image: &[u64], layout: &Layout, region: Region) -> Result<(), MetaSpaceError> {
    for (number, (word, reserved)) in image.iter().zip(blank(layout)).enumerate() {
        if word & reserved != reserved {
            let page = (number / WORDS_PER_PAGE) as u64;
            return Err(MetaSpaceError::Damaged {
                page,
                block: region.first + page,
                problem: "reserved blocks are not marked as in use",
            });
        }
    }
    Ok(())
}
