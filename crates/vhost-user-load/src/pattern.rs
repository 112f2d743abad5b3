//! What is written. In verify mode each sector says whose it is and of which write.

use std::fmt;

use anyhow::{Result, bail, ensure};

/// Bytes of a sector; what a device writes at once or not at all.
const SECTOR: usize = 512;
/// Bytes of a page, which memory that compresses looks at as one.
const PAGE: usize = 4096;
const MAGIC: u64 = 0x736d_7376_6c6f_6164;

/// Which run wrote a block: what earlier ones left on the disk is not taken for this one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run(u64);

impl Run {
    /// The run with this number.
    pub fn new(number: u64) -> Self {
        Self(MAGIC ^ mix(number))
    }

    /// 16 bits of it, not all of them zero: no page is one of zeros.
    fn short(self) -> u64 {
        (self.0 & 0xffff).max(1)
    }
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

/// What the data are like, for disks in memory that compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Data {
    /// Nothing that compresses.
    #[default]
    Noise,
    /// In each page (of 4 KiB) one word of 8 bytes over and over, another one in each page: zram keeps the word, and neither
    /// compresses nor allocates.
    Words,
}

impl fmt::Display for Data {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Noise => "noise",
            Self::Words => "words",
        })
    }
}

/// Fills a block with what generation `generation` of block `number` contains.
pub fn fill(block: &mut [u8], data: Data, run: Run, number: u64, generation: u64) {
    let pages = block.len().div_ceil(PAGE);
    for (sector, bytes) in block.chunks_mut(SECTOR).enumerate() {
        let stamp = Stamp {
            number,
            sector,
            generation,
        };
        stamp.fill(bytes, data, run, pages);
    }
}

/// The generations that a block may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expected {
    /// Of the last write that was acknowledged; 0 if there was none.
    pub acknowledged: u64,
    /// Of the last write that was begun.
    pub begun: u64,
}

/// Checks what was read from block `number`.
///
/// # Errors
/// A write was lost, torn, or went to the wrong place.
pub fn check(block: &[u8], data: Data, run: Run, number: u64, expected: Expected) -> Result<()> {
    let pages = block.len().div_ceil(PAGE);
    let mut wanted = [0; SECTOR];
    let mut first = None;
    for (sector, bytes) in block.chunks(SECTOR).enumerate() {
        let stamp = match Stamp::read(bytes, data, run, pages, sector, expected) {
            Some(stamp) => stamp,
            // Never written: anything may be there.
            None if expected.acknowledged == 0 => continue,
            None => bail!("block {number}, sector {sector}: not what was written there"),
        };
        ensure!(
            stamp.number == number && stamp.sector == sector,
            "block {number}, sector {sector}: holds sector {} of block {}",
            stamp.sector,
            stamp.number
        );
        let generation = stamp.generation;
        ensure!(
            generation >= expected.acknowledged,
            "block {number}, sector {sector}: lost write: generation {generation}, acknowledged was {}",
            expected.acknowledged
        );
        ensure!(
            generation <= expected.begun,
            "block {number}, sector {sector}: generation {generation} was never written"
        );
        ensure!(
            *first.get_or_insert(generation) == generation || expected.begun != expected.acknowledged,
            "block {number}, sector {sector}: torn write: generations {first:?} and {generation}"
        );
        stamp.fill(&mut wanted[..bytes.len()], data, run, pages);
        ensure!(
            bytes == &wanted[..bytes.len()],
            "block {number}, sector {sector}: damaged"
        );
    }
    Ok(())
}

/// What a sector says of itself.
struct Stamp {
    number: u64,
    sector: usize,
    generation: u64,
}

impl Stamp {
    /// What is written in a sector of a block of so many pages; none if it is not of this run.
    fn read(
        bytes: &[u8],
        data: Data,
        run: Run,
        pages: usize,
        sector: usize,
        expected: Expected,
    ) -> Option<Self> {
        let word = |index: usize| {
            bytes
                .get(index * 8..)
                .and_then(|rest| rest.first_chunk::<8>())
                .map_or(0, |word| u64::from_le_bytes(*word))
        };
        match data {
            Data::Noise => (word(0) == run.0).then(|| Self {
                number: word(1),
                sector: usize::try_from(word(3)).unwrap_or(usize::MAX),
                generation: word(2),
            }),
            Data::Words => (word(0) >> 48 == run.short()).then(|| {
                let page = word(0) & PAGES;
                // Only its end is there: the generation is taken to be the youngest that ends so.
                let older = expected.begun.wrapping_sub(word(0) >> 32) & GENERATIONS;
                let within = usize::try_from(page % pages as u64).unwrap_or(usize::MAX);
                Self {
                    number: page / pages as u64,
                    sector: within * (PAGE / SECTOR) + sector % (PAGE / SECTOR),
                    generation: expected.begun.wrapping_sub(older),
                }
            }),
        }
    }

    fn fill(&self, bytes: &mut [u8], data: Data, run: Run, pages: usize) {
        let words = bytes.chunks_exact_mut(8);
        match data {
            Data::Noise => {
                let head = [run.0, self.number, self.generation, self.sector as u64];
                let seed = mix(self.number ^ mix(self.generation ^ mix(self.sector as u64)));
                for (index, word) in words.enumerate() {
                    let value = head
                        .get(index)
                        .copied()
                        .unwrap_or_else(|| seed.wrapping_mul(2 * index as u64 + 1));
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            Data::Words => {
                let page = self.number * pages as u64 + (self.sector / (PAGE / SECTOR)) as u64;
                let value = run.short() << 48 | (self.generation & GENERATIONS) << 32 | page & PAGES;
                words.for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
            }
        }
    }
}

/// The parts of a page's only word: the run above the end of the generation, above the end of the page's number.
const GENERATIONS: u64 = 0xffff;
const PAGES: u64 = 0xffff_ffff;

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(acknowledged: u64, begun: u64) -> Expected {
        Expected { acknowledged, begun }
    }

    fn filled(data: Data, number: u64, generation: u64) -> Vec<u8> {
        let mut block = vec![0; 8192];
        fill(&mut block, data, Run::new(1), number, generation);
        block
    }

    #[test]
    fn lost_torn_misplaced_and_damaged_blocks_are_found() {
        for data in [Data::Noise, Data::Words] {
            let refuses = |block: &[u8], number, acknowledged, begun, reason: &str| {
                let expected = expected(acknowledged, begun);
                let error = check(block, data, Run::new(1), number, expected).unwrap_err();
                assert!(error.to_string().contains(reason), "{data}: {error}");
            };
            let mut block = filled(data, 7, 3);
            check(&block, data, Run::new(1), 7, expected(3, 3)).unwrap();
            refuses(&block, 8, 3, 3, "holds sector 0 of block 7");
            let swapped = [&block[4096..], &block[..4096]].concat();
            refuses(&swapped, 7, 3, 3, "sector 0: holds sector 8 of block 7");
            let newer = filled(data, 7, 4);
            let torn = [&newer[..2048], &block[2048..]].concat();
            refuses(&block, 7, 4, 4, "lost write");
            refuses(&torn, 7, 4, 4, "lost write");
            check(&torn, data, Run::new(1), 7, expected(3, 4)).unwrap();
            // Of a write that was never acknowledged, nothing need be there; what another run left does not count.
            check(&newer, data, Run::new(2), 7, Expected::default()).unwrap();
            block[1000] ^= 1;
            refuses(&block, 7, 3, 3, "damaged");
            refuses(&vec![0; 8192], 7, 3, 3, "not what was written");
        }
    }

    #[test]
    fn a_page_of_words_is_one_word() {
        let mut seen = std::collections::HashSet::new();
        for number in 0..8 {
            for page in filled(Data::Words, number, 70_000).chunks(4096) {
                let word = &page[..8];
                assert!(page.chunks(8).all(|other| other == word) && word != [0; 8]);
                assert!(seen.insert(word.to_vec()));
            }
        }
        // The youngest generation that ends so.
        let block = filled(Data::Words, 3, 70_000);
        check(&block, Data::Words, Run::new(1), 3, expected(70_000, 70_001)).unwrap();
    }
}
