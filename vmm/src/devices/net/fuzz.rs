//! The network card's part of [`crate::devices::fuzz`].

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_core::VirtioDevice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::{WorkerSetup, run_passes};
use super::{Net, NetBackend, NetOptions, NetStatistics};
use crate::devices::fuzz::{Guest, Input};

/// Runs the queues of a card made of `data`, and returns what came of it. Content of memory is at the same time what the
/// card's peer sends.
///
/// # Panics
/// When the device misbehaves, or the host has no memory or descriptors.
#[expect(clippy::unwrap_used, reason = "the host's resources, not the input")]
pub fn fuzz_net(data: &[u8]) -> NetStatistics {
    let mut input = Input::new(data);
    let (guest, queues) = Guest::new(&mut input, 3);
    let (mut peer, socket) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    let _ = peer.write(input.rest());
    let options = NetOptions {
        name: "fuzz".into(),
        mac: "52:54:00:12:34:56".parse().unwrap(),
        mtu: None,
        queue_size: 32,
        offload: true,
        thread_setup: None,
    };
    let net = Net::new(NetBackend::stream("fuzz", socket).unwrap(), options).unwrap();
    let [receive, send, control] = <[_; 3]>::try_from(queues).unwrap();
    let mut config = [0; 32];
    net.read_config(u64::from(data.first().copied().unwrap_or(0)), &mut config);
    let setup = WorkerSetup {
        shared: Arc::clone(&net.shared),
        memory: Arc::clone(&guest.memory),
        features: guest.features & net.features(),
        pair: 0,
        receive,
        send,
        control: Some(control),
        stop: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        events: Arc::clone(&guest.events),
    };
    // An error is what a broken ring deserves.
    let _ = run_passes(setup, 16);
    guest.check();
    // What the peer gets is frames, whatever the driver did.
    let mut sent = Vec::new();
    let _ = peer.read_to_end(&mut sent);
    let mut rest = &sent[..];
    while let Some((length, frames)) = rest.split_first_chunk() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap();
        assert!((14..=65554).contains(&length), "a frame of {length} bytes");
        rest = frames.get(length..).unwrap_or_default();
    }
    net.statistics()()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;
    use crate::devices::fuzz::tests::mostly_valid;

    #[test]
    fn mostly_valid_chains_move_packets_both_ways() {
        let mut runner = TestRunner::deterministic();
        let strategy = mostly_valid(3);
        let (mut received, mut sent) = (0, 0);
        for _ in 0..200 {
            let statistics = fuzz_net(&strategy.new_tree(&mut runner).unwrap().current());
            received += u32::from(statistics.received_packets > 0);
            sent += u32::from(statistics.sent_packets > 0);
        }
        assert!(
            received > 20 && sent > 20,
            "{received} and {sent} times out of 200"
        );
    }

    proptest! {
        #[test]
        fn no_input_breaks_the_card(data in prop::collection::vec(any::<u8>(), 0..4096)) {
            fuzz_net(&data);
        }

        #[test]
        fn no_mostly_valid_chains_break_the_card(data in mostly_valid(3)) {
            fuzz_net(&data);
        }
    }
}
