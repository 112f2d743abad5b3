//! The parent's side: kills children, knows what was acknowledged, looks at everything.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use block_io::{AlignedBuffer, BlockDevice, Worker, WorkerOptions};
use filesys::{Access, CheckOptions};

use crate::blocks::{SECTOR, SECTORS, Write, mix, number_of};
use crate::child::{LARGEST, ORDER, Order};
use crate::names::{self, Change};
use crate::place::{self, DEVICES, DISKS, Fs};

const SIGKILL: i32 = 9;

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) rounds: usize,
    /// Children that were killed before the file system was open.
    early: usize,
    /// Rounds after which the pool was opened without one of its files.
    missing: usize,
    pub(crate) flushes: usize,
    durable: usize,
    /// Changes of names that were acknowledged.
    pub(crate) names: usize,
    layers: usize,
    /// Sectors looked at that a flush or a durable write had promised.
    promised: usize,
}

impl Numbers {
    pub(crate) fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.early += other.early;
        self.missing += other.missing;
        self.flushes += other.flushes;
        self.durable += other.durable;
        self.names += other.names;
        self.layers += other.layers;
        self.promised += other.promised;
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} kills ({} while opening), {} openings with a device missing; acknowledged: {} flushes, {} durable writes, {} changes \
             of names, {} of layers; {} promised sectors found",
            self.rounds,
            self.early,
            self.missing,
            self.flushes,
            self.durable,
            self.names,
            self.layers,
            self.promised
        )
    }
}

struct Story {
    seed: u64,
    directory: PathBuf,
    generation: u32,
    /// By disk and sector: the write that it must hold, unless it holds a later one.
    floors: Vec<Vec<u64>>,
    names: BTreeSet<String>,
    /// Begun and not acknowledged: may have happened or not.
    pending: Option<Change>,
    numbers: Numbers,
}

/// What is found.
struct Found {
    disks: Vec<Vec<u8>>,
    names: BTreeSet<String>,
}

/// A file system is made, and its users are killed `rounds` times.
pub(crate) fn play(seed: u64, rounds: usize) -> Numbers {
    println!("story {seed:#018x}");
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut story = Story {
        seed,
        directory: directory.path().into(),
        generation: 0,
        floors: vec![vec![0; SECTORS as usize]; DISKS as usize],
        names: BTreeSet::new(),
        pending: None,
        numbers: Numbers::default(),
    };
    let place = story.directory.clone();
    worker().run(move || async move { place::create(&place).await });
    while story.numbers.rounds < rounds {
        let last = story.numbers.rounds + 1 == rounds;
        story.round();
        let draw = mix(seed, 100 + u64::from(story.generation));
        // Names that may have changed twice are more than this remembers.
        let checked = !draw.is_multiple_of(4) || last || story.pending.is_some();
        if checked {
            let missing = draw
                .is_multiple_of(3)
                .then_some((draw / 3 % DEVICES as u64) as usize);
            story.check(missing);
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
    fn round(&mut self) {
        self.generation += 1;
        self.numbers.rounds += 1;
        let draw = |what: u64| mix(self.seed ^ what << 32, self.generation.into());
        let order = Order {
            seed: self.seed,
            generation: self.generation,
            directory: self.directory.clone(),
        };
        let early = draw(4).is_multiple_of(5);
        let delay = Duration::from_micros(if early {
            draw(5) % 30_000
        } else {
            5000 + draw(5) % 150_000
        });
        println!(
            "  kill {} after {delay:?}{}",
            self.generation,
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
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &&str| word.parse::<u32>().unwrap();
        match words.as_slice() {
            ["flushed", disk, end, open @ ..] => {
                self.numbers.flushes += 1;
                let open: BTreeSet<u32> = open.iter().map(number).collect();
                for index in (0..number(end)).filter(|index| !open.contains(index)) {
                    self.promise(number(disk), index);
                }
            }
            ["durable", disk, index] => {
                self.numbers.durable += 1;
                self.promise(number(disk), number(index));
            }
            ["will", change @ ..] => self.pending = Some(Change::decode(change)),
            ["did"] => {
                self.numbers.names += 1;
                self.pending.take().unwrap().apply(&mut self.names);
            }
            ["layers"] => self.numbers.layers += 1,
            _ => {}
        }
    }

    fn seed_of(&self, disk: usize) -> u64 {
        self.seed ^ (disk as u64) << 56
    }

    fn promise(&mut self, disk: u32, index: u32) {
        let disk = disk as usize;
        let write = Write::new(self.seed_of(disk), self.generation, index, LARGEST);
        for floor in &mut self.floors[disk][write.start as usize..write.end() as usize] {
            *floor = write.number.max(*floor);
        }
    }

    /// Opens everything and looks: first without the device `missing`, then with all.
    fn check(&mut self, missing: Option<usize>) {
        if missing.is_some() {
            self.numbers.missing += 1;
            let found = self.look(missing);
            self.compare(found);
        }
        let found = self.look(None);
        self.compare(found);
    }

    fn look(&mut self, missing: Option<usize>) -> Found {
        self.generation += 1;
        let (directory, incarnation) = (self.directory.clone(), mix(self.seed, self.generation.into()));
        worker().run(move || async move {
            let (pool, fs) = place::open(&directory, incarnation, missing).await;
            let found = look_at(&fs).await;
            let report = fs.check(CheckOptions::default()).await.unwrap();
            assert!(report.is_clean(), "{:#?}", report.findings);
            fs.close().await.unwrap();
            drop(fs);
            // A device that was away has caught up before another one is.
            while missing.is_none()
                && let Some(job) = pool.jobs().into_iter().find(|job| job.is_live())
            {
                pool.wait(job.id).await.unwrap();
            }
            pool.close().await.unwrap();
            found
        })
    }

    fn compare(&mut self, found: Found) {
        let mut after = self.names.clone();
        if let Some(change) = &self.pending {
            change.apply(&mut after);
        }
        assert!(
            found.names == self.names || found.names == after,
            "names {:?} are there; {:?} were acknowledged, and {:?} was under way",
            found.names,
            self.names,
            self.pending
        );
        self.names = found.names;
        self.pending = None;
        for (disk, content) in found.disks.iter().enumerate() {
            self.compare_disk(disk, content);
        }
    }

    /// Every sector holds what was promised or something later; from now on it holds that.
    fn compare_disk(&mut self, disk: usize, content: &[u8]) {
        let seed = self.seed_of(disk);
        for (place, sector) in content.chunks(SECTOR).enumerate() {
            let floor = self.floors[disk][place];
            let found = number_of(sector, seed, place as u64).unwrap_or_else(|| {
                panic!(
                    "sector {place} of disk {disk} is not of one write: {:02x?}",
                    &sector[..32]
                )
            });
            let (generation, index) = ((found >> 32) as u32, (found & 0xffff_ffff) as u32);
            assert!(
                found >= floor,
                "sector {place} of disk {disk} holds write {generation}:{index}, but {}:{} was acknowledged",
                floor >> 32,
                floor & 0xffff_ffff
            );
            if found != 0 {
                let write = Write::new(seed, generation, index, LARGEST);
                assert!(
                    (write.start..write.end()).contains(&(place as u64)),
                    "sector {place} of disk {disk} holds write {generation}:{index}, which was not one of it"
                );
            }
            self.numbers.promised += usize::from(floor != 0);
            self.floors[disk][place] = found;
        }
    }
}

async fn look_at(fs: &Fs) -> Found {
    let mut disks = Vec::new();
    for number in 0..DISKS {
        let path = place::head(fs, number).await;
        let file = fs.open_file(&path, Access::Read).await.unwrap();
        disks.push(read(&file).await);
    }
    let mut names = BTreeSet::new();
    for entry in fs.list(names::DIRECTORY).await.unwrap() {
        let stat = fs.stat(&names::path(&entry.name)).await.unwrap();
        let (size, thick) = names::shape(&entry.name);
        assert_eq!(stat.size, size, "size of {}", entry.name);
        assert_eq!(
            stat.allocated,
            if thick { size.next_multiple_of(65536) } else { 0 },
            "space of {}",
            entry.name
        );
        names.insert(entry.name);
    }
    Found { disks, names }
}

async fn read(file: &impl BlockDevice) -> Vec<u8> {
    let buffer = AlignedBuffer::new(SECTORS as usize * SECTOR);
    // Pieces of several sizes, as they take several ways.
    let (mut at, mut length) = (0, SECTOR);
    while at < buffer.as_slice().len() {
        let end = (at + length).min(buffer.as_slice().len());
        // SAFETY: the buffer outlives the read, which is awaited.
        let memory = [unsafe { buffer.io(at, end - at) }];
        file.read(at as u64, &memory).await.unwrap();
        at = end;
        length = if length < 256 << 10 { length * 2 } else { SECTOR };
    }
    buffer.as_slice().to_vec()
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
        Some(SIGKILL),
        "the child ended by itself: {status}"
    );
    reader.join().unwrap();
    said.extend(lines.try_iter());
    said
}
