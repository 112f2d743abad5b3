//! Guest memory: one or two host mappings that stand for the guest's RAM below and above the PCI hole.
//!
//! ```text
//!   guest physical   0 ........ 3 GiB | PCI hole | 4 GiB ........ 4 GiB + rest
//!   host mapping     └── low region ─┘            └──── high region ────┘
//! ```
//!
//! Every mapping starts at a multiple of 2 MiB, as its guest address does: only then can KVM map it with huge pages, and a
//! huge page spares up to 511 nested page faults while the guest boots. Memory is private and anonymous unless another
//! process shall share it (vhost-user) or it comes from hugetlbfs. It never appears in a core dump.
//!
//! The mappings belong to [`Ram`], which outlives every machine that is built on it: a guest that reboots gets the same
//! mappings with all content dropped.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{SealFlags, fcntl_add_seals};
use virtio_core::GuestMemory;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layout;

/// The alignment of every mapping, in bytes: the size of an x86-64 large page.
const ALIGNMENT: usize = 2 << 20;
/// How long huge pages are waited for that somebody gives back.
const HUGE_PAGE_PATIENCE: Duration = Duration::from_secs(3);

/// Which pages of the host back the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Pages of 4 KiB only.
    Small,
    /// Transparent huge pages where the kernel finds them; the default.
    Transparent,
    /// Huge pages of 2 MiB, reserved by the administrator (hugetlbfs).
    Huge2M,
    /// Huge pages of 1 GiB, reserved by the administrator (hugetlbfs).
    Huge1G,
}

impl Pages {
    /// Size of the smallest piece that can be allocated, in bytes.
    fn unit(self) -> u64 {
        match self {
            Pages::Small | Pages::Transparent => 4 << 10,
            Pages::Huge2M => 2 << 20,
            Pages::Huge1G => 1 << 30,
        }
    }

    fn memfd_flags(self) -> libc::c_uint {
        match self {
            Pages::Small | Pages::Transparent => 0,
            Pages::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            Pages::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        }
    }

    fn is_hugetlb(self) -> bool {
        matches!(self, Pages::Huge2M | Pages::Huge1G)
    }
}

/// What memory a guest gets.
#[derive(Debug, Clone, Copy)]
pub struct RamOptions {
    /// Bytes of guest memory, a multiple of 4 KiB (and of the huge page size).
    pub size: u64,
    /// Backing pages.
    pub pages: Pages,
    /// Backed by a file descriptor that another process can map.
    pub shared: bool,
    /// Touch all pages at start, so that the guest never waits for one and shortage shows at once.
    pub prefault: bool,
}

impl RamOptions {
    /// Whether all pages are taken at the start, or reserved, and stay as long as the memory: nothing is lost if devices hold them.
    pub fn stays(&self) -> bool {
        self.prefault || self.pages.is_hugetlb()
    }
}

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host is too small.
    #[error(
        "guest memory of {wanted} MiB is more than this host has ({available} MiB of memory and swap); \
         lower `memory` in the VM's configuration"
    )]
    HostTooSmall {
        /// MiB asked for.
        wanted: u64,
        /// MiB of memory and swap in total.
        available: u64,
    },
    /// The size is no multiple of the page size.
    #[error("guest memory of {size} bytes is not a multiple of the page size of {unit} bytes")]
    Unaligned {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a page.
        unit: u64,
    },
    /// Not enough reserved huge pages.
    #[error(
        "cannot get {count} huge pages of {unit_mib} MiB for guest memory; reserve them with \
         `echo {count} > /sys/kernel/mm/hugepages/hugepages-{unit_kib}kB/nr_hugepages`, or set huge-pages = \"thp\""
    )]
    NoHugePages {
        /// Pages needed.
        count: u64,
        /// Size of one in MiB.
        unit_mib: u64,
        /// Size of one in KiB.
        unit_kib: u64,
        /// What mmap said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action} {size} bytes of guest memory")]
    System {
        /// `reserve`, `map`, `prefault`, ...
        action: &'static str,
        /// Bytes of the region concerned.
        size: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// vm-memory refused the regions; cannot happen for the layouts made here.
    #[error("guest memory regions are inconsistent: {0}")]
    Regions(String),
}

/// One host mapping.
#[derive(Debug)]
struct Mapping {
    /// The whole reservation, of which the mapping is an aligned part.
    reservation: *mut libc::c_void,
    reserved: usize,
    address: *mut u8,
    size: usize,
    guest_base: u64,
    file: Option<Arc<File>>,
}

// SAFETY: the pointers are addresses of a mapping that this struct owns; they are only handed to the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above, nothing is read or written through them here.
unsafe impl Sync for Mapping {}

/// The guest's memory and its host mappings.
#[derive(Debug)]
pub struct Ram {
    mappings: Vec<Mapping>,
    memory: GuestMemory,
    options: RamOptions,
}

impl Ram {
    /// Reserves and maps guest memory.
    ///
    /// # Errors
    /// The host does not have that much, or the kernel refuses.
    pub fn new(options: RamOptions) -> Result<Self, MemoryError> {
        let RamOptions { size, pages, .. } = options;
        if size == 0 || size % pages.unit() != 0 {
            return Err(MemoryError::Unaligned {
                size,
                unit: pages.unit(),
            });
        }
        if let Some(total) = host_memory()
            && !pages.is_hugetlb()
            && size > total
        {
            return Err(MemoryError::HostTooSmall {
                wanted: size >> 20,
                available: total >> 20,
            });
        }
        let low = size.min(layout::LOW_RAM_END_MAX);
        let mut parts = vec![(0, low)];
        if size > low {
            parts.push((layout::HIGH_RAM_START, size - low));
        }
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for (guest_base, length) in parts {
            let length = usize::try_from(length).map_err(|_| MemoryError::HostTooSmall {
                wanted: size >> 20,
                available: 0,
            })?;
            let mapping = Mapping::new(guest_base, length, &options)?;
            regions.push(mapping.region()?);
            mappings.push(mapping);
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| MemoryError::Regions(error.to_string()))?;
        Ok(Ram {
            mappings,
            memory: Arc::new(memory),
            options,
        })
    }

    /// The memory as devices use it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// See [`RamOptions::stays`].
    pub fn stays(&self) -> bool {
        self.options.stays()
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.options.size
    }

    /// End of the RAM above 4 GiB; 4 GiB if there is none.
    pub fn high_end(&self) -> u64 {
        layout::HIGH_RAM_START + self.options.size.saturating_sub(layout::LOW_RAM_END_MAX)
    }

    /// (guest physical address, host virtual address, bytes) of each region, as KVM's memory slots want them.
    pub fn slots(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.mappings
            .iter()
            .map(|mapping| (mapping.guest_base, mapping.address as u64, mapping.size as u64))
    }

    /// Drops all content: every byte reads zero afterwards. The guest must not run and no device may be active.
    ///
    /// # Errors
    /// The kernel refuses to drop the pages.
    pub fn clear(&self) -> Result<(), MemoryError> {
        for mapping in &self.mappings {
            mapping.clear(&self.options)?;
        }
        Ok(())
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        if Arc::strong_count(&self.memory) > 1 {
            // A device still holds the memory. Unmapping it now would let that device write to whatever comes to lie there.
            tracing::error!("guest memory is still in use while its owner ends; leaving it mapped");
            return;
        }
        for mapping in &self.mappings {
            // SAFETY: the reservation came from mmap with this size, and nobody refers to the memory any more.
            unsafe { libc::munmap(mapping.reservation, mapping.reserved) };
        }
    }
}

impl Mapping {
    fn new(guest_base: u64, size: usize, options: &RamOptions) -> Result<Self, MemoryError> {
        let alignment = ALIGNMENT.max(usize::try_from(options.pages.unit()).unwrap_or(ALIGNMENT));
        let system = |action| {
            move || MemoryError::System {
                action,
                size,
                source: io::Error::last_os_error(),
            }
        };
        let reserved = size.checked_add(alignment).ok_or(MemoryError::HostTooSmall {
            wanted: (size >> 20) as u64,
            available: 0,
        })?;
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches nothing that exists.
        let reservation = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reservation == libc::MAP_FAILED {
            return Err(system("reserve address space for")());
        }
        let mut mapping = Mapping {
            reservation,
            reserved,
            address: reservation
                .cast::<u8>()
                .wrapping_add((reservation as usize).wrapping_neg() % alignment),
            size,
            guest_base,
            file: None,
        };
        // From here on an early return must give the reservation back.
        match mapping.populate(options) {
            Ok(()) => Ok(mapping),
            Err(error) => {
                // SAFETY: the reservation was just made and nobody has seen it.
                unsafe { libc::munmap(reservation, reserved) };
                Err(error)
            }
        }
    }

    fn populate(&mut self, options: &RamOptions) -> Result<(), MemoryError> {
        if options.shared || options.pages.is_hugetlb() {
            let file = memfd(c"smsvmm-guest-memory", options.pages.memfd_flags(), self.size)?;
            self.file = Some(Arc::new(file));
        }
        self.map_patiently(options)?;
        if options.prefault {
            self.advise(libc::MADV_POPULATE_WRITE, "prefault")?;
        }
        Ok(())
    }

    /// Drops all content. Memory that stays keeps its pages: they need not be had a second time (before a kernel gives back what rings of
    /// disks held, a second may go by), and nobody can take huge pages meanwhile, whose want would kill the guest (SIGBUS). Which of them were never touched
    /// cannot be told: what a server of disks has written need not be mapped here.
    fn clear(&self, options: &RamOptions) -> Result<(), MemoryError> {
        if options.stays() {
            // SAFETY: the bytes are the mapping that this struct owns; neither guest nor devices use it now (`Ram::clear`).
            unsafe { self.address.write_bytes(0, self.size) };
            return Ok(());
        }
        let advice = if self.file.is_some() {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        self.advise(advice, "clear")
    }

    /// [`Self::map`], which waits for huge pages if there could be enough: those of a machine that has just ended come back with a delay, if
    /// rings of disks held them.
    fn map_patiently(&self, options: &RamOptions) -> Result<(), MemoryError> {
        let begin = Instant::now();
        loop {
            match self.map(options) {
                Err(MemoryError::NoHugePages { count, unit_kib, .. })
                    if begin.elapsed() < HUGE_PAGE_PATIENCE && huge_pages(unit_kib) >= Some(count) =>
                {
                    std::thread::sleep(Duration::from_millis(50));
                }
                result => return result,
            }
        }
    }

    /// Maps the memory into the reservation, over what is there.
    fn map(&self, options: &RamOptions) -> Result<(), MemoryError> {
        let size = self.size;
        let (flags, fd) = match &self.file {
            // Without MAP_NORESERVE the kernel reserves huge pages now instead of killing the VMM later.
            Some(file) => (libc::MAP_FIXED | libc::MAP_SHARED, file.as_raw_fd()),
            None => (
                libc::MAP_FIXED | libc::MAP_NORESERVE | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
            ),
        };
        // SAFETY: the range lies within the reservation that this struct owns. What was mapped there before is replaced in
        // one step by the same kind of memory, so that who refers to it finds memory at any time.
        let mapped = unsafe {
            libc::mmap(
                self.address.cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            let source = io::Error::last_os_error();
            let unit = options.pages.unit();
            return Err(if options.pages.is_hugetlb() {
                MemoryError::NoHugePages {
                    count: options.size / unit,
                    unit_mib: unit >> 20,
                    unit_kib: unit >> 10,
                    source,
                }
            } else {
                MemoryError::System {
                    action: "map",
                    size,
                    source,
                }
            });
        }
        self.advise(libc::MADV_DONTDUMP, "keep out of core dumps")?;
        match options.pages {
            // Refused where the kernel is built without transparent huge pages: slower, not wrong.
            Pages::Transparent => drop(self.advise(libc::MADV_HUGEPAGE, "use huge pages for")),
            Pages::Small => drop(self.advise(libc::MADV_NOHUGEPAGE, "use small pages for")),
            Pages::Huge2M | Pages::Huge1G => {}
        }
        Ok(())
    }

    fn advise(&self, advice: libc::c_int, action: &'static str) -> Result<(), MemoryError> {
        // SAFETY: the range is the mapping that this struct owns; the pieces of advice used here keep it mapped.
        let result = unsafe { libc::madvise(self.address.cast(), self.size, advice) };
        if result == 0 {
            Ok(())
        } else {
            Err(MemoryError::System {
                action,
                size: self.size,
                source: io::Error::last_os_error(),
            })
        }
    }

    fn region(&self) -> Result<GuestRegionMmap, MemoryError> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = if self.file.is_some() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
        };
        // SAFETY: the mapping is valid for `size` bytes and outlives the region: `Ram` unmaps it only when it holds the
        // last reference to the memory made of it.
        let mut builder = unsafe {
            vm_memory::mmap::MmapRegionBuilder::new(self.size)
                .with_mmap_prot(protection)
                .with_mmap_flags(flags)
                .with_raw_mmap_pointer(self.address)
        };
        if let Some(file) = &self.file {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), 0));
        }
        let region: MmapRegion = builder
            .build()
            .map_err(|error| MemoryError::Regions(error.to_string()))?;
        GuestRegionMmap::new(region, GuestAddress(self.guest_base))
            .ok_or_else(|| MemoryError::Regions(format!("region at {:#x} overflows", self.guest_base)))
    }
}

/// How many huge pages of this size the host has, in use or not.
fn huge_pages(unit_kib: u64) -> Option<u64> {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{unit_kib}kB/nr_hugepages");
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A sealed-off anonymous file of `size` bytes.
fn memfd(name: &CStr, flags: libc::c_uint, size: usize) -> Result<File, MemoryError> {
    let error = |action| MemoryError::System {
        action,
        size,
        source: io::Error::last_os_error(),
    };
    // SAFETY: `name` is a valid C string; the call has no other pointers.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
    if fd < 0 {
        return Err(error("create a file for"));
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size as u64).map_err(|source| MemoryError::System {
        action: "size a file for",
        size,
        source,
    })?;
    // Whoever shares the memory could make it shorter under us otherwise, and the next access would end this process.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|source| MemoryError::System {
        action: "seal a file for",
        size,
        source: source.into(),
    })?;
    Ok(file)
}

/// Bytes of memory and swap that this host has in total, if it says.
pub fn host_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':')
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .ok()
    };
    Some((kib("MemTotal")? + kib("SwapTotal").unwrap_or(0)) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn options(size: u64) -> RamOptions {
        RamOptions {
            size,
            pages: Pages::Transparent,
            shared: false,
            prefault: false,
        }
    }

    #[test]
    fn memory_beyond_three_gib_continues_above_four() {
        let ram = Ram::new(options(5 << 30)).unwrap();
        let slots: Vec<_> = ram.slots().map(|(base, _, size)| (base, size)).collect();
        assert_eq!(slots, [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!(ram.high_end(), 6 << 30);
        ram.memory()
            .write_obj(7_u64, GuestAddress((4 << 30) + 8))
            .unwrap();
        assert!(ram.memory().write_obj(7_u64, GuestAddress(3 << 30)).is_err());
        assert_eq!(ram.memory().last_addr(), GuestAddress((6 << 30) - 1));
    }

    #[test]
    fn mappings_are_aligned_for_large_pages() {
        let ram = Ram::new(options(64 << 20)).unwrap();
        assert!(ram.slots().all(|(_, host, _)| host % (2 << 20) == 0));
    }

    #[test]
    fn clearing_drops_private_and_shared_content() {
        for shared in [false, true] {
            let ram = Ram::new(RamOptions {
                shared,
                ..options(32 << 20)
            })
            .unwrap();
            ram.memory().write_obj(7_u64, GuestAddress(0x1000)).unwrap();
            ram.clear().unwrap();
            assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        }
    }

    /// Bytes of the mappings that have pages.
    fn present(ram: &Ram) -> usize {
        let present = |mapping: &Mapping| {
            let mut pages = vec![0; mapping.size / 4096];
            // SAFETY: the range is mapped, and there is a byte for each of its pages.
            let result = unsafe { libc::mincore(mapping.address.cast(), mapping.size, pages.as_mut_ptr()) };
            assert_eq!(result, 0);
            pages.iter().filter(|page| **page & 1 != 0).count() * 4096
        };
        ram.mappings.iter().map(present).sum()
    }

    #[test]
    fn prefaulted_memory_is_there_at_once_also_after_it_was_cleared() {
        for shared in [false, true] {
            let ram = Ram::new(RamOptions {
                shared,
                prefault: true,
                ..options(32 << 20)
            })
            .unwrap();
            assert_eq!(present(&ram), 32 << 20);
            ram.memory().write_obj(7_u64, GuestAddress(0x1000)).unwrap();
            ram.clear().unwrap();
            assert_eq!(present(&ram), 32 << 20);
            assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
        }
    }

    #[test]
    fn whoever_shares_memory_cannot_make_it_shorter() {
        let ram = Ram::new(RamOptions {
            shared: true,
            ..options(32 << 20)
        })
        .unwrap();
        let theirs = ram.mappings[0].file.as_ref().unwrap().try_clone().unwrap();
        assert_eq!(
            theirs.set_len(4096).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
        ram.memory().write_obj(7_u64, GuestAddress(0x10_0000)).unwrap();
        ram.clear().unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);
    }

    #[test]
    fn cleared_huge_pages_stay() {
        let reserved = || -> usize {
            let read = |name| {
                std::fs::read_to_string(format!(
                    "/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages"
                ))
            };
            read("resv")
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let before = reserved();
        let huge = RamOptions {
            pages: Pages::Huge2M,
            ..options(32 << 20)
        };
        let Ok(ram) = Ram::new(huge) else {
            eprintln!(
                "there are no 16 huge pages: nothing is tested here, but by the story of huge pages in the lab"
            );
            return;
        };
        ram.memory().write_obj(7_u64, GuestAddress(0x1000)).unwrap();
        assert_eq!(reserved(), before + 15);
        ram.clear().unwrap();
        assert_eq!(
            reserved(),
            before + 15,
            "the one stays, the others were not touched"
        );
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_with_the_figures() {
        let error = Ram::new(options(1 << 50)).unwrap_err();
        assert!(
            matches!(
                error,
                MemoryError::HostTooSmall {
                    wanted: 0x4000_0000,
                    ..
                }
            ),
            "{error}"
        );
    }
}
