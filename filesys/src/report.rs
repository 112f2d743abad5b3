//! What is where: ranges of a file that have something, ranges that changed between layers, places on volumes and devices, and who would
//! give back how much.

use std::collections::BTreeMap;

use block_io::{Allocation, BlockDevice, Clock};

use crate::File;
use crate::core::Core;
use crate::entry::Entry;
use crate::error::{FsError, Refusal};
use crate::file_core::{Chain, FileCore};
use crate::hash::siphash;
use crate::open::FileSystem;
use crate::state::{Stop, entries_of};
use crate::tree::node::FANOUT;
use crate::units::{CLUSTER, FileId, SUB_CLUSTER, SUBS, SubMask, VolumeIndex};

const PAGE: u64 = FANOUT as u64;

/// What a range of a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// Data.
    Data,
    /// It reads as zeroes, and has no data.
    Zero,
}

/// A range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is there.
    pub kind: RangeKind,
}

/// A range of a file on a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileExtent {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The layer that has it: the file or an ancestor.
    pub layer: FileId,
    /// Where.
    pub volume: VolumeIndex,
    /// First byte on the volume.
    pub start: u64,
}

/// A range of a file on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhysicalExtent {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Which device, as the volume knows it.
    pub device: u64,
    /// First byte on the device.
    pub start: u64,
}

/// A range of a volume on a device, as [`Placed::physical`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Which device.
    pub device: u64,
    /// First byte on the device.
    pub start: u64,
    /// Distinguishes this place from all others that the range ever had.
    pub identity: u64,
}

/// A volume that knows where its bytes are on devices.
pub trait Placed {
    /// One copy of each byte of a range, which can be read as it is. None if there is no such copy: what is lost has to be computed.
    fn physical(&self, offset: u64, length: u64) -> Option<Vec<Place>>;
}

/// Where a file's data are on devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentReport {
    /// Changes whenever a byte of the range, or another of the file, gets another place; the same number means the same places.
    pub configuration: u64,
    /// In order; what is not in it reads as zeroes.
    pub extents: Vec<PhysicalExtent>,
}

/// Who has how much.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes that the file has.
    pub allocated: u64,
    /// Bytes that its deletion would give back.
    pub exclusive: u64,
    /// Bytes that its children need as well.
    pub shared: u64,
    /// Bytes by volume.
    pub volumes: BTreeMap<VolumeIndex, u64>,
}

/// What a page of a map has, sub-cluster by sub-cluster: valid, zero.
type Page = [(u16, u16); FANOUT];

fn entries(file: &FileCore, first: u64) -> Result<[Entry; FANOUT], Stop> {
    Ok(file
        .map()
        .map_or(Ok([Entry::HOLE; FANOUT]), |map| entries_of(map, first))?)
}

/// The first page at or behind `page` where one of the files has something.
fn next_page(files: &[std::rc::Rc<FileCore>], page: u64) -> Result<Option<u64>, Stop> {
    let mut next: Option<u64> = None;
    for map in files.iter().filter_map(|file| file.map()) {
        if let Some(span) = map.next(page * PAGE)? {
            let found = (span.start / PAGE).max(page);
            next = Some(next.map_or(found, |next| next.min(found)));
        }
    }
    Ok(next)
}

/// What the files have together, the first ones over the later ones.
fn merged(files: &[std::rc::Rc<FileCore>], page: u64) -> Result<Page, Stop> {
    let mut merged = [(0, 0); FANOUT];
    for file in files {
        for ((valid, zero), entry) in merged.iter_mut().zip(entries(file, page * PAGE)?) {
            let open = !(*valid | *zero);
            *valid |= entry.valid() & open;
            *zero |= entry.zero() & open;
        }
    }
    Ok(merged)
}

/// Appends a range, joined with the last one if it follows it.
fn push(ranges: &mut Vec<Range>, offset: u64, length: u64, kind: RangeKind) {
    if let Some(last) = ranges.last_mut()
        && last.kind == kind
        && last.offset + last.length == offset
    {
        last.length += length;
        return;
    }
    ranges.push(Range { offset, length, kind });
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// What some layers have from page to page, until `most` ranges are found. Returns the byte from which to go on.
    async fn ranges(
        &self,
        layers: &[std::rc::Rc<FileCore>],
        size: u64,
        from: u64,
        most: usize,
        ranges: &mut Vec<Range>,
    ) -> Result<Option<u64>, FsError> {
        let mut page = from / (PAGE * CLUSTER);
        while ranges.len() < most {
            let next = self.look(|_| Ok(next_page(layers, page)?)).await?;
            let Some(next) = next.filter(|next| next * PAGE * CLUSTER < size) else {
                return Ok(None);
            };
            let merged = self.look(|_| Ok(merged(layers, next)?)).await?;
            for (index, (valid, zero)) in (0_u64..).zip(merged) {
                let start = (next * PAGE + index) * CLUSTER;
                for sub in 0..SUBS {
                    let offset = start + u64::from(sub) * SUB_CLUSTER;
                    let kind = match (SubMask(valid).contains(sub), SubMask(zero).contains(sub)) {
                        (true, _) => RangeKind::Data,
                        (false, true) => RangeKind::Zero,
                        (false, false) => continue,
                    };
                    if offset >= from && offset < size {
                        push(ranges, offset, SUB_CLUSTER.min(size - offset), kind);
                    }
                }
            }
            page = next + 1;
        }
        Ok(Some(page * PAGE * CLUSTER).filter(|next| *next < size))
    }

    async fn chain_of(&self, path: &str) -> Result<(Chain, u64), FsError> {
        self.look(|_| {
            let file = self.find_regular(path)?;
            let size = file.inode.borrow().size;
            Ok((self.chain(file.id)?, size))
        })
        .await
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    /// As [`BlockDevice::allocation`].
    pub(crate) async fn allocation_at(&self, offset: u64, length: u64) -> Result<(Allocation, u64), FsError> {
        let chain = self.chain().await?;
        let mut ranges = Vec::new();
        let from = offset - offset % SUB_CLUSTER;
        let next = self
            .core
            .ranges(&chain, self.size(), from, 1, &mut ranges)
            .await?;
        let (kind, end) = match ranges.first() {
            Some(range) if range.offset > offset => (Allocation::Hole, Some(range.offset)),
            Some(range) => {
                let kind = match range.kind {
                    RangeKind::Data => Allocation::Data,
                    RangeKind::Zero => Allocation::Zeroes,
                };
                (kind, Some(range.offset + range.length))
            }
            None => (Allocation::Hole, next),
        };
        Ok((kind, end.map_or(length, |end| length.min(end - offset))))
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Ranges of a file, with its ancestors, that have data or are zero by themselves; everything between reads as zeroes. From byte
    /// `from` on, about `most` ranges, and the byte from which to go on.
    ///
    /// # Errors
    /// There is none, or metadata cannot be read.
    pub async fn map(
        &self,
        path: &str,
        from: u64,
        most: usize,
    ) -> Result<(Vec<Range>, Option<u64>), FsError> {
        let core = self.core();
        let (chain, size) = core.chain_of(path).await?;
        let mut ranges = Vec::new();
        let next = core.ranges(&chain, size, from, most, &mut ranges).await?;
        Ok((ranges, next))
    }

    /// Ranges that were written or discarded since `before`, an ancestor of the file, was frozen; with no `before`, all that
    /// the file and its ancestors have. As [`Self::map`].
    ///
    /// # Errors
    /// There is none, or `before` is no ancestor.
    pub async fn changed(
        &self,
        path: &str,
        before: Option<&str>,
        from: u64,
        most: usize,
    ) -> Result<(Vec<Range>, Option<u64>), FsError> {
        let core = self.core();
        let (chain, size) = core.chain_of(path).await?;
        let layers = match before {
            None => chain.len(),
            Some(before) => {
                let old = core.look(|_| core.find_regular(before)).await?;
                let place = chain.iter().position(|file| file.id == old.id);
                place.ok_or_else(|| FsError::State {
                    object: before.to_owned(),
                    problem: format!("is no ancestor of {path}, so what changed since is not known"),
                })?
            }
        };
        let mut ranges = Vec::new();
        let next = core
            .ranges(&chain[..layers], size, from, most, &mut ranges)
            .await?;
        Ok((ranges, next))
    }

    /// Where the data of a range are on volumes.
    ///
    /// # Errors
    /// There is no such file, or metadata cannot be read.
    pub async fn file_extents(
        &self,
        path: &str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<FileExtent>, FsError> {
        let core = self.core();
        let (chain, size) = core.chain_of(path).await?;
        let end = offset.saturating_add(length).min(size);
        let mut extents: Vec<FileExtent> = Vec::new();
        let mut page = offset / (PAGE * CLUSTER);
        loop {
            let next = core.look(|_| Ok(next_page(&chain, page)?)).await?;
            let Some(next) = next.filter(|next| next * PAGE * CLUSTER < end) else {
                return Ok(extents);
            };
            let found = core.look(|_| extents_of_page(&chain, next)).await?;
            for extent in found {
                let start = extent.offset.max(offset);
                let stop = (extent.offset + extent.length).min(end);
                if start >= stop {
                    continue;
                }
                push_extent(
                    &mut extents,
                    FileExtent {
                        offset: start,
                        length: stop - start,
                        start: extent.start + (start - extent.offset),
                        ..extent
                    },
                );
            }
            page = next + 1;
        }
    }

    /// Who would give back how much.
    ///
    /// # Errors
    /// There is no such file, or metadata cannot be read.
    pub async fn usage(&self, path: &str) -> Result<Usage, FsError> {
        let core = self.core();
        let (file, child, children) = core
            .look(|state| {
                let file = core.find_regular(path)?;
                let (first, children) = {
                    let inode = file.inode.borrow();
                    (inode.first_child, inode.children)
                };
                let child = first.map(|first| state.file(first)).transpose()?;
                Ok((file, child, children))
            })
            .await?;
        let mut usage = Usage::default();
        let mut page = 0;
        let files = [file];
        while let Some(next) = core.look(|_| Ok(next_page(&files, page)?)).await? {
            let (own, above) = core
                .look(|_| {
                    let above = match &child {
                        Some(child) => entries(child, next * PAGE)?,
                        None => [Entry::ZERO; FANOUT],
                    };
                    Ok((entries(&files[0], next * PAGE)?, above))
                })
                .await?;
            for (entry, above) in own.iter().zip(above) {
                let Some(at) = entry.location() else { continue };
                usage.allocated += CLUSTER;
                *usage.volumes.entry(at.volume).or_default() += CLUSTER;
                let hidden = children < 2 && entry.valid() & above.holes() == 0;
                let part = if hidden {
                    &mut usage.exclusive
                } else {
                    &mut usage.shared
                };
                *part += CLUSTER;
            }
            page = next + 1;
        }
        Ok(usage)
    }
}

impl<V: BlockDevice + Placed + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Where the data of a range are on devices.
    ///
    /// # Errors
    /// There is no such file, or a volume has no copy that can be read as it is.
    pub async fn extents(&self, path: &str, offset: u64, length: u64) -> Result<ExtentReport, FsError> {
        let core = self.core();
        let mut identity = Vec::new();
        let (chain, _) = core.chain_of(path).await?;
        for file in chain.iter() {
            identity.extend(file.id.0.to_le_bytes());
            identity.extend(file.inode.borrow().placement.to_le_bytes());
        }
        let mut extents: Vec<PhysicalExtent> = Vec::new();
        for extent in self.file_extents(path, offset, length).await? {
            let volume = core.state.volume(extent.volume)?;
            let places = volume.device.physical(extent.start, extent.length);
            let places = places.ok_or_else(|| FsError::State {
                object: format!("volume {}", volume.record().name),
                problem: "has no copy that can be read without computing: repair it first, or read through the file".into(),
            })?;
            for place in places {
                let at = extent.offset + (place.offset - extent.start);
                for number in [at, place.length, place.device, place.start, place.identity] {
                    identity.extend(number.to_le_bytes());
                }
                match extents.last_mut() {
                    Some(last)
                        if last.offset + last.length == at
                            && last.device == place.device
                            && last.start + last.length == place.start =>
                    {
                        last.length += place.length;
                    }
                    _ => extents.push(PhysicalExtent {
                        offset: at,
                        length: place.length,
                        device: place.device,
                        start: place.start,
                    }),
                }
            }
        }
        Ok(ExtentReport {
            configuration: siphash([0, 0], &identity),
            extents,
        })
    }
}

fn push_extent(extents: &mut Vec<FileExtent>, extent: FileExtent) {
    if let Some(last) = extents.last_mut()
        && last.offset + last.length == extent.offset
        && last.volume == extent.volume
        && last.layer == extent.layer
        && last.start + last.length == extent.start
    {
        last.length += extent.length;
        return;
    }
    extents.push(extent);
}

fn extents_of_page(chain: &Chain, page: u64) -> Result<Vec<FileExtent>, Refusal> {
    let mut rest = [u16::MAX; FANOUT];
    let mut found: BTreeMap<u64, FileExtent> = BTreeMap::new();
    for file in chain.iter() {
        for ((index, rest), entry) in (0_u64..).zip(rest.iter_mut()).zip(entries(file, page * PAGE)?) {
            let valid = entry.valid() & *rest;
            *rest &= entry.holes();
            let Some(at) = entry.location().filter(|_| valid != 0) else {
                continue;
            };
            for sub in (0..SUBS).filter(|sub| SubMask(valid).contains(*sub)) {
                let skip = u64::from(sub) * SUB_CLUSTER;
                let offset = (page * PAGE + index) * CLUSTER + skip;
                found.insert(
                    offset,
                    FileExtent {
                        offset,
                        length: SUB_CLUSTER,
                        layer: file.id,
                        volume: at.volume,
                        start: at.offset() + skip,
                    },
                );
            }
        }
    }
    let mut extents = Vec::new();
    for extent in found.into_values() {
        push_extent(&mut extents, extent);
    }
    Ok(extents)
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Placed for volume_manager::Volume<D, C> {
    fn physical(&self, offset: u64, length: u64) -> Option<Vec<Place>> {
        let runs = volume_manager::Volume::physical(self, offset, length)?;
        let places = runs.into_iter().map(|run| Place {
            offset: run.offset,
            length: run.length,
            device: run.device.0.into(),
            start: run.start,
            identity: run.identity,
        });
        Some(places.collect())
    }
}
