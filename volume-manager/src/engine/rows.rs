//! Sections with parity: reads that need it, and writes.
//!
//! # A write of part of a row
//! The row is claimed. The new content is copied out of the guest's memory first, because the guest may change it while it is
//! in flight, and parity must fit what is written. Then either the old content of what changes and the old parity are read
//! (*read-modify-write*), or the rest of the row (*reconstruct-write*), whichever are fewer reads; with columns missing, or in a
//! region whose parity is doubtful since a crash, always the latter. New data and parity are durable in the section's log before
//! the first of them is written in place. A crash in between is repaired by replaying the log, even if a device is lost in the
//! crash: the write hole is closed.
//!
//! # A write of whole rows
//! needs no read. While all columns are there it needs no log either: its region is hot, and after a crash the parity of hot
//! regions is computed anew. (If a device is lost in that very crash, what the missing column held in rows that were being
//! overwritten is lost, and reads of it fail.) With a column missing it goes through the log like any other.

use std::ops::Range;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoError, Operation, cover};

use super::disk::Disk;
use super::join::{self, Boxed};
use super::list;
use super::map::{Payload, SectionMap, Written};
use super::volume::Volume;
use crate::logs::parity::Piece;

/// What is to be written into one row.
struct RowWrite<'a, D> {
    section: &'a SectionMap<D>,
    row: u64,
    /// Per data unit: the bytes of the unit that are new, and where they begin in `new`.
    touched: Vec<Option<(Range<u64>, usize)>>,
    /// The bytes of a unit that parity changes for.
    span: Range<u64>,
    new: AlignedBuffer,
}

pub(super) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The whole of `buffer` as memory of a request.
pub(super) fn whole(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: callers keep the buffer alive beyond the request, and do not touch it meanwhile.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

impl<D: BlockDevice> RowWrite<'_, D> {
    fn data_at(&self, data: usize) -> Option<(&Range<u64>, &[u8])> {
        let (range, start) = self.touched.get(data)?.as_ref()?;
        let bytes = self
            .new
            .as_slice()
            .get(*start..*start + index(range.end - range.start))?;
        Some((range, bytes))
    }

    /// Puts what is new over the old content of a data unit; `old` holds the unit's `span`.
    fn overlay(&self, data: usize, old: &mut [u8]) {
        if let Some((range, bytes)) = self.data_at(data) {
            let start = index(range.start - self.span.start);
            if let Some(place) = old.get_mut(start..start + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
    }

    fn covers_span(&self, data: usize) -> bool {
        self.data_at(data).is_some_and(|(range, _)| *range == self.span)
    }

    fn is_full(&self) -> bool {
        self.span == (0..self.section.shape.unit)
            && (0..self.section.shape.data()).all(|data| self.covers_span(data))
    }

    /// Byte of a member where the span begins.
    fn at(&self) -> u64 {
        self.row * self.section.shape.unit + self.span.start
    }

    fn span_length(&self) -> usize {
        index(self.span.end - self.span.start)
    }

    fn parity_columns(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.section.shape.parity)
            .map(|number| (number, self.section.shape.parity_column(self.row, number)))
    }
}

/// Computes P and, if asked for, Q of `data`.
pub(super) fn parity_of(data: &[AlignedBuffer], count: usize, length: usize) -> Vec<AlignedBuffer> {
    let mut buffers: Vec<AlignedBuffer> = (0..count).map(|_| AlignedBuffer::new(length)).collect();
    match buffers.as_mut_slice() {
        [p] => {
            let sources: Vec<&[u8]> = data.iter().map(AlignedBuffer::as_slice).collect();
            parity::xor(p.as_mut_slice(), &sources);
        }
        [p, q] => {
            let sources: Vec<Option<&[u8]>> = data.iter().map(|buffer| Some(buffer.as_slice())).collect();
            parity::pq(p.as_mut_slice(), q.as_mut_slice(), &sources);
        }
        _ => {}
    }
    buffers
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Writes a part of a section with parity.
    pub(crate) async fn write_rows(
        &self,
        section: &SectionMap<D>,
        from: u64,
        length: u64,
        payload: Payload<'_>,
    ) -> Result<(), IoError> {
        if matches!(payload, Payload::Discard) {
            // Parity covers what is there; the space stays in use.
            return Ok(());
        }
        let row_bytes = section.shape.row_bytes();
        let mut writes: Vec<Boxed<'_, Result<(), IoError>>> = Vec::new();
        let mut skip = 0;
        while skip < length {
            let row = (from + skip) / row_bytes;
            let start = (from + skip) % row_bytes;
            let part = (row_bytes - start).min(length - skip);
            let mut new = AlignedBuffer::new(index(part));
            if let Payload::Data(buffers, _) = payload {
                list::gather(&list::part(buffers, skip, part), new.as_mut_slice());
            }
            let durability = match payload {
                Payload::Data(_, durability) => durability,
                _ => Durability::Volatile,
            };
            let write = row_write(section, row, start, new);
            writes.push(Box::pin(async move { self.write_row(write, durability).await }));
            skip += part;
        }
        if writes.len() == 1
            && let Some(only) = writes.pop()
        {
            return only.await;
        }
        join::all(writes).await.into_iter().collect()
    }

    async fn write_row(&self, write: RowWrite<'_, D>, durability: Durability) -> Result<(), IoError> {
        let (section, shape) = (write.section, &write.section.shape);
        let offset = section.start + write.row * shape.row_bytes();
        let length = write.new.as_slice().len() as u64;
        let missing = section.missing();
        if missing > shape.parity {
            let reason = std::io::Error::other("more devices are missing than the layout tolerates");
            return Err(self.error(Operation::Write, offset, length, reason));
        }
        let parity = self.new_parity(&write).await?;
        let log = self.volume.logs.borrow().get(&section.id).cloned();
        let refused = |reason: super::core::Refused| self.error(Operation::Write, offset, length, reason);
        if log.is_none() {
            let reason = std::io::Error::other("the parity log of this part of the volume is lost");
            return Err(self.error(Operation::Write, offset, length, reason));
        }
        let logged = match &log {
            Some(log) => !write.is_full() || missing > 0 || log.has_live_record(write.row),
            None => false,
        };
        let (mut ticket, mut _hot) = (None, None);
        if let (Some(log), true) = (&log, logged) {
            let mut pieces: Vec<Piece<'_>> = Vec::new();
            let number = |column: usize| u32::try_from(column).unwrap_or(u32::MAX);
            for data in 0..shape.data() {
                if let Some((range, bytes)) = write.data_at(data) {
                    pieces.push(Piece {
                        column: number(shape.data_column(write.row, data)),
                        offset: range.start,
                        data: bytes,
                    });
                }
            }
            for ((_, column), content) in write.parity_columns().zip(&parity) {
                pieces.push(Piece {
                    column: number(column),
                    offset: write.span.start,
                    data: content.as_slice(),
                });
            }
            let appended = self.core.append(&self.volume, log, write.row, &pieces).await;
            ticket = Some(appended.map_err(refused)?);
            if self.has_detached() {
                let regions: Vec<u32> = self.volume.regions(offset, shape.row_bytes()).collect();
                self.core
                    .mark_changed(&self.volume, &regions)
                    .await
                    .map_err(refused)?;
            }
        } else {
            _hot = self.note_regions(offset, shape.row_bytes(), true).await?;
        }
        // A durable record is as good as the write itself.
        let durability = if logged { Durability::Volatile } else { durability };
        let failed = self.put_row(&write, &parity, durability).await;
        let mut refusal = Ok(());
        if !failed.is_empty() {
            cover!("rows: a device failed under a write to a row");
            refusal = self.core.fail(&failed).await;
        }
        if let (Some(log), Some(ticket)) = (&log, ticket) {
            log.applied(ticket);
        }
        refusal.map_err(refused)?;
        let columns = self.volume.map();
        let lost = columns
            .sections
            .iter()
            .find(|other| other.id == section.id)
            .map_or(0, SectionMap::missing);
        if !failed.is_empty() && lost > shape.parity {
            let reason = std::io::Error::other("more devices failed than the layout tolerates");
            return Err(self.error(Operation::Write, offset, length, reason));
        }
        Ok(())
    }

    /// Writes data and parity in place, as far as there are devices; gives the devices that failed.
    async fn put_row(
        &self,
        write: &RowWrite<'_, D>,
        parity: &[AlignedBuffer],
        durability: Durability,
    ) -> Vec<Rc<Disk<D>>> {
        let (section, shape, clock) = (write.section, &write.section.shape, self.clock());
        let mut writes: Vec<Boxed<'_, Written<D>>> = Vec::new();
        let new = whole(&write.new);
        for data in 0..shape.data() {
            let Some(Some((range, start))) = write.touched.get(data) else {
                continue;
            };
            let Some(column) = section.columns.get(shape.data_column(write.row, data)) else {
                continue;
            };
            let length = range.end - range.start;
            let memory = [new[0].slice(*start, index(length))];
            let at = write.row * shape.unit + range.start;
            writes.push(Box::pin(async move {
                column
                    .write(clock, at, length, Payload::Data(&memory, durability), true)
                    .await
            }));
        }
        for ((_, column), content) in write.parity_columns().zip(parity) {
            let Some(column) = section.columns.get(column) else {
                continue;
            };
            let memory = whole(content);
            let at = write.at();
            writes.push(Box::pin(async move {
                let length = list::length(&memory);
                column
                    .write(clock, at, length, Payload::Data(&memory, durability), true)
                    .await
            }));
        }
        join::all(writes)
            .await
            .into_iter()
            .flat_map(|written| written.failed)
            .collect()
    }

    /// Parity of the span as it is after the write.
    async fn new_parity(&self, write: &RowWrite<'_, D>) -> Result<Vec<AlignedBuffer>, IoError> {
        let (section, shape) = (write.section, &write.section.shape);
        let length = write.span_length();
        let covered = (0..shape.data()).filter(|data| write.covers_span(*data)).count();
        if covered == shape.data() {
            let mut data = Vec::with_capacity(covered);
            for number in 0..covered {
                let mut content = AlignedBuffer::new(length);
                write.overlay(number, content.as_mut_slice());
                data.push(content);
            }
            return Ok(parity_of(&data, shape.parity, length));
        }
        let touched = (0..shape.data())
            .filter(|data| write.data_at(*data).is_some())
            .count();
        let (start, end) = section.volume_range(write.row * shape.unit, (write.row + 1) * shape.unit);
        let sound = section.missing() == 0 && !self.volume.is_unclean(start, end - start);
        if sound && touched + shape.parity < shape.data() - covered {
            match self.modified_parity(write).await {
                Ok(parity) => return Ok(parity),
                Err(_) => cover!("rows: a failed read of a read-modify-write"),
            }
        }
        let mut data = self
            .read_row(
                section,
                write.row,
                &write.span,
                &|data| write.covers_span(data),
                None,
            )
            .await?;
        for (number, content) in data.iter_mut().enumerate() {
            write.overlay(number, content.as_mut_slice());
        }
        Ok(parity_of(&data, shape.parity, length))
    }

    /// Read-modify-write: old parity changed by what changes of the data.
    async fn modified_parity(&self, write: &RowWrite<'_, D>) -> Result<Vec<AlignedBuffer>, IoError> {
        cover!("rows: read-modify-write");
        let (section, shape) = (write.section, &write.section.shape);
        let length = write.span_length();
        let wanted: Vec<usize> = (0..shape.data())
            .filter(|data| write.data_at(*data).is_some())
            .map(|data| shape.data_column(write.row, data))
            .chain(write.parity_columns().map(|(_, column)| column))
            .collect();
        let mut old = self.read_columns(section, &wanted, write.at(), length).await?;
        let mut parity = old.split_off(old.len() - shape.parity);
        let touched = (0..shape.data()).filter(|data| write.data_at(*data).is_some());
        for (data, mut content) in touched.zip(old) {
            // What changes: old xor new, zero where nothing is new.
            let mut delta = AlignedBuffer::new(length);
            delta.as_mut_slice().copy_from_slice(content.as_slice());
            write.overlay(data, delta.as_mut_slice());
            parity::xor_into(content.as_mut_slice(), delta.as_slice());
            if let Some(p) = parity.first_mut() {
                parity::xor_into(p.as_mut_slice(), content.as_slice());
            }
            if let Some(q) = parity.get_mut(1) {
                parity::update_q(q.as_mut_slice(), data, content.as_slice());
            }
        }
        Ok(parity)
    }
}

/// The part of row `row` from byte `start` of the row on, with the content `new`.
fn row_write<'a, D: BlockDevice>(
    section: &'a SectionMap<D>,
    row: u64,
    start: u64,
    new: AlignedBuffer,
) -> RowWrite<'a, D> {
    let shape = &section.shape;
    let end = start + new.as_slice().len() as u64;
    let mut span: Option<Range<u64>> = None;
    let touched = (0..shape.data() as u64).map(|data| {
        let unit = data * shape.unit..(data + 1) * shape.unit;
        let (from, to) = (start.max(unit.start), end.min(unit.end));
        (from < to).then(|| {
            let within = from - unit.start..to - unit.start;
            let old = span.clone().unwrap_or(within.clone());
            span = Some(old.start.min(within.start)..old.end.max(within.end));
            (within, index(from - start))
        })
    });
    let touched = touched.collect();
    RowWrite {
        section,
        row,
        touched,
        span: span.unwrap_or(0..0),
        new,
    }
}
