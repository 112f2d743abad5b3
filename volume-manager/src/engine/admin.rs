//! Devices come and go; volumes change their size.

use std::rc::Rc;

use block_io::{BlockDevice, Clock, ZeroMode, cover};

use super::core::Refused;
use super::disk::Disk;
use super::event::Event;
use super::job::Stop;
use super::map::SectionMap;
use super::pool::{NewDevice, Pool, PoolError, describe};
use super::volume::Volume;
use super::work;
use crate::model::{
    self, BLOCK, Configuration, Device, DeviceId, DeviceState, Extent, JobId, JobKind, JobState, MemberState,
    ReadPolicy, Section,
};
use crate::place;

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Adds a device, whose content is lost.
    ///
    /// # Errors
    /// It is too small, or a device of this pool already, or fails.
    pub async fn add_device(&self, new: NewDevice<D>) -> Result<DeviceId, PoolError> {
        let (id, ()) = self.take_in(new, |_, _| Ok(())).await?;
        self.heal().await?;
        Ok(id)
    }

    /// Puts a device in the place of another, which may have failed: a job moves everything, or makes it anew, and takes the old one
    /// out. The new device and the job are in the pool together or not at all, so that a crash leaves nothing to be cleared up.
    ///
    /// # Errors
    /// As [`Self::add_device`]; there is no such device, it is being replaced already, or the new one has not the room for what is on it.
    pub async fn replace_device(
        &self,
        old: DeviceId,
        new: NewDevice<D>,
        throttle: u64,
    ) -> Result<JobId, PoolError> {
        // Looked at once more when the configuration is changed: then it is too late to leave the new device as it was.
        let config = self.0.config();
        see_that_it_can_go(&config, old)?;
        let described = describe(&mut Configuration::clone(&config), &new)?;
        see_that_there_is_room(&config, old, &described)?;
        let (_, job) = self
            .take_in(new, |config, id| {
                see_that_it_can_go(config, old)?;
                let came = config.device(id).unwrap_or(&described);
                see_that_there_is_room(config, old, came)?;
                let kind = JobKind::Evacuate {
                    device: old,
                    to: Some(id),
                    remove: true,
                };
                work::enlist(config, kind, throttle)
            })
            .await?;
        cover!("admin: a device is replaced");
        self.run(&job);
        self.heal().await?;
        Ok(job.id)
    }

    /// Makes a device one of the pool, and does `more` to the same configuration that takes it in.
    async fn take_in<T>(
        &self,
        new: NewDevice<D>,
        more: impl FnOnce(&mut Configuration, DeviceId) -> Result<T, PoolError>,
    ) -> Result<(DeviceId, T), PoolError> {
        // Who is second finds the next number.
        let _turn = self.0.adding.hold(0, 1).await;
        let config = self.0.config();
        if config.devices.iter().any(|device| device.uuid == new.uuid) {
            return Err(PoolError::State(format!(
                "device {} is in this pool already",
                new.name
            )));
        }
        if config.devices.len() >= model::MAX_DEVICES {
            return Err(PoolError::State(format!(
                "the pool has {} devices, which is the most",
                model::MAX_DEVICES
            )));
        }
        let mut counting = Configuration::clone(&config);
        let device = describe(&mut counting, &new)?;
        let id = device.id;
        self.0.add_holder(&device, Rc::clone(&new.device)).await?;
        let entered = self.enter(device, &new, more).await;
        if entered.is_err() && self.0.config().device(id).is_none() {
            cover!("admin: a device is not taken in");
            self.0.hot.remove_log(id);
            self.0.remove_disk(id);
            // Where the pool is closed, it holds no device any more.
            drop(self.0.forget_holder(id).await);
        }
        let done = entered?;
        self.0.tell(Event::DeviceAdded { device: new.name });
        Ok((id, done))
    }

    async fn enter<T>(
        &self,
        device: Device,
        new: &NewDevice<D>,
        more: impl FnOnce(&mut Configuration, DeviceId) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let id = device.id;
        let disk = Rc::new(Disk::new(id, &new.name, Some(Rc::clone(&new.device))));
        self.0.format_activity_log(&disk).await?;
        self.0.set_disk(disk);
        let changed = self.0.change(|config| {
            config.next_device += 1;
            config.devices.push(device);
            more(config, id)
        });
        Ok(changed.await?.0)
    }

    /// Takes an empty device out of the pool, and lets it go. It still has a label, of which the pool knows nothing any more.
    ///
    /// # Errors
    /// Something lies on it (evacuate it first), or it is the last one.
    pub async fn remove_device(&self, id: DeviceId) -> Result<(), PoolError> {
        let name = self.0.disk(id).name.to_string();
        self.0
            .change(|config| {
                if config.device(id).is_none() {
                    return Err(PoolError::Unknown(format!("device {name}")));
                }
                let used = used(config, id);
                if used > 0 {
                    return Err(PoolError::State(format!(
                        "{used} bytes of device {name} are in use: evacuate it first"
                    )));
                }
                let others = config
                    .devices
                    .iter()
                    .filter(|device| device.id != id && device.is_holder())
                    .count();
                if others == 0 {
                    return Err(PoolError::State(format!("{name} is the last device of the pool")));
                }
                config.devices.retain(|device| device.id != id);
                // The job that emptied it is done with this.
                for job in config.jobs.iter_mut().filter(|job| job.is_live()) {
                    if matches!(job.kind, JobKind::Evacuate { device, .. } if device == id) {
                        job.state = JobState::Done;
                    }
                }
                Ok(())
            })
            .await?;
        self.0.hot.remove_log(id);
        // One that failed is let go as well, so that others can have it while the pool is open.
        self.0.forget_holder(id).await?;
        self.0.remove_disk(id);
        self.0.tell(Event::DeviceRemoved { device: name });
        Ok(())
    }

    /// Makes a device a spare, or an ordinary one; changes its class and enclosure.
    ///
    /// # Errors
    /// There is no such device; one that holds extents cannot become a spare.
    pub async fn set_device(
        &self,
        id: DeviceId,
        spare: Option<bool>,
        class: Option<String>,
        enclosure: Option<String>,
    ) -> Result<(), PoolError> {
        self.0
            .change(|config| {
                let used = config.extents().any(|extent| extent.device == id);
                let found = config.devices.iter_mut().find(|device| device.id == id);
                let device = found.ok_or_else(|| PoolError::Unknown(format!("device number {}", id.0)))?;
                match (spare, device.state) {
                    (Some(true), _) if used => {
                        return Err(PoolError::State(format!(
                            "device {} is in use: evacuate it first",
                            device.name
                        )));
                    }
                    (Some(true), DeviceState::Active) => device.state = DeviceState::Spare,
                    (Some(false), DeviceState::Spare) => device.state = DeviceState::Active,
                    _ => {}
                }
                device.class = class.clone().unwrap_or_else(|| device.class.clone());
                device.enclosure = enclosure.clone().unwrap_or_else(|| device.enclosure.clone());
                Ok(())
            })
            .await?;
        self.heal().await
    }

    /// Changes which legs of a volume answer reads. Without several legs it has no meaning, until there are some.
    ///
    /// # Errors
    /// There is no such volume; the pool takes no changes.
    pub async fn set_read_policy(&self, name: &str, policy: ReadPolicy) -> Result<(), PoolError> {
        let id = self.volume(name)?.volume.id;
        let unknown = || PoolError::Unknown(format!("volume {name}"));
        self.0
            .change(|config| {
                let volume = config.volume_mut(id).ok_or_else(unknown)?;
                volume.read_policy = policy;
                Ok(())
            })
            .await
            .map(drop)
    }

    /// Changes the size of a volume; what is new reads as zeroes. Shrinking loses what lies behind the new end: `used` says up to where
    /// the user needs the volume, and less than that is refused.
    ///
    /// # Errors
    /// There is no such volume, no space, or the volume is used above the new size.
    pub async fn resize(&self, name: &str, size: u64, used: u64) -> Result<(), PoolError> {
        let volume = self.volume(name)?;
        let size = size.next_multiple_of(BLOCK);
        if size == 0 || size < used {
            return Err(PoolError::State(format!(
                "volume {name} is in use up to byte {used}, and cannot shrink to {size} bytes"
            )));
        }
        let present = volume.size();
        if size > present {
            volume.grow(size - present).await
        } else {
            volume.shrink(size).await
        }
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Appends a section of `more` bytes.
    async fn grow(&self, more: u64) -> Result<(), PoolError> {
        let id = self.volume.id;
        let unknown = || PoolError::Unknown(format!("volume {}", self.volume.name));
        let config = self.core.config();
        let model = config.volume(id).ok_or_else(unknown)?;
        if model.bitmap_generation != 0 {
            let name = &model.name;
            return Err(PoolError::State(format!(
                "volume {name} is degraded: it can grow when its copies are whole again"
            )));
        }
        let request = place::SectionRequest {
            length: more,
            attributes: &model.attributes,
            block: model.block,
            excluded: &[],
            use_spares: false,
            bitmap: 0,
            state: MemberState::InSync,
            number: model.next_section,
            first_member: model.next_member,
        };
        let section = place::place_section(&self.core.placing(), &request)?.section;
        let extents = extents(&section);
        let _kept = self.core.reserve(extents.clone());
        let target = SectionMap::new(&section, 0, &|id| self.core.disk(id));
        for column in &target.columns {
            for member in &column.members {
                let length = member.length();
                let zero = super::map::Payload::Zero(ZeroMode::MayUnmap);
                member
                    .write(&self.core.clock, 0, length, zero)
                    .await
                    .map_err(|(_, error)| error)?;
            }
        }
        for disk in target.disks() {
            disk.flush(&self.core.clock).await?;
        }
        if section.parity > 0 {
            let log = self.core.new_parity_log(model.uuid, &section).await?;
            self.volume.logs.borrow_mut().insert(section.id, log);
        }
        cover!("admin: a volume grows");
        self.core
            .change(|config| {
                let holders: Vec<DeviceId> = config
                    .devices
                    .iter()
                    .filter(|device| device.is_holder())
                    .map(|device| device.id)
                    .collect();
                if extents.iter().any(|extent| !holders.contains(&extent.device)) {
                    return Err(PoolError::State(
                        "a device failed while the volume was growing: try again".into(),
                    ));
                }
                let volume = config.volume_mut(id).ok_or_else(unknown)?;
                if volume.next_section != section.id {
                    return Err(PoolError::State(
                        "the volume was changed meanwhile: try again".into(),
                    ));
                }
                volume.next_section += 1;
                let last = section
                    .columns
                    .iter()
                    .flat_map(|column| &column.members)
                    .map(|member| member.id.0)
                    .max();
                volume.next_member = volume.next_member.max(last.unwrap_or(0) + 1);
                volume.size += more;
                volume.sections.push(section.clone());
                Ok(())
            })
            .await?;
        self.core.adopt_log_devices(id).await?;
        Ok(())
    }

    /// Cuts off everything behind `size`.
    async fn shrink(&self, size: u64) -> Result<(), PoolError> {
        let id = self.volume.id;
        let present = self.size();
        if size >= present {
            return Ok(());
        }
        let _copying = self.copying().await;
        let held = self.volume.ranges.hold(size, present).await;
        cover!("admin: a volume shrinks");
        let (_, old) = self
            .core
            .change(|config| {
                if config
                    .jobs
                    .iter()
                    .any(|job| job.is_live() && job.kind.concerns(id))
                {
                    return Err(PoolError::State(
                        "a job works on the volume: wait for it, or cancel it".into(),
                    ));
                }
                let volume = config
                    .volume_mut(id)
                    .ok_or_else(|| PoolError::Unknown("such volume".into()))?;
                let mut rest = size;
                volume.sections.retain_mut(|section| {
                    let length = section.length.min(rest);
                    rest -= length;
                    if length > 0 && length < section.length {
                        cut_back(section, length);
                    }
                    length > 0
                });
                volume.size = size;
                Ok(())
            })
            .await?;
        let _freed = self
            .core
            .reserve(old.iter().flat_map(|map| map.volume.extents().copied()).collect());
        for map in old {
            self.core.drained(map).await;
        }
        drop(held);
        Ok(())
    }

    /// Puts another copy of a parity log into service, and takes the one on `device` out of it, if one is named.
    pub(crate) async fn replace_log(
        &self,
        section: usize,
        device: Option<DeviceId>,
        copy: Extent,
    ) -> Result<(), Stop> {
        let gone = || Stop::Failed("the volume was changed meanwhile: try again".into());
        let _kept = self.core.reserve(vec![copy]);
        let config = self.core.config();
        let id = self.volume.id;
        let section = config
            .volume(id)
            .and_then(|volume| volume.sections.get(section))
            .ok_or_else(gone)?
            .id;
        let log = self
            .volume
            .logs
            .borrow()
            .get(&section)
            .cloned()
            .ok_or_else(gone)?;
        for place in self.core.copies(&[copy]) {
            let added = log
                .add_copy(place, &async || self.core.flush_members(id).await)
                .await;
            if let Err(error) = added {
                self.core.fail(&[]).await?;
                return Err(Stop::because(
                    "cannot make another copy of the parity log",
                    &error,
                ));
            }
        }
        let changed = self.core.change(|config| {
            let volume = config.volume_mut(id).ok_or_else(gone)?;
            let section = volume
                .sections
                .iter_mut()
                .find(|other| other.id == section)
                .ok_or_else(gone)?;
            section.log.retain(|copy| Some(copy.device) != device);
            let needed = section.log.len() <= section.parity as usize;
            if needed {
                section.log.push(copy);
            }
            Ok::<bool, Stop>(needed)
        });
        let (needed, _) = changed.await?;
        let gone = if needed { device } else { Some(copy.device) };
        if let Some(device) = gone {
            log.remove_copy(device);
        }
        Ok(())
    }

    /// Has every parity log as many copies again as its section tolerates failures, and one more.
    pub(crate) async fn complete_logs(&self) -> Result<(), Stop> {
        loop {
            let config = self.core.config();
            let Some(model) = config.volume(self.volume.id) else {
                return Ok(());
            };
            let lacks =
                |section: &Section| section.parity > 0 && section.log.len() <= section.parity as usize;
            let Some(index) = model.sections.iter().position(lacks) else {
                return Ok(());
            };
            let copy = place::place_log(&self.core.placing(), self.volume.id, index, None, &[], false)?;
            cover!("admin: another copy of a parity log");
            self.replace_log(index, None, copy).await?;
        }
    }
}

/// Bytes of a device that belong to something.
fn used(config: &Configuration, device: DeviceId) -> u64 {
    let extents = config.extents().filter(|extent| extent.device == device);
    extents.map(|extent| extent.length).sum()
}

fn see_that_it_can_go(config: &Configuration, old: DeviceId) -> Result<(), PoolError> {
    if config.device(old).is_none() {
        return Err(PoolError::Unknown(format!("device number {}", old.0)));
    }
    let leaves =
        |kind: &JobKind| matches!(kind, JobKind::Evacuate { device, remove: true, .. } if *device == old);
    match config.jobs.iter().find(|job| job.is_live() && leaves(&job.kind)) {
        Some(job) => Err(PoolError::State(format!(
            "job {} replaces the device already",
            job.id.0
        ))),
        None => Ok(()),
    }
}

fn see_that_there_is_room(config: &Configuration, old: DeviceId, new: &Device) -> Result<(), PoolError> {
    let needed = used(config, old);
    let room = new.size.saturating_sub(new.data_start);
    match needed <= room {
        true => Ok(()),
        false => Err(PoolError::State(format!(
            "device {} has room for {room} bytes, and {needed} bytes lie on the one that is to leave: take a larger one",
            new.name
        ))),
    }
}

fn extents(section: &Section) -> Vec<Extent> {
    let members = section.columns.iter().flat_map(|column| &column.members);
    section
        .log
        .iter()
        .chain(members.flat_map(|member| &member.extents))
        .copied()
        .collect()
}

/// Keeps the first `length` bytes of a section, and as much of its members as these need.
fn cut_back(section: &mut Section, length: u64) {
    let single = section.columns.len() == 1;
    let of_member = if single {
        length
    } else {
        length.div_ceil(section.row()) * section.unit
    };
    if single {
        section.unit = length;
    }
    section.length = length;
    for member in section.columns.iter_mut().flat_map(|column| &mut column.members) {
        let mut rest = of_member;
        member.extents.retain_mut(|extent| {
            extent.length = extent.length.min(rest);
            rest -= extent.length;
            extent.length > 0
        });
    }
}

impl From<Stop> for PoolError {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Failed(reason) => Self::State(reason),
            Stop::Cancelled => Self::State("it was cancelled".into()),
            Stop::Closing => Self::Refused(Refused::new("the pool is being closed")),
        }
    }
}
