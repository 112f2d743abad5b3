//! Stories of placement, one rule each.

use super::pool::{BITMAP, MIB, attributes, create, device_for, pool, replacing, request};
use super::*;
use crate::model::{BLOCK, Layout, VolumeId};

fn devices(section: &Section) -> Vec<u32> {
    member_devices(section).map(|device| device.0).collect()
}

fn shortage(result: Result<impl std::fmt::Debug, PlaceError>) -> String {
    match result {
        Err(error @ PlaceError::Shortage(_)) => error.to_string(),
        other => panic!("not a shortage: {other:?}"),
    }
}

#[test]
fn every_layout_is_placed_by_the_rules() {
    let layouts = [
        Layout::Concat,
        Layout::Stripe { columns: 4 },
        Layout::Mirror { legs: 3 },
        Layout::StripeMirror { columns: 3, legs: 2 },
        Layout::Raid5 { columns: 5 },
        Layout::Raid6 { columns: 6 },
    ];
    let mut config = pool(&[100 * MIB; 6]);
    for layout in layouts {
        create(&mut config, &attributes(layout), 10 * MIB + BLOCK).unwrap();
        verify(&config).unwrap();
    }
    let raid6 = &config.volumes[5].sections[0];
    assert_eq!((raid6.columns.len(), raid6.log.len(), raid6.parity), (6, 3, 2));
    let rows = (10 * MIB + BLOCK).div_ceil(4 * (64 << 10));
    assert!(
        raid6
            .columns
            .iter()
            .all(|column| column.members[0].length() == rows * (64 << 10))
    );
    assert!(
        config
            .volumes
            .iter()
            .all(|volume| volume.extents().all(|extent| extent.length < 11 * MIB))
    );
}

#[test]
fn devices_fill_evenly() {
    let mut config = pool(&[100 * MIB; 4]);
    for _ in 0..8 {
        create(&mut config, &attributes(Layout::Mirror { legs: 2 }), 10 * MIB).unwrap();
    }
    let space = FreeSpace::of(&config);
    let free = |device: u32| space.device(DeviceId(device)).unwrap().bytes();
    assert!((0..4).all(|device| free(device) == 100 * MIB - 4 * (10 * MIB + BITMAP)));
}

#[test]
fn only_active_devices_of_the_class_and_with_small_blocks_are_used() {
    let mut config = pool(&[100 * MIB; 7]);
    for device in &mut config.devices {
        device.class = "ssd".into();
    }
    config.devices[0].class = "hdd".into();
    config.devices[1].state = DeviceState::Spare;
    config.devices[2].state = DeviceState::Faulty { since: 1 };
    config.devices[3].block = 4096;
    config.devices[4].state = DeviceState::Evacuating;
    let ssd = Attributes {
        class: "ssd".into(),
        ..attributes(Layout::Mirror { legs: 3 })
    };
    let message = shortage(place_section(&config, &request(&ssd, MIB)));
    let expected = "mirror of 3 needs 3 devices of class ssd with 1 MiB free each and 8 KiB for logs; 2 have that: \
                    d5 100 MiB, d6 100 MiB; d1 is a spare, d2 is faulty, d3 has 4096-byte blocks, the volume has 512, \
                    d4 is being evacuated, 1 of another class";
    assert_eq!(message, expected);

    let with_spares = SectionRequest {
        use_spares: true,
        ..request(&ssd, MIB)
    };
    let placed = place_section(&config, &with_spares).unwrap();
    assert_eq!(devices(&placed.section), [1, 5, 6]);
}

#[test]
fn named_devices_are_the_only_ones() {
    let config = pool(&[100 * MIB; 4]);
    let mut named = Attributes {
        devices: vec![DeviceId(1), DeviceId(3)],
        ..attributes(Layout::Stripe { columns: 2 })
    };
    let placed = place_section(&config, &request(&named, MIB)).unwrap();
    assert_eq!(devices(&placed.section), [1, 3]);
    named.layout = Layout::Stripe { columns: 3 };
    let message = shortage(place_section(&config, &request(&named, MIB)));
    assert!(
        message.ends_with("; 2 not among the devices that the volume names"),
        "{message}"
    );
    named.devices.push(DeviceId(9));
    let unknown = place_section(&config, &request(&named, MIB));
    assert_eq!(unknown, Err(PlaceError::NoSuchDevice(DeviceId(9))));
}

#[test]
fn legs_lie_in_different_enclosures_and_a_weaker_spread_is_reported() {
    let mut config = pool(&[100 * MIB; 4]);
    for (device, enclosure) in config.devices.iter_mut().zip(["a", "a", "a", "b"]) {
        device.enclosure = enclosure.into();
    }
    let two = attributes(Layout::Mirror { legs: 2 });
    let placed = place_section(&config, &request(&two, MIB)).unwrap();
    assert_eq!(
        (devices(&placed.section), placed.spread),
        (vec![0, 3], Spread::Enclosures)
    );
    let raid5 = attributes(Layout::Raid5 { columns: 3 });
    let placed = place_section(&config, &request(&raid5, MIB)).unwrap();
    assert_eq!(placed.spread, Spread::Devices);
}

#[test]
fn senseless_requests_are_refused() {
    let config = pool(&[100 * MIB; 4]);
    let refused = |layout: Layout, unit: u64, length: u64| {
        let attributes = Attributes {
            stripe_unit: unit,
            ..attributes(layout)
        };
        matches!(
            place_section(&config, &request(&attributes, length)),
            Err(PlaceError::Invalid(_))
        )
    };
    assert!(refused(Layout::Concat, BLOCK, 0));
    assert!(refused(Layout::Concat, BLOCK, 512));
    assert!(refused(Layout::Stripe { columns: 1 }, BLOCK, MIB));
    assert!(refused(Layout::Stripe { columns: 65 }, BLOCK, MIB));
    assert!(refused(Layout::Stripe { columns: 2 }, 512, MIB));
    assert!(refused(Layout::Stripe { columns: 2 }, 3 * BLOCK, MIB));
    assert!(refused(Layout::Mirror { legs: 1 }, BLOCK, MIB));
    assert!(refused(Layout::Mirror { legs: 9 }, BLOCK, MIB));
    assert!(refused(Layout::StripeMirror { columns: 2, legs: 0 }, BLOCK, MIB));
    assert!(refused(Layout::Raid5 { columns: 2 }, BLOCK, MIB));
    assert!(refused(Layout::Raid6 { columns: 3 }, BLOCK, MIB));
    assert!(refused(Layout::Raid6 { columns: 0 }, BLOCK, MIB));
    assert!(refused(Layout::Raid6 { columns: 4 }, 1 << 63, MIB));
    assert!(refused(Layout::Raid6 { columns: 4 }, 1 << 62, 1 << 63));
}

#[test]
fn columns_and_legs_that_are_not_given_are_chosen() {
    let choose = |layout: Layout, devices: usize| {
        let config = pool(&vec![100 * MIB; devices]);
        resolve_layout(&config, &request(&attributes(layout), MIB))
    };
    assert_eq!(
        choose(Layout::Stripe { columns: 0 }, 12),
        Layout::Stripe { columns: 8 }
    );
    assert_eq!(
        choose(Layout::Stripe { columns: 0 }, 3),
        Layout::Stripe { columns: 3 }
    );
    assert_eq!(
        choose(Layout::Raid5 { columns: 0 }, 12),
        Layout::Raid5 { columns: 5 }
    );
    assert_eq!(
        choose(Layout::Raid5 { columns: 0 }, 2),
        Layout::Raid5 { columns: 3 }
    );
    assert_eq!(
        choose(Layout::Raid6 { columns: 0 }, 5),
        Layout::Raid6 { columns: 5 }
    );
    assert_eq!(
        choose(Layout::Raid6 { columns: 9 }, 5),
        Layout::Raid6 { columns: 9 }
    );
    assert_eq!(choose(Layout::Mirror { legs: 0 }, 5), Layout::Mirror { legs: 2 });
    let both = Layout::StripeMirror { columns: 0, legs: 0 };
    assert_eq!(choose(both, 7), Layout::StripeMirror { columns: 3, legs: 2 });
}

#[test]
fn a_replacement_keeps_off_the_devices_and_enclosures_of_the_others() {
    let mut config = pool(&[100 * MIB; 5]);
    for (device, enclosure) in config.devices.iter_mut().zip(["a", "b", "a", "b", "b"]) {
        device.enclosure = enclosure.into();
    }
    let volume = create(&mut config, &attributes(Layout::Mirror { legs: 2 }), MIB).unwrap();
    assert_eq!(devices(&config.volumes[0].sections[0]), [0, 1]);
    assert_eq!(
        device_for(&config, &replacing(&config, volume, 0)),
        Ok(DeviceId(2))
    );

    let elsewhere = [DeviceId(2)];
    let request = MemberRequest {
        excluded: &elsewhere,
        ..replacing(&config, volume, 0)
    };
    let placed = place_member(&config, &request).unwrap();
    assert_eq!(
        (placed.member.extents[0].device, placed.spread),
        (DeviceId(3), Spread::Devices)
    );
}

#[test]
fn a_spare_is_used_when_asked_for_and_then_first() {
    let mut config = pool(&[100 * MIB; 4]);
    config.devices[3].state = DeviceState::Spare;
    let volume = create(&mut config, &attributes(Layout::Mirror { legs: 2 }), MIB).unwrap();
    let mut request = replacing(&config, volume, 0);
    assert_eq!(device_for(&config, &request), Ok(DeviceId(2)));
    request.use_spares = true;
    assert_eq!(device_for(&config, &request), Ok(DeviceId(3)));
    (request.use_spares, request.to) = (false, Some(DeviceId(3)));
    assert_eq!(device_for(&config, &request), Ok(DeviceId(3)));
}

#[test]
fn a_leg_that_finds_no_device_says_why() {
    let mut config = pool(&[100 * MIB; 3]);
    let volume = create(&mut config, &attributes(Layout::Mirror { legs: 2 }), 50 * MIB).unwrap();
    config.devices[2].size = 41 * MIB;
    let message = shortage(place_member(&config, &replacing(&config, volume, 0)));
    let expected = "a member of the volume needs 1 device with 50 MiB free each; none has that; \
                    d0 is ruled out or holds another part of the same data, \
                    d1 is ruled out or holds another part of the same data, d2 has 40 MiB";
    assert_eq!(message, expected);
    let request = MemberRequest {
        section: 1,
        ..replacing(&config, volume, 0)
    };
    let error = place_member(&config, &request).unwrap_err().to_string();
    assert_eq!(error, "volume 0 has no such section");
    assert!(matches!(
        place_log(&config, VolumeId(7), 0, None, &[], false),
        Err(PlaceError::NoSuchPlace { .. })
    ));
}

#[test]
fn a_log_moves_to_a_device_without_a_copy() {
    let mut config = pool(&[100 * MIB; 5]);
    let volume = create(&mut config, &attributes(Layout::Raid5 { columns: 3 }), 20 * MIB).unwrap();
    let section = &config.volumes[0].sections[0];
    assert_eq!(devices(section), [0, 1, 2]);
    let extent = place_log(&config, volume, 0, Some(DeviceId(0)), &[], false).unwrap();
    assert_eq!(
        (extent.device, extent.length),
        (DeviceId(2), section.log[0].length)
    );
}

#[test]
fn bitmaps_stay_where_they_can() {
    let mut config = pool(&[100 * MIB; 3]);
    create(&mut config, &attributes(Layout::Mirror { legs: 2 }), 20 * MIB).unwrap();
    let old = config.volumes[0].bitmap.clone();
    let moved = place_bitmap(&config, &old, &[DeviceId(1), DeviceId(2)], BITMAP).unwrap();
    assert_eq!((moved[0], moved[1].device), (old[1], DeviceId(2)));
}

#[test]
fn verify_finds_what_is_wrong() {
    let mut good = pool(&[100 * MIB; 4]);
    create(&mut good, &attributes(Layout::Raid5 { columns: 3 }), 20 * MIB).unwrap();
    create(&mut good, &attributes(Layout::Mirror { legs: 2 }), 20 * MIB).unwrap();
    verify(&good).unwrap();
    let wrong = |expected: &str, change: &dyn Fn(&mut crate::model::Configuration)| {
        let mut config = good.clone();
        change(&mut config);
        let found = verify(&config).unwrap_err().join("\n");
        assert!(found.contains(expected), "{found}");
    };
    wrong("overlap", &|config| {
        let other = config.volumes[0].sections[0].columns[1].members[0]
            .extents
            .clone();
        config.volumes[1].sections[0].columns[0].members[0].extents[0].start = other[0].start;
        config.volumes[1].sections[0].columns[0].members[0].extents[0].device = other[0].device;
    });
    wrong("is not within", &|config| config.devices[1].size = 2 * MIB);
    wrong("no such device", &|config| drop(config.devices.remove(0)));
    wrong("holds two of its members", &|config| {
        let columns = &mut config.volumes[0].sections[0].columns;
        columns[1].members[0].extents[0].device = columns[0].members[0].extents[0].device;
    });
    wrong("do not add up", &|config| config.volumes[0].size += BLOCK);
    wrong("rows of", &|config| {
        config.volumes[0].sections[0].length += 10 * MIB
    });
    wrong("log devices may all be absent", &|config| {
        config.volumes[1].log_devices.remove(0);
    });
    wrong("not one copy on each", &|config| {
        config.volumes[1].bitmap.remove(0);
    });
    wrong("its log has 1 copies", &|config| {
        config.volumes[0].sections[0].log.remove(0);
    });
    wrong("less than four rows", &|config| {
        config.volumes[0].sections[0].log[0].length = BLOCK
    });
    wrong("is borne by two members", &|config| {
        config.volumes[1].sections[0].columns[0].members[0].id.0 = 1;
    });
    wrong("section number 0 is not below", &|config| {
        config.volumes[1].next_section = 0
    });
    wrong("is not below the next one", &|config| {
        config.volumes[1].next_member = 1
    });
}

#[test]
fn a_volume_larger_than_any_device_has_several_sections() {
    let mut config = pool(&[5 * MIB, 4 * MIB, 3 * MIB]);
    let mirror = attributes(Layout::Mirror { legs: 2 });
    let volume = create(&mut config, &mirror, 6 * MIB - 16 * BLOCK).unwrap();
    verify(&config).unwrap();
    let sections = &config.volume(volume).unwrap().sections;
    let held: Vec<_> = sections.iter().map(devices).collect();
    assert_eq!(held, [[0, 1], [0, 2], [1, 2]]);
    let concat = create(&mut config, &attributes(Layout::Concat), 60 * BLOCK);
    let message = shortage(concat);
    assert!(message.contains("spread over more devices, "), "{message}");
}

#[test]
fn the_largest_volume_that_would_fit_does() {
    let mut config = pool(&[50 * MIB, 40 * MIB, 30 * MIB, 7 * MIB, 70 * MIB]);
    let raid5 = attributes(Layout::Raid5 { columns: 3 });
    let Err(PlaceError::Shortage(shortage)) = create(&mut config, &raid5, 1 << 30) else {
        panic!("more than there is");
    };
    let largest = shortage.largest.unwrap();
    assert!(largest > 110 * MIB, "{shortage}");
    create(&mut config, &raid5, largest).unwrap();
    verify(&config).unwrap();
}

#[test]
fn mirrored_sections_keep_to_different_enclosures() {
    let mut config = pool(&[5 * MIB, 5 * MIB, 5 * MIB, 5 * MIB]);
    for (device, enclosure) in config.devices.iter_mut().zip(["a", "b", "a", "b"]) {
        device.enclosure = enclosure.into();
    }
    let mirror = attributes(Layout::Mirror { legs: 2 });
    let placed = place_volume(&config, &request(&mirror, 9 * MIB)).unwrap();
    assert_eq!((placed.sections.len(), placed.spread), (2, Spread::Enclosures));
}

fn extend(config: &mut crate::model::Configuration, volume: VolumeId, more: u64) -> Result<(), PlaceError> {
    let extended = extend_section(config, volume, more, false)?;
    let volume = config.volume_mut(volume).unwrap();
    volume.size += more;
    if let Some(last) = extended.last {
        *volume.sections.last_mut().unwrap() = last;
    }
    volume.sections.extend(extended.added);
    (volume.next_member, volume.next_section) = (extended.next_member, extended.next_section);
    Ok(())
}

#[test]
fn a_volume_grows_behind_its_end_then_in_pieces_then_elsewhere() {
    let mut config = pool(&[20 * MIB, 20 * MIB, 20 * MIB, 50 * MIB]);
    let named = Attributes {
        devices: vec![DeviceId(0)],
        ..attributes(Layout::Concat)
    };
    let volume = create(&mut config, &named, 4 * MIB).unwrap();
    extend(&mut config, volume, 4 * MIB).unwrap();
    let pieces = |config: &crate::model::Configuration| {
        let sections = config.volume(volume).unwrap().sections.iter();
        let counts = sections.map(|section| section.columns[0].members[0].extents.len());
        counts.collect::<Vec<_>>()
    };
    assert_eq!(pieces(&config), [1]);
    let wall = create(&mut config, &named, MIB).unwrap();
    extend(&mut config, volume, 4 * MIB).unwrap();
    assert_eq!(pieces(&config), [2]);
    verify(&config).unwrap();

    let message = shortage(extend_section(&config, volume, 20 * MIB, false));
    assert!(
        message.ends_with("; spread over more devices, 7 MiB would fit"),
        "{message}"
    );
    config.volume_mut(volume).unwrap().attributes.devices.clear();
    extend(&mut config, volume, 20 * MIB).unwrap();
    assert_eq!(pieces(&config), [2, 1]);
    assert_ne!(volume, wall);
    verify(&config).unwrap();
}

#[test]
fn rows_that_are_there_are_used_before_a_section_is_added() {
    let mut config = pool(&[20 * MIB; 3]);
    let raid5 = attributes(Layout::Raid5 { columns: 3 });
    let volume = create(&mut config, &raid5, MIB + BLOCK).unwrap();
    config.devices[0].state = DeviceState::Evacuating;
    let row = 2 * (64 << 10);
    extend(&mut config, volume, row - BLOCK).unwrap();
    assert_eq!(config.volume(volume).unwrap().sections.len(), 1);
    verify(&config).unwrap();
    shortage(extend_section(&config, volume, BLOCK, false));
    config.devices[0].state = DeviceState::Active;
    extend(&mut config, volume, BLOCK).unwrap();
    verify(&config).unwrap();
    let section = &config.volume(volume).unwrap().sections[0];
    assert_eq!(section.columns[0].members[0].length(), 10 * (64 << 10));
}

#[test]
fn neighbouring_sections_of_one_shape_become_one() {
    let config = pool(&[90 * MIB; 3]);
    let section = |layout: Layout, length: u64| {
        let attributes = attributes(layout);
        place_section(&config, &request(&attributes, length))
            .unwrap()
            .section
    };
    // The second begins where the first ends on each device.
    let behind = |first: &Section, layout: Layout, length: u64| {
        let mut second = section(layout, length);
        for (column, before) in second.columns.iter_mut().zip(&first.columns) {
            for (member, before) in column.members.iter_mut().zip(&before.members) {
                let end = before.extents[0].start + before.extents[0].length;
                member.extents[0].start = end;
            }
        }
        second
    };
    let mirror = Layout::Mirror { legs: 2 };
    let first = section(mirror, 3 * MIB);
    let mut second = behind(&first, mirror, 5 * MIB);
    let merged = merge_sections(&first, &second).unwrap();
    assert_eq!(merged, section(mirror, 8 * MIB));
    second.columns[0].members.swap(0, 1);
    assert_eq!(
        merge_sections(&first, &second),
        Some(merged),
        "the order of legs means nothing"
    );
    second.columns[0].members[0].state = MemberState::Stale { cursor: 0 };
    assert_eq!(merge_sections(&first, &second), None);

    let (raid5, row) = (Layout::Raid5 { columns: 3 }, 2 * (64 << 10));
    let merge = |rows: u64, rotation: u64| {
        let first = section(raid5, rows * row);
        let mut second = behind(&first, raid5, 2 * row - BLOCK);
        second.rotation = rotation;
        merge_sections(&first, &second)
            .map(|section| (section.length, section.columns[0].members[0].length()))
    };
    let expected = Some((8 * row - BLOCK, 8 * (64 << 10)));
    assert_eq!(merge(6, 0), expected);
    assert_eq!(merge(6, 3), expected);
    assert_eq!(merge(4, 0), None);
    assert_eq!(merge(4, 1).map(|(length, _)| length), Some(6 * row - BLOCK));
    let ragged = section(raid5, row - BLOCK);
    assert_eq!(merge_sections(&ragged, &behind(&ragged, raid5, row)), None);
}

#[test]
fn a_volume_without_redundancy_has_log_devices_while_any_of_its_sections_is_moved() {
    let mut config = pool(&[5 * MIB, 5 * MIB, 5 * MIB]);
    let volume = create(&mut config, &attributes(Layout::Concat), 7 * MIB).unwrap();
    assert_eq!(volume_log_devices(&config.volumes[0]), []);
    let request = MemberRequest {
        section: 1,
        replaces: None,
        ..replacing(&config, volume, 0)
    };
    let placed = place_member(&config, &request).unwrap();
    let moved = config.volume_mut(volume).unwrap();
    moved.sections[1].columns[0].members.push(placed.member);
    moved.next_member += 1;
    assert!(!log_devices_suffice(moved, &moved.log_devices));
    moved.log_devices = volume_log_devices(moved);
    assert_eq!(moved.log_devices, [DeviceId(1), DeviceId(2)]);
    verify(&config).unwrap();
}
