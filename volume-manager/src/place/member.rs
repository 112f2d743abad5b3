//! Single pieces: a member for a leg that is added, moved or rebuilt; a copy of a parity log; the copies of a bitmap.

use std::cmp::Reverse;

use super::error::{PlaceError, Shortage, Unfit};
use super::free::{FreeSpace, MAX_PIECES};
use super::section::log_size;
use super::{Rules, Spread, devices_of, log_devices, member_devices, spread};
use crate::model::{
    Configuration, Device, DeviceId, DeviceState, Extent, MAX_MEMBERS, Member, MemberId, MemberState,
    Section, Volume, VolumeId,
};

/// Which column gets a member.
#[derive(Debug, Clone, Copy)]
pub struct MemberRequest<'a> {
    /// The volume.
    pub volume: VolumeId,
    /// Index of the section.
    pub section: usize,
    /// Index of the column.
    pub column: usize,
    /// The member of the column that will go when the new one is filled: it does not count for the spread. The new one never lies
    /// on its device.
    pub replaces: Option<MemberId>,
    /// On this device, which a person chose: its class, or that it is a spare, does not matter.
    pub to: Option<DeviceId>,
    /// Not on these devices.
    pub excluded: &'a [DeviceId],
    /// Spares may be used, and are preferred: this is what they are for.
    pub use_spares: bool,
    /// The new member's state.
    pub state: MemberState,
}

/// A new member for a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedMember {
    /// It; its number is the volume's `next_member`.
    pub member: Member,
    /// Whether the section outlives the failure of an enclosure, once the new member is in sync and the other gone.
    pub spread: Spread,
}

/// The section of a volume, or an error that names what is missing.
fn find(config: &Configuration, id: VolumeId, section: usize) -> Result<(&Volume, &Section), PlaceError> {
    let missing = |what: &str| PlaceError::NoSuchPlace {
        volume: id,
        what: what.into(),
    };
    let volume = config.volume(id).ok_or_else(|| missing("place in this pool"))?;
    let section = volume.sections.get(section);
    Ok((volume, section.ok_or_else(|| missing("such section"))?))
}

/// Places a member, as long as the others of its section, on one device that holds no other member of it.
///
/// # Errors
/// [`PlaceError::NoSuchPlace`], [`PlaceError::NoSuchDevice`] for `to`, [`PlaceError::Shortage`].
pub fn place_member(config: &Configuration, request: &MemberRequest<'_>) -> Result<PlacedMember, PlaceError> {
    let (volume, section) = find(config, request.volume, request.section)?;
    let missing = |what: &str| PlaceError::NoSuchPlace {
        volume: request.volume,
        what: what.into(),
    };
    let column = section
        .columns
        .get(request.column)
        .ok_or_else(|| missing("such column"))?;
    if let Some(id) = request.replaces
        && column.members.iter().all(|member| member.id != id)
    {
        return Err(missing("such member in that column"));
    }
    if column.members.len() >= MAX_MEMBERS {
        let message = format!("a column of {MAX_MEMBERS} members can have no more");
        return Err(PlaceError::Invalid(message));
    }
    let length = column.members.first().map_or(0, Member::length);
    if let Some(to) = request.to.filter(|to| config.device(*to).is_none()) {
        return Err(PlaceError::NoSuchDevice(to));
    }

    let mut excluded = request.excluded.to_vec();
    excluded.extend(member_devices(section));
    let rules = Rules {
        attributes: &volume.attributes,
        block: volume.block,
        excluded: &excluded,
        use_spares: request.use_spares || request.to.is_some(),
        only: request.to,
    };
    let mut space = FreeSpace::of(config);
    let (candidates, unfit) = candidates(config, &space, &rules, length, MAX_PIECES);

    let member = |extents| Member {
        id: MemberId(volume.next_member),
        state: request.state,
        extents,
    };
    let future = |device: DeviceId| section_with(section, request, device, length);
    let order = |device: &Device| {
        let longest = space
            .device(device.id)
            .map_or((false, 0), |space| (space.longest() >= length, space.bytes()));
        let (whole, free) = longest;
        let weak = spread(config, &future(device.id)) == Spread::Devices;
        let neighbours = neighbours(config, section, request, &device.enclosure);
        let no_spare = device.state != DeviceState::Spare;
        (weak, neighbours, no_spare, !whole, Reverse(free), device.id)
    };
    let best = candidates
        .iter()
        .min_by_key(|device| order(device))
        .map(|device| device.id);
    let placed = best.and_then(|device| {
        let extents = space.device_mut(device)?.take(length, MAX_PIECES)?;
        Some(PlacedMember {
            member: member(extents),
            spread: spread(config, &future(device)),
        })
    });
    placed.ok_or_else(|| {
        let class = if request.to.is_some() {
            ""
        } else {
            &volume.attributes.class
        };
        shortage(
            "a member of the volume",
            1,
            length,
            class,
            &space,
            &candidates,
            unfit,
        )
    })
}

/// The section as it will be when a member on `device` is in sync and has replaced the other.
fn section_with(section: &Section, request: &MemberRequest<'_>, device: DeviceId, length: u64) -> Section {
    let mut future = section.clone();
    if let Some(column) = future.columns.get_mut(request.column) {
        column
            .members
            .retain(|member| Some(member.id) != request.replaces);
        column.members.push(Member {
            id: MemberId(u32::MAX),
            state: MemberState::InSync,
            extents: vec![Extent {
                device,
                start: 0,
                length,
            }],
        });
    }
    let members = future.columns.iter_mut().flat_map(|column| &mut column.members);
    members.for_each(|member| member.state = MemberState::InSync);
    future
}

/// How many others that the new member should be apart from are in an enclosure: the legs of its column, or with parity those of
/// all columns.
fn neighbours(
    config: &Configuration,
    section: &Section,
    request: &MemberRequest<'_>,
    enclosure: &str,
) -> usize {
    if enclosure.is_empty() || !section.is_redundant() {
        return 0;
    }
    let columns = section.columns.iter().enumerate();
    let columns = columns.filter(|(index, _)| section.parity > 0 || *index == request.column);
    let members = columns.flat_map(|(_, column)| &column.members);
    let others = members.filter(|member| Some(member.id) != request.replaces);
    let inside = |id: DeviceId| {
        config
            .device(id)
            .is_some_and(|device| device.enclosure == enclosure)
    };
    others.filter(|member| devices_of(member).any(inside)).count()
}

/// Places a copy of a section's parity log: instead of the one on `from`, or an additional one. Prefers the devices of the first
/// `parity + 1` columns, then those of the others.
///
/// # Errors
/// [`PlaceError::NoSuchPlace`], [`PlaceError::Shortage`]; [`PlaceError::Invalid`] for a section without parity.
pub fn place_log(
    config: &Configuration,
    volume: VolumeId,
    section: usize,
    from: Option<DeviceId>,
    excluded: &[DeviceId],
    use_spares: bool,
) -> Result<Extent, PlaceError> {
    let (volume, section) = find(config, volume, section)?;
    if section.parity == 0 {
        return Err(PlaceError::Invalid(
            "a section without parity has no parity log".into(),
        ));
    }
    let smallest = config.devices.iter().map(|device| device.size).min().unwrap_or(0);
    let length = match section.log.first() {
        Some(copy) => Some(copy.length),
        None => log_size(section.columns.len() as u64, section.unit, smallest),
    };
    let Some(length) = length else {
        return Err(PlaceError::Invalid(
            "the rows of the section are too long for a log".into(),
        ));
    };
    let mut excluded = excluded.to_vec();
    excluded.extend(section.log.iter().map(|copy| copy.device));
    excluded.extend(from);
    let rules = Rules {
        attributes: &volume.attributes,
        block: volume.block,
        excluded: &excluded,
        use_spares,
        only: None,
    };
    let mut space = FreeSpace::of(config);
    let (candidates, unfit) = candidates(config, &space, &rules, length, 1);
    let (first, all): (Vec<_>, Vec<_>) = (log_devices(section), member_devices(section).collect());
    let order = |device: &Device| {
        let free = space.device(device.id).map_or(0, |space| space.bytes());
        (
            !first.contains(&device.id),
            !all.contains(&device.id),
            Reverse(free),
            device.id,
        )
    };
    let best = candidates
        .iter()
        .min_by_key(|device| order(device))
        .map(|device| device.id);
    let extent = best.and_then(|device| space.device_mut(device)?.take_one(length));
    extent.ok_or_else(|| {
        let class = &volume.attributes.class;
        shortage(
            "a copy of the parity log",
            1,
            length,
            class,
            &space,
            &candidates,
            unfit,
        )
    })
}

/// Places a copy of a bitmap of `length` bytes (whole blocks) on each of the `devices`, in their order. Copies in `kept` that
/// are on one of them and as long stay what they are. The devices' states do not matter: a bitmap goes where its members are.
///
/// # Errors
/// [`PlaceError::NoSuchDevice`], [`PlaceError::Invalid`] for a length that is not whole blocks, [`PlaceError::Shortage`].
pub fn place_bitmap(
    config: &Configuration,
    kept: &[Extent],
    devices: &[DeviceId],
    length: u64,
) -> Result<Vec<Extent>, PlaceError> {
    place_bitmap_in(&mut FreeSpace::of(config), kept, devices, length)
}

/// As [`place_bitmap`], from the space that is given, which is less afterwards.
pub(super) fn place_bitmap_in(
    space: &mut FreeSpace,
    kept: &[Extent],
    devices: &[DeviceId],
    length: u64,
) -> Result<Vec<Extent>, PlaceError> {
    if length == 0 || !length.is_multiple_of(crate::model::BLOCK) {
        return Err(PlaceError::Invalid(format!(
            "a bitmap of {length} bytes is not whole blocks"
        )));
    }
    let (mut copies, mut fit, mut unfit) = (Vec::new(), Vec::new(), Vec::new());
    for id in devices {
        let same = |copy: &&Extent| copy.device == *id && copy.length == length;
        if let Some(copy) = kept.iter().find(same) {
            copies.push(*copy);
            continue;
        }
        let own = space.device_mut(*id).ok_or(PlaceError::NoSuchDevice(*id))?;
        let (free, longest) = (own.bytes(), own.longest());
        match own.take_one(length) {
            Some(copy) => {
                copies.push(copy);
                fit.push((*id, free));
            }
            None if free >= length => unfit.push((*id, Unfit::Fragmented { free, longest })),
            None => unfit.push((*id, Unfit::Full { free })),
        }
    }
    if unfit.is_empty() {
        return Ok(copies);
    }
    Err(PlaceError::Shortage(Box::new(Shortage {
        what: "the bitmap".into(),
        devices: fit.len() + unfit.len(),
        each: length,
        larger: 0,
        larger_each: length,
        class: String::new(),
        fit,
        unfit,
        largest: None,
    })))
}

/// Devices that may get `length` bytes in at most so many `pieces` and have room for that; and the others, with the reasons.
fn candidates<'a>(
    config: &'a Configuration,
    space: &FreeSpace,
    rules: &Rules<'_>,
    length: u64,
    pieces: usize,
) -> (Vec<&'a Device>, Vec<(DeviceId, Unfit)>) {
    let (mut fit, mut unfit) = (Vec::new(), Vec::new());
    for device in &config.devices {
        let judged = rules.judge(device).and_then(|()| {
            let Some(space) = space.device(device.id) else {
                return Err(Unfit::Full { free: 0 });
            };
            let (free, longest) = (space.bytes(), space.longest());
            match space.reach(pieces) >= length {
                true => Ok(()),
                false if free >= length => Err(Unfit::Fragmented { free, longest }),
                false => Err(Unfit::Full { free }),
            }
        });
        match judged {
            Ok(()) => fit.push(device),
            Err(reason) => unfit.push((device.id, reason)),
        }
    }
    (fit, unfit)
}

/// The error for one piece that found no device.
fn shortage(
    what: &str,
    devices: usize,
    each: u64,
    class: &str,
    space: &FreeSpace,
    fit: &[&Device],
    unfit: Vec<(DeviceId, Unfit)>,
) -> PlaceError {
    let free = |id: DeviceId| space.device(id).map_or(0, |space| space.bytes());
    PlaceError::Shortage(Box::new(Shortage {
        what: what.into(),
        devices,
        each,
        larger: 0,
        larger_each: each,
        class: class.into(),
        fit: fit.iter().map(|device| (device.id, free(device.id))).collect(),
        unfit,
        largest: None,
    }))
}
