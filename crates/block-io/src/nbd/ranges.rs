//! Which bytes of a read have arrived: a structured reply may bring them in pieces and in any order, each byte once.

/// More separate pieces than this at a time have no sense.
const MOST_PIECES: usize = 1024;

/// Disjoint ranges of bytes, sorted, neighbours joined.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<(u32, u32)>);

impl Ranges {
    /// Adds `start..end`; `false` if some of it was there before, or there are too many pieces.
    pub(super) fn add(&mut self, start: u32, end: u32) -> bool {
        if start >= end {
            return start == end;
        }
        let at = self.0.partition_point(|piece| piece.0 < start);
        let after_previous = at > 0 && self.0[at - 1].1 == start;
        if (at > 0 && self.0[at - 1].1 > start) || self.0.get(at).is_some_and(|next| next.0 < end) {
            return false;
        }
        let before_next = self.0.get(at).is_some_and(|next| next.0 == end);
        match (after_previous, before_next) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = end,
            (false, true) => self.0[at].0 = start,
            (false, false) if self.0.len() >= MOST_PIECES => return false,
            (false, false) => self.0.insert(at, (start, end)),
        }
        true
    }

    /// Whether they are all of `0..length`.
    pub(super) fn cover(&self, length: u32) -> bool {
        self.0 == [(0, length)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_make_a_whole_and_none_comes_twice() {
        let mut ranges = Ranges::default();
        assert!(ranges.add(8, 12));
        assert!(ranges.add(0, 4));
        assert!(!ranges.cover(12));
        for twice in [(0, 1), (3, 5), (11, 13), (0, 16), (9, 10)] {
            assert!(!ranges.add(twice.0, twice.1));
        }
        assert!(ranges.add(4, 8));
        assert!(ranges.cover(12));
        assert!(!ranges.cover(13));
        assert!(ranges.add(12, 13));
        assert!(ranges.cover(13));
    }

    #[test]
    fn confetti_is_refused() {
        let mut ranges = Ranges::default();
        let accepted = (0..5000)
            .filter(|piece| ranges.add(piece * 2, piece * 2 + 1))
            .count();
        assert_eq!(accepted, MOST_PIECES);
    }
}
