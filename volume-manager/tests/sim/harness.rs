//! A pool on simulated disks, and what was promised about one volume of it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use block_io::sim::{
    DiskOptions, ExploreOptions, Failure, Numbers, Scenario, SectorModel, Sim, SimClock, SimDisk, World,
    explore_parallel, threads,
};
use block_io::{AlignedBuffer, BlockDevice, Durability, IoBuf, IoError};
use volume_manager::logs::hot::Limits;
use volume_manager::model::{Attributes, Layout, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions, Pool, PoolError};

pub(crate) type SimPool = Pool<SimDisk, SimClock>;

pub(crate) const DISK: u64 = 8 << 20;
/// Of the exhaustive tests: the shorter the disks, the shorter the parity logs, which every recovery reads as a whole.
const SHORT_DISK: u64 = 5 << 20;
pub(crate) const UNIT: u64 = 4096;

/// What `SMSVMM_SIM_DEPTH` says: 1 is what every run of the tests does, more goes deeper, 0 leaves out crashes in recovery.
fn factor() -> u64 {
    let text = std::env::var("SMSVMM_SIM_DEPTH").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// How far an exhaustive test goes: states of each crash of the script, orders in which it runs, and one in how many crashes of
/// each recovery.
pub(crate) fn depth(states: u64, schedules: u64, one_in: u64) -> ExploreOptions {
    let factor = factor();
    ExploreOptions {
        states: states.saturating_mul(factor.max(1)),
        nesting: u32::from(factor > 0),
        nested_states: 2 + factor,
        nested_one_in: (one_in / factor.max(1)).max(1),
        schedules: schedules.saturating_mul(factor),
    }
}

/// Explores every case on all processors, prints the numbers of each and of all, and demands that there were so many states and
/// that these marks were reached.
pub(crate) fn explore_all<S: Scenario + Sync>(
    cases: impl IntoIterator<Item = (String, S)>,
    options: &ExploreOptions,
    states: u64,
    marks: &[&str],
) {
    let mut total = Numbers::default();
    let mut count = 0;
    let start = Instant::now();
    for (name, case) in cases {
        let explored = explore_parallel(&case, options, threads());
        let numbers = explored.unwrap_or_else(|failure| panic!("{name}: {failure}"));
        println!("{name}: {numbers}");
        total.add(&numbers);
        count += 1;
    }
    println!("all {count} cases, {:?}: {total}", start.elapsed());
    if factor() > 0 {
        assert!(
            total.crash_states >= states,
            "{states} states were asked for: {total}"
        );
        let missing = total.missing(marks);
        assert!(missing.is_empty(), "{missing:?} were not reached: {total}");
    }
}

/// What the user of the pool was promised.
#[derive(Clone, Default)]
pub(crate) struct Promise {
    pub(crate) sectors: SectorModel,
    /// Openings so far: each gets an identity of its own.
    pub(crate) openings: u128,
}

impl Promise {
    /// All of it that a recovery can notice.
    pub(crate) fn fingerprint(&self) -> u64 {
        block_io::sim::fingerprint(&(self.sectors.fingerprint(), self.openings))
    }
}

pub(crate) type Model = Rc<RefCell<Promise>>;

pub(crate) fn failed(error: impl std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text.as_str().into()
}

pub(crate) fn options(model: &Model) -> OpenOptions {
    let mut model = model.borrow_mut();
    model.openings += 1;
    OpenOptions {
        incarnation: Uuid(model.openings),
        pool: None,
        force: Force::No,
        limits: Limits::default(),
        jobs_wait: false,
    }
}

pub(crate) fn short_world(disks: u64) -> World {
    World::new((0..disks).map(|index| DiskOptions::new(&format!("d{index}"), SHORT_DISK)))
}

pub(crate) fn world(disks: u64) -> World {
    World::new((0..disks).map(|index| DiskOptions::new(&format!("d{index}"), DISK)))
}

pub(crate) async fn create(sim: &Sim, model: &Model, disks: usize) -> Result<SimPool, Failure> {
    let devices = (0..disks).map(|index| new_device(sim, index));
    let options = options(model);
    Pool::create("tank", Uuid(7), devices.collect(), &options, sim.clock())
        .await
        .map_err(failed)
}

pub(crate) fn new_volume(layout: Layout, size: u64) -> NewVolume {
    NewVolume {
        name: "v".into(),
        uuid: Uuid(77),
        size,
        attributes: Attributes {
            layout,
            stripe_unit: UNIT,
            class: String::new(),
            devices: Vec::new(),
        },
        block: 512,
        read_policy: volume_manager::model::ReadPolicy::Balanced,
        region: 16384,
    }
}

pub(crate) fn attributes(layout: Layout) -> Attributes {
    Attributes {
        layout,
        stripe_unit: UNIT,
        class: String::new(),
        devices: Vec::new(),
    }
}

/// A blank disk that is to be part of the pool.
pub(crate) fn new_device(sim: &Sim, index: usize) -> NewDevice<SimDisk> {
    NewDevice {
        name: format!("d{index}"),
        device: Rc::new(sim.disk(index)),
        uuid: Uuid(1000 + index as u128),
        class: String::new(),
        enclosure: String::new(),
        spare: false,
    }
}

/// Waits until no job runs.
pub(crate) async fn settle(pool: &SimPool) -> Result<(), Failure> {
    while let Some(job) = pool.jobs().into_iter().find(|job| job.is_live()) {
        pool.wait(job.id).await.map_err(failed)?;
    }
    Ok(())
}

/// Opens the pool on the disks for which `there` holds.
pub(crate) async fn open(
    sim: &Sim,
    model: &Model,
    there: impl Fn(usize) -> bool,
) -> Result<SimPool, PoolError> {
    let disks = sim.disks().into_iter().filter(|disk| there(disk.index()));
    let devices = disks.map(|disk| (format!("d{}", disk.index()), Rc::new(disk)));
    Pool::open(devices.collect(), &options(model), sim.clock()).await
}

fn memory(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: the callers below keep the buffer until the request has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}

pub(crate) async fn read_bytes(
    volume: &impl BlockDevice,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, IoError> {
    let buffer = AlignedBuffer::new(length);
    volume.read(offset, &memory(&buffer)).await?;
    Ok(buffer.as_slice().to_vec())
}

pub(crate) async fn write(
    volume: &impl BlockDevice,
    model: &Model,
    offset: u64,
    fill: u8,
    length: usize,
    durability: Durability,
) -> Result<(), Failure> {
    let mut buffer = AlignedBuffer::new(length);
    for (index, sector) in buffer.as_mut_slice().chunks_mut(512).enumerate() {
        sector.fill(fill);
        // So that sectors that were swapped show.
        sector[..8].copy_from_slice(&(offset + index as u64 * 512).to_le_bytes());
    }
    let ticket = model
        .borrow_mut()
        .sectors
        .write_begins(offset, buffer.as_slice(), durability);
    let result = volume.write(offset, &memory(&buffer), durability).await;
    match result {
        Ok(()) => model.borrow_mut().sectors.succeeded(ticket),
        Err(error) => return Err(failed(error)),
    }
    Ok(())
}

pub(crate) async fn flush(volume: &impl BlockDevice, model: &Model) -> Result<(), Failure> {
    let ticket = model.borrow_mut().sectors.flush_begins();
    volume.flush().await.map_err(failed)?;
    model.borrow_mut().sectors.flushed(ticket);
    Ok(())
}

/// Reads all of the volume and compares it with what was promised.
pub(crate) async fn check(volume: &impl BlockDevice, model: &Model) -> Result<Vec<u8>, Failure> {
    let ticket = model.borrow_mut().sectors.read_begins();
    let size = usize::try_from(volume.size()).unwrap();
    let bytes = read_bytes(volume, 0, size).await.map_err(failed)?;
    model.borrow_mut().sectors.check(ticket, 0, &bytes)?;
    Ok(bytes)
}

/// As [`check`], after a crash: from then on that is what it holds.
pub(crate) async fn verify(volume: &impl BlockDevice, model: &Model) -> Result<(), Failure> {
    let bytes = check(volume, model).await?;
    model.borrow_mut().sectors.settle(0, &bytes);
    Ok(())
}
