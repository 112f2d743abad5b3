//! A whole volume: one section where one is possible, otherwise several, one after the other on different devices.
//!
//! When is there room at all? A column of `X` rows on each of `n` slots (legs × columns), never two on one device at the same
//! place: a device with room for `c` rows is of use for `min(c, X)` of them, so there is room if and only if these add up to
//! `n × X`. Then this always finds it: write the devices one after the other on a line, and cut the line into `n` columns of `X`.
//! As no device is longer than a column, none meets itself where it goes on in the next column. Between two neighbouring cuts all
//! columns have one device each: that is a section.
//!
//! ```text
//!   devices  ├── d0 (5) ──┼─ d1 (4) ─┼─ d2 (3) ┤           X = 6, n = 2
//!   slot 0   d0 d0 d0 d0 d0 d1
//!   slot 1   d1 d1 d1 d2 d2 d2
//!   sections └────0─┘ └─1─┘ └2       rows 0..3 on d0 d1, 3..5 on d0 d2, 5..6 on d1 d2
//! ```
//!
//! Devices of one enclosure stand side by side on the line, and are given no more of it than the layout tolerates where the others
//! have room for the rest; so an enclosure does not meet itself either.

use super::error::PlaceError;
use super::free::{FreeSpace, MAX_PIECES};
use super::member::place_bitmap_in;
use super::section::{Field, SectionRequest, Shape, fill, place_section_in};
use super::{Spread, log_devices, spread};
use crate::model::{BLOCK, Configuration, Device, DeviceId, Extent, Section};

/// All that a new volume needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedVolume {
    /// In order.
    pub sections: Vec<Section>,
    /// The devices of its activity log.
    pub log_devices: Vec<DeviceId>,
    /// A copy on each of them, if the request names its length.
    pub bitmap: Vec<Extent>,
    /// Whether it outlives the failure of an enclosure.
    pub spread: Spread,
    /// For the volume.
    pub next_member: u32,
    /// For the volume.
    pub next_section: u32,
}

/// Places a volume of `request.length` bytes.
///
/// # Errors
/// As [`place_section`](super::place_section); the shortage says how large a volume could be.
pub fn place_volume(
    config: &Configuration,
    request: &SectionRequest<'_>,
) -> Result<PlacedVolume, PlaceError> {
    place_volume_in(config, &mut FreeSpace::of(config), request)
}

/// As [`place_volume`], from the space that is given, which is less afterwards by the volume: for many volumes at once. Of the
/// configuration only the devices matter.
///
/// # Errors
/// As [`place_volume`]; then nothing is taken.
pub fn place_volume_in(
    config: &Configuration,
    space: &mut FreeSpace,
    request: &SectionRequest<'_>,
) -> Result<PlacedVolume, PlaceError> {
    let sections = match place_section_in(config, &mut space.clone(), request) {
        Ok(placed) => vec![placed.section],
        Err(PlaceError::Shortage(mut shortage)) => match split(config, space, request)? {
            Split::Sections(sections) => sections,
            Split::AtMost(largest) => {
                shortage.largest = Some(largest);
                return Err(PlaceError::Shortage(shortage));
            }
        },
        Err(error) => return Err(error),
    };
    let log_devices = sections.first().map(log_devices).unwrap_or_default();
    let mut rest = space.clone();
    for extent in sections.iter().flat_map(Section::extents) {
        if let Some(own) = rest.device_mut(extent.device) {
            own.take_at(extent.start, extent.length);
        }
    }
    let bitmap = match request.bitmap > 0 && !log_devices.is_empty() {
        true => place_bitmap_in(&mut rest, &[], &log_devices, request.bitmap)?,
        false => Vec::new(),
    };
    *space = rest;
    let weak = sections
        .iter()
        .any(|section| spread(config, section) == Spread::Devices);
    let members = sections
        .iter()
        .flat_map(|section| &section.columns)
        .flat_map(|column| &column.members);
    let next_member = members.map(|member| member.id.0.saturating_add(1)).max();
    let next_section = sections.iter().map(|section| section.id.saturating_add(1)).max();
    Ok(PlacedVolume {
        log_devices,
        bitmap,
        spread: if weak { Spread::Devices } else { Spread::Enclosures },
        next_member: next_member.unwrap_or(request.first_member),
        next_section: next_section.unwrap_or(request.number),
        sections,
    })
}

/// What several sections can do.
pub(super) enum Split {
    /// There is room.
    Sections(Vec<Section>),
    /// Bytes that there is room for.
    AtMost(u64),
}

/// Places several sections where a single one is impossible.
pub(super) fn split(
    config: &Configuration,
    space: &FreeSpace,
    request: &SectionRequest<'_>,
) -> Result<Split, PlaceError> {
    let field = Field::of(config, request)?;
    let shape = Shape::of(request, field.smallest)?;
    let line = Line {
        devices: &field.allowed,
        space,
        slots: shape.wanted.columns * shape.wanted.legs,
        single: shape.wanted.columns == 1,
        shape,
        request,
    };
    let rows = line.rows(request.length);
    if let Some(sections) = line.place(rows, request.length) {
        return Ok(Split::Sections(sections));
    }
    // As many rows as there is room for.
    let capacities = line.capacities(&vec![1; line.devices.len()], shape.bitmap);
    let (mut possible, mut impossible) = (0, rows);
    while impossible - possible > 1 {
        let middle = possible + (impossible - possible) / 2;
        match line.enough(&capacities, middle) {
            true => possible = middle,
            false => impossible = middle,
        }
    }
    // Without logs that is exact. Sections in between may need more logs than there is room for: then it is an estimate from below.
    let fits = |rows: u64| rows == 0 || line.place(rows, rows.saturating_mul(line.row())).is_some();
    if !fits(possible) {
        (possible, impossible) = (0, possible);
        while impossible - possible > 1 {
            let middle = possible + (impossible - possible) / 2;
            match fits(middle) {
                true => possible = middle,
                false => impossible = middle,
            }
        }
    }
    Ok(Split::AtMost(possible.saturating_mul(line.row())))
}

/// The line of devices that is cut into columns.
struct Line<'a> {
    devices: &'a [&'a Device],
    space: &'a FreeSpace,
    /// Columns × legs.
    slots: usize,
    /// There is one column, whose unit is its length; its "rows" are blocks.
    single: bool,
    shape: Shape,
    request: &'a SectionRequest<'a>,
}

/// A device's place on the line: it reaches to `end`, from where the one before ends.
struct Run {
    device: usize,
    end: u128,
}

impl Line<'_> {
    /// Bytes of a member per row.
    fn unit(&self) -> u64 {
        if self.single { BLOCK } else { self.shape.unit }
    }

    /// Bytes of the volume per row.
    fn row(&self) -> u64 {
        let data = self.shape.wanted.columns - self.shape.wanted.parity;
        self.unit().saturating_mul(data as u64)
    }

    fn rows(&self, length: u64) -> u64 {
        length.div_ceil(self.row())
    }

    /// Rows that each device has room for besides so many parity logs, and a bitmap.
    fn capacities(&self, logs: &[u64], bitmap: u64) -> Vec<u64> {
        let devices = self.devices.iter().zip(logs);
        let capacity = |(device, logs): (&&Device, &u64)| {
            let free = self
                .space
                .device(device.id)
                .map_or(0, |space| space.reach(MAX_PIECES));
            let besides = self.shape.log.saturating_mul(*logs).saturating_add(bitmap);
            free.saturating_sub(besides) / self.unit()
        };
        devices.map(capacity).collect()
    }

    /// Whether columns of so many rows can be filled.
    fn enough(&self, capacities: &[u64], rows: u64) -> bool {
        let sum: u128 = capacities
            .iter()
            .map(|capacity| u128::from(rows.min(*capacity)))
            .sum();
        sum >= self.slots as u128 * u128::from(rows)
    }

    /// Tries, with more and more room left for logs and the bitmap.
    fn place(&self, rows: u64, length: u64) -> Option<Vec<Section>> {
        let mut logs = vec![u64::from(self.shape.log > 0); self.devices.len()];
        for bitmap in [0, self.shape.bitmap, self.shape.bitmap] {
            let runs = self.runs(&self.capacities(&logs, bitmap), rows)?;
            let cuts = cuts(&runs, rows);
            if let Some(sections) = self.sections(&runs, &cuts, rows, length) {
                return Some(sections);
            }
            // A device may have a log in each section that it is part of.
            if self.shape.log > 0 {
                for (device, logs) in logs.iter_mut().enumerate() {
                    let parts = cuts
                        .windows(2)
                        .filter(|pair| self.holders(&runs, pair[0], rows).contains(&device));
                    *logs = (parts.count() as u64).max(1);
                }
            }
        }
        None
    }

    /// The line of devices, as long as the columns together.
    fn runs(&self, capacities: &[u64], rows: u64) -> Option<Vec<Run>> {
        if !self.enough(capacities, rows) {
            return None;
        }
        // Devices of one enclosure side by side, those with much room first.
        let mut order: Vec<usize> = (0..self.devices.len()).collect();
        order.sort_by_key(|index| {
            let device = self.devices[*index];
            (
                &device.enclosure,
                std::cmp::Reverse(capacities[*index]),
                device.id,
            )
        });
        let mut groups: Vec<Vec<(usize, u64)>> = Vec::new();
        for index in order {
            let run = (index, capacities[index].min(rows));
            let enclosure = |index: usize| self.devices[index].enclosure.as_str();
            match groups.last_mut() {
                Some(group) if !enclosure(index).is_empty() && enclosure(group[0].0) == enclosure(index) => {
                    group.push(run);
                }
                _ => groups.push(vec![run]),
            }
        }
        let total = |group: &Vec<(usize, u64)>| group.iter().map(|(_, rows)| u128::from(*rows)).sum::<u128>();
        groups.sort_by_key(|group| std::cmp::Reverse(total(group)));
        let (need, wanted) = (self.slots as u128 * u128::from(rows), self.shape.wanted);
        let tolerated = match (wanted.parity, wanted.legs) {
            (0, 1) => self.slots,
            (0, _) => wanted.columns,
            (parity, _) => parity,
        };
        // The least share that lets the enclosures fill the line.
        let shares = (tolerated..=self.slots).map(|share| share as u128 * u128::from(rows));
        let mut enough =
            shares.filter(|share| groups.iter().map(|group| total(group).min(*share)).sum::<u128>() >= need);
        let share = enough.next()?;
        let mut runs = Vec::new();
        let mut end = 0_u128;
        for group in &groups {
            let mut left = share;
            for (device, rows) in group {
                let length = u128::from(*rows).min(left).min(need - end);
                left -= length;
                end += length;
                if length > 0 {
                    runs.push(Run { device: *device, end });
                }
            }
        }
        (end == need).then_some(runs)
    }

    /// The device of each slot at a row.
    fn holders(&self, runs: &[Run], row: u64, rows: u64) -> Vec<usize> {
        let slots = 0..self.slots as u128;
        let at = slots.map(|slot| slot * u128::from(rows) + u128::from(row));
        at.filter_map(|position| {
            let index = runs.partition_point(|run| run.end <= position);
            Some(runs.get(index)?.device)
        })
        .collect()
    }

    /// Places a section between each two cuts.
    fn sections(&self, runs: &[Run], cuts: &[u64], rows: u64, length: u64) -> Option<Vec<Section>> {
        let mut space = self.space.clone();
        let (mut number, mut member) = (self.request.number, self.request.first_member);
        let mut sections = Vec::new();
        let wanted = self.shape.wanted;
        for (index, pair) in cuts.windows(2).enumerate() {
            let [first, end] = pair else { continue };
            let begin = first.checked_mul(self.row())?;
            let part = end.saturating_mul(self.row()).min(length).checked_sub(begin)?;
            let bytes = (end - first).checked_mul(self.unit())?;
            let shape = Shape {
                unit: if self.single { bytes } else { self.shape.unit },
                member: bytes,
                bitmap: if index == 0 { self.shape.bitmap } else { 0 },
                ..self.shape
            };
            let request = SectionRequest {
                length: part,
                number,
                first_member: member,
                ..*self.request
            };
            // Slots one after the other go to different columns: what is side by side on the line meets in no column.
            let slots = self.holders(runs, *first, rows);
            let legs =
                (0..wanted.columns).flat_map(|column| slots.iter().skip(column).step_by(wanted.columns));
            let devices: Vec<_> = legs.map(|device| self.devices[*device].id).collect();
            sections.push(fill(&mut space, &shape, &devices, &request)?);
            number = number.checked_add(1)?;
            member = member.checked_add(u32::try_from(self.slots).ok()?)?;
        }
        Some(sections)
    }
}

/// Rows at which some slot goes on on another device, with the first and the last.
fn cuts(runs: &[Run], rows: u64) -> Vec<u64> {
    let within = runs.iter().map(|run| run.end % u128::from(rows));
    let mut cuts: Vec<u64> = within.filter_map(|row| u64::try_from(row).ok()).collect();
    cuts.extend([0, rows]);
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}
