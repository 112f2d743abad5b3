//! The configuration as bytes: records of {type, version, length}, one per object, in a fixed order.
//!
//! A record of an unknown type or version refuses the whole, unless its type has bit 15: then it is ignored, and gone
//! when the configuration is next written. What is decoded has passed [`check`](super::check), and so has what is encoded:
//! a configuration that is wrong never comes to a medium.

use super::check::{CheckError, check};
use super::wire::{MAY_BE_SKIPPED, Reader, Writer};
use crate::model::{
    Attributes, Column, Configuration, Device, DeviceId, DeviceState, Extent, Incarnation, Job, JobId,
    JobKind, JobState, Layout, MAX_COLUMNS, MAX_DEVICES, MAX_INCARNATIONS, MAX_MEMBERS, MAX_NAME,
    MAX_VOLUMES, Member, MemberId, MemberState, Priority, ReadPolicy, Section, Volume, VolumeId,
};

/// Most extents of one member, log or bitmap.
pub const MAX_EXTENTS: usize = 1 << 16;
/// Most sections of a volume.
pub const MAX_SECTIONS: usize = 1 << 16;
/// Most jobs in a pool.
pub const MAX_JOBS: usize = 1 << 16;
/// Longest error text of a job in bytes.
pub const MAX_TEXT: usize = 4096;

const POOL: u16 = 1;
const INCARNATION: u16 = 2;
const DEVICE: u16 = 3;
const VOLUME: u16 = 4;
const JOB: u16 = 5;
/// The version of every record, but for volumes and jobs that need the next one.
const VERSION: u16 = 1;
/// Of a volume that has a read policy other than the first: the policy follows at the end.
const WITH_READ_POLICY: u16 = 2;
/// Of a job that has a priority other than normal: the priority follows at the end.
const WITH_PRIORITY: u16 = 2;

/// Why bytes are no configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes of one object are wrong.
    #[error("the record of {object} is malformed: {problem}")]
    Malformed {
        /// Which.
        object: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// It is from the future.
    #[error(
        "the configuration has a record of type {kind}, version {version}, which this program does not know: use a newer one"
    )]
    UnknownRecord {
        /// Type of the record.
        kind: u16,
        /// Its version.
        version: u16,
    },
    /// It makes no sense.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// The bytes of `configuration`.
///
/// # Errors
/// It makes no sense.
pub fn encode(configuration: &Configuration) -> Result<Vec<u8>, CheckError> {
    check(configuration)?;
    let mut writer = Writer::default();
    writer.record(POOL, VERSION, |body| {
        body.uuid(configuration.pool);
        body.u64(configuration.epoch);
        body.u32(configuration.next_device);
        body.u32(configuration.next_volume);
        body.u32(configuration.next_job);
        body.text(&configuration.name);
    });
    for incarnation in &configuration.incarnations {
        writer.record(INCARNATION, VERSION, |body| {
            body.uuid(incarnation.id);
            body.u64(incarnation.first_epoch);
            body.u8(incarnation.forced.into());
        });
    }
    for device in &configuration.devices {
        writer.record(DEVICE, VERSION, |body| write_device(body, device));
    }
    for volume in &configuration.volumes {
        // Who knows only version 1 can read the pool as long as nothing of it needs more.
        let version = match volume.read_policy {
            ReadPolicy::Balanced => VERSION,
            ReadPolicy::FirstAnswer => WITH_READ_POLICY,
        };
        writer.record(VOLUME, version, |body| {
            write_volume(body, volume);
            if version == WITH_READ_POLICY {
                body.u8(1);
            }
        });
    }
    for job in &configuration.jobs {
        let version = match job.priority {
            Priority::Normal => VERSION,
            Priority::Low | Priority::High => WITH_PRIORITY,
        };
        writer.record(JOB, version, |body| {
            write_job(body, job);
            match job.priority {
                Priority::Low => body.u8(0),
                Priority::Normal => {}
                Priority::High => body.u8(2),
            }
        });
    }
    Ok(writer.0)
}

/// The configuration in `bytes`.
///
/// # Errors
/// They are malformed, or the configuration makes no sense. Never panics.
pub fn decode(bytes: &[u8]) -> Result<Configuration, DecodeError> {
    let mut reader = Reader::new(bytes, "the configuration");
    let mut decoded: Option<Configuration> = None;
    let mut latest = 0;
    while !reader.is_empty() {
        let (kind, version, length) = (reader.u16()?, reader.u16()?, reader.u32()?);
        let body = reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
        let known = version == VERSION
            || (kind == VOLUME && version == WITH_READ_POLICY)
            || (kind == JOB && version == WITH_PRIORITY);
        if !(POOL..=JOB).contains(&kind) || !known {
            if kind & MAY_BE_SKIPPED != 0 {
                continue;
            }
            return Err(DecodeError::UnknownRecord { kind, version });
        }
        if kind < latest || (kind == POOL) != decoded.is_none() {
            return Err(reader.error("its records are not in order"));
        }
        latest = kind;
        let Some(configuration) = &mut decoded else {
            decoded = Some(read_pool(body)?);
            continue;
        };
        read_record(configuration, kind, version, body)?;
    }
    let configuration = decoded.ok_or_else(|| reader.error("it has no record of the pool"))?;
    check(&configuration)?;
    Ok(configuration)
}

fn read_pool(body: &[u8]) -> Result<Configuration, DecodeError> {
    let mut body = Reader::new(body, "the pool");
    let (pool, epoch) = (body.uuid()?, body.u64()?);
    let (next_device, next_volume, next_job) = (body.u32()?, body.u32()?, body.u32()?);
    let name = body.text(MAX_NAME)?;
    body.end()?;
    Ok(Configuration {
        pool,
        name,
        epoch,
        incarnations: Vec::new(),
        devices: Vec::new(),
        volumes: Vec::new(),
        jobs: Vec::new(),
        next_device,
        next_volume,
        next_job,
    })
}

fn read_record(
    configuration: &mut Configuration,
    kind: u16,
    version: u16,
    body: &[u8],
) -> Result<(), DecodeError> {
    let mut body = Reader::new(body, "an object");
    let (object, full) = match kind {
        INCARNATION => (
            "an incarnation",
            configuration.incarnations.len() >= MAX_INCARNATIONS,
        ),
        DEVICE => ("a device", configuration.devices.len() >= MAX_DEVICES),
        VOLUME => ("a volume", configuration.volumes.len() >= MAX_VOLUMES),
        _ => ("a job", configuration.jobs.len() >= MAX_JOBS),
    };
    body.rename(object.to_owned());
    if full {
        return Err(body.error("there are too many of its kind"));
    }
    match kind {
        INCARNATION => configuration.incarnations.push(Incarnation {
            id: body.uuid()?,
            first_epoch: body.u64()?,
            forced: read_flag(&mut body)?,
        }),
        DEVICE => configuration.devices.push(read_device(&mut body)?),
        VOLUME => configuration.volumes.push(read_volume(&mut body, version)?),
        _ => configuration.jobs.push(read_job(&mut body, version)?),
    }
    body.end()
}

fn read_flag(body: &mut Reader<'_>) -> Result<bool, DecodeError> {
    match body.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(body.error("a flag is neither 0 nor 1")),
    }
}

fn write_device(body: &mut Writer, device: &Device) {
    body.u32(device.id.0);
    body.uuid(device.uuid);
    body.u64(device.size);
    body.u64(device.data_start);
    body.u32(device.block);
    let (state, since) = match device.state {
        DeviceState::Active => (0, 0),
        DeviceState::Spare => (1, 0),
        DeviceState::Evacuating => (2, 0),
        DeviceState::Faulty { since } => (3, since),
    };
    body.u8(state);
    body.u64(since);
    body.text(&device.name);
    body.text(&device.class);
    body.text(&device.enclosure);
}

fn read_device(body: &mut Reader<'_>) -> Result<Device, DecodeError> {
    let id = DeviceId(body.u32()?);
    body.rename(format!("device {id}"));
    let (uuid, size, data_start, block) = (body.uuid()?, body.u64()?, body.u64()?, body.u32()?);
    let (state, since) = (body.u8()?, body.u64()?);
    let state = match state {
        0 => DeviceState::Active,
        1 => DeviceState::Spare,
        2 => DeviceState::Evacuating,
        3 => DeviceState::Faulty { since },
        _ => return Err(body.error("its state is unknown")),
    };
    Ok(Device {
        id,
        uuid,
        size,
        data_start,
        block,
        state,
        name: body.text(MAX_NAME)?,
        class: body.text(MAX_NAME)?,
        enclosure: body.text(MAX_NAME)?,
    })
}

fn write_extents(body: &mut Writer, extents: &[Extent]) {
    body.count(extents.len());
    for extent in extents {
        body.u32(extent.device.0);
        body.u64(extent.start);
        body.u64(extent.length);
    }
}

fn read_extents(body: &mut Reader<'_>) -> Result<Vec<Extent>, DecodeError> {
    body.list(MAX_EXTENTS, |body| {
        Ok(Extent {
            device: DeviceId(body.u32()?),
            start: body.u64()?,
            length: body.u64()?,
        })
    })
}

fn write_device_ids(body: &mut Writer, ids: &[DeviceId]) {
    body.count(ids.len());
    ids.iter().for_each(|id| body.u32(id.0));
}

fn read_device_ids(body: &mut Reader<'_>) -> Result<Vec<DeviceId>, DecodeError> {
    body.list(MAX_DEVICES, |body| Ok(DeviceId(body.u32()?)))
}

fn write_attributes(body: &mut Writer, attributes: &Attributes) {
    let (kind, columns, legs) = match attributes.layout {
        Layout::Concat => (0, 0, 0),
        Layout::Stripe { columns } => (1, columns, 0),
        Layout::Mirror { legs } => (2, 0, legs),
        Layout::StripeMirror { columns, legs } => (3, columns, legs),
        Layout::Raid5 { columns } => (4, columns, 0),
        Layout::Raid6 { columns } => (5, columns, 0),
    };
    body.u8(kind);
    body.u32(columns);
    body.u32(legs);
    body.u64(attributes.stripe_unit);
    body.text(&attributes.class);
    write_device_ids(body, &attributes.devices);
}

fn read_attributes(body: &mut Reader<'_>) -> Result<Attributes, DecodeError> {
    let (kind, columns, legs) = (body.u8()?, body.u32()?, body.u32()?);
    let layout = match kind {
        0 => Layout::Concat,
        1 => Layout::Stripe { columns },
        2 => Layout::Mirror { legs },
        3 => Layout::StripeMirror { columns, legs },
        4 => Layout::Raid5 { columns },
        5 => Layout::Raid6 { columns },
        _ => return Err(body.error("its layout is unknown")),
    };
    Ok(Attributes {
        layout,
        stripe_unit: body.u64()?,
        class: body.text(MAX_NAME)?,
        devices: read_device_ids(body)?,
    })
}

fn write_volume(body: &mut Writer, volume: &Volume) {
    body.u32(volume.id.0);
    body.uuid(volume.uuid);
    body.text(&volume.name);
    body.u64(volume.size);
    body.u32(volume.block);
    write_attributes(body, &volume.attributes);
    body.u64(volume.region);
    write_device_ids(body, &volume.log_devices);
    write_extents(body, &volume.bitmap);
    body.u64(volume.bitmap_generation);
    body.u32(volume.next_member);
    body.u32(volume.next_section);
    body.count(volume.sections.len());
    volume
        .sections
        .iter()
        .for_each(|section| write_section(body, section));
}

fn read_volume(body: &mut Reader<'_>, version: u16) -> Result<Volume, DecodeError> {
    let id = VolumeId(body.u32()?);
    body.rename(format!("volume {}", id.0));
    let uuid = body.uuid()?;
    let name = body.text(MAX_NAME)?;
    Ok(Volume {
        id,
        uuid,
        name,
        size: body.u64()?,
        block: body.u32()?,
        attributes: read_attributes(body)?,
        region: body.u64()?,
        log_devices: read_device_ids(body)?,
        bitmap: read_extents(body)?,
        bitmap_generation: body.u64()?,
        next_member: body.u32()?,
        next_section: body.u32()?,
        sections: body.list(MAX_SECTIONS, read_section)?,
        read_policy: if version == WITH_READ_POLICY {
            read_policy(body)?
        } else {
            ReadPolicy::Balanced
        },
    })
}

fn read_policy(body: &mut Reader<'_>) -> Result<ReadPolicy, DecodeError> {
    match body.u8()? {
        0 => Ok(ReadPolicy::Balanced),
        1 => Ok(ReadPolicy::FirstAnswer),
        _ => Err(body.error("its read policy is unknown")),
    }
}

fn write_section(body: &mut Writer, section: &Section) {
    body.u32(section.id);
    body.u64(section.length);
    body.u64(section.unit);
    body.u32(section.parity);
    body.u64(section.rotation);
    write_extents(body, &section.log);
    body.count(section.columns.len());
    for column in &section.columns {
        body.count(column.members.len());
        for member in &column.members {
            write_member(body, member);
        }
    }
}

fn read_section(body: &mut Reader<'_>) -> Result<Section, DecodeError> {
    Ok(Section {
        id: body.u32()?,
        length: body.u64()?,
        unit: body.u64()?,
        parity: body.u32()?,
        rotation: body.u64()?,
        log: read_extents(body)?,
        columns: body.list(MAX_COLUMNS, |body| {
            let members = body.list(MAX_MEMBERS, read_member)?;
            Ok(Column { members })
        })?,
    })
}

fn write_member(body: &mut Writer, member: &Member) {
    body.u32(member.id.0);
    let (state, cursor) = match member.state {
        MemberState::InSync => (0, 0),
        MemberState::Filling { cursor } => (1, cursor),
        MemberState::Stale { cursor } => (2, cursor),
    };
    body.u8(state);
    body.u64(cursor);
    write_extents(body, &member.extents);
}

fn read_member(body: &mut Reader<'_>) -> Result<Member, DecodeError> {
    let id = MemberId(body.u32()?);
    let (state, cursor) = (body.u8()?, body.u64()?);
    let state = match state {
        0 => MemberState::InSync,
        1 => MemberState::Filling { cursor },
        2 => MemberState::Stale { cursor },
        _ => return Err(body.error("the state of a member is unknown")),
    };
    let extents = read_extents(body)?;
    Ok(Member { id, state, extents })
}

/// An optional number: a flag and the number, which is 0 if there is none.
fn write_option(body: &mut Writer, number: Option<u32>) {
    body.u8(number.is_some().into());
    body.u32(number.unwrap_or(0));
}

fn read_option(body: &mut Reader<'_>) -> Result<Option<u32>, DecodeError> {
    let (flag, number) = (read_flag(body)?, body.u32()?);
    Ok(flag.then_some(number))
}

fn write_job(body: &mut Writer, job: &Job) {
    body.u32(job.id.0);
    let (state, text) = match &job.state {
        JobState::Running => (0, ""),
        JobState::Paused => (1, ""),
        JobState::Done => (2, ""),
        JobState::Cancelled => (3, ""),
        JobState::Failed(text) => (4, text.as_str()),
    };
    body.u8(state);
    body.text(text);
    body.u64(job.done);
    body.u64(job.total);
    body.u64(job.throttle);
    match &job.kind {
        JobKind::Resync { volume } => {
            body.u8(0);
            body.u32(volume.0);
        }
        JobKind::Relayout { volume, target } => {
            body.u8(1);
            body.u32(volume.0);
            write_attributes(body, target);
        }
        JobKind::Move { volume, from, to } => {
            body.u8(2);
            body.u32(volume.0);
            write_option(body, from.map(|id| id.0));
            write_option(body, to.map(|id| id.0));
        }
        JobKind::Evacuate { device, to, remove } => {
            body.u8(3);
            body.u32(device.0);
            write_option(body, to.map(|id| id.0));
            body.u8((*remove).into());
        }
        JobKind::Scrub { volume } => {
            body.u8(4);
            write_option(body, volume.map(|id| id.0));
        }
        JobKind::AutoTune { window } => {
            body.u8(5);
            body.u32(*window);
        }
    }
}

fn read_job(body: &mut Reader<'_>, version: u16) -> Result<Job, DecodeError> {
    let id = JobId(body.u32()?);
    body.rename(format!("job {}", id.0));
    let (state, text) = (body.u8()?, body.text(MAX_TEXT)?);
    let state = match state {
        0 => JobState::Running,
        1 => JobState::Paused,
        2 => JobState::Done,
        3 => JobState::Cancelled,
        4 => JobState::Failed(text),
        _ => return Err(body.error("its state is unknown")),
    };
    let (done, total, throttle) = (body.u64()?, body.u64()?, body.u64()?);
    let kind = match body.u8()? {
        0 => JobKind::Resync {
            volume: VolumeId(body.u32()?),
        },
        1 => JobKind::Relayout {
            volume: VolumeId(body.u32()?),
            target: read_attributes(body)?,
        },
        2 => JobKind::Move {
            volume: VolumeId(body.u32()?),
            from: read_option(body)?.map(DeviceId),
            to: read_option(body)?.map(DeviceId),
        },
        3 => JobKind::Evacuate {
            device: DeviceId(body.u32()?),
            to: read_option(body)?.map(DeviceId),
            remove: read_flag(body)?,
        },
        4 => JobKind::Scrub {
            volume: read_option(body)?.map(VolumeId),
        },
        5 => JobKind::AutoTune { window: body.u32()? },
        _ => return Err(body.error("its kind is unknown")),
    };
    let priority = match version {
        WITH_PRIORITY => read_priority(body)?,
        _ => Priority::Normal,
    };
    Ok(Job {
        id,
        kind,
        state,
        done,
        total,
        throttle,
        priority,
    })
}

fn read_priority(body: &mut Reader<'_>) -> Result<Priority, DecodeError> {
    match body.u8()? {
        0 => Ok(Priority::Low),
        1 => Ok(Priority::Normal),
        2 => Ok(Priority::High),
        _ => Err(body.error("its priority is unknown")),
    }
}
