//! Histories on disks without redundancy.

use std::rc::Rc;

use block_io::Operation;
use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultRule, Numbers, Rng, RunOptions, Sim, SimDisk, SwarmOptions,
    Workload, World, swarm,
};
use filesys::{FileSystem, FormatOptions, FsError, OpenOptions};

use super::session::Session;
use super::{Bed, CLUSTER, Step, draw, end};
use crate::harness::{SimFs, failed, given};
use crate::machine::{Promise, adds_up, is_sound, verify};

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
    /// Processes are killed as well, and leave a tail of the journal.
    kills: bool,
}

/// Room for the tail of a few writes.
const TAIL: usize = 4096 + 2 * 600;

impl Machines {
    fn options(&self, sim: &Sim) -> OpenOptions {
        OpenOptions {
            tail: self.kills.then(|| sim.lasting_memory(TAIL)),
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
            self.options(sim),
            sim.clock(),
        )
        .await?;
        fs.close().await
    }
}

impl Bed for Machines {
    type Device = SimDisk;

    async fn open(&self, sim: &Sim) -> Result<SimFs, FsError> {
        FileSystem::open(
            Rc::new(sim.disk(0)),
            self.devices(sim),
            self.options(sim),
            sim.clock(),
        )
        .await
    }

    async fn between(&self, sim: &Sim, _session: &Session<SimDisk>, step: &Step) -> Result<(), Failure> {
        if *step == Step::WriteFails && self.faults {
            sim.inject(1, FaultRule::once(Fault::Error, Operation::Write).after(1));
        }
        Ok(())
    }
}

impl Machines {
    fn live(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = self.world();
        let promise = Promise::default();
        promise.borrow_mut().outlives = self.kills;
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
                let fs = self.open(&sim).await.map_err(failed)?;
                let session = Session::new(fs, &promise, self.faults, self.racy);
                session.work(&sim, self, part).await.map(drop)
            })?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            self.end(&mut world, &mut rng, &promise);
            if rng.chance(1, 3) {
                // Once more while it recovers.
                let options = RunOptions::random(rng.next_u64()).crash_after(rng.below(150));
                let ran = world.run(&options, async |sim| self.recover(&sim, &promise).await)?;
                if let Ended::Done(result) = ran.ended {
                    result.map_err(|failure| failure.context("after the crash"))?;
                }
                self.end(&mut world, &mut rng, &promise);
            }
            let ran = world.run(&RunOptions::random(rng.next_u64()), async |sim| {
                self.recover(&sim, &promise).await?;
                // And it stays like this.
                self.recover(&sim, &promise).await
            })?;
            let recovered = ran.ended.done().unwrap_or(Ok(()));
            recovered.map_err(|failure| failure.context("after the crash"))?;
            if !self.kills || rng.chance(1, 2) {
                world.settle();
            }
        }
        Ok(())
    }

    /// The power is cut, or the process killed.
    fn end(&self, world: &mut World, rng: &mut Rng, promise: &Promise) {
        let killed = self.kills && rng.chance(2, 3);
        end(world, rng, promise, killed);
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
        adds_up(&fs, promise, None).await?;
        is_sound(&fs).await?;
        fs.close().await.map_err(failed)
    }
}

impl Workload for Machines {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        draw(rng)
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
    kills: false,
};

#[test]
fn several_users_and_crashes() {
    let numbers = run(ROOMY, 1, 600);
    let marks = [
        "filesys: a checkpoint began while data with checksums were on their way",
        "filesys: a checksum of an earlier user of a place was forgotten",
        "filesys: a cluster with checksums absorbs one without",
        "filesys: a group was replayed",
        "filesys: a part of a sub-cluster was written",
        "filesys: an absorption that a crash has interrupted goes on",
        "filesys: clusters behind the end of a child that absorbs",
        "filesys: the last child absorbs a parent without a name",
    ];
    demand(&numbers, &marks);
}

/// These rare branches were reached, unless only one history was asked for.
pub(super) fn demand(numbers: &Numbers, marks: &[&str]) {
    if std::env::var_os("SMSVMM_SIM_SEED").is_none() {
        let missing = numbers.missing(marks);
        assert!(missing.is_empty(), "{missing:?} were not reached");
    }
}

#[test]
fn processes_are_killed() {
    let machines = Machines { kills: true, ..ROOMY };
    let marks = [
        "filesys: what the tail of the journal has was made again",
        "journal: the tail goes on in its other half",
        "journal: there is no room in the tail",
    ];
    demand(&run(machines, 7, 250), &marks);
}

#[test]
fn hardly_any_memory_and_a_checkpoint_every_moment() {
    let machines = Machines {
        cached_pages: 2,
        dirty_pages: 8,
        journal: 16,
        ..ROOMY
    };
    demand(&run(machines, 2, 150), &["journal: somebody waits for room"]);
}

#[test]
fn full_volumes() {
    let machines = Machines {
        volumes: 1,
        clusters: 10,
        ..ROOMY
    };
    let marks = [
        "filesys: a neighbour in the chain is absorbed just now",
        "filesys: an allocation waits for freed clusters",
        "swarm: a volume was full",
    ];
    demand(&run(machines, 3, 150), &marks);
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
    demand(&run(machines, 6, 150), &["filesys: a file shrank under a write"]);
}

#[test]
fn requests_that_fail() {
    let machines = Machines {
        faults: true,
        ..ROOMY
    };
    demand(
        &run(machines, 5, 100),
        &["filesys: a write of data with checksums failed"],
    );
}
