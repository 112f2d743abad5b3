//! The exhaustive level finds every one of the sample's errors and none in the right one.

use block_io::sim::{ExploreOptions, Failure, Numbers, explore};

use crate::superblock::{Build, Updates};

fn explore_build(build: Build, nesting: u32) -> Result<Numbers, Failure> {
    let options = ExploreOptions {
        nesting,
        nested_states: 64,
        schedules: 3,
        ..ExploreOptions::default()
    };
    explore(&Updates { build, count: 3 }, &options)
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
