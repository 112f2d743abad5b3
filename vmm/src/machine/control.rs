//! The way in from outside: what an administrator, a signal or a management socket may ask of a running VM.
//!
//! A [`Control`] may be cloned and used from any thread. Its requests are carried out by the machine's main loop, one after
//! the other; the answer comes back through a channel of the request's own. Devices to be attached are opened on the
//! caller's thread, so that a slow file system holds up the caller and nobody else. When the VM has ended, every request is
//! answered with [`ProblemKind::Stopping`].

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use api::virtual_disk::TransferRequest;
use api::{
    DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventLog, Metrics, NetConfig, NetStatus,
    Problem, ProblemKind, StorageAnswer, StorageRequest, TracePage, Transfer, VmState, VmStatus,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::devices::{Attachment, DeviceOpener};
use super::disk::PoolDisks;
use crate::console::ConsoleCommand;

/// A request to the main loop.
pub(super) enum Request {
    PowerButton(Reply<()>),
    Stop(String, Reply<()>),
    Reset(String, Reply<()>),
    Pause(Reply<()>),
    Resume(Reply<()>),
    Attach(Box<Attachment>, Reply<Option<DiskStatus>>),
    Detach(DeviceId, Reply<()>),
    Status(Reply<VmStatus>),
}

/// Where the answer to a request goes.
pub(super) type Reply<T> = Sender<Result<T, Problem>>;

/// Requests on their way to the main loop.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) requests: Receiver<Request>,
    pub(super) bell: EventFd,
}

struct Shared {
    requests: Sender<Request>,
    bell: EventFd,
    events: Arc<EventLog>,
    opener: DeviceOpener,
    /// The last status that was seen, for those who ask after the end.
    last_status: Mutex<VmStatus>,
}

/// A handle on a running VM.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Shared {
    fn pool(&self) -> Result<&dyn PoolDisks, Problem> {
        self.opener.pool.as_deref().ok_or_else(|| {
            Problem::new(ProblemKind::Conflict, "this machine has no pool")
                .remedy("its vm.toml has no [pool]; a pool by itself is named with --devices")
        })
    }
}

impl Control {
    /// A handle and the inbox that it fills. `status` is what is known before the VM runs.
    pub(super) fn new(
        events: Arc<EventLog>,
        opener: DeviceOpener,
        status: VmStatus,
    ) -> std::io::Result<(Self, Inbox)> {
        let (requests, inbox) = mpsc::channel();
        let bell = EventFd::new(EFD_NONBLOCK)?;
        let inbox = Inbox {
            requests: inbox,
            bell: bell.try_clone()?,
        };
        let shared = Shared {
            requests,
            bell,
            events,
            opener,
            last_status: Mutex::new(status),
        };
        Ok((Control(Arc::new(shared)), inbox))
    }

    fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Problem> {
        let gone = || Problem::new(ProblemKind::Stopping, "the VM has ended or is about to");
        let (reply, answer) = mpsc::channel();
        self.0.requests.send(request(reply)).map_err(|_| gone())?;
        // Fails only if the main loop has 2^64 requests to look at.
        let _ = self.0.bell.write(1);
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Carries out what a person typed after the escape key. Runs on the main loop, so it must not wait for an answer.
    pub(super) fn console_command(&self, command: ConsoleCommand) {
        let (reply, _nobody_waits) = mpsc::channel();
        let request = match command {
            ConsoleCommand::Stop => Request::Stop("console".to_owned(), reply),
            ConsoleCommand::PowerButton => Request::PowerButton(reply),
            ConsoleCommand::Reset => Request::Reset("console".to_owned(), reply),
            ConsoleCommand::Detach => return,
        };
        if self.0.requests.send(request).is_ok() {
            let _ = self.0.bell.write(1);
        }
    }

    /// From now on, a disk that stops because of an error has the vCPUs stopped as well.
    pub(super) fn pause_when_a_disk_stops(&self) {
        let requests = self.0.requests.clone();
        // Without a bell the main loop would see it with the next request.
        let bell = self.0.bell.try_clone().ok();
        self.0.opener.settings.on_stop(move || {
            let (reply, _nobody_waits) = mpsc::channel();
            if requests.send(Request::Pause(reply)).is_ok() {
                let _ = bell.as_ref().map(|bell| bell.write(1));
            }
        });
    }

    /// The log of events, to be shared.
    pub fn event_log(&self) -> &Arc<EventLog> {
        &self.0.events
    }
}

impl api::Vm for Control {
    fn status(&self) -> VmStatus {
        let mut last = match self.ask(Request::Status) {
            Ok(mut status) => {
                status.limit_groups = self.0.opener.settings.groups();
                self.0
                    .last_status
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone_from(&status);
                return status;
            }
            Err(_) => self
                .0
                .last_status
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        };
        last.state = VmState::Stopping;
        last
    }

    fn power_button(&self) -> Result<(), Problem> {
        self.ask(Request::PowerButton)
    }

    fn stop(&self, cause: &str) -> Result<(), Problem> {
        match self.ask(|reply| Request::Stop(cause.to_owned(), reply)) {
            Err(problem) if problem.kind == ProblemKind::Stopping => Ok(()),
            result => result,
        }
    }

    fn reset(&self) -> Result<(), Problem> {
        self.ask(|reply| Request::Reset("administrator".to_owned(), reply))?;
        // Nobody may wait for requests of the life before.
        self.0.opener.settings.resume();
        Ok(())
    }

    fn pause(&self) -> Result<(), Problem> {
        self.ask(Request::Pause)
    }

    fn resume(&self) -> Result<(), Problem> {
        self.ask(Request::Resume)?;
        // Afterwards: a disk that fails again has the machine paused again.
        self.0.opener.settings.resume();
        Ok(())
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        let (device, status) = self.0.opener.disk(disk, &self.status())?;
        // A SCSI disk has its place only now.
        let placed = self.ask(|reply| Request::Attach(Box::new(device), reply))?;
        Ok(placed.unwrap_or(status))
    }

    fn attach_net(&self, net: NetConfig) -> Result<NetStatus, Problem> {
        let (device, status) = self.0.opener.net(net, &self.status())?;
        let device = Attachment::Device(device);
        self.ask(|reply| Request::Attach(Box::new(device), reply))?;
        Ok(status)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.ask(|reply| Request::Detach(id.clone(), reply))
    }

    fn change_disk(&self, id: &DeviceId, change: &DiskChange) -> Result<DiskStatus, Problem> {
        if let Some(manager) = &self.0.opener.manager
            && self.0.opener.settings.is_of_pool(id)
        {
            manager.change(id, change)?;
        }
        self.0.opener.settings.change(id, change)?;
        let disks = self.ask(Request::Status)?.disks;
        let disk = disks.into_iter().find(|disk| disk.config.id == *id);
        disk.ok_or_else(|| {
            let problem = Problem::new(ProblemKind::NotFound, format!("disk `{id}` was just removed"));
            problem.about(id)
        })
    }

    fn change_limits(&self, group: &DeviceId, change: &DiskLimits) -> Result<DiskLimits, Problem> {
        let opener = &self.0.opener;
        if let Some(manager) = &opener.manager
            && opener.settings.is_group_of_pool(group)
        {
            match manager.change_group(group, change) {
                // None of these disks is in use now: the next one brings the limits along.
                Err(problem) if problem.kind == ProblemKind::NotFound => {}
                other => other?,
            }
        }
        opener.settings.change_group(group, change)
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        match &self.0.opener.manager {
            Some(manager) => manager.execute(request),
            None => self.0.pool()?.execute(request),
        }
    }

    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        match &self.0.opener.manager {
            Some(manager) => manager.transfer(request),
            None => self.0.pool()?.transfer(request),
        }
    }

    fn metrics(&self) -> Metrics {
        let opener = &self.0.opener;
        let pool = opener
            .pool
            .as_deref()
            .map(|pool| pool.execute(StorageRequest::Status));
        let pools = match pool {
            Some(Ok(StorageAnswer::Status(pool))) => vec![*pool],
            // It cannot be looked at now, and has no numbers.
            _ => Vec::new(),
        };
        Metrics {
            vm: Some(self.status()),
            queues: opener.queue_metrics(),
            nets: opener.net_metrics(),
            pools,
            ..Metrics::default()
        }
    }

    fn trace(&self, id: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        let opener = &self.0.opener;
        if let Some(manager) = &opener.manager
            && opener.settings.is_of_pool(id)
        {
            return manager.trace(id, after);
        }
        opener.settings.trace(id, after)
    }

    fn events(&self) -> &EventLog {
        &self.0.events
    }
}
