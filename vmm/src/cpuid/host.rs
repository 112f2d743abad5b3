//! What this host offers: KVM's list of leaves, and the name of the CPU, which KVM leaves out.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::leaves::Leaves;

const EXTENDED_MAX: u32 = 0x8000_0000;
/// Leaves of the brand string, 16 characters each.
const BRAND: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];

/// The CPUID leaves that KVM supports on this host, with the host's brand string: the start for [`super::filter`].
///
/// # Errors
/// KVM does not give them.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let list = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    Ok(with_brand(list.as_slice(), brand()))
}

/// `supported` with `brand`, if it has none itself.
fn with_brand(supported: &[kvm_cpuid_entry2], brand: Option<[[u32; 4]; 3]>) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = Leaves::new(supported);
    let has_brand = BRAND.iter().any(|&function| leaves.get(function).eax != 0);
    let reaches = leaves.get(EXTENDED_MAX).eax >= BRAND[2];
    if let Some(brand) = brand.filter(|_| reaches && !has_brand) {
        for (function, registers) in BRAND.into_iter().zip(brand) {
            let leaf = leaves.leaf(function);
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = registers;
        }
    }
    leaves.into_entries()
}

/// The brand string of the CPU that this runs on.
fn brand() -> Option<[[u32; 4]; 3]> {
    let has_brand = __cpuid(EXTENDED_MAX).eax >= BRAND[2];
    has_brand.then(|| {
        BRAND
            .map(__cpuid)
            .map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
    })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::CpuId;

    use super::*;
    use crate::cpuid::{
        CpuidInputs, Topology, filter,
        msrs::{self, index},
    };

    #[test]
    fn the_brand_is_kvms_or_else_the_hosts() {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let eax = |leaves: &[kvm_cpuid_entry2]| {
            let eax = |function| {
                leaves
                    .iter()
                    .find(|leaf| leaf.function == function)
                    .map(|leaf| leaf.eax)
            };
            BRAND.map(eax)
        };
        let max = leaf(EXTENDED_MAX, 0x8000_0008);
        let host = Some([[1; 4], [2; 4], [3; 4]]);
        assert_eq!(eax(&with_brand(&[max], host)), [Some(1), Some(2), Some(3)]);
        assert_eq!(eax(&with_brand(&[max], None)), [None; 3]);
        let of_kvm = BRAND.map(|function| leaf(function, 7));
        assert_eq!(
            eax(&with_brand(&[&[max], &of_kvm[..]].concat(), host)),
            [Some(7); 3]
        );
        assert_eq!(
            eax(&with_brand(&[leaf(EXTENDED_MAX, 0x8000_0001)], host)),
            [None; 3]
        );
    }

    /// On this host's own KVM; without /dev/kvm there is nothing to test.
    #[test]
    fn kvm_takes_cpuid_and_msrs_and_gives_them_back() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("there is no /dev/kvm here: nothing is tested");
            return;
        };
        let supported = supported(&kvm).unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let topology = Topology::new(2, 3, 1).unwrap();
        for cpu in 0..topology.cpu_count() {
            let apic_id = topology.apic_id(cpu);
            let vcpu = vm.create_vcpu(apic_id.into()).unwrap();
            let inputs = CpuidInputs {
                topology,
                cpu,
                removed: &[],
                added: &[],
                nested: false,
                physical_bits: None,
                tsc_deadline: true,
                tsc_khz: vcpu.get_tsc_khz().ok(),
                dedicated_cpus: false,
            };
            let leaves = CpuId::from_entries(&filter(&supported, &inputs).unwrap()).unwrap();
            vcpu.set_cpuid2(&leaves).unwrap();
            assert!(msrs::write_all(&vcpu, &msrs::initial()).unwrap().is_empty());

            let leaves = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
            let leaf = |function, index| {
                let same = |leaf: &&kvm_cpuid_entry2| leaf.function == function && leaf.index == index;
                leaves.as_slice().iter().find(same).copied().unwrap()
            };
            assert_eq!(leaf(0xB, 0).edx, apic_id);
            assert_eq!(leaf(1, 0).ebx >> 24, apic_id);

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

            // Whatever KVM lists can be read, and nearly all of it written back as it is.
            let list = kvm.get_msr_index_list().unwrap();
            let mut all = msrs::read_all(&vcpu, list.as_slice()).unwrap();
            assert!(all.len() > 20, "{}", all.len());
            msrs::order_for_restore(&mut all);
            let refused = msrs::write_all(&vcpu, &all).unwrap();
            assert!(refused.len() < all.len() / 4, "{refused:x?}");
        }
    }
}
