//! The SCSI adapter of a machine, and the disks that sit on it.
//!
//! All SCSI disks of a machine are logical units of one virtio-scsi adapter, images of the host and disks of the pool alike. A disk of
//! the pool belongs to the pool's worker, an image to none: so the pool's worker serves the queues if there is a pool, and workers of
//! the adapter's own if there is none. No request goes from one thread to another.
//!
//! ```text
//!   opener (any thread): opens the disk ─► ScsiDisk ─► main loop: ScsiBus::plug ─► unit on the adapter ─► event to the guest
//!   main loop: ScsiBus::detach ─► event to the guest ─► it writes its cache ─► unit goes ─► last command ends ─► ScsiBus::collect
//! ```
//!
//! The bus stays over reboots, as the devices do; the adapter itself is a device like any other.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::{
    ByteSize, DeviceId, DeviceState, DiskConfig, DiskStatus, EventKind, EventLog, Problem, ProblemKind,
    ScsiAccess, ScsiPlace,
};
use block_io::{Geometry, HostDevice, WorkerHandle};
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::scsi::{
    Identity, PortGroup, PortState, Provisioning, ReservationStore, TransportId, Unit, UnitOptions,
    VendorCommands,
};
use storage_virtualizer::virtio_scsi::{
    AddUnitError, FoundUnit, RemovedUnit, VirtioScsi, VirtioScsiError, VirtioScsiHandle, VirtioScsiOptions,
    relative_port,
};
use storage_virtualizer::{Counters, DiskHandle, Either};
use virtio_core::VirtioDevice;

use super::settings::DiskSetting;

/// How long a guest that was told of a removal may take to write its cache, before the disk goes.
pub const SCSI_FAREWELL: Duration = Duration::from_secs(3);
/// The same if nothing of the disk can be in a cache: until the guest has noticed.
pub const SHORT_SCSI_FAREWELL: Duration = Duration::from_millis(300);

/// A disk of a machine's SCSI adapter: an image of the host, or `P` of a pool.
pub type ScsiUnitDisk<P> = Either<Arc<HostDevice>, P>;

/// The adapter's logical units, whatever the disks are.
pub trait ScsiUnits: Send + Sync + fmt::Debug {
    /// Adds a logical unit on an image ([`VirtioScsiHandle::add`]).
    ///
    /// # Errors
    /// It cannot have this place.
    fn add_image(
        &self,
        place: ScsiPlace,
        unit: Arc<Unit>,
        image: Arc<HostDevice>,
        controls: Arc<DiskControls>,
        found: Option<FoundUnit>,
    ) -> Result<(), AddUnitError>;

    /// [`VirtioScsiHandle::announce_removal`].
    fn announce_removal(&self, place: ScsiPlace) -> bool;

    /// [`VirtioScsiHandle::remove`].
    fn remove(&self, place: ScsiPlace) -> Option<RemovedUnit>;

    /// [`VirtioScsiHandle::size_changed`].
    fn size_changed(&self, place: ScsiPlace);

    /// [`VirtioScsiHandle::size`].
    fn size(&self, place: ScsiPlace) -> Option<u64>;

    /// [`VirtioScsiHandle::is_found`].
    fn is_found(&self, place: ScsiPlace) -> bool;

    /// [`VirtioScsiHandle::counters`].
    fn counters(&self) -> Vec<Counters>;
}

impl<P: DiskHandle> ScsiUnits for VirtioScsiHandle<ScsiUnitDisk<P>> {
    fn add_image(
        &self,
        place: ScsiPlace,
        unit: Arc<Unit>,
        image: Arc<HostDevice>,
        controls: Arc<DiskControls>,
        found: Option<FoundUnit>,
    ) -> Result<(), AddUnitError> {
        self.add(place, unit, Either::First(image), controls, found)
    }

    fn announce_removal(&self, (target, lun): ScsiPlace) -> bool {
        self.announce_removal(target, lun)
    }

    fn remove(&self, (target, lun): ScsiPlace) -> Option<RemovedUnit> {
        self.remove(target, lun)
    }

    fn size_changed(&self, (target, lun): ScsiPlace) {
        self.size_changed(target, lun);
    }

    fn size(&self, (target, lun): ScsiPlace) -> Option<u64> {
        self.size(target, lun)
    }

    fn is_found(&self, (target, lun): ScsiPlace) -> bool {
        self.is_found(target, lun)
    }

    fn counters(&self) -> Vec<Counters> {
        self.counters()
    }
}

/// A SCSI adapter.
pub struct ScsiAdapter {
    /// For the guest.
    pub device: Box<dyn VirtioDevice>,
    /// For us.
    pub units: Arc<dyn ScsiUnits>,
}

/// Makes an adapter for images and disks `P` of a pool, whose queues `workers` serve. Disks of the pool are added by the handle.
///
/// # Errors
/// The options are impossible.
pub fn scsi_adapter<P: DiskHandle>(
    options: &VirtioScsiOptions,
    workers: Vec<WorkerHandle>,
) -> Result<(ScsiAdapter, VirtioScsiHandle<ScsiUnitDisk<P>>), VirtioScsiError> {
    let device = VirtioScsi::<ScsiUnitDisk<P>>::new(options, workers)?;
    let handle = device.handle();
    let adapter = ScsiAdapter {
        device: Box::new(device),
        units: Arc::new(handle.clone()),
    };
    Ok((adapter, handle))
}

/// Adds a disk of the pool to the adapter as a logical unit.
pub type AddPoolUnit = Box<
    dyn Fn(ScsiPlace, Arc<Unit>, Arc<DiskControls>, Option<FoundUnit>) -> Result<(), AddUnitError>
        + Send
        + Sync,
>;

/// Says once who is to be told of each new size.
pub type OnResize = Box<dyn FnOnce(Box<dyn Fn() + Send>) + Send>;

/// A disk of the pool that is to be a logical unit.
pub struct PoolUnit {
    /// Its names; the serial number is chosen by the machine's configuration.
    pub uuid: [u8; 16],
    /// Size and blocks.
    pub geometry: Geometry,
    /// Keeps its persistent reservations.
    pub store: Option<Arc<dyn ReservationStore>>,
    /// What was kept of them.
    pub reservations: Vec<u8>,
    /// Adds it to the adapter.
    pub add: AddPoolUnit,
    /// Says who is to be told of a new size, once the disk's handle knows it.
    pub on_resize: OnResize,
    /// Dropped when the guest has the disk no more: the disk is then closed, as at power-off.
    pub guard: Box<dyn Send>,
}

/// What a SCSI disk lies on.
pub(super) enum ScsiSource {
    /// An image, and its path.
    Image(Arc<HostDevice>, String),
    /// A disk of the pool.
    Pool(PoolUnit),
}

/// A SCSI disk that is open and has no place yet.
pub(super) struct ScsiDisk {
    pub(super) setting: Arc<DiskSetting>,
    pub(super) source: ScsiSource,
}

impl ScsiDisk {
    pub(super) fn geometry(&self) -> Geometry {
        match &self.source {
            ScsiSource::Image(image, _) => block_io::BlockDevice::geometry(&**image),
            ScsiSource::Pool(disk) => disk.geometry,
        }
    }
}

/// A disk on the adapter.
struct Plugged {
    id: DeviceId,
    setting: Arc<DiskSetting>,
    unit: Arc<Unit>,
    places: Vec<ScsiPlace>,
    leaving: Option<Leaving>,
    /// Dropped at last.
    guard: Option<Box<dyn Send>>,
}

/// How far a disk's removal is.
enum Leaving {
    /// The guest was told, and may write its cache until then; it had written it so often before.
    Told { until: Instant, before: u64 },
    /// It is gone from the adapter; commands may still be in flight.
    Removed(Vec<RemovedUnit>),
}

#[derive(Default)]
struct Inner {
    units: Option<Arc<dyn ScsiUnits>>,
    disks: Vec<Plugged>,
}

/// The adapter's disks.
pub(super) struct ScsiBus {
    events: Arc<EventLog>,
    /// Who does vendor-specific commands of all units.
    vendor: Option<Arc<dyn VendorCommands>>,
    inner: Mutex<Inner>,
}

impl fmt::Debug for ScsiBus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        let disks: Vec<_> = inner.disks.iter().map(|disk| &disk.id).collect();
        formatter.debug_tuple("ScsiBus").field(&disks).finish()
    }
}

impl ScsiBus {
    pub(super) fn new(events: Arc<EventLog>, vendor: Option<Arc<dyn VendorCommands>>) -> Self {
        Self {
            events,
            vendor,
            inner: Mutex::default(),
        }
    }

    /// Each change of what is locked is complete at every point where its holder could panic.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the adapter by `make`, unless there is one. What else `make` made is returned.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn adapter<T, E>(
        &self,
        make: impl FnOnce() -> Result<(Arc<dyn ScsiUnits>, T), E>,
    ) -> Result<Option<T>, E> {
        let mut inner = self.lock();
        if inner.units.is_some() {
            return Ok(None);
        }
        let (units, made) = make()?;
        inner.units = Some(units);
        Ok(Some(made))
    }

    pub(super) fn has(&self, id: &DeviceId) -> bool {
        self.lock().disks.iter().any(|disk| disk.id == *id)
    }

    /// Puts a disk on the adapter; a guest that is there is told. It gets the places that its configuration says, or free ones.
    ///
    /// # Errors
    /// Its name or a place is taken, or there is no adapter.
    pub(super) fn plug(&self, disk: ScsiDisk) -> Result<DiskStatus, Problem> {
        let mut inner = self.lock();
        let mut config = disk.setting.config();
        let id = config.id.clone();
        let conflict = |text: String| Problem::new(ProblemKind::Conflict, text).about(&id);
        let Some(units) = inner.units.clone() else {
            return Err(conflict("the VM has no SCSI adapter".to_owned()));
        };
        if inner.disks.iter().any(|other| other.id == id) {
            let text = format!("the VM has a device `{id}` already");
            return Err(conflict(text).remedy("choose another id"));
        }
        let taken = inner.disks.iter().flat_map(|disk| disk.places.iter().copied());
        let mut taken: BTreeSet<ScsiPlace> = taken.collect();
        config
            .take_places(&mut taken)
            .map_err(|(key, error)| conflict(format!("cannot attach `{id}`: {key}: {error}")))?;
        let unit = Arc::new(unit_of(&config, &disk, self.vendor.clone())?);
        let places = config.places();
        let (events, name) = (Arc::clone(&self.events), id.clone());
        let found: FoundUnit = Arc::new(move || {
            events.record(EventKind::DeviceActive { id: name.clone() });
        });
        let add = |place: ScsiPlace| {
            let found = (Some(&place) == places.first()).then(|| Arc::clone(&found));
            let (unit, controls) = (Arc::clone(&unit), Arc::clone(disk.setting.controls()));
            match &disk.source {
                ScsiSource::Image(image, _) => {
                    units.add_image(place, unit, Arc::clone(image), controls, found)
                }
                ScsiSource::Pool(pool) => (pool.add)(place, unit, controls, found),
            }
        };
        for (number, place) in places.iter().enumerate() {
            if let Err(error) = add(*place) {
                for place in places.iter().take(number) {
                    units.remove(*place);
                }
                return Err(conflict(format!("cannot attach `{id}`: {error}")));
            }
        }
        let size = disk.geometry().size;
        let guard = match disk.source {
            ScsiSource::Image(..) => None,
            ScsiSource::Pool(PoolUnit { on_resize, guard, .. }) => {
                let places = places.clone();
                on_resize(Box::new(move || {
                    places.iter().for_each(|place| units.size_changed(*place));
                }));
                Some(guard)
            }
        };
        disk.setting.place(&config);
        inner.disks.push(Plugged {
            id,
            setting: Arc::clone(&disk.setting),
            unit,
            places,
            leaving: None,
            guard,
        });
        Ok(DiskStatus {
            config,
            state: DeviceState::Attached,
            size: ByteSize::from_bytes(size),
            stopped: None,
        })
    }

    /// Begins to take a disk away: tells the guest, which may write its cache first. False if there is no such disk.
    pub(super) fn detach(&self, id: &DeviceId) -> bool {
        let mut inner = self.lock();
        let Some(units) = inner.units.clone() else {
            return false;
        };
        let Some(disk) = inner.disks.iter_mut().find(|disk| disk.id == *id) else {
            return false;
        };
        if disk.leaving.is_none() {
            let is_used = disk.places.iter().any(|place| units.is_found(*place));
            let mut is_told = false;
            for place in &disk.places {
                is_told |= units.announce_removal(*place);
            }
            let now = Instant::now();
            let until = match is_told && is_used {
                true if disk.setting.config().read_only => now + SHORT_SCSI_FAREWELL,
                true => now + SCSI_FAREWELL,
                false => now,
            };
            let before = disk.unit.synchronizations();
            disk.leaving = Some(Leaving::Told { until, before });
        }
        true
    }

    /// Whether a disk is being taken away.
    pub(super) fn is_draining(&self) -> bool {
        self.lock().disks.iter().any(|disk| disk.leaving.is_some())
    }

    /// Goes on with taking disks away; returns those that are gone.
    pub(super) fn collect(&self) -> Vec<DeviceId> {
        let mut inner = self.lock();
        let Some(units) = inner.units.clone() else {
            return Vec::new();
        };
        for disk in &mut inner.disks {
            if let Some(Leaving::Told { until, before }) = disk.leaving
                && (Instant::now() >= until || disk.unit.synchronizations() > before)
            {
                let removed = disk.places.iter().filter_map(|place| units.remove(*place));
                disk.leaving = Some(Leaving::Removed(removed.collect()));
            }
        }
        let gone = |disk: &mut Plugged| match &disk.leaving {
            Some(Leaving::Removed(units)) => units.iter().all(RemovedUnit::is_idle),
            _ => false,
        };
        let gone: Vec<Plugged> = inner.disks.extract_if(.., gone).collect();
        drop(inner);
        gone.into_iter()
            .map(|Plugged { id, guard, .. }| {
                drop(guard);
                id
            })
            .collect()
    }

    /// What the adapter's queues have done; none if there is no adapter.
    pub(super) fn counters(&self) -> Vec<Counters> {
        let units = self.lock().units.clone();
        units.map(|units| units.counters()).unwrap_or_default()
    }

    /// The status of all disks.
    pub(super) fn disks(&self) -> Vec<DiskStatus> {
        let inner = self.lock();
        let Some(units) = &inner.units else {
            return Vec::new();
        };
        let status = |disk: &Plugged| DiskStatus {
            config: disk.setting.config(),
            state: match &disk.leaving {
                Some(_) => DeviceState::Removing,
                None if disk.places.iter().any(|place| units.is_found(*place)) => DeviceState::Active,
                None => DeviceState::Attached,
            },
            size: ByteSize::from_bytes(
                disk.places
                    .first()
                    .and_then(|place| units.size(*place))
                    .unwrap_or(0),
            ),
            stopped: disk.setting.stopped(),
        };
        inner.disks.iter().map(status).collect()
    }

    /// Lets go of the adapter and of all disks: the machine has ended or never begins, or the guest has ejected the adapter. Returns the
    /// disks' names.
    pub(super) fn close(&self) -> Vec<DeviceId> {
        let Inner { units, disks } = std::mem::take(&mut *self.lock());
        let Some(units) = units else { return Vec::new() };
        for place in disks.iter().flat_map(|disk| &disk.places) {
            units.remove(*place);
        }
        disks.into_iter().map(|disk| disk.id).collect()
    }
}

impl Drop for ScsiBus {
    fn drop(&mut self) {
        self.close();
    }
}

/// The name of a machine's end of its adapter: what persistent reservations know it by.
pub fn scsi_initiator(machine: &str) -> TransportId {
    let name = format!("smsvmm adapter of {machine}");
    TransportId::sas(u64::from_be_bytes(Identity::from_name(&name, "").naa()))
}

fn unit_of(
    config: &DiskConfig,
    disk: &ScsiDisk,
    vendor: Option<Arc<dyn VendorCommands>>,
) -> Result<Unit, Problem> {
    match &disk.source {
        ScsiSource::Image(_, path) => {
            let identity = Identity::from_name(path, &super::disk::serial(config));
            // Zeroes may have to be written to it one by one.
            let thin = Provisioning::Thin;
            Ok(new_unit(config, disk.geometry(), identity, thin, None, vendor))
        }
        ScsiSource::Pool(pool) => pool_unit(
            config,
            &ScsiBacking {
                uuid: pool.uuid,
                geometry: pool.geometry,
                store: pool.store.clone(),
                reservations: &pool.reservations,
            },
            vendor,
        ),
    }
}

/// A disk of a pool as a logical unit needs to know it.
pub struct ScsiBacking<'a> {
    /// Its names; the serial number is chosen by the machine's configuration.
    pub uuid: [u8; 16],
    /// Size and blocks.
    pub geometry: Geometry,
    /// Keeps its persistent reservations.
    pub store: Option<Arc<dyn ReservationStore>>,
    /// What was kept of them.
    pub reservations: &'a [u8],
}

/// The logical unit that `config` wants on a disk of a pool; `vendor` does its vendor-specific commands.
///
/// # Errors
/// What was kept of persistent reservations cannot be used.
pub fn pool_unit(
    config: &DiskConfig,
    disk: &ScsiBacking<'_>,
    vendor: Option<Arc<dyn VendorCommands>>,
) -> Result<Unit, Problem> {
    let identity = Identity {
        product: "DISK".to_owned(),
        serial: super::disk::serial(config),
        uuid: disk.uuid,
    };
    let thin = Provisioning::ThinZeroes;
    let unit = new_unit(config, disk.geometry, identity, thin, disk.store.clone(), vendor);
    unit.restore_reservations(disk.reservations).map_err(|error| {
        let id = &config.id;
        let text = format!("cannot attach `{id}`: {error}");
        Problem::new(ProblemKind::Host, text).about(id)
    })?;
    Ok(unit)
}

/// `thin`: how it is provisioned if blocks can be given back.
fn new_unit(
    config: &DiskConfig,
    geometry: Geometry,
    identity: Identity,
    thin: Provisioning,
    store: Option<Arc<dyn ReservationStore>>,
    vendor: Option<Arc<dyn VendorCommands>>,
) -> Unit {
    Unit::new(UnitOptions {
        read_only: geometry.read_only,
        provisioning: match geometry.discard_granularity {
            0 => Provisioning::Full,
            _ => thin,
        },
        port_groups: port_groups(config),
        store,
        vendor,
        ..UnitOptions::new(identity)
    })
}

/// A group for each way to a disk that has several.
fn port_groups(config: &DiskConfig) -> Vec<PortGroup> {
    if config.paths.is_empty() {
        return Vec::new();
    }
    let own = (config.target.unwrap_or(0), config.access);
    let others = config.paths.iter().map(|path| (path.target, path.access));
    let group = |(number, (target, access)): (usize, (u8, ScsiAccess))| PortGroup {
        id: relative_port(target),
        state: match access {
            ScsiAccess::Optimized => PortState::Optimized,
            ScsiAccess::NonOptimized => PortState::NonOptimized,
            ScsiAccess::Standby => PortState::Standby,
            ScsiAccess::Unavailable => PortState::Unavailable,
        },
        preferred: number == 0,
        ports: vec![relative_port(target)],
    };
    std::iter::once(own)
        .chain(others)
        .enumerate()
        .map(group)
        .collect()
}
