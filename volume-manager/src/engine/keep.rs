//! The logs of an open pool: what becomes hot, what detached members miss, what the parity logs hold, and what has to happen
//! when a device under one of them fails.
//!
//! A log never gives up on its own: it says which device failed, [`Core::fail`] takes that device out of the configuration, and what
//! needed the log is tried again.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::rc::Rc;

use block_io::{BlockDevice, Clock, IoError, Operation, cover};

use super::core::{Core, Refused};
use super::degrade::log_devices;
use super::disk::Disk;
use super::join::{self, Boxed};
use super::map::Map;
use super::volume::VolumeCore;
use crate::logs::activity::ActivityLog;
use crate::logs::bitmap::Bitmap;
use crate::logs::hot::{Guard, Release};
use crate::logs::parity::{ParityLog, Piece, Ticket};
use crate::logs::{LogCopy, LogError, bitmap};
use crate::model::{BLOCK, Configuration, DeviceId, Extent, MemberState, VolumeId};
use crate::place::{place_bitmap, volume_log_devices};

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Core<D, C> {
    /// Has the logs of a volume do without a device that the configuration does not name any more.
    pub(super) fn drop_copies(&self, volume: &VolumeCore<D>, device: DeviceId) {
        if let Some(bitmap) = volume.bitmap.borrow().as_ref() {
            bitmap.remove_copy(device);
        }
        let map = volume.map();
        for section in &map.volume.sections {
            if section.log.iter().all(|copy| copy.device != device)
                && let Some(log) = volume.logs.borrow().get(&section.id)
            {
                log.remove_copy(device);
            }
        }
    }

    /// While a pool is being opened: what was replayed is missed by detached members, too.
    pub(crate) async fn note_replayed(
        &self,
        volume: &Rc<VolumeCore<D>>,
        regions: &BTreeSet<u32>,
    ) -> Result<(), Refused> {
        let end = self::regions(&volume.map().volume);
        let regions: Vec<u32> = regions
            .iter()
            .copied()
            .take_while(|region| *region < end)
            .collect();
        self.mark_changed(volume, &regions).await
    }

    /// Moves the tail of a parity log as far as it goes.
    pub(crate) async fn advance(&self, volume: VolumeId, log: &ParityLog<D>) -> Result<(), Refused> {
        let mut tried = None;
        loop {
            let before = self.config().epoch;
            match log.advance(&async || self.flush_members(volume).await).await {
                Ok(()) => return Ok(()),
                Err(error) => self.log_failed(error, before, &mut tried).await?,
            }
        }
    }

    /// Lets regions leave the activity logs that nobody has written lately.
    pub(crate) async fn clean_idle(&self) -> Result<(), Refused> {
        let mut tried = None;
        loop {
            let before = self.config().epoch;
            match self.hot.clean_idle(&Releasing(self)).await {
                Ok(_) => return Ok(()),
                Err(error) => self.log_failed(error, before, &mut tried).await?,
            }
        }
    }

    /// Gives a device an empty activity log.
    pub(crate) async fn format_activity_log(&self, disk: &Disk<D>) -> Result<(), LogError> {
        let Some(io) = disk.io() else { return Ok(()) };
        let place = crate::format::LOG_OFFSET;
        let log = ActivityLog::format(disk.id, Rc::clone(io), place, self.config().pool).await?;
        self.hot.add_log(log);
        Ok(())
    }

    /// Uses the best devices for a volume's logs again, after a member came into sync.
    pub(crate) async fn adopt_log_devices(self: &Rc<Self>, id: VolumeId) -> Result<(), Refused> {
        // Most volumes of a large pool need nothing, and should not cost a look at all others.
        self.check()?;
        let config = self.config();
        if config
            .volume(id)
            .is_none_or(|volume| better_log_devices(&config, volume).is_none())
        {
            return Ok(());
        }
        let _turn = self.changing.hold(0, 1).await;
        self.reconcile().await?;
        let config = self.config();
        let Some(volume) = config.volume(id) else {
            return Ok(());
        };
        match better_log_devices(&config, volume) {
            Some((wanted, moves_bitmap)) => self.use_log_devices(volume, wanted, moves_bitmap).await,
            None => Ok(()),
        }
    }

    /// Before a volume without redundancy gets some: devices for its logs. The volume does not need them yet.
    pub(crate) async fn first_log_devices(
        self: &Rc<Self>,
        id: VolumeId,
        wanted: Vec<DeviceId>,
    ) -> Result<(), Refused> {
        let _turn = self.changing.hold(0, 1).await;
        self.reconcile().await?;
        let config = self.config();
        let Some(volume) = config.volume(id) else {
            return Ok(());
        };
        self.use_log_devices(volume, wanted, true).await
    }

    /// The turn is held.
    pub(super) async fn use_log_devices(
        &self,
        volume: &crate::model::Volume,
        wanted: Vec<DeviceId>,
        moves_bitmap: bool,
    ) -> Result<(), Refused> {
        cover!("core: other log devices for a volume");
        let id = volume.id;
        let both: Vec<DeviceId> = volume.log_devices.iter().chain(&wanted).copied().collect();
        if !self.hot.knows(id) {
            drop(self.hot.add_volume(id, &wanted));
        } else if !both.is_empty()
            && self
                .hot
                .set_log_devices(id, &both, &Releasing(self))
                .await
                .is_err()
        {
            // They are an improvement, no need: what failed shows itself where it matters.
            return Ok(());
        }
        let mut bitmap = wanted.is_empty().then(Vec::new);
        if moves_bitmap && !wanted.is_empty() {
            let length = bitmap_length(volume);
            // Without a bitmap, who is detached starts from nothing.
            let placed = place_bitmap(&self.placing(), &[], &wanted, length).unwrap_or_default();
            bitmap = Some(placed);
        }
        let made = match &bitmap {
            Some(copies) if !copies.is_empty() => self.make_bitmap(volume, copies).await,
            _ => None,
        };
        if made.is_none()
            && let Some(copies) = &mut bitmap
        {
            copies.clear();
        }
        let mut next = Configuration::clone(&self.config());
        next.epoch += 1;
        let bitmap_moves = bitmap.is_some();
        if let Some(volume) = next.volume_mut(id) {
            volume.log_devices.clone_from(&wanted);
            volume.bitmap = bitmap.unwrap_or_else(|| std::mem::take(&mut volume.bitmap));
        }
        let moved = bitmap_moves;
        self.commit(next).await?;
        if let (true, Some(runtime)) = (moved, self.volume(id)) {
            *runtime.bitmap.borrow_mut() = made;
            runtime.generation.set(0);
        }
        if !wanted.is_empty() {
            drop(self.hot.set_log_devices(id, &wanted, &Releasing(self)).await);
        }
        self.reconcile().await
    }

    /// Empty copies of a bitmap; none if a device fails.
    pub(super) async fn make_bitmap(
        &self,
        volume: &crate::model::Volume,
        copies: &[Extent],
    ) -> Option<Rc<Bitmap<D>>> {
        let there = self.copies(copies);
        let length = copies.iter().map(|copy| copy.length).min()?;
        let made = Bitmap::format(there, length, regions(volume)).await;
        made.map_err(|error| tracing::warn!(%error, volume = volume.name, "no bitmap for the volume"))
            .ok()
            .map(Rc::new)
    }

    /// Copies of a log or bitmap, as far as their devices are in service.
    pub(crate) fn copies(&self, extents: &[Extent]) -> Vec<LogCopy<D>> {
        let there = extents.iter().filter_map(|extent| {
            let disk = self.disk(extent.device);
            let device = Rc::clone(disk.io().filter(|_| disk.is_alive())?);
            Some(LogCopy {
                id: extent.device,
                device,
                start: extent.start,
            })
        });
        there.collect()
    }

    pub(super) fn kill_log(&self, error: &LogError) {
        if let LogError::Device { device, .. } = error {
            self.disk(*device).kill();
        }
    }

    /// Volumes whose first member was detached just now: what is hot counts as changed since. The turn is held.
    pub(super) async fn cover_detached(&self) -> Result<(), Refused> {
        for volume in self.volumes() {
            let map = volume.map();
            let model = &map.volume;
            if model.bitmap_generation == 0 {
                continue;
            }
            if volume.covered.get() == model.bitmap_generation {
                continue;
            }
            let Some(bitmap) = self.bitmap_of(&volume) else {
                continue;
            };
            let regions = self.uncertain(&volume, &map);
            let generation = model.bitmap_generation;
            drop(map);
            match bitmap.set(&regions).await {
                Ok(()) => volume.covered.set(generation),
                // It is taken out of the configuration in the next round.
                Err(LogError::Device { device, .. }) => self.disk(device).kill(),
                Err(error) => return Err(Refused::because("cannot note what detached members miss", &error)),
            }
        }
        Ok(())
    }

    /// The bitmap of a volume with detached members.
    pub(super) fn bitmap_of(&self, volume: &VolumeCore<D>) -> Option<Rc<Bitmap<D>>> {
        let generation = volume.map().volume.bitmap_generation;
        let bitmap = volume.bitmap.borrow().clone().filter(|_| generation != 0)?;
        if volume.generation.replace(generation) != generation {
            bitmap.begin(generation);
        }
        Some(bitmap)
    }

    /// Regions in which a device that is lost now may lack what was acknowledged.
    pub(super) fn uncertain(&self, volume: &VolumeCore<D>, map: &Map<D>) -> Vec<u32> {
        let mut regions: BTreeSet<u32> = self.hot.regions(volume.id).into_iter().collect();
        regions.extend(volume.unclean.borrow().keys());
        for section in &map.sections {
            let log = volume.logs.borrow().get(&section.id).cloned();
            for row in log.iter().flat_map(|log| log.live_rows()) {
                let bytes = section.shape.row_bytes();
                regions.extend(volume.regions(section.start + row * bytes, bytes));
            }
        }
        // A volume that was cut leaves hot regions behind its end.
        let end = self::regions(&map.volume);
        regions.into_iter().take_while(|region| *region < end).collect()
    }

    /// Makes durable that detached members miss what is written to some regions from now on.
    pub(crate) async fn mark_changed(
        &self,
        volume: &Rc<VolumeCore<D>>,
        regions: &[u32],
    ) -> Result<(), Refused> {
        let mut tried = None;
        loop {
            let Some(bitmap) = self.bitmap_of(volume) else {
                return Ok(());
            };
            let before = self.config().epoch;
            match bitmap.set(regions).await {
                Ok(()) => return Ok(()),
                Err(error) => self.log_failed(error, before, &mut tried).await?,
            }
        }
    }

    /// A log failed: takes its device out of service; then what needed it may be tried again. `before`: the epoch of the
    /// configuration with which it was begun, as another one may have taken the device out of service meanwhile. `tried`: which
    /// device had failed the last time, and with which configuration: a log whose last copy is lost keeps it, and fails again.
    async fn log_failed(
        &self,
        error: LogError,
        before: u64,
        tried: &mut Option<(DeviceId, u64)>,
    ) -> Result<(), Refused> {
        match error {
            LogError::Device { device, .. } if *tried == Some((device, before)) => {
                cover!("core: the last copy of a log is lost");
                Err(Refused::because("all copies of a log are lost", &error))
            }
            LogError::Device { device, .. } => {
                cover!("core: a log device failed");
                *tried = Some((device, before));
                self.fail(&[self.disk(device)]).await
            }
            _ if !self.newly_dead().is_empty() => {
                cover!("core: a device failed when regions were to leave the log");
                self.fail(&[]).await
            }
            LogError::Flush { .. } | LogError::Release { .. } if self.config().epoch != before => {
                cover!("core: another one took out of service what failed");
                self.check()
            }
            other => Err(Refused::because("the logs of the pool do not work", &other)),
        }
    }

    /// Waits until the regions are hot.
    pub(crate) async fn acquire(
        &self,
        volume: VolumeId,
        regions: RangeInclusive<u32>,
    ) -> Result<Guard, Refused> {
        if let Some(guard) = self.hot.try_acquire(volume, regions.clone()) {
            return Ok(guard);
        }
        let mut tried = None;
        loop {
            let before = self.config().epoch;
            match self.hot.acquire(volume, regions.clone(), &Releasing(self)).await {
                Ok(guard) => return Ok(guard),
                Err(error) => self.log_failed(error, before, &mut tried).await?,
            }
        }
    }

    /// Appends to a parity log; makes room in it if it must.
    pub(crate) async fn append(
        &self,
        volume: &Rc<VolumeCore<D>>,
        log: &ParityLog<D>,
        row: u64,
        pieces: &[Piece<'_>],
    ) -> Result<Ticket, Refused> {
        let mut tried = None;
        loop {
            let before = self.config().epoch;
            match log
                .append(row, pieces, &async || self.flush_members(volume.id).await)
                .await
            {
                Ok(ticket) => return Ok(ticket),
                Err(error) => self.log_failed(error, before, &mut tried).await?,
            }
            self.check()?;
        }
    }

    /// Flushes the devices of a volume's members that are in sync. An error means that one of them has to be taken out of
    /// service first.
    pub(crate) async fn flush_members(&self, volume: VolumeId) -> Result<(), IoError> {
        let Some(volume) = self.volume(volume) else {
            return Ok(());
        };
        let map = volume.map();
        let mut disks: Vec<Rc<Disk<D>>> = Vec::new();
        for member in map
            .members()
            .filter(|member| member.state == MemberState::InSync || member.is_alive())
        {
            for disk in member.disks() {
                let known = disks.iter().any(|other| other.id == disk.id);
                let faulty = self
                    .config()
                    .device(disk.id)
                    .is_none_or(|device| !device.is_holder());
                if !known && !faulty {
                    disks.push(Rc::clone(disk));
                }
            }
        }
        drop(map);
        let flushes = disks.iter().map(|disk| -> Boxed<'_, Result<(), IoError>> {
            Box::pin(async move {
                if !disk.is_alive() {
                    return Err(disk.gone(Operation::Flush, 0, 0));
                }
                let flushed = disk.flush(&self.clock).await;
                if flushed.is_err() {
                    disk.kill();
                }
                flushed
            })
        });
        join::all(flushes.collect()).await.into_iter().collect()
    }
}

/// Regions of a volume.
pub(crate) fn regions(volume: &crate::model::Volume) -> u32 {
    u32::try_from(volume.size.div_ceil(volume.region)).unwrap_or(u32::MAX)
}

/// Bytes of a copy of a volume's bitmap.
pub(crate) fn bitmap_length(volume: &crate::model::Volume) -> u64 {
    bitmap::length(regions(volume)).next_multiple_of(BLOCK)
}

/// What has to happen before the logs forget something.
pub(crate) struct Releasing<'a, D, C>(pub(crate) &'a Core<D, C>);

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Release for Releasing<'_, D, C> {
    async fn release(&self, volume: VolumeId, regions: &[u32]) -> Result<(), IoError> {
        self.0.flush_members(volume).await?;
        let Some(core) = self.0.volume(volume) else {
            return Ok(());
        };
        match self.0.bitmap_of(&core) {
            None => Ok(()),
            Some(bitmap) => {
                let end = self::regions(&core.map().volume);
                let regions: Vec<u32> = regions.iter().copied().filter(|region| *region < end).collect();
                let set = bitmap.set(&regions).await;
                set.map_err(|error| {
                    let refused = Refused::because("bitmap", &error);
                    IoError::new(&core.name, Operation::Write, 0, 0, refused)
                })
            }
        }
    }
}

/// The devices that a volume's logs should be on, and whether its bitmap has to move; none if all is as it should be.
fn better_log_devices(
    config: &Configuration,
    volume: &crate::model::Volume,
) -> Option<(Vec<DeviceId>, bool)> {
    let is_faulty = |id: &DeviceId| config.device(*id).is_some_and(|device| !device.is_holder());
    let best = volume_log_devices(volume);
    let wanted = if best.iter().any(is_faulty) {
        let faulty: BTreeSet<DeviceId> = config
            .devices
            .iter()
            .filter(|device| !device.is_holder())
            .map(|device| device.id)
            .collect();
        log_devices(volume, &faulty)
    } else {
        best
    };
    let length = bitmap_length(volume);
    let fits = volume.bitmap.len() == wanted.len()
        && wanted.iter().all(|id| {
            let mut copies = volume.bitmap.iter();
            copies.any(|copy| copy.device == *id && copy.length >= length)
        });
    let moves_bitmap = volume.bitmap_generation == 0 && !fits;
    (wanted != volume.log_devices || moves_bitmap).then_some((wanted, moves_bitmap))
}
