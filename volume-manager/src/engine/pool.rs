//! Pools: made, opened, closed; volumes come and go.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_io::{BlockDevice, Clock, IoError};

use super::core::{Core, Refused};
use super::counters::Statistics;
use super::disk::Disk;
use super::event::Event;
use super::volume::{Volume, VolumeCore};
use crate::logs::LogError;
use crate::logs::hot::{HotRegions, Limits};
use crate::logs::parity::{Identity, ParityLog, Shape};
use crate::model::{
    self, Attributes, BLOCK, Configuration, Device, DeviceId, DeviceState, Incarnation, JobKind, JobState,
    MAX_COLUMNS, Uuid,
};
use crate::place::PlaceError;
use crate::store::{self, OpenError, Store};

/// Why something could not be done with a pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The devices do not make an open pool.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A device cannot become one of a pool.
    #[error(transparent)]
    Format(#[from] store::FormatError),
    /// The first configuration could not be made durable.
    #[error(transparent)]
    Commit(#[from] store::CommitError),
    /// There is no place for it.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A name is in use, or cannot be one.
    #[error("{0}")]
    Name(String),
    /// There is no such thing.
    #[error("there is no {0} in this pool")]
    Unknown(String),
    /// It cannot be done in the present state; the text says what to do.
    #[error("{0}")]
    State(String),
    /// The pool takes no changes any more.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A device failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The logs of the pool failed.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// A device that is to be part of a pool.
#[derive(Debug)]
pub struct NewDevice<D> {
    /// For people: its path or address.
    pub name: String,
    /// Itself.
    pub device: Rc<D>,
    /// Identity, drawn at random.
    pub uuid: Uuid,
    /// Storage class; empty for none.
    pub class: String,
    /// Enclosure; empty for unknown.
    pub enclosure: String,
    /// Whether it is kept for devices that fail.
    pub spare: bool,
}

/// How to open a pool.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Identity of the incarnation that begins, drawn at random.
    pub incarnation: Uuid,
    /// Which pool, if the devices are of several.
    pub pool: Option<Uuid>,
    /// What to do without a majority, or with two histories.
    pub force: store::Force,
    /// Sizes of the activity logs' contents; tests make them small.
    pub limits: Limits,
    /// Jobs that go on or begin at the open do nothing before [`Pool::let_jobs_begin`]: for who first wants to say what is in use
    /// ([`Volume::set_usage`]), as they copy everything until then.
    pub jobs_wait: bool,
}

/// A volume that is to be made.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// Its identity, drawn at random.
    pub uuid: Uuid,
    /// Its size in bytes; rounded up to whole blocks.
    pub size: u64,
    /// How it is laid out. Columns may be 0: as many as is good.
    pub attributes: Attributes,
    /// Logical block size: 512 or 4096.
    pub block: u32,
    /// Bytes per region of the dirty-region log: a power of two; 0 chooses by size.
    pub region: u64,
    /// Which legs answer reads.
    pub read_policy: model::ReadPolicy,
}

/// An open pool. Copies are the same pool.
pub struct Pool<D, C>(pub(crate) Rc<Core<D, C>>);

impl<D, C> Clone for Pool<D, C> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Makes a pool on devices, whose content is lost.
    ///
    /// # Errors
    /// A device is too small, is given twice, or fails.
    pub async fn create(
        name: &str,
        uuid: Uuid,
        devices: Vec<NewDevice<D>>,
        options: &OpenOptions,
        clock: C,
    ) -> Result<Self, PoolError> {
        check_name("pool", name)?;
        let mut config = Configuration {
            pool: uuid,
            name: name.into(),
            epoch: 1,
            incarnations: vec![Incarnation {
                id: options.incarnation,
                first_epoch: 1,
                forced: false,
            }],
            devices: Vec::new(),
            volumes: Vec::new(),
            jobs: Vec::new(),
            next_device: 0,
            next_volume: 1,
            next_job: 1,
        };
        let mut disks = BTreeMap::new();
        let mut store = Store::new();
        for new in devices {
            if config.devices.iter().any(|device| device.uuid == new.uuid) {
                return Err(PoolError::State(format!("device {} is given twice", new.name)));
            }
            let device = describe(&mut config, &new)?;
            let label = store::format_device(&*new.device, new.uuid, uuid, name).await?;
            store.add_device(device.id, Rc::clone(&new.device), label);
            disks.insert(
                device.id,
                Rc::new(Disk::new(device.id, &new.name, Some(new.device))),
            );
            config.devices.push(device);
        }
        let committed = store.commit(&config).await?;
        if let Some((_, error)) = committed.failed.into_iter().next() {
            return Err(error.into());
        }
        let hot = HotRegions::new(options.limits);
        let core = Core::new(clock, config, disks, hot, store);
        for disk in core.disks() {
            core.format_activity_log(&disk).await?;
        }
        let pool = Self(core);
        pool.guard();
        Ok(pool)
    }

    pub(crate) fn volume_of(&self, volume: Rc<VolumeCore<D>>) -> Volume<D, C> {
        Volume {
            core: Rc::clone(&self.0),
            volume,
        }
    }

    /// The configuration at this moment.
    pub fn configuration(&self) -> Rc<Configuration> {
        self.0.config()
    }

    /// What happened since this was asked last.
    pub fn take_events(&self) -> Vec<Event> {
        self.0.take_events()
    }

    /// `ring` is called whenever there is an event to be taken; it must not use the pool at once.
    pub fn on_event(&self, ring: impl Fn() + 'static) {
        self.0.set_bell(Box::new(ring));
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn volume(&self, name: &str) -> Result<Volume<D, C>, PoolError> {
        let unknown = || PoolError::Unknown(format!("volume {name}"));
        let config = self.0.config();
        let found = config
            .volumes
            .iter()
            .find(|volume| volume.name == name)
            .ok_or_else(unknown)?;
        self.0
            .volume(found.id)
            .map(|volume| self.volume_of(volume))
            .ok_or_else(unknown)
    }

    /// What each device has done since the pool was opened.
    pub fn device_statistics(&self) -> Vec<(DeviceId, Statistics)> {
        self.0
            .disks()
            .iter()
            .map(|disk| (disk.id, disk.counters.get()))
            .collect()
    }

    /// Has jobs begin that wait since the open: see [`OpenOptions::jobs_wait`]. To be called again does nothing.
    pub fn let_jobs_begin(&self) {
        self.0.jobs_wait.set(false);
    }

    /// Whether no region is in doubt since a crash.
    pub fn is_clean(&self) -> bool {
        self.0
            .volumes()
            .iter()
            .all(|volume| volume.unclean.borrow().is_empty())
    }

    /// Whether a device is in service.
    pub fn is_in_service(&self, device: DeviceId) -> bool {
        self.0.disk(device).is_alive()
    }

    /// Deletes a volume and its data. Nobody may be using it.
    ///
    /// # Errors
    /// There is no such volume, or it is being changed by a job.
    pub async fn delete_volume(&self, name: &str) -> Result<(), PoolError> {
        let volume = self.volume(name)?;
        let id = volume.volume.id;
        drop(volume);
        let (_, old) = self
            .0
            .change(|config| {
                let jobs = config.jobs.iter().find(|job| job.is_live() && job.kind.concerns(id));
                if let Some(job) = jobs {
                    return Err(PoolError::State(format!("job {} works on volume {name}: cancel it first", job.id.0)));
                }
                config.volumes.retain(|volume| volume.id != id);
                for job in config.jobs.iter_mut().filter(|job| job.is_live()) {
                    if matches!(job.kind, JobKind::Resync { volume } | JobKind::Scrub { volume: Some(volume) } if volume == id) {
                        job.state = JobState::Done;
                    }
                }
                Ok(())
            })
            .await?;
        let _freed = self
            .0
            .reserve(old.iter().flat_map(|map| map.volume.extents().copied()).collect());
        for map in old {
            self.0.drained(map).await;
        }
        self.0.hot.remove_volume(id);
        Ok(())
    }
}

/// The shape of a section's parity log.
pub(super) fn log_shape(volume: Uuid, section: &model::Section) -> Shape {
    Shape {
        identity: Identity {
            volume,
            section: section.id.into(),
        },
        length: section.log.iter().map(|copy| copy.length).min().unwrap_or(0),
        row: section.columns.len() * usize::try_from(section.unit).unwrap_or(usize::MAX / MAX_COLUMNS),
    }
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Core<D, C> {
    /// An empty parity log for a section.
    pub(crate) async fn new_parity_log(
        &self,
        volume: Uuid,
        section: &model::Section,
    ) -> Result<Rc<ParityLog<D>>, LogError> {
        ParityLog::format(log_shape(volume, section), self.copies(&section.log))
            .await
            .map(Rc::new)
    }
}

/// Bytes per region: the log covers about a thousand of them.
pub(super) fn region_for(size: u64) -> u64 {
    /// So many regions would make a volume's bitmap 128 KiB.
    const MOST: u64 = 1 << 20;
    (size / MOST).next_power_of_two().max(1 << 20)
}

pub(super) fn check_name(what: &str, name: &str) -> Result<(), PoolError> {
    let good = !name.is_empty()
        && name.len() <= model::MAX_NAME
        && !name.contains(|letter: char| letter.is_control() || letter == '/')
        && name.trim() == name;
    if good {
        return Ok(());
    }
    Err(PoolError::Name(format!(
        "{name:?} cannot be the name of a {what}: 1 to {} bytes, no slashes, no control characters, no space at the ends",
        model::MAX_NAME
    )))
}

pub(crate) fn describe<D: BlockDevice>(
    config: &mut Configuration,
    new: &NewDevice<D>,
) -> Result<Device, PoolError> {
    let geometry = new.device.geometry();
    let size = geometry.size / BLOCK * BLOCK;
    let data_start = crate::format::private_size(size).ok_or_else(|| {
        PoolError::State(format!(
            "device {} is too small: {size} bytes, at least {} are needed",
            new.name,
            crate::format::MIN_DEVICE
        ))
    })?;
    if geometry.read_only {
        return Err(PoolError::State(format!("device {} is read-only", new.name)));
    }
    let id = DeviceId(config.next_device);
    config.next_device += 1;
    Ok(Device {
        id,
        uuid: new.uuid,
        name: new.name.clone(),
        size,
        data_start,
        block: geometry.logical_block,
        state: if new.spare {
            DeviceState::Spare
        } else {
            DeviceState::Active
        },
        class: new.class.clone(),
        enclosure: new.enclosure.clone(),
    })
}
