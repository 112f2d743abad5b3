//! What must hold between the parts of a configuration.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::path::{Component, Path, PathBuf};

use api::OnError;

use super::{ConsoleSpec, DiskConfig, DiskSource, VmConfig};

/// A rule that is broken: at which key, and what would be accepted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) key: String,
    pub(super) message: String,
}

fn violation<T>(key: impl Into<String>, message: impl Into<String>) -> Result<T, Violation> {
    Err(Violation {
        key: key.into(),
        message: message.into(),
    })
}

/// Checks a complete configuration: identifiers are assigned, paths are absolute.
pub(super) fn check(config: &VmConfig) -> Result<(), Violation> {
    let within = |table: &str, result: Result<(), (&'static str, api::InvalidValue)>| match result {
        Ok(()) => Ok(()),
        Err((key, error)) => violation(format!("{table}.{key}"), error.to_string()),
    };
    within("boot", config.boot.check())?;
    if let Some(pool) = &config.pool {
        within("pool", pool.check())?;
    }
    within("expanded-api", config.expanded_api.check())?;
    if let Some(scsi) = &config.scsi {
        within("scsi", scsi.check())?;
    }
    for (number, disk) in config.disks.iter().enumerate() {
        within(&format!("disk.{number}"), disk.check())?;
        if config.pool.is_none() && config.manager.is_none() && disk.file.is_some() {
            return violation(
                format!("disk.{number}.file"),
                "names a disk of a pool, and there is no [pool] with its devices, nor a `manager` that has pools",
            );
        }
        if config.manager.is_none() && disk.pool.is_some() {
            return violation(
                format!("disk.{number}.pool"),
                "names a pool of a manager, and there is no `manager`; the disks of [pool] have no such key",
            );
        }
    }
    for (name, limits) in &config.limit_groups {
        within(&format!("limit-groups.{name}"), limits.check())?;
    }
    check_resources(config)?;
    check_manager(config)?;
    check_limit_groups(config)?;
    for (number, net) in config.nets.iter().enumerate() {
        within(&format!("net.{number}"), net.check())?;
    }
    check_devices(config)?;
    check_scsi(config)?;
    check_images(config)?;
    check_paths(config)?;
    check_power(config)
}

/// What the process is allowed is not less than what the guest has.
fn check_resources(config: &VmConfig) -> Result<(), Violation> {
    if let Err((key, text)) = config.resources.check() {
        return violation(format!("resources.{key}"), text);
    }
    let size = config.memory.size;
    if config.resources.memory_max.is_some_and(|most| most <= size) {
        let text = format!("must be more than the guest's memory, {size}: the process needs some of its own");
        return violation("resources.memory-max", text);
    }
    Ok(())
}

/// A manager is somewhere, and its disks want nothing that only this process could keep.
fn check_manager(config: &VmConfig) -> Result<(), Violation> {
    let Some(manager) = &config.manager else {
        return Ok(());
    };
    if config.pool.is_some() {
        let text = "cannot stand beside [pool]: either the manager has the pool open, or this process";
        return violation("manager", text);
    }
    if manager.as_os_str().is_empty() {
        return violation("manager", "is empty; name the socket of `smsvmm serve`");
    }
    check_socket(manager, "manager")?;
    let scsi = config
        .disks
        .iter()
        .find(|disk| disk.file.is_some() && disk.is_unit());
    let scsi = scsi.map(|disk| &disk.pool);
    for (number, disk) in config.disks.iter().enumerate() {
        let problem = if disk.file.is_none() {
            continue;
        } else if disk.is_unit() && scsi.is_some_and(|pool| *pool != disk.pool) {
            (
                "pool",
                "must be that of the other SCSI disks that the manager serves: they are on one adapter",
            )
        } else if disk.on_error != OnError::Report {
            (
                "on-error",
                "cannot be \"stop\" for a disk that the manager serves: it could not stop the machine's processors",
            )
        } else {
            continue;
        };
        return violation(format!("disk.{number}.{}", problem.0), problem.1);
    }
    Ok(())
}

/// Disks may only share limits that there are.
fn check_limit_groups(config: &VmConfig) -> Result<(), Violation> {
    for (number, disk) in config.disks.iter().enumerate() {
        if let Some(name) = &disk.limit_group
            && !config.limit_groups.contains_key(name)
        {
            return violation(
                format!("disk.{number}.limit-group"),
                format!("there is no `{name}`; make it by [limit-groups.{name}] with iops or bytes"),
            );
        }
    }
    Ok(())
}

fn check_devices(config: &VmConfig) -> Result<(), Violation> {
    let scsi = config.disks.iter().filter(|disk| disk.is_unit());
    let scsi = scsi.count();
    if scsi > VmConfig::MAX_SCSI_DISKS {
        let most = VmConfig::MAX_SCSI_DISKS;
        return violation(
            "disk",
            format!("{scsi} SCSI disks are too many; a machine has up to {most}"),
        );
    }
    // One adapter has them all, but for those that the manager serves.
    let units = || config.disks.iter().filter(|disk| disk.is_unit());
    let managed = config.manager.is_some() && units().any(|disk| disk.file.is_some());
    let own = config.scsi.is_some() || units().any(|disk| config.manager.is_none() || disk.file.is_none());
    let disks = config.disks.len() - scsi + usize::from(own) + usize::from(managed);
    let nets = config.nets.len();
    if disks + nets > VmConfig::MAX_DEVICES {
        let key = if disks > nets { "disk" } else { "net" };
        return violation(
            key,
            format!(
                "{} devices are too many; a machine has slots for {}",
                disks + nets,
                VmConfig::MAX_DEVICES
            ),
        );
    }
    let disk_ids = config
        .disks
        .iter()
        .enumerate()
        .map(|(number, disk)| (&disk.id, format!("disk.{number}.id")));
    let net_ids = config
        .nets
        .iter()
        .enumerate()
        .map(|(number, net)| (&net.id, format!("net.{number}.id")));
    unique(
        disk_ids.chain(net_ids),
        "identifiers of disks and network cards must differ",
    )?;

    let macs = config.nets.iter().enumerate();
    let macs = macs.filter_map(|(number, net)| Some((net.mac?, format!("net.{number}.mac"))));
    unique(macs, "each network card needs an address of its own")?;

    let taps = config.nets.iter().enumerate();
    let taps = taps.filter_map(|(number, net)| Some((net.tap.as_ref()?, format!("net.{number}.tap"))));
    unique(
        taps,
        "a tap interface serves one network card (use queues for more speed)",
    )?;

    let mut forwards: Vec<(&api::PortForward, String)> = Vec::new();
    for (number, net) in config.nets.iter().enumerate() {
        for forward in &net.forward {
            if let Some((other, key)) = forwards.iter().find(|(other, _)| other.overlaps(forward)) {
                return violation(
                    format!("net.{number}.forward"),
                    format!("`{forward}` and `{other}` of {key} take the same port of the host"),
                );
            }
        }
        forwards.extend(
            net.forward
                .iter()
                .map(|forward| (forward, format!("net.{number}"))),
        );
    }
    Ok(())
}

/// Each place on the SCSI adapter has one disk, and the adapter has it.
fn check_scsi(config: &VmConfig) -> Result<(), Violation> {
    // Those of the manager are on an adapter of their own.
    let mut places: HashMap<(bool, u8, u16), usize> = HashMap::new();
    let targets = config.scsi.as_ref().and_then(|scsi| scsi.targets);
    for (number, disk) in config.disks.iter().enumerate() {
        if !disk.is_unit() {
            continue;
        }
        let (target, lun) = (disk.target.unwrap_or(0), disk.lun);
        if lun.is_none() {
            let text = format!("no LUN is left for it on target {target} and on its further ways");
            return violation(format!("disk.{number}.lun"), text);
        }
        for (target, lun) in disk.places() {
            if targets.is_some_and(|targets| target >= targets) {
                let text = format!("the adapter has no target {target}; scsi.targets says how many it has");
                return violation(format!("disk.{number}.target"), text);
            }
            let of_manager = config.manager.is_some() && disk.file.is_some();
            if let Some(other) = places.insert((of_manager, target, lun), number) {
                let text =
                    format!("LUN {lun} of target {target} is that of disk.{other}; choose another one");
                return violation(format!("disk.{number}.lun"), text);
            }
        }
    }
    Ok(())
}

/// An image or a disk of the pool may be used twice if nobody writes it.
fn check_images(config: &VmConfig) -> Result<(), Violation> {
    let mut seen: HashMap<(&str, PathBuf), (usize, bool)> = HashMap::new();
    for (number, disk) in config.disks.iter().enumerate() {
        let (key, what, path) = match disk.source() {
            Some(DiskSource::Image(path)) => ("image", "image", normalize(path)),
            // A pool's name has no slash.
            Some(DiskSource::File(path)) => {
                let pool = disk.pool.as_deref().unwrap_or_default();
                ("file", "disk of the pool", PathBuf::from(format!("{pool}{path}")))
            }
            Some(DiskSource::VhostUser(path)) => ("vhost-user", "socket", normalize(path)),
            None => continue,
        };
        let shown = disk.source().map(|source| source.to_string()).unwrap_or_default();
        if let Some((other, other_read_only)) = seen.insert((key, path), (number, disk.read_only))
            && !(disk.read_only && other_read_only)
        {
            return violation(
                format!("disk.{number}.{key}"),
                format!(
                    "{shown} is already disk.{other}.{key}; two disks on one {what} must both be read-only"
                ),
            );
        }
    }
    Ok(())
}

/// Consoles and sockets must not be in each other's way.
fn check_paths(config: &VmConfig) -> Result<(), Violation> {
    let consoles = [Some(&config.console.serial), config.console.virtio.as_ref()];
    if consoles == [Some(&ConsoleSpec::Stdio); 2] {
        return violation(
            "console.virtio",
            "only one console can be \"stdio\"; console.serial has it (its default)",
        );
    }
    let path = |console: Option<&ConsoleSpec>| match console {
        Some(ConsoleSpec::Pty(Some(path)) | ConsoleSpec::File(path) | ConsoleSpec::Socket(path)) => {
            Some(normalize(path))
        }
        _ => None,
    };
    let paths = [
        (path(consoles[0]), "console.serial"),
        (path(consoles[1]), "console.virtio"),
        (
            config
                .management
                .as_ref()
                .map(|management| normalize(&management.socket)),
            "management.socket",
        ),
    ];
    let socket_paths = [(consoles[0], "console.serial"), (consoles[1], "console.virtio")];
    for (console, key) in socket_paths {
        if let Some(ConsoleSpec::Socket(path)) = console {
            check_socket(path, key)?;
        }
    }
    if let Some(management) = &config.management {
        if management.socket.as_os_str().is_empty() {
            return violation("management.socket", "is empty; name a path for the socket");
        }
        check_socket(&management.socket, "management.socket")?;
    }
    let paths = paths
        .into_iter()
        .filter_map(|(path, key)| Some((path?, key.to_owned())));
    let paths: Vec<(PathBuf, String)> = paths.collect();
    unique(
        paths
            .iter()
            .map(|(path, key)| (path.display().to_string(), key.clone())),
        "each needs a path of its own",
    )
}

fn check_socket(path: &Path, key: &str) -> Result<(), Violation> {
    let (length, most) = (path.as_os_str().len(), DiskConfig::MAX_SOCKET);
    if length > most {
        return violation(
            key,
            format!("the path has {length} bytes, a Unix socket's has at most {most}; use a shorter one"),
        );
    }
    Ok(())
}

fn check_power(config: &VmConfig) -> Result<(), Violation> {
    let timeout = config.power.shutdown_timeout;
    let day = api::Seconds::new(24 * 60 * 60);
    if timeout > day {
        return violation(
            "power.shutdown-timeout",
            format!("{timeout} is beyond the limit of 24h"),
        );
    }
    Ok(())
}

/// Complains at the second of two equal values.
fn unique<T: Eq + Hash + Display>(
    values: impl Iterator<Item = (T, String)>,
    rule: &str,
) -> Result<(), Violation> {
    let mut seen: HashMap<T, String> = HashMap::new();
    for (value, key) in values {
        if let Some(first) = seen.get(&value) {
            return violation(key, format!("`{value}` is taken by {first}; {rule}"));
        }
        seen.insert(value, key);
    }
    Ok(())
}

/// The path without `.` and with `..` resolved by its text: good enough to catch mistakes; what is really one file, by links
/// or otherwise, is found by the lock when it is opened.
fn normalize(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                normal.pop();
            }
            other => normal.push(other),
        }
    }
    normal
}
