//! `smsvmm run`.

use std::sync::Arc;

use anyhow::Context;
use api::Vm;
use expanded_target::{ExpandedTarget, Hook};
use management::Server;
use storage_virtualizer::scsi::VendorCommands;
use vmm::config::VmConfig;
use vmm::host;
use vmm::machine::{self, PoolDisks};
use vmm::sandbox::Kind;

use crate::cli::RunArguments;
use crate::exit::{Exit, UsageError};
use crate::pool::VmPool;
use crate::signals::Signals;
use crate::{logs, preflight};

pub(crate) fn run(arguments: &RunArguments) -> anyhow::Result<Exit> {
    let config = VmConfig::load(&arguments.config, &arguments.overrides).map_err(UsageError::new)?;
    if arguments.dry_run {
        return preflight::report(&config, arguments.json);
    }
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
    let disks = pool.clone().map(|pool| pool as Arc<dyn PoolDisks>);
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
            expanded.start(Arc::clone(&control), hook)
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
    Ok(Exit::from(&reason))
}
