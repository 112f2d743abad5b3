//! A volume of the file system: which of its clusters are in use, and which of them to take next.
//!
//! ```text
//!   bitmap    set: a map has this cluster.             Changed only by records, so the same after a replay.
//!   busy      in memory: reserved for data that are being written; or free again, but a reader may still be there, or
//!             the record that freed it is not durable.
//!   group     256 clusters, 16 MiB: what one page of a file's map covers.
//! ```
//!
//! A file's clusters are taken so that cluster `i` of a page of its map lies at place `i` of a group, if a whole group is free when the page
//! gets its first cluster. So a file that is written in whatever order ends up in order on the volume, and its map becomes runs. Nobody
//! owns a group: when no group is free, single clusters of all are taken.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use block_io::{IoCause, IoError, Operation};
use volume_manager::Usage;

use crate::record::VolumeRecord;
use crate::tree::codec::Kind;
use crate::tree::node::{BITS, Body, Child, Missing, Pages};
use crate::tree::radix::{Look, Tree, View};
use crate::units::{CLUSTER, Location, VolumeIndex};

/// Clusters of a group.
pub(crate) const GROUP: u64 = 256;
const GROUP_WORDS: usize = 4;
const GROUPS_PER_PAGE: u64 = BITS / GROUP;

/// A volume.
#[derive(Debug)]
pub(crate) struct VolumeCore<V> {
    pub(crate) index: VolumeIndex,
    pub(crate) device: Rc<V>,
    record: RefCell<VolumeRecord>,
    /// One bit for each cluster.
    pub(crate) bitmap: Tree,
    /// CRC-32C of each sub-cluster of files with checksums.
    pub(crate) sums: Tree,
    /// Clear bits of each page of the bitmap.
    free: RefCell<Vec<u32>>,
    total_free: Cell<u64>,
    /// By group.
    busy: RefCell<BTreeMap<u64, [u64; GROUP_WORDS]>>,
    total_busy: Cell<u64>,
    /// Where the search for a free group goes on.
    next_group: Cell<u64>,
    /// No group is free until so many clusters more are.
    no_group_until: Cell<u64>,
    /// Where the search for any free cluster goes on.
    next_cluster: Cell<u64>,
    /// Writes that completed.
    pub(crate) written: Cell<u64>,
    /// Those of them that a flush has made durable.
    pub(crate) flushed: Cell<u64>,
    /// A flush is under way that covers so many writes.
    pub(crate) flushing: Cell<Option<u64>>,
    /// A flush failed, so nobody knows what is on it: it takes no more writes.
    pub(crate) failed: Cell<bool>,
    /// What was said about the space last.
    pub(crate) is_low: Cell<bool>,
}

impl<V> VolumeCore<V> {
    pub(crate) fn new(record: VolumeRecord, device: Rc<V>, bitmap: Tree, sums: Tree) -> Self {
        Self {
            index: record.index,
            device,
            record: RefCell::new(record),
            bitmap,
            sums,
            free: RefCell::default(),
            total_free: Cell::new(0),
            busy: RefCell::default(),
            total_busy: Cell::new(0),
            next_group: Cell::new(0),
            no_group_until: Cell::new(0),
            next_cluster: Cell::new(0),
            written: Cell::new(0),
            flushed: Cell::new(0),
            flushing: Cell::new(None),
            failed: Cell::new(false),
            is_low: Cell::new(false),
        }
    }

    /// A volume without data.
    pub(crate) fn blank(record: VolumeRecord, device: Rc<V>) -> Self {
        let volume = Self::new(record, device, Tree::new(Kind::Bits), Tree::new(Kind::Sums));
        // Without pages nothing can be missing.
        let counted = volume.count_free();
        debug_assert!(counted.is_ok());
        volume
    }

    pub(crate) fn record(&self) -> VolumeRecord {
        self.record.borrow().clone()
    }

    /// Grows it, renames it, lets it drain.
    pub(crate) fn set_record(&self, record: VolumeRecord) -> Result<(), Missing> {
        let old = self.record.replace(record);
        if let Err(missing) = self.count_free() {
            self.record.replace(old);
            return Err(missing);
        }
        self.no_group_until.set(0);
        Ok(())
    }

    /// An error if it takes no more writes.
    pub(crate) fn check_works(&self) -> Result<(), IoError> {
        if self.failed.get() {
            let name = self.record().name.into();
            return Err(IoError::new(
                &name,
                Operation::Flush,
                0,
                0,
                IoCause::EarlierFlushFailed,
            ));
        }
        Ok(())
    }

    /// Clusters.
    pub(crate) fn clusters(&self) -> u64 {
        self.record.borrow().clusters
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.record.borrow().draining
    }

    /// Clusters that could be taken now.
    pub(crate) fn available(&self) -> u64 {
        self.total_free.get().saturating_sub(self.total_busy.get())
    }

    /// Clusters that no map has.
    pub(crate) fn free(&self) -> u64 {
        self.total_free.get()
    }

    /// Counts clear bits from what the parents of bitmap pages keep.
    pub(crate) fn count_free(&self) -> Result<(), Missing> {
        let clusters = self.clusters();
        let mut free = Vec::new();
        let mut total = 0;
        for page in 0..clusters.div_ceil(BITS) {
            let here = (clusters - page * BITS).min(BITS);
            let clear = match self.bitmap.child(page * BITS, 0)? {
                Child::Empty => BITS,
                Child::Run(_) => 0,
                page => page.aux(),
            };
            let clear = clear.saturating_sub(BITS - here).min(here);
            total += clear;
            free.push(u32::try_from(clear).unwrap_or(0));
        }
        self.free.replace(free);
        self.total_free.set(total);
        Ok(())
    }

    /// [`Self::count_free`], if that was never done.
    pub(crate) fn count_free_once(&self) -> Result<(), Missing> {
        if self.free.borrow().is_empty() {
            self.count_free()?;
        }
        Ok(())
    }

    /// The page with this cluster's bit is in memory.
    pub(crate) fn ensure(&self, cluster: u64) -> Result<(), Missing> {
        self.bitmap.ensure(cluster)
    }

    pub(crate) fn is_set(&self, cluster: u64) -> Result<bool, Missing> {
        self.bitmap.view(cluster, |view| match view {
            View::Run(_) => true,
            View::Leaf(Body::Bits(words)) => words[word(cluster)] >> (cluster % 64) & 1 == 1,
            View::Empty | View::Leaf(_) => false,
        })
    }

    /// A map gets or loses this cluster. Gives false if it was so already, which cannot be in a sound file system.
    pub(crate) fn mark(&self, pages: &Pages, cluster: u64, used: bool) -> Result<bool, Missing> {
        Ok(self.mark_all(pages, std::iter::once((cluster, used)))?.is_none())
    }

    /// As [`Self::mark`], for clusters of one page of the bitmap in turn. Gives the first one that was so already, and stops there.
    pub(crate) fn mark_all(
        &self,
        pages: &Pages,
        marks: impl Iterator<Item = (u64, bool)>,
    ) -> Result<Option<(u64, bool)>, Missing> {
        let clusters = self.clusters();
        let mut marks = marks.peekable();
        let Some((first, used)) = marks.peek().copied() else {
            return Ok(None);
        };
        if first >= clusters {
            return Ok(Some((first, used)));
        }
        let (mut taken, mut given) = (0_u32, 0_u32);
        let wrong = self.bitmap.change(pages, first, |body| {
            let Body::Bits(words) = body else {
                return Some((first, used));
            };
            marks.find(|(cluster, used)| {
                let (word, bit) = (&mut words[word(*cluster)], 1 << (cluster % 64));
                let is_wrong = *cluster >= clusters || (*word & bit != 0) == *used;
                if is_wrong {
                    return true;
                }
                *word ^= bit;
                *(if *used { &mut taken } else { &mut given }) += 1;
                false
            })
        })?;
        let page = usize::try_from(first / BITS).unwrap_or(0);
        if let Some(free) = self.free.borrow_mut().get_mut(page) {
            *free = (*free + given).saturating_sub(taken);
        }
        let total = self.total_free.get() + u64::from(given);
        self.total_free.set(total.saturating_sub(taken.into()));
        Ok(wrong)
    }

    fn is_busy(&self, cluster: u64) -> bool {
        let busy = self.busy.borrow();
        busy.get(&(cluster / GROUP))
            .is_some_and(|bits| bits[group_word(cluster)] >> (cluster % 64) & 1 == 1)
    }

    /// Keeps a cluster from being taken. False: it is kept already.
    pub(crate) fn hold(&self, cluster: u64) -> bool {
        let mut busy = self.busy.borrow_mut();
        let bits = busy.entry(cluster / GROUP).or_default();
        let (word, bit) = (&mut bits[group_word(cluster)], 1 << (cluster % 64));
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.total_busy.set(self.total_busy.get() + 1);
        true
    }

    /// The end of [`Self::hold`].
    pub(crate) fn release(&self, cluster: u64) {
        let mut busy = self.busy.borrow_mut();
        let group = cluster / GROUP;
        let Some(bits) = busy.get_mut(&group) else { return };
        let (word, bit) = (&mut bits[group_word(cluster)], 1 << (cluster % 64));
        if *word & bit == 0 {
            return;
        }
        *word &= !bit;
        if *bits == [0; GROUP_WORDS] {
            busy.remove(&group);
        }
        self.total_busy.set(self.total_busy.get().saturating_sub(1));
    }

    /// Takes just this cluster, if it can be.
    pub(crate) fn take(&self, cluster: u64) -> Result<bool, Missing> {
        if cluster >= self.clusters() || self.is_busy(cluster) || self.is_set(cluster)? {
            return Ok(false);
        }
        Ok(self.hold(cluster))
    }

    /// The first cluster of a group that is wholly free.
    pub(crate) fn find_group(&self) -> Result<Option<u64>, Missing> {
        let groups = self.clusters() / GROUP;
        if groups == 0 || self.available() < self.no_group_until.get().max(GROUP) {
            return Ok(None);
        }
        let begin = self.next_group.get() % groups;
        let mut group = begin;
        loop {
            let page_end = ((group / GROUPS_PER_PAGE + 1) * GROUPS_PER_PAGE).min(groups);
            // Of the page where the search began, the part before comes last.
            let end = if group < begin {
                page_end.min(begin)
            } else {
                page_end
            };
            if let Some(found) = self.find_group_in(group, end)? {
                self.next_group.set(found + 1);
                return Ok(Some(found * GROUP));
            }
            group = if end >= groups { 0 } else { end };
            if group == begin || (begin == 0 && group == 0) {
                self.no_group_until.set(self.available() + GROUP);
                return Ok(None);
            }
        }
    }

    fn find_group_in(&self, first: u64, end: u64) -> Result<Option<u64>, Missing> {
        let page = usize::try_from(first / GROUPS_PER_PAGE).unwrap_or(0);
        if self
            .free
            .borrow()
            .get(page)
            .is_none_or(|free| u64::from(*free) < GROUP)
        {
            return Ok(None);
        }
        let look = self.bitmap.look(first * GROUP)?;
        let busy = self.busy.borrow();
        Ok((first..end).find(|group| {
            let clear = match &look {
                Look::Empty => true,
                Look::Run(_) => false,
                Look::Leaf(node) => match &*node.body.borrow() {
                    Body::Bits(words) => {
                        let start = word(group * GROUP);
                        words[start..start + GROUP_WORDS] == [0; GROUP_WORDS]
                    }
                    _ => false,
                },
            };
            clear && !busy.contains_key(group)
        }))
    }

    /// Takes any cluster, near where the last one was taken.
    pub(crate) fn take_any(&self) -> Result<Option<u64>, Missing> {
        let clusters = self.clusters();
        if clusters == 0 || self.available() == 0 {
            return Ok(None);
        }
        let pages = clusters.div_ceil(BITS);
        let begin = self.next_cluster.get() % clusters;
        // The page where it begins comes twice: its end first, its beginning last.
        for step in 0..=pages {
            let page = (begin / BITS + step) % pages;
            let free = self
                .free
                .borrow()
                .get(usize::try_from(page).unwrap_or(0))
                .copied();
            if free.unwrap_or(0) == 0 {
                continue;
            }
            let start = if step == 0 { begin } else { page * BITS };
            let end = ((page + 1) * BITS).min(clusters);
            if let Some(cluster) = self.find_in(start, end)? {
                self.next_cluster.set(cluster + 1);
                self.hold(cluster);
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// A clear bit in a range of one page.
    fn find_in(&self, start: u64, end: u64) -> Result<Option<u64>, Missing> {
        let look = self.bitmap.look(start)?;
        let busy = self.busy.borrow();
        let mut at = start;
        while at < end {
            let used = match &look {
                Look::Empty => 0,
                Look::Run(_) => return Ok(None),
                Look::Leaf(node) => match &*node.body.borrow() {
                    Body::Bits(words) => words[word(at)],
                    _ => u64::MAX,
                },
            };
            let busy = busy.get(&(at / GROUP)).map_or(0, |bits| bits[group_word(at)]);
            let below = (1 << (at % 64)) - 1;
            let free = !(used | busy | below);
            let found = at - at % 64 + u64::from(free.trailing_zeros());
            if free != 0 && found < end {
                return Ok(Some(found));
            }
            at = at - at % 64 + 64;
        }
        Ok(None)
    }

    /// The first run of clusters from `first` on, before `end`, that are set or busy. Pages that are not in memory count as a whole,
    /// unless they are known to be clear.
    fn next_used_clusters(&self, first: u64, end: u64) -> Option<(u64, u64)> {
        let mut at = first;
        while at < end {
            let page_end = (at / BITS + 1) * BITS;
            let stop = page_end.min(end);
            let child = match self.bitmap.child(at, 0) {
                Ok(child) => child,
                Err(_) => return Some((at, page_end)),
            };
            let found = match &child {
                Child::Run(_) => Some((at, page_end)),
                Child::Media(ptr) if u64::from(ptr.aux) < BITS => Some((at, page_end)),
                Child::Loaded(node) => match &*node.body.borrow() {
                    Body::Bits(words) => self.next_used_word(Some(&words[..]), at, stop),
                    _ => Some((at, page_end)),
                },
                Child::Empty | Child::Media(_) => self.next_used_word(None, at, stop),
            };
            if found.is_some() {
                return found;
            }
            at = stop;
        }
        None
    }

    /// In one page: the first word with a bit that is set or busy, from that bit on.
    fn next_used_word(&self, words: Option<&[u64]>, first: u64, end: u64) -> Option<(u64, u64)> {
        let busy = self.busy.borrow();
        let mut at = first;
        while at < end {
            let set = words.and_then(|words| words.get(word(at))).copied().unwrap_or(0);
            let busy = busy.get(&(at / GROUP)).map_or(0, |bits| bits[group_word(at)]);
            let used = (set | busy) & (u64::MAX << (at % 64));
            let start = at - at % 64;
            if used != 0 {
                let from = start + u64::from(used.trailing_zeros());
                let run = (used >> (from % 64)).trailing_ones();
                return (from < end).then_some((from, from + u64::from(run)));
            }
            at = start + 64;
        }
        None
    }

    /// The place of a cluster of this volume.
    pub(crate) fn location(&self, cluster: u64) -> Location {
        Location {
            volume: self.index,
            cluster,
        }
    }
}

/// What a copy of the volume may leave out: clusters that no map has and nobody writes or may still read.
impl<V> Usage for VolumeCore<V> {
    fn next_used(&self, offset: u64, end: u64) -> Option<Range<u64>> {
        let clusters = self.clusters();
        let last = end.div_ceil(CLUSTER).min(clusters);
        // What lies behind the last cluster is nobody's.
        let (from, to) = self.next_used_clusters(offset / CLUSTER, last)?;
        Some(from * CLUSTER..to * CLUSTER)
    }
}

fn word(cluster: u64) -> usize {
    usize::try_from(cluster % BITS / 64).unwrap_or(0)
}

fn group_word(cluster: u64) -> usize {
    usize::try_from(cluster % GROUP / 64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(clusters: u64) -> VolumeCore<()> {
        let record = VolumeRecord {
            index: VolumeIndex(1),
            uuid: [1; 16],
            name: "v".into(),
            class: String::new(),
            clusters,
            bitmap: 0,
            sums: 0,
            draining: false,
        };
        VolumeCore::blank(record, Rc::new(()))
    }

    #[test]
    fn groups_come_in_order_and_none_twice_until_they_are_free_again() {
        let (volume, pages) = (volume(4 * GROUP + 10), Pages::default());
        let mut found = Vec::new();
        while let Some(first) = volume.find_group().unwrap() {
            assert!(volume.take(first + 3).unwrap());
            found.push(first / GROUP);
        }
        assert_eq!(found, [0, 1, 2, 3]);
        for group in found {
            assert!(volume.mark(&pages, group * GROUP + 3, true).unwrap());
            volume.release(group * GROUP + 3);
        }
        assert_eq!(volume.find_group().unwrap(), None);
        assert!(volume.mark(&pages, 2 * GROUP + 3, false).unwrap());
        volume.no_group_until.set(0);
        assert_eq!(volume.find_group().unwrap(), Some(2 * GROUP));
    }

    #[test]
    fn what_is_set_or_busy_is_in_use() {
        let (volume, pages) = (volume(70_000), Pages::default());
        assert_eq!(volume.next_used(0, 70_000 * CLUSTER), None);
        assert!(volume.hold(3) && volume.hold(40_000));
        assert!(volume.mark(&pages, 4, true).unwrap() && volume.mark(&pages, 200, true).unwrap());
        let from = |cluster: u64| {
            let used = volume.next_used(cluster * CLUSTER, 70_000 * CLUSTER);
            used.map(|range| (range.start / CLUSTER, range.end / CLUSTER))
        };
        assert_eq!(
            (from(0), from(4), from(5)),
            (Some((3, 5)), Some((4, 5)), Some((200, 201)))
        );
        assert_eq!((from(201), from(40_001)), (Some((40_000, 40_001)), None));
        assert_eq!(volume.next_used(5 * CLUSTER, 200 * CLUSTER), None);
    }

    #[test]
    fn every_cluster_is_taken_once_and_then_there_is_none() {
        let (volume, pages) = (volume(70_000), Pages::default());
        let mut count = 0;
        while let Some(cluster) = volume.take_any().unwrap() {
            assert!(volume.mark(&pages, cluster, true).unwrap());
            volume.release(cluster);
            count += 1;
        }
        assert_eq!((count, volume.available()), (70_000, 0));
        assert!(volume.mark(&pages, 33_000, false).unwrap());
        assert_eq!(volume.take_any().unwrap(), Some(33_000));
        assert!(!volume.mark(&pages, 33_001, true).unwrap());
    }
}
