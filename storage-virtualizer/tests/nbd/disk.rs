//! A disk in memory that fails, and waits, as it is told to.

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use block_io::{BlockDevice, Durability, Geometry, IoBuf, IoError, Operation, ZeroMode};
use storage_virtualizer::nbd::{Export, Extent, Extents};

pub(crate) const SIZE: u64 = 8 << 20;

/// What the test may change while the server runs.
#[derive(Default)]
pub(crate) struct Script {
    /// Operation and error number: such requests fail.
    pub(crate) errors: Vec<(Operation, i32)>,
    /// Reads from this offset wait.
    pub(crate) held: Option<u64>,
    pub(crate) wakers: Vec<Waker>,
    pub(crate) flushes: u32,
    pub(crate) durable: u32,
    pub(crate) settled: u32,
    pub(crate) reads: u32,
}

pub(crate) type Shared = Arc<Mutex<Script>>;

/// Lets requests go on that wait.
pub(crate) fn release(script: &Shared) {
    let mut script = script.lock().unwrap();
    script.held = None;
    script.wakers.drain(..).for_each(Waker::wake);
}

pub(crate) struct Disk {
    name: Arc<str>,
    bytes: Mutex<Vec<u8>>,
    script: Shared,
}

impl Disk {
    pub(crate) fn new(script: &Shared) -> Self {
        Self {
            name: "test disk".into(),
            bytes: Mutex::new(vec![0; SIZE as usize]),
            script: Arc::clone(script),
        }
    }

    fn may(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        let script = self.script.lock().unwrap();
        match script.errors.iter().find(|error| error.0 == operation) {
            Some((_, number)) => {
                let cause = io::Error::from_raw_os_error(*number);
                Err(IoError::new(&self.name, operation, offset, length, cause))
            }
            None => Ok(()),
        }
    }
}

fn total(buffers: &[IoBuf]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: SIZE,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.script.lock().unwrap().reads += 1;
        poll_fn(|context| {
            let mut script = self.script.lock().unwrap();
            if script.held == Some(offset) {
                script.wakers.push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        self.may(Operation::Read, offset, total(buffers))?;
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from_slice(&bytes[at..]);
            at += buffer.len();
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        self.may(Operation::Write, offset, total(buffers))?;
        if durability == Durability::Durable {
            self.script.lock().unwrap().durable += 1;
        }
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_to_slice(&mut bytes[at..]);
            at += buffer.len();
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.may(Operation::Flush, 0, 0)?;
        self.script.lock().unwrap().flushes += 1;
        Ok(())
    }

    async fn settle(&self) -> Result<(), IoError> {
        self.script.lock().unwrap().settled += 1;
        Ok(())
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.may(Operation::Discard, offset, length)
    }

    async fn write_zeroes(&self, offset: u64, length: u64, _: ZeroMode) -> Result<(), IoError> {
        self.may(Operation::WriteZeroes, offset, length)?;
        let end = (offset + length) as usize;
        self.bytes.lock().unwrap()[offset as usize..end].fill(0);
        Ok(())
    }
}

/// Its export, called `disk`: one MiB in two is a hole, and one in four has changed since `monday`.
pub(crate) struct Scripted(pub(crate) Disk);

const STEP: u64 = 1 << 20;

fn each(offset: u64, length: u64, mut put: impl FnMut(u64, u64)) {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let step = (at / STEP + 1) * STEP - at;
        put(at / STEP, step.min(end - at));
        at += step;
    }
}

impl Export for Scripted {
    type Disk = Disk;

    fn name(&self) -> &str {
        "disk"
    }

    fn disk(&self) -> &Disk {
        &self.0
    }

    fn zeroes_fast(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<String> {
        vec!["monday".to_owned()]
    }

    async fn allocation(&self, offset: u64, length: u64, extents: &mut Extents) -> Result<(), IoError> {
        each(offset, length, |number, length| {
            extents.add(
                length,
                if number % 2 == 0 {
                    Extent::Data
                } else {
                    Extent::Hole
                },
            );
        });
        Ok(())
    }

    async fn changed(
        &self,
        snapshot: usize,
        offset: u64,
        length: u64,
        extents: &mut Extents,
    ) -> Result<(), IoError> {
        assert_eq!(snapshot, 0);
        each(offset, length, |number, length| {
            extents.add_changed(length, number % 4 == 0)
        });
        Ok(())
    }
}
