//! Pools, devices, volumes and jobs as tables for people.

use api::file::{FileSystemStatus, META_VOLUME};
use api::storage::{
    Health, JobPriority, JobState, JobStatus, LayoutKind, MemberHealth, PoolDevice, PoolDeviceState,
    PoolStatus, ReadPolicy, Shape, VolumeStatus,
};

/// Rows of cells under a heading, in columns as wide as need be.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns that hold numbers, and end at the right.
    right: &'static [usize],
}

impl Table {
    pub(crate) fn new(heading: &[&str], right: &'static [usize]) -> Self {
        Self {
            rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()],
            right,
        }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match self.right.contains(&column) {
                    true => line += &format!("{cell:>width$}  "),
                    false => line += &format!("{cell:width$}  "),
                }
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// 1610612736 as "1.5G": rounded down to a tenth.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(50, 'P'), (40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| bytes >> shift > 0) else {
        return bytes.to_string();
    };
    let tenths = (u128::from(bytes) * 10) >> shift;
    match tenths % 10 {
        0 => format!("{}{unit}", tenths / 10),
        rest => format!("{}.{rest}{unit}", tenths / 10),
    }
}

pub(crate) fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "healthy",
        Health::Resyncing => "resyncing",
        Health::Degraded => "degraded",
        Health::Failed => "failed",
    }
}

pub(crate) fn device_state(state: PoolDeviceState) -> &'static str {
    match state {
        PoolDeviceState::Active => "active",
        PoolDeviceState::Spare => "spare",
        PoolDeviceState::Evacuating => "evacuating",
        PoolDeviceState::Missing => "missing",
        PoolDeviceState::Returned => "returned",
        PoolDeviceState::Faulty => "faulty",
    }
}

fn job_state(state: JobState) -> &'static str {
    match state {
        JobState::Running => "unfinished",
        JobState::Paused => "paused",
        JobState::Done => "done",
        JobState::Cancelled => "cancelled",
        JobState::Failed => "failed",
    }
}

fn member_state(state: MemberHealth) -> &'static str {
    match state {
        MemberHealth::InSync => "in sync",
        MemberHealth::Filling => "filling",
        MemberHealth::Stale => "stale",
        MemberHealth::Missing => "missing",
    }
}

/// "mirror of 2", "raid5 4+1".
fn layout(shape: &Shape) -> String {
    let (columns, copies) = (shape.columns, shape.copies);
    match shape.layout {
        LayoutKind::Concat => "concat".to_owned(),
        LayoutKind::Stripe => format!("stripe of {columns}"),
        LayoutKind::Mirror => format!("mirror of {copies}"),
        LayoutKind::StripeMirror => format!("stripe of {columns} mirrors of {copies}"),
        LayoutKind::Raid5 => format!("raid5 {}+1", columns.saturating_sub(1)),
        LayoutKind::Raid6 => format!("raid6 {}+2", columns.saturating_sub(2)),
    }
}

pub(crate) fn pool(status: &PoolStatus) -> String {
    let mut text = format!(
        "pool {}: {}, {} of {} used, epoch {}\n     {}\n",
        status.name,
        health(status.state),
        size(status.used),
        size(status.size),
        status.epoch,
        status.id
    );
    text += &format!("\n{}", devices(&status.devices));
    text += &match status.volumes.is_empty() {
        true => "\nno volumes; `smsvmm volume create` makes one\n".to_owned(),
        false => format!("\n{}", volumes(&status.volumes, status.files.as_ref())),
    };
    if let Some(files) = &status.files {
        text += &format!(
            "\nfiles have {} of {}, metadata {} of {}\n",
            size(files.size - files.free),
            size(files.size),
            size(files.meta_size.saturating_sub(files.meta_free)),
            size(files.meta_size)
        );
    }
    let live: Vec<&JobStatus> = status.jobs.iter().filter(|job| job.is_live()).collect();
    if !live.is_empty() {
        text += &format!("\n{}", jobs(&live));
    }
    text += &advice(status);
    text
}

/// What a person should know and do.
fn advice(status: &PoolStatus) -> String {
    let mut text = String::new();
    let names = |state: PoolDeviceState| -> Vec<&str> {
        let devices = status.devices.iter().filter(|device| device.state == state);
        devices.map(|device| device.name.as_str()).collect()
    };
    let mut say = |line: String| text += &format!("{line}\n");
    let missing: Vec<&str> = names(PoolDeviceState::Missing);
    // What is missing has a line of its own.
    let said = |note: &&String| {
        missing
            .iter()
            .any(|name| note.starts_with(&format!("cannot open {name}:")))
    };
    for note in status.notes.iter().filter(|note| !said(note)) {
        say(format!("note: {note}"));
    }
    let of = |state: PoolDeviceState| {
        let devices = status.devices.iter().filter(move |device| device.state == state);
        devices
            .map(|device| device.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let missing = of(PoolDeviceState::Missing);
    if !missing.is_empty() {
        say(format!(
            "missing: {missing}; attach it again, or put another in its place with `smsvmm device replace`"
        ));
    }
    let returned = names(PoolDeviceState::Returned).join(", ");
    if !returned.is_empty() {
        say(format!(
            "returned: {returned}; it catches up when the pool is open, or now with `smsvmm job wait`"
        ));
    }
    match text.is_empty() {
        true => text,
        false => format!("\n{text}"),
    }
}

pub(crate) fn devices(devices: &[PoolDevice]) -> String {
    let errors = devices.iter().any(|device| device.errors.is_some());
    let mut heading = vec!["DEVICE", "STATE", "SIZE", "USED", "CLASS", "ENCLOSURE", "PATH"];
    if errors {
        heading.insert(4, "ERRORS");
    }
    let dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text.to_owned()
        }
    };
    let mut table = Table::new(&heading, if errors { &[2, 3, 4] } else { &[2, 3] });
    for device in devices {
        let mut cells = vec![
            device.id.clone(),
            device_state(device.state).to_owned(),
            size(device.size),
            size(device.used),
            dash(&device.class),
            dash(&device.enclosure),
            device.name.clone(),
        ];
        if errors {
            cells.insert(
                4,
                device.errors.map_or("-".to_owned(), |errors| errors.to_string()),
            );
        }
        table.row(cells);
    }
    table.text()
}

pub(crate) fn volumes(volumes: &[VolumeStatus], files: Option<&FileSystemStatus>) -> String {
    let mut heading = vec!["VOLUME", "STATE", "SIZE", "ON DEVICES", "LAYOUT"];
    if files.is_some() {
        heading.insert(3, "FILES");
    }
    let mut table = Table::new(&heading, if files.is_some() { &[2, 3, 4] } else { &[2, 3] });
    for volume in volumes {
        let mut cells = vec![
            volume.name.clone(),
            health(volume.state).to_owned(),
            size(volume.size),
            size(volume.used),
            layout(&volume.shape),
        ];
        if let Some(files) = files {
            cells.insert(3, used_by_files(&volume.name, files));
        }
        table.row(cells);
    }
    table.text()
}

/// What files have of a volume; a dash for one that the file system does not use.
fn used_by_files(name: &str, files: &FileSystemStatus) -> String {
    if name == META_VOLUME {
        return size(files.meta_size.saturating_sub(files.meta_free));
    }
    match files.volumes.iter().find(|volume| volume.name == name) {
        Some(volume) if volume.draining => format!("{}, draining", size(volume.size - volume.free)),
        Some(volume) => size(volume.size - volume.free),
        None => "-".to_owned(),
    }
}

pub(crate) fn volume(volume: &VolumeStatus) -> String {
    let shape = &volume.shape;
    let mut text = format!(
        "volume {}: {}, {}, {}",
        volume.name,
        health(volume.state),
        size(volume.size),
        layout(shape)
    );
    if !matches!(shape.layout, LayoutKind::Concat | LayoutKind::Mirror) {
        text += &format!(", stripe unit {}", size(shape.stripe_unit));
    }
    text += &match volume.tolerates {
        0 => "; no device may fail\n".to_owned(),
        1 => "; any one device may fail\n".to_owned(),
        count => format!("; any {count} devices may fail\n"),
    };
    text += &format!(
        "     {}, blocks of {} bytes, {} on devices\n",
        volume.id,
        volume.block,
        size(volume.used)
    );
    if volume.read_policy == ReadPolicy::FirstAnswer {
        text += "     the first answer of two copies counts\n";
    }
    if !shape.class.is_empty() {
        text += &format!("     only on devices of class {}\n", shape.class);
    }
    if !shape.devices.is_empty() {
        text += &format!("     only on {}\n", shape.devices.join(", "));
    }
    let mut table = Table::new(&["SECTION", "COLUMN", "STATE", "SIZE", "DEVICES"], &[0, 1, 3]);
    for member in &volume.members {
        table.row([
            member.section.to_string(),
            member.column.to_string(),
            member_state(member.state).to_owned(),
            size(member.size),
            member.devices.join(", "),
        ]);
    }
    format!("{text}\n{}", table.text())
}

pub(crate) fn jobs(jobs: &[&JobStatus]) -> String {
    let mut table = Table::new(
        &[
            "JOB", "KIND", "STATE", "DONE", "OF", "%", "RATE", "LEFT", "LIMIT", "PRIORITY", "WHAT",
        ],
        &[0, 3, 4, 5, 6, 7, 8],
    );
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for job in jobs {
        let reason = job.reason.as_ref().map(|reason| format!(": {reason}"));
        // Of some nobody knows how much it is before they end.
        let known = job.total > 0 || !job.is_live();
        table.row([
            job.id.to_string(),
            job.kind.clone(),
            job_state(job.state).to_owned(),
            size(job.done),
            dash(known.then(|| size(job.total))),
            dash(known.then(|| job.percent().to_string())),
            dash(job.rate.map(|rate| format!("{}/s", size(rate)))),
            dash(job.seconds_left.map(time_left)),
            dash((job.throttle > 0).then(|| format!("{}/s", size(job.throttle)))),
            dash((job.is_live() && !job.volatile).then(|| priority(job.priority).to_owned())),
            format!("{}{}", job.what, reason.unwrap_or_default()),
        ]);
    }
    table.text()
}

pub(crate) fn priority(priority: JobPriority) -> &'static str {
    match priority {
        JobPriority::Low => "low",
        JobPriority::Normal => "normal",
        JobPriority::High => "high",
    }
}

/// 75 seconds as "1:15", more than an hour as "2h05m", more than a day as "3d04h".
pub(crate) fn time_left(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours) {
        (0, 0) => format!("{minutes}:{:02}", seconds % 60),
        (0, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// What is there after a job was cancelled.
pub(crate) fn left_by(job: &JobStatus) -> String {
    let text = match (job.state, job.kind.as_str()) {
        (JobState::Cancelled, "resync") => {
            "what is not up to date yet is so no more than before; `smsvmm job wait` has it made good"
        }
        (JobState::Cancelled, "set-layout") => {
            "the part that was done has the new layout, the rest the old one; both are whole. `smsvmm volume set-layout` goes on, in either \
             direction"
        }
        (JobState::Cancelled, "move") => "what was moved stays where it is now; `smsvmm volume move` goes on",
        (JobState::Cancelled, "evacuate") => {
            "the device stays in the pool, and what was moved off it stays where it is now. One that was to take its place is in the pool as \
             well: go on with `smsvmm device evacuate` and `remove`"
        }
        (JobState::Cancelled, "scrub") => "what was found so far is repaired",
        (JobState::Cancelled, "auto-tune") => "moves that were done stay",
        (JobState::Cancelled, "import" | "copy") => "nothing is left of the new disk",
        (JobState::Cancelled, "export") => {
            "the pool is as it was; what was written elsewhere is for who asked to clear up"
        }
        (JobState::Cancelled, "merge") => {
            "the disk has its layers still, and can be used; it goes on when the disk is opened next, or with `smsvmm disk merge`"
        }
        (JobState::Cancelled, "relocate" | "defragment") => {
            "what was moved stays where it is now; give the command again to go on"
        }
        (JobState::Cancelled, "drain") => {
            "the volume gets nothing new still, until `smsvmm file drain --end`; give the command again to go on"
        }
        _ => return String::new(),
    };
    format!("{text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "SIZE"], &[1]);
        table.row(["long".to_owned(), "1".to_owned()]);
        assert_eq!(table.text(), "A     SIZE\nlong     1\n");
    }

    #[test]
    fn times_are_short() {
        let all = [0, 75, 7500, 273_600].map(time_left);
        assert_eq!(all, ["0:00", "1:15", "2h05m", "3d04h"]);
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0");
        assert_eq!(size(1023), "1023");
        assert_eq!(size(64 << 10), "64K");
        assert_eq!(size(3 << 29), "1.5G");
        assert_eq!(size(u64::MAX), "16383.9P");
    }
}
