//! Load: who has how much of it, moving it, and reads that the first answer of two legs ends.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Ended, Failure, FaultPlan, FaultRates, RunOptions, Sim, World};
use block_io::{BlockDevice, Clock, Durability};
use volume_manager::model::{DeviceId, JobId, JobKind, JobState, Layout, ReadPolicy};
use volume_manager::{NewVolume, Volume};

use crate::harness::{
    self, Model, SimPool, UNIT, check, create, failed, flush, new_volume, open, read_bytes, settle, verify,
    write,
};

const SIZE: u64 = 64 * UNIT;

fn run(world: &mut World, options: &RunOptions, work: impl AsyncFnOnce(Sim) -> Result<(), Failure>) -> bool {
    let ran = world
        .run(options, |sim| work(sim))
        .unwrap_or_else(|failure| panic!("{failure}"));
    match ran.ended {
        Ended::Done(Ok(())) => false,
        Ended::Done(Err(failure)) => panic!("{failure}"),
        Ended::Crashed => true,
    }
}

fn named(name: &str, number: u128, layout: Layout) -> NewVolume {
    NewVolume {
        name: name.into(),
        uuid: volume_manager::model::Uuid(number),
        ..new_volume(layout, SIZE)
    }
}

/// Reads without a pause until it is told to stop.
fn load(sim: &Sim, pool: &SimPool, name: &str, stop: &Rc<Cell<bool>>) -> Result<(), Failure> {
    let (volume, stop) = (pool.volume(name).map_err(failed)?, Rc::clone(stop));
    sim.spawn("load", async move {
        let mut at = 0;
        while !stop.get() && read_bytes(&volume, at, 4096).await.is_ok() {
            at = (at + UNIT) % SIZE;
        }
    });
    Ok(())
}

fn device_of(pool: &SimPool, name: &str) -> DeviceId {
    let config = pool.configuration();
    let volume = config.volumes.iter().find(|volume| volume.name == name).unwrap();
    volume.sections[0].columns[0].members[0].extents[0].device
}

/// Volumes `a`, `b` and `c`, all on the first device.
async fn crowded(sim: &Sim, model: &Model) -> Result<SimPool, Failure> {
    let pool = create(sim, model, 4).await?;
    for (number, name) in (1..).zip(["a", "b", "c"]) {
        drop(
            pool.create_volume(named(name, number, Layout::Concat))
                .await
                .map_err(failed)?,
        );
        let volume = pool.configuration().volumes.last().unwrap().id;
        let (from, to) = (Some(device_of(&pool, name)), Some(DeviceId(0)));
        if from != to {
            let job = pool
                .start(JobKind::Move { volume, from, to }, 0)
                .await
                .map_err(failed)?;
            pool.wait(job).await.map_err(failed)?;
        }
    }
    Ok(pool)
}

async fn tune(pool: &SimPool) -> Result<JobId, Failure> {
    pool.start(JobKind::AutoTune { window: 200 }, 0)
        .await
        .map_err(failed)
}

fn moves(pool: &SimPool, after: JobId) -> usize {
    let jobs = pool.jobs();
    jobs.iter()
        .filter(|job| job.id > after && matches!(job.kind, JobKind::Move { .. }))
        .count()
}

#[test]
fn load_is_moved_off_a_crowded_device_until_it_is_spread_and_then_stays() {
    run(&mut harness::world(4), &RunOptions::in_order(), async |sim| {
        let pool = crowded(&sim, &Model::default()).await?;
        let idle = tune(&pool).await?;
        pool.wait(idle).await.map_err(failed)?;
        assert_eq!(moves(&pool, idle), 0, "nothing is moved where nothing has load");
        let stop = Rc::new(Cell::new(false));
        for name in ["a", "b", "c"] {
            load(&sim, &pool, name, &stop)?;
        }
        let before = pool.sample();
        sim.clock().sleep(Duration::from_millis(500)).await;
        let spots = pool.sample().since(&before);
        let hot = &spots.devices[0];
        assert_eq!((hot.device, hot.legs.len()), (DeviceId(0), 3), "{spots:?}");
        assert!(hot.busy > 900 && hot.depth > 2000, "{hot:?}");
        assert!(spots.devices[1].busy == 0, "{spots:?}");
        let all: u32 = hot.legs.iter().map(|leg| leg.share).sum();
        assert!((990..=1000).contains(&all), "{hot:?}");
        assert!(hot.statistics.reads.latency.percentile(99) > Duration::ZERO);

        let first = tune(&pool).await?;
        pool.wait(first).await.map_err(failed)?;
        let devices = ["a", "b", "c"].map(|name| device_of(&pool, name));
        assert!(
            devices[0] != devices[1] && devices[1] != devices[2] && devices[0] != devices[2],
            "{devices:?}"
        );
        assert_eq!(moves(&pool, first), 2);
        let second = tune(&pool).await?;
        pool.wait(second).await.map_err(failed)?;
        assert_eq!(moves(&pool, second), 0, "what is balanced stays");
        stop.set(true);
        sim.clock().sleep(Duration::from_millis(10)).await;
        pool.close().await.map_err(failed)
    });
}

#[test]
fn two_copies_never_come_to_lie_on_one_device() {
    run(&mut harness::world(2), &RunOptions::in_order(), async |sim| {
        let pool = create(&sim, &Model::default(), 2).await?;
        drop(
            pool.create_volume(named("a", 1, Layout::Mirror { legs: 2 }))
                .await
                .map_err(failed)?,
        );
        let stop = Rc::new(Cell::new(false));
        load(&sim, &pool, "a", &stop)?;
        let job = tune(&pool).await?;
        pool.wait(job).await.map_err(failed)?;
        assert_eq!(moves(&pool, job), 0);
        stop.set(true);
        sim.clock().sleep(Duration::from_millis(10)).await;
        pool.close().await.map_err(failed)
    });
}

#[test]
fn tuning_is_cancelled_and_goes_on_after_a_crash() {
    let (mut world, model) = (harness::world(4), Model::default());
    run(&mut world, &RunOptions::in_order(), async |sim| {
        let pool = crowded(&sim, &model).await?;
        let job = tune(&pool).await?;
        assert!(
            pool.start(JobKind::AutoTune { window: 1 }, 0).await.is_err(),
            "one at a time"
        );
        pool.steer(job, JobState::Cancelled).await.map_err(failed)?;
        assert!(pool.wait(job).await.is_err());
        assert_eq!(pool.job(job).unwrap().state, JobState::Cancelled);
        pool.close().await.map_err(failed)
    });
    world.settle();
    let crashed = run(
        &mut world,
        &RunOptions::in_order().crash_after(4000),
        async |sim| {
            let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
            let stop = Rc::new(Cell::new(false));
            for name in ["a", "b", "c"] {
                load(&sim, &pool, name, &stop)?;
            }
            tune(&pool).await?;
            sim.clock().sleep(Duration::from_secs(3600)).await;
            Ok(())
        },
    );
    assert!(crashed);
    world.settle();
    run(&mut world, &RunOptions::in_order(), async |sim| {
        let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
        let job = pool
            .jobs()
            .into_iter()
            .rfind(|job| matches!(job.kind, JobKind::AutoTune { .. }))
            .unwrap();
        assert!(job.is_live(), "{job:?}");
        settle(&pool).await?;
        volume_manager::place::verify(&pool.configuration()).unwrap();
        pool.close().await.map_err(failed)
    });
}

#[test]
fn the_first_answer_of_two_legs_is_the_right_one_whatever_the_other_does() {
    for seed in 0..12 {
        let mut world = harness::world(3);
        world.faults = FaultPlan::default();
        let model = Model::default();
        run(&mut world, &RunOptions::random(seed), async |sim| {
            let pool = create(&sim, &model, 3).await?;
            let mut new = new_volume(Layout::Mirror { legs: 2 }, SIZE);
            new.read_policy = ReadPolicy::FirstAnswer;
            drop(pool.create_volume(new).await.map_err(failed)?);
            pool.close().await.map_err(failed)
        });
        world.settle();
        // Requests are slow now and then.
        world.faults.rates = FaultRates {
            slow: 5000,
            ..FaultRates::default()
        };
        run(&mut world, &RunOptions::random(seed + 100), async |sim| {
            let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
            let volume = pool.volume("v").map_err(failed)?;
            assert_eq!(
                pool.configuration().volumes[0].read_policy,
                ReadPolicy::FirstAnswer
            );
            let before = pool.device_statistics();
            work(&volume, &model, 1).await?;
            // The slower ones are on their way still.
            sim.clock().sleep(Duration::from_secs(1)).await;
            let twice = reads(&pool) - before.iter().map(|(_, device)| device.reads.bytes).sum::<u64>();
            assert!(twice > SIZE * 3 / 2, "{twice} bytes were read");
            let leg = device_of(&pool, "v");
            sim.detach(usize::try_from(leg.0).unwrap());
            work(&volume, &model, 2).await?;
            sim.attach(usize::try_from(leg.0).unwrap());
            pool.set_read_policy("v", ReadPolicy::Balanced)
                .await
                .map_err(failed)?;
            work(&volume, &model, 3).await?;
            pool.set_read_policy("v", ReadPolicy::FirstAnswer)
                .await
                .map_err(failed)?;
            drop(volume);
            pool.close().await.map_err(failed)
        });
        world.faults = FaultPlan::default();
        run(&mut world, &RunOptions::random(seed + 200), async |sim| {
            let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
            let volume = pool.volume("v").map_err(failed)?;
            verify(&volume, &model).await?;
            settle(&pool).await?;
            verify(&volume, &model).await?;
            drop(volume);
            pool.close().await.map_err(failed)
        });
    }
}

fn reads(pool: &SimPool) -> u64 {
    pool.device_statistics()
        .iter()
        .map(|(_, device)| device.reads.bytes)
        .sum()
}

async fn work<D: BlockDevice + 'static, C: Clock + Clone + 'static>(
    volume: &Volume<D, C>,
    model: &Model,
    fill: u8,
) -> Result<(), Failure> {
    for place in 0..8 {
        write(volume, model, place * 8 * UNIT, fill, 8192, Durability::Volatile).await?;
    }
    check(volume, model).await?;
    flush(volume, model).await
}
