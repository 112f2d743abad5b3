//! Which devices have how much to do, and what makes it: the difference between two samples of what is counted anyway.
//!
//! Devices and members (a member is what a volume has on one device) count their requests, bytes, errors and durations, and
//! devices also how long something was in flight. A sample copies these numbers; nothing else is kept, and requests cost nothing
//! more. Who wants a history keeps samples.

use std::collections::BTreeMap;
use std::time::Duration;

use block_io::{BlockDevice, Clock};

use super::counters::Statistics;
use super::pool::Pool;
use crate::model::{DeviceId, MemberId, VolumeId};

/// What everything in a pool has done up to some moment.
#[derive(Debug, Clone)]
pub struct Sample {
    at: Duration,
    devices: BTreeMap<DeviceId, (Duration, Statistics)>,
    legs: BTreeMap<(VolumeId, MemberId), Leg>,
    volumes: BTreeMap<VolumeId, Statistics>,
}

#[derive(Debug, Clone, Copy)]
struct Leg {
    section: u32,
    column: u32,
    device: DeviceId,
    statistics: Statistics,
}

/// The load of a pool within a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotSpots {
    /// How long the window was.
    pub window: Duration,
    /// The devices, the busiest first.
    pub devices: Vec<DeviceLoad>,
}

/// The load of a device within a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLoad {
    /// Which.
    pub device: DeviceId,
    /// How long something was in flight, in thousandths of the window.
    pub busy: u32,
    /// How many requests were in flight on average, in thousandths.
    pub depth: u64,
    /// What it did.
    pub statistics: Statistics,
    /// What of volumes lies on it and was used, the one that took the longest first.
    pub legs: Vec<LegLoad>,
}

/// The load of what a volume has on one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegLoad {
    /// Of this volume.
    pub volume: VolumeId,
    /// Number of the section.
    pub section: u32,
    /// Column within the section, from 0.
    pub column: u32,
    /// Which member of it.
    pub member: MemberId,
    /// Its part of the time that the requests of all members on the device took, in thousandths.
    pub share: u32,
    /// What it did.
    pub statistics: Statistics,
}

/// `part` of `whole` in thousandths.
fn thousandths(part: Duration, whole: Duration) -> u64 {
    let whole = whole.as_nanos().max(1);
    u64::try_from(part.as_nanos().saturating_mul(1000) / whole).unwrap_or(u64::MAX)
}

impl Sample {
    /// What was done between `earlier` and this.
    pub fn since(&self, earlier: &Self) -> HotSpots {
        let window = self.at.saturating_sub(earlier.at);
        let mut legs = self.legs_since(earlier);
        let mut devices: Vec<DeviceLoad> = self
            .devices
            .iter()
            .map(|(id, (busy, statistics))| {
                let (busy_before, before) = earlier.devices.get(id).copied().unwrap_or_default();
                let statistics = statistics.since(&before);
                let busy = thousandths(busy.saturating_sub(busy_before), window).min(1000);
                DeviceLoad {
                    device: *id,
                    busy: u32::try_from(busy).unwrap_or(1000),
                    depth: thousandths(statistics.time(), window),
                    statistics,
                    legs: legs.remove(id).unwrap_or_default(),
                }
            })
            .collect();
        devices.sort_by_key(|load| (std::cmp::Reverse((load.busy, load.depth)), load.device));
        HotSpots { window, devices }
    }

    /// What users of volumes had done between `earlier` and this, whatever it took on devices.
    pub fn volumes_since(&self, earlier: &Self) -> Vec<(VolumeId, Statistics)> {
        let before = |id: &VolumeId| earlier.volumes.get(id).copied().unwrap_or_default();
        let volumes = self.volumes.iter();
        volumes
            .map(|(id, statistics)| (*id, statistics.since(&before(id))))
            .collect()
    }

    fn legs_since(&self, earlier: &Self) -> BTreeMap<DeviceId, Vec<LegLoad>> {
        let mut devices: BTreeMap<DeviceId, Vec<LegLoad>> = BTreeMap::new();
        for ((volume, member), leg) in &self.legs {
            let before = earlier.legs.get(&(*volume, *member));
            let before = before.map(|leg| leg.statistics).unwrap_or_default();
            let statistics = leg.statistics.since(&before);
            if statistics != Statistics::default() {
                devices.entry(leg.device).or_default().push(LegLoad {
                    volume: *volume,
                    section: leg.section,
                    column: leg.column,
                    member: *member,
                    share: 0,
                    statistics,
                });
            }
        }
        for legs in devices.values_mut() {
            let all = legs.iter().map(|leg| leg.statistics.time()).sum();
            for leg in legs.iter_mut() {
                leg.share = u32::try_from(thousandths(leg.statistics.time(), all)).unwrap_or(1000);
            }
            legs.sort_by_key(|leg| (std::cmp::Reverse(leg.statistics.time()), leg.volume, leg.member));
        }
        devices
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// What everything has done so far; two of them make a report ([`Sample::since`]).
    pub fn sample(&self) -> Sample {
        let now = self.0.clock.now();
        let disks = self.0.disks();
        let devices = disks.iter().filter(|disk| disk.is_alive());
        let devices = devices.map(|disk| (disk.id, (disk.busy(now), disk.counters.get())));
        let (mut legs, mut volumes) = (BTreeMap::new(), BTreeMap::new());
        for volume in self.0.volumes() {
            volumes.insert(volume.id, volume.counters.get());
            let map = volume.map();
            for section in &map.sections {
                for (column, members) in (0..).zip(&section.columns) {
                    for member in &members.members {
                        let Some(disk) = member.disks().next() else {
                            continue;
                        };
                        let leg = Leg {
                            section: section.id,
                            column,
                            device: disk.id,
                            statistics: member.counters.get(),
                        };
                        legs.insert((volume.id, member.id), leg);
                    }
                }
            }
        }
        Sample {
            at: now,
            devices: devices.collect(),
            legs,
            volumes,
        }
    }
}
