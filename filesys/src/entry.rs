//! What a map says of one cluster of a file.
//!
//! ```text
//!   each sub-cluster is    valid    its data are at the entry's location
//!                          zero     it reads as zeroes, whatever a parent has
//!                          hole     neither: the parent is asked; without a parent it reads as zeroes
//! ```
//!
//! A cluster may have a location and nothing valid: it is allocated and unwritten, as in thick files. On media and in memory an entry
//! is the same 16 bytes: `docs/src/formats/filesys.md`.

use crate::units::{Location, SUBS, SubMask, VolumeIndex};

const ALLOCATED: u64 = 1;
const KEEP: u64 = 2;
const CHECKED: u64 = 4;
const KNOWN: u64 = ALLOCATED | KEEP | CHECKED;
const CLUSTER_MASK: u64 = (1 << 40) - 1;

/// An entry of a map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Bits 0 to 15 volume, 16 to 55 cluster, 56 to 63 flags.
    place: u64,
    /// Bits 0 to 15 valid, 16 to 31 zero, the others are 0.
    subs: u32,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.location() {
            Some(at) => write!(formatter, "{}:{}", at.volume.0, at.cluster)?,
            None => write!(formatter, "-")?,
        }
        write!(formatter, " valid {:04x} zero {:04x}", self.valid(), self.zero())?;
        let flags = [(self.is_kept(), " keep"), (self.is_checked(), " checked")];
        flags
            .iter()
            .filter(|(set, _)| *set)
            .try_for_each(|(_, name)| formatter.write_str(name))
    }
}

impl Entry {
    /// A hole.
    pub(crate) const HOLE: Self = Self { place: 0, subs: 0 };
    /// Zeroes without a place.
    pub(crate) const ZERO: Self = Self {
        place: 0,
        subs: 0xffff_0000,
    };

    /// A cluster at `location` with nothing valid.
    pub(crate) fn at(location: Location) -> Self {
        debug_assert!(location.cluster <= CLUSTER_MASK);
        Self {
            place: u64::from(location.volume.0) | location.cluster << 16 | ALLOCATED << 56,
            subs: 0,
        }
    }

    pub(crate) fn location(self) -> Option<Location> {
        (self.flags() & ALLOCATED != 0).then_some(Location {
            volume: VolumeIndex((self.place & 0xffff) as u16),
            cluster: self.place >> 16 & CLUSTER_MASK,
        })
    }

    fn flags(self) -> u64 {
        self.place >> 56
    }

    pub(crate) fn valid(self) -> u16 {
        (self.subs & 0xffff) as u16
    }

    pub(crate) fn zero(self) -> u16 {
        (self.subs >> 16) as u16
    }

    /// Sub-clusters that the parent answers for.
    pub(crate) fn holes(self) -> u16 {
        !(self.valid() | self.zero())
    }

    pub(crate) fn is_hole(self) -> bool {
        self == Self::HOLE
    }

    /// Whether the place stays when its content goes.
    pub(crate) fn is_kept(self) -> bool {
        self.flags() & KEEP != 0
    }

    /// Whether its valid sub-clusters have checksums.
    pub(crate) fn is_checked(self) -> bool {
        self.flags() & CHECKED != 0
    }

    pub(crate) fn with_subs(self, valid: u16, zero: u16) -> Self {
        debug_assert!(valid & zero == 0);
        Self {
            subs: u32::from(valid) | u32::from(zero) << 16,
            ..self
        }
    }

    /// With these sub-clusters valid, and no longer zero.
    pub(crate) fn with_valid(self, mask: SubMask) -> Self {
        self.with_subs(self.valid() | mask.0, self.zero() & !mask.0)
    }

    pub(crate) fn with_kept(self, kept: bool) -> Self {
        self.with_flag(KEEP, kept)
    }

    pub(crate) fn with_checked(self, checked: bool) -> Self {
        self.with_flag(CHECKED, checked)
    }

    fn with_flag(self, flag: u64, set: bool) -> Self {
        let flags = if set {
            self.flags() | flag
        } else {
            self.flags() & !flag
        };
        Self {
            place: self.place & (u64::MAX >> 8) | flags << 56,
            ..self
        }
    }

    /// The same state at another place.
    pub(crate) fn moved(self, to: Location) -> Self {
        Self::at(to)
            .with_kept(self.is_kept())
            .with_checked(self.is_checked())
            .with_subs(self.valid(), self.zero())
    }

    /// What these sub-clusters become when their content goes: `zero` if a parent must not show through. The place goes with
    /// the last valid sub-cluster, unless it is kept.
    pub(crate) fn without(self, mask: SubMask, zero: bool) -> Self {
        let gone = |bits: u16| bits & !mask.0;
        let zeroes = if zero || self.is_kept() { mask.0 } else { 0 };
        let left = self.with_subs(gone(self.valid()), gone(self.zero()) | zeroes);
        if left.valid() == 0 && !left.is_kept() {
            return Self::HOLE.with_subs(0, left.zero());
        }
        left
    }

    /// Entry number `index` of a run that begins with this one: the same state, clusters in order.
    pub(crate) fn nth(self, index: u64) -> Self {
        match self.location() {
            Some(at) => Self {
                place: self.place & !(CLUSTER_MASK << 16)
                    | (at.cluster.wrapping_add(index) & CLUSTER_MASK) << 16,
                ..self
            },
            None => self,
        }
    }

    /// Whether a run that begins with this entry has `other` as number `index`.
    pub(crate) fn continues(self, other: Self, index: u64) -> bool {
        self.nth(index) == other
    }

    /// The entry that has this one as its number `index` of a run.
    pub(crate) fn nth_before(self, index: u64) -> Self {
        self.nth(0_u64.wrapping_sub(index))
    }

    /// Valid and zero sub-clusters in one word, to be put back by [`Self::with_all_subs`].
    pub(crate) fn all_subs(self) -> u32 {
        self.subs
    }

    pub(crate) fn with_all_subs(self, subs: u32) -> Self {
        Self { subs, ..self }
    }

    /// Whether such a word has valid sub-clusters.
    pub(crate) fn has_valid(subs: u32) -> bool {
        subs & 0xffff != 0
    }

    /// The lower 32 bits of the cluster of its place.
    pub(crate) fn low_cluster(self) -> u32 {
        (self.place >> 16 & 0xffff_ffff) as u32
    }

    pub(crate) fn with_low_cluster(self, low: u32) -> Self {
        Self {
            place: self.place & !(0xffff_ffff << 16) | u64::from(low) << 16,
            ..self
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.place.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.subs.to_le_bytes());
        bytes
    }

    /// `None`: no entry looks like this.
    pub(crate) fn from_bytes(bytes: &[u8; 16]) -> Option<Self> {
        let (place, rest) = bytes.split_first_chunk::<8>()?;
        let (subs, reserved) = rest.split_first_chunk::<4>()?;
        let entry = Self {
            place: u64::from_le_bytes(*place),
            subs: u32::from_le_bytes(*subs),
        };
        (reserved == [0; 4] && entry.is_sound()).then_some(entry)
    }

    /// The parts that a slot of an inner page keeps of the first entry of a run.
    pub(crate) fn to_parts(self) -> (u64, u32) {
        (self.place, self.subs)
    }

    /// `None`: no entry has these parts.
    pub(crate) fn from_parts(place: u64, subs: u32) -> Option<Self> {
        let entry = Self { place, subs };
        entry.is_sound().then_some(entry)
    }

    fn is_sound(self) -> bool {
        let flags = self.flags();
        flags & !KNOWN == 0
            && self.valid() & self.zero() == 0
            && (flags & ALLOCATED != 0 || (self.place == 0 && self.valid() == 0))
    }
}

const _: () = assert!(SUBS == 16);

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Location {
        Location {
            volume: VolumeIndex(3),
            cluster: 0xff_1234_5678,
        }
    }

    #[test]
    fn entries_survive_the_way_to_the_medium_and_back() {
        let entry = Entry::at(place()).with_valid(SubMask(0xf0)).with_checked(true);
        assert_eq!(Entry::from_bytes(&entry.to_bytes()), Some(entry));
        assert_eq!(entry.location(), Some(place()));
        assert_eq!(Entry::from_bytes(&[0; 16]), Some(Entry::HOLE));
        assert_eq!(Entry::from_bytes(&[1; 16]), None);
    }

    #[test]
    fn the_place_goes_with_the_last_valid_sub_cluster_unless_it_is_kept() {
        let entry = Entry::at(place()).with_valid(SubMask(3));
        let half = entry.without(SubMask(1), true);
        assert_eq!(
            (half.valid(), half.zero(), half.location()),
            (2, 1, Some(place()))
        );
        assert_eq!(half.without(SubMask(2), false), Entry::HOLE.with_subs(0, 1));
        let kept = entry.with_kept(true).without(SubMask(3), false);
        assert_eq!(
            (kept.valid(), kept.zero(), kept.location()),
            (0, 3, Some(place()))
        );
    }

    #[test]
    fn runs_count_clusters_and_zeroes_do_not() {
        let first = Entry::at(Location {
            volume: VolumeIndex(1),
            cluster: 7,
        });
        assert!(first.continues(first.nth(5), 5));
        assert_eq!(first.nth(5).location().map(|at| at.cluster), Some(12));
        assert!(Entry::ZERO.continues(Entry::ZERO, 9));
    }
}
