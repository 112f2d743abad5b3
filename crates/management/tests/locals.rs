//! Users of the host at a manager's socket, each with what his role allows. Needs root, to be others.
#![allow(clippy::unwrap_used)]

#[path = "fake/mod.rs"]
#[allow(dead_code)]
mod fake;
#[path = "fake/host.rs"]
#[allow(dead_code)]
mod fake_host;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use access::Role;
use api::virtual_disk::DiskOperation;
use api::{Host, StorageRequest};
use fake_host::FakeHost;
use management::{Local, Locals, Server};

/// In the environment of a process that asks: the socket and the request.
const SOCKET: &str = "SMSVMM_TEST_SOCKET";
const REQUEST: &str = "SMSVMM_TEST_REQUEST";

/// What other users run.
#[test]
fn asks() {
    let (Ok(socket), Ok(request)) = (std::env::var(SOCKET), std::env::var(REQUEST)) else {
        return;
    };
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    println!("ANSWER {answer}");
}

/// The status that a user in these groups is answered with.
fn status(
    socket: &Path,
    user: u32,
    group: u32,
    groups: &str,
    method: &str,
    path: &str,
    body: &str,
) -> String {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let run = Command::new("setpriv")
        .args([format!("--reuid={user}"), format!("--regid={group}")])
        .arg(if groups.is_empty() {
            "--clear-groups".to_owned()
        } else {
            format!("--groups={groups}")
        })
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "asks", "--nocapture"])
        .env(SOCKET, socket)
        .env(REQUEST, request)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    let (_, answer) = said
        .split_once("ANSWER HTTP/1.1 ")
        .unwrap_or_else(|| panic!("{said} {}", String::from_utf8_lossy(&run.stderr)));
    answer[..3].to_owned()
}

#[test]
fn each_may_what_his_role_allows_and_the_kernel_says_who_he_is() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can be others");
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        return eprintln!("skipped: there is no setpriv");
    }
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let socket = folder.path().join("manager.sock");
    let host = FakeHost::new(folder.path().join("vm.sock"));
    let locals = Locals::new(vec![
        (Local::User(4001), Role::Operator),
        (Local::Group(5001), Role::Viewer),
        (Local::Group(5002), Role::Administrator),
    ]);
    let _server = Server::bind(&socket)
        .unwrap()
        .for_locals(locals)
        .unwrap()
        .start_host(host as Arc<dyn Host>)
        .unwrap();
    let look = ("GET", "/v1/host", String::new());
    let start = ("PUT", "/v1/vms/db1/start", String::new());
    let delete = ("DELETE", "/v1/vms/db1", String::new());
    let snapshot = StorageRequest::Disk(DiskOperation::Snapshot {
        paths: vec!["/a.dsk".into()],
        name: "x".into(),
        description: String::new(),
    });
    let snapshot = ("POST", "/v1/storage", serde_json::to_string(&snapshot).unwrap());
    let ask = |user, group, groups: &str, (method, path, body): &(&str, &str, String)| {
        status(&socket, user, group, groups, method, path, body)
    };
    // By a supplementary group, by the own one, by the user.
    assert_eq!(ask(4000, 4000, "4000,5001", &look), "200");
    assert_eq!(ask(4000, 5001, "", &look), "200");
    assert_eq!(ask(4001, 4001, "", &look), "200");
    for (user, groups) in [(4000, "5001"), (4002, "4002")] {
        for asked in [&start, &delete, &snapshot] {
            assert_eq!(ask(user, 4000, groups, asked), "403", "{user} {asked:?}");
        }
    }
    assert_eq!(ask(4002, 4002, "4002", &look), "403", "nobody");
    assert_eq!(ask(4001, 4001, "", &start), "202");
    assert_ne!(ask(4001, 4001, "", &snapshot), "403");
    assert_eq!(ask(4001, 4001, "", &delete), "403");
    let odd = ("POST", "/v1/storage", "{".to_owned());
    assert_eq!(ask(4001, 4001, "", &odd), "400", "what is meant decides");
    // The highest of all roles.
    assert_ne!(ask(4001, 5002, "5001", &delete), "403");
}
