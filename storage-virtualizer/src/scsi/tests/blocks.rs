//! Commands on blocks.

use block_io::Operation;

use super::*;

#[test]
fn reads_and_writes_of_all_lengths_move_the_blocks_that_they_name() {
    let bench = Bench::new();
    let writes: [(Vec<u8>, u64); 4] = [
        (vec![0x0a, 0, 0, 8, 2, 0], 8),
        (ten(0x2a, 0, 16, 2).into(), 16),
        (twelve(0xaa, 0, 24, 2).into(), 24),
        (sixteen(0x8a, 0, 32, 2).into(), 32),
    ];
    for (seed, (cdb, lba)) in (1_u8..).zip(writes) {
        let data = pattern(seed, 2);
        let answer = bench.tell(&cdb, &data);
        assert_eq!(answer.assert_good().outcome.residual(1024), Residual::None);
        assert_eq!(bench.content(lba, 2), data);
        let mut cdb = cdb;
        cdb[0] -= 2;
        assert_eq!(bench.ask(&cdb).assert_good().data, data);
    }
    assert_eq!(bench.content(0, 8), vec![0; 8 * 512]);
}

#[test]
fn in_commands_of_six_bytes_no_blocks_are_256_and_in_others_none() {
    let bench = Bench::new();
    assert_eq!(
        bench.ask(&[0x08, 0, 0, 0, 0, 0]).assert_good().data.len(),
        256 * 512
    );
    for cdb in [ten(0x28, 0, 256, 0), ten(0x2a, 0, 256, 0), ten(0x2f, 0, 256, 0)] {
        assert_eq!(bench.tell(&cdb, &[1; 512]).assert_good().outcome.moved, 0);
    }
    assert_eq!(bench.disk.content(), vec![0; 256 * 512]);
}

#[test]
fn what_lies_beyond_the_end_is_refused_without_overflow() {
    let bench = Bench::new();
    let wide = u64::MAX;
    let commands: Vec<Vec<u8>> = vec![
        vec![0x08, 0, 1, 0, 1, 0],
        ten(0x28, 0, 256, 1).into(),
        ten(0x2a, 0, 255, 2).into(),
        ten(0x28, 0, u32::MAX, u16::MAX).into(),
        ten(0x28, 0, 257, 0).into(),
        twelve(0xa8, 0, 0, u32::MAX).into(),
        sixteen(0x88, 0, wide, u32::MAX).into(),
        sixteen(0x8a, 0, wide / 512, 1).into(),
        sixteen(0x8b, 0, wide, 1).into(),
        sixteen(0x8e, 0, 250, 10).into(),
        sixteen(0x8f, 0, 250, 10).into(),
        sixteen(0x90, 0, 250, 10).into(),
        sixteen(0x91, 0, 250, 10).into(),
        sixteen(0x93, 0, wide, 1).into(),
        ten(0x35, 0, 257, 0).into(),
        ten(0x34, 0, 256, 1).into(),
        ten(0x41, 0, 256, 1).into(),
        [&[0x89, 0][..], &wide.to_be_bytes(), &[0, 0, 0, 1, 0, 0]].concat(),
        [&[0x9e, 0x12][..], &256_u64.to_be_bytes(), &[0, 0, 0, 64, 0, 0]].concat(),
    ];
    for cdb in commands {
        let answer = bench.by(&bench.nexus, &cdb, &[7; 1024], 1024);
        assert_eq!(
            answer.sense().1,
            Code::LBA_OUT_OF_RANGE,
            "{cdb:02x?}: {:?}",
            answer.outcome
        );
    }
    assert_eq!(bench.disk.content(), vec![0; 256 * 512]);
}

#[test]
fn a_buffer_that_is_too_short_or_too_long_is_a_residual() {
    let bench = Bench::new();
    let data = pattern(3, 2);
    bench.tell(&ten(0x2a, 0, 0, 2), &data).assert_good();
    // Reads fill what there is, to the byte.
    let read = bench.by(&bench.nexus, &ten(0x28, 0, 0, 2), &[], 700);
    assert_eq!(read.assert_good().data, data[..700]);
    assert_eq!(read.outcome.residual(700), Residual::Overflow(324));
    let read = bench.by(&bench.nexus, &ten(0x28, 0, 0, 2), &[], 2000);
    assert_eq!(read.assert_good().data, data);
    assert_eq!(read.outcome.residual(2000), Residual::Underflow(976));
    // Writes write whole blocks.
    let write = bench.tell(&ten(0x2a, 0, 4, 2), &data[..700]);
    assert_eq!(write.assert_good().outcome.moved, 512);
    assert_eq!(write.outcome.residual(700), Residual::Overflow(324));
    assert_eq!(bench.content(4, 2), [&data[..512], &[0; 512][..]].concat());
    let write = bench.tell(&ten(0x2a, 0, 8, 1), &data);
    assert_eq!(
        write.assert_good().outcome.residual(1024),
        Residual::Underflow(512)
    );
    assert_eq!(bench.content(8, 2), [&data[..512], &[0; 512][..]].concat());
    // A command that fails moves nothing.
    let failed = bench.tell(&ten(0x2a, 0, 256, 2), &data);
    assert_eq!(failed.outcome.residual(1024), Residual::Underflow(1024));
}

#[test]
fn bits_that_ask_for_what_there_is_not_are_named() {
    let bench = Bench::new();
    bench.refuses(&[
        // Protection.
        (&ten(0x28, 0x20, 0, 1), (1, Some(5))),
        (&ten(0x2a, 0xe0, 0, 1), (1, Some(7))),
        (&ten(0x2e, 0x40, 0, 1), (1, Some(6))),
        (&ten(0x2f, 0x20, 0, 1), (1, Some(5))),
        (&twelve(0xa8, 0x20, 0, 1), (1, Some(5))),
        (&twelve(0xaa, 0x20, 0, 1), (1, Some(5))),
        (&sixteen(0x88, 0x80, 0, 1), (1, Some(7))),
        (&sixteen(0x8a, 0x20, 0, 1), (1, Some(5))),
        (&sixteen(0x8b, 0x20, 0, 1), (1, Some(5))),
        (&sixteen(0x89, 0x20, 0, 0), (1, Some(5))),
        (&ten(0x41, 0x20, 0, 1), (1, Some(5))),
        (&sixteen(0x93, 0x20, 0, 1), (1, Some(5))),
        // NACA.
        (&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4], (9, Some(2))),
        (&[0, 0, 0, 0, 0, 4], (5, Some(2))),
        // The lengths of COMPARE AND WRITE are one byte.
        (&sixteen(0x89, 0, 0, 0x100), (12, Some(0))),
        // BYTCHK.
        (&ten(0x2f, 0x04, 0, 1), (1, Some(2))),
        (&ten(0x2e, 0x04, 0, 1), (1, Some(2))),
        (&ten(0x2e, 0x06, 0, 1), (1, Some(2))),
        // ANCHOR; no blocks; too many.
        (&ten(0x41, 0x10, 0, 1), (1, Some(4))),
        (&sixteen(0x93, 0x18, 0, 1), (1, Some(4))),
        (&ten(0x41, 0, 0, 0), (7, None)),
        (&sixteen(0x93, 0, 0, 0), (10, None)),
        (&sixteen(0x93, 0, 0, u32::MAX), (10, None)),
        (&[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0], (1, Some(0))),
    ]);
    // Group numbers are taken and mean nothing; so is DPO.
    bench.ask(&[0x28, 0x10, 0, 0, 0, 0, 5, 0, 1, 0]).assert_good();
}

#[test]
fn fua_writes_are_durable_and_fua_reads_are_of_the_medium() {
    let bench = Bench::new();
    let data = pattern(1, 1);
    bench.tell(&ten(0x2a, 0x10, 0, 1), &data).assert_good();
    assert_eq!(bench.disk.durable_writes(), 0);
    bench.tell(&ten(0x2a, 0x08, 0, 1), &data).assert_good();
    bench.tell(&sixteen(0x8a, 0x18, 0, 1), &data).assert_good();
    bench.tell(&twelve(0xaa, 0x08, 0, 1), &data).assert_good();
    assert_eq!(bench.disk.durable_writes(), 3);
    assert_eq!(bench.disk.flushes(), 0);
    bench.ask(&ten(0x28, 0x08, 0, 1)).assert_good();
    assert_eq!(bench.disk.flushes(), 1);
    for cdb in [ten(0x35, 0, 0, 0), ten(0x35, 2, 4, 3)] {
        bench.command(&cdb).assert_good();
    }
    bench.command(&sixteen(0x91, 0, 0, 0)).assert_good();
    assert_eq!(bench.disk.flushes(), 4);
}

#[test]
fn verify_compares_all_blocks_or_each_with_one_or_only_reads() {
    let bench = Bench::new();
    let data = pattern(9, 3);
    bench.tell(&ten(0x2a, 0, 5, 3), &data).assert_good();
    let commands: [&dyn Fn(u8, u8) -> Vec<u8>; 3] = [
        &|flags, count| ten(0x2f, flags, 5, count.into()).into(),
        &|flags, count| twelve(0xaf, flags, 5, count.into()).into(),
        &|flags, count| sixteen(0x8f, flags, 5, count.into()).into(),
    ];
    for verify in commands {
        bench.command(&verify(0, 3)).assert_good();
        let answer = bench.tell(&verify(2, 3), &data);
        assert_eq!(answer.assert_good().outcome.moved, 3 * 512);
        let mut wrong = data.clone();
        wrong[700] ^= 1;
        let answer = bench.tell(&verify(2, 3), &wrong);
        answer.assert_sense(Key::Miscompare, Code::MISCOMPARE_DURING_VERIFY);
        assert_eq!(answer.information(), Some(700));
        // One block, compared with each.
        bench.tell(&verify(6, 1), &data[..512]).assert_good();
        let answer = bench.tell(&verify(6, 3), &data[..512]);
        answer.assert_sense(Key::Miscompare, Code::MISCOMPARE_DURING_VERIFY);
    }
    bench.disk.fail(Some((Operation::Read, libc::EIO)));
    let answer = bench.command(&ten(0x2f, 0, 5, 3));
    answer.assert_sense(Key::MediumError, Code::UNRECOVERED_READ_ERROR);
}

#[test]
fn what_is_written_and_verified_is_durable() {
    let bench = Bench::new();
    let data = pattern(4, 2);
    for (at, cdb) in [
        Vec::from(ten(0x2e, 0, 0, 2)),
        ten(0x2e, 2, 4, 2).into(),
        twelve(0xae, 2, 8, 2).into(),
        sixteen(0x8e, 2, 12, 2).into(),
    ]
    .iter()
    .enumerate()
    {
        bench.tell(cdb, &data).assert_good();
        assert_eq!(bench.content(at as u64 * 4, 2), data);
    }
    assert_eq!(bench.disk.durable_writes(), 4);
}

fn compare_and_write(lba: u8, count: u8) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[9], cdb[13]) = (0x89, lba, count);
    cdb
}

#[test]
fn compare_and_write_writes_only_what_is_expected_to_be_there() {
    let bench = Bench::new();
    let (old, new) = (pattern(1, 2), pattern(2, 2));
    bench.tell(&ten(0x2a, 0, 3, 2), &old).assert_good();
    let mut wrong = old.clone();
    wrong[515] ^= 0x80;
    let answer = bench.tell(&compare_and_write(3, 2), &[&wrong[..], &new[..]].concat());
    answer.assert_sense(Key::Miscompare, Code::MISCOMPARE_DURING_VERIFY);
    assert_eq!(answer.information(), Some(515));
    assert_eq!(bench.content(3, 2), old);
    let both = [&old[..], &new[..]].concat();
    let answer = bench.tell(&compare_and_write(3, 2), &both);
    assert_eq!(answer.assert_good().outcome.residual(2048), Residual::None);
    assert_eq!(bench.content(3, 2), new);
    bench.tell(&compare_and_write(3, 0), &[]).assert_good();
    let answer = bench.tell(&compare_and_write(3, 2), &both[..2047]);
    answer.assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    assert_eq!(bench.content(3, 2), new);
}

#[test]
fn nothing_is_written_between_the_compare_and_the_write() {
    let bench = Bench::new();
    let both = Data::of(&[&[0; 512][..], &pattern(1, 1)].concat());
    let other = Data::of(&pattern(2, 1));
    let (both, other) = (both.pieces(), other.pieces());
    let command = |cdb: &'static [u8], data_out| Command {
        cdb,
        data_out,
        data_in: &[],
    };
    let write_same_block = command(&[0x2a, 0, 0, 0, 0, 3, 0, 0, 1, 0], &other);
    let write_elsewhere = command(&[0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0], &other);
    const COMPARE: [u8; 16] = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0];
    let compare = command(&COMPARE, &both);
    let execute = |command| super::execute(&bench.disk, &bench.unit, &bench.nexus, command);

    // A write under way keeps the comparison waiting.
    bench.disk.hold(Some(Operation::Write));
    let mut before = pin!(execute(&write_elsewhere));
    assert!(poll(&mut before).is_none());
    let mut comparing = pin!(execute(&compare));
    assert!(poll(&mut comparing).is_none());
    // While it waits, others that do not touch the block may write, and one that does may not.
    let mut elsewhere = pin!(execute(&write_elsewhere));
    assert!(poll(&mut elsewhere).is_none());
    let mut same = pin!(execute(&write_same_block));
    assert!(poll(&mut same).is_none());
    bench.disk.hold(Some(Operation::Read));
    assert_eq!(poll(&mut before).unwrap().status, Status::Good);
    assert_eq!(poll(&mut elsewhere).unwrap().status, Status::Good);
    assert!(poll(&mut same).is_none());
    // Now it reads.
    assert!(poll(&mut comparing).is_none());
    assert!(poll(&mut same).is_none());
    assert_eq!(bench.content(3, 1), [0; 512]);
    bench.disk.hold(None);
    assert_eq!(poll(&mut comparing).unwrap().status, Status::Good);
    assert_eq!(bench.content(3, 1), pattern(1, 1));
    assert_eq!(poll(&mut same).unwrap().status, Status::Good);
    assert_eq!(bench.content(3, 1), pattern(2, 1));
    // Nothing is special any more.
    assert_eq!(
        bench.unit.word(),
        bench.unit.word() & !super::super::unit::mode_bit::ALL
    );
    // A comparison that is given up leaves no claim behind.
    bench.disk.hold(Some(Operation::Read));
    {
        let mut given_up = pin!(execute(&compare));
        assert!(poll(&mut given_up).is_none());
    }
    bench.disk.hold(None);
    bench.tell(&ten(0x2a, 0, 3, 1), &pattern(5, 1)).assert_good();
}

#[test]
fn threads_that_count_with_compare_and_write_lose_no_count() {
    const THREADS: usize = 4;
    const COUNTS: usize = 200;
    let bench = Bench::new();
    let nexuses: Vec<Nexus> = (0..THREADS as u64).map(|number| nexus(10 + number)).collect();
    nexuses.iter().for_each(|nexus| {
        bench.by(nexus, &[0; 6], &[], 0);
    });
    std::thread::scope(|scope| {
        for nexus in &nexuses {
            let bench = &bench;
            scope.spawn(move || {
                let mut done = 0;
                while done < COUNTS {
                    let into = Data::of(&[0; 512]);
                    let command = Command {
                        cdb: &ten(0x28, 0, 7, 1),
                        data_out: &[],
                        data_in: &into.pieces(),
                    };
                    wait(super::execute(&bench.disk, &bench.unit, nexus, &command));
                    let old = into.0.as_slice().to_vec();
                    let count = u64::from_be_bytes(*old.first_chunk().unwrap());
                    let mut new = old.clone();
                    new[..8].copy_from_slice(&(count + 1).to_be_bytes());
                    let both = Data::of(&[old, new].concat());
                    let command = Command {
                        cdb: &compare_and_write(7, 1),
                        data_out: &both.pieces(),
                        data_in: &[],
                    };
                    let outcome = wait(super::execute(&bench.disk, &bench.unit, nexus, &command));
                    done += usize::from(outcome.status == Status::Good);
                    // Writes beside it, which are counted and not in its way.
                    let beside = Data::of(&[1; 512]);
                    let command = Command {
                        cdb: &ten(0x2a, 0, 8, 1),
                        data_out: &beside.pieces(),
                        data_in: &[],
                    };
                    wait(super::execute(&bench.disk, &bench.unit, nexus, &command));
                }
            });
        }
    });
    let count = u64::from_be_bytes(*bench.content(7, 1).first_chunk().unwrap());
    assert_eq!(count, (THREADS * COUNTS) as u64);
}

/// Waits as a worker does: until it is woken.
fn wait<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn orwrite_sets_bits() {
    let bench = Bench::new();
    let (old, more) = (pattern(1, 2), pattern(100, 2));
    bench.tell(&ten(0x2a, 0, 3, 2), &old).assert_good();
    bench.tell(&sixteen(0x8b, 0, 3, 2), &more).assert_good();
    let expected: Vec<u8> = old.iter().zip(&more).map(|(a, b)| a | b).collect();
    assert_eq!(bench.content(3, 2), expected);
}

#[test]
fn write_same_repeats_a_block_and_gives_space_back_if_it_may() {
    let bench = Bench::new();
    let block = pattern(77, 1);
    let answer = bench.tell(&ten(0x41, 0, 8, 16), &block);
    assert_eq!(answer.assert_good().outcome.residual(512), Residual::None);
    assert_eq!(bench.content(8, 16), block.repeat(16));
    assert_eq!(status_of(&bench, 8), [(8, 16, 0), (24, 232, 1)]);
    // Zeroes that keep their space, zeroes that do not, and zeroes that are not sent.
    bench.tell(&sixteen(0x93, 0, 8, 8), &[0; 512]).assert_good();
    assert_eq!(bench.content(8, 8), vec![0; 8 * 512]);
    assert_eq!(status_of(&bench, 8)[0], (8, 16, 0));
    bench.tell(&sixteen(0x93, 0x08, 8, 8), &[0; 512]).assert_good();
    assert_eq!(status_of(&bench, 8), [(8, 8, 1), (16, 8, 0), (24, 232, 1)]);
    let answer = bench.command(&sixteen(0x93, 0x09, 16, 8));
    assert_eq!(answer.assert_good().outcome.wanted, 0);
    assert_eq!(status_of(&bench, 0), [(0, 256, 1)]);
    // What is not zero is written, even if it might be unmapped.
    bench.tell(&ten(0x41, 0x08, 8, 8), &block).assert_good();
    assert_eq!(bench.content(8, 8), block.repeat(8));
    let answer = bench.tell(&ten(0x41, 0, 8, 8), &block[..511]);
    answer.assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
}

/// Descriptors of GET LBA STATUS: block, count, status.
fn status_of(bench: &Bench, lba: u64) -> Vec<(u64, u32, u8)> {
    let cdb = [&[0x9e, 0x12][..], &lba.to_be_bytes(), &[0, 0, 16, 0, 0, 0]].concat();
    let data = bench.ask(&cdb).assert_good().data.clone();
    let length = u32::from_be_bytes(*data.first_chunk().unwrap()) as usize;
    assert_eq!(length + 4, data.len());
    let descriptors = data[8..].chunks_exact(16).map(|descriptor| {
        (
            u64::from_be_bytes(descriptor[..8].try_into().unwrap()),
            u32::from_be_bytes(descriptor[8..12].try_into().unwrap()),
            descriptor[12],
        )
    });
    descriptors.collect()
}

#[test]
fn the_status_of_blocks_is_cut_to_the_room_and_goes_on_from_any_block() {
    let bench = Bench::new();
    bench.tell(&ten(0x2a, 0, 16, 8), &pattern(1, 8)).assert_good();
    assert_eq!(status_of(&bench, 3), [(3, 13, 1), (16, 8, 0), (24, 232, 1)]);
    assert_eq!(status_of(&bench, 20), [(20, 4, 0), (24, 232, 1)]);
    let cdb = [&[0x9e, 0x12][..], &[0; 8], &[0, 0, 0, 24, 0, 0]].concat();
    let data = bench.ask(&cdb).assert_good().data.clone();
    assert_eq!(data.len(), 24);
    assert_eq!(data[..4], [0, 0, 0, 20]);
}

/// The parameter list of UNMAP.
fn ranges(list: &[(u64, u32)]) -> Vec<u8> {
    let length = u16::try_from(list.len() * 16).unwrap();
    let mut bytes = (length + 6).to_be_bytes().to_vec();
    bytes.extend(length.to_be_bytes());
    bytes.extend([0; 4]);
    for (lba, count) in list {
        bytes.extend(lba.to_be_bytes());
        bytes.extend(count.to_be_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

fn unmap(bench: &Bench, list: &[u8]) -> Answer {
    let [high, low] = u16::try_from(list.len()).unwrap().to_be_bytes();
    bench.tell(&[0x42, 0, 0, 0, 0, 0, 0, high, low, 0], list)
}

#[test]
fn unmapped_blocks_read_as_zeroes_and_all_of_a_list_is_checked_first() {
    let bench = Bench::new();
    let data = pattern(1, 64);
    bench.tell(&ten(0x2a, 0, 0, 64), &data).assert_good();
    unmap(&bench, &ranges(&[(8, 8), (40, 3), (50, 0)])).assert_good();
    let mut expected = data.clone();
    expected[8 * 512..16 * 512].fill(0);
    expected[40 * 512..43 * 512].fill(0);
    assert_eq!(bench.content(0, 64), expected);
    assert_eq!(status_of(&bench, 0)[..3], [(0, 8, 0), (8, 8, 1), (16, 48, 0)]);
    unmap(&bench, &ranges(&[])).assert_good();
    unmap(&bench, &[]).assert_good();
    // Nothing is done of these.
    let answer = unmap(&bench, &ranges(&[(16, 8), (250, 7)]));
    answer.assert_sense(Key::IllegalRequest, Code::LBA_OUT_OF_RANGE);
    let answer = unmap(&bench, &ranges(&[(16, 8), (u64::MAX, u32::MAX)]));
    answer.assert_field(false, (8 + 16 + 8, None));
    unmap(&bench, &ranges(&[(0, 1); 257])).assert_field(false, (2, None));
    let mut long = ranges(&[(16, 8)]);
    long[3] = 17;
    unmap(&bench, &long).assert_field(false, (2, None));
    unmap(&bench, &[0; 7]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    let answer = bench.tell(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &ranges(&[(16, 8)])[..20]);
    answer.assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    assert_eq!(bench.content(0, 64), expected);
}

#[test]
fn a_disk_that_is_not_thin_has_no_unmap() {
    let bench = Bench::with(UnitOptions {
        provisioning: Provisioning::Full,
        ..options()
    });
    let answer = unmap(&bench, &ranges(&[(0, 1)]));
    answer.assert_sense(Key::IllegalRequest, Code::INVALID_OPERATION_CODE);
    bench.refuses(&[(&ten(0x41, 0x08, 0, 1), (1, Some(3)))]);
    let capacity = bench.ask(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]);
    assert_eq!(capacity.data[14], 0);
}

#[test]
fn whatever_changes_a_read_only_disk_is_refused() {
    let bench = Bench::read_only();
    let commands: Vec<Vec<u8>> = vec![
        vec![0x0a, 0, 0, 0, 1, 0],
        ten(0x2a, 0, 0, 1).into(),
        twelve(0xaa, 0, 0, 1).into(),
        sixteen(0x8a, 0, 0, 1).into(),
        ten(0x2e, 0, 0, 1).into(),
        sixteen(0x8b, 0, 0, 1).into(),
        compare_and_write(0, 1).into(),
        ten(0x41, 0, 0, 1).into(),
        sixteen(0x93, 0, 0, 1).into(),
        vec![0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0],
    ];
    for cdb in commands {
        let answer = bench.tell(&cdb, &[0; 1024]);
        answer.assert_sense(Key::DataProtect, Code::WRITE_PROTECTED);
    }
    bench.ask(&ten(0x28, 0, 0, 1)).assert_good();
}

#[test]
fn failures_of_the_disk_are_told_with_their_block() {
    let bench = Bench::new();
    bench.disk.fail(Some((Operation::Read, libc::EIO)));
    let answer = bench.ask(&ten(0x28, 0, 77, 1));
    answer.assert_sense(Key::MediumError, Code::UNRECOVERED_READ_ERROR);
    assert_eq!(answer.information(), Some(77));
    bench.disk.fail(Some((Operation::Write, libc::ENOSPC)));
    let answer = bench.tell(&ten(0x2a, 0, 77, 1), &[0; 512]);
    answer.assert_sense(Key::DataProtect, Code::SPACE_ALLOCATION_FAILED);
    bench.disk.fail(Some((Operation::Flush, libc::EIO)));
    let answer = bench.command(&ten(0x35, 0, 0, 0));
    answer.assert_sense(Key::MediumError, Code::WRITE_ERROR);
    // They are counted: write errors, two.
    let log = bench.ask(&[0x4d, 0, 0x42, 0, 0, 0, 6, 0, 64, 0]);
    assert_eq!(log.assert_good().data[4..], [0, 6, 2, 8, 0, 0, 0, 0, 0, 0, 0, 2]);
}

#[test]
fn pre_fetch_and_defects_are_answered() {
    let bench = Bench::new();
    bench.command(&ten(0x34, 2, 5, 3)).assert_good();
    bench.command(&sixteen(0x90, 0, 5, 0)).assert_good();
    let short = bench.ask(&[0x37, 0, 0x1d, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(short.assert_good().data, [0, 0x1d, 0, 0]);
    let long = bench.ask(&[0xb7, 0x18, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0]);
    assert_eq!(long.assert_good().data, [0, 0x18, 0, 0, 0, 0, 0, 0]);
}
