//! All commands: how they are encoded, which bits of them are looked at, and who may send them while a unit is reserved.
//!
//! The table drives the dispatch, the check for bits that must be zero, and REPORT SUPPORTED OPERATION CODES: what is not here
//! does not exist, and what is here is what initiators are told.

/// What a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    TestUnitReady,
    RequestSense,
    Inquiry,
    ReportLuns,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    SynchronizeCache,
    ReportTargetPortGroups,
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
    /// Bits that are accepted and change nothing, and are not told of: group numbers, timestamps of others.
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
const CONTROL: u8 = 0xc0;
/// DPO, FUA.
const CACHE_BITS: u8 = 0x18;
/// Group number: accepted, and nothing is grouped.
const GROUP: u8 = 0x1f;

/// By operation code and service action.
pub(super) const TABLE: &[Entry] = {
    use Access::{Always, Inform, Read, Write};
    const C: u8 = CONTROL;
    &[
        entry(
            0x00,
            None,
            Op::TestUnitReady,
            Inform,
            &[0x00, 0, 0, 0, 0, C],
            "TEST UNIT READY",
        ),
        entry(
            0x03,
            None,
            Op::RequestSense,
            Always,
            &[0x03, 1, 0, 0, 0xff, C],
            "REQUEST SENSE",
        ),
        entry(
            0x12,
            None,
            Op::Inquiry,
            Always,
            &[0x12, 1, 0xff, 0xff, 0xff, C],
            "INQUIRY",
        ),
        entry(
            0x25,
            None,
            Op::ReadCapacity10,
            Inform,
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, C],
            "READ CAPACITY(10)",
        ),
        entry(
            0x28,
            None,
            Op::Read,
            Read,
            &[0x28, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "READ(10)",
        ),
        entry(
            0x2a,
            None,
            Op::Write,
            Write,
            &[0x2a, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "WRITE(10)",
        ),
        entry(
            0x35,
            None,
            Op::SynchronizeCache,
            Write,
            &[0x35, 0x02, 0xff, 0xff, 0xff, 0xff, GROUP, 0xff, 0xff, C],
            "SYNCHRONIZE CACHE(10)",
        ),
        entry(
            0x88,
            None,
            Op::Read,
            Read,
            &[
                0x88, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                GROUP, C,
            ],
            "READ(16)",
        ),
        entry(
            0x8a,
            None,
            Op::Write,
            Write,
            &[
                0x8a, CACHE_BITS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                GROUP, C,
            ],
            "WRITE(16)",
        ),
        entry(
            0x91,
            None,
            Op::SynchronizeCache,
            Write,
            &[
                0x91, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, GROUP, C,
            ],
            "SYNCHRONIZE CACHE(16)",
        ),
        entry(
            0x9e,
            Some(0x10),
            Op::ReadCapacity16,
            Inform,
            &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "READ CAPACITY(16)",
        ),
        entry(
            0xa0,
            None,
            Op::ReportLuns,
            Always,
            &[0xa0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT LUNS",
        ),
        entry(
            0xa3,
            Some(0x0a),
            Op::ReportTargetPortGroups,
            Inform,
            &[0xa3, 0xea, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, C],
            "REPORT TARGET PORT GROUPS",
        ),
    ]
};

/// What is known of an operation code.
pub(super) enum Known {
    Entry(&'static Entry),
    /// It has service actions, but not this one.
    NoSuchAction,
    Nothing,
}

/// Looks up the command that `cdb` is.
pub(super) fn find(cdb: &[u8]) -> Known {
    let opcode = cdb.first().copied().unwrap_or(0);
    let action = cdb.get(1).copied().unwrap_or(0) & 0x1f;
    let mut has_actions = false;
    for entry in TABLE.iter().filter(|entry| entry.opcode == opcode) {
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

impl Entry {
    /// The first bit of `cdb` that must be zero and is not, or the first byte that is missing: its byte and its bit.
    pub(super) fn flaw(&self, cdb: &[u8]) -> Option<(u16, u8)> {
        let action = if self.action.is_some() { 0x1f } else { 0 };
        for (at, used) in (0_u16..).zip(self.usage).skip(1) {
            let used = if at == 1 { *used | action } else { *used };
            let value = cdb.get(usize::from(at)).copied().unwrap_or(0xff) & !used;
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
            assert!(matches!(find(&cdb), Known::Entry(found) if std::ptr::eq(found, entry)));
        }
    }

    #[test]
    fn bits_that_must_be_zero_are_named() {
        let Known::Entry(read) = find(&[0x28]) else {
            panic!()
        };
        assert_eq!(read.flaw(&[0x28, 0x18, 1, 2, 3, 4, 0x1f, 5, 6, 0]), None);
        assert_eq!(read.flaw(&[0x28, 0x20, 1, 2, 3, 4, 0, 5, 6, 0]), Some((1, 5)));
        assert_eq!(read.flaw(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 4]), Some((9, 2)));
        assert_eq!(read.flaw(&[0x28, 0, 1]), Some((3, 7)));
    }
}
