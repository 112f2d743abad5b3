//! Descriptors come from the file system and go there.

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability, IoBuf};
use filesys::{Access, FileId, FileSystem, FsError, Kind, NewFile};

use super::descriptor::{Descriptor, SLOT, Wrong};
use super::error::DiskError;
use super::name::DiskPath;

/// The whole of a buffer, for a request that is awaited while the buffer is there.
pub(super) fn whole(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: all callers keep the buffer, without touching it, until the request has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

/// Looks at a chain that changes meanwhile.
const MOST_TRIES: usize = 8;

fn damaged(path: &DiskPath, problem: impl Into<String>) -> DiskError {
    DiskError::Descriptor {
        path: path.descriptor(),
        disk: path.to_string(),
        problem: problem.into(),
    }
}

/// Which slot comes after a sequence number's.
fn slot_of(sequence: u64) -> u64 {
    (sequence % 2) * SLOT as u64
}

/// What the descriptor of a disk says; of a disk without one, what follows from that.
pub(super) async fn load<V: BlockDevice + 'static, C: Clock + Clone + 'static>(
    files: &FileSystem<V, C>,
    path: &DiskPath,
) -> Result<Descriptor, DiskError> {
    let stat = match files.stat(path.as_str()).await {
        Ok(stat) if stat.kind == Kind::File => stat,
        Ok(_) => {
            return Err(FsError::IsDirectory {
                path: path.to_string(),
            }
            .into());
        }
        Err(FsError::NotFound { .. }) => {
            return Err(DiskError::NoDisk {
                disk: path.to_string(),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let file = match files.open_file(&path.descriptor(), Access::Read).await {
        Ok(file) => file,
        Err(FsError::NotFound { .. }) => return Ok(Descriptor::plain(stat.id)),
        Err(error) => return Err(error.into()),
    };
    let mut newest: Option<Descriptor> = None;
    let mut problem = None;
    for sequence in 0..2 {
        let buffer = AlignedBuffer::new(SLOT);
        if file.size() < 2 * SLOT as u64 {
            return Err(damaged(path, "it is too short"));
        }
        file.read(slot_of(sequence), &whole(&buffer)).await?;
        match Descriptor::decode(buffer.as_slice()) {
            Ok(None) => {}
            Ok(Some(found))
                if newest
                    .as_ref()
                    .is_some_and(|newest| newest.sequence > found.sequence) => {}
            Ok(Some(found)) => newest = Some(found),
            // Whatever else there is, somebody else has made this.
            Err(Wrong::Foreign(error)) => return Err(damaged(path, error)),
            Err(Wrong::Damaged(error)) => problem = Some(error),
        }
    }
    match (newest, problem) {
        // A deletion goes by numbers.
        (Some(descriptor), _) if descriptor.deleted => Ok(descriptor),
        (Some(descriptor), _) => {
            check_same_disk(files, path, &descriptor).await?;
            Ok(descriptor)
        }
        // A crash while the first one was written: there is nothing to describe yet.
        (None, _) if stat.children == 0 => Ok(Descriptor::plain(stat.id)),
        (None, None) => Ok(Descriptor::plain(stat.id)),
        (None, Some(problem)) => Err(damaged(path, problem)),
    }
}

/// Whether a disk that is gone has left its descriptor. What is no descriptor is not taken for one.
pub(super) async fn is_left<V: BlockDevice + 'static, C: Clock + Clone + 'static>(
    files: &FileSystem<V, C>,
    path: &DiskPath,
) -> Result<bool, DiskError> {
    let file = match files.open_file(&path.descriptor(), Access::Read).await {
        Ok(file) => file,
        Err(FsError::NotFound { .. }) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    for sequence in 0..2 {
        let buffer = AlignedBuffer::new(SLOT);
        if file.size() == 2 * SLOT as u64 {
            file.read(slot_of(sequence), &whole(&buffer)).await?;
            if Descriptor::decode(buffer.as_slice()).is_ok() {
                return Ok(true);
            }
        }
    }
    Err(FsError::Exists {
        path: path.descriptor(),
    }
    .into())
}

/// The file of the disk's name must be the head, or an ancestor of it.
async fn check_same_disk<V: BlockDevice + 'static, C: Clock + Clone + 'static>(
    files: &FileSystem<V, C>,
    path: &DiskPath,
    descriptor: &Descriptor,
) -> Result<(), DiskError> {
    // A merge may end meanwhile, which takes a layer out of the chain, and gives the disk's name to the one above.
    for _ in 0..MOST_TRIES {
        let base = files.stat(path.as_str()).await?.id;
        if is_below(files, base, descriptor.head).await? {
            return Ok(());
        }
        block_io::cover!("disk: the chain is looked at once more");
    }
    let problem = "the file of that name is another one: move it back, or delete the descriptor, which forgets its snapshots";
    Err(damaged(path, problem))
}

/// Whether a layer is another one, or an ancestor of it.
async fn is_below<V: BlockDevice + 'static, C: Clock + Clone + 'static>(
    files: &FileSystem<V, C>,
    base: FileId,
    top: FileId,
) -> Result<bool, DiskError> {
    let mut at = top;
    for _ in 0..10_000 {
        if at == base {
            return Ok(true);
        }
        match files.stat_of(at).await?.and_then(|stat| stat.parent) {
            Some(parent) => at = parent,
            None => break,
        }
    }
    Ok(false)
}

/// Makes a descriptor durable.
pub(super) async fn store<V: BlockDevice + 'static, C: Clock + Clone + 'static>(
    files: &FileSystem<V, C>,
    path: &DiskPath,
    descriptor: &mut Descriptor,
    now: u64,
) -> Result<(), DiskError> {
    let name = path.descriptor();
    if let Err(error) = files.stat(&name).await {
        if !matches!(error, FsError::NotFound { .. }) {
            return Err(error.into());
        }
        let new = NewFile {
            size: 2 * SLOT as u64,
            attributes: None,
            now,
        };
        Box::pin(files.create(&name, &new)).await?;
    }
    descriptor.sequence += 1;
    let bytes = descriptor.encode();
    let mut buffer = AlignedBuffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(&bytes);
    let file = files.open_file(&name, Access::Write).await?;
    let written = file
        .write(slot_of(descriptor.sequence), &whole(&buffer), Durability::Durable)
        .await;
    written.map_err(DiskError::from)
}
