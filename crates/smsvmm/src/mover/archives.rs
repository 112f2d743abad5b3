//! What can be done with archives: listed, shown, verified, restored.

use std::path::{Path, PathBuf};

use anyhow::Context;
use backup::RawText;
use backup::archive::{Chain, Sink};
use backup::message::BackupInfo;
use backup::plan::{Entry, Kind};
use backup::restore::{Restored, restore_disk, restore_tree};
use backup::store::{self, Store};
use serde_json::json;

use crate::exit::Exit;
use crate::logs;
use crate::output::{print, print_json};
use crate::storage::{Table, size, time};

/// The folders with archives: this one, and those in it.
fn folders(store: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let shown = || format!("cannot read {}", store.display());
    let mut folders = vec![store.to_owned()];
    for entry in std::fs::read_dir(store).with_context(shown)? {
        let entry = entry.with_context(shown)?;
        if entry.file_type().with_context(shown)?.is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}

pub(super) fn list(stores: &[PathBuf], json: bool) -> anyhow::Result<Exit> {
    let mut all: Vec<(String, BackupInfo)> = Vec::new();
    for store in stores {
        for folder in folders(store)? {
            let name = folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let list = Store::new(folder).list()?;
            all.extend(list.into_iter().map(|info| (name.clone(), info)));
        }
    }
    if json {
        let list: Vec<_> = all
            .iter()
            .map(|(principal, backup)| json!({ "principal": principal, "backup": backup }))
            .collect();
        print_json(&list)?;
        return Ok(Exit::Success);
    }
    let mut table = Table::new(
        &[
            "PRINCIPAL",
            "NAME",
            "FROZEN",
            "ENTRIES",
            "DATA",
            "ARCHIVE",
            "PARENT",
            "STATE",
        ],
        &[3, 4, 5],
    );
    for (principal, info) in all {
        let known = |text: String| if info.complete { text } else { "-".into() };
        table.row([
            principal,
            info.name.clone(),
            time(u64::try_from(info.frozen.seconds).unwrap_or(0)),
            known(info.progress.entries.to_string()),
            known(size(info.progress.bytes)),
            size(info.archive),
            info.parent.clone().unwrap_or_else(|| "-".into()),
            state(&info),
        ]);
    }
    print(&table.text())?;
    Ok(Exit::Success)
}

fn state(info: &BackupInfo) -> String {
    match (info.complete, info.progress.problems) {
        (false, _) if info.description.starts_with("cannot be read") => info.description.clone(),
        (false, _) => "not complete".into(),
        (true, 0) => "complete".into(),
        (true, problems) => format!("complete, {problems} files not whole"),
    }
}

/// Prints entries as they come.
struct Listing<'a> {
    json: bool,
    text: String,
    print: &'a mut dyn FnMut(&str) -> std::io::Result<()>,
}

impl Sink for Listing<'_> {
    fn entry(&mut self, number: u64, entry: &Entry) -> std::io::Result<bool> {
        let line = match self.json {
            true => serde_json::to_string(&json!({ "number": number, "entry": entry }))? + "\n",
            false => line(entry),
        };
        self.text.push_str(&line);
        if self.text.len() > 64 << 10 {
            (self.print)(&std::mem::take(&mut self.text))?;
        }
        Ok(false)
    }

    fn data(&mut self, _offset: u64, _bytes: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn zeroes(&mut self, _offset: u64, _length: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn end(&mut self, _problem: Option<&str>) -> std::io::Result<()> {
        Ok(())
    }
}

fn line(entry: &Entry) -> String {
    let (letter, more) = match &entry.kind {
        Kind::Directory {} => ('d', String::new()),
        Kind::File { .. } => ('-', String::new()),
        Kind::Symlink { target } => ('l', format!(" -> {target}")),
        Kind::HardLink { to } => ('h', format!(" = {to}")),
        Kind::Fifo {} => ('p', String::new()),
        Kind::CharacterDevice { major, minor } => ('c', format!(" {major}:{minor}")),
        Kind::BlockDevice { major, minor } => ('b', format!(" {major}:{minor}")),
        Kind::Disk { disk, .. } => ('D', format!(" (disk {disk})")),
    };
    let seconds = u64::try_from(entry.modified.seconds).unwrap_or(0);
    let path = if entry.path.bytes().is_empty() {
        "/".to_owned()
    } else {
        entry.path.to_string()
    };
    format!(
        "{letter} {:04o} {:>6} {:>6} {:>14} {}  {path}{more}\n",
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size(),
        time(seconds),
    )
}

pub(super) fn show(archive: &Path, summary: bool, json: bool) -> anyhow::Result<Exit> {
    let mut chain = Chain::open(archive.to_owned())?;
    let info = store::info(archive)?;
    match json {
        true => {
            print(&(serde_json::to_string(&json!({ "backup": info, "header": chain.header() }))? + "\n"))?
        }
        false => {
            let plan = &chain.header().plan;
            let mut text = format!(
                "{}: {}, {} entries, {} of data, frozen {}\n",
                info.name,
                state(&info),
                info.progress.entries,
                size(info.progress.bytes),
                time(u64::try_from(info.frozen.seconds).unwrap_or(0)),
            );
            for disk in &plan.disks {
                text.push_str(&format!("image: {}@{}\n", disk.disk, disk.snapshot));
            }
            for source in &plan.sources {
                text.push_str(&format!("source: {}\n", source.path));
            }
            for path in chain.paths().skip(1) {
                text.push_str(&format!("built on: {}\n", path.display()));
            }
            print(&text)?;
        }
    }
    if summary {
        return Ok(Exit::Success);
    }
    let mut listing = Listing {
        json,
        text: String::new(),
        print: &mut print,
    };
    chain.read(&mut listing)?;
    let rest = std::mem::take(&mut listing.text);
    print(&rest)?;
    Ok(Exit::Success)
}

pub(super) fn verify(archives: &[PathBuf], json: bool) -> anyhow::Result<Exit> {
    let mut exit = Exit::Success;
    let mut results = Vec::new();
    for archive in archives {
        let verified = store::verify(archive, &mut |_| {});
        let shown = archive.display();
        match &verified {
            Ok(progress) if !json => print(&format!(
                "{shown}: good, {} entries, {} of data\n",
                progress.entries,
                size(progress.bytes)
            ))?,
            Ok(_) => {}
            Err(error) => {
                exit = Exit::Failed;
                if !json {
                    logs::say(&format!("smsvmm: {}", backup::chain_of(error)));
                }
            }
        }
        results.push(match verified {
            Ok(progress) => json!({ "archive": archive, "good": true, "progress": progress }),
            Err(error) => json!({ "archive": archive, "good": false, "problem": backup::chain_of(&error) }),
        });
    }
    if json {
        print_json(&results)?;
    }
    Ok(exit)
}

pub(super) fn restore(
    archive: &Path,
    to: Option<&Path>,
    disk: Option<&Path>,
    files: &[RawText],
    json: bool,
) -> anyhow::Result<Exit> {
    let mut chain = Chain::open(archive.to_owned())?;
    let restored = match (to, disk) {
        (_, Some(file)) => restore_disk(&mut chain, files.first(), file)?,
        (to, None) => restore_tree(&mut chain, files, to.unwrap_or(Path::new(".")))?,
    };
    tell(&restored, json)?;
    Ok(match restored.problem_count {
        0 => Exit::Success,
        _ => Exit::Failed,
    })
}

fn tell(restored: &Restored, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(restored);
    }
    for problem in &restored.problems {
        logs::say(&format!("smsvmm: {problem}"));
    }
    let more = restored
        .problem_count
        .saturating_sub(restored.problems.len() as u64);
    if more > 0 {
        logs::say(&format!("smsvmm: and {more} more"));
    }
    let problems = match restored.problem_count {
        0 => String::new(),
        count => format!(", {count} problems"),
    };
    Ok(print(&format!(
        "{} entries, {} of data{problems}\n",
        restored.entries,
        size(restored.bytes)
    ))?)
}
