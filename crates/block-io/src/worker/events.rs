//! Eventfds: waiting for one as a task, and writing one without a system call of its own.

use std::future::poll_fn;
use std::io;
use std::marker::PhantomData;
#[cfg(feature = "sim")]
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, Waker};

use vmm_sys_util::eventfd::EventFd;

use super::engine::Engine;
use super::local::{keep_waker, with_local};

#[derive(Default)]
enum Slot {
    #[default]
    Free,
    Watched {
        armed: bool,
        fired: bool,
        failed: i32,
        waker: Option<Waker>,
    },
    /// Nobody waits any more, but the engine will report once more.
    Closing,
}

/// The watched eventfds of a worker.
#[derive(Default)]
pub(super) struct Events {
    slots: Vec<Slot>,
}

impl Events {
    pub(super) fn insert(&mut self) -> u32 {
        let slot = Slot::Watched {
            armed: false,
            fired: false,
            failed: 0,
            waker: None,
        };
        let index = match self.slots.iter().position(|slot| matches!(slot, Slot::Free)) {
            Some(index) => {
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        // There are as many as open files, which are numbered by an int.
        u32::try_from(index).unwrap_or_else(|_| std::process::abort())
    }

    pub(super) fn arm(&mut self, index: u32, event: &EventFd, engine: &Engine) {
        if let Some(Slot::Watched { armed, .. }) = self.slots.get_mut(index as usize) {
            *armed = true;
            engine.watch(index, event);
        }
    }

    pub(super) fn is_armed(&self, index: u32) -> bool {
        matches!(
            self.slots.get(index as usize),
            Some(Slot::Watched { armed: true, .. })
        )
    }

    /// Whether `event` was written since this was called last.
    fn take_fired(&mut self, index: u32, event: &EventFd) -> bool {
        match self.slots.get_mut(index as usize) {
            Some(Slot::Watched { fired, armed, .. }) if *fired => {
                *fired = false;
                if !*armed && let Err(error) = event.read() {
                    // A single shot, which would fire again at once. It was readable, so this did not block.
                    tracing::error!(%error, "cannot read an eventfd");
                }
                true
            }
            _ => false,
        }
    }

    /// Forgets that `event` was written and keeps the watch armed; for a watch that no task waits for.
    pub(super) fn renew(&mut self, index: u32, event: &EventFd, engine: &Engine) {
        self.take_fired(index, event);
        if !self.is_armed(index) {
            self.arm(index, event, engine);
        }
    }

    /// Notes that a watched eventfd was written; the caller wakes its task.
    pub(super) fn fire(
        &mut self,
        index: u32,
        result: i32,
        still_armed: bool,
        engine: &Engine,
    ) -> Option<Waker> {
        let slot = self.slots.get_mut(index as usize)?;
        match slot {
            Slot::Watched {
                armed,
                fired,
                failed,
                waker,
            } => {
                *armed = still_armed;
                if result == -libc::EINVAL && engine.without_multishot() {
                    // A kernel before 5.13: whoever waits arms it again, as a single shot.
                    tracing::debug!("the kernel has no multishot polls");
                } else if result < 0 {
                    *failed = result;
                } else {
                    *fired = true;
                }
                waker.take()
            }
            Slot::Closing if !still_armed => {
                *slot = Slot::Free;
                None
            }
            Slot::Closing | Slot::Free => None,
        }
    }
}

/// An eventfd that a task waits for. Belongs to the worker on which it was made.
#[derive(Debug)]
pub struct EventWatch {
    event: EventFd,
    index: u32,
    not_send: PhantomData<*const ()>,
}

impl EventWatch {
    /// Watches `event`, which nobody else reads.
    ///
    /// # Errors
    /// `NotConnected` if this thread is not a worker.
    pub fn new(event: EventFd) -> io::Result<Self> {
        let index = with_local(|local| local.events.borrow_mut().insert());
        #[cfg(feature = "sim")]
        let index = index.or_else(|| crate::sim::watch::is_simulated().then_some(u32::MAX));
        let index = index.ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self {
            event,
            index,
            not_send: PhantomData,
        })
    }

    /// Waits until the eventfd was written since this was called last, at least once; before the first call counts too.
    /// May return without a reason now and then.
    ///
    /// # Errors
    /// The kernel cannot watch it.
    pub async fn wait(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll_wait(context)).await
    }

    /// [`Self::wait`] for futures that wait for other things, too.
    ///
    /// # Errors
    /// The kernel cannot watch it.
    pub fn poll_wait(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = with_local(|local| {
            let mut events = local.events.borrow_mut();
            if events.take_fired(self.index, &self.event) {
                return Poll::Ready(Ok(()));
            }
            let Some(Slot::Watched {
                armed, failed, waker, ..
            }) = events.slots.get_mut(self.index as usize)
            else {
                return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
            };
            if *failed < 0 {
                return Poll::Ready(Err(io::Error::from_raw_os_error(-std::mem::take(failed))));
            }
            keep_waker(waker, context.waker());
            if !*armed {
                events.arm(self.index, &self.event, &local.engine);
            }
            Poll::Pending
        });
        #[cfg(feature = "sim")]
        let outcome = outcome.or_else(|| self.poll_simulated(context));
        outcome.unwrap_or_else(|| Poll::Ready(Err(io::ErrorKind::NotConnected.into())))
    }

    #[cfg(feature = "sim")]
    fn poll_simulated(&self, context: &Context<'_>) -> Option<Poll<io::Result<()>>> {
        use crate::sim::watch;
        watch::is_simulated().then(|| {
            if watch::readable(self.event.as_raw_fd(), context.waker()) {
                Poll::Ready(self.event.read().map(drop))
            } else {
                Poll::Pending
            }
        })
    }
}

impl Drop for EventWatch {
    fn drop(&mut self) {
        #[cfg(feature = "sim")]
        crate::sim::watch::forget(self.event.as_raw_fd());
        with_local(|local| {
            let armed = local.events.borrow().is_armed(self.index);
            let follows = armed && local.engine.unwatch(self.index, &self.event);
            let slot = if follows { Slot::Closing } else { Slot::Free };
            local.events.borrow_mut().slots[self.index as usize] = slot;
            // The ring must have seen the watch and its end before the descriptor's number can mean another file.
            local.engine.enter(false);
        });
    }
}

/// An eventfd that tasks write. Belongs to the worker on which it is used.
#[derive(Debug)]
pub struct EventSignal {
    event: EventFd,
    not_send: PhantomData<*const ()>,
}

impl EventSignal {
    /// Will write `event`.
    pub fn new(event: EventFd) -> Self {
        Self {
            event,
            not_send: PhantomData,
        }
    }

    /// Adds one to the eventfd, at the latest when the worker's tasks have all run: the write travels with the next batch of
    /// requests, without a system call of its own.
    ///
    /// # Errors
    /// The eventfd cannot be written, found at once.
    pub fn signal(&self) -> io::Result<()> {
        with_local(|local| local.engine.signal(&self.event)).unwrap_or_else(|| self.event.write(1))
    }
}

impl Drop for EventSignal {
    fn drop(&mut self) {
        // What is prepared must be done before the descriptor's number can mean another file.
        with_local(|local| local.engine.enter(false));
    }
}
