//! The KVM virtual machine: memory slots, in-kernel interrupt controllers, interrupt routes, doorbells.
//!
//! Everything that a device needs of KVM goes through [`Vm`]: `eventfd → interrupt` (irqfd) and `guest write → eventfd`
//! (ioeventfd), so that neither a queue worker nor a vCPU thread has to talk to the other. GSIs (global system interrupts)
//! below [`layout::GSI_MSI_FIRST`] are the pins of PIC and IOAPIC, those above are messages (MSI) whose address and data the
//! guest chose.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irqchip,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::Ram;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm; run `smsvmm host check` to see what this host lacks")]
    Open(#[source] kvm_ioctls::Error),
    /// A capability is missing.
    #[error("KVM on this host lacks {0}, without which no guest can run")]
    Missing(&'static str),
    /// An ioctl failed.
    #[error("KVM cannot {action}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
    /// All interrupt routes are taken.
    #[error("no interrupt route is left: all {0} GSIs for message-signalled interrupts are in use")]
    NoGsi(u32),
}

/// Shorthand to name the action of a failed ioctl.
pub(crate) fn call(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { action, source }
}

/// A message-signalled interrupt as the guest programs it (PCI Local Bus 3.0 §6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Where the message goes: selects the target vCPUs.
    pub address: u64,
    /// What it says: selects the vector.
    pub data: u32,
}

/// Number of MSI routes that one machine may have; KVM's own limit is 4096 routes in all.
const MAX_MSI_ROUTES: u32 = 2048;

#[derive(Debug, Default)]
struct Routes {
    /// Allocated GSIs; `None` until the guest programs the vector.
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

/// Opens `/dev/kvm`, for all machines to come: nothing can be opened once the sandbox is entered.
///
/// # Errors
/// KVM is absent or forbidden.
pub fn open_kvm() -> Result<Arc<Kvm>, KvmError> {
    Kvm::new().map(Arc::new).map_err(KvmError::Open)
}

/// A KVM virtual machine.
#[derive(Debug)]
pub struct Vm {
    kvm: Arc<Kvm>,
    fd: VmFd,
    routes: Mutex<Routes>,
}

impl Vm {
    /// Creates a virtual machine with interrupt controllers and timer, without memory and vCPUs. See [`open_kvm`].
    ///
    /// # Errors
    /// KVM is too old or refuses.
    pub fn new(kvm: Arc<Kvm>) -> Result<Self, KvmError> {
        for (capability, name) in [
            (
                Cap::Irqchip,
                "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
            ),
            (Cap::UserMemory, "memory slots (KVM_CAP_USER_MEMORY)"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
            (Cap::Ioeventfd, "doorbells by eventfd (KVM_CAP_IOEVENTFD)"),
            (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Missing(name));
            }
        }
        let fd = kvm.create_vm().map_err(call("create a virtual machine"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("place its identity map"))?;
        let tss = usize::try_from(layout::KVM_TSS).map_err(|_| KvmError::Missing("a 64-bit host"))?;
        fd.set_tss_address(tss)
            .map_err(call("place its task state segment"))?;
        fd.create_irq_chip()
            .map_err(call("create the interrupt controllers"))?;
        // The dummy speaker keeps port 0x61 in the kernel: without it each step of a PIT calibration is an exit.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(call("create the interval timer"))?;
        let vm = Vm {
            kvm,
            fd,
            routes: Mutex::default(),
        };
        vm.apply_routes(&vm.lock_routes())?;
        vm.mask_pics()?;
        Ok(vm)
    }

    /// Masks all inputs of the two PICs, as a firmware leaves them.
    ///
    /// KVM starts them unmasked with vector 0, and a kernel that our ACPI tables tell of no PIC never programs them: an
    /// interrupt before it has programmed its local APIC would reach it as a processor exception.
    fn mask_pics(&self) -> Result<(), KvmError> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd.get_irqchip(&mut chip).map_err(call("read a PIC"))?;
            chip.chip.pic.imr = 0xff;
            self.fd.set_irqchip(&chip).map_err(call("mask a PIC"))?;
        }
        Ok(())
    }

    /// The system handle, for capabilities and CPUID.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The machine's handle.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Shows the guest its memory.
    ///
    /// # Errors
    /// KVM refuses a slot.
    pub fn set_memory(&self, ram: &Ram) -> Result<(), KvmError> {
        for (slot, (guest_phys_addr, userspace_addr, memory_size)) in (0..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the range is a live mapping that `ram` owns; the machine is torn down before `ram` is.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(call("map guest memory"))?;
        }
        Ok(())
    }

    /// Creates a vCPU; `id` is its local APIC id.
    ///
    /// # Errors
    /// KVM refuses, for example because the limit of vCPUs is reached.
    pub fn create_vcpu(&self, id: u32) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(id)).map_err(call("create a vCPU"))
    }

    /// Takes a GSI for a message-signalled interrupt. Nothing is delivered until [`Self::set_message`].
    ///
    /// # Errors
    /// All are taken.
    pub fn allocate_gsi(&self) -> Result<u32, KvmError> {
        let mut routes = self.lock_routes();
        let gsi = (layout::GSI_MSI_FIRST..layout::GSI_MSI_FIRST + MAX_MSI_ROUTES)
            .find(|gsi| !routes.messages.contains_key(gsi))
            .ok_or(KvmError::NoGsi(MAX_MSI_ROUTES))?;
        routes.messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a GSI back. Its irqfds must be unregistered.
    pub fn free_gsi(&self, gsi: u32) {
        let mut routes = self.lock_routes();
        if let Some(Some(_)) = routes.messages.remove(&gsi)
            && let Err(error) = self.apply_routes(&routes)
        {
            tracing::warn!(gsi, error = %error, "an interrupt route could not be withdrawn");
        }
    }

    /// Says which message `gsi` sends.
    ///
    /// # Errors
    /// KVM refuses the new table.
    pub fn set_message(&self, gsi: u32, message: MsiMessage) -> Result<(), KvmError> {
        let mut routes = self.lock_routes();
        if routes.messages.get(&gsi) == Some(&Some(message)) {
            return Ok(());
        }
        routes.messages.insert(gsi, Some(message));
        self.apply_routes(&routes)
    }

    /// From now on a write to `event` raises `gsi`. What was written before is delivered now.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(call("connect an interrupt"))
    }

    /// Undoes [`Self::connect_interrupt`]; what is written later stays in the eventfd.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn disconnect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(call("disconnect an interrupt"))
    }

    /// From now on a guest's write of any width to `address` signals `event` without an exit to user space.
    ///
    /// # Errors
    /// KVM refuses, for example because the address is taken.
    pub fn connect_doorbell(&self, event: &EventFd, address: u64) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(call("connect a doorbell"))
    }

    /// Undoes [`Self::connect_doorbell`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn disconnect_doorbell(&self, event: &EventFd, address: u64) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(call("disconnect a doorbell"))
    }

    fn lock_routes(&self) -> MutexGuard<'_, Routes> {
        // A panic while the lock is held leaves a table that is whole at every step.
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply_routes(&self, routes: &Routes) -> Result<(), KvmError> {
        let mut entries: Vec<kvm_irq_routing_entry> = legacy_routes().collect();
        entries.extend(routes.messages.iter().filter_map(|(&gsi, message)| {
            let message = message.as_ref()?;
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the two halves of the address are what KVM wants"
            )]
            let msi = kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            };
            Some(kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
                ..Default::default()
            })
        }));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::NoGsi(MAX_MSI_ROUTES))?;
        self.fd.set_gsi_routing(&table).map_err(call("route interrupts"))
    }
}

/// The pins of the in-kernel controllers, as KVM itself sets them up: GSI n is IOAPIC pin n, and below 16 also PIC input n.
fn legacy_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pic = (0..16).map(move |gsi| {
        if gsi < 8 {
            entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)
        } else {
            entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)
        }
    });
    let ioapic = (0..24).map(move |gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pic.chain(ioapic)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux would take interrupt line 5 for exception 5 and die.
    #[test]
    fn an_interrupt_before_the_guest_is_ready_does_not_become_an_exception() {
        let Ok(kvm) = open_kvm() else {
            eprintln!("no /dev/kvm here");
            return;
        };
        let vm = Vm::new(kvm).unwrap();
        vm.fd.set_irq_line(layout::GSI_GED, true).unwrap();
        for (chip_id, latched) in [
            (KVM_IRQCHIP_PIC_MASTER, 1 << layout::GSI_GED),
            (KVM_IRQCHIP_PIC_SLAVE, 0),
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.fd.get_irqchip(&mut chip).unwrap();
            // SAFETY: KVM filled this member of the union, as the chip is a PIC.
            let pic = unsafe { chip.chip.pic };
            assert_eq!(
                (pic.irr, pic.imr),
                (latched, 0xff),
                "the PIC has seen it and keeps it"
            );
        }
    }
}
