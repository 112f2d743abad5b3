//! A bitmap with a copy on a disk with sectors of 512 bytes, and one on a disk with 4096: after a crash each copy says all that was
//! acknowledged and nothing that was never asked for.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::rc::Rc;

use block_io::Operation;
use block_io::sim::{
    DiskOptions, Ended, ExploreOptions, Failure, Fault, FaultRule, Rng, RunOptions, Scenario, Shared, Sim,
    SimDisk, SwarmOptions, Workload, World, explore, swarm,
};
use volume_manager::logs::bitmap::{Bitmap, length};
use volume_manager::logs::{LogCopy, LogError};
use volume_manager::model::DeviceId;

use crate::together;

const REGIONS: u32 = 40_000;
const START: u64 = 8192;

#[derive(Debug, Clone, Default)]
struct Model {
    generation: u64,
    begun: BTreeSet<u32>,
    acknowledged: BTreeSet<u32>,
}

fn world() -> World {
    let small = DiskOptions::with_sector("small sectors", 1 << 30, 512);
    World::new([small, DiskOptions::with_sector("large sectors", 1 << 30, 4096)])
}

fn copies(sim: &Sim, which: &[u32]) -> Vec<LogCopy<SimDisk>> {
    let copy = |disk: &u32| LogCopy {
        id: DeviceId(*disk),
        device: Rc::new(sim.disk((*disk).try_into().unwrap())),
        start: START,
    };
    which.iter().map(copy).collect()
}

async fn format(sim: &Sim) -> Result<Bitmap<SimDisk>, Failure> {
    let bitmap = Bitmap::format(copies(sim, &[0, 1]), length(REGIONS), REGIONS).await;
    bitmap.map_err(|error| error.to_string().into())
}

async fn load(sim: &Sim, which: &[u32], generation: u64) -> Result<Bitmap<SimDisk>, Failure> {
    let bitmap = Bitmap::load(copies(sim, which), length(REGIONS), REGIONS, generation).await;
    bitmap.map_err(|error| error.to_string().into())
}

fn regions(bitmap: &Bitmap<SimDisk>) -> BTreeSet<u32> {
    let mut regions = BTreeSet::new();
    let mut from = 0;
    while let Some(region) = bitmap.next_set(from) {
        assert!(bitmap.is_set(region));
        regions.insert(region);
        from = region + 1;
    }
    assert_eq!(regions.len() as u64, bitmap.count());
    regions
}

async fn set(bitmap: &Bitmap<SimDisk>, model: &Shared<Model>, regions: &[u32]) -> Result<(), LogError> {
    model.borrow_mut().begun.extend(regions);
    bitmap.set(regions).await?;
    model.borrow_mut().acknowledged.extend(regions);
    Ok(())
}

/// Loads every copy alone, then all, and compares.
async fn check(sim: &Sim, model: &Shared<Model>) -> Result<Bitmap<SimDisk>, Failure> {
    let Model {
        generation,
        begun,
        acknowledged,
    } = model.borrow().clone();
    for which in [&[0][..], &[1], &[0, 1]] {
        let found = regions(&load(sim, which, generation).await?);
        if let Some(region) = acknowledged.difference(&found).next() {
            return Err(format!("region {region} was acknowledged and is not on copies {which:?}").into());
        }
        if let Some(region) = found.difference(&begun).next() {
            return Err(format!("region {region} on copies {which:?} was never set").into());
        }
    }
    load(sim, &[0, 1], generation).await
}

fn begin(bitmap: &Bitmap<SimDisk>, model: &Shared<Model>) {
    let mut model = model.borrow_mut();
    model.generation += 1;
    model.begun.clear();
    model.acknowledged.clear();
    bitmap.begin(model.generation);
}

struct Sets;

impl Scenario for Sets {
    type Model = Model;

    fn world(&self) -> World {
        world()
    }

    async fn prepare(&self, sim: Sim, _: Shared<Model>) -> Result<(), Failure> {
        format(&sim).await.map(drop)
    }

    async fn run(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        let bitmap = load(&sim, &[0, 1], 0).await?;
        begin(&bitmap, &model);
        let script = async {
            // In two sectors, and in the next group one of them again.
            let group: Vec<Pin<Box<dyn Future<Output = _>>>> = vec![
                Box::pin(set(&bitmap, &model, &[1, 3967, 3968])),
                Box::pin(set(&bitmap, &model, &[2])),
                Box::pin(set(&bitmap, &model, &[2, 39_999])),
            ];
            together(group).await.into_iter().collect::<Result<(), _>>()?;
            set(&bitmap, &model, &[1, 2]).await?;
            begin(&bitmap, &model);
            set(&bitmap, &model, &[3]).await
        };
        script.await.map_err(|error: LogError| error.to_string().into())
    }

    async fn recover(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        let bitmap = check(&sim, &model).await?;
        let more = set(&bitmap, &model, &[5000]).await;
        more.map_err(|error| error.to_string())?;
        check(&sim, &model).await.map(drop)
    }
}

#[test]
fn each_copy_says_what_was_acknowledged_after_every_crash() {
    let options = ExploreOptions {
        states: 1024,
        nesting: 1,
        nested_states: 16,
        nested_one_in: 1,
        schedules: 4,
    };
    let numbers = explore(&Sets, &options).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert_eq!(numbers.sampled_points, 0, "{numbers}");
    assert!(numbers.crash_states > 300, "{numbers}");
    let wanted = ["bitmap: sector of another generation counts as zero"];
    assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
}

#[derive(Debug, Clone)]
enum Step {
    Set(Vec<u32>),
    Begin,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
}

/// Three clients set regions at once.
struct History;

impl Workload for History {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let step = |rng: &mut Rng| match rng.below(20) {
            0 => Step::Begin,
            1..4 => Step::Crash {
                after: 10 + rng.below(60),
            },
            _ => {
                let count = 1 + rng.below(5);
                let region = |rng: &mut Rng| u32::try_from(rng.below(u64::from(REGIONS))).unwrap();
                Step::Set((0..count).map(|_| region(rng)).collect())
            }
        };
        (0..60).map(|_| step(rng)).collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = world();
        let model = Shared::<Model>::default();
        let formatted = world.run(&RunOptions::in_order(), async |sim| format(&sim).await.map(drop))?;
        formatted.ended.done().unwrap_or(Ok(()))?;
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. } | Step::Begin)) {
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, async |sim| {
                let bitmap = check(&sim, &model).await?;
                let client = |number: usize| {
                    let (bitmap, model) = (&bitmap, &model);
                    async move {
                        for step in part.iter().skip(number).step_by(3) {
                            if let Step::Set(regions) = step {
                                set(bitmap, model, regions).await?;
                            }
                        }
                        Ok::<(), LogError>(())
                    }
                };
                let (first, second, third) = (client(0), client(1), client(2));
                let ended = together(vec![Box::pin(first), Box::pin(second), Box::pin(third)]).await;
                let ended: Result<(), LogError> = ended.into_iter().collect();
                ended.map_err(|error| error.to_string())?;
                if matches!(part.last(), Some(Step::Begin)) {
                    begin(&bitmap, &model);
                }
                Ok::<(), Failure>(())
            })?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
        }
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            check(&sim, &model).await.map(drop)
        })?;
        ran.ended.done().unwrap_or(Ok(()))
    }
}

#[test]
fn long_histories_of_three_clients_with_crashes() {
    let options = SwarmOptions {
        seed: 5,
        histories: 200,
    };
    let numbers = swarm(&History, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 1000, "{numbers}");
}

#[test]
fn damage_counts_as_changed_and_a_failed_copy_is_reported_until_it_is_replaced() {
    let mut world = world();
    let ran = world.run(&RunOptions::in_order(), async |sim| {
        let bitmap = format(&sim).await?;
        bitmap.begin(4);
        bitmap.set(&[10, 5000]).await.unwrap();
        assert!(matches!(
            bitmap.set(&[REGIONS]).await,
            Err(LogError::NoRegion { .. })
        ));
        sim.inject(1, FaultRule::once(Fault::Error, Operation::Write));
        for _ in 0..2 {
            let failed = bitmap.set(&[11]).await.unwrap_err();
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
        bitmap.remove_copy(DeviceId(1));
        bitmap.set(&[11]).await.unwrap();
        bitmap.add_copy(copies(&sim, &[1]).remove(0)).await.unwrap();
        bitmap.remove_copy(DeviceId(0));
        bitmap.set(&[12]).await.unwrap();
        assert_eq!(regions(&load(&sim, &[1], 4).await?), [10, 11, 12, 5000].into());
        // A flipped bit in the second small sector: all of its regions count.
        sim.with_medium(0, |medium| medium.rot(START + 600, 3));
        let damaged = load(&sim, &[0], 4).await?;
        assert_eq!(damaged.count(), 2 + 3968);
        damaged.set(&[7000]).await.unwrap();
        assert_eq!(load(&sim, &[0], 4).await?.count(), 2 + 3968);
        bitmap.remove_copy(DeviceId(1));
        assert!(matches!(bitmap.set(&[12]).await, Err(LogError::NoBitmap)));
        let short = Bitmap::load(copies(&sim, &[0]), 4096, REGIONS, 4).await;
        assert!(matches!(short, Err(LogError::BitmapTooSmall { .. })));
        Ok::<(), Failure>(())
    });
    ran.unwrap().ended.done().unwrap().unwrap();
}
