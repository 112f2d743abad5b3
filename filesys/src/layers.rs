//! Layers: a file that starts as what another one is, and from then on is its own.
//!
//! # The life of a snapshot
//! 1. Writers of all files that are to be frozen are let out, and none is let in ([`Gate::all`](crate::gate::Gate::all)).
//! 2. In one transaction each file gets a child, and so is frozen. Open handles go on with the children.
//! 3. Writers are let in again; they write to the children. The transaction is committed. Nothing was copied.
//!
//! # Absorbing
//! All that takes layers away is one operation: a child takes over what its parent has, where it has nothing itself, and the parent goes.
//! Places move from map to map, whole pages of a map at once; data are copied only where both have parts of one cluster. The child
//! may be written meanwhile, and after a crash it goes on where it was.
//!
//! ```text
//!   commit        base ◄── layer              the layer absorbs the base and gets its name
//!   delete        base ◄── middle ◄── head    the head absorbs the middle
//!   discard       base ◄── layer              the layer is deleted; nobody absorbs
//! ```

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file::File;
use crate::file_core::{Absorbing, FileCore};
use crate::gate::{self, Boxed, Pass};
use crate::inode::{Flags, Kind};
use crate::namespace::check_size;
use crate::open::FileSystem;
use crate::record::{LARGEST, Record};
use crate::state::{Damage, absorb_copies, entries_of};
use crate::tree::node::{Child, FANOUT};
use crate::units::{FileId, SUB_CLUSTER, SUBS, SubMask};

const PAGE: u64 = FANOUT as u64;
/// Clusters of which parts are copied at once.
const AT_ONCE: usize = 32;
/// Pages of a merge in work at once.
const LANES: usize = 3;

/// A layer that is to be put on a file.
#[derive(Debug)]
pub struct Snapshot<'a, V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    /// The file that is frozen.
    pub path: &'a str,
    /// The layer that is written from then on.
    pub layer: &'a str,
    /// An open handle of the file, which goes on with the layer.
    pub handle: Option<&'a File<V, C>>,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Freezes files and puts a layer on each, all at one moment and all or none.
    ///
    /// # Errors
    /// A file does not exist or is open without its handle being given, a name is taken or impossible.
    pub async fn snapshot(&self, snapshots: &[Snapshot<'_, V, C>], now: u64) -> Result<Vec<FileId>, FsError> {
        let core = self.core();
        let mut ids = Vec::with_capacity(snapshots.len());
        for _ in snapshots {
            ids.push(FileId(core.state.new_id()?));
        }
        let ticket = core
            .admit(LARGEST * snapshots.len().max(1), Need::Ordinary)
            .await?;
        let mut files = Vec::with_capacity(snapshots.len());
        for snapshot in snapshots {
            files.push(core.look(|_| core.find_regular(snapshot.path)).await?);
        }
        files.iter().try_for_each(|file| core.check_durable(file))?;
        // In order of numbers, so that two groups do not wait in a circle.
        let mut order: Vec<&Rc<FileCore>> = files.iter().collect();
        order.sort_by_key(|file| file.id);
        order.dedup_by_key(|file| file.id);
        if order.len() < files.len() {
            return Err(FsError::State {
                object: "a snapshot".into(),
                problem: "names a file twice".into(),
            });
        }
        let mut passes: Vec<Pass<'_>> = Vec::with_capacity(order.len());
        for file in order {
            passes.push(file.gate.all().await);
        }
        let (group, ()) = core
            .transact_admitted(&ticket, |_| {
                let mut records = Vec::with_capacity(snapshots.len());
                for ((snapshot, file), id) in snapshots.iter().zip(&files).zip(&ids) {
                    if !Rc::ptr_eq(&core.find_regular(snapshot.path)?, file) {
                        block_io::cover!("filesys: a file was deleted or renamed under a snapshot");
                        return Err(FsError::NotFound {
                            path: snapshot.path.to_owned(),
                        }
                        .into());
                    }
                    records.push(core.layer(snapshot, file, *id, now)?);
                }
                check_names_differ(&records)?;
                Ok((records, ()))
            })
            .await?;
        // What a frozen file shows must not change any more, by a crash neither.
        for file in &files {
            core.needs_unflushed(group, file);
        }
        core.chains.set(core.chains.get() + 1);
        for ((snapshot, file), id) in snapshots.iter().zip(&files).zip(&ids) {
            let layer = core.state.files.borrow().get(id).map(Rc::clone);
            if let (Some(handle), Some(layer)) = (snapshot.handle, layer) {
                // What was written to the file and is not durable yet is the layer's to flush as well.
                layer.group.set(group.max(file.group.get()));
                layer.written.borrow_mut().extend(file.written.borrow().iter());
                handle.follow(&layer, snapshot.layer);
            }
        }
        drop(passes);
        core.commit(group).await?;
        files.iter().try_for_each(|file| core.check_durable(file))?;
        Ok(ids)
    }

    /// Makes a file whose content is that of a frozen one; nothing is copied.
    ///
    /// # Errors
    /// There is none, it is not frozen, or the name is taken or impossible.
    pub async fn clone_file(&self, frozen: &str, path: &str, now: u64) -> Result<FileId, FsError> {
        let core = self.core();
        let id = FileId(core.state.new_id()?);
        let (group, ()) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let parent = core.find_regular(frozen)?;
                if parent.inode.borrow().flags.has(Flags::ABSORBED) {
                    return Err(FsError::Busy {
                        object: frozen.to_owned(),
                        problem: "it is being merged".into(),
                    }
                    .into());
                }
                if !parent.inode.borrow().is_frozen() {
                    return Err(FsError::State {
                        object: frozen.to_owned(),
                        problem: "is written to: make a snapshot of it first, and clone what is frozen then"
                            .into(),
                    }
                    .into());
                }
                Ok((vec![core.layer_record(&parent, path, id, now)?], ()))
            })
            .await?;
        core.chains.set(core.chains.get() + 1);
        core.commit(group).await?;
        Ok(id)
    }

    /// Freezes a file, or lets it be written again if no other file depends on it.
    ///
    /// # Errors
    /// There is none; it is open for writing; it has children.
    pub async fn set_frozen(&self, path: &str, frozen: bool) -> Result<(), FsError> {
        let core = self.core();
        let (group, file) = core
            .transact(LARGEST, Need::Ordinary, |_| {
                let file = core.find_regular(path)?;
                if file.writers.get() > 0 {
                    return Err(FsError::Busy {
                        object: path.to_owned(),
                        problem: "it is open for writing".into(),
                    }
                    .into());
                }
                if !frozen && file.inode.borrow().children > 0 {
                    return Err(FsError::Frozen {
                        file: path.to_owned(),
                    }
                    .into());
                }
                if !frozen {
                    core.check_unused(path, &file)?;
                }
                Ok((
                    vec![Record::Freeze {
                        file: file.id,
                        frozen,
                    }],
                    file,
                ))
            })
            .await?;
        core.needs_unflushed(group, &file);
        core.commit(group).await?;
        core.check_durable(&file)
    }

    /// A layer takes over what its parent has, and the parent goes. With `named`, the layer gets the parent's name (a commit of the layer
    /// into its base); else it keeps its own (the parent, a snapshot, is deleted). The layer may be in use.
    ///
    /// # Errors
    /// There is no parent, others depend on it, too, it is open or pinned, or a volume fails: then it can be called again. What a crash
    /// has cut is asked for again, or goes on when the file system is opened with [`crate::OpenOptions::resume_merges`].
    pub async fn absorb(&self, layer: &str, named: bool) -> Result<(), FsError> {
        self.absorb_while(layer, named, || true).await.map(|_| ())
    }

    /// As [`Self::absorb`]. `go_on` is asked after every 16 MiB of the layer. Where it does not want that, false is returned: the merge is
    /// to be asked for again, as after a crash.
    ///
    /// # Errors
    /// As [`Self::absorb`].
    pub async fn absorb_while(
        &self,
        layer: &str,
        named: bool,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<bool, FsError> {
        let core = self.core();
        let (group, (parent, _absorbing)) = core
            .transact(LARGEST, Need::Freeing, |state| {
                let child = core.find_regular(layer)?;
                let parent = child.inode.borrow().parent.ok_or_else(|| FsError::State {
                    object: layer.to_owned(),
                    problem: "has no parent to absorb".into(),
                })?;
                let parent = state.file(parent)?;
                core.check_absorbable(layer, &parent)?;
                core.check_unpinned(layer, &child)?;
                core.check_unpinned(layer, &parent)?;
                core.check_apart(layer, &child, &parent)?;
                let absorbing = Absorbing::begin(&parent).ok_or_else(|| FsError::Busy {
                    object: layer.to_owned(),
                    problem: "it absorbs its parent already".into(),
                })?;
                let flags = parent.inode.borrow().flags;
                if flags.has(Flags::ABSORBED) {
                    block_io::cover!("filesys: an absorption goes on");
                    if flags.has(Flags::GIVES_NAME) == named {
                        return Ok((Vec::new(), (parent.id, absorbing)));
                    }
                }
                let record = Record::Absorb {
                    parent: parent.id,
                    named,
                };
                Ok((vec![record], (parent.id, absorbing)))
            })
            .await?;
        // Places of the parent may be written to from now on: after a crash it must not be taken for an image of what was.
        core.commit(group).await?;
        let done = core.absorb_parent(parent, &mut go_on).await?;
        core.commit(core.journal.open_group()).await?;
        Ok(done)
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    fn check_absorbable(&self, layer: &str, parent: &FileCore) -> Result<(), FsError> {
        let (name, children) = {
            let inode = parent.inode.borrow();
            (inode.name.clone(), inode.children)
        };
        if children > 1 {
            return Err(FsError::Busy {
                object: name,
                problem: format!("{} other files depend on it as well as {layer}", children - 1),
            });
        }
        if parent.inode.borrow().flags.has(Flags::ABSORBED) {
            return Ok(());
        }
        self.check_unused(&name, parent)
    }

    /// Content moves between two neighbours of a chain at a time.
    pub(crate) fn check_apart(&self, name: &str, child: &FileCore, parent: &FileCore) -> Result<(), Refusal> {
        let grand = parent.parent();
        let above = child.inode.borrow().flags.has(Flags::ABSORBED);
        let below = match grand {
            Some(grand) => self.state.file(grand)?.inode.borrow().flags.has(Flags::ABSORBED),
            None => false,
        };
        if above || below {
            block_io::cover!("filesys: a neighbour in the chain is absorbed just now");
            return Err(FsError::Busy {
                object: name.to_owned(),
                problem: "a neighbour of it is being merged: wait until that has ended".into(),
            }
            .into());
        }
        Ok(())
    }

    fn layer(
        &self,
        snapshot: &Snapshot<'_, V, C>,
        file: &Rc<FileCore>,
        id: FileId,
        now: u64,
    ) -> Result<Record, Refusal> {
        let writers = u32::from(
            snapshot
                .handle
                .is_some_and(|handle| Rc::ptr_eq(&handle.head(), file)),
        );
        if snapshot.handle.is_some() && writers == 0 {
            return Err(FsError::Busy {
                object: snapshot.path.to_owned(),
                problem: "the handle given is of another file".into(),
            }
            .into());
        }
        if file.writers.get() > writers || file.inode.borrow().flags.has(Flags::ABSORBED) {
            return Err(FsError::Busy {
                object: snapshot.path.to_owned(),
                problem: "it is open for writing elsewhere, or being merged".into(),
            }
            .into());
        }
        self.layer_record(file, snapshot.layer, id, now)
    }

    fn layer_record(&self, parent: &FileCore, path: &str, id: FileId, now: u64) -> Result<Record, Refusal> {
        let attributes = parent.inode.borrow().attributes.clone();
        // A layer has what was written since, so it is thin.
        let attributes = crate::inode::Attributes {
            thick: false,
            ..attributes
        };
        let size = parent.inode.borrow().size;
        check_size(path, size)?;
        let mut inode = self.new_inode(path, id, Kind::File, Some(&attributes))?;
        inode.home = parent.inode.borrow().home;
        inode.size = size;
        inode.created = now;
        inode.parent = Some(parent.id);
        Ok(Record::Create {
            inode: Box::new(inode),
        })
    }

    /// Moves all that a parent has to its only child, and ends the parent. False: it was broken off.
    pub(crate) async fn absorb_parent(
        &self,
        parent: FileId,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, FsError> {
        let (parent, child) = self.look(|state| Ok(state.absorption(parent)?)).await?;
        let progress = Progress {
            next: Cell::new(0),
            running: Cell::new(0),
            stopped: Cell::new(false),
            go_on: RefCell::new(go_on),
        };
        let lanes =
            (0..LANES).map(|_| -> Boxed<'_, _> { Box::pin(self.absorb_pages(&parent, &child, &progress)) });
        gate::all(lanes.collect())
            .await
            .into_iter()
            .collect::<Result<(), _>>()?;
        if progress.stopped.get() {
            block_io::cover!("filesys: a merge was broken off");
            return Ok(false);
        }
        self.cut_behind_end(&child).await?;
        self.transact(LARGEST * 2, Need::Freeing, |_| {
            let named = parent.inode.borrow().flags.has(Flags::GIVES_NAME);
            Ok((
                vec![Record::Absorbed {
                    parent: parent.id,
                    named,
                }],
                (),
            ))
        })
        .await?;
        self.chains.set(self.chains.get() + 1);
        self.changed.notify();
        Ok(true)
    }

    /// One page after the other of those that the parent still has, until there are none. While one lane waits for a flush, another copies.
    async fn absorb_pages(
        &self,
        parent: &Rc<FileCore>,
        child: &Rc<FileCore>,
        progress: &Progress<'_>,
    ) -> Result<(), FsError> {
        while !progress.stopped.get() {
            let from = progress.next.get();
            let found = self
                .look(|_| Ok(map_of(parent)?.next(from * PAGE)?.map(|span| span.start / PAGE)))
                .await;
            let page = match found {
                Ok(Some(page)) => page.max(from),
                Ok(None) => return Ok(()),
                Err(error) => {
                    progress.stopped.set(true);
                    return Err(error);
                }
            };
            if from != progress.next.get() {
                // Another lane has taken one meanwhile.
                continue;
            }
            progress.next.set(page + 1);
            progress.running.set(progress.running.get() + 1);
            if progress.running.get() > 1 {
                block_io::cover!("filesys: pages of a merge are in work at once");
            }
            // Neither is written to there, or relocated. In order of numbers: a parent is older than its child.
            let below = parent.gate.alone(page, page).await;
            let pass = child.gate.alone(page, page).await;
            let absorbed = self.absorb_page(parent, child, page * PAGE).await;
            drop(pass);
            drop(below);
            progress.running.set(progress.running.get() - 1);
            if absorbed.is_err() || !(progress.go_on.borrow_mut())() {
                progress.stopped.set(true);
            }
            absorbed?;
        }
        Ok(())
    }

    /// A child that is smaller than its parent was does not keep what it got behind its end. (Growing hides what ancestors have there.)
    async fn cut_behind_end(&self, child: &Rc<FileCore>) -> Result<(), FsError> {
        let _alone = child.gate.all().await;
        let mut at = child.inode.borrow().size.div_ceil(crate::units::CLUSTER);
        loop {
            // A page has something somewhere, not just behind the end.
            let next = self
                .look(|_| Ok(map_of(child)?.next(at)?.map(|span| span.start.max(at))))
                .await?;
            let Some(first) = next else { return Ok(()) };
            let page = self.look(|_| entries(child, first / PAGE * PAGE)).await?;
            at = (first / PAGE + 1) * PAGE;
            let behind = usize::try_from(first % PAGE).unwrap_or(0);
            if page.iter().skip(behind).all(|entry| entry.is_hole()) {
                continue;
            }
            block_io::cover!("filesys: clusters behind the end of a child that absorbs");
            let count = (first / PAGE + 1) * PAGE - first;
            let reap = Record::Reap {
                file: child.id,
                first: u32::try_from(first).unwrap_or(u32::MAX),
                count: u32::try_from(count).unwrap_or(0),
            };
            self.transact(LARGEST, Need::Freeing, |_| Ok((vec![reap.clone()], ())))
                .await?;
        }
    }

    /// One page of the map; nobody writes to the child there.
    async fn absorb_page(
        &self,
        parent: &Rc<FileCore>,
        child: &Rc<FileCore>,
        first: u64,
    ) -> Result<(), FsError> {
        let number = u32::try_from(first).unwrap_or(u32::MAX);
        let (below, above) = self
            .look(|_| {
                let empty = map_of(child)?.child(first, 0)?;
                if matches!(empty, Child::Empty) {
                    return Ok((entries(parent, first)?, None));
                }
                Ok((entries(parent, first)?, Some(entries(child, first)?)))
            })
            .await?;
        let record = match above {
            None => Record::AbsorbChild {
                parent: parent.id,
                first: number,
            },
            Some(above) => {
                let keep = self.copy_parts(child, first, &below, &above).await?;
                Record::AbsorbLeaf {
                    parent: parent.id,
                    first: number,
                    keep,
                }
            }
        };
        // What was copied is durable before the map shows it, as old places go. And what moves from map to map is durable: should a volume fail,
        // what is taken back is looked for where it was written.
        for file in [parent, child] {
            self.flush_written(file).await?;
        }
        let (group, ()) = self
            .transact(LARGEST, Need::Freeing, |_| Ok((vec![record.clone()], ())))
            .await?;
        child.group.set(child.group.get().max(group));
        Ok(())
    }

    /// Where both have parts of a cluster: copies the smaller part to the place of the larger, which is kept. Returns whose is.
    async fn copy_parts(
        &self,
        child: &FileCore,
        first: u64,
        below: &[Entry; FANOUT],
        above: &[Entry; FANOUT],
    ) -> Result<[u8; 32], FsError> {
        let mut keep = [0; 32];
        let mut joins = Vec::new();
        for (index, (old, new)) in below.iter().zip(above).enumerate() {
            if old.location().is_none() || new.location().is_none() {
                continue;
            }
            let parent_part = SubMask(old.valid() & new.holes());
            let kept = parent_part.0.count_ones() > new.valid().count_ones();
            if kept {
                keep[index / 8] |= 1 << (index % 8);
            }
            let (source, target) = if kept { (*new, *old) } else { (*old, *new) };
            joins.push(Join {
                cluster: first + index as u64,
                source,
                target,
                mask: absorb_copies(*new, *old, kept),
            });
        }
        for joins in joins.chunks(AT_ONCE) {
            let copies = joins
                .iter()
                .map(|join| -> Boxed<'_, _> { Box::pin(self.join(child, join)) });
            gate::all(copies.collect())
                .await
                .into_iter()
                .collect::<Result<(), _>>()?;
        }
        Ok(keep)
    }

    async fn join(&self, child: &FileCore, join: &Join) -> Result<(), FsError> {
        let Join { source, target, .. } = join;
        let Some(to) = target.location() else {
            return Ok(());
        };
        self.copy_subs(child, join.cluster, *source, to, join.mask)
            .await?;
        // The cluster has checksums if one of both had; what comes from the other has none.
        let strange = match (source.is_checked(), target.is_checked()) {
            (true, false) => SubMask(target.valid() & !join.mask.0),
            (false, true) => join.mask,
            _ => SubMask::NONE,
        };
        if strange.0 != 0 {
            block_io::cover!("filesys: a cluster with checksums absorbs one without");
            let volume = self.state.volume(to.volume)?;
            let first = to.offset() / SUB_CLUSTER;
            let _checking = self.begin_copy(&volume, &volume, first, SUBS.into()).await?;
            self.forget_sums(to, strange).await?;
        }
        Ok(())
    }
}

/// How far a merge is, for all of its lanes.
struct Progress<'a> {
    /// Pages before this one are done or in work.
    next: Cell<u64>,
    /// Pages in work.
    running: Cell<usize>,
    /// No lane begins another page.
    stopped: Cell<bool>,
    /// Asked after each page.
    go_on: RefCell<&'a mut dyn FnMut() -> bool>,
}

/// A cluster of which both have parts.
struct Join {
    cluster: u64,
    source: Entry,
    /// Whose place is kept.
    target: Entry,
    /// What is copied.
    mask: SubMask,
}

/// Layers that are made together get different names.
fn check_names_differ(records: &[Record]) -> Result<(), FsError> {
    let mut names = std::collections::BTreeSet::new();
    for record in records {
        if let Record::Create { inode } = record
            && !names.insert((inode.directory, inode.name.as_str()))
        {
            return Err(FsError::Exists {
                path: inode.name.clone(),
            });
        }
    }
    Ok(())
}

fn map_of(file: &FileCore) -> Result<&crate::tree::radix::Tree, Damage> {
    file.map()
        .ok_or_else(|| Damage::new(file.id, "is taken for a file and is a directory"))
}

/// The entries of a page.
fn entries(file: &FileCore, first: u64) -> Result<[Entry; FANOUT], Refusal> {
    Ok(entries_of(map_of(file)?, first)?)
}
