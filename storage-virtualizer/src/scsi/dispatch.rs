//! The way of a command that is not a plain read or write: may it run, is it well formed, who does it.

use block_io::BlockDevice;

use super::sense::{Code, Key, Sense};
use super::table::{Access, Entry, Known, Op, find};
use super::transfer::Moved;
use super::unit::{PortState, mode_bit};
use super::{
    Check, Command, Fail, Nexus, Outcome, Unit, VENDOR_OPCODES, block, compare, control, copy, inquiry, logs,
    mode, persistent, provision, report, supported,
};

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
    if let (Some(vendor), Some(opcode)) = (&unit.options().vendor, command.cdb.first())
        && VENDOR_OPCODES.contains(opcode)
    {
        if let Some(code) = take_attention(unit, nexus) {
            return Outcome::failed(unit, Sense::new(Key::UnitAttention, code));
        }
        return vendor.execute(unit, nexus, command).await;
    }
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
    let known = find(command.cdb, unit.options());
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
    admit(unit, nexus, entry, command.cdb)?;
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
fn admit(unit: &Unit, nexus: &Nexus, entry: &Entry, cdb: &[u8]) -> Check<()> {
    let word = unit.word();
    if word & mode_bit::PORTS != 0 {
        admit_port(unit, nexus, entry)?;
    }
    if word & mode_bit::RESERVED != 0 {
        let allowed = unit.with(|state| state.reservations.allows(nexus, entry.op, entry.access));
        if !allowed
            || (matches!(entry.op, Op::StartStop | Op::PreventAllow) && !admit_own(unit, nexus, entry, cdb))
        {
            return Err(Fail::Conflict);
        }
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

/// What runs under somebody else's reservation depends on what is asked for: to start, and to allow removal, is harmless
/// (SPC-4 §5.13.1, SBC-3 §4.17).
fn admit_own(unit: &Unit, nexus: &Nexus, entry: &Entry, cdb: &[u8]) -> bool {
    let harmless = match entry.op {
        Op::StartStop => cdb.get(4).is_some_and(|byte| byte & 0xf3 == 1),
        _ => cdb.get(4).is_some_and(|byte| byte & 3 == 0),
    };
    harmless || unit.with(|state| state.reservations.allows(nexus, entry.op, Access::Write))
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
    let informs = match entry.op {
        Op::Inquiry | Op::ReportLuns | Op::RequestSense | Op::ReportTargetPortGroups => true,
        Op::ModeSense
        | Op::ModeSelect
        | Op::LogSense
        | Op::PersistentIn
        | Op::PersistentOut
        | Op::SupportedOpcodes
        | Op::SupportedTmfs => state == Some(PortState::Standby),
        _ => false,
    };
    if informs {
        return Ok(());
    }
    Err(Sense::new(Key::NotReady, code).into())
}

fn needs_medium(op: Op) -> bool {
    match op {
        Op::RequestSense
        | Op::Inquiry
        | Op::ModeSense
        | Op::ModeSelect
        | Op::Reserve
        | Op::Release
        | Op::StartStop
        | Op::SendDiagnostic
        | Op::PreventAllow
        | Op::ReadDefectData
        | Op::LogSense
        | Op::PersistentIn
        | Op::PersistentOut
        | Op::ReportLuns
        | Op::ReportTargetPortGroups
        | Op::SupportedOpcodes
        | Op::SupportedTmfs
        | Op::ReceiveCopyResults => false,
        Op::TestUnitReady
        | Op::ReadCapacity10
        | Op::ReadCapacity16
        | Op::Read
        | Op::Write
        | Op::WriteAndVerify
        | Op::Verify
        | Op::SynchronizeCache
        | Op::PreFetch
        | Op::WriteSame
        | Op::Unmap
        | Op::CompareAndWrite
        | Op::OrWrite
        | Op::GetLbaStatus
        | Op::ExtendedCopy => true,
    }
}

async fn perform<D: BlockDevice>(call: &Call<'_, D>, entry: &Entry) -> Check<Moved> {
    match entry.op {
        Op::TestUnitReady => Ok(Moved::NOTHING),
        Op::RequestSense => report::request_sense(call),
        Op::Inquiry => inquiry::inquiry(call),
        Op::ModeSense => mode::sense(call),
        Op::ModeSelect => mode::select(call).await,
        Op::Reserve => persistent::reserve(call),
        Op::Release => persistent::release(call),
        Op::StartStop => control::start_stop(call).await,
        Op::SendDiagnostic => control::send_diagnostic(call).await,
        Op::PreventAllow => control::prevent_allow(call),
        Op::ReadCapacity10 => report::read_capacity_10(call),
        Op::ReadCapacity16 => report::read_capacity_16(call),
        Op::Read => block::read(call).await,
        Op::Write => block::write(call).await,
        Op::WriteAndVerify => compare::write_and_verify(call).await,
        Op::Verify => compare::verify(call).await,
        Op::SynchronizeCache => block::synchronize_cache(call).await,
        Op::PreFetch => block::pre_fetch(call),
        Op::ReadDefectData => report::read_defect_data(call),
        Op::WriteSame => provision::write_same(call).await,
        Op::Unmap => provision::unmap(call).await,
        Op::CompareAndWrite => compare::compare_and_write(call).await,
        Op::OrWrite => compare::or_write(call).await,
        Op::GetLbaStatus => provision::get_lba_status(call).await,
        Op::LogSense => logs::sense(call),
        Op::PersistentIn => persistent::report(call),
        Op::PersistentOut => persistent::change(call).await,
        Op::ReportLuns => report::report_luns(call.command, call.nexus),
        Op::ReportTargetPortGroups => report::target_port_groups(call),
        Op::SupportedOpcodes => supported::operation_codes(call),
        Op::SupportedTmfs => supported::task_management(call),
        Op::ExtendedCopy => copy::extended_copy(call).await,
        Op::ReceiveCopyResults => copy::receive_results(call),
    }
}
