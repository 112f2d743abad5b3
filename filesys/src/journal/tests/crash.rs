//! Journal, superblock and data together, crashed everywhere.
//!
//! A record says which it is; its content follows from that. Before it is appended, its data, one sector, is written to a second
//! disk. A checkpoint is a superblock that says how many records it stands for. So after any crash it can be told which records
//! are there, that they are the right ones in the right order, and that none came without its data.

use block_io::sim::{
    DiskOptions, ExploreOptions, Failure, Fault, FaultRule, Numbers, Scenario, Shared, explore,
};
use block_io::{BlockDevice, Durability};

use super::*;
use crate::journal::ring::PAYLOAD;
use crate::superblock::{self, Features, LayoutOptions, Opened, Superblock, layout};

const BLOCKS: u64 = 256;

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// Appends a record of so many bytes.
    Append(usize),
    /// Waits for everything.
    Commit,
    Checkpoint,
}
use Step::{Append, Checkpoint, Commit};

#[derive(Debug)]
pub(super) struct Script {
    pub(super) steps: &'static [Step],
    pub(super) ring: u64,
    pub(super) sector: u32,
    /// The write of the metadata disk that fails.
    pub(super) fails: Option<u64>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Promise {
    /// Records in the order in which they were appended.
    pub(super) appended: Vec<Vec<u8>>,
    /// So many must be there.
    pub(super) acknowledged: usize,
}

fn record(incarnation: u64, number: usize, length: usize) -> Vec<u8> {
    let mut record = u32::try_from(length).unwrap().to_le_bytes().to_vec();
    let mut rng = block_io::sim::Rng::new(incarnation << 32 | number as u64);
    record.resize(length.max(8), 0);
    rng.fill(&mut record[4..]);
    record
}

struct FlushData(SimDisk);

impl BeforeWrite for FlushData {
    async fn prepare(&self, _: u64) -> Result<(), IoError> {
        self.0.flush().await
    }
}

pub(super) struct Open {
    journal: Rc<Journal<SimDisk>>,
    opened: Opened,
    incarnation: u64,
    data: SimDisk,
    meta: SimDisk,
    promise: Shared<Promise>,
}

pub(super) type Done = std::result::Result<(), Failure>;

fn failed(error: impl std::fmt::Display) -> Failure {
    error.to_string().into()
}

fn ring_of(superblock: &Superblock) -> Ring {
    Ring {
        region: superblock.layout.journal,
        uuid: superblock.uuid,
    }
}

/// Compares what is on the disks with what was promised; how many records there are, and where the log ends.
async fn check(
    sim: &Sim,
    superblock: &Superblock,
    promise: &Shared<Promise>,
) -> std::result::Result<(usize, Position), Failure> {
    let ring = ring_of(superblock);
    let (groups, end) = read(sim, &ring, superblock.replay, superblock.incarnation)
        .await
        .map_err(failed)?;
    let Promise {
        appended,
        acknowledged,
    } = promise.borrow().clone();
    let mut count = usize::try_from(superblock.next_object).unwrap();
    for group in &groups {
        let mut rest = group.as_slice();
        while !rest.is_empty() {
            let expected = appended.get(count).ok_or("more records than were appended")?;
            rest = rest
                .strip_prefix(expected.as_slice())
                .ok_or(format!("record {count} is not what was appended"))?;
            count += 1;
        }
    }
    if !(acknowledged..=appended.len()).contains(&count) {
        return Err(format!(
            "{count} records, promised were {acknowledged} to {}",
            appended.len()
        )
        .into());
    }
    for (number, record) in appended[..count].iter().enumerate() {
        let data = sim.disk(1).read_bytes(number as u64 * 512, 512).await?;
        if data != [record[7]; 512] {
            return Err(format!("record {number} is there without its data").into());
        }
    }
    Ok((count, end))
}

impl Open {
    /// Opens as the module comment of the journal demands.
    pub(super) async fn open(sim: &Sim, promise: &Shared<Promise>) -> std::result::Result<Self, Failure> {
        let (meta, data) = (sim.disk(0), sim.disk(1));
        let mut opened = superblock::open(&meta).await.map_err(failed)?;
        let (count, end) = check(sim, &opened.superblock, promise).await?;
        promise.borrow_mut().appended.truncate(count);
        data.flush().await?;
        meta.flush().await?;
        let mut next = opened.superblock;
        next.sequence = opened.next_sequence;
        next.incarnation += 1;
        if end.block - next.replay.block > next.layout.journal.blocks / 2 {
            // The checkpoint of what was replayed.
            next.replay = end;
            next.next_object = count as u64;
        }
        superblock::write(&meta, &next, &mut opened.holders)
            .await
            .map_err(failed)?;
        opened.superblock = next;
        opened.next_sequence += 1;
        // From now on it stays.
        promise.borrow_mut().acknowledged = count;
        let journal = Journal::new(
            Rc::new(meta.clone()),
            ring_of(&next),
            &next.replay,
            end,
            next.incarnation,
        );
        let journal = Rc::new(journal);
        let (writer, before) = (Rc::clone(&journal), FlushData(data.clone()));
        let spawned = block_io::spawn_local(async move {
            let _ = writer.run(&before).await;
        });
        assert!(spawned.is_ok());
        let incarnation = next.incarnation;
        let promise = Rc::clone(promise);
        Ok(Self {
            journal,
            opened,
            incarnation,
            data,
            meta,
            promise,
        })
    }

    pub(super) async fn step(&mut self, step: Step) -> Done {
        match step {
            Append(length) => {
                let Some(ticket) = self.journal.reserve(length.max(8)) else {
                    return Err("no room".into());
                };
                let number = self.promise.borrow().appended.len();
                let record = record(self.incarnation, number, length);
                let data = [record[7]; 512];
                self.data
                    .write_bytes(number as u64 * 512, &data, Durability::Volatile)
                    .await?;
                self.promise.borrow_mut().appended.push(record.clone());
                self.journal.append(&record).map_err(failed)?;
                drop(ticket);
            }
            Commit => {
                let count = self.promise.borrow().appended.len();
                self.journal
                    .commit(self.journal.open_group())
                    .await
                    .map_err(failed)?;
                self.promise.borrow_mut().acknowledged = count;
            }
            Checkpoint => {
                let position = self.journal.close_group();
                let count = self.promise.borrow().appended.len();
                self.data.flush().await?;
                let next = &mut self.opened.superblock;
                next.sequence = self.opened.next_sequence;
                next.replay = position;
                next.next_object = count as u64;
                self.opened.next_sequence += 1;
                let written = superblock::write(&self.meta, next, &mut self.opened.holders);
                written.await.map_err(failed)?;
                self.promise.borrow_mut().acknowledged = count;
                self.journal.release(&position);
            }
        }
        Ok(())
    }
}

impl Scenario for Script {
    type Model = Promise;

    fn world(&self) -> World {
        World::new([
            DiskOptions::with_sector("meta", BLOCKS * 4096, self.sector),
            DiskOptions::new("data", 1 << 20),
        ])
    }

    async fn prepare(&self, sim: Sim, _: Shared<Promise>) -> Done {
        let options = LayoutOptions {
            journal_blocks: Some(self.ring),
            ..LayoutOptions::default()
        };
        let first = Superblock {
            features: Features::default(),
            uuid: UUID,
            sequence: 1,
            incarnation: 1,
            layout: layout(BLOCKS, &options).map_err(failed)?,
            replay: BEGIN,
            ..Superblock::default()
        };
        superblock::write(&sim.disk(0), &first, &mut superblock::Holders::default())
            .await
            .map_err(failed)
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Done {
        if let Some(after) = self.fails {
            sim.inject(0, FaultRule::once(Fault::Error, Operation::Write).after(after));
        }
        let script = async {
            let mut open = Open::open(&sim, &promise).await?;
            for step in self.steps {
                open.step(*step).await?;
            }
            Ok(())
        };
        match script.await {
            // It stops, and what was promised holds.
            Err(_) if self.fails.is_some() => Ok(()),
            result => result,
        }
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Done {
        let recovery = async {
            let mut open = Open::open(&sim, &promise).await?;
            open.step(Append(20)).await?;
            open.step(Commit).await?;
            let superblock = superblock::open(&sim.disk(0)).await.map_err(failed)?.superblock;
            let (count, _) = check(&sim, &superblock, &promise).await?;
            if count != promise.borrow().appended.len() {
                return Err(Failure::from(format!("{count} records after recovery")));
            }
            Ok(())
        };
        match recovery.await {
            // The fault of the script hits here.
            Err(failure)
                if self.fails.is_some() && failure.message.contains("cannot be written to the journal") =>
            {
                Ok(())
            }
            result => result,
        }
    }
}

/// Eight sectors and two.
const LONG: usize = PAYLOAD + 600;
const SCRIPTS: [&[Step]; 6] = [
    &[Append(10), Commit],
    &[Append(10), Append(20), Commit, Append(30), Commit],
    &[Append(LONG), Commit, Append(10), Commit],
    &[Append(10), Commit, Append(LONG), Checkpoint, Append(10), Commit],
    &[
        Append(LONG),
        Commit,
        Checkpoint,
        Append(LONG),
        Commit,
        Checkpoint,
        Append(LONG),
        Commit,
    ],
    &[
        Append(10),
        Checkpoint,
        Append(10),
        Checkpoint,
        Commit,
        Append(10),
        Commit,
    ],
];

fn explored(script: &Script, options: &ExploreOptions) -> Numbers {
    let numbers = explore(script, options).unwrap_or_else(|failure| panic!("{script:?}: {failure}"));
    // Only crashes within recovery are sampled.
    assert!(
        options.nesting > 0 || numbers.sampled_points == 0,
        "{script:?}: {numbers}"
    );
    numbers
}

#[test]
fn every_crash_leaves_a_prefix_with_all_that_was_acknowledged() {
    let mut numbers = Numbers::default();
    for (number, steps) in SCRIPTS.into_iter().enumerate() {
        // Sectors of 512 bytes tear blocks; those of 4096 leave time for crashes within recovery, and within that.
        let deep = if number < 2 { 2 } else { 1 };
        for (sector, ring, nesting) in [(4096, 5, deep), (512, 7, 0)] {
            let script = Script {
                steps,
                ring,
                sector,
                fails: None,
            };
            let options = ExploreOptions {
                nesting,
                nested_states: 16,
                ..ExploreOptions::default()
            };
            let some = explored(&script, &options);
            println!("{script:?}: {} states", some.crash_states);
            numbers.add(&some);
        }
    }
    println!("{numbers}");
    let missing = numbers.missing(&[
        "journal: a torn or damaged block",
        "journal: the last group is torn",
        "journal: a later incarnation goes on",
        "journal: a group goes across the ring's end",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}

#[test]
fn every_crash_and_one_failing_write_leave_what_was_acknowledged() {
    let mut numbers = Numbers::default();
    for steps in SCRIPTS {
        for fails in 0..12 {
            let script = Script {
                steps,
                ring: 6,
                sector: 4096,
                fails: Some(fails),
            };
            let options = ExploreOptions {
                nesting: 0,
                ..ExploreOptions::default()
            };
            numbers.add(&explored(&script, &options));
        }
    }
    println!("{numbers}");
    let missing = numbers.missing(&["journal: it has failed", "superblock: one copy cannot be written"]);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}
