//! A new section: its shape, its devices, its extents.

use super::choose::{Candidate, Wanted, choose};
use super::error::{PlaceError, Shortage, Unfit};
use super::free::{ALIGNMENT, DeviceSpace, FreeSpace, MAX_PIECES, data_area};
use super::{Rules, Spread, spread};
use crate::model::{
    Attributes, BLOCK, Column, Configuration, DeviceId, Extent, Layout, MAX_COLUMNS, Member, MemberId,
    MemberState, Section,
};

/// Most legs of a mirror that can be asked for.
pub const MAX_LEGS: u32 = 8;

/// Bytes per column and row where a person names none.
pub const DEFAULT_STRIPE_UNIT: u64 = 64 << 10;

/// Length of a parity log in a pool of devices large enough.
const LOG_SIZE: u64 = 4 << 20;

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct SectionRequest<'a> {
    /// Bytes of the volume, whole blocks.
    pub length: u64,
    /// Layout, class, devices. Columns and legs must be given: see [`resolve_layout`].
    pub attributes: &'a Attributes,
    /// The volume's logical block size: devices with larger ones are not used.
    pub block: u32,
    /// Devices that are not to be used.
    pub excluded: &'a [DeviceId],
    /// Spares may be used.
    pub use_spares: bool,
    /// Bytes that must remain free, in one piece, on each of the [`log_devices`](super::log_devices): for the volume's bitmap,
    /// if the section is the first one. Whole blocks.
    pub bitmap: u64,
    /// State of all new members.
    pub state: MemberState,
    /// Number of the new section: the volume's `next_section`.
    pub number: u32,
    /// Number of the first new member: the volume's `next_member`.
    pub first_member: u32,
}

/// A section whose extents were all free in the configuration that it was placed by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedSection {
    /// It.
    pub section: Section,
    /// Whether it outlives the failure of an enclosure.
    pub spread: Spread,
    /// For the volume's `next_member`.
    pub next_member: u32,
}

/// Numbers that follow from a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) wanted: Wanted,
    /// Parity units per row.
    pub(super) parity: u32,
    /// Bytes per column and row.
    pub(super) unit: u64,
    /// Bytes of a member.
    pub(super) member: u64,
    /// Bytes of a copy of the parity log, 0 if there is none.
    pub(super) log: u64,
    /// Bytes of a copy of the bitmap.
    pub(super) bitmap: u64,
}

fn invalid<T>(message: impl Into<String>) -> Result<T, PlaceError> {
    Err(PlaceError::Invalid(message.into()))
}

/// Whether a layout is one that there is.
pub(super) fn check_layout(layout: Layout) -> Result<(), PlaceError> {
    let (columns, legs) = (layout.columns(), layout.legs());
    let least = match layout {
        Layout::Concat | Layout::Mirror { .. } => 1,
        Layout::Stripe { .. } | Layout::StripeMirror { .. } => 2,
        Layout::Raid5 { .. } => 3,
        Layout::Raid6 { .. } => 4,
    };
    if columns < least || columns as usize > MAX_COLUMNS {
        return invalid(format!(
            "a {layout} cannot be: {least} to {MAX_COLUMNS} columns, not {columns}"
        ));
    }
    let mirrored = matches!(layout, Layout::Mirror { .. } | Layout::StripeMirror { .. });
    if mirrored && !(2..=MAX_LEGS).contains(&legs) {
        return invalid(format!("a {layout} cannot be: 2 to {MAX_LEGS} legs, not {legs}"));
    }
    Ok(())
}

/// Bytes of a copy of the parity log: 4 MiB, in pools of small devices a sixteenth of the `smallest` data area, but at least four
/// full rows of all columns and a quarter more for its own records. None if that is beyond all bounds.
pub fn log_size(columns: u64, unit: u64, smallest: u64) -> Option<u64> {
    let rows = columns.checked_mul(unit)?.checked_mul(5)?;
    rows.max(LOG_SIZE.min(smallest / 16))
        .checked_next_multiple_of(BLOCK)
}

impl Shape {
    /// Checks a request and computes its numbers; `smallest` is the smallest data area that may be used.
    pub(super) fn of(request: &SectionRequest<'_>, smallest: u64) -> Result<Self, PlaceError> {
        let (length, attributes) = (request.length, request.attributes);
        check_layout(attributes.layout)?;
        if length == 0 || !length.is_multiple_of(BLOCK) {
            return invalid(format!(
                "a length of {length} bytes is not a positive multiple of {BLOCK}"
            ));
        }
        if !request.bitmap.is_multiple_of(BLOCK) {
            return invalid(format!(
                "a bitmap of {} bytes is not a multiple of {BLOCK}",
                request.bitmap
            ));
        }
        let (layout, parity) = (attributes.layout, attributes.layout.parity());
        let columns = layout.columns();
        let data = u64::from(columns - parity);
        let unit = if columns == 1 {
            length
        } else {
            attributes.stripe_unit
        };
        if columns > 1 && !(unit.is_power_of_two() && unit >= BLOCK) {
            return invalid(format!(
                "a stripe unit of {unit} bytes is not a power of two of at least {BLOCK}"
            ));
        }
        let member = unit
            .checked_mul(data)
            .and_then(|row| length.div_ceil(row).checked_mul(unit));
        let log = match parity {
            0 => Some(0),
            _ => log_size(columns.into(), unit, smallest),
        };
        let (Some(member), Some(log)) = (member, log) else {
            return invalid(format!(
                "a {layout} of {length} bytes with a stripe unit of {unit} bytes is too large"
            ));
        };
        let total = member
            .checked_add(log)
            .and_then(|sum| sum.checked_add(request.bitmap));
        if total.is_none() {
            return invalid(format!("a {layout} of {length} bytes is too large"));
        }
        let large = match (parity, layout.legs()) {
            (0, 1) => 0,
            (0, legs) => legs,
            (parity, _) => parity + 1,
        };
        let wanted = Wanted {
            columns: columns as usize,
            legs: layout.legs() as usize,
            parity: parity as usize,
            large: large as usize,
        };
        Ok(Self {
            wanted,
            parity,
            unit,
            member,
            log,
            bitmap: request.bitmap,
        })
    }

    /// Bytes besides the member on a device with logs.
    fn extra(&self) -> u64 {
        self.log + self.bitmap
    }

    /// Whether a device has room for a member, and for logs besides it.
    fn fits(&self, space: &DeviceSpace) -> (bool, bool) {
        // Beyond doubt, and quickly decided.
        let longest = space.longest();
        if longest
            >= self
                .member
                .saturating_add(self.extra())
                .saturating_add(2 * ALIGNMENT)
        {
            return (true, true);
        }
        let member = space.reach(MAX_PIECES) >= self.member;
        let large = member && cut(&mut space.clone(), self).is_some();
        (member, large)
    }
}

/// Cuts a member, a log and a copy of the bitmap (0 bytes: none). If the member leaves no runs that are long enough for the others,
/// these are cut before it, the longer one first, as tightly as can be.
fn cut(space: &mut DeviceSpace, shape: &Shape) -> Option<(Vec<Extent>, Option<Extent>)> {
    let mut singles = [shape.log, shape.bitmap];
    singles.sort_unstable_by(|a, b| b.cmp(a));
    let needed = singles.iter().filter(|length| **length > 0);
    let log = |cut: Vec<Extent>| cut.into_iter().find(|extent| extent.length == shape.log);
    let before = space.clone();
    if let Some(extents) = space.take(shape.member, MAX_PIECES)
        && let Some(singles) = needed.clone().map(|length| space.take_one(*length)).collect()
    {
        return Some((extents, log(singles)));
    }
    *space = before;
    let singles = needed
        .map(|length| space.take_tight(*length, BLOCK))
        .collect::<Option<_>>()?;
    Some((space.take(shape.member, MAX_PIECES)?, log(singles)))
}

/// Devices that may be used, those that may not, and how small the smallest is.
pub(super) struct Field<'a> {
    pub(super) allowed: Vec<&'a crate::model::Device>,
    unfit: Vec<(DeviceId, Unfit)>,
    pub(super) smallest: u64,
}

impl<'a> Field<'a> {
    pub(super) fn of(config: &'a Configuration, request: &SectionRequest<'_>) -> Result<Self, PlaceError> {
        let mut named = request.attributes.devices.iter();
        if let Some(unknown) = named.find(|id| config.device(**id).is_none()) {
            return Err(PlaceError::NoSuchDevice(*unknown));
        }
        let rules = Rules {
            attributes: request.attributes,
            block: request.block,
            excluded: request.excluded,
            use_spares: request.use_spares,
            only: None,
        };
        let mut field = Self {
            allowed: Vec::new(),
            unfit: Vec::new(),
            smallest: u64::MAX,
        };
        for device in &config.devices {
            match rules.judge(device) {
                Ok(()) => {
                    let (start, end) = data_area(device);
                    field.smallest = field.smallest.min(end - start);
                    field.allowed.push(device);
                }
                Err(unfit) => field.unfit.push((device.id, unfit)),
            }
        }
        Ok(field)
    }
}

/// Places a new section.
///
/// # Errors
/// [`PlaceError::Invalid`], [`PlaceError::NoSuchDevice`] for attributes that name a device of another pool,
/// [`PlaceError::Shortage`] if too few devices have room.
pub fn place_section(
    config: &Configuration,
    request: &SectionRequest<'_>,
) -> Result<PlacedSection, PlaceError> {
    place_section_in(config, &mut FreeSpace::of(config), request)
}

/// As [`place_section`], from the space that is given, which is less afterwards.
pub(super) fn place_section_in(
    config: &Configuration,
    space: &mut FreeSpace,
    request: &SectionRequest<'_>,
) -> Result<PlacedSection, PlaceError> {
    let field = Field::of(config, request)?;
    let shape = Shape::of(request, field.smallest)?;
    let mut candidates = Vec::new();
    let mut unfit = field.unfit;
    for device in field.allowed {
        let Some(space) = space.device(device.id) else {
            continue;
        };
        let (fits, large) = shape.fits(space);
        let (free, longest) = (space.bytes(), space.longest());
        match fits {
            true => candidates.push(Candidate {
                device: device.id,
                enclosure: &device.enclosure,
                free,
                whole: longest >= shape.member,
                large,
            }),
            false if free >= shape.member => unfit.push((device.id, Unfit::Fragmented { free, longest })),
            false => unfit.push((device.id, Unfit::Full { free })),
        }
    }
    let section =
        choose(&candidates, shape.wanted).and_then(|devices| fill(space, &shape, &devices, request));
    let Some(section) = section else {
        unfit.sort_by_key(|(device, _)| *device);
        let fit = candidates
            .iter()
            .map(|candidate| (candidate.device, candidate.free));
        return Err(PlaceError::Shortage(Box::new(Shortage {
            what: request.attributes.layout.to_string(),
            devices: shape.wanted.columns * shape.wanted.legs,
            each: shape.member,
            larger: shape.wanted.large,
            larger_each: shape.member + shape.extra(),
            class: request.attributes.class.clone(),
            fit: fit.collect(),
            unfit,
            largest: None,
        })));
    };
    let spread = spread(config, &section);
    let members: usize = section.columns.iter().map(|column| column.members.len()).sum();
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    Ok(PlacedSection {
        section,
        spread,
        next_member: request.first_member.saturating_add(members),
    })
}

/// Cuts the members and logs from the devices chosen, in the order of columns and legs.
pub(super) fn fill(
    space: &mut FreeSpace,
    shape: &Shape,
    devices: &[DeviceId],
    request: &SectionRequest<'_>,
) -> Option<Section> {
    let mut members = Vec::new();
    let mut log = Vec::new();
    for ((number, id), device) in (0..).zip(request.first_member..).zip(devices) {
        let space = space.device_mut(*device)?;
        let extents = if number < shape.wanted.large {
            let (extents, copy) = cut(space, shape)?;
            log.extend(copy);
            extents
        } else {
            space.take(shape.member, MAX_PIECES)?
        };
        members.push(Member {
            id: MemberId(id),
            state: request.state,
            extents,
        });
    }
    let columns = members.chunks(shape.wanted.legs).map(|members| Column {
        members: members.to_vec(),
    });
    Some(Section {
        id: request.number,
        length: request.length,
        unit: shape.unit,
        parity: shape.parity,
        rotation: 0,
        columns: columns.collect(),
        log,
    })
}

/// The columns and legs to take where a person gave none (0): as many as there is room for, but not more than is sensible: 2
/// legs; 8 columns for a stripe, 4 for a stripe of mirrors, 5 (4+1) for raid5, 6 (4+2) for raid6. The fewest that there can be
/// if there is room for none, so that placing says what is missing. Numbers that are given stay.
pub fn resolve_layout(config: &Configuration, request: &SectionRequest<'_>) -> Layout {
    let or = |given: u32, default: u32| if given == 0 { default } else { given };
    let with_columns = |columns: u32| match request.attributes.layout {
        Layout::Concat => Layout::Concat,
        Layout::Mirror { legs } => Layout::Mirror { legs: or(legs, 2) },
        Layout::StripeMirror { legs, .. } => Layout::StripeMirror {
            columns,
            legs: or(legs, 2),
        },
        Layout::Stripe { .. } => Layout::Stripe { columns },
        Layout::Raid5 { .. } => Layout::Raid5 { columns },
        Layout::Raid6 { .. } => Layout::Raid6 { columns },
    };
    let (least, most) = match request.attributes.layout {
        Layout::Concat | Layout::Mirror { .. } => (1, 1),
        Layout::Stripe { .. } => (2, 8),
        Layout::StripeMirror { .. } => (2, 4),
        Layout::Raid5 { .. } => (3, 5),
        Layout::Raid6 { .. } => (4, 6),
    };
    let given = request.attributes.layout.columns();
    if given != 0 {
        return with_columns(given);
    }
    let space = FreeSpace::of(config);
    let mut attributes = request.attributes.clone();
    let layouts = (least..=most).rev().map(with_columns);
    let mut possible = layouts.filter(|layout| {
        attributes.layout = *layout;
        let request = SectionRequest {
            attributes: &attributes,
            ..*request
        };
        place_section_in(config, &mut space.clone(), &request).is_ok()
    });
    possible.next().unwrap_or(with_columns(least))
}
