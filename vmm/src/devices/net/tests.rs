//! The card against a test driver on one side and a socket on the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_core::VirtioDevice;

use super::protocol::{HEADER_SIZE, MAX_FRAME, feature};
use super::*;
use crate::devices::test_driver::{
    BUFFERS, Driver, HIGH_MEMORY, MEMORY_SIZE, PATIENCE, Piece, eventually, readable, writable,
};

const RECEIVE: usize = 0;
const SEND: usize = 1;
const CONTROL: usize = 2;
/// All features.
const ALL: u64 = u64::MAX;

pub(super) fn options() -> NetOptions {
    NetOptions {
        name: "net0".into(),
        mac: "52:54:00:12:34:56".parse().unwrap(),
        mtu: None,
        queue_size: 256,
        offload: true,
        thread_setup: None,
    }
}

/// A card and the other end of its socket.
fn card() -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let net = Net::new(NetBackend::stream("test", theirs).unwrap(), options()).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.set_write_timeout(Some(PATIENCE)).unwrap();
    (net, ours)
}

/// A frame that tells its number and has bytes of its own.
fn frame(number: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from((at * 7 + number * 13 + at / 251) % 256).unwrap())
        .collect()
}

fn write_frame(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes())
        .unwrap();
    peer.write_all(frame).unwrap();
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
    peer.read_exact(&mut frame).unwrap();
    frame
}

/// Queues a packet with an empty virtio header at `address`, without a doorbell.
fn queue_packet(driver: &mut Driver, address: u64, frame: &[u8]) {
    let header = u64::try_from(HEADER_SIZE).unwrap();
    driver.write(address, &[0; HEADER_SIZE]);
    driver.write(address + header, frame);
    driver.queues[SEND].add(&[
        readable(address, HEADER_SIZE),
        readable(address + header, frame.len()),
    ]);
}

/// Queues `count` receive buffers of `length` bytes each and rings.
fn queue_buffers(driver: &mut Driver, count: usize, length: usize) {
    let first = usize::from(driver.queues[RECEIVE].size);
    for number in 0..count {
        let address = BUFFERS + u64::try_from(number % first * length).unwrap();
        driver.queues[RECEIVE].add(&[writable(address, length)]);
    }
    driver.queues[RECEIVE].ring();
}

/// The bytes of the next received packet, header included, out of buffers of `length` bytes made by [`queue_buffers`].
fn next_packet(driver: &mut Driver, length: usize) -> Vec<u8> {
    let address = |head: u16| BUFFERS + u64::try_from(usize::from(head) * length).unwrap();
    let first = driver.queues[RECEIVE].used();
    let mut packet = driver.read(address(first.head), usize::try_from(first.written).unwrap());
    let count = u16::from_le_bytes([packet[10], packet[11]]);
    for _ in 1..count {
        // All of a packet appears at once.
        let more = driver.queues[RECEIVE]
            .try_used()
            .expect("a packet appeared in parts");
        packet.extend(driver.read(address(more.head), usize::try_from(more.written).unwrap()));
    }
    packet
}

#[test]
fn sends_frames_of_all_sizes_in_order() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    let sizes = [14, 60, 1514, 8191, 8192, 9000, MAX_FRAME];
    for (number, size) in sizes.into_iter().enumerate() {
        queue_packet(
            &mut driver,
            BUFFERS + 0x2_0000 * u64::try_from(number).unwrap(),
            &frame(number, size),
        );
    }
    driver.queues[SEND].ring();
    for (number, size) in sizes.into_iter().enumerate() {
        assert_eq!(read_frame(&mut peer), frame(number, size), "frame {number}");
        driver.queues[SEND].used();
    }
    let statistics = net.statistics()();
    assert_eq!(statistics.sent_packets, 7);
    assert_eq!(
        statistics.sent_bytes,
        u64::try_from(sizes.iter().sum::<usize>()).unwrap()
    );
}

#[test]
fn takes_packets_in_pieces_and_through_indirect_tables() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    let sent = frame(3, 500);
    let packet = [vec![0; HEADER_SIZE], sent.clone()].concat();
    driver.write(BUFFERS, &packet);
    let cuts = [0, 5, 5, 12, 13, 300, packet.len()];
    let pieces: Vec<Piece> = cuts
        .windows(2)
        .map(|cut| readable(BUFFERS + u64::try_from(cut[0]).unwrap(), cut[1] - cut[0]))
        .collect();
    driver.queues[SEND].add(&pieces);
    driver.queues[SEND].add_indirect(BUFFERS + 0x1_0000, &pieces);
    driver.queues[SEND].ring();
    assert_eq!(read_frame(&mut peer), sent);
    assert_eq!(read_frame(&mut peer), sent);
}

#[test]
fn receives_a_frame_with_an_empty_header() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    driver.write(BUFFERS, &[0xff; 2048]);
    queue_buffers(&mut driver, 4, 2048);
    write_frame(&mut peer, &frame(1, 60));
    let packet = next_packet(&mut driver, 2048);
    assert_eq!(packet[..HEADER_SIZE], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(packet[HEADER_SIZE..], frame(1, 60));
}

#[test]
fn spreads_a_large_frame_over_mergeable_buffers() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 200, 1500);
    for (number, size) in [5000, 60, MAX_FRAME, 14, 1488, 1489].into_iter().enumerate() {
        write_frame(&mut peer, &frame(number, size));
        let packet = next_packet(&mut driver, 1500);
        assert_eq!(packet[HEADER_SIZE..], frame(number, size), "{size}");
        let count = u16::from_le_bytes([packet[10], packet[11]]);
        assert_eq!(usize::from(count), (HEADER_SIZE + size).div_ceil(1500));
    }
}

#[test]
fn a_frame_waits_for_enough_buffers() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 2, 1500);
    write_frame(&mut peer, &frame(7, 4000));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.queues[RECEIVE].try_used(), None);
    queue_buffers_from(&mut driver, 2, 2, 1500);
    let packet = next_packet(&mut driver, 1500);
    assert_eq!(packet[HEADER_SIZE..], frame(7, 4000));
}

/// As [`queue_buffers`], at the place of buffer number `first`.
fn queue_buffers_from(driver: &mut Driver, first: usize, count: usize, length: usize) {
    for number in first..first + count {
        let address = BUFFERS + u64::try_from(number * length).unwrap();
        driver.queues[RECEIVE].add(&[writable(address, length)]);
    }
    driver.queues[RECEIVE].ring();
}

#[test]
fn without_mergeable_buffers_a_frame_too_large_is_dropped_and_the_next_comes() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, !feature::MRG_RXBUF);
    queue_buffers(&mut driver, 4, 1526);
    write_frame(&mut peer, &frame(1, 3000));
    write_frame(&mut peer, &frame(2, 1514));
    let packet = next_packet(&mut driver, 1526);
    assert_eq!(packet[HEADER_SIZE..], frame(2, 1514));
    assert_eq!(packet[10..12], [1, 0]);
    assert_eq!(net.statistics()().received_dropped, 1);
}

#[test]
fn frames_wait_in_the_socket_while_the_guest_has_no_buffers() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    for number in 0..20 {
        write_frame(&mut peer, &frame(number, 100));
    }
    let statistics = net.statistics();
    eventually("starvation", || statistics().receive_starved > 0);
    queue_buffers(&mut driver, 20, 1500);
    for number in 0..20 {
        assert_eq!(next_packet(&mut driver, 1500)[HEADER_SIZE..], frame(number, 100));
    }
}

#[test]
fn a_frame_may_arrive_byte_by_byte() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 4, 1500);
    let mut bytes = 64_u32.to_be_bytes().to_vec();
    bytes.extend(frame(5, 64));
    for byte in bytes {
        peer.write_all(&[byte]).unwrap();
    }
    assert_eq!(next_packet(&mut driver, 1500)[HEADER_SIZE..], frame(5, 64));
}

#[test]
fn a_full_socket_holds_packets_back_and_loses_none() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    let sizes = [1514, 60, 9014, 40_000];
    for number in 0..128 {
        let place = HIGH_MEMORY + 0x1_0000 * u64::try_from(number).unwrap();
        queue_packet(&mut driver, place, &frame(number, sizes[number % 4]));
    }
    driver.queues[SEND].ring();
    let statistics = net.statistics();
    eventually("a full socket", || statistics().send_blocked > 0);
    for number in 0..128 {
        assert_eq!(
            read_frame(&mut peer),
            frame(number, sizes[number % 4]),
            "{number}"
        );
        driver.queues[SEND].used();
    }
    assert_eq!(statistics().sent_packets, 128);
    assert_eq!(statistics().sent_dropped, 0);
}

#[test]
fn one_interrupt_serves_a_batch() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    for number in 0..100 {
        queue_packet(
            &mut driver,
            BUFFERS + 4096 * u64::try_from(number).unwrap(),
            &frame(number, 60),
        );
    }
    driver.queues[SEND].ring();
    for number in 0..100 {
        assert_eq!(read_frame(&mut peer), frame(number, 60));
    }
    eventually("the end of the batch", || {
        driver.queues[SEND].try_used().is_some()
    });
    std::thread::sleep(Duration::from_millis(20));
    let interrupts = driver.queues[SEND].interrupts();
    assert!((1..=3).contains(&interrupts), "{interrupts}");
}

#[test]
fn a_reset_under_load_leaves_the_connection_in_order() {
    let (mut net, peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    let mut reader = peer.try_clone().unwrap();
    let mut writer = peer;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let received = std::thread::spawn(move || {
        let mut count = 0;
        while !stopping.load(Ordering::SeqCst) {
            let frame_read = read_frame(&mut reader);
            // Every frame is whole: a reset in the middle of one does not cut it.
            assert_eq!(frame_read, frame(frame_read.len() % 10, frame_read.len()));
            count += 1;
        }
        count
    });
    let writing = Arc::clone(&stop);
    let sender = std::thread::spawn(move || {
        let mut number = 0;
        while !writing.load(Ordering::SeqCst) {
            number += 1;
            let frame = frame(0, 1000 + number % 400);
            let bytes = [&u32::try_from(frame.len()).unwrap().to_be_bytes(), &frame[..]].concat();
            // At the end the card goes away in the middle of a frame.
            let written = writer.write_all(&bytes);
            assert!(written.is_ok() || writing.load(Ordering::SeqCst));
        }
    });
    for round in 0..20 {
        let size = 2000 + (round * 977) % 30_000;
        for number in 0..60 {
            let address = HIGH_MEMORY + 0x2_0000 * u64::try_from(number).unwrap();
            queue_packet(&mut driver, address, &frame(size % 10, size));
        }
        driver.queues[SEND].ring();
        queue_buffers(&mut driver, 64, 1500);
        for _ in 0..5 {
            assert!(next_packet(&mut driver, 1500).len() >= HEADER_SIZE + 1000);
        }
        for _ in 0..40 {
            driver.queues[SEND].used();
        }
        Driver::reset(&mut net);
        // A device at rest does not touch memory.
        let before = driver.read(BUFFERS, 64 * 1500);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(driver.read(BUFFERS, 64 * 1500), before);
        driver.activate(&mut net, ALL);
    }
    stop.store(true, Ordering::SeqCst);
    // Wakes both ends.
    queue_packet(&mut driver, BUFFERS, &frame(0, 100));
    driver.queues[SEND].ring();
    queue_buffers(&mut driver, 256, 1500);
    // All that the card gave back, but for what was still in the socket when the reader stopped.
    assert!(received.join().unwrap() >= 500);
    drop(net);
    sender.join().unwrap();
}

#[test]
fn the_link_goes_down_when_the_peer_is_gone() {
    let (mut net, peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 4, 1500);
    let status = |net: &Net| {
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&net), 1);
    drop(peer);
    eventually("a change of the configuration", || {
        driver.events.config_changes.load(Ordering::SeqCst) == 1
    });
    assert_eq!(status(&net), 0);
    // What is sent now is dropped, not kept.
    queue_packet(&mut driver, BUFFERS, &frame(0, 100));
    driver.queues[SEND].ring();
    driver.queues[SEND].used();
    assert_eq!(net.statistics()().sent_dropped, 1);
    // A reboot changes nothing about that.
    Driver::reset(&mut net);
    driver.activate(&mut net, ALL);
    assert_eq!(status(&net), 0);
    assert_eq!(driver.events.reset_reason(), None);
}

#[test]
fn a_peer_that_announces_a_giant_frame_is_not_believed() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 4, 1500);
    peer.write_all(&0x4000_0000_u32.to_be_bytes()).unwrap();
    eventually("a lost link", || {
        driver.events.config_changes.load(Ordering::SeqCst) == 1
    });
}

#[test]
fn an_idle_card_does_not_wake() {
    let (mut peer, theirs) = UnixStream::pair().unwrap();
    let backend = NetBackend::stream("test", theirs).unwrap();
    let name = "idle".into();
    let mut net = Net::new(backend, NetOptions { name, ..options() }).unwrap();
    let mut driver = Driver::new(&mut net, ALL);
    queue_buffers(&mut driver, 4, 1500);
    write_frame(&mut peer, &frame(0, 60));
    next_packet(&mut driver, 1500);
    // Also one that waits for buffers or for room does not.
    for _ in 0..30 {
        write_frame(&mut peer, &frame(0, 1000));
    }
    let statistics = net.statistics();
    eventually("starvation", || statistics().receive_starved > 0);
    std::thread::sleep(Duration::from_millis(50));
    let before = worker_switches();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(worker_switches(), before);
}

/// Context switches of the queue thread of the card "idle".
fn worker_switches() -> u64 {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.trim() == "idle-q0" {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            for line in status.lines().filter(|line| line.contains("ctxt_switches")) {
                total += line.rsplit('\t').next().unwrap().trim().parse::<u64>().unwrap();
            }
        }
    }
    total
}

#[test]
fn control_commands_are_answered() {
    let (mut net, _peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    let mut command = |bytes: &[u8]| {
        driver.write(BUFFERS, bytes);
        driver.write(BUFFERS + 0x1000, &[0x55]);
        driver.queues[CONTROL].add(&[
            readable(BUFFERS, 2),
            readable(BUFFERS + 2, bytes.len() - 2),
            writable(BUFFERS + 0x1000, 1),
        ]);
        driver.queues[CONTROL].ring();
        assert_eq!(driver.queues[CONTROL].used().written, 1);
        driver.read(BUFFERS + 0x1000, 1)[0]
    };
    assert_eq!(command(&[0, 0, 1]), 0, "promiscuous mode");
    assert_eq!(command(&[0, 1, 1]), 0, "all multicast");
    assert_eq!(command(&[0, 5, 0]), 0, "no broadcast");
    assert_eq!(command(&[0, 6, 0]), 1, "an unknown mode");
    assert_eq!(command(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0, "filter tables");
    assert_eq!(command(&[1, 1, 0x52, 0x54, 0, 1, 2, 3]), 0, "an address");
    assert_eq!(command(&[1, 1, 0x53, 0x54, 0, 1, 2, 3]), 1, "a group's address");
    assert_eq!(command(&[1, 1, 0x52]), 1, "a short address");
    assert_eq!(command(&[4, 0, 1, 0]), 1, "queue pairs, which were not offered");
    assert_eq!(
        command(&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        1,
        "offloads, which were not offered"
    );
    assert_eq!(command(&[9, 9, 9]), 1, "nonsense");
    let mut mac = [0; 6];
    net.read_config(0, &mut mac);
    assert_eq!(mac, [0x52, 0x54, 0, 1, 2, 3]);
}

#[test]
fn what_is_no_frame_is_dropped() {
    let (mut net, mut peer) = card();
    let mut driver = Driver::new(&mut net, ALL);
    driver.queues[SEND].add(&[readable(BUFFERS, 5)]);
    driver.queues[SEND].add(&[readable(BUFFERS, HEADER_SIZE)]);
    driver.queues[SEND].add(&[readable(BUFFERS, HEADER_SIZE + 13)]);
    driver.queues[SEND].add(&[readable(BUFFERS, HEADER_SIZE + MAX_FRAME + 1)]);
    driver.queues[SEND].add(&[writable(BUFFERS, 2000)]);
    queue_packet(&mut driver, BUFFERS, &frame(0, 60));
    driver.queues[SEND].ring();
    assert_eq!(read_frame(&mut peer), frame(0, 60));
    assert_eq!(net.statistics()().sent_dropped, 5);
    assert_eq!(driver.events.reset_reason(), None);
}

/// Lets a hostile driver do something to the send and the receive queue and expects the card to stop.
fn stops_at(mischief: impl Fn(&mut Driver, usize)) {
    for queue in [RECEIVE, SEND, CONTROL] {
        let (mut net, mut peer) = card();
        let mut driver = Driver::new(&mut net, ALL);
        let _ = peer.write_all(&[0, 0, 0, 60]);
        let _ = peer.write_all(&[0; 60]);
        mischief(&mut driver, queue);
        driver.queues[queue].ring();
        let reason = driver.reset_reason();
        assert!(reason.contains(&format!("virtqueue {queue}")), "{reason}");
        Driver::reset(&mut net);
        // And works again with a better driver.
        driver.activate(&mut net, ALL);
        queue_packet(&mut driver, BUFFERS, &frame(0, 60));
        driver.queues[SEND].ring();
        assert_eq!(read_frame(&mut peer), frame(0, 60));
    }
}

#[test]
fn an_index_beyond_the_ring_stops_the_card() {
    stops_at(|driver, queue| driver.queues[queue].set_avail_index(1000));
}

#[test]
fn a_buffer_outside_of_memory_stops_the_card() {
    for address in [
        HIGH_MEMORY - 4096,
        u64::MAX - 100,
        HIGH_MEMORY + (MEMORY_SIZE as u64) / 2 - 10,
    ] {
        stops_at(|driver, queue| {
            let piece = if queue == RECEIVE {
                writable(address, 2000)
            } else {
                readable(address, 2000)
            };
            driver.queues[queue].add(&[piece]);
        });
    }
}

#[test]
fn a_loop_of_descriptors_stops_the_card() {
    stops_at(|driver, queue| {
        let flags = if queue == RECEIVE { 3 } else { 1 };
        driver.queues[queue].store(0, BUFFERS, 10, flags, 1);
        driver.queues[queue].store(1, BUFFERS, 10, flags, 0);
        driver.queues[queue].publish(0);
    });
}

#[test]
fn a_chain_that_leads_nowhere_stops_the_card() {
    stops_at(|driver, queue| {
        let flags = if queue == RECEIVE { 3 } else { 1 };
        driver.queues[queue].store(0, BUFFERS, 100, flags, 60_000);
        driver.queues[queue].publish(0);
    });
}

#[test]
fn receive_buffers_without_room_stop_the_card() {
    for piece in [readable(BUFFERS, 100), writable(BUFFERS, 0)] {
        let (mut net, _peer) = card();
        let mut driver = Driver::new(&mut net, ALL);
        for _ in 0..256 {
            driver.queues[RECEIVE].add(&[piece]);
        }
        driver.queues[RECEIVE].ring();
        assert!(driver.reset_reason().contains("no buffer that can be used"));
        Driver::reset(&mut net);
    }
}

#[test]
fn a_head_beyond_the_table_stops_the_card() {
    stops_at(|driver, queue| driver.queues[queue].publish(5000));
}

#[test]
fn a_broken_indirect_table_stops_the_card() {
    stops_at(|driver, queue| {
        driver.queues[queue].store(0, BUFFERS, 17, 4, 0);
        driver.queues[queue].publish(0);
    });
}

#[test]
fn the_configuration_space_shows_address_status_and_mtu() {
    let (_, theirs) = UnixStream::pair().unwrap();
    let backend = NetBackend::stream("test", theirs).unwrap();
    let net = Net::new(
        backend,
        NetOptions {
            mtu: Some(9000),
            ..options()
        },
    )
    .unwrap();
    let mut config = [0xff; 16];
    net.read_config(0, &mut config);
    assert_eq!(config[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(config[6..12], [1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(config[12..], [0; 4]);
    assert_ne!(net.features() & feature::MTU, 0);
    assert_eq!(net.features() & feature::OFFLOADS, 0);
}
