//! Volumes: their bitmaps against what maps have. And the bitmap of the metadata volume against the pages that were reached.

use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};

use super::Check;
use super::bits::{Bits, runs};
use super::mend::Mend;
use super::report::Severity;
use super::walk::{Piece, Walker, is_set};
use crate::error::FsError;
use crate::record::VolumeRecord;
use crate::tree::codec::Kind;
use crate::tree::node::{BITS, Body, Root};
use crate::units::VolumeIndex;

/// A volume under the check.
#[derive(Debug)]
pub(super) struct VolumeCheck {
    pub(super) record: VolumeRecord,
    /// Clusters that maps have.
    pub(super) owned: Bits,
    pub(super) bitmap: Option<Root>,
    pub(super) sums: Option<Root>,
}

impl VolumeCheck {
    pub(super) fn name(&self) -> String {
        format!("volume {}", self.record.name)
    }
}

/// All volumes.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    pub(super) list: BTreeMap<VolumeIndex, VolumeCheck>,
    /// Some could not be read.
    pub(super) broken: bool,
    /// Clusters that more than one map has, or one twice.
    pub(super) twice: Vec<(VolumeIndex, u64, u64)>,
}

impl Volumes {
    pub(super) fn add(&mut self, record: VolumeRecord) {
        let volume = VolumeCheck {
            record,
            owned: Bits::default(),
            bitmap: None,
            sums: None,
        };
        self.list.insert(volume.record.index, volume);
    }

    /// The volume with this object, and whether it is its bitmap.
    pub(super) fn with_object(&mut self, id: u64) -> Option<(&mut VolumeCheck, bool)> {
        self.list.values_mut().find_map(|volume| {
            let is_bitmap = volume.record.bitmap == id;
            (is_bitmap || volume.record.sums == id).then_some((volume, is_bitmap))
        })
    }
}

/// Bits of 64 clusters at once, in order, joined to runs.
#[derive(Debug, Default)]
struct Joined {
    runs: Vec<(u64, u64)>,
    most: usize,
    /// Clusters in runs that were too many to keep.
    unlisted: u64,
}

impl Joined {
    fn add(&mut self, first: u64, count: u64) {
        if let Some((start, length)) = self.runs.last_mut()
            && *start + *length == first
        {
            *length += count;
        } else if self.runs.len() >= self.most {
            self.unlisted += count;
        } else {
            self.runs.push((first, count));
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    /// Walks bitmaps and checksums of all volumes. The maps were walked before.
    pub(super) async fn volumes(&mut self) -> Result<(), FsError> {
        let indexes: Vec<VolumeIndex> = self.volumes.list.keys().copied().collect();
        for index in indexes {
            let Some(volume) = self.volumes.list.get_mut(&index) else {
                continue;
            };
            let (name, roots) = (volume.name(), [volume.bitmap.take(), volume.sums.take()]);
            let size = self.core.state.volume(index).map(|known| known.device.size());
            let clusters = volume.record.clusters;
            if let Ok(size) = size
                && clusters > size / crate::units::CLUSTER
            {
                self.findings.add(
                    Severity::Loss,
                    &name,
                    format!(
                        "has {clusters} clusters, and its device only {}",
                        size / crate::units::CLUSTER
                    ),
                );
            }
            for (root, kind, what) in [
                (&roots[0], Kind::Bits, "bitmap"),
                (&roots[1], Kind::Sums, "checksums"),
            ] {
                let problem = match root {
                    Some(root) if root.kind == kind => continue,
                    Some(_) => format!("its {what} are another kind of tree"),
                    None => format!("its {what} are missing"),
                };
                self.findings.add(Severity::Loss, &name, problem);
            }
            let [bitmap, sums] = roots;
            if let Some(root) = bitmap.filter(|root| root.kind == Kind::Bits) {
                self.bitmap(index, &root, &name).await?;
            }
            if let Some(root) = sums.filter(|root| root.kind == Kind::Sums) {
                let mut walker = Walker::new(&root, format!("the checksums of {name}"));
                while self.next(&mut walker).await?.is_some() {}
            }
        }
        Ok(())
    }

    async fn bitmap(&mut self, index: VolumeIndex, root: &Root, name: &str) -> Result<(), FsError> {
        let mut walker = Walker::new(root, format!("the bitmap of {name}"));
        walker.volume = Some(index);
        let mut marked = Joined {
            most: 100_000,
            ..Joined::default()
        };
        let mut unmarked = Joined {
            most: 100_000,
            ..Joined::default()
        };
        let mut next = 0;
        while let Some(piece) = self.next(&mut walker).await? {
            let (start, count) = match &piece {
                Piece::Run { start, count, .. } => (*start, *count),
                Piece::Leaf { start, .. } => (*start, BITS),
            };
            self.compare(index, next, start / BITS, None, &mut marked, &mut unmarked);
            next = (start + count) / BITS;
            self.compare(
                index,
                start / BITS,
                next,
                Some(&piece),
                &mut marked,
                &mut unmarked,
            );
        }
        self.compare(index, next, u64::MAX, None, &mut marked, &mut unmarked);
        if walker.broken {
            // Nobody knows what the pages said that are missing.
            unmarked = Joined::default();
        }
        self.tell_bits(index, name, &marked, &unmarked);
        Ok(())
    }

    /// Compares chunks `first..end`. Without a piece, no bit is marked there.
    fn compare(
        &self,
        index: VolumeIndex,
        first: u64,
        end: u64,
        piece: Option<&Piece>,
        marked: &mut Joined,
        unmarked: &mut Joined,
    ) {
        let Some(volume) = self.volumes.list.get(&index) else {
            return;
        };
        let clusters = volume.record.clusters;
        let mut chunk = first;
        loop {
            if piece.is_none() {
                // Where nobody has anything, there is nothing to compare.
                let Some(next) = volume.owned.next_chunk(chunk) else {
                    return;
                };
                chunk = next;
            }
            // What a run marks beyond the end of the volume counts once, below.
            if chunk >= end || chunk * BITS >= clusters.next_multiple_of(BITS) {
                break;
            }
            for word in 0..BITS / 64 {
                let base = chunk * BITS + word * 64;
                let bits = match piece {
                    None => 0,
                    Some(Piece::Run { .. }) => u64::MAX,
                    Some(Piece::Leaf { node, .. }) => match &*node.body.borrow() {
                        Body::Bits(words) => words[usize::try_from(word).unwrap_or(0)],
                        _ => 0,
                    },
                };
                let owned = volume.owned.word(base);
                runs(bits & !owned, base, &mut |first, count| marked.add(first, count));
                runs(owned & !bits, base, &mut |first, count| {
                    unmarked.add(first, count)
                });
            }
            chunk += 1;
        }
    }

    fn tell_bits(&mut self, index: VolumeIndex, name: &str, marked: &Joined, unmarked: &Joined) {
        let Some(volume) = self.volumes.list.get(&index) else {
            return;
        };
        let clusters = volume.record.clusters;
        for (first, count) in &marked.runs {
            let problem = format!(
                "{} marked in the bitmap, and no file has {}",
                clusters_text(*first, *count),
                if *count == 1 { "it" } else { "them" }
            );
            if first + count > clusters {
                self.findings.add(
                    Severity::Minor,
                    name,
                    format!("{problem}: part of that lies behind the volume's end"),
                );
            } else if self.maps_complete && !self.inodes.broken {
                let mend = Mend::Bits(index, *first, *count, false);
                self.findings.mendable(Severity::Minor, name, problem, [mend]);
            } else {
                self.findings.add(
                    Severity::Minor,
                    name,
                    format!("{problem} of those that could be read"),
                );
            }
        }
        for (first, count) in &unmarked.runs {
            let problem = format!(
                "{} not marked in the bitmap, and a file has {}: written again by another file at any time",
                clusters_text(*first, *count),
                if *count == 1 { "it" } else { "them" }
            );
            let twice = |(volume, start, length): &(VolumeIndex, u64, u64)| {
                *volume == index && *start < first + count && *first < start + length
            };
            if self.volumes.twice.iter().any(twice) {
                let problem = format!("{problem}; as two files have part of that, nothing is done");
                self.findings.add(Severity::Major, name, problem);
                continue;
            }
            let mend = Mend::Bits(index, *first, *count, true);
            self.findings.mendable(Severity::Major, name, problem, [mend]);
        }
        for (joined, what) in [(marked, "marked too much"), (unmarked, "not marked")] {
            if joined.unlisted > 0 {
                self.findings.add(
                    Severity::Major,
                    name,
                    format!(
                        "{} clusters more are {what}: check again after a repair",
                        joined.unlisted
                    ),
                );
            }
        }
    }

    /// Every block that is marked was reached.
    pub(super) fn pages(&mut self) {
        let layout = self.core.superblock.borrow().layout;
        let mut leaked = Joined {
            most: 100_000,
            ..Joined::default()
        };
        for (index, (marked, seen)) in (0_u64..).zip(self.view.image.iter().zip(&self.seen)) {
            runs(marked & !seen, index * 64, &mut |first, count| {
                for block in first..first + count {
                    let reserved = block >= layout.size_blocks
                        || layout
                            .reserved()
                            .any(|region| (region.first..region.end()).contains(&block));
                    if !reserved {
                        leaked.add(block, 1);
                    }
                }
            });
        }
        debug_assert!(self.seen.len() == self.view.image.len() && !is_set(&self.seen, u64::MAX));
        for (first, count) in leaked.runs {
            let problem = format!(
                "{count} {} from {first} on marked as in use, and no tree has {}",
                if count == 1 { "block is" } else { "blocks are" },
                if count == 1 { "it" } else { "them" }
            );
            let object = "the bitmap of the metadata volume";
            if self.complete {
                let mend = Mend::FreeBlocks(first, count);
                self.findings.mendable(Severity::Minor, object, problem, [mend]);
            } else {
                self.findings.add(
                    Severity::Minor,
                    object,
                    format!("{problem} of those that could be read"),
                );
            }
        }
    }
}

fn clusters_text(first: u64, count: u64) -> String {
    if count == 1 {
        format!("cluster {first} is")
    } else {
        format!("clusters {first} to {} are", first + count - 1)
    }
}
