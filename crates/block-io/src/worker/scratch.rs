//! Memory for data on their way: what is copied from place to place, or comes from a socket.
//!
//! A worker has some of its own that its ring holds ([`HeldMemory`]), and lends it by pieces: a request for such a piece costs the
//! kernel less, and the piece is neither allocated nor zeroed. Whoever finds none left, asks for more than [`LARGEST`], or is in no worker gets memory of the
//! usual kind, and need not know.
//!
//! ```text
//!   4 MiB, in huge pages where there are any   │0│1│2│3│…│1023│      units of 4 KiB
//!   a piece: 1, 2, 4, … 64 units, at a multiple of their number      one word of the map of free units tells all about 64 of them
//! ```

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::ptr::{self, NonNull};
use std::rc::Rc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::local::with_local;
use super::memory::HeldMemory;
use crate::buffer::{AlignedBuffer, IoBuf};

/// Bytes of a unit.
const UNIT: usize = 4096;
/// Units behind a word of the map.
const WORD: usize = 64;
const WORDS: usize = 16;
/// Bytes of a worker.
const SIZE: usize = WORDS * WORD * UNIT;
/// Bytes of the largest piece.
const LARGEST: usize = WORD * UNIT;
/// Of a huge page.
const HUGE: usize = 2 << 20;

/// Room for [`SIZE`] bytes at the start of a huge page.
#[derive(Debug)]
struct Mapping(NonNull<u8>);

impl Mapping {
    fn new() -> io::Result<Self> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let mapping = unsafe { mmap_anonymous(ptr::null_mut(), SIZE + HUGE, flags, MapFlags::PRIVATE) }?;
        let mapping = Self(NonNull::new(mapping.cast()).ok_or(io::ErrorKind::OutOfMemory)?);
        // SAFETY: within the mapping, which is ours. Kernels without huge pages take no advice about them.
        let _ = unsafe { madvise(mapping.start().as_ptr().cast(), SIZE, Advice::LinuxHugepage) };
        Ok(mapping)
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: there is room for a huge page more.
        unsafe { self.0.add(self.0.as_ptr().align_offset(HUGE)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and ends with us.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), SIZE + HUGE) };
    }
}

/// The memory of a worker. Whoever has a piece of it keeps it.
#[derive(Debug)]
struct Arena {
    /// Before the mapping, as it goes first.
    _held: HeldMemory,
    /// Keeps the memory.
    _mapping: Mapping,
    /// The first unit.
    start: NonNull<u8>,
    /// A bit is set where the unit is free.
    free: RefCell<[u64; WORDS]>,
    /// Where something was free.
    next: Cell<usize>,
}

impl Arena {
    fn new() -> io::Result<Self> {
        let mapping = Mapping::new()?;
        let start = mapping.start();
        Ok(Self {
            // SAFETY: it is let go of before the memory is unmapped, when nobody has a piece of it, so that no request for it is in flight.
            _held: unsafe { HeldMemory::new([(start.as_ptr(), SIZE)]) },
            _mapping: mapping,
            start,
            free: RefCell::new([u64::MAX; WORDS]),
            next: Cell::new(0),
        })
    }

    /// The first of `units` free ones, which is a power of two up to [`WORD`].
    fn take(&self, units: usize) -> Option<usize> {
        let mut free = self.free.borrow_mut();
        let order = (0..WORDS).map(|number| (self.next.get() + number) % WORDS);
        for number in order {
            if let Some(first) = first_of(free[number], units) {
                free[number] &= !(ones(units) << first);
                self.next.set(number);
                return Some(number * WORD + first);
            }
        }
        None
    }

    fn give_back(&self, first: usize, units: usize) {
        let number = first / WORD;
        self.free.borrow_mut()[number] |= ones(units) << (first % WORD);
        self.next.set(number);
    }
}

/// So many ones.
fn ones(units: usize) -> u64 {
    u64::MAX >> (WORD - units)
}

/// The first of `units` ones of a word, at a multiple of their number.
fn first_of(word: u64, units: usize) -> Option<usize> {
    (0..WORD)
        .step_by(units)
        .find(|first| word >> first & ones(units) == ones(units))
}

/// What a worker has of it, made when it is asked for first.
#[derive(Default)]
pub(super) struct Scratch(OnceCell<Option<Rc<Arena>>>);

impl Scratch {
    fn arena(&self) -> Option<Rc<Arena>> {
        let make = || {
            let made = Arena::new().inspect_err(|error| {
                tracing::debug!(%error, "a worker has no memory of its own for data on their way");
            });
            made.ok().map(Rc::new)
        };
        self.0.get_or_init(make).clone()
    }
}

/// Memory for data on their way. It has *any* content: fill it before anybody sees it.
#[derive(Debug)]
pub struct ScratchBuffer {
    memory: Memory,
    length: usize,
}

#[derive(Debug)]
enum Memory {
    Lent {
        arena: Rc<Arena>,
        first: usize,
        units: usize,
    },
    Own(AlignedBuffer),
}

impl ScratchBuffer {
    /// `length` bytes with any content, aligned for O_DIRECT.
    ///
    /// # Panics
    /// When memory is exhausted, as `Vec` does.
    pub fn new(length: usize) -> Self {
        Self {
            memory: lend(length).unwrap_or_else(|| Memory::Own(AlignedBuffer::new(length))),
            length,
        }
    }

    fn start(&self) -> NonNull<u8> {
        match &self.memory {
            // SAFETY: a unit of the arena.
            Memory::Lent { arena, first, .. } => unsafe { arena.start.add(first * UNIT) },
            Memory::Own(buffer) => buffer.start(),
        }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: so many bytes are there, and ours; mapped memory is initialised.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.length) }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.length) }
    }

    /// `length` bytes from `start` on as memory for a request; less if the buffer ends before.
    ///
    /// # Safety
    /// As for [`AlignedBuffer::io`].
    pub unsafe fn io(&self, start: usize, length: usize) -> IoBuf {
        // SAFETY: the caller's promise; the memory is writable.
        unsafe { IoBuf::new(self.start().as_ptr(), self.length) }.slice(start, length)
    }
}

fn lend(length: usize) -> Option<Memory> {
    if length > LARGEST {
        return None;
    }
    let arena = with_local(|local| local.scratch.arena())??;
    let units = length.div_ceil(UNIT).max(1).next_power_of_two();
    let first = arena.take(units)?;
    Some(Memory::Lent { arena, first, units })
}

impl Drop for ScratchBuffer {
    fn drop(&mut self) {
        if let Memory::Lent { arena, first, units } = &self.memory {
            arena.give_back(*first, *units);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::worker::{Worker, WorkerOptions};

    fn place(buffer: &ScratchBuffer) -> Option<(usize, usize)> {
        match buffer.memory {
            Memory::Lent { first, units, .. } => Some((first, units)),
            Memory::Own(_) => None,
        }
    }

    #[test]
    fn pieces_are_lent_and_come_back() {
        let worker = Worker::start("scratch", WorkerOptions::default()).unwrap();
        worker.run(|| async {
            let mut all: Vec<ScratchBuffer> = Vec::new();
            for (length, expected) in [
                (1, Some((0, 1))),
                (0, Some((1, 1))),
                (5000, Some((2, 2))),
                (LARGEST, Some((64, 64))),
                (LARGEST + 1, None),
                // Where the last was found.
                (9000, Some((128, 4))),
                (4096, Some((132, 1))),
            ] {
                let mut buffer = ScratchBuffer::new(length);
                assert_eq!((buffer.as_slice().len(), place(&buffer)), (length, expected));
                let number = all.len().try_into().unwrap();
                buffer.as_mut_slice().fill(number);
                all.push(buffer);
            }
            for (number, buffer) in all.iter().enumerate() {
                assert!(buffer.as_slice().iter().all(|byte| usize::from(*byte) == number));
            }
            drop(all);
            // All of it, and then others' memory.
            let all: Vec<_> = (0..=SIZE / LARGEST)
                .map(|_| ScratchBuffer::new(LARGEST))
                .collect();
            assert_eq!(all.iter().filter(|buffer| place(buffer).is_none()).count(), 1);
            drop(all);
            let all: Vec<_> = (0..SIZE / UNIT).map(|_| ScratchBuffer::new(UNIT)).collect();
            assert!(all.iter().all(|buffer| place(buffer).is_some()));
            assert!(place(&ScratchBuffer::new(1)).is_none());
        });
    }

    #[test]
    fn who_is_in_no_worker_gets_memory_too() {
        let buffer = ScratchBuffer::new(5000);
        assert_eq!((place(&buffer), buffer.as_slice().len()), (None, 5000));
    }

    #[test]
    fn a_piece_outlives_its_worker() {
        let worker = Worker::start("scratch", WorkerOptions::default()).unwrap();
        let kept = worker.run(|| async {
            let mut buffer = ScratchBuffer::new(UNIT);
            buffer.as_mut_slice().fill(7);
            // A test's own promise: it is not used on two threads at once.
            Moved(buffer)
        });
        drop(worker);
        assert!(kept.0.as_slice().iter().all(|byte| *byte == 7));
    }

    struct Moved(ScratchBuffer);

    // SAFETY: the worker has ended when the test goes on.
    unsafe impl Send for Moved {}
}
