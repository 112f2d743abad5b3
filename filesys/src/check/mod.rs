//! The check: whether everything that must hold of the metadata holds, while files are written, and what can be mended.
//!
//! ```text
//!   one moment (walk)    the roots, the metadata bitmap             then, while I/O goes on:
//!   ──► tables           inodes, volumes, orphans, pins             ~100 bytes per file stay in memory
//!   ──► objects          every map and every directory, once        a bit per cluster that a map has, a bit per page
//!   ──► volumes          bitmaps against the maps
//!   ──► pages            the metadata bitmap against what was reached
//!   ──► names, chains    each inode against names, parents, children, orphans
//!   ──► twice            clusters with two owners: all maps again, to name both
//!   mend (repair only)   journaled changes, a checkpoint, and the check again
//! ```
//!
//! # Memory
//! For each TiB of volumes at most 2 MiB (100 TiB: 200 MiB; a fraction of that where files lie in order or nothing is), for each GiB of
//! the metadata volume 64 KiB, about 100 bytes for each file and directory, and up to `most_findings` findings. Pages are read beside the
//! cache, a path at a time.
//!
//! # What is verified
//! - the four copies of the superblock agree; the metadata bitmap is just what is reached from the root; every page is readable, has its
//!   checksum, and is used once
//! - every inode has just one name, of its kind, in a directory that is reached from `/`; directories know how many names they have; names
//!   are under their hash
//! - orphans are just the files that are being made, deleted or absorbed, or wait for it
//! - parents are frozen files, and know their children: a doubly linked list; nobody is among its own parents
//! - every cluster of a map lies within a volume, belongs to that map alone, is marked in the volume's bitmap, and not behind the file's end;
//!   nothing else is marked
//! - every object belongs to an inode, a volume or a table; pins are of frozen files; numbers are below the next one that is given
//!
//! # What is mended, and what is not
//! See [`mend`]. Where two owners claim a cluster, both are named and nothing is done: who is right only their users can say.

mod bits;
mod chains;
mod inodes;
mod maps;
mod mend;
mod names;
mod report;
mod space;
mod walk;

use block_io::{BlockDevice, Clock};

use crate::core::Core;
use crate::error::FsError;
use crate::open::FileSystem;
use crate::superblock;
use crate::units::FileId;
use inodes::Inodes;
use mend::Mend;
use names::Names;
use report::Findings;
pub use report::{CheckOptions, Finding, Progress, Report, Severity};
use space::Volumes;
use walk::View;

/// Rounds of a repair: mending one thing may show another.
const ROUNDS: u32 = 8;
/// Pages between two calls of the progress callback.
const TELL_EACH: u64 = 256;

/// A check under way.
struct Check<'a, V, C> {
    core: &'a Core<V, C>,
    view: View<'a, V>,
    options: CheckOptions<'a>,
    findings: Findings,
    progress: Progress,
    /// Metadata blocks that were reached.
    seen: Vec<u64>,
    /// Everything could be read: what was not reached is used by nobody.
    complete: bool,
    /// As [`Self::complete`], of the maps.
    maps_complete: bool,
    inodes: Inodes,
    volumes: Volumes,
    names: Names,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Verifies everything that must hold of the metadata, while files are used. With `repair`, mends what can be mended without guessing;
    /// then nobody else may change the file system meanwhile.
    ///
    /// # Errors
    /// The file system has failed or the metadata volume is too full to keep a state for so long; for a repair: it is open read-only or
    /// was changed meanwhile. What is wrong with the metadata is no error, but a finding.
    pub async fn check(&self, options: CheckOptions<'_>) -> Result<Report, FsError> {
        let core = self.core();
        if options.repair {
            core.check()?;
        }
        let mut report = Report::default();
        let mut before = Vec::new();
        for round in 0..ROUNDS {
            let _quiet = options.repair.then(|| core.be_quiet());
            let check = Check::run(core, options).await?;
            if round == 0 {
                report.findings.clone_from(&check.findings.list);
                report.unlisted = check.findings.unlisted.get();
                report.totals = check.progress;
            } else {
                report.left.clone_from(&check.findings.list);
            }
            if !options.repair {
                break;
            }
            if check.findings.mends.is_empty() || check.findings.list == before {
                report.left.clone_from(&check.findings.list);
                break;
            }
            let Check { view, findings, .. } = check;
            before = findings.list;
            let changes = view.changes;
            drop(view);
            report.repaired += core.mend(findings.mends, changes).await?;
        }
        Ok(report)
    }
}

impl<'a, V: BlockDevice + 'static, C: Clock + Clone + 'static> Check<'a, V, C> {
    async fn run(core: &'a Core<V, C>, options: CheckOptions<'a>) -> Result<Self, FsError> {
        let view = View::take(core).await?;
        let pages_in_all = view.image.iter().map(|word| u64::from(word.count_ones())).sum();
        let mut check = Self {
            core,
            seen: vec![0; view.image.len()],
            view,
            options,
            findings: Findings::new(options.most_findings),
            progress: Progress {
                pages_in_all,
                ..Progress::default()
            },
            complete: true,
            maps_complete: true,
            inodes: Inodes::default(),
            volumes: Volumes::default(),
            names: Names::default(),
        };
        for problem in check.view.copies.clone() {
            check
                .findings
                .mendable(Severity::Major, "the superblock", problem, [Mend::Checkpoint]);
        }
        check.tables().await?;
        check.objects().await?;
        check.volumes().await?;
        check.pages();
        check.names();
        check.chains();
        check.twice().await?;
        check.progress.findings = check.findings.count();
        if let Some(progress) = options.progress {
            progress(&check.progress);
        }
        Ok(check)
    }

    /// Tells how far it is, now and then.
    fn tell(&mut self) {
        if self.progress.pages.is_multiple_of(TELL_EACH)
            && let Some(progress) = self.options.progress
        {
            self.progress.findings = self.findings.count();
            progress(&self.progress);
        }
    }
}

/// What is wrong with the copies of the superblock. No checkpoint runs.
async fn superblocks<V: BlockDevice + 'static, C: Clock + Clone + 'static>(core: &Core<V, C>) -> Vec<String> {
    match superblock::open(&*core.meta).await {
        Ok(opened) => {
            let mut problems: Vec<String> = (0..)
                .zip(opened.holders.0)
                .filter(|(_, agrees)| !agrees)
                .map(|(copy, _): (u32, _)| format!("copy {copy} of 4 is not what the others are"))
                .collect();
            let ours = core.superblock.borrow().sequence;
            if !core.options.read_only && opened.superblock.sequence != ours {
                problems.push(format!(
                    "sequence {} is on the volume, and {ours} was written last",
                    opened.superblock.sequence
                ));
            }
            problems
        }
        Err(error) => vec![error.to_string()],
    }
}

/// A file or directory in words.
fn file(id: u64) -> String {
    FileId(id).to_string()
}
