//! A SCSI command: its data from the initiator, its execution, its answer.
//!
//! ```text
//!   command PDU ─► Task ─► in its turn: a task of the worker
//!                   │         │ write: memory, R2T … until all data are there
//!      Data-Out ────┘         │ scsi::execute on the unit's disk
//!                             └ answer: Data-In with the status in the last one, or a response
//! ```
//!
//! Nobody can take a command back that the disk is doing. One that was ended by task management, or with its session, goes
//! on until the disk is done; only its answer is left out. Who ended it waits for that ([`Task::done`]).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block_io::{BlockDevice, IoBuf, list, spawn_local};

use super::connection::Connection;
use super::counted::Counted;
use super::link::Permit;
use super::options::MAX_TRANSFER;
use super::pdu::{Body, FINAL, Head, NO_TAG, response};
use crate::scsi::{self, Code, Command, Found, Key, Outcome, Residual, Sense, Status};
use crate::sockets::buffers::Buffer;

/// Conditions of iSCSI as sense data (RFC 7143 §11.4.7.2).
mod condition {
    use crate::scsi::Code;

    pub(super) const UNEXPECTED_DATA: Code = Code(0x0c, 0x0c);
    pub(super) const WRONG_AMOUNT: Code = Code(0x0c, 0x0d);
    pub(super) const SERVICE_CRC: Code = Code(0x47, 0x05);
}

/// INVALID MESSAGE ERROR: a task attribute that is not supported.
const INVALID_MESSAGE: Code = Code(0x49, 0x00);

/// Task attributes that are not supported (RFC 7143 §11.3.1).
const ORDERED: u8 = 2;
const ACA: u8 = 4;

/// A CDB: mostly 16 bytes, longer with an additional header segment.
#[derive(Debug)]
pub(super) struct Cdb {
    pub(super) first: [u8; 16],
    /// All of it, if it is longer.
    pub(super) long: Vec<u8>,
}

impl Cdb {
    fn as_slice(&self) -> &[u8] {
        if self.long.is_empty() {
            &self.first
        } else {
            &self.long
        }
    }
}

/// Data that were asked for.
#[derive(Debug)]
struct Transfer {
    tag: u32,
    /// Where the next byte belongs, and where the last one ends.
    at: usize,
    end: usize,
    sequence: u32,
}

/// Data from the initiator.
#[derive(Debug, Default)]
struct Inbound {
    /// Absent while something is read into it.
    buffer: Option<Buffer>,
    permit: Option<Permit>,
    received: usize,
    /// More comes without being asked for.
    unsolicited: bool,
    unsolicited_sequence: u32,
    transfers: Vec<Transfer>,
    /// Bytes that were asked for, or came unasked.
    requested: usize,
    /// R2T sent.
    requests: u32,
    /// Something was wrong with the data: the command fails when they have all come.
    flaw: Option<Code>,
}

#[derive(Debug)]
pub(super) struct Task {
    pub(super) tag: u32,
    pub(super) lun: [u8; 8],
    pub(super) cid: u16,
    pub(super) number: u32,
    pub(super) is_immediate: bool,
    cdb: Cdb,
    attribute: u8,
    is_read: bool,
    is_write: bool,
    /// Bytes that the initiator expects to be moved.
    expected: u32,
    inbound: RefCell<Inbound>,
    /// All its data are there, and the unit has it.
    is_executing: Cell<bool>,
    is_ended: Cell<bool>,
    is_done: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    watchers: RefCell<Vec<Waker>>,
}

/// Where data of a Data-Out go.
#[derive(Debug)]
pub(super) enum Place {
    /// Into this buffer at this byte; give it back with [`Task::placed`].
    Buffer(Buffer, usize),
    Nowhere,
}

impl Task {
    /// A task of the command `head` on the connection `cid`.
    pub(super) fn new(head: &Head, long_cdb: Vec<u8>, cid: u16) -> Self {
        let mut first = [0; 16];
        first.copy_from_slice(&head.0[32..48]);
        Self {
            tag: head.tag(),
            lun: head.lun(),
            cid,
            number: head.command_number(),
            is_immediate: head.is_immediate(),
            cdb: Cdb {
                first,
                long: long_cdb,
            },
            attribute: head.0[1] & 7,
            is_read: head.0[1] & 0x40 != 0,
            is_write: head.0[1] & 0x20 != 0,
            expected: head.u32(20),
            inbound: RefCell::default(),
            is_executing: Cell::new(false),
            is_ended: Cell::new(false),
            is_done: Cell::new(false),
            waker: RefCell::default(),
            watchers: RefCell::default(),
        }
    }

    pub(super) fn is_write(&self) -> bool {
        self.is_write
    }

    /// Bytes that are to come from the initiator.
    fn outgoing(&self) -> usize {
        if self.is_write {
            usize::try_from(self.expected).unwrap_or(usize::MAX)
        } else {
            0
        }
    }

    /// Whether more is to be moved than one command may.
    fn is_too_large(&self) -> bool {
        self.outgoing() > MAX_TRANSFER
    }

    /// Gets ready for data: `immediate` bytes come with the command, and more unasked if `unsolicited`. Returns where the
    /// immediate ones belong.
    pub(super) fn prepare<D: BlockDevice + 'static>(
        &self,
        connection: &Rc<Connection<D>>,
        immediate: usize,
        unsolicited: bool,
    ) -> Place {
        let rules = &connection.session.parameters;
        let burst = usize::try_from(rules.first_burst).unwrap_or(usize::MAX);
        let total = self.outgoing();
        let mut inbound = self.inbound.borrow_mut();
        inbound.unsolicited = unsolicited;
        if immediate > total.min(burst)
            || (immediate > 0 && !rules.immediate_data)
            || (unsolicited && (rules.initial_r2t || !self.is_write))
        {
            inbound.flaw = Some(condition::UNEXPECTED_DATA);
        }
        if inbound.flaw.is_some() || total == 0 || self.is_too_large() {
            return Place::Nowhere;
        }
        inbound.permit = connection.link.try_memory(total);
        let size = if inbound.permit.is_some() {
            total
        } else {
            total.min(burst)
        };
        let buffer = connection.pool().take(size);
        Place::Buffer(buffer, 0)
    }

    /// Data that came with the command are in `place`, or do not count.
    pub(super) fn began(&self, place: Place, immediate: usize) {
        if let Place::Buffer(buffer, _) = place {
            let mut inbound = self.inbound.borrow_mut();
            inbound.buffer = Some(buffer);
            inbound.received = immediate;
        }
    }

    /// Where `length` bytes of a Data-Out belong.
    pub(super) fn place<D: BlockDevice + 'static>(
        &self,
        connection: &Connection<D>,
        head: &Head,
        length: usize,
    ) -> Place {
        let (transfer_tag, sequence) = (head.u32(20), head.u32(36));
        let offset = usize::try_from(head.u32(40)).unwrap_or(usize::MAX);
        let mut inbound = self.inbound.borrow_mut();
        let inbound = &mut *inbound;
        let (expected, at, end) = if transfer_tag == NO_TAG {
            let burst = usize::try_from(connection.session.parameters.first_burst).unwrap_or(usize::MAX);
            let end = if inbound.unsolicited {
                self.outgoing().min(burst)
            } else {
                0
            };
            (inbound.unsolicited_sequence, inbound.received, end)
        } else {
            match inbound
                .transfers
                .iter()
                .find(|transfer| transfer.tag == transfer_tag)
            {
                Some(transfer) => (transfer.sequence, transfer.at, transfer.end),
                None => return Place::Nowhere,
            }
        };
        let fits = offset.checked_add(length).is_some_and(|last| last <= end);
        if sequence != expected || offset != at {
            // What was lost is not asked for again.
            inbound.flaw.get_or_insert(condition::SERVICE_CRC);
        } else if !fits {
            inbound.flaw.get_or_insert(condition::WRONG_AMOUNT);
        }
        match inbound.buffer.take() {
            Some(buffer) if inbound.flaw.is_none() => Place::Buffer(buffer, offset),
            buffer => {
                inbound.buffer = buffer;
                Place::Nowhere
            }
        }
    }

    /// A Data-Out was received; `is_good` says whether its digest is right.
    pub(super) fn placed(&self, head: &Head, place: Place, length: usize, is_good: bool) {
        let mut inbound = self.inbound.borrow_mut();
        let inbound = &mut *inbound;
        let is_placed = matches!(place, Place::Buffer(..));
        if let Place::Buffer(buffer, _) = place {
            inbound.buffer = Some(buffer);
        }
        if !is_good {
            inbound.flaw.get_or_insert(condition::SERVICE_CRC);
        }
        if is_placed && is_good {
            inbound.received += length;
        }
        let transfer_tag = head.u32(20);
        if transfer_tag == NO_TAG {
            inbound.unsolicited_sequence = inbound.unsolicited_sequence.wrapping_add(1);
            inbound.unsolicited &= !head.is_final();
        } else if let Some(place) = inbound
            .transfers
            .iter()
            .position(|transfer| transfer.tag == transfer_tag)
        {
            let transfer = &mut inbound.transfers[place];
            transfer.at += length;
            transfer.sequence = transfer.sequence.wrapping_add(1);
            if head.is_final() {
                let transfer = inbound.transfers.remove(place);
                if transfer.at != transfer.end {
                    inbound.flaw.get_or_insert(condition::WRONG_AMOUNT);
                }
            }
        }
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Ends the task: it gets no answer.
    pub(super) fn end(&self) {
        self.is_ended.set(true);
        self.wake();
    }

    pub(super) fn is_executing(&self) -> bool {
        self.is_executing.get()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.is_ended.get()
    }

    /// Nothing of it is left.
    pub(super) fn finish(&self) {
        self.is_ended.set(true);
        self.is_done.set(true);
        self.watchers.take().into_iter().for_each(Waker::wake);
    }

    /// Waits until nothing of it is left.
    pub(super) async fn done(&self) {
        poll_fn(|context| {
            if self.is_done.get() {
                return Poll::Ready(());
            }
            self.watchers.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Begins a command whose turn it is.
pub(super) fn start<D: BlockDevice + 'static>(connection: Rc<Connection<D>>, task: Rc<Task>) {
    // Refused only where no worker runs, and this is a task of one.
    drop(spawn_local(async move {
        let ending = Ending {
            connection: &connection,
            task: &task,
        };
        run(&connection, &task).await;
        drop(ending);
    }));
}

/// Ends the task, whatever happens.
struct Ending<'a, D: BlockDevice + 'static> {
    connection: &'a Rc<Connection<D>>,
    task: &'a Task,
}

impl<D: BlockDevice + 'static> Drop for Ending<'_, D> {
    fn drop(&mut self) {
        if !self.task.is_done.get() {
            self.connection.session.end_task(self.task);
        }
    }
}

async fn run<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, task: &Task) {
    let mut permit = None;
    let mut data_out = None;
    if task.is_write {
        match collect(connection, task).await {
            Ok((buffer, kept)) => (data_out, permit) = (buffer, kept),
            Err(Stop::Ended) => return,
            Err(Stop::Flaw(code)) => {
                let sense = Sense::new(Key::AbortedCommand, code);
                return answer(connection, task, &failed(sense), None, None);
            }
        }
    }
    let mut data_in = None;
    if task.is_read && task.expected > 0 {
        let length = usize::try_from(task.expected)
            .unwrap_or(usize::MAX)
            .min(MAX_TRANSFER);
        permit = connection.link.memory(length, || task.is_ended.get()).await;
        if permit.is_none() {
            return;
        }
        data_in = Some(connection.pool().take(length));
    }
    if task.is_ended.get() {
        return;
    }
    task.is_executing.set(true);
    let outcome = {
        // SAFETY: the buffers live until the command has ended, and nobody looks at them before.
        let buffers = |buffer: &Option<Buffer>| buffer.as_ref().map(|buffer| unsafe { buffer.io() });
        let (source, target) = (buffers(&data_out), buffers(&data_in));
        execute(connection, task, source.as_slice(), target.as_slice()).await
    };
    drop(data_out);
    answer(connection, task, &outcome, data_in, permit);
}

enum Stop {
    Ended,
    Flaw(Code),
}

/// Gets all data of a write.
async fn collect<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    task: &Task,
) -> Result<(Option<Buffer>, Option<Permit>), Stop> {
    loop {
        // What comes without being asked for is taken first; it says where the rest begins.
        poll_fn(|context| {
            let inbound = task.inbound.borrow();
            if task.is_ended.get() || (!inbound.unsolicited && inbound.transfers.is_empty()) {
                return Poll::Ready(());
            }
            let can_ask = !inbound.unsolicited
                && inbound.flaw.is_none()
                && inbound.requested < task.outgoing()
                && inbound.transfers.len() < ready_to_transfer(connection);
            if can_ask {
                return Poll::Ready(());
            }
            *task.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        if task.is_ended.get() {
            return Err(Stop::Ended);
        }
        let (total, missing) = (task.outgoing(), {
            let mut inbound = task.inbound.borrow_mut();
            if let Some(flaw) = inbound.flaw {
                return Err(Stop::Flaw(flaw));
            }
            if inbound.transfers.is_empty() && inbound.received == task.outgoing() {
                return Ok((inbound.buffer.take(), inbound.permit.take()));
            }
            inbound.permit.is_none()
        });
        if task.is_too_large() {
            // It is not going to be executed: nothing is asked for.
            return Ok((None, None));
        }
        if missing {
            let permit = connection.link.memory(total, || task.is_ended.get()).await;
            let Some(permit) = permit else {
                return Err(Stop::Ended);
            };
            enlarge(connection, task, total, permit);
        }
        ask(connection, task);
    }
}

fn ready_to_transfer<D: BlockDevice + 'static>(connection: &Connection<D>) -> usize {
    usize::try_from(connection.session.parameters.ready_to_transfer).unwrap_or(1)
}

/// Gives a task memory for all its data, after there was some for the first only.
fn enlarge<D: BlockDevice + 'static>(connection: &Connection<D>, task: &Task, total: usize, permit: Permit) {
    let mut inbound = task.inbound.borrow_mut();
    let mut whole = connection.pool().take(total);
    if let Some(part) = &inbound.buffer {
        let received = inbound.received.min(total);
        whole.as_mut_slice()[..received].copy_from_slice(&part.as_slice()[..received]);
    }
    inbound.buffer = Some(whole);
    inbound.permit = Some(permit);
}

/// Asks for as much as may be asked for.
fn ask<D: BlockDevice + 'static>(connection: &Rc<Connection<D>>, task: &Task) {
    let burst = usize::try_from(connection.session.parameters.burst).unwrap_or(usize::MAX);
    let total = task.outgoing();
    let mut inbound = task.inbound.borrow_mut();
    inbound.requested = inbound.requested.max(inbound.received);
    while inbound.requested < total && inbound.transfers.len() < ready_to_transfer(connection) {
        let (at, length) = (inbound.requested, burst.min(total - inbound.requested));
        let tag = connection.next_transfer_tag();
        inbound.transfers.push(Transfer {
            tag,
            at,
            end: at + length,
            sequence: 0,
        });
        inbound.requested += length;
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let mut head = Head::new(response::R2T, FINAL, task.tag)
            .with(20, tag)
            .with(36, inbound.requests)
            .with(40, number(at))
            .with(44, number(length));
        head.set_lun(task.lun);
        inbound.requests += 1;
        connection.send_unnumbered(head, Body::Nothing, None);
    }
}

fn failed(sense: Sense) -> Outcome {
    Outcome {
        status: Status::CheckCondition,
        sense: sense.encode(false),
        wanted: 0,
        moved: 0,
    }
}

async fn execute<D: BlockDevice + 'static>(
    connection: &Connection<D>,
    task: &Task,
    data_out: &[IoBuf],
    data_in: &[IoBuf],
) -> Outcome {
    let command = Command {
        cdb: task.cdb.as_slice(),
        data_out,
        data_in,
    };
    let session = &connection.session;
    let lun = match session.units().find(&session.nexus, task.lun) {
        Found::Lun(lun) => lun,
        Found::Absent { well_known } => {
            return scsi::execute_without_unit(&session.nexus, &command, well_known);
        }
    };
    let unit = &lun.unit;
    if matches!(task.attribute, ORDERED | ACA..) {
        return Outcome::failed(unit, Sense::illegal(INVALID_MESSAGE));
    }
    if task.is_too_large() {
        return Outcome::failed(unit, Sense::illegal(Code::INVALID_FIELD_IN_CDB));
    }
    let disk = Counted::new(&lun.handle, &session.statistics);
    let outcome = scsi::execute(&disk, unit, &session.nexus, &command).await;
    let room = list::total_length(data_in);
    if task.is_read && room < u64::from(task.expected) && outcome.wanted > room {
        return Outcome::failed(unit, Sense::illegal(Code::INVALID_FIELD_IN_CDB));
    }
    outcome
}

/// Answers, unless somebody has ended the task.
fn answer<D: BlockDevice + 'static>(
    connection: &Rc<Connection<D>>,
    task: &Task,
    outcome: &Outcome,
    data: Option<Buffer>,
    mut permit: Option<Permit>,
) {
    if task.is_ended.get() {
        return;
    }
    // First, so that the answer says that a further command may come.
    connection.session.end_task(task);
    let (flags, residual) = match outcome.residual(task.expected.into()) {
        Residual::None => (0, 0),
        Residual::Overflow(bytes) => (0x04, bytes),
        Residual::Underflow(bytes) => (0x02, bytes),
    };
    let residual = u32::try_from(residual).unwrap_or(u32::MAX);
    let good = outcome.status == Status::Good;
    let mut count = 0;
    if let Some(data) = data.filter(|_| task.is_read && outcome.moved > 0) {
        let total = usize::try_from(outcome.moved)
            .unwrap_or(0)
            .min(data.as_slice().len());
        let data = Rc::new(data);
        let segment = usize::try_from(connection.send_segment()).unwrap_or(usize::MAX);
        let burst = usize::try_from(connection.session.parameters.burst).unwrap_or(usize::MAX);
        let (mut at, mut burst_end) = (0, burst.min(total));
        while at < total {
            let length = segment.min(burst_end - at);
            let (is_last, ends_burst) = (at + length == total, at + length == burst_end);
            let mut head = Head::new(response::DATA_IN, if ends_burst { FINAL } else { 0 }, task.tag)
                .with(20, NO_TAG)
                .with(36, count)
                .with(40, u32::try_from(at).unwrap_or(u32::MAX));
            let body = Body::Part(Rc::clone(&data), at, length);
            count += 1;
            at += length;
            if ends_burst {
                burst_end = (burst_end + burst).min(total);
            }
            if is_last && good {
                head.0[1] |= 0x01 | flags;
                head.0[3] = outcome.status as u8;
                head.set(44, residual);
                return connection.send(head, body, permit);
            }
            let kept = if is_last { permit.take() } else { None };
            connection.send_unnumbered_data(head, body, kept);
        }
    }
    let sense = outcome.sense.as_slice();
    let body = if sense.is_empty() {
        Body::Nothing
    } else {
        let length = u16::try_from(sense.len()).unwrap_or(0).to_be_bytes();
        Body::Bytes([&length[..], sense].concat())
    };
    let mut head = Head::new(response::COMMAND, FINAL | flags, task.tag)
        .with(36, count.max(task.inbound.borrow().requests))
        .with(44, residual);
    head.0[3] = outcome.status as u8;
    connection.send(head, body, permit);
}
