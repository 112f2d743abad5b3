//! Histories on real volumes: what one device of a mirror or of RAID-5 does is never noticed above, and nothing is lost.
//!
//! The metadata are on a mirror, the data on two volumes of the layout in question. While a history runs, one device at a time may fail
//! requests, once or again and again, may be gone, be slow, or have rot in the data of files with checksums; after a power cut, one
//! may not come back. It counts as damaged until a heal has made everything whole.
//!
//! Two things are more than this covers, so histories do not do them: rot within the 4 MiB around what is written just before a crash, whose
//! checksums are not trusted; and rot in a row of RAID-5 that is written before it is read, as parity is then computed from it. So rot is
//! looked for directly after it happens; what a crash or another fault kept from being found is taken back before anything else is
//! written. And a crash while whole rows of RAID-5 were overwritten, with a device lost before their parity was computed
//! anew, is an error that says "parity in doubt", which ends a history.

use std::cell::RefCell;
use std::rc::Rc;

use block_io::sim::{
    DiskOptions, Ended, Failure, Fault, FaultPlan, FaultPolicy, FaultRates, Medium, Numbers, Rng, RunOptions,
    Sim, SwarmOptions, Workload, World, swarm,
};
use filesys::{Access, FsError, Pace, ScrubOptions, ScrubReport};
use volume_manager::model::Layout;

use super::session::Session;
use super::{Bed, Step, disks, draw, end};
use crate::harness::{SimFs, failed};
use crate::machine::{Handle, Promise, adds_up, is_sound, verify};
use crate::rig::{DISK, DISKS, Damage, Rig, SimVolume, settle};

/// What histories run on.
#[derive(Debug, Clone, Copy)]
struct Pools {
    layout: Layout,
    /// At random, while no crash is recovered from.
    rates: FaultRates,
    /// All files have checksums, and their data may rot.
    checksums: bool,
}

/// The bit of a byte that rots.
const ROT: u32 = 3;

/// What has rotted and was not put right yet: disk, byte, what is there. Stays over a power cut.
#[derive(Debug, Default)]
struct Rotten(RefCell<Vec<(usize, u64, u8)>>);

impl Rotten {
    fn rot(&self, sim: &Sim, disk: usize, at: u64) {
        let mut byte = [0];
        sim.with_medium(disk, |medium| {
            medium.rot(at, ROT);
            medium.peek(at, &mut byte);
        });
        self.0.borrow_mut().push((disk, at, byte[0]));
    }

    /// Forgets what was put right; tells whether something is left.
    fn is_left(&self, sim: &Sim) -> bool {
        let mut rotten = self.0.borrow_mut();
        rotten.retain(|(disk, at, byte)| {
            let mut now = [0];
            sim.with_medium(*disk, |medium| medium.peek(*at, &mut now));
            now == [*byte]
        });
        !rotten.is_empty()
    }

    /// What is rotten yet is so no more.
    fn restore(&self, sim: &Sim) {
        if self.is_left(sim) {
            for (disk, at, _) in self.0.take() {
                sim.with_medium(disk, |medium| medium.rot(at, ROT));
            }
        }
    }
}

/// A pool in a history.
struct Decaying<'a> {
    rig: &'a Rig,
    rotten: &'a Rotten,
}

impl Decaying<'_> {
    /// Data of files rot; then all are read, and repaired.
    async fn rot(
        &self,
        sim: &Sim,
        session: &Session<SimVolume>,
        disk: usize,
        place: u64,
    ) -> Result<(), Failure> {
        settle(&self.rig.pool).await;
        session.fs.settled().await;
        // Checksums that a crash has taken away are there again after this.
        scrub(&session.fs).await?;
        // And no crash takes them away.
        session.fs.checkpoint().await.map_err(failed)?;
        let paths: Vec<String> = (0..16).filter_map(|file| session.path(file)).collect();
        let Some(path) = paths.get(usize::try_from(place).unwrap_or(0) % paths.len().max(1)) else {
            return Ok(());
        };
        let extents = match session.fs.extents(path, 0, 1 << 20).await {
            Ok(report) => report.extents,
            Err(FsError::State { .. } | FsError::NotFound { .. } | FsError::IsDirectory { .. }) => {
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        let on_disk = extents.iter().filter(|extent| extent.device == disk as u64);
        for extent in on_disk.take(3) {
            if !self.rig.damage.allows(disk, Fault::BitRot) {
                return Ok(());
            }
            self.rotten
                .rot(sim, disk, extent.start + place * 7919 % extent.length);
        }
        if !self.rotten.is_left(sim) {
            return Ok(());
        }
        block_io::cover!("swarm: data of a file rot");
        session.read_all().await?;
        scrub(&session.fs).await?;
        let second = scrub(&session.fs).await?;
        if !second.is_clean() {
            return Err(format!("a second scrub finds {second:?}").as_str().into());
        }
        settle(&self.rig.pool).await;
        if self.rotten.is_left(sim) && second.unread == 0 && self.rig.is_whole() {
            return Err("rot was not repaired".into());
        }
        // The device went out of service before all of it was found, or could not read it.
        self.rotten.restore(sim);
        Ok(())
    }
}

async fn scrub(fs: &SimFs<SimVolume>) -> Result<ScrubReport, Failure> {
    fs.scrub(ScrubOptions::default(), |_| Pace::Go)
        .await
        .map_err(failed)
}

impl Bed for Decaying<'_> {
    type Device = SimVolume;

    async fn open(&self, sim: &Sim) -> Result<SimFs<SimVolume>, FsError> {
        self.rig.open_files(sim).await
    }

    async fn between(&self, sim: &Sim, session: &Session<SimVolume>, step: &Step) -> Result<(), Failure> {
        match step {
            Step::Heal => self.rig.heal(sim).await,
            Step::Rot { disk, place } => {
                self.rot(sim, session, self.rig.damage.candidate(*disk), *place)
                    .await
            }
            Step::DeviceFails { disk, way } => {
                let disk = self.rig.damage.candidate(*disk);
                self.rig.device_fails(sim, disk, *way);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Session<SimVolume> {
    /// Reads every file that has a name, and compares it with the model.
    async fn read_all(&self) -> Result<(), Failure> {
        let files: Vec<(String, u64)> = {
            let model = self.promise.borrow();
            let entries = model
                .tree
                .values()
                .filter(|entry| !entry.directory && !entry.absorbed);
            entries
                .filter_map(|entry| Some((entry.path.clone()?, entry.size)))
                .collect()
        };
        for (path, size) in files {
            let file = self.fs.open_file(&path, Access::Read).await.map_err(failed)?;
            let handle = Handle::new(&self.promise, &path, file)?;
            handle
                .check(&self.promise, 0, size)
                .await
                .map_err(|failure| failure.context(&path))?;
        }
        Ok(())
    }
}

impl Pools {
    async fn recover(&self, sim: &Sim, damage: &Damage, promise: &Promise) -> Result<(), Failure> {
        let rig = Rig::open_pool(sim, damage).await?;
        let fs = rig.open_files(sim).await.map_err(failed)?;
        verify(&fs, promise, u64::MAX).await?;
        fs.settled().await;
        adds_up(&fs, promise, None).await?;
        is_sound(&fs).await?;
        fs.close().await.map_err(failed)?;
        drop(fs);
        settle(&rig.pool).await;
        rig.pool.close().await.map_err(failed)
    }

    fn live(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let disks = (0..DISKS).map(|index| DiskOptions::new(&format!("d{index}"), DISK));
        let mut world = World::new(disks);
        let (damage, promise, rotten) = (Damage::new(), Promise::default(), Rotten::default());
        promise.borrow_mut().outlives = true;
        let made = world.run(&RunOptions::in_order(), async |sim| {
            let rig = Rig::create(&sim, &damage, self.layout).await?;
            rig.format(&sim).await.map_err(failed)?;
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
            options.max_events = 4_000_000;
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(after * 4);
            }
            let ran = world.run(&options, async |sim| {
                rotten.restore(&sim);
                let rig = Rig::open_pool(&sim, &damage).await?;
                let fs = rig.open_files(&sim).await.map_err(failed)?;
                let bed = Decaying {
                    rig: &rig,
                    rotten: &rotten,
                };
                Session::new(fs, &promise, false, false)
                    .work(&sim, &bed, part)
                    .await
                    .map(drop)
            })?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.faults = FaultPlan::default();
            self.after_a_crash(&mut world, &mut rng, &damage, &promise)
                .map_err(|failure| failure.context("after the crash"))?;
        }
        let last = world.run(&RunOptions::random(rng.next_u64()), async |sim| {
            (0..DISKS).for_each(|disk| sim.with_medium(disk, Medium::repair));
            rotten.restore(&sim);
            self.recover(&sim, &damage, &promise).await
        })?;
        let last = last.ended.done().unwrap_or(Ok(()));
        last.map_err(|failure| failure.context("at last"))
    }

    /// Cuts the power, or kills the process; perhaps a device does not come back; perhaps that happens again.
    fn after_a_crash(
        &self,
        world: &mut World,
        rng: &mut Rng,
        damage: &Damage,
        promise: &Promise,
    ) -> Result<(), Failure> {
        let killed = rng.chance(1, 3);
        end(world, rng, promise, killed);
        let missing = damage.candidate(rng.next_u64());
        let missing = (rng.chance(1, 3) && damage.allows(missing, Fault::Drop)).then_some(missing);
        let rounds = if rng.chance(1, 3) { 2 } else { 1 };
        for round in (0..rounds).rev() {
            let mut options = RunOptions::random(rng.next_u64());
            if round > 0 {
                options = options.crash_after(rng.below(400));
            }
            let ran = world.run(&options, async |sim| {
                if let Some(disk) = missing {
                    block_io::cover!("swarm: a device is missing after a crash");
                    sim.detach(disk);
                }
                self.recover(&sim, damage, promise).await
            })?;
            match ran.ended {
                Ended::Done(result) => {
                    result?;
                    world.settle();
                }
                Ended::Crashed => {
                    let killed = rng.chance(1, 3);
                    end(world, rng, promise, killed);
                }
            }
        }
        Ok(())
    }
}

impl Workload for Pools {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let mut steps = Vec::new();
        for mut step in draw(rng) {
            if let (Step::Create { checked, .. }, true) = (&mut step, self.checksums) {
                *checked = true;
            }
            let damage = match step {
                Step::Checksums { .. } | Step::WriteFails if self.checksums => Some(Step::Rot {
                    disk: rng.next_u64(),
                    place: rng.below(1 << 20),
                }),
                Step::Checkpoint | Step::WriteFails => Some(Step::DeviceFails {
                    disk: rng.next_u64(),
                    way: rng.below(1 << 20),
                }),
                Step::Reopen => Some(Step::Heal),
                _ => None,
            };
            if !(self.checksums && matches!(step, Step::Checksums { .. })) {
                steps.push(step);
            }
            if let Some(damage) = damage {
                steps.extend([Step::Join, damage]);
            }
        }
        steps
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        match self.live(seed, history) {
            Err(failure) if failure.message.contains("parity in doubt") => {
                block_io::cover!("swarm: parity in doubt");
                Ok(())
            }
            other => other,
        }
    }
}

fn run(layout: Layout, rates: FaultRates, checksums: bool, seed: u64) -> Numbers {
    let pools = Pools {
        layout,
        rates,
        checksums,
    };
    let options = SwarmOptions { seed, histories: 100 };
    let numbers = swarm(&pools, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{pools:?}\n{numbers}");
    numbers
}

fn demand(numbers: &Numbers, marks: &[&str]) {
    disks::demand(numbers, marks);
    let given_up = numbers.marks.get("swarm: parity in doubt").copied().unwrap_or(0);
    assert!(
        given_up * 3 <= numbers.histories,
        "{given_up} histories were given up"
    );
}

const MIRROR: Layout = Layout::Mirror { legs: 2 };
const RAID5: Layout = Layout::Raid5 { columns: 3 };
const FAULTS: FaultRates = FaultRates {
    error: 60,
    bit_rot: 0,
    lost_write: 0,
    misdirected_write: 0,
    no_space: 0,
    drop: 15,
    slow: 40,
};
const MARKS: [&str; 2] = [
    "swarm: a device is missing after a crash",
    "swarm: a damaged device is whole again",
];
const ROT_MARKS: [&str; 4] = [
    "filesys: a checksum differs at first sight",
    "filesys: a scrub fills in checksums",
    "filesys: data are taken from another copy",
    "swarm: data of a file rot",
];

#[test]
fn a_device_of_a_mirror_fails() {
    demand(&run(MIRROR, FAULTS, false, 11), &MARKS);
}

#[test]
fn a_device_of_raid5_fails() {
    demand(&run(RAID5, FAULTS, false, 12), &MARKS);
}

#[test]
fn data_on_a_device_of_a_mirror_rot() {
    demand(&run(MIRROR, FaultRates::default(), true, 13), &ROT_MARKS);
}

#[test]
fn data_on_a_device_of_raid5_rot() {
    demand(&run(RAID5, FaultRates::default(), true, 14), &ROT_MARKS);
}
