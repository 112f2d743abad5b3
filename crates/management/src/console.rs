//! Consoles of machines, for those who come over HTTP: a connection that is upgraded, and then carries what is typed and what is shown.
//!
//! ```text
//!   terminal ── TLS ──► gateway ── console socket ──► machine         a machine of the gateway's own
//!                          └────── manager ─────────► machine         a machine of the host's manager
//! ```
//!
//! The machine's console socket shows its output to all who are connected, and takes keys from each of them. Here there are rules: one may type, and
//! [`VIEWERS`] may look on, which leaves room at the socket for those who sit at the host. The machine never waits for anybody: what a client does not
//! take is lost to it, and one that takes nothing for [`STALLED`] is let go.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::{CONSOLE_PROTOCOL, ConsoleRequest, Problem, ProblemKind};
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::UnixStream;
use tokio::time::{interval, timeout};
use tracing::debug;

use crate::routes::{self, Answer};

/// Those of a machine who only look on.
const VIEWERS: usize = 4;
/// How long the console's socket may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A client that takes nothing for so long is let go.
const STALLED: Duration = Duration::from_secs(30);
/// Between looks at whether somebody may still be here.
const LOOK: Duration = Duration::from_secs(2);
/// Bytes under way in one direction.
const PIECE: usize = 16 << 10;

/// Whether somebody may still be there, and who is told why it ended.
pub(crate) struct Guard {
    pub(crate) may_go_on: Box<dyn FnMut() -> bool + Send>,
    pub(crate) ended: Box<dyn FnOnce(&'static str) + Send>,
}

impl Guard {
    /// For those who may be there as long as they like.
    pub(crate) fn none() -> Self {
        Self {
            may_go_on: Box::new(|| true),
            ended: Box::new(|why| debug!(why, "a console was closed")),
        }
    }
}

/// Tells why a console ended that was opened: also when everything ends with it.
pub(crate) struct Closing(Option<Box<dyn FnOnce(&'static str) + Send>>);

impl Closing {
    /// It was opened.
    pub(crate) fn new(ended: Box<dyn FnOnce(&'static str) + Send>) -> Self {
        Self(Some(ended))
    }

    pub(crate) fn tell(mut self, why: &'static str) {
        if let Some(ended) = self.0.take() {
            ended(why);
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(ended) = self.0.take() {
            ended("the server ended");
        }
    }
}

/// Who is at a machine's console.
#[derive(Debug, Default, Clone, Copy)]
struct Present {
    typing: bool,
    viewers: usize,
}

/// The consoles that a server has open, by machine.
#[derive(Debug, Default, Clone)]
pub(crate) struct Consoles(Arc<Mutex<BTreeMap<String, Present>>>);

/// A place at a console, until it is dropped.
#[derive(Debug)]
struct Seat {
    consoles: Consoles,
    machine: String,
    read_only: bool,
}

impl Consoles {
    fn seat(&self, machine: &str, read_only: bool) -> Result<Seat, Problem> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let present = all.entry(machine.to_owned()).or_default();
        if read_only && present.viewers >= VIEWERS {
            let detail = format!("{VIEWERS} look at the console already");
            return Err(Problem::new(ProblemKind::Exhausted, detail)
                .about(machine)
                .remedy("try again when one has left"));
        }
        if !read_only && present.typing {
            return Err(
                Problem::new(ProblemKind::Conflict, "somebody else types at the console")
                    .about(machine)
                    .remedy(
                        "look on with `smsvmm vm console --read-only`, or wait until the other one has left",
                    ),
            );
        }
        match read_only {
            true => present.viewers += 1,
            false => present.typing = true,
        }
        Ok(Seat {
            consoles: self.clone(),
            machine: machine.to_owned(),
            read_only,
        })
    }

    /// Opens the console of `machine` at `socket` for a connection that wants to be upgraded.
    pub(crate) async fn open(
        &self,
        machine: &str,
        socket: &Path,
        upgrade: Option<(OnUpgrade, Vec<u8>)>,
        body: Bytes,
        guard: Guard,
    ) -> Result<Answer, Problem> {
        let wanted = |protocol: &[u8]| protocol.eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes());
        let Some((client, _)) = upgrade.filter(|(_, protocol)| wanted(protocol)) else {
            let problem = Problem::new(
                ProblemKind::Invalid,
                "this is only for connections that are upgraded",
            );
            return Err(problem.remedy(format!(
                "send the header Upgrade: {CONSOLE_PROTOCOL}, or use `smsvmm vm console`"
            )));
        };
        let asked: ConsoleRequest = routes::parse(&body)?;
        let seat = self.seat(machine, asked.read_only)?;
        let refused = |why: &dyn std::fmt::Display| {
            Problem::new(ProblemKind::Conflict, format!("the console cannot be had: {why}"))
                .about(machine)
                .remedy("see whether the machine runs, with console.serial = \"socket:PATH\"")
        };
        let line = match timeout(CONNECT_TIMEOUT, UnixStream::connect(socket)).await {
            Ok(Ok(line)) => line,
            Ok(Err(error)) => return Err(refused(&error)),
            Err(_) => return Err(refused(&"its socket takes no connection")),
        };
        let closing = Closing::new(guard.ended);
        tokio::spawn(async move {
            let why = match client.await {
                Ok(client) => relay(TokioIo::new(client), line, seat.read_only, guard.may_go_on).await,
                Err(_) => "the connection broke before it began",
            };
            drop(seat);
            closing.tell(why);
        });
        let mut answer = routes::empty(StatusCode::SWITCHING_PROTOCOLS);
        let headers = answer.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
        Ok(answer)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut all = self.consoles.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(present) = all.get_mut(&self.machine) {
            match self.read_only {
                true => present.viewers -= 1,
                false => present.typing = false,
            }
            if !present.typing && present.viewers == 0 {
                all.remove(&self.machine);
            }
        }
    }
}

/// Passes on what is shown and, unless `read_only`, what is typed, until either end has ended or somebody may not be here any more; says why.
pub(crate) async fn relay(
    client: impl AsyncRead + AsyncWrite,
    line: impl AsyncRead + AsyncWrite,
    read_only: bool,
    mut may_go_on: Box<dyn FnMut() -> bool + Send>,
) -> &'static str {
    let (mut from_client, mut to_client) = split(client);
    let (mut from_line, mut to_line) = split(line);
    let shown = async {
        match pass(&mut from_line, Some(&mut to_client)).await {
            Passed::Ended => "the machine closed it",
            Passed::Stalled => "the client took nothing any more",
        }
    };
    let typed = async {
        let to = (!read_only).then_some(&mut to_line);
        match pass(&mut from_client, to).await {
            Passed::Ended => "the client closed it",
            Passed::Stalled => "the machine took nothing any more",
        }
    };
    let revoked = async {
        let mut looks = interval(LOOK);
        loop {
            looks.tick().await;
            if !may_go_on() {
                return "who had it may not any more";
            }
        }
    };
    let why = tokio::select! {
        why = shown => why,
        why = typed => why,
        why = revoked => why,
    };
    // Who does not listen does not hear it.
    let _ = timeout(LOOK, to_client.shutdown()).await;
    why
}

enum Passed {
    Ended,
    Stalled,
}

/// Passes on what comes, or only takes it, until it ends.
async fn pass(from: &mut (impl AsyncRead + Unpin), mut to: Option<&mut (impl AsyncWrite + Unpin)>) -> Passed {
    let mut buffer = vec![0; PIECE];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return Passed::Ended,
            Ok(length) => length,
        };
        let Some(to) = &mut to else { continue };
        let written = async {
            to.write_all(buffer.get(..length).unwrap_or_default()).await?;
            to.flush().await
        };
        match timeout(STALLED, written).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Passed::Ended,
            Err(_) => return Passed::Stalled,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    fn always() -> Box<dyn FnMut() -> bool + Send> {
        Box::new(|| true)
    }

    #[test]
    fn one_types_and_some_look_on() {
        let consoles = Consoles::default();
        let typing = consoles.seat("web1", false).unwrap();
        assert_eq!(
            consoles.seat("web1", false).unwrap_err().kind,
            ProblemKind::Conflict
        );
        let looking: Vec<Seat> = (0..VIEWERS)
            .map(|_| consoles.seat("web1", true).unwrap())
            .collect();
        assert_eq!(
            consoles.seat("web1", true).unwrap_err().kind,
            ProblemKind::Exhausted
        );
        let other = consoles.seat("db1", false).unwrap();
        drop(typing);
        drop(consoles.seat("web1", false).unwrap());
        drop((looking, other));
        assert!(consoles.0.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_let_go_and_one_that_does_nothing_is_not() {
        let (_client, near) = duplex(64);
        let (far, mut machine) = duplex(64);
        let relaying = tokio::spawn(relay(near, far, false, always()));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!relaying.is_finished());
        let talks = tokio::spawn(async move { while machine.write_all(&[b'x'; 64]).await.is_ok() {} });
        assert_eq!(relaying.await.unwrap(), "the client took nothing any more");
        talks.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_viewers_type_goes_nowhere_and_who_may_not_be_there_has_to_leave() {
        let (mut client, near) = duplex(64);
        let (far, mut machine) = duplex(64);
        let until = tokio::time::Instant::now() + Duration::from_secs(60);
        let may = Box::new(move || tokio::time::Instant::now() < until);
        let relaying = tokio::spawn(relay(near, far, true, may));
        client.write_all(&[b'k'; 1000]).await.unwrap();
        machine.write_all(b"login: ").await.unwrap();
        let mut shown = [0; 7];
        client.read_exact(&mut shown).await.unwrap();
        assert_eq!(&shown, b"login: ");
        assert_eq!(relaying.await.unwrap(), "who had it may not any more");
        let mut typed = Vec::new();
        machine.read_to_end(&mut typed).await.unwrap();
        assert!(typed.is_empty());
    }
}
