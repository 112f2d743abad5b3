//! What can be changed of disks while the guest uses them, and what happens when one stops.
//!
//! ```text
//!   vm.toml, attach ──► DiskSettings::of ──► DiskSetting { configuration as it is now, DiskControls } ──► the disk's queue servers
//!   management ───────► change, resume ──────► the same
//!   a queue server ───► Stopping::stopped ───► event, and a request to the main loop: pause
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use api::{
    DeviceId, DiskChange, DiskConfig, DiskLimits, EventKind, EventLog, InvalidValue, Problem, ProblemKind,
    TraceEnd, TraceOperation, TracePage, TraceRecord,
};
use block_io::{IoError, Operation, error_chain};
use storage_virtualizer::Counters;
use storage_virtualizer::controls::{DiskControls, DiskEvents, ErrorPolicy, Rate, RateLimit, RateLimiter};
use storage_virtualizer::recorder::{Ended, Record};

/// Has the machine paused. Called on a disk's worker: must not wait.
type Pause = Box<dyn Fn() + Send + Sync>;

/// A disk, and what is set for it.
pub(super) struct DiskSetting {
    config: Mutex<DiskConfig>,
    controls: Arc<DiskControls>,
    /// Why it stopped.
    stopped: Arc<Mutex<Option<String>>>,
}

impl fmt::Debug for DiskSetting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_tuple("DiskSetting")
            .field(&*locked(&self.config))
            .finish()
    }
}

impl DiskSetting {
    /// The configuration, with what was changed since.
    pub(super) fn config(&self) -> DiskConfig {
        locked(&self.config).clone()
    }

    /// For those who serve the disk.
    pub(super) fn controls(&self) -> &Arc<DiskControls> {
        &self.controls
    }

    /// Who serves it takes no writes.
    pub(super) fn make_read_only(&self) {
        locked(&self.config).read_only = true;
    }

    /// It has the places on the SCSI adapter that `config` says.
    pub(super) fn place(&self, config: &DiskConfig) {
        let mut own = locked(&self.config);
        (own.target, own.lun) = (config.target, config.lun);
        own.paths.clone_from(&config.paths);
    }

    /// Why its requests wait.
    pub(super) fn stopped(&self) -> Option<String> {
        locked(&self.stopped).clone()
    }

    fn put(&self, config: DiskConfig) {
        set_controls(&self.controls, &config);
        *locked(&self.config) = config;
    }
}

/// Has a disk served as `config` wants it, from now on.
pub fn set_controls(controls: &DiskControls, config: &DiskConfig) {
    controls.set_limit(rates(&config.limits));
    controls.set_polling(Duration::from_micros(config.poll_us.unwrap_or(0).into()));
    controls.set_error_policy(match config.on_error {
        api::OnError::Report => ErrorPolicy::Report,
        api::OnError::Stop => ErrorPolicy::Stop,
    });
}

/// Limits that disks share.
struct Group {
    limits: Mutex<DiskLimits>,
    limiter: Arc<RateLimiter>,
}

/// The settings of all disks of a VM.
pub(super) struct DiskSettings {
    groups: BTreeMap<DeviceId, Group>,
    /// Those that were detached go when the next one comes.
    disks: Mutex<BTreeMap<DeviceId, Weak<DiskSetting>>>,
    events: Arc<EventLog>,
    pause: Arc<OnceLock<Pause>>,
}

impl fmt::Debug for DiskSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups: Vec<_> = self.groups.keys().collect();
        formatter
            .debug_struct("DiskSettings")
            .field("groups", &groups)
            .finish_non_exhaustive()
    }
}

impl DiskSettings {
    /// For disks that may share these limits.
    pub(super) fn new(groups: &BTreeMap<DeviceId, DiskLimits>, events: Arc<EventLog>) -> Self {
        let group = |(name, limits): (&DeviceId, &DiskLimits)| {
            let group = Group {
                limits: Mutex::new(*limits),
                limiter: Arc::new(RateLimiter::new(rates(limits))),
            };
            (name.clone(), group)
        };
        Self {
            groups: groups.iter().map(group).collect(),
            disks: Mutex::default(),
            events,
            pause: Arc::default(),
        }
    }

    /// Says how the machine is paused; once, before the guest runs.
    pub(super) fn on_stop(&self, pause: impl Fn() + Send + Sync + 'static) {
        // There is one machine, which says so once.
        let _ = self.pause.set(Box::new(pause));
    }

    /// Settings for a disk that is being opened; none if there are no such common limits.
    pub(super) fn of(&self, config: &DiskConfig) -> Option<Arc<DiskSetting>> {
        let group = match &config.limit_group {
            Some(name) => Some(Arc::clone(&self.groups.get(name)?.limiter)),
            None => None,
        };
        let stopped = Arc::<Mutex<Option<String>>>::default();
        let stopping = Stopping {
            id: config.id.clone(),
            reason: Arc::clone(&stopped),
            events: Arc::clone(&self.events),
            pause: Arc::clone(&self.pause),
        };
        let setting = Arc::new(DiskSetting {
            config: Mutex::new(config.clone()),
            controls: Arc::new(DiskControls::new(group, Some(Box::new(stopping)))),
            stopped,
        });
        setting.put(config.clone());
        Some(setting)
    }

    /// A disk is in use from now on, and may be changed. If its name is taken, the machine will refuse it, and the one that has the
    /// name stays.
    pub(super) fn enter(&self, id: DeviceId, setting: &Arc<DiskSetting>) {
        setting.controls.recorder().set_name(&id.to_string());
        let mut disks = locked(&self.disks);
        disks.retain(|_, disk| disk.strong_count() > 0);
        disks.entry(id).or_insert_with(|| Arc::downgrade(setting));
    }

    /// Whether there is a disk of this name, and a pool has it.
    pub(super) fn is_of_pool(&self, id: &DeviceId) -> bool {
        let setting = locked(&self.disks).get(id).and_then(Weak::upgrade);
        setting.is_some_and(|setting| setting.config().file.is_some())
    }

    /// Whether a disk that a pool has shares these limits.
    pub(super) fn is_group_of_pool(&self, group: &DeviceId) -> bool {
        let disks = locked(&self.disks);
        let mut disks = disks.values().filter_map(Weak::upgrade);
        disks.any(|disk| {
            let config = disk.config();
            config.file.is_some() && config.limit_group.as_ref() == Some(group)
        })
    }

    /// Changes a disk that is in use.
    pub(super) fn change(&self, id: &DeviceId, change: &DiskChange) -> Result<(), Problem> {
        let setting = locked(&self.disks).get(id).and_then(Weak::upgrade);
        let setting = setting.ok_or_else(|| no_such_disk(id))?;
        if setting.config().vhost_user.is_some() {
            return Err(served_elsewhere(id).remedy("set them where it is served"));
        }
        let changed = setting.config().changed(change).map_err(impossible)?;
        setting.put(changed);
        Ok(())
    }

    /// Changes limits that disks share.
    pub(super) fn change_group(&self, name: &DeviceId, change: &DiskLimits) -> Result<DiskLimits, Problem> {
        let Some(group) = self.groups.get(name) else {
            let problem = Problem::new(
                ProblemKind::NotFound,
                format!("the VM has no limit group `{name}`"),
            );
            return Err(problem
                .about(name)
                .remedy("[limit-groups] in vm.toml makes them, `smsvmm vm status` lists them"));
        };
        let mut limits = locked(&group.limits);
        *limits = limits.changed(change).map_err(impossible)?;
        group.limiter.set(rates(&limits));
        Ok(*limits)
    }

    /// The limits that disks share.
    pub(super) fn groups(&self) -> BTreeMap<DeviceId, DiskLimits> {
        let group = |(name, group): (&DeviceId, &Group)| (name.clone(), *locked(&group.limits));
        self.groups.iter().map(group).collect()
    }

    /// The limits that a disk shares, if it does.
    pub(super) fn group_limits(&self, config: &DiskConfig) -> Option<DiskLimits> {
        let group = self.groups.get(config.limit_group.as_ref()?)?;
        Some(*locked(&group.limits))
    }

    /// What the queues of each disk have done that has queues of its own.
    pub(super) fn counters(&self) -> Vec<(DeviceId, Vec<Counters>)> {
        let disks: Vec<_> = locked(&self.disks)
            .iter()
            .filter_map(|(id, disk)| Some((id.clone(), disk.upgrade()?)))
            .collect();
        disks
            .into_iter()
            .map(|(id, disk)| (id, disk.controls.counters()))
            .collect()
    }

    /// The last requests of a disk after `after`.
    pub(super) fn trace(&self, id: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        let setting = locked(&self.disks).get(id).and_then(Weak::upgrade);
        let setting = setting.ok_or_else(|| no_such_disk(id))?;
        let config = setting.config();
        if config.vhost_user.is_some() {
            return Err(served_elsewhere(id).remedy("look at the process that serves it"));
        }
        trace(&setting.controls, after)
    }

    /// Has disks that stopped try again.
    pub(super) fn resume(&self) {
        let disks: Vec<_> = locked(&self.disks).values().filter_map(Weak::upgrade).collect();
        for disk in disks {
            locked(&disk.stopped).take();
            disk.controls.resume();
        }
    }
}

/// Told when a disk stops.
struct Stopping {
    id: DeviceId,
    reason: Arc<Mutex<Option<String>>>,
    events: Arc<EventLog>,
    pause: Arc<OnceLock<Pause>>,
}

impl DiskEvents for Stopping {
    fn stopped(&self, error: &IoError) {
        let reason = error_chain(error);
        tracing::error!(disk = %self.id, reason, "a disk failed a request, and the VM is paused; `smsvmm vm resume` has it tried again");
        *locked(&self.reason) = Some(reason.clone());
        let id = self.id.clone();
        self.events.record(EventKind::DiskStopped { id, reason });
        if let Some(pause) = self.pause.get() {
            pause();
        }
    }
}

fn no_such_disk(id: &DeviceId) -> Problem {
    let problem = Problem::new(ProblemKind::NotFound, format!("the VM has no disk `{id}`"));
    problem.about(id).remedy("`smsvmm vm status` lists the disks")
}

fn served_elsewhere(id: &DeviceId) -> Problem {
    let detail = format!("`{id}` is served by another process, which has its settings and its trace");
    Problem::new(ProblemKind::Conflict, detail).about(id)
}

/// The last requests of the disk that obeys `controls`, which ended after `after` ([`TracePage::next`], or empty).
///
/// # Errors
/// `after` is nothing of the kind.
pub fn trace(controls: &DiskControls, after: &str) -> Result<TracePage, Problem> {
    let position = after.parse().map_err(|_| {
        let problem = Problem::new(ProblemKind::Invalid, format!("`{after}` is no place in a trace"));
        problem
            .about("after")
            .remedy("give `next` of an answer, or nothing")
    })?;
    let found = controls.recorder().after(&position);
    Ok(TracePage {
        records: found.records.iter().map(of_record).collect(),
        next: found.position.to_string(),
        missed: found.missed,
    })
}

fn of_record(record: &Record) -> TraceRecord {
    TraceRecord {
        time_ns: record.time_ns,
        queue: record.queue,
        operation: match record.operation {
            Some(Operation::Read) => TraceOperation::Read,
            Some(Operation::Write) => TraceOperation::Write,
            Some(Operation::Flush) => TraceOperation::Flush,
            Some(Operation::Discard) => TraceOperation::Discard,
            Some(Operation::WriteZeroes) => TraceOperation::WriteZeroes,
            None => TraceOperation::Other,
        },
        offset: record.offset,
        length: record.length,
        latency_ns: record.latency_ns,
        end: match record.ended {
            Ended::Done => TraceEnd::Ok,
            Ended::Failed => TraceEnd::Failed,
            Ended::Unsupported => TraceEnd::Unsupported,
        },
    }
}

/// Limits as a disk's queue servers keep them.
pub fn rates(limits: &DiskLimits) -> RateLimit {
    let rate = |(per_second, burst)| Rate { per_second, burst };
    RateLimit {
        operations: limits.operation_rate().map(rate),
        bytes: limits.byte_rate().map(rate),
    }
}

fn impossible((key, error): (&'static str, InvalidValue)) -> Problem {
    Problem::new(ProblemKind::Invalid, error.to_string()).about(key)
}

/// Each change of what is locked here is complete at every point where its holder could panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn settings() -> DiskSettings {
        let bulk = DiskLimits {
            iops: Some(100),
            ..DiskLimits::default()
        };
        let groups = BTreeMap::from([("bulk".parse().unwrap(), bulk)]);
        DiskSettings::new(&groups, Arc::new(EventLog::new()))
    }

    fn disk(id: &str, group: Option<&str>) -> DiskConfig {
        let mut config = DiskConfig::new("/images/a.raw");
        config.id = id.parse().unwrap();
        config.limit_group = group.map(|name| name.parse().unwrap());
        config
    }

    #[test]
    fn a_change_is_seen_in_the_configuration_and_an_impossible_one_changes_nothing() {
        let settings = settings();
        let config = disk("d", Some("bulk"));
        let setting = settings.of(&config).unwrap();
        settings.enter(config.id.clone(), &setting);
        let mut change = DiskChange {
            poll_us: Some(30),
            ..DiskChange::default()
        };
        settings.change(&config.id, &change).unwrap();
        assert_eq!(setting.config().poll_us, Some(30));
        change.poll_us = Some(99_999);
        change.on_error = Some(api::OnError::Stop);
        let problem = settings.change(&config.id, &change).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Invalid, "{problem}");
        assert_eq!(setting.config().on_error, api::OnError::Report);
        drop(setting);
        let problem = settings.change(&config.id, &DiskChange::default()).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::NotFound, "it was detached: {problem}");
    }

    #[test]
    fn a_trace_is_of_a_disk_that_is_served_here() {
        let settings = settings();
        let own = settings.of(&disk("own", None)).unwrap();
        settings.enter("own".parse().unwrap(), &own);
        let mut config = disk("other", None);
        (config.image, config.vhost_user) = (None, Some("/run/other.sock".into()));
        let other = settings.of(&config).unwrap();
        settings.enter("other".parse().unwrap(), &other);
        let trace = |id: &str, after| settings.trace(&id.parse().unwrap(), after);
        assert_eq!(trace("own", "").unwrap(), TracePage::default());
        for (id, after, kind) in [
            ("own", "x", ProblemKind::Invalid),
            ("own", "1,,2", ProblemKind::Invalid),
            ("other", "", ProblemKind::Conflict),
            ("third", "", ProblemKind::NotFound),
        ] {
            assert_eq!(trace(id, after).unwrap_err().kind, kind, "{id} {after}");
        }
    }

    #[test]
    fn a_disk_with_a_taken_name_does_not_push_out_the_one_that_has_it() {
        let settings = settings();
        let config = disk("d", None);
        let first = settings.of(&config).unwrap();
        settings.enter(config.id.clone(), &first);
        let second = settings.of(&config).unwrap();
        settings.enter(config.id.clone(), &second);
        let change = DiskChange {
            poll_us: Some(30),
            ..DiskChange::default()
        };
        settings.change(&config.id, &change).unwrap();
        assert_eq!(
            (first.config().poll_us, second.config().poll_us),
            (Some(30), None)
        );
        drop(first);
        settings.enter(config.id.clone(), &second);
        settings.change(&config.id, &change).unwrap();
        assert_eq!(second.config().poll_us, Some(30), "the name was free again");
    }

    #[test]
    fn common_limits_are_changed_by_their_name() {
        let settings = settings();
        assert!(settings.of(&disk("d", Some("other"))).is_none());
        let change = DiskLimits {
            iops: Some(0),
            ..DiskLimits::default()
        };
        let bulk = "bulk".parse().unwrap();
        assert_eq!(
            settings.change_group(&bulk, &change).unwrap(),
            DiskLimits::default()
        );
        assert_eq!(settings.groups()[&bulk], DiskLimits::default());
        let other = "other".parse().unwrap();
        let problem = settings.change_group(&other, &change).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::NotFound);
    }

    #[test]
    fn a_disk_that_stops_pauses_the_machine_once_and_says_why() {
        let settings = settings();
        let paused = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&paused);
        settings.on_stop(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let stopping = Stopping {
            id: "d".parse().unwrap(),
            reason: Arc::default(),
            events: Arc::clone(&settings.events),
            pause: Arc::clone(&settings.pause),
        };
        stopping.stopped(&IoError::new(
            &Arc::from("d"),
            block_io::Operation::Write,
            0,
            512,
            std::io::Error::from(std::io::ErrorKind::StorageFull),
        ));
        assert_eq!(paused.load(Ordering::Relaxed), 1);
        let page = settings.events.page(0, 10);
        assert!(matches!(page.events[0].kind, EventKind::DiskStopped { .. }));
        let reason = locked(&stopping.reason).clone().unwrap();
        assert!(reason.contains("storage") && reason.contains("write"), "{reason}");
    }
}
