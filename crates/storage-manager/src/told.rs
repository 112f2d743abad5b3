//! What happened to an open pool, for two kinds of readers: who listens is told at once and of everything; who asks for something gets
//! with the answer what has happened since anybody asked.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use api::storage::PoolEvent;

/// Events kept for who asks.
const KEPT: usize = 1024;

/// Somebody who is told of everything.
type Listener = Box<dyn Fn(PoolEvent)>;

#[derive(Default)]
pub(crate) struct Told {
    kept: RefCell<VecDeque<PoolEvent>>,
    listener: RefCell<Option<Listener>>,
}

impl Told {
    pub(crate) fn listen(&self, listener: impl Fn(PoolEvent) + 'static) {
        *self.listener.borrow_mut() = Some(Box::new(listener));
    }

    pub(crate) fn tell(&self, event: PoolEvent) {
        if let Some(listener) = &*self.listener.borrow() {
            listener(event.clone());
        }
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event);
    }

    pub(crate) fn take(&self) -> Vec<PoolEvent> {
        self.kept.take().into()
    }
}

/// Wakes a task of this thread.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Bell {
    /// What rings it.
    pub(crate) fn ringer(self: &Rc<Self>) -> impl Fn() + 'static {
        let bell = Rc::clone(self);
        move || {
            bell.rung.set(true);
            if let Some(waker) = bell.waiting.take() {
                waker.wake();
            }
        }
    }

    /// Waits until it is rung, if it was not since the last time.
    pub(crate) async fn rung(&self) {
        poll_fn(|context| match self.rung.take() {
            true => Poll::Ready(()),
            false => {
                *self.waiting.borrow_mut() = Some(context.waker().clone());
                Poll::Pending
            }
        })
        .await;
    }
}
