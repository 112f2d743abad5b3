//! `smsvmm share vhost-user-scsi` while it serves: LUNs that come and go at all sockets, machines that must go (`share_manage` says what is
//! common).
//!
//! A machine is told of a LUN by an event of its adapter, and by a unit attention on the others; what its driver has sent to a LUN that goes
//! is ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use api::{
    EventLog, Problem, ProblemKind, Share, ShareClient, ShareDisk, ShareKind, ShareStatus, SharedDisk,
    StorageAnswer, StorageRequest,
};
use storage_manager::{DiskGuard, ResizeHook};
use storage_virtualizer::DiskHandle;
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::scsi::{MAX_LUNS, Unit};
use storage_virtualizer::vhost_user::VhostUserScsiServer;

use crate::logs;
use crate::share_manage::{
    self, Base, Meant, Opened, counts, front_end, has_no, id_of_front_end, lun_beyond, lun_taken, name_taken,
    no_client, no_disk, number, problem, process, since,
};

/// How often it is looked whether commands have ended.
const LOOK: Duration = Duration::from_millis(5);

/// A disk that is to be a LUN.
pub(crate) struct NewUnit<H> {
    pub(crate) unit: Arc<Unit>,
    pub(crate) disk: H,
    pub(crate) controls: Arc<DiskControls>,
    /// Closes a disk of a pool.
    pub(crate) guard: Option<DiskGuard>,
    /// Tells of a new size of it.
    pub(crate) resized: Option<ResizeHook>,
}

/// Opens a disk that is to have a LUN.
pub(crate) type Open<H> = Box<dyn Fn(u16, &Meant) -> Result<NewUnit<H>, Problem> + Send + Sync>;

/// What else forgets a disk that was removed.
pub(crate) type Forget = Box<dyn Fn(u16) + Send + Sync>;

/// What a LUN is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    name: String,
    read_only: bool,
}

/// Takes a LUN for a disk: the one that is wanted, or the lowest that is free.
fn take(luns: &mut BTreeMap<u16, Shown>, name: &str, wanted: Option<u16>) -> Result<u16, Problem> {
    if luns.values().any(|other| other.name == name) {
        return Err(name_taken(name));
    }
    let lun = match wanted {
        Some(lun) if lun >= MAX_LUNS => return Err(lun_beyond(lun)),
        Some(lun) => match luns.get(&lun) {
            Some(other) => return Err(lun_taken(format!("LUN {lun} is taken by {}", other.name))),
            None => lun,
        },
        None => (0..MAX_LUNS).find(|lun| !luns.contains_key(lun)).ok_or_else(|| {
            Problem::new(ProblemKind::Exhausted, "all LUNs are taken").remedy("remove a disk first")
        })?,
    };
    let shown = Shown {
        name: name.to_owned(),
        read_only: false,
    };
    luns.insert(lun, shown);
    Ok(lun)
}

/// LUNs while they are served.
pub(crate) struct ScsiShare<H: DiskHandle> {
    base: Base,
    /// Empty when all has ended.
    servers: Mutex<Vec<Arc<VhostUserScsiServer<H>>>>,
    luns: Mutex<BTreeMap<u16, Shown>>,
    open: Open<H>,
    forget: Forget,
    own: Weak<Self>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<H: DiskHandle> ScsiShare<H> {
    /// `disks` are those that the servers show already: names, sources, units.
    pub(crate) fn new(
        base: Base,
        servers: Vec<VhostUserScsiServer<H>>,
        disks: Vec<(String, String, NewUnit<H>)>,
        open: Open<H>,
        forget: Forget,
    ) -> Arc<Self> {
        let share = Arc::new_cyclic(|own| Self {
            base,
            servers: Mutex::new(servers.into_iter().map(Arc::new).collect()),
            luns: Mutex::default(),
            open,
            forget,
            own: Weak::clone(own),
        });
        for (lun, (name, source, new)) in (0..).zip(disks) {
            share.kept(lun, &name, source, new);
        }
        share
    }

    fn servers(&self) -> Vec<Arc<VhostUserScsiServer<H>>> {
        lock(&self.servers).clone()
    }

    /// A unit is shown.
    fn kept(&self, lun: u16, name: &str, source: String, new: NewUnit<H>) {
        let shown = Shown {
            name: name.to_owned(),
            read_only: new.unit.options().read_only,
        };
        lock(&self.luns).insert(lun, shown);
        if let Some(hook) = new.resized {
            let own = Weak::clone(&self.own);
            hook.tell(move || {
                if let Some(share) = own.upgrade() {
                    let servers = share.servers();
                    servers
                        .iter()
                        .for_each(|server| server.handle().size_changed(0, lun));
                }
            });
        }
        let guard = new.guard;
        self.base.keep(name, Opened { source, guard });
    }

    /// Ends everything: what is in flight first.
    pub(crate) fn end(&self) {
        let servers = std::mem::take(&mut *lock(&self.servers));
        drop(servers);
        self.base.close_all();
    }

    /// None if it is being added or removed.
    fn disk(&self, lun: u16, shown: &Shown, servers: &[Arc<VhostUserScsiServer<H>>]) -> Option<SharedDisk> {
        let size = servers.first()?.handle().size(0, lun)?;
        let connected = servers.iter().filter(|server| server.is_connected());
        Some(SharedDisk {
            name: shown.name.clone(),
            source: self.base.source(&shown.name),
            target: None,
            lun: Some(lun),
            socket: None,
            size,
            read_only: shown.read_only,
            clients: number(connected.count()),
            counts: None,
            latencies: None,
        })
    }

    /// Shows a unit at all sockets, or at none.
    fn show(&self, lun: u16, name: &str, new: &NewUnit<H>) -> Result<(), Problem> {
        let servers = self.servers();
        if servers.is_empty() {
            return Err(share_manage::is_stopping());
        }
        for (place, server) in servers.iter().enumerate() {
            let (unit, controls) = (Arc::clone(&new.unit), Arc::clone(&new.controls));
            let added = server
                .handle()
                .add((0, lun), unit, new.disk.clone(), controls, None);
            if let Err(error) = added {
                self.hide(lun, &servers[..place]);
                return Err(problem(ProblemKind::Conflict, name, &error));
            }
        }
        Ok(())
    }

    /// Takes a unit from the servers, and waits until nothing uses its disk any more. False if none had it.
    fn hide(&self, lun: u16, servers: &[Arc<VhostUserScsiServer<H>>]) -> bool {
        let removed: Vec<_> = servers
            .iter()
            .filter_map(|server| server.handle().remove(0, lun))
            .collect();
        while !removed.iter().all(|unit| unit.is_idle()) {
            std::thread::sleep(LOOK);
        }
        !removed.is_empty()
    }
}

impl<H: DiskHandle> Share for ScsiShare<H> {
    fn status(&self) -> Result<ShareStatus, Problem> {
        let servers = self.servers();
        let luns = lock(&self.luns).clone();
        let disks = luns
            .iter()
            .filter_map(|(lun, shown)| self.disk(*lun, shown, &servers));
        let mut clients = Vec::new();
        for ((place, server), socket) in servers.iter().enumerate().zip(&self.base.addresses) {
            for client in server.clients() {
                clients.push(ShareClient {
                    id: id_of_front_end(place, client.number),
                    addresses: std::iter::once(socket.clone())
                        .chain(process(client.process))
                        .collect(),
                    initiator: None,
                    target: None,
                    disk: None,
                    since_ms: since(client.since),
                    counts: counts(&server.counters()),
                });
            }
        }
        Ok(self.base.status(Vec::new(), disks.collect(), clients))
    }

    fn add(&self, disk: ShareDisk) -> Result<SharedDisk, Problem> {
        has_no(
            ShareKind::VhostUserScsi,
            &[
                ("target", disk.target.is_some()),
                ("socket", disk.socket.is_some()),
            ],
        )?;
        let meant = self.base.meant(&disk, str::to_owned)?;
        let lun = take(&mut lock(&self.luns), &meant.name, disk.lun)?;
        let opened = (self.open)(lun, &meant).and_then(|new| match self.show(lun, &meant.name, &new) {
            Ok(()) => Ok(new),
            Err(problem) => {
                (self.forget)(lun);
                let guard = new.guard;
                drop((new.unit, new.disk, new.resized));
                guard.into_iter().for_each(DiskGuard::close);
                Err(problem)
            }
        });
        let new = opened.inspect_err(|_| drop(lock(&self.luns).remove(&lun)))?;
        self.kept(lun, &meant.name, meant.source.clone(), new);
        logs::say(&format!("smsvmm: {} is served as LUN {lun}", meant.name));
        let shown = lock(&self.luns).get(&lun).cloned();
        let told = shown.and_then(|shown| self.disk(lun, &shown, &self.servers()));
        told.ok_or_else(|| no_disk(&meant.name))
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let found = lock(&self.luns)
            .iter()
            .find(|(_, shown)| shown.name == name)
            .map(|(lun, _)| *lun);
        let lun = found.ok_or_else(|| no_disk(name))?;
        if !self.hide(lun, &self.servers()) {
            // It is being added or removed, or all has ended.
            return Err(no_disk(name));
        }
        (self.forget)(lun);
        self.base.close(name);
        lock(&self.luns).remove(&lun);
        logs::say(&format!("smsvmm: {name} is served no more"));
        Ok(())
    }

    fn disconnect(&self, client: &str) -> Result<(), Problem> {
        let (place, number): (usize, u64) = front_end(client)?;
        let server = self.servers().get(place).cloned();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lun_is_the_lowest_that_is_free_or_the_one_that_is_wanted() {
        let mut luns = BTreeMap::new();
        assert_eq!(take(&mut luns, "a", None).unwrap(), 0);
        assert_eq!(take(&mut luns, "b", Some(2)).unwrap(), 2);
        assert_eq!(take(&mut luns, "c", None).unwrap(), 1);
        let taken = take(&mut luns, "d", Some(2)).unwrap_err();
        assert!(taken.detail.contains("LUN 2 is taken by b"), "{taken}");
        let taken = take(&mut luns, "a", None).unwrap_err();
        assert_eq!(taken.kind, ProblemKind::Conflict);
        let beyond = take(&mut luns, "d", Some(MAX_LUNS)).unwrap_err();
        assert_eq!(beyond.kind, ProblemKind::Invalid);
    }
}
