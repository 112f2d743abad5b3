//! What becomes of the configuration when devices fail: pure, so that it can be tested over all cases.

use std::collections::BTreeSet;

use crate::model::{Configuration, DeviceId, DeviceState, Member, MemberState, Section, Volume};

/// The configuration after `config`, without the devices `dead`. They become faulty; a member on one of them that others can
/// replace becomes stale, and from then on the volume's bitmap notes what it misses; one that nobody can replace stays as it
/// is, so that the data are there again when the device is.
pub(crate) fn degrade(config: &Configuration, dead: &BTreeSet<DeviceId>) -> Configuration {
    let mut next = config.clone();
    next.epoch += 1;
    let since = next.epoch;
    for device in &mut next.devices {
        if dead.contains(&device.id) && device.is_holder() {
            device.state = DeviceState::Faulty { since };
        }
    }
    let faulty: BTreeSet<DeviceId> = next
        .devices
        .iter()
        .filter(|device| !device.is_holder())
        .map(|device| device.id)
        .collect();
    for volume in &mut next.volumes {
        degrade_volume(volume, &faulty, since);
    }
    next
}

fn degrade_volume(volume: &mut Volume, faulty: &BTreeSet<DeviceId>, epoch: u64) {
    let detached = volume
        .sections
        .iter_mut()
        .map(|section| detach(section, faulty))
        .sum::<usize>();
    if detached > 0 && volume.bitmap_generation == 0 {
        volume.bitmap_generation = epoch;
    }
    // Copies of logs on devices that may come back with old content must not be believed again.
    volume.bitmap.retain(|copy| !faulty.contains(&copy.device));
    for section in &mut volume.sections {
        if section.log.iter().any(|copy| !faulty.contains(&copy.device)) {
            section.log.retain(|copy| !faulty.contains(&copy.device));
        }
    }
    if volume.bitmap_generation != 0 && volume.bitmap.is_empty() {
        // Nobody can note what a stale member misses: it misses everything.
        for member in members_mut(volume) {
            if matches!(member.state, MemberState::Stale { .. }) {
                member.state = MemberState::Filling { cursor: 0 };
            }
        }
        volume.bitmap_generation = 0;
    }
    volume.log_devices = log_devices(volume, faulty);
}

fn members_mut(volume: &mut Volume) -> impl Iterator<Item = &mut Member> {
    let columns = volume
        .sections
        .iter_mut()
        .flat_map(|section| &mut section.columns);
    columns.flat_map(|column| &mut column.members)
}

fn is_on(member: &Member, devices: &BTreeSet<DeviceId>) -> bool {
    member
        .extents
        .iter()
        .any(|extent| devices.contains(&extent.device))
}

fn is_good(member: &Member, faulty: &BTreeSet<DeviceId>) -> bool {
    member.state == MemberState::InSync && !is_on(member, faulty)
}

/// Detaches the members that others can replace; says how many.
fn detach(section: &mut Section, faulty: &BTreeSet<DeviceId>) -> usize {
    let parity = usize::try_from(section.parity).unwrap_or(0);
    let without =
        |column: &&crate::model::Column| !column.members.iter().any(|member| is_good(member, faulty));
    let missing = section.columns.iter().filter(without).count();
    let mut detached = 0;
    for column in &mut section.columns {
        let others = column.members.iter().any(|member| is_good(member, faulty));
        if !others && missing > parity {
            // Nothing is written to the section's columns any more that these could miss.
            continue;
        }
        for member in column.members.iter_mut().filter(|member| is_on(member, faulty)) {
            match &mut member.state {
                MemberState::InSync => {
                    member.state = MemberState::Stale { cursor: 0 };
                    detached += 1;
                }
                // From now on it misses writes also below the cursor.
                MemberState::Filling { cursor } | MemberState::Stale { cursor } => *cursor = 0,
            }
        }
    }
    detached
}

/// The devices for a volume's activity log and bitmap, those that it has first: if all of them fail, the volume is lost anyway.
pub(crate) fn log_devices(volume: &Volume, faulty: &BTreeSet<DeviceId>) -> Vec<DeviceId> {
    let Some(section) = volume.sections.iter().find(|section| section.is_redundant()) else {
        return Vec::new();
    };
    let good = |member: &&Member| is_good(member, faulty);
    let device = |member: &Member| member.extents.first().map(|extent| extent.device);
    let (columns, count) = match section.parity {
        0 => {
            let mirrored = section.columns.iter().find(|column| column.members.len() > 1);
            (mirrored.map(std::slice::from_ref).unwrap_or_default(), usize::MAX)
        }
        parity => (
            section.columns.as_slice(),
            usize::try_from(parity).map_or(usize::MAX, |parity| parity + 1),
        ),
    };
    let members = columns
        .iter()
        .flat_map(|column| column.members.iter().filter(good));
    let mut present: Vec<DeviceId> = members.filter_map(device).collect();
    present.sort_by_key(|device| {
        volume
            .log_devices
            .iter()
            .position(|old| old == device)
            .unwrap_or(usize::MAX)
    });
    present.dedup();
    present.truncate(count);
    present
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Attributes, Column, Device, Extent, Layout, MemberId, Uuid, VolumeId};

    fn pool(devices: u32, layout: Layout) -> Configuration {
        let device = |id| Device {
            id: DeviceId(id),
            uuid: Uuid(id.into()),
            name: format!("d{id}"),
            size: 1 << 30,
            data_start: 1 << 20,
            block: 512,
            state: DeviceState::Active,
            class: String::new(),
            enclosure: String::new(),
        };
        let mut next = 0;
        let mut member = || {
            next += 1;
            Member {
                id: MemberId(next),
                state: MemberState::InSync,
                extents: vec![Extent {
                    device: DeviceId(next - 1),
                    start: 1 << 20,
                    length: 1 << 20,
                }],
            }
        };
        let columns = (0..layout.columns()).map(|_| Column {
            members: (0..layout.legs()).map(|_| member()).collect(),
        });
        let columns = columns.collect();
        let section = Section {
            id: 0,
            length: 1 << 20,
            unit: 65536,
            parity: layout.parity(),
            rotation: 0,
            columns,
            log: Vec::new(),
        };
        let mut volume = Volume {
            id: VolumeId(0),
            uuid: Uuid(7),
            name: "v".into(),
            size: 1 << 20,
            block: 512,
            attributes: Attributes {
                layout,
                stripe_unit: 65536,
                class: String::new(),
                devices: Vec::new(),
            },
            region: 1 << 20,
            log_devices: Vec::new(),
            bitmap: (0..2)
                .map(|device| Extent {
                    device: DeviceId(device),
                    start: 1 << 22,
                    length: 4096,
                })
                .collect(),
            bitmap_generation: 0,
            sections: vec![section],
            next_member: 100,
            next_section: 1,
            read_policy: crate::model::ReadPolicy::Balanced,
        };
        volume.log_devices = log_devices(&volume, &BTreeSet::new());
        Configuration {
            pool: Uuid(1),
            name: "p".into(),
            epoch: 10,
            incarnations: Vec::new(),
            devices: (0..devices).map(device).collect(),
            volumes: vec![volume],
            jobs: Vec::new(),
            next_device: devices,
            next_volume: 1,
            next_job: 0,
        }
    }

    fn good(config: &Configuration) -> Vec<u32> {
        let members = config.volumes[0].sections[0]
            .columns
            .iter()
            .flat_map(|column| &column.members);
        let good = members.filter(|member| member.state == MemberState::InSync);
        good.map(|member| member.id.0 - 1).collect()
    }

    fn dead(ids: &[u32]) -> BTreeSet<DeviceId> {
        ids.iter().copied().map(DeviceId).collect()
    }

    #[test]
    fn a_leg_is_detached_as_long_as_another_one_is_left() {
        let config = pool(2, Layout::Mirror { legs: 2 });
        assert_eq!(config.volumes[0].log_devices, [DeviceId(0), DeviceId(1)]);
        let one = degrade(&config, &dead(&[0]));
        assert_eq!(good(&one), [1]);
        assert_eq!(one.volumes[0].bitmap_generation, 11);
        assert_eq!(one.volumes[0].log_devices, [DeviceId(1)]);
        assert_eq!(one.devices[0].state, DeviceState::Faulty { since: 11 });
        let none = degrade(&one, &dead(&[1]));
        assert_eq!(
            good(&none),
            [1],
            "the last copy stays what it is, for the day when its device is back"
        );
        let both = degrade(&config, &dead(&[0, 1]));
        assert_eq!(good(&both), [0, 1]);
    }

    #[test]
    fn parity_covers_as_many_columns_as_there_are_parity_units() {
        for (layout, tolerated) in [
            (Layout::Raid5 { columns: 4 }, 1),
            (Layout::Raid6 { columns: 5 }, 2),
        ] {
            let devices = layout.columns();
            for pattern in 0_u32..1 << devices {
                let ids: Vec<u32> = (0..devices).filter(|id| pattern >> id & 1 == 1).collect();
                let after = degrade(&pool(devices, layout), &dead(&ids));
                let expected = if ids.len() <= tolerated {
                    (0..devices).filter(|id| !ids.contains(id)).collect()
                } else {
                    (0..devices).collect::<Vec<u32>>()
                };
                assert_eq!(good(&after), expected, "{layout} without {ids:?}");
            }
        }
    }

    #[test]
    fn a_stripe_of_mirrors_detaches_column_by_column() {
        let config = pool(4, Layout::StripeMirror { columns: 2, legs: 2 });
        assert_eq!(good(&degrade(&config, &dead(&[0, 3]))), [1, 2]);
        assert_eq!(good(&degrade(&config, &dead(&[0, 1, 2]))), [0, 1, 3]);
    }

    #[test]
    fn without_a_bitmap_a_detached_leg_starts_from_nothing() {
        let config = pool(3, Layout::Mirror { legs: 3 });
        let after = degrade(&config, &dead(&[0, 1]));
        let states: Vec<MemberState> = after.volumes[0].sections[0].columns[0]
            .members
            .iter()
            .map(|member| member.state)
            .collect();
        let filling = MemberState::Filling { cursor: 0 };
        assert_eq!(states, [filling, filling, MemberState::InSync]);
        assert_eq!(after.volumes[0].bitmap_generation, 0);
    }

    #[test]
    fn unredundant_volumes_are_left_alone() {
        let config = pool(2, Layout::Stripe { columns: 2 });
        let after = degrade(&config, &dead(&[1]));
        assert_eq!(after.volumes[0].sections, config.volumes[0].sections);
    }
}
