//! Snapshots for who reads them from the devices by itself: where they are, and the promise that they stay.

use api::virtual_disk::{DeviceExtent, DiskAnswer, DiskPin, DiskPlaces, MAX_PIN, MAX_PLACES, PlacedOn};
use api::{Problem, ProblemKind};
use filesys::{FsError, Stat};

use crate::disks::{failed, snapshot_of};
use crate::problem::of_files;
use crate::storage::{Storage, now};

/// The file that is a snapshot, and its state.
pub(crate) async fn frozen(storage: &Storage, path: &str) -> Result<(String, Stat), Problem> {
    let (disk, snapshot) = snapshot_of(path)?;
    let found = Box::pin(storage.disks()?.frozen_file(&disk, &snapshot)).await;
    found.map_err(failed)
}

/// Where a range of a snapshot is.
pub(crate) async fn places(
    storage: &Storage,
    path: &str,
    offset: u64,
    length: u64,
    unless: Option<String>,
) -> Result<DiskPlaces, Problem> {
    if length > MAX_PLACES || offset.checked_add(length).is_none() {
        let detail = format!("a range of {length} bytes at {offset} is too long");
        return Err(Problem::new(ProblemKind::TooLarge, detail)
            .about(path)
            .remedy(format!("ask for at most {MAX_PLACES} bytes at a time")));
    }
    let (file, stat) = frozen(storage, path).await?;
    let config = storage.pool.configuration();
    let mut places = DiskPlaces {
        identity: format!("{:x}-{:x}", stat.id.0, stat.created),
        size: stat.size,
        configuration: None,
        same: false,
        unreadable: None,
        pool: config.pool.to_string(),
        devices: Vec::new(),
        extents: Vec::new(),
    };
    let report = match storage.files()?.extents(&file, offset, length).await {
        Ok(report) => report,
        Err(FsError::State { object, problem }) => {
            places.unreadable = Some(format!("{object} {problem}"));
            return Ok(places);
        }
        Err(error) => return Err(of_files(&error)),
    };
    let configuration = format!("{:016x}", report.configuration);
    places.same = unless.is_some_and(|known| known == configuration);
    places.configuration = Some(configuration);
    if places.same {
        return Ok(places);
    }
    places.extents = report
        .extents
        .into_iter()
        .map(|extent| DeviceExtent {
            offset: extent.offset,
            length: extent.length,
            device: extent.device,
            start: extent.start,
        })
        .collect();
    let named = |number: u64| places.extents.iter().any(|extent| extent.device == number);
    let devices = config.devices.iter().map(|device| PlacedOn {
        device: device.id.0.into(),
        uuid: device.uuid.to_string(),
    });
    places.devices = devices.filter(|on| named(on.device)).collect();
    Ok(places)
}

/// Keeps a snapshot where it is.
pub(crate) async fn pin(
    storage: &Storage,
    path: &str,
    seconds: u64,
    replaces: Option<u64>,
) -> Result<DiskPin, Problem> {
    if seconds == 0 || seconds > MAX_PIN {
        let detail = format!("a pin cannot last {seconds} seconds");
        return Err(Problem::new(ProblemKind::Invalid, detail)
            .about(path)
            .remedy(format!("ask for 1 to {MAX_PIN}")));
    }
    let failed = |error| of_files(&error);
    let files = storage.files()?;
    let (file, _) = frozen(storage, path).await?;
    let pin = files
        .pin(&file, now().saturating_add(seconds))
        .await
        .map_err(failed)?;
    // The old one may be over.
    if let Some(old) = replaces.filter(|old| files.pins().iter().any(|pin| pin.id == *old)) {
        files.unpin(old).await.map_err(failed)?;
    }
    Ok(DiskPin {
        pin: pin.id,
        until: pin.until,
    })
}

/// Ends a pin; one that is over already is none.
pub(crate) async fn unpin(storage: &Storage, pin: u64) -> Result<DiskAnswer, Problem> {
    let files = storage.files()?;
    if files.pins().iter().any(|known| known.id == pin) {
        files.unpin(pin).await.map_err(|error| of_files(&error))?;
    }
    Ok(DiskAnswer::Done)
}

/// Ends the pins whose time is over. How many these were, and how many others there are.
pub(crate) async fn expire(storage: &Storage) -> Result<(usize, usize), Problem> {
    let files = storage.files()?;
    let ended = files.expire_pins(now()).await;
    let ended = ended.map_err(|error| of_files(&error))?;
    Ok((ended.len(), files.pins().len()))
}
