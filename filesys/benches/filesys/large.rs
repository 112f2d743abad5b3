//! Memory for metadata of large disks, and opening a large pool after a crash, on devices that forget data.

use std::future::poll_fn;
use std::path::Path;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use block_io::{
    AlignedBuffer, BlockDevice, Durability, HostDevice, OpenOptions as HostOptions, Worker, WorkerClock,
    WorkerOptions,
};
use filesys::{Access, Attributes, FileSystem, FormatOptions, GivenVolume, NewFile, OpenOptions};

use crate::Options;
use crate::counting::{forget_peak, live, mib, peak};
use crate::fake::Fake;
use crate::load::{cpu, shuffled};

const TIB: u64 = 1 << 40;
const CLUSTER: u64 = 64 << 10;

type Fs = FileSystem<Fake, WorkerClock>;

fn meta(directory: &Path) -> Rc<Fake> {
    let path = directory.join("meta");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .unwrap();
    file.set_len(6 << 30).unwrap();
    Rc::new(Fake::Kept(
        HostDevice::open(&path, &HostOptions::default()).unwrap(),
    ))
}

fn given(number: u8, device: Rc<Fake>) -> GivenVolume<Fake> {
    GivenVolume {
        uuid: [number; 16],
        name: format!("v{number}"),
        class: String::new(),
        device,
    }
}

pub(crate) fn data(count: u8, size: u64) -> Vec<GivenVolume<Fake>> {
    (1..=count)
        .map(|number| given(number, Rc::new(Fake::Forgets(size))))
        .collect()
}

pub(crate) async fn format(directory: &Path, volumes: Vec<GivenVolume<Fake>>, open: OpenOptions) -> Fs {
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: None,
        grow_to: 0,
    };
    let meta = given(0, meta(directory));
    FileSystem::format(meta, volumes, &format, open, WorkerClock::new())
        .await
        .unwrap()
}

/// Lets the others run, as devices that forget answer at once.
pub(crate) async fn others() {
    let mut waited = false;
    poll_fn(|context| {
        if waited {
            return Poll::Ready(());
        }
        waited = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[derive(Clone, Copy)]
enum Writes {
    /// All of it, 1 MiB each.
    InOrder(u64),
    /// 4 KiB of so many clusters, each once, all over.
    AtRandom(u64),
    /// 4 KiB each, in order.
    Again(u64),
}

async fn write(fs: &Fs, path: &str, writes: Writes) {
    let file = fs.open_file(path, Access::Write).await.unwrap();
    let buffer = AlignedBuffer::new(1 << 20);
    let (count, length) = match writes {
        Writes::InOrder(bytes) => (bytes >> 20, 1 << 20),
        Writes::AtRandom(count) | Writes::Again(count) => (count, 4096),
    };
    // SAFETY: the buffer outlives the writes, which are awaited.
    let memory = [unsafe { buffer.io(0, length) }];
    for number in 0..count {
        let offset = match writes {
            Writes::InOrder(_) => number << 20,
            // Another sub-cluster of each, as else all ends up as one run.
            Writes::AtRandom(count) => {
                let cluster = shuffled(number, count);
                cluster * CLUSTER + shuffled(cluster, 1 << 20) % 16 * 4096
            }
            Writes::Again(_) => number * 4096 % (8 * TIB),
        };
        file.write(offset, &memory, Durability::Volatile).await.unwrap();
        if number % 64 == 0 {
            others().await;
        }
    }
    file.flush().await.unwrap();
}

pub(crate) async fn create(fs: &Fs, path: &str, size: u64, thick: bool) {
    let new = NewFile {
        size,
        attributes: Some(Attributes {
            thick,
            ..Attributes::default()
        }),
        now: 0,
    };
    fs.create(path, &new).await.unwrap();
}

/// MiB for each TiB that is mapped.
pub(crate) fn memory(place: &Path, options: &Options) {
    let clusters = (options.share_of_tib * TIB as f64 / CLUSTER as f64) as u64;
    let clusters = clusters.next_power_of_two();
    let bytes = clusters * CLUSTER;
    println!(
        "\nmemory: {} of disk mapped on devices that forget",
        if bytes >= TIB {
            format!("{} TiB", bytes / TIB)
        } else {
            format!("{} GiB", bytes >> 30)
        }
    );
    println!("writes, pages kept      | live MiB | MiB per TiB | peak MiB | ns per write");
    let kept = OpenOptions::default().cached_pages;
    for (name, writes, pages) in [
        ("in order, default", Writes::InOrder(TIB), kept),
        ("at random, all", Writes::AtRandom(clusters), usize::MAX),
        ("at random, default", Writes::AtRandom(clusters), kept),
        ("at random, 2048", Writes::AtRandom(clusters), 2048),
    ] {
        let directory = tempfile::tempdir_in(place).unwrap();
        let path = directory.path().to_owned();
        let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            let before = live();
            forget_peak();
            let open = OpenOptions {
                cached_pages: pages,
                ..OpenOptions::default()
            };
            let fs = format(&path, data(1, 2 * TIB), open).await;
            create(&fs, "/disk", TIB, false).await;
            let begin = Instant::now();
            write(&fs, "/disk", writes).await;
            let (requests, bytes) = match writes {
                Writes::InOrder(bytes) => (bytes >> 20, bytes),
                Writes::AtRandom(count) | Writes::Again(count) => (count, count * CLUSTER),
            };
            let time = begin.elapsed().as_nanos() as f64 / requests as f64;
            let used = live().saturating_sub(before);
            println!(
                "{name:23} | {:8.1} | {:11.1} | {:8.1} | {time:.0}",
                mib(used),
                mib(used) * TIB as f64 / bytes as f64,
                mib(peak().saturating_sub(before)),
            );
            fs.close().await.unwrap();
        });
    }
}

/// A pool of 100 TiB with a full journal is opened.
pub(crate) fn open_after_crash(place: &Path) {
    const FULL: u64 = 4 * TIB;
    println!(
        "\nopen: 4 volumes of 25 TiB, a thick file of 4 TiB with a hole in each 2 GiB, a million changes since"
    );
    let directory = tempfile::tempdir_in(place).unwrap();
    let path = directory.path().to_owned();
    let made = path.clone();
    let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let begin = Instant::now();
        let open = OpenOptions {
            background: false,
            ..OpenOptions::default()
        };
        let fs = format(&made, data(4, 25 * TIB), open).await;
        create(&fs, "/thick", FULL, true).await;
        let file = fs.open_file("/thick", Access::Write).await.unwrap();
        for gap in (0..FULL).step_by(2 << 30) {
            file.discard(gap + CLUSTER, CLUSTER).await.unwrap();
            others().await;
        }
        drop(file);
        create(&fs, "/thin", 32 * TIB, false).await;
        write(&fs, "/thin", Writes::AtRandom(1 << 20)).await;
        while fs.metadata().journal_used < fs.metadata().journal * 2 / 5 {
            write(&fs, "/thin", Writes::Again(1 << 16)).await;
        }
        let stat = fs.metadata();
        println!(
            "made in {:.1} s; journal {} MiB, of which the next opening reads {} MiB",
            begin.elapsed().as_secs_f64(),
            stat.journal >> 20,
            stat.journal_used >> 20
        );
        // Nothing is closed: as if the process had died.
        drop(fs);
    });
    // Its tasks end with the thread.
    drop(worker);
    let worker = Worker::start("bench", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        for round in 0..3 {
            let device = meta(&path);
            let before = live();
            forget_peak();
            let (begin, used) = (Instant::now(), cpu());
            let read_only = round < 2;
            let options = OpenOptions {
                read_only,
                ..OpenOptions::default()
            };
            let fs = FileSystem::open(device, data(4, 25 * TIB), options, WorkerClock::new())
                .await
                .unwrap();
            println!(
                "opened{}: {:.3} s, {:.3} s of CPU time, {:.1} MiB live, {:.1} MiB at most",
                if read_only { " read-only" } else { "" },
                begin.elapsed().as_secs_f64(),
                cpu() - used,
                mib(live().saturating_sub(before)),
                mib(peak().saturating_sub(before))
            );
            fs.close().await.unwrap();
        }
    });
}
