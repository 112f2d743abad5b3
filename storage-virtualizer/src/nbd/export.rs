//! What is exported: a disk, its name, and what is known about its blocks.

use std::future::Future;

use block_io::nbd::protocol::state;
use block_io::{BlockDevice, IoError};

/// Most extents in an answer about the blocks of a range; who asks gets the beginning then, and asks again.
pub(super) const MOST_EXTENTS: usize = 4096;

/// A disk that clients see under a name.
///
/// All methods are called on the server's worker. Several connections may use an export at once.
pub trait Export: 'static {
    /// The kind of disk.
    type Disk: BlockDevice;

    /// What clients ask for; at most 4096 bytes. An empty name, and the only export of a server, are found under the empty
    /// name as well.
    fn name(&self) -> &str;

    /// A line for people; may be empty.
    fn description(&self) -> &str {
        ""
    }

    /// The disk.
    fn disk(&self) -> &Self::Disk;

    /// Whether writes are refused, even if the disk takes some.
    fn read_only(&self) -> bool {
        self.disk().geometry().read_only
    }

    /// Whether zeroes cost less than writing them, so that a client may ask for zeroes that are fast or fail.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// Names of the snapshots for which it is known what has changed since: clients see the contexts `smsvmm:changed:NAME` and
    /// `qemu:dirty-bitmap:NAME`.
    fn snapshots(&self) -> Vec<String> {
        Vec::new()
    }

    /// Describes `length` bytes from `offset` on, as far as `extents` takes something ([`Extents::is_full`]); what is left
    /// out at the end is asked for again.
    ///
    /// What is not known is said to be [`Extent::Data`]: that is always right.
    fn allocation(
        &self,
        offset: u64,
        length: u64,
        extents: &mut Extents,
    ) -> impl Future<Output = Result<(), IoError>> {
        let _ = offset;
        extents.add(length, Extent::Data);
        std::future::ready(Ok(()))
    }

    /// Says what has changed since snapshot number `snapshot` of [`Self::snapshots`]: true is changed, or not known.
    fn changed(
        &self,
        snapshot: usize,
        offset: u64,
        length: u64,
        extents: &mut Extents,
    ) -> impl Future<Output = Result<(), IoError>> {
        let _ = (snapshot, offset);
        extents.add_changed(length, true);
        std::future::ready(Ok(()))
    }
}

/// How a range of a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Space with content, or not known.
    Data,
    /// Space that reads as zeroes.
    Zeroes,
    /// No space; reads as zeroes.
    Hole,
}

/// Extents, one after the other, neighbours that are alike joined.
#[derive(Debug)]
pub struct Extents {
    list: Vec<(u64, u32)>,
    most: usize,
    left: u64,
    longest: u64,
}

impl Extents {
    /// Room for `length` bytes in at most `most` extents of at most `longest` bytes each.
    pub(super) fn new(length: u64, most: usize, longest: u64) -> Self {
        Self {
            list: Vec::new(),
            most,
            left: length,
            longest,
        }
    }

    /// The next `length` bytes are such.
    pub fn add(&mut self, length: u64, extent: Extent) {
        let flags = match extent {
            Extent::Data => 0,
            Extent::Zeroes => state::ZERO,
            Extent::Hole => state::HOLE | state::ZERO,
        };
        self.put(length, flags);
    }

    /// The next `length` bytes have changed, or not.
    pub fn add_changed(&mut self, length: u64, changed: bool) {
        self.put(length, if changed { state::DIRTY } else { 0 });
    }

    /// Whether nothing more is taken: the rest may be left out.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    fn put(&mut self, length: u64, flags: u32) {
        let mut length = length.min(self.left);
        if let Some((last, same)) = self.list.last_mut()
            && *same == flags
        {
            let more = length.min(self.longest - *last);
            *last += more;
            length -= more;
            self.left -= more;
        }
        while length > 0 {
            if self.list.len() == self.most {
                self.left = 0;
                return;
            }
            let piece = length.min(self.longest);
            self.list.push((piece, flags));
            length -= piece;
            self.left -= piece;
        }
    }

    /// Lengths and flags.
    pub(super) fn list(&self) -> &[(u64, u32)] {
        &self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_the_end_is_cut() {
        let mut extents = Extents::new(100, 3, 1000);
        extents.add(10, Extent::Data);
        extents.add(0, Extent::Hole);
        extents.add(10, Extent::Data);
        extents.add(20, Extent::Hole);
        extents.add(200, Extent::Zeroes);
        assert!(extents.is_full());
        assert_eq!(extents.list(), [(20, 0), (20, 3), (60, 2)]);
    }

    #[test]
    fn there_are_no_more_than_were_asked_for_and_none_is_too_long() {
        let mut extents = Extents::new(100, 2, 30);
        extents.add_changed(20, true);
        extents.add_changed(15, true);
        assert!(!extents.is_full());
        extents.add_changed(15, false);
        assert!(extents.is_full());
        assert_eq!(extents.list(), [(30, 1), (5, 1)]);
    }
}
