//! The private region of a pool's device: any bytes of a label, a slot and a configuration are refused or make sense, and what
//! makes sense is written as it was read.

use arbitrary::Unstructured;
use volume_manager::format::label::LABEL_SIZE;
use volume_manager::format::slot::Header;
use volume_manager::format::{Label, decode, encode};
use volume_manager::model::{
    Attributes, BLOCK, Column, Configuration, Device, DeviceId, DeviceState, Extent, Incarnation, Job, JobId,
    JobKind, JobState, Layout, Member, MemberId, MemberState, Priority, ReadPolicy, Section, Uuid, Volume,
    VolumeId,
};

const SIZE: u64 = 64 << 20;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    match input.int_in_range(0..=3_u8)? {
        0 => label(input),
        1 => slot(input),
        _ => configuration(input),
    }
}

/// Changes some bytes; rarely none.
fn damage(input: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> arbitrary::Result<()> {
    for _ in 0..input.int_in_range(0..=8)? {
        if bytes.is_empty() {
            break;
        }
        let place = input.choose_index(bytes.len())?;
        match input.int_in_range(0..=5_u8)? {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, input.arbitrary()?),
            2 => {
                // Counts and lengths are 4 or 8 bytes.
                let wide: u64 =
                    *input.choose(&[0, 1, 255, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 63, 4096])?;
                for (byte, new) in bytes.iter_mut().skip(place).zip(wide.to_le_bytes()) {
                    *byte = new;
                }
            }
            _ => bytes[place] = input.arbitrary()?,
        }
    }
    Ok(())
}

fn label(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let label = Label::new(Uuid(1), Uuid(2), "tank", SIZE, 512).expect("it is large enough");
    let mut bytes = label.encode().to_vec();
    damage(input, &mut bytes)?;
    bytes.resize(LABEL_SIZE, 0);
    if input.arbitrary()? {
        // With a right checksum, as a hostile device would have it.
        bytes[12..16].fill(0);
        let crc = crc32c(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(read) = Label::decode(&bytes, SIZE) {
        assert!(read.size <= SIZE && read.copy_offset() + BLOCK <= read.data_start);
        assert!(read.slot_offset(1) + read.slot_size <= read.copy_offset());
        assert_eq!(Label::decode(&read.encode(), SIZE).as_ref(), Ok(&read));
    }
    Ok(())
}

/// Bit by bit: not ours, so that it can tell on ours.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

fn slot(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let header = Header {
        pool: Uuid(1),
        device: Uuid(2),
        number: DeviceId(3),
        incarnation: Uuid(4),
        epoch: 5,
        term: 6,
        claimed: 7,
        sequence: 8,
        attempt: 9,
        previous: vec![vec![DeviceId(1), DeviceId(2)], vec![DeviceId(3)]],
    };
    let payload: Vec<u8> = input.arbitrary()?;
    let mut bytes = header.encode(&payload);
    bytes.extend_from_slice(&payload);
    damage(input, &mut bytes)?;
    if input.arbitrary()? && bytes.len() >= 16 {
        let covered = Header::needed(&bytes, 1 << 20).map(|_| bytes.len());
        bytes[12..16].fill(0);
        let crc = crc32c(&bytes[..covered.unwrap_or(bytes.len())]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    if let Some((read, configuration)) = Header::decode(&bytes) {
        assert!(Header::needed(&bytes, u64::MAX).is_some_and(|needed| needed >= configuration.len() as u64));
        let again = [read.encode(configuration).as_slice(), configuration].concat();
        assert_eq!(Header::decode(&again), Some((read, configuration)));
    }
    Ok(())
}

fn configuration(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let sample = sample(input)?;
    let mut bytes = match encode(&sample) {
        Ok(bytes) => {
            assert_eq!(decode(&bytes).as_ref(), Ok(&sample));
            bytes
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            Vec::new()
        }
    };
    damage(input, &mut bytes)?;
    match decode(&bytes) {
        Ok(read) => assert_eq!(decode(&encode(&read).expect("it was checked")), Ok(read)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    Ok(())
}

/// Mostly right.
fn sample(input: &mut Unstructured<'_>) -> arbitrary::Result<Configuration> {
    let count = input.int_in_range(1..=4_u32)?;
    let device = |number: u32| Device {
        id: DeviceId(number),
        uuid: Uuid(number.into()),
        name: format!("/dev/sd{number}"),
        size: 1 << 40,
        data_start: 16 << 20,
        block: 512,
        state: if number == 3 {
            DeviceState::Faulty { since: 1 }
        } else {
            DeviceState::Active
        },
        class: "ssd".into(),
        enclosure: String::new(),
    };
    let columns = input.int_in_range(1..=4_u32)?;
    let legs = input.int_in_range(1..=3_u32)?;
    let blocks = input.int_in_range(0..=64_u64)?;
    let parity = input.int_in_range(0..=2_u32)?;
    let member = |number: u32| Member {
        id: MemberId(number),
        state: if number == 2 {
            MemberState::Filling { cursor: BLOCK }
        } else {
            MemberState::InSync
        },
        extents: vec![Extent {
            device: DeviceId(number % count),
            start: (16 << 20) + (u64::from(number) << 20),
            length: blocks * BLOCK,
        }],
    };
    let column = |number: u32| Column {
        members: (0..legs).map(|leg| member(number * legs + leg)).collect(),
    };
    let length = u64::from(columns.saturating_sub(parity)) * blocks * BLOCK;
    let section = Section {
        id: 0,
        length,
        unit: if columns == 1 { blocks * BLOCK } else { BLOCK },
        parity,
        rotation: 0,
        columns: (0..columns).map(column).collect(),
        log: Vec::new(),
    };
    let attributes = Attributes {
        layout: Layout::Mirror { legs: 2 },
        stripe_unit: 1 << 16,
        class: String::new(),
        devices: vec![DeviceId(0)],
    };
    let volume = Volume {
        id: VolumeId(0),
        uuid: Uuid(9),
        name: "root".into(),
        size: length,
        block: 512,
        attributes: attributes.clone(),
        region: 1 << 17,
        log_devices: vec![DeviceId(0)],
        bitmap: Vec::new(),
        bitmap_generation: 0,
        sections: vec![section],
        next_member: columns * legs,
        next_section: 1,
        read_policy: ReadPolicy::FirstAnswer,
    };
    let job = Job {
        id: JobId(0),
        kind: JobKind::Relayout {
            volume: VolumeId(0),
            target: attributes,
        },
        state: JobState::Failed("no space".into()),
        done: 1,
        total: 2,
        throttle: 0,
        priority: Priority::High,
    };
    Ok(Configuration {
        pool: Uuid(1),
        name: "tank".into(),
        epoch: input.int_in_range(0..=3)?,
        incarnations: vec![Incarnation {
            id: Uuid(2),
            first_epoch: 1,
            forced: false,
        }],
        devices: (0..count).map(device).collect(),
        volumes: vec![volume],
        jobs: vec![job],
        next_device: 4,
        next_volume: 1,
        next_job: 1,
    })
}
