//! A file system on two simulated disks, and disks on it.

use std::rc::Rc;

use block_io::sim::{
    DiskOptions as SimDiskOptions, Ended, Failure, RunOptions, Sim, SimClock, SimDisk, World,
};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf};
use filesys::{FileSystem, FormatOptions, GivenVolume, OpenOptions};
use storage_virtualizer::disk::{DiskMode, DiskOptions, Disks, NewDisk, VirtualDisk};

pub(crate) type SimFs = FileSystem<SimDisk, SimClock>;
pub(crate) type SimDisks = Disks<SimDisk, SimClock>;
pub(crate) type SimVirtualDisk = VirtualDisk<SimDisk, SimClock>;

pub(crate) const KIB: u64 = 1024;
pub(crate) const CLUSTER: u64 = 64 * KIB;

pub(crate) fn failed(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text.as_str().into()
}

pub(crate) fn world(data: u64) -> World {
    World::new([
        SimDiskOptions::new("meta", 2 << 20),
        SimDiskOptions::new("v1", data),
    ])
}

fn given(sim: &Sim, index: usize) -> GivenVolume<SimDisk> {
    GivenVolume {
        uuid: [u8::try_from(index).unwrap(); 16],
        name: format!("v{index}"),
        class: String::new(),
        device: Rc::new(sim.disk(index)),
    }
}

pub(crate) async fn format(sim: &Sim) -> Result<SimFs, Failure> {
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: Some(64),
        grow_to: 0,
    };
    let options = OpenOptions::default();
    FileSystem::format(given(sim, 0), vec![given(sim, 1)], &format, options, sim.clock())
        .await
        .map_err(failed)
}

pub(crate) async fn open(sim: &Sim) -> Result<SimFs, Failure> {
    let options = OpenOptions::default();
    FileSystem::open(Rc::new(sim.disk(0)), vec![given(sim, 1)], options, sim.clock())
        .await
        .map_err(failed)
}

pub(crate) async fn create(disks: &SimDisks, path: &str, size: u64) -> Result<(), Failure> {
    let new = NewDisk {
        size,
        attributes: None,
        now: 1,
        ..NewDisk::default()
    };
    disks.create(path, &new).await.map_err(failed)
}

pub(crate) fn writing(mode: DiskMode) -> DiskOptions {
    DiskOptions {
        mode,
        now: 1,
        ..DiskOptions::default()
    }
}

pub(crate) fn reading() -> DiskOptions {
    DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    }
}

pub(crate) async fn attach(
    disks: &SimDisks,
    path: &str,
    mode: DiskMode,
) -> Result<Rc<SimVirtualDisk>, Failure> {
    let opened = disks.open(path, writing(mode)).await;
    opened.map(Rc::new).map_err(failed)
}

pub(crate) fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: all callers keep the buffer until the request has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

/// Writes 4 KiB at the start of a cluster, all of one number.
pub(crate) async fn write<D: BlockDevice>(disk: &D, cluster: u64, stamp: u64) -> Result<(), Failure> {
    put(disk, cluster * CLUSTER, stamp, Durability::Durable).await
}

pub(crate) async fn put<D: BlockDevice>(
    disk: &D,
    offset: u64,
    stamp: u64,
    durability: Durability,
) -> Result<(), Failure> {
    let mut buffer = AlignedBuffer::new(4096);
    for word in buffer.as_mut_slice().chunks_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
    Ok(disk.write(offset, &memory(&buffer), durability).await?)
}

/// The number at an offset, which all of the 4 KiB there must be.
pub(crate) async fn get<D: BlockDevice>(disk: &D, offset: u64) -> Result<u64, Failure> {
    let buffer = AlignedBuffer::new(4096);
    disk.read(offset, &memory(&buffer)).await?;
    let words = buffer.as_slice().chunks(8);
    let mut numbers = words.map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let first = numbers.next().unwrap_or(0);
    match numbers.all(|number| number == first) {
        true => Ok(first),
        false => Err(format!("torn at offset {offset}").into()),
    }
}

/// What all clusters of a disk have.
pub(crate) async fn contents<D: BlockDevice>(disk: &D) -> Result<Vec<u64>, Failure> {
    let mut found = Vec::new();
    for cluster in 0..disk.size() / CLUSTER {
        found.push(get(disk, cluster * CLUSTER).await?);
    }
    Ok(found)
}

/// What all clusters of a disk or snapshot have, opened for that.
pub(crate) async fn look(disks: &SimDisks, path: &str) -> Result<Vec<u64>, Failure> {
    let disk = disks.open(path, reading()).await.map_err(failed)?;
    contents(&disk).await
}

pub(crate) async fn is_sound(fs: &SimFs) -> Result<(), Failure> {
    let report = fs.check(filesys::CheckOptions::default()).await.map_err(failed)?;
    match report.findings.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} findings, the first: {first:?}", report.findings.len()).into()),
    }
}

/// Names in the root directory.
pub(crate) async fn names(fs: &SimFs) -> Result<Vec<String>, Failure> {
    let entries = fs.list("/").await.map_err(failed)?;
    Ok(entries.into_iter().map(|entry| entry.name).collect())
}

/// Runs a story once, without crashes.
pub(crate) fn run<F: Future<Output = Result<(), Failure>>>(story: impl FnOnce(Sim) -> F) {
    let mut world = world(8 << 20);
    let ran = world
        .run(&RunOptions::in_order(), story)
        .unwrap_or_else(|failure| panic!("{failure}"));
    match ran.ended {
        Ended::Done(result) => result.unwrap_or_else(|failure| panic!("{failure}")),
        Ended::Crashed => panic!("crashed"),
    }
}

pub(crate) fn refused<T>(
    result: Result<T, storage_virtualizer::disk::DiskError>,
    words: &str,
) -> Result<(), Failure> {
    match result {
        Ok(_) => Err(format!("was not refused: {words}").into()),
        Err(error) if error.to_string().contains(words) => Ok(()),
        Err(error) => Err(format!("was refused with `{error}`, not `{words}`").into()),
    }
}

#[track_caller]
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<(), Failure> {
    match found == expected {
        true => Ok(()),
        false => {
            let place = std::panic::Location::caller();
            Err(format!("{place}: {found:?}, and not {expected:?}").into())
        }
    }
}
