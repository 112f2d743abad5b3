//! Answers for people.

use std::fmt::Write;

use api::storage::{JobState, JobStatus, Shape};
use api::virtual_disk::SnapshotStatus;
use api::{ByteSize, Utc};
use expanded_api::{Answer, Description, GuestDisk, GuestEvent, GuestVolume};

use crate::host::Found;

/// The name of a value as its JSON has it.
fn name_of(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// Columns that are as wide as what is in them; the last is not filled up.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

/// What the host did, in words.
pub(crate) fn answer(answer: &Answer, here: &[Found]) -> String {
    match answer {
        Answer::Done => String::new(),
        Answer::Description(description) => describe(description),
        Answer::Disks(all) => disks(all, here),
        Answer::Disk(status) => {
            let disk = &status.disk;
            let mut text = format!(
                "{}: {}, {} of volumes, {} layers\n",
                disk.path,
                ByteSize::from_bytes(disk.size),
                ByteSize::from_bytes(disk.allocated),
                status.layers
            );
            if let Some(base) = &status.based_on {
                let _ = writeln!(text, "built on snapshot {base}");
            }
            text + &snapshots(&status.snapshot_list)
        }
        Answer::Volumes(all) => volumes(all),
        Answer::Attached(disk) => {
            let device = here.iter().find(|found| found.serial == disk.serial);
            let device = device.map_or_else(
                || format!("it comes in a moment, with serial number {}", disk.serial),
                |found| found.path.display().to_string(),
            );
            format!("{}: {device}\n", disk.path)
        }
        Answer::Moved(moved) => {
            let size = ByteSize::from_bytes;
            match moved.stayed {
                0 => format!("{} moved\n", size(moved.moved)),
                stayed => format!(
                    "{} moved; {} stayed: there is no space for them\n",
                    size(moved.moved),
                    size(stayed)
                ),
            }
        }
        Answer::Jobs(all) => jobs(all),
        Answer::Image(image) => {
            let rows = image.disks.iter();
            let rows: Vec<_> = rows
                .map(|disk| row([&disk.snapshot, &disk.configuration]))
                .collect();
            table(&rows)
        }
        Answer::Extents(all) => {
            let mut rows = vec![row(["OFFSET", "LENGTH", "VOLUME", "START"])];
            rows.extend(all.iter().map(|extent| {
                vec![
                    extent.offset.to_string(),
                    extent.length.to_string(),
                    extent.volume.clone(),
                    extent.start.to_string(),
                ]
            }));
            table(&rows)
        }
        Answer::ConfigurationId(text) => format!("{text}\n"),
        Answer::Changed(ranges) => {
            let mut rows = vec![row(["OFFSET", "LENGTH", ""])];
            rows.extend(ranges.iter().map(|range| {
                let zero = if range.zero { "zeroes" } else { "" };
                row([&range.offset.to_string(), &range.length.to_string(), zero])
            }));
            table(&rows)
        }
        Answer::NotConfigured(what) => format!("this host has no {what}\n"),
    }
}

fn describe(description: &Description) -> String {
    let rights: Vec<String> = description
        .rights
        .iter()
        .map(|right| right.name().to_owned())
        .collect();
    let quota = &description.quota;
    let bytes = quota
        .bytes
        .map(|bytes| format!(", {} together", ByteSize::from_bytes(bytes)));
    table(&[
        row(["machine", description.vm.as_str()]),
        row([
            "host",
            &format!(
                "smsvmm {}, expanded API {}",
                description.product, description.version
            ),
        ]),
        row(["may", &rights.join(", ")]),
        row(["with disks", &format!("its own; {}", list(&description.objects))]),
        row(["volumes", &list(&description.volumes)]),
        row(["devices", &list(&description.devices)]),
        row([
            "at most",
            &format!(
                "{} disks{}, {} snapshots of each, {} jobs at once, {} requests per second",
                quota.disks,
                bytes.unwrap_or_default(),
                quota.snapshots,
                quota.jobs,
                quota.rate
            ),
        ]),
    ])
}

fn disks(all: &[GuestDisk], here: &[Found]) -> String {
    if all.is_empty() {
        return "this machine has no disks\n".to_owned();
    }
    let mut rows = vec![row(["DEVICE", "ID", "SIZE", "SNAPSHOTS", "VOLUMES", "DISK"])];
    for disk in all {
        let found = here
            .iter()
            .find(|found| Some(&found.serial) == disk.serial.as_ref());
        let device = found.map(|found| found.path.display().to_string());
        let path = disk.path.as_deref().unwrap_or("(not in a pool)");
        let note = if disk.read_only { " (read-only)" } else { "" };
        rows.push(vec![
            device.unwrap_or_else(|| "-".to_owned()),
            disk.id
                .as_ref()
                .map_or_else(|| "-".to_owned(), ToString::to_string),
            ByteSize::from_bytes(disk.size).to_string(),
            disk.snapshots.len().to_string(),
            disk.volumes.join(","),
            format!("{path}{note}"),
        ]);
    }
    table(&rows)
}

/// Snapshots of a disk.
pub(crate) fn snapshots(all: &[SnapshotStatus]) -> String {
    if all.is_empty() {
        return "no snapshots\n".to_owned();
    }
    let mut rows = vec![row(["SNAPSHOT", "MADE", "SIZE", "WRITTEN BEFORE", "DESCRIPTION"])];
    rows.extend(all.iter().map(|snapshot| {
        vec![
            snapshot.name.clone(),
            Utc::from_unix(snapshot.created).to_string(),
            ByteSize::from_bytes(snapshot.size).to_string(),
            ByteSize::from_bytes(snapshot.allocated).to_string(),
            snapshot.description.clone(),
        ]
    }));
    table(&rows)
}

fn shape(shape: &Shape) -> String {
    let layout = name_of(&shape.layout);
    match (shape.columns, shape.copies) {
        (0 | 1, 0 | 1) => layout,
        (columns, 0 | 1) => format!("{layout} of {columns}"),
        (0 | 1, copies) => format!("{layout}, {copies} copies"),
        (columns, copies) => format!("{layout} of {columns}, {copies} copies"),
    }
}

fn volumes(all: &[GuestVolume]) -> String {
    let mut rows = vec![row(["VOLUME", "STATE", "SIZE", "FREE", "LAYOUT", ""])];
    rows.extend(all.iter().map(|volume| {
        vec![
            volume.name.clone(),
            name_of(&volume.state),
            ByteSize::from_bytes(volume.size).to_string(),
            volume
                .free
                .map_or_else(|| "-".to_owned(), |free| ByteSize::from_bytes(free).to_string()),
            shape(&volume.shape),
            if volume.yours {
                String::new()
            } else {
                "not to be changed from here".to_owned()
            },
        ]
    }));
    table(&rows)
}

fn stayed(job: &JobStatus) -> u64 {
    job.moved.map_or(0, |moved| moved.stayed)
}

/// How far jobs are that are waited for, in one line.
pub(crate) fn progress(all: &[JobStatus]) -> String {
    let live = all.iter().filter(|job| job.is_live());
    let each = live.map(|job| {
        let size = ByteSize::from_bytes;
        let of = match job.total {
            0 => size(job.done).to_string(),
            total => format!("{} of {}", size(job.done.min(total)), size(total)),
        };
        let rate = job.rate.map(|rate| format!(", {}/s", size(rate)));
        let left = job.seconds_left.map(|left| match left {
            0..120 => format!(", {left} s left"),
            _ => format!(", {} min left", left.div_ceil(60)),
        });
        format!(
            "job {}: {} %, {of}{}{}: {}",
            job.id,
            job.percent(),
            rate.unwrap_or_default(),
            left.unwrap_or_default(),
            job.what
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Jobs, one per line.
pub(crate) fn jobs(all: &[JobStatus]) -> String {
    if all.is_empty() {
        return "this machine has begun no jobs\n".to_owned();
    }
    let mut rows = vec![row(["JOB", "STATE", "DONE", "WHAT"])];
    rows.extend(all.iter().map(|job| {
        let state = match (&job.state, &job.reason) {
            (JobState::Failed, Some(reason)) => format!("failed: {reason}"),
            (JobState::Done, _) if stayed(job) > 0 => {
                let stayed = ByteSize::from_bytes(stayed(job));
                format!("done; {stayed} stayed: there is no space for them")
            }
            (state, _) => name_of(state),
        };
        vec![
            job.id.to_string(),
            state,
            format!("{} %", job.percent()),
            job.what.clone(),
        ]
    }));
    table(&rows)
}

/// An event in one line.
pub(crate) fn event(event: &GuestEvent) -> String {
    let mut text = format!(
        "{:>5}  {}  {}",
        event.sequence,
        Utc::from_unix(event.time_ms / 1000),
        event.event
    );
    if let Some(object) = &event.object {
        let _ = write!(text, " {object}");
    }
    if let Some(reason) = &event.reason {
        let _ = write!(text, ": {reason}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let text = table(&[row(["A", "B"]), row(["long", ""]), row(["x", "y"])]);
        assert_eq!(text, "A     B\nlong\nx     y\n");
    }
}
