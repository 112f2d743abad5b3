//! Whether a configuration keeps the rules of placement: for tests, for `pool status`, and before a configuration is written.

use std::collections::BTreeSet;

use super::free::{MAX_PIECES, data_area};
use super::{devices_of, log_devices};
use crate::model::{BLOCK, Configuration, DeviceId, Extent, MAX_COLUMNS, MAX_MEMBERS, Section, Volume};

/// Checks the whole configuration: extents are in bounds and overlap nowhere; a device holds at most one member of a section;
/// lengths add up; logs and bitmaps have their copies where they must be.
///
/// # Errors
/// What is wrong, one text for each.
pub fn verify(config: &Configuration) -> Result<(), Vec<String>> {
    let mut wrong = Vec::new();
    check_order(config, &mut wrong);
    check_extents(config, &mut wrong);
    for volume in &config.volumes {
        check_volume(volume, &mut wrong);
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// Whether one of the devices is there whenever the volume can be used: they include all log devices of some section, for a
/// volume can be used only if all its sections can. True for a volume without redundancy, which needs no log.
pub fn log_devices_suffice(volume: &Volume, devices: &[DeviceId]) -> bool {
    let mut redundant = volume
        .sections
        .iter()
        .filter(|section| section.is_redundant())
        .peekable();
    let covered = |section: &Section| log_devices(section).iter().all(|device| devices.contains(device));
    redundant.peek().is_none() || redundant.any(covered)
}

/// Numbers ascend and are below the next ones.
fn check_order(config: &Configuration, wrong: &mut Vec<String>) {
    let devices = config.devices.iter().map(|device| device.id.0);
    let volumes = config.volumes.iter().map(|volume| volume.id.0);
    let mut check = |what: &str, numbers: Vec<u32>, next: u32| {
        if !numbers.is_sorted_by(|a, b| a < b) {
            wrong.push(format!("{what} are not in the order of their numbers"));
        }
        if let Some(high) = numbers.iter().find(|number| **number >= next) {
            wrong.push(format!("{what}: number {high} is not below the next one, {next}"));
        }
    };
    check("devices", devices.collect(), config.next_device);
    check("volumes", volumes.collect(), config.next_volume);
}

/// Extents are whole blocks within data areas, and no two overlap.
fn check_extents(config: &Configuration, wrong: &mut Vec<String>) {
    let mut all: Vec<(Extent, &str)> = Vec::new();
    for volume in &config.volumes {
        all.extend(volume.extents().map(|extent| (*extent, volume.name.as_str())));
    }
    all.sort_unstable_by_key(|(extent, _)| (extent.device, extent.start));
    for (extent, volume) in &all {
        let Extent {
            device,
            start,
            length,
        } = *extent;
        let run = format!("volume {volume}: extent of {length} bytes at {start} of {device}");
        if length == 0 || !length.is_multiple_of(BLOCK) || !start.is_multiple_of(BLOCK) {
            wrong.push(format!("{run} is not whole blocks"));
        }
        match config.device(device).map(data_area) {
            None => wrong.push(format!("{run}: no such device")),
            Some((first, end)) => {
                if start < first || start.checked_add(length).is_none_or(|last| last > end) {
                    wrong.push(format!("{run} is not within {first}..{end}"));
                }
            }
        }
    }
    for pair in all.windows(2) {
        let [(a, first), (b, second)] = pair else { continue };
        if a.device == b.device && a.start.saturating_add(a.length) > b.start {
            let (device, start) = (b.device, b.start);
            wrong.push(format!(
                "volumes {first} and {second} overlap at {start} of {device}"
            ));
        }
    }
}

fn check_volume(volume: &Volume, wrong: &mut Vec<String>) {
    let name = &volume.name;
    let mut wrong = |what: String| wrong.push(format!("volume {name}: {what}"));
    let sum = volume
        .sections
        .iter()
        .try_fold(0_u64, |sum, section| sum.checked_add(section.length));
    if sum != Some(volume.size) {
        wrong(format!("its sections do not add up to its size, {}", volume.size));
    }
    let (mut numbers, mut sections) = (BTreeSet::new(), BTreeSet::new());
    for (index, section) in volume.sections.iter().enumerate() {
        let last = index + 1 == volume.sections.len();
        check_section(section, last, &mut |what| {
            wrong(format!("section {index}: {what}"))
        });
        if !sections.insert(section.id) {
            wrong(format!("number {} is borne by two sections", section.id));
        }
        if section.id >= volume.next_section {
            let (id, next) = (section.id, volume.next_section);
            wrong(format!("section number {id} is not below the next one, {next}"));
        }
        for member in section.columns.iter().flat_map(|column| &column.members) {
            let number = member.id.0;
            if !numbers.insert(number) {
                wrong(format!("number {number} is borne by two members"));
            }
            if number >= volume.next_member {
                wrong(format!(
                    "member {number} is not below the next one, {}",
                    volume.next_member
                ));
            }
        }
    }
    if !log_devices_suffice(volume, &volume.log_devices) {
        wrong("its log devices may all be absent while it can be used".into());
    }
    check_bitmap(volume, &mut wrong);
}

/// One copy per log device, all equally long.
fn check_bitmap(volume: &Volume, wrong: &mut impl FnMut(String)) {
    if volume.bitmap.is_empty() {
        return;
    }
    let copies: Vec<_> = volume.bitmap.iter().map(|copy| copy.device).collect();
    let distinct: BTreeSet<_> = copies.iter().collect();
    if distinct.len() != copies.len() || distinct != volume.log_devices.iter().collect() {
        wrong("its bitmap has not one copy on each of its log devices".into());
    }
    if volume
        .bitmap
        .iter()
        .any(|copy| copy.length != volume.bitmap[0].length)
    {
        wrong("copies of its bitmap differ in length".into());
    }
}

fn check_section(section: &Section, last: bool, wrong: &mut impl FnMut(String)) {
    let (columns, parity) = (section.columns.len(), section.parity as usize);
    if columns == 0 || columns > MAX_COLUMNS || parity > 2 || columns <= parity {
        return wrong(format!("{columns} columns with parity {parity} cannot be"));
    }
    if section.unit == 0 || !section.unit.is_multiple_of(BLOCK) {
        return wrong(format!("a unit of {} bytes is not whole blocks", section.unit));
    }
    if columns > 1 && !section.unit.is_power_of_two() {
        wrong(format!(
            "a stripe unit of {} bytes is not a power of two",
            section.unit
        ));
    }
    if section.length == 0 || !section.length.is_multiple_of(BLOCK) {
        wrong(format!(
            "a length of {} bytes is not whole blocks",
            section.length
        ));
    }
    let row = section.data_columns().checked_mul(section.unit);
    let rows = row.map(|row| (section.length.div_ceil(row), section.length % row));
    let Some((rows, rest)) = rows else {
        return wrong(format!("a row of units of {} bytes is too long", section.unit));
    };
    if rest != 0 && !last {
        wrong("it ends within a row and is not the last one".into());
    }
    check_members(section, rows, wrong);
    check_log(section, wrong);
}

/// Members are as long as the rows ask for, and no device holds two.
fn check_members(section: &Section, rows: u64, wrong: &mut impl FnMut(String)) {
    let mut holders = BTreeSet::new();
    for (index, column) in section.columns.iter().enumerate() {
        if column.members.is_empty() || column.members.len() > MAX_MEMBERS {
            wrong(format!("column {index} has {} members", column.members.len()));
        }
        for member in &column.members {
            let (number, pieces) = (member.id.0, member.extents.len());
            let lengths = member.extents.iter().map(|extent| u128::from(extent.length));
            let length: u128 = lengths.sum();
            if length != u128::from(rows) * u128::from(section.unit) {
                wrong(format!(
                    "member {number} has {length} bytes, not {rows} rows of {} bytes",
                    section.unit
                ));
            }
            if pieces > MAX_PIECES {
                wrong(format!(
                    "member {number} has {pieces} extents, more than {MAX_PIECES}"
                ));
            }
            let devices: BTreeSet<_> = devices_of(member).collect();
            for device in devices {
                if !holders.insert(device) {
                    wrong(format!("{device} holds two of its members, one of them {number}"));
                }
            }
        }
    }
}

/// One more copy than the section tolerates failures, on different devices, with room for four full rows.
fn check_log(section: &Section, wrong: &mut impl FnMut(String)) {
    let (copies, parity) = (section.log.len(), section.parity as usize);
    if parity == 0 {
        if copies > 0 {
            wrong("it has a parity log but no parity".into());
        }
        return;
    }
    let devices: BTreeSet<_> = section.log.iter().map(|copy| copy.device).collect();
    if devices.len() != copies || copies != parity + 1 {
        wrong(format!(
            "its log has {copies} copies on {} devices, not {}",
            devices.len(),
            parity + 1
        ));
    }
    let rows = (section.columns.len() as u64)
        .saturating_mul(section.unit)
        .saturating_mul(4);
    for copy in &section.log {
        if copy.length < rows {
            wrong(format!(
                "a copy of its log has {} bytes, less than four rows, {rows}",
                copy.length
            ));
        }
        if copy.length != section.log[0].length {
            wrong("copies of its log differ in length".into());
        }
    }
}
