//! A volume becomes longer or shorter; a section is cut in two, and two sections become one.

use super::error::PlaceError;
use super::free::{FreeSpace, MAX_PIECES};
use super::section::{SectionRequest, place_section_in};
use super::volume::{Split, split};
use super::{Spread, member_devices, spread};
use crate::model::{
    BLOCK, Column, Configuration, DeviceState, Extent, Member, MemberId, MemberState, Section, Volume,
    VolumeId,
};

/// What becomes of the end of a volume that grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extended {
    /// Takes the place of the last section, if it changes.
    pub last: Option<Section>,
    /// Follow it.
    pub added: Vec<Section>,
    /// Whether the changed and the new sections outlive the failure of an enclosure.
    pub spread: Spread,
    /// For the volume.
    pub next_member: u32,
    /// For the volume.
    pub next_section: u32,
}

/// Makes a volume longer by `more` bytes: in place, if its last section has the layout that the volume asks for, all its members
/// are in sync on active devices, and each finds room on its own device, best behind its end; otherwise by new sections. What
/// is free in the last row of the last section is used up before a section is added.
///
/// The bitmap is not looked after: it may have to grow too (`place_bitmap`).
///
/// # Errors
/// [`PlaceError::NoSuchPlace`], [`PlaceError::Invalid`], [`PlaceError::Shortage`].
pub fn extend_section(
    config: &Configuration,
    volume: VolumeId,
    more: u64,
    use_spares: bool,
) -> Result<Extended, PlaceError> {
    let missing = || PlaceError::NoSuchPlace {
        volume,
        what: "place in this pool".into(),
    };
    let volume = config.volume(volume).ok_or_else(missing)?;
    if more == 0 || !more.is_multiple_of(BLOCK) {
        return Err(PlaceError::Invalid(format!(
            "{more} bytes more are not a positive multiple of {BLOCK}"
        )));
    }
    if volume.size.checked_add(more).is_none() {
        return Err(PlaceError::Invalid(format!(
            "a volume cannot have {more} bytes more"
        )));
    }
    let mut space = FreeSpace::of(config);
    let unchanged = |last: Option<Section>| Extended {
        spread: last
            .as_ref()
            .map_or(Spread::Enclosures, |last| spread(config, last)),
        last,
        added: Vec::new(),
        next_member: volume.next_member,
        next_section: volume.next_section,
    };
    let last = volume.sections.last();
    if let Some(longer) = last.and_then(|last| lengthen(config, volume, last, more)) {
        return Ok(unchanged(Some(longer)));
    }

    let padding = last.map_or(0, |last| padding(last).min(more));
    let padded = last.filter(|_| padding > 0).map(|last| Section {
        length: last.length + padding,
        ..last.clone()
    });
    let mut extended = unchanged(padded);
    let request = SectionRequest {
        length: more - padding,
        attributes: &volume.attributes,
        block: volume.block,
        excluded: &[],
        use_spares,
        bitmap: 0,
        state: MemberState::InSync,
        number: volume.next_section,
        first_member: volume.next_member,
    };
    if request.length == 0 {
        return Ok(extended);
    }
    let free = space.clone();
    extended.added = match place_section_in(config, &mut space, &request) {
        Ok(placed) => vec![placed.section],
        Err(PlaceError::Shortage(mut shortage)) => match split(config, &free, &request)? {
            Split::Sections(sections) => sections,
            Split::AtMost(largest) => {
                shortage.largest = Some(largest);
                return Err(PlaceError::Shortage(shortage));
            }
        },
        Err(error) => return Err(error),
    };
    for section in &extended.added {
        let members = section.columns.iter().flat_map(|column| &column.members);
        let next = members.map(|member| member.id.0.saturating_add(1)).max();
        extended.next_member = extended.next_member.max(next.unwrap_or(0));
        extended.next_section = extended.next_section.max(section.id.saturating_add(1));
        if spread(config, section) == Spread::Devices {
            extended.spread = Spread::Devices;
        }
    }
    Ok(extended)
}

/// Bytes between the end of a section and that of its last row.
fn padding(section: &Section) -> u64 {
    match section.columns.len() {
        1 => section.unit.saturating_sub(section.length),
        _ => section
            .length
            .checked_next_multiple_of(section.row())
            .map_or(0, |end| end - section.length),
    }
}

/// The last section with longer members, if that can be.
fn lengthen(config: &Configuration, volume: &Volume, last: &Section, more: u64) -> Option<Section> {
    let (layout, single) = (volume.attributes.layout, last.columns.len() == 1);
    let legs = |column: &Column| column.members.len() as u64 == u64::from(layout.legs());
    let same = last.columns.len() as u64 == u64::from(layout.columns())
        && last.parity == layout.parity()
        && last.columns.iter().all(legs)
        && (single || last.unit == volume.attributes.stripe_unit);
    let members = last.columns.iter().flat_map(|column| &column.members);
    let in_sync = members.clone().all(|member| member.state == MemberState::InSync);
    let active = |id| {
        config
            .device(id)
            .is_some_and(|device| device.state == DeviceState::Active)
    };
    if !same || last.row() == 0 || !in_sync || !member_devices(last).all(active) {
        return None;
    }
    let length = last.length.checked_add(more)?;
    let mut longer = last.clone();
    longer.length = length;
    let member = if single {
        length
    } else {
        length.div_ceil(last.row()).checked_mul(last.unit)?
    };
    if single {
        longer.unit = length;
    }
    let mut space = FreeSpace::of(config);
    for member_of in longer.columns.iter_mut().flat_map(|column| &mut column.members) {
        let need = member.checked_sub(member_of.length())?;
        append(&mut space, member_of, need)?;
    }
    Some(longer)
}

/// Lengthens a member on the device where it ends: best behind its end.
fn append(space: &mut FreeSpace, member: &mut Member, mut need: u64) -> Option<()> {
    if need == 0 {
        return Some(());
    }
    let last = member.extents.last_mut()?;
    let space = space.device_mut(last.device)?;
    if let Some(behind) = space.take_at(last.start.checked_add(last.length)?, need) {
        last.length += behind.length;
        need -= behind.length;
    }
    if need > 0 {
        let pieces = MAX_PIECES.saturating_sub(member.extents.len());
        member.extents.extend(space.take(need, pieces)?);
    }
    Some(())
}

/// Two sections from one, cut at byte `at`, the end of a row: the inverse of [`merge_sections`]. Nothing moves, and parity stays where
/// it is, because the second keeps the rotation of its rows. With one column every block is the end of a row.
///
/// The first keeps its numbers and its log. The second gets `number` and members from `first_member` on; with parity it has no log
/// yet: enter it, and place its copies with [`place_log`](super::place_log) before that configuration is written. Cursors are cut as
/// well: a first part that is all below one keeps its state, with the cursor at its end.
///
/// None if `at` is not within the section or not the end of a row.
pub fn split_section(
    section: &Section,
    at: u64,
    number: u32,
    first_member: u32,
) -> Option<(Section, Section)> {
    let single = section.columns.len() == 1;
    let row = if single { BLOCK } else { section.row() };
    if row == 0 || at == 0 || at >= section.length || !at.is_multiple_of(row) {
        return None;
    }
    let rows = at / row;
    let member = if single {
        at
    } else {
        rows.checked_mul(section.unit)?
    };
    let (mut first, mut second) = (section.clone(), section.clone());
    (first.length, second.length) = (at, section.length - at);
    (second.id, second.log) = (number, Vec::new());
    if single {
        (first.unit, second.unit) = (first.length, second.length);
    } else {
        second.rotation = section.rotation.checked_add(rows)?;
    }
    let firsts = first.columns.iter_mut().flat_map(|column| &mut column.members);
    let seconds = second.columns.iter_mut().flat_map(|column| &mut column.members);
    for ((a, b), id) in firsts.zip(seconds).zip(first_member..) {
        b.id = MemberId(id);
        let whole = a.state;
        a.state = moved(whole, |cursor| cursor.min(member));
        b.state = moved(whole, |cursor| cursor.saturating_sub(member));
        (a.extents, b.extents) = cut(&b.extents, member)?;
    }
    Some((first, second))
}

/// The first `length` bytes of a section, whose members are then as long as the rows that remain; the log stays. None if that is
/// not shorter, not whole blocks, or nothing.
pub fn shorten_section(section: &Section, length: u64) -> Option<Section> {
    let single = section.columns.len() == 1;
    let shorter = length > 0 && length < section.length && length.is_multiple_of(BLOCK);
    if !shorter || section.row() == 0 {
        return None;
    }
    let member = if single {
        length
    } else {
        length.div_ceil(section.row()).checked_mul(section.unit)?
    };
    let mut short = section.clone();
    short.length = length;
    if single {
        short.unit = length;
    }
    for kept in short.columns.iter_mut().flat_map(|column| &mut column.members) {
        kept.state = moved(kept.state, |cursor| cursor.min(member));
        kept.extents = cut(&kept.extents, member)?.0;
    }
    Some(short)
}

/// A state with another cursor.
fn moved(state: MemberState, to: impl Fn(u64) -> u64) -> MemberState {
    match state {
        MemberState::InSync => MemberState::InSync,
        MemberState::Filling { cursor } => MemberState::Filling { cursor: to(cursor) },
        MemberState::Stale { cursor } => MemberState::Stale { cursor: to(cursor) },
    }
}

/// The first `length` bytes of extents, and the rest.
fn cut(extents: &[Extent], length: u64) -> Option<(Vec<Extent>, Vec<Extent>)> {
    let (mut before, mut behind, mut left) = (Vec::new(), Vec::new(), length);
    for extent in extents {
        let taken = left.min(extent.length);
        left -= taken;
        let add = |to: &mut Vec<Extent>, start: u64, length: u64| {
            if length > 0 {
                to.push(Extent {
                    device: extent.device,
                    start,
                    length,
                });
            }
        };
        add(&mut before, extent.start, taken);
        add(
            &mut behind,
            extent.start.checked_add(taken)?,
            extent.length - taken,
        );
    }
    (left == 0).then_some((before, behind))
}

/// One section from two neighbouring ones of the same shape on the same devices, `a` before `b`; none if they differ, if `a` ends
/// within a row, if a member is not in sync, or if a member would have too many extents.
///
/// Where the parity of a row lies follows from its number and [`Section::rotation`], with a period of as many rows as there are
/// columns: `b` must go on where `a` ends. That is so for pieces of a section that was split; of two sections that were placed
/// apart, only if the rows of `a` are a multiple of the columns.
///
/// The result keeps the number of `a` and its log. The log of `b` must hold no record that is not yet in place.
pub fn merge_sections(a: &Section, b: &Section) -> Option<Section> {
    let single = a.columns.len() == 1;
    let alike = a.columns.len() == b.columns.len() && a.parity == b.parity && (single || a.unit == b.unit);
    if !alike || a.row() == 0 || a.columns.is_empty() || padding(a) > 0 {
        return None;
    }
    if a.parity > 0 {
        let rows = a.length / a.row();
        let columns = a.columns.len() as u64;
        let next = (a.rotation % columns + rows % columns) % columns;
        if next != b.rotation % columns {
            return None;
        }
    }
    let columns = a.columns.iter().zip(&b.columns).map(|(a, b)| merge_columns(a, b));
    Some(Section {
        id: a.id,
        length: a.length.checked_add(b.length)?,
        unit: if single {
            a.unit.checked_add(b.unit)?
        } else {
            a.unit
        },
        parity: a.parity,
        rotation: a.rotation,
        columns: columns.collect::<Option<_>>()?,
        log: a.log.clone(),
    })
}

/// The members of two columns, each on its device; which leg comes first does not matter.
fn merge_columns(a: &Column, b: &Column) -> Option<Column> {
    if a.members.len() != b.members.len() {
        return None;
    }
    let device = |member: &Member| {
        let device = member.extents.first()?.device;
        let one = member.extents.iter().all(|extent| extent.device == device);
        (one && member.state == MemberState::InSync).then_some(device)
    };
    let merged = a.members.iter().map(|first| {
        let own = device(first)?;
        let second = b.members.iter().find(|member| device(member) == Some(own))?;
        let extents = join(&first.extents, &second.extents);
        (extents.len() <= MAX_PIECES).then(|| Member {
            extents,
            ..first.clone()
        })
    });
    Some(Column {
        members: merged.collect::<Option<_>>()?,
    })
}

/// Extents one after the other, adjacent ones joined.
fn join(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in a.iter().chain(b) {
        match joined.last_mut() {
            Some(last)
                if last.device == extent.device
                    && last.start.checked_add(last.length) == Some(extent.start) =>
            {
                last.length += extent.length;
            }
            _ => joined.push(*extent),
        }
    }
    joined
}
