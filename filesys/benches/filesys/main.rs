//! What the file system costs beside the volume that it lies on, and beside qcow2, in the same run on the same backing.
//!
//! ```text
//! cargo bench -p filesys --bench filesys -- [DIRECTORY]... [--seconds N] [--rounds N] [--only PART] [--no-qemu]
//!                                           [--share-of-tib N] [--requests N] [--helpers N]
//! ```
//! Parts: `path`, `throughput`, `new`, `first`, `chain`, `snapshot`, `merge`, `memory`, `open`, `workers`. `path`, `memory` and `open` use devices that forget what
//! is written to them, so that petabytes can be had; the others use files in the directories (about 7 GiB).
//!
//! # How qcow2 is compared
//! `qemu-storage-daemon` serves the image as NBD on a Unix socket; our NBD client on the same worker puts the same load on it. The socket
//! costs the peer about two system calls and a copy per request, which our file system in the same process does not have. So the daemon
//! serves a raw file, too, in the same way: what an image costs is told by its ratio to *that*, as what our file system costs is told by
//! its ratio to the bare volume. Both ratios are printed, and the direct one, and CPU time of both processes together. (A server of our
//! own for the same hop would measure that server; vhost-user needs a driver of virtqueues, and FUSE costs more than NBD.)
//! What qcow2 will need of the host's file system is allocated before (`fallocate` beyond the end), as our volume is.
//!
//! Machines are noisy: rounds of all alternate, and the medians count.

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

mod counting;
mod fake;
mod large;
mod layers;
mod load;
mod path;
mod qemu;
mod stage;
mod throughput;

use std::path::{Path, PathBuf};

use block_io::{Worker, WorkerOptions};

pub(crate) struct Options {
    pub(crate) seconds: f64,
    pub(crate) rounds: usize,
    only: String,
    pub(crate) qemu: bool,
    pub(crate) share_of_tib: f64,
    pub(crate) requests: u64,
    /// Of each worker, but in the part `workers`.
    helpers: usize,
}

impl Options {
    /// A worker for a part.
    pub(crate) fn worker(&self) -> Worker {
        let options = WorkerOptions {
            helpers: self.helpers,
            ..WorkerOptions::default()
        };
        Worker::start("bench", options).unwrap()
    }

    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.split(',').any(|only| only == part)
    }
}

fn main() {
    let mut places = Vec::new();
    let mut options = Options {
        seconds: 1.0,
        rounds: 5,
        only: String::new(),
        qemu: true,
        share_of_tib: 0.125,
        requests: 200_000,
        helpers: 0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => options.seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => options.rounds = arguments.next().unwrap().parse().unwrap(),
            "--only" => options.only = arguments.next().unwrap(),
            "--share-of-tib" => options.share_of_tib = arguments.next().unwrap().parse().unwrap(),
            "--requests" => options.requests = arguments.next().unwrap().parse().unwrap(),
            "--helpers" => options.helpers = arguments.next().unwrap().parse().unwrap(),
            "--only-path" => drop(arguments.next()),
            "--no-qemu" => options.qemu = false,
            place => places.push(PathBuf::from(place)),
        }
    }
    if places.is_empty() {
        places = vec![env!("CARGO_TARGET_TMPDIR").into(), "/dev/shm".into()];
    }
    if options.qemu && !qemu::is_there() {
        println!("no comparison with qcow2: qemu-storage-daemon does not start (apt install qemu-utils)");
        options.qemu = false;
    }
    for place in &places {
        on_files(place, &options);
    }
    let place = &places[0];
    if options.wants("memory") {
        large::memory(place, &options);
    }
    if options.wants("open") {
        large::open_after_crash(place);
    }
}

/// Links to block devices, of which pools are made then, are found in the folder of a part as well.
fn link_devices(place: &Path, folder: &Path) {
    for entry in std::fs::read_dir(place).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_symlink() {
            let device = std::fs::read_link(entry.path()).unwrap();
            std::os::unix::fs::symlink(device, folder.join(entry.file_name())).unwrap();
        }
    }
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// A part of the bench.
type Part = fn(&Path, &Options);

fn on_files(place: &Path, options: &Options) {
    let parts: [(&str, Part); 8] = [
        ("path", path::path),
        ("throughput", throughput::throughput),
        ("new", throughput::new_file),
        ("first", throughput::first),
        ("chain", layers::chain),
        ("snapshot", layers::snapshot),
        ("merge", layers::merge),
        ("workers", throughput::workers),
    ];
    for (name, part) in parts {
        if options.wants(name) {
            let directory = tempfile::tempdir_in(place).unwrap();
            link_devices(place, directory.path());
            println!(
                "\n{name}: {} (medians of {} rounds of {} s; load average {})",
                place.display(),
                options.rounds,
                options.seconds,
                load_average()
            );
            part(directory.path(), options);
        }
    }
}
