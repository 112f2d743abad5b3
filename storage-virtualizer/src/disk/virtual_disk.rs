//! A disk that is open.
//!
//! On the way of a request there is nothing but the file's own code: no look-up, no allocation, no future of its own. When a snapshot is
//! made, the file goes on with the new layer by itself.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use block_io::{Allocation, BlockDevice, Clock, Durability, Geometry, IoBuf, IoError, ZeroMode};
use filesys::File;

use super::disks::{Disks, Entry};
use super::error::DiskError;
use super::name::DiskPath;
use super::{DiskMode, DiskOptions};

/// An open disk, or an open snapshot of one.
///
/// Dropped without [`Disks::close`], it is as if the power had failed: nothing that was flushed is lost, and what the
/// disk's mode wants done is done when it is opened next.
pub struct VirtualDisk<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    pub(super) file: Rc<File<V, C>>,
    pub(super) entry: Rc<Entry<V, C>>,
    pub(super) path: DiskPath,
    pub(super) snapshot: Option<String>,
    pub(super) options: DiskOptions,
    pub(super) identity: Option<[u8; 16]>,
    pub(super) reservations: Vec<u8>,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> VirtualDisk<V, C> {
    /// As [`Disks::open`].
    ///
    /// # Errors
    /// As there.
    pub async fn open(disks: &Disks<V, C>, path: &str, options: DiskOptions) -> Result<Self, DiskError> {
        disks.open(path, options).await
    }

    /// The disk's path.
    pub fn path(&self) -> &DiskPath {
        &self.path
    }

    /// Which snapshot it is; none if it is the disk itself.
    pub fn snapshot(&self) -> Option<&str> {
        self.snapshot.as_deref()
    }

    /// What initiators know the disk by; of a snapshot, the disk of which it is one. None if it was never given, as it was not opened
    /// for writing since there are such identifiers.
    pub fn identity(&self) -> Option<[u8; 16]> {
        self.identity
    }

    /// The persistent reservations that were kept when the disk was opened; of a snapshot none.
    pub fn reservations(&self) -> &[u8] {
        &self.reservations
    }

    /// What becomes of what is written.
    pub fn mode(&self) -> DiskMode {
        self.options.mode
    }

    /// Whether nothing can be written.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Says whether the user of this disk can deal with a full volume: then it gets no new space below five per cent free.
    pub fn set_careful(&self, careful: bool) {
        self.file.set_careful(careful);
    }

    /// `tell` is called with the new size whenever that changes, until the disk is closed. It must not wait.
    pub fn on_resize(&self, tell: impl Fn(u64) + 'static) {
        self.entry.resized.borrow_mut().push(Rc::new(tell));
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> fmt::Debug for VirtualDisk<V, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("VirtualDisk")
            .field("path", &self.path)
            .field("snapshot", &self.snapshot)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Drop for VirtualDisk<V, C> {
    fn drop(&mut self) {
        self.entry.left(self.snapshot.as_deref(), self.options.read_only);
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> BlockDevice for VirtualDisk<V, C> {
    fn geometry(&self) -> Geometry {
        self.file.geometry()
    }

    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read(&self, offset: u64, buffers: &[IoBuf]) -> impl Future<Output = Result<(), IoError>> {
        self.file.read(offset, buffers)
    }

    fn write(
        &self,
        offset: u64,
        buffers: &[IoBuf],
        durability: Durability,
    ) -> impl Future<Output = Result<(), IoError>> {
        self.file.write(offset, buffers, durability)
    }

    fn flush(&self) -> impl Future<Output = Result<(), IoError>> {
        self.file.flush()
    }

    fn settle(&self) -> impl Future<Output = Result<(), IoError>> {
        self.file.settle()
    }

    fn allocation(
        &self,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(Allocation, u64), IoError>> {
        self.file.allocation(offset, length)
    }

    fn discard(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), IoError>> {
        self.file.discard(offset, length)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> impl Future<Output = Result<(), IoError>> {
        self.file.write_zeroes(offset, length, mode)
    }
}

/// Who wants to know of a new size.
pub(super) type Hooks = RefCell<Vec<Rc<dyn Fn(u64)>>>;
