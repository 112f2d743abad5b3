//! Memory for data of requests, used again and again: fresh memory of that size would cost page faults each time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block_io::{AlignedBuffer, IoBuf};

/// Smallest buffer.
const SMALLEST: usize = 4096;
/// Sizes are powers of two: 4 KiB to 32 MiB.
const CLASSES: usize = 14;

/// Unused buffers of a worker.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: RefCell<[Vec<AlignedBuffer>; CLASSES]>,
    kept: Cell<usize>,
    most: usize,
}

/// A buffer that goes back to its pool.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// Absent only while it is dropped.
    memory: Option<AlignedBuffer>,
    length: usize,
    pool: Rc<Pool>,
}

/// The class of `length`, and the size of its buffers.
fn class(length: usize) -> (usize, usize) {
    let size = length.max(SMALLEST).next_power_of_two();
    let class = size.trailing_zeros() - SMALLEST.trailing_zeros();
    (usize::try_from(class).unwrap_or(CLASSES), size)
}

impl Pool {
    /// Keeps unused buffers of at most `most` bytes together.
    pub(crate) fn new(most: usize) -> Rc<Self> {
        Rc::new(Self {
            most,
            ..Self::default()
        })
    }

    /// A buffer of `length` bytes with any content: it must be filled before anybody sees it.
    pub(crate) fn take(self: &Rc<Self>, length: usize) -> Buffer {
        let (class, size) = class(length);
        let unused = self.free.borrow_mut().get_mut(class).and_then(Vec::pop);
        let memory = match unused {
            Some(memory) => {
                self.kept.set(self.kept.get() - size);
                memory
            }
            None => AlignedBuffer::new(size),
        };
        Buffer {
            memory: Some(memory),
            length,
            pool: Rc::clone(self),
        }
    }
}

impl Buffer {
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.memory
            .as_ref()
            .and_then(|memory| memory.as_slice().get(..self.length))
            .unwrap_or_default()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        let length = self.length;
        self.memory
            .as_mut()
            .and_then(|memory| memory.as_mut_slice().get_mut(..length))
            .unwrap_or_default()
    }

    /// All of it as memory for a request.
    ///
    /// # Safety
    /// As for [`AlignedBuffer::io`]: it lives, and is not used otherwise, until the request has ended.
    pub(crate) unsafe fn io(&self) -> IoBuf {
        match &self.memory {
            // SAFETY: the caller's promise.
            Some(memory) => unsafe { memory.io(0, self.length) },
            // SAFETY: no bytes.
            None => unsafe { IoBuf::new(std::ptr::null_mut(), 0) },
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let (class, size) = class(self.length);
        let kept = self.pool.kept.get() + size;
        if kept <= self.pool.most
            && let Some(list) = self.pool.free.borrow_mut().get_mut(class)
        {
            list.push(memory);
            self.pool.kept.set(kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_up_to_a_limit() {
        let pool = Pool::new(12 << 10);
        let mut first = pool.take(5000);
        first.as_mut_slice().fill(7);
        assert_eq!((first.as_slice().len(), first.as_slice()[4999]), (5000, 7));
        let second = pool.take(100);
        let third = pool.take(8192);
        drop(first);
        assert_eq!(pool.kept.get(), 8192);
        drop(second);
        assert_eq!(pool.kept.get(), 12 << 10);
        // No room for it.
        drop(third);
        assert_eq!(pool.kept.get(), 12 << 10);
        let again = pool.take(6000);
        assert_eq!((again.as_slice()[0], pool.kept.get()), (7, 4096));
        drop(again);
        assert_eq!(pool.take(64 << 20).as_slice().len(), 64 << 20);
        assert_eq!(pool.kept.get(), 12 << 10);
    }
}
