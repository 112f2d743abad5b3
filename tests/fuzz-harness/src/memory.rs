//! Guest memory between guard pages, and a watch over who writes where.
//!
//! Pages around each region may not be touched, so an access beyond it ends the process at once, also without an address
//! sanitizer.

use std::cell::OnceCell;
use std::sync::Arc;

use virtio_core::GuestMemory;
use virtio_core::vm_memory::mmap::MmapRegion;
use virtio_core::vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::ring::{Piece, Ring};

/// The low region: rings and buffers.
pub const LOW_SIZE: u64 = 0x1_0000;
/// Where the high region begins, with a hole between.
pub const HIGH_START: u64 = 0x1_0000_0000;
/// The high region: buffers.
pub const HIGH_SIZE: u64 = 0x8000;

/// Inaccessible bytes before and behind each region.
const GUARD: usize = 0x1_0000;

/// This thread's guest memory: two regions, zeroed.
pub fn guest_memory() -> GuestMemory {
    thread_local! {
        static MEMORY: OnceCell<GuestMemory> = const { OnceCell::new() };
    }
    MEMORY.with(|memory| {
        let memory = memory.get_or_init(|| {
            let regions = [(0, LOW_SIZE), (HIGH_START, HIGH_SIZE)].map(|(start, size)| region(start, size));
            Arc::new(GuestMemoryMmap::from_regions(regions.into()).expect("two regions apart"))
        });
        for region in memory.iter() {
            memory
                .write_slice(&vec![0; region.len() as usize], region.start_addr())
                .expect("the whole region");
        }
        Arc::clone(memory)
    })
}

fn region(start: u64, size: u64) -> GuestRegionMmap {
    let size = size as usize;
    // SAFETY: a new mapping, which nobody knows but us.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size + 2 * GUARD,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(base, libc::MAP_FAILED, "no address space for guest memory");
    let place = base.wrapping_byte_add(GUARD);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: within the mapping just made.
    assert_eq!(unsafe { libc::mprotect(place, size, access) }, 0);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the mapping is never undone.
    let mapping = unsafe { MmapRegion::build_raw(place.cast(), size, access, flags) }.expect("page-aligned");
    GuestRegionMmap::new(mapping, GuestAddress(start)).expect("no overflow")
}

/// Remembers all of guest memory, to find out later whether it changed where nobody had leave to change it.
pub(crate) struct Watch {
    memory: GuestMemory,
    before: Vec<(GuestAddress, Vec<u8>)>,
    allowed: Vec<(u64, u64)>,
}

impl Watch {
    pub(crate) fn new(memory: &GuestMemory) -> Self {
        Self {
            memory: Arc::clone(memory),
            before: contents(memory),
            allowed: Vec::new(),
        }
    }

    /// What a device may write: the writable ones of `pieces`, and the used ring; and [`Ring::publish`].
    pub(crate) fn allow_device(&mut self, pieces: &[Piece], ring: &Ring) {
        let buffers = pieces.iter().filter(|piece| piece.writable);
        self.allowed
            .extend(buffers.map(|piece| (piece.address, piece.length.into())));
        self.allowed.extend(ring.moving_parts());
    }

    /// Fails if any other byte has changed.
    pub(crate) fn assert_unchanged(mut self) {
        for ((base, before), (_, now)) in self.before.iter_mut().zip(contents(&self.memory)) {
            for (address, length) in &self.allowed {
                let from = address.saturating_sub(base.0).min(now.len() as u64) as usize;
                let to = (address + length).saturating_sub(base.0).min(now.len() as u64) as usize;
                before[from..to].copy_from_slice(&now[from..to]);
            }
            if *before != now {
                let at = before.iter().zip(&now).position(|(before, now)| before != now);
                panic!(
                    "guest memory changed at {:#x}, which is in no writable buffer",
                    base.0 + at.unwrap_or(0) as u64
                );
            }
        }
    }
}

fn contents(memory: &GuestMemory) -> Vec<(GuestAddress, Vec<u8>)> {
    let region = |region: &GuestRegionMmap| {
        let mut bytes = vec![0; region.len() as usize];
        memory
            .read_slice(&mut bytes, region.start_addr())
            .expect("the whole region");
        (region.start_addr(), bytes)
    };
    memory.iter().map(region).collect()
}
