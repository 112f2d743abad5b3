//! A connection after its login: what it sends, and requests that are no commands.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use block_io::{BlockDevice, spawn_local};

use super::keys::{Context, Parameters};
use super::link::{Link, Permit};
use super::login::Agreement;
use super::pdu::{Body, CONTINUE, Digests, FINAL, Head, NO_TAG, Out, reason, request, response};
use super::session::Session;
use super::task::Task;
use super::text::{self, Text};
use crate::sockets::buffers::Pool;

/// Text that an initiator may gather with continuation.
const LONGEST_TEXT: usize = 16 << 10;

/// A connection after its login.
pub(super) struct Connection<D: BlockDevice + 'static> {
    pub(super) link: Rc<Link>,
    pub(super) session: Rc<Session<D>>,
    pub(super) cid: u16,
    pub(super) digests: Digests,
    /// Bytes of data in a PDU.
    pub(super) receive_segment: usize,
    send_segment: Cell<u32>,
    /// StatSN: the number of the next response.
    status_number: Cell<u32>,
    transfer_tag: Cell<u32>,
    /// Text that was gathered, and text that is asked for piece by piece.
    text_in: RefCell<Vec<u8>>,
    text_out: RefCell<Option<(u32, Vec<u8>)>>,
    pub(super) logged_out: Cell<bool>,
    /// The silence since this moment was answered with a ping.
    pinged: Cell<Option<Instant>>,
}

impl<D: BlockDevice + 'static> Connection<D> {
    /// The connection of `session` that has agreed on something; its next response has the number `number`.
    pub(super) fn new(
        link: &Rc<Link>,
        session: Rc<Session<D>>,
        agreement: &Agreement,
        number: u32,
    ) -> Rc<Self> {
        let parameters = &agreement.parameters;
        Rc::new(Self {
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
        })
    }

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
        let (session, local) = (&self.session, self.link.stream().local_address());
        for target in session.server.told_in(session) {
            let wanted = match value {
                "All" => session.is_discovery,
                "" => !session.is_discovery,
                name => target.is(name),
            };
            if !wanted {
                continue;
            }
            answer.put("TargetName", &target.name);
            for address in session.server.portals(local) {
                let group = super::session::PORTAL_GROUP;
                answer.put("TargetAddress", &format!("{address},{group}"));
            }
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
