//! The PCI hot-plug registers: which slots have something new, and which the host wants back.
//!
//! ```text
//!   host: insert(slot) ─► bit in PCIU ─► Ged::notify_pci ─► guest's event method reads PCIU, scans the slot
//!   host: remove(slot) ─► bit in PCID ─► Ged::notify_pci ─► guest lets go of the device, calls _EJ0
//!                                                           guest writes EJ ─► PlatformEvents::eject
//! ```
//!
//! Removal is the guest's decision: it may take long, or never come. [`crate::layout`] has the registers' addresses.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{Ged, PlatformEvents};
use crate::bus::BusDevice;
use crate::layout::{PORT_PCI_HOTPLUG, PORT_PCI_HOTPLUG_DOWN, PORT_PCI_HOTPLUG_EJECT, PORT_PCI_HOTPLUG_UP};

const UP: u64 = (PORT_PCI_HOTPLUG_UP - PORT_PCI_HOTPLUG) as u64;
const DOWN: u64 = (PORT_PCI_HOTPLUG_DOWN - PORT_PCI_HOTPLUG) as u64;
const EJECT: u64 = (PORT_PCI_HOTPLUG_EJECT - PORT_PCI_HOTPLUG) as u64;
/// Each register is a dword.
const REGISTER_SIZE: u64 = 4;

/// State of the hot-plug registers for suspend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum HotplugState {
    /// First version.
    #[serde(rename = "1")]
    V1 {
        /// Slots with something new.
        up: u32,
        /// Slots that the host wants back.
        down: u32,
    },
}

/// The registers.
pub struct PciHotplug {
    up: AtomicU32,
    down: AtomicU32,
    /// What is left of a register that is being read byte by byte: reading its first byte clears it.
    latch: Mutex<u32>,
    ged: Arc<Ged>,
    events: Arc<dyn PlatformEvents>,
}

impl PciHotplug {
    /// Registers that announce news by `ged` and report what the guest ejects to `events`.
    pub fn new(ged: Arc<Ged>, events: Arc<dyn PlatformEvents>) -> Arc<Self> {
        Arc::new(Self {
            up: AtomicU32::new(0),
            down: AtomicU32::new(0),
            latch: Mutex::new(0),
            ged,
            events,
        })
    }

    /// Tells the guest of a new device in `slot` (0..32; others do not exist and are ignored).
    pub fn announce(&self, slot: u8) {
        self.signal(&self.up, slot);
    }

    /// Asks the guest for the device in `slot` (0..32; others do not exist and are ignored). May be repeated.
    pub fn request_removal(&self, slot: u8) {
        self.signal(&self.down, slot);
    }

    /// The state for suspend.
    pub fn save(&self) -> HotplugState {
        HotplugState::V1 {
            up: self.up.load(Ordering::SeqCst),
            down: self.down.load(Ordering::SeqCst),
        }
    }

    /// Puts the registers into a saved state. The event that belongs to it is part of the [`Ged`]'s.
    pub fn restore(&self, saved: &HotplugState) {
        let HotplugState::V1 { up, down } = *saved;
        self.up.store(up, Ordering::SeqCst);
        self.down.store(down, Ordering::SeqCst);
    }

    /// Forgets everything: the guest was reset, and will find what is there.
    pub fn reset(&self) {
        self.restore(&HotplugState::V1 { up: 0, down: 0 });
    }

    fn signal(&self, register: &AtomicU32, slot: u8) {
        let Some(bit) = 1_u32.checked_shl(u32::from(slot)) else {
            return;
        };
        register.fetch_or(bit, Ordering::SeqCst);
        self.ged.notify_pci();
    }

    fn read_byte(&self, port: u64) -> u8 {
        let (register, byte) = (port - port % REGISTER_SIZE, port % REGISTER_SIZE);
        let source = match register {
            UP => &self.up,
            DOWN => &self.down,
            EJECT => return 0,
            _ => return 0xff,
        };
        let mut latch = self.latch.lock().unwrap_or_else(PoisonError::into_inner);
        if byte == 0 {
            *latch = source.swap(0, Ordering::SeqCst);
        }
        let [value, rest @ ..] = latch.to_le_bytes();
        *latch = u32::from_le_bytes([rest[0], rest[1], rest[2], 0]);
        value
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = self.read_byte(port);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            let Some(byte) = port.checked_sub(EJECT).and_then(|byte| u8::try_from(byte).ok()) else {
                continue;
            };
            for bit in (0..8).filter(|bit| byte < 4 && value & (1 << bit) != 0) {
                self.events.eject(byte * 8 + bit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Event, Lines, Recorder};

    fn read_dword(device: &dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn hotplug() -> (Arc<PciHotplug>, Lines, Arc<Recorder>) {
        let (lines, events) = (Lines::default(), Recorder::new());
        (
            PciHotplug::new(Ged::new(lines.interrupt()), events.clone()),
            lines,
            events,
        )
    }

    #[test]
    fn news_are_announced_and_read_once() {
        let (hotplug, lines, _) = hotplug();
        hotplug.announce(3);
        hotplug.announce(31);
        hotplug.request_removal(5);
        assert_eq!(lines.count(), 3);
        assert_eq!(read_dword(&*hotplug, UP), 1 << 3 | 1 << 31);
        assert_eq!(read_dword(&*hotplug, UP), 0);
        assert_eq!(read_dword(&*hotplug, DOWN), 1 << 5);
        assert_eq!(read_dword(&*hotplug, DOWN), 0);
        assert_eq!(read_dword(&*hotplug, EJECT), 0);
    }

    #[test]
    fn a_register_read_byte_by_byte_loses_nothing() {
        let (hotplug, _, _) = hotplug();
        hotplug.announce(0);
        hotplug.announce(9);
        let bytes: Vec<u8> = (0..4)
            .map(|at| {
                let mut byte = [0];
                hotplug.read(at, &mut byte);
                byte[0]
            })
            .collect();
        assert_eq!(bytes, [1, 2, 0, 0]);
    }

    #[test]
    fn eject_reports_each_slot() {
        let (hotplug, _, events) = hotplug();
        hotplug.write(EJECT, &(1_u32 << 4 | 1 << 31).to_le_bytes());
        assert_eq!(events.take(), [Event::Eject(4), Event::Eject(31)]);
        hotplug.write(UP, &[0xff; 4]);
        assert_eq!(events.take(), []);
    }

    #[test]
    fn slots_that_do_not_exist_are_ignored() {
        let (hotplug, lines, _) = hotplug();
        hotplug.announce(32);
        hotplug.request_removal(255);
        assert_eq!(lines.count(), 0);
    }
}
