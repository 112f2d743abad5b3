//! The same load by fio's io_uring engine.

use std::process::Command;

use crate::load::{Figures, Load, usage};
use crate::subject::Open;

/// fio, ready to do a load.
pub(crate) struct Fio {
    arguments: Vec<String>,
    write: bool,
    pieces: u32,
    /// CPU seconds and context switches that it needs to start and to report, which are not the load's: a tenth of a second.
    idle: (f64, f64),
}

impl Fio {
    /// The load, with every request cut into so many, all of which may be in flight. The figures count requests of the load.
    pub(crate) fn new(open: &Open, load: &Load, pieces: u32) -> Self {
        /// So often the start is measured.
        const STARTS: usize = 5;
        let depth = load.depth * pieces;
        let pattern = match (load.sequential, load.write) {
            (true, true) => "write",
            (true, false) => "read",
            (false, true) => "randwrite",
            (false, false) => "randread",
        };
        let files: Vec<String> = open.files.iter().map(|file| file.display().to_string()).collect();
        let count = files.len() as u64;
        let each = match load.span {
            0 => open.length,
            span => (span / count).min(open.length),
        };
        let arguments = vec![
            "--ioengine=io_uring".into(),
            "--direct=1".into(),
            "--randrepeat=0".into(),
            "--norandommap".into(),
            "--zero_buffers".into(),
            "--file_service_type=roundrobin".into(),
            format!("--iodepth_batch_submit={depth}"),
            format!("--iodepth_batch_complete_max={depth}"),
            format!("--filename={}", files.join(":")),
            format!("--rw={pattern}"),
            format!("--bs={}", load.block / pieces as usize),
            format!("--iodepth={depth}"),
            format!("--offset={}", open.start),
            format!("--size={}", each * count),
        ];
        let (mut cpu, mut switches) = (Vec::new(), Vec::new());
        for _ in 0..STARTS {
            let (_, cpu_now, switches_now) = measure(&arguments, &["--number_ios=1".into()]).unwrap();
            cpu.push(cpu_now);
            switches.push(switches_now);
        }
        cpu.sort_by(f64::total_cmp);
        switches.sort_by(f64::total_cmp);
        Self {
            arguments,
            write: load.write,
            pieces,
            idle: (cpu[STARTS / 2], switches[STARTS / 2]),
        }
    }

    pub(crate) fn run(&self, seconds: f64) -> Figures {
        // fio takes "0.8" for 0, and then ends after one pass over the files.
        let time = [
            "--time_based".into(),
            format!("--runtime={}ms", (seconds * 1e3).round()),
        ];
        let (output, cpu, switches) = measure(&self.arguments, &time).unwrap();
        // A JSON parser for two numbers is not worth a dependency: fio prints one field per line.
        let section = if self.write {
            "\"write\" : {"
        } else {
            "\"read\" : {"
        };
        let section = output.split(section).nth(1).unwrap_or_default();
        let number = |key: &str| -> f64 {
            let value = section.split(&format!("\"{key}\" : ")).nth(1);
            let value = value.and_then(|value| value.split([',', '\n']).next());
            value
                .unwrap_or_else(|| panic!("fio said: {output}"))
                .trim()
                .parse()
                .unwrap()
        };
        let requests = number("total_ios") / f64::from(self.pieces);
        Figures {
            iops: number("iops") / f64::from(self.pieces),
            cpu_us: (cpu - self.idle.0) * 1e6 / requests,
            switches: (switches - self.idle.1) / requests,
        }
    }
}

/// Whether fio is there; if not, why not.
pub(crate) fn available() -> Result<(), String> {
    measure(
        &["--ioengine=null".into()],
        &["--size=4k".into(), "--rw=read".into()],
    )
    .map(drop)
}

/// Runs fio: its output, CPU time and context switches.
fn measure(load: &[String], extent: &[String]) -> Result<(String, f64, f64), String> {
    let (cpu, switches) = usage(libc::RUSAGE_CHILDREN);
    let output = Command::new("fio")
        .args(["--name=bench", "--thread", "--output-format=json"])
        .args(load)
        .args(extent)
        .output()
        .map_err(|error| format!("fio does not start: {error}"))?;
    let (cpu_after, switches_after) = usage(libc::RUSAGE_CHILDREN);
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        cpu_after - cpu,
        switches_after - switches,
    ))
}
