//! What each kind of job does, step by step. What is left to do is read from the configuration before each step.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use block_io::{BlockDevice, Clock, cover};

use super::core::Refused;
use super::event::Event;
use super::job::{Control, Stop};
use super::pool::Pool;
use super::relayout::{allowed, fits};
use super::volume::Volume;
use super::work::{LOOK, volumes_of};
use crate::model::{
    Attributes, Configuration, Device, DeviceId, Job, JobId, JobKind, JobState, Layout, Member, MemberId,
    MemberState, Priority, Volume as VolumeModel, VolumeId,
};
use crate::place;

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Does a job, until nothing is left to do.
    pub(super) async fn work(&self, job: &Job, control: &Control) -> Result<(), Stop> {
        self.turn(job, control).await?;
        match &job.kind {
            JobKind::Resync { volume } => self.resync(*volume, control).await,
            JobKind::Relayout { volume, target } => self.relayout(*volume, target, control).await,
            JobKind::Move { volume, from, to } => self.move_members(*volume, *from, *to, control).await,
            JobKind::Evacuate { device, to, remove } => self.evacuate(*device, *to, *remove, control).await,
            JobKind::Scrub { volume } => self.scrub(*volume, control).await,
            JobKind::AutoTune { window } => self.auto_tune(*window, control).await,
        }
    }

    /// Waits until jobs may begin, none works on the same volume, and none that waits for it comes first: by its priority, or among
    /// those of the same one by its number.
    async fn turn(&self, job: &Job, control: &Control) -> Result<(), Stop> {
        let mine = volumes_of(&self.0.config(), &job.kind);
        loop {
            control.progress(&self.0.clock, 0).await?;
            self.0.go_on()?;
            let config = self.0.config();
            let rank = |id: JobId, priority: Priority| (Reverse(priority), id);
            let earlier = config.jobs.iter().filter(|other| {
                let works = || self.0.control(other.id).is_some_and(|other| other.has_begun());
                let comes_first = || rank(other.id, other.priority) < rank(job.id, control.priority());
                other.id != job.id && other.state == JobState::Running && (works() || comes_first())
            });
            let busy = earlier
                .flat_map(|other| volumes_of(&config, &other.kind))
                .any(|volume| mine.contains(&volume));
            if !busy && !self.0.jobs_wait.get() {
                control.begin();
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
    pub(super) async fn complete(&self, id: VolumeId) -> Result<(), Refused> {
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
            self.fail_shrunk().await?;
            volume.scrub(control).await?;
        }
        self.fail_shrunk().await?;
        Ok(())
    }

    /// Takes devices out of service whose end is not there any more: what is lost with it need not be in use, so that nobody reads it, and a
    /// write behind it would make a file whole again, of zeroes.
    async fn fail_shrunk(&self) -> Result<(), Stop> {
        let mut shrunk = Vec::new();
        for disk in self.0.disks().into_iter().filter(|disk| disk.is_alive()) {
            if disk.has_shrunk().await {
                cover!("scrub: a device has become smaller");
                shrunk.push(disk);
            }
        }
        if !shrunk.is_empty() {
            self.0.fail_because(&shrunk, "it has become smaller").await?;
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
