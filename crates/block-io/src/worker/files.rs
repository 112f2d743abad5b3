//! Files that a ring knows by a number of its own, so that the kernel need not look up and count the descriptor at each request.
//!
//! ```text
//!              first request            the ring's answer
//!     Free ──────────────────► Joining ──────────────────► Joined: requests use the slot
//!      ▲                          │  device closed             │ device closed
//!      └───── the ring's answer ──┴────── Leaving ◄────────────┘
//! ```
//!
//! A file is known by its [`FileNumber`], which no other file of the process ever has; so a descriptor that is closed and
//! given to another file can never lead to the wrong one. Each number has one slot that it may have; if another file is
//! there, requests go by the descriptor, as they do until the ring has answered, and where the kernel has no such table.
//!
//! Files come and go by requests in the ring (`IORING_OP_FILES_UPDATE`), which pass no system call filter.

use std::cell::Cell;
use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode};

/// Slots of a ring.
pub(super) const SLOTS: u32 = 64;
/// What stands for no file.
const NO_FILE: RawFd = -1;

/// Names an open file to all workers, until it is dropped: before the file is closed.
#[derive(Debug)]
pub(crate) struct FileNumber(NonZeroU64);

impl FileNumber {
    pub(crate) fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let before = LAST.fetch_add(1, Ordering::Relaxed);
        Self(NonZeroU64::MIN.saturating_add(before))
    }

    pub(crate) fn get(&self) -> NonZeroU64 {
        self.0
    }
}

impl Drop for FileNumber {
    fn drop(&mut self) {
        super::local::forget_file(self.0);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// The ring was told; the file with this number may be closed meanwhile.
    Joining {
        number: NonZeroU64,
        closed: bool,
    },
    Joined(NonZeroU64),
    Leaving,
}

/// The files of one ring.
pub(super) struct Files {
    slots: [Cell<State>; SLOTS as usize],
    /// The kernel refused a file, and is not asked again.
    refused: Cell<bool>,
    /// What the kernel reads the descriptors from while a slot is joining or leaving. Never moves.
    descriptors: Box<[Cell<RawFd>; SLOTS as usize]>,
}

impl Files {
    /// Makes the table in a ring. None if the kernel has none.
    pub(super) fn new(ring: &IoUring, probe: &io_uring::Probe) -> Option<Self> {
        if !probe.is_supported(opcode::FilesUpdate::CODE) {
            return None;
        }
        let submitter = ring.submitter();
        // Before 5.19 a table is made of files, or of none at each place.
        let made = submitter
            .register_files_sparse(SLOTS)
            .or_else(|_| submitter.register_files(&[NO_FILE; SLOTS as usize]));
        if let Err(error) = made {
            tracing::debug!(%error, "no table of files: requests go by descriptors");
            return None;
        }
        Some(Self {
            slots: [const { Cell::new(State::Free) }; SLOTS as usize],
            refused: Cell::new(false),
            descriptors: Box::new([const { Cell::new(NO_FILE) }; SLOTS as usize]),
        })
    }

    /// The slot of the file with `number`, if the ring knows it; else, perhaps, the request that tells it.
    pub(super) fn find(&self, number: NonZeroU64, file: RawFd) -> Result<RawFd, Option<Entry>> {
        let place = place_of(number.get());
        match self.slots[place].get() {
            State::Joined(known) if known == number => Ok(slot(place)),
            State::Free if !self.refused.get() => {
                let closed = false;
                self.slots[place].set(State::Joining { number, closed });
                Err(Some(self.update(place, file)))
            }
            _ => Err(None),
        }
    }

    /// The file with `number` is about to be closed, with no request in flight: perhaps the request that tells the ring.
    pub(super) fn forget(&self, number: NonZeroU64) -> Option<Entry> {
        let place = place_of(number.get());
        match self.slots[place].get() {
            State::Joined(known) if known == number => Some(self.leave(place)),
            State::Joining { number: known, .. } if known == number => {
                let closed = true;
                self.slots[place].set(State::Joining { number, closed });
                None
            }
            _ => None,
        }
    }

    /// The ring's answer for a slot; perhaps there is more to tell it.
    pub(super) fn answered(&self, place: u32, result: i32) -> Option<Entry> {
        let place = place_of(place.into());
        let next = match self.slots[place].get() {
            State::Joining { number, closed } if result == 1 => {
                if closed {
                    return Some(self.leave(place));
                }
                State::Joined(number)
            }
            State::Joining { .. } => {
                let error = std::io::Error::from_raw_os_error(result.wrapping_neg());
                tracing::debug!(%error, "no file joins the ring: requests go by descriptors");
                self.refused.set(true);
                State::Free
            }
            State::Leaving if result == 1 => State::Free,
            // Nobody knows what stands there: it stays unused.
            other => other,
        };
        self.slots[place].set(next);
        None
    }

    fn leave(&self, place: usize) -> Entry {
        self.slots[place].set(State::Leaving);
        self.update(place, NO_FILE)
    }

    /// Its user data begin with zero, and end with the slot.
    fn update(&self, place: usize, file: RawFd) -> Entry {
        self.descriptors[place].set(file);
        opcode::FilesUpdate::new(self.descriptors[place].as_ptr(), 1)
            .offset(slot(place))
            .build()
            .user_data(place as u64)
    }
}

/// The slot that a file may have.
pub(super) fn place_of(number: u64) -> usize {
    // Less than SLOTS.
    usize::try_from(number % u64::from(SLOTS)).unwrap_or_default()
}

fn slot(place: usize) -> i32 {
    // Less than SLOTS.
    i32::try_from(place).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        Files {
            slots: [const { Cell::new(State::Free) }; SLOTS as usize],
            refused: Cell::new(false),
            descriptors: Box::new([const { Cell::new(NO_FILE) }; SLOTS as usize]),
        }
    }

    fn n(number: u64) -> NonZeroU64 {
        NonZeroU64::new(number).unwrap()
    }

    #[test]
    fn a_slot_is_used_by_one_file_from_the_ring_s_answer_until_it_is_closed() {
        let files = files();
        assert!(matches!(files.find(n(3), 7), Err(Some(_))), "tells the ring");
        assert!(matches!(files.find(n(3), 7), Err(None)), "no answer yet");
        assert!(files.answered(3, 1).is_none());
        assert_eq!(files.find(n(3), 7).unwrap(), 3);
        // Another file that would have the same slot, even with the same descriptor.
        assert!(matches!(files.find(n(3 + 64), 7), Err(None)));
        assert!(files.forget(n(3 + 64)).is_none());
        assert!(files.forget(n(3)).is_some());
        assert!(matches!(files.find(n(3 + 64), 7), Err(None)), "not empty yet");
        assert!(files.answered(3, 1).is_none());
        assert!(matches!(files.find(n(3 + 64), 7), Err(Some(_))));
    }

    #[test]
    fn a_file_that_is_closed_before_the_answer_leaves_at_once() {
        let files = files();
        assert!(files.find(n(1), 7).is_err());
        assert!(files.forget(n(1)).is_none());
        assert!(matches!(files.find(n(1 + 64), 7), Err(None)));
        assert!(files.answered(1, 1).is_some(), "out again");
        assert!(matches!(files.find(n(1 + 64), 7), Err(None)));
        assert!(files.answered(1, 1).is_none());
        assert!(matches!(files.find(n(1 + 64), 7), Err(Some(_))));
    }

    #[test]
    fn what_the_kernel_refuses_goes_by_its_descriptor() {
        let files = files();
        assert!(files.find(n(1), 7).is_err());
        assert!(files.answered(1, -libc::EBADF).is_none());
        assert!(matches!(files.find(n(1), 7), Err(None)), "not asked again");
    }

    #[test]
    fn a_slot_that_cannot_be_emptied_is_not_used_again() {
        let files = files();
        assert!(files.find(n(1), 7).is_err());
        assert!(files.answered(1, 1).is_none());
        assert!(files.forget(n(1)).is_some());
        assert!(files.answered(1, -libc::EINVAL).is_none());
        assert!(matches!(files.find(n(1 + 64), 7), Err(None)));
    }
}
