//! Which regions of which volumes are hot: written lately, so that members may differ there after a crash.
//!
//! # Rules
//! 1. A region is written only by who holds a [`Guard`] for it, and a guard is given only when the region is durable in the logs
//!    of *all* log devices of its volume. Any one of them that is left after a crash knows all regions that were being written.
//! 2. A region leaves only after its volume was flushed since the last write to it ended, and, if members are detached, after
//!    its bit is durable in the volume's bitmap: see [`Release`]. Otherwise a power cut could take from one member what another
//!    has, in a region that no log names.
//! 3. Leaving is lazy: the next transaction does not name the region any more. Until then it is only resynced for nothing.
//! 4. A log that fails is not used again: all that need it get its error until the owner has *first* made a configuration
//!    durable that does not name it, and *then* called [`HotRegions::remove_log`]. Otherwise a crash could bring the failed device
//!    back alone, with an old log.
//! 5. After a crash the newest transaction among the logs of a volume counts; the logs of a pool share one count of
//!    transactions, so they can be compared. At most [`Limits::new_regions`] entries are added to a log before it is written
//!    again, and so many of its 1016 entries are kept free, so what the logs say always fits into them again.
//!
//! # Group commit
//! Who makes a region hot enters it in the next transaction of its logs. If none is being written, it writes that itself, else
//! it waits for the end, and then one of those who wait writes one transaction for all.

mod table;

use std::cell::RefCell;
use std::future::Future;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::sync::Arc;

use block_io::{BlockDevice, IoError, cover};

use self::table::{LogIndex, Obstacle, Table};
use super::LogError;
use super::activity::{ActivityLog, ENTRIES, Region};
use super::gate::{Gate, join_all};
use crate::model::{DeviceId, VolumeId};

/// Sizes; tests make them small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most hot regions in a log.
    pub regions: usize,
    /// Most regions that are added to a log by one transaction, and most of one request.
    pub new_regions: usize,
    /// So many leave together when a log is full, as every departure costs a flush.
    pub evicted: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            regions: ENTRIES - 64,
            new_regions: 64,
            evicted: 64,
        }
    }
}

/// What the owner does before regions leave the logs.
pub trait Release {
    /// Makes all writes to `volume` that ended before the call durable on all members that are not detached, and *then*, if
    /// members are detached (also those that this flush has shown to be bad), sets the regions' bits in the volume's bitmap
    /// durably. Must not acquire regions.
    fn release(&self, volume: VolumeId, regions: &[u32]) -> impl Future<Output = Result<(), IoError>>;
}

#[derive(Debug)]
struct Shared {
    table: RefCell<Table>,
    /// A transaction has ended.
    commits: Gate,
    /// A region has become idle or has left.
    places: Gate,
}

/// The hot regions of a pool.
#[derive(Debug)]
pub struct HotRegions<D> {
    shared: Rc<Shared>,
    limits: Limits,
    logs: RefCell<Vec<Option<Rc<ActivityLog<D>>>>>,
}

/// Some regions of a volume that stay hot, and may be written, as long as it lives.
#[derive(Debug)]
pub struct Guard {
    shared: Rc<Shared>,
    volume: VolumeId,
    regions: RangeInclusive<u32>,
}

impl Guard {
    /// Their volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Which ones.
    pub fn regions(&self) -> RangeInclusive<u32> {
        self.regions.clone()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let idle = self.shared.table.borrow_mut().unuse(self.volume, &self.regions);
        if idle {
            self.shared.places.open();
        }
    }
}

impl<D: BlockDevice + 'static> HotRegions<D> {
    /// Without logs and volumes.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits {
            regions: limits.regions.clamp(1, ENTRIES),
            new_regions: limits.new_regions.clamp(1, limits.regions.clamp(1, ENTRIES)),
            evicted: limits.evicted.max(1),
        };
        Self {
            shared: Rc::new(Shared {
                table: RefCell::new(Table::new(limits)),
                commits: Gate::default(),
                places: Gate::default(),
            }),
            limits,
            logs: RefCell::default(),
        }
    }

    /// Puts a log into service. When a pool is opened: all logs before the first volume.
    pub fn add_log(&self, log: ActivityLog<D>) {
        self.remove_log(log.device());
        let mut table = self.shared.table.borrow_mut();
        table.add_log(log.device(), log.opened().sequence);
        self.logs.borrow_mut().push(Some(Rc::new(log)));
    }

    /// Takes a log out of service: nothing is kept in it any more, and nobody waits for it. First make a configuration durable
    /// in which no volume names it.
    pub fn remove_log(&self, device: DeviceId) {
        let mut table = self.shared.table.borrow_mut();
        let Some(index) = table.log_of(device) else {
            return;
        };
        table.remove_log(index);
        drop(table);
        if let Some(log) = self.logs.borrow_mut().get_mut(index) {
            *log = None;
        }
        self.shared.commits.open();
        self.shared.places.open();
    }

    /// Adds a volume with its log devices (those that have no log here do not count), and gives its regions that were hot when
    /// the pool was last in use: members may differ there. A guard for each; it is dropped when the region is in sync.
    /// If the volume was shrunk, some may lie beyond its end: their guards are just dropped.
    ///
    /// # Errors
    /// There is no log for it, or what the logs say does not fit into them, which only damage to several of them can bring
    /// about; the volume is added nevertheless, without hot regions.
    pub fn add_volume(&self, volume: VolumeId, devices: &[DeviceId]) -> Result<Vec<Guard>, LogError> {
        let mut table = self.shared.table.borrow_mut();
        let logs: Vec<LogIndex> = devices.iter().filter_map(|id| table.log_of(*id)).collect();
        table.add_volume(volume, logs.clone());
        let all = self.logs.borrow();
        let opened = logs
            .iter()
            .filter_map(|log| Some(all.get(*log)?.as_ref()?.opened()));
        let newest = opened
            .max_by_key(|transaction| transaction.sequence)
            .ok_or(LogError::NoLog { volume })?;
        let ours = |region: &&Region| region.volume == volume;
        let regions: Vec<Region> = newest.regions.iter().filter(ours).copied().collect();
        table.restore(volume, &regions)?;
        let guard = |region: &Region| Guard {
            shared: Rc::clone(&self.shared),
            volume,
            regions: region.index..=region.index,
        };
        Ok(regions.iter().map(guard).collect())
    }

    /// Forgets a volume that was deleted, or has no redundancy any more. Nothing may be writing to it.
    pub fn remove_volume(&self, volume: VolumeId) {
        self.shared.table.borrow_mut().remove_volume(volume);
        self.shared.places.open();
    }

    /// Whether a volume was added.
    pub fn knows(&self, volume: VolumeId) -> bool {
        self.shared.table.borrow().knows(volume)
    }

    /// The hot regions of a volume, in order.
    pub fn regions(&self, volume: VolumeId) -> Vec<u32> {
        self.shared.table.borrow().regions_of(volume)
    }

    /// The regions, if they are hot already: without waiting, without allocation.
    pub fn try_acquire(&self, volume: VolumeId, regions: RangeInclusive<u32>) -> Option<Guard> {
        let durable = !regions.is_empty() && self.shared.table.borrow_mut().use_durable(volume, &regions);
        durable.then(|| Guard {
            shared: Rc::clone(&self.shared),
            volume,
            regions,
        })
    }

    /// The regions, as soon as they are hot. One guard per request at most, else requests could wait for each other for ever.
    ///
    /// # Errors
    /// A log of the volume has failed (see the rules); there is none; a request of too many regions; the owner could not release
    /// others. Nothing may be written then.
    pub async fn acquire(
        &self,
        volume: VolumeId,
        regions: RangeInclusive<u32>,
        release: &impl Release,
    ) -> Result<Guard, LogError> {
        if let Some(guard) = self.try_acquire(volume, regions.clone()) {
            return Ok(guard);
        }
        let count = u64::from(*regions.end()).saturating_sub((*regions.start()).into()) + 1;
        if regions.is_empty() || count > self.limits.new_regions as u64 {
            return Err(LogError::TooWide {
                volume,
                regions: count,
            });
        }
        loop {
            let pinned = self.shared.table.borrow_mut().pin(volume, &regions);
            match pinned {
                Ok(()) => break,
                Err(Obstacle::Never(error)) => return Err(error),
                Err(obstacle) => self.overcome(&obstacle, release).await?,
            }
        }
        let guard = Guard {
            shared: Rc::clone(&self.shared),
            volume,
            regions,
        };
        loop {
            let pending = self.shared.table.borrow().pending(volume, &guard.regions)?;
            if pending.is_empty() {
                return Ok(guard);
            }
            let commits = pending.into_iter().map(|(log, added)| self.commit(log, added));
            for result in join_all(commits).await {
                result?;
            }
        }
    }

    /// Changes the log devices of a volume. Returns when all its hot regions are durable in all of them.
    ///
    /// To change them: name old and new ones, make the configuration durable, name only the new ones.
    ///
    /// # Errors
    /// A log that the volume did not have before has failed; there is none; the owner could not release others. The volume then
    /// has the new logs or still the old ones.
    pub async fn set_log_devices(
        &self,
        volume: VolumeId,
        devices: &[DeviceId],
        release: &impl Release,
    ) -> Result<(), LogError> {
        let (old, new) = {
            let table = self.shared.table.borrow();
            let mut new: Vec<LogIndex> = devices.iter().filter_map(|id| table.log_of(*id)).collect();
            new.dedup();
            (table.logs_of(volume).to_vec(), new)
        };
        if new.is_empty() {
            return Err(LogError::NoLog { volume });
        }
        loop {
            let changed = self.shared.table.borrow_mut().change_logs(volume, &new);
            match changed {
                Ok(()) => break,
                Err(Obstacle::Never(error)) => return Err(error),
                Err(obstacle) => self.overcome(&obstacle, release).await?,
            }
        }
        let targets: Vec<(LogIndex, u64)> = {
            let table = self.shared.table.borrow();
            new.iter().map(|log| (*log, table.logs[*log].added)).collect()
        };
        let commits = targets.into_iter().map(|(log, added)| self.commit(log, added));
        for (log, result) in new.iter().zip(join_all(commits).await) {
            // An old one that fails is told to those who need it.
            if !old.contains(log) {
                result?;
            }
        }
        Ok(())
    }

    /// Lets regions leave that nobody used since the call before the last; returns how many. Call it now and then, and twice
    /// before an orderly end, so that nothing is resynced at the next start.
    ///
    /// # Errors
    /// The owner could not release them, or a log has failed.
    pub async fn clean_idle(&self, release: &impl Release) -> Result<usize, LogError> {
        let leaving = self.shared.table.borrow_mut().sweep();
        let left = self.leave(leaving, release).await?;
        let stale = self.shared.table.borrow_mut().stale_logs();
        for (log, change) in stale {
            self.commit(log, change).await?;
        }
        Ok(left)
    }

    async fn overcome(&self, obstacle: &Obstacle, release: &impl Release) -> Result<(), LogError> {
        match *obstacle {
            Obstacle::Crowded(log) => {
                cover!("hot regions: too many new ones for one transaction");
                let added = self.shared.table.borrow().logs[log].added;
                self.commit(log, added).await
            }
            Obstacle::Full(log) => {
                let leaving = self.shared.table.borrow_mut().evict(log);
                if leaving.is_empty() {
                    cover!("hot regions: all in use");
                    self.shared.places.next().await;
                    return Ok(());
                }
                cover!("hot regions: oldest ones leave");
                self.leave(leaving, release).await.map(drop)
            }
            Obstacle::Never(ref error) => Err(error.clone()),
        }
    }

    /// Lets regions, marked as leaving and in order, leave once their owner has released them.
    async fn leave(&self, regions: Vec<Region>, release: &impl Release) -> Result<usize, LogError> {
        let mut leaving = Leaving {
            shared: &self.shared,
            regions,
        };
        let mut left = 0;
        while let Some(last) = leaving.regions.last() {
            let volume = last.volume;
            let first = leaving.regions.partition_point(|region| region.volume < volume);
            let indexes: Vec<u32> = leaving.regions[first..]
                .iter()
                .map(|region| region.index)
                .collect();
            let released = release.release(volume, &indexes).await;
            released.map_err(|source| LogError::Release {
                volume,
                source: Arc::new(source),
            })?;
            let gone = leaving.regions.split_off(first);
            left += self.shared.table.borrow_mut().leave(&gone);
            self.shared.places.open();
        }
        Ok(left)
    }

    /// Makes the additions to a log up to `added` durable: writes the log, or lets another one.
    async fn commit(&self, index: LogIndex, added: u64) -> Result<(), LogError> {
        let turn = self.shared.commits.until(|| {
            let mut table = self.shared.table.borrow_mut();
            let log = &mut table.logs[index];
            if let Some(error) = &log.failed {
                return Some(Err(error.clone()));
            }
            if log.removed || log.durable >= added {
                return Some(Ok(None));
            }
            (!std::mem::replace(&mut log.busy, true)).then_some(Ok(Some(())))
        });
        if turn.await?.is_none() {
            return Ok(());
        }
        let mut turn = Turn {
            shared: &self.shared,
            log: index,
            covered: None,
            failed: None,
        };
        let Some(log) = self.logs.borrow().get(index).cloned().flatten() else {
            return Ok(());
        };
        let (sequence, covered, entries) = {
            let mut table = self.shared.table.borrow_mut();
            let sequence = table.sequence;
            table.sequence += 1;
            let log = &mut table.logs[index];
            log.stale = false;
            (sequence, log.added, log.entries.clone())
        };
        match log.write(sequence, &entries).await {
            Ok(()) => {
                turn.covered = Some(covered);
                Ok(())
            }
            Err(error) => {
                cover!("hot regions: log device failed");
                turn.failed = Some(error.clone());
                Err(error)
            }
        }
    }
}

/// Regions that stay if the attempt to release them ends early.
struct Leaving<'a> {
    shared: &'a Shared,
    regions: Vec<Region>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if !self.regions.is_empty() {
            self.shared.table.borrow_mut().stay(&self.regions);
            self.shared.places.open();
        }
    }
}

/// The write of a transaction; its end, also an early one, lets others write.
struct Turn<'a> {
    shared: &'a Shared,
    log: LogIndex,
    covered: Option<u64>,
    failed: Option<LogError>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        {
            let mut table = self.shared.table.borrow_mut();
            let log = &mut table.logs[self.log];
            log.busy = false;
            match self.covered {
                Some(covered) => log.durable = log.durable.max(covered),
                None => log.stale = true,
            }
            log.failed = self.failed.take().or(log.failed.take());
        }
        self.shared.commits.open();
    }
}
