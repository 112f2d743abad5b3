//! The handshake: fixed newstyle, structured replies if the server has them, then `NBD_OPT_GO` (proto.md, "Newstyle
//! negotiation", "Option types"). Blocking, with a time limit for the whole of it: it runs on threads that may block.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};

use super::NbdError;
use super::protocol::{
    DEFAULT_MAXIMUM, FIXED_NEWSTYLE, LONGEST_TEXT, NO_ZEROES, OLD_STYLE_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, SERVER_MAGIC, info, option, reply as answer, u16_at, u32_at, u64_at,
};

/// More replies to one option than this have no sense.
const MOST_REPLIES: u32 = 64;

/// What the server says about the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Block sizes in bytes; powers of two but for the maximum.
    pub(super) minimum_block: u32,
    pub(super) preferred_block: u32,
    pub(super) maximum_block: u32,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
}

/// Bytes over a socket that does not block, until a moment.
pub(super) struct Wire<'a> {
    socket: BorrowedFd<'a>,
    deadline: Instant,
}

impl<'a> Wire<'a> {
    pub(super) fn new(socket: &'a impl AsFd, patience: Duration) -> Self {
        Self {
            socket: socket.as_fd(),
            deadline: Instant::now() + patience,
        }
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::from_borrowed_fd(self.socket, what)], Some(&timeout)) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the server does not answer",
            )),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn read(&self, mut target: &mut [u8]) -> io::Result<()> {
        while !target.is_empty() {
            match recv(self.socket, &mut *target, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => target = &mut target[count..],
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, mut source: &[u8]) -> io::Result<()> {
        while !source.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let slices = [IoSlice::new(source)];
            match sendmsg(self.socket, &slices, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => source = &source[count..],
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn u64(&self) -> io::Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn u32(&self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u16(&self) -> io::Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }
}

/// An answer to an option.
struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

/// Talks to the server until it serves `name`.
pub(super) fn handshake(wire: &Wire<'_>, name: &str) -> Result<Export, NbdError> {
    greet(wire)?;
    let structured = negotiate_structured(wire)?;
    let mut export = go(wire, name)?;
    export.structured = structured;
    check(export)
}

fn greet(wire: &Wire<'_>) -> Result<(), NbdError> {
    if wire.u64()? != SERVER_MAGIC {
        return Err(NbdError::NotNbd);
    }
    match wire.u64()? {
        OPTION_MAGIC => {}
        OLD_STYLE_MAGIC => return Err(NbdError::TooOld("the oldstyle handshake")),
        _ => return Err(NbdError::NotNbd),
    }
    let flags = wire.u16()?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::TooOld("no fixed newstyle handshake"));
    }
    let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    wire.write(&ours.to_be_bytes())?;
    Ok(())
}

fn negotiate_structured(wire: &Wire<'_>) -> Result<bool, NbdError> {
    send_option(wire, option::STRUCTURED_REPLY, &[])?;
    let reply = option_reply(wire, option::STRUCTURED_REPLY)?;
    match reply.kind {
        answer::ACK => Ok(true),
        kind if kind & answer::ERROR != 0 => Ok(false),
        _ => Err(NbdError::Violation(
            "an answer to NBD_OPT_STRUCTURED_REPLY that is none",
        )),
    }
}

fn go(wire: &Wire<'_>, name: &str) -> Result<Export, NbdError> {
    let mut data = Vec::with_capacity(name.len() + 8);
    data.extend(u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend(name.as_bytes());
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    send_option(wire, option::GO, &data)?;
    let mut export = None;
    let mut blocks = (1, 4096, DEFAULT_MAXIMUM);
    for _ in 0..MOST_REPLIES {
        let reply = option_reply(wire, option::GO)?;
        match reply.kind {
            answer::INFO => {
                let data = &reply.data;
                let malformed = || NbdError::Violation("an information about the export that is too short");
                match u16_at(data, 0).ok_or_else(malformed)? {
                    info::EXPORT => {
                        let size = u64_at(data, 2).ok_or_else(malformed)?;
                        export = Some((size, u16_at(data, 10).ok_or_else(malformed)?));
                    }
                    info::BLOCK_SIZE => {
                        let size = |at| u32_at(data, at).ok_or_else(malformed);
                        blocks = (size(2)?, size(6)?, size(10)?);
                    }
                    // Names and descriptions, which nobody asked for.
                    _ => {}
                }
            }
            answer::ACK => {
                let (size, flags) =
                    export.ok_or(NbdError::Violation("no size of the export before its start"))?;
                return Ok(Export {
                    size,
                    flags,
                    minimum_block: blocks.0,
                    preferred_block: blocks.1,
                    maximum_block: blocks.2,
                    structured: false,
                });
            }
            kind if kind & answer::ERROR != 0 => return Err(refusal(name, &reply)),
            _ => return Err(NbdError::Violation("an answer to NBD_OPT_GO that is none")),
        }
    }
    Err(NbdError::Violation("endless information about the export"))
}

fn refusal(name: &str, reply: &OptionReply) -> NbdError {
    let export = name.to_owned();
    let said = String::from_utf8_lossy(&reply.data);
    let said: String = said
        .chars()
        .filter(|letter| !letter.is_control())
        .take(200)
        .collect();
    let said = match said.is_empty() {
        true => said,
        false => format!(" ({said})"),
    };
    let reason = match reply.kind & !answer::ERROR {
        1 => return NbdError::TooOld("no NBD_OPT_GO"),
        2 => "its policy forbids it",
        5 => "it demands TLS, which is not supported",
        6 => return NbdError::NoExport { export, said },
        7 => return NbdError::ShuttingDown,
        8 => "it wants another block size",
        _ => "it gives no reason that is known",
    };
    NbdError::Refused { export, reason, said }
}

fn check(export: Export) -> Result<Export, NbdError> {
    if i64::try_from(export.size).is_err() {
        return Err(NbdError::Violation("a size beyond 2^63 bytes"));
    }
    let Export {
        minimum_block,
        preferred_block,
        maximum_block,
        ..
    } = export;
    let sane = minimum_block.is_power_of_two()
        && minimum_block <= 1 << 16
        && preferred_block.is_power_of_two()
        && preferred_block >= minimum_block
        && maximum_block >= minimum_block;
    if sane {
        Ok(export)
    } else {
        Err(NbdError::Violation("block sizes that the protocol forbids"))
    }
}

fn send_option(wire: &Wire<'_>, option: u32, data: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(16 + data.len());
    message.extend(OPTION_MAGIC.to_be_bytes());
    message.extend(option.to_be_bytes());
    message.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(data);
    wire.write(&message)
}

fn option_reply(wire: &Wire<'_>, option: u32) -> Result<OptionReply, NbdError> {
    if wire.u64()? != OPTION_REPLY_MAGIC {
        return Err(NbdError::Violation(
            "an option's answer with a wrong magic number",
        ));
    }
    if wire.u32()? != option {
        return Err(NbdError::Violation("an answer to an option that was not sent"));
    }
    let kind = wire.u32()?;
    let length = usize::try_from(wire.u32()?).unwrap_or(usize::MAX);
    if length > LONGEST_TEXT + 64 {
        return Err(NbdError::Violation("an option's answer that is too long"));
    }
    let mut data = vec![0; length];
    wire.read(&mut data)?;
    Ok(OptionReply { kind, data })
}
