//! What the engine costs beside fio's io_uring engine on the same file, in the same run.
//!
//! ```text
//! cargo bench -p block-io --bench engine -- [FILE OR DIRECTORY]... [--seconds N] [--rounds N] [--fio-batched] [--only TEXT]
//! ```
//! For every place: IOPS, CPU time per I/O (user and system, all threads), context switches per I/O, and the ratios to fio.
//! `--only "1M write"` runs the loads whose name begins so. By default fio submits requests one by one; `--fio-batched` has it do what we do.
//! Machines are noisy: rounds of both alternate, and the medians count.

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

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use block_io::{AlignedBuffer, BlockDevice, Durability, HostDevice, OpenOptions, Worker, WorkerOptions};

const SIZE: u64 = 1 << 30;

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    write: bool,
    sequential: bool,
    block: usize,
    depth: u32,
}

const LOADS: [Load; 6] = [
    Load {
        name: "4k randread  qd1 ",
        write: false,
        sequential: false,
        block: 4096,
        depth: 1,
    },
    Load {
        name: "4k randwrite qd1 ",
        write: true,
        sequential: false,
        block: 4096,
        depth: 1,
    },
    Load {
        name: "4k randread  qd32",
        write: false,
        sequential: false,
        block: 4096,
        depth: 32,
    },
    Load {
        name: "4k randwrite qd32",
        write: true,
        sequential: false,
        block: 4096,
        depth: 32,
    },
    Load {
        name: "1M read      qd4 ",
        write: false,
        sequential: true,
        block: 1 << 20,
        depth: 4,
    },
    Load {
        name: "1M write     qd4 ",
        write: true,
        sequential: true,
        block: 1 << 20,
        depth: 4,
    },
];

#[derive(Clone, Copy, Default)]
struct Figures {
    iops: f64,
    cpu_us: f64,
    switches: f64,
}

fn main() {
    let mut places = Vec::new();
    let (mut seconds, mut rounds, mut batched, mut only) = (2.0, 3, false, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => seconds = arguments.next().unwrap().parse().unwrap(),
            "--fio-batched" => batched = true,
            "--only" => only = arguments.next().unwrap(),
            "--rounds" => rounds = arguments.next().unwrap().parse().unwrap(),
            place => places.push(PathBuf::from(place)),
        }
    }
    if places.is_empty() {
        places.push(std::env::temp_dir());
    }
    for place in &places {
        let file = if place.is_dir() {
            place.join("block-io-bench.img")
        } else {
            place.clone()
        };
        prepare(&file);
        println!("{} (medians of {rounds} rounds of {seconds} s)", file.display());
        println!(
            "                   |        ours: IOPS  CPU µs  sw/IO |         fio: IOPS  CPU µs  sw/IO | IOPS ratio  CPU ratio"
        );
        for load in LOADS.into_iter().filter(|load| load.name.starts_with(&only)) {
            let mut ours = Vec::new();
            let mut theirs = Vec::new();
            for _ in 0..rounds {
                ours.push(run(&file, load, seconds));
                theirs.extend(fio(&file, load, seconds, batched));
            }
            report(load, median(&ours), (!theirs.is_empty()).then(|| median(&theirs)));
        }
        if place.is_dir() {
            std::fs::remove_file(&file).unwrap();
        }
    }
}

fn report(load: Load, ours: Figures, theirs: Option<Figures>) {
    print!(
        "{}  | {:17.0} {:7.2} {:6.3} |",
        load.name, ours.iops, ours.cpu_us, ours.switches
    );
    match theirs {
        Some(theirs) => println!(
            " {:17.0} {:7.2} {:6.3} | {:10.2} {:10.2}",
            theirs.iops,
            theirs.cpu_us,
            theirs.switches,
            ours.iops / theirs.iops,
            ours.cpu_us / theirs.cpu_us
        ),
        None => println!(" no fio here"),
    }
}

fn median(figures: &[Figures]) -> Figures {
    let middle = |get: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(get).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Figures {
        iops: middle(|figures| figures.iops),
        cpu_us: middle(|figures| figures.cpu_us),
        switches: middle(|figures| figures.switches),
    }
}

/// A file without holes.
fn prepare(path: &Path) {
    let is_file = std::fs::metadata(path).map_or(true, |metadata| metadata.is_file());
    let file = std::fs::File::options()
        .create(is_file)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    // Zeroes cost a RAM-backed device nothing, so what is left is the cost of the path.
    let block = vec![0; 1 << 20];
    for offset in (0..SIZE).step_by(block.len()) {
        std::os::unix::fs::FileExt::write_all_at(&file, &block, offset).unwrap();
    }
    file.sync_all().unwrap();
    // O_DIRECT writes to cached pages take another way through the kernel.
    // SAFETY: no memory is involved.
    unsafe {
        libc::posix_fadvise(
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
            0,
            libc::POSIX_FADV_DONTNEED,
        )
    };
}

/// CPU time in seconds, with the kernel's helper threads, and context switches.
fn usage(whose: libc::c_int) -> (f64, f64) {
    // SAFETY: all zeroes are a valid `rusage`, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(whose, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    (
        seconds(usage.ru_utime) + seconds(usage.ru_stime),
        (usage.ru_nvcsw + usage.ru_nivcsw) as f64,
    )
}

fn run(path: &Path, load: Load, seconds: f64) -> Figures {
    let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
    let device = Arc::new(HostDevice::open(path, &OpenOptions::default()).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let next = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let (cpu, switches) = usage(libc::RUSAGE_SELF);
    for task in 0..load.depth {
        let (device, stop, done, next) = (
            Arc::clone(&device),
            Arc::clone(&stop),
            Arc::clone(&done),
            Arc::clone(&next),
        );
        worker.spawn(move || async move {
            let mut buffer = AlignedBuffer::new(load.block);
            // Pages of its own, not the kernel's page of zeroes.
            buffer.as_mut_slice().fill(1);
            // SAFETY: the buffer outlives the requests of this task, which are awaited one by one.
            let piece = [unsafe { buffer.io(0, load.block) }];
            let mut random = u64::from(task) * 0x9e37_79b9_7f4a_7c15 + 1;
            let blocks = SIZE / load.block as u64;
            while !stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let block = if load.sequential {
                    next.fetch_add(1, Ordering::Relaxed)
                } else {
                    random
                } % blocks;
                let offset = block * load.block as u64;
                if load.write {
                    device.write(offset, &piece, Durability::Volatile).await.unwrap();
                } else {
                    device.read(offset, &piece).await.unwrap();
                }
                done.store(done.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
        });
    }
    std::thread::sleep(Duration::from_secs_f64(seconds));
    stop.store(true, Ordering::Relaxed);
    let requests = done.load(Ordering::Relaxed) as f64;
    let elapsed = start.elapsed().as_secs_f64();
    let (cpu_after, switches_after) = usage(libc::RUSAGE_SELF);
    drop(worker);
    Figures {
        iops: requests / elapsed,
        cpu_us: (cpu_after - cpu) * 1e6 / requests,
        switches: (switches_after - switches) / requests,
    }
}

fn fio(path: &Path, load: Load, seconds: f64, batched: bool) -> Option<Figures> {
    let pattern = match (load.sequential, load.write) {
        (true, true) => "write",
        (true, false) => "read",
        (false, true) => "randwrite",
        (false, false) => "randread",
    };
    let measured = fio_cpu(&[
        "--ioengine=io_uring".into(),
        "--direct=1".into(),
        "--time_based".into(),
        "--randrepeat=0".into(),
        "--norandommap".into(),
        "--allow_mounted_write=1".into(),
        "--zero_buffers".into(),
        format!("--iodepth_batch_submit={}", if batched { load.depth } else { 1 }),
        format!(
            "--iodepth_batch_complete_max={}",
            if batched { load.depth } else { 1 }
        ),
        format!("--filename={}", path.display()),
        format!("--rw={pattern}"),
        format!("--bs={}", load.block),
        format!("--iodepth={}", load.depth),
        format!("--size={SIZE}"),
        // fio takes "0.8" for 0, and then ends after one pass.
        format!("--runtime={}ms", (seconds * 1e3).round()),
    ])?;
    // What fio needs to start and to report is not the load's.
    let idle = fio_cpu(&["--ioengine=null".into(), "--size=4k".into(), "--rw=read".into()])?;
    // A JSON parser for two numbers is not worth a dependency: fio prints one field per line.
    let section = measured
        .0
        .split(if load.write {
            "\"write\" : {"
        } else {
            "\"read\" : {"
        })
        .nth(1)?;
    let number = |key: &str| {
        let value = section.split(&format!("\"{key}\" : ")).nth(1)?;
        value.split([',', '\n']).next()?.trim().parse::<f64>().ok()
    };
    Some(Figures {
        iops: number("iops")?,
        cpu_us: (measured.1 - idle.1) * 1e6 / number("total_ios")?,
        switches: (measured.2 - idle.2) / number("total_ios")?,
    })
}

/// Runs fio: its output, CPU time and context switches.
fn fio_cpu(arguments: &[String]) -> Option<(String, f64, f64)> {
    let (cpu, switches) = usage(libc::RUSAGE_CHILDREN);
    let output = Command::new("fio")
        .args(["--name=bench", "--thread", "--output-format=json"])
        .args(arguments)
        .output();
    let (cpu_after, switches_after) = usage(libc::RUSAGE_CHILDREN);
    let output = output.ok()?;
    Some((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        cpu_after - cpu,
        switches_after - switches,
    ))
}
