//! Configurations of every shape are read as they were written; no bytes make the decoder panic; what makes no sense is named.

use proptest::collection::vec;
use proptest::prelude::*;

use super::wire::Reader;
use super::{DecodeError, decode, encode};
use crate::model::*;

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,8}", "[^\\p{C}]{1,20}"]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), name()]
}

fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Concat),
        (2..64_u32).prop_map(|columns| Layout::Stripe { columns }),
        (2..=8_u32).prop_map(|legs| Layout::Mirror { legs }),
        (2..64_u32, 2..=8_u32).prop_map(|(columns, legs)| Layout::StripeMirror { columns, legs }),
        (3..64_u32).prop_map(|columns| Layout::Raid5 { columns }),
        (4..64_u32).prop_map(|columns| Layout::Raid6 { columns }),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    (layout(), 12..30_u32, text(), vec(0..9_u32, 0..4)).prop_map(|(layout, unit, class, devices)| {
        Attributes {
            layout,
            stripe_unit: 1 << unit,
            class,
            devices: devices.into_iter().map(DeviceId).collect(),
        }
    })
}

fn device() -> impl Strategy<Value = Device> {
    let state = prop_oneof![
        3 => Just(DeviceState::Active),
        1 => Just(DeviceState::Spare),
        1 => Just(DeviceState::Evacuating),
        1 => (0..5_u64).prop_map(|since| DeviceState::Faulty { since }),
    ];
    (text(), state, text(), text(), 9..=12_u32).prop_map(|(name, state, class, enclosure, block)| Device {
        id: DeviceId(0),
        uuid: Uuid(0),
        name,
        size: 1 << 40,
        data_start: 1 << 24,
        block: 1 << block,
        state,
        class,
        enclosure,
    })
}

/// Columns, members of each, extents of each member, parity, and blocks per extent.
type Shape = (usize, usize, usize, u32, u64);

fn shape() -> impl Strategy<Value = Shape> {
    (1..5_usize, 1..4_usize, 1..3_usize, 0..3_u32, 1..40_u64)
}

/// Hands out what is free on the devices.
struct Space {
    devices: u32,
    next: u64,
}

impl Space {
    fn extent(&mut self, length: u64) -> Extent {
        self.next += 1;
        let slot = self.next << 24;
        let device = DeviceId(u32::try_from(self.next % u64::from(self.devices)).unwrap());
        Extent {
            device,
            start: (1 << 24) + slot,
            length,
        }
    }
}

fn section(
    volume: &mut Volume,
    space: &mut Space,
    (columns, legs, extents, parity, blocks): Shape,
) -> Section {
    let parity = if u64::from(parity) < columns as u64 {
        parity
    } else {
        0
    };
    let unit = if columns == 1 {
        blocks * BLOCK * extents as u64
    } else {
        BLOCK
    };
    let mut member = || {
        let id = MemberId(volume.next_member);
        volume.next_member += 1;
        let state = match id.0 % 3 {
            0 => MemberState::InSync,
            1 => MemberState::Filling { cursor: BLOCK },
            _ => MemberState::Stale { cursor: 0 },
        };
        let extents = (0..extents).map(|_| space.extent(blocks * BLOCK)).collect();
        Member { id, state, extents }
    };
    let columns: Vec<Column> = (0..columns)
        .map(|_| Column {
            members: (0..legs).map(|_| member()).collect(),
        })
        .collect();
    let length = (columns.len() as u64 - u64::from(parity)) * blocks * extents as u64 * BLOCK;
    let log = if parity > 0 {
        vec![space.extent(BLOCK)]
    } else {
        Vec::new()
    };
    let id = volume.next_section;
    volume.next_section += 1;
    Section {
        id,
        length,
        unit,
        parity,
        rotation: u64::from(id),
        columns,
        log,
    }
}

type Parts = (
    Vec<Device>,
    Vec<(String, Attributes, Vec<Shape>)>,
    Vec<(u8, Attributes, String)>,
    Vec<bool>,
);

fn parts() -> impl Strategy<Value = (String, Parts)> {
    let volume = (name(), attributes(), vec(shape(), 0..4));
    let job = (any::<u8>(), attributes(), text());
    (
        name(),
        (
            vec(device(), 1..6),
            vec(volume, 0..5),
            vec(job, 0..6),
            vec(any::<bool>(), 1..6),
        ),
    )
}

fn build(name: String, (mut devices, volumes, jobs, incarnations): Parts) -> Configuration {
    for (number, device) in (0..).zip(&mut devices) {
        (device.id, device.uuid) = (DeviceId(number), Uuid(0xd000 + u128::from(number)));
    }
    devices[0].state = DeviceState::Active;
    let mut space = Space {
        devices: u32::try_from(devices.len()).unwrap(),
        next: 0,
    };
    let volumes: Vec<Volume> = (0..)
        .zip(volumes)
        .map(|(number, (name, attributes, shapes))| {
            let mut volume = Volume {
                id: VolumeId(number * 3),
                uuid: Uuid(number.into()),
                name: format!("{number}{name}"),
                size: 0,
                block: 512,
                attributes,
                region: 1 << 17,
                log_devices: vec![DeviceId(0)],
                bitmap: vec![space.extent(BLOCK)],
                bitmap_generation: 2,
                sections: Vec::new(),
                next_member: 0,
                next_section: 0,
                read_policy: if number % 2 == 0 {
                    ReadPolicy::Balanced
                } else {
                    ReadPolicy::FirstAnswer
                },
            };
            for shape in shapes {
                let section = section(&mut volume, &mut space, shape);
                volume.size += section.length;
                volume.sections.push(section);
            }
            volume
        })
        .collect();
    let jobs: Vec<Job> = (0..)
        .zip(jobs)
        .map(|(number, (choice, target, text))| job(number, choice, target, text))
        .collect();
    let incarnations: Vec<Incarnation> = (1..)
        .zip(incarnations)
        .map(|(number, forced)| Incarnation {
            id: Uuid(number),
            first_epoch: u64::try_from(number).unwrap() * 2,
            forced,
        })
        .collect();
    Configuration {
        pool: Uuid(u128::MAX - 5),
        name,
        epoch: 20,
        incarnations,
        next_device: 10,
        next_volume: 30,
        next_job: 40,
        devices,
        volumes,
        jobs,
    }
}

fn job(number: u32, choice: u8, target: Attributes, text: String) -> Job {
    let volume = VolumeId(u32::from(choice));
    let device = DeviceId(u32::from(choice));
    let kind = match choice % 5 {
        0 => JobKind::Resync { volume },
        1 => JobKind::Relayout { volume, target },
        2 => JobKind::Move {
            volume,
            from: Some(device),
            to: None,
        },
        3 => JobKind::Evacuate {
            device,
            to: Some(device),
            remove: true,
        },
        4 => JobKind::AutoTune { window: 10_000 },
        _ => JobKind::Scrub { volume: None },
    };
    // Only jobs that have ended may name what is gone.
    let state = match choice / 5 % 3 {
        0 => JobState::Done,
        1 => JobState::Cancelled,
        _ => JobState::Failed(text),
    };
    Job {
        id: JobId(number),
        kind,
        state,
        done: u64::from(choice) << 40,
        total: u64::MAX,
        throttle: 0,
        priority: match choice % 3 {
            0 => Priority::Low,
            1 => Priority::Normal,
            _ => Priority::High,
        },
    }
}

fn configuration() -> impl Strategy<Value = Configuration> {
    parts().prop_map(|(name, parts)| build(name, parts))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_configuration_is_read_as_it_was_written(configuration in configuration()) {
        let bytes = encode(&configuration).unwrap();
        prop_assert_eq!(decode(&bytes).unwrap(), configuration);
    }

    #[test]
    fn changed_bytes_are_refused_or_make_sense(configuration in configuration(), places in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = encode(&configuration).unwrap();
        for (place, value) in places {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Ok(read) = decode(&bytes) {
            prop_assert_eq!(decode(&encode(&read).unwrap()).unwrap(), read);
        }
    }

    #[test]
    fn a_part_of_the_bytes_is_refused_or_a_configuration_without_its_last_objects(configuration in configuration(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(&configuration).unwrap();
        if let Ok(read) = decode(&bytes[..cut.index(bytes.len())]) {
            prop_assert!(read.jobs.len() + read.volumes.len() + read.devices.len() + read.incarnations.len()
                < configuration.jobs.len() + configuration.volumes.len() + configuration.devices.len() + configuration.incarnations.len());
        }
    }
}

/// One with a striped and a plain volume.
fn sample() -> Configuration {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let device = device()
        .new_tree(&mut TestRunner::deterministic())
        .unwrap()
        .current();
    let attributes = Attributes {
        layout: Layout::Concat,
        stripe_unit: BLOCK,
        class: String::new(),
        devices: Vec::new(),
    };
    let shapes = vec![(1, 2, 2, 0, 4), (3, 1, 1, 1, 4)];
    let volumes = vec![
        ("a".into(), attributes.clone(), shapes),
        ("b".into(), attributes, vec![(1, 1, 1, 0, 1)]),
    ];
    build(
        "tank".into(),
        (vec![device.clone(), device], volumes, Vec::new(), vec![false]),
    )
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    type Change = fn(&mut Configuration);
    let cases: &[(&str, Change)] = &[
        (
            "pool \"tank\" of the configuration is invalid: its epoch is 0",
            |c| c.epoch = 0,
        ),
        ("its name is empty", |c| c.name.clear()),
        ("no plain text", |c| c.name.push('\n')),
        ("too few or too many incarnations", |c| c.incarnations.clear()),
        ("begins after its epoch", |c| c.incarnations[0].first_epoch = 21),
        ("its devices are not in order", |c| c.devices.swap(0, 1)),
        ("the same identity", |c| c.devices[1].uuid = c.devices[0].uuid),
        ("a number for the next object is in use", |c| c.next_volume = 3),
        ("no device is left", |c| {
            c.devices
                .iter_mut()
                .for_each(|d| d.state = DeviceState::Faulty { since: 1 })
        }),
        ("device d1", |c| c.devices[1].block = 513),
        ("begins beyond its end", |c| c.devices[1].data_start = 1 << 50),
        ("another volume has its name", |c| {
            c.volumes[1].name = c.volumes[0].name.clone()
        }),
        (
            "volume \"0a\" of the configuration is invalid: its size is not the sum",
            |c| c.volumes[0].size += BLOCK,
        ),
        ("not equally long", |c| {
            c.volumes[0].sections[0].columns[0].members[0].extents[0].length += BLOCK
        }),
        (
            "section 1 of volume \"0a\" of the configuration is invalid: it is longer than its columns",
            |c| {
                c.volumes[0].sections[1].length += BLOCK;
            },
        ),
        ("more parity than columns", |c| {
            c.volumes[0].sections[0].parity = 1
        }),
        ("its device is not in the pool", |c| {
            c.volumes[0].bitmap[0].device = DeviceId(7)
        }),
        ("empty or not aligned", |c| c.volumes[0].bitmap[0].start += 512),
        ("not within the data area", |c| c.volumes[0].bitmap[0].start = 0),
        ("not within the data area", |c| {
            c.volumes[0].bitmap[0].start = u64::MAX - 4095
        }),
        ("it overlaps one", |c| {
            c.volumes[0].bitmap[0] = c.volumes[1].sections[0].columns[0].members[0].extents[0]
        }),
        ("its cursor is beyond its end", |c| {
            c.volumes[0].sections[0].columns[0].members[0].state = MemberState::Stale { cursor: 1 << 30 };
        }),
        ("the number of a member is used twice", |c| {
            c.volumes[0].next_member = 1
        }),
        ("the number of a section is used twice", |c| {
            c.volumes[0].sections[1].id = 0
        }),
    ];
    encode(&sample()).unwrap();
    for (expected, change) in cases {
        let mut configuration = sample();
        change(&mut configuration);
        let error = encode(&configuration).unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected:?}, got {error:?}");
    }
}

#[test]
fn only_jobs_with_another_priority_than_normal_need_a_newer_program() {
    let version = |priority| {
        let mut configuration = sample();
        configuration.jobs = vec![Job {
            id: JobId(0),
            kind: JobKind::Scrub { volume: None },
            state: JobState::Done,
            done: 0,
            total: 0,
            throttle: 0,
            priority,
        }];
        configuration.next_job = 1;
        let bytes = encode(&configuration).unwrap();
        let mut reader = Reader::new(&bytes, "the configuration");
        let mut last = (0, 0);
        while !reader.is_empty() {
            last = (reader.u16().unwrap(), reader.u16().unwrap());
            let length = reader.u32().unwrap();
            reader.bytes(length as usize).unwrap();
        }
        last
    };
    assert_eq!(version(Priority::Normal), (5, 1));
    assert_eq!(version(Priority::Low), (5, 2));
    assert_eq!(version(Priority::High), (5, 2));
}

#[test]
fn unknown_records_are_refused_unless_they_may_be_skipped() {
    let sample = sample();
    let with = |kind: u16, version: u16| {
        let mut bytes = encode(&sample).unwrap();
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&[3, 0, 0, 0, 1, 2, 3]);
        decode(&bytes)
    };
    assert_eq!(with(0x8077, 9).unwrap(), sample);
    assert_eq!(
        with(0x77, 1),
        Err(DecodeError::UnknownRecord {
            kind: 0x77,
            version: 1
        })
    );
    assert_eq!(
        with(5, 3),
        Err(DecodeError::UnknownRecord { kind: 5, version: 3 })
    );
    assert!(
        matches!(with(1, 1), Err(DecodeError::Malformed { .. })),
        "a second pool"
    );
}
