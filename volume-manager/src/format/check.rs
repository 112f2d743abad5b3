//! Whether a configuration makes sense. The same check stands before every write and behind every read.

use std::collections::BTreeSet;

use super::configuration::{MAX_EXTENTS, MAX_JOBS, MAX_SECTIONS, MAX_TEXT};
use crate::model::{
    Attributes, BLOCK, Configuration, Device, DeviceState, Extent, Job, JobKind, JobState, Layout,
    MAX_COLUMNS, MAX_DEVICES, MAX_INCARNATIONS, MAX_MEMBERS, MAX_NAME, MAX_VOLUMES, Member, MemberState,
    Section, Volume,
};

/// A configuration makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object} of the configuration is invalid: {problem}")]
pub struct CheckError {
    /// Which object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

type Checked = Result<(), CheckError>;

/// An error about `object` unless `holds`.
fn demand(holds: bool, object: impl FnOnce() -> String, problem: &str) -> Checked {
    if holds {
        return Ok(());
    }
    let (object, problem) = (object(), problem.to_owned());
    Err(CheckError { object, problem })
}

/// Whether `configuration` makes sense.
///
/// # Errors
/// What does not, and why.
pub fn check(configuration: &Configuration) -> Checked {
    check_pool(configuration)?;
    for device in &configuration.devices {
        check_device(configuration, device)?;
    }
    let mut names = BTreeSet::new();
    for volume in &configuration.volumes {
        check_volume(configuration, volume)?;
        let object = || describe(volume);
        demand(names.insert(&volume.name), object, "another volume has its name")?;
    }
    for job in &configuration.jobs {
        check_job(configuration, job)?;
    }
    check_overlaps(configuration)
}

/// Whether the numbers grow.
fn ascends<T: Ord>(numbers: impl Iterator<Item = T> + Clone) -> bool {
    numbers.clone().zip(numbers.skip(1)).all(|(one, next)| one < next)
}

/// Whether `name` may stand in a line of text.
fn is_text(name: &str, least: usize) -> bool {
    (least..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control)
}

fn is_aligned(value: u64) -> bool {
    value.is_multiple_of(BLOCK)
}

fn is_block_size(block: u32) -> bool {
    block.is_power_of_two() && (512..=4096).contains(&block)
}

fn check_pool(configuration: &Configuration) -> Checked {
    let pool = || format!("pool {:?}", configuration.name);
    let Configuration {
        epoch,
        incarnations,
        devices,
        volumes,
        jobs,
        ..
    } = configuration;
    demand(
        is_text(&configuration.name, 1),
        pool,
        "its name is empty, too long or no plain text",
    )?;
    demand(*epoch > 0, pool, "its epoch is 0")?;
    demand(
        (1..=MAX_INCARNATIONS).contains(&incarnations.len()),
        pool,
        "it has too few or too many incarnations",
    )?;
    demand(
        ascends(incarnations.iter().map(|incarnation| incarnation.first_epoch)),
        pool,
        "its incarnations are not in order",
    )?;
    let ids: BTreeSet<_> = incarnations.iter().map(|incarnation| incarnation.id).collect();
    demand(
        ids.len() == incarnations.len(),
        pool,
        "an incarnation occurs twice",
    )?;
    let last = incarnations
        .last()
        .map_or(0, |incarnation| incarnation.first_epoch);
    demand(
        last <= *epoch,
        pool,
        "its last incarnation begins after its epoch",
    )?;
    demand(devices.len() <= MAX_DEVICES, pool, "it has too many devices")?;
    demand(volumes.len() <= MAX_VOLUMES, pool, "it has too many volumes")?;
    demand(jobs.len() <= MAX_JOBS, pool, "it has too many jobs")?;
    demand(
        ascends(devices.iter().map(|device| device.id)),
        pool,
        "its devices are not in order",
    )?;
    demand(
        ascends(volumes.iter().map(|volume| volume.id)),
        pool,
        "its volumes are not in order",
    )?;
    demand(
        ascends(jobs.iter().map(|job| job.id)),
        pool,
        "its jobs are not in order",
    )?;
    let uuids: BTreeSet<_> = devices.iter().map(|device| device.uuid).collect();
    demand(
        uuids.len() == devices.len(),
        pool,
        "two devices have the same identity",
    )?;
    demand(
        devices.iter().any(Device::is_holder),
        pool,
        "no device is left to hold it",
    )?;
    let next = [
        (
            devices.last().map(|device| device.id.0),
            configuration.next_device,
        ),
        (
            volumes.last().map(|volume| volume.id.0),
            configuration.next_volume,
        ),
        (jobs.last().map(|job| job.id.0), configuration.next_job),
    ];
    let fresh = next
        .iter()
        .all(|(last, next)| last.is_none_or(|last| last < *next));
    demand(fresh, pool, "a number for the next object is in use")
}

fn check_device(configuration: &Configuration, device: &Device) -> Checked {
    let object = || format!("device {} ({})", device.id, device.name);
    demand(
        is_text(&device.name, 0),
        object,
        "its name is too long or no plain text",
    )?;
    demand(
        is_text(&device.class, 0),
        object,
        "its class is too long or no plain text",
    )?;
    demand(
        is_text(&device.enclosure, 0),
        object,
        "its enclosure is too long or no plain text",
    )?;
    demand(
        is_block_size(device.block),
        object,
        "its block size is not between 512 and 4096",
    )?;
    demand(
        is_aligned(device.data_start),
        object,
        "its data area is not aligned",
    )?;
    demand(
        (1..=device.size).contains(&device.data_start),
        object,
        "its data area begins beyond its end",
    )?;
    match device.state {
        DeviceState::Faulty { since } => {
            demand(since <= configuration.epoch, object, "it failed in the future")
        }
        _ => Ok(()),
    }
}

fn describe(volume: &Volume) -> String {
    format!("volume {:?}", volume.name)
}

fn check_attributes(attributes: &Attributes, object: impl Fn() -> String) -> Checked {
    let Attributes {
        layout,
        stripe_unit,
        class,
        devices,
    } = attributes;
    let most = u32::try_from(MAX_COLUMNS).unwrap_or(u32::MAX);
    let (least, legs) = match layout {
        Layout::Concat => (1, 1..=1),
        Layout::Mirror { .. } => (1, 2..=8),
        Layout::Stripe { .. } => (2, 1..=1),
        Layout::StripeMirror { .. } => (2, 2..=8),
        Layout::Raid5 { .. } => (3, 1..=1),
        Layout::Raid6 { .. } => (4, 1..=1),
    };
    demand(
        (least..=most).contains(&layout.columns()),
        &object,
        "its layout has too few or too many columns",
    )?;
    demand(
        legs.contains(&layout.legs()),
        &object,
        "its layout has too few or too many legs",
    )?;
    let unit = layout.columns() == 1 || (stripe_unit.is_power_of_two() && *stripe_unit >= BLOCK);
    demand(
        unit,
        &object,
        "its stripe unit is no power of two of at least 4096",
    )?;
    demand(
        is_text(class, 0),
        &object,
        "its class is too long or no plain text",
    )?;
    demand(devices.len() <= MAX_DEVICES, &object, "it names too many devices")
}

fn check_volume(configuration: &Configuration, volume: &Volume) -> Checked {
    let object = || describe(volume);
    demand(
        is_text(&volume.name, 1),
        object,
        "its name is empty, too long or no plain text",
    )?;
    demand(
        is_block_size(volume.block),
        object,
        "its block size is not between 512 and 4096",
    )?;
    demand(
        volume.region.is_power_of_two() && volume.region >= BLOCK,
        object,
        "its regions are no power of two of at least 4096",
    )?;
    check_attributes(&volume.attributes, object)?;
    demand(
        volume.sections.len() <= MAX_SECTIONS,
        object,
        "it has too many sections",
    )?;
    demand(
        volume.log_devices.len() <= MAX_DEVICES,
        object,
        "it has too many log devices",
    )?;
    for id in &volume.log_devices {
        demand(
            configuration.device(*id).is_some(),
            object,
            "a log device is not in the pool",
        )?;
    }
    demand(
        volume.bitmap_generation <= configuration.epoch,
        object,
        "its bitmap is from the future",
    )?;
    check_extents(configuration, volume, "the bitmap", &volume.bitmap)?;
    let mut members = BTreeSet::new();
    let mut sections = BTreeSet::new();
    let mut size = Some(0_u64);
    for section in &volume.sections {
        check_section(configuration, volume, section)?;
        demand(
            section.id < volume.next_section && sections.insert(section.id),
            object,
            "the number of a section is used twice, or is to be used",
        )?;
        for member in section.columns.iter().flat_map(|column| &column.members) {
            demand(
                member.id.0 < volume.next_member && members.insert(member.id),
                object,
                "the number of a member is used twice, or is to be used",
            )?;
        }
        size = size.and_then(|size| size.checked_add(section.length));
    }
    demand(
        size == Some(volume.size),
        object,
        "its size is not the sum of its sections",
    )
}

fn check_section(configuration: &Configuration, volume: &Volume, section: &Section) -> Checked {
    let object = || format!("section {} of {}", section.id, describe(volume));
    let columns = section.columns.len();
    let parity = usize::try_from(section.parity).unwrap_or(usize::MAX);
    demand(
        (1..=MAX_COLUMNS).contains(&columns),
        object,
        "it has too few or too many columns",
    )?;
    demand(
        parity <= 2 && parity < columns,
        object,
        "it has more parity than columns",
    )?;
    demand(
        section.length > 0 && is_aligned(section.length),
        object,
        "its length is 0 or not aligned",
    )?;
    let unit =
        section.unit >= BLOCK && is_aligned(section.unit) && (columns == 1 || section.unit.is_power_of_two());
    demand(
        unit,
        object,
        "its stripe unit is no power of two of at least 4096",
    )?;
    check_extents(configuration, volume, "a parity log", &section.log)?;
    let mut length = None;
    for column in &section.columns {
        demand(
            (1..=MAX_MEMBERS).contains(&column.members.len()),
            object,
            "a column has too few or too many members",
        )?;
        for member in &column.members {
            let own = check_member(configuration, volume, member)?;
            demand(
                *length.get_or_insert(own) == own,
                object,
                "its members are not equally long",
            )?;
        }
    }
    let rows = length.unwrap_or(0) / section.unit;
    let capacity = if columns == 1 {
        length
    } else {
        section
            .data_columns()
            .checked_mul(section.unit)
            .and_then(|row| row.checked_mul(rows))
    };
    demand(
        capacity.is_some_and(|capacity| section.length <= capacity),
        object,
        "it is longer than its columns",
    )
}

/// The member's length.
fn check_member(configuration: &Configuration, volume: &Volume, member: &Member) -> Result<u64, CheckError> {
    let object = || format!("member {} of {}", member.id.0, describe(volume));
    demand(!member.extents.is_empty(), object, "it has no extents")?;
    check_extents(configuration, volume, "a member", &member.extents)?;
    let mut lengths = member.extents.iter().map(|extent| extent.length);
    let length = lengths.try_fold(0_u64, u64::checked_add);
    demand(length.is_some(), object, "it is too long")?;
    let length = length.unwrap_or(0);
    let cursor = match member.state {
        MemberState::InSync => 0,
        MemberState::Filling { cursor } | MemberState::Stale { cursor } => cursor,
    };
    demand(cursor <= length, object, "its cursor is beyond its end")?;
    Ok(length)
}

fn check_extents(configuration: &Configuration, volume: &Volume, what: &str, extents: &[Extent]) -> Checked {
    let object = || format!("{what} of {}", describe(volume));
    demand(extents.len() <= MAX_EXTENTS, object, "it has too many extents")?;
    for extent in extents {
        let object = || {
            format!(
                "extent at {} on {} in {what} of {}",
                extent.start,
                extent.device,
                describe(volume)
            )
        };
        let Some(device) = configuration.device(extent.device) else {
            return demand(false, object, "its device is not in the pool");
        };
        demand(
            extent.length > 0 && is_aligned(extent.start) && is_aligned(extent.length),
            object,
            "it is empty or not aligned",
        )?;
        let end = extent.start.checked_add(extent.length);
        demand(
            extent.start >= device.data_start && end.is_some_and(|end| end <= device.size),
            object,
            "it is not within the data area of its device",
        )?;
    }
    Ok(())
}

fn check_overlaps(configuration: &Configuration) -> Checked {
    let mut all: Vec<(&Extent, &Volume)> = configuration
        .volumes
        .iter()
        .flat_map(|volume| volume.extents().map(move |extent| (extent, volume)))
        .collect();
    all.sort_unstable_by_key(|(extent, _)| (extent.device, extent.start));
    for (one, next) in all.iter().zip(all.iter().skip(1)) {
        let ((first, of), (second, other)) = (one, next);
        // `check_extents` has seen that the sum does not overflow.
        let apart = first.device != second.device || first.start + first.length <= second.start;
        demand(
            apart,
            || {
                format!(
                    "extent at {} on {} of {}",
                    second.start,
                    second.device,
                    describe(other)
                )
            },
            &format!("it overlaps one at {} of {}", first.start, describe(of)),
        )?;
    }
    Ok(())
}

fn check_job(configuration: &Configuration, job: &Job) -> Checked {
    let object = || format!("job {}", job.id.0);
    if let JobState::Failed(text) = &job.state {
        demand(text.len() <= MAX_TEXT, object, "its error is too long")?;
    }
    // What a job that has ended was about may be gone.
    if !matches!(job.state, JobState::Running | JobState::Paused) {
        return Ok(());
    }
    let (volume, device) = match &job.kind {
        JobKind::Resync { volume } | JobKind::Relayout { volume, .. } | JobKind::Move { volume, .. } => {
            (Some(*volume), None)
        }
        JobKind::Evacuate { device, .. } => (None, Some(*device)),
        JobKind::Scrub { volume } => (*volume, None),
        JobKind::AutoTune { .. } => (None, None),
    };
    demand(
        volume.is_none_or(|id| configuration.volume(id).is_some()),
        object,
        "its volume is not in the pool",
    )?;
    demand(
        device.is_none_or(|id| configuration.device(id).is_some()),
        object,
        "its device is not in the pool",
    )?;
    match &job.kind {
        JobKind::Relayout { target, .. } => check_attributes(target, object),
        _ => Ok(()),
    }
}
