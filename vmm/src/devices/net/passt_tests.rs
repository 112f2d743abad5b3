//! The card on a real `passt`; where it is not installed, or the host has no network, the tests say so and pass.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::host_tests::{
    ALL, GUEST_MAC, give_buffers, in_namespace, next_udp, packet, send, shell, udp_frame, udp_payload,
};
use super::protocol::HEADER_SIZE;
use super::tests::options;
use super::*;
use crate::devices::test_driver::{Driver, PATIENCE, eventually};

/// A DHCP request for an address (RFC 2131), as a frame.
fn dhcp_discover() -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78, 0, 0, 0x80, 0];
    message.resize(28, 0);
    message.extend(GUEST_MAC);
    message.resize(236, 0);
    message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    message.resize(300, 0);
    udp_frame(
        (GUEST_MAC, [0xff; 6]),
        ([0; 4], [255; 4]),
        (68, 67),
        &message,
        false,
    )
}

/// Whether `frame` is a DHCP offer to us.
fn is_dhcp_offer(frame: &[u8]) -> bool {
    let Some(message) = udp_payload(frame, 68).filter(|message| message.len() > 240) else {
        return false;
    };
    let mut options = &message[240..];
    let mut kind = None;
    while let [tag, length, rest @ ..] = options
        && *tag != 255
    {
        let (value, next) = rest.split_at(usize::from(*length));
        if *tag == 53 {
            kind = value.first().copied();
        }
        options = next;
    }
    message[0] == 2 && message[4..8] == [0x12, 0x34, 0x56, 0x78] && kind == Some(2)
}

fn passt() -> Option<Arc<NetBackend>> {
    match NetBackend::start_passt(&PasstOptions::new(options().mac)) {
        Ok(backend) => Some(backend),
        Err(error @ (NetError::PasstAbsent { .. } | NetError::PasstFailed { .. })) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn passt_offers_the_guest_an_address_before_and_after_a_reboot() {
    let Some(backend) = passt() else { return };
    let process = backend.process_id().unwrap();
    for _ in 0..2 {
        // A reboot builds the machine anew.
        let mut net = Net::new(Arc::clone(&backend), options()).unwrap();
        let mut driver = Driver::new(&mut net, ALL);
        give_buffers(&mut driver, 0);
        send(&mut driver, [0; HEADER_SIZE], &dhcp_discover());
        let deadline = Instant::now() + PATIENCE;
        while !is_dhcp_offer(&packet(&mut driver, 0)[HEADER_SIZE..]) {
            assert!(Instant::now() < deadline, "no offer");
        }
        Driver::reset(&mut net);
    }
    drop(backend);
    assert!(
        !std::path::Path::new(&format!("/proc/{process}")).exists(),
        "passt lives on"
    );
}

#[test]
fn passt_forwards_a_port_of_the_host() {
    let free = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let options_passt = PasstOptions {
        forward: vec![format!("udp:127.0.0.1:{free}:5000").parse().unwrap()],
        ..PasstOptions::new(options().mac)
    };
    if passt().is_none() {
        return;
    }
    let backend = NetBackend::start_passt(&options_passt).unwrap();
    let mut net = Net::new(backend, options()).unwrap();
    let mut driver = Driver::new(&mut net, ALL);
    give_buffers(&mut driver, 0);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"knock", ("127.0.0.1", free)).unwrap();
    assert_eq!(&next_udp(&mut driver)[HEADER_SIZE + 42..], b"knock");
}

#[test]
fn passt_that_dies_takes_the_link_down() {
    let Some(backend) = passt() else { return };
    let process = backend.process_id().unwrap();
    let mut net = Net::new(Arc::clone(&backend), options()).unwrap();
    let mut driver = Driver::new(&mut net, ALL);
    give_buffers(&mut driver, 0);
    shell(&format!("kill -9 {process}")).unwrap();
    eventually("a lost link", || {
        driver.events.config_changes.load(Ordering::SeqCst) == 1
    });
    assert!(!backend.link_up());
}

#[test]
fn passt_is_missing_or_fails_with_its_own_words() {
    let absent = PasstOptions {
        program: "passt-that-is-not-there".into(),
        ..PasstOptions::new(options().mac)
    };
    let error = NetBackend::start_passt(&absent).unwrap_err().to_string();
    assert!(error.contains("apt install passt"), "{error}");
    let failing = PasstOptions {
        program: "ls".into(),
        ..PasstOptions::new(options().mac)
    };
    let error = NetBackend::start_passt(&failing).unwrap_err().to_string();
    assert!(
        error.contains("foreground") && error.contains("exit status: 2"),
        "{error}"
    );
}

#[test]
fn passt_says_that_the_host_has_no_network() {
    if passt().is_none() {
        return;
    }
    in_namespace(|| {
        let error = NetBackend::start_passt(&PasstOptions::new(options().mac))
            .unwrap_err()
            .to_string();
        assert!(error.contains("No external routable interface"), "{error}");
    });
}
