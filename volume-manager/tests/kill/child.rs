//! The process that is killed: writes until then, and says what was acknowledged.
//!
//! Reports are lines on the standard output: `begin`, `open`, `durable N` (write N, which was to be durable by itself, was
//! acknowledged), `flushed N A B …` (a flush was acknowledged that began when all writes below index N but A, B … had ended).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Clock, Durability, Worker, WorkerClock, WorkerOptions, spawn_local,
};
use volume_manager::model::{DeviceId, JobKind, Layout};

use crate::blocks::{SECTOR, Write, fill, mix};
use crate::files::{self, FilePool};

/// The environment variable that makes a process a child.
pub(crate) const ORDER: &str = "SMSVMM_KILL_CHILD";
/// Requests in flight.
const TASKS: u64 = 8;
/// One in so many requests is a flush.
const FLUSHES: u64 = 12;

/// What goes on besides the writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Nothing,
    Relayout(Layout),
    Evacuate(u32),
}

impl Work {
    pub(crate) fn draw(number: u64) -> Self {
        match number % 8 {
            0 => Self::Relayout(Layout::Mirror { legs: 2 }),
            1 => Self::Relayout(Layout::StripeMirror { columns: 2, legs: 2 }),
            2 => Self::Relayout(Layout::Raid5 { columns: 4 }),
            3 => Self::Relayout(Layout::Raid6 { columns: 4 }),
            4 | 5 => Self::Evacuate((number / 8 % files::FILES as u64) as u32),
            _ => Self::Nothing,
        }
    }
}

/// What a child is to do.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) seed: u64,
    pub(crate) generation: u32,
    /// Sectors of the largest write.
    pub(crate) largest: u64,
    /// From which [`Work`] is drawn.
    pub(crate) work: u64,
    pub(crate) directory: PathBuf,
}

impl Order {
    pub(crate) fn encode(&self) -> String {
        let directory = self.directory.display();
        format!(
            "{} {} {} {} {directory}",
            self.seed, self.generation, self.largest, self.work
        )
    }

    fn decode(text: &str) -> Self {
        let mut fields = text.splitn(5, ' ');
        let mut next = || fields.next().unwrap();
        Self {
            seed: next().parse().unwrap(),
            generation: next().parse().unwrap(),
            largest: next().parse().unwrap(),
            work: next().parse().unwrap(),
            directory: next().into(),
        }
    }
}

/// One line: a pipe takes it whole or not at all.
fn report(line: &str) {
    std::io::stdout()
        .write_all(format!("{line}\n").as_bytes())
        .unwrap();
}

pub(crate) fn run(order: &str) {
    let order = Order::decode(order);
    // The test harness has begun a line.
    report("");
    report("begin");
    let worker = Worker::start("child", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let incarnation = mix(order.seed, order.generation.into());
        let pool = files::open(&order.directory, incarnation, None).await;
        report("open");
        begin_work(&pool, Work::draw(order.work)).await;
        let guest = Rc::new(Guest {
            order,
            pool,
            next: Cell::new(0),
            begun: RefCell::default(),
        });
        for task in 0..TASKS {
            let guest = Rc::clone(&guest);
            assert!(spawn_local(async move { guest.work(task).await }).is_ok());
        }
        // Somebody kills this.
        WorkerClock::new().sleep(Duration::from_secs(60)).await;
    });
}

/// Starts a job, unless one of an earlier child goes on.
async fn begin_work(pool: &FilePool, work: Work) {
    if pool.jobs().iter().any(|job| job.is_live()) {
        return;
    }
    let kind = match work {
        Work::Nothing => return,
        Work::Relayout(layout) => JobKind::Relayout {
            volume: pool.configuration().volumes[0].id,
            target: files::attributes(layout),
        },
        Work::Evacuate(device) => JobKind::Evacuate {
            device: DeviceId(device),
            to: None,
            remove: false,
        },
    };
    // Not so fast that no kill meets it.
    pool.start(kind, 32 << 20).await.unwrap();
}

struct Guest {
    order: Order,
    pool: FilePool,
    /// Index of the next write.
    next: Cell<u32>,
    /// Writes that have not ended, by index.
    begun: RefCell<BTreeMap<u32, Write>>,
}

impl Guest {
    async fn work(&self, task: u64) {
        let volume = self.pool.volume("v").unwrap();
        let draw = self.order.seed ^ u64::from(self.order.generation) << 32 ^ task;
        for turn in 0.. {
            if mix(draw, turn).is_multiple_of(FLUSHES) {
                let mut line = format!("flushed {}", self.next.get());
                for index in self.begun.borrow().keys() {
                    write!(line, " {index}").unwrap();
                }
                volume.flush().await.unwrap();
                report(&line);
            } else {
                self.write(&volume).await;
            }
        }
    }

    async fn write(&self, volume: &impl BlockDevice) {
        let index = self.next.get();
        self.next.set(index + 1);
        let order = &self.order;
        let write = Write::new(order.seed, order.generation, index, order.largest);
        self.begun.borrow_mut().insert(index, write);
        // In order of their numbers where they overlap: otherwise nobody could say what has to be there.
        let earlier = || {
            self.begun
                .borrow()
                .range(..index)
                .any(|(_, other)| other.overlaps(&write))
        };
        while earlier() {
            WorkerClock::new().sleep(Duration::from_micros(100)).await;
        }
        let mut buffer = AlignedBuffer::new(write.count as usize * SECTOR);
        for (sector, place) in buffer.as_mut_slice().chunks_mut(SECTOR).zip(write.start..) {
            fill(sector, order.seed, write.number, place);
        }
        // SAFETY: the buffer outlives the write, which is awaited.
        let memory = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
        let durability = if write.durable {
            Durability::Durable
        } else {
            Durability::Volatile
        };
        volume
            .write(write.start * SECTOR as u64, &memory, durability)
            .await
            .unwrap();
        self.begun.borrow_mut().remove(&index);
        if write.durable {
            report(&format!("durable {index}"));
        }
    }
}
