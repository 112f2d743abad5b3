//! Operations on an open pool: names become numbers, defaults are filled in, jobs are started.

use std::rc::Rc;

use api::storage::{JobPriority, LayoutKind, NewDevice as NewDeviceArguments, Operation, ReadPolicy, Shape};
use api::{Problem, ProblemKind};
use block_io::WorkerClock;
use volume_manager::model::{
    Attributes, BLOCK, Configuration, DeviceId, DeviceState, Job, JobId, JobKind, JobState, Layout,
    MemberState, Priority, VolumeId,
};
use volume_manager::{NewDevice, NewVolume, place};

use crate::device::{self, Device};
use crate::member::Member;
use crate::problem::of_pool;
use crate::random;

pub(crate) type Pool = volume_manager::Pool<Member, WorkerClock>;

/// What is to be waited for after an operation.
#[derive(Debug, Default)]
pub(crate) struct Started {
    /// These jobs.
    pub(crate) jobs: Vec<JobId>,
}

impl From<JobId> for Started {
    fn from(job: JobId) -> Self {
        Self { jobs: vec![job] }
    }
}

/// The devices that an operation adds.
pub(crate) fn new_devices(operation: &Operation) -> Vec<NewDeviceArguments> {
    match operation {
        Operation::AddDevices { devices } => devices.clone(),
        Operation::ReplaceDevice { by, .. } => vec![by.clone()],
        _ => Vec::new(),
    }
}

/// Does `operation`, but for the jobs that it starts. The devices that it adds are opened if `opened` has none.
pub(crate) async fn begin(
    pool: &Pool,
    operation: Operation,
    opened: Vec<Rc<Device>>,
) -> Result<Started, Problem> {
    match operation {
        Operation::Heal => {
            pool.heal().await.map_err(|error| of_pool("pool", error))?;
            Ok(running(pool, |_| true))
        }
        Operation::Settle => {
            pool.heal().await.map_err(|error| of_pool("pool", error))?;
            Ok(running(pool, |kind| matches!(kind, JobKind::Resync { .. })))
        }
        Operation::Scrub { volume, throttle } => {
            let volume = volume.map(|name| find_volume(pool, &name)).transpose()?;
            start(pool, "scrub", JobKind::Scrub { volume }, throttle).await
        }
        Operation::AddDevices { devices } => {
            add_devices(pool, devices, opened).await?;
            Ok(Started::default())
        }
        Operation::RemoveDevice { device } => {
            let id = find_device(&pool.configuration(), &device)?;
            let removed = pool.remove_device(id).await;
            removed.map_err(|error| {
                of_pool(&device, error).remedy(format!("`smsvmm device evacuate {device}` empties it"))
            })?;
            Ok(Started::default())
        }
        Operation::EvacuateDevice { device, to, throttle } => {
            let config = pool.configuration();
            let kind = JobKind::Evacuate {
                device: find_device(&config, &device)?,
                to: to.map(|to| find_device(&config, &to)).transpose()?,
                remove: false,
            };
            start(pool, &device, kind, throttle).await
        }
        Operation::ReplaceDevice { device, by, throttle } => {
            replace(pool, &device, by, throttle, opened).await
        }
        Operation::CreateVolume {
            name,
            size,
            block,
            shape,
            read_policy,
            raw: _,
        } => {
            let attributes = attributes(&pool.configuration(), &shape)?;
            let new = NewVolume {
                uuid: random::uuid()?,
                size: check_size(&name, size)?,
                attributes,
                block,
                read_policy: policy(read_policy),
                region: 0,
                name: name.clone(),
            };
            pool.create_volume(new)
                .await
                .map_err(|error| of_pool(&name, error))?;
            Ok(Started::default())
        }
        Operation::SetReadPolicy { name, read_policy } => {
            find_volume(pool, &name)?;
            let set = pool.set_read_policy(&name, policy(read_policy)).await;
            set.map_err(|error| of_pool(&name, error))?;
            Ok(Started::default())
        }
        Operation::AutoTune { window_ms, throttle } => {
            let kind = JobKind::AutoTune { window: window_ms };
            start(pool, "pool", kind, throttle).await
        }
        Operation::ResizeVolume { name, size, shrink } => resize(pool, &name, size, shrink).await,
        Operation::SetLayout {
            name,
            shape,
            throttle,
        } => set_layout(pool, &name, &shape, throttle).await,
        Operation::MoveVolume {
            name,
            from,
            to,
            throttle,
        } => {
            let config = pool.configuration();
            let kind = JobKind::Move {
                volume: find_volume(pool, &name)?,
                from: from.map(|from| find_device(&config, &from)).transpose()?,
                to: to.map(|to| find_device(&config, &to)).transpose()?,
            };
            start(pool, &name, kind, throttle).await
        }
        Operation::DeleteVolume { name } => {
            pool.delete_volume(&name)
                .await
                .map_err(|error| of_pool(&name, error))?;
            Ok(Started::default())
        }
        Operation::WaitJob { job: None } => Ok(running(pool, |_| true)),
        Operation::WaitJob { job: Some(id) } => match find_job(pool, id)?.state {
            JobState::Paused => Err(Problem::new(ProblemKind::Conflict, format!("job {id} is paused"))
                .about(format!("job {id}"))
                .remedy(format!("`smsvmm job resume {id}` has it go on"))),
            _ => Ok(JobId(id).into()),
        },
        Operation::PauseJob { job } => {
            steer(pool, job, JobState::Paused).await?;
            Ok(Started::default())
        }
        Operation::ResumeJob { job } => {
            steer(pool, job, JobState::Running).await?;
            Ok(JobId(job).into())
        }
        Operation::CancelJob { job } => {
            steer(pool, job, JobState::Cancelled).await?;
            Ok(JobId(job).into())
        }
        Operation::ThrottleJob { job, throttle } => {
            find_job(pool, job)?;
            let set = pool.set_throttle(JobId(job), throttle).await;
            set.map_err(|error| of_pool(&format!("job {job}"), error))?;
            Ok(Started::default())
        }
        Operation::SetJobPriority { job, priority } => {
            find_job(pool, job)?;
            let priority = match priority {
                JobPriority::Low => Priority::Low,
                JobPriority::Normal => Priority::Normal,
                JobPriority::High => Priority::High,
            };
            let set = pool.set_priority(JobId(job), priority).await;
            set.map_err(|error| of_pool(&format!("job {job}"), error))?;
            Ok(Started::default())
        }
    }
}

async fn start(pool: &Pool, object: &str, kind: JobKind, throttle: u64) -> Result<Started, Problem> {
    let started = pool.start(kind, throttle).await;
    started.map(Started::from).map_err(|error| of_pool(object, error))
}

async fn steer(pool: &Pool, id: u32, state: JobState) -> Result<(), Problem> {
    find_job(pool, id)?;
    let steered = pool.steer(JobId(id), state).await;
    steered.map_err(|error| of_pool(&format!("job {id}"), error))
}

fn running(pool: &Pool, wanted: impl Fn(&JobKind) -> bool) -> Started {
    let jobs = pool.jobs();
    let jobs = jobs
        .iter()
        .filter(|job| job.state == JobState::Running && wanted(&job.kind));
    Started {
        jobs: jobs.map(|job| job.id).collect(),
    }
}

/// Opens devices that are to be part of the pool, unless they are open, and sees that they can be.
async fn usable(
    pool: &Pool,
    new: &[NewDeviceArguments],
    opened: Vec<Rc<Device>>,
) -> Result<Vec<Rc<Device>>, Problem> {
    let opened = match opened.is_empty() {
        true => device::open_new(new).await?,
        false => {
            device::see_that_they_may_be_used(new, &opened).await?;
            opened
        }
    };
    for (new, device) in new.iter().zip(&opened) {
        device::see_that_it_is_none_of(pool, &new.path, device).await?;
    }
    Ok(opened)
}

/// Adds all, or none if one of them is not to be had.
async fn add_devices(
    pool: &Pool,
    new: Vec<NewDeviceArguments>,
    opened: Vec<Rc<Device>>,
) -> Result<(), Problem> {
    let opened = usable(pool, &new, opened).await?;
    for (new, device) in new.into_iter().zip(&opened) {
        let path = new.path.clone();
        let added = pool.add_device(described(new, device)?).await;
        added.map_err(|error| of_pool(&path, error))?;
    }
    Ok(())
}

/// A device with a fresh identity.
pub(crate) fn described(new: NewDeviceArguments, device: &Rc<Device>) -> Result<NewDevice<Member>, Problem> {
    Ok(NewDevice {
        name: new.path,
        device: Rc::new(Member::Direct(Rc::clone(device))),
        uuid: random::uuid()?,
        class: new.class,
        enclosure: new.enclosure,
        spare: new.spare,
    })
}

async fn replace(
    pool: &Pool,
    name: &str,
    by: NewDeviceArguments,
    throttle: u64,
    opened: Vec<Rc<Device>>,
) -> Result<Started, Problem> {
    let config = pool.configuration();
    let id = find_device(&config, name)?;
    let old = config.device(id);
    // What places by these must find them in the successor.
    let inherit = |given: String, old: Option<&String>| match given.is_empty() {
        true => old.cloned().unwrap_or_default(),
        false => given,
    };
    let by = NewDeviceArguments {
        class: inherit(by.class, old.map(|old| &old.class)),
        enclosure: inherit(by.enclosure, old.map(|old| &old.enclosure)),
        spare: by.spare || old.is_some_and(|old| old.state == DeviceState::Spare),
        ..by
    };
    let opened = usable(pool, std::slice::from_ref(&by), opened).await?;
    let device = opened.first().ok_or_else(|| {
        Problem::new(ProblemKind::Host, format!("{} is not open", by.path)).about(by.path.clone())
    })?;
    let replaced = pool.replace_device(id, described(by, device)?, throttle).await;
    replaced.map(Started::from).map_err(|error| of_pool(name, error))
}

pub(crate) fn check_size(name: &str, size: u64) -> Result<u64, Problem> {
    // Rounded up to whole blocks further down, which must not overflow.
    if size == 0 || size.checked_next_multiple_of(BLOCK).is_none() {
        return Err(Problem::new(
            ProblemKind::Invalid,
            format!("volume {name} cannot have {size} bytes"),
        ));
    }
    Ok(size)
}

async fn resize(pool: &Pool, name: &str, size: u64, shrink: bool) -> Result<Started, Problem> {
    let id = find_volume(pool, name)?;
    let size = check_size(name, size)?;
    let present = pool.configuration().volume(id).map_or(0, |volume| volume.size);
    // Nobody who could say up to where a volume is used has it open.
    if size.next_multiple_of(BLOCK) < present && !shrink {
        let detail =
            format!("volume {name} has {present} bytes; with {size} it would lose what lies behind them");
        return Err(Problem::new(ProblemKind::Conflict, detail)
            .about(name)
            .remedy("make what is on it smaller first, then use --shrink"));
    }
    let resized = pool.resize(name, size, 0).await;
    resized.map_err(|error| of_pool(name, error))?;
    Ok(Started::default())
}

async fn set_layout(pool: &Pool, name: &str, shape: &Shape, throttle: u64) -> Result<Started, Problem> {
    let id = find_volume(pool, name)?;
    let config = pool.configuration();
    let mut target = attributes(&config, shape)?;
    let block = config.volume(id).map_or(4096, |volume| volume.block);
    // A section is replaced by a successor of its whole length.
    let sections = config
        .volume(id)
        .map(|volume| volume.sections.as_slice())
        .unwrap_or_default();
    let mut request = place::SectionRequest {
        length: sections
            .iter()
            .map(|section| section.length)
            .max()
            .unwrap_or(BLOCK),
        attributes: &target,
        block,
        excluded: &[],
        use_spares: false,
        bitmap: 0,
        state: MemberState::InSync,
        number: 0,
        first_member: 0,
    };
    let layout = place::resolve_layout(&config, &request);
    let resolved = Attributes {
        layout,
        ..target.clone()
    };
    request.attributes = &resolved;
    // Devices that are missing or too few are told now, not by a job that fails. Legs that come or go need no successor.
    let same = |section: &volume_manager::model::Section| {
        section.parity == layout.parity()
            && section.columns.len() == layout.columns() as usize
            && layout.parity() == 0
    };
    if !sections.iter().all(same) {
        place::place_section(&config, &request).map_err(|error| of_pool(name, error.into()))?;
    }
    target.layout = layout;
    start(pool, name, JobKind::Relayout { volume: id, target }, throttle).await
}

pub(crate) fn attributes(config: &Configuration, shape: &Shape) -> Result<Attributes, Problem> {
    let (columns, legs) = (shape.columns, shape.copies);
    let layout = match shape.layout {
        LayoutKind::Concat => Layout::Concat,
        LayoutKind::Stripe => Layout::Stripe { columns },
        LayoutKind::Mirror => Layout::Mirror {
            legs: if legs == 0 { 2 } else { legs },
        },
        LayoutKind::StripeMirror => Layout::StripeMirror {
            columns,
            legs: if legs == 0 { 2 } else { legs },
        },
        LayoutKind::Raid5 => Layout::Raid5 { columns },
        LayoutKind::Raid6 => Layout::Raid6 { columns },
    };
    let devices = shape.devices.iter().map(|name| find_device(config, name));
    Ok(Attributes {
        layout,
        stripe_unit: match shape.stripe_unit {
            0 => place::DEFAULT_STRIPE_UNIT,
            given => given,
        },
        class: shape.class.clone(),
        devices: devices.collect::<Result<_, _>>()?,
    })
}

fn policy(asked: ReadPolicy) -> volume_manager::model::ReadPolicy {
    match asked {
        ReadPolicy::Balanced => volume_manager::model::ReadPolicy::Balanced,
        ReadPolicy::FirstAnswer => volume_manager::model::ReadPolicy::FirstAnswer,
    }
}

fn find_volume(pool: &Pool, name: &str) -> Result<VolumeId, Problem> {
    let config = pool.configuration();
    let found = config.volumes.iter().find(|volume| volume.name == name);
    found.map(|volume| volume.id).ok_or_else(|| {
        Problem::new(ProblemKind::NotFound, format!("the pool has no volume {name}"))
            .about(name)
            .remedy("`smsvmm volume list` shows them")
    })
}

fn find_job(pool: &Pool, id: u32) -> Result<Job, Problem> {
    pool.job(JobId(id)).ok_or_else(|| {
        Problem::new(ProblemKind::NotFound, format!("the pool has no job {id}"))
            .about(format!("job {id}"))
            .remedy("`smsvmm job list` shows them")
    })
}

/// A device by its name, its number (`d3`), its identity, or the last part of its name if no other has the same.
pub(crate) fn find_device(config: &Configuration, name: &str) -> Result<DeviceId, Problem> {
    let exact = config.devices.iter().find(|device| {
        device.name == name || device.id.to_string() == name || device.uuid.to_string() == name
    });
    if let Some(device) = exact {
        return Ok(device.id);
    }
    let by_path = |path: &str| std::path::absolute(path).ok();
    let similar: Vec<DeviceId> = config
        .devices
        .iter()
        .filter(|device| {
            device.name.rsplit('/').next() == Some(name) || by_path(&device.name) == by_path(name)
        })
        .map(|device| device.id)
        .collect();
    match similar.as_slice() {
        [one] => Ok(*one),
        [] => Err(
            Problem::new(ProblemKind::NotFound, format!("the pool has no device {name}"))
                .about(name)
                .remedy("`smsvmm device list` shows them"),
        ),
        _ => Err(Problem::new(
            ProblemKind::Invalid,
            format!("several devices of the pool are called {name}"),
        )
        .about(name)
        .remedy("give the number that `smsvmm device list` shows")),
    }
}
