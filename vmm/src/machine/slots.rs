//! The devices of a machine: which device sits in which PCI slot, coming and going while the guest runs.
//!
//! ```text
//!   attach()   put on the bus ─► PCIU bit, GED interrupt ─► guest enumerates, its driver sets DRIVER_OK   (Active)
//!   detach()   PCID bit, GED interrupt ─► guest unbinds its driver, writes EJ ─► ejected()
//!              ─► taken off the bus, drained ─► collect(): name and slot are free again
//! ```
//!
//! The guest may refuse or never answer a removal: the device then stays, in state `removing`, and works on.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::{DeviceId, DeviceState, DiskStatus, NetStatus};
use block_io::Worker;

use super::devices::{HostDevice, Kind};
use super::signals::{Signals, SlotSignals};
use crate::layout::AddressRange;
use crate::memory::Ram;
use crate::pci::{PciBus, PciError};
use crate::transport::{BAR_SIZE, TransportError, VirtioPci};
use crate::vm::Vm;

/// A device on the bus.
pub(super) struct Slot {
    pub(super) id: DeviceId,
    pub(super) kind: Kind,
    pub(super) state: DeviceState,
    transport: Arc<VirtioPci>,
    workers: Vec<Worker>,
    /// What ends after the device and its workers.
    guard: Option<Box<dyn Send>>,
}

/// All slots of a machine.
pub(super) struct Slots {
    bus: Arc<PciBus>,
    window: AddressRange,
    slots: BTreeMap<u8, Slot>,
    /// Off the bus, but requests are still in flight.
    leaving: Vec<Slot>,
}

/// A device cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The bus is full.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The transport cannot be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl Slots {
    /// Slots on `bus`; `window` is the host bridge's window for 64-bit BARs.
    pub(super) fn new(bus: Arc<PciBus>, window: AddressRange) -> Self {
        Slots {
            bus,
            window,
            slots: BTreeMap::new(),
            leaving: Vec::new(),
        }
    }

    /// Puts a device into the lowest free slot; returns its number.
    pub(super) fn insert(
        &mut self,
        vm: &Arc<Vm>,
        ram: &Ram,
        signals: &Arc<Signals>,
        device: HostDevice,
    ) -> Result<u8, SlotError> {
        let slot = self.bus.free_slot()?;
        let address = self.window.start + u64::from(slot) * BAR_SIZE;
        let events = Arc::new(SlotSignals {
            slot,
            signals: signals.clone(),
        });
        let HostDevice {
            id,
            kind,
            device,
            workers,
            guard,
        } = device;
        let transport = Arc::new(VirtioPci::new(
            vm.clone(),
            ram.memory().clone(),
            ram.stays(),
            device,
            address,
            events,
        )?);
        self.bus.insert(slot, transport.clone())?;
        self.slots.insert(
            slot,
            Slot {
                id,
                kind,
                state: DeviceState::Attached,
                transport,
                workers,
                guard,
            },
        );
        Ok(slot)
    }

    pub(super) fn get_mut(&mut self, slot: u8) -> Option<&mut Slot> {
        self.slots.get_mut(&slot)
    }

    /// Slot and device of a name.
    pub(super) fn find(&mut self, id: &DeviceId) -> Option<(u8, &mut Slot)> {
        let found = self.slots.iter_mut().find(|(_, slot)| slot.id == *id);
        found.map(|(&number, slot)| (number, slot))
    }

    /// Whether a device of that name exists, even if only its last requests are still in flight.
    pub(super) fn has(&self, id: &DeviceId) -> bool {
        self.slots
            .values()
            .chain(&self.leaving)
            .any(|slot| slot.id == *id)
    }

    /// The guest let go of a slot: takes its device off the bus and begins to drain it. True if there was one.
    pub(super) fn eject(&mut self, slot: u8) -> bool {
        let Some(device) = self.slots.remove(&slot) else {
            return false;
        };
        self.bus.remove(slot);
        device.transport.stop();
        self.leaving.push(device);
        true
    }

    /// Whether a device is still draining.
    pub(super) fn is_draining(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Ends devices that have drained; returns their names, and whether it was the SCSI adapter.
    pub(super) fn collect(&mut self) -> Vec<(DeviceId, bool)> {
        let (gone, leaving) = std::mem::take(&mut self.leaving)
            .into_iter()
            .partition(|slot| slot.transport.is_idle());
        self.leaving = leaving;
        gone.into_iter()
            .map(|slot: Slot| (slot.id, matches!(slot.kind, Kind::ScsiAdapter)))
            .collect()
    }

    /// Begins to stop all devices. vCPUs must not run any more.
    pub(super) fn stop_all(&mut self) {
        for slot in self.slots.values() {
            slot.transport.stop();
        }
    }

    /// Whether all devices stand still after [`Self::stop_all`]; otherwise the name of one that does not.
    pub(super) fn busy(&self) -> Option<&DeviceId> {
        let slots = self.slots.values().chain(&self.leaving);
        slots
            .into_iter()
            .find(|slot| !slot.transport.is_idle())
            .map(|slot| &slot.id)
    }

    /// Takes all devices out, in the order of their slots, for the next machine.
    pub(super) fn into_devices(mut self) -> Vec<HostDevice> {
        let slots = std::mem::take(&mut self.slots);
        for &slot in slots.keys() {
            self.bus.remove(slot);
        }
        slots
            .into_values()
            .filter_map(
                |Slot {
                     id,
                     kind,
                     transport,
                     workers,
                     guard,
                     ..
                 }| {
                    let transport = Arc::into_inner(transport)?;
                    Some(HostDevice {
                        id,
                        kind,
                        device: transport.into_device(),
                        workers,
                        guard,
                    })
                },
            )
            .collect()
    }

    /// All disks, in the order of their slots.
    pub(super) fn disks(&self) -> Vec<DiskStatus> {
        self.slots
            .values()
            .filter_map(|slot| slot.kind.disk_status(slot.state))
            .collect()
    }

    /// All network cards, in the order of their slots.
    pub(super) fn nets(&self) -> Vec<NetStatus> {
        self.slots
            .values()
            .filter_map(|slot| slot.kind.net_status(slot.state))
            .collect()
    }
}
