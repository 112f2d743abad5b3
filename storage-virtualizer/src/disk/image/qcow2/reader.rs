//! Images of this kind are read.

use std::ops::Range;

use super::ReadAt;
use super::header::{self, Header};
use super::unpack::unpack;
use crate::disk::image::{Image, ImageError};

/// Where an entry of a table says that something is: bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Sub-clusters of a cluster, where there are some.
const SUBS: u64 = 32;
/// Header extension: the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Bytes that are told to be data at once, at most.
const MOST: u64 = 16 << 20;

/// What a part of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The backing file has it.
    Absent,
    Zero,
    /// At this byte of the image.
    Data(u64),
    /// The entry of a compressed cluster.
    Packed(u64),
}

/// A table that was read last, by its place.
type Table = Option<(u64, Vec<u8>)>;

/// An image that is read.
pub struct Qcow2<R> {
    source: R,
    header: Header,
    l1: Vec<u8>,
    l2: Table,
    /// The compressed cluster that was read last, by its entry.
    unpacked: Table,
    backing: Option<Box<dyn Image>>,
}

impl<R> std::fmt::Debug for Qcow2<R> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let header = &self.header;
        formatter
            .debug_struct("Qcow2")
            .field("header", header)
            .finish_non_exhaustive()
    }
}

fn damaged(text: impl Into<String>) -> ImageError {
    ImageError::Damaged(text.into())
}

impl<R: ReadAt> Qcow2<R> {
    /// Opens an image. If it is built on another one, that is to be given before it is read.
    ///
    /// # Errors
    /// It is none, is damaged, or uses what is not known.
    pub fn open(source: R) -> Result<Self, ImageError> {
        let mut first = vec![0; usize::try_from(source.length().min(512)).unwrap_or(512)];
        let read = source.read_exact_at(0, &mut first);
        read.map_err(ImageError::io("cannot read the image's header"))?;
        let header = Header::parse(&first)?;
        let mut image = Self {
            source,
            header,
            l1: Vec::new(),
            l2: None,
            unpacked: None,
            backing: None,
        };
        image.l1 = image.table(
            image.header.l1_offset,
            image.header.l1_entries * 8,
            "its first table",
        )?;
        Ok(image)
    }

    /// Reads a table, after a look at whether it is there at all.
    fn table(&self, offset: u64, length: u64, what: &str) -> Result<Vec<u8>, ImageError> {
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.source.length()) {
            return Err(damaged(format!("{what} lies behind its end: it is truncated")));
        }
        let mut table = vec![0; usize::try_from(length).map_err(|_| damaged("a table is too large"))?];
        let read = self.source.read_exact_at(offset, &mut table);
        read.map_err(ImageError::io(format!(
            "cannot read the image at offset {offset}"
        )))?;
        Ok(table)
    }

    /// The name of the image on which this one is built, and what that is said to be.
    ///
    /// # Errors
    /// It lies behind the end of the image, or is no text.
    pub fn backing(&self) -> Result<Option<(String, Option<String>)>, ImageError> {
        let Some((offset, length)) = self.header.backing else {
            return Ok(None);
        };
        let name = self.table(offset, length.into(), "the name of its backing file")?;
        let name = String::from_utf8(name).map_err(|_| damaged("the name of its backing file is no text"))?;
        Ok(Some((name, self.backing_format()?)))
    }

    /// Extensions follow the header: type, length, data, filled up to 8 bytes.
    fn backing_format(&self) -> Result<Option<String>, ImageError> {
        let end = self.header.backing.map_or(0, |(offset, _)| offset);
        let mut at = u64::from(self.header.length);
        while let Some(length) = end.checked_sub(at).filter(|length| *length >= 8) {
            let head = self.table(at, 8, "a header extension")?;
            let (kind, size) = (
                header::u32_at(&head, 0).unwrap_or(0),
                header::u32_at(&head, 4).unwrap_or(0),
            );
            if kind == 0 || u64::from(size) > length - 8 {
                break;
            }
            if kind == BACKING_FORMAT {
                let text = self.table(at + 8, size.into(), "a header extension")?;
                return Ok(String::from_utf8(text).ok());
            }
            at += 8 + u64::from(size).next_multiple_of(8);
        }
        Ok(None)
    }

    /// Gives the image on which this one is built.
    pub fn set_backing(&mut self, backing: Box<dyn Image>) {
        self.backing = Some(backing);
    }

    /// What is at a place of the disk, and up to where.
    fn part(&mut self, offset: u64) -> Result<(Part, u64), ImageError> {
        let header = &self.header;
        let (cluster, entries) = (header.cluster(), header.l2_entries());
        let span = cluster * entries;
        let end_of_table = (offset / span + 1).saturating_mul(span);
        let place = usize::try_from(offset / span * 8).unwrap_or(usize::MAX);
        let l1 = header::u64_at(&self.l1, place).ok_or_else(|| damaged("its first table is too short"))?;
        let table = l1 & OFFSET;
        if table == 0 {
            return Ok((Part::Absent, end_of_table));
        }
        if !table.is_multiple_of(cluster) {
            return Err(damaged(format!(
                "a second table is said to be at {table}, where no cluster begins"
            )));
        }
        if self.l2.as_ref().is_none_or(|(at, _)| *at != table) {
            let read = self.table(table, cluster, "a second table")?;
            self.l2 = Some((table, read));
        }
        let l2 = self.l2.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let header = &self.header;
        let index = offset / cluster % entries;
        let place = usize::try_from(index * header.l2_entry()).unwrap_or(usize::MAX);
        let short = || damaged("a second table is too short");
        let entry = header::u64_at(l2, place).ok_or_else(short)?;
        let end = (offset / cluster + 1) * cluster;
        if entry & COMPRESSED != 0 {
            return Ok((Part::Packed(entry), end));
        }
        let host = entry & OFFSET;
        if host != 0 && !host.is_multiple_of(cluster) {
            return Err(damaged(format!(
                "data are said to be at {host}, where no cluster begins"
            )));
        }
        let inside = offset % cluster;
        if header.extended_l2 {
            let bits = header::u64_at(l2, place + 8).ok_or_else(short)?;
            let size = cluster / SUBS;
            let sub = inside / size;
            let part = match (bits >> sub & 1, bits >> (SUBS + sub) & 1) {
                (1, 1) => return Err(damaged("a sub-cluster is said to be both data and zeroes")),
                (1, 0) if host == 0 => return Err(damaged("a sub-cluster has data at no place")),
                (1, _) => Part::Data(host + inside),
                (_, 1) => Part::Zero,
                _ => Part::Absent,
            };
            return Ok((part, offset - inside + (sub + 1) * size));
        }
        let part = match (host, entry & ZERO) {
            (_, ZERO) if header.version >= 3 => Part::Zero,
            (0, _) => Part::Absent,
            _ => Part::Data(host + inside),
        };
        Ok((part, end))
    }

    fn unpack_cluster(&mut self, entry: u64) -> Result<&[u8], ImageError> {
        let header = &self.header;
        if self.unpacked.as_ref().is_none_or(|(of, _)| *of != entry) {
            // Bits up to `split` are the offset, those above, up to 61, the number of further sectors.
            let split = 62 - (header.cluster_bits - 8);
            let host = entry & ((1 << split) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> split;
            let length = (sectors + 1) * 512 - host % 512;
            // The last one may end with the image.
            let length = length.min(self.source.length().saturating_sub(host));
            let packed = self.table(host, length, "a compressed cluster")?;
            let mut cluster = vec![0; usize::try_from(header.cluster()).unwrap_or(0)];
            unpack(header.compression, &packed, &mut cluster).map_err(damaged)?;
            self.unpacked = Some((entry, cluster));
        }
        Ok(self.unpacked.as_ref().map_or(&[][..], |(_, bytes)| bytes))
    }

    /// What the backing file has first between two bytes of the disk.
    fn backing_data(&mut self, from: u64, to: u64) -> Result<Option<Range<u64>>, ImageError> {
        let Some(backing) = &mut self.backing else {
            return Ok(None);
        };
        let data = backing.next_data(from)?;
        Ok(data
            .map(|data| data.start.max(from)..data.end.min(to))
            .filter(|data| data.start < data.end))
    }
}

impl<R: ReadAt> Image for Qcow2<R> {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImageError> {
        let size = self.header.size;
        let (mut at, mut start) = (from, None);
        while at < size {
            if let Some(start) = start
                && at - start >= MOST
            {
                break;
            }
            let (part, end) = self.part(at)?;
            let end = end.min(size);
            match (part, start) {
                (Part::Data(_) | Part::Packed(_), None) => start = Some(at),
                (Part::Data(_) | Part::Packed(_), Some(_)) | (Part::Zero, None) => {}
                (Part::Absent, None) => {
                    if let Some(found) = self.backing_data(at, end)? {
                        return Ok(Some(found));
                    }
                }
                (Part::Zero | Part::Absent, Some(_)) => break,
            }
            at = end;
        }
        Ok(start.map(|start| start..at.min(size)))
    }

    fn read(&mut self, offset: u64, target: &mut [u8]) -> Result<(), ImageError> {
        let (mut at, mut rest) = (offset, target);
        while !rest.is_empty() {
            let (part, end) = self.part(at)?;
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (here, behind) = std::mem::take(&mut rest).split_at_mut(length);
            match part {
                Part::Zero => here.fill(0),
                Part::Absent => self.read_backing(at, here)?,
                Part::Data(host) => {
                    let last = host.checked_add(length as u64);
                    if last.is_none_or(|last| last > self.source.length()) {
                        return Err(damaged(format!(
                            "data at {host} lie behind its end: it is truncated"
                        )));
                    }
                    let read = self.source.read_exact_at(host, here);
                    read.map_err(ImageError::io(format!("cannot read the image at offset {host}")))?;
                }
                Part::Packed(entry) => {
                    let start = usize::try_from(at % self.header.cluster()).unwrap_or(0);
                    let cluster = self.unpack_cluster(entry)?;
                    let part = cluster.get(start..start + length).unwrap_or_default();
                    if part.len() == length {
                        here.copy_from_slice(part);
                    }
                }
            }
            at += length as u64;
            rest = behind;
        }
        Ok(())
    }
}

impl<R: ReadAt> Qcow2<R> {
    /// Behind the end of the backing file there are zeroes.
    fn read_backing(&mut self, at: u64, target: &mut [u8]) -> Result<(), ImageError> {
        let Some(backing) = &mut self.backing else {
            target.fill(0);
            return Ok(());
        };
        let there = usize::try_from(backing.size().saturating_sub(at)).unwrap_or(usize::MAX);
        let (here, behind) = target.split_at_mut(there.min(target.len()));
        behind.fill(0);
        match here.is_empty() {
            true => Ok(()),
            false => backing.read(at, here),
        }
    }
}
