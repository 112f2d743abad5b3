//! Ends a story that does not end, and says what its host was doing.
//!
//! A test that is killed from outside leaves nothing to look at. This one looks around before it goes: every process with what
//! its threads wait for, what the virtual machines have logged, and the host's timers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How it begins to speak.
pub(crate) const COMPLAINT: &str = "the story did not end within";

/// Exit status of a program that a watchdog ended, as `timeout` has it.
const ENDED: i32 = 124;

/// Ends this process with a report unless it is dropped in time.
pub(crate) struct Watchdog {
    _end: Sender<()>,
}

impl Watchdog {
    /// Watches from now on; `folder` holds the files of the story.
    pub(crate) fn start(limit: Duration, folder: &Path) -> Self {
        let (end, ended) = channel();
        let folder = folder.to_path_buf();
        // Nobody waits for it: it ends with its story, or the process with it.
        drop(thread::spawn(move || watch(&ended, limit, &folder)));
        Self { _end: end }
    }
}

fn watch(ended: &Receiver<()>, limit: Duration, folder: &Path) {
    if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        println!(
            "{COMPLAINT} {limit:?}\n{}{}{}",
            processes(),
            logs(folder),
            timers()
        );
        std::process::exit(ENDED);
    }
}

/// All processes but the kernel's own, and what each of their threads does.
fn processes() -> String {
    let mut report = String::new();
    for process in numbered(Path::new("/proc")) {
        let command = text(&process.join("cmdline")).replace('\0', " ");
        if command.is_empty() {
            continue;
        }
        report.push_str(&format!("{} {command}\n", name(&process)));
        for task in numbered(&process.join("task")) {
            let [name_of, at, call] = ["comm", "wchan", "syscall"].map(|file| text(&task.join(file)));
            report.push_str(&format!(
                "    {} {} in {} system call {}\n",
                name(&task),
                name_of.trim(),
                at.trim(),
                call.trim()
            ));
            for line in text(&task.join("stack")).lines() {
                report.push_str(&format!("        {line}\n"));
            }
        }
    }
    report
}

/// The ends of all files named `log` in the folders of the story's machines.
fn logs(folder: &Path) -> String {
    let machines = fs::read_dir(folder).into_iter().flatten().flatten();
    machines
        .filter_map(|machine| {
            let log = fs::read_to_string(machine.path().join("log")).ok()?;
            let skipped = log.lines().count().saturating_sub(40);
            let end: String = log
                .lines()
                .skip(skipped)
                .map(|line| format!("    {line}\n"))
                .collect();
            Some(format!("log of {}:\n{end}", name(&machine.path())))
        })
        .collect()
}

/// Whether the host's clock events are still programmed: the beginning of what its kernel says of its timers.
fn timers() -> String {
    let list = text(Path::new("/proc/timer_list"));
    list.lines().take(40).map(|line| format!("{line}\n")).collect()
}

/// Entries of a folder whose names are numbers, in their order.
fn numbered(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<(u32, PathBuf)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect();
    entries.sort();
    entries.into_iter().map(|(_, path)| path).collect()
}

fn name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// A file of the kernel, or nothing: it may be gone, or not ours to read.
fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_this_process_and_the_ends_of_logs() {
        let me = std::process::id();
        let report = processes();
        assert!(report.contains(&format!("{me} ")), "{report}");
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("vm")).unwrap();
        let log: String = (0..50).map(|line| format!("line {line}\n")).collect();
        fs::write(folder.path().join("vm/log"), log).unwrap();
        let report = logs(folder.path());
        assert!(report.starts_with("log of vm:\n    line 10\n"), "{report}");
        assert!(report.ends_with("line 49\n"), "{report}");
    }

    #[test]
    fn it_keeps_quiet_when_the_story_ends() {
        let (end, ended) = channel();
        drop(end);
        // It would end this process.
        watch(&ended, Duration::ZERO, Path::new("/nowhere"));
    }
}
