//! Jobs: long operations that go on while guests work, and after a restart.
//!
//! A job's record says what is wanted; what is left to do follows from the configuration each time a step begins. So a job can be
//! killed at any moment: after the next open it looks at the configuration and goes on. Jobs of one volume run one after the
//! other, in order of their priorities and numbers; jobs of different volumes run at the same time, and share it as
//! [`super::job`] says.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use block_io::{BlockDevice, Clock, cover, spawn_local};

use super::core::{Core, Refused};
use super::event::Event;
use super::job::{Control, Stop};
use super::map::Map;
use super::meter::Pace;
use super::pool::{Pool, PoolError};
use crate::model::{
    Configuration, DeviceId, DeviceState, Job, JobId, JobKind, JobState, Member, MemberState, Priority,
    Volume as VolumeModel, VolumeId,
};

/// Ended jobs that are kept for whoever asks.
const KEPT: usize = 32;
/// Between looks at whether an earlier job of the same volume has ended.
pub(super) const LOOK: Duration = Duration::from_millis(20);

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Starts what has to be done after an open: jobs go on, members that lack something are brought up to date.
    pub(crate) async fn start_jobs(&self) -> Result<(), PoolError> {
        let jobs: Vec<Job> = self
            .0
            .config()
            .jobs
            .iter()
            .filter(|job| job.is_live())
            .cloned()
            .collect();
        for job in jobs {
            self.run(&job);
        }
        self.heal().await
    }

    /// Starts a resync of every volume that lacks something which can be made good with the devices that are there, and has spares
    /// take the place of devices that are out of service.
    ///
    /// # Errors
    /// The pool takes no changes.
    pub async fn heal(&self) -> Result<(), PoolError> {
        self.0.fail(&[]).await?;
        for volume in self.0.volumes() {
            self.complete(volume.id).await?;
        }
        let config = self.0.config();
        let mut wanted = Vec::new();
        for volume in self.0.volumes() {
            let map = volume.map();
            let lacks = map
                .members()
                .any(|member| member.state != MemberState::InSync && member.is_alive());
            if lacks || !volume.unclean.borrow().is_empty() {
                wanted.push(JobKind::Resync { volume: volume.id });
            }
        }
        let spare = config
            .devices
            .iter()
            .any(|device| device.state == DeviceState::Spare && self.is_in_service(device.id));
        if spare {
            for device in config.devices.iter().filter(|device| !device.is_holder()) {
                let used = |volume: &&VolumeModel| volume.extents().any(|extent| extent.device == device.id);
                if config.volumes.iter().any(|volume| used(&volume)) {
                    wanted.push(JobKind::Evacuate {
                        device: device.id,
                        to: None,
                        remove: false,
                    });
                }
            }
        }
        for kind in wanted {
            if !config.jobs.iter().any(|job| job.is_live() && job.kind == kind) {
                self.start(kind, 0).await?;
            }
        }
        Ok(())
    }

    /// Starts a job. It runs in the background; at most `throttle` bytes per second, 0 for no limit.
    ///
    /// # Errors
    /// What it works on does not exist; the pool takes no changes.
    pub async fn start(&self, kind: JobKind, throttle: u64) -> Result<JobId, PoolError> {
        let (job, _) = self.0.change(|config| enlist(config, kind, throttle)).await?;
        self.run(&job);
        Ok(job.id)
    }

    /// Pauses, resumes or cancels a job.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub async fn steer(&self, id: JobId, state: JobState) -> Result<(), PoolError> {
        self.0
            .change(|config| {
                let job = live(config, id)?;
                if state != JobState::Cancelled {
                    job.state = state.clone();
                }
                Ok::<(), PoolError>(())
            })
            .await?;
        if let Some(control) = self.0.control(id) {
            control.want(state);
        }
        Ok(())
    }

    /// Changes at most how many bytes per second a job copies or reads; 0 for no limit. It holds after a restart, too.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub async fn set_throttle(&self, id: JobId, throttle: u64) -> Result<(), PoolError> {
        self.0
            .change(|config| {
                live(config, id)?.throttle = throttle;
                Ok::<(), PoolError>(())
            })
            .await?;
        if let Some(control) = self.0.control(id) {
            control.set_throttle(throttle);
        }
        Ok(())
    }

    /// Changes how a job stands to others: whose turn comes first, and who leaves time to whom. It holds after a restart, too. A job
    /// that has begun goes on.
    ///
    /// # Errors
    /// There is no such job, or it has ended.
    pub async fn set_priority(&self, id: JobId, priority: Priority) -> Result<(), PoolError> {
        self.0
            .change(|config| {
                live(config, id)?.priority = priority;
                Ok::<(), PoolError>(())
            })
            .await?;
        if let Some(control) = self.0.control(id) {
            control.set_priority(priority);
        }
        Ok(())
    }

    /// How fast a job gets on; none if it does not run.
    pub fn pace(&self, id: JobId) -> Option<Pace> {
        let runs = self.0.config().job(id)?.state == JobState::Running;
        let control = self.0.control(id).filter(|_| runs)?;
        Some(control.pace(self.0.clock.now()))
    }

    /// A job with its present progress.
    pub fn job(&self, id: JobId) -> Option<Job> {
        let mut job = self.0.config().job(id)?.clone();
        if let Some(control) = self.0.control(id) {
            job.done = control.done.get();
            job.total = control.total.get().max(job.done);
        }
        Some(job)
    }

    /// All jobs, ended ones too, in order of their numbers.
    pub fn jobs(&self) -> Vec<Job> {
        let ids: Vec<JobId> = self.0.config().jobs.iter().map(|job| job.id).collect();
        ids.into_iter().filter_map(|id| self.job(id)).collect()
    }

    /// Waits until a job has ended.
    ///
    /// # Errors
    /// It failed or was cancelled, or there is none.
    pub async fn wait(&self, id: JobId) -> Result<(), PoolError> {
        loop {
            let state = self.0.config().job(id).map(|job| job.state.clone());
            match state {
                None => return Err(PoolError::Unknown(format!("job {}", id.0))),
                Some(JobState::Done) => return Ok(()),
                Some(JobState::Cancelled) => {
                    return Err(PoolError::State(format!("job {} was cancelled", id.0)));
                }
                Some(JobState::Failed(reason)) => {
                    return Err(PoolError::State(format!("job {} failed: {reason}", id.0)));
                }
                Some(JobState::Running | JobState::Paused) => {}
            }
            self.0.check()?;
            self.0.clock.sleep(LOOK).await;
        }
    }

    /// Places that a job has given up are free as soon as nobody uses them any more.
    async fn let_go(&self, kind: &JobKind, old: Vec<Rc<Map<D>>>) -> Result<(), Refused> {
        if old.is_empty() {
            return Ok(());
        }
        let extents = old.iter().flat_map(|map| map.volume.extents().copied());
        let freed = self.0.reserve(extents.collect());
        for map in old {
            self.0.drained(map).await;
        }
        drop(freed);
        for id in volumes_of(&self.0.config(), kind) {
            self.complete(id).await?;
        }
        Ok(())
    }

    /// Has a job go on in the background, if it does not yet: when a device was taken in at an open, its resync runs already.
    pub(super) fn run(&self, job: &Job) {
        if self.0.control(job.id).is_some() {
            cover!("work: a job runs already");
            return;
        }
        let control = Rc::new(Control::new(job, Rc::clone(&self.0.levels)));
        self.0.add_control(job.id, Rc::clone(&control));
        let (pool, job, busy) = (self.clone(), job.clone(), self.0.busy());
        let spawned = spawn_local(async move {
            let _busy = busy;
            let ended = pool.work(&job, &control).await;
            let state = match ended {
                Ok(()) => JobState::Done,
                Err(Stop::Closing) => return pool.0.remove_control(job.id),
                Err(Stop::Cancelled) => JobState::Cancelled,
                Err(Stop::Failed(reason)) => JobState::Failed(reason),
            };
            let failed = match &state {
                JobState::Failed(reason) => Some(reason.clone()),
                _ => None,
            };
            let changed = pool.0.change(|config| {
                for other in config.jobs.iter_mut().filter(|other| other.id == job.id) {
                    other.state = state.clone();
                    other.done = control.done.get();
                    other.total = control.total.get().max(other.done);
                    // Who knows no priorities can read the pool again.
                    other.priority = Priority::Normal;
                }
                if state == JobState::Cancelled {
                    forget_begun(config, &job.kind);
                }
                if let (JobKind::Evacuate { device, .. }, true) = (&job.kind, state != JobState::Done) {
                    for device in config.devices.iter_mut().filter(|other| other.id == *device) {
                        if device.state == DeviceState::Evacuating {
                            device.state = DeviceState::Active;
                        }
                    }
                }
                Ok::<(), Refused>(())
            });
            let changed = match changed.await {
                Ok(((), old)) => pool.let_go(&job.kind, old).await,
                Err(refused) => Err(refused),
            };
            // Not before, so that nobody takes it for one that waits to be run.
            pool.0.remove_control(job.id);
            if changed.is_ok() {
                pool.0.tell(Event::JobEnded {
                    job: job.id.0,
                    failed,
                });
            }
        });
        // Outside a worker nobody makes requests.
        drop(spawned);
    }
}

fn live(config: &mut Configuration, id: JobId) -> Result<&mut Job, PoolError> {
    let job = config.jobs.iter_mut().find(|job| job.id == id);
    let job = job.ok_or_else(|| PoolError::Unknown(format!("job {}", id.0)))?;
    match job.is_live() {
        true => Ok(job),
        false => Err(PoolError::State(format!("job {} has ended", id.0))),
    }
}

/// Puts a job into a configuration, from which it runs as soon as that is durable.
pub(super) fn enlist(config: &mut Configuration, kind: JobKind, throttle: u64) -> Result<Job, PoolError> {
    check(config, &kind)?;
    if let JobKind::Evacuate { device, .. } = kind
        && let Some(device) = config.devices.iter_mut().find(|other| other.id == device)
        && device.is_holder()
    {
        device.state = DeviceState::Evacuating;
    }
    if let JobKind::Relayout { volume, target } = &kind
        && let Some(volume) = config.volume_mut(*volume)
    {
        volume.attributes = target.clone();
    }
    let job = Job {
        id: JobId(config.next_job),
        total: work_of(config, &kind),
        kind,
        state: JobState::Running,
        done: 0,
        throttle,
        priority: Priority::Normal,
    };
    config.next_job += 1;
    let ended = config.jobs.iter().filter(|job| !job.is_live()).count();
    let mut surplus = ended.saturating_sub(KEPT);
    config.jobs.retain(|job| {
        job.is_live() || {
            let keep = surplus == 0;
            surplus = surplus.saturating_sub(1);
            keep
        }
    });
    config.jobs.push(job.clone());
    Ok(job)
}

/// What a job has begun to fill, and others can do without, goes: else it would be filled as if somebody wanted one copy more.
fn forget_begun(config: &mut Configuration, kind: &JobKind) {
    if !matches!(kind, JobKind::Move { .. } | JobKind::Evacuate { .. }) {
        return;
    }
    let volumes = volumes_of(config, kind);
    for volume in config
        .volumes
        .iter_mut()
        .filter(|volume| volumes.contains(&volume.id))
    {
        let legs = volume.attributes.layout.legs() as usize;
        let columns = volume
            .sections
            .iter_mut()
            .flat_map(|section| &mut section.columns);
        for members in columns.map(|column| &mut column.members) {
            let begun = |member: &Member| matches!(member.state, MemberState::Filling { .. });
            while members.len() > legs
                && let Some(last) = members.iter().rposition(begun)
            {
                cover!("work: what a cancelled move had begun goes");
                members.remove(last);
            }
        }
    }
}

/// The volumes whose mapping a job changes.
pub(super) fn volumes_of(config: &Configuration, kind: &JobKind) -> BTreeSet<VolumeId> {
    match kind {
        JobKind::Resync { volume } | JobKind::Relayout { volume, .. } | JobKind::Move { volume, .. } => {
            BTreeSet::from([*volume])
        }
        JobKind::Scrub { volume: Some(volume) } => BTreeSet::from([*volume]),
        JobKind::Evacuate { .. } | JobKind::Scrub { volume: None } => {
            config.volumes.iter().map(|volume| volume.id).collect()
        }
        // The moves that it has done are jobs of their own.
        JobKind::AutoTune { .. } => BTreeSet::new(),
    }
}

fn check(config: &Configuration, kind: &JobKind) -> Result<(), PoolError> {
    let volume = |id: &VolumeId| match config.volume(*id) {
        Some(_) => Ok(()),
        None => Err(PoolError::Unknown(format!("volume number {}", id.0))),
    };
    let device = |id: &DeviceId| match config.device(*id) {
        Some(_) => Ok(()),
        None => Err(PoolError::Unknown(format!("device number {}", id.0))),
    };
    match kind {
        JobKind::Resync { volume: id } | JobKind::Relayout { volume: id, .. } => volume(id)?,
        JobKind::Move { volume: id, from, to } => {
            volume(id)?;
            from.iter().chain(to).try_for_each(device)?;
        }
        JobKind::Evacuate { device: id, to, .. } => {
            device(id)?;
            to.iter().try_for_each(device)?;
            if *to == Some(*id) {
                return Err(PoolError::State("a device cannot be evacuated to itself".into()));
            }
        }
        JobKind::Scrub { volume: id } => id.iter().try_for_each(volume)?,
        JobKind::AutoTune { .. } => {
            let tunes = |job: &&Job| job.is_live() && matches!(job.kind, JobKind::AutoTune { .. });
            if let Some(job) = config.jobs.iter().find(tunes) {
                return Err(PoolError::State(format!(
                    "job {} tunes the pool already",
                    job.id.0
                )));
            }
        }
    }
    if let JobKind::Relayout { volume: id, .. } = kind {
        let other = config.jobs.iter().find(|job| {
            job.is_live() && matches!(&job.kind, JobKind::Relayout { volume, .. } if volume == id)
        });
        if let Some(job) = other {
            return Err(PoolError::State(format!(
                "job {} changes the volume's layout already",
                job.id.0
            )));
        }
    }
    Ok(())
}

/// Bytes that a job will copy or read, as far as can be said now.
fn work_of(config: &Configuration, kind: &JobKind) -> u64 {
    let members = |volume: &VolumeModel, wanted: &dyn Fn(&Member) -> bool| -> u64 {
        let columns = volume.sections.iter().flat_map(|section| &section.columns);
        columns
            .flat_map(|column| &column.members)
            .filter(|member| wanted(member))
            .map(Member::length)
            .sum()
    };
    let on =
        |device: DeviceId| move |member: &Member| member.extents.iter().any(|extent| extent.device == device);
    match kind {
        JobKind::Resync { volume } => config.volume(*volume).map_or(0, |volume| {
            members(volume, &|member| member.state != MemberState::InSync)
        }),
        JobKind::Relayout { volume, .. } | JobKind::Scrub { volume: Some(volume) } => {
            config.volume(*volume).map_or(0, |volume| volume.size)
        }
        JobKind::Move { volume, from, .. } => config.volume(*volume).map_or(0, |volume| match from {
            Some(from) => members(volume, &on(*from)),
            None => volume.size,
        }),
        JobKind::Evacuate { device, .. } => config
            .volumes
            .iter()
            .map(|volume| members(volume, &on(*device)))
            .sum(),
        JobKind::Scrub { volume: None } => config.volumes.iter().map(|volume| volume.size).sum(),
        JobKind::AutoTune { .. } => 0,
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Core<D, C> {
    pub(crate) fn control(&self, id: JobId) -> Option<Rc<Control>> {
        self.controls.borrow().get(&id).cloned()
    }

    fn add_control(&self, id: JobId, control: Rc<Control>) {
        self.controls.borrow_mut().insert(id, control);
    }

    fn remove_control(&self, id: JobId) {
        self.controls.borrow_mut().remove(&id);
    }

    /// Has all jobs stop where they are.
    pub(crate) fn stop_jobs(&self) {
        self.controls
            .borrow()
            .values()
            .for_each(|control| control.close());
    }
}
