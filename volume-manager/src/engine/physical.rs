//! Where the bytes of a volume are on devices, for who reads them there without us.

use block_io::{BlockDevice, Clock};

use super::map::SectionMap;
use super::volume::Volume;
use crate::model::{DeviceId, MemberState};

/// A run of a volume's bytes on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Physical {
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The device.
    pub device: DeviceId,
    /// First byte on the device, private region included.
    pub start: u64,
    /// Section and member that hold it. Their numbers are not used again, so the same number means the same place since.
    pub identity: u64,
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Volume<D, C> {
    /// One copy of each byte of a range that can be read from a device as it is, in order. None if the range does not lie within the
    /// volume, copies of it may differ since a crash, or the only copies are lost, so that data have to be computed.
    pub fn physical(&self, offset: u64, length: u64) -> Option<Vec<Physical>> {
        let map = self.volume.map();
        if offset.checked_add(length)? > map.volume.size || self.volume.is_unclean(offset, length) {
            return None;
        }
        let mut runs = Vec::new();
        for (section, from, part) in map.parts(offset, length) {
            physical_of_section(section, from, part, &mut runs)?;
        }
        Some(runs)
    }
}

fn physical_of_section<D: BlockDevice>(
    section: &SectionMap<D>,
    from: u64,
    length: u64,
    runs: &mut Vec<Physical>,
) -> Option<()> {
    let mut skip = 0;
    while skip < length {
        let (column, at, count) = if section.shape.columns == 1 {
            (0, from + skip, length - skip)
        } else {
            let piece = section.shape.piece(from + skip, length - skip);
            let column = section.shape.data_column(piece.row, piece.data);
            (column, section.shape.in_member(&piece), piece.length)
        };
        let members = &section.columns.get(column)?.members;
        let member = members
            .iter()
            .find(|member| member.state == MemberState::InSync && member.is_alive())?;
        let identity = u64::from(section.id) << 32 | u64::from(member.id.0);
        let mut offset = section.start + from + skip;
        for (device, start, length) in member.places(at, count) {
            match runs.last_mut() {
                Some(last)
                    if last.identity == identity
                        && last.device == device
                        && last.start + last.length == start
                        && last.offset + last.length == offset =>
                {
                    last.length += length;
                }
                _ => runs.push(Physical {
                    offset,
                    length,
                    device,
                    start,
                    identity,
                }),
            }
            offset += length;
        }
        skip += count;
    }
    Some(())
}
