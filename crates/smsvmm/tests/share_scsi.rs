//! `smsvmm share vhost-user-scsi` from outside. What a front-end sees is told in `tests/tests/shared_scsi.rs`.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(["share", "vhost-user-scsi"])
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for image in ["a.img", "b.img"] {
        let file = std::fs::File::create(folder.path().join(image)).unwrap();
        file.set_len(1 << 20).unwrap();
    }
    folder
}

#[test]
fn every_socket_has_all_disks_until_a_signal_comes() {
    let folder = folder();
    let arguments = "--image a.img --image second=b.img --socket one.sock --socket two.sock";
    let mut server = command(folder.path(), arguments).spawn().unwrap();
    let said = BufReader::new(server.stderr.take().unwrap());
    let mut lines = said.lines().map(Result::unwrap);
    let first: Vec<String> = lines.by_ref().take(4).collect();
    assert_eq!(
        first,
        [
            "smsvmm: LUN 0, a.img, is served at one.sock",
            "smsvmm: LUN 1, second, is served at one.sock",
            "smsvmm: LUN 0, a.img, is served at two.sock",
            "smsvmm: LUN 1, second, is served at two.sock",
        ]
    );
    let process = i32::try_from(server.id()).unwrap();
    // SAFETY: a signal to our own child.
    assert_eq!(unsafe { libc::kill(process, libc::SIGTERM) }, 0);
    assert!(server.wait().unwrap().success());
    assert!(!folder.path().join("one.sock").exists());
}

#[test]
fn wrong_usage_is_told() {
    let folder = folder();
    for (arguments, status, expected) in [
        ("--image a.img", 2, "--socket"),
        ("--socket s", 2, "<PATHS>"),
        ("--image a.img --image a.img --socket s", 2, "given twice"),
        (
            "--image a.img --socket s --socket s",
            2,
            "each machine needs one of its own",
        ),
        ("--image a.img --socket a.img", 1, "not a socket"),
        ("--image a.img --socket s --queues 65", 2, "1 to 64"),
        ("--image absent.img --socket s", 1, "absent.img"),
        ("--devices d0 /a.dsk --socket s --threads 2", 2, "--threads"),
    ] {
        let output = command(folder.path(), arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments}: {said}");
        assert!(said.contains(expected), "{arguments}: {said}");
    }
}
