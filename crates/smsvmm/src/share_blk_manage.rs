//! `smsvmm share vhost-user` while it serves: disks that come and go, each with a socket and a server of its own (`share_manage` says what is
//! common). So nothing that is done to one touches another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{
    EventLog, Problem, ProblemKind, Share, ShareClient, ShareDisk, ShareKind, ShareStatus, SharedDisk,
    StorageAnswer, StorageRequest,
};
use block_io::Worker;
use storage_manager::{DiskGuard, ResizeHook};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::vhost_user::VhostUserServer;

use crate::logs;
use crate::share_manage::{
    self, Base, Meant, Opened, counts, front_end, has_no, id_of_front_end, is_stopping, latencies,
    name_taken, no_client, no_disk, number, process, since,
};

/// How often it is looked whether somebody still looks at a server that is to end.
const LOOK: Duration = Duration::from_millis(5);

/// A disk that is served at a socket.
pub(crate) struct Served<H: DiskHandle> {
    pub(crate) socket: PathBuf,
    pub(crate) disk: H,
    pub(crate) server: VhostUserServer<H>,
    /// Those that serve an image.
    pub(crate) workers: Vec<Worker>,
    /// Closes a disk of a pool.
    pub(crate) guard: Option<DiskGuard>,
    /// Tells of a new size of it.
    pub(crate) resized: Option<ResizeHook>,
}

/// Opens a disk and serves it at a socket.
pub(crate) type Open<H> = Box<dyn Fn(&Meant, &Path) -> Result<Served<H>, Problem> + Send + Sync>;

struct Shown<H: DiskHandle> {
    /// No other disk ever has it.
    number: u64,
    socket: PathBuf,
    disk: H,
    server: Arc<VhostUserServer<H>>,
    workers: Vec<Worker>,
}

/// By name; none is one that is being added or removed.
type Disks<H> = BTreeMap<String, Option<Shown<H>>>;

/// Disks while they are served.
pub(crate) struct BlkShare<H: DiskHandle> {
    base: Base,
    disks: Mutex<Disks<H>>,
    next: Mutex<u64>,
    open: Open<H>,
}

impl<H: DiskHandle> BlkShare<H> {
    /// `disks` are served already: names, sources.
    pub(crate) fn new(base: Base, disks: Vec<(String, String, Served<H>)>, open: Open<H>) -> Arc<Self> {
        let share = Arc::new(Self {
            base,
            disks: Mutex::default(),
            next: Mutex::default(),
            open,
        });
        for (name, source, served) in disks {
            share.kept(&name, source, served);
        }
        share
    }

    fn disks(&self) -> MutexGuard<'_, Disks<H>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk is served.
    fn kept(&self, name: &str, source: String, served: Served<H>) {
        let number = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let server = Arc::new(served.server);
        if let Some(hook) = served.resized {
            let server = Arc::downgrade(&server);
            hook.tell(move || {
                if let Some(server) = server.upgrade() {
                    server.size_changed();
                }
            });
        }
        let shown = Shown {
            number,
            socket: served.socket,
            disk: served.disk,
            server,
            workers: served.workers,
        };
        let guard = served.guard;
        self.base.keep(name, Opened { source, guard });
        self.disks().insert(name.to_owned(), Some(shown));
    }

    /// Ends everything: what is in flight first.
    pub(crate) fn end(&self) {
        let disks = std::mem::take(&mut *self.disks());
        disks.into_values().flatten().for_each(Shown::end);
        self.base.close_all();
    }

    fn told(&self, name: &str, shown: &Shown<H>) -> SharedDisk {
        let counters = shown.server.counters();
        let geometry = shown.disk.geometry();
        SharedDisk {
            name: name.to_owned(),
            source: self.base.source(name),
            target: None,
            lun: None,
            socket: Some(shown.socket.clone()),
            size: geometry.size,
            read_only: geometry.read_only,
            clients: number(shown.server.front_ends()),
            counts: Some(counts(&counters)),
            latencies: Some(latencies(&counters)),
        }
    }
}

impl<H: DiskHandle> Shown<H> {
    /// Ends what is in flight; nothing uses the disk any more then.
    fn end(self) {
        let mut server = self.server;
        // Somebody may look at it, for a moment.
        loop {
            match Arc::try_unwrap(server) {
                Ok(own) => {
                    own.stop();
                    break;
                }
                Err(shared) => server = shared,
            }
            std::thread::sleep(LOOK);
        }
        drop((self.disk, self.workers));
    }
}

impl<H: DiskHandle> Share for BlkShare<H> {
    fn status(&self) -> Result<ShareStatus, Problem> {
        let disks = self.disks();
        let there = || {
            disks
                .iter()
                .filter_map(|(name, shown)| Some((name, shown.as_ref()?)))
        };
        let shown = there().map(|(name, shown)| self.told(name, shown)).collect();
        let mut clients = Vec::new();
        for (name, shown) in there() {
            for client in shown.server.clients() {
                clients.push(ShareClient {
                    id: id_of_front_end(shown.number, client.number),
                    addresses: process(client.process).into_iter().collect(),
                    initiator: None,
                    target: None,
                    disk: Some(name.clone()),
                    since_ms: since(client.since),
                    counts: counts(&client.counters),
                });
            }
        }
        Ok(self.base.status(Vec::new(), shown, clients))
    }

    fn add(&self, disk: ShareDisk) -> Result<SharedDisk, Problem> {
        has_no(
            ShareKind::VhostUser,
            &[("target", disk.target.is_some()), ("lun", disk.lun.is_some())],
        )?;
        let mut meant = self.base.meant(&disk, str::to_owned)?;
        if disk.name.is_none() {
            // Its path is what it is called.
            meant.name.clone_from(&meant.source);
        }
        let socket = disk.socket.as_ref().filter(|socket| socket.is_absolute());
        let socket = socket.ok_or_else(|| {
            Problem::new(ProblemKind::Invalid, "each disk has a socket of its own")
                .about("socket")
                .remedy("give an absolute path for it")
        })?;
        {
            let mut disks = self.disks();
            if disks.contains_key(&meant.name) {
                return Err(name_taken(&meant.name));
            }
            disks.insert(meant.name.clone(), None);
        }
        let served = (self.open)(&meant, socket).inspect_err(|_| drop(self.disks().remove(&meant.name)))?;
        self.kept(&meant.name, meant.source.clone(), served);
        logs::say(&format!(
            "smsvmm: {} is served at {}",
            meant.name,
            socket.display()
        ));
        let disks = self.disks();
        let shown = disks.get(&meant.name).and_then(Option::as_ref);
        shown
            .map(|shown| self.told(&meant.name, shown))
            .ok_or_else(is_stopping)
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let taken = self.disks().get_mut(name).and_then(Option::take);
        taken.ok_or_else(|| no_disk(name))?.end();
        self.base.close(name);
        self.disks().remove(name);
        logs::say(&format!("smsvmm: {name} is served no more"));
        Ok(())
    }

    fn disconnect(&self, client: &str) -> Result<(), Problem> {
        let (disk, number): (u64, u64) = front_end(client)?;
        let server = {
            let disks = self.disks();
            let mut there = disks.values().flatten();
            let found = there.find(|shown| shown.number == disk);
            found.map(|shown| Arc::clone(&shown.server))
        };
        match server.is_some_and(|server| server.disconnect(number)) {
            true => Ok(()),
            false => Err(no_client(client)),
        }
    }

    fn stop(&self) -> Result<(), Problem> {
        share_manage::stop()
    }

    fn events(&self) -> &EventLog {
        &self.base.events
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.base.storage(request)
    }
}
