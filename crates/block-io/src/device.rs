//! The interface of everything that behaves like a disk.

use std::future::Future;

use crate::buffer::IoBuf;
use crate::error::IoError;

/// What a device is like. Does not change while it is open, but for its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of the logical block size.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of this many bytes; a power of two, at least 512.
    pub logical_block: u32,
    /// Requests that are multiples of this many bytes, and aligned to it, need no read-modify-write below.
    pub physical_block: u32,
    /// The device is fastest with requests of this many bytes, or of multiples; 0 if it does not say.
    pub optimal_io: u32,
    /// Discards are best aligned to this many bytes; 0 if the device cannot discard.
    pub discard_granularity: u32,
    /// Whether the device takes no writes.
    pub read_only: bool,
}

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// When a read would see it; a later flush makes it durable.
    Volatile,
    /// When it is on the medium and survives a crash or a power cut ("force unit access").
    Durable,
}

/// What [`BlockDevice::write_zeroes`] may do with the space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// The space may be given back: the range becomes a hole.
    MayUnmap,
    /// The space stays allocated, so that later writes there do not run out of it.
    KeepAllocated,
}

/// How a range of a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Space with content, or not known.
    Data,
    /// Space that reads as zeroes.
    Zeroes,
    /// No space; reads as zeroes.
    Hole,
}

/// Something that behaves like a disk: an array of bytes, addressed in blocks, with a volatile cache.
///
/// # Rules
/// - `offset` and the total length of a scatter list are multiples of [`Geometry::logical_block`] and lie within the
///   device; the memory may be aligned and cut as it likes. What breaks this fails with an error and moves nothing.
/// - Requests run concurrently and complete in any order. Two that overlap, one of them a write, while both are in flight
///   leave either content, sector by sector: who needs an order waits for the completion.
/// - A completed write is seen by every read that begins later. It survives a crash once a flush that began after its
///   completion has completed, or at once with [`Durability::Durable`].
/// - After an error, a write's range holds, sector by sector, the old or the new content.
/// - Futures are driven to completion. Dropping one that is in flight is allowed but waits for it; leaking one
///   (`mem::forget`) breaks the promise that [`IoBuf::new`] demands.
pub trait BlockDevice {
    /// Size, block sizes, abilities.
    fn geometry(&self) -> Geometry;

    /// Size in bytes; may grow or shrink while the device is open.
    fn size(&self) -> u64 {
        self.geometry().size
    }

    /// Fills `buffers`, one after the other, with the bytes from `offset` on.
    fn read(&self, offset: u64, buffers: &[IoBuf]) -> impl Future<Output = Result<(), IoError>>;

    /// Writes `buffers`, one after the other, from `offset` on.
    fn write(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// Makes everything durable whose write completed before this call.
    fn flush(&self) -> impl Future<Output = Result<(), IoError>>;

    /// Sees to it that what was written before survives the end of this process, if not a power cut. For whoever answers to
    /// someone that outlives the process. A device that keeps nothing in the process has nothing to do.
    fn settle(&self) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// Says that the content of the range is no longer needed: it may read as anything afterwards. A hint; devices that
    /// cannot discard succeed without doing anything.
    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), IoError>>;

    /// Makes the range read as zeroes; like a write with [`Durability::Volatile`].
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// How the beginning of the range is stored, and for how many bytes that is so, at least one and at most `length`, which
    /// is not 0. What is not known is said to be [`Allocation::Data`]: that is always right.
    fn allocation(
        &self,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(Allocation, u64), IoError>> {
        let _ = offset;
        std::future::ready(Ok((Allocation::Data, length)))
    }
}
