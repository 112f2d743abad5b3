//! Volumes are made: placed, made zero, given their logs, and put into the configuration.
//!
//! Every change of the configuration writes all of it to all devices, so many volumes are made by one change.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block_io::{BlockDevice, Clock, ZeroMode};

use super::pool::{NewVolume, Pool, PoolError, check_name, region_for};
use super::volume::{Volume, VolumeCore};
use crate::logs::bitmap::{self, Bitmap};
use crate::logs::parity::ParityLog;
use crate::model::{self, BLOCK, Configuration, Device, DeviceId, Extent, MemberState, VolumeId};
use crate::place::{self, FreeSpace};

/// Bytes that are made zero at once, so that others get their turn.
const PIECE: u64 = 1 << 30;

/// A volume that is not in the configuration yet.
struct Made<D> {
    volume: model::Volume,
    logs: BTreeMap<u32, Rc<ParityLog<D>>>,
    bitmap: Option<Rc<Bitmap<D>>>,
}

fn regions(volume: &model::Volume) -> u32 {
    u32::try_from(volume.size.div_ceil(volume.region)).unwrap_or(u32::MAX)
}

fn bitmap_length(volume_size: u64, region: u64) -> u64 {
    let regions = u32::try_from(volume_size.div_ceil(region)).unwrap_or(u32::MAX);
    bitmap::length(regions).next_multiple_of(BLOCK)
}

/// Whether the volumes can be made as far as their names and block sizes go.
fn check_new(config: &Configuration, new: &[NewVolume]) -> Result<(), PoolError> {
    let mut names: BTreeSet<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
    for new in new {
        check_name("volume", &new.name)?;
        if !matches!(new.block, 512 | 4096) {
            return Err(PoolError::State(format!(
                "a logical block of {} bytes: only 512 and 4096 are possible",
                new.block
            )));
        }
        if !names.insert(&new.name) {
            return Err(PoolError::Name(format!("a volume {} exists already", new.name)));
        }
    }
    if names.len() > model::MAX_VOLUMES {
        return Err(PoolError::State(format!(
            "the pool would have {} volumes, {} are the most",
            names.len(),
            model::MAX_VOLUMES
        )));
    }
    Ok(())
}

/// Finds a place for a volume, and takes it from `space`.
fn plan(config: &Configuration, space: &mut FreeSpace, new: &NewVolume) -> Result<model::Volume, PoolError> {
    let size = new.size.next_multiple_of(BLOCK);
    let region = if new.region == 0 {
        region_for(size)
    } else {
        new.region
    };
    let mut attributes = new.attributes.clone();
    let mut request = place::SectionRequest {
        length: size,
        attributes: &new.attributes,
        block: new.block,
        excluded: &[],
        use_spares: false,
        bitmap: bitmap_length(size, region),
        state: MemberState::InSync,
        number: 0,
        first_member: 0,
    };
    attributes.layout = place::resolve_layout(config, &request);
    request.attributes = &attributes;
    let placed = place::place_volume_in(config, space, &request)?;
    Ok(model::Volume {
        id: VolumeId(0),
        uuid: new.uuid,
        name: new.name.clone(),
        size,
        block: new.block,
        attributes: attributes.clone(),
        region,
        log_devices: placed.log_devices,
        bitmap: placed.bitmap,
        bitmap_generation: 0,
        sections: placed.sections,
        next_member: placed.next_member,
        next_section: placed.next_section,
        read_policy: new.read_policy,
    })
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Makes a volume, which reads as zeroes.
    ///
    /// # Errors
    /// The name is in use, or there is no place: the error says what is missing.
    pub async fn create_volume(&self, new: NewVolume) -> Result<Volume<D, C>, PoolError> {
        let name = new.name.clone();
        let made = self.create_volumes(vec![new]).await?.pop();
        made.ok_or_else(|| PoolError::Unknown(format!("volume {name}")))
    }

    /// Makes several volumes by one change of the configuration: all of them, or none.
    ///
    /// # Errors
    /// As [`Self::create_volume`].
    pub async fn create_volumes(&self, new: Vec<NewVolume>) -> Result<Vec<Volume<D, C>>, PoolError> {
        check_new(&self.0.config(), &new)?;
        let config = self.0.placing();
        let mut space = FreeSpace::of(&config);
        let planned = new.iter().map(|new| plan(&config, &mut space, new));
        let planned: Vec<model::Volume> = planned.collect::<Result<_, _>>()?;
        drop((config, space));
        let extents = planned.iter().flat_map(model::Volume::extents);
        let _kept = self.0.reserve(extents.copied().collect());
        // Old content must not show through, and copies and parity must agree from the beginning.
        self.zero(&planned).await?;
        let mut made = Vec::with_capacity(planned.len());
        for volume in planned {
            made.push(self.with_logs(volume).await?);
        }
        let (ids, _) = self.0.change(|config| self.add_to(config, &new, &made)).await?;
        // What failed during the change is no longer in the configuration's volumes.
        let config = self.0.config();
        let mut volumes = Vec::with_capacity(made.len());
        for (id, made) in ids.into_iter().zip(made) {
            let current = config.volume(id).unwrap_or(&made.volume);
            let runtime = VolumeCore::new(self.0.map_of(current));
            *runtime.logs.borrow_mut() = made.logs;
            *runtime.bitmap.borrow_mut() = made.bitmap;
            volumes.push(self.0.add_volume(runtime));
        }
        self.0.fail(&[]).await?;
        Ok(volumes.into_iter().map(|volume| self.volume_of(volume)).collect())
    }

    async fn zero(&self, volumes: &[model::Volume]) -> Result<(), PoolError> {
        let columns = volumes
            .iter()
            .flat_map(|volume| &volume.sections)
            .flat_map(|section| &section.columns);
        let members = columns.flat_map(|column| &column.members);
        let extents: Vec<Extent> = members.flat_map(|member| &member.extents).copied().collect();
        let mut devices = BTreeSet::new();
        for extent in extents {
            let disk = self.0.disk(extent.device);
            devices.insert(extent.device);
            let mut at = extent.start;
            let end = extent.start + extent.length;
            while at < end {
                let length = PIECE.min(end - at);
                disk.zero(&self.0.clock, at, length, ZeroMode::MayUnmap).await?;
                at += length;
            }
        }
        for device in devices {
            self.0.disk(device).flush(&self.0.clock).await?;
        }
        Ok(())
    }

    async fn with_logs(&self, volume: model::Volume) -> Result<Made<D>, PoolError> {
        let mut logs = BTreeMap::new();
        for section in &volume.sections {
            if section.parity > 0 {
                logs.insert(section.id, self.0.new_parity_log(volume.uuid, section).await?);
            }
        }
        let length = bitmap_length(volume.size, volume.region);
        let bitmap = match volume.bitmap.as_slice() {
            [] => None,
            copies => {
                let made = Bitmap::format(self.0.copies(copies), length, regions(&volume)).await?;
                Some(Rc::new(made))
            }
        };
        Ok(Made { volume, logs, bitmap })
    }

    /// Puts volumes that are made into a configuration; gives their numbers.
    fn add_to(
        &self,
        config: &mut Configuration,
        new: &[NewVolume],
        made: &[Made<D>],
    ) -> Result<Vec<VolumeId>, PoolError> {
        check_new(config, new)?;
        let holders: BTreeSet<DeviceId> = config
            .devices
            .iter()
            .filter(|device| Device::is_holder(device))
            .map(|device| device.id)
            .collect();
        let mut extents = made.iter().flat_map(|made| made.volume.extents());
        if extents.any(|extent| !holders.contains(&extent.device)) {
            return Err(PoolError::State(
                "a device failed while the volume was being made: try again".into(),
            ));
        }
        let mut ids = Vec::with_capacity(made.len());
        for made in made {
            let id = VolumeId(config.next_volume);
            config.next_volume += 1;
            // Before it is in the configuration, so that the logs know it when it can be written.
            if !made.volume.log_devices.is_empty() {
                drop(self.0.hot.add_volume(id, &made.volume.log_devices));
            }
            let volume = model::Volume {
                id,
                ..made.volume.clone()
            };
            config.volumes.push(volume);
            ids.push(id);
        }
        Ok(ids)
    }
}
