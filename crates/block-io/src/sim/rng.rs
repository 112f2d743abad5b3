//! The one source of randomness: a generator whose whole state is its seed (SplitMix64). And hashes, the same in every run.

use std::hash::{DefaultHasher, Hash, Hasher};

/// A small, fast, seeded generator. Not for secrets.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }

    /// An index below `length`; 0 if that is 0.
    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    /// True `numerator` times in `denominator`.
    pub fn chance(&mut self, numerator: u64, denominator: u64) -> bool {
        self.below(denominator) < numerator
    }

    /// One of `choices`.
    pub fn choose<'a, T>(&mut self, choices: &'a [T]) -> Option<&'a T> {
        choices.get(self.index(choices.len()))
    }

    /// An independent generator.
    pub fn split(&mut self) -> Self {
        Self(self.next_u64())
    }

    /// Fills `target` with random bytes.
    pub fn fill(&mut self, target: &mut [u8]) {
        for chunk in target.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// Spreads every bit of `value` over the result.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A 64-bit hash of `bytes`, the same on every machine. Four words at once, since it is asked for everything that is read.
pub(super) fn hash_bytes(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;
    let add = |hash: u64, word: &[u8; 8]| {
        let hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR);
        hash ^ (hash >> 32)
    };
    let mut lanes = [1, 2, 3, 4_u64].map(mix);
    let (words, rest) = bytes.as_chunks::<8>();
    let (blocks, words) = words.as_chunks::<4>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = add(*lane, word);
        }
    }
    let start = 0xcbf2_9ce4_8422_2325 ^ (bytes.len() as u64);
    let mut hash = lanes.iter().fold(start, |hash, lane| mix(hash ^ lane));
    for word in words {
        hash = add(hash, word);
    }
    for byte in rest {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

/// A hash of `value`, equal for equal values, in any process: for [`Scenario::fingerprint`](super::Scenario::fingerprint).
pub fn fingerprint(value: &impl Hash) -> u64 {
    // `new` always takes the same keys.
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
