//! One request to a manager over a connection that somebody else has made, by threads that may neither connect nor start a runtime: those of a
//! machine's process, inside its sandbox.
//!
//! Nothing is read beyond the answer, byte by byte as far as its head goes: what follows belongs to whoever has the connection then. The
//! system calls are poll, sendto and read, which every such thread may make. Of HTTP it understands what our own server says.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use api::{ATTACHMENT_PROTOCOL, AttachRequest, Problem};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::client::{ClientError, MAX_ANSWER};
use crate::transfer::PROTOCOL;

/// Largest head of an answer in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Bytes that are on their way in one direction of a [`relay`].
const PIPE: usize = 64 << 10;
/// Where disks are asked for.
pub const ATTACHMENTS: &str = "/v1/attachments";
/// Where SCSI adapters are asked for.
pub const SCSI_ADAPTERS: &str = "/v1/scsi-adapters";
/// The status of a connection that is taken out of HTTP.
const SWITCHING_PROTOCOLS: u16 = 101;

/// What the connection of a transfer is upgraded to.
pub const TRANSFER_PROTOCOL: &str = PROTOCOL;

/// Has the manager at the other end of `stream` open a disk; afterwards the connection speaks vhost-user, with the manager as back-end.
/// The answer may take up to `limit`.
///
/// # Errors
/// The manager refuses, which is a [`ClientError::Problem`], or does not answer in time or in our language.
pub fn attach(stream: &UnixStream, asked: &AttachRequest, limit: Duration) -> Result<(), ClientError> {
    let bytes = request("POST", ATTACHMENTS, asked, Some(ATTACHMENT_PROTOCOL))?;
    Exchange::new(stream, limit).send(&bytes)?;
    upgraded(stream, limit)
}

/// Sends the one request of a connection, and returns its answer, which may take up to `limit`.
///
/// # Errors
/// As [`attach`].
pub fn ask<T: DeserializeOwned>(
    stream: &UnixStream,
    method: &str,
    path: &str,
    body: &impl Serialize,
    limit: Duration,
) -> Result<T, ClientError> {
    Exchange::new(stream, limit).send(&request(method, path, body, None)?)?;
    answer(stream, limit)
}

/// The same for something that is only looked at.
///
/// # Errors
/// As [`attach`].
pub fn get<T: DeserializeOwned>(stream: &UnixStream, path: &str, limit: Duration) -> Result<T, ClientError> {
    ask(stream, "GET", path, &(), limit)
}

/// A request as it is sent; `upgrade`: what the connection is to become. `method` and `path` are the caller's own words, or names.
///
/// # Errors
/// The body cannot be said in JSON.
pub fn request(
    method: &str,
    path: &str,
    body: &impl Serialize,
    upgrade: Option<&str>,
) -> Result<Vec<u8>, ClientError> {
    let body = serde_json::to_vec(body).map_err(broken)?;
    let connection = match upgrade {
        Some(protocol) => format!("connection: upgrade\r\nupgrade: {protocol}\r\n"),
        None => "connection: close\r\n".to_owned(),
    };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: smsvmm\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{connection}\r\n",
        body.len()
    );
    Ok([head.as_bytes(), &body].concat())
}

/// The answer to a request that was sent.
///
/// # Errors
/// As [`attach`].
pub fn answer<T: DeserializeOwned>(stream: &UnixStream, limit: Duration) -> Result<T, ClientError> {
    let reply = Exchange::new(stream, limit).reply()?;
    if !(200..300).contains(&reply.status) {
        return Err(reply.refusal());
    }
    reply.decode()
}

/// The same for a connection that was to be taken out of HTTP, and is.
///
/// # Errors
/// As [`attach`].
pub fn upgraded(stream: &UnixStream, limit: Duration) -> Result<(), ClientError> {
    let reply = Exchange::new(stream, limit).reply()?;
    if reply.status == SWITCHING_PROTOCOLS {
        Ok(())
    } else {
        Err(reply.refusal())
    }
}

struct Reply {
    status: u16,
    body: Vec<u8>,
}

impl Reply {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|source| ClientError::NotUnderstood {
            status: self.status,
            source,
        })
    }

    fn refusal(&self) -> ClientError {
        match self.decode::<Problem>() {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(error) => error,
        }
    }
}

fn broken(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(cause.into())
}

/// The status, and how many bytes of body follow.
fn parse(head: &[u8]) -> Result<(u16, usize), ClientError> {
    let foreign = || broken("the answer is not HTTP/1.1 as a manager speaks it");
    let head = std::str::from_utf8(head).map_err(|_| foreign())?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|rest| rest.get(..3)?.parse::<u16>().ok());
    let status = status.ok_or_else(foreign)?;
    let mut length = None;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse::<usize>().map_err(|_| foreign())?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(foreign());
        }
    }
    let length = if status == SWITCHING_PROTOCOLS {
        0
    } else {
        length.ok_or_else(foreign)?
    };
    if length > MAX_ANSWER {
        return Err(broken(format!("an answer of {length} bytes is too long")));
    }
    Ok((status, length))
}

/// A request under way.
struct Exchange<'a> {
    stream: &'a UnixStream,
    limit: Duration,
    /// When it must be over; never if that is beyond what clocks show.
    end: Option<Instant>,
}

impl<'a> Exchange<'a> {
    fn new(stream: &'a UnixStream, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            end: Instant::now().checked_add(limit),
        }
    }

    fn reply(&mut self) -> Result<Reply, ClientError> {
        let (status, length) = parse(&self.head()?)?;
        let mut body = vec![0; length];
        self.receive(&mut body)?;
        Ok(Reply { status, body })
    }

    fn wait(&self, flags: PollFlags) -> Result<(), ClientError> {
        loop {
            let left = self.end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(Timespec::try_from).transpose().map_err(broken)?;
            match poll(
                &mut [PollFd::from_borrowed_fd(self.stream.as_fd(), flags)],
                left.as_ref(),
            ) {
                Ok(0) => return Err(ClientError::Timeout(self.limit)),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error)),
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            self.wait(PollFlags::OUT)?;
            match send(self.stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut buffer: &mut [u8]) -> Result<(), ClientError> {
        while !buffer.is_empty() {
            self.wait(PollFlags::IN)?;
            match read(self.stream, &mut *buffer) {
                Ok(0) => return Err(broken("it was closed before the answer was complete")),
                Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    /// The head of the answer with its empty line, and not a byte more.
    fn head(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= MAX_HEAD {
                return Err(broken("the head of the answer is too long"));
            }
            let mut byte = [0];
            self.receive(&mut byte)?;
            head.extend_from_slice(&byte);
        }
        Ok(head)
    }
}

/// One direction of a [`relay`].
struct Pipe<'a> {
    from: &'a UnixStream,
    to: &'a UnixStream,
    buffer: Vec<u8>,
    /// What of the buffer is on its way.
    begin: usize,
    end: usize,
    open: bool,
}

impl<'a> Pipe<'a> {
    fn new(from: &'a UnixStream, to: &'a UnixStream) -> Self {
        Self {
            from,
            to,
            buffer: vec![0; PIPE],
            begin: 0,
            end: 0,
            open: true,
        }
    }

    /// What is waited for.
    fn interest(&self) -> PollFd<'a> {
        if self.begin < self.end {
            PollFd::new(self.to, PollFlags::OUT)
        } else {
            PollFd::new(self.from, PollFlags::IN)
        }
    }

    /// Moves what can be moved now.
    fn step(&mut self) -> rustix::io::Result<()> {
        if self.begin < self.end {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            self.begin += send(self.to, &self.buffer[self.begin..self.end], flags)?;
            return Ok(());
        }
        let count = read(self.from, &mut self.buffer[..])?;
        (self.begin, self.end) = (0, count);
        if count == 0 {
            self.open = false;
            // The other side may be gone as well.
            let _ = shutdown(self.to, Shutdown::Write);
        }
        Ok(())
    }
}

/// Passes on what comes on either of two connections to the other one, until both have ended or one is broken.
pub fn relay(one: &UnixStream, other: &UnixStream) {
    let mut pipes = [Pipe::new(one, other), Pipe::new(other, one)];
    while pipes.iter().any(|pipe| pipe.open) {
        let mut polled: Vec<_> = pipes
            .iter()
            .filter(|pipe| pipe.open)
            .map(Pipe::interest)
            .collect();
        if !matches!(poll(&mut polled, None), Ok(_) | Err(Errno::INTR)) {
            return;
        }
        let ready: Vec<_> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (pipe, ready) in pipes.iter_mut().filter(|pipe| pipe.open).zip(ready) {
            match if ready { pipe.step() } else { Ok(()) } {
                Ok(()) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::thread;

    use api::ProblemKind;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// What `answer` is taken for, and what of it is left on the connection.
    fn answered(answer: impl Into<Vec<u8>>) -> (Result<(), ClientError>, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = answer.into();
        let server = thread::spawn(move || {
            let mut asked = vec![0; 4096];
            let count = theirs.read(&mut asked).unwrap();
            theirs.write_all(&answer).unwrap();
            String::from_utf8(asked[..count].to_vec()).unwrap()
        });
        let asked = request("POST", "/v1/attachments", &"what", Some("some-protocol")).unwrap();
        (&ours).write_all(&asked).unwrap();
        let outcome = upgraded(&ours, SOON);
        let asked = server.join().unwrap();
        assert!(
            asked.starts_with("POST /v1/attachments HTTP/1.1\r\n") && asked.ends_with("\r\n\r\n\"what\""),
            "{asked}"
        );
        let mut rest = Vec::new();
        (&ours).read_to_end(&mut rest).unwrap();
        (outcome, rest)
    }

    #[test]
    fn nothing_is_read_beyond_the_head_of_an_upgraded_connection() {
        let (outcome, rest) =
            answered(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: some-protocol\r\n\r\nnot ours");
        outcome.unwrap();
        assert_eq!(rest, b"not ours");
    }

    #[test]
    fn a_refusal_is_the_problem_that_was_answered() {
        let body = serde_json::to_string(&Problem::new(ProblemKind::Conflict, "it is taken")).unwrap();
        let length = body.len();
        let (outcome, _) = answered(format!(
            "HTTP/1.1 409 Conflict\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        match outcome {
            Err(ClientError::Problem(problem)) => {
                assert_eq!(problem.kind, ProblemKind::Conflict);
                assert_eq!(problem.detail, "it is taken");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn foreign_short_and_missing_answers_are_errors() {
        for answer in [
            &b"SSH-2.0-OpenSSH_9.6\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 99999999999\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 10\r\n\r\nshort",
            b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n",
            b"HTTP/1.1 101 Switch",
            b"",
        ] {
            let (outcome, _) = answered(answer);
            assert!(matches!(outcome, Err(ClientError::Broken(_))), "{outcome:?}");
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let outcome = upgraded(&ours, Duration::from_millis(20));
        assert!(matches!(outcome, Err(ClientError::Timeout(_))), "{outcome:?}");
    }

    #[test]
    fn a_relay_passes_on_both_ways_until_both_have_ended() {
        let (client, near) = UnixStream::pair().unwrap();
        let (far, server) = UnixStream::pair().unwrap();
        let relaying = thread::spawn(move || relay(&near, &far));
        let sent: Vec<u8> = (0..1_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
        let expected = sent.clone();
        let writer = client.try_clone().unwrap();
        let writing = thread::spawn(move || {
            (&writer).write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        (&server).read_to_end(&mut received).unwrap();
        assert!(received == expected);
        (&server).write_all(b"done").unwrap();
        drop(server);
        let mut answer = String::new();
        (&client).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "done");
        writing.join().unwrap();
        relaying.join().unwrap();
    }
}
