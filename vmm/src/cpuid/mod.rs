//! CPUID: which CPU each vCPU sees.
//!
//! The start is what KVM supports on this host (`KVM_GET_SUPPORTED_CPUID`), which describes the host's own topology and
//! every feature that KVM could virtualise. [`filter`] makes one vCPU's leaves of it:
//!
//! ```text
//!   KVM's list ─► hide features ─► who am I ─► topology ─► caches ─► XSAVE area ─► hypervisor ─► KVM_SET_CPUID2
//!                 config, policy    1           0xB 0x1F    4         0xD           0x4000_00xx
//!                                               8.1E 8.08   8.1D
//! ```
//!
//! [`supported`] gives KVM's list; [`filter`] is a pure function, so that the tests run it for CPUs that are not here. `KVM_SET_CPUID2` must come before MSRs are
//! read or written: since Linux 6.13 KVM hides MSRs that the guest's CPUID does not announce.

pub mod features;
mod host;
mod leaves;
pub mod msrs;
pub mod topology;

use kvm_bindings::kvm_cpuid_entry2;

use features::Feature;
pub use host::supported;
pub use leaves::Register;
use leaves::{Leaves, set_field};
pub use topology::{Topology, TopologyError};

/// Leaves that this module works on.
mod leaf {
    pub(super) const VENDOR: u32 = 0;
    pub(super) const IDENTITY: u32 = 1;
    pub(super) const INTEL_CACHES: u32 = 4;
    pub(super) const POWER: u32 = 6;
    pub(super) const INTEL_PMU: u32 = 0xA;
    pub(super) const TOPOLOGY: u32 = 0xB;
    pub(super) const XSAVE: u32 = 0xD;
    pub(super) const SGX: u32 = 0x12;
    pub(super) const PROCESSOR_TRACE: u32 = 0x14;
    pub(super) const AMX_TILE: u32 = 0x1D;
    pub(super) const AMX_MULTIPLIER: u32 = 0x1E;
    pub(super) const LAST_BRANCH: u32 = 0x1C;
    pub(super) const TOPOLOGY_V2: u32 = 0x1F;
    pub(super) const INTEL_PMU_EXTENDED: u32 = 0x23;
    pub(super) const HYPERVISOR: u32 = 0x4000_0000;
    pub(super) const KVM_FEATURES: u32 = 0x4000_0001;
    pub(super) const FREQUENCIES: u32 = 0x4000_0010;
    pub(super) const EXTENDED_MAX: u32 = 0x8000_0000;
    pub(super) const EXTENDED_IDENTITY: u32 = 0x8000_0001;
    pub(super) const ADDRESS_SIZES: u32 = 0x8000_0008;
    pub(super) const SVM: u32 = 0x8000_000A;
    pub(super) const AMD_IBS: u32 = 0x8000_001B;
    pub(super) const AMD_CACHES: u32 = 0x8000_001D;
    pub(super) const AMD_TOPOLOGY: u32 = 0x8000_001E;
    pub(super) const AMD_MEMORY_ENCRYPTION: u32 = 0x8000_001F;
    pub(super) const AMD_PMU: u32 = 0x8000_0022;
    pub(super) const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;
}

/// Clock of the local APIC timer that KVM emulates.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What a vCPU's CPUID depends on besides the host.
#[derive(Debug, Clone, Copy)]
pub struct CpuidInputs<'a> {
    /// How the vCPUs are grouped.
    pub topology: Topology,
    /// Index of this vCPU.
    pub cpu: u32,
    /// Features to hide; whatever needs them is hidden as well.
    pub removed: &'a [Feature],
    /// Features to show that are hidden by default (AMX, WAITPKG). KVM must support them.
    pub added: &'a [Feature],
    /// Whether the guest may run virtual machines itself.
    pub nested: bool,
    /// Width of physical addresses; `None` for the host's. The guest's page tables must not use more, so it cannot be
    /// greater than the host's.
    pub physical_bits: Option<u8>,
    /// Whether KVM has `KVM_CAP_TSC_DEADLINE_TIMER`, which its supported CPUID does not say on all kernels.
    pub tsc_deadline: bool,
    /// Frequency of the vCPU's TSC (`KVM_GET_TSC_KHZ`), if known.
    pub tsc_khz: Option<u32>,
    /// Whether every vCPU has a host CPU to itself: Linux then spins instead of asking the hypervisor to wait.
    pub dedicated_cpus: bool,
}

/// Why a vCPU's CPUID cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// The machine has no such vCPU.
    #[error("there is no CPU {cpu} in a machine with {count} CPUs")]
    NoSuchCpu {
        /// Index that was asked for.
        cpu: u32,
        /// vCPUs of the topology.
        count: u32,
    },
    /// A feature was asked for that the host or its KVM lack.
    #[error("the CPU feature {name:?} cannot be added: this host's CPU or KVM does not support it")]
    Unsupported {
        /// Name of the feature.
        name: &'static str,
    },
    /// A feature was asked for that never works.
    #[error("the CPU feature {name:?} cannot be added: smsvmm does not support it")]
    NotVirtualised {
        /// Name of the feature.
        name: &'static str,
    },
    /// The host has fewer physical address bits than were asked for.
    #[error("{asked} physical address bits were asked for, but this host has between 32 and {host}")]
    PhysicalBits {
        /// What was asked for.
        asked: u8,
        /// What the host has.
        host: u8,
    },
}

/// The makers of CPUs whose leaves differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    /// AMD and Hygon.
    Amd,
    /// Intel, and those that follow it.
    Intel,
}

impl Vendor {
    fn of(leaves: &Leaves) -> Self {
        let vendor = leaves.get(leaf::VENDOR);
        let name: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx]
            .iter()
            .flat_map(|register| register.to_le_bytes())
            .collect();
        match name.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// Width of the guest physical addresses that can be mapped on this host, from KVM's supported CPUID: for
/// [`crate::layout::mmio64_window`].
pub fn physical_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    let [physical, _, guest, _] = Leaves::new(supported).get(leaf::ADDRESS_SIZES).eax.to_le_bytes();
    match (guest, physical) {
        // Before there was leaf 0x8000_0008: PAE.
        (0, 0) => 36,
        (0, physical) => physical,
        // KVM says so where nested paging reaches less far than physical addresses.
        (guest, _) => guest,
    }
}

/// The CPUID leaves of one vCPU, made of those that KVM supports.
///
/// # Errors
/// `inputs` ask for what is not there.
pub fn filter(
    supported: &[kvm_cpuid_entry2],
    inputs: &CpuidInputs,
) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
    let count = inputs.topology.cpu_count();
    if inputs.cpu >= count {
        return Err(CpuidError::NoSuchCpu {
            cpu: inputs.cpu,
            count,
        });
    }
    let mut leaves = Leaves::new(supported);
    let vendor = Vendor::of(&leaves);
    hide_features(&mut leaves, vendor, inputs)?;
    identify(&mut leaves, vendor, inputs);
    describe_topology(&mut leaves, vendor, inputs);
    match vendor {
        Vendor::Amd => describe_amd(&mut leaves, inputs),
        Vendor::Intel => describe_intel_caches(&mut leaves, &inputs.topology),
    }
    set_physical_bits(&mut leaves, supported, inputs)?;
    clear_unserved(&mut leaves);
    fit_xsave_area(&mut leaves);
    describe_hypervisor(&mut leaves, inputs);
    Ok(leaves.into_entries())
}

/// Takes away what the configuration removes, what is off by default, and what the VMM does not serve.
fn hide_features(leaves: &mut Leaves, vendor: Vendor, inputs: &CpuidInputs) -> Result<(), CpuidError> {
    for feature in inputs.added {
        let name = feature.name;
        if features::NEVER_SHOWN.contains(&name) {
            return Err(CpuidError::NotVirtualised { name });
        }
        if !feature.is_in(leaves) {
            return Err(CpuidError::Unsupported { name });
        }
    }
    let asked = features::with_bases(inputs.added);
    let by_default = features::HIDDEN_UNLESS_ASKED
        .iter()
        .filter(|name| !asked.contains(name));
    let nested = features::NESTED.iter().filter(|_| !inputs.nested);
    // KVM emulates the MSR for AMD as well, and announces it; Linux then takes the CPU for an Intel one.
    let foreign = (vendor == Vendor::Amd).then_some(&"arch_capabilities");
    let hidden = features::NEVER_SHOWN
        .iter()
        .chain(by_default)
        .chain(nested)
        .chain(foreign)
        .copied();
    features::hide(
        leaves,
        hidden.chain(inputs.removed.iter().map(|feature| feature.name)),
    );
    Ok(())
}

/// Leaf 1: APIC id, the number of threads, and what comes from KVM's other capabilities.
fn identify(leaves: &mut Leaves, vendor: Vendor, inputs: &CpuidInputs) {
    const CLFLUSH_SIZE: u32 = 8;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    /// AMD: the threads that leaf 1 counts may be cores.
    const CMP_LEGACY: u32 = 1 << 1;

    let threads = inputs.topology.threads_per_socket();
    // Intel means ids here, AMD threads.
    let addressable = match vendor {
        Vendor::Intel => 1 << inputs.topology.package_bits(),
        Vendor::Amd => threads,
    };
    let removed = |name| inputs.removed.iter().any(|feature| feature.name == name);
    let has_apic = features::has(leaves, "apic");

    let identity = leaves.leaf(leaf::IDENTITY);
    set_field(&mut identity.ebx, 8, 8, CLFLUSH_SIZE);
    set_field(&mut identity.ebx, 16, 8, addressable);
    set_field(&mut identity.ebx, 24, 8, inputs.topology.apic_id(inputs.cpu));
    if !removed("hypervisor") {
        identity.ecx |= HYPERVISOR;
    }
    if inputs.tsc_deadline && has_apic && !removed("tsc_deadline_timer") {
        identity.ecx |= TSC_DEADLINE;
    }
    if threads > 1 {
        identity.edx |= HTT;
    } else {
        identity.edx &= !HTT;
    }
    let extended = leaves.leaf(leaf::EXTENDED_IDENTITY);
    if vendor == Vendor::Amd && threads > 1 {
        extended.ecx |= CMP_LEGACY;
    } else {
        extended.ecx &= !CMP_LEGACY;
    }
}

/// Leaves 0xB and 0x1F: the x2APIC id and how it is made up. Three indices each: threads, cores, and the end. Every one has
/// the id in EDX; KVM takes it from index 1 for the indices behind the end.
fn describe_topology(leaves: &mut Leaves, vendor: Vendor, inputs: &CpuidInputs) {
    const THREAD_LEVEL: u32 = 1;
    const CORE_LEVEL: u32 = 2;

    let topology = &inputs.topology;
    let has_v2 = vendor == Vendor::Intel && leaves.get(leaf::VENDOR).eax >= leaf::TOPOLOGY_V2;
    // AMD's own next version of these leaves describes the host; without it Linux takes leaf 0xB.
    leaves.remove(leaf::AMD_TOPOLOGY_V2);
    leaves.remove(leaf::TOPOLOGY_V2);
    leaves.remove(leaf::TOPOLOGY);
    let basic_max = &mut leaves.leaf(leaf::VENDOR).eax;
    *basic_max = (*basic_max).max(leaf::TOPOLOGY);

    let levels = [
        (THREAD_LEVEL, topology.thread_bits(), topology.threads()),
        (CORE_LEVEL, topology.package_bits(), topology.threads_per_socket()),
        (0, 0, 0),
    ];
    let versions = std::iter::once(leaf::TOPOLOGY).chain(has_v2.then_some(leaf::TOPOLOGY_V2));
    for function in versions {
        for (index, (level, shift, count)) in (0u32..).zip(levels) {
            let entry = leaves.leaf_index(function, index);
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = level << 8 | index;
            entry.edx = topology.apic_id(inputs.cpu);
        }
    }
}

/// Leaf 4: levels 1 and 2 belong to a core, the levels beyond to a socket; in powers of two, as APIC ids count.
fn describe_intel_caches(leaves: &mut Leaves, topology: &Topology) {
    for index in leaves.indices(leaf::INTEL_CACHES) {
        let cache = leaves.leaf_index(leaf::INTEL_CACHES, index);
        if cache.eax & 0x1F == 0 {
            continue;
        }
        let level = cache.eax >> 5 & 7;
        let core_bits = topology.package_bits() - topology.thread_bits();
        set_field(&mut cache.eax, 14, 12, sharing(topology, level));
        set_field(&mut cache.eax, 26, 6, (1 << core_bits) - 1);
    }
}

/// The number of APIC ids that share a cache of `level`, less one.
fn sharing(topology: &Topology, level: u32) -> u32 {
    let bits = if level <= 2 {
        topology.thread_bits()
    } else {
        topology.package_bits()
    };
    (1 << bits) - 1
}

/// AMD's leaves of topology and caches. TOPOEXT promises them; it is nothing but this promise, so it is made even where
/// the host does not: Linux before 6.9 finds threads in no other way. But without caches that a guest can list to the
/// end, Linux would loop for ever.
fn describe_amd(leaves: &mut Leaves, inputs: &CpuidInputs) {
    const TOPOEXT: u32 = 1 << 22;

    let topology = &inputs.topology;
    describe_amd_size(leaves, topology);

    let caches = leaves.indices(leaf::AMD_CACHES);
    let listed = (0u32..)
        .zip(&caches)
        .take_while(|&(expected, &index)| {
            let cache = leaves.get_index(leaf::AMD_CACHES, index);
            expected == index
                && cache.eax & 0x1F != 0
                && cache.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0
        })
        .count();
    let reaches = leaves.get(leaf::EXTENDED_MAX).eax >= leaf::AMD_TOPOLOGY;
    let unwanted = inputs.removed.iter().any(|feature| feature.name == "topoext");
    if unwanted || !reaches || listed < 2 {
        features::hide(leaves, std::iter::once("topoext"));
        leaves.remove(leaf::AMD_CACHES);
        leaves.remove(leaf::AMD_TOPOLOGY);
        return;
    }
    leaves.leaf(leaf::EXTENDED_IDENTITY).ecx |= TOPOEXT;
    for index in caches {
        let cache = leaves.leaf_index(leaf::AMD_CACHES, index);
        if (index as usize) < listed {
            let level = cache.eax >> 5 & 7;
            set_field(&mut cache.eax, 14, 12, sharing(topology, level));
        } else {
            leaves.remove_index(leaf::AMD_CACHES, index);
        }
    }

    let place = topology.place(inputs.cpu);
    let ids = leaves.leaf(leaf::AMD_TOPOLOGY);
    ids.eax = topology.apic_id(inputs.cpu);
    ids.ebx = place.core | (topology.threads() - 1) << 8;
    // One node per socket, numbered through.
    ids.ecx = place.socket;
    ids.edx = 0;
}

/// Leaf 0x8000_0008 ECX: threads of a socket, and the bits of an APIC id that tell them apart.
fn describe_amd_size(leaves: &mut Leaves, topology: &Topology) {
    leaves.leaf(leaf::ADDRESS_SIZES).ecx =
        (topology.threads_per_socket() - 1) | topology.package_bits() << 12;
}

/// Leaf 0x8000_0008 EAX: what the configuration says, or what the host can.
fn set_physical_bits(
    leaves: &mut Leaves,
    supported: &[kvm_cpuid_entry2],
    inputs: &CpuidInputs,
) -> Result<(), CpuidError> {
    let Some(asked) = inputs.physical_bits else {
        return Ok(());
    };
    let host = physical_bits(supported);
    if !(32..=host).contains(&asked) {
        return Err(CpuidError::PhysicalBits { asked, host });
    }
    let sizes = leaves.leaf(leaf::ADDRESS_SIZES);
    set_field(&mut sizes.eax, 0, 8, u32::from(asked));
    set_field(&mut sizes.eax, 16, 8, 0);
    Ok(())
}

/// Leaves that announce what the VMM does not serve, or what a feature that is hidden now had in them.
fn clear_unserved(leaves: &mut Leaves) {
    for function in [
        leaf::INTEL_PMU,
        leaf::INTEL_PMU_EXTENDED,
        leaf::SGX,
        leaf::PROCESSOR_TRACE,
        leaf::LAST_BRANCH,
        leaf::AMD_IBS,
        leaf::AMD_PMU,
        leaf::AMD_MEMORY_ENCRYPTION,
    ] {
        leaves.remove(function);
    }
    if !features::has(leaves, "svm") {
        leaves.remove(leaf::SVM);
    }
    if !features::has(leaves, "amx_tile") {
        leaves.remove(leaf::AMX_TILE);
        leaves.remove(leaf::AMX_MULTIPLIER);
    }
    // Of power management only the APIC timer that never stops is true in a guest.
    const ARAT: u32 = 1 << 2;
    let power = leaves.leaf(leaf::POWER);
    power.eax &= ARAT;
    (power.ebx, power.ecx, power.edx) = (0, 0, 0);
}

/// Leaf 0xD: the XSAVE area has only the state of features that are there, and is as long as these need.
fn fit_xsave_area(leaves: &mut Leaves) {
    /// Legacy region and header.
    const SIZE_MIN: u32 = 576;

    if !features::has(leaves, "xsave") {
        leaves.remove(leaf::XSAVE);
        return;
    }
    for &(component, feature) in features::XSAVE_COMPONENTS {
        if !features::has(leaves, feature) {
            leaves.leaf_index(leaf::XSAVE, 0).eax &= !(1 << component);
            leaves.leaf_index(leaf::XSAVE, 1).ecx &= !(1 << component);
            leaves.remove_index(leaf::XSAVE, component);
        }
    }
    let user = leaves.get_index(leaf::XSAVE, 0).eax;
    let size = (2..32)
        .filter(|component| user & 1 << component != 0)
        .map(|component| leaves.get_index(leaf::XSAVE, component))
        .map(|area| area.ebx.saturating_add(area.eax))
        .fold(SIZE_MIN, u32::max);
    let area = leaves.leaf_index(leaf::XSAVE, 0);
    area.ecx = size;
    // What XCR0 enables now; KVM keeps it up to date.
    area.ebx = SIZE_MIN;
}

/// KVM's own leaves: its signature and features stay, the frequencies are added.
fn describe_hypervisor(leaves: &mut Leaves, inputs: &CpuidInputs) {
    const HINT_REALTIME: u32 = 1;

    if leaves.get(leaf::HYPERVISOR).ebx == 0 {
        return;
    }
    if inputs.dedicated_cpus {
        leaves.leaf(leaf::KVM_FEATURES).edx |= HINT_REALTIME;
    }
    if let Some(khz) = inputs.tsc_khz {
        leaves.leaf(leaf::HYPERVISOR).eax = leaf::FREQUENCIES;
        let frequencies = leaves.leaf(leaf::FREQUENCIES);
        frequencies.eax = khz;
        frequencies.ebx = APIC_BUS_KHZ;
    }
}
