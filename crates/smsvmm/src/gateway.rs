//! `smsvmm gateway`: the machines of this host for those who come over the network.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use access::TlsFiles;
use anyhow::{Context, bail};
use management::{Gateway, GatewayConfig, Machine};
use serde::Deserialize;
use vmm::config::{ConsoleSpec, VmConfig};
use vmm::sandbox::{ProgramPlaces, confine_program};

use crate::cli::GatewayArguments;
use crate::exit::{Exit, UsageError};
use crate::signals::Signals;
use crate::{logs, serve, toml_file};

/// Longest time of a TLS handshake: of slow machines, too.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// A gateway's configuration; relative paths are relative to the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    access: PathBuf,
    audit: PathBuf,
    #[serde(default)]
    machines: Vec<PathBuf>,
    /// The host.toml of the host's manager.
    manager: Option<PathBuf>,
}

/// The machine that a vm.toml describes.
fn machine(path: &Path) -> anyhow::Result<Machine> {
    let config = VmConfig::load(path, &[]).map_err(UsageError::new)?;
    let Some(management) = config.management else {
        return Err(UsageError::new(format!(
            "{} has no management socket; add [management] with socket = \"{}.sock\"",
            path.display(),
            config.name
        ))
        .into());
    };
    Ok(Machine {
        name: config.name.to_string(),
        socket: management.socket,
        console: match config.console.serial {
            ConsoleSpec::Socket(path) => Some(path),
            _ => None,
        },
    })
}

/// The folder of a file.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

pub(crate) fn execute(arguments: &GatewayArguments) -> anyhow::Result<Exit> {
    let path = &arguments.config;
    let file: File = toml_file::read(path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let machines = file
        .machines
        .iter()
        .map(|path| machine(&folder.join(path)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for (number, one) in machines.iter().enumerate() {
        if machines.iter().take(number).any(|other| other.name == one.name) {
            bail!(UsageError::new(format!(
                "{}: two machines are called {}",
                path.display(),
                one.name
            )));
        }
    }
    let manager = file.manager.map(|path| folder.join(path));
    let manager = manager.map(|path| serve::config(&path)).transpose()?;
    if machines.is_empty() && manager.is_none() {
        let text = format!("{}: name machines, or manager = \"host.toml\"", path.display());
        return Err(UsageError::new(text).into());
    }
    let managed = manager.as_ref().map(|config| config.name());
    let manager = manager.map(|config| config.management.socket);
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    let (access, audit) = (folder.join(file.access), folder.join(file.audit));
    // Both files are replaced now and then: one by `smsvmm principal`, one by who rotates logs.
    let places = ProgramPlaces {
        read: vec![folder_of(&access)],
        write: vec![folder_of(&audit)],
    };
    let gateway = Gateway::bind(GatewayConfig {
        listen: file.listen,
        tls: TlsFiles {
            certificate: folder.join(file.certificate),
            key: folder.join(file.key),
            client_authorities: file.client_ca.map(|path| folder.join(path)),
        },
        access,
        audit,
        machines,
        manager,
        handshake: HANDSHAKE,
    })?;
    let address = gateway.address().context("cannot find out the port")?;
    let names: Vec<String> = file
        .machines
        .iter()
        .map(|path| path.display().to_string())
        .chain(managed)
        .collect();
    // Everything is open that is opened once, and no thread exists yet.
    confine_program(&places).map_err(UsageError::new)?;
    let running = gateway.start()?;
    logs::say(&format!(
        "smsvmm: {} can be managed at {address}",
        names.join(", ")
    ));
    let signal = signals.next();
    logs::say(&format!(
        "smsvmm: {signal}: the gateway is closed; the machines go on"
    ));
    drop(running);
    Ok(Exit::Success)
}
