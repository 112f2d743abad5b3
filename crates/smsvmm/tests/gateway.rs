//! `smsvmm gateway` and `smsvmm serve` as processes, without machines: what is left to a gateway once it serves, and a pool that is rebuilt through one.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use api::storage::Operation;
use api::{AttachRequest, DiskConfig, StorageRequest};
use management::blocking;
use vhost_user_load::front_end::{self, Greeting};
use vhost_user_load::load::{Load, Pattern};
use vhost_user_load::pattern::Data;

fn smsvmm(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(arguments)
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .env_remove("SMSVMM_CONFIG")
        .env_remove("SMSVMM_SECCOMP")
        .env_remove("JOURNAL_STREAM")
        .stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

fn run(folder: &Path, arguments: &[&str]) -> String {
    let output = smsvmm(folder, arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    said(&output)
}

/// A process that is ended with its test.
struct Serving {
    child: Child,
    line: String,
}

impl Serving {
    /// Waits until it says what is expected.
    fn start(folder: &Path, arguments: &[&str], expected: &str) -> Self {
        let child = smsvmm(folder, arguments).stderr(Stdio::piped()).spawn().unwrap();
        let mut serving = Self {
            child,
            line: String::new(),
        };
        let mut lines = BufReader::new(serving.child.stderr.take().unwrap()).lines();
        while !serving.line.contains(expected) {
            let next = lines.next();
            serving.line = next
                .unwrap_or_else(|| panic!("{arguments:?}: {}", serving.line))
                .unwrap();
        }
        // What it says later must find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        serving
    }

    fn status(&self) -> String {
        fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const HOST: &str =
    "name = \"host1\"\nstate = \"state\"\nruntime = \"run\"\n[management]\nsocket = \"run/manager.sock\"\n";

/// A gateway to the manager of host.toml, and its port; `far.toml` leads there.
fn gateway(at: &Path) -> (Serving, String) {
    let init = "certificate init tls --host localhost --host 127.0.0.1";
    run(at, &init.split(' ').collect::<Vec<_>>());
    let token = run(at, &["principal", "add", "root", "--role", "administrator"]);
    fs::write(at.join("root.token"), token.lines().next().unwrap()).unwrap();
    fs::write(
        at.join("gateway.toml"),
        "listen = \"127.0.0.1:0\"\ncertificate = \"tls/server.pem\"\nkey = \"tls/server.key\"\n\
         access = \"access.toml\"\naudit = \"audit.log\"\nmanager = \"host.toml\"\n",
    )
    .unwrap();
    let gateway = Serving::start(at, &["gateway", "gateway.toml"], "can be managed at");
    let port = gateway.line.rsplit(':').next().unwrap().to_owned();
    fs::write(
        at.join("far.toml"),
        format!(
            "[remote]\naddress = \"localhost:{port}\"\nca = \"tls/ca.pem\"\ntoken-file = \"root.token\"\n"
        ),
    )
    .unwrap();
    (gateway, port)
}

/// A machine's process that writes to its disk and reads again what it was told is written, for so long.
fn machine(at: &Path, duration: Duration) -> Load {
    let had = AtomicBool::new(false);
    let attach = move |stream: &std::os::unix::net::UnixStream| {
        let request = AttachRequest {
            vm: "web1".parse()?,
            pool: None,
            disk: DiskConfig {
                id: "root".parse()?,
                image: None,
                file: Some("/web1.dsk".into()),
                ..DiskConfig::new("")
            },
            adapter: None,
            group_limits: None,
            goes_on: had.load(Ordering::Relaxed),
            memory_stays: false,
        };
        blocking::attach(stream, &request, Duration::from_secs(20))?;
        had.store(true, Ordering::Relaxed);
        Ok(())
    };
    Load {
        front_end: front_end::Options {
            socket: at.join("run/manager.sock"),
            queues: 1,
            queue_size: 128,
            block_size: 4096,
            segment: None,
            inflight: true,
            patience: Duration::from_secs(60),
            greeting: Some(Greeting(Arc::new(attach))),
        },
        pattern: Pattern::Mixed,
        depth: 8,
        duration,
        range: None,
        once: false,
        stride: None,
        data: Data::default(),
        verify: true,
        flush_every: 500,
        reconnect: true,
        patience: Duration::from_secs(60),
        pid: None,
        seed: 3,
    }
}

/// Grown and drained by curl, and by commands replaced and made a RAID 5, in the middle of which the manager is killed.
#[test]
fn a_pool_in_use_is_rebuilt_from_elsewhere_by_curl_and_by_commands() {
    if Command::new("curl").arg("--version").output().is_err() {
        return eprintln!("skipped: there is no curl");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for number in 0..6 {
        let file = fs::File::create(at.join(format!("d{number}.img"))).unwrap();
        file.set_len(400 << 20).unwrap();
    }
    let command = |text: &str| run(at, &text.split(' ').collect::<Vec<_>>());
    command("pool create tank d0.img d1.img d2.img d3.img d4.img");
    let host = |devices: &str| {
        fs::write(
            at.join("host.toml"),
            format!("{HOST}[pool]\ndevices = [{devices}]\n"),
        )
    };
    host("\"d0.img\", \"d1.img\", \"d2.img\", \"d3.img\", \"d4.img\"").unwrap();
    command("volume create safe --size 128M --layout mirror --config host.toml");
    command("file format --config host.toml");
    command("disk create /web1.dsk --size 32M --config host.toml");
    let manager = Serving::start(at, &["serve", "host.toml"], "is managed at");
    let (_gateway, port) = gateway(at);
    let load = machine(at, Duration::from_secs(15));
    let guest = thread::spawn(move || vhost_user_load::load::run(&load));

    let token = fs::read_to_string(at.join("root.token")).unwrap();
    let curl = |path: &str, request: &StorageRequest| {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--fail-with-body",
                "--cacert",
                "tls/ca.pem",
            ])
            .args(["--header", &format!("authorization: Bearer {}", token.trim())])
            .args(["--data", &serde_json::to_string(request).unwrap()])
            .arg(format!("https://localhost:{port}{path}"))
            .current_dir(at)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        said(&output)
    };
    let grow = Operation::ResizeVolume {
        name: "safe".into(),
        size: 160 << 20,
        shrink: false,
    };
    curl("/v1/storage", &StorageRequest::Pool(grow));
    let evacuate = Operation::EvacuateDevice {
        device: "d1".into(),
        to: None,
        throttle: 0,
    };
    let job = curl("/v1/pools/tank/storage", &StorageRequest::Begin(evacuate));
    assert!(job.contains("job"), "{job}");
    command("job wait --config far.toml");
    let new = at.join("d5.img").display().to_string();
    run(at, &["device", "replace", "d0", &new, "--config", "far.toml"]);
    host("\"d5.img\", \"d1.img\", \"d2.img\", \"d3.img\", \"d4.img\"").unwrap();

    let layout = "volume set-layout safe --layout raid5 --columns 3 --throttle 1M --config far.toml";
    let job = thread::spawn({
        let mut job = smsvmm(at, &layout.split(' ').collect::<Vec<_>>());
        move || job.output().unwrap()
    });
    while !command("job list --config far.toml").contains("set-layout") {
        assert!(!job.is_finished(), "{}", said(&job.join().unwrap()));
    }
    drop(manager);
    // Who waited for the job learns that nobody answers.
    job.join().unwrap();
    let _manager = Serving::start(at, &["serve", "host.toml"], "is managed at");
    let list = command("job list --config far.toml");
    let number = list
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().next());
    command(&format!(
        "job throttle {} 0 --config far.toml",
        number.unwrap_or_else(|| panic!("{list}"))
    ));
    command("job wait --config far.toml");
    let volumes = command("volume list --config far.toml");
    assert!(volumes.contains("raid5") && volumes.contains("160M"), "{volumes}");

    let report = guest.join().unwrap().unwrap();
    assert!(
        report.reconnects >= 1 && report.verified_blocks > 50,
        "{report:?}"
    );
    let audit = fs::read_to_string(at.join("audit.log")).unwrap();
    for done in ["resize-volume", "evacuate-device", "replace-device", "raid5"] {
        assert!(audit.contains(done), "{done}: {audit}");
    }
    command("file check --config far.toml");
}

#[test]
fn a_gateway_confines_itself_and_serves_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("host.toml"), HOST).unwrap();
    let _manager = Serving::start(at, &["serve", "host.toml"], "is managed at");
    let (gateway, _) = gateway(at);
    let status = gateway.status();
    for expected in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(expected), "{expected}: {status}");
    }
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:\t"))
        .unwrap();
    // What root keeps lets it open files that are others'.
    assert!(
        ["0000000000000000", "0000000000000002"].contains(&held),
        "{status}"
    );
    assert!(run(at, &["vm", "list", "--config", "far.toml"]).contains("no machines"));
    fs::write(
        at.join("web1.toml"),
        "name = \"web1\"\n[boot]\nkernel = \"bzImage\"\n",
    )
    .unwrap();
    run(at, &["vm", "define", "web1.toml", "--config", "far.toml"]);
    let list = run(at, &["vm", "list", "--config", "far.toml"]);
    assert!(list.contains("web1") && list.contains("stopped"), "{list}");
    // Who comes and goes is seen: the file is read again.
    let token = run(at, &["principal", "add", "looker", "--role", "viewer"]);
    fs::write(at.join("root.token"), token.lines().next().unwrap()).unwrap();
    run(at, &["vm", "list", "--config", "far.toml"]);
    let refused = || {
        let stop = smsvmm(at, &["vm", "stop", "web1", "--config", "far.toml"])
            .output()
            .unwrap();
        assert!(said(&stop).contains("operator"), "{}", said(&stop));
    };
    refused();
    // So is a log that was put aside.
    fs::rename(at.join("audit.log"), at.join("audit.log.1")).unwrap();
    refused();
    let audit = fs::read_to_string(at.join("audit.log")).unwrap();
    assert!(audit.contains("\"looker\""), "{audit}");
}
