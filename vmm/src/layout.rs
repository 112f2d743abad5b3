//! Where everything lies in the guest: physical addresses, I/O ports and interrupts.
//!
//! ```text
//! 0x0_0000_0500  GDT, IDT                           boot only: what the first vCPU enters the kernel with
//! 0x0_0000_6000  PVH start info, its memory map     boot only, ELF kernels
//! 0x0_0000_7000  zero page (struct boot_params)     boot only, bzImage kernels
//! 0x0_0000_9000  page tables                        boot only, bzImage kernels (64-bit entry)
//! 0x0_0002_0000  command line                       boot only
//! 0x0_0009_FC00  EBDA ─┐ not RAM for the guest
//! 0x0_000E_0000  ACPI ─┘ tables, RSDP first, so that a scan by signature finds it as well
//! 0x0_0010_0000  kernel, then RAM up to at most ...
//! 0x0_C000_0000  32-bit MMIO window of the PCI host bridge      BARs below 4 GiB
//! 0x0_E000_0000  ECAM, 1 MiB per bus                            PCIe configuration space
//! 0x0_FEC0_0000  I/O APIC
//! 0x0_FEE0_0000  local APICs, MSI
//! 0x0_FFFB_C000  KVM's identity map (1 page) and TSS (3 pages)  real mode on Intel
//! 0x1_0000_0000  RAM that does not fit below 0xC000_0000
//!     ...        64-bit MMIO window, from the next GiB boundary on
//! ```
//!
//! The ACPI tables tell the guest of all this ([`crate::acpi`]); the boot loader, the PCI host bridge and the platform
//! devices use the same constants. They are part of the snapshot format: a suspended guest has them in its own data
//! structures, so a change needs a new machine version.

/// A range of guest physical addresses. Never empty, never beyond 2^64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl AddressRange {
    /// The first address behind the range.
    pub const fn end(&self) -> u64 {
        self.start + self.size
    }

    /// Whether `address` lies within.
    pub const fn contains(&self, address: u64) -> bool {
        address >= self.start && address - self.start < self.size
    }
}

/// Why a guest's memory does not fit into its physical address space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM, the hole below 4 GiB and the least window for PCI devices need more address bits than the CPU has.
    #[error(
        "{ram_size} bytes of memory leave no room for PCI devices in the {physical_bits} physical address bits that \
         the guest's CPUs have; give the guest less memory"
    )]
    TooMuchMemory {
        /// Bytes of RAM that were asked for.
        ram_size: u64,
        /// Width of guest physical addresses.
        physical_bits: u8,
    },
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

const GIB: u64 = 1 << 30;

/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END_MAX: u64 = 0xC000_0000;
/// RAM that does not fit below [`LOW_RAM_END_MAX`] goes on here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Window of the PCI host bridge for BARs that must lie below 4 GiB.
pub const MMIO32: AddressRange = AddressRange {
    start: 0xC000_0000,
    size: 0x2000_0000,
};
/// Length of the window for 64-bit BARs, where the physical address space allows it.
pub const MMIO64_SIZE: u64 = 64 * GIB;
/// The window for 64-bit BARs starts on such a boundary, and is never shorter.
pub const MMIO64_ALIGNMENT: u64 = GIB;

/// Number of PCI buses, from 0 on.
pub const PCI_BUS_COUNT: u8 = 1;
/// Device numbers on a bus.
pub const PCI_SLOT_COUNT: u8 = 32;
/// ECAM: configuration space of all functions of a bus, 4 KiB each.
pub const ECAM_BUS_SIZE: u64 = 0x10_0000;
/// Memory-mapped PCIe configuration space (PCIe base specification §7.2.2).
pub const ECAM: AddressRange = AddressRange {
    start: 0xE000_0000,
    size: PCI_BUS_COUNT as u64 * ECAM_BUS_SIZE,
};

/// The in-kernel I/O APIC.
pub const IOAPIC: u32 = 0xFEC0_0000;
/// The local APICs; also the target of MSI writes.
pub const LAPIC: u32 = 0xFEE0_0000;

/// Page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// The ranges of guest physical addresses that are RAM, in ascending order: one, or two around the hole below 4 GiB.
/// `size` is in bytes, not zero.
pub fn ram_ranges(size: u64) -> Vec<AddressRange> {
    let low = size.min(LOW_RAM_END_MAX);
    let mut ranges = vec![AddressRange { start: 0, size: low }];
    if size > low {
        ranges.push(AddressRange {
            start: HIGH_RAM_START,
            size: size - low,
        });
    }
    ranges
}

/// The window of the PCI host bridge for 64-bit BARs: from the GiB boundary behind `ram_size` bytes of RAM on,
/// [`MMIO64_SIZE`] long, cut at what `physical_bits` address bits can reach.
///
/// # Errors
/// Less than [`MMIO64_ALIGNMENT`] bytes would be left.
pub fn mmio64_window(ram_size: u64, physical_bits: u8) -> Result<AddressRange, LayoutError> {
    let too_much = || LayoutError::TooMuchMemory {
        ram_size,
        physical_bits,
    };
    let start = ram_size
        .saturating_sub(LOW_RAM_END_MAX)
        .checked_add(HIGH_RAM_START)
        .and_then(|end| end.checked_next_multiple_of(MMIO64_ALIGNMENT))
        .ok_or_else(too_much)?;
    // Beyond 52 bits x86-64 has no page-table format.
    let limit = 1u64 << physical_bits.min(52);
    let size = limit.saturating_sub(start).min(MMIO64_SIZE);
    if size < MMIO64_ALIGNMENT {
        return Err(too_much());
    }
    Ok(AddressRange { start, size })
}

// ---------------------------------------------------------------------------------------------------------------------
// What the boot loader leaves in the first MiB
// ---------------------------------------------------------------------------------------------------------------------

/// Global descriptor table of the first vCPU.
pub const BOOT_GDT: u64 = 0x500;
/// Interrupt descriptor table of the first vCPU (empty).
pub const BOOT_IDT: u64 = 0x520;
/// PVH start info (`struct hvm_start_info`), directly followed by its modules and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux' zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the first vCPU: PML4, page directory pointers, then page directories. They may reach up to
/// [`CMDLINE`].
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line including its NUL.
pub const CMDLINE_SIZE_MAX: u64 = 0x1_0000;
/// Extended BIOS data area: conventional RAM ends here, the guest uses nothing from here to [`KERNEL_START`].
pub const EBDA: u64 = 0x9_FC00;
/// ACPI tables, in the area that BIOS ROMs occupy on a PC.
pub const ACPI_TABLES: AddressRange = AddressRange {
    start: 0xE_0000,
    size: 0x2_0000,
};
/// The ACPI root pointer: first in [`ACPI_TABLES`], aligned to 16 bytes.
pub const ACPI_RSDP: u64 = ACPI_TABLES.start;
/// Kernels are loaded from here on.
pub const KERNEL_START: u64 = 0x10_0000;

// ---------------------------------------------------------------------------------------------------------------------
// I/O ports
// ---------------------------------------------------------------------------------------------------------------------

/// 16550 serial port: data register; 8 ports.
pub const PORT_COM1: u16 = 0x3F8;
/// RTC and CMOS: index; data is the next port.
pub const PORT_RTC: u16 = 0x70;
/// Index of the century in the CMOS memory.
pub const RTC_CENTURY: u8 = 0x32;
/// i8042 keyboard controller: data. Only the controller's reset command is served.
pub const PORT_I8042_DATA: u16 = 0x60;
/// i8042 keyboard controller: command and status.
pub const PORT_I8042_COMMAND: u16 = 0x64;
/// PCI configuration mechanism #1: address (dword).
pub const PORT_PCI_CONFIG_ADDRESS: u16 = 0xCF8;
/// PCI configuration mechanism #1: data (4 ports).
pub const PORT_PCI_CONFIG_DATA: u16 = 0xCFC;
/// pvpanic (QEMU docs/specs/pvpanic): events of a guest kernel that crashes.
pub const PORT_PVPANIC: u16 = 0x505;

/// Block of ACPI registers: sleep, reset, events. [`ACPI_PORTS_SIZE`] ports.
pub const PORT_ACPI: u16 = 0x600;
/// Ports from [`PORT_ACPI`] on.
pub const ACPI_PORTS_SIZE: u8 = 8;
/// ACPI sleep control register (byte; ACPI 6.5 §4.8.3.7): SLP_TYP in bits 2..=4, SLP_EN is bit 5.
pub const PORT_ACPI_SLEEP_CONTROL: u16 = PORT_ACPI;
/// ACPI sleep status register (byte; ACPI 6.5 §4.8.3.7): bit 7 is WAK_STS, cleared by writing 1. Reads as 0 here.
pub const PORT_ACPI_SLEEP_STATUS: u16 = PORT_ACPI + 1;
/// ACPI reset register (byte): writing [`ACPI_RESET_VALUE`] resets the machine.
pub const PORT_ACPI_RESET: u16 = PORT_ACPI + 2;
/// What the guest writes to the reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off), as `\_S5` says it.
pub const ACPI_SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the sleep control register to switch off: SLP_EN and SLP_TYP of S5.
pub const ACPI_SLEEP_VALUE_S5: u8 = (ACPI_SLEEP_TYPE_S5 << 2) | (1 << 5);
/// Event status of the generic event device (byte): a bit per event, see [`ged_event`]. Reading gives the pending
/// events and clears them in one step, writing does nothing: so one exit per interrupt, and none is lost.
pub const PORT_GED_STATUS: u16 = PORT_ACPI + 4;

/// Bits of [`PORT_GED_STATUS`].
pub mod ged_event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u8 = 1 << 0;
    /// The PCI hot-plug registers have something new.
    pub const PCI_HOTPLUG: u8 = 1 << 1;
}

/// PCI hot-plug registers, dwords; [`PCI_HOTPLUG_PORTS_SIZE`] ports. Bit n of each stands for slot (device number) n of
/// bus 0.
pub const PORT_PCI_HOTPLUG: u16 = 0xAE00;
/// Ports from [`PORT_PCI_HOTPLUG`] on.
pub const PCI_HOTPLUG_PORTS_SIZE: u8 = 12;
/// PCIU: slots in which a device has appeared since the last read. Reading clears.
pub const PORT_PCI_HOTPLUG_UP: u16 = PORT_PCI_HOTPLUG;
/// PCID: slots whose device the host wants back, asked since the last read. Reading clears: a guest that does nothing is
/// asked again only when the user repeats the removal.
pub const PORT_PCI_HOTPLUG_DOWN: u16 = PORT_PCI_HOTPLUG + 4;
/// EJ: writing a bit says that the guest has let go of the slot's device (its `_EJ0`). Reads as 0.
pub const PORT_PCI_HOTPLUG_EJECT: u16 = PORT_PCI_HOTPLUG + 8;

// ---------------------------------------------------------------------------------------------------------------------
// Interrupts
// ---------------------------------------------------------------------------------------------------------------------

/// COM1; edge-triggered, active high, as on the ISA bus.
pub const GSI_COM1: u32 = 4;
/// The generic event device; edge-triggered, active high.
pub const GSI_GED: u32 = 5;
/// The real-time clock; edge-triggered, active high.
pub const GSI_RTC: u32 = 8;
/// Pins of the I/O APIC: GSIs 0..24.
pub const IOAPIC_PIN_COUNT: u32 = 24;
/// GSIs from here on are routes for MSI and MSI-X vectors.
pub const GSI_MSI_FIRST: u32 = IOAPIC_PIN_COUNT;

// Nothing overlaps: checked when this is compiled.
const _: () = {
    assert!(BOOT_GDT < BOOT_IDT && BOOT_IDT < PVH_START_INFO && PVH_START_INFO < ZERO_PAGE);
    assert!(ZERO_PAGE + 0x1000 <= BOOT_PAGE_TABLES && BOOT_PAGE_TABLES < CMDLINE);
    assert!(CMDLINE + CMDLINE_SIZE_MAX <= EBDA && EBDA < ACPI_TABLES.start);
    assert!(ACPI_TABLES.end() == KERNEL_START && ACPI_RSDP.is_multiple_of(16));
    assert!(MMIO32.start == LOW_RAM_END_MAX && MMIO32.end() == ECAM.start);
    assert!(ECAM.end() <= IOAPIC as u64 && IOAPIC < LAPIC && (LAPIC as u64) < KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + 0x1000 <= KVM_TSS && KVM_TSS + 0x3000 <= HIGH_RAM_START);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range_below_the_hole() {
        assert_eq!(
            ram_ranges(512 << 20),
            [AddressRange {
                start: 0,
                size: 512 << 20
            }]
        );
        assert_eq!(
            ram_ranges(LOW_RAM_END_MAX),
            [AddressRange {
                start: 0,
                size: LOW_RAM_END_MAX
            }]
        );
    }

    #[test]
    fn large_memory_goes_on_above_4_gib() {
        assert_eq!(
            ram_ranges(5 * GIB),
            [
                AddressRange {
                    start: 0,
                    size: 3 * GIB
                },
                AddressRange {
                    start: 4 * GIB,
                    size: 2 * GIB
                }
            ]
        );
    }

    #[test]
    fn the_64_bit_window_follows_ram_on_a_gib_boundary() {
        let window = |ram, bits| mmio64_window(ram, bits).map(|range| (range.start / GIB, range.size / GIB));
        assert_eq!(window(512 << 20, 40), Ok((4, 64)));
        assert_eq!(window(5 * GIB, 40), Ok((6, 64)));
        assert_eq!(window(5 * GIB + 4096, 40), Ok((7, 64)));
        assert_eq!(window(512 << 20, 36), Ok((4, 60)), "36 bits end at 64 GiB");
        assert_eq!(window(62 * GIB, 36), Ok((63, 1)));
    }

    #[test]
    fn memory_that_leaves_no_room_for_devices_is_refused() {
        for (ram, bits) in [
            (63 * GIB, 36),
            (1 << 40, 40),
            (u64::MAX, 52),
            (u64::MAX - GIB, 255),
            (GIB, 32),
            (GIB, 0),
        ] {
            assert_eq!(
                mmio64_window(ram, bits),
                Err(LayoutError::TooMuchMemory {
                    ram_size: ram,
                    physical_bits: bits
                })
            );
        }
    }
}
