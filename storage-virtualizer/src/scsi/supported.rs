//! What the unit can do, as the table of commands says: REPORT SUPPORTED OPERATION CODES and TASK MANAGEMENT FUNCTIONS.

use super::Check;
use super::dispatch::Call;
use super::sense::Sense;
use super::table::{Entry, supported};
use super::transfer::{Moved, length16, length32, number, put};

/// A command timeouts descriptor that names none (SPC-4 §6.35.4).
const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// CDB lengths of vendor-specific commands.
const VENDOR_LENGTH: usize = 16;
const SUPPORTED: u8 = 3;
const NOT_SUPPORTED: u8 = 1;

/// REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35).
pub(super) fn operation_codes<D>(call: &Call<'_, D>) -> Check<Moved> {
    let cdb = call.cdb;
    let (timeouts, option) = (cdb[2] & 0x80 != 0, cdb[2] & 0x07);
    let (opcode, action) = (cdb[3], number::u16(cdb, 4));
    let allocation = number::u32(cdb, 6).into();
    let options = call.unit.options();
    if option == 0 {
        let mut data = all(supported(options), timeouts);
        if options.vendor.is_some() {
            for opcode in super::VENDOR_OPCODES {
                describe(&mut data, opcode, None, VENDOR_LENGTH, timeouts);
            }
        }
        let length = length32(data.len() - 4);
        data[..4].copy_from_slice(&length);
        return Ok(put(call.command, &data, allocation));
    }
    let mut same = supported(options)
        .filter(|entry| entry.opcode == opcode)
        .peekable();
    let has_actions = same.peek().is_some_and(|entry| entry.action.is_some());
    let exists = same.peek().is_some();
    let by_action = match option {
        1 if has_actions => return Err(Sense::in_cdb(2, Some(2)).into()),
        1 => false,
        2 if exists && !has_actions => return Err(Sense::in_cdb(2, Some(2)).into()),
        2 => true,
        3 => has_actions,
        _ => return Err(Sense::in_cdb(2, Some(2)).into()),
    };
    let found = same.find(|entry| match entry.action {
        Some(own) if by_action => u16::from(own) == action,
        Some(_) => false,
        // Option 3: without service actions the field must be 0.
        None => option != 3 || action == 0,
    });
    let flags = if timeouts { 0x80 } else { 0 };
    let mut data = match found {
        Some(entry) => {
            let mut data = vec![0, flags | SUPPORTED];
            data.extend(length16(entry.usage.len()));
            data.extend(entry.usage);
            data
        }
        None if options.vendor.is_some() && super::VENDOR_OPCODES.contains(&opcode) && option != 2 => {
            let mut data = vec![0, flags | SUPPORTED];
            data.extend(length16(VENDOR_LENGTH));
            data.push(opcode);
            data.extend([0xff; VENDOR_LENGTH - 1]);
            data
        }
        None => vec![0, NOT_SUPPORTED, 0, 0],
    };
    if timeouts && data[1] & 7 == SUPPORTED {
        data.extend(TIMEOUTS);
    }
    Ok(put(call.command, &data, allocation))
}

fn all(entries: impl Iterator<Item = &'static Entry>, timeouts: bool) -> Vec<u8> {
    let mut data = vec![0; 4];
    for entry in entries {
        describe(&mut data, entry.opcode, entry.action, entry.usage.len(), timeouts);
    }
    data
}

fn describe(data: &mut Vec<u8>, opcode: u8, action: Option<u8>, length: usize, timeouts: bool) {
    // CTDP: timeouts follow; SERVACTV: the service action is one.
    let flags = if timeouts { 2 } else { 0 } | u8::from(action.is_some());
    data.extend([opcode, 0, 0, action.unwrap_or(0), 0, flags]);
    data.extend(length16(length));
    if timeouts {
        data.extend(TIMEOUTS);
    }
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 §6.36).
pub(super) fn task_management<D>(call: &Call<'_, D>) -> Check<Moved> {
    let extended = call.cdb[2] & 0x80 != 0;
    let allocation = number::u32(call.cdb, 6);
    if allocation < 4 {
        return Err(Sense::in_cdb(6, None).into());
    }
    let mut data = call.unit.options().task_management.to_vec();
    data.extend([0, 0]);
    if extended {
        // No timeouts are told of.
        data[3] = 12;
        data.resize(16, 0);
    }
    Ok(put(call.command, &data, allocation.into()))
}
