//! A connection from its first byte to its last: login, then PDUs.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Instant;

use block_io::{BlockDevice, spawn_local};

use super::keys::{Context, Parameters};
use super::link::{Link, Permit};
use super::login::{Agreement, Answer, Login, Refusal, status};
use super::pdu::{
    Body, CONTINUE, Crc, DIGEST, Digests, FINAL, HEAD, Head, NO_TAG, Out, digest, padding, reason, request,
    response,
};
use super::server::{Joined, Server};
use super::session::{Held, Session, Turn};
use super::task::{Place, Task};
use super::text::{self, Text};
use crate::sockets::buffers::{Buffer, Pool};
use crate::sockets::input::{Input, More};

/// Text that an initiator may gather with continuation.
const LONGEST_TEXT: usize = 16 << 10;

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

/// A connection after its login.
pub(super) struct Connection<D: BlockDevice + 'static> {
    pub(super) link: Rc<Link>,
    pub(super) session: Rc<Session<D>>,
    pub(super) cid: u16,
    digests: Digests,
    /// Bytes of data in a PDU.
    receive_segment: usize,
    send_segment: Cell<u32>,
    /// StatSN: the number of the next response.
    status_number: Cell<u32>,
    transfer_tag: Cell<u32>,
    /// Text that was gathered, and text that is asked for piece by piece.
    text_in: RefCell<Vec<u8>>,
    text_out: RefCell<Option<(u32, Vec<u8>)>>,
    logged_out: Cell<bool>,
    /// The silence since this moment was answered with a ping.
    pinged: Cell<Option<Instant>>,
}

impl<D: BlockDevice + 'static> Connection<D> {
    pub(super) fn pool(&self) -> &Rc<Pool> {
        &self.session.server.pool
    }

    pub(super) fn send_segment(&self) -> u32 {
        self.send_segment.get()
    }

    /// A tag for data or an answer that this side asks for.
    pub(super) fn next_transfer_tag(&self) -> u32 {
        let tag = self.transfer_tag.get();
        self.transfer_tag.set(if tag >= NO_TAG - 1 { 1 } else { tag + 1 });
        tag
    }

    fn put(&self, mut head: Head, body: Body, permit: Option<Permit>) {
        self.session.stamp(&mut head);
        self.link.send(Out::new(head, body, self.digests, permit));
    }

    /// Sends a response, with the next StatSN.
    pub(super) fn send(&self, mut head: Head, body: Body, permit: Option<Permit>) {
        let number = self.status_number.get();
        self.status_number.set(number.wrapping_add(1));
        head.set(24, number);
        self.put(head, body, permit);
    }

    /// Sends what tells the next StatSN without using it: R2T, and pings of this side (RFC 7143 §11.8, §11.19).
    pub(super) fn send_unnumbered(&self, mut head: Head, body: Body, permit: Option<Permit>) {
        head.set(24, self.status_number.get());
        self.put(head, body, permit);
    }

    /// Sends Data-In without a status.
    pub(super) fn send_unnumbered_data(&self, head: Head, body: Body, permit: Option<Permit>) {
        self.put(head, body, permit);
    }

    pub(super) fn reject(&self, rejected: &Head, why: u8) {
        let mut head = Head::new(response::REJECT, FINAL, NO_TAG);
        head.0[2] = why;
        tracing::debug!(
            peer = self.link.peer,
            opcode = rejected.opcode(),
            reason = why,
            "an iSCSI PDU is rejected"
        );
        self.send(head, Body::Bytes(rejected.0.to_vec()), None);
    }

    /// An asynchronous message (RFC 7143 §11.9).
    pub(super) fn notify(&self, event: u8, parameters: [u16; 3]) {
        let mut head = Head::new(response::ASYNC, FINAL, NO_TAG);
        head.0[36] = event;
        for (place, parameter) in head.0[38..44].chunks_exact_mut(2).zip(parameters) {
            place.copy_from_slice(&parameter.to_be_bytes());
        }
        self.send(head, Body::Nothing, None);
    }

    /// Whether it is to be asked again whether the initiator is there.
    pub(super) fn must_ping(&self) -> bool {
        let asked = self.link.heard();
        self.pinged.replace(Some(asked)) != Some(asked)
    }

    /// Asks whether the initiator is there.
    pub(super) fn ping(&self) {
        let tag = self.next_transfer_tag();
        let head = Head::new(response::NOP_IN, FINAL, NO_TAG).with(20, tag);
        self.send_unnumbered(head, Body::Nothing, None);
    }

    /// Does a request that is no command, in its turn.
    pub(super) fn perform(self: &Rc<Self>, head: &Head, data: Vec<u8>) {
        match head.opcode() {
            request::NOP_OUT => self.echo(head, data),
            request::TEXT => self.text(head, &data),
            request::TASK_MANAGEMENT => {
                let (connection, head) = (Rc::clone(self), *head);
                // This is a task, so there is a worker.
                drop(spawn_local(async move {
                    super::manage::manage(&connection, &head).await
                }));
            }
            request::LOGOUT => {
                let (connection, head) = (Rc::clone(self), *head);
                drop(spawn_local(async move { connection.log_out(&head).await }));
            }
            _ => self.reject(head, reason::UNSUPPORTED),
        }
    }

    fn echo(&self, head: &Head, mut data: Vec<u8>) {
        if head.tag() == NO_TAG {
            // An answer to a ping, or a sign of life.
            return;
        }
        data.truncate(usize::try_from(self.send_segment()).unwrap_or(0));
        let mut answer = Head::new(response::NOP_IN, FINAL, head.tag()).with(20, NO_TAG);
        answer.set_lun(head.lun());
        self.send(answer, Body::Bytes(data), None);
    }

    /// A text request (RFC 7143 §11.10).
    fn text(&self, head: &Head, data: &[u8]) {
        let asked = head.u32(20);
        if asked != NO_TAG {
            let pending = self.text_out.take();
            return match pending {
                Some((tag, rest)) if tag == asked => self.tell(head, rest),
                _ if !self.text_in.borrow().is_empty() => self.gather(head, data),
                _ => self.reject(head, reason::INVALID_FIELD),
            };
        }
        // A new negotiation; what was open is forgotten.
        self.text_out.take();
        self.text_in.take();
        self.gather(head, data);
    }

    fn gather(&self, head: &Head, data: &[u8]) {
        let mut gathered = self.text_in.take();
        gathered.extend(data);
        if gathered.len() > LONGEST_TEXT || (head.is_final() && head.0[1] & CONTINUE != 0) {
            return self.reject(head, reason::PROTOCOL);
        }
        if head.0[1] & CONTINUE != 0 {
            *self.text_in.borrow_mut() = gathered;
            let answer = Head::new(response::TEXT, 0, head.tag()).with(20, self.next_transfer_tag());
            return self.send(answer, Body::Nothing, None);
        }
        match text::parse(&gathered) {
            Ok(pairs) => {
                let answer = self.answer_keys(&pairs);
                self.tell(head, answer.0);
            }
            Err(_) => self.reject(head, reason::PROTOCOL),
        }
    }

    fn answer_keys(&self, pairs: &[(&str, &str)]) -> Text {
        let mut answer = Text::default();
        for (key, value) in pairs {
            match *key {
                "SendTargets" => self.send_targets(value, &mut answer),
                "MaxRecvDataSegmentLength" => {
                    let mut parameters = Parameters::default();
                    match parameters.negotiate(Context::Joining, key, value) {
                        None => self.send_segment.set(parameters.send_segment),
                        Some(refusal) => answer.put(key, &refusal),
                    }
                }
                // Everything else is for the login (RFC 7143 §13).
                _ => answer.put(key, &super::keys::outside_login(key)),
            }
        }
        answer
    }

    /// RFC 7143 appendix C.
    fn send_targets(&self, value: &str, answer: &mut Text) {
        let server = &self.session.server;
        let own = server.name();
        let wanted = match value {
            "All" => self.session.is_discovery,
            "" => !self.session.is_discovery,
            name => name.eq_ignore_ascii_case(own),
        };
        if !wanted {
            return;
        }
        answer.put("TargetName", own);
        let local = self.link.stream().local_address();
        for address in server.portals(local) {
            let group = super::session::PORTAL_GROUP;
            answer.put("TargetAddress", &format!("{address},{group}"));
        }
    }

    /// Sends text, or its beginning if it is too long for one PDU.
    fn tell(&self, head: &Head, mut text: Vec<u8>) {
        let most = usize::try_from(self.send_segment()).unwrap_or(usize::MAX);
        let (mut flags, mut tag) = (if head.is_final() { FINAL } else { 0 }, NO_TAG);
        if text.len() > most {
            let rest = text.split_off(most);
            tag = self.next_transfer_tag();
            flags = CONTINUE;
            *self.text_out.borrow_mut() = Some((tag, rest));
        } else if flags == 0 {
            tag = self.next_transfer_tag();
        }
        let mut answer = Head::new(response::TEXT, flags, head.tag()).with(20, tag);
        answer.set_lun(head.lun());
        self.send(answer, Body::Bytes(text), None);
    }

    /// A logout request (RFC 7143 §11.14, §11.15).
    async fn log_out(self: &Rc<Self>, head: &Head) {
        const SESSION: u8 = 0;
        const CONNECTION: u8 = 1;
        let answer = |code: u8| {
            let mut answer = Head::new(response::LOGOUT, FINAL, head.tag());
            answer.0[2] = code;
            answer
        };
        let cid = head.u16(20);
        let why = head.0[1] & 0x7f;
        match why {
            SESSION | CONNECTION => {
                let all = self.session.connections.borrow().clone();
                let leaving: Vec<_> = all
                    .into_iter()
                    .filter(|other| why == SESSION || other.cid == cid)
                    .collect();
                if leaving.is_empty() {
                    return self.send(answer(1), Body::Nothing, None);
                }
                let leaves = |task: &Task| why == SESSION || task.cid == cid;
                for task in self.session.end_tasks(leaves) {
                    task.done().await;
                }
                self.session.drop_held((why == CONNECTION).then_some(cid));
                self.send(answer(0), Body::Nothing, None);
                for other in leaving {
                    other.logged_out.set(true);
                    other.link.end();
                }
                if why == SESSION {
                    self.session.close();
                }
            }
            // Removal for recovery: there is none at level 0.
            2 => self.send(answer(2), Body::Nothing, None),
            _ => self.reject(head, reason::INVALID_FIELD),
        }
    }
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
            if server.is_stopping() && link.is_ending() && !link.is_broken() {
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

async fn read(link: &Link, input: &mut Input, target: &mut [u8]) -> Result<(), End> {
    match input.read(link, target).await? {
        More::Yes => Ok(()),
        More::End if link.is_ending() => Err(End::Ended),
        More::End => Err(End::Gone),
    }
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
    let parameters = &agreement.parameters;
    let connection = Rc::new(Connection {
        link: Rc::clone(link),
        cid: agreement.first.cid,
        digests: parameters.digests,
        receive_segment: usize::try_from(parameters.receive_segment).unwrap_or(0),
        send_segment: Cell::new(parameters.send_segment),
        status_number: Cell::new(number),
        transfer_tag: Cell::new(1),
        text_in: RefCell::default(),
        text_out: RefCell::default(),
        logged_out: Cell::new(false),
        pinged: Cell::new(None),
        session,
    });
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

/// Takes PDUs until the initiator leaves.
async fn full_feature<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, input: &mut Input) -> End {
    loop {
        if let Err(end) = one(connection, input).await {
            return if connection.logged_out.get() {
                End::Closed
            } else {
                end
            };
        }
    }
}

/// A header with what follows it before the data.
struct Start {
    head: Head,
    /// Additional header segments.
    additional: Vec<u8>,
}

async fn receive_head<D: BlockDevice + 'static>(
    connection: &Connection<D>,
    input: &mut Input,
) -> Result<Start, End> {
    let link = &*connection.link;
    let mut bytes = [0; HEAD];
    read(link, input, &mut bytes).await?;
    let head = Head(bytes);
    let mut additional = vec![0; head.additional()];
    if !additional.is_empty() {
        read(link, input, &mut additional).await?;
    }
    if connection.digests.header {
        let mut told = [0; DIGEST];
        read(link, input, &mut told).await?;
        let right = if additional.is_empty() {
            digest(&head.0)
        } else {
            digest(&[&head.0[..], &additional].concat())
        };
        if told != right {
            // Where the next PDU begins is not known any more (RFC 7143 §7.8).
            return Err(End::Violation("a header with a wrong digest"));
        }
    }
    if head.data_length() > connection.receive_segment {
        return Err(End::Violation("more data in a PDU than was agreed on"));
    }
    Ok(Start { head, additional })
}

/// Reads `length` bytes of data into `target`, or throws them away; then padding and digest. Whether the digest is right.
async fn receive_data<D: BlockDevice + 'static>(
    connection: &Connection<D>,
    input: &mut Input,
    target: Option<&mut [u8]>,
    length: usize,
) -> Result<bool, End> {
    if length == 0 {
        return Ok(true);
    }
    let link = &*connection.link;
    let mut scratch;
    let target = match target {
        Some(target) => target,
        None if !connection.digests.data => {
            let all = (length + padding(length)) as u64;
            return match input.skip(link, all).await? {
                More::Yes => Ok(true),
                More::End => Err(End::Gone),
            };
        }
        None => {
            scratch = vec![0; length];
            &mut scratch
        }
    };
    read(link, input, target).await?;
    let mut tail = [0; 3 + DIGEST];
    let filler = padding(length);
    let tail_length = filler + if connection.digests.data { DIGEST } else { 0 };
    read(link, input, &mut tail[..tail_length]).await?;
    if !connection.digests.data {
        return Ok(true);
    }
    let mut crc = Crc::new();
    crc.update(target);
    crc.update(&tail[..filler]);
    Ok(crc.bytes() == tail[filler..tail_length])
}

/// The CDB in additional header segments, if it is longer than 16 bytes (RFC 7143 §11.2.2.3).
fn long_cdb(head: &Head, mut additional: &[u8]) -> Result<Vec<u8>, End> {
    const EXTENDED_CDB: u8 = 1;
    let mut cdb = Vec::new();
    while let Some((segment, _)) = additional.split_at_checked(4) {
        let length = usize::from(u16::from_be_bytes([segment[0], segment[1]]));
        if segment[2] & 0x3f == EXTENDED_CDB && length > 1 {
            // The length counts a reserved byte.
            let rest = additional
                .get(4..3 + length)
                .ok_or(End::Violation("a CDB that is cut off"))?;
            cdb = [&head.0[32..48], rest].concat();
        }
        let step = (length + 3).next_multiple_of(4);
        additional = additional.get(step..).unwrap_or_default();
    }
    Ok(cdb)
}

async fn one<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, input: &mut Input) -> Result<(), End> {
    connection.link.room().await;
    let Start { head, additional } = receive_head(connection, input).await?;
    match head.opcode() {
        request::COMMAND => command(connection, input, &head, &additional).await,
        request::DATA_OUT => data_out(connection, input, &head).await,
        request::LOGIN => Err(End::Violation("a login after the login")),
        _ => other(connection, input, &head).await,
    }
}

async fn command<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
    additional: &[u8],
) -> Result<(), End> {
    let session = &connection.session;
    let length = head.data_length();
    let task = Rc::new(Task::new(head, long_cdb(head, additional)?, connection.cid));
    let both = head.0[1] & 0x60 == 0x60;
    let refusal = if session.is_discovery {
        Some(reason::PROTOCOL)
    } else if both || head.tag() == NO_TAG {
        // No command here moves data in both directions.
        Some(reason::INVALID_FIELD)
    } else if session.has_task(task.tag) {
        Some(reason::TASK_IN_PROGRESS)
    } else if task.is_immediate && !session.takes_immediate() {
        Some(reason::TOO_MANY_IMMEDIATE)
    } else {
        None
    };
    let never = !task.is_immediate && session.order.turn(task.number) == Turn::Never;
    let mut place = if refusal.is_some() || never {
        Place::Nowhere
    } else {
        task.prepare(connection, length, !head.is_final())
    };
    let target = match &mut place {
        Place::Buffer(buffer, _) => buffer.as_mut_slice().get_mut(..length),
        Place::Nowhere => None,
    };
    let is_good = receive_data(connection, input, target, length).await?;
    if never {
        return Ok(());
    }
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
        return Ok(());
    }
    if let Some(why) = refusal {
        // Its number counts, or nothing after it would ever be delivered.
        if !task.is_immediate {
            session.skip(task.number);
        }
        connection.reject(head, why);
        return Ok(());
    }
    task.began(place, length);
    let held = Held::Command(Rc::clone(connection), Rc::clone(&task));
    session.take(task.number, task.is_immediate, held);
    Ok(())
}

async fn data_out<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
) -> Result<(), End> {
    let length = head.data_length();
    let task = connection
        .session
        .task(head.tag())
        .filter(|task| task.cid == connection.cid && task.is_write());
    let Some(task) = task else {
        // Its command has ended, or never began.
        if !receive_data(connection, input, None, length).await? {
            connection.reject(head, reason::DATA_DIGEST);
        }
        return Ok(());
    };
    let mut place = task.place(connection, head, length);
    let target = match &mut place {
        Place::Buffer(buffer, at) => part(buffer, *at, length),
        Place::Nowhere => None,
    };
    let is_good = receive_data(connection, input, target, length).await?;
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
    }
    task.placed(head, place, length, is_good);
    Ok(())
}

fn part(buffer: &mut Buffer, at: usize, length: usize) -> Option<&mut [u8]> {
    buffer.as_mut_slice().get_mut(at..at.checked_add(length)?)
}

async fn other<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    input: &mut Input,
    head: &Head,
) -> Result<(), End> {
    let length = head.data_length();
    let known = matches!(
        head.opcode(),
        request::NOP_OUT | request::TASK_MANAGEMENT | request::TEXT | request::LOGOUT
    );
    let mut data = vec![0; if known { length } else { 0 }];
    let target = known.then_some(data.as_mut_slice());
    let is_good = receive_data(connection, input, target, length).await?;
    if !is_good {
        connection.reject(head, reason::DATA_DIGEST);
        return Ok(());
    }
    if !known {
        let snack = head.opcode() == request::SNACK;
        let why = if snack { reason::SNACK } else { reason::UNSUPPORTED };
        connection.reject(head, why);
        return Ok(());
    }
    let held = Held::Other(Rc::clone(connection), Box::new(*head), data);
    let session = &connection.session;
    session.take(head.command_number(), head.is_immediate(), held);
    Ok(())
}
