//! The thread that speaks with the server of one disk. It is the only one that ever waits for the server; the guest's requests do
//! not pass through it.
//!
//! ```text
//!              connected                        lost                        connected
//!   open() ───► agreed ── Activate ─► serving ───────► waiting ── dial, ... ─► serving, with the record of what was in flight
//!                 ▲                      │                │
//!                 └──── queues stand ◄───┴── Reset ───────┘   (a server that is gone stands still)
//! ```
//!
//! A server that is lost is dialled again and again, at growing intervals, as long as the disk exists.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use block_io::error_chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;
use virtio_core::Activation;
use vmm_sys_util::eventfd::EventFd;

use super::super::client::ClientError;
use super::super::message::{Body, Header, backend_request, request};
use super::super::socket::{Received, SocketError, receive, send};
use super::link::{Link, LinkError, Offer, Record, borrow, unanswered};
use super::{CONFIG_LENGTH, Command, Dial, LinkEvents, Shared};

/// How long after a loss the server is dialled for the first time, and how long between two trials at most.
const FIRST_TRIAL: Duration = Duration::from_millis(20);
const SLOWEST_TRIALS: Duration = Duration::from_secs(1);
/// A connection that lasted so long was a good one.
const GOOD_CONNECTION: Duration = Duration::from_secs(5);
/// How long queues may take to come to rest before somebody is told.
const SLOW_STOP: Duration = Duration::from_secs(10);

/// What the guest's driver has set up.
struct Active {
    activation: Activation,
    /// The server's record of what is in flight; belongs to this life of the device.
    record: Option<Record>,
    /// The server writes to it when a ring is broken.
    errors: EventFd,
    /// Some server has had the queues.
    served: bool,
    /// The device waits for the driver to reset it.
    failed: bool,
}

/// Why a wait ended without what was waited for.
enum Interrupted {
    /// The server is lost.
    Lost(LinkError),
    /// The disk ends.
    Ended,
}

impl From<LinkError> for Interrupted {
    fn from(error: LinkError) -> Self {
        Self::Lost(error)
    }
}

pub(super) struct Thread {
    pub(super) shared: Arc<Shared>,
    pub(super) dial: Dial,
    pub(super) observer: Arc<dyn LinkEvents>,
    pub(super) commands: Receiver<Command>,
    pub(super) bell: EventFd,
    /// The first server's offer: what the guest knows.
    pub(super) first: Offer,
    pub(super) link: Option<Link>,
    active: Option<Active>,
    /// The configuration has changed while no driver was ready, which may have read it before.
    is_untold: bool,
    /// Commands that came while something else was waited for.
    pending: VecDeque<Command>,
    trial: Trial,
}

/// When to dial.
struct Trial {
    next: Instant,
    pause: Duration,
    connected: Instant,
    /// What was said last of why there is no connection.
    reason: String,
}

impl Thread {
    pub(super) fn new(
        shared: Arc<Shared>,
        (dial, observer): (Dial, Arc<dyn LinkEvents>),
        (commands, bell): (Receiver<Command>, EventFd),
        (link, first): (Link, Offer),
    ) -> Self {
        let now = Instant::now();
        shared.set_link(Some(&link));
        Self {
            shared,
            dial,
            observer,
            commands,
            bell,
            first,
            link: Some(link),
            active: None,
            is_untold: false,
            pending: VecDeque::new(),
            trial: Trial {
                next: now,
                pause: FIRST_TRIAL,
                connected: now,
                reason: String::new(),
            },
        }
    }

    /// Serves until the disk ends.
    pub(super) fn run(&mut self) {
        loop {
            while let Some(command) = self.next_command() {
                let handled = match command {
                    Command::Activate(activation) => self.activate(*activation).map_err(Interrupted::Lost),
                    Command::Reset => self.reset(),
                    Command::End => return,
                };
                match handled {
                    Ok(()) => {}
                    Err(Interrupted::Lost(error)) => self.lost(&error),
                    Err(Interrupted::Ended) => return,
                }
            }
            if self.link.is_none() && Instant::now() >= self.trial.next {
                self.try_again();
            }
            if let Err(error) = self.wait() {
                self.lost(&error);
            }
        }
    }

    fn next_command(&mut self) -> Option<Command> {
        if let Some(command) = self.pending.pop_front() {
            return Some(command);
        }
        match self.commands.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Command::End),
        }
    }

    /// Waits for a command, the server, or the time to dial.
    fn wait(&mut self) -> Result<(), LinkError> {
        let until = self.link.is_none().then_some(self.trial.next);
        let errors = self
            .active
            .as_ref()
            .filter(|active| !active.failed)
            .map(|active| &active.errors);
        let channel = self.link.as_ref().and_then(|link| link.channel.as_ref());
        let socket = self.link.as_ref().map(|link| link.client.socket());
        let [rung, broken, told, spoke] = ready(
            [
                Some(borrow(&self.bell)),
                errors.map(borrow),
                channel.map(AsFd::as_fd),
                socket.map(AsFd::as_fd),
            ],
            until,
        );
        if rung {
            drain(&self.bell);
        }
        if broken {
            // Not read: it is the server's as much as ours, and this one will not be asked again.
            self.fail("the server says that a virtqueue is broken");
        }
        if told {
            self.hear_change()?;
        }
        if let (true, Some(link)) = (spoke, &self.link) {
            // Nothing was asked: it goes, or it talks nonsense.
            return Err(match receive(link.client.socket()) {
                Ok(received) => LinkError::Unasked(received.header.request),
                Err(SocketError::Closed) => LinkError::Closed,
                Err(source) => LinkError::Client(ClientError::Socket { request: 0, source }),
            });
        }
        Ok(())
    }

    /// Something came on the server's way back.
    fn hear_change(&mut self) -> Result<(), LinkError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let Some(channel) = &link.channel else {
            return Ok(());
        };
        let Ok(Received { header, .. }) = receive(channel) else {
            // It has nothing to say any more, which is no harm.
            link.channel = None;
            return Ok(());
        };
        let known = header.request == backend_request::CONFIG_CHANGE_MSG;
        if known {
            let config = link.config()?;
            self.set_config(config);
        }
        if let (true, Some(channel)) = (
            header.needs_reply,
            self.link.as_ref().and_then(|link| link.channel.as_ref()),
        ) {
            let header = Header {
                is_reply: true,
                needs_reply: false,
                ..header
            };
            // Who does not read its answers does not get them.
            let _ = send(
                channel,
                header,
                &u64::from(!known).to_le_bytes(),
                &[],
                SendFlags::DONTWAIT,
            );
        }
        Ok(())
    }

    /// The guest's driver is ready.
    fn activate(&mut self, activation: Activation) -> Result<(), LinkError> {
        let errors = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
            .map_err(|error| LinkError::Host("make an eventfd", error))?;
        if std::mem::take(&mut self.is_untold) {
            activation.events.config_changed();
        }
        self.active = Some(Active {
            activation,
            record: None,
            errors,
            served: false,
            failed: false,
        });
        self.start()
    }

    /// Has the server serve what is active, if there is both.
    fn start(&mut self) -> Result<(), LinkError> {
        let (Some(link), Some(active)) = (&self.link, &mut self.active) else {
            return Ok(());
        };
        if active.failed {
            return Ok(());
        }
        let lost = if active.served && active.record.is_none() {
            let queues = active.activation.queues.iter();
            queues
                .map(|queue| u64::from(unanswered(&queue.queue, &active.activation.memory)))
                .sum()
        } else {
            0
        };
        if lost > 0 {
            // Which of them the old server has done, nobody knows.
            self.fail(&format!(
                "the server went away with {lost} requests and has kept no record of them (INFLIGHT_SHMFD)"
            ));
            return Ok(());
        }
        if active.record.is_some() && !link.keeps_record() {
            return Err(LinkError::Lacks(
                "record of what is in flight (INFLIGHT_SHMFD), which its predecessor had",
            ));
        }
        link.prepare(&active.activation, &mut active.record)?;
        let again = std::mem::replace(&mut active.served, true);
        link.start(&active.activation, &active.errors)?;
        if again {
            for queue in &active.activation.queues {
                // Neither side may wait for the other: for requests that were announced to a server that is gone, and for
                // answers that it did not announce. Both eventfds do not block.
                let _ = queue.kick.write(1);
                let _ = queue.call.write(1);
            }
        }
        Ok(())
    }

    /// The guest's driver has broken its rings, or what was in flight is lost: only the guest can help.
    fn fail(&mut self, reason: &str) {
        if let Some(active) = &mut self.active {
            active.failed = true;
            active.activation.events.needs_reset(reason);
        }
    }

    /// Brings the device to rest: afterwards nobody touches guest memory for it.
    fn reset(&mut self) -> Result<(), Interrupted> {
        let active = self.active.take();
        if let Some(active) = active.filter(|active| active.served && self.link.is_some()) {
            match self.stop(&active) {
                Ok(()) => {}
                // Its end of the connection is closed then: it is at rest as well.
                Err(Interrupted::Lost(error)) => self.lost(&error),
                Err(Interrupted::Ended) => return Err(Interrupted::Ended),
            }
        }
        self.shared.resting.store(true, Ordering::Release);
        Ok(())
    }

    fn stop(&mut self, active: &Active) -> Result<(), Interrupted> {
        for queue in &active.activation.queues {
            if let Some(link) = &self.link {
                link.ask_to_stop(queue.index)?;
            }
            self.await_stop(queue.index)?;
        }
        match &self.link {
            Some(link) => Ok(link.forget()?),
            None => Ok(()),
        }
    }

    /// Waits until the server has stopped a queue, for as long as it takes: what it still does, it does in the guest's memory.
    fn await_stop(&mut self, queue: u16) -> Result<(), Interrupted> {
        let mut slow = Some(Instant::now() + SLOW_STOP);
        loop {
            let Some(link) = &self.link else { return Ok(()) };
            let socket = link.client.socket();
            let [answered, rung] = ready([Some(socket.as_fd()), Some(borrow(&self.bell))], slow);
            if answered {
                let request = request::GET_VRING_BASE;
                let answer = link.client.answer(request).map_err(LinkError::from)?;
                let body = Body::new(request, &answer.body);
                body.ring_state()
                    .map_err(|error| LinkError::from(ClientError::from(error)))?;
                return Ok(());
            }
            if rung {
                drain(&self.bell);
                while let Ok(command) = self.commands.try_recv() {
                    if matches!(command, Command::End) {
                        return Err(Interrupted::Ended);
                    }
                    self.pending.push_back(command);
                }
            }
            if slow.is_some_and(|slow| Instant::now() >= slow) {
                slow = None;
                tracing::warn!(
                    disk = self.shared.name,
                    queue,
                    "the disk's server does not come to rest; the guest's reset waits for it"
                );
            }
        }
    }

    fn set_config(&mut self, config: [u8; CONFIG_LENGTH]) {
        if !self.shared.set_config(config) {
            return;
        }
        match &self.active {
            Some(active) => active.activation.events.config_changed(),
            None => self.is_untold = true,
        }
    }

    fn lost(&mut self, error: &LinkError) {
        let reason = error_chain(error);
        let was_connected = self.link.take().is_some();
        self.shared.set_link(None);
        if was_connected {
            if self.trial.connected.elapsed() >= GOOD_CONNECTION {
                self.trial.pause = FIRST_TRIAL;
            }
            self.trial.reason = String::new();
            self.observer.lost(&reason);
        }
        self.put_off(reason);
    }

    fn put_off(&mut self, reason: String) {
        if self.trial.reason != reason {
            tracing::warn!(
                disk = self.shared.name,
                reason,
                "the disk's server is away; the guest's requests wait"
            );
            self.trial.reason = reason;
        }
        self.trial.next = Instant::now() + self.trial.pause;
        self.trial.pause = (self.trial.pause * 2).min(SLOWEST_TRIALS);
    }

    fn try_again(&mut self) {
        match self.connect_again() {
            Ok(()) => {
                self.trial.connected = Instant::now();
                tracing::info!(disk = self.shared.name, "the disk's server is back");
                self.observer.back();
            }
            Err(error) => {
                self.link = None;
                self.shared.set_link(None);
                self.put_off(error_chain(&error));
            }
        }
    }

    fn connect_again(&mut self) -> Result<(), LinkError> {
        let dialled = (self.dial)().map_err(LinkError::Connect)?;
        let (link, offer) = Link::new(dialled, self.shared.kind)?;
        offer.can_follow(&self.first, self.shared.all_queues())?;
        self.shared.set_link(Some(&link));
        self.link = Some(link);
        self.start()?;
        self.set_config(offer.config);
        Ok(())
    }
}

/// Waits until one of `fds` has something to be read, or it is `until`; which have.
fn ready<const N: usize>(fds: [Option<std::os::fd::BorrowedFd<'_>>; N], until: Option<Instant>) -> [bool; N] {
    let timeout = until.map(|until| {
        let rest = until.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: rest.subsec_nanos().into(),
        }
    });
    let mut polled: Vec<_> = fds
        .iter()
        .flatten()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    // Interrupted is as good as nothing.
    let _ = poll(&mut polled, timeout.as_ref());
    let mut answers = polled.iter().map(|polled| !polled.revents().is_empty());
    fds.map(|fd| fd.is_some() && answers.next().unwrap_or(false))
}

fn drain(bell: &EventFd) {
    // It does not block.
    let _ = bell.read();
}
