//! Ends and damage: rings made by hand.

use super::*;
use crate::journal::ring::{self as blocks, HEADER, Header};
use crate::meta_io::demand;

/// A block of a ring, as a test writes it down.
#[derive(Debug, Clone, Copy)]
struct Says {
    incarnation: u64,
    group: u64,
    index: u16,
    count: u16,
    /// Whether it is chained to what comes before it in the list of groups.
    chained: bool,
    /// Laps that it is behind.
    old: u64,
}

const fn of(incarnation: u64, group: u64, index: u16, count: u16) -> Says {
    Says {
        incarnation,
        group,
        index,
        count,
        chained: true,
        old: 0,
    }
}

const fn unchained(incarnation: u64, group: u64) -> Says {
    Says {
        chained: false,
        ..of(incarnation, group, 0, 1)
    }
}

const fn old(incarnation: u64, group: u64) -> Says {
    Says {
        old: 1,
        ..of(incarnation, group, 0, 1)
    }
}

const LAP: u64 = 8;
/// Far enough that there are older laps.
const FROM: Position = Position {
    group: 10,
    block: 16,
    previous: 77,
};
/// Incarnation in the superblock.
const LIMIT: u64 = 5;

/// Writes the blocks of a lap; empty ones are garbage. Their positions count from [`FROM`].
fn write(sim: &Sim, lap: &[Option<Says>]) {
    let mut last = FROM.previous;
    let mut previous = last;
    for (position, says) in (FROM.block..).zip(lap) {
        let mut block = vec![0; 4096];
        match says {
            None => block.fill(0xa5),
            Some(says) => {
                if says.index == 0 {
                    previous = last;
                }
                let used = if says.index + 1 == says.count {
                    2
                } else {
                    u16::try_from(4096 - HEADER).unwrap()
                };
                let header = Header {
                    incarnation: says.incarnation,
                    group: says.group,
                    position: position - says.old * LAP,
                    index: says.index,
                    count: says.count,
                    used,
                    previous: if says.chained { previous } else { previous ^ 1 },
                };
                let payload = &mut block[HEADER..HEADER + usize::from(used)];
                payload.fill(says.group.to_le_bytes()[0]);
                last = blocks::encode(&header, UUID, &mut block);
            }
        }
        let place = ring(LAP).place(position) * 4096;
        sim.with_medium(0, |medium| medium.poke(place, &block));
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// So many groups, and the position of the next.
    End(usize, u64),
    /// Group, block of the ring.
    Damaged(u64, u64),
    Newer(u64),
}

fn result(lap: &[Option<Says>]) -> Verdict {
    on_disk(LAP, async |sim| {
        write(&sim, lap);
        match read(&sim, &ring(LAP), FROM, LIMIT).await {
            Ok((groups, end)) => {
                assert_eq!(end.group, FROM.group + groups.len() as u64);
                Verdict::End(groups.len(), end.block - FROM.block)
            }
            Err(ReplayError::Damaged { group, block }) => Verdict::Damaged(group, block - FIRST),
            Err(ReplayError::Newer { incarnation, .. }) => Verdict::Newer(incarnation),
            Err(error) => panic!("{error}"),
        }
    })
}

#[test]
fn ends_and_damage_are_told_apart() {
    use Verdict::{Damaged, End, Newer};
    let g = |incarnation, group| Some(of(incarnation, group, 0, 1));
    let part = |incarnation, group, index, count| Some(of(incarnation, group, index, count));
    let table: Vec<(&str, Vec<Option<Says>>, Verdict)> = vec![
        ("nothing", vec![None; 8], End(0, 0)),
        ("one group", vec![g(5, 10), None], End(1, 1)),
        (
            "a full ring",
            (10..18).map(|group| g(5, group)).collect(),
            End(8, 8),
        ),
        (
            "incarnations follow each other",
            vec![g(3, 10), g(3, 11), g(5, 12), None],
            End(3, 3),
        ),
        (
            "an incarnation does not go back",
            vec![g(4, 10), g(3, 11)],
            End(1, 1),
        ),
        (
            "a torn group, its end missing",
            vec![g(5, 10), part(5, 11, 0, 3), part(5, 11, 1, 3), None],
            End(1, 1),
        ),
        (
            "a torn group, its middle missing",
            vec![g(5, 10), part(5, 11, 0, 3), None, part(5, 11, 2, 3)],
            End(1, 1),
        ),
        (
            "a torn group, its start missing",
            vec![g(5, 10), None, part(5, 11, 1, 3), part(5, 11, 2, 3)],
            End(1, 1),
        ),
        (
            "the next group is there",
            vec![g(5, 10), None, g(5, 12)],
            Damaged(11, 1),
        ),
        (
            "a part of the next group is there",
            vec![g(5, 10), None, None, part(5, 12, 1, 2)],
            Damaged(11, 1),
        ),
        (
            "a much later group is there",
            vec![None, None, None, None, None, None, None, g(5, 17)],
            Damaged(10, 0),
        ),
        ("a group too late for its place", vec![None, g(5, 12)], End(0, 0)),
        (
            "the middle of a group is damaged, the next there",
            vec![part(5, 10, 0, 3), None, part(5, 10, 2, 3), g(5, 11)],
            Damaged(10, 0),
        ),
        (
            "a later group in the place of the middle",
            vec![part(5, 10, 0, 3), g(5, 11), None],
            Damaged(10, 0),
        ),
        (
            "the rest of a torn group after its successor",
            vec![g(5, 10), part(4, 10, 1, 3), part(4, 10, 2, 3)],
            End(1, 1),
        ),
        (
            "an older lap",
            vec![g(5, 10), Some(old(5, 3)), Some(old(5, 4))],
            End(1, 1),
        ),
        (
            "an older lap with a later number, which cannot be",
            vec![g(5, 10), Some(old(5, 12))],
            End(1, 1),
        ),
        (
            "a group that is not chained",
            vec![g(5, 10), Some(unchained(5, 11)), None],
            End(1, 1),
        ),
        (
            "a group that is not chained, and the next",
            vec![g(5, 10), Some(unchained(5, 11)), g(5, 12)],
            Damaged(11, 1),
        ),
        (
            "later, but of an incarnation before",
            vec![g(4, 10), None, g(3, 12)],
            End(1, 1),
        ),
        (
            "later, of a later incarnation",
            vec![g(4, 10), None, g(5, 12)],
            Damaged(11, 1),
        ),
        (
            "of an incarnation beyond the superblock",
            vec![g(5, 10), g(6, 11)],
            Newer(6),
        ),
        (
            "later, beyond the superblock",
            vec![g(5, 10), None, g(6, 12)],
            Newer(6),
        ),
        (
            "a group of two incarnations",
            vec![part(4, 10, 0, 2), part(5, 10, 1, 2), None],
            End(0, 0),
        ),
        (
            "a count that changes",
            vec![part(5, 10, 0, 3), part(5, 10, 1, 2), None],
            End(0, 0),
        ),
        (
            "a group longer than what is left of the lap",
            vec![g(5, 10), g(5, 11), part(5, 12, 0, 7), part(5, 12, 1, 7)],
            End(2, 2),
        ),
        (
            "a group that takes its own number twice",
            vec![g(5, 10), g(5, 10), g(5, 10)],
            End(1, 1),
        ),
    ];
    for (name, mut lap, expected) in table {
        lap.resize(8, None);
        assert_eq!(result(&lap), expected, "{name}");
    }
    demand(&[
        "journal: a group is missing that had been durable",
        "journal: newer than the superblock",
    ]);
}

/// All rings of five blocks whose groups have one block: replay is judged by the definition.
#[test]
fn every_small_ring_is_judged_as_defined() {
    let choices = [
        None,
        Some((5, 0)),
        Some((5, 1)),
        Some((4, 0)),
        Some((6, 0)),
        Some((5, 2)),
    ];
    for number in 0..choices.len().pow(5) {
        // What each place holds: an incarnation, and how far behind its right group it is.
        let lap: Vec<Option<Says>> = (0..5_u64)
            .map(|place| {
                let choice =
                    choices[number / choices.len().pow(u32::try_from(place).unwrap()) % choices.len()];
                choice.map(|(incarnation, behind)| {
                    of(incarnation, FROM.group + place - place.min(behind), 0, 1)
                })
            })
            .collect();
        let mut incarnation = 0;
        let good = lap
            .iter()
            .zip(FROM.group..)
            .take_while(|(says, group)| {
                says.is_some_and(|says| {
                    let next = says.group == *group && (incarnation..=LIMIT).contains(&says.incarnation);
                    if next {
                        incarnation = says.incarnation;
                    }
                    next
                })
            })
            .count();
        let missing = FROM.group + good as u64;
        let proof = lap[good..].iter().flatten().find(|says| {
            says.incarnation >= incarnation
                && if says.incarnation > LIMIT {
                    says.group >= missing
                } else {
                    says.group > missing
                }
        });
        let expected = match proof {
            None => Verdict::End(good, good as u64),
            Some(says) if says.incarnation > LIMIT => Verdict::Newer(says.incarnation),
            Some(_) => Verdict::Damaged(missing, good as u64),
        };
        let mut lap = lap.clone();
        lap.resize(8, None);
        assert_eq!(result(&lap), expected, "{lap:?}");
    }
}
