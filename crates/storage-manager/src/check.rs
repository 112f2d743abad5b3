//! Everything that can be reached is looked at.

use api::Problem;
use api::file::{CheckReport, FileAnswer};
use filesys::Kind;

use crate::files::walk;
use crate::problem::chain;
use crate::storage::FileSystem;

pub(crate) async fn check(files: &FileSystem, _repair: bool) -> Result<FileAnswer, Problem> {
    let mut report = CheckReport::default();
    for found in walk(files, "/").await? {
        report.files += 1;
        if found.kind == Kind::Directory {
            continue;
        }
        match files.usage(&found.path).await {
            Ok(usage) => report.allocated += usage.allocated,
            Err(error) => report.problems.push(format!("{}: {}", found.path, chain(&error))),
        }
    }
    Ok(FileAnswer::Checked(report))
}
