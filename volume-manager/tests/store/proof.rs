//! Every crash of every operation of the store, with a device missing at the next openings, and every crash of those.
//!
//! What must hold: an opening returns the acknowledged configuration or one that was begun after it; it succeeds whenever
//! more than half of the holders are there; no device is called stale.

use std::collections::BTreeSet;

use block_io::sim::{
    DiskOptions, ExploreOptions, Failure, Numbers, Scenario, Shared, Sim, SimDisk, World, explore,
};
use volume_manager::model::{Configuration, Uuid};
use volume_manager::store::{Force, Standing, Store, format_device};

use crate::pool::{SIZE, add, begin, commit, create, first, id, make_faulty, marked, open, world};

/// What is crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Script {
    /// A pool is made on all disks, which were of another one.
    Create,
    /// The pool is opened and changed.
    Commit,
    /// The last disk is added to a pool on the others.
    Add,
    /// The last disk leaves the pool.
    Remove,
    /// The last two disks fail at once.
    LoseTwo,
    /// The pool is opened while its last disk is away, and once more with all.
    Open,
}

/// What was promised.
#[derive(Debug, Clone, Default)]
struct Promise {
    acknowledged: Option<Configuration>,
    begun: Vec<Configuration>,
    openings: usize,
    mark: u32,
}

struct Proof {
    disks: usize,
    script: Script,
    /// The disk that is away at the first opening after a crash, at the second, and so on in turns.
    missing: [Option<usize>; 2],
    /// Disks of 512-byte sectors, whose slots can be torn.
    torn: bool,
}

fn holders(configuration: &Configuration) -> BTreeSet<usize> {
    let devices = configuration.devices.iter().filter(|device| device.is_holder());
    devices
        .map(|device| usize::try_from(device.id.0).unwrap())
        .collect()
}

fn has_majority(configuration: &Configuration, present: &BTreeSet<usize>) -> bool {
    let holders = holders(configuration);
    holders.intersection(present).count() * 2 > holders.len()
}

impl Proof {
    fn all(&self) -> BTreeSet<usize> {
        (0..self.disks).collect()
    }

    async fn put(
        &self,
        store: &mut Store<SimDisk>,
        mut next: Configuration,
        promise: &Shared<Promise>,
    ) -> Result<(), Failure> {
        {
            let mut promise = promise.borrow_mut();
            promise.mark += 1;
            next.next_job = promise.mark;
            promise.begun.push(next.clone());
        }
        commit(store, &next).await?;
        let mut promise = promise.borrow_mut();
        promise.acknowledged = Some(next);
        promise.begun.clear();
        Ok(())
    }

    /// Opens with `present` and begins an incarnation.
    async fn reopen(
        &self,
        sim: &Sim,
        present: &BTreeSet<usize>,
        promise: &Shared<Promise>,
    ) -> Result<Store<SimDisk>, Failure> {
        let opened = open(sim, present.iter().copied(), &Force::No).await;
        let mut opened = opened.map_err(|error| Failure::from(error.to_string()))?;
        let expected = {
            let promise = promise.borrow();
            promise
                .acknowledged
                .iter()
                .chain(&promise.begun)
                .any(|one| *one == opened.configuration)
        };
        if !expected {
            let found = &opened.configuration;
            return Err(format!("{found:?} is opened, promised was {:?}", promise.borrow()).into());
        }
        if let Some(stale) = opened
            .present
            .iter()
            .find(|present| present.standing == Standing::Stale)
        {
            return Err(format!("{stale:?} is called stale").into());
        }
        let incarnation = 0x100 + u128::from(promise.borrow().mark);
        let next = begin(&opened, incarnation);
        self.put(&mut opened.store, next, promise).await?;
        Ok(opened.store)
    }
}

impl Scenario for Proof {
    type Model = Promise;

    fn world(&self) -> World {
        if self.torn {
            return World::new((0..self.disks).map(|index| DiskOptions::new(&format!("disk{index}"), SIZE)));
        }
        world(self.disks)
    }

    async fn prepare(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let members = match self.script {
            Script::Create => {
                for disk in sim.disks() {
                    format_device(&disk, Uuid(7), Uuid(8), "another")
                        .await
                        .map_err(|error| error.to_string())?;
                }
                return Ok(());
            }
            Script::Add => self.disks - 1,
            _ => self.disks,
        };
        let store = create(&sim, 0..members).await?;
        promise.borrow_mut().acknowledged = store.configuration().cloned();
        Ok(())
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let last = self.disks - 1;
        if self.script == Script::Create {
            let (mut store, mut next) = (Store::new(), first());
            for index in 0..self.disks {
                add(&sim, index, &mut store, &mut next).await;
            }
            return self.put(&mut store, next, &promise).await;
        }
        let mut present = self.all();
        if matches!(self.script, Script::Open | Script::Add) {
            present.remove(&last);
        }
        let mut store = self.reopen(&sim, &present, &promise).await?;
        let mut next = marked(&store, 0);
        match self.script {
            Script::Create => {}
            Script::Commit => {
                self.put(&mut store, next, &promise).await?;
            }
            Script::Add => {
                add(&sim, last, &mut store, &mut next).await;
                self.put(&mut store, next, &promise).await?;
            }
            Script::Remove => {
                next.devices.pop();
                self.put(&mut store, next, &promise).await?;
                store.remove_device(id(last)).map_err(|error| error.to_string())?;
            }
            Script::LoseTwo => {
                make_faulty(&mut next, id(last));
                make_faulty(&mut next, id(last - 1));
                self.put(&mut store, next, &promise).await?;
            }
            Script::Open => {
                self.reopen(&sim, &self.all(), &promise).await?;
            }
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let missing = {
            let mut promise = promise.borrow_mut();
            promise.openings += 1;
            self.missing[(promise.openings - 1) % 2]
        };
        let mut present = self.all();
        if let Some(missing) = missing {
            present.remove(&missing);
        }
        let (acknowledged, enough) = {
            let promise = promise.borrow();
            let mut possible = promise.acknowledged.iter().chain(&promise.begun);
            (
                promise.acknowledged.is_some(),
                possible.all(|one| has_majority(one, &present)),
            )
        };
        match self.reopen(&sim, &present, &promise).await {
            Ok(_) => return Ok(()),
            Err(failure) if acknowledged && enough => return Err(failure.context("with enough devices")),
            // Whatever was opened must be what was promised.
            Err(failure) if failure.message.contains("promised") || failure.message.contains("stale") => {
                return Err(failure);
            }
            Err(_) => {}
        }
        // With all devices it always opens, once it was made.
        match self.reopen(&sim, &self.all(), &promise).await {
            Err(failure) if acknowledged => Err(failure.context("with all devices")),
            Err(failure) if failure.message.contains("promised") => Err(failure),
            _ => Ok(()),
        }
    }
}

/// Explores with every pair of disks of `away` that may be away at the next two openings.
fn prove(script: Script, disks: usize, torn: bool, away: &[Option<usize>], nested_states: u64) -> Numbers {
    let options = ExploreOptions {
        nesting: 2,
        nested_states,
        ..ExploreOptions::default()
    };
    let mut numbers = Numbers::default();
    for first in away {
        for second in away {
            let missing = [*first, *second];
            let proof = Proof {
                disks,
                script,
                missing,
                torn,
            };
            let explored = explore(&proof, &options);
            numbers.add(
                &explored
                    .unwrap_or_else(|failure| panic!("{script:?} on {disks}, {missing:?} away: {failure}")),
            );
        }
    }
    println!("{script:?} on {disks}: {numbers}");
    numbers
}

fn demand(numbers: &Numbers, marks: &[&str]) {
    let missing = numbers.missing(marks);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}

#[test]
fn no_crash_on_one_device_loses_a_configuration() {
    let mut numbers = prove(Script::Create, 1, true, &[None], 64);
    numbers.add(&prove(Script::Commit, 1, true, &[None], 64));
    assert!(
        numbers.sampled_points == 0 && numbers.crash_states > 1000,
        "{numbers}"
    );
}

#[test]
fn no_crash_on_two_devices_loses_or_doubles_a_configuration() {
    let mut numbers = Numbers::default();
    for script in [Script::Create, Script::Commit, Script::Add, Script::Remove] {
        numbers.add(&prove(script, 2, false, &[None, Some(0), Some(1)], 3));
    }
    demand(
        &numbers,
        &[
            "store: a device lags by one epoch",
            "store: a new device has no configuration yet",
            "store: no majority",
        ],
    );
}

#[test]
fn no_crash_on_three_devices_loses_or_doubles_a_configuration() {
    let mut numbers = Numbers::default();
    for script in [
        Script::Create,
        Script::Commit,
        Script::Open,
        Script::Add,
        Script::Remove,
    ] {
        numbers.add(&prove(script, 3, false, &[None, Some(2)], 2));
    }
    demand(
        &numbers,
        &[
            "store: a device lags by one epoch",
            "store: a faulty device is back",
        ],
    );
}

#[test]
fn no_crash_on_four_devices_loses_or_doubles_a_configuration() {
    let mut numbers = Numbers::default();
    for script in [Script::Commit, Script::Open, Script::Add, Script::LoseTwo] {
        numbers.add(&prove(script, 4, false, &[Some(3)], 2));
    }
    demand(&numbers, &["store: a change of several devices is confirmed"]);
}
