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
