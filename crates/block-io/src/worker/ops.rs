//! Requests in flight: a table whose index is the request's identity in the engine, and the future that waits for one.

use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::engine::{Call, Request};
use super::local::{keep_waker, with_local};

/// End of the list of free slots.
const NONE: u32 = u32::MAX;

enum Slot {
    Free { next: u32 },
    InFlight { waker: Option<Waker> },
    Done { result: i32 },
}

/// The table of requests in flight.
pub(super) struct Ops {
    slots: Vec<Slot>,
    free: u32,
}

impl Default for Ops {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: NONE,
        }
    }
}

impl Ops {
    fn insert(&mut self, waker: &Waker) -> u32 {
        let slot = Slot::InFlight {
            waker: Some(waker.clone()),
        };
        if let Some(entry) = self.slots.get_mut(self.free as usize) {
            let index = self.free;
            if let Slot::Free { next } = entry {
                self.free = *next;
            }
            *entry = slot;
            return index;
        }
        match u32::try_from(self.slots.len()) {
            Ok(index) if index != NONE => {
                self.slots.push(slot);
                index
            }
            // Four thousand million requests do not fit into memory.
            _ => std::process::abort(),
        }
    }

    /// Notes the result of a request; the caller wakes its task.
    pub(super) fn complete(&mut self, index: u32, result: i32) -> Option<Waker> {
        match self.slots.get_mut(index as usize) {
            Some(slot @ Slot::InFlight { .. }) => match std::mem::replace(slot, Slot::Done { result }) {
                Slot::InFlight { waker } => waker,
                _ => None,
            },
            _ => {
                debug_assert!(false, "completion of request {index}, which is not in flight");
                None
            }
        }
    }

    /// The result if there is one, which frees the slot; else keeps `waker`.
    fn poll(&mut self, index: u32, waker: Option<&Waker>) -> Option<i32> {
        let slot = &mut self.slots[index as usize];
        match slot {
            Slot::Done { result } => {
                let result = *result;
                *slot = Slot::Free { next: self.free };
                self.free = index;
                Some(result)
            }
            Slot::InFlight { waker: kept } => {
                match waker {
                    Some(waker) => keep_waker(kept, waker),
                    None => *kept = None,
                }
                None
            }
            Slot::Free { .. } => {
                debug_assert!(false, "request {index} was awaited after its end");
                Some(-libc::EIO)
            }
        }
    }
}

enum State {
    New(Request),
    InFlight { index: u32, poll: Option<RawFd> },
    Ended,
}

/// One [`Request`], from its first poll to its result: bytes moved, or a negative errno. `None` if this thread is not a
/// worker.
///
/// While it is in flight, the engine may use the memory that the request points to. So dropping it waits for its end, on
/// the spot: it is correct, and slow, and no code in this project does it but when a worker stops. A [`Call::Poll`], which
/// may never end by itself, is given up first.
pub(crate) struct Operation {
    state: State,
    /// It belongs to the thread that polled it first.
    not_send: PhantomData<*const ()>,
}

impl Operation {
    pub(crate) fn new(request: Request) -> Self {
        Self {
            state: State::New(request),
            not_send: PhantomData,
        }
    }
}

impl Future for Operation {
    type Output = Option<i32>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match &this.state {
            State::New(request) => {
                let index = with_local(|local| {
                    let index = local.ops.borrow_mut().insert(context.waker());
                    local.engine.submit(index, request, &local.shared);
                    index
                });
                match index {
                    Some(index) => {
                        let poll = matches!(request.call, Call::Poll { .. }).then_some(request.file);
                        this.state = State::InFlight { index, poll };
                        Poll::Pending
                    }
                    None => Poll::Ready(None),
                }
            }
            State::InFlight { index, .. } => {
                let index = *index;
                match with_local(|local| local.ops.borrow_mut().poll(index, Some(context.waker()))) {
                    Some(Some(result)) => {
                        this.state = State::Ended;
                        Poll::Ready(Some(result))
                    }
                    _ => Poll::Pending,
                }
            }
            State::Ended => Poll::Ready(None),
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let State::InFlight { index, poll } = self.state else {
            return;
        };
        with_local(|local| {
            if let Some(file) = poll {
                local.engine.cancel_poll(index, file);
            }
            while local.ops.borrow_mut().poll(index, None).is_none() {
                local.turn(true);
            }
        });
    }
}
