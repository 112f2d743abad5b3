//! How a device gets a place on the VMM's event loop.
//!
//! The loop is an `event_manager::EventManager` on the VMM's main thread; devices are activated and reset on vCPU threads.
//! A `Registration` brings a subscriber to the loop and takes it away again, and never waits for it: a vCPU must not hang
//! because the loop is busy, and the loop itself may be the one who resets a device.
//!
//! A subscriber owns the file descriptors that it registers, and it is dropped by the loop after they left the loop's epoll
//! set. So a descriptor's number cannot be used again while the loop still knows it.

use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// What lives on the event loop.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// A handle of the event loop, to be had from `EventManager::remote_endpoint`.
pub type EventLoop = RemoteEndpoint<Subscriber>;

/// A subscriber's stay on the loop; ends when dropped.
pub(crate) struct Registration {
    event_loop: EventLoop,
    id: Arc<Mutex<Option<SubscriberId>>>,
}

impl Registration {
    /// Sends `subscriber` to the loop.
    pub(crate) fn new(event_loop: &EventLoop, subscriber: Subscriber) -> event_manager::Result<Self> {
        let id = Arc::new(Mutex::new(None));
        let assigned = Arc::clone(&id);
        event_loop.fire(move |operations| {
            let id = operations.add_subscriber(subscriber);
            *assigned.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        })?;
        Ok(Self {
            event_loop: event_loop.clone(),
            id,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Messages to the loop keep their order: when this one runs, the subscriber has its number.
        let id = Arc::clone(&self.id);
        let sent = self.event_loop.fire(move |operations| {
            if let Some(id) = id.lock().unwrap_or_else(PoisonError::into_inner).take() {
                drop(operations.remove_subscriber(id));
            }
        });
        if let Err(error) = sent {
            tracing::debug!(%error, "the event loop is gone, a device leaves it no more");
        }
    }
}
