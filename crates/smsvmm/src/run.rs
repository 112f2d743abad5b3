//! `smsvmm run`.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use anyhow::Context;
use api::Vm;
use expanded_target::{ExpandedTarget, Hook};
use host_manager::Report;
use management::Server;
use storage_virtualizer::scsi::VendorCommands;
use vmm::config::VmConfig;
use vmm::host;
use vmm::machine::{self, Pools};
use vmm::sandbox::Kind;

use crate::cli::RunArguments;
use crate::exit::{Exit, UsageError};
use crate::guest::Guest;
use crate::manager_disks::ManagedDisks;
use crate::pool::VmPool;
use crate::signals::Signals;
use crate::{debug, logs, preflight};

pub(crate) fn run(arguments: &RunArguments) -> anyhow::Result<Exit> {
    // What confines the process allows to write to what is open, and nothing else.
    let report = arguments
        .report
        .as_ref()
        .map(|path| File::create(path).with_context(|| format!("cannot write {}", path.display())));
    let report = report.transpose()?;
    let ended = live(arguments);
    if let Some(report) = report {
        let (exit, text) = match &ended {
            Ok((exit, text)) => (*exit, text.clone()),
            Err(error) if error.is::<UsageError>() => (Exit::Usage, format!("{error:#}")),
            Err(error) => (Exit::Failed, format!("{error:#}")),
        };
        let written = serde_json::to_vec(&Report {
            status: exit as u8,
            text,
        });
        // The manager gets the exit status at least.
        drop(written.map(|bytes| (&report).write_all(&bytes)));
    }
    ended.map(|(exit, _)| exit)
}

/// A machine from its configuration to its end; how it ended, and that in words.
fn live(arguments: &RunArguments) -> anyhow::Result<(Exit, String)> {
    let config = VmConfig::load(&arguments.config, &arguments.overrides).map_err(UsageError::new)?;
    if arguments.dry_run {
        return Ok((preflight::report(&config, arguments.json)?, String::new()));
    }
    debug::tell_on_panic();
    // Before any thread exists, so that all inherit the mask.
    let signals = Signals::block().context("cannot block signals")?;
    let micro_guest = host::can_boot_stock_kernel()?;
    preflight::check_processors(&config)?;
    config.disks.iter().try_for_each(preflight::check_contents)?;
    let name = config.name.clone();
    let patience = config.power.shutdown_timeout.duration();
    // Before anything is opened: a second start of the same machine ends here.
    let server = config
        .management
        .as_ref()
        .map(|management| Server::bind(&management.socket))
        .transpose()?;
    // First of all that starts threads: each confines itself.
    let sandbox = machine::Vm::prepare_sandbox(&config)?;
    let expanded = config
        .expanded_api
        .enabled
        .then(|| ExpandedTarget::new(config.name.clone(), config.expanded_api.clone()));
    let vendor = expanded
        .clone()
        .map(|expanded| Arc::new(expanded) as Arc<dyn VendorCommands>);
    let pool = VmPool::open(&config, &sandbox)?;
    let disks = match &pool {
        Some(pool) => Pools::Own(pool.clone()),
        None if config.manager.is_some() => Pools::Manager(Arc::new(ManagedDisks::new(&config))),
        None => Pools::None,
    };
    let machine = match machine::Vm::open(config, sandbox.clone(), disks, vendor) {
        Ok(machine) => machine,
        Err(error) => {
            // What matters is why it does not start.
            let _ = pool.map_or(Ok(()), |pool| pool.close());
            return Err(error.into());
        }
    };
    let control = machine.control();
    if let Some(pool) = &pool {
        pool.record_events(Arc::clone(control.event_log()));
    }
    let control: Arc<dyn Vm> = Arc::new(control);
    let server = server
        .map(|server| server.start(Arc::clone(&control), sandbox.thread(Kind::Management)))
        .transpose()
        .context("cannot start the management server")?;
    let expanded = expanded
        .map(|expanded| {
            let hook = || Box::new(sandbox.thread(Kind::Management)) as Hook;
            expanded.start(Arc::new(Guest::new(&name, &control, pool.as_ref())), hook)
        })
        .transpose()
        .context("cannot start what serves the guest's expanded API")?;
    signals.serve(control, patience, sandbox.thread(Kind::Signals))?;
    let ended = machine.run(micro_guest);
    drop((server, expanded));
    let closed = pool.map_or(Ok(()), |pool| pool.close());
    let reason = ended?;
    closed?;
    logs::say(&format!("smsvmm: {name}: {reason}"));
    Ok((Exit::from(&reason), reason.to_string()))
}
