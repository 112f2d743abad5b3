//! The scrub of files: everything that has a checksum is read, and repaired from other copies.

use api::Problem;
use api::file::{FileAnswer, FileOutcome, FileScrub, ScrubFinding};
use filesys::{Pace, SUB_CLUSTER, ScrubOptions, ScrubPhase, ScrubReport};

use crate::conversation::{Reporter, Work};
use crate::files::name_of;
use crate::problem::of_files;
use crate::storage::FileSystem;

pub(crate) async fn scrub(
    files: &FileSystem,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileAnswer, Problem> {
    let progress = |report: &ScrubReport| {
        reporter.work(Work {
            what: format!("scrub {}", name(report.position.phase)),
            done: report.data + report.blocks * SUB_CLUSTER,
            // Copies are counted as they are found.
            total: 0,
        });
        match reporter.stopped() {
            true => Pace::Stop,
            false => Pace::Go,
        }
    };
    let report = files.scrub(ScrubOptions::default(), progress).await;
    let report = report.map_err(|error| of_files(&error))?;
    let mut findings = Vec::with_capacity(report.findings.len());
    for found in &report.findings {
        findings.push(finding(files, found).await?);
    }
    Ok(FileAnswer::Scrubbed(FileScrub {
        data: report.data,
        metadata: report.blocks * SUB_CLUSTER,
        repaired: report.repaired * SUB_CLUSTER,
        metadata_repaired: report.blocks_repaired * SUB_CLUSTER,
        filled: report.filled * SUB_CLUSTER,
        unread: report.unread,
        lost: report.lost * SUB_CLUSTER,
        findings,
        whole: report.position.phase == ScrubPhase::Done,
    }))
}

fn name(phase: ScrubPhase) -> &'static str {
    match phase {
        ScrubPhase::Metadata => "metadata",
        ScrubPhase::Data => "data",
        ScrubPhase::MetadataCopies => "copies of metadata",
        ScrubPhase::DataCopies => "copies of data",
        ScrubPhase::Done => "the end",
    }
}

async fn finding(files: &FileSystem, found: &filesys::ScrubFinding) -> Result<ScrubFinding, Problem> {
    Ok(match found {
        filesys::ScrubFinding::Data { file, offset, .. } => ScrubFinding {
            object: name_of(files, *file).await?,
            offset: *offset,
            problem: "data are not what was written, and there is no good copy".into(),
        },
        filesys::ScrubFinding::Unreadable {
            file,
            offset,
            problem,
        } => ScrubFinding {
            object: name_of(files, *file).await?,
            offset: *offset,
            problem: format!("data cannot be read: {problem}"),
        },
        filesys::ScrubFinding::Metadata { block, what } => ScrubFinding {
            object: format!("volume {}", api::file::META_VOLUME),
            offset: block * SUB_CLUSTER,
            problem: format!("metadata are not what was written, and there is no good copy: {what}"),
        },
    })
}
