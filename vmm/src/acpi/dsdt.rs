//! The DSDT: the namespace of devices, in AML.
//!
//! ```text
//! \_SB
//!  ├─ MBRD  PNP0C02    keeps ECAM and our ports to themselves; without it Linux does not trust MCFG
//!  ├─ PCI0  PNP0A08    host bridge: windows, _OSC
//!  │   ├─ S01_ ..      slots for hot-plug: _ADR, _SUN, _EJ0
//!  │   └─ PSCN         what the event device calls: tells Linux which slots changed
//!  ├─ GED_  ACPI0013   event device: GSI 5, _EVT
//!  ├─ PWRB  PNP0C0C    power button
//!  ├─ COM1  PNP0501    RTC_  PNP0B00    PEVT  QEMU0001
//!  └─ CPUS  ACPI0010   C000 .. ACPI0007
//! \_S5                 soft off
//! ```

use acpi_tables::{Aml, AmlSink, aml};

use super::{AcpiInputs, RealTimeClock, fixed};
use crate::layout::{self, ged_event};

/// Notification values (ACPI 6.5 §5.6.6).
mod notification {
    /// A device may have appeared at this object.
    pub(super) const DEVICE_CHECK: u8 = 1;
    /// The user wants the device back.
    pub(super) const EJECT_REQUEST: u8 = 3;
    /// Power button pressed (§4.8.2.2.1.2).
    pub(super) const BUTTON_PRESSED: u8 = 0x80;
}

/// The complete table.
pub(super) fn dsdt(inputs: &AcpiInputs) -> Vec<u8> {
    let slots = Slots::new(inputs.hotplug_slots);
    let mut devices = Encoded::default();
    motherboard(&slots).to_aml_bytes(&mut devices);
    host_bridge(inputs, &slots).to_aml_bytes(&mut devices);
    power_button().to_aml_bytes(&mut devices);
    events(&slots).to_aml_bytes(&mut devices);
    if inputs.serial {
        serial_port().to_aml_bytes(&mut devices);
    }
    if inputs.rtc != RealTimeClock::Absent {
        real_time_clock(inputs.rtc).to_aml_bytes(&mut devices);
    }
    if inputs.pvpanic {
        pvpanic().to_aml_bytes(&mut devices);
    }
    processors(inputs.apic_ids.len()).to_aml_bytes(&mut devices);

    let mut body = Encoded::default();
    aml::Scope::new("_SB_".into(), vec![&devices]).to_aml_bytes(&mut body);
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![
            &layout::ACPI_SLEEP_TYPE_S5,
            &aml::ZERO,
            &aml::ZERO,
            &aml::ZERO,
        ]),
    )
    .to_aml_bytes(&mut body);
    // Revision 2: integers have 64 bits.
    fixed::table(*b"DSDT", 2, &body.0)
}

/// AML that is already encoded; lets tables be put together piece by piece.
#[derive(Default)]
struct Encoded(Vec<u8>);

impl Encoded {
    fn of(objects: &[&dyn Aml]) -> Self {
        let mut encoded = Self::default();
        for object in objects {
            object.to_aml_bytes(&mut encoded);
        }
        encoded
    }
}

impl AmlSink for Encoded {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// `Name (name, value)`.
fn name(name: &str, value: &dyn Aml) -> aml::Name {
    aml::Name::new(name.into(), value)
}

/// `Device (name) { objects }`.
fn device(name: &str, objects: &[&dyn Aml]) -> Encoded {
    Encoded::of(&[&aml::Device::new(name.into(), objects.to_vec())])
}

/// `Name (_HID, EisaId (id))`.
fn hardware_id(id: &str) -> aml::Name {
    name("_HID", &aml::EISAName::new(id))
}

/// `Name (_CRS, ResourceTemplate () { resources })`.
fn resources(resources: &[&dyn Aml]) -> aml::Name {
    name("_CRS", &aml::ResourceTemplate::new(resources.to_vec()))
}

/// `length` ports from `first` on.
fn ports(first: u16, length: u8) -> aml::IO {
    aml::IO::new(first, first, 1, length)
}

/// An interrupt of the ISA kind: consumed, edge-triggered, active high, not shared.
fn isa_interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

/// `address` in 32 bits; for constants, where the assertion holds when this is compiled.
#[allow(clippy::cast_possible_truncation)]
const fn below_4_gib(address: u64) -> u32 {
    assert!(address <= u32::MAX as u64);
    address as u32
}

/// The slots of bus 0 that support hot-plug.
struct Slots(Vec<u8>);

impl Slots {
    fn new(bitmap: u32) -> Self {
        Self(
            (1..layout::PCI_SLOT_COUNT)
                .filter(|slot| bitmap & (1 << slot) != 0)
                .collect(),
        )
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = Slot> {
        self.0.iter().map(|&slot| Slot(slot))
    }
}

/// A slot of bus 0, by device number.
#[derive(Clone, Copy)]
struct Slot(u8);

impl Slot {
    /// Name of its device object.
    fn path(self) -> aml::Path {
        aml::Path::new(&format!("S{:02X}_", self.0))
    }

    /// Its bit in the hot-plug registers.
    fn bit(self) -> u32 {
        1 << self.0
    }

    /// Device 0x`number`, function 0, as `_ADR` encodes it.
    fn address(self) -> u32 {
        u32::from(self.0) << 16
    }
}

/// Claims what belongs to no other device. Linux uses ECAM only where a motherboard device (or the e820 map) reserves it.
fn motherboard(slots: &Slots) -> Encoded {
    const ECAM_START: u32 = below_4_gib(layout::ECAM.start);
    const ECAM_SIZE: u32 = below_4_gib(layout::ECAM.size);
    let mut claimed = Encoded::of(&[
        &aml::Memory32Fixed::new(true, ECAM_START, ECAM_SIZE),
        &ports(layout::PORT_ACPI, layout::ACPI_PORTS_SIZE),
    ]);
    if !slots.is_empty() {
        ports(layout::PORT_PCI_HOTPLUG, layout::PCI_HOTPLUG_PORTS_SIZE).to_aml_bytes(&mut claimed);
    }
    device(
        "MBRD",
        &[
            &hardware_id("PNP0C02"),
            &name("_UID", &aml::ZERO),
            &resources(&[&claimed]),
        ],
    )
}

/// The PCI host bridge with its windows, and the hot-plug slots on bus 0.
fn host_bridge(inputs: &AcpiInputs, slots: &Slots) -> Encoded {
    const MMIO32_FIRST: u32 = below_4_gib(layout::MMIO32.start);
    const MMIO32_LAST: u32 = below_4_gib(layout::MMIO32.end() - 1);
    let uncached = aml::AddressSpaceCacheable::NotCacheable;
    let mmio64 = inputs.mmio64;
    let windows = resources(&[
        &aml::AddressSpace::new_bus_number(0u16, u16::from(layout::PCI_BUS_COUNT) - 1),
        &ports(layout::PORT_PCI_CONFIG_ADDRESS, 8),
        // All ports but those of configuration mechanism #1.
        &aml::AddressSpace::new_io(0u16, layout::PORT_PCI_CONFIG_ADDRESS - 1, None),
        &aml::AddressSpace::new_io(layout::PORT_PCI_CONFIG_ADDRESS + 8, u16::MAX, None),
        &aml::AddressSpace::new_memory(uncached, true, MMIO32_FIRST, MMIO32_LAST, None),
        &aml::AddressSpace::new_memory(uncached, true, mmio64.start, mmio64.end() - 1, None),
    ]);
    let hotplug = if slots.is_empty() {
        Encoded::default()
    } else {
        hotplug(slots)
    };
    device(
        "PCI0",
        &[
            &hardware_id("PNP0A08"),
            &name("_CID", &aml::EISAName::new("PNP0A03")),
            &name("_UID", &aml::ZERO),
            &name("_SEG", &aml::ZERO),
            &name("_BBN", &aml::ZERO),
            &windows,
            &operating_system_capabilities(),
            &hotplug,
        ],
    )
}

/// `_OSC` of the host bridge (PCI firmware specification 3.3 §4.5.1): the system may control every PCIe feature itself
/// but hot-plug, which it would otherwise expect from hot-plug controllers in root ports (pciehp, shpchp) and not from
/// ACPI (acpiphp).
fn operating_system_capabilities() -> Encoded {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    const REVISION: u8 = 1;
    /// Bits of the control field: PME, AER, PCIe capability structure, LTR, DPC.
    const GRANTED: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7;
    /// Bits of the status field.
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const CAPABILITIES_MASKED: u8 = 1 << 4;

    let status = aml::Path::new("CDW1");
    let control = aml::Path::new("CDW3");
    let (arguments, local) = (aml::Arg(3), aml::Local(0));
    let add_to_status = |bits: u8| {
        Encoded::of(&[&aml::Or::new(
            &aml::Path::new("CDW1"),
            &aml::Path::new("CDW1"),
            &bits,
        )])
    };
    Encoded::of(&[&aml::Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &aml::CreateDWordField::new(&status, &arguments, &aml::ZERO),
            &aml::If::new(
                &aml::Equal::new(&aml::Arg(0), &aml::Uuid::new(PCI_HOST_BRIDGE)),
                vec![
                    &aml::CreateDWordField::new(&control, &arguments, &8u8),
                    &aml::If::new(
                        &aml::NotEqual::new(&aml::Arg(1), &REVISION),
                        vec![&add_to_status(UNKNOWN_REVISION)],
                    ),
                    &aml::And::new(&local, &control, &GRANTED),
                    &aml::If::new(
                        &aml::NotEqual::new(&local, &control),
                        vec![&add_to_status(CAPABILITIES_MASKED)],
                    ),
                    &aml::Store::new(&control, &local),
                ],
            ),
            &aml::Else::new(vec![&add_to_status(UNKNOWN_UUID)]),
            &aml::Return::new(&arguments),
        ],
    )])
}

/// Hot-plug on bus 0: the registers, a device object per slot, and the methods that tell the system what changed.
///
/// A slot has no `_STA`: acpiphp then reads the vendor id, which is always right, and costs nothing while nothing
/// changes. No lock is needed: each register is read or written as a whole, once.
fn hotplug(slots: &Slots) -> Encoded {
    let appeared = aml::Path::new("PCIU");
    let wanted_back = aml::Path::new("PCID");
    let mut objects = Encoded::of(&[
        &aml::OpRegion::new(
            "PHPR".into(),
            aml::OpRegionSpace::SystemIO,
            &layout::PORT_PCI_HOTPLUG,
            &layout::PCI_HOTPLUG_PORTS_SIZE,
        ),
        &aml::Field::new(
            "PHPR".into(),
            aml::FieldAccessType::DWord,
            aml::FieldLockRule::NoLock,
            aml::FieldUpdateRule::WriteAsZeroes,
            vec![
                aml::FieldEntry::Named(*b"PCIU", 32),
                aml::FieldEntry::Named(*b"PCID", 32),
                aml::FieldEntry::Named(*b"PCEJ", 32),
            ],
        ),
    ]);
    let mut notify_each = Encoded::default();
    for slot in slots.iter() {
        Encoded::of(&[&aml::Device::new(
            slot.path(),
            vec![
                &name("_ADR", &slot.address()),
                &name("_SUN", &slot.0),
                &aml::Method::new(
                    "_EJ0".into(),
                    1,
                    true,
                    vec![&aml::Store::new(&aml::Path::new("PCEJ"), &slot.bit())],
                ),
            ],
        )])
        .to_aml_bytes(&mut objects);
        aml::If::new(
            &aml::And::new(&aml::ZERO, &aml::Arg(0), &slot.bit()),
            vec![&aml::Notify::new(&slot.path(), &aml::Arg(1))],
        )
        .to_aml_bytes(&mut notify_each);
    }
    let notify = |register: &dyn Aml, event: u8| {
        Encoded::of(&[&aml::MethodCall::new("PNTF".into(), vec![register, &event])])
    };
    // PNTF (slots, event)
    aml::Method::new("PNTF".into(), 2, true, vec![&notify_each]).to_aml_bytes(&mut objects);
    // Appearance first: a device that was plugged in and wanted back before the system looked is found, then ejected.
    aml::Method::new(
        "PSCN".into(),
        0,
        true,
        vec![
            &notify(&appeared, notification::DEVICE_CHECK),
            &notify(&wanted_back, notification::EJECT_REQUEST),
        ],
    )
    .to_aml_bytes(&mut objects);
    objects
}

/// The power button, as a device; pressed through the event device.
fn power_button() -> Encoded {
    device("PWRB", &[&hardware_id("PNP0C0C"), &name("_UID", &aml::ZERO)])
}

/// The generic event device (ACPI 6.5 §5.6.9): its interrupt makes the system evaluate `_EVT`.
fn events(slots: &Slots) -> Encoded {
    let pending = aml::Local(0);
    let on = |event: u8, action: &dyn Aml| {
        Encoded::of(&[&aml::If::new(
            &aml::And::new(&aml::ZERO, &pending, &event),
            vec![action],
        )])
    };
    let mut react = on(
        ged_event::POWER_BUTTON,
        &aml::Notify::new(&aml::Path::new("PWRB"), &notification::BUTTON_PRESSED),
    );
    if !slots.is_empty() {
        let scan = aml::MethodCall::new("\\_SB_.PCI0.PSCN".into(), vec![]);
        on(ged_event::PCI_HOTPLUG, &scan).to_aml_bytes(&mut react);
    }
    device(
        "GED_",
        &[
            &name("_HID", &"ACPI0013"),
            &name("_UID", &aml::ZERO),
            &resources(&[&isa_interrupt(layout::GSI_GED)]),
            &aml::OpRegion::new(
                "GEDR".into(),
                aml::OpRegionSpace::SystemIO,
                &layout::PORT_GED_STATUS,
                &aml::ONE,
            ),
            &aml::Field::new(
                "GEDR".into(),
                aml::FieldAccessType::Byte,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![aml::FieldEntry::Named(*b"ESTS", 8)],
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Store::new(&pending, &aml::Path::new("ESTS")), &react],
            ),
        ],
    )
}

/// The first serial port.
fn serial_port() -> Encoded {
    device(
        "COM1",
        &[
            &hardware_id("PNP0501"),
            &name("_UID", &aml::ONE),
            &resources(&[&ports(layout::PORT_COM1, 8), &isa_interrupt(layout::GSI_COM1)]),
        ],
    )
}

/// The real-time clock.
fn real_time_clock(kind: RealTimeClock) -> Encoded {
    let mut claimed = Encoded::of(&[&ports(layout::PORT_RTC, 2)]);
    if kind == RealTimeClock::PortsAndInterrupt {
        isa_interrupt(layout::GSI_RTC).to_aml_bytes(&mut claimed);
    }
    device("RTC_", &[&hardware_id("PNP0B00"), &resources(&[&claimed])])
}

/// The port by which a guest kernel says that it crashes.
fn pvpanic() -> Encoded {
    device(
        "PEVT",
        &[
            &name("_HID", &"QEMU0001"),
            &resources(&[&ports(layout::PORT_PVPANIC, 1)]),
        ],
    )
}

/// The processors, by the ids that the MADT gives them.
fn processors(count: usize) -> Encoded {
    let mut processors = Encoded::of(&[&name("_HID", &"ACPI0010"), &name("_UID", &aml::ZERO)]);
    for uid in 0..count {
        device(
            &format!("C{uid:03X}"),
            &[&name("_HID", &"ACPI0007"), &name("_UID", &uid)],
        )
        .to_aml_bytes(&mut processors);
    }
    device("CPUS", &[&processors])
}
