//! A file or device of the host, or whatever else block-io opens, as an export.

use block_io::{Allocation, BlockDevice, Device, IoError};

use super::export::{Export, Extent, Extents};

/// An export of a plain device.
#[derive(Debug)]
pub struct DeviceExport {
    name: String,
    description: String,
    device: Device,
    read_only: bool,
}

impl DeviceExport {
    /// Exports `device` as `name`; writes are refused if `read_only`, or if the device takes none.
    pub fn new(name: String, device: Device, read_only: bool) -> Self {
        Self {
            description: device.name().to_owned(),
            name,
            read_only: read_only || device.geometry().read_only,
            device,
        }
    }
}

impl Export for DeviceExport {
    type Disk = Device;

    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn disk(&self) -> &Device {
        &self.device
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn zeroes_fast(&self) -> bool {
        match &self.device {
            Device::Host(device) => device.zeroes_fast(),
            _ => false,
        }
    }

    async fn allocation(&self, offset: u64, length: u64, extents: &mut Extents) -> Result<(), IoError> {
        let end = offset + length;
        let mut at = offset;
        while at < end && !extents.is_full() {
            let (kind, bytes) = self.device.allocation(at, end - at).await?;
            extents.add(
                bytes,
                match kind {
                    Allocation::Data => Extent::Data,
                    Allocation::Zeroes => Extent::Zeroes,
                    Allocation::Hole => Extent::Hole,
                },
            );
            at += bytes;
        }
        Ok(())
    }
}
