//! A disk for what goes wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use block_io::{Allocation, BlockDevice, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode};

/// A disk that fails when told to, and else only counts.
#[derive(Default)]
pub struct Fickle {
    pub fails: AtomicBool,
    pub writes: AtomicU32,
    pub pieces: AtomicU32,
    pub settled: AtomicU32,
}

impl BlockDevice for Fickle {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: 1 << 30,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }
    }

    async fn read(&self, _: u64, _: &[IoBuf]) -> Result<(), IoError> {
        Ok(())
    }

    async fn write(&self, offset: u64, pieces: &[IoBuf], _: Durability) -> Result<(), IoError> {
        if self.fails.load(Ordering::SeqCst) {
            let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
            let device: Arc<str> = "fickle".into();
            return Err(IoError::new(
                &device,
                Operation::Write,
                offset,
                0,
                IoCause::Os(full),
            ));
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.pieces.store(pieces.len() as u32, Ordering::SeqCst);
        Ok(())
    }

    async fn settle(&self) -> Result<(), IoError> {
        self.settled.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64) -> Result<(), IoError> {
        Ok(())
    }

    async fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode) -> Result<(), IoError> {
        Ok(())
    }

    async fn allocation(&self, _: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        Ok((Allocation::Hole, length))
    }
}
