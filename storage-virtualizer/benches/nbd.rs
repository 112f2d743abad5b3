//! The NBD server beside nbdkit, qemu-nbd and qemu-storage-daemon: the same file, the same client, one after the other.
//!
//! ```text
//! cargo bench -p storage-virtualizer --bench nbd -- [DIRECTORY] [--seconds N] [--rounds N] [--load NAME] [--server NAME]
//! ```
//! The client is fio with its engine `nbd` (libnbd), one connection over a Unix socket. Every server is a process of its own, and
//! CPU time is that of all its threads. A round measures every server; medians of all rounds are shown, and ratios to ours.
//! Packages: fio, nbdkit, qemu-utils, qemu-system-common (qemu-storage-daemon).

#![allow(missing_docs, clippy::unwrap_used, reason = "a bench fails by panicking")]
#![allow(clippy::cast_precision_loss, reason = "a bench")]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use block_io::{Device, DeviceOptions, ListenAddress, Worker, WorkerOptions};
use storage_virtualizer::nbd::{DeviceExport, NbdOptions, NbdServer};

const SIZE: u64 = 512 << 20;
const SERVERS: [&str; 4] = ["ours", "nbdkit", "qemu-nbd", "qsd"];
/// Name, fio's kind, block, depth.
const LOADS: [(&str, &str, &str, &str); 6] = [
    ("rr1", "randread", "4k", "1"),
    ("rw1", "randwrite", "4k", "1"),
    ("rr32", "randread", "4k", "32"),
    ("rw32", "randwrite", "4k", "32"),
    ("r128", "read", "128k", "32"),
    ("w128", "write", "128k", "32"),
];

fn main() {
    let mut place = PathBuf::from("/dev/shm");
    let (mut seconds, mut rounds, mut load, mut server) = (2.0, 3, None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--serve" => return serve(&arguments.next().unwrap(), &arguments.next().unwrap()),
            "--seconds" => seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => rounds = arguments.next().unwrap().parse().unwrap(),
            "--load" => load = arguments.next(),
            "--server" => server = arguments.next(),
            path => place = PathBuf::from(path),
        }
    }
    let file = place.join("nbd-bench.img");
    prepare(&file);
    let sockets = tempfile::tempdir().unwrap();
    println!("{}, load average {}", file.display(), load_average());
    println!("load  server       IOPS  CPU µs/IO | IOPS ratio  CPU ratio (ours / theirs)");
    for (name, kind, block, depth) in LOADS {
        if load.as_ref().is_some_and(|load| load != name) {
            continue;
        }
        let mut results: Vec<(&str, Vec<(f64, f64)>)> = SERVERS
            .iter()
            .filter(|name| {
                server
                    .as_ref()
                    .is_none_or(|server| server == **name || **name == "ours")
            })
            .map(|name| (*name, Vec::new()))
            .collect();
        for _ in 0..rounds {
            for (server, list) in &mut results {
                if let Some(result) = measure(server, &file, sockets.path(), kind, block, depth, seconds) {
                    list.push(result);
                }
            }
        }
        report(name, &mut results);
    }
    std::fs::remove_file(&file).unwrap();
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().to_owned()
}

fn prepare(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let block = vec![0x5a; 1 << 20];
    for _ in 0..SIZE >> 20 {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
}

/// Our server in a process of its own, until it is killed.
fn serve(file: &str, socket: &str) {
    let worker = Worker::start("nbd", WorkerOptions::default()).unwrap();
    let options = NbdOptions {
        listen: vec![ListenAddress::Unix(socket.into())],
        ..Default::default()
    };
    let file = file.to_owned();
    let _server = NbdServer::start(worker.handle(), options, move || {
        let mut options = DeviceOptions::default();
        options.host.memory_at_once = true;
        let device = Device::open(&file, &options).unwrap();
        vec![DeviceExport::new("disk".to_owned(), device, false)]
    })
    .unwrap();
    loop {
        std::thread::park();
    }
}

fn command(server: &str, file: &Path, socket: &Path) -> Command {
    let (file, socket) = (file.display(), socket.display());
    let mut command;
    let arguments: Vec<String> = match server {
        "ours" => {
            command = Command::new(std::env::current_exe().unwrap());
            vec!["--serve".into(), file.to_string(), socket.to_string()]
        }
        "nbdkit" => {
            command = Command::new("nbdkit");
            vec![
                "--foreground".into(),
                "--unix".into(),
                socket.to_string(),
                "file".into(),
                file.to_string(),
            ]
        }
        "qemu-nbd" => {
            command = Command::new("qemu-nbd");
            vec![
                "--persistent".into(),
                "--format=raw".into(),
                "--shared=0".into(),
                "--cache=none".into(),
                "--aio=io_uring".into(),
                format!("--socket={socket}"),
                "--export-name=disk".into(),
                file.to_string(),
            ]
        }
        _ => {
            command = Command::new("qemu-storage-daemon");
            vec![
                "--blockdev".into(),
                format!("driver=file,node-name=f,filename={file},cache.direct=on,aio=io_uring"),
                "--nbd-server".into(),
                format!("addr.type=unix,addr.path={socket}"),
                "--export".into(),
                "type=nbd,id=e,node-name=f,name=disk,writable=on".into(),
            ]
        }
    };
    command.args(arguments);
    command
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Running {
    /// User and system time of all threads, in seconds.
    fn cpu_time(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        // SAFETY: no memory is involved.
        ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
    }
}

fn measure(
    server: &str,
    file: &Path,
    folder: &Path,
    kind: &str,
    block: &str,
    depth: &str,
    seconds: f64,
) -> Option<(f64, f64)> {
    let socket = folder.join(server);
    drop(std::fs::remove_file(&socket));
    let spawned = command(server, file, &socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn();
    let running = match spawned {
        Ok(child) => Running(child),
        Err(error) => {
            println!("{server} is left out: {error}");
            return None;
        }
    };
    let end = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "{server} does not listen");
        sleep(Duration::from_millis(10));
    }
    let export = if server == "nbdkit" { "" } else { "disk" };
    let before = running.cpu_time();
    let output = Command::new("fio")
        .args([
            "--name=load",
            "--ioengine=nbd",
            "--output-format=json",
            "--time_based",
            "--norandommap",
        ])
        .arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()))
        .arg(format!("--rw={kind}"))
        .arg(format!("--bs={block}"))
        .arg(format!("--iodepth={depth}"))
        // fio takes "0.8" for 0, and then ends after one pass.
        .arg(format!("--runtime={}ms", (seconds * 1e3).round()))
        .arg(format!("--size={SIZE}"))
        .output()
        .unwrap();
    let cpu = running.cpu_time() - before;
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text
        .find('{')
        .unwrap_or_else(|| panic!("fio: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let parsed: serde_json::Value = serde_json::from_str(&text[start..]).unwrap();
    let job = &parsed["jobs"][0][if kind.contains("read") { "read" } else { "write" }];
    let requests = job["total_ios"].as_f64().unwrap();
    Some((job["iops"].as_f64().unwrap(), cpu * 1e6 / requests))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(load: &str, results: &mut [(&str, Vec<(f64, f64)>)]) {
    let mut ours = None;
    for (server, list) in results.iter().filter(|result| !result.1.is_empty()) {
        let iops = median(list.iter().map(|result| result.0));
        let cpu = median(list.iter().map(|result| result.1));
        let (our_iops, our_cpu) = *ours.get_or_insert((iops, cpu));
        let ratios = format!("{:10.2} {:10.2}", our_iops / iops, our_cpu / cpu);
        println!("{load:5} {server:9} {iops:8.0} {cpu:10.2} | {ratios}");
    }
}
