//! A file system and the model of it, driven side by side; and the comparison of both.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use block_io::sim::{Failure, SimDisk};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoCause, IoError, ZeroMode};
use filesys::{FsError, Kind, Stat};

use crate::harness::{self, SimFile, SimFs, failed};
use crate::model::{Change, Model, Node};

pub(crate) type Promise = Rc<RefCell<Model>>;

/// An open file, and which file of the model it writes to.
#[derive(Debug)]
pub(crate) struct Handle<V: BlockDevice + 'static = SimDisk> {
    pub(crate) file: SimFile<V>,
    pub(crate) node: Cell<Node>,
}

/// What may be said instead of doing something: the model stays as it is.
fn is_refusal(error: &FsError) -> bool {
    !matches!(
        error,
        FsError::Failed { .. }
            | FsError::Damaged(_)
            | FsError::Checksum { .. }
            | FsError::Open(_)
            | FsError::Io(_)
    )
}

/// Does a change. Returns whether it was done; an error is one that must not be.
pub(crate) async fn change<T>(
    promise: &Promise,
    change: Change,
    call: impl Future<Output = Result<T, FsError>>,
) -> Result<Option<T>, Failure> {
    let number = promise.borrow_mut().begins(change);
    match call.await {
        Ok(done) => {
            promise.borrow_mut().acknowledged(number);
            Ok(Some(done))
        }
        Err(error) if is_refusal(&error) => {
            promise.borrow_mut().refused(number);
            Ok(None)
        }
        Err(error) => Err(failed(error)),
    }
}

/// The nearest ancestor with a name, if the parent has none.
fn nearest_name(model: &Model, layer: &str) -> Option<String> {
    let node = model.find(layer)?;
    let parent = model.tree.get(&node)?.parent?;
    let named = model.named_parent(node)?;
    (named != parent).then(|| model.tree.get(&named)?.path.clone())?
}

/// A layer takes over its parent.
pub(crate) async fn absorb<V: BlockDevice + 'static>(
    promise: &Promise,
    fs: &SimFs<V>,
    layer: &str,
    named: bool,
) -> Result<bool, Failure> {
    let (begins, ends, above) = {
        let mut model = promise.borrow_mut();
        let above = nearest_name(&model, layer);
        let layer = layer.to_owned();
        let begins = model.begins(Change::Absorb { layer: layer.clone() });
        (begins, model.begins(Change::Absorbed { layer, named }), above)
    };
    match fs.absorb(layer, named).await {
        Ok(()) => {
            // Of parents without names nobody knows when they go. If they had gone, the nearest one with a name was absorbed.
            if let Some(above) = above {
                let gone = if named { layer } else { above.as_str() };
                if matches!(fs.stat(gone).await, Err(FsError::NotFound { .. })) {
                    block_io::cover!("machine: a parent without a name had gone before an absorption");
                    promise.borrow_mut().collapse();
                }
            }
            promise.borrow_mut().acknowledged(begins);
            promise.borrow_mut().acknowledged(ends);
            Ok(true)
        }
        Err(error) if is_refusal(&error) => {
            promise.borrow_mut().refused(begins);
            promise.borrow_mut().refused(ends);
            Ok(false)
        }
        Err(FsError::Io(_)) => {
            // It can be called again, and goes on where it was.
            block_io::cover!("machine: an absorption failed half-way");
            let parent = {
                let model = promise.borrow();
                let parent = model
                    .entry(layer)
                    .and_then(|entry| model.tree.get(&entry.parent?));
                parent.and_then(|parent| parent.path.clone()).unwrap_or_default()
            };
            promise.borrow_mut().refused(ends);
            if fs.stat(&parent).await.map_err(failed)?.absorbed {
                promise.borrow_mut().acknowledged(begins);
            } else {
                promise.borrow_mut().refused(begins);
            }
            Ok(false)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Whether a request found no space, which is an answer and no failure.
pub(crate) fn is_full(error: &IoError) -> bool {
    matches!(error.cause(), IoCause::Os(error) if error.kind() == io::ErrorKind::StorageFull)
}

impl<V: BlockDevice + 'static> Handle<V> {
    pub(crate) fn new(promise: &Promise, path: &str, file: SimFile<V>) -> Result<Self, Failure> {
        let node = promise.borrow().find(path).ok_or("the model has no such file")?;
        let node = Cell::new(node);
        Ok(Self { file, node })
    }

    /// Writes sectors that tell what they are.
    pub(crate) async fn write(
        &self,
        promise: &Promise,
        offset: u64,
        length: u64,
        durability: Durability,
    ) -> Result<(), IoError> {
        let mut buffer = AlignedBuffer::new(usize::try_from(length).unwrap());
        let ticket = {
            let mut model = promise.borrow_mut();
            model.stamp += 1;
            let stamp = model.stamp;
            for (sector, bytes) in (offset / 512..).zip(buffer.as_mut_slice().chunks_mut(512)) {
                for word in bytes.chunks_mut(16) {
                    word[..8].copy_from_slice(&sector.to_le_bytes());
                    word[8..].copy_from_slice(&stamp.to_le_bytes());
                }
            }
            model.write_begins(self.node.get(), offset, buffer.as_slice(), durability)
        };
        let written = self
            .file
            .write(offset, &harness::memory(&buffer), durability)
            .await;
        self.ended(promise, ticket, written).await
    }

    pub(crate) async fn discard(&self, promise: &Promise, offset: u64, length: u64) -> Result<(), IoError> {
        let ticket = promise.borrow_mut().clear_begins(self.node.get(), offset, length);
        let done = self.file.discard(offset, length).await;
        self.ended(promise, ticket, done).await
    }

    pub(crate) async fn zero(
        &self,
        promise: &Promise,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<(), IoError> {
        let ticket = promise.borrow_mut().clear_begins(self.node.get(), offset, length);
        let done = self.file.write_zeroes(offset, length, mode).await;
        self.ended(promise, ticket, done).await
    }

    /// A change of content has ended. Whoever goes on after a kill is answered when it survives that.
    async fn ended(
        &self,
        promise: &Promise,
        ticket: Option<block_io::sim::Ticket>,
        mut done: Result<(), IoError>,
    ) -> Result<(), IoError> {
        if done.is_ok() && promise.borrow().outlives {
            done = self.file.settle().await;
        }
        promise.borrow_mut().ended(self.node.get(), ticket, done.is_ok());
        done
    }

    pub(crate) async fn flush(&self, promise: &Promise) -> Result<(), IoError> {
        let node = self.node.get();
        let ticket = promise
            .borrow_mut()
            .contents
            .get_mut(&node)
            .map(|content| content.flush_begins());
        self.file.flush().await?;
        // A layer that was put on the file meanwhile has all of its history.
        let mut model = promise.borrow_mut();
        if let (Some(content), Some(ticket)) = (model.contents.get_mut(&self.node.get()), ticket) {
            content.flushed(ticket);
        }
        Ok(())
    }

    /// Reads, and compares with what may be there.
    pub(crate) async fn check(&self, promise: &Promise, offset: u64, length: u64) -> Result<(), Failure> {
        let with = |promise: &Promise| -> Option<block_io::sim::Ticket> {
            let mut model = promise.borrow_mut();
            Some(model.contents.get_mut(&self.node.get())?.read_begins())
        };
        let Some(ticket) = with(promise) else {
            return Ok(());
        };
        let bytes = harness::read(&self.file, offset, usize::try_from(length).unwrap()).await?;
        let mut model = promise.borrow_mut();
        match model.contents.get_mut(&self.node.get()) {
            Some(content) => Ok(content.check(ticket, offset, &bytes)?),
            None => Ok(()),
        }
    }
}

/// Everything that has a name.
pub(crate) async fn look<V: BlockDevice + 'static>(fs: &SimFs<V>) -> Result<BTreeMap<String, Stat>, Failure> {
    let mut seen = BTreeMap::new();
    let mut directories = vec![String::new()];
    while let Some(directory) = directories.pop() {
        let path = if directory.is_empty() {
            "/"
        } else {
            directory.as_str()
        };
        for entry in fs.list(path).await.map_err(failed)? {
            let path = format!("{directory}/{}", entry.name);
            let stat = fs.stat(&path).await.map_err(failed)?;
            if stat.id != entry.id || stat.kind != entry.kind {
                return Err(format!("{path} is something else than its entry says").into());
            }
            if entry.kind == Kind::Directory {
                directories.push(path.clone());
            }
            seen.insert(path, stat);
        }
    }
    Ok(seen)
}

impl Model {
    /// Whether names, chains, sizes and attributes are those of the model.
    pub(crate) fn fits(&self, seen: &BTreeMap<String, Stat>) -> Result<(), String> {
        let named: Vec<_> = self
            .tree
            .values()
            .filter_map(|entry| entry.path.as_deref())
            .collect();
        if named.len() != seen.len() || named.iter().any(|path| !seen.contains_key(*path)) {
            return Err(format!(
                "names {:?} instead of {named:?}",
                seen.keys().collect::<Vec<_>>()
            ));
        }
        let by_id: BTreeMap<_, _> = seen.iter().map(|(path, stat)| (stat.id, path.as_str())).collect();
        for (node, entry) in self.tree.iter() {
            let Some((path, stat)) = entry
                .path
                .as_deref()
                .and_then(|path| Some((path, seen.get(path)?)))
            else {
                continue;
            };
            let is = (
                stat.kind == Kind::Directory,
                stat.frozen,
                stat.absorbed,
                stat.attributes.exempt_from_migration,
                stat.identity.unwrap_or_default(),
            );
            let identity = [entry.identity; 16];
            let shall = (
                entry.directory,
                entry.frozen,
                entry.absorbed,
                entry.exempt,
                identity,
            );
            if is != shall {
                return Err(format!(
                    "{path}: directory, frozen, absorbed, exempt, identity are {is:?} instead of {shall:?}"
                ));
            }
            if !entry.directory && stat.size != entry.size {
                return Err(format!("{path}: size {} instead of {}", stat.size, entry.size));
            }
            let parent = stat.parent.map(|parent| by_id.get(&parent).copied());
            let named = self
                .named_parent(*node)
                .and_then(|parent| self.tree.get(&parent)?.path.as_deref());
            let right = match parent {
                Some(Some(path)) => named == Some(path),
                // It waits for being absorbed.
                Some(None) => entry.parent.is_some(),
                None => named.is_none(),
            };
            if !right {
                return Err(format!("{path}: parent {parent:?} instead of {named:?}"));
            }
        }
        Ok(())
    }
}

/// Compares the file system with what was promised, after a crash or without one. From then on, the model is what was found.
pub(crate) async fn verify<V: BlockDevice + 'static>(
    fs: &SimFs<V>,
    promise: &Promise,
    most: u64,
) -> Result<BTreeMap<String, Stat>, Failure> {
    let seen = look(fs).await?;
    let mut reasons = Vec::new();
    let outcomes = promise.borrow().outcomes();
    let fitting = outcomes.into_iter().find(|outcome| match outcome.fits(&seen) {
        Ok(()) => true,
        Err(reason) => {
            reasons.push(reason);
            false
        }
    });
    let Some(mut model) = fitting else {
        reasons.dedup();
        return Err(format!("what is there was never promised: {}", reasons.join("; or ")).into());
    };
    let files: Vec<_> = model
        .tree
        .iter()
        .filter(|(_, entry)| !entry.directory && !entry.absorbed)
        .filter_map(|(node, entry)| Some((*node, entry.path.clone()?, entry.size)))
        .collect();
    for (node, path, size) in files {
        let file = fs.open_file(&path, filesys::Access::Read).await.map_err(failed)?;
        let Some(content) = model.contents.get_mut(&node) else {
            continue;
        };
        for (start, end) in windows(size, most) {
            harness::read_with(&file, start, end - start, |bytes| {
                content
                    .allows(start, bytes)
                    .map_err(|error| Failure::from(describe(&error, start, bytes)).context(&path))?;
                // Where more was possible, this is what there is from now on.
                if !content.is_certain() {
                    let written: Vec<u64> = content
                        .written()
                        .filter(|offset| (start..end).contains(offset))
                        .collect();
                    for offset in written {
                        let at = usize::try_from(offset - start).unwrap();
                        content.settle(offset, &bytes[at..at + 512]);
                    }
                }
                Ok(())
            })
            .await?;
        }
    }
    *promise.borrow_mut() = model;
    Ok(seen)
}

/// What a sector that is wrong says it is.
fn describe(error: &str, start: u64, bytes: &[u8]) -> String {
    let sector = error
        .split(&[' ', ','][..])
        .nth(1)
        .and_then(|number| number.parse::<u64>().ok());
    let at = sector.and_then(|sector| usize::try_from((sector * 512).checked_sub(start)?).ok());
    let Some(words) = at.and_then(|at| bytes.get(at..at + 16)) else {
        return error.to_owned();
    };
    let word = |at: usize| u64::from_le_bytes(words[at..at + 8].try_into().unwrap());
    format!(
        "{error}: it says that it is sector {} of write {}",
        word(0),
        word(8)
    )
}

/// All of the file, up to `most` bytes at a time.
fn windows(size: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = most.min(harness::WINDOW);
    (0..size.div_ceil(step)).map(move |window| (window * step, ((window + 1) * step).min(size)))
}

/// Space adds up: what volumes have given away is what files have. Files without names are not asked, so there must be none.
/// `seen` is what [`look`] found, if nothing has changed files that have names since.
pub(crate) async fn adds_up<V: BlockDevice + 'static>(
    fs: &SimFs<V>,
    promise: &Promise,
    seen: Option<&BTreeMap<String, Stat>>,
) -> Result<(), Failure> {
    let nameless = |model: &Model| {
        model
            .tree
            .values()
            .any(|entry| entry.path.is_none() || entry.absorbed)
    };
    if nameless(&promise.borrow()) {
        return Ok(());
    }
    let allocated = |seen: &BTreeMap<String, Stat>| seen.values().map(|stat| stat.allocated).sum();
    let files: u64 = match seen {
        Some(seen) => allocated(seen),
        None => allocated(&look(fs).await?),
    };
    let given: u64 = fs.volumes().iter().map(|volume| volume.size - volume.free).sum();
    if files != given {
        return Err(
            format!("volumes have given {given} bytes away, files have {files}")
                .as_str()
                .into(),
        );
    }
    Ok(())
}

/// Every invariant of the metadata holds.
pub(crate) async fn is_sound<V: BlockDevice + 'static>(fs: &SimFs<V>) -> Result<(), Failure> {
    let report = fs.check(filesys::CheckOptions::default()).await.map_err(failed)?;
    match report.findings.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} findings, the first: {first:?}", report.findings.len()).into()),
    }
}
