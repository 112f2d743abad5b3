//! A pool that a process has open is watched and changed by commands, through the process's management socket.
#![allow(clippy::unwrap_used)]

mod pool_machine;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use api::{EventLog, Vm};
use block_io::WorkerOptions;
use management::{Server, ServerHandle};
use pool_machine::Machine;
use serde_json::Value;
use storage_manager::HostedPool;

fn command(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(line.split_whitespace())
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8([output.stdout.as_slice(), &output.stderr].concat()).unwrap()
}

/// Does it; what it says.
fn done(folder: &Path, line: &str) -> String {
    let output = command(folder, line).output().unwrap();
    assert!(output.status.success(), "{line}: {}", text(&output));
    text(&output)
}

fn refused(folder: &Path, line: &str) -> String {
    let output = command(folder, line).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}: {}", text(&output));
    text(&output)
}

fn json(folder: &Path, line: &str) -> Value {
    let output = command(folder, line).output().unwrap();
    assert!(output.status.success(), "{line}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn blank(folder: &Path, name: &str) {
    File::create(folder.join(name))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
}

/// A pool in `folder` that this process has open, behind a socket that vm.toml names.
fn machine(folder: &Path) -> (Arc<Machine>, ServerHandle) {
    let config = "[pool]\ndevices = [\"d0\", \"d1\"]\n[management]\nsocket = \"vm.sock\"\n";
    fs::write(folder.join("vm.toml"), config).unwrap();
    blank(folder, "d0");
    blank(folder, "d1");
    done(folder, "pool create tank d0 d1");
    done(folder, "file format --config vm.toml");
    done(
        folder,
        "volume create data --size 16M --layout mirror --config vm.toml",
    );
    let devices = ["d0", "d1"].map(|name| folder.join(name).to_str().unwrap().to_owned());
    let pool = HostedPool::open("test", devices.to_vec(), WorkerOptions::default()).unwrap();
    let events = Arc::new(EventLog::new());
    pool.record_events(Arc::clone(&events));
    let machine = Arc::new(Machine {
        pool,
        events,
        disks: Vec::new(),
    });
    let server = Server::bind(&folder.join("vm.sock")).unwrap();
    let control: Arc<dyn Vm> = Arc::clone(&machine) as Arc<dyn Vm>;
    let server = server.start(control, || Ok(())).unwrap();
    (machine, server)
}

#[test]
fn commands_change_and_watch_a_pool_that_is_open_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (machine, server) = machine(folder);

    // Paths are those of who gives the command.
    blank(folder, "d2");
    let said = done(folder, "device add d2 --config vm.toml --class fast");
    assert!(
        said.contains("3 devices") && said.contains(&format!("{}/d2", folder.display())),
        "{said}"
    );
    fs::write(
        folder.join("d3"),
        [&[0; 1080][..], b"\x53\xef", &vec![0; 64 << 20]].concat(),
    )
    .unwrap();
    let said = refused(folder, "device replace d0 d3 --config vm.toml");
    assert!(said.contains("ext") && said.contains("--force"), "{said}");
    let said = done(folder, "device replace d0 d3 --config vm.toml --force");
    assert!(said.contains("/d3") && !said.contains("/d0\""), "{said}");
    let said = done(folder, "device evacuate d2 --config vm.toml");
    assert!(said.contains("is empty"), "{said}");
    done(folder, "device remove d2 --config vm.toml");
    let said = refused(folder, "pool export --config vm.toml");
    assert!(said.contains("open in another process"), "{said}");

    // A long job is seen, made slower and faster, and waited for.
    let slow = command(
        folder,
        "pool scrub --volume fs-meta --throttle 100K --config vm.toml",
    )
    .spawn();
    let mut slow = slow.unwrap();
    let job = loop {
        let jobs = json(folder, "job list --config vm.toml --json");
        match jobs.as_array().unwrap().iter().find(|job| job["rate"].is_u64()) {
            Some(job) => break job.clone(),
            None => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    };
    assert_eq!(
        (job["kind"].as_str(), job["throttle"].as_u64()),
        (Some("scrub"), Some(100 << 10))
    );
    let id = job["id"].as_u64().unwrap();
    let said = done(folder, "job list --config vm.toml");
    assert!(said.contains("RATE") && said.contains("/s"), "{said}");
    let said = done(folder, &format!("job throttle {id} 0 --config vm.toml"));
    assert!(said.contains("as fast as it can"), "{said}");
    assert!(slow.wait().unwrap().success());
    let said = done(folder, &format!("job wait {id} --config vm.toml"));
    assert!(said.contains("done"), "{said}");
    assert!(refused(folder, &format!("job cancel {id} --config vm.toml")).contains("has ended"));

    let said = done(folder, "top --config vm.toml --once --interval 1");
    for word in [
        "web1: running",
        "pool tank: healthy",
        "BUSY",
        "/d3",
        "VOLUME",
        "data",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let shown = json(folder, "top --socket vm.sock --json --interval 1");
    assert_eq!(shown["load"]["pool"], "tank");
    assert_eq!(shown["load"]["devices"].as_array().unwrap().len(), 2);
    assert_eq!(shown["vm"]["name"], "web1");

    let said = done(folder, "events --config vm.toml");
    for word in [
        "/d2 is in service",
        "/d0 has left the pool",
        &format!("job {id} is done"),
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    drop(server);
    machine.pool.close().unwrap();
}

#[test]
fn who_follows_is_told_as_it_happens() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (machine, server) = machine(folder);
    let mut follows = command(folder, "events --follow --json --config vm.toml")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follows.stdout.take().unwrap()).lines();
    blank(folder, "d2");
    done(folder, "device add d2 --spare --config vm.toml");
    let told = lines.find(|line| line.as_ref().unwrap().contains("/d2"));
    let told: Value = serde_json::from_str(&told.unwrap().unwrap()).unwrap();
    assert_eq!(
        (
            told["event"].as_str(),
            told["pool"].as_str(),
            told["kind"].as_str()
        ),
        (Some("pool"), Some("tank"), Some("device-added"))
    );
    // It ends with the process.
    drop(server);
    assert!(follows.wait().unwrap().success());
    machine.pool.close().unwrap();
}
