//! Rows with parity as a whole: what of a row cannot be read is computed from the rest, parity is checked and made anew, rows
//! are written into sections that nobody reads yet. Writes of guests are in [`rows`](super::rows).

use std::ops::Range;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoError, Operation, cover};

use super::disk::Disk;
use super::join::{self, Boxed};
use super::list;
use super::map::{Payload, SectionMap, Written};
use super::rows::{index, parity_of, whole};
use super::volume::Volume;

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Reads the same range of several columns.
    pub(super) async fn read_columns(
        &self,
        section: &SectionMap<D>,
        columns: &[usize],
        at: u64,
        length: usize,
    ) -> Result<Vec<AlignedBuffer>, IoError> {
        let buffers: Vec<AlignedBuffer> = columns.iter().map(|_| AlignedBuffer::new(length)).collect();
        let reads = columns
            .iter()
            .zip(&buffers)
            .map(|(column, buffer)| -> Boxed<'_, Result<(), IoError>> {
                Box::pin(async move { self.read_column(section, *column, at, &whole(buffer)).await })
            });
        let results = join::all(reads.collect()).await;
        results.into_iter().collect::<Result<(), IoError>>()?;
        Ok(buffers)
    }

    /// The content of all data units of a row within `span`, reconstructed where it must be. Units for which `skip` holds are
    /// left as zeroes if they are not needed for that. The column `without` is not used. The row is claimed.
    pub(crate) async fn read_row(
        &self,
        section: &SectionMap<D>,
        row: u64,
        span: &Range<u64>,
        skip: &dyn Fn(usize) -> bool,
        without: Option<usize>,
    ) -> Result<Vec<AlignedBuffer>, IoError> {
        let shape = &section.shape;
        let (at, length) = (row * shape.unit + span.start, index(span.end - span.start));
        let mut data: Vec<AlignedBuffer> = (0..shape.data()).map(|_| AlignedBuffer::new(length)).collect();
        let mut lost = Vec::new();
        let mut reads: Vec<Boxed<'_, (usize, bool)>> = Vec::new();
        for (number, buffer) in data.iter().enumerate() {
            let column = shape.data_column(row, number);
            if skip(number) {
                continue;
            }
            if without == Some(column) || !section.readable(column) {
                lost.push(number);
                continue;
            }
            reads.push(Box::pin(async move {
                let read = self.read_column(section, column, at, &whole(buffer)).await;
                (number, read.is_ok())
            }));
        }
        let results = join::all(reads).await;
        lost.extend(
            results
                .into_iter()
                .filter_map(|(number, good)| (!good).then_some(number)),
        );
        if lost.is_empty() {
            return Ok(data);
        }
        lost.sort_unstable();
        // All of the row is needed now, also what was to be skipped.
        for number in (0..shape.data()).filter(|number| skip(*number)) {
            let column = shape.data_column(row, number);
            let read = match (without == Some(column), data.get(number)) {
                (false, Some(buffer)) => self
                    .read_column(section, column, at, &whole(buffer))
                    .await
                    .is_ok(),
                _ => false,
            };
            if !read {
                lost.push(number);
            }
        }
        lost.sort_unstable();
        self.reconstruct(section, row, at, &mut data, &lost, without)
            .await?;
        Ok(data)
    }

    /// Computes the lost units of a row from the others and from parity.
    async fn reconstruct(
        &self,
        section: &SectionMap<D>,
        row: u64,
        at: u64,
        data: &mut [AlignedBuffer],
        lost: &[usize],
        without: Option<usize>,
    ) -> Result<(), IoError> {
        let shape = &section.shape;
        let (start, end) = section.volume_range(row * shape.unit, (row + 1) * shape.unit);
        let failed = |why: &str| {
            self.error(
                Operation::Read,
                start,
                end - start,
                std::io::Error::other(why.to_owned()),
            )
        };
        if lost.len() > shape.parity {
            return Err(failed("more devices are missing than the layout tolerates"));
        }
        if self.volume.is_unclean(start, end - start) {
            cover!("rows: a reconstruction that cannot be trusted is refused");
            return Err(failed(
                "a crash left this row's parity in doubt, and a device of it is missing: bring the device back",
            ));
        }
        let length = data.first().map_or(0, |buffer| buffer.as_slice().len());
        let mut parity: Vec<Option<AlignedBuffer>> = Vec::new();
        for number in 0..shape.parity {
            let column = shape.parity_column(row, number);
            if without == Some(column) || !section.readable(column) {
                parity.push(None);
                continue;
            }
            let buffer = AlignedBuffer::new(length);
            let read = self.read_column(section, column, at, &whole(&buffer)).await;
            parity.push(read.is_ok().then_some(buffer));
        }
        if parity.iter().flatten().count() < lost.len() {
            return Err(failed("more devices are missing than the layout tolerates"));
        }
        cover!("rows: reconstructed from parity");
        let mut results: Vec<AlignedBuffer> = lost.iter().map(|_| AlignedBuffer::new(length)).collect();
        {
            let known: Vec<Option<&[u8]>> = data
                .iter()
                .enumerate()
                .map(|(number, buffer)| (!lost.contains(&number)).then(|| buffer.as_slice()))
                .collect();
            let p = parity
                .first()
                .and_then(Option::as_ref)
                .map(AlignedBuffer::as_slice);
            let q = parity
                .get(1)
                .and_then(Option::as_ref)
                .map(AlignedBuffer::as_slice);
            match (results.as_mut_slice(), lost, p, q) {
                ([one], [_], Some(p), _) => parity::recover_from_p(one.as_mut_slice(), p, &known),
                ([one], [number], None, Some(q)) => {
                    parity::recover_from_q(one.as_mut_slice(), *number, q, &known);
                }
                ([one, two], [first, second], Some(p), Some(q)) => {
                    let targets = [one.as_mut_slice(), two.as_mut_slice()];
                    parity::recover_two(targets, [*first, *second], p, q, &known);
                }
                _ => return Err(failed("more devices are missing than the layout tolerates")),
            }
        }
        for (number, content) in lost.iter().zip(results) {
            if let Some(place) = data.get_mut(*number) {
                *place = content;
            }
        }
        Ok(())
    }

    /// Whether the parity of a row is what its data say. The row is claimed.
    pub(crate) async fn parity_fits(&self, section: &SectionMap<D>, row: u64) -> Result<bool, IoError> {
        let shape = &section.shape;
        let data = (0..shape.data()).map(|data| shape.data_column(row, data));
        let columns: Vec<usize> = data
            .chain((0..shape.parity).map(|number| shape.parity_column(row, number)))
            .collect();
        let mut data = self
            .read_columns(section, &columns, row * shape.unit, index(shape.unit))
            .await?;
        let found = data.split_off(shape.data());
        let computed = parity_of(&data, shape.parity, index(shape.unit));
        Ok(found
            .iter()
            .zip(&computed)
            .all(|(found, computed)| found.as_slice() == computed.as_slice()))
    }

    /// Writes the parity of a row anew; gives the devices that failed. The row is claimed, and all its data can be read.
    pub(crate) async fn rewrite_parity(
        &self,
        section: &SectionMap<D>,
        row: u64,
    ) -> Result<Vec<Rc<Disk<D>>>, IoError> {
        let (shape, clock) = (&section.shape, self.clock());
        let columns: Vec<usize> = (0..shape.data())
            .map(|data| shape.data_column(row, data))
            .collect();
        let (at, length) = (row * shape.unit, index(shape.unit));
        let data = self.read_columns(section, &columns, at, length).await?;
        let parity = parity_of(&data, shape.parity, length);
        let mut failed = Vec::new();
        for (number, content) in parity.iter().enumerate() {
            let Some(column) = section.columns.get(shape.parity_column(row, number)) else {
                continue;
            };
            let payload = whole(content);
            let payload = Payload::Data(&payload, Durability::Volatile);
            failed.extend(column.write(clock, at, shape.unit, payload, true).await.failed);
        }
        Ok(failed)
    }

    /// Writes whole rows, the last one perhaps short, into a section that nobody reads yet; gives the devices that failed.
    pub(crate) async fn put_rows(
        &self,
        section: &SectionMap<D>,
        from: u64,
        content: &AlignedBuffer,
    ) -> Vec<Rc<Disk<D>>> {
        let shape = &section.shape;
        let (row_bytes, unit) = (index(shape.row_bytes()), index(shape.unit));
        let mut failed = Vec::new();
        for (number, bytes) in content.as_slice().chunks(row_bytes.max(1)).enumerate() {
            let row = from / shape.row_bytes() + number as u64;
            let mut data: Vec<AlignedBuffer> = (0..shape.data()).map(|_| AlignedBuffer::new(unit)).collect();
            for (target, source) in data.iter_mut().zip(bytes.chunks(unit.max(1))) {
                target.as_mut_slice()[..source.len()].copy_from_slice(source);
            }
            let parity = parity_of(&data, shape.parity, unit);
            let columns = (0..shape.data()).map(|data| shape.data_column(row, data));
            let columns = columns.chain((0..shape.parity).map(|number| shape.parity_column(row, number)));
            let writes = columns
                .zip(data.iter().chain(&parity))
                .filter_map(|(column, content)| {
                    let column = section.columns.get(column)?;
                    let write: Boxed<'_, Written<D>> = Box::pin(async move {
                        let memory = whole(content);
                        let payload = Payload::Data(&memory, Durability::Volatile);
                        column
                            .write(self.clock(), row * shape.unit, shape.unit, payload, true)
                            .await
                    });
                    Some(write)
                });
            let written = join::all(writes.collect()).await;
            failed.extend(written.into_iter().flat_map(|written| written.failed));
        }
        failed
    }

    /// Computes what a column holds from the others. The rows are claimed.
    pub(crate) async fn reconstruct_range(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        buffers: &[IoBuf],
    ) -> Result<(), IoError> {
        let shape = &section.shape;
        let length = list::length(buffers);
        let mut skip = 0;
        while skip < length {
            let row = (at + skip) / shape.unit;
            let within = (at + skip) % shape.unit;
            let part = (shape.unit - within).min(length - skip);
            let span = within..within + part;
            let memory = list::part(buffers, skip, part);
            let data = self
                .read_row(section, row, &span, &|_| false, Some(column))
                .await?;
            match shape.role(row, column) {
                super::geometry::Role::Data(number) => {
                    if let Some(content) = data.get(number) {
                        list::scatter(&memory, content.as_slice());
                    }
                }
                super::geometry::Role::Parity(number) => {
                    let parity = parity_of(&data, shape.parity, index(part));
                    if let Some(content) = parity.get(number) {
                        list::scatter(&memory, content.as_slice());
                    }
                }
            }
            skip += part;
        }
        Ok(())
    }
}
