//! Which ancestor answers for a cluster: so that a read costs the same below one layer and below thirty.
//!
//! One byte for each cluster that was asked for: the number of the only ancestor that has something of it, counted from the base.
//! Ancestors are frozen, so what was found stays true until there are others: a new layer on top makes the head an ancestor, and when a
//! layer is absorbed content moves between them. Then all is forgotten, and found anew when it is asked for.

use std::collections::BTreeMap;

/// Clusters of a page of the cache.
const CLUSTERS: usize = 256;
/// Not asked for yet.
const UNKNOWN: u8 = 0;
/// Several ancestors have something, or it is not worth knowing.
const MIXED: u8 = 255;
/// No ancestor has anything.
const NOBODY: u8 = 254;
/// Ancestors from the base on that have a number.
const NUMBERED: usize = 253;

/// Who answers for a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answers {
    /// All have to be asked.
    Unknown,
    /// All have to be asked, and that stays so.
    Mixed,
    /// Nobody: it is a hole all the way down.
    Nobody,
    /// Only this one, counted from the base, which is 0.
    Only(usize),
}

/// The cache of one open file.
#[derive(Debug, Default)]
pub(super) struct LayerCache {
    pages: BTreeMap<u64, Box<[u8; CLUSTERS]>>,
}

impl LayerCache {
    pub(super) fn get(&self, cluster: u64) -> Answers {
        let page = self.pages.get(&(cluster / CLUSTERS as u64));
        match page.map_or(UNKNOWN, |page| page[slot(cluster)]) {
            UNKNOWN => Answers::Unknown,
            MIXED => Answers::Mixed,
            NOBODY => Answers::Nobody,
            number => Answers::Only(usize::from(number) - 1),
        }
    }

    pub(super) fn put(&mut self, cluster: u64, answers: Answers) {
        let value = match answers {
            Answers::Unknown => UNKNOWN,
            Answers::Nobody => NOBODY,
            Answers::Only(number) if number < NUMBERED => u8::try_from(number + 1).unwrap_or(MIXED),
            Answers::Only(_) | Answers::Mixed => MIXED,
        };
        let page = self
            .pages
            .entry(cluster / CLUSTERS as u64)
            .or_insert_with(|| Box::new([UNKNOWN; CLUSTERS]));
        page[slot(cluster)] = value;
    }

    pub(super) fn clear(&mut self) {
        self.pages.clear();
    }
}

fn slot(cluster: u64) -> usize {
    usize::try_from(cluster % CLUSTERS as u64).unwrap_or(0)
}
