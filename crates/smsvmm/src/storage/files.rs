//! `smsvmm file`: files of a pool that nobody has open.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsFd;

use anyhow::Context;
use api::file::{FileAnswer, FileOutcome, ReadRequest, WriteRequest};
use api::storage::PoolEvent;
use api::{ByteSize, Problem, ProblemKind, StorageAnswer, StorageRequest};

use super::arguments::Which;
use super::file_arguments::{FileArguments, FileCommand};
use super::watch::Watch;
use super::{file_show, live, select};
use crate::exit::Exit;
use crate::logs;
use crate::output::{print, print_json};

pub(crate) fn file(arguments: FileArguments) -> anyhow::Result<Exit> {
    let FileArguments { which, command } = arguments;
    match command {
        FileCommand::Write {
            path,
            offset,
            size,
            thick,
        } => {
            let request = WriteRequest {
                path,
                offset: offset.map(ByteSize::bytes),
                size: size.map(ByteSize::bytes),
                thick,
                expected: None,
            };
            write(&which, request)
        }
        FileCommand::Read { path, offset, length } => {
            let request = ReadRequest {
                path,
                offset: offset.bytes(),
                length: length.map(ByteSize::bytes),
            };
            read(&which, request)
        }
        command => operate(&which, command),
    }
}

fn operate(which: &Which, command: FileCommand) -> anyhow::Result<Exit> {
    let long = matches!(command, FileCommand::List { long: true, .. });
    let Some(operation) = command.operation() else {
        return Ok(Exit::Success);
    };
    let outcome = match live::ask(which, || StorageRequest::File(operation.clone()))? {
        Some(StorageAnswer::File(outcome)) => *outcome,
        Some(_) => return Err(live::unexpected()),
        None => {
            let devices = select::devices(which)?;
            let mut watch = Watch::new(which.json)?;
            let outcome = storage_manager::execute_file(devices, operation.clone(), &mut |notice| {
                watch.notice(&notice)
            });
            watch.clear();
            outcome?
        }
    };
    // What was broken off is not done.
    let half = outcome.interrupted && outcome.answer == FileAnswer::Done;
    if !which.json && half {
        tell(&outcome.events);
    } else if !which.json {
        tell(&outcome.events);
        print(&file_show::answer(&operation, &outcome.answer, long))?;
    } else if operation.only_reads() {
        print_answer(&outcome)?;
    } else {
        print_json(&outcome)?;
    }
    let found = match &outcome.answer {
        FileAnswer::Checked(report) => !report.is_well(),
        FileAnswer::Scrubbed(report) => report.lost > 0,
        _ => false,
    };
    if outcome.interrupted {
        logs::say("smsvmm: it was broken off; done again, it goes on");
    }
    Ok(match outcome.interrupted || found {
        true => Exit::Failed,
        false => Exit::Success,
    })
}

fn print_answer(outcome: &FileOutcome) -> anyhow::Result<()> {
    match &outcome.answer {
        FileAnswer::Done => print_json(&serde_json::Value::Null),
        FileAnswer::Entries(entries) => print_json(entries),
        FileAnswer::Status(status) => print_json(status),
        FileAnswer::Extents(extents) => print_json(extents),
        FileAnswer::Moved(moved) => print_json(moved),
        FileAnswer::Checked(report) => print_json(report),
        FileAnswer::Scrubbed(report) => print_json(report),
        FileAnswer::FileSystem(status) => print_json(status),
    }
}

/// On standard error: what a command prints is its answer.
pub(super) fn tell(events: &[PoolEvent]) {
    // Bad news are in the log, on standard error, already.
    for event in events.iter().filter(|event| !event.kind.is_warning()) {
        logs::say(&format!("smsvmm: {}", event.text));
    }
}

fn write(which: &Which, mut request: WriteRequest) -> anyhow::Result<Exit> {
    let devices = select::devices(which)?;
    let input = io::stdin().as_fd().try_clone_to_owned();
    let mut input = File::from(input.context("cannot use the standard input")?);
    // A file says how much will come; a pipe does not.
    let rest = input.metadata().ok().filter(std::fs::Metadata::is_file);
    request.expected = rest.and_then(|data| data.len().checked_sub(input.stream_position().ok()?));
    let mut watch = Watch::new(which.json)?;
    let written = storage_manager::write_file(devices, request, input, &mut |notice| watch.notice(&notice));
    watch.clear();
    let written = written?;
    if which.json {
        print_json(&written)?;
    } else {
        tell(&written.events);
        print(&file_show::written(&written))?;
        if !written.bytes.is_multiple_of(512) {
            logs::say("smsvmm: files have whole sectors of 512 bytes: the last one was filled up");
        }
    }
    Ok(Exit::Success)
}

fn read(which: &Which, request: ReadRequest) -> anyhow::Result<Exit> {
    if which.json {
        return Err(Problem::new(
            ProblemKind::Invalid,
            "what is in a file is not JSON; leave out --json",
        )
        .into());
    }
    let devices = select::devices(which)?;
    let output = io::stdout().as_fd().try_clone_to_owned();
    let output = File::from(output.context("cannot use the standard output")?);
    // The standard output is not for progress.
    let mut watch = Watch::new(true)?;
    storage_manager::read_file(devices, request, output, &mut |notice| watch.notice(&notice))?;
    Ok(Exit::Success)
}
