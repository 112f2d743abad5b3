//! Devices that forget, so that they can be as large as one likes.

use block_io::{BlockDevice, Durability, Geometry, HostDevice, IoBuf, IoError, ZeroMode};

pub(crate) enum Fake {
    /// A file: for metadata.
    Kept(HostDevice),
    /// So many bytes of which none is kept. Reads give whatever was in the memory.
    Forgets(u64),
}

impl BlockDevice for Fake {
    fn geometry(&self) -> Geometry {
        match self {
            Self::Kept(device) => device.geometry(),
            Self::Forgets(size) => Geometry {
                size: *size,
                logical_block: 512,
                physical_block: 4096,
                optimal_io: 0,
                discard_granularity: 4096,
                read_only: false,
            },
        }
    }

    fn size(&self) -> u64 {
        self.geometry().size
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        match self {
            Self::Kept(device) => device.read(offset, buffers).await,
            Self::Forgets(_) => Ok(()),
        }
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        match self {
            Self::Kept(device) => device.write(offset, buffers, durability).await,
            Self::Forgets(_) => Ok(()),
        }
    }

    async fn flush(&self) -> Result<(), IoError> {
        match self {
            Self::Kept(device) => device.flush().await,
            Self::Forgets(_) => Ok(()),
        }
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        match self {
            Self::Kept(device) => device.discard(offset, length).await,
            Self::Forgets(_) => Ok(()),
        }
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        match self {
            Self::Kept(device) => device.write_zeroes(offset, length, mode).await,
            Self::Forgets(_) => Ok(()),
        }
    }
}
