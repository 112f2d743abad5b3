//! Which pool a command is about: devices on the command line, or in a file.

use std::path::{Path, PathBuf};

use management::Target;
use serde::Deserialize;
use storage_manager::DevicePaths;

use super::arguments::Which;
use crate::cli::ProcessArguments;
use crate::exit::UsageError;
use crate::remote::RemoteConfig;
use crate::toml_file;

/// What of a configuration matters here; the rest is not looked at.
#[derive(Deserialize)]
struct File {
    pool: Option<Pool>,
    management: Option<Management>,
    remote: Option<RemoteConfig>,
}

#[derive(Deserialize)]
struct Management {
    socket: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    devices: Vec<String>,
}

/// The devices of the pool.
pub(crate) fn devices(which: &Which) -> anyhow::Result<DevicePaths> {
    let devices = match (&which.config, which.devices.as_slice()) {
        (Some(path), []) => from_file(path)?,
        (None, values) if !values.is_empty() => {
            let lists: Result<Vec<_>, _> = values.iter().map(|value| split(value)).collect();
            lists?.concat()
        }
        _ => {
            return Err(
                UsageError::new("name the pool either by --config FILE or by --devices DEVICE,...").into(),
            );
        }
    };
    let empty = devices.iter().any(String::is_empty);
    if devices.is_empty() || empty {
        return Err(
            UsageError::new("a pool has at least one device, and each has a path or an address").into(),
        );
    }
    Ok(devices)
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
    which.config.as_deref().map_or(Ok(None), target_in)
}

fn target_in(path: &Path) -> anyhow::Result<Option<Target>> {
    let file: File = toml_file::read(path)?;
    if let Some(remote) = file.remote {
        return remote.target(path).map(Some);
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok(file
        .management
        .map(|management| Target::Socket(folder.join(management.socket))))
}

/// The process that `smsvmm top` and the like are about.
///
/// # Errors
/// The file cannot be read, or names neither a socket nor a gateway.
pub(crate) fn process(arguments: &ProcessArguments) -> anyhow::Result<Target> {
    let path = match (&arguments.socket, &arguments.config) {
        (Some(socket), _) => return Ok(Target::Socket(socket.clone())),
        (None, Some(path)) => path,
        (None, None) => {
            return Err(UsageError::new("name the process by --socket PATH or --config FILE").into());
        }
    };
    target_in(path)?.ok_or_else(|| {
        UsageError::new(format!(
            "{} has no management socket; add [management] with socket = \"...\" and start the process again",
            path.display()
        ))
        .into()
    })
}

fn from_file(path: &Path) -> anyhow::Result<DevicePaths> {
    let shown = path.display();
    let Some(pool) = toml_file::read::<File>(path)?.pool else {
        return Err(UsageError::new(format!(
            "{shown} has no pool; add [pool] with devices = [\"...\"], which `smsvmm pool create` prints"
        ))
        .into());
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    let place = |device: String| match device.is_empty() {
        true => device,
        false => block_io::relative_to(&device, folder),
    };
    Ok(pool.devices.into_iter().map(place).collect())
}

/// The lines for vm.toml that name these devices.
pub(crate) fn lines(devices: &[String]) -> String {
    let quoted: Vec<String> = devices
        .iter()
        .map(|device| toml::Value::from(device.as_str()).to_string())
        .collect();
    format!("[pool]\ndevices = [{}]\n", quoted.join(", "))
}
