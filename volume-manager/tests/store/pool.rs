//! A small pool on simulated disks, and shorthands.

use std::rc::Rc;

use block_io::sim::{DiskOptions, Failure, Sim, SimDisk, World};
use volume_manager::format::Label;
use volume_manager::model::{Configuration, Device, DeviceId, DeviceState, Incarnation, Uuid};
use volume_manager::store::{Choice, Force, OpenError, Opened, Standing, Store, format_device, scan};

pub(crate) const POOL: Uuid = Uuid(0x9001);
/// Smallest size of a device.
pub(crate) const SIZE: u64 = 4 << 20;

/// Disks whose sectors have 4096 bytes, so that a small slot is written whole or not at all and all states can be tried.
pub(crate) fn world(disks: usize) -> World {
    World::new((0..disks).map(|index| DiskOptions::with_sector(&format!("disk{index}"), SIZE, 4096)))
}

/// Identity of disk `index`.
pub(crate) fn identity(index: usize) -> Uuid {
    Uuid(0xd000 + index as u128)
}

pub(crate) fn id(index: usize) -> DeviceId {
    DeviceId(u32::try_from(index).unwrap())
}

pub(crate) fn device(index: usize, label: &Label) -> Device {
    Device {
        id: id(index),
        uuid: label.device,
        name: format!("disk{index}"),
        size: label.size,
        data_start: label.data_start,
        block: label.block,
        state: DeviceState::Active,
        class: String::new(),
        enclosure: String::new(),
    }
}

/// The first configuration, still without devices.
pub(crate) fn first() -> Configuration {
    let begin = Incarnation {
        id: Uuid(1),
        first_epoch: 1,
        forced: false,
    };
    Configuration {
        pool: POOL,
        name: "tank".into(),
        epoch: 1,
        incarnations: vec![begin],
        devices: Vec::new(),
        volumes: Vec::new(),
        jobs: Vec::new(),
        next_device: 0,
        next_volume: 0,
        next_job: 0,
    }
}

/// Formats disk `index` and puts it into the store and into `next`.
pub(crate) async fn add(sim: &Sim, index: usize, store: &mut Store<SimDisk>, next: &mut Configuration) {
    let disk = sim.disk(index);
    let label = format_device(&disk, identity(index), POOL, "tank").await.unwrap();
    next.devices.push(device(index, &label));
    next.devices.sort_by_key(|device| device.id);
    next.next_device = next.next_device.max(id(index).0 + 1);
    store.add_device(id(index), Rc::new(disk), label);
}

/// Makes a pool of the disks.
pub(crate) async fn create(
    sim: &Sim,
    disks: impl IntoIterator<Item = usize>,
) -> Result<Store<SimDisk>, Failure> {
    let mut store = Store::new();
    let mut next = first();
    for index in disks {
        add(sim, index, &mut store, &mut next).await;
    }
    commit(&mut store, &next).await?;
    Ok(store)
}

/// Commits on devices that are all healthy.
pub(crate) async fn commit(store: &mut Store<SimDisk>, next: &Configuration) -> Result<(), Failure> {
    let committed = store
        .commit(next)
        .await
        .map_err(|error| Failure::from(error.to_string()))?;
    if committed.failed.is_empty() {
        return Ok(());
    }
    Err(format!("devices failed: {:?}", committed.failed).into())
}

/// The next configuration with `change` as its only mark.
pub(crate) fn marked(store: &Store<SimDisk>, mark: u32) -> Configuration {
    let mut next = store.configuration().unwrap().clone();
    next.epoch += 1;
    next.next_job = mark;
    next
}

/// Reads the disks with these numbers and chooses.
pub(crate) async fn choose(
    sim: &Sim,
    disks: impl IntoIterator<Item = usize>,
    force: &Force,
) -> Result<Choice<SimDisk>, OpenError> {
    let disks: Vec<(String, Rc<SimDisk>)> = disks
        .into_iter()
        .map(|index| (format!("disk{index}"), Rc::new(sim.disk(index))))
        .collect();
    scan(&disks).await.choose(None, force)
}

/// Opens and claims.
pub(crate) async fn open(
    sim: &Sim,
    disks: impl IntoIterator<Item = usize>,
    force: &Force,
) -> Result<Opened<SimDisk>, OpenError> {
    choose(sim, disks, force).await?.claim().await
}

/// The first configuration of an opening as a caller would make it: who is absent or failed is faulty.
pub(crate) fn begin(opened: &Opened<SimDisk>, incarnation: u128) -> Configuration {
    let mut next = opened.begin(Uuid(incarnation));
    let failed = opened.failed.iter().map(|(id, _)| id);
    for id in opened.absent.iter().chain(failed) {
        make_faulty(&mut next, *id);
    }
    next
}

pub(crate) fn make_faulty(next: &mut Configuration, id: DeviceId) {
    let since = next.epoch;
    let device = next.devices.iter_mut().find(|device| device.id == id);
    if let Some(device) = device
        && device.is_holder()
    {
        device.state = DeviceState::Faulty { since };
    }
}

/// How a device stands.
pub(crate) fn standing(opened: &Opened<SimDisk>, index: usize) -> Option<Standing> {
    let present = opened.present.iter().find(|present| present.id == id(index))?;
    Some(present.standing)
}
