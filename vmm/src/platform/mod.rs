//! The devices of a PC's mainboard, as far as a guest needs them: serial port, clock, reset and power-off.
//!
//! All are port I/O devices that vCPU threads call through the port [`Bus`]; none has a thread or waits for anything.
//! [`Platform::new`] puts them on the bus. What the guest asks of the machine goes to [`PlatformEvents`].

mod calendar;
mod debug_port;
mod hotplug;
mod i8042;
mod power;
mod pvpanic;
mod rate_limit;
mod rtc;
mod serial;
#[cfg(test)]
mod serial_flow;
#[cfg(test)]
mod testing;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

pub use debug_port::{DebugPort, MarkHandler, PORT_DEBUG, PORT_POST, PostPort};
pub use hotplug::{HotplugState, PciHotplug};
pub use i8042::I8042;
pub use power::{AcpiRegisters, Ged, GedState};
pub use pvpanic::PvPanic;
pub use rate_limit::{GuestLines, RateLimit};
pub use rtc::{Rtc, RtcRegisters, RtcState, WallClock, host_clock};
pub use serial::{Serial, SerialRegisters, SerialState};

use crate::bus::{Bus, BusDevice, BusError};
use crate::console::ConsoleHandle;
use crate::layout::{
    ACPI_PORTS_SIZE, PCI_HOTPLUG_PORTS_SIZE, PORT_ACPI, PORT_COM1, PORT_I8042_DATA, PORT_PCI_HOTPLUG,
    PORT_PVPANIC, PORT_RTC,
};

/// Signals a rising edge of an interrupt line. Called from any thread, must not wait.
pub type Interrupt = Arc<dyn Fn() + Send + Sync>;

/// An interrupt line that is a KVM irqfd: `eventfd` must be registered for the GSI.
pub fn irqfd(eventfd: EventFd) -> Interrupt {
    // It can fail only when the counter is full, and then the interrupt is pending anyway.
    Arc::new(move || eventfd.write(1).unwrap_or_default())
}

/// How a guest kernel crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPanic {
    /// It panicked and does nothing more.
    Panicked,
    /// It panicked and hands over to its crash kernel, which is going to dump it.
    CrashKernelStarts,
}

/// What a guest asks of the machine. Called from vCPU threads, which must not enter the guest again after
/// [`Self::power_off`] and [`Self::reset`]; the calls themselves only note the wish and return.
pub trait PlatformEvents: Send + Sync {
    /// Switch off.
    fn power_off(&self);
    /// Reset.
    fn reset(&self);
    /// The guest's kernel crashed.
    fn guest_panic(&self, panic: GuestPanic);
    /// The guest has let go of the device in this slot of PCI bus 0.
    fn eject(&self, slot: u8);
}

/// What the mainboard is to be like.
pub struct PlatformConfig {
    /// Bytes of guest memory.
    pub ram_size: u64,
    /// Where COM1 leads.
    pub serial: ConsoleHandle,
    /// The interrupt line of COM1 ([`crate::layout::GSI_COM1`]).
    pub serial_interrupt: Interrupt,
    /// The interrupt line of the generic event device ([`crate::layout::GSI_GED`]).
    pub ged_interrupt: Interrupt,
    /// The clock that the RTC shows.
    pub clock: WallClock,
    /// Times of the debug port's marks count from here.
    pub started: Instant,
    /// Who is told of the debug port's marks.
    pub marks: MarkHandler,
    /// Who is told what the guest asks for.
    pub events: Arc<dyn PlatformEvents>,
}

/// The devices with which the VMM has to do later.
pub struct Platform {
    /// COM1.
    pub serial: Arc<Serial>,
    /// The clock.
    pub rtc: Arc<Rtc>,
    /// Power button and hot-plug notification.
    pub ged: Arc<Ged>,
    /// PCI hot-plug registers.
    pub hotplug: Arc<PciHotplug>,
    /// The debug port.
    pub debug: Arc<DebugPort>,
}

/// State of all devices for suspend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// COM1.
    pub serial: SerialState,
    /// The clock.
    pub rtc: RtcState,
    /// The generic event device.
    pub ged: GedState,
    /// The PCI hot-plug registers.
    pub hotplug: HotplugState,
}

impl Platform {
    /// Puts all devices on the bus of I/O `ports`.
    ///
    /// # Errors
    /// Somebody else has one of the ports.
    pub fn new(config: PlatformConfig, ports: &Bus) -> Result<Self, BusError> {
        let events = config.events;
        let serial = Serial::new(config.serial, config.serial_interrupt);
        let rtc = Rtc::new(config.ram_size, config.clock, events.clone());
        let ged = Ged::new(config.ged_interrupt);
        let hotplug = PciHotplug::new(ged.clone(), events.clone());
        let debug = DebugPort::new(config.started, config.marks);
        let registers = AcpiRegisters::new(ged.clone(), events.clone());

        let devices: [(&str, Range<u64>, Arc<dyn BusDevice>); 8] = [
            ("COM1", range(PORT_COM1, 8), serial.clone()),
            ("RTC", range(PORT_RTC, 2), rtc.clone()),
            ("i8042", range(PORT_I8042_DATA, 5), I8042::new(events.clone())),
            ("ACPI registers", range(PORT_ACPI, ACPI_PORTS_SIZE), registers),
            (
                "PCI hot-plug",
                range(PORT_PCI_HOTPLUG, PCI_HOTPLUG_PORTS_SIZE),
                hotplug.clone(),
            ),
            ("pvpanic", range(PORT_PVPANIC, 1), PvPanic::new(events)),
            ("debug port", range(PORT_DEBUG, 1), debug.clone()),
            ("POST codes", range(PORT_POST, 1), Arc::new(PostPort)),
        ];
        for (name, ports_of_device, device) in devices {
            ports.insert(name, ports_of_device, device)?;
        }
        Ok(Self {
            serial,
            rtc,
            ged,
            hotplug,
            debug,
        })
    }

    /// The guest was reset: the devices are as after power-on. The clock and its memory go on, as with a battery.
    pub fn reset(&self) {
        self.serial.reset();
        self.ged.reset();
        self.hotplug.reset();
    }

    /// The state for suspend. The vCPUs must have stopped.
    pub fn save(&self) -> PlatformState {
        PlatformState {
            serial: self.serial.save(),
            rtc: self.rtc.save(),
            ged: self.ged.save(),
            hotplug: self.hotplug.save(),
        }
    }

    /// Puts the devices into a saved state, before the vCPUs run. Pending interrupts are signalled again.
    pub fn restore(&self, saved: &PlatformState) {
        self.rtc.restore(&saved.rtc);
        self.hotplug.restore(&saved.hotplug);
        self.ged.restore(&saved.ged);
        self.serial.restore(&saved.serial);
    }
}

/// `count` ports from `first` on.
fn range(first: u16, count: u8) -> Range<u64> {
    u64::from(first)..u64::from(first) + u64::from(count)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::testing::{Event, Lines, Recorder};
    use super::*;

    fn platform() -> (Platform, Bus, Arc<Recorder>) {
        let (ports, events) = (Bus::new(), Recorder::new());
        let config = PlatformConfig {
            ram_size: 1 << 30,
            serial: ConsoleHandle::null(),
            serial_interrupt: Lines::default().interrupt(),
            ged_interrupt: Lines::default().interrupt(),
            clock: Box::new(|| Duration::from_secs(1_795_277_159)),
            started: Instant::now(),
            marks: Arc::new(|_, _| {}),
            events: events.clone(),
        };
        (Platform::new(config, &ports).unwrap(), ports, events)
    }

    #[test]
    fn the_guest_switches_off_and_resets_through_the_ports() {
        let (platform, ports, events) = platform();
        ports.write(0x600, &[0x34]);
        ports.write(0x602, &[1]);
        ports.write(0x64, &[0xfe]);
        ports.write(0x505, &[1]);
        platform.hotplug.announce(2);
        let mut slots = [0; 4];
        ports.read(0xae00, &mut slots);
        assert_eq!(slots, [4, 0, 0, 0]);
        let panic = Event::Panic(GuestPanic::Panicked);
        assert_eq!(
            events.take(),
            [Event::PowerOff, Event::Reset, Event::Reset, panic]
        );
    }

    #[test]
    fn state_comes_back_as_it_was() {
        let (platform, ports, _) = platform();
        ports.write(0x3fc, &[3]);
        ports.write(0x70, &[0x40]);
        ports.write(0x71, &[0x99]);
        platform.ged.press_power_button();
        platform.hotplug.request_removal(7);
        let text = toml::to_string(&platform.save()).unwrap();

        let (resumed, ports, _) = self::platform();
        resumed.restore(&toml::from_str(&text).unwrap());
        assert_eq!(resumed.save(), platform.save());
        let mut data = [0];
        ports.read(0x71, &mut data);
        assert_eq!(data, [0x99]);
        resumed.reset();
        assert_ne!(resumed.save(), platform.save());
    }

    /// One access of a hostile guest: to any port, mostly near a device, of any width.
    fn access() -> impl Strategy<Value = (u64, bool, Vec<u8>)> {
        let near = prop::sample::select(vec![0x60_u64, 0x70, 0x80, 0xe9, 0x3f8, 0x505, 0x600, 0xae00]);
        let port = prop_oneof![8 => (near, 0_u64..16).prop_map(|(base, at)| base + at), 1 => 0_u64..0x1_0000];
        (port, any::<bool>(), prop::collection::vec(any::<u8>(), 1..9))
    }

    proptest! {
        #[test]
        fn no_sequence_of_port_accesses_does_harm(accesses in prop::collection::vec(access(), 1..400)) {
            let (platform, ports, _) = platform();
            for (port, is_write, mut data) in accesses {
                if is_write {
                    ports.write(port, &data);
                } else {
                    ports.read(port, &mut data);
                }
                prop_assert!(crate::console::ConsoleInput::push(&*platform.serial, &data) <= data.len());
            }
            let saved = platform.save();
            platform.restore(&saved);
            prop_assert_eq!(platform.save(), saved);
        }
    }
}
