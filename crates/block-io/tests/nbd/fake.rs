//! A server whose answers are written by the test.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use block_io::NbdAddress;

use super::servers::address;

pub(crate) const FLUSH: u16 = 1 << 2;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH_COMMAND: u16 = 3;

/// What the handshake says.
#[derive(Clone, Copy)]
pub(crate) struct Export {
    pub(crate) size: u64,
    pub(crate) flags: u16,
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) structured: bool,
}

impl Default for Export {
    fn default() -> Self {
        Self {
            size: 1 << 20,
            flags: 1 | FLUSH,
            blocks: (512, 4096, 1 << 25),
            structured: true,
        }
    }
}

/// Serves every connection, one after the other, with `talk`, which is told the connection's number.
pub(crate) fn serve(
    talk: impl Fn(usize, &mut UnixStream) -> std::io::Result<()> + Send + 'static,
) -> (tempfile::TempDir, NbdAddress) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            // The client hangs up when it has had enough.
            drop(talk(number, &mut stream.unwrap()));
        }
    });
    (folder, address(&path))
}

pub(crate) fn greet(stream: &mut UnixStream) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])
}

/// Reads an option; returns its number.
pub(crate) fn option(stream: &mut UnixStream) -> std::io::Result<u32> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    assert_eq!(&head[..8], b"IHAVEOPT");
    let length = u32::from_be_bytes(*head[12..].first_chunk().unwrap());
    stream.read_exact(&mut vec![0; length as usize])?;
    Ok(u32::from_be_bytes(*head[8..].first_chunk().unwrap()))
}

pub(crate) fn answer_option(
    stream: &mut UnixStream,
    option: u32,
    kind: u32,
    data: &[u8],
) -> std::io::Result<()> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)
}

pub(crate) fn handshake(stream: &mut UnixStream, export: &Export) -> std::io::Result<()> {
    greet(stream)?;
    loop {
        match option(stream)? {
            8 => answer_option(stream, 8, if export.structured { 1 } else { 1 << 31 | 1 }, &[])?,
            7 => {
                let mut data = vec![0, 0];
                data.extend(export.size.to_be_bytes());
                data.extend(export.flags.to_be_bytes());
                answer_option(stream, 7, 3, &data)?;
                let mut data = vec![0, 3];
                for size in [export.blocks.0, export.blocks.1, export.blocks.2] {
                    data.extend(size.to_be_bytes());
                }
                answer_option(stream, 7, 3, &data)?;
                return answer_option(stream, 7, 1, &[]);
            }
            other => answer_option(stream, other, 1 << 31 | 1, &[])?,
        }
    }
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn request(stream: &mut UnixStream) -> std::io::Result<Request> {
    Ok(any_request(stream)?.0)
}

/// A request, and the length that it asks for.
pub(crate) fn any_request(stream: &mut UnixStream) -> std::io::Result<(Request, u32)> {
    let mut head = [0; 28];
    stream.read_exact(&mut head)?;
    assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes());
    let command = u16::from_be_bytes(*head[6..].first_chunk().unwrap());
    let length = u32::from_be_bytes(*head[24..].first_chunk().unwrap());
    let mut data = vec![0; if command == WRITE { length as usize } else { 0 }];
    stream.read_exact(&mut data)?;
    let request = Request {
        command,
        cookie: u64::from_be_bytes(*head[8..].first_chunk().unwrap()),
        offset: u64::from_be_bytes(*head[16..].first_chunk().unwrap()),
        data,
    };
    Ok((request, length))
}

pub(crate) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// A chunk that claims to have `length` bytes and has `body`.
pub(crate) fn chunk(last: bool, kind: u16, cookie: u64, length: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(u16::from(last).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A chunk of data.
pub(crate) fn data(last: bool, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut body = offset.to_be_bytes().to_vec();
    body.extend(bytes);
    chunk(last, 1, cookie, body.len() as u32, &body)
}
