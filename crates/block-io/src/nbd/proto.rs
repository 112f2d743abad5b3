//! The messages of the NBD protocol's transmission phase, as numbers and bytes (the protocol's document, `proto.md`:
//! "Transmission phase", "Values").

use super::protocol::{
    CHUNK, CHUNK_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, chunk, command, error,
};

pub(super) use super::protocol::flag::{FUA as FLAG_FUA, NO_HOLE as FLAG_NO_HOLE};
pub(super) use super::protocol::{LONGEST_TEXT, REQUEST, can, u16_at, u32_at, u64_at};

/// Longest head of a reply.
pub(super) const LONGEST_HEAD: usize = CHUNK;

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
            Self::Read => command::READ,
            Self::Write => command::WRITE,
            Self::Disconnect => command::DISCONNECT,
            Self::Flush => command::FLUSH,
            Self::Trim => command::TRIM,
            Self::WriteZeroes => command::WRITE_ZEROES,
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
            chunk::NONE => Kind::Nothing,
            chunk::OFFSET_DATA => Kind::Data,
            chunk::OFFSET_HOLE => Kind::Hole,
            error if error & chunk::ERROR_BIT != 0 => Kind::Error,
            other => Kind::Unknown(other),
        };
        Some(Self::Chunk {
            last: u16_at(bytes, 4)? & chunk::DONE != 0,
            kind,
            cookie: u64_at(bytes, 8)?,
            length: u32_at(bytes, 16)?,
        })
    }
}

/// The errno that an error number of the protocol stands for.
pub(super) fn errno(number: u32) -> i32 {
    match number {
        error::PERM => libc::EPERM,
        error::NO_MEMORY => libc::ENOMEM,
        error::INVALID => libc::EINVAL,
        error::NO_SPACE => libc::ENOSPC,
        error::OVERFLOW => libc::EOVERFLOW,
        error::NOT_SUPPORTED => libc::EOPNOTSUPP,
        error::SHUTDOWN => libc::ESHUTDOWN,
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
