//! Reads of a volume: from the leg with the least to do, from another one if that fails, from parity if there is no other; what
//! could not be read is then written anew.

use std::rc::Rc;

use block_io::{BlockDevice, Clock, Durability, IoBuf, IoCause, IoError, Operation, cover, spawn_local};

use super::disk::Disk;
use super::join::{self, Boxed};
use super::list;
use super::map::{ColumnMap, Map, Payload, SectionMap};
use super::volume::Volume;
use crate::model::{MemberId, ReadPolicy};

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Makes copies and parity equal in regions that a crash left in doubt, before the first read of them: what was read once
    /// must not change when the leg that answered fails.
    #[cold]
    pub(super) async fn settle_regions(&self, offset: u64, length: u64) {
        cover!("volume: a region in doubt is read");
        for region in self.volume.regions(offset, length) {
            for _ in 0..3 {
                if !self.volume.unclean.borrow().contains_key(&region) {
                    break;
                }
                match self.resync_region(region).await {
                    Ok(true) => drop(self.volume.unclean.borrow_mut().remove(&region)),
                    // What is there is all that there is.
                    Ok(false) => break,
                    // A device failed under it: the next attempt does without.
                    Err(_) => cover!("volume: a device fails while a region in doubt is read"),
                }
            }
        }
    }

    /// Reads a range; what no column can answer is computed from parity only if the range is `claimed`.
    pub(crate) async fn read_map(
        &self,
        map: &Map<D>,
        offset: u64,
        buffers: &[IoBuf],
        claimed: bool,
    ) -> Result<(), IoError> {
        let length = list::length(buffers);
        let mut done = 0;
        for (section, from, part) in map.parts(offset, length) {
            if part == length {
                self.read_part(section, from, buffers, claimed).await?;
            } else {
                self.read_part(section, from, &list::part(buffers, done, part), claimed)
                    .await?;
            }
            done += part;
        }
        Ok(())
    }

    async fn read_part(
        &self,
        section: &SectionMap<D>,
        from: u64,
        buffers: &[IoBuf],
        claimed: bool,
    ) -> Result<(), IoError> {
        let total = list::length(buffers);
        if section.shape.columns == 1 {
            return self.read_column(section, 0, from, buffers).await;
        }
        let piece = section.shape.piece(from, total);
        if piece.length == total {
            let column = section.shape.data_column(piece.row, piece.data);
            let at = section.shape.in_member(&piece);
            return self.read_unit(section, column, at, buffers, claimed).await;
        }
        if section.shape.parity == 0 {
            let reads = Self::columns(section, from, buffers).into_iter().map(
                |(column, at, memory)| -> Boxed<'_, _> {
                    Box::pin(async move { self.read_column(section, column, at, &memory).await })
                },
            );
            return join::all(reads.collect()).await.into_iter().collect();
        }
        // Rotation makes a column's units of consecutive rows something else than consecutive data.
        let mut reads: Vec<Boxed<'_, Result<(), IoError>>> = Vec::new();
        let mut skip = 0;
        while skip < total {
            let piece = section.shape.piece(from + skip, total - skip);
            let column = section.shape.data_column(piece.row, piece.data);
            let at = section.shape.in_member(&piece);
            let memory = list::part(buffers, skip, piece.length);
            reads.push(Box::pin(async move {
                self.read_unit(section, column, at, &memory, claimed).await
            }));
            skip += piece.length;
        }
        join::all(reads).await.into_iter().collect()
    }

    /// Reads from a column, or from the others if that fails, there is parity, and the rows are claimed.
    async fn read_unit(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        buffers: &[IoBuf],
        claimed: bool,
    ) -> Result<(), IoError> {
        let parity = section.shape.parity > 0 && claimed;
        if !parity || section.readable(column) {
            match self.read_column(section, column, at, buffers).await {
                Err(_) if parity => cover!("volume: a failed read is answered from parity"),
                result => return result,
            }
        }
        self.reconstruct_range(section, column, at, buffers).await
    }

    /// Reads from one of a column's members; from another one if that fails, which then repairs the first.
    pub(crate) async fn read_column(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let Some(map) = section.columns.get(column) else {
            return Err(self.error(Operation::Read, at, 0, IoCause::OutOfRange { size: 0 }));
        };
        let length = list::length(buffers);
        let (start, end) = section.volume_range(at, at + length);
        let first = if self.volume.is_unclean(start, end - start) {
            // Until it is resynced, one leg is the truth.
            0
        } else {
            let first = Self::preferred(map, at);
            if self.volume.read_policy.get() == ReadPolicy::FirstAnswer
                && self.read_first_answer(section, column, first, at, buffers).await
            {
                return Ok(());
            }
            first
        };
        let mut failed: Vec<(MemberId, Rc<Disk<D>>)> = Vec::new();
        let mut error = None;
        let count = map.members.len();
        // Two rounds: the good ones in order; then, without redundancy, also those on devices out of service.
        for (round, index) in [0, 1]
            .into_iter()
            .flat_map(|round| (0..count).map(move |index| (round, index)))
        {
            let Some(member) = map.members.get((first + index) % count) else {
                continue;
            };
            let usable = member.state == crate::model::MemberState::InSync;
            if !usable || (member.is_alive() != (round == 0)) || (round == 1 && section.redundant) {
                continue;
            }
            match member.read(self.clock(), at, buffers).await {
                Ok(()) => {
                    for (member, device) in failed {
                        cover!("volume: a failed read is answered by another leg");
                        self.repair_later(section.id, column, member, device, at, length);
                    }
                    return Ok(());
                }
                Err((device, reason)) => {
                    failed.push((member.id, device));
                    error = Some(reason);
                }
            }
        }
        if section.shape.parity > 0 {
            for (member, device) in failed {
                self.repair_later(section.id, column, member, device, at, length);
            }
        }
        Err(error.unwrap_or_else(|| {
            let reason = std::io::Error::other("no device that holds a good copy of this range is there");
            self.error(Operation::Read, section.start, length, reason)
        }))
    }

    /// The leg with the least to do; if all have as little, by place, so that sequential reads stay on one.
    fn preferred(column: &ColumnMap<D>, at: u64) -> usize {
        const LOCALITY: u64 = 1 << 20;
        if column.members.len() == 1 {
            return 0;
        }
        let turn = usize::try_from(at / LOCALITY).unwrap_or(0);
        let count = column.members.len();
        let load = |index: usize| {
            let member = column.members.get(index)?;
            let usable = member.state == crate::model::MemberState::InSync && member.is_alive();
            usable.then(|| member.disk_at(at).map_or(0, |disk| disk.in_flight()))
        };
        (0..count)
            .map(|step| (turn + step) % count)
            .filter_map(|index| Some((load(index)?, index)))
            .min_by_key(|(load, _)| *load)
            .map_or(0, |(_, index)| index)
    }

    /// Writes what a member could not read over with what it should hold; if that fails, its device is out of service.
    pub(super) fn repair_later(
        &self,
        section: u32,
        column: usize,
        member: MemberId,
        disk: Rc<Disk<D>>,
        at: u64,
        length: u64,
    ) {
        let this = self.clone();
        let busy = self.core.busy();
        let spawned = spawn_local(async move {
            let _busy = busy;
            if this
                .repair_member(section, column, member, at, length)
                .await
                .is_err()
            {
                cover!("volume: a member that cannot be repaired is given up");
                // What fails here fails for whoever writes next, too.
                let _ = this.core.fail(&[disk]).await;
            }
        });
        // Outside a worker nobody makes requests.
        drop(spawned);
    }

    /// Resolved when the range of a member reads well again, or is nobody's any more.
    async fn repair_member(
        &self,
        section: u32,
        column: usize,
        member: MemberId,
        at: u64,
        length: u64,
    ) -> Result<(), IoError> {
        let range = |map: &Map<D>| {
            let section = map.sections.iter().find(|candidate| candidate.id == section)?;
            Some(section.volume_range(at, at + length))
        };
        let Some((from, to)) = range(&self.volume.map()) else {
            return Ok(());
        };
        let _held = self.volume.ranges.hold(from, to).await;
        let map = self.volume.map();
        let found = map.sections.iter().find(|candidate| candidate.id == section);
        let Some(section) = found.filter(|_| range(&map) == Some((from, to))) else {
            // The section was moved or cut meanwhile, and what moves it reads and repairs it, too.
            return Ok(());
        };
        let Some(bad) = section
            .columns
            .get(column)
            .and_then(|column| column.members.iter().find(|other| other.id == member))
        else {
            return Ok(());
        };
        if !bad.is_alive() {
            return Ok(());
        }
        let buffer = block_io::AlignedBuffer::new(usize::try_from(length).unwrap_or(0));
        // SAFETY: the buffer outlives the requests of this function, which are all it is used for.
        let memory = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
        if bad.read(self.clock(), at, &memory).await.is_ok() {
            return Ok(());
        }
        let others = section
            .columns
            .get(column)
            .into_iter()
            .flat_map(ColumnMap::sources);
        let mut good = false;
        for other in others.filter(|other| other.id != member) {
            good = other.read(self.clock(), at, &memory).await.is_ok();
            if good {
                break;
            }
        }
        if !good && section.shape.parity > 0 {
            good = self.reconstruct_range(section, column, at, &memory).await.is_ok();
        }
        if !good {
            // Nobody has it: the reader has got the error.
            return Ok(());
        }
        cover!("volume: a range that could not be read is written anew");
        let payload = Payload::Data(&memory, Durability::Durable);
        bad.write(self.clock(), at, length, payload)
            .await
            .map_err(|(_, error)| error)
    }
}
