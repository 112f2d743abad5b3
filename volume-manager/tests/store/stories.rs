//! Single stories, one per thing that can be wrong with devices.

use block_io::sim::{RunOptions, Sim, World};
use volume_manager::store::{CommitError, Force, OpenError, Standing};

use crate::pool::{begin, choose, commit, create, id, make_faulty, marked, open, standing, world};

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
