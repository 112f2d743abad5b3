//! A disk in memory that insists on what a device may give it: whole blocks and, where there is a guest, buffers in its memory.

use std::cell::Cell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use block_io::{BlockDevice, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode};
use virtio_core::GuestMemory;
use virtio_core::vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// The disk.
pub(crate) struct MemoryDisk {
    name: Arc<str>,
    geometry: Geometry,
    content: Mutex<Vec<u8>>,
    /// Host addresses of guest memory; none where there is no guest.
    guest: Option<Vec<Range<usize>>>,
    /// Requests end after the task was suspended once, in an order of their own.
    late: bool,
}

/// Ready at the second look.
struct Suspend(Cell<bool>);

impl Future for Suspend {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.0.replace(false) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl MemoryDisk {
    pub(crate) fn new(memory: &GuestMemory, geometry: Geometry, late: bool) -> Self {
        let range = |region: &GuestRegionMmap| {
            let start = region.as_ptr() as usize;
            start..start + region.len() as usize
        };
        Self {
            name: "memory".into(),
            geometry,
            content: Mutex::new(initial_content(geometry.size)),
            guest: Some(memory.iter().map(range).collect()),
            late,
        }
    }

    /// For a server that has no guest: of zeroes, and with buffers anywhere.
    pub(crate) fn without_guest(geometry: Geometry) -> Self {
        Self {
            name: "memory".into(),
            geometry,
            content: Mutex::new(vec![0; geometry.size as usize]),
            guest: None,
            late: false,
        }
    }

    /// Makes all of it zeroes.
    pub(crate) fn clear(&self) {
        self.content.lock().unwrap().fill(0);
    }

    /// What the disk holds.
    pub(crate) fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// Waits where it should, then gives the place in the content that a request means.
    async fn admit(&self, operation: Operation, offset: u64, length: u64) -> Result<Range<usize>, IoError> {
        Suspend(Cell::new(self.late && offset & 512 != 0)).await;
        let writes = !matches!(operation, Operation::Read | Operation::Flush);
        place(&self.geometry, offset, length, writes)
            .map_err(|cause| IoError::new(&self.name, operation, offset, length, cause))
    }

    fn total(&self, buffers: &[IoBuf]) -> u64 {
        for buffer in buffers {
            let start = buffer.address() as usize;
            let end = start.checked_add(buffer.len()).expect("no overflow");
            let inside = self
                .guest
                .as_ref()
                .is_none_or(|guest| guest.iter().any(|range| range.start <= start && end <= range.end));
            assert!(inside, "{buffer:?} is not guest memory");
        }
        buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }
}

/// What every disk holds at first: each sector different.
pub(crate) fn initial_content(size: u64) -> Vec<u8> {
    (0..size).map(|at| (at / 512 * 7 + at % 251) as u8).collect()
}

/// The bytes that a request means, or why it means none.
pub(crate) fn place(
    geometry: &Geometry,
    offset: u64,
    length: u64,
    writes: bool,
) -> Result<Range<usize>, IoCause> {
    let size = geometry.size;
    if writes && geometry.read_only {
        return Err(IoCause::ReadOnly);
    }
    let block = u64::from(geometry.logical_block);
    if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        return Err(IoCause::Misaligned {
            block: geometry.logical_block,
        });
    }
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(offset as usize..end as usize),
        _ => Err(IoCause::OutOfRange { size }),
    }
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let place = self.admit(Operation::Read, offset, self.total(buffers)).await?;
        let content = self.content.lock().unwrap();
        let mut rest = &content[place];
        for buffer in buffers {
            let (now, later) = rest.split_at(buffer.len());
            buffer.copy_from_slice(now);
            rest = later;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], _: Durability) -> Result<(), IoError> {
        let place = self.admit(Operation::Write, offset, self.total(buffers)).await?;
        let mut content = self.content.lock().unwrap();
        let mut rest = &mut content[place];
        for buffer in buffers {
            let (now, later) = rest.split_at_mut(buffer.len());
            buffer.copy_to_slice(now);
            rest = later;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.admit(Operation::Flush, 0, 0).await.map(drop)
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.admit(Operation::Discard, offset, length).await.map(drop)
    }

    async fn write_zeroes(&self, offset: u64, length: u64, _: ZeroMode) -> Result<(), IoError> {
        let place = self.admit(Operation::WriteZeroes, offset, length).await?;
        self.content.lock().unwrap()[place].fill(0);
        Ok(())
    }
}
