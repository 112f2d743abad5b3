//! The file system at work: what everything in it shares.
//!
//! # Life of a change
//! 1. A *plan* is made from the state: which records. It waits for nothing; where a page is missing, the page is loaded and the plan
//!    is made anew ([`Core::transact`]).
//! 2. In the same moment the records are applied to the state and appended to the open group of the journal.
//! 3. Who needs it durable waits for the group ([`Core::commit`]): first the volumes are flushed whose data the group's records speak
//!    of, then the group is written. One group serves all that wait. A volume that cannot be flushed stops only its own files
//!    ([`crate::failed_volume`]).
//!
//! # Life of a freed cluster
//! Its bit is cleared with the record that frees it. It stays *busy* until that record is durable and no request is left that began
//! before ([`Core::release_freed`]); then it can be taken.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use block_io::{AlignedBuffer, BlockDevice, Clock, IoError, error_chain};
use smallvec::SmallVec;

use crate::checkpoint::Asked;
use crate::epochs::Epochs;
use crate::error::{FsError, Refusal};
use crate::event::Event;
use crate::failed_volume::Unproven;
use crate::file::whole;
use crate::file_core::{Chain, FileCore, MOST_LAYERS};
use crate::gate::{self, Boxed, Signal};
use crate::heal::Healer;
use crate::journal::{Journal, JournalError, Ticket};
use crate::meta_space::MetaSpace;
use crate::open::OpenOptions;
use crate::record::Record;
use crate::state::{Damage, Effects, State, Stop};
use crate::sums::Unchecked;
use crate::superblock::{Holders, Superblock};
use crate::tree::codec::{self, PAGE};
use crate::tree::node::{Child, Missing, Node};
use crate::trim::Trims;
use crate::units::{FileId, Location, SUB_CLUSTER, VolumeIndex};
use crate::volume::VolumeCore;
use crate::wire::{Reader, Writer};

/// Pages of the metadata volume that deletions may still use when nothing else may.
const RESERVED_PAGES: u64 = 64;

/// Clusters that were freed.
#[derive(Debug)]
struct Freed {
    group: u64,
    epoch: u64,
    first: Location,
    count: u64,
}

/// What everything in a file system shares.
pub(crate) struct Core<V, C> {
    pub(crate) state: State<V>,
    pub(crate) meta: Rc<V>,
    pub(crate) journal: Journal<V>,
    pub(crate) space: MetaSpace<V>,
    pub(crate) superblock: RefCell<Superblock>,
    /// Which copies of the superblock have the present state.
    pub(crate) holders: RefCell<Holders>,
    pub(crate) clock: C,
    pub(crate) options: OpenOptions,
    pub(crate) epochs: Epochs,
    freed: RefCell<VecDeque<Freed>>,
    /// What was given up, and could be discarded.
    pub(crate) trims: Trims,
    /// For each group that is not durable: volumes with data that its records speak of.
    needs: RefCell<Vec<(u64, VolumeIndex)>>,
    /// What groups that are not durable made valid.
    pub(crate) unproven: RefCell<Unproven>,
    /// Grows when groups are taken back.
    pub(crate) taken_back: Cell<u64>,
    /// Empty memory for records on their way to the journal.
    bytes: RefCell<Vec<u8>>,
    loading: RefCell<BTreeSet<u64>>,
    /// Something of all that is waited for has changed.
    pub(crate) changed: Signal,
    pub(crate) checkpointing: Cell<bool>,
    pub(crate) checkpoints: RefCell<Asked>,
    pub(crate) housekeeping: Cell<bool>,
    /// It is being done.
    pub(crate) settling: Cell<bool>,
    /// Merges that a crash has cut have not gone on yet.
    pub(crate) resuming: Cell<bool>,
    /// Tasks that run.
    pub(crate) running: Cell<u32>,
    pub(crate) closing: Cell<bool>,
    /// Records wait that nobody may ask to be durable.
    pub(crate) lingering: Cell<bool>,
    failure: RefCell<Option<Arc<str>>>,
    /// Grows when parents or children change.
    pub(crate) chains: Cell<u64>,
    /// Grows when what layers below others have is moved.
    pub(crate) layers: Cell<u64>,
    pub(crate) unchecked: RefCell<Unchecked>,
    pub(crate) healer: Healer,
    /// Blocks of metadata that are being repaired while checkpoints may run.
    pub(crate) mendings: Cell<u32>,
    /// Transactions that changed something.
    pub(crate) changes: Cell<u64>,
    /// How many want that nothing is done in the background.
    pub(crate) quiet: Cell<u32>,
    events: RefCell<Vec<Event>>,
}

/// What a transaction may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// All but the reserve.
    Ordinary,
    /// The reserve, too: it gives space back.
    Freeing,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a file system, called in one place"
    )]
    pub(crate) fn new(
        state: State<V>,
        meta: Rc<V>,
        journal: Journal<V>,
        space: MetaSpace<V>,
        superblock: Superblock,
        holders: Holders,
        clock: C,
        options: OpenOptions,
    ) -> Rc<Self> {
        let healer = Healer::new(&options.redundancy, !options.read_only);
        Rc::new(Self {
            state,
            meta,
            journal,
            space,
            superblock: RefCell::new(superblock),
            holders: RefCell::new(holders),
            clock,
            options,
            epochs: Epochs::default(),
            freed: RefCell::default(),
            trims: Trims::default(),
            needs: RefCell::default(),
            unproven: RefCell::default(),
            taken_back: Cell::new(0),
            bytes: RefCell::default(),
            loading: RefCell::default(),
            changed: Signal::default(),
            checkpointing: Cell::new(false),
            checkpoints: RefCell::default(),
            housekeeping: Cell::new(false),
            settling: Cell::new(false),
            resuming: Cell::new(false),
            running: Cell::new(0),
            closing: Cell::new(false),
            lingering: Cell::new(false),
            failure: RefCell::new(None),
            chains: Cell::new(0),
            layers: Cell::new(0),
            unchecked: RefCell::default(),
            healer,
            mendings: Cell::new(0),
            changes: Cell::new(0),
            quiet: Cell::new(0),
            events: RefCell::default(),
        })
    }

    pub(crate) fn event(&self, event: Event) {
        self.events.borrow_mut().push(event);
        self.healer.bell.ring();
    }

    pub(crate) fn on_event(&self, ring: Box<dyn Fn()>) {
        self.healer.bell.set(ring);
    }

    pub(crate) fn take_events(&self) -> Vec<Event> {
        let mut events = self.events.take();
        events.extend(self.healer.take_events());
        events
    }

    /// Something failed that must not: nothing is changed from now on.
    pub(crate) fn fail(&self, error: &dyn std::error::Error) -> FsError {
        let reason: Arc<str> = error_chain(error).into();
        if self.failure.borrow().is_none() {
            tracing::error!(%reason, "the file system takes no more changes");
            self.event(Event::Failed {
                reason: reason.to_string(),
            });
            self.failure.replace(Some(reason));
        }
        self.changed.notify();
        self.failed()
    }

    fn failed(&self) -> FsError {
        let reason = self
            .failure
            .borrow()
            .as_ref()
            .map_or_else(String::new, |reason| reason.to_string());
        FsError::Failed { reason }
    }

    /// Whether changes are possible.
    pub(crate) fn check(&self) -> Result<(), FsError> {
        if self.options.read_only {
            return Err(FsError::ReadOnly);
        }
        if self.failure.borrow().is_some() {
            return Err(self.failed());
        }
        Ok(())
    }

    /// Loads a page and puts it in its place.
    pub(crate) async fn load(&self, missing: Missing) -> Result<(), FsError> {
        let block = missing.ptr.block;
        if self.loading.borrow().contains(&block) {
            self.changed
                .until(|| (!self.loading.borrow().contains(&block)).then_some(()))
                .await;
            return Ok(());
        }
        self.loading.borrow_mut().insert(block);
        let _loading = Loading { core: self, block };
        self.load_page(&missing).await?;
        if self.state.pages.resident() > self.options.cached_pages && !self.checkpointing.get() {
            self.state.pages.evict(self.options.cached_pages);
        }
        Ok(())
    }

    /// A page that is not what its parent says is looked for in other copies. The copy is written back only if the page still belongs
    /// there: then its block is not used for another one before a checkpoint that waits for this.
    async fn load_page(&self, missing: &Missing) -> Result<(), FsError> {
        let node = match read_page(&*self.meta, missing).await {
            Err(FsError::Damaged(damage)) => {
                let wanted = |child: &mut Child| matches!(child, Child::Media(ptr) if *ptr == missing.ptr);
                if missing.place.with(wanted) != Some(true) {
                    return Ok(());
                }
                let _mending = self.mending();
                match heal_page(missing, &self.healer).await {
                    Some(node) => node,
                    None => {
                        let block = missing.ptr.block;
                        self.event(Event::MetadataCorrupt { block });
                        return Err(damage.into());
                    }
                }
            }
            read => read?,
        };
        self.state.pages.install(missing, Rc::new(node));
        Ok(())
    }

    /// Asks until everything is in memory.
    pub(crate) async fn look<T>(
        &self,
        mut look: impl FnMut(&State<V>) -> Result<T, Refusal>,
    ) -> Result<T, FsError> {
        loop {
            match look(&self.state) {
                Ok(found) => return Ok(found),
                Err(refusal) => self.resolve(refusal).await?,
            }
        }
    }

    /// Loads what is missing; everything else is an error.
    pub(crate) async fn resolve(&self, refusal: Refusal) -> Result<(), FsError> {
        match refusal {
            Refusal::Stop(Stop::Missing(missing)) => self.load(missing).await,
            Refusal::Stop(Stop::Damaged(damage)) => Err(damage.into()),
            Refusal::Error(error) => Err(error),
        }
    }

    /// Waits for room in the journal and on the metadata volume.
    pub(crate) async fn admit(&self, bytes: usize, need: Need) -> Result<Ticket, FsError>
    where
        Self: 'static,
    {
        self.check()?;
        let reserve = match need {
            Need::Ordinary => RESERVED_PAGES.min(self.superblock.borrow().layout.size_blocks / 8),
            Need::Freeing => 4,
        };
        // What is dirty is written before what it replaces is free. One more change makes a path of each of a few trees dirty.
        let room = || {
            let free = self.space.free_count();
            // Mostly there is so much that nobody has to count.
            [false, true]
                .into_iter()
                .any(|count| free > self.state.will_be_dirty(count) + reserve + 16)
        };
        if !room() {
            self.checkpoint_now().await?;
            let there_is = room() || (self.space.break_holds() && room());
            if !there_is {
                return Err(FsError::NoSpace {
                    what: "the metadata volume".into(),
                    remedy: "grow it, or delete files",
                });
            }
        }
        self.journal.admit(bytes).await.map_err(|error| match error {
            JournalError::TooLarge { .. } => FsError::State {
                object: "the file system".into(),
                problem: error.to_string(),
            },
            error => self.fail(&error),
        })
    }

    /// Makes a plan and carries it out in one moment. The plan is made again whenever a page was missing.
    pub(crate) async fn transact<R>(
        &self,
        bytes: usize,
        need: Need,
        plan: impl FnMut(&State<V>) -> Result<(Vec<Record>, R), Refusal>,
    ) -> Result<(u64, R), FsError> {
        let ticket = self.admit(bytes, need).await?;
        self.transact_admitted(&ticket, plan).await
    }

    /// As [`Self::transact`], with room that was waited for before.
    pub(crate) async fn transact_admitted<L: AsRef<[Record]>, R>(
        &self,
        _ticket: &Ticket,
        mut plan: impl FnMut(&State<V>) -> Result<(L, R), Refusal>,
    ) -> Result<(u64, R), FsError> {
        loop {
            let done = plan(&self.state).and_then(|(records, result)| {
                let group = self.execute(records.as_ref())?;
                Ok((group, result))
            });
            match done {
                Ok(done) => return Ok(done),
                Err(refusal) => self.resolve(refusal).await?,
            }
        }
    }

    /// Applies records and appends them to the journal: all of them, or none.
    pub(crate) fn execute(&self, records: &[Record]) -> Result<u64, Refusal> {
        for record in records {
            self.state.prepare(record)?;
        }
        self.check()?;
        if !records.is_empty() {
            self.changes.set(self.changes.get() + 1);
        }
        let mut effects = Effects::of_new();
        let mut writer = Writer(self.bytes.take());
        for record in records {
            match self.state.apply(record, &mut effects) {
                Ok(()) => record.encode(&mut writer),
                // Some may be applied and others not, so what is in memory is not to be used any more.
                Err(Stop::Damaged(damage)) => return Err(self.fail(&damage).into()),
                Err(Stop::Missing(_)) => {
                    let damage = Damage::new("the file system", format!("{record:?} was not prepared"));
                    return Err(self.fail(&damage).into());
                }
            }
        }
        if records.is_empty() {
            return Ok(self.journal.durable_group());
        }
        let group = match self.journal.append(&writer.0) {
            Ok(group) => group,
            Err(error) => return Err(self.fail(&error).into()),
        };
        writer.0.clear();
        self.bytes.replace(writer.0);
        let many = self.unproven.borrow_mut().append(&effects.added, group);
        self.take_effects(effects, group);
        if !self.lingering.replace(true) || many {
            self.changed.notify();
        }
        self.after_change();
        Ok(group)
    }

    /// Makes what a killed process has left in the tail of its journal again, one item for each append, while nothing else runs; it is in
    /// the open group then.
    pub(crate) async fn remake(&self, tail: &[Vec<u8>]) -> Result<(), FsError> {
        // As in a replay: what memory knew is lost.
        self.state.replaying.set(true);
        for bytes in tail {
            block_io::cover!("filesys: what the tail of the journal has was made again");
            let mut reader = Reader(bytes);
            let mut effects = Effects::of_new();
            while !reader.is_empty() {
                let record = Record::decode(&mut reader);
                let record = record.map_err(|error| Damage::new("the tail of the journal", error))?;
                while let Err(stop) = self.remake_record(&record, &mut effects) {
                    self.resolve(stop.into()).await?;
                }
            }
            let group = self.journal.append(bytes).map_err(|error| self.fail(&error))?;
            self.unproven.borrow_mut().append(&effects.added, group);
            self.take_effects(effects, group);
        }
        self.state.replaying.set(false);
        Ok(())
    }

    fn remake_record(&self, record: &Record, effects: &mut Effects) -> Result<(), Stop> {
        self.state.prepare(record)?;
        let noted = effects.added.len();
        let made = self.state.apply(record, effects);
        if made.is_err() {
            effects.added.truncate(noted);
        }
        made
    }

    pub(crate) fn take_effects(&self, effects: Effects, group: u64) {
        if !effects.freed.is_empty() {
            let epoch = self.epochs.turn();
            let mut freed = self.freed.borrow_mut();
            for (first, count) in effects.freed {
                if let Ok(volume) = self.state.volume(first.volume) {
                    (first.cluster..first.cluster + count).for_each(|cluster| {
                        volume.hold(cluster);
                    });
                }
                freed.push_back(Freed {
                    group,
                    epoch,
                    first,
                    count,
                });
            }
        }
        if effects.moved {
            self.layers.set(self.layers.get() + 1);
        }
        if effects.orphans {
            self.chains.set(self.chains.get() + 1);
            self.housekeeping.set(true);
        }
    }

    /// The records of a group speak of data on this volume that a flush must make durable first.
    pub(crate) fn needs_flush(&self, group: u64, volume: VolumeIndex) {
        let mut needs = self.needs.borrow_mut();
        if !needs.iter().rev().any(|need| *need == (group, volume)) {
            needs.push((group, volume));
        }
    }

    /// A group that is durable makes all durable that was written to a file before.
    pub(crate) fn needs_unflushed(&self, group: u64, file: &FileCore) {
        for (index, stamp) in file.written.borrow().iter() {
            if let Ok(volume) = self.state.volume(*index)
                && volume.flushed.get() < *stamp
            {
                self.needs_flush(group, *index);
            }
        }
    }

    /// Whether something was written to a file that no flush has made durable.
    pub(crate) fn is_unflushed(&self, file: &FileCore) -> bool {
        file.group.get() > self.journal.durable_group()
            || file.written.borrow().iter().any(|(index, stamp)| {
                self.state
                    .volume(*index)
                    .is_ok_and(|volume| volume.flushed.get() < *stamp)
            })
    }

    /// Gives clusters back that nobody can be reading any more.
    pub(crate) fn release_freed(&self) {
        let durable = self.journal.durable_group();
        self.unproven.borrow_mut().forget(durable);
        let mut freed = self.freed.borrow_mut();
        while let Some(next) = freed.front() {
            if next.group > durable || !self.epochs.is_over(next.epoch) {
                return;
            }
            let next = freed.pop_front();
            if let Some(next) = next
                && let Ok(volume) = self.state.volume(next.first.volume)
            {
                (next.first.cluster..next.first.cluster + next.count)
                    .for_each(|cluster| volume.release(cluster));
                if self.options.discard && self.trims.note(next.first, next.count) {
                    self.changed.notify();
                }
            }
        }
    }

    /// Whether clusters wait to be used again.
    pub(crate) fn has_freed(&self) -> bool {
        !self.freed.borrow().is_empty()
    }

    /// Makes data durable that were written to a volume before it had seen `written` writes. If that fails, the volume takes no more
    /// writes, and what is not durable of it is taken back.
    pub(crate) async fn flush_volume(&self, volume: &VolumeCore<V>, written: u64) -> Result<(), IoError> {
        loop {
            if volume.flushed.get() >= written {
                return Ok(());
            }
            volume.check_works()?;
            if volume.flushing.get().is_some() {
                self.changed
                    .until(|| volume.flushing.get().is_none().then_some(()))
                    .await;
                continue;
            }
            let covers = volume.written.get();
            volume.flushing.set(Some(covers));
            let _flushing = Flushing { core: self, volume };
            if let Err(error) = volume.device.flush().await {
                self.fail_volume(volume, &error);
                return Err(error);
            }
            volume.flushed.set(volume.flushed.get().max(covers));
        }
    }

    /// What a group's records speak of becomes durable. Of a volume that cannot do that they speak no more afterwards
    /// ([`crate::failed_volume`]).
    pub(crate) async fn flush_for(&self, group: u64) {
        let mut volumes: SmallVec<[Rc<VolumeCore<V>>; 1]> = SmallVec::new();
        self.needs.borrow_mut().retain(|(of, index)| {
            if *of <= group
                && !volumes.iter().any(|volume| volume.index == *index)
                && let Ok(volume) = self.state.volume(*index)
            {
                volumes.push(volume);
            }
            *of > group
        });
        if let [volume] = &*volumes {
            // Who cannot be flushed has failed, which is known now.
            drop(self.flush_volume(volume, volume.written.get()).await);
            return;
        }
        let flushes = volumes
            .iter()
            .map(|volume| -> Boxed<'_, _> { Box::pin(self.flush_volume(volume, volume.written.get())) });
        drop(gate::all(flushes.collect()).await);
    }

    /// The file and its ancestors.
    pub(crate) fn chain(&self, file: FileId) -> Result<Chain, Stop> {
        let mut chain: Vec<Rc<FileCore>> = vec![self.state.file(file)?];
        while let Some(parent) = chain.last().and_then(|file| file.parent()) {
            if chain.len() >= MOST_LAYERS {
                return Err(Damage::new(file, "has itself among its parents").into());
            }
            chain.push(self.state.file(parent)?);
        }
        Ok(chain.into())
    }
}

/// Reads a page of the metadata volume and puts it in its place, while nothing else runs.
pub(crate) async fn load_page<V: BlockDevice>(
    meta: &V,
    state: &State<V>,
    missing: &Missing,
    healer: &Healer,
) -> Result<(), FsError> {
    let node = read_page_healed(meta, missing, healer).await?;
    state.pages.install(missing, Rc::new(node));
    Ok(())
}

/// Reads a page of the metadata volume.
pub(crate) async fn read_page<V: BlockDevice>(meta: &V, missing: &Missing) -> Result<Node, FsError> {
    let buffer = AlignedBuffer::new(PAGE);
    let offset = missing.ptr.block.saturating_mul(SUB_CLUSTER);
    meta.read(offset, &whole(&buffer)).await?;
    let node = codec::decode(missing.ptr, missing.kind, buffer.as_slice());
    Ok(node.map_err(|error| Damage::new("the metadata volume", error))?)
}

/// As [`read_page`], from another copy if need be, while nothing else runs.
pub(crate) async fn read_page_healed<V: BlockDevice>(
    meta: &V,
    missing: &Missing,
    healer: &Healer,
) -> Result<Node, FsError> {
    match read_page(meta, missing).await {
        Err(FsError::Damaged(damage)) => {
            let healed = heal_page(missing, healer).await;
            healed.ok_or_else(|| damage.into())
        }
        read => read,
    }
}

async fn heal_page(missing: &Missing, healer: &Healer) -> Option<Node> {
    let decode = |bytes: &[u8]| codec::decode(missing.ptr, missing.kind, bytes);
    let good = |bytes: &[u8]| decode(bytes).is_ok();
    let found = healer.find(missing.ptr.block, good).await?;
    healer.repair(missing.ptr.block, &found).await;
    decode(found.as_slice()).ok()
}

struct Loading<'a, V, C> {
    core: &'a Core<V, C>,
    block: u64,
}

impl<V, C> Drop for Loading<'_, V, C> {
    fn drop(&mut self) {
        self.core.loading.borrow_mut().remove(&self.block);
        self.core.changed.notify();
    }
}

/// Nothing is done in the background while this is there.
pub(crate) struct Quiet<'a, V, C>(&'a Core<V, C>);

impl<'a, V, C> Quiet<'a, V, C> {
    pub(crate) fn new(core: &'a Core<V, C>) -> Self {
        core.quiet.set(core.quiet.get() + 1);
        Self(core)
    }
}

impl<V, C> Drop for Quiet<'_, V, C> {
    fn drop(&mut self) {
        self.0.quiet.set(self.0.quiet.get() - 1);
        self.0.changed.notify();
    }
}

struct Flushing<'a, V, C> {
    core: &'a Core<V, C>,
    volume: &'a VolumeCore<V>,
}

impl<V, C> Drop for Flushing<'_, V, C> {
    fn drop(&mut self) {
        self.volume.flushing.set(None);
        self.core.changed.notify();
    }
}
