//! What a kernel is told at its entry: the zero page (Linux boot protocol) or the start info (PVH), with the memory map.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;
use crate::layout;

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Initrd {
    /// Guest physical address.
    pub(super) address: u64,
    /// Bytes.
    pub(super) size: u64,
}

/// Types of memory in the e820 map and in PVH's map (ACPI 6.4 table 15.9).
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// `type_of_loader`: a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Magic of the PVH start info: "xEn3" with the high bit of E set.
const START_INFO_MAGIC: u32 = 0x336e_c578;

/// The guest's memory map: (start, size, type), ascending.
fn memory_map(ram_size: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::EBDA, RAM),
        (layout::ACPI_TABLES.start, layout::ACPI_TABLES.size, RESERVED),
    ];
    for range in layout::ram_ranges(ram_size) {
        let start = range.start.max(layout::KERNEL_START);
        map.push((start, range.end() - start, RAM));
    }
    // Linux trusts ECAM only when it is reserved here or by an ACPI device; both costs nothing.
    map.push((layout::ECAM.start, layout::ECAM.size, RESERVED));
    map.sort_unstable_by_key(|entry| entry.0);
    map
}

pub(super) fn write_zero_page(
    memory: &GuestMemoryMmap,
    mut header: setup_header,
    ram_size: u64,
    initrd: Option<Initrd>,
    command_line_size: usize,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_UNDEFINED;
    // All boot data lie below 4 GiB, and the command line was checked against CMDLINE_SIZE_MAX.
    #[allow(clippy::cast_possible_truncation)]
    {
        header.cmd_line_ptr = layout::CMDLINE as u32;
        header.cmdline_size = command_line_size as u32;
        if let Some(initrd) = initrd {
            header.ramdisk_image = initrd.address as u32;
            header.ramdisk_size = initrd.size as u32;
        }
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: layout::ACPI_RSDP,
        ..Default::default()
    };
    let map = memory_map(ram_size);
    let mut entries = params.e820_table;
    for (entry, &(addr, size, kind)) in entries.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
    params.e820_table = entries;
    params.e820_entries = u8::try_from(map.len().min(entries.len())).unwrap_or(u8::MAX);
    memory.write_slice(params.as_slice(), GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

pub(super) fn write_start_info(
    memory: &GuestMemoryMmap,
    ram_size: u64,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    let modules = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let map_address = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = memory_map(ram_size);
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: modules,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_RSDP,
        memmap_paddr: map_address,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    memory.write_slice(info.as_slice(), GuestAddress(layout::PVH_START_INFO))?;
    if let Some(Initrd { address, size }) = initrd {
        let module = hvm_modlist_entry {
            paddr: address,
            size,
            ..Default::default()
        };
        memory.write_slice(module.as_slice(), GuestAddress(modules))?;
    }
    for (index, (addr, size, type_)) in (0..).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        };
        let address = map_address + index * size_of::<hvm_memmap_table_entry>() as u64;
        memory.write_slice(entry.as_slice(), GuestAddress(address))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_out_what_is_no_ram() {
        let map = memory_map(5 << 30);
        assert!(
            map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0),
            "{map:x?}"
        );
        let ram = |address: u64| {
            map.iter()
                .any(|&(start, size, kind)| kind == RAM && address >= start && address < start + size)
        };
        assert!(ram(0x1000) && ram(0x10_0000) && ram((3 << 30) - 1) && ram(4 << 30) && ram((6 << 30) - 1));
        assert!(!ram(layout::ACPI_RSDP) && !ram(layout::EBDA) && !ram(3 << 30) && !ram(6 << 30));
    }
}
