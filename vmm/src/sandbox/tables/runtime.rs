//! System calls of the C library and of Rust's standard library, which any thread may make at any time.

use libc::*;

use crate::sandbox::rules::{
    Rule, allow, allow_if, allow_masked, allow_own_process, fcntl, ioctl, prctl, refuse,
};

/// Namespaces that `clone` could make. (A new time namespace needs `clone3`.)
const NAMESPACES: i32 =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
/// What makes a thread of this process out of a new task.
const THREAD: i32 = CLONE_VM | CLONE_THREAD | CLONE_SIGHAND;
/// `termios2` and `ioctl`s that newer C libraries use for terminals.
const TCGETS2: u32 = 0x802c_542a;
const TCSETS2: u32 = 0x402c_542b;
/// Names for anonymous memory, by which the C library marks its heaps (Linux 5.17).
const PR_SET_VMA: i32 = 0x5356_4d41;

/// Why these are allowed.
const START: &str = "start of a thread that is started inside the sandbox";

/// What every thread needs: memory, threads, locks, signals, time, log lines, a way out.
#[rustfmt::skip]
pub(in crate::sandbox) const EVERY_THREAD: &[Rule] = &[
    allow(SYS_futex, "locks, condition variables, channels, joining threads"),
    allow(SYS_read, "eventfds, timers, pipes; only what is open"),
    allow(SYS_write, "eventfds, log lines, consoles; only what is open"),
    // Memory. Nothing may become executable.
    allow_masked(SYS_mmap, 2, PROT_EXEC as u64, 0, "heap, stacks, rings"),
    allow_masked(SYS_mprotect, 2, PROT_EXEC as u64, 0, "guard pages of stacks, growing heaps"),
    allow(SYS_munmap, "heap, stacks of ended threads"),
    allow(SYS_mremap, "realloc of large blocks"),
    allow(SYS_madvise, "heap given back, stacks of ended threads, guest memory emptied (and filled) at reboot"),
    allow(SYS_brk, "heap of the main thread"),
    // Threads.
    allow_masked(
        SYS_clone,
        0,
        (THREAD | NAMESPACES) as u64,
        THREAD as u64,
        "new threads; no processes, no namespaces",
    ),
    refuse(SYS_clone3, ENOSYS, "its flags lie in memory, where a filter cannot look; the C library then uses clone"),
    allow(SYS_set_robust_list, "start of a thread"),
    allow(SYS_get_robust_list, "start of a thread in some C libraries"),
    allow(SYS_rseq, "start of a thread; fast per-CPU data of the allocator"),
    allow(SYS_sigaltstack, "start and end of a thread: stack for the handler of stack overflows"),
    allow(SYS_set_tid_address, "start of a thread in some C libraries"),
    allow(SYS_gettid, "names of threads in logs, pthread_kill"),
    allow(SYS_getpid, "pthread_kill, abort"),
    allow(SYS_sched_getaffinity, "number of CPUs, for the allocator's arenas and the end of the stack"),
    allow(SYS_sched_yield, "spinning locks"),
    allow(SYS_exit, "end of a thread"),
    allow(SYS_exit_group, "end of the process"),
    prctl(PR_SET_NAME, "name of a thread"),
    prctl(PR_GET_NAME, "name of the thread in the message about a violation"),
    prctl(PR_SET_VMA, "names of the allocator's memory"),
    // Into a narrower sandbox: these calls can only take rights away.
    prctl(PR_SET_NO_NEW_PRIVS, START),
    prctl(PR_GET_NO_NEW_PRIVS, START),
    prctl(PR_GET_DUMPABLE, "is its memory hidden?"),
    allow(SYS_capget, START),
    allow(SYS_landlock_restrict_self, START),
    allow(SYS_seccomp, START),
    // Signals: to itself, and a kick for vCPUs.
    allow_own_process(SYS_tgkill, 0, "pthread_kill for vCPUs, abort"),
    allow(SYS_rt_sigaction, "restoring the terminal, abort"),
    allow(SYS_rt_sigprocmask, "start of a thread, abort"),
    allow(SYS_rt_sigreturn, "end of a signal handler"),
    allow(SYS_restart_syscall, "the kernel goes on with a sleep after a signal"),
    // Time. Most of it does not enter the kernel, unless the host's clock is slow.
    allow(SYS_clock_gettime, "time"),
    allow(SYS_clock_getres, "time"),
    allow(SYS_gettimeofday, "time"),
    allow(SYS_clock_nanosleep, "sleeping"),
    allow(SYS_nanosleep, "sleeping"),
    allow(SYS_getrandom, "seeds of hash maps, the guest's entropy device"),
    // Descriptors that are open already.
    allow(SYS_writev, "log lines"),
    allow(SYS_readv, "packets, input"),
    allow(SYS_close, "what is no longer needed"),
    allow(SYS_fstat, "size and kind of an open file"),
    allow(SYS_lseek, "size of an open file"),
    allow(SYS_poll, "waiting for a descriptor"),
    allow(SYS_ppoll, "waiting for a descriptor"),
    fcntl(F_DUPFD_CLOEXEC, "duplicates of eventfds and files"),
    fcntl(F_GETFD, "checks of the standard library"),
    fcntl(F_SETFD, "close-on-exec"),
    fcntl(F_GETFL, "non-blocking mode"),
    fcntl(F_SETFL, "non-blocking mode"),
    ioctl(0x5421, "FIONBIO: non-blocking mode as the standard library sets it"),
    ioctl(0x5401, "TCGETS: is it a terminal? settings to be restored"),
    ioctl(0x5402, "TCSETS: restoring the terminal, also from a handler of a fatal signal"),
    ioctl(0x5403, "TCSETSW: restoring the terminal"),
    ioctl(0x5404, "TCSETSF: restoring the terminal"),
    ioctl(TCGETS2, "terminals, C library 2.42"),
    ioctl(TCSETS2, "terminals, C library 2.42"),
    ioctl(0x5413, "TIOCGWINSZ: width of the terminal"),
];

/// For threads that open nothing: what libraries try now and then fails without harm.
#[rustfmt::skip]
pub(in crate::sandbox) const NO_FILES: &[Rule] = &[
    refuse(SYS_open, EACCES, "libraries look for optional files"),
    refuse(SYS_openat, EACCES, "backtraces read /proc/self/maps and symbols, the allocator counts CPUs"),
    refuse(SYS_openat2, EACCES, "libraries look for optional files"),
    refuse(SYS_access, EACCES, "libraries look for optional files"),
    refuse(SYS_faccessat, EACCES, "libraries look for optional files"),
    refuse(SYS_faccessat2, EACCES, "libraries look for optional files"),
    refuse(SYS_stat, EACCES, "libraries look for optional files"),
    refuse(SYS_lstat, EACCES, "libraries look for optional files"),
    refuse(SYS_newfstatat, EACCES, "libraries look for optional files"),
    refuse(SYS_statx, EACCES, "libraries look for optional files"),
    refuse(SYS_readlink, EACCES, "backtraces ask for /proc/self/exe"),
    refuse(SYS_readlinkat, EACCES, "backtraces ask for /proc/self/exe"),
    refuse(SYS_getcwd, EACCES, "backtraces shorten paths"),
];

/// A thread may ask for its limits, not change them: a new limit is the null pointer.
#[rustfmt::skip]
pub(in crate::sandbox) const READ_LIMITS: Rule = allow_masked(
    SYS_prlimit64,
    2,
    u64::MAX,
    0,
    "size of the main thread's stack, number of descriptors",
);

/// A socket of the family `AF_UNIX` only.
#[rustfmt::skip]
pub(in crate::sandbox) const UNIX_SOCKET: Rule = allow_if(
    SYS_socket,
    0,
    AF_UNIX.cast_unsigned(),
    "a socket for ioctls on network interfaces; cannot reach another host",
);
