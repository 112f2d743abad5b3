//! What is open.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use block_io::{
    Allocation, BlockDevice, Clock, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode,
};

use super::layer_cache::LayerCache;
use super::memory;
use crate::core::Core;
use crate::error::FsError;
use crate::file_core::{Chain, FileCore};
use crate::units::{CLUSTER, FileId, SUB_CLUSTER};

/// What is done with an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reads.
    Read,
    /// Reads and writes; only one may have a file open like this.
    Write,
}

/// An open file, which is a disk. It is closed when it is dropped.
///
/// Sizes and offsets are in bytes, multiples of 512. When a layer is put on top of the file through
/// [`FileSystem::snapshot`](crate::FileSystem::snapshot), the handle goes on with the new layer.
pub struct File<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    pub(crate) core: Rc<Core<V, C>>,
    pub(super) name: RefCell<Arc<str>>,
    pub(crate) access: Access,
    /// Gets no space when less than five per cent are left.
    pub(super) careful: Cell<bool>,
    chain: RefCell<Chain>,
    chain_seen: Cell<u64>,
    pub(super) layers: RefCell<LayerCache>,
    layers_seen: Cell<u64>,
    moves_seen: Cell<u64>,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> std::fmt::Debug for File<V, C> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.name.borrow();
        formatter
            .debug_struct("File")
            .field("name", &name)
            .finish_non_exhaustive()
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Drop for File<V, C> {
    fn drop(&mut self) {
        if let Some(file) = self.chain.borrow().first() {
            file.opens.set(file.opens.get() - 1);
            if self.access == Access::Write {
                file.writers.set(file.writers.get() - 1);
            }
        }
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> File<V, C> {
    pub(crate) fn new(core: Rc<Core<V, C>>, name: &str, access: Access, chain: Chain) -> Self {
        if let Some(file) = chain.first() {
            file.opens.set(file.opens.get() + 1);
            if access == Access::Write {
                file.writers.set(file.writers.get() + 1);
            }
        }
        Self {
            chain_seen: Cell::new(core.chains.get()),
            layers_seen: Cell::new(core.layers.get()),
            moves_seen: Cell::new(moves_below(&chain)),
            core,
            name: RefCell::new(name.into()),
            access,
            careful: Cell::new(false),
            chain: RefCell::new(chain),
            layers: RefCell::default(),
        }
    }

    /// Its number.
    pub fn id(&self) -> FileId {
        self.head().id
    }

    /// Says whether the user of this file can deal with a full volume: then allocation stops at five per cent free already, so that
    /// others can go on.
    pub fn set_careful(&self, careful: bool) {
        self.careful.set(careful);
    }

    /// The file itself.
    pub(crate) fn head(&self) -> Rc<FileCore> {
        let chain = self.chain.borrow();
        // A chain begins with its file.
        Rc::clone(&chain[0])
    }

    /// The file and its ancestors, as far as is known.
    pub(super) fn known_chain(&self) -> Chain {
        Rc::clone(&self.chain.borrow())
    }

    /// The file and its ancestors as they are now.
    pub(crate) async fn chain(&self) -> Result<Chain, FsError> {
        while self.chain_seen.get() != self.core.chains.get() {
            let seen = self.core.chains.get();
            let id = self.id();
            let chain = self.core.look(|_| Ok(self.core.chain(id)?)).await?;
            if seen == self.core.chains.get() {
                let old = self.chain.replace(chain);
                self.chain_seen.set(seen);
                let new = self.chain.borrow();
                if old.len() != new.len()
                    || !old.iter().zip(new.iter()).all(|(old, new)| Rc::ptr_eq(old, new))
                {
                    self.layers.borrow_mut().clear();
                }
            }
        }
        self.layers_seen.set(self.core.layers.get());
        // Others' ancestors are none of ours.
        let moves = moves_below(&self.chain.borrow());
        if self.moves_seen.replace(moves) != moves {
            block_io::cover!("filesys: what ancestors have was moved");
            self.layers.borrow_mut().clear();
        }
        Ok(self.known_chain())
    }

    /// Whether [`Self::chain`] would have to look.
    pub(super) fn chain_is_fresh(&self) -> bool {
        self.chain_seen.get() == self.core.chains.get() && self.layers_seen.get() == self.core.layers.get()
    }

    /// Goes on with a layer that was put on top.
    pub(crate) fn follow(&self, layer: &Rc<FileCore>, name: &str) {
        let old = self.head();
        old.opens.set(old.opens.get() - 1);
        layer.opens.set(layer.opens.get() + 1);
        if self.access == Access::Write {
            old.writers.set(old.writers.get() - 1);
            layer.writers.set(layer.writers.get() + 1);
        }
        let chain: Chain = std::iter::once(Rc::clone(layer))
            .chain(self.chain.borrow().iter().map(Rc::clone))
            .collect();
        self.chain.replace(chain);
        self.name.replace(name.into());
        // What was the head answers as an ancestor now.
        self.layers.borrow_mut().clear();
        self.moves_seen.set(moves_below(&self.chain.borrow()));
        // Whatever else changes the chains is seen by the comparison with what was seen before.
        self.chain_seen.set(self.chain_seen.get().wrapping_sub(1));
    }

    #[cold]
    pub(super) fn error(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        cause: impl Into<IoCause>,
    ) -> IoError {
        IoError::new(&self.name.borrow(), operation, offset, length, cause)
    }

    #[cold]
    pub(super) fn io(&self, error: FsError, operation: Operation, offset: u64, length: u64) -> IoError {
        error.into_io(&self.name.borrow(), operation, offset, length)
    }

    pub(super) fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let size = self.size();
        let block = self.logical_block();
        let cause = if !offset.is_multiple_of(block.into()) || !length.is_multiple_of(block.into()) {
            IoCause::Misaligned { block }
        } else if offset.checked_add(length).is_none_or(|end| end > size) {
            IoCause::OutOfRange { size }
        } else if operation != Operation::Read && self.access == Access::Read {
            IoCause::ReadOnly
        } else {
            return Ok(());
        };
        Err(self.error(operation, offset, length, cause))
    }

    fn logical_block(&self) -> u32 {
        512
    }

    /// What the map says of data that are written. Nothing to be done if it says nothing new.
    async fn settle_map(&self) -> Result<(), FsError> {
        let file = self.head();
        self.core.outlive(file.group.get()).await?;
        self.core.check_durable(&file)
    }

    async fn flush_all(&self) -> Result<(), FsError> {
        let file = self.head();
        self.core.flush_file(&file).await
    }
}

/// Grows when what an ancestor has gets another place.
fn moves_below(chain: &Chain) -> u64 {
    chain.iter().skip(1).map(|file| file.moves.get()).sum()
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> BlockDevice for File<V, C> {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            logical_block: self.logical_block(),
            physical_block: u32::try_from(SUB_CLUSTER).unwrap_or(4096),
            optimal_io: u32::try_from(CLUSTER).unwrap_or(0),
            discard_granularity: u32::try_from(SUB_CLUSTER).unwrap_or(4096),
            read_only: self.access == Access::Read,
        }
    }

    fn size(&self) -> u64 {
        self.head().inode.borrow().size
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = memory::length(buffers);
        self.check(Operation::Read, offset, length)?;
        let read = self.read_range(offset, length, buffers).await;
        read.map_err(|error| self.io(error, Operation::Read, offset, length))
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = memory::length(buffers);
        self.check(Operation::Write, offset, length)?;
        let written = self.write_range(offset, length, buffers, durability).await;
        written.map_err(|error| self.io(error, Operation::Write, offset, length))
    }

    async fn flush(&self) -> Result<(), IoError> {
        let flushed = self.flush_all().await;
        flushed.map_err(|error| self.io(error, Operation::Flush, 0, 0))
    }

    async fn settle(&self) -> Result<(), IoError> {
        let settled = self.settle_map().await;
        settled.map_err(|error| self.io(error, Operation::Flush, 0, 0))
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.check(Operation::Discard, offset, length)?;
        let cleared = self.discard_range(offset, length).await;
        cleared.map_err(|error| self.io(error, Operation::Discard, offset, length))
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        self.check(Operation::Read, offset, length)?;
        let found = Box::pin(self.allocation_at(offset, length)).await;
        found.map_err(|error| self.io(error, Operation::Read, offset, length))
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.check(Operation::WriteZeroes, offset, length)?;
        let cleared = self.zero_range(offset, length, mode).await;
        cleared.map_err(|error| self.io(error, Operation::WriteZeroes, offset, length))
    }
}
