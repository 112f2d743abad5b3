//! The I/O of one volume: requests are cut into the parts of its sections, and those into columns.
//!
//! # Life of a write
//! 1. It claims its range (of a section with parity: whole rows), so that overlapping writes reach all legs in one order and
//!    a copy never races with them. Volumes without redundancy need that only while they are being moved.
//! 2. It takes the map, and keeps it until it has ended.
//! 3. Its regions become hot: durable in the activity logs before any leg is written ([`Core::hot`]). While members are
//!    detached, its regions are also durable in the volume's bitmap.
//! 4. All members of its columns are written at once; of a section with parity see [`rows`](super::rows).
//! 5. If a member failed and redundancy covers that, the loss is made durable in the configuration *before* the write is
//!    acknowledged: after a crash nobody may take that member's old content for good.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use block_io::{
    BlockDevice, Clock, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode, cover,
};

use super::core::Core;
use super::counters::Counters;
use super::join::{self, Boxed};
use super::list;
use super::map::{Map, Payload, Put, SectionMap, Written};
use super::ranges::{Held, Ranges};
use super::relayout::Touched;
use super::usage::Usage;
use crate::logs::bitmap::Bitmap;
use crate::logs::hot::Guard;
use crate::logs::parity::ParityLog;
use crate::model::{ReadPolicy, VolumeId};

/// What an open pool knows of one of its volumes.
pub(crate) struct VolumeCore<D> {
    pub(crate) id: VolumeId,
    pub(crate) name: Arc<str>,
    pub(crate) region: u64,
    map: RefCell<Rc<Map<D>>>,
    /// That of the present map.
    pub(crate) read_policy: Cell<ReadPolicy>,
    pub(crate) ranges: Ranges,
    /// Jobs that copy at present: writes claim their ranges although there is no redundancy.
    pub(crate) copying: Cell<u32>,
    /// Regions whose copies or parity may differ since a crash.
    pub(crate) unclean: RefCell<BTreeMap<u32, Guard>>,
    /// If the volume has redundancy.
    pub(crate) bitmap: RefCell<Option<Rc<Bitmap<D>>>>,
    /// The generation that the bitmap is of.
    pub(crate) generation: Cell<u64>,
    /// The generation of the bitmap that has all that was uncertain when it began.
    pub(crate) covered: Cell<u64>,
    /// By the number of their section.
    pub(crate) logs: RefCell<BTreeMap<u32, Rc<ParityLog<D>>>>,
    /// The piece that is being moved elsewhere: it must know what is written meanwhile.
    pub(crate) shadow: RefCell<Option<Rc<Touched>>>,
    /// Who knows what of the volume is in use.
    pub(crate) usage: RefCell<Option<Rc<dyn Usage>>>,
    pub(crate) counters: Counters,
}

/// A volume of an open pool, as a device. Copies are the same volume.
pub struct Volume<D, C> {
    pub(crate) core: Rc<Core<D, C>>,
    pub(crate) volume: Rc<VolumeCore<D>>,
}

impl<D, C> Clone for Volume<D, C> {
    fn clone(&self) -> Self {
        Self {
            core: Rc::clone(&self.core),
            volume: Rc::clone(&self.volume),
        }
    }
}

impl<D> VolumeCore<D> {
    pub(crate) fn new(map: Map<D>) -> Self {
        Self {
            id: map.volume.id,
            name: map.volume.name.as_str().into(),
            region: map.volume.region,
            read_policy: Cell::new(map.volume.read_policy),
            map: RefCell::new(Rc::new(map)),
            ranges: Ranges::default(),
            copying: Cell::new(0),
            unclean: RefCell::default(),
            bitmap: RefCell::default(),
            generation: Cell::new(0),
            covered: Cell::new(0),
            logs: RefCell::default(),
            shadow: RefCell::default(),
            usage: RefCell::default(),
            counters: Counters::default(),
        }
    }

    /// The present map.
    pub(crate) fn map(&self) -> Rc<Map<D>> {
        Rc::clone(&self.map.borrow())
    }

    /// Replaces the map; gives the old one.
    pub(crate) fn set_map(&self, mut map: Map<D>) -> Rc<Map<D>>
    where
        D: BlockDevice,
    {
        map.go_on_counting(&self.map.borrow());
        self.read_policy.set(map.volume.read_policy);
        self.map.replace(Rc::new(map))
    }

    /// The regions that a range touches. Rows of parity may reach beyond the end of the volume, where there are none.
    pub(crate) fn regions(&self, offset: u64, length: u64) -> std::ops::RangeInclusive<u32> {
        let index = |byte: u64| u32::try_from(byte / self.region).unwrap_or(u32::MAX);
        let end = (offset + length).min(self.map.borrow().volume.size);
        index(offset)..=index(end.saturating_sub(1).max(offset))
    }

    /// Whether copies or parity of the range may differ since a crash.
    pub(crate) fn is_unclean(&self, offset: u64, length: u64) -> bool {
        let unclean = self.unclean.borrow();
        !unclean.is_empty() && unclean.range(self.regions(offset, length)).next().is_some()
    }
}

/// What a request does; the ones that change something carry what they put in place.
type Parts = Vec<(usize, u64, Vec<IoBuf>)>;

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    pub(crate) fn clock(&self) -> &C {
        &self.core.clock
    }

    #[cold]
    pub(crate) fn error(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        cause: impl Into<IoCause>,
    ) -> IoError {
        IoError::new(&self.volume.name, operation, offset, length, cause)
    }

    pub(super) fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let (size, block) = {
            let map = self.volume.map.borrow();
            (map.volume.size, map.volume.block)
        };
        let refused = if !offset.is_multiple_of(block.into()) || !length.is_multiple_of(block.into()) {
            IoCause::Misaligned { block }
        } else if offset.checked_add(length).is_none_or(|end| end > size) {
            IoCause::OutOfRange { size }
        } else {
            return Ok(());
        };
        Err(self.error(operation, offset, length, refused))
    }

    /// Claims what a write to the range needs, then takes the map.
    pub(crate) async fn claim(&self, offset: u64, length: u64) -> (Option<Held<'_>>, Rc<Map<D>>) {
        loop {
            let map = self.volume.map();
            let Some((start, end)) = self.claimed(&map, offset, length) else {
                return (None, map);
            };
            // Whoever replaces the map holds the range and waits for the old map's users.
            drop(map);
            let held = self.volume.ranges.hold(start, end).await;
            let map = self.volume.map();
            match self.claimed(&map, offset, length) {
                Some((from, to)) if from < start || to > end => {
                    cover!("volume: the layout changed while a write waited");
                }
                _ => return (Some(held), map),
            }
        }
    }

    fn claimed(&self, map: &Map<D>, offset: u64, length: u64) -> Option<(u64, u64)> {
        let copying = self.volume.copying.get() > 0;
        let mut claimed: Option<(u64, u64)> = None;
        for (section, from, part) in map.parts(offset, length) {
            let range = if section.shape.parity > 0 {
                let row = section.shape.row_bytes();
                let (first, last) = (from / row, (from + part).div_ceil(row));
                (section.start + first * row, section.start + last * row)
            } else if section.redundant || copying {
                (section.start + from, section.start + from + part)
            } else {
                continue;
            };
            claimed = Some(claimed.map_or(range, |(from, to)| (from.min(range.0), to.max(range.1))));
        }
        claimed
    }

    /// Cuts a part of a section without parity into columns: column, first byte of the member, memory.
    pub(super) fn columns(section: &SectionMap<D>, offset: u64, buffers: &[IoBuf]) -> Parts {
        let mut parts: Parts = Vec::with_capacity(section.columns.len());
        let mut rest = list::Rest::of(buffers);
        let (mut at, end) = (offset, offset + list::length(buffers));
        while at < end {
            let piece = section.shape.piece(at, end - at);
            let column = section.shape.data_column(piece.row, piece.data);
            // The next row's unit follows in the member.
            let index = parts.iter().position(|part| part.0 == column).unwrap_or_else(|| {
                parts.push((column, section.shape.in_member(&piece), Vec::new()));
                parts.len() - 1
            });
            if let Some((_, _, memory)) = parts.get_mut(index) {
                rest.take(piece.length, memory);
            }
            at += piece.length;
        }
        parts
    }

    async fn write_range(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Result<(), IoError> {
        self.check(operation, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.core
            .check_writable(&self.volume.name, operation, offset, length)?;
        let (_held, map) = self.claim(offset, length).await;
        let mut done = 0;
        for (section, from, part) in map.parts(offset, length) {
            let memory;
            let payload = match payload {
                Payload::Data(buffers, durability) if part < length => {
                    memory = list::part(buffers, done, part);
                    Payload::Data(&memory, durability)
                }
                other => other,
            };
            done += part;
            if section.shape.parity > 0 {
                self.write_rows(section, from, part, payload).await?;
            } else {
                self.write_columns(section, from, part, payload).await?;
            }
        }
        if let Some(shadow) = self.volume.shadow.borrow().as_ref() {
            shadow.touch(offset, length);
        }
        Ok(())
    }

    /// A part of a section without parity.
    async fn write_columns(
        &self,
        section: &SectionMap<D>,
        from: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Result<(), IoError> {
        let payload = match payload {
            // Legs would read differently afterwards.
            Payload::Discard if section.redundant => Payload::Zero(ZeroMode::MayUnmap),
            other => other,
        };
        let _hot = if section.redundant {
            self.note_regions(section.start + from, length, section.has_several_targets())
                .await?
        } else {
            None
        };
        let Put { failed, bad } = self.put_columns(section, from, length, payload).await;
        if !failed.is_empty() && section.redundant {
            let lost = self.core.fail(&failed).await;
            if let (Err(reason), None) = (lost, &bad) {
                return Err(self.error(Operation::Write, section.start + from, length, reason));
            }
        }
        match bad {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Writes a part of a section without parity to all members.
    pub(crate) async fn put_columns(
        &self,
        section: &SectionMap<D>,
        from: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Put<D> {
        let (clock, redundant) = (self.clock(), section.redundant);
        let piece = section.shape.piece(from, length);
        if section.shape.columns == 1 || piece.length == length {
            let (column, at) = if section.shape.columns == 1 {
                (0, from)
            } else {
                (
                    section.shape.data_column(piece.row, piece.data),
                    section.shape.in_member(&piece),
                )
            };
            return match section.columns.get(column) {
                // The usual way of a small write: no list of results.
                Some(column) => column.write(clock, at, length, payload, redundant).await.into(),
                None => Put::default(),
            };
        }
        let mut writes: Vec<Boxed<'_, Written<D>>> = Vec::new();
        if let Payload::Data(buffers, durability) = payload {
            for (column, at, memory) in Self::columns(section, from, buffers) {
                let Some(column) = section.columns.get(column) else {
                    continue;
                };
                writes.push(Box::pin(async move {
                    let payload = Payload::Data(&memory, durability);
                    column
                        .write(clock, at, list::length(&memory), payload, redundant)
                        .await
                }));
            }
        } else {
            let mut ranges: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
            let mut skip = 0;
            while skip < length {
                let piece = section.shape.piece(from + skip, length - skip);
                let at = section.shape.in_member(&piece);
                let column = section.shape.data_column(piece.row, piece.data);
                let range = ranges.entry(column).or_insert((at, at));
                range.1 = at + piece.length;
                skip += piece.length;
            }
            for (column, (start, end)) in ranges {
                let Some(column) = section.columns.get(column) else {
                    continue;
                };
                writes.push(Box::pin(async move {
                    column.write(clock, start, end - start, payload, redundant).await
                }));
            }
        }
        let mut put = Put::default();
        join::all(writes)
            .await
            .into_iter()
            .for_each(|written| put.add(written));
        put
    }

    /// Makes durable that the range is being changed, as far as somebody has to know it after a crash.
    pub(crate) async fn note_regions(
        &self,
        offset: u64,
        length: u64,
        hot: bool,
    ) -> Result<Option<Guard>, IoError> {
        let regions = self.volume.regions(offset, length);
        let refused = |reason: super::core::Refused| self.error(Operation::Write, offset, length, reason);
        let guard = if hot {
            Some(
                self.core
                    .acquire(self.volume.id, regions.clone())
                    .await
                    .map_err(refused)?,
            )
        } else {
            None
        };
        if self.has_detached() {
            let regions: Vec<u32> = regions.collect();
            self.core
                .mark_changed(&self.volume, &regions)
                .await
                .map_err(refused)?;
        }
        Ok(guard)
    }

    /// Whether members are detached, and have to be told what they miss. Not what the map of a request says, which may be older: what
    /// becomes hot, or gets a record in a parity log, before a member is detached is noted by who detaches it; what does so
    /// afterwards, by who writes.
    pub(super) fn has_detached(&self) -> bool {
        self.volume.map().volume.bitmap_generation != 0
    }

    async fn flush_all(&self) -> Result<(), IoError> {
        let map = self.volume.map();
        let disks = map.disks();
        let clock = self.clock();
        let flushes = disks
            .iter()
            .filter(|disk| disk.is_alive() || !map.redundant())
            .map(|disk| -> Boxed<'_, _> {
                Box::pin(async move { (Rc::clone(disk), disk.flush(clock).await) })
            });
        let mut failed = Vec::new();
        let mut error = None;
        for (device, result) in join::all(flushes.collect()).await {
            if let Err(reason) = result {
                failed.push(device);
                error = Some(reason);
            }
        }
        let Some(error) = error else { return Ok(()) };
        if !map.redundant() {
            return Err(error);
        }
        drop(map);
        let refused = |reason| self.error(Operation::Flush, 0, 0, reason);
        self.core.fail(&failed).await.map_err(refused)?;
        // Good if what is left of each section holds everything, which was flushed above.
        let whole = self
            .volume
            .map()
            .sections
            .iter()
            .all(|section| section.missing() <= section.shape.parity);
        if whole { Ok(()) } else { Err(error) }
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> BlockDevice for Volume<D, C> {
    fn geometry(&self) -> Geometry {
        let map = self.volume.map.borrow();
        let row = map
            .sections
            .first()
            .map_or(0, |section| section.shape.row_bytes());
        let striped = map
            .sections
            .first()
            .is_some_and(|section| section.shape.columns > 1);
        Geometry {
            size: map.volume.size,
            logical_block: map.volume.block,
            physical_block: map.volume.block.max(4096),
            optimal_io: if striped {
                u32::try_from(row).unwrap_or(0)
            } else {
                0
            },
            discard_granularity: 4096,
            read_only: false,
        }
    }

    fn size(&self) -> u64 {
        self.volume.map.borrow().volume.size
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let (length, since) = (list::length(buffers), self.clock().moment());
        self.check(Operation::Read, offset, length)?;
        if self.volume.is_unclean(offset, length) {
            self.settle_regions(offset, length).await;
        }
        let map = self.volume.map();
        let mut result = self.read_map(&map, offset, buffers, false).await;
        drop(map);
        if result.is_err() && self.volume.map().has_parity(offset, length) {
            cover!("volume: a read needs parity");
            let (_held, map) = self.claim(offset, length).await;
            result = self.read_map(&map, offset, buffers, true).await;
        }
        let took = self.clock().moment().saturating_sub(since);
        self.volume
            .counters
            .count(Operation::Read, length, took, result.is_ok());
        result
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let (length, since) = (list::length(buffers), self.clock().moment());
        let payload = Payload::Data(buffers, durability);
        let result = self.write_range(Operation::Write, offset, length, payload).await;
        let took = self.clock().moment().saturating_sub(since);
        self.volume
            .counters
            .count(Operation::Write, length, took, result.is_ok());
        result
    }

    async fn flush(&self) -> Result<(), IoError> {
        let since = self.clock().moment();
        let result = self.flush_all().await;
        let took = self.clock().moment().saturating_sub(since);
        self.volume
            .counters
            .count(Operation::Flush, 0, took, result.is_ok());
        result
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.write_range(Operation::Discard, offset, length, Payload::Discard)
            .await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.write_range(Operation::WriteZeroes, offset, length, Payload::Zero(mode))
            .await
    }
}
