//! The machine's log of events as its guest may see it: nothing of the host's files, devices and reasons.

use api::storage::JobState;
use api::{Event, EventKind, EventLog};
use expanded_api::{GuestEvent, GuestEvents};

/// Most events of the log that are looked at for one answer.
const PAGE: usize = 256;

/// What happened after `after`.
pub(crate) fn page(log: &EventLog, after: u64) -> GuestEvents {
    let page = log.page(after, PAGE);
    GuestEvents {
        events: page.events.into_iter().filter_map(shown).collect(),
        last: page.last,
        missed: page.missed,
    }
}

fn shown(event: Event) -> Option<GuestEvent> {
    let (name, object, reason) = match event.kind {
        EventKind::Started => ("started", None, None),
        EventKind::Reset { .. } => ("reset", None, None),
        EventKind::Paused => ("paused", None, None),
        EventKind::Resumed => ("resumed", None, None),
        EventKind::DeviceAttached { id } => ("device-attached", Some(id.to_string()), None),
        EventKind::DeviceActive { id } => ("device-active", Some(id.to_string()), None),
        EventKind::DeviceRemoving { id } => ("device-removing", Some(id.to_string()), None),
        EventKind::DeviceRemoved { id } => ("device-removed", Some(id.to_string()), None),
        EventKind::DeviceRemoveRefused { id, .. } => ("device-remove-refused", Some(id.to_string()), None),
        EventKind::DiskStopped { id, .. } => ("disk-stopped", Some(id.to_string()), None),
        EventKind::GuestCommand {
            command,
            object,
            failure,
            ..
        } => ("guest-command", Some(format!("{command} {object}")), failure),
        EventKind::GuestCommandRefused { command, reason, .. } => {
            ("guest-command-refused", Some(command), Some(reason))
        }
        EventKind::GuestJobEnded {
            job,
            what,
            state,
            reason,
            ..
        } => {
            let name = match state {
                JobState::Failed => "job-failed",
                JobState::Cancelled => "job-cancelled",
                _ => "job-done",
            };
            (name, Some(format!("job {job}: {what}")), reason)
        }
        // The host's affairs.
        EventKind::PowerButtonPressed
        | EventKind::DeviceFailed { .. }
        | EventKind::DiskServerLost { .. }
        | EventKind::DiskServerBack { .. }
        | EventKind::DebugLine { .. }
        | EventKind::ManagerStarted { .. }
        | EventKind::ManagerStopping { .. }
        | EventKind::MachineDefined { .. }
        | EventKind::MachineDeleted { .. }
        | EventKind::MachineStarted { .. }
        | EventKind::MachineFound { .. }
        | EventKind::MachineEnded { .. }
        | EventKind::DiskAttached { .. }
        | EventKind::DiskDetached { .. }
        | EventKind::Pool { .. }
        | EventKind::Stopped { .. } => return None,
    };
    Some(GuestEvent {
        sequence: event.sequence,
        time_ms: event.time_ms,
        event: name.to_owned(),
        object,
        reason,
    })
}
