//! The virtual machine monitor of smsvmm: guest memory, vCPUs, PCI, virtio transport, platform devices, boot.

pub mod bus;

pub mod layout;
