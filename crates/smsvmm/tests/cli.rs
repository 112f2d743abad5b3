//! The program from outside: what it prints, and with which status it ends.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn smsvmm(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A folder with a vm.toml of these lines.
fn folder(lines: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vm.toml"), lines).unwrap();
    folder
}

const VM: &str =
    "name = \"t\"\nmemory = \"64M\"\n[boot]\nkernel = \"vmlinuz\"\n[console]\nserial = \"null\"\n";

fn host_can_boot() -> bool {
    vmm::host::can_boot_stock_kernel().is_ok()
}

#[test]
fn wrong_usage_and_wrong_configuration_end_with_2_and_say_what_is_right() {
    let bad = folder("name = \"t\"\ncpu = 2\n[boot]\nkernel = \"k\"\n");
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage: smsvmm"),
        (&["bogus"], "unrecognized subcommand 'bogus'"),
        (&["run"], "<vm.toml>"),
        (&["run", "vm.toml", "--json"], "--dry-run"),
        (
            &["run", "vm.toml"],
            "smsvmm: vm.toml:2: cpu: unknown key; did you mean `cpus`?",
        ),
        (
            &["run", "vm.toml", "--dry-run"],
            "smsvmm: vm.toml:2: cpu: unknown key",
        ),
        (
            &["run", "none.toml"],
            "smsvmm: cannot read none.toml: No such file or directory",
        ),
        (
            &["run", "vm.toml", "--set", "cpus"],
            "smsvmm: --set cpus: has no `=`",
        ),
        (&["vm", "status"], "by --socket PATH or --config vm.toml"),
        (
            &["vm", "status", "--socket", "a", "--config", "b"],
            "by either --socket or --config",
        ),
        (
            &["vm", "--socket", "s", "detach", "a/b"],
            "`a/b` is not an identifier",
        ),
        (
            &["vm", "--socket", "s", "set-disk", "disk0"],
            "say what to change, for example --limit-iops 500",
        ),
        (
            &[
                "vm",
                "--socket",
                "s",
                "set-disk",
                "disk0",
                "--limit-bytes",
                "fast",
            ],
            "`fast` is not a size",
        ),
        (
            &["vm", "--socket", "s", "set-disk", "disk0", "--on-error", "pause"],
            "`pause` is not what can happen; use report or stop",
        ),
        (
            &["vm", "--socket", "s", "set-limits", "bulk"],
            "say what to change, for example --limit-iops 500",
        ),
        (
            &["vm", "--socket", "s", "attach-disk", "x", "--limit-iops", "0"],
            "--limit-iops: 0 would let nothing through",
        ),
        (
            &[
                "vm",
                "--socket",
                "s",
                "attach-disk",
                "x",
                "--limit-bytes-burst",
                "5M",
            ],
            "--limit-bytes-burst: is the burst of a limit that is not there",
        ),
        (
            &["vm", "--socket", "s", "attach-disk", "x", "--queues", "99"],
            "--queues: 99 queues are impossible; use 1 to 16",
        ),
        (
            &["vm", "--socket", "s", "attach-net", "--mac", "x"],
            "`x` is not an Ethernet address",
        ),
        (&["vm", "--socket", "s", "console"], "`vm console` needs --config"),
        (
            &["share", "nbd", "--socket", "s", "--io-helpers", "9", "/a.dsk"],
            "9 is not in 0..=8",
        ),
        (
            &[
                "share",
                "nbd",
                "--socket",
                "s",
                "--io-helpers",
                "1",
                "--image",
                "a.raw",
            ],
            "--io-helpers is for disks of a pool, and none is named",
        ),
        (&["completions", "cobol"], "possible values: bash"),
    ];
    for (arguments, message) in cases {
        let output = smsvmm(bad.path(), arguments);
        assert_eq!(status(&output), 2, "{arguments:?}: {}", stderr(&output));
        assert!(
            stderr(&output).contains(message),
            "{arguments:?}: {}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn a_pool_that_is_shared_has_no_more_helpers_than_a_machines() {
    let place = folder("[pool]\ndevices = [\"d0\"]\nio-helpers = 9\n");
    let output = smsvmm(
        place.path(),
        &["share", "nbd", "--socket", "s", "--config", "vm.toml", "/a.dsk"],
    );
    assert_eq!(status(&output), 2, "{}", stderr(&output));
    assert!(
        stderr(&output).contains("[pool] io-helpers is more than 8"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn help_and_version_are_no_errors() {
    let folder = folder("");
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["vm", "attach-disk", "--help"],
    ] {
        let output = smsvmm(folder.path(), arguments);
        assert_eq!(
            (status(&output), stderr(&output).as_str()),
            (0, ""),
            "{arguments:?}"
        );
        assert!(stdout(&output).contains("smsvmm"));
    }
}

#[test]
fn a_dry_run_names_every_problem_and_shows_the_effective_configuration() {
    let text = format!(
        "{VM}[[disk]]\nimage = \"none.raw\"\n[[disk]]\nimage = \"vm.toml\"\nread-only = true\n[[net]]\nbackend = \"tap\"\ntap = \"nosuchtap\"\n"
    );
    let folder = folder(&text);
    let output = smsvmm(folder.path(), &["run", "vm.toml", "--dry-run", "--set", "cpus=3"]);
    assert_eq!(status(&output), 1, "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "count = 3",
        "id = \"disk1\"",
        "cannot read the kernel",
        "none.raw: No such file or directory",
        "nosuchtap",
        "This machine cannot be started",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let output = smsvmm(folder.path(), &["run", "vm.toml", "--dry-run", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["can-start"], false);
    assert_eq!(
        answer["configuration"]["boot"]["kernel"],
        folder.path().join("vmlinuz").to_str().unwrap()
    );
}

#[test]
fn a_dry_run_finds_each_disk_of_the_pool_or_says_what_is_wrong_with_it() {
    let folder = folder(&format!(
        "{VM}[pool]\ndevices = [\"d0\", \"d1\"]\n[[disk]]\nfile = \"/none.dsk\"\n[[disk]]\nimage = \"none.raw\"\n\
         [[disk]]\nfile = \"/a.dsk\"\nmode = \"append\"\n[[disk]]\nfile = \"/a.dsk@monday\"\nread-only = true\n"
    ));
    let path = folder.path();
    for device in ["d0", "d1"] {
        fs::File::create(path.join(device))
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
    }
    for command in [
        "pool create tank d0 d1",
        "file format --config vm.toml",
        "volume create data --layout mirror --size 64M --config vm.toml",
        "disk create /a.dsk --size 32M --config vm.toml",
        "disk snapshot /a.dsk --name monday --config vm.toml",
    ] {
        let words: Vec<&str> = command.split_whitespace().collect();
        let output = smsvmm(path, &words);
        assert_eq!(status(&output), 0, "{command}: {}", stderr(&output));
    }
    let text = stdout(&smsvmm(path, &["run", "vm.toml", "--dry-run"]));
    for part in [
        "tank: 2 devices, 2 volumes",
        "disk0: there is no disk /none.dsk",
        "none.raw: No such file or directory",
        "disk2: /a.dsk in the pool, append",
        "disk3: /a.dsk@monday in the pool",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    fs::remove_file(path.join("d0")).unwrap();
    fs::remove_file(path.join("d1")).unwrap();
    let text = stdout(&smsvmm(path, &["run", "vm.toml", "--dry-run"]));
    assert!(
        text.contains("disk2: /a.dsk is in a pool that cannot be opened"),
        "{text}"
    );
}

#[test]
fn a_dry_run_says_that_the_manager_is_away() {
    let folder = folder(&format!(
        "manager = \"host.sock\"\n{VM}[[disk]]\nfile = \"/a.dsk\"\n"
    ));
    let output = smsvmm(folder.path(), &["run", "vm.toml", "--dry-run"]);
    let text = stdout(&output);
    let socket = folder.path().join("host.sock");
    for part in [
        format!(
            "nobody answers at {}: No such file or directory",
            socket.display()
        ),
        "start `smsvmm serve`, or name its socket".to_owned(),
        "disk0: /a.dsk is in a pool that cannot be opened".to_owned(),
    ] {
        assert!(text.contains(&part), "{part} in {text}");
    }
}

#[test]
fn a_shown_configuration_is_one_that_can_be_loaded() {
    let folder = folder(VM);
    let output = smsvmm(folder.path(), &["run", "vm.toml", "--dry-run"]);
    let text = stdout(&output);
    let ends = ["\n\nok ", "\n\nFAIL ", "\n\nwarn "];
    let checks = ends.iter().find_map(|end| text.find(end)).unwrap();
    fs::write(folder.path().join("again.toml"), &text[..checks]).unwrap();
    let again = stdout(&smsvmm(folder.path(), &["run", "again.toml", "--dry-run"]));
    assert_eq!(again[..checks], text[..checks]);
}

#[test]
fn an_image_that_is_cut_off_is_refused() {
    use std::io::{Seek, SeekFrom, Write};
    let folder = folder(&format!("{VM}[[disk]]\nimage = \"a.raw\"\n"));
    let path = folder.path().join("a.raw");
    let mut image = fs::File::create(&path).unwrap();
    image.set_len(1 << 20).unwrap();
    for (at, bytes) in [
        (1028, &1024_u32.to_le_bytes()[..]),
        (1048, &2_u32.to_le_bytes()),
        (1080, &[0x53, 0xef]),
    ] {
        image.seek(SeekFrom::Start(at)).unwrap();
        image.write_all(bytes).unwrap();
    }
    let text = stdout(&smsvmm(folder.path(), &["run", "vm.toml", "--dry-run"]));
    assert!(
        text.contains("a.raw is cut off: it has 1048576 bytes, and an ext4 file system on it needs 4194304"),
        "{text}"
    );
    image.set_len(4 << 20).unwrap();
    let text = stdout(&smsvmm(folder.path(), &["run", "vm.toml", "--dry-run"]));
    assert!(text.contains("a.raw, 4 MiB, writable"), "{text}");
}

#[test]
fn a_host_that_cannot_boot_is_told_at_once_with_the_reason() {
    if host_can_boot() {
        eprintln!("this host can");
        return;
    }
    let folder = folder(VM);
    let started = Instant::now();
    let output = smsvmm(folder.path(), &["run", "vm.toml"]);
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(status(&output), 1);
    let text = stderr(&output);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("smsvmm: "), "{text}");
    assert!(text.contains("; "), "a remedy: {text}");
}

#[test]
fn the_host_check_agrees_with_itself() {
    let folder = folder("");
    let output = smsvmm(folder.path(), &["host", "check", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["can-boot"], host_can_boot());
    assert_eq!(status(&output), i32::from(!host_can_boot()));
    let findings = answer["findings"].as_array().unwrap();
    assert!(findings.iter().any(|finding| finding["topic"] == "io_uring"));
    let text = smsvmm(folder.path(), &["host", "check"]);
    assert_eq!(status(&text), status(&output));
    let verdict = if host_can_boot() {
        "can boot here"
    } else {
        "No stock guest"
    };
    assert!(stdout(&text).contains(verdict));
}

#[test]
fn a_machine_that_does_not_run_is_told_with_a_remedy() {
    let managed = folder(&format!("{VM}[management]\nsocket = \"t.sock\"\n"));
    for arguments in [
        &["vm", "status", "--config", "vm.toml"][..],
        &["vm", "stop", "--socket", "t.sock"],
    ] {
        let output = smsvmm(managed.path(), arguments);
        assert_eq!(status(&output), 1);
        assert!(
            stderr(&output).contains("is it running, with this management socket?"),
            "{}",
            stderr(&output)
        );
    }
    let plain = folder(VM);
    let output = smsvmm(plain.path(), &["vm", "status", "--config", "vm.toml"]);
    assert_eq!(status(&output), 2);
    assert!(
        stderr(&output).contains("add [management] with socket = \"t.sock\""),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((status(&output), stderr(&output).as_str()), (0, ""));
}

#[test]
fn logs_are_chosen_by_a_filter_that_is_checked() {
    let output = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(["completions", "fish"])
        .env("SMSVMM_LOG", "a=b=c")
        .output()
        .unwrap();
    assert_eq!(status(&output), 2);
    let text = stderr(&output);
    assert!(
        text.starts_with("smsvmm: SMSVMM_LOG=a=b=c is not a filter; use for example"),
        "{text}"
    );
}
