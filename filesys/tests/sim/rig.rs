//! A pool of the volume manager on simulated disks with a file system on it, and how far its devices are damaged.
//!
//! Also of the simulator tests of virtual disks (`storage-virtualizer/tests/sim`).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{
    AtMostDevices, Failure, Fault, FaultPolicy, FaultRule, Hit, Medium, Sim, SimClock, SimDisk,
};
use block_io::{Clock, Operation};
use filesys::{FileSystem, FormatOptions, FsError, GivenVolume, OpenOptions, Redundancy};
use volume_manager::model::{DeviceState, Layout, MemberState, Uuid};
use volume_manager::{Pool, Volume};

use crate::harness::failed;
use crate::pools;

pub(crate) type SimPool = Pool<SimDisk, SimClock>;
pub(crate) type SimVolume = Volume<SimDisk, SimClock>;

pub(crate) const DISKS: usize = 4;
pub(crate) const DISK: u64 = 24 << 20;
pub(crate) const META: u64 = 2 << 20;
pub(crate) const DATA: u64 = 6 << 20;
/// Room for the tail of a few dozen writes.
const TAIL: usize = 4096 + 2 * 4096;

/// The metadata volume, the data volumes, and where copies are.
pub(crate) type Given = (GivenVolume<SimVolume>, Vec<GivenVolume<SimVolume>>, Redundancy);

/// What stays over a power cut, beside the disks.
#[derive(Clone)]
pub(crate) struct Damage {
    pub(crate) policy: Rc<RefCell<AtMostDevices>>,
    /// Openings so far: each gets an identity of its own.
    openings: Rc<Cell<u128>>,
}

impl Damage {
    pub(crate) fn new() -> Self {
        Self {
            policy: Rc::new(RefCell::new(AtMostDevices::new(1))),
            openings: Rc::default(),
        }
    }

    /// Whether this may happen; if so, it is noted.
    pub(crate) fn allows(&self, disk: usize, fault: Fault) -> bool {
        let range = 0..DISK;
        self.policy.borrow_mut().allows(&Hit { disk, fault, range })
    }

    fn options(&self) -> volume_manager::OpenOptions {
        self.openings.set(self.openings.get() + 1);
        pools::options(self.openings.get())
    }

    /// The device that is damaged, or the one that is asked for.
    pub(crate) fn candidate(&self, disk: u64) -> usize {
        let damaged = self.policy.borrow().damaged().first().copied();
        damaged.unwrap_or_else(|| usize::try_from(disk).unwrap_or(0) % DISKS)
    }
}

/// A pool that is open.
pub(crate) struct Rig {
    pub(crate) pool: SimPool,
    pub(crate) damage: Damage,
}

const NAMES: [&str; 2] = ["one", "two"];

impl Rig {
    pub(crate) async fn create(sim: &Sim, damage: &Damage, layout: Layout) -> Result<Self, Failure> {
        let devices = pools::devices(sim, DISKS);
        let options = damage.options();
        let pool = Pool::create("tank", Uuid(7), devices, &options, sim.clock())
            .await
            .map_err(failed)?;
        let mirror = Layout::Mirror { legs: 2 };
        let volumes = [
            ("meta", META, mirror),
            (NAMES[0], DATA, layout),
            (NAMES[1], DATA, layout),
        ];
        for (number, (name, size, layout)) in volumes.into_iter().enumerate() {
            pool.create_volume(pools::volume(number, name, size, layout))
                .await
                .map_err(failed)?;
        }
        settle(&pool).await;
        Ok(Self {
            pool,
            damage: damage.clone(),
        })
    }

    pub(crate) async fn open_pool(sim: &Sim, damage: &Damage) -> Result<Self, Failure> {
        let devices = sim.disks().into_iter();
        let devices = devices.map(|disk| (format!("d{}", disk.index()), Rc::new(disk)));
        let pool = Pool::open(devices.collect(), &damage.options(), sim.clock())
            .await
            .map_err(failed)?;
        Ok(Self {
            pool,
            damage: damage.clone(),
        })
    }

    fn volume(&self, name: &str) -> Result<SimVolume, FsError> {
        self.pool
            .volume(name)
            .map_err(|error| FsError::Open(error.to_string()))
    }

    /// The volumes for the file system, and where copies of their data are.
    fn given(&self) -> Result<Given, FsError> {
        let redundancy = Redundancy::default();
        let one = |number: u8, name: &str| {
            Ok::<_, FsError>(GivenVolume {
                uuid: [number; 16],
                name: name.to_owned(),
                class: String::new(),
                device: Rc::new(self.volume(name)?),
            })
        };
        let meta = one(9, "meta")?;
        redundancy.set_meta(Some(Rc::new(self.volume("meta")?)));
        let mut data = Vec::new();
        for (number, name) in (1..).zip(NAMES) {
            redundancy.set_volume([number; 16], Some(Rc::new(self.volume(name)?)));
            data.push(one(number, name)?);
        }
        Ok((meta, data, redundancy))
    }

    pub(crate) async fn format(&self, sim: &Sim) -> Result<(), FsError> {
        let (meta, data, redundancy) = self.given()?;
        let format = FormatOptions {
            uuid: [9; 16],
            seed: 77,
            journal_blocks: Some(64),
            grow_to: 0,
        };
        let fs = FileSystem::format(meta, data, &format, options(redundancy), sim.clock()).await?;
        fs.close().await
    }

    /// Nothing is missing, out of date or in doubt.
    pub(crate) fn is_whole(&self) -> bool {
        let config = self.pool.configuration();
        let devices_good = config
            .devices
            .iter()
            .all(|device| device.is_holder() && self.pool.is_in_service(device.id));
        let in_sync = config
            .volumes
            .iter()
            .flat_map(|volume| &volume.sections)
            .flat_map(|section| &section.columns)
            .flat_map(|column| &column.members)
            .all(|member| member.state == MemberState::InSync);
        let idle = self.pool.jobs().iter().all(|job| !job.is_live());
        devices_good && in_sync && idle && self.pool.is_clean()
    }

    /// Brings everything back and waits until it is whole; what was damaged counts as good again then.
    pub(crate) async fn heal(&self, sim: &Sim) -> Result<(), Failure> {
        (0..DISKS).for_each(|disk| sim.with_medium(disk, Medium::repair));
        for device in self.pool.configuration().devices.clone() {
            if matches!(device.state, DeviceState::Faulty { .. }) {
                let disk = usize::try_from(device.id.0).unwrap_or(0);
                let again = self.pool.readmit(device.id, "again", Rc::new(sim.disk(disk)));
                if again.await.is_err() {
                    return Ok(());
                }
            }
        }
        drop(self.pool.heal().await);
        settle(&self.pool).await;
        // Repairs that were begun before may still find out about a fault.
        for _ in 0..20 {
            sim.clock().sleep(Duration::from_millis(5)).await;
        }
        if self.is_whole() {
            block_io::cover!("swarm: a damaged device is whole again");
            let damaged = self.damage.policy.borrow().damaged().clone();
            for disk in damaged {
                self.damage.policy.borrow_mut().healed(disk);
            }
        }
        Ok(())
    }

    /// Opens the file system.
    pub(crate) async fn open_files(&self, sim: &Sim) -> Result<FileSystem<SimVolume, SimClock>, FsError> {
        let (meta, data, redundancy) = self.given()?;
        let options = OpenOptions {
            tail: Some(sim.lasting_memory(TAIL)),
            ..options(redundancy)
        };
        FileSystem::open(meta.device, data, options, sim.clock()).await
    }

    /// A device begins to misbehave, in one of several ways, if that is covered.
    pub(crate) fn device_fails(&self, sim: &Sim, disk: usize, way: u64) {
        if !self.damage.allows(disk, Fault::Error) {
            return;
        }
        let rule = |operation, times| FaultRule {
            times: Some(times),
            ..FaultRule::once(Fault::Error, operation).after(way % 5)
        };
        match way % 6 {
            0 => sim.inject(disk, rule(Operation::Read, 1)),
            1 => sim.inject(disk, rule(Operation::Write, 1)),
            2 => sim.inject(disk, rule(Operation::Flush, 1)),
            3 => sim.inject(disk, rule(Operation::Read, 40)),
            4 => sim.inject(disk, rule(Operation::Write, 40)),
            _ => sim.detach(disk),
        }
    }
}

pub(crate) async fn settle(pool: &SimPool) {
    for job in pool.jobs() {
        // Those that a fault stops are started again by the next heal.
        drop(pool.wait(job.id).await);
    }
}

fn options(redundancy: Redundancy) -> OpenOptions {
    OpenOptions {
        resume_merges: false,
        cached_pages: 32,
        cached_files: 1,
        dirty_pages: 48,
        redundancy,
        ..OpenOptions::default()
    }
}
