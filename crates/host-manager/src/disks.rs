//! Disks of pools for the processes of machines.
//!
//! ```text
//!   a machine's process ── POST /v1/attachments ──► attach(): the disk is opened, as its configuration wants it
//!                       ◄── 101 ───────────────────  the connection is vhost-user now, and this service the back-end
//!                       ── closes it, or dies ─────► what is in flight ends, the disk is closed
//! ```
//!
//! A disk is in use as long as its connection lives, and nothing else says so: there is no record that could be wrong after a crash. The
//! process at the other end keeps what matters for the next manager, the guest's rings and the record of what was in flight.
//!
//! A machine that is done with a disk stops its queues first; then the disk is closed as at power-off. A connection that ends while they are served
//! says that somebody died: the machine's process, or, seen from there, the manager. The disk is left as it is then, as after a crash:
//! a machine that lives on finds what it has written, whatever the disk's mode ([`AttachRequest::goes_on`]), and one that is started anew
//! what its mode keeps over a crash.
//!
//! A use goes through `Opening` (no connection yet), `Served` and `Ending`; the list of them and who waits for whom is `places`, SCSI disks and
//! their queues are `units`. It stays in the list until its disk is closed, so that whoever
//! wants the disk next knows whether waiting is of any use.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use api::{
    AdapterConfig, AttachRequest, Attachment, ByteSize, DeviceId, DeviceState, DiskBus, DiskChange,
    DiskConfig, DiskLimits, DiskStatus, EventKind, EventLog, InvalidValue, OnError, Problem, ProblemKind,
    TracePage, Transfer, VmName,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use storage_manager::{DiskGuard, HostedPool, VirtualDisk};
use storage_virtualizer::controls::{DiskControls, RateLimiter};
use storage_virtualizer::{Counters, DiskHandle, PinnedDisk};

use storage_virtualizer::vhost_user::{Parting, serve_blk};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkHandle};
use vmm::machine::{blk_options, rates, set_controls, trace};

use crate::places::Place;
use crate::units::{self, Adapter};

/// Between two looks whether the other end of a connection is there.
const LOOK: Duration = Duration::from_millis(50);

/// An open disk, for those who serve it.
pub(crate) type Disk = PinnedDisk<VirtualDisk>;
type Blk = VirtioBlk<Disk>;
type Handle = VirtioBlkHandle<Disk>;

/// Who uses a disk: the machine, and the disk's name in it.
pub(crate) type Key = (VmName, DeviceId);

/// All disks that are in use.
#[derive(Clone)]
pub struct DiskService(Arc<Shared>);

pub(crate) struct Shared {
    events: Arc<EventLog>,
    /// The way to the processes of machines.
    machines: OnceLock<Arc<dyn MachineDoor>>,
    state: Mutex<State>,
    /// A use has begun or ended.
    pub(crate) changed: Condvar,
}

/// The way to the processes of machines, for guests that attach and detach disks.
pub trait MachineDoor: Send + Sync {
    /// Has a machine's process attach a disk.
    ///
    /// # Errors
    /// It cannot be asked, or refuses.
    fn attach_disk(&self, vm: &VmName, disk: &DiskConfig) -> Result<DiskStatus, Problem>;

    /// Has a machine's process ask its guest to let a device go.
    ///
    /// # Errors
    /// As above.
    fn detach(&self, vm: &VmName, device: &DeviceId) -> Result<(), Problem>;
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) closing: bool,
    /// Until then only machines that go on are served.
    pub(crate) returning: Option<Instant>,
    pub(crate) uses: BTreeMap<Key, Use>,
    pub(crate) adapters: BTreeMap<VmName, Seat>,
    groups: BTreeMap<Key, Weak<Group>>,
}

/// Limits that disks of a machine share.
struct Group {
    limits: Mutex<DiskLimits>,
    limiter: Arc<RateLimiter>,
}

/// A machine's SCSI adapter.
#[derive(Default)]
pub(crate) struct Seat {
    pub(crate) adapter: Weak<Adapter>,
    pub(crate) session: AdapterSession,
}

/// Who has the queues of an adapter.
#[derive(Default)]
pub(crate) enum AdapterSession {
    #[default]
    None,
    /// Somebody was told that it may have them.
    Opening,
    /// A front-end.
    Served(UnixStream),
    /// Nobody any more, as soon as nothing is in flight.
    Ending,
}

/// A disk that is in use.
pub(crate) struct Use {
    pub(crate) pool: String,
    pub(crate) config: DiskConfig,
    controls: Arc<DiskControls>,
    /// What it shares with others.
    _group: Option<Arc<Group>>,
    pub(crate) phase: Phase,
}

pub(crate) enum Phase {
    /// The disk is being opened, or is open and waits for its connection.
    Opening,
    /// The same with a SCSI disk that its guest can use already.
    Unit(Disk),
    /// A front-end has it. A SCSI disk has no queues of its own.
    Served {
        socket: UnixStream,
        disk: Disk,
        handle: Option<Handle>,
    },
    /// The front-end has gone, and the disk is being closed.
    Ending,
}

impl Use {
    /// Somebody is there who does not look like going away.
    pub(crate) fn is_alive(&self) -> bool {
        match &self.phase {
            Phase::Served { socket, .. } => !has_hung_up(socket),
            Phase::Opening | Phase::Unit(_) | Phase::Ending => false,
        }
    }
}

/// The other end of a connection is closed.
pub(crate) fn has_hung_up(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut polled, Some(&now)), Ok(1..))
}

impl fmt::Debug for DiskService {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DiskService")
            .field("attachments", &self.list())
            .finish_non_exhaustive()
    }
}

impl DiskService {
    /// None yet; what happens is told to `events`.
    pub fn new(events: Arc<EventLog>) -> Self {
        Self(Arc::new(Shared {
            events,
            machines: OnceLock::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Guests that may attach and detach disks do it through `door`; without one they cannot. To be called once.
    pub fn reach_machines(&self, door: Arc<dyn MachineDoor>) {
        // The first one counts.
        let _ = self.0.machines.set(door);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    /// What happens is told to these.
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }

    /// There are machines that go on with their disks as soon as they have found this manager, within `time`: machines that are started
    /// wait so long, so that none of them takes a disk that another one still believes to have. To be called before anybody asks for disks.
    pub fn expect_machines(&self, time: Duration) {
        self.0.state().returning = Instant::now().checked_add(time);
    }

    /// Opens a disk of `pool`, whose name is `pool_name`, for a machine; what is returned serves it at the connection that it is given, on the
    /// thread that calls it, and returns when the front-end has gone and the disk is closed. If it is never called, the disk is closed as well.
    ///
    /// Waits up to ten seconds for one who is about to let the disk go: the same machine's process before this one, for example.
    ///
    /// # Errors
    /// There is no such disk, another machine uses it, or it cannot be used as is wanted.
    pub fn attach(
        &self,
        pool_name: &str,
        pool: &Arc<HostedPool>,
        request: AttachRequest,
    ) -> Result<Transfer, Problem> {
        let AttachRequest {
            vm,
            disk: config,
            adapter,
            group_limits,
            goes_on,
            memory_stays,
            ..
        } = request;
        check(&config, adapter.as_ref(), group_limits.as_ref())?;
        let group = config
            .limit_group
            .clone()
            .zip(group_limits)
            .map(|(name, limits)| self.0.group((vm.clone(), name), limits));
        let limiter = group.as_ref().map(|group| Arc::clone(&group.limiter));
        let controls = Arc::new(DiskControls::new(limiter, None));
        controls.recorder().set_name(&format!("{vm}/{}", config.id));
        set_controls(&controls, &config);
        let place = self.0.take_place(
            (vm, config.id.clone()),
            Use {
                pool: pool_name.to_owned(),
                config: config.clone(),
                controls: Arc::clone(&controls),
                _group: group,
                phase: Phase::Opening,
            },
            goes_on,
        )?;
        let disk = self
            .0
            .open(place.key(), pool_name, || pool.configured_disk(&config, goes_on))?;
        if let Some(adapter) = adapter {
            let on = (&config, &adapter);
            return self.attach_unit((pool_name, pool), on, controls, (disk, place));
        }
        let device = VirtioBlk::new(
            disk.handle().clone(),
            &blk_options(&config, controls),
            vec![pool.worker().clone()],
        )
        .map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()).about(&config.id))?;
        let handle = device.handle();
        let told = handle.clone();
        disk.on_resize(move || told.size_changed());
        let open = OpenDisk {
            device: Some(device),
            guard: Some(disk.into_guard()),
            place: Some(place),
        };
        Ok(Box::new(move |socket| open.serve((socket, memory_stays), handle)))
    }

    /// All disks that machines use, in the order of their names.
    pub fn list(&self) -> Vec<Attachment> {
        let state = self.0.state();
        let served = state.uses.iter();
        served
            .filter(|(_, used)| matches!(used.phase, Phase::Served { .. }))
            .map(|(key, used)| attachment(key, used))
            .collect()
    }

    /// What was done on each disk since its machine has it.
    pub fn counters(&self) -> Vec<(Attachment, Counters)> {
        let state = self.0.state();
        let counted = state.uses.iter().filter_map(|(key, used)| match &used.phase {
            Phase::Served {
                handle: Some(handle), ..
            } => {
                let counters = handle.counters().into_iter();
                Some((
                    attachment(key, used),
                    counters.fold(Counters::default(), Counters::plus),
                ))
            }
            _ => None,
        });
        counted.collect()
    }

    /// The last requests of a disk that ended after `after`.
    ///
    /// # Errors
    /// The machine has no such disk, or `after` is no place in a trace.
    pub fn trace(&self, vm: &VmName, device: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        let state = self.0.state();
        let used = state.uses.get(&(vm.clone(), device.clone()));
        let controls = Arc::clone(&used.ok_or_else(|| no_use(vm, device))?.controls);
        drop(state);
        trace(&controls, after)
    }

    /// Changes limits that disks of a machine share.
    ///
    /// # Errors
    /// None of its disks in use has them, or the change is impossible.
    pub fn change_group(
        &self,
        vm: &VmName,
        group: &DeviceId,
        change: &DiskLimits,
    ) -> Result<DiskLimits, Problem> {
        let state = self.0.state();
        let found = state.groups.get(&(vm.clone(), group.clone()));
        let Some(found) = found.and_then(Weak::upgrade) else {
            let text = format!("no disk of a pool that machine `{vm}` uses has the limit group `{group}`");
            return Err(Problem::new(ProblemKind::NotFound, text).about(group));
        };
        drop(state);
        let mut limits = found.limits.lock().unwrap_or_else(PoisonError::into_inner);
        *limits = limits.changed(change).map_err(invalid)?;
        found.limiter.set(rates(&limits));
        Ok(*limits)
    }

    /// Changes what can be changed of a disk while a guest uses it: limits, and polling.
    ///
    /// # Errors
    /// The machine has no such disk, or the change is impossible.
    pub fn change(&self, vm: &VmName, device: &DeviceId, change: &DiskChange) -> Result<Attachment, Problem> {
        let key = (vm.clone(), device.clone());
        let mut state = self.0.state();
        let used = state.uses.get_mut(&key).ok_or_else(|| no_use(vm, device))?;
        let changed = used.config.changed(change).map_err(invalid)?;
        check_errors(&changed)?;
        set_controls(&used.controls, &changed);
        used.config = changed;
        Ok(attachment(&key, used))
    }

    /// Refuses everybody from now on, ends what is in flight, closes all connections, and returns when no disk is in use. Machines wait: their
    /// processes ask the next manager for the same disks.
    pub fn close(&self) {
        let mut state = self.0.state();
        state.closing = true;
        // The queues of SCSI adapters first: no guest shall see that its disks go.
        for seat in state.adapters.values() {
            if let AdapterSession::Served(socket) = &seat.session {
                // It may be closed already.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        self.0.changed.notify_all();
        let is_served = |state: &mut State| {
            let mut seats = state.adapters.values();
            seats.any(|seat| matches!(seat.session, AdapterSession::Served(_)))
        };
        let waited = self.0.changed.wait_while(state, is_served);
        state = waited.unwrap_or_else(PoisonError::into_inner);
        for used in state.uses.values() {
            if let Phase::Served { socket, .. } = &used.phase {
                // It may be closed already.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        self.0.changed.notify_all();
        let in_use = |state: &mut State| !state.uses.is_empty();
        drop(
            self.0
                .changed
                .wait_while(state, in_use)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

fn attachment((vm, device): &Key, used: &Use) -> Attachment {
    Attachment {
        vm: vm.clone(),
        device: device.clone(),
        pool: used.pool.clone(),
        file: used.config.file.clone().unwrap_or_default(),
        read_only: used.config.read_only,
    }
}

pub(crate) fn invalid((key, error): (&'static str, InvalidValue)) -> Problem {
    Problem::new(ProblemKind::Invalid, format!("{key} {error}")).about(key)
}

fn no_use(vm: &VmName, device: &DeviceId) -> Problem {
    let text = format!("machine `{vm}` uses no disk of a pool as `{device}`");
    Problem::new(ProblemKind::NotFound, text).about(device)
}

/// Whether this service can serve a disk as `config` wants it.
fn check(
    config: &DiskConfig,
    adapter: Option<&AdapterConfig>,
    group: Option<&DiskLimits>,
) -> Result<(), Problem> {
    config.check().map_err(invalid)?;
    let refused = |key, text: &str| Err(invalid((key, InvalidValue::new(text))));
    if config.file.is_none() {
        return refused("file", "is missing; it names a disk of the pool");
    }
    if config.id.is_unassigned() {
        return refused("id", "is missing; it is the disk's name in the machine");
    }
    match (config.bus, adapter) {
        (DiskBus::VirtioBlk, None) => {}
        (DiskBus::VirtioBlk, Some(_)) => return refused("adapter", "is for disks on virtio-scsi"),
        (DiskBus::VirtioScsi, None) => {
            return refused(
                "adapter",
                "is missing; it is what the machine's SCSI disks are on",
            );
        }
        (DiskBus::VirtioScsi, Some(adapter)) => {
            units::check(adapter)?;
            if config.lun.is_none() {
                return refused("lun", "is missing; the machine chooses it");
            }
        }
    }
    match (&config.limit_group, group) {
        (Some(_), None) => return refused("group-limits", "is missing; limit-group has these"),
        (_, Some(limits)) => limits.check().map_err(invalid)?,
        (None, None) => {}
    }
    check_errors(config)
}

/// The machine cannot be stopped from here.
fn check_errors(config: &DiskConfig) -> Result<(), Problem> {
    if config.on_error == OnError::Report {
        return Ok(());
    }
    let text =
        "cannot be \"stop\" for a disk that a manager serves: it could not stop the machine's processors";
    Err(invalid(("on-error", InvalidValue::new(text))))
}

impl Shared {
    pub(crate) fn events(&self) -> &EventLog {
        &self.events
    }

    /// The way to the processes of machines.
    pub(crate) fn machines(&self) -> Option<&Arc<dyn MachineDoor>> {
        self.machines.get()
    }

    /// The disks of `pool` that a machine has, as it has them.
    pub(crate) fn disks_of(&self, vm: &VmName, pool: &str) -> Vec<DiskStatus> {
        let state = self.state();
        let own = state.uses.iter();
        own.filter(|((machine, _), used)| machine == vm && used.pool == pool)
            .filter_map(|(_, used)| match &used.phase {
                Phase::Served { disk, .. } | Phase::Unit(disk) => Some(DiskStatus {
                    config: used.config.clone(),
                    state: DeviceState::Active,
                    size: ByteSize::from_bytes(disk.geometry().size),
                    stopped: None,
                }),
                Phase::Opening | Phase::Ending => None,
            })
            .collect()
    }

    /// Limits that disks of a machine share: those that there are, or new ones.
    fn group(&self, key: Key, limits: DiskLimits) -> Arc<Group> {
        let mut state = self.state();
        state.groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = state.groups.get(&key).and_then(Weak::upgrade) {
            return group;
        }
        let group = Arc::new(Group {
            limits: Mutex::new(limits),
            limiter: Arc::new(RateLimiter::new(rates(&limits))),
        });
        state.groups.insert(key, Arc::downgrade(&group));
        group
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Each change is complete at every point where its holder could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, LOOK);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A disk that is open for a machine.
struct OpenDisk {
    /// All that has handles on the disk goes before the guard.
    device: Option<Blk>,
    guard: Option<DiskGuard>,
    place: Option<Place>,
}

impl OpenDisk {
    fn serve(mut self, (socket, memory_stays): (UnixStream, bool), handle: Handle) {
        let (Some(device), Some(place)) = (self.device.take(), &self.place) else {
            return;
        };
        let kept = match socket.try_clone() {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(%error, "a machine cannot be given its disk");
                return;
            }
        };
        if !place.begin(Phase::Served {
            socket: kept,
            disk: handle.disk().clone(),
            handle: Some(handle),
        }) {
            return;
        }
        place.tell(|vm, id, file| EventKind::DiskAttached { vm, id, file });
        let parting = serve_blk(socket, device, memory_stays);
        place.set_phase(Phase::Ending);
        let goes_on = parting == Parting::InUse || place.is_closing();
        if let Some(guard) = self.guard.take() {
            match goes_on {
                true => guard.leave(),
                false => guard.close(),
            }
        }
        place.tell(|vm, id, file| EventKind::DiskDetached { vm, id, file });
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        drop(self.device.take());
        let (guard, place) = (self.guard.take(), self.place.take());
        let Some(guard) = guard else { return };
        // It was never served, or not to its end: nobody has said that he is done with it.
        leave_later(guard, place);
    }
}

/// Closes a disk as after a crash; who wants that may not have the time to wait.
pub(crate) fn leave_later(guard: DiskGuard, place: Option<Place>) {
    let end = move || {
        guard.leave();
        drop(place);
    };
    if let Err(error) = thread::Builder::new().name("close-disk".into()).spawn(end) {
        // What was to be run is dropped, which closes the disk a little later.
        tracing::warn!(%error, "a disk is closed without being waited for");
    }
}
