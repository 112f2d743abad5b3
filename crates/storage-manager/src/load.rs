//! The load of an open pool as people and programs see it.

use api::storage::{DeviceLoad, HotSpots, LegLoad, PoolLoad, RequestLoad, VolumeLoad};
use volume_manager::model::Configuration;
use volume_manager::{Count, Sample};

/// What devices and volumes did between two moments.
pub(crate) fn pool_load(config: &Configuration, first: &Sample, last: &Sample) -> PoolLoad {
    let spots = hot_spots(config, &last.since(first));
    let volumes = last.volumes_since(first);
    let volumes = config.volumes.iter().filter_map(|volume| {
        let (_, load) = volumes.iter().find(|(id, _)| *id == volume.id)?;
        Some(VolumeLoad {
            volume: volume.name.clone(),
            reads: requests(&load.reads),
            writes: requests(&load.writes),
        })
    });
    PoolLoad {
        pool: config.name.clone(),
        window_ms: spots.window_ms,
        devices: spots.devices,
        volumes: volumes.collect(),
    }
}

/// Names for what the volume manager knows by numbers.
pub fn hot_spots(config: &Configuration, spots: &volume_manager::HotSpots) -> HotSpots {
    let devices = spots.devices.iter().map(|load| DeviceLoad {
        device: config
            .device(load.device)
            .map_or_else(|| load.device.to_string(), |device| device.name.clone()),
        busy: load.busy,
        depth: load.depth,
        reads: requests(&load.statistics.reads),
        writes: requests(&load.statistics.writes),
        legs: load.legs.iter().map(|leg| view_leg(config, leg)).collect(),
    });
    HotSpots {
        window_ms: u64::try_from(spots.window.as_millis()).unwrap_or(u64::MAX),
        devices: devices.collect(),
    }
}

fn view_leg(config: &Configuration, leg: &volume_manager::LegLoad) -> LegLoad {
    LegLoad {
        volume: config.volume(leg.volume).map_or_else(
            || format!("number {}", leg.volume.0),
            |volume| volume.name.clone(),
        ),
        section: leg.section,
        column: leg.column,
        share: leg.share,
        reads: requests(&leg.statistics.reads),
        writes: requests(&leg.statistics.writes),
    }
}

fn requests(count: &Count) -> RequestLoad {
    let percentile =
        |percent| u64::try_from(count.latency.percentile(percent).as_micros()).unwrap_or(u64::MAX);
    RequestLoad {
        requests: count.requests,
        bytes: count.bytes,
        errors: count.errors,
        p50_us: percentile(50),
        p99_us: percentile(99),
    }
}
