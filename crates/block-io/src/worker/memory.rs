//! Memory that a ring knows by a number, so that the kernel need not find and hold its pages at each request.
//!
//! A request with one piece of memory that lies in such a part goes to the kernel as `READ_FIXED` or `WRITE_FIXED`; all others go as they
//! are. So nobody has to know whether memory is held, and where the kernel refuses to hold it, everything works, only slower.
//!
//! ```text
//!    part of a guest's memory   │ piece 0 │ piece 1 │ piece 2 │ …     of 128 MiB each
//!    slots of the ring               7         8         –          registered one by one, in order, as the worker has other work too
//!    requests                     fixed     fixed    as usual
//! ```
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

use io_uring::IoUring;

use super::local::{spawn_local, with_local, yield_now};

/// Slots of a ring: 512 GiB of memory.
const SLOTS: u16 = 4096;
/// Bytes behind a slot: what is held with one system call, which takes a few milliseconds at most.
const PIECE: usize = 128 << 20;

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
}

impl Memory {
    /// Makes the table in a ring. None if the kernel has none (before 5.19).
    pub(super) fn new(ring: &IoUring) -> Option<Self> {
        if let Err(error) = ring.submitter().register_buffers_sparse(SLOTS.into()) {
            tracing::debug!(%error, "no table of memory: its pages are looked up at each request");
            return None;
        }
        Some(Self {
            free: RefCell::new((0..SLOTS).rev().collect()),
            ..Self::default()
        })
    }

    /// The slot of the piece that `length` bytes at `address` lie in.
    #[inline]
    pub(super) fn find(&self, address: usize, length: usize) -> Option<u16> {
        if !self.any.get() {
            return None;
        }
        let regions = self.regions.borrow();
        regions.iter().find_map(|region| {
            let from = address.checked_sub(region.part.start)?;
            let last = from.checked_add(length)?.checked_sub(1)?;
            if last >= region.held || from / PIECE != last / PIECE {
                return None;
            }
            region.slots.get(from / PIECE).copied()
        })
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
