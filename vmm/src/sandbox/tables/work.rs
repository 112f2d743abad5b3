//! System calls of our own work, by purpose.

use libc::*;

use super::runtime::{READ_LIMITS, UNIX_SOCKET};
use crate::sandbox::rules::{Rule, allow, allow_if, allow_masked, fcntl, ioctl, refuse};

/// Waiting for many descriptors, and making eventfds and timers for it.
#[rustfmt::skip]
pub(in crate::sandbox) const EVENT_LOOP: &[Rule] = &[
    allow(SYS_epoll_wait, "the loop waits"),
    allow(SYS_epoll_pwait, "the loop waits"),
    allow(SYS_epoll_pwait2, "the loop waits"),
    allow(SYS_epoll_ctl, "what the loop waits for"),
    allow(SYS_epoll_create1, "a loop of a thread's own"),
    allow(SYS_eventfd2, "doorbells, wakes"),
    allow(SYS_timerfd_create, "time-outs"),
    allow(SYS_timerfd_settime, "time-outs"),
    allow(SYS_timerfd_gettime, "time-outs"),
];

/// The guest's accesses to ports and registers, beyond what goes to KVM. No thread is nearer to a hostile guest.
#[rustfmt::skip]
pub(in crate::sandbox) const GUEST_FACING: &[Rule] = &[
    allow_masked(SYS_sendto, 4, u64::MAX, 0, "console output to a connected socket"),
    allow(SYS_preadv2, "doorbells and interrupts are emptied without waiting, whoever shares them"),
    allow(SYS_sched_setaffinity, "vCPUs stay on the CPUs that the configuration names"),
    ioctl(0x4004_54d0, "TUNSETOFFLOAD: the guest's driver takes a network card into use"),
    ioctl(0x4004_54d9, "TUNSETQUEUE: the guest uses more or fewer queues"),
    ioctl(0x8004_54d2, "TUNGETIFF: was the tap interface deleted?"),
];

/// Packets between the guest and a tap interface or passt's socket.
#[rustfmt::skip]
pub(in crate::sandbox) const NET_QUEUE: &[Rule] = &[
    allow_masked(SYS_sendto, 4, u64::MAX, 0, "frames to a connected socket"),
    allow_masked(SYS_recvfrom, 4, u64::MAX, 0, "frames from a connected socket"),
    allow(SYS_sendmsg, "frames in pieces to a connected socket"),
    allow(SYS_recvmsg, "frames in pieces from a connected socket"),
    ioctl(0x4004_54d0, "TUNSETOFFLOAD: by the control queue"),
    ioctl(0x4004_54d9, "TUNSETQUEUE: by the control queue"),
    ioctl(0x8004_54d2, "TUNGETIFF: was the tap interface deleted?"),
];

/// Of io_uring_register(2).
const IORING_REGISTER_BUFFERS_UPDATE: u32 = 16;

/// I/O of disks: by io_uring, or where that is refused by threads that block.
#[rustfmt::skip]
pub(in crate::sandbox) const DISK: &[Rule] = &[
    allow(SYS_io_uring_enter, "requests and completions"),
    allow_if(SYS_io_uring_register, 1, IORING_REGISTER_BUFFERS_UPDATE, "guest memory that a ring holds"),
    allow(SYS_preadv2, "reads"),
    allow(SYS_pwritev2, "writes"),
    allow(SYS_preadv, "reads; preadv2 without flags in some C libraries"),
    allow(SYS_pwritev, "writes; pwritev2 without flags in some C libraries"),
    allow(SYS_pread64, "reads"),
    allow(SYS_pwrite64, "writes"),
    allow(SYS_fdatasync, "flushes"),
    allow(SYS_fsync, "flushes of metadata"),
    allow(SYS_fallocate, "discards and zeroes in files"),
    RELEASE_IMAGE,
    ioctl(0x1277, "BLKDISCARD: discards on block devices"),
    ioctl(0x127f, "BLKZEROOUT: zeroes on block devices"),
];

/// Requests to devices of a pool on other machines (NBD), over sockets that are connected already.
#[rustfmt::skip]
pub(in crate::sandbox) const REMOTE_DEVICE: &[Rule] = &[
    allow_masked(SYS_sendto, 4, u64::MAX, 0, "requests to a connected socket"),
    allow_masked(SYS_recvfrom, 4, u64::MAX, 0, "answers from a connected socket"),
    allow(SYS_sendmsg, "requests with data to a connected socket"),
    allow(SYS_readv, "data from a connected socket"),
    allow(SYS_shutdown, "end of a connection"),
];

/// Messages to the process that serves a disk, over a socket that a helper has connected.
#[rustfmt::skip]
pub(in crate::sandbox) const DISK_LINK: &[Rule] = &[
    allow_masked(SYS_sendto, 4, u64::MAX, 0, "requests to the helper that connects"),
    allow(SYS_sendmsg, "messages with descriptors to a connected socket"),
    allow(SYS_recvmsg, "answers, and connected sockets from the helper"),
];

/// Whoever lets go of an image last unlocks it.
const RELEASE_IMAGE: Rule = fcntl(F_OFD_SETLK, "locks on images");

/// The main loop: consoles, reboots, the end.
#[rustfmt::skip]
pub(in crate::sandbox) const MAIN_LOOP: &[Rule] = &[
    allow(SYS_accept4, "clients of a console's socket"),
    allow(SYS_getsockopt, "errors of a client's connection"),
    allow(SYS_shutdown, "end of a client"),
    ioctl(0x540b, "TCFLSH: unread input of a terminal"),
    ioctl(0x540f, "TIOCGPGRP: in the foreground of the terminal?"),
    ioctl(0x541b, "FIONREAD: input that waits"),
    allow(SYS_pread64, "kernel and initrd are read again at a reboot"),
    allow(SYS_preadv, "kernel and initrd are read again at a reboot"),
    allow(SYS_statx, "is it still our socket that is to be removed? size of kernel and initrd"),
    allow(SYS_newfstatat, "is it still our socket that is to be removed?"),
    allow(SYS_lstat, "is it still our socket that is to be removed?"),
    allow(SYS_readlink, "is it still our link to a pseudo-terminal that is to be removed?"),
    allow(SYS_readlinkat, "is it still our link to a pseudo-terminal that is to be removed?"),
    allow(SYS_unlink, "sockets and links are removed at the end; where, Landlock says"),
    allow(SYS_unlinkat, "sockets and links are removed at the end; where, Landlock says"),
    allow(SYS_fallocate, "shared guest memory is emptied at a reboot"),
    RELEASE_IMAGE,
    allow(SYS_inotify_rm_watch, "end of a pseudo-terminal"),
    allow_if(SYS_kill, 1, SIGKILL.cast_unsigned(), "passt ends with its card"),
    allow(SYS_pidfd_send_signal, "passt ends with its card"),
    allow(SYS_wait4, "passt's exit status"),
    allow(SYS_waitid, "passt's exit status"),
    READ_LIMITS,
];

/// Disks that are attached, or added, while others are used.
#[rustfmt::skip]
pub(in crate::sandbox) const OPEN_DISKS: &[Rule] = &[
    allow(SYS_open, "images and devices; where, Landlock says"),
    allow(SYS_openat, "images and devices; where, Landlock says"),
    refuse(SYS_openat2, ENOSYS, "its arguments lie in memory; libraries then use openat"),
    allow(SYS_stat, "what an image is"),
    allow(SYS_lstat, "what an image is"),
    allow(SYS_newfstatat, "what an image is"),
    allow(SYS_statx, "what an image is, its alignment"),
    allow(SYS_fstatfs, "the image's file system"),
    allow(SYS_statfs, "the image's file system"),
    allow(SYS_access, "explanations of errors"),
    allow(SYS_faccessat, "explanations of errors"),
    allow(SYS_faccessat2, "explanations of errors"),
    allow(SYS_readlink, "explanations of errors: who has it open"),
    allow(SYS_readlinkat, "explanations of errors: who has it open"),
    allow(SYS_getdents64, "explanations of errors: who has it open"),
    allow(SYS_getcwd, "absolute paths"),
    allow(SYS_flock, "locks on images"),
    RELEASE_IMAGE,
    fcntl(F_OFD_GETLK, "locks on images"),
    ioctl(0x1268, "BLKSSZGET: sector size"),
    ioctl(0x127b, "BLKPBSZGET: physical sector size"),
    ioctl(0x1279, "BLKIOOPT: best size of requests"),
    ioctl(0x1278, "BLKIOMIN: best size of requests"),
    ioctl(0x8008_1272, "BLKGETSIZE64: size"),
    ioctl(0x125e, "BLKROGET: read-only?"),
    ioctl(0x801c_581f, "FS_IOC_FSGETXATTR: how space is given to a file"),
    ioctl(0x401c_5820, "FS_IOC_FSSETXATTR: how space is given to a file"),
    allow(SYS_io_uring_setup, "the ring of a new disk worker"),
    allow(SYS_io_uring_register, "the ring of a new disk worker"),
];

/// Network cards that are attached while the VM runs.
#[rustfmt::skip]
pub(in crate::sandbox) const OPEN_TAPS: &[Rule] = &[
    UNIX_SOCKET,
    ioctl(0x8921, "SIOCGIFMTU: MTU of a tap interface"),
    ioctl(0x8927, "SIOCGIFHWADDR: address of a tap interface"),
    ioctl(0x8933, "SIOCGIFINDEX: does the tap interface exist?"),
    ioctl(0x8910, "SIOCGIFNAME: does the tap interface exist?"),
    ioctl(0x8913, "SIOCGIFFLAGS: is the tap interface up?"),
    ioctl(0x4004_54ca, "TUNSETIFF: a queue of a tap interface"),
    ioctl(0x8004_54cf, "TUNGETFEATURES: what the kernel's tap can do"),
    ioctl(0x8004_54d2, "TUNGETIFF: what the tap interface can do"),
    ioctl(0x4004_54d8, "TUNSETVNETHDRSZ: header of packets"),
];

/// Clients of the management socket, which exists already.
#[rustfmt::skip]
pub(in crate::sandbox) const SERVE_CLIENTS: &[Rule] = &[
    allow(SYS_accept4, "clients"),
    allow(SYS_getsockopt, "who the client is"),
    allow(SYS_getpeername, "who the client is"),
    allow(SYS_geteuid, "is the client the same user?"),
    allow(SYS_getsockname, "the asynchronous runtime takes over a socket"),
    allow(SYS_shutdown, "end of a client"),
    allow(SYS_unlink, "the socket is removed at the end; where, Landlock says"),
    allow(SYS_unlinkat, "the socket is removed at the end; where, Landlock says"),
    allow_if(SYS_kill, 1, SIGKILL.cast_unsigned(), "passt ends with its card"),
    allow(SYS_pidfd_send_signal, "passt ends with its card"),
    allow(SYS_wait4, "passt's exit status"),
    allow(SYS_waitid, "passt's exit status"),
    READ_LIMITS,
];

/// The thread that turns signals into requests.
#[rustfmt::skip]
pub(in crate::sandbox) const SIGNALS: &[Rule] = &[
    allow(SYS_rt_sigtimedwait, "the next signal"),
    allow(SYS_eventfd2, "wakes"),
];
