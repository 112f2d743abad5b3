//! A client that says exactly what it is told to.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use block_io::nbd::protocol::{
    EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, chunk, option, reply, u16_at,
    u32_at, u64_at,
};

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) extended: bool,
}

/// A reply as it came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) last: bool,
    pub(crate) kind: u16,
    pub(crate) data: Vec<u8>,
}

impl Client {
    /// Connected, greeted, flags sent.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut client = Self::silent(socket);
        client.stream.write_all(&3_u32.to_be_bytes()).unwrap();
        client
    }

    /// Connected, and the greeting read.
    pub(crate) fn silent(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut client = Self {
            stream,
            extended: false,
        };
        let greeting = client.take(18).unwrap();
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
        client
    }

    /// With structured replies (or extended headers), on export `disk`, with these contexts.
    pub(crate) fn ready(socket: &Path, extended: bool, contexts: &[&str]) -> Self {
        let mut client = Self::greeted(socket);
        client.extended = extended;
        let how = if extended {
            option::EXTENDED_HEADERS
        } else {
            option::STRUCTURED_REPLY
        };
        assert_eq!(client.option(how, &[]), [reply::ACK]);
        if !contexts.is_empty() {
            let mut data = b"\0\0\0\x04disk".to_vec();
            data.extend((contexts.len() as u32).to_be_bytes());
            for context in contexts {
                data.extend((context.len() as u32).to_be_bytes());
                data.extend(context.as_bytes());
            }
            let answers = client.option(option::SET_META_CONTEXT, &data);
            assert_eq!(answers.len(), contexts.len() + 1);
        }
        assert_eq!(
            client.option(option::GO, b"\0\0\0\x04disk\0\0"),
            [reply::INFO, reply::INFO, reply::ACK]
        );
        client
    }

    pub(crate) fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message).unwrap();
    }

    /// Kinds of the answers to an option.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
        self.send_option(option, data);
        let mut kinds = Vec::new();
        loop {
            let head = self.take(20).unwrap();
            assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(u32_at(&head, 8), Some(option));
            let kind = u32_at(&head, 12).unwrap();
            let length = u32_at(&head, 16).unwrap();
            self.take(length as usize).unwrap();
            kinds.push(kind);
            if kind == reply::ACK || kind & reply::ERROR != 0 {
                return kinds;
            }
        }
    }

    pub(crate) fn request(&self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
        let magic = if self.extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        let mut message = magic.to_be_bytes().to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        if self.extended {
            message.extend(length.to_be_bytes());
        } else {
            message.extend((length as u32).to_be_bytes());
        }
        message
    }

    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u64,
        data: &[u8],
    ) {
        let mut message = self.request(command, flags, cookie, offset, length);
        message.extend(data);
        self.stream.write_all(&message).unwrap();
    }

    /// The next reply or chunk.
    pub(crate) fn answer(&mut self) -> io::Result<Answer> {
        let magic = self.take(4)?;
        match magic[..] {
            [0x67, 0x44, 0x66, 0x98] => {
                assert!(!self.extended);
                let head = self.take(12)?;
                Ok(Answer {
                    cookie: u64_at(&head, 4).unwrap(),
                    error: u32_at(&head, 0).unwrap(),
                    last: true,
                    kind: chunk::NONE,
                    data: Vec::new(),
                })
            }
            [0x66, 0x8e, 0x33, 0xef] | [0x6e, 0x8a, 0x27, 0x8c] => {
                assert_eq!(self.extended, magic[0] == 0x6e);
                let head = self.take(if self.extended { 28 } else { 16 })?;
                let length = if self.extended {
                    u64_at(&head, 20).unwrap() as usize
                } else {
                    u32_at(&head, 12).unwrap() as usize
                };
                let kind = u16_at(&head, 2).unwrap();
                let data = self.take(length)?;
                let error = if kind & chunk::ERROR_BIT == 0 {
                    0
                } else {
                    u32_at(&data, 0).unwrap()
                };
                Ok(Answer {
                    cookie: u64_at(&head, 4).unwrap(),
                    error,
                    last: u16_at(&head, 0).unwrap() & chunk::DONE != 0,
                    kind,
                    data,
                })
            }
            _ => panic!("no reply: {magic:x?}"),
        }
    }

    /// Sends a request and returns the error number of its answer.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u64, data: &[u8]) -> u32 {
        self.send(command, flags, 77, offset, length, data);
        let answer = self.answer().unwrap();
        assert!(answer.last);
        assert_eq!(answer.cookie, 77);
        answer.error
    }

    /// Whether the server has closed the connection, or is about to.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ),
        }
    }
}
