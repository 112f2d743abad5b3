//! Consoles: text arrives whole in both directions, whoever is at the other end, and nobody there can stop the guest.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use stories::{Host, Mode, Story, Vm, story};

/// How long to wait for text; a lab on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(100);

const MIB: usize = 1 << 20;
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_RIGHT_BRACKET: &str = "\x1d";

/// Numbered lines of text, so that a missing, doubled or moved piece shows.
fn text(size: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(size + 100);
    for number in 0_usize.. {
        if text.len() >= size {
            break;
        }
        let rest = "the quick brown fox".repeat(number % 4);
        text.extend_from_slice(format!("line {number}: {rest}\n").as_bytes());
    }
    text.truncate(size);
    text
}

/// Reads until `expected` has come; returns all that came.
fn read_until(from: &mut impl Read, expected: &str) -> Result<Vec<u8>> {
    let (end, mut all, mut piece) = (Instant::now() + PATIENCE, Vec::new(), [0; 16 << 10]);
    while !all.ends_with(expected.as_bytes()) {
        ensure!(
            Instant::now() < end,
            "no {expected:?} at the end of {} bytes",
            all.len()
        );
        let count = from
            .read(&mut piece)
            .with_context(|| format!("waiting for {expected:?}"))?;
        ensure!(
            count > 0,
            "the console ended after {} bytes without {expected:?}",
            all.len()
        );
        all.extend_from_slice(piece.get(..count).unwrap_or_default());
    }
    Ok(all)
}

/// A client of a machine's socket.
fn client(path: &Path) -> Result<UnixStream> {
    let client = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    Ok(client)
}

/// Both sides send `sent` at the same time.
fn both_ways(vm: &mut Vm, client: &mut UnixStream, sent: &[u8]) -> Result<()> {
    let line = format!(
        "head -c {} <&3 > /tmp/in & cat /text >&3; wait; cmp /tmp/in /text",
        sent.len()
    );
    vm.begin(&line)?;
    let mut typist = client.try_clone()?;
    let received = std::thread::scope(|scope| {
        let typing = scope.spawn(move || typist.write_all(sent));
        let mut received = vec![0; sent.len()];
        client.read_exact(&mut received)?;
        typing.join().unwrap_or(Ok(()))?;
        anyhow::Ok(received)
    })?;
    ensure!(received == sent, "the guest's text has changed on its way");
    assert_eq!(
        vm.end_of(&line)?,
        (0, String::new()),
        "the guest got something else"
    );
    Ok(())
}

/// A client that does not read: the guest goes on, what is lost is said, and afterwards the console is as good as before.
fn a_stuck_reader(vm: &mut Vm, client: &mut UnixStream) -> Result<()> {
    let begin = Instant::now();
    vm.guest("head -c 3145728 /dev/zero | tr '\\0' x >&3")?;
    println!("3 MiB that nobody read: {:.1} s", begin.elapsed().as_secs_f64());
    vm.until_logged("nobody reads the output; it is dropped from 1 MiB on")?;
    // 1 MiB is kept, and what the socket holds.
    client.read_exact(&mut vec![0; MIB])?;
    vm.guest("sleep 1; echo; echo alive >&3")?;
    let rest = read_until(client, "alive\n")?.len();
    ensure!(rest < MIB, "{rest} bytes more than were to be kept");
    vm.until_logged("bytes of output were lost")
}

/// A person at a terminal: keys reach the guest, but for the escape key.
fn a_person_at_a_terminal(vm: &mut Vm) -> Result<()> {
    // A shell on the guest's console, as a login would start it (`&` would have it ignore Ctrl-C).
    vm.guest(
        "exec 3>&-; start-stop-daemon -S -b -p /tmp/none -a $(which setsid) -- sh -c 'exec sh -i <> /dev/hvc0 >&0 2>&1'",
    )?;
    let mut person = vm.on_a_terminal(&["vm", "--config", "vm.toml", "console", "virtio"])?;
    person.until("Connected to socket; Ctrl-] then d leaves.")?;
    person.type_text("\r")?;
    person.until("# ")?;
    assert_eq!(person.mode()?, Mode::Raw);
    person.type_text("echo a$((40 + 2))\r")?;
    person.until("a42")?;

    // Ctrl-C ends what runs in the guest, not the console. Who says "go" is the one to be ended: if the shell said it, that would
    // be interrupted before it has started the other.
    person.until("# ")?;
    person.type_text("sh -c 'echo go; exec sleep 1000'\r")?;
    person.until("go\r\n")?;
    person.type_text(CTRL_C)?;
    person.until("# ")?;
    person.type_text("echo status $?\r")?;
    person.until("status 130")?;
    assert!(!person.has_ended()?);

    // The escape key: twice is once for the guest, with another key it is for us.
    person.until("# ")?;
    person.type_text("echo now; cat -v\r")?;
    person.until("now\r\n")?;
    person.type_text(&format!("<{CTRL_RIGHT_BRACKET}{CTRL_RIGHT_BRACKET}>\r"))?;
    person.until("\n<^]>")?;
    person.type_text(&format!("{CTRL_RIGHT_BRACKET}h"))?;
    person.until("leave the console, the VM goes on")?;
    person.type_text(CTRL_D)?;
    person.until("# ")?;
    person.type_text(&format!("{CTRL_RIGHT_BRACKET}d"))?;
    assert_eq!(person.wait()?, Some(0));
    assert_eq!(
        person.mode()?,
        Mode::Cooked,
        "the terminal is given back as it was"
    );
    vm.guest("true")?;

    // Who closes the window, or ends the program, gets the terminal back as well.
    let mut person = vm.on_a_terminal(&["vm", "--config", "vm.toml", "console", "virtio"])?;
    person.until("Connected to socket")?;
    person.type_text("echo b$((40 + 2))\r")?;
    person.until("b42")?;
    assert_eq!(person.mode()?, Mode::Raw);
    person.signal(Signal::TERM)?;
    assert_ne!(person.wait()?, Some(0));
    assert_eq!(
        person.mode()?,
        Mode::Cooked,
        "the terminal is given back as it was"
    );
    vm.guest("true").map(drop)
}

#[test]
fn a_socket_serves_late_slow_and_human_clients_of_the_virtio_console() {
    Story::default().limit(Duration::from_secs(400)).tell(|host| {
        let sent = text(MIB);
        let mut vm = host
            .vm("socket")
            .memory("512M")
            .file("text", 0o644, sent.clone())
            .toml("[console]\nvirtio = \"socket:hvc.sock\"")
            .limit(Duration::from_secs(380))
            .interactive()?;
        let socket = vm.folder().join("hvc.sock");

        // Before anybody is there.
        vm.guest("exec 3<> /dev/hvc0; stty raw -echo <&3; for n in 1 2 3; do echo early $n >&3; done")?;
        let mut late = client(&socket)?;
        assert_eq!(
            read_until(&mut late, "early 3\n")?,
            b"early 1\nearly 2\nearly 3\n"
        );

        both_ways(&mut vm, &mut late, &sent)?;
        a_stuck_reader(&mut vm, &mut late)?;
        drop(late);
        a_person_at_a_terminal(&mut vm)?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn files_take_what_both_consoles_say() {
    story(|host| {
        let sent = text(MIB);
        let guest = host
            .vm("files")
            .file("text", 0o644, sent.clone())
            .toml("[console]\nserial = \"file:serial\"\nvirtio = \"file:virtio\"")
            .script("exec > /dev/hvc0; stty raw -echo < /dev/hvc0; cat /text; sleep 1; echo guest: bye > /dev/ttyS0")
            .limit(PATIENCE)
            .run()?
            .success()?;
        assert_eq!(guest.console, "", "nothing on standard output");
        let serial = fs::read_to_string(host.folder().join("files/serial"))?;
        ensure!(
            serial.contains("guest: init at") && serial.contains("guest: bye"),
            "{serial}"
        );
        ensure!(
            fs::read(host.folder().join("files/virtio"))? == sent,
            "the text has changed on its way"
        );
        Ok(())
    });
}

/// `size` bytes each way, one after the other, through the serial port and a pseudo-terminal; and a person at the end.
fn through_the_serial_port(host: &Host, size: usize, limit: Duration) -> Result<()> {
    let sent = text(size);
    let vm = host
        .vm("pty")
        .file("text", 0o644, sent.clone())
        .toml("[console]\nserial = \"pty:line\"")
        // Cooked again for the person.
        .script(&format!(
            "saved=$(stty -g); stty raw -echo; echo guest: ready; head -c {size} > /tmp/in; cmp /tmp/in /text && echo guest: same; \
             cat /text; echo guest: sent; stty $saved; read -r line; echo guest: got $line"
        ))
        .limit(limit)
        .start()?;
    let path = vm.folder().join("line");
    let begin = Instant::now();
    while !path.exists() {
        ensure!(begin.elapsed() < PATIENCE, "there is no {}", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    // Late on purpose: the kernel has begun to talk.
    std::thread::sleep(Duration::from_secs(2));
    let mut line = OpenOptions::new().read(true).write(true).open(&path)?;
    let before = read_until(&mut line, "guest: ready\n")?;
    ensure!(
        String::from_utf8_lossy(&before).contains("guest: init at"),
        "what came first is lost"
    );
    let begin = Instant::now();
    line.write_all(&sent)?;
    read_until(&mut line, "guest: same\n").context("the guest got something else")?;
    println!(
        "{size} bytes to the guest: {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    let begin = Instant::now();
    let received = read_until(&mut line, "guest: sent\n")?;
    ensure!(
        received.strip_suffix(b"guest: sent\n") == Some(&sent),
        "the guest's text has changed on its way"
    );
    println!(
        "{size} bytes from the guest: {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    drop(line);

    let mut person = vm.on_a_terminal(&["vm", "--config", "vm.toml", "console"])?;
    person.until("Connected to pty")?;
    person.type_text("bye\r")?;
    person.until("guest: got bye")?;
    assert_eq!(person.wait()?, Some(0), "the console ends with the machine");
    assert_eq!(person.mode()?, Mode::Cooked);
    assert_eq!(vm.wait(PATIENCE)?.exit_code(), Some(0));
    ensure!(!path.exists(), "the link is left behind");
    Ok(())
}

/// A byte through a serial port takes one or two VM exits, which are slow in the lab: the whole mebibyte is for the next story.
#[test]
fn a_pseudo_terminal_serves_the_serial_port() {
    story(|host| through_the_serial_port(host, 16 << 10, Duration::from_secs(220)));
}

#[test]
#[ignore = "long in the lab, where 64 KiB took 16 s; a Linux-like driver does the same in a unit test of the port (platform::serial_flow)"]
fn a_mebibyte_each_way_passes_the_serial_port() {
    let limit = Duration::from_secs(3600);
    Story::default()
        .limit(limit)
        .tell(|host| through_the_serial_port(host, MIB, limit));
}
