//! Pools of the volume manager on simulated disks, for file systems that lie on real volumes.

use std::rc::Rc;

use block_io::sim::{Sim, SimDisk};
use volume_manager::model::{self, Layout, ReadPolicy, Uuid};
use volume_manager::store::Force;
use volume_manager::{NewDevice, NewVolume, OpenOptions};

/// Of an opening, which has an identity of its own.
pub(crate) fn options(incarnation: u128) -> OpenOptions {
    OpenOptions {
        incarnation: Uuid(incarnation),
        pool: None,
        force: Force::No,
        limits: volume_manager::logs::hot::Limits::default(),
        jobs_wait: false,
    }
}

/// The first `count` disks of the world.
pub(crate) fn devices(sim: &Sim, count: usize) -> Vec<NewDevice<SimDisk>> {
    let device = |index| NewDevice {
        name: format!("d{index}"),
        device: Rc::new(sim.disk(index)),
        uuid: Uuid(1000 + index as u128),
        class: String::new(),
        enclosure: String::new(),
        spare: false,
    };
    (0..count).map(device).collect()
}

/// Volume number `number`.
pub(crate) fn volume(number: usize, name: &str, size: u64, layout: Layout) -> NewVolume {
    NewVolume {
        name: name.into(),
        uuid: Uuid(70 + number as u128),
        size,
        attributes: model::Attributes {
            layout,
            stripe_unit: 16384,
            class: String::new(),
            devices: Vec::new(),
        },
        block: 512,
        read_policy: ReadPolicy::Balanced,
        region: 65536,
    }
}
