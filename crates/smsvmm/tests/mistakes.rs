//! Mistakes in vm.toml and on the command line, as the one who makes them meets them: status 2, one line that names the
//! place, nothing begun. What each key's message says is tested beside the code (vmm/src/config/tests.rs); mistakes that
//! show only on a host that can start machines are in the story tests/tests/errors.rs.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// A configuration that would create files when it were started, so that a start would show.
const RIGHT: &str = "name = \"t\"\ncpus = 1\nmemory = \"64M\"\n[boot]\nkernel = \"vmlinuz\"\n\
                     [console]\nserial = \"file:serial.log\"\n[management]\nsocket = \"t.sock\"\n\
                     [[disk]]\nid = \"root\"\nimage = \"root.raw\"\n\
                     [[net]]\nid = \"lan\"\nmac = \"02:00:00:00:00:01\"\n";

/// What is replaced in [`RIGHT`], by what, and the message after `smsvmm: `.
const IN_THE_FILE: &[(&str, &str, &str)] = &[
    (
        "cpus = 1",
        "cpu = 1",
        "vm.toml:2: cpu: unknown key; did you mean `cpus`?",
    ),
    (
        "cpus = 1",
        "cpus = 0",
        "vm.toml:2: cpus: 0 vCPUs are impossible; use 1 to 64",
    ),
    (
        "cpus = 1",
        "cpus = 65",
        "vm.toml:2: cpus: 65 vCPUs are impossible; use 1 to 64",
    ),
    ("cpus = 1", "cpus = ", "vm.toml:2:8: "),
    ("cpus = 1", "cpus = 1\ncpus = 2", "vm.toml:3:1: duplicate key"),
    (
        "\"64M\"",
        "\"63M\"",
        "vm.toml:3: memory: size 63M is impossible; it must be a multiple of 2M",
    ),
    (
        "\"64M\"",
        "\"64X\"",
        "vm.toml:3: memory.size: `64X` is not a size; write a whole number with a binary unit",
    ),
    ("[boot]", "[boot", "vm.toml:4:6: "),
    (
        "\"lan\"",
        "\"root\"",
        "vm.toml:14: net.0.id: `root` is taken by disk.0.id; ",
    ),
    (
        "02:00:00:00:00:01",
        "02:00:00:00:00",
        "vm.toml:15: net.0.mac: `02:00:00:00:00` is not an Ethernet address",
    ),
    (
        "02:00:00:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "vm.toml:15: net.0.mac: `ff:ff:ff:ff:ff:ff` is not the address of a single station",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\nreadonly = true",
        "vm.toml:13: disk.0.readonly: unknown key; did you mean `read-only`?",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\nlimits = { iops = 0 }",
        "vm.toml:13: disk.0.limits.iops: 0 would let nothing through; leave it out for no limit",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\nlimits = { bytes = \"fast\" }",
        "vm.toml:13: disk.0.limits.bytes: `fast` is not a size; write a whole number with a binary unit",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\nlimit-group = \"bulk\"",
        "vm.toml:13: disk.0.limit-group: there is no `bulk`; make it by [limit-groups.bulk] with iops or bytes",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\non-error = \"pause\"",
        "vm.toml:13: disk.0.on-error: `pause` is not known here; use `report`, `stop`",
    ),
    (
        "\"root.raw\"",
        "\"root.raw\"\nat-power-off = \"commit\"",
        "vm.toml:13: disk.0.at-power-off: is for disks with mode = \"undoable\", and this one is persistent",
    ),
    (
        "image = \"root.raw\"",
        "vhost-user = \"d.sock\"\nserial = \"x\"",
        "vm.toml:13: disk.0.serial: is told to the guest by the process that serves the disk",
    ),
    (
        "image = \"root.raw\"",
        "manager = \"m.sock\"",
        "vm.toml:12: disk.0.manager: unknown key; ",
    ),
    ("t.sock", "serial.log", "vm.toml:9: management.socket: "),
];

/// What `--set` is given, and the message after `smsvmm: `.
const ON_THE_COMMAND_LINE: &[(&str, &str)] = &[
    ("cpus", "--set cpus: has no `=`; write key=value"),
    (
        "cpus=65",
        "--set cpus=65: cpus: 65 vCPUs are impossible; use 1 to 64",
    ),
    (
        "memory=1",
        "--set memory=1: memory: size 1 is impossible; use 32M to 16T",
    ),
    (
        "disk.2.image=b.raw",
        "--set disk.2.image=b.raw: there is no element 2, the list has 1; use + to append one",
    ),
    (
        "disk.+.image=root.raw",
        "--set disk.+.image=root.raw: disk.1.image: ",
    ),
    (
        "disk.0.poll-us=99999",
        "--set disk.0.poll-us=99999: disk.0.poll-us: polling is limited to 10000 microseconds",
    ),
    (
        "disk.0.limits.iops-burst=5",
        "--set disk.0.limits.iops-burst=5: disk.0.limits.iops-burst: is the burst of a limit that is not there; give `iops`",
    ),
    (
        "disk.0.vhost-user=d.sock",
        "--set disk.0.vhost-user=d.sock: disk.0.vhost-user: cannot stand beside `image` or `file`: ",
    ),
    ("nothing=1", "--set nothing=1: nothing: unknown key; "),
];

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// `smsvmm run vm.toml ARGUMENTS` with this vm.toml must fail with this message and do nothing.
#[track_caller]
fn refused(text: &str, arguments: &[&str], message: &str) {
    let folder = tempfile::tempdir().unwrap();
    for file in ["vmlinuz", "root.raw"] {
        fs::write(folder.path().join(file), "").unwrap();
    }
    fs::write(folder.path().join("vm.toml"), text).unwrap();
    let before = names(folder.path());
    let output = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(["run", "vm.toml"])
        .args(arguments)
        .current_dir(folder.path())
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}: {said}");
    assert!(
        said.starts_with(&format!("smsvmm: {message}")),
        "not {message:?} but {said:?}"
    );
    assert_eq!((said.lines().count(), output.stdout.len()), (1, 0), "{said}");
    assert_eq!(names(folder.path()), before, "{message}");
}

#[test]
fn a_mistake_in_the_file_ends_with_2_and_one_line_and_begins_nothing() {
    for (right, wrong, message) in IN_THE_FILE {
        assert_eq!(RIGHT.matches(right).count(), 1, "{right}");
        refused(&RIGHT.replace(right, wrong), &[], message);
    }
}

#[test]
fn a_mistake_in_an_override_names_the_argument() {
    for (text, message) in ON_THE_COMMAND_LINE {
        refused(RIGHT, &["--set", text], message);
    }
}
