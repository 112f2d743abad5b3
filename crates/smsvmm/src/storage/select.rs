//! Which pool a command is about: devices on the command line, or in a file.

use std::path::{Path, PathBuf};

use host_manager::Pools;
use management::{Scope, Target};
use serde::Deserialize;
use storage_manager::DevicePaths;
use vmm::config::PoolConfig;

use super::arguments::Which;
use crate::cli::ProcessArguments;
use crate::exit::UsageError;
use crate::remote::RemoteConfig;
use crate::toml_file;

/// The configuration of commands that name none.
const DEFAULT_CONFIG: &str = "/etc/smsvmm/host.toml";

/// What of a configuration matters here; the rest is not looked at.
#[derive(Deserialize)]
struct File {
    pool: Option<Pools>,
    management: Option<Management>,
    remote: Option<RemoteConfig>,
    /// Of a machine: the manager that has the pool.
    manager: Option<PathBuf>,
    /// Of a host.
    runtime: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Management {
    socket: PathBuf,
}

/// The configuration that is meant when none is named: that of this host, if there is one.
pub(crate) fn default_config() -> Option<PathBuf> {
    let named = std::env::var_os("SMSVMM_CONFIG").filter(|path| !path.is_empty());
    let path = named.map_or_else(|| PathBuf::from(DEFAULT_CONFIG), PathBuf::from);
    path.exists().then_some(path)
}

impl Which {
    fn file(&self) -> Option<PathBuf> {
        match self.devices.is_empty() {
            true => self.config.clone().or_else(default_config),
            false => self.config.clone(),
        }
    }
}

/// The devices of the pool.
pub(crate) fn devices(which: &Which) -> anyhow::Result<DevicePaths> {
    Ok(pool_config(which)?.devices)
}

/// The pool, as a file has it, or with these devices.
pub(crate) fn pool_config(which: &Which) -> anyhow::Result<PoolConfig> {
    let pool = match (&which.file(), which.devices.as_slice()) {
        (Some(path), []) => from_file(path)?,
        (None, values) if !values.is_empty() => {
            let lists: Result<Vec<_>, _> = values.iter().map(|value| split(value)).collect();
            PoolConfig {
                devices: lists?.concat(),
                io_helpers: None,
            }
        }
        _ => {
            return Err(
                UsageError::new("name the pool either by --config FILE or by --devices DEVICE,...").into(),
            );
        }
    };
    let empty = pool.devices.iter().any(String::is_empty);
    if pool.devices.is_empty() || empty {
        return Err(
            UsageError::new("a pool has at least one device, and each has a path or an address").into(),
        );
    }
    Ok(pool)
}

/// The devices in a value of --devices. The paths of one that has several are separated by commas, too.
fn split(value: &str) -> Result<Vec<String>, UsageError> {
    if value.starts_with("multipath:") {
        return Ok(vec![value.to_owned()]);
    }
    let devices: Vec<String> = value.split(',').map(str::to_owned).collect();
    if devices.iter().any(|device| device.starts_with("multipath:")) {
        return Err(UsageError::new(
            "a device with several paths is given by a --devices of its own: --devices d0.img --devices multipath:A,B",
        ));
    }
    Ok(devices)
}

/// Where the pool is managed if it is in use, or is elsewhere, as far as the configuration says.
pub(crate) fn target(which: &Which) -> anyhow::Result<Option<Target>> {
    let Some(path) = which.file() else {
        return Ok(None);
    };
    target_in(&path, which.pool.as_deref())
}

fn target_in(path: &Path, pool: Option<&str>) -> anyhow::Result<Option<Target>> {
    let scope = pool.map_or(Scope::All, |pool| Scope::Pool(pool.to_owned()));
    let file: File = toml_file::read(path)?;
    if let Some(remote) = file.remote {
        return remote.target(path, scope).map(Some);
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let is_host = file.runtime.is_some();
    let manager = match (file.manager, &file.management) {
        (Some(manager), _) => Some(folder.join(manager)),
        (None, Some(management)) if is_host => Some(folder.join(&management.socket)),
        _ => None,
    };
    if let Some(manager) = manager {
        return Ok(Some(Target::Manager(manager, scope)));
    }
    if pool.is_some() {
        let text = format!(
            "{} has no manager; --pool chooses one of a manager's pools",
            path.display()
        );
        return Err(UsageError::new(text).into());
    }
    Ok(file
        .management
        .map(|management| Target::Socket(folder.join(management.socket))))
}

/// The process that `smsvmm top` and the like are about.
///
/// # Errors
/// The file cannot be read, or names neither a socket nor a gateway.
pub(crate) fn process(arguments: &ProcessArguments) -> anyhow::Result<Target> {
    if let Some(socket) = &arguments.socket {
        return Ok(Target::Socket(socket.clone()));
    }
    let path = arguments.config.clone().or_else(default_config);
    let path = &path.ok_or_else(|| UsageError::new("name the process by --socket PATH or --config FILE"))?;
    target_in(path, None)?.ok_or_else(|| {
        UsageError::new(format!(
            "{} has no management socket; add [management] with socket = \"...\" and start the process again",
            path.display()
        ))
        .into()
    })
}

fn from_file(path: &Path) -> anyhow::Result<PoolConfig> {
    let shown = path.display();
    let file: File = toml_file::read(path)?;
    let pools = file.pool.unwrap_or_default();
    let mut pool = match pools.all() {
        [pool] => pool.clone(),
        [] if file.manager.is_some() => {
            return Err(UsageError::new(format!(
                "the manager that {shown} names does not answer, and only it knows the pool's devices; start it, or give --devices"
            ))
            .into());
        }
        [] => {
            return Err(UsageError::new(format!(
                "{shown} has no pool; add [pool] with devices = [\"...\"], which `smsvmm pool create` prints"
            ))
            .into());
        }
        _ => {
            return Err(UsageError::new(format!(
                "{shown} has several pools, and its manager does not answer; start it, or give --devices"
            ))
            .into());
        }
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    pool.complete(folder);
    Ok(pool)
}

/// The lines for vm.toml that name these devices.
pub(crate) fn lines(devices: &[String]) -> String {
    let quoted: Vec<String> = devices
        .iter()
        .map(|device| toml::Value::from(device.as_str()).to_string())
        .collect();
    format!("[pool]\ndevices = [{}]\n", quoted.join(", "))
}
