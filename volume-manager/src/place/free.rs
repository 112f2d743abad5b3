//! What is free on the devices of a pool, and how runs are cut from it.
//!
//! Nothing about free space is stored on media: it is the data area minus all extents, computed anew for each placement. That
//! takes a pass over all extents and a sort per device, and cannot disagree with the configuration.

use crate::model::{BLOCK, Configuration, Device, DeviceId, Extent};

/// Runs of at least this length begin at multiples of it where that costs no additional piece.
pub const ALIGNMENT: u64 = 1 << 20;

/// Most extents of a new member: more would make its map slow and the configuration large.
pub const MAX_PIECES: usize = 64;

/// A free run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gap {
    start: u64,
    length: u64,
}

impl Gap {
    fn end(self) -> u64 {
        self.start + self.length
    }

    /// Where a run of `length` bytes begins in it, at a multiple of `alignment`.
    fn fits(self, length: u64, alignment: u64) -> Option<u64> {
        let start = self.start.checked_next_multiple_of(alignment)?;
        (start.checked_add(length)? <= self.end()).then_some(start)
    }
}

/// The free runs of one device, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpace {
    device: DeviceId,
    gaps: Vec<Gap>,
}

/// The free runs of all devices of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeSpace {
    /// In the order of the configuration's devices.
    devices: Vec<DeviceSpace>,
}

/// First and last byte (exclusive) of what may be extents of a device.
pub(super) fn data_area(device: &Device) -> (u64, u64) {
    let end = device.size / BLOCK * BLOCK;
    let start = device.data_start.checked_next_multiple_of(BLOCK).unwrap_or(end);
    (start.min(end), end)
}

/// Index of a device. Where none was ever removed it is its number.
fn index_of(config: &Configuration, id: DeviceId) -> Option<usize> {
    let guess = id.0 as usize;
    if config.devices.get(guess).is_some_and(|device| device.id == id) {
        return Some(guess);
    }
    config.devices.binary_search_by_key(&id, |device| device.id).ok()
}

impl FreeSpace {
    /// Computes it. Extents on unknown devices or out of bounds do no harm here; `verify` reports them.
    pub fn of(config: &Configuration) -> Self {
        let mut used = vec![Vec::new(); config.devices.len()];
        let mut add = |extents: &[Extent]| {
            for extent in extents {
                if let Some(index) = index_of(config, extent.device) {
                    used[index].push((extent.start, extent.length));
                }
            }
        };
        // Plain loops: this is the one pass over everything that each placement takes.
        for volume in &config.volumes {
            add(&volume.bitmap);
            for section in &volume.sections {
                add(&section.log);
                for column in &section.columns {
                    for member in &column.members {
                        add(&member.extents);
                    }
                }
            }
        }
        let devices = config.devices.iter().zip(used);
        let devices = devices.map(|(device, used)| DeviceSpace::new(device, used));
        Self {
            devices: devices.collect(),
        }
    }

    /// The free runs of a device.
    pub fn device(&self, id: DeviceId) -> Option<&DeviceSpace> {
        let index = self
            .devices
            .binary_search_by_key(&id, |space| space.device)
            .ok()?;
        self.devices.get(index)
    }

    /// The free runs of a device, to cut from.
    pub fn device_mut(&mut self, id: DeviceId) -> Option<&mut DeviceSpace> {
        let index = self
            .devices
            .binary_search_by_key(&id, |space| space.device)
            .ok()?;
        self.devices.get_mut(index)
    }

    /// Free bytes of all devices, whatever their state.
    pub fn total(&self) -> u64 {
        self.devices.iter().map(DeviceSpace::bytes).sum()
    }
}

impl DeviceSpace {
    fn new(device: &Device, mut used: Vec<(u64, u64)>) -> Self {
        used.sort_unstable();
        let (mut position, end) = data_area(device);
        let mut gaps = Vec::new();
        for (start, length) in used {
            if start > position && position < end {
                gaps.push(Gap {
                    start: position,
                    length: start.min(end) - position,
                });
            }
            position = position.max(start.saturating_add(length));
        }
        if position < end {
            gaps.push(Gap {
                start: position,
                length: end - position,
            });
        }
        Self {
            device: device.id,
            gaps,
        }
    }

    /// Free bytes.
    pub fn bytes(&self) -> u64 {
        self.gaps.iter().map(|gap| gap.length).sum()
    }

    /// Bytes of the longest free run.
    pub fn longest(&self) -> u64 {
        self.gaps.iter().map(|gap| gap.length).max().unwrap_or(0)
    }

    /// Bytes that `pieces` extents can have at most.
    pub fn reach(&self, pieces: usize) -> u64 {
        if self.gaps.len() <= pieces {
            return self.bytes();
        }
        let mut lengths: Vec<u64> = self.gaps.iter().map(|gap| gap.length).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(pieces).sum()
    }

    /// Cuts one extent from the smallest run that holds it, well aligned if it is long and some run allows that.
    pub fn take_one(&mut self, length: u64) -> Option<Extent> {
        let aligned = if length >= ALIGNMENT {
            self.take_tight(length, ALIGNMENT)
        } else {
            None
        };
        aligned.or_else(|| self.take_tight(length, BLOCK))
    }

    /// Cuts one extent from the smallest run that holds it, beginning at a multiple of `alignment`.
    pub(super) fn take_tight(&mut self, length: u64, alignment: u64) -> Option<Extent> {
        let gaps = self.gaps.iter().enumerate();
        let fitting = gaps.filter_map(|(index, gap)| Some((gap.length, index, gap.fits(length, alignment)?)));
        let (_, index, start) = fitting.min()?;
        Some(self.cut(index, start, length))
    }

    /// Cuts extents of together `length` bytes, as few as possible and at most `pieces`, in the order of the device.
    /// Nothing is cut if it cannot be.
    pub fn take(&mut self, length: u64, pieces: usize) -> Option<Vec<Extent>> {
        if pieces == 0 {
            return None;
        }
        if let Some(extent) = self.take_one(length) {
            return Some(vec![extent]);
        }
        if self.reach(pieces) < length {
            return None;
        }
        // The longest runs whole, and the rest from the smallest run that holds it.
        let mut extents = Vec::new();
        let mut rest = length;
        while rest > 0 {
            let extent = match self.take_one(rest) {
                Some(extent) => extent,
                None => {
                    let gaps = self.gaps.iter().enumerate();
                    let (index, gap) = gaps.max_by_key(|(_, gap)| gap.length)?;
                    let gap = *gap;
                    self.cut(index, gap.start, gap.length)
                }
            };
            rest -= extent.length;
            extents.push(extent);
        }
        extents.sort_unstable_by_key(|extent| extent.start);
        Some(extents)
    }

    /// Cuts up to `length` bytes that begin exactly at `start`; none if that byte is not free.
    pub fn take_at(&mut self, start: u64, length: u64) -> Option<Extent> {
        let index = self.gaps.partition_point(|gap| gap.end() <= start);
        let gap = self.gaps.get(index).filter(|gap| gap.start <= start)?;
        let length = length.min(gap.end() - start);
        (length > 0).then(|| self.cut(index, start, length))
    }

    /// Takes the bytes from a gap that holds them.
    fn cut(&mut self, index: usize, start: u64, length: u64) -> Extent {
        let gap = self.gaps[index];
        debug_assert!(gap.start <= start && start + length <= gap.end());
        let before = Gap {
            start: gap.start,
            length: start - gap.start,
        };
        let after = Gap {
            start: start + length,
            length: gap.end() - start - length,
        };
        let rests = [before, after].into_iter().filter(|rest| rest.length > 0);
        self.gaps.splice(index..=index, rests);
        Extent {
            device: self.device,
            start,
            length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn space(gaps: &[(u64, u64)]) -> DeviceSpace {
        let gaps = gaps.iter().map(|(start, length)| Gap {
            start: *start,
            length: *length,
        });
        DeviceSpace {
            device: DeviceId(0),
            gaps: gaps.collect(),
        }
    }

    fn pairs(extents: &[Extent]) -> Vec<(u64, u64)> {
        extents
            .iter()
            .map(|extent| (extent.start, extent.length))
            .collect()
    }

    #[test]
    fn long_runs_are_aligned_and_short_ones_fill_the_chinks() {
        let mut space = space(&[(MIB / 2, 10 * MIB)]);
        let long = space.take_one(2 * MIB).unwrap();
        assert_eq!((long.start, long.length), (MIB, 2 * MIB));
        let short = space.take_one(BLOCK).unwrap();
        assert_eq!(short.start, MIB / 2);
    }

    #[test]
    fn the_smallest_run_that_holds_it_is_cut() {
        let mut space = space(&[(0, 8 * MIB), (16 * MIB, 2 * MIB), (32 * MIB, 4 * MIB)]);
        assert_eq!(space.take_one(2 * MIB).unwrap().start, 16 * MIB);
        assert_eq!(space.bytes(), 12 * MIB);
    }

    #[test]
    fn a_fragmented_device_gives_as_few_pieces_as_possible() {
        let mut space = space(&[
            (0, BLOCK),
            (2 * MIB, 3 * MIB),
            (8 * MIB, MIB),
            (16 * MIB, 2 * MIB),
        ]);
        let extents = space.take(4 * MIB, 2).unwrap();
        assert_eq!(pairs(&extents), [(2 * MIB, 3 * MIB), (8 * MIB, MIB)]);
        assert_eq!(space.bytes(), 2 * MIB + BLOCK);
    }

    #[test]
    fn too_many_pieces_are_refused_and_nothing_is_cut() {
        let gaps: Vec<_> = (0..100).map(|index| (index * 2 * BLOCK, BLOCK)).collect();
        let mut space = space(&gaps);
        assert_eq!(space.take(65 * BLOCK, MAX_PIECES), None);
        assert_eq!(space.bytes(), 100 * BLOCK);
        assert_eq!(space.reach(MAX_PIECES), 64 * BLOCK);
        assert_eq!(space.take(64 * BLOCK, MAX_PIECES).unwrap().len(), 64);
    }

    #[test]
    fn a_run_is_cut_at_a_given_place_as_far_as_it_is_free() {
        let mut space = space(&[(4 * BLOCK, 4 * BLOCK)]);
        assert_eq!(space.take_at(3 * BLOCK, BLOCK), None);
        let extent = space.take_at(6 * BLOCK, 100 * BLOCK).unwrap();
        assert_eq!((extent.start, extent.length), (6 * BLOCK, 2 * BLOCK));
        assert_eq!(space.take_at(8 * BLOCK, BLOCK), None);
    }
}
