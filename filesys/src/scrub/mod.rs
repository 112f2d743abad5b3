//! The scrub: reads everything that has a checksum, and repairs what is wrong from what is redundant, while files are used.
//!
//! ```text
//!   metadata (pages)   pages of the last checkpoint, its bitmap, the journal behind it, the superblock's copies, while no checkpoint runs;
//!                      in steps, so that checkpoints come between
//!   data (data)        each file's own clusters, without those of its parents; at first beside the writers, and again with the part of the
//!                      file alone where something differs or a checksum is not known
//!   then both again    the other copies: legs of mirrors, and what can be computed from parity
//! ```

mod data;
mod pages;
mod report;

use std::ops::ControlFlow;
use std::rc::Rc;

use block_io::{BlockDevice, Clock};

use crate::core::Core;
use crate::error::{FsError, Refusal};
use crate::open::FileSystem;
pub use report::{Pace, ScrubFinding, ScrubOptions, ScrubPhase, ScrubPosition, ScrubReport};

/// A scrub under way.
struct Scrub<'a, V, C> {
    core: &'a Core<V, C>,
    options: ScrubOptions,
    report: ScrubReport,
    progress: &'a mut dyn FnMut(&ScrubReport) -> Pace,
    /// What cannot be repaired in place is written anew by checkpoints.
    renew: bool,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> FileSystem<V, C> {
    /// Verifies everything that has a checksum, and repairs it from other copies ([`OpenOptions::redundancy`](crate::OpenOptions)).
    /// `progress` is called after each step of at most 1 MiB of data or 256 pages of metadata, and sets the pace.
    ///
    /// # Errors
    /// The file system has failed, or metadata that are needed to go on are damaged. What is wrong otherwise is told by the report.
    pub async fn scrub(
        &self,
        options: ScrubOptions,
        mut progress: impl FnMut(&ScrubReport) -> Pace,
    ) -> Result<ScrubReport, FsError> {
        let core = self.core();
        let mut scrub = Scrub {
            core,
            options,
            report: ScrubReport {
                position: options.from,
                ..ScrubReport::default()
            },
            progress: &mut progress,
            renew: false,
        };
        let done = scrub.run().await;
        // What was repaired stays so; a volume that cannot be flushed has failed, and says so itself.
        let volumes: Vec<_> = core.state.volumes.borrow().values().map(Rc::clone).collect();
        for volume in volumes {
            drop(core.flush_volume(&volume, volume.written.get()).await);
        }
        done.map(|()| scrub.report)
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Scrub<'_, V, C> {
    async fn run(&mut self) -> Result<(), FsError> {
        loop {
            let phase = self.report.position.phase;
            let step = match phase {
                ScrubPhase::Metadata | ScrubPhase::MetadataCopies => self.pages(phase).await?,
                ScrubPhase::Data | ScrubPhase::DataCopies => self.data(phase).await?,
                ScrubPhase::Done => return Ok(()),
            };
            if step.is_break() {
                return Ok(());
            }
            let phase = match phase {
                ScrubPhase::Metadata => ScrubPhase::Data,
                ScrubPhase::Data if self.options.copies => ScrubPhase::MetadataCopies,
                ScrubPhase::MetadataCopies => ScrubPhase::DataCopies,
                _ => ScrubPhase::Done,
            };
            self.report.position = ScrubPosition {
                phase,
                ..ScrubPosition::default()
            };
        }
    }

    /// A step is done.
    async fn pause(&mut self, object: u64, offset: u64) -> ControlFlow<()> {
        self.report.position.object = object;
        self.report.position.offset = offset;
        match (self.progress)(&self.report) {
            Pace::Go => ControlFlow::Continue(()),
            Pace::Wait(time) => {
                self.core.clock.sleep(time).await;
                ControlFlow::Continue(())
            }
            Pace::Stop => ControlFlow::Break(()),
        }
    }

    fn lost(&mut self, finding: ScrubFinding) {
        self.report.lost += 1;
        if self.report.findings.len() < self.options.most_findings {
            self.report.findings.push(finding);
        }
    }

    /// What files in memory know is in the tables.
    async fn gather(&self) -> Result<(), FsError> {
        let _running = self.core.begin_checkpointing().await;
        while let Err(missing) = self.core.state.gather() {
            self.core.resolve(Refusal::from(missing)).await?;
        }
        Ok(())
    }
}
