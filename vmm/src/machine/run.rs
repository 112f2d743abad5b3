//! The main loop: one guest life after the other, until it switches itself off or is switched off.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::build::{self, Machine};
use super::control::{ControlError, DeviceState, EventKind, Inbox, Reply, Request, VmState, VmStatus};
use super::devices::HostDevice;
use super::signals::{Signal, Signals};
use super::slots::address_of;
use super::{ExitReason, MachineError, MainLoop, Parts};
use crate::config::{OnCrash, OnReboot};
use crate::vcpu::Gate;

/// How often a draining device is looked at.
const DRAIN_PERIOD: Duration = Duration::from_millis(5);
/// How long devices may take to end their requests when a machine goes down.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// How a guest's life ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    PowerOff,
    Reset,
    Crash(ExitReason),
    Stop,
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
    reboots: u64,
    state: VmState,
}

impl Session {
    pub(super) fn new(parts: Parts, mut main_loop: MainLoop, inbox: Inbox) -> Result<Self, MachineError> {
        let bell = inbox.bell.try_clone().map_err(MachineError::system("create the main loop's bell"))?;
        main_loop.add_subscriber(Box::new(Bell(bell)));
        Ok(Session { parts, main_loop, inbox, reboots: 0, state: VmState::Running })
    }

    /// Runs the guest until its end.
    pub(super) fn run(mut self, mut devices: Vec<HostDevice>) -> Result<ExitReason, MachineError> {
        loop {
            let gate = Arc::new(Gate::new());
            let bell = self.inbox.bell.try_clone().map_err(MachineError::system("create a bell"))?;
            let signals = Arc::new(Signals::new(gate.clone(), bell));
            let mut machine = build::build(&mut self.parts, &signals, gate, devices)?;
            self.state = VmState::Running;
            self.parts.events.add(EventKind::Booted);
            machine.vcpus.resume();
            let end = self.serve(&mut machine, &signals);
            devices = self.tear_down(machine)?;
            let end = end?;
            tracing::debug!(?end, "the guest's life ended");
            let power = &self.parts.config.power;
            match end {
                End::PowerOff => return Ok(ExitReason::PoweredOff),
                End::Stop => return Ok(ExitReason::Stopped),
                End::Reset if power.on_reboot == OnReboot::Stop => return Ok(ExitReason::Rebooted),
                End::Crash(reason) if power.on_crash == OnCrash::Stop => return Ok(reason),
                End::Reset | End::Crash(_) => self.reboots += 1,
            }
            self.parts.ram.clear()?;
        }
    }

    /// Serves signals and requests until the guest's life ends.
    fn serve(&mut self, machine: &mut Machine, signals: &Signals) -> Result<End, MachineError> {
        loop {
            let timeout = if machine.slots.is_draining() { millis(DRAIN_PERIOD) } else { -1 };
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
            for id in machine.slots.collect() {
                self.parts.events.add(EventKind::DeviceRemoved { id });
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
            Signal::PowerOff => {
                events.add(EventKind::PoweredOff);
                return Some(End::PowerOff);
            }
            Signal::Reset => {
                events.add(EventKind::Rebooting);
                return Some(End::Reset);
            }
            Signal::Panic => {
                events.add(EventKind::Crashed { reason: "kernel panic".to_owned() });
                return Some(End::Crash(ExitReason::Panicked));
            }
            Signal::Fault(fault) => {
                events.add(EventKind::Crashed { reason: fault.to_string() });
                return Some(End::Crash(ExitReason::Faulted(fault)));
            }
            Signal::Ejected(slot) => {
                machine.slots.eject(slot);
            }
            Signal::Active(slot) => {
                if let Some(device) = machine.slots.get_mut(slot) {
                    device.state = DeviceState::Active;
                    events.add(EventKind::DeviceActive { id: device.id.clone() });
                }
            }
            Signal::NeedsReset(slot, reason) => {
                if let Some(device) = machine.slots.get_mut(slot) {
                    device.state = DeviceState::NeedsReset;
                    events.add(EventKind::DeviceNeedsReset { id: device.id.clone(), reason });
                }
            }
            Signal::DebugLine(text) => events.add(EventKind::DebugLine { text }),
        }
        None
    }

    fn request(&mut self, machine: &mut Machine, request: Request) -> Option<End> {
        let events = &self.parts.events;
        match request {
            Request::PowerButton => {
                events.add(EventKind::PowerButton);
                self.state = VmState::ShuttingDown;
                machine.press_power_button();
            }
            Request::Stop => return Some(End::Stop),
            Request::Reset => {
                events.add(EventKind::Rebooting);
                return Some(End::Reset);
            }
            Request::Pause if self.state != VmState::Paused => {
                machine.vcpus.pause();
                self.state = VmState::Paused;
                events.add(EventKind::Paused);
            }
            Request::Resume if self.state == VmState::Paused => {
                machine.vcpus.resume();
                self.state = VmState::Running;
                events.add(EventKind::Resumed);
            }
            Request::Pause | Request::Resume => {}
            Request::Attach(device, reply) => answer(reply, self.attach(machine, *device)),
            Request::Detach(id, reply) => answer(reply, self.detach(machine, &id)),
            Request::Status(reply) => answer(reply, Ok(self.status(machine))),
        }
        None
    }

    fn attach(&self, machine: &mut Machine, device: HostDevice) -> Result<String, ControlError> {
        let id = device.id.clone();
        if machine.slots.has(&id) {
            return Err(ControlError::DuplicateDevice(id));
        }
        let slot = machine
            .insert(&self.parts, device)
            .map_err(|source| ControlError::Attach { id: id.clone(), source: Box::new(source) })?;
        machine.announce(slot);
        self.parts.events.add(EventKind::DeviceAttached { id });
        Ok(address_of(slot))
    }

    fn detach(&self, machine: &mut Machine, id: &str) -> Result<(), ControlError> {
        let (number, slot) = machine.slots.find(id)?;
        if !slot.kind.is_removable() {
            return Err(ControlError::NotRemovable(id.to_owned()));
        }
        slot.state = DeviceState::Removing;
        machine.ask_back(number);
        self.parts.events.add(EventKind::DeviceRemoving { id: id.to_owned() });
        Ok(())
    }

    fn status(&self, machine: &Machine) -> VmStatus {
        let counters = machine.vcpus.counters();
        let exits = [&counters.ports, &counters.mmio, &counters.other];
        VmStatus {
            name: self.parts.config.name.to_string(),
            state: self.state,
            cpus: self.parts.config.cpus.count,
            memory: self.parts.ram.size(),
            uptime_seconds: self.parts.events.start().elapsed().as_secs(),
            reboots: self.reboots,
            exits: exits.into_iter().map(|counter| counter.load(Ordering::Relaxed)).sum(),
            devices: machine.slots.status(),
        }
    }

    /// Stops vCPUs and devices, in this order: a guest that does not run starts no new requests.
    fn tear_down(&mut self, mut machine: Machine) -> Result<Vec<HostDevice>, MachineError> {
        machine.vcpus.stop();
        machine.slots.stop_all();
        let started = Instant::now();
        while let Some(id) = machine.slots.busy() {
            if started.elapsed() > DRAIN_LIMIT {
                return Err(MachineError::Busy { id: id.to_owned(), seconds: DRAIN_LIMIT.as_secs() });
            }
            // Devices on the main loop leave it by a message to it.
            self.turn(1)?;
        }
        Ok(machine.into_devices())
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, ControlError>) {
    // Nobody waits any more if the caller has gone; then nobody wants to know.
    let _ = reply.send(result);
}

fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX)
}
