//! `smsvmm gateway` and `smsvmm serve` as processes, without machines and pools: what is left to a gateway once it serves.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

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

#[test]
fn a_gateway_confines_itself_and_serves_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(
        at.join("host.toml"),
        "name = \"host1\"\nstate = \"state\"\nruntime = \"run\"\n[management]\nsocket = \"run/manager.sock\"\n",
    )
    .unwrap();
    run(
        at,
        &[
            "certificate",
            "init",
            "tls",
            "--host",
            "localhost",
            "--host",
            "127.0.0.1",
        ],
    );
    let token = run(at, &["principal", "add", "root", "--role", "administrator"]);
    fs::write(at.join("root.token"), token.lines().next().unwrap()).unwrap();
    fs::write(
        at.join("gateway.toml"),
        "listen = \"127.0.0.1:0\"\ncertificate = \"tls/server.pem\"\nkey = \"tls/server.key\"\n\
         access = \"access.toml\"\naudit = \"audit.log\"\nmanager = \"host.toml\"\n",
    )
    .unwrap();
    let _manager = Serving::start(at, &["serve", "host.toml"], "is managed at");
    let gateway = Serving::start(at, &["gateway", "gateway.toml"], "can be managed at");
    let port = gateway.line.rsplit(':').next().unwrap().to_owned();
    fs::write(
        at.join("far.toml"),
        format!(
            "[remote]\naddress = \"localhost:{port}\"\nca = \"tls/ca.pem\"\ntoken-file = \"root.token\"\n"
        ),
    )
    .unwrap();
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
