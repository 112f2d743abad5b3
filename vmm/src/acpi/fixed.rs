//! Tables of fixed format: RSDP, XSDT, FADT, MADT, MCFG.

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    rsdp::Rsdp,
    sdt::Sdt,
};

use super::{AcpiInputs, OEM_ID, OEM_REVISION, OEM_TABLE_ID, RealTimeClock};
use crate::layout;

/// Bytes of an RSDP of revision 2.
pub(super) const RSDP_SIZE: u64 = 36;

/// The root pointer (ACPI 6.5 §5.2.5.3), revision 2, without an RSDT.
pub(super) fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    bytes
}

/// The list of tables (ACPI 6.5 §5.2.8).
pub(super) fn xsdt(tables: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|address| address.to_le_bytes()).collect();
    table(*b"XSDT", 1, &body)
}

/// A system description table: header with checksum (ACPI 6.5 §5.2.6), then `body`.
pub(super) fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_SIZE: u32 = 36;
    let mut table = Sdt::new(
        signature,
        HEADER_SIZE,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// IA-PC boot architecture flags (ACPI 6.5 §5.2.9.3).
mod boot_architecture {
    /// There is no VGA; do not touch its ports and memory.
    pub(super) const NO_VGA: u16 = 1 << 2;
    /// PCIe active-state power management must not be used: there is no link.
    pub(super) const NO_PCIE_ASPM: u16 = 1 << 4;
    /// There is no CMOS real-time clock.
    pub(super) const NO_CMOS_RTC: u16 = 1 << 5;
}

/// The fixed description table (ACPI 6.5 §5.2.9): a hardware-reduced machine with sleep and reset registers.
///
/// Of the boot architecture flags, "legacy devices" and "8042" stay clear, although there is an i8042: it serves resets
/// only, and Linux would spend a second looking for a keyboard.
pub(super) fn fadt(inputs: &AcpiInputs, dsdt: u64) -> Vec<u8> {
    let mut boot_arch = boot_architecture::NO_VGA | boot_architecture::NO_PCIE_ASPM;
    if inputs.rtc == RealTimeClock::Absent {
        boot_arch |= boot_architecture::NO_CMOS_RTC;
    }
    let century = match inputs.rtc {
        RealTimeClock::Absent => 0,
        RealTimeClock::Ports | RealTimeClock::PortsAndInterrupt => layout::RTC_CENTURY,
    };

    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        // Required on x86: the WBINVD instruction works.
        .flag(Flags::Wbinvd)
        // The power button is a device in the DSDT, not a fixed register. There is no sleep button; the flag says so.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.century = century;
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.reset_reg = byte_port(layout::PORT_ACPI_RESET);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::PORT_ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_port(layout::PORT_ACPI_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();

    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// A register of one byte at an I/O port.
fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

/// The interrupt controllers (ACPI 6.5 §5.2.12).
///
/// There are no interrupt source overrides: every ISA interrupt is at the I/O APIC pin of its number, edge-triggered and
/// active high, which is what systems assume anyway, and each override makes Linux set up that pin at boot. The flag
/// PCAT_COMPAT stays clear: KVM has a pair of 8259 PICs, but nothing uses them.
pub(super) fn madt(apic_ids: &[u32]) -> Vec<u8> {
    /// Processor is enabled.
    const ENABLED: u32 = 1;
    /// Flags of an NMI structure: polarity and trigger mode conform to the bus.
    const CONFORMING: [u8; 2] = [0, 0];
    /// Non-maskable interrupts come in at this input of every local APIC.
    const NMI_LINT: u8 = 1;

    let mut body = Vec::with_capacity(16 * apic_ids.len() + 64);
    body.extend_from_slice(&layout::LAPIC.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    for (uid, &apic_id) in (0u32..).zip(apic_ids) {
        match (u8::try_from(uid), u8::try_from(apic_id)) {
            // 255 is the broadcast address of xAPIC.
            (Ok(uid), Ok(apic_id)) if apic_id != 0xFF => {
                body.extend_from_slice(&[0, 8, uid, apic_id]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                body.extend_from_slice(&[9, 16, 0, 0]);
                body.extend_from_slice(&apic_id.to_le_bytes());
                body.extend_from_slice(&ENABLED.to_le_bytes());
                body.extend_from_slice(&uid.to_le_bytes());
            }
        }
    }
    body.extend_from_slice(&[1, 12, io_apic_id(apic_ids), 0]);
    body.extend_from_slice(&layout::IOAPIC.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // Local APIC NMI, for all processors; once more for those with an x2APIC structure.
    body.extend_from_slice(&[4, 6, 0xFF, CONFORMING[0], CONFORMING[1], NMI_LINT]);
    if apic_ids.iter().any(|&id| id >= 0xFF) {
        body.extend_from_slice(&[0xA, 12, CONFORMING[0], CONFORMING[1]]);
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        body.extend_from_slice(&[NMI_LINT, 0, 0, 0]);
    }
    table(*b"APIC", 5, &body)
}

/// The I/O APIC's id: the first behind those of the CPUs, or 0 where no 8-bit id is left.
fn io_apic_id(apic_ids: &[u32]) -> u8 {
    let behind = apic_ids.iter().max().map_or(0, |id| id.saturating_add(1));
    u8::try_from(behind).ok().filter(|&id| id != 0xFF).unwrap_or(0)
}

/// Where PCIe configuration space is mapped (PCI firmware specification 3.3 §4.1.2).
pub(super) fn mcfg() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend_from_slice(&layout::ECAM.start.to_le_bytes());
    body.extend_from_slice(&0u16.to_le_bytes());
    body.extend_from_slice(&[0, layout::PCI_BUS_COUNT - 1]);
    body.extend_from_slice(&[0; 4]);
    table(*b"MCFG", 1, &body)
}
