//! A data volume whose flush failed: it takes no more writes, and the others go on.
//!
//! Nobody knows which of the data that were written to it since its last good flush are on it. Where they went over older data of the same
//! file, that is what a failed flush means: old or new. But where they got *new* sub-clusters, a map that shows them could show, after
//! a power cut, what somebody else had there before. So no such map may become durable. The groups of the journal that are not durable yet are taken
//! back from whatever they say of new data on this volume, in memory and in the journal at the same moment:
//!
//! ```text
//!   group n      durable           its data were flushed before: stays
//!   group n+1    being written     its data were flushed before: stays
//!   group n+2    waits             ┐ each "sub-cluster valid" on the failed volume is taken out of its records;
//!   group n+3    takes records     ┘ the sub-cluster is again what it was: a hole, or zero
//! ```
//!
//! Nobody was told that any of this is durable, as that needs the group; whoever waits for one is told of the failure ([`Core::check_durable`]).
//! It is as if the volume were a disk that has lost what was in its cache. Places stay allocated: the file's next write
//! there uses them.
//!
//! To know what a sub-cluster was, each change of a map that makes some valid notes it in [`Unproven`], until its group is durable.
//! What copies data from place to place flushes them before the record, so that nothing that was durable can be taken back.
//!
//! A checkpoint that was cut before a group was taken back has the wrong maps, so it is cut again ([`Core::taken_back`]).

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use block_io::{BlockDevice, Clock, IoError};

use crate::core::Core;
use crate::entry::Entry;
use crate::error::FsError;
use crate::event::Event;
use crate::file_core::FileCore;
use crate::journal::JournalError;
use crate::record::Record;
use crate::state::{Damage, Effects, Stop};
use crate::units::{FileId, Location, VolumeIndex};
use crate::volume::VolumeCore;
use crate::wire::{Malformed, Reader, Writer};

/// Sub-clusters that a record made valid, the same ones of clusters that follow each other in the file and on the volume.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Added {
    group: u64,
    file: FileId,
    /// The first cluster, and how many.
    cluster: u32,
    count: u32,
    at: Location,
    /// Those that were not valid before.
    subs: u16,
    /// Those of them that were zero; the others were holes.
    zero: u16,
}

impl Added {
    /// An entry of a file's map changes from `old` to `new`, which has a place. The group is known later.
    pub(crate) fn of(file: FileId, cluster: u32, old: Entry, new: Entry) -> Option<Self> {
        let at = new.location()?;
        let before = if old.location() == Some(at) {
            old.valid()
        } else {
            0
        };
        let subs = new.valid() & !before;
        Some(Self {
            group: u64::MAX,
            file,
            cluster,
            count: 1,
            at,
            subs,
            zero: old.zero() & subs,
        })
    }

    /// Takes what follows of the same record as well, if it goes on where this ends.
    pub(crate) fn take(&mut self, next: &Self) -> bool {
        let continues = self.continues(next);
        self.count += u32::from(continues);
        continues
    }

    /// Whether `next`, of the same record, goes on where this ends.
    fn continues(&self, next: &Self) -> bool {
        (next.file, next.cluster) == (self.file, self.cluster + self.count)
            && next.at == self.at.plus(self.count.into())
            && (next.subs, next.zero) == (self.subs, self.zero)
    }

    /// Cluster by cluster.
    fn each(self) -> impl Iterator<Item = Self> {
        (0..self.count).map(move |number| Self {
            cluster: self.cluster + number,
            count: 1,
            at: self.at.plus(number.into()),
            ..self
        })
    }
}

/// Memory for so many is kept.
const KEPT: usize = 1 << 14;
/// When there are more, what is not durable is made so without being asked for: 6 MiB.
const MOST: usize = 1 << 17;

/// What records of groups that are not durable made valid, in the order of the journal. Mostly one item for each record.
#[derive(Debug, Default)]
pub(crate) struct Unproven(VecDeque<Added>);

impl Unproven {
    /// Groups up to this one are durable.
    pub(crate) fn forget(&mut self, durable: u64) {
        while self.0.front().is_some_and(|added| added.group <= durable) {
            self.0.pop_front();
        }
        if self.0.is_empty() && self.0.capacity() > KEPT {
            self.0.shrink_to(KEPT);
        }
    }

    /// What the records of this group made valid. Whether there are too many now, and were not before.
    pub(crate) fn append(&mut self, added: &[Added], group: u64) -> bool {
        let were_many = self.are_many();
        self.0.extend(added.iter().map(|added| Added { group, ..*added }));
        !were_many && self.are_many()
    }

    /// Whether there are too many.
    pub(crate) fn are_many(&self) -> bool {
        self.0.len() > MOST
    }
}

/// Whether a record that gives such an entry may make sub-clusters valid. Moved data were made durable before.
pub(crate) fn adds(entry: Entry, moved: bool) -> bool {
    !moved && entry.valid() != 0
}

/// What a record that may make sub-clusters valid says: file, first cluster, count, entry.
fn adding(record: &Record) -> Option<(FileId, u32, u32, Entry)> {
    match record {
        Record::Map {
            file,
            first,
            count,
            entry,
            moved,
        } if adds(*entry, *moved) => Some((*file, *first, *count, *entry)),
        _ => None,
    }
}

/// What is taken back of the sub-clusters of one cluster of a file.
#[derive(Debug, Clone, Copy)]
struct Lost {
    at: Location,
    subs: u16,
    zero: u16,
}

impl Lost {
    fn of(added: &Added) -> Self {
        Self {
            at: added.at,
            subs: added.subs,
            zero: added.zero,
        }
    }

    /// A later record made more valid, or the same again.
    fn and(&mut self, added: &Added) {
        if self.at != added.at {
            *self = Self::of(added);
            return;
        }
        self.subs |= added.subs;
        self.zero = self.zero & !added.subs | added.zero;
    }

    /// The entry without what is lost.
    fn taken_from(&self, entry: Entry) -> Entry {
        if entry.location() != Some(self.at) {
            return entry;
        }
        let lost = entry.valid() & self.subs;
        entry.with_subs(entry.valid() & !lost, entry.zero() | self.zero & lost)
    }
}

type AllLost = BTreeMap<(FileId, u32), Lost>;

/// Why groups cannot be taken back.
#[derive(Debug, thiserror::Error)]
enum NotTakenBack {
    #[error("the changed records do not fit into the journal")]
    Journal(#[from] JournalError),
    #[error("a record in memory cannot be read")]
    Record(#[from] Malformed),
    #[error("the records of the journal are not those that were noted")]
    Order,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// A flush of a volume failed.
    pub(crate) fn fail_volume(&self, volume: &VolumeCore<V>, error: &IoError) {
        if volume.failed.replace(true) {
            return;
        }
        block_io::cover!("filesys: a volume failed");
        let name = volume.record().name;
        tracing::error!(volume = name, %error, cause = %error.cause(), "a volume takes no more writes: its flush failed");
        self.event(Event::VolumeFailed {
            volume: volume.index,
            name,
            reason: format!("{error}: {}", error.cause()),
        });
        self.taken_back.set(self.taken_back.get() + 1);
        if let Err(error) = self.take_back(volume) {
            self.fail(&error);
        }
        self.changed.notify();
    }

    /// Nothing of all that waits for becoming durable says any more that new data on this volume are valid.
    fn take_back(&self, volume: &VolumeCore<V>) -> Result<(), FsError> {
        let from = self.journal.first_unwritten();
        let unproven = self.unproven.borrow();
        let begin = unproven.0.partition_point(|added| added.group < from);
        if !unproven
            .0
            .range(begin..)
            .any(|added| added.at.volume == volume.index)
        {
            return Ok(());
        }
        block_io::cover!("filesys: writes to a volume that failed are taken back");
        let mut added = unproven.0.range(begin..).copied().flat_map(Added::each);
        let mut lost = AllLost::new();
        let rewritten = self.journal.rewrite(|bytes| -> Result<_, NotTakenBack> {
            without(bytes, volume.index, &mut added, &mut lost)
        });
        rewritten.map_err(|error| FsError::State {
            object: format!("volume {}", volume.record().name),
            problem: format!("its flush failed, and what was written to it cannot be taken back: {error}"),
        })?;
        drop(added);
        drop(unproven);
        let mut effects = Effects::default();
        for ((file, cluster), lost) in &lost {
            let known = self.state.files.borrow().get(file).map(Rc::clone);
            // A file that is gone has nothing to lose.
            let Some(map) = known.as_ref().and_then(|file| file.map()) else {
                continue;
            };
            // Pages with changes that are not durable are in memory.
            let entry = map
                .entry(u64::from(*cluster))
                .map_err(|_| Damage::new(file, "a page of its map that is not durable is not in memory"))?;
            let left = lost.taken_from(entry);
            if left != entry {
                let record = Record::Map {
                    file: *file,
                    first: *cluster,
                    count: 1,
                    entry: left,
                    moved: false,
                };
                self.state.apply(&record, &mut effects).map_err(Stop::left_out)?;
            }
        }
        self.take_effects(effects, self.journal.open_group());
        Ok(())
    }

    /// After a group has become durable: an error if what was written to this file may be lost, as a volume of its has failed. What was durable
    /// before is not, but nobody counts that.
    pub(crate) fn check_durable(&self, file: &FileCore) -> Result<(), FsError> {
        for index in file.written.borrow().keys() {
            if let Ok(volume) = self.state.volume(*index) {
                volume.check_works()?;
            }
        }
        Ok(())
    }
}

/// The records of a group without what is lost, which is collected in `lost`; none if nothing is. `added` goes along.
fn without(
    bytes: &[u8],
    volume: VolumeIndex,
    added: &mut impl Iterator<Item = Added>,
    lost: &mut AllLost,
) -> Result<Option<Vec<u8>>, NotTakenBack> {
    let mut reader = Reader(bytes);
    let mut writer = Writer::default();
    let mut changed = false;
    while !reader.is_empty() {
        let record = Record::decode(&mut reader)?;
        let Some((file, first, count, entry)) = adding(&record) else {
            record.encode(&mut writer);
            continue;
        };
        let here = entry.location().is_some_and(|at| at.volume == volume);
        let mut entries = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        for cluster in first..first + count {
            let noted = added.next().ok_or(NotTakenBack::Order)?;
            if (noted.file, noted.cluster) != (file, cluster) {
                return Err(NotTakenBack::Order);
            }
            let entry = entry.nth((cluster - first).into());
            entries.push(if here {
                let lost = lost
                    .entry((file, cluster))
                    .and_modify(|lost| lost.and(&noted))
                    .or_insert_with(|| Lost::of(&noted));
                lost.taken_from(entry)
            } else {
                entry
            });
        }
        changed |= (0_u64..)
            .zip(&entries)
            .any(|(number, left)| !entry.continues(*left, number));
        let mut records = Vec::new();
        for (cluster, entry) in (first..).zip(entries) {
            Record::push_map(&mut records, file, cluster, entry, false);
        }
        records.iter().for_each(|record| record.encode(&mut writer));
    }
    Ok(changed.then_some(writer.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::SubMask;

    const FILE: FileId = FileId(17);

    fn at(volume: u16, cluster: u64) -> Location {
        Location {
            volume: VolumeIndex(volume),
            cluster,
        }
    }

    fn map(first: u32, count: u32, entry: Entry) -> Record {
        Record::Map {
            file: FILE,
            first,
            count,
            entry,
            moved: false,
        }
    }

    fn added(cluster: u32, at: Location, subs: u16, zero: u16) -> Added {
        Added {
            group: 1,
            file: FILE,
            cluster,
            count: 1,
            at,
            subs,
            zero,
        }
    }

    fn bytes(records: &[Record]) -> Vec<u8> {
        let mut writer = Writer::default();
        records.iter().for_each(|record| record.encode(&mut writer));
        writer.0
    }

    fn left(records: &[Record], added: &[Added]) -> Result<Option<Vec<u8>>, NotTakenBack> {
        without(
            &bytes(records),
            VolumeIndex(1),
            &mut added.iter().copied(),
            &mut AllLost::new(),
        )
    }

    #[test]
    fn a_run_is_cut_where_something_else_is_left() {
        let entry = Entry::at(at(1, 70)).with_valid(SubMask::ALL);
        let records = [
            Record::Freeze {
                file: FILE,
                frozen: false,
            },
            map(5, 3, entry),
            map(9, 1, Entry::at(at(2, 8)).with_valid(SubMask(1))),
        ];
        let noted = [
            added(5, at(1, 70), u16::MAX, 0),
            added(6, at(1, 71), 0xff00, 0x8000),
            added(7, at(1, 72), 0, 0),
            added(9, at(2, 8), 1, 0),
        ];
        let expected = [
            records[0].clone(),
            map(5, 1, Entry::at(at(1, 70))),
            map(6, 1, Entry::at(at(1, 71)).with_subs(0x00ff, 0x8000)),
            map(7, 1, entry.nth(2)),
            records[2].clone(),
        ];
        assert_eq!(left(&records, &noted).unwrap(), Some(bytes(&expected)));
    }

    #[test]
    fn what_follows_is_noted_as_one_and_given_back_one_by_one() {
        let first = added(5, at(1, 70), 0xff, 0);
        let mut run = first;
        for (number, next) in [added(6, at(1, 71), 0xff, 0), added(7, at(1, 72), 0xff, 0)]
            .iter()
            .enumerate()
        {
            assert!(run.continues(next), "{number}");
            run.count += 1;
        }
        assert!(
            !run.continues(&added(8, at(1, 74), 0xff, 0)) && !run.continues(&added(8, at(1, 73), 0xff, 1))
        );
        let each: Vec<_> = run.each().map(|one| (one.cluster, one.count, one.at)).collect();
        assert_eq!(each, [(5, 1, at(1, 70)), (6, 1, at(1, 71)), (7, 1, at(1, 72))]);
    }

    #[test]
    fn what_was_zero_when_it_was_written_the_last_time_is_zero_again() {
        let first = Entry::at(at(1, 3)).with_subs(0b0011, 0);
        let clear = Record::Clear {
            file: FILE,
            first: 0,
            count: 1,
            zero: true,
        };
        let records = [map(0, 1, first), clear.clone(), map(0, 1, first)];
        let noted = [added(0, at(1, 3), 0b0011, 0), added(0, at(1, 3), 0b0001, 0b0001)];
        let expected = [
            map(0, 1, Entry::at(at(1, 3))),
            clear,
            map(0, 1, Entry::at(at(1, 3)).with_subs(0, 0b0001)),
        ];
        assert_eq!(left(&records, &noted).unwrap(), Some(bytes(&expected)));
    }

    #[test]
    fn groups_without_data_on_the_volume_stay_and_others_must_be_known() {
        let other = map(0, 1, Entry::at(at(2, 3)).with_subs(1, 0));
        let noted = added(0, at(2, 3), 1, 0);
        assert_eq!(left(std::slice::from_ref(&other), &[noted]).unwrap(), None);
        assert!(matches!(
            left(std::slice::from_ref(&other), &[]),
            Err(NotTakenBack::Order)
        ));
        let elsewhere = added(1, at(2, 3), 1, 0);
        assert!(matches!(left(&[other], &[elsewhere]), Err(NotTakenBack::Order)));
    }
}
