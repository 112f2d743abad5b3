//! The CPU features that can be shown and hidden by name: a table of where CPUID has them.
//!
//! Names are those of `/proc/cpuinfo` where Linux shows the feature there. A user may write `-` for `_`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::leaves::{
    Leaves,
    Register::{self, Eax, Ebx, Ecx, Edx},
};

/// A CPU feature: one bit of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Feature {
    /// Its name, for example `avx512f`.
    pub name: &'static str,
    /// CPUID leaf.
    pub leaf: u32,
    /// Index within the leaf.
    pub index: u32,
    /// Register of the answer.
    pub register: Register,
    /// Bit of the register.
    pub bit: u8,
}

/// No feature has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU feature {name:?}{}", suggestion(.near))]
pub struct UnknownFeature {
    /// What was asked for.
    pub name: String,
    /// Names that are like it, best first; may be empty.
    pub near: Vec<&'static str>,
}

fn suggestion(near: &[&str]) -> String {
    match near {
        [] => "; names are as in the flags of /proc/cpuinfo".to_owned(),
        near => format!("; near it are {}", near.join(", ")),
    }
}

impl Feature {
    /// The feature called `name`.
    ///
    /// # Errors
    /// There is none; the error knows similar names.
    pub fn find(name: &str) -> Result<Self, UnknownFeature> {
        let wanted = name.to_lowercase().replace('-', "_");
        BY_NAME
            .get(wanted.as_str())
            .copied()
            .ok_or_else(|| UnknownFeature {
                name: name.to_owned(),
                near: near(&wanted),
            })
    }

    /// All features that have a name, by leaf and bit.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().flat_map(|&(leaf, index, register, bits)| {
            bits.iter().map(move |&(bit, name)| Self {
                name,
                leaf,
                index,
                register,
                bit,
            })
        })
    }

    /// Whether `leaves` have it.
    pub(super) fn is_in(self, leaves: &Leaves) -> bool {
        leaves.register(self.leaf, self.index, self.register) & (1 << self.bit) != 0
    }

    /// Takes it out of `leaves`.
    pub(super) fn hide_in(self, leaves: &mut Leaves) {
        if let Some(register) = leaves.register_mut(self.leaf, self.index, self.register) {
            *register &= !(1 << self.bit);
        }
    }
}

/// Takes `hidden` out of `leaves`, and everything that cannot be without it.
pub(super) fn hide(leaves: &mut Leaves, hidden: impl Iterator<Item = &'static str>) {
    let mut pending: Vec<_> = hidden.collect();
    let mut done = Vec::new();
    while let Some(name) = pending.pop() {
        if done.contains(&name) {
            continue;
        }
        done.push(name);
        if let Some(feature) = BY_NAME.get(name) {
            feature.hide_in(leaves);
        }
        let dependent = DEPENDENCIES.iter().filter(|(base, _)| *base == name);
        pending.extend(dependent.flat_map(|(_, dependent)| dependent.iter()));
    }
}

/// `asked` and everything that it cannot be without.
pub(super) fn with_bases(asked: &[Feature]) -> Vec<&'static str> {
    let mut all: Vec<&'static str> = asked.iter().map(|feature| feature.name).collect();
    let mut next = 0;
    while let Some(&name) = all.get(next) {
        for (base, dependent) in DEPENDENCIES {
            if dependent.contains(&name) && !all.contains(base) {
                all.push(base);
            }
        }
        next += 1;
    }
    all
}

/// Whether `leaves` have the feature called `name`, which is in the table.
pub(super) fn has(leaves: &Leaves, name: &str) -> bool {
    BY_NAME.get(name).is_some_and(|feature| feature.is_in(leaves))
}

/// Names like `wanted`, best first: those that begin with it, then those that contain it, are contained in it, or are a
/// few typing errors away.
fn near(wanted: &str) -> Vec<&'static str> {
    const COUNT: usize = 4;
    let mut rated: Vec<(bool, usize, &'static str)> = Feature::all()
        .filter_map(|feature| {
            let name = feature.name;
            let part =
                wanted.len() >= 3 && (name.contains(wanted) || (name.len() >= 3 && wanted.contains(name)));
            let distance = edit_distance(wanted, name);
            (part || distance <= 1 + wanted.len() / 4).then_some((!name.starts_with(wanted), distance, name))
        })
        .collect();
    rated.sort_unstable();
    rated.into_iter().map(|(.., name)| name).take(COUNT).collect()
}

/// Insertions, deletions and replacements of a character that lead from `from` to `to`.
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (line, have) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, want) in to.chars().enumerate() {
            let replaced = diagonal + usize::from(have != want);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}

/// Features that a guest gets only when it is asked for them: they cost much (the 8 KiB of AMX state in every context
/// switch; WAITPKG, which lets a guest wait without the host knowing), or need help from the VMM that it does not give
/// (performance counters, SGX memory, memory encryption).
pub(super) const HIDDEN_UNLESS_ASKED: &[&str] = &[
    "waitpkg",
    "amx_bf16",
    "amx_tile",
    "amx_int8",
    "amx_fp16",
    "amx_complex",
    "xfd",
];

/// Features that no guest gets, because they need help from the VMM that it does not give.
pub(super) const NEVER_SHOWN: &[&str] = &[
    "pdcm",
    "ds_cpl",
    "dtes64",
    "dts",
    "arch_lbr",
    "intel_pt",
    "perfctr_core",
    "perfctr_nb",
    "perfctr_llc",
    "ibs",
    "bpext",
    "lwp",
    "sgx",
    "sgx_lc",
    "sme",
    "sev",
    "sev_es",
    "sev_snp",
];

/// Features of nested virtualisation.
pub(super) const NESTED: &[&str] = &["vmx", "svm"];

/// What cannot be without a feature: (base, those that need it).
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("fxsr", &["sse", "fxsr_opt"]),
    ("sse", &["sse2"]),
    (
        "sse2",
        &[
            "pni",
            "aes",
            "pclmulqdq",
            "sha_ni",
            "gfni",
            "sse4a",
            "misalignsse",
            "xsave",
        ],
    ),
    ("pni", &["ssse3"]),
    ("ssse3", &["sse4_1"]),
    ("sse4_1", &["sse4_2"]),
    (
        "xsave",
        &[
            "xsaveopt", "xsavec", "xgetbv1", "xsaves", "avx", "mpx", "pku", "amx_tile", "lwp", "shstk", "ibt",
        ],
    ),
    ("xsavec", &["xsaves"]),
    ("xsaves", &["xfd"]),
    ("xfd", &["amx_tile"]),
    (
        "avx",
        &[
            "avx2",
            "fma",
            "f16c",
            "fma4",
            "xop",
            "vaes",
            "vpclmulqdq",
            "avx_vnni",
            "avx_ifma",
            "avx_vnni_int8",
            "avx_vnni_int16",
            "avx_ne_convert",
        ],
    ),
    ("avx2", &["avx512f"]),
    (
        "avx512f",
        &[
            "avx512dq",
            "avx512ifma",
            "avx512pf",
            "avx512er",
            "avx512cd",
            "avx512bw",
            "avx512vl",
            "avx512_vbmi",
            "avx512_vbmi2",
            "avx512_vnni",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "avx512_4vnniw",
            "avx512_4fmaps",
            "avx512_vp2intersect",
            "avx512_bf16",
            "avx512_fp16",
        ],
    ),
    (
        "avx512bw",
        &["avx512_vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_fp16"],
    ),
    ("avx512vl", &["avx512_bf16", "avx512_fp16"]),
    ("amx_tile", &["amx_bf16", "amx_int8", "amx_fp16", "amx_complex"]),
    ("apic", &["x2apic", "tsc_deadline_timer", "extapic"]),
    ("tsc", &["tsc_deadline_timer", "tsc_adjust", "rdtscp", "invtsc"]),
    ("pcid", &["invpcid"]),
    ("lm", &["lahf_lm", "la57"]),
    ("sgx", &["sgx_lc"]),
    ("rtm", &["tsxldtrk"]),
    ("mmx", &["mmxext", "3dnow", "3dnowext"]),
];

/// Parts of the XSAVE area: (bit of XCR0 or IA32_XSS, feature whose state it is).
pub(super) const XSAVE_COMPONENTS: &[(u32, &str)] = &[
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (8, "intel_pt"),
    (9, "pku"),
    (11, "shstk"),
    (12, "shstk"),
    (15, "arch_lbr"),
    (17, "amx_tile"),
    (18, "amx_tile"),
];

/// The table by name.
static BY_NAME: LazyLock<BTreeMap<&'static str, Feature>> =
    LazyLock::new(|| Feature::all().map(|feature| (feature.name, feature)).collect());

/// Leaf, index, register, and the bits that have names there (Intel SDM volume 2A CPUID; AMD APM volume 3 appendix E;
/// Linux Documentation/virt/kvm/x86/cpuid.rst).
type Row = (u32, u32, Register, &'static [(u8, &'static str)]);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    (0x1, 0, Ecx, &[
        (0, "pni"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds_cpl"), (5, "vmx"), (9, "ssse3"), (12, "fma"),
        (13, "cx16"), (15, "pdcm"), (17, "pcid"), (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (22, "movbe"),
        (23, "popcnt"), (24, "tsc_deadline_timer"), (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"),
        (30, "rdrand"), (31, "hypervisor"),
    ]),
    (0x1, 0, Edx, &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (19, "clflush"), (21, "dts"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"), (28, "ht"),
    ]),
    (0x6, 0, Eax, &[(2, "arat")]),
    (0x7, 0, Ebx, &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (7, "smep"), (8, "bmi2"),
        (9, "erms"), (10, "invpcid"), (11, "rtm"), (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"),
        (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (25, "intel_pt"),
        (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha_ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (0x7, 0, Ecx, &[
        (1, "avx512_vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512_vbmi2"), (7, "shstk"), (8, "gfni"),
        (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"), (14, "avx512_vpopcntdq"),
        (16, "la57"), (22, "rdpid"), (24, "bus_lock_detect"), (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"),
        (30, "sgx_lc"), (31, "pks"),
    ]),
    (0x7, 0, Edx, &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (8, "avx512_vp2intersect"), (10, "md_clear"),
        (14, "serialize"), (16, "tsxldtrk"), (19, "arch_lbr"), (20, "ibt"), (22, "amx_bf16"), (23, "avx512_fp16"),
        (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"), (27, "intel_stibp"), (28, "flush_l1d"),
        (29, "arch_capabilities"), (30, "core_capabilities"), (31, "spec_ctrl_ssbd"),
    ]),
    (0x7, 1, Eax, &[
        (4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (10, "fzrm"), (11, "fsrs"), (12, "fsrc"), (17, "fred"),
        (18, "lkgs"), (19, "wrmsrns"), (21, "amx_fp16"), (23, "avx_ifma"), (26, "lam"),
    ]),
    (0x7, 1, Edx, &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (8, "amx_complex"), (10, "avx_vnni_int16"), (14, "prefetchi"),
    ]),
    (0xD, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (0x4000_0001, 0, Eax, &[
        (0, "kvm_clock"), (1, "kvm_nop_io_delay"), (3, "kvm_clock2"), (4, "kvm_asyncpf"), (5, "kvm_steal_time"),
        (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (10, "kvm_asyncpf_vmexit"),
        (11, "kvm_pv_send_ipi"), (12, "kvm_poll_control"), (13, "kvm_pv_sched_yield"), (14, "kvm_asyncpf_int"),
        (15, "kvm_msi_ext_dest_id"), (16, "kvm_hc_map_gpa_range"), (17, "kvm_migration_control"),
        (24, "kvm_clock_stable"),
    ]),
    (0x8000_0001, 0, Ecx, &[
        (0, "lahf_lm"), (1, "cmp_legacy"), (2, "svm"), (3, "extapic"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"),
        (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"), (11, "xop"), (12, "skinit"), (13, "wdt"),
        (15, "lwp"), (16, "fma4"), (21, "tbm"), (22, "topoext"), (23, "perfctr_core"), (24, "perfctr_nb"),
        (26, "bpext"), (28, "perfctr_llc"), (29, "mwaitx"),
    ]),
    (0x8000_0001, 0, Edx, &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"),
        (30, "3dnowext"), (31, "3dnow"),
    ]),
    (0x8000_0007, 0, Edx, &[(8, "invtsc")]),
    (0x8000_0008, 0, Ebx, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"), (12, "amd_ibpb"),
        (14, "amd_ibrs"), (15, "amd_stibp"), (17, "amd_stibp_always_on"), (24, "amd_ssbd"), (25, "virt_ssbd"),
        (26, "amd_ssb_no"), (28, "amd_psfd"), (29, "btc_no"), (30, "amd_ibpb_ret"),
    ]),
    (0x8000_001F, 0, Eax, &[(0, "sme"), (1, "sev"), (3, "sev_es"), (4, "sev_snp")]),
    (0x8000_0021, 0, Eax, &[
        (0, "no_nested_data_bp"), (2, "lfence_rdtsc"), (6, "null_sel_clr_base"), (8, "autoibrs"),
    ]),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_and_every_bit_is_in_the_table_once() {
        let mut names = HashSet::new();
        let mut bits = HashSet::new();
        for feature in Feature::all() {
            assert!(names.insert(feature.name), "{} is there twice", feature.name);
            assert!(
                bits.insert((feature.leaf, feature.index, feature.register, feature.bit)),
                "{} has the bit of another",
                feature.name
            );
            assert!(feature.bit < 32);
        }
    }

    #[test]
    fn every_name_in_the_rules_is_in_the_table() {
        let dependent = DEPENDENCIES
            .iter()
            .flat_map(|(base, dependent)| dependent.iter().chain([base]));
        let components = XSAVE_COMPONENTS.iter().map(|(_, name)| name);
        for name in [HIDDEN_UNLESS_ASKED, NEVER_SHOWN, NESTED]
            .into_iter()
            .flatten()
            .chain(dependent)
            .chain(components)
        {
            assert_eq!(Feature::find(name).map(|feature| feature.name), Ok(*name));
        }
    }

    #[test]
    fn a_feature_is_found_however_it_is_written() {
        for name in ["amx_tile", "amx-tile", "AMX-TILE"] {
            let feature = Feature::find(name).unwrap();
            assert_eq!(
                (feature.leaf, feature.index, feature.register, feature.bit),
                (7, 0, Edx, 24)
            );
        }
    }

    #[test]
    fn a_wrong_name_gets_the_near_ones() {
        let near = |name| Feature::find(name).unwrap_err().near;
        assert!(
            near("avx512").iter().all(|near| near.starts_with("avx512")),
            "{:?}",
            near("avx512")
        );
        assert_eq!(near("avx512fp")[0], "avx512f");
        assert_eq!(near("sse4.1")[0], "sse4_1");
        assert_eq!(near("rdrnd")[0], "rdrand");
    }

    #[test]
    fn a_name_like_nothing_gets_a_hint() {
        assert_eq!(
            Feature::find("quantum").unwrap_err().to_string(),
            "there is no CPU feature \"quantum\"; names are as in the flags of /proc/cpuinfo"
        );
    }
}
