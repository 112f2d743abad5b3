//! Commands that tell of the unit and of the target: capacity, LUNs, ports, what is pending.

use block_io::BlockDevice;

use super::dispatch::{Call, take_attention};
use super::sense::{Code, Key, Sense};
use super::target::encode_lun;
use super::transfer::{Moved, length32, number, put};
use super::unit::Provisioning;
use super::{Check, Command, Nexus};

/// The well-known LUN of REPORT LUNS (SPC-4 §9.2).
pub(super) const WELL_KNOWN_LUN: [u8; 8] = [0xc1, 1, 0, 0, 0, 0, 0, 0];

/// REQUEST SENSE (SPC-4 §6.39): a unit attention is what there may be to report, as each command's own sense data come with
/// it.
pub(super) fn request_sense<D>(call: &Call<'_, D>) -> Check<Moved> {
    let sense = match take_attention(call.unit, call.nexus) {
        Some(code) => Sense::new(Key::UnitAttention, code),
        None => Sense::new(Key::NoSense, Code::NONE),
    };
    let data = sense.encode(call.cdb[1] & 1 != 0);
    Ok(put(call.command, data.as_slice(), call.cdb[4].into()))
}

/// REQUEST SENSE where there is no unit.
pub(super) fn request_sense_absent(command: &Command<'_>) -> Moved {
    let cdb = command.cdb;
    let sense = Sense::illegal(Code::LOGICAL_UNIT_NOT_SUPPORTED);
    let data = sense.encode(cdb.get(1).is_some_and(|byte| byte & 1 != 0));
    put(command, data.as_slice(), cdb.get(4).copied().unwrap_or(0).into())
}

/// REQUEST SENSE to the well-known LUN: there is never anything to report.
pub(super) fn request_sense_well_known(command: &Command<'_>) -> Moved {
    let cdb = command.cdb;
    let data = Sense::new(Key::NoSense, Code::NONE).encode(cdb.get(1).is_some_and(|byte| byte & 1 != 0));
    put(command, data.as_slice(), cdb.get(4).copied().unwrap_or(0).into())
}

/// REPORT LUNS (SPC-4 §6.33).
pub(super) fn report_luns(command: &Command<'_>, nexus: &Nexus) -> Check<Moved> {
    let cdb = command.cdb;
    let visible = nexus.visible();
    let luns = visible.iter().map(|lun| encode_lun(*lun));
    let listed: Vec<[u8; 8]> = match cdb.get(2).copied().unwrap_or(0) {
        0x00 => luns.collect(),
        0x01 => vec![WELL_KNOWN_LUN],
        0x02 => luns.chain([WELL_KNOWN_LUN]).collect(),
        _ => return Err(Sense::in_cdb(2, None).into()),
    };
    let allocation = number::u32(cdb, 6);
    if allocation < 16 {
        return Err(Sense::in_cdb(6, None).into());
    }
    let mut data = length32(listed.len() * 8).to_vec();
    data.extend([0; 4]);
    data.extend(listed.as_flattened());
    Ok(put(command, &data, allocation.into()))
}

/// REPORT TARGET PORT GROUPS (SPC-4 §6.37).
pub(super) fn target_port_groups<D>(call: &Call<'_, D>) -> Check<Moved> {
    let groups = call.unit.with(|state| state.groups.clone());
    if groups.is_empty() {
        return Err(Sense::in_cdb(1, Some(4)).into());
    }
    // Bits 7-5 of byte 1: the format of the data.
    let header = match call.cdb[1] >> 5 {
        0 => Vec::new(),
        // With the time that a change of state may take: none is announced.
        1 => vec![0x10, 0, 0, 0],
        _ => return Err(Sense::in_cdb(1, Some(7)).into()),
    };
    let mut data = vec![0; 4];
    data.extend(header);
    for group in &groups {
        let preferred = if group.preferred { 0x80 } else { 0 };
        // All states are possible.
        data.extend([preferred | group.state as u8, 0x8f]);
        data.extend(group.id.to_be_bytes());
        // Changed by the target; so many ports.
        data.extend([0, 0x02, 0, u8::try_from(group.ports.len()).unwrap_or(u8::MAX)]);
        for port in group.ports.iter().take(usize::from(u8::MAX)) {
            data.extend([0, 0]);
            data.extend(port.to_be_bytes());
        }
    }
    let length = length32(data.len() - 4);
    data[..4].copy_from_slice(&length);
    Ok(put(call.command, &data, number::u32(call.cdb, 6).into()))
}

/// READ CAPACITY(10) (SBC-4 §5.17).
pub(super) fn read_capacity_10<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let geometry = call.disk.geometry();
    let last = (geometry.size / u64::from(geometry.logical_block)).saturating_sub(1);
    let mut data = u32::try_from(last).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    data.extend(geometry.logical_block.to_be_bytes());
    Ok(put(call.command, &data, data.len() as u64))
}

/// READ CAPACITY(16) (SBC-4 §5.18).
pub(super) fn read_capacity_16<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let geometry = call.disk.geometry();
    let last = (geometry.size / u64::from(geometry.logical_block)).saturating_sub(1);
    let mut data = last.to_be_bytes().to_vec();
    data.extend(geometry.logical_block.to_be_bytes());
    let per_physical = (geometry.physical_block / geometry.logical_block).max(1);
    let exponent = u8::try_from(per_physical.ilog2()).unwrap_or(0).min(15);
    let provisioning = match call.unit.options().provisioning {
        Provisioning::Full => 0,
        Provisioning::Thin => 0x80,
        Provisioning::ThinZeroes => 0xc0,
    };
    data.extend([0, exponent, provisioning, 0]);
    data.resize(32, 0);
    Ok(put(call.command, &data, number::u32(call.cdb, 10).into()))
}

/// READ DEFECT DATA(10) and (12) (SBC-4 §5.19): both lists are empty.
pub(super) fn read_defect_data<D>(call: &Call<'_, D>) -> Check<Moved> {
    let cdb = call.cdb;
    let (flags, allocation) = if cdb[0] == 0x37 {
        (cdb[2], number::u16(cdb, 7).into())
    } else {
        (cdb[1], number::u32(cdb, 6))
    };
    let mut data = vec![0, flags & 0x1f];
    data.resize(if cdb[0] == 0x37 { 4 } else { 8 }, 0);
    Ok(put(call.command, &data, allocation.into()))
}
