//! Every operation on disks, crashed at every event, into states that a power cut can leave, and crashed again while what is left is
//! settled. Afterwards everything is as before the operation or as after it: contents, snapshots, redo layers, for all disks of a group.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use block_io::sim::{
    ExploreOptions, Failure, Numbers, Scenario, Shared, Sim, World, explore_parallel, fingerprint, threads,
};
use storage_virtualizer::disk::{DiskError, DiskMode, DiskOptions, Disks, NewSnapshot, PowerOff};

use crate::help::*;

const A: &str = "/a.dsk";
const B: &str = "/b.dsk";
const CLONE: &str = "/clone.dsk";

/// What clusters have.
type Content = Vec<u64>;

/// A disk as people know it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct State {
    content: Content,
    redo: Option<Content>,
    snapshots: BTreeMap<String, Content>,
}

/// All disks.
type Known = BTreeMap<&'static str, State>;

/// All states that there may be now.
#[derive(Debug, Clone, Default)]
pub(crate) struct Promise {
    allowed: Vec<Known>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Create,
    Write,
    Snapshot,
    GroupSnapshot,
    SnapshotClosed,
    DeleteFirst,
    DeleteSecond,
    Rename,
    Revert,
    RevertToSecond,
    CloneSnapshot,
    CloneNow,
    Grow,
    Shrink,
    Delete,
    Undoable,
    CommitLive,
    Commit,
    Discard,
    PowerOffCommit,
    PowerOffDiscard,
    Nonpersistent,
    NonpersistentPowerOff,
    Append,
    Merge,
}

pub(crate) const ALL: [Op; 25] = [
    Op::Create,
    Op::Write,
    Op::Snapshot,
    Op::GroupSnapshot,
    Op::SnapshotClosed,
    Op::DeleteFirst,
    Op::DeleteSecond,
    Op::Rename,
    Op::Revert,
    Op::RevertToSecond,
    Op::CloneSnapshot,
    Op::CloneNow,
    Op::Grow,
    Op::Shrink,
    Op::Delete,
    Op::Undoable,
    Op::CommitLive,
    Op::Commit,
    Op::Discard,
    Op::PowerOffCommit,
    Op::PowerOffDiscard,
    Op::Nonpersistent,
    Op::NonpersistentPowerOff,
    Op::Append,
    Op::Merge,
];

#[derive(Debug, Clone)]
pub(crate) struct Script(pub(crate) Vec<Op>);

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        description: String::new(),
        now: 3,
    }
}

/// What a script works with.
struct Machine {
    disks: SimDisks,
    promise: Shared<Promise>,
    now: Known,
    live: Option<Rc<SimVirtualDisk>>,
}

impl Machine {
    /// Does something that changes what people know in one step.
    async fn step(
        &mut self,
        change: impl FnOnce(&mut Known),
        call: impl Future<Output = Result<(), DiskError>>,
    ) -> Result<(), Failure> {
        let mut after = self.now.clone();
        change(&mut after);
        self.promise.borrow_mut().allowed = vec![self.now.clone(), after.clone()];
        call.await.map_err(failed)?;
        self.promise.borrow_mut().allowed = vec![after.clone()];
        self.now = after;
        Ok(())
    }

    async fn attach(&mut self, mode: DiskMode, power_off: PowerOff) -> Result<(), Failure> {
        self.detach().await?;
        let options = DiskOptions {
            power_off,
            ..writing(mode)
        };
        let disks = self.disks.clone();
        let content = self.now[A].content.clone();
        let change = |world: &mut Known| {
            if matches!(mode, DiskMode::Undoable | DiskMode::Append) {
                world.get_mut(A).unwrap().redo.get_or_insert(content);
            }
        };
        let mut opened = None;
        self.step(change, async {
            opened = Some(Rc::new(disks.open(A, options).await?));
            Ok(())
        })
        .await?;
        self.live = opened;
        Ok(())
    }

    async fn detach(&mut self) -> Result<(), Failure> {
        let Some(disk) = self.live.take() else {
            return Ok(());
        };
        let disks = self.disks.clone();
        self.step(|_| {}, async { disks.close(disk, 3).await }).await
    }

    /// Writes to where the disk's mode wants it.
    async fn write(&mut self, cluster: u64, stamp: u64) -> Result<(), Failure> {
        if self.live.is_none() {
            let mode = match self.now[A].redo {
                Some(_) => DiskMode::Append,
                None => DiskMode::Persistent,
            };
            self.attach(mode, PowerOff::Keep).await?;
        }
        let disk = Rc::clone(self.live.as_ref().ok_or("nothing is attached")?);
        let mode = disk.mode();
        let change = |world: &mut Known| {
            let state = world.get_mut(A).unwrap();
            match (mode, &mut state.redo) {
                // Nobody will see it.
                (DiskMode::Nonpersistent, _) => {}
                (_, Some(redo)) => redo[cluster as usize] = stamp,
                (_, None) => state.content[cluster as usize] = stamp,
            }
        };
        let mut written = Ok(());
        self.step(change, async {
            written = write(&*disk, cluster, stamp).await;
            Ok(())
        })
        .await?;
        written
    }

    async fn run(&mut self, op: Op) -> Result<(), Failure> {
        let disks = self.disks.clone();
        let snapshot = |name: &'static str| {
            move |world: &mut Known| {
                let state = world.get_mut(A).unwrap();
                let top = state.redo.as_ref().unwrap_or(&state.content).clone();
                state.snapshots.insert(name.into(), top);
            }
        };
        match op {
            Op::Create => {
                let new = |world: &mut Known| {
                    let state = State {
                        content: vec![0; 2],
                        ..State::default()
                    };
                    world.insert("/new.dsk", state);
                };
                let file = storage_virtualizer::disk::NewDisk {
                    size: 2 * CLUSTER,
                    ..Default::default()
                };
                self.step(new, disks.create("/new.dsk", &file)).await
            }
            Op::Write => {
                if self.live.is_none() {
                    self.attach(DiskMode::Persistent, PowerOff::Keep).await?;
                }
                self.write(1, 50).await?;
                self.write(2, 51).await
            }
            Op::Snapshot => {
                self.step(snapshot("new"), disks.snapshot(&[A], &named("new")))
                    .await?;
                self.write(0, 60).await
            }
            Op::SnapshotClosed => {
                self.detach().await?;
                self.step(snapshot("closed"), disks.snapshot(&[A], &named("closed")))
                    .await
            }
            Op::GroupSnapshot => {
                let both = |world: &mut Known| {
                    snapshot("group")(world);
                    let state = world.get_mut(B).unwrap();
                    state.snapshots.insert("group".into(), state.content.clone());
                };
                self.step(both, disks.snapshot(&[B, A], &named("group"))).await?;
                self.write(0, 61).await
            }
            Op::DeleteFirst | Op::DeleteSecond => {
                let name = if op == Op::DeleteFirst { "one" } else { "two" };
                let change = |world: &mut Known| {
                    world.get_mut(A).unwrap().snapshots.remove(name);
                };
                self.step(change, disks.delete_snapshot(A, name, 3)).await?;
                self.write(1, 62).await
            }
            Op::Rename => {
                let change = |world: &mut Known| {
                    let snapshots = &mut world.get_mut(A).unwrap().snapshots;
                    let content = snapshots.remove("one").unwrap();
                    snapshots.insert("uno".into(), content);
                };
                self.step(change, disks.describe_snapshot(A, "one", &named("uno")))
                    .await
            }
            Op::Revert | Op::RevertToSecond => {
                self.detach().await?;
                let name = if op == Op::Revert { "one" } else { "two" };
                let change = |world: &mut Known| {
                    let state = world.get_mut(A).unwrap();
                    state.content = state.snapshots[name].clone();
                };
                self.step(change, disks.revert(A, name, 3)).await?;
                self.attach(DiskMode::Persistent, PowerOff::Keep).await?;
                self.write(0, 63).await
            }
            Op::CloneSnapshot | Op::CloneNow => {
                let name = (op == Op::CloneSnapshot).then_some("one");
                let change = |world: &mut Known| {
                    let state = &world[A];
                    let content = match name {
                        Some(name) => state.snapshots[name].clone(),
                        None => state.content.clone(),
                    };
                    let clone = State {
                        content,
                        ..State::default()
                    };
                    world.insert(CLONE, clone);
                };
                self.step(change, disks.clone_disk(A, name, CLONE, 3)).await?;
                self.write(0, 64).await
            }
            Op::Grow | Op::Shrink => {
                let clusters = if op == Op::Grow { 5 } else { 2 };
                let change = |world: &mut Known| {
                    let state = world.get_mut(A).unwrap();
                    let top = state.redo.as_mut().unwrap_or(&mut state.content);
                    top.resize(clusters, 0);
                };
                let resized = disks.resize(A, clusters as u64 * CLUSTER, true, 3);
                self.step(change, resized).await?;
                self.write(1, 65).await
            }
            Op::Delete => {
                self.detach().await?;
                let change = |world: &mut Known| {
                    world.remove(A);
                };
                self.step(change, disks.delete(A, 3)).await
            }
            Op::Undoable | Op::Append => {
                let mode = if op == Op::Append {
                    DiskMode::Append
                } else {
                    DiskMode::Undoable
                };
                self.attach(mode, PowerOff::Keep).await?;
                self.write(0, 66).await
            }
            Op::CommitLive => {
                self.attach(DiskMode::Undoable, PowerOff::Keep).await?;
                self.write(0, 67).await?;
                let change = |world: &mut Known| {
                    let state = world.get_mut(A).unwrap();
                    state.content = state.redo.clone().unwrap();
                };
                self.step(change, disks.commit(A, 3)).await?;
                self.write(1, 68).await
            }
            Op::Commit | Op::Discard => {
                self.attach(DiskMode::Append, PowerOff::Keep).await?;
                self.write(0, 69).await?;
                self.detach().await?;
                let change = |world: &mut Known| {
                    let state = world.get_mut(A).unwrap();
                    let redo = state.redo.take().unwrap();
                    if op == Op::Commit {
                        state.content = redo;
                    }
                };
                match op {
                    Op::Commit => self.step(change, disks.commit(A, 3)).await,
                    _ => self.step(change, disks.discard(A, 3)).await,
                }
            }
            Op::PowerOffCommit | Op::PowerOffDiscard => {
                let power_off = match op {
                    Op::PowerOffCommit => PowerOff::Commit,
                    _ => PowerOff::Discard,
                };
                self.attach(DiskMode::Undoable, power_off).await?;
                self.write(0, 70).await?;
                let disk = self.live.take().ok_or("nothing is attached")?;
                let change = |world: &mut Known| {
                    let state = world.get_mut(A).unwrap();
                    let redo = state.redo.take().unwrap();
                    if op == Op::PowerOffCommit {
                        state.content = redo;
                    }
                };
                self.step(change, disks.close(disk, 3)).await
            }
            Op::Nonpersistent | Op::NonpersistentPowerOff => {
                self.attach(DiskMode::Nonpersistent, PowerOff::Keep).await?;
                self.write(0, 71).await?;
                if op == Op::NonpersistentPowerOff {
                    self.detach().await?;
                    self.attach(DiskMode::Persistent, PowerOff::Keep).await?;
                    self.write(1, 72).await?;
                }
                Ok(())
            }
            Op::Merge => {
                for name in ["one", "two"] {
                    let change = |world: &mut Known| {
                        world.get_mut(A).unwrap().snapshots.remove(name);
                    };
                    self.step(change, disks.delete_snapshot(A, name, 3)).await?;
                }
                self.step(|_| {}, async { disks.merge(A, 3).await.map(drop) })
                    .await?;
                self.write(2, 73).await
            }
        }
    }
}

/// What there is.
async fn observe(disks: &SimDisks, fs: &SimFs) -> Result<Known, Failure> {
    let mut found = Known::new();
    for path in [A, B, CLONE, "/new.dsk"] {
        let status = match disks.status(path).await {
            Ok(status) => status,
            Err(DiskError::NoDisk { .. } | DiskError::Deleted { .. }) => continue,
            Err(error) => return Err(failed(error)),
        };
        let top = look(disks, path).await?;
        let mut state = State::default();
        for snapshot in &status.snapshots {
            let content = look(disks, &format!("{path}@{}", snapshot.name)).await?;
            state.snapshots.insert(snapshot.name.clone(), content);
        }
        match status.redo {
            None => state.content = top,
            Some(redo) => {
                state.redo = Some(top);
                state.content = below(fs, redo.below).await?;
            }
        }
        found.insert(path, state);
    }
    Ok(found)
}

/// What a disk has without its redo layer.
async fn below(fs: &SimFs, head: filesys::FileId) -> Result<Content, Failure> {
    let path = fs.path_of(head).await.map_err(failed)?;
    let path = path.ok_or("the head has no name")?;
    let file = fs.open_file(&path, filesys::Access::Read).await.map_err(failed)?;
    contents(&file).await
}

impl Scenario for Script {
    type Model = Promise;

    fn world(&self) -> World {
        world(6 << 20)
    }

    /// `/a.dsk` with two snapshots, and `/b.dsk`.
    async fn prepare(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let fs = format(&sim).await?;
        let disks = Disks::new(fs.clone());
        create(&disks, A, 3 * CLUSTER).await?;
        create(&disks, B, CLUSTER).await?;
        let b = attach(&disks, B, DiskMode::Persistent).await?;
        write(&*b, 0, 5).await?;
        disks.close(b, 1).await.map_err(failed)?;
        let a = attach(&disks, A, DiskMode::Persistent).await?;
        let mut state = State {
            content: vec![0; 3],
            ..State::default()
        };
        for (cluster, name) in [(0, "one"), (1, "two")] {
            write(&*a, cluster, cluster + 1).await?;
            state.content[cluster as usize] = cluster + 1;
            state.snapshots.insert(name.into(), state.content.clone());
            disks.snapshot(&[A], &named(name)).await.map_err(failed)?;
        }
        write(&*a, 0, 9).await?;
        state.content[0] = 9;
        disks.close(a, 1).await.map_err(failed)?;
        let other = State {
            content: vec![5],
            ..State::default()
        };
        promise.borrow_mut().allowed = vec![Known::from([(A, state), (B, other)])];
        fs.close().await.map_err(failed)
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let fs = open(&sim).await?;
        let disks = Disks::new(fs.clone());
        let now = promise.borrow().allowed[0].clone();
        let mut machine = Machine {
            disks,
            promise,
            now,
            live: None,
        };
        machine.attach(DiskMode::Persistent, PowerOff::Keep).await?;
        for op in &self.0 {
            machine
                .run(*op)
                .await
                .map_err(|failure| failure.context(&format!("{op:?}")))?;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let fs = open(&sim).await?;
        let disks = Disks::new(fs.clone());
        let found = observe(&disks, &fs).await?;
        if !promise.borrow().allowed.contains(&found) {
            return Err(format!("{found:?} is none of {:?}", promise.borrow().allowed).into());
        }
        // A deletion that was interrupted is ended by another one.
        if !found.contains_key(A) {
            refused(disks.delete(A, 3).await, "there is no disk")?;
        }
        // The next use settles what is left, and changes nothing that people know.
        for path in found.keys() {
            let mode = match found[path].redo {
                Some(_) => DiskMode::Append,
                None => DiskMode::Persistent,
            };
            let disk = attach(&disks, path, mode).await?;
            disks.close(disk, 3).await.map_err(failed)?;
        }
        same(&observe(&disks, &fs).await?, &found)?;
        fs.settled().await;
        let mut branched = 0;
        for path in found.keys() {
            let merged = disks.merge(path, 3).await.map_err(failed)?;
            let has_branches = fs.stat(path).await.map_err(failed)?.children > 1;
            branched += usize::from(!merged && has_branches);
            if !merged && !has_branches && !found.contains_key(CLONE) {
                return Err(format!("{path} has layers that nobody needs").into());
            }
        }
        same(&observe(&disks, &fs).await?, &found)?;
        // No layer is left that nobody needs.
        if !found.contains_key(CLONE) {
            let layers = names(&fs)
                .await?
                .iter()
                .filter(|name| !name.ends_with(".disk"))
                .count();
            let most = |state: &State| 1 + state.snapshots.len() + usize::from(state.redo.is_some());
            let most = found.values().map(most).sum::<usize>() + branched;
            if layers > most {
                return Err(
                    format!("{layers} layers, and {most} are enough: {:?}", names(&fs).await?).into(),
                );
            }
        }
        is_sound(&fs).await
    }

    fn fingerprint(&self, promise: &Promise) -> Option<u64> {
        Some(fingerprint(&promise.allowed))
    }
}

pub(crate) fn explore_all(scripts: Vec<Script>, options: &ExploreOptions) -> Numbers {
    let start = Instant::now();
    let mut total = Numbers::default();
    let mut failures = Vec::new();
    for script in scripts {
        match explore_parallel(&script, options, threads()) {
            Ok(numbers) => total.add(&numbers),
            Err(failure) => failures.push(format!("{:?}: {failure}", script.0)),
        }
    }
    println!("{:.1} s: {total}", start.elapsed().as_secs_f64());
    for failure in &failures {
        println!("FAILED {failure}");
    }
    assert!(failures.is_empty(), "{} scripts fail", failures.len());
    total
}

#[test]
fn every_operation_is_done_or_not_done_after_a_crash() {
    let options = ExploreOptions {
        states: 3,
        nesting: 1,
        nested_states: 1,
        nested_one_in: 24,
        ..ExploreOptions::default()
    };
    let numbers = explore_all(ALL.iter().map(|op| Script(vec![*op])).collect(), &options);
    let wanted = [
        "disk: a layer was made before a crash, and is there",
        "disk: a layer was not made before a crash",
        "disk: a deletion goes on",
    ];
    assert_eq!(numbers.missing(&wanted), Vec::<&str>::new());
    assert!(numbers.crash_states > 800, "{numbers}");
}
