//! Where the bytes of a range are.

use std::rc::Rc;

use block_io::{BlockDevice, Clock};
use smallvec::SmallVec;

use super::handle::File;
use crate::entry::Entry;
use crate::file_core::{Chain, FileCore};
use crate::state::{Damage, State, Stop};
use crate::tree::node::Missing;
use crate::units::{CLUSTER, Location, SUB_CLUSTER, SubMask};
use crate::volume::VolumeCore;

/// Where bytes come from.
#[derive(Debug)]
pub(super) enum Source<V> {
    /// They are zero.
    Zero,
    /// From this byte of a volume on.
    Data {
        volume: Rc<VolumeCore<V>>,
        offset: u64,
        /// Their sub-clusters have checksums.
        checked: bool,
    },
}

/// Bytes of a range that come from one place.
#[derive(Debug)]
pub(super) struct Piece<V> {
    pub(super) source: Source<V>,
    pub(super) length: u64,
}

/// Bytes of a request in order; mostly they are one piece, which needs no memory of its own.
pub(super) type Pieces<V> = SmallVec<[Piece<V>; 1]>;

/// The bytes of one cluster, or of a part of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(super) cluster: u64,
    /// Bytes within the cluster.
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Part {
    pub(crate) fn cluster(self) -> u64 {
        self.cluster
    }

    pub(crate) fn touched(self) -> SubMask {
        SubMask::touched(self.start, self.end)
    }

    /// The file's cluster number as maps have it.
    pub(super) fn index(self) -> u32 {
        u32::try_from(self.cluster).unwrap_or(u32::MAX)
    }
}

/// Cuts a range at clusters.
pub(super) fn parts(offset: u64, length: u64) -> impl Iterator<Item = Part> {
    let end = offset + length;
    (offset / CLUSTER..end.div_ceil(CLUSTER)).map(move |cluster| Part {
        cluster,
        start: offset.saturating_sub(cluster * CLUSTER),
        end: (end - cluster * CLUSTER).min(CLUSTER),
    })
}

fn entry(file: &FileCore, cluster: u64) -> Result<Entry, Missing> {
    file.map().map_or(Ok(Entry::HOLE), |map| map.entry(cluster))
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    /// Where the bytes of a range are.
    pub(super) fn plan_read(
        &self,
        state: &State<V>,
        chain: &Chain,
        offset: u64,
        length: u64,
    ) -> Result<Pieces<V>, Stop> {
        let mut pieces = Pieces::new();
        for part in parts(offset, length) {
            let head = entry(&chain[0], part.cluster)?;
            let mask = part.touched().0;
            let from = part.cluster * CLUSTER + part.start;
            if head.valid() & mask == mask
                && let Some(at) = head.location()
            {
                push(
                    state,
                    &mut pieces,
                    Some((at, head.is_checked())),
                    part.start,
                    part.end,
                )?;
            } else if head.zero() & mask == mask || (chain.len() == 1 && head.valid() & mask == 0) {
                push(state, &mut pieces, None, part.start, part.end)?;
            } else if let Some(below) = self.layers.borrow().get(part.cluster) {
                push_below(state, &mut pieces, head, below, part)?;
            } else {
                let below = places_below(chain, part.cluster)?;
                push_below(state, &mut pieces, head, &below, part)?;
                self.layers.borrow_mut().put(part.cluster, below);
            }
            debug_assert!(from < offset + length);
        }
        Ok(pieces)
    }
}

/// What all ancestors together have of a cluster: places, each with the sub-clusters that are to be read there.
fn places_below(chain: &Chain, cluster: u64) -> Result<Vec<Entry>, Missing> {
    let mut found = Vec::new();
    let mut rest = u16::MAX;
    for file in chain.iter().skip(1) {
        let entry = entry(file, cluster)?;
        let valid = entry.valid() & rest;
        if valid != 0 {
            found.push(entry.with_kept(false).with_subs(valid, 0));
        }
        rest &= entry.holes();
        if rest == 0 {
            break;
        }
    }
    Ok(found)
}

/// A part of a cluster of which the head has not all.
fn push_below<V: BlockDevice>(
    state: &State<V>,
    pieces: &mut Pieces<V>,
    head: Entry,
    below: &[Entry],
    part: Part,
) -> Result<(), Damage> {
    let mask = part.touched().0;
    let owner = |entry: Entry| Some((entry.location()?, entry.is_checked()));
    if mask & !head.holes() == 0 {
        match below.iter().find(|entry| entry.valid() & mask != 0) {
            None => return push(state, pieces, None, part.start, part.end),
            Some(entry) if entry.valid() & mask == mask => {
                return push(state, pieces, owner(*entry), part.start, part.end);
            }
            Some(_) => {}
        }
    }
    let mut at = part.start;
    while at < part.end {
        let sub = u32::try_from(at / SUB_CLUSTER).unwrap_or(0);
        let end = ((u64::from(sub) + 1) * SUB_CLUSTER).min(part.end);
        let has = |mask: u16| SubMask(mask).contains(sub);
        let found = if has(head.holes()) {
            below.iter().copied().find(|entry| has(entry.valid()))
        } else {
            Some(head).filter(|head| has(head.valid()))
        };
        push(state, pieces, found.and_then(owner), at, end)?;
        at = end;
    }
    Ok(())
}

/// Bytes `start..end` of a cluster, joined with what is before if they follow it.
fn push<V: BlockDevice>(
    state: &State<V>,
    pieces: &mut Pieces<V>,
    owner: Option<(Location, bool)>,
    start: u64,
    end: u64,
) -> Result<(), Damage> {
    let length = end - start;
    match (pieces.last_mut(), owner) {
        (
            Some(Piece {
                source: Source::Zero,
                length: before,
            }),
            None,
        ) => *before += length,
        (
            Some(Piece {
                source:
                    Source::Data {
                        volume,
                        offset,
                        checked: was,
                    },
                length: before,
            }),
            Some((at, checked)),
        ) if volume.index == at.volume && *offset + *before == at.offset() + start && *was == checked => {
            *before += length;
        }
        (_, None) => pieces.push(Piece {
            source: Source::Zero,
            length,
        }),
        (_, Some((at, checked))) => pieces.push(Piece {
            source: Source::Data {
                volume: state.volume(at.volume)?,
                offset: at.offset() + start,
                checked,
            },
            length,
        }),
    }
    Ok(())
}
