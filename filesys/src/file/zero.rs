//! Discards and zeroes: whole sub-clusters lose their content in the map, and their clusters go if nothing else is in them.

use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, ZeroMode};

use super::handle::File;
use super::memory::whole;
use super::write::PAGE_BYTES;
use crate::core::Need;
use crate::error::FsError;
use crate::file_core::FileCore;
use crate::record::{LARGEST, Record};
use crate::units::{CLUSTER, SUB_CLUSTER};

/// Pages of a map that one record clears, at most, where there is nothing to clear but zeroes must hide a parent.
const STEP_PAGES: u64 = 64;

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    /// The whole sub-clusters of a range lose their content; they read as zeroes. The rest is left alone, which a discard may.
    pub(super) async fn discard_range(&self, offset: u64, length: u64) -> Result<(), FsError> {
        self.core.check()?;
        let (start, end) = inner(offset, length, self.size_rounded(offset + length));
        self.clear(start, end, ZeroMode::MayUnmap).await
    }

    pub(super) async fn zero_range(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), FsError> {
        self.core.check()?;
        let end = offset + length;
        let (first, last) = inner(offset, length, self.size_rounded(end));
        if first >= last {
            return self.write_zero_bytes(offset, end).await;
        }
        self.write_zero_bytes(offset, first).await?;
        self.clear(first, last, mode).await?;
        self.write_zero_bytes(last.min(end), end).await
    }

    /// The end of a range, rounded up if it is the end of the file.
    fn size_rounded(&self, end: u64) -> u64 {
        if end == self.head().inode.borrow().size {
            end.next_multiple_of(SUB_CLUSTER)
        } else {
            end
        }
    }

    async fn write_zero_bytes(&self, start: u64, end: u64) -> Result<(), FsError> {
        if start >= end {
            return Ok(());
        }
        let buffer = AlignedBuffer::new(usize::try_from(end - start).unwrap_or(0));
        self.write_range(start, end - start, &whole(&buffer), Durability::Volatile)
            .await
    }

    async fn clear(&self, start: u64, end: u64, mode: ZeroMode) -> Result<(), FsError> {
        let mut at = start;
        while at < end {
            let page = at / PAGE_BYTES;
            let file = self.head();
            let hidden = file.parent().is_some();
            // Pages without anything need no record, or one for many of them.
            let next = self.next_used(&file, at, end).await?;
            if next > at && !hidden {
                at = next;
                continue;
            }
            let last_page = if next > at {
                (page + STEP_PAGES - 1).min((next - 1) / PAGE_BYTES)
            } else {
                page
            };
            let stop = ((last_page + 1) * PAGE_BYTES)
                .min(end)
                .min(if next > at { next } else { u64::MAX });
            let pass = file.gate.alone(page, last_page).await;
            if !Rc::ptr_eq(&file, &self.head()) {
                continue;
            }
            self.check_thawed(&file)?;
            self.clear_part(&file, at, stop, hidden, mode).await?;
            drop(pass);
            at = stop;
        }
        Ok(())
    }

    /// The first byte from `at` on where the file itself may have something, `end` at most.
    async fn next_used(&self, file: &FileCore, at: u64, end: u64) -> Result<u64, FsError> {
        let cluster = at / CLUSTER;
        let next = self
            .core
            .look(|_| match file.map() {
                Some(map) => Ok(map.next(cluster)?),
                None => Ok(None),
            })
            .await?;
        let start = next.map_or(end, |span| span.start.saturating_mul(CLUSTER));
        Ok(start.clamp(at, end))
    }

    async fn clear_part(
        &self,
        file: &FileCore,
        start: u64,
        end: u64,
        hidden: bool,
        mode: ZeroMode,
    ) -> Result<(), FsError> {
        let (first, last) = (start / SUB_CLUSTER, end / SUB_CLUSTER);
        let bytes = match mode {
            ZeroMode::MayUnmap => LARGEST,
            ZeroMode::KeepAllocated => crate::record::MAP_BYTES * 257,
        };
        let (group, ()) = self
            .core
            .transact(bytes, Need::Freeing, |_| {
                let records = match mode {
                    ZeroMode::MayUnmap => vec![Record::Clear {
                        file: file.id,
                        first,
                        count: last - first,
                        zero: hidden,
                    }],
                    ZeroMode::KeepAllocated => keep_places(file, first, last, hidden)?,
                };
                Ok((records, ()))
            })
            .await?;
        file.group.set(file.group.get().max(group));
        Ok(())
    }
}

/// Zeroes, with the places that there are kept.
fn keep_places(
    file: &FileCore,
    first: u64,
    last: u64,
    hidden: bool,
) -> Result<Vec<Record>, crate::error::Refusal> {
    let Some(map) = file.map() else {
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    for (cluster, mask) in crate::state::clusters_of(first, last) {
        let old = map.entry(cluster)?;
        let new = if old.location().is_some() {
            old.with_subs(old.valid() & !mask.0, old.zero() | mask.0)
        } else {
            old.without(mask, hidden)
        };
        if new != old {
            records.push(Record::Map {
                file: file.id,
                first: u32::try_from(cluster).unwrap_or(u32::MAX),
                count: 1,
                entry: new,
                moved: false,
            });
        }
    }
    Ok(records)
}

/// Whole sub-clusters within a range.
fn inner(offset: u64, length: u64, end: u64) -> (u64, u64) {
    let end = end.max(offset + length);
    let start = offset.next_multiple_of(SUB_CLUSTER);
    (start, (end - end % SUB_CLUSTER).max(start))
}
