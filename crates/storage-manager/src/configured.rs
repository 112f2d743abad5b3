//! Disks as the configuration of a machine wants them.

use api::{AtPowerOff, DiskConfig, Problem, ProblemKind};
use storage_virtualizer::disk::{DiskOptions, PowerOff};

use crate::disks_view::disk_mode;
use crate::hosted::{HostedDisk, HostedPool};

impl HostedPool {
    /// Opens the disk of the pool that `config` names, as it wants it. A machine that `goes_on` believes that it has been open all the time.
    ///
    /// # Errors
    /// There is no such disk, it is in use or empty, or it cannot be used in this way.
    pub fn configured_disk(&self, config: &DiskConfig, goes_on: bool) -> Result<HostedDisk, Problem> {
        let path = config.file.as_deref().unwrap_or_default();
        let options = DiskOptions {
            mode: disk_mode(config.mode),
            power_off: match config.at_power_off.unwrap_or_default() {
                AtPowerOff::Keep => PowerOff::Keep,
                AtPowerOff::Commit => PowerOff::Commit,
                AtPowerOff::Discard => PowerOff::Discard,
            },
            read_only: config.read_only,
            goes_on,
            ..DiskOptions::default()
        };
        let disk = self.disk(path, options)?;
        if disk.size() == 0 {
            let text = format!("{path} is empty; `smsvmm disk resize` gives it a size");
            return Err(Problem::new(ProblemKind::Conflict, text));
        }
        Ok(disk)
    }
}
