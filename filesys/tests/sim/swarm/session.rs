//! An open file system in a history: its handles, who changes which names, and the steps on content.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Failure, Sim};
use block_io::{BlockDevice, Clock as _, Durability, IoError, ZeroMode};
use filesys::{Access, FsError};

use super::{Bed, SUB, Step};
use crate::harness::{SimFs, failed};
use crate::machine::{Handle, Promise, is_full, look};

/// A file system that is open, and what is done with it.
pub(super) struct Session<V: BlockDevice + 'static> {
    pub(super) fs: SimFs<V>,
    pub(super) promise: Promise,
    pub(super) open: RefCell<Vec<Rc<Handle<V>>>>,
    pub(super) faults: bool,
    pub(super) racy: bool,
    /// A request failed, as was wished.
    pub(super) failed: Cell<bool>,
    /// Names that are being changed; the model wants to know in which order.
    pub(super) busy: RefCell<BTreeSet<String>>,
    /// Names of files that change their size, so nobody writes.
    pub(super) still: RefCell<BTreeSet<String>>,
    /// Changes of sizes that were begun.
    pub(super) resizes: Cell<u64>,
}

impl<V: BlockDevice + 'static> Session<V> {
    pub(super) fn new(fs: SimFs<V>, promise: &Promise, faults: bool, racy: bool) -> Rc<Self> {
        Rc::new(Self {
            fs,
            promise: Rc::clone(promise),
            open: RefCell::default(),
            faults,
            racy,
            failed: Cell::new(false),
            busy: RefCell::default(),
            still: RefCell::default(),
            resizes: Cell::default(),
        })
    }

    /// Some file of the model that has a name.
    pub(super) fn path(&self, file: u64) -> Option<String> {
        let model = self.promise.borrow();
        let files = model.tree.values().filter(|entry| !entry.directory);
        let paths: Vec<_> = files.filter_map(|entry| entry.path.clone()).collect();
        let index = usize::try_from(file).ok()?.checked_rem(paths.len())?;
        paths.get(index).cloned()
    }

    pub(super) fn handle_of(&self, path: &str) -> Option<Rc<Handle<V>>> {
        let node = self.promise.borrow().find(path)?;
        let open = self.open.borrow();
        open.iter()
            .find(|handle| handle.node.get() == node)
            .map(Rc::clone)
    }

    /// An open handle of some file that can be written.
    async fn handle(&self, file: u64) -> Result<Option<Rc<Handle<V>>>, Failure> {
        let Some(path) = self.path(file) else {
            return Ok(None);
        };
        if self.still.borrow().contains(&path) {
            return Ok(None);
        }
        if let Some(handle) = self.handle_of(&path) {
            return Ok(Some(handle));
        }
        if self.busy.borrow().contains(&path) {
            return Ok(None);
        }
        match self.fs.open_file(&path, Access::Write).await {
            Ok(file) => {
                let Ok(handle) = Handle::new(&self.promise, &path, file) else {
                    return Ok(None);
                };
                let handle = Rc::new(handle);
                self.open.borrow_mut().push(Rc::clone(&handle));
                Ok(Some(handle))
            }
            Err(FsError::Frozen { .. } | FsError::Busy { .. } | FsError::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) fn close(&self, path: &str) {
        if let Some(handle) = self.handle_of(path) {
            self.open.borrow_mut().retain(|open| !Rc::ptr_eq(open, &handle));
        }
    }

    fn request(&self, done: Result<(), IoError>) -> Result<(), Failure> {
        match done {
            Err(error) if is_full(&error) => {
                block_io::cover!("swarm: a volume was full");
                Ok(())
            }
            Err(error)
                if error.to_string().contains("frozen")
                    || format!("{}", error.cause()).contains("frozen") =>
            {
                Ok(())
            }
            Err(error) if error.cause().to_string().contains("smaller") => Ok(()),
            Err(_) if self.faults => {
                self.failed.set(true);
                Ok(())
            }
            other => Ok(other?),
        }
    }

    async fn step(&self, step: &Step) -> Result<(), Failure> {
        let promise = &self.promise;
        match step {
            Step::Write {
                file,
                sector,
                count,
                fua,
            } => {
                let Some(handle) = self.handle(*file).await? else {
                    return Ok(());
                };
                let durability = if *fua {
                    Durability::Durable
                } else {
                    Durability::Volatile
                };
                let Some((offset, length)) = range(&handle, sector * 512, count * 512) else {
                    return Ok(());
                };
                self.request(handle.write(promise, offset, length, durability).await)
            }
            Step::Discard { file, sub, count } => {
                let Some(handle) = self.handle(*file).await? else {
                    return Ok(());
                };
                let Some((offset, length)) = range(&handle, sub * SUB, count * SUB) else {
                    return Ok(());
                };
                self.request(handle.discard(promise, offset, length).await)
            }
            Step::Zero {
                file,
                sub,
                count,
                keep,
            } => {
                let Some(handle) = self.handle(*file).await? else {
                    return Ok(());
                };
                let mode = if *keep {
                    ZeroMode::KeepAllocated
                } else {
                    ZeroMode::MayUnmap
                };
                let Some((offset, length)) = range(&handle, sub * SUB, count * SUB) else {
                    return Ok(());
                };
                self.request(handle.zero(promise, offset, length, mode).await)
            }
            Step::Flush { file } => {
                let Some(handle) = self.handle(*file).await? else {
                    return Ok(());
                };
                self.request(handle.flush(promise).await)
            }
            Step::Read { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                // What is read while a file shrinks may be cut off already or not.
                if self.still.borrow().contains(&path) {
                    return Ok(());
                }
                let Some(handle) = self.handle_of(&path) else {
                    return Ok(());
                };
                let size = handle.file.size();
                if size == 0 {
                    return Ok(());
                }
                if self.racy {
                    return Ok(());
                }
                let resizes = self.resizes.get();
                let checked = handle.check(promise, 0, size).await;
                if self.resizes.get() != resizes {
                    return Ok(());
                }
                checked.map_err(|failure| failure.context(&format!("reading {path}")))
            }
            Step::Checkpoint => self.fs.checkpoint().await.map_err(failed),
            _ => self.change(step).await,
        }
    }

    /// The names that a step changes, if nobody else is changing one of them.
    pub(super) fn claim(&self, step: &Step) -> Option<Claim<'_>> {
        let (files, name) = match step {
            Step::Create { name, .. } => (vec![], Some(name)),
            Step::Delete { file }
            | Step::Resize { file, .. }
            | Step::Absorb { file, .. }
            | Step::Thaw { file } => (vec![*file], None),
            Step::Rename { file, name } | Step::Clone { file, name } => (vec![*file], Some(name)),
            Step::Snapshot { file, other } => (std::iter::once(*file).chain(*other).collect(), None),
            _ => (vec![], None),
        };
        let mut names: BTreeSet<String> = files.into_iter().filter_map(|file| self.path(file)).collect();
        if let Step::Absorb { .. } = step {
            let model = self.promise.borrow();
            let parents = names
                .iter()
                .filter_map(|path| model.tree.get(&model.entry(path)?.parent?));
            let parents: Vec<_> = parents.filter_map(|parent| parent.path.clone()).collect();
            names.extend(parents);
        }
        names.extend(name.map(|name| format!("/{name}")));
        if !self.racy && names.iter().any(|name| self.busy.borrow().contains(name)) {
            return None;
        }
        self.busy.borrow_mut().extend(names.iter().cloned());
        Some(Claim {
            busy: &self.busy,
            names,
        })
    }

    /// Runs rounds until the history ends.
    pub(super) async fn work(
        self: Rc<Self>,
        sim: &Sim,
        bed: &impl Bed<Device = V>,
        steps: &[Step],
    ) -> Result<Rc<Self>, Failure> {
        let mut session = self;
        for round in steps.split_inclusive(Step::ends_round) {
            session.round(sim, round).await?;
            match round.last() {
                Some(Step::Reopen) => {
                    session.open.borrow_mut().clear();
                    session.fs.close().await.map_err(failed)?;
                    let fs = bed.open(sim).await.map_err(failed)?;
                    session = Self::new(fs, &session.promise, session.faults, session.racy);
                }
                Some(step) => bed
                    .between(sim, &session, step)
                    .await
                    .map_err(|failure| failure.context(&format!("{step:?}")))?,
                None => {}
            }
            if session.promise.borrow().is_quiet() && !session.failed.get() && !session.racy {
                session.look().await?;
            }
        }
        Ok(session)
    }

    /// Names and chains are as in the model.
    async fn look(&self) -> Result<(), Failure> {
        let seen = look(&self.fs).await?;
        let fits = self.promise.borrow().fits(&seen);
        fits.map_err(|reason| Failure::from(reason).context("while it runs"))
    }

    async fn round(self: &Rc<Self>, sim: &Sim, steps: &[Step]) -> Result<(), Failure> {
        let left = Rc::new(Cell::new(steps.len()));
        let failure: Rc<RefCell<Option<Failure>>> = Rc::default();
        for step in steps {
            let step = step.clone();
            let (session, left, failure) = (Rc::clone(self), Rc::clone(&left), Rc::clone(&failure));
            sim.spawn(&format!("{step:?}"), async move {
                if let Err(error) = session.step(&step).await {
                    failure
                        .borrow_mut()
                        .get_or_insert(error.context(&format!("{step:?}")));
                }
                left.set(left.get() - 1);
            });
        }
        let clock = sim.clock();
        while left.get() > 0 {
            clock.sleep(Duration::from_micros(50)).await;
        }
        match failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

/// Names that are being changed.
pub(super) struct Claim<'a> {
    busy: &'a RefCell<BTreeSet<String>>,
    names: BTreeSet<String>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.busy.borrow_mut().retain(|name| !self.names.contains(name));
    }
}

/// A range cut at the end of the file.
fn range<V: BlockDevice + 'static>(handle: &Handle<V>, offset: u64, length: u64) -> Option<(u64, u64)> {
    let size = handle.file.size();
    let length = length.min(size.checked_sub(offset)?);
    (length > 0).then_some((offset, length))
}
