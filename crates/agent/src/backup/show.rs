//! Backups for people.

use std::path::PathBuf;
use std::process::ExitCode;

use api::Utc;
use backup::RawText;
use backup::client::Event;
use backup::message::{BackupInfo, Progress};
use backup::plan::{Entry, Kind, Time};
use serde::Serialize;

use super::create::Created;
use super::restore::{Restored, selection};
use super::{Mover, said};
use crate::host::AgentError;
use crate::print;
use crate::show::table;

fn json_of(value: &impl Serialize) {
    print(&format!(
        "{}\n",
        serde_json::to_string_pretty(value).unwrap_or_default()
    ));
}

/// About how many: `5.6M`.
fn size(bytes: u64) -> String {
    let units = [(1_u64 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, letter)) => {
            let tenths = u128::from(bytes) * 10 / u128::from(*unit);
            format!("{}.{}{letter}", tenths / 10, tenths % 10)
        }
        None => bytes.to_string(),
    }
}

fn time(time: Time) -> String {
    Utc::from_unix(u64::try_from(time.seconds).unwrap_or(0)).to_string()
}

/// Numbers of a backup: `12 entries, 34M: 30M from devices, 4M in the parent`.
fn progress(progress: &Progress) -> String {
    let parts = [
        (progress.from_devices, "read from devices"),
        (progress.from_export, "read through the storage manager"),
        (progress.from_agent, "sent by the agent"),
        (progress.in_parent, "in the parent"),
    ];
    let parts = parts.iter().filter(|(bytes, _)| *bytes > 0);
    let parts: Vec<String> = parts
        .map(|(bytes, what)| format!("{} {what}", size(*bytes)))
        .collect();
    let mut text = format!("{} entries, {}", progress.entries, size(progress.bytes));
    if !parts.is_empty() {
        text = format!("{text}: {}", parts.join(", "));
    }
    text
}

/// What was made.
pub(crate) fn created(created: &Created, json: bool) {
    if json {
        return json_of(created);
    }
    for problem in &created.problems {
        eprintln!("sms-agent: {problem}");
    }
    if created.more_problems > 0 {
        eprintln!("sms-agent: and {} more", created.more_problems);
    }
    let backup = &created.backup;
    let mut text = format!("{}: {}\n", backup.name, progress(&backup.progress));
    if let Some(still) = &created.still {
        text.push_str(&format!("file systems stood still for {still}\n"));
    }
    let took = |(what, milliseconds): &(&str, u64)| {
        let tenths = milliseconds / 100;
        format!("{what} {}.{} s", tenths / 10, tenths % 10)
    };
    text.push_str(&format!(
        "{}\n",
        created.took_ms.iter().map(took).collect::<Vec<_>>().join(", ")
    ));
    if let Some(image) = &created.image {
        text.push_str(&format!(
            "the image {image} was kept: a later backup can be built on this one (--incremental)\n"
        ));
    }
    print(&text);
}

/// The backups of this machine.
pub(crate) fn list(mover: &mut Mover, json: bool) -> Result<ExitCode, AgentError> {
    let all = mover.list().map_err(said)?;
    if json {
        json_of(&all);
        return Ok(ExitCode::SUCCESS);
    }
    let row = |backup: &BackupInfo| {
        let state = match (backup.complete, &backup.parent) {
            (false, _) => "incomplete".to_owned(),
            (true, None) => "full".to_owned(),
            (true, Some(parent)) => format!("since {parent}"),
        };
        vec![
            backup.name.clone(),
            time(backup.frozen),
            state,
            backup.progress.entries.to_string(),
            size(backup.progress.bytes),
            size(backup.archive),
            backup.description.clone(),
        ]
    };
    let head = ["name", "frozen", "kind", "entries", "data", "archive", ""];
    let rows = std::iter::once(head.map(str::to_owned).to_vec()).chain(all.iter().map(row));
    print(&table(&rows.collect::<Vec<_>>()));
    Ok(ExitCode::SUCCESS)
}

/// A name on a terminal: what it has of control characters does nothing there.
pub(crate) fn shown(name: &RawText) -> String {
    let text = name.to_string();
    let escaped = |character: char| match character.is_control() {
        true => character.escape_unicode().to_string(),
        false => character.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// One line for an entry, like those of `ls -l`.
fn line(entry: &Entry) -> String {
    let (letter, more) = match &entry.kind {
        Kind::Directory {} => ('d', String::new()),
        Kind::File { .. } => ('-', String::new()),
        Kind::Symlink { target } => ('l', format!(" -> {}", shown(target))),
        Kind::HardLink { to } => ('h', format!(" = /{}", shown(to))),
        Kind::Fifo {} => ('p', String::new()),
        Kind::CharacterDevice { major, minor } => ('c', format!(" ({major}, {minor})")),
        Kind::BlockDevice { major, minor } => ('b', format!(" ({major}, {minor})")),
        Kind::Disk { .. } => ('D', String::new()),
    };
    let (mode, uid, gid) = (entry.mode, entry.uid, entry.gid);
    let (length, when) = (entry.size(), time(entry.modified));
    format!(
        "{letter} {mode:04o} {uid:>5} {gid:>5} {length:>12}  {when}  /{}{more}\n",
        shown(&entry.path)
    )
}

/// One line.
pub(crate) fn entry(entry: &Entry, json: bool) {
    match json {
        true => print(&format!("{}\n", serde_json::to_string(entry).unwrap_or_default())),
        false => print(&line(entry)),
    }
}

/// What is in a backup.
pub(crate) fn content(
    mover: &mut Mover,
    name: String,
    paths: &[PathBuf],
    json: bool,
) -> Result<ExitCode, AgentError> {
    mover.restore(&selection(&name, paths, true)).map_err(said)?;
    loop {
        match mover.next_event().map_err(said)? {
            Event::Entry(entry) if json => print(&format!(
                "{}\n",
                serde_json::to_string(&entry).unwrap_or_default()
            )),
            Event::Entry(entry) => print(&line(&entry)),
            Event::End(_) => return Ok(ExitCode::SUCCESS),
            Event::Content { .. } | Event::EntryEnd { .. } => {}
        }
    }
}

/// A backup was verified.
pub(crate) fn verified(name: &str, found: &Progress, json: bool) -> Result<ExitCode, AgentError> {
    match json {
        true => json_of(found),
        false => print(&format!(
            "{name}: all checksums are right ({})\n",
            progress(found)
        )),
    }
    Ok(ExitCode::SUCCESS)
}

/// Files were restored.
pub(crate) fn restored(restored: &Restored, json: bool) {
    if json {
        return json_of(restored);
    }
    for problem in &restored.problems {
        eprintln!("sms-agent: {problem}");
    }
    let (entries, bytes) = (restored.entries, size(restored.sent.bytes));
    print(&format!(
        "{entries} of {} entries restored, {bytes}\n",
        restored.sent.entries
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_line_and_no_command_for_a_terminal() {
        let name = RawText(b"a\n\x1b[2J\xff\\".to_vec());
        assert_eq!(shown(&name), "a\\u{a}\\u{1b}[2J\\xff\\\\");
    }

    #[test]
    fn numbers_say_from_where_bytes_came() {
        let some = Progress {
            entries: 3,
            bytes: 3 << 20,
            from_devices: 1 << 20,
            in_parent: 2 << 20,
            ..Progress::default()
        };
        assert_eq!(
            progress(&some),
            "3 entries, 3.0M: 1.0M read from devices, 2.0M in the parent"
        );
        assert_eq!(progress(&Progress::default()), "0 entries, 0");
        assert_eq!(
            (size(1023), size(1 << 10), size(u64::MAX)),
            ("1023".into(), "1.0K".into(), "16777215.9T".into())
        );
    }
}
