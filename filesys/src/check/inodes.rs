//! The tables: inodes, volumes, orphans, pins. Of each inode stays what is compared later.

use block_io::{BlockDevice, Clock};

use super::mend::{Edit, Mend};
use super::report::Severity;
use super::walk::{Piece, Walker};
use super::{Check, file};
use crate::error::FsError;
use crate::inode::{Flags, Inode, Kind};
use crate::record::{PinRecord, Record, VolumeRecord};
use crate::state::{INODES, ORPHANS, PINS, ROOT, VOLUMES, inode_key};
use crate::tree::codec::Kind as TreeKind;
use crate::tree::node::{Body, Root};
use crate::tree::table::Item;
use crate::units::FileId;
use crate::wire::Reader;

/// Of an inode, what is compared.
#[derive(Debug, Clone)]
pub(super) struct Brief {
    pub(super) id: u64,
    pub(super) kind: Kind,
    pub(super) flags: Flags,
    pub(super) directory: u64,
    /// Hash of its name.
    pub(super) key: u64,
    pub(super) size: u64,
    pub(super) allocated: u64,
    pub(super) parent: Option<FileId>,
    pub(super) first_child: Option<FileId>,
    pub(super) next: Option<FileId>,
    pub(super) previous: Option<FileId>,
    pub(super) children: u32,
    /// It has an entry among the orphans.
    pub(super) orphan: bool,
    /// Its name was found where it says that it is.
    pub(super) named: bool,
    /// Its map or its names were found.
    pub(super) object: bool,
}

impl Brief {
    pub(super) fn is_linked(&self) -> bool {
        !self.flags.has(Flags::UNLINKED) && !self.flags.has(Flags::DYING)
    }
}

/// All inodes, in order of their numbers.
#[derive(Debug, Default)]
pub(super) struct Inodes {
    pub(super) list: Vec<Brief>,
    /// Some could not be read.
    pub(super) broken: bool,
    /// Orphans could not all be read.
    pub(super) orphans_broken: bool,
}

impl Inodes {
    pub(super) fn index(&self, id: u64) -> Option<usize> {
        self.list.binary_search_by_key(&id, |brief| brief.id).ok()
    }

    pub(super) fn get(&self, id: u64) -> Option<&Brief> {
        self.list.get(self.index(id)?)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Brief> {
        let index = self.index(id)?;
        self.list.get_mut(index)
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'_, V, C> {
    pub(super) async fn tables(&mut self) -> Result<(), FsError> {
        let mut roots: [Option<Root>; 5] = Default::default();
        let mut walker = Walker::new(&self.view.root, "the table of objects");
        // It is walked again later, and noted then.
        walker.notes = false;
        if let Some(Piece::Leaf { start: 0, node, .. }) = self.next(&mut walker).await?
            && let Body::Objects(objects) = &*node.body.borrow()
        {
            roots.clone_from_slice(&objects[..5]);
        }
        let [_, inodes, volumes, orphans, pins] = roots;
        self.inodes.broken = !self
            .table(INODES, inodes, "the table of inodes", Self::inode)
            .await?;
        self.inodes.list.sort_by_key(|brief| brief.id);
        self.volumes.broken = !self
            .table(VOLUMES, volumes, "the table of volumes", Self::volume)
            .await?;
        self.inodes.orphans_broken = !self
            .table(ORPHANS, orphans, "the table of orphans", Self::orphan)
            .await?;
        self.table(PINS, pins, "the table of pins", Self::pin).await?;
        match self.inodes.get(ROOT.0) {
            Some(root) if root.kind == Kind::Directory => {}
            _ => self
                .findings
                .add(Severity::Loss, "/", "the root directory has no inode"),
        }
        Ok(())
    }

    /// Walks a table; whether all of it was there.
    async fn table(
        &mut self,
        object: u64,
        root: Option<Root>,
        name: &str,
        each: impl Fn(&mut Self, &Item),
    ) -> Result<bool, FsError> {
        let root = match root {
            Some(root) if root.kind == TreeKind::Table => root,
            Some(_) => {
                self.findings.add(Severity::Loss, name, "is another kind of tree");
                return Ok(false);
            }
            None => {
                self.findings
                    .add(Severity::Loss, name, format!("object {object} is missing"));
                return Ok(false);
            }
        };
        let mut walker = Walker::new(&root, name);
        let mut whole = true;
        while let Some(piece) = self.next(&mut walker).await? {
            whole &= self.items(&walker.name, &piece, &each);
        }
        Ok(whole && !walker.broken)
    }

    /// The items of a leaf, if they belong there.
    pub(super) fn items(&mut self, name: &str, piece: &Piece, each: &impl Fn(&mut Self, &Item)) -> bool {
        let Piece::Leaf { start, last, node } = piece else {
            return true;
        };
        let body = node.body.borrow();
        let Body::Table(items) = &*body else { return true };
        let mut whole = true;
        for item in items {
            if !(*start..=*last).contains(&item.key) {
                whole = false;
                self.complete = false;
                self.findings.add(
                    Severity::Loss,
                    name,
                    format!(
                        "an item with key {:#018x} is in a page where it is not found",
                        item.key
                    ),
                );
                continue;
            }
            each(self, item);
        }
        whole
    }

    fn inode(&mut self, item: &Item) {
        let id = item.key.swap_bytes();
        let inode = match Inode::from_bytes(&item.data) {
            Ok(inode) if inode.id.0 == id => inode,
            Ok(inode) => {
                self.inodes.broken = true;
                self.complete = false;
                let problem = format!("its place in the table of inodes has {}", inode.id);
                self.findings.add(Severity::Loss, file(id), problem);
                return;
            }
            Err(error) => {
                self.inodes.broken = true;
                self.complete = false;
                self.findings
                    .add(Severity::Loss, file(id), format!("its inode is damaged: {error}"));
                return;
            }
        };
        if self.inodes.list.last().is_some_and(|last| last.id == id) {
            self.findings
                .add(Severity::Loss, file(id), "has two inodes; the second is left out");
            return;
        }
        if id >= self.view.next_id {
            self.findings.mendable(
                Severity::Major,
                file(id),
                format!(
                    "its number is not below {}, the next one that is given",
                    self.view.next_id
                ),
                [Mend::Edit(inode.id, Edit::Nothing)],
            );
        }
        match inode.kind {
            Kind::File => self.progress.files += 1,
            Kind::Directory => self.progress.directories += 1,
        }
        self.inodes.list.push(Brief {
            id,
            kind: inode.kind,
            flags: inode.flags,
            directory: inode.directory.0,
            key: self.core.state.name_key(&inode.name),
            size: inode.size,
            allocated: inode.allocated,
            parent: inode.parent,
            first_child: inode.first_child,
            next: inode.next_sibling,
            previous: inode.previous_sibling,
            children: inode.children,
            orphan: false,
            named: false,
            object: false,
        });
    }

    fn volume(&mut self, item: &Item) {
        let mut reader = Reader(&item.data);
        let record = match VolumeRecord::decode(&mut reader) {
            Ok(record) if u64::from(record.index.0) == item.key => record,
            Ok(record) => {
                self.volumes.broken = true;
                let problem = format!("item {} is that of {}", item.key, record.index);
                self.findings.add(Severity::Loss, "the table of volumes", problem);
                return;
            }
            Err(error) => {
                self.volumes.broken = true;
                let problem = format!("item {} is damaged: {error}", item.key);
                self.findings.add(Severity::Loss, "the table of volumes", problem);
                return;
            }
        };
        for object in [record.bitmap, record.sums] {
            if object >= self.view.next_id {
                let problem = format!(
                    "its object {object} is not below {}, the next one that is given",
                    self.view.next_id
                );
                self.findings.mendable(
                    Severity::Major,
                    format!("volume {}", record.name),
                    problem,
                    [Mend::Record(Record::Volume(record.clone()))],
                );
            }
        }
        self.volumes.add(record);
    }

    fn orphan(&mut self, item: &Item) {
        let id = FileId(item.key.swap_bytes());
        let broken = self.inodes.broken;
        match self.inodes.get_mut(id.0) {
            Some(brief) => brief.orphan = true,
            None if broken => {}
            None => self.findings.mendable(
                Severity::Minor,
                "the table of orphans",
                format!("has {id}, and there is no such inode"),
                [Mend::Orphan(id, false)],
            ),
        }
    }

    fn pin(&mut self, item: &Item) {
        let pin = match PinRecord::decode(&mut Reader(&item.data)) {
            Ok(pin) if pin.pin == item.key => pin,
            _ => {
                let problem = format!("item {} is damaged", item.key);
                self.findings.mendable(
                    Severity::Minor,
                    "the table of pins",
                    problem,
                    [Mend::Record(Record::Unpin { pin: item.key })],
                );
                return;
            }
        };
        let object = format!("pin {}", pin.pin);
        if pin.pin >= self.view.next_id {
            self.findings.mendable(
                Severity::Major,
                &object,
                "its number is not below the next one that is given",
                [Mend::Record(Record::Pin(pin))],
            );
        }
        match self.inodes.get(pin.file.0) {
            Some(brief) if brief.kind == Kind::File && brief.flags.has(Flags::FROZEN) => {}
            Some(_) => self.findings.add(
                Severity::Major,
                object,
                format!("keeps {}, which is not a frozen file", pin.file),
            ),
            None if self.inodes.broken => {}
            None => self.findings.mendable(
                Severity::Minor,
                object,
                format!("keeps {}, which does not exist", pin.file),
                [Mend::Record(Record::Unpin { pin: pin.pin })],
            ),
        }
    }

    /// Every inode has its orphan entry, or none.
    pub(super) fn orphans(&mut self) {
        if self.inodes.orphans_broken {
            return;
        }
        for brief in &self.inodes.list {
            let absorbed = brief.flags.has(Flags::ABSORBED);
            let wanted = !brief.is_linked() || absorbed;
            let id = FileId(brief.id);
            debug_assert_eq!(inode_key(id), brief.id.swap_bytes());
            if wanted && !brief.orphan {
                let state = if brief.flags.has(Flags::DYING) {
                    "being made or deleted"
                } else if absorbed {
                    "being absorbed"
                } else {
                    "waiting for its children"
                };
                self.findings.mendable(
                    Severity::Minor,
                    file(brief.id),
                    format!("is {state}, and is not in the table of orphans, so it stays so for ever"),
                    [Mend::Orphan(id, true)],
                );
            }
            if !wanted && brief.orphan {
                self.findings.mendable(
                    Severity::Minor,
                    file(brief.id),
                    "is in the table of orphans, and is a file with a name",
                    [Mend::Orphan(id, false)],
                );
            }
        }
    }
}
