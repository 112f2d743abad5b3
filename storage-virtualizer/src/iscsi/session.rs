//! A session: an initiator port on this target, with its connections, the order of its commands, and what is in flight.
//!
//! Requests have numbers (CmdSN), counted over all connections of the session. One is *delivered*, which means begun, when
//! all before it were (RFC 7143 §4.2.2.1); until then it is held. What is outside of the window that the target has opened is
//! not looked at. The window closes with each command in flight and opens again when one has ended, so that a session has at
//! most [`WINDOW`] commands, held or in flight, and a few immediate ones.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::SystemTime;

use block_io::BlockDevice;

use super::connection::Connection;
use super::counted::UnitDisk;
use super::keys::Parameters;
use super::pdu::Head;
use super::server::Server;
use super::task::Task;
use crate::queue::QueueStatistics;
use crate::scsi::{Nexus, Target};

/// Commands of a session.
pub(super) const WINDOW: u32 = 128;
/// Immediate commands of a session.
const IMMEDIATE: u32 = 16;
/// The tag of the only portal group: all portals lead to all sessions (RFC 7143 §4.4.1).
pub(super) const PORTAL_GROUP: u16 = 1;

/// A request that is not delivered yet.
pub(super) enum Held<D: BlockDevice + 'static> {
    Command(Rc<Connection<D>>, Rc<Task>),
    Other(Rc<Connection<D>>, Box<Head>, Vec<u8>),
    /// One that is not going to be done; its number counts.
    Nothing,
}

/// What becomes of a request with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Now,
    Later,
    /// It is a duplicate, or outside of the window: as if it had not come.
    Never,
}

/// Numbers of requests.
#[derive(Debug)]
pub(super) struct Order {
    /// The number of the next request to be delivered.
    expected: Cell<u32>,
    /// Commands that were delivered and have not ended.
    active: Cell<u32>,
}

impl Order {
    pub(super) fn new(first: u32) -> Self {
        Self {
            expected: Cell::new(first),
            active: Cell::new(0),
        }
    }

    pub(super) fn expected(&self) -> u32 {
        self.expected.get()
    }

    /// The last number that may come.
    pub(super) fn last(&self) -> u32 {
        let free = WINDOW.saturating_sub(self.active.get());
        self.expected.get().wrapping_add(free).wrapping_sub(1)
    }

    /// When the request `number` is to be delivered.
    pub(super) fn turn(&self, number: u32) -> Turn {
        let ahead = number.wrapping_sub(self.expected.get());
        let free = WINDOW.saturating_sub(self.active.get());
        match ahead {
            _ if ahead >= free => Turn::Never,
            0 => Turn::Now,
            _ => Turn::Later,
        }
    }

    fn deliver(&self, is_command: bool) {
        self.expected.set(self.expected.get().wrapping_add(1));
        if is_command {
            self.active.set(self.active.get() + 1);
        }
    }

    fn command_ended(&self) {
        self.active.set(self.active.get().saturating_sub(1));
    }
}

pub(super) struct Session<D: BlockDevice + 'static> {
    pub(super) server: Rc<Server<D>>,
    pub(super) nexus: Arc<Nexus>,
    pub(super) initiator: String,
    pub(super) isid: [u8; 6],
    pub(super) tsih: u16,
    pub(super) is_discovery: bool,
    /// Its place among the server's.
    pub(super) target: usize,
    pub(super) parameters: Parameters,
    pub(super) order: Order,
    /// When it was logged in.
    pub(super) since: SystemTime,
    /// What it has asked of disks.
    pub(super) statistics: QueueStatistics,
    /// It was asked to log out: what is in flight when it is cut is answered.
    pub(super) is_leaving: Cell<bool>,
    held: RefCell<BTreeMap<u32, Held<D>>>,
    tasks: RefCell<HashMap<u32, Rc<Task>>>,
    immediate: Cell<u32>,
    pub(super) connections: RefCell<Vec<Rc<Connection<D>>>>,
    is_closed: Cell<bool>,
    is_released: Cell<bool>,
    /// Who waits for the last task.
    waiting: RefCell<Vec<Waker>>,
}

impl<D: BlockDevice + 'static> Session<D> {
    pub(super) fn new(
        server: Rc<Server<D>>,
        nexus: Arc<Nexus>,
        agreement: &super::login::Agreement,
        tsih: u16,
    ) -> Rc<Self> {
        Rc::new(Self {
            server,
            nexus,
            initiator: agreement.initiator.clone(),
            isid: agreement.first.isid,
            tsih,
            is_discovery: agreement.is_discovery,
            target: agreement.target,
            parameters: agreement.parameters,
            order: Order::new(agreement.first.command_number),
            since: SystemTime::now(),
            statistics: QueueStatistics::default(),
            is_leaving: Cell::new(false),
            held: RefCell::default(),
            tasks: RefCell::default(),
            immediate: Cell::new(0),
            connections: RefCell::default(),
            is_closed: Cell::new(false),
            is_released: Cell::new(false),
            waiting: RefCell::default(),
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.get()
    }

    /// The logical units of its target.
    pub(super) fn units(&self) -> &Target<Rc<UnitDisk<D>>> {
        // A login names a target that is there, and all stay.
        &self.server.targets[self.target]
    }

    /// The numbers that every PDU to the initiator has (RFC 7143 §11.4.9, §11.4.10).
    pub(super) fn stamp(&self, head: &mut Head) {
        head.set(28, self.order.expected());
        head.set(32, self.order.last());
    }

    pub(super) fn has_task(&self, tag: u32) -> bool {
        self.tasks.borrow().contains_key(&tag)
    }

    pub(super) fn task(&self, tag: u32) -> Option<Rc<Task>> {
        self.tasks.borrow().get(&tag).cloned()
    }

    /// All tasks that `concern` says.
    pub(super) fn tasks(&self, concern: impl Fn(&Task) -> bool) -> Vec<Rc<Task>> {
        let tasks = self.tasks.borrow();
        tasks.values().filter(|task| concern(task)).cloned().collect()
    }

    /// Ends all tasks that `concern` says, and returns them: they are over when the disk is done with them.
    pub(super) fn end_tasks(&self, concern: impl Fn(&Task) -> bool) -> Vec<Rc<Task>> {
        let tasks = self.tasks(concern);
        tasks.iter().for_each(|task| task.end());
        for connection in &*self.connections.borrow() {
            connection.link.wake_waiting();
        }
        // Those that are not delivered need not wait for it.
        let mut dropped = Vec::new();
        for held in self.held.borrow_mut().values_mut() {
            if let Held::Command(_, task) = held
                && task.is_ended()
            {
                dropped.push(Rc::clone(task));
                *held = Held::Nothing;
            }
        }
        self.forget_tasks(&dropped);
        tasks
    }

    fn forget_tasks(&self, tasks: &[Rc<Task>]) {
        for task in tasks {
            self.tasks.borrow_mut().remove(&task.tag);
            task.finish();
        }
    }

    /// The request `number` is not going to be done.
    pub(super) fn skip(self: &Rc<Self>, number: u32) {
        self.take(number, false, Held::Nothing);
    }

    /// Whether a further immediate command may come.
    pub(super) fn takes_immediate(&self) -> bool {
        self.immediate.get() < IMMEDIATE
    }

    /// Takes a request that came with its number, or is immediate; delivers it, and those that waited for it, when it is their
    /// turn.
    pub(super) fn take(self: &Rc<Self>, number: u32, is_immediate: bool, request: Held<D>) {
        // What was read together with the end of the session, or of the connection, comes too late: whoever waits for the end
        // must not see it done afterwards.
        let is_late = request.connection().is_some_and(|own| own.link.is_ending());
        if self.is_closed() || is_late {
            return;
        }
        if is_immediate {
            if let Held::Command(_, task) = &request {
                self.immediate.set(self.immediate.get() + 1);
                self.tasks.borrow_mut().insert(task.tag, Rc::clone(task));
            }
            return request.deliver();
        }
        match self.order.turn(number) {
            Turn::Never => return,
            Turn::Later if self.held.borrow().contains_key(&number) => return,
            Turn::Now | Turn::Later => {}
        }
        if let Held::Command(_, task) = &request {
            self.tasks.borrow_mut().insert(task.tag, Rc::clone(task));
        }
        self.held.borrow_mut().insert(number, request);
        loop {
            let next = self.order.expected();
            let Some(request) = self.held.borrow_mut().remove(&next) else {
                return;
            };
            self.order.deliver(matches!(request, Held::Command(..)));
            request.deliver();
        }
    }

    /// A task has its answer, or gets none.
    pub(super) fn end_task(self: &Rc<Self>, task: &Task) {
        self.tasks.borrow_mut().remove(&task.tag);
        if task.is_immediate {
            self.immediate.set(self.immediate.get().saturating_sub(1));
        } else {
            self.order.command_ended();
        }
        task.finish();
        self.release();
    }

    /// Drops requests that are held, of all connections or of one. Their numbers stay open: nothing after them is delivered.
    pub(super) fn drop_held(&self, of: Option<u16>) {
        let mut dropped = Vec::new();
        self.held.borrow_mut().retain(|_, held| {
            let goes = held
                .connection()
                .is_some_and(|own| of.is_none_or(|cid| own.cid == cid));
            if goes && let Held::Command(_, task) = held {
                dropped.push(Rc::clone(task));
            }
            !goes
        });
        self.forget_tasks(&dropped);
    }

    /// Ends the session now: its connections are cut, its commands ended.
    pub(super) fn close(self: &Rc<Self>) {
        if self.is_closed.replace(true) {
            return;
        }
        tracing::info!(initiator = self.initiator, "iSCSI session ended");
        self.server.forget(self);
        self.drop_held(None);
        self.end_tasks(|_| true);
        let connections = self.connections.borrow().clone();
        for connection in connections {
            connection.link.end();
        }
        self.release();
    }

    /// Gives up what the nexus has of the units, once nothing is in flight.
    fn release(&self) {
        if !self.is_closed.get() || !self.tasks.borrow().is_empty() || self.is_released.replace(true) {
            return;
        }
        if !self.is_discovery {
            self.units().disconnect(&self.nexus);
        }
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// It was closed, and has nothing in flight any more.
    pub(super) fn is_released(&self) -> bool {
        self.is_released.get()
    }

    /// Waits until a session that was closed has nothing in flight any more.
    pub(super) async fn released(&self) {
        poll_fn(|context| {
            if self.is_released.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// A connection has ended. An orderly logout leaves the others; anything else ends the session, since nothing is recovered
    /// at error recovery level 0 (RFC 7143 §7.1.4.4).
    pub(super) fn left(self: &Rc<Self>, connection: &Rc<Connection<D>>, in_order: bool) {
        let is_last = {
            let mut connections = self.connections.borrow_mut();
            connections.retain(|other| !Rc::ptr_eq(other, connection));
            connections.is_empty()
        };
        if is_last || !in_order {
            self.close();
        }
    }
}

impl<D: BlockDevice + 'static> Held<D> {
    fn connection(&self) -> Option<&Rc<Connection<D>>> {
        match self {
            Self::Command(connection, _) | Self::Other(connection, ..) => Some(connection),
            Self::Nothing => None,
        }
    }

    fn deliver(self) {
        match self {
            Self::Command(connection, task) => super::task::start(connection, task),
            Self::Other(connection, head, data) => connection.perform(&head, data),
            Self::Nothing => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_closes_with_commands_and_opens_when_they_end() {
        let order = Order::new(u32::MAX - 1);
        assert_eq!((order.expected(), order.last()), (u32::MAX - 1, WINDOW - 3));
        assert_eq!(order.turn(u32::MAX - 1), Turn::Now);
        assert_eq!(order.turn(0), Turn::Later);
        assert_eq!(order.turn(WINDOW - 3), Turn::Later);
        assert_eq!(order.turn(WINDOW - 2), Turn::Never);
        assert_eq!(order.turn(u32::MAX - 2), Turn::Never);
        for _ in 0..WINDOW {
            order.deliver(true);
        }
        // Nothing may come: the last number is before the next one.
        assert_eq!(order.last(), order.expected().wrapping_sub(1));
        assert_eq!(order.turn(order.expected()), Turn::Never);
        order.command_ended();
        assert_eq!(order.last(), order.expected());
        assert_eq!(order.turn(order.expected()), Turn::Now);
        order.deliver(false);
        assert_eq!(order.turn(order.expected()), Turn::Now);
    }
}
