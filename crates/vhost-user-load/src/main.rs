//! `vhost-user-load`: drives a vhost-user-blk server and says how fast it is, or whether it keeps its promises.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vhost_user_load::front_end;
use vhost_user_load::load::{Load, Pattern, Report, run};

/// Drive a vhost-user-blk server without a virtual machine.
///
/// Example: vhost-user-load --socket disk.sock --pattern randread --depth 32 --seconds 5
#[derive(Debug, Parser)]
#[command(name = "vhost-user-load", version)]
struct Arguments {
    /// The server's socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What is asked for.
    #[arg(long, value_enum, default_value = "randread")]
    pattern: Pattern,
    /// Bytes per request.
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    block_size: u32,
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let patience = Duration::from_secs(arguments.patience);
    let load = Load {
        front_end: front_end::Options {
            socket: arguments.socket,
            queues: arguments.queues,
            queue_size: arguments.queue_size,
            block_size: arguments.block_size,
            inflight: true,
            patience,
            greeting: None,
        },
        pattern: arguments.pattern,
        depth: arguments.depth,
        duration: Duration::from_secs_f64(arguments.seconds.max(0.0)),
        range: arguments.range,
        once: arguments.once,
        stride: arguments.stride,
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
