//! `smsvmm debug ...`: what a running machine did just now.
//!
//! A process that panics writes the last requests of all its disks to standard error, behind what Rust says of the panic: that needs neither
//! a file nor another thread, so it works in the sandbox.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use api::{DeviceId, TraceEnd, TraceOperation, TraceRecord};
use management::{Client, ClientError};
use storage_virtualizer::recorder;

use crate::cli::{DebugArguments, DebugCommand};
use crate::exit::Exit;
use crate::output::{print, print_json};
use crate::vm;

/// How often a disk that is followed is looked at: a ring of some hundred records lasts for that long up to some thousand requests per second.
const INTERVAL: Duration = Duration::from_millis(50);

pub(crate) fn execute(arguments: DebugArguments) -> anyhow::Result<Exit> {
    let client = arguments.place.client()?;
    match arguments.command {
        DebugCommand::Dump { output } => dump(&client, output.as_deref()),
        DebugCommand::Trace { disk, json, once } => trace(&client, &disk, json, once),
    }
}

/// All that the machine can tell of itself, as JSON.
fn dump(client: &Client, output: Option<&Path>) -> anyhow::Result<Exit> {
    let dump = client.dump()?;
    match output {
        None => print_json(&dump)?,
        Some(path) => {
            let mut text = serde_json::to_string_pretty(&dump)?;
            text.push('\n');
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(Exit::Success)
}

/// Prints the requests of a disk as they end, until the machine ends.
fn trace(client: &Client, disk: &DeviceId, json: bool, once: bool) -> anyhow::Result<Exit> {
    let mut after = String::new();
    loop {
        let page = match client.trace(disk, &after) {
            // The machine may end while we look.
            Err(ClientError::Connect { .. } | ClientError::Broken(_)) if !after.is_empty() => {
                return Ok(Exit::Success);
            }
            other => other?,
        };
        // What was overwritten before we came is nothing that we missed.
        let mut text = match page.missed {
            missed if missed > 0 && !after.is_empty() => match json {
                true => format!("{}\n", serde_json::json!({ "missed": missed })),
                false => format!("({missed} requests came too fast)\n"),
            },
            _ => String::new(),
        };
        for record in &page.records {
            if json {
                text += &serde_json::to_string(record)?;
            } else {
                text += &line_of(record);
            }
            text.push('\n');
        }
        print(&text)?;
        if once {
            return Ok(Exit::Success);
        }
        after = page.next;
        std::thread::sleep(INTERVAL);
    }
}

/// Time, queue, operation, first byte + bytes, latency, and how it ended if not well.
fn line_of(record: &TraceRecord) -> String {
    let operation = match record.operation {
        TraceOperation::Read => "read",
        TraceOperation::Write => "write",
        TraceOperation::Flush => "flush",
        TraceOperation::Discard => "discard",
        TraceOperation::WriteZeroes => "zero",
        TraceOperation::Other => "other",
    };
    let end = match record.end {
        TraceEnd::Ok => "ok",
        TraceEnd::Failed => "FAILED",
        TraceEnd::Unsupported => "UNSUPPORTED",
    };
    let millis = vm::clock(record.time_ns / 1_000_000);
    format!(
        "{}{:03}Z  q{:<2} {operation:<7} {:>16} + {:<9} {:>10.3} ms  {end}",
        millis.trim_end_matches('Z'),
        record.time_ns / 1000 % 1000,
        record.queue,
        record.offset,
        record.length,
        // Shown to the microsecond; more digits than an f64 has are days.
        record.latency_ns as f64 / 1e6,
    )
}

/// From now on, a panic of this process tells what its disks did last.
pub(crate) fn tell_on_panic() {
    let usual = std::panic::take_hook();
    // Asked now, as threads that are confined may not ask.
    let line_end = if io::stderr().is_terminal() { "\r\n" } else { "\n" };
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        let mut text = Vec::new();
        // Nothing that is written into memory fails.
        let _ = recorder::write_all(&mut text);
        let text = String::from_utf8_lossy(&text).replace('\n', line_end);
        // Nobody is left to be told when standard error is gone.
        let _ = io::stderr().write_all(text.as_bytes());
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line() {
        let record = TraceRecord {
            time_ns: 1_700_000_000_123_456_789,
            queue: 1,
            operation: TraceOperation::WriteZeroes,
            offset: 4096,
            length: 8192,
            latency_ns: 1_234_567,
            end: TraceEnd::Failed,
        };
        assert_eq!(
            line_of(&record),
            "22:13:20.123456Z  q1  zero                4096 + 8192           1.235 ms  FAILED"
        );
    }
}
