//! The guest's processors: what the configuration asks for, made of what this host and its KVM have.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd};

use super::MachineError;
use crate::boot::registers;
use crate::config::CpuConfig;
use crate::cpuid::features::Feature;
use crate::cpuid::{self, CpuidInputs, Topology, msrs};
use crate::vm::{KvmError, Vm, call};

/// How the vCPUs of a machine look to the guest.
#[derive(Debug)]
pub(super) struct Processors {
    supported: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    apic_ids: Vec<u32>,
    removed: Vec<Feature>,
    nested: bool,
    tsc_deadline: bool,
    dedicated_cpus: bool,
}

fn description(error: impl std::error::Error + Send + Sync + 'static) -> MachineError {
    MachineError::Description(Box::new(error))
}

impl Processors {
    /// Asks KVM what it can do, and plans the vCPUs.
    pub(super) fn new(vm: &Vm, config: &CpuConfig) -> Result<Self, MachineError> {
        let kvm = vm.kvm();
        let supported = cpuid::supported(kvm).map_err(call("list the features of its vCPUs"))?;
        let topology = Topology::new(config.sockets.into(), config.cores.into(), config.threads.into())
            .map_err(description)?;
        let removed = config
            .features
            .remove
            .iter()
            .map(|name| Feature::find(name))
            .collect::<Result<_, _>>()
            .map_err(description)?;
        let alone = |cpus: &crate::config::HostCpus| {
            let mine: Vec<u16> = cpus.iter().collect();
            let others = config
                .affinity
                .iter()
                .filter(|other| other.iter().any(|cpu| mine.contains(&cpu)));
            mine.len() == 1 && others.count() == 1
        };
        Ok(Processors {
            supported,
            apic_ids: topology.apic_ids(),
            topology,
            removed,
            nested: config.nested,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            dedicated_cpus: !config.affinity.is_empty() && config.affinity.iter().all(alone),
        })
    }

    /// Width of guest physical addresses.
    pub(super) fn physical_bits(&self) -> u8 {
        cpuid::physical_bits(&self.supported)
    }

    /// Local APIC ids, by index of the vCPU.
    pub(super) fn apic_ids(&self) -> &[u32] {
        &self.apic_ids
    }

    /// Creates vCPU `index`: CPUID first, then MSRs, which depend on it, then the floating-point state.
    pub(super) fn create(&self, vm: &Vm, index: u8) -> Result<VcpuFd, MachineError> {
        let apic_id = self
            .apic_ids
            .get(usize::from(index))
            .copied()
            .unwrap_or_else(|| index.into());
        let vcpu = vm.create_vcpu(apic_id)?;
        let leaves = cpuid::filter(
            &self.supported,
            &CpuidInputs {
                topology: self.topology,
                cpu: index.into(),
                removed: &self.removed,
                added: &[],
                nested: self.nested,
                physical_bits: None,
                tsc_deadline: self.tsc_deadline,
                tsc_khz: vcpu.get_tsc_khz().ok(),
                dedicated_cpus: self.dedicated_cpus,
            },
        )
        .map_err(description)?;
        let leaves = CpuId::from_entries(&leaves)
            .map_err(|_| MachineError::Kvm(KvmError::Missing("room for all CPUID leaves")))?;
        vcpu.set_cpuid2(&leaves)
            .map_err(call("set the features of a vCPU"))?;
        let refused = msrs::write_all(&vcpu, &msrs::initial()).map_err(description)?;
        if !refused.is_empty() {
            tracing::debug!(?refused, "KVM does not take some initial MSRs");
        }
        registers::set_up_fpu(&vcpu)?;
        Ok(vcpu)
    }
}
