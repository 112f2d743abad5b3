//! Memory that devices take, used again: fresh memory costs more than reading into it, as the kernel clears it page by page.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use super::ALIGN;

/// Buffers of at least this size are used again.
const LARGE: usize = 256 << 10;
/// A megabyte at any place of a device, in whole blocks, wherever the memory begins.
const USUAL: usize = (1 << 20) + 3 * ALIGN;

/// Where buffers go when they are not needed, to be used again.
#[derive(Debug, Clone)]
pub(crate) struct Buffers {
    kept: Arc<Mutex<Vec<Vec<u8>>>>,
    most: usize,
}

impl Buffers {
    /// Keeps at most so many.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            kept: Arc::default(),
            most,
        }
    }

    /// A buffer of `size` bytes at an aligned address, with whatever content.
    pub(crate) fn get(&self, size: usize) -> Buffer {
        let needed = size + ALIGN;
        let known = match needed >= LARGE {
            true => self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop(),
            false => None,
        };
        let memory = match known.filter(|memory| memory.len() >= needed) {
            Some(memory) => memory,
            None if needed >= LARGE => vec![0; needed.max(USUAL)],
            None => vec![0; needed],
        };
        let at = memory.as_ptr().align_offset(ALIGN);
        Buffer {
            memory,
            at,
            length: size,
            home: Some(self.clone()),
        }
    }
}

/// Bytes in such memory, or in any other.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Vec<u8>,
    at: usize,
    length: usize,
    home: Option<Buffers>,
}

impl Buffer {
    /// All of it, to be written to.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        let range = self.at..self.at + self.length;
        self.memory.get_mut(range).unwrap_or_default()
    }

    /// Leaves this part of it.
    pub(crate) fn narrow(&mut self, skip: usize, length: usize) {
        self.at += skip.min(self.length);
        self.length = length.min(self.length.saturating_sub(skip));
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(memory: Vec<u8>) -> Self {
        Self {
            at: 0,
            length: memory.len(),
            memory,
            home: None,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let range = self.at..self.at + self.length;
        self.memory.get(range).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.take().filter(|_| self.memory.len() >= LARGE) else {
            return;
        };
        let mut kept = home.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < home.most {
            kept.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let buffers = Buffers::new(1);
        for size in [1, 4096, 300_000, 1 << 20, 3 << 20] {
            let mut buffer = buffers.get(size);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(ALIGN)), (size, 0));
            buffer.as_mut_slice().fill(1);
            buffer.narrow(size / 2, size);
            assert_eq!(buffer.len(), size - size / 2);
        }
        let first = buffers.get(1 << 20);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(buffers.get(1 << 20).as_ptr(), address);
        assert_eq!(&*Buffer::from(vec![1, 2]), &[1, 2]);
    }
}
