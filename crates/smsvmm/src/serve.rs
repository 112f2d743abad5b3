//! `smsvmm serve`: the manager of a host, from its configuration to its end.
//!
//! ```text
//!   TERM, INT ─► machines' guests are asked to shut down ─► disks, pools are closed ─► end
//!                 │ another one: they are stopped
//!   HUP ───────► pools are closed, machines go on ─► the program is executed anew, in the same process
//! ```
//!
//! As a service of systemd (Type=notify) it tells when it is ready, when it ends, and that it is alive; its log goes to the journal, as do those of
//! machines.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use host_manager::{AtEnd, HostConfig, Manager};
use management::{EventJournal, Server};
use sd_notify::NotifyState;

use crate::cli::ServeArguments;
use crate::exit::{Exit, UsageError};
use crate::signals::Signals;
use crate::{debug, logs, toml_file};

/// Bytes of events that are kept at least; at most twice as many.
const EVENTS: u64 = 4 << 20;

/// Reads host.toml.
pub(crate) fn config(path: &Path) -> anyhow::Result<HostConfig> {
    let mut config: HostConfig = toml_file::read(path)?;
    let folder = std::path::absolute(path).context("cannot find the current folder")?;
    let folder = folder.parent().unwrap_or(Path::new("/"));
    let completed = config.complete(folder);
    completed.map_err(|text| UsageError::new(format!("{}: {text}", path.display())))?;
    Ok(config)
}

/// This program, also when another was put in its place.
fn program() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe().context("cannot find this program")?;
    let text = path.to_string_lossy();
    Ok(match text.strip_suffix(" (deleted)") {
        Some(replaced) => replaced.into(),
        None => path,
    })
}

/// Tells systemd, if it has started this.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd cannot be told how it is");
    }
}

pub(crate) fn serve(arguments: &ServeArguments) -> anyhow::Result<Exit> {
    let path = &arguments.config;
    let config = config(path)?;
    debug::tell_on_panic();
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    for folder in [&config.state, &config.runtime]
        .into_iter()
        .chain(config.management.socket.parent().map(Path::to_path_buf).as_ref())
    {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    // Before anything is opened: a second manager ends here.
    let locals = config.management.locals().map_err(UsageError::new);
    let locals = locals.with_context(|| path.display().to_string())?;
    let server = Server::bind(&config.management.socket)?;
    let server = server
        .for_locals(locals)
        .context("cannot open the management socket for others")?;
    let (journal, recovered) = EventJournal::open(&config.state.join("events"), EVENTS)?;
    let last = recovered.last;
    let events = Arc::new(recovered.into_log());
    let kept = journal
        .keep(Arc::clone(&events), last)
        .context("cannot start the thread that keeps events")?;
    let (version, journal) = (env!("CARGO_PKG_VERSION"), logs::to_journal());
    let manager = Manager::open(&config, program()?, version, events, journal)?;
    let manager = Arc::new(manager);
    let serving = server
        .start_host(Arc::clone(&manager) as Arc<dyn api::Host>)
        .context("cannot start the management server")?;
    manager.ready();
    watch_over(&manager)?;
    let pools = match manager.pool_names().as_slice() {
        [] => "no pool".to_owned(),
        names => format!("pool {}", names.join(", ")),
    };
    logs::say(&format!(
        "smsvmm: {} is managed at {} ({pools})",
        config.name(),
        config.management.socket.display()
    ));
    notify(&[NotifyState::Ready]);
    let signal = signals.next();
    let anew = signal == "SIGHUP";
    let at_end = if anew {
        AtEnd::Leave
    } else {
        config.machines.at_end
    };
    logs::say(&match at_end {
        AtEnd::ShutDown => {
            format!("smsvmm: {signal}: guests are asked to shut down; again to stop them at once")
        }
        AtEnd::Leave => {
            format!("smsvmm: {signal}: the pools are closed; machines go on, and wait for their disks")
        }
    });
    notify(&[if anew {
        NotifyState::Reloading
    } else {
        NotifyState::Stopping
    }]);
    let closed = manager.close(signal, at_end, || signals.arrived().is_some());
    drop(serving);
    drop(kept);
    closed?;
    if anew {
        let mut command = Command::new(program()?);
        command.args(std::env::args_os().skip(1));
        // It comes back only if that fails.
        return Err(command.exec()).context("cannot execute smsvmm anew");
    }
    Ok(Exit::Success)
}

/// Tells systemd that the manager is alive, as long as its pools' workers answer.
fn watch_over(manager: &Arc<Manager>) -> anyhow::Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    let manager = Arc::downgrade(manager);
    std::thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(move || {
            while let Some(manager) = manager.upgrade() {
                manager.is_alive();
                drop(manager);
                notify(&[NotifyState::Watchdog]);
                std::thread::sleep(limit.min(Duration::from_secs(60)) / 3);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
