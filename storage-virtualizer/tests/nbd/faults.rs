//! Disks that fail, and disks that take their time.

use std::thread;
use std::time::{Duration, Instant};

use block_io::Operation;
use block_io::nbd::protocol::{chunk, command, error, flag, u32_at, u64_at};

use crate::Served;
use crate::disk::{Disk, Scripted, Shared, release};
use crate::raw::Client;

fn serve(script: &Shared) -> Served {
    let script = Shared::clone(script);
    Served::start(|_| {}, move |_| vec![Scripted(Disk::new(&script))])
}

#[test]
fn failures_of_the_disk_reach_the_client_as_failures() {
    let script = Shared::default();
    let served = serve(&script);
    for extended in [false, true] {
        let mut client = Client::ready(&served.socket(), extended, &[]);
        for (operation, command, length) in [
            (Operation::Read, command::READ, 4096),
            (Operation::Write, command::WRITE, 512),
            (Operation::Flush, command::FLUSH, 0),
            (Operation::Discard, command::TRIM, 4096),
            (Operation::WriteZeroes, command::WRITE_ZEROES, 4096),
        ] {
            let data = vec![1; if command == command::WRITE { 512 } else { 0 }];
            for (errno, expected) in [
                (5, error::IO),
                (28, error::NO_SPACE),
                (108, error::IO),
                (95, error::NOT_SUPPORTED),
            ] {
                script.lock().unwrap().errors = vec![(operation, errno)];
                assert_eq!(client.ask(command, 0, 0, length, &data), expected, "{operation}");
            }
            script.lock().unwrap().errors.clear();
            assert_eq!(client.ask(command, 0, 0, length, &data), 0, "{operation}");
        }
        // Made durable by a flush, which fails.
        script.lock().unwrap().errors = vec![(Operation::Flush, 5)];
        for command in [command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(client.ask(command, flag::FUA, 0, 4096, &[]), error::IO);
            assert_eq!(client.ask(command, 0, 0, 4096, &[]), 0);
        }
        script.lock().unwrap().errors.clear();
    }
}

#[test]
fn a_failure_comes_with_words() {
    let script = Shared::default();
    let served = serve(&script);
    script.lock().unwrap().errors = vec![(Operation::Read, 5)];
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.send(command::READ, 0, 3, 4096, 512, &[]);
    let answer = client.answer().unwrap();
    assert_eq!(
        (answer.kind, answer.error, answer.cookie),
        (chunk::ERROR, error::IO, 3)
    );
    let words = String::from_utf8_lossy(&answer.data[6..]).into_owned();
    assert!(
        words.contains("read of 512 bytes at offset 4096 failed on test disk: Input/output error"),
        "{words}"
    );
}

#[test]
fn force_unit_access_reaches_the_disk() {
    let script = Shared::default();
    let counts = || {
        let script = script.lock().unwrap();
        (script.durable, script.flushes)
    };
    let served = serve(&script);
    let mut client = Client::ready(&served.socket(), false, &[]);
    assert_eq!(client.ask(command::WRITE, 0, 0, 512, &[1; 512]), 0);
    assert_eq!(counts(), (0, 0));
    assert_eq!(client.ask(command::WRITE, flag::FUA, 0, 512, &[1; 512]), 0);
    assert_eq!(client.ask(command::TRIM, flag::FUA, 0, 512, &[]), 0);
    assert_eq!(client.ask(command::WRITE_ZEROES, flag::FUA, 0, 512, &[]), 0);
    assert_eq!(client.ask(command::FLUSH, 0, 0, 0, &[]), 0);
    assert_eq!(counts(), (1, 3));
}

#[test]
fn what_is_written_is_made_to_survive_the_server() {
    let script = Shared::default();
    let served = serve(&script);
    let mut client = Client::ready(&served.socket(), false, &[]);
    for (command, flags, settled) in [
        (command::WRITE, 0, 1),
        (command::WRITE, flag::FUA, 1),
        (command::WRITE_ZEROES, 0, 2),
        (command::WRITE_ZEROES, flag::FUA, 2),
        (command::READ, 0, 2),
    ] {
        let data = vec![1; if command == command::WRITE { 512 } else { 0 }];
        assert_eq!(client.ask(command, flags, 0, 512, &data), 0);
        assert_eq!(script.lock().unwrap().settled, settled, "{command} {flags}");
    }
}

#[test]
fn a_slow_request_holds_up_no_other() {
    let script = Shared::default();
    let served = serve(&script);
    script.lock().unwrap().held = Some(4096);
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.send(command::READ, 0, 1, 4096, 512, &[]);
    for cookie in 2..50 {
        client.send(command::READ, 0, cookie, 0, 512, &[]);
        assert_eq!(client.answer().unwrap().cookie, cookie);
    }
    release(&script);
    assert_eq!(client.answer().unwrap().cookie, 1);
}

#[test]
fn extents_of_several_contexts_come_in_chunks() {
    let served = serve(&Shared::default());
    for extended in [false, true] {
        let contexts = [
            "base:allocation",
            "smsvmm:changed:monday",
            "qemu:dirty-bitmap:monday",
        ];
        let mut client = Client::ready(&served.socket(), extended, &contexts);
        client.send(command::BLOCK_STATUS, 0, 4, 512 << 10, 2 << 20, &[]);
        let mut all = Vec::new();
        loop {
            let answer = client.answer().unwrap();
            let id = u32_at(&answer.data, 0).unwrap();
            let list: Vec<(u64, u64)> = if extended {
                let number = |at| u64_at(&answer.data, at).unwrap();
                (8..answer.data.len())
                    .step_by(16)
                    .map(|at| (number(at), number(at + 8)))
                    .collect()
            } else {
                let number = |at| u64::from(u32_at(&answer.data, at).unwrap());
                (4..answer.data.len())
                    .step_by(8)
                    .map(|at| (number(at), number(at + 4)))
                    .collect()
            };
            all.push((id, list));
            if answer.last {
                break;
            }
        }
        let changed = vec![(512 << 10, 1), (1536 << 10, 0)];
        let allocated = vec![(512 << 10, 0), (1 << 20, 3), (512 << 10, 0)];
        assert_eq!(all, [(1, allocated), (2, changed.clone()), (3, changed)]);
        client.send(command::BLOCK_STATUS, flag::REQUEST_ONE, 5, 0, 4 << 20, &[]);
        for last in [false, false, true] {
            let answer = client.answer().unwrap();
            assert_eq!(
                (answer.last, answer.data.len()),
                (last, if extended { 24 } else { 12 })
            );
        }
    }
}

#[test]
fn a_stop_finishes_what_is_in_flight_and_refuses_what_comes_later() {
    let script = Shared::default();
    let mut served = serve(&script);
    script.lock().unwrap().held = Some(4096);
    let mut client = Client::ready(&served.socket(), false, &[]);
    client.send(command::READ, 0, 1, 4096, 512, &[]);
    while script.lock().unwrap().reads == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let stopper = thread::spawn(move || {
        served.stop();
        served
    });
    let end = Instant::now() + Duration::from_secs(20);
    while client.ask(command::READ, 0, 0, 512, &[]) != error::SHUTDOWN {
        assert!(Instant::now() < end, "it goes on");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!stopper.is_finished());
    release(&script);
    let answer = client.answer().unwrap();
    assert_eq!((answer.cookie, answer.error), (1, 0));
    assert!(client.is_closed());
    drop(client);
    let served = stopper.join().unwrap();
    assert!(!served.socket().exists());
}

#[test]
fn a_stop_waits_for_no_idle_client() {
    let script = Shared::default();
    let mut served = serve(&script);
    let idle = Client::ready(&served.socket(), false, &[]);
    let shaking = Client::silent(&served.socket());
    let start = Instant::now();
    served.stop();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    for mut client in [idle, shaking] {
        assert!(client.is_closed());
    }
}
