//! The operations of the exhaustive level, and what they work on; [`exhaustive`](super::exhaustive) puts them together.
//!
//! The world is as small as it can be: a metadata volume of 1 MiB with a journal of 16 blocks, a volume of 32 clusters full of garbage, and
//! in the file system what all operations need:
//!
//! ```text
//!   /a       open, some data                           /base ◄── /mid ◄── /top     /top is open; all three have parts of cluster 0
//!   /c       some data, not open                       /s       open, with checksums
//!   /k       thick                                     /d       a directory
//! ```
//!
//! Files are short, so that a recovery can be asked for every byte of every file. All scripts begin with the same disks: each thread
//! makes them once.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use block_io::sim::{DiskOptions, Failure, Rng, RunOptions, Scenario, Shared, Sim, World};
use block_io::{Durability, ZeroMode};
use filesys::{
    Access, Attributes, FileSystem, FormatOptions, FsError, NewFile, OpenOptions, Relocation, Snapshot,
};

use crate::harness::{SimFs, failed, given};
use crate::machine::{Handle, Promise, absorb, adds_up, change, is_sound, verify};
use crate::model::{Change, Model};

const KIB: u64 = 1024;
const SIZE: u64 = 16 * KIB;
/// Of `/a`.
const LARGE: u64 = 144 * KIB;

/// An operation of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// A cluster that has no place.
    WriteNew,
    /// Over valid data.
    Overwrite,
    /// 512 bytes of a sub-cluster that is not valid.
    Partial,
    /// 512 bytes of the layer, the rest comes from its parents.
    PartialLayer,
    /// Part of a cluster of the layer.
    WriteLayer,
    WriteChecked,
    Discard,
    DiscardLayer,
    Zeroes,
    ZeroesKeep,
    Flush,
    FlushLayer,
    Fua,
    Snapshot,
    GroupSnapshot,
    AbsorbUnnamed,
    AbsorbNamed,
    DeleteMiddle,
    DeleteBase,
    DiscardLayerFile,
    Clone,
    Grow,
    Shrink,
    GrowThick,
    Rename,
    RenameInto,
    Delete,
    CreateThin,
    CreateThick,
    MakeDirectory,
    Exempt,
    Freeze,
    Checkpoint,
    Defragment,
}

pub(crate) const ALL: [Op; 34] = [
    Op::WriteNew,
    Op::Overwrite,
    Op::Partial,
    Op::PartialLayer,
    Op::WriteLayer,
    Op::WriteChecked,
    Op::Discard,
    Op::DiscardLayer,
    Op::Zeroes,
    Op::ZeroesKeep,
    Op::Flush,
    Op::FlushLayer,
    Op::Fua,
    Op::Snapshot,
    Op::GroupSnapshot,
    Op::AbsorbUnnamed,
    Op::AbsorbNamed,
    Op::DeleteMiddle,
    Op::DeleteBase,
    Op::DiscardLayerFile,
    Op::Clone,
    Op::Grow,
    Op::Shrink,
    Op::GrowThick,
    Op::Rename,
    Op::RenameInto,
    Op::Delete,
    Op::CreateThin,
    Op::CreateThick,
    Op::MakeDirectory,
    Op::Exempt,
    Op::Freeze,
    Op::Checkpoint,
    Op::Defragment,
];

impl Op {
    fn needs_layer(self) -> bool {
        matches!(
            self,
            Self::PartialLayer | Self::WriteLayer | Self::DiscardLayer | Self::FlushLayer
        )
    }
}

/// A script.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) operations: Vec<Op>,
    /// Crashes are tried from when so many operations have begun; what is before is a shorter script.
    pub(crate) from: usize,
    /// All invariants of the metadata are verified in one of so many recoveries.
    pub(crate) checks_one_in: u64,
    recoveries: AtomicU64,
}

impl Script {
    pub(crate) fn new(operations: Vec<Op>, from: usize, checks_one_in: u64) -> Self {
        Self {
            operations,
            from,
            checks_one_in,
            recoveries: AtomicU64::new(0),
        }
    }
}

/// Smallest halves of a tail.
const TAIL: usize = 3 * 4096;

fn options(sim: &Sim) -> OpenOptions {
    OpenOptions {
        tail: Some(sim.lasting_memory(TAIL)),
        cached_pages: 64,
        cached_files: 0,
        // The model knows what was asked for, and not what goes on by itself.
        resume_merges: false,
        ..OpenOptions::default()
    }
}

async fn open(sim: &Sim) -> Result<SimFs, FsError> {
    FileSystem::open(
        Rc::new(sim.disk(0)),
        vec![given(sim, 1)],
        options(sim),
        sim.clock(),
    )
    .await
}

/// What a script works with.
pub(crate) struct Machine {
    fs: SimFs,
    promise: Promise,
    a: Handle,
    top: Option<Handle>,
    s: Handle,
    made: u32,
}

pub(crate) async fn handle(fs: &SimFs, promise: &Promise, path: &str) -> Result<Handle, Failure> {
    let file = fs.open_file(path, Access::Write).await.map_err(failed)?;
    Handle::new(promise, path, file)
}

pub(crate) async fn create(
    fs: &SimFs,
    promise: &Promise,
    path: &str,
    size: u64,
    attributes: Attributes,
) -> Result<(), Failure> {
    let new = NewFile {
        size,
        attributes: Some(attributes),
        now: 1,
    };
    let what = Change::Create {
        path: path.to_owned(),
        size,
        directory: false,
    };
    change(promise, what, fs.create(path, &new)).await.map(drop)
}

impl Machine {
    pub(crate) async fn open(sim: &Sim, promise: &Promise) -> Result<Self, Failure> {
        let fs = open(sim).await.map_err(failed)?;
        promise.borrow_mut().goes_on(fs.continuity())?;
        Ok(Self {
            a: handle(&fs, promise, "/a").await?,
            top: Some(handle(&fs, promise, "/top").await?),
            s: handle(&fs, promise, "/s").await?,
            promise: Rc::clone(promise),
            fs,
            made: 0,
        })
    }

    fn top(&self) -> Result<&Handle, Failure> {
        self.top.as_ref().ok_or_else(|| "the layer is gone".into())
    }

    fn name(&mut self) -> String {
        self.made += 1;
        format!("/new{}", self.made)
    }

    fn path_of(&self, handle: &Handle) -> String {
        let model = self.promise.borrow();
        let entry = model.tree.get(&handle.node.get());
        entry.and_then(|entry| entry.path.clone()).unwrap_or_default()
    }

    async fn snapshot(&mut self, group: bool) -> Result<(), Failure> {
        let (first, second) = (self.name(), self.name());
        let (a, top) = (
            self.path_of(&self.a),
            self.top.as_ref().map(|top| self.path_of(top)),
        );
        let mut snapshots = vec![Snapshot {
            path: &a,
            layer: &first,
            handle: Some(&self.a.file),
        }];
        let mut pairs = vec![(a.clone(), first.clone())];
        if let (true, Some(top), Some(path)) = (group, &self.top, &top) {
            snapshots.push(Snapshot {
                path,
                layer: &second,
                handle: Some(&top.file),
            });
            pairs.push((path.clone(), second.clone()));
        }
        let done = change(
            &self.promise,
            Change::Snapshot(pairs.clone()),
            self.fs.snapshot(&snapshots, 1),
        )
        .await?;
        if done.is_some() {
            let model = self.promise.borrow();
            let node = |path: &str| {
                model
                    .find(path)
                    .ok_or_else(|| Failure::from("no layer in the model"))
            };
            self.a.node.set(node(&first)?);
            if let (Some(top), 2) = (&self.top, pairs.len()) {
                top.node.set(node(&second)?);
            }
        }
        Ok(())
    }

    async fn resize(&self, path: &str, size: u64) -> Result<(), Failure> {
        let what = Change::Resize {
            path: path.to_owned(),
            size,
        };
        change(&self.promise, what, self.fs.resize(path, size))
            .await
            .map(drop)
    }

    async fn delete(&self, path: &str) -> Result<(), Failure> {
        let what = Change::Delete {
            path: path.to_owned(),
        };
        change(&self.promise, what, self.fs.delete(path)).await.map(drop)
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), Failure> {
        let what = Change::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        };
        change(&self.promise, what, self.fs.rename(from, to))
            .await
            .map(drop)
    }

    /// Flushes all files that are open; those that can be flushed have promised something then.
    pub(crate) async fn save_what_can_be_saved(&self) {
        for handle in [Some(&self.a), self.top.as_ref(), Some(&self.s)]
            .into_iter()
            .flatten()
        {
            drop(handle.flush(&self.promise).await);
        }
    }

    pub(crate) async fn step(&mut self, op: Op) -> Result<(), Failure> {
        let promise = Rc::clone(&self.promise);
        let volatile = Durability::Volatile;
        match op {
            Op::WriteNew => self.a.write(&promise, 64 * KIB, 8 * KIB, volatile).await?,
            Op::Overwrite => self.a.write(&promise, 4 * KIB, 4 * KIB, volatile).await?,
            Op::Partial => self.a.write(&promise, 8 * KIB + 512, 512, volatile).await?,
            _ if self.top.is_none() && op.needs_layer() => {}
            Op::PartialLayer => self.top()?.write(&promise, 1024, 512, volatile).await?,
            Op::WriteLayer => self.top()?.write(&promise, 8 * KIB, 8 * KIB, volatile).await?,
            Op::WriteChecked => self.s.write(&promise, 2 * KIB, 4 * KIB, volatile).await?,
            Op::Discard => self.a.discard(&promise, 0, 64 * KIB).await?,
            Op::DiscardLayer => self.top()?.discard(&promise, 4 * KIB, 8 * KIB).await?,
            Op::Zeroes => {
                self.a
                    .zero(&promise, 2 * KIB, 8 * KIB, ZeroMode::MayUnmap)
                    .await?
            }
            Op::ZeroesKeep => {
                self.a
                    .zero(&promise, 4 * KIB, 4 * KIB, ZeroMode::KeepAllocated)
                    .await?
            }
            Op::Flush => self.a.flush(&promise).await?,
            Op::FlushLayer => self.top()?.flush(&promise).await?,
            Op::Fua => {
                self.a
                    .write(&promise, 6 * KIB, 4 * KIB, Durability::Durable)
                    .await?
            }
            Op::Snapshot => self.snapshot(false).await?,
            Op::GroupSnapshot => self.snapshot(true).await?,
            Op::AbsorbUnnamed | Op::AbsorbNamed => {
                if let Some(top) = &self.top {
                    let layer = self.path_of(top);
                    absorb(&promise, &self.fs, &layer, op == Op::AbsorbNamed).await?;
                }
            }
            Op::DeleteMiddle => self.delete("/mid").await?,
            Op::DeleteBase => self.delete("/base").await?,
            Op::DiscardLayerFile => {
                if let Some(top) = self.top.take() {
                    let layer = self.path_of(&top);
                    drop(top);
                    self.delete(&layer).await?;
                    self.top = None;
                }
            }
            Op::Clone => {
                let path = self.name();
                let what = Change::Clone {
                    frozen: "/mid".into(),
                    path: path.clone(),
                };
                change(&promise, what, self.fs.clone_file("/mid", &path, 1)).await?;
            }
            Op::Grow => self.resize("/c", SIZE + 64 * KIB).await?,
            Op::Shrink => self.resize("/c", 4 * KIB).await?,
            Op::GrowThick => self.resize("/k", 96 * KIB).await?,
            Op::Rename => self.rename("/c", "/x").await?,
            Op::RenameInto => self.rename("/c", "/d/c").await?,
            Op::Delete => self.delete("/c").await?,
            Op::CreateThin | Op::CreateThick => {
                let attributes = Attributes {
                    thick: op == Op::CreateThick,
                    ..Attributes::default()
                };
                let path = self.name();
                create(&self.fs, &promise, &path, SIZE, attributes).await?;
            }
            Op::MakeDirectory => {
                let path = self.name();
                let what = Change::Create {
                    path: path.clone(),
                    size: 0,
                    directory: true,
                };
                change(&promise, what, self.fs.make_directory(&path, None, 1)).await?;
            }
            Op::Exempt => {
                let attributes = Attributes {
                    exempt_from_migration: true,
                    ..Attributes::default()
                };
                let what = Change::Exempt { path: "/c".into() };
                change(&promise, what, self.fs.set_attributes("/c", attributes)).await?;
                identify(&promise, &self.fs, "/c", 5).await?;
            }
            Op::Freeze => {
                let what = Change::Freeze {
                    path: "/c".into(),
                    frozen: true,
                };
                change(&promise, what, self.fs.set_frozen("/c", true)).await?;
            }
            Op::Checkpoint => self.fs.checkpoint().await.map_err(failed)?,
            Op::Defragment => {
                let file = self.a.file.id();
                let progress = |_| std::ops::ControlFlow::Continue(());
                self.fs
                    .relocate(file, Relocation::Defragment, 0, progress)
                    .await
                    .map_err(failed)?;
            }
        }
        Ok(())
    }
}

async fn identify(promise: &Promise, fs: &SimFs, path: &str, identity: u8) -> Result<(), Failure> {
    let what = Change::Identify {
        path: path.into(),
        identity,
    };
    change(promise, what, fs.set_identity(path, [identity; 16])).await?;
    Ok(())
}

async fn prepare(sim: &Sim, promise: &Promise) -> Result<(), Failure> {
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: Some(16),
        grow_to: 0,
    };
    let fs = FileSystem::format(
        given(sim, 0),
        vec![given(sim, 1)],
        &format,
        options(sim),
        sim.clock(),
    );
    let fs = fs.await.map_err(failed)?;
    let volatile = Durability::Volatile;
    for (path, size) in [("/a", LARGE), ("/base", SIZE), ("/c", SIZE)] {
        create(&fs, promise, path, size, Attributes::default()).await?;
        let file = handle(&fs, promise, path).await?;
        if size == LARGE {
            // Two places that are not in order, for the defragmentation.
            file.write(promise, 132 * KIB, 4 * KIB, volatile).await?;
        }
        file.write(promise, 0, 8 * KIB, volatile).await?;
        file.flush(promise).await?;
    }
    let thick = Attributes {
        thick: true,
        ..Attributes::default()
    };
    create(&fs, promise, "/k", SIZE, thick).await?;
    let k = handle(&fs, promise, "/k").await?;
    k.write(promise, 0, 4 * KIB, volatile).await?;
    k.flush(promise).await?;
    drop(k);
    let checked = Attributes {
        checksums: true,
        ..Attributes::default()
    };
    create(&fs, promise, "/s", SIZE, checked).await?;
    let s = handle(&fs, promise, "/s").await?;
    s.write(promise, 0, 4 * KIB, volatile).await?;
    s.flush(promise).await?;
    drop(s);
    for (path, identity) in [("/base", 1), ("/s", 2)] {
        identify(promise, &fs, path, identity).await?;
    }
    for (below, layer, offset) in [("/base", "/mid", 4 * KIB), ("/mid", "/top", 6 * KIB)] {
        let snapshot = Snapshot {
            path: below,
            layer,
            handle: None,
        };
        let what = Change::Snapshot(vec![(below.into(), layer.into())]);
        change(promise, what, fs.snapshot(&[snapshot], 1)).await?;
        let file = handle(&fs, promise, layer).await?;
        file.write(promise, offset, 4 * KIB, volatile).await?;
        file.flush(promise).await?;
    }
    let what = Change::Create {
        path: "/d".into(),
        size: 0,
        directory: true,
    };
    change(promise, what, fs.make_directory("/d", None, 1)).await?;
    verify(&fs, promise, u64::MAX).await?;
    fs.close().await.map_err(failed)
}

fn blank() -> World {
    let mut world = World::new([DiskOptions::new("meta", 1 << 20), DiskOptions::new("v1", 2 << 20)]);
    let mut garbage = vec![0; 2 << 20];
    Rng::new(5).fill(&mut garbage);
    world.media[1].poke(0, &garbage);
    world
}

/// Disks and model that all scripts begin with.
fn make() -> (World, Model) {
    let mut world = blank();
    let promise = Promise::default();
    let ran = world
        .run(&RunOptions::in_order(), async |sim| prepare(&sim, &promise).await)
        .unwrap_or_else(|failure| panic!("{failure}"));
    match ran.ended.done() {
        Some(Ok(())) => {}
        other => panic!("the disks cannot be prepared: {other:?}"),
    }
    world.settle();
    // The only state that a crash can leave now. Copies of disks after a crash are cheap.
    world.media = world.crash_states().nth(0, 1, 0);
    let model = promise.borrow().clone();
    (world, model)
}

thread_local! {
    static PREPARED: OnceCell<(World, Model)> = const { OnceCell::new() };
}

pub(crate) fn prepared<T>(use_it: impl FnOnce(&World, &Model) -> T) -> T {
    PREPARED.with(|prepared| {
        let (world, model) = prepared.get_or_init(make);
        use_it(world, model)
    })
}

impl Scenario for Script {
    type Model = Model;

    fn world(&self) -> World {
        prepared(|world, _| world.clone())
    }

    async fn prepare(&self, _sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        prepared(|_, known| model.replace(known.clone()));
        Ok(())
    }

    async fn run(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        let mut machine = Machine::open(&sim, &model).await?;
        for op in &self.operations {
            model.borrow_mut().operations_begun += 1;
            machine
                .step(*op)
                .await
                .map_err(|failure| failure.context(&format!("{op:?}")))?;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        model.borrow_mut().ends(sim.is_after_kill());
        let fs = open(&sim).await.map_err(failed)?;
        model.borrow_mut().goes_on(fs.continuity())?;
        let seen = verify(&fs, &model, u64::MAX).await?;
        fs.settled().await;
        adds_up(&fs, &model, Some(&seen)).await?;
        // A script is explored by one thread, so that these are the same in every run.
        let recoveries = self.recoveries.fetch_add(1, Ordering::Relaxed);
        if recoveries.is_multiple_of(self.checks_one_in) {
            block_io::cover!("scripts: all invariants were verified");
            is_sound(&fs).await?;
        }
        Ok(())
    }

    fn fingerprint(&self, model: &Model) -> Option<u64> {
        Some(model.fingerprint())
    }

    fn kills(&self) -> bool {
        true
    }

    fn killed_fingerprint(&self, model: &Model) -> Option<u64> {
        Some(model.killed_fingerprint())
    }

    fn explores(&self, model: &Model) -> bool {
        model.operations_begun >= self.from
    }
}
