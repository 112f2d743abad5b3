//! Loads, and what a volume does under them.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf};

use crate::subject::{FileVolume, Open, VOLUMES};

#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) write: bool,
    pub(crate) sequential: bool,
    pub(crate) block: usize,
    pub(crate) depth: u32,
    /// Bytes that it goes over, in all; 0 for everything.
    pub(crate) span: u64,
}

const fn random(name: &'static str, write: bool, depth: u32) -> Load {
    Load {
        name,
        write,
        sequential: false,
        block: 4096,
        depth,
        span: 0,
    }
}

const fn sequential(name: &'static str, write: bool) -> Load {
    Load {
        name,
        write,
        sequential: true,
        block: 1 << 20,
        depth: 4,
        span: 0,
    }
}

pub(crate) const LOADS: &[Load] = &[
    random("4k randread  qd1 ", false, 1),
    random("4k randread  qd32", false, 32),
    random("4k randwrite qd1 ", true, 1),
    random("4k randwrite qd32", true, 32),
    Load {
        span: 64 << 20,
        ..random("4k hot write qd32", true, 32)
    },
    sequential("1M read      qd4 ", false),
    sequential("1M write     qd4 ", true),
];

#[derive(Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) iops: f64,
    /// User and system, all threads, kernel's helpers too.
    pub(crate) cpu_us: f64,
    /// Context switches per request.
    pub(crate) switches: f64,
}

impl Figures {
    pub(crate) fn median(figures: &[Self]) -> Self {
        let middle = |get: fn(&Self) -> f64| {
            let mut values: Vec<f64> = figures.iter().map(get).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Self {
            iops: middle(|figures| figures.iops),
            cpu_us: middle(|figures| figures.cpu_us),
            switches: middle(|figures| figures.switches),
        }
    }
}

/// CPU time in seconds, with the kernel's helper threads, and context switches.
pub(crate) fn usage(whose: libc::c_int) -> (f64, f64) {
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

#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    done: AtomicU64,
    next: AtomicU64,
    running: AtomicU32,
}

pub(crate) fn run(open: &Open, load: &Load, seconds: f64) -> Figures {
    let progress = Arc::new(Progress::default());
    progress.running.store(load.depth, Ordering::Relaxed);
    let span = if load.span == 0 {
        open.size
    } else {
        load.span.min(open.size)
    };
    let start = Instant::now();
    let (cpu, switches) = usage(libc::RUSAGE_SELF);
    for number in 0..load.depth {
        let (progress, load) = (Arc::clone(&progress), *load);
        open.worker.spawn(move || async move {
            task(number, load, span, &progress).await;
            progress.running.fetch_sub(1, Ordering::Release);
        });
    }
    std::thread::sleep(Duration::from_secs_f64(seconds));
    progress.stop.store(true, Ordering::Relaxed);
    while progress.running.load(Ordering::Acquire) > 0 {
        std::thread::sleep(Duration::from_micros(100));
    }
    let requests = progress.done.load(Ordering::Relaxed) as f64;
    let elapsed = start.elapsed().as_secs_f64();
    let (cpu_after, switches_after) = usage(libc::RUSAGE_SELF);
    Figures {
        iops: requests / elapsed,
        cpu_us: (cpu_after - cpu) * 1e6 / requests,
        switches: (switches_after - switches) / requests,
    }
}

async fn task(number: u32, load: Load, span: u64, progress: &Progress) {
    let volumes: Vec<FileVolume> = VOLUMES.with_borrow(Clone::clone);
    let mut buffer = AlignedBuffer::new(load.block);
    // Pages of its own, not the kernel's page of zeroes.
    buffer.as_mut_slice().fill(1);
    // SAFETY: the buffer outlives the requests of this task, which are awaited one by one.
    let memory = [unsafe { buffer.io(0, load.block) }];
    let mut random = u64::from(number) * 0x9e37_79b9_7f4a_7c15 + 1;
    let blocks = span / load.block as u64;
    while !progress.stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = if load.sequential {
            progress.next.fetch_add(1, Ordering::Relaxed)
        } else {
            random
        } % blocks;
        let offset = block * load.block as u64;
        match (volumes.as_slice(), load.write) {
            ([one], false) => one.read(offset, &memory).await.unwrap(),
            ([one], true) => one.write(offset, &memory, Durability::Volatile).await.unwrap(),
            ([one, two], _) => write_both(one, two, offset, &memory).await,
            _ => panic!("so many volumes are not foreseen"),
        }
        progress
            .done
            .store(progress.done.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

async fn write_both(one: &FileVolume, two: &FileVolume, offset: u64, memory: &[IoBuf]) {
    let mut first = pin!(one.write(offset, memory, Durability::Volatile));
    let mut second = pin!(two.write(offset, memory, Durability::Volatile));
    let (mut first_ended, mut second_ended) = (false, false);
    poll_fn(|context| {
        if !first_ended && let Poll::Ready(result) = first.as_mut().poll(context) {
            result.unwrap();
            first_ended = true;
        }
        if !second_ended && let Poll::Ready(result) = second.as_mut().poll(context) {
            result.unwrap();
            second_ended = true;
        }
        if first_ended && second_ended {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}
