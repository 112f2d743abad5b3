//! What blocks contain in verify mode: each sector says whose it is and of which write.

use anyhow::{Result, ensure};

/// Bytes of a sector; what a device writes at once or not at all.
const SECTOR: usize = 512;
const MAGIC: u64 = 0x736d_7376_6c6f_6164;

/// Which run wrote a block: what earlier ones left on the disk is not taken for this one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run(u64);

impl Run {
    /// The run with this number.
    pub fn new(number: u64) -> Self {
        Self(MAGIC ^ mix(number))
    }
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

/// Fills a block with what generation `generation` of block `number` contains.
pub fn fill(block: &mut [u8], run: Run, number: u64, generation: u64) {
    for (sector, bytes) in block.chunks_mut(SECTOR).enumerate() {
        fill_sector(bytes, run, number, generation, sector);
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
pub fn check(block: &[u8], run: Run, number: u64, expected: Expected) -> Result<()> {
    let mut wanted = [0; SECTOR];
    let mut first = None;
    for (sector, bytes) in block.chunks(SECTOR).enumerate() {
        let word = |index: usize| {
            bytes
                .get(index * 8..)
                .and_then(|rest| rest.first_chunk::<8>())
                .map_or(0, |word| u64::from_le_bytes(*word))
        };
        if expected.acknowledged == 0 && word(0) != run.0 {
            // Never written: anything may be there.
            continue;
        }
        let generation = word(2);
        ensure!(
            word(0) == run.0,
            "block {number}, sector {sector}: not what was written there"
        );
        ensure!(
            word(1) == number && word(3) == sector as u64,
            "block {number}, sector {sector}: holds sector {} of block {}",
            word(3),
            word(1)
        );
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
        fill_sector(&mut wanted, run, number, generation, sector);
        ensure!(
            bytes == &wanted[..bytes.len()],
            "block {number}, sector {sector}: damaged"
        );
    }
    Ok(())
}

fn fill_sector(bytes: &mut [u8], run: Run, number: u64, generation: u64, sector: usize) {
    let head = [run.0, number, generation, sector as u64];
    let seed = mix(number ^ mix(generation ^ mix(sector as u64)));
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = head
            .get(index)
            .copied()
            .unwrap_or_else(|| seed.wrapping_mul(2 * index as u64 + 1));
        word.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuses(block: &[u8], number: u64, acknowledged: u64, begun: u64, reason: &str) {
        let error = check(block, Run::new(1), number, Expected { acknowledged, begun }).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }

    #[test]
    fn lost_torn_misplaced_and_damaged_blocks_are_found() {
        let mut block = vec![0; 4096];
        fill(&mut block, Run::new(1), 7, 3);
        let expected = Expected {
            acknowledged: 3,
            begun: 3,
        };
        check(&block, Run::new(1), 7, expected).unwrap();
        refuses(&block, 7, 4, 4, "lost write");
        refuses(&block, 8, 3, 3, "holds sector 0 of block 7");
        let mut newer = vec![0; 4096];
        fill(&mut newer, Run::new(1), 7, 4);
        let torn = [&newer[..2048], &block[2048..]].concat();
        refuses(&torn, 7, 4, 4, "lost write");
        let expected = Expected {
            acknowledged: 3,
            begun: 4,
        };
        check(&torn, Run::new(1), 7, expected).unwrap();
        // Of a write that was never acknowledged, nothing need be there; what another run left does not count.
        check(&newer, Run::new(2), 7, Expected::default()).unwrap();
        block[1000] ^= 1;
        refuses(&block, 7, 3, 3, "damaged");
        refuses(&vec![0; 4096], 7, 3, 3, "not what was written");
    }
}
