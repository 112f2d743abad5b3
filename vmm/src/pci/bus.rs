//! The root bus: who sits in which slot, and who answers to which address.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use super::{ConfigSpace, Identity, PciFunction};
use crate::bus::BusDevice;
use crate::layout;

/// Slots of the bus; slot 0 is the host bridge.
const SLOTS: usize = layout::PCI_SLOT_COUNT as usize;

/// The bus cannot take a function.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// All slots are taken.
    #[error("all {} PCI slots are taken; remove a device first", SLOTS - 1)]
    NoSlot,
    /// The slot has a function already.
    #[error("PCI slot {0} is taken")]
    SlotTaken(u8),
    /// The window for BARs is full.
    #[error("no room for another {0} bytes of device memory in the guest's PCI window")]
    NoAddresses(u64),
}

struct Decoded {
    range: Range<u64>,
    function: Arc<dyn PciFunction>,
}

/// The root bus.
pub struct PciBus {
    slots: Mutex<[Option<Arc<dyn PciFunction>>; SLOTS]>,
    /// Ranges that BARs answer to, sorted by start; made anew when one moves.
    decoded: ArcSwap<Vec<Decoded>>,
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let taken = self.lock().iter().filter(|slot| slot.is_some()).count();
        formatter
            .debug_struct("PciBus")
            .field("functions", &taken)
            .finish()
    }
}

impl PciBus {
    /// A bus with a host bridge in slot 0.
    pub fn new() -> Self {
        let mut slots: [Option<Arc<dyn PciFunction>>; SLOTS] = [const { None }; SLOTS];
        slots[0] = Some(Arc::new(HostBridge::new()));
        PciBus {
            slots: Mutex::new(slots),
            decoded: ArcSwap::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Arc<dyn PciFunction>>; SLOTS]> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lowest free slot.
    ///
    /// # Errors
    /// There is none.
    pub fn free_slot(&self) -> Result<u8, PciError> {
        let slot = self
            .lock()
            .iter()
            .position(Option::is_none)
            .ok_or(PciError::NoSlot)?;
        u8::try_from(slot).map_err(|_| PciError::NoSlot)
    }

    /// Puts a function into a slot.
    ///
    /// # Errors
    /// The slot is taken or does not exist.
    pub fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        match self.lock().get_mut(usize::from(slot)) {
            Some(place @ None) => *place = Some(function),
            _ => return Err(PciError::SlotTaken(slot)),
        }
        self.update_decoding();
        Ok(())
    }

    /// Takes the function out of a slot.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let function = self.lock().get_mut(usize::from(slot)).and_then(Option::take);
        self.update_decoding();
        function
    }

    fn function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.lock().get(slot).and_then(Clone::clone)
    }

    /// Reads configuration space: `address` is an offset in ECAM (bus, slot, function, register).
    fn config_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, register)) = self.target(address, data.len()) {
            function.config_read(register, data);
        }
    }

    fn config_write(&self, address: u64, data: &[u8]) {
        if let Some((function, register)) = self.target(address, data.len()) {
            let before = function.bar();
            function.config_write(register, data);
            if function.bar() != before {
                self.update_decoding();
            }
        }
    }

    /// Function and register of an ECAM offset (PCIe base specification §7.2.2); aligned accesses of up to a dword only.
    fn target(&self, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, usize)> {
        let address = usize::try_from(address).ok()?;
        let (bus, slot, function, register) = (
            address >> 20,
            (address >> 15) & 0x1f,
            (address >> 12) & 7,
            address & 0xfff,
        );
        let aligned = matches!(length, 1 | 2 | 4) && register % length == 0;
        if bus != 0 || function != 0 || !aligned {
            return None;
        }
        Some((self.function(slot)?, register))
    }

    fn update_decoding(&self) {
        let slots = self.lock();
        let mut decoded: Vec<Decoded> = slots
            .iter()
            .flatten()
            .filter_map(|function| {
                Some(Decoded {
                    range: function.bar()?,
                    function: function.clone(),
                })
            })
            .collect();
        decoded.sort_unstable_by_key(|entry| entry.range.start);
        // Stored under the lock, so that of two concurrent changes the later one wins.
        self.decoded.store(Arc::new(decoded));
        drop(slots);
    }

    /// Calls `access` with the function that answers to `address` and the offset in its BAR. Where two BARs overlap, which
    /// only a confused guest makes them do, the one with the higher start answers.
    fn with_function(&self, address: u64, access: impl FnOnce(&dyn PciFunction, u64)) {
        let decoded = self.decoded.load();
        let index = decoded.partition_point(|entry| entry.range.start <= address);
        if let Some(entry) = index.checked_sub(1).and_then(|index| decoded.get(index))
            && entry.range.contains(&address)
        {
            access(&*entry.function, address - entry.range.start);
        }
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory-mapped configuration space on the MMIO bus.
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

/// A window for BARs on the MMIO bus; `base` is its first address.
#[derive(Debug)]
pub struct Window {
    /// The bus behind the window.
    pub bus: Arc<PciBus>,
    /// Guest physical address of the window's first byte.
    pub base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.bus.with_function(self.base + offset, |function, offset| {
            function.bar_read(offset, data)
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.with_function(self.base + offset, |function, offset| {
            function.bar_write(offset, data)
        });
    }
}

/// Configuration mechanism #1 (PCI Local Bus 3.0 §3.2.2.3.2): address in port 0xCF8, data in 0xCFC to 0xCFF.
#[derive(Debug)]
pub struct Cf8 {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
}

impl Cf8 {
    /// The ports in front of `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Cf8 {
            bus,
            address: Mutex::new(0),
        }
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ECAM offset of a data port access, if the address register enables it.
    fn target(&self, port: u64) -> Option<u64> {
        let address = *self.address();
        let enabled = address & (1 << 31) != 0;
        let bus_slot_function = u64::from(address >> 8 & 0xffff);
        let register = u64::from(address & 0xfc) + port;
        enabled.then_some(bus_slot_function << 12 | register)
    }
}

impl BusDevice for Cf8 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match offset {
            0..4 => virtio_core::read_config_bytes(&self.address().to_le_bytes(), offset, data),
            4..8 => {
                if let Some(target) = self.target(offset - 4) {
                    self.bus.config_read(target, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            // Only a dword written to the whole register counts; byte accesses are for other devices on real machines.
            (0, Ok(address)) => *self.address() = u32::from_le_bytes(address),
            (4..8, _) => {
                if let Some(target) = self.target(offset - 4) {
                    self.bus.config_write(target, data);
                }
            }
            _ => {}
        }
    }
}

/// The host bridge: a function that only says that it is there.
#[derive(Debug)]
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn new() -> Self {
        HostBridge(Mutex::new(ConfigSpace::new(Identity {
            // Red Hat's generic PCIe host bridge, which every operating system knows to have no quirks.
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }

    fn bar(&self) -> Option<Range<u64>> {
        None
    }

    fn bar_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_functions_read_as_ones_by_both_ways() {
        let bus = Arc::new(PciBus::new());
        let cf8 = Cf8::new(bus.clone());
        let mut data = [0; 4];
        Ecam(bus.clone()).read(5 << 15, &mut data);
        assert_eq!(data, [0xff; 4]);
        cf8.write(0, &(1_u32 << 31 | 5 << 11).to_le_bytes());
        cf8.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
        cf8.write(0, &(1_u32 << 31).to_le_bytes());
        cf8.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0008_1b36);
        cf8.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 << 31);
    }

    #[test]
    fn odd_widths_and_places_do_nothing() {
        let bus = Arc::new(PciBus::new());
        let ecam = Ecam(bus.clone());
        for (offset, length) in [(1, 2), (3, 4), (0, 3), (0, 8), (u64::MAX, 4), (0xfff, 2)] {
            let mut data = vec![0; length];
            ecam.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0xff), "{offset} {length}");
            ecam.write(offset, &data);
        }
        let cf8 = Cf8::new(bus);
        cf8.write(0, &[0xff; 4]);
        let mut data = [0; 8];
        cf8.read(7, &mut data);
        cf8.write(6, &data);
    }
}
