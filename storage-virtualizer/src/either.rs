//! A disk of one of two kinds: so one adapter can have images of the host and disks of a pool. Which it is costs a branch for each request,
//! and no allocation.

use std::ops::Deref;

use block_io::{Allocation, BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode};

use crate::disk_handle::{DiskHandle, DiskHandleError};

/// One of two: disks, handles on disks, or what a queue's server holds of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Either<A, B> {
    /// Of the first kind.
    First(A),
    /// Of the second kind.
    Second(B),
}

/// What a queue's server holds, as a disk.
#[derive(Debug)]
pub struct LocalEither<A, B>(Either<A, B>);

impl<A, B> Deref for LocalEither<A, B> {
    type Target = Self;

    fn deref(&self) -> &Self {
        self
    }
}

/// The same for both kinds.
macro_rules! either {
    ($either:expr, $disk:ident => $do:expr) => {
        match $either {
            Either::First($disk) => $do,
            Either::Second($disk) => $do,
        }
    };
}

impl<A, B> BlockDevice for LocalEither<A, B>
where
    A: Deref<Target: BlockDevice>,
    B: Deref<Target: BlockDevice>,
{
    fn geometry(&self) -> Geometry {
        either!(&self.0, disk => disk.geometry())
    }

    fn size(&self) -> u64 {
        either!(&self.0, disk => disk.size())
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        either!(&self.0, disk => disk.read(offset, buffers).await)
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        either!(&self.0, disk => disk.write(offset, buffers, durability).await)
    }

    async fn flush(&self) -> Result<(), IoError> {
        either!(&self.0, disk => disk.flush().await)
    }

    async fn settle(&self) -> Result<(), IoError> {
        either!(&self.0, disk => disk.settle().await)
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        either!(&self.0, disk => disk.allocation(offset, length).await)
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        either!(&self.0, disk => disk.discard(offset, length).await)
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        either!(&self.0, disk => disk.write_zeroes(offset, length, mode).await)
    }
}

impl<A: DiskHandle, B: DiskHandle> DiskHandle for Either<A, B> {
    type Disk = LocalEither<A::Local, B::Local>;
    type Local = LocalEither<A::Local, B::Local>;

    fn geometry(&self) -> Geometry {
        either!(self, disk => disk.geometry())
    }

    fn continuity(&self) -> u64 {
        either!(self, disk => disk.continuity())
    }

    fn local(&self) -> Result<Self::Local, DiskHandleError> {
        Ok(LocalEither(match self {
            Self::First(disk) => Either::First(disk.local()?),
            Self::Second(disk) => Either::Second(disk.local()?),
        }))
    }
}
