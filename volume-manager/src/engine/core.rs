//! The owner of an open pool's state: configuration, devices, volumes; everything that changes them goes through here.
//!
//! One change at a time: a new configuration is computed from the present one, made durable on the devices, and then
//! published: volumes that it changes get a new map. A device that fails, in I/O or in a change, is taken out of the
//! configuration ([`degrade`](super::degrade)) before anything that depends on it is acknowledged.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{BlockDevice, Clock, IoCause, IoError, Operation, cover};

use super::degrade::degrade;
use super::disk::Disk;
use super::event::Event;
use super::fill::settle;
use super::job::{Control, Levels};
use super::keep::Releasing;
use super::map::Map;
use super::ranges::Ranges;
use super::tasks::is_whole;
use super::volume::VolumeCore;
use crate::logs::hot::HotRegions;
use crate::model::{Configuration, DeviceId, Extent, JobId, VolumeId};
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
    pub(super) changing: Ranges,
    /// Held by who adds a device: its number is nobody's before the configuration has it.
    pub(super) adding: Ranges,
    /// Why nothing may be written any more.
    stopped: RefCell<Option<Refused>>,
    /// Extents that belong to nobody by the configuration, but are in use still or already.
    reserved: RefCell<BTreeMap<u64, Vec<Extent>>>,
    next_reservation: Cell<u64>,
    /// Running jobs.
    pub(crate) controls: RefCell<BTreeMap<JobId, Rc<Control>>>,
    /// Who of them is at work.
    pub(crate) levels: Rc<Levels>,
    /// Jobs do nothing yet: see [`OpenOptions`](super::pool::OpenOptions).
    pub(crate) jobs_wait: Cell<bool>,
    /// How often devices were taken out of service.
    pub(crate) failures: Cell<u64>,
    /// Background tasks that have not ended.
    tasks: Cell<u32>,
    /// The pool is being closed: jobs stop.
    pub(crate) closing: Cell<bool>,
    events: RefCell<VecDeque<Event>>,
    /// Rung when there is an event.
    bell: RefCell<Option<Box<dyn Fn()>>>,
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
            adding: Ranges::default(),
            stopped: RefCell::default(),
            reserved: RefCell::default(),
            next_reservation: Cell::new(0),
            controls: RefCell::default(),
            levels: Rc::default(),
            jobs_wait: Cell::new(false),
            failures: Cell::new(0),
            tasks: Cell::new(0),
            closing: Cell::new(false),
            events: RefCell::default(),
            bell: RefCell::default(),
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
        drop(events);
        if let Some(ring) = &*self.bell.borrow() {
            ring();
        }
    }

    pub(crate) fn set_bell(&self, ring: Box<dyn Fn()>) {
        *self.bell.borrow_mut() = Some(ring);
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
    pub(super) async fn commit(&self, next: Configuration) -> Result<Vec<Rc<Map<D>>>, Refused> {
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
        self.fail_because(disks, "a request failed").await
    }

    /// The same, for another reason than that a request failed.
    pub(crate) async fn fail_because(&self, disks: &[Rc<Disk<D>>], reason: &str) -> Result<(), Refused> {
        for disk in disks.iter().filter(|disk| disk.is_alive()) {
            self.tell(Event::DeviceFailed {
                device: disk.name.to_string(),
                reason: reason.into(),
            });
            disk.kill();
        }
        let _turn = self.changing.hold(0, 1).await;
        self.reconcile().await
    }

    /// Devices that are dead but not faulty by the configuration.
    pub(super) fn newly_dead(&self) -> BTreeSet<DeviceId> {
        let config = self.config();
        let holders = config.devices.iter().filter(|device| device.is_holder());
        holders
            .map(|device| device.id)
            .filter(|id| !self.disk(*id).is_alive())
            .collect()
    }

    /// Brings the configuration in line with the devices that are dead. The turn is held.
    pub(super) async fn reconcile(&self) -> Result<(), Refused> {
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
            let before = config;
            self.commit(next).await?;
            let config = self.config();
            self.tell_degraded(&before, &config);
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

    /// Says which volumes miss copies or parity that had all of them before.
    fn tell_degraded(&self, before: &Configuration, now: &Configuration) {
        for volume in &now.volumes {
            let was_whole = before.volume(volume.id).is_some_and(|old| is_whole(before, old));
            if was_whole && !is_whole(now, volume) {
                self.tell(Event::VolumeDegraded {
                    volume: volume.name.clone(),
                });
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
                read_policy: crate::model::ReadPolicy::Balanced,
            });
        }
        config
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
}
