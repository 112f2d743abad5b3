//! SCSI disks that the host's manager serves, and the adapter on which they are.
//!
//! ```text
//!   attach ── the manager opens the disk ──► a connection of its own, a thread that listens ─┬─ size, found, gone ──► status, events
//!   adapter ── vhost-user-scsi ──► the queues, for all disks that are there                  │
//!   detach ──────────────────────────────────────────────────────────────────────────────────┴─► the guest is told, by the manager
//! ```
//!
//! If the manager goes, each disk is asked for again by its thread; the adapter's queues, which its own thread asks for, come only when all
//! of them are there. Until then the guest's commands wait.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use api::{
    ByteSize, DeviceId, DeviceState, DiskConfig, DiskStatus, EventKind, EventLog, Problem, ProblemKind,
    ScsiPlace, UnitNews, UnitOrder,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::manager::ManagerLink;
use super::settings::{DiskSetting, DiskSettings};
use crate::sandbox::{Kind, Sandbox};

/// Between two requests for a disk whose manager is away, at first and at most.
const FIRST_TRIAL: Duration = Duration::from_millis(20);
const SLOWEST_TRIALS: Duration = Duration::from_secs(1);

/// A disk.
struct Managed {
    id: DeviceId,
    setting: Arc<DiskSetting>,
    size: AtomicU64,
    is_found: AtomicBool,
    is_connected: AtomicBool,
    /// What its thread is to tell the manager.
    order: Mutex<Option<UnitOrder>>,
    /// Rung when there is an order.
    bell: OwnedFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Managed {
    fn order(&self, order: UnitOrder) {
        *locked(&self.order) = Some(order);
        self.ring();
    }

    fn ring(&self) {
        // It does not block.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn ordered(&self) -> Option<UnitOrder> {
        *locked(&self.order)
    }

    fn status(&self) -> DiskStatus {
        DiskStatus {
            config: self.setting.config(),
            state: match (self.ordered(), self.is_connected.load(Ordering::Relaxed)) {
                (Some(_), _) => DeviceState::Removing,
                (None, false) => DeviceState::Waiting,
                (None, true) if self.is_found.load(Ordering::Relaxed) => DeviceState::Active,
                (None, true) => DeviceState::Attached,
            },
            size: ByteSize::from_bytes(self.size.load(Ordering::Relaxed)),
            stopped: None,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is complete at every point where its holder could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disks.
pub(super) struct ManagedScsi {
    link: ManagerLink,
    settings: Arc<DiskSettings>,
    sandbox: Sandbox,
    events: Arc<EventLog>,
    disks: Mutex<Vec<Arc<Managed>>>,
    /// The machine has the adapter.
    has_adapter: AtomicBool,
}

impl fmt::Debug for ManagedScsi {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = locked(&self.disks).iter().map(|disk| disk.id.clone()).collect();
        formatter.debug_tuple("ManagedScsi").field(&ids).finish()
    }
}

impl ManagedScsi {
    pub(super) fn new(
        link: ManagerLink,
        settings: Arc<DiskSettings>,
        sandbox: Sandbox,
        events: Arc<EventLog>,
    ) -> Arc<Self> {
        Arc::new(Self {
            link,
            settings,
            sandbox,
            events,
            disks: Mutex::default(),
            has_adapter: AtomicBool::new(false),
        })
    }

    /// Has the manager open a disk, which becomes a unit of the adapter. It gets the places that its configuration says, or free ones.
    ///
    /// # Errors
    /// Its name or a place is taken, or the manager does not give it.
    pub(super) fn attach(self: &Arc<Self>, setting: &Arc<DiskSetting>) -> Result<DiskStatus, Problem> {
        let host = |what: &str, error: io::Error| {
            let id = setting.config().id;
            Problem::new(ProblemKind::Host, format!("cannot {what}: {error}")).about(id)
        };
        let disk = self.take_place(setting).map_err(|problem| match problem {
            Ok(problem) => problem,
            Err(error) => host("make an eventfd", error),
        })?;
        let begun = self.ask(&disk, false).and_then(|socket| {
            // It is said first of all.
            let first = read_news(&socket).map_err(|error| host("learn the size of the disk", error))?;
            if let UnitNews::Size(size) = first {
                disk.size.store(size, Ordering::Relaxed);
            }
            disk.is_connected.store(true, Ordering::Relaxed);
            self.start(&disk, socket)
                .map_err(|error| host("start a thread", error))
        });
        if let Err(problem) = begun {
            self.forget(&disk);
            return Err(problem);
        }
        Ok(disk.status())
    }

    /// Enters a disk into the list, with its place.
    fn take_place(&self, setting: &Arc<DiskSetting>) -> Result<Arc<Managed>, Result<Problem, io::Error>> {
        let mut disks = locked(&self.disks);
        let mut config = setting.config();
        let id = config.id.clone();
        let conflict = |text: String| Ok(Problem::new(ProblemKind::Conflict, text).about(&id));
        if disks.iter().any(|other| other.id == id) {
            return Err(conflict(format!("the VM has a device `{id}` already")));
        }
        let others = disks.iter().map(|disk| disk.setting.config());
        // One that names no pool is of the manager's only one.
        let is_elsewhere = |other: &DiskConfig| {
            let pools = other.pool.as_ref().zip(config.pool.as_ref());
            pools.is_some_and(|(one, another)| one != another)
        };
        if let Some(other) = others.clone().find(is_elsewhere) {
            let text = format!(
                "cannot attach `{id}`: SCSI disks of a manager are of one pool, that of `{}`",
                other.id
            );
            return Err(conflict(text));
        }
        let mut taken: BTreeSet<ScsiPlace> = others.flat_map(|other| other.places()).collect();
        config
            .take_places(&mut taken)
            .map_err(|(key, error)| conflict(format!("cannot attach `{id}`: {key}: {error}")))?;
        setting.place(&config);
        let disk = Arc::new(Managed {
            id,
            setting: Arc::clone(setting),
            size: AtomicU64::new(0),
            is_found: AtomicBool::new(false),
            is_connected: AtomicBool::new(false),
            order: Mutex::default(),
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                .map_err(|error| Err(error.into()))?,
            thread: Mutex::default(),
        });
        disks.push(Arc::clone(&disk));
        Ok(disk)
    }

    fn forget(&self, disk: &Arc<Managed>) {
        locked(&self.disks).retain(|other| !Arc::ptr_eq(other, disk));
    }

    /// Asks the manager for a disk.
    fn ask(&self, disk: &Managed, goes_on: bool) -> Result<UnixStream, Problem> {
        let config = disk.setting.config();
        let limits = self.settings.group_limits(&config);
        self.link
            .attach(&config, limits, goes_on)
            .map(|dialled| dialled.socket)
    }

    fn start(self: &Arc<Self>, disk: &Arc<Managed>, socket: UnixStream) -> io::Result<()> {
        let confine = self.sandbox.thread(Kind::DiskLink);
        let (own, bus) = (Arc::clone(disk), Arc::clone(self));
        let thread = std::thread::Builder::new()
            .name(format!("unit-{}", disk.id))
            .spawn(move || match confine() {
                Ok(()) => bus.run(&own, socket),
                Err(error) => tracing::error!(%error, disk = %own.id, "the thread of a disk cannot be confined, and ends"),
            })?;
        *locked(&disk.thread) = Some(thread);
        Ok(())
    }

    /// The body of a disk's thread: listens, and asks again when the manager was another one.
    fn run(&self, disk: &Arc<Managed>, socket: UnixStream) {
        let mut connection = Some(socket);
        let mut pause = FIRST_TRIAL;
        loop {
            match &connection {
                Some(socket) => {
                    if self.listen(disk, socket) {
                        continue;
                    }
                    connection = None;
                    pause = FIRST_TRIAL;
                    disk.is_connected.store(false, Ordering::Relaxed);
                    if disk.ordered().is_some() {
                        break;
                    }
                }
                None => {
                    let [rung] = wait([disk.bell.as_fd()], Some(pause));
                    if rung {
                        // It does not block.
                        let _ = rustix::io::read(&disk.bell, &mut [0; 8]);
                    }
                    if disk.ordered() == Some(UnitOrder::End) {
                        break;
                    }
                    pause = (pause * 2).min(SLOWEST_TRIALS);
                    match self.ask(disk, true) {
                        Ok(socket) => {
                            connection = Some(socket);
                            disk.is_connected.store(true, Ordering::Relaxed);
                            // It may have an order that nobody has heard.
                            disk.ring();
                        }
                        Err(problem) => {
                            tracing::debug!(disk = %disk.id, %problem, "the manager does not give a disk yet")
                        }
                    }
                }
            }
        }
        self.forget(disk);
        if disk.ordered() == Some(UnitOrder::Detach) {
            let id = disk.id.clone();
            self.events.record(EventKind::DeviceRemoved { id });
        }
    }

    /// Waits for the manager, or for an order, and does what is to be done. False if the connection is at its end.
    fn listen(&self, disk: &Managed, socket: &UnixStream) -> bool {
        let [rung, spoken] = wait([disk.bell.as_fd(), socket.as_fd()], None);
        if rung {
            // It does not block.
            let _ = rustix::io::read(&disk.bell, &mut [0; 8]);
            if let Some(order) = disk.ordered()
                && rustix::io::write(socket, &[order.encode()]) != Ok(1)
            {
                return false;
            }
        }
        if !spoken {
            return true;
        }
        match read_news(socket) {
            Ok(UnitNews::Size(size)) => disk.size.store(size, Ordering::Relaxed),
            Ok(UnitNews::Found) => {
                disk.is_found.store(true, Ordering::Relaxed);
                let id = disk.id.clone();
                self.events.record(EventKind::DeviceActive { id });
            }
            Err(_) => return false,
        }
        true
    }

    /// Whether there is a disk of this name.
    pub(super) fn has(&self, id: &DeviceId) -> bool {
        locked(&self.disks).iter().any(|disk| disk.id == *id)
    }

    /// Begins to take a disk away. False if there is no such disk.
    pub(super) fn detach(&self, id: &DeviceId) -> bool {
        self.order(id, UnitOrder::Detach)
    }

    /// A disk is not to be had after all.
    pub(super) fn release(&self, id: &DeviceId) {
        self.order(id, UnitOrder::End);
    }

    fn order(&self, id: &DeviceId, order: UnitOrder) -> bool {
        let disks = locked(&self.disks);
        let disk = disks.iter().find(|disk| disk.id == *id);
        disk.map(|disk| disk.order(order)).is_some()
    }

    /// The status of all disks.
    pub(super) fn disks(&self) -> Vec<DiskStatus> {
        locked(&self.disks).iter().map(|disk| disk.status()).collect()
    }

    /// The pool of the disks, as they name it, and how many the guest may know.
    pub(super) fn wanted(&self) -> (Option<String>, usize) {
        let disks = locked(&self.disks);
        let pool = disks.iter().find_map(|disk| disk.setting.config().pool);
        // One without a size is being asked for, for the first time.
        let known = disks.iter().filter(|disk| disk.size.load(Ordering::Relaxed) > 0);
        (pool, known.count())
    }

    /// Whether the adapter is to be made; it counts as made then.
    pub(super) fn needs_adapter(&self) -> bool {
        !self.has_adapter.swap(true, Ordering::Relaxed)
    }

    /// There is no adapter after all.
    pub(super) fn no_adapter(&self) {
        self.has_adapter.store(false, Ordering::Relaxed);
    }

    /// The machine is done with all disks: waits until the manager knows. Returns their names.
    pub(super) fn close(&self) -> Vec<DeviceId> {
        self.no_adapter();
        let disks = locked(&self.disks).clone();
        disks.iter().for_each(|disk| disk.order(UnitOrder::End));
        for disk in &disks {
            let thread = locked(&disk.thread).take();
            if thread.is_some_and(|thread| thread.join().is_err()) {
                tracing::error!(disk = %disk.id, "the thread of a disk panicked");
            }
        }
        disks.iter().map(|disk| disk.id.clone()).collect()
    }
}

/// The name of the adapter.
pub(super) fn adapter_id() -> DeviceId {
    // This is a name.
    "scsi-manager".parse().unwrap_or_default()
}

/// What the manager says next; waits for it. By a system call that the sandbox knows.
fn read_news(socket: &UnixStream) -> io::Result<UnitNews> {
    let mut bytes = [0; UnitNews::LENGTH];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += match rustix::io::read(socket, &mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
    }
    UnitNews::decode(bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Waits until one of `fds` has something to be read, or for `patience`; which have.
fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], patience: Option<Duration>) -> [bool; N] {
    let timeout = patience.map(|patience| Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    });
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    // Interrupted is as good as nothing.
    let _ = poll(&mut polled, timeout.as_ref());
    polled.map(|polled| !polled.revents().is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read, Write};
    use std::time::Instant;

    use api::virtual_disk::TransferRequest;
    use api::{DiskBus, DiskChange, DiskLimits, StorageAnswer, StorageRequest, TracePage, Transfer};
    use storage_virtualizer::vhost_user::front_end::Dialled;

    use super::*;
    use crate::config::{SandboxConfig, Seccomp};
    use crate::devices::net::{Launcher, Sockets};
    use crate::machine::{Ask, ManagerDisks};

    /// A manager that gives every disk, while it is there.
    #[derive(Debug, Default)]
    struct Fake {
        is_away: AtomicBool,
        /// The manager's ends of connections, and whether the machine went on.
        given: Mutex<Vec<(UnixStream, bool)>>,
    }

    fn no<T>() -> Result<T, Problem> {
        Err(Problem::new(ProblemKind::Host, "it is away"))
    }

    impl ManagerDisks for Fake {
        fn say(&self, _: &str) -> io::Result<Vec<u8>> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn attach(
            &self,
            _: Ask<'_>,
            _: &DiskConfig,
            _: Option<DiskLimits>,
            goes_on: bool,
        ) -> Result<Dialled, Problem> {
            if self.is_away.load(Ordering::Relaxed) {
                return no();
            }
            let (socket, mut manager) = UnixStream::pair().unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            manager.write_all(&UnitNews::Size(4096).encode()).unwrap();
            locked(&self.given).push((manager, goes_on));
            Ok(Dialled { socket, ours, theirs })
        }

        fn attach_adapter(&self, _: Ask<'_>, _: Option<String>, _: u32) -> Result<Dialled, Problem> {
            no()
        }

        fn trace(&self, _: Ask<'_>, _: &DeviceId, _: &str) -> Result<TracePage, Problem> {
            no()
        }

        fn change_group(&self, _: Ask<'_>, _: &DeviceId, _: &DiskLimits) -> Result<(), Problem> {
            no()
        }

        fn change(&self, _: Ask<'_>, _: &DeviceId, _: &DiskChange) -> Result<(), Problem> {
            no()
        }

        fn execute(&self, _: Ask<'_>, _: StorageRequest) -> Result<StorageAnswer, Problem> {
            no()
        }

        fn transfer(&self, _: Ask<'_>, _: TransferRequest) -> Result<Transfer, Problem> {
            no()
        }
    }

    struct Place {
        fake: Arc<Fake>,
        bus: Arc<ManagedScsi>,
    }

    impl Place {
        fn new() -> Self {
            let fake = Arc::<Fake>::default();
            let helper = Arc::new(Launcher::start(&Sockets::Any, None).unwrap());
            let link = ManagerLink::new(
                helper,
                "/m.sock".into(),
                Arc::clone(&fake) as Arc<dyn ManagerDisks>,
            );
            let sandbox = SandboxConfig {
                seccomp: Seccomp::Off,
                landlock: false,
                ..SandboxConfig::default()
            };
            let sandbox = Sandbox::prepare(&sandbox, Vec::new()).unwrap();
            let events = Arc::new(EventLog::new());
            let settings = Arc::new(DiskSettings::new(&BTreeMap::new(), Arc::clone(&events)));
            let bus = ManagedScsi::new(link, settings, sandbox, events);
            Self { fake, bus }
        }

        fn attach(&self, id: &str, pool: Option<&str>, lun: Option<u16>) -> Result<DiskStatus, Problem> {
            let config = DiskConfig {
                id: id.parse().unwrap(),
                image: None,
                file: Some("/a.dsk".into()),
                pool: pool.map(str::to_owned),
                bus: DiskBus::VirtioScsi,
                lun,
                ..DiskConfig::new("")
            };
            let setting = self.bus.settings.of(&config).unwrap();
            self.bus.attach(&setting)
        }

        /// The manager's end of the newest connection.
        fn manager(&self) -> (UnixStream, bool) {
            let given = locked(&self.fake.given).pop().unwrap();
            given.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            given
        }

        fn until(&self, what: &str, is_so: impl Fn(&[DiskStatus]) -> bool) {
            let begin = Instant::now();
            while !is_so(&self.bus.disks()) {
                assert!(
                    begin.elapsed() < Duration::from_secs(10),
                    "{what}: {:?}",
                    self.bus.disks()
                );
                std::thread::sleep(Duration::from_millis(2));
            }
        }

        fn events(&self) -> Vec<String> {
            let page = self.bus.events.page(0, 100);
            let short = page.events.into_iter().map(|event| match event.kind {
                EventKind::DeviceActive { id } => format!("{id} active"),
                EventKind::DeviceRemoved { id } => format!("{id} removed"),
                other => format!("{other:?}"),
            });
            short.collect()
        }
    }

    #[test]
    fn a_disk_is_asked_for_again_and_goes_when_the_manager_closes_it() {
        let place = Place::new();
        let status = place.attach("a", None, None).unwrap();
        assert_eq!(status.state, DeviceState::Attached);
        assert_eq!(status.size.bytes(), 4096);
        assert_eq!((status.config.target, status.config.lun), (Some(0), Some(0)));
        let (mut manager, goes_on) = place.manager();
        assert!(!goes_on);
        manager.write_all(&UnitNews::Found.encode()).unwrap();
        manager.write_all(&UnitNews::Size(8192).encode()).unwrap();
        place.until("a larger disk in use", |disks| {
            disks[0].state == DeviceState::Active && disks[0].size.bytes() == 8192
        });
        // The manager goes, and another one comes.
        place.fake.is_away.store(true, Ordering::Relaxed);
        drop(manager);
        place.until("waiting", |disks| disks[0].state == DeviceState::Waiting);
        assert_eq!(place.bus.wanted(), (None, 1));
        place.fake.is_away.store(false, Ordering::Relaxed);
        place.until("back", |disks| disks[0].state == DeviceState::Active);
        let (mut manager, goes_on) = place.manager();
        assert!(goes_on);
        // It is taken away when the manager says so by closing.
        assert!(place.bus.detach(&"a".parse().unwrap()));
        let mut order = [0];
        manager.read_exact(&mut order).unwrap();
        assert_eq!(UnitOrder::decode(order[0]), Some(UnitOrder::Detach));
        assert_eq!(place.bus.disks()[0].state, DeviceState::Removing);
        drop(manager);
        place.until("gone", <[DiskStatus]>::is_empty);
        let begin = Instant::now();
        while place.events() != ["a active", "a removed"] {
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", place.events());
        }
    }

    #[test]
    fn names_places_and_pools_are_kept_apart_and_all_end_with_the_machine() {
        let place = Place::new();
        place.attach("a", Some("tank"), Some(3)).unwrap();
        let refused = |id, pool, lun| place.attach(id, pool, lun).unwrap_err().detail;
        assert!(refused("a", None, None).contains("already"));
        assert!(refused("b", None, Some(3)).contains("LUN 3"));
        assert!(refused("b", Some("other"), None).contains("one pool"));
        place.fake.is_away.store(true, Ordering::Relaxed);
        assert!(refused("b", None, None).contains("away"));
        place.fake.is_away.store(false, Ordering::Relaxed);
        let second = place.attach("b", None, None).unwrap();
        assert_eq!(second.config.lun, Some(0), "what was refused has no place");
        assert_eq!(place.bus.wanted(), (Some("tank".to_owned()), 2));
        let managers = std::mem::take(&mut *locked(&place.fake.given));
        let said = managers.into_iter().map(|(mut manager, _)| {
            std::thread::spawn(move || {
                let mut order = [0];
                manager.read_exact(&mut order).unwrap();
                UnitOrder::decode(order[0])
            })
        });
        let said: Vec<_> = said.collect();
        assert_eq!(place.bus.close().len(), 2);
        for thread in said {
            assert_eq!(thread.join().unwrap(), Some(UnitOrder::End));
        }
        assert!(place.bus.disks().is_empty());
    }
}
