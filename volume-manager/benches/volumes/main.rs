//! What volumes cost beside fio's io_uring engine on the same files, in the same run.
//!
//! ```text
//! cargo bench -p volume-manager --bench volumes -- [DIRECTORY]... [--seconds N] [--rounds N] [--only TEXT] [--no-fio] [--device PATH]...
//! ```
//! For every directory (by default the build's and `/dev/shm`): a pool on files there, each layout in turn, each load in turn. With
//! `--device`, once for each that the layouts need, on block devices of at least 320 MiB, **whose content is lost**. fio
//! does the same load, with batched submission, on the same range of the files that the volume lies on: all of them at once, in one
//! thread and with the same depth. So for a stripe the ratio says what the mapping costs, and for mirrors and parity what redundancy
//! costs, too. A large request to a stripe goes to all files, where fio's goes to one of them: a second line has fio do what the kernel
//! is asked for then, as many requests to each file, of the same size, and as many in flight. `twice` is a mirror made by hand: two volumes without redundancy, and every request to both. It has no
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

use std::path::PathBuf;

use fio::Fio;
use load::{Figures, LOADS, Load};
use subject::{SUBJECTS, Subject};

struct Options {
    seconds: f64,
    rounds: usize,
    only: String,
    fio: bool,
    devices: Vec<PathBuf>,
}

fn main() {
    let mut places = Vec::new();
    let mut options = Options {
        seconds: 1.0,
        rounds: 3,
        only: String::new(),
        fio: true,
        devices: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--seconds" => options.seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => options.rounds = arguments.next().unwrap().parse().unwrap(),
            "--only" => options.only = arguments.next().unwrap(),
            "--no-fio" => options.fio = false,
            "--device" => options.devices.push(arguments.next().unwrap().into()),
            place => places.push(PathBuf::from(place)),
        }
    }
    if places.is_empty() && options.devices.is_empty() {
        places = vec![env!("CARGO_TARGET_TMPDIR").into(), "/dev/shm".into()];
    }
    if let Err(reason) = fio::available()
        && options.fio
    {
        println!("no comparison with fio: {reason} (apt install fio)");
        options.fio = false;
    }
    for place in &places {
        let directory = tempfile::tempdir_in(place).unwrap();
        let file = |index| directory.path().join(format!("d{index}"));
        bench(&place.display().to_string(), &file, &options);
    }
    if !options.devices.is_empty() {
        let device = |index: u64| options.devices[usize::try_from(index).unwrap()].clone();
        bench("devices", &device, &options);
    }
}

/// On the files or devices that `place` gives by their number.
fn bench(name: &str, place: &dyn Fn(u64) -> PathBuf, options: &Options) {
    println!(
        "{name} (medians of {} rounds of {} s)",
        options.rounds, options.seconds
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
            one(place, subject, &loads, options);
        }
    }
}

fn one(place: &dyn Fn(u64) -> PathBuf, subject: &Subject, loads: &[&Load], options: &Options) {
    let open = subject::open(place, subject);
    for load in loads {
        let pieces = subject.pieces(load.block);
        let fio = options.fio.then(|| Fio::new(&open, load, 1));
        let fio_in_pieces = (options.fio && pieces > 1).then(|| Fio::new(&open, load, pieces));
        let (mut ours, mut theirs, mut in_pieces) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            ours.push(load::run(&open, load, options.seconds));
            theirs.extend(fio.as_ref().map(|fio| fio.run(options.seconds)));
            in_pieces.extend(fio_in_pieces.as_ref().map(|fio| fio.run(options.seconds)));
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
        beside(&ours, &theirs);
        if !in_pieces.is_empty() {
            print!(
                "{:39}  | {:27} |",
                format!("    fio: {pieces} requests for one"),
                ""
            );
            beside(&ours, &in_pieces);
        }
    }
}

fn beside(ours: &Figures, theirs: &[Figures]) {
    let theirs = Figures::median(theirs);
    println!(
        " {:11.0} {:7.2} {:6.3} | {:10.2} {:10.2}",
        theirs.iops,
        theirs.cpu_us,
        theirs.switches,
        ours.iops / theirs.iops,
        ours.cpu_us / theirs.cpu_us
    );
}
