//! The owner of an open pool's state: configuration, devices, volumes; everything that changes them goes through here.
//!
//! One change at a time: a new configuration is computed from the present one, made durable on the devices, and then
//! published: volumes that it changes get a new map. A device that fails, in I/O or in a change, is taken out of the
//! configuration ([`degrade`](super::degrade)) before anything that depends on it is acknowledged.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{BlockDevice, Clock, IoCause, IoError, Operation, cover};

use super::degrade::{degrade, log_devices};
use super::disk::Disk;
use super::event::Event;
use super::fill::settle;
use super::job::Control;
use super::join::{self, Boxed};
use super::map::Map;
use super::ranges::Ranges;
use super::volume::VolumeCore;
use crate::logs::activity::ActivityLog;
use crate::logs::bitmap::Bitmap;
use crate::logs::hot::{Guard, HotRegions, Release};
use crate::logs::parity::{ParityLog, Piece, Ticket};
use crate::logs::{LogCopy, LogError, bitmap};
use crate::model::{BLOCK, Configuration, DeviceId, Extent, JobId, MemberState, VolumeId};
use crate::place::{place_bitmap, volume_log_devices};
use crate::store::{Store, format_device};

/// Why a pool takes no writes or changes.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub(crate) Arc<str>);

impl From<Refused> for IoCause {
    fn from(refused: Refused) -> Self {
        std::io::Error::other(refused).into()
    }
}

impl Refused {
    pub(crate) fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    pub(crate) fn because(what: &str, error: &dyn std::error::Error) -> Self {
        let mut text = format!("{what}: {error}");
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        Self(text.into())
    }
}

/// Events kept for who asks.
const EVENTS: usize = 1024;

/// An open pool.
pub(crate) struct Core<D, C> {
    pub(crate) clock: C,
    config: RefCell<Rc<Configuration>>,
    disks: RefCell<BTreeMap<DeviceId, Rc<Disk<D>>>>,
    volumes: RefCell<BTreeMap<VolumeId, Rc<VolumeCore<D>>>>,
    pub(crate) hot: HotRegions<D>,
    store: RefCell<Option<Store<D>>>,
    /// Held by who changes the configuration.
    changing: Ranges,
    /// Why nothing may be written any more.
    stopped: RefCell<Option<Refused>>,
    /// Extents that belong to nobody by the configuration, but are in use still or already.
    reserved: RefCell<BTreeMap<u64, Vec<Extent>>>,
    next_reservation: Cell<u64>,
    /// Running jobs.
    pub(crate) controls: RefCell<BTreeMap<JobId, Rc<Control>>>,
    /// How often devices were taken out of service.
    pub(crate) failures: Cell<u64>,
    /// Background tasks that have not ended.
    tasks: Cell<u32>,
    /// The pool is being closed: jobs stop.
    pub(crate) closing: Cell<bool>,
    events: RefCell<VecDeque<Event>>,
}

/// Extents that are kept until this is dropped.
pub(crate) struct Reserved<D, C> {
    core: Rc<Core<D, C>>,
    number: u64,
}

impl<D, C> Drop for Reserved<D, C> {
    fn drop(&mut self) {
        self.core.reserved.borrow_mut().remove(&self.number);
    }
}

/// A background task that has not ended.
pub(crate) struct Busy<D, C>(Rc<Core<D, C>>);

impl<D, C> Drop for Busy<D, C> {
    fn drop(&mut self) {
        self.0.tasks.set(self.0.tasks.get() - 1);
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Core<D, C> {
    pub(crate) fn new(
        clock: C,
        config: Configuration,
        disks: BTreeMap<DeviceId, Rc<Disk<D>>>,
        hot: HotRegions<D>,
        store: Store<D>,
    ) -> Rc<Self> {
        Rc::new(Self {
            clock,
            config: RefCell::new(Rc::new(config)),
            disks: RefCell::new(disks),
            volumes: RefCell::default(),
            hot,
            store: RefCell::new(Some(store)),
            changing: Ranges::default(),
            stopped: RefCell::default(),
            reserved: RefCell::default(),
            next_reservation: Cell::new(0),
            controls: RefCell::default(),
            failures: Cell::new(0),
            tasks: Cell::new(0),
            closing: Cell::new(false),
            events: RefCell::default(),
        })
    }

    pub(crate) fn config(&self) -> Rc<Configuration> {
        Rc::clone(&self.config.borrow())
    }

    /// The device, or one that is not there in its place.
    pub(crate) fn disk(&self, id: DeviceId) -> Rc<Disk<D>> {
        let found = self.disks.borrow().get(&id).cloned();
        found.unwrap_or_else(|| {
            let config = self.config();
            let name = config
                .device(id)
                .map_or_else(|| id.to_string(), |device| device.name.clone());
            Rc::new(Disk::new(id, &name, None))
        })
    }

    pub(crate) fn disks(&self) -> Vec<Rc<Disk<D>>> {
        self.disks.borrow().values().cloned().collect()
    }

    pub(crate) fn set_disk(&self, disk: Rc<Disk<D>>) {
        self.disks.borrow_mut().insert(disk.id, disk);
    }

    pub(crate) fn remove_disk(&self, id: DeviceId) {
        self.disks.borrow_mut().remove(&id);
    }

    pub(crate) fn volume(&self, id: VolumeId) -> Option<Rc<VolumeCore<D>>> {
        self.volumes.borrow().get(&id).cloned()
    }

    pub(crate) fn volumes(&self) -> Vec<Rc<VolumeCore<D>>> {
        self.volumes.borrow().values().cloned().collect()
    }

    pub(crate) fn add_volume(&self, volume: VolumeCore<D>) -> Rc<VolumeCore<D>> {
        let volume = Rc::new(volume);
        self.volumes.borrow_mut().insert(volume.id, Rc::clone(&volume));
        volume
    }

    pub(crate) fn map_of(&self, volume: &crate::model::Volume) -> Map<D> {
        Map::new(volume, &|id| self.disk(id))
    }

    /// Says something to whoever listens.
    pub(crate) fn tell(&self, event: Event) {
        event.log();
        let mut events = self.events.borrow_mut();
        if events.len() >= EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// What was told since this was asked last.
    pub(crate) fn take_events(&self) -> Vec<Event> {
        self.events.borrow_mut().drain(..).collect()
    }

    /// Counts a background task; the pool is not closed before it has ended.
    pub(crate) fn busy(self: &Rc<Self>) -> Busy<D, C> {
        self.tasks.set(self.tasks.get() + 1);
        Busy(Rc::clone(self))
    }

    pub(crate) fn tasks(&self) -> u32 {
        self.tasks.get()
    }

    /// Keeps extents from being given to somebody.
    pub(crate) fn reserve(self: &Rc<Self>, extents: Vec<Extent>) -> Reserved<D, C> {
        let number = self.next_reservation.get();
        self.next_reservation.set(number + 1);
        self.reserved.borrow_mut().insert(number, extents);
        Reserved {
            core: Rc::clone(self),
            number,
        }
    }

    /// All extents that are kept.
    pub(crate) fn reserved(&self) -> Vec<Extent> {
        self.reserved.borrow().values().flatten().copied().collect()
    }

    /// Nothing may be written any more.
    pub(crate) fn stop(&self, reason: Refused) {
        let mut stopped = self.stopped.borrow_mut();
        if stopped.is_none() {
            tracing::error!(%reason, "the pool takes no writes any more");
            *stopped = Some(reason);
        }
    }

    pub(crate) fn check(&self) -> Result<(), Refused> {
        match self.stopped.borrow().as_ref() {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    pub(crate) fn check_writable(
        &self,
        volume: &Arc<str>,
        operation: Operation,
        offset: u64,
        length: u64,
    ) -> Result<(), IoError> {
        if self.stopped.borrow().is_none() {
            return Ok(());
        }
        self.check()
            .map_err(|reason| IoError::new(volume, operation, offset, length, reason))
    }

    /// Waits until nobody uses a map that was replaced.
    pub(crate) async fn drained(&self, old: Rc<Map<D>>) {
        while Rc::strong_count(&old) > 1 {
            self.clock.sleep(Duration::from_micros(100)).await;
        }
    }

    /// Changes the configuration: durable when this returns. `change` gets a copy with the next epoch. The maps that were
    /// replaced are returned, for those who must know that nobody uses them any more.
    pub(crate) async fn change<T, E: From<Refused>>(
        self: &Rc<Self>,
        change: impl FnOnce(&mut Configuration) -> Result<T, E>,
    ) -> Result<(T, Vec<Rc<Map<D>>>), E> {
        let _turn = self.changing.hold(0, 1).await;
        // `change` sees only devices as healthy that are.
        self.reconcile().await?;
        let mut next = Configuration::clone(&self.config());
        next.epoch += 1;
        let value = change(&mut next)?;
        next.volumes.iter_mut().for_each(settle);
        let old = self.commit(next).await?;
        // A device that did not take it is out of service.
        self.reconcile().await?;
        Ok((value, old))
    }

    /// Makes `next` durable and publishes it. The turn is held.
    async fn commit(&self, next: Configuration) -> Result<Vec<Rc<Map<D>>>, Refused> {
        let Some(mut store) = self.store.borrow_mut().take() else {
            return Err(Refused::new("the pool is closed"));
        };
        let committed = store.commit(&next).await;
        *self.store.borrow_mut() = Some(store);
        match committed {
            Ok(committed) => {
                for (device, error) in committed.failed {
                    cover!("core: a device did not take a configuration");
                    self.tell(Event::DeviceFailed {
                        device: self.disk(device).name.to_string(),
                        reason: error.to_string(),
                    });
                    self.disk(device).kill();
                }
                Ok(self.publish(next))
            }
            Err(error) => {
                let refused = Refused::because("the pool's configuration cannot be made durable", &error);
                self.stop(refused.clone());
                Err(refused)
            }
        }
    }

    fn publish(&self, next: Configuration) -> Vec<Rc<Map<D>>> {
        let next = Rc::new(next);
        *self.config.borrow_mut() = Rc::clone(&next);
        let mut old = Vec::new();
        for volume in self.volumes() {
            match next.volume(volume.id) {
                Some(model) => {
                    if volume.map().volume != *model {
                        old.push(volume.set_map(self.map_of(model)));
                    }
                }
                None => {
                    self.volumes.borrow_mut().remove(&volume.id);
                    old.push(volume.map());
                }
            }
        }
        old
    }

    /// Takes devices out of service. Durable when this returns: what missed a write because of them is known to be stale.
    ///
    /// They are named by what requests went to: a device that has come back meanwhile is another [`Disk`].
    pub(crate) async fn fail(&self, disks: &[Rc<Disk<D>>]) -> Result<(), Refused> {
        for disk in disks.iter().filter(|disk| disk.is_alive()) {
            self.tell(Event::DeviceFailed {
                device: disk.name.to_string(),
                reason: "a request failed".into(),
            });
            disk.kill();
        }
        let _turn = self.changing.hold(0, 1).await;
        self.reconcile().await
    }

    /// Devices that are dead but not faulty by the configuration.
    fn newly_dead(&self) -> BTreeSet<DeviceId> {
        let config = self.config();
        let holders = config.devices.iter().filter(|device| device.is_holder());
        holders
            .map(|device| device.id)
            .filter(|id| !self.disk(*id).is_alive())
            .collect()
    }

    /// Brings the configuration in line with the devices that are dead. The turn is held.
    async fn reconcile(&self) -> Result<(), Refused> {
        loop {
            self.check()?;
            let dead = self.newly_dead();
            if dead.is_empty() {
                self.cover_detached().await?;
                if self.newly_dead().is_empty() {
                    return Ok(());
                }
                continue;
            }
            cover!("core: degraded");
            self.failures.set(self.failures.get() + 1);
            let config = self.config();
            let next = degrade(&config, &dead);
            // A log device that is new has to know what is hot before the configuration may count on it.
            for (old, new) in config.volumes.iter().zip(&next.volumes) {
                if new
                    .log_devices
                    .iter()
                    .any(|device| !old.log_devices.contains(device))
                {
                    let both: Vec<DeviceId> =
                        old.log_devices.iter().chain(&new.log_devices).copied().collect();
                    if let Err(error) = self.hot.set_log_devices(new.id, &both, &Releasing(self)).await {
                        self.kill_log(&error);
                    }
                }
            }
            if self.newly_dead() != dead {
                continue;
            }
            self.commit(next).await?;
            let config = self.config();
            for volume in &config.volumes {
                if !volume.log_devices.is_empty()
                    && let Err(error) = self
                        .hot
                        .set_log_devices(volume.id, &volume.log_devices, &Releasing(self))
                        .await
                {
                    self.kill_log(&error);
                }
            }
            for device in &dead {
                self.hot.remove_log(*device);
                for volume in self.volumes() {
                    self.drop_copies(&volume, *device);
                }
            }
        }
    }

    /// Has the logs of a volume do without a device that the configuration does not name any more.
    fn drop_copies(&self, volume: &VolumeCore<D>, device: DeviceId) {
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

    /// Publishes the first configuration of a new incarnation.
    pub(crate) async fn begin(&self, next: Configuration) -> Result<(), Refused> {
        let _turn = self.changing.hold(0, 1).await;
        let before = self.config();
        for (old, new) in before.volumes.iter().zip(&next.volumes) {
            if new
                .log_devices
                .iter()
                .any(|device| !old.log_devices.contains(device))
            {
                let both: Vec<DeviceId> = old.log_devices.iter().chain(&new.log_devices).copied().collect();
                if let Err(error) = self.hot.set_log_devices(new.id, &both, &Releasing(self)).await {
                    self.kill_log(&error);
                }
            }
        }
        self.commit(next).await?;
        for volume in &self.config().volumes {
            if !volume.log_devices.is_empty() {
                drop(
                    self.hot
                        .set_log_devices(volume.id, &volume.log_devices, &Releasing(self))
                        .await,
                );
            }
        }
        Ok(())
    }

    /// After an open: what the replayed rows say is missed by detached members, too, and what their bitmaps say is known.
    pub(crate) async fn note_replayed(
        &self,
        volume: &Rc<VolumeCore<D>>,
        regions: BTreeSet<u32>,
    ) -> Result<(), Refused> {
        let end = self::regions(&volume.map().volume);
        let regions: Vec<u32> = regions.into_iter().take_while(|region| *region < end).collect();
        self.mark_changed(volume, &regions).await
    }

    /// The configuration as placement has to see it: with everything that is reserved.
    pub(crate) fn placing(&self) -> Configuration {
        let mut config = Configuration::clone(&self.config());
        let reserved = self.reserved();
        if let (false, Some(last)) = (reserved.is_empty(), config.volumes.last_mut()) {
            last.bitmap.extend(reserved);
        } else if !reserved.is_empty() {
            config.volumes.push(crate::model::Volume {
                id: VolumeId(0),
                uuid: crate::model::Uuid(0),
                name: String::new(),
                size: 0,
                block: 512,
                attributes: crate::model::Attributes {
                    layout: crate::model::Layout::Concat,
                    stripe_unit: 0,
                    class: String::new(),
                    devices: Vec::new(),
                },
                region: 1,
                log_devices: Vec::new(),
                bitmap: reserved,
                bitmap_generation: 0,
                sections: Vec::new(),
                next_member: 0,
                next_section: 0,
            });
        }
        config
    }

    /// Moves the tail of a parity log as far as it goes.
    pub(crate) async fn advance(&self, volume: VolumeId, log: &ParityLog<D>) -> Result<(), Refused> {
        loop {
            match log.advance(&async || self.flush_members(volume).await).await {
                Ok(()) => return Ok(()),
                Err(error) => self.log_failed(error).await?,
            }
        }
    }

    /// Lets regions leave the activity logs that nobody has written lately.
    pub(crate) async fn clean_idle(&self) -> Result<(), Refused> {
        loop {
            match self.hot.clean_idle(&Releasing(self)).await {
                Ok(_) => return Ok(()),
                Err(error) => self.log_failed(error).await?,
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

    /// Uses the store while no configuration is being committed.
    async fn with_store<T>(&self, use_it: impl AsyncFnOnce(&mut Store<D>) -> T) -> Result<T, Refused> {
        let _turn = self.changing.hold(0, 1).await;
        let Some(mut store) = self.store.borrow_mut().take() else {
            return Err(Refused::new("the pool is closed"));
        };
        let result = use_it(&mut store).await;
        *self.store.borrow_mut() = Some(store);
        Ok(result)
    }

    /// Makes a blank device one of the pool, from the next configuration on.
    pub(crate) async fn add_holder(&self, device: &crate::model::Device, io: Rc<D>) -> Result<(), Refused> {
        let config = self.config();
        let label = format_device(&*io, device.uuid, config.pool, &config.name).await;
        let label =
            label.map_err(|error| Refused::because("the device cannot be made one of the pool", &error))?;
        self.with_store(async |store| store.add_device(device.id, io, label))
            .await
    }

    /// Lets go of a device that has left the pool.
    pub(crate) async fn forget_holder(&self, id: DeviceId) -> Result<(), Refused> {
        let removed = self.with_store(async |store| store.remove_device(id)).await?;
        removed
            .map(drop)
            .map_err(|error| Refused::because("the device cannot be let go", &error))
    }

    /// Lets a device hold the configuration again, from the next one on.
    pub(crate) async fn readmit_holder(&self, id: DeviceId, device: &Rc<D>) -> Result<(), Refused> {
        let readmitted = self
            .with_store(async |store| store.readmit(id, device).await)
            .await?;
        readmitted.map_err(|error| Refused::because("the device cannot be taken in again", &error))
    }

    /// Gives all volumes new maps, because devices were replaced under them.
    pub(crate) fn renew_maps(&self) {
        for volume in self.volumes() {
            let model = volume.map().volume.clone();
            drop(volume.set_map(self.map_of(&model)));
        }
    }

    /// Uses the best devices for a volume's logs again, after a member came into sync.
    pub(crate) async fn adopt_log_devices(self: &Rc<Self>, id: VolumeId) -> Result<(), Refused> {
        let _turn = self.changing.hold(0, 1).await;
        self.reconcile().await?;
        let config = self.config();
        let Some(volume) = config.volume(id) else {
            return Ok(());
        };
        let faulty: BTreeSet<DeviceId> = config
            .devices
            .iter()
            .filter(|device| !device.is_holder())
            .map(|device| device.id)
            .collect();
        let best = volume_log_devices(volume);
        let wanted = if best.iter().any(|device| faulty.contains(device)) {
            log_devices(volume, &faulty)
        } else {
            best
        };
        let length = bitmap_length(volume);
        let fits = volume.bitmap.len() == wanted.len()
            && wanted.iter().all(|id| {
                volume
                    .bitmap
                    .iter()
                    .any(|copy| copy.device == *id && copy.length >= length)
            });
        let moves_bitmap = volume.bitmap_generation == 0 && !fits;
        if wanted == volume.log_devices && !moves_bitmap {
            return Ok(());
        }
        self.use_log_devices(volume, wanted, moves_bitmap).await
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
    async fn use_log_devices(
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
    async fn make_bitmap(&self, volume: &crate::model::Volume, copies: &[Extent]) -> Option<Rc<Bitmap<D>>> {
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

    fn kill_log(&self, error: &LogError) {
        if let LogError::Device { device, .. } = error {
            self.disk(*device).kill();
        }
    }

    /// Volumes whose first member was detached just now: what is hot counts as changed since. The turn is held.
    async fn cover_detached(&self) -> Result<(), Refused> {
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
    fn bitmap_of(&self, volume: &VolumeCore<D>) -> Option<Rc<Bitmap<D>>> {
        let generation = volume.map().volume.bitmap_generation;
        let bitmap = volume.bitmap.borrow().clone().filter(|_| generation != 0)?;
        if volume.generation.replace(generation) != generation {
            bitmap.begin(generation);
        }
        Some(bitmap)
    }

    /// Regions in which a device that is lost now may lack what was acknowledged.
    fn uncertain(&self, volume: &VolumeCore<D>, map: &Map<D>) -> Vec<u32> {
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
        loop {
            let Some(bitmap) = self.bitmap_of(volume) else {
                return Ok(());
            };
            match bitmap.set(regions).await {
                Ok(()) => return Ok(()),
                Err(error) => self.log_failed(error).await?,
            }
        }
    }

    /// A log failed: takes its device out of service; then what needed it may be tried again.
    async fn log_failed(&self, error: LogError) -> Result<(), Refused> {
        match error {
            LogError::Device { device, .. } => {
                cover!("core: a log device failed");
                self.fail(&[self.disk(device)]).await
            }
            _ if !self.newly_dead().is_empty() => {
                cover!("core: a device failed when regions were to leave the log");
                self.fail(&[]).await
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
        loop {
            match self.hot.acquire(volume, regions.clone(), &Releasing(self)).await {
                Ok(guard) => return Ok(guard),
                Err(error) => self.log_failed(error).await?,
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
        loop {
            match log
                .append(row, pieces, &async || self.flush_members(volume.id).await)
                .await
            {
                Ok(ticket) => return Ok(ticket),
                Err(error) => self.log_failed(error).await?,
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
                bitmap.set(&regions).await.map_err(|error| {
                    IoError::new(
                        &core.name,
                        Operation::Write,
                        0,
                        0,
                        Refused::because("bitmap", &error),
                    )
                })
            }
        }
    }
}
