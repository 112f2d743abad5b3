//! `smsvmm share iscsi` from outside.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn finish(folder: &Path, arguments: &str) -> Output {
    command(folder, arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running target and what it prints when it is ready, as JSON.
fn start(folder: &Path, arguments: &str) -> (Server, serde_json::Value) {
    let mut child = command(folder, arguments).spawn().unwrap();
    let mut text = Vec::new();
    let mut stdout = child.stdout.take().unwrap();
    let server = Server(child);
    loop {
        let mut byte = [0];
        assert_eq!(
            stdout.read(&mut byte).unwrap(),
            1,
            "it ended: {}",
            String::from_utf8_lossy(&text)
        );
        text.push(byte[0]);
        if let Ok(value) = serde_json::from_slice::<serde_json::Value>(&text) {
            return (server, value);
        }
    }
}

/// One login request of `initiator`; the status.
fn log_in(portal: &str, target: &str, initiator: &str) -> u16 {
    connect(portal, target, initiator).1
}

/// The same; and the connection.
fn connect(portal: &str, target: &str, initiator: &str) -> (TcpStream, u16) {
    let mut stream = TcpStream::connect(portal.parse::<SocketAddr>().unwrap()).unwrap();
    let text = format!("InitiatorName={initiator}\0TargetName={target}\0");
    let mut request = vec![0; 48];
    (request[0], request[1]) = (0x43, 0x87);
    request[7] = u8::try_from(text.len()).unwrap();
    request.extend(text.as_bytes());
    request.resize(request.len().next_multiple_of(4), 0);
    std::io::Write::write_all(&mut stream, &request).unwrap();
    let mut answer = [0; 48];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 0x23);
    let text = usize::from(answer[7]);
    let mut keys = vec![0; text.next_multiple_of(4)];
    stream.read_exact(&mut keys).unwrap();
    (stream, u16::from_be_bytes([answer[36], answer[37]]))
}

/// Command `number` of a session, to LUN 0, that reads up to `expected` bytes: its status, and data or sense data.
fn scsi(stream: &mut TcpStream, number: u32, cdb: &[u8], expected: u32) -> (u8, Vec<u8>) {
    let mut request = [0; 48];
    (request[0], request[1]) = (0x01, if expected > 0 { 0xc1 } else { 0x81 });
    request[16..20].copy_from_slice(&number.to_be_bytes());
    request[20..24].copy_from_slice(&expected.to_be_bytes());
    // The login had number 0, and such requests do not count.
    request[24..28].copy_from_slice(&(number - 1).to_be_bytes());
    request[32..32 + cdb.len()].copy_from_slice(cdb);
    std::io::Write::write_all(stream, &request).unwrap();
    let mut all = Vec::new();
    loop {
        let mut answer = [0; 48];
        stream.read_exact(&mut answer).unwrap();
        let length = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
        let mut data = vec![0; length.next_multiple_of(4)];
        stream.read_exact(&mut data).unwrap();
        all.extend(&data[..length]);
        // A response, or data that come with the status.
        if answer[0] == 0x21 || answer[0] == 0x25 && answer[1] & 1 != 0 {
            return (answer[3], all);
        }
    }
}

/// Command `number` of a session, to LUN 0, with data that come along: its status.
fn scsi_out(stream: &mut TcpStream, number: u32, cdb: &[u8], data: &[u8]) -> u8 {
    let mut request = vec![0; 48];
    (request[0], request[1]) = (0x01, 0xa1);
    let length = u32::try_from(data.len()).unwrap().to_be_bytes();
    request[5..8].copy_from_slice(&length[1..]);
    request[16..20].copy_from_slice(&number.to_be_bytes());
    request[20..24].copy_from_slice(&length);
    request[24..28].copy_from_slice(&(number - 1).to_be_bytes());
    request[32..32 + cdb.len()].copy_from_slice(cdb);
    request.extend(data);
    request.resize(request.len().next_multiple_of(4), 0);
    std::io::Write::write_all(stream, &request).unwrap();
    let mut answer = [0; 48];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 0x21);
    let length = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
    stream
        .read_exact(&mut vec![0; length.next_multiple_of(4)])
        .unwrap();
    answer[3]
}

/// EXPANDED API IN or OUT with this service action and length; waits as long as it may.
fn expanded(operation: u8, action: u8, tag: u32, length: usize) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[4]) = (operation, action, 0x11);
    match action {
        1 => cdb[5] = 3,
        2 => cdb[2..4].copy_from_slice(&4000_u16.to_be_bytes()),
        _ => {}
    }
    cdb[6..10].copy_from_slice(&tag.to_be_bytes());
    cdb[10..14].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    cdb
}

/// A request of the expanded API; state and outcome.
fn ask(stream: &mut TcpStream, number: &mut u32, request: &str) -> (u8, String) {
    *number += 2;
    let tag = *number;
    let cdb = expanded(0xc1, 1, tag, request.len());
    let status = scsi_out(stream, *number - 1, &cdb, request.as_bytes());
    let (received, data) = scsi(stream, *number, &expanded(0xc0, 2, tag, 1 << 16), 1 << 16);
    assert_eq!(received, 0, "the request ended with {status}");
    (data[0], String::from_utf8_lossy(&data[16..]).into_owned())
}

fn image(folder: &Path, name: &str) {
    let file = std::fs::File::create(folder.join(name)).unwrap();
    file.set_len(1 << 20).unwrap();
}

#[test]
fn an_image_is_served_to_whom_it_was_given_until_a_signal_comes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    image(folder, "disk.img");
    image(folder, "other.img");
    let arguments =
        "share iscsi --json --image root=disk.img --listen 127.0.0.1:0 --initiator iqn.2026-11.org.example:a";
    let (mut server, told) = start(folder, arguments);
    let (portal, target) = (
        told["portals"][0].as_str().unwrap(),
        told["target"].as_str().unwrap(),
    );
    assert_eq!(told["units"][0]["name"], "root");
    assert_eq!(told["units"][0]["size"], 1 << 20);
    assert_eq!(told["units"][0]["uri"], format!("iscsi://{portal}/{target}/0"));
    assert_eq!(log_in(portal, target, "iqn.2026-11.org.example:a"), 0);
    assert_eq!(log_in(portal, target, "iqn.2026-11.org.example:b"), 0x0202);
    let again = finish(
        folder,
        &format!("share iscsi --image other.img --listen {portal}"),
    );
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("another process"), "{}", said(&again));
    let process = i32::try_from(server.0.id()).unwrap();
    // SAFETY: a signal to our own child.
    assert_eq!(unsafe { libc::kill(process, libc::SIGTERM) }, 0);
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn disks_of_a_pool_are_served_by_path() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for device in ["d0", "d1"] {
        std::fs::File::create(folder.join(device))
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
    }
    for line in [
        "pool create tank d0 d1",
        "file --devices d0,d1 format --meta-size 32M",
        "volume --devices d0,d1 create data --size 64M --layout mirror",
        "disk --devices d0,d1 create /a.dsk --size 16M",
    ] {
        let output = finish(folder, line);
        assert!(output.status.success(), "{line}: {}", said(&output));
    }
    let absent = finish(folder, "share iscsi --devices d0,d1 --listen 127.0.0.1:0 /b.dsk");
    assert_eq!(absent.status.code(), Some(1));
    assert!(said(&absent).contains("/b.dsk"), "{}", said(&absent));
    let (_server, told) = start(
        folder,
        "share iscsi --json --devices d0,d1 --listen 127.0.0.1:0 /a.dsk",
    );
    assert_eq!(told["units"][0]["size"], 16 << 20);
    let (portal, target) = (
        told["portals"][0].as_str().unwrap(),
        told["target"].as_str().unwrap(),
    );
    assert_eq!(log_in(portal, target, "iqn.2026-11.org.example:a"), 0);
}

#[test]
fn initiators_that_are_named_can_look_after_their_own_disks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::File::create(folder.join("d0"))
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    for line in [
        "pool create tank d0",
        "file --devices d0 format --meta-size 32M",
        "volume --devices d0 create data --size 64M --layout concat",
        "disk --devices d0 create /a.dsk --size 16M",
        "disk --devices d0 create /b.dsk --size 16M",
    ] {
        let output = finish(folder, line);
        assert!(output.status.success(), "{line}: {}", said(&output));
    }
    let initiator = |name: &str, more: &str| format!("[[initiator]]\nname = \"{name}\"\n{more}\n");
    let write = |text: String| std::fs::write(folder.join("access.toml"), text).unwrap();
    let arguments = "share iscsi --json --devices d0 --listen 127.0.0.1:0 --access access.toml /a.dsk /b.dsk";
    for (wrong, reason) in [
        (
            initiator(
                "iqn.2026-11.org.example:a",
                "expanded-api = { allow = [\"snapshot\"] }",
            ),
            "chap",
        ),
        (initiator("*", "expanded-api = { enabled = true }"), "name who"),
        (
            initiator("iqn.2026-11.org.example:a", "expanded-api = { all = 1 }"),
            "all",
        ),
    ] {
        write(wrong);
        let refused = finish(folder, arguments);
        assert!(!refused.status.success());
        assert!(said(&refused).contains(reason), "{}", said(&refused));
    }
    write(
        initiator("iqn.2026-11.org.example:a", "disks = [\"/a.dsk\"]")
            + &initiator(
                "iqn.2026-11.org.example:off",
                "expanded-api = { enabled = false }",
            )
            + &initiator("*", ""),
    );
    let (_server, told) = start(folder, arguments);
    let (portal, target) = (
        told["portals"][0].as_str().unwrap(),
        told["target"].as_str().unwrap(),
    );
    // Who is not named, or has none, gets INVALID COMMAND OPERATION CODE. The first command hears of the new session.
    for name in ["b", "off"] {
        let (mut stream, status) = connect(portal, target, &format!("iqn.2026-11.org.example:{name}"));
        assert_eq!(status, 0);
        scsi(&mut stream, 1, &[0; 6], 0);
        let (status, sense) = scsi(&mut stream, 2, &expanded(0xc0, 0, 0, 4096), 4096);
        assert_eq!(
            (status, sense.get(14).copied()),
            (2, Some(0x20)),
            "{name}: {sense:?}"
        );
    }
    let (mut stream, status) = connect(portal, target, "iqn.2026-11.org.example:a");
    assert_eq!(status, 0);
    scsi(&mut stream, 1, &[0; 6], 0);
    let (status, data) = scsi(&mut stream, 2, &expanded(0xc0, 0, 0, 4096), 4096);
    assert_eq!(status, 0);
    let description = String::from_utf8_lossy(&data[16..]).into_owned();
    assert!(
        description.contains("iqn.2026-11.org.example_a") && description.contains("observe"),
        "{description}"
    );
    let mut number = 2;
    let (state, disks) = ask(&mut stream, &mut number, "{\"command\": \"list-disks\"}");
    assert_eq!(state, 3, "{disks}");
    assert!(disks.contains("/a.dsk") && !disks.contains("/b.dsk"), "{disks}");
    // Looking is all that it may.
    for (request, reason) in [
        ("{\"command\": \"snapshot\", \"name\": \"x\"}", "forbidden"),
        ("{\"command\": \"disk-status\", \"disk\": \"/b.dsk\"}", "problem"),
    ] {
        let (state, outcome) = ask(&mut stream, &mut number, request);
        assert_eq!(state, 4, "{outcome}");
        assert!(outcome.contains(reason), "{outcome}");
    }
}

#[test]
fn a_disk_and_its_snapshot_are_disks_of_two_targets() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for device in ["d0", "d1"] {
        let file = std::fs::File::create(folder.join(device)).unwrap();
        file.set_len(256 << 20).unwrap();
    }
    std::fs::write(folder.join("old.img"), vec![0xaa; 1 << 20]).unwrap();
    for line in [
        "pool create tank d0 d1",
        "file --devices d0,d1 format --meta-size 32M",
        "volume --devices d0,d1 create data --size 64M --layout mirror",
        "disk --devices d0,d1 import old.img /a.dsk",
        "disk --devices d0,d1 snapshot /a.dsk --name monday",
    ] {
        let output = finish(folder, line);
        assert!(output.status.success(), "{line}: {}", said(&output));
    }
    let target = |name: &str| format!("iqn.2026-11.org.example:{name}");
    let host = target("host");
    std::fs::write(
        folder.join("access.toml"),
        format!(
            "[[target]]\nname = {:?}\ndisks = [\"/a.dsk\"]\n[[target.initiator]]\nname = {host:?}\n\
             [[target]]\nname = {:?}\ndisks = [\"/a.dsk@monday\"]\n[[target.initiator]]\nname = \"*\"\n",
            target("live"),
            target("monday"),
        ),
    )
    .unwrap();
    let serve = "share iscsi --json --devices d0,d1 --listen 127.0.0.1:0 --access access.toml";
    let (server, told) = start(folder, &format!("{serve} /a.dsk@monday /a.dsk"));
    let portal = told["portals"][0].as_str().unwrap();
    assert_eq!(told["targets"][0]["units"][0]["name"], "/a.dsk");
    assert_eq!(told["targets"][1]["units"][0]["lun"], 0);
    assert_eq!(log_in(portal, &target("live"), &target("other")), 0x0202);
    let open = |name: &str| {
        let (mut stream, status) = connect(portal, &target(name), &host);
        assert_eq!(status, 0);
        // That power came on.
        assert_eq!(scsi(&mut stream, 1, &[0; 6], 0).0, 2);
        stream
    };
    let (mut live, mut monday) = (open("live"), open("monday"));
    // WRITE SAME (16) with UNMAP and NDOB: eight blocks are zeroes.
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let unmap = [0x93, 0x09, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0];
    assert_eq!(scsi(&mut live, 2, &unmap, 0), (0, Vec::new()));
    assert_eq!(scsi(&mut live, 3, &read, 512), (0, vec![0; 512]));
    assert_eq!(scsi(&mut monday, 2, &read, 512), (0, vec![0xaa; 512]));
    let (status, sense) = scsi(&mut monday, 3, &unmap, 0);
    // DATA PROTECT, WRITE PROTECTED, behind the length of the sense data.
    assert_eq!((status, sense[2 + 2] & 15, sense[2 + 12]), (2, 7, 0x27));
    drop(server);
    let unknown = finish(folder, &format!("{serve} /a.dsk"));
    assert_eq!(unknown.status.code(), Some(2), "{}", said(&unknown));
    assert!(
        said(&unknown).contains("which is not served"),
        "{}",
        said(&unknown)
    );
}

#[test]
fn wrong_usage_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    image(folder, "disk.img");
    std::fs::write(folder.join("short"), "short\n").unwrap();
    std::fs::write(folder.join("long"), "long enough for one\n").unwrap();
    for (arguments, status, expected) in [
        ("", 2, "--listen"),
        ("--listen localhost", 2, "127.0.0.1"),
        (
            "--listen 127.0.0.1:0 --target disk",
            2,
            "iqn.2026-11.org.example:disk",
        ),
        ("--listen 127.0.0.1:0 --initiator iqn.X", 2, "--initiator"),
        ("--listen 127.0.0.1:0 --image disk.img", 2, "given twice"),
        ("--listen 127.0.0.1:0 --image absent.img", 1, "absent.img"),
        ("--listen 127.0.0.1:0 --chap-user u", 2, "--chap-secret"),
        (
            "--listen 127.0.0.1:0 --chap-user u --chap-secret short",
            1,
            "too short",
        ),
        (
            "--listen 127.0.0.1:0 --chap-user u --chap-secret absent",
            1,
            "absent",
        ),
        (
            "--listen 127.0.0.1:0 --chap-user u --chap-secret long --mutual-chap-user t --mutual-chap-secret long",
            1,
            "the same in both directions",
        ),
        ("--listen 127.0.0.1:0 --access absent.toml", 1, "absent.toml"),
    ] {
        let output = finish(folder, &format!("share iscsi --image disk.img {arguments}"));
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments}: {}",
            said(&output)
        );
        assert!(said(&output).contains(expected), "{arguments}: {}", said(&output));
    }
}
