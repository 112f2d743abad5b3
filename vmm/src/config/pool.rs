//! `[pool]`: the pool that a process opens itself, a machine's or a manager's.

use std::path::Path;

use api::InvalidValue;
use serde::{Deserialize, Serialize};

/// A pool, by its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PoolConfig {
    /// Files, block devices, `nbd://` addresses, `multipath:` lists, in any order. Absolute once loaded.
    pub devices: Vec<String>,
}

impl PoolConfig {
    /// Makes relative paths absolute.
    pub fn complete(&mut self, folder: &Path) {
        for device in self.devices.iter_mut().filter(|device| !device.is_empty()) {
            *device = block_io::relative_to(device, folder);
        }
    }

    /// Checks what the types alone cannot.
    pub(super) fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        let problem = match self.devices.as_slice() {
            [] => "is empty; a pool has at least one device, as `smsvmm pool create` prints them",
            devices if devices.iter().any(String::is_empty) => {
                "has an empty text; each device has a path or an address"
            }
            _ => return Ok(()),
        };
        Err(("devices", InvalidValue::new(problem)))
    }
}
