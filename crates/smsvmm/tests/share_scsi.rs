//! `smsvmm share vhost-user-scsi` from outside. What a front-end sees is told in `tests/tests/shared_scsi.rs`.
#![allow(clippy::unwrap_used)]

#[path = "../../../storage-virtualizer/tests/driver/mod.rs"]
mod driver;
#[path = "../../host-manager/tests/guest/mod.rs"]
mod guest;
mod scsi_machine;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use api::{ProblemKind, Right};
use driver::scsi::Initiator;
use expanded_api::{Answer, Request};
use scsi_machine::machine;

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

/// A process that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn the_machine_at_each_socket_has_the_rights_that_are_given_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for device in ["d0", "d1"] {
        File::create(folder.join(device))
            .unwrap()
            .set_len(128 << 20)
            .unwrap();
    }
    for line in [
        "pool create tank d0 d1",
        "file --devices d0,d1 format --meta-size 32M",
        "volume --devices d0,d1 create data --size 64M --layout mirror",
        "disk --devices d0,d1 create /a.dsk --size 16M",
        "disk --devices d0,d1 create /b.dsk --size 16M",
    ] {
        let mut made = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
        let made = made.args(line.split(' ')).current_dir(folder).output().unwrap();
        assert!(made.status.success(), "{line}: {made:?}");
    }
    let access = folder.join("access.toml");
    let refused = |text: &str| {
        fs::write(&access, text).unwrap();
        let line = "--devices d0,d1 /a.dsk --socket one.sock --access access.toml";
        let output = command(folder, line).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("[[machine]]\nsocket = \"two.sock\"\n").contains("two.sock is not served"));
    let twice = "[[machine]]\nsocket = \"one.sock\"\n".repeat(2);
    assert!(refused(&twice).contains("there twice"));
    let wrong = "[[machine]]\nsocket = \"one.sock\"\n[machine.expanded-api]\nobjects = [\"x\"]\n";
    assert!(refused(wrong).contains("expanded-api.objects"));
    fs::write(
        &access,
        "[[machine]]\nsocket = \"one.sock\"\nname = \"web1\"\n[machine.expanded-api]\nallow = [\"snapshot\"]\n",
    )
    .unwrap();
    let line = "--devices d0,d1 /a.dsk --socket one.sock --socket two.sock --access access.toml";
    let mut server = Running(command(folder, line).spawn().unwrap());
    let said = BufReader::new(server.0.stderr.take().unwrap());
    assert_eq!(said.lines().take(2).count(), 2);

    let (mut one, _one) = machine(&folder.join("one.sock"));
    let (mut two, _two) = machine(&folder.join("two.sock"));
    let known = |driver: &mut Initiator| match guest::ask(driver, 0, 1, &Request::Describe {}).unwrap() {
        Answer::Description(known) => (known.vm.to_string(), known.rights),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        known(&mut one),
        ("web1".to_owned(), vec![Right::Observe, Right::Snapshot])
    );
    assert_eq!(known(&mut two), ("two".to_owned(), vec![Right::Observe]));
    let snapshot = |disk: &str| Request::Snapshot {
        disks: vec![disk.to_owned()],
        name: "noon".into(),
        description: String::new(),
    };
    guest::ask(&mut one, 0, 2, &snapshot("/a.dsk")).unwrap();
    for (driver, disk) in [(&mut one, "/b.dsk"), (&mut two, "/a.dsk")] {
        let refused = guest::ask(driver, 0, 3, &snapshot(disk)).unwrap_err();
        assert_eq!(refused.kind, ProblemKind::Forbidden, "{refused}");
    }
    let Answer::Disks(disks) = guest::ask(&mut two, 0, 4, &Request::ListDisks {}).unwrap() else {
        panic!("no disks");
    };
    assert_eq!(disks[0].snapshots[0].name, "noon");
    // By it a guest knows which of its devices that is.
    assert_eq!(disks[0].serial.as_deref(), Some("a.dsk"));
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
        ("--image a.img --socket s --access f", 2, "--access"),
    ] {
        let output = command(folder.path(), arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments}: {said}");
        assert!(said.contains(expected), "{arguments}: {said}");
    }
}
