//! Where the ancestors of an open file have what the file itself has not: so that a read costs the same below one layer and below thirty.
//!
//! For each cluster that was asked for: the places of all ancestors together, as if they were one file. Mostly that is one place.
//!
//! ```text
//!   layer 3   . . d .                        a d c b      the places of d, of b, …: each with the sub-clusters
//!   layer 2   . b . b          ─────►                     that are to be read there
//!   layer 1   a b c d
//! ```
//!
//! Ancestors are frozen, so what was found stays true until there are others, or until what they have is moved: absorbed, or relocated. Then
//! all is forgotten, and found anew when it is asked for ([`File::chain`](super::File::chain)).

use crate::entry::Entry;

/// Clusters of a page of the cache, pages of a part of it.
const FANOUT: u64 = 256;
/// Bytes of the cache of one open file, at most. When there are more, all is forgotten: 80 GiB of a disk have room.
const MOST: usize = 32 << 20;

#[derive(Debug, Default)]
enum Slot {
    /// Not asked for yet.
    #[default]
    Unknown,
    /// At most one place.
    One(Entry),
    /// Several, with different sub-clusters.
    Many(Box<[Entry]>),
}

type Page = [Slot; 256];
type Part = [Option<Box<Page>>; 256];

/// The cache of one open file.
#[derive(Debug, Default)]
pub(super) struct LayerCache {
    parts: Vec<Option<Box<Part>>>,
    bytes: usize,
}

impl LayerCache {
    /// What the ancestors have of a cluster: places, each with the sub-clusters that are to be read there as valid. What is nowhere valid
    /// is zero.
    pub(super) fn get(&self, cluster: u64) -> Option<&[Entry]> {
        let part = self.parts.get(index(cluster / FANOUT / FANOUT))?.as_ref()?;
        let page = part[slot(cluster / FANOUT)].as_ref()?;
        match &page[slot(cluster)] {
            Slot::Unknown => None,
            Slot::One(entry) => Some(std::slice::from_ref(entry)),
            Slot::Many(entries) => Some(entries),
        }
    }

    pub(super) fn put(&mut self, cluster: u64, found: Vec<Entry>) {
        if self.bytes > MOST {
            block_io::cover!("filesys: the cache of layers is full");
            self.clear();
        }
        let number = index(cluster / FANOUT / FANOUT);
        if self.parts.len() <= number {
            self.parts.resize_with(number + 1, || None);
        }
        let part = self.parts[number].get_or_insert_with(|| {
            self.bytes += size_of::<Part>();
            Box::new([const { None }; 256])
        });
        let page = part[slot(cluster / FANOUT)].get_or_insert_with(|| {
            self.bytes += size_of::<Page>();
            Box::new([const { Slot::Unknown }; 256])
        });
        page[slot(cluster)] = match found.as_slice() {
            [] => Slot::One(Entry::HOLE),
            [only] => Slot::One(*only),
            several => {
                self.bytes += size_of_val(several);
                Slot::Many(found.into())
            }
        };
    }

    pub(super) fn clear(&mut self) {
        self.parts.clear();
        self.bytes = 0;
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn slot(number: u64) -> usize {
    index(number % FANOUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Location, SubMask, VolumeIndex};

    fn entry(cluster: u64, mask: u16) -> Entry {
        let volume = VolumeIndex(1);
        Entry::at(Location { volume, cluster }).with_valid(SubMask(mask))
    }

    #[test]
    fn what_was_found_is_known_until_it_is_forgotten() {
        let mut cache = LayerCache::default();
        let far = (1 << 30) - 1;
        assert_eq!(cache.get(far), None);
        cache.put(far, vec![entry(3, 1), entry(4, 2)]);
        cache.put(0, vec![entry(5, 7)]);
        cache.put(1, Vec::new());
        assert_eq!(cache.get(far), Some([entry(3, 1), entry(4, 2)].as_slice()));
        assert_eq!(cache.get(0), Some([entry(5, 7)].as_slice()));
        assert_eq!(cache.get(1), Some([Entry::HOLE].as_slice()));
        assert_eq!(cache.get(2), None);
        cache.clear();
        assert_eq!(cache.get(0), None);
    }

    #[test]
    fn it_never_takes_much_more_than_its_share() {
        let mut cache = LayerCache::default();
        for page in 0..8000 {
            cache.put(page * FANOUT, vec![entry(page, 1)]);
            assert!(cache.bytes <= MOST + (1 << 20));
        }
        assert_eq!(cache.get(0), None);
        assert!(cache.get(7999 * FANOUT).is_some());
    }
}
