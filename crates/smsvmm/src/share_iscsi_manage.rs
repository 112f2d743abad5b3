//! `smsvmm share iscsi` while it serves: LUNs that come and go, sessions that must go (`share_manage` says what is common).
//!
//! A LUN's number is what access lists name, and what initiators know a disk by. So a number that an access list shows to somebody stays that
//! of the disk that was meant: another disk never gets it, however free it is. A disk that was removed gets its old number when it comes
//! again, unless another one is asked for.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::{
    EventLog, Problem, ProblemKind, Share, ShareAccess, ShareClient, ShareDisk, ShareKind, ShareStatus,
    ShareTarget, SharedDisk, StorageAnswer, StorageRequest,
};
use block_io::BlockDevice;
use storage_manager::DiskGuard;
use storage_virtualizer::iscsi::{
    IscsiControl, IscsiManageError, IscsiServerError, IscsiTarget, SessionState, UnitState,
};
use storage_virtualizer::scsi::MAX_LUNS;

use crate::logs;
use crate::share_manage::{
    self, Base, Meant, Opened, counts, has_no, is_stopping, latencies, lun_beyond, lun_taken, name_taken,
    no_client, no_disk, number, problem, since,
};

/// A target's place among the targets, and a LUN of it.
pub(crate) type PlaceOfLun = (usize, u16);

/// Opens a disk and has the target show it at a place.
pub(crate) type Open<D> =
    Box<dyn Fn(&IscsiControl<D>, PlaceOfLun, &Meant) -> Result<Option<DiskGuard>, Problem> + Send + Sync>;

/// What else forgets a disk that was removed.
pub(crate) type Forget = Box<dyn Fn(PlaceOfLun) + Send + Sync>;

/// Which disk is at which place.
struct Places {
    targets: Vec<IscsiTarget>,
    /// As it was in the beginning: what access lists mean.
    first: BTreeMap<PlaceOfLun, String>,
    now: Mutex<BTreeMap<PlaceOfLun, String>>,
}

impl Places {
    fn new(targets: &[IscsiTarget], disks: BTreeMap<PlaceOfLun, String>) -> Self {
        Self {
            targets: targets.to_vec(),
            first: disks.clone(),
            now: Mutex::new(disks),
        }
    }

    fn now(&self) -> MutexGuard<'_, BTreeMap<PlaceOfLun, String>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, name: &str) -> Option<PlaceOfLun> {
        let now = self.now();
        now.iter()
            .find(|(_, other)| *other == name)
            .map(|(place, _)| *place)
    }

    /// The target that is meant.
    fn target(&self, wanted: Option<&str>) -> Result<usize, Problem> {
        let names = || {
            let names: Vec<&str> = self.targets.iter().map(|target| target.name.as_str()).collect();
            names.join(", ")
        };
        match wanted {
            None if self.targets.len() == 1 => Ok(0),
            None => Err(Problem::new(ProblemKind::Invalid, "there are several targets")
                .about("target")
                .remedy(format!("say which one: {}", names()))),
            Some(name) => {
                let same = |target: &IscsiTarget| target.name.eq_ignore_ascii_case(name);
                self.targets.iter().position(same).ok_or_else(|| {
                    Problem::new(ProblemKind::NotFound, "there is no such target")
                        .about(name)
                        .remedy(format!("there are {}", names()))
                })
            }
        }
    }

    /// The disk that access lists mean by a place, if they name it.
    fn meant_by(&self, place: PlaceOfLun) -> Option<&str> {
        let target = self.targets.get(place.0)?;
        let named = target
            .access
            .iter()
            .any(|access| access.luns.as_ref().is_some_and(|luns| luns.contains(&place.1)));
        named.then(|| self.first.get(&place).map_or("another disk", String::as_str))
    }

    /// Takes a place for a disk, which nobody else gets until it is given back.
    fn take(&self, name: &str, target: usize, lun: Option<u16>) -> Result<PlaceOfLun, Problem> {
        let mut now = self.now();
        if now.values().any(|other| other == name) {
            return Err(name_taken(name));
        }
        let is_others = |place: PlaceOfLun| self.meant_by(place).is_some_and(|meant| meant != name);
        let place = match lun {
            Some(lun) => {
                let place = (target, lun);
                if lun >= MAX_LUNS {
                    return Err(lun_beyond(lun));
                }
                if let Some(other) = now.get(&place) {
                    return Err(lun_taken(format!("LUN {lun} is taken by {other}")));
                }
                if is_others(place) {
                    let other = self.meant_by(place).unwrap_or_default();
                    let detail = format!("LUN {lun} is {other} for those to whom --access shows it");
                    return Err(lun_taken(detail));
                }
                place
            }
            None => {
                let own = self.first.iter().find(|(_, other)| *other == name);
                let own = own.map(|(place, _)| *place).filter(|place| place.0 == target);
                let all = own.into_iter().chain((0..MAX_LUNS).map(|lun| (target, lun)));
                let mut free = all.filter(|place| !now.contains_key(place) && !is_others(*place));
                free.next().ok_or_else(|| {
                    Problem::new(ProblemKind::Exhausted, "all LUNs of the target are taken")
                        .remedy("remove a disk first")
                })?
            }
        };
        now.insert(place, name.to_owned());
        Ok(place)
    }

    fn give_back(&self, place: PlaceOfLun) {
        self.now().remove(&place);
    }
}

/// Logical units while they are served.
pub(crate) struct IscsiShare<D: BlockDevice + 'static> {
    pub(crate) base: Base,
    places: Places,
    control: IscsiControl<D>,
    open: Open<D>,
    forget: Forget,
}

impl<D: BlockDevice + 'static> IscsiShare<D> {
    /// `disks` are those that are served already.
    pub(crate) fn new(
        base: Base,
        (targets, disks): (&[IscsiTarget], BTreeMap<PlaceOfLun, String>),
        control: IscsiControl<D>,
        open: Open<D>,
        forget: Forget,
    ) -> Self {
        Self {
            base,
            places: Places::new(targets, disks),
            control,
            open,
            forget,
        }
    }

    fn target_name(&self, target: usize) -> Option<String> {
        self.places.targets.get(target).map(|target| target.name.clone())
    }

    fn disk(&self, unit: &UnitState) -> SharedDisk {
        let name = self.places.now().get(&(unit.target, unit.lun)).cloned();
        let name = name.unwrap_or_default();
        SharedDisk {
            source: self.base.source(&name),
            name,
            target: self.target_name(unit.target),
            lun: Some(unit.lun),
            socket: None,
            size: unit.size,
            read_only: unit.read_only,
            clients: number(unit.sessions),
            counts: Some(counts(&unit.counters)),
            latencies: Some(latencies(&unit.counters)),
        }
    }

    fn client(&self, session: SessionState) -> ShareClient {
        ShareClient {
            id: session.number.to_string(),
            addresses: session.peers,
            initiator: Some(session.initiator),
            target: session.target.and_then(|target| self.target_name(target)),
            disk: None,
            since_ms: since(session.since),
            counts: counts(&session.counters),
        }
    }

    fn targets(&self) -> Vec<ShareTarget> {
        let shown = |target: &IscsiTarget| ShareTarget {
            name: target.name.clone(),
            access: target
                .access
                .iter()
                .map(|access| ShareAccess {
                    initiator: access.initiator.clone().unwrap_or_else(|| "*".to_owned()),
                    chap: access.chap.is_some(),
                    luns: access.luns.as_ref().map(|luns| luns.iter().copied().collect()),
                })
                .collect(),
        };
        self.places.targets.iter().map(shown).collect()
    }
}

impl<D: BlockDevice + 'static> Share for IscsiShare<D> {
    fn status(&self) -> Result<ShareStatus, Problem> {
        let (units, sessions) = self.control.state().map_err(|_| is_stopping())?;
        let disks = units.iter().map(|unit| self.disk(unit)).collect();
        let clients = sessions.into_iter().map(|session| self.client(session));
        Ok(self.base.status(self.targets(), disks, clients.collect()))
    }

    fn add(&self, disk: ShareDisk) -> Result<SharedDisk, Problem> {
        has_no(ShareKind::Iscsi, &[("socket", disk.socket.is_some())])?;
        let meant = self.base.meant(&disk, str::to_owned)?;
        let target = self.places.target(disk.target.as_deref())?;
        let place = self.places.take(&meant.name, target, disk.lun)?;
        let guard =
            (self.open)(&self.control, place, &meant).inspect_err(|_| self.places.give_back(place))?;
        let source = meant.source.clone();
        self.base.keep(&meant.name, Opened { source, guard });
        logs::say(&format!("smsvmm: {} is served as LUN {}", meant.name, place.1));
        let (units, _) = self.control.state().map_err(|_| is_stopping())?;
        let own = units.iter().find(|unit| (unit.target, unit.lun) == place);
        own.map(|unit| self.disk(unit))
            .ok_or_else(|| no_disk(&meant.name))
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let place = self.places.of(name).ok_or_else(|| no_disk(name))?;
        match self.control.remove(place.0, place.1) {
            Ok(()) => {}
            // It is being added or removed.
            Err(IscsiManageError::NoUnit { .. }) => return Err(no_disk(name)),
            Err(_) => return Err(is_stopping()),
        }
        (self.forget)(place);
        self.base.close(name);
        self.places.give_back(place);
        logs::say(&format!("smsvmm: {name} is served no more"));
        Ok(())
    }

    fn disconnect(&self, client: &str) -> Result<(), Problem> {
        let number = client.parse().map_err(|_| no_client(client))?;
        match self.control.close(number) {
            Ok(()) => Ok(()),
            Err(IscsiManageError::NoSession(_)) => Err(no_client(client)),
            Err(_) => Err(is_stopping()),
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

/// Why a target does not show a disk.
pub(crate) fn refused(name: &str, error: &IscsiServerError) -> Problem {
    match error {
        IscsiServerError::Stopping | IscsiServerError::NoWorker => is_stopping(),
        IscsiServerError::Unit(_) => problem(ProblemKind::Conflict, name, error),
        _ => problem(ProblemKind::Host, name, error),
    }
}

#[cfg(test)]
mod tests {
    use storage_virtualizer::iscsi::Access;

    use super::*;

    fn places() -> Places {
        let some = IscsiTarget {
            access: vec![
                Access {
                    initiator: Some("iqn.i".to_owned()),
                    luns: Some([1].into()),
                    chap: None,
                },
                Access::everybody(),
            ],
            ..IscsiTarget::open("iqn.t")
        };
        let disks = [((0, 0), "a"), ((0, 1), "b")];
        let disks = disks.map(|(place, name)| (place, name.to_owned()));
        Places::new(&[some, IscsiTarget::open("iqn.u")], disks.into())
    }

    #[test]
    fn a_disk_gets_the_lowest_free_lun_or_the_one_that_it_had() {
        let places = places();
        assert_eq!(places.take("c", 0, None).unwrap(), (0, 2));
        assert_eq!(places.take("d", 1, Some(7)).unwrap(), (1, 7));
        places.give_back((0, 0));
        assert_eq!(places.take("e", 0, None).unwrap(), (0, 0));
        places.give_back((0, 1));
        assert_eq!(places.take("b", 0, None).unwrap(), (0, 1));
        assert_eq!(places.of("b"), Some((0, 1)));
    }

    #[test]
    fn a_lun_that_is_shown_to_somebody_stays_that_of_the_disk_that_was_meant() {
        let places = places();
        places.give_back((0, 1));
        let problem = places.take("c", 0, Some(1)).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Conflict);
        assert!(problem.detail.contains("LUN 1 is b"), "{problem}");
        assert_eq!(places.take("c", 0, None).unwrap(), (0, 2));
        assert_eq!(places.take("b", 0, Some(1)).unwrap(), (0, 1));
    }

    #[test]
    fn taken_names_and_luns_and_unknown_targets_are_refused() {
        let places = places();
        let taken = places.take("a", 0, None).unwrap_err();
        assert!(taken.detail.contains("a is served already"), "{taken}");
        let taken = places.take("c", 0, Some(0)).unwrap_err();
        assert!(taken.detail.contains("LUN 0 is taken by a"), "{taken}");
        assert_eq!(
            places.take("c", 0, Some(MAX_LUNS)).unwrap_err().kind,
            ProblemKind::Invalid
        );
        assert!(
            places
                .target(None)
                .unwrap_err()
                .to_string()
                .contains("iqn.t, iqn.u")
        );
        assert_eq!(
            places.target(Some("iqn.v")).unwrap_err().kind,
            ProblemKind::NotFound
        );
        assert_eq!(places.target(Some("IQN.U")).unwrap(), 1);
    }
}
