//! A section of two data columns and parity on three disks, whose units are single sectors; the log is on the first two. After a
//! crash and a replay every row has its parity, and holds what was acknowledged or what was being written.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;

use block_io::sim::{
    DiskOptions, Ended, ExploreOptions, Failure, Fault, FaultRule, Rng, RunOptions, Scenario, Shared, Sim,
    SimDisk, SwarmOptions, Workload, World, explore, swarm,
};
use block_io::{BlockDevice, Durability, IoError, Operation};
use volume_manager::logs::LogError;
use volume_manager::logs::parity::{Identity, LogCopy, ParityLog, Piece, Recovery, Shape, least_length};
use volume_manager::model::{DeviceId, Uuid};

use crate::together;

const UNIT: usize = 4096;
const DATA: u64 = 1 << 24;
const LOG: u64 = 1 << 20;

/// How the owner behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Right,
    /// The tail passes records whose in-place writes are in caches.
    AdvancesWithoutFlush,
    /// Full stripes are never logged.
    IgnoresLiveRecords,
    /// Partial stripes are not logged either.
    WritesWithoutLog,
}

/// What a row may hold.
#[derive(Debug, Clone, Default)]
struct Row {
    /// Of both columns.
    acknowledged: [u8; 2],
    /// What is being written instead, if so.
    begun: Option<[u8; 2]>,
    /// A write of the full row without a log is under way: until it ends, or a resync, parity is not right.
    unlogged: bool,
}

#[derive(Debug, Clone, Default)]
struct Model {
    rows: BTreeMap<u64, Row>,
}

fn shape() -> Shape {
    Shape {
        identity: Identity {
            volume: Uuid(77),
            section: 3,
        },
        length: least_length(3 * UNIT).unwrap(),
        row: 3 * UNIT,
    }
}

fn copies(sim: &Sim, which: &[u32]) -> Vec<LogCopy<SimDisk>> {
    let copy = |disk: &u32| LogCopy {
        id: DeviceId(*disk),
        device: Rc::new(sim.disk((*disk).try_into().unwrap())),
        start: LOG,
    };
    which.iter().map(copy).collect()
}

struct Section {
    disks: Vec<SimDisk>,
    log: ParityLog<SimDisk>,
    owner: Owner,
    model: Shared<Model>,
}

fn told(error: LogError) -> Failure {
    let source = std::error::Error::source(&error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default()).into()
}

async fn put(disk: &SimDisk, row: u64, data: &[u8], durability: Durability) -> Result<(), IoError> {
    disk.write_bytes(DATA + row * UNIT as u64, data, durability).await
}

impl Section {
    async fn flush(&self) -> Result<(), IoError> {
        if self.owner == Owner::AdvancesWithoutFlush {
            return Ok(());
        }
        let flushes = self
            .disks
            .iter()
            .map(|disk| -> Pin<Box<dyn Future<Output = _>>> { Box::pin(disk.flush()) });
        together(flushes.collect()).await.into_iter().collect()
    }

    /// Replaces one unit; the caller locks the row.
    async fn write(&self, row: u64, column: usize, fill: u8) -> Result<(), LogError> {
        let mut new = {
            let mut model = self.model.borrow_mut();
            let entry = model.rows.entry(row).or_default();
            let mut new = entry.acknowledged;
            new[column] = fill;
            entry.begun = Some(new);
            new
        };
        let data = [new[column]; UNIT];
        let parity = [new[0] ^ new[1]; UNIT];
        let pieces = [
            Piece {
                column: u32::try_from(column).unwrap(),
                offset: 0,
                data: &data,
            },
            Piece {
                column: 2,
                offset: 0,
                data: &parity,
            },
        ];
        let ticket = if self.owner == Owner::WritesWithoutLog {
            None
        } else {
            Some(
                self.log
                    .append(row, &pieces, &async || self.flush().await)
                    .await?,
            )
        };
        let wrote = together(vec![
            Box::pin(put(&self.disks[column], row, &data, Durability::Volatile))
                as Pin<Box<dyn Future<Output = _>>>,
            Box::pin(put(&self.disks[2], row, &parity, Durability::Volatile)),
        ]);
        wrote.await.into_iter().collect::<Result<(), _>>().unwrap();
        if let Some(ticket) = ticket {
            self.log.applied(ticket);
        }
        new[column] = fill;
        self.acknowledge(row, new);
        Ok(())
    }

    fn acknowledge(&self, row: u64, new: [u8; 2]) {
        let mut model = self.model.borrow_mut();
        let entry = model.rows.entry(row).or_default();
        entry.acknowledged = new;
        entry.begun = None;
        entry.unlogged = false;
    }

    /// Replaces a row, with a log record only if one of it is live.
    async fn write_row(&self, row: u64, new: [u8; 2]) -> Result<(), LogError> {
        let live = self.log.has_live_record(row) && self.owner != Owner::IgnoresLiveRecords;
        {
            let mut model = self.model.borrow_mut();
            let entry = model.rows.entry(row).or_default();
            entry.begun = Some(new);
            entry.unlogged = !live;
        }
        let units = [[new[0]; UNIT], [new[1]; UNIT], [new[0] ^ new[1]; UNIT]];
        let mut ticket = None;
        if live {
            let piece = |(column, data)| Piece {
                column,
                offset: 0,
                data,
            };
            let pieces: Vec<_> = (0..).zip(units.iter().map(|unit| &unit[..])).map(piece).collect();
            ticket = Some(
                self.log
                    .append(row, &pieces, &async || self.flush().await)
                    .await?,
            );
        }
        for (disk, unit) in self.disks.iter().zip(&units) {
            put(disk, row, unit, Durability::Durable).await.unwrap();
        }
        if let Some(ticket) = ticket {
            ticket.applied();
        }
        self.acknowledge(row, new);
        Ok(())
    }
}

async fn format(sim: &Sim) -> Result<(), Failure> {
    ParityLog::format(shape(), copies(sim, &[0, 1]))
        .await
        .map(drop)
        .map_err(told)
}

/// Recovers with these copies of the log, and compares every row with the model.
async fn open(sim: &Sim, owner: Owner, model: Shared<Model>, logs: &[u32]) -> Result<Section, Failure> {
    let disks = sim.disks();
    let recovery = ParityLog::open(shape(), copies(sim, logs)).await.map_err(told)?;
    // Once more: a replay may be repeated.
    for _ in 0..2 {
        replay(&recovery, &disks).await?;
    }
    for disk in &disks {
        disk.flush().await?;
    }
    check(&disks, &model).await?;
    let log = recovery.restart().await.map_err(told)?;
    Ok(Section {
        disks,
        log,
        owner,
        model,
    })
}

async fn replay(recovery: &Recovery<SimDisk>, disks: &[SimDisk]) -> Result<u64, Failure> {
    let mut apply = async |row: u64, pieces: &[Piece<'_>]| {
        for piece in pieces {
            let at = DATA + row * UNIT as u64 + piece.offset;
            let disk = &disks[usize::try_from(piece.column).unwrap()];
            disk.write_bytes(at, piece.data, Durability::Volatile)
                .await
                .unwrap();
        }
        Ok::<(), LogError>(())
    };
    recovery.replay(&mut apply).await.map_err(told)
}

async fn check(disks: &[SimDisk], model: &Shared<Model>) -> Result<(), Failure> {
    let rows: Vec<u64> = model.borrow().rows.keys().copied().collect();
    for row in rows {
        let mut found = Vec::new();
        for disk in disks {
            found.push(disk.read_bytes(DATA + row * UNIT as u64, UNIT).await?);
        }
        let mut model = model.borrow_mut();
        let entry = model.rows.entry(row).or_default();
        if entry.unlogged {
            // The activity log's business: here the row is resynced.
            continue;
        }
        let parity = found[0]
            .iter()
            .zip(&found[1])
            .map(|(first, second)| first ^ second);
        if !parity.eq(found[2].iter().copied()) {
            return Err(format!("row {row} has the wrong parity").into());
        }
        let old = entry.acknowledged;
        let new = entry.begun.unwrap_or(old);
        let holds =
            |wanted: [u8; 2]| (0..2).all(|column| found[column].iter().all(|byte| *byte == wanted[column]));
        if holds(new) {
            entry.acknowledged = new;
        } else if !holds(old) {
            let firsts = [found[0][0], found[1][0]];
            return Err(format!("row {row} holds {firsts:?}, promised was {old:?} or {new:?}").into());
        }
        entry.begun = None;
    }
    Ok(())
}

/// Gives rows their parity that an unlogged write has left without.
async fn resync(section: &Section) -> Result<(), Failure> {
    let rows: Vec<u64> = {
        let model = section.model.borrow();
        let unlogged = model.rows.iter().filter(|(_, row)| row.unlogged);
        unlogged.map(|(row, _)| *row).collect()
    };
    for row in rows {
        section.write_row(row, [0, 0]).await.map_err(told)?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Script {
    /// Two rows in a group, a row again, and a full row behind it.
    Writes,
    /// As many writes as make the ring go round and wait for its tail.
    Wraps,
    /// The second copy goes, another comes.
    ChangesCopies,
}

struct Case {
    owner: Owner,
    script: Script,
    /// Copies that are there after the crash.
    left: &'static [u32],
}

impl Scenario for Case {
    type Model = Model;

    fn world(&self) -> World {
        World::new(["a", "b", "c"].map(|name| DiskOptions::with_sector(name, 1 << 30, 4096)))
    }

    async fn prepare(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        format(&sim).await?;
        let section = open(&sim, Owner::Right, model, &[0, 1]).await?;
        if matches!(self.script, Script::Wraps) {
            for count in 0..4 {
                section.write(count, 0, 9).await.map_err(told)?;
            }
        }
        Ok(())
    }

    async fn run(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        let section = open(&sim, self.owner, model, &[0, 1]).await?;
        let flush = async || section.flush().await;
        match self.script {
            Script::Writes => {
                let group = together(vec![
                    Box::pin(section.write(0, 0, 1)) as Pin<Box<dyn Future<Output = _>>>,
                    Box::pin(section.write(1, 1, 2)),
                ]);
                group.await.into_iter().collect::<Result<(), _>>().map_err(told)?;
                section.write(0, 1, 3).await.map_err(told)?;
                section.write_row(0, [4, 5]).await.map_err(told)?;
                section.log.advance(&flush).await.map_err(told)?;
                section.write_row(1, [6, 7]).await.map_err(told)?;
                section.write(0, 0, 8).await.map_err(told)?;
            }
            Script::Wraps => {
                for count in 0..7 {
                    section
                        .write(count % 2, 1, 1 + u8::try_from(count).unwrap())
                        .await
                        .map_err(told)?;
                }
            }
            Script::ChangesCopies => {
                section.write(0, 0, 1).await.map_err(told)?;
                section.log.remove_copy(DeviceId(1));
                section.write(0, 1, 2).await.map_err(told)?;
                let copy = copies(&sim, &[1]).remove(0);
                section.log.add_copy(copy, &flush).await.map_err(told)?;
                section.write(1, 1, 3).await.map_err(told)?;
                section.log.remove_copy(DeviceId(0));
                section.write(1, 0, 4).await.map_err(told)?;
            }
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, model: Shared<Model>) -> Result<(), Failure> {
        let section = open(&sim, Owner::Right, Rc::clone(&model), self.left).await?;
        resync(&section).await?;
        section.write(1, 1, 99).await.map_err(told)?;
        section.write_row(0, [98, 97]).await.map_err(told)?;
        check(&section.disks, &model).await
    }
}

/// Many crashes of the script.
const WIDE: ExploreOptions = ExploreOptions {
    states: 24,
    nesting: 0,
    nested_states: 1,
    nested_one_in: 1,
    schedules: 2,
};

/// Fewer, and crashes in recovery.
const DEEP: ExploreOptions = ExploreOptions {
    states: 2,
    nesting: 1,
    nested_states: 1,
    nested_one_in: 1,
    schedules: 1,
};

#[test]
fn rows_are_whole_after_every_crash_with_either_copy_of_the_log() {
    for left in [&[0, 1][..], &[0], &[1]] {
        let case = Case {
            owner: Owner::Right,
            script: Script::Writes,
            left,
        };
        let numbers = explore(&case, &WIDE).unwrap_or_else(|failure| panic!("{failure}"));
        println!("copies {left:?}: {numbers}");
        assert!(numbers.crash_states > 1000, "{numbers}");
        let wanted = ["parity log: torn payload refused"];
        assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
    }
}

#[test]
fn a_crash_in_recovery_loses_nothing() {
    let case = Case {
        owner: Owner::Right,
        script: Script::Writes,
        left: &[0, 1],
    };
    let numbers = explore(&case, &DEEP).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.nested_states > 1000, "{numbers}");
}

#[test]
fn copies_of_the_log_go_and_come_between_writes() {
    let case = Case {
        owner: Owner::Right,
        script: Script::ChangesCopies,
        left: &[0, 1],
    };
    let numbers = explore(&case, &WIDE).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 500, "{numbers}");
}

#[test]
fn the_ring_goes_round_under_crashes() {
    let case = Case {
        owner: Owner::Right,
        script: Script::Wraps,
        left: &[1],
    };
    let numbers = explore(&case, &WIDE).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{numbers}");
    assert!(
        numbers.missing(&["parity log: full, flushed"]).is_empty(),
        "{numbers}"
    );
}

#[track_caller]
fn is_found(owner: Owner, script: Script, message: &str) {
    let case = Case {
        owner,
        script,
        left: &[0, 1],
    };
    let failure = explore(&case, &WIDE).unwrap_err();
    assert!(failure.message.contains(message), "{failure}");
}

#[test]
fn a_tail_that_moves_without_a_flush_is_found() {
    is_found(Owner::AdvancesWithoutFlush, Script::Wraps, "row");
}

#[test]
fn an_unlogged_write_over_a_live_record_is_found() {
    is_found(Owner::IgnoresLiveRecords, Script::Writes, "promised was");
}

#[test]
fn partial_stripes_without_a_log_are_found() {
    is_found(Owner::WritesWithoutLog, Script::Writes, "row");
}

/// A step of a long history.
#[derive(Debug, Clone)]
enum Step {
    Write {
        row: u64,
        column: usize,
        fill: u8,
    },
    WriteRow {
        row: u64,
        fill: [u8; 2],
    },
    Advance,
    /// The power is cut after so many events of what follows.
    Crash {
        after: u64,
    },
}

/// Three writers with rows of their own, sectors of 512 bytes, and a ring that is soon full.
struct History;

impl Workload for History {
    type Step = Step;

    fn generate(&self, rng: &mut Rng) -> Vec<Step> {
        let fill = |rng: &mut Rng| u8::try_from(1 + rng.below(255)).unwrap();
        let step = |rng: &mut Rng| match rng.below(20) {
            0 | 1 => Step::Crash {
                after: 60 + rng.below(200),
            },
            2 => Step::Advance,
            3..6 => Step::WriteRow {
                row: rng.below(3),
                fill: [fill(rng), fill(rng)],
            },
            _ => Step::Write {
                row: rng.below(3),
                column: rng.index(2),
                fill: fill(rng),
            },
        };
        (0..80).map(|_| step(rng)).collect()
    }

    fn run(&self, seed: u64, history: &[Step]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let mut world = World::new(["a", "b", "c"].map(|name| DiskOptions::new(name, 1 << 30)));
        let model = Shared::<Model>::default();
        let formatted = world.run(&RunOptions::in_order(), async |sim| format(&sim).await)?;
        formatted.ended.done().unwrap_or(Ok(()))?;
        for part in history.split_inclusive(|step| matches!(step, Step::Crash { .. })) {
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(Step::Crash { after }) = part.last() {
                options = options.crash_after(*after);
            }
            let ran = world.run(&options, async |sim| power_on(&sim, &model, part).await)?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
        }
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            power_on(&sim, &model, &[]).await
        })?;
        ran.ended.done().unwrap_or(Ok(()))
    }
}

async fn power_on(sim: &Sim, model: &Shared<Model>, steps: &[Step]) -> Result<(), Failure> {
    let section = open(sim, Owner::Right, Rc::clone(model), &[0, 1]).await?;
    resync(&section).await?;
    let section = &section;
    let client = |number: u64| async move {
        let mut mine = 0_u64;
        for step in steps {
            mine += 1;
            match *step {
                // Each writer has rows of its own: that is how the owner locks them.
                Step::Write { row, column, fill } if row == number => {
                    section.write(row, column, fill).await?
                }
                Step::WriteRow { row, fill } if row == number => section.write_row(row, fill).await?,
                Step::Advance if mine % 3 == number => {
                    section.log.advance(&async || section.flush().await).await?;
                }
                _ => {}
            }
        }
        Ok::<(), LogError>(())
    };
    let (first, second, third) = (client(0), client(1), client(2));
    let clients: Vec<Pin<Box<dyn Future<Output = _>>>> =
        vec![Box::pin(first), Box::pin(second), Box::pin(third)];
    together(clients)
        .await
        .into_iter()
        .collect::<Result<(), _>>()
        .map_err(told)
}

#[test]
fn long_histories_of_three_writers_with_crashes() {
    let options = SwarmOptions {
        seed: 9,
        histories: 200,
    };
    let numbers = swarm(&History, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    assert!(numbers.crash_states > 500, "{numbers}");
    let wanted = [
        "parity log: torn payload refused",
        "parity log: torn header refused",
        "parity log: full, flushed",
        "parity log: full, and others must end first",
    ];
    assert!(numbers.missing(&wanted).is_empty(), "{numbers}");
}

/// Three blank disks with a log.
async fn section(sim: &Sim) -> Result<Section, Failure> {
    format(sim).await?;
    open(sim, Owner::Right, Shared::default(), &[0, 1]).await
}

fn in_order<F: Future<Output = Result<(), Failure>>>(test: impl FnOnce(Sim) -> F) {
    let mut world = World::new(["a", "b", "c"].map(|name| DiskOptions::new(name, 1 << 30)));
    let ran = world.run(&RunOptions::in_order(), test);
    ran.unwrap().ended.done().unwrap().unwrap();
}

#[test]
fn a_copy_that_fails_is_reported_until_the_owner_takes_it_out() {
    in_order(async |sim| {
        let section = section(&sim).await?;
        section.write(0, 0, 1).await.map_err(told)?;
        sim.inject(
            1,
            FaultRule::once(Fault::Error, Operation::Write).within(LOG..DATA),
        );
        for _ in 0..2 {
            let failed = section.write(0, 1, 2).await.unwrap_err();
            assert!(
                matches!(
                    failed,
                    LogError::Device {
                        device: DeviceId(1),
                        ..
                    }
                ),
                "{failed}"
            );
        }
        section.log.remove_copy(DeviceId(1));
        section.write(0, 1, 2).await.map_err(told)?;
        section.log.remove_copy(DeviceId(0));
        let failed = section.write(0, 1, 3).await.unwrap_err();
        assert!(matches!(failed, LogError::NoCopy { .. }), "{failed}");
        drop(open(&sim, Owner::Right, Rc::clone(&section.model), &[0]).await?);
        Ok(())
    });
}

#[test]
fn a_write_that_was_given_up_keeps_its_record_and_is_replayed() {
    in_order(async |sim| {
        let section = section(&sim).await?;
        let data = [5; UNIT];
        let pieces = [(0, &data), (2, &data)].map(|(column, data)| Piece {
            column,
            offset: 0,
            data,
        });
        let flush = async || section.flush().await;
        drop(section.log.append(3, &pieces, &flush).await.map_err(told)?);
        assert!(section.log.has_live_record(3));
        let mut failed = None;
        for count in 0..20 {
            failed = section.write(count % 2, 0, 7).await.err();
            if failed.is_some() {
                break;
            }
        }
        assert!(matches!(failed, Some(LogError::Abandoned)), "{failed:?}");
        assert!(section.log.has_live_record(3));
        let recovery = ParityLog::open(shape(), copies(&sim, &[1])).await.map_err(told)?;
        replay(&recovery, &section.disks).await?;
        assert_eq!(
            section.disks[2].read_bytes(DATA + 3 * UNIT as u64, UNIT).await?,
            data
        );
        let log = recovery.restart().await.map_err(told)?;
        assert!(!log.has_live_record(3));
        Ok(())
    });
}

#[test]
fn an_append_that_is_dropped_while_it_writes_stops_nobody() {
    in_order(async |sim| {
        let section = section(&sim).await?;
        let data = [5; UNIT];
        let pieces = [Piece {
            column: 0,
            offset: 0,
            data: &data,
        }];
        let flush = async || section.flush().await;
        let mut first = Box::pin(section.log.append(3, &pieces, &flush));
        let polled =
            std::future::poll_fn(|context| std::task::Poll::Ready(first.as_mut().poll(context).is_pending()));
        assert!(polled.await);
        drop(first);
        assert!(section.log.has_live_record(3), "it may be on media");
        section.write(0, 0, 1).await.map_err(told)?;
        section.log.advance(&flush).await.map_err(told)?;
        assert!(!section.log.has_live_record(3) && !section.log.has_live_record(0));
        let (used, blocks) = section.log.usage();
        assert!(used <= 1 && blocks == 17, "{used} of {blocks}");
        Ok(())
    });
}

#[test]
fn logs_and_records_of_impossible_sizes_are_refused() {
    in_order(async |sim| {
        let small = Shape {
            length: shape().length - 1,
            ..shape()
        };
        let refused = ParityLog::format(small, copies(&sim, &[0])).await;
        assert!(matches!(refused, Err(LogError::RingTooSmall { needed, .. }) if needed == shape().length));
        assert_eq!(least_length(1 << 30), None);
        let blank = ParityLog::open(shape(), copies(&sim, &[0])).await;
        assert!(matches!(blank, Err(LogError::NoRecord { .. })));
        let section = section(&sim).await?;
        let data = vec![1; 3 * UNIT + 512];
        let pieces = [Piece {
            column: 0,
            offset: 0,
            data: &data,
        }];
        let refused = section.log.append(0, &pieces, &async || Ok(())).await;
        assert!(matches!(refused, Err(LogError::RecordTooLarge { .. })));
        Ok(())
    });
}
