//! Writes files of a backup into a folder.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use backup::RawText;
use backup::client::Event;
use backup::message::{Progress, Selection};
use serde::Serialize;

use super::arguments::RestoreArguments;
use super::tree::{Target, Unfinished};
use super::{NOT_ALL, connect, said, show, signals};
use crate::host::AgentError;

/// What was restored.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Restored {
    /// What the mover sent.
    pub(crate) sent: Progress,
    /// Entries that are there now.
    pub(crate) entries: u64,
    /// What is not as it was, and why.
    pub(crate) problems: Vec<String>,
}

impl Restored {
    fn problem(&mut self, path: &RawText, reason: &str) {
        self.problems.push(format!("/{}: {reason}", show::shown(path)));
    }
}

/// Paths as a backup has them.
pub(crate) fn selection(name: &str, paths: &[PathBuf], only_list: bool) -> Selection {
    let path = |path: &PathBuf| {
        let bytes = path.as_os_str().as_bytes();
        let parts = bytes
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".");
        RawText(parts.collect::<Vec<&[u8]>>().join(&b'/'))
    };
    Selection {
        name: name.to_owned(),
        paths: paths.iter().map(path).collect(),
        only_list,
    }
}

pub(crate) fn restore(arguments: &RestoreArguments, json: bool) -> Result<ExitCode, AgentError> {
    let to: &Path = &arguments.to;
    let here = |source| AgentError::Here {
        what: to.display().to_string(),
        source,
    };
    let root = File::open(to).map_err(here)?;
    if !root.metadata().map_err(here)?.is_dir() {
        return Err(AgentError::Text(format!("{} is no folder", to.display())));
    }
    let mut target = Target::new(root, arguments.overwrite);
    let mut mover = connect(&arguments.from.address, &arguments.from.access)?;
    let selection = selection(&arguments.name, &arguments.paths, false);
    mover.restore(&selection).map_err(said)?;
    let mut restored = Restored::default();
    let received = receive(&mut target, &mut restored, || mover.next_event().map_err(said));
    // Also when it was broken off: what is there shall be as it was.
    for (path, reason) in target.end() {
        restored.problem(&path, &reason);
    }
    match (received, restored.entries) {
        (Ok(()), _) => {}
        (Err(error), 0) => return Err(error),
        (Err(error), count) => {
            return Err(AgentError::Text(format!(
                "{error}; {count} entries were restored before, the rest was not"
            )));
        }
    }
    show::restored(&restored, json);
    Ok(match restored.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(NOT_ALL),
    })
}

/// What is being restored.
enum Current {
    Nothing,
    /// It could not be made; what comes of it is left out.
    LeftOut(RawText),
    /// A folder, which is there.
    Made(RawText),
    Unfinished(RawText, Box<Unfinished>, u64),
}

fn receive(
    target: &mut Target,
    restored: &mut Restored,
    mut next: impl FnMut() -> Result<Event, AgentError>,
) -> Result<(), AgentError> {
    let wrong = || AgentError::Text("the mover sends what is no restoration".to_owned());
    let mut current = Current::Nothing;
    loop {
        signals::check()?;
        match next()? {
            Event::Entry(entry) => {
                if !matches!(current, Current::Nothing) {
                    return Err(wrong());
                }
                let (path, size) = (entry.path.clone(), entry.size());
                current = match target.begin(*entry) {
                    Ok(Some(made)) => Current::Unfinished(path, Box::new(made), size),
                    Ok(None) => Current::Made(path),
                    Err(error) => {
                        restored.problem(&path, &error.to_string());
                        Current::LeftOut(path)
                    }
                };
            }
            Event::Content { offset, bytes } => match &current {
                Current::Unfinished(path, made, size) => {
                    let file = made.file.as_ref().ok_or_else(wrong)?;
                    let end = offset.checked_add(bytes.len() as u64);
                    end.filter(|end| end <= size).ok_or_else(wrong)?;
                    if let Err(error) = file.write_all_at(&bytes, offset) {
                        restored.problem(path, &error.to_string());
                        current = Current::LeftOut(path.clone());
                    }
                }
                Current::LeftOut(_) => {}
                Current::Nothing | Current::Made(_) => return Err(wrong()),
            },
            Event::EntryEnd { problem } => {
                let path = match std::mem::replace(&mut current, Current::Nothing) {
                    Current::Nothing => return Err(wrong()),
                    Current::LeftOut(path) => path,
                    Current::Made(path) => {
                        restored.entries += 1;
                        path
                    }
                    Current::Unfinished(path, made, _) => {
                        match target.finish(*made) {
                            Ok(problems) => {
                                restored.entries += 1;
                                problems
                                    .iter()
                                    .for_each(|problem| restored.problem(&path, problem));
                            }
                            Err(error) => restored.problem(&path, &error.to_string()),
                        }
                        path
                    }
                };
                if let Some(reason) = problem {
                    restored.problem(&path, &format!("the backup does not have all of it: {reason}"));
                }
            }
            Event::End(sent) => {
                restored.sent = sent;
                return match current {
                    Current::Nothing => Ok(()),
                    _ => Err(wrong()),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use backup::plan::{Content, Entry, Kind, Time};

    use super::*;

    fn entry(path: &str, kind: Kind) -> Event {
        Event::Entry(Box::new(Entry {
            path: path.into(),
            mode: 0o700,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            modified: Time::default(),
            accessed: None,
            xattrs: Vec::new(),
            kind,
        }))
    }

    fn file(path: &str, size: u64) -> Event {
        let content = Content::Stream {};
        entry(path, Kind::File { size, content })
    }

    fn bytes(offset: u64, text: &str) -> Event {
        let bytes = text.as_bytes().to_vec();
        Event::Content { offset, bytes }
    }

    fn all(folder: &Path, events: Vec<Event>) -> (Result<(), AgentError>, Restored) {
        let mut target = Target::new(File::open(folder).unwrap(), false);
        let mut restored = Restored::default();
        let mut events = events.into_iter();
        let next = || {
            events
                .next()
                .ok_or_else(|| AgentError::Text("it broke".to_owned()))
        };
        let received = receive(&mut target, &mut restored, next);
        target.end();
        (received, restored)
    }

    const END: Event = Event::EntryEnd { problem: None };

    #[test]
    fn files_come_back_with_holes_and_what_fails_is_told() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("there"), "old").unwrap();
        let (received, restored) = all(
            folder.path(),
            vec![
                entry("d", Kind::Directory {}),
                END,
                file("d/file", 8),
                bytes(2, "ab"),
                bytes(6, "c"),
                END,
                file("there", 3),
                bytes(0, "new"),
                END,
                file("half", 4),
                Event::EntryEnd {
                    problem: Some("input/output error".into()),
                },
                Event::End(Progress::default()),
            ],
        );
        received.unwrap();
        assert_eq!(
            std::fs::read(folder.path().join("d/file")).unwrap(),
            b"\0\0ab\0\0c\0"
        );
        assert_eq!(std::fs::read(folder.path().join("there")).unwrap(), b"old");
        assert_eq!(
            (restored.entries, restored.problems.len()),
            (3, 2),
            "{restored:?}"
        );
        assert!(restored.problems[1].contains("/half: the backup does not have all of it"));
    }

    #[test]
    fn what_is_broken_off_or_makes_no_sense_leaves_no_half_files() {
        let end = || Event::End(Progress::default());
        for events in [
            vec![file("a", 4), bytes(0, "ab")],
            vec![file("a", 4), bytes(2, "abc"), END, end()],
            vec![file("a", 4), bytes(u64::MAX, "a"), END, end()],
            vec![file("a", 4), file("b", 4)],
            vec![file("a", 4), end()],
            vec![bytes(0, "a")],
            vec![END],
            vec![entry("pipe", Kind::Fifo {}), bytes(0, "a")],
            vec![],
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (received, restored) = all(folder.path(), events);
            assert!(received.is_err() && restored.entries == 0, "{restored:?}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn paths_are_those_of_the_backup() {
        let of = |path: &str| selection("n", &[PathBuf::from(path)], false).paths[0].to_string();
        assert_eq!(
            (of("/srv//a/"), of("./srv"), of("/")),
            ("srv/a".into(), "srv".into(), String::new())
        );
    }
}
