//! Why a placement cannot be had, in words that a person can act upon.

use std::fmt;

use thiserror::Error;

use crate::model::{DeviceId, VolumeId};

/// Why there is no placement.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// The request makes no sense, whatever is free.
    #[error("{0}")]
    Invalid(String),
    /// A device that the request names does not belong to the pool.
    #[error("the pool has no device {0}")]
    NoSuchDevice(DeviceId),
    /// The volume, its section, column or member does not exist.
    #[error("volume {} has no {what}", volume.0)]
    NoSuchPlace {
        /// The volume.
        volume: VolumeId,
        /// What it has not.
        what: String,
    },
    /// Too few devices can take a part.
    #[error(transparent)]
    Shortage(#[from] Box<Shortage>),
}

/// What would be needed, what there is, and why the other devices are of no use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct Shortage {
    /// What is to be placed, say `raid6 4+2`.
    pub what: String,
    /// So many devices are needed.
    pub devices: usize,
    /// Bytes that each must have free.
    pub each: u64,
    /// So many of them must have more: for logs and bitmaps.
    pub larger: usize,
    /// Bytes that those must have free.
    pub larger_each: u64,
    /// Storage class that was asked for; empty for any.
    pub class: String,
    /// Devices that could take a part, and their free bytes.
    pub fit: Vec<(DeviceId, u64)>,
    /// Devices that cannot, and why.
    pub unfit: Vec<(DeviceId, Unfit)>,
    /// Bytes of the largest volume that there would be room for, on more devices, if that was looked for.
    pub largest: Option<u64>,
}

/// Why a device cannot take a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// Too little is free.
    Full {
        /// Free bytes.
        free: u64,
    },
    /// Enough is free, but in too many pieces.
    Fragmented {
        /// Free bytes.
        free: u64,
        /// Bytes of the longest free run.
        longest: u64,
    },
    /// It waits for others to fail.
    Spare,
    /// It is being emptied.
    Evacuating,
    /// It failed or is missing.
    Faulty,
    /// Its logical blocks are larger than the volume's.
    Block {
        /// The device's, in bytes.
        device: u32,
        /// The volume's, in bytes.
        volume: u32,
    },
    /// It is of another storage class.
    Class,
    /// The volume is restricted to other devices.
    NotNamed,
    /// It holds another part of the same data, or the caller ruled it out.
    Excluded,
}

/// Devices listed one by one in a message; the rest is counted.
const LISTED: usize = 16;

/// A size for people.
pub(super) struct Size(pub(super) u64);

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let Some((shift, unit)) = units.into_iter().find(|(shift, _)| self.0 >> shift > 0) else {
            return write!(formatter, "{} bytes", self.0);
        };
        let tenths = (u128::from(self.0) * 10) >> shift;
        match tenths % 10 {
            0 => write!(formatter, "{} {unit}", tenths / 10),
            rest => write!(formatter, "{}.{rest} {unit}", tenths / 10),
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.devices == 1 { "" } else { "s" };
        write!(formatter, "{} needs {} device{plural}", self.what, self.devices)?;
        if !self.class.is_empty() {
            write!(formatter, " of class {}", self.class)?;
        }
        write!(formatter, " with {} free each", Size(self.each))?;
        if self.larger > 0 && self.larger_each > self.each {
            let more = Size(self.larger_each - self.each);
            match self.larger == self.devices {
                true => write!(formatter, " and {more} for logs")?,
                false => write!(formatter, ", {} of them {more} more for logs", self.larger)?,
            }
        }
        match self.fit.len() {
            0 => write!(formatter, "; none has that")?,
            1 => write!(formatter, "; 1 has that: ")?,
            many => write!(formatter, "; {many} have that: ")?,
        }
        for (index, (device, free)) in self.fit.iter().take(LISTED).enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(formatter, "{comma}{device} {}", Size(*free))?;
        }
        if self.fit.len() > LISTED {
            write!(formatter, " and {} more", self.fit.len() - LISTED)?;
        }
        self.write_unfit(formatter)?;
        match self.largest {
            None => Ok(()),
            Some(0) => write!(formatter, "; no smaller one would fit"),
            Some(largest) => write!(
                formatter,
                "; spread over more devices, {} would fit",
                Size(largest)
            ),
        }
    }
}

impl Shortage {
    /// One by one those that might be helped; in sum those that were never meant.
    fn write_unfit(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |reason: Unfit| self.unfit.iter().filter(|(_, unfit)| *unfit == reason).count();
        let (class, not_named) = (count(Unfit::Class), count(Unfit::NotNamed));
        let mut separator = "; ";
        let single = |unfit: &&(DeviceId, Unfit)| !matches!(unfit.1, Unfit::Class | Unfit::NotNamed);
        for (device, unfit) in self.unfit.iter().filter(single).take(LISTED) {
            write!(formatter, "{separator}{device} {unfit}")?;
            separator = ", ";
        }
        let more = (self.unfit.len() - class - not_named).saturating_sub(LISTED);
        let sums = [
            (more, "more cannot take a part"),
            (class, "of another class"),
            (not_named, "not among the devices that the volume names"),
        ];
        for (count, what) in sums.into_iter().filter(|(count, _)| *count > 0) {
            write!(formatter, "{separator}{count} {what}")?;
            separator = ", ";
        }
        Ok(())
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { free } => write!(formatter, "has {}", Size(*free)),
            Self::Fragmented { free, longest } => {
                let (free, longest) = (Size(*free), Size(*longest));
                write!(
                    formatter,
                    "has {free} but in too many pieces, the longest {longest}"
                )
            }
            Self::Spare => write!(formatter, "is a spare"),
            Self::Evacuating => write!(formatter, "is being evacuated"),
            Self::Faulty => write!(formatter, "is faulty"),
            Self::Block { device, volume } => {
                write!(formatter, "has {device}-byte blocks, the volume has {volume}")
            }
            Self::Class => write!(formatter, "is of another class"),
            Self::NotNamed => write!(formatter, "is not among the devices that the volume names"),
            Self::Excluded => write!(formatter, "is ruled out or holds another part of the same data"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_what_is_missing_and_why() {
        let gib = 1 << 30;
        let shortage = Shortage {
            what: "raid6 4+2".into(),
            devices: 6,
            each: 10 * gib,
            larger: 3,
            larger_each: 10 * gib + (4 << 20),
            class: "ssd".into(),
            fit: vec![(DeviceId(0), 12 * gib), (DeviceId(3), 21 * gib / 2)],
            unfit: vec![
                (DeviceId(1), Unfit::Full { free: 3 * gib }),
                (DeviceId(2), Unfit::Spare),
                (DeviceId(4), Unfit::Class),
                (DeviceId(5), Unfit::Faulty),
                (DeviceId(6), Unfit::Class),
                (
                    DeviceId(7),
                    Unfit::Block {
                        device: 4096,
                        volume: 512,
                    },
                ),
            ],
            largest: Some(31 * gib),
        };
        let expected = "raid6 4+2 needs 6 devices of class ssd with 10 GiB free each, 3 of them 4 MiB more for logs; \
                        2 have that: d0 12 GiB, d3 10.5 GiB; d1 has 3 GiB, d2 is a spare, d5 is faulty, \
                        d7 has 4096-byte blocks, the volume has 512, 2 of another class; \
                        spread over more devices, 31 GiB would fit";
        assert_eq!(shortage.to_string(), expected);
    }
}
