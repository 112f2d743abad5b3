//! Model-specific registers: what a new vCPU starts with, and reading and writing many of them.
//!
//! `KVM_GET_MSRS` and `KVM_SET_MSRS` take a list and stop at the first register that they cannot access; they return how
//! many went well. Lists that come from `KVM_GET_MSR_INDEX_LIST` have such registers (those of features that the guest
//! does not have), and may be longer than one call takes. [`read_all`] and [`write_all`] hide both.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// Indices of the registers that this module knows (Intel SDM volume 4; AMD APM volume 2 appendix A).
pub mod index {
    /// Time-stamp counter.
    pub const TSC: u32 = 0x10;
    /// Code segment of SYSENTER.
    pub const SYSENTER_CS: u32 = 0x174;
    /// Stack pointer of SYSENTER.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// Instruction pointer of SYSENTER.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// Miscellaneous enables.
    pub const MISC_ENABLE: u32 = 0x1A0;
    /// Default memory type, and whether MTRRs are on.
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    /// Time at which the local APIC's timer fires in deadline mode; 0 for never.
    pub const TSC_DEADLINE: u32 = 0x6E0;
    /// Segments of SYSCALL.
    pub const STAR: u32 = 0xC000_0081;
    /// 64-bit instruction pointer of SYSCALL.
    pub const LSTAR: u32 = 0xC000_0082;
    /// Compatibility-mode instruction pointer of SYSCALL.
    pub const CSTAR: u32 = 0xC000_0083;
    /// Flags that SYSCALL clears.
    pub const SYSCALL_MASK: u32 = 0xC000_0084;
    /// What SWAPGS swaps in.
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
}

/// Why MSRs cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// KVM refused the whole call.
    #[error("cannot {action} {count} MSRs, the first of them {first:#x}")]
    Call {
        /// `read` or `write`.
        action: &'static str,
        /// Registers in the call.
        count: usize,
        /// Index of the first.
        first: u32,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM claims to have handled more registers than it was given.
    #[error("KVM says that it handled {handled} of {count} MSRs")]
    Count {
        /// What KVM says.
        handled: usize,
        /// Registers in the call.
        count: usize,
    },
    /// Memory for the call's argument cannot be had.
    #[error("cannot allocate a list of {count} MSRs")]
    List {
        /// Registers in the call.
        count: usize,
    },
}

/// What the registers of a vCPU hold when the boot loader hands over to the kernel. All others stay as KVM resets them.
pub fn initial() -> Vec<kvm_msr_entry> {
    /// Fast string operations.
    const FAST_STRING: u64 = 1;
    /// MTRRs on, and all memory write-back: what firmware would leave behind. KVM itself knows what is MMIO.
    const MTRR_ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;

    [
        (index::SYSENTER_CS, 0),
        (index::SYSENTER_ESP, 0),
        (index::SYSENTER_EIP, 0),
        (index::STAR, 0),
        (index::CSTAR, 0),
        (index::LSTAR, 0),
        (index::SYSCALL_MASK, 0),
        (index::KERNEL_GS_BASE, 0),
        // The same for all vCPUs, one after the other: KVM then keeps their counters in step.
        (index::TSC, 0),
        (index::MISC_ENABLE, FAST_STRING),
        (index::MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
    .to_vec()
}

/// Brings `entries` into the order in which a vCPU must get them back: the time-stamp counter first, the timer's deadline,
/// which KVM compares with it, last.
pub fn order_for_restore(entries: &mut [kvm_msr_entry]) {
    entries.sort_by_key(|entry| match entry.index {
        index::TSC => (0, 0),
        index::TSC_DEADLINE => (2, 0),
        other => (1, other),
    });
}

/// The values of those of `indices` that the vCPU can read, in their order.
///
/// # Errors
/// KVM refuses for another reason than a register that is not there.
pub fn read_all(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, MsrError> {
    let entries: Vec<_> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(entries.len());
    in_batches(&entries, "read", |list| {
        let count = vcpu.get_msrs(list)?;
        values.extend(list.as_slice().iter().take(count).copied());
        Ok(count)
    })?;
    Ok(values)
}

/// Writes `entries` in their order. Returns the indices of those that KVM refused; the caller knows whether that matters.
///
/// # Errors
/// KVM refuses for another reason than a register or a value that the vCPU cannot have.
pub fn write_all(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<Vec<u32>, MsrError> {
    in_batches(entries, "write", |list| vcpu.set_msrs(list))
}

/// Calls `call` with all of `entries` in as few lists as possible, goes on behind each register that it stops at, and
/// returns the indices of these.
fn in_batches(
    entries: &[kvm_msr_entry],
    action: &'static str,
    mut call: impl FnMut(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<Vec<u32>, MsrError> {
    let mut refused = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let count = batch.len();
        let mut list = Msrs::from_entries(batch).map_err(|_| MsrError::List { count })?;
        let handled = call(&mut list).map_err(|source| MsrError::Call {
            action,
            count,
            first: batch[0].index,
            source,
        })?;
        if handled > count {
            return Err(MsrError::Count { handled, count });
        }
        rest = &rest[handled..];
        if handled < count {
            refused.push(rest[0].index);
            rest = &rest[1..];
        }
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(indices: impl IntoIterator<Item = u32>) -> Vec<kvm_msr_entry> {
        indices
            .into_iter()
            .map(|index| kvm_msr_entry {
                index,
                data: u64::from(index) * 2,
                ..Default::default()
            })
            .collect()
    }

    /// A KVM that refuses every seventh register.
    fn handle(list: &Msrs) -> usize {
        let entries = list.as_slice();
        entries
            .iter()
            .position(|entry| entry.index % 7 == 6)
            .unwrap_or(entries.len())
    }

    #[test]
    fn every_register_is_handled_once_although_some_are_refused() {
        for length in [0, 1, 6, 7, 8, 255, 256, 257, 1000] {
            let mut handled = Vec::new();
            let refused = in_batches(&entries(0..length), "write", |list| {
                assert!(list.as_slice().len() <= KVM_MAX_MSR_ENTRIES);
                let count = handle(list);
                handled.extend(list.as_slice()[..count].iter().map(|entry| entry.index));
                Ok(count)
            })
            .unwrap();
            assert!(refused.iter().all(|index| index % 7 == 6));
            assert!(handled.iter().all(|index| index % 7 != 6));
            let mut all = [refused, handled].concat();
            all.sort_unstable();
            assert_eq!(all, (0..length).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_failing_call_names_the_registers() {
        let error = in_batches(&entries([0x10, 0x11]), "read", |_| {
            Err(kvm_ioctls::Error::new(libc::EFAULT))
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "cannot read 2 MSRs, the first of them 0x10");
    }

    #[test]
    fn a_count_beyond_the_list_is_an_error() {
        let error = in_batches(&entries([1]), "read", |_| Ok(2)).unwrap_err();
        assert!(matches!(error, MsrError::Count { handled: 2, count: 1 }));
    }

    #[test]
    fn the_deadline_is_restored_behind_the_counter() {
        let mut list = entries([index::TSC_DEADLINE, index::STAR, index::TSC, index::SYSENTER_CS]);
        order_for_restore(&mut list);
        let order: Vec<_> = list.iter().map(|entry| entry.index).collect();
        assert_eq!(
            order,
            [index::TSC, index::SYSENTER_CS, index::STAR, index::TSC_DEADLINE]
        );
    }

    #[test]
    fn no_register_is_set_twice_at_the_start() {
        let mut indices: Vec<_> = initial().iter().map(|entry| entry.index).collect();
        indices.sort_unstable();
        assert!(indices.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
