//! The objects: every map and every directory, once. Then, if clusters have two owners, the maps again, to name both.

use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};

use super::mend::{Edit, Mend};
use super::report::Severity;
use super::walk::{Piece, Walker};
use super::{Check, file};
use crate::error::FsError;
use crate::inode::Kind;
use crate::state::ROOT;
use crate::tree::codec::Kind as TreeKind;
use crate::tree::node::{Body, FANOUT, Root};
use crate::units::{CLUSTER, FileId, Location, VolumeIndex};

/// Runs of clusters with two owners that are looked at; more than that is a ruin.
const MOST_TWICE: usize = 10_000;

/// What is counted of a file.
#[derive(Debug, Default)]
struct Sum {
    placed: u64,
    /// First cluster behind the end, and how many.
    behind: Option<(u64, u64)>,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    /// Every object belongs to somebody, and is what its owner needs.
    pub(super) async fn objects(&mut self) -> Result<(), FsError> {
        let mut walker = Walker::new(&self.view.root, "the table of objects");
        while let Some(piece) = self.next(&mut walker).await? {
            let Piece::Leaf { start, node, .. } = piece else {
                continue;
            };
            let roots: Vec<(u64, Root)> = match &*node.body.borrow() {
                Body::Objects(roots) => (start..)
                    .zip(roots.iter())
                    .filter_map(|(id, root)| Some((id, root.clone()?)))
                    .collect(),
                _ => continue,
            };
            for (id, root) in roots {
                self.object(id, root).await?;
            }
        }
        if walker.broken {
            self.maps_complete = false;
            return Ok(());
        }
        let lost: Vec<u64> = (self.inodes.list.iter())
            .filter(|brief| !brief.object)
            .map(|brief| brief.id)
            .collect();
        for id in lost {
            self.maps_complete = false;
            self.complete = false;
            self.findings.add(
                Severity::Loss,
                file(id),
                "its map or its names are not in the table of objects",
            );
        }
        Ok(())
    }

    async fn object(&mut self, id: u64, root: Root) -> Result<(), FsError> {
        if id < ROOT.0 {
            // Tables were walked before.
            if !(1..=4).contains(&id) {
                self.unowned(id, &root).await?;
            }
            return Ok(());
        }
        if let Some((volume, is_bitmap)) = self.volumes.with_object(id) {
            let place = if is_bitmap {
                &mut volume.bitmap
            } else {
                &mut volume.sums
            };
            *place = Some(root);
            return Ok(());
        }
        let Some(brief) = self.inodes.get_mut(id) else {
            return self.unowned(id, &root).await;
        };
        brief.object = true;
        let kind = brief.kind;
        match (kind, root.kind) {
            (Kind::File, TreeKind::Map) => self.map(id, &root).await,
            (Kind::Directory, TreeKind::Table) => self.directory(id, &root).await,
            _ => {
                self.maps_complete = false;
                self.complete = false;
                self.findings
                    .add(Severity::Loss, file(id), "its object is another kind of tree");
                Ok(())
            }
        }
    }

    /// Nobody has this object. Its pages are used nevertheless, until it goes.
    async fn unowned(&mut self, id: u64, root: &Root) -> Result<(), FsError> {
        let name = format!("object {id}");
        let problem = "belongs to no file, no volume and no table";
        if self.inodes.broken || self.volumes.broken {
            self.maps_complete = false;
            self.findings.add(
                Severity::Minor,
                &name,
                format!("{problem} of those that could be read"),
            );
        } else {
            self.findings
                .mendable(Severity::Minor, &name, problem, [Mend::DropObject(id)]);
        }
        let mut walker = Walker::new(root, name);
        while self.next(&mut walker).await?.is_some() {}
        Ok(())
    }

    async fn map(&mut self, id: u64, root: &Root) -> Result<(), FsError> {
        let mut walker = Walker::new(root, format!("the map of {}", FileId(id)));
        let mut sum = Sum::default();
        let size = self.inodes.get(id).map_or(0, |brief| brief.size);
        let end = size.div_ceil(CLUSTER);
        while let Some(piece) = self.next(&mut walker).await? {
            for_each_run(&piece, |start, count, at| {
                sum.placed += count;
                if start + count > end {
                    let first = start.max(end);
                    let more = start + count - first;
                    sum.behind = Some(match sum.behind {
                        Some((first, count)) => (first, count + more),
                        None => (first, more),
                    });
                }
                self.claim(id, at, count);
            });
        }
        self.progress.clusters += sum.placed;
        if let Some((first, count)) = sum.behind {
            self.findings.add(
                Severity::Minor,
                file(id),
                format!("has {count} clusters behind its end, from cluster {first} on"),
            );
        }
        if walker.broken {
            self.maps_complete = false;
            return Ok(());
        }
        let allocated = self.inodes.get(id).map_or(0, |brief| brief.allocated);
        if allocated != sum.placed {
            self.findings.mendable(
                Severity::Minor,
                file(id),
                format!("counts {allocated} clusters, and its map has {}", sum.placed),
                [Mend::Edit(FileId(id), Edit::Allocated(sum.placed))],
            );
        }
        Ok(())
    }

    /// A map has these clusters.
    fn claim(&mut self, id: u64, at: Location, count: u64) {
        let Some(volume) = self.volumes.list.get_mut(&at.volume) else {
            let problem = format!("has clusters on {}, which does not exist", at.volume);
            self.findings.add(Severity::Loss, file(id), problem);
            return;
        };
        let clusters = volume.record.clusters;
        if at.cluster.saturating_add(count) > clusters {
            let problem = format!(
                "has clusters {} to {} of {}, which has only {clusters}",
                at.cluster,
                at.cluster.saturating_add(count) - 1,
                volume.name()
            );
            self.findings.add(Severity::Loss, file(id), problem);
        }
        let inside = clusters.saturating_sub(at.cluster).min(count);
        let twice = &mut self.volumes.twice;
        volume.owned.claim(at.cluster, inside, |first, count| {
            if twice.len() < MOST_TWICE {
                twice.push((at.volume, first, count));
            }
        });
    }

    /// Names both owners of clusters that have two.
    pub(super) async fn twice(&mut self) -> Result<(), FsError> {
        if self.volumes.twice.is_empty() {
            return Ok(());
        }
        self.volumes.twice = disjoint(std::mem::take(&mut self.volumes.twice));
        let mut owners: BTreeMap<(VolumeIndex, u64, u64), Vec<String>> = BTreeMap::new();
        let mut walker = Walker::new(&self.view.root, "the table of objects");
        walker.notes = false;
        while let Some(piece) = self.next(&mut walker).await? {
            let Piece::Leaf { start, node, .. } = piece else {
                continue;
            };
            let roots: Vec<(u64, Root)> = match &*node.body.borrow() {
                Body::Objects(roots) => (start..)
                    .zip(roots.iter())
                    .filter_map(|(id, root)| Some((id, root.clone()?)))
                    .filter(|(_, root)| root.kind == TreeKind::Map)
                    .collect(),
                _ => continue,
            };
            for (id, root) in roots {
                if self.inodes.get(id).is_none() {
                    continue;
                }
                let mut walker = Walker::new(&root, "");
                walker.notes = false;
                while let Some(piece) = self.next(&mut walker).await? {
                    let twice = &self.volumes.twice;
                    for_each_run(&piece, |start, count, at| {
                        let near = twice.partition_point(|(volume, first, length)| {
                            (*volume, *first + *length) <= (at.volume, at.cluster)
                        });
                        for range in twice.iter().skip(near) {
                            let (volume, first, length) = *range;
                            if volume != at.volume || first >= at.cluster + count {
                                break;
                            }
                            let offset = (start + first.saturating_sub(at.cluster)) * CLUSTER;
                            let text = format!("{} at offset {offset}", FileId(id));
                            let list = owners.entry((volume, first, length)).or_default();
                            if list.len() < 8 {
                                list.push(text);
                            }
                        }
                    });
                }
            }
        }
        for ((volume, first, count), owners) in owners {
            let name = (self.volumes.list.get(&volume))
                .map_or_else(|| volume.to_string(), super::space::VolumeCheck::name);
            let clusters = if count == 1 {
                format!("cluster {first} belongs to")
            } else {
                format!("clusters {first} to {} belong to", first + count - 1)
            };
            let problem = format!(
                "{clusters} {}: copy each file, see whose content is right, and delete the other",
                owners.join(" and to ")
            );
            self.findings.add(Severity::Loss, name, problem);
        }
        Ok(())
    }
}

/// Runs of consecutive clusters with a place.
fn for_each_run(piece: &Piece, mut each: impl FnMut(u64, u64, Location)) {
    match piece {
        Piece::Run { start, count, entry } => {
            if let Some(at) = entry.location() {
                each(*start, *count, at);
            }
        }
        Piece::Leaf { start, node, .. } => {
            let body = node.body.borrow();
            let Body::Map(entries) = &*body else { return };
            let mut index = 0;
            while index < FANOUT {
                let Some(at) = entries.get(index).location() else {
                    index += 1;
                    continue;
                };
                let count = (1_u64..)
                    .zip(index + 1..FANOUT)
                    .take_while(|(ahead, next)| entries.get(*next).location() == Some(at.plus(*ahead)))
                    .count();
                each(start + index as u64, count as u64 + 1, at);
                index += count + 1;
            }
        }
    }
}

/// The same clusters as ranges in order that have none in common.
fn disjoint(mut ranges: Vec<(VolumeIndex, u64, u64)>) -> Vec<(VolumeIndex, u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(VolumeIndex, u64, u64)> = Vec::with_capacity(ranges.len());
    for (volume, first, count) in ranges {
        match merged.last_mut() {
            Some((before, start, length)) if *before == volume && first < *start + *length => {
                *length = (*length).max(first + count - *start);
            }
            _ => merged.push((volume, first, count)),
        }
    }
    merged
}
