//! The process that is killed: uses the file system until then, and says what was acknowledged.
//!
//! Reports are lines on the standard output: `begin`, `open`, `durable D N` (write N to disk D, which was to be durable by itself, was
//! acknowledged), `flushed D N A B …` (a flush was acknowledged that began when all writes below index N but A, B … had ended),
//! `will CHANGE` before a change of names, `did` after it, `layers` after a layer was made or merged.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Clock, Durability, Worker, WorkerClock, WorkerOptions, spawn_local,
};
use filesys::{Access, Attributes, File, FsError, NewFile, Snapshot};
use volume_manager::Volume;

use crate::blocks::{SECTOR, Write, fill, mix};
use crate::names::{self, Change};
use crate::place::{self, DISKS, FilePool, Fs};

/// The environment variable that makes a process a child.
pub(crate) const ORDER: &str = "SMSVMM_FS_KILL_CHILD";
/// Requests in flight for each disk.
const TASKS: u64 = 4;
/// One in so many requests is a flush.
const FLUSHES: u64 = 10;
/// Layers of a disk, at most.
const LAYERS: usize = 4;
/// Sectors of the largest write.
pub(crate) const LARGEST: u64 = 512;

/// What a child is to do.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) seed: u64,
    pub(crate) generation: u32,
    pub(crate) directory: PathBuf,
}

impl Order {
    pub(crate) fn encode(&self) -> String {
        format!("{} {} {}", self.seed, self.generation, self.directory.display())
    }

    fn decode(text: &str) -> Self {
        let mut fields = text.splitn(3, ' ');
        let mut next = || fields.next().unwrap();
        Self {
            seed: next().parse().unwrap(),
            generation: next().parse().unwrap(),
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

async fn pause(microseconds: u64) {
    WorkerClock::new()
        .sleep(Duration::from_micros(microseconds))
        .await;
}

pub(crate) fn run(order: &str) {
    // A task that panics would only be missing: the parent has to see it.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |what| {
        print(what);
        std::process::abort();
    }));
    let order = Order::decode(order);
    // The test harness has begun a line.
    report("");
    report("begin");
    let worker = Worker::start("child", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let incarnation = mix(order.seed, order.generation.into());
        let (pool, fs) = place::open(&order.directory, incarnation, None).await;
        report("open");
        for number in 0..DISKS {
            let path = place::head(&fs, number).await;
            let guest = Rc::new(Guest {
                seed: order.seed ^ number << 56,
                generation: order.generation,
                number,
                file: fs.open_file(&path, Access::Write).await.unwrap(),
                fs: fs.clone(),
                next: Cell::new(0),
                begun: RefCell::default(),
            });
            for task in 0..TASKS {
                let guest = Rc::clone(&guest);
                assert!(spawn_local(async move { guest.work(task).await }).is_ok());
            }
            assert!(spawn_local(async move { guest.layers(path).await }).is_ok());
        }
        assert!(spawn_local(change_names(fs.clone(), order)).is_ok());
        // Somebody kills this.
        pause(60_000_000).await;
        drop::<(FilePool, Fs)>((pool, fs));
    });
}

async fn change_names(fs: Fs, order: Order) {
    let list = fs.list(names::DIRECTORY).await.unwrap();
    let mut names: BTreeSet<String> = list.into_iter().map(|entry| entry.name).collect();
    for turn in 0.. {
        let number = mix(order.seed ^ u64::from(order.generation) << 32, 1 << 40 | turn);
        let mut change = Change::draw(&names, number, format!("{}-{turn}", order.generation));
        match &mut change {
            // What it was made with stays in its name.
            Change::Make(name) => *name = format!("m.{name}"),
            Change::Rename(old, new) => {
                *new = format!("r{new}.{}", old.rsplit('.').next().unwrap_or_default());
            }
            Change::Delete(_) => {}
        }
        report(&format!("will {}", change.encode()));
        match &change {
            Change::Make(name) => {
                let (size, thick) = names::shape(name);
                let attributes = Attributes {
                    thick,
                    ..Attributes::default()
                };
                let new = NewFile {
                    size,
                    attributes: Some(attributes),
                    now: 1,
                };
                fs.create(&names::path(name), &new).await.unwrap();
            }
            Change::Rename(old, new) => fs.rename(&names::path(old), &names::path(new)).await.unwrap(),
            Change::Delete(name) => fs.delete(&names::path(name)).await.unwrap(),
        }
        report("did");
        change.apply(&mut names);
        pause(number % 2000).await;
    }
}

/// Who uses a virtual disk.
struct Guest {
    seed: u64,
    generation: u32,
    number: u64,
    fs: Fs,
    file: File<Volume<block_io::HostDevice, WorkerClock>, WorkerClock>,
    /// Index of the next write.
    next: Cell<u32>,
    /// Writes that have not ended, by index.
    begun: RefCell<BTreeMap<u32, Write>>,
}

impl Guest {
    async fn work(&self, task: u64) {
        let draw = self.seed ^ u64::from(self.generation) << 32 ^ task;
        for turn in 0.. {
            if mix(draw, turn).is_multiple_of(FLUSHES) {
                let mut line = format!("flushed {} {}", self.number, self.next.get());
                for index in self.begun.borrow().keys() {
                    write!(line, " {index}").unwrap();
                }
                self.file.flush().await.unwrap();
                report(&line);
            } else {
                self.write().await;
            }
        }
    }

    async fn write(&self) {
        let index = self.next.get();
        self.next.set(index + 1);
        let write = Write::new(self.seed, self.generation, index, LARGEST);
        self.begun.borrow_mut().insert(index, write);
        // In order of their numbers where they overlap: otherwise nobody could say what has to be there.
        let earlier = || {
            let begun = self.begun.borrow();
            begun.range(..index).any(|(_, other)| other.overlaps(&write))
        };
        while earlier() {
            pause(100).await;
        }
        let mut buffer = AlignedBuffer::new(write.count as usize * SECTOR);
        for (sector, place) in buffer.as_mut_slice().chunks_mut(SECTOR).zip(write.start..) {
            fill(sector, self.seed, write.number, place);
        }
        // SAFETY: the buffer outlives the write, which is awaited.
        let memory = [unsafe { buffer.io(0, buffer.as_slice().len()) }];
        let durability = if write.durable {
            Durability::Durable
        } else {
            Durability::Volatile
        };
        let offset = write.start * SECTOR as u64;
        self.file.write(offset, &memory, durability).await.unwrap();
        self.begun.borrow_mut().remove(&index);
        if write.durable {
            report(&format!("durable {} {index}", self.number));
        }
    }

    /// A merge that the last kill has interrupted goes on when somebody asks for it again.
    async fn finish_merges(&self) {
        let disk = place::disk(self.number);
        for entry in self.fs.list(&disk).await.unwrap() {
            // Refused for all but the layer whose parent is being merged, and that has no neighbour in the same state.
            let path = format!("{disk}/{}", entry.name);
            let parent = self.fs.stat(&path).await.unwrap().parent;
            let Some(parent) = parent else { continue };
            let Some(parent) = self.fs.path_of(parent).await.unwrap() else {
                continue;
            };
            if self.fs.stat(&parent).await.unwrap().absorbed {
                self.fs.absorb(&path, true).await.unwrap();
            }
        }
    }

    /// Puts layers on the disk and merges them, while it is written.
    async fn layers(&self, mut head: String) {
        for turn in 0.. {
            let number = mix(self.seed ^ u64::from(self.generation) << 32, 1 << 41 | turn);
            pause(number % 20_000).await;
            let layers = self.fs.list(&place::disk(self.number)).await.unwrap().len();
            if layers < LAYERS && !number.is_multiple_of(3) || layers == 1 {
                let layer = format!("{}/{}-{turn}", place::disk(self.number), self.generation);
                let snapshot = Snapshot {
                    path: &head,
                    layer: &layer,
                    handle: Some(&self.file),
                };
                self.fs.snapshot(&[snapshot], 1).await.unwrap();
                head = layer;
            } else {
                let named = number & 16 != 0;
                match self.fs.absorb(&head, named).await {
                    Err(FsError::Busy { .. }) => self.finish_merges().await,
                    other => other.unwrap(),
                }
                head = place::head(&self.fs, self.number).await;
            }
            report("layers");
        }
    }
}
