//! Commits and checkpoints: what makes changes durable.
//!
//! # A checkpoint
//! ```text
//!   in one moment    what files in memory know goes into the tables; the open group is closed: replay will begin behind it;
//!                    the roots are taken
//!   then, while      1  that group is committed, so what the checkpoint has is durable data
//!   files are        2  dirty pages get blocks that no checkpoint uses, children before parents, and are written
//!   written          3  the bitmap of the metadata volume is written to its other place; all is flushed
//!                    4  the superblock says that this checkpoint counts
//!                    5  the journal is free up to the position, and blocks that only the last checkpoint used are free
//! ```
//! A crash before 4 is done finds the last checkpoint with the journal behind it; nothing that these need was touched.

use std::future::Future;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoError, spawn_local};

use crate::checksum::crc32c;
use crate::core::Core;
use crate::error::{FsError, Refusal};
use crate::file::whole;
use crate::file_core::FileCore;
use crate::gate::{self, Boxed, Either};
use crate::journal::{BeforeWrite, Position};
use crate::superblock::{self, Superblock};
use crate::tree::codec::{self, PAGE};
use crate::tree::node::{Body, Child, Node, Ptr, Root};
use crate::units::SUB_CLUSTER;

/// Pages that one request writes, at most.
const RUN: usize = 64;
/// Requests at once.
const AT_ONCE: usize = 8;

/// Which checkpoints are asked for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// So many were.
    wanted: u64,
    /// So many of these have been made, several by one.
    made: u64,
    /// Blocks of the metadata volume that the next one frees.
    free: Vec<u64>,
}

/// What a checkpoint is of.
struct Cut {
    root: Root,
    position: Position,
    freed: Vec<u64>,
    next_object: u64,
}

/// Flushes volumes before a group is written.
pub(crate) struct Before<'a, V, C>(pub(crate) &'a Core<V, C>);

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> BeforeWrite for Before<'_, V, C> {
    async fn prepare(&self, group: u64) -> Result<(), IoError> {
        self.0.flush_for(group).await;
        Ok(())
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Returns when a group of the journal is durable.
    pub(crate) async fn commit(&self, group: u64) -> Result<(), FsError> {
        if group <= self.journal.durable_group() {
            return Ok(());
        }
        let committed = self.journal.commit(group).await;
        self.release_freed();
        committed.map_err(|error| self.fail(&error))
    }

    /// Returns when a group of the journal would be found if the process were killed.
    pub(crate) async fn outlive(&self, group: u64) -> Result<(), FsError> {
        match self.journal.survives_a_kill(group) {
            Ok(true) => Ok(()),
            Ok(false) => self.commit(group).await,
            Err(error) => Err(self.fail(&error)),
        }
    }

    /// The data of a file that were written before, copies among them, are durable on all volumes but those that had failed before; those are
    /// as they are.
    pub(crate) async fn flush_written(&self, file: &FileCore) -> Result<(), FsError> {
        let written: Vec<_> = {
            let written = file.written.borrow();
            written.iter().map(|(volume, stamp)| (*volume, *stamp)).collect()
        };
        let mut volumes = Vec::with_capacity(written.len());
        for (index, stamp) in written {
            let volume = self.state.volume(index)?;
            if !volume.failed.get() {
                volumes.push((volume, stamp));
            }
        }
        let flushes = volumes
            .iter()
            .map(|(volume, stamp)| -> Boxed<'_, _> { Box::pin(self.flush_volume(volume, *stamp)) });
        Ok(gate::all(flushes.collect())
            .await
            .into_iter()
            .collect::<Result<(), _>>()?)
    }

    /// Everything that was written to a file before is durable afterwards.
    pub(crate) async fn flush_file(&self, file: &FileCore) -> Result<(), FsError> {
        let group = file.group.get();
        self.flush_written(file).await?;
        self.commit(group).await?;
        self.check_durable(file)
    }

    /// After a change: starts a checkpoint when there is much to write. (The journal's filling up is watched by a task.)
    pub(crate) fn after_change(&self) {
        if self.has_many_dirty() || self.housekeeping.get() {
            self.changed.notify();
        }
    }

    fn has_many_dirty(&self) -> bool {
        self.state.pages.dirtied() > self.options.dirty_pages
    }

    /// Waits for a checkpoint that begins now or later.
    pub(crate) async fn checkpoint_now(&self) -> Result<(), FsError> {
        self.checkpoint_freeing(&[]).await
    }

    /// A checkpoint after which these blocks of the metadata volume are free as well. It is made by a task of its own, so that nothing
    /// happens to it when who waits goes away.
    pub(crate) async fn checkpoint_freeing(&self, blocks: &[u64]) -> Result<(), FsError> {
        self.check()?;
        let number = {
            let mut asked = self.checkpoints.borrow_mut();
            asked.wanted += 1;
            asked.free.extend(blocks);
            asked.wanted
        };
        let made = || self.checkpoints.borrow().made >= number;
        self.changed.notify();
        self.changed
            .until(|| (made() || self.closing.get() || self.check().is_err()).then_some(()))
            .await;
        self.check()?;
        if !made() {
            // The task ends.
            self.make_checkpoint(false).await?;
        }
        Ok(())
    }

    /// Makes a checkpoint when no other runs; `clean` says that it is the last one.
    pub(crate) async fn make_checkpoint(&self, clean: bool) -> Result<(), FsError> {
        self.check()?;
        let running = self.begin_checkpointing().await;
        let (number, free) = {
            let mut asked = self.checkpoints.borrow_mut();
            (asked.wanted, std::mem::take(&mut asked.free))
        };
        let done = self.checkpoint(clean, &free).await;
        drop(running);
        match done {
            Ok(()) => {
                let mut asked = self.checkpoints.borrow_mut();
                asked.made = asked.made.max(number);
                drop(asked);
                self.changed.notify();
                Ok(())
            }
            Err(error) => {
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// No checkpoint runs while this is there.
    pub(crate) async fn begin_checkpointing(&self) -> Checkpointing<'_, V, C> {
        self.changed
            .until(|| (!self.checkpointing.replace(true)).then_some(()))
            .await;
        Checkpointing(self)
    }

    async fn checkpoint(&self, clean: bool, free: &[u64]) -> Result<(), FsError> {
        let cut = self.cut_durable().await?;
        let mut dirty = Vec::new();
        collect(&cut.root.child, &mut dirty);
        let mut blocks = Vec::with_capacity(dirty.len());
        let count = dirty.len() as u64;
        let taken = self.space.allocate(count, &mut blocks)
            || (self.space.break_holds() && self.space.allocate(count, &mut blocks));
        if !taken {
            return Err(FsError::NoSpace {
                what: "the metadata volume".into(),
                remedy: "grow it",
            });
        }
        // What is repaired is in use; a block that was given up meanwhile is used again here at the earliest.
        self.mended().await;
        self.write_pages(&dirty, &blocks).await?;
        drop(dirty);
        self.space.free(&cut.freed).map_err(|error| self.fail(&error))?;
        self.space.free(free).map_err(|error| self.fail(&error))?;
        let space = self.space.store().await.map_err(|error| self.fail(&error))?;
        self.meta.flush().await?;
        let sequence = self.superblock.borrow().sequence + 1;
        let superblock = Superblock {
            sequence,
            replay: cut.position,
            space,
            root: superblock::Root {
                slot: codec::encode_root(&cut.root),
                level: cut.root.level,
            },
            next_object: cut.next_object,
            clean,
            ..*self.superblock.borrow()
        };
        let mut holders = *self.holders.borrow();
        let written = superblock::write(&*self.meta, &superblock, &mut holders).await;
        self.holders.replace(holders);
        written.map_err(|error| self.fail(&error))?;
        self.superblock.replace(superblock);
        self.space.committed();
        self.journal.release(&cut.position);
        self.unchecked.borrow_mut().checkpointed();
        drop(cut);
        self.unshare();
        self.trim_files();
        self.state.pages.evict(self.options.cached_pages);
        Ok(())
    }

    /// What the checkpoint is of, when everything that it relies on is durable.
    async fn cut_durable(&self) -> Result<Cut, FsError> {
        let mut freed = Vec::new();
        loop {
            let before = self.taken_back.get();
            self.distrust_sums().await?;
            let cut = self.cut().await?;
            freed.extend(&cut.freed);
            self.commit(cut.position.group - 1).await?;
            self.flush_checked().await?;
            if self.taken_back.get() == before {
                return Ok(Cut { freed, ..cut });
            }
            block_io::cover!("filesys: a checkpoint is cut again");
        }
    }

    /// What the checkpoint is of: all in one moment.
    async fn cut(&self) -> Result<Cut, FsError> {
        loop {
            match self.state.gather() {
                Ok(()) => break,
                Err(missing) => self.resolve(Refusal::from(missing)).await?,
            }
        }
        let position = self.journal.close_group();
        self.begin_checked_again()?;
        Ok(Cut {
            root: self.state.objects.to_root(),
            position,
            freed: self.state.pages.begin_checkpoint(),
            next_object: self.state.next_id(),
        })
    }

    /// Writes dirty pages to blocks, in order: children come before their parents.
    async fn write_pages(&self, dirty: &[Rc<Node>], blocks: &[u64]) -> Result<(), FsError> {
        let mut rest = dirty.iter().zip(blocks).peekable();
        while rest.peek().is_some() {
            let mut writes: Vec<Boxed<'_, Result<(), IoError>>> = Vec::new();
            while writes.len() < AT_ONCE {
                let Some((node, first)) = rest.next() else { break };
                let mut run = vec![node];
                while run.len() < RUN
                    && let Some((node, _)) = rest.next_if(|(_, block)| **block == first + run.len() as u64)
                {
                    run.push(node);
                }
                let mut buffer = AlignedBuffer::new(run.len() * PAGE);
                for ((node, page), block) in run
                    .iter()
                    .zip(buffer.as_mut_slice().chunks_mut(PAGE))
                    .zip(*first..)
                {
                    codec::encode(node, page);
                    node.ptr.set(Some(Ptr {
                        block,
                        crc: crc32c(page),
                        aux: codec::aux_of(&node.body.borrow()),
                        level: node.level,
                    }));
                }
                writes.push(Box::pin(async move {
                    let memory = whole(&buffer);
                    self.meta
                        .write(first * SUB_CLUSTER, &memory, Durability::Volatile)
                        .await
                }));
            }
            gate::all(writes).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    /// The table of objects forgets the pages in memory that are on media now, so that who changes one later does not find it shared.
    fn unshare(&self) {
        let root = self.state.objects.to_root();
        unshare(&root.child);
    }

    /// Forgets files that nobody has open.
    fn trim_files(&self) {
        let mut files = self.state.files.borrow_mut();
        if files.len() > self.options.cached_files {
            files.retain(|_, file| {
                // Who opens it again and flushes it wants to have all of it flushed.
                let unflushed = self.is_unflushed(file);
                unflushed || file.dirty.get() || file.opens.get() > 0 || Rc::strong_count(file) > 1
            });
        }
    }

    /// Starts what runs beside requests: writes groups of the journal, makes checkpoints, settles orphans.
    pub(crate) fn start(self: &Rc<Self>) {
        let core = Rc::clone(self);
        self.spawn(async move {
            if let Err(error) = core.journal.run(&Before(&core)).await {
                core.fail(&error);
            }
        });
        let core = Rc::clone(self);
        self.spawn(async move { core.make_checkpoints().await });
        let core = Rc::clone(self);
        self.spawn(async move { core.keep_journal_short().await });
        let core = Rc::clone(self);
        self.spawn(async move { core.commit_lately().await });
        if self.options.discard {
            let core = Rc::clone(self);
            self.spawn(async move { core.trim_lately().await });
        }
        let core = Rc::clone(self);
        self.spawn(async move { core.keep_house().await });
    }

    fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        self.running.set(self.running.get() + 1);
        let core = Rc::clone(self);
        let spawned = spawn_local(async move {
            task.await;
            core.running.set(core.running.get() - 1);
            core.changed.notify();
        });
        if spawned.is_err() {
            self.running.set(self.running.get() - 1);
            self.fail(&FsError::Open("a file system works only on a worker".into()));
        }
    }

    /// The checkpoints that are asked for, and those that are due as much has changed.
    async fn make_checkpoints(&self) {
        let is_over = || self.closing.get() || self.check().is_err();
        let is_due = || {
            let asked = self.checkpoints.borrow();
            asked.wanted > asked.made || self.has_many_dirty()
        };
        loop {
            self.changed.until(|| (is_over() || is_due()).then_some(())).await;
            if is_over() {
                return;
            }
            if let Err(error) = self.make_checkpoint(false).await {
                tracing::warn!(%error, "no checkpoint");
            }
        }
    }

    /// A checkpoint whenever half of the journal is full, or somebody waits for room in it.
    async fn keep_journal_short(&self) {
        let half = self.journal.capacity() / 2;
        let is_over = || self.closing.get() || self.check().is_err();
        loop {
            let end = self.changed.until(|| is_over().then_some(()));
            match gate::first(self.journal.pressure(half), end).await {
                Either::First(Ok(())) => {}
                Either::First(Err(_)) | Either::Second(()) => return,
            }
            // After a failure the journal stays as full as it is, and nothing here would wait any more.
            if is_over() {
                return;
            }
            if let Err(error) = self.checkpoint_now().await {
                tracing::warn!(%error, "no checkpoint");
            }
        }
    }

    /// Commits what nobody asks for, some time later, or when it is much.
    async fn commit_lately(&self) {
        let is_over = || self.closing.get() || self.check().is_err();
        loop {
            self.changed
                .until(|| (is_over() || self.lingering.get()).then_some(()))
                .await;
            let many = || self.unproven.borrow().are_many();
            let end = self.changed.until(|| (is_over() || many()).then_some(()));
            let pause = self.clock.sleep(self.options.commit_after);
            gate::first(end, pause).await;
            if is_over() {
                return;
            }
            self.lingering.set(false);
            if let Err(error) = self.commit(self.journal.open_group()).await {
                tracing::warn!(%error, "no commit");
            }
        }
    }

    async fn keep_house(self: &Rc<Self>) {
        let is_over = || self.closing.get() || self.check().is_err();
        let is_due = || self.housekeeping.get() && self.quiet.get() == 0;
        loop {
            self.changed.until(|| (is_over() || is_due()).then_some(())).await;
            if is_over() {
                return;
            }
            self.housekeeping.set(false);
            self.settling.set(true);
            let settled = self.settle_orphans().await;
            self.settling.set(false);
            self.changed.notify();
            if let Err(error) = settled {
                tracing::warn!(%error, "housekeeping of the file system");
            }
        }
    }
}

/// No other checkpoint runs.
pub(crate) struct Checkpointing<'a, V, C>(&'a Core<V, C>);

impl<V, C> Drop for Checkpointing<'_, V, C> {
    fn drop(&mut self) {
        self.0.checkpointing.set(false);
        self.0.changed.notify();
    }
}

/// Dirty pages, children before parents. Above a dirty page all are dirty.
fn collect(child: &Child, dirty: &mut Vec<Rc<Node>>) {
    let Child::Loaded(node) = child else { return };
    if !node.is_dirty() {
        return;
    }
    match &*node.body.borrow() {
        Body::Inner(children) => children.iter().for_each(|child| collect(child, dirty)),
        Body::Objects(roots) => roots
            .iter()
            .flatten()
            .for_each(|root| collect(&root.child, dirty)),
        Body::Map(_) | Body::Bits(_) | Body::Sums(_) | Body::Table(_) => {}
    }
    dirty.push(Rc::clone(node));
}

fn unshare(child: &Child) {
    let Child::Loaded(node) = child else { return };
    match &mut *node.body.borrow_mut() {
        Body::Inner(children) => children.iter().for_each(unshare),
        Body::Objects(roots) => {
            for root in roots.iter_mut().flatten() {
                if let Child::Loaded(node) = &root.child
                    && let Some(ptr) = node.ptr.get()
                {
                    root.child = Child::Media(ptr);
                }
            }
        }
        Body::Map(_) | Body::Bits(_) | Body::Sums(_) | Body::Table(_) => {}
    }
}
