//! Data of files with checksums.

use std::ops::ControlFlow;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock};

use super::{Scrub, ScrubFinding, ScrubPhase};
use crate::entry::Entry;
use crate::error::FsError;
use crate::event::Event;
use crate::file::{data_sum, sum_of, whole};
use crate::file_core::FileCore;
use crate::heal::Healed;
use crate::state::entries_of;
use crate::tree::codec::Kind;
use crate::tree::node::FANOUT;
use crate::units::{CLUSTER, FileId, SUB_CLUSTER, SUBS, SubMask};
use crate::volume::VolumeCore;

const PAGE: u64 = FANOUT as u64;
/// Clusters of a step.
const STEP: usize = 16;

/// Data of a file in one run on a volume.
struct Extent<V> {
    volume: Rc<VolumeCore<V>>,
    /// First byte in the file.
    offset: u64,
    /// First byte on the volume.
    start: u64,
    length: u64,
}

/// Whether an extent has to be looked at again while nobody writes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Good,
    Again,
}

/// Whether others may write meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Writers,
    Nobody,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Scrub<'_, V, C> {
    pub(super) async fn data(&mut self, phase: ScrubPhase) -> Result<ControlFlow<()>, FsError> {
        self.gather().await?;
        let mut from = self.report.position.offset;
        while let Some(id) = self.next_file(self.report.position.object).await? {
            if id.0 != self.report.position.object {
                from = 0;
            }
            let core = self.core;
            if let Some(file) = core.look(|state| Ok(state.find_file(id)?)).await?
                && self.file(&file, from, phase).await?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
            from = 0;
            self.report.position.object = id.0 + 1;
            self.report.position.offset = 0;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The first file whose number is at least `from`.
    async fn next_file(&self, from: u64) -> Result<Option<FileId>, FsError> {
        self.core
            .look(|state| {
                let mut id = from;
                loop {
                    let Some(span) = state.objects.next(id)? else {
                        return Ok(None);
                    };
                    id = id.max(span.start);
                    let end = span.start + span.count.max(1);
                    while id < end {
                        if state.object(id)?.is_some_and(|root| root.kind == Kind::Map) {
                            return Ok(Some(FileId(id)));
                        }
                        id += 1;
                    }
                }
            })
            .await
    }

    async fn file(
        &mut self,
        file: &Rc<FileCore>,
        from: u64,
        phase: ScrubPhase,
    ) -> Result<ControlFlow<()>, FsError> {
        let core = self.core;
        let mut cluster = from / CLUSTER;
        loop {
            let next = core
                .look(|_| match file.map() {
                    Some(map) => Ok(map.next(cluster)?.map(|span| span.start.max(cluster))),
                    None => Ok(None),
                })
                .await?;
            let Some(first) = next else {
                return Ok(ControlFlow::Continue(()));
            };
            let end = (first + STEP as u64).min((first / PAGE + 1) * PAGE);
            if self.step(file, first, end, phase, Beside::Writers).await? == Seen::Again {
                let _alone = file.gate.alone(first / PAGE, first / PAGE).await;
                self.step(file, first, end, phase, Beside::Nobody).await?;
            }
            cluster = end;
            if self.pause(file.id.0, cluster * CLUSTER).await.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    async fn step(
        &mut self,
        file: &Rc<FileCore>,
        first: u64,
        end: u64,
        phase: ScrubPhase,
        beside: Beside,
    ) -> Result<Seen, FsError> {
        let core = self.core;
        // Places that are looked up now are not given away before this ends.
        let _running = core.epochs.begin();
        let entries = core
            .look(|_| match file.map() {
                Some(map) => Ok(entries_of(map, first / PAGE * PAGE)?),
                None => Ok([Entry::HOLE; FANOUT]),
            })
            .await?;
        let mut seen = Seen::Good;
        let counted = (self.report.data, self.report.unread);
        for extent in self.extents(&entries, first, end)? {
            let one = match phase {
                ScrubPhase::Data => self.stored(file, &extent, beside).await?,
                _ => self.copies(file, &extent, beside).await?,
            };
            if one == Seen::Again {
                seen = one;
            }
        }
        if seen == Seen::Again {
            (self.report.data, self.report.unread) = counted;
        }
        Ok(seen)
    }

    /// Runs of sub-clusters with checksums.
    fn extents(&self, entries: &[Entry; FANOUT], first: u64, end: u64) -> Result<Vec<Extent<V>>, FsError> {
        let mut extents: Vec<Extent<V>> = Vec::new();
        for cluster in first..end {
            let entry = entries[usize::try_from(cluster % PAGE).unwrap_or(0)];
            let Some(at) = entry.location().filter(|_| entry.is_checked()) else {
                continue;
            };
            for sub in (0..SUBS).filter(|sub| SubMask(entry.valid()).contains(*sub)) {
                let skip = u64::from(sub) * SUB_CLUSTER;
                let (offset, start) = (cluster * CLUSTER + skip, at.offset() + skip);
                match extents.last_mut() {
                    Some(last)
                        if last.volume.index == at.volume
                            && last.offset + last.length == offset
                            && last.start + last.length == start =>
                    {
                        last.length += SUB_CLUSTER;
                    }
                    _ => extents.push(Extent {
                        volume: self.core.state.volume(at.volume)?,
                        offset,
                        start,
                        length: SUB_CLUSTER,
                    }),
                }
            }
        }
        Ok(extents)
    }

    async fn sums(&self, extent: &Extent<V>) -> Result<Vec<u32>, FsError> {
        let first = extent.start / SUB_CLUSTER;
        let count = extent.length / SUB_CLUSTER;
        self.core
            .look(|_| {
                let sums = (first..first + count).map(|index| sum_of(&extent.volume, index));
                Ok(sums.collect::<Result<Vec<u32>, _>>()?)
            })
            .await
    }

    /// What is stored.
    async fn stored(
        &mut self,
        file: &Rc<FileCore>,
        extent: &Extent<V>,
        beside: Beside,
    ) -> Result<Seen, FsError> {
        let core = self.core;
        let mut buffer = AlignedBuffer::new(usize::try_from(extent.length).unwrap_or(0));
        let mut read = match core.copies_of(&extent.volume) {
            Some(copies) => copies.read_copy(0, extent.start, &whole(&buffer)).await,
            None => extent.volume.device.read(extent.start, &whole(&buffer)).await,
        };
        if read.is_err() {
            // The volume answers from others, and repairs.
            read = extent.volume.device.read(extent.start, &whole(&buffer)).await;
        }
        if let Err(error) = read {
            if beside == Beside::Writers {
                return Ok(Seen::Again);
            }
            self.lost(ScrubFinding::Unreadable {
                file: file.id,
                offset: extent.offset,
                problem: error.to_string(),
            });
            return Ok(Seen::Good);
        }
        self.report.data += extent.length;
        let known = self.sums(extent).await?;
        let size = usize::try_from(SUB_CLUSTER).unwrap_or(4096);
        let wrong = |sum: u32, sub: &[u8]| {
            let unknown = sum == 0 && self.options.fill && !core.options.read_only;
            unknown || sum != 0 && sum != data_sum(sub)
        };
        let differ = known
            .iter()
            .zip(buffer.as_slice().chunks(size))
            .any(|(sum, sub)| wrong(*sum, sub));
        if !differ {
            return Ok(Seen::Good);
        }
        if beside == Beside::Writers {
            return Ok(Seen::Again);
        }
        let healed = core
            .heal_data(&extent.volume, extent.start, buffer.as_mut_slice())
            .await?;
        self.note(file, extent.offset, &healed);
        if self.options.fill && !core.options.read_only {
            let unknown: Vec<(u64, u32)> = (extent.start / SUB_CLUSTER..)
                .zip(&known)
                .zip(buffer.as_slice().chunks(size))
                .filter(|((_, sum), _)| **sum == 0)
                .map(|((index, _), sub)| (index, data_sum(sub)))
                .collect();
            if !unknown.is_empty() {
                block_io::cover!("filesys: a scrub fills in checksums");
                core.fill_sums(&extent.volume, &unknown).await?;
                self.report.filled += unknown.len() as u64;
            }
        }
        Ok(Seen::Good)
    }

    /// The other copies.
    async fn copies(
        &mut self,
        file: &Rc<FileCore>,
        extent: &Extent<V>,
        beside: Beside,
    ) -> Result<Seen, FsError> {
        let core = self.core;
        let Some(copies) = core.copies_of(&extent.volume) else {
            return Ok(Seen::Good);
        };
        let known = self.sums(extent).await?;
        let size = usize::try_from(SUB_CLUSTER).unwrap_or(4096);
        for copy in 1..copies.telling(extent.start, extent.length) {
            let mut buffer = AlignedBuffer::new(usize::try_from(extent.length).unwrap_or(0));
            let read = copies.read_copy(copy, extent.start, &whole(&buffer)).await;
            if read.is_err() {
                // A device is missing, or the volume repairs it now: there is nothing to compare.
                self.report.unread += extent.length;
                continue;
            }
            self.report.data += extent.length;
            let differ = known
                .iter()
                .zip(buffer.as_slice().chunks(size))
                .any(|(sum, sub)| *sum != 0 && *sum != data_sum(sub));
            if !differ {
                continue;
            }
            if beside == Beside::Writers {
                return Ok(Seen::Again);
            }
            block_io::cover!("filesys: a scrub repairs another copy of data");
            let healed = core
                .heal_data(&extent.volume, extent.start, buffer.as_mut_slice())
                .await?;
            let repaired: Vec<_> = healed
                .into_iter()
                .filter(|(_, healed)| *healed == Healed::Repaired)
                .collect();
            self.note(file, extent.offset, &repaired);
        }
        Ok(Seen::Good)
    }

    fn note(&mut self, file: &Rc<FileCore>, from: u64, healed: &[(u64, Healed)]) {
        let repaired = healed.iter().filter(|(_, healed)| *healed == Healed::Repaired);
        self.report.repaired += repaired.count() as u64;
        // The report names all that is lost, not only the first.
        let told = self.core.tell_healed(file.id, from, healed);
        debug_assert!(told.is_ok() || healed.iter().any(|(_, healed)| *healed == Healed::Lost));
        for (skip, _) in healed.iter().filter(|(_, healed)| *healed != Healed::Repaired) {
            let offset = from + skip;
            let name = file.inode.borrow().name.clone();
            self.core.event(Event::Corrupt {
                file: file.id,
                offset,
            });
            self.lost(ScrubFinding::Data {
                file: file.id,
                name,
                offset,
            });
        }
    }
}
