//! Which ranges of a volume hold something: copying and comparing skip the rest.
//!
//! Only the layer above knows what of a volume is in use. It says so by [`Usage`], and then fills, resyncs, moves, changes of
//! layout and scrubs leave out what is not. Two things make that sound, whatever is written meanwhile:
//!
//! - Members that are being filled get all writes from the moment on at which they are part of a map, and a copy waits until
//!   nobody uses an older map. So what was not in use when it was skipped, and is written later, is written to all members.
//! - What was written before that moment is reported as in use by then: that is the contract of [`Usage`].
//!
//! Members of sections with parity are never skipped: a row has to fit together as a whole before its first part is written by
//! read-modify-write, and nobody would know that of a row that was left out. Sections that come into being (a change of layout)
//! are zero where nothing is in use, in all columns, so that copies and parity fit.

use std::ops::Range;
use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use super::map::SectionMap;
use super::volume::{Volume, VolumeCore};
use crate::model::BLOCK;

/// Tells which ranges of a volume are in use. Implemented by the layer above, which is the only one that knows.
///
/// What is not in use may read as anything, and as something else each time. So of a range that is reported as not in use
/// nothing may be wanted any more, nor be wanted again:
///
/// 1. It is reported as in use *before* the first write to it is submitted. Who only learns when a write has ended that it
///    counts reports the range from before its beginning.
/// 2. What is in use was written in full since it came into use, or is never read: copies of what was never written may differ.
///    Multiples of 4096 bytes are looked at; a smaller range counts as all of them that it touches.
/// 3. It stays reported until its release is durable: what a crash could bring back is in use.
/// 4. What is not known is in use.
///
/// Nothing is remembered between calls, so the answer may change at any moment. A discard changes nothing by itself: what was
/// discarded is not in use when this says so.
pub trait Usage {
    /// The first range in use within `offset..end`, in bytes of the volume; none if nothing there is in use. The range may begin
    /// before `offset` and end behind `end`, and need not be the longest possible one. It must not block: it is called while
    /// other requests wait, once per range that is copied.
    fn next_used(&self, offset: u64, end: u64) -> Option<Range<u64>>;
}

impl<D> VolumeCore<D> {
    /// The first range in use within `offset..end`, in whole blocks.
    pub(crate) fn next_used(&self, offset: u64, end: u64) -> Option<(u64, u64)> {
        let usage = self.usage.borrow().as_ref().map(Rc::clone);
        let Some(usage) = usage else {
            return (offset < end).then_some((offset, end));
        };
        let used = usage.next_used(offset, end)?;
        let from = (used.start / BLOCK * BLOCK).max(offset);
        let to = used.end.checked_next_multiple_of(BLOCK).unwrap_or(end).min(end);
        // An answer that makes no sense says nothing.
        Some(if from < to { (from, to) } else { (offset, end) }).filter(|(from, to)| from < to)
    }
}

impl<D: BlockDevice> VolumeCore<D> {
    /// The first range in use within `at..end` of the members of a column; all of it in sections with parity.
    pub(crate) fn next_used_of_column(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        end: u64,
    ) -> Option<(u64, u64)> {
        if at >= end {
            return None;
        }
        if section.shape.parity > 0 || self.usage.borrow().is_none() {
            return Some((at, end));
        }
        if section.shape.columns > 1 {
            return self.next_used_of_stripe(section, column, at, end);
        }
        // Members may be longer than their section while its layout changes.
        let known = end.min(section.length);
        let found = (at < known).then(|| self.next_used(section.start + at, section.start + known));
        match found.flatten() {
            Some((from, to)) => Some((from - section.start, to - section.start)),
            None if known < end => Some((known.max(at), end)),
            None => None,
        }
    }

    /// Of stripes, whole units. Rows that the section does not have in full, or not yet, count as in use.
    fn next_used_of_stripe(
        &self,
        section: &SectionMap<D>,
        column: usize,
        at: u64,
        end: u64,
    ) -> Option<(u64, u64)> {
        /// Most units of one answer.
        const RUN: u64 = 16;
        let (unit, row) = (section.shape.unit, section.shape.row_bytes());
        let whole = section.length / row;
        let place = |number: u64| section.start + number * row + column as u64 * unit;
        let mut first = at / unit;
        while first < whole {
            match self.next_used(place(first), section.start + whole * row) {
                None => first = whole,
                Some((from, _)) if from < place(first) + unit => break,
                Some((from, _)) => first = ((from - section.start) / row).max(first + 1),
            }
        }
        let mut next = (first + 1).min(whole);
        while next < whole
            && next - first < RUN
            && next * unit < end
            && self.next_used(place(next), place(next) + unit).is_some()
        {
            next += 1;
        }
        let to = if next == whole { end } else { end.min(next * unit) };
        Some(((first * unit).max(at), to)).filter(|(from, to)| from < to)
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// Says who knows which ranges of the volume are in use; none: all of it is, which is also what holds after every open of
    /// the pool until this is called.
    pub fn set_usage(&self, usage: Option<Rc<dyn Usage>>) {
        *self.volume.usage.borrow_mut() = usage;
    }

    /// As [`VolumeCore::next_used_of_column`], with the present map; all of `at..end` if there is no such section any more.
    pub(crate) fn used_of_member(
        &self,
        section: u32,
        column: usize,
        at: u64,
        end: u64,
    ) -> Option<(u64, u64)> {
        let map = self.volume.map();
        match map.sections.iter().find(|candidate| candidate.id == section) {
            Some(section) => self.volume.next_used_of_column(section, column, at, end),
            None => Some((at, end)),
        }
    }
}
