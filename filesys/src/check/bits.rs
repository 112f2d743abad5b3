//! Which clusters of a volume somebody has: a set of numbers, a bit each, and nothing for what is wholly in it or not at all.

use std::collections::BTreeMap;

use crate::tree::node::{BITS, WORDS};

/// 32,768 clusters, as many as a page of the volume's bitmap.
#[derive(Debug)]
enum Chunk {
    Full,
    Some(Box<[u64; WORDS]>),
}

/// A set of clusters. Takes at most 2 MiB for each TiB of the volume, and next to nothing for what was written in order.
#[derive(Debug, Default)]
pub(super) struct Bits {
    chunks: BTreeMap<u64, Chunk>,
}

impl Bits {
    /// Adds a range; tells of each run that was there already: first and count.
    pub(super) fn claim(&mut self, first: u64, count: u64, mut twice: impl FnMut(u64, u64)) {
        let end = first.saturating_add(count);
        let mut at = first;
        while at < end {
            let number = at / BITS;
            let stop = ((number + 1) * BITS).min(end);
            self.claim_in(number, at, stop, &mut twice);
            at = stop;
        }
    }

    fn claim_in(&mut self, number: u64, first: u64, end: u64, twice: &mut dyn FnMut(u64, u64)) {
        let whole = end - first == BITS;
        let chunk = match self.chunks.entry(number) {
            std::collections::btree_map::Entry::Vacant(place) => {
                if whole {
                    place.insert(Chunk::Full);
                    return;
                }
                place.insert(Chunk::Some(Box::new([0; WORDS])))
            }
            std::collections::btree_map::Entry::Occupied(place) => place.into_mut(),
        };
        let Chunk::Some(words) = chunk else {
            twice(first, end - first);
            return;
        };
        let mut at = first;
        while at < end {
            let stop = ((at / 64 + 1) * 64).min(end);
            let mask = mask(at, stop);
            let word = &mut words[index(at)];
            runs(*word & mask, at - at % 64, twice);
            *word |= mask;
            at = stop;
        }
        if words.iter().all(|word| *word == u64::MAX) {
            *chunk = Chunk::Full;
        }
    }

    /// 64 clusters.
    pub(super) fn word(&self, first: u64) -> u64 {
        match self.chunks.get(&(first / BITS)) {
            None => 0,
            Some(Chunk::Full) => u64::MAX,
            Some(Chunk::Some(words)) => words[index(first)],
        }
    }

    /// The first chunk that is not empty, from `number` on.
    pub(super) fn next_chunk(&self, number: u64) -> Option<u64> {
        self.chunks.range(number..).next().map(|(number, _)| *number)
    }
}

fn index(cluster: u64) -> usize {
    usize::try_from(cluster % BITS / 64).unwrap_or(0)
}

/// Bits `at..stop` of a word.
fn mask(at: u64, stop: u64) -> u64 {
    u64::MAX >> (64 - (stop - at)) << (at % 64)
}

/// Runs of set bits: first number and count.
pub(super) fn runs(word: u64, base: u64, each: &mut dyn FnMut(u64, u64)) {
    let mut rest = word;
    while rest != 0 {
        let skip = rest.trailing_zeros();
        let count = (rest >> skip).trailing_ones();
        each(base + u64::from(skip), count.into());
        rest &= !mask(u64::from(skip), u64::from(skip + count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_claimed_twice_is_told() {
        let mut bits = Bits::default();
        let mut twice = Vec::new();
        bits.claim(10, 100, |first, count| twice.push((first, count)));
        bits.claim(0, 12, |first, count| twice.push((first, count)));
        bits.claim(109, 2, |first, count| twice.push((first, count)));
        assert_eq!(twice, [(10, 2), (109, 1)]);
        assert_eq!(bits.word(0), u64::MAX);
        assert_eq!(bits.word(64), (1 << 47) - 1);
        bits.claim(BITS, 2 * BITS, |_, _| panic!("nobody has them"));
        bits.claim(BITS + 7, 1, |first, count| twice.push((first, count)));
        assert_eq!(twice.last(), Some(&(BITS + 7, 1)));
        assert_eq!((bits.next_chunk(1), bits.next_chunk(3)), (Some(1), None));
    }

    #[test]
    fn runs_of_a_word() {
        let mut found = Vec::new();
        runs(u64::MAX, 64, &mut |first, count| found.push((first, count)));
        runs(0b1101, 0, &mut |first, count| found.push((first, count)));
        runs(1 << 63, 0, &mut |first, count| found.push((first, count)));
        assert_eq!(found, [(64, 64), (0, 1), (2, 2), (63, 1)]);
    }
}
