//! The logs of the volumes: what must be known after a crash so that redundancy is whole again.
//!
//! ```text
//!   HotRegions (one per pool)       a region is in the logs before it is written: after a crash, only hot regions are resynced
//!     ActivityLog (one per device)  ring of 8 self-contained transactions in the private region
//!   Bitmap (one per volume)         regions changed since a member was detached: when it returns, only these are copied
//!   ParityLog (one per section)     data and parity of partial-stripe writes before they go in place: no write hole
//! ```
//!
//! All of it is single-threaded, has no clock and no tasks of its own: what must be done is done by the futures of those who
//! wait for it, and every future may be dropped at any time.

pub mod activity;
pub mod bitmap;
mod gate;
pub mod hot;
pub mod parity;

use std::rc::Rc;
use std::sync::Arc;

use block_io::IoError;

use crate::model::{DeviceId, Uuid, VolumeId};

/// Where a copy of a log or bitmap is.
#[derive(Debug)]
pub struct LogCopy<D> {
    /// Number of the device.
    pub id: DeviceId,
    /// The device.
    pub device: Rc<D>,
    /// First byte.
    pub start: u64,
}

impl<D> Clone for LogCopy<D> {
    fn clone(&self) -> Self {
        Self {
            id: self.id,
            device: Rc::clone(&self.device),
            start: self.start,
        }
    }
}

impl<D> LogCopy<D> {
    pub(crate) fn failure(&self, source: IoError) -> LogError {
        LogError::Device {
            device: self.id,
            source: Arc::new(source),
        }
    }
}

/// Why a log cannot promise what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// Nothing is acknowledged until the owner has marked the device faulty and taken it out of the logs.
    #[error("a log on device {device} failed: mark the device faulty and take it out of the logs")]
    Device {
        /// Which.
        device: DeviceId,
        /// Why.
        #[source]
        source: Arc<IoError>,
    },
    /// What it says is not known, so all that it could cover must count as dirty.
    #[error("device {device} has no valid activity log: resync the volumes that it covers as a whole")]
    NoTransaction {
        /// Which.
        device: DeviceId,
    },
    /// The volume was never added, or all its log devices are gone.
    #[error("no device holds a log for volume {}: name another log device", .volume.0)]
    NoLog {
        /// Which.
        volume: VolumeId,
    },
    /// More regions at once than a log takes.
    #[error("a request touches {regions} regions of volume {}: split it", .volume.0)]
    TooWide {
        /// Which.
        volume: VolumeId,
        /// How many.
        regions: u64,
    },
    /// Cannot happen but by damage to the logs of several devices.
    #[error("the logs of volume {} contradict each other: resync it as a whole", .volume.0)]
    Overfull {
        /// Which.
        volume: VolumeId,
    },
    /// The owner could not make a volume's writes durable, so its regions stay hot, and there is no place for others.
    #[error("regions of volume {} cannot leave the activity log", .volume.0)]
    Release {
        /// Which.
        volume: VolumeId,
        /// Why.
        #[source]
        source: Arc<IoError>,
    },
    /// Partial-stripe writes are impossible: their record would be nowhere.
    #[error("no copy of the parity log of section {section} of volume {volume} is left")]
    NoCopy {
        /// Which.
        volume: Uuid,
        /// Which of its sections.
        section: u64,
    },
    /// Whether rows were half written is not known.
    #[error(
        "no copy of the parity log of section {section} of volume {volume} holds a valid record: parity may be wrong anywhere, \
         compute all of it again"
    )]
    NoRecord {
        /// Which.
        volume: Uuid,
        /// Which of its sections.
        section: u64,
    },
    /// Its sectors do not fit.
    #[error("a bitmap of {length} bytes is too small for the volume's regions: {needed} are needed")]
    BitmapTooSmall {
        /// As it is.
        length: u64,
        /// At least.
        needed: u64,
    },
    /// What changes while members are detached would not be known.
    #[error("no copy of the volume's bitmap is left: name another log device")]
    NoBitmap,
    /// The bitmap was made for a smaller volume.
    #[error("region {region} is not one of the {regions} of the bitmap")]
    NoRegion {
        /// Which.
        region: u32,
        /// How many there are.
        regions: u32,
    },
    /// It must hold a whole row four times.
    #[error("a parity log of {length} bytes is too small: {needed} are needed for rows of this size")]
    RingTooSmall {
        /// As it is.
        length: u64,
        /// At least; 0 if rows are too large for any log.
        needed: u64,
    },
    /// More than a record takes.
    #[error("{pieces} pieces of {bytes} bytes are more than a record of a parity log holds")]
    RecordTooLarge {
        /// How many.
        pieces: usize,
        /// Together.
        bytes: usize,
    },
    /// A write to the section was given up half-way, so its record must stay until the log is opened again and it is replayed.
    #[error("a parity log is full behind a write that was given up: open the pool again")]
    Abandoned,
    /// The owner could not make the section's writes durable.
    #[error("the devices of a section with parity cannot be flushed")]
    Flush {
        /// Why.
        #[source]
        source: Arc<IoError>,
    },
}
