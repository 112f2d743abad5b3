//! The iSCSI target beside tgt: the same file, the same clients, one after the other.
//!
//! ```text
//! cargo bench -p storage-virtualizer --bench iscsi -- [DIRECTORY] [--seconds N] [--rounds N] [--load NAME]
//! ```
//! Reads by `iscsi-perf` of libiscsi would measure mostly that client; the client here is the tests' initiator, with one connection,
//! and as many commands in flight as the depth says. Every server is a process of its own, CPU time is that of all its threads. A
//! round measures every server; medians of all rounds are shown, and ratios to ours. Package: tgt.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench fails by panicking"
)]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a bench"
)]

#[path = "../tests/iscsi/initiator.rs"]
mod initiator;

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use block_io::{Device, DeviceOptions, ListenAddress, Worker, WorkerOptions};
use initiator::{Initiator, Login, READ, TARGET, WRITE, rw16, tag_of};
use storage_virtualizer::iscsi::{IscsiOptions, IscsiServer, IscsiTarget, IscsiUnit};
use storage_virtualizer::scsi::{Identity, Unit, UnitOptions};

const SIZE: u64 = 512 << 20;
const SERVERS: [&str; 2] = ["ours", "tgt"];
/// Name, CDB, bytes, depth, random.
const LOADS: [(&str, u8, usize, usize, bool); 6] = [
    ("rr1", READ, 4096, 1, true),
    ("rw1", WRITE, 4096, 1, true),
    ("rr32", READ, 4096, 32, true),
    ("rw32", WRITE, 4096, 32, true),
    ("r128", READ, 128 << 10, 32, false),
    ("w128", WRITE, 128 << 10, 32, false),
];

fn main() {
    let mut place = PathBuf::from("/dev/shm");
    let (mut seconds, mut rounds, mut load) = (2.0, 3, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--serve" => return serve(&arguments.next().unwrap(), &arguments.next().unwrap()),
            "--seconds" => seconds = arguments.next().unwrap().parse().unwrap(),
            "--rounds" => rounds = arguments.next().unwrap().parse().unwrap(),
            "--load" => load = arguments.next(),
            path => place = PathBuf::from(path),
        }
    }
    let file = place.join("iscsi-bench.img");
    prepare(&file);
    let average = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!(
        "{}, load average {}",
        file.display(),
        average.split(' ').next().unwrap()
    );
    println!("load  server       IOPS  CPU µs/IO | IOPS ratio  CPU ratio (ours / theirs)");
    for load in LOADS
        .iter()
        .filter(|one| load.as_ref().is_none_or(|load| load == one.0))
    {
        let mut results: Vec<(&str, Vec<(f64, f64)>)> =
            SERVERS.iter().map(|name| (*name, Vec::new())).collect();
        for _ in 0..rounds {
            for (server, list) in &mut results {
                list.extend(measure(server, &file, load, seconds));
            }
        }
        report(load.0, &mut results);
    }
    std::fs::remove_file(&file).unwrap();
}

fn prepare(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    let block = vec![0x5a; 1 << 20];
    for _ in 0..SIZE >> 20 {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
}

/// Our target in a process of its own, until it is killed.
fn serve(file: &str, address: &str) {
    let worker = Worker::start("iscsi", WorkerOptions::default()).unwrap();
    let options = IscsiOptions {
        listen: vec![ListenAddress::Tcp(address.parse().unwrap())],
        targets: vec![IscsiTarget::open(TARGET)],
        ..IscsiOptions::default()
    };
    let file = file.to_owned();
    let _server = IscsiServer::start(worker.handle(), options, move || {
        let mut options = DeviceOptions::default();
        options.host.memory_at_once = true;
        vec![IscsiUnit {
            target: 0,
            lun: 1,
            unit: Arc::new(Unit::new(UnitOptions::new(Identity::from_name("bench", "bench")))),
            disk: Rc::new(Device::open(&file, &options).unwrap()),
        }]
    })
    .unwrap();
    loop {
        std::thread::park();
    }
}

struct Running {
    child: Child,
    address: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Running {
    fn start(server: &str, file: &Path) -> Option<Self> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let mut command;
        if server == "ours" {
            command = Command::new(std::env::current_exe().unwrap());
            command.arg("--serve").arg(file).arg(free.to_string());
        } else {
            command = Command::new("tgtd");
            // A control port of its own: another tgtd may run on this host.
            command.args(["--foreground", "--control-port", "97", "--iscsi"]);
            command.arg(format!("portal={free}"));
        }
        let spawned = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let running = match spawned {
            Ok(child) => Self { child, address: free },
            Err(error) => {
                println!("{server} is left out: {error}");
                return None;
            }
        };
        if server == "tgt" {
            let file = file.display().to_string();
            let admin = |arguments: &[&str]| {
                for _ in 0..50 {
                    let mut command = Command::new("tgtadm");
                    command
                        .args(["--control-port", "97", "--lld", "iscsi"])
                        .args(arguments);
                    if command.stderr(Stdio::null()).status().unwrap().success() {
                        return;
                    }
                    sleep(Duration::from_millis(100));
                }
                panic!("tgtadm {arguments:?}");
            };
            admin(&[
                "--mode",
                "target",
                "--op",
                "new",
                "--tid",
                "1",
                "--targetname",
                TARGET,
            ]);
            let unit = ["--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", "1"];
            admin(&[&unit[..], &["--backing-store", &file, "--bsoflags", "direct"]].concat());
            // Else it takes 8 KiB in a PDU, and everything depends on that.
            let update = ["--mode", "target", "--op", "update", "--tid", "1"];
            let name = ["--name", "MaxRecvDataSegmentLength", "--value", "262144"];
            admin(&[&update[..], &name].concat());
            admin(&[
                "--mode",
                "target",
                "--op",
                "bind",
                "--tid",
                "1",
                "--initiator-address",
                "ALL",
            ]);
        }
        for _ in 0..100 {
            if TcpStream::connect(free).is_ok() {
                return Some(running);
            }
            sleep(Duration::from_millis(50));
        }
        panic!("{server} does not listen");
    }

    /// User and system time of all threads, in seconds.
    fn cpu_time(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        // SAFETY: no memory is involved.
        ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
    }
}

/// IOPS, and CPU time per request in microseconds.
fn measure(
    server: &str,
    file: &Path,
    &(_, opcode, bytes, depth, random): &(&str, u8, usize, usize, bool),
    seconds: f64,
) -> Option<(f64, f64)> {
    let running = Running::start(server, file)?;
    let login = Login::default()
        .key("InitialR2T", "No")
        .key("ImmediateData", "Yes")
        .key("MaxRecvDataSegmentLength", "262144")
        .key("MaxBurstLength", "1048576")
        .key("FirstBurstLength", "262144");
    let mut client = Initiator::login(running.address, &login);
    while client.read(1, &[0; 6], 0).status != 0 {}
    let most = client.answers.get("MaxRecvDataSegmentLength");
    let most = most.and_then(|most| most.parse().ok()).unwrap_or(8192_usize);
    let mut load = Load {
        client,
        opcode,
        bytes,
        random,
        immediate: bytes.min(most),
        data: vec![0xa5; bytes],
        turn: 0,
    };
    load.run(depth, Duration::from_millis(200));
    let (start, before) = (Instant::now(), running.cpu_time());
    let done = load.run(depth, Duration::from_secs_f64(seconds)) as f64;
    let (time, cpu) = (start.elapsed().as_secs_f64(), running.cpu_time() - before);
    Some((done / time, cpu * 1e6 / done))
}

struct Load {
    client: Initiator,
    opcode: u8,
    bytes: usize,
    random: bool,
    /// Bytes that go with the command.
    immediate: usize,
    data: Vec<u8>,
    turn: u64,
}

impl Load {
    fn next(&mut self) {
        self.turn += 1;
        let places = SIZE / self.bytes as u64;
        let place = if self.random {
            self.turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
        } else {
            self.turn
        };
        let blocks = (self.bytes / 512) as u64;
        let cdb = rw16(self.opcode, place % places * blocks, blocks as u32);
        let flags = if self.opcode == READ { 0xc1 } else { 0xa1 };
        let request = self.client.command(1, &cdb, flags, self.bytes as u32);
        let data = if self.opcode == READ {
            &[]
        } else {
            &self.data[..self.immediate]
        };
        self.client.send(request, data);
        assert_ne!(tag_of(&request), 0);
    }

    /// Keeps `depth` commands in flight; returns how many ended.
    fn run(&mut self, depth: usize, time: Duration) -> u64 {
        let end = Instant::now() + time;
        (0..depth).for_each(|_| self.next());
        let (mut left, mut done) = (depth, 0);
        while left > 0 {
            let pdu = self.client.receive().unwrap();
            let is_over = match pdu.opcode() {
                0x25 => pdu.head[1] & 1 != 0,
                0x21 => true,
                0x31 => {
                    self.answer(&pdu);
                    false
                }
                other => panic!("opcode {other:#x}"),
            };
            if !is_over {
                continue;
            }
            assert_eq!(pdu.head[3], 0);
            done += 1;
            if Instant::now() < end {
                self.next();
            } else {
                left -= 1;
            }
        }
        done
    }

    /// Sends data that were asked for.
    fn answer(&mut self, asked: &initiator::Pdu) {
        let (mut at, end) = (asked.u32(40) as usize, (asked.u32(40) + asked.u32(44)) as usize);
        let mut number = 0;
        while at < end {
            let length = self.immediate.min(end - at);
            let data = vec![0xa5; length];
            let last = at + length == end;
            self.client
                .data_out(asked.tag(), asked.u32(20), number, at, &data, last);
            at += length;
            number += 1;
        }
    }
}

fn report(load: &str, results: &mut [(&str, Vec<(f64, f64)>)]) {
    let mut ours = None;
    for (server, list) in results {
        if list.is_empty() {
            continue;
        }
        let mut median = |pick: fn(&(f64, f64)) -> f64| {
            list.sort_by(|one, other| pick(one).total_cmp(&pick(other)));
            pick(&list[list.len() / 2])
        };
        let (iops, cpu) = (median(|result| result.0), median(|result| result.1));
        let (own_iops, own_cpu) = *ours.get_or_insert((iops, cpu));
        println!(
            "{load:<5} {server:<8} {iops:>9.0} {cpu:>10.2} | {:>10.2} {:>10.2}",
            own_iops / iops,
            own_cpu / cpu
        );
    }
}
