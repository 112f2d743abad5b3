//! Random histories: guests write all the time, while their disks are managed, devices of the mirrors fail and come back, and the power
//! is cut.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block_io::Clock;
use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultPlan, FaultPolicy, FaultRates, Medium, Rng, RunOptions, Sim,
    SwarmOptions, Workload, World, swarm,
};
use storage_virtualizer::disk::DiskMode;
use volume_manager::model::Layout;

use crate::disks::{Promise, SIZE, Session};
use crate::harness::failed;
use crate::model::{DISKS, Model};
use crate::rig::{self, Damage, Rig, settle};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// The guests go on for so many microseconds.
    Wait(u64),
    /// Of one disk, or of all at one moment.
    Snapshot {
        disk: Option<usize>,
    },
    DeleteSnapshot {
        disk: usize,
        choice: u64,
    },
    Commit {
        disk: usize,
    },
    Clone {
        disk: usize,
        choice: u64,
    },
    DeleteClone,
    Resize {
        disk: usize,
    },
    Revert {
        disk: usize,
        choice: u64,
    },
    Changed {
        disk: usize,
        choice: u64,
    },
    Reserve {
        disk: usize,
        choice: u64,
    },
    /// A device begins to misbehave.
    DeviceFails {
        device: u64,
        way: u64,
    },
    /// All devices come back, and are made whole.
    Heal,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
}

struct Machines {
    rates: FaultRates,
}

async fn step(sim: &Sim, rig: &Rig, session: &Session, step: &Step) -> Result<(), Failure> {
    match step {
        Step::Wait(time) => sim.clock().sleep(Duration::from_micros(*time)).await,
        Step::Snapshot { disk: Some(disk) } => session.snapshot(&[*disk]).await?,
        Step::Snapshot { disk: None } => session.snapshot(&(0..DISKS).collect::<Vec<_>>()).await?,
        Step::DeleteSnapshot { disk, choice } => session.delete_snapshot(*disk, *choice).await?,
        Step::Commit { disk } => session.commit(*disk).await?,
        Step::Clone { disk, choice } => session.clone_snapshot(*disk, *choice).await?,
        Step::DeleteClone => session.delete_clone().await?,
        Step::Resize { disk } => session.resize(*disk).await?,
        Step::Revert { disk, choice } => session.revert(*disk, *choice).await?,
        Step::Changed { disk, choice } => session.changed(*disk, *choice).await?,
        Step::Reserve { disk, choice } => session.reserve(*disk, *choice).await?,
        Step::DeviceFails { device, way } => {
            rig.device_fails(sim, rig.damage.candidate(*device), *way);
        }
        Step::Heal => {
            // A request that was hit before, and has not ended, would be the damage of a device that counts as whole.
            session.stop().await?;
            rig.heal(sim).await?;
            session.start().await?;
        }
        Step::Crash { .. } => {}
    }
    session.trouble()
}

/// What happens between two power cuts.
async fn live(
    sim: &Sim,
    damage: &Damage,
    promise: &Promise,
    modes: [DiskMode; DISKS],
    steps: &[Step],
) -> Result<(), Failure> {
    let rig = Rig::open_pool(sim, damage).await?;
    let files = rig.open_files(sim).await.map_err(failed)?;
    let session = Session::new(sim, files, promise, modes);
    session.start().await?;
    for one in steps {
        let done = step(sim, &rig, &session, one).await;
        done.map_err(|failure| failure.context(&format!("{one:?}")))?;
    }
    session.stop().await?;
    session.check().await?;
    session.is_sound().await?;
    session.close().await
}

/// After a power cut: everything is there that was promised.
async fn recover(
    sim: &Sim,
    damage: &Damage,
    promise: &Promise,
    modes: [DiskMode; DISKS],
    last: bool,
) -> Result<(), Failure> {
    let rig = Rig::open_pool(sim, damage).await?;
    let files = rig.open_files(sim).await.map_err(failed)?;
    let session = Session::new(sim, files, promise, modes);
    session.recover().await?;
    if last {
        session.clean_up().await?;
    }
    session.is_sound().await?;
    session.close().await?;
    settle(&rig.pool).await;
    rig.pool.close().await.map_err(failed)
}

impl Workload for Machines {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        (0..60)
            .map(|_| {
                let disk = rng.index(DISKS);
                let choice = rng.below(1 << 20);
                match rng.below(64) {
                    0..12 => Step::Snapshot {
                        disk: rng.chance(1, 3).then_some(disk),
                    },
                    12..20 => Step::DeleteSnapshot { disk, choice },
                    20..24 => Step::Commit { disk },
                    24..27 => Step::Clone { disk, choice },
                    27..29 => Step::DeleteClone,
                    29..32 => Step::Resize { disk },
                    32..35 => Step::Revert { disk, choice },
                    35..38 => Step::Changed { disk, choice },
                    38..42 => Step::DeviceFails {
                        device: rng.next_u64(),
                        way: rng.below(1 << 20),
                    },
                    42..45 => Step::Heal,
                    45..50 => Step::Crash {
                        after: rng.below(6000),
                    },
                    50..54 => Step::Reserve { disk, choice },
                    _ => Step::Wait(rng.below(600)),
                }
            })
            .collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let disks = (0..rig::DISKS).map(|index| DiskOptions::new(&format!("d{index}"), rig::DISK));
        let mut world = World::new(disks);
        let damage = Damage::new();
        let promise: Promise = Rc::new(RefCell::new(Model::new(SIZE)));
        let mut modes = [DiskMode::Persistent; DISKS];
        for mode in &mut modes {
            if rng.chance(1, 3) {
                *mode = DiskMode::Append;
            }
        }
        let made = world.run(&RunOptions::in_order(), async |sim| {
            let rig = Rig::create(&sim, &damage, Layout::Mirror { legs: 2 }).await?;
            rig.format(&sim).await.map_err(failed)?;
            let files = rig.open_files(&sim).await.map_err(failed)?;
            let session = Session::new(&sim, files, &promise, modes);
            session.create().await?;
            session.close().await?;
            rig.pool.close().await.map_err(failed)
        })?;
        made.ended.done().unwrap_or(Ok(()))?;
        world.settle();
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. })) {
            world.faults = FaultPlan {
                rates: self.rates,
                policy: Some(Rc::clone(&damage.policy) as Rc<RefCell<dyn FaultPolicy>>),
            };
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, async |sim| {
                live(&sim, &damage, &promise, modes, part).await
            })?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.faults = FaultPlan::default();
            world.crash(&mut rng);
            let missing = damage.candidate(rng.next_u64());
            let missing = (rng.chance(1, 3) && damage.allows(missing, Fault::Drop)).then_some(missing);
            let recovered = world.run(&RunOptions::random(rng.next_u64()), async |sim| {
                if let Some(device) = missing {
                    block_io::cover!("disks: a device is missing after a crash");
                    sim.detach(device);
                }
                recover(&sim, &damage, &promise, modes, false).await
            })?;
            let recovered = recovered.ended.done().unwrap_or(Ok(()));
            recovered.map_err(|failure| failure.context("after the crash"))?;
            world.settle();
        }
        let last = world.run(&RunOptions::random(rng.next_u64()), async |sim| {
            (0..rig::DISKS).for_each(|disk| sim.with_medium(disk, Medium::repair));
            recover(&sim, &damage, &promise, modes, true).await
        })?;
        let last = last.ended.done().unwrap_or(Ok(()));
        last.map_err(|failure| failure.context("at last"))
    }
}

fn run(rates: FaultRates, seed: u64, histories: u64, marks: &[&str]) {
    let options = SwarmOptions { seed, histories };
    let numbers = swarm(&Machines { rates }, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    if numbers.histories >= histories {
        let missing = numbers.missing(marks);
        assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
    }
}

const MARKS: [&str; 6] = [
    "disks: a crash in a snapshot",
    "disks: a crash in a deletion",
    "disks: a device is missing after a crash",
    "disks: changes between two snapshots",
    "swarm: a damaged device is whole again",
    "disk: a layer was not made before a crash",
];

#[test]
fn disks_on_mirrors_are_managed_under_load() {
    run(FaultRates::default(), 28, 25, &MARKS);
}

#[test]
fn disks_on_mirrors_are_managed_under_load_while_devices_fail_at_random() {
    let rates = FaultRates {
        error: 60,
        drop: 15,
        slow: 40,
        ..FaultRates::default()
    };
    // A single durable write: few crashes hit it.
    let reserved = ["disks: a crash while reservations are kept"];
    run(rates, 22, 60, &[&MARKS[..], &reserved].concat());
}
