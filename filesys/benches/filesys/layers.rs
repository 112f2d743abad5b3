//! Long chains, snapshots under load, merges.

use std::path::Path;
use std::time::{Duration, Instant};

use block_io::{Clock, WorkerClock};
use filesys::{Access, Snapshot};

use crate::Options;
use crate::load::{self, Disk, Figures, Load, Order, median};
use crate::qemu::{self, Image};
use crate::stage::{GIB, Stage};
use crate::throughput::raw;

const DEPTH: usize = 32;

/// Reads at depth 1 and at depth 32.
pub(crate) fn chain(directory: &Path, options: &Options) {
    let (directory, seconds, rounds) = (directory.to_owned(), options.seconds, options.rounds);
    let worker = options.worker();
    worker.run(move || async move {
        let stage = Stage::set(&directory, "d0", 64 << 20, 5 * GIB).await;
        stage.create("/flat", GIB, true).await;
        // Each layer has another 64th of the disk, in whole clusters or in single sub-clusters.
        make_chain(&stage, "whole", 64 << 10, 256).await;
        make_chain(&stage, "parts", 4 << 10, 512).await;
        let load = Load::random(false, 32, GIB, seconds);
        let names = [
            "one file",
            "32 layers, whole clusters",
            "32 layers, single sub-clusters",
        ];
        let paths = [
            "/flat".to_owned(),
            format!("/whole{}", DEPTH - 1),
            format!("/parts{}", DEPTH - 1),
        ];
        let mut disks = Vec::new();
        for path in &paths {
            disks.push(stage.open(path, Access::Read).await);
        }
        let mut all = vec![Vec::new(); 3];
        for _ in 0..rounds {
            for (disk, figures) in disks.iter().zip(&mut all) {
                figures.push(load::run(disk, load).await);
            }
        }
        println!(
            "4k read qd32                    {} | IOPS ratio  CPU ratio",
            Figures::header()
        );
        let one = Figures::median(&all[0]);
        for (name, figures) in names.iter().zip(&all) {
            let figures = Figures::median(figures);
            println!(
                "{name:32}{figures} | {:10.3} {:10.3}",
                figures.iops / one.iops,
                figures.cpu_us / one.cpu_us
            );
        }
        disks.clear();
        stage.fs.close().await.unwrap();
    });
}

async fn make_chain(stage: &Stage, name: &str, block: u64, count: u64) {
    stage.create(&format!("/{name}0"), GIB, true).await;
    for number in 1..DEPTH {
        let below = format!("/{name}{}", number - 1);
        stage.fs.set_frozen(&below, true).await.unwrap();
        let layer = stage.layer(&below, &format!("/{name}{number}")).await;
        let load = Load {
            block,
            count,
            ..Load::random(true, 8, GIB, 1e9)
        };
        load::run(&layer, load).await;
    }
}

/// What requests and who asked for it see of a snapshot.
pub(crate) fn snapshot(directory: &Path, options: &Options) {
    let (directory, rounds) = (directory.to_owned(), options.rounds);
    let worker = options.worker();
    worker.run(move || async move {
        let stage = Stage::set(&directory, "d0", 64 << 20, 5 * GIB).await;
        println!("4k write qd32 goes on; ms, medians (worst) | snapshot durable | longest request | longest without snapshot");
        for (name, size) in [("10 GiB", 10 * GIB), ("10 TiB", 10_240 * GIB)] {
            let path = format!("/disk{size}");
            stage.create(&path, size, false).await;
            let disk = stage.open(&path, Access::Write).await;
            let Disk::File(file) = &disk else { panic!() };
            let load = Load::random(true, 32, GIB / 4, 1e9);
            let running = load::start(&disk, load);
            let clock = WorkerClock::new();
            let (mut durable, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
            let mut head = path;
            for round in 0..rounds {
                clock.sleep(Duration::from_millis(300)).await;
                running.take_longest();
                clock.sleep(Duration::from_millis(20)).await;
                without.push(running.take_longest().as_secs_f64() * 1e3);
                let layer = format!("/disk{size}.{round}");
                let begin = Instant::now();
                stage
                    .fs
                    .snapshot(
                        &[Snapshot {
                            path: &head,
                            layer: &layer,
                            handle: Some(file),
                        }],
                        0,
                    )
                    .await
                    .unwrap();
                durable.push(begin.elapsed().as_secs_f64() * 1e3);
                clock.sleep(Duration::from_millis(20)).await;
                with.push(running.take_longest().as_secs_f64() * 1e3);
                head = layer;
            }
            running.stop();
            running.end().await;
            let text = |values: &[f64]| {
                let worst = values.iter().copied().fold(0.0, f64::max);
                format!("{:.2} ({worst:.2})", median(values.to_vec()))
            };
            println!("{name:42} | {:16} | {:15} | {}", text(&durable), text(&with), text(&without));
            drop(disk);
        }
        stage.fs.close().await.unwrap();
    });
}

/// What was changed in a layer.
const CHANGES: [(&str, u64, Order, u64); 3] = [
    ("1 GiB in order", 1 << 20, Order::Ascending, 1 << 10),
    ("1 GiB in pieces of 64 KiB", 64 << 10, Order::Once, 1 << 14),
    ("1/4 GiB in pieces of 4 KiB", 4 << 10, Order::Once, 1 << 16),
];

/// A layer goes into its base.
pub(crate) fn merge(directory: &Path, options: &Options) {
    const DISK: u64 = 2 * GIB;
    let (directory, rounds, with_qemu) = (directory.to_owned(), options.rounds, options.qemu);
    let worker = options.worker();
    worker.run(move || async move {
        let stage = Stage::set(&directory, "d0", 64 << 20, 5 * GIB).await;
        stage.create("/base", DISK, true).await;
        if with_qemu {
            raw(&directory.join("base.raw"), DISK).await;
        }
        println!("seconds, medians             | absorb | qemu-img commit | with extended_l2 | ratios");
        for (name, block, order, count) in CHANGES {
            let load = Load {
                order,
                block,
                count,
                flush: true,
                ..Load::random(true, 8, DISK, 1e9)
            };
            let mut all = [Vec::new(), Vec::new(), Vec::new()];
            for _ in 0..rounds {
                stage.fs.set_frozen("/base", true).await.unwrap();
                let layer = stage.layer("/base", "/layer").await;
                load::run(&layer, load).await;
                drop(layer);
                let begin = Instant::now();
                stage.fs.absorb("/layer", true).await.unwrap();
                all[0].push(begin.elapsed().as_secs_f64());
                if with_qemu {
                    all[1].push(commit(&directory, Image::Overlay, load).await);
                    all[2].push(commit(&directory, Image::Extended, load).await);
                }
            }
            let [ours, plain, extended] = all.map(median);
            println!(
                "{name:28} | {ours:6.3} | {plain:15.3} | {extended:16.3} | {:.1} {:.1}",
                plain / ours,
                extended / ours
            );
        }
        stage.fs.close().await.unwrap();
    });
}

async fn commit(directory: &Path, image: Image, load: Load) -> f64 {
    let path = qemu::overlay(directory, "base.raw", "overlay.qcow2", image, 2 * GIB + GIB / 4);
    let daemon = qemu::serve(&path, image);
    let disk = daemon.connect();
    load::run(&disk, load).await;
    drop(disk);
    drop(daemon);
    let begin = Instant::now();
    let text = path.display().to_string();
    qemu::run("qemu-img", &["commit", "-q", "-t", "none", "-f", "qcow2", &text]);
    begin.elapsed().as_secs_f64()
}
