//! Makes seccomp programs of the tables, and installs them.
//!
//! A seccomp program has one answer for calls that match and one for those that do not. So a filter is a stack of programs:
//! one that lets through what the tables name, and one per error number for the calls that shall only fail. The kernel runs
//! all and takes the strictest answer. Programs of the thread that started this one stay in force.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::kind::Kind;
use super::rules::{Rule, Verdict};
use super::tables;
use crate::config::Seccomp;

/// What a kind of thread may do, compiled.
#[derive(Debug)]
pub(super) struct Filter {
    /// First the refusals, last what is allowed at all.
    programs: Vec<BpfProgram>,
}

/// Calls and conditions as seccompiler wants them; an empty list is "always".
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

impl Filter {
    /// Compiles the filter of `kind`. None if there is none to be.
    pub(super) fn compile(kind: Kind, mode: Seccomp) -> Result<Option<Self>, seccompiler::BackendError> {
        let otherwise = match mode {
            Seccomp::On => SeccompAction::Trap,
            Seccomp::Log => SeccompAction::Log,
            Seccomp::Off => return Ok(None),
        };
        let rules = || tables::of(kind).iter().copied().flatten();
        let mut programs = Vec::new();
        for (errno, calls) in refusals(rules()) {
            let action = match mode {
                // It is to run as if there were no filter, but the C library's detour around this call costs nothing.
                Seccomp::Log if errno != libc::ENOSYS => SeccompAction::Log,
                _ => SeccompAction::Errno(errno.unsigned_abs()),
            };
            let calls = calls.into_iter().map(|call| (call, Vec::new())).collect();
            programs.push(program(calls, SeccompAction::Allow, action)?);
        }
        programs.push(program(allowed(rules())?, otherwise, SeccompAction::Allow)?);
        Ok(Some(Self { programs }))
    }

    /// Puts the calling thread, and all that it will start, under this filter, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        self.programs.iter().try_for_each(install)
    }
}

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?.try_into()
}

/// Calls that shall fail, by error number, unless another table allows them.
fn refusals<'a>(rules: impl Iterator<Item = &'a Rule> + Clone) -> BTreeMap<i32, Vec<i64>> {
    let mut refusals = BTreeMap::<i32, Vec<i64>>::new();
    for rule in rules.clone() {
        if let Verdict::Refuse(errno) = rule.verdict
            && !rules
                .clone()
                .any(|other| other.call == rule.call && other.verdict == Verdict::Allow)
        {
            refusals.entry(errno).or_default().push(rule.call);
        }
    }
    refusals
}

/// Everything that does not end the process: what is refused has a program of its own.
fn allowed<'a>(rules: impl Iterator<Item = &'a Rule>) -> Result<Rules, seccompiler::BackendError> {
    let mut allowed = Rules::new();
    let mut always = Vec::new();
    for rule in rules {
        let conditions = allowed.entry(rule.call).or_default();
        match condition(rule.verdict)? {
            Some(condition) => conditions.push(SeccompRule::new(vec![condition])?),
            None => always.push(rule.call),
        }
    }
    for call in always {
        allowed.insert(call, Vec::new());
    }
    Ok(allowed)
}

fn condition(verdict: Verdict) -> Result<Option<SeccompCondition>, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let whole = u64::from(u32::MAX);
    Ok(Some(match verdict {
        Verdict::Allow | Verdict::Refuse(_) => return Ok(None),
        Verdict::If { index, mask, value } if mask == whole => {
            SeccompCondition::new(index, SeccompCmpArgLen::Dword, Eq, value)?
        }
        Verdict::If { index, mask, value } => {
            SeccompCondition::new(index, SeccompCmpArgLen::Qword, MaskedEq(mask), value)?
        }
        Verdict::IfOwnProcess { index } => {
            SeccompCondition::new(index, SeccompCmpArgLen::Dword, Eq, u64::from(std::process::id()))?
        }
    }))
}

/// Installs one program on this thread. It must have no_new_privs.
fn install(program: &BpfProgram) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let header = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // Violations get into the kernel's log. And no mitigation is switched on that slows down the whole thread and the guest
    // on it: before Linux 5.16 a filter did that by default, for programs that run foreign code in their own address space.
    let flags = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `header` and the instructions that it points to are valid during the call, which copies them and changes
    // neither. An instruction of seccompiler has the layout of the kernel's `sock_filter`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const header,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(kind: Kind) -> impl Iterator<Item = &'static Rule> + Clone {
        tables::of(kind).iter().copied().flatten()
    }

    /// Whether a thread of `kind` may make every call that `rule` lets another make.
    fn covers(kind: Kind, rule: &Rule) -> bool {
        rules(kind).any(|own| {
            own.call == rule.call && (own.verdict == Verdict::Allow || own.verdict == rule.verdict)
        })
    }

    #[test]
    fn every_filter_compiles() {
        for kind in Kind::ALL {
            assert!(Filter::compile(kind, Seccomp::On).unwrap().is_some());
            assert!(Filter::compile(kind, Seccomp::Log).unwrap().is_some());
            assert!(Filter::compile(kind, Seccomp::Off).unwrap().is_none());
        }
    }

    #[test]
    fn a_thread_may_do_no_more_than_those_who_start_it() {
        for kind in Kind::ALL {
            for starter in kind.starters() {
                for rule in rules(kind).filter(|rule| !matches!(rule.verdict, Verdict::Refuse(_))) {
                    assert!(
                        covers(*starter, rule),
                        "{kind:?} needs {rule:?}, which {starter:?} may not do"
                    );
                }
                // A refusal is only one if the starter's filter does not end the process first.
                for rule in rules(kind).filter(|rule| matches!(rule.verdict, Verdict::Refuse(_))) {
                    assert!(
                        rules(*starter).any(|own| own.call == rule.call),
                        "{kind:?} is refused {rule:?}, for which {starter:?} would be ended"
                    );
                }
            }
        }
    }

    #[test]
    fn nobody_starts_programs_or_reaches_other_hosts() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_pkey_mprotect,
            libc::SYS_memfd_create,
            libc::SYS_userfaultfd,
            libc::SYS_personality,
        ];
        for kind in Kind::ALL {
            for call in never {
                assert!(
                    !rules(kind).any(|rule| rule.call == call),
                    "{kind:?} may call {call}"
                );
            }
        }
    }

    #[test]
    fn ioctl_fcntl_and_prctl_are_allowed_by_number_only() {
        for kind in Kind::ALL {
            for call in [
                libc::SYS_ioctl,
                libc::SYS_fcntl,
                libc::SYS_prctl,
                libc::SYS_clone,
                libc::SYS_mmap,
            ] {
                for rule in rules(kind).filter(|rule| rule.call == call) {
                    assert!(matches!(rule.verdict, Verdict::If { .. }), "{kind:?}: {rule:?}");
                }
            }
        }
    }
}
