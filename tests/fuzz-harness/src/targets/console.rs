//! The virtio console, with a client at its socket: what the guest sends arrives, what is typed arrives, in order and once.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use arbitrary::Unstructured;
use event_manager::{EventManager, SubscriberOps};
use virtio_core::{GuestMemory, VirtioDevice, feature};
use vmm::config::ConsoleSpec;
use vmm::console::{Console, ConsoleOptions};
use vmm::devices::event_loop::Subscriber;
use vmm::devices::virtio_console::{ScreenSize, VirtioConsole};

use crate::device::{Account, Events, activate, reset};
use crate::memory::guest_memory;
use crate::patience::wait_until;
use crate::ring::{Arena, MAX_SIZE, Ring};

struct Bench {
    memory: GuestMemory,
    event_loop: EventManager<Subscriber>,
    device: VirtioConsole,
    size: Arc<ScreenSize>,
    client: UnixStream,
    /// What the guest sent and the client has yet to read.
    sent: VecDeque<u8>,
    /// What the client typed and the guest has yet to get.
    typed: VecDeque<u8>,
    _console: Console,
}

struct Queue {
    ring: Ring,
    account: Account,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut bench = Bench::new();
    while !input.is_empty() {
        if !bench.live(input)? {
            break;
        }
    }
    reset(&mut bench.device, || {});
    Ok(())
}

/// A socket of this thread.
fn socket() -> PathBuf {
    // SAFETY: no arguments, no memory.
    let thread = unsafe { libc::gettid() };
    std::env::temp_dir().join(format!("smsvmm-fuzz-{thread}.sock"))
}

impl Bench {
    fn new() -> Self {
        let mut event_loop = EventManager::<Subscriber>::new().expect("an epoll instance");
        let options = ConsoleOptions {
            name: "fuzz".into(),
            escape: None,
            commands: Arc::new(|_| {}),
        };
        let mut console = Console::open(&ConsoleSpec::Socket(socket()), options).expect("a console");
        let subscriber = console.take_subscriber().expect("it is new");
        event_loop.add_subscriber(subscriber);
        let client = UnixStream::connect(socket()).expect("the console listens");
        client.set_nonblocking(true).expect("a socket");
        for _ in 0..3 {
            event_loop.run_with_timeout(0).expect("an event loop");
        }
        let size = Arc::new(ScreenSize::new(80, 25));
        let device = VirtioConsole::new(event_loop.remote_endpoint(), console.handle());
        Self {
            memory: guest_memory(),
            event_loop,
            device: device.with_size(size.clone()),
            size,
            client,
            sent: VecDeque::new(),
            typed: VecDeque::new(),
            _console: console,
        }
    }

    fn turn(&mut self) {
        for _ in 0..4 {
            self.event_loop.run_with_timeout(0).expect("an event loop");
        }
    }

    /// One life of the device. Whether it was a decent one: after another, nobody knows what was sent.
    fn live(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
        let event_index = input.arbitrary()?;
        let features = feature::RING_INDIRECT_DESC | if event_index { feature::RING_EVENT_IDX } else { 0 };
        let size = 1 << input.int_in_range(1..=MAX_SIZE.ilog2())?;
        let [mut receive, mut send] = [0, 1].map(|index| Queue {
            ring: Ring::new(&self.memory, index, size, event_index),
            account: Account::default(),
        });
        let queues = vec![receive.ring.active(0), send.ring.active(1)];
        let (events, active) = activate(&mut self.device, &self.memory, features, queues);
        assert!(active);
        let mut arena = Arena::new();
        for _ in 0..input.int_in_range(1..=8)? {
            self.config_access(input)?;
            self.offer(input, &mut arena, &mut receive)?;
            self.send(input, &mut arena, &mut send)?;
            self.type_some(input)?;
            if input.ratio(1, 16)? {
                let queue = if input.arbitrary()? {
                    &mut receive
                } else {
                    &mut send
                };
                queue.ring.spoil(input)?;
                queue.ring.publish();
                queue.ring.ring_doorbell();
                for _ in 0..8 {
                    self.turn();
                }
                return Ok(self.end_badly());
            }
            self.settle(&events, &mut receive, &mut send);
            if receive.account.is_settled() {
                receive.ring.recycle();
                arena = Arena::new();
            }
        }
        reset(&mut self.device, || {});
        Ok(true)
    }

    fn end_badly(&mut self) -> bool {
        reset(&mut self.device, || {});
        self.turn();
        false
    }

    fn config_access(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if input.ratio(1, 8)? {
            self.size.set(input.arbitrary()?, input.arbitrary()?);
        }
        let mut data = vec![0; input.int_in_range(1..=8)?];
        input.fill_buffer(&mut data)?;
        let offset = input.int_in_range(0..=16)?;
        if input.ratio(1, 4)? {
            self.device.write_config(offset, &data);
            // Emergency write: a character past the queues.
            self.sent.extend((offset == 8).then_some(data[0]));
        }
        self.device.read_config(offset, &mut data);
        Ok(())
    }

    /// Gives the device buffers for input.
    fn offer(
        &mut self,
        input: &mut Unstructured<'_>,
        arena: &mut Arena,
        queue: &mut Queue,
    ) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=3)? {
            let mut pieces = Vec::new();
            let length = input.int_in_range(1..=200)?;
            arena.cut(input, length, true, &mut pieces)?;
            let indirect = input.ratio(1, 4)?;
            if let Some(head) = queue.ring.store_chain(arena, &pieces, indirect) {
                queue.ring.make_available(head);
                queue.account.lend(head, pieces);
            }
        }
        queue.ring.publish();
        queue.ring.ring_doorbell();
        Ok(())
    }

    /// Sends text; its end is a line end, for which the console does not wait.
    fn send(
        &mut self,
        input: &mut Unstructured<'_>,
        arena: &mut Arena,
        queue: &mut Queue,
    ) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=3)? {
            let mut text = vec![b'x'; input.int_in_range(1..=600)?];
            *text.first_mut().expect("not empty") = input.arbitrary()?;
            *text.last_mut().expect("not empty") = b'\n';
            let mut pieces = Vec::new();
            arena.cut(input, text.len(), false, &mut pieces)?;
            text.truncate(pieces.iter().map(|piece| piece.length as usize).sum());
            let indirect = input.ratio(1, 4)?;
            if let Some(head) = queue.ring.store_chain(arena, &pieces, indirect) {
                queue.ring.fill(&pieces, &text);
                queue.ring.make_available(head);
                queue.account.lend(head, pieces);
                self.sent.extend(&text);
            }
        }
        queue
            .ring
            .ask_for_interrupt(input.int_in_range(0..=1)?, input.arbitrary()?);
        queue.ring.publish();
        queue.ring.ring_doorbell();
        Ok(())
    }

    fn type_some(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        if input.arbitrary()? && self.typed.len() < 1000 {
            let mut text = vec![0; input.int_in_range(1..=100)?];
            text.iter_mut().zip(0_u8..).for_each(|(byte, at)| *byte = at);
            text[0] = input.arbitrary()?;
            self.client.write_all(&text).expect("the console takes it");
            self.typed.extend(&text);
        }
        Ok(())
    }

    /// Waits until all output was given back, reads it, and looks at the input that came meanwhile.
    fn settle(&mut self, events: &Events, receive: &mut Queue, send: &mut Queue) {
        wait_until("the console to take its output", || {
            self.turn();
            self.read();
            send.account.settle(&mut send.ring);
            send.account.is_settled()
        });
        assert_eq!(events.reason(), None);
        send.ring.recycle();
        for returned in receive.account.settle(&mut receive.ring) {
            for byte in returned.bytes(&self.memory) {
                assert_eq!(Some(byte), self.typed.pop_front(), "what came was not typed");
            }
        }
    }

    fn read(&mut self) {
        let mut text = [0; 4096];
        loop {
            match self.client.read(&mut text) {
                Ok(0) => panic!("the console hung up"),
                Ok(count) => {
                    for byte in &text[..count] {
                        assert_eq!(self.sent.pop_front(), Some(*byte), "what was shown was not sent");
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}
