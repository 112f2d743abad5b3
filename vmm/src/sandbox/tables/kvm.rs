//! Requests to KVM, by number (linux/kvm.h).

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_enable_cap, kvm_fpu, kvm_ioeventfd, kvm_irq_routing, kvm_irqchip,
    kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_pit_config, kvm_regs,
    kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
};

use crate::sandbox::rules::{Rule, io, ioctl, ior, iow, iowr};

const KVM: u8 = 0xae;

/// What vCPU threads ask: they run the guest, and carry out what its drivers program.
#[rustfmt::skip]
pub(in crate::sandbox) const RUN: &[Rule] = &[
    ioctl(io(KVM, 0x80), "KVM_RUN"),
    ioctl(ior::<kvm_regs>(KVM, 0x81), "KVM_GET_REGS: where a guest failed"),
    ioctl(iow::<kvm_irq_routing>(KVM, 0x6a), "KVM_SET_GSI_ROUTING: the guest programs MSI-X"),
    ioctl(iow::<kvm_irqfd>(KVM, 0x76), "KVM_IRQFD: a queue gets its vector"),
    ioctl(iow::<kvm_ioeventfd>(KVM, 0x79), "KVM_IOEVENTFD: a BAR or queue comes and goes"),
    ioctl(iow::<kvm_msi>(KVM, 0xa5), "KVM_SIGNAL_MSI: an interrupt without a route"),
];

/// What it takes to build a machine, at start and at each reboot.
#[rustfmt::skip]
pub(in crate::sandbox) const BUILD: &[Rule] = &[
    // On /dev/kvm, which stays open.
    ioctl(io(KVM, 0x00), "KVM_GET_API_VERSION"),
    ioctl(io(KVM, 0x01), "KVM_CREATE_VM"),
    ioctl(iowr::<kvm_msr_list>(KVM, 0x02), "KVM_GET_MSR_INDEX_LIST"),
    ioctl(io(KVM, 0x03), "KVM_CHECK_EXTENSION"),
    ioctl(io(KVM, 0x04), "KVM_GET_VCPU_MMAP_SIZE"),
    ioctl(iowr::<kvm_cpuid2>(KVM, 0x05), "KVM_GET_SUPPORTED_CPUID"),
    ioctl(iowr::<kvm_msr_list>(KVM, 0x0a), "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    // On a machine.
    ioctl(io(KVM, 0x41), "KVM_CREATE_VCPU"),
    ioctl(iow::<kvm_userspace_memory_region>(KVM, 0x46), "KVM_SET_USER_MEMORY_REGION"),
    ioctl(io(KVM, 0x47), "KVM_SET_TSS_ADDR"),
    ioctl(iow::<u64>(KVM, 0x48), "KVM_SET_IDENTITY_MAP_ADDR"),
    ioctl(io(KVM, 0x60), "KVM_CREATE_IRQCHIP"),
    ioctl(iowr::<kvm_irqchip>(KVM, 0x62), "KVM_GET_IRQCHIP: the PICs are masked"),
    ioctl(ior::<kvm_irqchip>(KVM, 0x63), "KVM_SET_IRQCHIP"),
    ioctl(iow::<kvm_pit_config>(KVM, 0x77), "KVM_CREATE_PIT2"),
    ioctl(iow::<kvm_clock_data>(KVM, 0x7b), "KVM_SET_CLOCK"),
    ioctl(ior::<kvm_clock_data>(KVM, 0x7c), "KVM_GET_CLOCK"),
    ioctl(iow::<kvm_enable_cap>(KVM, 0xa3), "KVM_ENABLE_CAP"),
    // On a vCPU.
    ioctl(iow::<kvm_regs>(KVM, 0x82), "KVM_SET_REGS"),
    ioctl(ior::<kvm_sregs>(KVM, 0x83), "KVM_GET_SREGS"),
    ioctl(iow::<kvm_sregs>(KVM, 0x84), "KVM_SET_SREGS"),
    ioctl(iowr::<kvm_msrs>(KVM, 0x88), "KVM_GET_MSRS"),
    ioctl(iow::<kvm_msrs>(KVM, 0x89), "KVM_SET_MSRS"),
    ioctl(ior::<kvm_fpu>(KVM, 0x8c), "KVM_GET_FPU"),
    ioctl(iow::<kvm_fpu>(KVM, 0x8d), "KVM_SET_FPU"),
    ioctl(ior::<kvm_lapic_state>(KVM, 0x8e), "KVM_GET_LAPIC"),
    ioctl(iow::<kvm_lapic_state>(KVM, 0x8f), "KVM_SET_LAPIC"),
    ioctl(iow::<kvm_cpuid2>(KVM, 0x90), "KVM_SET_CPUID2"),
    ioctl(ior::<kvm_mp_state>(KVM, 0x98), "KVM_GET_MP_STATE"),
    ioctl(iow::<kvm_mp_state>(KVM, 0x99), "KVM_SET_MP_STATE"),
    ioctl(ior::<kvm_vcpu_events>(KVM, 0x9f), "KVM_GET_VCPU_EVENTS"),
    ioctl(iow::<kvm_vcpu_events>(KVM, 0xa0), "KVM_SET_VCPU_EVENTS"),
    ioctl(io(KVM, 0xa2), "KVM_SET_TSC_KHZ"),
    ioctl(io(KVM, 0xa3), "KVM_GET_TSC_KHZ"),
    ioctl(ior::<kvm_xcrs>(KVM, 0xa6), "KVM_GET_XCRS"),
    ioctl(iow::<kvm_xcrs>(KVM, 0xa7), "KVM_SET_XCRS"),
    ioctl(io(KVM, 0xad), "KVM_KVMCLOCK_CTRL: the guest was paused"),
];
