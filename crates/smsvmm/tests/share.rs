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
        (&["--socket", "s"], "--image"),
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
