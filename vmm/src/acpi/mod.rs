//! The ACPI tables: how the guest learns of CPUs, PCI, platform devices, and how to switch itself off.
//!
//! ```text
//!   RSDP ──► XSDT ──┬──► FADT ──► DSDT   hardware-reduced; sleep, reset; the namespace (AML)
//!   0xE0000         ├──► MADT            local APICs, I/O APIC
//!                   └──► MCFG            where PCIe configuration space is mapped
//! ```
//!
//! [`build`] is a pure function of what the machine consists of; [`AcpiTables::write_to`] puts the result into guest
//! memory. The boot loader additionally hands [`AcpiTables::rsdp`] to the kernel.
//!
//! The machine is *hardware-reduced* (ACPI 6.5 §4.1): no SCI, no PM timer, no fixed registers but sleep control, sleep
//! status and reset. Linux then also leaves the legacy PICs and the PIT alone, which saves their VM exits.
//! Events come through one generic event device: an edge interrupt, and one register that says what happened.
//!
//! AML that touches an I/O port costs a VM exit each time. Nothing that Linux evaluates while it boots does: `_STA` is
//! left out where it would always say "present", and hot-plug slots have none at all, because acpiphp then looks for
//! the device itself.
//!
//! Left out on purpose: SRAT and SLIT (one NUMA node), WAET (only Windows reads it), SPCR and DBG2 (the command line
//! names the console), BGRT, FACS (not for hardware-reduced machines), `_PRT` (every device uses MSI-X and has no
//! interrupt pin).

mod dsdt;
mod fixed;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, bitmap::Bitmap};

use crate::layout::{self, AddressRange};

/// OEM ID of all tables.
const OEM_ID: [u8; 6] = *b"SMSVMM";
/// OEM table ID of all tables.
const OEM_TABLE_ID: [u8; 8] = *b"SMSVMM  ";
/// OEM revision of all tables: to be raised with every change that a guest could notice.
const OEM_REVISION: u32 = 1;

/// Processor devices are named `C000` to `CFFF`.
const PROCESSOR_COUNT_MAX: usize = 0x1000;
/// Every table starts on such a boundary; the RSDP must (ACPI 6.5 §5.2.5.1).
const TABLE_ALIGNMENT: u64 = 16;

/// How the guest sees the real-time clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RealTimeClock {
    /// Not at all: the FADT says so, and Linux neither reads nor registers one. Saves Linux some hundred VM exits while
    /// it boots; the time of day comes from kvmclock. `hwclock` does not work.
    Absent,
    /// With its ports, without an interrupt: the time can be read and set, there are no alarms.
    Ports,
    /// With its ports and GSI [`layout::GSI_RTC`].
    PortsAndInterrupt,
}

/// What the machine consists of, as far as ACPI describes it.
#[derive(Debug, Clone, Copy)]
pub struct AcpiInputs<'a> {
    /// Local APIC id of each vCPU, by index: [`crate::cpuid::Topology::apic_ids`]. The boot CPU is the first.
    pub apic_ids: &'a [u32],
    /// 64-bit window of the PCI host bridge, from [`layout::mmio64_window`]; the 32-bit window is [`layout::MMIO32`].
    pub mmio64: AddressRange,
    /// Whether there is a 16550 at [`layout::PORT_COM1`].
    pub serial: bool,
    /// Whether and how the real-time clock is announced.
    pub rtc: RealTimeClock,
    /// Whether there is a pvpanic port.
    pub pvpanic: bool,
    /// Slots of bus 0 that devices may be plugged into and out of while the guest runs: bit n is device n, with function
    /// 0 only. Bit 0, the host bridge, is ignored. Each costs Linux one read of configuration space at boot.
    pub hotplug_slots: u32,
}

/// Why the tables cannot be made or placed.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// There are no more names for processor devices.
    #[error("ACPI tables for {count} CPUs cannot be made; the most is {PROCESSOR_COUNT_MAX}")]
    TooManyProcessors {
        /// Number of vCPUs.
        count: usize,
    },
    /// The machine needs more AML than fits.
    #[error("the ACPI tables need {needed} bytes, but only {} are set aside for them; use fewer CPUs", .available)]
    TooLarge {
        /// Bytes of all tables.
        needed: u64,
        /// Bytes of [`layout::ACPI_TABLES`].
        available: u64,
    },
    /// Guest memory does not reach to the tables.
    #[error("cannot write ACPI table {signature} to guest address {address:#x}")]
    Memory {
        /// The table.
        signature: &'static str,
        /// Where it belongs.
        address: u64,
        /// The cause.
        source: GuestMemoryError,
    },
}

/// One table in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTable {
    /// Signature, or `RSDP`.
    pub signature: &'static str,
    /// Guest physical address.
    pub address: u64,
    /// The table with its header and checksum.
    pub bytes: Vec<u8>,
}

/// All tables, with the addresses that they refer to each other by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    tables: Vec<AcpiTable>,
}

impl AcpiTables {
    /// Address of the RSDP, for `boot_params.acpi_rsdp_addr` and PVH's `rsdp_paddr`.
    pub fn rsdp(&self) -> u64 {
        layout::ACPI_RSDP
    }

    /// The tables in ascending order of address.
    pub fn iter(&self) -> impl Iterator<Item = &AcpiTable> {
        self.tables.iter()
    }

    /// Copies the tables into guest memory.
    ///
    /// # Errors
    /// The memory has a hole where the tables belong.
    pub fn write_to<B: Bitmap + 'static>(&self, memory: &GuestMemoryMmap<B>) -> Result<(), AcpiError> {
        for table in &self.tables {
            memory
                .write_slice(&table.bytes, GuestAddress(table.address))
                .map_err(|source| AcpiError::Memory {
                    signature: table.signature,
                    address: table.address,
                    source,
                })?;
        }
        Ok(())
    }
}

/// The tables for a machine of `inputs`, placed in [`layout::ACPI_TABLES`].
///
/// # Errors
/// They do not fit there.
pub fn build(inputs: &AcpiInputs) -> Result<AcpiTables, AcpiError> {
    if inputs.apic_ids.len() > PROCESSOR_COUNT_MAX {
        return Err(AcpiError::TooManyProcessors {
            count: inputs.apic_ids.len(),
        });
    }
    let mut tables = Vec::with_capacity(6);
    let mut next = layout::ACPI_RSDP + fixed::RSDP_SIZE.next_multiple_of(TABLE_ALIGNMENT);
    let mut place = |signature, bytes: Vec<u8>| {
        let address = next;
        next += (bytes.len() as u64).next_multiple_of(TABLE_ALIGNMENT);
        tables.push(AcpiTable {
            signature,
            address,
            bytes,
        });
        address
    };

    let dsdt = place("DSDT", dsdt::dsdt(inputs));
    let referred = [
        place("FACP", fixed::fadt(inputs, dsdt)),
        place("APIC", fixed::madt(inputs.apic_ids)),
        place("MCFG", fixed::mcfg()),
    ];
    let xsdt = place("XSDT", fixed::xsdt(&referred));

    if next > layout::ACPI_TABLES.end() {
        return Err(AcpiError::TooLarge {
            needed: next - layout::ACPI_TABLES.start,
            available: layout::ACPI_TABLES.size,
        });
    }
    tables.insert(
        0,
        AcpiTable {
            signature: "RSDP",
            address: layout::ACPI_RSDP,
            bytes: fixed::rsdp(xsdt),
        },
    );
    Ok(AcpiTables { tables })
}
