//! Protocol data units (RFC 7143 §11): a basic header segment of 48 bytes, additional header segments, and data, padded to
//! words; header and data each with a digest if that was negotiated (§11.2).

use super::link::Permit;
use crate::sockets::buffers::Buffer;
use std::rc::Rc;

/// Bytes of a basic header segment.
pub(super) const HEAD: usize = 48;
/// Bytes of a digest.
pub(super) const DIGEST: usize = 4;
/// A task tag, or target transfer tag, that means none.
pub(super) const NO_TAG: u32 = u32::MAX;

/// Opcodes of initiators (§11.2.1.2).
pub(super) mod request {
    pub(crate) const NOP_OUT: u8 = 0x00;
    pub(crate) const COMMAND: u8 = 0x01;
    pub(crate) const TASK_MANAGEMENT: u8 = 0x02;
    pub(crate) const LOGIN: u8 = 0x03;
    pub(crate) const TEXT: u8 = 0x04;
    pub(crate) const DATA_OUT: u8 = 0x05;
    pub(crate) const LOGOUT: u8 = 0x06;
    pub(crate) const SNACK: u8 = 0x10;
}

/// Opcodes of targets.
pub(super) mod response {
    pub(crate) const NOP_IN: u8 = 0x20;
    pub(crate) const COMMAND: u8 = 0x21;
    pub(crate) const TASK_MANAGEMENT: u8 = 0x22;
    pub(crate) const LOGIN: u8 = 0x23;
    pub(crate) const TEXT: u8 = 0x24;
    pub(crate) const DATA_IN: u8 = 0x25;
    pub(crate) const LOGOUT: u8 = 0x26;
    pub(crate) const R2T: u8 = 0x31;
    pub(crate) const ASYNC: u8 = 0x32;
    pub(crate) const REJECT: u8 = 0x3f;
}

/// Reasons of a Reject (§11.17.1).
pub(super) mod reason {
    pub(crate) const DATA_DIGEST: u8 = 0x02;
    pub(crate) const SNACK: u8 = 0x03;
    pub(crate) const PROTOCOL: u8 = 0x04;
    pub(crate) const UNSUPPORTED: u8 = 0x05;
    pub(crate) const TOO_MANY_IMMEDIATE: u8 = 0x06;
    pub(crate) const TASK_IN_PROGRESS: u8 = 0x07;
    pub(crate) const INVALID_FIELD: u8 = 0x09;
}

/// The final bit, and that text goes on (§11.2.1.3, §11.10.2).
pub(super) const FINAL: u8 = 0x80;
pub(super) const CONTINUE: u8 = 0x40;

/// A basic header segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head(pub(super) [u8; HEAD]);

impl Head {
    /// An answer with `opcode` and `flags` to the task `tag`.
    pub(super) fn new(opcode: u8, flags: u8, tag: u32) -> Self {
        let mut bytes = [0; HEAD];
        bytes[0] = opcode;
        bytes[1] = flags;
        Self(bytes).with(16, tag)
    }

    /// The same with a number of 32 bits at byte `at`.
    pub(super) fn with(mut self, at: usize, number: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&number.to_be_bytes());
        self
    }

    pub(super) fn set(&mut self, at: usize, number: u32) {
        *self = self.with(at, number);
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    pub(super) fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    /// Whether the request goes past the order of commands (§11.2.1.1).
    pub(super) fn is_immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    pub(super) fn is_final(&self) -> bool {
        self.0[1] & FINAL != 0
    }

    /// Bytes of additional header segments.
    pub(super) fn additional(&self) -> usize {
        usize::from(self.0[4]) * 4
    }

    /// Bytes of data, without padding.
    pub(super) fn data_length(&self) -> usize {
        usize::from(self.0[5]) << 16 | usize::from(self.0[6]) << 8 | usize::from(self.0[7])
    }

    pub(super) fn lun(&self) -> [u8; 8] {
        let mut lun = [0; 8];
        lun.copy_from_slice(&self.0[8..16]);
        lun
    }

    pub(super) fn set_lun(&mut self, lun: [u8; 8]) {
        self.0[8..16].copy_from_slice(&lun);
    }

    /// Initiator task tag.
    pub(super) fn tag(&self) -> u32 {
        self.u32(16)
    }

    /// CmdSN; of requests that have one.
    pub(super) fn command_number(&self) -> u32 {
        self.u32(24)
    }
}

/// Bytes that fill `length` up to whole words.
pub(super) fn padding(length: usize) -> usize {
    length.wrapping_neg() & 3
}

/// A CRC-32C as it is computed piece by piece (§13.1).
#[derive(Debug)]
pub(super) struct Crc(crc_fast::Digest);

impl Crc {
    pub(super) fn new() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// As it is sent.
    pub(super) fn bytes(&self) -> [u8; DIGEST] {
        let [a, b, c, d, ..] = self.0.finalize().to_le_bytes();
        [a, b, c, d]
    }
}

/// The digest of `bytes`.
pub(super) fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    let [a, b, c, d, ..] = sum.to_le_bytes();
    [a, b, c, d]
}

/// Which digests a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Digests {
    pub(super) header: bool,
    pub(super) data: bool,
}

/// Data of a PDU to be sent.
#[derive(Debug)]
pub(super) enum Body {
    Nothing,
    Bytes(Vec<u8>),
    /// So many bytes of a buffer that several PDUs share.
    Part(Rc<Buffer>, usize, usize),
}

impl Body {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Bytes(bytes) => bytes,
            Self::Part(buffer, start, length) => {
                let rest = buffer.as_slice().get(*start..).unwrap_or_default();
                rest.get(..*length).unwrap_or(rest)
            }
        }
    }
}

/// A PDU to be sent, complete.
#[derive(Debug)]
pub(super) struct Out {
    head: [u8; HEAD + DIGEST],
    head_length: usize,
    body: Body,
    /// Padding and the digest of the data.
    tail: [u8; 3 + DIGEST],
    tail_length: usize,
    /// Memory that is in use until this was sent.
    _permit: Option<Permit>,
}

impl Out {
    /// Makes a PDU of `head`, all of whose fields but the data's length are right, and `body`.
    pub(super) fn new(mut head: Head, body: Body, digests: Digests, permit: Option<Permit>) -> Self {
        let data = body.as_slice();
        let length = data.len();
        // Whoever sends limits it to what 24 bits can say.
        let [_, high, middle, low] = u32::try_from(length).unwrap_or(0).to_be_bytes();
        head.0[5..8].copy_from_slice(&[high, middle, low]);
        let mut bytes = [0; HEAD + DIGEST];
        bytes[..HEAD].copy_from_slice(&head.0);
        let mut head_length = HEAD;
        if digests.header {
            bytes[HEAD..].copy_from_slice(&digest(&head.0));
            head_length += DIGEST;
        }
        let mut tail = [0; 3 + DIGEST];
        let mut tail_length = padding(length);
        if digests.data && length > 0 {
            let mut crc = Crc::new();
            crc.update(data);
            crc.update(&tail[..tail_length]);
            tail[tail_length..tail_length + DIGEST].copy_from_slice(&crc.bytes());
            tail_length += DIGEST;
        }
        Self {
            head: bytes,
            head_length,
            body,
            tail,
            tail_length,
            _permit: permit,
        }
    }

    /// What is sent, one after the other.
    pub(super) fn pieces(&self) -> [&[u8]; 3] {
        [
            &self.head[..self.head_length],
            self.body.as_slice(),
            &self.tail[..self.tail_length],
        ]
    }

    pub(super) fn length(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard() {
        // RFC 7143 appendix A.4: as bytes in the order in which they are sent.
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        for (data, expected) in [
            (&[0; 32][..], [0xaa, 0x36, 0x91, 0x8a]),
            (&[0xff; 32], [0x43, 0xab, 0xa8, 0x62]),
            (&rising, [0x4e, 0x79, 0xdd, 0x46]),
            (&falling, [0x5c, 0xdb, 0x3f, 0x11]),
        ] {
            assert_eq!(digest(data), expected);
            let mut crc = Crc::new();
            crc.update(&data[..7]);
            crc.update(&data[7..]);
            assert_eq!(crc.bytes(), expected);
        }
    }

    #[test]
    fn a_pdu_has_padding_and_digests_where_they_belong() {
        let both = Digests {
            header: true,
            data: true,
        };
        let head = Head::new(response::NOP_IN, FINAL, 7);
        for (digests, length, expected) in [
            (Digests::default(), 0, 48),
            (Digests::default(), 5, 56),
            (both, 0, 52),
            (both, 5, 64),
            (both, 8, 64),
        ] {
            let out = Out::new(head, Body::Bytes(vec![9; length]), digests, None);
            let bytes = out.pieces().concat();
            assert_eq!(
                (out.length(), bytes.len()),
                (expected, expected),
                "{digests:?} {length}"
            );
            let decoded = Head(bytes[..48].try_into().unwrap());
            assert_eq!((decoded.data_length(), decoded.tag()), (length, 7));
            if digests.header {
                assert_eq!(bytes[48..52], digest(&bytes[..48]));
            }
            if digests.data && length > 0 {
                let data = &bytes[52..bytes.len() - 4];
                assert_eq!(bytes[bytes.len() - 4..], digest(data));
            }
        }
        assert_eq!([0, 1, 2, 3, 4].map(padding), [0, 3, 2, 1, 0]);
    }
}
