//! `smsvmm share nbd` from outside.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use block_io::{
    AlignedBuffer, BlockDevice, Durability, NbdAddress, NbdDevice, NbdOptions, Worker, WorkerOptions,
};

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(["share", "nbd"])
        .args(arguments)
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn finish(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running server and the first line that it prints.
fn start(folder: &Path, arguments: &[&str]) -> (Server, String) {
    let mut child = command(folder, arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    (Server(child), line)
}

fn folder_with_image() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("disk.img"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    folder
}

#[test]
fn an_image_is_served_until_a_signal_comes() {
    let folder = folder_with_image();
    let arguments = [
        "--image",
        "root=disk.img",
        "--socket",
        "s",
        "--listen",
        "127.0.0.1:0",
    ];
    let (mut server, line) = start(folder.path(), &arguments);
    let expected = format!("root: nbd+unix:///root?socket={}/s\n", folder.path().display());
    assert_eq!(line, expected);

    let address: NbdAddress = line.trim().strip_prefix("root: ").unwrap().parse().unwrap();
    let device = NbdDevice::open(&address, &NbdOptions::default()).unwrap();
    let worker = Worker::start("client", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let mut buffer = AlignedBuffer::new(4096);
        buffer.as_mut_slice().fill(7);
        // SAFETY: the buffer lives until the write has ended.
        let pieces = [unsafe { buffer.io(0, 4096) }];
        device.write(8192, &pieces, Durability::Durable).await.unwrap();
    });
    let image = std::fs::read(folder.path().join("disk.img")).unwrap();
    assert_eq!(
        (image[8191], image[8192], image[12287], image[12288]),
        (0, 7, 7, 0)
    );

    // Neither the socket nor the image is taken from it.
    let output = finish(folder.path(), &["--image", "disk.img", "--socket", "t"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("disk.img"));
    std::fs::write(folder.path().join("other.img"), [0; 4096]).unwrap();
    let output = finish(folder.path(), &["--image", "other.img", "--socket", "s"]);
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        words.contains("cannot listen on s: another process does"),
        "{words}"
    );

    // SAFETY: the process is our child, and not waited for yet.
    unsafe { libc::kill(i32::try_from(server.0.id()).unwrap(), libc::SIGTERM) };
    assert!(server.0.wait().unwrap().success());
    let mut words = String::new();
    server
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut words)
        .unwrap();
    assert!(words.contains("SIGTERM: finishing"), "{words}");
    assert!(!folder.path().join("s").exists());
}

#[test]
fn wrong_usage_is_told() {
    let folder = folder_with_image();
    for (arguments, expected) in [
        (&["--image", "disk.img"][..], "--socket"),
        (&["--socket", "s"], "<PATHS>"),
        (
            &["--image", "disk.img", "--socket", "s", "--tls-cert", "c.pem"],
            "--tls-key",
        ),
        (
            &["--image", "disk.img", "--listen", "localhost"],
            "invalid socket address",
        ),
        (&["--image", "..", "--socket", "s"], "NAME=.."),
    ] {
        let output = finish(folder.path(), arguments);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words}");
        assert!(words.contains(expected), "{words}");
    }
    let same = [
        "--image",
        "disk.img",
        "--image",
        "disk.img",
        "--read-only",
        "--socket",
        "s",
    ];
    let output = finish(folder.path(), &same);
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("two exports are called \"disk.img\""), "{words}");
}

/// Runs smsvmm, which must succeed; what it prints.
fn smsvmm(folder: &Path, line: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(line.split_whitespace())
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "smsvmm {line}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Where a server says that an export is.
fn address(line: &str) -> NbdAddress {
    let uri = line.trim().split_once(": ").unwrap().1;
    uri.parse().unwrap()
}

/// Writes a byte all over 4 KiB at `offset`, if there is one, and says what is there.
fn touch(address: NbdAddress, offset: u64, byte: Option<u8>) -> u8 {
    let device = NbdDevice::open(&address, &NbdOptions::default()).unwrap();
    let worker = Worker::start("client", WorkerOptions::default()).unwrap();
    worker.run(move || async move {
        let mut buffer = AlignedBuffer::new(4096);
        buffer.as_mut_slice().fill(byte.unwrap_or_default());
        // SAFETY: the buffer outlives the requests, which are awaited.
        let memory = [unsafe { buffer.io(0, 4096) }];
        if byte.is_some() {
            device.write(offset, &memory, Durability::Durable).await.unwrap();
        }
        device.read(offset, &memory).await.unwrap();
        buffer.as_slice()[0]
    })
}

#[test]
fn disks_of_a_pool_and_their_snapshots_are_served_with_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for device in ["d0", "d1"] {
        std::fs::File::create(folder.join(device))
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
    }
    smsvmm(folder, "pool create tank d0 d1");
    smsvmm(folder, "file --devices d0,d1 format --meta-size 32M");
    smsvmm(
        folder,
        "volume --devices d0,d1 create data --size 64M --layout mirror",
    );
    smsvmm(folder, "disk --devices d0,d1 create /a.dsk --size 16M");
    let socket = |socket| ["--devices", "d0,d1", "--socket", socket];
    let serve = |path, name| {
        let [devices, list, option, socket] = socket(name);
        start(folder, &[devices, list, path, option, socket])
    };

    let (server, line) = serve("/a.dsk", "s");
    assert_eq!(touch(address(&line), 1 << 20, Some(7)), 7);
    stop(server);
    smsvmm(folder, "disk --devices d0,d1 snapshot --name monday /a.dsk");
    let (server, line) = serve("/a.dsk", "s");
    assert_eq!(touch(address(&line), 1 << 20, Some(8)), 8);
    assert_eq!(touch(address(&line), 8 << 20, Some(9)), 9);
    if let Ok(info) = Command::new("nbdinfo")
        .args(["--map", &address(&line).to_string()])
        .output()
    {
        let map = String::from_utf8(info.stdout).unwrap();
        let data: Vec<Vec<&str>> = map
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            data.iter().filter(|words| words[2] == "0").count(),
            2,
            "two pieces of data: {map}"
        );
        let changed = Command::new("nbdinfo")
            .args(["--map=qemu:dirty-bitmap:monday", &address(&line).to_string()])
            .output()
            .unwrap();
        let map = String::from_utf8(changed.stdout).unwrap();
        assert_eq!(
            map.lines()
                .filter(|line| line.split_whitespace().nth(2) == Some("1"))
                .count(),
            2,
            "{map}"
        );
    }
    stop(server);
    let (server, line) = serve("/a.dsk@monday", "s");
    assert_eq!(touch(address(&line), 1 << 20, None), 7, "as on monday");
    assert_eq!(touch(address(&line), 8 << 20, None), 0);
    stop(server);
    let checked = smsvmm(folder, "file --devices d0,d1 check");
    assert!(!checked.contains("problem"), "{checked}");
}

/// Ends a server as an administrator does, and waits until it has closed the pool.
fn stop(mut server: Server) {
    let pid = rustix::process::Pid::from_child(&server.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(server.0.wait().unwrap().success());
}
