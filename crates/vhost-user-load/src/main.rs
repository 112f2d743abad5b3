//! `vhost-user-load`: drives a vhost-user-blk server and says how fast it is, or whether it keeps its promises.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vhost_user_load::front_end::{self, Greeting};
use vhost_user_load::load::{Load, Pattern, Report, run};
use vhost_user_load::pattern::Data;

/// Longest head of a manager's answer in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Drive a vhost-user-blk server without a virtual machine.
///
/// Example: vhost-user-load --socket disk.sock --pattern randread --depth 32 --seconds 5
#[derive(Debug, Parser)]
#[command(name = "vhost-user-load", version)]
struct Arguments {
    /// The server's socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The socket is that of a host's manager: ask it for this disk, as that machine's.
    #[arg(long, value_name = "MACHINE/DISK=FILE")]
    attach: Option<Attach>,
    /// What is asked for.
    #[arg(long, value_enum, default_value = "randread")]
    pattern: Pattern,
    /// Bytes per request.
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    block_size: u32,
    /// Data of a request is in segments of so many bytes, as that of guests with pages here and there.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
    segment: Option<u32>,
    /// Requests in flight per queue.
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// Virtqueues.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Entries of a virtqueue.
    #[arg(long, default_value_t = 256)]
    queue_size: u16,
    /// For how long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Use so many bytes of the disk only, from its beginning.
    #[arg(long, value_name = "BYTES")]
    range: Option<u64>,
    /// Use each place once only, and end when all were used.
    #[arg(long)]
    once: bool,
    /// Requests begin at multiples of this [default: the block size].
    #[arg(long, value_name = "BYTES")]
    stride: Option<u32>,
    /// A flush after so many requests.
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    flush_every: u32,
    /// What is written: "words" costs memory that compresses (zram) next to nothing.
    #[arg(long, value_enum, default_value_t)]
    data: Data,
    /// Check every block that is read, and at the end all that were written. What is on the disk is lost.
    #[arg(long)]
    verify: bool,
    /// If the server goes, connect again and go on.
    #[arg(long)]
    reconnect: bool,
    /// How long to wait for a server that is not there, and for an answer, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    patience: u64,
    /// Measure the CPU time of this process [default: that at the other end of the socket].
    #[arg(long)]
    pid: Option<u32>,
    /// Decides the random places.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A disk that is asked for.
#[derive(Debug, Clone)]
struct Attach {
    machine: String,
    disk: String,
    file: String,
}

impl FromStr for Attach {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "name it as MACHINE/DISK=FILE";
        let (name, file) = text.split_once('=').ok_or(wrong)?;
        let (machine, disk) = name.split_once('/').ok_or(wrong)?;
        Ok(Self {
            machine: machine.to_owned(),
            disk: disk.to_owned(),
            file: file.to_owned(),
        })
    }
}

impl Attach {
    /// Asks the manager, as the process of a machine does.
    fn greeting(self) -> Greeting {
        Greeting(Arc::new(move |stream| {
            let disk = serde_json::json!({"id": self.disk, "file": self.file});
            let body = serde_json::json!({"vm": self.machine, "disk": disk}).to_string();
            let head = format!(
                "POST /v1/attachments HTTP/1.1\r\nhost: load\r\nconnection: upgrade\r\nupgrade: smsvmm-vhost-user\r\n\
                 content-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let mut stream = stream;
            stream.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
            // Byte by byte: what follows is vhost-user's.
            let mut answer = Vec::new();
            let mut byte = [0];
            while !answer.ends_with(b"\r\n\r\n") && answer.len() < MAX_HEAD {
                stream.read_exact(&mut byte)?;
                answer.extend(byte);
            }
            let answer = String::from_utf8_lossy(&answer);
            anyhow::ensure!(
                answer.starts_with("HTTP/1.1 101"),
                "the manager refuses: {answer}"
            );
            Ok(())
        }))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let patience = Duration::from_secs(arguments.patience);
    let load = Load {
        front_end: front_end::Options {
            socket: arguments.socket,
            queues: arguments.queues,
            queue_size: arguments.queue_size,
            block_size: arguments.block_size,
            segment: arguments.segment,
            inflight: true,
            patience,
            greeting: arguments.attach.map(Attach::greeting),
        },
        pattern: arguments.pattern,
        depth: arguments.depth,
        duration: Duration::from_secs_f64(arguments.seconds.max(0.0)),
        range: arguments.range,
        once: arguments.once,
        stride: arguments.stride,
        data: arguments.data,
        verify: arguments.verify,
        flush_every: arguments.flush_every,
        reconnect: arguments.reconnect,
        patience,
        pid: arguments.pid,
        seed: arguments.seed,
    };
    match run(&load).and_then(|report| print(&report, arguments.json)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    let latency = &report.latency;
    println!(
        "{} {} B, depth {} x {}: {:.0} IOPS, {:.0} MiB/s",
        report.pattern, report.block_size, report.depth, report.queues, report.iops, report.mib_per_second
    );
    println!(
        "latency in µs: mean {:.1}, 50 % {:.1}, 90 % {:.1}, 99 % {:.1}, 99.9 % {:.1}, largest {:.1}",
        latency.mean, latency.p50, latency.p90, latency.p99, latency.p999, latency.max
    );
    if let Some(micros) = report.server_cpu_micros {
        println!("server: {micros:.2} µs of CPU time per request");
    }
    if report.reconnects != 0 || report.verified_blocks != 0 {
        println!(
            "connected again {} times, checked {} blocks",
            report.reconnects, report.verified_blocks
        );
    }
    Ok(())
}
