//! Writes that are under way, and ranges that nobody else may write for a while.
//!
//! COMPARE AND WRITE and ORWRITE read, decide and write as one step: no other write through the unit may come between. Such
//! commands are rare and writes are not, so writes only count themselves, in a cache line of their thread. Who wants a range
//! sets a bit of the unit's word first. A write that sees the bit takes the long way: it waits for claims that it overlaps, and
//! notes its range. A write that did not see the bit has counted itself before the bit was set; the claim waits until there
//! are none of these.
//!
//! ```text
//!   write:  count += 1;  bit set? ── no ──► disk ──► count -= 1;  bit set now? wake who waits
//!   claim:  note the range, set the bit;  wait until all counts are 0 and no noted write overlaps
//! ```

use std::cell::Cell;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use super::unit::{Unit, mode_bit};

/// Threads beyond this many share counters.
const STRIPES: usize = 16;
/// Low bits of a counter: writes under way. The rest: sectors of 512 bytes that were written.
const COUNT_BITS: u32 = 20;
/// The unit of what was read and written.
const SECTOR: u64 = 512;

/// A thread's counters.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    /// Writes under way, and sectors written: one instruction changes both.
    writes: AtomicU64,
    sectors_read: AtomicU64,
}

/// What is under way, and what was done.
#[derive(Debug, Default)]
pub(super) struct Flight([Stripe; STRIPES]);

impl Flight {
    fn own(&self) -> &Stripe {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        let mut index = INDEX.get();
        if index == usize::MAX {
            index = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES;
            INDEX.set(index);
        }
        &self.0[index]
    }

    /// `bytes` were read.
    pub(super) fn count_read(&self, bytes: u64) {
        self.own()
            .sectors_read
            .fetch_add(bytes / SECTOR, Ordering::Relaxed);
    }

    /// Bytes read so far.
    pub(super) fn bytes_read(&self) -> u64 {
        let sectors = self
            .0
            .iter()
            .map(|stripe| stripe.sectors_read.load(Ordering::Relaxed));
        sectors.fold(0, u64::wrapping_add).wrapping_mul(SECTOR)
    }

    /// Bytes written so far.
    pub(super) fn bytes_written(&self) -> u64 {
        let sectors = self
            .0
            .iter()
            .map(|stripe| stripe.writes.load(Ordering::Relaxed) >> COUNT_BITS);
        sectors.fold(0, u64::wrapping_add).wrapping_mul(SECTOR)
    }

    /// Whether no write is under way that has not noted its range.
    fn is_still(&self) -> bool {
        self.0
            .iter()
            .all(|stripe| stripe.writes.load(Ordering::SeqCst) & ((1 << COUNT_BITS) - 1) == 0)
    }
}

/// Ranges of bytes that are claimed, and of writes that noted theirs.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    claims: Vec<(u64, Range<u64>)>,
    writes: Vec<(u64, Range<u64>)>,
    next: u64,
    waiting: Vec<Waker>,
}

fn overlap(list: &[(u64, Range<u64>)], range: &Range<u64>) -> bool {
    list.iter()
        .any(|(_, other)| other.start < range.end && range.start < other.end)
}

impl Ranges {
    pub(super) fn is_claimed(&self) -> bool {
        !self.claims.is_empty()
    }

    fn add(&mut self, range: &Range<u64>, claim: bool) -> u64 {
        let number = self.next;
        self.next += 1;
        let list = if claim { &mut self.claims } else { &mut self.writes };
        list.push((number, range.clone()));
        number
    }

    fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|other| other.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }
}

/// A write is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    unit: &'a Unit,
    /// Where it counted itself: the future may be dropped on another thread.
    stripe: &'a Stripe,
    /// What it counts as when it ends.
    sectors: u64,
}

impl<'a> Writing<'a> {
    /// Counts a write. Whether it may go on is what the unit's word says *after* this.
    pub(super) fn begin(unit: &'a Unit) -> Self {
        let stripe = unit.flight.own();
        stripe.writes.fetch_add(1, Ordering::SeqCst);
        Self {
            unit,
            stripe,
            sectors: 0,
        }
    }

    /// It has succeeded with `bytes`.
    pub(super) fn succeed(mut self, bytes: u64) {
        self.sectors = bytes / SECTOR;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let change = (self.sectors << COUNT_BITS).wrapping_sub(1);
        self.stripe.writes.fetch_add(change, Ordering::SeqCst);
        if self.unit.word() & mode_bit::CLAIMED != 0 {
            self.unit.wake_ranges();
        }
    }
}

/// A range that was noted, until this is dropped.
#[derive(Debug)]
pub(super) struct Noted<'a> {
    unit: &'a Unit,
    number: u64,
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        self.unit.with(|state| {
            let ranges = &mut state.ranges;
            ranges.claims.retain(|(number, _)| *number != self.number);
            ranges.writes.retain(|(number, _)| *number != self.number);
        });
        self.unit.wake_ranges();
    }
}

impl Unit {
    #[cold]
    fn wake_ranges(&self) {
        let waiting = self.with(|state| std::mem::take(&mut state.ranges.waiting));
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Notes a write of the bytes `range`, when nobody claims any of it.
    pub(super) async fn note_write(&self, range: Range<u64>) -> Noted<'_> {
        let number = poll_fn(|context| {
            self.with(|state| {
                if overlap(&state.ranges.claims, &range) {
                    state.ranges.wait(context.waker());
                    return Poll::Pending;
                }
                Poll::Ready(state.ranges.add(&range, false))
            })
        })
        .await;
        Noted { unit: self, number }
    }

    /// Claims the bytes `range`: when this returns, no other write to them is under way, and none begins until the result is
    /// dropped.
    pub(super) async fn claim(&self, range: Range<u64>) -> Noted<'_> {
        let number = poll_fn(|context| {
            self.with(|state| {
                if overlap(&state.ranges.claims, &range) {
                    state.ranges.wait(context.waker());
                    return Poll::Pending;
                }
                Poll::Ready(state.ranges.add(&range, true))
            })
        })
        .await;
        let claim = Noted { unit: self, number };
        poll_fn(|context| {
            self.with(|state| {
                // First the waker, then the look: who ends in between wakes it.
                state.ranges.wait(context.waker());
                if self.flight.is_still() && !overlap(&state.ranges.writes, &range) {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
        })
        .await;
        claim
    }

    /// Counts what a write with a noted range has done.
    pub(super) fn count_written(&self, bytes: u64) {
        self.flight
            .own()
            .writes
            .fetch_add((bytes / SECTOR) << COUNT_BITS, Ordering::Relaxed);
    }
}
