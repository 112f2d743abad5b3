//! A pool's configuration as people and programs see it.

use std::collections::{BTreeMap, BTreeSet};

use api::storage::{
    Health, JobPriority, JobState, JobStatus, LayoutKind, MemberHealth, MemberStatus, PoolDevice,
    PoolDeviceState, PoolEvent, PoolEventKind, PoolStatus, Shape, VolumeStatus,
};
use volume_manager::model::{
    Attributes, Column, Configuration, Device, DeviceId, DeviceState, Job, JobKind, JobState as ModelState,
    Layout, Member, MemberState, Priority, ReadPolicy, Section, Volume, VolumeId,
};
use volume_manager::{Event, Pace};

/// Which devices do their part.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    /// These hold what the configuration says.
    pub(crate) in_service: BTreeSet<DeviceId>,
    /// These are there with old content.
    pub(crate) returned: BTreeSet<DeviceId>,
    /// Requests that failed, if the pool is open.
    pub(crate) errors: BTreeMap<DeviceId, u64>,
}

pub(crate) fn pool(
    config: &Configuration,
    presence: &Presence,
    jobs: &[Job],
    notes: Vec<String>,
) -> PoolStatus {
    let mut used: BTreeMap<DeviceId, u64> = BTreeMap::new();
    for extent in config.extents() {
        *used.entry(extent.device).or_default() += extent.length;
    }
    let devices: Vec<PoolDevice> = config
        .devices
        .iter()
        .map(|device| view_device(device, presence, used.get(&device.id).copied().unwrap_or(0)))
        .collect();
    let volumes: Vec<VolumeStatus> = config
        .volumes
        .iter()
        .map(|volume| view_volume(config, volume, presence))
        .collect();
    let gone = |device: &PoolDevice| {
        matches!(
            device.state,
            PoolDeviceState::Missing | PoolDeviceState::Returned | PoolDeviceState::Faulty
        )
    };
    let of_devices = match devices.iter().any(gone) {
        true => Health::Degraded,
        false => Health::Healthy,
    };
    let worst = volumes.iter().map(|volume| volume.state).max();
    PoolStatus {
        name: config.name.clone(),
        id: config.pool.to_string(),
        epoch: config.epoch,
        state: worst.unwrap_or(Health::Healthy).max(of_devices),
        size: devices.iter().map(|device| device.size).sum(),
        used: used.values().sum(),
        devices,
        volumes,
        jobs: jobs.iter().map(|job| view_job(config, job, None)).collect(),
        files: None,
        notes,
    }
}

fn view_device(device: &Device, presence: &Presence, used: u64) -> PoolDevice {
    let state = if presence.in_service.contains(&device.id) {
        match device.state {
            DeviceState::Active => PoolDeviceState::Active,
            DeviceState::Spare => PoolDeviceState::Spare,
            DeviceState::Evacuating => PoolDeviceState::Evacuating,
            DeviceState::Faulty { .. } => PoolDeviceState::Faulty,
        }
    } else if presence.returned.contains(&device.id) {
        PoolDeviceState::Returned
    } else {
        PoolDeviceState::Missing
    };
    PoolDevice {
        id: device.id.to_string(),
        name: device.name.clone(),
        uuid: device.uuid.to_string(),
        state,
        size: device.size.saturating_sub(device.data_start),
        used,
        block: device.block,
        class: device.class.clone(),
        enclosure: device.enclosure.clone(),
        errors: presence.errors.get(&device.id).copied(),
    }
}

fn view_volume(config: &Configuration, volume: &Volume, presence: &Presence) -> VolumeStatus {
    let mut members = Vec::new();
    for (section, model) in (0..).zip(&volume.sections) {
        for (column, model) in (0..).zip(&model.columns) {
            members.extend(
                model
                    .members
                    .iter()
                    .map(|member| view_member(config, section, column, member, presence)),
            );
        }
    }
    VolumeStatus {
        name: volume.name.clone(),
        id: volume.uuid.to_string(),
        state: health(volume, presence),
        size: volume.size,
        used: volume.extents().map(|extent| extent.length).sum(),
        block: volume.block,
        shape: shape(config, &volume.attributes),
        tolerates: volume.attributes.layout.tolerates(),
        read_policy: match volume.read_policy {
            ReadPolicy::Balanced => api::storage::ReadPolicy::Balanced,
            ReadPolicy::FirstAnswer => api::storage::ReadPolicy::FirstAnswer,
        },
        members,
    }
}

fn view_member(
    config: &Configuration,
    section: u32,
    column: u32,
    member: &Member,
    presence: &Presence,
) -> MemberStatus {
    let mut devices: Vec<String> = Vec::new();
    for extent in &member.extents {
        let name = device_name(config, extent.device);
        if devices.last() != Some(&name) {
            devices.push(name);
        }
    }
    MemberStatus {
        section,
        column,
        devices,
        size: member.length(),
        state: member_health(member, presence),
    }
}

fn member_health(member: &Member, presence: &Presence) -> MemberHealth {
    let has = |set: &BTreeSet<DeviceId>| member.extents.iter().all(|extent| set.contains(&extent.device));
    let there = |extent: &volume_manager::model::Extent| {
        presence.in_service.contains(&extent.device) || presence.returned.contains(&extent.device)
    };
    match member.state {
        _ if !member.extents.iter().all(there) => MemberHealth::Missing,
        _ if !has(&presence.in_service) => MemberHealth::Stale,
        MemberState::InSync => MemberHealth::InSync,
        MemberState::Filling { .. } => MemberHealth::Filling,
        MemberState::Stale { .. } => MemberHealth::Stale,
    }
}

/// The worst of its sections.
fn health(volume: &Volume, presence: &Presence) -> Health {
    let legs = volume.attributes.layout.legs() as usize;
    let of_section = |section: &Section| section_health(section, legs, presence);
    volume
        .sections
        .iter()
        .map(of_section)
        .max()
        .unwrap_or(Health::Healthy)
}

fn section_health(section: &Section, legs: usize, presence: &Presence) -> Health {
    let columns = section
        .columns
        .iter()
        .map(|column| column_health(column, legs, presence));
    let columns: Vec<Health> = columns.collect();
    let (lost, kept): (Vec<Health>, Vec<Health>) =
        columns.into_iter().partition(|health| *health == Health::Failed);
    if lost.len() > section.parity as usize {
        return Health::Failed;
    }
    let coming = |column: &Column| count(column, &COMING, presence) > 0;
    let of_lost = section
        .columns
        .iter()
        .filter(|column| column_health(column, legs, presence) == Health::Failed)
        .map(|column| {
            if coming(column) {
                Health::Resyncing
            } else {
                Health::Degraded
            }
        });
    of_lost.chain(kept).max().unwrap_or(Health::Healthy)
}

/// What becomes good by and by.
const COMING: [MemberHealth; 2] = [MemberHealth::Filling, MemberHealth::Stale];

/// Members of a column that are in one of these states.
fn count(column: &Column, wanted: &[MemberHealth], presence: &Presence) -> usize {
    let members = column
        .members
        .iter()
        .map(|member| member_health(member, presence));
    members.filter(|health| wanted.contains(health)).count()
}

/// A column alone: failed if nothing of it is good.
fn column_health(column: &Column, legs: usize, presence: &Presence) -> Health {
    let good = count(column, &[MemberHealth::InSync], presence);
    match good {
        0 => Health::Failed,
        good if good >= legs => Health::Healthy,
        good if good + count(column, &COMING, presence) >= legs => Health::Resyncing,
        _ => Health::Degraded,
    }
}

fn shape(config: &Configuration, attributes: &Attributes) -> Shape {
    let layout = match attributes.layout {
        Layout::Concat => LayoutKind::Concat,
        Layout::Stripe { .. } => LayoutKind::Stripe,
        Layout::Mirror { .. } => LayoutKind::Mirror,
        Layout::StripeMirror { .. } => LayoutKind::StripeMirror,
        Layout::Raid5 { .. } => LayoutKind::Raid5,
        Layout::Raid6 { .. } => LayoutKind::Raid6,
    };
    Shape {
        layout,
        columns: attributes.layout.columns(),
        copies: attributes.layout.legs(),
        stripe_unit: attributes.stripe_unit,
        class: attributes.class.clone(),
        devices: attributes
            .devices
            .iter()
            .map(|id| device_name(config, *id))
            .collect(),
    }
}

/// `pace` is how fast it gets on, if it runs here.
pub(crate) fn view_job(config: &Configuration, job: &Job, pace: Option<Pace>) -> JobStatus {
    // What is known after a moment only.
    let pace = pace.filter(|pace| *pace != Pace::default());
    let volume = |id: VolumeId| match config.volume(id) {
        Some(volume) => format!("volume {}", volume.name),
        None => format!("volume number {} (deleted)", id.0),
    };
    let device = |id: DeviceId| device_name(config, id);
    let (kind, what) = match &job.kind {
        JobKind::Resync { volume: id } => ("resync", format!("bring {} up to date", volume(*id))),
        JobKind::Relayout { volume: id, target } => {
            ("set-layout", format!("make {} a {}", volume(*id), target.layout))
        }
        JobKind::Move { volume: id, from, to } => {
            let mut text = format!("move {}", volume(*id));
            if let Some(from) = from {
                text += &format!(" from {}", device(*from));
            }
            if let Some(to) = to {
                text += &format!(" to {}", device(*to));
            }
            ("move", text)
        }
        JobKind::Evacuate {
            device: id,
            to,
            remove,
        } => {
            let mut text = format!("move everything off {}", device(*id));
            if let Some(to) = to {
                text += &format!(" to {}", device(*to));
            }
            if *remove {
                text += " and remove it";
            }
            ("evacuate", text)
        }
        JobKind::Scrub { volume: Some(id) } => ("scrub", format!("check {}", volume(*id))),
        JobKind::Scrub { volume: None } => ("scrub", "check all volumes".to_owned()),
        JobKind::AutoTune { .. } => ("auto-tune", "move load off busy devices".to_owned()),
    };
    let (state, reason) = match &job.state {
        ModelState::Running => (JobState::Running, None),
        ModelState::Paused => (JobState::Paused, None),
        ModelState::Done => (JobState::Done, None),
        ModelState::Cancelled => (JobState::Cancelled, None),
        ModelState::Failed(reason) => (JobState::Failed, Some(reason.clone())),
    };
    JobStatus {
        id: job.id.0,
        kind: kind.to_owned(),
        what,
        state,
        reason,
        done: job.done,
        total: job.total,
        throttle: job.throttle,
        priority: match job.priority {
            Priority::Low => JobPriority::Low,
            Priority::Normal => JobPriority::Normal,
            Priority::High => JobPriority::High,
        },
        rate: pace.map(|pace| pace.rate),
        seconds_left: pace.and_then(|pace| pace.left).map(|left| left.as_secs()),
        volatile: false,
        moved: None,
    }
}

pub(crate) fn event(event: &Event) -> PoolEvent {
    PoolEvent {
        kind: match event {
            Event::DeviceFailed { .. } => PoolEventKind::DeviceFailed,
            Event::DeviceAdded { .. } => PoolEventKind::DeviceAdded,
            Event::DeviceRemoved { .. } => PoolEventKind::DeviceRemoved,
            Event::VolumeHealthy { .. } => PoolEventKind::VolumeHealthy,
            Event::VolumeDegraded { .. } => PoolEventKind::VolumeDegraded,
            Event::JobEnded { failed: None, .. } => PoolEventKind::JobEnded,
            Event::JobEnded { failed: Some(_), .. } => PoolEventKind::JobFailed,
            Event::Repaired { .. } => PoolEventKind::Repaired,
        },
        text: event.to_string(),
    }
}

fn device_name(config: &Configuration, id: DeviceId) -> String {
    match config.device(id) {
        Some(device) => device.name.clone(),
        None => format!("{id} (removed)"),
    }
}
