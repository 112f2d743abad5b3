//! Writes that have completed and that no flush has made durable yet, kept so that they can be written once more.
//!
//! Who changes servers or paths in the middle of a session cannot know whether what completed before is still in some
//! cache, or went with it. Writing it again before anything else happens makes that question disappear: a flush that
//! follows then speaks the truth.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::buffer::{IoBuf, list};
use crate::device::ZeroMode;

/// What the bookkeeping of one write counts, in bytes.
const OVERHEAD: u64 = 128;

/// A write to repeat.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    pub(crate) offset: u64,
    pub(crate) content: Content,
    number: u64,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    Data(Arc<[u8]>),
    Zeroes { length: u64, mode: ZeroMode },
}

impl Write {
    pub(crate) fn length(&self) -> u64 {
        match &self.content {
            Content::Data(data) => data.len() as u64,
            Content::Zeroes { length, .. } => *length,
        }
    }

    fn cost(&self) -> u64 {
        OVERHEAD
            + match &self.content {
                Content::Data(data) => data.len() as u64,
                Content::Zeroes { .. } => 0,
            }
    }
}

/// The completed writes since the last flush, in the order of their completion.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    writes: VecDeque<Write>,
    next: u64,
    bytes: u64,
    /// What is before this is durable.
    flushed: u64,
}

impl Unflushed {
    /// A volatile write of `buffers` has completed.
    pub(crate) fn wrote(&mut self, offset: u64, buffers: &[IoBuf]) {
        let mut data = vec![0; usize::try_from(list::total_length(buffers)).unwrap_or(usize::MAX)];
        list::gather(buffers, 0, &mut data);
        self.push(offset, Content::Data(data.into()));
    }

    /// A durable write has completed. It matters only if an older write would be repeated over it.
    pub(crate) fn wrote_durably(&mut self, offset: u64, buffers: &[IoBuf]) {
        let end = offset.saturating_add(list::total_length(buffers));
        if self
            .writes
            .iter()
            .any(|write| write.offset < end && offset < write.offset.saturating_add(write.length()))
        {
            self.wrote(offset, buffers);
        }
    }

    /// A range was zeroed.
    pub(crate) fn zeroed(&mut self, offset: u64, length: u64, mode: ZeroMode) {
        self.push(offset, Content::Zeroes { length, mode });
    }

    fn push(&mut self, offset: u64, content: Content) {
        let write = Write {
            offset,
            content,
            number: self.next,
        };
        self.next += 1;
        self.bytes += write.cost();
        self.writes.push_back(write);
    }

    /// A volatile write has completed that somebody else remembers.
    pub(crate) fn counted(&mut self) {
        self.next += 1;
    }

    /// Whether something has completed that no flush covers.
    pub(crate) fn is_dirty(&self) -> bool {
        self.flushed < self.next
    }

    /// Stands for what has completed until now: what a flush that begins now covers.
    pub(crate) fn mark(&self) -> u64 {
        self.next
    }

    /// A flush that began at `mark` has succeeded.
    pub(crate) fn flushed(&mut self, mark: u64) {
        self.flushed = self.flushed.max(mark);
        while let Some(write) = self.writes.pop_front_if(|write| write.number < mark) {
            self.bytes -= write.cost();
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.writes.clear();
        self.bytes = 0;
        self.flushed = self.next;
    }

    /// Memory in use.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of them, in order; the data is shared.
    pub(crate) fn all(&self) -> Vec<Write> {
        self.writes.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBuffer;

    #[test]
    fn a_flush_covers_what_completed_before_it_began_and_nothing_else() {
        let memory = AlignedBuffer::new(1024);
        // SAFETY: the memory outlives the list and is not accessed otherwise.
        let piece = [unsafe { memory.io(0, 512) }];
        let mut writes = Unflushed::default();
        writes.wrote(0, &piece);
        writes.zeroed(4096, 1 << 30, ZeroMode::MayUnmap);
        let mark = writes.mark();
        writes.wrote(512, &piece);
        writes.flushed(mark);
        let left: Vec<u64> = writes.all().iter().map(|write| write.offset).collect();
        assert_eq!(left, [512]);
        assert_eq!(writes.bytes(), 512 + OVERHEAD);
        writes.flushed(writes.mark());
        assert_eq!((writes.bytes(), writes.all().len()), (0, 0));
        assert!(!writes.is_dirty());
        writes.counted();
        assert!(writes.is_dirty() && writes.bytes() == 0);
    }

    #[test]
    fn a_durable_write_is_kept_only_over_an_older_one() {
        let memory = AlignedBuffer::new(512);
        // SAFETY: as above.
        let piece = [unsafe { memory.io(0, 512) }];
        let mut writes = Unflushed::default();
        writes.wrote_durably(0, &piece);
        assert_eq!(writes.bytes(), 0);
        writes.wrote(1024, &piece);
        writes.wrote_durably(512, &piece);
        assert_eq!(writes.all().len(), 1);
        writes.wrote_durably(1024, &piece);
        assert_eq!(writes.all().len(), 2);
    }
}
