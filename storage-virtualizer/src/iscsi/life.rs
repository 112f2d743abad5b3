//! The life of a connection: login, PDUs, end.

use std::io;
use std::rc::Rc;

use block_io::BlockDevice;

use super::connection::Connection;
use super::link::Link;
use super::login::{Agreement, Answer, Login, Refusal, status};
use super::pdu::{Body, Digests, HEAD, Head, Out, padding, request, response};
use super::receive::full_feature;
use super::server::{Joined, Server};
use super::session::Session;
use super::text::Text;
use crate::sockets::input::{Input, More};

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// In the way that the protocol has for it.
    #[error("it was closed")]
    Closed,
    /// The initiator left in the middle of something.
    #[error("the initiator is gone")]
    Gone,
    /// This side ended it.
    #[error("it was ended")]
    Ended,
    /// The initiator breaks the protocol.
    #[error("the initiator breaks the iSCSI protocol: {0}")]
    Violation(&'static str),
    /// The login failed.
    #[error("the login failed: {0}")]
    Login(&'static str),
    /// The socket.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// Serves an initiator until it leaves, or must.
pub(super) async fn serve<D: BlockDevice + 'static>(server: Rc<Server<D>>, link: Rc<Link>) {
    let mut input = Input::new();
    link.set_deadline(Some(server.settings.login));
    let agreed = log_in(&server, &link, &mut input).await;
    link.set_deadline(None);
    server.login_ended(&link);
    let (end, initiator) = match agreed {
        Ok(connection) => {
            let session = Rc::clone(&connection.session);
            let end = full_feature(&connection, &mut input).await;
            if (server.is_stopping() || session.is_leaving.get()) && link.is_ending() && !link.is_broken() {
                // What the disk has is finished and answered.
                for task in session.end_tasks(|task| task.cid == connection.cid && !task.is_executing()) {
                    task.done().await;
                }
                for task in session.tasks(|task| task.cid == connection.cid) {
                    task.done().await;
                }
            }
            session.left(&connection, connection.logged_out.get());
            let tasks = session.end_tasks(|task| task.cid == connection.cid);
            link.wake_waiting();
            link.flushed().await;
            link.end_writing();
            for task in tasks {
                task.done().await;
            }
            session.drop_held(Some(connection.cid));
            (end, session.initiator.clone())
        }
        Err((end, initiator)) => (end, initiator),
    };
    link.flushed().await;
    link.finish();
    if !link.is_broken() {
        linger(&link, &mut input).await;
    }
    link.kill();
    match end {
        End::Closed | End::Ended => {
            tracing::debug!(peer = link.peer, initiator, "iSCSI connection ended");
        }
        end => tracing::info!(peer = link.peer, initiator, %end, "iSCSI connection ended"),
    }
}

/// Waits until the initiator has closed its side: closing ours while something from it is unread would make TCP throw away
/// what it has not read yet. The janitor ends this.
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

pub(super) async fn read(link: &Link, input: &mut Input, target: &mut [u8]) -> Result<(), End> {
    match input.read(link, target).await? {
        More::Yes => Ok(()),
        More::End if link.is_ending() => Err(End::Ended),
        More::End => Err(End::Gone),
    }
}

type Failure = (End, String);

/// The login phase.
async fn log_in<D: BlockDevice + 'static>(
    server: &Rc<Server<D>>,
    link: &Rc<Link>,
    input: &mut Input,
) -> Result<Rc<Connection<D>>, Failure> {
    let mut login = Login::new();
    let mut status_number = 0_u32;
    loop {
        let failed = |end: End, login: &Login| (end, login.initiator().to_owned());
        let received = receive_login(link, input).await;
        let (head, data) = received.map_err(|end| failed(end, &login))?;
        let outcome = match login.step(&**server, &head, &data) {
            Ok(Answer {
                text,
                flags,
                agreement: Some(agreement),
                ..
            }) => match admit(server, &agreement).await {
                Ok(joined) => {
                    let first = (status_number.wrapping_add(1), flags, text);
                    return Ok(connect(link, &head, first, &agreement, joined));
                }
                Err(refusal) => Err(refusal),
            },
            other => other,
        };
        let (code, flags, text) = match &outcome {
            Ok(answer) => (answer.status, answer.flags, answer.text.0.clone()),
            Err(Refusal(code, _)) => (*code, 0, Vec::new()),
        };
        let answer = login_response(&head, status_number, code, flags, head.u16(14));
        status_number = status_number.wrapping_add(1);
        link.send(Out::new(answer, Body::Bytes(text), Digests::default(), None));
        if let Err(Refusal(_, why)) = outcome {
            return Err(failed(End::Login(why), &login));
        }
    }
}

fn login_response(asked: &Head, number: u32, code: u16, flags: u8, tsih: u16) -> Head {
    let mut head = Head::new(response::LOGIN, flags, asked.tag())
        .with(24, number)
        .with(28, asked.command_number())
        .with(
            32,
            asked.command_number().wrapping_add(super::session::WINDOW - 1),
        )
        .with(36, u32::from(code) << 16);
    head.0[8..14].copy_from_slice(&asked.0[8..14]);
    head.0[14..16].copy_from_slice(&tsih.to_be_bytes());
    head
}

async fn receive_login(link: &Link, input: &mut Input) -> Result<(Head, Vec<u8>), End> {
    let mut bytes = [0; HEAD];
    read(link, input, &mut bytes).await?;
    let head = Head(bytes);
    if head.opcode() != request::LOGIN {
        return Err(End::Violation("something else than a login"));
    }
    let length = head.data_length();
    if head.additional() > 0 || length > super::keys::DEFAULT_SEGMENT as usize {
        return Err(End::Violation("an impossible login request"));
    }
    let mut data = vec![0; length + padding(length)];
    read(link, input, &mut data).await?;
    data.truncate(length);
    Ok((head, data))
}

/// Finds or makes the session that was agreed on.
async fn admit<D: BlockDevice + 'static>(
    server: &Rc<Server<D>>,
    agreement: &Agreement,
) -> Result<Rc<Session<D>>, Refusal> {
    match server.join(agreement)? {
        Joined::New => Ok(server
            .open(agreement)
            .ok_or(Refusal(status::NO_RESOURCES, "too many sessions"))?),
        Joined::Instead(old) => {
            // The old session's commands have ended when the new one begins (RFC 7143 §6.3.5).
            old.close();
            old.released().await;
            Ok(server
                .open(agreement)
                .ok_or(Refusal(status::NO_RESOURCES, "too many sessions"))?)
        }
        Joined::Session(session) => {
            let cid = agreement.first.cid;
            let old = session
                .connections
                .borrow()
                .iter()
                .find(|old| old.cid == cid)
                .cloned();
            if let Some(old) = old {
                // The same for a connection (RFC 7143 §6.3.4).
                old.logged_out.set(true);
                session.drop_held(Some(cid));
                old.link.end();
                for task in session.end_tasks(|task| task.cid == cid) {
                    task.done().await;
                }
                session
                    .connections
                    .borrow_mut()
                    .retain(|other| !Rc::ptr_eq(other, &old));
            }
            if session.is_closed() {
                return Err(Refusal(status::NO_SESSION, "a session that has just ended"));
            }
            Ok(session)
        }
    }
}

/// Makes the connection, and sends the last login response.
fn connect<D: BlockDevice + 'static>(
    link: &Rc<Link>,
    head: &Head,
    (number, flags, text): (u32, u8, Text),
    agreement: &Agreement,
    session: Rc<Session<D>>,
) -> Rc<Connection<D>> {
    let connection = Connection::new(link, session, agreement, number);
    let session = &connection.session;
    session.connections.borrow_mut().push(Rc::clone(&connection));
    let number = number.wrapping_sub(1);
    let mut answer = login_response(head, number, status::SUCCESS, flags, session.tsih);
    session.stamp(&mut answer);
    link.send(Out::new(answer, Body::Bytes(text.0), Digests::default(), None));
    tracing::info!(
        peer = link.peer,
        initiator = session.initiator,
        discovery = session.is_discovery,
        "iSCSI initiator logged in"
    );
    connection
}
