//! The store of an open pool: takes one configuration after the other.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, IoError, cover};
use tracing::{debug, warn};

use super::choose::holders;
use super::media::Media;
use super::quorum::{self, Set};
use super::together;
use crate::format::slot::{self, Header};
use crate::format::{CheckError, Label, encode};
use crate::model::{Configuration, DeviceId, DeviceState, MAX_INCARNATIONS, Uuid};

/// A configuration was taken.
#[derive(Debug)]
pub struct Committed {
    /// Holders that did not take it. They must be faulty in the next one, before anything else is acknowledged.
    pub failed: Vec<(DeviceId, IoError)>,
}

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It makes no sense. Nothing was written.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// It does not follow the present one. Nothing was written.
    #[error("configuration of epoch {epoch} does not follow the one of epoch {current}: {problem}")]
    NotNext {
        /// Its epoch.
        epoch: u64,
        /// The present epoch.
        current: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// It counts on a device that cannot hold it. Nothing was written.
    #[error("device {device} cannot hold the configuration: {problem}")]
    Device {
        /// Which.
        device: DeviceId,
        /// Why not.
        problem: &'static str,
    },
    /// It is too large. Nothing was written.
    #[error(
        "the configuration has {needed} bytes, and device {device} has room for {room}: use larger devices, or fewer volumes"
    )]
    TooLarge {
        /// The device with the smallest slots.
        device: DeviceId,
        /// Bytes needed.
        needed: u64,
        /// Bytes of its slots.
        room: u64,
    },
    /// Too few devices took it. Nobody knows whether the next opening finds it, so nothing may be acknowledged until the same
    /// one, or another of the same epoch, is taken: say one in which the failed devices are faulty. Without that, the pool must
    /// be closed.
    #[error(
        "{taken} of {wanted} devices took the configuration, which is not enough: check the pool's devices"
    )]
    NotDurable {
        /// Devices that took it.
        taken: usize,
        /// Devices that should have.
        wanted: usize,
        /// What the others say.
        failed: Vec<(DeviceId, IoError)>,
    },
}

/// The devices of an open pool, and the newest configuration on them.
#[derive(Debug)]
pub struct Store<D> {
    devices: BTreeMap<DeviceId, Media<D>>,
    current: Option<Configuration>,
    term: u64,
    /// The next commit begins an incarnation, forced or not.
    begins: Option<bool>,
    /// Holders that did not take the current one.
    failed: Set,
    /// Those that were tried and are not durable, one after the other.
    pending: Vec<Pending>,
}

impl<D> Store<D> {
    pub(crate) fn opened(
        devices: BTreeMap<DeviceId, Media<D>>,
        current: Configuration,
        term: u64,
        forced: bool,
        failed: Set,
    ) -> Self {
        Self {
            devices,
            current: Some(current),
            term,
            begins: Some(forced),
            failed,
            pending: Vec::new(),
        }
    }

    /// A store without devices and without a configuration, for a new pool. Add devices, then commit the first one.
    pub fn new() -> Self {
        Self {
            devices: BTreeMap::new(),
            current: None,
            term: 1,
            begins: Some(false),
            failed: Set::new(),
            pending: Vec::new(),
        }
    }

    /// Has the device that [`format_device`](super::format_device) gave `label` take part from the next commit on.
    pub fn add_device(&mut self, id: DeviceId, device: Rc<D>, label: Label) {
        let media = Media {
            device,
            label,
            sequence: 0,
            next: 0,
        };
        self.devices.insert(id, media);
    }

    /// Has a device of the pool that comes back take part from the next commit on.
    pub(super) fn put_back(&mut self, id: DeviceId, media: Media<D>) {
        self.devices.insert(id, media);
    }

    /// Lets go of a device. It must be no holder of the current configuration.
    ///
    /// # Errors
    /// It is a holder: commit a configuration without it first.
    pub fn remove_device(&mut self, id: DeviceId) -> Result<Option<Rc<D>>, CommitError> {
        let holds = self
            .current
            .as_ref()
            .is_some_and(|current| holders(current).contains(&id));
        if holds {
            let problem = "it is in use: it must be faulty or gone before it is let go";
            return Err(CommitError::Device { device: id, problem });
        }
        Ok(self.devices.remove(&id).map(|media| media.device))
    }

    /// A device that is open.
    pub fn device(&self, id: DeviceId) -> Option<&Rc<D>> {
        self.devices.get(&id).map(|media| &media.device)
    }

    /// The label of a device that is open.
    pub fn label(&self, id: DeviceId) -> Option<&Label> {
        self.devices.get(&id).map(|media| &media.label)
    }

    /// The devices that are open, in order of their numbers.
    pub fn devices(&self) -> impl Iterator<Item = (DeviceId, &Rc<D>)> {
        self.devices.iter().map(|(id, media)| (*id, &media.device))
    }

    /// The newest configuration.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.current.as_ref()
    }
}

impl<D> Default for Store<D> {
    fn default() -> Self {
        Self::new()
    }
}

/// A configuration that too few devices took.
#[derive(Debug)]
struct Pending {
    configuration: Configuration,
    have: Set,
}

/// One commit, prepared.
struct Round {
    holders: Set,
    /// Who gets it: holders, and those that stop being holders without having failed.
    targets: Set,
    previous: Vec<Set>,
    payload: Vec<u8>,
    header: Header,
}

impl<D: BlockDevice> Store<D> {
    /// Makes `next` the configuration of the pool.
    ///
    /// # Errors
    /// It is refused, or too few devices took it.
    pub async fn commit(&mut self, next: &Configuration) -> Result<Committed, CommitError> {
        let mut round = self.prepare(next)?;
        let mut have = match self.pending.pop_if(|pending| pending.configuration == *next) {
            Some(pending) => {
                cover!("store: a commit is tried again");
                pending.have
            }
            None => Set::new(),
        };
        let mut failed = self.write(&round, &mut have).await;
        if !quorum::is_durable(&round.previous, &round.holders, &have) {
            cover!("store: a commit is not durable");
            let (taken, wanted) = (have.len(), round.targets.len());
            let configuration = next.clone();
            self.pending.push(Pending { configuration, have });
            return Err(CommitError::NotDurable {
                taken,
                wanted,
                failed,
            });
        }
        self.pending.clear();
        // Where several devices went at once, those that are left could be too few of the previous holders to open it, should
        // another one be missing then. Now that it is durable, it needs them no more: say so.
        let differs = |previous: &Set| previous.symmetric_difference(&round.holders).count() > 1;
        if round.previous.iter().any(differs) {
            cover!("store: a change of several devices is confirmed");
            round.header.previous = vec![round.holders.iter().copied().collect()];
            round.targets = have.intersection(&round.holders).copied().collect();
            failed.append(&mut self.write(&round, &mut Set::new()).await);
        }
        failed.retain(|(id, _)| round.holders.contains(id));
        self.failed = failed.iter().map(|(id, _)| *id).collect();
        for (id, error) in &failed {
            cover!("store: a holder does not take a commit");
            warn!(device = %id, epoch = next.epoch, %error, "a device does not take the configuration");
        }
        debug!(
            epoch = next.epoch,
            devices = have.len(),
            "configuration committed"
        );
        self.current = Some(next.clone());
        self.begins = None;
        Ok(Committed { failed })
    }

    /// Checks `next` against the rules; writes nothing.
    fn prepare(&self, next: &Configuration) -> Result<Round, CommitError> {
        let payload = encode(next)?;
        self.check_next(next)?;
        let holders = holders(next);
        let mut targets = holders.clone();
        let mut previous = Vec::new();
        if let Some(current) = &self.current {
            let before = super::choose::holders(current);
            let faulty = |id: &DeviceId| next.device(*id).is_some_and(|device| !device.is_holder());
            let leaving = before
                .iter()
                .filter(|id| self.devices.contains_key(id) && !faulty(id));
            targets.extend(leaving.filter(|id| !self.failed.contains(id)));
            // By force the missing holders are not asked.
            previous.push(if self.begins == Some(true) {
                holders.clone()
            } else {
                before
            });
        }
        // Trying the same one again is no new attempt.
        let again = self
            .pending
            .last()
            .is_some_and(|pending| pending.configuration == *next);
        let tried = self.pending.iter().take(self.pending.len() - usize::from(again));

        let attempt = u32::try_from(tried.clone().count()).unwrap_or(u32::MAX);
        previous.extend(tried.map(|pending| super::choose::holders(&pending.configuration)));
        previous.dedup();
        for id in &holders {
            self.check_holder(*id, next)?;
        }
        let lists: Vec<Vec<DeviceId>> = previous.iter().map(|set| set.iter().copied().collect()).collect();
        let needed = slot::size(&lists, payload.len());
        for id in &targets {
            let room = self.devices.get(id).map_or(0, |media| media.label.slot_size);
            if needed > room {
                let device = *id;
                return Err(CommitError::TooLarge { device, needed, room });
            }
        }
        let header = Header {
            pool: next.pool,
            device: Uuid::default(),
            incarnation: next.incarnations.last().map(|last| last.id).unwrap_or_default(),
            epoch: next.epoch,
            term: self.term,
            claimed: self.term,
            sequence: 0,
            attempt,
            number: DeviceId(0),
            previous: lists,
        };
        Ok(Round {
            holders,
            targets,
            previous,
            payload,
            header,
        })
    }

    fn check_next(&self, next: &Configuration) -> Result<(), CommitError> {
        let current_epoch = self.current.as_ref().map_or(0, |current| current.epoch);
        let refuse = |problem| {
            let (epoch, current) = (next.epoch, current_epoch);
            Err(CommitError::NotNext {
                epoch,
                current,
                problem,
            })
        };
        if self.pending.len() >= slot::MAX_PREVIOUS - 1 {
            return refuse("too many others were tried in vain: close the pool and check its devices");
        }
        if next.epoch != current_epoch + 1 {
            return refuse("its epoch is not the next one");
        }
        let mut history = match &self.current {
            Some(current) if current.pool != next.pool => return refuse("it is of another pool"),
            Some(current) => current.incarnations.clone(),
            None => Vec::new(),
        };
        if let Some(forced) = self.begins {
            let Some(last) = next.incarnations.last() else {
                return refuse("it has no incarnation");
            };
            if last.first_epoch != next.epoch || last.forced != forced {
                return refuse("it must begin an incarnation, forced if the opening was");
            }
            history.push(last.clone());
            if history.len() > MAX_INCARNATIONS {
                history.remove(0);
            }
        }
        if history != next.incarnations {
            return refuse("its incarnations are not those of the present one");
        }
        Ok(())
    }

    fn check_holder(&self, id: DeviceId, next: &Configuration) -> Result<(), CommitError> {
        let refuse = |problem| Err(CommitError::Device { device: id, problem });
        let (Some(media), Some(device)) = (self.devices.get(&id), next.device(id)) else {
            return refuse("it is not open: it must be faulty");
        };
        if self.failed.contains(&id) {
            return refuse("it did not take the last one: it must be faulty");
        }
        let Label {
            device: identity,
            pool,
            data_start,
            ..
        } = media.label;
        if identity != device.uuid || pool != next.pool {
            return refuse("its label is another's");
        }
        if data_start != device.data_start || device.size > media.device.size() {
            return refuse("its size or its private region is another");
        }
        Ok(())
    }

    /// Writes to all targets that are not in `have`, and adds to it those that take it.
    async fn write(&mut self, round: &Round, have: &mut Set) -> Vec<(DeviceId, IoError)> {
        let devices = self.devices.iter_mut();
        let targets = devices.filter(|(id, _)| round.targets.contains(id) && !have.contains(id));
        let writes = targets.map(|(id, media)| async move {
            let header = Header {
                number: *id,
                ..round.header.clone()
            };
            let result = media.put(header, &round.payload).await;
            (*id, result)
        });
        let results = together::all(writes).await;
        let mut failed = Vec::new();
        for (id, result) in results {
            match result {
                Ok(()) => {
                    have.insert(id);
                }
                Err(error) => failed.push((id, error)),
            }
        }
        failed
    }

    /// Whether a device is a holder of the current configuration.
    pub fn is_holder(&self, id: DeviceId) -> bool {
        let device = self.current.as_ref().and_then(|current| current.device(id));
        device.is_some_and(|device| !matches!(device.state, DeviceState::Faulty { .. }))
    }
}
