//! Pools that nobody has open: their devices are opened under a lock, something is done, they are closed.
//!
//! ```text
//!   caller's thread                          worker
//!     execute ──────────── task ───────────►  open devices, open pool, begin the operation
//!     notify(Progress) ◄── every 100 ms ────  wait for its jobs
//!     Flow::Stop ───────── flag ───────────►  stop waiting; what is not done goes on at the next open
//!     result ◄───────────────────────────────  close the pool
//! ```

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use api::file::{FileSystemStatus, META_VOLUME};
use api::storage::{JobStatus, NewDevice, Operation, Outcome, PoolStatus};
use api::{Problem, ProblemKind};
use block_io::{Clock, WorkerClock, spawn_local};
use volume_manager::model::{Configuration, DeviceId, JobId, JobState};
use volume_manager::store::{self, Standing};
use volume_manager::{OpenOptions, PoolError};

use crate::conversation::{Flow, Notice, Reporter, TICK, on_worker};
use crate::device::{self, Access, Device, DevicePaths};
use crate::member::Member;
use crate::operation::{self, Pool, described};
use crate::problem::of_pool;
use crate::random;
use crate::storage::{self, Storage};
use crate::view::{self, Presence};
use crate::{file_view, volumes};

/// What may be done against the rules when a pool is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Force {
    /// Nothing.
    #[default]
    No,
    /// To go on without a majority of the devices.
    WithoutMajority,
    /// To keep, of several histories, the one that this device has.
    Prefer(String),
}

/// Makes a pool on devices, whose content is lost.
///
/// # Errors
/// A device cannot be opened, is too small, or carries something and the destruction of it was not allowed.
pub fn create(
    name: &str,
    devices: Vec<NewDevice>,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<PoolStatus, Problem> {
    let name = name.to_owned();
    on_worker(notify, |_| async move {
        let opened = device::open_new(&devices).await?;
        let devices = devices.into_iter().zip(&opened);
        let devices = devices.map(|(new, device)| described(new, device));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        let labelled: Vec<_> = devices
            .iter()
            .zip(&opened)
            .map(|(new, device)| (new.name.clone(), new.uuid, Rc::clone(device)))
            .collect();
        let options = options(store::Force::No)?;
        let failed = |error| of_pool(&name, error);
        let pool = Pool::create(&name, random::uuid()?, devices, &options, WorkerClock::new());
        let pool = pool.await.map_err(failed)?;
        let status = view_open(&pool, Vec::new());
        pool.close().await.map_err(failed)?;
        device::see_that_they_differ(&labelled).await?;
        Ok(status)
    })
}

/// How a pool is, by what its devices say. Only reads, and changes nothing: devices that are missing or came back are taken notice
/// of when it is opened next.
///
/// # Errors
/// The devices do not make a pool, or one is in use.
pub fn status(paths: DevicePaths, notify: &mut dyn FnMut(Notice<'_>) -> Flow) -> Result<PoolStatus, Problem> {
    on_worker(notify, |_| async move {
        let opened = device::open_all(&paths, Access::Read).await?;
        let mut notes: Vec<String> = opened
            .absent
            .iter()
            .map(|(_, problem)| problem.detail.clone())
            .collect();
        let scan = store::scan(&opened.devices).await;
        notes.extend(
            scan.problems()
                .iter()
                .map(|problem| crate::problem::chain(problem)),
        );
        let choice = scan.choose(None, &store::Force::No);
        let choice = choice.map_err(|error| of_pool("pool", error.into()))?;
        let mut config = choice.configuration().clone();
        let mut presence = Presence::default();
        for there in choice.present() {
            if let Some(device) = config.devices.iter_mut().find(|device| device.id == there.id) {
                device.name.clone_from(&there.path);
            }
            match there.standing {
                Standing::Current | Standing::Lagging | Standing::New => &mut presence.in_service,
                Standing::Stale | Standing::Faulty => &mut presence.returned,
            }
            .insert(there.id);
        }
        let found = unnamed(&config, choice.absent(), &paths).await.join(", ");
        if !found.is_empty() {
            notes.push(unnamed_text(&config, &found));
        }
        let mut status = view::pool(&config, &presence, &config.jobs, notes);
        if config.volumes.iter().any(|volume| volume.name == META_VOLUME) {
            match look_at_files(opened.devices).await {
                Ok(files) => status.files = Some(files),
                Err(problem) => status
                    .notes
                    .push(format!("the file system cannot be looked at: {problem}")),
            }
        }
        Ok(status)
    })
}

async fn look_at_files(devices: Vec<(String, Rc<Device>)>) -> Result<FileSystemStatus, Problem> {
    let pool = storage::open_covered(devices).await?;
    let mut storage = Storage::covered(pool, Vec::new());
    storage.open_files().await?;
    storage.files().map(file_view::file_system)
}

/// Opens the pool, does `operation`, waits for the jobs that belong to it, and closes the pool.
///
/// # Errors
/// The pool cannot be opened, or the operation is refused or fails. That a job fails is no error: see [`Outcome::jobs`].
pub fn execute(
    paths: DevicePaths,
    force: Force,
    operation: Operation,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<Outcome, Problem> {
    on_worker(notify, |reporter| async move {
        let (pool, notes) = open(&paths, &force, replaced_by(&operation)).await?;
        let mut storage = Storage::of(pool, notes);
        let mut events = Vec::new();
        let done = operate(&mut storage, operation, &reporter).await;
        events.extend(storage.take_events());
        let status = status_of(&storage);
        let closed = storage.close().await;
        let (jobs, interrupted) = done?;
        closed?;
        Ok(Outcome {
            jobs,
            events,
            interrupted,
            pool: status,
        })
    })
}

/// Does the operation, and has the file system know of it.
async fn operate(
    storage: &mut Storage,
    operation: Operation,
    reporter: &Reporter<Outcome>,
) -> Result<(Vec<JobStatus>, bool), Problem> {
    volumes::before(storage, &operation).await?;
    storage.pool.let_jobs_begin();
    let done = perform(&storage.pool, operation.clone(), Vec::new(), reporter).await?;
    volumes::after(storage, &operation).await?;
    Ok(done)
}

pub(crate) fn options(force: store::Force) -> Result<OpenOptions, Problem> {
    Ok(OpenOptions {
        incarnation: random::uuid()?,
        pool: None,
        force,
        limits: volume_manager::logs::hot::Limits::default(),
        jobs_wait: true,
    })
}

/// Devices whose content an operation may destroy: that of the pool itself, too, if they have a history of their own.
fn replaced_by(operation: &Operation) -> Vec<String> {
    let new: Vec<&NewDevice> = match operation {
        Operation::AddDevices { devices } => devices.iter().collect(),
        Operation::ReplaceDevice { by, .. } => vec![by],
        _ => Vec::new(),
    };
    let forced = new.into_iter().filter(|new| new.force);
    forced.map(|new| new.path.clone()).collect()
}

/// Opens the pool; `besides` are devices that are not named and need not be.
pub(crate) async fn open(
    paths: &[String],
    force: &Force,
    besides: Vec<String>,
) -> Result<(Pool, Vec<String>), Problem> {
    let opened = device::open_all(paths, Access::Write).await?;
    let notes = opened.absent.iter().map(|(_, problem)| problem.detail.clone());
    let mut notes: Vec<String> = notes.collect();
    let devices = opened.devices;
    let force = match force {
        Force::No => store::Force::No,
        Force::WithoutMajority => store::Force::WithoutMajority,
        Force::Prefer(path) => {
            let (side, others) = side_of(path, &devices).await?;
            notes.extend(others.iter().map(|other| {
                format!(
                    "{other} has a history of its own and is left out; `smsvmm device replace {other} {other} --force` \
                     destroys that, and takes it in anew"
                )
            }));
            side
        }
    };
    if force == store::Force::No {
        let named = [paths, &besides].concat();
        see_that_all_are_named(&named, &devices).await?;
    }
    let members = devices.into_iter();
    let members = members.map(|(path, device)| (path, Rc::new(Member::Direct(device))));
    let pool = Pool::open(members.collect(), &options(force)?, WorkerClock::new()).await;
    Ok((pool.map_err(|error| of_pool("pool", error))?, notes))
}

/// Devices of a pool that are absent because they are not named: they are where they were when the pool was last open.
async fn unnamed(config: &Configuration, absent: &[DeviceId], paths: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for id in absent {
        let Some(name) = config.device(*id).map(|device| device.name.clone()) else {
            continue;
        };
        if paths.contains(&name) {
            continue;
        }
        // There may be something else now, or nothing.
        let Ok(device) = device::open(&name, Access::Read).await else {
            continue;
        };
        let content = store::inspect(&*device).await;
        if matches!(content, Ok(store::Content::Pool { pool, .. }) if pool == config.pool) {
            found.push(name);
        }
    }
    found
}

/// Refuses to open a pool without a device that is there and was only not named: it would miss what is written.
async fn see_that_all_are_named(paths: &[String], devices: &[(String, Rc<Device>)]) -> Result<(), Problem> {
    let Ok(choice) = store::scan(devices).await.choose(None, &store::Force::No) else {
        // Opening says why.
        return Ok(());
    };
    let config = choice.configuration();
    let found = unnamed(config, choice.absent(), paths).await.join(", ");
    if found.is_empty() {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::Invalid, unnamed_text(config, &found))
        .about(found)
        .remedy("add that to the pool's devices (in vm.toml, or after --devices)"))
}

fn unnamed_text(config: &Configuration, found: &str) -> String {
    format!(
        "{found} belongs to pool {}, is there, and is not named",
        config.name
    )
}

/// The devices that have the same history as the one at `path`, and the paths of those that have another one.
async fn side_of(
    path: &str,
    devices: &[(String, Rc<Device>)],
) -> Result<(store::Force, Vec<String>), Problem> {
    let sides = match store::scan(devices).await.choose(None, &store::Force::No) {
        Err(store::OpenError::SplitBrain(sides)) => sides,
        Err(error) => return Err(of_pool("pool", PoolError::Open(error))),
        // There is nothing to choose.
        Ok(_) => return Ok((store::Force::No, Vec::new())),
    };
    let has = |side: &&store::Side| side.devices.iter().any(|(name, _)| name == path);
    let Some(side) = sides.iter().find(has) else {
        return Err(Problem::new(
            ProblemKind::Invalid,
            format!("{path} is not among the devices that have a history of their own"),
        )
        .about(path));
    };
    let others = sides.iter().filter(|side| !has(side));
    let others = others.flat_map(|side| side.devices.iter().map(|(name, _)| name.clone()));
    let force = store::Force::Side(side.devices.iter().map(|(_, uuid)| *uuid).collect());
    Ok((force, others.collect()))
}

/// How an open pool is, with its files.
pub(crate) fn status_of(storage: &Storage) -> PoolStatus {
    let mut status = view_open(&storage.pool, storage.notes.clone());
    status.files = storage.files().ok().map(file_view::file_system);
    status
}

fn view_open(pool: &Pool, notes: Vec<String>) -> PoolStatus {
    let config = pool.configuration();
    let in_service: BTreeSet<_> = config
        .devices
        .iter()
        .map(|device| device.id)
        .filter(|id| pool.is_in_service(*id))
        .collect();
    let errors: BTreeMap<_, _> = pool
        .device_statistics()
        .into_iter()
        .map(|(id, all)| (id, all.reads.errors + all.writes.errors + all.flushes.errors))
        .collect();
    let presence = Presence {
        in_service,
        errors,
        ..Presence::default()
    };
    let mut status = view::pool(&config, &presence, &[], notes);
    let jobs = pool.jobs();
    let jobs = jobs
        .iter()
        .map(|job| view::view_job(&config, job, pool.pace(job.id)));
    status.jobs = jobs.collect();
    status
}

/// Does the operation and waits for its jobs; tells whether the wait was broken off. `opened` are the devices that it adds, if they are open.
pub(crate) async fn perform(
    pool: &Pool,
    operation: Operation,
    opened: Vec<Rc<Device>>,
    reporter: &Reporter<Outcome>,
) -> Result<(Vec<JobStatus>, bool), Problem> {
    // A paused job that is cancelled counts as paused until it has ended.
    let cancels = matches!(operation, Operation::CancelJob { .. });
    let started = operation::begin(pool, operation, opened).await?;
    let mut wanted = started.jobs;
    let clock = WorkerClock::new();
    let ended = Rc::new(RefCell::new(BTreeMap::new()));
    for id in &wanted {
        let (pool, ended, id) = (pool.clone(), Rc::clone(&ended), *id);
        let waiting = spawn_local(async move {
            let result = pool.wait(id).await.map_err(|error| error.to_string());
            ended.borrow_mut().insert(id, result);
        });
        // This is a worker.
        drop(waiting);
    }
    let look = |ids: &[JobId]| -> Vec<JobStatus> {
        let config = pool.configuration();
        let jobs = ids.iter().filter_map(|id| pool.job(*id));
        jobs.map(|job| view::view_job(&config, &job, pool.pace(job.id)))
            .collect()
    };
    let mut pause = Duration::from_millis(5);
    loop {
        // Another one may have been told to pause it.
        wanted.retain(|id| cancels || pool.job(*id).is_none_or(|job| job.state != JobState::Paused));
        if wanted.iter().all(|id| ended.borrow().contains_key(id)) {
            break;
        }
        reporter.progress(look(&wanted));
        if reporter.stopped() {
            return Ok((look(&wanted), true));
        }
        clock.sleep(pause).await;
        pause = (pause * 2).min(TICK);
    }
    let jobs = look(&wanted);
    // The pool itself may have given up: then the job has not ended, and will not.
    if let Some(job) = jobs.iter().find(|job| job.is_live()) {
        let ended = ended.borrow();
        let reason = ended.get(&JobId(job.id)).and_then(|result| result.as_ref().err());
        let reason = reason.map_or("it stopped", String::as_str);
        return Err(Problem::new(
            ProblemKind::Host,
            format!("job {} stopped: {reason}", job.id),
        ));
    }
    Ok((jobs, false))
}
