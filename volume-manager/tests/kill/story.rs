//! The parent's side: kills children, knows what was acknowledged, looks at every sector.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use block_io::{AlignedBuffer, BlockDevice, Worker, WorkerOptions};
use volume_manager::Event;
use volume_manager::model::{JobKind, Layout};

use crate::blocks::{SECTOR, SECTORS, Write, mix, number_of};
use crate::child::{ORDER, Order, Work};
use crate::files::{self, FILES, FilePool, UNIT};

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) rounds: usize,
    /// Children that were killed before the pool was open.
    early: usize,
    /// Children that were killed with a job under way.
    working: usize,
    /// Rounds after which the pool was opened without one of its files.
    missing: usize,
    pub(crate) flushes: usize,
    durable: usize,
    /// Sectors looked at that a flush or a durable write had promised.
    promised: usize,
}

impl Numbers {
    pub(crate) fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.early += other.early;
        self.working += other.working;
        self.missing += other.missing;
        self.flushes += other.flushes;
        self.durable += other.durable;
        self.promised += other.promised;
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} kills ({} while opening, {} with a job under way), {} openings with a file missing, {} flushes and {} durable \
             writes acknowledged, {} promised sectors found",
            self.rounds, self.early, self.working, self.missing, self.flushes, self.durable, self.promised
        )
    }
}

struct Story {
    seed: u64,
    directory: PathBuf,
    generation: u32,
    /// By sector: the write that it must hold, unless it holds a later one.
    floors: Vec<u64>,
    /// Largest write of each generation.
    largest: Vec<u64>,
    numbers: Numbers,
}

/// A pool is made, and its users are killed `rounds` times.
pub(crate) fn play(seed: u64, layout: Layout, rounds: usize) -> Numbers {
    println!("story {seed:#018x}: {layout}");
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut story = Story {
        seed,
        directory: directory.path().into(),
        generation: 0,
        floors: vec![0; SECTORS as usize],
        largest: vec![0],
        numbers: Numbers::default(),
    };
    let place = story.directory.clone();
    worker().run(move || async move { files::create(&place, layout).await });
    let missing = mix(seed, 1)
        .is_multiple_of(2)
        .then_some((mix(seed, 2) % FILES as u64) as usize);
    while story.numbers.rounds < rounds {
        let last = story.numbers.rounds + 1 == rounds;
        story.round(missing.is_some());
        if last || mix(seed, 100 + u64::from(story.generation)).is_multiple_of(2) {
            story.check(missing, last);
        }
    }
    if std::thread::panicking() {
        // The files are what a person wants to look at.
        let _ = directory.keep();
    }
    story.numbers
}

fn worker() -> Worker {
    Worker::start("parent", WorkerOptions::default()).unwrap()
}

impl Story {
    /// A child, killed.
    fn round(&mut self, missing: bool) {
        self.generation += 1;
        self.numbers.rounds += 1;
        let draw = |what: u64| mix(self.seed ^ what << 32, self.generation.into());
        let work = draw(3);
        // A row of parity that is written as a whole is not logged: what a device held of it that is lost in the same crash is lost.
        let row = 2 * UNIT / SECTOR as u64;
        let largest = if missing { row - 1 } else { 4 * row };
        self.largest.push(largest);
        let order = Order {
            seed: self.seed,
            generation: self.generation,
            largest,
            work,
            directory: self.directory.clone(),
        };
        let early = draw(4).is_multiple_of(4);
        let delay = Duration::from_micros(if early {
            draw(5) % 30_000
        } else {
            5000 + draw(5) % 55_000
        });
        println!(
            "  kill {}: {:?} after {delay:?}{}",
            self.generation,
            Work::draw(work),
            if early { " of opening" } else { "" }
        );
        let lines = kill(&order, if early { "begin" } else { "open" }, delay);
        self.numbers.early += usize::from(!lines.iter().any(|line| line == "open"));
        for line in lines {
            self.believe(&line);
        }
    }

    /// Takes a report of the child into account.
    fn believe(&mut self, line: &str) {
        let mut words = line.split(' ');
        let what = words.next().unwrap();
        let mut numbers = words.map(|word| word.parse::<u32>().unwrap());
        match what {
            "flushed" => {
                self.numbers.flushes += 1;
                let end = numbers.next().unwrap();
                let open: BTreeSet<u32> = numbers.collect();
                for index in (0..end).filter(|index| !open.contains(index)) {
                    self.promise(index);
                }
            }
            "durable" => {
                self.numbers.durable += 1;
                self.promise(numbers.next().unwrap());
            }
            _ => {}
        }
    }

    fn promise(&mut self, index: u32) {
        let largest = self.largest[self.generation as usize];
        let write = Write::new(self.seed, self.generation, index, largest);
        for floor in &mut self.floors[write.start as usize..write.end() as usize] {
            *floor = write.number.max(*floor);
        }
    }

    /// Opens the pool and looks at everything: first without the file `missing`, then with all.
    fn check(&mut self, missing: Option<usize>, last: bool) {
        if missing.is_some() {
            self.numbers.missing += 1;
            let content = self.look(missing, false);
            self.compare(&content);
        }
        let content = self.look(None, last);
        self.compare(&content);
    }

    /// The content of the volume, read twice: as it is after the opening, and when all jobs have ended.
    fn look(&mut self, missing: Option<usize>, scrub: bool) -> Vec<u8> {
        self.generation += 1;
        self.largest.push(0);
        let (directory, incarnation) = (self.directory.clone(), mix(self.seed, self.generation.into()));
        let (working, content) = worker().run(move || async move {
            let pool = files::open(&directory, incarnation, missing).await;
            let working = pool
                .jobs()
                .iter()
                .any(|job| job.is_live() && !matches!(job.kind, JobKind::Resync { .. }));
            let before = read(&pool).await;
            settle(&pool, missing.is_some()).await;
            let after = read(&pool).await;
            assert!(before == after, "the work after an opening changed the content");
            if scrub {
                no_differences(&pool).await;
            }
            pool.close().await.unwrap();
            (working, after)
        });
        self.numbers.working += usize::from(working);
        content
    }

    /// Every sector holds what was promised or something later; from now on it holds that.
    fn compare(&mut self, content: &[u8]) {
        for (place, sector) in content.chunks(SECTOR).enumerate() {
            let floor = self.floors[place];
            let found = number_of(sector, self.seed, place as u64)
                .unwrap_or_else(|| panic!("sector {place} is not of one write: {:02x?}", &sector[..32]));
            let (generation, index) = ((found >> 32) as u32, (found & 0xffff_ffff) as u32);
            assert!(
                found >= floor,
                "sector {place} holds write {generation}:{index}, but {}:{} was flushed",
                floor >> 32,
                floor & 0xffff_ffff
            );
            if found != 0 {
                let write = Write::new(self.seed, generation, index, self.largest[generation as usize]);
                let place = place as u64;
                assert!(
                    (write.start..write.end()).contains(&place),
                    "sector {place} holds write {generation}:{index}, which was not one of it"
                );
            }
            self.numbers.promised += usize::from(floor != 0);
            self.floors[place] = found;
        }
    }
}

/// Runs a child, and kills it `delay` after it said `when`. Gives all that it said.
fn kill(order: &Order, when: &str, delay: Duration) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(ORDER, order.encode())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let (send, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in output.lines() {
            send.send(line.unwrap()).unwrap();
        }
    });
    let mut said = Vec::new();
    loop {
        match lines.recv_timeout(Duration::from_secs(30)) {
            Ok(line) => {
                said.push(line);
                if said.last().is_some_and(|line| line == when) {
                    break;
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("the child ended by itself: {said:?}"),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill().unwrap();
                panic!("the child hangs: {said:?}");
            }
        }
    }
    std::thread::sleep(delay);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(
        status.signal(),
        Some(libc::SIGKILL),
        "the child ended by itself: {status}"
    );
    reader.join().unwrap();
    said.extend(lines.try_iter());
    said
}

async fn read(pool: &FilePool) -> Vec<u8> {
    let volume = pool.volume("v").unwrap();
    let buffer = AlignedBuffer::new(SECTORS as usize * SECTOR);
    // Pieces of several sizes, as they take several ways.
    let (mut at, mut length) = (0, SECTOR);
    while at < buffer.as_slice().len() {
        let end = (at + length).min(buffer.as_slice().len());
        // SAFETY: the buffer outlives the read, which is awaited.
        let memory = [unsafe { buffer.io(at, end - at) }];
        volume.read(at as u64, &memory).await.unwrap();
        at = end;
        length = if length < 256 << 10 { length * 2 } else { SECTOR };
    }
    buffer.as_slice().to_vec()
}

/// Waits until no job runs. What needs a device that is missing may fail.
async fn settle(pool: &FilePool, missing: bool) {
    while let Some(job) = pool.jobs().into_iter().find(|job| job.is_live()) {
        let ended = pool.wait(job.id).await;
        if !missing && let Err(error) = ended {
            // An evacuation needs room; whoever lost a race with a kill is refused. Data do not depend on it.
            println!("  {:?}: {error}", job.kind);
        }
    }
}

async fn no_differences(pool: &FilePool) {
    pool.take_events();
    let scrub = pool.start(JobKind::Scrub { volume: None }, 0).await.unwrap();
    pool.wait(scrub).await.unwrap();
    let repaired: Vec<Event> = pool
        .take_events()
        .into_iter()
        .filter(|event| matches!(event, Event::Repaired { .. }))
        .collect();
    assert!(repaired.is_empty(), "copies or parity differ: {repaired:?}");
}
