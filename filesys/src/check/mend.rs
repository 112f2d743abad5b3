//! The repair: what findings ask for becomes records, the records are journaled and applied, and a checkpoint ends it.
//!
//! | wrong | mended by |
//! |---|---|
//! | a copy of the superblock differs | the next checkpoint writes all four |
//! | a cluster is marked and no map has it | the mark goes, if all maps could be read |
//! | a map has a cluster that is not marked | the mark comes, if no other map has it |
//! | a metadata block is marked and not reached | it is free after the checkpoint, if everything could be read |
//! | a metadata page is not marked | the mark comes |
//! | numbers of clusters, names, children, clear bits | counted anew |
//! | a list of children is broken | made anew from who has the parent |
//! | a parent is not frozen | it is frozen |
//! | an orphan has no entry, or the entry no orphan | the entry comes or goes |
//! | an inode has no name, or its directory lies within itself | it gets one: its number, in `/lost+found` |
//! | a name has no inode, or is the second one, or is found by no hash | the name goes |
//! | a name is elsewhere than its inode says | the inode follows the name |
//! | an object belongs to nobody | it goes; its pages with the next round |
//!
//! A crash in the midst of this leaves what was mended so far, in the order of the journal, since each record is a change like any other.
//! What is left is found by the next check.

use std::collections::BTreeMap;

use block_io::{BlockDevice, Clock};

use crate::core::{Core, Need, Quiet};
use crate::error::{FsError, Refusal};
use crate::inode::{Flags, Inode, Kind};
pub(crate) use crate::record::NameMend;
use crate::record::{LARGEST, Record};
use crate::state::ROOT;
use crate::units::{FileId, VolumeIndex};

/// Where what has no name goes.
const LOST: &str = "lost+found";
/// Records of one transaction.
const AT_ONCE: usize = 8;
/// Bits that one record changes.
const BITS_AT_ONCE: u64 = 1 << 15;

/// The list of children as a parent knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Links {
    pub(super) first: Option<FileId>,
    pub(super) children: u32,
}

/// A change of an inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Edit {
    /// None, but its number is noted as given.
    Nothing,
    Allocated(u64),
    Size(u64),
    Flags(Flags, bool),
    Children(Links),
    /// The next one and the one before.
    Siblings(Option<FileId>, Option<FileId>),
    /// Directory and name.
    Place(FileId, String),
}

impl Edit {
    fn apply(self, inode: &mut Inode) {
        match self {
            Self::Nothing => {}
            Self::Allocated(clusters) => inode.allocated = clusters,
            Self::Size(names) => inode.size = names,
            Self::Flags(flag, value) => inode.flags.set(flag, value),
            Self::Children(links) => {
                inode.first_child = links.first;
                inode.children = links.children;
            }
            Self::Siblings(next, previous) => {
                inode.next_sibling = next;
                inode.previous_sibling = previous;
            }
            Self::Place(directory, name) => {
                inode.directory = directory;
                inode.name = name;
            }
        }
    }
}

/// What mends something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mend {
    /// A checkpoint does.
    Checkpoint,
    Record(Record),
    Edit(FileId, Edit),
    Orphan(FileId, bool),
    Name(NameMend),
    Bits(VolumeIndex, u64, u64, bool),
    /// The page of a bitmap with this cluster is written anew, with its count.
    Recount(VolumeIndex, u64),
    DropObject(u64),
    /// Into `/lost+found`; whether it has a name that goes.
    Lost(FileId, bool),
    UseBlock(u64),
    FreeBlocks(u64, u64),
}

/// The plan of a repair, in the order in which it is carried out.
#[derive(Debug, Default)]
struct Plan {
    records: Vec<Record>,
    edits: BTreeMap<FileId, Vec<Edit>>,
    lost: Vec<(FileId, bool)>,
    used: Vec<u64>,
    recount: Vec<(VolumeIndex, u64)>,
    free: Vec<u64>,
    count: u64,
}

impl Plan {
    fn new(mends: Vec<Mend>) -> Self {
        let mut plan = Self {
            count: mends.len() as u64,
            ..Self::default()
        };
        for mend in mends {
            plan.add(mend);
        }
        plan
    }

    fn add(&mut self, mend: Mend) {
        match mend {
            Mend::Checkpoint => {}
            Mend::Record(record) => self.records.push(record),
            Mend::Edit(file, edit) => self.edits.entry(file).or_default().push(edit),
            Mend::Orphan(file, present) => self.records.push(Record::MendOrphan { file, present }),
            Mend::Name(name) => self.records.push(Record::MendName(name)),
            Mend::Bits(volume, first, count, used) => {
                let mut at = first;
                while at < first + count {
                    let some = (first + count - at).min(BITS_AT_ONCE);
                    self.records.push(Record::MendBits {
                        volume,
                        first: at,
                        count: u32::try_from(some).unwrap_or(0),
                        used,
                    });
                    at += some;
                }
            }
            Mend::Recount(volume, cluster) => self.recount.push((volume, cluster)),
            Mend::DropObject(object) => self.records.push(Record::MendObject { object }),
            Mend::Lost(file, has_name) => self.lost.push((file, has_name)),
            Mend::UseBlock(block) => self.used.push(block),
            Mend::FreeBlocks(first, count) => self.free.extend(first..first + count),
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Nothing is done in the background while this is there.
    pub(super) fn be_quiet(&self) -> Quiet<'_, V, C> {
        Quiet::new(self)
    }

    /// Carries out what a check asks for, which saw the file system after so many changes. Gives how much was done.
    pub(super) async fn mend(&self, mends: Vec<Mend>, changes: u64) -> Result<u64, FsError> {
        let mut plan = Plan::new(mends);
        for block in &plan.used {
            self.space.mark_used(*block);
        }
        for (volume, cluster) in &plan.recount {
            let rewritten = self
                .look(|state| Ok(state.volume(*volume)?.bitmap.rewrite(&state.pages, *cluster)?))
                .await;
            self.skip_damage(rewritten)?;
        }
        let mut changes = changes;
        for records in plan.records.chunks(AT_ONCE) {
            let mended = self.mend_now(&mut changes, |_| Ok(records.to_vec())).await;
            if self.skip_damage(mended)?.is_some() {
                continue;
            }
            // One of them cannot be done, so each of them is done alone.
            for record in records {
                let mended = self.mend_now(&mut changes, |_| Ok(vec![record.clone()])).await;
                if self.skip_damage(mended)?.is_none() {
                    plan.count = plan.count.saturating_sub(1);
                }
            }
        }
        for (id, edits) in &plan.edits {
            let edited = self.mend_now(&mut changes, |core| {
                let file = core.state.file(*id)?;
                let mut inode = file.inode.borrow().clone();
                edits.iter().cloned().for_each(|edit| edit.apply(&mut inode));
                Ok(vec![Record::MendInode {
                    inode: Box::new(inode),
                }])
            });
            let edited = edited.await;
            if self.skip_damage(edited)?.is_none() {
                plan.count = plan.count.saturating_sub(1);
            }
        }
        if !plan.lost.is_empty() {
            let found = self.find_lost(&mut changes, &plan.lost).await;
            self.skip_damage(found)?;
        }
        let counted = self.recount().await;
        self.skip_damage(counted)?;
        // What is free is written with the bitmap of the first checkpoint, and given away after the second.
        self.checkpoint_freeing(&plan.free).await?;
        Ok(plan.count)
    }

    /// What cannot be mended because of other damage is left; the next check says so. None: it was left.
    fn skip_damage<T>(&self, mended: Result<T, FsError>) -> Result<Option<T>, FsError> {
        match mended {
            Ok(mended) => Ok(Some(mended)),
            Err(FsError::Damaged(damage)) if self.check().is_ok() => {
                tracing::warn!(%damage, "something is not mended");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// One transaction of the repair; nobody else has changed anything.
    async fn mend_now(
        &self,
        changes: &mut u64,
        plan: impl Fn(&Self) -> Result<Vec<Record>, Refusal>,
    ) -> Result<(), FsError> {
        let ticket = self.admit(LARGEST * AT_ONCE, Need::Freeing).await?;
        let (group, ()) = self
            .transact_admitted(&ticket, |_| {
                if self.changes.get() != *changes {
                    return Err(FsError::Busy {
                        object: "the file system".into(),
                        problem: "it was changed during the repair: stop what uses it, and repair again"
                            .into(),
                    }
                    .into());
                }
                Ok((plan(self)?, ()))
            })
            .await?;
        *changes = self.changes.get();
        self.commit(group).await
    }

    /// What has no name gets one.
    async fn find_lost(&self, changes: &mut u64, lost: &[(FileId, bool)]) -> Result<(), FsError> {
        let path = format!("/{LOST}");
        let there = self
            .look(|_| match self.find(&path) {
                Ok(found) => Ok(Some(found)),
                Err(Refusal::Error(FsError::NotFound { .. })) => Ok(None),
                Err(refusal) => Err(refusal),
            })
            .await?;
        let directory = match there {
            Some(found) if found.names().is_some() => found.id,
            Some(_) => return Ok(()),
            None => {
                let id = FileId(self.state.new_id()?);
                self.mend_now(changes, |core| {
                    let inode = core.new_inode(&path, id, Kind::Directory, None)?;
                    Ok(vec![Record::Create {
                        inode: Box::new(inode),
                    }])
                })
                .await?;
                id
            }
        };
        for (id, has_name) in lost {
            let linked = self.mend_now(changes, |core| {
                let file = core.state.file(*id)?;
                let mut inode = file.inode.borrow().clone();
                let home = core.state.file(directory)?;
                let mut name = id.0.to_string();
                while core.state.lookup(&home, &name)?.is_some() {
                    name.push('+');
                }
                let mut records = Vec::new();
                if !has_name && inode.is_linked() {
                    // It has no name that could go first, which is what this says.
                    inode.flags.set(Flags::UNLINKED, true);
                    records.push(Record::MendInode {
                        inode: Box::new(inode),
                    });
                }
                records.push(Record::Link {
                    file: *id,
                    directory,
                    name,
                });
                Ok(records)
            });
            let linked = linked.await;
            self.skip_damage(linked)?;
        }
        debug_assert_ne!(directory, ROOT);
        Ok(())
    }

    /// Volumes count anew what is free.
    async fn recount(&self) -> Result<(), FsError> {
        let volumes: Vec<_> = self.state.volumes.borrow().values().cloned().collect();
        for volume in volumes {
            self.look(|_| Ok(volume.count_free()?)).await?;
        }
        Ok(())
    }
}
