//! A disk in memory that waits when it is told to.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use block_io::{BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode, list};

/// What a disk is told.
#[derive(Debug, Default)]
pub(crate) struct Script(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    held: bool,
    waiting: Vec<Waker>,
    /// Requests that are at the disk.
    inside: usize,
}

impl Script {
    /// Has all requests wait, or lets them go.
    pub(crate) fn hold(&self, held: bool) {
        let mut state = self.0.lock().unwrap();
        state.held = held;
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Waits until so many requests are at the disk.
    pub(crate) fn wait_for(&self, count: usize) {
        while self.0.lock().unwrap().inside != count {
            std::thread::yield_now();
        }
    }

    async fn admit(&self) {
        self.0.lock().unwrap().inside += 1;
        poll_fn(|context| {
            let mut state = self.0.lock().unwrap();
            if state.held {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            state.inside -= 1;
            Poll::Ready(())
        })
        .await;
    }
}

pub(crate) struct Disk {
    script: Arc<Script>,
    bytes: Mutex<Vec<u8>>,
}

impl Disk {
    pub(crate) fn new(size: u64, script: &Arc<Script>) -> Self {
        Self {
            script: Arc::clone(script),
            bytes: Mutex::new(vec![0; usize::try_from(size).unwrap()]),
        }
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.bytes.lock().unwrap().len() as u64,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.script.admit().await;
        let bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let length = usize::try_from(list::total_length(buffers)).unwrap();
        list::scatter(buffers, 0, &bytes[start..start + length]);
        Ok(())
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], _: Durability) -> Result<(), IoError> {
        self.script.admit().await;
        let mut bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let length = usize::try_from(list::total_length(buffers)).unwrap();
        list::gather(buffers, 0, &mut bytes[start..start + length]);
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64) -> Result<(), IoError> {
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, _: ZeroMode) -> Result<(), IoError> {
        let start = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[start..start + usize::try_from(length).unwrap()].fill(0);
        Ok(())
    }
}
