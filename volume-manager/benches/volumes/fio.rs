//! The same load by fio's io_uring engine.

use std::process::Command;
use std::sync::OnceLock;

use crate::load::{Figures, Load, usage};
use crate::subject::Open;

/// CPU seconds and context switches that fio needs to start and to report, which are not the load's.
pub(crate) fn idle() -> Result<(f64, f64), String> {
    static IDLE: OnceLock<Result<(f64, f64), String>> = OnceLock::new();
    IDLE.get_or_init(|| {
        let nothing = ["--ioengine=null", "--size=4k", "--rw=read"].map(String::from);
        measure(&nothing).map(|(_, cpu, switches)| (cpu, switches))
    })
    .clone()
}

pub(crate) fn run(open: &Open, load: &Load, seconds: f64) -> Figures {
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
    let (output, cpu, switches) = measure(&[
        "--ioengine=io_uring".into(),
        "--direct=1".into(),
        "--time_based".into(),
        "--randrepeat=0".into(),
        "--norandommap".into(),
        "--zero_buffers".into(),
        "--file_service_type=roundrobin".into(),
        format!("--iodepth_batch_submit={}", load.depth),
        format!("--iodepth_batch_complete_max={}", load.depth),
        format!("--filename={}", files.join(":")),
        format!("--rw={pattern}"),
        format!("--bs={}", load.block),
        format!("--iodepth={}", load.depth),
        format!("--offset={}", open.start),
        format!("--size={}", each * count),
        format!("--runtime={seconds}"),
    ])
    .unwrap();
    let idle = idle().unwrap();
    // A JSON parser for two numbers is not worth a dependency: fio prints one field per line.
    let section = if load.write {
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
    Figures {
        iops: number("iops"),
        cpu_us: (cpu - idle.0) * 1e6 / number("total_ios"),
        switches: (switches - idle.1) / number("total_ios"),
    }
}

/// Runs fio: its output, CPU time and context switches.
fn measure(arguments: &[String]) -> Result<(String, f64, f64), String> {
    let (cpu, switches) = usage(libc::RUSAGE_CHILDREN);
    let output = Command::new("fio")
        .args(["--name=bench", "--thread", "--output-format=json"])
        .args(arguments)
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
