//! `smsvmm vm ...`: a running machine, through its management socket.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use api::{DeviceState, DiskChange, DiskConfig, DiskLimits, Event, EventKind, NetConfig, OnError, VmStatus};
use management::{Client, ClientError, Removed, Target};
use serde_json::json;
use vmm::config::VmConfig;

use crate::cli::{
    DiskArguments, DiskSettingArguments, EventsArguments, NetArguments, VmArguments, VmCommand,
};
use crate::exit::{Exit, UsageError};
use crate::output::{print, print_json};
use crate::{remote, storage, terminal};

/// How long one request for events waits; the next one follows at once.
const FOLLOW_WAIT: Duration = Duration::from_secs(50);

pub(crate) fn execute(arguments: VmArguments) -> anyhow::Result<Exit> {
    let VmArguments {
        socket,
        config,
        json,
        command,
    } = arguments;
    if let VmCommand::Console { console } = command {
        return terminal::console(config.as_deref(), console);
    }
    let client = Client::new(find(socket, config)?)?;
    match command {
        VmCommand::Status => status(&client, json),
        VmCommand::PowerButton => act(&client, "power-button"),
        VmCommand::Stop => act(&client, "stop"),
        VmCommand::Reset => act(&client, "reset"),
        VmCommand::Pause => act(&client, "pause"),
        VmCommand::Resume => act(&client, "resume"),
        VmCommand::AttachDisk(arguments) => attach_disk(&client, arguments, json),
        VmCommand::AttachNet(arguments) => attach_net(&client, arguments, json),
        VmCommand::SetDisk { id, settings } => set_disk(&client, &id, &settings, json),
        VmCommand::SetLimits { group, limits } => set_limits(&client, &group, &limits.limits(), json),
        VmCommand::Detach { id, timeout, no_wait } => {
            detach(&client, &id, (!no_wait).then_some(timeout.duration()), json)
        }
        VmCommand::Events { follow, after } => events(&client, follow, after, json, |_| true),
        VmCommand::Console { .. } => Ok(Exit::Success),
    }
}

/// The machine by its socket, or by a configuration that names its socket or its gateway.
fn find(socket: Option<PathBuf>, config: Option<PathBuf>) -> anyhow::Result<Target> {
    let path = match (socket, config) {
        (Some(socket), None) => return Ok(Target::Socket(socket)),
        (None, Some(config)) => config,
        _ => {
            return Err(
                UsageError::new("name the machine either by --socket PATH or by --config vm.toml").into(),
            );
        }
    };
    if let Some(remote) = remote::target(&path)? {
        return Ok(remote);
    }
    let config = VmConfig::load(&path, &[]).map_err(UsageError::new)?;
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

fn status(client: &Client, json: bool) -> anyhow::Result<Exit> {
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
    let client = Client::new(storage::process(&process)?)?;
    let of_pools = |event: &Event| matches!(event.kind, EventKind::Pool { .. });
    events(&client, follow, after, process.json, of_pools)
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
            command,
            object,
            failure,
        } => match failure {
            None => format!("the guest had {command} done: {object}"),
            Some(failure) => format!("the guest wanted {command} of {object}, which failed: {failure}"),
        },
        EventKind::GuestCommandRefused {
            command,
            reason,
            unlisted,
        } => match unlisted {
            0 => format!("{command} from the guest was refused: {reason}"),
            more => format!("{command} from the guest was refused: {reason} (and {more} before)"),
        },
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
