//! A file system is made, opened, closed.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use block_io::{BlockDevice, Clock, LastingMemory};

use crate::checkpoint::Before;
use crate::core::{self, Core};
use crate::error::{FsError, Refusal};
use crate::event::Event;
use crate::gate::{self, Either};
use crate::heal::{Healer, Redundancy};
use crate::inode::MAX_CLASS;
use crate::journal::{End, FoundTail, Journal, Position, Ring, Tail};
use crate::meta_space::MetaSpace;
use crate::record::{Record, VolumeRecord};
use crate::replay;
use crate::state::{Effects, State, Stop};
use crate::superblock::{self, LayoutOptions, Superblock};
use crate::tree::codec;
use crate::tree::node::{Child, Root};
use crate::tree::radix::Tree;
use crate::units::{CLUSTER, MAX_NAME, MAX_VOLUMES, SUB_CLUSTER, VolumeIndex};

/// A volume that is given to a file system.
#[derive(Debug)]
pub struct GivenVolume<V> {
    /// Identity, by which it is known again.
    pub uuid: [u8; 16],
    /// For people.
    pub name: String,
    /// Storage class; empty for none.
    pub class: String,
    /// Itself.
    pub device: Rc<V>,
}

/// How a file system is made.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// Identity, drawn at random.
    pub uuid: [u8; 16],
    /// Drawn at random; keys the hashes of names.
    pub seed: u64,
    /// Blocks of 4 KiB of the journal; by default an eighth of the metadata volume, at least 256 KiB, at most 64 MiB.
    pub journal_blocks: Option<u64>,
    /// Largest size in bytes to which the metadata volume can grow later.
    pub grow_to: u64,
}

/// How a file system is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Nothing is written.
    pub read_only: bool,
    /// Pages of metadata that are kept in memory while they are not needed, about; 4 KiB each.
    pub cached_pages: usize,
    /// Files that are kept in memory while nobody has them open, about.
    pub cached_files: usize,
    /// Pages that may be dirty before a checkpoint begins.
    pub dirty_pages: u64,
    /// Changes that nobody asks to be durable are made so after this time.
    pub commit_after: Duration,
    /// Which volumes have copies from which what is damaged can be repaired.
    pub redundancy: Redundancy,
    /// Orphans are settled and layers absorbed in the background; tests want to say when.
    pub background: bool,
    /// Merges of layers that a crash has cut go on by themselves; else (the default) they wait until they are asked for again. Not for
    /// virtual disks: their descriptors have to follow when a layer takes its parent's name, so it is they who ask again.
    pub resume_merges: bool,
    /// What files give up is discarded on the volumes some time later.
    pub discard: bool,
    /// Memory for what is not durable yet, so that whoever opens the file system next finds it if this process is killed, and no power cut comes
    /// between. It has to be the same one for all who open this file system: then [`block_io::BlockDevice::settle`] waits for nothing. Without it, it
    /// waits until data and journal are durable. Not used if it is read-only.
    pub tail: Option<Rc<dyn LastingMemory>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cached_pages: 16384,
            cached_files: 1024,
            dirty_pages: 16384,
            commit_after: Duration::from_secs(5),
            redundancy: Redundancy::default(),
            background: true,
            resume_merges: false,
            discard: true,
            tail: None,
        }
    }
}

/// An open file system. Copies are the same one. It works as long as a copy is there; [`Self::close`] ends it in order, and ending it
/// otherwise is like a crash, which loses nothing that was acknowledged.
pub struct FileSystem<V: BlockDevice + 'static, C: Clock + Clone + 'static>(pub(crate) Rc<Owner<V, C>>);

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Clone for FileSystem<V, C> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// Ends the tasks when the last copy is gone.
pub(crate) struct Owner<V: BlockDevice + 'static, C: Clock + Clone + 'static>(pub(crate) Rc<Core<V, C>>);

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Drop for Owner<V, C> {
    fn drop(&mut self) {
        self.0.closing.set(true);
        self.0.journal.stop();
        self.0.changed.notify();
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    pub(crate) fn core(&self) -> &Rc<Core<V, C>> {
        &self.0.0
    }

    /// Makes a file system: metadata on one volume, data on the others. What they held is lost.
    ///
    /// # Errors
    /// A volume is too small, is given twice, has an impossible name, or fails.
    pub async fn format(
        meta: GivenVolume<V>,
        volumes: Vec<GivenVolume<V>>,
        options: &FormatOptions,
        open: OpenOptions,
        clock: C,
    ) -> Result<Self, FsError> {
        let size_blocks = meta.device.size() / SUB_CLUSTER;
        let layout = superblock::layout(
            size_blocks,
            &LayoutOptions {
                journal_blocks: options.journal_blocks,
                grow_to_blocks: (options.grow_to / SUB_CLUSTER).max(size_blocks),
            },
        )
        .map_err(|error| FsError::Open(error.to_string()))?;
        for volume in &volumes {
            check_volume(volume)?;
        }
        let given = devices_of(&volumes);
        if given.len() != volumes.len() || given.contains_key(&meta.uuid) {
            return Err(FsError::Open("a volume is given twice".into()));
        }
        let state = State::blank(options.seed, given);
        let start = Position {
            group: 1,
            block: 0,
            previous: 0,
        };
        let space = MetaSpace::format(Rc::clone(&meta.device), layout, options.uuid);
        let mut superblock = Superblock {
            uuid: options.uuid,
            incarnation: 1,
            layout,
            replay: start,
            name_hash_seed: options.seed,
            ..Superblock::default()
        };
        superblock.opened(true, open.tail.is_some());
        let ring = Ring {
            region: layout.journal,
            uuid: options.uuid,
        };
        let journal = Journal::new(Rc::clone(&meta.device), ring, &start, start, 1);
        let core = Core::new(
            state,
            meta.device,
            journal,
            space,
            superblock,
            superblock::Holders::default(),
            clock,
            open,
        );
        for volume in volumes {
            core.add_volume_now(&volume)?;
        }
        if let Some(memory) = core.options.tail.clone() {
            core.begin_tail(memory).await?;
        }
        let fs = Self(Rc::new(Owner(Rc::clone(&core))));
        core.start();
        core.checkpoint_now().await?;
        Ok(fs)
    }

    /// Opens the file system whose metadata are on `meta`. All its data volumes must be given, in any order; others are ignored.
    ///
    /// # Errors
    /// There is none, a volume is missing, metadata are damaged, or a volume fails.
    pub async fn open(
        meta: Rc<V>,
        volumes: Vec<GivenVolume<V>>,
        options: OpenOptions,
        clock: C,
    ) -> Result<Self, FsError> {
        let read_only = options.read_only;
        let healer = Healer::new(&options.redundancy, !read_only);
        let opened = superblock::open_healed(&*meta, &healer)
            .await
            .map_err(|error| FsError::Open(error.to_string()))?;
        let mut superblock = opened.superblock;
        let mut holders = opened.holders;
        if opened.unknown_read_only != 0 && !read_only {
            return Err(FsError::Open(format!(
                "the file system uses features that this program can only read (bits {:#x}): open it read-only, or use a newer one",
                opened.unknown_read_only
            )));
        }
        let space = MetaSpace::load_healed(
            Rc::clone(&meta),
            superblock.layout,
            superblock.uuid,
            superblock.space,
            &healer,
        )
        .await
        .map_err(|error| FsError::Open(error.to_string()))?;
        let state = load_state(&*meta, &superblock, devices_of(&volumes), &healer).await?;
        let ring = Ring {
            region: superblock.layout.journal,
            uuid: superblock.uuid,
        };
        let end = replay::replay(&*meta, &state, &ring, &superblock, &healer).await?;
        let memory = options.tail.clone().filter(|_| !read_only);
        let left = memory
            .as_deref()
            .and_then(|memory| left_in_tail(memory, &superblock, &end));
        superblock.next_object = superblock.next_object.max(state.next_id());
        let mut space = space;
        let mut unflushed = Vec::new();
        let mut may_miss = false;
        if !read_only {
            // What was read may be in a cache only; from now on others build on it.
            meta.flush().await?;
            let data: Vec<_> = state.volumes.borrow().values().map(Rc::clone).collect();
            for volume in data {
                if let Err(error) = volume.device.flush().await {
                    unflushed.push((volume, error));
                }
            }
            let size = meta.size() / SUB_CLUSTER;
            if space.reach(size) > superblock.layout.size_blocks {
                space = space.grown(size);
                superblock.layout = space.layout();
                superblock.space = space
                    .store()
                    .await
                    .map_err(|error| FsError::Open(error.to_string()))?;
                meta.flush().await?;
                holders.resized();
            }
            superblock.sequence = opened.next_sequence;
            // Who does not know of the tail takes the very next one, and must not be taken for us.
            superblock.incarnation += 1 + u64::from(left.is_some());
            if let (Some(memory), Some(_)) = (&memory, &left) {
                FoundTail::announce(&**memory, superblock.incarnation);
            }
            may_miss = superblock.opened(left.is_some(), memory.is_some());
            superblock::write(&*meta, &superblock, &mut holders)
                .await
                .map_err(|error| FsError::Open(error.to_string()))?;
            space.committed();
        }
        let journal = Journal::new(
            Rc::clone(&meta),
            ring,
            &superblock.replay,
            end.position,
            superblock.incarnation,
        );
        let core = Core::new(state, meta, journal, space, superblock, holders, clock, options);
        healer
            .take_events()
            .into_iter()
            .for_each(|event| core.event(event));
        if may_miss {
            tracing::warn!(
                "the file system had not been closed, and what was answered and not flushed then was not found, as after a power cut: guests and \
                 clients that were not started anew since may miss writes; have their file systems checked"
            );
            core.event(Event::TailMissing);
        }
        core.remake(&left.unwrap_or_default()).await?;
        // Takes back what was written to it, also of what was made again just now.
        for (volume, error) in unflushed {
            core.fail_volume(&volume, &error);
        }
        if let Some(memory) = memory {
            core.begin_tail(memory).await?;
        }
        if !read_only {
            core.housekeeping.set(core.options.background);
            core.resuming.set(core.options.resume_merges);
            core.start();
        }
        Ok(Self(Rc::new(Owner(core))))
    }

    /// Makes everything durable, and ends. Files that are still open fail from then on.
    ///
    /// # Errors
    /// Something could not be written; nothing that was acknowledged is lost by that.
    pub async fn close(&self) -> Result<(), FsError> {
        let core = self.core();
        if core.options.read_only {
            return Ok(());
        }
        let done = if core.closing.get() {
            Ok(())
        } else {
            core.closing.set(true);
            core.changed.notify();
            core.changed
                .until(|| (core.running.get() <= 1).then_some(()))
                .await;
            let done = core.make_checkpoint(true).await;
            core.trim().await;
            if let (Ok(()), Some(tail)) = (&done, core.journal.tail()) {
                tail.end();
            }
            done
        };
        core.journal.stop();
        core.changed
            .until(|| (core.running.get() == 0).then_some(()))
            .await;
        done
    }

    /// A number that stays the same as long as nothing is missing that was answered by whoever had the file system open, durable or not. It is another
    /// one after a power cut, or if a process was killed and who opened next did not find its [tail](OpenOptions::tail). Never 0.
    pub fn continuity(&self) -> u64 {
        let superblock = self.core().superblock.borrow();
        let (low, _) = superblock.uuid.split_at(8);
        let identity = low.try_into().map_or(0, u64::from_le_bytes);
        identity.wrapping_add(superblock.unbroken).max(1)
    }

    /// Makes a checkpoint: for tests.
    #[doc(hidden)]
    pub async fn checkpoint(&self) -> Result<(), FsError> {
        self.core().checkpoint_now().await
    }

    /// Returns when nothing is left to do in the background: for tests.
    #[doc(hidden)]
    pub async fn settled(&self) {
        let core = self.core();
        let idle = || !core.housekeeping.get() && !core.settling.get() || core.check().is_err();
        core.changed.until(|| idle().then_some(())).await;
    }

    /// What happened since this was asked last.
    pub fn take_events(&self) -> Vec<Event> {
        self.core().take_events()
    }

    /// `ring` is called whenever there is an event to be taken; it must not use the file system at once.
    pub fn on_event(&self, ring: impl Fn() + 'static) {
        self.core().on_event(Box::new(ring));
    }

    /// Everything that was written to any file before is durable afterwards.
    ///
    /// # Errors
    /// A volume failed.
    pub async fn sync(&self) -> Result<(), FsError> {
        let core = self.core();
        core.check()?;
        let volumes: Vec<_> = core.state.volumes.borrow().values().map(Rc::clone).collect();
        for volume in volumes {
            // The others are flushed nevertheless; which of them has failed is asked below.
            drop(core.flush_volume(&volume, volume.written.get()).await);
        }
        core.commit(core.journal.open_group()).await?;
        let volumes = core.state.volumes.borrow();
        Ok(volumes.values().try_for_each(|volume| volume.check_works())?)
    }
}

fn devices_of<V>(volumes: &[GivenVolume<V>]) -> BTreeMap<[u8; 16], Rc<V>> {
    volumes
        .iter()
        .map(|volume| (volume.uuid, Rc::clone(&volume.device)))
        .collect()
}

pub(crate) fn check_volume<V: BlockDevice>(volume: &GivenVolume<V>) -> Result<(), FsError> {
    let problem = if volume.device.size() < CLUSTER {
        "it is smaller than 64 KiB"
    } else if volume.name.len() > MAX_NAME || volume.class.len() > MAX_CLASS {
        "its name or its class is too long"
    } else if u64::from(volume.device.geometry().logical_block) > SUB_CLUSTER {
        "its blocks are larger than 4 KiB"
    } else {
        return Ok(());
    };
    Err(FsError::State {
        object: format!("volume {}", volume.name),
        problem: format!("cannot be part of a file system: {problem}"),
    })
}

/// What whoever had it open last has left in the tail of its journal and is to be made again, one item for each append. None if its tail is not there.
fn left_in_tail(memory: &dyn LastingMemory, superblock: &Superblock, end: &End) -> Option<Vec<Vec<u8>>> {
    let found = FoundTail::read(memory, superblock.uuid)?;
    if !found.goes_on(superblock.incarnation) {
        block_io::cover!("filesys: others have written since the tail was left");
        return None;
    }
    let Some(left) = found.after(end) else {
        tracing::warn!("what a killed process has left does not continue the journal, and is not used");
        return None;
    };
    if !left.is_empty() {
        let count = left.len();
        tracing::info!(
            count,
            "what a killed process has left and was not durable is there"
        );
    }
    Some(left)
}

/// The state of the last checkpoint.
async fn load_state<V: BlockDevice>(
    meta: &V,
    superblock: &Superblock,
    given: BTreeMap<[u8; 16], Rc<V>>,
    healer: &Healer,
) -> Result<State<V>, FsError> {
    let root = codec::decode_root(&superblock.root.slot)
        .map_err(|problem| FsError::Open(format!("the superblock's root: {problem}")))?
        .unwrap_or(Root {
            child: Child::Empty,
            level: 0,
            kind: codec::Kind::Objects,
        });
    let objects = Tree::from_root(root);
    let state = loop {
        match State::of_checkpoint(
            &objects,
            superblock.next_object,
            superblock.name_hash_seed,
            given.clone(),
        ) {
            Ok(state) => break state,
            Err(Stop::Missing(missing)) => {
                let node = Rc::new(core::read_page_healed(meta, &missing, healer).await?);
                missing.place.with(|child| *child = Child::Loaded(node));
            }
            Err(Stop::Damaged(damage)) => return Err(damage.into()),
        }
    };
    while let Err(stop) = state.load_tables() {
        replay::load(meta, &state, stop, healer).await?;
    }
    Ok(state)
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Makes durable what was made again, and begins a new tail: before any task runs, so that no checkpoint and no record of others is
    /// between.
    async fn begin_tail(&self, memory: Rc<dyn LastingMemory>) -> Result<(), FsError> {
        let before = Before(self);
        let writer = self.journal.run(&before);
        match gate::first(self.commit(self.journal.open_group()), writer).await {
            Either::First(committed) => committed?,
            Either::Second(ended) => ended.map_err(|error| self.fail(&error))?,
        }
        let (uuid, incarnation) = {
            let superblock = self.superblock.borrow();
            (superblock.uuid, superblock.incarnation)
        };
        match Tail::begin(memory, uuid, incarnation) {
            Some(tail) => self.journal.keep_tail(tail),
            None => tracing::warn!("there is no room for the tail of the journal"),
        }
        Ok(())
    }

    /// The record of a volume that is new.
    pub(crate) fn volume_record(&self, volume: &GivenVolume<V>) -> Result<VolumeRecord, Refusal> {
        check_volume(volume)?;
        let volumes = self.state.volumes.borrow();
        if volumes.values().any(|known| known.record().uuid == volume.uuid) {
            return Err(FsError::Exists {
                path: format!("volume {}", volume.name),
            }
            .into());
        }
        let next = volumes.keys().last().map_or(0, |last| last.0 + 1);
        if usize::from(next) >= MAX_VOLUMES {
            return Err(FsError::State {
                object: "the file system".into(),
                problem: format!("has {MAX_VOLUMES} volumes, which is the most"),
            }
            .into());
        }
        Ok(VolumeRecord {
            index: VolumeIndex(next),
            uuid: volume.uuid,
            name: volume.name.clone(),
            class: volume.class.clone(),
            clusters: (volume.device.size() / CLUSTER).min(crate::units::MAX_CLUSTERS - 1),
            bitmap: self.state.new_id()?,
            sums: self.state.new_id()?,
            draining: false,
        })
    }

    /// Adds a volume while the file system is being made: nothing is missing then.
    fn add_volume_now(&self, volume: &GivenVolume<V>) -> Result<(), FsError> {
        let added = self.volume_record(volume).and_then(|record| {
            let record = Record::Volume(record);
            self.state.prepare(&record)?;
            Ok(self.state.apply(&record, &mut Effects::default())?)
        });
        added.map_err(|refusal| match refusal {
            Refusal::Error(error) => error,
            Refusal::Stop(Stop::Damaged(damage)) => damage.into(),
            Refusal::Stop(Stop::Missing(_)) => FsError::Open("a new file system needs a page".into()),
        })
    }
}
