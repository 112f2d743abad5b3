//! `smsvmm top`: what a pool that is open has to do, with the machine of the process that has it.
//!
//! The process looks for as long as the picture stands: the load that is shown is that of the seconds before.

use std::io::{self, IsTerminal};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use api::storage::{DeviceLoad, PoolLoad, PoolStatus, RequestLoad};
use api::{AttachmentMetrics, ProblemKind, StorageAnswer, StorageRequest, VmStatus};
use management::{Client, ClientError};
use serde::Serialize;

use crate::cli::TopArguments;
use crate::exit::Exit;
use crate::output::{print, print_json};
use crate::storage::{self, Table, size};
use crate::vm;

/// Rows of a table; the busiest are first.
const ROWS: usize = 12;
/// Cursor to the upper left, and what is there goes.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// All that is shown.
#[derive(Serialize)]
struct Picture {
    /// None if the process has no machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<VmStatus>,
    /// None if it has no pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<PoolStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<PoolLoad>,
    /// Of a manager: what machines have asked of their disks in the window.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attachments: Vec<AttachmentMetrics>,
    /// How long that was.
    #[serde(skip_serializing_if = "is_none")]
    attachments_ms: u64,
}

fn is_none(number: &u64) -> bool {
    *number == 0
}

pub(crate) fn execute(arguments: TopArguments) -> anyhow::Result<Exit> {
    let TopArguments {
        process,
        once,
        interval,
    } = arguments;
    let client = Client::new(storage::process(&process)?)?;
    let window_ms = interval * 1000;
    if process.json {
        print_json(&look(&client, window_ms)?)?;
        return Ok(Exit::Success);
    }
    let once = once || !io::stdout().is_terminal();
    loop {
        let text = show(&look(&client, window_ms)?);
        if once {
            print(&text)?;
            return Ok(Exit::Success);
        }
        print(&format!("{CLEAR}{text}"))?;
    }
}

/// Takes as long as the window.
fn look(client: &Client, window_ms: u32) -> anyhow::Result<Picture> {
    let mut picture = Picture {
        vm: None,
        pool: None,
        load: None,
        attachments: Vec::new(),
        attachments_ms: 0,
    };
    let begun = Instant::now();
    let before = attachments(client)?;
    if let StorageAnswer::Load(load) = match client.storage(&StorageRequest::Load { window_ms }) {
        Ok(answer) => answer,
        // A machine without a pool.
        Err(ClientError::Problem(problem)) if problem.kind != ProblemKind::Forbidden => {
            std::thread::sleep(std::time::Duration::from_millis(window_ms.into()));
            picture.vm = Some(client.status()?);
            return Ok(picture);
        }
        Err(error) => return Err(error.into()),
    } {
        picture.load = Some(*load);
    }
    if let Some(before) = before {
        picture.attachments = attachments(client)?.unwrap_or_default();
        picture.attachments_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        picture
            .attachments
            .iter_mut()
            .for_each(|disk| since(disk, &before));
    }
    if let StorageAnswer::Status(status) = client.storage(&StorageRequest::Status)? {
        picture.pool = Some(*status);
    }
    picture.vm = match client.status() {
        Ok(status) => Some(status),
        // A manager of pools has no machine.
        Err(ClientError::Problem(_) | ClientError::NotUnderstood { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(picture)
}

/// What was asked of the disks of machines so far; none of a process that is no manager, or that does not tell who asks.
fn attachments(client: &Client) -> anyhow::Result<Option<Vec<AttachmentMetrics>>> {
    match client.attachment_counters() {
        Ok(all) => Ok(Some(all)),
        Err(ClientError::Problem(_) | ClientError::NotUnderstood { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Leaves of a disk's numbers what is not in an earlier look.
fn since(disk: &mut AttachmentMetrics, before: &[AttachmentMetrics]) {
    let same = |other: &&AttachmentMetrics| {
        (&other.attachment.vm, &other.attachment.device) == (&disk.attachment.vm, &disk.attachment.device)
    };
    if let Some(before) = before.iter().find(same) {
        disk.counts = disk.counts.since(&before.counts);
        disk.latencies = disk.latencies.since(&before.latencies);
    }
}

fn show(picture: &Picture) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = format!("{} UTC", vm::clock(u64::try_from(now.as_millis()).unwrap_or(0)));
    if let Some(vm) = &picture.vm {
        text += &format!(
            "  {}: {}, up {}, {} vCPUs, {} memory",
            vm.name,
            vm.state,
            vm::duration(vm.uptime_seconds),
            vm.cpus,
            vm.memory
        );
    }
    if let Some(pool) = &picture.pool {
        text += &format!(
            "  pool {}: {}, {} of {} used",
            pool.name,
            storage::health(pool.state),
            size(pool.used),
            size(pool.size)
        );
    }
    text.push('\n');
    if let (Some(pool), Some(load)) = (&picture.pool, &picture.load) {
        text += &format!("\n{}", devices(pool, load));
        if !load.volumes.is_empty() {
            text += &format!("\n{}", volumes(pool, load));
        }
    }
    if let Some(vm) = picture.vm.as_ref().filter(|vm| !vm.disks.is_empty()) {
        text += &format!("\n{}", disks(vm));
    }
    if !picture.attachments.is_empty() {
        text += &format!(
            "\n{}",
            machines_disks(&picture.attachments, picture.attachments_ms)
        );
    }
    let jobs = picture.pool.iter().flat_map(|pool| &pool.jobs);
    let live: Vec<_> = jobs.filter(|job| job.is_live()).collect();
    if !live.is_empty() {
        text += &format!("\n{}", storage::jobs(&live));
    }
    text
}

/// So many per second of what was counted in a window.
fn per_second(count: u64, window_ms: u64) -> u64 {
    let rate = u128::from(count) * 1000 / u128::from(window_ms.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Requests and bytes per second, and how long the slowest of a hundred took.
fn rates(reads: &RequestLoad, writes: &RequestLoad, window_ms: u64) -> Vec<String> {
    let cells = [reads, writes].map(|load| {
        [
            per_second(load.requests, window_ms).to_string(),
            size(per_second(load.bytes, window_ms)),
            micros(load.p50_us),
            micros(load.p99_us),
        ]
    });
    cells.into_iter().flatten().collect()
}

fn micros(micros: u64) -> String {
    match micros {
        0 => "-".to_owned(),
        1..1000 => format!("{micros}us"),
        1000..1_000_000 => format!("{}ms", micros / 1000),
        _ => format!("{}s", micros / 1_000_000),
    }
}

/// Heading of the columns of [`rates`].
const RATES: [&str; 8] = [
    "READS/s", "BYTES/s", "50%", "99%", "WRITES/s", "BYTES/s", "50%", "99%",
];

fn heading(first: &[&'static str]) -> Vec<&'static str> {
    first.iter().chain(&RATES).copied().collect()
}

/// What is not shown.
fn more(all: usize, what: &str) -> String {
    match all.checked_sub(ROWS) {
        None | Some(0) => String::new(),
        Some(more) => format!("and {more} more {what}\n"),
    }
}

fn devices(pool: &PoolStatus, load: &PoolLoad) -> String {
    let mut table = Table::new(
        &heading(&["DEVICE", "STATE", "BUSY", "QUEUE"]),
        &[2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    );
    for device in load.devices.iter().take(ROWS) {
        let known = pool.devices.iter().find(|known| known.name == device.device);
        let state = known.map_or("-", |known| storage::device_state(known.state));
        let mut cells = vec![
            device.device.clone(),
            state.to_owned(),
            format!("{}%", device.busy / 10),
            queue(device),
        ];
        cells.extend(rates(&device.reads, &device.writes, load.window_ms));
        table.row(cells);
    }
    // Those that do nothing because they are not there.
    let silent = |name: &str| !load.devices.iter().any(|device| device.device == name);
    for device in pool
        .devices
        .iter()
        .filter(|device| silent(&device.name))
        .take(ROWS)
    {
        let mut cells = vec![
            device.name.clone(),
            storage::device_state(device.state).to_owned(),
        ];
        cells.resize(4 + RATES.len(), "-".to_owned());
        table.row(cells);
    }
    table.text() + &more(load.devices.len(), "devices")
}

/// Requests in flight on average.
fn queue(device: &DeviceLoad) -> String {
    format!("{}.{}", device.depth / 1000, device.depth % 1000 / 100)
}

fn volumes(pool: &PoolStatus, load: &PoolLoad) -> String {
    let mut table = Table::new(&heading(&["VOLUME", "STATE"]), &[2, 3, 4, 5, 6, 7, 8, 9]);
    let mut volumes: Vec<_> = load.volumes.iter().collect();
    volumes.sort_by_key(|volume| std::cmp::Reverse(volume.reads.bytes + volume.writes.bytes));
    for volume in volumes.iter().take(ROWS) {
        let known = pool.volumes.iter().find(|known| known.name == volume.volume);
        let state = known.map_or("-", |known| storage::health(known.state));
        let mut cells = vec![volume.volume.clone(), state.to_owned()];
        cells.extend(rates(&volume.reads, &volume.writes, load.window_ms));
        table.row(cells);
    }
    table.text() + &more(load.volumes.len(), "volumes")
}

fn disks(vm: &VmStatus) -> String {
    let mut table = Table::new(&["DISK", "STATE", "SIZE", "SOURCE"], &[2]);
    for disk in vm.disks.iter().take(ROWS) {
        let source = disk.config.source().map(|source| source.to_string());
        table.row([
            disk.config.id.to_string(),
            match &disk.stopped {
                Some(_) => "stopped".to_owned(),
                None => vm::state(disk.state).to_owned(),
            },
            disk.size.to_string(),
            source.unwrap_or_default(),
        ]);
    }
    table.text() + &more(vm.disks.len(), "disks")
}

/// The disks that a manager serves, the busiest first.
fn machines_disks(all: &[AttachmentMetrics], window_ms: u64) -> String {
    let mut table = Table::new(
        &[
            "MACHINE", "DISK", "FILE", "READS/s", "BYTES/s", "WRITES/s", "BYTES/s", "OTHER/s", "50%", "99%",
            "QUEUE",
        ],
        &[3, 4, 5, 6, 7, 8, 9, 10],
    );
    let mut busiest: Vec<_> = all.iter().collect();
    busiest.sort_by_key(|disk| std::cmp::Reverse(disk.latencies.sum_us));
    for disk in busiest.iter().take(ROWS) {
        let (counts, times) = (&disk.counts, &disk.latencies);
        // By Little's law: what all of them waited, over the time in which they did.
        let tenths = times.sum_us / 100 / window_ms.max(1);
        table.row([
            disk.attachment.vm.to_string(),
            disk.attachment.device.to_string(),
            disk.attachment.file.clone(),
            per_second(counts.reads, window_ms).to_string(),
            size(per_second(counts.read_bytes, window_ms)),
            per_second(counts.writes, window_ms).to_string(),
            size(per_second(counts.written_bytes, window_ms)),
            per_second(counts.flushes + counts.others, window_ms).to_string(),
            micros(times.percentile(50)),
            micros(times.percentile(99)),
            format!("{}.{}", tenths / 10, tenths % 10),
        ]);
    }
    table.text() + &more(all.len(), "disks")
}

#[cfg(test)]
mod tests {
    use api::storage::{Health, VolumeLoad};

    use super::*;

    #[test]
    fn load_is_shown_per_second() {
        let writes = RequestLoad {
            requests: 200,
            bytes: 8 << 20,
            errors: 0,
            p50_us: 512,
            p99_us: 4096,
        };
        let load = PoolLoad {
            pool: "tank".into(),
            window_ms: 2000,
            devices: vec![DeviceLoad {
                device: "d0".into(),
                busy: 257,
                depth: 1500,
                reads: RequestLoad::default(),
                writes: writes.clone(),
                legs: Vec::new(),
            }],
            volumes: vec![VolumeLoad {
                volume: "data".into(),
                reads: RequestLoad::default(),
                writes,
            }],
        };
        let pool = PoolStatus {
            name: "tank".into(),
            id: String::new(),
            epoch: 1,
            state: Health::Healthy,
            size: 1 << 30,
            used: 1 << 20,
            devices: Vec::new(),
            volumes: Vec::new(),
            jobs: Vec::new(),
            files: None,
            notes: Vec::new(),
        };
        let text = show(&Picture {
            vm: None,
            pool: Some(pool),
            load: Some(load),
            attachments: Vec::new(),
            attachments_ms: 0,
        });
        assert!(text.contains("pool tank: healthy, 1M of 1G used"), "{text}");
        let device =
            "d0      -       25%    1.5        0        0    -    -       100       4M  512us  4ms\n";
        assert!(text.contains(device), "{text}");
    }

    #[test]
    fn disks_of_machines_are_shown_by_what_came_between_two_looks() {
        let mut disk = AttachmentMetrics {
            attachment: api::Attachment {
                vm: "web1".parse().unwrap(),
                device: "disk0".parse().unwrap(),
                pool: "tank".into(),
                file: "/web1.dsk".into(),
                read_only: false,
            },
            counts: api::RequestCounts {
                reads: 100,
                read_bytes: 100 << 12,
                ..api::RequestCounts::default()
            },
            latencies: api::Latencies::default(),
        };
        let before = [disk.clone()];
        disk.counts.reads += 2000;
        disk.counts.read_bytes += 2000 << 12;
        disk.counts.flushes = 4;
        // 2000 requests of a millisecond each in two seconds: one is always under way.
        disk.latencies.classes[10] = 2000;
        disk.latencies.sum_us = 2_000_000;
        since(&mut disk, &before);
        let text = machines_disks(&[disk], 2000);
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        let expected = [
            "web1",
            "disk0",
            "/web1.dsk",
            "1000",
            "3.9M",
            "0",
            "0",
            "2",
            "1ms",
            "1ms",
            "1.0",
        ];
        assert_eq!(row, expected, "{text}");
    }
}
