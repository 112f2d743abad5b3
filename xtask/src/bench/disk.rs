//! Exits and host system calls per disk request.
//!
//! Each machine runs twice with different numbers of requests; what the difference costs is what requests cost, without the
//! boot. `perf stat` counts the tracepoints of KVM and of system calls over the whole life of the process and its threads.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use stories::Vm;

use super::{qemu_with_disk, smsvmm, with_io_load};

const EVENTS: [&str; 5] = [
    "kvm:kvm_exit",
    "kvm:kvm_pio",
    "kvm:kvm_mmio",
    "raw_syscalls:sys_enter",
    "kvm:kvm_userspace_exit",
];

/// A load: name, block size in bytes, requests in flight, and the two numbers of requests.
const LOADS: [(&str, u32, u32, [u32; 2]); 3] = [
    ("4 KiB, depth 1", 4096, 1, [500, 2500]),
    ("4 KiB, depth 16", 4096, 16, [1000, 9000]),
    ("1 MiB, depth 1", 1 << 20, 1, [100, 500]),
];

/// Measures and prints.
pub(super) fn measure(folder: &Path, images: &Path) -> Result<()> {
    let disk = folder.join("load.img");
    fs::write(&disk, vec![0x5a_u8; 64 << 20])?;
    println!("\nDisk: random reads with O_DIRECT in the guest; per request");
    println!(
        "{:<18} {:<24} {:>8} {:>8} {:>8} {:>14} {:>14}",
        "", "", "exits", "PIO", "MMIO", "system calls", "to user space"
    );
    for (load, block_size, depth, counts) in LOADS {
        for contender in ["smsvmm", "QEMU pc, iothread"] {
            let [few, many] =
                counts.map(|count| run(folder, images, contender, &disk, block_size, depth, count));
            let (few, many) = (few?, many?);
            let requests = f64::from(counts[1] - counts[0]);
            let per_request: Vec<f64> = few
                .iter()
                .zip(&many)
                .map(|(few, many)| (many - few) / requests)
                .collect();
            let [exits, pio, mmio, calls, user] = per_request.as_slice() else {
                continue;
            };
            println!(
                "{load:<18} {contender:<24} {exits:>8.2} {pio:>8.2} {mmio:>8.2} {calls:>14.2} {user:>14.2}"
            );
        }
    }
    Ok(())
}

/// Runs one machine with one load to its end; the counts of [`EVENTS`].
fn run(
    folder: &Path,
    images: &Path,
    contender: &str,
    disk: &Path,
    block: u32,
    depth: u32,
    count: u32,
) -> Result<Vec<f64>> {
    let script = format!("io-load /dev/vda {block} {depth} {count}");
    let machine = with_io_load(folder, images, &folder.join("initrd-load"), script)?;
    let vmm = if contender == "smsvmm" {
        smsvmm(&machine, "bzImage", &format!("[[disk]]\nimage = {disk:?}\n"))?
    } else {
        qemu_with_disk(&machine, disk, "none")
    };
    let counts = folder.join("counts");
    let mut command = Command::new("perf");
    command
        .args(["stat", "-x", ",", "-e", &EVENTS.join(","), "-o"])
        .arg(&counts)
        .arg("--");
    command.arg(vmm.get_program()).args(vmm.get_args());
    let outcome = Vm::launch(command, folder, Duration::from_secs(300))?.wait(Duration::from_secs(300))?;
    let outcome = outcome
        .success()
        .with_context(|| format!("{contender}, {count} requests"))?;
    anyhow::ensure!(
        outcome.console.contains("io-load: "),
        "no result: {}",
        outcome.console
    );
    let text = fs::read_to_string(&counts)?;
    EVENTS
        .iter()
        .map(|event| {
            let line = text
                .lines()
                .find(|line| line.contains(event))
                .with_context(|| format!("perf counted no {event}"))?;
            let number = line.split(',').next().unwrap_or_default();
            number
                .parse()
                .with_context(|| format!("perf says of {event}: {line}"))
        })
        .collect()
}
