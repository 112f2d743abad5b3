//! The card on real tap interfaces.
//!
//! The tests make their interfaces in a network namespace of their own, for which they need root; elsewhere they say so and
//! pass. The namespace belongs to the test's thread, from which queue threads and child processes inherit it.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_core::VirtioDevice;

use super::protocol::{HEADER_SIZE, feature};
use super::tests::options;
use super::*;
use crate::devices::test_driver::{BUFFERS, Driver, HIGH_MEMORY, PATIENCE, eventually, readable, writable};

pub(super) const ALL: u64 = u64::MAX;
pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HOST: [u8; 4] = [10, 99, 0, 1];
const GUEST: [u8; 4] = [10, 99, 0, 2];

/// Runs `test` in fresh network and mount namespaces in which anyone may open the tun device, or says why not.
pub(super) fn in_namespace(test: impl FnOnce() + Send) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.clone());
        let body = || match enter_namespace() {
            Ok(()) => test(),
            Err(reason) => println!("skipped {name}: {reason}"),
        };
        let result = thread.spawn_scoped(scope, body).unwrap().join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn enter_namespace() -> Result<(), String> {
    // SAFETY: the calling thread alone moves to new namespaces, for which it gives up sharing the working directory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
    if result != 0 {
        return Err(format!(
            "no network namespace can be made here: {}",
            std::io::Error::last_os_error()
        ));
    }
    for command in [
        "mount --make-rprivate /",
        "mkdir -p /dev/net",
        "mount -t tmpfs tmpfs /dev/net",
        "mknod -m 666 /dev/net/tun c 10 200",
        "mount -t sysfs sysfs /sys",
        "ip link set lo up",
    ] {
        shell(command)?;
    }
    std::fs::File::open("/dev/net/tun")
        .map(drop)
        .map_err(|error| format!("the kernel has no tun driver: {error}"))
}

pub(super) fn shell(command: &str) -> Result<(), String> {
    let output = Command::new("sh")
        .args(["-c", command])
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!(
            "`{command}`: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

/// Makes a tap interface with an address, and the guest's as its neighbour.
fn make_tap(extra: &str) {
    for command in [
        &format!("ip tuntap add dev tap0 mode tap {extra}"),
        "sysctl -q -w net.ipv6.conf.tap0.disable_ipv6=1 || true",
        "ip address add 10.99.0.1/24 dev tap0",
        "ip link set tap0 up",
        "ip neigh replace 10.99.0.2 lladdr 52:54:00:12:34:56 dev tap0 nud permanent",
    ] {
        shell(command).unwrap();
    }
}

fn host_mac() -> [u8; 6] {
    let text = std::fs::read_to_string("/sys/class/net/tap0/address").unwrap();
    text.trim().parse::<MacAddress>().unwrap().octets()
}

/// The Internet checksum (RFC 1071) of `bytes`, without the final complement.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn pseudo_header(from: [u8; 4], to: [u8; 4], length: usize) -> Vec<u8> {
    let length = u16::try_from(length).unwrap().to_be_bytes();
    [&from[..], &to[..], &[0, 17], &length[..]].concat()
}

/// An Ethernet frame with a UDP datagram. The checksum of UDP is that of the pseudo header only if `partial`.
pub(super) fn udp_frame(
    macs: ([u8; 6], [u8; 6]),
    addresses: ([u8; 4], [u8; 4]),
    ports: (u16, u16),
    payload: &[u8],
    partial: bool,
) -> Vec<u8> {
    let length = 8 + payload.len();
    let length16 = u16::try_from(length).unwrap();
    let mut udp = [
        ports.0.to_be_bytes(),
        ports.1.to_be_bytes(),
        length16.to_be_bytes(),
        [0, 0],
    ]
    .concat();
    udp.extend(payload);
    let pseudo = pseudo_header(addresses.0, addresses.1, length);
    let checksum = if partial {
        sum(&pseudo)
    } else {
        !sum(&[pseudo, udp.clone()].concat())
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    let total = (20 + length16).to_be_bytes();
    let mut ip = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(addresses.0);
    ip.extend(addresses.1);
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&macs.1[..], &macs.0[..], &[8, 0], &ip[..], &udp[..]].concat()
}

/// The payload of a UDP frame to `port`, if it is one.
pub(super) fn udp_payload(frame: &[u8], port: u16) -> Option<&[u8]> {
    let is_udp = frame.get(12..14)? == [8, 0] && frame.get(23)? == &17;
    let matches = is_udp && frame.get(36..38)? == port.to_be_bytes();
    matches.then(|| &frame[42..])
}

const BUFFER: usize = 1600;

pub(super) fn give_buffers(driver: &mut Driver, pair: usize) {
    let queue = 2 * pair;
    for number in 0..usize::from(driver.queues[queue].size) {
        let place = (pair * 256 + number) * BUFFER;
        driver.queues[queue].add(&[writable(BUFFERS + u64::try_from(place).unwrap(), BUFFER)]);
    }
    driver.queues[queue].ring();
}

/// The next packet on `pair`, header included.
pub(super) fn packet(driver: &mut Driver, pair: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut left = 1;
    while left > 0 {
        let used = driver.queues[2 * pair].used();
        let place = BUFFERS + u64::try_from((pair * 256 + usize::from(used.head)) * BUFFER).unwrap();
        let first = bytes.is_empty();
        bytes.extend(driver.read(place, usize::try_from(used.written).unwrap()));
        if first {
            left = u16::from_le_bytes([bytes[10], bytes[11]]);
        }
        left -= 1;
        driver.queues[2 * pair].add(&[writable(place, BUFFER)]);
    }
    driver.queues[2 * pair].ring();
    bytes
}

pub(super) fn send(driver: &mut Driver, header: [u8; HEADER_SIZE], frame: &[u8]) {
    driver.write(HIGH_MEMORY, &header);
    driver.write(HIGH_MEMORY + 12, frame);
    driver.queues[1].add(&[readable(HIGH_MEMORY, HEADER_SIZE + frame.len())]);
    driver.queues[1].ring();
    driver.queues[1].used();
}

/// The host sends nothing before it has noticed that the interface is open.
fn wait_for_carrier() {
    eventually("a carrier", || {
        std::fs::read_to_string("/sys/class/net/tap0/operstate").is_ok_and(|state| state.trim() == "up")
    });
}

/// Opens tap0. If it was open before, a child of another test that runs beside may still have our file for a moment, between
/// its fork and its exec.
fn open_tap(pairs: u16) -> Arc<NetBackend> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match NetBackend::open_tap("tap0", pairs) {
            Err(NetError::TapBusy { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened.unwrap(),
        }
    }
}

fn tap_card(pairs: u16) -> Net {
    let backend = open_tap(pairs);
    wait_for_carrier();
    Net::new(backend, options()).unwrap()
}

/// A header with an unfinished UDP checksum, and segmentation if `segment` is not 0.
fn offload_header(segment: u16) -> [u8; HEADER_SIZE] {
    let size = segment.to_le_bytes();
    let gso = if segment > 0 { 5 } else { 0 };
    [
        1,
        gso,
        if gso > 0 { 42 } else { 0 },
        0,
        size[0],
        size[1],
        34,
        0,
        6,
        0,
        0,
        0,
    ]
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::from(HOST), 4000)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn packets_go_both_ways_through_a_tap_interface() {
    in_namespace(|| {
        make_tap("");
        let mut net = tap_card(1);
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        let socket = host_socket();
        let macs = (GUEST_MAC, host_mac());
        let text = b"from the guest";
        let frame = udp_frame(macs, (GUEST, HOST), (5000, 4000), text, false);
        send(&mut driver, [0; HEADER_SIZE], &frame);
        let mut buffer = [0; 2000];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], text);
        socket.send_to(b"from the host", from).unwrap();
        loop {
            let packet = packet(&mut driver, 0);
            if let Some(payload) = udp_payload(&packet[HEADER_SIZE..], 5000) {
                assert_eq!(payload, b"from the host");
                break;
            }
        }
        assert_eq!(driver.events.reset_reason(), None);
    });
}

#[test]
fn checksums_and_segmentation_are_left_to_the_other_side() {
    in_namespace(|| {
        make_tap("");
        let mut net = tap_card(1);
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        let socket = host_socket();
        let macs = (GUEST_MAC, host_mac());
        let frame = udp_frame(macs, (GUEST, HOST), (5000, 4000), b"unfinished", true);
        send(&mut driver, offload_header(0), &frame);
        let mut buffer = [0; 2000];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 10);

        // The host's own packets come unfinished as well.
        socket
            .send_to(&[7; 100], (std::net::Ipv4Addr::from(GUEST), 5000))
            .unwrap();
        let packet = next_udp(&mut driver);
        assert_eq!(packet[0] & 1, 1, "the checksum is finished");

        if net.features() & feature::HOST_USO == 0 {
            println!("this kernel has no UDP segmentation, that part is skipped");
            return;
        }
        // One packet of the guest becomes four datagrams ...
        let payload: Vec<u8> = (0..4000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let frame = udp_frame(macs, (GUEST, HOST), (5000, 4000), &payload, true);
        send(&mut driver, offload_header(1000), &frame);
        for part in payload.chunks(1000) {
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], part);
        }
        // ... and many datagrams of the host come as one packet.
        let segment: libc::c_int = 1200;
        // SAFETY: UDP_SEGMENT takes a pointer to an int and its size.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const segment).cast(),
                4,
            )
        };
        assert_eq!(result, 0);
        let payload = vec![9; 36_000];
        socket
            .send_to(&payload, (std::net::Ipv4Addr::from(GUEST), 5000))
            .unwrap();
        let packet = next_udp(&mut driver);
        assert_eq!(packet[HEADER_SIZE + 42..], payload);
        assert_eq!(packet[1], 5, "no UDP segments");
        assert_eq!(u16::from_le_bytes([packet[4], packet[5]]), 1200);
        assert_eq!(
            usize::from(u16::from_le_bytes([packet[10], packet[11]])),
            packet.len().div_ceil(BUFFER)
        );
    });
}

/// The next packet for port 5000.
pub(super) fn next_udp(driver: &mut Driver) -> Vec<u8> {
    loop {
        let packet = packet(driver, 0);
        if udp_payload(&packet[HEADER_SIZE..], 5000).is_some() {
            return packet;
        }
    }
}

#[test]
fn without_offloads_the_host_finishes_packets() {
    in_namespace(|| {
        make_tap("");
        let backend = NetBackend::open_tap("tap0", 1).unwrap();
        wait_for_carrier();
        // A driver that took offloads leaves nothing behind for one that does not.
        let mut earlier = Net::new(Arc::clone(&backend), options()).unwrap();
        let mut driver = Driver::new(&mut earlier, ALL);
        Driver::reset(&mut earlier);
        drop(earlier);
        let mut net = Net::new(
            backend,
            NetOptions {
                offload: false,
                ..options()
            },
        )
        .unwrap();
        assert_eq!(net.features() & feature::OFFLOADS, 0);
        driver.activate(&mut net, ALL);
        give_buffers(&mut driver, 0);
        let socket = host_socket();
        socket
            .send_to(&[7; 101], (std::net::Ipv4Addr::from(GUEST), 5000))
            .unwrap();
        let packet = next_udp(&mut driver);
        assert_eq!(packet[0] & 1, 0, "the checksum is unfinished");
        let udp = &packet[HEADER_SIZE + 34..];
        assert_eq!(
            sum(&[pseudo_header(HOST, GUEST, udp.len()), udp.to_vec()].concat()),
            0xffff
        );
    });
}

/// Asks through the control queue, which has number `control`, for `pairs` queue pairs; the answer.
fn set_pairs(driver: &mut Driver, control: usize, pairs: u8) -> u8 {
    driver.write(HIGH_MEMORY, &[4, 0, pairs, 0, 0xff]);
    driver.queues[control].add(&[readable(HIGH_MEMORY, 4), writable(HIGH_MEMORY + 4, 1)]);
    driver.queues[control].ring();
    driver.queues[control].used();
    driver.read(HIGH_MEMORY + 4, 1)[0]
}

#[test]
fn flows_spread_over_the_queues_that_the_driver_asked_for() {
    in_namespace(|| {
        make_tap("multi_queue");
        let mut net = tap_card(4);
        assert_ne!(net.features() & feature::MQ, 0);
        let mut driver = Driver::new(&mut net, ALL);
        for pair in 0..4 {
            give_buffers(&mut driver, pair);
        }
        let send_flows = || {
            for _ in 0..64 {
                let socket = UdpSocket::bind((std::net::Ipv4Addr::from(HOST), 0)).unwrap();
                socket
                    .send_to(b"flow", (std::net::Ipv4Addr::from(GUEST), 5000))
                    .unwrap();
            }
        };
        let count = |driver: &mut Driver| -> Vec<usize> {
            std::thread::sleep(Duration::from_millis(100));
            (0..4)
                .map(|pair| {
                    let mut count = 0;
                    while driver.queues[2 * pair].try_used().is_some() {
                        count += 1;
                    }
                    count
                })
                .collect()
        };
        send_flows();
        let counts = count(&mut driver);
        assert!(counts[0] >= 64 && counts[1..] == [0, 0, 0], "{counts:?}");

        assert_eq!(set_pairs(&mut driver, 8, 4), 0);
        send_flows();
        let counts = count(&mut driver);
        assert!(counts.iter().sum::<usize>() >= 64, "{counts:?}");
        assert!(counts[1..].iter().any(|count| *count > 0), "{counts:?}");
        assert_eq!(set_pairs(&mut driver, 8, 5), 1);
        assert_eq!(set_pairs(&mut driver, 8, 0), 1);
        assert_eq!(set_pairs(&mut driver, 8, 1), 0);

        // A driver without multi-queue finds the control queue behind the first pair.
        Driver::reset(&mut net);
        driver.activate(&mut net, !feature::MQ);
        give_buffers(&mut driver, 0);
        driver.write(HIGH_MEMORY, &[0, 0, 1, 0xff]);
        driver.queues[2].add(&[readable(HIGH_MEMORY, 3), writable(HIGH_MEMORY + 3, 1)]);
        driver.queues[2].ring();
        driver.queues[2].used();
        assert_eq!(driver.read(HIGH_MEMORY + 3, 1), [0]);
        send_flows();
        eventually("64 packets on the first pair", || {
            net.statistics()().received_packets >= 64 + 64 + 64
        });
    });
}

#[test]
fn a_deleted_interface_takes_the_link_down() {
    in_namespace(|| {
        make_tap("");
        let mut net = tap_card(1);
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        shell("ip link delete tap0").unwrap();
        eventually("a lost link", || {
            driver.events.config_changes.load(Ordering::SeqCst) == 1
        });
        send(&mut driver, [0; HEADER_SIZE], &[0; 60]);
        assert_eq!(driver.events.reset_reason(), None);
    });
}

#[test]
fn a_driver_may_take_a_card_into_use_whose_interface_was_deleted() {
    in_namespace(|| {
        make_tap("multi_queue");
        let mut net = tap_card(2);
        let mut driver = Driver::new(&mut net, ALL);
        assert_eq!(set_pairs(&mut driver, 4, 2), 0);
        shell("ip link delete tap0").unwrap();
        Driver::reset(&mut net);
        driver.activate(&mut net, ALL);
        // A driver waits for the answers of the control queue, some with a busy processor.
        assert_eq!(set_pairs(&mut driver, 4, 2), 0);
        assert_eq!(set_pairs(&mut driver, 4, 1), 0);
        give_buffers(&mut driver, 0);
        send(&mut driver, [0; HEADER_SIZE], &[0; 60]);
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        assert_eq!(status, [0, 0], "the link is down");
        assert_eq!(driver.events.reset_reason(), None);
    });
}

#[test]
fn an_interface_that_is_down_only_drops_packets() {
    in_namespace(|| {
        make_tap("");
        let mut net = tap_card(1);
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        shell("ip link set tap0 down").unwrap();
        send(&mut driver, [0; HEADER_SIZE], &[0; 60]);
        assert_eq!(net.statistics()().sent_dropped, 1);
        shell("ip link set tap0 up").unwrap();
        send(&mut driver, [0; HEADER_SIZE], &[0; 60]);
        assert_eq!(net.statistics()().sent_packets, 1);
        // Nonsense in the header is the kernel's to refuse.
        send(&mut driver, [0xff; HEADER_SIZE], &[0; 60]);
        assert_eq!(driver.events.reset_reason(), None);
    });
}

#[test]
fn what_cannot_be_opened_is_said_with_its_remedy() {
    in_namespace(|| {
        let error = |name: &str, pairs| NetBackend::open_tap(name, pairs).unwrap_err().to_string();
        let absent = error("tap7", 1);
        assert!(
            absent.contains("ip tuntap add dev tap7 mode tap user"),
            "{absent}"
        );
        let absent = error("tap7", 2);
        assert!(absent.contains("mode tap multi_queue user"), "{absent}");
        assert!(
            error("lo", 1).contains("lo is not a tap interface"),
            "{}",
            error("lo", 1)
        );
        assert!(error("a name that is too long", 1).contains("cannot be the name"));

        make_tap("");
        let several = error("tap0", 2);
        assert!(several.contains("not made for several queues"), "{several}");
        let first = NetBackend::open_tap("tap0", 1).unwrap();
        let busy = error("tap0", 1);
        assert!(busy.contains("tap0 is busy"), "{busy}");
        drop(first);
        open_tap(1);

        // An interface for several queues serves a card with one.
        shell("ip link delete tap0").unwrap();
        make_tap("multi_queue");
        NetBackend::open_tap("tap0", 1).unwrap();
    });
}

#[test]
fn an_ordinary_user_opens_his_own_interface_and_no_other() {
    in_namespace(|| {
        make_tap("user 65534");
        shell("ip tuntap add dev tap1 mode tap user 1").unwrap();
        // SAFETY: the system call, unlike the function of libc, changes this thread alone.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        let error = NetBackend::open_tap("tap1", 1).unwrap_err().to_string();
        assert!(error.contains("belongs to another user"), "{error}");
        let mut net = tap_card(1);
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        let socket = host_socket();
        socket
            .send_to(b"hello", (std::net::Ipv4Addr::from(GUEST), 5000))
            .unwrap();
        assert_eq!(&next_udp(&mut driver)[HEADER_SIZE + 42..], b"hello");
    });
}

#[test]
fn the_mtu_of_the_interface_is_the_guests() {
    in_namespace(|| {
        make_tap("");
        assert_eq!(tap_card(1).features() & feature::MTU, 0);
        shell("ip link set tap0 mtu 9000").unwrap();
        let net = tap_card(1);
        let mut mtu = [0; 2];
        net.read_config(10, &mut mtu);
        assert_eq!(u16::from_le_bytes(mtu), 9000);
        assert_ne!(net.features() & feature::MTU, 0);
    });
}
