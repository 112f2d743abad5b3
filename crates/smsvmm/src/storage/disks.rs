//! `smsvmm disk`: virtual disks of a pool, by the machine that has it open if there is one.

use std::path::Path;

use api::storage::JobState;
use api::virtual_disk::{CopyRequest, DiskAnswer, DiskOutcome, ExportRequest, ImageFormat, ImportRequest};
use api::{ByteSize, StorageAnswer, StorageRequest};

use super::arguments::Which;
use super::disk_arguments::{DiskCommand, VirtualDiskArguments};
use super::files::tell;
use super::watch::Watch;
use super::{disk_show, live, select};
use crate::exit::Exit;
use crate::output::{print, print_json};

pub(crate) fn disk(arguments: VirtualDiskArguments) -> anyhow::Result<Exit> {
    let VirtualDiskArguments { which, command } = arguments;
    match command {
        DiskCommand::Import {
            image,
            path,
            format,
            backing,
            size,
            thick,
            verify,
        } => {
            let request = ImportRequest {
                image: text(&image)?,
                format: format.map(Into::into),
                backing,
                path,
                size: size.map(ByteSize::bytes),
                thick,
                verify,
            };
            transfer(&which, "imported", |pool, notify| {
                storage_manager::import_disk(pool, request, notify)
            })
        }
        DiskCommand::Export {
            path,
            image,
            format,
            force,
            verify,
        } => {
            let by_name = match image.extension() {
                Some(end) if end == "qcow2" => ImageFormat::Qcow2,
                _ => ImageFormat::Raw,
            };
            let request = ExportRequest {
                path,
                image: text(&image)?,
                format: format.map_or(by_name, Into::into),
                force,
                verify,
            };
            transfer(&which, "exported", |pool, notify| {
                storage_manager::export_disk(pool, request, notify)
            })
        }
        DiskCommand::Copy {
            path,
            to,
            thick,
            verify,
        } => {
            let request = CopyRequest {
                path,
                to,
                thick,
                verify,
            };
            transfer(&which, "copied", |pool, notify| {
                storage_manager::copy_disk(pool, request, notify)
            })
        }
        command => operate(&which, command),
    }
}

/// Names go through JSON.
fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| anyhow::anyhow!("{}: names that are not UTF-8 cannot be used here", path.display()))
}

type Notify<'a> = &'a mut dyn FnMut(storage_manager::Notice<'_>) -> storage_manager::Flow;

fn transfer(
    which: &Which,
    what: &str,
    run: impl FnOnce(storage_manager::PoolAt, Notify<'_>) -> Result<api::virtual_disk::Transferred, api::Problem>,
) -> anyhow::Result<Exit> {
    let pool = live::pool(which)?;
    let mut watch = Watch::new(which.json)?;
    if matches!(pool, storage_manager::PoolAt::Machine(_)) {
        watch.breaks_off();
    }
    let done = run(pool, &mut |notice| watch.notice(&notice));
    watch.clear();
    let done = done?;
    if which.json {
        print_json(&done)?;
    } else {
        tell(&done.events);
        print(&disk_show::transferred(what, &done))?;
    }
    Ok(Exit::Success)
}

fn operate(which: &Which, command: DiskCommand) -> anyhow::Result<Exit> {
    let waits = !matches!(&command, DiskCommand::Move { no_wait: true, .. });
    let Some(operation) = command.operation() else {
        return Ok(Exit::Success);
    };
    let outcome = match live::ask(which, || StorageRequest::Disk(operation.clone()))? {
        Some(StorageAnswer::Disk(mut outcome)) => {
            if let (DiskAnswer::Job(job), true) = (&mut outcome.answer, waits) {
                **job = live::wait_for(which, job)?;
            }
            *outcome
        }
        Some(_) => return Err(live::unexpected()),
        None => {
            let devices = select::devices(which)?;
            let mut watch = Watch::new(which.json)?;
            let outcome = storage_manager::execute_disk(devices, operation.clone(), &mut |notice| {
                watch.notice(&notice)
            });
            watch.clear();
            outcome?
        }
    };
    let failed = matches!(&outcome.answer, DiskAnswer::Job(job) if job.state == JobState::Failed);
    if let (DiskAnswer::Job(job), true) = (&outcome.answer, failed) {
        let reason = job.reason.as_deref().unwrap_or("it failed");
        anyhow::bail!("job {}, {}: {reason}", job.id, job.what);
    }
    if !which.json {
        tell(&outcome.events);
        print(&disk_show::answer(&operation, &outcome.answer))?;
    } else if operation.only_reads() {
        print_answer(&outcome)?;
    } else {
        print_json(&outcome)?;
    }
    // Whoever waits for it wants to have it moved.
    let is_left = matches!(&outcome.answer, DiskAnswer::Job(job) if job.state == JobState::Cancelled);
    Ok(if is_left { Exit::Failed } else { Exit::Success })
}

fn print_answer(outcome: &DiskOutcome) -> anyhow::Result<()> {
    match &outcome.answer {
        DiskAnswer::Done => print_json(&serde_json::Value::Null),
        DiskAnswer::Disks(disks) => print_json(disks),
        DiskAnswer::Snapshots(snapshots) => print_json(snapshots),
        DiskAnswer::Status(status) => print_json(status),
        DiskAnswer::Changed(ranges) => print_json(ranges),
        DiskAnswer::Places(places) => print_json(places),
        DiskAnswer::Pinned(pin) => print_json(pin),
        DiskAnswer::Job(job) => print_json(job),
    }
}
