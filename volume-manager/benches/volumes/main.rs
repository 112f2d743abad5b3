//! What volumes cost beside fio's io_uring engine on the same files, in the same run.
//!
//! ```text
//! cargo bench -p volume-manager --bench volumes -- [DIRECTORY]... [--seconds N] [--rounds N] [--only TEXT] [--no-fio]
//! ```
//! For every directory (by default the build's and `/dev/shm`): a pool on files there, each layout in turn, each load in turn. fio
//! does the same load, with batched submission, on the same range of the files that the volume lies on: all of them at once, in one
//! thread and with the same depth. So for a stripe the ratio says what the mapping costs, and for mirrors and parity what redundancy
//! costs, too. `twice` is a mirror made by hand: two volumes without redundancy, and every request to both. It has no
//! dirty-region log and no order of overlapping writes; what a mirror costs more is, at most, what these cost.
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

mod fio;
mod load;
mod subject;

use std::path::{Path, PathBuf};

use load::{Figures, LOADS, Load};
use subject::{SUBJECTS, Subject};

struct Options {
    seconds: f64,
    rounds: usize,
    only: String,
    fio: bool,
}

fn main() {
    let mut places = Vec::new();
    let mut options = Options {
        seconds: 1.0,
        rounds: 3,
        only: String::new(),
        fio: true,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => options.seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => options.rounds = arguments.next().unwrap().parse().unwrap(),
            "--only" => options.only = arguments.next().unwrap(),
            "--no-fio" => options.fio = false,
            place => places.push(PathBuf::from(place)),
        }
    }
    if places.is_empty() {
        places = vec![env!("CARGO_TARGET_TMPDIR").into(), "/dev/shm".into()];
    }
    if let Err(reason) = fio::idle()
        && options.fio
    {
        println!("no comparison with fio: {reason} (apt install fio)");
        options.fio = false;
    }
    for place in &places {
        bench(place, &options);
    }
}

fn bench(place: &Path, options: &Options) {
    let directory = tempfile::tempdir_in(place).unwrap();
    println!(
        "{} (medians of {} rounds of {} s)",
        place.display(),
        options.rounds,
        options.seconds
    );
    println!(
        "layout            load              |  ours: IOPS  CPU µs  sw/IO |   fio: IOPS  CPU µs  sw/IO | IOPS ratio  CPU ratio"
    );
    for subject in SUBJECTS {
        let all = LOADS.iter().filter(|load| {
            let name = format!("{} {}", subject.name, load.name);
            name.contains(&options.only) && (!subject.writes_only || load.write)
        });
        let loads: Vec<&Load> = all.collect();
        if !loads.is_empty() {
            one(directory.path(), subject, &loads, options);
        }
    }
}

fn one(directory: &Path, subject: &Subject, loads: &[&Load], options: &Options) {
    let open = subject::open(directory, subject);
    for load in loads {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            ours.push(load::run(&open, load, options.seconds));
            if options.fio {
                theirs.push(fio::run(&open, load, options.seconds));
            }
        }
        let ours = Figures::median(&ours);
        print!(
            "{:17} {}  | {:11.0} {:7.2} {:6.3} |",
            subject.name, load.name, ours.iops, ours.cpu_us, ours.switches
        );
        if theirs.is_empty() {
            println!();
            continue;
        }
        let theirs = Figures::median(&theirs);
        println!(
            " {:11.0} {:7.2} {:6.3} | {:10.2} {:10.2}",
            theirs.iops,
            theirs.cpu_us,
            theirs.switches,
            ours.iops / theirs.iops,
            ours.cpu_us / theirs.cpu_us
        );
    }
}
