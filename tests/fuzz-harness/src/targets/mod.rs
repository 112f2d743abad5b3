//! The bodies, and the list of them.

mod backup;
mod block_queue;
mod block_request;
mod config;
mod console;
mod disk_descriptor;
mod disk_image;
mod escape;
mod expanded_api;
mod filesys_image;
mod filesys_media;
mod iscsi;
mod nbd;
mod net;
mod pci;
mod platform;
mod pool_device;
mod rng;
mod rtc;
mod scsi;
mod scsi_queue;
mod serial;
mod transport;
mod vhost_user;

use crate::Target;

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "pci",
        about: "PCI configuration space, by ECAM and ports, and the decoding of BARs",
        max_length: 1024,
        is_possible: always,
        body: pci::run,
    },
    Target {
        name: "transport",
        about: "virtio over PCI: registers, MSI-X, doorbells, BARs",
        max_length: 1024,
        is_possible: transport::is_possible,
        body: transport::run,
    },
    Target {
        name: "platform",
        about: "all I/O ports of the mainboard",
        max_length: 1024,
        is_possible: always,
        body: platform::run,
    },
    Target {
        name: "serial",
        about: "the 16550 serial port against a model of its queue",
        max_length: 512,
        is_possible: always,
        body: serial::run,
    },
    Target {
        name: "rtc",
        about: "the real-time clock shows a date whatever was written",
        max_length: 512,
        is_possible: always,
        body: rtc::run,
    },
    Target {
        name: "block-request",
        about: "virtio-blk: descriptor chains and requests against a model disk",
        max_length: 1024,
        is_possible: always,
        body: block_request::run,
    },
    Target {
        name: "block-queue",
        about: "virtio-blk: queues served by an I/O worker",
        max_length: 1024,
        is_possible: always,
        body: block_queue::run,
    },
    Target {
        name: "scsi-queue",
        about: "virtio-scsi: queues served by an I/O worker, units that come and go",
        max_length: 1024,
        is_possible: always,
        body: scsi_queue::run,
    },
    Target {
        name: "rng",
        about: "virtio-rng: a queue served by the event loop",
        max_length: 512,
        is_possible: always,
        body: rng::run,
    },
    Target {
        name: "console",
        about: "virtio-console: queues served by the event loop, a client at its socket",
        max_length: 512,
        is_possible: always,
        body: console::run,
    },
    Target {
        name: "net",
        about: "virtio-net: queues served by a thread, a peer that may be hostile",
        max_length: 1024,
        is_possible: always,
        body: net::run,
    },
    Target {
        name: "nbd",
        about: "the NBD server: handshake, requests and replies against a model disk",
        max_length: 1024,
        is_possible: always,
        body: nbd::run,
    },
    Target {
        name: "iscsi",
        about: "the iSCSI target: login, PDUs in any phase, commands against a model disk",
        max_length: 1024,
        is_possible: always,
        body: iscsi::run,
    },
    Target {
        name: "config",
        about: "vm.toml and its overrides",
        max_length: 2048,
        is_possible: always,
        body: config::run,
    },
    Target {
        name: "escape",
        about: "the console's escape key",
        max_length: 256,
        is_possible: always,
        body: escape::run,
    },
    Target {
        name: "pool-device",
        about: "labels, slots and configurations on the devices of a pool",
        max_length: 1024,
        is_possible: always,
        body: pool_device::run,
    },
    Target {
        name: "filesys-media",
        about: "every structure of the file system's metadata",
        max_length: 256,
        is_possible: always,
        body: filesys_media::run,
    },
    Target {
        name: "filesys-image",
        about: "a whole file system with damaged pages whose checksums are right",
        max_length: 256,
        is_possible: always,
        body: filesys_image::run,
    },
    Target {
        name: "disk-descriptor",
        about: "the descriptor of a virtual disk",
        max_length: 256,
        is_possible: always,
        body: disk_descriptor::run,
    },
    Target {
        name: "disk-image",
        about: "qcow2 images that are imported",
        max_length: 512,
        is_possible: always,
        body: disk_image::run,
    },
    Target {
        name: "vhost-user",
        about: "vhost-user-blk: messages, descriptors, shared memory of a hostile front-end",
        max_length: 512,
        is_possible: always,
        body: vhost_user::run,
    },
    Target {
        name: "scsi",
        about: "SCSI disks: commands of two initiators against a model disk",
        max_length: 1024,
        is_possible: always,
        body: scsi::run,
    },
    Target {
        name: "expanded-api",
        about: "the expanded API: requests, fragments, tags of a guest that may touch only its own",
        max_length: 512,
        is_possible: always,
        body: expanded_api::run,
    },
    Target {
        name: "backup-archive",
        about: "archives of backups whose frames are right and whose content is made up",
        max_length: 256,
        is_possible: always,
        body: backup::archive,
    },
    Target {
        name: "backup-plan",
        about: "what agents say to a mover, and the checks of plans",
        max_length: 256,
        is_possible: always,
        body: backup::messages,
    },
];

fn always() -> bool {
    true
}
