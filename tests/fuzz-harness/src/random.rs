//! Pseudo-random inputs for the replay: the same in every run.

/// A generator of numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An input of up to `limit` bytes: short ones more often, and with many small numbers, which reach further.
    pub fn input(&mut self, limit: usize) -> Vec<u8> {
        let limit = limit >> (self.number() % 5);
        let length = self.number() as usize % (limit + 1);
        let mask = [0xff, 0xff, 0x3f, 0x0f][self.number() as usize % 4];
        (0..length)
            .map(|_| {
                let number = self.number();
                let mask = if number >> 32 & 3 == 0 { 0xff } else { mask };
                number as u8 & mask
            })
            .collect()
    }
}
