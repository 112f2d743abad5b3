//! Volumes are mirrors of small regions on two disks, which also hold the logs. After a crash, every region that differs must be
//! named by the logs: by both, and by each alone. That is the whole promise of the log, and
//! needs no model.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use block_io::sim::{
    DiskOptions, Ended, ExploreOptions, Failure, Fault, FaultRule, Rng, RunOptions, Scenario, Shared, Sim,
    SimDisk, SwarmOptions, Workload, World, explore, swarm,
};
use block_io::{BlockDevice, Durability, IoError, Operation};
use volume_manager::logs::LogError;
use volume_manager::logs::activity::{ActivityLog, RING};
use volume_manager::logs::hot::{Guard, HotRegions, Limits, Release};
use volume_manager::model::{DeviceId, Uuid, VolumeId};

use crate::together;

const POOL: Uuid = Uuid(0x1234);
const VOLUMES: [VolumeId; 2] = [VolumeId(1), VolumeId(7)];
const REGIONS: u32 = 6;
const DATA: u64 = 1 << 20;
const SECTOR: usize = 4096;
/// A sector for each of three writers, so that they do not meet.
const REGION: usize = 3 * SECTOR;

/// How the owner behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Right,
    /// Regions leave while their last writes are in caches.
    ReleasesWithoutFlush,
    /// Writes before the log is durable.
    WritesEarly,
}

struct Mirror {
    disks: [SimDisk; 2],
    hot: HotRegions<SimDisk>,
    owner: Owner,
    flushes: Cell<u32>,
}

fn place(volume: VolumeId, region: u32) -> u64 {
    DATA + u64::from(volume.0 * REGIONS + region) * REGION as u64
}

impl Release for Mirror {
    async fn release(&self, _: VolumeId, regions: &[u32]) -> Result<(), IoError> {
        assert!(!regions.is_empty());
        self.flushes.set(self.flushes.get() + 1);
        if self.owner == Owner::ReleasesWithoutFlush {
            return Ok(());
        }
        self.disks[0].flush().await?;
        self.disks[1].flush().await
    }
}

fn devices(which: &[u32]) -> Vec<DeviceId> {
    which.iter().copied().map(DeviceId).collect()
}

async fn format(sim: &Sim) -> Result<(), Failure> {
    for disk in 0..2 {
        let log = ActivityLog::format(
            DeviceId(disk),
            Rc::new(sim.disk(disk.try_into().unwrap())),
            0,
            POOL,
        );
        log.await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

impl Mirror {
    async fn open(
        sim: &Sim,
        owner: Owner,
        limits: Limits,
        logs: &[u32],
    ) -> Result<(Self, Vec<Guard>), Failure> {
        let hot = HotRegions::new(limits);
        for disk in logs {
            let device = Rc::new(sim.disk((*disk).try_into().unwrap()));
            let log = ActivityLog::open(DeviceId(*disk), device, 0, POOL);
            hot.add_log(log.await.map_err(|error| error.to_string())?);
        }
        let mirror = Self {
            disks: [sim.disk(0), sim.disk(1)],
            hot,
            owner,
            flushes: Cell::new(0),
        };
        let mut recovered = Vec::new();
        for volume in VOLUMES {
            let added = mirror.hot.add_volume(volume, &devices(&[0, 1]));
            recovered.extend(added.map_err(|error| error.to_string())?);
        }
        Ok((mirror, recovered))
    }

    async fn write(&self, volume: VolumeId, first: u32, last: u32, fill: u8) -> Result<(), LogError> {
        self.write_as(0, volume, first, last, fill).await
    }

    /// One of three writers fills its sector of each of these regions.
    async fn write_as(
        &self,
        writer: usize,
        volume: VolumeId,
        first: u32,
        last: u32,
        fill: u8,
    ) -> Result<(), LogError> {
        let guard = if self.owner == Owner::WritesEarly {
            None
        } else {
            Some(self.hot.acquire(volume, first..=last, self).await?)
        };
        for region in first..=last {
            for disk in &self.disks {
                let at = place(volume, region) + (writer * SECTOR) as u64;
                let wrote = disk.write_bytes(at, &[fill; SECTOR], Durability::Volatile).await;
                wrote.unwrap();
            }
        }
        if guard.is_none() {
            drop(self.hot.acquire(volume, first..=last, self).await?);
        }
        Ok(())
    }

    async fn differing(&self) -> Result<BTreeSet<(VolumeId, u32)>, IoError> {
        let mut differing = BTreeSet::new();
        for volume in VOLUMES {
            let length = REGIONS as usize * REGION;
            let first = self.disks[0].read_bytes(place(volume, 0), length).await?;
            let second = self.disks[1].read_bytes(place(volume, 0), length).await?;
            let pairs = first.chunks(REGION).zip(second.chunks(REGION));
            let regions = (0..).zip(pairs).filter(|(_, (first, second))| first != second);
            differing.extend(regions.map(|(region, _)| (volume, region)));
        }
        Ok(differing)
    }
}

fn named(guards: &[Guard]) -> BTreeSet<(VolumeId, u32)> {
    let region = |guard: &Guard| (guard.volume(), *guard.regions().start());
    guards.iter().map(region).collect()
}

/// Opens with these logs, and compares the disks with what they say.
async fn check(
    sim: &Sim,
    owner: Owner,
    limits: Limits,
    logs: &[u32],
) -> Result<(Mirror, Vec<Guard>), Failure> {
    let (mirror, recovered) = Mirror::open(sim, owner, limits, logs).await?;
    let differing = mirror.differing().await?;
    let named = named(&recovered);
    if let Some((volume, region)) = differing.difference(&named).next() {
        return Err(format!("region {region} of {volume:?} differs, and logs {logs:?} do not say so").into());
    }
    Ok((mirror, recovered))
}

/// Copies every region that the logs name, and cleans up.
async fn resync(mirror: &Mirror, recovered: Vec<Guard>) -> Result<(), Failure> {
    for guard in recovered {
        let place = place(guard.volume(), *guard.regions().start());
        let bytes = mirror.disks[0].read_bytes(place, REGION).await?;
        mirror.disks[1]
            .write_bytes(place, &bytes, Durability::Volatile)
            .await?;
    }
    for _ in 0..2 {
        let cleaned = mirror.hot.clean_idle(mirror).await;
        cleaned.map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Script {
    /// Groups of two volumes, more regions than places, and a sweep.
    Writes,
    /// The log moves from both disks to one, and back.
    MovesLogs,
}

struct Case {
    owner: Owner,
    script: Script,
    limits: Limits,
}

impl Scenario for Case {
    type Model = ();

    fn world(&self) -> World {
        let disk = |name| DiskOptions::with_sector(name, 1 << 30, 4096);
        World::new([disk("left"), disk("right")])
    }

    async fn prepare(&self, sim: Sim, _: Shared<()>) -> Result<(), Failure> {
        format(&sim).await
    }

    async fn run(&self, sim: Sim, _: Shared<()>) -> Result<(), Failure> {
        let (mirror, _) = Mirror::open(&sim, self.owner, self.limits, &[0, 1]).await?;
        let [small, large] = VOLUMES;
        match self.script {
            Script::Writes => {
                let group = together(vec![
                    Box::pin(mirror.write(small, 0, 0, 1)),
                    Box::pin(mirror.write(large, 1, 1, 2)),
                ]);
                succeeded(group.await)?;
                // There are two places.
                succeeded(vec![mirror.write(large, 2, 2, 3).await])?;
                succeeded(vec![mirror.write(small, 0, 0, 4).await])?;
            }
            Script::MovesLogs => {
                succeeded(vec![mirror.write(small, 0, 0, 1).await])?;
                let right = devices(&[1]);
                let right = mirror.hot.set_log_devices(small, &right, &mirror);
                let group = together(vec![Box::pin(right), Box::pin(mirror.write(small, 1, 1, 2))]);
                succeeded(group.await)?;
                // Nobody asks the left log for this volume while it is not named.
                let both = devices(&[0, 1]);
                let both = mirror.hot.set_log_devices(small, &both, &mirror);
                let group = together(vec![Box::pin(both), Box::pin(mirror.write(small, 2, 2, 3))]);
                succeeded(group.await)?;
            }
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, _: Shared<()>) -> Result<(), Failure> {
        if matches!(self.script, Script::Writes) {
            check(&sim, self.owner, self.limits, &[0]).await?;
        }
        check(&sim, self.owner, self.limits, &[1]).await?;
        let (mirror, recovered) = check(&sim, self.owner, self.limits, &[0, 1]).await?;
        resync(&mirror, recovered).await?;
        let (mirror, recovered) = check(&sim, Owner::Right, self.limits, &[0, 1]).await?;
        if !recovered.is_empty() || !mirror.differing().await?.is_empty() {
            return Err("regions are hot after a resync".into());
        }
        Ok(())
    }
}

fn succeeded(results: Vec<Result<(), LogError>>) -> Result<(), Failure> {
    results
        .into_iter()
        .collect::<Result<(), _>>()
        .map_err(|error| error.to_string().into())
}

const SMALL: Limits = Limits {
    regions: 2,
    new_regions: 2,
    evicted: 1,
};

/// Many crashes of the script.
const WIDE: ExploreOptions = ExploreOptions {
    states: 24,
    nesting: 0,
    nested_states: 1,
    nested_one_in: 1,
    schedules: 2,
};

/// Fewer, and crashes in recovery.
const DEEP: ExploreOptions = ExploreOptions {
    states: 2,
    nesting: 1,
    nested_states: 1,
    nested_one_in: 1,
    schedules: 1,
};

#[test]
fn every_region_that_differs_after_a_crash_is_named_by_each_log() {
    let case = Case {
        owner: Owner::Right,
        script: Script::Writes,
        limits: SMALL,
    };
    let numbers = explore(&case, &WIDE).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 300, "{numbers}");
    let wanted = [
        "activity log: torn transaction refused",
        "hot regions: oldest ones leave",
    ];
    assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
    let numbers = explore(&case, &DEEP).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.nested_states > 500, "{numbers}");
}

#[test]
fn a_log_moves_to_other_devices_between_writes() {
    let case = Case {
        owner: Owner::Right,
        script: Script::MovesLogs,
        limits: Limits::default(),
    };
    let numbers = explore(&case, &WIDE).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 300, "{numbers}");
}

#[track_caller]
fn is_found(owner: Owner) {
    let case = Case {
        owner,
        script: Script::Writes,
        limits: SMALL,
    };
    let failure = explore(&case, &WIDE).unwrap_err();
    assert!(failure.message.contains("differs, and logs"), "{failure}");
}

#[test]
fn an_owner_who_does_not_flush_before_regions_leave_is_found() {
    is_found(Owner::ReleasesWithoutFlush);
}

#[test]
fn a_write_before_the_log_is_durable_is_found() {
    is_found(Owner::WritesEarly);
}

/// A step of a long history.
#[derive(Debug, Clone)]
enum Step {
    Write {
        volume: usize,
        first: u32,
        count: u32,
        fill: u8,
    },
    Clean,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
}

/// Several writers, small limits, torn transactions in sectors of 512 bytes.
struct History;

impl Workload for History {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let step = |rng: &mut Rng| match rng.below(16) {
            0 | 1 => Step::Crash {
                after: 20 + rng.below(100),
            },
            2 => Step::Clean,
            _ => {
                let count = 1 + u32::from(rng.chance(1, 4));
                Step::Write {
                    volume: rng.index(2),
                    first: u32::try_from(rng.below(u64::from(REGIONS - 1))).unwrap(),
                    count,
                    fill: u8::try_from(1 + rng.below(255)).unwrap(),
                }
            }
        };
        (0..60).map(|_| step(rng)).collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let disk = |name| DiskOptions::new(name, 1 << 30);
        let mut world = World::new([disk("left"), disk("right")]);
        let limits = Limits {
            regions: 3 + rng.index(3),
            new_regions: 2 + rng.index(2),
            evicted: 1 + rng.index(2),
        };
        let formatted = world.run(&RunOptions::in_order(), async |sim| format(&sim).await)?;
        formatted.ended.done().unwrap_or(Ok(()))?;
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. })) {
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, async |sim| power_on(&sim, limits, part).await)?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
        }
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            power_on(&sim, limits, &[]).await
        })?;
        ran.ended.done().unwrap_or(Ok(()))
    }
}

/// Checks with each log, resyncs, then three clients share the steps.
async fn power_on(sim: &Sim, limits: Limits, steps: &[Step]) -> Result<(), Failure> {
    for logs in [&[0][..], &[1]] {
        check(sim, Owner::Right, limits, logs).await?;
    }
    let (mirror, recovered) = check(sim, Owner::Right, limits, &[0, 1]).await?;
    let mirror = &mirror;
    resync(mirror, recovered).await?;
    let client = |number: usize| async move {
        for step in steps.iter().skip(number).step_by(3) {
            match *step {
                Step::Write {
                    volume,
                    first,
                    count,
                    fill,
                } => {
                    let last = first + count - 1;
                    mirror
                        .write_as(number, VOLUMES[volume], first, last, fill)
                        .await?;
                }
                Step::Clean => drop(mirror.hot.clean_idle(mirror).await?),
                Step::Crash { .. } => {}
            }
        }
        Ok(())
    };
    let (first, second, third) = (client(0), client(1), client(2));
    succeeded(together(vec![Box::pin(first), Box::pin(second), Box::pin(third)]).await)
}

#[test]
fn long_histories_of_three_writers_with_crashes() {
    let options = SwarmOptions {
        seed: 3,
        histories: 300,
    };
    let numbers = swarm(&History, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    let wanted = [
        "activity log: torn transaction refused",
        "hot regions: oldest ones leave",
        "hot regions: all in use",
        "hot regions: too many new ones for one transaction",
    ];
    assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
}

#[test]
fn a_log_that_fails_is_reported_until_the_owner_takes_it_out() {
    let disk = |name| DiskOptions::new(name, 1 << 30);
    let mut world = World::new([disk("left"), disk("right")]);
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        format(&sim).await?;
        let (mirror, _) = Mirror::open(&sim, Owner::Right, Limits::default(), &[0, 1]).await?;
        let volume = VOLUMES[0];
        succeeded(vec![mirror.write(volume, 0, 0, 1).await])?;
        let error = FaultRule::once(Fault::Error, Operation::Write).within(0..RING);
        sim.inject(1, error);
        for region in [1, 0] {
            // Also the region that was hot before.
            let failed = mirror.write(volume, region, region, 2).await.unwrap_err();
            assert!(
                matches!(
                    failed,
                    LogError::Device {
                        device: DeviceId(1),
                        ..
                    }
                ),
                "{failed}"
            );
        }
        let left = devices(&[0]);
        let left = mirror.hot.set_log_devices(volume, &left, &mirror);
        succeeded(vec![left.await])?;
        mirror.hot.remove_log(DeviceId(1));
        succeeded(vec![mirror.write(volume, 3, 3, 2).await])?;
        assert_eq!(mirror.hot.regions(volume), [0, 1, 3]);
        assert!(mirror.hot.try_acquire(volume, 3..=3).is_some());
        let none = mirror.write(VolumeId(99), 0, 0, 1).await.unwrap_err();
        assert!(matches!(none, LogError::NoLog { .. }), "{none}");
        let wide = mirror.write(volume, 0, 64, 1).await.unwrap_err();
        assert!(matches!(wide, LogError::TooWide { regions: 65, .. }), "{wide}");
        Ok::<(), Failure>(())
    });
    ran.unwrap().ended.done().unwrap().unwrap();
}

#[test]
fn failed_writes_do_not_use_up_the_good_transactions() {
    let mut world = World::new([
        DiskOptions::new("left", 1 << 30),
        DiskOptions::new("right", 1 << 30),
    ]);
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        format(&sim).await?;
        let volume = VOLUMES[0];
        let (mirror, _) = Mirror::open(&sim, Owner::Right, Limits::default(), &[0, 1]).await?;
        succeeded(vec![mirror.write(volume, 0, 0, 1).await])?;
        sim.inject(
            1,
            FaultRule::always(Fault::Error, Operation::Write).within(0..RING),
        );
        for _ in 0..20 {
            assert!(mirror.write(volume, 1, 1, 1).await.is_err());
            mirror.hot.remove_log(DeviceId(1));
            let log = ActivityLog::open(DeviceId(1), Rc::new(sim.disk(1)), 0, POOL).await;
            mirror.hot.add_log(log.map_err(|error| error.to_string())?);
            assert!(
                mirror
                    .hot
                    .set_log_devices(volume, &devices(&[0, 1]), &mirror)
                    .await
                    .is_err()
            );
        }
        let (mirror, recovered) = Mirror::open(&sim, Owner::Right, Limits::default(), &[1]).await?;
        assert!(named(&recovered).contains(&(volume, 0)));
        drop(mirror);
        Ok::<(), Failure>(())
    });
    ran.unwrap().ended.done().unwrap().unwrap();
}

#[test]
fn a_ring_of_another_pool_and_a_blank_one_are_not_taken() {
    let mut world = World::new([DiskOptions::new("left", 1 << 30)]);
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        let disk = Rc::new(sim.disk(0));
        let blank = ActivityLog::open(DeviceId(0), Rc::clone(&disk), 0, POOL).await;
        assert!(matches!(blank, Err(LogError::NoTransaction { .. })));
        let other = ActivityLog::format(DeviceId(0), Rc::clone(&disk), 0, Uuid(5)).await;
        assert!(other.is_ok());
        let foreign = ActivityLog::open(DeviceId(0), Rc::clone(&disk), 0, POOL).await;
        assert!(matches!(foreign, Err(LogError::NoTransaction { .. })));
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Read));
        let unreadable = ActivityLog::open(DeviceId(0), disk, 0, Uuid(5)).await;
        assert!(matches!(unreadable, Err(LogError::Device { .. })));
    });
    ran.unwrap();
}
