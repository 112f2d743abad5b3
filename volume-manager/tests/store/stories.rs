//! Single stories, one per thing that can be wrong with devices.

use std::rc::Rc;

use block_io::Operation;
use block_io::sim::{DiskOptions, Fault, FaultRule, RunOptions, Sim, World};
use volume_manager::model::{Configuration, Device, DeviceId, Job, JobId, JobKind, JobState, Uuid};
use volume_manager::store::{
    CommitError, Content, Force, FormatError, OpenError, Standing, format_device, inspect, scan,
};

use crate::pool::{
    POOL, add, begin, choose, commit, create, id, identity, make_faulty, marked, open, standing, world,
};

/// Runs a story to its end.
pub(crate) fn run<T, F: Future<Output = T>>(world: &mut World, story: impl FnOnce(Sim) -> F) -> T {
    let ran = world
        .run(&RunOptions::in_order(), story)
        .unwrap_or_else(|failure| panic!("{failure}"));
    ran.ended.done().unwrap()
}

#[test]
fn a_pool_is_made_changed_and_opened_again_in_any_order() {
    let mut world = world(3);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..3).await.unwrap();
        for mark in 1..=3 {
            let next = marked(&store, mark);
            commit(&mut store, &next).await.unwrap();
        }
    });
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let incarnation = 0x10 + order[0] as u128;
        run(&mut world, async |sim| {
            let mut opened = open(&sim, order, &Force::No).await.unwrap();
            assert_eq!(opened.configuration.next_job, 3);
            assert!(opened.absent.is_empty() && opened.failed.is_empty() && !opened.forced);
            let next = begin(&opened, incarnation);
            commit(&mut opened.store, &next).await.unwrap();
        });
    }
    let last = run(&mut world, async |sim| {
        choose(&sim, 0..3, &Force::No)
            .await
            .unwrap()
            .configuration()
            .clone()
    });
    assert_eq!((last.epoch, last.incarnations.len()), (7, 4));
}

#[test]
fn a_mirror_goes_on_with_one_device_and_the_lost_one_never_opens_alone() {
    let mut world = world(2);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..2).await.unwrap();
        sim.detach(1);
        let error = store.commit(&marked(&store, 1)).await.unwrap_err();
        let CommitError::NotDurable { taken: 1, failed, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(failed[0].0, id(1), "the lost device is reported");
        let mut next = marked(&store, 2);
        make_faulty(&mut next, id(1));
        commit(&mut store, &next).await.unwrap();
        sim.attach(1);

        let error = choose(&sim, [1], &Force::No).await.unwrap_err();
        assert!(matches!(error, OpenError::NoMajority { .. }), "{error}");
        let opened = open(&sim, [0], &Force::No).await.unwrap();
        assert_eq!(
            (opened.configuration.next_job, opened.absent.as_slice()),
            (2, &[id(1)][..])
        );
        let opened = open(&sim, [1, 0], &Force::No).await.unwrap();
        assert_eq!(opened.configuration.next_job, 2);
        assert_eq!(standing(&opened, 1), Some(Standing::Faulty));
    });
}

/// A change on the devices that are there, the others made faulty.
async fn change(sim: &Sim, disks: impl IntoIterator<Item = usize>, force: &Force, mark: u32) {
    let mut opened = open(sim, disks, force).await.unwrap();
    let mut next = begin(&opened, 0x1000 + u128::from(mark));
    next.next_job = mark;
    commit(&mut opened.store, &next).await.unwrap();
    for mark in [mark + 1, mark + 2] {
        let next = marked(&opened.store, mark);
        commit(&mut opened.store, &next).await.unwrap();
    }
}

#[test]
fn a_device_that_comes_back_with_old_content_is_called_stale_until_the_first_commit() {
    let mut world = world(3);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..3).await.unwrap();
        let old = sim.with_medium(2, |medium| medium.clone());
        for mark in 1..=3 {
            let next = marked(&store, mark);
            commit(&mut store, &next).await.unwrap();
        }
        sim.replace(2, old);
        for _ in 0..2 {
            // Claimed, and not gone on: it must be stale the next time, too.
            let opened = open(&sim, 0..3, &Force::No).await.unwrap();
            assert_eq!(opened.configuration.next_job, 3);
            assert_eq!(standing(&opened, 2), Some(Standing::Stale));
        }
        // It does not make a majority with another one.
        assert!(choose(&sim, [1, 2], &Force::No).await.is_err());
        change(&sim, 0..3, &Force::No, 10).await;
        let opened = open(&sim, 0..3, &Force::No).await.unwrap();
        assert_eq!(standing(&opened, 2), Some(Standing::Current));
    });
}

#[test]
fn two_histories_are_shown_and_one_of_them_is_taken_only_by_order() {
    let mut world = world(4);
    run(&mut world, async |sim| {
        create(&sim, 0..4).await.unwrap();
        assert!(open(&sim, [0, 1], &Force::No).await.is_err());
        change(&sim, [0, 1], &Force::WithoutMajority, 10).await;
        change(&sim, [2, 3], &Force::WithoutMajority, 20).await;
        let error = choose(&sim, 0..4, &Force::No).await.unwrap_err();
        let OpenError::SplitBrain(sides) = &error else {
            panic!("{error}");
        };
        assert_eq!(sides.len(), 2);
        let text = error.to_string();
        assert!(
            text.contains("disk0, disk1") && text.contains("disk2, disk3"),
            "{text}"
        );
        let error = choose(&sim, 0..4, &Force::WithoutMajority).await.unwrap_err();
        assert!(
            matches!(error, OpenError::SplitBrain(_)),
            "a majority is not the question: {error}"
        );
        let side = Force::Side(vec![identity(0), identity(1)]);
        let opened = open(&sim, 0..4, &side).await.unwrap();
        assert!(opened.forced);
        assert_eq!(opened.configuration.next_job, 12);
        assert!(
            opened.begin(Uuid(5)).incarnations.last().unwrap().forced,
            "it is recorded"
        );
        assert_eq!(standing(&opened, 2), Some(Standing::Faulty));
    });
}

#[test]
fn a_forced_opening_without_a_majority_is_recorded_and_goes_on_alone() {
    let mut world = world(3);
    run(&mut world, async |sim| {
        create(&sim, 0..3).await.unwrap();
        change(&sim, [1], &Force::WithoutMajority, 10).await;
        let opened = open(&sim, [1], &Force::No).await.unwrap();
        assert!(!opened.forced, "it has its own majority now");
        assert!(opened.configuration.incarnations.last().unwrap().forced);
        // The others know nothing that it does not.
        let opened = open(&sim, 0..3, &Force::No).await.unwrap();
        assert_eq!(opened.configuration.next_job, 12);
    });
}

#[test]
fn a_device_given_twice_and_a_copied_device_are_named() {
    let mut world = world(3);
    run(&mut world, async |sim| {
        create(&sim, 0..2).await.unwrap();
        let error = choose(&sim, [0, 1, 1], &Force::No).await.unwrap_err();
        assert!(matches!(error, OpenError::Duplicate { .. }), "{error}");
        let copy = sim.with_medium(1, |medium| medium.clone());
        sim.replace(2, copy);
        let error = choose(&sim, 0..3, &Force::No).await.unwrap_err().to_string();
        assert!(error.contains("disk1 and disk2 are the same device"), "{error}");
    });
}

#[test]
fn foreign_blank_and_damaged_devices_are_named_and_do_not_stand_in_the_way() {
    let mut world = world(4);
    run(&mut world, async |sim| {
        create(&sim, 0..1).await.unwrap();
        sim.with_medium(1, |medium| medium.poke(0x438, b"\x53\xef"));
        let disk = sim.disk(3);
        format_device(&disk, Uuid(77), Uuid(78), "other").await.unwrap();
        let devices: Vec<_> = (0..3)
            .map(|index| (format!("disk{index}"), Rc::new(sim.disk(index))))
            .collect();
        let found = scan(&devices).await;
        let problems: Vec<String> = found.problems().iter().map(ToString::to_string).collect();
        assert!(
            problems[0].contains("disk1") && problems[0].contains("ext4"),
            "{problems:?}"
        );
        assert!(
            problems[1].contains("disk2") && problems[1].contains("nothing known"),
            "{problems:?}"
        );
        assert!(found.choose(None, &Force::No).is_ok());
        let error = choose(&sim, [0, 3], &Force::No).await.unwrap_err().to_string();
        assert!(
            error.contains("several pools (other") && error.contains("tank"),
            "{error}"
        );
        let error = choose(&sim, [3], &Force::No).await.unwrap_err();
        assert!(matches!(error, OpenError::NoConfiguration(1)), "{error}");
        assert!(matches!(
            choose(&sim, [1, 2], &Force::No).await.unwrap_err(),
            OpenError::NoPool
        ));
        assert_eq!(
            inspect(&sim.disk(0)).await.unwrap(),
            Content::Pool {
                pool: POOL,
                name: "tank".into()
            }
        );
        assert_eq!(inspect(&sim.disk(2)).await.unwrap(), Content::Blank);
        sim.with_medium(0, |medium| {
            [100, (512 << 10) - 4000].map(|offset| medium.rot(offset, 3))
        });
        assert_eq!(inspect(&sim.disk(0)).await.unwrap(), Content::BadLabel);
        assert!(choose(&sim, [0], &Force::No).await.is_err());
    });
}

#[test]
fn a_damaged_copy_of_the_label_is_repaired_from_the_other_one() {
    let copy = (512 << 10) - 4096;
    for bad in [0, copy] {
        let mut world = world(1);
        run(&mut world, async |sim| {
            create(&sim, 0..1).await.unwrap();
            let read = |offset| {
                let mut bytes = vec![0; 4096];
                sim.with_medium(0, |medium| medium.peek(offset, &mut bytes));
                bytes
            };
            let good = read(bad);
            sim.with_medium(0, |medium| medium.poke(bad, &[0xff; 512]));
            open(&sim, [0], &Force::No).await.unwrap();
            assert!(read(bad) == good);
        });
    }
}

#[test]
fn bit_rot_in_every_place_of_a_slot_is_noticed_and_the_other_device_knows_better() {
    let mut world = world(2);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..2).await.unwrap();
        let next = marked(&store, 1);
        commit(&mut store, &next).await.unwrap();
    });
    // The second commit went into the second slot.
    let slot = (128 << 10) + (188 << 10);
    for offset in 0..500 {
        let mut world = world.clone();
        world.media[1].rot(slot + offset, 5);
        run(&mut world, async |sim| {
            let opened = open(&sim, 0..2, &Force::No).await.unwrap();
            assert_eq!(opened.configuration.next_job, 1, "byte {offset}");
        });
    }
}

#[test]
fn a_new_device_that_fails_when_it_is_added_does_not_stop_the_pool() {
    let mut world = world(2);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..1).await.unwrap();
        let mut next = marked(&store, 1);
        add(&sim, 1, &mut store, &mut next).await;
        sim.detach(1);
        assert!(matches!(
            store.commit(&next).await,
            Err(CommitError::NotDurable { .. })
        ));
        let next = marked(&store, 2);
        commit(&mut store, &next).await.unwrap();
        sim.attach(1);
        let opened = open(&sim, 0..2, &Force::No).await.unwrap();
        assert_eq!(opened.configuration.next_job, 2);
        assert!(
            opened.present.len() == 1,
            "the other one never became a part of it"
        );
    });
}

#[test]
fn a_holder_that_did_not_take_a_commit_must_be_faulty_in_the_next() {
    let mut world = world(3);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..3).await.unwrap();
        sim.inject(1, FaultRule::once(Fault::Error, Operation::Write));
        let committed = store.commit(&marked(&store, 1)).await.unwrap();
        assert_eq!(committed.failed[0].0, id(1));
        let error = store.commit(&marked(&store, 2)).await.unwrap_err().to_string();
        assert!(
            error.contains("device d1 cannot hold") && error.contains("must be faulty"),
            "{error}"
        );
        assert!(store.remove_device(id(1)).is_err(), "it is a holder still");
        let mut next = marked(&store, 2);
        make_faulty(&mut next, id(1));
        commit(&mut store, &next).await.unwrap();
        assert!(store.remove_device(id(1)).unwrap().is_some());
    });
}

#[test]
fn what_does_not_follow_is_refused_before_anything_is_written() {
    let mut world = world(2);
    run(&mut world, async |sim| {
        let mut store = create(&sim, 0..1).await.unwrap();
        let good = marked(&store, 1);
        let with = |change: fn(&mut Configuration)| {
            let mut next = good.clone();
            change(&mut next);
            next
        };
        let refused = [
            with(|next| next.epoch += 1),
            with(|next| next.epoch -= 1),
            with(|next| next.pool = Uuid(5)),
            with(|next| next.incarnations[0].id = Uuid(9)),
            with(|next| next.devices[0].uuid = Uuid(9)),
            with(|next| next.devices[0].size *= 2),
            with(|next| next.devices[0].data_start += 4096),
            with(|next| next.name.clear()),
            with(|next| {
                let other = Device {
                    id: DeviceId(1),
                    uuid: Uuid(6),
                    ..next.devices[0].clone()
                };
                next.devices.push(other);
                next.next_device = 2;
            }),
        ];
        let before = sim.events();
        for next in refused {
            assert!(store.commit(&next).await.is_err(), "{next:?}");
        }
        let mut large = good.clone();
        large.jobs = (0..100)
            .map(|number| Job {
                id: JobId(number),
                kind: JobKind::Scrub { volume: None },
                state: JobState::Failed("x".repeat(4000)),
                done: 0,
                total: 0,
                throttle: 0,
                priority: Default::default(),
            })
            .collect();
        large.next_job = 100;
        let error = store.commit(&large).await.unwrap_err();
        assert!(matches!(error, CommitError::TooLarge { .. }), "{error}");
        assert_eq!(sim.events(), before, "nothing was written");
        commit(&mut store, &good).await.unwrap();
        let mut opened = open(&sim, [0], &Force::No).await.unwrap();
        assert!(
            opened.store.commit(&marked(&opened.store, 5)).await.is_err(),
            "an incarnation must begin"
        );
    });
}

#[test]
fn a_device_that_is_too_small_or_read_only_is_no_device_of_a_pool() {
    let mut small = World::new([DiskOptions::new("small", (4 << 20) - 512), {
        let mut options = DiskOptions::new("fixed", 8 << 20);
        options.geometry.read_only = true;
        options
    }]);
    run(&mut small, async |sim| {
        let error = format_device(&sim.disk(0), Uuid(1), Uuid(2), "tank")
            .await
            .unwrap_err();
        assert!(matches!(error, FormatError::TooSmall(_)), "{error}");
        let error = format_device(&sim.disk(1), Uuid(1), Uuid(2), "tank")
            .await
            .unwrap_err();
        assert!(matches!(error, FormatError::ReadOnly), "{error}");
    });
}
