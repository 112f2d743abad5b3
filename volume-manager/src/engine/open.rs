//! Pools are opened, kept in order, and closed.
//!
//! # Opening
//! 1. The configuration is chosen from what the devices say ([`store`]).
//! 2. Devices that are missing, or came back with old content, are taken out of it; a new incarnation begins.
//! 3. The activity logs say which regions were being written when the pool was last in use: they are in doubt until resynced,
//!    and until then every read of them is answered by the same leg.
//! 4. The parity logs are replayed.
//! 5. Devices that were out of service and are here again are taken in, and catch up.
//! 6. Jobs go on where they were: at once, or when the layer above has said what is in use.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, cover, spawn_local};

use super::core::{Core, Refused};
use super::degrade::degrade;
use super::disk::Disk;
use super::event::Event;
use super::keep;
use super::map::Payload;
use super::pool::{OpenOptions, Pool, PoolError, log_shape};
use super::volume::VolumeCore;
use crate::logs::LogError;
use crate::logs::activity::ActivityLog;
use crate::logs::bitmap::Bitmap;
use crate::logs::hot::HotRegions;
use crate::logs::parity::{ParityLog, Piece};
use crate::model::{self, DeviceId, DeviceState, MemberState};
use crate::store::{self, Standing};

/// Between looks at what has to be done now and then.
const ROUND: Duration = Duration::from_secs(2);

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Opens a pool from devices in any order.
    ///
    /// # Errors
    /// The devices do not make a pool that may be opened: see [`store`]. Devices that fail while it is being opened count as
    /// missing, as long as enough are left.
    pub async fn open(
        devices: Vec<(String, Rc<D>)>,
        options: &OpenOptions,
        clock: C,
    ) -> Result<Self, PoolError> {
        let scan = store::scan(&devices).await;
        for problem in scan.problems() {
            tracing::warn!("{problem}");
        }
        let choice = scan.choose(options.pool, &options.force)?;
        let opened = choice.claim().await?;
        let mut next = opened.begin(options.incarnation);
        let store::Opened {
            store,
            configuration: config,
            present,
            failed,
            ..
        } = opened;
        let mut disks = BTreeMap::new();
        let mut returned = Vec::new();
        for there in present {
            if let Some(device) = next.devices.iter_mut().find(|device| device.id == there.id) {
                device.name.clone_from(&there.path);
            }
            let Some(io) = store.device(there.id).map(Rc::clone) else {
                continue;
            };
            match there.standing {
                Standing::Current | Standing::Lagging | Standing::New => {
                    let disk = Disk::new(there.id, &there.path, Some(io));
                    if failed.iter().any(|(id, _)| *id == there.id) {
                        disk.kill();
                    }
                    disks.insert(there.id, Rc::new(disk));
                }
                Standing::Stale | Standing::Faulty => returned.push((there.id, there.path, io)),
            }
        }
        let hot = HotRegions::new(options.limits);
        for disk in disks.values() {
            let Some(io) = disk.io() else { continue };
            let place = crate::format::LOG_OFFSET;
            match ActivityLog::open(disk.id, Rc::clone(io), place, config.pool).await {
                Ok(log) => hot.add_log(log),
                Err(error) => {
                    cover!("pool: an activity log cannot be read");
                    tracing::warn!(%error, device = %disk.name, "no activity log");
                    if matches!(error, LogError::Device { .. }) {
                        disk.kill();
                    }
                }
            }
        }
        let lost: BTreeSet<DeviceId> = config
            .devices
            .iter()
            .filter(|device| device.is_holder() && !disks.get(&device.id).is_some_and(|disk| disk.is_alive()))
            .map(|device| device.id)
            .collect();
        let before = config.clone();
        next.epoch -= 1;
        let mut next = degrade(&next, &lost);
        let core = Core::new(clock, config, disks, hot, store);
        let mut doubtful = Vec::new();
        for volume in &before.volumes {
            let guards = match core.hot.add_volume(volume.id, &volume.log_devices) {
                _ if volume.log_devices.is_empty() => Vec::new(),
                Ok(guards) => guards,
                Err(error) => {
                    cover!("pool: nothing is known of what was being written to a volume");
                    tracing::warn!(%error, volume = volume.name, "all of it is resynced");
                    doubtful.push(volume.id);
                    Vec::new()
                }
            };
            let runtime = core.add_volume(VolumeCore::new(core.map_of(volume)));
            let mut unclean = runtime.unclean.borrow_mut();
            unclean.extend(guards.into_iter().map(|guard| (*guard.regions().start(), guard)));
        }
        for id in doubtful {
            if let Some(volume) = next.volume_mut(id) {
                doubt(volume);
            }
        }
        core.begin(next).await?;
        let pool = Self(core);
        pool.0.jobs_wait.set(options.jobs_wait);
        for volume in pool.0.volumes() {
            pool.load_bitmap(&volume).await?;
            pool.recover_volume(&volume).await?;
        }
        pool.0.fail(&[]).await?;
        for (id, name, device) in returned {
            if let Err(error) = pool.readmit(id, &name, device).await {
                tracing::warn!(%error, device = name, "a device that is here again cannot be taken in");
            }
        }
        pool.start_jobs().await?;
        pool.guard();
        Ok(pool)
    }

    /// Reads what detached members of a volume miss.
    async fn load_bitmap(&self, volume: &VolumeCore<D>) -> Result<(), PoolError> {
        loop {
            let model = volume.map().volume.clone();
            let copies = self.0.copies(&model.bitmap);
            let (Some(length), false) = (
                model.bitmap.iter().map(|copy| copy.length).min(),
                copies.is_empty(),
            ) else {
                return Ok(());
            };
            match Bitmap::load(copies, length, keep::regions(&model), model.bitmap_generation).await {
                Ok(bitmap) => {
                    *volume.bitmap.borrow_mut() = Some(Rc::new(bitmap));
                    volume.generation.set(model.bitmap_generation);
                    return Ok(());
                }
                Err(LogError::Device { device, .. }) => self.0.fail(&[self.0.disk(device)]).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Replays the parity logs of a volume.
    async fn recover_volume(&self, volume: &Rc<VolumeCore<D>>) -> Result<(), PoolError> {
        for index in 0..volume.map().sections.len() {
            if let Some((section, log)) = self.replay(volume, index).await? {
                volume.logs.borrow_mut().insert(section, Rc::new(log));
            }
        }
        Ok(())
    }

    /// Replays one section's log; none if it has none, if all its copies are lost, or if too many devices are missing for that.
    async fn replay(
        &self,
        volume: &Rc<VolumeCore<D>>,
        index: usize,
    ) -> Result<Option<(u32, ParityLog<D>)>, PoolError> {
        let core = &self.0;
        let mut replayed = BTreeSet::new();
        loop {
            // Anew in every round: what failed in the last one is not written to any more.
            let map = volume.map();
            let (Some(section), Some(model)) = (map.sections.get(index), map.volume.sections.get(index))
            else {
                return Ok(None);
            };
            if model.parity == 0 {
                return Ok(None);
            }
            let bytes = section.shape.row_bytes();
            let epoch = core.config().epoch;
            let recovery =
                match ParityLog::open(log_shape(map.volume.uuid, model), core.copies(&model.log)).await {
                    Ok(recovery) => recovery,
                    Err(LogError::Device { device, .. }) => {
                        core.fail(&[core.disk(device)]).await?;
                        continue;
                    }
                    Err(error) => {
                        cover!("pool: all copies of a parity log are lost");
                        tracing::error!(%error, volume = %volume.name, "the volume takes no writes here");
                        return Ok(None);
                    }
                };
            let mut failed = Vec::new();
            let mut apply = async |row: u64, pieces: &[Piece<'_>]| {
                cover!("pool: a parity log is replayed");
                for piece in pieces {
                    let column = usize::try_from(piece.column)
                        .ok()
                        .and_then(|column| section.columns.get(column));
                    let Some(column) = column else { continue };
                    let mut buffer = AlignedBuffer::new(piece.data.len());
                    buffer.as_mut_slice().copy_from_slice(piece.data);
                    // SAFETY: the buffer outlives the write below, which is all that uses it.
                    let memory = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
                    let at = row * section.shape.unit + piece.offset;
                    let payload = Payload::Data(&memory, Durability::Volatile);
                    let written = column
                        .write(&core.clock, at, piece.data.len() as u64, payload, true)
                        .await;
                    failed.extend(written.failed);
                }
                replayed.extend(volume.regions(section.start + row * bytes, bytes));
                Ok::<(), LogError>(())
            };
            let done = recovery.replay(&mut apply).await;
            if let Err(LogError::Device { device, .. }) = &done {
                failed.push(core.disk(*device));
            }
            if core.flush_members(volume.id).await.is_err() || !failed.is_empty() {
                // Once more without what failed.
                core.fail(&failed).await?;
                if core.config().epoch == epoch {
                    cover!("pool: a parity log cannot be replayed without what is missing");
                    tracing::error!(volume = %volume.name, "too many devices are missing: the volume takes no writes here");
                    return Ok(None);
                }
                continue;
            }
            done?;
            // Detached members miss these rows. That must be known before the log forgets them, as the next crash may come between.
            core.note_replayed(volume, &replayed).await?;
            match recovery.restart().await {
                Ok(log) => return Ok(Some((section.id, log))),
                Err(LogError::Device { device, .. }) => core.fail(&[core.disk(device)]).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Does what has to be done now and then: regions that are not written any more leave the activity logs, and spares take over
    /// from devices that failed.
    pub(super) fn guard(&self) {
        let core = Rc::downgrade(&self.0);
        let clock = self.0.clock.clone();
        let spawned = spawn_local(async move {
            let mut healed = 0;
            loop {
                clock.sleep(ROUND).await;
                let Some(core) = core.upgrade().filter(|core| !core.closing.get()) else {
                    return;
                };
                if core.check().is_err() {
                    return;
                }
                let failures = core.failures.get();
                if failures != healed {
                    healed = failures;

                    if let Err(error) = Self(Rc::clone(&core)).heal().await {
                        tracing::warn!(%error, "what a device that failed held cannot be made anew");
                    }
                }
                if let Err(error) = core.clean_idle().await {
                    tracing::warn!(%error, "regions cannot leave the activity logs");
                }
            }
        });
        // Outside a worker nobody makes requests.
        drop(spawned);
    }

    /// Ends all work, makes everything durable, and leaves the devices so that nothing needs to be resynced at the next open.
    ///
    /// # Errors
    /// What could not be made durable. The pool is closed nevertheless.
    pub async fn close(self) -> Result<(), PoolError> {
        let core = &self.0;
        core.closing.set(true);
        core.stop_jobs();
        while core.tasks() > 0 {
            core.clock.sleep(Duration::from_millis(1)).await;
        }
        let mut flushed = Ok(());
        for volume in core.volumes() {
            let has_lost_a_device = volume.map().members().any(|member| !member.is_alive());
            match self.volume_of(volume).flush().await {
                Ok(()) => {}
                // Who wrote to it, and flushed, was told. The others are closed as if it were not there.
                Err(error) if has_lost_a_device => {
                    tracing::warn!(%error, "a volume that has lost a device is closed as it is");
                }
                Err(error) => flushed = flushed.and(Err(error)),
            }
        }
        flushed?;
        for volume in core.volumes() {
            let logs: Vec<_> = volume.logs.borrow().values().cloned().collect();
            for log in logs {
                core.advance(volume.id, &log).await?;
            }
        }
        for _ in 0..2 {
            core.clean_idle().await?;
        }
        core.change(|_| Ok::<(), Refused>(())).await?;
        Ok(())
    }

    /// Takes a device in that was out of service, or missing: its members catch up.
    ///
    /// # Errors
    /// It is not a device of this pool, or fails.
    pub async fn readmit(&self, id: DeviceId, name: &str, device: Rc<D>) -> Result<(), PoolError> {
        cover!("pool: a device returns");
        let disk = Rc::new(Disk::new(id, name, Some(Rc::clone(&device))));
        self.0.readmit_holder(id, &device).await?;
        self.0.format_activity_log(&disk).await?;
        self.0.set_disk(Rc::clone(&disk));
        let name = name.to_owned();
        self.0
            .change(|config| {
                let found = config.devices.iter_mut().find(|device| device.id == id);
                let Some(device) = found else {
                    return Err(PoolError::Unknown(format!("device {name}")));
                };
                if !device.is_holder() {
                    device.state = DeviceState::Active;
                }
                device.name.clone_from(&name);
                Ok(())
            })
            .await?;
        // The maps have the old, dead device.
        self.0.renew_maps();
        self.0.tell(Event::DeviceAdded { device: name });
        self.heal().await
    }
}

/// Everything but one copy of a volume is to be made anew.
fn doubt(volume: &mut model::Volume) {
    for section in &mut volume.sections {
        for column in &mut section.columns {
            let good = column
                .members
                .iter()
                .position(|member| member.state == MemberState::InSync);
            for (index, member) in column.members.iter_mut().enumerate() {
                if good.is_some() && Some(index) != good {
                    member.state = MemberState::Filling { cursor: 0 };
                }
            }
        }
    }
    if !volume.sections.iter().any(|section| {
        section.columns.iter().any(|column| {
            column
                .members
                .iter()
                .any(|member| matches!(member.state, MemberState::Stale { .. }))
        })
    }) {
        volume.bitmap_generation = 0;
    }
}
