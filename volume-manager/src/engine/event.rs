//! What a pool tells: every change of state that a person would want to know.

use std::fmt;

/// Something has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A device is out of service.
    DeviceFailed {
        /// Its name.
        device: String,
        /// Why.
        reason: String,
    },
    /// A device is in service again, or new.
    DeviceAdded {
        /// Its name.
        device: String,
    },
    /// A device has left the pool.
    DeviceRemoved {
        /// Its name.
        device: String,
    },
    /// A volume has all its copies and parity again.
    VolumeHealthy {
        /// Its name.
        volume: String,
    },
    /// A volume misses copies or parity.
    VolumeDegraded {
        /// Its name.
        volume: String,
    },
    /// A job has ended.
    JobEnded {
        /// Its number.
        job: u32,
        /// Why it did not reach its end, if so.
        failed: Option<String>,
    },
    /// A scrub found copies or parity that differ, and made them equal.
    Repaired {
        /// Name of the volume.
        volume: String,
        /// First byte of the volume.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeviceFailed { device, reason } => {
                write!(formatter, "device {device} is out of service: {reason}")
            }
            Self::DeviceAdded { device } => write!(formatter, "device {device} is in service"),
            Self::DeviceRemoved { device } => write!(formatter, "device {device} has left the pool"),
            Self::VolumeHealthy { volume } => write!(formatter, "volume {volume} is whole again"),
            Self::VolumeDegraded { volume } => write!(formatter, "volume {volume} is degraded"),
            Self::JobEnded { job, failed: None } => write!(formatter, "job {job} is done"),
            Self::JobEnded {
                job,
                failed: Some(reason),
            } => write!(formatter, "job {job} failed: {reason}"),
            Self::Repaired {
                volume,
                offset,
                length,
            } => {
                write!(
                    formatter,
                    "volume {volume}: {length} bytes at {offset} differed between copies and were repaired"
                )
            }
        }
    }
}

impl Event {
    pub(crate) fn log(&self) {
        match self {
            Self::DeviceFailed { .. } | Self::VolumeDegraded { .. } | Self::Repaired { .. } => {
                tracing::warn!("{self}")
            }
            Self::JobEnded { failed: Some(_), .. } => tracing::warn!("{self}"),
            _ => tracing::info!("{self}"),
        }
    }
}
