//! Changes of maps, made in the order of the maps instead of the journal's.
//!
//! Nearly all records of a journal are small changes of maps, in the order in which somebody wrote to disks: at random. Made one by one, each
//! costs walks through two trees whose pages no cache of the processor has, and a page that is not in memory is waited for alone. So a
//! replay collects them and makes many at once, page by page:
//!
//! ```text
//!   journal    f1:7  f2:900  f1:5  f2:901  f1:7 …      in order of time
//!   maps       f1:5  f1:7 f1:7 │ f2:900 f2:901 …       by file and page, and of one page in order of time
//!   bitmaps    v1:30 set │ v1:31 set, clear, set …     by volume and page, and of one cluster in order of time
//! ```
//!
//! This is the same as making them in order of time: changes of different pages do not see each other, and what they do to the bit of one
//! cluster stays in order, so that whoever takes a cluster before it was given up is noticed. All other records are made at
//! their time, after everything that was collected before ([`Sorted::take`]).

use block_io::BlockDevice;

use super::apply::{MAP_PAGE, check_range, clusters_of, entries_of};
use super::{Damage, State, Stop};
use crate::entry::Entry;
use crate::file_core::FileCore;
use crate::record::Record;
use crate::tree::leaf::MapLeaf;
use crate::tree::node::{Body, FANOUT, Missing};
use crate::units::{FileId, Location, SUBS};

/// Entries whose changes are collected, at most: with their bits, below 20 MiB.
const MOST: u64 = 1 << 18;

/// A change within one page of a map.
#[derive(Debug)]
struct Change {
    file: FileId,
    page: u32,
    time: u32,
    what: What,
}

#[derive(Debug)]
enum What {
    /// So many entries from this one of the page on become a run.
    Map {
        first: u16,
        count: u16,
        entry: Entry,
        moved: bool,
    },
    /// These sub-clusters of the page lose their content.
    Clear { first: u16, end: u16, zero: bool },
}

/// What a change does to the bit of a cluster.
#[derive(Debug)]
struct Bit {
    at: Location,
    time: u32,
    used: bool,
}

/// Changes that wait.
#[derive(Debug, Default)]
pub(crate) struct Sorted {
    changes: Vec<Change>,
    entries: u64,
}

impl Sorted {
    /// Takes a record that can wait. False: it cannot, or what was taken before can wait no longer.
    pub(crate) fn take(&mut self, record: &Record) -> bool {
        let subs = u64::from(SUBS);
        let (file, first, end) = match record {
            Record::Map {
                file, first, count, ..
            } => (*file, u64::from(*first), u64::from(*first) + u64::from(*count)),
            Record::Clear {
                file, first, count, ..
            } => (*file, first / subs, first.saturating_add(*count).div_ceil(subs)),
            _ => return false,
        };
        let page = first / MAP_PAGE;
        let in_page = first < end && (end - 1) / MAP_PAGE == page && check_range(file, first, end).is_ok();
        let what = match record {
            Record::Map { entry, moved, .. } => What::Map {
                first: small(first % MAP_PAGE),
                count: small(end - first),
                entry: *entry,
                moved: *moved,
            },
            Record::Clear {
                first, count, zero, ..
            } => What::Clear {
                first: small(first - page * MAP_PAGE * subs),
                end: small(
                    first
                        .saturating_add(*count)
                        .saturating_sub(page * MAP_PAGE * subs),
                ),
                zero: *zero,
            },
            _ => return false,
        };
        if !in_page || self.entries + (end - first) > MOST {
            return false;
        }
        self.entries += end - first;
        self.changes.push(Change {
            file,
            page: u32::try_from(page).unwrap_or(u32::MAX),
            time: u32::try_from(self.changes.len()).unwrap_or(u32::MAX),
            what,
        });
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// What [`Self::apply`] needs and has not in memory. To be asked until there is nothing: below what is missing, more may be.
    pub(crate) fn missing<V: BlockDevice>(&mut self, state: &State<V>) -> Result<Vec<Missing>, Damage> {
        let key = |change: &Change| (change.file, change.page, change.time);
        self.changes.sort_unstable_by_key(key);
        let firsts = self.changes.chunk_by(in_same_page).filter_map(<[Change]>::first);
        needed(firsts.map(|change| {
            let file = state.file(change.file)?;
            State::<V>::map_of(&file)?.look(first_of(change))?;
            Ok(())
        }))
    }

    /// Changes the maps, for which nothing is [missing](Self::missing). What it does to bitmaps is left to do.
    pub(crate) fn apply<V: BlockDevice>(&mut self, state: &State<V>) -> Result<Bits, Stop> {
        let mut bits = Bits::default();
        for changes in self.changes.chunk_by(in_same_page) {
            let Some(first) = changes.first() else { continue };
            let file = state.file(first.file)?;
            apply_page(state, &file, first_of(first), changes, &mut bits)?;
        }
        self.changes.clear();
        self.entries = 0;
        // Stable: what one change does to one cluster is in order already.
        bits.0.sort_by_key(|bit| (bit.at, bit.time));
        Ok(bits)
    }
}

/// The first cluster of the page.
fn first_of(change: &Change) -> u64 {
    u64::from(change.page) * MAP_PAGE
}

fn in_same_page(one: &Change, other: &Change) -> bool {
    (one.file, one.page) == (other.file, other.page)
}

/// Numbers within a page: of clusters or of sub-clusters, so at most 4096.
fn small(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// Pages that are missing, each once.
fn needed(looks: impl Iterator<Item = Result<(), Stop>>) -> Result<Vec<Missing>, Damage> {
    let mut missing: Vec<Missing> = Vec::new();
    for look in looks {
        match look {
            Ok(()) => {}
            Err(Stop::Missing(page)) => missing.push(page),
            Err(Stop::Damaged(damage)) => return Err(damage),
        }
    }
    missing.sort_by_key(|page| page.ptr.block);
    missing.dedup_by_key(|page| page.ptr.block);
    Ok(missing)
}

/// Makes the changes of one page.
fn apply_page<V: BlockDevice>(
    state: &State<V>,
    file: &FileCore,
    first: u64,
    changes: &[Change],
    bits: &mut Bits,
) -> Result<(), Stop> {
    let map = State::<V>::map_of(file)?;
    let before = entries_of(map, first)?;
    let mut after = before;
    let (mut gained, mut lost, mut moved) = (0, 0, 0);
    for change in changes {
        let mut put = |entry: &mut Entry, new: Entry| {
            let (old, now) = (entry.location(), new.location());
            *entry = new;
            if old == now {
                return;
            }
            for (place, used, count) in [(now, true, &mut gained), (old, false, &mut lost)] {
                if let Some(at) = place {
                    *count += 1;
                    let time = change.time;
                    bits.0.push(Bit { at, time, used });
                }
            }
        };
        match &change.what {
            What::Map {
                first,
                count,
                entry: run,
                moved: is_moved,
            } => {
                moved += u64::from(*is_moved);
                let entries = after.iter_mut().skip(usize::from(*first));
                for (entry, number) in entries.zip(0..u64::from(*count)) {
                    put(entry, run.nth(number));
                }
            }
            What::Clear { first, end, zero } => {
                for (cluster, mask) in clusters_of(u64::from(*first), u64::from(*end)) {
                    let index = usize::try_from(cluster).unwrap_or(FANOUT);
                    if let Some(entry) = after.get_mut(index) {
                        let new = entry.without(mask, *zero);
                        put(entry, new);
                    }
                }
            }
        }
    }
    file.change(|inode| {
        inode.allocated = (inode.allocated + gained).saturating_sub(lost);
        inode.placement += lost + moved;
    });
    if after != before {
        map.change(&state.pages, first, |body| {
            if let Body::Map(entries) = body {
                *entries = MapLeaf::of(&after);
            }
        })?;
    }
    Ok(())
}

/// What is left to do to bitmaps, in order of clusters, and of one cluster in order of time.
#[derive(Debug, Default)]
#[must_use = "maps and bitmaps must say the same"]
pub(crate) struct Bits(Vec<Bit>);

impl Bits {
    /// As [`Sorted::missing`].
    pub(crate) fn missing<V: BlockDevice>(&self, state: &State<V>) -> Result<Vec<Missing>, Damage> {
        let firsts = self.0.chunk_by(in_same_bitmap_page).filter_map(<[Bit]>::first);
        needed(firsts.map(|bit| Ok(state.volume(bit.at.volume)?.ensure(bit.at.cluster)?)))
    }

    /// Changes the bitmaps, for which nothing is missing.
    pub(crate) fn apply<V: BlockDevice>(&self, state: &State<V>) -> Result<(), Stop> {
        for bits in self.0.chunk_by(in_same_bitmap_page) {
            let Some(first) = bits.first() else { continue };
            let volume = state.volume(first.at.volume)?;
            let wrong = volume.mark_all(&state.pages, bits.iter().map(|bit| (bit.at.cluster, bit.used)))?;
            if let Some((cluster, used)) = wrong {
                let problem = if used {
                    "a file gets it while it is in use"
                } else {
                    "a file frees it while it is free"
                };
                let object = format!("cluster {cluster} of volume {}", volume.record().name);
                return Err(Damage::new(object, problem).into());
            }
        }
        Ok(())
    }
}

fn in_same_bitmap_page(one: &Bit, other: &Bit) -> bool {
    let page = |bit: &Bit| (bit.at.volume, bit.at.cluster / crate::tree::node::BITS);
    page(one) == page(other)
}

#[cfg(test)]
mod tests;
