//! The way of a command that is not a plain read or write: may it run, is it well formed, who does it.

use block_io::BlockDevice;

use super::sense::{Code, Key, Sense};
use super::table::{Access, Entry, Known, Op, find};
use super::transfer::Moved;
use super::unit::{PortState, mode_bit};
use super::{Check, Command, Fail, Nexus, Outcome, Unit, block, inquiry, report};

/// A command that runs.
pub(super) struct Call<'a, D> {
    pub(super) disk: &'a D,
    pub(super) unit: &'a Unit,
    pub(super) nexus: &'a Nexus,
    pub(super) command: &'a Command<'a>,
    pub(super) cdb: &'a [u8],
}

pub(super) async fn execute<D: BlockDevice>(
    disk: &D,
    unit: &Unit,
    nexus: &Nexus,
    command: &Command<'_>,
) -> Outcome {
    match attempt(disk, unit, nexus, command).await {
        Ok(moved) => Outcome::good(moved),
        Err(Fail::Sense(sense)) => Outcome::failed(unit, sense),
        Err(Fail::Conflict) => Outcome::conflict(),
    }
}

async fn attempt<D: BlockDevice>(
    disk: &D,
    unit: &Unit,
    nexus: &Nexus,
    command: &Command<'_>,
) -> Check<Moved> {
    let known = find(command.cdb);
    let reports_attention = match &known {
        Known::Entry(entry) => !matches!(entry.op, Op::Inquiry | Op::ReportLuns | Op::RequestSense),
        _ => true,
    };
    if reports_attention && let Some(code) = take_attention(unit, nexus) {
        return Err(Sense::new(Key::UnitAttention, code).into());
    }
    let entry = match known {
        Known::Entry(entry) => entry,
        Known::NoSuchAction => return Err(Sense::in_cdb(1, Some(4)).into()),
        Known::Nothing => {
            return Err(Sense::illegal(Code::INVALID_OPERATION_CODE)
                .at(true, 0, None)
                .into());
        }
    };
    if let Some((byte, bit)) = entry.flaw(command.cdb) {
        return Err(Sense::in_cdb(byte, Some(bit)).into());
    }
    admit(unit, nexus, entry)?;
    let call = Call {
        disk,
        unit,
        nexus,
        command,
        cdb: command.cdb,
    };
    perform(&call, entry).await
}

/// The oldest thing that `nexus` has not been told of.
pub(super) fn take_attention(unit: &Unit, nexus: &Nexus) -> Option<Code> {
    if unit.word() & nexus.mask() == 0 {
        return None;
    }
    unit.with(|state| state.nexus(nexus).attentions.pop_front())
}

/// Whether the state of the unit lets the command run.
fn admit(unit: &Unit, nexus: &Nexus, entry: &Entry) -> Check<()> {
    let word = unit.word();
    if word & mode_bit::PORTS != 0 {
        admit_port(unit, nexus, entry)?;
    }
    if word & mode_bit::STOPPED != 0 && needs_medium(entry.op) {
        let code = unit.with(|state| {
            if state.loaded {
                Code::NOT_READY_INITIALIZING_REQUIRED
            } else {
                Code::MEDIUM_NOT_PRESENT
            }
        });
        return Err(Sense::new(Key::NotReady, code).into());
    }
    Ok(())
}

/// Whether the target port gives access (SPC-4 §5.15.2.4).
fn admit_port(unit: &Unit, nexus: &Nexus, entry: &Entry) -> Check<()> {
    let state = unit.with(|state| {
        let mut groups = state.groups.iter();
        let own = groups.find(|group| group.ports.contains(&nexus.target_port()));
        own.map(|group| group.state)
    });
    let code = match state {
        Some(PortState::Standby) => Code::NOT_READY_STANDBY,
        Some(PortState::Unavailable) => Code::NOT_READY_UNAVAILABLE,
        Some(PortState::Transitioning) => Code::NOT_READY_TRANSITION,
        Some(PortState::Optimized | PortState::NonOptimized) | None => return Ok(()),
    };
    match entry.op {
        Op::Inquiry | Op::ReportLuns | Op::RequestSense | Op::ReportTargetPortGroups => Ok(()),
        _ if state == Some(PortState::Standby) && entry.access == Access::Always => Ok(()),
        _ => Err(Sense::new(Key::NotReady, code).into()),
    }
}

fn needs_medium(op: Op) -> bool {
    match op {
        Op::RequestSense | Op::Inquiry | Op::ReportLuns | Op::ReportTargetPortGroups => false,
        Op::TestUnitReady
        | Op::ReadCapacity10
        | Op::ReadCapacity16
        | Op::Read
        | Op::Write
        | Op::SynchronizeCache => true,
    }
}

async fn perform<D: BlockDevice>(call: &Call<'_, D>, entry: &Entry) -> Check<Moved> {
    match entry.op {
        Op::TestUnitReady => Ok(Moved::NOTHING),
        Op::RequestSense => report::request_sense(call),
        Op::Inquiry => inquiry::inquiry(call),
        Op::ReportLuns => report::report_luns(call.command, call.nexus),
        Op::ReportTargetPortGroups => report::target_port_groups(call),
        Op::ReadCapacity10 => report::read_capacity_10(call),
        Op::ReadCapacity16 => report::read_capacity_16(call),
        Op::Read => block::read(call).await,
        Op::Write => block::write(call).await,
        Op::SynchronizeCache => block::synchronize_cache(call).await,
    }
}
