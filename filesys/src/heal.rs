//! What heals itself: bytes whose checksum is wrong are looked for in the other copies that a volume has of them, and put right.
//!
//! The layer of volumes cannot see that a device returned something else than was written to it; the file system can, and knows which
//! copy is right. It learns of the copies through [`Copies`], which the owner gives it in
//! [`OpenOptions::redundancy`](crate::OpenOptions); without that, there is one copy.
//!
//! A repair writes bytes that are there already in one copy, so it changes nothing for who reads. It must only not be late, when the
//! place holds something else already. So data are repaired with the part of the file alone ([`Gate`](crate::gate::Gate)); blocks of
//! metadata either while no checkpoint runs, or announced ([`Mending`]), so that the next checkpoint that could use the block waits.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Clock, IoBuf, IoError};

use crate::core::Core;
use crate::error::FsError;
use crate::event::Event;
use crate::file::{data_sum, sum_of, whole};
use crate::gate::Boxed;
use crate::units::{FileId, SUB_CLUSTER};
use crate::volume::VolumeCore;

/// A volume that has its bytes more than once: in legs of a mirror, or in parity.
pub trait Copies {
    /// In how many ways the bytes of a range can be had.
    fn copies(&self, offset: u64, length: u64) -> usize;

    /// So many of them, the first ones, show whatever is damaged in any. The others are only other ways to compute the same.
    fn telling(&self, offset: u64, length: u64) -> usize {
        self.copies(offset, length)
    }

    /// Reads one copy of a range, and no other.
    fn read_copy<'a>(
        &'a self,
        copy: usize,
        offset: u64,
        buffers: &'a [IoBuf],
    ) -> Boxed<'a, Result<(), IoError>>;

    /// Makes all copies hold these bytes, which are right, durably.
    fn repair<'a>(&'a self, offset: u64, buffers: &'a [IoBuf]) -> Boxed<'a, Result<(), IoError>>;
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Copies for volume_manager::Volume<D, C> {
    fn copies(&self, offset: u64, length: u64) -> usize {
        Self::copies(self, offset, length)
    }

    fn telling(&self, offset: u64, length: u64) -> usize {
        Self::telling_copies(self, offset, length)
    }

    fn read_copy<'a>(
        &'a self,
        copy: usize,
        offset: u64,
        buffers: &'a [IoBuf],
    ) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(Self::read_copy(self, copy, offset, buffers))
    }

    fn repair<'a>(&'a self, offset: u64, buffers: &'a [IoBuf]) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(Self::repair(self, offset, buffers))
    }
}

/// Which volumes have copies. Clones are the same: what is set later counts for file systems that are open.
#[derive(Clone, Default)]
pub struct Redundancy(Rc<RefCell<Known>>);

#[derive(Default)]
struct Known {
    meta: Option<Rc<dyn Copies>>,
    volumes: BTreeMap<[u8; 16], Rc<dyn Copies>>,
}

impl fmt::Debug for Redundancy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = self.0.borrow();
        formatter
            .debug_struct("Redundancy")
            .field("meta", &known.meta.is_some())
            .field("volumes", &known.volumes.len())
            .finish()
    }
}

impl Redundancy {
    /// The copies of the metadata volume.
    pub fn set_meta(&self, copies: Option<Rc<dyn Copies>>) {
        self.0.borrow_mut().meta = copies;
    }

    /// The copies of a data volume, by its identity.
    pub fn set_volume(&self, uuid: [u8; 16], copies: Option<Rc<dyn Copies>>) {
        let volumes = &mut self.0.borrow_mut().volumes;
        match copies {
            Some(copies) => volumes.insert(uuid, copies),
            None => volumes.remove(&uuid),
        };
    }

    fn volume(&self, uuid: [u8; 16]) -> Option<Rc<dyn Copies>> {
        self.0.borrow().volumes.get(&uuid).map(Rc::clone)
    }
}

/// What looks for good blocks of the metadata volume.
#[derive(Debug, Clone, Default)]
pub(crate) struct Healer {
    redundancy: Redundancy,
    /// What is found is put right as well.
    repairs: bool,
    found: Rc<RefCell<Vec<Event>>>,
    pub(crate) bell: Bell,
}

/// What rings a bell.
type Ring = Box<dyn Fn()>;

/// Rung when there is an event.
#[derive(Clone, Default)]
pub(crate) struct Bell(Rc<RefCell<Option<Ring>>>);

impl Bell {
    pub(crate) fn set(&self, ring: Ring) {
        *self.0.borrow_mut() = Some(ring);
    }

    pub(crate) fn ring(&self) {
        if let Some(ring) = &*self.0.borrow() {
            ring();
        }
    }
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Bell")
    }
}

impl Healer {
    pub(crate) fn new(redundancy: &Redundancy, repairs: bool) -> Self {
        Self {
            redundancy: redundancy.clone(),
            repairs,
            found: Rc::default(),
            bell: Bell::default(),
        }
    }

    pub(crate) fn take_events(&self) -> Vec<Event> {
        self.found.take()
    }

    fn meta(&self) -> Option<Rc<dyn Copies>> {
        self.redundancy.0.borrow().meta.as_ref().map(Rc::clone)
    }

    /// How many copies of a block can be asked for; none without redundancy.
    pub(crate) fn copies(&self, block: u64) -> usize {
        self.meta().map_or(0, |meta| {
            meta.copies(block.saturating_mul(SUB_CLUSTER), SUB_CLUSTER)
        })
    }

    /// See [`Copies::telling`].
    pub(crate) fn telling(&self, block: u64) -> usize {
        self.meta().map_or(0, |meta| {
            meta.telling(block.saturating_mul(SUB_CLUSTER), SUB_CLUSTER)
        })
    }

    /// One copy of a block.
    pub(crate) async fn read(&self, copy: usize, block: u64) -> Option<AlignedBuffer> {
        let buffer = AlignedBuffer::new(usize::try_from(SUB_CLUSTER).ok()?);
        let offset = block.checked_mul(SUB_CLUSTER)?;
        let read = self.meta()?.read_copy(copy, offset, &whole(&buffer)).await;
        read.is_ok().then_some(buffer)
    }

    /// Writes a good block to all copies. Nobody writes there meanwhile.
    pub(crate) async fn repair(&self, block: u64, good: &AlignedBuffer) -> bool {
        let Some(meta) = self.meta().filter(|_| self.repairs) else {
            return false;
        };
        match meta.repair(block * SUB_CLUSTER, &whole(good)).await {
            Ok(()) => {
                tracing::warn!(
                    block,
                    "a block of metadata was not what was written, and was repaired"
                );
                self.found.borrow_mut().push(Event::MetadataRepaired { block });
                self.bell.ring();
                true
            }
            Err(error) => {
                tracing::error!(block, %error, "a block of metadata cannot be repaired");
                false
            }
        }
    }

    /// A copy of a block that `good` takes.
    pub(crate) async fn find(
        &self,
        block: u64,
        mut good: impl FnMut(&[u8]) -> bool,
    ) -> Option<AlignedBuffer> {
        for copy in 0..self.copies(block) {
            if let Some(found) = self.read(copy, block).await
                && good(found.as_slice())
            {
                block_io::cover!("filesys: a good copy of a block of metadata");
                return Some(found);
            }
        }
        None
    }
}

/// Repairs of metadata that are under way: checkpoints do not write pages meanwhile.
#[derive(Debug)]
pub(crate) struct Mending<'a>(&'a Cell<u32>, &'a crate::gate::Signal);

impl Drop for Mending<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
        self.1.notify();
    }
}

/// What became of data that were not right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Healed {
    /// They are in memory now, and all copies hold them.
    Repaired,
    /// They are in memory now; what is on the volume could not be put right.
    Found,
    /// No copy is right.
    Lost,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Core<V, C> {
    /// Says that a block is about to be repaired.
    pub(crate) fn mending(&self) -> Mending<'_> {
        self.mendings.set(self.mendings.get() + 1);
        Mending(&self.mendings, &self.changed)
    }

    /// Waits until no block is being repaired.
    pub(crate) async fn mended(&self) {
        self.changed
            .until(|| (self.mendings.get() == 0).then_some(()))
            .await;
    }

    pub(crate) fn copies_of(&self, volume: &VolumeCore<V>) -> Option<Rc<dyn Copies>> {
        self.options.redundancy.volume(volume.record().uuid)
    }

    /// Data of a volume at `offset`, a multiple of 4 KiB, differ from their checksums: takes what is right from the other copies, sub-cluster
    /// by sub-cluster, and repairs. Nobody writes there, and the place stays what it is. Tells of each what became of it; what was right
    /// already is not mentioned.
    pub(crate) async fn heal_data(
        &self,
        volume: &VolumeCore<V>,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<Vec<(u64, Healed)>, FsError> {
        let mut all = Vec::new();
        let size = usize::try_from(SUB_CLUSTER).unwrap_or(4096);
        for (number, sub) in (0_u64..).zip(bytes.chunks_mut(size)) {
            let at = offset + number * SUB_CLUSTER;
            let known = self.look(|_| Ok(sum_of(volume, at / SUB_CLUSTER)?)).await?;
            if known == 0 || known == data_sum(sub) {
                continue;
            }
            let healed = self.heal_sub(volume, at, known, sub).await;
            all.push((number * SUB_CLUSTER, healed));
        }
        Ok(all)
    }

    /// Tells what became of data of a file from byte `from` on. Those that are lost are an error.
    pub(crate) fn tell_healed(
        &self,
        file: FileId,
        from: u64,
        healed: &[(u64, Healed)],
    ) -> Result<(), FsError> {
        let mut lost = None;
        for (skip, healed) in healed {
            let offset = from + skip;
            match healed {
                Healed::Repaired => {
                    tracing::warn!(%file, offset, "data were not what was written, and were repaired");
                    self.event(Event::Repaired { file, offset });
                }
                Healed::Found => {
                    tracing::warn!(%file, offset, "data are not what was written, and were read from another copy");
                }
                Healed::Lost => lost = lost.or(Some(offset)),
            }
        }
        lost.map_or(Ok(()), |offset| Err(FsError::Checksum { file, offset }))
    }

    async fn heal_sub(&self, volume: &VolumeCore<V>, at: u64, known: u32, sub: &mut [u8]) -> Healed {
        let Some(copies) = self.copies_of(volume) else {
            return Healed::Lost;
        };
        let buffer = AlignedBuffer::new(sub.len());
        for copy in 0..copies.copies(at, SUB_CLUSTER) {
            let read = copies.read_copy(copy, at, &whole(&buffer)).await;
            if read.is_err() || data_sum(buffer.as_slice()) != known {
                continue;
            }
            block_io::cover!("filesys: data are taken from another copy");
            sub.copy_from_slice(buffer.as_slice());
            if self.options.read_only {
                return Healed::Found;
            }
            return match copies.repair(at, &whole(&buffer)).await {
                Ok(()) => {
                    // The next flush has something to do: until then, a power cut may bring the rot back.
                    volume.written.set(volume.written.get() + 1);
                    Healed::Repaired
                }
                Err(error) => {
                    tracing::error!(offset = at, %error, "data cannot be repaired");
                    Healed::Found
                }
            };
        }
        block_io::cover!("filesys: no copy of data is right");
        Healed::Lost
    }
}
