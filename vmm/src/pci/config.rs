//! Configuration space of a type 0 function (PCI Local Bus 3.0 §6): registers, write masks, one memory BAR, capabilities.

use std::ops::Range;

/// Bytes of configuration space that functions here have: they are conventional PCI functions without extended space, which
/// then reads as ones. Linux asks once and is spared eighteen searches for extended capabilities.
const SIZE: usize = 256;

/// Offsets of the type 0 header.
const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: answer to memory accesses.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Command register bits that software may set: memory, bus master, parity, SERR, and INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor and device.
    pub vendor: u16,
    /// Device number of the vendor.
    pub device: u16,
    /// Class, subclass, programming interface: 0xCCSSPP.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Vendor of the subsystem.
    pub subsystem_vendor: u16,
    /// Device number of the subsystem vendor.
    pub subsystem: u16,
}

/// What kind of memory BAR a function has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// 64 bits wide, prefetchable.
    Memory64,
}

/// Registers of a function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Size of BAR 0 in bytes, a power of two; 0 if there is none.
    bar_size: u64,
    /// Where the last capability's "next" pointer is, and where the next capability goes.
    last_link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A function without BAR and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            last_link: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        config.put(VENDOR, &identity.vendor.to_le_bytes());
        config.put(VENDOR + 2, &identity.device.to_le_bytes());
        config.put(
            REVISION,
            &(u32::from(identity.revision) | identity.class << 8).to_le_bytes(),
        );
        config.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        config.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Adds memory BAR 0 (with BAR 1 as its upper half) of `size` bytes, a power of two of at least 16, at `address`.
    pub fn add_bar(&mut self, kind: BarKind, size: u64, address: u64) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        let BarKind::Memory64 = kind;
        const TYPE_64_PREFETCHABLE: u64 = 0b1100;
        self.bar_size = size;
        self.put(BAR0, &(address | TYPE_64_PREFETCHABLE).to_le_bytes());
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability with number `id` and `body` behind its two-byte header; returns its offset. `writable` masks
    /// the body's bits that software may change.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.free;
        let end = offset + 2 + body.len();
        debug_assert!(end <= SIZE && writable.len() <= body.len());
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.writable[offset + 2..offset + 2 + writable.len()].copy_from_slice(writable);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.last_link] = u8::try_from(offset).unwrap_or(0);
        self.last_link = offset + 1;
        self.free = end.next_multiple_of(4);
        offset
    }

    /// Reads registers; beyond the end there are only ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(available) = self.bytes.get(offset..) {
            let length = available.len().min(data.len());
            data[..length].copy_from_slice(&available[..length]);
        }
    }

    /// Writes registers where they are writable.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, &value) in (offset..SIZE).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = (self.bytes[index] & !mask) | (value & mask);
        }
    }

    /// Where BAR 0 answers, if memory access is enabled and its address makes sense.
    pub fn bar(&self) -> Option<Range<u64>> {
        if self.bar_size == 0 || self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let start = self.u64_at(BAR0) & !(self.bar_size - 1);
        // While software sizes a BAR it holds all ones; nothing answers at zero or beyond the address space.
        let end = start.checked_add(self.bar_size)?;
        (start != 0).then_some(start..end)
    }

    /// The `u32` at `offset`, which must be within the space.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn u64_at(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_00_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(BarKind::Memory64, 0x2_0000, 0x1_0000_0000);
        config
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut config = function();
        assert_eq!(config.bar(), None, "memory access is off after reset");
        config.write(COMMAND, &2_u16.to_le_bytes());
        assert_eq!(config.bar(), Some(0x1_0000_0000..0x1_0002_0000));
        config.write(BAR0, &u32::MAX.to_le_bytes());
        assert_eq!(config.u32_at(BAR0), 0xfffe_000c);
        config.write(BAR0, &0xd000_0000_u32.to_le_bytes());
        config.write(BAR0 + 4, &0_u32.to_le_bytes());
        assert_eq!(config.bar(), Some(0xd000_0000..0xd002_0000));
        config.write(BAR0, &u32::MAX.to_le_bytes());
        config.write(BAR0 + 4, &u32::MAX.to_le_bytes());
        assert_eq!(
            config.bar(),
            None,
            "the end of the address space is not an address"
        );
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut config = function();
        let first = config.add_capability(0x11, &[0; 10], &[]);
        let second = config.add_capability(0x09, &[0; 14], &[]);
        assert_eq!((first, second), (0x40, 0x4c));
        assert_eq!(config.bytes[CAPABILITIES], 0x40);
        assert_eq!(config.bytes[first + 1], 0x4c);
        assert_eq!(config.bytes[second + 1], 0);
    }

    #[test]
    fn identity_is_read_only() {
        let mut config = function();
        config.write(VENDOR, &[0xff; 4]);
        assert_eq!(config.u32_at(VENDOR), 0x1042_1af4);
        config.write(usize::MAX - 1, &[0xff; 4]);
        let mut data = [1; 4];
        config.read(4096, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
