//! `[pool]`: the pool that a process opens itself, a machine's or a manager's.

use std::path::Path;

use api::InvalidValue;
use block_io::WorkerOptions;
use serde::{Deserialize, Serialize};

/// A pool, by its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PoolConfig {
    /// Files, block devices, `nbd://` addresses, `multipath:` lists, in any order. Absolute once loaded.
    pub devices: Vec<String>,
    /// Threads beside the pool's own that call the kernel for it when it has much to do, at most 8; by default one where the
    /// host has four processors or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_helpers: Option<usize>,
}

impl PoolConfig {
    /// Helpers at most: a pool's one thread gives no more than a few enough to do.
    pub const MOST_HELPERS: u8 = 8;

    /// Makes relative paths absolute.
    pub fn complete(&mut self, folder: &Path) {
        for device in self.devices.iter_mut().filter(|device| !device.is_empty()) {
            *device = block_io::relative_to(device, folder);
        }
    }

    /// How the pool's worker runs.
    pub fn worker_options(&self) -> WorkerOptions {
        WorkerOptions {
            helpers: self.io_helpers.unwrap_or_else(block_io::default_helpers),
            ..WorkerOptions::default()
        }
    }

    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// The key and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        let most = Self::MOST_HELPERS;
        if self.io_helpers.is_some_and(|helpers| helpers > most.into()) {
            let problem = format!("is more than {most}");
            return Err(("io-helpers", InvalidValue::new(problem)));
        }
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
