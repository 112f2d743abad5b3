//! Overwrites, reads, sequential writes, first writes; and what a second worker gives.

use std::path::{Path, PathBuf};
use std::time::Instant;

use block_io::{Worker, WorkerOptions};
use filesys::Access;

use crate::Options;
use crate::load::{self, Disk, Figures, Load, Order, cpu};
use crate::qemu::{self, Image};
use crate::stage::{GIB, Stage, fill};

/// The volume and a file on it, in turn.
pub(crate) fn throughput(directory: &Path, options: &Options) {
    let (directory, seconds, rounds) = (directory.to_owned(), options.seconds, options.rounds);
    let worker = options.worker();
    worker.run(move || async move {
        let stage = Stage::set(&directory, "d0", GIB, 2 * GIB).await;
        stage.create("/full", GIB, true).await;
        let (bare, file) = (stage.bare(), stage.open("/full", Access::Write).await);
        let sequential = |write| in_order(write, seconds);
        let loads = [
            ("4k overwrite qd32", Load::random(true, 32, GIB, seconds)),
            ("4k overwrite qd1", Load::random(true, 1, GIB, seconds)),
            ("4k read qd32", Load::random(false, 32, GIB, seconds)),
            ("4k read qd1", Load::random(false, 1, GIB, seconds)),
            ("1M overwrite qd4", sequential(true)),
            ("1M read qd4", sequential(false)),
        ];
        println!(
            "load                | volume:{0} | file:{0} | IOPS ratio  CPU ratio",
            Figures::header()
        );
        for (name, load) in loads {
            let mut all = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                all[0].push(load::run(&bare, load).await);
                all[1].push(load::run(&file, load).await);
            }
            let [bare, file] = all.map(|figures| Figures::median(&figures));
            println!(
                "{name:19} |        {bare} |      {file} | {:10.3} {:10.3}",
                file.iops / bare.iops,
                file.cpu_us / bare.cpu_us
            );
        }
        drop(file);
        stage.fs.close().await.unwrap();
    });
}

/// 1 MiB after the other.
fn in_order(write: bool, seconds: f64) -> Load {
    Load {
        order: Order::Ascending,
        block: 1 << 20,
        depth: 4,
        ..Load::random(write, 4, GIB, seconds)
    }
}

/// The volume, and a new file on it, in turn: its map grows by runs.
pub(crate) fn new_file(directory: &Path, options: &Options) {
    let (directory, rounds) = (directory.to_owned(), options.rounds);
    let worker = options.worker();
    worker.run(move || async move {
        let stage = Stage::set(&directory, "d0", GIB, 2 * GIB).await;
        let bare = stage.bare();
        let once = Load {
            count: GIB >> 20,
            seconds: 1e9,
            flush: true,
            ..in_order(true, 0.0)
        };
        let mut all = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            all[0].push(load::run(&bare, once).await);
            stage.create("/new", GIB, false).await;
            let new = stage.open("/new", Access::Write).await;
            all[1].push(load::run(&new, once).await);
            drop(new);
            stage.delete("/new").await;
        }
        println!(
            "load                | volume:{0} | file:{0} | IOPS ratio  CPU ratio",
            Figures::header()
        );
        let [bare, new] = all.map(|figures| Figures::median(&figures));
        println!(
            "{:19} |        {bare} |      {new} | {:10.3} {:10.3}",
            "1M first write qd4",
            new.iops / bare.iops,
            new.cpu_us / bare.cpu_us
        );
        stage.fs.close().await.unwrap();
    });
}

/// First writes to a new layer, beside overwrites, and beside new qcow2 overlays.
pub(crate) fn first(directory: &Path, options: &Options) {
    const DISK: u64 = 2 * GIB;
    const WRITES: u64 = 16384;
    let (directory, rounds, with_qemu) = (directory.to_owned(), options.rounds, options.qemu);
    let worker = options.worker();
    worker.run(move || async move {
        let once = Load {
            order: Order::Once,
            count: WRITES,
            flush: true,
            ..Load::random(true, 32, DISK, 1e9)
        };
        let names = [
            "bare volume",
            "file, overwrite",
            "layer, first write",
            "the same again",
            Image::Raw.name(),
            Image::Overlay.name(),
            Image::Extended.name(),
        ];
        let mut all: Vec<Vec<Figures>> = names.iter().map(|_| Vec::new()).collect();
        let stage = Stage::set(&directory, "d0", GIB, 5 * GIB).await;
        stage.create("/base", DISK, true).await;
        stage.create("/full", GIB, true).await;
        stage.fs.set_frozen("/base", true).await.unwrap();
        if with_qemu {
            raw(&directory.join("base.raw"), DISK).await;
        }
        for _ in 0..rounds {
            let bare = Load { span: GIB, ..once };
            all[0].push(load::run(&stage.bare(), bare).await);
            let full = stage.open("/full", Access::Write).await;
            all[1].push(load::run(&full, bare).await);
            drop(full);
            let layer = stage.layer("/base", "/layer").await;
            all[2].push(load::run(&layer, once).await);
            all[3].push(load::run(&layer, once).await);
            drop(layer);
            stage.delete("/layer").await;
            if with_qemu {
                for (number, image) in (4..).zip(Image::ALL) {
                    all[number].push(peer(&directory, image, once).await);
                }
            }
        }
        println!("{:24}{} | to the volume | to overwrite | CPU to overwrite", "", Figures::header());
        let medians: Vec<Figures> = all.iter().map(|figures| Figures::median(figures)).collect();
        for (name, figures) in names.iter().zip(&medians).take(if with_qemu { 7 } else { 4 }) {
            println!(
                "{name:24}{figures} | {:13.3} | {:12.3} | {:8.3}",
                figures.iops / medians[0].iops,
                figures.iops / medians[1].iops,
                figures.cpu_us / medians[1].cpu_us
            );
        }
        if with_qemu {
            for (number, image) in [(5, Image::Overlay), (6, Image::Extended)] {
                let (ours, theirs) = (medians[2], medians[number]);
                println!(
                    "layer to {}: IOPS {:.2}, CPU {:.2}; each to its own raw disk: IOPS {:.2}; CPU beyond the raw disk's {:.2} and {:.2} µs",
                    image.name(),
                    ours.iops / theirs.iops,
                    ours.cpu_us / theirs.cpu_us,
                    ours.iops / medians[0].iops / (theirs.iops / medians[4].iops),
                    ours.cpu_us - medians[0].cpu_us,
                    theirs.cpu_us - medians[4].cpu_us
                );
            }
        }
        stage.fs.close().await.unwrap();
    });
}

/// A raw file with data everywhere.
pub(crate) async fn raw(path: &Path, size: u64) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
    let device = block_io::HostDevice::open(path, &block_io::OpenOptions::default()).unwrap();
    fill(&device, size).await;
}

async fn peer(directory: &Path, image: Image, load: Load) -> Figures {
    let path: PathBuf = match image {
        Image::Raw => directory.join("base.raw"),
        _ => qemu::overlay(directory, "base.raw", "overlay.qcow2", image, GIB + GIB / 2),
    };
    let daemon = qemu::serve(&path, image);
    let disk = daemon.connect();
    let figures = load::run(&disk, load).await;
    drop(disk);
    figures
}

/// One pool with two files under load, and two pools on two workers.
pub(crate) fn workers(directory: &Path, options: &Options) {
    let seconds = options.seconds;
    let open = |name: &'static str, files: u32, helpers: usize| {
        let directory = directory.to_owned();
        let options = WorkerOptions {
            helpers,
            ..WorkerOptions::default()
        };
        let worker = Worker::start(name, options).unwrap();
        worker.run(move || async move {
            let stage = Stage::set(&directory, name, 64 << 20, 2 * GIB).await;
            let mut disks = Vec::new();
            for number in 0..files {
                let path = format!("/f{number}");
                stage.create(&path, GIB / 2, true).await;
                disks.push(stage.open(&path, Access::Write).await);
            }
            STAGE.set(Some((stage, disks)));
        });
        worker
    };
    let pools = [open("p0", 2, 0), open("p1", 1, 0), open("p2", 4, 1)];
    let cases = [
        ("one file", [1, 0, 0]),
        ("two files of one pool", [2, 0, 0]),
        ("two pools, two workers", [1, 1, 0]),
        ("one file, worker with a helper", [0, 0, 1]),
        ("two files, the same", [0, 0, 2]),
        ("four files, the same", [0, 0, 4]),
    ];
    for write in [true, false] {
        let mut results: [Vec<(f64, f64)>; 6] = Default::default();
        for _ in 0..options.rounds {
            for (result, (_, files)) in results.iter_mut().zip(cases) {
                let (begin, cpu_before) = (Instant::now(), cpu());
                let done: f64 = std::thread::scope(|scope| {
                    let used = pools.iter().zip(files).filter(|(_, files)| *files > 0);
                    let runs: Vec<_> = used
                        .map(|(worker, files)| {
                            scope.spawn(move || worker.run(move || all(files, write, seconds)))
                        })
                        .collect();
                    runs.into_iter().map(|run| run.join().unwrap()).sum()
                });
                let elapsed = begin.elapsed().as_secs_f64();
                result.push((done / elapsed, (cpu() - cpu_before) * 1e6 / done));
            }
        }
        let load = if write { "4k overwrite" } else { "4k read" };
        println!("{load:12}, qd32 for each file           IOPS   CPU µs   ratio of IOPS");
        let one = load::median(results[0].iter().map(|result| result.0).collect());
        for ((name, _), result) in cases.iter().zip(&results) {
            let iops = load::median(result.iter().map(|result| result.0).collect());
            let cpu = load::median(result.iter().map(|result| result.1).collect());
            println!("{name:36} {iops:10.0} {cpu:8.2} {:8.2}", iops / one);
        }
    }
}

thread_local! {
    static STAGE: std::cell::RefCell<Option<(Stage, Vec<Disk>)>> = const { std::cell::RefCell::new(None) };
}

async fn all(files: usize, write: bool, seconds: f64) -> f64 {
    let disks: Vec<Disk> = STAGE.with_borrow(|stage| stage.as_ref().unwrap().1[..files].to_vec());
    let load = Load::random(write, 32, GIB / 2, seconds);
    let runs: Vec<_> = disks.iter().map(|disk| load::start(disk, load)).collect();
    let mut done = 0.0;
    for run in runs {
        done += run.end().await.requests;
    }
    done
}
