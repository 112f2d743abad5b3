//! The boot vCPU's registers and the tables that they point to.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Entry};
use crate::layout;
use crate::vm::{KvmError, call};

/// Protected mode enable.
const CR0_PE: u64 = 1 << 0;
/// Extension type: always set on 64-bit processors.
const CR0_ET: u64 = 1 << 4;
/// Paging.
const CR0_PG: u64 = 1 << 31;
/// Physical address extension: page tables have 64-bit entries.
const CR4_PAE: u64 = 1 << 5;
/// Long mode enable and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Page table entries: present, writable, and in a page directory: 2 MiB page.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// GDT entries as the 64-bit entry of Linux and the PVH entry want them: flat, selectors 0x10 code, 0x18 data, 0x20 TSS.
/// Columns: flags (access byte and granularity), limit.
const CODE64: u64 = segment(0xa09b);
const CODE32: u64 = segment(0xc09b);
const DATA: u64 = segment(0xc093);
const TSS: u64 = 0x0000_8b00_0000_ffff;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// A flat segment with base 0 and limit 0xFFFFF; `flags` holds the access byte, and above it G, D/B and L.
const fn segment(flags: u64) -> u64 {
    let access = flags & 0xff;
    let granularity = (flags >> 12) & 0xf;
    0xffff | access << 40 | 0xf << 48 | granularity << 52
}

/// Makes a `kvm_segment` of a GDT entry.
fn kvm_segment_of(entry: u64, selector: u16) -> kvm_segment {
    // Every field is masked to its width.
    let bits = |shift: u32, width: u32| u8::try_from((entry >> shift) & ((1 << width) - 1)).unwrap_or(0);
    let mut limit = u32::try_from((entry & 0xffff) | ((entry >> 32) & 0xf_0000)).unwrap_or(0);
    if bits(55, 1) == 1 {
        limit = limit << 12 | 0xfff;
    }
    kvm_segment {
        base: ((entry >> 16) & 0xff_ffff) | ((entry >> 32) & 0xff00_0000),
        limit,
        selector,
        type_: bits(40, 4),
        present: bits(47, 1),
        dpl: bits(45, 2),
        db: bits(54, 1),
        s: bits(44, 1),
        l: bits(53, 1),
        g: bits(55, 1),
        avl: bits(52, 1),
        unusable: 0,
        padding: 0,
    }
}

/// Writes the tables for `entry` into guest memory: GDT, empty IDT, and for 64-bit entries an identity map of the first
/// 4 GiB.
///
/// # Errors
/// The guest has less than 1 MiB of memory.
pub fn write_tables(memory: &GuestMemoryMmap, entry: Entry) -> Result<(), BootError> {
    let code = if matches!(entry, Entry::Linux64 { .. }) {
        CODE64
    } else {
        CODE32
    };
    for (index, descriptor) in (0_u64..).zip([0, 0, code, DATA, TSS]) {
        memory.write_obj(descriptor, GuestAddress(layout::BOOT_GDT + index * 8))?;
    }
    memory.write_obj(0_u64, GuestAddress(layout::BOOT_IDT + 0x8))?;
    if matches!(entry, Entry::Linux64 { .. }) {
        let (pml4, pointers, directories) = (
            layout::BOOT_PAGE_TABLES,
            layout::BOOT_PAGE_TABLES + 0x1000,
            layout::BOOT_PAGE_TABLES + 0x2000,
        );
        memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(pml4))?;
        for gib in 0..4 {
            let directory = directories + gib * 0x1000;
            memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers + gib * 8))?;
            let entries: Vec<u8> = (0..512_u64)
                .flat_map(|page| ((gib << 30) | (page << 21) | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes())
                .collect();
            memory.write_slice(&entries, GuestAddress(directory))?;
        }
    }
    Ok(())
}

/// Puts the boot vCPU at the kernel's entry.
///
/// # Errors
/// KVM refuses the registers.
pub fn set_up(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut special = vcpu
        .get_sregs()
        .map_err(call("read a vCPU's special registers"))?;
    let code = if matches!(entry, Entry::Linux64 { .. }) {
        CODE64
    } else {
        CODE32
    };
    special.cs = kvm_segment_of(code, CODE_SELECTOR);
    let data = kvm_segment_of(DATA, DATA_SELECTOR);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment_of(TSS, TSS_SELECTOR);
    special.gdt.base = layout::BOOT_GDT;
    special.gdt.limit = 5 * 8 - 1;
    special.idt.base = layout::BOOT_IDT + 0x8;
    special.idt.limit = 7;
    let mut registers = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        Entry::Linux64 { address } => {
            special.cr0 = CR0_PE | CR0_ET | CR0_PG;
            special.cr3 = layout::BOOT_PAGE_TABLES;
            special.cr4 = CR4_PAE;
            special.efer = EFER_LME | EFER_LMA;
            registers.rip = address;
            registers.rsi = layout::ZERO_PAGE;
        }
        Entry::Pvh { address } => {
            special.cr0 = CR0_PE | CR0_ET;
            special.cr4 = 0;
            registers.rip = address;
            registers.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_sregs(&special)
        .map_err(call("set a vCPU's special registers"))?;
    vcpu.set_regs(&registers)
        .map_err(call("set a vCPU's registers"))?;
    set_up_fpu(vcpu)
}

/// The floating-point state after FNINIT, which every vCPU starts with (Intel SDM volume 1 §8.1.5, §11.6.4).
///
/// # Errors
/// KVM refuses the registers.
pub fn set_up_fpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(call("set a vCPU's floating-point registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_decode_to_flat_segments() {
        let code = kvm_segment_of(CODE64, CODE_SELECTOR);
        assert_eq!(
            (code.base, code.limit, code.type_, code.l, code.db, code.g),
            (0, 0xffff_ffff, 0xb, 1, 0, 1)
        );
        let code = kvm_segment_of(CODE32, CODE_SELECTOR);
        assert_eq!((code.limit, code.l, code.db, code.g), (0xffff_ffff, 0, 1, 1));
        let data = kvm_segment_of(DATA, DATA_SELECTOR);
        assert_eq!((data.type_, data.s, data.present, data.db), (3, 1, 1, 1));
        let tss = kvm_segment_of(TSS, TSS_SELECTOR);
        assert_eq!((tss.type_, tss.s, tss.present, tss.limit), (0xb, 0, 1, 0xffff));
    }
}
