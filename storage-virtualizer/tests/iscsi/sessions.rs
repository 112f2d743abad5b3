//! Sessions with one or several connections: the order of commands, reinstatement, reservations, the end.

use std::time::Duration;

use crate::Served;
use crate::initiator::{Initiator, Login, READ, WRITE, head, put, rw16, tag_of};

/// A further connection of the session of `first`.
fn join(served: &Served, first: &Initiator, cid: u16) -> (Initiator, u16) {
    let login = Login {
        tsih: first.tsih,
        cid,
        command_number: first.command_number,
        ..Login::default()
    };
    let mut second = Initiator::connect(served.address());
    let status = second.log_in(&login);
    (second, status)
}

fn several() -> Login {
    Login::default().key("MaxConnections", "2")
}

#[test]
fn commands_are_done_in_the_order_of_their_numbers_on_whatever_connection() {
    let served = Served::start();
    let mut one = served.login(&several());
    let (mut two, status) = join(&served, &one, 1);
    assert_eq!(status, 0);
    let number = one.command_number;
    // The second comes first, on the second connection; a third one as well.
    for (offset, fill) in [(1, 0xbb), (2, 0xcc)] {
        let mut request = two.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
        put(&mut request, 24, number + offset);
        two.send(request, &[fill; 512]);
    }
    // A duplicate and one that is far away are as if they had not come.
    for other in [number + 1, number + 5000, number.wrapping_sub(1)] {
        let mut request = two.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
        put(&mut request, 24, other);
        two.send(request, &[0xee; 512]);
    }
    assert_eq!(
        two.ping(b"x").opcode(),
        0x20,
        "nothing is answered before its turn"
    );
    let first = one.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    one.send(first, &[0xaa; 512]);
    assert_eq!(one.end(tag_of(&first)).status, 0);
    for _ in 0..2 {
        assert_eq!(two.receive().unwrap().opcode(), 0x21);
    }
    one.command_number = number + 3;
    let read = one.read(0, &rw16(READ, 0, 1), 512);
    assert_eq!(read.data, [0xcc; 512]);
}

#[test]
fn a_session_has_as_many_connections_as_was_agreed_on_and_ends_with_one_that_is_lost() {
    let served = Served::start();
    let mut one = served.login(&several());
    let (mut two, _) = join(&served, &one, 1);
    assert_eq!(join(&served, &one, 2).1, 0x0206);
    // The same connection again takes the place of the old one.
    let (mut again, status) = join(&served, &one, 1);
    assert_eq!(status, 0);
    assert!(two.is_gone());
    assert_eq!(again.ping(b"x").data, b"x");
    // One that logs out leaves the other.
    again.command_number = one.command_number;
    assert_eq!(again.log_out(1, 1), 0);
    assert!(again.is_gone());
    assert_eq!(one.ping(b"y").data, b"y");
    assert_eq!(one.log_out(1, 9), 1, "no such connection");
    assert_eq!(one.log_out(2, 0), 2, "nothing is recovered");
    let (three, status) = join(&served, &one, 3);
    assert_eq!(status, 0);
    drop(three);
    assert!(one.is_gone());
    assert_eq!(join(&served, &one, 4).1, 0x020a);
}

#[test]
fn a_new_login_of_the_same_port_ends_its_old_session_after_what_the_disk_does() {
    let served = Served::start();
    let mut old = served.login(&Login::default());
    let mut other = served.login(&Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    });
    served.script.hold(true);
    let request = old.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    old.send(request, &[0xaa; 512]);
    served.script.wait_for(1);
    let address = served.address();
    let new = std::thread::spawn(move || {
        let mut new = Initiator::login(address, &Login::default());
        new.settle(0);
        assert_eq!(new.write(0, &rw16(WRITE, 0, 1), &[0xbb; 512], 512, 0).status, 0);
        new
    });
    assert!(old.is_gone());
    assert!(!new.is_finished(), "the old session's command is at the disk");
    served.script.hold(false);
    let mut new = new.join().unwrap();
    assert_eq!(new.read(0, &rw16(READ, 0, 1), 512).data, [0xbb; 512]);
    assert_eq!(other.ping(b"x").data, b"x");
}

/// PERSISTENT RESERVE OUT.
fn persistent(initiator: &mut Initiator, action: u8, kind: u8, key: u64, new: u64) -> u8 {
    let mut cdb = [0; 10];
    (cdb[0], cdb[1], cdb[2], cdb[8]) = (0x5f, action, kind, 24);
    let mut list = [0; 24];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&new.to_be_bytes());
    initiator.write(0, &cdb, &list, 24, 0).status
}

#[test]
fn reservations_hold_between_sessions_and_persistent_ones_outlive_them() {
    let served = Served::start();
    let second = Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    };
    let mut one = served.login(&Login::default());
    let mut two = served.login(&second);
    assert_eq!(persistent(&mut one, 0, 0, 0, 7), 0);
    // Exclusive access.
    assert_eq!(persistent(&mut one, 1, 3, 7, 0), 0);
    assert_eq!(two.read(0, &rw16(READ, 0, 1), 512).status, 0x18);
    assert_eq!(one.log_out(0, 0), 0);
    assert_eq!(
        two.read(0, &rw16(READ, 0, 1), 512).status,
        0x18,
        "it outlives its session"
    );
    // The same port is still the holder.
    let mut again = served.login(&Login::default());
    assert_eq!(again.read(0, &rw16(READ, 0, 1), 512).status, 0);
    assert_eq!(persistent(&mut again, 3, 0, 7, 0), 0);
    // An old reservation goes with its session.
    assert_eq!(again.read(0, &[0x16, 0, 0, 0, 0, 0], 0).status, 0);
    while two.read(0, &[0; 6], 0).sense.is_some() {}
    assert_eq!(two.read(0, &rw16(READ, 0, 1), 512).status, 0x18);
    drop(again);
    let gone = |two: &mut Initiator| two.read(0, &rw16(READ, 0, 1), 512).status == 0;
    while !gone(&mut two) {}
}

#[test]
fn who_says_nothing_is_asked_and_then_cut_off() {
    let served =
        Served::with(|options| options.ping = (Duration::from_millis(10), Duration::from_millis(1500)));
    let mut initiator = served.login(&Login::default());
    let asked = initiator.receive().unwrap();
    assert_eq!((asked.opcode(), asked.tag()), (0x20, u32::MAX));
    assert_ne!(asked.u32(20), u32::MAX, "it wants an answer");
    let mut answer = head(0x40, 0x80, u32::MAX);
    put(&mut answer, 20, asked.u32(20));
    put(&mut answer, 24, initiator.command_number);
    initiator.send(answer, &[]);
    let again = initiator.receive().unwrap();
    assert_eq!(again.opcode(), 0x20);
    assert!(initiator.is_gone());
}

#[test]
fn a_stop_asks_to_log_out_finishes_what_was_asked_for_and_ends() {
    let mut served = Served::start();
    let mut initiator = served.login(&Login::default());
    served.script.hold(true);
    let request = initiator.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[1; 512]);
    served.script.wait_for(1);
    let server = served.server.take().unwrap();
    let stopped = std::thread::spawn(move || server.stop());
    let told = initiator.receive().unwrap();
    assert_eq!((told.opcode(), told.head[36]), (0x32, 1));
    let told = initiator.receive().unwrap();
    assert_eq!((told.opcode(), told.head[36]), (0x32, 3));
    served.script.hold(false);
    let answer = initiator.receive().expect("the command has no answer");
    assert_eq!(
        (answer.opcode(), answer.tag(), answer.head[3]),
        (0x21, tag_of(&request), 0)
    );
    assert!(initiator.is_gone());
    stopped.join().unwrap();
}

#[test]
fn a_lost_session_leaves_nothing_that_a_new_one_waits_for() {
    // Memory for one command; others wait for it, and one waits for its data.
    let served = Served::with(|options| options.memory = 512);
    for _ in 0..3 {
        let mut initiator = served.login(&Login::default());
        served.script.hold(true);
        for number in 0..4 {
            let request = initiator.command(0, &rw16(READ, number, 1), 0xc1, 512);
            initiator.send(request, &[]);
        }
        let request = initiator.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
        initiator.send(request, &[]);
        // Whoever has the memory is asked for its data, or held by the disk; a ping says that all have come.
        let mut ping = head(0x40, 0x80, 98);
        put(&mut ping, 20, u32::MAX);
        put(&mut ping, 24, initiator.command_number);
        initiator.send(ping, &[]);
        while initiator.receive().unwrap().opcode() != 0x20 {}
        drop(initiator);
        served.script.hold(false);
        // What comes together with the end of its session is not done.
        let mut next = served.login(&Login::default());
        let mut reset = head(0x42, 0x87, 99);
        put(&mut reset, 24, next.command_number);
        let mut bytes = next.encode(reset, &[]);
        let late = next.command(0, &rw16(WRITE, 9, 1), 0xa1, 512);
        bytes.extend(next.encode(late, &[0xdd; 512]));
        std::io::Write::write_all(&mut next.stream, &bytes).unwrap();
        assert!(next.is_gone());
    }
    served.login(&Login::default());
}
