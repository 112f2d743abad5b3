//! `cargo xtask bench boot`: what a guest costs, as exits, time and memory, beside QEMU on the same host in the same run.
//!
//! The boot runs in the lab with time that passes with instructions, so that the figures repeat. One processor, 256 MiB, Debian 12's
//! cloud kernel, an initrd whose init says so and waits. Each machine runs twice: quietly, to count exits, and with early
//! output, to see when the first character comes.

pub(crate) mod api;
mod disk;
pub(crate) mod disks;
mod exits;
pub(crate) mod filesys;
pub(crate) mod guest;
pub(crate) mod mover;
mod probe;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use lab::{Archive, Cache, Lab};
use stories::Vm;

use crate::{build, host, setup};
use probe::{Counts, FirstEntry};

/// How long one machine may take to its init.
const LIMIT: Duration = Duration::from_secs(120);

/// Memory of each guest in MiB.
const GUEST_MIB: u64 = 256;

/// Says when init runs, and gives the measurement time.
const INIT: &str = "#!/bin/busybox sh\n/bin/busybox mount -t proc proc /proc\nread -r up rest < /proc/uptime\n\
                    echo \"guest: init at $up\"\n/bin/busybox sleep 4\n/bin/busybox poweroff -f\n";

/// Sets up, builds, and runs the measurements in the lab.
pub(crate) fn run(program: Option<PathBuf>, with_disk: bool) -> Result<ExitCode> {
    setup::run(&setup::Options {
        refresh: false,
        debian: false,
    })?;
    let smsvmm = program.map_or_else(|| build::release("smsvmm"), Ok)?;
    let load = build::static_program("guest-tools", "io-load")?;
    let temporary = Cache::locate().path("tmp");
    fs::create_dir_all(&temporary)?;
    let folder = tempfile::Builder::new().prefix("bench.").tempdir_in(temporary)?;
    fs::copy(smsvmm, folder.path().join("smsvmm"))?;
    fs::copy(load, folder.path().join("io-load"))?;
    fs::copy(std::env::current_exe()?, folder.path().join("xtask"))?;
    host::step("measuring in the lab");
    let parts = if with_disk {
        &["boot", "exits-in-memory", "exits-away", "disk"][..]
    } else {
        &["boot"]
    };
    for part in parts {
        // `perf stat` on QEMU hangs a lab whose time passes with instructions; ratios of requests need no exact time.
        let mut lab = Lab::builder()
            .deterministic(*part != "disk")
            .share(folder.path())
            .start()?;
        let limit = Duration::from_secs(if part.starts_with("exits") { 240 } else { 1200 });
        match lab.run_streaming(&format!("./xtask bench-inside {part}"), limit, host::show) {
            Ok(0) => {}
            Ok(status) => return Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)),
            Err(error) if part.starts_with("exits") => host::step(&format!("without {part}: {error:#}")),
            Err(error) => return Err(error),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How a virtual machine monitor is told to boot a machine.
type Start = Box<dyn Fn(&Machine) -> Result<Command>>;

/// A virtual machine monitor and how it is told to boot.
struct Contender {
    name: &'static str,
    command: Start,
}

/// What to boot.
struct Machine {
    folder: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    command_line: String,
}

/// One part of the measurements, in the lab.
pub(crate) fn inside(part: &str, rounds: u32) -> Result<ExitCode> {
    let folder = std::env::current_dir()?;
    let images = Path::new("/images/debian-12-cloud");
    match part {
        "boot" => boot(&folder, images)?,
        "exits-in-memory" => exits::measure(&folder, images, exits::IN_MEMORY)?,
        "exits-away" => exits::measure(&folder, images, exits::AWAY)?,
        "disk" => disk::measure(&folder, images)?,
        "guest" => guest::measure(&folder, images, rounds)?,
        _ => anyhow::bail!("there is no measurement {part:?}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn boot(folder: &Path, images: &Path) -> Result<()> {
    let mut files = Archive::default();
    files.file("init", 0o755, INIT);
    let initrd = extended(&images.join("initrd"), &files, &folder.join("initrd"))?;
    let contenders = [
        Contender {
            name: "smsvmm, bzImage",
            command: Box::new(|machine| smsvmm(machine, "bzImage", "")),
        },
        Contender {
            name: "smsvmm, ELF",
            command: Box::new(|machine| smsvmm(machine, "vmlinux", "")),
        },
        Contender {
            name: "smsvmm, disk + net",
            command: Box::new(|machine| {
                smsvmm(
                    machine,
                    "bzImage",
                    "[[disk]]\nimage = \"disk.img\"\n[[net]]\nbackend = \"user\"\n",
                )
            }),
        },
        Contender {
            name: "QEMU microvm",
            command: Box::new(|machine| Ok(qemu(machine, "microvm,acpi=on,rtc=on,pit=off,pic=off"))),
        },
        Contender {
            name: "QEMU pc",
            command: Box::new(|machine| Ok(qemu(machine, "pc"))),
        },
    ];
    fs::File::create(folder.join("disk.img")).and_then(|file| file.set_len(64 << 20))?;
    // What is read from a cold disk would count as time.
    for file in [
        folder.join("smsvmm"),
        images.join("bzImage"),
        images.join("vmlinux"),
    ] {
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let mut rows = Vec::new();
    for contender in &contenders {
        let machine = Machine {
            folder: folder.to_path_buf(),
            kernel: images.join("bzImage"),
            initrd: initrd.clone(),
            command_line: "console=ttyS0 quiet panic=-1".into(),
        };
        rows.push(
            measure(contender, machine).with_context(|| format!("{} cannot be measured", contender.name))?,
        );
    }
    print_boot(&rows);
    Ok(())
}

/// One line of the table.
struct Row {
    name: &'static str,
    exits: Counts,
    private_kib: u64,
    threads: usize,
    wakes: u64,
    first_entry: f64,
    first_output: f64,
    init: f64,
}

fn measure(contender: &Contender, mut machine: Machine) -> Result<Row> {
    let folder = machine.folder.clone();
    let begin = Instant::now();
    let vm = Vm::launch((contender.command)(&machine)?, &folder, LIMIT)?;
    vm.wait_for("guest: init at")?;
    let init = begin.elapsed().as_secs_f64();
    let process = vm.pid()?.as_raw_nonzero().get();
    let exits = Counts::of_process(process)?;
    let private_kib = probe::private_kib(process, GUEST_MIB)?;
    let threads = probe::threads(process)?.len();
    let before = probe::wakes(process)?;
    std::thread::sleep(Duration::from_secs(2));
    let wakes = probe::wakes(process)?.saturating_sub(before);
    drop(vm);

    machine.command_line.push_str(" earlyprintk=ttyS0");
    let entry = FirstEntry::watch()?;
    let begin = Instant::now();
    let vm = Vm::launch((contender.command)(&machine)?, &folder, LIMIT)?;
    // What the kernel says first of all, as a firmware is silent here.
    vm.wait_for("KASLR")?;
    let first_output = begin.elapsed().as_secs_f64();
    let first_entry = entry.seconds()?;
    Ok(Row {
        name: contender.name,
        exits,
        private_kib,
        threads,
        wakes,
        first_entry,
        first_output,
        init,
    })
}

fn print_boot(rows: &[Row]) {
    println!(
        "\nBoot: 1 processor, {GUEST_MIB} MiB, Debian 12 cloud kernel, no disk; ratios to the first line"
    );
    println!(
        "{:<20} {:>14} {:>7} {:>7} {:>16} {:>8} {:>11} {:>14} {:>14} {:>15}",
        "",
        "exits to init",
        "PIO",
        "MMIO",
        "private KiB",
        "threads",
        "idle wakes",
        "guest runs",
        "first output",
        "init"
    );
    let Some(first) = rows.first() else { return };
    for row in rows {
        println!(
            "{:<20} {:>7} ({:>4.2}) {:>7} {:>7} {:>9} ({:>4.1}) {:>8} {:>9}/2s {:>7.3} ({:>4.1}) {:>7.3} ({:>4.2}) {:>7.3} s ({:>4.2})",
            row.name,
            row.exits.all,
            ratio(row.exits.all, first.exits.all),
            row.exits.pio,
            row.exits.mmio,
            row.private_kib,
            ratio(row.private_kib, first.private_kib),
            row.threads,
            row.wakes,
            row.first_entry,
            row.first_entry / first.first_entry,
            row.first_output,
            row.first_output / first.first_output,
            row.init,
            row.init / first.init
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "for display")]
fn ratio(value: u64, base: u64) -> f64 {
    value as f64 / base.max(1) as f64
}

/// An initrd with more files.
fn extended(base: &Path, files: &Archive, to: &Path) -> Result<PathBuf> {
    let mut bytes = fs::read(base).with_context(|| format!("cannot read {}", base.display()))?;
    bytes.extend_from_slice(&files.bytes()?);
    fs::write(to, bytes)?;
    Ok(to.to_path_buf())
}

/// A guest that runs `script`, with io-load; its own initrd is put at `initrd`.
fn with_io_load(folder: &Path, images: &Path, initrd: &Path, script: impl Into<Vec<u8>>) -> Result<Machine> {
    let mut files = Archive::default();
    files.copy(&folder.join("io-load"), "bin/io-load", 0o755)?;
    files.file("story", 0o755, script);
    Ok(Machine {
        folder: folder.to_path_buf(),
        kernel: images.join("bzImage"),
        initrd: extended(&images.join("initrd"), &files, initrd)?,
        command_line: "console=ttyS0 quiet panic=-1".into(),
    })
}

fn smsvmm(machine: &Machine, kernel: &str, sections: &str) -> Result<Command> {
    let Machine {
        folder,
        initrd,
        command_line,
        ..
    } = machine;
    let kernel = machine.kernel.with_file_name(kernel);
    let config = folder.join("vm.toml");
    let text = format!(
        "name = \"bench\"\ncpus = 1\nmemory = \"{GUEST_MIB}M\"\n[boot]\nkernel = {kernel:?}\ninitrd = {initrd:?}\ncmdline = {command_line:?}\n{sections}"
    );
    fs::write(&config, text)?;
    let mut command = Command::new(folder.join("smsvmm"));
    command.arg("run").arg(config);
    Ok(command)
}

/// QEMU's pc with a disk on an I/O thread of its own, through io_uring.
fn qemu_with_disk(machine: &Machine, disk: &Path, cache: &str) -> Command {
    let mut command = qemu(machine, "pc");
    command.args(["-object", "iothread,id=worker", "-drive"]);
    command.arg(format!(
        "file={},format=raw,if=none,id=disk,cache={cache},aio=io_uring",
        disk.display()
    ));
    command.args(["-device", "virtio-blk-pci,drive=disk,iothread=worker,romfile="]);
    command
}

fn qemu(machine: &Machine, kind: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        kind,
        "-enable-kvm",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        &format!("{GUEST_MIB}M"),
    ]);
    command.args([
        "-display",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.args([
        "-name",
        "bench,debug-threads=on",
        "-append",
        &machine.command_line,
    ]);
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initrd);
    command
}
