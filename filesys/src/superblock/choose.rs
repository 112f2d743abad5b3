//! Which of the copies counts: a decision over data, without I/O, so that tables can prove it.
//!
//! | the four places hold | result |
//! |---|---|
//! | 2 or more of a foreign version | `ForeignVersion`: a newer program was here, whatever else is left |
//! | 2 or more valid ones that are equal | the pair with the highest sequence; single newer ones are ignored |
//! | two different pairs with one sequence | `Conflict` |
//! | valid ones, but no two that are equal | `TooFewCopies` |
//! | no magic number anywhere | `NotAFileSystem` |
//! | otherwise | `Damaged` |

use std::sync::Arc;

use block_io::{IoError, cover};

use super::codec::BODY;
use super::layout::COPIES;
use super::{
    Holders, KNOWN_INCOMPATIBLE, KNOWN_READ_ONLY_COMPATIBLE, Opened, Summary, Superblock, SuperblockError,
};

/// What is in the place of a copy.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// It cannot be read.
    Unreadable(Arc<IoError>),
    /// Something else.
    NoMagic,
    /// A superblock that does not count, and why.
    Damaged(&'static str),
    /// A whole superblock of another version.
    Foreign(u32),
    /// A superblock, and its bytes without the number of the copy.
    Valid(Box<Superblock>, Box<[u8; BODY]>),
}

impl Found {
    pub(super) fn superblock(&self) -> Option<&Superblock> {
        match self {
            Self::Valid(superblock, _) => Some(superblock),
            _ => None,
        }
    }

    fn agrees_with(&self, other: &Self) -> bool {
        matches!((self, other), (Self::Valid(_, a), Self::Valid(_, b)) if a == b)
    }

    fn describe(&self) -> String {
        match self {
            Self::Unreadable(error) => format!("cannot be read ({})", error.cause()),
            Self::NoMagic => "is something else".into(),
            Self::Damaged(problem) => (*problem).into(),
            Self::Foreign(version) => format!("has version {version}"),
            Self::Valid(superblock, _) => format!("has sequence {}", superblock.sequence),
        }
    }
}

/// The decision.
pub(super) fn choose(found: &[Found; COPIES]) -> Result<Opened, SuperblockError> {
    let mut foreign = found.iter().filter_map(|copy| match copy {
        Found::Foreign(version) => Some(*version),
        _ => None,
    });
    if let (Some(version), Some(_)) = (foreign.next(), foreign.next()) {
        return Err(SuperblockError::ForeignVersion { version });
    }
    let Some(chosen) = best_pair(found)? else {
        return Err(nothing_agrees(found));
    };
    let Some(superblock) = chosen.superblock().copied() else {
        return Err(nothing_agrees(found));
    };
    let bits = superblock.features.incompatible & !KNOWN_INCOMPATIBLE;
    if bits != 0 {
        return Err(SuperblockError::UnknownFeature { bits });
    }
    let highest = found
        .iter()
        .filter_map(Found::superblock)
        .map(|copy| copy.sequence)
        .max();
    let highest = highest.unwrap_or(superblock.sequence);
    if highest > superblock.sequence {
        cover!("superblock: a single newer copy is ignored");
    }
    Ok(Opened {
        superblock,
        next_sequence: highest + 1,
        unknown_read_only: superblock.features.read_only_compatible & !KNOWN_READ_ONLY_COMPATIBLE,
        holders: Holders(std::array::from_fn(|copy| found[copy].agrees_with(chosen))),
    })
}

/// Of those that at least two agree on, one with the highest sequence.
fn best_pair(found: &[Found; COPIES]) -> Result<Option<&Found>, SuperblockError> {
    let mut best: Option<(&Found, u64)> = None;
    for copy in found {
        let Some(sequence) = copy.superblock().map(|superblock| superblock.sequence) else {
            continue;
        };
        if found.iter().filter(|other| copy.agrees_with(other)).count() < 2 {
            continue;
        }
        match best {
            Some((other, highest)) if highest == sequence && !copy.agrees_with(other) => {
                return Err(SuperblockError::Conflict { sequence });
            }
            Some((_, highest)) if highest >= sequence => {}
            _ => best = Some((copy, sequence)),
        }
    }
    Ok(best.map(|(copy, _)| copy))
}

fn nothing_agrees(found: &[Found; COPIES]) -> SuperblockError {
    if found.iter().all(|copy| matches!(copy, Found::NoMagic)) {
        return SuperblockError::NotAFileSystem;
    }
    let any = found.iter().any(|copy| copy.superblock().is_some());
    let found = Summary(std::array::from_fn(|copy| found[copy].describe()));
    if any {
        cover!("superblock: fewer than two copies agree");
        return SuperblockError::TooFewCopies { found };
    }
    SuperblockError::Damaged { found }
}
