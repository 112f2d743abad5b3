//! What the queues of an adapter share: its targets with their logical units, and the ways between the queues.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::config::{Sizes, feature};
use super::events::{Event, Events};
use super::tasks::{Concern, Inbox, Sweep};
use crate::controls::DiskControls;
use crate::disk_handle::DiskHandle;
use crate::queue::{Control, QueueStatistics};
use crate::scsi::{Found, Lun, Nexus, Target, TargetError, TransportId, Unit, Visible, encode_lun};

/// Who wants to know that a driver has found a unit. Called on a worker: must not wait.
pub type FoundUnit = Arc<dyn Fn() + Send + Sync>;

/// The disk of a logical unit.
pub(super) struct UnitDisk<H> {
    disk: H,
    controls: Arc<DiskControls>,
    found: Option<FoundUnit>,
    /// Something was sent to it since the adapter was reset.
    is_found: AtomicBool,
    /// The driver was told that it goes.
    goes: AtomicBool,
}

impl<H> UnitDisk<H> {
    pub(super) fn new(disk: H, controls: Arc<DiskControls>, found: Option<FoundUnit>) -> Self {
        Self {
            disk,
            controls,
            found,
            is_found: AtomicBool::new(false),
            goes: AtomicBool::new(false),
        }
    }

    pub(super) fn disk(&self) -> &H {
        &self.disk
    }

    pub(super) fn controls(&self) -> &Arc<DiskControls> {
        &self.controls
    }

    /// Something is sent to it.
    pub(super) fn is_addressed(&self) {
        if !self.is_found.swap(true, Ordering::Relaxed)
            && let Some(found) = &self.found
        {
            found();
        }
    }
}

/// A logical unit that was removed: its disk is used until the last of its commands has ended.
pub struct RemovedUnit(pub(super) Box<dyn Fn() -> bool + Send + Sync>);

impl RemovedUnit {
    /// Whether nothing uses the disk any more.
    pub fn is_idle(&self) -> bool {
        (self.0)()
    }
}

impl fmt::Debug for RemovedUnit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RemovedUnit")
            .field("is_idle", &self.is_idle())
            .finish()
    }
}

/// A target with the way to it: the driver's port is the initiator.
pub(super) struct Port<H> {
    target: Target<UnitDisk<H>>,
    nexus: Arc<Nexus>,
}

impl<H> Port<H> {
    fn new(initiator: &TransportId, target: u8) -> Self {
        let port = Self {
            target: Target::default(),
            nexus: Arc::new(Nexus::new(initiator.clone(), relative_port(target))),
        };
        port.target.connect(&port.nexus, Visible::All);
        port
    }

    pub(super) fn nexus(&self) -> &Arc<Nexus> {
        &self.nexus
    }

    /// The unit that an adapter-wide address means on this target.
    pub(super) fn find(&self, address: [u8; 8]) -> Found<UnitDisk<H>> {
        let [_, _, high, low, ..] = address;
        self.target.find(&self.nexus, [high, low, 0, 0, 0, 0, 0, 0])
    }

    pub(super) fn reset_nexus(&self) {
        self.target.reset_nexus(&self.nexus);
    }
}

/// The relative target port identifier of a target's port (SPC-4 §3.1.120): of target 0 it is 1.
pub fn relative_port(target: u8) -> u16 {
    u16::from(target) + 1
}

/// How a request queue is told of task management.
#[derive(Default)]
struct Way {
    inbox: Inbox,
    /// Its server, if it has one.
    server: Mutex<Option<Arc<Control>>>,
}

/// Whose commands a function concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Those of the driver that asks for it.
    Own,
    /// Those of all initiators.
    Group,
}

/// Adapters that have the same logical units at the same places: several machines with the same disks. A function that concerns a unit
/// concerns the commands of all of them; the reset of one adapter concerns it alone.
pub struct ScsiGroup<H>(Arc<Mutex<Vec<Weak<Adapter<H>>>>>);

impl<H> Default for ScsiGroup<H> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<H> Clone for ScsiGroup<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H> fmt::Debug for ScsiGroup<H> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let adapters = lock(&self.0).len();
        formatter.debug_tuple("ScsiGroup").field(&adapters).finish()
    }
}

impl<H> ScsiGroup<H> {
    pub(super) fn join(&self, adapter: &Arc<Adapter<H>>) {
        let mut adapters = lock(&self.0);
        adapters.retain(|other| other.strong_count() > 0);
        adapters.push(Arc::downgrade(adapter));
    }

    fn members(&self) -> Vec<Arc<Adapter<H>>> {
        lock(&self.0).iter().filter_map(Weak::upgrade).collect()
    }
}

/// The adapter without its queues.
pub(super) struct Adapter<H> {
    initiator: TransportId,
    group: Option<ScsiGroup<H>>,
    ports: RwLock<BTreeMap<u8, Arc<Port<H>>>>,
    generation: AtomicU64,
    pub(super) sizes: Sizes,
    pub(super) events: Arc<Events>,
    event_server: Mutex<Option<Arc<Control>>>,
    /// What the driver has negotiated.
    features: AtomicU64,
    ways: Vec<Way>,
    pub(super) statistics: Vec<Arc<QueueStatistics>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adapter-wide address of a logical unit in an event (virtio 1.2 §5.6.6.1). The LUN is as REPORT LUNS has it, peripheral below 256 and flat
/// above: Linux takes these bytes for the number by which it knows the unit.
pub(super) fn address(target: u8, lun: u16) -> [u8; 8] {
    let [high, low, ..] = encode_lun(lun);
    [1, target, high, low, 0, 0, 0, 0]
}

impl<H: DiskHandle> Adapter<H> {
    /// The greatest number that a disk has ([`DiskHandle::continuity`]).
    pub(super) fn continuity(&self) -> u64 {
        let ports = self.all_ports();
        let luns = ports.iter().flat_map(|port| port.target.luns());
        let numbers = luns.map(|lun| lun.handle.disk().continuity());
        numbers.max().unwrap_or(0)
    }
}

impl<H> Adapter<H> {
    pub(super) fn new(initiator: TransportId, queues: u16, group: Option<ScsiGroup<H>>) -> Self {
        Self {
            initiator,
            group,
            ports: RwLock::default(),
            generation: AtomicU64::new(0),
            sizes: Sizes::default(),
            events: Arc::default(),
            event_server: Mutex::default(),
            features: AtomicU64::new(0),
            ways: (0..queues).map(|_| Way::default()).collect(),
            statistics: (0..queues).map(|_| Arc::default()).collect(),
        }
    }

    /// Changes after a unit was added or removed: what a queue remembers is good as long as this stays.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.ways.iter().for_each(|way| way.wake());
    }

    fn port(&self, target: u8) -> Option<Arc<Port<H>>> {
        let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner);
        ports.get(&target).cloned()
    }

    /// The target that an adapter-wide address means.
    pub(super) fn port_of(&self, address: [u8; 8]) -> Option<Arc<Port<H>>> {
        match address {
            [1, target, ..] => self.port(target),
            // The well-known units of the adapter (virtio 1.2 §5.6.6.1): those of its first target.
            [0xc1, 0x01, ..] => self.port(0),
            _ => None,
        }
    }

    /// Whether `lun` is still a unit of the adapter.
    pub(super) fn has(&self, lun: &Arc<Lun<UnitDisk<H>>>) -> bool {
        self.all_ports()
            .iter()
            .any(|port| port.target.luns().iter().any(|other| Arc::ptr_eq(other, lun)))
    }

    /// Adds a unit and tells the driver.
    pub(super) fn add(
        &self,
        target: u8,
        lun: u16,
        unit: Arc<Unit>,
        disk: UnitDisk<H>,
    ) -> Result<(), TargetError> {
        let port = {
            let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
            let port = ports
                .entry(target)
                .or_insert_with(|| Arc::new(Port::new(&self.initiator, target)));
            Arc::clone(port)
        };
        port.target.add(lun, unit, disk)?;
        self.changed();
        self.tell(target, lun, Event::Added);
        Ok(())
    }

    /// The unit of this place.
    pub(super) fn lun(&self, target: u8, lun: u16) -> Option<Arc<Lun<UnitDisk<H>>>> {
        let luns = self.port(target)?.target.luns();
        luns.into_iter().find(|other| other.number == lun)
    }

    /// Tells the driver that a unit is going to be removed. False if there is no driver that listens, or no such unit.
    pub(super) fn announce_removal(&self, target: u8, lun: u16) -> bool {
        let Some(found) = self.lun(target, lun) else {
            return false;
        };
        self.tell(target, lun, Event::Removed) && {
            found.handle.goes.store(true, Ordering::Relaxed);
            true
        }
    }

    /// Whether something was sent to a unit since the adapter was reset.
    pub(super) fn is_found(&self, target: u8, lun: u16) -> bool {
        let lun = self.lun(target, lun);
        lun.is_some_and(|lun| lun.handle.is_found.load(Ordering::Relaxed))
    }

    /// Removes a unit and tells the driver, if it does not know. Commands in flight end before its disk is let go of. None if there is
    /// no such unit.
    pub(super) fn remove(&self, target: u8, lun: u16) -> Option<Weak<Lun<UnitDisk<H>>>> {
        let port = self.port(target)?;
        let removed = port.target.remove(lun)?;
        if port.target.luns().is_empty() {
            let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
            ports.retain(|_, port| !port.target.luns().is_empty());
        }
        self.changed();
        if !removed.handle.goes.load(Ordering::Relaxed) {
            self.tell(target, lun, Event::Removed);
        }
        Some(Arc::downgrade(&removed))
    }

    /// The size of a unit's disk has changed.
    pub(super) fn size_changed(&self, target: u8, lun: u16) {
        let unit = self.lun(target, lun);
        if let Some(unit) = unit {
            unit.unit.capacity_changed();
            self.tell(target, lun, Event::Changed(0x2a, 0x09));
        }
    }

    /// Whether a driver listens.
    fn tell(&self, target: u8, lun: u16, event: Event) -> bool {
        let wanted = match event {
            Event::Added | Event::Removed => feature::HOTPLUG,
            Event::Changed(..) => feature::CHANGE,
        };
        if self.features.load(Ordering::Acquire) & wanted == 0 {
            return false;
        }
        self.events.push(address(target, lun), event);
        match &*lock(&self.event_server) {
            Some(server) => {
                server.wake();
                true
            }
            None => false,
        }
    }

    /// A driver is there that has chosen these features.
    pub(super) fn negotiated(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    /// The event queue is served; events may have waited for that.
    pub(super) fn serve_events(&self, server: Arc<Control>) {
        server.wake();
        *lock(&self.event_server) = Some(server);
    }

    /// Request queue `queue` is served.
    pub(super) fn serve(&self, queue: usize, server: Arc<Control>) {
        if let Some(way) = self.ways.get(queue) {
            *lock(&way.server) = Some(server);
        }
    }

    /// The driver has reset the adapter: as if power had gone and come (virtio 1.2 §5.6.5). What others use as well has only lost the way
    /// to this one.
    pub(super) fn reset(&self) {
        self.forget_driver();
        for port in self.all_ports() {
            match self.group {
                None => port.target.reset(),
                Some(_) => port.reset_nexus(),
            }
            for lun in port.target.luns() {
                lun.handle.is_found.store(false, Ordering::Relaxed);
            }
        }
    }

    /// There is no driver any more, and no queue is served.
    fn forget_driver(&self) {
        self.features.store(0, Ordering::Release);
        *lock(&self.event_server) = None;
        for way in &self.ways {
            *lock(&way.server) = None;
            // Nobody looks any more.
            way.inbox.take().iter().for_each(|sweep| sweep.done());
        }
        self.events.clear();
        self.sizes.reset();
    }

    fn all_ports(&self) -> Vec<Arc<Port<H>>> {
        let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner);
        ports.values().cloned().collect()
    }

    pub(super) fn inbox(&self, queue: usize) -> &Inbox {
        // Queues have numbers below what the adapter was made with.
        &self.ways[queue].inbox
    }

    /// Has the request queues of this adapter look for commands that a function concerns, or those of its whole group.
    pub(super) fn sweep(&self, concern: Concern, reach: Reach, ends: bool) -> Arc<Sweep> {
        let others = match (&self.group, reach) {
            (Some(group), Reach::Group) => group.members(),
            _ => Vec::new(),
        };
        let others = others
            .iter()
            .map(Arc::as_ref)
            .filter(|other| !std::ptr::eq(*other, self));
        let adapters: Vec<&Self> = std::iter::once(self).chain(others).collect();
        let ways = || adapters.iter().flat_map(|adapter| &adapter.ways);
        let sweep = Sweep::new(concern, ends, ways().count());
        for way in ways() {
            let server = lock(&way.server);
            match &*server {
                Some(server) if !server.is_done() => {
                    way.inbox.put(Arc::clone(&sweep));
                    server.wake();
                    if server.is_done() {
                        // It ended meanwhile, perhaps without a look.
                        way.inbox.take().iter().for_each(|sweep| sweep.done());
                    }
                }
                _ => sweep.done(),
            }
        }
        sweep
    }
}

impl Way {
    fn wake(&self) {
        if let Some(server) = &*lock(&self.server) {
            server.wake();
        }
    }
}

impl<H: DiskHandle> Adapter<H> {
    /// Number of request queues.
    pub(super) fn queues(&self) -> u16 {
        u16::try_from(self.ways.len()).unwrap_or(u16::MAX)
    }
}
