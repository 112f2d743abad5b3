//! One request and its answer, as a future.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::buffer::IoBuf;
use crate::error::IoCause;

use super::driver;
use super::link::{Buffers, Entry, Link, Phase};
use super::proto::Command;
use super::ranges::Ranges;

/// Has the server do a request that fits into one message.
pub(super) fn exchange<'a>(
    link: &'a Arc<Link>,
    command: Command,
    flags: u16,
    offset: u64,
    length: u64,
    buffers: &'a [IoBuf],
) -> impl Future<Output = Result<(), IoCause>> + 'a {
    Exchange {
        link,
        entry: Some(Entry {
            command,
            flags,
            offset,
            // The caller cuts what is longer.
            length: u32::try_from(length).unwrap_or(u32::MAX),
            buffers: Buffers::new(buffers),
            serial: 0,
            sent: false,
            since: Instant::now(),
            received: Ranges::default(),
            failed: None,
            mark: 0,
            outcome: None,
            waker: None,
            abandoned: false,
        }),
        index: None,
        buffers: PhantomData,
    }
}

struct Exchange<'a> {
    link: &'a Arc<Link>,
    /// Before the first poll.
    entry: Option<Entry>,
    /// After it, until the end.
    index: Option<u32>,
    buffers: PhantomData<&'a [IoBuf]>,
}

impl Future for Exchange<'_> {
    type Output = Result<(), IoCause>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut state = this.link.lock();
        if let Some(entry) = this.entry.take() {
            if matches!(state.phase, Phase::Down | Phase::Closed) || std::mem::take(&mut state.owes_failure) {
                return Poll::Ready(Err(state.connection_lost()));
            }
            this.index = Some(state.insert(entry));
            if state.asleep {
                this.link.ring(&mut state);
            }
        }
        let Some(index) = this.index else {
            return Poll::Ready(Err(state.connection_lost()));
        };
        let Some(Some(entry)) = state.requests.get_mut(index as usize) else {
            return Poll::Ready(Err(state.connection_lost()));
        };
        if let Some(outcome) = entry.outcome.take() {
            this.index = None;
            state.remove(index);
            return Poll::Ready(outcome);
        }
        if !entry
            .waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(context.waker()))
        {
            entry.waker = Some(context.waker().clone());
        }
        if !driver::ensure(this.link, &mut state) {
            this.index = None;
            state.abandon(index);
            return Poll::Ready(Err(IoCause::NotOnWorker));
        }
        if !state.queue.is_empty()
            && let Some(writer) = state.writer.take()
        {
            writer.wake();
        }
        Poll::Pending
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        let mut state = self.link.lock();
        if !state.abandon(index) {
            let generation = state.generation;
            self.link.lose(&mut state, generation, super::NbdError::Closed);
        }
    }
}
