//! A machine's processors, from its configuration to vCPUs that are set up.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use super::features::{Feature, UnknownFeature};
use super::{CpuidError, CpuidInputs, Topology, TopologyError, filter, msrs, physical_bits};
use crate::config::CpuConfig;

/// Why a machine cannot have the processors that its configuration asks for.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// The counts do not make a topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A feature to remove does not exist.
    #[error("cpus.features.remove: {0}")]
    Feature(#[from] UnknownFeature),
    /// CPUID cannot be made as asked for.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// KVM does not take the CPUID.
    #[error("cannot set the {count} CPUID leaves of CPU {cpu}")]
    SetCpuid {
        /// Index of the vCPU.
        cpu: u8,
        /// Number of leaves.
        count: usize,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take the registers.
    #[error("cannot set up the registers of CPU {cpu}")]
    Msrs {
        /// Index of the vCPU.
        cpu: u8,
        /// The cause.
        source: msrs::MsrError,
    },
    /// KVM does not let one register have its first value.
    #[error("KVM refuses the first value of MSR {index:#x} of CPU {cpu}")]
    Msr {
        /// Index of the vCPU.
        cpu: u8,
        /// Index of the register.
        index: u32,
    },
}

/// All processors of a machine.
#[derive(Debug)]
pub struct Processors {
    supported: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    apic_ids: Vec<u32>,
    removed: Vec<Feature>,
    nested: bool,
    brand: Option<[u8; 48]>,
}

impl Processors {
    /// The processors that `config` asks for, on a host whose KVM supports the CPUID leaves `supported`.
    ///
    /// # Errors
    /// The topology or the name of a feature is wrong.
    pub fn new(supported: &[kvm_cpuid_entry2], config: &CpuConfig) -> Result<Self, ProcessorError> {
        let topology = Topology::new(config.sockets.into(), config.cores.into(), config.threads.into())?;
        let removed = config
            .features
            .remove
            .iter()
            .map(|name| Feature::find(name))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            supported: supported.to_vec(),
            topology,
            apic_ids: topology.apic_ids(),
            removed,
            nested: config.nested,
            brand: host_brand(),
        })
    }

    /// How they are grouped.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The local APIC id of each vCPU, for ACPI.
    pub fn apic_ids(&self) -> &[u32] {
        &self.apic_ids
    }

    /// Width of guest physical addresses, for [`crate::layout::mmio64_window`].
    pub fn physical_bits(&self) -> u8 {
        physical_bits(&self.supported)
    }

    /// The CPUID leaves of vCPU `cpu`, whose time-stamp counter has `tsc_khz`, if that is known.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn cpuid(&self, cpu: u8, tsc_khz: Option<u32>) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
        filter(
            &self.supported,
            &CpuidInputs {
                topology: self.topology,
                cpu: cpu.into(),
                removed: &self.removed,
                added: &[],
                nested: self.nested,
                physical_bits: None,
                // Part of KVM's in-kernel local APIC, without which a vCPU is not created, since Linux 3.3.
                tsc_deadline: true,
                tsc_khz,
                brand: self.brand,
                dedicated_cpus: false,
            },
        )
    }

    /// Gives a new vCPU its CPUID, then its first MSRs. The order matters: KVM has only the MSRs that CPUID announces.
    ///
    /// # Errors
    /// There is no such vCPU, or KVM refuses.
    pub fn set_up(&self, vcpu: &VcpuFd, cpu: u8) -> Result<(), ProcessorError> {
        // Not all KVMs know the frequency.
        let leaves = self.cpuid(cpu, vcpu.get_tsc_khz().ok())?;
        let count = leaves.len();
        let failed = |source| ProcessorError::SetCpuid { cpu, count, source };
        let leaves = CpuId::from_entries(&leaves).map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&leaves).map_err(failed)?;
        let refused =
            msrs::write_all(vcpu, &msrs::initial()).map_err(|source| ProcessorError::Msrs { cpu, source })?;
        match refused.first() {
            Some(&index) => Err(ProcessorError::Msr { cpu, index }),
            None => Ok(()),
        }
    }
}

/// The brand string of the CPU that this runs on.
fn host_brand() -> Option<[u8; 48]> {
    const EXTENDED_MAX: u32 = 0x8000_0000;
    const BRAND: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
    if __cpuid(EXTENDED_MAX).eax < BRAND[2] {
        return None;
    }
    let registers = BRAND
        .map(__cpuid)
        .map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    let mut brand = [0; 48];
    for (characters, register) in brand.chunks_mut(4).zip(registers.as_flattened()) {
        characters.copy_from_slice(&register.to_le_bytes());
    }
    Some(brand)
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::cpuid::msrs::index;

    fn config(count: u8) -> CpuConfig {
        CpuConfig {
            count,
            cores: count,
            ..CpuConfig::default()
        }
    }

    #[test]
    fn an_unknown_feature_is_named_with_its_place_and_its_neighbours() {
        let mut config = config(1);
        config.features.remove = vec!["avx2".into(), "avx512_vbmi3".into()];
        let error = Processors::new(&[], &config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cpus.features.remove: there is no CPU feature \"avx512_vbmi3\"; near it are avx512_vbmi, avx512_vbmi2, \
             avx512_vnni, avx512_4vnniw"
        );
    }

    /// On this host's own KVM; without /dev/kvm there is nothing to test.
    #[test]
    fn kvm_takes_the_processors_and_gives_them_back() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("there is no /dev/kvm here: nothing is tested");
            return;
        };
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let processors = Processors::new(supported.as_slice(), &config(3)).unwrap();
        for cpu in 0..3u8 {
            let vcpu = vm.create_vcpu(cpu.into()).unwrap();
            processors.set_up(&vcpu, cpu).unwrap();

            let leaves = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
            let leaf = |function, index| {
                let same = |leaf: &&kvm_cpuid_entry2| leaf.function == function && leaf.index == index;
                leaves.as_slice().iter().find(same).copied().unwrap()
            };
            assert_eq!(leaf(0xB, 0).edx, u32::from(cpu));
            assert_eq!(leaf(1, 0).ebx >> 16, u32::from(cpu) << 8 | 3);

            let wanted = [index::MTRR_DEF_TYPE, 0xDEAD_BEEF, index::MISC_ENABLE];
            let values: Vec<_> = msrs::read_all(&vcpu, &wanted)
                .unwrap()
                .iter()
                .map(|entry| (entry.index, entry.data))
                .collect();
            assert_eq!(values[0], (index::MTRR_DEF_TYPE, 0x806));
            assert_eq!(
                values[1].0,
                index::MISC_ENABLE,
                "the register that is not there is left out"
            );
            assert_eq!(values[1].1 & 1, 1, "fast strings");

            // Whatever KVM lists can be read, and written back as it is.
            let list = kvm.get_msr_index_list().unwrap();
            let mut all = msrs::read_all(&vcpu, list.as_slice()).unwrap();
            assert!(all.len() > 20, "{}", all.len());
            msrs::order_for_restore(&mut all);
            let refused = msrs::write_all(&vcpu, &all).unwrap();
            println!("{} MSRs, of which KVM does not take back {refused:x?}", all.len());
            assert!(refused.len() < all.len() / 4, "{refused:x?}");
        }
    }
}
