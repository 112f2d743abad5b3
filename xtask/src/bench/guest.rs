//! `cargo xtask bench guest`: disks as a guest has them, beside QEMU's in the same lab and run.
//!
//! Two guests with the same kernel and one processor run at the same time, one under smsvmm, whose disks are a raw image, and disks of
//! a pool on a plain volume and on a mirror; one under QEMU, with a raw image. In turns, each runs the same requests while the other is
//! idle. All files lie in one file system on a loop device in memory, which can bypass the page cache; all disks have been written in
//! full.
//!
//! Emulated processors have other costs than real ones: figures are ratios within the run. Time is the machine's, so that other load
//! shows: a lab whose time passes with instructions hung with two guests at once. Exits include those of the console lines that start
//! and end a load, some 150.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use lab::{Cache, Lab};
use stories::Vm;

use super::probe::Counts;
use super::{qemu_with_disk, smsvmm, with_io_load};
use crate::{build, host, setup};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How often each load is measured; the middle counts
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Another smsvmm than the one of this work tree
    #[arg(long)]
    program: Option<PathBuf>,
}

/// A load: name, block size in bytes, requests in flight, number of requests, whether it writes.
struct Load(&'static str, u32, u32, u32, bool);

const LOADS: [Load; 6] = [
    Load("4 KiB read, depth 1", 4096, 1, 600, false),
    Load("4 KiB write, depth 1", 4096, 1, 600, true),
    Load("4 KiB read, depth 32", 4096, 32, 3200, false),
    Load("4 KiB write, depth 32", 4096, 32, 3200, true),
    Load("128 KiB read, depth 8", 128 << 10, 8, 400, false),
    Load("128 KiB write, depth 8", 128 << 10, 8, 400, true),
];

/// A disk: what to call it, whose it is, and its name in the guest.
struct Subject {
    name: &'static str,
    machine: usize,
    device: &'static str,
}

const SUBJECTS: [Subject; 4] = [
    Subject {
        name: "QEMU, raw image",
        machine: 1,
        device: "/dev/vda",
    },
    Subject {
        name: "smsvmm, raw image",
        machine: 0,
        device: "/dev/vda",
    },
    Subject {
        name: "smsvmm, plain volume",
        machine: 0,
        device: "/dev/vdb",
    },
    Subject {
        name: "smsvmm, mirror",
        machine: 0,
        device: "/dev/vdc",
    },
];

/// The files, on a file system that can bypass the page cache.
const MAKE_FILES: &str = "cd /dev/shm; truncate -s 1500M backing; mke2fs -q -F -t ext4 -E nodiscard backing
    mkdir -p /files; busybox mount -t ext4 -o loop,noatime backing /files; cd /files
    truncate -s 64M ours.img qemu.img; truncate -s 256M d0.img d1.img d2.img";

/// The pool: one device for the plain volume, two for the mirror.
const MAKE_POOL: [&str; 6] = [
    "pool create tank d0.img d1.img d2.img",
    "file --devices d0.img,d1.img,d2.img format --meta-size 32M",
    "volume --devices d0.img,d1.img,d2.img create plain --size 96M --layout concat",
    "volume --devices d0.img,d1.img,d2.img create mirror --size 96M --layout mirror",
    "disk --devices d0.img,d1.img,d2.img create /plain.dsk --size 64M --volume plain",
    "disk --devices d0.img,d1.img,d2.img create /mirror.dsk --size 64M --volume mirror",
];

const DISKS: &str = "[[disk]]\nimage = \"/files/ours.img\"\n[[disk]]\nfile = \"/plain.dsk\"\n[[disk]]\nfile = \"/mirror.dsk\"\n\
    [pool]\ndevices = [\"/files/d0.img\", \"/files/d1.img\", \"/files/d2.img\"]\n";

const LIMIT: Duration = Duration::from_secs(1200);

/// The guest runs what its console says, one line after the other.
const SCRIPT: &str = "stty -echo; echo guest: ready
    while read -r line; do eval \"$line\"; echo guest: done $?; done";

/// Sets up, builds, and runs the measurement in the lab.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    setup::run(&setup::Options {
        refresh: false,
        debian: false,
    })?;
    let program = match &options.program {
        Some(program) => program.clone(),
        None => build::release("smsvmm")?,
    };
    let load = build::static_program("guest-tools", "io-load")?;
    let temporary = Cache::locate().path("tmp");
    fs::create_dir_all(&temporary)?;
    let folder = tempfile::Builder::new().prefix("bench.").tempdir_in(temporary)?;
    fs::copy(program, folder.path().join("smsvmm"))?;
    fs::copy(load, folder.path().join("io-load"))?;
    fs::copy(std::env::current_exe()?, folder.path().join("xtask"))?;
    host::step("measuring in the lab");
    let mut lab = Lab::builder().share(folder.path()).start()?;
    let command = format!("./xtask bench-inside guest --rounds {}", options.rounds);
    let status = lab.run_streaming(&command, LIMIT, host::show)?;
    Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What one load on one disk gave.
struct Measured {
    per_second: f64,
    exits: f64,
    to_user: f64,
}

/// The part in the lab.
pub(super) fn measure(folder: &Path, images: &Path, rounds: u32) -> Result<()> {
    lab::finish(Command::new("bash").args(["-e", "-c", MAKE_FILES]))?;
    for arguments in MAKE_POOL {
        let mut command = Command::new(folder.join("smsvmm"));
        lab::finish(command.current_dir("/files").args(arguments.split(' ')))?;
    }
    let mut machines = [start(folder, images, "ours")?, start(folder, images, "qemu")?];
    for subject in &SUBJECTS {
        // The first writes of a disk cost more, and holes are read for nothing.
        let line = format!(
            "dd if=/dev/urandom of={} bs=1M count=64 oflag=direct",
            subject.device
        );
        tell(&mut machines, subject, &line)?;
    }
    println!(
        "\nDisks in a guest: random requests with O_DIRECT, one processor, middle of {rounds} rounds (least to most)\n{:<24} {:<22} {:>10} {:>28} {:>8} {:>8}",
        "", "", "per second", "ratio to QEMU", "exits", "to user"
    );
    for load in &LOADS {
        let mut results: [Vec<Measured>; SUBJECTS.len()] = Default::default();
        for _ in 0..rounds {
            for (subject, results) in SUBJECTS.iter().zip(&mut results) {
                results.push(one(&mut machines, subject, load)?);
            }
        }
        print_load(load, &results);
    }
    Ok(())
}

fn one(machines: &mut [Vm; 2], subject: &Subject, load: &Load) -> Result<Measured> {
    let Load(_, block, depth, count, write) = load;
    let vm = machines.get(subject.machine).context("no machine")?;
    let process = vm.pid()?.as_raw_nonzero().get();
    let line = format!(
        "io-load {} {block} {depth} {count}{}",
        subject.device,
        if *write { " write" } else { "" }
    );
    let before = Counts::of_process(process)?;
    let said = tell(machines, subject, &line)?;
    let counts = Counts::of_process(process)?.since(before);
    // io-load: 600 requests in 0.123 s
    let seconds: f64 = said
        .split_once("requests in ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("io-load says {said:?}"))?;
    let requests = f64::from(*count);
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    let per_request = |number: u64| number as f64 / requests;
    Ok(Measured {
        per_second: requests / seconds,
        exits: per_request(counts.all),
        to_user: per_request(counts.pio + counts.mmio),
    })
}

/// Lets a guest run a line, and waits for its end; what it says.
fn tell(machines: &mut [Vm; 2], subject: &Subject, line: &str) -> Result<String> {
    let vm = machines.get_mut(subject.machine).context("no machine")?;
    vm.type_text(&format!("{line}\n"))?;
    let said = vm.until("guest: done ")?;
    let status = vm.until("\n")?;
    anyhow::ensure!(
        status.trim() == "0",
        "{}: {line:?} ended with {status}: {said}",
        subject.name
    );
    Ok(said)
}

fn print_load(load: &Load, results: &[Vec<Measured>]) {
    let of = |index: usize, value: fn(&Measured) -> f64| -> Vec<f64> {
        let mut values: Vec<f64> = results.get(index).into_iter().flatten().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let middle = |values: &[f64]| values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
    for (index, subject) in SUBJECTS.iter().enumerate() {
        // Round by round: neighbours in time have the same noise.
        let mut ratios: Vec<f64> = results
            .get(index)
            .into_iter()
            .flatten()
            .zip(results.first().into_iter().flatten())
            .map(|(ours, theirs)| ours.per_second / theirs.per_second)
            .collect();
        ratios.sort_by(f64::total_cmp);
        println!(
            "{:<24} {:<22} {:>10.0} {:>10.2} ({:>5.2} to {:>5.2}) {:>8.2} {:>8.2}",
            load.0,
            subject.name,
            middle(&of(index, |result| result.per_second)),
            middle(&ratios),
            ratios.first().copied().unwrap_or(f64::NAN),
            ratios.last().copied().unwrap_or(f64::NAN),
            middle(&of(index, |result| result.exits)),
            middle(&of(index, |result| result.to_user)),
        );
    }
}

fn start(folder: &Path, images: &Path, name: &str) -> Result<Vm> {
    let folder_of_machine = folder.join(name);
    fs::create_dir_all(&folder_of_machine)?;
    let machine = with_io_load(folder, images, &folder_of_machine.join("initrd"), SCRIPT)?;
    let command = if name == "ours" {
        smsvmm(&machine, "bzImage", DISKS)?
    } else {
        qemu_with_disk(&machine, Path::new("/files/qemu.img"), "none")
    };
    let begin = Instant::now();
    let vm = Vm::launch(command, &folder_of_machine, LIMIT)?;
    vm.wait_for("guest: ready")
        .with_context(|| format!("the guest of {name} does not come up"))?;
    println!("{name}: ready after {:.1} s", begin.elapsed().as_secs_f64());
    Ok(vm)
}
