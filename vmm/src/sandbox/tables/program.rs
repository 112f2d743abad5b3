//! System calls of programs that are no machines: they serve clients of the network, and use files.

use libc::*;

use crate::sandbox::rules::{Rule, allow, allow_if, fcntl, ioctl, refuse};

/// Connections that are accepted, and those to sockets of this host. Neither what listens nor a connection to another host can be made.
#[rustfmt::skip]
pub(in crate::sandbox) const NETWORK: &[Rule] = &[
    allow_if(SYS_socket, 0, AF_UNIX.cast_unsigned(), "connections to sockets of this host"),
    allow(SYS_connect, "connections to sockets of this host"),
    allow(SYS_sendto, "what is said"),
    allow(SYS_recvfrom, "what is heard"),
    allow(SYS_sendmsg, "what is said"),
    allow(SYS_recvmsg, "what is heard"),
    allow(SYS_setsockopt, "TCP_NODELAY, time limits"),
    allow(SYS_socketpair, "data of disks on their way through a thread"),
    allow(SYS_pipe2, "wakes"),
    ioctl(0x541b, "FIONREAD: input that waits"),
];

/// Files; where, Landlock says.
#[rustfmt::skip]
pub(in crate::sandbox) const FILES: &[Rule] = &[
    allow(SYS_open, "files"),
    allow(SYS_openat, "files"),
    refuse(SYS_openat2, ENOSYS, "its arguments lie in memory; libraries then use openat"),
    allow(SYS_stat, "what a file is"),
    allow(SYS_lstat, "what a file is"),
    allow(SYS_newfstatat, "what a file is"),
    allow(SYS_statx, "what a file is"),
    allow(SYS_fstatfs, "the file system"),
    allow(SYS_statfs, "the file system"),
    allow(SYS_access, "what may be done with a file"),
    allow(SYS_faccessat, "what may be done with a file"),
    allow(SYS_faccessat2, "what may be done with a file"),
    allow(SYS_readlink, "absolute paths"),
    allow(SYS_readlinkat, "absolute paths"),
    allow(SYS_getcwd, "absolute paths"),
    allow(SYS_getdents64, "what is in a folder"),
    allow(SYS_pread64, "reads"),
    allow(SYS_pwrite64, "writes"),
    allow(SYS_preadv, "reads"),
    allow(SYS_pwritev, "writes"),
    allow(SYS_preadv2, "reads"),
    allow(SYS_pwritev2, "writes"),
    allow(SYS_copy_file_range, "copies"),
    allow(SYS_sendfile, "copies"),
    allow(SYS_fdatasync, "what was written lasts"),
    allow(SYS_fsync, "what was written lasts"),
    allow(SYS_ftruncate, "sizes of files"),
    allow(SYS_fallocate, "sizes of files"),
    allow(SYS_fadvise64, "data that are not read again"),
    allow(SYS_fchmod, "private files"),
    allow(SYS_mkdir, "folders"),
    allow(SYS_mkdirat, "folders"),
    allow(SYS_rename, "files that are replaced as a whole"),
    allow(SYS_renameat, "files that are replaced as a whole"),
    allow(SYS_renameat2, "files that are replaced as a whole"),
    allow(SYS_link, "files that must not be there yet"),
    allow(SYS_linkat, "files that must not be there yet"),
    allow(SYS_unlink, "files that are no longer needed"),
    allow(SYS_unlinkat, "files that are no longer needed"),
    allow(SYS_rmdir, "folders that are no longer needed"),
    allow(SYS_flock, "one at a time"),
    fcntl(F_OFD_SETLK, "one at a time"),
    fcntl(F_OFD_GETLK, "one at a time"),
    fcntl(F_SETLK, "one at a time"),
    allow(SYS_umask, "private files"),
    allow(SYS_dup, "duplicates of files"),
    allow(SYS_geteuid, "as whom does it run?"),
    allow(SYS_getuid, "as whom does it run?"),
    allow(SYS_uname, "the host's name"),
    allow(SYS_sysinfo, "how much memory there is"),
    ioctl(0x1268, "BLKSSZGET: sector size"),
    ioctl(0x127b, "BLKPBSZGET: physical sector size"),
    ioctl(0x8008_1272, "BLKGETSIZE64: size"),
];
