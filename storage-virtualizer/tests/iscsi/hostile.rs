//! Initiators that mean no good: the target stays there for the others.

use std::io::{Read, Write};
use std::time::Duration;

use proptest::prelude::*;

use crate::Served;
use crate::initiator::{Initiator, Login, READ, head, put, rw16, tag_of};

#[test]
fn what_breaks_the_protocol_ends_the_connection() {
    let served = Served::start();
    // More data than was agreed on; a login after the login.
    for (opcode, length) in [(0x40, 0x00ff_ffff_u32), (0x01, 0x0004_0001), (0x43, 0)] {
        let mut initiator = served.login(&Login::default());
        let mut request = head(opcode, 0x80, 7);
        request[5..8].copy_from_slice(&length.to_be_bytes()[1..]);
        initiator.stream.write_all(&request).unwrap();
        assert!(initiator.is_gone(), "{opcode:#x}");
    }
    // A CDB that is cut off.
    let mut initiator = served.login(&Login::default());
    let mut request = initiator.command(0, &[0; 6], 0x81, 0);
    request[4] = 1;
    initiator.stream.write_all(&request).unwrap();
    initiator.stream.write_all(&[0, 99, 1, 0]).unwrap();
    assert!(initiator.is_gone());
    served.login(&Login::default());
}

#[test]
fn what_is_not_supported_is_rejected_and_the_connection_goes_on() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    for (opcode, reason) in [(0x50, 3), (0x5c, 5), (0x4f, 5), (0x60, 5)] {
        let request = head(opcode, 0x80, 7);
        initiator.send(request, &[1; 12]);
        let reject = initiator.receive().unwrap();
        assert_eq!((reject.opcode(), reject.head[2]), (0x3f, reason), "{opcode:#x}");
        assert_eq!(reject.data[16..20], request[16..20]);
    }
    // Data in both directions, no tag, a tag that is in use.
    let number = initiator.command_number;
    let both = initiator.command(0, &[0; 6], 0xe1, 512);
    let mut untagged = initiator.command(0, &[0; 6], 0x81, 0);
    put(&mut untagged, 16, u32::MAX);
    for (request, reason) in [(both, 9), (untagged, 9)] {
        initiator.send(request, &[]);
        let reject = initiator.receive().unwrap();
        assert_eq!((reject.opcode(), reject.head[2]), (0x3f, reason));
    }
    assert_eq!(initiator.command_number, number + 2);
    served.script.hold(true);
    let first = initiator.command(0, &rw16(READ, 0, 1), 0xc1, 512);
    initiator.send(first, &[]);
    served.script.wait_for(1);
    let mut twice = initiator.command(0, &rw16(READ, 0, 1), 0xc1, 512);
    put(&mut twice, 16, tag_of(&first));
    initiator.send(twice, &[]);
    let reject = initiator.receive().unwrap();
    assert_eq!((reject.opcode(), reject.head[2]), (0x3f, 7));
    served.script.hold(false);
    assert_eq!(initiator.end(tag_of(&first)).status, 0);
    // Ordered tasks and ACA.
    for attribute in [2, 4] {
        let request = initiator.command(0, &[0; 6], 0x80 | attribute, 0);
        initiator.send(request, &[]);
        assert_eq!(initiator.end(tag_of(&request)).sense, Some((5, 0x49, 0)));
    }
    assert_eq!(initiator.read(0, &[0; 6], 0).status, 0);
}

#[test]
fn the_window_and_the_number_of_immediate_commands_are_kept() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    served.script.hold(true);
    let mut tags = Vec::new();
    for _ in 0..200 {
        let request = initiator.command(0, &rw16(READ, 0, 1), 0xc1, 512);
        initiator.send(request, &[]);
        tags.push(tag_of(&request));
    }
    served.script.wait_for(128);
    let mut rejected = 0;
    for _ in 0..20 {
        let mut request = initiator.command(0, &rw16(READ, 0, 1), 0xc1, 512);
        request[0] |= 0x40;
        initiator.send(request, &[]);
    }
    while rejected < 4 {
        let reject = initiator.receive().unwrap();
        assert_eq!((reject.opcode(), reject.head[2]), (0x3f, 6));
        rejected += 1;
    }
    served.script.wait_for(144);
    served.script.hold(false);
    let mut answered = 0;
    while answered < 144 {
        assert_eq!(initiator.receive().unwrap().opcode(), 0x25);
        answered += 1;
    }
    assert_eq!(
        initiator.ping(b"x").data,
        b"x",
        "what was beyond the window is as if it had not come"
    );
}

#[test]
fn who_takes_no_answers_is_not_read_from_and_then_cut_off() {
    let served = Served::with(|options| options.stall = Duration::from_millis(600));
    let mut greedy = served.login(&Login::default());
    greedy
        .stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut request = head(0x40, 0x80, 9);
    put(&mut request, 20, u32::MAX);
    let bytes = greedy.encode(request, &[1; 8192]);
    let mut sent = 0;
    while greedy.stream.write_all(&bytes).is_ok() {
        sent += 1;
        assert!(sent < 10_000, "everything is taken");
    }
    let mut other = served.login(&Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    });
    assert_eq!(other.read(0, &rw16(READ, 0, 1), 512).status, 0);
    std::thread::sleep(Duration::from_millis(1500));
    // It was cut: the rest of what is on its way, and then the end.
    let mut rest = vec![0; 1 << 16];
    while matches!(greedy.stream.read(&mut rest), Ok(1..)) {}
    assert_eq!(other.read(0, &rw16(READ, 0, 1), 512).status, 0);
}

#[test]
fn a_flood_of_logins_leaves_room_for_who_is_there() {
    let served = Served::with(|options| {
        options.connections = 8;
        options.logins = 4;
    });
    let mut initiator = served.login(&Login::default());
    let flood: Vec<_> = (0..100)
        .map(|_| std::net::TcpStream::connect(served.address()))
        .collect();
    for _ in 0..50 {
        assert_eq!(initiator.read(0, &rw16(READ, 0, 8), 4096).status, 0);
    }
    drop(flood);
    // As soon as the flood has gone, others get in again.
    let other = Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    };
    let address = served.address();
    let enters = || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        // Turned away is who is closed at once.
        !matches!(stream.read(&mut [0]), Ok(0))
    };
    while !enters() {}
    served.login(&other);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Headers that are nearly right, with any data, before and after the login.
    #[test]
    fn no_bytes_break_the_target(
        logged_in in any::<bool>(),
        pdus in prop::collection::vec(
            (prop::sample::select(vec![0x00_u8, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10, 0x40, 0x41, 0x44, 0x46, 0x43]),
             any::<[u8; 47]>(), prop::collection::vec(any::<u8>(), 0..64), 0_u8..4),
            1..12,
        ),
    ) {
        let served = Served::start();
        let mut initiator = if logged_in {
            served.login(&Login::default())
        } else {
            Initiator::connect(served.address())
        };
        for (opcode, rest, data, kind) in pdus {
            let mut request = [0; 48];
            request[0] = opcode;
            request[1..].copy_from_slice(&rest);
            if kind > 0 {
                request[4] &= kind & 1;
                let number = initiator.next_number();
                put(&mut request, 24, number);
                request[8..16].fill(0);
            }
            let bytes = initiator.encode(request, &data);
            if initiator.stream.write_all(&bytes).is_err() {
                break;
            }
        }
        drop(initiator);
        let mut next = Initiator::login(served.address(), &Login::default());
        next.settle(0);
    }
}
