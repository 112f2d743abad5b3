//! INQUIRY: what the unit is, and the pages of vital product data (SPC-4 §6.6, §7.8; SBC-4 §6.6).

use block_io::{BlockDevice, Geometry};

use super::dispatch::Call;
use super::sense::Sense;
use super::transfer::{Moved, length16, number, put};
use super::unit::{Provisioning, UnitOptions};
use super::vendor::VENDOR_PAGE;
use super::{Check, Command, Nexus};

/// Who made this, as in the list of vendors of T10: eight bytes.
const VENDOR: &[u8; 8] = b"SMSVMM  ";
/// Standards that are claimed (SPC-4 §6.6.2): SAM-5, SPC-4, SBC-3.
const VERSIONS: [u16; 3] = [0x00a0, 0x0460, 0x04c0];
/// Peripheral qualifier and device type of a LUN without a unit.
const ABSENT: u8 = 0x7f;
/// Device type of a well-known logical unit.
const WELL_KNOWN: u8 = 0x1e;

/// The longest transfer that is best in one command, in bytes.
pub(super) const OPTIMAL_TRANSFER: u64 = 1 << 20;
/// The longest UNMAP, WRITE SAME in blocks: so that one command does not keep a disk busy for ever.
pub(super) const MAX_RANGE_BLOCKS: u32 = 1 << 22;
/// The most descriptors of an UNMAP.
pub(super) const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// The most blocks of a COMPARE AND WRITE.
const MAX_COMPARE_BLOCKS: u8 = u8::MAX;

pub(super) fn inquiry<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let options = call.unit.options();
    let allocation = u64::from(number::u16(call.cdb, 3));
    let vital = call.cdb[1] & 1 != 0;
    let page = call.cdb[2];
    let data = match (vital, page) {
        (false, 0) => standard(options, call.unit.with(|state| !state.groups.is_empty())),
        (false, _) => return Err(Sense::in_cdb(2, None).into()),
        (true, page) => {
            let content = vital_page(call, page)?;
            let mut data = vec![0, page];
            data.extend(length16(content.len()));
            data.extend(content);
            data
        }
    };
    Ok(put(call.command, &data, allocation))
}

/// INQUIRY to a LUN that has no unit (SPC-4 §6.6.2: peripheral qualifier 011b), or to the well-known LUN.
pub(super) fn absent(command: &Command<'_>, well_known: bool) -> Check<Moved> {
    let cdb = command.cdb;
    if cdb.get(1).is_some_and(|byte| byte & 1 != 0) || cdb.get(2).is_some_and(|page| *page != 0) {
        return Err(Sense::in_cdb(1, Some(0)).into());
    }
    let mut data = [0; 36];
    data[..5].copy_from_slice(&[if well_known { WELL_KNOWN } else { ABSENT }, 0, 6, 0x12, 31]);
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].fill(b' ');
    data[32..36].copy_from_slice(&revision());
    Ok(put(command, &data, number::u16(cdb, 3).into()))
}

/// The program's version, as four bytes.
fn revision() -> [u8; 4] {
    let mut revision = [b' '; 4];
    let version = env!("CARGO_PKG_VERSION").bytes();
    revision.iter_mut().zip(version).for_each(|(to, from)| *to = from);
    revision
}

/// `text` as printable ASCII, padded with spaces.
fn ascii<const N: usize>(text: &str) -> [u8; N] {
    let mut result = [b' '; N];
    let text = text.bytes().map(printable);
    result.iter_mut().zip(text).for_each(|(to, from)| *to = from);
    result
}

fn printable(byte: u8) -> u8 {
    if (0x20..0x7f).contains(&byte) { byte } else { b'_' }
}

fn standard(options: &UnitOptions, has_groups: bool) -> Vec<u8> {
    let mut data = vec![0; 64];
    data[1] = if options.removable { 0x80 } else { 0 };
    // SPC-4; HISUP, format 2.
    (data[2], data[3], data[4]) = (0x06, 0x12, 64 - 5);
    // Implicit ALUA; 3PC.
    data[5] = 0x08 | if has_groups { 0x10 } else { 0 };
    // CMDQUE.
    data[7] = 0x02;
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(&ascii::<16>(&options.identity.product));
    data[32..36].copy_from_slice(&revision());
    for (at, version) in VERSIONS.iter().enumerate() {
        data[58 + 2 * at..60 + 2 * at].copy_from_slice(&version.to_be_bytes());
    }
    data
}

/// The pages that exist, ascending.
const PAGES: [u8; 7] = [0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2];

fn vital_page<D: BlockDevice>(call: &Call<'_, D>, page: u8) -> Check<Vec<u8>> {
    let options = call.unit.options();
    let geometry = call.disk.geometry();
    Ok(match page {
        0x00 => {
            let mut pages = PAGES.to_vec();
            if options.vendor.is_some() {
                pages.push(VENDOR_PAGE);
            }
            pages
        }
        0x80 => serial(options),
        0x83 => identification(options, call.nexus, group_of(call)),
        0x86 => extended(),
        0xb0 => block_limits(options, &geometry),
        0xb1 => characteristics(),
        0xb2 => provisioning(options),
        VENDOR_PAGE => match &options.vendor {
            Some(vendor) => vendor.page(call.unit, call.nexus),
            None => return Err(Sense::in_cdb(2, None).into()),
        },
        _ => return Err(Sense::in_cdb(2, None).into()),
    })
}

fn group_of<D>(call: &Call<'_, D>) -> Option<u16> {
    call.unit.with(|state| {
        let mut groups = state.groups.iter();
        let own = groups.find(|group| group.ports.contains(&call.nexus.target_port()));
        own.map(|group| group.id)
    })
}

fn serial(options: &UnitOptions) -> Vec<u8> {
    options.identity.serial.bytes().take(64).map(printable).collect()
}

/// Device identification (SPC-4 §7.8.6).
fn identification(options: &UnitOptions, nexus: &Nexus, group: Option<u16>) -> Vec<u8> {
    let mut data = Vec::new();
    let mut designator = |set: u8, kind: u8, bytes: &[u8]| {
        data.extend([set, kind, 0, u8::try_from(bytes.len()).unwrap_or(u8::MAX)]);
        data.extend(bytes);
    };
    let identity = &options.identity;
    // Of the unit: NAA; UUID; by vendor.
    designator(1, 3, &identity.naa());
    let mut uuid = vec![0x10, 0];
    uuid.extend(identity.uuid);
    designator(1, 0x0a, &uuid);
    let mut name = VENDOR.to_vec();
    name.extend(serial(options));
    designator(2, 1, &name);
    // Of the port: its number; its group.
    let [high, low] = nexus.target_port().to_be_bytes();
    designator(1, 0x14, &[0, 0, high, low]);
    if let Some(group) = group {
        let [high, low] = group.to_be_bytes();
        designator(1, 0x15, &[0, 0, high, low]);
    }
    data
}

/// Extended INQUIRY data (SPC-4 §7.8.7).
fn extended() -> Vec<u8> {
    let mut data = vec![0; 60];
    // Simple and head of queue, as transports take them (SPC-4 §7.8.7: HEADSUP, SIMPSUP).
    data[1] = 0x05;
    // There is a volatile cache.
    data[2] = 0x01;
    // The unit attention of a reset is cleared for each nexus by itself.
    data[3] = 0x00;
    data
}

/// `bytes` in blocks, as a 32-bit field.
fn in_blocks(bytes: u64, geometry: &Geometry) -> u32 {
    u32::try_from(bytes / u64::from(geometry.logical_block)).unwrap_or(u32::MAX)
}

/// Block limits (SBC-4 §6.6.4).
fn block_limits(options: &UnitOptions, geometry: &Geometry) -> Vec<u8> {
    let mut data = vec![0; 60];
    let mut field = |at: usize, value: u32| data[at - 4..at].copy_from_slice(&value.to_be_bytes());
    // Each ends at this byte of the page's content: optimal granularity, maximum (0: not limited), optimum.
    let granularity = in_blocks(geometry.optimal_io.max(geometry.physical_block).into(), geometry);
    field(4, granularity.min(u32::from(u16::MAX)));
    field(8, in_blocks(options.max_transfer, geometry));
    field(12, in_blocks(OPTIMAL_TRANSFER, geometry));
    if options.provisioning != Provisioning::Full {
        field(20, MAX_RANGE_BLOCKS);
        field(24, MAX_UNMAP_DESCRIPTORS);
        let granularity = geometry.discard_granularity.max(geometry.logical_block);
        field(28, in_blocks(granularity.into(), geometry));
        // The first granule begins at block 0.
        field(32, 1 << 31);
    }
    data[32..40].copy_from_slice(&u64::from(MAX_RANGE_BLOCKS).to_be_bytes());
    data[1] = MAX_COMPARE_BLOCKS;
    // WSNZ: a WRITE SAME of no blocks is not one of all blocks.
    data[0] = 0x01;
    data
}

/// Block device characteristics (SBC-4 §6.6.2): nothing rotates.
fn characteristics() -> Vec<u8> {
    let mut data = vec![0; 60];
    data[1] = 1;
    data
}

/// Logical block provisioning (SBC-4 §6.6.6).
fn provisioning(options: &UnitOptions) -> Vec<u8> {
    match options.provisioning {
        Provisioning::Full => vec![0, 0, 0, 0],
        // UNMAP, WRITE SAME (16) and (10) with UNMAP; thin.
        Provisioning::Thin => vec![0, 0xe0, 2, 0],
        Provisioning::ThinZeroes => vec![0, 0xe4, 2, 0],
    }
}
