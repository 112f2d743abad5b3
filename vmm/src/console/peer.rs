//! One receiver of a console's output: a descriptor and the bytes that wait for it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::{OUTPUT_LIMIT, STUCK_AFTER};

/// How to write without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteMode {
    /// The file description is our own and has `O_NONBLOCK`.
    NonBlocking,
    /// A socket, perhaps shared with other processes: each call says that it must not wait.
    Socket,
    /// A regular file: a write may wait for the disk, so only the main loop writes.
    File,
    /// A description that other processes share and that cannot be reopened: only the main loop writes, little at a time and
    /// when the kernel says that there is room.
    Shared,
}

/// What became of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Nothing is pending.
    All,
    /// The receiver takes no more at present.
    Blocked,
    /// The main loop has to do it.
    NotHere,
    /// The receiver is gone.
    Gone(Errno),
}

/// A receiver of output.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: u32,
    pub(super) fd: Arc<OwnedFd>,
    mode: WriteMode,
    queue: VecDeque<u8>,
    /// The last write found no room: the main loop waits until there is.
    pub(super) blocked: bool,
    /// It has not taken anything for a long time: nobody waits for it any more.
    pub(super) stuck: bool,
    /// Bytes that found the queue full since the last report.
    dropped: u64,
    /// When it was last seen to make progress, while it is blocked.
    progress: Option<(u64, Instant)>,
    written: u64,
}

/// Writes to a description that is shared with other processes are at most this long: a pipe that polls writable has
/// room for `PIPE_BUF`.
const SHARED_WRITE_MAX: usize = 4096;
/// A drained queue keeps at most this much memory.
const KEPT_CAPACITY: usize = 16 * 1024;

impl Peer {
    pub(super) fn new(id: u32, fd: Arc<OwnedFd>, mode: WriteMode) -> Self {
        Self {
            id,
            fd,
            mode,
            queue: VecDeque::new(),
            blocked: false,
            stuck: false,
            dropped: 0,
            progress: None,
            written: 0,
        }
    }

    /// Bytes that wait.
    pub(super) fn pending(&self) -> usize {
        self.queue.len()
    }

    /// Appends `bytes`; what exceeds the limit is lost, and counted.
    pub(super) fn enqueue(&mut self, bytes: &[u8]) {
        let accepted = bytes.len().min(OUTPUT_LIMIT - self.queue.len().min(OUTPUT_LIMIT));
        self.queue.extend(&bytes[..accepted]);
        self.dropped += (bytes.len() - accepted) as u64;
    }

    /// Bytes lost since the last call.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Writes as much as the receiver takes without waiting.
    pub(super) fn flush(&mut self, in_main_loop: bool) -> Flushed {
        if self.queue.is_empty() {
            return Flushed::All;
        }
        if !in_main_loop && (self.blocked || matches!(self.mode, WriteMode::File | WriteMode::Shared)) {
            return Flushed::NotHere;
        }
        while !self.queue.is_empty() {
            match self.write_some() {
                Ok(0) | Err(Errno::AGAIN) => {
                    self.blocked = true;
                    return Flushed::Blocked;
                }
                Ok(count) => {
                    self.queue.drain(..count.min(self.queue.len()));
                    self.written += count as u64;
                }
                Err(Errno::INTR) => {}
                // A full disk may have room again later; what could not be written is lost.
                Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)
                    if self.mode == WriteMode::File =>
                {
                    self.dropped += self.queue.len() as u64;
                    self.queue.clear();
                }
                Err(errno) => return Flushed::Gone(errno),
            }
        }
        self.blocked = false;
        self.stuck = false;
        self.progress = None;
        self.queue.shrink_to(KEPT_CAPACITY);
        Flushed::All
    }

    fn write_some(&self) -> Result<usize, Errno> {
        let (bytes, _) = self.queue.as_slices();
        match self.mode {
            WriteMode::NonBlocking | WriteMode::File => rustix::io::write(&self.fd, bytes),
            WriteMode::Socket => {
                rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            WriteMode::Shared => {
                if !self.is_writable(Duration::ZERO)? {
                    return Err(Errno::AGAIN);
                }
                rustix::io::write(&self.fd, &bytes[..bytes.len().min(SHARED_WRITE_MAX)])
            }
        }
    }

    /// Waits at most `timeout` for room.
    pub(super) fn is_writable(&self, timeout: Duration) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(&*self.fd, PollFlags::OUT)];
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        Ok(poll(&mut fds, Some(&timeout))? > 0)
    }

    /// Notes at `now` whether a blocked receiver makes progress. Returns when to look again, if it is to be waited for.
    pub(super) fn watch_progress(&mut self, now: Instant) -> Option<Instant> {
        if !self.blocked || self.stuck {
            return None;
        }
        match self.progress {
            Some((written, since)) if written == self.written => {
                self.stuck = now >= since + STUCK_AFTER;
                (!self.stuck).then_some(since + STUCK_AFTER)
            }
            _ => {
                self.progress = Some((self.written, now));
                Some(now + STUCK_AFTER)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use super::*;

    #[test]
    fn a_description_that_cannot_be_reopened_is_written_without_waiting() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut peer = Peer::new(1, Arc::new(writer.into()), WriteMode::Shared);
        peer.enqueue(&[b'x'; 100_000]);
        assert_eq!(peer.flush(false), Flushed::NotHere, "only the main loop may");
        assert_eq!(
            peer.flush(true),
            Flushed::Blocked,
            "a pipe holds 64 KiB, and the write must not wait"
        );
        let before = peer.pending();
        assert!(before <= 100_000 - 60_000);
        reader.read_exact(&mut [0; 50_000]).unwrap();
        assert_eq!(peer.flush(true), Flushed::All);
    }

    #[test]
    fn a_full_disk_loses_output_and_says_how_much() {
        // Writing to this device fails as on a full disk.
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut peer = Peer::new(1, Arc::new(full.into()), WriteMode::File);
        peer.enqueue(b"lost");
        assert_eq!(peer.flush(true), Flushed::All);
        assert_eq!(peer.take_dropped(), 4);
        assert_eq!(peer.take_dropped(), 0);
    }

    #[test]
    fn a_full_queue_drops_what_is_new_and_counts_it() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut peer = Peer::new(1, Arc::new(writer.into()), WriteMode::Shared);
        peer.enqueue(&vec![0; OUTPUT_LIMIT - 10]);
        peer.enqueue(&[1; 25]);
        assert_eq!((peer.pending(), peer.take_dropped()), (OUTPUT_LIMIT, 15));
    }

    #[test]
    fn a_blocked_receiver_is_stuck_only_without_progress() {
        let (mut reader, mut filler) = io::pipe().unwrap();
        filler.write_all(&[0; 64 << 10]).unwrap();
        let mut peer = Peer::new(1, Arc::new(filler.into()), WriteMode::Shared);
        let start = Instant::now();
        peer.enqueue(&[0; 20_000]);
        assert_eq!(peer.watch_progress(start), None, "it was not tried yet");
        assert_eq!(peer.flush(true), Flushed::Blocked);
        assert_eq!(peer.watch_progress(start), Some(start + STUCK_AFTER));
        reader.read_exact(&mut [0; 8192]).unwrap();
        assert_eq!(peer.flush(true), Flushed::Blocked);
        let later = start + STUCK_AFTER;
        assert_eq!(
            peer.watch_progress(later),
            Some(later + STUCK_AFTER),
            "it took something"
        );
        assert_eq!(peer.watch_progress(later + STUCK_AFTER), None);
        assert!(peer.stuck);
    }
}
