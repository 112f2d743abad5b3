//! `smsvmm vm ...`: a running machine, through its management socket.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use api::storage::JobState;
use api::{
    DeviceState, DiskChange, DiskConfig, DiskLimits, Event, EventKind, NetConfig, OnError, VmName, VmStatus,
};
use management::{Client, ClientError, Removed, Scope, Target};
use serde_json::json;
use vmm::config::VmConfig;

use crate::cli::{
    DiskArguments, DiskSettingArguments, EventsArguments, MachineName, NetArguments, Place, VmArguments,
    VmCommand,
};
use crate::exit::{Exit, UsageError};
use crate::output::{print, print_json};
use crate::{machines, remote, serve, storage, terminal};

/// How long one request for events waits; the next one follows at once.
const FOLLOW_WAIT: Duration = Duration::from_secs(50);

pub(crate) fn execute(arguments: VmArguments) -> anyhow::Result<Exit> {
    let VmArguments { place, json, command } = arguments;
    let machine = |name: MachineName| place.named(name.name).client();
    match command {
        VmCommand::Define {
            file,
            autostart,
            restart,
            new,
        } => {
            let rules = (autostart, restart.into());
            machines::define(&place.manager()?, &file, rules, new, json)
        }
        VmCommand::List => machines::list(&place.manager()?, json),
        VmCommand::Start(name) => machines::start(&place.manager()?, &place.named(name.name).name()?, json),
        VmCommand::Shutdown { machine, no_wait } => {
            let name = place.named(machine.name).name()?;
            machines::shut_down(&place.manager()?, &name, !no_wait, json)
        }
        VmCommand::Delete(name) => machines::delete(&place.manager()?, &place.named(name.name).name()?),
        VmCommand::Status(name) => {
            let place = place.named(name.name);
            match place.is_managed()? {
                true => machines::status(&place.manager()?, &place.name()?, &place.client()?, json),
                false => status(&place.client()?, json),
            }
        }
        VmCommand::PowerButton(name) => act(&machine(name)?, "power-button"),
        VmCommand::Stop(name) => act(&machine(name)?, "stop"),
        VmCommand::Reset(name) => act(&machine(name)?, "reset"),
        VmCommand::Pause(name) => act(&machine(name)?, "pause"),
        VmCommand::Resume(name) => act(&machine(name)?, "resume"),
        VmCommand::AttachDisk(arguments) => attach_disk(&place.client()?, arguments, json),
        VmCommand::AttachNet(arguments) => attach_net(&place.client()?, arguments, json),
        VmCommand::SetDisk { id, settings } => set_disk(&place.client()?, &id, &settings, json),
        VmCommand::SetLimits { group, limits } => {
            set_limits(&place.client()?, &group, &limits.limits(), json)
        }
        VmCommand::Detach { id, timeout, no_wait } => detach(
            &place.client()?,
            &id,
            (!no_wait).then_some(timeout.duration()),
            json,
        ),
        VmCommand::Events { follow, after } => events(&place.client()?, follow, after, json, |_| true),
        VmCommand::Console { console, read_only } => match place.remote()? {
            Some(client) => terminal::remote_console(&client, console, read_only),
            None => terminal::console(place.console_config()?.as_deref(), console, read_only),
        },
    }
}

/// What a configuration is, as far as machines are concerned.
enum Kind {
    /// A machine's own.
    Machine,
    /// It leads to one machine over the network.
    Remote(Target),
    /// It leads to a host's manager: all of that, or one machine.
    Manager(Box<dyn Fn(Scope) -> anyhow::Result<Target>>),
}

impl Place {
    /// The same, with the machine that an argument names.
    fn named(&self, name: Option<VmName>) -> Self {
        Self {
            vm: name.or_else(|| self.vm.clone()),
            ..self.clone()
        }
    }

    fn config(&self) -> anyhow::Result<PathBuf> {
        self.config.clone().or_else(storage::default_config).ok_or_else(|| {
            UsageError::new(
                "name the machine by --socket PATH or --config vm.toml, or the host's manager by --config host.toml",
            )
            .into()
        })
    }

    fn kind(&self) -> anyhow::Result<(PathBuf, Kind)> {
        let path = self.config()?;
        if let Err(error) = std::fs::metadata(&path) {
            return Err(UsageError::new(format!("cannot read {}: {error}", path.display())).into());
        }
        match remote::target(&path, Scope::All)? {
            Some(Target::Remote(remote)) if remote.scope == Scope::All => {
                let scoped = move |scope| {
                    let remote = management::Remote {
                        scope,
                        ..(*remote).clone()
                    };
                    Ok(Target::Remote(Box::new(remote)))
                };
                return Ok((path, Kind::Manager(Box::new(scoped))));
            }
            Some(remote) => return Ok((path, Kind::Remote(remote))),
            None => {}
        }
        if !is_host(&path) {
            return Ok((path, Kind::Machine));
        }
        let socket = serve::config(&path)?.management.socket;
        let scoped = move |scope| Ok(Target::Manager(socket.clone(), scope));
        Ok((path, Kind::Manager(Box::new(scoped))))
    }

    /// Whether a manager knows the machine.
    fn is_managed(&self) -> anyhow::Result<bool> {
        Ok(self.socket.is_none() && matches!(self.kind()?.1, Kind::Manager(_)))
    }

    /// The host's manager.
    fn manager(&self) -> anyhow::Result<Client> {
        if self.socket.is_none()
            && let (_, Kind::Manager(scoped)) = self.kind()?
        {
            return Ok(Client::new(scoped(Scope::All)?)?);
        }
        Err(UsageError::new(
            "this is for machines of a host's manager: name that by --config host.toml, or by a file with [remote] that names no machine",
        )
        .into())
    }

    /// The name of a machine of a manager.
    fn name(&self) -> anyhow::Result<VmName> {
        self.vm
            .clone()
            .ok_or_else(|| UsageError::new("say which machine is meant; `smsvmm vm list` lists them").into())
    }

    /// The machine; of a manager all of it if no machine is named.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        if let Some(socket) = &self.socket {
            if self.config.is_some() {
                return Err(UsageError::new("name the machine by either --socket or --config").into());
            }
            return Ok(Client::new(socket)?);
        }
        let (path, kind) = self.kind()?;
        let target = match kind {
            Kind::Manager(scoped) => scoped(Scope::Machine(self.name()?.to_string()))?,
            _ if self.vm.is_some() => {
                let text = format!(
                    "{} is about one machine, and needs no name of one",
                    path.display()
                );
                return Err(UsageError::new(text).into());
            }
            Kind::Remote(target) => target,
            Kind::Machine => own_socket(&path)?,
        };
        Ok(Client::new(target)?)
    }

    /// The machine, if it is on another host.
    fn remote(&self) -> anyhow::Result<Option<Client>> {
        if self.socket.is_some() || self.config.is_none() && storage::default_config().is_none() {
            return Ok(None);
        }
        let is_remote = match self.kind()?.1 {
            Kind::Machine => false,
            Kind::Remote(_) => true,
            Kind::Manager(scoped) => matches!(scoped(Scope::All)?, Target::Remote(_)),
        };
        is_remote.then(|| self.client()).transpose()
    }

    /// The vm.toml that says where the machine's console leads.
    fn console_config(&self) -> anyhow::Result<Option<PathBuf>> {
        if self.socket.is_some() && self.config.is_none() {
            return Ok(None);
        }
        let (path, kind) = self.kind()?;
        match kind {
            Kind::Manager(scoped) if matches!(scoped(Scope::All)?, Target::Manager(..)) => {
                let machine = self.manager()?.machine(&self.name()?)?;
                if machine.pid.is_none() {
                    let name = &machine.name;
                    bail!(
                        "{name} is {}, and has no console; `smsvmm vm start {name}` starts it",
                        machine.state
                    );
                }
                Ok(Some(machine.config))
            }
            _ => Ok(Some(path)),
        }
    }
}

/// Whether a file is a host's configuration. What is wrong with it is said by who reads it as what it is.
fn is_host(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let table: Result<toml::Table, _> = toml::from_str(&text);
    table.is_ok_and(|table| table.contains_key("runtime"))
}

/// The socket of the machine that a vm.toml describes.
fn own_socket(path: &Path) -> anyhow::Result<Target> {
    let config = VmConfig::load(path, &[]).map_err(UsageError::new)?;
    match config.management {
        Some(management) => Ok(Target::Socket(management.socket)),
        None => Err(UsageError::new(format!(
            "{} has no management socket; add [management] with socket = \"{}.sock\" and start the machine again",
            path.display(),
            config.name
        ))
        .into()),
    }
}

pub(crate) fn status(client: &Client, json: bool) -> anyhow::Result<Exit> {
    let status = client.status()?;
    if json {
        print_json(&status)?;
    } else {
        print(&describe(&status)?)?;
    }
    Ok(Exit::Success)
}

fn describe(status: &VmStatus) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(
        text,
        "{}: {}, up {}, {} vCPUs, {} memory, {} resets, process {}",
        status.name,
        status.state,
        duration(status.uptime_seconds),
        status.cpus,
        status.memory,
        status.resets,
        status.pid
    )?;
    for disk in &status.disks {
        let config = &disk.config;
        let mode = if config.read_only { ", read-only" } else { "" };
        let settings = settings_of(config);
        let size = match config.vhost_user.is_some() && disk.size.bytes() == 0 {
            // An adapter with disks.
            true => "-".to_owned(),
            false => disk.size.to_string(),
        };
        writeln!(
            text,
            "disk  {:12} {:9} {:>8}  {}{mode}{settings}",
            config.id,
            state(disk.state),
            size,
            config
                .source()
                .map(|source| source.to_string())
                .unwrap_or_default()
        )?;
        if let Some(reason) = &disk.stopped {
            writeln!(
                text,
                "      stopped: {reason}; `smsvmm vm resume` has it tried again"
            )?;
        }
    }
    for (name, limits) in &status.limit_groups {
        writeln!(text, "limits {name:11} {}", limits_in_words(limits))?;
    }
    for net in &status.nets {
        let config = &net.config;
        let mac = config.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let leads = config
            .tap
            .as_ref()
            .map_or_else(|| "user network".to_owned(), |tap| format!("tap {tap}"));
        writeln!(
            text,
            "net   {:12} {:9} {mac}  {leads}",
            config.id,
            state(net.state)
        )?;
    }
    Ok(text)
}

/// What is set for a disk, other than usual.
fn settings_of(config: &DiskConfig) -> String {
    let mut text = String::new();
    for (target, lun) in config.places() {
        text += &format!(", target {target} LUN {lun}");
    }
    if !config.limits.is_empty() {
        text += &format!(", {}", limits_in_words(&config.limits));
    }
    if let Some(group) = &config.limit_group {
        text += &format!(", limits of {group}");
    }
    if let Some(poll) = config.poll_us {
        text += &format!(", polls for {poll} us");
    }
    if config.on_error == OnError::Stop {
        text += ", stops on error";
    }
    text
}

fn limits_in_words(limits: &DiskLimits) -> String {
    let operations = limits
        .operation_rate()
        .map(|(rate, burst)| format!("{rate} requests/s (burst {burst})"));
    let size = api::ByteSize::from_bytes;
    let bytes = limits
        .byte_rate()
        .map(|(rate, burst)| format!("{}/s (burst {})", size(rate), size(burst)));
    let parts: Vec<String> = operations.into_iter().chain(bytes).collect();
    match parts.is_empty() {
        true => "no limit".to_owned(),
        false => parts.join(", "),
    }
}

/// 93784 as "1d 2h 3m 4s", without leading zeroes.
pub(crate) fn duration(seconds: u64) -> String {
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3600 % 24, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ];
    let first = parts.iter().position(|(number, _)| *number > 0).unwrap_or(3);
    let parts: Vec<String> = parts[first..]
        .iter()
        .map(|(number, unit)| format!("{number}{unit}"))
        .collect();
    parts.join(" ")
}

pub(crate) fn state(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Attached => "attached",
        DeviceState::Active => "active",
        DeviceState::Removing => "removing",
        DeviceState::Waiting => "waiting",
        DeviceState::Failed => "failed",
    }
}

fn act(client: &Client, action: &str) -> anyhow::Result<Exit> {
    client.act(action)?;
    Ok(Exit::Success)
}

fn attach_disk(client: &Client, arguments: DiskArguments, json: bool) -> anyhow::Result<Exit> {
    let absolute = |path: &PathBuf| std::path::absolute(path).context("cannot find the current folder");
    let image = arguments.image.as_ref().map(absolute).transpose()?;
    let vhost_user = arguments.vhost_user.as_ref().map(absolute).transpose()?;
    let defaults = DiskConfig::new("");
    let disk = DiskConfig {
        image,
        file: arguments.file,
        pool: arguments.pool,
        vhost_user,
        id: arguments.id.unwrap_or_default(),
        bus: arguments.bus,
        target: arguments.target,
        lun: arguments.lun,
        read_only: arguments.read_only,
        serial: arguments.serial,
        queues: arguments.queues,
        queue_size: arguments.queue_size.unwrap_or(defaults.queue_size),
        direct: !arguments.buffered,
        poll_us: arguments.settings.poll_us.filter(|poll| *poll > 0),
        limits: arguments.settings.limits.limits(),
        limit_group: arguments.limit_group,
        on_error: arguments.settings.on_error.unwrap_or_default(),
        ..defaults
    };
    disk.check().map_err(wrong_argument)?;
    let status = client.attach_disk(&disk)?;
    if json {
        print_json(&status)?;
    } else {
        print(&format!("{}\n", status.config.id))?;
    }
    Ok(Exit::Success)
}

fn set_disk(
    client: &Client,
    id: &api::DeviceId,
    settings: &DiskSettingArguments,
    json: bool,
) -> anyhow::Result<Exit> {
    let change = DiskChange {
        limits: settings.limits.limits(),
        poll_us: settings.poll_us,
        on_error: settings.on_error,
    };
    if change == DiskChange::default() {
        return Err(
            UsageError::new("say what to change, for example --limit-iops 500 or --poll-us 50").into(),
        );
    }
    let status = client.change_disk(id, &change)?;
    if json {
        print_json(&status)?;
    } else {
        let settings = settings_of(&status.config);
        let shown = settings.strip_prefix(", ").unwrap_or("no limit");
        print(&format!("{id}: {shown}\n"))?;
    }
    Ok(Exit::Success)
}

fn set_limits(
    client: &Client,
    group: &api::DeviceId,
    limits: &DiskLimits,
    json: bool,
) -> anyhow::Result<Exit> {
    if limits.is_empty() {
        return Err(UsageError::new("say what to change, for example --limit-iops 500").into());
    }
    let limits = client.change_limits(group, limits)?;
    if json {
        print_json(&limits)?;
    } else {
        print(&format!("{group}: {}\n", limits_in_words(&limits)))?;
    }
    Ok(Exit::Success)
}

fn attach_net(client: &Client, arguments: NetArguments, json: bool) -> anyhow::Result<Exit> {
    let defaults = NetConfig::new(arguments.backend());
    let net = NetConfig {
        id: arguments.id.unwrap_or_default(),
        tap: arguments.tap,
        mac: arguments.mac,
        queues: arguments.queues,
        queue_size: arguments.queue_size.unwrap_or(defaults.queue_size),
        mtu: arguments.mtu,
        forward: arguments.forward,
        offload: !arguments.no_offload,
        ..defaults
    };
    net.check().map_err(wrong_argument)?;
    let status = client.attach_net(&net)?;
    if json {
        print_json(&status)?;
    } else {
        print(&format!("{}\n", status.config.id))?;
    }
    Ok(Exit::Success)
}

fn wrong_argument((key, error): (&'static str, api::InvalidValue)) -> UsageError {
    UsageError::new(format!("--{}: {error}", key.replace("limits.", "limit-")))
}

fn detach(
    client: &Client,
    id: &api::DeviceId,
    patience: Option<Duration>,
    json: bool,
) -> anyhow::Result<Exit> {
    let removal = client.detach(id)?;
    let removed = match patience {
        None => Removed::Pending,
        Some(patience) => client.wait_for_removal(&removal, patience)?,
    };
    let state = match &removed {
        Removed::Done => "removed",
        Removed::Refused(_) => "refused",
        Removed::Pending => "removing",
    };
    if json {
        print_json(&json!({ "id": id, "state": state }))?;
    }
    match (removed, patience) {
        (Removed::Done, _) | (Removed::Pending, None) => Ok(Exit::Success),
        (Removed::Refused(reason), _) => bail!("the guest does not let {id} go: {reason}"),
        (Removed::Pending, Some(patience)) => bail!(
            "the guest has not let {id} go within {} seconds and may still do so; is it in use there, does the guest run?",
            patience.as_secs()
        ),
    }
}

/// What happened to the pool that a process has open.
pub(crate) fn pool_events(arguments: EventsArguments) -> anyhow::Result<Exit> {
    let EventsArguments {
        process,
        follow,
        after,
    } = arguments;
    let target = storage::process(&process)?;
    // Of a machine that has a pool, `vm events` tells the rest; of a manager this is where all is told.
    let is_host = !target.is_machine();
    let wanted = move |event: &Event| is_host || matches!(event.kind, EventKind::Pool { .. });
    events(&Client::new(target)?, follow, after, process.json, wanted)
}

/// Prints those that are `wanted`.
fn events(
    client: &Client,
    follow: bool,
    mut after: u64,
    json: bool,
    wanted: impl Fn(&Event) -> bool,
) -> anyhow::Result<Exit> {
    loop {
        let page = match client.events(after, if follow { FOLLOW_WAIT } else { Duration::ZERO }) {
            // The machine may end before we see its last event.
            Err(ClientError::Connect { .. } | ClientError::Broken(_)) if follow && after > 0 => {
                return Ok(Exit::Success);
            }
            other => other?,
        };
        if page.missed > 0 && !json {
            print(&format!("({} earlier events are no longer kept)\n", page.missed))?;
        }
        for event in page.events.iter().filter(|event| wanted(event)) {
            let line = if json {
                serde_json::to_string(event)?
            } else {
                line_of(event)
            };
            print(&format!("{line}\n"))?;
        }
        let stopped = page
            .events
            .iter()
            .any(|event| matches!(event.kind, EventKind::Stopped { .. }));
        if stopped || (!follow && page.events.is_empty()) {
            return Ok(Exit::Success);
        }
        after = page.last;
    }
}

/// Whose guest did something: in the log of a manager that is said.
fn guest_of(vm: Option<&VmName>) -> String {
    vm.map_or_else(|| "the guest".to_owned(), |vm| format!("the guest of {vm}"))
}

fn line_of(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::Started => "started".to_owned(),
        EventKind::PowerButtonPressed => "power button pressed".to_owned(),
        EventKind::Reset { cause } => format!("reset ({cause})"),
        EventKind::Paused => "paused".to_owned(),
        EventKind::Resumed => "resumed".to_owned(),
        EventKind::DeviceAttached { id } => format!("{id} attached"),
        EventKind::DeviceActive { id } => format!("{id} in use by the guest"),
        EventKind::DeviceRemoving { id } => format!("{id}: the guest was asked to let it go"),
        EventKind::DeviceRemoved { id } => format!("{id} removed"),
        EventKind::DeviceRemoveRefused { id, reason } => {
            format!("{id}: the guest does not let it go: {reason}")
        }
        EventKind::DeviceFailed { id, reason } => format!("{id} failed: {reason}"),
        EventKind::DiskStopped { id, reason } => format!("{id} stopped: {reason}"),
        EventKind::DiskServerLost { id, reason } => {
            format!("{id} waits for the process that serves it: {reason}")
        }
        EventKind::DiskServerBack { id } => format!("{id}: the process that serves it is back"),
        EventKind::DebugLine { text, microseconds } => format!("debug port after {microseconds} us: {text}"),
        EventKind::GuestCommand {
            vm,
            command,
            object,
            failure,
        } => match failure {
            None => format!("{} had {command} done: {object}", guest_of(vm.as_ref())),
            Some(failure) => format!(
                "{} wanted {command} of {object}, which failed: {failure}",
                guest_of(vm.as_ref())
            ),
        },
        EventKind::GuestCommandRefused {
            vm,
            command,
            reason,
            unlisted,
        } => match unlisted {
            0 => format!("{command} from {} was refused: {reason}", guest_of(vm.as_ref())),
            more => format!(
                "{command} from {} was refused: {reason} (and {more} before)",
                guest_of(vm.as_ref())
            ),
        },
        EventKind::GuestJobEnded {
            vm,
            job,
            what,
            state,
            reason,
        } => {
            let whose = format!("job {job} of {}", guest_of(vm.as_ref()));
            match (state, reason) {
                (JobState::Failed, Some(reason)) => format!("{whose} failed: {what}: {reason}"),
                (JobState::Cancelled, _) => format!("{whose} was cancelled: {what}"),
                _ => format!("{whose} is done: {what}"),
            }
        }
        EventKind::ManagerStarted { version } => format!("the manager is ready (version {version})"),
        EventKind::ManagerStopping { reason } => format!("the manager ends: {reason}"),
        EventKind::MachineDefined { vm } => format!("{vm} defined"),
        EventKind::MachineDeleted { vm } => format!("{vm} deleted"),
        EventKind::MachineStarted { vm, pid } => format!("{vm} started, process {pid}"),
        EventKind::MachineFound { vm, pid } => format!("{vm} runs already, process {pid}"),
        EventKind::MachineEnded {
            vm,
            reason,
            restart_seconds,
        } => match restart_seconds {
            None => format!("{vm} ended: {reason}"),
            Some(seconds) => format!("{vm} ended: {reason}; it is started again in {seconds} s"),
        },
        EventKind::DiskAttached { vm, id, file } => format!("{vm} uses {file} as {id}"),
        EventKind::DiskDetached { vm, id, file } => format!("{vm} uses {file} ({id}) no more"),
        EventKind::Pool { pool, text, .. } => format!("pool {pool}: {text}"),
        EventKind::Stopped { reason } => reason.to_string(),
    };
    format!("{:>5}  {}  {what}", event.sequence, clock(event.time_ms))
}

/// Time of day (UTC) of milliseconds since 1970.
pub(crate) fn clock(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    format!(
        "{:02}:{:02}:{:02}.{:03}Z",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
        milliseconds % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_for_people() {
        assert_eq!(duration(0), "0s");
        assert_eq!(duration(61), "1m 1s");
        assert_eq!(duration(93_784), "1d 2h 3m 4s");
        assert_eq!(clock(1_000 * (86_400 * 3 + 3600 + 62) + 7), "01:01:02.007Z");
    }
}
