//! A device as a pool uses it: as it is, or under a sheet of memory that takes all writes.
//!
//! To look at files, a pool that was not closed must be recovered first: logs replayed, copies made to agree. Who only looks must not
//! write, and must be able to do so while others look, too. So the same recovery happens in memory, over devices that are open
//! read-only:
//!
//! ```text
//!   pool ──write──► pages in memory
//!     └───read───► pages in memory, where there are any, over ──► the device
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode};

use crate::device::Device;

const PAGE: usize = 4096;

/// A device of a pool.
#[derive(Debug)]
pub enum Member {
    /// As it is.
    Direct(Rc<Device>),
    /// Under a sheet.
    Covered(Sheet<Device>),
}

/// Takes the writes to a device, and keeps them in memory.
#[derive(Debug)]
pub struct Sheet<D> {
    below: Rc<D>,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE]>>>,
}

impl<D: BlockDevice> Sheet<D> {
    /// Nothing is written yet.
    pub(crate) fn new(below: Rc<D>) -> Self {
        Self {
            below,
            pages: RefCell::default(),
        }
    }

    /// Sees that the page is in memory.
    async fn load(&self, page: u64) -> Result<(), IoError> {
        let offset = page * PAGE as u64;
        let length = self.below.size().saturating_sub(offset).min(PAGE as u64);
        let length = usize::try_from(length).unwrap_or(0);
        let buffer = AlignedBuffer::new(PAGE);
        // SAFETY: the buffer outlives the read, which is awaited.
        let memory = [unsafe { buffer.io(0, length) }];
        self.below.read(offset, &memory).await?;
        let mut content = Box::new([0; PAGE]);
        content.copy_from_slice(buffer.as_slice());
        // Somebody else may have been faster, and written to it.
        self.pages.borrow_mut().entry(page).or_insert(content);
        Ok(())
    }

    /// Changes a range, page by page: `change` gets the part of a page and where in the range it begins.
    async fn change(
        &self,
        offset: u64,
        length: u64,
        mut change: impl FnMut(&mut [u8], usize),
    ) -> Result<(), IoError> {
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let (page, start) = (at / PAGE as u64, at % PAGE as u64);
            let part = (PAGE as u64 - start).min(length - done);
            if part < PAGE as u64 && !self.pages.borrow().contains_key(&page) {
                self.load(page).await?;
            }
            let mut pages = self.pages.borrow_mut();
            let content = pages.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            let range = index(start)..index(start + part);
            if let Some(content) = content.get_mut(range) {
                change(content, index(done));
            }
            done += part;
        }
        Ok(())
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.below.read(offset, buffers).await?;
        let pages = self.pages.borrow();
        let mut at = offset;
        for buffer in buffers {
            let end = at + buffer.len() as u64;
            for (page, content) in pages.range(at / PAGE as u64..end.div_ceil(PAGE as u64)) {
                let first = page * PAGE as u64;
                let (start, stop) = (first.max(at), (first + PAGE as u64).min(end));
                let target = buffer.slice(index(start - at), index(stop - start));
                if let Some(source) = content.get(index(start - first)..index(stop - first)) {
                    target.copy_from_slice(source);
                }
            }
            at = end;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let mut at = offset;
        for buffer in buffers {
            let copy =
                |target: &mut [u8], start: usize| buffer.slice(start, target.len()).copy_to_slice(target);
            self.change(at, buffer.len() as u64, copy).await?;
            at += buffer.len() as u64;
        }
        Ok(())
    }
}

/// Within a page or a buffer.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl BlockDevice for Member {
    fn geometry(&self) -> Geometry {
        match self {
            Self::Direct(device) => device.geometry(),
            Self::Covered(sheet) => Geometry {
                read_only: false,
                ..sheet.below.geometry()
            },
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Direct(device) => device.size(),
            Self::Covered(sheet) => sheet.below.size(),
        }
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        match self {
            Self::Direct(device) => device.read(offset, buffers).await,
            Self::Covered(sheet) => sheet.read(offset, buffers).await,
        }
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        match self {
            Self::Direct(device) => device.write(offset, buffers, durability).await,
            Self::Covered(sheet) => sheet.write(offset, buffers).await,
        }
    }

    async fn flush(&self) -> Result<(), IoError> {
        match self {
            Self::Direct(device) => device.flush().await,
            Self::Covered(_) => Ok(()),
        }
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        match self {
            Self::Direct(device) => device.discard(offset, length).await,
            Self::Covered(_) => Ok(()),
        }
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        match self {
            Self::Direct(device) => device.write_zeroes(offset, length, mode).await,
            Self::Covered(sheet) => sheet.change(offset, length, |part, _| part.fill(0)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use block_io::{HostDevice, OpenOptions, Worker, WorkerOptions};

    use super::*;

    fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
        // SAFETY: the callers below keep the buffer until the request has ended.
        [unsafe { buffer.io(0, buffer.as_slice().len()) }]
    }

    #[test]
    fn what_is_written_is_read_again_and_the_device_stays_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 16 * PAGE]).unwrap();
        let path = file.path().to_owned();
        let worker = Worker::start("test", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            let options = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            let sheet = Sheet::new(Rc::new(HostDevice::open(&path, &options).unwrap()));
            let mut buffer = AlignedBuffer::new(2 * PAGE);
            buffer.as_mut_slice().fill(2);
            sheet.write(512, &memory(&buffer)).await.unwrap();
            sheet.change(1024, 512, |part, _| part.fill(0)).await.unwrap();
            let found = AlignedBuffer::new(4 * PAGE);
            sheet.read(0, &memory(&found)).await.unwrap();
            let mut expected = vec![1; 4 * PAGE];
            expected[512..512 + 2 * PAGE].fill(2);
            expected[1024..1536].fill(0);
            assert!(found.as_slice() == expected);
        });
        assert!(std::fs::read(file.path()).unwrap() == vec![1; 16 * PAGE]);
    }
}
