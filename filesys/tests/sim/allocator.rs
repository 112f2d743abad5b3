//! Memory for explorations. Every recovery allocates the same few hundred pieces again and gives them back, all on one thread, and most
//! are as long as a page: too long for the per-thread cache of glibc's allocator, which took a quarter of all time. Here, what is given back
//! is kept in lists, one for each power of two, by each thread for itself, and handed out again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

/// The longest piece that is kept is 2 to this power minus one.
const CLASSES: usize = 21;
const PAGE: usize = 4096;

thread_local! {
    /// First pieces of the lists. A piece that is free begins with the address of the next.
    static FREE: [Cell<*mut u8>; CLASSES] = const { [const { Cell::new(ptr::null_mut()) }; CLASSES] };
}

struct Lists;

/// The list for a piece, and what its pieces are like.
fn class(layout: &Layout) -> Option<(usize, Layout)> {
    let size = layout.size().max(16).checked_next_power_of_two()?;
    let index = usize::try_from(size.trailing_zeros()).ok()?;
    let of_class = Layout::from_size_align(size, size.min(PAGE)).ok()?;
    (index < CLASSES && layout.align() <= of_class.align()).then_some((index, of_class))
}

// SAFETY: a piece comes from `System` with the size and alignment of its class, which are at least those asked for. It is in a list
// only between being given back and being handed out again, so nobody else has it; lists belong to one thread. The class
// follows from the layout alone, which is the same when a piece is given back.
unsafe impl GlobalAlloc for Lists {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((index, of_class)) = class(&layout) else {
            // SAFETY: passed on.
            return unsafe { System.alloc(layout) };
        };
        let taken = FREE.try_with(|free| {
            let piece = free[index].get();
            if !piece.is_null() {
                // SAFETY: a free piece begins with the address of the next.
                free[index].set(unsafe { piece.cast::<*mut u8>().read() });
            }
            piece
        });
        match taken {
            Ok(piece) if !piece.is_null() => piece,
            // SAFETY: the size is not zero.
            _ => unsafe { System.alloc(of_class) },
        }
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        let Some((index, of_class)) = class(&layout) else {
            // SAFETY: it came from there.
            return unsafe { System.dealloc(piece, layout) };
        };
        let kept = FREE.try_with(|free| {
            // SAFETY: nobody uses it any more, and it has room for an address, aligned.
            unsafe { piece.cast::<*mut u8>().write(free[index].get()) };
            free[index].set(piece);
        });
        if kept.is_err() {
            // SAFETY: it came from there, as one of its class.
            unsafe { System.dealloc(piece, of_class) };
        }
    }
}

#[global_allocator]
static LISTS: Lists = Lists;
