//! The NBD client against servers from Debian, and against one that means no good.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod fake;
mod hostile;
mod kinds;
mod outage;
mod real;
mod servers;

use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Durability, EngineKind, IoError, Worker, WorkerOptions};

fn workers() -> [Worker; 2] {
    [EngineKind::Uring, EngineKind::Threads].map(|engine| {
        let options = WorkerOptions {
            engine: Some(engine),
            ..Default::default()
        };
        Worker::start("test", options).unwrap()
    })
}

fn worker() -> Worker {
    Worker::start("test", WorkerOptions::default()).unwrap()
}

async fn write(
    device: &impl BlockDevice,
    offset: u64,
    bytes: &[u8],
    durability: Durability,
) -> Result<(), IoError> {
    let mut buffer = AlignedBuffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    // Two pieces, so that lists are used.
    let half = bytes.len() / 2;
    // SAFETY: the buffer lives until the write has ended.
    let pieces = unsafe { [buffer.io(0, half), buffer.io(half, usize::MAX)] };
    device.write(offset, &pieces, durability).await
}

async fn read(device: &impl BlockDevice, offset: u64, length: usize) -> Result<Vec<u8>, IoError> {
    let buffer = AlignedBuffer::new(length);
    let third = length / 3;
    // SAFETY: the buffer lives until the read has ended.
    let pieces = unsafe { [buffer.io(0, third), buffer.io(third, usize::MAX)] };
    device.read(offset, &pieces).await?;
    Ok(buffer.as_slice().to_vec())
}

/// Runs `count` tasks made by `make` at the same time, and waits for all.
async fn together<F: Future<Output = ()> + 'static>(count: u64, make: impl Fn(u64) -> F) {
    let left = Rc::new(std::cell::Cell::new(count));
    for number in 0..count {
        let (task, left) = (make(number), Rc::clone(&left));
        let counted = async move {
            task.await;
            left.set(left.get() - 1);
        };
        assert!(block_io::spawn_local(counted).is_ok());
    }
    std::future::poll_fn(|context| {
        if left.get() == 0 {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
