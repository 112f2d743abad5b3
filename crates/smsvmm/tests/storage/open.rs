//! A pool that this process has open, as a virtual machine has it, to write to its volumes.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Device, DeviceOptions, Durability, IoError, Worker, WorkerClock,
    WorkerOptions,
};
use volume_manager::logs::hot::Limits;
use volume_manager::model::Uuid;
use volume_manager::store::Force;
use volume_manager::{OpenOptions, Pool, Volume};

pub(crate) type OpenPool = Pool<Device, WorkerClock>;
pub(crate) type OpenVolume = Volume<Device, WorkerClock>;

/// Opens the pool on `devices`, lets `use_it` have it, closes it.
pub(crate) fn with_pool<T, F>(devices: &[String], use_it: impl FnOnce(OpenPool) -> F + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
{
    let devices = devices.to_vec();
    let worker = Worker::start("test", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let options = DeviceOptions {
            patience: Duration::from_secs(1),
            silence: Duration::from_secs(1),
            ..DeviceOptions::default()
        };
        let opened = devices.into_iter().map(|name| {
            let device = Device::open(&name, &options).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, Rc::new(device))
        });
        let options = OpenOptions {
            incarnation: Uuid(rand()),
            pool: None,
            force: Force::No,
            limits: Limits::default(),
            jobs_wait: false,
        };
        let pool = OpenPool::open(opened.collect(), &options, WorkerClock::new()).await;
        let pool = pool.unwrap_or_else(|error| panic!("the pool does not open: {error}"));
        let result = use_it(pool.clone()).await;
        pool.close().await.unwrap();
        result
    })
}

fn rand() -> u128 {
    let bytes = std::fs::read("/proc/sys/kernel/random/uuid").unwrap();
    let text = String::from_utf8(bytes).unwrap().trim().replace('-', "");
    u128::from_str_radix(&text, 16).unwrap()
}

/// What stands in block `index` after it was written in `round`.
fn fill(index: u64, round: u8) -> u8 {
    (index % 199) as u8 ^ round
}

const BLOCK: u64 = 1 << 20;

/// Writes the blocks of 1 MiB from `from` to `to`.
pub(crate) async fn write(volume: &OpenVolume, from: u64, to: u64, round: u8) -> Result<(), IoError> {
    for index in from..to {
        let mut buffer = AlignedBuffer::new(BLOCK as usize);
        buffer.as_mut_slice().fill(fill(index, round));
        // SAFETY: the buffer outlives the write and is used by nobody else.
        let piece = [unsafe { buffer.io(0, BLOCK as usize) }];
        volume.write(index * BLOCK, &piece, Durability::Volatile).await?;
    }
    volume.flush().await
}

/// Reads them, and sees that they are what was written.
pub(crate) async fn check(volume: &OpenVolume, from: u64, to: u64, round: u8) {
    for index in from..to {
        let buffer = AlignedBuffer::new(BLOCK as usize);
        // SAFETY: the buffer outlives the read and is used by nobody else.
        let piece = [unsafe { buffer.io(0, BLOCK as usize) }];
        volume.read(index * BLOCK, &piece).await.unwrap();
        let expected = fill(index, round);
        assert!(
            buffer.as_slice().iter().all(|byte| *byte == expected),
            "block {index} of round {round}"
        );
    }
}
