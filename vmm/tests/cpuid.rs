//! CPUID as a guest reads it: a decoder that works like Linux's finds the topology again, for every shape of machine, on
//! the CPUs of `tests/cpuid/*.txt`.
//!
//! `GOLDEN=update cargo test -p vmm --test cpuid` writes the golden files anew; look at the difference before you commit.

#![allow(clippy::unwrap_used, clippy::expect_used)] // also in the tests' helpers

use std::{
    collections::BTreeSet,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use kvm_bindings::kvm_cpuid_entry2;
use proptest::prelude::*;
use vmm::cpuid::{self, CpuidError, CpuidInputs, Topology, features::Feature};

// ---------------------------------------------------------------------------------------------------------------------
// Hosts
// ---------------------------------------------------------------------------------------------------------------------

/// A host's CPU, as KVM offers it to guests.
struct Host {
    name: &'static str,
    is_amd: bool,
    supported: Vec<kvm_cpuid_entry2>,
}

fn host(name: &'static str) -> Host {
    let text = fs::read_to_string(directory("cpuid").join(name).with_extension("txt")).unwrap();
    let supported = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let field: Vec<u32> = line
                .split(' ')
                .map(|field| u32::from_str_radix(field, 16).unwrap())
                .collect();
            kvm_cpuid_entry2 {
                function: field[0],
                index: field[1],
                flags: field[2],
                eax: field[3],
                ebx: field[4],
                ecx: field[5],
                edx: field[6],
                ..Default::default()
            }
        })
        .collect();
    Host {
        name,
        is_amd: name.starts_with("amd"),
        supported,
    }
}

fn hosts() -> [Host; 3] {
    ["amd-rome", "amd-milan", "intel-sapphire-rapids"].map(host)
}

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Every number of sockets, cores and threads that makes at most 64 vCPUs.
fn shapes() -> impl Iterator<Item = Topology> {
    (1..=64)
        .flat_map(|sockets| (1..=64).map(move |cores| (sockets, cores)))
        .flat_map(|(sockets, cores)| (1..=64).map(move |threads| (sockets, cores, threads)))
        .filter_map(|(sockets, cores, threads)| Topology::new(sockets, cores, threads).ok())
}

fn inputs(topology: Topology, cpu: u32) -> CpuidInputs<'static> {
    CpuidInputs {
        topology,
        cpu,
        removed: &[],
        added: &[],
        nested: false,
        physical_bits: None,
        tsc_deadline: true,
        tsc_khz: None,
        dedicated_cpus: false,
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A guest
// ---------------------------------------------------------------------------------------------------------------------

/// A vCPU that executes CPUID the way KVM answers it (Linux arch/x86/kvm/cpuid.c, kvm_cpuid).
struct Guest<'a>(&'a [kvm_cpuid_entry2]);

impl Guest<'_> {
    fn entry(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.0.iter().find(|entry| {
            let indexed = entry.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == function && (!indexed || entry.index == index)
        })
    }

    fn cpuid(&self, function: u32, index: u32) -> [u32; 4] {
        if let Some(entry) = self.entry(function, index) {
            return [entry.eax, entry.ebx, entry.ecx, entry.edx];
        }
        // Behind the last index of the topology leaves, the index and the id stay.
        match (function, self.entry(function, 1)) {
            (0xB | 0x1F, Some(core)) => [0, 0, index & 0xFF, core.edx],
            _ => [0; 4],
        }
    }

    /// The last basic or extended leaf.
    fn max(&self, base: u32) -> u32 {
        self.cpuid(base, 0)[0]
    }
}

/// What a system finds out about one vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    apic_id: u32,
    socket: u32,
    core: u32,
    thread: u32,
}

fn low_bits(value: u32, width: u32) -> u32 {
    value & ((1 << width) - 1)
}

/// Bits for `count` things, rounded up.
fn order(count: u32) -> u32 {
    32 - (count - 1).leading_zeros()
}

/// Topology from one of the extended topology leaves.
fn by_extended_leaf(guest: &Guest, function: u32) -> Option<Found> {
    let [thread_bits, threads, kind, apic_id] = guest.cpuid(function, 0);
    if threads == 0 || kind >> 8 & 0xFF != 1 {
        return None;
    }
    let mut package_bits = thread_bits;
    for index in 1.. {
        let [shift, count, kind, id] = guest.cpuid(function, index);
        assert_eq!(id, apic_id, "every index has the id");
        assert_eq!(kind & 0xFF, index);
        match kind >> 8 & 0xFF {
            0 => break,
            2 => {
                assert!(count.is_multiple_of(threads) && count > 0);
                package_bits = shift;
            }
            other => panic!("unexpected level {other}"),
        }
        assert!(index < 8, "the list of levels has an end");
    }
    Some(Found {
        apic_id,
        socket: apic_id >> package_bits,
        core: low_bits(apic_id >> thread_bits, package_bits - thread_bits),
        thread: low_bits(apic_id, thread_bits),
    })
}

/// Topology as systems before x2APIC find it on Intel: leaves 1 and 4.
fn by_intel_legacy(guest: &Guest) -> Found {
    let [_, ebx, _, edx] = guest.cpuid(1, 0);
    let apic_id = ebx >> 24;
    let siblings = if edx & 1 << 28 != 0 { ebx >> 16 & 0xFF } else { 1 };
    let cores = (guest.cpuid(4, 0)[0] >> 26) + 1;
    let package_bits = order(siblings);
    let thread_bits = order(siblings / cores);
    Found {
        apic_id,
        socket: apic_id >> package_bits,
        core: low_bits(apic_id >> thread_bits, order(cores)),
        thread: low_bits(apic_id, thread_bits),
    }
}

/// Socket and number within the socket, as older systems find them on AMD: leaf 0x8000_0008.
fn by_amd_legacy(guest: &Guest) -> (u32, u32) {
    let [_, _, ecx, _] = guest.cpuid(0x8000_0008, 0);
    let (threads, bits) = ((ecx & 0xFF) + 1, ecx >> 12 & 0xF);
    let apic_id = guest.cpuid(1, 0)[1] >> 24;
    assert!(threads <= 1 << bits);
    (apic_id >> bits, low_bits(apic_id, bits))
}

/// The caches that `leaf` lists: level, and how many APIC ids share one.
fn caches(guest: &Guest, leaf: u32) -> Vec<(u32, u32)> {
    let mut caches = Vec::new();
    for index in 0.. {
        assert!(index < 16, "the list of caches has an end");
        let [eax, ..] = guest.cpuid(leaf, index);
        if eax & 0x1F == 0 {
            break;
        }
        caches.push((eax >> 5 & 7, (eax >> 14 & 0xFFF) + 1));
    }
    caches
}

// ---------------------------------------------------------------------------------------------------------------------
// Topology
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_guest_finds_every_shape_of_amd_machine_as_it_was_meant() {
    let host = host("amd-milan");
    shapes().for_each(|topology| check_shape(&host, &topology));
}

#[test]
fn a_guest_finds_every_shape_of_intel_machine_as_it_was_meant() {
    let host = host("intel-sapphire-rapids");
    shapes().for_each(|topology| check_shape(&host, &topology));
}

#[test]
fn a_guest_finds_threads_although_the_host_lacks_topoext() {
    check_shape(&host("amd-rome"), &Topology::new(2, 3, 2).unwrap());
}

fn check_shape(host: &Host, topology: &Topology) {
    let ids: BTreeSet<u32> = topology.apic_ids().into_iter().collect();
    assert_eq!(
        ids.len(),
        topology.cpu_count() as usize,
        "{topology:?}: every id once"
    );
    // All CPUs of small machines; of large ones some, among them the first and the last.
    let some = (0..topology.cpu_count()).step_by(topology.cpu_count() as usize / 11 + 1);
    for cpu in some.chain([topology.cpu_count() - 1]) {
        let leaves = cpuid::filter(&host.supported, &inputs(*topology, cpu)).unwrap();
        assert!(leaves.len() <= 80, "old kernels take no more");
        let guest = Guest(&leaves);
        let context = format!("CPU {cpu} of {topology:?} on {}", host.name);

        let place = topology.place(cpu);
        let meant = Found {
            apic_id: topology.apic_id(cpu),
            socket: place.socket,
            core: place.core,
            thread: place.thread,
        };
        assert!(meant.apic_id < 255);

        assert!(guest.max(0) >= 0xB);
        assert_eq!(by_extended_leaf(&guest, 0xB), Some(meant), "{context}");
        if host.is_amd {
            assert!(guest.max(0) < 0x1F || by_extended_leaf(&guest, 0x1F).is_none());
            check_amd(&guest, topology, meant, &context);
        } else {
            assert_eq!(by_extended_leaf(&guest, 0x1F), Some(meant), "{context}");
            assert_eq!(by_intel_legacy(&guest), meant, "{context}");
        }

        let shared = caches(&guest, if host.is_amd { 0x8000_001D } else { 4 });
        assert_eq!(shared.len(), 4, "{context}: {shared:?}");
        for (level, count) in shared {
            // Who shares a cache with this vCPU: by division and by shift, Linux has done both.
            let with_me = |id: u32| id / count == meant.apic_id / count;
            let by_shift = |id: u32| id >> order(count) == meant.apic_id >> order(count);
            for other in 0..topology.cpu_count() {
                let (id, there) = (topology.apic_id(other), topology.place(other));
                let same_socket = there.socket == place.socket;
                let expected = same_socket && (level == 3 || there.core == place.core);
                assert_eq!(with_me(id), expected, "{context}: level {level} with CPU {other}");
                assert_eq!(
                    by_shift(id),
                    expected,
                    "{context}: level {level} with CPU {other}"
                );
            }
        }
    }
}

fn check_amd(guest: &Guest, topology: &Topology, meant: Found, context: &str) {
    let in_socket = meant.core << topology.thread_bits() | meant.thread;
    assert_eq!(by_amd_legacy(guest), (meant.socket, in_socket), "{context}");
    assert!(has(guest, "topoext"), "{context}");
    let [eax, ebx, ecx, _] = guest.cpuid(0x8000_001E, 0);
    let found = (
        eax,
        ebx & 0xFF,
        (ebx >> 8 & 0xFF) + 1,
        ecx & 0xFF,
        (ecx >> 8 & 7) + 1,
    );
    assert_eq!(
        found,
        (meant.apic_id, meant.core, topology.threads(), meant.socket, 1),
        "{context}"
    );
}

#[test]
fn topoext_is_missing_where_it_is_removed_or_the_caches_have_no_end() {
    let mut host = host("amd-milan");
    let has_topoext = |host: &Host, inputs: &CpuidInputs| {
        let leaves = cpuid::filter(&host.supported, inputs).unwrap();
        let guest = Guest(&leaves);
        assert!(caches(&guest, 0x8000_001D).len() < 16);
        assert_eq!(has(&guest, "topoext"), guest.cpuid(0x8000_001D, 0) != [0; 4]);
        has(&guest, "topoext")
    };
    let removed = find(&["topoext"]);
    let without = CpuidInputs {
        removed: &removed,
        ..one_cpu()
    };
    assert!(has_topoext(&host, &one_cpu()));
    assert!(!has_topoext(&host, &without));
    // As a KVM reports it that does not know of the leaf's indices: each gives the same cache.
    host.supported
        .retain(|entry| entry.function != 0x8000_001D || entry.index == 0);
    for entry in &mut host.supported {
        if entry.function == 0x8000_001D {
            entry.flags = 0;
        }
    }
    assert!(!has_topoext(&host, &one_cpu()));
}

#[test]
fn there_is_no_cpu_behind_the_last() {
    let topology = Topology::new(2, 2, 1).unwrap();
    assert_eq!(
        cpuid::filter(&host("amd-milan").supported, &inputs(topology, 4)),
        Err(CpuidError::NoSuchCpu { cpu: 4, count: 4 })
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// Features
// ---------------------------------------------------------------------------------------------------------------------

fn one_cpu() -> CpuidInputs<'static> {
    inputs(Topology::new(1, 1, 1).unwrap(), 0)
}

fn has(guest: &Guest, name: &str) -> bool {
    let feature = Feature::find(name).unwrap();
    let register = match feature.register {
        vmm::cpuid::Register::Eax => 0,
        vmm::cpuid::Register::Ebx => 1,
        vmm::cpuid::Register::Ecx => 2,
        vmm::cpuid::Register::Edx => 3,
    };
    guest.cpuid(feature.leaf, feature.index)[register] & 1 << feature.bit != 0
}

fn find(names: &[&str]) -> Vec<Feature> {
    names.iter().map(|name| Feature::find(name).unwrap()).collect()
}

#[test]
fn what_needs_the_vmm_is_hidden_and_what_a_hypervisor_gives_is_shown() {
    for host in hosts() {
        let leaves = cpuid::filter(&host.supported, &one_cpu()).unwrap();
        let guest = Guest(&leaves);
        for name in [
            "vmx",
            "svm",
            "pdcm",
            "waitpkg",
            "amx_tile",
            "amx_bf16",
            "xfd",
            "sgx",
            "intel_pt",
            "arch_lbr",
            "perfctr_core",
        ] {
            assert!(!has(&guest, name), "{name} on {}", host.name);
        }
        for name in [
            "hypervisor",
            "tsc_deadline_timer",
            "x2apic",
            "arat",
            "mtrr",
            "kvm_clock2",
            "lm",
            "nx",
        ] {
            assert!(has(&guest, name), "{name} on {}", host.name);
        }
        assert_eq!(has(&guest, "arch_capabilities"), !host.is_amd);
        for leaf in [
            0xA,
            0x12,
            0x14,
            0x1C,
            0x1D,
            0x1E,
            0x23,
            0x8000_000A,
            0x8000_001B,
            0x8000_001F,
            0x8000_0022,
        ] {
            assert_eq!(guest.cpuid(leaf, 0), [0; 4], "leaf {leaf:#x} on {}", host.name);
        }
    }
}

#[test]
fn nested_virtualisation_is_there_when_asked_for() {
    let nested = CpuidInputs {
        nested: true,
        ..one_cpu()
    };
    let host = host("amd-rome");
    let leaves = cpuid::filter(&host.supported, &nested).unwrap();
    assert!(has(&Guest(&leaves), "svm"));
    assert_ne!(Guest(&leaves).cpuid(0x8000_000A, 0), [0; 4]);
}

#[test]
fn what_needs_a_removed_feature_goes_with_it() {
    let removed = find(&["avx"]);
    let inputs = CpuidInputs {
        removed: &removed,
        ..one_cpu()
    };
    let leaves = cpuid::filter(&host("intel-sapphire-rapids").supported, &inputs).unwrap();
    let guest = Guest(&leaves);
    for name in [
        "avx",
        "avx2",
        "fma",
        "f16c",
        "vaes",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
    ] {
        assert!(!has(&guest, name), "{name}");
    }
    for name in ["xsave", "sse4_2", "aes", "gfni", "pku"] {
        assert!(has(&guest, name), "{name}");
    }
    // XSAVE: x87, SSE and protection keys are left; the area ends behind these.
    assert_eq!(guest.cpuid(0xD, 0)[0], 0x203);
    assert_eq!(guest.cpuid(0xD, 0)[2], 0xA88);
    assert_eq!(guest.cpuid(0xD, 5), [0; 4]);
}

#[test]
fn the_xsave_area_is_as_long_as_its_last_component() {
    let length = |inputs: &CpuidInputs| {
        let leaves = cpuid::filter(&host("intel-sapphire-rapids").supported, inputs).unwrap();
        Guest(&leaves).cpuid(0xD, 0)[2]
    };
    assert_eq!(length(&one_cpu()), 0xA88, "without AMX");
    let added = find(&["amx_int8"]);
    let with_amx = CpuidInputs {
        added: &added,
        ..one_cpu()
    };
    assert_eq!(length(&with_amx), 0x2B00, "with AMX's tiles");
}

#[test]
fn asking_for_amx_gives_what_it_needs() {
    let added = find(&["amx_int8"]);
    let inputs = CpuidInputs {
        added: &added,
        ..one_cpu()
    };
    let leaves = cpuid::filter(&host("intel-sapphire-rapids").supported, &inputs).unwrap();
    let guest = Guest(&leaves);
    for (name, there) in [
        ("amx_int8", true),
        ("amx_tile", true),
        ("xfd", true),
        ("amx_bf16", false),
        ("waitpkg", false),
    ] {
        assert_eq!(has(&guest, name), there, "{name}");
    }
    assert_ne!(guest.cpuid(0x1D, 1), [0; 4]);
}

#[test]
fn features_that_cannot_be_added_are_refused() {
    let try_add = |name: &str| {
        let added = find(&[name]);
        let inputs = CpuidInputs {
            added: &added,
            ..one_cpu()
        };
        cpuid::filter(&host("amd-milan").supported, &inputs)
    };
    assert_eq!(
        try_add("waitpkg"),
        Err(CpuidError::Unsupported { name: "waitpkg" })
    );
    assert_eq!(try_add("sgx"), Err(CpuidError::NotVirtualised { name: "sgx" }));
}

#[test]
fn removing_wins_over_what_the_hypervisor_would_add() {
    let removed = find(&["hypervisor", "tsc_deadline_timer", "kvm_asyncpf"]);
    let inputs = CpuidInputs {
        removed: &removed,
        ..one_cpu()
    };
    let leaves = cpuid::filter(&host("amd-milan").supported, &inputs).unwrap();
    for feature in &removed {
        assert!(!has(&Guest(&leaves), feature.name), "{}", feature.name);
    }
}

#[test]
fn physical_bits_are_the_hosts_or_fewer() {
    let host = host("intel-sapphire-rapids");
    // 52 bits, of which nested paging reaches 46.
    assert_eq!(cpuid::physical_bits(&host.supported), 46);
    let bits = |asked| {
        let inputs = CpuidInputs {
            physical_bits: asked,
            ..one_cpu()
        };
        cpuid::filter(&host.supported, &inputs).map(|leaves| Guest(&leaves).cpuid(0x8000_0008, 0)[0])
    };
    assert_eq!(bits(None), Ok(0x2E_3934));
    assert_eq!(bits(Some(40)), Ok(0x3928));
    assert_eq!(
        bits(Some(47)),
        Err(CpuidError::PhysicalBits { asked: 47, host: 46 })
    );
    assert_eq!(
        bits(Some(31)),
        Err(CpuidError::PhysicalBits { asked: 31, host: 46 })
    );
}

#[test]
fn the_hypervisor_leaves_tell_frequencies_and_hints() {
    let inputs = CpuidInputs {
        tsc_khz: Some(2_450_000),
        dedicated_cpus: true,
        ..one_cpu()
    };
    let leaves = cpuid::filter(&host("amd-milan").supported, &inputs).unwrap();
    let guest = Guest(&leaves);
    let [max, signature @ ..] = guest.cpuid(0x4000_0000, 0);
    let signature: Vec<u8> = signature
        .iter()
        .flat_map(|register| register.to_le_bytes())
        .collect();
    assert_eq!(
        (max, signature.as_slice()),
        (0x4000_0010, b"KVMKVMKVM\0\0\0".as_slice())
    );
    assert_eq!(guest.cpuid(0x4000_0001, 0)[3], 1);
    assert_eq!(guest.cpuid(0x4000_0010, 0), [2_450_000, 1_000_000, 0, 0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Whatever a host says
// ---------------------------------------------------------------------------------------------------------------------

fn any_entry() -> impl Strategy<Value = kvm_cpuid_entry2> {
    let function = prop_oneof![
        0u32..0x24,
        0x4000_0000u32..0x4000_0002,
        0x8000_0000u32..0x8000_0027
    ];
    (function, 0u32..20, 0u32..2, any::<[u32; 4]>()).prop_map(
        |(function, index, flags, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index: if flags == 1 { index } else { 0 },
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        },
    )
}

proptest! {
    #[test]
    fn any_host_gives_leaves_that_can_be_read_to_the_end(
        supported in proptest::collection::vec(any_entry(), 0..120),
        amd: bool,
        nested: bool,
        sockets in 1u32..5, cores in 1u32..5, threads in 1u32..4,
    ) {
        let mut supported = supported;
        if amd {
            supported.retain(|entry| entry.function != 0);
            supported.insert(0, host("amd-milan").supported[0]);
        }
        let topology = Topology::new(sockets, cores, threads).unwrap();
        let cpu = topology.cpu_count() - 1;
        let inputs = CpuidInputs { nested, ..inputs(topology, cpu) };
        let leaves = cpuid::filter(&supported, &inputs).unwrap();
        let guest = Guest(&leaves);
        let found = by_extended_leaf(&guest, 0xB).unwrap();
        prop_assert_eq!(found.apic_id, topology.apic_id(cpu));
        let list = caches(&guest, if amd { 0x8000_001D } else { 4 });
        prop_assert!(list.len() < 16);
        let mut keys: Vec<_> = leaves.iter().map(|entry| (entry.function, entry.index)).collect();
        keys.dedup();
        prop_assert_eq!(keys.len(), leaves.len(), "each leaf once, in order");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn leaves_are_as_the_golden_files_have_them() {
    for host in hosts() {
        let inputs = CpuidInputs {
            tsc_khz: Some(2_000_000),
            ..inputs(Topology::new(2, 3, 2).unwrap(), 9)
        };
        let mut actual = String::from("# CPU 9 of 2 sockets with 3 cores with 2 threads\n");
        for entry in cpuid::filter(&host.supported, &inputs).unwrap() {
            let kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..
            } = entry;
            writeln!(
                actual,
                "{function:08x} {index:02x} {flags} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"
            )
            .unwrap();
        }
        let path = directory("golden").join(format!("cpuid-{}.txt", host.name));
        if std::env::var_os("GOLDEN").is_some_and(|value| value == "update") {
            fs::write(&path, &actual).unwrap();
        }
        let expected = fs::read_to_string(&path).unwrap();
        assert!(
            expected == actual,
            "{} differs from what is made now; if that is meant, GOLDEN=update writes it anew:\n{actual}",
            path.display()
        );
    }
}
