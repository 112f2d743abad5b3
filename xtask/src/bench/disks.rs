//! `cargo xtask bench disks`: disks over vhost-user-blk, ours beside qemu-storage-daemon's and what fio gets without any of it.
//!
//! ```text
//!   subjects   who is measured, and by which loads
//!   pool       a pool with the disks that the subjects of the full stack serve
//!   goals      the ratios that were to be reached, and whether they were
//! ```
//! All in one run, in turns, on files in memory (XFS on zram if this may be made, else tmpfs, which has no O_DIRECT on older
//! kernels), from the same load generator: compare within a run. CPU time is that of the serving process, user and system.

mod goals;
mod pool;
mod subjects;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lab::finish;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::filesys::{InMemory, Zram, programs};
use crate::{build, host};
use pool::Pool;
use subjects::{Kind, LOADS, Load, SUBJECTS, Subject};

/// Bytes of a page, of which zram keeps a word if it has no other.
const PAGE: usize = 4096;

/// Bytes of each disk.
const SIZE: u64 = 512 << 20;

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long each load runs, in seconds
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// How often each is measured; the middle counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only subjects whose names contain one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these loads: rr1, rw1, rr32, rw32, fw32, r128, w128, sr128, sw128
    #[arg(long, value_delimiter = ',')]
    loads: Vec<String>,
    /// What the files are filled with, and what is written
    #[arg(long, value_enum, default_value_t = Data::Noise)]
    data: Data,
    /// Files in this folder instead of memory
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Pools and the raw image on block devices in memory, without a file system of the host between; qcow2 images are files
    #[arg(long, conflicts_with = "folder")]
    block_devices: bool,
    /// Servers on the first processor and the load generator on the second, instead of where the kernel puts them
    #[arg(long)]
    apart: bool,
    /// Measure these programs, which are built, instead of building them
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
}

/// What data are like.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Data {
    /// They do not compress: zram's own work is the largest part of a write
    Noise,
    /// In each page one word over and over: zram keeps the word, so the device costs next to nothing
    Words,
}

impl Data {
    /// As the load generator calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Words => "words",
        }
    }

    /// What fio needs to write such data: its own buffers are noise.
    fn fio(self) -> &'static [&'static str] {
        match self {
            Self::Noise => &[],
            Self::Words => &["--buffer_pattern=0x6d7673732d6f6966"],
        }
    }
}

/// One measurement.
#[derive(Clone, Copy)]
struct Figures {
    iops: f64,
    /// CPU time per request in µs.
    micros: f64,
    /// The middle latency in µs.
    latency: f64,
}

/// What was measured: of each subject and load one per round.
type Measured = BTreeMap<(&'static str, &'static str), Vec<Option<Figures>>>;

struct Place {
    folder: PathBuf,
    data: Data,
    apart: bool,
    smsvmm: PathBuf,
    load: PathBuf,
    tree: Option<PathBuf>,
}

/// Runs all and prints.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let memory = options.folder.is_none().then(InMemory::make);
    let folder = match (&options.folder, &memory) {
        (Some(folder), _) => folder.clone(),
        (None, Some(Ok(memory))) => memory.folder.path().to_path_buf(),
        _ => {
            host::step("tmpfs instead of XFS on zram");
            PathBuf::from("/dev/shm")
        }
    };
    let folder = tempfile::Builder::new()
        .prefix("bench-disks.")
        .tempdir_in(folder)?;
    let program = |name| {
        options
            .programs
            .as_ref()
            .map_or_else(|| build::release(name), |folder| Ok(folder.join(name)))
    };
    let place = Place {
        folder: folder.path().to_path_buf(),
        data: options.data,
        apart: options.apart,
        smsvmm: program("smsvmm")?,
        load: program("vhost-user-load")?,
        tree: programs()?,
    };
    let loads: Vec<&Load> = LOADS
        .iter()
        .filter(|load| options.loads.is_empty() || options.loads.iter().any(|name| name == load.name))
        .collect();
    let chosen: Vec<&Subject> = SUBJECTS
        .iter()
        .filter(|subject| {
            let named = |only: &String| subject.name.contains(only.as_str());
            (options.only.is_empty() || options.only.iter().any(named))
                && loads.iter().any(|load| subject.takes(load))
        })
        .collect();
    host::step("making the images and the pool");
    let devices = if options.block_devices {
        place.link_block_devices()?
    } else {
        Vec::new()
    };
    place.make_images()?;
    let disks = chosen
        .iter()
        .filter_map(|subject| subject.disk())
        .collect::<Vec<_>>();
    if !disks.is_empty() {
        place.pool().make(&disks)?;
    }
    let mut measured = Measured::new();
    for round in 0..options.rounds {
        host::step(&format!("round {} of {}", round + 1, options.rounds));
        for subject in &chosen {
            match place.measure(subject, &loads, options.seconds) {
                Ok(all) => {
                    for (load, found) in all {
                        let rounds = measured.entry((subject.name, load)).or_default();
                        rounds.resize(round, None);
                        rounds.push(Some(found));
                    }
                }
                Err(error) => host::step(&format!("without {}: {error:#}", subject.name)),
            }
        }
    }
    let in_memory = memory.iter().flatten().map(|made| &made.zram).next();
    println!(
        "\ndata: {}{}",
        options.data.name(),
        same_pages(devices.first().or(in_memory))
    );
    print(&chosen, &loads, &measured);
    goals::print(&measured);
    Ok(ExitCode::SUCCESS)
}

/// How many pages a device in memory keeps as a word, for the reader to see that it does.
fn same_pages(zram: Option<&Zram>) -> String {
    match zram.map(Zram::same_pages) {
        None => String::new(),
        Some(Ok((same, all))) => format!("; zram keeps {same} of {all} pages as a word"),
        Some(Err(error)) => format!("; what zram does with it is not known: {error:#}"),
    }
}

/// The middle of some numbers.
fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}

fn print(subjects: &[&Subject], loads: &[&Load], measured: &Measured) {
    type Column = fn(&Figures) -> f64;
    let tables: [(&str, Column); 3] = [
        ("thousands of IOPS", |found| found.iops / 1e3),
        ("µs of CPU time per request", |found| found.micros),
        ("µs of latency, the middle of all requests", |found| {
            found.latency
        }),
    ];
    for (title, column) in tables {
        let names: String = loads.iter().map(|load| format!("{:>9}", load.name)).collect();
        println!("\n{title}: medians of the rounds\n{:<34}{names}", "");
        for subject in subjects {
            print!("{:<34}", subject.name);
            for load in loads {
                let rounds = measured.get(&(subject.name, load.name));
                let all = rounds.map(|rounds| rounds.iter().flatten().map(column).collect());
                match all.and_then(median) {
                    Some(middle) => print!("{middle:>9.2}"),
                    None => print!("{:>9}", ""),
                }
            }
            println!();
        }
    }
}

/// A server that ends with this.
pub(super) struct Server(pub(super) Child);

impl Drop for Server {
    fn drop(&mut self) {
        // One that has a pool open closes it; whoever does not end is killed. It may have ended.
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(5) && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
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
                let mut command = self.on_processor(0, &tree.join("usr/bin").join(program));
                command.env("LD_LIBRARY_PATH", tree.join("usr/lib/x86_64-linux-gnu"));
                command
            }
            None => self.on_processor(0, Path::new(program)),
        }
    }

    /// A program that runs on this processor, if that is wanted.
    fn on_processor(&self, number: usize, program: &Path) -> Command {
        if !self.apart {
            return Command::new(program);
        }
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &number.to_string()]).arg(program);
        command
    }

    /// Makes block devices in memory of what would be files: the raw image, and the pool's devices.
    fn link_block_devices(&self) -> Result<Vec<Zram>> {
        let mut devices = Vec::new();
        let sizes = [("disk.raw", SIZE)].into_iter();
        for (name, size) in sizes.chain(pool::DEVICES.map(|name| (name, pool::DEVICE))) {
            let device = Zram::make(size)?;
            std::os::unix::fs::symlink(device.path(), self.path(name))?;
            devices.push(device);
        }
        Ok(devices)
    }

    /// A raw file full of the data, a qcow2 file with the same, another such to be below overlays.
    fn make_images(&self) -> Result<()> {
        let raw = self.path("disk.raw");
        let mut piece = vec![0; 4 << 20];
        let mut file = fs::File::create(&raw)?;
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut piece)?;
        let pieces = (0..SIZE).step_by(piece.len());
        for start in pieces {
            // Each page of each piece differs, without asking for a gigabyte of randomness.
            for (page, bytes) in (start..).step_by(PAGE).zip(piece.chunks_mut(PAGE)) {
                let word = (!page).to_le_bytes();
                match self.data {
                    Data::Noise => bytes[..8].copy_from_slice(&word),
                    Data::Words => bytes.chunks_mut(8).for_each(|place| place.copy_from_slice(&word)),
                }
            }
            file.write_all(&piece)?;
        }
        file.sync_all()?;
        let qcow2 = self.path("disk.qcow2");
        let mut convert = self.qemu("qemu-img");
        finish(convert.args(["convert", "-O", "qcow2"]).arg(&raw).arg(&qcow2))?;
        fs::copy(&qcow2, self.path("base.qcow2"))?;
        Ok(())
    }

    /// An empty overlay.
    fn make_overlay(&self, file: &str, options: &str) -> Result<()> {
        let mut create = self.qemu("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-o", options, "-b"]);
        finish(create.arg(self.path("base.qcow2")).arg(self.path(file)))?;
        Ok(())
    }

    fn pool(&self) -> Pool<'_> {
        Pool(self)
    }

    fn measure(
        &self,
        subject: &Subject,
        loads: &[&Load],
        seconds: f64,
    ) -> Result<Vec<(&'static str, Figures)>> {
        let loads = loads.iter().filter(|load| subject.takes(load));
        let socket = self.path("disk.sock");
        let mut command = match &subject.kind {
            Kind::Fio(arguments) => {
                return loads
                    .map(|load| Ok((load.name, self.fio(load, arguments, seconds)?)))
                    .collect();
            }
            Kind::Image(arguments) => {
                let mut command = self.share(&socket, arguments);
                command.arg("--image").arg(self.path("disk.raw"));
                command
            }
            Kind::Pool(disk, arguments) => {
                if disk.is_fresh() {
                    self.pool().freshen(*disk)?;
                }
                let mut command = self.share(&socket, arguments);
                self.pool().serve(*disk, &mut command);
                command
            }
            Kind::Qemu(format, file) => self.storage_daemon(format, file, &socket),
            Kind::Overlay(options) => {
                self.make_overlay("overlay.qcow2", options)?;
                self.storage_daemon("qcow2", "overlay.qcow2", &socket)
            }
        };
        let _server = start(&mut command, &socket).with_context(|| subject.name)?;
        loads
            .map(|load| Ok((load.name, self.load(load, &socket, seconds)?)))
            .collect()
    }

    fn share(&self, socket: &Path, arguments: &[&str]) -> Command {
        let mut command = self.on_processor(0, &self.smsvmm);
        command.args(["share", "vhost-user", "--socket"]).arg(socket);
        command.args(arguments);
        command
    }

    fn storage_daemon(&self, format: &str, file: &str, socket: &Path) -> Command {
        let mut command = self.qemu("qemu-storage-daemon");
        let file = self.path(file);
        let kind = if file.is_file() { "file" } else { "host_device" };
        command.args(["--object", "iothread,id=io", "--blockdev"]);
        command.arg(format!(
            "driver={kind},node-name=file,filename={},cache.direct=on,aio=io_uring,discard=unmap",
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

    fn load(&self, load: &Load, socket: &Path, seconds: f64) -> Result<Figures> {
        let seconds = seconds.to_string();
        let mut arguments = vec!["--json", "--seconds", &seconds];
        arguments.extend(load.arguments);
        let report: Value = serde_json::from_slice(&self.generate(socket, &arguments)?)?;
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        Ok(Figures {
            iops: number(&report["iops"]),
            micros: number(&report["server_cpu_micros"]),
            latency: number(&report["latency"]["p50"]),
        })
    }

    /// Runs the load generator.
    fn generate(&self, socket: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = self.on_processor(1, &self.load);
        command.args(["--data", self.data.name(), "--socket"]);
        finish(command.arg(socket).args(arguments))
    }

    fn fio(&self, load: &Load, arguments: &[&str], seconds: f64) -> Result<Figures> {
        let mut command = self.on_processor(0, Path::new("fio"));
        command.args([
            "--name=limit",
            "--direct=1",
            "--ioengine=io_uring",
            "--time_based",
            "--lat_percentiles=1",
            "--output-format=json",
        ]);
        command.arg(format!("--filename={}", self.path("disk.raw").display()));
        command.arg(format!("--runtime={}ms", (seconds * 1e3).round()));
        let report: Value = serde_json::from_slice(&finish(
            command.args(load.fio).args(arguments).args(self.data.fio()),
        )?)?;
        let job = &report["jobs"][0];
        let side = &job[if load.writes() { "write" } else { "read" }];
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let iops = number(&side["iops"]);
        Ok(Figures {
            iops,
            micros: (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0 * 1e6 / iops,
            latency: number(&side["lat_ns"]["percentile"]["50.000000"]) / 1e3,
        })
    }
}

/// Starts a server, and waits until it listens.
fn start(command: &mut Command, socket: &Path) -> Result<Server> {
    // What a killed server left.
    let _ = fs::remove_file(socket);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut launch = || -> Result<Server> { Ok(Server(command.spawn().context("cannot start the server")?)) };
    let mut server = launch()?;
    let begin = Instant::now();
    while !socket.exists() {
        if begin.elapsed() > Duration::from_secs(20) {
            bail!("the server does not listen");
        }
        std::thread::sleep(Duration::from_millis(50));
        if server.0.try_wait()?.is_some() {
            // The file of a server that has just ended may be locked for a while: the kernel lets go of it late.
            server = launch()?;
        }
    }
    Ok(server)
}
