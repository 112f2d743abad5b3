//! The virtual machine monitor of smsvmm: guest memory, vCPUs, PCI, virtio transport, platform devices, boot.

pub mod bus;
mod eventfds;

pub mod acpi;
pub mod cpuid;
pub mod layout;

pub mod boot;
pub mod config;
pub mod host;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod transport;
pub mod vcpu;
pub mod vm;

pub mod console;
pub mod devices;
pub mod platform;
pub mod sandbox;
