//! Kernel and initrd: checking the files, and loading them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Entry, params};
use crate::layout;

/// Offset of the setup header in a bzImage (Linux boot protocol §1.2).
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
/// Magic of the setup header: "HdrS".
const SETUP_MAGIC: u32 = 0x5372_6448;
/// First protocol version whose `xloadflags` says whether there is a 64-bit entry.
const PROTOCOL_2_12: u16 = 0x20c;
/// `xloadflags`: the kernel has a 64-bit entry at offset 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry from the load address.
const ENTRY_64: u64 = 0x200;
/// Initrds begin at such a boundary.
const PAGE: u64 = 4096;

/// The files that a VM boots from.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// bzImage or ELF kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk, if any.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
}

#[derive(Debug)]
enum Format {
    BzImage(Box<setup_header>),
    Elf,
}

/// An opened and checked kernel with its initrd. Stays open, so that a reboot loads the very same files.
#[derive(Debug)]
pub struct Kernel {
    files: BootFiles,
    kernel: File,
    format: Format,
    initrd: Option<(File, u64)>,
}

impl Kernel {
    /// Opens the files and checks that the kernel is one that can be booted.
    ///
    /// # Errors
    /// A file is missing, unreadable, truncated or of another kind.
    pub fn open(files: BootFiles) -> Result<Self, BootError> {
        let (mut kernel, size) = open("kernel", &files.kernel)?;
        let format = detect(&mut kernel, size, &files.kernel)?;
        let initrd = files
            .initrd
            .as_deref()
            .map(|path| open("initrd", path))
            .transpose()?;
        let limit = match &format {
            Format::BzImage(header) => usize::try_from(header.cmdline_size).unwrap_or(usize::MAX),
            Format::Elf => usize::MAX,
        };
        let limit = limit.min(usize::try_from(layout::CMDLINE_SIZE_MAX - 1).unwrap_or(usize::MAX));
        if files.command_line.len() > limit {
            return Err(BootError::CommandLineTooLong {
                length: files.command_line.len(),
                limit,
            });
        }
        Ok(Kernel {
            files,
            kernel,
            format,
            initrd,
        })
    }

    /// Writes everything that the kernel needs into guest memory. `high_end` is the end of RAM above 4 GiB.
    ///
    /// # Errors
    /// The files do not fit into guest memory, or cannot be read any more.
    pub fn load(&mut self, memory: &GuestMemoryMmap, ram_size: u64) -> Result<Entry, BootError> {
        let path = self.files.kernel.clone();
        let kernel_size = self.kernel.metadata().map_or(0, |metadata| metadata.len());
        let does_not_fit = || BootError::DoesNotFit {
            what: "the kernel",
            size: kernel_size.div_ceil(1 << 20),
        };
        let low_end = ram_size.min(layout::LOW_RAM_END_MAX);

        let (entry, end, header) = match &self.format {
            Format::BzImage(header) => {
                let needed = layout::KERNEL_START + u64::from(header.init_size);
                if needed.max({ header.pref_address } + u64::from(header.init_size)) > low_end {
                    return Err(does_not_fit());
                }
                let start = GuestAddress(layout::KERNEL_START);
                let loaded = BzImage::load(memory, Some(start), &mut self.kernel, Some(start))
                    .map_err(|error| not_a_kernel(&path, &error))?;
                let address = loaded.kernel_load.0 + ENTRY_64;
                (
                    Entry::Linux64 { address },
                    needed.max(loaded.kernel_end),
                    loaded.setup_header,
                )
            }
            Format::Elf => {
                let start = GuestAddress(layout::KERNEL_START);
                let loaded =
                    Elf::load(memory, None, &mut self.kernel, Some(start)).map_err(|error| match error {
                        linux_loader::loader::Error::Elf(
                            linux_loader::loader::elf::Error::ReadKernelImage,
                        ) => does_not_fit(),
                        error => not_a_kernel(&path, &error),
                    })?;
                let PvhBootCapability::PvhEntryPresent(address) = loaded.pvh_boot_cap else {
                    return Err(not_a_kernel(
                        &path,
                        &"the ELF file has no PVH entry point (CONFIG_PVH)",
                    ));
                };
                (Entry::Pvh { address: address.0 }, loaded.kernel_end, None)
            }
        };
        let initrd = self.load_initrd(memory, end, low_end, header.as_ref())?;
        let mut command_line = self.files.command_line.clone().into_bytes();
        command_line.push(0);
        memory.write_slice(&command_line, GuestAddress(layout::CMDLINE))?;
        match header {
            Some(header) => params::write_zero_page(memory, header, ram_size, initrd, command_line.len())?,
            None => params::write_start_info(memory, ram_size, initrd)?,
        }
        Ok(entry)
    }

    /// Loads the initrd as high as it may lie, so that the kernel has room to unpack itself below.
    fn load_initrd(
        &mut self,
        memory: &GuestMemoryMmap,
        kernel_end: u64,
        low_end: u64,
        header: Option<&setup_header>,
    ) -> Result<Option<params::Initrd>, BootError> {
        let Some((file, size)) = &mut self.initrd else {
            return Ok(None);
        };
        let size = *size;
        let does_not_fit = || BootError::DoesNotFit {
            what: "the initrd",
            size: size.div_ceil(1 << 20),
        };
        let limit = header.map_or(u64::MAX, |header| {
            u64::from(header.initrd_addr_max).saturating_add(1)
        });
        let address = low_end.min(limit).checked_sub(size).ok_or_else(does_not_fit)? / PAGE * PAGE;
        if address < kernel_end {
            return Err(does_not_fit());
        }
        let path = || self.files.initrd.clone().unwrap_or_default();
        let failed = |source| BootError::File {
            what: "initrd",
            path: path(),
            source,
        };
        file.rewind().map_err(failed)?;
        let length = usize::try_from(size).map_err(|_| does_not_fit())?;
        memory
            .read_exact_volatile_from(GuestAddress(address), file, length)
            .map_err(|error| failed(io::Error::other(error)))?;
        Ok(Some(params::Initrd { address, size }))
    }
}

fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let failed = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )));
    }
    Ok((file, metadata.len()))
}

fn not_a_kernel(path: &Path, reason: &dyn std::fmt::Display) -> BootError {
    BootError::NotAKernel {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn detect(file: &mut File, size: u64, path: &Path) -> Result<Format, BootError> {
    let failed = |source| BootError::File {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let mut magic = [0; 4];
    let got = file.read(&mut magic).map_err(failed)?;
    if got == 4 && magic == *b"\x7fELF" {
        return Ok(Format::Elf);
    }
    let mut header = setup_header::default();
    file.seek(SeekFrom::Start(SETUP_HEADER_OFFSET)).map_err(failed)?;
    if file.read_exact(header.as_mut_slice()).is_err() {
        return Err(not_a_kernel(path, &format!("it has only {size} bytes")));
    }
    if { header.header } != SETUP_MAGIC {
        return Err(not_a_kernel(path, &"it is neither a bzImage nor an ELF file"));
    }
    if { header.version } < PROTOCOL_2_12 || { header.xloadflags } & XLF_KERNEL_64 == 0 {
        return Err(not_a_kernel(
            path,
            &"it has no 64-bit entry point (32-bit kernels and those before Linux 3.8)",
        ));
    }
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let expected = (sectors + 1) * 512 + u64::from(header.syssize) * 16;
    // `syssize` counts paragraphs of 16 bytes, rounded up.
    if size + 15 < expected {
        return Err(BootError::Truncated {
            path: path.to_owned(),
            size,
            expected,
        });
    }
    Ok(Format::BzImage(Box::new(header)))
}
