//! A file system on simulated disks, and what was promised about its files.

use std::cell::Cell;
use std::rc::Rc;

use block_io::sim::{DiskOptions, Failure, Sim, SimClock, SimDisk, World};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf, IoError};
use filesys::{File, FileSystem, FormatOptions, FsError, GivenVolume, NewFile, OpenOptions};

pub(crate) type SimFs<V = SimDisk> = FileSystem<V, SimClock>;
pub(crate) type SimFile<V = SimDisk> = File<V, SimClock>;

pub(crate) const META: u64 = 2 << 20;

pub(crate) fn failed(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text.as_str().into()
}

/// One metadata disk and `volumes` data disks of `size` bytes.
pub(crate) fn world(volumes: u64, size: u64) -> World {
    let meta = DiskOptions::new("meta", META);
    let data = (0..volumes).map(|index| DiskOptions::new(&format!("v{index}"), size));
    World::new(std::iter::once(meta).chain(data))
}

pub(crate) fn given(sim: &Sim, index: usize) -> GivenVolume<SimDisk> {
    GivenVolume {
        uuid: [u8::try_from(index).unwrap(); 16],
        name: format!("v{index}"),
        class: String::new(),
        device: Rc::new(sim.disk(index)),
    }
}

pub(crate) fn options() -> OpenOptions {
    OpenOptions {
        cached_pages: 64,
        cached_files: 4,
        dirty_pages: 64,
        // The model knows what was asked for, and not what goes on by itself.
        resume_merges: false,
        ..OpenOptions::default()
    }
}

pub(crate) async fn format(sim: &Sim, volumes: usize) -> Result<SimFs, FsError> {
    let format = FormatOptions {
        uuid: [9; 16],
        seed: 77,
        journal_blocks: Some(64),
        grow_to: 0,
    };
    let data = (1..=volumes).map(|index| given(sim, index)).collect();
    FileSystem::format(given(sim, 0), data, &format, options(), sim.clock()).await
}

pub(crate) async fn open(sim: &Sim) -> Result<SimFs, FsError> {
    let data = (1..sim.disks().len()).map(|index| given(sim, index)).collect();
    FileSystem::open(Rc::new(sim.disk(0)), data, options(), sim.clock()).await
}

pub(crate) fn thin(size: u64) -> NewFile {
    NewFile {
        size,
        ..NewFile::default()
    }
}

pub(crate) fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: the callers below keep the buffer until the request has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

pub(crate) async fn read(file: &impl BlockDevice, offset: u64, length: usize) -> Result<Vec<u8>, IoError> {
    Ok(read_into(file, offset, length).await?.as_slice().to_vec())
}

pub(crate) async fn read_into(
    file: &impl BlockDevice,
    offset: u64,
    length: usize,
) -> Result<AlignedBuffer, IoError> {
    let buffer = AlignedBuffer::new(length);
    file.read(offset, &memory(&buffer)).await?;
    Ok(buffer)
}

/// Most that [`read_with`] reads.
pub(crate) const WINDOW: u64 = 256 << 10;

thread_local! {
    static BUFFER: Cell<Option<AlignedBuffer>> = const { Cell::new(None) };
}

/// As [`read`], into a buffer that is used again and again, with what was read before still in it.
pub(crate) async fn read_with(
    file: &impl BlockDevice,
    offset: u64,
    length: u64,
    use_it: impl FnOnce(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let length = usize::try_from(length).unwrap();
    let buffer = BUFFER.take();
    let buffer = buffer.unwrap_or_else(|| AlignedBuffer::new(usize::try_from(WINDOW).unwrap()));
    // SAFETY: the buffer is kept until the request has ended.
    let memory = [unsafe { buffer.io(0, length) }];
    file.read(offset, &memory).await?;
    let done = use_it(&buffer.as_slice()[..length]);
    BUFFER.set(Some(buffer));
    done
}

pub(crate) async fn write(file: &impl BlockDevice, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    let mut buffer = AlignedBuffer::new(bytes.len());
    buffer.as_mut_slice().copy_from_slice(bytes);
    file.write(offset, &memory(&buffer), Durability::Volatile).await
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(offset: u64, length: usize, fill: u8) -> Vec<u8> {
    let mut bytes = vec![fill; length];
    for (index, sector) in bytes.chunks_mut(512).enumerate() {
        sector[..8].copy_from_slice(&(offset + index as u64 * 512).to_le_bytes());
    }
    bytes
}

/// Runs a story once, without crashes.
pub(crate) fn run<F: Future<Output = Result<(), Failure>>>(mut world: World, story: impl FnOnce(Sim) -> F) {
    run_world(&mut world, story);
}

/// As [`run`], on a world that goes on afterwards.
pub(crate) fn run_world<F: Future<Output = Result<(), Failure>>>(
    world: &mut World,
    story: impl FnOnce(Sim) -> F,
) {
    try_world(world, story).unwrap_or_else(|failure| panic!("{failure}"));
}

/// As [`run_world`], for those who want to see what fails.
pub(crate) fn try_world<F: Future<Output = Result<(), Failure>>>(
    world: &mut World,
    story: impl FnOnce(Sim) -> F,
) -> Result<(), Failure> {
    let ran = world.run(&block_io::sim::RunOptions::in_order(), story)?;
    match ran.ended {
        block_io::sim::Ended::Done(result) => result,
        block_io::sim::Ended::Crashed => Err("crashed".into()),
    }
}

/// Compares without printing what is long.
pub(crate) fn same(found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    let at = found.iter().zip(expected).position(|(one, other)| one != other);
    Err(
        format!("{} and {} bytes differ at {at:?}", found.len(), expected.len())
            .as_str()
            .into(),
    )
}
