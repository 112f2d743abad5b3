//! Loads, and what a disk does under them.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block_io::{
    AlignedBuffer, BlockDevice, Clock, Durability, IoBuf, IoError, NbdDevice, WorkerClock, spawn_local,
};

use crate::counting;
use crate::qemu;
use crate::stage::{FileVolume, FsFile};

/// What is under load.
#[derive(Clone)]
pub(crate) enum Disk {
    Volume(FileVolume),
    File(Rc<FsFile>),
    /// With the process that serves it.
    Nbd(Rc<NbdDevice>, u32),
}

impl Disk {
    async fn read(&self, offset: u64, memory: &[IoBuf]) -> Result<(), IoError> {
        match self {
            Self::Volume(volume) => volume.read(offset, memory).await,
            Self::File(file) => file.read(offset, memory).await,
            Self::Nbd(device, _) => device.read(offset, memory).await,
        }
    }

    async fn write(&self, offset: u64, memory: &[IoBuf]) -> Result<(), IoError> {
        match self {
            Self::Volume(volume) => volume.write(offset, memory, Durability::Volatile).await,
            Self::File(file) => file.write(offset, memory, Durability::Volatile).await,
            Self::Nbd(device, _) => device.write(offset, memory, Durability::Volatile).await,
        }
    }

    pub(crate) async fn flush(&self) -> Result<(), IoError> {
        match self {
            Self::Volume(volume) => volume.flush().await,
            Self::File(file) => file.flush().await,
            Self::Nbd(device, _) => device.flush().await,
        }
    }

    fn server(&self) -> Option<u32> {
        match self {
            Self::Nbd(_, process) => Some(*process),
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Order {
    /// Any block at any time.
    Random,
    /// Each block once, in an order that looks random.
    Once,
    Ascending,
}

#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) write: bool,
    pub(crate) order: Order,
    pub(crate) block: u64,
    pub(crate) depth: u32,
    /// Bytes that it goes over; a power of two.
    pub(crate) span: u64,
    /// When it ends, unless `seconds` are over before.
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    /// A flush at the end is part of it.
    pub(crate) flush: bool,
}

impl Load {
    pub(crate) fn random(write: bool, depth: u32, span: u64, seconds: f64) -> Self {
        Self {
            write,
            order: Order::Random,
            block: 4096,
            depth,
            span,
            count: u64::MAX,
            seconds,
            flush: false,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Figures {
    pub(crate) requests: f64,
    pub(crate) iops: f64,
    /// User and system, all threads, kernel's helpers too, of the server as well.
    pub(crate) cpu_us: f64,
    /// Allocations per request.
    pub(crate) allocations: f64,
    /// The longest request, in ms.
    pub(crate) longest_ms: f64,
}

impl Figures {
    pub(crate) fn median(figures: &[Self]) -> Self {
        let middle = |get: fn(&Self) -> f64| median(figures.iter().map(get).collect());
        Self {
            requests: middle(|figures| figures.requests),
            iops: middle(|figures| figures.iops),
            cpu_us: middle(|figures| figures.cpu_us),
            allocations: middle(|figures| figures.allocations),
            longest_ms: middle(|figures| figures.longest_ms),
        }
    }

    pub(crate) fn header() -> &'static str {
        "        IOPS   CPU µs  allocs  longest ms"
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{:12.0} {:8.2} {:7.2} {:11.2}",
            self.iops, self.cpu_us, self.allocations, self.longest_ms
        )
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// CPU seconds of this process.
pub(crate) fn cpu() -> f64 {
    // SAFETY: all zeroes are a valid `rusage`, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// A place within `0..blocks` (a power of two) for each number; each place once.
pub(crate) fn shuffled(number: u64, blocks: u64) -> u64 {
    let bits = blocks.trailing_zeros();
    let mask = blocks - 1;
    let mut place = number & mask;
    for factor in [
        0x9e37_79b9_7f4a_7c15_u64,
        0xbf58_476d_1ce4_e5b9,
        0x94d0_49bb_1331_11eb,
    ] {
        place = place.wrapping_mul(factor) & mask;
        place ^= place >> (bits / 2).max(1);
    }
    place
}

#[derive(Default)]
struct Progress {
    stop: Cell<bool>,
    done: Cell<u64>,
    next: Cell<u64>,
    running: Cell<u32>,
    longest: Cell<Duration>,
    ended: Cell<Option<Instant>>,
}

/// A load that runs.
pub(crate) struct Running {
    progress: Rc<Progress>,
    disk: Disk,
    load: Load,
    start: Instant,
    cpu: f64,
    server: f64,
    allocations: u64,
}

/// Starts a load on a disk of this worker.
pub(crate) fn start(disk: &Disk, load: Load) -> Running {
    let progress = Rc::new(Progress::default());
    progress.running.set(load.depth);
    let running = Running {
        progress: Rc::clone(&progress),
        disk: disk.clone(),
        load,
        server: disk.server().map_or(0.0, qemu::cpu),
        start: Instant::now(),
        cpu: cpu(),
        allocations: counting::allocations(),
    };
    for number in 0..load.depth {
        let (progress, disk) = (Rc::clone(&progress), disk.clone());
        let spawned = spawn_local(async move {
            task(number, load, &disk, &progress).await;
            progress.running.set(progress.running.get() - 1);
            if progress.running.get() == 0 {
                if load.flush {
                    disk.flush().await.unwrap();
                }
                progress.ended.set(Some(Instant::now()));
            }
        });
        assert!(spawned.is_ok());
    }
    running
}

impl Running {
    pub(crate) fn done(&self) -> u64 {
        self.progress.done.get()
    }

    /// The longest request since this was asked last.
    pub(crate) fn take_longest(&self) -> Duration {
        self.progress.longest.take()
    }

    pub(crate) fn stop(&self) {
        self.progress.stop.set(true);
    }

    pub(crate) async fn end(self) -> Figures {
        let clock = WorkerClock::new();
        let end = loop {
            if let Some(ended) = self.progress.ended.get() {
                break ended;
            }
            if self.start.elapsed().as_secs_f64() >= self.load.seconds {
                self.stop();
            }
            clock.sleep(Duration::from_millis(1)).await;
        };
        let requests = self.done() as f64;
        let server = self.disk.server().map_or(0.0, qemu::cpu) - self.server;
        Figures {
            requests,
            iops: requests / (end - self.start).as_secs_f64(),
            cpu_us: (cpu() - self.cpu + server) * 1e6 / requests,
            allocations: (counting::allocations() - self.allocations) as f64 / requests,
            longest_ms: self.progress.longest.get().as_secs_f64() * 1e3,
        }
    }
}

pub(crate) async fn run(disk: &Disk, load: Load) -> Figures {
    start(disk, load).end().await
}

async fn task(number: u32, load: Load, disk: &Disk, progress: &Progress) {
    let length = load.block as usize;
    let mut buffer = AlignedBuffer::new(length);
    // Pages of its own, not the kernel's page of zeroes.
    buffer.as_mut_slice().fill(1);
    // SAFETY: the buffer outlives the requests of this task, which are awaited one by one.
    let memory = [unsafe { buffer.io(0, length) }];
    let mut random = u64::from(number) * 0x9e37_79b9_7f4a_7c15 + 1;
    let blocks = load.span / load.block;
    while !progress.stop.get() {
        let turn = progress.next.get();
        if turn >= load.count {
            break;
        }
        progress.next.set(turn + 1);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = match load.order {
            Order::Random => random % blocks,
            Order::Once => shuffled(turn, blocks),
            Order::Ascending => turn % blocks,
        };
        let begin = Instant::now();
        let offset = block * load.block;
        let done = if load.write {
            disk.write(offset, &memory).await
        } else {
            disk.read(offset, &memory).await
        };
        done.unwrap();
        progress.longest.set(progress.longest.get().max(begin.elapsed()));
        progress.done.set(progress.done.get() + 1);
    }
}
