//! Records that give clusters to files and take them away.

use std::rc::Rc;

use block_io::BlockDevice;
use smallvec::SmallVec;

use super::apply::{MAP_PAGE, check_range, clusters_of, entries_of, leaf_child};
use super::{Damage, Effects, State, Stop};
use crate::entry::Entry;
use crate::failed_volume::adds;
use crate::file_core::FileCore;
use crate::tree::node::{Body, Child};
use crate::units::{FileId, Location, SUBS};
use crate::volume::VolumeCore;

impl<V: BlockDevice> State<V> {
    /// Looks at the bit of a place.
    pub(super) fn prepare_place(&self, at: Location) -> Result<(), Stop> {
        Ok(self.volume(at.volume)?.ensure(at.cluster)?)
    }

    pub(super) fn prepare_map(&self, file: FileId, first: u64, count: u64, entry: Entry) -> Result<(), Stop> {
        check_range(file, first, first.saturating_add(count))?;
        let file = self.file(file)?;
        let map = Self::map_of(&file)?;
        for number in 0..count {
            let old = map.entry(first + number)?.location();
            let new = entry.nth(number).location();
            if old != new {
                for at in [old, new].into_iter().flatten() {
                    self.prepare_place(at)?;
                }
            }
        }
        Ok(())
    }

    /// Looks at the maps and bits of clusters that a file may lose.
    pub(super) fn prepare_free(&self, file: &FileCore, first: u64, end: u64) -> Result<(), Stop> {
        let map = Self::map_of(file)?;
        let mut from = first;
        while let Some(span) = map.next(from)? {
            if span.start >= end {
                break;
            }
            from = span.start + span.count;
            let stop = from.min(end);
            for cluster in span.start.max(first)..stop {
                if let Some(at) = map.entry(cluster)?.location() {
                    self.prepare_place(at)?;
                }
            }
        }
        Ok(())
    }

    /// A map gets a place.
    fn gain(&self, file: &FileCore, at: Location) -> Result<(), Stop> {
        let volume = self.volume(at.volume)?;
        if !volume.mark(&self.pages, at.cluster, true)? {
            let problem = format!(
                "gets cluster {} of volume {}, which is in use",
                at.cluster, at.volume.0
            );
            return Err(Damage::new(file.id, problem).into());
        }
        volume.release(at.cluster);
        file.change(|inode| inode.allocated += 1);
        Ok(())
    }

    /// A map loses a place.
    pub(super) fn lose(&self, file: &FileCore, at: Location, effects: &mut Effects) -> Result<(), Stop> {
        let volume: Rc<VolumeCore<V>> = self.volume(at.volume)?;
        if !volume.mark(&self.pages, at.cluster, false)? {
            let problem = format!(
                "frees cluster {} of volume {}, which is free",
                at.cluster, at.volume.0
            );
            return Err(Damage::new(file.id, problem).into());
        }
        effects.freed(at);
        file.change(|inode| {
            inode.allocated = inode.allocated.saturating_sub(1);
            inode.placement += 1;
        });
        Ok(())
    }

    /// Gives clusters entries. Those of moved data say nothing that was not durable before.
    pub(super) fn map(
        &self,
        file: &FileCore,
        first: u64,
        count: u64,
        entry: Entry,
        moved: bool,
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        check_range(file.id, first, first.saturating_add(count))?;
        let map = Self::map_of(file)?;
        file.dirty.set(true);
        effects.map_changes(file);
        let notes = effects.notes_added && adds(entry, moved);
        let begin = effects.added.len();
        let mut at = first;
        while at < first + count {
            let page = at - at % MAP_PAGE;
            let end = (page + MAP_PAGE).min(first + count);
            let mut before: SmallVec<[Entry; 4]> = SmallVec::new();
            if at == page && end == page + MAP_PAGE {
                before.extend(entries_of(map, page)?);
                let old = map.replace(&self.pages, page, 0, Child::Run(entry.nth(at - first)))?;
                self.pages.dropped(&old);
            } else {
                map.change(&self.pages, at, |body| {
                    if let Body::Map(entries) = body {
                        for cluster in at..end {
                            before.push(entries.get(slot(cluster)));
                            entries.set(slot(cluster), entry.nth(cluster - first));
                        }
                    }
                })?;
            }
            for (cluster, old) in (at..).zip(before) {
                let new = entry.nth(cluster - first);
                if notes {
                    effects.note(begin, file.id, cluster, old, new);
                }
                let (old, new) = (old.location(), new.location());
                if old == new {
                    continue;
                }
                if let Some(at) = new {
                    self.gain(file, at)?;
                }
                if let Some(at) = old {
                    self.lose(file, at, effects)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Sub-clusters `first..end` lose their content.
    pub(super) fn clear(
        &self,
        file: &FileCore,
        first: u64,
        end: u64,
        zero: bool,
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        check_range(file.id, first / u64::from(SUBS), end.div_ceil(SUBS.into()))?;
        self.rewrite(file, first, end, zero, effects, |entry, mask| {
            entry.without(mask, zero)
        })
    }

    /// Clusters of a dying file are freed, kept ones, too.
    pub(super) fn reap(
        &self,
        file: &FileCore,
        first: u64,
        end: u64,
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        check_range(file.id, first / u64::from(SUBS), end.div_ceil(SUBS.into()))?;
        self.rewrite(file, first, end, false, effects, |_, _| Entry::HOLE)
    }

    /// Gives each entry of a range a new state at the same place or at none. What has no page is left alone unless `holes`.
    fn rewrite(
        &self,
        file: &FileCore,
        first: u64,
        end: u64,
        holes: bool,
        effects: &mut Effects,
        change: impl Fn(Entry, crate::units::SubMask) -> Entry,
    ) -> Result<(), Stop> {
        let map = Self::map_of(file)?;
        file.dirty.set(true);
        effects.map_changes(file);
        let subs = u64::from(SUBS);
        let page_subs = MAP_PAGE * subs;
        let mut at = first;
        while at < end {
            if !holes {
                let Some(span) = map.next(at / subs)? else { break };
                at = at.max(span.start * subs);
                if at >= end {
                    break;
                }
            }
            let page = at / page_subs;
            let stop = ((page + 1) * page_subs).min(end);
            let before = entries_of(map, page * MAP_PAGE)?;
            let mut after = before;
            for (cluster, mask) in clusters_of(at, stop) {
                let entry = &mut after[slot(cluster)];
                let old = *entry;
                *entry = change(old, mask);
                if let (Some(place), None) = (old.location(), entry.location()) {
                    self.lose(file, place, effects)?;
                }
            }
            if after != before {
                let old = map.replace(&self.pages, page * MAP_PAGE, 0, leaf_child(self, &after))?;
                self.pages.dropped(&old);
            }
            at = stop;
        }
        Ok(())
    }
}

fn slot(cluster: u64) -> usize {
    usize::try_from(cluster % MAP_PAGE).unwrap_or(0)
}
