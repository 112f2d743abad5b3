//! Jobs: long operations that go on while guests work, and after a restart.
//!
//! A job's record says what is wanted; what is left to do follows from the configuration each time a step begins. So a job can be
//! killed at any moment: after the next open it looks at the configuration and goes on. Jobs of one volume run one after the
//! other, in order of their numbers; jobs of different volumes run at the same time.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use block_io::{BlockDevice, Clock, cover, spawn_local};

use super::core::{Core, Refused};
use super::event::Event;
use super::job::{Control, Stop};
use super::pool::{Pool, PoolError};
use super::relayout::{allowed, fits};
use super::volume::Volume;
use crate::model::{
    Attributes, Configuration, Device, DeviceId, DeviceState, Job, JobId, JobKind, JobState, Layout, Member,
    MemberId, MemberState, Volume as VolumeModel, VolumeId,
};
use crate::place;

/// Ended jobs that are kept for whoever asks.
const KEPT: usize = 32;
/// Between looks at whether an earlier job of the same volume has ended.
const LOOK: Duration = Duration::from_millis(20);

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
        let (job, _) = self
            .0
            .change(|config| {
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
                Ok::<Job, PoolError>(job)
            })
            .await?;
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
                let job = config.jobs.iter_mut().find(|job| job.id == id);
                let job = job.ok_or_else(|| PoolError::Unknown(format!("job {}", id.0)))?;
                if !job.is_live() {
                    return Err(PoolError::State(format!("job {} has ended", id.0)));
                }
                if state != JobState::Cancelled {
                    job.state = state.clone();
                }
                Ok(())
            })
            .await?;
        if let Some(control) = self.0.control(id) {
            control.want(state);
        }
        Ok(())
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

    fn run(&self, job: &Job) {
        let control = Rc::new(Control::new(job.done, job.total, job.throttle, job.state.clone()));
        self.0.add_control(job.id, Rc::clone(&control));
        let (pool, job, busy) = (self.clone(), job.clone(), self.0.busy());
        let spawned = spawn_local(async move {
            let _busy = busy;
            let ended = pool.work(&job, &control).await;
            pool.0.remove_control(job.id);
            let state = match ended {
                Ok(()) => JobState::Done,
                Err(Stop::Closing) => return,
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
            if changed.await.is_ok() {
                pool.0.tell(Event::JobEnded {
                    job: job.id.0,
                    failed,
                });
            }
        });
        // Outside a worker nobody makes requests.
        drop(spawned);
    }

    /// Does a job, until nothing is left to do.
    async fn work(&self, job: &Job, control: &Control) -> Result<(), Stop> {
        self.turn(job, control).await?;
        match &job.kind {
            JobKind::Resync { volume } => self.resync(*volume, control).await,
            JobKind::Relayout { volume, target } => self.relayout(*volume, target, control).await,
            JobKind::Move { volume, from, to } => self.move_members(*volume, *from, *to, control).await,
            JobKind::Evacuate { device, to, remove } => self.evacuate(*device, *to, *remove, control).await,
            JobKind::Scrub { volume } => self.scrub(*volume, control).await,
        }
    }

    /// Waits until no earlier job works on the same volume.
    async fn turn(&self, job: &Job, control: &Control) -> Result<(), Stop> {
        let mine = volumes_of(&self.0.config(), &job.kind);
        loop {
            control.progress(&self.0.clock, 0).await?;
            self.0.go_on()?;
            let config = self.0.config();
            let earlier = config
                .jobs
                .iter()
                .filter(|other| other.id < job.id && other.state == JobState::Running);
            let busy = earlier
                .flat_map(|other| volumes_of(&config, &other.kind))
                .any(|volume| mine.contains(&volume));
            if !busy {
                return Ok(());
            }
            self.0.clock.sleep(LOOK).await;
        }
    }

    fn volume_by(&self, id: VolumeId) -> Result<Volume<D, C>, Stop> {
        let volume = self
            .0
            .volume(id)
            .ok_or_else(|| Stop::Failed("the volume was deleted".into()))?;
        Ok(self.volume_of(volume))
    }

    /// Gives a volume's logs the devices and copies that they should have, as far as there are any.
    async fn complete(&self, id: VolumeId) -> Result<(), Refused> {
        self.0.adopt_log_devices(id).await?;
        let Ok(volume) = self.volume_by(id) else {
            return Ok(());
        };
        if let Err(Stop::Failed(reason)) = volume.complete_logs().await {
            tracing::warn!(reason, "a parity log has fewer copies than it should");
        }
        Ok(())
    }

    async fn resync(&self, id: VolumeId, control: &Control) -> Result<(), Stop> {
        let Ok(volume) = self.volume_by(id) else {
            return Ok(());
        };
        volume.resync(control).await?;
        loop {
            self.0.go_on()?;
            let lacking = {
                let map = volume.volume.map();
                let found = map
                    .members()
                    .find(|member| member.state != MemberState::InSync && member.is_alive());
                found.map(|member| member.id)
            };
            let Some(member) = lacking else { break };
            volume.fill_member(control, member, |_| ()).await?;
        }
        self.complete(id).await?;
        let config = self.0.config();
        if let Some(model) = config.volume(id)
            && is_whole(&config, model)
            && volume.volume.unclean.borrow().is_empty()
        {
            self.0.tell(Event::VolumeHealthy {
                volume: model.name.clone(),
            });
        }
        Ok(())
    }

    async fn relayout(&self, id: VolumeId, target: &Attributes, control: &Control) -> Result<(), Stop> {
        let volume = self.volume_by(id)?;
        volume.resync(control).await?;
        let legs = self.add_legs(&volume, target, control).await;
        let done = match legs {
            Ok(()) => self.relayout_steps(&volume, target, control).await,
            stop => stop,
        };
        let done = match done {
            Ok(()) => self.drop_legs(&volume, target).await,
            stop => stop,
        };
        self.complete(id).await?;
        done
    }

    /// Where only the number of legs is too small, nothing has to move: legs are added.
    async fn add_legs(
        &self,
        volume: &Volume<D, C>,
        target: &Attributes,
        control: &Control,
    ) -> Result<(), Stop> {
        let legs = target.layout.legs() as usize;
        let unmirrored = Attributes {
            layout: match target.layout {
                Layout::Mirror { .. } => Layout::Concat,
                Layout::StripeMirror { columns, .. } => Layout::Stripe { columns },
                _ => return Ok(()),
            },
            ..target.clone()
        };
        loop {
            self.0.go_on()?;
            let config = self.0.config();
            let Some(model) = config.volume(volume.volume.id) else {
                return Ok(());
            };
            let lacking = model.sections.iter().enumerate().find_map(|(index, section)| {
                let column = section
                    .columns
                    .iter()
                    .position(|column| column.members.len() < legs)?;
                fits(&config, section, model.block, &unmirrored).then_some((index, column))
            });
            let unfilled = model
                .sections
                .iter()
                .flat_map(|section| &section.columns)
                .flat_map(|column| &column.members);
            let unfilled = unfilled.filter(|member| member.state != MemberState::InSync);
            let healthy = |member: &&Member| {
                member
                    .extents
                    .iter()
                    .all(|extent| self.is_in_service(extent.device))
            };
            let begun = unfilled.into_iter().find(healthy).map(|member| member.id);
            let member = match (begun, lacking) {
                (Some(begun), _) => begun,
                (None, Some((section, column))) => {
                    cover!("work: a leg is added");
                    self.successor(model, section, column, None, None).await?
                }
                (None, None) => return Ok(()),
            };
            volume.fill_member(control, member, |_| ()).await?;
        }
    }

    /// Takes away the legs that are more than is wanted.
    async fn drop_legs(&self, volume: &Volume<D, C>, target: &Attributes) -> Result<(), Stop> {
        let (id, legs) = (volume.volume.id, target.layout.legs() as usize);
        let surplus = |volume: &VolumeModel| {
            let mut columns = volume.sections.iter().flat_map(|section| &section.columns);
            columns.any(|column| column.members.len() > legs)
        };
        if !self.0.config().volume(id).is_some_and(surplus) {
            return Ok(());
        }
        cover!("work: legs are taken away");
        let changed = self.0.change(|config| {
            let healthy: BTreeSet<DeviceId> = config
                .devices
                .iter()
                .filter(|device| device.is_holder())
                .map(|device| device.id)
                .collect();
            let Some(volume) = config.volume_mut(id) else {
                return Ok(());
            };
            for column in volume
                .sections
                .iter_mut()
                .flat_map(|section| &mut section.columns)
            {
                // The good ones first.
                column.members.sort_by_key(|member| {
                    let there = member
                        .extents
                        .iter()
                        .all(|extent| healthy.contains(&extent.device));
                    (member.state != MemberState::InSync || !there, member.id)
                });
                column.members.truncate(legs.max(1));
            }
            Ok::<(), Stop>(())
        });
        let (_, old) = changed.await?;
        let freed = self
            .0
            .reserve(old.iter().flat_map(|map| map.volume.extents().copied()).collect());
        for map in old {
            self.0.drained(map).await;
        }
        drop(freed);
        Ok(())
    }

    async fn relayout_steps(
        &self,
        volume: &Volume<D, C>,
        target: &Attributes,
        control: &Control,
    ) -> Result<(), Stop> {
        let mut tries = 0;
        loop {
            self.0.go_on()?;
            match volume.relayout_step(control, target).await {
                Ok(true) => tries = 0,
                Ok(false) => return Ok(()),
                // A device failed under it: the next attempt does without.
                Err(Stop::Failed(reason)) if tries < 3 => {
                    cover!("work: a step of a relayout is tried again");
                    tracing::warn!(reason, "a step of a change of layout failed and is tried again");
                    tries += 1;
                }
                Err(stop) => return Err(stop),
            }
        }
    }

    async fn move_members(
        &self,
        id: VolumeId,
        from: Option<DeviceId>,
        to: Option<DeviceId>,
        control: &Control,
    ) -> Result<(), Stop> {
        let volume = self.volume_by(id)?;
        // A leg in doubt is not the one to go.
        volume.resync(control).await?;
        loop {
            self.0.go_on()?;
            let config = self.0.config();
            let Some(model) = config.volume(id) else {
                return Ok(());
            };
            let leaving = |member: &Member| {
                member.extents.iter().any(|extent| match from {
                    Some(from) => extent.device == from,
                    None => !allowed(&config, extent.device, model.block, &model.attributes),
                })
            };
            let Some((section, column, old)) = find_member(model, leaving) else {
                break;
            };
            let successor = self.successor(model, section, column, Some(old), to).await?;
            volume
                .fill_member(control, successor, |volume| {
                    for column in volume
                        .sections
                        .iter_mut()
                        .flat_map(|section| &mut section.columns)
                    {
                        if column.members.iter().any(|member| member.id == successor) {
                            column.members.retain(|member| member.id != old);
                        }
                    }
                })
                .await?;
        }
        self.complete(id).await?;
        Ok(())
    }

    /// The member that is to take another's place: one that an earlier attempt began with, or a new one.
    async fn successor(
        &self,
        model: &VolumeModel,
        section: usize,
        column: usize,
        old: Option<MemberId>,
        to: Option<DeviceId>,
    ) -> Result<MemberId, Stop> {
        let config = self.0.config();
        let healthy = |member: &&Member| {
            member
                .extents
                .iter()
                .all(|extent| self.is_in_service(extent.device))
        };
        let legs = model.attributes.layout.legs() as usize;
        let members = model
            .sections
            .get(section)
            .and_then(|section| section.columns.get(column));
        let members = members
            .map(|column| column.members.as_slice())
            .unwrap_or_default();
        let begun = members
            .iter()
            .filter(|member| Some(member.id) != old && member.state != MemberState::InSync)
            .find(healthy);
        if let (Some(begun), true) = (begun, members.len() > legs) {
            cover!("work: a move goes on where it was");
            return Ok(begun.id);
        }
        let request = place::MemberRequest {
            volume: model.id,
            section,
            column,
            replaces: old,
            to,
            excluded: &[],
            use_spares: true,
            state: MemberState::Filling { cursor: 0 },
        };
        let mut placing = self.0.placing();
        // By number, as the reserved extents may have been put into the volume itself.
        if let Some(volume) = placing.volume_mut(model.id) {
            volume.sections.clone_from(&model.sections);
        }
        drop(config);
        let placed = place::place_member(&placing, &request)?;
        let _kept = self.0.reserve(placed.member.extents.clone());
        if model.log_devices.is_empty() {
            cover!("work: an extent without redundancy is moved");
            // While it is in two places, they must not differ after a crash.
            let devices = members
                .iter()
                .chain([&placed.member])
                .flat_map(|member| &member.extents);
            let mut devices: Vec<DeviceId> = devices.map(|extent| extent.device).collect();
            devices.sort_unstable();
            devices.dedup();
            self.0.first_log_devices(model.id, devices).await?;
        }
        let changed = self.0.change(|config| {
            let gone = || Stop::Failed("the volume was changed meanwhile: try again".into());
            let volume = config.volume_mut(model.id).ok_or_else(gone)?;
            let id = MemberId(volume.next_member);
            volume.next_member += 1;
            let column = volume
                .sections
                .get_mut(section)
                .and_then(|section| section.columns.get_mut(column))
                .ok_or_else(gone)?;
            if old.is_some_and(|old| !column.members.iter().any(|member| member.id == old)) {
                return Err(gone());
            }
            column.members.push(Member {
                id,
                ..placed.member.clone()
            });
            Ok(id)
        });
        let (id, old) = changed.await?;
        // Writes under the old map do not reach the new member.
        for map in old {
            self.0.drained(map).await;
        }
        Ok(id)
    }

    async fn evacuate(
        &self,
        device: DeviceId,
        to: Option<DeviceId>,
        remove: bool,
        control: &Control,
    ) -> Result<(), Stop> {
        let ids: Vec<VolumeId> = self.0.config().volumes.iter().map(|volume| volume.id).collect();
        for id in ids {
            self.move_members(id, Some(device), to, control).await?;
            self.move_logs(id, device, control).await?;
        }
        let left = self
            .0
            .config()
            .extents()
            .filter(|extent| extent.device == device)
            .count();
        if left > 0 {
            return Err(Stop::Failed(format!(
                "{left} extents of logs could not be moved off the device"
            )));
        }
        if remove {
            self.remove_device(device)
                .await
                .map_err(|error| Stop::because("the empty device cannot be removed", &error))?;
        }
        Ok(())
    }

    /// Moves copies of parity logs and bitmaps off a device.
    async fn move_logs(&self, id: VolumeId, device: DeviceId, control: &Control) -> Result<(), Stop> {
        let Ok(volume) = self.volume_by(id) else {
            return Ok(());
        };
        loop {
            control.progress(&self.0.clock, 0).await?;
            let config = self.0.config();
            let Some(model) = config.volume(id) else {
                return Ok(());
            };
            let on_it =
                |section: &crate::model::Section| section.log.iter().any(|copy| copy.device == device);
            let Some(index) = model.sections.iter().position(on_it) else {
                break;
            };
            let placing = self.0.placing();
            let copy = place::place_log(&placing, id, index, Some(device), &[], true)?;
            volume.replace_log(index, Some(device), copy).await?;
        }
        self.complete(id).await?;
        Ok(())
    }

    async fn scrub(&self, only: Option<VolumeId>, control: &Control) -> Result<(), Stop> {
        let ids: Vec<VolumeId> = self.0.config().volumes.iter().map(|volume| volume.id).collect();
        for id in ids.into_iter().filter(|id| only.is_none_or(|only| only == *id)) {
            let Ok(volume) = self.volume_by(id) else { continue };
            volume.scrub(control).await?;
        }
        Ok(())
    }
}

/// The first member for which `wanted` holds: section, column, number.
fn find_member(volume: &VolumeModel, wanted: impl Fn(&Member) -> bool) -> Option<(usize, usize, MemberId)> {
    for (section, model) in volume.sections.iter().enumerate() {
        for (column, model) in model.columns.iter().enumerate() {
            if let Some(member) = model.members.iter().find(|member| wanted(member)) {
                return Some((section, column, member.id));
            }
        }
    }
    None
}

/// Whether all members of a volume are in sync, and there are as many as its layout wants.
pub(crate) fn is_whole(config: &Configuration, volume: &VolumeModel) -> bool {
    let legs = volume.attributes.layout.legs() as usize;
    let columns = volume.sections.iter().flat_map(|section| &section.columns);
    columns.into_iter().all(|column| {
        let good = column.members.iter().filter(|member| {
            let there =
                |extent: &crate::model::Extent| config.device(extent.device).is_some_and(Device::is_holder);
            member.state == MemberState::InSync && member.extents.iter().all(there)
        });
        good.count() >= legs
    })
}

/// The volumes whose mapping a job changes.
fn volumes_of(config: &Configuration, kind: &JobKind) -> BTreeSet<VolumeId> {
    match kind {
        JobKind::Resync { volume } | JobKind::Relayout { volume, .. } | JobKind::Move { volume, .. } => {
            BTreeSet::from([*volume])
        }
        JobKind::Scrub { volume: Some(volume) } => BTreeSet::from([*volume]),
        JobKind::Evacuate { .. } | JobKind::Scrub { volume: None } => {
            config.volumes.iter().map(|volume| volume.id).collect()
        }
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
