//! Eventfds that another process may have as well, as the server of a disk has those of its queues. It can make them blocking,
//! fill and empty them, at any time; whoever uses them here must not wait for it.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn is(event: &EventFd, flags: PollFlags) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(borrow(event), flags)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)) == Ok(1) && polled[0].revents().intersects(flags)
}

/// Whether it was signalled and nobody has taken that.
pub(crate) fn is_signalled(event: &EventFd) -> bool {
    is(event, PollFlags::IN)
}

/// Takes what was signalled, if anything. Does not wait, whatever mode the eventfd is in (Linux 5.8).
pub(crate) fn drain(event: &EventFd) {
    let mut count = [0; 8];
    let mut memory = [std::io::IoSliceMut::new(&mut count)];
    // The current position, of which an eventfd has none.
    let _ = preadv2(borrow(event), &mut memory, u64::MAX, ReadWriteFlags::NOWAIT);
}

/// Signals it, unless it is signalled so often that once more makes no difference.
pub(crate) fn signal(event: &EventFd) {
    if is(event, PollFlags::OUT) {
        let _ = event.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eventfd_that_blocks_keeps_nobody_waiting() {
        let event = EventFd::new(0).unwrap();
        drain(&event);
        assert!(!is_signalled(&event));
        signal(&event);
        assert!(is_signalled(&event));
        drain(&event);
        assert!(!is_signalled(&event));
        event.write(u64::MAX - 1).unwrap();
        signal(&event);
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }
}
