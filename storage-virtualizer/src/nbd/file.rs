//! A file or device of the host, or whatever else block-io opens, as an export.

use block_io::{BlockDevice, Device, IoError};

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
        let Device::Host(device) = &self.device else {
            extents.add(length, Extent::Data);
            return Ok(());
        };
        let end = offset + length;
        let mut at = offset;
        while at < end && !extents.is_full() {
            // Both ask the file system, which has this in memory; neither reads the file.
            match device.next_data(at) {
                Ok(Some(data)) if data > at => {
                    extents.add(data.min(end) - at, Extent::Hole);
                    at = data;
                }
                Ok(None) => {
                    extents.add(end - at, Extent::Hole);
                    at = end;
                }
                Ok(Some(_)) => match device.next_hole(at) {
                    Ok(hole) if hole > at => {
                        extents.add(hole.min(end) - at, Extent::Data);
                        at = hole;
                    }
                    _ => {
                        extents.add(end - at, Extent::Data);
                        at = end;
                    }
                },
                // A block device, or a file system that does not tell.
                Err(_) => {
                    extents.add(end - at, Extent::Data);
                    at = end;
                }
            }
        }
        Ok(())
    }
}
