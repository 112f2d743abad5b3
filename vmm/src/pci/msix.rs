//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages in the function's BAR, delivered without this process.
//!
//! Every source of interrupts (a virtqueue, the configuration) is an eventfd. While its vector is enabled and unmasked the
//! eventfd is connected to KVM as an irqfd; while it is masked it is disconnected, and what is signalled stays in the
//! eventfd: that *is* the pending bit. Connecting it again delivers it. So there is no pending-bit state to keep, and none to
//! get wrong.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::eventfds;
use crate::platform::GuestLines;
use crate::vm::{KvmError, MsiMessage, Vm};

/// The vector number that means "no interrupt" (virtio 1.2 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Bytes of a table entry: address low, address high, data, control.
const ENTRY_SIZE: usize = 16;
/// Bit 0 of the control dword: the vector is masked; so it is after reset.
const CONTROL_MASKED: u32 = 1;
/// Message control register: enable, and mask all.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

#[derive(Debug, Clone, Copy)]
struct Entry {
    dwords: [u32; 4],
    gsi: u32,
}

impl Entry {
    fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.dwords;
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }

    fn is_masked(&self) -> bool {
        self.dwords[3] & CONTROL_MASKED != 0
    }
}

/// One source of interrupts.
#[derive(Debug)]
struct Source {
    event: EventFd,
    vector: u16,
    /// The GSI that the event is connected to.
    connected: Option<u32>,
}

/// The MSI-X state of a function.
#[derive(Debug)]
pub struct Msix {
    vm: Arc<Vm>,
    entries: Vec<Entry>,
    sources: Vec<Source>,
    control: u16,
}

impl Msix {
    /// A function with one vector per source, all masked; `sources` are the eventfds that raise them.
    ///
    /// # Errors
    /// There are no GSIs left.
    pub fn new(vm: Arc<Vm>, sources: Vec<EventFd>) -> Result<Self, KvmError> {
        let mut msix = Msix {
            vm,
            entries: Vec::new(),
            sources: Vec::new(),
            control: 0,
        };
        for event in sources {
            let gsi = msix.vm.allocate_gsi()?;
            msix.entries.push(Entry {
                dwords: [0, 0, 0, CONTROL_MASKED],
                gsi,
            });
            msix.sources.push(Source {
                event,
                vector: NO_VECTOR,
                connected: None,
            });
        }
        Ok(msix)
    }

    /// Body of the capability (number 0x11): table at `table` and pending bits at `pending` in BAR 0. The two bits of the
    /// control register that software may write are masked by [`Self::CAPABILITY_WRITABLE`].
    pub fn capability(&self, table: u32, pending: u32) -> [u8; 10] {
        let size = u16::try_from(self.entries.len().saturating_sub(1)).unwrap_or(0);
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&size.to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..10].copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// Writable bits of [`Self::capability`].
    pub const CAPABILITY_WRITABLE: [u8; 2] = (ENABLE | FUNCTION_MASK).to_le_bytes();

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// The message control register was written.
    pub fn set_control(&mut self, control: u16) {
        if self.control != control {
            self.control = control;
            self.update_all();
        }
    }

    /// Source `source` uses `vector` from now on. False (and [`NO_VECTOR`]) if there is no such vector.
    pub fn assign(&mut self, source: usize, vector: u16) -> bool {
        let valid = usize::from(vector) < self.entries.len();
        if let Some(source) = self.sources.get_mut(source) {
            source.vector = if valid { vector } else { NO_VECTOR };
        }
        self.update(source);
        valid || vector == NO_VECTOR
    }

    /// The vector of a source.
    pub fn vector(&self, source: usize) -> u16 {
        self.sources.get(source).map_or(NO_VECTOR, |source| source.vector)
    }

    /// Forgets all assignments of vectors, as a reset of the device does.
    pub fn unassign_all(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
        }
        self.update_all();
        for source in &self.sources {
            // What the device signalled before the reset must not surface after it.
            eventfds::drain(&source.event);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in (offset..).zip(data) {
            let dword = self
                .entries
                .get(index / ENTRY_SIZE)
                .map_or(0, |entry| entry.dwords[index % ENTRY_SIZE / 4]);
            *byte = dword.to_le_bytes()[index % 4];
        }
    }

    /// Writes the table; dwords and qwords as the specification demands, other widths byte by byte.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let mut touched = [usize::MAX; 2];
        for (index, &value) in (offset..).zip(data) {
            let vector = index / ENTRY_SIZE;
            let Some(entry) = self.entries.get_mut(vector) else {
                break;
            };
            let dword = &mut entry.dwords[index % ENTRY_SIZE / 4];
            let mut bytes = dword.to_le_bytes();
            bytes[index % 4] = value;
            *dword = u32::from_le_bytes(bytes);
            // At most 8 bytes are written at once, so at most two entries are touched.
            touched[usize::from(touched[0] != usize::MAX && touched[0] != vector)] = vector;
        }
        for vector in touched.into_iter().filter(|&vector| vector != usize::MAX) {
            self.update_vector(vector);
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in (offset..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| {
                bits | u8::from(self.is_pending(index.saturating_mul(8).saturating_add(bit))) << bit
            });
        }
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.sources.iter().any(|source| {
            usize::from(source.vector) == vector
                && source.connected.is_none()
                && eventfds::is_signalled(&source.event)
        })
    }

    fn update_vector(&mut self, vector: usize) {
        for source in 0..self.sources.len() {
            if usize::from(self.sources[source].vector) == vector {
                self.update(source);
            }
        }
    }

    fn update_all(&mut self) {
        for source in 0..self.sources.len() {
            self.update(source);
        }
    }

    /// Brings the connection of a source in line with the state of its vector.
    fn update(&mut self, source: usize) {
        let Some(source) = self.sources.get_mut(source) else {
            return;
        };
        let entry = self.entries.get(usize::from(source.vector));
        let live = self.control & ENABLE != 0 && self.control & FUNCTION_MASK == 0;
        let wanted = entry.filter(|entry| live && !entry.is_masked());
        static LINES: GuestLines = GuestLines::new();
        if let Err(error) = reconnect(&self.vm, source, wanted)
            && let Some(suppressed) = LINES.allow()
        {
            let vector = source.vector;
            tracing::error!(vector, error = %error, suppressed, "an interrupt cannot be routed; the guest will miss it");
        }
    }
}

fn reconnect(vm: &Vm, source: &mut Source, wanted: Option<&Entry>) -> Result<(), KvmError> {
    let gsi = wanted.map(|entry| entry.gsi);
    if let Some(old) = source.connected.take_if(|old| Some(*old) != gsi) {
        vm.disconnect_interrupt(&source.event, old)?;
    }
    if let Some(entry) = wanted {
        vm.set_message(entry.gsi, entry.message())?;
        if source.connected.is_none() {
            vm.connect_interrupt(&source.event, entry.gsi)?;
            source.connected = Some(entry.gsi);
        }
    }
    Ok(())
}

impl Drop for Msix {
    fn drop(&mut self) {
        for source in &mut self.sources {
            if let Err(error) = reconnect(&self.vm, source, None) {
                tracing::warn!(error = %error, "an interrupt of a removed device stays connected");
            }
        }
        for entry in &self.entries {
            self.vm.free_gsi(entry.gsi);
        }
    }
}
