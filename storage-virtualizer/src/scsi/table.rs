//! All commands: how they are encoded, which bits of them are looked at, and who may send them while a unit is reserved.
//!
//! The table drives the dispatch, the check for bits that must be zero, and REPORT SUPPORTED OPERATION CODES: what is not here
//! does not exist, and what is here is what initiators are told.

use super::unit::{Provisioning, UnitOptions};

/// What a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    TestUnitReady,
    RequestSense,
    Inquiry,
    ModeSense,
    ModeSelect,
    Reserve,
    Release,
    StartStop,
    SendDiagnostic,
    PreventAllow,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    WriteAndVerify,
    Verify,
    SynchronizeCache,
    PreFetch,
    ReadDefectData,
    WriteSame,
    Unmap,
    CompareAndWrite,
    OrWrite,
    GetLbaStatus,
    LogSense,
    PersistentIn,
    PersistentOut,
    ReportLuns,
    ReportTargetPortGroups,
    SupportedOpcodes,
    SupportedTmfs,
    ExtendedCopy,
    ReceiveCopyResults,
}

/// What a command does while somebody else has reserved the unit (SPC-4 §5.13.1, SBC-3 §4.17).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Runs.
    Always,
    /// Runs, but not under RESERVE.
    Inform,
    /// Runs if the reservation leaves reading to all.
    Read,
    /// Does not run.
    Write,
    /// The command looks itself.
    Own,
}

/// One command.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) opcode: u8,
    /// Service action, in the low five bits of byte 1.
    pub(super) action: Option<u8>,
    pub(super) op: Op,
    pub(super) access: Access,
    /// For each byte of the CDB the bits that are looked at; the others must be zero. The opcode, and the service action,
    /// are as they are (SPC-4 §6.35.3: CDB usage data).
    pub(super) usage: &'static [u8],
    /// As the standard calls it.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "for readers, and for the table in the book")
    )]
    pub(super) name: &'static str,
}

const fn entry(
    opcode: u8,
    action: Option<u8>,
    op: Op,
    access: Access,
    usage: &'static [u8],
    name: &'static str,
) -> Entry {
    Entry {
        opcode,
        action,
        op,
        access,
        usage,
        name,
    }
}

/// Vendor-specific bits of the control byte; NACA is refused.
const C: u8 = 0xc0;
/// DPO, FUA.
const CACHE_BITS: u8 = 0x18;
/// Group number: accepted, and nothing is grouped.
const GROUP: u8 = 0x1f;

/// By operation code and service action.
#[rustfmt::skip]
pub(super) static TABLE: &[Entry] = {
    use Access::{Always, Inform, Own, Read, Write};
    &[
        entry(0x00, None, Op::TestUnitReady, Inform,
            &[0x00, 0, 0, 0, 0, C],
            "TEST UNIT READY"),
        entry(0x03, None, Op::RequestSense, Always,
            &[0x03, 1, 0, 0, 0xff, C],
            "REQUEST SENSE"),
        entry(0x08, None, Op::Read, Read,
            &[0x08, 0x1f, 0xff, 0xff, 0xff, C],
            "READ(6)"),
        entry(0x0a, None, Op::Write, Write,
            &[0x0a, 0x1f, 0xff, 0xff, 0xff, C],
            "WRITE(6)"),
        entry(0x12, None, Op::Inquiry, Always,
            &[0x12, 1, 0xff, 0xff, 0xff, C],
            "INQUIRY"),
        entry(0x15, None, Op::ModeSelect, Write,
            &[0x15, 0x11, 0, 0, 0xff, C],
            "MODE SELECT(6)"),
        entry(0x16, None, Op::Reserve, Own,
            &[0x16, 0, 0, 0, 0, C],
            "RESERVE(6)"),
        entry(0x17, None, Op::Release, Own,
            &[0x17, 0, 0, 0, 0, C],
            "RELEASE(6)"),
        entry(0x1a, None, Op::ModeSense, Read,
            &[0x1a, 0x08, 0xff, 0xff, 0xff, C],
            "MODE SENSE(6)"),
        entry(0x1b, None, Op::StartStop, Own,
            &[0x1b, 1, 0, 0, 0xf7, C],
            "START STOP UNIT"),
        entry(0x1d, None, Op::SendDiagnostic, Write,
            &[0x1d, 0xf7, 0, 0xff, 0xff, C],
            "SEND DIAGNOSTIC"),
        entry(0x1e, None, Op::PreventAllow, Own,
            &[0x1e, 0, 0, 0, 3, C],
            "PREVENT ALLOW MEDIUM REMOVAL"),
        entry(0x25, None, Op::ReadCapacity10, Always,
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, C],
            "READ CAPACITY(10)"),
        entry(0x28, None, Op::Read, Read,
            &[0x28, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "READ(10)"),
        entry(0x2a, None, Op::Write, Write,
            &[0x2a, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "WRITE(10)"),
        entry(0x2e, None, Op::WriteAndVerify, Write,
            &[0x2e, 0x16, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "WRITE AND VERIFY(10)"),
        entry(0x2f, None, Op::Verify, Read,
            &[0x2f, 0x16, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "VERIFY(10)"),
        entry(0x34, None, Op::PreFetch, Read,
            &[0x34, 2, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "PRE-FETCH(10)"),
        entry(0x35, None, Op::SynchronizeCache, Write,
            &[0x35, 2, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "SYNCHRONIZE CACHE(10)"),
        entry(0x37, None, Op::ReadDefectData, Read,
            &[0x37, 0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, C],
            "READ DEFECT DATA(10)"),
        entry(0x41, None, Op::WriteSame, Write,
            &[0x41, 0x18, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "WRITE SAME(10)"),
        entry(0x42, None, Op::Unmap, Write,
            &[0x42, 1, 0, 0, 0, 0, GROUP, 0xff, 0xff, C],
            "UNMAP"),
        entry(0x4d, None, Op::LogSense, Always,
            &[0x4d, 1, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, C],
            "LOG SENSE"),
        entry(0x55, None, Op::ModeSelect, Write,
            &[0x55, 0x11, 0, 0, 0, 0, 0, 0xff, 0xff, C],
            "MODE SELECT(10)"),
        entry(0x5a, None, Op::ModeSense, Read,
            &[0x5a, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, C],
            "MODE SENSE(10)"),
        entry(0x5e, Some(0x00), Op::PersistentIn, Inform,
            &[0x5e, 0x00, 0, 0, 0, 0, 0, 0xff, 0xff, C],
            "PERSISTENT RESERVE IN, READ KEYS"),
        entry(0x5e, Some(0x01), Op::PersistentIn, Inform,
            &[0x5e, 0x01, 0, 0, 0, 0, 0, 0xff, 0xff, C],
            "PERSISTENT RESERVE IN, READ RESERVATION"),
        entry(0x5e, Some(0x02), Op::PersistentIn, Inform,
            &[0x5e, 0x02, 0, 0, 0, 0, 0, 0xff, 0xff, C],
            "PERSISTENT RESERVE IN, REPORT CAPABILITIES"),
        entry(0x5e, Some(0x03), Op::PersistentIn, Inform,
            &[0x5e, 0x03, 0, 0, 0, 0, 0, 0xff, 0xff, C],
            "PERSISTENT RESERVE IN, READ FULL STATUS"),
        entry(0x5f, Some(0x00), Op::PersistentOut, Inform,
            &[0x5f, 0x00, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, REGISTER"),
        entry(0x5f, Some(0x01), Op::PersistentOut, Inform,
            &[0x5f, 0x01, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, RESERVE"),
        entry(0x5f, Some(0x02), Op::PersistentOut, Inform,
            &[0x5f, 0x02, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, RELEASE"),
        entry(0x5f, Some(0x03), Op::PersistentOut, Inform,
            &[0x5f, 0x03, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, CLEAR"),
        entry(0x5f, Some(0x04), Op::PersistentOut, Inform,
            &[0x5f, 0x04, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, PREEMPT"),
        entry(0x5f, Some(0x05), Op::PersistentOut, Inform,
            &[0x5f, 0x05, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, PREEMPT AND ABORT"),
        entry(0x5f, Some(0x06), Op::PersistentOut, Inform,
            &[0x5f, 0x06, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY"),
        entry(0x5f, Some(0x07), Op::PersistentOut, Inform,
            &[0x5f, 0x07, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, C],
            "PERSISTENT RESERVE OUT, REGISTER AND MOVE"),
        entry(0x83, Some(0x00), Op::ExtendedCopy, Write,
            &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "EXTENDED COPY(LID1)"),
        entry(0x84, Some(0x00), Op::ReceiveCopyResults, Always,
            &[0x84, 0x00, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "RECEIVE COPY RESULTS, COPY STATUS(LID1)"),
        entry(0x84, Some(0x03), Op::ReceiveCopyResults, Always,
            &[0x84, 0x03, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "RECEIVE COPY RESULTS, OPERATING PARAMETERS"),
        entry(0x88, None, Op::Read, Read,
            &[0x88, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "READ(16)"),
        entry(0x89, None, Op::CompareAndWrite, Write,
            &[0x89, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, GROUP, C],
            "COMPARE AND WRITE"),
        entry(0x8a, None, Op::Write, Write,
            &[0x8a, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "WRITE(16)"),
        entry(0x8b, None, Op::OrWrite, Write,
            &[0x8b, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "ORWRITE(16)"),
        entry(0x8e, None, Op::WriteAndVerify, Write,
            &[0x8e, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "WRITE AND VERIFY(16)"),
        entry(0x8f, None, Op::Verify, Read,
            &[0x8f, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "VERIFY(16)"),
        entry(0x90, None, Op::PreFetch, Read,
            &[0x90, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "PRE-FETCH(16)"),
        entry(0x91, None, Op::SynchronizeCache, Write,
            &[0x91, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "SYNCHRONIZE CACHE(16)"),
        entry(0x93, None, Op::WriteSame, Write,
            &[0x93, 0x19, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "WRITE SAME(16)"),
        entry(0x9e, Some(0x10), Op::ReadCapacity16, Always,
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "READ CAPACITY(16)"),
        entry(0x9e, Some(0x12), Op::GetLbaStatus, Read,
            &[0x9e, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, C],
            "GET LBA STATUS"),
        entry(0xa0, None, Op::ReportLuns, Always,
            &[0xa0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT LUNS"),
        entry(0xa3, Some(0x0a), Op::ReportTargetPortGroups, Inform,
            &[0xa3, 0xea, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT TARGET PORT GROUPS"),
        entry(0xa3, Some(0x0c), Op::SupportedOpcodes, Inform,
            &[0xa3, 0x0c, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT SUPPORTED OPERATION CODES"),
        entry(0xa3, Some(0x0d), Op::SupportedTmfs, Inform,
            &[0xa3, 0x0d, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS"),
        entry(0xa8, None, Op::Read, Read,
            &[0xa8, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "READ(12)"),
        entry(0xaa, None, Op::Write, Write,
            &[0xaa, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "WRITE(12)"),
        entry(0xae, None, Op::WriteAndVerify, Write,
            &[0xae, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "WRITE AND VERIFY(12)"),
        entry(0xaf, None, Op::Verify, Read,
            &[0xaf, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C],
            "VERIFY(12)"),
        entry(0xb7, None, Op::ReadDefectData, Read,
            &[0xb7, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, C],
            "READ DEFECT DATA(12)"),
    ]
};

/// What is known of an operation code.
pub(super) enum Known {
    Entry(&'static Entry),
    /// It has service actions, but not this one.
    NoSuchAction,
    Nothing,
}

/// Looks up the command that `cdb` is, on a unit that is like `options`.
pub(super) fn find(cdb: &[u8], options: &UnitOptions) -> Known {
    let opcode = cdb.first().copied().unwrap_or(0);
    let action = cdb.get(1).copied().unwrap_or(0) & 0x1f;
    let mut has_actions = false;
    for entry in supported(options).filter(|entry| entry.opcode == opcode) {
        match entry.action {
            Some(own) if own != action => has_actions = true,
            _ => return Known::Entry(entry),
        }
    }
    if has_actions {
        Known::NoSuchAction
    } else {
        Known::Nothing
    }
}

/// The commands of a unit that is like `options`.
pub(super) fn supported(options: &UnitOptions) -> impl Iterator<Item = &'static Entry> {
    let thin = options.provisioning != Provisioning::Full;
    let removable = options.removable;
    let groups = !options.port_groups.is_empty();
    TABLE.iter().filter(move |entry| match entry.op {
        Op::Unmap => thin,
        Op::PreventAllow => removable,
        Op::ReportTargetPortGroups => groups,
        _ => true,
    })
}

/// Where SCSI-2 had the LUN in byte 1 of a CDB.
const LUN_OF_SCSI_2: u8 = 0xe0;

impl Entry {
    /// The first bit of `cdb` that must be zero and is not, or the first byte that is missing: its byte and its bit.
    pub(super) fn flaw(&self, cdb: &[u8]) -> Option<(u16, u8)> {
        let action = if self.action.is_some() { 0x1f } else { 0 };
        for (at, used) in (0_u16..).zip(self.usage).skip(1) {
            let used = match at {
                // Linux puts bits of the LUN there, as SCSI-2 wanted it, as long as it does not know what the target is.
                1 if self.op == Op::Inquiry => *used | LUN_OF_SCSI_2,
                1 => *used | action,
                _ => *used,
            };
            let Some(value) = cdb.get(usize::from(at)) else {
                return Some((at, 7));
            };
            let value = value & !used;
            if value != 0 {
                return Some((at, 7 - u8::try_from(value.leading_zeros()).unwrap_or(7)));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{Identity, PortGroup, PortState};

    /// Of a unit that has everything.
    fn options() -> UnitOptions {
        UnitOptions {
            removable: true,
            provisioning: Provisioning::Thin,
            port_groups: vec![PortGroup {
                id: 1,
                state: PortState::Optimized,
                preferred: false,
                ports: vec![1],
            }],
            ..UnitOptions::new(Identity::from_name("disk", "disk"))
        }
    }

    #[test]
    fn every_command_has_the_length_of_its_group_and_is_found() {
        for entry in TABLE {
            let length = match entry.opcode {
                0x00..=0x1f => 6,
                0x20..=0x5f => 10,
                0x80..=0x9f => 16,
                0xa0..=0xbf => 12,
                _ => panic!("{}", entry.name),
            };
            assert_eq!(entry.usage.len(), length, "{}", entry.name);
            assert_eq!(entry.usage[0], entry.opcode, "{}", entry.name);
            if let Some(action) = entry.action {
                assert_eq!(entry.usage[1] & 0x1f, action, "{}", entry.name);
            }
            let cdb = [entry.opcode, entry.action.unwrap_or(0)];
            assert!(matches!(find(&cdb, &options()), Known::Entry(found) if std::ptr::eq(found, entry)));
        }
    }

    #[test]
    fn bits_that_must_be_zero_are_named() {
        let Known::Entry(read) = find(&[0x28], &options()) else {
            panic!()
        };
        assert_eq!(read.flaw(&[0x28, 0x18, 1, 2, 3, 4, 0x1f, 5, 6, 0]), None);
        assert_eq!(read.flaw(&[0x28, 0x20, 1, 2, 3, 4, 0, 5, 6, 0]), Some((1, 5)));
        assert_eq!(read.flaw(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 4]), Some((9, 2)));
        assert_eq!(read.flaw(&[0x28, 0, 1]), Some((3, 7)));
    }
}
