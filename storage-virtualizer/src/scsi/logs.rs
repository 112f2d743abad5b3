//! LOG SENSE (SPC-4 §6.9, §7.3; SBC-4 §6.4): counters, and what self-tests found.

use std::sync::atomic::Ordering;

use block_io::BlockDevice;

use super::Check;
use super::dispatch::Call;
use super::sense::Sense;
use super::transfer::{Moved, length16, number, put};
use super::unit::Unit;

/// The pages that exist, ascending.
const PAGES: [u8; 8] = [0x00, 0x02, 0x03, 0x05, 0x0d, 0x0e, 0x10, 0x2f];
/// With page 00h this asks for all pages and subpages.
const ALL_SUBPAGES: u8 = 0xff;
/// There is no sensor (SPC-4 §7.3.21).
const NO_TEMPERATURE: u8 = 0xff;
/// Results of self-tests that are kept (SPC-4 §7.3.18).
pub(super) const SELF_TESTS: usize = 20;

/// One parameter: code, control byte, value.
type Parameter = (u16, u8, Vec<u8>);

/// What a self-test found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SelfTest {
    /// The kind, as in the CDB of SEND DIAGNOSTIC.
    pub(super) code: u8,
    /// Hours since power on.
    pub(super) hours: u16,
    /// The failure.
    pub(super) failure: Option<(Sense, u64)>,
}

/// LOG SENSE.
pub(super) fn sense<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let cdb = call.cdb;
    let (page, subpage) = (cdb[2] & 0x3f, cdb[3]);
    if cdb[1] & 1 != 0 {
        // Nothing is saved.
        return Err(Sense::in_cdb(1, Some(0)).into());
    }
    // Cumulative values; there are no thresholds.
    if cdb[2] >> 6 != 1 {
        return Err(Sense::in_cdb(2, Some(7)).into());
    }
    if !PAGES.contains(&page) {
        return Err(Sense::in_cdb(2, Some(5)).into());
    }
    if subpage != 0 && !(page == 0 && subpage == ALL_SUBPAGES) {
        return Err(Sense::in_cdb(3, None).into());
    }
    let first = number::u16(cdb, 5);
    let content = match (page, subpage) {
        (0, 0) => PAGES.to_vec(),
        (0, _) => {
            let mut list = vec![0, 0, 0, ALL_SUBPAGES];
            PAGES[1..].iter().for_each(|page| list.extend([*page, 0]));
            list
        }
        _ => {
            let parameters = parameters(call.unit, page);
            if parameters.iter().all(|(code, ..)| *code < first) {
                return Err(Sense::in_cdb(5, None).into());
            }
            encode(&parameters, first)
        }
    };
    if page == 0 && first != 0 {
        return Err(Sense::in_cdb(5, None).into());
    }
    let subpage_format = if subpage == 0 { 0 } else { 0x40 };
    let mut data = vec![page | subpage_format, subpage];
    data.extend(length16(content.len()));
    data.extend(content);
    Ok(put(call.command, &data, number::u16(cdb, 7).into()))
}

fn encode(parameters: &[Parameter], first: u16) -> Vec<u8> {
    let mut data = Vec::new();
    for (code, control, value) in parameters.iter().filter(|(code, ..)| *code >= first) {
        data.extend(code.to_be_bytes());
        data.extend([*control, u8::try_from(value.len()).unwrap_or(u8::MAX)]);
        data.extend(value);
    }
    data
}

fn parameters(unit: &Unit, page: u8) -> Vec<Parameter> {
    let counters = &unit.counters;
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    match page {
        0x02 => errors(unit.flight.bytes_written(), load(&counters.write_errors)),
        0x03 => errors(unit.flight.bytes_read(), load(&counters.read_errors)),
        0x05 => errors(load(&counters.verified), load(&counters.verify_errors)),
        // Temperature, and the one not to exceed.
        0x0d => vec![
            (0, 0x03, vec![0, NO_TEMPERATURE]),
            (1, 0x03, vec![0, NO_TEMPERATURE]),
        ],
        // Start-stop cycles.
        0x0e => {
            let cycles = unit.with(|state| state.cycles);
            vec![(4, 0x03, cycles.to_be_bytes().to_vec())]
        }
        0x10 => self_tests(unit),
        // No exceptions.
        _ => vec![(0, 0x03, vec![0, 0, NO_TEMPERATURE, 0])],
    }
}

/// An error counter page (SPC-4 §7.3.6). The layers below correct without telling, so only the sum of bytes and what
/// could not be helped are known.
fn errors(bytes: u64, uncorrected: u64) -> Vec<Parameter> {
    let values = [0, 0, 0, 0, 0, bytes, uncorrected];
    let parameter = |(code, value): (u16, u64)| (code, 0x02, value.to_be_bytes().to_vec());
    (0..).zip(values).map(parameter).collect()
}

/// Newest first; what there is not is zeroes.
fn self_tests(unit: &Unit) -> Vec<Parameter> {
    let tests = unit.with(|state| state.self_tests.clone());
    let mut tests = tests.iter().rev();
    let parameter = |code: u16| {
        let mut value = vec![0; 16];
        if let Some(test) = tests.next() {
            let result = if test.failure.is_some() { 0x07 } else { 0x00 };
            value[0] = test.code << 5 | result;
            value[2..4].copy_from_slice(&test.hours.to_be_bytes());
            value[4..12].fill(0xff);
            if let Some((sense, lba)) = test.failure {
                value[4..12].copy_from_slice(&lba.to_be_bytes());
                value[12..15].copy_from_slice(&[sense.key as u8, sense.code.0, sense.code.1]);
            }
        }
        (code, 0x03, value)
    };
    (1..=u16::try_from(SELF_TESTS).unwrap_or(0))
        .map(parameter)
        .collect()
}
