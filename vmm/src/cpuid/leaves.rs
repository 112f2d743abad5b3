//! A set of CPUID leaves that can be looked up and changed.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// One of the four registers that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Replaces the `width` bits of `register` from `low` on by `value`, or by all ones where it is too large: a reader then
/// sees "at least so many".
pub(super) fn set_field(register: &mut u32, low: u32, width: u32, value: u32) {
    let mask = u32::MAX >> (32 - width);
    *register = *register & !(mask << low) | value.min(mask) << low;
}

/// The leaves of one vCPU, by function and index, in that order. A leaf that is not there reads as zero, which is also
/// what the guest gets for it.
#[derive(Debug, Clone)]
pub(super) struct Leaves(BTreeMap<(u32, u32), kvm_cpuid_entry2>);

impl Leaves {
    pub(super) fn new(entries: &[kvm_cpuid_entry2]) -> Self {
        Self(
            entries
                .iter()
                .map(|entry| ((entry.function, entry.index), *entry))
                .collect(),
        )
    }

    /// All leaves that are not zero: fewer is better, old kernels take no more than 80.
    pub(super) fn into_entries(self) -> Vec<kvm_cpuid_entry2> {
        self.0
            .into_values()
            .filter(|entry| entry.eax | entry.ebx | entry.ecx | entry.edx != 0)
            .collect()
    }

    /// The leaf `function` with its only or first index; zeroes if there is none.
    pub(super) fn get(&self, function: u32) -> kvm_cpuid_entry2 {
        self.get_index(function, 0)
    }

    /// The leaf `function` with `index`; zeroes if there is none.
    pub(super) fn get_index(&self, function: u32, index: u32) -> kvm_cpuid_entry2 {
        self.0.get(&(function, index)).copied().unwrap_or_default()
    }

    /// The indices of leaf `function`.
    pub(super) fn indices(&self, function: u32) -> Vec<u32> {
        self.0
            .range((function, 0)..=(function, u32::MAX))
            .map(|(&(_, index), _)| index)
            .collect()
    }

    /// The leaf `function`, to be changed; made if there is none.
    pub(super) fn leaf(&mut self, function: u32) -> &mut kvm_cpuid_entry2 {
        self.0.entry((function, 0)).or_insert(kvm_cpuid_entry2 {
            function,
            ..Default::default()
        })
    }

    /// The leaf `function` with `index`, to be changed; made if there is none. From now on it answers for this index only.
    pub(super) fn leaf_index(&mut self, function: u32, index: u32) -> &mut kvm_cpuid_entry2 {
        let leaf = self.0.entry((function, index)).or_default();
        leaf.function = function;
        leaf.index = index;
        leaf.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        leaf
    }

    /// Takes leaf `function` away, with all its indices.
    pub(super) fn remove(&mut self, function: u32) {
        self.0.retain(|&(other, _), _| other != function);
    }

    /// Takes leaf `function` with `index` away.
    pub(super) fn remove_index(&mut self, function: u32, index: u32) {
        self.0.remove(&(function, index));
    }

    /// One register of the leaf `function` with `index`.
    pub(super) fn register(&self, function: u32, index: u32, register: Register) -> u32 {
        let leaf = self.get_index(function, index);
        match register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        }
    }

    /// One register of the leaf `function` with `index`, to be changed; `None` if there is no such leaf.
    pub(super) fn register_mut(&mut self, function: u32, index: u32, register: Register) -> Option<&mut u32> {
        let leaf = self.0.get_mut(&(function, index))?;
        Some(match register {
            Register::Eax => &mut leaf.eax,
            Register::Ebx => &mut leaf.ebx,
            Register::Ecx => &mut leaf.ecx,
            Register::Edx => &mut leaf.edx,
        })
    }
}
