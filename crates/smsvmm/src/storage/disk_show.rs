//! Virtual disks as text for people.

use api::file::Target;
use api::storage::{JobState, JobStatus};
use api::virtual_disk::{
    ChangedRange, DiskAnswer, DiskOperation, DiskPlaces, ImageFormat, SnapshotStatus, Transferred,
    VirtualDisk, VirtualDiskStatus,
};

use super::file_show::time;
use super::show::{Table, size};

/// What came of an operation.
pub(crate) fn answer(operation: &DiskOperation, answer: &DiskAnswer) -> String {
    match answer {
        DiskAnswer::Done => done(operation),
        DiskAnswer::Disks(disks) => list(disks),
        DiskAnswer::Snapshots(snapshots) => snapshot_table(snapshots),
        DiskAnswer::Status(disk) => status(disk),
        DiskAnswer::Changed(ranges) => changed(ranges),
        DiskAnswer::Places(places) => place_list(places),
        DiskAnswer::Job(job) => moved(job),
        // No command makes one.
        DiskAnswer::Pinned(pin) => format!("pin {}\n", pin.pin),
    }
}

fn moved(job: &JobStatus) -> String {
    let what = &job.what;
    match (job.state, job.moved) {
        (JobState::Done, Some(moved)) if moved.stayed > 0 => format!(
            "{what}: {} moved, {} stayed: there is no space for them\n",
            size(moved.moved),
            size(moved.stayed)
        ),
        (JobState::Done, Some(moved)) => format!("{what}: {} moved\n", size(moved.moved)),
        (JobState::Cancelled, _) => format!("{what}: cancelled; the same again moves the rest\n"),
        _ => format!("job {}: {what}: {} %\n", job.id, job.percent()),
    }
}

fn done(operation: &DiskOperation) -> String {
    match operation {
        DiskOperation::Create {
            path,
            size: bytes,
            thick,
            ..
        } => {
            let space = if *thick { "all of it allocated" } else { "thin" };
            format!("{path} has {}, {space}\n", size(*bytes))
        }
        DiskOperation::Delete { path } | DiskOperation::DeleteSnapshot { path } => {
            format!("{path} is deleted\n")
        }
        DiskOperation::Resize {
            path, size: bytes, ..
        } => format!("{path} has {}\n", size(*bytes)),
        DiskOperation::Snapshot { paths, name, .. } => paths
            .iter()
            .map(|path| format!("{path}@{name} is kept\n"))
            .collect(),
        DiskOperation::DescribeSnapshot { path, name, .. } => match (path.rsplit_once('@'), name) {
            (Some((disk, _)), Some(name)) => format!("{disk}@{name} has it\n"),
            _ => format!("{path} has it\n"),
        },
        DiskOperation::Revert { path } => match path.rsplit_once('@') {
            Some((disk, name)) => format!("{disk} is as it was when {name} was made\n"),
            None => String::new(),
        },
        DiskOperation::Clone { path, to } => format!("{to} has the content of {path}\n"),
        DiskOperation::Commit { path } => format!("what was written to {path} stays\n"),
        DiskOperation::Discard { path } => format!("what was written to {path} is gone\n"),
        DiskOperation::Merge { path } => format!("{path} has no layer more than it needs\n"),
        _ => String::new(),
    }
}

fn list(disks: &[VirtualDisk]) -> String {
    if disks.is_empty() {
        return "no disks; `smsvmm disk create` makes one\n".to_owned();
    }
    let mut table = Table::new(&["DISK", "SIZE", "ALLOCATED", "SNAPSHOTS", "STATE"], &[1, 2, 3]);
    for disk in disks {
        table.row([
            disk.path.clone(),
            size(disk.size),
            size(disk.allocated),
            disk.snapshots.to_string(),
            match (&disk.problem, disk.redo) {
                (Some(problem), _) => problem.clone(),
                (None, Some(mode)) => format!("{} layer to commit or discard", mode.name()),
                (None, None) => "-".to_owned(),
            },
        ]);
    }
    table.text()
}

fn status(status: &VirtualDiskStatus) -> String {
    let disk = &status.disk;
    let place = match &status.attributes.target {
        Target::Any => "on any volume".to_owned(),
        Target::Volume(volume) => format!("on volume {volume}"),
        Target::Class(class) => format!("on volumes of class {class}"),
    };
    let kind = if status.attributes.thick { "thick" } else { "thin" };
    let sums = if status.attributes.checksums {
        ", with checksums"
    } else {
        ""
    };
    let mut text = format!(
        "{}: {}, {} allocated, made {}\n     {place}, {kind}{sums}; read through {}\n",
        disk.path,
        size(disk.size),
        size(disk.allocated),
        time(status.created),
        match status.layers {
            1 => "1 layer".to_owned(),
            layers => format!("{layers} layers"),
        }
    );
    if let Some(mode) = disk.redo {
        text += &format!(
            "     {} written in mode {}: `smsvmm disk commit {path}` keeps that, `smsvmm disk discard {path}` throws it away\n",
            size(status.redo_allocated),
            mode.name(),
            path = disk.path
        );
    }
    if status.unmerged > 0 {
        text += &format!(
            "     a layer that is not needed is still to be merged: `smsvmm disk merge {}`\n",
            disk.path
        );
    }
    if status.snapshot_list.is_empty() {
        return text;
    }
    text += &format!("\n{}", snapshot_table(&status.snapshot_list));
    if let Some(name) = &status.based_on {
        text += &format!("the disk is built on {name}\n");
    }
    text
}

fn snapshot_table(snapshots: &[SnapshotStatus]) -> String {
    let mut table = Table::new(
        &["SNAPSHOT", "MADE", "SIZE", "WRITTEN", "BUILT ON", "DESCRIPTION"],
        &[2, 3],
    );
    let dash = |text: &str| match text {
        "" => "-".to_owned(),
        text => text.to_owned(),
    };
    for snapshot in snapshots {
        table.row([
            snapshot.name.clone(),
            time(snapshot.created),
            size(snapshot.size),
            size(snapshot.allocated),
            dash(snapshot.parent.as_deref().unwrap_or("")),
            dash(&snapshot.description.replace('\n', " ")),
        ]);
    }
    table.text()
}

fn changed(ranges: &[ChangedRange]) -> String {
    if ranges.is_empty() {
        return "nothing was changed\n".to_owned();
    }
    let mut table = Table::new(&["OFFSET", "LENGTH", "CONTENT"], &[0, 1]);
    for range in ranges {
        table.row([
            range.offset.to_string(),
            range.length.to_string(),
            if range.zero { "zeroes" } else { "data" }.to_owned(),
        ]);
    }
    table.text()
}

fn place_list(places: &DiskPlaces) -> String {
    if let Some(why) = &places.unreadable {
        return format!("cannot be read from devices as it is: {why}\n");
    }
    let mut table = Table::new(&["OFFSET", "LENGTH", "DEVICE", "START"], &[0, 1, 3]);
    for extent in &places.extents {
        table.row([
            extent.offset.to_string(),
            extent.length.to_string(),
            format!("d{}", extent.device),
            extent.start.to_string(),
        ]);
    }
    let configuration = places.configuration.as_deref().unwrap_or_default();
    format!("configuration {configuration}\n{}", table.text())
}

/// What was imported, exported or copied.
pub(crate) fn transferred(what: &str, done: &Transferred) -> String {
    let format = done.format.map_or("", ImageFormat::name);
    let space = if format.is_empty() { "" } else { " " };
    let verified = match done.verified {
        true => "; it was read again and is the same",
        false => "",
    };
    format!(
        "{}: {}{space}{format} {what}, {} of it data{verified}\n",
        done.path,
        size(done.size),
        size(done.data)
    )
}
