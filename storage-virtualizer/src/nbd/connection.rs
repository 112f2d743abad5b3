//! The life of a connection: handshake, requests, end.
//!
//! Three kinds of tasks serve it on the server's worker: this one, which reads; the writer (`Link::write`); and one for each
//! request that is in flight (`execute`), so that requests run concurrently and are answered in the order in which they end.

use std::io;
use std::rc::Rc;

use block_io::nbd::protocol::{
    DEFAULT_MAXIMUM, FIXED_NEWSTYLE, NO_ZEROES, OPTION_MAGIC, SERVER_MAGIC, command, error, option, u32_at,
    u64_at,
};
use block_io::{BlockDevice, moment_nanos, spawn_local};

use super::execute::execute;
use super::export::{Export, MOST_EXTENTS};
use super::link::{Link, Permit};
use super::negotiate::{Agreement, Context, Negotiation, Next};
use super::reply::{Reply, Style};
use super::request::{Head, Limits, Request};
use super::server::{Served, Server};
use crate::sockets::buffers::{Buffer, Pool};
use crate::sockets::input::{Input, More};

/// Longest data of an option that are looked at.
const LONGEST_OPTION: usize = 64 << 10;
/// Longest data of an option that are read in order to answer with an error.
const LONGEST_SKIPPED_OPTION: u32 = 1 << 20;
/// Data of a request that is refused are read, and thrown away, up to so many bytes.
const LONGEST_SKIPPED: u64 = 2 * DEFAULT_MAXIMUM as u64;
/// The largest read or write.
const LARGEST: u32 = DEFAULT_MAXIMUM;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The client left in the way that the protocol has for it, or was asked to by a stop.
    #[error("it was closed")]
    Closed,
    /// The client left in the middle of something.
    #[error("the client is gone")]
    Gone,
    /// The export was removed while the client chose it.
    #[error("its export was removed")]
    Removed,
    /// The client breaks the protocol.
    #[error("the client breaks the NBD protocol: {0}")]
    Violation(&'static str),
    /// The socket, or TLS.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// An export as a connection uses it.
pub(super) struct Session<E: Export> {
    pub(super) link: Rc<Link>,
    pub(super) pool: Rc<Pool>,
    pub(super) style: Style,
    pub(super) contexts: Vec<(u32, Context)>,
    export: Rc<Served<E>>,
}

impl<E: Export> Session<E> {
    pub(super) fn export(&self) -> &E {
        &self.export.export
    }

    /// A request was taken.
    pub(super) fn count(&self, request: &Request) {
        for statistics in [&self.export.statistics, &self.link.statistics] {
            match request {
                Request::Read { length, .. } => statistics.count_read((*length).into()),
                Request::Write { length, .. } => statistics.count_write((*length).into()),
                Request::Flush => statistics.count_flush(),
                _ => statistics.count_other(),
            }
        }
    }

    /// A request has its answer, so many nanoseconds after it was taken.
    pub(super) fn count_time(&self, nanos: u64) {
        self.export.statistics.count_time(nanos);
        self.link.statistics.count_time(nanos);
    }

    /// A request failed, or was refused.
    pub(super) fn count_error(&self) {
        self.export.statistics.count_error();
        self.link.statistics.count_error();
    }

    fn limits(&self) -> Limits {
        let export = self.export();
        let geometry = export.disk().geometry();
        Limits {
            size: geometry.size,
            block: geometry.logical_block,
            payload: LARGEST,
            read_only: export.read_only(),
            structured: self.style != Style::Simple,
            extended: self.style == Style::Extended,
            fast_zeroes: export.zeroes_fast(),
            has_contexts: !self.contexts.is_empty(),
        }
    }
}

/// Serves a client until it leaves, or must.
pub(super) async fn serve<E: Export>(server: Rc<Server<E>>, link: Rc<Link>) {
    let mut input = Input::new();
    link.set_deadline(Some(server.settings.handshake));
    let agreed = handshake(&server, &link, &mut input).await;
    link.set_deadline(None);
    let agreed = agreed.and_then(|agreement| {
        let export = server.exports.borrow().get(&agreement.export).cloned();
        Ok((agreement, export.ok_or(End::Removed)?))
    });
    let end = match agreed {
        Ok((agreement, export)) => {
            link.export.set(Some(export.number));
            let session = Rc::new(Session {
                style: match (agreement.structured, agreement.extended) {
                    (_, true) => Style::Extended,
                    (true, false) => Style::Structured,
                    (false, false) => Style::Simple,
                },
                pool: Rc::clone(&server.pool),
                link: Rc::clone(&link),
                export,
                contexts: agreement.contexts,
            });
            tracing::info!(
                peer = link.peer,
                export = session.export().name(),
                "NBD client connected"
            );
            transmit(&session, &mut input).await
        }
        Err(end) => end,
    };
    match end {
        End::Closed => tracing::debug!(peer = link.peer, "NBD connection ended"),
        end => tracing::info!(peer = link.peer, %end, "NBD connection ended"),
    }
}

/// Agrees with the client on an export.
async fn handshake<E: Export>(server: &Server<E>, link: &Link, input: &mut Input) -> Result<Agreement, End> {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&SERVER_MAGIC.to_be_bytes());
    greeting[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    link.send(&greeting).await?;
    let mut flags = [0; 4];
    read(link, input, &mut flags).await?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(End::Violation("unknown flags in the handshake"));
    }
    let mut negotiation = Negotiation::new(server.tls_mode(), flags & u32::from(NO_ZEROES) != 0);
    loop {
        let mut head = [0; 16];
        read(link, input, &mut head).await?;
        if u64_at(&head, 0) != Some(OPTION_MAGIC) {
            return Err(End::Violation("an option with a wrong magic number"));
        }
        let option = u32_at(&head, 8).unwrap_or_default();
        let length = u32_at(&head, 12).unwrap_or_default();
        if length as usize > LONGEST_OPTION {
            if length > LONGEST_SKIPPED_OPTION || option == option::EXPORT_NAME {
                return Err(End::Violation("an endless option"));
            }
            if input.skip(link, length.into()).await? == More::End {
                return Err(End::Gone);
            }
            link.send(&Negotiation::too_long(option)).await?;
            continue;
        }
        let mut data = vec![0; length as usize];
        read(link, input, &mut data).await?;
        let answer = negotiation.option(server, option, &data);
        link.send(&answer.bytes).await?;
        match answer.next {
            Next::Option => {}
            Next::Transmit(agreement) => return Ok(agreement),
            Next::Close => return Err(End::Closed),
            Next::StartTls => {
                // Whoever could add something to an unencrypted connection must not add to the encrypted one.
                if !input.available().is_empty() {
                    return Err(End::Violation("something unencrypted after the start of TLS"));
                }
                let Some(config) = server.tls() else {
                    return Err(End::Closed);
                };
                link.transport.start_tls(config)?;
                negotiation.encrypted();
            }
        }
    }
}

async fn read(link: &Link, input: &mut Input, target: &mut [u8]) -> Result<(), End> {
    match input.read(link, target).await? {
        More::Yes => Ok(()),
        More::End if link.is_stopping() => Err(End::Closed),
        More::End => Err(End::Gone),
    }
}

/// Ends the writer, whatever happens to the task.
struct Finish(Rc<Link>);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Takes requests until the client leaves; returns when all are answered.
async fn transmit<E: Export>(session: &Rc<Session<E>>, input: &mut Input) -> End {
    let link = Rc::clone(&session.link);
    let writer = Rc::clone(&link);
    let finish = Finish(Rc::clone(&link));
    if spawn_local(async move {
        // What is left in the queue refers to the link.
        let kill = Kill(writer);
        kill.0.write().await;
    })
    .is_err()
    {
        return End::Io(io::ErrorKind::NotConnected.into());
    }
    let end = requests(session, input).await;
    link.drained().await;
    drop(finish);
    if !link.is_broken() {
        link.transport.end_writing();
        linger(&link, input).await;
    }
    link.kill();
    end
}

struct Kill(Rc<Link>);

impl Drop for Kill {
    fn drop(&mut self) {
        // A writer that ended as it should has nothing in its queue, and the reader wants to linger.
        self.0.discard_replies();
    }
}

/// Waits until the client has closed its side: closing ours while something from it is unread would make TCP throw away what
/// the client has not read yet. The janitor ends this.
async fn linger(link: &Link, input: &mut Input) {
    link.linger(super::server::LINGER);
    loop {
        let here = input.available().len();
        input.consume(here);
        match input.more(link).await {
            Ok(More::Yes) => {}
            Ok(More::End) | Err(_) => return,
        }
    }
}

async fn requests<E: Export>(session: &Rc<Session<E>>, input: &mut Input) -> End {
    loop {
        match one(session, input).await {
            Ok(true) => {}
            Ok(false) => return End::Closed,
            Err(end) => return end,
        }
    }
}

/// Takes one request; `false` is the last.
async fn one<E: Export>(session: &Rc<Session<E>>, input: &mut Input) -> Result<bool, End> {
    let link = &session.link;
    let extended = session.style == Style::Extended;
    let head = loop {
        match Head::decode(input.available(), extended) {
            Ok(Some((head, length))) => {
                input.consume(length);
                break head;
            }
            Ok(None) => {}
            Err(_) => return Err(End::Violation("a request with a wrong magic number")),
        }
        if input.more(&**link).await? == More::End {
            return if link.is_stopping() {
                Ok(false)
            } else {
                Err(End::Gone)
            };
        }
    };
    if head.command == command::DISCONNECT {
        return Ok(false);
    }
    let refuse = |number, message, permit| {
        session.count_error();
        let reply = Reply::error(
            session.style,
            head.cookie,
            head.offset,
            number,
            message,
            Some(permit),
        );
        link.reply(reply);
    };
    let payload = head.payload(extended);
    let checked = head.check(&session.limits());
    let request = match checked {
        Ok(request) if !link.is_stopping() => request,
        checked => {
            if payload > LONGEST_SKIPPED {
                return Err(End::Violation("more data than any request may have"));
            }
            if input.skip(&**link, payload).await? == More::End {
                return Err(End::Gone);
            }
            let Some(permit) = link.admit(0).await else {
                return Err(End::Gone);
            };
            match checked {
                Err(refusal) => refuse(refusal.error, refusal.message, permit),
                Ok(_) => refuse(error::SHUTDOWN, "the server is about to end", permit),
            }
            return Ok(true);
        }
    };
    let Some(permit) = link.admit(memory_of(&request)).await else {
        return Err(End::Gone);
    };
    let data = match request {
        Request::Write { length, .. } => {
            let mut data = session.pool.take(length as usize);
            if input.read(&**link, data.as_mut_slice()).await? == More::End {
                return Err(End::Gone);
            }
            Some(data)
        }
        _ => None,
    };
    start(session, &head, request, data, permit);
    Ok(true)
}

/// Bytes that a request and its reply keep.
fn memory_of(request: &Request) -> usize {
    match request {
        Request::Read { length, .. } | Request::Write { length, .. } => *length as usize,
        Request::BlockStatus { one: false, .. } => MOST_EXTENTS * 16,
        _ => 0,
    }
}

fn start<E: Export>(
    session: &Rc<Session<E>>,
    head: &Head,
    request: Request,
    data: Option<Buffer>,
    permit: Permit,
) {
    let session = Rc::clone(session);
    let cookie = head.cookie;
    // Refused only where no worker runs, and this is a task of one.
    drop(spawn_local(async move {
        let begin = moment_nanos();
        session.count(&request);
        execute(&session, cookie, request, data, permit).await;
        session.count_time(moment_nanos().saturating_sub(begin));
    }));
}
