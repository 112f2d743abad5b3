//! The exhaustive level finds every one of the sample's errors and none in the right one.

use block_io::sim::{ExploreOptions, Failure, Numbers, explore, explore_parallel};

use crate::superblock::{Build, Updates};

fn options(nesting: u32) -> ExploreOptions {
    ExploreOptions {
        nesting,
        nested_states: 64,
        schedules: 3,
        ..ExploreOptions::default()
    }
}

fn updates(build: Build, once: bool) -> Updates {
    Updates {
        build,
        count: 3,
        once,
    }
}

fn explore_build(build: Build, nesting: u32) -> Result<Numbers, Failure> {
    explore(&updates(build, false), &options(nesting))
}

#[track_caller]
fn finds(build: Build, message: &str) {
    let failure = explore_build(build, 1).unwrap_err();
    assert!(failure.message.contains(message), "{failure}");
    assert!(failure.message.contains("crash after event"), "{failure}");
    assert!(
        failure.trace.iter().any(|line| line.contains("write 1024 bytes")),
        "{failure}"
    );
}

#[test]
fn the_right_superblock_survives_every_crash_and_crashes_in_recovery() {
    let numbers = explore_build(Build::Right, 2).unwrap();
    println!("{numbers}");
    assert!(
        numbers.crash_states > 100 && numbers.nested_states > 50,
        "{numbers}"
    );
    assert_eq!(numbers.sampled_points, 0, "{numbers}");
    let wanted = [
        "superblock: torn slot refused",
        "superblock: an update that was not acknowledged survives",
    ];
    assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
    assert_eq!(numbers.missing(&["never there"]), ["never there"]);
}

#[test]
fn a_missing_flush_is_found() {
    finds(Build::NoFlush, "promised was");
}

#[test]
fn a_single_slot_is_found() {
    finds(Build::SingleSlot, "no valid slot");
}

#[test]
fn a_missing_checksum_is_found() {
    finds(Build::NoChecksum, "has two values");
}

#[test]
fn an_error_in_recovery_is_found_only_by_crashes_in_recovery() {
    assert!(explore_build(Build::RecoversInPlace, 0).is_ok());
    finds(Build::RecoversInPlace, "no valid slot");
}

#[test]
fn exploring_twice_gives_the_same_numbers() {
    assert_eq!(explore_build(Build::Right, 1), explore_build(Build::Right, 1));
}

#[test]
fn any_number_of_threads_finds_the_same() {
    for once in [false, true] {
        for build in [
            Build::Right,
            Build::NoFlush,
            Build::NoChecksum,
            Build::RecoversInPlace,
        ] {
            let updates = updates(build, once);
            let alone = explore(&updates, &options(2));
            assert_eq!(alone.is_ok(), build == Build::Right);
            for threads in [1, 2, 3, 7] {
                assert_eq!(
                    explore_parallel(&updates, &options(2), threads),
                    alone,
                    "{threads}"
                );
            }
        }
    }
}

#[test]
fn equal_states_are_tried_once_and_every_error_is_still_found() {
    let each = explore(&updates(Build::Right, false), &options(2)).unwrap();
    let once = explore(&updates(Build::Right, true), &options(2)).unwrap();
    println!("{each}\n{once}");
    assert_eq!(each.equal_states, 0);
    assert!(once.equal_states > 0 && once.crash_states < each.crash_states / 2);
    assert_eq!(
        (once.histories, once.marks.len()),
        (each.histories, each.marks.len())
    );
    for build in [
        Build::NoFlush,
        Build::SingleSlot,
        Build::NoChecksum,
        Build::RecoversInPlace,
    ] {
        let each = explore(&updates(build, false), &options(1)).unwrap_err();
        let once = explore(&updates(build, true), &options(1)).unwrap_err();
        // The first state that fails is equal to none before it.
        assert_eq!(once.message, each.message);
    }
}
