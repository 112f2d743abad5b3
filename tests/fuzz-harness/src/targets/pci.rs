//! The PCI bus: configuration space through both doors, BARs that move, functions that come and go.
//!
//! The functions are plain configuration spaces that insist on what the bus promises them.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use vmm::bus::Bus;
use vmm::layout;
use vmm::pci::{BarKind, Cf8, ConfigSpace, Ecam, Identity, PciBus, PciFunction, Window};

/// A function that answers in its BAR with its slot number.
struct Probe {
    slot: u8,
    size: u64,
    config: Mutex<ConfigSpace>,
}

impl Probe {
    fn new(slot: u8, size: u64, address: u64) -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1040 + u16::from(slot),
            class: 0x01_00_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(BarKind::Memory64, size, address);
        config.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        config.add_capability(0x09, &[0; 18], &[0xff; 18]);
        Self {
            slot,
            size,
            config: Mutex::new(config),
        }
    }

    fn assert_aligned(offset: usize, length: usize) {
        assert!(matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && offset + length <= 4096);
    }
}

impl PciFunction for Probe {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        Self::assert_aligned(offset, data.len());
        self.config.lock().unwrap().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        Self::assert_aligned(offset, data.len());
        self.config.lock().unwrap().write(offset, data);
    }

    fn bar(&self) -> Option<Range<u64>> {
        self.config.lock().unwrap().bar()
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < self.size && (1..=8).contains(&data.len()));
        data.fill(self.slot);
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        assert!(offset < self.size && (1..=8).contains(&data.len()));
    }
}

struct Bench {
    pci: Arc<PciBus>,
    ports: Bus,
    mmio: Bus,
    functions: Vec<Arc<Probe>>,
}

const WINDOW64: u64 = 0x1_0000_0000;
const WINDOW64_SIZE: u64 = 64 << 30;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut bench = Bench::new();
    while !input.is_empty() {
        match input.int_in_range(0..=15_u8)? {
            0..=4 => bench.configure(input)?,
            5 | 6 => bench.move_bar(input)?,
            7..=10 => bench.access_memory(input)?,
            11 | 12 => bench.access_ports(input)?,
            13 => bench.access_ecam(input)?,
            14 => bench.insert(input)?,
            _ => bench.remove(input)?,
        }
    }
    bench.assert_sound();
    Ok(())
}

impl Bench {
    fn new() -> Self {
        let pci = Arc::new(PciBus::new());
        let (ports, mmio) = (Bus::new(), Bus::new());
        let cf8 = u64::from(layout::PORT_PCI_CONFIG_ADDRESS);
        ports
            .insert("CF8", cf8..cf8 + 8, Arc::new(Cf8::new(pci.clone())))
            .unwrap();
        let ecam = layout::ECAM;
        mmio.insert("ECAM", ecam.start..ecam.end(), Arc::new(Ecam(pci.clone())))
            .unwrap();
        for (base, size) in [
            (layout::MMIO32.start, layout::MMIO32.size),
            (WINDOW64, WINDOW64_SIZE),
        ] {
            let bus = pci.clone();
            mmio.insert("window", base..base + size, Arc::new(Window { bus, base }))
                .unwrap();
        }
        let mut bench = Self {
            pci,
            ports,
            mmio,
            functions: Vec::new(),
        };
        bench.put(1, 1 << 17, WINDOW64);
        bench.put(2, 16, layout::MMIO32.start);
        bench
    }

    fn put(&mut self, slot: u8, size: u64, address: u64) {
        let function = Arc::new(Probe::new(slot, size, address));
        if self.pci.insert(slot, function.clone()).is_ok() {
            self.functions.push(function);
        } else {
            let taken = self.functions.iter().any(|function| function.slot == slot);
            assert!(taken || slot == 0 || slot >= 32, "slot {slot} was free");
        }
    }

    fn insert(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let slot = if input.ratio(1, 8)? {
            input.arbitrary()?
        } else {
            self.pci.free_slot().unwrap_or(0)
        };
        let size = 1 << input.int_in_range(4..=20)?;
        let address = WINDOW64 + input.int_in_range(0..=0xff)? * (1 << 20);
        self.put(slot, size, address);
        Ok(())
    }

    fn remove(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let slot = input.int_in_range(1..=33)?;
        let had = self.functions.iter().position(|function| function.slot == slot);
        assert_eq!(self.pci.remove(slot).is_some(), had.is_some());
        had.map(|index| self.functions.remove(index));
        Ok(())
    }

    /// An aligned access to a register of a function, as drivers make it, by one of the two doors.
    fn configure(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let slot = input.int_in_range(0..=3_u8)?;
        let width = *input.choose(&[1_u16, 2, 4])?;
        let register = if input.ratio(1, 2)? {
            *input.choose(&[4_u16, 0x10, 0x14, 0x3c, 0x40, 0x4c, 0x50])?
        } else {
            input.int_in_range(0..=0xfff)?
        };
        let register = register & !(width - 1);
        let mut data = [0; 4];
        input.fill_buffer(&mut data)?;
        let data = &mut data[..usize::from(width)];
        let write = input.arbitrary()?;
        if input.arbitrary()? {
            let address = layout::ECAM.start + (u64::from(slot) << 15) + u64::from(register);
            if write {
                self.mmio.write(address, data);
            } else {
                self.mmio.read(address, data);
            }
        } else {
            let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & 0xfc);
            let port = u64::from(layout::PORT_PCI_CONFIG_DATA + (register & 3));
            self.ports
                .write(layout::PORT_PCI_CONFIG_ADDRESS.into(), &address.to_le_bytes());
            if write {
                self.ports.write(port, data);
            } else {
                self.ports.read(port, data);
                let mut same = data.to_vec();
                let ecam = layout::ECAM.start + (u64::from(slot) << 15) + u64::from(register & 0xff);
                self.mmio.read(ecam, &mut same);
                assert_eq!(same, data, "the two doors to register {register:#x} differ");
            }
        }
        Ok(())
    }

    fn dword(&self, slot: u8, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio
            .read(layout::ECAM.start + (u64::from(slot) << 15) + register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_dword(&self, slot: u8, register: u64, value: u32) {
        self.mmio.write(
            layout::ECAM.start + (u64::from(slot) << 15) + register,
            &value.to_le_bytes(),
        );
    }

    /// What an operating system does: finds out the size of a BAR, places it, lets it answer.
    fn move_bar(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if self.functions.is_empty() {
            return Ok(());
        }
        let function = input.choose(&self.functions)?.clone();
        let slot = function.slot;
        self.set_dword(slot, 0x10, u32::MAX);
        self.set_dword(slot, 0x14, u32::MAX);
        let mask = u64::from(self.dword(slot, 0x14)) << 32 | u64::from(self.dword(slot, 0x10) & !0xf);
        assert_eq!(!mask + 1, function.size);
        let address = match input.int_in_range(0..=7_u8)? {
            0 => input.arbitrary()?,
            1 => layout::ECAM.start,
            2 => layout::MMIO32.end() - function.size,
            3..=5 => layout::MMIO32.start + u64::from(input.arbitrary::<u16>()?) * 16,
            _ => WINDOW64 + u64::from(input.arbitrary::<u16>()?) * 0x1_0000,
        };
        self.set_dword(slot, 0x10, address as u32);
        self.set_dword(slot, 0x14, (address >> 32) as u32);
        self.set_dword(slot, 4, 2);
        let address = address & mask;
        match function.bar() {
            Some(range) => assert_eq!(range, address..address + function.size),
            None => assert!(address == 0 || address.checked_add(function.size).is_none()),
        }
        Ok(())
    }

    /// An access to the windows: the function answers whose BAR is there, or nobody.
    fn access_memory(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let near = input.arbitrary::<i8>()?;
        let base = match self.functions.is_empty() {
            false if input.ratio(7, 8)? => {
                let function = input.choose(&self.functions)?;
                let Some(range) = function.bar() else {
                    return Ok(());
                };
                if input.arbitrary()? {
                    range.start
                } else {
                    range.end
                }
            }
            _ => input.arbitrary()?,
        };
        let address = base.wrapping_add_signed(near.into());
        let mut data = vec![0xee; input.int_in_range(1..=8)?];
        self.mmio.write(address, &data);
        self.mmio.read(address, &mut data);
        let in_window = (layout::MMIO32.start..layout::MMIO32.end()).contains(&address)
            || (WINDOW64..WINDOW64 + WINDOW64_SIZE).contains(&address);
        if !in_window {
            return Ok(());
        }
        let owners: Vec<_> = self
            .functions
            .iter()
            .filter(|f| f.bar().is_some_and(|bar| bar.contains(&address)))
            .collect();
        match owners[..] {
            [] => assert_eq!(data[0], 0xff, "somebody answers at {address:#x}"),
            [owner] if !self.overlaps(owner) => {
                assert_eq!(data[0], owner.slot, "wrong owner of {address:#x}")
            }
            // A guest that lets BARs overlap gets one of them, or nobody.
            _ => assert!(data[0] == 0xff || owners.iter().any(|owner| owner.slot == data[0])),
        }
        Ok(())
    }

    fn overlaps(&self, function: &Arc<Probe>) -> bool {
        let Some(range) = function.bar() else { return false };
        self.functions
            .iter()
            .filter(|other| !Arc::ptr_eq(other, function))
            .filter_map(|other| other.bar())
            .any(|other| other.start < range.end && range.start < other.end)
    }

    /// Accesses of any width to the configuration ports.
    fn access_ports(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let port = u64::from(layout::PORT_PCI_CONFIG_ADDRESS) + input.int_in_range(0..=9)?;
        self.access(input, port, false)
    }

    /// Accesses of any width and alignment, also across functions and the end of ECAM.
    fn access_ecam(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let offset = input.int_in_range(0..=layout::ECAM.size)?;
        self.access(input, layout::ECAM.start + offset, true)
    }

    fn access(&self, input: &mut Unstructured<'_>, address: u64, memory: bool) -> arbitrary::Result<()> {
        let bus = if memory { &self.mmio } else { &self.ports };
        let mut data = vec![0; input.int_in_range(1..=8)?];
        input.fill_buffer(&mut data)?;
        if input.arbitrary()? {
            bus.write(address, &data);
        } else {
            bus.read(address, &mut data);
        }
        Ok(())
    }

    /// Who is there says so, whatever was written; who is not does not answer.
    fn assert_sound(&self) {
        assert_ne!(self.dword(0, 0), u32::MAX, "the host bridge is gone");
        for slot in 1..32 {
            let id = self.dword(slot, 0);
            if self.functions.iter().any(|function| function.slot == slot) {
                assert_eq!(id, (0x1040 + u32::from(slot)) << 16 | 0x1af4);
                assert_eq!(self.dword(slot, 0x10) & 0xf, 0xc, "the BAR forgot its kind");
            } else {
                assert_eq!(id, u32::MAX);
            }
        }
    }
}
