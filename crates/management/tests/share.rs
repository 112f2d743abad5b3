//! What `smsvmm share` answers at its management socket.
#![allow(clippy::unwrap_used)]

#[path = "fake/share.rs"]
mod fake_share;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::storage::PoolEventKind;
use api::{EventKind, ProblemKind, Share, ShareDisk, StorageRequest};
use fake_share::FakeShare;
use management::{Client, ClientError, Server, ServerHandle};

struct Setup {
    share: Arc<FakeShare>,
    client: Client,
    path: PathBuf,
    _server: ServerHandle,
    _folder: tempfile::TempDir,
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.sock");
    let share = Arc::<FakeShare>::default();
    let server = Server::bind(&path).unwrap();
    Setup {
        client: Client::new(&path).unwrap(),
        _server: server.start_share(Arc::clone(&share) as Arc<dyn Share>).unwrap(),
        share,
        path,
        _folder: folder,
    }
}

fn kind<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> ProblemKind {
    match outcome.unwrap_err() {
        ClientError::Problem(problem) => problem.kind,
        other => panic!("{other}"),
    }
}

/// Status and body.
fn ask(setup: &Setup, method: &str, path: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(&setup.path).unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    (status, body)
}

#[test]
fn disks_come_and_go_by_names_of_any_kind() {
    let setup = setup();
    let names = ["/vm/root.dsk@monday", "a b%2F", "ä", "plain"];
    for name in names {
        let disk = ShareDisk {
            name: Some(name.to_owned()),
            image: Some("/x".to_owned()),
            ..ShareDisk::default()
        };
        assert_eq!(setup.client.share_disk(&disk).unwrap().name, name);
    }
    let status = setup.client.share().unwrap();
    assert_eq!(status.disks.len(), names.len());
    let (code, body) = ask(&setup, "GET", "/v1/share/disks/%2Fvm%2Froot.dsk%40monday");
    assert_eq!(
        (code, body.contains("/vm/root.dsk@monday")),
        (200, true),
        "{body}"
    );
    let (code, body) = ask(&setup, "GET", "/v1/share/disks?limit=1");
    assert_eq!((code, body.matches("\"name\"").count()), (200, 1), "{body}");
    for name in names {
        setup.client.unshare_disk(name).unwrap();
        assert_eq!(kind(setup.client.unshare_disk(name)), ProblemKind::NotFound);
    }
    assert!(setup.share.disks.lock().unwrap().is_empty());
}

#[test]
fn clients_are_disconnected_and_the_process_is_stopped() {
    let setup = setup();
    setup.client.disconnect_from_share("7").unwrap();
    assert_eq!(
        kind(setup.client.disconnect_from_share("8")),
        ProblemKind::NotFound
    );
    assert_eq!(
        kind(setup.client.storage(&StorageRequest::Status)),
        ProblemKind::NotFound
    );
    assert!(!*setup.share.stopped.lock().unwrap());
    setup.client.stop_share().unwrap();
    assert!(*setup.share.stopped.lock().unwrap());
}

#[test]
fn what_is_not_there_is_told_as_everywhere() {
    let setup = setup();
    for (method, path, expected) in [
        ("GET", "/v1/share", 200),
        ("HEAD", "/v1/share", 200),
        ("GET", "/healthz", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/metrics", 200),
        ("POST", "/v1/share", 405),
        ("GET", "/v1/share/stop", 405),
        ("PUT", "/v1/share/disks/x", 405),
        ("GET", "/v1/share/disks/x", 404),
        ("DELETE", "/v1/share/disks/%zz", 400),
        ("OPTIONS", "/v1/share/clients", 204),
        ("GET", "/v1/share/clients/7/8", 404),
        ("GET", "/v1/vm", 404),
        ("POST", "/v1/share/disks", 400),
    ] {
        let (status, body) = ask(&setup, method, path);
        assert_eq!(status, expected, "{method} {path}: {body}");
    }
}

#[test]
fn events_of_the_pool_are_told_in_pages_and_as_a_stream() {
    let setup = setup();
    let event = || EventKind::Pool {
        pool: "tank".to_owned(),
        kind: PoolEventKind::UnflushedMissing,
        text: "look".to_owned(),
    };
    assert!(setup.client.events(0, Duration::ZERO).unwrap().events.is_empty());
    setup.share.events.record(event());
    let page = setup.client.events(0, Duration::from_secs(60)).unwrap();
    assert_eq!(page.events[0].kind, event());
    let mut stream = UnixStream::connect(&setup.path).unwrap();
    let request = "GET /v1/events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut told: Vec<u8> = Vec::new();
    while told.windows(6).filter(|window| window == b"data: ").count() < 2 {
        let mut bytes = [0; 4096];
        let length = stream.read(&mut bytes).unwrap();
        assert!(length > 0);
        if told.is_empty() {
            setup.share.events.record(event());
        }
        told.extend(&bytes[..length]);
    }
    assert_eq!(ask(&setup, "DELETE", "/v1/events").0, 405);
}
