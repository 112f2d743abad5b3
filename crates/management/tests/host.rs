//! A host's manager at its socket.
#![allow(clippy::unwrap_used)]

#[path = "fake/mod.rs"]
#[allow(dead_code)]
mod fake;
#[path = "fake/host.rs"]
mod fake_host;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{EventKind, Host, MachineDefinition, ProblemKind, StorageRequest, Vm, VmName};
use fake::FakeVm;
use fake_host::FakeHost;
use management::{Client, ClientError, Scope, Server, ServerHandle, Target};

struct Setup {
    folder: tempfile::TempDir,
    host: Arc<FakeHost>,
    vm: Arc<FakeVm>,
    _servers: [ServerHandle; 2],
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("db1.sock");
        let vm = FakeVm::new();
        let machine = Server::bind(&socket)
            .unwrap()
            .start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(()))
            .unwrap();
        let host = FakeHost::new(socket);
        let manager = Server::bind(&folder.path().join("manager.sock"))
            .unwrap()
            .start_host(Arc::clone(&host) as Arc<dyn Host>)
            .unwrap();
        Self {
            folder,
            host,
            vm,
            _servers: [machine, manager],
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("manager.sock")
    }

    fn client(&self, scope: Scope) -> Client {
        Client::new(Target::Manager(self.socket(), scope)).unwrap()
    }

    /// The answer to a request, head and body.
    fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.host.calls.lock().unwrap())
    }
}

fn name() -> VmName {
    "db1".parse().unwrap()
}

fn kind<T: std::fmt::Debug>(answered: Result<T, ClientError>) -> ProblemKind {
    match answered.unwrap_err() {
        ClientError::Problem(problem) => problem.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn machines_are_defined_started_ended_and_forgotten() {
    let setup = Setup::new();
    let client = setup.client(Scope::All);
    assert_eq!(client.host().unwrap().machines.len(), 1);
    let definition = MachineDefinition {
        config: "name = \"db1\"".into(),
        folder: None,
        autostart: false,
        restart: api::RestartPolicy::Never,
    };
    setup.calls();
    client.define(&name(), &definition).unwrap();
    client.machine(&name()).unwrap();
    client.act_on_machine(&name(), "start").unwrap();
    client.act_on_machine(&name(), "shutdown").unwrap();
    client.act_on_machine(&name(), "stop").unwrap();
    client.delete_machine(&name()).unwrap();
    let calls = [
        "define db1",
        "show db1",
        "start db1",
        "shut down db1",
        "stop db1",
        "delete db1",
    ];
    assert_eq!(setup.calls(), calls);
    let other: VmName = "web1".parse().unwrap();
    assert_eq!(kind(client.machine(&other)), ProblemKind::NotFound);
    assert_eq!(
        kind(client.act_on_machine(&name(), "explode")),
        ProblemKind::NotFound
    );
    let refused = setup.ask("PUT /v1/vms/a%20b/start HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
    assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    let refused = setup.ask("POST /v1/vms/db1/start HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
    assert!(
        refused.starts_with("HTTP/1.1 405") && refused.contains("PUT"),
        "{refused}"
    );
}

#[test]
fn what_is_for_a_machine_is_passed_on_but_its_end_is_the_managers() {
    let setup = Setup::new();
    let machine = setup.client(Scope::Machine("db1".into()));
    assert_eq!(machine.status().unwrap().name.as_str(), "fake");
    machine.act("pause").unwrap();
    assert_eq!(*setup.vm.calls.lock().unwrap(), ["pause"]);
    setup.calls();
    machine.act("stop").unwrap();
    assert_eq!(setup.calls(), ["stop db1"]);
    assert_eq!(*setup.vm.calls.lock().unwrap(), ["pause"]);
    assert_eq!(
        kind(setup.client(Scope::Machine("web1".into())).status()),
        ProblemKind::NotFound
    );
    // A disk that is attached through the manager is one that the machine may have from it.
    let body = r#"{"file":"/more.dsk"}"#;
    let length = body.len();
    setup.calls();
    setup.ask(&format!(
        "POST /v1/vms/db1/vm/disks HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    ));
    let calls = setup.calls();
    assert!(
        calls.iter().any(|call| call == "allow a disk to db1"),
        "{calls:?}"
    );
    assert_eq!(machine.status().unwrap().disks.len(), 1);
}

#[test]
fn pools_are_chosen_by_name() {
    let setup = Setup::new();
    let ask = |scope| kind(setup.client(scope).storage(&StorageRequest::Status));
    assert_eq!(ask(Scope::All), ProblemKind::Conflict);
    assert_eq!(ask(Scope::Pool("tank".into())), ProblemKind::Conflict);
    assert_eq!(setup.calls(), ["storage None", "storage Some(\"tank\")"]);
}

#[test]
fn events_are_those_of_the_host() {
    let setup = Setup::new();
    setup
        .host
        .events()
        .record(EventKind::MachineDefined { vm: name() });
    let page = setup
        .client(Scope::All)
        .events(0, std::time::Duration::ZERO)
        .unwrap();
    assert_eq!(page.events.len(), 1);
    assert!(matches!(&page.events[0].kind, EventKind::MachineDefined { vm } if *vm == name()));
}

#[test]
fn a_disk_is_attached_to_the_connection_that_asks_for_it() {
    let setup = Setup::new();
    let body = r#"{"vm":"db1","disk":{"file":"/a.dsk"}}"#;
    let head = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n",
        body.len()
    );
    let upgraded = format!("{head}connection: upgrade\r\nupgrade: smsvmm-vhost-user\r\n\r\n{body}");
    let answer = setup.ask(&upgraded);
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nvhost-user"), "{answer}");
    assert_eq!(setup.calls(), ["attach db1"]);
    let plain = setup.ask(&format!("{head}\r\n{body}"));
    assert!(
        plain.starts_with("HTTP/1.1 400") && plain.contains("smsvmm-vhost-user"),
        "{plain}"
    );
    let change =
        setup.ask("PATCH /v1/attachments/db1/disk0 HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}");
    assert!(change.starts_with("HTTP/1.1 404"), "{change}");
}

#[test]
fn what_its_description_says_is_there() {
    let setup = Setup::new();
    let document = setup.ask("GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n");
    let (_, document) = document.split_once("\r\n\r\n").unwrap();
    let document: serde_json::Value = serde_json::from_str(document).unwrap();
    let mut count = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        // What is passed on is the machine's affair, and tested there.
        let rest = path.strip_prefix("/v1/vms/{name}/").unwrap_or_default();
        // And the fake pool refuses everything.
        if rest.starts_with("vm") || rest.starts_with("storage") || path == "/v1/pools/{pool}" {
            continue;
        }
        let place = path
            .replace("{name}", "db1")
            .replace("{pool}", "tank")
            .replace("{id}", "disk0");
        for (method, operation) in methods.as_object().unwrap() {
            let method = method.to_uppercase();
            let answer = setup.ask(&format!(
                "{method} {place} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
            ));
            let status = answer.get(9..12).unwrap();
            assert!(
                operation["responses"].get(status).is_some(),
                "{method} {path}: {answer}"
            );
            assert_ne!(status, "405", "{method} {path}: {answer}");
            count += 1;
        }
    }
    assert!(count > 20, "{count}");
    let metrics = setup.ask("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
    for line in [
        "smsvmm_machine_state{vm=\"db1\",state=\"running\"} 1",
        "smsvmm_attachment_requests_total{vm=\"db1\",device=\"disk0\",pool=\"tank\",file=\"/vm/db1.dsk\",operation=\"flush\"} 3",
        "smsvmm_manager_uptime_seconds{host=\"host1\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

/// What nobody should have to wait for longer; a busy machine is slow.
const AT_ONCE: Duration = Duration::from_secs(5);

impl Setup {
    /// Sends a part of a request, and leaves it at that.
    fn begin(&self, request: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // It may have lost its place by now.
        let _ = stream.write_all(request);
        stream
    }

    /// As [`Self::ask`], for what may be refused before it was sent as a whole.
    fn send(&self, request: &[u8]) -> String {
        let mut answer = Vec::new();
        let _ = self.begin(request).read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn is_answered_at_once(&self) {
        let begin = Instant::now();
        for request in [
            "GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n",
            "POST /v1/storage HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n{\"to\":\"status\"}",
        ] {
            let answer = self.ask(request);
            // Its one pool is not for this.
            assert!(
                answer.starts_with("HTTP/1.1 200") || answer.contains("not for this"),
                "{answer}"
            );
        }
        assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    }
}

#[test]
fn a_thousand_connections_that_say_nothing_or_half_of_it_keep_nobody_out() {
    let setup = Setup::new();
    let halves: [&[u8]; 4] = [
        b"",
        b"GET /v1/ho",
        b"GET /v1/host HTTP/1.1\r\nhost: x\r\n",
        // Half a body.
        b"POST /v1/storage HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n{\"to\":",
    ];
    let idle: Vec<UnixStream> = (0..1000)
        .map(|number| {
            if number % 250 == 0 {
                setup.is_answered_at_once();
            }
            setup.begin(halves[number % 4])
        })
        .collect();
    setup.is_answered_at_once();
    drop(idle);
    setup.is_answered_at_once();
}

#[test]
fn requests_that_last_leave_room_for_those_that_do_not() {
    let setup = Setup::new();
    let body = r#"{"to":"pool","request":{"operation":"wait-job","job":1}}"#;
    let request = format!(
        "POST /v1/storage HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let held = setup.host.hold.write().unwrap();
    let mut lasting: Vec<UnixStream> = (0..300).map(|_| setup.begin(request.as_bytes())).collect();
    setup.is_answered_at_once();
    // As many wait for events, and a machine is asked the same.
    let waiting: Vec<UnixStream> = (0..300)
        .map(|_| setup.begin(b"GET /v1/events?after=99&wait=60 HTTP/1.1\r\nhost: x\r\n\r\n"))
        .collect();
    setup.is_answered_at_once();
    let machine = setup.client(Scope::Machine("db1".into()));
    machine.status().unwrap();
    // A machine gets its disk.
    let disk = r#"{"vm":"db1","disk":{"file":"/a.dsk"}}"#;
    let upgraded = format!(
        "POST /v1/attachments HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\nconnection: upgrade\r\nupgrade: smsvmm-vhost-user\r\n\r\n{disk}",
        disk.len()
    );
    assert!(setup.ask(&upgraded).starts_with("HTTP/1.1 101"));
    drop(held);
    let mut counts = [0, 0];
    for stream in &mut lasting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        match answer.get(9..12) {
            Some("409") => counts[0] += 1,
            Some("503") if answer.contains("try again") => counts[1] += 1,
            _ => panic!("{answer}"),
        }
    }
    assert!(counts[0] >= 100 && counts[1] >= 50, "{counts:?}");
    drop(waiting);
}

#[test]
fn bodies_and_paths_that_are_wrong_are_refused_and_change_nothing() {
    let setup = Setup::new();
    let put = |body: &[u8]| {
        let head = format!(
            "PUT /v1/vms/db1 HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        setup.send(&[head.as_bytes(), body].concat())
    };
    let nested = [b"{\"config\":".as_slice(), &b"[".repeat(60_000)].concat();
    let objects = b"{\"a\":".repeat(10_000);
    let oversized = [br#"{"config":""#.as_slice(), &b"x".repeat(70_000), b"\"}"].concat();
    let bodies: [(&[u8], &str); 11] = [
        (b"", "400"),
        (b"{", "400"),
        (b"null", "400"),
        (b"[]", "400"),
        (b"{} {}", "400"),
        (br#"{"config":"a","config":"b"}"#, "400"),
        (br#"{"config":"a","restart":"never","nothing":1}"#, "400"),
        (b"{\"config\":\"\xff\xfe\"}", "400"),
        (&nested, "400"),
        (&objects, "400"),
        (&oversized, "413"),
    ];
    for (body, status) in bodies {
        let answer = put(body);
        let start = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!(answer.get(9..12), Some(status), "{start}: {answer}");
        assert!(answer.contains("urn:smsvmm:problem:"), "{answer}");
    }
    let long = format!("/v1/vms/{}", "x".repeat(9_000));
    let longer = format!("/v1/vms/{}", "x".repeat(40_000));
    for (path, statuses) in [
        ("/v1/vms/%2e%2e", ["400"].as_slice()),
        ("/v1/vms/%2e%2e/host", &["400"]),
        ("/v1/vms/../host", &["404"]),
        ("/v1/vms/db1/../../host", &["404"]),
        ("/v1/vms/db1/vm/%2e%2e/%2e%2e/host", &["404"]),
        ("/v1/vms/db1%2fvm", &["400"]),
        ("/v1/vms//vm", &["400"]),
        ("//v1/host", &["404"]),
        ("/v1//host", &["404"]),
        ("/v1/host/", &["404"]),
        ("/v1/pools/%2e%2e/storage/x", &["404"]),
        (&long, &["400"]),
        (&longer, &["400", "414", "431"]),
        ("http://x/v1/host", &["200"]),
        ("*", &["400", "404"]),
        ("/v1/host\u{fc}", &["400", "404"]),
    ] {
        let answer = setup.send(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        let status = answer.get(9..12).unwrap_or_default();
        assert!(statuses.contains(&status), "{path:.40}: {answer}");
    }
    for head in [
        "PUT /v1/vms/db1/stop HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "PUT /v1/vms/db1/stop HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        "PUT /v1/vms/db1 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let answer = setup.send(head.as_bytes());
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{head}: {answer}"
        );
    }
    setup
        .calls()
        .iter()
        .for_each(|call| assert!(!["define db1", "stop db1"].contains(&call.as_str()), "{call}"));
    // A connection carries one request: what follows is not done.
    let one = "PUT /v1/vms/db1/start HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
    let answer = setup.send(format!("{one}{}", one.replace("start", "stop")).as_bytes());
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert_eq!(setup.calls(), ["start db1"]);
}

#[test]
fn a_definition_is_changed_only_as_it_was_seen() {
    let setup = Setup::new();
    let seen = setup.ask("GET /v1/vms/db1 HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(
        seen.contains("\r\netag: \"1f\"\r\n") && seen.contains("no-store"),
        "{seen}"
    );
    let body = r#"{"config":"name = \"db1\""}"#;
    for (method, condition, status) in [
        ("PUT", "if-match: \"1f\"", "200"),
        ("PUT", "if-match: \"1e\", \"1f\"", "200"),
        ("PUT", "if-match: \"1e\"\r\nif-match: \"1f\"", "200"),
        ("PUT", "if-match: \"1e\"", "412"),
        ("PUT", "if-match: W/\"1f\"", "412"),
        ("PUT", "if-match: 1f", "400"),
        ("PUT", "if-match: \"\u{e9}\"", "400"),
        ("PUT", "if-none-match: *", "412"),
        ("DELETE", "if-match: \"1e\"", "412"),
        ("DELETE", "if-match: \"1f\"", "204"),
    ] {
        setup.calls();
        let answer = setup.ask(&format!(
            "{method} /v1/vms/db1 HTTP/1.1\r\nhost: x\r\n{condition}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ));
        assert_eq!(answer.get(9..12), Some(status), "{method} {condition}: {answer}");
        assert_eq!(
            setup.calls().len(),
            usize::from(status.starts_with('2')),
            "{condition}"
        );
        assert_eq!(
            answer.contains("problem:precondition"),
            status == "412",
            "{answer}"
        );
    }
    let definition = MachineDefinition {
        config: String::new(),
        folder: None,
        autostart: false,
        restart: api::RestartPolicy::Never,
    };
    let client = setup.client(Scope::All);
    assert_eq!(
        kind(client.define_new(&name(), &definition)),
        ProblemKind::Precondition
    );
}

#[test]
fn what_is_there_refuses_other_methods_and_numbers_that_are_none() {
    let setup = Setup::new();
    for path in [
        "/metrics",
        "/v1/metrics",
        "/v1/host",
        "/v1/events",
        "/healthz",
        "/readyz",
        "/v1/pools",
        "/v1/vms",
    ] {
        let answer = setup.ask(&format!("TRACE {path} HTTP/1.1\r\nhost: x\r\n\r\n"));
        assert_eq!(answer.get(9..12), Some("405"), "{path}: {answer}");
    }
    let answer = setup.ask("GET /v1/events HTTP/1.1\r\nhost: x\r\nlast-event-id: {}\r\n\r\n");
    assert_eq!(answer.get(9..12), Some("400"), "{answer}");
}
