//! Where requests wait that may not go to the disk yet: it is stopped, or its rate is limited.
//!
//! Requests at a limit stand in line, one line per queue and disk. The first is the *pacer*: it sleeps on a timer; whoever goes
//! calls the next, who goes too or becomes the pacer. So a line has one timer, however many wait.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block_io::{Clock, IoError, WorkerClock};

use super::control::Waiting;
use super::server::ServerLink;
use crate::controls::DiskControls;

/// The longest sleep of a pacer: so soon a changed limit is noticed, and a stop.
const SLICE: Duration = Duration::from_millis(50);

/// What becomes of a request that had to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It goes to the disk.
    Go,
    /// It is not answered: the server ends.
    Abandon,
    /// It is answered with an error: nobody wants it any more, or the server ends and nobody would repeat it.
    Fail,
}

/// The way of one queue's requests to one disk.
pub(crate) struct Gate {
    controls: Arc<DiskControls>,
    /// Requests that wait for the disk to be resumed.
    held: RefCell<Vec<Waker>>,
    /// Requests that wait at a limit, but for the first.
    line: RefCell<VecDeque<Waker>>,
    /// There is a first in line.
    pacing: Cell<bool>,
}

impl Gate {
    pub(crate) fn new(controls: Arc<DiskControls>) -> Self {
        Self {
            controls,
            held: RefCell::default(),
            line: RefCell::default(),
            pacing: Cell::new(false),
        }
    }

    /// Whether a request must be [admitted](Self::admit) before it goes to the disk.
    pub(crate) fn is_closed(&self) -> bool {
        self.controls.gates()
    }

    /// The disk failed: whether the request waits instead of being answered.
    pub(crate) fn stops_on(&self, error: &IoError) -> bool {
        self.controls.stops_on(error)
    }

    pub(crate) fn longest_spin(&self) -> Duration {
        self.controls.polling()
    }

    /// Waits until a request may go that moves so many bytes, or none: then no limit holds it. It fails instead if `is_ended`
    /// is found to say so by the next [`Self::release`].
    pub(crate) async fn admit(
        &self,
        server: &ServerLink,
        bytes: Option<u64>,
        is_ended: impl Fn() -> bool,
    ) -> Admission {
        while self.controls.is_stopped() {
            if is_ended() {
                return Admission::Fail;
            }
            match server.stopping() {
                Some(Waiting::Abandon) => return Admission::Abandon,
                Some(Waiting::Finish) => return Admission::Fail,
                None => self.wait_for_resume(server).await,
            }
        }
        let Some(bytes) = bytes else {
            return Admission::Go;
        };
        let tickets = self.controls.take(bytes);
        let mut is_pacer = false;
        loop {
            let wait = self.controls.wait(tickets);
            if wait.is_zero() {
                if is_pacer {
                    self.hand_over();
                }
                return Admission::Go;
            }
            match server.stopping() {
                Some(Waiting::Abandon) => return Admission::Abandon,
                Some(Waiting::Finish) => return Admission::Go,
                None => {}
            }
            if is_pacer || !self.pacing.replace(true) {
                is_pacer = true;
                WorkerClock::new().sleep(wait.min(SLICE)).await;
            } else {
                self.stand_in_line().await;
                is_pacer = true;
            }
        }
    }

    async fn wait_for_resume(&self, server: &ServerLink) {
        let mut waited = false;
        poll_fn(|context| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            self.held.borrow_mut().push(context.waker().clone());
            if let Some(waker) = server.waker() {
                self.controls.await_resume(waker);
            }
            // It may have been resumed before it was told of the waker.
            if !self.controls.is_stopped() {
                server.wake();
            }
            Poll::Pending
        })
        .await;
    }

    async fn stand_in_line(&self) {
        let mut waited = false;
        poll_fn(|context| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            self.line.borrow_mut().push_back(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The pacer goes: the next in line is the pacer, and if there is none, whoever comes.
    fn hand_over(&self) {
        let next = self.line.borrow_mut().pop_front();
        match next {
            Some(waker) => waker.wake(),
            None => self.pacing.set(false),
        }
    }

    /// Whether those that wait for the disk to be resumed can go on.
    pub(crate) fn can_release(&self) -> bool {
        !self.held.borrow().is_empty() && !self.controls.is_stopped()
    }

    /// Has all look again that wait for the disk to be resumed, if it is or some of them have ended; if the server ends, all
    /// that wait for anything.
    pub(crate) fn release(&self, server: &ServerLink, some_ended: bool) {
        if some_ended || self.can_release() || server.stopping().is_some() {
            let held = self.held.take();
            held.into_iter().for_each(Waker::wake);
        }
        if server.stopping().is_some() {
            let line = self.line.take();
            line.into_iter().for_each(Waker::wake);
        }
    }
}
