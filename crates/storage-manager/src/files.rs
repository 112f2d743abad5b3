//! Operations on files: paths become what the file system knows, trees are walked, answers are put together.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use api::file::{
    AttributeChanges, FileAnswer, FileExtent, FileOperation, FileOutcome, FileStatus, Moved, Target,
    VolumeShare,
};
use api::{MAX_PAGE, Problem, ProblemKind};
use filesys::{FileId, FsError, Kind, Relocation, Snapshot};

use crate::conversation::{Flow, Notice, Reporter, Work, on_worker};
use crate::device::DevicePaths;
use crate::file_view::{self as view, no_volume};
use crate::format::{self, Wishes};
use crate::places;
use crate::problem::of_files;
use crate::storage::{Access, FileSystem, Storage, now};

/// Opens the pool and its file system, does `operation`, and closes them.
///
/// # Errors
/// They cannot be opened, or the operation is refused or fails.
pub fn execute_file(
    paths: DevicePaths,
    operation: FileOperation,
    notify: &mut dyn FnMut(Notice<'_>) -> Flow,
) -> Result<FileOutcome, Problem> {
    on_worker(notify, |reporter| async move {
        if let FileOperation::Format {
            meta_size,
            meta_copies,
            force,
        } = operation
        {
            let wishes = Wishes {
                meta_size,
                meta_copies,
                force,
            };
            let mut storage = Storage::open_pool(&paths, Access::Write).await?;
            storage.pool.let_jobs_begin();
            let made = Box::pin(format::format(&mut storage, wishes)).await;
            return end(storage, made.map(FileAnswer::FileSystem), None, &reporter).await;
        }
        let access = match operation.only_reads() {
            true => Access::Read,
            false => Access::Write,
        };
        let storage = Storage::open(&paths, access).await?;
        let limit = operation.limit();
        let done = match (storage.files(), Box::pin(meant(&storage, operation)).await) {
            (Ok(files), Ok(operation)) => Box::pin(perform(files, operation, &reporter)).await,
            (Err(problem), _) | (_, Err(problem)) => Err(problem),
        };
        end(storage, done, limit, &reporter).await
    })
}

async fn end(
    storage: Storage,
    done: Result<FileAnswer, Problem>,
    limit: Option<u32>,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileOutcome, Problem> {
    let (answer, events) = storage.end(done).await?;
    Ok(FileOutcome {
        next: answer.next(limit),
        answer,
        events,
        interrupted: reporter.stopped(),
    })
}

/// The operation on files themselves: where a snapshot of a disk may be named (`/vm/root.dsk@monday`), the file that is it.
pub(crate) async fn meant(storage: &Storage, operation: FileOperation) -> Result<FileOperation, Problem> {
    match operation {
        FileOperation::Extents { path } if path.contains(".dsk@") => {
            let (path, _) = places::frozen(storage, &path).await?;
            Ok(FileOperation::Extents { path })
        }
        other => Ok(other),
    }
}

pub(crate) async fn perform(
    files: &FileSystem,
    operation: FileOperation,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileAnswer, Problem> {
    match operation {
        FileOperation::Format { .. } => Ok(FileAnswer::FileSystem(view::file_system(files))),
        FileOperation::List {
            path,
            recursive,
            limit,
            after,
        } => Box::pin(list(files, &path, recursive, (limit, after.as_deref()))).await,
        FileOperation::MakeDirectory {
            path,
            parents,
            attributes,
        } => Box::pin(make_directory(files, &path, parents, &attributes)).await,
        FileOperation::Move { from, to } => {
            let to = place(files, &from, to).await?;
            done(Box::pin(files.rename(&from, &to)).await)
        }
        FileOperation::Delete { path, recursive } => Box::pin(delete(files, &path, recursive)).await,
        FileOperation::Stat { path } => Box::pin(status(files, path)).await,
        FileOperation::SetAttributes { path, attributes } => {
            Box::pin(set_attributes(files, &path, &attributes)).await?;
            Box::pin(status(files, path)).await
        }
        FileOperation::Extents { path } => Box::pin(extents(files, &path)).await,
        FileOperation::Defragment { path } => {
            let all = walk(files, &path).await?;
            Box::pin(relocate(
                files,
                "put in order",
                &all,
                Relocation::Defragment,
                reporter,
            ))
            .await
        }
        FileOperation::Relocate { path, to } => {
            let all = walk(files, &path).await?;
            if let Some(to) = to {
                Box::pin(retarget(files, &path, &all, to)).await?;
            }
            Box::pin(relocate(files, "move", &all, Relocation::ToTarget, reporter)).await
        }
        FileOperation::Drain { volume, end } => Box::pin(drain(files, &volume, end, reporter)).await,
        FileOperation::Check { repair } => Box::pin(crate::check::check(files, repair, reporter)).await,
        FileOperation::Scrub => Box::pin(crate::scrub::scrub(files, reporter)).await,
        FileOperation::Snapshot { path, layer } => {
            let snapshot = Snapshot {
                path: &path,
                layer: &layer,
                handle: None,
            };
            done(Box::pin(files.snapshot(&[snapshot], now())).await)
        }
        FileOperation::Merge {
            layer,
            into_parent_name,
        } => {
            let go_on = || !reporter.stopped();
            done(Box::pin(files.absorb_while(&layer, into_parent_name, go_on)).await)
        }
        FileOperation::Clone { frozen, path } => {
            done(Box::pin(files.clone_file(&frozen, &path, now())).await)
        }
        FileOperation::Resize { path, size, shrink } => Box::pin(resize(files, &path, size, shrink)).await,
    }
}

fn done<T>(result: Result<T, FsError>) -> Result<FileAnswer, Problem> {
    match result {
        Ok(_) => Ok(FileAnswer::Done),
        Err(error) => Err(of_files(&error)),
    }
}

fn failed(error: FsError) -> Problem {
    of_files(&error)
}

/// Something in the name space.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) path: String,
    pub(crate) id: FileId,
    pub(crate) kind: Kind,
}

fn below(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

/// A file or directory and all that is in it, each directory before what it has.
pub(crate) async fn walk(files: &FileSystem, path: &str) -> Result<Vec<Found>, Problem> {
    let stat = files.stat(path).await.map_err(failed)?;
    let mut all = Vec::new();
    let mut left = vec![Found {
        path: path.to_owned(),
        id: stat.id,
        kind: stat.kind,
    }];
    while let Some(next) = left.pop() {
        if next.kind == Kind::Directory {
            let entries = files.list(&next.path).await.map_err(failed)?;
            left.extend(entries.into_iter().rev().map(|entry| Found {
                path: below(&next.path, &entry.name),
                id: entry.id,
                kind: entry.kind,
            }));
        }
        all.push(next);
    }
    Ok(all)
}

/// A part of a list: at most how many, after which.
pub(crate) type Part<'a> = (Option<u32>, Option<&'a str>);

/// Those of `all` that are wanted: all as they are, or a page in the order of their names.
pub(crate) fn page(mut all: Vec<String>, (limit, after): Part<'_>) -> Result<Vec<String>, Problem> {
    if limit.is_none() && after.is_none() {
        return Ok(all);
    }
    let limit = limit_of(limit)?;
    all.sort_unstable();
    all.retain(|path| after.is_none_or(|after| path.as_str() > after));
    all.truncate(limit);
    Ok(all)
}

/// How many entries a page has at most.
pub(crate) fn limit_of(limit: Option<u32>) -> Result<usize, Problem> {
    match limit {
        None => Ok(usize::MAX),
        Some(limit @ 1..=MAX_PAGE) => Ok(limit as usize),
        Some(limit) => {
            let detail = format!("{limit} is not a number of entries from 1 to {MAX_PAGE}");
            Err(Problem::new(ProblemKind::Invalid, detail).about("limit"))
        }
    }
}

async fn list(
    files: &FileSystem,
    path: &str,
    recursive: bool,
    part: Part<'_>,
) -> Result<FileAnswer, Problem> {
    let stat = files.stat(path).await.map_err(failed)?;
    let paths: Vec<String> = match (stat.kind, recursive) {
        (Kind::File, _) => vec![path.to_owned()],
        (Kind::Directory, true) => {
            let all = walk(files, path).await?.into_iter().skip(1);
            all.map(|found| found.path).collect()
        }
        (Kind::Directory, false) => {
            let entries = files.list(path).await.map_err(failed)?;
            entries.iter().map(|entry| below(path, &entry.name)).collect()
        }
    };
    let paths = page(paths, part)?;
    let mut entries = Vec::with_capacity(paths.len());
    for path in paths {
        let stat = files.stat(&path).await.map_err(failed)?;
        entries.push(view::entry(path, &stat));
    }
    Ok(FileAnswer::Entries(entries))
}

async fn make_directory(
    files: &FileSystem,
    path: &str,
    parents: bool,
    changes: &AttributeChanges,
) -> Result<FileAnswer, Problem> {
    if changes.frozen.is_some() {
        return Err(Problem::new(ProblemKind::Invalid, "a directory cannot be frozen").about(path));
    }
    let attributes = match changes.is_empty() {
        true => None,
        false => Some(view::changed(files, filesys::Attributes::default(), changes)?),
    };
    if parents {
        let mut at = String::new();
        let mut names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let last = names.pop();
        for name in names {
            at = below(&at, name);
            make_if_absent(files, &at, None).await?;
        }
        return match last {
            Some(name) => make_if_absent(files, &below(&at, name), attributes).await,
            None => Ok(FileAnswer::Done),
        };
    }
    done(files.make_directory(path, attributes, now()).await)
}

async fn make_if_absent(
    files: &FileSystem,
    path: &str,
    attributes: Option<filesys::Attributes>,
) -> Result<FileAnswer, Problem> {
    match files.stat(path).await {
        Ok(stat) if stat.kind == Kind::Directory => Ok(FileAnswer::Done),
        Ok(_) => Err(failed(FsError::NotDirectory {
            path: path.to_owned(),
        })),
        Err(FsError::NotFound { .. }) => done(files.make_directory(path, attributes, now()).await),
        Err(error) => Err(failed(error)),
    }
}

/// Where something goes: into `to` if that is a directory.
async fn place(files: &FileSystem, from: &str, to: String) -> Result<String, Problem> {
    match files.stat(&to).await {
        Ok(stat) if stat.kind == Kind::Directory => {
            let name = from.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            Ok(below(&to, name))
        }
        Ok(_) | Err(FsError::NotFound { .. }) => Ok(to),
        Err(error) => Err(failed(error)),
    }
}

async fn delete(files: &FileSystem, path: &str, recursive: bool) -> Result<FileAnswer, Problem> {
    if !recursive {
        return done(files.delete(path).await);
    }
    for found in walk(files, path).await?.iter().rev() {
        files.delete(&found.path).await.map_err(failed)?;
    }
    Ok(FileAnswer::Done)
}

/// What a person calls a file: its path, or its number if it has none.
pub(crate) async fn name_of(files: &FileSystem, id: FileId) -> Result<String, Problem> {
    let path = files.path_of(id).await.map_err(failed)?;
    Ok(path.unwrap_or_else(|| format!("{id} (deleted)")))
}

async fn status(files: &FileSystem, path: String) -> Result<FileAnswer, Problem> {
    let stat = files.stat(&path).await.map_err(failed)?;
    let usage = match stat.kind {
        Kind::File => files.usage(&path).await.map_err(failed)?,
        Kind::Directory => filesys::Usage::default(),
    };
    let parent = match stat.parent {
        Some(parent) => Some(name_of(files, parent).await?),
        None => None,
    };
    let children = match stat.children {
        0 => Vec::new(),
        _ => children(files, stat.id).await?,
    };
    let volumes = usage.volumes.iter().map(|(index, bytes)| VolumeShare {
        volume: view::volume_name(files, *index),
        bytes: *bytes,
    });
    Ok(FileAnswer::Status(Box::new(FileStatus {
        id: stat.id.0,
        attributes: view::attributes(files, &stat.attributes),
        parent,
        children,
        absorbed: stat.absorbed,
        exclusive: usage.exclusive,
        shared: usage.shared,
        volumes: volumes.collect(),
        entry: view::entry(path, &stat),
    })))
}

/// Those that have a path, in order.
async fn children(files: &FileSystem, id: FileId) -> Result<Vec<String>, Problem> {
    let mut children = Vec::new();
    for child in files.children_of(id).await.map_err(failed)? {
        children.extend(files.path_of(child).await.map_err(failed)?);
    }
    children.sort();
    Ok(children)
}

pub(crate) async fn set_attributes(
    files: &FileSystem,
    path: &str,
    changes: &AttributeChanges,
) -> Result<(), Problem> {
    let stat = files.stat(path).await.map_err(failed)?;
    let attributes = view::changed(files, stat.attributes.clone(), changes)?;
    if attributes != stat.attributes {
        files.set_attributes(path, attributes).await.map_err(failed)?;
    }
    match changes.frozen {
        Some(frozen) => files.set_frozen(path, frozen).await.map_err(failed),
        None => Ok(()),
    }
}

async fn extents(files: &FileSystem, path: &str) -> Result<FileAnswer, Problem> {
    let found = files.file_extents(path, 0, u64::MAX).await.map_err(failed)?;
    let mut extents = Vec::with_capacity(found.len());
    for extent in found {
        extents.push(FileExtent {
            offset: extent.offset,
            length: extent.length,
            layer: name_of(files, extent.layer).await?,
            volume: view::volume_name(files, extent.volume),
            start: extent.start,
        });
    }
    Ok(FileAnswer::Extents(extents))
}

/// All of a tree gets another target.
async fn retarget(files: &FileSystem, path: &str, all: &[Found], to: Target) -> Result<(), Problem> {
    let changes = AttributeChanges {
        target: Some(to),
        ..AttributeChanges::default()
    };
    set_attributes(files, path, &changes).await?;
    for found in all.iter().skip(1) {
        set_attributes(files, &found.path, &changes).await?;
    }
    Ok(())
}

/// The files of a tree, and the ancestors that they need.
async fn with_ancestors(files: &FileSystem, all: &[Found]) -> Result<BTreeSet<FileId>, Problem> {
    let mut ids = BTreeSet::new();
    for found in all.iter().filter(|found| found.kind == Kind::File) {
        ids.insert(found.id);
        let extents = files
            .file_extents(&found.path, 0, u64::MAX)
            .await
            .map_err(failed)?;
        ids.extend(extents.iter().map(|extent| extent.layer));
    }
    Ok(ids)
}

async fn relocate(
    files: &FileSystem,
    what: &str,
    all: &[Found],
    how: Relocation,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileAnswer, Problem> {
    let found: Vec<&Found> = all.iter().filter(|found| found.kind == Kind::File).collect();
    let ids = found.iter().map(|found| (found.id, found.path.clone())).collect();
    Ok(FileAnswer::Moved(
        move_files(files, what, ids, how, reporter).await?,
    ))
}

pub(crate) async fn move_files<T>(
    files: &FileSystem,
    what: &str,
    ids: Vec<(FileId, String)>,
    how: Relocation,
    reporter: &Reporter<T>,
) -> Result<Moved, Problem> {
    let mut moved = Moved::default();
    let mut sizes = Vec::with_capacity(ids.len());
    for (_, path) in &ids {
        sizes.push(files.stat(path).await.map_or(0, |stat| stat.size));
    }
    let total = sizes.iter().sum();
    let mut before = 0;
    for ((id, path), size) in ids.iter().zip(sizes) {
        if reporter.stopped() {
            break;
        }
        let progress = |progress: filesys::RelocationProgress| {
            reporter.work(Work {
                what: format!("{what} {path}"),
                done: before + progress.position.min(size),
                total,
            });
            match reporter.stopped() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        match Box::pin(files.relocate(*id, how, 0, progress)).await {
            Ok(done) => {
                moved.files += 1;
                moved.moved += done.moved;
                moved.stayed += done.stayed;
            }
            // One of several was deleted meanwhile, or merged into another.
            Err(FsError::NotFound { .. }) if ids.len() > 1 => {}
            Err(error) => return Err(failed(error)),
        }
        before += size;
    }
    files.sync().await.map_err(failed)?;
    Ok(moved)
}

async fn drain(
    files: &FileSystem,
    name: &str,
    end: bool,
    reporter: &Reporter<FileOutcome>,
) -> Result<FileAnswer, Problem> {
    let volumes = files.volumes();
    let volume = volumes.iter().find(|volume| volume.name == name);
    let volume = volume.ok_or_else(|| no_volume(files, name))?;
    files.set_draining(volume.uuid, !end).await.map_err(failed)?;
    if end {
        return Ok(FileAnswer::Done);
    }
    let all = walk(files, "/").await?;
    let mut ids = Vec::new();
    for id in with_ancestors(files, &all).await? {
        ids.push((id, name_of(files, id).await?));
    }
    let moved = move_files(files, "move", ids, Relocation::ToTarget, reporter).await?;
    Ok(FileAnswer::Moved(moved))
}

async fn resize(files: &FileSystem, path: &str, size: u64, shrink: bool) -> Result<FileAnswer, Problem> {
    let present = files.stat(path).await.map_err(failed)?.size;
    if size < present && !shrink {
        let detail = format!("{path} has {present} bytes; with {size} it would lose what lies behind them");
        return Err(Problem::new(ProblemKind::Conflict, detail)
            .about(path)
            .remedy("make what is in it smaller first, then use --shrink"));
    }
    done(files.resize(path, size).await)
}
