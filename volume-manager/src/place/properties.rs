//! Random pools and random changes: the rules hold after each, and what is refused cannot be had.

use std::time::Instant;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::free::data_area;
use super::pool::{BITMAP, MIB, attributes, create, create_in, pool, request};
use super::*;
use crate::model::{BLOCK, Configuration, Device, Extent, Layout, Volume, VolumeId};

/// A change of a pool.
#[derive(Debug, Clone)]
enum Change {
    Create(Attributes, u64),
    Extend(Index, u64),
    Shorten(Index, Index),
    Delete(Index),
    Move(Index, Index, bool),
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Concat),
        (2..5_u32).prop_map(|columns| Layout::Stripe { columns }),
        (2..5_u32).prop_map(|legs| Layout::Mirror { legs }),
        (2..4_u32, 2..4_u32).prop_map(|(columns, legs)| Layout::StripeMirror { columns, legs }),
        (3..6_u32).prop_map(|columns| Layout::Raid5 { columns }),
        (4..7_u32).prop_map(|columns| Layout::Raid6 { columns }),
    ]
}

fn wishes() -> impl Strategy<Value = Attributes> {
    let class = prop_oneof![4 => Just(""), 1 => Just("ssd")];
    (layouts(), 12..16_u32, class).prop_map(|(layout, unit, class)| Attributes {
        stripe_unit: 1 << unit,
        class: class.into(),
        ..attributes(layout)
    })
}

/// Stripes in place of layouts with parity.
fn without_parity(wish: Attributes) -> Attributes {
    let layout = match wish.layout {
        Layout::Raid5 { columns } | Layout::Raid6 { columns } => Layout::Stripe { columns },
        other => other,
    };
    Attributes { layout, ..wish }
}

fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![1..40_u64, 200..1000_u64].prop_map(|blocks| blocks * BLOCK)
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (wishes(), lengths()).prop_map(|(wish, length)| Change::Create(wish, length)),
        2 => (any::<Index>(), lengths()).prop_map(|(volume, more)| Change::Extend(volume, more)),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(volume, to)| Change::Shorten(volume, to)),
        1 => any::<Index>().prop_map(Change::Delete),
        2 => (any::<Index>(), any::<Index>(), any::<bool>())
            .prop_map(|(volume, member, spares)| Change::Move(volume, member, spares)),
    ]
}

fn pools(most: usize) -> impl Strategy<Value = Configuration> {
    let state = prop_oneof![
        8 => Just(DeviceState::Active),
        1 => Just(DeviceState::Spare),
        1 => Just(DeviceState::Evacuating),
        1 => Just(DeviceState::Faulty { since: 1 }),
    ];
    let class = prop_oneof![Just(""), Just("ssd")];
    let enclosure = prop_oneof![Just(""), Just("a"), Just("b"), Just("c")];
    let block = prop_oneof![6 => Just(512_u32), 1 => Just(4096)];
    let devices = vec((0..1200_u64, state, class, enclosure, block), 1..=most);
    devices.prop_map(|devices| {
        let sizes: Vec<_> = devices.iter().map(|device| device.0 * BLOCK).collect();
        let mut config = pool(&sizes);
        for (device, (_, state, class, enclosure, block)) in config.devices.iter_mut().zip(devices) {
            (device.state, device.block) = (state, block);
            (device.class, device.enclosure) = (class.into(), enclosure.into());
        }
        config
    })
}

/// Does it as the engine does, if it can be done.
fn apply(config: &mut Configuration, change: &Change) -> Result<(), PlaceError> {
    let volume = |index: &Index| {
        (!config.volumes.is_empty()).then(|| config.volumes[index.index(config.volumes.len())].id)
    };
    match change {
        Change::Create(wish, length) => create(config, wish, *length).map(drop),
        Change::Extend(index, more) => {
            let Some(id) = volume(index) else { return Ok(()) };
            let extended = extend_section(config, id, *more, false)?;
            let volume = config.volume_mut(id).unwrap();
            volume.size += more;
            if let Some(last) = extended.last {
                *volume.sections.last_mut().unwrap() = last;
            }
            volume.sections.extend(extended.added);
            (volume.next_member, volume.next_section) = (extended.next_member, extended.next_section);
            Ok(())
        }
        Change::Shorten(index, to) => {
            let Some(id) = volume(index) else { return Ok(()) };
            let volume = config.volume_mut(id).unwrap();
            let last = volume.sections.last_mut().unwrap();
            let blocks = usize::try_from(last.length / BLOCK).unwrap();
            let length = to.index(blocks) as u64 * BLOCK;
            match shorten_section(last, length) {
                Some(shorter) => {
                    volume.size -= last.length - length;
                    *last = shorter;
                }
                None => assert_eq!(length, 0),
            }
            Ok(())
        }
        Change::Delete(index) => {
            let id = volume(index);
            config.volumes.retain(|volume| Some(volume.id) != id);
            Ok(())
        }
        Change::Move(index, member, use_spares) => {
            let Some(id) = volume(index) else { return Ok(()) };
            move_member(config, id, member, *use_spares)
        }
    }
}

/// A new member beside the old one, checked in between; then the old one goes, and with it the log and the bitmap.
fn move_member(
    config: &mut Configuration,
    id: VolumeId,
    index: &Index,
    use_spares: bool,
) -> Result<(), PlaceError> {
    let mut places = Vec::new();
    for (section, found) in config.volume(id).unwrap().sections.iter().enumerate() {
        for (column, found) in found.columns.iter().enumerate() {
            places.extend(found.members.iter().map(|member| (section, column, member.id)));
        }
    }
    let (section, column, old) = places[index.index(places.len())];
    let request = MemberRequest {
        volume: id,
        section,
        column,
        replaces: Some(old),
        to: None,
        excluded: &[],
        use_spares,
        state: MemberState::Filling { cursor: 0 },
    };
    let placed = place_member(config, &request)?;
    let mut changed = config.clone();
    let members = |config: &mut Configuration, edit: &dyn Fn(&mut Volume, usize, usize)| {
        edit(config.volume_mut(id).unwrap(), section, column);
    };
    members(&mut changed, &|volume, section, column| {
        volume.sections[section].columns[column]
            .members
            .push(placed.member.clone());
        volume.next_member += 1;
    });
    follow(&mut changed, id)?;
    verify(&changed).unwrap();
    let from = config.volume(id).unwrap().sections[section].columns[column]
        .members
        .iter();
    let from = from.clone().find(|member| member.id == old).unwrap().extents[0].device;
    let copy = changed.volume(id).unwrap().sections[section]
        .log
        .iter()
        .position(|copy| copy.device == from);
    if let Some(copy) = copy {
        let moved = place_log(&changed, id, section, Some(from), &[], use_spares)?;
        members(&mut changed, &|volume, section, _| {
            volume.sections[section].log[copy] = moved
        });
        verify(&changed).unwrap();
    }
    members(&mut changed, &|volume, section, column| {
        let members = &mut volume.sections[section].columns[column].members;
        members.retain(|member| member.id != old);
        members.last_mut().unwrap().state = MemberState::InSync;
    });
    follow(&mut changed, id)?;
    *config = changed;
    Ok(())
}

/// The log devices and the bitmap follow the members.
fn follow(config: &mut Configuration, id: VolumeId) -> Result<(), PlaceError> {
    let volume = config.volume(id).unwrap();
    let devices = volume_log_devices(volume);
    let bitmap = match devices.is_empty() {
        true => Vec::new(),
        false => place_bitmap(config, &volume.bitmap, &devices, BITMAP)?,
    };
    let volume = config.volume_mut(id).unwrap();
    (volume.log_devices, volume.bitmap) = (devices, bitmap);
    Ok(())
}

fn assert_space_adds_up(config: &Configuration) {
    let areas = config
        .devices
        .iter()
        .map(data_area)
        .map(|(start, end)| end - start);
    let used = config.extents().map(|extent| extent.length);
    assert_eq!(
        FreeSpace::of(config).total(),
        areas.sum::<u64>() - used.sum::<u64>()
    );
}

/// Free runs of a device, found block by block.
fn runs(config: &Configuration, device: &Device) -> Vec<u64> {
    let (start, end) = data_area(device);
    let covers = |extent: &Extent, at: u64| {
        extent.device == device.id && (extent.start..extent.start + extent.length).contains(&at)
    };
    let mine: Vec<_> = config
        .extents()
        .filter(|extent| extent.device == device.id)
        .collect();
    let mut runs = vec![0];
    for at in (start / BLOCK..end / BLOCK).map(|block| block * BLOCK) {
        match mine.iter().any(|extent| covers(extent, at)) {
            true => runs.push(0),
            false => *runs.last_mut().unwrap() += BLOCK,
        }
    }
    runs.retain(|length| *length > 0);
    runs
}

/// Whether runs hold single pieces of these lengths, tried in every way.
fn holds(runs: &[u64], singles: &[u64]) -> bool {
    let Some((first, rest)) = singles.split_first() else {
        return true;
    };
    (0..runs.len()).any(|index| {
        let mut left = runs.to_vec();
        left[index] >= *first && {
            left[index] -= first;
            holds(&left, rest)
        }
    })
}

/// What a device can take of a section: nothing, a member, or a member with logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Room {
    None,
    Member,
    Logs,
}

/// The numbers of a request, computed apart from the code that is tested.
fn rooms(config: &Configuration, wish: &Attributes, length: u64) -> Vec<Room> {
    let layout = wish.layout;
    let columns = u64::from(layout.columns());
    let data = columns - u64::from(layout.parity());
    let member = if columns == 1 {
        length
    } else {
        length.div_ceil(data * wish.stripe_unit) * wish.stripe_unit
    };
    let allowed = |device: &&Device| {
        device.state == DeviceState::Active
            && device.block == 512
            && (wish.class.is_empty() || wish.class == device.class)
    };
    let sizes = config
        .devices
        .iter()
        .filter(allowed)
        .map(|device| (device.size - device.data_start) / BLOCK * BLOCK);
    let log = (columns * wish.stripe_unit * 5).max((sizes.min().unwrap_or(0) / 16).next_multiple_of(BLOCK));
    let singles = match (layout.parity(), layout.legs()) {
        (0, 1) => vec![],
        (0, _) => vec![BITMAP],
        _ => vec![log, BITMAP],
    };
    let room = |device: &Device| {
        if !allowed(&device) {
            return Room::None;
        }
        let runs = runs(config, device);
        let free: u64 = runs.iter().sum();
        match free {
            _ if free < member => Room::None,
            _ if free < member + singles.iter().sum::<u64>() || !holds(&runs, &singles) => Room::Member,
            _ => Room::Logs,
        }
    };
    config.devices.iter().map(room).collect()
}

/// The best spread that any choice of devices has; none if there is no choice.
fn best(
    config: &Configuration,
    wish: &Attributes,
    rooms: &[Room],
    chosen: &mut Vec<usize>,
) -> Option<Spread> {
    let (columns, legs, parity) = (wish.layout.columns(), wish.layout.legs(), wish.layout.parity());
    let redundant = parity > 0 || legs > 1;
    if chosen.len() == (columns * legs) as usize {
        let name = |index: &usize| config.devices[*index].enclosure.as_str();
        let lost = |enclosure: &str| {
            let columns = chosen.chunks(legs as usize);
            columns
                .filter(|column| column.iter().all(|index| name(index) == enclosure))
                .count()
        };
        let weak = redundant
            && ["a", "b", "c"]
                .into_iter()
                .any(|enclosure| lost(enclosure) > parity as usize);
        return Some(if weak { Spread::Devices } else { Spread::Enclosures });
    }
    let large = if parity > 0 {
        parity + 1
    } else if legs > 1 {
        legs
    } else {
        0
    };
    let need = if chosen.len() < large as usize {
        Room::Logs
    } else {
        Room::Member
    };
    let mut found = None;
    for index in 0..rooms.len() {
        if rooms[index] < need || chosen.contains(&index) {
            continue;
        }
        chosen.push(index);
        let spread = best(config, wish, rooms, chosen);
        chosen.pop();
        if spread == Some(Spread::Enclosures) {
            return spread;
        }
        found = found.or(spread);
    }
    found
}

/// Blocks of a volume without logs that there is room for: row by row on the devices that have most left.
fn most_rows(config: &Configuration, wish: &Attributes, unit: u64) -> u64 {
    let allowed = config.devices.iter().filter(|device| {
        device.state == DeviceState::Active
            && device.block == 512
            && (wish.class.is_empty() || wish.class == device.class)
    });
    let mut left: Vec<u64> = allowed
        .map(|device| runs(config, device).iter().sum::<u64>() / unit)
        .collect();
    let slots = (wish.layout.columns() * wish.layout.legs()) as usize;
    let mut rows = 0;
    loop {
        left.sort_unstable_by(|a, b| b.cmp(a));
        if left.len() < slots || left[slots - 1] == 0 {
            return rows;
        }
        left[..slots].iter_mut().for_each(|rows| *rows -= 1);
        rows += 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16_384))]

    #[test]
    fn the_rules_hold_after_every_change(mut config in pools(9), changes in vec(changes(), 1..40)) {
        for change in &changes {
            // What cannot be done changes nothing.
            let _ = apply(&mut config, change);
            prop_assert_eq!(verify(&config), Ok(()));
            assert_space_adds_up(&config);
        }
    }

    #[test]
    fn what_is_refused_cannot_be_had(
        mut config in pools(7),
        changes in vec(changes(), 0..12),
        wish in wishes(),
        length in lengths(),
    ) {
        for change in &changes {
            let _ = apply(&mut config, change);
        }
        let rooms = rooms(&config, &wish, length);
        let possible = best(&config, &wish, &rooms, &mut Vec::new());
        match place_section(&config, &request(&wish, length)) {
            Ok(placed) => prop_assert_eq!(Some(placed.spread), possible),
            Err(PlaceError::Shortage(shortage)) => {
                prop_assert_eq!(possible, None, "{}", shortage);
                let fit = rooms.iter().filter(|room| **room > Room::None).count();
                prop_assert_eq!((shortage.fit.len(), shortage.unfit.len()), (fit, rooms.len() - fit));
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn a_volume_in_several_sections_uses_all_that_there_is(
        mut config in pools(8),
        changes in vec(changes(), 0..8),
        wish in wishes(),
        length in lengths(),
    ) {
        let wish = without_parity(wish);
        for change in &changes {
            let _ = apply(&mut config, change);
        }
        let unit = if wish.layout.columns() == 1 { BLOCK } else { wish.stripe_unit };
        let row = unit * u64::from(wish.layout.columns());
        let most = most_rows(&config, &wish, unit) * row;
        let asked = SectionRequest { bitmap: 0, ..request(&wish, length) };
        match place_volume(&config, &asked) {
            Ok(_) => prop_assert!(length <= most),
            Err(PlaceError::Shortage(shortage)) => {
                prop_assert!(length > most);
                prop_assert_eq!(shortage.largest, Some(most));
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
        if most > 0 {
            let asked = SectionRequest { length: most, ..asked };
            let lengths = place_volume(&config, &asked).map(|placed| placed.sections.iter().map(|section| section.length).sum());
            prop_assert_eq!(lengths, Ok(most));
        }
    }

    #[test]
    fn a_section_that_is_cut_and_joined_is_what_it_was(
        mut config in pools(8),
        changes in vec(changes(), 0..6),
        wish in wishes(),
        length in lengths(),
        at in any::<Index>(),
    ) {
        for change in &changes {
            let _ = apply(&mut config, change);
        }
        let Ok(id) = create(&mut config, &wish, length) else { return Ok(()) };
        let volume = config.volume(id).unwrap().clone();
        let section = &volume.sections[0];
        let row = if section.columns.len() == 1 { BLOCK } else { section.row() };
        prop_assert_eq!(split_section(section, row - 512, 0, 0), None);
        prop_assert_eq!(split_section(section, section.length, 0, 0), None);
        let Some(rows) = (section.length - 1).checked_div(row).filter(|rows| *rows > 0) else { return Ok(()) };
        let at = row * (1 + at.index(usize::try_from(rows).unwrap()) as u64);
        let (first, second) = split_section(section, at, volume.next_section, volume.next_member).unwrap();
        prop_assert_eq!((first.length, second.length), (at, section.length - at));
        prop_assert_eq!(merge_sections(&first, &second), Some(section.clone()));

        let columns = section.columns.iter().flat_map(|column| &column.members).count();
        let cut = config.volume_mut(id).unwrap();
        cut.sections.splice(0..1, [first, second]);
        cut.next_section += 1;
        cut.next_member += u32::try_from(columns).unwrap();
        let copies = if wish.layout.parity() > 0 { wish.layout.parity() + 1 } else { 0 };
        for _ in 0..copies {
            let Ok(log) = place_log(&config, id, 1, None, &[], false) else { return Ok(()) };
            config.volume_mut(id).unwrap().sections[1].log.push(log);
        }
        prop_assert_eq!(verify(&config), Ok(()));
    }

    #[test]
    fn a_member_finds_the_best_device(
        mut config in pools(8),
        changes in vec(changes(), 0..6),
        wish in wishes(),
        length in lengths(),
        column in any::<Index>(),
        use_spares in any::<bool>(),
    ) {
        let Ok(id) = create(&mut config, &wish, length) else { return Ok(()) };
        for change in changes.iter().filter(|change| matches!(change, Change::Create(..))) {
            let _ = apply(&mut config, change);
        }
        let volume = config.volume(id).unwrap();
        let section = &volume.sections[0];
        let column = column.index(section.columns.len());
        let old = &section.columns[column].members[0];
        let asked = MemberRequest { use_spares, ..super::pool::replacing(&config, id, column) };
        let good = |device: &&Device| {
            let state = device.state == DeviceState::Active || (use_spares && device.state == DeviceState::Spare);
            let class = wish.class.is_empty() || wish.class == device.class;
            let free: u64 = runs(&config, device).iter().sum();
            state && class && device.block == 512 && free >= old.length() && member_devices(section).all(|id| id != device.id)
        };
        let with = |device: &Device| {
            let mut section = section.clone();
            section.columns[column].members[0].extents[0].device = device.id;
            spread(&config, &section)
        };
        let devices: Vec<_> = config.devices.iter().filter(good).collect();
        match place_member(&config, &asked) {
            Ok(placed) => {
                prop_assert!(devices.iter().any(|device| device.id == placed.member.extents[0].device));
                let strong = devices.iter().any(|device| with(device) == Spread::Enclosures);
                prop_assert_eq!(placed.spread == Spread::Enclosures, strong);
                prop_assert_eq!(placed.member.length(), old.length());
            }
            Err(error) => prop_assert!(devices.is_empty(), "{}", error),
        }
    }
}

#[test]
fn a_large_pool_is_filled_volume_by_volume() {
    let mut config = pool(&[1 << 30; 256]);
    for (number, device) in (0..).zip(&mut config.devices) {
        device.enclosure = format!("rack{}", number % 16);
    }
    let layouts = [
        Layout::Mirror { legs: 2 },
        Layout::Raid6 { columns: 6 },
        Layout::Concat,
        Layout::StripeMirror { columns: 4, legs: 2 },
        Layout::Raid5 { columns: 5 },
    ];
    let begin = Instant::now();
    let mut space = FreeSpace::of(&config);
    for (number, layout) in (0..4096).zip(layouts.into_iter().cycle()) {
        create_in(
            &mut config,
            &mut space,
            &attributes(layout),
            (1 + number % 7) * MIB,
        )
        .unwrap();
    }
    let created = begin.elapsed();
    verify(&config).unwrap();
    let verified = begin.elapsed() - created;
    assert_eq!(FreeSpace::of(&config), space);
    let begin = Instant::now();
    create(&mut config, &attributes(Layout::Mirror { legs: 2 }), MIB).unwrap();
    let extents = config.extents().count();
    println!(
        "256 devices, {extents} extents: 4096 volumes placed in {created:.1?}, verified in {verified:.1?}"
    );
    println!(
        "one more volume, from the configuration alone, in {:.1?}",
        begin.elapsed()
    );
    assert!(
        config
            .volumes
            .iter()
            .flat_map(|volume| &volume.sections)
            .all(|section| spread(&config, section) == Spread::Enclosures)
    );
}
