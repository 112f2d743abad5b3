//! Clients that mean no good, or know no better: they harm nobody else.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use block_io::nbd::protocol::{command, error, option, reply};

use crate::Served;
use crate::disk::{Disk, Scripted, Shared};
use crate::raw::Client;

fn serve() -> Served {
    limited(|_| {})
}

fn limited(change: impl FnOnce(&mut storage_virtualizer::nbd::NbdOptions)) -> Served {
    let script = Shared::default();
    Served::start(change, move |_| vec![Scripted(Disk::new(&script))])
}

/// Another client is served as if nothing had happened.
fn serves_others(served: &Served) {
    let mut client = Client::ready(&served.socket(), false, &[]);
    assert_eq!(client.ask(command::WRITE, 0, 4096, 512, &[9; 512]), 0);
    client.send(command::READ, 0, 5, 4096, 512, &[]);
    assert_eq!(client.answer().unwrap().data[8..], [9; 512]);
}

#[test]
fn wrong_magic_numbers_end_the_connection() {
    let served = serve();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[0, 0, 0, 3, b'x', b'y'],
        &[0, 0, 0, 99],
    ] {
        let mut client = Client::silent(&served.socket());
        client.stream.write_all(garbage).unwrap();
        client.stream.write_all(&[0; 64]).ok();
        assert!(client.is_closed());
    }
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.stream.write_all(&[7; 28]).unwrap();
    assert!(client.is_closed());
    // Headers of the other kind.
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.extended = true;
    let request = client.request(command::READ, 0, 1, 0, 512);
    client.stream.write_all(&request).unwrap();
    assert!(client.is_closed());
    serves_others(&served);
}

#[test]
fn huge_lengths_cost_nothing() {
    let served = serve();
    // An option of 64 KiB and more is skipped; an endless one is the end.
    let mut client = Client::greeted(&served.socket());
    assert_eq!(client.option(option::GO, &vec![0; 100_000]), [reply::TOO_BIG]);
    assert_eq!(client.option(option::LIST, &[]), [reply::SERVER, reply::ACK]);
    client
        .stream
        .write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")
        .unwrap();
    assert!(client.is_closed());
    // A request beyond the announced maximum is refused, its data are not taken for requests.
    let mut client = Client::ready(&served.socket(), false, &[]);
    assert_eq!(
        client.ask(command::READ, 0, 0, u64::from(u32::MAX), &[]),
        error::INVALID
    );
    let long = (32 << 20) + 512;
    assert_eq!(
        client.ask(command::WRITE, 0, 0, long, &vec![0x25; long as usize]),
        error::INVALID
    );
    assert_eq!(client.ask(command::READ, 0, 0, 512, &[]), 0);
    let request = client.request(command::WRITE, 0, 1, 0, u64::from(u32::MAX));
    client.stream.write_all(&request).unwrap();
    assert!(client.is_closed());
    let mut client = Client::ready(&served.socket(), true, &[]);
    assert_eq!(
        client.ask(command::READ, 0, u64::MAX, u64::MAX, &[]),
        error::INVALID
    );
    assert_eq!(
        client.ask(command::TRIM, 0, 512, u64::MAX - 511, &[]),
        error::INVALID
    );
    let request = client.request(command::WRITE, 1 << 5, 1, 0, u64::MAX);
    client.stream.write_all(&request).unwrap();
    assert!(client.is_closed());
    serves_others(&served);
}

#[test]
fn a_client_that_vanishes_in_the_middle_changes_nothing() {
    let served = serve();
    let message = {
        let client = Client::ready(&served.socket(), false, &[]);
        let mut message = client.request(command::WRITE, 0, 1, 4096, 4096);
        message.extend([0xee; 4096]);
        message
    };
    for cut in [1, 27, 28, 29, 28 + 4095] {
        let mut client = Client::ready(&served.socket(), false, &[]);
        client.stream.write_all(&message[..cut]).unwrap();
        drop(client);
    }
    for cut in 0..20 {
        let mut client = Client::silent(&served.socket());
        client
            .stream
            .write_all(&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a"[..cut])
            .unwrap();
    }
    // Requests in flight when it goes.
    for _ in 0..10 {
        let mut client = Client::ready(&served.socket(), false, &[]);
        for cookie in 0..100 {
            client.send(command::READ, 0, cookie, 0, 1 << 20, &[]);
        }
    }
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.send(command::READ, 0, 1, 4096, 4096, &[]);
    assert!(client.answer().unwrap().data[8..].iter().all(|byte| *byte == 0));
    serves_others(&served);
}

#[test]
fn who_takes_no_replies_is_not_served_further_and_costs_little() {
    let script = Shared::default();
    let shared = Shared::clone(&script);
    let served = Served::start(
        |options| {
            options.memory = 4 << 20;
            options.stall = Duration::from_secs(1);
        },
        move |_| vec![Scripted(Disk::new(&shared))],
    );
    let mut slow = Client::ready(&served.socket(), false, &[]);
    slow.stream.set_nonblocking(true).unwrap();
    let request = slow.request(command::READ, 0, 1, 0, 1 << 20);
    let mut asked = 0;
    while asked < 200 && slow.stream.write_all(&request).is_ok() {
        asked += 1;
    }
    assert!(asked > 20, "{asked}");
    let end = Instant::now() + Duration::from_secs(20);
    while script.lock().unwrap().reads < 4 {
        assert!(Instant::now() < end, "it is not served");
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(300));
    // Four of a megabyte fit, and what has left for the socket.
    let reads = script.lock().unwrap().reads;
    assert!((4..=6).contains(&reads), "{reads}");
    serves_others(&served);
    // In the end it is cut off.
    let end = Instant::now() + Duration::from_secs(20);
    slow.stream.set_nonblocking(false).unwrap();
    while slow.stream.write_all(&request).is_ok() {
        assert!(Instant::now() < end, "it is served for ever");
        thread::sleep(Duration::from_millis(50));
    }
    serves_others(&served);
}

#[test]
fn who_never_chooses_an_export_is_cut_off() {
    let served = limited(|options| options.handshake = Duration::from_millis(300));
    let mut silent = Client::silent(&served.socket());
    let mut busy = Client::greeted(&served.socket());
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        // It is busy with options for ever.
        let sent = busy.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        if sent.is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(silent.is_closed());
    serves_others(&served);
    // Whoever has chosen one may be silent.
    let mut patient = Client::ready(&served.socket(), false, &[]);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(patient.ask(command::READ, 0, 0, 512, &[]), 0);
}

#[test]
fn too_many_connections_are_turned_away_and_the_others_go_on() {
    let served = limited(|options| options.connections = 3);
    let mut first = Client::ready(&served.socket(), false, &[]);
    let others = [Client::silent(&served.socket()), Client::silent(&served.socket())];
    let mut turned_away = UnixStream::connect(served.socket()).unwrap();
    turned_away
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert!(matches!(
        std::io::Read::read(&mut turned_away, &mut [0; 1]),
        Ok(0) | Err(_)
    ));
    assert_eq!(first.ask(command::READ, 0, 0, 512, &[]), 0);
    drop(others);
    thread::sleep(Duration::from_millis(200));
    serves_others(&served);
}

#[test]
fn requests_that_make_no_sense_get_an_answer_each() {
    let served = serve();
    let mut client = Client::ready(&served.socket(), true, &[]);
    let mut state = 1_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..3000 {
        let command = [0, 0, 3, 4, 5, 6, 7, 8, 9, 200][(random() % 10) as usize];
        let flags = if random().is_multiple_of(3) {
            (random() & 0x1f) as u16
        } else {
            0
        };
        let offset = if random().is_multiple_of(4) {
            random()
        } else {
            (random() % 32) * 512 * 1024
        };
        let length = if random().is_multiple_of(4) {
            random()
        } else {
            (random() % 64) * 512
        };
        let cookie = random();
        client.send(command, flags, cookie, offset, length, &[]);
        let answer = client.answer().unwrap();
        assert_eq!((answer.cookie, answer.last), (cookie, true));
    }
    assert_eq!(client.ask(command::WRITE, 0, 0, 512, &[1; 512]), 0);
}
