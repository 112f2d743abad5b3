//! The check of a file system, and its repair.

use api::Problem;
use api::file::{CheckFinding, CheckReport, FileAnswer, FileOutcome, Severity};
use filesys::{CLUSTER, CheckOptions, Finding, Progress, SUB_CLUSTER};

use crate::conversation::{Reporter, Work};
use crate::problem::of_files;
use crate::storage::FileSystem;

pub(crate) async fn check(
    files: &FileSystem,
    repair: bool,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileAnswer, Problem> {
    let progress = |progress: &Progress| {
        reporter.work(Work {
            what: "check metadata".to_owned(),
            done: progress.pages * SUB_CLUSTER,
            total: progress.pages_in_all * SUB_CLUSTER,
        });
    };
    let options = CheckOptions {
        repair,
        progress: Some(&progress),
        ..CheckOptions::default()
    };
    let report = files.check(options).await.map_err(|error| of_files(&error))?;
    Ok(FileAnswer::Checked(CheckReport {
        findings: report.findings.iter().map(finding).collect(),
        unlisted: report.unlisted,
        repair,
        repaired: report.repaired,
        left: report.left.iter().map(finding).collect(),
        files: report.totals.files,
        directories: report.totals.directories,
        metadata: report.totals.pages * SUB_CLUSTER,
        allocated: report.totals.clusters * CLUSTER,
    }))
}

fn finding(found: &Finding) -> CheckFinding {
    CheckFinding {
        severity: match found.severity {
            filesys::Severity::Minor => Severity::Minor,
            filesys::Severity::Major => Severity::Major,
            filesys::Severity::Loss => Severity::Loss,
        },
        object: found.object.clone(),
        problem: found.problem.clone(),
        repairable: found.repairable,
    }
}
