//! Where requests wait that may not go to the disk yet: it is stopped, or its rate is limited.
//!
//! Requests at a limit stand in line per queue. The first is the *pacer*: it sleeps on a timer; whoever goes calls the next,
//! who goes too or becomes the pacer. So a queue has one timer, however many wait.

use std::future::poll_fn;
use std::ops::Deref;
use std::task::{Poll, Waker};
use std::time::Duration;

use block_io::{BlockDevice, Clock, WorkerClock};

use super::control::Waiting;
use super::request::Request;
use super::server::Server;

/// The longest sleep of a pacer: so soon a changed limit is noticed, and a stop.
const SLICE: Duration = Duration::from_millis(50);

/// What becomes of a request that had to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It goes to the disk.
    Go,
    /// It is not answered: the server ends.
    Abandon,
    /// It is answered with an error: the server ends and nobody would repeat it.
    Fail,
}

impl<L> Server<L>
where
    L: Deref<Target: BlockDevice + Sized> + 'static,
{
    /// Waits until `request` may go.
    pub(super) async fn admit(&self, request: &Request<'_>) -> Admission {
        while self.controls.is_stopped() {
            match self.control.stopping() {
                Some(Waiting::Abandon) => return Admission::Abandon,
                Some(Waiting::Finish) => return Admission::Fail,
                None => self.wait_for_resume().await,
            }
        }
        let bytes = match request {
            Request::Flush | Request::GetId { .. } => return Admission::Go,
            request => request.data_length(),
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
            match self.control.stopping() {
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

    async fn wait_for_resume(&self) {
        let mut waited = false;
        poll_fn(|context| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(());
            }
            self.held.borrow_mut().push(context.waker().clone());
            if let Some(server) = &*self.waker.borrow() {
                self.controls.await_resume(server.clone());
            }
            // It may have been resumed before it was told of the waker.
            if !self.controls.is_stopped() {
                self.wake();
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
    pub(super) fn can_release(&self) -> bool {
        !self.held.borrow().is_empty() && !self.controls.is_stopped()
    }

    /// Has all look again that wait for the disk to be resumed.
    pub(super) fn release_held(&self) {
        let held = self.held.take();
        held.into_iter().for_each(Waker::wake);
    }

    /// Has all look again that wait for anything: the server ends.
    pub(super) fn release_all(&self) {
        self.release_held();
        let line = self.line.take();
        line.into_iter().for_each(Waker::wake);
    }
}
