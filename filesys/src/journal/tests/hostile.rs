//! Bytes that nobody wrote.

use block_io::sim::Rng;

use super::*;
use crate::checksum::crc32c;
use crate::journal::ring::{HEADER, PAYLOAD};
use crate::meta_io::demand;

const LAP: u64 = 8;

/// A disk whose ring has three groups of 1, 3 and 1 blocks.
fn written() -> (World, Vec<Vec<u8>>) {
    let groups = vec![vec![1; 100], vec![2; PAYLOAD * 2 + 7], vec![3; PAYLOAD]];
    let mut world = world(LAP, 512);
    let content = groups.clone();
    let ran = world.run(&RunOptions::in_order(), |sim| async move {
        let journal = journal(&sim, LAP, BEGIN, 1);
        start(&journal);
        for group in &content {
            let number = journal.append(group).unwrap();
            journal.commit(number).await.unwrap();
        }
    });
    ran.unwrap();
    world.settle();
    (world, groups)
}

fn replayed(world: &mut World) -> Result<Log, ReplayError<std::convert::Infallible>> {
    let ran = world.run(&RunOptions::in_order(), |sim| async move {
        read(&sim, &ring(LAP), BEGIN, 1).await
    });
    ran.unwrap().ended.done().unwrap()
}

#[test]
fn a_flipped_bit_is_damage_or_ends_the_log_before_it() {
    let (mut world, groups) = written();
    // The groups that lose something if block 0 to 4 does.
    for (block, hit) in [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)] {
        for byte in (0..HEADER).chain((HEADER..4096).step_by(61)) {
            for bit in 0..8 {
                let place = (FIRST + block) * 4096 + byte as u64;
                world.media[0].rot(place, bit);
                match replayed(&mut world) {
                    Err(ReplayError::Damaged { group, .. }) => assert_eq!(group, hit + 1),
                    Ok((found, end)) => {
                        // Nothing proves that the last group had been durable.
                        assert_eq!(hit, 2, "block {block} byte {byte} bit {bit}");
                        assert_eq!((found.as_slice(), end.group), (&groups[..2], 3));
                    }
                    Err(error) => panic!("{error}"),
                }
                world.media[0].rot(place, bit);
            }
        }
    }
    assert_eq!(replayed(&mut world).unwrap().0, groups);
}

#[test]
fn blocks_of_another_file_system_do_not_count() {
    let (mut world, _) = written();
    let other = Ring {
        uuid: [0; 16],
        ..ring(LAP)
    };
    let ran = world.run(&RunOptions::in_order(), |sim| async move {
        read(&sim, &other, BEGIN, 1).await
    });
    let (groups, end) = ran.unwrap().ended.done().unwrap().unwrap();
    assert!(groups.is_empty() && end == BEGIN);
    demand(&["journal: a block of another file system"]);
}

#[test]
fn impossible_positions_and_regions_are_refused() {
    let regions = [0, 3, 1 << 40].map(ring);
    let positions = [(0, 0), (u64::MAX, 0), (1, u64::MAX), (1 << 62, 1), (1, 1 << 62)];
    let positions = positions.map(|(group, block)| Position {
        group,
        block,
        previous: 0,
    });
    on_disk(LAP, async |sim| {
        for ring in regions {
            let error = read(&sim, &ring, BEGIN, 1).await.unwrap_err();
            assert!(matches!(error, ReplayError::Impossible), "{error}");
        }
        for position in positions {
            let error = read(&sim, &ring(LAP), position, 1).await.unwrap_err();
            assert!(matches!(error, ReplayError::Impossible), "{error}");
        }
        let beyond = Ring {
            region: Region {
                first: 1 << 61,
                blocks: 8,
            },
            ..ring(LAP)
        };
        assert!(matches!(
            read(&sim, &beyond, BEGIN, 1).await,
            Err(ReplayError::Device(_))
        ));
    });
}

/// Headers of any content with a right checksum: an end or an error, no panic, no more bytes than the ring has.
#[test]
fn sealed_nonsense_does_no_harm() {
    let (mut world, groups) = written();
    let mut original = vec![0; 4096 * 8];
    world.media[0].peek(FIRST * 4096, &mut original);
    let mut rng = Rng::new(7);
    let mut ends = 0;
    for _ in 0..20_000 {
        let mut bytes = original.clone();
        for _ in 0..=rng.below(3) {
            let block = rng.index(8) * 4096;
            let block = &mut bytes[block..block + 4096];
            if rng.chance(1, 8) {
                rng.fill(block);
            }
            block[..8].copy_from_slice(b"SMSFSJRN");
            block[16..32].copy_from_slice(&UUID);
            let field = [12, 32, 40, 48, 56, 58, 60][rng.index(7)];
            let value = match rng.below(3) {
                0 => rng.below(12),
                1 => rng.next_u64(),
                _ => u64::MAX - rng.below(3),
            };
            let width = if field >= 56 { 2 } else { 4 };
            block[field..field + width].copy_from_slice(&value.to_le_bytes()[..width]);
            let checksum = crc32c(&block[12..]);
            block[8..12].copy_from_slice(&checksum.to_le_bytes());
        }
        world.media[0].poke(FIRST * 4096, &bytes);
        if let Ok((found, end)) = replayed(&mut world) {
            ends += 1;
            assert!(end.block <= LAP && found.concat().len() <= 8 * PAYLOAD);
            assert!(found.len() <= 8 && groups.len() == 3);
        }
    }
    assert!(ends > 100, "{ends}");
}
