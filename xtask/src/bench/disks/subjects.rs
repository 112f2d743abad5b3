//! Who is measured, and by what.

use super::pool::Disk;

/// A load, as the load generator and as fio call it.
pub(super) struct Load {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [&'static str],
    pub(super) fio: &'static [&'static str],
}

impl Load {
    pub(super) fn writes(&self) -> bool {
        self.name.contains('w')
    }
}

/// rr and rw: random reads and writes of 4 KiB at depth 1 and 32; fw: one such write to each 64 KiB, in scattered order; r and
/// w: 128 KiB one after the other, 16 at once; sr and sw: the same, with data in segments of 4 KiB, as guests have it whose pages lie here and
/// there. First writes come before other writes.
pub(super) const LOADS: &[Load] = &[
    Load {
        name: "fw32",
        arguments: &[
            "--pattern",
            "randwrite",
            "--depth",
            "32",
            "--once",
            "--stride",
            "65536",
        ],
        fio: &[],
    },
    Load {
        name: "rr1",
        arguments: &["--pattern", "randread", "--depth", "1"],
        fio: &["--rw=randread", "--bs=4k", "--iodepth=1"],
    },
    Load {
        name: "rw1",
        arguments: &["--pattern", "randwrite", "--depth", "1"],
        fio: &["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    },
    Load {
        name: "rr32",
        arguments: &["--pattern", "randread", "--depth", "32"],
        fio: &["--rw=randread", "--bs=4k", "--iodepth=32"],
    },
    Load {
        name: "rw32",
        arguments: &["--pattern", "randwrite", "--depth", "32"],
        fio: &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    },
    Load {
        name: "r128",
        arguments: &["--pattern", "read", "--depth", "16", "--block-size", "131072"],
        fio: &["--rw=read", "--bs=128k", "--iodepth=16"],
    },
    Load {
        name: "w128",
        arguments: &["--pattern", "write", "--depth", "16", "--block-size", "131072"],
        fio: &["--rw=write", "--bs=128k", "--iodepth=16"],
    },
    Load {
        name: "sr128",
        arguments: &[
            "--pattern",
            "read",
            "--depth",
            "16",
            "--block-size",
            "131072",
            "--segment",
            "4096",
        ],
        fio: &[],
    },
    Load {
        name: "sw128",
        arguments: &[
            "--pattern",
            "write",
            "--depth",
            "16",
            "--block-size",
            "131072",
            "--segment",
            "4096",
        ],
        fio: &[],
    },
];

const ALL: &[&str] = &["rr1", "rw1", "rr32", "rw32", "r128", "w128"];
/// For comparison with first writes, and with memory that is held.
const ALL_AND_SCATTERED: &[&str] = &[
    "rr1", "rw1", "rr32", "rw32", "fw32", "r128", "w128", "sr128", "sw128",
];
/// Where the kernel need not look up pages.
const HELD: &[&str] = &["rr32", "rw32", "r128", "w128", "sr128", "sw128"];
/// Where several submissions share a system call.
const DEEP: &[&str] = &["rr32", "rw32", "r128", "w128"];
const SHALLOW: &[&str] = &["rr1", "rw1"];
const READS: &[&str] = &["rr1", "rr32", "r128"];
const FIRST: &[&str] = &["fw32", "rw32"];

/// Who is measured.
pub(super) struct Subject {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    loads: &'static [&'static str],
}

impl Subject {
    pub(super) fn takes(&self, load: &Load) -> bool {
        self.loads.contains(&load.name)
    }

    /// The disk of the pool that it needs.
    pub(super) fn disk(&self) -> Option<Disk> {
        match self.kind {
            Kind::Pool(disk, _) => Some(disk),
            _ => None,
        }
    }
}

pub(super) enum Kind {
    /// fio on the raw file, with these arguments.
    Fio(&'static [&'static str]),
    /// `smsvmm share vhost-user` of the raw file, with these arguments.
    Image(&'static [&'static str]),
    /// The same of a disk of the pool.
    Pool(Disk, &'static [&'static str]),
    /// qemu-storage-daemon with this format on this file.
    Qemu(&'static str, &'static str),
    /// qemu-storage-daemon with a new qcow2 overlay that was made with these options.
    Overlay(&'static str),
}

const POLLING: &[&str] = &["--poll-us", "50"];
const PINNED: &[&str] = &["--pin-memory"];
/// As a pool has by default where there are four processors or more.
const HELPED: &[&str] = &["--io-helpers", "1"];

pub(super) const SUBJECTS: &[Subject] = &[
    Subject {
        name: LIMIT,
        kind: Kind::Fio(&[]),
        loads: ALL,
    },
    Subject {
        name: "limit: fio, batched",
        kind: Kind::Fio(&[
            "--iodepth_batch_submit=16",
            "--iodepth_batch_complete_min=1",
            "--iodepth_batch_complete_max=16",
        ]),
        loads: DEEP,
    },
    Subject {
        name: FLOOR,
        kind: Kind::Image(&[]),
        loads: ALL_AND_SCATTERED,
    },
    Subject {
        name: "floor, polling",
        kind: Kind::Image(POLLING),
        loads: SHALLOW,
    },
    Subject {
        name: "floor, memory held",
        kind: Kind::Image(PINNED),
        loads: HELD,
    },
    Subject {
        name: PLAIN,
        kind: Kind::Pool(Disk::Plain, &[]),
        loads: ALL_AND_SCATTERED,
    },
    Subject {
        name: PLAIN_POLLING,
        kind: Kind::Pool(Disk::Plain, POLLING),
        loads: SHALLOW,
    },
    Subject {
        name: PLAIN_PINNED,
        kind: Kind::Pool(Disk::Plain, PINNED),
        loads: HELD,
    },
    Subject {
        name: PLAIN_HELPED,
        kind: Kind::Pool(Disk::Plain, HELPED),
        loads: DEEP,
    },
    Subject {
        name: MIRROR,
        kind: Kind::Pool(Disk::Mirror, &[]),
        loads: ALL,
    },
    Subject {
        name: "pool: stripe of 4",
        kind: Kind::Pool(Disk::Stripe, &[]),
        loads: ALL,
    },
    Subject {
        name: CHAIN,
        kind: Kind::Pool(Disk::Chain, &[]),
        loads: READS,
    },
    Subject {
        name: SNAPSHOT,
        kind: Kind::Pool(Disk::Fresh, &[]),
        loads: FIRST,
    },
    Subject {
        name: RAW,
        kind: Kind::Qemu("raw", "disk.raw"),
        loads: ALL_AND_SCATTERED,
    },
    Subject {
        name: "qsd qcow2",
        kind: Kind::Qemu("qcow2", "disk.qcow2"),
        loads: DEEP,
    },
    Subject {
        name: OVERLAY,
        kind: Kind::Overlay("cluster_size=64k"),
        loads: FIRST,
    },
    Subject {
        name: EXTENDED,
        kind: Kind::Overlay("cluster_size=64k,extended_l2=on"),
        loads: FIRST,
    },
];

pub(super) const LIMIT: &str = "limit: fio io_uring";
/// The same server and engine on a file of the host.
pub(super) const FLOOR: &str = "floor";
pub(super) const PLAIN: &str = "pool: plain volume";
pub(super) const PLAIN_POLLING: &str = "pool: plain volume, polling";
/// The kernel holds the front-end's memory, as it may where a virtual machine's memory is there from the start.
pub(super) const PLAIN_PINNED: &str = "pool: plain volume, memory held";
pub(super) const PLAIN_HELPED: &str = "pool: plain volume, helper";
pub(super) const MIRROR: &str = "pool: mirror of 2";
pub(super) const CHAIN: &str = "pool: chain of 8, plain";
pub(super) const SNAPSHOT: &str = "pool: fresh snapshot, plain";
/// qemu-storage-daemon.
pub(super) const RAW: &str = "qsd raw";
pub(super) const OVERLAY: &str = "qsd overlay, 64 KiB";
pub(super) const EXTENDED: &str = "qsd overlay, extended L2";
