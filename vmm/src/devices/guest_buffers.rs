//! Buffers of the guest, as lists that the kernel reads from and writes to without a copy.
//!
//! A descriptor chain is a list of guest physical addresses. [`GuestBuffers`] walks chains once, checks every address
//! against guest memory and keeps the host addresses as an `iovec` list, which serves `readv`, `writev` and copies. It owns
//! a reference to the guest's memory, so that its pointers stay valid as long as it lives. All pointer work of the devices
//! is in this file.
//!
//! The guest may write its buffers while we read them. Nothing here reads a byte twice to decide something, and callers
//! copy what they parse.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_core::GuestMemory;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most pieces that one chain may have. A queue of our devices has at most 256 descriptors and a chain may not be
/// longer than its queue (virtio 1.2 §2.7.5.3.1); a piece that crosses a border of memory regions counts twice.
pub(crate) const MAX_CHAIN_SEGMENTS: usize = 400;

/// The most pieces in one list: what the kernel takes (`IOV_MAX`), without one for the overflow of [`GuestBuffers::readv`]
/// and one for the prefix of [`GuestBuffers::send`].
const MAX_SEGMENTS: usize = 1024 - 2;

/// Which buffers of a chain are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Buffers that the device reads.
    FromGuest,
    /// Buffers that the device writes.
    ToGuest,
}

/// A chain that no correct driver makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// The chain names a further descriptor that cannot be read, is a loop, or has a broken indirect table.
    #[error("a descriptor chain has no end")]
    Broken,
    /// A buffer lies outside of guest memory.
    #[error("a buffer of {length} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// No buffer, or only buffers that go the other way, where one is needed.
    #[error("a descriptor chain has no buffer that can be used")]
    Unusable,
    /// More than [`MAX_CHAIN_SEGMENTS`] pieces.
    #[error("a descriptor chain has more than {MAX_CHAIN_SEGMENTS} buffers")]
    TooManySegments,
}

/// What one chain added to a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Pieces.
    pub(crate) segments: usize,
    /// Bytes in all pieces.
    pub(crate) bytes: usize,
}

/// Buffers of one or more chains, in order.
pub(crate) struct GuestBuffers {
    memory: GuestMemory,
    segments: Vec<libc::iovec>,
    bytes: usize,
}

// SAFETY: the pointers lead into `memory`, which is owned along with them and may be used from any thread; nothing about
// them belongs to the thread that made them.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// An empty list of buffers in `memory`.
    pub(crate) fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            segments: Vec::new(),
            bytes: 0,
        }
    }

    /// Bytes in all buffers.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Pieces in the list.
    pub(crate) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Forgets all buffers.
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.bytes = 0;
    }

    /// Adds the buffers of `chain` that go in `direction`; others are skipped, as are empty ones. After an error the list is
    /// as before.
    pub(crate) fn append(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        direction: Direction,
    ) -> Result<Extent, ChainError> {
        let first = self.segments.len();
        let bytes_before = self.bytes;
        self.walk(chain, direction).inspect_err(|_| {
            self.segments.truncate(first);
            self.bytes = bytes_before;
        })?;
        Ok(Extent {
            segments: self.segments.len() - first,
            bytes: self.bytes - bytes_before,
        })
    }

    fn walk(
        &mut self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        direction: Direction,
    ) -> Result<(), ChainError> {
        let limit = MAX_SEGMENTS.min(self.segments.len() + MAX_CHAIN_SEGMENTS);
        // The iterator ends both at the last descriptor and at the first that makes no sense; they differ in whether the one
        // before promised another.
        let mut more = true;
        let mut visited = 0;
        for descriptor in chain {
            more = descriptor.has_next();
            visited += 1;
            if visited > MAX_CHAIN_SEGMENTS {
                return Err(ChainError::TooManySegments);
            }
            if descriptor.is_write_only() != (direction == Direction::ToGuest) || descriptor.len() == 0 {
                continue;
            }
            let outside = ChainError::OutsideMemory {
                address: descriptor.addr().0,
                length: descriptor.len(),
            };
            let length = usize::try_from(descriptor.len()).map_err(|_| outside)?;
            for slice in GuestMemoryBackend::get_slices(&*self.memory, descriptor.addr(), length) {
                let slice = slice.map_err(|_| outside)?;
                if self.segments.len() >= limit {
                    return Err(ChainError::TooManySegments);
                }
                self.segments.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                self.bytes += slice.len();
            }
        }
        if more { Err(ChainError::Broken) } else { Ok(()) }
    }

    /// Takes away what `extent` says from the front.
    pub(crate) fn release_front(&mut self, extent: Extent) {
        self.segments.drain(..extent.segments.min(self.segments.len()));
        self.bytes = self.bytes.saturating_sub(extent.bytes);
    }

    /// The parts of all buffers from byte `offset` on.
    fn slices(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        let mut skip = offset;
        self.segments.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.iov_len);
            skip -= skipped;
            if skipped == segment.iov_len {
                return None;
            }
            // SAFETY: `walk` took the segment from a slice of `self.memory`, which lives as long as `self`, and `skipped` is
            // less than its length. Guest memory is only accessed through volatile slices and by the kernel.
            Some(unsafe {
                VolatileSlice::new(
                    segment.iov_base.cast::<u8>().add(skipped),
                    segment.iov_len - skipped,
                )
            })
        })
    }

    /// Copies from the guest's buffers, from byte `offset` on. Returns the number of bytes, less than `data` has where the
    /// buffers end.
    pub(crate) fn copy_to(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(offset) {
            if done == data.len() {
                break;
            }
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies into the guest's buffers, from byte `offset` on. Returns the number of bytes, less than `data` has where the
    /// buffers end.
    pub(crate) fn copy_from(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(offset) {
            if done == data.len() {
                break;
            }
            let count = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + count]);
            done += count;
        }
        done
    }

    /// Appends all bytes from `offset` on to `out`.
    pub(crate) fn append_to(&self, offset: usize, out: &mut Vec<u8>) {
        for slice in self.slices(offset) {
            let start = out.len();
            out.resize(start + slice.len(), 0);
            slice.copy_to(&mut out[start..]);
        }
    }

    /// Reads into all buffers, and what does not fit into `overflow`, up to its capacity; its length becomes the number of
    /// bytes that it got.
    pub(crate) fn readv(&mut self, fd: BorrowedFd<'_>, overflow: &mut Vec<u8>) -> io::Result<usize> {
        overflow.clear();
        self.segments.push(libc::iovec {
            iov_base: overflow.as_mut_ptr().cast(),
            iov_len: overflow.capacity(),
        });
        // SAFETY: all segments but the last lead into guest memory that `self.memory` keeps mapped, the last into the unused
        // capacity of `overflow`, which is borrowed for the time of the call. At most IOV_MAX, see MAX_SEGMENTS.
        let result = unsafe { libc::readv(fd.as_raw_fd(), self.segments.as_ptr(), count(&self.segments)) };
        self.segments.pop();
        let read = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        let beyond = read.saturating_sub(self.bytes).min(overflow.capacity());
        // SAFETY: the kernel fills the segments in order; those before `overflow` hold `self.bytes` bytes, so that
        // `beyond` bytes of it are initialized.
        unsafe { overflow.set_len(beyond) };
        Ok(read)
    }

    /// Writes all buffers with one call.
    pub(crate) fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: all segments lead into guest memory that `self.memory` keeps mapped. At most IOV_MAX, see MAX_SEGMENTS.
        let result = unsafe { libc::writev(fd.as_raw_fd(), self.segments.as_ptr(), count(&self.segments)) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the buffers with one call, without waiting, with their first `skip` bytes replaced by `prefix`. Returns the
    /// number of bytes that the socket took, of `prefix` and buffers together.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], skip: usize) -> io::Result<usize> {
        let mut segments = Vec::with_capacity(self.segments.len() + 1);
        segments.push(libc::iovec {
            iov_base: prefix.as_ptr().cast_mut().cast(),
            iov_len: prefix.len(),
        });
        segments.extend(self.slices(skip).map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }));
        // SAFETY: msghdr is plain data, all zeroes is a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = segments.as_mut_ptr();
        message.msg_iovlen = segments.len();
        // SAFETY: the first segment is `prefix`, which the kernel only reads; the others lead into guest memory that
        // `self.memory` keeps mapped. At most IOV_MAX, see MAX_SEGMENTS.
        let result = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

/// The length of a list as the kernel wants it.
fn count(segments: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(segments.len()).unwrap_or(libc::c_int::MAX)
}
