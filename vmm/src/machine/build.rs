//! Builds one machine: everything that a guest's life needs and that ends with it.
//!
//! The order matters: interrupt controllers before vCPUs, CPUID before MSRs, devices on the bus before the guest looks.

use std::io;
use std::sync::Arc;

use super::devices::HostDevice;
use super::processors::Processors;
use super::signals::Signals;
use super::slots::{SlotError, Slots};
use super::{MachineError, Parts};
use crate::acpi::{self, AcpiInputs, RealTimeClock};
use crate::boot::registers;
use crate::bus::{Bus, BusError};
use crate::layout;
use crate::pci::{Cf8, Ecam, PciBus, Window};
use crate::platform::{Platform, PlatformConfig, host_clock, irqfd};
use crate::sandbox::Kind;
use crate::vcpu::{Gate, VcpuContext, Vcpus};
use crate::vm::Vm;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A machine in which a guest lives.
pub(super) struct Machine {
    pub(super) vcpus: Vcpus,
    pub(super) slots: Slots,
    platform: Platform,
    vm: Arc<Vm>,
    signals: Arc<Signals>,
    /// Interrupts of the platform; open as long as KVM listens to them.
    _interrupts: [EventFd; 2],
}

/// Builds a machine for `devices`, with the kernel loaded and all vCPUs waiting at the closed gate.
pub(super) fn build(
    parts: &mut Parts,
    signals: &Arc<Signals>,
    gate: Arc<Gate>,
    devices: Vec<HostDevice>,
) -> Result<Machine, MachineError> {
    let vm = Arc::new(Vm::new(parts.kvm.clone())?);
    vm.set_memory(&parts.ram)?;
    let memory = parts.ram.memory().clone();

    // CPUs, as the guest will see them.
    let processors = Processors::new(&vm, &parts.config.cpus)?;

    // Buses.
    let pci = Arc::new(PciBus::new());
    let window = layout::mmio64_window(parts.ram.size(), processors.physical_bits()).map_err(description)?;
    let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    connect_pci(&pci, &ports, &mmio, window).map_err(description)?;

    // The mainboard.
    let (serial_interrupt, serial_event) = interrupt(&vm, layout::GSI_COM1)?;
    let (ged_interrupt, ged_event) = interrupt(&vm, layout::GSI_GED)?;
    let marks = {
        let signals = signals.clone();
        Arc::new(move |text: &str, since_start: std::time::Duration| signals.debug_line(text, since_start))
    };
    let platform = Platform::new(
        PlatformConfig {
            ram_size: parts.ram.size(),
            serial: parts.consoles.serial(),
            serial_interrupt: irqfd(serial_interrupt),
            ged_interrupt: irqfd(ged_interrupt),
            clock: host_clock(),
            started: parts.started,
            marks,
            events: signals.clone(),
        },
        &ports,
    )
    .map_err(description)?;

    // Devices.
    let mut slots = Slots::new(pci, window);
    for device in devices {
        let id = device.id.to_string();
        slots
            .insert(&vm, &parts.ram, signals, device)
            .map_err(|source| MachineError::Slot { id, source })?;
    }

    // vCPUs, and what the boot vCPU starts with.
    let mut vcpus = Vec::new();
    for index in 0..parts.config.cpus.count {
        vcpus.push(processors.create(&vm, index)?);
    }
    let entry = parts.kernel.load(&memory, parts.ram.size())?;
    registers::write_tables(&memory, entry)?;
    if let Some(boot) = vcpus.first() {
        registers::set_up(boot, entry)?;
    }
    acpi::build(&AcpiInputs {
        apic_ids: processors.apic_ids(),
        mmio64: window,
        serial: true,
        // The time of day comes from kvmclock. Announcing the clock would cost Linux sixty exits at every boot.
        rtc: RealTimeClock::Absent,
        pvpanic: true,
        hotplug_slots: !1,
    })
    .map_err(description)?
    .write_to(&memory)
    .map_err(description)?;

    let affinity = parts.config.cpus.affinity.clone();
    let confine = parts.sandbox.thread(Kind::Vcpu);
    let context = VcpuContext {
        ports,
        mmio,
        events: signals.clone(),
        on_start: Arc::new(move |index| {
            pin(affinity.get(usize::from(index)))?;
            confine()
        }),
    };
    let vcpus = Vcpus::start(vcpus, gate, &context).map_err(MachineError::system("start a vCPU"))?;
    Ok(Machine {
        vcpus,
        slots,
        platform,
        vm,
        signals: signals.clone(),
        _interrupts: [serial_event, ged_event],
    })
}

impl Machine {
    /// Puts a device into a free slot; the guest does not know yet.
    pub(super) fn insert(&mut self, parts: &Parts, device: HostDevice) -> Result<u8, SlotError> {
        self.slots.insert(&self.vm, &parts.ram, &self.signals, device)
    }

    /// Tells the guest that a device has appeared in `slot`.
    pub(super) fn announce(&self, slot: u8) {
        self.platform.hotplug.announce(slot);
    }

    /// Asks the guest to let go of the device in `slot`.
    pub(super) fn ask_back(&self, slot: u8) {
        self.platform.hotplug.request_removal(slot);
    }

    pub(super) fn press_power_button(&self) {
        self.platform.ged.press_power_button();
    }

    /// Takes the devices out of a machine whose vCPUs have ended.
    pub(super) fn into_devices(self) -> Vec<HostDevice> {
        let Machine { vcpus, slots, .. } = self;
        drop(vcpus);
        slots.into_devices()
    }
}

fn description(error: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    MachineError::Description(Box::new(error))
}

fn connect_pci(
    pci: &Arc<PciBus>,
    ports: &Bus,
    mmio: &Bus,
    window: layout::AddressRange,
) -> Result<(), BusError> {
    let cf8 = u64::from(layout::PORT_PCI_CONFIG_ADDRESS);
    ports.insert("PCI configuration", cf8..cf8 + 8, Arc::new(Cf8::new(pci.clone())))?;
    mmio.insert(
        "ECAM",
        layout::ECAM.start..layout::ECAM.end(),
        Arc::new(Ecam(pci.clone())),
    )?;
    for range in [layout::MMIO32, window] {
        let device = Window {
            bus: pci.clone(),
            base: range.start,
        };
        mmio.insert("PCI window", range.start..range.end(), Arc::new(device))?;
    }
    Ok(())
}

/// An interrupt line on pin `gsi`: one end for the device, one to keep open.
fn interrupt(vm: &Vm, gsi: u32) -> Result<(EventFd, EventFd), MachineError> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(MachineError::system("create an eventfd"))?;
    vm.connect_interrupt(&event, gsi)?;
    Ok((
        event
            .try_clone()
            .map_err(MachineError::system("duplicate an eventfd"))?,
        event,
    ))
}

/// Keeps the calling thread on `cpus` of the host, if any are given.
fn pin(cpus: Option<&crate::config::HostCpus>) -> io::Result<()> {
    let Some(cpus) = cpus else { return Ok(()) };
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus.iter() {
        set.set(usize::from(cpu));
    }
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| {
        io::Error::other(format!(
            "cpus.affinity: it may not run on the host's CPUs {cpus}: {error}"
        ))
    })
}
