//! The language in which the tables of allowed system calls are written.

/// One line of a table: a system call, under which condition it is allowed, and why.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    /// Number of the call.
    pub(super) call: libc::c_long,
    pub(super) verdict: Verdict,
    /// Why threads need it. For readers of the tables; nothing prints it.
    #[allow(dead_code, reason = "documentation that cannot be left out")]
    pub(super) why: &'static str,
}

/// What happens to a system call of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is allowed.
    Allow,
    /// It is allowed if argument `index`, of which only the bits of `mask` count, is `value`.
    If {
        /// Number of the argument, from 0.
        index: u8,
        /// The bits that count.
        mask: u64,
        /// What they must be.
        value: u64,
    },
    /// It is allowed if argument `index` is the number of this process.
    IfOwnProcess {
        /// Number of the argument, from 0.
        index: u8,
    },
    /// It fails with this error number, without harm to the thread: for calls that a library tries and can do without.
    Refuse(i32),
}

/// `call` is allowed whatever its arguments are.
pub(super) const fn allow(call: libc::c_long, why: &'static str) -> Rule {
    Rule {
        call,
        verdict: Verdict::Allow,
        why,
    }
}

/// `call` is allowed if its 32-bit argument `index` is `value`.
pub(super) const fn allow_if(call: libc::c_long, index: u8, value: u32, why: &'static str) -> Rule {
    Rule {
        call,
        verdict: Verdict::If {
            index,
            mask: 0xffff_ffff,
            value: value as u64,
        },
        why,
    }
}

/// `call` is allowed if the bits `mask` of its argument `index` are `value`.
pub(super) const fn allow_masked(
    call: libc::c_long,
    index: u8,
    mask: u64,
    value: u64,
    why: &'static str,
) -> Rule {
    Rule {
        call,
        verdict: Verdict::If { index, mask, value },
        why,
    }
}

/// `call` is allowed if its argument `index` names this process.
pub(super) const fn allow_own_process(call: libc::c_long, index: u8, why: &'static str) -> Rule {
    Rule {
        call,
        verdict: Verdict::IfOwnProcess { index },
        why,
    }
}

/// `call` fails with `errno`.
pub(super) const fn refuse(call: libc::c_long, errno: i32, why: &'static str) -> Rule {
    Rule {
        call,
        verdict: Verdict::Refuse(errno),
        why,
    }
}

/// `ioctl` with `request` is allowed.
pub(super) const fn ioctl(request: u32, why: &'static str) -> Rule {
    allow_if(libc::SYS_ioctl, 1, request, why)
}

/// `fcntl` with `command` is allowed.
pub(super) const fn fcntl(command: i32, why: &'static str) -> Rule {
    allow_if(libc::SYS_fcntl, 1, command.cast_unsigned(), why)
}

/// `prctl` with `option` is allowed.
pub(super) const fn prctl(option: i32, why: &'static str) -> Rule {
    allow_if(libc::SYS_prctl, 0, option.cast_unsigned(), why)
}

/// An ioctl request without argument (asm-generic/ioctl.h).
pub(super) const fn io(group: u8, number: u8) -> u32 {
    ((group as u32) << 8) | number as u32
}

/// An ioctl request that reads a `T` from the kernel.
pub(super) const fn ior<T>(group: u8, number: u8) -> u32 {
    (2 << 30) | size_of_argument::<T>() | io(group, number)
}

/// An ioctl request that gives a `T` to the kernel.
pub(super) const fn iow<T>(group: u8, number: u8) -> u32 {
    (1 << 30) | size_of_argument::<T>() | io(group, number)
}

/// An ioctl request that gives a `T` to the kernel and reads one back.
pub(super) const fn iowr<T>(group: u8, number: u8) -> u32 {
    (3 << 30) | size_of_argument::<T>() | io(group, number)
}

const fn size_of_argument<T>() -> u32 {
    assert!(
        size_of::<T>() < 1 << 14,
        "ioctl numbers have 14 bits for the size"
    );
    #[allow(clippy::cast_possible_truncation, reason = "checked above")]
    let size = size_of::<T>() as u32;
    size << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_numbered_as_the_kernel_does() {
        // From the kernel's documentation and `strace` of other programs.
        assert_eq!(io(0xae, 0x80), 0xae80, "KVM_RUN");
        assert_eq!(
            ior::<kvm_bindings::kvm_regs>(0xae, 0x81),
            0x8090_ae81,
            "KVM_GET_REGS"
        );
        assert_eq!(
            iow::<kvm_bindings::kvm_irqfd>(0xae, 0x76),
            0x4020_ae76,
            "KVM_IRQFD"
        );
        assert_eq!(
            iowr::<kvm_bindings::kvm_cpuid2>(0xae, 0x05),
            0xc008_ae05,
            "KVM_GET_SUPPORTED_CPUID"
        );
        assert_eq!(ior::<u32>(b'T', 0x30), 0x8004_5430, "TIOCGPTN");
    }
}
