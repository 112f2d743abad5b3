//! A small initiator that does what it is told, also what it must not: for tests, and for the load of the bench.

#![allow(dead_code, reason = "the bench uses less of it than the tests")]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crc_fast::{CrcAlgorithm, checksum};

pub(crate) const NO_TAG: u32 = u32::MAX;
pub(crate) const TARGET: &str = "iqn.2026-11.org.example:target";
pub(crate) const HOST: &str = "iqn.2026-11.org.example:host";

/// A PDU as it came.
#[derive(Debug, Clone)]
pub(crate) struct Pdu {
    pub(crate) head: [u8; 48],
    pub(crate) data: Vec<u8>,
}

impl Pdu {
    pub(crate) fn opcode(&self) -> u8 {
        self.head[0] & 0x3f
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.head[at..at + 4].try_into().unwrap())
    }

    pub(crate) fn tag(&self) -> u32 {
        self.u32(16)
    }
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) status: u8,
    pub(crate) data: Vec<u8>,
    /// Sense key and code, if there are sense data.
    pub(crate) sense: Option<(u8, u8, u8)>,
    /// Overflow positive, underflow negative.
    pub(crate) residual: i64,
}

/// What a login says.
#[derive(Debug, Clone)]
pub(crate) struct Login {
    pub(crate) initiator: String,
    pub(crate) isid: [u8; 6],
    pub(crate) tsih: u16,
    pub(crate) cid: u16,
    pub(crate) command_number: u32,
    pub(crate) discovery: bool,
    pub(crate) target: &'static str,
    /// Operational keys.
    pub(crate) keys: Vec<(&'static str, String)>,
}

impl Default for Login {
    fn default() -> Self {
        Self {
            initiator: HOST.to_owned(),
            isid: [0x80, 0, 0, 0, 0, 1],
            tsih: 0,
            cid: 0,
            command_number: 1,
            discovery: false,
            target: TARGET,
            keys: Vec::new(),
        }
    }
}

impl Login {
    pub(crate) fn key(mut self, name: &'static str, value: impl ToString) -> Self {
        self.keys.push((name, value.to_string()));
        self
    }
}

pub(crate) struct Initiator {
    pub(crate) stream: TcpStream,
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
    pub(crate) command_number: u32,
    pub(crate) last_number: u32,
    pub(crate) tag: u32,
    pub(crate) tsih: u16,
    /// What the target answered to keys.
    pub(crate) answers: BTreeMap<String, String>,
}

pub(crate) fn digest(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(checksum(CrcAlgorithm::Crc32Iscsi, bytes))
        .unwrap()
        .to_le_bytes()
}

pub(crate) fn head(opcode: u8, flags: u8, tag: u32) -> [u8; 48] {
    let mut head = [0; 48];
    head[0] = opcode;
    head[1] = flags;
    put(&mut head, 16, tag);
    head
}

pub(crate) fn put(head: &mut [u8; 48], at: usize, number: u32) {
    head[at..at + 4].copy_from_slice(&number.to_be_bytes());
}

/// A READ or WRITE (16).
pub(crate) fn rw16(opcode: u8, block: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

pub(crate) const READ: u8 = 0x88;
pub(crate) const WRITE: u8 = 0x8a;

pub(crate) fn text(pairs: &[(&str, &str)]) -> Vec<u8> {
    pairs
        .iter()
        .flat_map(|(key, value)| format!("{key}={value}\0").into_bytes())
        .collect()
}

pub(crate) fn pairs(text: &[u8]) -> Vec<(String, String)> {
    String::from_utf8(text.to_vec())
        .unwrap()
        .split('\0')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

impl Initiator {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        Self {
            stream,
            header_digest: false,
            data_digest: false,
            command_number: 1,
            last_number: 0,
            tag: 1,
            tsih: 0,
            answers: BTreeMap::new(),
        }
    }

    /// Connects and logs in without a proof.
    pub(crate) fn login(address: SocketAddr, login: &Login) -> Self {
        let mut initiator = Self::connect(address);
        assert_eq!(initiator.log_in(login), 0, "the login is refused");
        initiator
    }

    /// Logs in from the operational stage on; returns the status.
    pub(crate) fn log_in(&mut self, login: &Login) -> u16 {
        let mut keys = vec![("InitiatorName", login.initiator.clone())];
        if login.discovery {
            keys.push(("SessionType", "Discovery".to_owned()));
        } else {
            keys.push(("TargetName", login.target.to_owned()));
        }
        keys.extend(login.keys.iter().cloned());
        let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let mut answer = self.login_step(login, 0x87, &text(&keys));
        // Others (tgt) declare something of their own first.
        while answer.head[36] == 0 && answer.head[1] & 0x80 == 0 {
            answer = self.login_step(login, 0x87, &[]);
        }
        self.finish_login(login, &answer)
    }

    pub(crate) fn finish_login(&mut self, login: &Login, answer: &Pdu) -> u16 {
        let status = u16::from_be_bytes([answer.head[36], answer.head[37]]);
        if status == 0 {
            let is = |name: &str| self.answers.get(name).is_some_and(|value| value == "CRC32C");
            (self.header_digest, self.data_digest) = (is("HeaderDigest"), is("DataDigest"));
            self.command_number = login.command_number;
            self.tsih = u16::from_be_bytes([answer.head[14], answer.head[15]]);
            assert_ne!(self.tsih, 0);
        }
        status
    }

    /// One login request and its answer.
    pub(crate) fn login_step(&mut self, login: &Login, flags: u8, data: &[u8]) -> Pdu {
        let mut request = head(0x43, flags, 0);
        request[8..14].copy_from_slice(&login.isid);
        request[14..16].copy_from_slice(&login.tsih.to_be_bytes());
        request[20..22].copy_from_slice(&login.cid.to_be_bytes());
        put(&mut request, 24, login.command_number);
        self.send(request, data);
        let answer = self.receive().expect("no answer to a login");
        assert_eq!(answer.opcode(), 0x23);
        self.answers.extend(pairs(&answer.data));
        answer
    }

    /// The bytes of a PDU.
    pub(crate) fn encode(&self, mut head: [u8; 48], data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        head[5..8].copy_from_slice(&length[1..]);
        let mut bytes = head.to_vec();
        if self.header_digest {
            bytes.extend(digest(&head));
        }
        let mut padded = data.to_vec();
        padded.resize(data.len().next_multiple_of(4), 0);
        bytes.extend(&padded);
        if self.data_digest && !data.is_empty() {
            bytes.extend(digest(&padded));
        }
        bytes
    }

    pub(crate) fn send(&mut self, head: [u8; 48], data: &[u8]) {
        let bytes = self.encode(head, data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next PDU; none if the target has ended the connection.
    pub(crate) fn receive(&mut self) -> Option<Pdu> {
        let mut head = [0; 48];
        if !self.fill(&mut head) {
            return None;
        }
        if self.header_digest {
            let mut told = [0; 4];
            assert!(self.fill(&mut told));
            assert_eq!(told, digest(&head));
        }
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut data = vec![0; length.next_multiple_of(4)];
        assert!(self.fill(&mut data));
        if self.data_digest && length > 0 {
            let mut told = [0; 4];
            assert!(self.fill(&mut told));
            assert_eq!(told, digest(&data));
        }
        data.truncate(length);
        let pdu = Pdu { head, data };
        self.last_number = pdu.u32(32);
        Some(pdu)
    }

    fn fill(&mut self, target: &mut [u8]) -> bool {
        match self.stream.read_exact(target) {
            Ok(()) => true,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) =>
            {
                false
            }
            Err(error) => panic!("the target does not answer: {error}"),
        }
    }

    /// Whether the target has ended the connection; what it still says is not looked at.
    pub(crate) fn is_gone(&mut self) -> bool {
        while self.receive().is_some() {}
        true
    }

    pub(crate) fn next_tag(&mut self) -> u32 {
        self.tag += 1;
        self.tag
    }

    pub(crate) fn next_number(&mut self) -> u32 {
        let number = self.command_number;
        self.command_number = number.wrapping_add(1);
        number
    }

    /// The header of a command on LUN `lun`.
    pub(crate) fn command(&mut self, lun: u8, cdb: &[u8], flags: u8, expected: u32) -> [u8; 48] {
        let tag = self.next_tag();
        let mut request = head(0x01, flags, tag);
        request[9] = lun;
        put(&mut request, 20, expected);
        put(&mut request, 24, self.next_number());
        request[32..32 + cdb.len()].copy_from_slice(cdb);
        request
    }

    /// A command that reads `expected` bytes, or none.
    pub(crate) fn read(&mut self, lun: u8, cdb: &[u8], expected: u32) -> Ended {
        let flags = if expected > 0 { 0xc1 } else { 0x81 };
        let request = self.command(lun, cdb, flags, expected);
        self.send(request, &[]);
        self.end(tag_of(&request))
    }

    /// A command with data: `immediate` bytes in its PDU, then `unsolicited` ones in one Data-Out, the rest as the target asks for it.
    pub(crate) fn write(
        &mut self,
        lun: u8,
        cdb: &[u8],
        data: &[u8],
        immediate: usize,
        unsolicited: usize,
    ) -> Ended {
        let flags = if unsolicited > 0 { 0x21 } else { 0xa1 };
        let request = self.command(lun, cdb, flags, u32::try_from(data.len()).unwrap());
        self.send(request, &data[..immediate]);
        let tag = tag_of(&request);
        if unsolicited > 0 {
            let part = &data[immediate..immediate + unsolicited];
            self.data_out(tag, NO_TAG, 0, immediate, part, true);
        }
        loop {
            let pdu = self.receive().expect("the target is gone");
            if pdu.opcode() != 0x31 {
                return ended(&pdu, Vec::new());
            }
            assert_eq!(pdu.tag(), tag);
            let (at, length) = (pdu.u32(40) as usize, pdu.u32(44) as usize);
            let half = (length / 2).next_multiple_of(4);
            self.data_out(tag, pdu.u32(20), 0, at, &data[at..at + half], false);
            self.data_out(
                tag,
                pdu.u32(20),
                1,
                at + half,
                &data[at + half..at + length],
                true,
            );
        }
    }

    pub(crate) fn data_out(
        &mut self,
        tag: u32,
        transfer: u32,
        number: u32,
        at: usize,
        data: &[u8],
        last: bool,
    ) {
        let mut out = head(0x05, if last { 0x80 } else { 0 }, tag);
        put(&mut out, 20, transfer);
        put(&mut out, 36, number);
        put(&mut out, 40, u32::try_from(at).unwrap());
        self.send(out, data);
    }

    /// Gathers what comes of the command `tag`.
    pub(crate) fn end(&mut self, tag: u32) -> Ended {
        let mut data = Vec::new();
        let mut count = 0;
        loop {
            let pdu = self.receive().expect("the target is gone");
            assert_eq!(pdu.tag(), tag, "an answer to something else: {pdu:?}");
            match pdu.opcode() {
                0x25 => {
                    assert_eq!((pdu.u32(36), pdu.u32(40) as usize), (count, data.len()));
                    count += 1;
                    data.extend(&pdu.data);
                    if pdu.head[1] & 1 != 0 {
                        return ended(
                            &Pdu {
                                data: Vec::new(),
                                ..pdu
                            },
                            data,
                        );
                    }
                }
                0x21 => {
                    // R2T count as well.
                    assert!(pdu.u32(36) == count || count == 0);
                    return ended(&pdu, data);
                }
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    /// A task management function; returns the response.
    pub(crate) fn manage(&mut self, function: u8, lun: u8, referenced: u32, number: u32) -> u8 {
        let tag = self.send_manage(function, lun, referenced, number);
        let pdu = self.receive().expect("the target is gone");
        assert_eq!((pdu.opcode(), pdu.tag()), (0x22, tag), "{pdu:?}");
        pdu.head[2]
    }

    pub(crate) fn send_manage(&mut self, function: u8, lun: u8, referenced: u32, number: u32) -> u32 {
        let tag = self.next_tag();
        let mut request = head(0x42, 0x80 | function, tag);
        request[9] = lun;
        put(&mut request, 20, referenced);
        put(&mut request, 24, self.command_number);
        put(&mut request, 32, number);
        self.send(request, &[]);
        tag
    }

    /// A ping that is answered with the same data.
    pub(crate) fn ping(&mut self, data: &[u8]) -> Pdu {
        let tag = self.next_tag();
        let mut request = head(0x40, 0x80, tag);
        put(&mut request, 20, NO_TAG);
        put(&mut request, 24, self.command_number);
        self.send(request, data);
        self.receive().expect("the target is gone")
    }

    /// A text request and all of its answer.
    pub(crate) fn ask(&mut self, data: &[u8]) -> Vec<(String, String)> {
        let (mut all, mut transfer, mut data) = (Vec::new(), NO_TAG, data.to_vec());
        loop {
            let tag = self.next_tag();
            let mut request = head(0x44, 0x80, tag);
            put(&mut request, 20, transfer);
            put(&mut request, 24, self.command_number);
            self.send(request, &data);
            let answer = self.receive().expect("the target is gone");
            assert_eq!(answer.opcode(), 0x24, "{answer:?}");
            all.extend(&answer.data);
            if answer.head[1] & 0x80 != 0 {
                return pairs(&all);
            }
            (transfer, data) = (answer.u32(20), Vec::new());
        }
    }

    /// Logs out: of the session (0), or of a connection (1). Returns the response.
    pub(crate) fn log_out(&mut self, why: u8, cid: u16) -> u8 {
        let tag = self.next_tag();
        let mut request = head(0x46, 0x80 | why, tag);
        request[20..22].copy_from_slice(&cid.to_be_bytes());
        put(&mut request, 24, self.command_number);
        self.send(request, &[]);
        let answer = self.receive().expect("the target is gone");
        assert_eq!(answer.opcode(), 0x26);
        answer.head[2]
    }

    /// Takes the unit attention of a new session.
    pub(crate) fn settle(&mut self, lun: u8) {
        let first = self.read(lun, &[0; 6], 0);
        assert_eq!(first.sense, Some((6, 0x29, 0)), "{first:?}");
        assert_eq!(self.read(lun, &[0; 6], 0).status, 0);
    }
}

pub(crate) fn tag_of(head: &[u8; 48]) -> u32 {
    u32::from_be_bytes(head[16..20].try_into().unwrap())
}

fn ended(pdu: &Pdu, data: Vec<u8>) -> Ended {
    assert!(matches!(pdu.opcode(), 0x21 | 0x25), "{pdu:?}");
    let residual = i64::from(pdu.u32(44));
    let residual = match pdu.head[1] & 6 {
        0 => 0,
        2 => -residual,
        4 => residual,
        _ => panic!("both residuals"),
    };
    let sense = pdu.data.get(2..).filter(|sense| sense.len() >= 14);
    Ended {
        status: pdu.head[3],
        data,
        sense: sense.map(|sense| (sense[2] & 15, sense[12], sense[13])),
        residual,
    }
}
