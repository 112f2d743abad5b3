//! The front-end's memory: from regions and descriptors to [`GuestMemory`].
//!
//! A region is taken only if its file is as long as the region says, so that no access goes beyond its end. A file that is
//! truncated later would still kill the process at the next access (SIGBUS): memfds are sealed against shrinking where they
//! allow it, and for all others `sigbus` catches the signal.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};
use virtio_core::GuestMemory;
use virtio_core::vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use super::message::Region;
use super::sigbus::Guard;

/// The most regions: memory that is plugged in comes one region at a time.
pub(super) const MAX_REGIONS: usize = 256;

/// Memory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    /// A number is impossible.
    #[error(
        "region of {} bytes at guest address {:#x} (front-end {:#x}, file offset {:#x}) is impossible",
        .0.size, .0.guest, .0.user, .0.offset
    )]
    Numbers(Region),
    /// The file is too short.
    #[error("the file of a memory region has {length} bytes, the region needs {needed}")]
    TooShort { length: u64, needed: u64 },
    /// It cannot be looked at or mapped.
    #[error("cannot map a memory region")]
    Map(#[source] io::Error),
    /// There are too many.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// They overlap.
    #[error("memory regions do not fit together")]
    Collection(#[source] GuestRegionCollectionError),
    /// There is no such region.
    #[error("no memory region at guest address {:#x}", .0.guest)]
    Unknown(Region),
}

/// A region that is mapped.
struct Mapped {
    region: Region,
    /// Before the mapping, as it goes first.
    _guard: Guard,
    mapping: Arc<GuestRegionMmap>,
}

impl Mapped {
    fn is_there(&self) -> bool {
        let file = self.mapping.file_offset().map(|place| place.file().metadata());
        // Huge pages are counted like others.
        matches!(file, Some(Ok(file)) if file.blocks().saturating_mul(512) >= file.len())
    }
}

/// All memory of a front-end.
#[derive(Default)]
pub(super) struct Memory {
    /// In the order of the guest's addresses.
    regions: Vec<Mapped>,
    /// Once somebody has asked: see [`Self::is_all_there`].
    all_there: OnceCell<bool>,
}

impl Memory {
    /// All of a table.
    pub(super) fn from_table(regions: &[Region], fds: Vec<OwnedFd>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (region, fd) in regions.iter().zip(fds) {
            memory.add(*region, fd)?;
        }
        Ok(memory)
    }

    /// Adds one.
    pub(super) fn add(&mut self, region: Region, fd: OwnedFd) -> Result<(), MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        self.all_there = OnceCell::new();
        let mapping = map(fd, region.offset, region.size, || MemoryError::Numbers(region))?;
        let fits =
            region.guest.checked_add(region.size).is_some() && region.user.checked_add(region.size).is_some();
        let guard = Guard::new(mapping.as_ptr() as usize, mapping.size());
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(region.guest)).filter(|_| fits);
        self.regions.push(Mapped {
            region,
            mapping: Arc::new(mapping.ok_or(MemoryError::Numbers(region))?),
            _guard: guard,
        });
        self.regions.sort_by_key(|mapped| mapped.region.guest);
        Ok(())
    }

    /// Takes one away; its file offset does not matter.
    pub(super) fn remove(&mut self, region: Region) -> Result<(), MemoryError> {
        let key = |region: Region| (region.guest, region.size, region.user);
        let place = self
            .regions
            .iter()
            .position(|mapped| key(mapped.region) == key(region));
        self.regions.remove(place.ok_or(MemoryError::Unknown(region))?);
        self.all_there = OnceCell::new();
        Ok(())
    }

    /// The memory as queues use it; nothing if there is none.
    pub(super) fn guest(&self) -> Result<Option<GuestMemory>, MemoryError> {
        if self.regions.is_empty() {
            return Ok(None);
        }
        let regions = self
            .regions
            .iter()
            .map(|mapped| Arc::clone(&mapped.mapping))
            .collect();
        let memory = GuestMemoryMmap::from_arc_regions(regions).map_err(MemoryError::Collection)?;
        Ok(Some(Arc::new(memory)))
    }

    /// Whether all of it was taken from the host already, by who shares it: then holding it takes nothing more. Its files are looked at
    /// once, until there are other regions.
    pub(super) fn is_all_there(&self) -> bool {
        *self
            .all_there
            .get_or_init(|| self.regions.iter().all(Mapped::is_there))
    }

    /// The guest's address of what the front-end sees at `user`.
    pub(super) fn translate(&self, user: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|mapped| {
            let offset = user.checked_sub(mapped.region.user)?;
            (offset < mapped.region.size).then(|| GuestAddress(mapped.region.guest + offset))
        })
    }
}

/// Maps `size` bytes of a file, if it has them.
pub(super) fn map(
    fd: OwnedFd,
    offset: u64,
    size: u64,
    impossible: impl Fn() -> MemoryError,
) -> Result<MmapRegion, MemoryError> {
    let needed = offset.checked_add(size).ok_or_else(&impossible)?;
    let length = usize::try_from(size).map_err(|_| impossible())?;
    if length == 0 {
        return Err(impossible());
    }
    let file = File::from(fd);
    // Sealed first, measured then: in the other order it could shrink in between. Most files cannot be sealed.
    let _ = fcntl_add_seals(file.as_fd(), SealFlags::SHRINK);
    let metadata = file.metadata().map_err(MemoryError::Map)?;
    if metadata.len() < needed {
        return Err(MemoryError::TooShort {
            length: metadata.len(),
            needed,
        });
    }
    if !is_sealed(&file) {
        tracing::debug!("a memory region's file can be truncated: accesses beyond its end are caught");
    }
    MmapRegion::from_file(FileOffset::new(file, offset), length)
        .map_err(|error| MemoryError::Map(io::Error::other(error)))
}

fn is_sealed(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn memory_is_all_there_when_all_of_its_files_are() {
        let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
        let length = 64 << 10;
        file.set_len(length).unwrap();
        let region = Region {
            guest: 0,
            size: length,
            user: 0,
            offset: 0,
        };
        let table = |region| Memory::from_table(&[region], vec![file.try_clone().unwrap().into()]).unwrap();
        for place in 0..16 {
            assert!(!table(region).is_all_there());
            file.write_all_at(&[1], place << 12).unwrap();
        }
        assert!(table(region).is_all_there());
    }

    #[test]
    fn files_are_looked_at_once_for_the_same_regions() {
        let length = 4 << 10;
        let files = [(); 2].map(|()| {
            let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
            file.set_len(length).unwrap();
            file
        });
        let regions = [0, length].map(|start| Region {
            guest: start,
            size: length,
            user: start,
            offset: 0,
        });
        let fds = files.iter().map(|file| file.try_clone().unwrap().into());
        let mut memory = Memory::from_table(&regions, fds.collect()).unwrap();
        files[0].write_all_at(&[1], 0).unwrap();
        assert!(!memory.is_all_there());
        files[1].write_all_at(&[1], 0).unwrap();
        assert!(!memory.is_all_there(), "it was asked before");
        memory.remove(regions[1]).unwrap();
        assert!(memory.is_all_there());
        files[1].set_len(2 * length).unwrap();
        memory
            .add(regions[1], files[1].try_clone().unwrap().into())
            .unwrap();
        assert!(!memory.is_all_there(), "one more");
    }
}
