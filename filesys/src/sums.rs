//! Checksums of data: CRC-32C of each sub-cluster, by its place on the volume.
//!
//! Data are overwritten where they are, so data and checksum cannot change in one moment. The answer is that of a dirty-region log: before
//! the first write to the 4 MiB that one page of checksums covers, a record says that they are not to be trusted should there be a crash. A
//! checkpoint has the checksums, and so ends that, except for pages into which data are on their way just then: they get the record
//! anew. So writes over the same regions cost no metadata, and what is damaged outside of regions that were written shortly before
//! a crash is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need};
use crate::error::{FsError, Refusal};
use crate::file::{Part, entry_of, sum_of};
use crate::file_core::FileCore;
use crate::journal::Ticket;
use crate::record::{LARGEST, Record, UNCHECKED_BYTES};
use crate::state::{State, Stop};
use crate::tree::codec::Kind;
use crate::tree::node::Body;
use crate::units::{Location, SUB_CLUSTER, SUBS, SubMask, VolumeIndex};
use crate::volume::VolumeCore;

/// Pages of checksums that writes are changing.
#[derive(Debug, Default)]
pub(crate) struct Unchecked {
    /// Said to be not trusted since the last checkpoint began.
    said: BTreeMap<(VolumeIndex, u32), u64>,
    /// Said before, since the last checkpoint that is durable began.
    earlier: BTreeSet<(VolumeIndex, u32)>,
    /// Data on their way.
    running: BTreeMap<(VolumeIndex, u32), u32>,
}

impl Unchecked {
    /// A checkpoint is durable.
    pub(crate) fn checkpointed(&mut self) {
        self.earlier.clear();
    }
}

/// Data with checksums are on their way.
pub(crate) struct Checking<'a, V, C> {
    core: &'a Core<V, C>,
    pages: Vec<(VolumeIndex, u32)>,
}

impl<V, C> Drop for Checking<'_, V, C> {
    fn drop(&mut self) {
        let mut unchecked = self.core.unchecked.borrow_mut();
        for page in &self.pages {
            if let Some(count) = unchecked.running.get_mut(page) {
                *count -= 1;
                if *count == 0 {
                    unchecked.running.remove(page);
                }
            }
        }
    }
}

/// Sub-cluster numbers of a volume, first and count.
fn subs_of(part: Part, at: Location) -> (u64, u64) {
    let first = (at.offset() + part.start) / SUB_CLUSTER;
    let end = (at.offset() + part.end).div_ceil(SUB_CLUSTER);
    (first, end - first)
}

fn page_of(sub: u64) -> u32 {
    u32::try_from(sub >> Kind::Sums.leaf_bits()).unwrap_or(u32::MAX)
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Data with checksums are about to be written to these places.
    pub(crate) async fn begin_checked(
        &self,
        ticket: &Ticket,
        located: &[(Part, Location)],
    ) -> Result<Checking<'_, V, C>, FsError> {
        let subs = located.iter().map(|(part, at)| {
            let (first, count) = subs_of(*part, *at);
            (at.volume, first, count)
        });
        self.begin_checked_subs(Some(ticket), subs).await
    }

    /// As [`Self::begin_checked`], for runs of sub-clusters: volume, first, count. Whoever has a ticket has room for this, too: with a
    /// second one, those who wait for theirs could wait for each other.
    async fn begin_checked_subs(
        &self,
        ticket: Option<&Ticket>,
        subs: impl Iterator<Item = (VolumeIndex, u64, u64)>,
    ) -> Result<Checking<'_, V, C>, FsError> {
        let mut pages: Vec<_> = subs
            .flat_map(|(volume, first, count)| {
                (page_of(first)..=page_of(first + count.max(1) - 1)).map(move |page| (volume, page))
            })
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let own;
        let ticket = match ticket {
            Some(ticket) => ticket,
            None => {
                let bytes = LARGEST.max(pages.len() * UNCHECKED_BYTES);
                own = self.admit(bytes, Need::Ordinary).await?;
                &own
            }
        };
        let checking = {
            let mut unchecked = self.unchecked.borrow_mut();
            for page in &pages {
                *unchecked.running.entry(*page).or_default() += 1;
            }
            Checking { core: self, pages }
        };
        let (group, ()) = self
            .transact_admitted(ticket, |_| {
                let unchecked = self.unchecked.borrow();
                let new = checking
                    .pages
                    .iter()
                    .filter(|page| !unchecked.said.contains_key(page));
                let records = new.map(|(volume, page)| Record::Unchecked {
                    volume: *volume,
                    page: *page,
                });
                Ok((records.collect::<Vec<_>>(), ()))
            })
            .await?;
        let last = {
            let mut unchecked = self.unchecked.borrow_mut();
            for page in &checking.pages {
                unchecked.said.entry(*page).or_insert(group);
            }
            checking
                .pages
                .iter()
                .filter_map(|page| unchecked.said.get(page))
                .max()
                .copied()
        };
        if let Some(group) = last {
            self.commit(group).await?;
        }
        Ok(checking)
    }

    /// Data whose checksums are not known have these: number of the sub-cluster, checksum. Nobody writes there.
    pub(crate) async fn fill_sums(&self, volume: &VolumeCore<V>, sums: &[(u64, u32)]) -> Result<(), FsError> {
        let subs = sums.iter().map(|(sub, _)| (volume.index, *sub, 1));
        let _checking = self.begin_checked_subs(None, subs).await?;
        self.look(|state| {
            for (index, sum) in sums {
                volume
                    .sums
                    .change(&state.pages, *index, |body| put_sum(body, *index, *sum))?;
            }
            Ok(())
        })
        .await
    }

    /// A checkpoint begins: what was said before does not count after it.
    pub(crate) fn begin_checked_again(&self) -> Result<(), FsError> {
        let pages: Vec<_> = {
            let mut unchecked = self.unchecked.borrow_mut();
            let said = std::mem::take(&mut unchecked.said);
            unchecked.earlier.extend(said.into_keys());
            unchecked.running.keys().copied().collect()
        };
        if pages.is_empty() {
            return Ok(());
        }
        block_io::cover!("filesys: a checkpoint began while data with checksums were on their way");
        let records: Vec<_> = pages
            .iter()
            .map(|(volume, page)| Record::Unchecked {
                volume: *volume,
                page: *page,
            })
            .collect();
        let group = match self.execute(&records) {
            Ok(group) => group,
            Err(Refusal::Error(error)) => return Err(error),
            Err(Refusal::Stop(stop)) => {
                return Err(FsError::State {
                    object: "checksums".into(),
                    problem: format!("{stop:?}"),
                });
            }
        };
        let mut unchecked = self.unchecked.borrow_mut();
        for page in pages {
            unchecked.said.insert(page, group);
        }
        Ok(())
    }

    /// The data are where they belong: these are their checksums, in order.
    pub(crate) async fn put_sums(
        &self,
        file: &FileCore,
        located: &[(Part, Location)],
        sums: &[u32],
    ) -> Result<(), FsError> {
        let mut rest = sums;
        for (part, at) in located {
            let (first, count) = subs_of(*part, *at);
            let (these, others) = rest.split_at(usize::try_from(count).unwrap_or(0).min(rest.len()));
            rest = others;
            self.look(|state| {
                let volume = state.volume(at.volume)?;
                if !entry_of(file, part.cluster())?.is_checked() {
                    // What else is in the cluster has none; those that an earlier user of the place has left are not its.
                    forget(state, &volume, *at, SubMask(!part.touched().0))?;
                }
                for (index, sum) in (first..).zip(these) {
                    // Of data that may be lost, nothing is known.
                    let sum = &if volume.failed.get() { 0 } else { *sum };
                    volume
                        .sums
                        .change(&state.pages, index, |body| put_sum(body, index, *sum))?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Data are about to be copied from one place to another, with their checksums.
    pub(crate) async fn begin_copy(
        &self,
        source: &VolumeCore<V>,
        target: &VolumeCore<V>,
        to: u64,
        count: u64,
    ) -> Result<Option<Checking<'_, V, C>>, FsError> {
        if source.sums.is_empty() && target.sums.is_empty() {
            return Ok(None);
        }
        let run = std::iter::once((target.index, to, count));
        Ok(Some(self.begin_checked_subs(None, run).await?))
    }

    /// Data were copied: so are their checksums.
    pub(crate) async fn copy_sums(
        &self,
        source: &VolumeCore<V>,
        from: u64,
        target: &VolumeCore<V>,
        to: u64,
        count: u64,
    ) -> Result<(), FsError> {
        self.look(|state| {
            for index in 0..count {
                let sum = sum_of(source, from + index)?;
                if sum_of(target, to + index)? != sum {
                    target
                        .sums
                        .change(&state.pages, to + index, |body| put_sum(body, to + index, sum))?;
                }
            }
            Ok(())
        })
        .await
    }

    /// These sub-clusters of a cluster have no checksums.
    pub(crate) async fn forget_sums(&self, at: Location, mask: SubMask) -> Result<(), FsError> {
        self.look(|state| Ok(forget(state, &*state.volume(at.volume)?, at, mask)?))
            .await
    }

    /// What checksums speak of is durable before they are.
    pub(crate) async fn flush_checked(&self) -> Result<(), FsError> {
        let volumes: Vec<_> = self.state.volumes.borrow().values().map(Rc::clone).collect();
        for volume in volumes {
            if !volume.sums.is_empty() && !volume.failed.get() {
                // If it fails, its checksums are not trusted, and the checkpoint begins anew.
                drop(self.flush_volume(&volume, volume.written.get()).await);
            }
        }
        let said = self.unchecked.borrow().said.values().max().copied();
        match said {
            Some(group) => self.commit(group).await,
            None => Ok(()),
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// A checkpoint must not have checksums of data that may be lost with a volume that failed.
    pub(crate) async fn distrust_sums(&self) -> Result<(), FsError> {
        let pages: Vec<_> = {
            let volumes = self.state.volumes.borrow();
            let failed = |index| volumes.get(index).is_some_and(|volume| volume.failed.get());
            let unchecked = self.unchecked.borrow();
            let all = unchecked.earlier.iter().chain(unchecked.said.keys());
            all.filter(|(volume, _)| failed(volume)).copied().collect()
        };
        for (volume, page) in pages {
            block_io::cover!("filesys: checksums of a volume that failed are not trusted");
            self.look(|state| {
                let volume = state.volume(volume)?;
                let first = u64::from(page) << Kind::Sums.leaf_bits();
                volume.sums.change(&state.pages, first, |body| {
                    if let Body::Sums(sums) = body {
                        sums.fill(0);
                    }
                })?;
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

fn forget<V>(state: &State<V>, volume: &VolumeCore<V>, at: Location, mask: SubMask) -> Result<(), Stop> {
    let first = at.offset() / SUB_CLUSTER;
    for sub in (0..SUBS).filter(|sub| mask.contains(*sub)) {
        let index = first + u64::from(sub);
        if sum_of(volume, index)? != 0 {
            block_io::cover!("filesys: a checksum of an earlier user of a place was forgotten");
            volume
                .sums
                .change(&state.pages, index, |body| put_sum(body, index, 0))?;
        }
    }
    Ok(())
}

fn put_sum(body: &mut Body, index: u64, sum: u32) {
    if let Body::Sums(sums) = body {
        let slot = usize::try_from(index % sums.len() as u64).unwrap_or(0);
        sums[slot] = sum;
    }
}
