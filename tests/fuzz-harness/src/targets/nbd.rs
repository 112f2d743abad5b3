//! The NBD server against a client that mostly knows the protocol: options, requests and data in any order, with wrong
//! lengths, names, flags and ranges, cut off anywhere. What is read must be what was written, each request gets one answer, and
//! the server is there for the next client.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arbitrary::Unstructured;
use block_io::nbd::protocol::{
    EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, chunk, command, flag, option,
    reply, u16_at, u32_at, u64_at,
};
use block_io::{Geometry, IoError, ListenAddress, Worker, WorkerOptions};
use storage_virtualizer::nbd::{Export, Extent, Extents, NbdOptions, NbdServer};

use crate::disk::MemoryDisk;

const SIZE: u64 = 256 << 10;
const NAME: &[u8] = b"disk";

/// A disk of which clients are told something.
struct Exported(Arc<MemoryDisk>);

impl Export for Exported {
    type Disk = MemoryDisk;

    fn name(&self) -> &str {
        "disk"
    }

    fn description(&self) -> &str {
        "a disk"
    }

    fn disk(&self) -> &MemoryDisk {
        &self.0
    }

    fn snapshots(&self) -> Vec<String> {
        vec!["a".to_owned()]
    }

    async fn allocation(&self, offset: u64, length: u64, extents: &mut Extents) -> Result<(), IoError> {
        // Pieces of a block in turn, so that there are many.
        let (mut at, end) = (offset, offset + length);
        while at < end && !extents.is_full() {
            let step = (512 - at % 512).min(end - at);
            let kinds = [Extent::Data, Extent::Zeroes, Extent::Hole];
            extents.add(step, kinds[(at / 512 % 3) as usize]);
            at += step;
        }
        Ok(())
    }
}

struct Served {
    socket: PathBuf,
    disk: Arc<MemoryDisk>,
    _server: NbdServer,
    _worker: Worker,
}

// The server's handle is used by nobody; it only has to stay.
struct Always(Mutex<Served>);

fn served() -> &'static Always {
    static SERVED: OnceLock<Always> = OnceLock::new();
    SERVED.get_or_init(|| {
        let socket = std::env::temp_dir().join(format!("smsvmm-fuzz-nbd-{}", std::process::id()));
        let disk = Arc::new(MemoryDisk::without_guest(Geometry {
            size: SIZE,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }));
        let worker = Worker::start("nbd", WorkerOptions::default()).unwrap();
        let options = NbdOptions {
            listen: vec![ListenAddress::Unix(socket.clone())],
            requests: 8,
            memory: 64 << 10,
            ..NbdOptions::default()
        };
        let exported = Exported(Arc::clone(&disk));
        let server = NbdServer::start(worker.handle(), options, move || vec![exported]).unwrap();
        Always(Mutex::new(Served {
            socket,
            disk,
            _server: server,
            _worker: worker,
        }))
    })
}

/// Ends a history early: the server has closed the connection.
struct Closed;

struct Client {
    stream: UnixStream,
    extended: bool,
    structured: bool,
    contexts: usize,
    model: Vec<u8>,
}

type Step<T> = Result<T, Closed>;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let served = served()
        .0
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    served.disk.clear();
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut client = Client {
        stream,
        extended: false,
        structured: false,
        contexts: 0,
        model: vec![0; SIZE as usize],
    };
    let lived = client.live(input);
    // All that was sent is executed when the server has closed its side.
    client.stream.shutdown(std::net::Shutdown::Write).ok();
    let mut rest = [0; 4096];
    loop {
        match client.stream.read(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            // libFuzzer's alarm clock.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the server does not end the connection: {error}"),
        }
    }
    lived.map(drop)
}

impl Client {
    fn live(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        if self.take(18).is_err() {
            panic!("the server greets nobody");
        }
        let flags: u32 = if input.ratio(1, 50)? {
            input.arbitrary()?
        } else {
            3
        };
        if self.send(&flags.to_be_bytes()).is_err() {
            return Ok(Err(Closed));
        }
        for _ in 0..input.int_in_range(0..=6)? {
            if let Err(closed) = self.haggle(input)? {
                return Ok(Err(closed));
            }
        }
        let mut go = (NAME.len() as u32).to_be_bytes().to_vec();
        go.extend(NAME);
        go.extend([0, 0]);
        match self.option(option::GO, &go) {
            Ok(kinds) if flags & !3 == 0 => assert_eq!(kinds.last(), Some(&reply::ACK), "GO is refused"),
            Ok(_) => panic!("unknown flags are accepted"),
            Err(closed) => {
                assert!(flags & !3 != 0, "the server is gone");
                return Ok(Err(closed));
            }
        }
        while !input.is_empty() {
            if let Err(closed) = self.request(input)? {
                return Ok(Err(closed));
            }
        }
        Ok(Ok(()))
    }

    /// An option with data that are mostly right.
    fn haggle(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        let known = [
            option::LIST,
            option::INFO,
            option::STRUCTURED_REPLY,
            option::EXTENDED_HEADERS,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
            option::SET_META_CONTEXT,
            option::STARTTLS,
        ];
        let option = if input.ratio(1, 10)? {
            input.int_in_range(12..=200)?
        } else {
            *input.choose(&known)?
        };
        let mut data = Vec::new();
        let text = |data: &mut Vec<u8>, text: &[u8]| {
            data.extend((text.len() as u32).to_be_bytes());
            data.extend(text);
        };
        match option {
            option::INFO => {
                text(&mut data, NAME);
                let count = input.int_in_range(0..=4_u16)?;
                data.extend(count.to_be_bytes());
                for kind in 0..count {
                    data.extend(kind.to_be_bytes());
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                text(&mut data, NAME);
                let queries: [&[u8]; 5] = [
                    b"base:allocation",
                    b"base:",
                    b"qemu:dirty-bitmap:a",
                    b"smsvmm:changed:a",
                    b"x:",
                ];
                let count = input.int_in_range(0..=3_u32)?;
                data.extend(count.to_be_bytes());
                for _ in 0..count {
                    text(&mut data, input.choose(&queries)?);
                }
            }
            _ => {}
        }
        if input.ratio(1, 6)? && !data.is_empty() {
            let at = input.int_in_range(0..=data.len() - 1)?;
            data[at] = input.arbitrary()?;
        }
        if input.ratio(1, 10)? {
            data.truncate(input.int_in_range(0..=data.len())?);
        }
        let Ok(kinds) = self.option(option, &data) else {
            return Ok(Err(Closed));
        };
        let accepted = kinds.last() == Some(&reply::ACK);
        match option {
            option::STRUCTURED_REPLY if accepted => self.structured = true,
            option::EXTENDED_HEADERS if accepted => {
                self.structured = true;
                self.extended = true;
            }
            // What is refused leaves none.
            option::SET_META_CONTEXT => self.contexts = if accepted { kinds.len() - 1 } else { 0 },
            option::STARTTLS => assert!(!accepted, "TLS without a certificate"),
            _ => {}
        }
        Ok(Ok(()))
    }

    /// Kinds of the answers.
    fn option(&mut self, option: u32, data: &[u8]) -> Step<Vec<u32>> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send(&message)?;
        let mut kinds = Vec::new();
        loop {
            let head = self.take(20)?;
            assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(u32_at(&head, 8), Some(option));
            let kind = u32_at(&head, 12).unwrap();
            self.take(u32_at(&head, 16).unwrap() as usize)?;
            kinds.push(kind);
            if kind == reply::ACK || kind & reply::ERROR != 0 {
                return Ok(kinds);
            }
        }
    }

    fn request(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        let kinds = [
            command::READ,
            command::READ,
            command::WRITE,
            command::WRITE,
            command::FLUSH,
            command::TRIM,
            command::WRITE_ZEROES,
            command::BLOCK_STATUS,
        ];
        let command = if input.ratio(1, 30)? {
            input.int_in_range(8..=999)?
        } else {
            *input.choose(&kinds)?
        };
        let flags: u16 = if input.ratio(1, 5)? {
            input.int_in_range(0..=63)?
        } else {
            0
        };
        let (mut offset, mut length) = match command {
            command::FLUSH => (0, 0),
            _ => {
                let offset = u64::from(input.int_in_range(0..=511_u16)?) * 512;
                (
                    offset,
                    (u64::from(input.int_in_range(0..=15_u8)?) * 512).min(SIZE - offset),
                )
            }
        };
        if input.ratio(1, 12)? {
            offset = input.arbitrary()?;
        }
        if input.ratio(1, 12)? {
            let any: u64 = input.arbitrary()?;
            length = any >> input.int_in_range(0..=63)?;
        }
        if !self.extended {
            length &= u64::from(u32::MAX);
        }
        let carries = command == command::WRITE || (self.extended && flags & flag::PAYLOAD_LENGTH != 0);
        if carries {
            length = length.min(64 << 10);
        }
        let fill: u8 = input.arbitrary()?;
        let data = vec![fill; if carries { length as usize } else { 0 }];
        let cookie: u64 = input.arbitrary()?;
        let mut message = if self.extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        }
        .to_be_bytes()
        .to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        if self.extended {
            message.extend(length.to_be_bytes());
        } else {
            message.extend((length as u32).to_be_bytes());
        }
        message.extend(&data);
        if input.ratio(1, 40)? {
            // The client breaks off, or says something else.
            message.truncate(input.int_in_range(0..=message.len())?);
            if input.arbitrary()? {
                message.extend(input.bytes(input.len().min(64))?);
            }
            return Ok(self.send(&message).and(Err(Closed)));
        }
        if self.send(&message).is_err() {
            return Ok(Err(Closed));
        }
        Ok(self.check(command, flags, offset, length, &data, cookie))
    }

    /// Takes the answer and compares it with the model.
    fn check(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
        cookie: u64,
    ) -> Step<()> {
        let (mut failed, mut chunks) = (None, 0);
        let range = offset.checked_add(length).filter(|end| *end <= SIZE);
        loop {
            let magic = self.take(4)?;
            let (last, kind, body) = match u32_at(&magic, 0).unwrap() {
                0x6744_6698 => {
                    assert!(!self.extended, "a simple reply with extended headers");
                    let head = self.take(12)?;
                    assert_eq!(u64_at(&head, 4), Some(cookie));
                    let error = u32_at(&head, 0).unwrap();
                    if error != 0 {
                        failed = Some(error);
                    } else if command == command::READ {
                        assert!(!self.structured, "a simple reply to a structured read");
                        let read = self.take(length as usize)?;
                        assert!(
                            read == self.model[offset as usize..][..length as usize],
                            "wrong data"
                        );
                    }
                    (true, chunk::NONE, Vec::new())
                }
                magic => {
                    assert_eq!(magic, if self.extended { 0x6e8a_278c } else { 0x668e_33ef });
                    let head = self.take(if self.extended { 28 } else { 16 })?;
                    assert_eq!(u64_at(&head, 4), Some(cookie));
                    let size = if self.extended {
                        assert_eq!(u64_at(&head, 12), Some(offset));
                        u64_at(&head, 20).unwrap()
                    } else {
                        u32_at(&head, 12).unwrap().into()
                    };
                    assert!(size <= 1 << 20, "an endless reply");
                    let last = u16_at(&head, 0).unwrap() & chunk::DONE != 0;
                    (last, u16_at(&head, 2).unwrap(), self.take(size as usize)?)
                }
            };
            match kind {
                chunk::NONE => assert!(last),
                chunk::OFFSET_DATA => {
                    assert_eq!(command, command::READ);
                    assert_eq!(u64_at(&body, 0), Some(offset));
                    assert!(
                        body[8..] == self.model[offset as usize..][..length as usize],
                        "wrong data"
                    );
                }
                chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                    assert_eq!(command, command::BLOCK_STATUS);
                    assert_eq!(kind == chunk::BLOCK_STATUS_EXT, self.extended);
                    chunks += 1;
                    let (start, step) = if self.extended { (8, 16) } else { (4, 8) };
                    let lengths: Vec<u64> = (start..body.len())
                        .step_by(step)
                        .map(|at| {
                            if self.extended {
                                u64_at(&body, at).unwrap()
                            } else {
                                u32_at(&body, at).unwrap().into()
                            }
                        })
                        .collect();
                    assert!(!lengths.is_empty() && lengths.iter().all(|length| *length > 0));
                    assert!(lengths.iter().sum::<u64>() <= length, "more than was asked for");
                    assert!(flags & flag::REQUEST_ONE == 0 || lengths.len() == 1);
                }
                chunk::ERROR => failed = Some(u32_at(&body, 0).unwrap()),
                other => panic!("a chunk of kind {other}"),
            }
            if last {
                break;
            }
        }
        let plain = flags & !flag::FUA == 0 && range.is_some() && (offset | length).is_multiple_of(512);
        let known = match command {
            command::READ | command::WRITE | command::TRIM | command::WRITE_ZEROES => plain,
            command::FLUSH => flags & !flag::FUA == 0 && (offset, length) == (0, 0),
            command::BLOCK_STATUS => plain && self.contexts > 0 && length > 0,
            _ => false,
        };
        assert!(
            !known || failed.is_none(),
            "command {command} failed with {failed:?}"
        );
        assert!(
            range.is_some() || failed.is_some(),
            "command {command} beyond the disk succeeded"
        );
        assert_ne!(failed, Some(0));
        if failed.is_none() {
            let place = offset as usize..(offset + length) as usize;
            match command {
                command::WRITE => self.model[place].copy_from_slice(data),
                command::WRITE_ZEROES => self.model[place].fill(0),
                command::BLOCK_STATUS => assert_eq!(chunks, self.contexts),
                _ => {}
            }
        }
        Ok(())
    }

    fn take(&mut self, length: usize) -> Step<Vec<u8>> {
        let mut bytes = vec![0; length];
        match self.stream.read_exact(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("hang: the server does not answer")
            }
            Err(_) => Err(Closed),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Step<()> {
        match self.stream.write_all(bytes) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("hang: the server does not read")
            }
            Err(_) => Err(Closed),
        }
    }
}
