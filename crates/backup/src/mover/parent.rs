//! What of a disk is in the parent backup already.

use std::io;

use api::Problem;

use super::image::Image;
use crate::archive::{Chain, ChainError, Header};
use crate::plan::{Content, Extent, Kind, Plan};

/// Most runs that are remembered: 40 bytes each.
const MAX_RUNS: usize = 16 << 20;

/// A run of a disk whose bytes the parent has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    disk: usize,
    start: u64,
    end: u64,
    entry: u64,
    at: u64,
}

/// Part of a range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It has to be read.
    Read {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// The parent has it.
    InParent {
        /// First byte on the disk.
        start: u64,
        /// Bytes.
        length: u64,
        /// The parent's entry.
        entry: u64,
        /// Where in that entry.
        at: u64,
    },
}

/// What the parent has, and what has changed since.
#[derive(Debug, Default)]
pub(super) struct InParent {
    held: Vec<Held>,
    /// Ranges that were written since, by disk, in order.
    changed: Vec<Vec<(u64, u64)>>,
}

impl InParent {
    /// Finds what the parent, the first of `chain`, has. `notes` tells of disks of which all has to be read.
    pub(super) fn of(
        chain: &mut Chain,
        plan: &Plan,
        image: &Image,
        notes: &mut Vec<String>,
        tick: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<Self, ChainError> {
        let parent = &chain.header().clone();
        let mut changed = vec![None; plan.disks.len()];
        // Of a disk of the parent, its number here.
        let mut here = vec![None; parent.plan.disks.len()];
        for (number, disk) in plan.disks.iter().enumerate() {
            let old = parent.plan.disks.iter().position(|old| old.disk == disk.disk);
            let Some(old) = old else {
                notes.push(format!("{}: the parent does not have it", disk.disk));
                continue;
            };
            match since(parent, old, number, plan, image) {
                Ok(ranges) => {
                    changed[number] = Some(ranges);
                    here[old] = Some(number);
                }
                Err(problem) => notes.push(format!("{}: all of it is read: {}", disk.disk, problem.detail)),
            }
        }
        let mut runs = Self {
            held: Vec::new(),
            changed: changed.into_iter().map(Option::unwrap_or_default).collect(),
        };
        if here.iter().any(Option::is_some) {
            runs.scan(chain, &here, tick)?;
        }
        Ok(runs)
    }

    fn scan(
        &mut self,
        chain: &mut Chain,
        here: &[Option<usize>],
        tick: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<(), ChainError> {
        chain.entries(|number, entry, more| {
            tick()?;
            match &entry.kind {
                Kind::File {
                    content: Content::Extents { extents, .. },
                    ..
                } => self.hold(number, extents, here),
                Kind::Disk { disk, size } => {
                    let whole = Extent {
                        offset: 0,
                        length: *size,
                        at: Some(crate::plan::Place {
                            disk: *disk,
                            start: 0,
                        }),
                    };
                    self.hold(number, &[whole], here);
                }
                _ => {}
            }
            self.hold(number, more, here);
            Ok(())
        })?;
        self.held.sort_unstable();
        // Of what several entries share, one is enough.
        let mut end = (0, 0);
        self.held.retain_mut(|held| {
            if end.0 == held.disk && end.1 > held.start {
                let skip = end.1.min(held.end) - held.start;
                held.start += skip;
                held.at += skip;
            }
            if held.start < held.end {
                end = (held.disk, held.end);
            }
            held.start < held.end
        });
        Ok(())
    }

    fn hold(&mut self, entry: u64, extents: &[Extent], here: &[Option<usize>]) {
        for extent in extents {
            let Some(at) = extent.at.filter(|_| self.held.len() < MAX_RUNS) else {
                continue;
            };
            let disk = usize::try_from(at.disk)
                .ok()
                .and_then(|old| here.get(old).copied().flatten());
            if let (Some(disk), Some(end)) = (disk, at.start.checked_add(extent.length)) {
                self.held.push(Held {
                    disk,
                    start: at.start,
                    end,
                    entry,
                    at: extent.offset,
                });
            }
        }
    }

    /// What of a range of a disk the parent has.
    pub(super) fn parts(&self, disk: usize, start: u64, length: u64) -> Vec<Part> {
        let mut parts = Vec::new();
        let end = start.saturating_add(length);
        let changed = self.changed.get(disk).map(Vec::as_slice).unwrap_or_default();
        let mut at = start;
        while at < end {
            let next = changed.partition_point(|(_, stop)| *stop <= at);
            let (is_changed, mut stop) = match changed.get(next) {
                Some((from, to)) if *from <= at => (true, end.min(*to)),
                Some((from, _)) => (false, end.min(*from)),
                None => (false, end),
            };
            let held = self
                .held
                .partition_point(|held| (held.disk, held.end) <= (disk, at));
            let held = self
                .held
                .get(held)
                .filter(|held| held.disk == disk && !is_changed);
            match held {
                Some(held) if held.start <= at => {
                    stop = stop.min(held.end);
                    parts.push(Part::InParent {
                        start: at,
                        length: stop - at,
                        entry: held.entry,
                        at: held.at + (at - held.start),
                    });
                }
                held => {
                    if let Some(held) = held {
                        stop = stop.min(held.start);
                    }
                    match parts.last_mut() {
                        Some(Part::Read { start, length }) if *start + *length == at => *length += stop - at,
                        _ => parts.push(Part::Read {
                            start: at,
                            length: stop - at,
                        }),
                    }
                }
            }
            at = stop;
        }
        parts
    }
}

/// Ranges of a disk that were written since the parent's image, whether they read as zeroes now or not.
fn since(
    parent: &Header,
    old: usize,
    number: usize,
    plan: &Plan,
    image: &Image,
) -> Result<Vec<(u64, u64)>, Problem> {
    let gone = || {
        let text = "the snapshot of the parent is not there any more, or is another one";
        Problem::new(api::ProblemKind::NotFound, text)
    };
    let (Some(disk), Some(before)) = (plan.disks.get(number), parent.plan.disks.get(old)) else {
        return Err(gone());
    };
    let identity = image.identity_of(&disk.disk, &before.snapshot)?;
    if parent.image.get(old).map(|image| &image.identity) != Some(&identity) {
        return Err(gone());
    }
    let changed = image.changed(&disk.disk, &before.snapshot, &disk.snapshot)?;
    Ok(changed
        .into_iter()
        .map(|range| (range.offset, range.offset.saturating_add(range.length)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_has_and_was_not_changed_is_not_read() {
        let held = |start, end, entry| Held {
            disk: 0,
            start,
            end,
            entry,
            at: start + 1000,
        };
        let parent = InParent {
            held: vec![held(100, 200, 1), held(200, 300, 2), held(400, 500, 3)],
            changed: vec![vec![(150, 160), (420, 600)]],
        };
        let read = |start, length| Part::Read { start, length };
        let has = |start, length, entry| Part::InParent {
            start,
            length,
            entry,
            at: start + 1000,
        };
        assert_eq!(
            parent.parts(0, 50, 500),
            [
                read(50, 50),
                has(100, 50, 1),
                read(150, 10),
                has(160, 40, 1),
                has(200, 100, 2),
                read(300, 100),
                has(400, 20, 3),
                read(420, 130),
            ]
        );
        assert_eq!(parent.parts(1, 0, 10), [read(0, 10)]);
        assert_eq!(InParent::default().parts(0, 0, 10), [read(0, 10)]);
    }
}
