//! Leaves of maps in memory: the 256 entries of a page in fewer bytes, where they are alike.
//!
//! On media an entry has 16 bytes. Most of that says the same for all entries of a page: they are on one volume, with one set of flags, and
//! cluster *i* of the page is mostly at place *i* of a group (`file/allocate.rs`). What differs is which sub-clusters are valid.
//!
//! | form | what fits | bytes of an entry |
//! |---|---|---|
//! | row | places in order, holes and zeroes among them | 4 |
//! | spread | places all over one volume, holes and zeroes among them | 8 |
//! | full | anything | 16 |
//!
//! A leaf takes the next form when an entry does not fit, and the smallest one when it is loaded or made as a whole.

use super::node::FANOUT;
use crate::entry::Entry;

/// No place, in [`Spread`].
const NOWHERE: u32 = u32::MAX;

/// Entry `i` has place `i` of a run, if it has one: with valid sub-clusters, or if places are kept.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Entry 0, if it has a place, without sub-clusters; a hole while no entry has a place.
    base: Entry,
    subs: [u32; FANOUT],
}

/// All places have the same volume, flags, and upper bits of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct Spread {
    /// An entry without sub-clusters, with 0 for the lower 32 bits of its cluster.
    base: Entry,
    low: [u32; FANOUT],
    subs: [u32; FANOUT],
}

/// The entries of a page of a map.
#[derive(Debug, Clone)]
pub(crate) enum MapLeaf {
    Row(Box<Row>),
    Spread(Box<Spread>),
    Full(Box<[Entry; FANOUT]>),
}

impl Row {
    fn new() -> Self {
        Self {
            base: Entry::HOLE,
            subs: [0; FANOUT],
        }
    }

    fn get(&self, index: usize) -> Entry {
        let subs = self.subs[index];
        if Entry::has_valid(subs) || self.base.is_kept() {
            self.base.nth(index as u64).with_all_subs(subs)
        } else {
            Entry::HOLE.with_all_subs(subs)
        }
    }

    /// False: it does not fit.
    fn set(&mut self, index: usize, entry: Entry) -> bool {
        let subs = entry.all_subs();
        if entry.location().is_none() {
            if self.base.is_kept() {
                return false;
            }
        } else {
            let base = entry.with_all_subs(0).nth_before(index as u64);
            if base != self.base {
                // The others would get places.
                if !self.base.is_hole() || entry.is_kept() {
                    return false;
                }
                self.base = base;
            }
            if !Entry::has_valid(subs) && !entry.is_kept() {
                return false;
            }
        }
        self.subs[index] = subs;
        true
    }

    fn of(entries: &[Entry; FANOUT]) -> Option<Self> {
        let mut row = Self::new();
        // Where places are kept, all have one.
        if entries[0].is_kept() {
            row.base = entries[0].with_all_subs(0);
        }
        (0..)
            .zip(entries)
            .all(|(index, entry)| row.set(index, *entry))
            .then_some(row)
    }
}

impl Spread {
    fn get(&self, index: usize) -> Entry {
        let subs = self.subs[index];
        match self.low[index] {
            NOWHERE => Entry::HOLE.with_all_subs(subs),
            low => self.base.with_low_cluster(low).with_all_subs(subs),
        }
    }

    /// False: it does not fit.
    fn set(&mut self, index: usize, entry: Entry) -> bool {
        let low = if entry.location().is_some() {
            let base = entry.with_all_subs(0).with_low_cluster(0);
            if base != self.base {
                if !self.base.is_hole() {
                    return false;
                }
                self.base = base;
            }
            entry.low_cluster()
        } else {
            NOWHERE
        };
        if low == NOWHERE && entry.location().is_some() {
            return false;
        }
        self.low[index] = low;
        self.subs[index] = entry.all_subs();
        true
    }

    fn of(entries: &[Entry; FANOUT]) -> Option<Self> {
        let mut spread = Self {
            base: Entry::HOLE,
            low: [NOWHERE; FANOUT],
            subs: [0; FANOUT],
        };
        (0..)
            .zip(entries)
            .all(|(index, entry)| spread.set(index, *entry))
            .then_some(spread)
    }
}

impl MapLeaf {
    /// Holes.
    pub(crate) fn empty() -> Self {
        Self::Row(Box::new(Row::new()))
    }

    /// In the smallest form.
    pub(crate) fn of(entries: &[Entry; FANOUT]) -> Self {
        if let Some(row) = Row::of(entries) {
            return Self::Row(Box::new(row));
        }
        match Spread::of(entries) {
            Some(spread) => Self::Spread(Box::new(spread)),
            None => Self::Full(Box::new(*entries)),
        }
    }

    /// Entry number `index` of the page, below [`FANOUT`].
    pub(crate) fn get(&self, index: usize) -> Entry {
        match self {
            Self::Row(row) => row.get(index),
            Self::Spread(spread) => spread.get(index),
            Self::Full(entries) => entries[index],
        }
    }

    pub(crate) fn set(&mut self, index: usize, entry: Entry) {
        let fits = match self {
            Self::Row(row) => row.set(index, entry),
            Self::Spread(spread) => spread.set(index, entry),
            Self::Full(entries) => {
                entries[index] = entry;
                true
            }
        };
        if !fits {
            let mut entries = self.entries();
            entries[index] = entry;
            *self = Self::of(&entries);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Entry> {
        (0..FANOUT).map(|index| self.get(index))
    }

    /// The first entry with a place, and its number. What writers ask for each new place, so not entry by entry.
    pub(crate) fn first_placed(&self) -> Option<(usize, Entry)> {
        let index = match self {
            Self::Row(row) if row.base.is_hole() => None,
            Self::Row(row) if row.base.is_kept() => Some(0),
            Self::Row(row) => position(&row.subs, 0, |all, subs| all | subs, Entry::has_valid),
            Self::Spread(spread) => {
                position(&spread.low, u32::MAX, |all, low| all & low, |low| low != NOWHERE)
            }
            Self::Full(entries) => entries.iter().position(|entry| entry.location().is_some()),
        }?;
        Some((index, self.get(index)))
    }

    /// Whether all entries have the same sub-clusters; true of a leaf of full entries, where it is not worth a look.
    pub(crate) fn has_equal_subs(&self) -> bool {
        let subs = match self {
            Self::Row(row) => &row.subs,
            Self::Spread(spread) => &spread.subs,
            Self::Full(_) => return true,
        };
        let first = subs[0];
        let differ = |all, subs| all | (subs ^ first);
        position(subs, 0, differ, |differ| differ != 0).is_none()
    }

    /// As on media.
    pub(crate) fn entries(&self) -> [Entry; FANOUT] {
        match self {
            Self::Full(entries) => **entries,
            packed => std::array::from_fn(|index| packed.get(index)),
        }
    }
}

/// The first of `words` that is `wanted`, looked for in many at once: `join` makes one of two words that is wanted if one of them is, beginning
/// with `none`.
fn position(
    words: &[u32; FANOUT],
    none: u32,
    join: impl Fn(u32, u32) -> u32,
    wanted: impl Fn(u32) -> bool,
) -> Option<usize> {
    const MANY: usize = 16;
    let chunk = words
        .chunks_exact(MANY)
        .position(|words| wanted(words.iter().fold(none, |all, word| join(all, *word))))?;
    let first = chunk * MANY;
    let found = words[first..first + MANY]
        .iter()
        .position(|word| wanted(join(none, *word)))?;
    Some(first + found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::{Location, VolumeIndex};

    fn place(volume: u16, cluster: u64) -> Entry {
        Entry::at(Location {
            volume: VolumeIndex(volume),
            cluster,
        })
    }

    fn form(leaf: &MapLeaf) -> &'static str {
        match leaf {
            MapLeaf::Row(_) => "row",
            MapLeaf::Spread(_) => "spread",
            MapLeaf::Full(_) => "full",
        }
    }

    #[test]
    fn first_writes_to_a_group_and_discards_stay_a_row() {
        let mut leaf = MapLeaf::empty();
        for index in [255, 0, 77] {
            leaf.set(
                index,
                place(3, 1000 + index as u64).with_subs(1 << (index % 16), 0),
            );
        }
        leaf.set(9, Entry::HOLE.with_subs(0, 0xf0));
        leaf.set(77, Entry::HOLE);
        assert_eq!(form(&leaf), "row");
        assert_eq!(leaf.get(255), place(3, 1255).with_subs(1 << 15, 0));
        assert_eq!(leaf.get(9), Entry::HOLE.with_subs(0, 0xf0));
        assert_eq!((leaf.get(77), leaf.get(1)), (Entry::HOLE, Entry::HOLE));
    }

    #[test]
    fn what_does_not_fit_takes_the_next_form_and_loses_nothing() {
        let mut leaf = MapLeaf::empty();
        leaf.set(4, place(1, 104).with_subs(1, 0));
        leaf.set(5, place(1, 9).with_subs(2, 4));
        assert_eq!(form(&leaf), "spread");
        leaf.set(6, place(2, 9).with_subs(2, 4));
        assert_eq!(form(&leaf), "full");
        assert_eq!(leaf.get(4), place(1, 104).with_subs(1, 0));
        assert_eq!(leaf.get(5), place(1, 9).with_subs(2, 4));
        assert_eq!(leaf.get(6), place(2, 9).with_subs(2, 4));
    }

    #[test]
    fn kept_places_are_a_row_with_nothing_valid() {
        let entries = std::array::from_fn(|index| {
            place(1, 50 + index as u64)
                .with_kept(true)
                .with_subs(u16::from(index == 3), 0)
        });
        let leaf = MapLeaf::of(&entries);
        assert_eq!(form(&leaf), "row");
        assert_eq!(leaf.entries(), entries);
    }

    /// Entries as maps have them, mostly in order, seldom odd.
    fn entry() -> impl Strategy<Value = (usize, Entry)> {
        let subs = (any::<u16>(), any::<u16>()).prop_map(|(valid, zero)| (valid, zero & !valid));
        (0..FANOUT, 0..100_u8, subs, any::<[bool; 2]>()).prop_map(
            |(index, kind, (valid, zero), [kept, checked])| {
                let entry = match kind {
                    0..60 => place(1, 4096 + index as u64).with_subs(valid, zero),
                    60..75 => Entry::HOLE.with_subs(0, zero),
                    75..85 => place(1, u64::from(valid)).with_subs(valid, zero),
                    85..90 => place(1, u64::from(u32::MAX)).with_subs(valid, zero),
                    90..94 => place(1, index as u64 % 3).with_kept(kept).with_checked(checked),
                    94..97 => place(2, (1 << 40) - 1).with_subs(valid, zero),
                    _ => Entry::HOLE,
                };
                (index, entry)
            },
        )
    }

    proptest! {
        #[test]
        fn a_leaf_is_what_an_array_is(changes in prop::collection::vec(entry(), 0..400), kept: bool) {
            let mut array = [Entry::HOLE; FANOUT];
            if kept {
                array = std::array::from_fn(|index| place(1, 4096 + index as u64).with_kept(true));
            }
            let mut leaf = MapLeaf::of(&array);
            for (index, entry) in changes {
                let entry = if kept && entry.location().is_some() { entry.with_kept(true) } else { entry };
                array[index] = entry;
                leaf.set(index, entry);
                prop_assert_eq!(leaf.get(index), entry);
            }
            prop_assert_eq!(leaf.entries(), array);
            prop_assert_eq!(MapLeaf::of(&array).entries(), array);
            prop_assert!(leaf.iter().eq(array));
            let placed = array.iter().position(|entry| entry.location().is_some());
            prop_assert_eq!(leaf.first_placed(), placed.map(|index| (index, array[index])));
            let equal = array.iter().all(|entry| entry.all_subs() == array[0].all_subs());
            prop_assert!(leaf.has_equal_subs() == equal || form(&leaf) == "full");
        }
    }
}
