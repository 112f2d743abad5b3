//! `smsvmm debug`, and what a process says by itself of the requests before a failure.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "../../management/tests/fake/mod.rs"]
mod fake;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use api::{DiskConfig, EventKind, TraceOperation, TraceRecord, Vm};
use fake::FakeVm;
use management::Server;
use serde_json::Value;
use vhost_user_load::front_end::Options;
use vhost_user_load::load::{self, Load, Pattern};
use vhost_user_load::pattern::Data;

fn command(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(line.split_whitespace())
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
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
fn a_disk_is_followed_until_the_machine_ends_and_a_dump_has_it_all() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let vm = FakeVm::new();
    vm.attach_disk(DiskConfig::new("/a.raw")).unwrap();
    vm.events.record(EventKind::Paused);
    let server = Server::bind(&folder.join("vm.sock")).unwrap();
    let server = server.start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(())).unwrap();

    let child = command(folder, "debug trace disk0 --socket vm.sock")
        .stdout(Stdio::piped())
        .spawn();
    let mut following = Running(child.unwrap());
    let mut lines = BufReader::new(following.0.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(
        first.starts_with("22:13:20.123456Z  q1  zero") && first.ends_with("1.235 ms  FAILED"),
        "{first}"
    );
    let old = vm.trace.lock().unwrap()[0];
    vm.trace.lock().unwrap().push(TraceRecord {
        operation: TraceOperation::Read,
        ..old
    });
    let second = lines.next().unwrap().unwrap();
    assert!(second.contains("  read  "), "{second}");

    let output = command(folder, "debug trace disk0 --socket vm.sock --once --json").output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let records: Vec<TraceRecord> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(records, *vm.trace.lock().unwrap());

    let dumped = command(folder, "debug dump --socket vm.sock -o dump.json").status();
    assert!(dumped.unwrap().success());
    let dump: Value = serde_json::from_reader(File::open(folder.join("dump.json")).unwrap()).unwrap();
    assert_eq!(dump["disks"][0]["records"].as_array().unwrap().len(), 2);
    assert_eq!(dump["vm"]["name"], "fake");
    assert_eq!(dump["events"][0]["event"], "paused");
    assert_eq!(dump["queues"][0]["reads"], 3);
    let output = command(folder, "debug trace disk7 --socket vm.sock")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(1) && said.contains("no such disk"),
        "{said}"
    );

    drop(server);
    assert!(lines.next().is_none());
    assert!(following.0.wait().unwrap().success());
}

fn load(folder: &Path, pattern: Pattern) -> anyhow::Result<load::Report> {
    let patience = Duration::from_secs(20);
    load::run(&Load {
        front_end: Options {
            socket: folder.join("s"),
            queues: 1,
            queue_size: 64,
            block_size: 4096,
            segment: None,
            inflight: false,
            patience,
            greeting: None,
        },
        pattern,
        depth: 1,
        duration: patience,
        range: Some(32 << 10),
        once: true,
        stride: None,
        data: Data::default(),
        verify: false,
        flush_every: 0,
        reconnect: false,
        patience,
        pid: None,
        seed: 1,
    })
}

#[test]
fn a_request_that_fails_has_those_before_it_logged() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let image = File::create(folder.join("disk.img")).unwrap();
    image.set_len(1 << 20).unwrap();
    let child = command(folder, "share vhost-user --image disk.img --socket s")
        .stderr(Stdio::piped())
        .spawn();
    let mut server = Running(child.unwrap());
    let mut said = BufReader::new(server.0.stderr.take().unwrap()).lines();
    let ready = said.next().unwrap().unwrap();
    assert!(ready.contains("is served at s"), "{ready}");

    load(folder, Pattern::Write).unwrap();
    // Somebody takes its image away.
    image.set_len(0).unwrap();
    load(folder, Pattern::Read).unwrap_err();
    // It was logged before it was answered.
    server.0.kill().unwrap();
    let said: Vec<String> = said.map_while(Result::ok).collect();
    let logged: Vec<&String> = said
        .iter()
        .filter(|line| line.contains("before a request failed"))
        .collect();
    let (failed, before) = logged.split_last().unwrap();
    assert!(
        failed.contains("WARN")
            && failed.contains(" read 0+4096 ")
            && failed.contains("us FAILED disk=\"disk.img\""),
        "{said:#?}"
    );
    let writes = before.iter().filter(|line| line.contains(" write "));
    assert_eq!(writes.count(), 8, "{said:#?}");
    assert!(before.iter().all(|line| line.contains("us ok")), "{said:#?}");
}
