//! Records of the repair: each makes one thing what it should be, whatever it was. `check/mend.rs` says which one mends what.

use block_io::BlockDevice;

use super::{Damage, State, Stop, inode_key};
use crate::file_core::FileCore;
use crate::inode::Kind;
use crate::record::{NameMend, Record};
use crate::tree::node::BITS;
use crate::units::MAX_CLUSTERS;

impl<V: BlockDevice> State<V> {
    pub(super) fn prepare_mend(&self, record: &Record) -> Result<(), Stop> {
        match record {
            Record::MendInode { inode } => {
                let file = self.file(inode.id)?;
                self.same_kind(&file, inode.kind)
            }
            Record::MendOrphan { file, .. } => Ok(self.orphans.ensure(inode_key(*file))?),
            Record::MendName(name) => {
                let directory = self.file(name.directory)?;
                self.same_kind(&directory, Kind::Directory)?;
                if let Some(names) = directory.names() {
                    names.ensure(name.key)?;
                }
                Ok(())
            }
            Record::MendBits {
                volume, first, count, ..
            } => {
                let volume = self.volume(*volume)?;
                let end = first.saturating_add(u64::from(*count));
                if end > MAX_CLUSTERS || end > volume.clusters() || u64::from(*count) > BITS {
                    return Err(Damage::new(volume.index, "is mended behind its end").into());
                }
                for cluster in [*first, end.saturating_sub(1)] {
                    volume.ensure(cluster)?;
                }
                Ok(())
            }
            Record::MendObject { object } => Ok(self.objects.look(*object).map(|_| ())?),
            _ => Ok(()),
        }
    }

    fn same_kind(&self, file: &FileCore, kind: Kind) -> Result<(), Stop> {
        if file.inode.borrow().kind == kind {
            return Ok(());
        }
        Err(Damage::new(file.id, "is mended as something of another kind").into())
    }

    pub(super) fn mend(&self, record: &Record) -> Result<(), Stop> {
        match record {
            Record::MendInode { inode } => {
                let file = self.file(inode.id)?;
                file.change(|old| old.clone_from(inode));
                self.note_id(inode.id.0);
                Ok(())
            }
            Record::MendOrphan { file, present: true } => self.add_orphan(*file),
            Record::MendOrphan { file, present: false } => self.remove_orphan(*file),
            Record::MendName(name) => self.mend_name(name),
            Record::MendBits {
                volume,
                first,
                count,
                used,
            } => {
                let volume = self.volume(*volume)?;
                for cluster in *first..*first + u64::from(*count) {
                    // It may be so already.
                    let _changed = volume.mark(&self.pages, cluster, *used)?;
                }
                Ok(())
            }
            Record::MendObject { object } => {
                if let Some(root) = self.object(*object)? {
                    self.pages.dropped(&root.child);
                    self.set_object(*object, None)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn mend_name(&self, name: &NameMend) -> Result<(), Stop> {
        let directory = self.file(name.directory)?;
        let Some(names) = directory.names() else {
            return Ok(());
        };
        let is_it = |data: &[u8]| data == name.data.as_slice();
        if name.present {
            let put = names.put(&self.pages, name.key, &name.data, is_it)?;
            if put.is_err() {
                return Err(Damage::new(name.directory, "has too many names with one hash").into());
            }
        } else {
            names.remove(&self.pages, name.key, is_it)?;
        }
        directory.dirty.set(true);
        Ok(())
    }
}
