//! Consoles from end to end: a guest on one side, a terminal, file or socket on the other, a main loop between.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::testing::{Bench, Guest, PATIENCE, options, text};
use super::{Console, ConsoleError, ConsoleHandle, OUTPUT_HIGH, OUTPUT_LIMIT, Pressure};

/// Reads until `expected` has come, and compares.
fn expect(reader: &mut impl Read, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(expected));
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Waits until `condition` holds.
fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A console between two pipes: the end that types, the end that sees.
fn piped() -> (Bench, io::PipeWriter, PipeReader) {
    let (input, keyboard) = io::pipe().unwrap();
    let (screen, output) = io::pipe().unwrap();
    (Bench::on(&input, &output), keyboard, screen)
}

#[test]
fn a_null_console_takes_everything() {
    let handle = ConsoleHandle::null();
    assert_eq!(handle.write(&[0; 4096]), Pressure::Free);
    handle.input_ready();
    assert_eq!(handle.flush(PATIENCE), 0);
}

#[test]
fn a_few_bytes_without_a_line_end_come_soon() {
    let (bench, _keyboard, mut screen) = piped();
    bench.handle().write(b"login: ");
    expect(&mut screen, b"login: ");
    for byte in b"one\n" {
        bench.handle().write(&[*byte]);
    }
    expect(&mut screen, b"one\n");
    bench.assert_idle();
}

#[test]
fn a_line_is_written_without_the_main_loop() {
    let (input, _keyboard) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let console = Console::on_descriptors(input.as_fd(), output.as_fd(), options().0).unwrap();
    console.handle().write(b"Linux version 6.1\n");
    expect(&mut screen, b"Linux version 6.1\n");
}

#[test]
fn descriptors_shared_with_other_processes_stay_blocking() {
    let (input, _keyboard) = io::pipe().unwrap();
    let (_screen, output) = io::pipe().unwrap();
    let _bench = Bench::on(&input, &output);
    for fd in [input.as_fd(), output.as_fd()] {
        let flags = rustix::fs::fcntl_getfl(fd).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    }
}

#[test]
fn what_is_typed_before_the_guest_listens_waits_for_it() {
    let (bench, mut keyboard, _screen) = piped();
    keyboard.write_all(b"early ").unwrap();
    bench.assert_idle();
    let guest = Guest::attach(&bench);
    keyboard.write_all(b"late").unwrap();
    assert_eq!(guest.wait_for(10), b"early late");
}

#[test]
fn input_is_read_only_as_far_as_the_guest_takes_it() {
    let (bench, keyboard, _screen) = piped();
    let guest = Guest::limited(&bench, 1000);
    let sent = text(1 << 20);
    let typed = sent.clone();
    let typist = std::thread::spawn(move || {
        let mut keyboard = keyboard;
        keyboard.write_all(&typed).unwrap();
    });
    assert_eq!(guest.wait_for(1000), sent[..1000]);
    bench.assert_idle();
    assert!(!typist.is_finished(), "1 MiB does not fit into pipe and console");
    for limit in (0..=1 << 20).step_by(7919) {
        guest.set_limit(Some(limit));
        bench.handle().input_ready();
    }
    guest.set_limit(None);
    bench.handle().input_ready();
    assert!(guest.wait_for(sent.len()) == sent);
    typist.join().unwrap();
    bench.assert_idle();
}

#[test]
fn the_end_of_input_is_quiet_and_output_goes_on() {
    let (bench, keyboard, mut screen) = piped();
    let guest = Guest::attach(&bench);
    (&keyboard).write_all(b"last").unwrap();
    drop(keyboard);
    assert_eq!(guest.wait_for(4), b"last");
    bench.assert_idle();
    bench.handle().write(b"still here\n");
    expect(&mut screen, b"still here\n");
}

#[test]
fn input_may_come_from_a_file_or_dev_null() {
    let mut file = tempfile::tempfile().unwrap();
    let script = text(200_000);
    file.write_all(&script).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (_screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&file, &output);
    let guest = Guest::limited(&bench, 1234);
    assert_eq!(guest.wait_for(1234), script[..1234]);
    guest.set_limit(None);
    bench.handle().input_ready();
    assert!(guest.wait_for(script.len()) == script);
    bench.assert_idle();

    let bench = Bench::on(&File::open("/dev/null").unwrap(), &output);
    bench.assert_idle();
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let (bench, _keyboard, mut screen) = piped();
    let guest = Guest::attach(&bench);
    let sent = text(3 << 20);
    let expected = sent.clone();
    let reader = std::thread::spawn(move || {
        let mut seen = vec![0; expected.len()];
        for chunk in seen.chunks_mut(32 << 10) {
            std::thread::sleep(Duration::from_millis(1));
            screen.read_exact(chunk).unwrap();
        }
        assert!(seen == expected);
    });
    let mut waits = 0;
    for chunk in sent.chunks(1000) {
        if bench.handle().write(chunk) == Pressure::Congested {
            waits += 1;
            guest.wait_for_output_ready(waits);
        }
    }
    reader.join().unwrap();
    assert!(waits > 0, "the reader was too fast for this test");
    bench.assert_idle();
}

#[test]
fn a_stuck_reader_is_waited_for_only_so_long_and_never_blocks_a_write() {
    let (bench, _keyboard, mut screen) = piped();
    let guest = Guest::attach(&bench);
    while bench.handle().write(&[b'x'; 1000]) == Pressure::Free {}
    let started = Instant::now();
    guest.wait_for_output_ready(1);
    assert!(started.elapsed() >= Duration::from_millis(500));
    let started = Instant::now();
    for _ in 0..4096 {
        assert_eq!(bench.handle().write(&[b'x'; 1000]), Pressure::Free);
    }
    assert!(started.elapsed() < PATIENCE);
    bench.assert_idle();
    // The reader comes back to life: what fitted into the queue is there, and then what is new.
    bench.handle().write(b"dropped");
    let mut rest = vec![0; OUTPUT_LIMIT];
    screen.read_exact(&mut rest).unwrap();
    assert!(rest.iter().all(|byte| *byte == b'x'));
    bench.handle().write(b"new\n");
    let mut tail = Vec::new();
    while !tail.ends_with(b"new\n") {
        let mut byte = [0];
        screen.read_exact(&mut byte).unwrap();
        tail.push(byte[0]);
    }
    assert!(!tail.windows(7).any(|window| window == b"dropped"));
}

#[test]
fn a_reader_that_leaves_is_forgotten() {
    let (bench, _keyboard, screen) = piped();
    drop(screen);
    for _ in 0..100 {
        assert_eq!(bench.handle().write(&[b'x'; 64 << 10]), Pressure::Free);
        wait_until(|| bench.handle().shared.output().peers.is_empty());
    }
    bench.assert_idle();
}

#[test]
fn what_is_pending_is_written_when_the_console_is_dropped() {
    let (bench, _keyboard, mut screen) = piped();
    let sent = text(OUTPUT_HIGH);
    bench.handle().write(&sent);
    bench.handle().write(b"the end");
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        std::thread::sleep(Duration::from_millis(50));
        let mut part = [0; 4096];
        while !seen.ends_with(b"the end") {
            let count = screen.read(&mut part).unwrap();
            assert!(count > 0);
            seen.extend(&part[..count]);
        }
        seen.len()
    });
    drop(bench);
    assert_eq!(reader.join().unwrap(), OUTPUT_HIGH + 7);
}

#[test]
fn a_file_is_appended_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.log");
    std::fs::write(&path, "before\n").unwrap();
    let bench = Bench::open(&format!("file:{}", path.display()));
    bench.handle().write(b"one\n");
    bench.handle().write(b"two");
    wait_until(|| std::fs::read(&path).unwrap() == b"before\none\ntwo");
    bench.assert_idle();
    bench.handle().write(b" and all");
    drop(bench);
    assert_eq!(std::fs::read(&path).unwrap(), b"before\none\ntwo and all");
}

#[test]
fn a_late_client_of_a_socket_sees_what_was_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let bench = Bench::open(&format!("socket:{}", path.display()));
    let guest = Guest::attach(&bench);
    bench.handle().write(b"booting\nlogin: ");

    let mut first = connect(&path);
    expect(&mut first, b"booting\nlogin: ");
    first.write_all(b"root\r").unwrap();
    assert_eq!(guest.wait_for(5), b"root\r");
    bench.handle().write(b"root\r\n");

    let mut second = connect(&path);
    expect(&mut second, b"booting\nlogin: root\r\n");
    expect(&mut first, b"root\r\n");
    bench.handle().write(b"# ");
    expect(&mut first, b"# ");
    expect(&mut second, b"# ");
    bench.assert_idle();

    drop(first);
    bench.handle().write(b"ls\n");
    expect(&mut second, b"ls\n");
    drop(second);
    bench.assert_idle();
    drop(bench);
    assert!(!path.exists());
}

#[test]
fn history_is_limited_and_starts_at_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let bench = Bench::open(&format!("socket:{}", path.display()));
    bench.handle().write(&text(1 << 20));
    let mut client = connect(&path);
    let mut first = [0; 8];
    client.read_exact(&mut first).unwrap();
    // 64 KiB are 8192 lines of 8 bytes; of the oldest, the line end may be lost.
    let line: usize = String::from_utf8_lossy(&first).trim().parse().unwrap();
    assert!(((1 << 20) / 8 - line).abs_diff(8192) <= 1, "{line}");
}

#[test]
fn a_client_that_only_types_is_heard_and_then_hears() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let bench = Bench::open(&format!("socket:{}", path.display()));
    let guest = Guest::attach(&bench);
    let mut client = connect(&path);
    client.write_all(b"halt\r").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.wait_for(5), b"halt\r");
    bench.assert_idle();
    bench.handle().write(b"bye\n");
    expect(&mut client, b"bye\n");
    drop(client);
    wait_until(|| bench.handle().shared.output().peers.is_empty());
    bench.assert_idle();
}

#[test]
fn one_client_too_many_replaces_the_oldest() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let bench = Bench::open(&format!("socket:{}", path.display()));
    bench.handle().write(b"hello\n");
    let mut clients: Vec<_> = (0..9)
        .map(|_| {
            let mut client = connect(&path);
            expect(&mut client, b"hello\n");
            client
        })
        .collect();
    assert_eq!(
        clients[0].read(&mut [0; 8]).unwrap(),
        0,
        "the oldest was disconnected"
    );
    bench.handle().write(b"more\n");
    clients[1..]
        .iter_mut()
        .for_each(|client| expect(client, b"more\n"));
}

#[test]
fn a_stuck_client_does_not_hold_up_another() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let bench = Bench::open(&format!("socket:{}", path.display()));
    bench.handle().write(b"x");
    let _stuck = connect(&path);
    let mut reading = connect(&path);
    expect(&mut reading, b"x");
    wait_until(|| bench.handle().shared.output().peers.len() == 2);
    let sent = text(4 << 20);
    for chunk in sent.chunks(64 << 10) {
        bench.handle().write(chunk);
        expect(&mut reading, chunk);
    }
}

#[test]
fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let spec = format!("socket:{}", path.display()).parse().unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let console = Console::open(&spec, options().0).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let error = Console::open(&spec, options().0).err().unwrap();
    assert!(matches!(error, ConsoleError::InUse(_)), "{error}");
    drop(console);
    std::fs::write(&path, "precious").unwrap();
    let error = Console::open(&spec, options().0).err().unwrap();
    assert!(
        error.to_string().contains("exists and is not a socket"),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn errors_name_path_and_reason() {
    for (spec, expected) in [
        (
            "file:/nowhere/log",
            "cannot open the file /nowhere/log of a console",
        ),
        (
            "socket:/nowhere/s",
            "cannot find the folder of /nowhere/s of a console",
        ),
        (
            "pty:/nowhere/l",
            "cannot make the symbolic link /nowhere/l of a console",
        ),
    ] {
        let error = Console::open(&spec.parse().unwrap(), options().0).err().unwrap();
        assert_eq!(error.to_string(), expected);
        assert!(std::error::Error::source(&error).is_some());
    }
    let long = format!("socket:/{}", "x".repeat(200)).parse().unwrap();
    let error = Console::open(&long, options().0).err().unwrap();
    assert!(matches!(error, ConsoleError::PathTooLong(_)));
}

fn open_terminal(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .unwrap()
}

#[test]
fn clients_of_a_pseudo_terminal_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("tty");
    let bench = Bench::open(&format!("pty:{}", link.display()));
    let guest = Guest::attach(&bench);
    let path = bench.console.as_ref().unwrap().path().unwrap().to_owned();
    assert_eq!(std::fs::read_link(&link).unwrap(), path);
    bench.handle().write(b"nobody hears this\n");
    bench.assert_idle();

    let mut input = 0;
    for round in 0..3 {
        let mut client = open_terminal(&link);
        let history = b"nobody hears this\n".len() + round * 3;
        let mut seen = vec![0; history];
        client.read_exact(&mut seen).unwrap();
        assert!(seen.starts_with(b"nobody hears this\n"));
        client.write_all(b"\x03\r\n\x1dq").unwrap();
        input += 5;
        assert!(
            guest.wait_for(input).ends_with(b"\x03\r\n\x1dq"),
            "every byte comes as it was typed"
        );
        bench.handle().write(b"ok\n");
        expect(&mut client, b"ok\n");
        drop(client);
        wait_until(|| bench.handle().shared.output().peers.is_empty());
        bench.assert_idle();
    }
    drop(bench);
    assert!(link.symlink_metadata().is_err());
}

#[test]
fn a_client_that_leaves_without_reading_frees_the_guest() {
    let bench = Bench::open("pty");
    let guest = Guest::attach(&bench);
    let client = open_terminal(bench.console.as_ref().unwrap().path().unwrap());
    wait_until(|| bench.handle().shared.output().peers.len() == 1);
    while bench.handle().write(&[b'x'; 1000]) == Pressure::Free {}
    drop(client);
    guest.wait_for_output_ready(1);
    assert_eq!(bench.handle().write(b"on\n"), Pressure::Free);
    bench.assert_idle();
}

#[test]
fn what_a_client_wrote_who_left_at_once_is_heard() {
    let bench = Bench::open("pty");
    let guest = Guest::attach(&bench);
    let path = bench.console.as_ref().unwrap().path().unwrap().to_owned();
    for round in 1..=20 {
        open_terminal(&path).write_all(b"echo\r").unwrap();
        guest.wait_for(round * 5);
    }
    bench.assert_idle();
}

#[test]
fn a_pseudo_terminal_passes_a_mebibyte_each_way() {
    let bench = Bench::open("pty");
    let guest = Guest::limited(&bench, 0);
    let path = bench.console.as_ref().unwrap().path().unwrap().to_owned();
    let sent = text(1 << 20);
    let typed = sent.clone();
    let typist = std::thread::spawn(move || open_terminal(&path).write_all(&typed).unwrap());
    for limit in (0..=1 << 20).step_by(10_007) {
        guest.set_limit(Some(limit));
        bench.handle().input_ready();
        guest.wait_for(limit);
    }
    guest.set_limit(None);
    bench.handle().input_ready();
    assert!(guest.wait_for(sent.len()) == sent);
    typist.join().unwrap();

    let path = bench.console.as_ref().unwrap().path().unwrap().to_owned();
    let mut client = open_terminal(&path);
    wait_until(|| bench.handle().shared.output().peers.len() == 1);
    let expected = sent.clone();
    let reader = std::thread::spawn(move || {
        let mut seen = vec![0; expected.len()];
        client.read_exact(&mut seen).unwrap();
        assert!(seen == expected);
    });
    let mut waits = 0;
    for chunk in sent.chunks(100) {
        if bench.handle().write(chunk) == Pressure::Congested {
            waits += 1;
            guest.wait_for_output_ready(waits);
        }
    }
    reader.join().unwrap();
}

#[test]
fn a_link_replaces_an_old_link_but_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("tty");
    std::os::unix::fs::symlink("/dev/pts/does-not-exist", &link).unwrap();
    let spec = format!("pty:{}", link.display()).parse().unwrap();
    let console = Console::open(&spec, options().0).unwrap();
    assert_eq!(std::fs::read_link(&link).unwrap(), console.path().unwrap());
    drop(console);
    std::fs::write(&link, "precious").unwrap();
    let error = Console::open(&spec, options().0).err().unwrap();
    assert!(
        error.to_string().contains("exists and is not a symbolic link"),
        "{error}"
    );
}
