//! The iSCSI target against an initiator that mostly knows the protocol: keys, commands, data, task management and text in any order, with
//! wrong numbers, lengths, tags and places, cut off anywhere. What is read must be what was written, each command gets one answer, and
//! the target is there for the next initiator.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arbitrary::Unstructured;
use block_io::{
    BlockDevice, Durability, Geometry, IoBuf, IoError, ListenAddress, Worker, WorkerOptions, ZeroMode,
};
use storage_virtualizer::iscsi::{IscsiOptions, IscsiServer, IscsiTarget, IscsiUnit};
use storage_virtualizer::scsi::{Identity, Unit, UnitOptions};

use crate::disk::MemoryDisk;

const SIZE: usize = 256 << 10;
const TARGET: &str = "iqn.2026-11.org.example:target";
const NO_TAG: u32 = u32::MAX;

/// The disk of all histories, of which each server has a share.
struct Shared(Arc<MemoryDisk>);

impl BlockDevice for Shared {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        self.0.read(offset, buffers).await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        self.0.write(offset, buffers, durability).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.0.flush().await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.0.discard(offset, length).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.0.write_zeroes(offset, length, mode).await
    }
}

struct Served {
    socket: PathBuf,
    disk: Arc<MemoryDisk>,
    _server: IscsiServer,
    _worker: Worker,
}

fn served() -> &'static Mutex<Served> {
    static SERVED: OnceLock<Mutex<Served>> = OnceLock::new();
    SERVED.get_or_init(|| {
        let socket = std::env::temp_dir().join(format!("smsvmm-fuzz-iscsi-{}", std::process::id()));
        let disk = Arc::new(MemoryDisk::without_guest(Geometry {
            size: SIZE as u64,
            logical_block: 512,
            physical_block: 4096,
            optimal_io: 0,
            discard_granularity: 4096,
            read_only: false,
        }));
        let worker = Worker::start("iscsi", WorkerOptions::default()).unwrap();
        let options = IscsiOptions {
            listen: vec![ListenAddress::Unix(socket.clone())],
            targets: vec![IscsiTarget::open(TARGET)],
            memory: 64 << 10,
            ..IscsiOptions::default()
        };
        let own = Arc::clone(&disk);
        let server = IscsiServer::start(worker.handle(), options, move || {
            vec![IscsiUnit {
                target: 0,
                lun: 0,
                unit: Arc::new(Unit::new(UnitOptions::new(Identity::from_name("fuzz", "fuzz")))),
                disk: Rc::new(Shared(own)),
            }]
        })
        .unwrap();
        Mutex::new(Served {
            socket,
            disk,
            _server: server,
            _worker: worker,
        })
    })
}

/// Ends a history early: the target has closed the connection.
struct Closed;

type Step<T> = Result<T, Closed>;

struct Initiator {
    stream: UnixStream,
    number: u32,
    tag: u32,
    first_burst: usize,
    unasked: bool,
    immediate: bool,
    model: Vec<u8>,
}

struct Pdu {
    head: [u8; 48],
    data: Vec<u8>,
}

impl Pdu {
    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.head[at..at + 4].try_into().unwrap())
    }
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let served = served().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    served.disk.clear();
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut initiator = Initiator {
        stream,
        number: 1,
        tag: 0,
        first_burst: 65_536,
        unasked: false,
        immediate: true,
        model: vec![0; SIZE],
    };
    let lived = initiator.live(input);
    initiator.stream.shutdown(std::net::Shutdown::Write).ok();
    let mut rest = [0; 4096];
    loop {
        match initiator.stream.read(&mut rest) {
            Ok(0) => break,
            Ok(_) => {}
            // libFuzzer's alarm clock.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the target does not end the connection: {error}"),
        }
    }
    lived.map(drop)
}

fn put(head: &mut [u8; 48], at: usize, number: u32) {
    head[at..at + 4].copy_from_slice(&number.to_be_bytes());
}

impl Initiator {
    fn live(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        if let Err(closed) = self.log_in(input)? {
            return Ok(Err(closed));
        }
        while !input.is_empty() {
            if let Err(closed) = self.act(input)? {
                return Ok(Err(closed));
            }
        }
        Ok(Ok(()))
    }

    /// A login; refused ones end the history.
    fn log_in(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        let mut text =
            format!("InitiatorName=iqn.2026-11.org.example:host\0TargetName={TARGET}\0").into_bytes();
        let keys = [
            "InitialR2T",
            "ImmediateData",
            "MaxBurstLength",
            "FirstBurstLength",
            "MaxOutstandingR2T",
            "MaxRecvDataSegmentLength",
            "ErrorRecoveryLevel",
            "X-odd",
        ];
        for key in keys {
            if input.ratio(1, 2)? {
                let value = match key {
                    "InitialR2T" | "ImmediateData" => (*input.choose(&["Yes", "No"])?).to_owned(),
                    _ => input.int_in_range(0..=20_000_u32)?.to_string(),
                };
                text.extend(format!("{key}={value}\0").into_bytes());
            }
        }
        if input.ratio(1, 10)? {
            let at = input.int_in_range(0..=text.len() - 1)?;
            text[at] = input.arbitrary()?;
        }
        let mut head = [0; 48];
        (head[0], head[1]) = (0x43, 0x87);
        if input.ratio(1, 20)? {
            let at = input.int_in_range(1..=23_usize)?;
            // Lengths are those of the text, or the target waits for more.
            if !(4..8).contains(&at) {
                head[at] = input.arbitrary()?;
            }
        }
        put(&mut head, 24, 1);
        let Ok(answer) = self.exchange(&head, &text) else {
            return Ok(Err(Closed));
        };
        assert_eq!(answer.head[0], 0x23, "no answer to a login");
        if answer.head[36] != 0 || answer.head[1] != 0x87 {
            return Ok(Err(Closed));
        }
        let said = String::from_utf8(answer.data).unwrap();
        for pair in said.split('\0') {
            match pair.split_once('=') {
                Some(("FirstBurstLength" | "MaxBurstLength", value)) => {
                    if let Ok(value) = value.parse() {
                        self.first_burst = self.first_burst.min(value);
                    }
                }
                Some(("InitialR2T", value)) => self.unasked = value == "No",
                Some(("ImmediateData", value)) => self.immediate = value != "No",
                _ => {}
            }
        }
        // The unit attention of a new session.
        Ok(self.command(&[0; 16], 0x81, 0, &[], 0, 0).map(drop))
    }

    fn act(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<Step<()>> {
        if input.ratio(1, 12)? {
            return self.misbehave(input).map(|()| Err(Closed));
        }
        let block = input.int_in_range(0..=511_u32)?;
        let blocks = input.int_in_range(0..=31_u32)?.min(512 - block);
        let mut cdb = [0; 16];
        cdb[6..10].copy_from_slice(&block.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        let place = block as usize * 512..(block + blocks) as usize * 512;
        Ok(match input.int_in_range(0..=5_u8)? {
            0 | 1 => {
                cdb[0] = 0x88;
                let expected = u32::try_from(place.len()).unwrap();
                let flags = if expected > 0 { 0xc1 } else { 0x81 };
                self.command(&cdb, flags, expected, &[], 0, 0)
                    .map(|(status, data)| {
                        assert_eq!(status, 0, "a read failed");
                        assert!(data == self.model[place], "wrong data");
                    })
            }
            2 | 3 => {
                cdb[0] = 0x8a;
                let data = vec![input.arbitrary()?; place.len()];
                let most = data.len().min(self.first_burst).min(8192);
                let immediate = if self.immediate {
                    input.int_in_range(0..=most)? & !3
                } else {
                    0
                };
                let rest = most - immediate;
                let unasked = if self.unasked {
                    input.int_in_range(0..=rest)? & !3
                } else {
                    0
                };
                let expected = u32::try_from(data.len()).unwrap();
                self.command(&cdb, 0xa1, expected, &data, immediate, unasked)
                    .map(|(status, _)| {
                        assert_eq!(status, 0, "a write failed");
                        self.model[place].copy_from_slice(&data);
                    })
            }
            4 => {
                let mut head = [0; 48];
                (head[0], head[1]) = (0x42, 0x80 | input.int_in_range(1..=5_u8)?);
                put(&mut head, 20, self.tag);
                put(&mut head, 32, self.number.wrapping_sub(1));
                let managed = self.immediate_request(head, &[], 0x22);
                // A reset is told of.
                managed
                    .and_then(|_| self.command(&[0; 16], 0x81, 0, &[], 0, 0))
                    .map(drop)
            }
            _ => {
                let data = vec![7; input.int_in_range(0..=100_usize)?];
                let mut head = [0; 48];
                (head[0], head[1]) = (0x40, 0x80);
                put(&mut head, 20, NO_TAG);
                self.immediate_request(head, &data, 0x20).map(|answer| {
                    assert_eq!(answer.data, data, "a ping came back changed");
                })
            }
        })
    }

    /// Something with a wrong field, or only its beginning; what comes then is not known.
    fn misbehave(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(1..=4_u8)? {
            let mut head = [0_u8; 48];
            head[0] = *input.choose(&[
                0x00, 0x01, 0x41, 0x42, 0x02, 0x04, 0x44, 0x05, 0x06, 0x46, 0x10, 0x43,
            ])?;
            head[1] = input.arbitrary()?;
            put(&mut head, 16, input.int_in_range(0..=3_u32)?);
            put(&mut head, 24, self.number);
            self.number += 1;
            for _ in 0..input.int_in_range(0..=6_u8)? {
                let at = input.int_in_range(0..=47_usize)?;
                head[at] = input.arbitrary()?;
            }
            let mut bytes = head.to_vec();
            bytes.extend(input.bytes(input.len().min(64))?);
            if self.stream.write_all(&bytes).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn next_tag(&mut self) -> u32 {
        self.tag += 1;
        self.tag
    }

    fn immediate_request(&mut self, mut head: [u8; 48], data: &[u8], opcode: u8) -> Step<Pdu> {
        let tag = self.next_tag();
        put(&mut head, 16, tag);
        put(&mut head, 24, self.number);
        let answer = self.exchange(&head, data)?;
        assert_eq!((answer.head[0], answer.u32(16)), (opcode, tag));
        Ok(answer)
    }

    /// Status and data of a command.
    fn command(
        &mut self,
        cdb: &[u8; 16],
        flags: u8,
        expected: u32,
        data: &[u8],
        immediate: usize,
        unasked: usize,
    ) -> Step<(u8, Vec<u8>)> {
        let tag = self.next_tag();
        let mut head = [0; 48];
        (head[0], head[1]) = (0x01, if unasked > 0 { flags & 0x7f } else { flags });
        put(&mut head, 16, tag);
        put(&mut head, 20, expected);
        put(&mut head, 24, self.number);
        self.number += 1;
        head[32..].copy_from_slice(cdb);
        self.send(&head, &data[..immediate])?;
        if unasked > 0 {
            self.data_out(
                tag,
                NO_TAG,
                0,
                immediate,
                &data[immediate..immediate + unasked],
                true,
            )?;
        }
        let mut read = Vec::new();
        loop {
            let pdu = self.receive()?;
            assert_eq!(pdu.u32(16), tag, "an answer to something else");
            match pdu.head[0] {
                0x25 => {
                    assert_eq!(pdu.u32(40) as usize, read.len());
                    read.extend(&pdu.data);
                    if pdu.head[1] & 1 != 0 {
                        return Ok((pdu.head[3], read));
                    }
                }
                0x21 => return Ok((pdu.head[3], read)),
                0x31 => {
                    let (at, end) = (pdu.u32(40) as usize, (pdu.u32(40) + pdu.u32(44)) as usize);
                    self.data_out(tag, pdu.u32(20), 0, at, &data[at..end], true)?;
                }
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn data_out(
        &mut self,
        tag: u32,
        transfer: u32,
        number: u32,
        at: usize,
        data: &[u8],
        last: bool,
    ) -> Step<()> {
        let mut head = [0; 48];
        (head[0], head[1]) = (0x05, if last { 0x80 } else { 0 });
        put(&mut head, 16, tag);
        put(&mut head, 20, transfer);
        put(&mut head, 36, number);
        put(&mut head, 40, u32::try_from(at).unwrap());
        self.send(&head, data)
    }

    fn exchange(&mut self, head: &[u8; 48], data: &[u8]) -> Step<Pdu> {
        self.send(head, data)?;
        self.receive()
    }

    fn send(&mut self, head: &[u8; 48], data: &[u8]) -> Step<()> {
        let mut head = *head;
        head[5..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes()[1..]);
        let mut bytes = head.to_vec();
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        match self.stream.write_all(&bytes) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("hang: the target does not read")
            }
            Err(_) => Err(Closed),
        }
    }

    fn receive(&mut self) -> Step<Pdu> {
        let mut head = [0; 48];
        self.fill(&mut head)?;
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut data = vec![0; length.next_multiple_of(4)];
        self.fill(&mut data)?;
        data.truncate(length);
        Ok(Pdu { head, data })
    }

    fn fill(&mut self, target: &mut [u8]) -> Step<()> {
        match self.stream.read_exact(target) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("hang: the target does not answer")
            }
            Err(_) => Err(Closed),
        }
    }
}
