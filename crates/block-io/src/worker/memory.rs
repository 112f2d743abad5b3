//! Memory that a ring knows by a number, so that the kernel need not find and hold its pages at each request.
//!
//! A request whose memory lies in such a part goes to the kernel as `READ_FIXED` or `WRITE_FIXED`, or, if it has several segments, as
//! `READV_FIXED` or `WRITEV_FIXED`; all others go as they are. So nobody has to know whether memory is held, and where the kernel refuses
//! to hold it, everything works, only slower.
//!
//! ```text
//!    part of a guest's memory   │ piece 0 │ piece 1 │ piece 2 │ …     of 128 MiB each
//!    slots of the ring               7         8         –          registered one by one, in order, as the worker has other work too
//!    requests                     fixed     fixed    as usual       with segments in two pieces: as usual
//! ```
//!
//! # Requests of several segments
//! They name one slot for all their segments. The kernel refuses the whole request if one of them is not within that slot's memory, or is
//! empty; so what is not certain to be taken is not asked for: [`Memory::find`]. It has the operations from 6.15 on, and they are used from 6.16
//! on: the first releases of 6.15 find wrong pages where memory in large folios is mapped at an address that is no multiple of their size ("io_uring: don't
//! assume uaddr alignment in io_vec_fill_bvec").
//!
//! # Hazards
//! The ring holds *pages*, not addresses. If other pages come to lie at these addresses while it does (a hole is punched, the memory is mapped anew),
//! requests move data from and to pages that nobody sees any more. So a part is held only as long as whoever asked
//! for it can promise that this does not happen: [`HeldMemory::new`]. Held pages cannot be swapped out or moved, and all of them are taken from the
//! host at once: this is for memory that is there from the start. When a part is let go of, no further request uses these pages; the kernel may take
//! up to a second to give them back (6.1 does).
//!
//! Helpers of a worker have rings of their own, which hold the same. They are told by their inbox, and waited for when a part is let go of, as the
//! next who holds these addresses may mean other pages.

use std::cell::{Cell, RefCell};
use std::io;
use std::marker::PhantomData;
use std::sync::Once;
use std::sync::mpsc::Sender;

use io_uring::{IoUring, Probe, opcode};

use super::local::{spawn_local, with_local, yield_now};

/// Slots of a ring: 512 GiB of memory.
const SLOTS: u16 = 4096;
/// Bytes behind a slot: what is held with one system call, which takes a few milliseconds at most.
const PIECE: usize = 128 << 20;
/// Entries of the list of pages that the kernel makes for a request of several segments: one allocation, of a size (32 KiB) that does not fail.
const MOST_PAGES: usize = 2048;
/// Of the smallest kind.
const PAGE: usize = 4096;

/// Addresses of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    start: usize,
    length: usize,
}

impl Part {
    pub(super) fn new(address: *mut u8, length: usize) -> Self {
        Self {
            start: address.expose_provenance(),
            length,
        }
    }
}

/// What a helper is to do.
pub(super) enum Order {
    Hold(Part),
    /// And say when that is done.
    Release(Part, Sender<()>),
}

/// A part and the slots of its first pieces.
struct Region {
    part: Part,
    users: usize,
    /// Bytes from the start that the ring holds.
    held: usize,
    slots: Vec<u16>,
    /// The kernel does not hold more of it.
    refused: bool,
}

impl Region {
    fn is_complete(&self) -> bool {
        self.refused || self.held == self.part.length
    }

    /// The slot of the piece that all of a request's segments lie in.
    #[inline]
    fn find(&self, segments: &[libc::iovec]) -> Option<u16> {
        let first = segments.first()?.iov_base.addr();
        let number = first.checked_sub(self.part.start)? / PIECE;
        let slot = *self.slots.get(number)?;
        let start = self.part.start + number * PIECE;
        let end = self.part.start + self.held.min((number + 1) * PIECE);
        let holds = |segment: &libc::iovec| {
            let from = segment.iov_base.addr();
            segment.iov_len != 0 && (start..end).contains(&from) && segment.iov_len <= end - from
        };
        segments.iter().all(holds).then_some(slot)
    }
}

/// The memory that one ring holds.
#[derive(Default)]
pub(super) struct Memory {
    regions: RefCell<Vec<Region>>,
    free: RefCell<Vec<u16>>,
    /// Something is held.
    any: Cell<bool>,
    /// Some region is not complete.
    filling: Cell<bool>,
    /// Requests of several segments can name a slot.
    pub(super) takes_lists: bool,
}

impl Memory {
    /// Makes the table in a ring. None if the kernel has none (before 5.19).
    pub(super) fn new(ring: &IoUring, probe: &Probe) -> Option<Self> {
        if let Err(error) = ring.submitter().register_buffers_sparse(SLOTS.into()) {
            tracing::debug!(%error, "no table of memory: its pages are looked up at each request");
            return None;
        }
        // The last came with 6.16.
        let needed = [
            opcode::ReadvFixed::CODE,
            opcode::WritevFixed::CODE,
            opcode::Pipe::CODE,
        ];
        Some(Self {
            free: RefCell::new((0..SLOTS).rev().collect()),
            takes_lists: needed.iter().all(|code| probe.is_supported(*code)),
            ..Self::default()
        })
    }

    /// The slot that a request with these segments can name: that of the piece that all of them lie in.
    #[inline]
    pub(super) fn find(&self, segments: &[libc::iovec]) -> Option<u16> {
        if !self.any.get() || (segments.len() > 1 && !(self.takes_lists && is_short(segments))) {
            return None;
        }
        let regions = self.regions.borrow();
        regions.iter().find_map(|region| region.find(segments))
    }

    /// Holds a part from now on, piece by piece: [`Self::hold_next`].
    pub(super) fn hold(&self, part: Part) {
        let mut regions = self.regions.borrow_mut();
        match regions.iter_mut().find(|region| region.part == part) {
            Some(region) => region.users += 1,
            None => {
                regions.push(Region {
                    part,
                    users: 1,
                    held: 0,
                    slots: Vec::new(),
                    refused: false,
                });
                self.filling.set(true);
            }
        }
    }

    /// Holds one more piece; says whether there are others.
    #[inline]
    pub(super) fn hold_next(&self, ring: &RefCell<IoUring>) -> bool {
        self.filling.get() && self.hold_piece(ring)
    }

    #[cold]
    fn hold_piece(&self, ring: &RefCell<IoUring>) -> bool {
        let mut regions = self.regions.borrow_mut();
        if let Some(region) = regions.iter_mut().find(|region| !region.is_complete()) {
            let start = region.part.start + region.held;
            let length = PIECE.min(region.part.length - region.held);
            let slot = self.free.borrow_mut().pop();
            let held = match slot {
                Some(slot) => update(ring, slot, start, length),
                None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            };
            match (held, slot) {
                (Ok(()), Some(slot)) => {
                    region.slots.push(slot);
                    region.held += length;
                    self.any.set(true);
                }
                (result, slot) => {
                    region.refused = true;
                    self.free.borrow_mut().extend(slot);
                    result.err().inspect(say_refused);
                }
            }
        }
        let more = regions.iter().any(|region| !region.is_complete());
        self.filling.set(more);
        more
    }

    /// Lets go of a part, if nobody else holds it: no request for it is in flight then.
    pub(super) fn release(&self, part: Part, ring: &RefCell<IoUring>) {
        let mut regions = self.regions.borrow_mut();
        let Some(place) = regions.iter().position(|region| region.part == part) else {
            return;
        };
        regions[place].users -= 1;
        if regions[place].users > 0 {
            return;
        }
        let region = regions.swap_remove(place);
        for slot in region.slots {
            match update(ring, slot, 0, 0) {
                Ok(()) => self.free.borrow_mut().push(slot),
                // Nothing looks for it any more; the slot is not used again.
                Err(error) => tracing::warn!(%error, "a ring does not let go of memory"),
            }
        }
        self.any.set(regions.iter().any(|region| region.held > 0));
    }
}

/// Whether the kernel makes a short list of pages of them; it reckons with two more for each segment.
fn is_short(segments: &[libc::iovec]) -> bool {
    let pages = segments.iter().fold(0_usize, |pages, segment| {
        pages.saturating_add(segment.iov_len / PAGE + 2)
    });
    pages <= MOST_PAGES
}

/// Has the ring know `length` bytes at `start` by `slot`; none of them empties it.
fn update(ring: &RefCell<IoUring>, slot: u16, start: usize, length: usize) -> io::Result<()> {
    let piece = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(start),
        iov_len: length,
    };
    // SAFETY: who holds a part promises that it stays mapped until it is let go of (`HeldMemory::new`), which empties the slot.
    unsafe {
        ring.borrow()
            .submitter()
            .register_buffers_update(slot.into(), &[piece], None)
    }
}

fn say_refused(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        let hint = match error.raw_os_error() {
            Some(libc::ENOMEM) => "; the limit of locked memory (LimitMEMLOCK, ulimit -l) may be too low",
            _ => "",
        };
        tracing::info!(%error, "guest memory is not held for disks, which then need more CPU time{hint}");
    });
}

/// Memory that the rings of a worker hold, until this is dropped there.
#[derive(Debug)]
pub struct HeldMemory {
    parts: Vec<Part>,
    /// It belongs to the worker where it was made.
    not_send: PhantomData<*const ()>,
}

impl HeldMemory {
    /// Has the worker whose task calls this, and its helpers, hold these parts (address and bytes) of memory; the same part may be held several times.
    /// Requests use what is held by then. Outside of workers nothing happens, nor where the kernel refuses.
    ///
    /// # Safety
    /// Until it is dropped the memory stays mapped, and the pages that lie at its addresses the same. When it is dropped, no request that
    /// uses the memory is in flight on this worker, but for others who hold the same part.
    pub unsafe fn new(parts: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        let parts = parts
            .into_iter()
            .map(|(address, length)| Part::new(address, length));
        let parts: Vec<_> = parts.collect();
        with_local(|local| parts.iter().for_each(|part| local.engine.hold(*part)));
        let fill = async {
            while with_local(|local| local.engine.hold_next()) == Some(true) {
                yield_now().await;
            }
        };
        // Without a worker there is nothing to fill.
        drop(spawn_local(fill));
        Self {
            parts,
            not_send: PhantomData,
        }
    }
}

impl Drop for HeldMemory {
    fn drop(&mut self) {
        with_local(|local| self.parts.iter().for_each(|part| local.engine.release(*part)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, length: usize) -> libc::iovec {
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(start),
            iov_len: length,
        }
    }

    #[test]
    fn the_slot_of_the_piece_that_has_all_segments_is_found() {
        const START: usize = 7 << 30;
        let memory = Memory {
            takes_lists: true,
            ..Memory::default()
        };
        let (first, second, end) = (START, START + PIECE, START + PIECE + 8 * PAGE);
        let find = |segments: &[(usize, usize)]| {
            let segments: Vec<_> = segments
                .iter()
                .map(|(start, length)| segment(*start, *length))
                .collect();
            memory.find(&segments)
        };
        assert_eq!(find(&[(first, 1)]), None);
        let region = |start, length, held, slots| Region {
            part: Part { start, length },
            users: 1,
            held,
            slots,
            refused: false,
        };
        memory.regions.borrow_mut().push(region(end, PIECE, 0, vec![]));
        let length = PIECE + 16 * PAGE;
        let partly = region(START, length, PIECE + 8 * PAGE, vec![5, 3]);
        memory.regions.borrow_mut().push(partly);
        memory.any.set(true);
        for (segments, slot) in [
            (vec![(first, PIECE)], Some(5)),
            (vec![(first, 1), (second - 1, 1)], Some(5)),
            (vec![(second - 1, 1), (first, 1)], Some(5)),
            (vec![(second, 1), (end - 1, 1)], Some(3)),
            (vec![(first, PAGE); 600], Some(5)),
            (vec![], None),
            (vec![(first, PIECE + 1)], None),
            (vec![(first - 1, 1)], None),
            (vec![(first, 1), (first - 1, 1)], None),
            (vec![(first, 1), (second - 1, 2)], None),
            (vec![(first, 1), (second, 1)], None),
            (vec![(second, 1), (second - 1, 1)], None),
            // Behind what is held.
            (vec![(second, 1), (end - 1, 2)], None),
            (vec![(second, 1), (end, 1)], None),
            (vec![(end, 1), (end, 1)], None),
            // The kernel takes no empty ones, nor such as end behind the last address.
            (vec![(first, 1), (first, 0)], None),
            (vec![(first, 1), (first, usize::MAX)], None),
            (vec![(0, usize::MAX)], None),
        ] {
            assert_eq!(find(&segments), slot, "{segments:x?}");
        }
    }

    #[test]
    fn a_long_list_names_no_slot() {
        let memory = Memory {
            takes_lists: true,
            ..Memory::default()
        };
        let part = Part {
            start: PAGE,
            length: PIECE,
        };
        memory.regions.borrow_mut().push(Region {
            part,
            users: 1,
            held: PIECE,
            slots: vec![9],
            refused: false,
        });
        memory.any.set(true);
        let pages = |count| segment(PAGE, count * PAGE);
        assert_eq!(memory.find(&[pages(MOST_PAGES - 5), pages(1)]), Some(9));
        assert_eq!(memory.find(&[pages(MOST_PAGES - 4), pages(1)]), None);
        assert_eq!(memory.find(&[segment(PAGE, 512); 1024]), Some(9));
        assert_eq!(memory.find(&[segment(PAGE, 512); 1025]), None);
        // Alone it may have any length.
        assert_eq!(memory.find(&[pages(MOST_PAGES * 2)]), Some(9));
    }
}
