//! The main loop's part of a console: reads what is typed, writes what did not fit, serves clients as they come and go.
//!
//! Every event ends in [`Service::settle`], which looks at the whole state and makes what is polled agree with it. A
//! descriptor is polled only while there is something to do with it, so nothing wakes the process in vain: one that hangs
//! up would do so for ever.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::escape::{ConsoleCommand, EscapeAction};
use super::handle::Shared;
use super::listener::Listener;
use super::peer::{Flushed, Peer, WriteMode};
use super::pty::PtyWatch;
use super::source::{Read, ReadMode, Source, Watch};
use super::{CLIENTS_MAX, CommandHandler, INPUT_LIMIT, terminal};

/// What an event is about. The numbers of sources and receivers come from [`Service::next_id`].
const DOORBELL: u32 = 0;
const LISTENER: u32 = 1;
const PTY_WATCH: u32 = 2;
const FIRST_ID: u32 = 16;

/// So much is read in one go.
const READ_SIZE: usize = 16 << 10;

/// A console on the main loop.
pub(super) struct Service {
    shared: Arc<Shared>,
    commands: CommandHandler,
    sources: Vec<Source>,
    /// Receivers whose descriptor is polled for room.
    waiting: Vec<(u32, Arc<OwnedFd>)>,
    pub(super) listener: Option<Listener>,
    pub(super) pty: Option<PtyWatch>,
    next_id: u32,
    buffer: Vec<u8>,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>, commands: CommandHandler) -> Self {
        Self {
            shared,
            commands,
            sources: Vec::new(),
            waiting: Vec::new(),
            listener: None,
            pty: None,
            next_id: FIRST_ID,
            buffer: Vec::new(),
        }
    }

    /// A number for something that is polled.
    pub(super) fn new_id(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.checked_add(1).unwrap_or(FIRST_ID);
        id
    }

    /// Adds a source of input. It is polled from the next [`Self::settle`] on.
    pub(super) fn add_source(&mut self, source: Source) {
        self.sources.push(source);
    }

    /// Adds a receiver, and shows it what was written before.
    pub(super) fn add_peer(&mut self, id: u32, fd: Arc<OwnedFd>, mode: WriteMode) {
        let mut output = self.shared.output();
        let mut peer = Peer::new(id, fd, mode);
        if let Some(history) = &output.history {
            peer.enqueue(&history.replay());
        }
        output.peers.push(peer);
    }

    fn add_client(&mut self, stream: OwnedFd, ops: &mut EventOps<'_>) {
        // Two descriptors, because reading and writing are polled on their own.
        let writer = match stream.try_clone() {
            Ok(writer) => writer,
            Err(error) => {
                tracing::warn!(console = self.shared.name, %error, "cannot serve a client");
                return;
            }
        };
        if let Some(oldest) = self.sources.first().map(|source| source.id)
            && self.sources.len() >= CLIENTS_MAX
        {
            tracing::info!(
                console = self.shared.name,
                "too many clients, the oldest has to go"
            );
            self.remove(oldest, ops);
        }
        let id = self.new_id();
        self.add_source(Source::new(id, stream, ReadMode::Socket));
        self.add_peer(id, Arc::new(writer), WriteMode::Socket);
        tracing::debug!(console = self.shared.name, client = id, "a client came");
    }

    /// Forgets the source and the receiver `id`.
    fn remove(&mut self, id: u32, ops: &mut EventOps<'_>) {
        self.remove_source(id, ops);
        self.remove_peer(id, ops);
    }

    fn remove_source(&mut self, id: u32, ops: &mut EventOps<'_>) {
        if let Some(at) = self.sources.iter().position(|source| source.id == id) {
            let mut source = self.sources.remove(at);
            watch_source(&mut source, None, ops);
        }
    }

    pub(super) fn remove_peer(&mut self, id: u32, ops: &mut EventOps<'_>) {
        if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
            let (_, fd) = self.waiting.remove(at);
            forget(&fd, ops);
        }
        self.shared.output().peers.retain(|peer| peer.id != id);
    }

    /// Whether `id` receives output.
    fn has_peer(&self, id: u32) -> bool {
        self.shared.output().peers.iter().any(|peer| peer.id == id)
    }

    /// Brings everything in order after an event.
    fn settle(&mut self, ops: &mut EventOps<'_>) {
        let now = Instant::now();
        let wake_for_output = self.settle_output(now, ops);
        self.settle_input(ops);
        let wake_for_clients = self
            .listener
            .as_mut()
            .and_then(|listener| listener.settle(LISTENER, now, ops));
        if let (Some(at), Some(doorbell)) = (
            wake_for_output.into_iter().chain(wake_for_clients).min(),
            &self.shared.doorbell,
        ) {
            doorbell.ring_at_latest(at.saturating_duration_since(now));
        }
    }

    /// Writes what can be written. Returns when a receiver that makes no progress is to be looked at again.
    fn settle_output(&mut self, now: Instant, ops: &mut EventOps<'_>) -> Option<Instant> {
        let mut output = self.shared.output();
        let mut gone = Vec::new();
        let mut wake = None;
        for peer in &mut output.peers {
            if let Flushed::Gone(errno) = peer.flush(true) {
                gone.push((peer.id, errno));
                continue;
            }
            let was_stuck = peer.stuck;
            wake = wake.into_iter().chain(peer.watch_progress(now)).min();
            if peer.stuck && !was_stuck {
                tracing::warn!(
                    console = self.shared.name,
                    "nobody reads the output; it is dropped from 1 MiB on"
                );
            }
            let dropped = if peer.blocked { 0 } else { peer.take_dropped() };
            if dropped > 0 {
                tracing::warn!(console = self.shared.name, dropped, "bytes of output were lost");
            }
        }
        let polled: Vec<_> = output
            .peers
            .iter()
            .filter(|peer| peer.blocked)
            .map(|peer| (peer.id, peer.fd.clone()))
            .collect();
        drop(output);

        for (id, errno) in gone {
            tracing::debug!(console = self.shared.name, client = id, %errno, "a receiver is gone");
            if self.listener.is_some() {
                self.remove(id, ops);
            } else {
                self.remove_peer(id, ops);
            }
        }
        self.poll_for_room(polled, ops);

        // After receivers have gone, too.
        let resumes = self.shared.output().ends_congestion();
        if let Some(sink) = self.shared.sink().filter(|_| resumes) {
            sink.output_ready();
        }
        wake
    }

    /// Polls exactly `polled` for room.
    fn poll_for_room(&mut self, polled: Vec<(u32, Arc<OwnedFd>)>, ops: &mut EventOps<'_>) {
        let (stay, leave): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(id, _)| polled.iter().any(|(blocked, _)| blocked == id));
        self.waiting = stay;
        for (_, fd) in leave {
            forget(&fd, ops);
        }
        for (id, fd) in polled {
            if self.waiting.iter().any(|(waiting, _)| *waiting == id) || !self.has_peer(id) {
                continue;
            }
            match ops.add(Events::with_data(&*fd, id, EventSet::OUT)) {
                Ok(()) => self.waiting.push((id, fd)),
                Err(error) => {
                    tracing::error!(console = self.shared.name, %error, "cannot wait for a receiver");
                    self.remove_peer(id, ops);
                }
            }
        }
    }

    /// Polls the sources if there is room for input, and reads those that cannot be polled.
    fn settle_input(&mut self, ops: &mut EventOps<'_>) {
        let mut room = self.shared.input_room();
        while room > 0
            && let Some(id) = self
                .sources
                .iter()
                .find(|source| source.watch == Watch::AlwaysReady && !source.ended)
                .map(|source| source.id)
        {
            self.read(id, ops);
            room = self.shared.input_room();
        }
        // What was written to a terminal by somebody who has left.
        if let Some(id) = self
            .pty
            .as_ref()
            .filter(|pty| !pty.has_client())
            .map(|pty| pty.source)
        {
            while let Read::Some(_) = self.read(id, ops) {}
            room = self.shared.input_room();
        }
        for source in &mut self.sources {
            let is_pty = self.pty.as_ref().is_some_and(|pty| pty.source == source.id);
            let present = self.pty.as_ref().is_none_or(|pty| !is_pty || pty.has_client());
            let events = match (source.ended, source.mode) {
                // Hang-ups are always reported.
                (true, ReadMode::Socket) => Some(EventSet::empty()),
                (true, ReadMode::Read) => None,
                (false, _) => (room > 0 && present).then_some(EventSet::IN),
            };
            watch_source(source, events, ops);
        }
        // What turns out to be unpollable is read when its turn comes, which is now.
        if room > 0
            && self
                .sources
                .iter()
                .any(|source| source.watch == Watch::AlwaysReady && !source.ended)
            && let Some(doorbell) = &self.shared.doorbell
        {
            doorbell.ring_now();
        }
    }

    /// Reads once from source `id`.
    pub(super) fn read(&mut self, id: u32, ops: &mut EventOps<'_>) -> Read {
        let room = self.shared.input_room().min(READ_SIZE).min(INPUT_LIMIT);
        let Some(at) = self.sources.iter().position(|source| source.id == id) else {
            return Read::End;
        };
        if room == 0 || self.sources[at].ended {
            return Read::Nothing;
        }
        self.buffer.resize(room, 0);
        let read = self.sources[at].read(&mut self.buffer);
        match read {
            Read::Some(count) => self.typed(at, count, ops),
            Read::Nothing => {}
            Read::End if self.pty.is_some() => {}
            Read::End => self.end_of_input(at, ops),
        }
        self.buffer.clear();
        self.buffer.shrink_to(0);
        read
    }

    /// Source `at` gives nothing more. Its receiver may still listen.
    fn end_of_input(&mut self, at: usize, ops: &mut EventOps<'_>) {
        let source = &mut self.sources[at];
        tracing::debug!(console = self.shared.name, "end of input");
        source.ended = true;
        if source.mode == ReadMode::Read {
            let id = source.id;
            self.remove_source(id, ops);
        }
    }

    /// Passes on the first `count` bytes of the buffer, which source `at` gave.
    fn typed(&mut self, at: usize, count: usize, ops: &mut EventOps<'_>) {
        let source = &mut self.sources[at];
        let typed = &self.buffer[..count];
        let Some(filter) = &mut source.escape else {
            self.shared.typed(typed);
            return;
        };
        let mut guest = Vec::new();
        let actions = filter.feed(typed, &mut guest);
        let help = if actions.contains(&EscapeAction::Help) {
            filter.help()
        } else {
            String::new()
        };
        let id = source.id;
        self.shared.typed(&guest);
        if let Some(peer) = self.shared.output().peers.iter_mut().find(|peer| peer.id == id) {
            peer.enqueue(help.as_bytes());
        }
        for action in actions {
            if let EscapeAction::Command(command) = action {
                if command == ConsoleCommand::Detach {
                    terminal::restore();
                    self.remove(id, ops);
                }
                (self.commands)(command);
            }
        }
    }

    fn accept_clients(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = &mut self.listener else {
            return;
        };
        let accepted = listener.accept(&self.shared.name);
        for stream in accepted {
            self.add_client(stream, ops);
        }
    }

    /// Somebody opened or closed the pseudo-terminal.
    fn pty_changed(&mut self, ops: &mut EventOps<'_>) {
        let Some(mut pty) = self.pty.take() else { return };
        let was_there = pty.has_client();
        pty.look();
        let (id, is_there) = (pty.source, pty.has_client());
        self.pty = Some(pty);
        let Some(pty) = &self.pty else { return };
        if is_there && !was_there {
            tracing::debug!(console = self.shared.name, "a client opened the terminal");
            let writer = pty.writer.clone();
            self.add_peer(id, writer, WriteMode::NonBlocking);
        } else if was_there && !is_there {
            tracing::debug!(console = self.shared.name, "the last client closed the terminal");
            pty.discard_unread();
            self.remove_peer(id, ops);
        }
    }
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let name = self.shared.name.clone();
        let mut watch = |fd: RawFd, data| {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                tracing::error!(console = name, %error, "cannot serve the console");
            }
        };
        if let Some(doorbell) = &self.shared.doorbell {
            watch(doorbell.as_raw_fd(), DOORBELL);
        }
        if let Some(watched) = self.pty.as_ref().and_then(PtyWatch::poll_fd) {
            watch(watched, PTY_WATCH);
        }
        self.pty_changed(ops);
        self.settle(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let set = events.event_set();
        match events.data() {
            DOORBELL => {
                if let Some(doorbell) = &self.shared.doorbell {
                    doorbell.answer();
                }
            }
            LISTENER => self.accept_clients(ops),
            PTY_WATCH => self.pty_changed(ops),
            _ if self.pty.is_some() && set.contains(EventSet::HANG_UP) => self.pty_changed(ops),
            // The receiver has room; it is flushed below.
            id if self
                .waiting
                .iter()
                .any(|(waiting, fd)| *waiting == id && fd.as_raw_fd() == events.fd()) => {}
            id => {
                let ended = self.sources.iter().any(|source| source.id == id && source.ended);
                if ended && set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    tracing::debug!(console = self.shared.name, client = id, "a client left");
                    self.remove(id, ops);
                } else {
                    self.read(id, ops);
                }
            }
        }
        self.settle(ops);
    }
}

/// Makes the main loop poll `source` for `events`, or not at all.
fn watch_source(source: &mut Source, events: Option<EventSet>, ops: &mut EventOps<'_>) {
    match (source.watch, events) {
        (Watch::No, None) | (Watch::AlwaysReady, _) => {}
        (Watch::No, Some(events)) => {
            source.watch = match ops.add(Events::with_data(&source.fd, source.id, events)) {
                Ok(()) => Watch::Polled(events),
                // EPERM: files of this kind cannot be polled, and never block.
                Err(_) => Watch::AlwaysReady,
            };
        }
        (Watch::Polled(present), Some(events)) if present == events => {}
        (Watch::Polled(_), Some(events)) => {
            match ops.modify(Events::with_data(&source.fd, source.id, events)) {
                Ok(()) => source.watch = Watch::Polled(events),
                Err(error) => tracing::error!(%error, "cannot poll a console's input"),
            }
        }
        (Watch::Polled(_), None) => {
            forget(&source.fd, ops);
            source.watch = Watch::No;
        }
    }
}

/// The main loop shall not poll `fd` any more.
fn forget(fd: &OwnedFd, ops: &mut EventOps<'_>) {
    if let Err(error) = ops.remove(Events::empty(fd)) {
        tracing::debug!(%error, "a descriptor of a console was not polled");
    }
}
