//! The event queue: what a driver is told unasked (virtio 1.2 §5.6.6.3).
//!
//! The driver keeps empty buffers in the queue. Events that come when there is none wait here; when too many wait, the driver
//! is told that it missed some and looks for itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use block_io::list;

use crate::chain::Buffers;
use crate::queue::{ServerLink, Service};

/// Bytes of an event.
pub(super) const EVENT_LENGTH: u32 = 16;
/// Events that wait for a buffer at most.
const MAX_WAITING: usize = 64;

const NO_EVENT: u32 = 0;
const TRANSPORT_RESET: u32 = 1;
const PARAMETER_CHANGE: u32 = 3;
const EVENTS_MISSED: u32 = 1 << 31;
const RESET_RESCAN: u32 = 1;
const RESET_REMOVED: u32 = 2;

/// Something that a driver is told of a logical unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// It is new.
    Added,
    /// It has gone.
    Removed,
    /// This additional sense code, with its qualifier, says what has changed.
    Changed(u8, u8),
}

impl Event {
    fn encode(self, address: [u8; 8], missed: bool) -> [u8; EVENT_LENGTH as usize] {
        let (event, reason) = match self {
            Self::Added => (TRANSPORT_RESET, RESET_RESCAN),
            Self::Removed => (TRANSPORT_RESET, RESET_REMOVED),
            Self::Changed(code, qualifier) => (PARAMETER_CHANGE, u32::from(code) | u32::from(qualifier) << 8),
        };
        layout(event | if missed { EVENTS_MISSED } else { 0 }, address, reason)
    }
}

fn layout(event: u32, address: [u8; 8], reason: u32) -> [u8; EVENT_LENGTH as usize] {
    let mut bytes = [0; EVENT_LENGTH as usize];
    bytes[..4].copy_from_slice(&event.to_le_bytes());
    bytes[4..12].copy_from_slice(&address);
    bytes[12..].copy_from_slice(&reason.to_le_bytes());
    bytes
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<([u8; 8], Event)>,
    missed: bool,
}

/// Events on their way to the driver; for all threads.
#[derive(Debug, Default)]
pub(super) struct Events(Mutex<Waiting>);

impl Events {
    /// Adds one.
    pub(super) fn push(&self, address: [u8; 8], event: Event) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.events.len() == MAX_WAITING {
            waiting.events.pop_front();
            waiting.missed = true;
        }
        waiting.events.push_back((address, event));
    }

    /// Forgets all: there is no driver any more.
    pub(super) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Waiting::default();
    }

    fn is_empty(&self) -> bool {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.events.is_empty() && !waiting.missed
    }

    fn take(&self) -> Option<[u8; EVENT_LENGTH as usize]> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let missed = std::mem::take(&mut waiting.missed);
        match waiting.events.pop_front() {
            Some((address, event)) => Some(event.encode(address, missed)),
            None if missed => Some(layout(NO_EVENT | EVENTS_MISSED, [0; 8], 0)),
            None => None,
        }
    }
}

/// The buffers of the event queue: each waits for its event.
pub(super) struct EventService {
    pub(super) events: Arc<Events>,
    pub(super) waiting: RefCell<Vec<Waker>>,
}

impl EventService {
    pub(super) fn new(events: Arc<Events>) -> Self {
        Self {
            events,
            waiting: RefCell::default(),
        }
    }
}

impl Service for EventService {
    async fn serve(&self, server: &ServerLink, buffers: &mut Buffers, _: u64) -> Result<Option<u32>, String> {
        if buffers.writable_length() < EVENT_LENGTH {
            return Err(format!("a buffer for events has at least {EVENT_LENGTH} bytes"));
        }
        let event = poll_fn(|context| match self.events.take() {
            Some(event) => Poll::Ready(Some(event)),
            None if server.stopping().is_some() => Poll::Ready(None),
            None => {
                self.waiting.borrow_mut().push(context.waker().clone());
                Poll::Pending
            }
        })
        .await;
        let Some(event) = event else { return Ok(None) };
        list::scatter(buffers.writable(), 0, &event);
        Ok(Some(EVENT_LENGTH))
    }

    fn can_release(&self, _: &ServerLink) -> bool {
        !self.waiting.borrow().is_empty() && !self.events.is_empty()
    }

    fn release(&self, _: &ServerLink) {
        // Those that find nothing wait again.
        let waiting = self.waiting.take();
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_layout_of_the_specification_and_what_is_missed_is_told() {
        let events = Events::default();
        let address = [1, 0, 0x40, 5, 0, 0, 0, 0];
        assert_eq!(events.take(), None);
        events.push(address, Event::Changed(0x2a, 0x09));
        let event = events.take().unwrap();
        assert_eq!(event, [3, 0, 0, 0, 1, 0, 0x40, 5, 0, 0, 0, 0, 0x2a, 9, 0, 0]);
        for _ in 0..=MAX_WAITING {
            events.push(address, Event::Removed);
        }
        let first = events.take().unwrap();
        assert_eq!(first[..4], [1, 0, 0, 0x80]);
        assert_eq!(first[12..], [2, 0, 0, 0]);
        assert_eq!(events.take().unwrap()[..4], [1, 0, 0, 0]);
        events.clear();
        assert!(events.is_empty());
    }
}
