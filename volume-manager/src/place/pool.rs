//! Pools for tests: devices of any kind, volumes that are placed and entered as the engine does it.

use super::{
    DEFAULT_STRIPE_UNIT, FreeSpace, MemberRequest, PlaceError, SectionRequest, place_member, place_volume_in,
};
use crate::model::{
    Attributes, BLOCK, Configuration, Device, DeviceId, DeviceState, Layout, MemberState, Uuid, Volume,
    VolumeId,
};

pub(super) const MIB: u64 = 1 << 20;

/// Bytes of the bitmaps of volumes in tests.
pub(super) const BITMAP: u64 = 2 * BLOCK;

/// A pool of active devices with data areas of so many bytes each, 512-byte blocks, no class and no enclosure.
pub(super) fn pool(sizes: &[u64]) -> Configuration {
    let device = |(number, size): (u32, &u64)| Device {
        id: DeviceId(number),
        uuid: Uuid(u128::from(number) + 1),
        name: format!("/dev/{number}"),
        size: size + MIB,
        data_start: MIB,
        block: 512,
        state: DeviceState::Active,
        class: String::new(),
        enclosure: String::new(),
    };
    let devices: Vec<_> = (0..).zip(sizes).map(device).collect();
    Configuration {
        pool: Uuid(1),
        name: "tank".into(),
        epoch: 1,
        incarnations: Vec::new(),
        next_device: u32::try_from(devices.len()).unwrap(),
        devices,
        volumes: Vec::new(),
        jobs: Vec::new(),
        next_volume: 0,
        next_job: 0,
    }
}

pub(super) fn attributes(layout: Layout) -> Attributes {
    Attributes {
        layout,
        stripe_unit: DEFAULT_STRIPE_UNIT,
        class: String::new(),
        devices: Vec::new(),
    }
}

pub(super) fn request(attributes: &Attributes, length: u64) -> SectionRequest<'_> {
    SectionRequest {
        length,
        attributes,
        block: 512,
        excluded: &[],
        use_spares: false,
        bitmap: if attributes.layout.tolerates() > 0 {
            BITMAP
        } else {
            0
        },
        state: MemberState::InSync,
        number: 0,
        first_member: 0,
    }
}

/// Enters a volume.
pub(super) fn create(
    config: &mut Configuration,
    attributes: &Attributes,
    length: u64,
) -> Result<VolumeId, PlaceError> {
    create_in(config, &mut FreeSpace::of(config), attributes, length)
}

/// As [`create`], with the free space of the pool at hand.
pub(super) fn create_in(
    config: &mut Configuration,
    space: &mut FreeSpace,
    attributes: &Attributes,
    length: u64,
) -> Result<VolumeId, PlaceError> {
    let placed = place_volume_in(config, space, &request(attributes, length))?;
    let id = VolumeId(config.next_volume);
    config.next_volume += 1;
    config.volumes.push(Volume {
        id,
        uuid: Uuid(u128::from(id.0)),
        name: format!("v{}", id.0),
        size: length,
        block: 512,
        attributes: attributes.clone(),
        region: MIB,
        log_devices: placed.log_devices,
        bitmap: placed.bitmap,
        bitmap_generation: 0,
        sections: placed.sections,
        next_member: placed.next_member,
        next_section: placed.next_section,
        read_policy: crate::model::ReadPolicy::Balanced,
    });
    Ok(id)
}

/// Asks for a member in place of the first one of a column of the first section.
pub(super) fn replacing(config: &Configuration, volume: VolumeId, column: usize) -> MemberRequest<'static> {
    let section = &config.volume(volume).unwrap().sections[0];
    MemberRequest {
        volume,
        section: 0,
        column,
        replaces: Some(section.columns[column].members[0].id),
        to: None,
        excluded: &[],
        use_spares: false,
        state: MemberState::Filling { cursor: 0 },
    }
}

/// Places a member and gives its device.
pub(super) fn device_for(
    config: &Configuration,
    request: &MemberRequest<'_>,
) -> Result<DeviceId, PlaceError> {
    let placed = place_member(config, request)?;
    Ok(placed.member.extents[0].device)
}
