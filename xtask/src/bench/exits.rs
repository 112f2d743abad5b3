//! VM exits per disk request, so that they repeat.
//!
//! What disturbs other ways to count is kept out: time passes with instructions; the image lies in memory, where no interrupt of
//! the host's own disk can hit a running guest; each machine boots once and counts are taken before and after one process of
//! the guest; and what the process and the console cost is the same for few and for many requests, so the difference is due
//! to the requests alone. The host's timer ticks (250 a second) remain, and show as "interrupt".
//!
//! Two images: one in memory, which answers before the guest has found nothing else to do; and one that answers after a
//! millisecond, so that the guest goes to sleep and is woken each time.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use stories::Vm;

use super::probe::Counts;
use super::{qemu_with_disk, smsvmm, with_io_load};

/// A load: name, block size in bytes, requests in flight, and the two numbers of requests.
const LOADS: [(&str, u32, u32, [u32; 2]); 2] = [
    ("4 KiB, depth 1", 4096, 1, [200, 2200]),
    ("4 KiB, depth 16", 4096, 16, [800, 8800]),
];

/// How often each load is measured.
const ROUNDS: usize = 3;

/// Where the images are made, in the lab host's memory.
const MAKE_IMAGES: &str =
    "cd /dev/shm; head -c 64M /dev/zero | tr '\\0' Z > load.img; head -c 64M /dev/zero > below
    losetup /dev/loop0 below; modprobe dm-delay
    echo 0 131072 delay /dev/loop0 0 1 | dmsetup create --noudevsync slow; ls /dev/dm-0";

/// An image: what to call it, and its path.
pub(super) type Image = (&'static str, &'static str);

/// The two images.
pub(super) const IN_MEMORY: Image = ("in memory", "/dev/shm/load.img");
pub(super) const AWAY: Image = ("1 ms away", "/dev/dm-0");

/// A guest that the emulated host crashes does not hold up the others.
const LIMIT: Duration = Duration::from_secs(60);

/// The guest runs what its console says, one line after the other.
const SCRIPT: &str = "stty -echo; echo guest: ready
    while read -r line; do $line > /dev/null && echo guest: done; done";

/// Measures and prints. One lab per image, as a lab whose time passes with instructions hangs now and then.
pub(super) fn measure(folder: &Path, images: &Path, (place, image): Image) -> Result<()> {
    lab::finish(Command::new("bash").args(["-e", "-c", MAKE_IMAGES]))?;
    println!("\nVM exits per random read with O_DIRECT in the guest, {ROUNDS} rounds");
    println!(
        "{:<12} {:<18} {:<18} {:>7} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "image", "", "", "exits", "halt", "interrupt", "window", "to user", "others"
    );
    for contender in ["smsvmm", "QEMU pc, iothread"] {
        if let Err(error) = rounds(folder, images, contender, (place, image)) {
            println!("{place:<12} {contender}: no result: {error:#}");
        }
    }
    Ok(())
}

fn rounds(folder: &Path, images: &Path, contender: &str, (place, image): Image) -> Result<()> {
    let mut vm = start(folder, images, contender, Path::new(image))?;
    vm.wait_for("guest: ready")?;
    let process = vm.pid()?.as_raw_nonzero().get();
    for (name, block, depth, numbers) in LOADS {
        // Where each takes milliseconds, fewer do.
        let numbers = if place == AWAY.0 {
            numbers.map(|number| number / 8)
        } else {
            numbers
        };
        for _ in 0..ROUNDS {
            let mut counts = [Counts::default(); 2];
            for (count, number) in counts.iter_mut().zip(numbers) {
                let before = Counts::of_process(process)?;
                vm.type_text(&format!("io-load /dev/vda {block} {depth} {number}\n"))?;
                vm.wait_for("guest: done")?;
                *count = Counts::of_process(process)?.since(before);
            }
            let [few, many] = counts;
            print!("{place:<12} ");
            print_line(name, contender, many.since(few), numbers[1] - numbers[0]);
        }
    }
    Ok(())
}

fn print_line(load: &str, contender: &str, counts: Counts, requests: u32) {
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    let per = |number: u64| number as f64 / f64::from(requests);
    let known = counts.halt + counts.interrupt + counts.window + counts.pio + counts.mmio;
    println!(
        "{load:<18} {contender:<18} {:>7.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3}",
        per(counts.all),
        per(counts.halt),
        per(counts.interrupt),
        per(counts.window),
        per(counts.pio + counts.mmio),
        per(counts.all.saturating_sub(known)),
    );
}

fn start(folder: &Path, images: &Path, contender: &str, disk: &Path) -> Result<Vm> {
    let machine = with_io_load(folder, images, &folder.join("initrd-exits"), SCRIPT)?;
    let command = if contender == "smsvmm" {
        smsvmm(&machine, "bzImage", &format!("[[disk]]\nimage = {disk:?}\n"))?
    } else {
        // Files in memory take no O_DIRECT.
        let cache = if disk == Path::new(AWAY.1) {
            "none"
        } else {
            "writeback"
        };
        qemu_with_disk(&machine, disk, cache)
    };
    Vm::launch(command, folder, LIMIT).with_context(|| format!("{contender} cannot be started"))
}
