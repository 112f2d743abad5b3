//! Long random histories: changes, crashes, devices that are away, that fail, that come back with old content, bit rot.
//!
//! A device that was put back as an old copy of itself, whose slot rotted or lost a write knows less than it promised. At most
//! one such device is there at a time, no other fails meanwhile, and there are at least three holders: what the rules promise.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block_io::Operation;
use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultRule, Medium, Rng, RunOptions, Sim, SimDisk, SwarmOptions,
    Workload, World, swarm,
};
use volume_manager::model::{Configuration, DeviceState};
use volume_manager::store::{CommitError, Force, OpenError, Opened, Standing, Store};

use crate::pool::{SIZE, begin, create, id, make_faulty, marked, open};

const DISKS: usize = 5;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// A change of the configuration.
    Commit,
    /// The devices that are there and faulty become holders again.
    Revive,
    /// The next write to a disk fails.
    Fail(usize),
    /// A disk goes away.
    Unplug(usize),
    /// It comes back.
    Plug(usize),
    /// Keeps a copy of a disk.
    Copy(usize),
    /// Puts the copy in its place.
    Restore(usize),
    /// Flips a bit of a disk.
    Rot { disk: usize, offset: u64 },
    /// The next write to a disk is lost.
    LoseWrite(usize),
    /// The power is cut after so many more events.
    Crash(u64),
    /// The pool is closed, and opened without these disks.
    Reopen(BTreeSet<usize>),
}

/// What was promised, and what was done to the disks.
#[derive(Default)]
struct Promise {
    acknowledged: Option<Configuration>,
    begun: Vec<Configuration>,
    mark: u32,
    openings: u32,
    unplugged: BTreeSet<usize>,
    /// The next write to them fails, perhaps.
    failing: BTreeSet<usize>,
    /// A disk that knows less than it promised, and after how many commits that it holds it has caught up.
    forgetful: Option<(usize, u32)>,
    /// Copies of disks, and the newest epoch that they can hold.
    copies: BTreeMap<usize, (Medium, u64)>,
    /// The disk that was put back, the newest epoch that it can hold, and the newest that there was.
    restored: Option<(usize, u64, u64)>,
}

type Shared = Rc<RefCell<Promise>>;

fn holders(configuration: &Configuration) -> BTreeSet<usize> {
    let devices = configuration.devices.iter().filter(|device| device.is_holder());
    devices
        .map(|device| usize::try_from(device.id.0).unwrap())
        .collect()
}

fn is_more_than_half(part: &BTreeSet<usize>, whole: &BTreeSet<usize>) -> bool {
    part.intersection(whole).count() * 2 > whole.len()
}

impl Promise {
    fn possible(&self) -> impl Iterator<Item = &Configuration> {
        self.acknowledged.iter().chain(&self.begun)
    }

    fn newest(&self) -> u64 {
        self.possible().map(|one| one.epoch).max().unwrap_or(0)
    }

    /// Whether the rules allow that a disk forgets now.
    fn may_forget(&self) -> bool {
        let quiet = self.forgetful.is_none() && self.unplugged.is_empty() && self.failing.is_empty();
        quiet && self.possible().all(|one| holders(one).len() >= 3)
    }

    fn acknowledge(&mut self, configuration: Configuration) {
        let holders = holders(&configuration);
        if let Some((disk, commits)) = &mut self.forgetful
            && holders.contains(disk)
        {
            *commits -= 1;
            if *commits == 0 {
                self.forgetful = None;
                self.restored = None;
            }
        }
        self.failing.retain(|disk| !holders.contains(disk));
        self.acknowledged = Some(configuration);
        self.begun.clear();
    }
}

/// Commits, and where devices fail, once more without them, as a pool does. None if the pool has to be closed.
async fn put(
    store: &mut Store<SimDisk>,
    mut next: Configuration,
    promise: &Shared,
) -> Result<Option<()>, Failure> {
    for _ in 0..=DISKS {
        if holders(&next).is_empty() {
            return Ok(None);
        }
        {
            let mut promise = promise.borrow_mut();
            promise.mark += 1;
            next.next_job = promise.mark;
            promise.begun.push(next.clone());
        }
        let failed = match store.commit(&next).await {
            Ok(committed) if committed.failed.is_empty() => {
                promise.borrow_mut().acknowledge(next);
                return Ok(Some(()));
            }
            // Nothing is acknowledged before they are faulty.
            Ok(committed) => {
                next.epoch += 1;
                committed.failed
            }
            Err(CommitError::NotDurable { failed, .. }) => failed,
            Err(error) => return Err(error.to_string().into()),
        };
        failed.iter().for_each(|(id, _)| make_faulty(&mut next, *id));
    }
    Ok(None)
}

fn check_standings(opened: &Opened<SimDisk>, promise: &Promise) -> Result<(), Failure> {
    for device in &opened.present {
        let disk = usize::try_from(device.id.0).unwrap();
        let stale = device.standing == Standing::Stale;
        if stale && promise.forgetful.is_none_or(|(forgetful, _)| forgetful != disk) {
            return Err(format!("{device:?} is called stale and never forgot").into());
        }
        // It is older than the configuration before, and passes for good.
        let old = promise.restored.is_some_and(|(restored, copied, newest)| {
            restored == disk && (copied + 2..=newest).contains(&opened.configuration.epoch)
        });
        if old && matches!(device.standing, Standing::Current | Standing::Lagging) {
            return Err(format!("{device:?} came back with old content").into());
        }
    }
    Ok(())
}

/// Opens what is there and begins an incarnation. None if too few are there.
async fn reopen(
    sim: &Sim,
    away: &BTreeSet<usize>,
    promise: &Shared,
) -> Result<Option<Store<SimDisk>>, Failure> {
    let (present, must) = {
        let mut promise = promise.borrow_mut();
        promise.openings += 1;
        let gone: BTreeSet<usize> = away.union(&promise.unplugged).copied().collect();
        let present: BTreeSet<usize> = (0..DISKS).filter(|disk| !gone.contains(disk)).collect();
        let mut good = present.clone();
        if let Some((forgetful, _)) = promise.forgetful {
            good.remove(&forgetful);
        }
        let must = promise
            .possible()
            .all(|one| is_more_than_half(&good, &holders(one)));
        (present, must)
    };
    let mut opened = match open(sim, present.iter().copied(), &Force::No).await {
        Ok(opened) => opened,
        Err(error @ OpenError::SplitBrain(_)) => return Err(error.to_string().into()),
        // Writes that fail excuse it.
        Err(OpenError::ClaimFailed { .. }) => return Ok(None),
        Err(error) if must => return Err(format!("with enough devices: {error}").into()),
        Err(_) => return Ok(None),
    };
    let next = {
        let promise = promise.borrow();
        if !promise.possible().any(|one| *one == opened.configuration) {
            let marks: Vec<u32> = promise.possible().map(|one| one.next_job).collect();
            let found = &opened.configuration;
            return Err(format!(
                "{} of epoch {} is opened, promised was {marks:?}",
                found.next_job, found.epoch
            )
            .into());
        }
        check_standings(&opened, &promise)?;
        begin(&opened, 0x10_0000 + u128::from(promise.openings))
    };
    Ok(put(&mut opened.store, next, promise)
        .await?
        .map(|()| opened.store))
}

fn disturb(sim: &Sim, promise: &mut Promise, step: &Step) {
    let forgetful = promise.forgetful.is_some();
    match *step {
        Step::Fail(disk) if !forgetful => {
            promise.failing.insert(disk);
            sim.inject(disk, FaultRule::once(Fault::Error, Operation::Write));
        }
        Step::Unplug(disk) if !forgetful => {
            promise.unplugged.insert(disk);
            sim.detach(disk);
        }
        Step::Plug(disk) => {
            promise.unplugged.remove(&disk);
            sim.attach(disk);
        }
        // Rules for faults to come would be copied, too.
        Step::Copy(disk) if !forgetful && promise.failing.is_empty() => {
            let copy = sim.with_medium(disk, |medium| medium.clone());
            promise.copies.insert(disk, (copy, promise.newest()));
        }
        Step::Restore(disk) if promise.may_forget() => {
            if let Some((copy, epoch)) = promise.copies.get(&disk).cloned() {
                promise.forgetful = Some((disk, 1));
                promise.restored = Some((disk, epoch, promise.newest()));
                sim.replace(disk, copy);
            }
        }
        Step::Rot { disk, offset } if promise.may_forget() => {
            promise.forgetful = Some((disk, 1));
            sim.with_medium(disk, |medium| medium.rot(offset, 2));
        }
        Step::LoseWrite(disk) if promise.may_forget() => {
            promise.forgetful = Some((disk, 3));
            sim.inject(disk, FaultRule::once(Fault::LostWrite, Operation::Write));
        }
        _ => {}
    }
}

async fn work(sim: Sim, promise: Shared, steps: Vec<Step>) -> Result<(), Failure> {
    let mut store = reopen(&sim, &BTreeSet::new(), &promise).await?;
    for step in steps {
        match (&step, &mut store) {
            (Step::Commit, Some(open)) => {
                let next = marked(open, 0);
                if put(open, next, &promise).await?.is_none() {
                    store = None;
                }
            }
            (Step::Revive, Some(open)) => {
                let mut next = marked(open, 0);
                for device in next
                    .devices
                    .iter_mut()
                    .filter(|device| open.device(device.id).is_some())
                {
                    device.state = DeviceState::Active;
                }
                promise
                    .borrow()
                    .unplugged
                    .iter()
                    .for_each(|disk| make_faulty(&mut next, id(*disk)));
                if put(open, next, &promise).await?.is_none() {
                    store = None;
                }
            }
            (Step::Reopen(away), _) => {
                let none = BTreeSet::new();
                let away = if promise.borrow().forgetful.is_some() {
                    &none
                } else {
                    away
                };
                drop(store.take());
                store = reopen(&sim, away, &promise).await?;
            }
            (Step::Restore(_), _) => {
                // Nobody exchanges a disk under a pool that is open without an error.
                drop(store.take());
                disturb(&sim, &mut promise.borrow_mut(), &step);
                store = reopen(&sim, &BTreeSet::new(), &promise).await?;
            }
            (step, _) => disturb(&sim, &mut promise.borrow_mut(), step),
        }
    }
    Ok(())
}

struct Pool;

impl Workload for Pool {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        (0..40)
            .map(|_| {
                let disk = rng.index(DISKS);
                match rng.below(20) {
                    0 | 1 => Step::Crash(rng.below(50)),
                    2 | 3 => Step::Reopen((0..DISKS).filter(|_| rng.chance(1, 4)).collect()),
                    4 => Step::Fail(disk),
                    5 => Step::Unplug(disk),
                    6 | 7 => Step::Plug(disk),
                    8 => Step::Copy(disk),
                    9 => Step::Restore(disk),
                    10 => Step::Rot {
                        disk,
                        // A label, its copy, or one of the slots.
                        offset: [0, (512 << 10) - 4096, 128 << 10, 316 << 10][rng.index(4)] + rng.below(1024),
                    },
                    11 => Step::LoseWrite(disk),
                    12..15 => Step::Revive,
                    _ => Step::Commit,
                }
            })
            .collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let disks = (0..DISKS).map(|index| DiskOptions::new(&format!("disk{index}"), SIZE));
        let mut world = World::new(disks);
        let promise = Shared::default();
        let made = world.run(&RunOptions::random(seed), |sim| async move {
            create(&sim, 0..DISKS).await
        })?;
        let store = made.ended.done().unwrap_or_else(|| Err("no end".into()))?;
        promise.borrow_mut().acknowledged = store.configuration().cloned();
        drop(store);
        let mut rest = history;
        while !rest.is_empty() {
            let crash = rest.iter().position(|step| matches!(step, Step::Crash(_)));
            let (steps, after) = match crash {
                Some(place) => (&rest[..place], &rest[place + 1..]),
                None => (rest, &[][..]),
            };
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash(events)) = crash.map(|place| &rest[place]) {
                options = options.crash_after(40 + events);
            }
            let ran = world.run(&options, |sim| work(sim, Rc::clone(&promise), steps.to_vec()))?;
            match ran.ended {
                Ended::Done(result) => result?,
                Ended::Crashed => {}
            }
            world.crash(&mut rng);
            rest = after;
        }
        let ran = world.run(&RunOptions::random(rng.next_u64()), |sim| async move {
            (0..DISKS).for_each(|disk| sim.attach(disk));
            promise.borrow_mut().unplugged.clear();
            promise.borrow_mut().failing.clear();
            reopen(&sim, &BTreeSet::new(), &promise).await.map(|_| ())
        })?;
        ran.ended.done().unwrap_or(Ok(()))
    }
}

#[test]
fn what_was_acknowledged_is_opened_whatever_happens_to_as_many_devices_as_the_pool_can_lose() {
    let options = SwarmOptions {
        seed: 3,
        histories: 3000,
    };
    let numbers = swarm(&Pool, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    let missing = numbers.missing(&[
        "store: a stale device",
        "store: a device lags by one epoch",
        "store: a new device has no configuration yet",
        "store: a faulty device is back",
        "store: a commit is not durable",
        "store: a change of several devices is confirmed",
        "store: a holder does not take a commit",
        "store: a device fails when the pool is claimed",
        "store: a device holds what was tried first",
        "store: no majority",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}
