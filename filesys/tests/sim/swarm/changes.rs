//! Steps that change names, sizes, chains and places.

use std::rc::Rc;

use block_io::BlockDevice;
use block_io::sim::Failure;
use filesys::{Attributes, FsError, NewFile, Relocation, Snapshot};

use super::session::Session;
use super::{SUB, Step};
use crate::harness::failed;
use crate::machine::{absorb, change};
use crate::model::Change;

impl<V: BlockDevice + 'static> Session<V> {
    pub(super) async fn change(&self, step: &Step) -> Result<(), Failure> {
        let promise = &self.promise;
        let Some(_claim) = self.claim(step) else {
            return Ok(());
        };
        match step {
            Step::Create {
                name,
                size,
                thick,
                checked,
            } => {
                let path = format!("/{name}");
                let attributes = Attributes {
                    thick: *thick,
                    checksums: *checked,
                    ..Attributes::default()
                };
                let new = NewFile {
                    size: size * SUB,
                    attributes: Some(attributes),
                    now: 1,
                };
                let what = Change::Create {
                    path: path.clone(),
                    size: new.size,
                    directory: false,
                };
                change(promise, what, self.fs.create(&path, &new)).await.map(drop)
            }
            Step::Delete { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                self.close(&path);
                let what = Change::Delete { path: path.clone() };
                change(promise, what, self.fs.delete(&path)).await.map(drop)
            }
            Step::Rename { file, name } => {
                let Some(from) = self.path(*file) else {
                    return Ok(());
                };
                let to = format!("/{name}");
                let what = Change::Rename {
                    from: from.clone(),
                    to: to.clone(),
                };
                change(promise, what, self.fs.rename(&from, &to)).await.map(drop)
            }
            Step::Clone { file, name } => {
                let Some(frozen) = self.path(*file) else {
                    return Ok(());
                };
                let path = format!("/{name}");
                let what = Change::Clone {
                    frozen: frozen.clone(),
                    path: path.clone(),
                };
                change(promise, what, self.fs.clone_file(&frozen, &path, 1))
                    .await
                    .map(drop)
            }
            Step::Thaw { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let what = Change::Freeze {
                    path: path.clone(),
                    frozen: false,
                };
                change(promise, what, self.fs.set_frozen(&path, false))
                    .await
                    .map(drop)
            }
            Step::Checksums { file, on } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let attributes = Attributes {
                    checksums: *on,
                    ..Attributes::default()
                };
                match self.fs.set_attributes(&path, attributes).await {
                    Ok(()) | Err(FsError::NotFound { .. } | FsError::NoSpace { .. }) => Ok(()),
                    Err(error) => Err(failed(error)),
                }
            }
            Step::Relocate { file } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let Ok(stat) = self.fs.stat(&path).await else {
                    return Ok(());
                };
                let progress = |_| std::ops::ControlFlow::Continue(());
                match self
                    .fs
                    .relocate(stat.id, Relocation::Defragment, 0, progress)
                    .await
                {
                    Ok(_) | Err(FsError::NoSpace { .. } | FsError::Busy { .. }) => Ok(()),
                    Err(FsError::Io(_)) if self.faults => Ok(()),
                    Err(error) => Err(failed(error)),
                }
            }
            Step::Resize { file, size } => self.resize(*file, size * SUB).await,
            Step::Snapshot { file, other } => self.snapshot(*file, *other).await,
            Step::Absorb { file, named } => {
                let Some(path) = self.path(*file) else {
                    return Ok(());
                };
                let simple = {
                    let model = promise.borrow();
                    let parent = model
                        .entry(&path)
                        .and_then(|entry| model.tree.get(&entry.parent?));
                    // Those without a name may be gone at any moment.
                    parent.is_some_and(|parent| parent.path.is_some())
                };
                if simple {
                    absorb(promise, &self.fs, &path, *named).await?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn resize(&self, file: u64, size: u64) -> Result<(), Failure> {
        let Some(path) = self.path(file) else {
            return Ok(());
        };
        let written = self
            .handle_of(&path)
            .is_some_and(|handle| Rc::strong_count(&handle) > 2);
        if written && !self.racy {
            return Ok(());
        }
        self.still.borrow_mut().insert(path.clone());
        self.resizes.set(self.resizes.get() + 1);
        let what = Change::Resize {
            path: path.clone(),
            size,
        };
        let done = change(&self.promise, what, self.fs.resize(&path, size)).await;
        self.still.borrow_mut().remove(&path);
        done.map(drop)
    }

    async fn snapshot(&self, file: u64, other: Option<u64>) -> Result<(), Failure> {
        let mut paths: Vec<String> = [Some(file), other]
            .into_iter()
            .flatten()
            .filter_map(|file| self.path(file))
            .collect();
        paths.dedup();
        let handles: Vec<_> = paths.iter().map(|path| self.handle_of(path)).collect();
        let pairs: Vec<_> = paths
            .iter()
            .map(|path| {
                // A name that was never used, so that a crash leaves no doubt about what is there.
                let mut model = self.promise.borrow_mut();
                model.stamp += 1;
                (path.clone(), format!("/s{}", model.stamp))
            })
            .collect();
        let snapshots: Vec<_> = pairs
            .iter()
            .zip(&handles)
            .map(|((path, layer), handle)| Snapshot {
                path,
                layer,
                handle: handle.as_ref().map(|handle| &handle.file),
            })
            .collect();
        if snapshots.is_empty() {
            return Ok(());
        }
        let done = change(
            &self.promise,
            Change::Snapshot(pairs.clone()),
            self.fs.snapshot(&snapshots, 1),
        )
        .await?;
        if done.is_some() {
            let model = self.promise.borrow();
            for ((_, layer), handle) in pairs.iter().zip(&handles) {
                if let (Some(handle), Some(node)) = (handle, model.find(layer)) {
                    handle.node.set(node);
                }
            }
        }
        Ok(())
    }
}
