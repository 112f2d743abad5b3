//! What happened to a machine, in order: a bounded log with sequence numbers that never repeat.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::storage::{JobState, PoolEventKind};
use crate::{DeviceId, ExitReason, VmName};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// 1 for the first event of the process, then one more each time.
    pub sequence: u64,
    /// When, in milliseconds since 1970 (UTC); for people, never for order.
    pub time_ms: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The vCPUs run for the first time.
    Started,
    /// The power button was pressed; it is up to the guest what follows.
    PowerButtonPressed,
    /// The machine was reset, by the guest's wish or the administrator's.
    Reset {
        /// Who asked and how, for example `guest: ACPI reset register`.
        cause: String,
    },
    /// The vCPUs stand still.
    Paused,
    /// The vCPUs run again.
    Resumed,
    /// A device was added to the running machine.
    DeviceAttached {
        /// Which.
        id: DeviceId,
    },
    /// The guest's driver took a device into use.
    DeviceActive {
        /// Which.
        id: DeviceId,
    },
    /// The guest was asked to let a device go.
    DeviceRemoving {
        /// Which.
        id: DeviceId,
    },
    /// The guest let it go and the host has closed it: its identifier and its file are free again.
    DeviceRemoved {
        /// Which.
        id: DeviceId,
    },
    /// The guest does not let it go; it stays attached.
    DeviceRemoveRefused {
        /// Which.
        id: DeviceId,
        /// Why.
        reason: String,
    },
    /// A device stopped; a guest reset revives it.
    DeviceFailed {
        /// Which.
        id: DeviceId,
        /// Why.
        reason: String,
    },
    /// A disk with `on-error = "stop"` failed a request: the machine is paused, and the request is tried again when it is resumed.
    DiskStopped {
        /// Which.
        id: DeviceId,
        /// What the disk said.
        reason: String,
    },
    /// The process that serves a disk has gone; the guest's requests wait for it to come back.
    DiskServerLost {
        /// Which disk.
        id: DeviceId,
        /// How it was seen.
        reason: String,
    },
    /// The process that serves a disk is back; the guest's requests go on.
    DiskServerBack {
        /// Which disk.
        id: DeviceId,
    },
    /// The guest wrote a line to the debug port (0xE9).
    DebugLine {
        /// The line.
        text: String,
        /// When, in microseconds since the machine was started.
        microseconds: u64,
    },
    /// The guest had storage management do something through one of its disks.
    GuestCommand {
        /// Whose guest, in the log of a host's manager.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmName>,
        /// The command, as in the expanded API.
        command: String,
        /// What it was done to.
        object: String,
        /// Why it failed; none if it is done.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<String>,
    },
    /// The guest sent a command of the expanded API that was refused: forged, too large, or more than it may.
    GuestCommandRefused {
        /// Whose guest, in the log of a host's manager.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmName>,
        /// The command, as far as it could be told.
        command: String,
        /// Why.
        reason: String,
        /// So many more were refused since the last such event, of which none tells.
        #[serde(default, skip_serializing_if = "is_zero")]
        unlisted: u64,
    },
    /// A job that the guest had begun through one of its disks has ended.
    GuestJobEnded {
        /// Whose guest, in the log of a host's manager.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmName>,
        /// Its number.
        job: u32,
        /// What it did to what, in words.
        what: String,
        /// How it ended.
        state: JobState,
        /// Why it failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Something happened to a pool that is open in this process.
    Pool {
        /// Name of the pool.
        pool: String,
        /// What.
        kind: PoolEventKind,
        /// What, for people.
        text: String,
    },
    /// The manager of the host is ready.
    ManagerStarted {
        /// Its version.
        version: String,
    },
    /// The manager of the host ends.
    ManagerStopping {
        /// Why.
        reason: String,
    },
    /// A machine was defined, or its definition changed.
    MachineDefined {
        /// Which.
        vm: VmName,
    },
    /// A machine's definition was deleted.
    MachineDeleted {
        /// Which.
        vm: VmName,
    },
    /// A machine's process was started.
    MachineStarted {
        /// Which.
        vm: VmName,
        /// The process.
        pid: u32,
    },
    /// A machine's process that ran before the manager did is watched.
    MachineFound {
        /// Which.
        vm: VmName,
        /// The process.
        pid: u32,
    },
    /// A machine's process has ended.
    MachineEnded {
        /// Which.
        vm: VmName,
        /// How, in words.
        reason: String,
        /// So many seconds later it is started again; none if it is not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart_seconds: Option<u64>,
    },
    /// A machine uses a disk of a pool.
    DiskAttached {
        /// Which machine.
        vm: VmName,
        /// The disk's name in it.
        id: DeviceId,
        /// The disk's path.
        file: String,
    },
    /// A machine uses a disk of a pool no more.
    DiskDetached {
        /// Which machine.
        vm: VmName,
        /// The disk's name in it.
        id: DeviceId,
        /// The disk's path.
        file: String,
    },
    /// The machine ended; the last event.
    Stopped {
        /// Why.
        reason: ExitReason,
    },
}

impl EventKind {
    /// The same in the log of a host's manager, where it must be said whose guest it was.
    #[must_use]
    pub fn of_machine(mut self, name: &VmName) -> Self {
        if let Self::GuestCommand { vm, .. }
        | Self::GuestCommandRefused { vm, .. }
        | Self::GuestJobEnded { vm, .. } = &mut self
        {
            *vm = Some(name.clone());
        }
        self
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Events after a given sequence number: the answer of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventPage {
    /// In ascending order; empty if nothing happened in the time that the caller was ready to wait.
    pub events: Vec<Event>,
    /// The number to ask after next time.
    pub last: u64,
    /// How many events after the given number are no longer kept.
    pub missed: u64,
}

/// The log of events of one machine: keeps the last [`EventLog::CAPACITY`], wakes who waits.
#[derive(Default)]
pub struct EventLog {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    events: VecDeque<Event>,
    last: u64,
    listeners: Vec<Box<dyn Fn(u64) + Send>>,
}

impl EventLog {
    /// How many events are kept.
    pub const CAPACITY: usize = 1024;

    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// A log that goes on after `events`, which have ascending numbers; the next one is above `last` and all of them.
    pub fn resumed(events: Vec<Event>, last: u64) -> Self {
        let last = events.last().map_or(last, |event| last.max(event.sequence));
        let dropped = events.len().saturating_sub(Self::CAPACITY);
        let inner = Inner {
            events: events.into_iter().skip(dropped).collect(),
            last,
            listeners: Vec::new(),
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    /// Appends an event with the present time and tells all listeners; returns its number.
    pub fn record(&self, kind: EventKind) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut inner = self.lock();
        inner.last += 1;
        let event = Event {
            sequence: inner.last,
            time_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            kind,
        };
        if inner.events.len() == Self::CAPACITY {
            inner.events.pop_front();
        }
        inner.events.push_back(event);
        for listener in &inner.listeners {
            listener(inner.last);
        }
        inner.last
    }

    /// Up to `limit` events with numbers above `after`.
    pub fn page(&self, after: u64, limit: usize) -> EventPage {
        let inner = self.lock();
        let oldest = inner
            .events
            .front()
            .map_or(inner.last + 1, |event| event.sequence);
        let events: Vec<Event> = inner
            .events
            .iter()
            .filter(|event| event.sequence > after)
            .take(limit)
            .cloned()
            .collect();
        EventPage {
            last: events
                .last()
                .map_or(after.max(inner.last), |event| event.sequence),
            missed: oldest.saturating_sub(after.saturating_add(1)),
            events,
        }
    }

    /// Number of the newest event, 0 if there is none.
    pub fn last(&self) -> u64 {
        self.lock().last
    }

    /// Calls `listener` with the number of each new event, in the thread that records it and under the log's lock: it must
    /// not block and not use the log.
    pub fn listen(&self, listener: impl Fn(u64) + Send + 'static) {
        self.lock().listeners.push(Box::new(listener));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Each change of `Inner` is complete at every point where a listener could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for EventLog {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("EventLog")
            .field("last", &self.last())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_reader_goes_on_where_it_stopped() {
        let log = EventLog::new();
        log.record(EventKind::Started);
        log.record(EventKind::Paused);
        let page = log.page(0, 1);
        assert_eq!((page.events.len(), page.last, page.missed), (1, 1, 0));
        let page = log.page(page.last, 10);
        assert_eq!(page.events[0].kind, EventKind::Paused);
        assert_eq!(
            log.page(page.last, 10),
            EventPage {
                events: Vec::new(),
                last: 2,
                missed: 0
            }
        );
    }

    #[test]
    fn a_slow_reader_learns_how_much_it_missed() {
        let log = EventLog::new();
        for _ in 0..EventLog::CAPACITY + 5 {
            log.record(EventKind::Paused);
        }
        let page = log.page(2, 10);
        assert_eq!((page.missed, page.events[0].sequence), (3, 6));
    }

    #[test]
    fn a_log_goes_on_where_another_ended() {
        let first = EventLog::new();
        for _ in 0..EventLog::CAPACITY + 5 {
            first.record(EventKind::Paused);
        }
        let mut events = first.page(0, 2000).events;
        events.insert(
            0,
            Event {
                sequence: 5,
                ..events[0].clone()
            },
        );
        let log = EventLog::resumed(events, 2000);
        assert_eq!(
            log.page(0, 1).events[0].sequence,
            6,
            "not more than usual are kept"
        );
        assert_eq!(log.record(EventKind::Started), 2001);
        assert_eq!(EventLog::resumed(Vec::new(), 0).record(EventKind::Started), 1);
    }

    #[test]
    fn listeners_hear_every_event() {
        let log = EventLog::new();
        let heard = Arc::new(AtomicU64::new(0));
        let ear = Arc::clone(&heard);
        log.listen(move |sequence| ear.store(sequence, Ordering::Relaxed));
        log.record(EventKind::Started);
        log.record(EventKind::Paused);
        assert_eq!(heard.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn events_are_flat_json() {
        let event = Event {
            sequence: 7,
            time_ms: 1,
            kind: EventKind::DeviceRemoved {
                id: "disk1".parse().unwrap(),
            },
        };
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"sequence":7,"time_ms":1,"event":"device-removed","id":"disk1"}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
        let event = Event {
            kind: EventKind::Pool {
                pool: "tank".into(),
                kind: PoolEventKind::DeviceFailed,
                text: "gone".into(),
            },
            ..event
        };
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"sequence":7,"time_ms":1,"event":"pool","pool":"tank","kind":"device-failed","text":"gone"}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
    }
}
