//! The copies of a range, one by one, for who has checksums: the layer above sees which of them is right, and has the others made so.
//!
//! # What counts as a copy
//! ```text
//!   no parity   copy i      the i-th member that is in sync
//!   raid5       copy 0      the data as they are stored         copy 1      computed from the others and P
//!   raid6       copy 0      the data as they are stored         copy 1, 2   computed from the others and P, or Q
//!               copy 3 …    computed from P and Q without one more of the others, each in turn: it may be bad, too
//! ```
//! Copies are read and written under the claim of the range, so no write is between two of them.
//!
//! # Repairs of rows
//! An ordinary write would change parity by the difference between new and old data, or compute it from all that is stored. Both
//! are wrong where what is stored has rotted: then parity is right, and the only thing from which the good bytes can be computed. So a
//! repair writes the data, and looks what parity says of the row with them. It fits: it is left alone. Only P or only Q does not: that one
//! is written anew. Neither does, and one other unit explains both: that unit is bad, too, and is written as parity says.
//! Otherwise nobody knows, and parity is made to fit what is stored.
//!
//! Each of these steps changes one column, and is durable before the next. So a crash leaves a row that can be repaired as well
//! as before. No region becomes hot: a resync after a crash would make copies equal to one of them, perhaps to the bad one.

use std::ops::Range;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoCause, IoError, Operation, cover};

use super::disk::Disk;
use super::join::{self, Boxed};
use super::list;
use super::map::{MemberMap, Payload, Put, SectionMap};
use super::rows::{index, parity_of, whole};
use super::volume::Volume;

/// Of a row: data units and parity, as far as they can be read.
struct Columns {
    data: Vec<Option<AlignedBuffer>>,
    parity: Vec<Option<AlignedBuffer>>,
}

/// What is bad in a row whose parity does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bad {
    Nothing,
    Parity(usize),
    Data(usize),
    Unknown,
}

/// The columns of a row that a copy of data unit `number` does without: data units, and a parity.
fn without(copy: usize, number: usize, data: usize, parity: usize) -> Option<(Vec<usize>, Option<usize>)> {
    match (parity, copy) {
        (1, 1) => Some((vec![number], None)),
        (2, 1) => Some((vec![number], Some(1))),
        (2, 2) => Some((vec![number], Some(0))),
        (2, copy) if copy > 2 => {
            let other = (0..data).filter(|other| *other != number).nth(copy - 3)?;
            Some((vec![number, other], None))
        }
        _ => None,
    }
}

fn copies_of_section<D: BlockDevice>(section: &SectionMap<D>) -> usize {
    match section.shape.parity {
        0 => {
            let members = section.columns.iter().map(|column| column.sources().count());
            members.max().unwrap_or(1).max(1)
        }
        1 => 2,
        _ => 2 + section.shape.data(),
    }
}

/// What the parity of a row says of its data, which are all there.
fn judge(columns: &Columns, length: usize) -> Bad {
    let data: Vec<&AlignedBuffer> = columns.data.iter().flatten().collect();
    if data.len() < columns.data.len() {
        return Bad::Nothing;
    }
    let computed = parity_of_refs(&data, columns.parity.len(), length);
    let differs = |number: usize| match (columns.parity.get(number), computed.get(number)) {
        (Some(Some(found)), Some(computed)) => found.as_slice() != computed.as_slice(),
        _ => false,
    };
    match (columns.parity.len(), differs(0), differs(1)) {
        (_, false, false) => Bad::Nothing,
        (2, true, false) => Bad::Parity(0),
        (2, false, true) => Bad::Parity(1),
        (2, true, true) => unit_that_explains(columns, &data, length).map_or(Bad::Unknown, Bad::Data),
        _ => Bad::Unknown,
    }
}

fn parity_of_refs(data: &[&AlignedBuffer], count: usize, length: usize) -> Vec<AlignedBuffer> {
    let owned: Vec<AlignedBuffer> = data
        .iter()
        .map(|source| {
            let mut copy = AlignedBuffer::new(length);
            copy.as_mut_slice().copy_from_slice(source.as_slice());
            copy
        })
        .collect();
    parity_of(&owned, count, length)
}

/// The only data unit that, computed from P, fits Q as well.
fn unit_that_explains(columns: &Columns, data: &[&AlignedBuffer], length: usize) -> Option<usize> {
    let (Some(Some(p)), Some(Some(q))) = (columns.parity.first(), columns.parity.get(1)) else {
        return None;
    };
    let mut found = None;
    for number in 0..data.len() {
        let unit = from_p(data, number, p, length);
        let known: Vec<Option<&[u8]>> = data
            .iter()
            .enumerate()
            .map(|(other, buffer)| {
                let content = if other == number { &unit } else { *buffer };
                Some(content.as_slice())
            })
            .collect();
        let (mut new_p, mut new_q) = (AlignedBuffer::new(length), AlignedBuffer::new(length));
        parity::pq(new_p.as_mut_slice(), new_q.as_mut_slice(), &known);
        if new_q.as_slice() == q.as_slice() {
            if found.is_some() {
                return None;
            }
            found = Some(number);
        }
    }
    found
}

fn from_p(data: &[&AlignedBuffer], number: usize, p: &AlignedBuffer, length: usize) -> AlignedBuffer {
    let known: Vec<Option<&[u8]>> = data
        .iter()
        .enumerate()
        .map(|(other, buffer)| (other != number).then(|| buffer.as_slice()))
        .collect();
    let mut unit = AlignedBuffer::new(length);
    parity::recover_from_p(unit.as_mut_slice(), p.as_slice(), &known);
    unit
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// In how many independent ways the bytes of a range can be had: legs of a mirror; with parity, the stored data and what can be
    /// computed without them. At least one; it changes when devices come and go.
    pub fn copies(&self, offset: u64, length: u64) -> usize {
        let map = self.volume.map();
        let sections = map.parts(offset, length).map(|(section, ..)| section);
        sections.map(copies_of_section).max().unwrap_or(1)
    }

    /// So many of the copies, the first ones, show whatever is damaged in any column: of rows with parity, what is stored and what is
    /// computed from each parity alone.
    pub fn telling_copies(&self, offset: u64, length: u64) -> usize {
        let map = self.volume.map();
        let sections = map.parts(offset, length).map(|(section, ..)| section);
        let telling = sections.map(|section| match section.shape.parity {
            0 => copies_of_section(section),
            parity => 1 + parity,
        });
        telling.max().unwrap_or(1)
    }

    /// Reads one copy of a range, [`Self::copies`] long counted from 0. Where parts of the range have fewer copies, the last one they have.
    /// Nothing else answers if that copy cannot be read; what its device could not read is written anew from the others afterwards, as
    /// when [`Self::read`](BlockDevice::read) meets it.
    ///
    /// # Errors
    /// The copy cannot be read, or cannot be computed because devices are missing.
    pub async fn read_copy(&self, copy: usize, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::length(buffers);
        self.check(Operation::Read, offset, length)?;
        if self.volume.is_unclean(offset, length) {
            self.settle_regions(offset, length).await;
        }
        let (_held, map) = self.claim(offset, length).await;
        let mut done = 0;
        for (section, from, part) in map.parts(offset, length) {
            let copy = copy.min(copies_of_section(section) - 1);
            let mut skip = 0;
            while skip < part {
                let piece = section.shape.piece(from + skip, part - skip);
                let count = if section.shape.columns == 1 {
                    part - skip
                } else {
                    piece.length
                };
                let memory = list::part(buffers, done + skip, count);
                self.read_copy_of_piece(section, from + skip, copy, &memory)
                    .await?;
                skip += count;
            }
            done += part;
        }
        Ok(())
    }

    /// A range within one column.
    async fn read_copy_of_piece(
        &self,
        section: &SectionMap<D>,
        from: u64,
        copy: usize,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let (shape, length) = (&section.shape, list::length(buffers));
        let piece = shape.piece(from, length);
        let (column, at) = if shape.columns == 1 {
            (0, from)
        } else {
            (shape.data_column(piece.row, piece.data), shape.in_member(&piece))
        };
        if shape.parity == 0 || copy == 0 {
            let sources: Vec<_> = section
                .columns
                .get(column)
                .into_iter()
                .flat_map(|column| column.sources())
                .collect();
            let Some(member) = sources.get(copy.min(sources.len().saturating_sub(1))) else {
                return Err(self.no_copy(section, from, length));
            };
            return self.read_one(section, column, member, at, buffers).await;
        }
        let start = at - piece.row * shape.unit;
        let span = start..start + length;
        let Some((lost, parity)) = without(copy, piece.data, shape.data(), shape.parity) else {
            return Err(self.no_copy(section, from, length));
        };
        let (first, last) = section.volume_range(at, at + length);
        if self.volume.is_unclean(first, last - first) {
            return Err(self.no_copy(section, from, length));
        }
        let columns = self
            .read_all_columns(section, piece.row, &span, &lost, parity)
            .await;
        let content = compute(&columns, piece.data, &lost, index(length));
        let content = content.ok_or_else(|| self.no_copy(section, from, length))?;
        list::scatter(buffers, content.as_slice());
        Ok(())
    }

    /// Reads from one member and no other; if it cannot, what it cannot read is written anew after the claim.
    async fn read_one(
        &self,
        section: &SectionMap<D>,
        column: usize,
        member: &MemberMap<D>,
        at: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let read = member.read(self.clock(), at, buffers).await;
        read.map_err(|(disk, error)| {
            cover!("volume: one copy of a range cannot be read");
            self.repair_later(section.id, column, member.id, disk, at, list::length(buffers));
            error
        })
    }

    #[cold]
    fn no_copy(&self, section: &SectionMap<D>, from: u64, length: u64) -> IoError {
        let reason =
            std::io::Error::other("this copy cannot be read: devices are missing, or in doubt since a crash");
        self.error(Operation::Read, section.start + from, length, reason)
    }

    /// The columns of a row but for some; what cannot be read is left out. The row is claimed.
    async fn read_all_columns(
        &self,
        section: &SectionMap<D>,
        row: u64,
        span: &Range<u64>,
        lost: &[usize],
        parity: Option<usize>,
    ) -> Columns {
        let shape = &section.shape;
        let data =
            (0..shape.data()).map(|data| (!lost.contains(&data)).then(|| shape.data_column(row, data)));
        let parities = (0..shape.parity)
            .map(|number| (parity != Some(number)).then(|| shape.parity_column(row, number)));
        let (at, length) = (row * shape.unit + span.start, index(span.end - span.start));
        let reads = data
            .chain(parities)
            .map(|column| -> Boxed<'_, Option<AlignedBuffer>> {
                Box::pin(async move {
                    let column = column?;
                    let member = section.columns.get(column)?.sources().next()?;
                    let buffer = AlignedBuffer::new(length);
                    let read = self.read_one(section, column, member, at, &whole(&buffer)).await;
                    read.is_ok().then_some(buffer)
                })
            });
        let mut data = join::all(reads.collect()).await;
        let parity = data.split_off(shape.data());
        Columns { data, parity }
    }

    /// Makes all copies of a range hold these bytes, which the caller knows to be right, and parity fit them. What is bad in
    /// the same rows beside them is repaired as well where parity tells. Durable when it returns.
    ///
    /// # Errors
    /// No copy could be written.
    pub async fn repair(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::length(buffers);
        self.check(Operation::Write, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.core
            .check_writable(&self.volume.name, Operation::Write, offset, length)?;
        if self.volume.is_unclean(offset, length) {
            self.settle_regions(offset, length).await;
        }
        let (_held, map) = self.claim(offset, length).await;
        cover!("volume: a range is repaired by who knows what it holds");
        self.note_regions(offset, length, false).await?;
        let mut done = 0;
        for (section, from, part) in map.parts(offset, length) {
            let memory = list::part(buffers, done, part);
            if section.shape.parity == 0 {
                self.repair_columns(section, from, &memory).await?;
            } else {
                self.repair_rows(section, from, &memory).await?;
            }
            done += part;
        }
        if let Some(shadow) = self.volume.shadow.borrow().as_ref() {
            shadow.touch(offset, length);
        }
        Ok(())
    }

    async fn repair_columns(
        &self,
        section: &SectionMap<D>,
        from: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let length = list::length(buffers);
        let payload = Payload::Data(buffers, Durability::Durable);
        let Put { failed, bad } = self.put_columns(section, from, length, payload).await;
        if section.redundant {
            self.give_up(&failed, section, from, length).await?;
        }
        bad.map_or(Ok(()), Err)
    }

    async fn give_up(
        &self,
        failed: &[Rc<Disk<D>>],
        section: &SectionMap<D>,
        from: u64,
        length: u64,
    ) -> Result<(), IoError> {
        if failed.is_empty() {
            return Ok(());
        }
        let lost = self.core.fail(failed).await;
        lost.map_err(|reason| self.error(Operation::Write, section.start + from, length, reason))
    }

    async fn repair_rows(
        &self,
        section: &SectionMap<D>,
        from: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let (shape, length) = (&section.shape, list::length(buffers));
        let mut skip = 0;
        while skip < length {
            let piece = shape.piece(from + skip, length - skip);
            let memory = list::part(buffers, skip, piece.length);
            let mut good = AlignedBuffer::new(index(piece.length));
            list::gather(&memory, good.as_mut_slice());
            let at = shape.in_member(&piece);
            let column = shape.data_column(piece.row, piece.data);
            self.write_column(section, column, at, &good).await?;
            let start = at - piece.row * shape.unit;
            let span = start..start + piece.length;
            // Before the row of the next piece is looked at, this one fits.
            self.fit_row(section, piece.row, &span).await?;
            skip += piece.length;
        }
        Ok(())
    }

    /// Makes parity, or the one unit that parity says is bad, fit the rest of a row.
    async fn fit_row(&self, section: &SectionMap<D>, row: u64, span: &Range<u64>) -> Result<(), IoError> {
        let shape = &section.shape;
        let offset = section.start + row * shape.row_bytes();
        if section.missing() > 0 || self.volume.is_unclean(offset, shape.row_bytes()) {
            // The resync makes it whole.
            return Ok(());
        }
        let (at, length) = (row * shape.unit + span.start, index(span.end - span.start));
        let columns = self.read_all_columns(section, row, span, &[], None).await;
        let data: Vec<&AlignedBuffer> = columns.data.iter().flatten().collect();
        let bad = judge(&columns, length);
        let parities: Vec<usize> = match bad {
            Bad::Nothing => return Ok(()),
            Bad::Data(number) => {
                cover!("volume: parity tells of another bad unit");
                let Some(Some(p)) = columns.parity.first() else {
                    return Ok(());
                };
                let unit = from_p(&data, number, p, length);
                let column = shape.data_column(row, number);
                return self.write_column(section, column, at, &unit).await;
            }
            Bad::Parity(number) => vec![number],
            Bad::Unknown => (0..shape.parity).collect(),
        };
        cover!("volume: a repair makes parity fit");
        let computed = parity_of_refs(&data, shape.parity, length);
        for number in parities {
            if let Some(content) = computed.get(number) {
                let column = shape.parity_column(row, number);
                self.write_column(section, column, at, content).await?;
            }
        }
        Ok(())
    }

    async fn write_column(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        content: &AlignedBuffer,
    ) -> Result<(), IoError> {
        let Some(map) = section.columns.get(column) else {
            return Err(self.error(Operation::Write, at, 0, IoCause::OutOfRange { size: 0 }));
        };
        let memory = whole(content);
        let length = list::length(&memory);
        let payload = Payload::Data(&memory, Durability::Durable);
        let written = map.write(self.clock(), at, length, payload, true).await;
        self.give_up(&written.failed, section, 0, length).await
    }
}

/// A data unit, computed from the others without the `lost` ones, of which it is the first.
fn compute(columns: &Columns, number: usize, lost: &[usize], length: usize) -> Option<AlignedBuffer> {
    let known: Vec<Option<&[u8]>> = columns
        .data
        .iter()
        .map(|unit| unit.as_ref().map(AlignedBuffer::as_slice))
        .collect();
    let missing: Vec<usize> = (0..known.len()).filter(|unit| known[*unit].is_none()).collect();
    let parity = |number: usize| columns.parity.get(number)?.as_ref().map(AlignedBuffer::as_slice);
    let mut unit = AlignedBuffer::new(length);
    match (missing.as_slice(), parity(0), parity(1)) {
        ([one], Some(p), _) if *one == number => parity::recover_from_p(unit.as_mut_slice(), p, &known),
        ([one], None, Some(q)) if *one == number => {
            parity::recover_from_q(unit.as_mut_slice(), number, q, &known);
        }
        ([first, second], Some(p), Some(q)) if lost.contains(&number) => {
            let mut other = AlignedBuffer::new(length);
            let (first, second) = (*first, *second);
            let targets = if first == number {
                [unit.as_mut_slice(), other.as_mut_slice()]
            } else {
                [other.as_mut_slice(), unit.as_mut_slice()]
            };
            parity::recover_two(targets, [first, second], p, q, &known);
        }
        _ => return None,
    }
    Some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: usize = 64;

    fn unit(fill: u8) -> AlignedBuffer {
        let mut buffer = AlignedBuffer::new(LENGTH);
        buffer.as_mut_slice().fill(fill);
        buffer
    }

    fn row(fills: &[u8], parity: usize) -> Columns {
        let data: Vec<AlignedBuffer> = fills.iter().map(|fill| unit(*fill)).collect();
        let parity = parity_of(&data, parity, LENGTH);
        Columns {
            data: data.into_iter().map(Some).collect(),
            parity: parity.into_iter().map(Some).collect(),
        }
    }

    #[test]
    fn parity_tells_which_one_column_is_bad() {
        assert_eq!(judge(&row(&[1, 2, 3], 1), LENGTH), Bad::Nothing);
        assert_eq!(judge(&row(&[1, 2, 3], 2), LENGTH), Bad::Nothing);
        let mut bad = row(&[1, 2, 3], 2);
        bad.parity[1] = Some(unit(201));
        assert_eq!(judge(&bad, LENGTH), Bad::Parity(1));
        let mut bad = row(&[1, 2, 3], 2);
        bad.parity[0] = Some(unit(201));
        assert_eq!(judge(&bad, LENGTH), Bad::Parity(0));
        for number in 0..3 {
            let mut bad = row(&[1, 2, 3], 2);
            bad.data[number] = Some(unit(200));
            assert_eq!(judge(&bad, LENGTH), Bad::Data(number));
        }
        let mut bad = row(&[1, 2, 3], 1);
        bad.data[1] = Some(unit(200));
        assert_eq!(judge(&bad, LENGTH), Bad::Unknown);
    }

    #[test]
    fn every_copy_of_a_unit_is_computed_without_what_it_names() {
        for parity in [1, 2] {
            for number in 0..4 {
                let copies = if parity == 1 { 2 } else { 6 };
                for copy in 1..copies {
                    let (lost, off) = without(copy, number, 4, parity).unwrap();
                    assert!(lost.contains(&number));
                    let mut columns = row(&[5, 77, 130, 255], parity);
                    for unit in &lost {
                        columns.data[*unit] = None;
                    }
                    if let Some(off) = off {
                        columns.parity[off] = None;
                    }
                    let found = compute(&columns, number, &lost, LENGTH).unwrap();
                    assert_eq!(found.as_slice(), unit([5, 77, 130, 255][number]).as_slice());
                }
                assert!(without(copies, number, 4, parity).is_none());
            }
        }
    }
}
