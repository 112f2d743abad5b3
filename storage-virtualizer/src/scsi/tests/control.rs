//! Start and stop, the medium, self-tests, resets.

use block_io::Operation;

use super::*;

fn removable() -> Bench {
    Bench::with(UnitOptions {
        removable: true,
        ..options()
    })
}

#[test]
fn a_stopped_unit_gives_no_access_until_it_is_started() {
    let bench = Bench::new();
    bench.command(&[0x1b, 0, 0, 0, 0, 0]).assert_good();
    assert_eq!(bench.disk.flushes(), 1);
    for cdb in [
        &[0; 6][..],
        &ten(0x28, 0, 0, 1),
        &ten(0x2a, 0, 0, 1),
        &ten(0x35, 0, 0, 0),
    ] {
        let answer = bench.by(&bench.nexus, cdb, &[0; 512], 0);
        answer.assert_sense(Key::NotReady, Code::NOT_READY_INITIALIZING_REQUIRED);
    }
    bench.ask(&[0x12, 0, 0, 0, 36, 0]).assert_good();
    bench.ask(&[0x1a, 0, 8, 0, 255, 0]).assert_good();
    bench.command(&[0x1b, 1, 0, 0, 1, 0]).assert_good();
    bench.ask(&ten(0x28, 0, 0, 1)).assert_good();
    // Without a flush; the cycles are counted.
    bench.command(&[0x1b, 0, 0, 0, 4, 0]).assert_good();
    assert_eq!(bench.disk.flushes(), 1);
    bench.command(&[0x1b, 0, 0, 0, 1, 0]).assert_good();
    let log = bench.ask(&[0x4d, 0, 0x4e, 0, 0, 0, 0, 0, 64, 0]);
    assert_eq!(log.assert_good().data[4..], [0, 4, 3, 4, 0, 0, 0, 2]);
    bench.refuses(&[
        (&[0x1b, 0, 0, 0, 0x10, 0], (4, Some(7))),
        (&[0x1b, 0, 0, 0, 2, 0], (4, Some(1))),
        (&[0x1b, 2, 0, 0, 1, 0], (1, Some(1))),
    ]);
}

#[test]
fn a_medium_is_taken_out_if_nobody_forbids_it() {
    let bench = removable();
    let other = nexus(2);
    bench.by(&other, &[0; 6], &[], 0);
    bench.by(&other, &[0x1e, 0, 0, 0, 1, 0], &[], 0).assert_good();
    let eject = [0x1b, 0, 0, 0, 2, 0];
    bench
        .command(&eject)
        .assert_sense(Key::IllegalRequest, Code::MEDIUM_REMOVAL_PREVENTED);
    bench.by(&other, &[0x1e, 0, 0, 0, 0, 0], &[], 0).assert_good();
    bench.command(&eject).assert_good();
    bench
        .command(&[0; 6])
        .assert_sense(Key::NotReady, Code::MEDIUM_NOT_PRESENT);
    // Only what loads it starts it.
    bench
        .command(&[0x1b, 0, 0, 0, 1, 0])
        .assert_sense(Key::NotReady, Code::MEDIUM_NOT_PRESENT);
    bench.command(&[0x1b, 0, 0, 0, 3, 0]).assert_good();
    bench.command(&[0; 6]).assert_good();
    let answer = bench.by(&other, &[0; 6], &[], 0);
    answer.assert_sense(Key::UnitAttention, Code::NOT_READY_TO_READY_CHANGE);
    bench.refuses(&[(&[0x1e, 0, 0, 0, 2, 0], (4, Some(1)))]);
    // What forbade it is forgotten with a reset.
    bench.command(&[0x1e, 0, 0, 0, 1, 0]).assert_good();
    bench.unit.reset_nexus(&bench.nexus);
    assert_eq!(bench.command(&[0; 6]).sense().1, Code::NEXUS_LOSS);
    bench.command(&eject).assert_good();
    // A fixed disk does not have the command.
    let answer = Bench::new().command(&[0x1e, 0, 0, 0, 0, 0]);
    answer.assert_sense(Key::IllegalRequest, Code::INVALID_OPERATION_CODE);
}

#[test]
fn self_tests_are_made_and_remembered() {
    let bench = Bench::new();
    let results = || {
        let data = bench
            .ask(&[0x4d, 0, 0x50, 0, 0, 0, 0, 16, 0, 0])
            .assert_good()
            .data
            .clone();
        assert_eq!(data.len(), 4 + 20 * 20);
        data
    };
    assert_eq!(
        results()[4..24],
        [0, 1, 3, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    for kind in [0x04, 1 << 5, 2 << 5, 5 << 5, 6 << 5] {
        bench.command(&[0x1d, kind, 0, 0, 0, 0]).assert_good();
    }
    assert_eq!(results()[8], 6 << 5);
    bench.disk.fail(Some((Operation::Read, libc::EIO)));
    let failed = bench.command(&[0x1d, 0x04, 0, 0, 0, 0]);
    failed.assert_sense(Key::HardwareError, Code::SELF_TEST_FAILED);
    // In the background only the log tells.
    bench.command(&[0x1d, 2 << 5, 0, 0, 0, 0]).assert_good();
    let log = results();
    assert_eq!((log[8], log[28]), (2 << 5 | 7, 7));
    assert_eq!(log[20..23], [3, 0x11, 0]);
    bench.command(&[0x1d, 0x10, 0, 0, 0, 0]).assert_good();
    bench.refuses(&[
        (&[0x1d, 0x10, 0, 0, 8, 0], (3, None)),
        (&[0x1d, 4 << 5, 0, 0, 0, 0], (1, Some(7))),
        (&[0x1d, 0x24, 0, 0, 0, 0], (1, Some(7))),
        (&[0x1d, 0x08, 0, 0, 0, 0], (1, Some(3))),
    ]);
    // Twenty are kept.
    bench.disk.fail(None);
    (0..25).for_each(|_| {
        bench.command(&[0x1d, 0x04, 0, 0, 0, 0]).assert_good();
    });
    assert!(
        results()[4..]
            .chunks_exact(20)
            .all(|one| one[4] == 0 && one[8] == 0xff)
    );
}

#[test]
fn a_reset_covers_what_was_to_be_told_before() {
    let bench = Bench::new();
    bench.unit.capacity_changed();
    bench.unit.reset(Reset::Target);
    assert_eq!(bench.command(&[0; 6]).sense().1, Code::TARGET_RESET);
    bench.command(&[0; 6]).assert_good();
}

#[test]
fn nexuses_are_told_apart_however_many_there_are() {
    let bench = Bench::new();
    let many: Vec<Nexus> = (0..200).map(|number| nexus(100 + number)).collect();
    many.iter().for_each(|nexus| bench.unit.attach(nexus));
    for nexus in &many {
        let read = |room| bench.by(nexus, &ten(0x28, 0, 0, 1), &[], room);
        read(512).assert_sense(Key::UnitAttention, Code::POWER_ON_OCCURRED);
        read(512).assert_good();
    }
    bench.unit.capacity_changed();
    bench.by(&many[150], &[0; 6], &[], 0);
    bench.by(&many[150], &ten(0x28, 0, 0, 1), &[], 512).assert_good();
    let answer = bench.by(&many[151], &ten(0x28, 0, 0, 1), &[], 512);
    answer.assert_sense(Key::UnitAttention, Code::CAPACITY_CHANGED);
    many.iter().for_each(|nexus| bench.unit.detach(nexus));
    bench.command(&[0; 6]);
    assert_eq!(bench.unit.word() & bench.nexus.mask(), 0);
}
