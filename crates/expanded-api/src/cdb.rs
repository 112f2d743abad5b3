//! The command descriptor blocks of EXPANDED API IN and OUT.
//!
//! ```text
//!   byte  0      C0h IN, C1h OUT
//!         1      bits 4-0 service action; the others 0
//!         2-3    RECEIVE, EVENTS: milliseconds to wait, at most 4000; else 0
//!         4      bits 7-4 encoding (1 JSON), bits 3-0 major version
//!         5      SEND: bit 0 first fragment, bit 1 last fragment; else 0
//!         6-9    tag; EVENTS: number of the last event that is known; CAPABILITIES: 0
//!        10-13   bytes of this transfer (OUT), or of room for it (IN); CANCEL: 0
//!        14      number of the fragment (SEND), or of the piece (IN); else 0
//!        15      CONTROL: 0
//! ```

use crate::{MAJOR, MAX_PAYLOAD, MAX_WAIT_MS};

/// Operation code of EXPANDED API IN.
pub const IN: u8 = 0xc0;
/// Operation code of EXPANDED API OUT.
pub const OUT: u8 = 0xc1;

/// JSON.
const JSON: u8 = 1;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Who asks, and what it may do (IN).
    Capabilities,
    /// A request, or a piece of one (OUT).
    Send,
    /// What came of a request (IN).
    Receive,
    /// Take a request back that has not begun; forget one that has ended (OUT).
    Cancel,
    /// What happened (IN).
    Events,
}

impl Action {
    const ALL: [Self; 5] = [
        Self::Capabilities,
        Self::Send,
        Self::Receive,
        Self::Cancel,
        Self::Events,
    ];

    /// The service action.
    pub const fn code(self) -> u8 {
        match self {
            Self::Capabilities => 0,
            Self::Send => 1,
            Self::Receive => 2,
            Self::Cancel => 3,
            Self::Events => 4,
        }
    }

    /// The operation code.
    pub const fn opcode(self) -> u8 {
        match self {
            Self::Send | Self::Cancel => OUT,
            Self::Capabilities | Self::Receive | Self::Events => IN,
        }
    }

    /// In messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "CAPABILITIES",
            Self::Send => "SEND",
            Self::Receive => "RECEIVE",
            Self::Cancel => "CANCEL",
            Self::Events => "EVENTS",
        }
    }
}

/// A field of a CDB that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {byte} of the command: {problem}")]
pub struct Fault {
    /// Its first byte.
    pub byte: u16,
    /// Its highest bit in that byte; none if it is whole bytes.
    pub bit: Option<u8>,
    /// What is wrong.
    pub problem: &'static str,
}

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cdb {
    /// What is asked for.
    pub action: Action,
    /// The request that is meant; of [`Action::Events`] the number of the last event that is known.
    pub tag: u32,
    /// Bytes that are sent, or that there is room for.
    pub length: u32,
    /// Milliseconds to wait.
    pub wait_ms: u16,
    /// It is the first fragment of a request.
    pub first: bool,
    /// It is the last fragment of a request.
    pub last: bool,
    /// Number of the fragment, or of the piece of `length` bytes, from 0.
    pub fragment: u8,
}

impl Cdb {
    /// A command without fields that only some have.
    pub const fn new(action: Action, tag: u32, length: u32) -> Self {
        Self {
            action,
            tag,
            length,
            wait_ms: 0,
            first: false,
            last: false,
            fragment: 0,
        }
    }

    /// A request, or a piece of it, of `length` bytes.
    pub const fn send(tag: u32, length: u32, fragment: u8, last: bool) -> Self {
        let mut cdb = Self::new(Action::Send, tag, length);
        cdb.first = fragment == 0;
        cdb.last = last;
        cdb.fragment = fragment;
        cdb
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0] = self.action.opcode();
        bytes[1] = self.action.code();
        bytes[2..4].copy_from_slice(&self.wait_ms.to_be_bytes());
        bytes[4] = JSON << 4 | MAJOR;
        bytes[5] = u8::from(self.first) | u8::from(self.last) << 1;
        bytes[6..10].copy_from_slice(&self.tag.to_be_bytes());
        bytes[10..14].copy_from_slice(&self.length.to_be_bytes());
        bytes[14] = self.fragment;
        bytes
    }

    /// What `bytes` say; what follows the sixteenth is not looked at, and what is missing is zero.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let mut cdb = [0; 16];
        for (to, from) in cdb.iter_mut().zip(bytes) {
            *to = *from;
        }
        let fault = |byte, bit, problem| Err(Fault { byte, bit, problem });
        if cdb[1] & 0xe0 != 0 {
            return fault(1, Some(7), "reserved bits are not zero");
        }
        let found = Action::ALL
            .into_iter()
            .find(|action| action.code() == cdb[1] && action.opcode() == cdb[0]);
        let Some(action) = found else {
            return fault(1, Some(4), "there is no such service action");
        };
        if cdb[4] & 0x0f != MAJOR {
            return fault(4, Some(3), "this major version is not spoken here");
        }
        if cdb[4] >> 4 != JSON {
            return fault(4, Some(7), "this encoding is not spoken here");
        }
        let wait_ms = u16::from_be_bytes([cdb[2], cdb[3]]);
        let waits = matches!(action, Action::Receive | Action::Events);
        if wait_ms > if waits { MAX_WAIT_MS } else { 0 } {
            return fault(2, None, "no command waits so long");
        }
        let flags = if action == Action::Send { 3 } else { 0 };
        if cdb[5] & !flags != 0 {
            let bit = 7 - (cdb[5] & !flags).leading_zeros();
            return fault(5, u8::try_from(bit).ok(), "there is no such flag");
        }
        let length = u32::from_be_bytes([cdb[10], cdb[11], cdb[12], cdb[13]]);
        let wrong_length = match action {
            Action::Send => length == 0 || length as usize > MAX_PAYLOAD,
            Action::Cancel => length != 0,
            _ => (length as usize) < crate::Header::LENGTH,
        };
        if wrong_length {
            return fault(10, None, "the length is impossible");
        }
        let (first, last, fragment) = (cdb[5] & 1 != 0, cdb[5] & 2 != 0, cdb[14]);
        let wrong_fragment = match action {
            Action::Send => first != (fragment == 0),
            Action::Cancel => fragment != 0,
            _ => false,
        };
        if wrong_fragment {
            return fault(14, None, "this cannot be the number of the fragment");
        }
        let tag = u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]);
        if action == Action::Capabilities && tag != 0 {
            return fault(6, None, "there is no tag here");
        }
        if cdb[15] != 0 {
            return fault(15, None, "CONTROL is not zero");
        }
        Ok(Self {
            action,
            tag,
            length,
            wait_ms,
            first,
            last,
            fragment,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_wrong_field_is_named() {
        let good = |action| {
            let mut cdb = Cdb::new(action, 0, 64);
            match action {
                Action::Send => cdb = Cdb::send(7, 64, 0, true),
                Action::Cancel => cdb.length = 0,
                _ => {}
            }
            cdb.encode()
        };
        for action in Action::ALL {
            assert_eq!(Cdb::decode(&good(action)).unwrap().action, action);
        }
        for (action, byte, value, fault) in [
            (Action::Capabilities, 1, 0x20, (1, Some(7))),
            (Action::Capabilities, 1, 9, (1, Some(4))),
            (Action::Receive, 0, OUT, (1, Some(4))),
            (Action::Send, 4, 0x12, (4, Some(3))),
            (Action::Send, 4, 0x21, (4, Some(7))),
            (Action::Send, 3, 1, (2, None)),
            (Action::Receive, 2, 0x80, (2, None)),
            (Action::Send, 5, 0x43, (5, Some(6))),
            (Action::Receive, 5, 1, (5, Some(0))),
            (Action::Send, 10, 0x80, (10, None)),
            (Action::Send, 13, 0, (10, None)),
            (Action::Cancel, 12, 1, (10, None)),
            (Action::Receive, 13, 15, (10, None)),
            (Action::Send, 14, 1, (14, None)),
            (Action::Send, 5, 2, (14, None)),
            (Action::Cancel, 14, 1, (14, None)),
            (Action::Capabilities, 9, 1, (6, None)),
            (Action::Events, 15, 4, (15, None)),
        ] {
            let mut bytes = good(action);
            bytes[byte] = value;
            let found = Cdb::decode(&bytes).unwrap_err();
            assert_eq!((found.byte, found.bit), fault, "{action:?}, byte {byte}: {found}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_is_encoded_to_the_same(bytes in any::<[u8; 16]>(), shape in 0_usize..5) {
            // Most of 2^128 commands fail at the first byte.
            let mut bytes = bytes;
            bytes[0] = Action::ALL[shape].opcode();
            bytes[1] = Action::ALL[shape].code();
            bytes[4] = 0x11;
            (bytes[10], bytes[15]) = (0, 0);
            if let Ok(cdb) = Cdb::decode(&bytes) {
                prop_assert_eq!(cdb.encode(), bytes);
            }
        }
    }
}
