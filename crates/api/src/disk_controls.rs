//! What can be set for a disk while a guest uses it: limits of its rate, polling, what happens when it fails.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, InvalidValue};

/// Limits of the rate of a disk, or of a group of disks together: a `limits` of `[[disk]]`, a table of `[limit-groups]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Requests per second that read, write, discard or zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may come at once after a pause; by default what `iops` allows in a tenth of a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes read or written per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ByteSize>,
    /// Bytes that may come at once after a pause; by default what `bytes` allows in a tenth of a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
}

/// How much of a second's rate may come at once, unless a burst is given: one such part.
const BURST_PARTS: u64 = 10;

impl DiskLimits {
    /// Whether nothing is limited, and nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        let bytes = |size: Option<ByteSize>| size.map(ByteSize::bytes);
        let rates = [
            ("iops", self.iops, "iops-burst", self.iops_burst),
            ("bytes", bytes(self.bytes), "bytes-burst", bytes(self.bytes_burst)),
        ];
        for (key, rate, burst_key, burst) in rates {
            for (key, value) in [(key, rate), (burst_key, burst)] {
                if value == Some(0) {
                    let text = "0 would let nothing through; leave it out for no limit";
                    return Err((key, InvalidValue::new(text)));
                }
            }
            if burst.is_some() && rate.is_none() {
                let text = format!("is the burst of a limit that is not there; give `{key}` as well");
                return Err((burst_key, InvalidValue::new(text)));
            }
        }
        Ok(())
    }

    /// These limits after a change: what is not given stays, 0 takes a limit away.
    ///
    /// # Errors
    /// What would come of it is impossible; see [`Self::check`].
    pub fn changed(&self, change: &Self) -> Result<Self, (&'static str, InvalidValue)> {
        fn one<T: Copy + PartialEq>(old: Option<T>, change: Option<T>, none: T) -> Option<T> {
            change.map_or(old, |value| (value != none).then_some(value))
        }
        let none = ByteSize::from_bytes(0);
        let mut limits = Self {
            iops: one(self.iops, change.iops, 0),
            iops_burst: one(self.iops_burst, change.iops_burst, 0),
            bytes: one(self.bytes, change.bytes, none),
            bytes_burst: one(self.bytes_burst, change.bytes_burst, none),
        };
        // A burst goes with its limit.
        if change.iops == Some(0) && change.iops_burst.is_none() {
            limits.iops_burst = None;
        }
        if change.bytes == Some(none) && change.bytes_burst.is_none() {
            limits.bytes_burst = None;
        }
        limits.check()?;
        Ok(limits)
    }

    /// Requests per second, and how many may come at once.
    pub fn operation_rate(&self) -> Option<(u64, u64)> {
        let rate = self.iops?;
        Some((rate, self.iops_burst.unwrap_or(rate / BURST_PARTS)))
    }

    /// Bytes per second, and how many may come at once.
    pub fn byte_rate(&self) -> Option<(u64, u64)> {
        let rate = self.bytes?.bytes();
        Some((rate, self.bytes_burst.map_or(rate / BURST_PARTS, ByteSize::bytes)))
    }
}

/// What happens when a disk fails a request of the guest, for example because the pool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The machine is paused, with an event, until somebody has mended it and resumes the machine; the request is tried again then.
    Stop,
}

impl OnError {
    /// Whether it is what happens if nothing is said.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for OnError {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "report" => Ok(Self::Report),
            "stop" => Ok(Self::Stop),
            _ => Err(InvalidValue::new(format!(
                "`{text}` is not what can happen; use report or stop"
            ))),
        }
    }
}

/// What becomes of what was written to an undoable disk when the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AtPowerOff {
    /// It waits for `smsvmm disk commit` or `smsvmm disk discard`.
    #[default]
    Keep,
    /// It stays for good.
    Commit,
    /// It goes.
    Discard,
}

/// A change to a disk of a running machine: the body of `PATCH /v1/vm/disks/ID`. What is not given stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct DiskChange {
    /// Each that is given is changed; 0 takes it away.
    #[serde(
        skip_serializing_if = "DiskLimits::is_empty",
        deserialize_with = "crate::object"
    )]
    pub limits: DiskLimits,
    /// How long to look for further requests before sleeping, in microseconds; 0: sleep at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10_000))]
    pub poll_us: Option<u32>,
    /// What happens when the disk fails a request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_keeps_what_it_does_not_name_and_zero_takes_away() {
        let limits = DiskLimits {
            iops: Some(500),
            iops_burst: Some(1000),
            bytes: Some(ByteSize::from_mib(50)),
            bytes_burst: None,
        };
        assert_eq!(limits.operation_rate(), Some((500, 1000)));
        assert_eq!(limits.byte_rate(), Some((50 << 20, 5 << 20)));
        let change = |iops, iops_burst| DiskLimits {
            iops,
            iops_burst,
            ..DiskLimits::default()
        };
        let changed = limits.changed(&change(Some(100), None)).unwrap();
        assert_eq!((changed.iops, changed.iops_burst), (Some(100), Some(1000)));
        assert_eq!(changed.bytes, limits.bytes);
        let changed = limits.changed(&change(Some(0), None)).unwrap();
        assert_eq!(
            (changed.iops, changed.iops_burst, changed.bytes),
            (None, None, limits.bytes)
        );
        let (key, error) = changed.changed(&change(None, Some(7))).unwrap_err();
        assert_eq!(key, "iops-burst");
        assert!(error.to_string().contains("give `iops`"), "{error}");
    }

    #[test]
    fn nothing_per_second_is_no_limit() {
        let limits = DiskLimits {
            bytes: Some(ByteSize::from_bytes(0)),
            ..DiskLimits::default()
        };
        let (key, error) = limits.check().unwrap_err();
        assert_eq!(key, "bytes");
        assert!(error.to_string().contains("leave it out"), "{error}");
    }
}
