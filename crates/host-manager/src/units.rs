//! SCSI disks of machines' processes: one adapter for each machine, and the disks on it.
//!
//! ```text
//!   a machine's process ── POST /v1/attachments ───► the disk is opened, and becomes a unit of the machine's adapter
//!                       ◄── 101, size, found ──────   the connection says how it is; its end is that of the use, as of any disk
//!                       ── POST /v1/scsi-adapters ──► vhost-user-scsi: the queues of the adapter
//! ```
//!
//! The disks come before the queues, those of a machine that goes on as well as those of one that starts: a guest never finds a unit missing
//! that it knows. So the adapter is there as long as one of these connections is, and a service that ends closes the queues first.
//!
//! A machine says that it is done with a disk ([`UnitOrder::End`]), or that its guest shall let it go ([`UnitOrder::Detach`]). A connection
//! that ends without a word leaves the disk as a crash does, like that of any other disk.

use std::fmt;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use api::{
    AdapterConfig, AdapterRequest, DeviceId, DiskConfig, EventKind, EventLog, Problem, ProblemKind,
    ScsiPlace, Transfer, UnitNews, UnitOrder, VmName,
};
use expanded_target::{ExpandedTarget, Hook, Running};
use rustix::net::SendFlags;
use storage_manager::{DiskGuard, HostedDisk, HostedPool};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::scsi::{Unit, VendorCommands};
use storage_virtualizer::vhost_user::serve_scsi;
use storage_virtualizer::virtio_scsi::{FoundUnit, RemovedUnit, VirtioScsi, VirtioScsiOptions};
use vmm::machine::{SCSI_FAREWELL, SHORT_SCSI_FAREWELL, ScsiBacking, pool_unit, scsi_initiator};

use crate::disks::{AdapterSession, Disk, DiskService, Phase, Shared, has_hung_up, invalid, leave_later};
use crate::places::{Place, Wait, closing};
use crate::principal::Principal;

/// Between two looks whether the last command of a disk has ended, or a guest has written its cache.
const LOOK: Duration = Duration::from_millis(2);

/// The SCSI adapter of a machine.
pub(crate) struct Adapter {
    pool: String,
    config: AdapterConfig,
    device: VirtioScsi<Disk>,
    /// Disks that are units of it.
    units: AtomicU32,
    /// What happens to its disks, for its guest.
    events: Arc<EventLog>,
    vendor: Option<Arc<dyn VendorCommands>>,
    _running: Option<Running>,
}

impl fmt::Debug for Adapter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Adapter")
            .field("pool", &self.pool)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    fn new(
        shared: &Arc<Shared>,
        vm: &VmName,
        (pool_name, pool): (&str, &Arc<HostedPool>),
        config: &AdapterConfig,
    ) -> Result<Self, Problem> {
        let host = |what: &str, error: &dyn fmt::Display| {
            Problem::new(ProblemKind::Host, format!("{what}: {error}")).about(vm)
        };
        let options = VirtioScsiOptions {
            initiator: scsi_initiator(vm.as_str()),
            queues: config.queues.into(),
            queue_size: config.queue_size.get(),
            last_target: config.targets.saturating_sub(1),
        };
        let device = VirtioScsi::new(&options, vec![pool.worker().clone()])
            .map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()).about("adapter"))?;
        let events = Arc::new(EventLog::new());
        let (mut vendor, mut running) = (None, None);
        if config.expanded_api.enabled {
            let principal = Principal::new(shared, vm, (pool_name, pool), &events);
            let target = ExpandedTarget::new(vm.clone(), config.expanded_api.clone());
            let hook = || Box::new(|| Ok(())) as Hook;
            let started = target.start(Arc::new(principal), hook);
            running = Some(started.map_err(|error| host("cannot start the guest's expanded API", &error))?);
            vendor = Some(Arc::new(target) as Arc<dyn VendorCommands>);
        }
        Ok(Self {
            pool: pool_name.to_owned(),
            config: config.clone(),
            device,
            units: AtomicU32::new(0),
            events,
            vendor,
            _running: running,
        })
    }

    /// Whether a machine that wants this can have it.
    fn is(&self, pool: &str, config: &AdapterConfig) -> bool {
        let shape = |config: &AdapterConfig| (config.queues, config.queue_size, config.targets);
        self.pool == pool && shape(&self.config) == shape(config)
    }
}

impl Shared {
    /// The adapter of a machine, which is made if there is none. An older process of the machine may have another one, which is waited for.
    fn adapter(
        self: &Arc<Self>,
        vm: &VmName,
        (pool_name, pool): (&str, &Arc<HostedPool>),
        config: &AdapterConfig,
    ) -> Result<Arc<Adapter>, Problem> {
        let wait = Wait::default();
        let mut state = self.state();
        loop {
            if state.closing {
                return Err(closing());
            }
            let seat = state.adapters.entry(vm.clone()).or_default();
            match seat.adapter.upgrade() {
                Some(adapter) if adapter.is(pool_name, config) => return Ok(adapter),
                Some(other) => {
                    let text = format!(
                        "machine `{vm}` has SCSI disks of pool {} on an adapter with {} queues for {} targets",
                        other.pool, other.config.queues, other.config.targets
                    );
                    let refusal = Problem::new(ProblemKind::Conflict, text).about(vm);
                    let refusal = refusal.remedy("all of them are on one adapter, and of one pool");
                    // It may be the last one that has it.
                    drop(other);
                    wait.patience(false, refusal)?;
                }
                None => {
                    let made = Arc::new(Adapter::new(self, vm, (pool_name, pool), config)?);
                    seat.adapter = Arc::downgrade(&made);
                    return Ok(made);
                }
            }
            state = self.wait(state);
        }
    }

    /// Nobody has an adapter of this machine any more.
    fn forget_adapter(&self, vm: &VmName) {
        let mut state = self.state();
        let is_over = |seat: &crate::disks::Seat| {
            seat.adapter.strong_count() == 0 && matches!(seat.session, AdapterSession::None)
        };
        if state.adapters.get(vm).is_some_and(is_over) {
            state.adapters.remove(vm);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Where a disk's connection is told of it.
#[derive(Default)]
struct Line {
    socket: Mutex<Option<UnixStream>>,
}

impl Line {
    /// Never waits: who does not read does not learn.
    fn tell(&self, news: UnitNews) {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = &*socket {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            // It may be closed already.
            let _ = rustix::net::send(socket, &news.encode(), flags);
        }
    }

    fn connect(&self, socket: Option<UnixStream>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }
}

/// Why a disk stops being a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goes {
    /// Its machine is done with it.
    Released,
    /// Somebody died, or this service ends.
    Left,
}

/// A disk that is a unit of its machine's adapter.
struct OpenUnit {
    adapter: Arc<Adapter>,
    places: Vec<ScsiPlace>,
    unit: Arc<Unit>,
    line: Arc<Line>,
    read_only: bool,
    disk: Option<Disk>,
    /// Goes after all that has the disk.
    guard: Option<DiskGuard>,
    place: Option<Place>,
}

impl DiskService {
    /// A disk that is open becomes a unit of its machine's adapter.
    pub(crate) fn attach_unit(
        &self,
        (pool_name, pool): (&str, &Arc<HostedPool>),
        (config, adapter): (&DiskConfig, &AdapterConfig),
        controls: Arc<DiskControls>,
        (disk, place): (HostedDisk, Place),
    ) -> Result<Transfer, Problem> {
        let (vm, id) = place.key().clone();
        let adapter = self.shared().adapter(&vm, (pool_name, pool), adapter)?;
        let handle = disk.handle().clone();
        let backing = ScsiBacking {
            uuid: disk.uuid(),
            geometry: handle.geometry(),
            store: disk.reservation_store(),
            reservations: disk.reservations(),
        };
        let unit = Arc::new(pool_unit(config, &backing, adapter.vendor.clone())?);
        let line = Arc::<Line>::default();
        let mut open = OpenUnit {
            read_only: backing.geometry.read_only,
            places: Vec::new(),
            unit: Arc::clone(&unit),
            line: Arc::clone(&line),
            disk: Some(handle.clone()),
            guard: None,
            place: Some(place),
            adapter: Arc::clone(&adapter),
        };
        let resized = disk.resize_hook();
        open.guard = Some(disk.into_guard());
        adapter.units.fetch_add(1, Ordering::Relaxed);
        for (number, place) in config.places().into_iter().enumerate() {
            let found = (number == 0).then(|| open.found(&id));
            let (unit, controls) = (Arc::clone(&unit), Arc::clone(&controls));
            let added = adapter
                .device
                .handle()
                .add(place, unit, handle.clone(), controls, found);
            added.map_err(|error| {
                let text = format!("cannot attach `{id}`: {error}");
                Problem::new(ProblemKind::Conflict, text).about(&id)
            })?;
            open.places.push(place);
        }
        if let Some(place) = &open.place {
            place.set_phase(Phase::Unit(handle.clone()));
        }
        let (told, places, seen) = (adapter.device.handle(), open.places.clone(), handle);
        resized.tell(move || {
            let places = places.iter();
            places.for_each(|(target, lun)| told.size_changed(*target, *lun));
            line.tell(UnitNews::Size(seen.geometry().size));
        });
        adapter.events.record(EventKind::DeviceAttached { id });
        Ok(Box::new(move |socket| open.serve(socket)))
    }

    /// Serves the queues of a machine's SCSI adapter, at the connection that what is returned is given, until the front-end has gone.
    ///
    /// Waits up to ten seconds for another process of the same machine.
    ///
    /// # Errors
    /// Not all disks are there that the machine has, or another process has the adapter.
    pub fn attach_adapter(
        &self,
        pool_name: &str,
        pool: &Arc<HostedPool>,
        request: &AdapterRequest,
    ) -> Result<Transfer, Problem> {
        let vm = &request.vm;
        check(&request.adapter)?;
        let seat = self.shared().take_seat(vm)?;
        let adapter = self.shared().adapter(vm, (pool_name, pool), &request.adapter)?;
        let there = adapter.units.load(Ordering::Relaxed);
        if there < request.disks {
            let text = format!(
                "machine `{vm}` has {} SCSI disks, and only {there} of them are asked for",
                request.disks
            );
            return Err(Problem::new(ProblemKind::Conflict, text).about(vm));
        }
        let memory_stays = request.memory_stays;
        Ok(Box::new(move |socket| {
            if seat.begin(&socket) {
                serve_scsi(socket, &adapter.device, memory_stays);
                seat.set(AdapterSession::Ending);
            }
            drop(adapter);
            drop(seat);
        }))
    }
}

/// Whether an adapter can be as `config` says.
pub(crate) fn check(config: &AdapterConfig) -> Result<(), Problem> {
    if config.queues == 0 || config.queues > DiskConfig::MAX_QUEUES || config.targets == 0 {
        let text = format!(
            "must have 1 to {} queues, and at least one target",
            DiskConfig::MAX_QUEUES
        );
        return Err(invalid(("adapter", api::InvalidValue::new(text))));
    }
    config.expanded_api.check().map_err(invalid)
}

impl Shared {
    /// Takes the queues of a machine's adapter, when no other process has them any more.
    fn take_seat(self: &Arc<Self>, vm: &VmName) -> Result<SeatTaken, Problem> {
        let wait = Wait::default();
        let mut state = self.state();
        loop {
            if state.closing {
                return Err(closing());
            }
            let seat = state.adapters.entry(vm.clone()).or_default();
            let alive = match &seat.session {
                AdapterSession::None => break,
                AdapterSession::Served(socket) => !has_hung_up(socket),
                AdapterSession::Opening | AdapterSession::Ending => false,
            };
            let text = format!("the SCSI adapter of machine `{vm}` is in use by another process of it");
            wait.patience(alive, Problem::new(ProblemKind::Conflict, text).about(vm))?;
            state = self.wait(state);
        }
        state.adapters.entry(vm.clone()).or_default().session = AdapterSession::Opening;
        Ok(SeatTaken {
            shared: Arc::clone(self),
            vm: vm.clone(),
        })
    }
}

/// The queues of a machine's adapter, which others can have when this is dropped.
struct SeatTaken {
    shared: Arc<Shared>,
    vm: VmName,
}

impl SeatTaken {
    fn set(&self, session: AdapterSession) {
        if let Some(seat) = self.shared.state().adapters.get_mut(&self.vm) {
            seat.session = session;
        }
        self.shared.changed.notify_all();
    }

    /// They are served from now on, unless the service ends.
    fn begin(&self, socket: &UnixStream) -> bool {
        let kept = match socket.try_clone() {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(%error, "a machine cannot be given its SCSI disks");
                return false;
            }
        };
        let mut state = self.shared.state();
        let goes_on = !state.closing;
        if let Some(seat) = state.adapters.get_mut(&self.vm).filter(|_| goes_on) {
            seat.session = AdapterSession::Served(kept);
        }
        goes_on
    }
}

impl Drop for SeatTaken {
    fn drop(&mut self) {
        self.set(AdapterSession::None);
        self.shared.forget_adapter(&self.vm);
    }
}

impl OpenUnit {
    /// What is to be done when the guest has found the disk. Called on a worker.
    fn found(&self, id: &DeviceId) -> FoundUnit {
        let (line, events, id) = (
            Arc::clone(&self.line),
            Arc::clone(&self.adapter.events),
            id.clone(),
        );
        Arc::new(move || {
            line.tell(UnitNews::Found);
            events.record(EventKind::DeviceActive { id: id.clone() });
        })
    }

    fn serve(mut self, socket: UnixStream) {
        let (Some(place), Some(disk)) = (&self.place, &self.disk) else {
            return;
        };
        let (kept, line) = match (socket.try_clone(), socket.try_clone()) {
            (Ok(kept), Ok(line)) => (kept, line),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "a machine cannot be given its disk");
                return;
            }
        };
        self.line.connect(Some(line));
        self.line.tell(UnitNews::Size(disk.geometry().size));
        if !place.begin(Phase::Served {
            socket: kept,
            disk: disk.clone(),
            handle: None,
        }) {
            return;
        }
        place.tell(|vm, id, file| EventKind::DiskAttached { vm, id, file });
        let goes = self.listen(&socket);
        self.end(goes);
        if let Some(place) = &self.place {
            place.tell(|vm, id, file| EventKind::DiskDetached { vm, id, file });
        }
    }

    /// Does what the machine says, until the use is over.
    fn listen(&self, mut socket: &UnixStream) -> Goes {
        let mut byte = [0];
        loop {
            match socket.read(&mut byte) {
                Ok(1) => match UnitOrder::decode(byte[0]) {
                    Some(UnitOrder::End) => return Goes::Released,
                    Some(UnitOrder::Detach) => {
                        self.say_farewell(socket);
                        return Goes::Released;
                    }
                    // It does not speak as it should.
                    None => return Goes::Left,
                },
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                _ => return Goes::Left,
            }
        }
    }

    /// Tells the guest that the disk goes, and lets it write its cache.
    fn say_farewell(&self, socket: &UnixStream) {
        let adapter = self.adapter.device.handle();
        let places = || self.places.iter().copied();
        let is_used = places().any(|(target, lun)| adapter.is_found(target, lun));
        let is_told = places().fold(false, |told, (target, lun)| {
            adapter.announce_removal(target, lun) || told
        });
        if !is_used || !is_told {
            return;
        }
        let patience = match self.read_only {
            true => SHORT_SCSI_FAREWELL,
            false => SCSI_FAREWELL,
        };
        let (begin, before) = (Instant::now(), self.unit.synchronizations());
        while begin.elapsed() < patience && self.unit.synchronizations() == before && !has_hung_up(socket) {
            thread::sleep(LOOK);
        }
    }

    /// It is no unit any more, and the disk is closed.
    fn end(&mut self, goes: Goes) {
        let adapter = self.adapter.device.handle();
        let places = std::mem::take(&mut self.places).into_iter();
        let removed: Vec<RemovedUnit> = places
            .filter_map(|(target, lun)| adapter.remove(target, lun))
            .collect();
        while !removed.iter().all(RemovedUnit::is_idle) {
            thread::sleep(LOOK);
        }
        self.line.connect(None);
        self.adapter.units.fetch_sub(1, Ordering::Relaxed);
        self.disk = None;
        let mut goes_on = goes == Goes::Left;
        if let Some(place) = &self.place {
            place.set_phase(Phase::Ending);
            goes_on |= place.is_closing();
        }
        if let Some(guard) = self.guard.take() {
            match goes_on {
                true => guard.leave(),
                false => guard.close(),
            }
        }
        if let Some(place) = &self.place {
            let id = place.key().1.clone();
            self.adapter.events.record(EventKind::DeviceRemoved { id });
        }
    }
}

impl Drop for OpenUnit {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            // It was never served: nothing of it is in flight, and nobody has said that he is done with it.
            let adapter = self.adapter.device.handle();
            for (target, lun) in std::mem::take(&mut self.places) {
                adapter.remove(target, lun);
            }
            self.adapter.units.fetch_sub(1, Ordering::Relaxed);
            self.disk = None;
            if let Some(place) = &self.place {
                place.set_phase(Phase::Ending);
            }
            leave_later(guard, self.place.take());
        }
    }
}
