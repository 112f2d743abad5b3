//! [`BlockDevice`] on a simulated medium.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;

use super::executor::{Request, Sim};
use super::image::View;
use super::medium::{Change, DiskOptions, Payload};
use crate::buffer::list;
use crate::{BlockDevice, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode};

/// A disk of the simulated computer.
#[derive(Debug, Clone)]
pub struct SimDisk {
    sim: Sim,
    index: usize,
    options: DiskOptions,
}

/// A request that was submitted.
struct Submitted<'a> {
    disk: &'a SimDisk,
    id: u64,
}

impl Drop for Submitted<'_> {
    fn drop(&mut self) {
        self.disk.sim.abandon(self.disk.index, self.id);
    }
}

impl SimDisk {
    pub(super) fn new(sim: Sim, index: usize, options: DiskOptions) -> Self {
        Self { sim, index, options }
    }

    /// Its number in [`World::media`](super::World).
    pub fn index(&self) -> usize {
        self.index
    }

    /// Reads into memory of the caller's, which test code and metadata prefer to scatter lists.
    ///
    /// # Errors
    /// As [`BlockDevice::read`].
    pub async fn read_bytes(&self, offset: u64, length: usize) -> Result<Vec<u8>, IoError> {
        let content = self
            .request(Operation::Read, offset, length as u64, false, None)
            .await?;
        Ok(content.map_or_else(Vec::new, |content| content.to_vec()))
    }

    /// Writes a copy of `bytes`.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    pub async fn write_bytes(
        &self,
        offset: u64,
        bytes: &[u8],
        durability: Durability,
    ) -> Result<(), IoError> {
        let data = Payload::Bytes {
            data: bytes.into(),
            skip: 0,
        };
        let durable = durability == Durability::Durable;
        self.request(Operation::Write, offset, bytes.len() as u64, durable, Some(data))
            .await?;
        Ok(())
    }

    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let Geometry {
            size,
            logical_block,
            read_only,
            ..
        } = self.options.geometry;
        let block = logical_block;
        let refused = if !offset.is_multiple_of(block.into()) || !length.is_multiple_of(block.into()) {
            IoCause::Misaligned { block }
        } else if offset.checked_add(length).is_none_or(|end| end > size) {
            IoCause::OutOfRange { size }
        } else if read_only && !matches!(operation, Operation::Read | Operation::Flush) {
            IoCause::ReadOnly
        } else {
            return Ok(());
        };
        Err(IoError::new(
            &self.options.name,
            operation,
            offset,
            length,
            refused,
        ))
    }

    async fn request(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        durable: bool,
        payload: Option<Payload>,
    ) -> Result<Option<View>, IoError> {
        self.check(operation, offset, length)?;
        if length == 0 && operation != Operation::Flush {
            return Ok(None);
        }
        let change = payload.map(|payload| Change {
            order: 0,
            offset,
            length,
            payload,
        });
        let id = self.sim.submit(Request {
            disk: self.index,
            operation,
            offset,
            length,
            durable,
            change,
        });
        let submitted = Submitted { disk: self, id };
        let answer = poll_fn(|context| self.sim.poll_answer(id, context)).await;
        drop(submitted);
        match answer.errno {
            0 => Ok(answer.content),
            errno => {
                let cause = io::Error::from_raw_os_error(errno);
                Err(IoError::new(&self.options.name, operation, offset, length, cause))
            }
        }
    }
}

impl BlockDevice for SimDisk {
    fn geometry(&self) -> Geometry {
        self.options.geometry
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        if let Some(content) = self.request(Operation::Read, offset, length, false, None).await? {
            content.scatter(buffers);
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.check(Operation::Write, offset, length)?;
        let mut data: Rc<[u8]> = std::iter::repeat_n(0, usize::try_from(length).unwrap_or(0)).collect();
        if let Some(data) = Rc::get_mut(&mut data) {
            list::gather(buffers, 0, data);
        }
        let payload = Payload::Bytes { data, skip: 0 };
        let durable = durability == Durability::Durable;
        self.request(Operation::Write, offset, length, durable, Some(payload))
            .await?;
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.request(Operation::Flush, 0, 0, false, None).await?;
        Ok(())
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.request(Operation::Discard, offset, length, false, None)
            .await?;
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, _mode: ZeroMode) -> Result<(), IoError> {
        self.request(Operation::WriteZeroes, offset, length, false, Some(Payload::Zero))
            .await?;
        Ok(())
    }
}
