//! Commands that control the unit: start and stop, the medium, self-tests.

use block_io::{AlignedBuffer, BlockDevice};

use super::Check;
use super::dispatch::Call;
use super::logs::{SELF_TESTS, SelfTest};
use super::sense::{Code, Key, Sense};
use super::transfer::{Moved, number};

/// START STOP UNIT (SBC-4 §5.28). Done when it is answered, IMMED or not.
pub(super) async fn start_stop<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let byte = call.cdb[4];
    let (start, load_eject, no_flush) = (byte & 1 != 0, byte & 2 != 0, byte & 4 != 0);
    if byte & 0xf0 != 0 {
        // There are no power conditions.
        return Err(Sense::in_cdb(4, Some(7)).into());
    }
    let removable = call.unit.options().removable;
    if load_eject && !removable {
        return Err(Sense::in_cdb(4, Some(1)).into());
    }
    if !start && load_eject {
        let prevented = call
            .unit
            .with(|state| state.nexuses.values().any(|nexus| nexus.prevents_removal));
        if prevented {
            return Err(Sense::illegal(Code::MEDIUM_REMOVAL_PREVENTED).into());
        }
    }
    if !start && !no_flush {
        call.disk.flush().await.map_err(|error| call.failure(&error))?;
    }
    call.unit.with(|state| {
        if start && !load_eject && !state.loaded {
            return Err(Sense::new(Key::NotReady, Code::MEDIUM_NOT_PRESENT).into());
        }
        if load_eject && start && !state.loaded {
            state.attend(Code::NOT_READY_TO_READY_CHANGE, Some(call.nexus.number()));
        }
        if load_eject {
            state.loaded = start;
        }
        if start && !state.started {
            state.cycles = state.cycles.saturating_add(1);
        }
        state.started = start;
        Ok(Moved::NOTHING)
    })
}

/// PREVENT ALLOW MEDIUM REMOVAL (SBC-4 §5.12).
pub(super) fn prevent_allow<D>(call: &Call<'_, D>) -> Check<Moved> {
    let prevent = call.cdb[4] & 0x03;
    if prevent > 1 {
        return Err(Sense::in_cdb(4, Some(1)).into());
    }
    call.unit
        .with(|state| state.nexus(call.nexus).prevents_removal = prevent == 1);
    Ok(Moved::NOTHING)
}

/// SEND DIAGNOSTIC (SPC-4 §6.42): self-tests. All of them run before they are answered.
pub(super) async fn send_diagnostic<D: BlockDevice>(call: &Call<'_, D>) -> Check<Moved> {
    let (code, default) = (call.cdb[1] >> 5, call.cdb[1] & 0x04 != 0);
    if number::u16(call.cdb, 3) != 0 {
        // There are no diagnostic pages.
        return Err(Sense::in_cdb(3, None).into());
    }
    let extended = match (default, code) {
        (true, 0) | (false, 1 | 5) => false,
        (false, 2 | 6) => true,
        (false, 0) => return Ok(Moved::NOTHING),
        // The end of a test that does not run; what is reserved; both ways at once.
        _ => return Err(Sense::in_cdb(1, Some(7)).into()),
    };
    let failure = self_test(call, extended).await;
    call.unit.with(|state| {
        if state.self_tests.len() == SELF_TESTS {
            state.self_tests.pop_front();
        }
        let hours = state.since.elapsed().as_secs() / 3600;
        state.self_tests.push_back(SelfTest {
            code,
            hours: u16::try_from(hours).unwrap_or(u16::MAX),
            failure,
        });
    });
    match failure {
        // Tests in the background are told of by the log only.
        Some(_) if !matches!(code, 1 | 2) => {
            Err(Sense::new(Key::HardwareError, Code::SELF_TEST_FAILED).into())
        }
        _ => Ok(Moved::NOTHING),
    }
}

/// Flushes and reads: the first block, and the last and some between if `extended`. The failure, and its block.
async fn self_test<D: BlockDevice>(call: &Call<'_, D>, extended: bool) -> Option<(Sense, u64)> {
    const PLACES: u64 = 64;
    let geometry = call.disk.geometry();
    let block = u64::from(geometry.logical_block);
    let blocks = geometry.size / block;
    if let Err(error) = call.disk.flush().await {
        return Some((Sense::of(&error, geometry.logical_block), u64::MAX));
    }
    let places = match (blocks, extended) {
        (0, _) => 0,
        (_, false) => 1,
        (_, true) => PLACES,
    };
    let buffer = AlignedBuffer::new(usize::try_from(block).unwrap_or(0));
    for place in 0..places {
        let span = u128::from(blocks - 1) * u128::from(place) / u128::from(PLACES - 1);
        let lba = u64::try_from(span).unwrap_or(0);
        // SAFETY: the buffer lives until the read has ended, and nobody looks at it.
        let pieces = [unsafe { buffer.io(0, usize::MAX) }];
        if let Err(error) = call.disk.read(lba * block, &pieces).await {
            return Some((Sense::of(&error, geometry.logical_block), lba));
        }
    }
    None
}
