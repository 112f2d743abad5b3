//! A virtual disk as the NBD server exports it: with what is allocated, and what has changed since its snapshots.

use std::rc::Rc;

use block_io::{BlockDevice, IoError, Operation};
use filesys::{Range, RangeKind};
use storage_virtualizer::disk::DiskError;
use storage_virtualizer::nbd::{Export, Extent, Extents};

use crate::disks::{Disks, VirtualDisk};

/// Ranges that are asked for at once.
const RANGES: usize = 256;

/// A disk of a pool that is served. Lives on the pool's worker.
pub struct DiskExport {
    name: String,
    disk: Rc<VirtualDisk>,
    disks: Disks,
    /// Those since which it is known what has changed.
    snapshots: Vec<String>,
}

impl DiskExport {
    pub(crate) async fn new(name: String, disk: Rc<VirtualDisk>, disks: Disks) -> Self {
        let mut export = Self {
            name,
            disk,
            disks,
            snapshots: Vec::new(),
        };
        let path = export.disk.path().to_string();
        // A disk that was reverted is not built on all of its snapshots.
        if let Ok(state) = export.disks.status(&path).await {
            for snapshot in state.snapshots {
                let known = export
                    .disks
                    .changed(&path, &snapshot.name, export.disk.snapshot(), 0, 1);
                if Box::pin(known).await.is_ok() {
                    export.snapshots.push(snapshot.name);
                }
            }
        }
        export
    }

    fn failed(&self, offset: u64, length: u64, error: DiskError) -> IoError {
        let cause = std::io::Error::other(error);
        IoError::new(&self.name.as_str().into(), Operation::Read, offset, length, cause)
    }
}

/// Ranges within `length` bytes from `offset` on, and what is between them: `found` is told of each with its length.
fn cover(
    offset: u64,
    length: u64,
    ranges: &[Range],
    next: Option<u64>,
    mut found: impl FnMut(u64, Option<RangeKind>) -> bool,
) {
    let end = offset + length;
    let known = next.map_or(end, |next| next.min(end));
    let mut at = offset;
    for range in ranges {
        let (from, to) = (
            range.offset.clamp(at, known),
            (range.offset + range.length).clamp(at, known),
        );
        if from > at && !found(from - at, None) {
            return;
        }
        if to > from && !found(to - from, Some(range.kind)) {
            return;
        }
        at = to.max(from);
    }
    if known > at {
        found(known - at, None);
    }
}

impl Export for DiskExport {
    type Disk = VirtualDisk;

    fn name(&self) -> &str {
        &self.name
    }

    fn disk(&self) -> &VirtualDisk {
        &self.disk
    }

    fn read_only(&self) -> bool {
        self.disk.is_read_only() || self.disk.geometry().read_only
    }

    fn zeroes_fast(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<String> {
        self.snapshots.clone()
    }

    async fn allocation(&self, offset: u64, length: u64, extents: &mut Extents) -> Result<(), IoError> {
        let path = match self.disk.snapshot() {
            Some(snapshot) => format!("{}@{snapshot}", self.disk.path()),
            None => self.disk.path().to_string(),
        };
        let map = Box::pin(self.disks.map(&path, offset, RANGES)).await;
        let (ranges, next) = map.map_err(|error| self.failed(offset, length, error))?;
        cover(offset, length, &ranges, next, |length, kind| {
            let extent = match kind {
                Some(RangeKind::Data) => Extent::Data,
                Some(RangeKind::Zero) => Extent::Zeroes,
                None => Extent::Hole,
            };
            extents.add(length, extent);
            !extents.is_full()
        });
        Ok(())
    }

    async fn changed(
        &self,
        snapshot: usize,
        offset: u64,
        length: u64,
        extents: &mut Extents,
    ) -> Result<(), IoError> {
        let Some(since) = self.snapshots.get(snapshot) else {
            extents.add_changed(length, true);
            return Ok(());
        };
        let path = self.disk.path().to_string();
        let changed = self
            .disks
            .changed(&path, since, self.disk.snapshot(), offset, RANGES);
        let (ranges, next) = Box::pin(changed)
            .await
            .map_err(|error| self.failed(offset, length, error))?;
        cover(offset, length, &ranges, next, |length, kind| {
            extents.add_changed(length, kind.is_some());
            !extents.is_full()
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_what_is_between_them_cover_what_was_asked_for() {
        let range = |offset, length, kind| Range { offset, length, kind };
        let ranges = [range(0, 20, RangeKind::Data), range(30, 10, RangeKind::Zero)];
        let told = |offset, length, next| {
            let mut told = Vec::new();
            cover(offset, length, &ranges, next, |length, kind| {
                told.push((length, kind));
                true
            });
            told
        };
        let (data, zero) = (Some(RangeKind::Data), Some(RangeKind::Zero));
        assert_eq!(
            told(10, 90, None),
            [(10, data), (10, None), (10, zero), (60, None)]
        );
        assert_eq!(told(10, 25, None), [(10, data), (10, None), (5, zero)]);
        assert_eq!(
            told(10, 90, Some(50)),
            [(10, data), (10, None), (10, zero), (10, None)]
        );
        assert_eq!(told(32, 4, None), [(4, zero)]);
        assert_eq!(told(50, 4, None), [(4, None)]);
    }
}
