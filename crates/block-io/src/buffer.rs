//! Memory that requests read into or write from.
//!
//! An [`IoBuf`] is a raw piece of memory with the layout of `struct iovec`, so that a slice of them goes to the kernel as
//! it is. It is raw because the memory belongs to a guest most of the time: the guest changes it while we look, so there
//! can be no Rust reference to it, only copies in and out.

use std::alloc::{self, Layout};
use std::ptr::NonNull;

/// Alignment of [`AlignedBuffer`]: enough for O_DIRECT on every device.
const BUFFER_ALIGNMENT: usize = 4096;

/// A piece of memory for a request; one element of a scatter list.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct IoBuf(libc::iovec);

impl IoBuf {
    /// The `length` bytes at `address`.
    ///
    /// # Safety
    /// As long as this value or a copy is used, and until every request that was given it has ended (its future returned
    /// `Ready` or was dropped), the memory must be valid for reads, and for writes if it is given to a read or to
    /// [`Self::copy_from_slice`]. No such future may be leaked. No Rust reference to the memory may be used meanwhile.
    ///
    /// For guest memory this holds if the requester holds the `Arc<GuestMemoryMmap>` that the address was taken from:
    /// its mappings stay until the last clone is gone.
    pub unsafe fn new(address: *mut u8, length: usize) -> Self {
        Self(libc::iovec {
            iov_base: address.cast(),
            iov_len: length,
        })
    }

    /// The first byte.
    pub fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The part from byte `start` on, of at most `length` bytes.
    pub fn slice(&self, start: usize, length: usize) -> Self {
        let start = start.min(self.len());
        Self(libc::iovec {
            // `start` is within the memory or one past its end.
            iov_base: self.address().wrapping_add(start).cast(),
            iov_len: length.min(self.len() - start),
        })
    }

    /// Whether `next` follows this memory without a gap.
    pub fn is_followed_by(&self, next: &Self) -> bool {
        self.address().wrapping_add(self.len()) == next.address()
    }

    /// This memory and `next`, which follows it, as one piece.
    pub fn joined(&self, next: &Self) -> Self {
        debug_assert!(self.is_followed_by(next));
        Self(libc::iovec {
            iov_base: self.0.iov_base,
            iov_len: self.len() + next.len(),
        })
    }

    /// Copies the memory out; both have the same length, or the shorter one counts.
    pub fn copy_to_slice(&self, target: &mut [u8]) {
        let length = self.len().min(target.len());
        // SAFETY: `new` demanded that the memory is valid for reads and that no reference to it is in use, so `target` is
        // other memory. A guest may write at the same time: the bytes copied are then any mixture, which is as it is on
        // real hardware.
        unsafe { std::ptr::copy_nonoverlapping(self.address(), target.as_mut_ptr(), length) }
    }

    /// Copies `source` into the memory; both have the same length, or the shorter one counts.
    pub fn copy_from_slice(&self, source: &[u8]) {
        let length = self.len().min(source.len());
        // SAFETY: as in `copy_to_slice`, and valid for writes.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.address(), length) }
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        // SAFETY: `new` demanded that the memory is valid for writes if this is called.
        unsafe { std::ptr::write_bytes(self.address(), value, self.len()) }
    }
}

/// Operations on whole scatter lists.
pub mod list {
    use super::IoBuf;

    /// Sum of the lengths.
    pub fn total_length(buffers: &[IoBuf]) -> u64 {
        buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }

    /// What follows the first `skip` bytes.
    fn tail(buffers: &[IoBuf], skip: u64) -> impl Iterator<Item = IoBuf> {
        let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
        buffers.iter().filter_map(move |buffer| {
            let here = skip.min(buffer.len());
            skip -= here;
            (here < buffer.len()).then(|| buffer.slice(here, usize::MAX))
        })
    }

    /// Copies of what follows the first `skip` bytes.
    pub fn after(buffers: &[IoBuf], skip: u64) -> Vec<IoBuf> {
        tail(buffers, skip).collect()
    }

    /// Copies `source` into the list, from byte `start` of the list on.
    pub fn scatter(buffers: &[IoBuf], start: u64, mut source: &[u8]) {
        for buffer in tail(buffers, start) {
            if source.is_empty() {
                break;
            }
            buffer.copy_from_slice(source);
            source = &source[buffer.len().min(source.len())..];
        }
    }

    /// Copies bytes of the list, from byte `start` on, into `target`.
    pub fn gather(buffers: &[IoBuf], start: u64, mut target: &mut [u8]) {
        for buffer in tail(buffers, start) {
            if target.is_empty() {
                break;
            }
            let length = buffer.len().min(target.len());
            buffer.copy_to_slice(target);
            target = &mut target[length..];
        }
    }

    /// Zeroes the list from byte `start` on.
    pub(crate) fn zero_from(buffers: &[IoBuf], start: u64) {
        for buffer in tail(buffers, start) {
            buffer.fill(0);
        }
    }
}

/// Zeroed memory of our own, aligned for O_DIRECT.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: NonNull<u8>,
    layout: Layout,
    length: usize,
}

// SAFETY: it owns its memory like a `Box<[u8]>`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `length` zero bytes.
    ///
    /// # Panics
    /// When memory is exhausted, as `Vec` does.
    pub fn new(length: usize) -> Self {
        let size = length.max(1).next_multiple_of(BUFFER_ALIGNMENT);
        #[expect(
            clippy::expect_used,
            reason = "the alignment is a power of two; a length beyond isize::MAX is as fatal as in Vec"
        )]
        let layout =
            Layout::from_size_align(size, BUFFER_ALIGNMENT).expect("buffer length exceeds the address space");
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc::alloc_zeroed(layout) };
        let Some(memory) = NonNull::new(memory) else {
            alloc::handle_alloc_error(layout)
        };
        Self {
            memory,
            layout,
            length,
        }
    }

    /// The first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.memory
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with at least `length` initialised bytes, borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.length) }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.length) }
    }

    /// `length` bytes from `start` on as memory for a request; less if the buffer ends before.
    ///
    /// # Safety
    /// The buffer must live, and must not be accessed otherwise, until the requests that are given the result have ended:
    /// see [`IoBuf::new`].
    pub unsafe fn io(&self, start: usize, length: usize) -> IoBuf {
        // SAFETY: the caller promises what `IoBuf::new` demands; the memory is writable as it was allocated here.
        unsafe { IoBuf::new(self.memory.as_ptr(), self.length) }.slice(start, length)
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { alloc::dealloc(self.memory.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_scattered_and_gathered_across_pieces() {
        let memory = AlignedBuffer::new(16);
        // SAFETY: `memory` outlives the list and is not accessed but through it.
        let pieces = unsafe { [memory.io(0, 4), memory.io(4, 0), memory.io(8, 8)] };
        assert_eq!(list::total_length(&pieces), 12);
        list::scatter(&pieces, 2, &[1, 2, 3, 4, 5]);
        let mut out = [9; 6];
        list::gather(&pieces, 1, &mut out);
        assert_eq!(out, [0, 1, 2, 3, 4, 5]);
        list::zero_from(&pieces, 5);
        list::gather(&pieces, 1, &mut out);
        assert_eq!(out, [0, 1, 2, 3, 0, 0]);
        let rest: Vec<usize> = list::after(&pieces, 6).iter().map(IoBuf::len).collect();
        assert_eq!(rest, [6]);
    }

    #[test]
    fn a_buffer_is_aligned_and_zero() {
        let buffer = AlignedBuffer::new(5000);
        assert_eq!(buffer.as_slice().as_ptr() as usize % BUFFER_ALIGNMENT, 0);
        assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
        assert_eq!(buffer.as_slice().len(), 5000);
    }
}
