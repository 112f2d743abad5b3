//! virtio-net on a stream socket, with a thread of its own: packets arrive whole, in order, and in both directions; a hostile
//! guest or peer ends its card or its link, and no more.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use arbitrary::Unstructured;
use virtio_core::{GuestMemory, VirtioDevice, feature};
use vmm::devices::net::{Net, NetBackend, NetOptions};

use crate::device::{Account, Events, Returned, activate, reset};
use crate::memory::{Watch, guest_memory};
use crate::patience::wait_until;
use crate::ring::{Arena, MAX_SIZE, Piece, Ring};

const MERGEABLE: u64 = 1 << 15;
const CONTROL: u64 = 1 << 17;
/// virtio-net header (virtio 1.2 §5.1.6).
const HEADER: usize = 12;
/// Frames that the device sends.
const FRAMES: std::ops::RangeInclusive<usize> = 14..=65550;

struct Bench {
    memory: GuestMemory,
    device: Net,
    peer: UnixStream,
    /// What the guest sent and the peer has yet to read.
    sent: VecDeque<u8>,
    /// Frames from the peer that the guest has yet to get.
    received: VecDeque<Vec<u8>>,
    /// The peer keeps to the protocol.
    decent_peer: bool,
}

struct Queue {
    ring: Ring,
    account: Account,
}

struct Queues {
    receive: Queue,
    send: Queue,
    control: Queue,
    features: u64,
    arena: Arena,
    /// All pieces that the device has.
    lent: Vec<Piece>,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let (ours, peer) = UnixStream::pair().expect("sockets");
    peer.set_nonblocking(true).expect("a socket");
    let backend = NetBackend::stream("fuzz", ours).expect("a backend");
    let options = NetOptions {
        name: "fuzz".into(),
        mac: "02:00:00:00:00:01".parse().expect("an address"),
        mtu: None,
        queue_size: MAX_SIZE,
        offload: input.arbitrary()?,
        thread_setup: None,
    };
    let mut bench = Bench {
        memory: guest_memory(),
        device: Net::new(backend, options).expect("a card"),
        peer,
        sent: VecDeque::new(),
        received: VecDeque::new(),
        decent_peer: true,
    };
    while !input.is_empty() {
        if !bench.live(input)? {
            break;
        }
    }
    Ok(())
}

impl Bench {
    /// One life of the card. Whether it was a decent one: after another, nobody knows what was sent.
    fn live(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<bool> {
        let mut queues = Queues::new(input, &self.memory, self.device.features())?;
        let all = [&queues.receive, &queues.send, &queues.control];
        let active = (0..)
            .zip(all)
            .map(|(index, queue)| queue.ring.active(index))
            .collect();
        let (events, active) = activate(&mut self.device, &self.memory, queues.features, active);
        assert!(active);
        for _ in 0..input.int_in_range(1..=4)? {
            self.peer_acts(input)?;
            queues.offer(input)?;
            queues.send(input, self.decent_peer.then_some(&mut self.sent))?;
            queues.control(input)?;
            if input.ratio(1, 8)? {
                let queue = [&mut queues.receive, &mut queues.send, &mut queues.control];
                let index = input.int_in_range(0..=2)?;
                queue[index].ring.spoil(input)?;
                self.end_badly(&events, &mut queues);
                return Ok(false);
            }
            let watch = Watch::new(&self.memory);
            queues.publish();
            self.settle(&events, &mut queues);
            queues.allow(watch).assert_unchanged();
            queues.recycle();
        }
        let peer = &mut self.peer;
        let (sent, decent) = (&mut self.sent, self.decent_peer);
        reset(&mut self.device, || read(peer, sent, decent));
        // What the card had received but not delivered is lost.
        let watch = Watch::new(&self.memory);
        queues.publish();
        queues.allow_index(watch).assert_unchanged();
        Ok(self.sent.is_empty())
    }

    fn end_badly(&mut self, events: &Events, queues: &mut Queues) {
        queues.publish();
        let controls = queues.features & CONTROL != 0;
        wait_until("the card to use or refuse the chains", || {
            read(&mut self.peer, &mut self.sent, false);
            events.reason().is_some()
                || (queues.send.ring.is_used_up() && (!controls || queues.control.ring.is_used_up()))
        });
        let peer = &mut self.peer;
        let sent = &mut self.sent;
        reset(&mut self.device, || read(peer, sent, false));
    }

    /// The peer sends frames, or something else.
    fn peer_acts(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=3)? {
            let length = if input.ratio(1, 16)? {
                input.int_in_range(0..=20_000)?
            } else {
                input.int_in_range(14..=1514)?
            };
            let mut frame = vec![0x5a; length];
            frame
                .iter_mut()
                .zip(0_usize..)
                .for_each(|(byte, at)| *byte ^= (at / 16) as u8);
            if let Some(first) = frame.first_mut() {
                *first = input.arbitrary()?;
            }
            let mut bytes = (length as u32).to_be_bytes().to_vec();
            if input.ratio(1, 64)? {
                bytes = input.arbitrary::<[u8; 4]>()?.to_vec();
                self.decent_peer = false;
            }
            self.decent_peer &= FRAMES.contains(&length);
            bytes.extend(&frame);
            let written = self.peer.write(&bytes);
            self.decent_peer &= matches!(written, Ok(count) if count == bytes.len());
            self.received.push_back(frame);
        }
        if input.ratio(1, 64)? {
            self.decent_peer = false;
            let _ = self.peer.shutdown(std::net::Shutdown::Both);
        }
        Ok(())
    }

    /// Waits until the card has sent and obeyed, and looks at what it received.
    fn settle(&mut self, events: &Events, queues: &mut Queues) {
        let controls = queues.features & CONTROL != 0;
        let decent = self.decent_peer;
        wait_until("the card to send and obey", || {
            read(&mut self.peer, &mut self.sent, decent);
            queues.send.account.settle(&mut queues.send.ring);
            for answer in queues.control.account.settle(&mut queues.control.ring) {
                let answer = answer.bytes(&self.memory);
                assert!(matches!(answer[..], [] | [0 | 1]), "{answer:?} is no answer");
            }
            let done = queues.send.account.is_settled() && (!controls || queues.control.account.is_settled());
            done && (!decent || self.sent.is_empty())
        });
        assert_eq!(events.reason(), None);
        let returned = queues.receive.account.settle(&mut queues.receive.ring);
        if decent {
            self.assert_received(&returned, queues.features & MERGEABLE != 0);
        }
    }

    /// Each packet is a frame that the peer sent, in order. Some may be missing: those for which there was no room, and those
    /// that were on their way at a reset.
    fn assert_received(&mut self, mut returned: &[Returned], mergeable: bool) {
        while !returned.is_empty() {
            let bytes = |chains: &[Returned]| -> Vec<u8> {
                chains
                    .iter()
                    .flat_map(|chain| chain.bytes(&self.memory))
                    .collect()
            };
            let all = bytes(returned);
            let count = match (mergeable, all.get(10..HEADER)) {
                (true, Some(count)) => usize::from(u16::from_le_bytes([count[0], count[1]])),
                _ => 1,
            };
            assert!(
                (1..=returned.len()).contains(&count),
                "a packet of {count} buffers"
            );
            let packet = bytes(&returned[..count]);
            returned = &returned[count..];
            let frame = packet.get(HEADER..).expect("a packet has a header");
            let place = self.received.iter().position(|sent| sent == frame);
            let place = place.expect("a frame came that nobody sent, or again");
            self.received.drain(..=place);
        }
    }
}

/// The peer reads what there is and, if it is known what should come, compares.
fn read(peer: &mut UnixStream, sent: &mut VecDeque<u8>, compare: bool) {
    let mut bytes = [0; 16 << 10];
    loop {
        match peer.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) if compare => {
                for byte in &bytes[..count] {
                    assert_eq!(
                        sent.pop_front(),
                        Some(*byte),
                        "the peer got what the guest did not send"
                    );
                }
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            // The card may close the connection.
            Err(_) => return,
        }
    }
}

impl Queues {
    fn new(input: &mut Unstructured<'_>, memory: &GuestMemory, offered: u64) -> arbitrary::Result<Self> {
        let mut features = offered | feature::VERSION_1;
        for bit in [MERGEABLE, CONTROL, feature::RING_EVENT_IDX, 1 << 23] {
            if input.ratio(1, 3)? {
                features &= !bit;
            }
        }
        let size = 1 << input.int_in_range(2..=MAX_SIZE.ilog2())?;
        let queue = |index| Queue {
            ring: Ring::new(memory, index, size, features & feature::RING_EVENT_IDX != 0),
            account: Account::default(),
        };
        Ok(Self {
            receive: queue(0),
            send: queue(1),
            control: queue(2),
            features,
            arena: Arena::new(),
            lent: Vec::new(),
        })
    }

    fn lend(
        &mut self,
        which: fn(&mut Self) -> &mut Queue,
        pieces: Vec<Piece>,
        bytes: &[u8],
        indirect: bool,
    ) -> bool {
        let mut arena = std::mem::replace(&mut self.arena, Arena::new());
        let queue = which(self);
        let head = queue.ring.store_chain(&mut arena, &pieces, indirect);
        if let Some(head) = head {
            queue.ring.fill(&pieces, bytes);
            queue.ring.make_available(head);
            queue.account.lend(head, pieces.clone());
            self.lent.extend(pieces);
        }
        self.arena = arena;
        head.is_some()
    }

    fn offer(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=4)? {
            let mut pieces = Vec::new();
            let length = if input.ratio(1, 8)? {
                input.int_in_range(1..=64)?
            } else {
                1526
            };
            self.arena.cut(input, length, true, &mut pieces)?;
            let indirect = input.ratio(1, 4)?;
            self.lend(|queues| &mut queues.receive, pieces, &[], indirect);
        }
        Ok(())
    }

    /// Sends packets; those that the peer must get are appended to `sent`.
    fn send(
        &mut self,
        input: &mut Unstructured<'_>,
        mut sent: Option<&mut VecDeque<u8>>,
    ) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=4)? {
            let length = match input.int_in_range(0..=15_u8)? {
                0 => input.int_in_range(0..=20)?,
                1 => input.int_in_range(8000..=20_000)?,
                _ => HEADER + input.int_in_range(14..=1514)?,
            };
            let mut packet = vec![0; length];
            packet
                .iter_mut()
                .zip(0_usize..)
                .skip(HEADER)
                .for_each(|(byte, at)| *byte = (at / 8) as u8);
            let mut pieces = Vec::new();
            self.arena.cut(input, length, false, &mut pieces)?;
            packet.truncate(pieces.iter().map(|piece| piece.length as usize).sum());
            let indirect = input.ratio(1, 4)?;
            if self.lend(|queues| &mut queues.send, pieces, &packet, indirect)
                && let Some(sent) = &mut sent
                && let Some(frame) = packet.get(HEADER..)
                && FRAMES.contains(&frame.len())
            {
                sent.extend((frame.len() as u32).to_be_bytes());
                sent.extend(frame);
            }
        }
        Ok(())
    }

    fn control(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=2)? {
            let mut request = vec![0; input.int_in_range(0..=16)?];
            input.fill_buffer(&mut request)?;
            if let [class, command, ..] = &mut request[..] {
                (*class, *command) = (*class % 7, *command % 7);
            }
            let mut pieces = Vec::new();
            self.arena.cut(input, request.len(), false, &mut pieces)?;
            let answer = usize::from(!input.ratio(1, 16)?);
            self.arena.cut(input, answer, true, &mut pieces)?;
            self.lend(|queues| &mut queues.control, pieces, &request, false);
        }
        Ok(())
    }

    fn all(&self) -> [&Queue; 3] {
        [&self.receive, &self.send, &self.control]
    }

    fn publish(&self) {
        for queue in self.all() {
            queue.ring.publish();
            queue.ring.ring_doorbell();
        }
    }

    fn allow(&self, mut watch: Watch) -> Watch {
        self.all()
            .iter()
            .for_each(|queue| watch.allow_device(&self.lent, &queue.ring));
        watch
    }

    fn allow_index(&self, mut watch: Watch) -> Watch {
        self.all()
            .iter()
            .for_each(|queue| watch.allow_device(&[], &queue.ring));
        watch
    }

    /// Frees what is not in use.
    fn recycle(&mut self) {
        let free = |queue: &Queue| queue.account.is_settled();
        if self.all().into_iter().all(free) {
            self.arena = Arena::new();
            self.lent.clear();
        }
        for queue in [&mut self.receive, &mut self.send, &mut self.control] {
            if queue.account.is_settled() {
                queue.ring.recycle();
            }
        }
    }
}
