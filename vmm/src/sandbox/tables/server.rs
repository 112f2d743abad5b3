//! System calls of programs that serve disks to others, beyond those of disk workers.

use libc::*;

use super::runtime::READ_LIMITS;
use crate::sandbox::rules::{Rule, allow, allow_if, allow_own_process, fcntl, ioctl};

/// Clients that come to what listens already, what they say, and the memory that they share. The calls that move data are allowed whatever
/// their arguments are: the kernel need not look at those (`filter`), and there is no socket that could be sent to somebody else by it.
#[rustfmt::skip]
pub(in crate::sandbox) const CLIENTS: &[Rule] = &[
    allow(SYS_accept4, "clients"),
    allow(SYS_getsockopt, "who a client is"),
    allow(SYS_getpeername, "who a client is"),
    allow(SYS_getsockname, "where a client has come to"),
    allow(SYS_geteuid, "is the client of management the same user?"),
    allow(SYS_setsockopt, "TCP_NODELAY, keep-alive"),
    allow(SYS_sendto, "what is said to clients and to devices on other machines"),
    allow(SYS_sendmsg, "what is said to clients and to devices on other machines"),
    allow(SYS_recvfrom, "what is heard"),
    allow(SYS_recvmsg, "what is heard; memory of front-ends"),
    allow(SYS_shutdown, "end of a connection"),
    ioctl(0x541b, "FIONREAD: input that waits"),
    allow(SYS_memfd_create, "memory in which a front-end keeps what is in flight"),
    allow(SYS_ftruncate, "its size"),
    fcntl(F_ADD_SEALS, "memory that is shared does not become shorter"),
    fcntl(F_GET_SEALS, "memory that is shared does not become shorter"),
    allow(SYS_readlink, "is what a front-end has sent an eventfd?"),
    allow(SYS_readlinkat, "is what a front-end has sent an eventfd?"),
    allow(SYS_getcwd, "absolute paths in what is told"),
    // The end.
    allow(SYS_statx, "is it still our socket that is to be removed?"),
    allow(SYS_newfstatat, "is it still our socket that is to be removed?"),
    allow(SYS_lstat, "is it still our socket that is to be removed?"),
    allow(SYS_unlink, "sockets are removed at the end; where, Landlock says"),
    allow(SYS_unlinkat, "sockets are removed at the end; where, Landlock says"),
    READ_LIMITS,
];

/// Connections to devices on other machines, whose names the C library looks up: in files, by netlink which addresses this host has, by DNS.
#[rustfmt::skip]
pub(in crate::sandbox) const CONNECT: &[Rule] = &[
    allow_if(SYS_socket, 0, AF_UNIX.cast_unsigned(), "servers on this host, also of names"),
    allow_if(SYS_socket, 0, AF_INET.cast_unsigned(), "servers"),
    allow_if(SYS_socket, 0, AF_INET6.cast_unsigned(), "servers"),
    allow_if(SYS_socket, 0, AF_NETLINK.cast_unsigned(), "which addresses this host has"),
    allow(SYS_connect, "servers"),
    allow(SYS_bind, "which addresses this host has; where else, Landlock says"),
    allow(SYS_getsockopt, "is it connected?"),
    allow(SYS_getpeername, "is it connected?"),
    allow(SYS_getsockname, "which address is used"),
    allow(SYS_setsockopt, "TCP_NODELAY, time limits"),
    allow(SYS_sendto, "what is agreed on, questions for names"),
    allow(SYS_sendmsg, "what is agreed on"),
    allow(SYS_sendmmsg, "questions for names"),
    allow(SYS_recvfrom, "what is agreed on, answers"),
    allow(SYS_recvmsg, "what is agreed on, answers"),
    allow(SYS_shutdown, "end of a connection"),
    ioctl(0x541b, "FIONREAD: an answer's size"),
    allow(SYS_open, "how names are looked up"),
    allow(SYS_openat, "how names are looked up"),
    allow(SYS_stat, "how names are looked up"),
    allow(SYS_statx, "how names are looked up"),
    allow(SYS_newfstatat, "how names are looked up"),
    allow(SYS_access, "how names are looked up"),
    allow(SYS_readlink, "how names are looked up"),
    allow(SYS_pread64, "how names are looked up"),
    allow(SYS_uname, "this host's name"),
    allow(SYS_geteuid, "whose files these are"),
    allow(SYS_getuid, "whose files these are"),
];

/// What is served later, beyond opening it: sockets to listen at, marks that a device is used, requests to end.
#[rustfmt::skip]
pub(in crate::sandbox) const OPEN: &[Rule] = &[
    allow(SYS_listen, "the socket of a disk; no other host, Landlock says"),
    allow(SYS_fchmod, "the socket of a disk is for one user"),
    allow(SYS_mkdir, "the folder in /dev/shm"),
    allow(SYS_mkdirat, "the folder in /dev/shm"),
    allow(SYS_capset, "threads that are started keep less"),
    allow_own_process(SYS_kill, 0, "the end, as by a signal"),
];
