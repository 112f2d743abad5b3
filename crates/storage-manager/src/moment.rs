//! A moment of a disk: what is read while somebody writes to it.
//!
//! A disk that nobody writes is read as it is. Of one that somebody writes a snapshot is made at once, which is deleted when it has been
//! read. It has a name that people cannot give, so that what a crash has left can be told from what people want to keep: it is deleted
//! when the disk is opened for writing, and before another moment of it is taken.

use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use api::{Problem, ProblemKind};
use storage_virtualizer::disk::{DiskError, DiskOptions, DiskPath, NewSnapshot};

use crate::disks::{VirtualDisk, failed};
use crate::storage::{Storage, now};

/// What their names begin with.
const PREFIX: &str = ".moment-";

/// A disk or a snapshot that can be read and does not change.
pub(crate) struct Moment {
    pub(crate) disk: Rc<VirtualDisk>,
    /// By which it was opened.
    pub(crate) path: String,
    /// The snapshot that goes afterwards.
    made: Option<(DiskPath, String)>,
}

impl Storage {
    /// What is read of a disk, or of a snapshot.
    ///
    /// # Errors
    /// There is none, or no snapshot of the disk can be made while it is in use.
    async fn moment(&self, path: &str) -> Result<Moment, Problem> {
        let options = DiskOptions {
            read_only: true,
            now: now(),
            ..DiskOptions::default()
        };
        let disks = self.disks()?;
        let (disk, named) = DiskPath::with_snapshot(path).map_err(failed)?;
        match Box::pin(disks.open(path, options)).await {
            Err(DiskError::InUse { .. }) if named.is_none() => {}
            opened => {
                return Ok(Moment {
                    disk: Rc::new(opened.map_err(failed)?),
                    path: path.to_owned(),
                    made: None,
                });
            }
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Box::pin(self.forget_moments(disk.as_str())).await?;
        let name = format!("{PREFIX}{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let new = NewSnapshot {
            name: name.clone(),
            description: "what an export or a copy reads; it goes with that".into(),
            now: now(),
        };
        Box::pin(disks.snapshot(&[disk.as_str()], &new))
            .await
            .map_err(failed)?;
        let path = format!("{disk}@{name}");
        match Box::pin(disks.open(&path, options)).await {
            Ok(opened) => Ok(Moment {
                disk: Rc::new(opened),
                path,
                made: Some((disk, name)),
            }),
            Err(error) => {
                // The first reason is the one that matters.
                let _ = Box::pin(disks.delete_snapshot(disk.as_str(), &name, now())).await;
                Err(failed(error))
            }
        }
    }

    /// Has `read` read what [`Self::moment`] finds. Also tells which disk may have a layer more than it needs now.
    pub(crate) async fn at_a_moment<T>(
        &self,
        path: &str,
        read: impl AsyncFnOnce(&Moment) -> Result<T, Problem>,
    ) -> (Result<T, Problem>, Option<String>) {
        let moment = match Box::pin(self.moment(path)).await {
            Ok(moment) => moment,
            Err(problem) => return (Err(problem), None),
        };
        let done = Box::pin(read(&moment)).await;
        match Box::pin(self.end_moment(moment)).await {
            Ok(longer) => (done, longer),
            Err(problem) => {
                // What was read is good.
                tracing::warn!(disk = path, %problem, "what was kept for an export or a copy could not be deleted");
                (done, None)
            }
        }
    }

    /// It was read. Tells which disk may have a layer more than it needs.
    ///
    /// # Errors
    /// The snapshot that was made for it cannot be deleted: it goes when the disk is opened next.
    async fn end_moment(&self, moment: Moment) -> Result<Option<String>, Problem> {
        let Moment { disk, made, .. } = moment;
        drop(disk);
        let Some((path, name)) = made else { return Ok(None) };
        match Box::pin(self.disks()?.delete_snapshot(path.as_str(), &name, now())).await {
            Ok(()) => Ok(Some(path.to_string())),
            // Somebody has deleted it, or the disk.
            Err(error) => match failed(error) {
                problem if problem.kind == ProblemKind::NotFound => Ok(None),
                problem => Err(problem),
            },
        }
    }

    /// Deletes the moments that a crash has left. Tells whether there were any.
    pub(crate) async fn forget_moments(&self, disk: &str) -> Result<bool, Problem> {
        let disks = self.disks()?;
        let state = Box::pin(disks.status(disk)).await.map_err(failed)?;
        let mut found = false;
        for snapshot in state.snapshots {
            if !snapshot.name.starts_with(PREFIX) {
                continue;
            }
            match Box::pin(disks.delete_snapshot(disk, &snapshot.name, now())).await {
                Ok(()) => found = true,
                // It is being read, or is gone by now.
                Err(DiskError::InUse { .. } | DiskError::NoSnapshot { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(found)
    }
}

/// People cannot call a snapshot so.
pub(crate) fn check_name(name: &str) -> Result<(), Problem> {
    if !name.starts_with(PREFIX) {
        return Ok(());
    }
    let detail = format!("names that begin with {PREFIX} are for exports and copies of disks in use");
    Err(Problem::new(ProblemKind::Invalid, detail)
        .about(name)
        .remedy("take another name"))
}
