//! An address bus: who answers at which address. The VMM has two, one for I/O ports and one for guest-physical memory.
//!
//! ```text
//!   vCPU thread: exit at address 0x3f8 ──► Bus::write ──► range COM1, offset 0 ──► BusDevice::write
//! ```
//!
//! The ranges are a sorted list behind an atomically exchanged pointer: a vCPU looks up without any lock and never waits
//! for another vCPU, while somebody who inserts or removes (a moved BAR, a hot-plugged card) builds a new list and swaps
//! it in. Hence a device that has just been removed may still be in the middle of an access on another vCPU; it lives until
//! that has ended.
//!
//! Nobody who answers means what it means on a real bus: reads give all ones, writes go nowhere. An access that
//! crosses the end of a range is split there, so a device only ever sees bytes of its own range.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

/// A device that answers a range of addresses.
///
/// The calls come from vCPU threads, several at a time, and a guest waits for their end: the device locks its own state and
/// never blocks on anything outside of the process. `offset` counts from the start of the range and `offset + data.len()`
/// never exceeds its length; the length is 1 to 8 bytes for what a processor does, but not necessarily a power of two.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data` from `offset` on.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why the ranges of a [`Bus`] cannot be changed as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range holds no address.
    #[error("the bus range of {name} ({start:#x}..{end:#x}) is empty")]
    Empty {
        /// Who asked for it.
        name: String,
        /// First address.
        start: u64,
        /// The address after the last.
        end: u64,
    },
    /// Another device has part of the range.
    #[error(
        "{name} cannot answer at {:#x}..{:#x}: {other} has {:#x}..{:#x}",
        range.start, range.end, other_range.start, other_range.end
    )]
    Overlap {
        /// Who asked.
        name: String,
        /// What it asked for.
        range: Range<u64>,
        /// Who is there.
        other: String,
        /// Its range.
        other_range: Range<u64>,
    },
    /// No device has exactly this range.
    #[error("no device has the bus range {:#x}..{:#x}", .0.start, .0.end)]
    Unknown(Range<u64>),
}

/// One device's place on the bus.
#[derive(Clone)]
struct Entry {
    range: Range<u64>,
    name: Arc<str>,
    device: Arc<dyn BusDevice>,
}

/// Addresses and the devices that answer there. Shared by all vCPUs.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, without overlap.
    entries: ArcSwap<Vec<Entry>>,
    /// Held while a new list is made, so that no change is lost. Never held during an access.
    change: Mutex<()>,
}

impl Bus {
    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at all addresses of `range`. `name` is for errors and logs.
    ///
    /// # Errors
    /// The range is empty or overlaps another; nothing has changed then.
    pub fn insert(&self, name: &str, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        self.change(|entries| {
            insert_sorted(
                entries,
                Entry {
                    range,
                    name: name.into(),
                    device,
                },
            )
        })
    }

    /// Takes the device away that has exactly `range`, and returns it.
    ///
    /// # Errors
    /// No device has this range.
    pub fn remove(&self, range: &Range<u64>) -> Result<Arc<dyn BusDevice>, BusError> {
        self.change(|entries| remove_exact(entries, range).map(|entry| entry.device))
    }

    /// Moves the device that has exactly `from` to `to`, in one step: no vCPU sees it absent, or present twice.
    ///
    /// # Errors
    /// No device has `from`, or `to` is empty or overlaps another device; nothing has changed then.
    pub fn relocate(&self, from: &Range<u64>, to: Range<u64>) -> Result<(), BusError> {
        self.change(|entries| {
            let entry = remove_exact(entries, from)?;
            insert_sorted(entries, Entry { range: to, ..entry })
        })
    }

    /// Reads from `address` on. Bytes that no device answers are 0xff.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let entries = self.entries.load();
        let mut at = address;
        let mut rest = data;
        while !rest.is_empty() {
            let (part, entry) = part_at(&entries, at, rest.len());
            let (now, later) = rest.split_at_mut(part);
            match entry {
                Some(entry) => entry.device.read(at - entry.range.start, now),
                None => {
                    tracing::trace!(address = format_args!("{at:#x}"), length = part, "unclaimed read");
                    now.fill(0xff);
                }
            }
            rest = later;
            at = match at.checked_add(part as u64) {
                Some(next) => next,
                None => return rest.fill(0xff),
            };
        }
    }

    /// Writes `data` from `address` on. Bytes that no device takes are lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        let entries = self.entries.load();
        let mut at = address;
        let mut rest = data;
        while !rest.is_empty() {
            let (part, entry) = part_at(&entries, at, rest.len());
            let (now, later) = rest.split_at(part);
            match entry {
                Some(entry) => entry.device.write(at - entry.range.start, now),
                None => tracing::trace!(
                    address = format_args!("{at:#x}"),
                    length = part,
                    "unclaimed write"
                ),
            }
            rest = later;
            at = match at.checked_add(part as u64) {
                Some(next) => next,
                None => return,
            };
        }
    }

    /// All ranges with the names of their devices, in ascending order.
    pub fn ranges(&self) -> Vec<(Range<u64>, String)> {
        self.entries
            .load()
            .iter()
            .map(|entry| (entry.range.clone(), entry.name.to_string()))
            .collect()
    }

    /// Puts the list in place that `edit` makes of the present one, unless it fails.
    fn change<T>(&self, edit: impl FnOnce(&mut Vec<Entry>) -> Result<T, BusError>) -> Result<T, BusError> {
        // The guarded value is `()`: a panic of another holder cannot have left it inconsistent.
        let _changing = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.entries.load().as_ref().clone();
        let result = edit(&mut entries)?;
        self.entries.store(Arc::new(entries));
        Ok(result)
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self.ranges();
        formatter
            .debug_map()
            .entries(
                ranges
                    .iter()
                    .map(|(range, name)| (format!("{:#x}..{:#x}", range.start, range.end), name)),
            )
            .finish()
    }
}

/// How many of the `length` bytes from `address` on are alike: all answered by the returned entry, or by nobody.
fn part_at(entries: &[Entry], address: u64, length: usize) -> (usize, Option<&Entry>) {
    let next = entries.partition_point(|entry| entry.range.end <= address);
    let limit = |end: u64| usize::try_from(end - address).map_or(length, |room| length.min(room));
    match entries.get(next) {
        Some(entry) if entry.range.start <= address => (limit(entry.range.end), Some(entry)),
        Some(entry) => (limit(entry.range.start), None),
        None => (length, None),
    }
}

/// Inserts `entry` at its place.
fn insert_sorted(entries: &mut Vec<Entry>, entry: Entry) -> Result<(), BusError> {
    if entry.range.is_empty() {
        return Err(BusError::Empty {
            name: entry.name.to_string(),
            start: entry.range.start,
            end: entry.range.end,
        });
    }
    let place = entries.partition_point(|other| other.range.end <= entry.range.start);
    if let Some(other) = entries
        .get(place)
        .filter(|other| other.range.start < entry.range.end)
    {
        return Err(BusError::Overlap {
            name: entry.name.to_string(),
            range: entry.range.clone(),
            other: other.name.to_string(),
            other_range: other.range.clone(),
        });
    }
    entries.insert(place, entry);
    Ok(())
}

/// Takes the entry out that has exactly `range`.
fn remove_exact(entries: &mut Vec<Entry>, range: &Range<u64>) -> Result<Entry, BusError> {
    match entries.iter().position(|entry| entry.range == *range) {
        Some(place) => Ok(entries.remove(place)),
        None => Err(BusError::Unknown(range.clone())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads as its tag, notes what is written, and insists on staying within its range.
    struct Probe {
        tag: u8,
        length: u64,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Probe {
        fn new(tag: u8, length: u64) -> Arc<Self> {
            Arc::new(Self {
                tag,
                length,
                written: Mutex::default(),
            })
        }
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            assert!(offset + data.len() as u64 <= self.length);
            data.fill(self.tag);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            assert!(offset + data.len() as u64 <= self.length);
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn unclaimed_reads_are_all_ones_and_unclaimed_writes_are_ignored() {
        let bus = Bus::new();
        let mut data = [0; 4];
        bus.read(0x80, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(0x80, &[1]);
    }

    #[test]
    fn access_that_crosses_ranges_and_a_gap_is_split() {
        let bus = Bus::new();
        let (low, high) = (Probe::new(0x11, 2), Probe::new(0x22, 4));
        bus.insert("low", 0x10..0x12, low.clone()).unwrap();
        bus.insert("high", 0x13..0x17, high.clone()).unwrap();

        let mut data = [0; 8];
        bus.read(0x0f, &mut data);
        assert_eq!(data, [0xff, 0x11, 0x11, 0xff, 0x22, 0x22, 0x22, 0x22]);
        bus.write(0x11, &[1, 2, 3, 4]);
        assert_eq!(*low.written.lock().unwrap(), [(1, vec![1])]);
        assert_eq!(*high.written.lock().unwrap(), [(0, vec![3, 4])]);
    }

    #[test]
    fn access_at_the_end_of_the_address_space_does_not_wrap() {
        let bus = Bus::new();
        bus.insert("first", 0..8, Probe::new(0, 8)).unwrap();
        bus.insert("last", u64::MAX - 1..u64::MAX, Probe::new(1, 1))
            .unwrap();
        let mut data = [7; 4];
        bus.read(u64::MAX - 1, &mut data);
        assert_eq!(data, [1, 0xff, 0xff, 0xff]);
        bus.write(u64::MAX - 1, &data);
        bus.write(u64::MAX, &data);
    }

    #[test]
    fn overlap_is_refused_and_names_both_devices() {
        let bus = Bus::new();
        bus.insert("COM1", 0x3f8..0x400, Probe::new(0, 8)).unwrap();
        let error = bus.insert("CMOS", 0x3ff..0x401, Probe::new(0, 2)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CMOS cannot answer at 0x3ff..0x401: COM1 has 0x3f8..0x400"
        );
        for range in [0x3f8..0x400, 0x3f0..0x3f9, 0x3fa..0x3fb, 0..0x1000] {
            assert!(matches!(
                bus.insert("other", range, Probe::new(0, 1)),
                Err(BusError::Overlap { .. })
            ));
        }
        bus.insert("before", 0x3f0..0x3f8, Probe::new(0, 8)).unwrap();
        bus.insert("behind", 0x400..0x408, Probe::new(0, 8)).unwrap();
        assert_eq!(bus.ranges().len(), 3);
    }

    #[test]
    fn empty_range_is_refused() {
        let error = Bus::new().insert("void", 5..5, Probe::new(0, 0)).unwrap_err();
        assert_eq!(error.to_string(), "the bus range of void (0x5..0x5) is empty");
    }

    #[test]
    fn removed_device_answers_no_more() {
        let bus = Bus::new();
        bus.insert("port", 1..2, Probe::new(0, 1)).unwrap();
        assert_eq!(bus.remove(&(1..3)).err(), Some(BusError::Unknown(1..3)));
        bus.remove(&(1..2)).unwrap();
        let mut data = [0];
        bus.read(1, &mut data);
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn relocation_that_fails_leaves_the_device_where_it_was() {
        let bus = Bus::new();
        bus.insert("bar", 0x1000..0x2000, Probe::new(3, 0x1000)).unwrap();
        bus.insert("other", 0x3000..0x4000, Probe::new(4, 0x1000))
            .unwrap();
        assert!(bus.relocate(&(0x1000..0x2000), 0x2800..0x3800).is_err());
        let mut data = [0];
        bus.read(0x1000, &mut data);
        assert_eq!(data, [3]);

        // The new place may overlap the old one.
        bus.relocate(&(0x1000..0x2000), 0x1800..0x2800).unwrap();
        bus.read(0x2000, &mut data);
        assert_eq!(data, [3]);
        bus.read(0x1000, &mut data);
        assert_eq!(data, [0xff]);
    }

    proptest! {
        #[test]
        fn any_access_reads_what_a_byte_map_of_the_ranges_says(
            ranges in prop::collection::vec((0_u64..200, 1_u64..20), 0..20),
            address in 0_u64..220,
            length in 0_usize..40,
        ) {
            let bus = Bus::new();
            let mut map = [0xff_u8; 300];
            for (tag, (start, size)) in (0_u8..).zip(ranges) {
                let free = (start..start + size).all(|at| map[usize::try_from(at).unwrap()] == 0xff);
                let inserted = bus.insert("probe", start..start + size, Probe::new(tag, size));
                prop_assert_eq!(inserted.is_ok(), free);
                if free {
                    (start..start + size).for_each(|at| map[usize::try_from(at).unwrap()] = tag);
                }
            }
            let mut data = vec![0x77; length];
            bus.read(address, &mut data);
            let start = usize::try_from(address).unwrap();
            prop_assert_eq!(&data[..], &map[start..start + length]);
            bus.write(address, &data);
        }
    }
}
