//! The mover beside other programs that do the same job, in the same run on the same files: `cargo xtask bench mover`.
//!
//! ```text
//! cargo bench -p smsvmm --bench mover -- FOLDER [--rounds N] [--mib N] [--only PART] [--program SMSVMM]
//! ```
//! One image of data that does not compress, in a pool on a file in FOLDER and as a raw file beside it; FOLDER should be in memory, as it is the
//! programs that are measured. This program has the pool open and answers the mover's questions, as a machine does; the mover is a
//! process of its own, which reads the file of the pool and writes its archive to FOLDER. All that is written is durable in the time that counts.
//!
//! # What is compared
//! - *fio* reads and writes 1 MiB at a time, 8 in flight, past the page cache: what the files can do.
//! - *qemu-img convert*, *dd*, *cp* make a raw copy of the raw file. They compute no checksums.
//! - *sha256sum* reads an archive, as verifying does; *borg* does all that the mover does, if it is installed. It looks for doubles, which we do not.
//!
//! CPU time is user and system of the processes, by the kernel's accounts. What the kernel does on its own threads (writing back of `cp`, for one)
//! is in none of them. Rounds alternate; the medians count, and ratios are those of the same round.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench fails by panicking"
)]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a bench"
)]

#[path = "../../tests/pool_machine/mod.rs"]
mod pool_machine;

mod ours;
mod peers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// A measurement: seconds, and seconds of CPU time.
#[derive(Debug, Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
    /// GiB that were to be copied.
    gib: f64,
}

impl Took {
    fn speed(self) -> f64 {
        self.gib * 1024.0 / self.wall
    }

    fn cpu(self) -> f64 {
        self.cpu / self.gib
    }
}

struct Options {
    folder: PathBuf,
    program: PathBuf,
    rounds: usize,
    size: u64,
    only: Vec<String>,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self {
            folder: PathBuf::from("/dev/shm"),
            program: PathBuf::from(env!("CARGO_BIN_EXE_smsvmm")),
            rounds: 5,
            size: 1 << 30,
            only: Vec::new(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().expect("a value");
            match argument.as_str() {
                "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
                "--mib" => options.size = value().parse::<u64>().expect("a number of MiB") << 20,
                "--only" => options.only.extend(value().split(',').map(str::to_owned)),
                "--program" => options.program = value().into(),
                // Of cargo.
                "--bench" => {}
                folder => options.folder = folder.into(),
            }
        }
        options
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }
}

/// CPU time in seconds of all processes that this one has waited for.
fn of_children() -> f64 {
    // SAFETY: all zeroes are a value of this structure, and the call writes no more than it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Runs a program to its end.
fn run(command: &mut Command, gib: f64) -> Took {
    let (cpu, begin) = (of_children(), Instant::now());
    let output = command.stdin(Stdio::null()).output().expect("the program starts");
    let wall = begin.elapsed().as_secs_f64();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Took {
        wall,
        cpu: of_children() - cpu,
        gib,
    }
}

fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output();
    found.is_ok_and(|output| output.status.success())
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

type Measured = BTreeMap<&'static str, Vec<Took>>;

fn main() {
    let options = Options::parse();
    let folder = tempfile::Builder::new()
        .prefix("bench-mover.")
        .tempdir_in(&options.folder)
        .unwrap();
    let ours = ours::Ours::new(&options, folder.path());
    let peers = peers::Peers::new(folder.path(), options.size);
    let mut order = Vec::new();
    let mut measured = Measured::new();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        let mut take = |name: &'static str, took: Took| {
            if round == 0 {
                order.push(name);
            }
            measured.entry(name).or_default().push(took);
        };
        peers.measure(&options, &mut take);
        ours.measure(&options, &mut take);
    }
    print(&order, &measured);
}

/// Which is compared with which.
const RATIOS: &[(&str, &[&str])] = &[
    (
        "mover: full",
        &[
            "fio: read",
            "fio: write",
            "qemu-img convert",
            "dd",
            "cp, sync",
            "borg create",
        ],
    ),
    ("mover: incremental", &["mover: full"]),
    ("mover: verify", &["fio: read", "sha256sum", "borg check"]),
    (
        "mover: restore",
        &["fio: write", "qemu-img convert", "dd", "cp, sync", "borg extract"],
    ),
];

fn print(order: &[&'static str], measured: &Measured) {
    println!(
        "{:<28}{:>10}{:>22}{:>16}",
        "medians", "MiB/s", "(least to most)", "CPU s per GiB"
    );
    for name in order {
        let all = &measured[name];
        let speeds: Vec<f64> = all.iter().map(|took| took.speed()).collect();
        let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = speeds.iter().copied().fold(0.0, f64::max);
        let cpu = median(all.iter().map(|took| took.cpu()).collect());
        let range = format!("({least:.0} to {most:.0})");
        println!("{name:<28}{:>10.0}{range:>22}{cpu:>16.2}", median(speeds));
    }
    println!("\nratios, each of the same round: median (least to most) of MiB/s; median of CPU time per GiB");
    for (name, others) in RATIOS {
        for other in *others {
            let (Some(one), Some(other_all)) = (measured.get(name), measured.get(other)) else {
                continue;
            };
            let of = |what: fn(Took) -> f64| -> Vec<f64> {
                one.iter()
                    .zip(other_all)
                    .map(|(one, other)| what(*one) / what(*other))
                    .collect()
            };
            let speeds = of(Took::speed);
            let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
            let most = speeds.iter().copied().fold(0.0, f64::max);
            let what = format!("{name} to {other}");
            let (speed, cpu) = (median(speeds), median(of(Took::cpu)));
            println!("{what:<52}{speed:6.2} ({least:.2} to {most:.2}){cpu:10.2}");
        }
    }
}
