//! The virtual machine monitor: vCPUs, memory, PCI, virtio transport, platform devices.
