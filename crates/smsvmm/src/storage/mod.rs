//! `smsvmm pool | device | volume | job | file | disk`: pools that nobody has open.
//!
//! Each command opens the pool's devices itself, under a lock (`storage_manager`), does one thing, and closes them. Commands
//! that only show something only read. Where the configuration names a management socket and a process answers there, it has the
//! pool open, and is asked instead (`live`): jobs are begun by it, and are only watched from here.

mod arguments;
mod disk_arguments;
mod disk_show;
mod disks;
mod file_arguments;
mod file_show;
mod files;
mod live;
mod select;
mod show;
mod watch;

use anyhow::bail;
use api::storage::{JobState, NewDevice, Operation, Outcome, PoolEventKind, PoolStatus};
use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use storage_manager::{DevicePaths, Force};

pub(crate) use arguments::Which;
pub(crate) use disk_arguments::VirtualDiskArguments;
pub(crate) use disks::disk;
pub(crate) use file_arguments::FileArguments;
pub(crate) use file_show::time;
pub(crate) use files::file;

pub(crate) use arguments::{DeviceArguments, JobArguments, PoolArguments, VolumeArguments};
use arguments::{DeviceCommand, JobCommand, PoolCommand, VolumeCommand};
pub(crate) use select::{default_config, pool_config, process};
pub(crate) use show::{Table, device_state, health, jobs, size};
use watch::Watch;

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};

pub(crate) fn pool(arguments: PoolArguments) -> anyhow::Result<Exit> {
    let PoolArguments { which, command } = arguments;
    match command {
        PoolCommand::Create {
            name,
            paths,
            spare,
            class,
            force,
        } => {
            if !which.devices.is_empty() || which.config.is_some() {
                return Err(UsageError::new("name the devices of a new pool after its name").into());
            }
            let new = |path: String, spare: bool| NewDevice {
                path,
                spare,
                class: class.clone(),
                enclosure: String::new(),
                force,
            };
            let devices = paths.into_iter().map(|path| new(path, false));
            let devices = devices
                .chain(spare.into_iter().map(|path| new(path, true)))
                .collect();
            create(&name, devices, which.json)
        }
        PoolCommand::Status => look(&which, |status| {
            Ok((serde_json::to_value(status)?, show::pool(status)))
        }),
        PoolCommand::Scrub { volume, speed } => {
            let throttle = speed.bytes();
            perform(&which, Operation::Scrub { volume, throttle }, |outcome| {
                let count = |kind| outcome.events.iter().filter(|event| event.kind == kind).count();
                let failed = match count(PoolEventKind::DeviceFailed) {
                    0 => String::new(),
                    _ => "devices have failed meanwhile; `smsvmm device list` shows which\n".to_owned(),
                };
                match count(PoolEventKind::Repaired) {
                    0 if !failed.is_empty() => failed,
                    0 => "everything was read; copies and parity agree\n".to_owned(),
                    count => format!("{failed}{count} places differed and were repaired\n"),
                }
            })
        }
        PoolCommand::Import { paths, force, prefer } => import(which, paths, force, prefer),
        PoolCommand::Export => export(&which),
    }
}

fn export(which: &Which) -> anyhow::Result<Exit> {
    if live::ask(which, || StorageRequest::Status)?.is_some() {
        let problem = Problem::new(ProblemKind::Conflict, "the pool is open in another process");
        return Err(problem
            .remedy("end that first: only then its devices can be moved")
            .into());
    }
    perform(which, Operation::Settle, |outcome| {
        let devices = outcome.pool.devices.iter().map(|device| device.name.as_str());
        format!(
            "pool {} is closed, and its devices can be moved: {}\n",
            outcome.pool.name,
            devices.collect::<Vec<_>>().join(", ")
        )
    })
}

pub(crate) fn device(arguments: DeviceArguments) -> anyhow::Result<Exit> {
    let DeviceArguments { which, command } = arguments;
    match command {
        DeviceCommand::List => look(&which, |status| {
            Ok((
                serde_json::to_value(&status.devices)?,
                show::devices(&status.devices),
            ))
        }),
        DeviceCommand::Add { paths, new } => {
            if live::is_elsewhere(&which)? {
                let devices = paths
                    .iter()
                    .map(|path| Ok(new.device(&live::path(&which, path)?)));
                let devices = devices.collect::<anyhow::Result<_>>()?;
                return perform(&which, Operation::AddDevices { devices }, |outcome| {
                    left(&outcome.pool)
                });
            }
            let mut devices = select::devices(&which)?;
            // They may stand in the file already.
            devices.retain(|device| !paths.contains(device));
            if devices.is_empty() {
                return Err(UsageError::new("name the pool's present devices, too").into());
            }
            let operation = Operation::AddDevices {
                devices: paths.iter().map(|path| new.device(path)).collect(),
            };
            run(&which, devices, Force::No, operation, |outcome| {
                left(&outcome.pool)
            })
        }
        DeviceCommand::Remove { device } => {
            let operation = Operation::RemoveDevice { device };
            perform(&which, operation, |outcome| left(&outcome.pool))
        }
        DeviceCommand::Evacuate { device, to, speed } => {
            let text = format!("{device} is empty; `smsvmm device remove {device}` takes it out\n");
            let throttle = speed.bytes();
            perform(&which, Operation::EvacuateDevice { device, to, throttle }, |_| {
                text
            })
        }
        DeviceCommand::Replace {
            device,
            by,
            new,
            speed,
        } => {
            let elsewhere = live::is_elsewhere(&which)?;
            let operation = Operation::ReplaceDevice {
                device,
                by: match elsewhere {
                    true => new.device(&live::path(&which, &by)?),
                    false => new.device(&by),
                },
                throttle: speed.bytes(),
            };
            if elsewhere {
                return perform(&which, operation, |outcome| left(&outcome.pool));
            }
            let mut devices = select::devices(&which)?;
            devices.retain(|present| *present != by);
            run(&which, devices, Force::No, operation, |outcome| {
                left(&outcome.pool)
            })
        }
    }
}

pub(crate) fn volume(arguments: VolumeArguments) -> anyhow::Result<Exit> {
    let VolumeArguments { which, command } = arguments;
    match command {
        VolumeCommand::Create {
            name,
            size,
            layout,
            block,
            read_policy,
            raw,
        } => {
            let shown = name.clone();
            let operation = Operation::CreateVolume {
                name,
                size: size.bytes(),
                block,
                shape: layout.shape()?,
                read_policy: read_policy.into(),
                raw,
            };
            perform(&which, operation, |outcome| one_volume(&outcome.pool, &shown))
        }
        VolumeCommand::SetReadPolicy { name, read_policy } => {
            let (shown, read_policy) = (name.clone(), read_policy.into());
            perform(
                &which,
                Operation::SetReadPolicy { name, read_policy },
                |outcome| one_volume(&outcome.pool, &shown),
            )
        }
        VolumeCommand::List => look(&which, |status| {
            let table = match status.volumes.is_empty() {
                true => "no volumes\n".to_owned(),
                false => show::volumes(&status.volumes, status.files.as_ref()),
            };
            Ok((serde_json::to_value(&status.volumes)?, table))
        }),
        VolumeCommand::Status { name } => look(&which, |status| {
            let volume = status
                .volumes
                .iter()
                .find(|volume| volume.name == name)
                .ok_or_else(|| {
                    Problem::new(ProblemKind::NotFound, format!("the pool has no volume {name}"))
                        .remedy("`smsvmm volume list` shows them")
                })?;
            Ok((serde_json::to_value(volume)?, show::volume(volume)))
        }),
        VolumeCommand::Resize { name, size, shrink } => {
            let shown = name.clone();
            let size = size.bytes();
            perform(
                &which,
                Operation::ResizeVolume { name, size, shrink },
                |outcome| one_volume(&outcome.pool, &shown),
            )
        }
        VolumeCommand::SetLayout { name, layout, speed } => {
            let shown = name.clone();
            let operation = Operation::SetLayout {
                name,
                shape: layout.shape()?,
                throttle: speed.bytes(),
            };
            perform(&which, operation, |outcome| one_volume(&outcome.pool, &shown))
        }
        VolumeCommand::Move {
            name,
            from,
            to,
            speed,
        } => {
            let shown = name.clone();
            let throttle = speed.bytes();
            perform(
                &which,
                Operation::MoveVolume {
                    name,
                    from,
                    to,
                    throttle,
                },
                |outcome| one_volume(&outcome.pool, &shown),
            )
        }
        VolumeCommand::Delete { name } => {
            let text = format!("volume {name} is deleted\n");
            perform(&which, Operation::DeleteVolume { name }, |_| text)
        }
    }
}

pub(crate) fn job(arguments: JobArguments) -> anyhow::Result<Exit> {
    let JobArguments { which, command } = arguments;
    match command {
        JobCommand::List { all } => look(&which, |status| {
            let jobs: Vec<_> = status.jobs.iter().filter(|job| all || job.is_live()).collect();
            let table = match (jobs.is_empty(), all) {
                (true, true) => "no jobs\n".to_owned(),
                (true, false) => "no unfinished jobs; --all shows those that have ended, too\n".to_owned(),
                (false, _) => show::jobs(&jobs),
            };
            Ok((serde_json::to_value(&jobs)?, table))
        }),
        JobCommand::Show { job } => look(&which, |status| {
            let job = status.jobs.iter().find(|one| one.id == job).ok_or_else(|| {
                Problem::new(ProblemKind::NotFound, format!("the pool has no job {job}"))
                    .remedy("`smsvmm job list --all` shows them")
            })?;
            Ok((serde_json::to_value(job)?, show::jobs(&[job])))
        }),
        JobCommand::Wait { job } => perform(&which, Operation::WaitJob { job }, ended),
        JobCommand::Pause { job } => perform(&which, Operation::PauseJob { job }, |_| {
            format!("job {job} rests until `smsvmm job resume {job}`\n")
        }),
        JobCommand::Resume { job } => perform(&which, Operation::ResumeJob { job }, ended),
        JobCommand::Cancel { job } => perform(&which, Operation::CancelJob { job }, |outcome| {
            let left = outcome.jobs.iter().map(show::left_by).collect::<String>();
            format!("{}{left}", ended(outcome))
        }),
        JobCommand::Throttle { job, rate } => {
            let throttle = rate.bytes();
            perform(
                &which,
                Operation::ThrottleJob { job, throttle },
                |_| match throttle {
                    0 => format!("job {job} goes as fast as it can\n"),
                    _ => format!("job {job} does at most {} per second\n", show::size(throttle)),
                },
            )
        }
        JobCommand::Priority { job, level } => {
            let priority = level.into();
            perform(&which, Operation::SetJobPriority { job, priority }, |_| {
                let word = show::priority(priority);
                format!("job {job} has {word} priority\n")
            })
        }
    }
}

fn create(name: &str, devices: Vec<NewDevice>, json: bool) -> anyhow::Result<Exit> {
    let mut watch = Watch::new(json)?;
    let status = storage_manager::create(name, devices, &mut |notice| watch.notice(&notice))?;
    if json {
        print_json(&status)?;
    } else {
        print(&format!(
            "pool {} is made, {} for volumes on {} devices; name it by --config FILE with these lines in the file (vm.toml):\n\n{}",
            status.name,
            show::size(status.size),
            status.devices.len(),
            lines_of(&status)
        ))?;
    }
    Ok(Exit::Success)
}

fn import(which: Which, paths: Vec<String>, force: bool, prefer: Option<String>) -> anyhow::Result<Exit> {
    let devices = match paths.is_empty() {
        true => select::devices(&which)?,
        false if which.devices.is_empty() && which.config.is_none() => paths,
        false => {
            return Err(UsageError::new("name the devices once: DEVICE..., --devices or --config").into());
        }
    };
    let force = match (force, prefer) {
        (true, _) => Force::WithoutMajority,
        (false, Some(device)) => Force::Prefer(device),
        (false, None) => Force::No,
    };
    run(&which, devices, force, Operation::Heal, |outcome| {
        format!("{}\n{}", show::pool(&outcome.pool), lines_of(&outcome.pool))
    })
}

/// Shows something of a pool without changing it.
fn look(
    which: &Which,
    view: impl FnOnce(&PoolStatus) -> anyhow::Result<(serde_json::Value, String)>,
) -> anyhow::Result<Exit> {
    let status = match live::ask(which, || StorageRequest::Status)? {
        Some(StorageAnswer::Status(status)) => *status,
        Some(_) => return Err(live::unexpected()),
        None => {
            let devices = select::devices(which)?;
            let mut watch = Watch::new(which.json)?;
            storage_manager::status(devices, &mut |notice| watch.notice(&notice))?
        }
    };
    let (json, text) = view(&status)?;
    if which.json {
        print_json(&json)?;
    } else {
        print(&text)?;
    }
    Ok(Exit::Success)
}

/// Does something with a pool, and says what came of it: `text`, or JSON.
fn perform(
    which: &Which,
    operation: Operation,
    text: impl FnOnce(&Outcome) -> String,
) -> anyhow::Result<Exit> {
    match live::perform(which, &operation)? {
        Some(outcome) => report(which, &operation, &outcome, true, text),
        None => run(which, select::devices(which)?, Force::No, operation, text),
    }
}

fn run(
    which: &Which,
    devices: DevicePaths,
    force: Force,
    operation: Operation,
    text: impl FnOnce(&Outcome) -> String,
) -> anyhow::Result<Exit> {
    let mut watch = Watch::new(which.json)?;
    let outcome = storage_manager::execute(devices, force, operation.clone(), &mut |notice| {
        watch.notice(&notice)
    });
    watch.clear();
    report(which, &operation, &outcome?, false, text)
}

/// Says what came of an operation; whether the pool is still open somewhere.
fn report(
    which: &Which,
    operation: &Operation,
    outcome: &Outcome,
    elsewhere: bool,
    text: impl FnOnce(&Outcome) -> String,
) -> anyhow::Result<Exit> {
    let cancels = matches!(operation, Operation::CancelJob { .. });
    if which.json {
        print_json(outcome)?;
    }
    for job in &outcome.jobs {
        match (&job.reason, job.state) {
            (Some(reason), _) => bail!("job {} ({}) failed: {reason}", job.id, job.what),
            (None, JobState::Cancelled) if !cancels => bail!("job {} ({}) was cancelled", job.id, job.what),
            _ => {}
        }
    }
    if !which.json {
        tell(outcome, elsewhere, text)?;
    }
    Ok(match outcome.interrupted {
        true => Exit::Failed,
        false => Exit::Success,
    })
}

fn tell(outcome: &Outcome, elsewhere: bool, text: impl FnOnce(&Outcome) -> String) -> anyhow::Result<()> {
    // Bad news are in the log, on standard error, already.
    for event in outcome.events.iter().filter(|event| !event.kind.is_warning()) {
        print(&format!("{}\n", event.text))?;
    }
    if !outcome.interrupted {
        print(&text(outcome))?;
    }
    let live = outcome
        .pool
        .jobs
        .iter()
        .filter(|job| job.state == JobState::Running && !job.volatile);
    let goes_on = match elsewhere {
        true => "it goes on; `smsvmm job wait` shows how it gets on",
        false => "it goes on when the pool is open, or now with `smsvmm job wait`",
    };
    for job in live {
        let (id, what, percent) = (job.id, &job.what, job.percent());
        logs::say(&format!("smsvmm: job {id} ({what}) is at {percent} %; {goes_on}"));
    }
    Ok(())
}

fn ended(outcome: &Outcome) -> String {
    match outcome.jobs.as_slice() {
        [] => match outcome.pool.jobs.iter().find(|job| job.state == JobState::Paused) {
            Some(job) => format!(
                "job {0} is paused; `smsvmm job resume {0}` has it go on\n",
                job.id
            ),
            None => "nothing is left to be done\n".to_owned(),
        },
        jobs => show::jobs(&jobs.iter().collect::<Vec<_>>()),
    }
}

fn one_volume(pool: &PoolStatus, name: &str) -> String {
    let volumes = pool.volumes.iter().filter(|volume| volume.name == name);
    show::volumes(&volumes.cloned().collect::<Vec<_>>(), pool.files.as_ref())
}

fn left(pool: &PoolStatus) -> String {
    format!(
        "pool {} has {} devices now:\n\n{}",
        pool.name,
        pool.devices.len(),
        lines_of(pool)
    )
}

fn lines_of(pool: &PoolStatus) -> String {
    let devices: Vec<String> = pool.devices.iter().map(|device| device.name.clone()).collect();
    select::lines(&devices)
}
