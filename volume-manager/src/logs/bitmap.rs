//! Which regions of a volume have changed since a member was detached: when it comes back, only these are copied.
//!
//! A copy of the bitmap lies on each log device of the volume. It consists of self-checking sectors as large as the device's
//! logical blocks (512 or 4096 bytes), so none is ever half written. Numbers are little-endian.
//!
//! | offset | size | sector `n` |
//! |---:|---:|---|
//! | 0 | 4 | CRC-32C of bytes 4 to the end |
//! | 4 | 4 | `n` |
//! | 8 | 8 | generation |
//! | 16 | 496 or 4080 | bit `r` (bit `r mod 8` of byte `r / 8`) is for region `n * 3968 + r` (or `n * 32640 + r`) |
//!
//! - Bits are only set within a generation, so it does not matter which sectors of a write a crash has kept: those that were not
//!   acknowledged may be there or not.
//! - A sector of another generation counts as all zero: a new generation clears the bitmap without a write. It begins when a
//!   member is detached and none was; its number is the epoch of that configuration, so no number comes twice.
//! - A sector with a wrong checksum or number counts as all ones: what is copied for nothing does no harm.
//! - A bit is set before its region leaves the activity log: see [`Release`](super::hot::Release). Until then the log says it.
//! - A copy that fails is not written any more, and nothing is acknowledged until the owner has *first* made a configuration
//!   durable without it and *then* called [`Bitmap::remove_copy`].

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use block_io::{AlignedBuffer, BlockDevice, Durability, cover};

use super::gate::{Gate, join_all};
use super::{LogCopy, LogError};
use crate::bytes;
use crate::checksum::crc32c;
use crate::model::DeviceId;

const HEADER: usize = 16;
const COVERED: usize = 4;
const SMALL: usize = 512;
const LARGE: usize = 4096;
const WORD: usize = 8;
/// Bytes read or formatted at once.
const STRIDE: usize = 1 << 20;

// Sectors hold whole words, so that a word is never in two.
const _: () = assert!((SMALL - HEADER).is_multiple_of(WORD) && (LARGE - HEADER).is_multiple_of(WORD));

/// Bytes that a copy needs for so many regions, on whatever device.
pub fn length(regions: u32) -> u64 {
    let words = words(regions).max(1) as u64;
    let sectors = words.div_ceil(Sectors { size: SMALL }.words() as u64);
    (sectors * SMALL as u64).next_multiple_of(LARGE as u64)
}

fn words(regions: u32) -> usize {
    usize::try_from(regions).unwrap_or(usize::MAX).div_ceil(64)
}

/// How a copy is cut.
#[derive(Debug, Clone, Copy)]
struct Sectors {
    size: usize,
}

impl Sectors {
    fn of(device: &impl BlockDevice) -> Self {
        let block = usize::try_from(device.geometry().logical_block).unwrap_or(LARGE);
        Self {
            size: if block <= SMALL { SMALL } else { LARGE },
        }
    }

    /// Words of bits in a sector.
    fn words(self) -> usize {
        (self.size - HEADER) / WORD
    }
}

/// Writes sector `number` into `target`; `bits` are those of the sector or, in the last one, fewer.
fn encode(target: &mut [u8], number: usize, generation: u64, bits: &[u64]) {
    target.fill(0);
    target[4..8].copy_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    target[8..16].copy_from_slice(&generation.to_le_bytes());
    for (place, word) in target[HEADER..].chunks_exact_mut(WORD).zip(bits) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let sum = crc32c(&target[COVERED..]);
    target[..COVERED].copy_from_slice(&sum.to_le_bytes());
}

/// What a sector says.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    /// It is damaged.
    Unknown,
    /// It is of another generation.
    Empty,
    Words(Vec<u64>),
}

fn decode(sector: &[u8], number: usize, generation: u64) -> Content {
    let field = |at: usize, length: usize| {
        let bytes = sector.get(at..at + length).unwrap_or_default();
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let sum = u64::from(crc32c(sector.get(COVERED..).unwrap_or_default()));
    if sector.len() < HEADER || field(0, 4) != sum || field(4, 4) != number as u64 {
        cover!("bitmap: damaged sector counts as all ones");
        return Content::Unknown;
    }
    if field(8, 8) != generation {
        cover!("bitmap: sector of another generation counts as zero");
        return Content::Empty;
    }
    let words = (HEADER..sector.len()).step_by(WORD);
    Content::Words(words.map(|at| field(at, WORD)).collect())
}

#[derive(Debug)]
struct State {
    generation: u64,
    /// What is or shall be set.
    wanted: Vec<u64>,
    /// What is durably set on all copies.
    durable: Vec<u64>,
    /// Words that differ.
    dirty: BTreeSet<usize>,
    writing: bool,
    failed: Option<LogError>,
}

impl State {
    fn blank(regions: u32, generation: u64) -> Self {
        Self {
            generation,
            wanted: vec![0; words(regions)],
            durable: vec![0; words(regions)],
            dirty: BTreeSet::new(),
            writing: false,
            failed: None,
        }
    }

    /// Wants these bits; whether all of them are durable.
    fn want(&mut self, regions: &[u32]) -> bool {
        let mut durable = true;
        for region in regions {
            let (word, bit) = place(*region);
            self.wanted[word] |= bit;
            if self.durable[word] & bit == 0 {
                durable = false;
                self.dirty.insert(word);
            }
        }
        durable
    }
}

fn place(region: u32) -> (usize, u64) {
    (
        usize::try_from(region / 64).unwrap_or(usize::MAX),
        1 << (region % 64),
    )
}

/// The bitmap of a volume.
#[derive(Debug)]
pub struct Bitmap<D> {
    copies: RefCell<Vec<LogCopy<D>>>,
    regions: u32,
    state: RefCell<State>,
    changed: Gate,
}

impl<D: BlockDevice + 'static> Bitmap<D> {
    /// Makes empty copies of `length` bytes, durably.
    ///
    /// # Errors
    /// A device's; the length is too small.
    pub async fn format(copies: Vec<LogCopy<D>>, length: u64, regions: u32) -> Result<Self, LogError> {
        check_length(length, regions)?;
        let state = State::blank(regions, 0);
        let writes = copies.iter().map(|copy| write_all(copy, 0, &state.wanted));
        for written in join_all(writes).await {
            written?;
        }
        Ok(Self::with(copies, regions, state))
    }

    /// Reads what the copies say about `generation`: all that any of them says.
    ///
    /// # Errors
    /// A copy cannot be read (then load without it, if it may be left out); the length is too small.
    pub async fn load(
        copies: Vec<LogCopy<D>>,
        length: u64,
        regions: u32,
        generation: u64,
    ) -> Result<Self, LogError> {
        check_length(length, regions)?;
        let mut state = State::blank(regions, generation);
        state.durable.fill(u64::MAX);
        for copy in &copies {
            read_all(copy, &mut state).await?;
        }
        if let (Some(last), rest @ 1..) = (state.wanted.last_mut(), regions % 64) {
            *last &= (1 << rest) - 1;
        }
        for (word, (wanted, durable)) in state.wanted.iter().zip(&mut state.durable).enumerate() {
            *durable &= wanted;
            if wanted != durable {
                state.dirty.insert(word);
            }
        }
        Ok(Self::with(copies, regions, state))
    }

    fn with(copies: Vec<LogCopy<D>>, regions: u32, state: State) -> Self {
        Self {
            copies: RefCell::new(copies),
            regions,
            state: RefCell::new(state),
            changed: Gate::default(),
        }
    }

    /// Begins a new generation, which is never the number of an earlier one: no region is set.
    pub fn begin(&self, generation: u64) {
        {
            let mut state = self.state.borrow_mut();
            state.generation = generation;
            state.wanted.fill(0);
            state.durable.fill(0);
            state.dirty.clear();
        }
        self.changed.open();
    }

    /// Whether a region has changed, or is about to.
    pub fn is_set(&self, region: u32) -> bool {
        let (word, bit) = place(region);
        let state = self.state.borrow();
        state.wanted.get(word).is_some_and(|word| word & bit != 0)
    }

    /// The first region from `region` on that has changed.
    pub fn next_set(&self, region: u32) -> Option<u32> {
        let state = self.state.borrow();
        let (first, _) = place(region);
        let mut mask = u64::MAX << (region % 64);
        for (index, word) in state.wanted.iter().enumerate().skip(first) {
            let rest = word & std::mem::replace(&mut mask, u64::MAX);
            if rest != 0 {
                return u32::try_from(index * 64).ok()?.checked_add(rest.trailing_zeros());
            }
        }
        None
    }

    /// How many regions have changed.
    pub fn count(&self) -> u64 {
        let ones = |word: &u64| u64::from(word.count_ones());
        self.state.borrow().wanted.iter().map(ones).sum()
    }

    /// Sets regions, durably on all copies. Those that are set already cost nothing; those that others set meanwhile are written
    /// together.
    ///
    /// # Errors
    /// A copy has failed: take it out of the configuration, then out of the bitmap, and try again. A region is beyond the end.
    pub async fn set(&self, regions: &[u32]) -> Result<(), LogError> {
        if let Some(region) = regions.iter().copied().find(|region| *region >= self.regions) {
            let regions = self.regions;
            return Err(LogError::NoRegion { region, regions });
        }
        loop {
            let turn = self.changed.until(|| {
                let mut state = self.state.borrow_mut();
                if let Some(error) = &state.failed {
                    return Some(Err(error.clone()));
                }
                if self.copies.borrow().is_empty() {
                    return Some(Err(LogError::NoBitmap));
                }
                if state.want(regions) {
                    return Some(Ok(None));
                }
                (!std::mem::replace(&mut state.writing, true)).then_some(Ok(Some(())))
            });
            if turn.await?.is_none() {
                return Ok(());
            }
            self.write_dirty().await;
        }
    }

    /// Takes a copy out of service. First make a configuration durable that does not name it.
    pub fn remove_copy(&self, device: DeviceId) {
        self.copies.borrow_mut().retain(|copy| copy.id != device);
        self.state.borrow_mut().failed = None;
        self.changed.open();
    }

    /// Puts a new copy into service. When this returns, it holds all that the others hold, and may be named in the
    /// configuration.
    ///
    /// # Errors
    /// The new copy's device has failed; it is not in service then.
    pub async fn add_copy(&self, copy: LogCopy<D>) -> Result<(), LogError> {
        let free = || (!std::mem::replace(&mut self.state.borrow_mut().writing, true)).then_some(());
        self.changed.until(free).await;
        let _turn = Turn {
            bitmap: self,
            taken: None,
        };
        let (generation, wanted) = {
            let state = self.state.borrow();
            (state.generation, state.wanted.clone())
        };
        // As nobody else writes meanwhile, nothing becomes durable that is not in it. If a new generation begins, it counts as
        // zero, which is right, too.
        write_all(&copy, generation, &wanted).await?;
        self.copies.borrow_mut().push(copy);
        Ok(())
    }

    /// Writes all dirty words to all copies. The caller has the turn.
    async fn write_dirty(&self) {
        let mut turn = Turn {
            bitmap: self,
            taken: None,
        };
        let copies = self.copies.borrow().clone();
        let (generation, written, mut plans) = {
            let mut state = self.state.borrow_mut();
            let dirty = std::mem::take(&mut state.dirty);
            let written: BTreeMap<usize, u64> =
                dirty.iter().map(|word| (*word, state.wanted[*word])).collect();
            let plans: Vec<_> = copies
                .iter()
                .flat_map(|copy| plan(copy, &dirty, state.generation, &state.wanted))
                .collect();
            turn.taken = Some(dirty);
            (state.generation, written, plans)
        };
        let writes = plans.drain(..).map(|(copy, at, buffer)| async move {
            let write = bytes::write(&*copy.device, copy.start + at, &buffer, Durability::Durable);
            write.await.map_err(|source| (copy.id, copy.failure(source)))
        });
        let results = join_all(writes).await;
        let mut state = self.state.borrow_mut();
        let in_service = |id: DeviceId| self.copies.borrow().iter().any(|copy| copy.id == id);
        let failure = results
            .into_iter()
            .filter_map(Result::err)
            .find(|(id, _)| in_service(*id));
        if let Some((_, error)) = failure {
            cover!("bitmap: a copy failed");
            state.failed = Some(error);
            return;
        }
        turn.taken = None;
        if state.generation == generation {
            for (word, bits) in written {
                state.durable[word] |= bits;
            }
        } else {
            cover!("bitmap: a new generation began during a write");
        }
    }
}

/// The right to write; what was taken and is not durable is dirty again at its end.
struct Turn<'a, D: BlockDevice + 'static> {
    bitmap: &'a Bitmap<D>,
    taken: Option<BTreeSet<usize>>,
}

impl<D: BlockDevice + 'static> Drop for Turn<'_, D> {
    fn drop(&mut self) {
        {
            let mut state = self.bitmap.state.borrow_mut();
            state.writing = false;
            if let Some(taken) = self.taken.take() {
                state.dirty.extend(taken);
            }
        }
        self.bitmap.changed.open();
    }
}

fn check_length(given: u64, regions: u32) -> Result<(), LogError> {
    let needed = length(regions);
    if given < needed {
        return Err(LogError::BitmapTooSmall {
            length: given,
            needed,
        });
    }
    Ok(())
}

/// The writes that bring a copy's sectors with these words up to date: runs of neighbouring sectors.
fn plan<'a, D: BlockDevice>(
    copy: &'a LogCopy<D>,
    dirty: &BTreeSet<usize>,
    generation: u64,
    bits: &[u64],
) -> Vec<(&'a LogCopy<D>, u64, AlignedBuffer)> {
    let sectors = Sectors::of(&*copy.device);
    let numbers: BTreeSet<usize> = dirty.iter().map(|word| word / sectors.words()).collect();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, end)) if *end == number => *end += 1,
            _ => runs.push((number, number + 1)),
        }
    }
    let encoded = |(first, end): (usize, usize)| {
        let buffer = encode_run(sectors, first, end - first, generation, bits);
        (copy, (first * sectors.size) as u64, buffer)
    };
    runs.into_iter().map(encoded).collect()
}

fn encode_run(sectors: Sectors, first: usize, count: usize, generation: u64, bits: &[u64]) -> AlignedBuffer {
    let mut buffer = AlignedBuffer::new(count * sectors.size);
    let chunks = bits.chunks(sectors.words()).skip(first);
    let targets = buffer.as_mut_slice().chunks_exact_mut(sectors.size);
    for (number, (target, bits)) in (first..).zip(targets.zip(chunks)) {
        encode(target, number, generation, bits);
    }
    buffer
}

/// Writes every sector of a copy, durably.
async fn write_all<D: BlockDevice>(copy: &LogCopy<D>, generation: u64, bits: &[u64]) -> Result<(), LogError> {
    let sectors = Sectors::of(&*copy.device);
    let all = bits.len().div_ceil(sectors.words());
    let step = STRIDE / sectors.size;
    let mut first = 0;
    while first < all {
        let count = step.min(all - first);
        let buffer = encode_run(sectors, first, count, generation, bits);
        let at = copy.start + (first * sectors.size) as u64;
        let written = bytes::write(&*copy.device, at, &buffer, Durability::Volatile).await;
        written.map_err(|source| copy.failure(source))?;
        first += count;
    }
    copy.device.flush().await.map_err(|source| copy.failure(source))
}

/// Adds what a copy says to what is wanted, and takes what it does not say from what is durable.
async fn read_all<D: BlockDevice>(copy: &LogCopy<D>, state: &mut State) -> Result<(), LogError> {
    let sectors = Sectors::of(&*copy.device);
    let all = state.wanted.len().div_ceil(sectors.words());
    let step = STRIDE / sectors.size;
    let mut first = 0;
    while first < all {
        let count = step.min(all - first);
        let at = copy.start + (first * sectors.size) as u64;
        let read = bytes::read(&*copy.device, at, count * sectors.size).await;
        let buffer = read.map_err(|source| copy.failure(source))?;
        for (number, sector) in (first..).zip(buffer.as_slice().chunks_exact(sectors.size)) {
            take_in(state, sectors, number, &decode(sector, number, state.generation));
        }
        first += count;
    }
    Ok(())
}

fn take_in(state: &mut State, sectors: Sectors, number: usize, content: &Content) {
    let words = sectors.words();
    let range = number * words..((number + 1) * words).min(state.wanted.len());
    for (index, word) in range.enumerate() {
        let (set, durable) = match content {
            Content::Unknown => (u64::MAX, 0),
            Content::Empty => (0, 0),
            Content::Words(bits) => {
                let bits = bits.get(index).copied().unwrap_or(0);
                (bits, bits)
            }
        };
        state.wanted[word] |= set;
        state.durable[word] &= durable;
    }
}

/// How many regions a copy of a bitmap names; for the fuzzer.
#[doc(hidden)]
pub fn parse_copy(bytes: &[u8], large: bool, regions: u32, generation: u64) -> u64 {
    let sectors = Sectors {
        size: if large { LARGE } else { SMALL },
    };
    let mut state = State::blank(regions, generation);
    for (number, sector) in bytes.chunks(sectors.size).enumerate() {
        take_in(&mut state, sectors, number, &decode(sector, number, generation));
    }
    state.wanted.iter().map(|word| u64::from(word.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_what_was_written_or_nothing_or_everything() {
        for size in [SMALL, LARGE] {
            let mut sector = vec![7; size];
            let bits: Vec<u64> = (0..Sectors { size }.words() as u64).collect();
            encode(&mut sector, 3, 9, &bits);
            assert_eq!(decode(&sector, 3, 9), Content::Words(bits));
            assert_eq!(decode(&sector, 3, 10), Content::Empty);
            assert_eq!(decode(&sector, 4, 9), Content::Unknown);
            sector[size - 1] ^= 1;
            assert_eq!(decode(&sector, 3, 9), Content::Unknown);
            assert_eq!(decode(&sector[..7], 3, 9), Content::Unknown);
        }
        assert_eq!(decode(&[0; SMALL], 0, 0), Content::Unknown);
    }

    #[test]
    fn the_length_suffices_for_both_kinds_of_sectors() {
        for regions in [0, 1, 3968, 3969, 31744, 31745, 32640, 32641, 1 << 20, u32::MAX] {
            for size in [SMALL, LARGE] {
                let sectors = words(regions).div_ceil(Sectors { size }.words());
                assert!(length(regions) >= (sectors * size) as u64, "{regions} {size}");
            }
        }
    }
}
