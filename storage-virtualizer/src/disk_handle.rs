//! Disks as those see them that do not run on the disk's worker.
//!
//! A disk of a pool belongs to one worker: its file, volumes and devices are counted without atomics and cannot leave the
//! thread. But a device's registers are read on vCPU threads, and a queue is handed over by a thread of the transport.
//! These hold a [`DiskHandle`]; the server of a queue turns it into the disk itself when it has arrived at its worker.
//!
//! ```text
//!   any thread:   DiskHandle ── geometry()                Arc<D>         a disk for all threads: hands out itself
//!                     │                                   PinnedDisk<D>  a disk of one worker: hands out an Rc<D> there
//!   the worker:   local() ─► Local: Deref<Target = Disk>
//! ```

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, Geometry, WorkerHandle};

/// A disk was asked for where it cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskHandleError {
    /// The disk lives on another thread.
    #[error("the disk belongs to another worker: serve all its queues on the worker that opened it")]
    OtherWorker,
}

/// A disk as those see it that do not run on its worker.
pub trait DiskHandle: Clone + Send + Sync + 'static {
    /// The disk.
    type Disk: BlockDevice + 'static;
    /// What one queue's server holds of it, on the worker.
    type Local: Deref<Target = Self::Disk> + 'static;

    /// Size, block sizes, abilities, on any thread. Changes when the disk is resized.
    fn geometry(&self) -> Geometry;

    /// A number that is another one when something may be missing that the disk's servers have answered ([`filesys::FileSystem::continuity`]). 0:
    /// nothing can be missing but after a power cut.
    fn continuity(&self) -> u64 {
        0
    }

    /// The disk itself; called once for each server of a queue, on the worker that serves it.
    ///
    /// # Errors
    /// The disk cannot be used on this thread.
    fn local(&self) -> Result<Self::Local, DiskHandleError>;
}

impl<D: BlockDevice + Send + Sync + 'static> DiskHandle for Arc<D> {
    type Disk = D;
    type Local = Self;

    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }

    fn local(&self) -> Result<Self, DiskHandleError> {
        Ok(Self::clone(self))
    }
}

thread_local! {
    /// The pinned disks of this thread by their number. What is left when the thread ends goes with it.
    static DISKS: RefCell<HashMap<u64, Rc<dyn Any>>> = RefCell::default();
}

/// A handle on a disk that lives on one worker. The disk stays until the last clone is dropped, on whatever thread, and the
/// last queue has been stopped; it is let go of on its worker.
pub struct PinnedDisk<D>(Arc<Pinned<D>>);

struct Pinned<D> {
    number: u64,
    worker: WorkerHandle,
    geometry: Mutex<Geometry>,
    continuity: u64,
    /// Says the type; the disk itself never leaves its thread.
    disk: std::marker::PhantomData<fn() -> D>,
}

impl<D: BlockDevice + 'static> PinnedDisk<D> {
    /// A handle on `disk`, made by a task of `worker`.
    ///
    /// # Errors
    /// This thread is not that of `worker`.
    pub fn new(disk: Rc<D>, worker: &WorkerHandle) -> Result<Self, DiskHandleError> {
        Self::with_continuity(disk, worker, 0)
    }

    /// The same, for a disk whose servers are killed without harm as long as this [number](DiskHandle::continuity) stays.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_continuity(
        disk: Rc<D>,
        worker: &WorkerHandle,
        continuity: u64,
    ) -> Result<Self, DiskHandleError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if !worker.is_current() {
            return Err(DiskHandleError::OtherWorker);
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let geometry = Mutex::new(disk.geometry());
        DISKS.with_borrow_mut(|disks| disks.insert(number, disk));
        Ok(Self(Arc::new(Pinned {
            number,
            worker: worker.clone(),
            geometry,
            continuity,
            disk: std::marker::PhantomData,
        })))
    }

    /// Takes over the disk's geometry after it was resized; on the disk's worker. Whoever shows the disk to a guest is told
    /// after this, for example by `VirtioBlkHandle::size_changed`.
    ///
    /// # Errors
    /// This is not the disk's worker.
    pub fn refresh(&self) -> Result<(), DiskHandleError> {
        let geometry = self.local()?.geometry();
        *self.0.geometry.lock().unwrap_or_else(PoisonError::into_inner) = geometry;
        Ok(())
    }

    /// The worker on which the disk lives: the one that must serve its queues.
    pub fn worker(&self) -> &WorkerHandle {
        &self.0.worker
    }
}

impl<D: BlockDevice + 'static> DiskHandle for PinnedDisk<D> {
    type Disk = D;
    type Local = Rc<D>;

    fn geometry(&self) -> Geometry {
        *self.0.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn continuity(&self) -> u64 {
        self.0.continuity
    }

    fn local(&self) -> Result<Rc<D>, DiskHandleError> {
        DISKS
            .with_borrow(|disks| disks.get(&self.0.number).cloned())
            .and_then(|disk| disk.downcast().ok())
            .ok_or(DiskHandleError::OtherWorker)
    }
}

impl<D> Clone for PinnedDisk<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D> fmt::Debug for PinnedDisk<D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("PinnedDisk")
            .field("number", &self.0.number)
            .field("worker", &self.0.worker)
            .finish_non_exhaustive()
    }
}

impl<D> Drop for Pinned<D> {
    fn drop(&mut self) {
        let number = self.number;
        // If the worker has ended, so have its disks.
        self.worker.spawn(move || async move {
            // The disk is dropped after the table was unlocked: its own end may drop other handles.
            let disk = DISKS.with_borrow_mut(|disks| disks.remove(&number));
            drop(disk);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use block_io::{Durability, IoBuf, IoError, Worker, WorkerOptions, ZeroMode};

    use super::*;

    /// Says on which thread it ended.
    struct Disk {
        size: std::cell::Cell<u64>,
        ended: mpsc::Sender<std::thread::ThreadId>,
    }

    impl Drop for Disk {
        fn drop(&mut self) {
            self.ended.send(std::thread::current().id()).ok();
        }
    }

    impl BlockDevice for Disk {
        fn geometry(&self) -> Geometry {
            Geometry {
                size: self.size.get(),
                logical_block: 512,
                physical_block: 4096,
                optimal_io: 0,
                discard_granularity: 0,
                read_only: false,
            }
        }

        async fn read(&self, _: u64, _: &[IoBuf]) -> Result<(), IoError> {
            Ok(())
        }

        async fn write(&self, _: u64, _: &[IoBuf], _: Durability) -> Result<(), IoError> {
            Ok(())
        }

        async fn flush(&self) -> Result<(), IoError> {
            Ok(())
        }

        async fn discard(&self, _: u64, _: u64) -> Result<(), IoError> {
            Ok(())
        }

        async fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode) -> Result<(), IoError> {
            Ok(())
        }
    }

    fn pin(worker: &Worker) -> (PinnedDisk<Disk>, mpsc::Receiver<std::thread::ThreadId>) {
        let (ended, end) = mpsc::channel();
        let handle = worker.handle().clone();
        let disk = worker.run(move || async move {
            let size = std::cell::Cell::new(4096);
            PinnedDisk::new(Rc::new(Disk { size, ended }), &handle).unwrap()
        });
        (disk, end)
    }

    #[test]
    fn a_pinned_disk_is_had_on_its_worker_only_and_ends_there() {
        let worker = Worker::start("own", WorkerOptions::default()).unwrap();
        let other = Worker::start("other", WorkerOptions::default()).unwrap();
        let (disk, end) = pin(&worker);
        let own_thread = worker.run(|| async { std::thread::current().id() });
        assert_eq!(disk.local().err(), Some(DiskHandleError::OtherWorker));
        let there = disk.clone();
        assert!(other.run(move || async move { there.local().is_err() }));
        let there = disk.clone();
        worker.run(move || async move { there.local().unwrap().size.set(8192) });
        assert_eq!(disk.geometry().size, 4096);
        let there = disk.clone();
        worker.run(move || async move { there.refresh().unwrap() });
        assert_eq!(disk.geometry().size, 8192);
        assert!(end.recv_timeout(Duration::from_millis(20)).is_err());
        drop(disk);
        assert_eq!(end.recv_timeout(Duration::from_secs(10)).unwrap(), own_thread);
    }

    #[test]
    fn a_disk_cannot_be_pinned_to_a_worker_that_is_not_its_own() {
        let worker = Worker::start("own", WorkerOptions::default()).unwrap();
        let other = Worker::start("other", WorkerOptions::default()).unwrap();
        let (ended, _end) = mpsc::channel();
        let handle = other.handle().clone();
        let refused = worker.run(move || async move {
            let size = std::cell::Cell::new(4096);
            PinnedDisk::new(Rc::new(Disk { size, ended }), &handle).err()
        });
        assert_eq!(refused, Some(DiskHandleError::OtherWorker));
    }

    #[test]
    fn a_disk_ends_with_its_worker_even_while_a_handle_is_left() {
        let worker = Worker::start("own", WorkerOptions::default()).unwrap();
        let (disk, end) = pin(&worker);
        drop(worker);
        end.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(disk);
    }
}
