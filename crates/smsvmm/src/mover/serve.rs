//! `smsvmm mover serve`: the storage manager of each principal is reached by the management socket of its machine.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use api::virtual_disk::{DiskAnswer, DiskOperation, ReadRanges};
use api::{Problem, ProblemKind, StorageAnswer, StorageRequest};
use backup::mover::{Ended, Mover, MoverConfig, Pool, Principal};
use management::{Client, ClientError};
use serde_json::json;
use storage_manager::Line;
use vmm::sandbox::{ProgramPlaces, confine_program};

use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};
use crate::signals::Signals;

/// Largest configuration in bytes.
const MAX_FILE: u64 = 1 << 20;

pub(super) fn serve(path: &Path, json: bool) -> anyhow::Result<Exit> {
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    let config = read(path)?;
    std::fs::create_dir_all(&config.store)
        .with_context(|| format!("cannot make the folder {}", config.store.display()))?;
    let places = places(&config);
    let confine = || confine_program(&places).map_err(io::Error::other);
    let mover = Mover::start_confined(config, Arc::new(reach), told, confine)?;
    let address = mover.address();
    match json {
        true => print_json(&json!({ "address": address.to_string() }))?,
        false => print(&format!("mover: {address}\n"))?,
    }
    let signal = signals.next();
    logs::say(&format!(
        "smsvmm: {signal}: ending; backups that are being made can be gone on with"
    ));
    drop(mover);
    Ok(Exit::Success)
}

/// What it reads and writes: archives, and what is backed up without the help of a machine.
fn places(config: &MoverConfig) -> ProgramPlaces {
    let principals = config.principals.iter();
    let devices = principals.clone().flat_map(|principal| principal.devices.clone());
    // Images of frozen disks come and go.
    let images = principals.flat_map(|principal| principal.images.values());
    let folders = images.filter_map(|image| image.parent().map(Path::to_path_buf));
    ProgramPlaces {
        // One that is not there now is told when it is needed.
        read: devices.chain(folders).filter(|place| place.exists()).collect(),
        write: vec![config.store.clone()],
    }
}

fn read(path: &Path) -> anyhow::Result<MoverConfig> {
    let shown = path.display();
    let size = std::fs::metadata(path)
        .with_context(|| format!("cannot read {shown}"))?
        .len();
    if size > MAX_FILE {
        return Err(UsageError::new(format!("{shown} is too large for a configuration")).into());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let config: MoverConfig =
        toml::from_str(&text).map_err(|error| UsageError::new(format!("{shown}: {error}")))?;
    config
        .check()
        .map_err(|error| UsageError::new(format!("{shown}: {error}")))?;
    Ok(config)
}

fn told(ended: Ended) {
    let Ended {
        peer,
        principal,
        notes,
        reason,
    } = ended;
    for note in notes {
        tracing::warn!(principal, note, "not all could be read from devices");
    }
    match (principal, reason) {
        (Some(principal), None) => tracing::info!(%peer, principal, "an agent has ended"),
        (Some(principal), Some(reason)) => {
            tracing::warn!(%peer, principal, reason, "a connection of an agent was ended");
        }
        // Anybody can cause these.
        (None, reason) if is_time() => tracing::warn!(%peer, reason, "somebody who is not known came"),
        (None, reason) => tracing::debug!(%peer, reason, "somebody who is not known came"),
    }
}

/// At most once a second.
fn is_time() -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let is_time = last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1));
    if is_time {
        *last = Some(Instant::now());
    }
    is_time
}

fn reach(principal: &Principal) -> Result<Box<dyn Pool>, Problem> {
    let socket = principal.socket.as_deref().unwrap_or(Path::new(""));
    let client = Client::new(socket).map_err(|error| Problem::new(ProblemKind::Host, error.to_string()))?;
    Ok(Box::new(Machine(client)))
}

/// A machine that has a pool open.
struct Machine(Client);

/// Paths of this host are none of the agent's business.
fn problem(error: ClientError) -> Problem {
    match error {
        ClientError::Problem(problem) => *problem,
        ClientError::Connect { .. } => Problem::new(
            ProblemKind::Host,
            "the mover cannot reach the management socket of this machine",
        )
        .remedy("see that the machine runs with the socket that mover.toml names, and that both run as the same user"),
        other => Problem::new(ProblemKind::Host, backup::chain_of(&other)),
    }
}

impl Pool for Machine {
    fn own_disks(&self) -> Result<Vec<String>, Problem> {
        let disks = self.0.status().map_err(problem)?.disks.into_iter();
        let own = disks.filter(|disk| !disk.config.read_only);
        Ok(own.filter_map(|disk| disk.config.file).collect())
    }

    fn disk(&self, operation: DiskOperation) -> Result<DiskAnswer, Problem> {
        match self
            .0
            .storage(&StorageRequest::Disk(operation))
            .map_err(problem)?
        {
            StorageAnswer::Disk(outcome) => Ok(outcome.answer),
            _ => Err(Problem::new(
                ProblemKind::Host,
                "the machine answered something else than it was asked",
            )),
        }
    }

    fn read(&self, ranges: ReadRanges, take: &mut (dyn FnMut(u64, &[u8]) + Send)) -> Result<(), Problem> {
        let client = self.0.again().map_err(problem)?;
        let connect = Box::new(move |request: &_| {
            let (early, stream) = client.transfer(request).map_err(problem)?;
            Ok(Line { early, stream })
        });
        storage_manager::read_ranges(connect, ranges, take)
    }
}
