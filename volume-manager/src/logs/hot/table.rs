//! The hot regions in memory: plain data, no I/O.
//!
//! A *slot* is a hot region; it has a *place* in each log of its volume: a fixed entry of that log's next transaction. A log
//! counts the entries that were ever added to it; it remembers how many of them its last durable transaction knew, and an entry
//! whose number is not above that is durable. Slots without users form a list, the one that was idle for longest first.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::RangeInclusive;

use super::super::LogError;
use super::super::activity::{ENTRIES, NOTHING, Region, pack, unpack};
use super::Limits;
use crate::model::{DeviceId, VolumeId};

/// No slot.
const NIL: usize = usize::MAX;

/// Number of a log; never used again for another one.
pub(super) type LogIndex = usize;

/// Whose entry of which log.
#[derive(Debug, Clone, Copy)]
struct Place {
    log: LogIndex,
    entry: usize,
    /// Number of the addition.
    added: u64,
}

#[derive(Debug)]
struct Slot {
    /// The region, packed.
    key: u64,
    users: u32,
    /// It is about to leave; whoever uses it again takes that back.
    leaving: bool,
    /// The last sweep found it idle.
    swept: bool,
    older: usize,
    newer: usize,
    places: Vec<Place>,
}

/// A log in memory.
#[derive(Debug)]
pub(super) struct LogTable {
    pub(super) device: DeviceId,
    /// The next transaction.
    pub(super) entries: Vec<u64>,
    vacant: Vec<usize>,
    /// Entries added so far.
    pub(super) added: u64,
    /// How many of them are known to the last durable transaction.
    pub(super) durable: u64,
    /// The last durable transaction names regions that have left.
    pub(super) stale: bool,
    /// A transaction is being written.
    pub(super) busy: bool,
    /// What went wrong; it is not used again.
    pub(super) failed: Option<LogError>,
    /// The owner took it out.
    pub(super) removed: bool,
}

impl LogTable {
    fn used(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }
}

/// Volumes and what their logs said.
#[derive(Debug)]
struct VolumeLogs {
    logs: Vec<LogIndex>,
}

/// Why regions cannot be pinned now.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// Something must leave this log first.
    Full(LogIndex),
    /// So much was added to this log that its next transaction must be durable first.
    Crowded(LogIndex),
    /// It will not get better.
    Never(LogError),
}

/// All hot regions.
#[derive(Debug)]
pub(super) struct Table {
    limits: Limits,
    slots: Vec<Slot>,
    vacant: Vec<usize>,
    /// Looked up, never iterated.
    index: HashMap<u64, usize, BuildHasherDefault<KeyHasher>>,
    oldest: usize,
    newest: usize,
    pub(super) logs: Vec<LogTable>,
    volumes: BTreeMap<VolumeId, VolumeLogs>,
    /// Of the next transaction of any log.
    pub(super) sequence: u64,
}

/// Spreads packed regions; there are few, so that a guest that chooses them gains nothing.
#[derive(Debug, Default, Clone, Copy)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn write_u64(&mut self, value: u64) {
        let product = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

fn keys(volume: VolumeId, regions: &RangeInclusive<u32>) -> impl Iterator<Item = u64> + use<> {
    regions.clone().map(move |index| pack(Region { volume, index }))
}

impl Table {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            slots: Vec::new(),
            vacant: Vec::new(),
            index: HashMap::default(),
            oldest: NIL,
            newest: NIL,
            logs: Vec::new(),
            volumes: BTreeMap::new(),
            sequence: 1,
        }
    }

    pub(super) fn add_log(&mut self, device: DeviceId, sequence: u64) -> LogIndex {
        self.sequence = self.sequence.max(sequence.saturating_add(1));
        self.logs.push(LogTable {
            device,
            entries: vec![NOTHING; ENTRIES],
            vacant: (0..ENTRIES).rev().collect(),
            added: 0,
            durable: 0,
            stale: false,
            busy: false,
            failed: None,
            removed: false,
        });
        self.logs.len() - 1
    }

    /// The log of a device, if there is one.
    pub(super) fn log_of(&self, device: DeviceId) -> Option<LogIndex> {
        self.logs
            .iter()
            .position(|log| log.device == device && !log.removed)
    }

    pub(super) fn remove_log(&mut self, log: LogIndex) {
        for slot in 0..self.slots.len() {
            self.take_places(slot, |place| place.log == log);
        }
        for volume in self.volumes.values_mut() {
            volume.logs.retain(|index| *index != log);
        }
        if let Some(log) = self.logs.get_mut(log) {
            log.removed = true;
            log.entries = Vec::new();
            log.vacant = Vec::new();
        }
    }

    /// The logs whose last transaction names regions that have left, and the change that must be durable to be rid of them.
    pub(super) fn stale_logs(&mut self) -> Vec<(LogIndex, u64)> {
        let logs = self.logs.iter_mut().enumerate();
        let stale = logs.filter(|(_, log)| log.stale && !log.removed && log.failed.is_none());
        stale
            .map(|(index, log)| {
                log.added += 1;
                (index, log.added)
            })
            .collect()
    }

    /// Whether a volume was added.
    pub(super) fn knows(&self, volume: VolumeId) -> bool {
        self.volumes.contains_key(&volume)
    }

    /// The logs of a volume.
    pub(super) fn logs_of(&self, volume: VolumeId) -> &[LogIndex] {
        self.volumes.get(&volume).map_or(&[], |volume| &volume.logs)
    }

    pub(super) fn add_volume(&mut self, volume: VolumeId, logs: Vec<LogIndex>) {
        self.volumes.insert(volume, VolumeLogs { logs });
    }

    pub(super) fn remove_volume(&mut self, volume: VolumeId) {
        for slot in self.slots_of(volume) {
            self.remove(slot);
        }
        self.volumes.remove(&volume);
    }

    /// The hot regions of a volume, in order.
    pub(super) fn regions_of(&self, volume: VolumeId) -> Vec<u32> {
        let slots = self.slots_of(volume);
        let mut regions: Vec<u32> = slots
            .iter()
            .map(|slot| unpack(self.slots[*slot].key).index)
            .collect();
        regions.sort_unstable();
        regions
    }

    fn slots_of(&self, volume: VolumeId) -> Vec<usize> {
        let ours = |slot: &Slot| slot.key != NOTHING && unpack(slot.key).volume == volume;
        let all = self.slots.iter().enumerate();
        all.filter(|(_, slot)| ours(slot))
            .map(|(index, _)| index)
            .collect()
    }

    /// Gives a volume these logs instead of those it has; its hot regions get places in the new ones.
    pub(super) fn change_logs(&mut self, volume: VolumeId, logs: &[LogIndex]) -> Result<(), Obstacle> {
        let slots = self.slots_of(volume);
        let lacking = |table: &Self, log: LogIndex| -> Vec<usize> {
            let has = |slot: usize| table.slots[slot].places.iter().any(|place| place.log == log);
            slots.iter().copied().filter(|slot| !has(*slot)).collect()
        };
        for log in logs {
            if self.logs[*log].used() + lacking(self, *log).len() > self.limits.regions {
                return Err(Obstacle::Full(*log));
            }
        }
        for log in logs {
            for slot in lacking(self, *log) {
                self.add_place(slot, *log);
            }
        }
        for slot in slots {
            self.take_places(slot, |place| !logs.contains(&place.log));
        }
        self.add_volume(volume, logs.to_vec());
        Ok(())
    }

    /// Counts another user of the regions, if all are hot and durably so.
    pub(super) fn use_durable(&mut self, volume: VolumeId, regions: &RangeInclusive<u32>) -> bool {
        for key in keys(volume, regions) {
            match self.index.get(&key) {
                Some(slot) if self.is_durable(*slot) => {}
                _ => return false,
            }
        }
        for key in keys(volume, regions) {
            self.use_again(key);
        }
        true
    }

    fn is_durable(&self, slot: usize) -> bool {
        let places = &self.slots[slot].places;
        let durable = |place: &Place| {
            let log = &self.logs[place.log];
            place.added <= log.durable && log.failed.is_none()
        };
        !places.is_empty() && places.iter().all(durable)
    }

    fn use_again(&mut self, key: u64) {
        if let Some(slot) = self.index.get(&key).copied() {
            if self.slots[slot].users == 0 {
                self.unlink(slot);
            }
            let slot = &mut self.slots[slot];
            slot.users += 1;
            slot.leaving = false;
            slot.swept = false;
        }
    }

    /// Counts another user of the regions, and makes those hot that are not; all of them or none.
    pub(super) fn pin(&mut self, volume: VolumeId, regions: &RangeInclusive<u32>) -> Result<(), Obstacle> {
        let logs = self.logs_of(volume).to_vec();
        if logs.is_empty() {
            return Err(Obstacle::Never(LogError::NoLog { volume }));
        }
        let is_new = |key: &u64| !self.index.contains_key(key);
        let new = keys(volume, regions).filter(is_new).count();
        for index in &logs {
            let log = &self.logs[*index];
            if let Some(error) = &log.failed {
                return Err(Obstacle::Never(error.clone()));
            }
            let waiting = usize::try_from(log.added - log.durable).unwrap_or(usize::MAX);
            if new > 0 && waiting.saturating_add(new) > self.limits.new_regions && waiting > 0 {
                return Err(Obstacle::Crowded(*index));
            }
            if new > 0 && log.used() + new > self.limits.regions {
                return Err(Obstacle::Full(*index));
            }
        }
        for key in keys(volume, regions) {
            if !self.index.contains_key(&key) {
                self.add(key, &logs);
            }
            self.use_again(key);
        }
        Ok(())
    }

    /// Takes in what the logs said when they were opened.
    pub(super) fn restore(&mut self, volume: VolumeId, regions: &[Region]) -> Result<(), LogError> {
        let logs = self.logs_of(volume).to_vec();
        if logs
            .iter()
            .any(|log| self.logs[*log].vacant.len() < regions.len())
        {
            return Err(LogError::Overfull { volume });
        }
        for region in regions {
            let key = pack(*region);
            if !self.index.contains_key(&key) {
                self.add(key, &logs);
            }
            self.use_again(key);
        }
        Ok(())
    }

    /// A new slot without users, with places in these logs, which have some.
    fn add(&mut self, key: u64, logs: &[LogIndex]) {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                key: NOTHING,
                users: 0,
                leaving: false,
                swept: false,
                older: NIL,
                newer: NIL,
                places: Vec::new(),
            });
            self.slots.len() - 1
        });
        self.slots[slot].key = key;
        self.slots[slot].leaving = false;
        self.slots[slot].swept = false;
        self.index.insert(key, slot);
        for log in logs {
            self.add_place(slot, *log);
        }
        self.link(slot);
    }

    fn add_place(&mut self, slot: usize, log: LogIndex) {
        let table = &mut self.logs[log];
        let Some(entry) = table.vacant.pop() else {
            // The callers have counted.
            return;
        };
        table.entries[entry] = self.slots[slot].key;
        table.added += 1;
        self.slots[slot].places.push(Place {
            log,
            entry,
            added: table.added,
        });
    }

    fn take_places(&mut self, slot: usize, which: impl Fn(&Place) -> bool) {
        let logs = &mut self.logs;
        self.slots[slot].places.retain(|place| {
            let take = which(place);
            if take {
                let log = &mut logs[place.log];
                log.entries[place.entry] = NOTHING;
                log.vacant.push(place.entry);
                log.stale = true;
            }
            !take
        });
    }

    fn remove(&mut self, slot: usize) {
        self.take_places(slot, |_| true);
        if self.slots[slot].users == 0 {
            self.unlink(slot);
        }
        self.index.remove(&self.slots[slot].key);
        self.slots[slot].key = NOTHING;
        self.slots[slot].users = 0;
        self.vacant.push(slot);
    }

    /// The additions that must be durable before these pinned regions may be written: up to which one in which log.
    pub(super) fn pending(
        &self,
        volume: VolumeId,
        regions: &RangeInclusive<u32>,
    ) -> Result<Vec<(LogIndex, u64)>, LogError> {
        let mut pending: BTreeMap<LogIndex, u64> = BTreeMap::new();
        for key in keys(volume, regions) {
            let places = self.index.get(&key).map(|slot| &self.slots[*slot].places);
            let Some(places) = places.filter(|places| !places.is_empty()) else {
                return Err(LogError::NoLog { volume });
            };
            for place in places {
                let log = &self.logs[place.log];
                if let Some(error) = &log.failed {
                    return Err(error.clone());
                }
                if place.added > log.durable {
                    let added = pending.entry(place.log).or_default();
                    *added = place.added.max(*added);
                }
            }
        }
        Ok(pending.into_iter().collect())
    }

    /// One user less. Whether a region has none now.
    pub(super) fn unuse(&mut self, volume: VolumeId, regions: &RangeInclusive<u32>) -> bool {
        let mut idle = false;
        for key in keys(volume, regions) {
            // Not there if the volume was removed.
            let Some(slot) = self.index.get(&key).copied() else {
                continue;
            };
            let users = &mut self.slots[slot].users;
            if *users == 1 {
                *users = 0;
                idle = true;
                self.link(slot);
            } else {
                *users = users.saturating_sub(1);
            }
        }
        idle
    }

    /// Some regions that shall leave a log that is full, those that were idle for longest. Empty if all are in use.
    pub(super) fn evict(&mut self, log: LogIndex) -> Vec<Region> {
        let mut leaving = Vec::new();
        let mut slot = self.oldest;
        while slot != NIL && leaving.len() < self.limits.evicted {
            let here = &mut self.slots[slot];
            if !here.leaving && here.places.iter().any(|place| place.log == log) {
                here.leaving = true;
                leaving.push(unpack(here.key));
            }
            slot = here.newer;
        }
        leaving.sort_unstable();
        leaving
    }

    /// The regions that shall leave because two sweeps found them idle.
    pub(super) fn sweep(&mut self) -> Vec<Region> {
        let mut leaving = Vec::new();
        let mut slot = self.oldest;
        while slot != NIL {
            let here = &mut self.slots[slot];
            if !here.leaving && std::mem::replace(&mut here.swept, true) {
                here.leaving = true;
                leaving.push(unpack(here.key));
            }
            slot = here.newer;
        }
        leaving.sort_unstable();
        leaving
    }

    /// These leave now, but for those that were used again. How many left.
    pub(super) fn leave(&mut self, regions: &[Region]) -> usize {
        let mut left = 0;
        for slot in self.leaving(regions) {
            self.remove(slot);
            left += 1;
        }
        left
    }

    /// These stay after all.
    pub(super) fn stay(&mut self, regions: &[Region]) {
        for slot in self.leaving(regions) {
            self.slots[slot].leaving = false;
        }
    }

    fn leaving(&self, regions: &[Region]) -> Vec<usize> {
        let slots = regions.iter().filter_map(|region| self.index.get(&pack(*region)));
        slots.copied().filter(|slot| self.slots[*slot].leaving).collect()
    }

    fn link(&mut self, slot: usize) {
        self.slots[slot].older = self.newest;
        self.slots[slot].newer = NIL;
        match self.slots.get_mut(self.newest) {
            Some(newest) => newest.newer = slot,
            None => self.oldest = slot,
        }
        self.newest = slot;
    }

    fn unlink(&mut self, slot: usize) {
        let (older, newer) = (self.slots[slot].older, self.slots[slot].newer);
        match self.slots.get_mut(older) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
    }
}
