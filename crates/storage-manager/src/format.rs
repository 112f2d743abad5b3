//! A pool gets a file system: a volume for its metadata, and all others for data.

use api::file::{FileSystemStatus, META_VOLUME};
use api::storage::{LayoutKind, Shape};
use api::{Problem, ProblemKind};
use block_io::{AlignedBuffer, BlockDevice, WorkerClock};
use filesys::{FormatOptions, OpenOptions};
use volume_manager::model::{Configuration, DeviceState, ReadPolicy};
use volume_manager::store::{Content, inspect};
use volume_manager::{NewVolume, PoolError, place};

use crate::file_view;
use crate::operation;
use crate::problem::{of_files, of_io, of_pool};
use crate::random;
use crate::storage::{self, FileSystem, Storage, Volume};

/// The most copies of the metadata that are made unasked.
const COPIES: u32 = 3;
/// The smallest metadata volume that is made unasked.
const SMALLEST: u64 = 16 << 20;
/// Sizes of metadata volumes are multiples of this.
const STEP: u64 = 1 << 20;
/// The largest journal that is made unasked.
const JOURNAL: u64 = 64 << 20;
/// A metadata volume can grow by this factor.
const GROWTH: u64 = 64;

/// What a person may decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub(crate) meta_size: Option<u64>,
    pub(crate) meta_copies: Option<u32>,
    pub(crate) force: bool,
}

/// Makes the file system. The pool is open, without files.
pub(crate) async fn format(storage: &mut Storage, wishes: Wishes) -> Result<FileSystemStatus, Problem> {
    see_that_nothing_is_lost(storage, wishes.force).await?;
    if !storage.has_meta_volume() {
        make_meta_volume(storage, wishes).await?;
    } else if wishes.meta_size.is_some() || wishes.meta_copies.is_some() {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("volume {META_VOLUME} is there already"),
        )
        .about(META_VOLUME)
        .remedy(format!(
            "leave out --meta-size and --meta-copies; `smsvmm volume resize {META_VOLUME}` and `smsvmm volume set-layout {META_VOLUME}` change it"
        )));
    }
    let meta = storage.given(META_VOLUME)?;
    let options = FormatOptions {
        uuid: random::uuid()?.0.to_be_bytes(),
        seed: random::number()?,
        journal_blocks: None,
        grow_to: meta.device.size().saturating_mul(GROWTH),
    };
    let volumes = storage.data_volumes()?;
    let redundancy = storage::redundancy(&meta.device, &volumes);
    let open = OpenOptions {
        redundancy: redundancy.clone(),
        ..OpenOptions::default()
    };
    let made = FileSystem::format(meta, volumes, &options, open, WorkerClock::new()).await;
    let files = made.map_err(|error| of_files(&error))?;
    let status = file_view::file_system(&files);
    storage.set_files(files, redundancy);
    Ok(status)
}

/// Refuses where a volume carries something that a person may want to keep.
async fn see_that_nothing_is_lost(storage: &Storage, force: bool) -> Result<(), Problem> {
    if force {
        return Ok(());
    }
    if storage.has_meta_volume() {
        let meta = storage.meta_volume()?;
        if !is_blank(&meta).await? {
            let name = storage.pool.configuration().name.clone();
            return Err(
                Problem::new(ProblemKind::Conflict, format!("pool {name} has a file system"))
                    .about(name)
                    .remedy(
                        "`smsvmm file list -l /` shows its files; --force destroys it and makes a new one",
                    ),
            );
        }
    }
    let mut found = Vec::new();
    for volume in storage.data_volumes()? {
        let content = inspect(&*volume.device).await.map_err(|error| of_io(&error))?;
        if content != Content::Blank {
            found.push(format!("volume {} carries {content}", volume.name));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(Problem::new(ProblemKind::Conflict, found.join("; "))
        .remedy("save that and delete the volume, or use --force, which destroys it"))
}

/// Whether nobody ever made a file system here, or not to its end: superblocks are written last.
async fn is_blank(meta: &Volume) -> Result<bool, Problem> {
    let length = 64 << 10;
    let buffer = AlignedBuffer::new(length);
    for offset in [0, meta.size().saturating_sub(length as u64) / 4096 * 4096] {
        // SAFETY: the buffer outlives the read, which is awaited.
        let memory = [unsafe { buffer.io(0, length) }];
        meta.read(offset, &memory).await.map_err(|error| of_io(&error))?;
        if buffer.as_slice().iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the volume for metadata.
async fn make_meta_volume(storage: &Storage, wishes: Wishes) -> Result<(), Problem> {
    let config = storage.pool.configuration();
    let size = match wishes.meta_size {
        Some(size) => operation::check_size(META_VOLUME, size)?,
        None => meta_size(config.devices.iter().map(|device| device.size).sum()),
    };
    let usable = usable_devices(&config);
    let most = wishes.meta_copies.unwrap_or(usable.clamp(1, COPIES));
    // With fewer copies than asked for nobody is served; with two instead of three, everybody.
    let least = wishes.meta_copies.unwrap_or(most.min(2));
    let mut copies = most;
    loop {
        match make_volume(storage, &config, size, copies).await {
            Err(PoolError::Place(place::PlaceError::Shortage(_))) if copies > least => copies -= 1,
            Err(error) => {
                let problem = of_pool(META_VOLUME, error);
                return Err(problem.remedy(format!(
                    "the file system needs {} for metadata {copies} times on different devices: make room, add devices, or decide with --meta-size and --meta-copies",
                    api::ByteSize::from_bytes(size)
                )));
            }
            Ok(()) => return Ok(()),
        }
    }
}

async fn make_volume(
    storage: &Storage,
    config: &Configuration,
    size: u64,
    copies: u32,
) -> Result<(), PoolError> {
    let shape = Shape {
        layout: match copies {
            0 | 1 => LayoutKind::Concat,
            _ => LayoutKind::Mirror,
        },
        columns: 0,
        copies: if copies > 1 { copies } else { 0 },
        stripe_unit: 0,
        class: String::new(),
        devices: Vec::new(),
    };
    let state = |problem: Problem| PoolError::State(problem.detail);
    let new = NewVolume {
        name: META_VOLUME.to_owned(),
        uuid: random::uuid().map_err(state)?,
        size,
        attributes: operation::attributes(config, &shape).map_err(state)?,
        block: 4096,
        region: 0,
        read_policy: ReadPolicy::default(),
    };
    storage.pool.create_volume(new).await.map(|_| ())
}

/// Devices on which something new can be.
fn usable_devices(config: &Configuration) -> u32 {
    let usable = config.devices.iter();
    let usable = usable.filter(|device| device.state == DeviceState::Active);
    u32::try_from(usable.count()).unwrap_or(u32::MAX)
}

/// A good size for the metadata of a pool with so many bytes of devices: a map entry for each cluster of all of it is 256 MiB for a
/// TiB, which is there twice while a checkpoint is written; and the journal.
fn meta_size(devices: u64) -> u64 {
    let maps = devices / 2048;
    let journal = (maps / 7).min(JOURNAL);
    (maps + journal).next_multiple_of(STEP).max(SMALLEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_are_a_two_thousandth_with_the_journal_on_top() {
        assert_eq!(meta_size(4 * (64 << 20)), 16 << 20);
        assert_eq!(meta_size(100 << 30), 58 << 20);
        assert_eq!(meta_size(1 << 40), (512 << 20) + (64 << 20));
        assert_eq!(meta_size(100 << 40), ((100 * 512) << 20) + (64 << 20));
    }
}
