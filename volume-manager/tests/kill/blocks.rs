//! Sectors that say which write they are from, and the writes themselves: both follow from a seed and the write's number.

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;
/// Sectors of the volume.
pub(crate) const SECTORS: u64 = (2 << 20) / SECTOR as u64;

/// A number that is as good as random.
pub(crate) fn mix(seed: u64, number: u64) -> u64 {
    let mut value = seed
        ^ number
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(0x1234_5678_9abc_def1);
    for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        value = (value ^ (value >> 29)).wrapping_mul(factor);
    }
    value ^ (value >> 32)
}

/// A write: its number is the child's generation (from 1 on) and an index. Later ones have greater numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) number: u64,
    pub(crate) start: u64,
    pub(crate) count: u64,
    pub(crate) durable: bool,
}

impl Write {
    pub(crate) fn new(seed: u64, generation: u32, index: u32, largest: u64) -> Self {
        let number = u64::from(generation) << 32 | u64::from(index);
        let draw = |what: u64, below: u64| mix(seed ^ what << 48, number) % below;
        // Mostly small, some over several stripe units.
        let largest = if draw(1, 8) == 0 { largest } else { largest.min(16) };
        let count = 1 + draw(2, largest);
        let start = draw(3, SECTORS - count + 1);
        // Most guests write whole pages.
        let (start, count) = if draw(4, 4) > 0 {
            let start = start / 8 * 8;
            (
                start,
                count.next_multiple_of(8).min(SECTORS - start).min(largest.max(8)),
            )
        } else {
            (start, count)
        };
        Self {
            number,
            start,
            count,
            durable: draw(5, 16) == 0,
        }
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.count
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Makes `sector` number `place` of the volume one of write `number`.
pub(crate) fn fill(sector: &mut [u8], seed: u64, number: u64, place: u64) {
    for (index, word) in sector.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => number,
            1 => place,
            index => mix(seed ^ number, place * 64 + index as u64),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The number of the write that a sector is from, 0 if it was never written; none if it is not whole.
pub(crate) fn number_of(sector: &[u8], seed: u64, place: u64) -> Option<u64> {
    if sector.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let number = u64::from_le_bytes(sector[..8].try_into().unwrap());
    let mut expected = [0; SECTOR];
    fill(&mut expected, seed, number, place);
    (sector == expected).then_some(number)
}
