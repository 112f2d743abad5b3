//! Replies of the transmission phase as bytes: the head is made here, data go from where they are.

use block_io::nbd::protocol::{
    CHUNK_MAGIC, EXTENDED_CHUNK, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk, error,
};
use block_io::{IoCause, IoError};

use super::link::Permit;
use crate::sockets::buffers::Buffer;

/// Longest head: that of extended headers, and an offset.
const LONGEST: usize = EXTENDED_CHUNK + 8;

/// How replies look on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Simple,
    Structured,
    Extended,
}

/// What follows the head.
#[derive(Debug)]
enum Body {
    Nothing,
    Data(Buffer),
    Bytes(Vec<u8>),
}

/// A reply, or a chunk of one.
#[derive(Debug)]
pub(super) struct Reply {
    head: [u8; LONGEST],
    head_length: u8,
    body: Body,
    /// Counts as a request until it is sent.
    permit: Option<Permit>,
}

/// The head of a chunk.
struct Chunk {
    kind: u16,
    last: bool,
    cookie: u64,
    /// The request's offset, which extended headers repeat.
    offset: u64,
    length: usize,
}

impl Reply {
    /// The pieces to be sent, one after the other.
    pub(super) fn pieces(&self) -> [&[u8]; 2] {
        let body = match &self.body {
            Body::Nothing => &[],
            Body::Data(buffer) => buffer.as_slice(),
            Body::Bytes(bytes) => bytes.as_slice(),
        };
        [self.head(), body]
    }

    /// Whether it is the last chunk.
    pub(super) fn is_last(&self) -> bool {
        self.head[5] & 1 != 0
    }

    /// Counts as a request until it is sent.
    pub(super) fn carry(&mut self, permit: Option<Permit>) {
        self.permit = permit;
    }

    fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_length)]
    }

    fn simple(number: u32, cookie: u64, body: Body, permit: Option<Permit>) -> Self {
        let mut head = [0; LONGEST];
        head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&number.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        Self {
            head,
            head_length: 16,
            body,
            permit,
        }
    }

    fn chunk(style: Style, described: &Chunk, body: Body, permit: Option<Permit>) -> Self {
        let mut head = [0; LONGEST];
        let flags = if described.last { chunk::DONE } else { 0 };
        let length = described.length as u64;
        let magic = match style {
            Style::Extended => EXTENDED_CHUNK_MAGIC,
            _ => CHUNK_MAGIC,
        };
        head[..4].copy_from_slice(&magic.to_be_bytes());
        head[4..6].copy_from_slice(&flags.to_be_bytes());
        head[6..8].copy_from_slice(&described.kind.to_be_bytes());
        head[8..16].copy_from_slice(&described.cookie.to_be_bytes());
        let head_length = if style == Style::Extended {
            head[16..24].copy_from_slice(&described.offset.to_be_bytes());
            head[24..32].copy_from_slice(&length.to_be_bytes());
            32
        } else {
            // Bodies are at most a little longer than the largest request.
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            head[16..20].copy_from_slice(&length.to_be_bytes());
            20
        };
        Self {
            head,
            head_length,
            body,
            permit,
        }
    }

    /// It is done.
    pub(super) fn done(style: Style, cookie: u64, offset: u64, permit: Option<Permit>) -> Self {
        // A simple reply is shorter, and allowed for everything but reads; extended headers know no simple replies.
        if style != Style::Extended {
            return Self::simple(0, cookie, Body::Nothing, permit);
        }
        Self::nothing(style, cookie, offset, permit)
    }

    /// The chunk without content.
    pub(super) fn nothing(style: Style, cookie: u64, offset: u64, permit: Option<Permit>) -> Self {
        let described = Chunk {
            kind: chunk::NONE,
            last: true,
            cookie,
            offset,
            length: 0,
        };
        Self::chunk(style, &described, Body::Nothing, permit)
    }

    /// What was read from `offset` on.
    pub(super) fn data(style: Style, cookie: u64, offset: u64, data: Buffer, permit: Option<Permit>) -> Self {
        let count = data.as_slice().len();
        if style == Style::Simple {
            return Self::simple(0, cookie, Body::Data(data), permit);
        }
        if count == 0 {
            return Self::nothing(style, cookie, offset, permit);
        }
        let described = Chunk {
            kind: chunk::OFFSET_DATA,
            last: true,
            cookie,
            offset,
            length: 8 + count,
        };
        let mut reply = Self::chunk(style, &described, Body::Data(data), permit);
        let at = usize::from(reply.head_length);
        reply.head[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        reply.head_length += 8;
        reply
    }

    /// Extents of context `context`.
    pub(super) fn extents(
        style: Style,
        cookie: u64,
        offset: u64,
        context: u32,
        extents: &[(u64, u32)],
        last: bool,
    ) -> Self {
        let mut bytes = context.to_be_bytes().to_vec();
        let kind = if style == Style::Extended {
            bytes.extend(u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
            for (length, flags) in extents {
                bytes.extend(length.to_be_bytes());
                bytes.extend(u64::from(*flags).to_be_bytes());
            }
            chunk::BLOCK_STATUS_EXT
        } else {
            for (length, flags) in extents {
                // They were made that short.
                bytes.extend(u32::try_from(*length).unwrap_or(u32::MAX).to_be_bytes());
                bytes.extend(flags.to_be_bytes());
            }
            chunk::BLOCK_STATUS
        };
        let described = Chunk {
            kind,
            last,
            cookie,
            offset,
            length: bytes.len(),
        };
        Self::chunk(style, &described, Body::Bytes(bytes), None)
    }

    /// It failed.
    pub(super) fn error(
        style: Style,
        cookie: u64,
        offset: u64,
        number: u32,
        message: &str,
        permit: Option<Permit>,
    ) -> Self {
        if style == Style::Simple {
            return Self::simple(number, cookie, Body::Nothing, permit);
        }
        let mut end = message.len().min(1024);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        let message = &message.as_bytes()[..end];
        let mut bytes = number.to_be_bytes().to_vec();
        bytes.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(message);
        let described = Chunk {
            kind: chunk::ERROR,
            last: true,
            cookie,
            offset,
            length: bytes.len(),
        };
        Self::chunk(style, &described, Body::Bytes(bytes), permit)
    }
}

/// The protocol's number for a failure of the disk.
pub(super) fn number_of(failure: &IoError) -> u32 {
    if failure.is_no_space() {
        return error::NO_SPACE;
    }
    match failure.cause() {
        // The disk has become smaller since the request was checked.
        IoCause::OutOfRange { .. } | IoCause::Misaligned { .. } => error::INVALID,
        IoCause::ReadOnly => error::PERM,
        IoCause::Os(source) => match source.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::FBIG) => error::NO_SPACE,
            Some(rustix::io::Errno::NOMEM) => error::NO_MEMORY,
            Some(rustix::io::Errno::OPNOTSUPP) => error::NOT_SUPPORTED,
            Some(rustix::io::Errno::PERM | rustix::io::Errno::ROFS) => error::PERM,
            _ => error::IO,
        },
        _ => error::IO,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use block_io::Operation;

    use super::*;
    use crate::sockets::buffers::Pool;

    fn bytes(reply: &Reply) -> Vec<u8> {
        reply.pieces().concat()
    }

    #[test]
    fn replies_look_as_the_protocol_says() {
        let done = bytes(&Reply::done(Style::Structured, 9, 512, None));
        assert_eq!(done, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        let mut data = Pool::new(0).take(2);
        data.as_mut_slice().copy_from_slice(b"ab");
        let read = bytes(&Reply::data(Style::Structured, 9, 512, data, None));
        let expected = [
            0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 2, 0,
            b'a', b'b',
        ];
        assert_eq!(read, expected);
        let failed = bytes(&Reply::error(Style::Structured, 9, 512, 5, "no", None));
        assert_eq!(failed[4..8], [0, 1, 0x80, 1]);
        assert_eq!(failed[16..], [0, 0, 0, 8, 0, 0, 0, 5, 0, 2, b'n', b'o']);
        assert_eq!(
            bytes(&Reply::error(Style::Simple, 9, 512, 5, "no", None)).len(),
            16
        );
        let long = "ä".repeat(2000);
        assert_eq!(
            bytes(&Reply::error(Style::Structured, 9, 0, 5, &long, None)).len(),
            26 + 1024
        );
    }

    #[test]
    fn extended_replies_have_long_lengths() {
        let status = bytes(&Reply::extents(Style::Extended, 9, 512, 3, &[(1 << 40, 2)], true));
        assert_eq!(status[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6]);
        assert_eq!(status[16..32], [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 24]);
        let expected = [
            0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
        ];
        assert_eq!(status[32..], expected);
        let short = bytes(&Reply::extents(Style::Structured, 9, 512, 3, &[(512, 3)], false));
        assert_eq!(short[4..8], [0, 0, 0, 5]);
        assert_eq!(short[16..], [0, 0, 0, 12, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0, 0, 3]);
        assert_eq!(bytes(&Reply::done(Style::Extended, 9, 512, None)).len(), 32);
    }

    #[test]
    fn failures_become_numbers_of_the_protocol() {
        let device: Arc<str> = "disk".into();
        let number = |cause: IoCause| number_of(&IoError::new(&device, Operation::Write, 0, 512, cause));
        let os = |errno: rustix::io::Errno| IoCause::Os(io::Error::from(errno));
        assert_eq!(number(os(rustix::io::Errno::NOSPC)), 28);
        assert_eq!(number(os(rustix::io::Errno::DQUOT)), 28);
        assert_eq!(number(os(rustix::io::Errno::FBIG)), 28);
        assert_eq!(number(os(rustix::io::Errno::IO)), 5);
        // It would tell the client that this server ends.
        assert_eq!(number(os(rustix::io::Errno::SHUTDOWN)), 5);
        assert_eq!(number(IoCause::ReadOnly), 1);
        assert_eq!(number(IoCause::EarlierFlushFailed), 5);
        assert_eq!(number(IoCause::Misaligned { block: 512 }), 22);
    }
}
