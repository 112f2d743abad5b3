//! What all devices of a guest have in common: an identifier and a life.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{InvalidValue, string_type};

/// The name of a device within its virtual machine: 1 to 36 of `A-Z a-z 0-9 . _ -`. Disks and network cards share one
/// name space.
///
/// [`DeviceId::default`] is *unassigned* (empty): what the reader of a configuration, or the machine on attaching,
/// replaces by the first free of "disk0", "disk1", ....
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DeviceId(String);

impl DeviceId {
    /// The longest identifier in bytes.
    pub const MAX_LENGTH: usize = 36;

    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether nobody has chosen an identifier yet.
    pub fn is_unassigned(&self) -> bool {
        self.0.is_empty()
    }

    /// The first of "`prefix`0", "`prefix`1", ... that is not `taken`.
    pub fn first_free(prefix: &str, taken: impl Fn(&Self) -> bool) -> Self {
        let mut number = 0_u64;
        loop {
            let candidate = Self(format!("{prefix}{number}"));
            if !taken(&candidate) {
                return candidate;
            }
            number += 1;
        }
    }
}

impl FromStr for DeviceId {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if is_name(text, Self::MAX_LENGTH) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new(format!(
                "`{text}` is not an identifier; use 1 to {} of the characters A-Z a-z 0-9 . _ -",
                Self::MAX_LENGTH
            )))
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

string_type!(DeviceId, "an identifier in quotes", r"^[A-Za-z0-9._-]{1,36}$");

/// The name of a virtual machine: 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

impl VmName {
    /// The longest name in bytes.
    pub const MAX_LENGTH: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if is_name(text, Self::MAX_LENGTH) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new(format!(
                "`{text}` is not a name; use 1 to {} of the characters A-Z a-z 0-9 . _ -",
                Self::MAX_LENGTH
            )))
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

string_type!(VmName, "a name in quotes", r"^[A-Za-z0-9._-]{1,64}$");

/// Whether `text` has 1 to `longest` of the characters that names may have.
pub(crate) fn is_name(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Where a device is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// On the guest's bus; the guest's driver does not use it, or not yet.
    Attached,
    /// The guest's driver runs it.
    Active,
    /// The guest was asked to let it go and has not answered yet.
    Removing,
    /// The process that serves it has gone. The guest's requests wait, and go on when it is back.
    Waiting,
    /// It stopped: the driver broke the protocol, or the host refused what it needs. A guest reset revives it.
    Failed,
}

/// The answer of `DELETE /v1/vm/disks/{id}`: the guest was asked to let the device go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Removal {
    /// Which device.
    pub id: DeviceId,
    /// Always [`DeviceState::Removing`].
    pub state: DeviceState,
    /// The end is told by an event after this one.
    pub after_event: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_identifier_skips_taken_ones() {
        let taken: Vec<DeviceId> = ["disk0", "disk1", "disk3"]
            .iter()
            .map(|id| id.parse().unwrap())
            .collect();
        assert_eq!(
            DeviceId::first_free("disk", |id| taken.contains(id)).as_str(),
            "disk2"
        );
    }

    #[test]
    fn identifiers_are_safe_in_paths_and_urls() {
        assert!("data-1.b_C".parse::<DeviceId>().is_ok());
        for text in ["", "a/b", "a b", "ä", "a\n", &"x".repeat(37)] {
            assert!(text.parse::<DeviceId>().is_err(), "{text:?}");
        }
    }
}
