//! The ACPI register block: sleep control and status, reset, and the status of the generic event device.
//!
//! Hardware-reduced ACPI has no PM1 or GPE registers. The guest switches off by the sleep control register (ACPI 6.5
//! §4.8.3.7) and reboots by the reset register; the power button and hot-plug come as bits of an event register, with one
//! edge-triggered interrupt (§5.6.9). Addresses and values are those of [`crate::layout`], which the ACPI tables use as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use super::{Interrupt, PlatformEvents};
use crate::bus::BusDevice;
use crate::layout::{
    ACPI_RESET_VALUE, ACPI_SLEEP_VALUE_S5, PORT_ACPI, PORT_ACPI_RESET, PORT_ACPI_SLEEP_CONTROL,
    PORT_ACPI_SLEEP_STATUS, PORT_GED_STATUS, ged_event,
};

const SLEEP_CONTROL: u64 = (PORT_ACPI_SLEEP_CONTROL - PORT_ACPI) as u64;
const SLEEP_STATUS: u64 = (PORT_ACPI_SLEEP_STATUS - PORT_ACPI) as u64;
const RESET: u64 = (PORT_ACPI_RESET - PORT_ACPI) as u64;
const EVENTS: u64 = (PORT_GED_STATUS - PORT_ACPI) as u64;

/// State of the event device for suspend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum GedState {
    /// First version.
    #[serde(rename = "1")]
    V1 {
        /// Events that the guest has not seen.
        pending: u8,
    },
}

/// The generic event device: how the host attracts the guest's attention.
pub struct Ged {
    pending: AtomicU8,
    interrupt: Interrupt,
}

impl Ged {
    /// A device that signals `interrupt` for each event.
    pub fn new(interrupt: Interrupt) -> Arc<Self> {
        Arc::new(Self {
            pending: AtomicU8::new(0),
            interrupt,
        })
    }

    /// Presses the power button: the guest shuts down, if it wants to.
    pub fn press_power_button(&self) {
        self.notify(ged_event::POWER_BUTTON);
    }

    /// Tells the guest that the PCI hot-plug registers have something new.
    pub fn notify_pci(&self) {
        self.notify(ged_event::PCI_HOTPLUG);
    }

    /// The state for suspend.
    pub fn save(&self) -> GedState {
        GedState::V1 {
            pending: self.pending.load(Ordering::SeqCst),
        }
    }

    /// Puts the device into a saved state, and repeats the interrupt if an event is pending.
    pub fn restore(&self, saved: &GedState) {
        let GedState::V1 { pending } = *saved;
        self.pending.store(pending, Ordering::SeqCst);
        if pending != 0 {
            (self.interrupt)();
        }
    }

    /// Forgets all events: the guest was reset.
    pub fn reset(&self) {
        self.pending.store(0, Ordering::SeqCst);
    }

    fn notify(&self, event: u8) {
        self.pending.fetch_or(event, Ordering::SeqCst);
        // For each event: the guest may have missed the edge of an earlier one.
        (self.interrupt)();
    }

    /// The pending events, which are then seen.
    fn take(&self) -> u8 {
        self.pending.swap(0, Ordering::SeqCst)
    }
}

/// The register block.
pub struct AcpiRegisters {
    ged: Arc<Ged>,
    events: Arc<dyn PlatformEvents>,
}

impl AcpiRegisters {
    /// Registers that show the events of `ged`; power-off and reset go to `events`.
    pub fn new(ged: Arc<Ged>, events: Arc<dyn PlatformEvents>) -> Arc<Self> {
        Arc::new(Self { ged, events })
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = match register {
                SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
                EVENTS => self.ged.take(),
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            match (register, *byte) {
                (SLEEP_CONTROL, ACPI_SLEEP_VALUE_S5) => self.events.power_off(),
                (RESET, ACPI_RESET_VALUE) => self.events.reset(),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Event, Lines, Recorder, read_byte};

    fn registers() -> (Arc<AcpiRegisters>, Arc<Ged>, Lines, Arc<Recorder>) {
        let (lines, events) = (Lines::default(), Recorder::new());
        let ged = Ged::new(lines.interrupt());
        (
            AcpiRegisters::new(ged.clone(), events.clone()),
            ged,
            lines,
            events,
        )
    }

    #[test]
    fn only_s5_with_sleep_enable_switches_off() {
        let (registers, _, _, events) = registers();
        for value in [0x00, 0x14, 0x20, 0x30, 0x35, 0xff] {
            registers.write(SLEEP_CONTROL, &[value]);
        }
        assert_eq!(events.take(), []);
        registers.write(SLEEP_CONTROL, &[0x34]);
        assert_eq!(events.take(), [Event::PowerOff]);
    }

    #[test]
    fn reset_register_resets() {
        let (registers, _, _, events) = registers();
        registers.write(RESET, &[0]);
        assert_eq!(events.take(), []);
        registers.write(RESET, &[1]);
        assert_eq!(events.take(), [Event::Reset]);
    }

    #[test]
    fn events_are_signalled_and_read_once() {
        let (registers, ged, lines, _) = registers();
        ged.press_power_button();
        ged.notify_pci();
        assert_eq!(lines.count(), 2);
        assert_eq!(read_byte(&*registers, EVENTS), 0b11);
        assert_eq!(read_byte(&*registers, EVENTS), 0);
    }

    #[test]
    fn a_wide_read_takes_the_events_once() {
        let (registers, ged, _, _) = registers();
        ged.press_power_button();
        let mut data = [0; 8];
        registers.read(0, &mut data);
        assert_eq!(data, [0, 0, 0, 0xff, 1, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn a_pending_event_survives_suspend_and_is_signalled_again() {
        let (_, ged, _, _) = registers();
        ged.press_power_button();
        let saved = ged.save();

        let (registers, ged, lines, _) = registers();
        ged.restore(&saved);
        assert_eq!(lines.count(), 1);
        assert_eq!(read_byte(&*registers, EVENTS), ged_event::POWER_BUTTON);
    }
}
