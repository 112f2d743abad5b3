//! Mode pages (SPC-4 §6.11, §7.5; SBC-4 §6.5): what initiators may know and change of how the unit works.
//!
//! Each page has its current value, and a mask of the bits that may be changed. What acts: WCE of the caching page (without it
//! each write is durable), D_SENSE and SWP of the control page. Nothing is saved.

use block_io::{BlockDevice, Geometry};

use super::Check;
use super::dispatch::Call;
use super::sense::{Code, Sense};
use super::transfer::{Moved, length16, number, put, take};

const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// The write cache is enabled.
const WCE: u8 = 0x04;
/// Sense data in descriptor format.
const D_SENSE: u8 = 0x04;
/// Software write protect.
const SWP: u8 = 0x08;

/// A page: code, value, mask of changeable bits. All have whole bytes after code and length.
struct Description {
    code: u8,
    default: &'static [u8],
    changeable: &'static [(usize, u8)],
}

/// Ascending, as they are shown.
const PAGES: [Description; 4] = [
    // Read-write error recovery: blocks are reallocated below, without telling.
    Description {
        code: 0x01,
        default: &[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        changeable: &[],
    },
    // Caching.
    Description {
        code: 0x08,
        default: &[WCE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        changeable: &[(0, WCE)],
    },
    // Control: unrestricted reordering; no limit on how long a unit is busy.
    Description {
        code: 0x0a,
        default: &[0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0],
        changeable: &[(0, D_SENSE), (2, SWP)],
    },
    // Informational exceptions: none are reported.
    Description {
        code: 0x1c,
        default: &[0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        changeable: &[],
    },
];

/// The current values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parameters([Vec<u8>; 4]);

impl Default for Parameters {
    fn default() -> Self {
        Self(PAGES.map(|page| page.default.to_vec()))
    }
}

impl Parameters {
    fn has(&self, page: usize, byte: usize, bit: u8) -> bool {
        self.0[page].get(byte).is_some_and(|byte| byte & bit != 0)
    }

    /// Whether writes may stay in a cache.
    pub(super) fn write_cache(&self) -> bool {
        self.has(1, 0, WCE)
    }

    pub(super) fn descriptor_sense(&self) -> bool {
        self.has(2, 0, D_SENSE)
    }

    pub(super) fn write_protected(&self) -> bool {
        self.has(2, 2, SWP)
    }
}

impl Description {
    fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0; self.default.len()];
        for (byte, bits) in self.changeable {
            mask[*byte] = *bits;
        }
        mask
    }
}

/// MODE SENSE(6) and (10).
pub(super) fn sense<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let cdb = call.cdb;
    let six = cdb[0] == 0x1a;
    let (control, page, subpage) = (cdb[2] >> 6, cdb[2] & 0x3f, cdb[3]);
    let parameters = call.unit.with(|state| state.mode.clone());
    if control == 3 {
        return Err(Sense::illegal(Code::SAVING_NOT_SUPPORTED).into());
    }
    let mut pages = Vec::new();
    for (description, current) in PAGES.iter().zip(&parameters.0) {
        if page != ALL_PAGES && page != description.code {
            continue;
        }
        let value = match control {
            0 => current.clone(),
            1 => description.mask(),
            _ => description.default.to_vec(),
        };
        pages.extend([description.code, u8::try_from(value.len()).unwrap_or(u8::MAX)]);
        pages.extend(value);
    }
    if pages.is_empty() {
        return Err(Sense::in_cdb(2, Some(5)).into());
    }
    if subpage != 0 && (subpage != ALL_SUBPAGES) {
        return Err(Sense::in_cdb(3, None).into());
    }
    let geometry = call.disk.geometry();
    let without_descriptor = cdb[1] & 0x08 != 0;
    let long = !six && cdb[1] & 0x10 != 0;
    let descriptor = match (without_descriptor, long) {
        (true, _) => Vec::new(),
        (false, false) => short_descriptor(&geometry),
        (false, true) => long_descriptor(&geometry),
    };
    let protected = parameters.write_protected() || geometry.read_only || call.unit.options().read_only;
    // Write protected; DPO and FUA are understood.
    let specific = if protected { 0x90 } else { 0x10 };
    let mut data = Vec::new();
    let allocation = if six {
        let length = 3 + descriptor.len() + pages.len();
        let byte = |length: usize| u8::try_from(length).unwrap_or(u8::MAX);
        data.extend([byte(length), 0, specific, byte(descriptor.len())]);
        u64::from(cdb[4])
    } else {
        data.extend(length16(6 + descriptor.len() + pages.len()));
        data.extend([0, specific, u8::from(long && !without_descriptor), 0]);
        data.extend(length16(descriptor.len()));
        number::u16(cdb, 7).into()
    };
    data.extend(descriptor);
    data.extend(pages);
    Ok(put(call.command, &data, allocation))
}

fn short_descriptor(geometry: &Geometry) -> Vec<u8> {
    let blocks = geometry.size / u64::from(geometry.logical_block);
    let mut data = u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    data.extend(geometry.logical_block.to_be_bytes());
    data
}

fn long_descriptor(geometry: &Geometry) -> Vec<u8> {
    let blocks = geometry.size / u64::from(geometry.logical_block);
    let mut data = blocks.to_be_bytes().to_vec();
    data.extend([0; 4]);
    data.extend(geometry.logical_block.to_be_bytes());
    data
}

/// MODE SELECT(6) and (10). All pages are checked before any changes.
pub(super) async fn select<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let cdb = call.cdb;
    let six = cdb[0] == 0x15;
    if cdb[1] & 0x10 == 0 {
        // Not in the format of pages.
        return Err(Sense::in_cdb(1, Some(4)).into());
    }
    if cdb[1] & 0x01 != 0 {
        return Err(Sense::in_cdb(1, Some(0)).into());
    }
    let length = if six {
        u64::from(cdb[4])
    } else {
        number::u16(cdb, 7).into()
    };
    if length == 0 {
        return Ok(Moved::NOTHING);
    }
    let list = take(call.command, length)?;
    let before = call.unit.with(|state| state.mode.clone());
    let after = parse(&list, six, &call.disk.geometry(), &before)?;
    if after != before {
        call.unit.with(|state| {
            state.mode = after.clone();
            state.attend(Code::MODE_PARAMETERS_CHANGED, Some(call.nexus.number()));
        });
        if before.write_cache() && !after.write_cache() {
            // What is in the cache is made durable, as what comes will be.
            call.disk.flush().await.map_err(|error| call.failure(&error))?;
        }
    }
    Ok(Moved::all(length))
}

fn short() -> super::Fail {
    Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into()
}

fn field(at: usize, bit: Option<u8>) -> super::Fail {
    Sense::in_parameters(u16::try_from(at).unwrap_or(u16::MAX), bit).into()
}

/// The parameters that the list asks for.
fn parse(list: &[u8], six: bool, geometry: &Geometry, current: &Parameters) -> Check<Parameters> {
    let (header, long, descriptor) = if six {
        (4, false, usize::from(*list.get(3).ok_or_else(short)?))
    } else {
        let length = list.get(6..8).ok_or_else(short)?;
        (8, list[4] & 1 != 0, usize::from(number::u16(length, 0)))
    };
    let length_at = if six { 3 } else { 6 };
    let expected = if long { 16 } else { 8 };
    if descriptor != 0 && descriptor != expected {
        return Err(field(length_at, None));
    }
    let mut at = header;
    if descriptor != 0 {
        let given = list.get(at..at + descriptor).ok_or_else(short)?;
        let own = if long {
            long_descriptor(geometry)
        } else {
            short_descriptor(geometry)
        };
        let blocks = descriptor / 2;
        // So many blocks as there are, or 0: no change. Byte 4 was a density code once.
        if given[..blocks].iter().any(|byte| *byte != 0) && given[..blocks] != own[..blocks] {
            return Err(field(at, None));
        }
        let size = descriptor - 3;
        if given[size..] != own[size..] {
            return Err(field(at + size, None));
        }
        at += descriptor;
    }
    let mut result = current.clone();
    while at < list.len() {
        at = parse_page(list, at, &mut result)?;
    }
    Ok(result)
}

/// Takes the page at `at` over; where the next one begins.
fn parse_page(list: &[u8], at: usize, result: &mut Parameters) -> Check<usize> {
    let &[code, length] = list
        .get(at..)
        .and_then(|rest| rest.first_chunk::<2>())
        .ok_or_else(short)?;
    // PS and SPF are zero: the pages are not saved, and have no subpages.
    if code & 0x80 != 0 {
        return Err(field(at, Some(7)));
    }
    if code & 0x40 != 0 {
        return Err(field(at, Some(6)));
    }
    let index = PAGES.iter().position(|page| page.code == code);
    let index = index.ok_or_else(|| field(at, Some(5)))?;
    let mask = PAGES[index].mask();
    if usize::from(length) != mask.len() {
        return Err(field(at + 1, None));
    }
    let start = at + 2;
    let value = list.get(start..start + mask.len()).ok_or_else(short)?;
    for (offset, ((new, old), mask)) in value.iter().zip(&mut result.0[index]).zip(&mask).enumerate() {
        let wrong = (*new ^ *old) & !mask;
        if wrong != 0 {
            let bit = 7 - u8::try_from(wrong.leading_zeros()).unwrap_or(7);
            return Err(field(start + offset, Some(bit)));
        }
        *old = *new;
    }
    Ok(start + mask.len())
}
