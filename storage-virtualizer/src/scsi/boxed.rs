//! A disk whose requests have memory of their own: for commands that are not plain reads and writes.
//!
//! The futures of a disk of a pool have many kilobytes. One command's future has those of all commands in it, several times; without
//! this, making it would need more than a thread's stack.

use std::pin::Pin;

use block_io::{Allocation, BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode};

/// What a request is, however large.
type Request<'a, T> = Pin<Box<dyn Future<Output = Result<T, IoError>> + 'a>>;

#[derive(Debug)]
pub(super) struct Boxed<'a, D>(pub(super) &'a D);

impl<D: BlockDevice> BlockDevice for Boxed<'_, D> {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.read(offset, buffers));
        request.await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.write(offset, buffers, durability));
        request.await
    }

    async fn flush(&self) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.flush());
        request.await
    }

    async fn settle(&self) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.settle());
        request.await
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        let request: Request<'_, (Allocation, u64)> = Box::pin(self.0.allocation(offset, length));
        request.await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.discard(offset, length));
        request.await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        let request: Request<'_, ()> = Box::pin(self.0.write_zeroes(offset, length, mode));
        request.await
    }
}
