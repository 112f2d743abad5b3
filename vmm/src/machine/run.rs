//! The main loop: one guest life after the other, until it switches itself off or is switched off.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{
    DeviceId, DeviceState, DiskStatus, EventKind, EventLog, ExitReason, Problem, ProblemKind, VmState,
    VmStatus,
};
use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::build::{self, Machine};
use super::control::{Inbox, Reply, Request};
use super::devices::{Attachment, HostDevice};
use super::signals::{Signal, Signals};
use super::{MachineError, MainLoop, Parts, managed};
use crate::config::{OnCrash, OnReboot};
use crate::host::Remains;
use crate::platform::GuestLines;
use crate::vcpu::{Gate, VcpuFault};

/// How often a draining device is looked at.
const DRAIN_PERIOD: Duration = Duration::from_millis(5);
/// How long devices may take to end their requests when a machine goes down.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// How a guest's life ended.
#[derive(Debug)]
enum End {
    /// It switched itself off.
    PowerOff,
    /// It was reset, by whom.
    Reset(String),
    /// It crashed, how.
    Crash(String),
    /// KVM could not go on.
    Fault(VcpuFault),
    /// It was switched off, why.
    Stop(String),
}

/// Wakes the main loop; its only content is that it was rung.
struct Bell(EventFd);

impl MutEventSubscriber for Bell {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            tracing::error!(error = %error, "the main loop cannot listen to its bell");
        }
    }
}

/// Everything that lives as long as the VM, over all reboots.
pub(super) struct Session {
    parts: Parts,
    main_loop: MainLoop,
    inbox: Inbox,
    resets: u64,
    state: VmState,
}

impl Session {
    pub(super) fn new(parts: Parts, mut main_loop: MainLoop, inbox: Inbox) -> Result<Self, MachineError> {
        let bell = inbox
            .bell
            .try_clone()
            .map_err(MachineError::system("create the main loop's bell"))?;
        main_loop.add_subscriber(Box::new(Bell(bell)));
        Ok(Session {
            parts,
            main_loop,
            inbox,
            resets: 0,
            state: VmState::Running,
        })
    }

    /// The log of the VM.
    pub(super) fn events(&self) -> Arc<EventLog> {
        self.parts.events.clone()
    }

    /// Runs the guest until its end, and closes everything.
    pub(super) fn run(
        mut self,
        devices: Vec<HostDevice>,
        micro_guest: Remains,
    ) -> Result<ExitReason, MachineError> {
        let result = self.live(devices, Some(micro_guest));
        self.parts.scsi.close();
        if let Some(managed) = &self.parts.managed {
            managed.close();
        }
        self.parts.consoles.close();
        result
    }

    /// One life after the other.
    fn live(
        &mut self,
        mut devices: Vec<HostDevice>,
        mut micro_guest: Option<Remains>,
    ) -> Result<ExitReason, MachineError> {
        loop {
            let gate = Arc::new(Gate::new());
            let bell = self
                .inbox
                .bell
                .try_clone()
                .map_err(MachineError::system("create a bell"))?;
            let signals = Arc::new(Signals::new(gate.clone(), bell));
            let mut machine = build::build(&mut self.parts, &signals, gate, devices)?;
            self.state = VmState::Running;
            if self.resets == 0 {
                self.parts.events.record(EventKind::Started);
            }
            // Its thread is not confined: it has to be gone before a guest can do anything.
            drop(micro_guest.take());
            machine.vcpus.resume();
            let end = self.serve(&mut machine, &signals);
            devices = self.tear_down(machine)?;
            let power = &self.parts.config.power;
            let cause = match end? {
                End::PowerOff => return Ok(ExitReason::PowerOff),
                End::Stop(cause) => return Ok(ExitReason::Stopped { cause }),
                End::Fault(fault) => return Err(MachineError::Vcpu(fault)),
                End::Reset(_) if power.on_reboot == OnReboot::Stop => return Ok(ExitReason::Reboot),
                End::Crash(cause) if power.on_crash == OnCrash::Stop => {
                    return Ok(ExitReason::Crash { cause });
                }
                End::Reset(cause) | End::Crash(cause) => cause,
            };
            self.resets += 1;
            self.parts.events.record(EventKind::Reset { cause });
            self.parts.ram.clear()?;
        }
    }

    /// Serves signals and requests until the guest's life ends.
    fn serve(&mut self, machine: &mut Machine, signals: &Signals) -> Result<End, MachineError> {
        loop {
            let timeout = if machine.slots.is_draining() || self.parts.scsi.is_draining() {
                millis(DRAIN_PERIOD)
            } else {
                -1
            };
            self.turn(timeout)?;
            for signal in signals.take() {
                if let Some(end) = self.signal(machine, signal) {
                    return Ok(end);
                }
            }
            while let Ok(request) = self.inbox.requests.try_recv() {
                if let Some(end) = self.request(machine, request) {
                    return Ok(end);
                }
            }
            for (id, was_adapter) in machine.slots.collect() {
                // The guest has ejected it with all that was on it.
                let lost = was_adapter.then(|| match &self.parts.managed {
                    Some(managed) if id == managed::adapter_id() => managed.close(),
                    _ => self.parts.scsi.close(),
                });
                self.parts.events.record(EventKind::DeviceRemoved { id });
                for id in lost.into_iter().flatten() {
                    self.parts.events.record(EventKind::DeviceRemoved { id });
                }
            }
            for id in self.parts.scsi.collect() {
                self.parts.events.record(EventKind::DeviceRemoved { id });
            }
        }
    }

    /// Serves what is ready on the main loop, or waits for it for `timeout` milliseconds (-1: without end).
    fn turn(&mut self, timeout: i32) -> Result<(), MachineError> {
        match self.main_loop.run_with_timeout(timeout) {
            Ok(_) => Ok(()),
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(MachineError::MainLoop(error.to_string())),
        }
    }

    fn signal(&mut self, machine: &mut Machine, signal: Signal) -> Option<End> {
        let events = &self.parts.events;
        match signal {
            Signal::PowerOff => return Some(End::PowerOff),
            Signal::Reset => return Some(End::Reset("guest".to_owned())),
            Signal::Panic => return Some(End::Crash("kernel panic".to_owned())),
            // The guest is about to dump itself, and resets afterwards.
            Signal::CrashKernel => {
                static LINES: GuestLines = GuestLines::new();
                if let Some(suppressed) = LINES.allow() {
                    tracing::warn!(
                        suppressed,
                        "the guest's kernel panicked and starts its crash kernel"
                    );
                }
            }
            Signal::Fault(fault @ VcpuFault::TripleFault { .. }) => {
                return Some(End::Crash(fault.to_string()));
            }
            Signal::Fault(fault) => return Some(End::Fault(fault)),
            Signal::Ejected(slot) => {
                machine.slots.eject(slot);
            }
            Signal::Active(slot) => {
                if let Some(device) = machine.slots.get_mut(slot) {
                    device.state = DeviceState::Active;
                    events.record(EventKind::DeviceActive {
                        id: device.id.clone(),
                    });
                }
            }
            Signal::NeedsReset(slot, reason) => {
                if let Some(device) = machine.slots.get_mut(slot) {
                    device.state = DeviceState::Failed;
                    events.record(EventKind::DeviceFailed {
                        id: device.id.clone(),
                        reason,
                    });
                }
            }
            Signal::DebugLine(text, since_start) => {
                let microseconds = u64::try_from(since_start.as_micros()).unwrap_or(u64::MAX);
                events.record(EventKind::DebugLine { text, microseconds });
            }
        }
        None
    }

    fn request(&mut self, machine: &mut Machine, request: Request) -> Option<End> {
        let events = &self.parts.events;
        match request {
            Request::PowerButton(reply) if self.state == VmState::Paused => {
                let problem = Problem::new(
                    ProblemKind::Conflict,
                    "the VM is paused and cannot see its power button",
                );
                answer(reply, Err(problem.remedy("resume it first")));
            }
            Request::PowerButton(reply) => {
                events.record(EventKind::PowerButtonPressed);
                machine.press_power_button();
                answer(reply, Ok(()));
            }
            Request::Stop(cause, reply) => {
                answer(reply, Ok(()));
                return Some(End::Stop(cause));
            }
            Request::Reset(cause, reply) => {
                answer(reply, Ok(()));
                return Some(End::Reset(cause));
            }
            Request::Pause(reply) => {
                if self.state != VmState::Paused {
                    machine.vcpus.pause();
                    self.state = VmState::Paused;
                    events.record(EventKind::Paused);
                }
                answer(reply, Ok(()));
            }
            Request::Resume(reply) => {
                if self.state == VmState::Paused {
                    machine.vcpus.resume();
                    self.state = VmState::Running;
                    events.record(EventKind::Resumed);
                }
                answer(reply, Ok(()));
            }
            Request::Attach(device, reply) => answer(reply, self.attach(machine, *device)),
            Request::Detach(id, reply) => answer(reply, self.detach(machine, &id)),
            Request::Status(reply) => answer(reply, Ok(self.status(machine))),
        }
        None
    }

    fn attach(&self, machine: &mut Machine, attachment: Attachment) -> Result<Option<DiskStatus>, Problem> {
        match attachment {
            Attachment::Device(device) => self.attach_device(machine, device).map(|()| None),
            Attachment::Scsi { adapter, disk } => {
                if let Some(adapter) = adapter
                    && let Err(problem) = self.attach_device(machine, adapter)
                {
                    // There is no adapter, then: the next disk tries again.
                    self.parts.scsi.close();
                    return Err(problem);
                }
                let id = disk.setting.config().id;
                let is_managed = |managed: &Arc<managed::ManagedScsi>| managed.has(&id);
                if machine.slots.has(&id) || self.parts.managed.as_ref().is_some_and(is_managed) {
                    return Err(taken(&id));
                }
                let status = self.parts.scsi.plug(disk)?;
                self.parts.events.record(EventKind::DeviceAttached { id });
                Ok(Some(status))
            }
            Attachment::Managed { adapter, disk } => {
                let id = disk.config.id.clone();
                let attached = match adapter {
                    _ if machine.slots.has(&id) || self.parts.scsi.has(&id) => Err(taken(&id)),
                    Some(adapter) => self.attach_device(machine, adapter).inspect_err(|_| {
                        // There is no adapter, then: the next disk tries again.
                        self.parts.managed.iter().for_each(|managed| managed.no_adapter());
                    }),
                    None => Ok(()),
                };
                if let Err(problem) = attached {
                    self.parts.managed.iter().for_each(|managed| managed.release(&id));
                    return Err(problem);
                }
                self.parts.events.record(EventKind::DeviceAttached { id });
                Ok(Some(disk))
            }
        }
    }

    /// Whether a SCSI disk has this name.
    fn is_scsi(&self, id: &DeviceId) -> bool {
        let managed = self.parts.managed.as_ref();
        self.parts.scsi.has(id) || managed.is_some_and(|managed| managed.has(id))
    }

    fn attach_device(&self, machine: &mut Machine, device: HostDevice) -> Result<(), Problem> {
        let id = device.id.clone();
        if machine.slots.has(&id) || self.is_scsi(&id) {
            return Err(taken(&id));
        }
        let slot = machine.insert(&self.parts, device).map_err(|error| {
            Problem::new(ProblemKind::Exhausted, format!("cannot attach `{id}`: {error}")).about(&id)
        })?;
        machine.announce(slot);
        self.parts.events.record(EventKind::DeviceAttached { id });
        Ok(())
    }

    fn detach(&self, machine: &mut Machine, id: &DeviceId) -> Result<(), Problem> {
        let managed = self.parts.managed.as_ref();
        if self.parts.scsi.detach(id) || managed.is_some_and(|managed| managed.detach(id)) {
            self.parts
                .events
                .record(EventKind::DeviceRemoving { id: id.clone() });
            return Ok(());
        }
        let (number, slot) = machine.slots.find(id).ok_or_else(|| {
            let problem = Problem::new(ProblemKind::NotFound, format!("the VM has no device `{id}`"));
            problem.about(id).remedy("`smsvmm vm status` lists the devices")
        })?;
        if !slot.kind.is_removable() {
            let message = format!("`{id}` belongs to the platform and cannot be removed");
            return Err(Problem::new(ProblemKind::Conflict, message).about(id));
        }
        slot.state = DeviceState::Removing;
        machine.ask_back(number);
        self.parts
            .events
            .record(EventKind::DeviceRemoving { id: id.clone() });
        Ok(())
    }

    fn status(&self, machine: &Machine) -> VmStatus {
        VmStatus {
            state: self.state,
            uptime_seconds: self.parts.started.elapsed().as_secs(),
            resets: self.resets,
            disks: [
                machine.slots.disks(),
                self.parts.scsi.disks(),
                self.parts
                    .managed
                    .as_ref()
                    .map_or_else(Vec::new, |managed| managed.disks()),
            ]
            .concat(),
            nets: machine.slots.nets(),
            last_event: self.parts.events.last(),
            ..self.parts.initial_status()
        }
    }

    /// Stops vCPUs and devices, in this order: a guest that does not run starts no new requests.
    fn tear_down(&mut self, mut machine: Machine) -> Result<Vec<HostDevice>, MachineError> {
        machine.vcpus.stop();
        machine.slots.stop_all();
        let started = Instant::now();
        while let Some(id) = machine.slots.busy() {
            if started.elapsed() > DRAIN_LIMIT {
                return Err(MachineError::Busy {
                    id: id.to_string(),
                    seconds: DRAIN_LIMIT.as_secs(),
                });
            }
            // Devices on the main loop leave it by a message to it.
            self.turn(1)?;
        }
        Ok(machine.into_devices())
    }
}

fn taken(id: &DeviceId) -> Problem {
    let message = format!("the VM has a device `{id}` already");
    Problem::new(ProblemKind::Conflict, message)
        .about(id)
        .remedy("choose another id")
}

fn answer<T>(reply: Reply<T>, result: Result<T, Problem>) {
    // Nobody waits any more if the caller has gone; then nobody wants to know.
    let _ = reply.send(result);
}

fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX)
}
