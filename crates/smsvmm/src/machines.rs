//! `smsvmm vm define|list|start|shutdown|delete`: the machines that a host's manager knows.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use api::{MachineDefinition, MachineState, MachineStatus, RestartPolicy, VmName};
use management::Client;

use crate::exit::{Exit, UsageError};
use crate::output::{print, print_json};
use crate::storage::Table;
use crate::vm;

/// Between two looks at a machine.
const LOOK: Duration = Duration::from_millis(100);
/// Characters of a reason in the list of machines.
const SHORT: usize = 60;
/// For so long a machine that was started may not answer before one goes without an answer.
const START: Duration = Duration::from_secs(20);

/// Has the manager know a machine; `new`: one that it does not know yet.
pub(crate) fn define(
    manager: &Client,
    file: &Path,
    (autostart, restart): (bool, RestartPolicy),
    new: bool,
    json: bool,
) -> anyhow::Result<Exit> {
    let text = std::fs::read_to_string(file).map_err(UsageError::new);
    let config = text.with_context(|| format!("cannot read {}", file.display()))?;
    let table: toml::Table = crate::toml_file::parse(file, &config)?;
    let name = table
        .get("name")
        .and_then(toml::Value::as_str)
        .unwrap_or_default();
    let name: VmName = name
        .parse()
        .map_err(|error| UsageError::new(format!("{}: name: {error}", file.display())))?;
    let path = std::path::absolute(file).context("cannot find the current folder")?;
    let definition = MachineDefinition {
        config,
        folder: path.parent().map(Path::to_path_buf),
        autostart,
        restart,
    };
    let status = match new {
        true => manager.define_new(&name, &definition)?,
        false => manager.define(&name, &definition)?,
    };
    if json {
        print_json(&status)?;
        return Ok(Exit::Success);
    }
    let next = match status.state {
        MachineState::Stopped | MachineState::Failed => format!("`smsvmm vm start {name}` starts it"),
        _ => "the change counts when it is started next".to_owned(),
    };
    print(&format!("{name} is defined; {next}\n"))?;
    Ok(Exit::Success)
}

/// Shows all machines.
pub(crate) fn list(manager: &Client, json: bool) -> anyhow::Result<Exit> {
    // A gateway tells less in its list of machines.
    let machines = manager.host()?.machines;
    if json {
        print_json(&machines)?;
        return Ok(Exit::Success);
    }
    print(&table(&machines))?;
    Ok(Exit::Success)
}

fn table(machines: &[MachineStatus]) -> String {
    if machines.is_empty() {
        return "no machines; `smsvmm vm define vm.toml` makes one known\n".to_owned();
    }
    let heading = [
        "NAME",
        "STATE",
        "PROCESS",
        "VCPUS",
        "MEMORY",
        "RESTART",
        "AUTOSTART",
        "LAST END",
    ];
    let mut table = Table::new(&heading, &[2, 3, 4]);
    for machine in machines {
        table.row([
            machine.name.to_string(),
            machine.state.to_string(),
            machine.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            machine.cpus.to_string(),
            machine.memory.to_string(),
            machine.restart.to_string(),
            if machine.autostart { "yes" } else { "no" }.to_owned(),
            machine.last_end.as_deref().map_or_else(|| "-".to_owned(), short),
        ]);
    }
    table.text()
}

/// As much of a text as fits into a line; `vm status` shows all of it.
fn short(text: &str) -> String {
    match text.char_indices().nth(SHORT) {
        Some((end, _)) => format!("{}...", text[..end].trim_end()),
        None => text.to_owned(),
    }
}

/// Shows one machine, as its manager knows it and, if it runs, as it is itself.
pub(crate) fn status(manager: &Client, name: &VmName, machine: &Client, json: bool) -> anyhow::Result<Exit> {
    let known = manager.machine(name)?;
    if matches!(known.state, MachineState::Running | MachineState::Stopping) {
        let shown = vm::status(machine, json);
        if !json {
            print(&whose(&known))?;
        }
        return shown;
    }
    match json {
        true => print_json(&known)?,
        false => print(&in_words(&known))?,
    }
    Ok(Exit::Success)
}

fn in_words(machine: &MachineStatus) -> String {
    let mut text = format!(
        "{}: {}, {} vCPUs, {} memory, restart {}\n",
        machine.name, machine.state, machine.cpus, machine.memory, machine.restart
    );
    if let Some(end) = &machine.last_end {
        text += &format!("last end: {end}\n");
    }
    text + &format!("log: {}\n", machine.log.display())
}

/// As whom, and where, its process runs.
fn whose(machine: &MachineStatus) -> String {
    let user = match machine.user {
        Some(user) => format!("user {user}"),
        None => "the manager's user".to_owned(),
    };
    match &machine.control_group {
        Some(group) => format!("process of {user}, control group {}\n", group.display()),
        None => format!("process of {user}, no control group of its own\n"),
    }
}

/// Starts a machine, and waits until its process answers.
pub(crate) fn start(manager: &Client, name: &VmName, json: bool) -> anyhow::Result<Exit> {
    let mut status = manager.act_on_machine(name, "start")?;
    let end = Instant::now() + START;
    while status.state == MachineState::Starting && Instant::now() < end {
        std::thread::sleep(LOOK);
        status = manager.machine(name)?;
    }
    if json {
        print_json(&status)?;
    }
    match (status.state, status.pid) {
        (MachineState::Running | MachineState::Starting, Some(pid)) => {
            if !json {
                print(&format!("{name}: {}, process {pid}\n", status.state))?;
            }
            Ok(Exit::Success)
        }
        _ => bail!(
            "{name} is {}: {}; its log is {}",
            status.state,
            status.last_end.as_deref().unwrap_or("it gave no reason"),
            status.log.display()
        ),
    }
}

/// Has a guest shut down, and waits for that.
pub(crate) fn shut_down(manager: &Client, name: &VmName, wait: bool, json: bool) -> anyhow::Result<Exit> {
    let mut status = manager.act_on_machine(name, "shutdown")?;
    // How long it may take says the machine's configuration.
    while wait && !matches!(status.state, MachineState::Stopped | MachineState::Failed) {
        std::thread::sleep(LOOK);
        status = manager.machine(name)?;
    }
    match json {
        true => print_json(&status)?,
        false => {
            let end = status.last_end.as_deref().filter(|_| wait);
            let end = end.map(|end| format!(": {end}")).unwrap_or_default();
            print(&format!("{name}: {}{end}\n", status.state))?;
        }
    }
    Ok(Exit::Success)
}

/// Has the manager forget a machine.
pub(crate) fn delete(manager: &Client, name: &VmName) -> anyhow::Result<Exit> {
    manager.delete_machine(name)?;
    print(&format!("{name} is forgotten; its disks stay\n"))?;
    Ok(Exit::Success)
}
