//! The server, asked by raw bytes and by the client, for a machine that only remembers.
#![allow(clippy::unwrap_used)]

mod fake;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::virtual_disk::{CopyRequest, ExportRequest, ImageFormat, TransferRequest};
use api::{
    DeviceState, DiskChange, DiskConfig, DiskLimits, EventKind, NetBackend, NetConfig, Problem, ProblemKind,
    Vm,
};
use fake::FakeVm;
use management::{Client, ClientError, Removed, Server, ServerHandle};

/// The guest has let a disk go.
fn complete_removal(vm: &FakeVm, id: &str) {
    let mut status = vm.status.lock().unwrap();
    status.disks.retain(|disk| disk.config.id.as_str() != id);
    vm.events.record(EventKind::DeviceRemoved {
        id: id.parse().unwrap(),
    });
}

struct Setup {
    vm: Arc<FakeVm>,
    path: PathBuf,
    client: Client,
    _server: ServerHandle,
    _folder: tempfile::TempDir,
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.sock");
    let vm = FakeVm::new();
    let server = Server::bind(&path)
        .unwrap()
        .start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(()))
        .unwrap();
    let client = Client::new(&path).unwrap();
    Setup {
        vm,
        path,
        client,
        _server: server,
        _folder: folder,
    }
}

/// Sends raw bytes, returns the status line and the body.
fn raw(path: &Path, request: &str) -> (String, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (
        head.lines().next().unwrap_or_default().to_owned(),
        body.to_owned(),
    )
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn problem_of(result: Result<impl std::fmt::Debug, ClientError>) -> Problem {
    match result {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("expected a problem, got {other:?}"),
    }
}

#[test]
fn status_and_actions_reach_the_machine() {
    let setup = setup();
    assert_eq!(setup.client.status().unwrap().name.as_str(), "fake");
    for action in ["power-button", "reset", "pause", "stop"] {
        setup.client.act(action).unwrap();
    }
    let calls = setup.vm.calls.lock().unwrap().clone();
    assert_eq!(
        calls,
        [
            "power-button",
            "reset",
            "pause",
            "stop: the administrator's request"
        ]
    );
    let problem = problem_of(setup.client.act("resume"));
    assert_eq!(
        (problem.kind, problem.status, problem.remedy.as_deref()),
        (ProblemKind::Conflict, 409, Some("later"))
    );
}

#[test]
fn disks_and_groups_are_changed_while_they_are_in_use() {
    let setup = setup();
    let disk = setup
        .client
        .attach_disk(&DiskConfig::new("/images/a.raw"))
        .unwrap();
    let limits = DiskLimits {
        iops: Some(500),
        ..DiskLimits::default()
    };
    let change = DiskChange {
        limits,
        poll_us: Some(20),
        on_error: None,
    };
    let changed = setup.client.change_disk(&disk.config.id, &change).unwrap();
    assert_eq!(
        (changed.config.limits, changed.config.poll_us),
        (limits, Some(20))
    );
    let wrong = DiskChange {
        poll_us: Some(1 << 30),
        ..DiskChange::default()
    };
    let problem = problem_of(setup.client.change_disk(&disk.config.id, &wrong));
    assert_eq!(problem.kind, ProblemKind::Invalid, "{problem}");
    let problem = problem_of(setup.client.change_disk(&"disk7".parse().unwrap(), &change));
    assert_eq!(problem.kind, ProblemKind::NotFound);
    let bulk = "bulk".parse().unwrap();
    assert_eq!(setup.client.change_limits(&bulk, &limits).unwrap(), limits);
    assert_eq!(setup.vm.calls.lock().unwrap().as_slice(), ["limits of bulk"]);
    let (status, body) = raw(
        &setup.path,
        &request("PATCH", "/v1/vm/disks/disk0", "{\"speed\": 5}"),
    );
    assert!(
        status.contains("400") && body.contains("speed"),
        "{status} {body}"
    );
    let (status, _) = raw(&setup.path, &request("PATCH", "/v1/vm/nets/net0", "{}"));
    assert!(status.contains("405"), "{status}");
}

#[test]
fn devices_are_attached_listed_and_removed_when_the_guest_says_so() {
    let setup = setup();
    let disk = setup
        .client
        .attach_disk(&DiskConfig::new("/images/a.raw"))
        .unwrap();
    assert_eq!(disk.config.id.as_str(), "disk0");
    setup
        .client
        .attach_net(&NetConfig::new(NetBackend::User))
        .unwrap();
    let (status, body) = raw(&setup.path, &request("GET", "/v1/vm/disks/disk0", ""));
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(body.contains("/images/a.raw"), "{body}");

    let removal = setup.client.detach(&disk.config.id).unwrap();
    assert_eq!(removal.state, DeviceState::Removing);
    assert_eq!(
        setup.client.wait_for_removal(&removal, Duration::ZERO).unwrap(),
        Removed::Pending
    );
    let vm = Arc::clone(&setup.vm);
    let guest = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        complete_removal(&vm, "disk0");
    });
    let started = Instant::now();
    assert_eq!(
        setup
            .client
            .wait_for_removal(&removal, Duration::from_secs(20))
            .unwrap(),
        Removed::Done
    );
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "woken by the event, not by a time-out"
    );
    guest.join().unwrap();

    let removal = setup.client.detach(&"net0".parse().unwrap()).unwrap();
    setup.vm.events.record(EventKind::DeviceRemoveRefused {
        id: removal.id.clone(),
        reason: "busy".to_owned(),
    });
    let removed = setup
        .client
        .wait_for_removal(&removal, Duration::from_secs(20))
        .unwrap();
    assert_eq!(removed, Removed::Refused("busy".to_owned()));
    assert_eq!(
        problem_of(setup.client.detach(&"disk7".parse().unwrap())).kind,
        ProblemKind::NotFound
    );
}

#[test]
fn the_trace_of_a_disk_goes_on_where_a_reader_stopped_and_a_dump_has_all_disks() {
    let setup = setup();
    let id = setup
        .client
        .attach_disk(&DiskConfig::new("/a.raw"))
        .unwrap()
        .config
        .id;
    let first = setup.client.trace(&id, "").unwrap();
    assert_eq!((first.records.len(), first.next.as_str()), (1, "1,0"));
    let record = first.records[0];
    let newer = api::TraceRecord { offset: 0, ..record };
    setup.vm.trace.lock().unwrap().push(newer);
    let second = setup.client.trace(&id, &first.next).unwrap();
    assert_eq!(second.records, [newer]);
    let (_, body) = raw(
        &setup.path,
        &request("GET", "/v1/vm/disks/disk0/trace?after=1%2C0", ""),
    );
    assert!(body.contains(r#""offset":0"#) && !body.contains("4096"), "{body}");

    setup.vm.events.record(EventKind::Paused);
    let dump = setup.client.dump().unwrap();
    assert_eq!(dump.disks[0].records, [record, newer]);
    assert_eq!((dump.queues.len(), dump.events.len()), (1, 1));

    let problem = problem_of(setup.client.trace(&"other".parse().unwrap(), ""));
    assert_eq!(problem.kind, ProblemKind::NotFound);
    for (method, path, status) in [
        ("GET", "/v1/vm/disks/disk0/trace?before=1", "400"),
        ("POST", "/v1/vm/disks/disk0/trace", "405"),
        ("PUT", "/v1/vm/debug", "405"),
        ("GET", "/v1/vm/nets/net0/trace", "404"),
    ] {
        let (line, _) = raw(&setup.path, &request(method, path, ""));
        assert!(line.contains(status), "{method} {path}: {line}");
    }
}

#[test]
fn events_are_paged_and_waited_for() {
    let setup = setup();
    setup.vm.events.record(EventKind::Started);
    assert_eq!(setup.client.events(0, Duration::ZERO).unwrap().last, 1);
    let vm = Arc::clone(&setup.vm);
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        vm.events.record(EventKind::Paused);
    });
    let page = setup.client.events(1, Duration::from_secs(20)).unwrap();
    assert_eq!(page.events[0].kind, EventKind::Paused);
    later.join().unwrap();
    let started = Instant::now();
    assert!(
        setup
            .client
            .events(2, Duration::from_secs(1))
            .unwrap()
            .events
            .is_empty()
    );
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[test]
fn what_is_wrong_is_a_problem_with_the_right_status() {
    let setup = setup();
    let cases = [
        (
            request("GET", "/", ""),
            "404 Not Found",
            "urn:smsvmm:problem:not-found",
        ),
        (
            request("GET", "/v1/vm/nothing", ""),
            "404 Not Found",
            "\"object\":\"/v1/vm/nothing\"",
        ),
        (
            request("GET", "/v1/vm/disks/disk9", ""),
            "404 Not Found",
            "\"object\":\"disk9\"",
        ),
        (
            request("GET", "/v1/vm/disks/disk9/x", ""),
            "404 Not Found",
            "nothing at this path",
        ),
        (
            request("DELETE", "/v1/vm", ""),
            "405 Method Not Allowed",
            "use GET",
        ),
        (
            request("GET", "/v1/vm/pause", ""),
            "405 Method Not Allowed",
            "use PUT",
        ),
        (
            request("PATCH", "/v1/vm/disks", ""),
            "405 Method Not Allowed",
            "use GET, POST",
        ),
        (
            request("GET", "/v1/events?after=x", ""),
            "400 Bad Request",
            "`x` is not a whole number",
        ),
        (request("POST", "/v1/vm/disks", ""), "400 Bad Request", "EOF"),
        (
            request("POST", "/v1/vm/disks", "{\"imag\":\"/a\"}"),
            "400 Bad Request",
            "unknown field `imag`",
        ),
        (
            request("POST", "/v1/vm/disks", "{\"image\":\"a\"}"),
            "400 Bad Request",
            "relative path",
        ),
        (
            request("POST", "/v1/vm/disks", "{\"image\":\"/a\",\"queues\":99}"),
            "400 Bad Request",
            "\"object\":\"queues\"",
        ),
        (
            request("POST", "/v1/vm/nets", "{\"backend\":\"tap\"}"),
            "400 Bad Request",
            "\"object\":\"tap\"",
        ),
        (
            request("DELETE", "/v1/vm/disks/a%2fb", ""),
            "400 Bad Request",
            "not an identifier",
        ),
    ];
    for (text, status, part) in cases {
        let (found, body) = raw(&setup.path, &text);
        assert_eq!(found, format!("HTTP/1.1 {status}"), "for {text}");
        assert!(body.contains(part), "for {text}: {body}");
    }
    assert!(setup.vm.calls.lock().unwrap().is_empty());
}

#[test]
fn oversized_and_malformed_requests_are_refused_and_the_server_goes_on() {
    let setup = setup();
    let large = request("POST", "/v1/vm/disks", &" ".repeat((64 << 10) + 1));
    assert_eq!(raw(&setup.path, &large).0, "HTTP/1.1 413 Payload Too Large");
    let head = format!("GET /v1/vm HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(64 << 10));
    assert_eq!(
        raw(&setup.path, &head).0,
        "HTTP/1.1 431 Request Header Fields Too Large"
    );
    for text in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", "GET /v1/vm HTTP/9.9\r\n\r\n"] {
        assert_eq!(raw(&setup.path, text).0, "HTTP/1.1 400 Bad Request", "{text:?}");
    }
    let half = request("POST", "/v1/vm/disks", "{}").replace("content-length: 2", "content-length: 20");
    let mut stream = UnixStream::connect(&setup.path).unwrap();
    stream.write_all(half.as_bytes()).unwrap();
    drop(stream);
    assert!(setup.client.status().is_ok());
}

#[test]
fn idle_connections_lock_nobody_out() {
    let setup = setup();
    let idle: Vec<UnixStream> = (0..100)
        .map(|_| {
            let mut stream = UnixStream::connect(&setup.path).unwrap();
            // Whoever has said a part of it is no better.
            stream.write_all(b"PUT /v1/vm/stop HT").unwrap();
            stream
        })
        .collect();
    let (status, body) = raw(&setup.path, &request("GET", "/v1/vm", ""));
    assert_eq!(status, "HTTP/1.1 200 OK", "{body}");
    // The first ones had to go; a client that says no more is dropped after the header time-out of ten seconds.
    let started = Instant::now();
    for (stream, within) in [(&idle[0], 5), (&idle[99], 15)] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut rest = Vec::new();
        // What it has sent may have come after the end.
        let _ = { stream }.read_to_end(&mut rest);
        assert!(
            started.elapsed() < Duration::from_secs(within),
            "{:?}",
            started.elapsed()
        );
    }
    assert!(setup.vm.calls.lock().unwrap().is_empty());
}

#[test]
fn another_user_is_refused_even_if_the_socket_lets_him_in() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        eprintln!("only root can act as another user");
        return;
    }
    let setup = setup();
    let open = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    open(setup.path.parent().unwrap(), 0o755);
    open(&setup.path, 0o666);
    let path = setup.path.clone();
    // Of this thread only, and for good.
    let stranger = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        raw(&path, &request("PUT", "/v1/vm/stop", ""))
    });
    let (status, body) = stranger.join().unwrap();
    assert_eq!(status, "HTTP/1.1 403 Forbidden");
    assert!(
        body.contains("user 65534 may not manage a machine of user 0"),
        "{body}"
    );
    assert!(setup.vm.calls.lock().unwrap().is_empty());
}

#[test]
fn a_machine_that_is_not_there_is_told_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let client = Client::new(folder.path().join("no.sock")).unwrap();
    let error = client.status().unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }));
    assert!(error.to_string().contains("is it running"), "{error}");
}

#[test]
fn the_server_ends_with_its_handle_and_takes_the_socket_along() {
    let Setup {
        vm,
        path,
        client,
        _server,
        _folder,
    } = setup();
    // A client that waits for events gets its answer when the machine ends.
    let waiting = std::thread::spawn(move || client.events(0, Duration::from_secs(50)).unwrap());
    std::thread::sleep(Duration::from_millis(200));
    let started = Instant::now();
    vm.events.record(EventKind::Stopped {
        reason: api::ExitReason::PowerOff,
    });
    drop(_server);
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(waiting.join().unwrap().events.len(), 1);
    assert!(!path.exists());
}

fn copying(path: &str) -> TransferRequest {
    TransferRequest::Copy(CopyRequest {
        path: path.into(),
        to: "/to.dsk".into(),
        thick: false,
        verify: false,
    })
}

#[test]
fn a_transfer_has_a_connection_of_its_own_in_both_directions() {
    let setup = setup();
    let (early, mut line) = setup.client.transfer(&copying("/from.dsk")).unwrap();
    // More than any buffer in between holds, and longer than a request may take.
    let data: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    line.write_all(&data).unwrap();
    // The machine answers others meanwhile.
    assert_eq!(setup.client.status().unwrap().name.as_str(), "fake");
    line.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = early;
    line.read_to_end(&mut said).unwrap();
    assert!(said == [b"/from.dsk", data.as_slice()].concat());
}

#[test]
fn a_transfer_is_refused_as_any_other_request() {
    let setup = setup();
    let export = TransferRequest::Export(ExportRequest {
        path: "/from.dsk".into(),
        image: "out.raw".into(),
        format: ImageFormat::Raw,
        force: false,
        verify: false,
    });
    let problem = problem_of(setup.client.transfer(&export));
    assert_eq!(problem.kind, ProblemKind::Conflict);
    let (status, body) = raw(&setup.path, &request("POST", "/v1/storage/transfer", "{}"));
    assert!(
        status.contains("400") && body.contains("smsvmm-transfer"),
        "{status} {body}"
    );
    let (status, _) = raw(&setup.path, &request("GET", "/v1/storage/transfer", ""));
    assert!(status.contains("405"), "{status}");
    // Four at a time.
    let mut lines: Vec<_> = (0..4)
        .map(|_| setup.client.transfer(&copying("/a.dsk")).unwrap().1)
        .collect();
    let problem = problem_of(setup.client.transfer(&copying("/a.dsk")));
    assert_eq!(problem.kind, ProblemKind::Exhausted);
    lines.pop();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while let Err(error) = setup.client.transfer(&copying("/a.dsk")) {
        assert!(std::time::Instant::now() < end, "{error}");
    }
}

#[test]
fn a_transfer_client_that_does_not_wait_for_the_answer_is_let_go() {
    let setup = setup();
    let body = serde_json::to_string(&copying("/from.dsk")).unwrap();
    let head = format!(
        "POST /v1/storage/transfer HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: smsvmm-transfer\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let (status, rest) = raw(&setup.path, &format!("{head}{body}too early"));
    assert!(status.contains("101"), "{status}");
    assert_eq!(rest, "");
}

/// Begins to follow the events, as `curl -N` does; `headers` end with a line break.
fn follow(path: &Path, query: &str, headers: &str) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let head =
        format!("GET /v1/events{query} HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    BufReader::new(stream)
}

/// Reads until a line begins with `start`.
fn line_of(stream: &mut impl BufRead, start: &str) -> String {
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).unwrap() > 0, "no {start}");
        if line.starts_with(start) {
            return line;
        }
    }
}

#[test]
fn events_are_followed_as_a_stream_which_goes_on_where_it_was() {
    let setup = setup();
    setup.vm.events.record(EventKind::Started);
    let mut stream = follow(&setup.path, "", "");
    assert_eq!(line_of(&mut stream, "HTTP"), "HTTP/1.1 200 OK\r\n");
    assert!(line_of(&mut stream, "content-type").contains("text/event-stream"));
    assert_eq!(line_of(&mut stream, "id:"), "id: 1\n");
    assert!(line_of(&mut stream, "data:").contains("\"started\""));
    setup.vm.events.record(EventKind::Paused);
    assert_eq!(line_of(&mut stream, "id:"), "id: 2\n");
    drop(stream);
    setup.vm.events.record(EventKind::Resumed);
    for mut stream in [
        follow(&setup.path, "", "last-event-id: 2\r\n"),
        follow(&setup.path, "?after=2", ""),
        // What a client has received last is newer than where it once began.
        follow(&setup.path, "?after=0", "last-event-id: 2\r\n"),
    ] {
        assert_eq!(line_of(&mut stream, "id:"), "id: 3\n");
    }
    let mut wrong = follow(&setup.path, "", "last-event-id: x\r\n");
    assert!(line_of(&mut wrong, "HTTP").contains("400"));
    let mut stream = follow(&setup.path, "?after=3", "");
    let reason = api::ExitReason::PowerOff;
    setup.vm.events.record(EventKind::Stopped { reason });
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("id: 4\n") && rest.ends_with("0\r\n\r\n"), "{rest}");
}

#[test]
fn streams_are_bounded_end_with_the_server_and_leave_room_for_others() {
    let setup = setup();
    let mut streams: Vec<_> = (0..16).map(|_| follow(&setup.path, "", "")).collect();
    for stream in &mut streams {
        line_of(stream, "retry:");
    }
    assert!(line_of(&mut follow(&setup.path, "", ""), "HTTP").contains("503"));
    assert!(setup.client.status().is_ok());
    streams.pop();
    let end = Instant::now() + Duration::from_secs(20);
    while !line_of(&mut follow(&setup.path, "", ""), "HTTP").contains("200") {
        assert!(Instant::now() < end, "no room again");
    }
    drop(setup);
    for stream in &mut streams {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        // The end of a body in chunks: who is cut off when the grace is over does not hear it.
        let rest = String::from_utf8_lossy(&rest);
        assert!(rest.ends_with("0\r\n\r\n"), "a stream was cut off: {rest}");
    }
}

#[test]
fn lists_come_in_pages_that_lead_to_the_next() {
    let setup = setup();
    for _ in 0..5 {
        setup
            .client
            .attach_disk(&DiskConfig::new("/images/a.raw"))
            .unwrap();
    }
    let mut names = Vec::new();
    let mut query = Some("limit=2".to_owned());
    let mut pages = 0;
    while let Some(asked) = query {
        let mut stream = UnixStream::connect(&setup.path).unwrap();
        let text = request("GET", &format!("/v1/vm/disks?{asked}"), "");
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let disks: Vec<api::DiskStatus> = serde_json::from_str(body).unwrap();
        names.extend(disks.into_iter().map(|disk| disk.config.id.to_string()));
        let link = head.lines().find_map(|line| line.strip_prefix("link: <?"));
        query = link.map(|link| link.split_once(">; rel=\"next\"").unwrap().0.to_owned());
        pages += 1;
        if pages == 1 {
            // What goes meanwhile moves nothing.
            complete_removal(&setup.vm, "disk1");
        }
    }
    assert_eq!(
        (names.join(" ").as_str(), pages),
        ("disk0 disk1 disk2 disk3 disk4", 3)
    );
    let (status, _) = raw(&setup.path, &request("GET", "/v1/vm/nets?limit=0", ""));
    assert!(status.contains("400"), "{status}");
}

/// A request with a key.
fn keyed(path: &str, key: &str, body: &str) -> String {
    request("POST", path, body).replacen("host: x", &format!("host: x\r\nidempotency-key: {key}"), 1)
}

#[test]
fn a_request_that_is_sent_again_with_its_key_is_done_once() {
    let setup = setup();
    let body = r#"{"image": "/images/a.raw"}"#;
    let first = raw(&setup.path, &keyed("/v1/vm/disks", "one", body));
    assert!(first.0.contains("201"), "{first:?}");
    assert_eq!(raw(&setup.path, &keyed("/v1/vm/disks", "one", body)), first);
    assert_eq!(setup.client.status().unwrap().disks.len(), 1);
    // Another key, or none, is another request.
    assert_ne!(raw(&setup.path, &keyed("/v1/vm/disks", "two", body)), first);
    raw(&setup.path, &request("POST", "/v1/vm/disks", body));
    assert_eq!(setup.client.status().unwrap().disks.len(), 3);

    for (path, body) in [
        ("/v1/vm/disks", r#"{"image": "/images/b.raw"}"#),
        ("/v1/vm/nets", body),
    ] {
        let (status, text) = raw(&setup.path, &keyed(path, "one", body));
        assert!(status.contains("422"), "{status}");
        let problem: Problem = serde_json::from_str(&text).unwrap();
        assert_eq!(problem.kind, ProblemKind::KeyReused);
        assert!(problem.remedy.is_some());
    }
    for key in ["", "with space", &"x".repeat(513)] {
        let (status, _) = raw(&setup.path, &keyed("/v1/vm/disks", key, body));
        assert!(status.contains("400"), "{key}: {status}");
    }
    // What was refused is told again, too.
    let refused = keyed(
        "/v1/storage",
        "three",
        r#"{"to": "pool", "request": {"operation": "heal"}}"#,
    );
    let first = raw(&setup.path, &refused);
    assert!(first.0.contains("409"), "{first:?}");
    assert_eq!(raw(&setup.path, &refused), first);
    let calls = setup.vm.calls.lock().unwrap().clone();
    assert_eq!(calls.len(), 1, "{calls:?}");
}

#[test]
fn a_request_goes_on_without_its_connection_and_who_comes_again_waits_for_it() {
    let setup = setup();
    let busy = setup.vm.status.lock().unwrap();
    let asked = keyed("/v1/vm/disks", "one", r#"{"image": "/images/a.raw"}"#);
    let mut lost = UnixStream::connect(&setup.path).unwrap();
    lost.write_all(asked.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(lost);
    let again: Vec<_> = (0..3)
        .map(|_| {
            let (path, asked) = (setup.path.clone(), asked.clone());
            std::thread::spawn(move || raw(&path, &asked))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    drop(busy);
    let again: Vec<_> = again.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(again[0].0.contains("201"), "{again:?}");
    assert!(again.iter().all(|answer| *answer == again[0]), "{again:?}");
    assert_eq!(setup.client.status().unwrap().disks.len(), 1);
}

#[test]
fn the_client_asks_again_when_its_connection_breaks() {
    let setup = setup();
    // Before the server: the first request arrives, and its answer is lost.
    let path = setup.path.with_extension("front");
    let front = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let behind = setup.path.clone();
    let passing = std::thread::spawn(move || {
        let mut keys = Vec::new();
        for number in 0..2 {
            let (mut client, _) = front.accept().unwrap();
            let mut text = vec![0; 4096];
            let length = client.read(&mut text).unwrap();
            text.truncate(length);
            let mut server = UnixStream::connect(&behind).unwrap();
            server.write_all(&text).unwrap();
            let mut answer = Vec::new();
            server.read_to_end(&mut answer).unwrap();
            if number == 1 {
                client.write_all(&answer).unwrap();
            }
            let text = String::from_utf8(text).unwrap();
            keys.extend(
                text.lines()
                    .find(|line| line.starts_with("idempotency-key"))
                    .map(str::to_owned),
            );
        }
        keys
    });
    let client = Client::new(&path).unwrap();
    client.attach_disk(&DiskConfig::new("/images/a.raw")).unwrap();
    let keys = passing.join().unwrap();
    assert!(keys.len() == 2 && keys[0] == keys[1], "{keys:?}");
    assert_eq!(setup.client.status().unwrap().disks.len(), 1);
}

#[test]
fn heads_and_methods_can_be_asked_for() {
    let setup = setup();
    let head = |text: &str| {
        let mut stream = UnixStream::connect(&setup.path).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = head(&request("HEAD", "/v1/vm", ""));
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
    for (path, allow) in [
        ("/v1/vm", "GET, HEAD, OPTIONS"),
        ("/v1/vm/pause", "PUT, OPTIONS"),
        ("/v1/vm/disks/disk0", "GET, PATCH, DELETE, HEAD, OPTIONS"),
    ] {
        let allow = format!("allow: {allow}\r\n");
        for (method, status) in [("OPTIONS", "204"), ("TRACE", "405"), ("QUERY", "405")] {
            let answer = head(&request(method, path, ""));
            assert!(
                answer.contains(status) && answer.contains(&allow),
                "{method} {path}: {answer}"
            );
        }
    }
}
