//! Files and the file system as text for people.

use api::Utc;
use api::file::{
    CheckFinding, CheckReport, FileAnswer, FileEntry, FileExtent, FileKind, FileOperation, FileScrub,
    FileStatus, FileSystemStatus, Moved, ScrubFinding, Severity, Target, Written,
};

use super::show::{Table, size};

/// What came of an operation.
pub(crate) fn answer(operation: &FileOperation, answer: &FileAnswer, long: bool) -> String {
    match answer {
        FileAnswer::Done => done(operation),
        FileAnswer::Entries(list) => entries(operation, list, long),
        FileAnswer::Status(found) => match operation {
            FileOperation::SetAttributes { attributes, .. } if attributes.target.is_some() => format!(
                "{}what it has stays where it is until `smsvmm file relocate {}`\n",
                status(found),
                found.entry.path
            ),
            _ => status(found),
        },
        FileAnswer::Extents(list) => extents(list),
        FileAnswer::Moved(done) => moved(operation, done),
        FileAnswer::Checked(report) => checked(report),
        FileAnswer::Scrubbed(report) => scrubbed(report),
        FileAnswer::FileSystem(made) => formatted(made),
    }
}

fn done(operation: &FileOperation) -> String {
    match operation {
        FileOperation::Move { from, to } => format!("{from} is moved to {to}\n"),
        FileOperation::Delete { path, .. } => format!("{path} is deleted\n"),
        FileOperation::MakeDirectory { path, .. } => format!("{path} is there\n"),
        FileOperation::Snapshot { path, layer } => {
            format!("{path} is frozen; {layer} is written from now on\n")
        }
        FileOperation::Merge { layer, .. } => format!("{layer} has all that its parent had, which is gone\n"),
        FileOperation::Clone { frozen, path } => format!("{path} has the content of {frozen}\n"),
        FileOperation::Resize {
            path, size: bytes, ..
        } => format!("{path} has {}\n", size(*bytes)),
        FileOperation::Drain { volume, .. } => format!("volume {volume} is used like the others\n"),
        _ => String::new(),
    }
}

fn entries(operation: &FileOperation, entries: &[FileEntry], long: bool) -> String {
    let recursive = matches!(operation, FileOperation::List { recursive: true, .. });
    let name = |entry: &FileEntry| {
        let name = match recursive {
            true => entry.path.as_str(),
            false => entry.path.rsplit('/').next().unwrap_or_default(),
        };
        match entry.kind {
            FileKind::Directory => format!("{name}/"),
            FileKind::File => name.to_owned(),
        }
    };
    if !long {
        return entries.iter().map(|entry| name(entry) + "\n").collect();
    }
    let mut table = Table::new(&["KIND", "SIZE", "ALLOCATED", "MADE", "STATE", "NAME"], &[1, 2]);
    for entry in entries {
        let directory = entry.kind == FileKind::Directory;
        table.row([
            match entry.kind {
                FileKind::File => "file".to_owned(),
                FileKind::Directory => "directory".to_owned(),
            },
            match directory {
                true => entry.size.to_string(),
                false => size(entry.size),
            },
            match directory {
                true => "-".to_owned(),
                false => size(entry.allocated),
            },
            time(entry.created),
            match (entry.frozen, entry.layer) {
                (true, true) => "frozen layer".to_owned(),
                (true, false) => "frozen".to_owned(),
                (false, true) => "layer".to_owned(),
                (false, false) => "-".to_owned(),
            },
            name(entry),
        ]);
    }
    match entries.is_empty() {
        true => "nothing is in it\n".to_owned(),
        false => table.text(),
    }
}

fn status(status: &FileStatus) -> String {
    let entry = &status.entry;
    let attributes = &status.attributes;
    let place = match &attributes.target {
        Target::Any => "on any volume".to_owned(),
        Target::Volume(volume) => format!("on volume {volume}"),
        Target::Class(class) => format!("on volumes of class {class}"),
    };
    let mut decided = vec![place];
    decided.push(if attributes.thick { "thick" } else { "thin" }.to_owned());
    if attributes.checksums {
        decided.push("with checksums".to_owned());
    }
    if attributes.exempt_from_migration {
        decided.push("never migrated".to_owned());
    }
    let decided = decided.join(", ");
    if entry.kind == FileKind::Directory {
        return format!(
            "{}: a directory with {} entries, made {}\n     what is made in it: {decided}\n",
            entry.path,
            entry.size,
            time(entry.created)
        );
    }
    let mut text = format!(
        "{}: {}, {} allocated, made {}\n     {decided}\n",
        entry.path,
        size(entry.size),
        size(entry.allocated),
        time(entry.created)
    );
    if let Some(parent) = &status.parent {
        text += &format!("     a layer on {parent}\n");
    }
    if entry.frozen {
        text += "     frozen: takes no writes\n";
    }
    if !status.children.is_empty() {
        text += &format!("     its layers: {}\n", status.children.join(", "));
    }
    if status.absorbed {
        text += "     is being merged into its layer\n";
    }
    if status.shared > 0 {
        text += &format!(
            "     deleting it would free {}; its layers need the other {}\n",
            size(status.exclusive),
            size(status.shared)
        );
    }
    if !status.volumes.is_empty() {
        let mut table = Table::new(&["VOLUME", "ALLOCATED"], &[1]);
        for share in &status.volumes {
            table.row([share.volume.clone(), size(share.bytes)]);
        }
        text += &format!("\n{}", table.text());
    }
    text
}

fn extents(extents: &[FileExtent]) -> String {
    if extents.is_empty() {
        return "it has no data: all of it reads as zeroes\n".to_owned();
    }
    let mut table = Table::new(&["OFFSET", "LENGTH", "VOLUME", "START", "OF"], &[0, 1, 3]);
    for extent in extents {
        table.row([
            extent.offset.to_string(),
            extent.length.to_string(),
            extent.volume.clone(),
            extent.start.to_string(),
            extent.layer.clone(),
        ]);
    }
    table.text()
}

fn moved(operation: &FileOperation, moved: &Moved) -> String {
    let files = count(moved.files, "file", "files");
    let mut text = match moved.moved {
        0 => format!("{files}: nothing had to be moved\n"),
        bytes => format!("{files}: {} moved\n", size(bytes)),
    };
    if moved.stayed > 0 {
        text += &format!(
            "{} had to stay: there is no space for it where its files' attributes allow it; grow a volume or add one, or let the files \
             be elsewhere with `smsvmm file relocate`, and do it again\n",
            size(moved.stayed)
        );
    }
    if let FileOperation::Drain { volume, .. } = operation
        && moved.stayed == 0
    {
        text += &format!(
            "volume {volume} gets nothing new; `smsvmm volume delete {volume}` takes it away, `smsvmm file drain {volume} --end` \
             has it used again\n"
        );
    }
    text
}

fn count(number: u64, one: &str, several: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {several}"),
    }
}

fn checked(report: &CheckReport) -> String {
    let line = |found: &CheckFinding| {
        let severity = match found.severity {
            Severity::Minor => "minor",
            Severity::Major => "major",
            Severity::Loss => "loss",
        };
        format!("{severity}: {}: {}\n", found.object, found.problem)
    };
    let mut text: String = report.findings.iter().map(line).collect();
    if report.unlisted > 0 {
        text += &format!("and {} more\n", report.unlisted);
    }
    text += &format!(
        "{} and {}, {} allocated, {} of metadata: ",
        count(report.files, "file", "files"),
        count(report.directories, "directory", "directories"),
        size(report.allocated),
        size(report.metadata)
    );
    let found = report.findings.len() as u64 + report.unlisted;
    text += &match (found, report.repair) {
        (0, _) => "all is well\n".to_owned(),
        (_, true) if report.is_well() => format!("all of {found} findings is repaired\n"),
        (_, true) => format!("{} of {found} findings are left:\n", report.left.len()),
        (_, false) if report.findings.iter().any(|found| found.repairable) => {
            format!(
                "{found} findings; `smsvmm file check --repair` mends what can be mended without guessing\n"
            )
        }
        (_, false) => format!("{found} findings\n"),
    };
    if report.repair && !report.is_well() {
        text.extend(report.left.iter().map(line));
    }
    text
}

fn scrubbed(report: &FileScrub) -> String {
    let line = |found: &ScrubFinding| format!("{} at {}: {}\n", found.object, found.offset, found.problem);
    let mut text: String = report.findings.iter().map(line).collect();
    text += &format!(
        "{} of data and {} of metadata verified: ",
        size(report.data),
        size(report.metadata)
    );
    let repaired = report.repaired + report.metadata_repaired;
    text += &match (repaired, report.lost) {
        (0, 0) => "all is well\n".to_owned(),
        (_, 0) => format!("{} repaired, nothing is lost\n", size(repaired)),
        (_, lost) => format!("{} repaired, {} have no good copy\n", size(repaired), size(lost)),
    };
    if report.unread > 0 {
        text += &format!(
            "{} of other copies could not be read: a device is missing or fails; see `smsvmm pool status`, and verify again when it is mended\n",
            size(report.unread)
        );
    }
    if report.filled > 0 {
        text += &format!(
            "{} had no checksum since a crash, and have one now\n",
            size(report.filled)
        );
    }
    text
}

fn formatted(made: &FileSystemStatus) -> String {
    let mut text = format!(
        "the file system is made: {} for metadata, {} of them journal\n",
        size(made.meta_size),
        size(made.journal)
    );
    text += &match made.volumes.as_slice() {
        [] => "there is no volume for data yet; `smsvmm volume create` makes one, which joins by itself\n"
            .to_owned(),
        volumes => {
            let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
            format!("{} for data on {}\n", size(made.size), names.join(", "))
        }
    };
    text
}

pub(crate) fn written(written: &Written) -> String {
    let zeroes = match written.zeroes {
        0 => String::new(),
        bytes => format!(", {} of them zeroes that take no space", size(bytes)),
    };
    format!(
        "{}: {} written{zeroes}; it has {}, {} allocated\n",
        written.path,
        size(written.bytes),
        size(written.size),
        size(written.allocated)
    )
}

/// Seconds since 1970 as "2026-11-28 16:05" in UTC.
pub(crate) fn time(seconds: u64) -> String {
    if seconds == 0 {
        return "-".to_owned();
    }
    let Utc {
        year,
        month,
        day,
        hour,
        minute,
        ..
    } = Utc::from_unix(seconds);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(time(1), "1970-01-01 00:00");
        assert_eq!(time(951_782_400), "2000-02-29 00:00");
        assert_eq!(time(1_795_881_900), "2026-11-28 16:05");
    }
}
