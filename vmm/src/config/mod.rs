//! vm.toml: what one virtual machine is made of.
//!
//! ```text
//!   vm.toml ──document::parse──► Node tree ◄──overrides::apply── --set key=value
//!                                  │ reader (serde), each error with line and key
//!                                  ▼
//!                               VmConfig ──complete: identifiers, addresses, absolute paths──► check ──► caller
//! ```
//!
//! A [`VmConfig`] that [`VmConfig::load`] returned is complete and consistent in itself; whether files exist and the host can
//! do it is found out when the machine's resources are opened. It serializes to the same TOML, which loads to an equal value.

mod boot;
mod check;
mod console;
mod cpus;
mod document;
mod error;
mod memory;
mod overrides;
mod policy;
mod pool;
mod reader;
mod scsi;
mod suggest;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

pub use api::{
    ByteSize, DeviceId, DiskBus, DiskConfig, DiskLimits, DiskSerial, DiskSource, ExpandedPolicy, MacAddress,
    NetBackend, NetConfig, PortForward, Protocol, QueueSize, Seconds, TapName, VmName,
};
pub use boot::BootConfig;
pub use console::{ConsoleConfig, ConsoleSpec, EscapeKey};
pub use cpus::{CpuConfig, CpuFeatures, HostCpus};
pub use error::{ConfigError, Place};
pub use memory::{HugePages, MemoryConfig};
pub use policy::{ManagementConfig, OnCrash, OnReboot, PowerConfig, ResourcesConfig, SandboxConfig, Seccomp};
pub use pool::PoolConfig;
pub use scsi::ScsiConfig;
use serde::{Deserialize, Serialize};

/// One virtual machine: the contents of vm.toml.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// The machine's name.
    pub name: VmName,
    /// Give the guest a virtio entropy source.
    #[serde(default = "yes")]
    pub rng: bool,
    /// The management socket of the host's manager, which serves the disks of its pools. Absolute once loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manager: Option<PathBuf>,
    /// Processors.
    #[serde(default)]
    pub cpus: CpuConfig,
    /// Memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// Kernel, initial RAM disk, command line.
    pub boot: BootConfig,
    /// The pool that holds the disks which are not images of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolConfig>,
    /// The adapter of the machine's SCSI disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scsi: Option<ScsiConfig>,
    /// Disks, in the order in which the guest finds them.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Limits of rates that several disks share, by the name that disks give as `limit-group`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limit_groups: BTreeMap<DeviceId, DiskLimits>,
    /// Network cards, in the order in which the guest finds them.
    #[serde(default, rename = "net", skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// Consoles.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// The management socket; without it there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub management: Option<ManagementConfig>,
    /// What the guest may have storage management do, through its SCSI disks.
    #[serde(default, skip_serializing_if = "ExpandedPolicy::is_default")]
    pub expanded_api: ExpandedPolicy,
    /// How the process confines itself.
    #[serde(default)]
    pub sandbox: SandboxConfig,
    /// What follows a reboot, a crash, a power button.
    #[serde(default)]
    pub power: PowerConfig,
    /// What a manager of the host lets the process have.
    #[serde(default, skip_serializing_if = "ResourcesConfig::is_default")]
    pub resources: ResourcesConfig,
}

fn yes() -> bool {
    true
}

impl VmConfig {
    /// Most disks and network cards together that a configuration may name; all SCSI disks count as one.
    pub const MAX_DEVICES: usize = 24;
    /// Most SCSI disks that a configuration may name.
    pub const MAX_SCSI_DISKS: usize = 256;

    /// Largest file that is read as a configuration, in bytes.
    const MAX_FILE: u64 = 1 << 20;

    /// Reads the file at `path`, applies `overrides` ("key=value" each, in order), completes and checks the result.
    ///
    /// # Errors
    /// The file cannot be read, or what stands in it or in an override cannot be used; the message says where and what
    /// would be accepted.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let cannot_read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let folder = std::path::absolute(path).map_err(cannot_read)?;
        let folder = folder.parent().unwrap_or(Path::new("/")).to_owned();
        let file = std::fs::File::open(path).map_err(cannot_read)?;
        let mut bytes = Vec::new();
        file.take(Self::MAX_FILE + 1)
            .read_to_end(&mut bytes)
            .map_err(cannot_read)?;
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if size > Self::MAX_FILE {
            let size = std::fs::metadata(path).map_or(size, |metadata| metadata.len());
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
                size,
                limit: Self::MAX_FILE,
            });
        }
        let text = String::from_utf8(bytes).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: error.as_bytes()[..error.utf8_error().valid_up_to()]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count()
                + 1,
            column: 1,
            message: "is not UTF-8 text; is this the right file?".to_owned(),
        })?;
        Self::from_text(&text, path, &folder, overrides)
    }

    /// Like [`Self::load`] for a text that is already in memory: `path` is named in errors, relative paths are taken from
    /// `folder`, which is absolute.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_text(
        text: &str,
        path: &Path,
        folder: &Path,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        let mut document = document::parse(path, text)?;
        overrides::expand_shorthand(&mut document);
        for text in overrides {
            overrides::apply(&mut document, text)?;
        }
        let mut config: Self = reader::read(&document)?;
        config.complete(folder);
        check::check(&config).map_err(|violation| ConfigError::Value {
            place: (*document.locate(&violation.key).place).clone(),
            key: violation.key,
            message: violation.message,
        })?;
        Ok(config)
    }

    /// Fills in what follows from the rest: identifiers, addresses, absolute paths.
    fn complete(&mut self, folder: &Path) {
        let mut taken: Vec<DeviceId> = self.disks.iter().map(|disk| disk.id.clone()).collect();
        taken.extend(self.nets.iter().map(|net| net.id.clone()));
        let disk_ids = self.disks.iter_mut().map(|disk| ("disk", &mut disk.id));
        let net_ids = self.nets.iter_mut().map(|net| ("net", &mut net.id));
        for (prefix, id) in disk_ids.chain(net_ids) {
            if id.is_unassigned() {
                *id = DeviceId::first_free(prefix, |id| taken.contains(id));
                taken.push(id.clone());
            }
        }
        self.place_scsi_disks();
        for net in &mut self.nets {
            net.mac = Some(net.mac_or_derived(self.name.as_str()));
        }
        if let Some(pool) = &mut self.pool {
            pool.complete(folder);
        }
        self.for_each_path(|path| {
            if !path.as_os_str().is_empty() {
                *path = folder.join(&*path);
            }
        });
    }

    /// Gives SCSI disks their LUNs: those that say theirs first, then the others in their order. What is impossible stays, and is
    /// complained of by the checks.
    fn place_scsi_disks(&mut self) {
        let scsi = |disk: &&mut DiskConfig| disk.is_unit();
        let mut taken = BTreeSet::new();
        for given in [true, false] {
            for disk in self.disks.iter_mut().filter(scsi) {
                if disk.lun.is_some() == given && disk.places().iter().all(|place| !taken.contains(place)) {
                    // As above.
                    let _ = disk.take_places(&mut taken);
                }
            }
        }
    }

    fn for_each_path(&mut self, mut action: impl FnMut(&mut PathBuf)) {
        action(&mut self.boot.kernel);
        self.manager.iter_mut().for_each(&mut action);
        self.boot.initrd.iter_mut().for_each(&mut action);
        self.disks
            .iter_mut()
            .flat_map(|disk| disk.image.iter_mut().chain(&mut disk.vhost_user))
            .for_each(&mut action);
        let consoles = std::iter::once(&mut self.console.serial).chain(&mut self.console.virtio);
        for console in consoles {
            match console {
                ConsoleSpec::Pty(Some(path)) | ConsoleSpec::File(path) | ConsoleSpec::Socket(path) => {
                    action(path)
                }
                ConsoleSpec::Pty(None) | ConsoleSpec::Stdio | ConsoleSpec::Null => {}
            }
        }
        self.management
            .iter_mut()
            .map(|management| &mut management.socket)
            .for_each(&mut action);
        self.sandbox.paths.iter_mut().for_each(action);
    }
}
