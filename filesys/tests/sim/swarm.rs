//! The swarm level: long random histories of several users at once, of crashes, full volumes, failing requests.
//!
//! Each history has a few files and chains. Steps between two crashes run in *rounds*: the steps of a round run at the same time, each in
//! a task of its own, on whatever handles are open. At the end of a round all is compared with the model, and some rounds are cut by a crash.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultRule, Numbers, Rng, RunOptions, Sim, SwarmOptions, Workload,
    World, swarm,
};
use block_io::{Durability, IoError, Operation, ZeroMode};
use filesys::{
    Access, Attributes, FileSystem, FormatOptions, FsError, NewFile, OpenOptions, Relocation, Snapshot,
};

use crate::harness::{SimFs, failed, given};
use crate::machine::{Handle, Promise, absorb, adds_up, change, is_full, is_sound, look, verify};
use crate::model::Change;

const SUB: u64 = 4096;
const CLUSTER: u64 = 64 << 10;
/// Files that histories speak of.
const NAMES: u64 = 6;

/// One step. Numbers choose among what is there when it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Write {
        file: u64,
        sector: u64,
        count: u64,
        fua: bool,
    },
    Discard {
        file: u64,
        sub: u64,
        count: u64,
    },
    Zero {
        file: u64,
        sub: u64,
        count: u64,
        keep: bool,
    },
    Flush {
        file: u64,
    },
    Read {
        file: u64,
    },
    Create {
        name: u64,
        size: u64,
        thick: bool,
        checked: bool,
    },
    Delete {
        file: u64,
    },
    Rename {
        file: u64,
        name: u64,
    },
    Resize {
        file: u64,
        size: u64,
    },
    Snapshot {
        file: u64,
        other: Option<u64>,
    },
    Clone {
        file: u64,
        name: u64,
    },
    Absorb {
        file: u64,
        named: bool,
    },
    Thaw {
        file: u64,
    },
    Checksums {
        file: u64,
        on: bool,
    },
    Relocate {
        file: u64,
    },
    Checkpoint,
    /// The round ends: all steps since the last one ran at the same time.
    Join,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
    /// The next write of a data volume fails.
    WriteFails,
    /// Closed in order and opened again.
    Reopen,
}

/// What histories run on.
#[derive(Debug, Clone, Copy)]
struct Machines {
    volumes: u64,
    /// Clusters of each volume.
    clusters: u64,
    meta: u64,
    journal: u64,
    cached_pages: usize,
    dirty_pages: u64,
    faults: bool,
    /// Changes of the same names meet each other: then only errors and space are looked at.
    racy: bool,
}

struct Session {
    fs: SimFs,
    promise: Promise,
    open: RefCell<Vec<Rc<Handle>>>,
    faults: bool,
    racy: bool,
    /// A request failed, as was wished.
    failed: Cell<bool>,
    /// Names that are being changed; the model wants to know in which order.
    busy: RefCell<BTreeSet<String>>,
    /// Names of files that change their size, so nobody writes.
    still: RefCell<BTreeSet<String>>,
}

impl Machines {
    fn options(&self) -> OpenOptions {
        OpenOptions {
            cached_pages: self.cached_pages,
            cached_files: 1,
            dirty_pages: self.dirty_pages,
            // The model knows what was asked for, and not what goes on by itself.
            resume_merges: false,
            ..OpenOptions::default()
        }
    }

    fn world(&self) -> World {
        let meta = DiskOptions::new("meta", self.meta);
        let size = self.clusters * CLUSTER;
        let data = (0..self.volumes).map(|index| DiskOptions::new(&format!("v{index}"), size));
        let mut world = World::new(std::iter::once(meta).chain(data));
        let mut garbage = vec![0; usize::try_from(size).unwrap()];
        Rng::new(11).fill(&mut garbage);
        world.media[1..]
            .iter_mut()
            .for_each(|medium| medium.poke(0, &garbage));
        world
    }

    fn devices(&self, sim: &Sim) -> Vec<filesys::GivenVolume<block_io::sim::SimDisk>> {
        (1..sim.disks().len()).map(|index| given(sim, index)).collect()
    }

    async fn format(&self, sim: &Sim) -> Result<(), FsError> {
        let format = FormatOptions {
            uuid: [9; 16],
            seed: 77,
            journal_blocks: Some(self.journal),
            grow_to: 0,
        };
        let fs = FileSystem::format(
            given(sim, 0),
            self.devices(sim),
            &format,
            self.options(),
            sim.clock(),
        )
        .await?;
        fs.close().await
    }

    async fn open(&self, sim: &Sim) -> Result<SimFs, FsError> {
        FileSystem::open(
            Rc::new(sim.disk(0)),
            self.devices(sim),
            self.options(),
            sim.clock(),
        )
        .await
    }
}

impl Session {
    async fn new(machines: &Machines, sim: &Sim, promise: &Promise) -> Result<Rc<Self>, Failure> {
        let fs = machines.open(sim).await.map_err(failed)?;
        Ok(Rc::new(Self {
            fs,
            promise: Rc::clone(promise),
            open: RefCell::default(),
            faults: machines.faults,
            racy: machines.racy,
            failed: Cell::new(false),
            busy: RefCell::default(),
            still: RefCell::default(),
        }))
    }

    /// Some file of the model that has a name.
    fn path(&self, file: u64) -> Option<String> {
        let model = self.promise.borrow();
        let files = model.tree.values().filter(|entry| !entry.directory);
        let paths: Vec<_> = files.filter_map(|entry| entry.path.clone()).collect();
        let index = usize::try_from(file).ok()?.checked_rem(paths.len())?;
        paths.get(index).cloned()
    }

    fn handle_of(&self, path: &str) -> Option<Rc<Handle>> {
        let node = self.promise.borrow().find(path)?;
        let open = self.open.borrow();
        open.iter()
            .find(|handle| handle.node.get() == node)
            .map(Rc::clone)
    }

    /// An open handle of some file that can be written.
    async fn handle(&self, file: u64) -> Result<Option<Rc<Handle>>, Failure> {
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

    fn close(&self, path: &str) {
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
                let Some(handle) = self.handle_of(&path) else {
                    return Ok(());
                };
                let size = block_io::BlockDevice::size(&handle.file);
                if size == 0 {
                    return Ok(());
                }
                if self.racy {
                    return Ok(());
                }
                handle
                    .check(promise, 0, size)
                    .await
                    .map_err(|failure| failure.context(&format!("reading {path}")))
            }
            Step::Checkpoint => self.fs.checkpoint().await.map_err(failed),
            _ => self.change(step).await,
        }
    }

    /// The names that a step changes, if nobody else is changing one of them.
    fn claim(&self, step: &Step) -> Option<Claim<'_>> {
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
        Some(Claim { session: self, names })
    }

    async fn change(&self, step: &Step) -> Result<(), Failure> {
        let promise = &self.promise;
        let Some(_claim) = self.claim(step) else {
            return Ok(());
        };
        match step {
            Step::Create {
                name,
                size,
                thick,
                checked,
            } => {
                let path = format!("/{name}");
                let attributes = Attributes {
                    thick: *thick,
                    checksums: *checked,
                    ..Attributes::default()
                };
                let new = NewFile {
                    size: size * SUB,
                    attributes: Some(attributes),
                    now: 1,
                };
                let what = Change::Create {
                    path: path.clone(),
                    size: new.size,
                    directory: false,
                };
                change(promise, what, self.fs.create(&path, &new)).await.map(drop)
            }
            Step::Delete { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                self.close(&path);
                let what = Change::Delete { path: path.clone() };
                change(promise, what, self.fs.delete(&path)).await.map(drop)
            }
            Step::Rename { file, name } => {
                let Some(from) = self.path(*file) else {
                    return Ok(());
                };
                let to = format!("/{name}");
                let what = Change::Rename {
                    from: from.clone(),
                    to: to.clone(),
                };
                change(promise, what, self.fs.rename(&from, &to)).await.map(drop)
            }
            Step::Clone { file, name } => {
                let Some(frozen) = self.path(*file) else {
                    return Ok(());
                };
                let path = format!("/{name}");
                let what = Change::Clone {
                    frozen: frozen.clone(),
                    path: path.clone(),
                };
                change(promise, what, self.fs.clone_file(&frozen, &path, 1))
                    .await
                    .map(drop)
            }
            Step::Thaw { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let what = Change::Freeze {
                    path: path.clone(),
                    frozen: false,
                };
                change(promise, what, self.fs.set_frozen(&path, false))
                    .await
                    .map(drop)
            }
            Step::Checksums { file, on } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let attributes = Attributes {
                    checksums: *on,
                    ..Attributes::default()
                };
                match self.fs.set_attributes(&path, attributes).await {
                    Ok(()) | Err(FsError::NotFound { .. } | FsError::NoSpace { .. }) => Ok(()),
                    Err(error) => Err(failed(error)),
                }
            }
            Step::Relocate { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let Ok(stat) = self.fs.stat(&path).await else {
                    return Ok(());
                };
                let progress = |_| std::ops::ControlFlow::Continue(());
                match self
                    .fs
                    .relocate(stat.id, Relocation::Defragment, 0, progress)
                    .await
                {
                    Ok(_) | Err(FsError::NoSpace { .. } | FsError::Busy { .. }) => Ok(()),
                    Err(FsError::Io(_)) if self.faults => Ok(()),
                    Err(error) => Err(failed(error)),
                }
            }
            Step::Resize { file, size } => self.resize(*file, size * SUB).await,
            Step::Snapshot { file, other } => self.snapshot(*file, *other).await,
            Step::Absorb { file, named } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let simple = {
                    let model = promise.borrow();
                    let parent = model
                        .entry(&path)
                        .and_then(|entry| model.tree.get(&entry.parent?));
                    // Those without a name may be gone at any moment.
                    parent.is_some_and(|parent| parent.path.is_some())
                };
                if simple {
                    absorb(promise, &self.fs, &path, *named).await?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn resize(&self, file: u64, size: u64) -> Result<(), Failure> {
        let Some(path) = self.path(file) else {
            return Ok(());
        };
        let written = self
            .handle_of(&path)
            .is_some_and(|handle| Rc::strong_count(&handle) > 2);
        if written && !self.racy {
            return Ok(());
        }
        self.still.borrow_mut().insert(path.clone());
        let what = Change::Resize {
            path: path.clone(),
            size,
        };
        let done = change(&self.promise, what, self.fs.resize(&path, size)).await;
        self.still.borrow_mut().remove(&path);
        done.map(drop)
    }

    async fn snapshot(&self, file: u64, other: Option<u64>) -> Result<(), Failure> {
        let mut paths: Vec<String> = [Some(file), other]
            .into_iter()
            .flatten()
            .filter_map(|file| self.path(file))
            .collect();
        paths.dedup();
        let handles: Vec<_> = paths.iter().map(|path| self.handle_of(path)).collect();
        let pairs: Vec<_> = paths
            .iter()
            .map(|path| {
                // A name that was never used, so that a crash leaves no doubt about what is there.
                let mut model = self.promise.borrow_mut();
                model.stamp += 1;
                (path.clone(), format!("/s{}", model.stamp))
            })
            .collect();
        let snapshots: Vec<_> = pairs
            .iter()
            .zip(&handles)
            .map(|((path, layer), handle)| Snapshot {
                path,
                layer,
                handle: handle.as_ref().map(|handle| &handle.file),
            })
            .collect();
        if snapshots.is_empty() {
            return Ok(());
        }
        let done = change(
            &self.promise,
            Change::Snapshot(pairs.clone()),
            self.fs.snapshot(&snapshots, 1),
        )
        .await?;
        if done.is_some() {
            let model = self.promise.borrow();
            for ((_, layer), handle) in pairs.iter().zip(&handles) {
                if let (Some(handle), Some(node)) = (handle, model.find(layer)) {
                    handle.node.set(node);
                }
            }
        }
        Ok(())
    }

    /// Runs rounds until the history ends.
    async fn work(self: Rc<Self>, sim: Sim, machines: Machines, steps: Vec<Step>) -> Result<(), Failure> {
        let mut session = self;
        for round in
            steps.split_inclusive(|step| matches!(step, Step::Join | Step::Reopen | Step::WriteFails))
        {
            session.round(&sim, round).await?;
            match round.last() {
                Some(Step::WriteFails) if machines.faults => {
                    sim.inject(1, FaultRule::once(Fault::Error, Operation::Write).after(1));
                }
                Some(Step::Reopen) => {
                    session.open.borrow_mut().clear();
                    session.fs.close().await.map_err(failed)?;
                    session = Self::new(&machines, &sim, &session.promise).await?;
                }
                _ => {}
            }
            if session.promise.borrow().is_quiet() && !session.failed.get() && !session.racy {
                session.look(&sim).await?;
            }
        }
        Ok(())
    }

    /// Names and chains are as in the model.
    async fn look(&self, _sim: &Sim) -> Result<(), Failure> {
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
            block_io::Clock::sleep(&clock, std::time::Duration::from_micros(50)).await;
        }
        match failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

/// Names that are being changed.
struct Claim<'a> {
    session: &'a Session,
    names: BTreeSet<String>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.session
            .busy
            .borrow_mut()
            .retain(|name| !self.names.contains(name));
    }
}

/// A range cut at the end of the file.
fn range(handle: &Handle, offset: u64, length: u64) -> Option<(u64, u64)> {
    let size = block_io::BlockDevice::size(&handle.file);
    let length = length.min(size.checked_sub(offset)?);
    (length > 0).then_some((offset, length))
}

impl Machines {
    fn live(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = self.world();
        let promise = Promise::default();
        let made = world.run(&RunOptions::in_order(), async |sim| {
            self.format(&sim).await.map_err(failed)
        })?;
        made.ended.done().unwrap_or(Ok(()))?;
        world.settle();
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. })) {
            let mut options = RunOptions::random(rng.next_u64());
            options.max_events = 400_000;
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, async |sim| {
                let session = Session::new(self, &sim, &promise).await?;
                session.work(sim.clone(), *self, part.to_vec()).await
            })?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
            if rng.chance(1, 3) {
                // Once more while it recovers.
                let options = RunOptions::random(rng.next_u64()).crash_after(rng.below(150));
                let ran = world.run(&options, async |sim| self.recover(&sim, &promise).await)?;
                if let Ended::Done(result) = ran.ended {
                    result.map_err(|failure| failure.context("after the crash"))?;
                }
                world.crash(&mut rng);
            }
            let ran = world.run(&RunOptions::random(rng.next_u64()), async |sim| {
                self.recover(&sim, &promise).await?;
                // And it stays like this.
                self.recover(&sim, &promise).await
            })?;
            let recovered = ran.ended.done().unwrap_or(Ok(()));
            recovered.map_err(|failure| failure.context("after the crash"))?;
            world.settle();
        }
        Ok(())
    }

    async fn recover(&self, sim: &Sim, promise: &Promise) -> Result<(), Failure> {
        let fs = self.open(sim).await.map_err(failed)?;
        if self.racy {
            fs.settled().await;
            is_sound(&fs).await?;
            return fs.close().await.map_err(failed);
        }
        verify(&fs, promise, CLUSTER).await?;
        fs.settled().await;
        adds_up(&fs, promise).await?;
        is_sound(&fs).await?;
        fs.close().await.map_err(failed)
    }
}

impl Workload for Machines {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let sectors = 3 * CLUSTER / 512;
        let mut steps = Vec::new();
        for name in 0..3 {
            steps.push(Step::Create {
                name,
                size: 48,
                thick: rng.chance(1, 6),
                checked: rng.chance(1, 4),
            });
        }
        steps.push(Step::Join);
        while steps.len() < 120 {
            let file = rng.below(16);
            let name = rng.below(NAMES);
            let step = match rng.below(100) {
                0..3 => Step::Crash {
                    after: rng.below(900),
                },
                3..16 => Step::Join,
                16..22 => Step::Flush { file },
                22..28 => Step::Read { file },
                28..31 => Step::Discard {
                    file,
                    sub: rng.below(48),
                    count: 1 + rng.below(20),
                },
                31..34 => Step::Zero {
                    file,
                    sub: rng.below(48),
                    count: 1 + rng.below(20),
                    keep: rng.chance(1, 2),
                },
                34..37 => Step::Create {
                    name,
                    size: 1 + rng.below(60),
                    thick: rng.chance(1, 3),
                    checked: rng.chance(1, 4),
                },
                37..40 => Step::Delete { file },
                40..42 => Step::Rename { file, name },
                42..45 => Step::Resize {
                    file,
                    size: 1 + rng.below(60),
                },
                45..51 => Step::Snapshot {
                    file,
                    other: rng.chance(1, 3).then(|| rng.below(16)),
                },
                51..53 => Step::Clone { file, name },
                53..58 => Step::Absorb {
                    file,
                    named: rng.chance(1, 2),
                },
                58 => Step::Thaw { file },
                59 => Step::Checksums {
                    file,
                    on: rng.chance(1, 2),
                },
                60..62 => Step::Relocate { file },
                62..64 => Step::Checkpoint,
                64 => Step::WriteFails,
                65 => Step::Reopen,
                _ => Step::Write {
                    file,
                    sector: if rng.chance(1, 2) {
                        rng.below(sectors)
                    } else {
                        rng.below(sectors / 8) * 8
                    },
                    count: if rng.chance(1, 2) {
                        1 + rng.below(40)
                    } else {
                        8 * (1 + rng.below(20))
                    },
                    fua: rng.chance(1, 6),
                },
            };
            steps.push(step);
        }
        steps
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        self.live(seed, history)
    }
}

fn run(machines: Machines, seed: u64, histories: u64) -> Numbers {
    let options = SwarmOptions { seed, histories };
    let numbers = swarm(&machines, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{machines:?}\n{numbers}");
    numbers
}

const ROOMY: Machines = Machines {
    volumes: 2,
    clusters: 300,
    meta: 2 << 20,
    journal: 64,
    cached_pages: 64,
    dirty_pages: 64,
    faults: false,
    racy: false,
};

#[test]
fn several_users_and_crashes() {
    let numbers = run(ROOMY, 1, 150);
    let missing = numbers.missing(&[
        "filesys: a checkpoint began while data with checksums were on their way",
        "filesys: a checksum of an earlier user of a place was forgotten",
        "filesys: a cluster with checksums absorbs one without",
        "filesys: a group was replayed",
        "filesys: a part of a sub-cluster was written",
    ]);
    if std::env::var_os("SMSVMM_SIM_SEED").is_none() {
        assert!(missing.is_empty(), "{missing:?} were not reached");
    }
}

#[test]
fn hardly_any_memory_and_a_checkpoint_every_moment() {
    let machines = Machines {
        cached_pages: 2,
        dirty_pages: 8,
        journal: 16,
        ..ROOMY
    };
    run(machines, 2, 150);
}

#[test]
fn full_volumes() {
    let machines = Machines {
        volumes: 1,
        clusters: 10,
        ..ROOMY
    };
    run(machines, 3, 150);
}

#[test]
fn a_full_metadata_volume() {
    let machines = Machines {
        meta: 1 << 20,
        journal: 140,
        ..ROOMY
    };
    run(machines, 4, 100);
}

#[test]
fn changes_of_the_same_names_meet() {
    let machines = Machines { racy: true, ..ROOMY };
    run(machines, 6, 150);
}

#[test]
fn requests_that_fail() {
    let machines = Machines {
        faults: true,
        ..ROOMY
    };
    run(machines, 5, 100);
}
