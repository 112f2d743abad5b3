//! The messages of the NBD protocol's transmission phase, as numbers and bytes (the protocol's document, `proto.md`:
//! "Transmission phase", "Values").

/// Length of a request without its data.
pub(super) const REQUEST: usize = 28;
/// Length of a simple reply without its data.
const SIMPLE_REPLY: usize = 16;
/// Length of the head of a chunk of a structured reply.
const CHUNK: usize = 20;
/// Longest head of a reply.
pub(super) const LONGEST_HEAD: usize = CHUNK;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// What the export can do (transmission flags).
pub(super) mod can {
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const FLUSH: u16 = 1 << 2;
    pub(in super::super) const FUA: u16 = 1 << 3;
    pub(in super::super) const TRIM: u16 = 1 << 5;
    pub(in super::super) const WRITE_ZEROES: u16 = 1 << 6;
}

/// Flags of a request.
pub(super) const FLAG_FUA: u16 = 1;
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;

/// Longest text that a server may send with an error or in the handshake; the protocol's limit for all strings.
pub(super) const LONGEST_TEXT: usize = 4096;

/// The requests that we make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
}

impl Command {
    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
        }
    }
}

/// A request without its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) command: Command,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Head {
    pub(super) fn encode(&self) -> [u8; REQUEST] {
        let mut bytes = [0; REQUEST];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.code().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// The head of what a server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Simple {
        error: u32,
        cookie: u64,
    },
    Chunk {
        last: bool,
        kind: Kind,
        cookie: u64,
        length: u32,
    },
}

/// What a chunk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Nothing,
    Data,
    Hole,
    /// An error; what follows the fixed part of its payload does not matter.
    Error,
    Unknown(u16),
}

impl Reply {
    /// The head at the start of `bytes`, and its length; `None` if there are too few bytes.
    ///
    /// # Errors
    /// The magic number that no reply has.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, u32> {
        let Some(magic) = u32_at(bytes, 0) else {
            return Ok(None);
        };
        let decoded = match magic {
            SIMPLE_REPLY_MAGIC => Self::simple(bytes).map(|reply| (reply, SIMPLE_REPLY)),
            CHUNK_MAGIC => Self::chunk(bytes).map(|reply| (reply, CHUNK)),
            other => return Err(other),
        };
        Ok(decoded)
    }

    fn simple(bytes: &[u8]) -> Option<Self> {
        Some(Self::Simple {
            error: u32_at(bytes, 4)?,
            cookie: u64_at(bytes, 8)?,
        })
    }

    fn chunk(bytes: &[u8]) -> Option<Self> {
        let kind = match u16_at(bytes, 6)? {
            0 => Kind::Nothing,
            1 => Kind::Data,
            2 => Kind::Hole,
            error if error & 1 << 15 != 0 => Kind::Error,
            other => Kind::Unknown(other),
        };
        Some(Self::Chunk {
            last: u16_at(bytes, 4)? & 1 != 0,
            kind,
            cookie: u64_at(bytes, 8)?,
            length: u32_at(bytes, 16)?,
        })
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The errno that an error number of the protocol stands for.
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_laid_out_as_the_protocol_says() {
        let head = Head {
            command: Command::WriteZeroes,
            flags: FLAG_FUA | FLAG_NO_HOLE,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x200,
        };
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0,
        ];
        assert_eq!(head.encode(), expected);
    }

    #[test]
    fn heads_are_decoded_when_they_are_complete_and_rubbish_is_refused() {
        let simple = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 9];
        for length in 0..simple.len() {
            assert_eq!(Reply::decode(&simple[..length]), Ok(None));
        }
        let reply = Reply::Simple { error: 28, cookie: 9 };
        assert_eq!(Reply::decode(&simple), Ok(Some((reply, 16))));
        let chunk = [
            0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 6,
        ];
        let reply = Reply::Chunk {
            last: true,
            kind: Kind::Error,
            cookie: 9,
            length: 6,
        };
        assert_eq!(Reply::decode(&chunk[..19]), Ok(None));
        assert_eq!(Reply::decode(&chunk), Ok(Some((reply, 20))));
        assert_eq!(Reply::decode(b"HTTP/1.1"), Err(0x4854_5450));
    }
}
