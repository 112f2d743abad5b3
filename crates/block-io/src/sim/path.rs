//! A way to a disk that can be cut while the disk itself goes on: what [`MultiPath`](crate::MultiPath) is for.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use super::disk::SimDisk;
use super::executor::SimClock;
use crate::buffer::list;
use crate::{BlockDevice, Clock, Durability, Geometry, IoBuf, IoError, Operation, ZeroMode};

/// A path to a [`SimDisk`]; several may lead to one disk. Copies are the same path.
///
/// While it is cut, requests fail with ENODEV. Those that are in flight at that moment are executed, but their answers are
/// lost: they fail with ENOLINK.
///
/// A path may have a cache of its own, as a server with its own memory has: volatile writes stay there until a flush, and
/// are gone when the path is cut; the next request then fails with ENOLINK, even if the path was put together before.
#[derive(Debug, Clone)]
pub struct SimPath {
    disk: SimDisk,
    clock: SimClock,
    line: Rc<Line>,
}

#[derive(Debug, Default)]
struct Line {
    is_cut: Cell<bool>,
    /// How often it was cut.
    cuts: Cell<u64>,
    cache: Option<RefCell<Cache>>,
    flushing: Cell<bool>,
    /// Something was in the cache when it was cut: a request must fail, so that this is known.
    owes_failure: Cell<bool>,
}

#[derive(Debug, Default)]
struct Cache {
    next: u64,
    writes: Vec<(u64, u64, Vec<u8>)>,
}

impl SimPath {
    /// A path without a cache.
    pub fn new(disk: SimDisk, clock: SimClock) -> Self {
        Self {
            disk,
            clock,
            line: Rc::default(),
        }
    }

    /// A path with a cache.
    pub fn with_cache(disk: SimDisk, clock: SimClock) -> Self {
        let line = Line {
            cache: Some(RefCell::default()),
            ..Line::default()
        };
        Self {
            disk,
            clock,
            line: Rc::new(line),
        }
    }

    /// Cuts it. Waits for a flush of its cache that is under way: no cache goes on writing when nobody can reach it.
    pub async fn cut(&self) {
        self.begin_flush().await;
        self.line.flushing.set(false);
        self.line.is_cut.set(true);
        self.line.cuts.set(self.line.cuts.get() + 1);
        if let Some(cache) = &self.line.cache {
            let lost = std::mem::take(&mut cache.borrow_mut().writes);
            self.line
                .owes_failure
                .set(!lost.is_empty() || self.line.owes_failure.get());
        }
    }

    /// Puts it together again.
    pub fn restore(&self) {
        self.line.is_cut.set(false);
    }

    async fn begin_flush(&self) {
        while self.line.flushing.replace(true) {
            self.clock.sleep(Duration::from_micros(10)).await;
        }
    }

    fn error(&self, operation: Operation, range: &Range<u64>, errno: i32) -> IoError {
        let cause = io::Error::from_raw_os_error(errno);
        let name = "path".into();
        IoError::new(&name, operation, range.start, range.end - range.start, cause)
    }

    /// What `request` gives over this line.
    async fn over<T>(
        &self,
        operation: Operation,
        range: Range<u64>,
        request: impl Future<Output = Result<T, IoError>>,
    ) -> Result<T, IoError> {
        if self.line.is_cut.get() {
            return Err(self.error(operation, &range, libc::ENODEV));
        }
        if self.line.owes_failure.take() {
            return Err(self.error(operation, &range, libc::ENOLINK));
        }
        let cuts = self.line.cuts.get();
        let answer = request.await;
        if self.line.cuts.get() == cuts {
            answer
        } else {
            Err(self.error(operation, &range, libc::ENOLINK))
        }
    }

    /// Puts a write into the cache, after the time that a request takes.
    async fn keep(&self, cache: &RefCell<Cache>, offset: u64, bytes: Vec<u8>) -> Result<(), IoError> {
        let cuts = self.line.cuts.get();
        self.disk.read_bytes(0, 512).await?;
        if self.line.cuts.get() == cuts {
            let mut cache = cache.borrow_mut();
            let number = cache.next;
            cache.next += 1;
            cache.writes.push((number, offset, bytes));
        }
        Ok(())
    }

    /// Writes the cache to the disk.
    async fn flush_cache(&self) -> Result<(), IoError> {
        let Some(cache) = &self.line.cache else {
            return self.disk.flush().await;
        };
        self.begin_flush().await;
        let writes = cache.borrow().writes.clone();
        let mut done = Ok(());
        for (_, offset, bytes) in &writes {
            done = self.disk.write_bytes(*offset, bytes, Durability::Volatile).await;
            if done.is_err() {
                break;
            }
        }
        let done = match done {
            Ok(()) => self.disk.flush().await,
            failed => failed,
        };
        if done.is_ok()
            && let Some((last, ..)) = writes.last()
        {
            cache.borrow_mut().writes.retain(|(number, ..)| number > last);
        }
        self.line.flushing.set(false);
        done
    }
}

impl BlockDevice for SimPath {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let end = offset + list::total_length(buffers);
        let request = async {
            self.disk.read(offset, buffers).await?;
            if let Some(cache) = &self.line.cache {
                for (_, start, bytes) in &cache.borrow().writes {
                    let from = offset.max(*start);
                    let to = end.min(start + bytes.len() as u64);
                    if from < to {
                        let part = |at: u64| usize::try_from(at - start).unwrap_or(0);
                        list::scatter(buffers, from - offset, &bytes[part(from)..part(to)]);
                    }
                }
            }
            Ok(())
        };
        self.over(Operation::Read, offset..end, request).await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        let request = async {
            let Some(cache) = &self.line.cache else {
                return self.disk.write(offset, buffers, durability).await;
            };
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            list::gather(buffers, 0, &mut bytes);
            self.keep(cache, offset, bytes).await?;
            match durability {
                Durability::Volatile => Ok(()),
                Durability::Durable => self.flush_cache().await,
            }
        };
        self.over(Operation::Write, offset..offset + length, request)
            .await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.over(Operation::Flush, 0..0, self.flush_cache()).await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        let request = self.disk.discard(offset, length);
        self.over(Operation::Discard, offset..offset + length, request)
            .await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        let request = async {
            match &self.line.cache {
                Some(cache) => {
                    self.keep(cache, offset, vec![0; usize::try_from(length).unwrap_or(0)])
                        .await
                }
                None => self.disk.write_zeroes(offset, length, mode).await,
            }
        };
        self.over(Operation::WriteZeroes, offset..offset + length, request)
            .await
    }
}
