//! What a request costs in the file system alone: on devices that forget, one request after the other.
//!
//! Instructions per request: `SMSVMM_IO_ENGINE=threads valgrind --tool=callgrind --collect-atstart=no
//! --toggle-collect='*path::repeat*' PROGRAM DIRECTORY --only path --only-path NAME --requests 4000` (valgrind and io_uring may wait
//! for each other for ever);
//! the number of requests is printed.

use std::path::Path;

use block_io::{AlignedBuffer, BlockDevice, Durability, Worker, WorkerOptions};
use filesys::{Access, File};

use crate::Options;
use crate::counting::allocations;
use crate::fake::Fake;
use crate::large::{create, data, format, others};
use crate::load::{cpu, median, shuffled};

const DISK: u64 = 4 << 30;
const BLOCKS: u64 = DISK / 4096;

type FakeFile = File<Fake, block_io::WorkerClock>;

/// Makes `count` requests; gives ns and allocations for each.
#[inline(never)]
async fn repeat(file: &FakeFile, write: bool, first: u64, count: u64) -> (f64, f64) {
    let buffer = AlignedBuffer::new(4096);
    // SAFETY: the buffer outlives the requests, which are awaited.
    let memory = [unsafe { buffer.io(0, 4096) }];
    let (begin, before) = (cpu(), allocations());
    for number in first..first + count {
        let offset = shuffled(number, BLOCKS) * 4096;
        if write {
            file.write(offset, &memory, Durability::Volatile).await.unwrap();
        } else {
            file.read(offset, &memory).await.unwrap();
        }
        if number % 256 == 255 {
            others().await;
        }
    }
    let time = (cpu() - begin) * 1e9;
    (
        time / count as f64,
        (allocations() - before) as f64 / count as f64,
    )
}

pub(crate) fn path(directory: &Path, options: &Options) {
    let (directory, rounds, count) = (directory.to_owned(), options.rounds, options.requests);
    let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let fs = format(&directory, data(1, 1 << 40), filesys::OpenOptions::default()).await;
        create(&fs, "/full", DISK, false).await;
        let full = fs.open_file("/full", Access::Write).await.unwrap();
        fill(&full).await;
        drop(full);
        // Below: 32 layers, each with whole clusters of another 64th.
        create(&fs, "/c0", DISK, false).await;
        fill(&fs.open_file("/c0", Access::Write).await.unwrap()).await;
        for number in 1..32 {
            let below = format!("/c{}", number - 1);
            fs.set_frozen(&below, true).await.unwrap();
            fs.clone_file(&below, &format!("/c{number}"), 0).await.unwrap();
            let layer = fs.open_file(&format!("/c{number}"), Access::Write).await.unwrap();
            let buffer = AlignedBuffer::new(64 << 10);
            // SAFETY: the buffer outlives the requests, which are awaited.
            let memory = [unsafe { buffer.io(0, 64 << 10) }];
            for piece in 0..1024 {
                let offset = shuffled(piece + 1024 * number, DISK >> 16) << 16;
                layer.write(offset, &memory, Durability::Volatile).await.unwrap();
            }
            others().await;
        }
        let full = fs.open_file("/full", Access::Write).await.unwrap();
        let chain = fs.open_file("/c31", Access::Read).await.unwrap();
        println!("request              | ns of CPU time | allocations   ({count} requests each)");
        let show = |name: &str, results: Vec<(f64, f64)>| {
            let (times, counts): (Vec<f64>, Vec<f64>) = results.into_iter().unzip();
            println!("{name:20} | {:14.0} | {:11.3}", median(times), median(counts));
        };
        let only = options_only();
        for (name, file, write) in [
            ("read", &full, false),
            ("overwrite", &full, true),
            ("read, 32 layers", &chain, false),
        ] {
            if !only.is_empty() && only != name {
                continue;
            }
            let mut results = vec![];
            repeat(file, write, 0, if only.is_empty() { count } else { 0 }).await;
            for _ in 0..rounds {
                results.push(repeat(file, write, 0, count).await);
            }
            show(name, results);
        }
        if only.is_empty() || only == "first write" {
            let mut results = vec![];
            fs.set_frozen("/c31", true).await.unwrap();
            for round in 0..rounds {
                let path = format!("/new{round}");
                fs.clone_file("/c31", &path, 0).await.unwrap();
                let layer = fs.open_file(&path, Access::Write).await.unwrap();
                results.push(repeat(&layer, true, 0, count.min(DISK >> 17)).await);
            }
            show("first write", results);
        }
        fs.close().await.unwrap();
    });
}

/// `--only-path NAME`.
fn options_only() -> String {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--only-path");
    arguments.nth(1).unwrap_or_default()
}

async fn fill(file: &FakeFile) {
    let buffer = AlignedBuffer::new(1 << 20);
    // SAFETY: the buffer outlives the requests, which are awaited.
    let memory = [unsafe { buffer.io(0, 1 << 20) }];
    for offset in (0..DISK).step_by(1 << 20) {
        file.write(offset, &memory, Durability::Volatile).await.unwrap();
    }
    others().await;
}
