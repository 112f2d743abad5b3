//! `cargo xtask bench disks`: disks over vhost-user-blk, ours beside qemu-storage-daemon's and what fio gets without any of it.
//!
//! All in one run, in turns, on files in memory (XFS on zram if this may be made, else tmpfs, which has no O_DIRECT on older
//! kernels), from the same load generator: compare within a run. CPU time is that of the serving process, user and system.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lab::finish;
use serde_json::Value;

use super::filesys::{Zram, programs};
use crate::{build, host};

const SIZE: u64 = 1 << 30;

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long each load runs, in seconds
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// How often each is measured; the middle counts
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only subjects whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Files in this folder instead of memory
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// A load: name, pattern (as fio calls it, too), block size, depth.
const LOADS: [(&str, &str, u32, u32); 6] = [
    ("rr1", "randread", 4096, 1),
    ("rw1", "randwrite", 4096, 1),
    ("rr32", "randread", 4096, 32),
    ("rw32", "randwrite", 4096, 32),
    ("r128", "read", 128 << 10, 16),
    ("w128", "write", 128 << 10, 16),
];

/// Who is measured.
struct Subject {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    /// fio on the file.
    Fio,
    /// `smsvmm share vhost-user` with these arguments behind the socket. IMAGE is the raw file.
    Ours(&'static [&'static str]),
    /// qemu-storage-daemon with this format on this file.
    Qemu(&'static str, &'static str),
}

const SUBJECTS: &[Subject] = &[
    Subject {
        name: "limit: fio io_uring",
        kind: Kind::Fio,
    },
    Subject {
        name: "floor",
        kind: Kind::Ours(&["--image", "IMAGE"]),
    },
    Subject {
        name: "floor, polling 50 µs",
        kind: Kind::Ours(&["--poll-us", "50", "--image", "IMAGE"]),
    },
    Subject {
        name: "qemu-storage-daemon raw",
        kind: Kind::Qemu("raw", "disk.raw"),
    },
    Subject {
        name: "qemu-storage-daemon qcow2",
        kind: Kind::Qemu("qcow2", "disk.qcow2"),
    },
    Subject {
        name: "qemu-storage-daemon overlay",
        kind: Kind::Qemu("qcow2", "overlay.qcow2"),
    },
];

/// What ratios refer to.
const REFERENCE: &str = "qemu-storage-daemon raw";

/// One measurement.
#[derive(Clone, Copy)]
struct Figures {
    iops: f64,
    micros: f64,
    latency: f64,
}

struct Place {
    folder: PathBuf,
    smsvmm: PathBuf,
    load: PathBuf,
    tree: Option<PathBuf>,
}

/// Runs all and prints.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let zram = if options.folder.is_none() {
        Some(Zram::make())
    } else {
        None
    };
    let folder = match (&options.folder, &zram) {
        (Some(folder), _) => folder.clone(),
        (None, Some(Ok(zram))) => zram.folder.path().to_path_buf(),
        _ => {
            host::step("tmpfs instead of XFS on zram");
            PathBuf::from("/dev/shm")
        }
    };
    let folder = tempfile::Builder::new()
        .prefix("bench-disks.")
        .tempdir_in(folder)?;
    let place = Place {
        folder: folder.path().to_path_buf(),
        smsvmm: build::release("smsvmm")?,
        load: build::release("vhost-user-load")?,
        tree: programs()?,
    };
    place.make_images()?;
    let chosen: Vec<_> = SUBJECTS
        .iter()
        .filter(|subject| {
            options
                .only
                .as_ref()
                .is_none_or(|only| subject.name.contains(only))
        })
        .collect();
    let mut figures: BTreeMap<(&str, &str), Vec<Figures>> = BTreeMap::new();
    for round in 0..options.rounds {
        for subject in &chosen {
            host::step(&format!("round {}: {}", round + 1, subject.name));
            match place.measure(subject, options.seconds) {
                Ok(all) => {
                    for (load, found) in all {
                        figures.entry((subject.name, load)).or_default().push(found);
                    }
                }
                Err(error) => host::step(&format!("without {}: {error:#}", subject.name)),
            }
        }
    }
    print(&chosen, &figures);
    Ok(ExitCode::SUCCESS)
}

/// The middle of what was measured, by IOPS.
fn middle(found: &[Figures]) -> Option<Figures> {
    let mut sorted = found.to_vec();
    sorted.sort_by(|one, other| one.iops.total_cmp(&other.iops));
    sorted.get(sorted.len() / 2).copied()
}

fn print(subjects: &[&Subject], figures: &BTreeMap<(&str, &str), Vec<Figures>>) {
    let of = |subject, load| figures.get(&(subject, load)).and_then(|found| middle(found));
    type Column = fn(Figures, Option<Figures>) -> String;
    let tables: [(&str, Column); 3] = [
        (
            "thousands of IOPS (times qemu-storage-daemon raw)",
            |found, reference| {
                let times = reference.map_or(f64::NAN, |reference| found.iops / reference.iops);
                format!("{:.1} ({times:.2})", found.iops / 1e3)
            },
        ),
        (
            "µs of CPU time per request (times qemu-storage-daemon raw)",
            |found, reference| {
                let times = reference.map_or(f64::NAN, |reference| found.micros / reference.micros);
                format!("{:.2} ({times:.2})", found.micros)
            },
        ),
        ("µs of latency, mean", |found, _| format!("{:.1}", found.latency)),
    ];
    for (title, column) in tables {
        println!(
            "\n{title}\n{:<28}{}",
            "",
            LOADS.map(|load| format!("{:>16}", load.0)).concat()
        );
        for subject in subjects {
            print!("{:<28}", subject.name);
            for (load, ..) in LOADS {
                let text = of(subject.name, load)
                    .map_or_else(String::new, |found| column(found, of(REFERENCE, load)));
                print!("{text:>16}");
            }
            println!();
        }
    }
}

/// A server that ends with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn qemu(&self, program: &str) -> Command {
        match &self.tree {
            Some(tree) => {
                let mut command = Command::new(tree.join("usr/bin").join(program));
                command.env("LD_LIBRARY_PATH", tree.join("usr/lib/x86_64-linux-gnu"));
                command
            }
            None => Command::new(program),
        }
    }

    /// A raw file full of data that does not compress, a qcow2 file with the same, an empty overlay over another such.
    fn make_images(&self) -> Result<()> {
        let raw = self.path("disk.raw");
        let mut random = fs::File::open("/dev/urandom")?;
        let mut piece = vec![0; 4 << 20];
        let mut file = fs::File::create(&raw)?;
        std::io::Read::read_exact(&mut random, &mut piece)?;
        for number in 0..SIZE / piece.len() as u64 {
            // Each block of each piece differs, without asking for a gigabyte of randomness.
            piece
                .chunks_mut(4096)
                .for_each(|block| block[..8].copy_from_slice(&number.to_le_bytes()));
            file.write_all(&piece)?;
        }
        file.sync_all()?;
        let qcow2 = self.path("disk.qcow2");
        let mut convert = self.qemu("qemu-img");
        finish(convert.args(["convert", "-O", "qcow2"]).arg(&raw).arg(&qcow2))?;
        let base = self.path("base.qcow2");
        fs::copy(&qcow2, &base)?;
        let mut create = self.qemu("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
        finish(create.arg(&base).arg(self.path("overlay.qcow2")))?;
        Ok(())
    }

    fn measure(&self, subject: &Subject, seconds: u32) -> Result<Vec<(&'static str, Figures)>> {
        let socket = self.path("disk.sock");
        let mut command = match &subject.kind {
            Kind::Fio => {
                return LOADS
                    .iter()
                    .map(|load| Ok((load.0, self.fio(*load, seconds)?)))
                    .collect();
            }
            Kind::Ours(arguments) => {
                let mut command = Command::new(&self.smsvmm);
                command.args(["share", "vhost-user", "--socket"]).arg(&socket);
                let image = self.path("disk.raw");
                command.args(arguments.iter().map(|argument| match *argument {
                    "IMAGE" => image.as_os_str(),
                    other => other.as_ref(),
                }));
                command
            }
            Kind::Qemu(format, file) => self.storage_daemon(format, file, &socket),
        };
        // What a killed server left.
        let _ = fs::remove_file(&socket);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut start = || -> Result<Server> {
            let child = command.spawn();
            Ok(Server(
                child.with_context(|| format!("cannot start {}", subject.name))?,
            ))
        };
        let mut server = start()?;
        let begin = Instant::now();
        while !socket.exists() {
            if begin.elapsed() > Duration::from_secs(20) {
                bail!("it does not listen");
            }
            std::thread::sleep(Duration::from_millis(50));
            if server.0.try_wait()?.is_some() {
                // The file of a server that has just ended may be locked for a while: the kernel lets go of it late.
                server = start()?;
            }
        }
        LOADS
            .iter()
            .map(|load| Ok((load.0, self.load(*load, &socket, seconds)?)))
            .collect()
    }

    fn storage_daemon(&self, format: &str, file: &str, socket: &Path) -> Command {
        let mut command = self.qemu("qemu-storage-daemon");
        let file = self.path(file);
        command.args(["--object", "iothread,id=io", "--blockdev"]);
        command.arg(format!(
            "driver=file,node-name=file,filename={},cache.direct=on,aio=io_uring,discard=unmap",
            file.display()
        ));
        command.args([
            "--blockdev",
            &format!("driver={format},node-name=disk,file=file"),
            "--export",
        ]);
        command.arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,iothread=io",
            socket.display()
        ));
        command
    }

    fn load(&self, load: (&str, &str, u32, u32), socket: &Path, seconds: u32) -> Result<Figures> {
        let (_, pattern, block, depth) = load;
        let mut command = Command::new(&self.load);
        command.arg("--json").arg("--socket").arg(socket);
        for (key, value) in [
            ("--pattern", pattern.to_owned()),
            ("--block-size", block.to_string()),
            ("--depth", depth.to_string()),
            ("--seconds", seconds.to_string()),
        ] {
            command.args([key, &value]);
        }
        let report: Value = serde_json::from_slice(&finish(&mut command)?)?;
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        Ok(Figures {
            iops: number(&report["iops"]),
            micros: number(&report["server_cpu_micros"]),
            latency: number(&report["latency"]["mean"]),
        })
    }

    fn fio(&self, load: (&str, &str, u32, u32), seconds: u32) -> Result<Figures> {
        let (_, pattern, block, depth) = load;
        let mut command = Command::new("fio");
        command.args([
            "--name=limit",
            "--direct=1",
            "--ioengine=io_uring",
            "--time_based",
            "--output-format=json",
        ]);
        command.arg(format!("--filename={}", self.path("disk.raw").display()));
        command
            .arg(format!("--rw={pattern}"))
            .arg(format!("--bs={block}"));
        command
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--runtime={seconds}"));
        let report: Value = serde_json::from_slice(&finish(&mut command)?)?;
        let job = &report["jobs"][0];
        let side = &job[if pattern.ends_with("read") {
            "read"
        } else {
            "write"
        }];
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let iops = number(&side["iops"]);
        Ok(Figures {
            iops,
            micros: (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0 * 1e6 / iops,
            latency: number(&side["lat_ns"]["mean"]) / 1e3,
        })
    }
}
