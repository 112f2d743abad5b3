//! Random commands against an array of bytes: what is read is what was written, by whatever commands.

use proptest::prelude::*;

use super::*;

const SMALL: u64 = 24;

/// A command on blocks, and what it does to an array.
#[derive(Debug, Clone)]
struct Step {
    kind: u8,
    lba: u64,
    count: u64,
    seed: u8,
    /// Bytes of the buffer beyond or below what the command moves.
    slack: i16,
    fua: bool,
}

fn step() -> impl Strategy<Value = Step> {
    (
        0_u8..15,
        0..SMALL + 2,
        0_u64..6,
        any::<u8>(),
        prop_oneof![4 => Just(0_i16), 1 => -600_i16..600],
        any::<bool>(),
    )
        .prop_map(|(kind, lba, count, seed, slack, fua)| Step {
            kind,
            lba,
            count,
            seed,
            slack,
            fua,
        })
}

fn cdb(opcode: u8, flags: u8, step: &Step) -> Vec<u8> {
    let (lba, count) = (
        u32::try_from(step.lba).unwrap(),
        u32::try_from(step.count).unwrap(),
    );
    match opcode >> 5 {
        1 | 2 => ten(opcode, flags, lba, u16::try_from(count).unwrap()).into(),
        5 => twelve(opcode, flags, lba, count).into(),
        _ => sixteen(opcode, flags, step.lba, count).into(),
    }
}

fn check(bench: &Bench, model: &mut [u8], step: &Step) {
    let inside = step.lba + step.count <= SMALL;
    let place = (step.lba * 512) as usize..((step.lba + step.count) * 512) as usize;
    let length = (step.count * 512) as usize;
    let flags = if step.fua { 0x08 } else { 0 };
    let room = |wanted: usize| (wanted as i64 + i64::from(step.slack)).max(0) as usize;
    let data = pattern(step.seed, 12);
    let expected = |good: bool| {
        if good {
            Status::Good
        } else {
            Status::CheckCondition
        }
    };
    match step.kind {
        // READ.
        0..=2 => {
            let opcode = [0x28, 0xa8, 0x88][usize::from(step.kind)];
            let given = room(length);
            let answer = bench.by(&bench.nexus, &cdb(opcode, flags, step), &[], given);
            assert_eq!(answer.outcome.status, expected(inside));
            if inside {
                assert_eq!(answer.outcome.wanted, length as u64);
                assert_eq!(answer.data, model[place][..length.min(given)]);
            }
        }
        // WRITE, WRITE AND VERIFY.
        3..=7 => {
            let opcode = [0x2a, 0xaa, 0x8a, 0x2e, 0x8e][usize::from(step.kind) - 3];
            let flags = if step.kind > 5 { 2 } else { flags };
            let given = room(length).min(data.len());
            let answer = bench.tell(&cdb(opcode, flags, step), &data[..given]);
            assert_eq!(answer.outcome.status, expected(inside));
            if inside {
                let whole = length.min(given - given % 512);
                model[place][..whole].copy_from_slice(&data[..whole]);
                assert_eq!(
                    (answer.outcome.wanted, answer.outcome.moved),
                    (length as u64, whole as u64)
                );
            }
        }
        // VERIFY.
        8 => {
            let answer = bench.tell(&cdb(0x2f, 2, step), &data[..length]);
            let same = inside && model[place] == data[..length];
            assert_eq!(answer.outcome.status, expected(same));
        }
        // WRITE SAME.
        9 | 10 => {
            let zero = step.seed & 1 == 0;
            let block = if zero { vec![0; 512] } else { data[..512].to_vec() };
            let unmap = if step.fua { 8 } else { 0 };
            let opcode = if step.kind == 9 { 0x41 } else { 0x93 };
            let good = inside && step.count > 0;
            let answer = bench.tell(&cdb(opcode, unmap, step), &block);
            assert_eq!(answer.outcome.status, expected(good));
            if good {
                model[place].copy_from_slice(&block.repeat(step.count as usize));
            }
        }
        // UNMAP: blocks read as zeroes.
        11 => {
            let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
            list.extend(step.lba.to_be_bytes());
            list.extend((step.count as u32).to_be_bytes());
            list.extend([0; 4]);
            let answer = bench.tell(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list);
            assert_eq!(answer.outcome.status, expected(inside));
            if inside {
                model[place].fill(0);
            }
        }
        // COMPARE AND WRITE; every other time with what is there.
        12 => {
            let mut cdb = [0; 16];
            (cdb[0], cdb[1]) = (0x89, flags);
            cdb[2..10].copy_from_slice(&step.lba.to_be_bytes());
            cdb[13] = step.count as u8;
            let mut both = data[..length].to_vec();
            if inside && step.seed & 1 == 0 {
                both.copy_from_slice(&model[place.clone()]);
            }
            let same = inside && model[place.clone()] == both[..];
            both.extend(&data[512..512 + length]);
            let answer = bench.tell(&cdb, &both);
            assert_eq!(answer.outcome.status, expected(same));
            if same {
                model[place].copy_from_slice(&data[512..512 + length]);
            }
        }
        // ORWRITE.
        13 => {
            let answer = bench.tell(&cdb(0x8b, flags, step), &data[..length]);
            assert_eq!(answer.outcome.status, expected(inside));
            if inside {
                let bytes = model[place].iter_mut().zip(&data);
                bytes.for_each(|(byte, more)| *byte |= more);
            }
        }
        // The write cache goes, or comes.
        _ => {
            let mut list = bench.ask(&[0x1a, 8, 8, 0, 24, 0]).data;
            list[0] = 0;
            list[2] = 0;
            list[6] = step.seed & 4;
            bench.tell(&[0x15, 0x10, 0, 0, 24, 0], &list).assert_good();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_done_blocks_hold_what_they_should(steps in prop::collection::vec(step(), 1..60)) {
        let bench = Bench::on(MemoryDisk::new(SMALL * 512, 512), options());
        let mut model = vec![0; (SMALL * 512) as usize];
        for step in &steps {
            check(&bench, &mut model, step);
            prop_assert_eq!(&bench.disk.content(), &model, "{:?}", step);
        }
    }
}
