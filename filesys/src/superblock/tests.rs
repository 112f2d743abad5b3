//! Copies that are written, lost, torn, damaged, foreign.

use block_io::Operation;
use block_io::sim::{
    DiskOptions, ExploreOptions, Failure, Fault, FaultRule, Numbers, RunOptions, Scenario, Shared, Sim,
    World, explore,
};

use super::codec::{BODY, decode, encode};
use super::*;
use crate::meta_io::demand;

const BLOCKS: u64 = 256;
const SIZE: u64 = BLOCKS * 4096;

/// A superblock whose fields follow from its sequence.
fn sample(sequence: u64) -> Superblock {
    Superblock {
        features: Features {
            compatible: sequence,
            ..Features::default()
        },
        uuid: *b"0123456789abcdef",
        sequence,
        incarnation: sequence + 1,
        layout: layout(BLOCKS, &LayoutOptions::default()).unwrap(),
        replay: Position {
            group: sequence + 2,
            block: sequence * 3,
            previous: 4,
        },
        space: SpaceState {
            number: sequence + 5,
            checksum: 6,
        },
        root: Root {
            slot: [7; 16],
            level: 8,
        },
        next_object: sequence + 9,
        name_hash_seed: u64::MAX - sequence,
        clean: sequence % 2 == 1,
        has_tail: sequence % 3 == 1,
        unbroken: sequence,
    }
}

fn block(superblock: &Superblock, copy: usize) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    encode(superblock, copy, &mut block);
    block
}

fn valid(superblock: &Superblock, copy: usize) -> Found {
    let place = copy_place(copy, superblock.layout.size_blocks);
    decode(&block(superblock, copy), copy, place)
}

#[test]
fn it_says_since_when_nothing_is_missing_that_was_answered() {
    let mut superblock = Superblock::default();
    let mut opened = |is_clean, is_whole, has_tail| {
        superblock.clean = is_clean;
        superblock.incarnation += 1;
        let may_miss = superblock.opened(is_whole, has_tail);
        assert!(!superblock.clean && superblock.has_tail == has_tail);
        (superblock.unbroken, may_miss)
    };
    assert_eq!(opened(true, false, true), (1, false));
    // A kill, with its tail; an orderly end, with none.
    assert_eq!(opened(false, true, true), (1, false));
    assert_eq!(opened(true, false, true), (1, false));
    // A tail that is not there.
    assert_eq!(opened(false, false, false), (4, true));
    // Whoever kept none had answered nothing without the journal.
    assert_eq!(opened(false, false, true), (4, false));
    assert_eq!(opened(false, false, true), (6, true));
}

fn world() -> World {
    World::new([DiskOptions::new("meta", SIZE)])
}

/// Runs `script` on a disk in order.
fn on_disk<T: 'static>(script: impl AsyncFnOnce(Sim) -> T) -> T {
    world()
        .run(&RunOptions::in_order(), |sim| async move { script(sim).await })
        .unwrap()
        .ended
        .done()
        .unwrap()
}

#[test]
fn a_superblock_survives_encoding() {
    for copy in 0..COPIES {
        let Found::Valid(decoded, _) = valid(&sample(77), copy) else {
            panic!("copy {copy} is not valid")
        };
        assert_eq!(*decoded, sample(77));
        assert!(block(&sample(77), copy)[BODY..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn every_bit_of_a_copy_matters() {
    let good = block(&sample(5), 1);
    for bit in 0..BODY * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let found = decode(&bad, 1, 16);
        // Bytes 14 and 15 are reserved and not covered.
        let ignored = (14 * 8..16 * 8).contains(&bit);
        assert_eq!(matches!(found, Found::Valid(..)), ignored, "bit {bit}: {found:?}");
    }
}

#[test]
fn values_that_cannot_be_are_refused_even_with_a_checksum() {
    let wrong: [fn(&mut Superblock); 12] = [
        |bad| bad.sequence = MOST,
        |bad| bad.incarnation = u64::MAX,
        |bad| bad.replay.group = 0,
        |bad| bad.replay.group = MOST,
        |bad| bad.replay.block = u64::MAX,
        |bad| bad.space.number = MOST,
        |bad| bad.layout.size_blocks = 0,
        |bad| bad.layout.size_blocks = u64::MAX,
        |bad| bad.layout.journal.blocks = u64::MAX,
        |bad| bad.layout.journal.first = u64::MAX,
        |bad| bad.layout.bitmaps[1] = bad.layout.bitmaps[0],
        |bad| bad.layout.bitmaps[0].blocks = 0,
    ];
    for (number, change) in wrong.into_iter().enumerate() {
        let mut bad = sample(3);
        change(&mut bad);
        let found = decode(&block(&bad, 0), 0, 0);
        assert!(matches!(found, Found::Damaged(_)), "{number}: {found:?}");
    }
}

/// What a place holds, as a letter: `-` nothing, `x` damaged, `f` foreign, digits are sequences, `b` is 2 with other content.
fn found(letter: char, copy: usize) -> Found {
    let digit = letter.to_digit(10).map(u64::from);
    match (letter, digit) {
        ('-', _) => Found::NoMagic,
        ('x', _) => Found::Damaged("is damaged"),
        ('f', _) => Found::Foreign(9),
        ('b', _) => {
            let mut other = sample(2);
            other.next_object += 1;
            valid(&other, copy)
        }
        (_, Some(sequence)) => valid(&sample(sequence), copy),
        _ => panic!("{letter}"),
    }
}

/// The rules once more, for all patterns of places.
fn expected(pattern: &[char]) -> String {
    let count = |letter: char| pattern.iter().filter(|other| **other == letter).count();
    if count('f') >= 2 {
        return "foreign".into();
    }
    if count('2') == 2 && count('b') == 2 {
        return "conflict".into();
    }
    for letter in ['3', '2', 'b', '1'] {
        if count(letter) >= 2 {
            return letter.to_string();
        }
    }
    if count('-') == COPIES {
        return "none".into();
    }
    let any = pattern.iter().any(|letter| "123b".contains(*letter));
    if any { "few".into() } else { "damaged".into() }
}

#[test]
fn the_decision_is_right_for_every_pattern_of_places() {
    let letters = ['-', 'x', 'f', '1', '2', 'b', '3'];
    for number in 0..letters.len().pow(4) {
        let pattern: [char; COPIES] = std::array::from_fn(|copy| {
            letters[number / letters.len().pow(u32::try_from(copy).unwrap()) % letters.len()]
        });
        let places: [Found; COPIES] = std::array::from_fn(|copy| found(pattern[copy], copy));
        let result = match choose::choose(&places) {
            Ok(opened) => {
                let highest = pattern.iter().filter_map(|letter| match letter {
                    'b' => Some(2),
                    letter => letter.to_digit(10),
                });
                assert_eq!(
                    opened.next_sequence,
                    u64::from(highest.max().unwrap()) + 1,
                    "{pattern:?}"
                );
                let other = opened.superblock != sample(opened.superblock.sequence);
                if other {
                    "b".into()
                } else {
                    opened.superblock.sequence.to_string()
                }
            }
            Err(SuperblockError::ForeignVersion { version: 9 }) => "foreign".into(),
            Err(SuperblockError::Conflict { sequence: 2 }) => "conflict".into(),
            Err(SuperblockError::NotAFileSystem) => "none".into(),
            Err(SuperblockError::TooFewCopies { .. }) => "few".into(),
            Err(SuperblockError::Damaged { .. }) => "damaged".into(),
            Err(error) => panic!("{pattern:?}: {error}"),
        };
        assert_eq!(result, expected(&pattern), "{pattern:?}");
    }
}

#[test]
fn an_unknown_feature_is_refused_or_makes_the_file_system_read_only() {
    let mut new = sample(1);
    new.features.read_only_compatible = 4;
    let opened = choose::choose(&std::array::from_fn(|copy| valid(&new, copy))).unwrap();
    assert_eq!(opened.unknown_read_only, 4);
    new.features.incompatible = 8;
    let refused = choose::choose(&std::array::from_fn(|copy| valid(&new, copy)));
    assert!(matches!(
        refused,
        Err(SuperblockError::UnknownFeature { bits: 8 })
    ));
}

#[test]
fn errors_say_what_was_found() {
    let text = on_disk(async |sim| {
        let disk = sim.disk(0);
        let nothing = open(&disk).await.unwrap_err();
        assert!(matches!(nothing, SuperblockError::NotAFileSystem), "{nothing}");
        write(&disk, &sample(1), &mut Holders::default()).await.unwrap();
        sim.with_medium(0, |medium| {
            medium.rot(100, 1);
            medium.rot(16 * 4096 + 100, 1);
            medium.poke(32 * 4096, &[0; 4096]);
        });
        open(&disk).await.unwrap_err().to_string()
    });
    assert!(text.contains("copy 0 does not match its checksum"), "{text}");
    assert!(
        text.contains("copy 2 is something else, copy 3 has sequence 1"),
        "{text}"
    );
}

#[test]
fn a_volume_that_has_grown_is_opened_and_one_that_has_shrunk_is_not() {
    let mut world = world();
    let script = async |sim: Sim| {
        write(&sim.disk(0), &sample(1), &mut Holders::default())
            .await
            .unwrap()
    };
    world.run(&RunOptions::in_order(), script).unwrap();
    world.settle();
    for blocks in [BLOCKS + 1, BLOCKS * 2, BLOCKS - 1] {
        let mut resized = World::new([DiskOptions::new("meta", blocks.max(BLOCKS) * 4096)]);
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        world.media[0].peek(0, &mut content);
        resized.media[0].poke(0, &content);
        let ran = resized.run(&RunOptions::in_order(), async |sim| open(&sim.disk(0)).await);
        let opened = ran.unwrap().ended.done().unwrap().unwrap();
        assert_eq!(opened.superblock, sample(1));
        assert_eq!(opened.holders, Holders([true; COPIES]), "{blocks} blocks");
    }
    let mut large = sample(2);
    large.layout = layout(BLOCKS * 2, &LayoutOptions::default()).unwrap();
    let refused = on_disk(async |sim| {
        let disk = sim.disk(0);
        for copy in 0..3 {
            sim.with_medium(0, |medium| {
                medium.poke(copy_place(copy, BLOCKS) * 4096, &block(&large, copy))
            });
        }
        open(&disk).await
    });
    let Err(SuperblockError::Truncated { expected, found }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((expected, found), (BLOCKS * 2, BLOCKS));
    demand(&["superblock: the volume has grown"]);
}

#[test]
fn layouts_are_apart_for_all_sizes_or_refused() {
    for size in (0..2000).chain((11..30).map(|shift| 1 << shift)) {
        match layout(size, &LayoutOptions::default()) {
            Ok(layout) => {
                layout.check().unwrap();
                assert!(size >= MIN_BLOCKS);
                assert!((64..=16384).contains(&layout.journal.blocks));
            }
            Err(LayoutError::TooSmall { .. }) => assert!(size < MIN_BLOCKS, "{size}"),
            Err(error) => panic!("{size}: {error}"),
        }
    }
    let options = LayoutOptions {
        journal_blocks: Some(4),
        grow_to_blocks: 1 << 20,
    };
    let small = layout(BLOCKS, &options).unwrap();
    assert_eq!((small.journal.blocks, small.bitmaps[0].blocks), (4, 33));
    let none = LayoutOptions {
        journal_blocks: Some(0),
        ..options
    };
    assert!(layout(BLOCKS, &none).is_err());
}

#[derive(Debug, Clone, Default)]
struct Promise {
    acknowledged: u64,
    begun: u64,
}

/// Two writes of the superblock; a request to one copy fails, or one copy rots.
#[derive(Debug)]
struct Writes {
    /// Copy, and how many writes to it pass before one fails.
    fails: Option<(usize, u64)>,
    /// Copy that rots before recovery.
    rots: Option<usize>,
    /// Copy that cannot be read.
    unreadable: Option<usize>,
}

fn range(copy: usize) -> std::ops::Range<u64> {
    let first = copy_place(copy, BLOCKS) * 4096;
    first..first + 4096
}

impl Scenario for Writes {
    type Model = Promise;

    fn world(&self) -> World {
        world()
    }

    async fn prepare(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        write(&sim.disk(0), &sample(1), &mut Holders::default())
            .await
            .unwrap();
        *promise.borrow_mut() = Promise {
            acknowledged: 1,
            begun: 1,
        };
        Ok(())
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        if let Some((copy, after)) = self.fails {
            let rule = FaultRule::once(Fault::Error, Operation::Write).within(range(copy));
            sim.inject(0, rule.after(after));
        }
        let mut holders = Holders([true; COPIES]);
        for sequence in 2..=3 {
            promise.borrow_mut().begun = sequence;
            write(&sim.disk(0), &sample(sequence), &mut holders)
                .await
                .map_err(|error| error.to_string())?;
            promise.borrow_mut().acknowledged = sequence;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let disk = sim.disk(0);
        if let Some(copy) = self.rots {
            sim.with_medium(0, |medium| medium.rot(range(copy).start + 70, 3));
        }
        if let Some(copy) = self.unreadable {
            sim.inject(
                0,
                FaultRule::once(Fault::Error, Operation::Read).within(range(copy)),
            );
        }
        let opened = open(&disk).await;
        let Promise { acknowledged, begun } = promise.borrow().clone();
        let mut opened = match opened {
            Ok(opened) => opened,
            // A copy that is lost on top of what a crash between the first two leaves: reported, never wrong.
            Err(SuperblockError::TooFewCopies { .. }) if self.is_doubly_faulty() => return Ok(()),
            Err(error) => return Err(error.to_string().into()),
        };
        let sequence = opened.superblock.sequence;
        if opened.superblock != sample(sequence) || !(acknowledged..=begun).contains(&sequence) {
            return Err(format!("{sequence} is opened, promised was {acknowledged} to {begun}").into());
        }
        promise.borrow_mut().begun = opened.next_sequence;
        let next = sample(opened.next_sequence);
        write(&disk, &next, &mut opened.holders)
            .await
            .map_err(|error| error.to_string())?;
        promise.borrow_mut().acknowledged = next.sequence;
        let again = open(&disk).await.map_err(|error| error.to_string())?;
        // A fault of the script may wait for this write.
        let holders = again.holders.0.iter().filter(|holds| **holds).count();
        if again.superblock != next || holders < COPIES - usize::from(self.fails.is_some()) {
            return Err(format!("{again:?} after sequence {}", next.sequence).into());
        }
        Ok(())
    }
}

impl Writes {
    fn is_doubly_faulty(&self) -> bool {
        self.fails.is_some() && (self.rots.is_some() || self.unreadable.is_some())
    }
}

fn explored(writes: &Writes, nesting: u32) -> Numbers {
    let options = ExploreOptions {
        nesting,
        nested_states: 64,
        schedules: 2,
        ..ExploreOptions::default()
    };
    let numbers = explore(writes, &options).unwrap_or_else(|failure| panic!("{writes:?}: {failure}"));
    assert_eq!(numbers.sampled_points, 0, "{numbers}");
    numbers
}

#[test]
fn crashes_within_crashes_leave_the_old_or_the_new_superblock() {
    let none = Writes {
        fails: None,
        rots: None,
        unreadable: None,
    };
    println!("{}", explored(&none, 2));
}

#[test]
fn a_crash_leaves_the_old_or_the_new_superblock_with_any_single_fault() {
    let mut numbers = Numbers::default();
    let copies = || [None].into_iter().chain((0..COPIES).map(Some));
    for failing in copies() {
        for after in 0..2 {
            let fails = failing.map(|copy| (copy, after));
            for lost in copies() {
                let of = |rots, unreadable| Writes {
                    fails,
                    rots,
                    unreadable,
                };
                // What rots stays rotten, so a crash after it is a second fault.
                numbers.add(&explored(&of(lost, None), 0));
                numbers.add(&explored(&of(None, lost), u32::from(fails.is_none())));
            }
        }
    }
    println!("{numbers}");
    let missing = numbers.missing(&[
        "superblock: one copy cannot be written",
        "superblock: a copy cannot be read",
        "superblock: a damaged copy",
        "superblock: fewer than two copies agree",
        "superblock: a single newer copy is ignored",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}

#[test]
fn a_write_of_fewer_than_three_copies_is_an_error() {
    for copies in [[0, 1], [0, 2], [1, 3], [2, 3]] {
        on_disk(async |sim| {
            let disk = sim.disk(0);
            write(&disk, &sample(1), &mut Holders::default()).await.unwrap();
            for copy in copies {
                sim.inject(
                    0,
                    FaultRule::once(Fault::Error, Operation::Write).within(range(copy)),
                );
            }
            let failed = write(&disk, &sample(2), &mut Holders([true; COPIES])).await;
            assert!(matches!(
                failed,
                Err(SuperblockError::NotDurable { sequence: 2, .. })
            ));
            let mut opened = open(&disk).await.unwrap();
            assert!((1..=2).contains(&opened.superblock.sequence));
            let next = sample(opened.next_sequence);
            write(&disk, &next, &mut opened.holders).await.unwrap();
            assert_eq!(open(&disk).await.unwrap().superblock, next);
        });
    }
    demand(&["superblock: too few copies are written"]);
}

#[test]
fn a_copy_that_was_written_to_another_place_does_not_count() {
    on_disk(async |sim| {
        let disk = sim.disk(0);
        write(&disk, &sample(1), &mut Holders::default()).await.unwrap();
        sim.with_medium(0, |medium| medium.poke(0, &block(&sample(1), 2)));
        let opened = open(&disk).await.unwrap();
        assert_eq!(opened.holders, Holders([false, true, true, true]));
    });
    demand(&["superblock: a copy in another's place"]);
}

#[test]
fn random_blocks_are_no_superblock_and_nothing_panics() {
    let mut rng = block_io::sim::Rng::new(1);
    for _ in 0..20_000 {
        let mut bytes = vec![0; BLOCK];
        rng.fill(&mut bytes);
        let length = rng.index(BLOCK + 1);
        bytes.truncate(length);
        let mut fixed = block(&sample(1), 0);
        fixed[16..BODY].iter_mut().for_each(|byte| {
            if rng.chance(1, 4) {
                *byte = rng.next_u64().to_le_bytes()[0];
            }
        });
        let checksum = crate::checksum::crc32c(&fixed[16..BODY]);
        fixed[8..12].copy_from_slice(&checksum.to_le_bytes());
        fixed[16..20].copy_from_slice(&1_u32.to_le_bytes());
        for bytes in [bytes, fixed] {
            let found = decode(&bytes, 0, 0);
            let places = std::array::from_fn(|copy| if copy < 2 { found.clone() } else { Found::NoMagic });
            assert!(choose::choose(&places).is_err());
        }
    }
}
