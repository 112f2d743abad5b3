//! Makes seccomp programs of the tables, and installs them.
//!
//! The program of a thread is run in addition to those of the threads that started it, at each system call; the strictest
//! answer counts. (From Linux 5.11 on the kernel remembers which calls are allowed whatever their arguments are, and runs
//! nothing for those.) seccompiler makes programs that have one answer for calls that match and one for those that do not; so
//! several are put behind each other:
//!
//! ```text
//!   the one request that is hot ──► allow        5 or 7 instructions; the rest costs it nothing
//!   calls that only fail        ──► error        one piece per error number
//!   what the tables name        ──► allow
//!   everything else             ──► SIGSYS, or a line in the kernel's log
//! ```

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::kind::Kind;
use super::rules::{Rule, Verdict};
use super::tables;
use crate::config::Seccomp;

/// What a kind of thread may do, compiled.
#[derive(Debug)]
pub(super) struct Filter {
    program: BpfProgram,
}

/// What becomes of calls that no table names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forbidden {
    /// They end the process.
    Ends,
    /// They fail, for threads in which libraries do what nobody knows before.
    Fails,
}

/// As the kernel names this architecture (linux/audit.h).
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Calls and conditions as seccompiler wants them; an empty list is "always".
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

impl Filter {
    /// Compiles the filter of `kind`. None if there is none to be.
    pub(super) fn compile(kind: Kind, mode: Seccomp) -> Result<Option<Self>, seccompiler::BackendError> {
        Self::of(tables::of(kind), tables::hot(kind), Forbidden::Ends, mode)
    }

    /// The same for all threads of a program that is no machine.
    pub(super) fn of_program(
        tables: &[&[Rule]],
        mode: Seccomp,
    ) -> Result<Option<Self>, seccompiler::BackendError> {
        Self::of(tables, None, Forbidden::Ends, mode)
    }

    /// The same for some threads of a program that serves disks.
    pub(super) fn of_server(
        tables: &[&[Rule]],
        forbidden: Forbidden,
        mode: Seccomp,
    ) -> Result<Option<Self>, seccompiler::BackendError> {
        Self::of(tables, Some(tables::SERVER_HOT), forbidden, mode)
    }

    fn of(
        tables: &[&[Rule]],
        hot: Option<&Rule>,
        forbidden: Forbidden,
        mode: Seccomp,
    ) -> Result<Option<Self>, seccompiler::BackendError> {
        let otherwise = match (mode, forbidden) {
            (Seccomp::On, Forbidden::Ends) => SeccompAction::Trap,
            (Seccomp::On, Forbidden::Fails) => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
            (Seccomp::Log, _) => SeccompAction::Log,
            (Seccomp::Off, _) => return Ok(None),
        };
        let rules = || tables.iter().copied().flatten();
        let mut pieces = vec![hot.map_or_else(Vec::new, shortcut)];
        for (errno, calls) in refusals(rules()) {
            let action = match mode {
                // It is to run as if there were no filter, but the C library's detour around this call costs nothing.
                Seccomp::Log if errno != libc::ENOSYS => SeccompAction::Log,
                _ => SeccompAction::Errno(errno.unsigned_abs()),
            };
            let calls = calls.into_iter().map(|call| (call, Vec::new())).collect();
            let mut piece = program(calls, SeccompAction::Allow, action)?;
            // Its last instruction is the answer for all other calls; instead the next piece is to decide.
            piece.pop();
            pieces.push(piece);
        }
        pieces.push(program(allowed(rules())?, otherwise, SeccompAction::Allow)?);
        Ok(Some(Self {
            program: pieces.concat(),
        }))
    }

    /// Puts the calling thread, and all that it will start, under this filter, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        install(&self.program)
    }
}

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?.try_into()
}

/// Allows a request that is known by its number, and perhaps the lower half of one argument, and leaves everything else to what
/// follows.
fn shortcut(rule: &Rule) -> BpfProgram {
    let Ok(call) = u32::try_from(rule.call) else {
        return Vec::new();
    };
    let load = |offset: u32| sock_filter {
        code: 0x20,
        jt: 0,
        jf: 0,
        k: offset,
    };
    let unless = |value: u32, skip: u8| sock_filter {
        code: 0x15,
        jt: 0,
        jf: skip,
        k: value,
    };
    let allow = sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    };
    // Offsets in `struct seccomp_data` (linux/seccomp.h).
    let (number, architecture) = (load(0), load(4));
    match rule.verdict {
        Verdict::Allow => vec![
            architecture,
            unless(AUDIT_ARCH_X86_64, 3),
            number,
            unless(call, 1),
            allow,
        ],
        Verdict::If { index, value, .. } => {
            let Ok(value) = u32::try_from(value) else {
                return Vec::new();
            };
            vec![
                architecture,
                unless(AUDIT_ARCH_X86_64, 5),
                number,
                unless(call, 3),
                load(16 + 8 * u32::from(index)),
                unless(value, 1),
                allow,
            ]
        }
        Verdict::IfOwnProcess { .. } | Verdict::Refuse(_) => Vec::new(),
    }
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
    // No mitigation is switched on that slows down the whole thread and the guest on it: before Linux 5.16 a filter did that
    // by default, for programs that run foreign code in their own address space.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
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

    /// What the kernel would answer, for a program that uses nothing but what seccompiler and `shortcut` do.
    fn run(program: &BpfProgram, call: u32, arguments: [u64; 6]) -> u32 {
        let mut data = vec![call, AUDIT_ARCH_X86_64, 0, 0];
        let halves = |argument: u64| [argument & u64::from(u32::MAX), argument >> 32];
        data.extend(
            arguments
                .into_iter()
                .flat_map(halves)
                .map(|half| u32::try_from(half).unwrap()),
        );
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let jump = |holds: bool| usize::from(if holds { jt } else { jf });
            at += 1;
            match code {
                0x20 => accumulator = data[k as usize / 4],
                0x05 => at += k as usize,
                0x15 => at += jump(accumulator == k),
                0x25 => at += jump(accumulator > k),
                0x35 => at += jump(accumulator >= k),
                0x54 => accumulator &= k,
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn a_program_that_is_no_machine_serves_and_reads_and_starts_nothing() {
        let filter = Filter::of_program(tables::PROGRAM, Seccomp::On).unwrap().unwrap();
        let answer = |call: libc::c_long, first: u64| {
            run(
                &filter.program,
                u32::try_from(call).unwrap(),
                [first, 0, 0, 0, 0, 0],
            )
        };
        let family = |family: i32| u64::from(family.unsigned_abs());
        for (call, first) in [
            (libc::SYS_accept4, 0),
            (libc::SYS_openat, 0),
            (libc::SYS_fdatasync, 0),
            (libc::SYS_socket, family(libc::AF_UNIX)),
        ] {
            assert_eq!(answer(call, first), libc::SECCOMP_RET_ALLOW, "{call}");
        }
        for (call, first) in [
            (libc::SYS_execve, 0),
            (libc::SYS_ptrace, 0),
            (libc::SYS_listen, 0),
            (libc::SYS_bind, 0),
            (libc::SYS_socket, family(libc::AF_INET)),
            (libc::SYS_socket, family(libc::AF_NETLINK)),
            (libc::SYS_setuid, 0),
        ] {
            assert_eq!(answer(call, first), libc::SECCOMP_RET_TRAP, "{call}");
        }
    }

    /// What the kernel would answer to the first argument of a thread of a program that serves disks.
    fn answer_of_server(tables: &[&[Rule]], forbidden: Forbidden, call: libc::c_long, first: u64) -> u32 {
        let filter = Filter::of_server(tables, forbidden, Seccomp::On)
            .unwrap()
            .unwrap();
        let call = u32::try_from(call).unwrap();
        run(&filter.program, call, [first, 0, 0, 0, 0, 0])
    }

    #[test]
    fn threads_that_serve_disks_hear_clients_and_open_nothing() {
        let answer = |call, first| answer_of_server(tables::SERVER, Forbidden::Ends, call, first);
        assert_eq!(tables::SERVER_HOT.call, libc::SYS_io_uring_enter);
        for call in [
            libc::SYS_io_uring_enter,
            libc::SYS_accept4,
            libc::SYS_sendmsg,
            libc::SYS_recvfrom,
            libc::SYS_memfd_create,
            libc::SYS_unlink,
            libc::SYS_statx,
            libc::SYS_rt_sigtimedwait,
        ] {
            assert_eq!(answer(call, 0), libc::SECCOMP_RET_ALLOW, "{call}");
        }
        for call in [libc::SYS_open, libc::SYS_openat, libc::SYS_access] {
            let refused = libc::SECCOMP_RET_ERRNO | libc::EACCES.unsigned_abs();
            assert_eq!(answer(call, 0), refused, "{call}");
        }
        for call in [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_io_uring_setup,
            libc::SYS_mkdir,
            libc::SYS_kill,
            libc::SYS_execve,
        ] {
            assert_eq!(answer(call, 0), libc::SECCOMP_RET_TRAP, "{call}");
        }
    }

    #[test]
    fn threads_of_a_server_that_connect_and_open_start_no_programs() {
        let inet = u64::from(libc::AF_INET.unsigned_abs());
        let failed = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
        for tables in [tables::SERVER_CONNECTS, tables::SERVER_OPENS] {
            let answer = |call, first| answer_of_server(tables, Forbidden::Fails, call, first);
            for (call, first) in [
                (libc::SYS_socket, inet),
                (libc::SYS_connect, 0),
                (libc::SYS_openat, 0),
            ] {
                assert_eq!(answer(call, first), libc::SECCOMP_RET_ALLOW, "{call}");
            }
            let packet = u64::from(libc::AF_PACKET.unsigned_abs());
            for (call, first) in [
                (libc::SYS_socket, packet),
                (libc::SYS_execve, 0),
                (libc::SYS_ptrace, 0),
                (libc::SYS_rename, 0),
                (libc::SYS_kill, 1),
            ] {
                assert_eq!(answer(call, first), failed, "{call}");
            }
        }
        let answer = |call| answer_of_server(tables::SERVER_CONNECTS, Forbidden::Fails, call, 0);
        for call in [libc::SYS_listen, libc::SYS_pwrite64, libc::SYS_unlink] {
            assert_eq!(answer(call), failed, "{call}");
        }
    }

    #[test]
    fn threads_of_a_server_may_do_no_more_than_the_one_that_opens_what_they_serve() {
        let opens = || tables::SERVER_OPENS.iter().copied().flatten();
        for tables in [tables::SERVER, tables::SERVER_CONNECTS] {
            let allowed = tables.iter().copied().flatten();
            for rule in allowed.filter(|rule| !matches!(rule.verdict, Verdict::Refuse(_))) {
                let covers = |own: &Rule| {
                    own.call == rule.call && (own.verdict == Verdict::Allow || own.verdict == rule.verdict)
                };
                assert!(opens().any(covers), "{rule:?}");
            }
        }
    }

    #[test]
    fn the_pieces_of_a_program_work_together() {
        let answer = |kind, mode, call: libc::c_long, second: u64| {
            let filter = Filter::compile(kind, mode).unwrap().unwrap();
            run(
                &filter.program,
                u32::try_from(call).unwrap(),
                [0, second, 0, 0, 0, 0],
            )
        };
        let error = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
        for kind in Kind::ALL {
            assert_eq!(
                answer(kind, Seccomp::On, libc::SYS_futex, 0),
                libc::SECCOMP_RET_ALLOW
            );
            assert_eq!(
                answer(kind, Seccomp::On, libc::SYS_clone3, 0),
                error(libc::ENOSYS)
            );
            assert_eq!(
                answer(kind, Seccomp::On, libc::SYS_socketpair, 0),
                libc::SECCOMP_RET_TRAP
            );
            assert_eq!(
                answer(kind, Seccomp::Log, libc::SYS_socketpair, 0),
                libc::SECCOMP_RET_LOG
            );
            // TIOCSTI, which types on the user's terminal.
            assert_eq!(
                answer(kind, Seccomp::On, libc::SYS_ioctl, 0x5412),
                libc::SECCOMP_RET_TRAP
            );
            // Another architecture's numbers, and those of x32.
            let filter = Filter::compile(kind, Seccomp::On).unwrap().unwrap();
            assert_eq!(
                run(&filter.program, 0x4000_0000 | 1, [0; 6]),
                libc::SECCOMP_RET_TRAP
            );
        }
        assert_eq!(
            answer(Kind::Vcpu, Seccomp::On, libc::SYS_ioctl, 0xae80),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            answer(Kind::Main, Seccomp::On, libc::SYS_ioctl, 0xae80),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(
            answer(Kind::NetQueue, Seccomp::On, libc::SYS_ioctl, 0xae80),
            libc::SECCOMP_RET_TRAP
        );
        assert_eq!(
            answer(Kind::Vcpu, Seccomp::On, libc::SYS_openat, 0),
            error(libc::EACCES)
        );
        assert_eq!(
            answer(Kind::Vcpu, Seccomp::Log, libc::SYS_openat, 0),
            libc::SECCOMP_RET_LOG
        );
        assert_eq!(
            answer(Kind::Management, Seccomp::On, libc::SYS_openat, 0),
            libc::SECCOMP_RET_ALLOW
        );
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
