//! Everything that changes a volume while guests use it: the guest's data stay what they are, and copies and parity fit afterwards.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{Ended, Failure, RunOptions, Schedule, Sim};
use block_io::{Clock, Durability};
use volume_manager::model::{
    DeviceId, DeviceState, JobId, JobKind, JobState, Layout, MemberState, Priority, Uuid,
};
use volume_manager::{Event, NewDevice, NewVolume};

use crate::harness::{
    self, Model, SimPool, UNIT, attributes, create, failed, flush, new_volume, open, settle, verify, write,
};

const ALL: [Layout; 6] = [
    Layout::Concat,
    Layout::Stripe { columns: 3 },
    Layout::Mirror { legs: 2 },
    Layout::StripeMirror { columns: 2, legs: 2 },
    Layout::Raid5 { columns: 3 },
    Layout::Raid6 { columns: 5 },
];

const SIZE: u64 = 48 * UNIT;

/// A guest that writes, flushes and reads until it is told to stop.
async fn guest(
    sim: Sim,
    pool: SimPool,
    model: Model,
    stop: Rc<Cell<bool>>,
    result: Rc<Cell<Option<Result<(), Failure>>>>,
) {
    let work = async {
        let volume = pool.volume("v").map_err(failed)?;
        let mut fill = 0;
        while !stop.get() {
            fill = fill % 250 + 1;
            let (sector, count) = sim.random(|rng| (rng.below(SIZE / 512 - 40), 1 + rng.below(40)));
            let durability = if fill % 5 == 0 {
                Durability::Durable
            } else {
                Durability::Volatile
            };
            write(
                &volume,
                &model,
                sector * 512,
                fill,
                usize::try_from(count * 512).unwrap(),
                durability,
            )
            .await?;
            if fill % 7 == 0 {
                flush(&volume, &model).await?;
            }
            if fill % 3 == 0 {
                verify(&volume, &model).await?;
            }
        }
        Ok(())
    };
    let done = work.await;
    result.set(Some(done));
}

/// Makes a pool with a volume, has a guest use it, does something to it, and checks everything.
fn with_guest(
    name: &str,
    disks: usize,
    layout: Layout,
    seed: u64,
    act: impl AsyncFn(Sim, SimPool) -> Result<(), Failure>,
) {
    // One more than is in the pool at first, and another.
    let mut world = harness::world(disks as u64 + 1);
    let options = RunOptions {
        schedule: Schedule::Random,
        ..RunOptions::random(seed)
    };
    let ran = world.run(&options, |sim| {
        let act = &act;
        async move {
            let model = Model::default();
            let pool = create(&sim, &model, disks - 1).await?;
            pool.create_volume(new_volume(layout, SIZE))
                .await
                .map_err(failed)?;
            let (stop, result) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(None)));
            let guest = guest(
                sim.clone(),
                pool.clone(),
                Rc::clone(&model),
                Rc::clone(&stop),
                Rc::clone(&result),
            );
            sim.spawn("guest", guest);
            sim.clock().sleep(Duration::from_millis(20)).await;
            act(sim.clone(), pool.clone()).await?;
            sim.clock().sleep(Duration::from_millis(20)).await;
            stop.set(true);
            let ended = loop {
                match result.take() {
                    Some(ended) => break ended,
                    None => sim.clock().sleep(Duration::from_millis(1)).await,
                }
            };
            ended.map_err(|failure| failure.context("the guest"))?;
            let volume = pool.volume("v").map_err(failed)?;
            verify(&volume, &model).await?;
            settle(&pool).await?;
            no_differences(&pool).await?;
            verify(&volume, &model).await?;
            flush(&volume, &model).await?;
            drop(volume);
            volume_manager::place::verify(&pool.configuration()).map_err(|wrong| {
                let text = format!(
                    "{}: {:?} {:?}",
                    wrong.join("; "),
                    pool.configuration(),
                    pool.jobs()
                );
                Failure::from(text.as_str())
            })?;
            pool.close().await.map_err(failed)?;
            // And again from the devices.
            let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
            let volume = pool.volume("v").map_err(failed)?;
            verify(&volume, &model).await?;
            drop(volume);
            settle(&pool).await?;
            pool.close().await.map_err(failed)
        }
    });
    let ended = ran.unwrap_or_else(|failure| panic!("{name}, {layout}, seed {seed}: {failure}"));
    match ended.ended {
        Ended::Done(Ok(())) => {}
        Ended::Done(Err(failure)) => panic!("{name}, {layout}, seed {seed}: {failure}"),
        Ended::Crashed => panic!("no crash was asked for"),
    }
}

async fn no_differences(pool: &SimPool) -> Result<(), Failure> {
    pool.take_events();
    let scrub = pool
        .start(JobKind::Scrub { volume: None }, 0)
        .await
        .map_err(failed)?;
    pool.wait(scrub).await.map_err(failed)?;
    let repaired: Vec<Event> = pool
        .take_events()
        .into_iter()
        .filter(|event| matches!(event, Event::Repaired { .. }))
        .collect();
    if repaired.is_empty() {
        Ok(())
    } else {
        Err(format!("copies or parity differ: {repaired:?}").as_str().into())
    }
}

fn all_in_sync(pool: &SimPool) -> bool {
    let config = pool.configuration();
    let sections = config.volumes.iter().flat_map(|volume| &volume.sections);
    let members = sections
        .flat_map(|section| &section.columns)
        .flat_map(|column| &column.members);
    members
        .into_iter()
        .all(|member| member.state == MemberState::InSync)
}

/// Unplugs a device that the volume lies on, and waits until somebody has found out.
async fn unplug(sim: &Sim, pool: &SimPool) -> Result<DeviceId, Failure> {
    let id = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
    sim.detach(disk_of(id));
    notice(sim, pool, id).await?;
    Ok(id)
}

fn disk_of(id: DeviceId) -> usize {
    usize::try_from(id.0).unwrap()
}

async fn notice(sim: &Sim, pool: &SimPool, id: DeviceId) -> Result<(), Failure> {
    for _ in 0..1000 {
        if !pool.is_in_service(id) {
            return Ok(());
        }
        sim.clock().sleep(Duration::from_millis(1)).await;
    }
    Err(format!(
        "nobody noticed that the device is gone: {:?}",
        pool.configuration().volumes
    )
    .as_str()
    .into())
}

fn lies_on(pool: &SimPool, device: DeviceId) -> bool {
    pool.configuration()
        .extents()
        .any(|extent| extent.device == device)
}

async fn run(pool: &SimPool, kind: JobKind) -> Result<(), Failure> {
    let job = pool.start(kind, 0).await.map_err(failed)?;
    pool.wait(job).await.map_err(failed)
}

fn volume_id(pool: &SimPool) -> volume_manager::model::VolumeId {
    pool.configuration().volumes[0].id
}

#[test]
fn guests_work_on_every_layout() {
    for layout in ALL {
        for seed in 0..3 {
            with_guest("work", 7, layout, seed, async |_, _| Ok(()));
        }
    }
}

#[test]
fn a_device_fails_and_comes_back() {
    for layout in ALL.into_iter().filter(|layout| layout.tolerates() > 0) {
        for seed in 0..6 {
            with_guest("fail and return", 7, layout, seed, async move |sim, pool| {
                let id = unplug(&sim, &pool).await?;
                sim.attach(disk_of(id));
                pool.readmit(id, "again", Rc::new(sim.disk(disk_of(id))))
                    .await
                    .map_err(failed)?;
                settle(&pool).await?;
                if all_in_sync(&pool) {
                    Ok(())
                } else {
                    Err(format!(
                        "the device did not catch up: {:?}, {:?}, {:?}",
                        pool.jobs(),
                        pool.take_events(),
                        pool.configuration().volumes[0].sections
                    )
                    .as_str()
                    .into())
                }
            });
        }
    }
}

#[test]
fn a_device_that_is_back_at_the_next_open_is_filled_once() {
    let mut world = harness::world(3);
    let ran = world.run(&RunOptions::random(1), |sim| async move {
        let model = Model::default();
        let pool = create(&sim, &model, 3).await?;
        pool.create_volume(new_volume(Layout::Mirror { legs: 2 }, SIZE))
            .await
            .map_err(failed)?;
        let leg = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
        pool.close().await.map_err(failed)?;
        let pool = open(&sim, &model, |index| index != disk_of(leg))
            .await
            .map_err(failed)?;
        pool.close().await.map_err(failed)?;
        let pool = open(&sim, &model, |_| true).await.map_err(failed)?;
        settle(&pool).await?;
        sim.clock().sleep(Duration::from_millis(100)).await;
        let events = pool.take_events();
        let ended = |event: &&Event| matches!(event, Event::JobEnded { .. });
        assert_eq!(events.iter().filter(ended).count(), 1, "{events:?}");
        assert!(all_in_sync(&pool));
        pool.close().await.map_err(failed)
    });
    let ended = ran.unwrap_or_else(|failure| panic!("{failure}")).ended;
    assert!(matches!(ended, Ended::Done(Ok(()))), "{ended:?}");
}

#[test]
fn a_spare_takes_the_place_of_a_device_that_fails() {
    for layout in ALL.into_iter().filter(|layout| layout.tolerates() > 0) {
        with_guest("spare", 8, layout, 1, async move |sim, pool| {
            pool.add_device(NewDevice {
                name: "spare".into(),
                device: Rc::new(sim.disk(7)),
                uuid: Uuid(4711),
                class: String::new(),
                enclosure: String::new(),
                spare: true,
            })
            .await
            .map_err(failed)?;
            let id = unplug(&sim, &pool).await?;
            // Nobody does anything.
            for _ in 0..1000 {
                if !lies_on(&pool, id) && all_in_sync(&pool) {
                    break;
                }
                sim.clock().sleep(Duration::from_millis(10)).await;
            }
            if lies_on(&pool, id) || !all_in_sync(&pool) {
                return Err(format!(
                    "not rebuilt: {:?}, {:?}, {:?}",
                    pool.jobs(),
                    pool.take_events(),
                    pool.configuration().devices
                )
                .as_str()
                .into());
            }
            Ok(())
        });
    }
}

#[test]
fn a_device_is_evacuated_and_leaves() {
    for layout in ALL {
        with_guest("evacuate", 7, layout, 2, async move |_, pool| {
            let device = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
            run(
                &pool,
                JobKind::Evacuate {
                    device,
                    to: None,
                    remove: true,
                },
            )
            .await?;
            if pool.configuration().device(device).is_some() {
                return Err("it is still there".into());
            }
            Ok(())
        });
    }
}

/// Puts disk 7 in the place of the first device of the volume, and waits until that is done.
async fn replace(sim: &Sim, pool: &SimPool, old: DeviceId) -> Result<(), Failure> {
    let new = NewDevice {
        uuid: Uuid(4711),
        ..harness::new_device(sim, 7)
    };
    let job = pool.replace_device(old, new, 0).await.map_err(failed)?;
    let again = pool.replace_device(old, harness::new_device(sim, 8), 0).await;
    assert!(again.is_err(), "it is being replaced already");
    pool.wait(job).await.map_err(failed)?;
    let config = pool.configuration();
    let came = config.devices.iter().find(|device| device.uuid == Uuid(4711));
    match came {
        Some(came) if config.device(old).is_none() && lies_on(pool, came.id) && all_in_sync(pool) => Ok(()),
        _ => Err(format!("not replaced: {:?}", config.devices).as_str().into()),
    }
}

#[test]
fn a_device_is_replaced_while_guests_write() {
    for layout in ALL {
        for seed in 0..3 {
            with_guest("replace", 8, layout, seed, async move |sim, pool| {
                let old = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
                replace(&sim, &pool, old).await
            });
        }
    }
}

#[test]
fn a_device_that_failed_is_replaced_while_guests_write() {
    for layout in ALL.into_iter().filter(|layout| layout.tolerates() > 0) {
        for seed in 0..3 {
            with_guest("replace the failed", 8, layout, seed, async move |sim, pool| {
                let old = unplug(&sim, &pool).await?;
                replace(&sim, &pool, old).await
            });
        }
    }
}

#[test]
fn the_device_that_replaces_another_fails_and_is_replaced_itself() {
    for layout in ALL.into_iter().filter(|layout| layout.tolerates() > 0) {
        for seed in 0..4 {
            with_guest("a broken successor", 8, layout, seed, async move |sim, pool| {
                let old = pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0].device;
                let job = pool
                    .replace_device(old, harness::new_device(&sim, 7), 0)
                    .await
                    .map_err(failed)?;
                sim.clock().sleep(Duration::from_millis(seed * 3)).await;
                sim.detach(7);
                // It fails, unless it was quick enough; the guest notices nothing.
                drop(pool.wait(job).await);
                let came = pool
                    .configuration()
                    .devices
                    .last()
                    .map(|device| device.id)
                    .unwrap();
                if pool.is_in_service(came) {
                    // Nobody has noticed, as nothing of it was used.
                    drop(run(&pool, JobKind::Scrub { volume: None }).await);
                    notice(&sim, &pool, came).await?;
                }
                let job = pool
                    .replace_device(came, harness::new_device(&sim, 8), 0)
                    .await
                    .map_err(failed)?;
                pool.wait(job).await.map_err(failed)?;
                settle(&pool).await?;
                match lies_on(&pool, came) || !all_in_sync(&pool) {
                    true => Err("something is left on the broken one".into()),
                    false => Ok(()),
                }
            });
        }
    }
}

#[test]
fn devices_that_are_added_at_the_same_time_do_not_get_into_each_other_s_way() {
    for seed in 0..20 {
        with_guest(
            "two at once",
            8,
            Layout::Mirror { legs: 2 },
            seed,
            async move |sim, pool| {
                let added = Rc::new(Cell::new(0));
                // More would not be needed to get the same number twice.
                for index in [7, 8] {
                    let (pool, device, added) =
                        (pool.clone(), harness::new_device(&sim, index), Rc::clone(&added));
                    sim.spawn("add", async move {
                        pool.add_device(device).await.unwrap();
                        added.set(added.get() + 1);
                    });
                }
                while added.get() < 2 {
                    sim.clock().sleep(Duration::from_millis(1)).await;
                }
                // Each is where its number says.
                let config = pool.configuration();
                for device in config.devices.iter().rev().take(2) {
                    let (volume, to) = (volume_id(&pool), Some(device.id));
                    let from = Some(config.volumes[0].sections[0].columns[0].members[0].extents[0].device);
                    if from != to && !lies_on(&pool, device.id) {
                        let from = pool.configuration().extents().next().map(|extent| extent.device);
                        run(&pool, JobKind::Move { volume, from, to }).await?;
                    }
                }
                Ok(())
            },
        );
    }
}

#[test]
fn a_device_that_fails_while_it_is_added_is_not_in_the_pool() {
    with_guest(
        "add a broken one",
        8,
        Layout::Mirror { legs: 2 },
        0,
        async |sim, pool| {
            let before = pool.configuration().devices.len();
            sim.detach(7);
            assert!(pool.add_device(harness::new_device(&sim, 7)).await.is_err());
            sim.attach(7);
            // Nor does it stand in the way of the next, which may be itself.
            pool.add_device(harness::new_device(&sim, 7))
                .await
                .map_err(failed)?;
            match pool.configuration().devices.len() == before + 1 {
                true => Ok(()),
                false => Err("something is left of the failure".into()),
            }
        },
    );
}

#[test]
fn the_throttle_of_a_running_job_changes() {
    with_guest("throttle", 8, Layout::Mirror { legs: 2 }, 0, async |sim, pool| {
        // At this rate it takes an hour.
        let slow = pool
            .start(JobKind::Scrub { volume: None }, 256)
            .await
            .map_err(failed)?;
        sim.clock().sleep(Duration::from_millis(500)).await;
        assert!(pool.job(slow).unwrap().is_live());
        pool.set_throttle(slow, 0).await.map_err(failed)?;
        assert_eq!(pool.configuration().job(slow).unwrap().throttle, 0);
        pool.wait(slow).await.map_err(failed)?;
        assert!(pool.set_throttle(slow, 1).await.is_err(), "it has ended");
        Ok(())
    });
}

/// Starts a scrub of a volume.
async fn scrub_of(pool: &SimPool, name: &str) -> Result<JobId, Failure> {
    let config = pool.configuration();
    let volume = config.volumes.iter().find(|volume| volume.name == name);
    let volume = volume.map(|volume| volume.id);
    pool.start(JobKind::Scrub { volume }, 0).await.map_err(failed)
}

#[test]
fn jobs_that_wait_begin_in_the_order_of_their_priorities_and_numbers() {
    with_guest("turns", 8, Layout::Mirror { legs: 2 }, 0, async |sim, pool| {
        // Holds the volume: at this rate it takes an hour.
        let first = pool
            .start(JobKind::Scrub { volume: None }, 256)
            .await
            .map_err(failed)?;
        sim.clock().sleep(Duration::from_millis(200)).await;
        let mut waiting = Vec::new();
        for priority in [Priority::Low, Priority::Normal, Priority::Normal, Priority::High] {
            let job = scrub_of(&pool, "v").await?;
            pool.set_priority(job, priority).await.map_err(failed)?;
            waiting.push(job);
        }
        sim.clock().sleep(Duration::from_millis(200)).await;
        assert_eq!(pool.job(waiting[3]).unwrap().done, 0, "what has begun goes on");
        pool.set_throttle(first, 0).await.map_err(failed)?;
        let mut ended: Vec<JobId> = Vec::new();
        while ended.len() < 4 {
            let over = |job: &&JobId| !pool.job(**job).unwrap().is_live() && !ended.contains(job);
            let over: Vec<JobId> = waiting.iter().filter(over).copied().collect();
            ended.extend(over);
            sim.clock().sleep(Duration::from_micros(100)).await;
        }
        assert_eq!(ended, [waiting[3], waiting[1], waiting[2], waiting[0]]);
        assert!(pool.jobs().iter().all(|job| job.priority == Priority::Normal));
        assert!(
            pool.set_priority(first, Priority::High).await.is_err(),
            "it has ended"
        );
        Ok(())
    });
}

#[test]
fn a_job_leaves_time_to_those_above_it_as_long_as_they_are_at_work() {
    with_guest("shares", 8, Layout::Mirror { legs: 2 }, 0, async |sim, pool| {
        // Of many small pieces.
        for name in ["w", "x"] {
            let volume = NewVolume {
                name: name.to_owned(),
                ..new_volume(Layout::StripeMirror { columns: 2, legs: 2 }, 1024 * UNIT)
            };
            pool.create_volume(volume).await.map_err(failed)?;
        }
        // How much of one job is done when another one ends that has so much priority.
        let race = async |priority: Priority| {
            let (one, other) = (scrub_of(&pool, "w").await?, scrub_of(&pool, "x").await?);
            pool.set_priority(one, Priority::Low).await.map_err(failed)?;
            pool.set_priority(other, priority).await.map_err(failed)?;
            pool.wait(other).await.map_err(failed)?;
            let left = pool.job(one).unwrap();
            pool.wait(one).await.map_err(failed)?;
            Ok::<_, Failure>((left.done, left.total))
        };
        let (done, total) = race(Priority::Low).await?;
        assert!(done * 2 > total, "equals get on alike: {done} of {total}");
        let (done, total) = race(Priority::Normal).await?;
        assert!(done * 2 < total, "one is above: {done} of {total}");
        let (high, total) = race(Priority::High).await?;
        assert!(high * 4 < total && high <= done, "two above: {high} of {total}");

        // Nothing is left to one that waits by itself.
        let throttled = pool
            .start(JobKind::Scrub { volume: None }, 256)
            .await
            .map_err(failed)?;
        pool.set_priority(throttled, Priority::High)
            .await
            .map_err(failed)?;
        let tuning = pool
            .start(JobKind::AutoTune { window: 100 }, 0)
            .await
            .map_err(failed)?;
        pool.set_priority(tuning, Priority::High).await.map_err(failed)?;
        let begin = sim.clock().now();
        pool.steer(throttled, JobState::Paused).await.map_err(failed)?;
        let low = scrub_of(&pool, "v").await?;
        pool.set_priority(low, Priority::Low).await.map_err(failed)?;
        pool.wait(low).await.map_err(failed)?;
        assert!(sim.clock().now() - begin < Duration::from_secs(5));
        pool.set_throttle(throttled, 0).await.map_err(failed)?;
        pool.steer(throttled, JobState::Running).await.map_err(failed)?;
        pool.wait(throttled).await.map_err(failed)?;
        pool.wait(tuning).await.map_err(failed)
    });
}

#[test]
fn every_layout_becomes_every_other() {
    for from in ALL {
        for to in ALL.into_iter().filter(|to| *to != from) {
            with_guest("relayout", 8, from, 3, async move |_, pool| {
                run(
                    &pool,
                    JobKind::Relayout {
                        volume: volume_id(&pool),
                        target: attributes(to),
                    },
                )
                .await?;
                let config = pool.configuration();
                let section = &config.volumes[0].sections[0];
                if section.columns.len() != to.columns() as usize || section.parity != to.parity() {
                    return Err(format!("{from} did not become {to}: {section:?}").as_str().into());
                }
                Ok(())
            });
        }
    }
}

#[test]
fn a_volume_grows_and_shrinks() {
    for layout in ALL {
        with_guest("resize", 7, layout, 4, async move |_, pool| {
            pool.resize("v", SIZE + 10 * UNIT, SIZE).await.map_err(failed)?;
            let volume = pool.volume("v").map_err(failed)?;
            let new = harness::read_bytes(&volume, SIZE, usize::try_from(10 * UNIT).unwrap())
                .await
                .map_err(failed)?;
            if new.iter().any(|byte| *byte != 0) {
                return Err("what is new is not zero".into());
            }
            drop(volume);
            let refused = pool.resize("v", SIZE - UNIT, SIZE).await;
            if refused.is_ok() {
                return Err("it shrank below what is used".into());
            }
            pool.resize("v", SIZE, SIZE).await.map_err(failed)
        });
    }
}

#[test]
fn a_device_that_fails_takes_nothing_along_whatever_is_under_way() {
    for layout in [Layout::Mirror { legs: 2 }, Layout::Raid5 { columns: 3 }] {
        for victim in 0..4 {
            with_guest(
                "fail under relayout",
                8,
                layout,
                5 + victim,
                async move |sim, pool| {
                    let target = attributes(Layout::StripeMirror { columns: 2, legs: 2 });
                    let job = pool
                        .start(
                            JobKind::Relayout {
                                volume: volume_id(&pool),
                                target,
                            },
                            0,
                        )
                        .await
                        .map_err(failed)?;
                    sim.clock().sleep(Duration::from_millis(5)).await;
                    let devices: Vec<DeviceId> = pool
                        .configuration()
                        .extents()
                        .map(|extent| extent.device)
                        .collect();
                    let id = devices[usize::try_from(victim).unwrap() % devices.len()];
                    sim.detach(disk_of(id));
                    // Done, or refused with a reason: never wrong data.
                    let _ = pool.wait(job).await;
                    sim.attach(disk_of(id));
                    let faulty = pool
                        .configuration()
                        .device(id)
                        .is_some_and(|device| matches!(device.state, DeviceState::Faulty { .. }));
                    if faulty {
                        pool.readmit(id, "again", Rc::new(sim.disk(disk_of(id))))
                            .await
                            .map_err(failed)?;
                    }
                    pool.heal().await.map_err(failed)?;
                    settle(&pool).await
                },
            );
        }
    }
}

#[test]
fn legs_come_and_go_without_moving_data() {
    let cases = [
        (Layout::Mirror { legs: 2 }, Layout::Mirror { legs: 3 }),
        (Layout::Mirror { legs: 3 }, Layout::Mirror { legs: 2 }),
        (Layout::Concat, Layout::Mirror { legs: 2 }),
        (
            Layout::Stripe { columns: 2 },
            Layout::StripeMirror { columns: 2, legs: 2 },
        ),
        (
            Layout::StripeMirror { columns: 2, legs: 2 },
            Layout::Stripe { columns: 2 },
        ),
    ];
    for (from, to) in cases {
        with_guest("legs", 7, from, 6, async move |_, pool| {
            let first =
                |pool: &SimPool| pool.configuration().volumes[0].sections[0].columns[0].members[0].extents[0];
            let before = first(&pool);
            let volume = volume_id(&pool);
            run(
                &pool,
                JobKind::Relayout {
                    volume,
                    target: attributes(to),
                },
            )
            .await?;
            let config = pool.configuration();
            let columns = &config.volumes[0].sections[0].columns;
            let right = columns.len() == to.columns() as usize
                && columns
                    .iter()
                    .all(|column| column.members.len() == to.legs() as usize);
            if !right || first(&pool) != before {
                return Err(format!("{from} did not become {to} in its place: {columns:?}")
                    .as_str()
                    .into());
            }
            Ok(())
        });
    }
}
