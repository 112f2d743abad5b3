//! The gateway: who is let in, who may what, and what the audit log says of it.
#![allow(clippy::unwrap_used)]

mod fake;
#[path = "fake/host.rs"]
mod fake_host;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use access::{ClientTls, Fingerprint, Principal, Principals, Role, TlsFiles, Token};
use api::virtual_disk::{CopyRequest, DiskOperation, TransferRequest};
use api::{ConsoleRequest, DiskConfig, Host, NetBackend, NetConfig, ProblemKind, StorageRequest, Vm, VmName};
use fake::FakeVm;
use fake_host::FakeHost;
use management::{
    Client, ClientError, Gateway, GatewayConfig, Machine, Remote, Running, Scope, Server, ServerHandle,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;

/// A certificate authority, and what it has signed, in a folder.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), issuer.pem()).unwrap();
        Self {
            issuer,
            folder: folder.to_owned(),
        }
    }

    /// Files with certificate and key, and the certificate's sum.
    fn sign(&self, file: &str, host: &str) -> (PathBuf, PathBuf, Fingerprint) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (cert_file, key_file) = (
            self.folder.join(format!("{file}.pem")),
            self.folder.join(format!("{file}.key")),
        );
        std::fs::write(&cert_file, certificate.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file, Fingerprint::of(certificate.der()))
    }
}

struct Setup {
    folder: tempfile::TempDir,
    vm: Arc<FakeVm>,
    address: SocketAddr,
    authority: Authority,
    principals: Principals,
    gateway: Option<Running>,
    host: Arc<FakeHost>,
    _servers: [ServerHandle; 2],
}

impl Setup {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds somebody, and gives its token.
    fn add(&mut self, name: &str, role: Role, machines: &[&str]) -> String {
        let token = Token::generate().unwrap();
        let principal = Principal {
            name: name.into(),
            role,
            machines: machines.iter().map(|name| (*name).to_owned()).collect(),
            expires: None,
            token_sha256: Some(token.hash()),
            certificate_sha256: None,
        };
        let path = self.path("access.toml");
        self.principals.add(principal, &path).unwrap();
        self.principals.save(&path).unwrap();
        token.reveal().to_owned()
    }

    fn client_of(
        &self,
        machine: &str,
        token: Option<String>,
        certificate: Option<(PathBuf, PathBuf)>,
    ) -> Client {
        self.client_for(Scope::Machine(machine.to_owned()), token, certificate)
    }

    fn client_for(
        &self,
        scope: Scope,
        token: Option<String>,
        certificate: Option<(PathBuf, PathBuf)>,
    ) -> Client {
        let remote = Remote {
            address: format!("localhost:{}", self.address.port()),
            scope,
            tls: ClientTls {
                authorities: self.path("ca.pem"),
                certificate,
            },
            token,
        };
        Client::new(management::Target::Remote(Box::new(remote))).unwrap()
    }

    fn client(&self, token: &str) -> Client {
        self.client_of("web1", Some(token.to_owned()), None)
    }

    /// What the audit log says.
    fn audit(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("audit.log")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let (certificate, key, _) = authority.sign("server", "localhost");
    let vm = FakeVm::new();
    let socket = folder.path().join("web1.sock");
    let server = Server::bind(&socket)
        .unwrap()
        .start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(()))
        .unwrap();
    let host = FakeHost::new(socket);
    let manager = folder.path().join("manager.sock");
    let managing = Server::bind(&manager)
        .unwrap()
        .start_host(Arc::clone(&host) as Arc<dyn Host>)
        .unwrap();
    let principals = Principals::default();
    principals.save(&folder.path().join("access.toml")).unwrap();
    let machine = |name: &str| Machine {
        name: name.into(),
        socket: folder.path().join(format!("{name}.sock")),
        console: (name == "web1").then(|| folder.path().join("console.sock")),
    };
    let gateway = Gateway::bind(GatewayConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: TlsFiles {
            certificate,
            key,
            client_authorities: Some(folder.path().join("ca.pem")),
        },
        access: folder.path().join("access.toml"),
        audit: folder.path().join("audit.log"),
        machines: vec![machine("web1"), machine("off")],
        manager: Some(manager),
        handshake: Duration::from_secs(5),
    })
    .unwrap();
    let address = gateway.address().unwrap();
    Setup {
        vm,
        address,
        authority,
        principals,
        gateway: Some(gateway.start().unwrap()),
        host,
        _servers: [server, managing],
        folder,
    }
}

fn problem_of<T: std::fmt::Debug>(answered: Result<T, ClientError>) -> api::Problem {
    match answered.unwrap_err() {
        ClientError::Problem(problem) => *problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_role_may_what_it_should_and_the_log_has_what_was_changed_and_refused() {
    let mut setup = setup();
    let viewer = setup.add("viewer", Role::Viewer, &[]);
    let operator = setup.add("operator", Role::Operator, &[]);
    let (viewer, operator) = (setup.client(&viewer), setup.client(&operator));

    assert_eq!(viewer.status().unwrap().name.as_str(), "fake");
    assert!(setup.audit().is_empty(), "looking is not logged");
    let refused = problem_of(viewer.act("stop"));
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    assert!(
        refused.detail.contains("viewer") && refused.detail.contains("operator"),
        "{refused}"
    );
    assert!(setup.vm.calls.lock().unwrap().is_empty());

    operator.act("pause").unwrap();
    assert_eq!(*setup.vm.calls.lock().unwrap(), ["pause"]);
    let delete = StorageRequest::Disk(DiskOperation::Delete {
        path: "/a.dsk".into(),
    });
    assert_eq!(problem_of(operator.storage(&delete)).kind, ProblemKind::Forbidden);

    let administrator = setup.add("root", Role::Administrator, &[]);
    let answer = problem_of(setup.client(&administrator).storage(&delete));
    assert_eq!(answer.detail, "this machine has no pool", "it was passed on");

    let audit = setup.audit();
    let of = |name: &str| -> Vec<&Value> { audit.iter().filter(|line| line["principal"] == name).collect() };
    assert_eq!(
        (of("viewer").len(), of("operator").len(), of("root").len()),
        (1, 2, 1)
    );
    assert_eq!(of("viewer")[0]["status"], 403);
    assert_eq!(of("operator")[0]["path"], "/v1/vms/web1/vm/pause");
    let root = of("root")[0];
    assert_eq!(root["body"]["request"]["path"], "/a.dsk", "{root}");
    let end = audit.last().unwrap();
    assert_eq!((&end["request"], &end["status"]), (&root["request"], &409.into()));
    let text = std::fs::read_to_string(setup.path("audit.log")).unwrap();
    assert!(!text.contains(&administrator), "a secret is in the log");
}

#[test]
fn who_is_not_known_any_more_is_not_let_in_and_has_to_wait() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    let client = setup.client(&token);
    client.status().unwrap();
    // A certificate of the authority, but nobody's.
    let (certificate, key, sum) = setup.authority.sign("ben", "ben");
    let ben = setup.client_of("web1", None, Some((certificate, key)));
    assert_eq!(problem_of(ben.status()).kind, ProblemKind::Unauthenticated);
    let path = setup.path("access.toml");
    let principal = Principal {
        name: "ben".into(),
        role: Role::Viewer,
        machines: Vec::new(),
        expires: None,
        token_sha256: None,
        certificate_sha256: Some(sum),
    };
    setup.principals.add(principal, &path).unwrap();
    setup.principals.save(&path).unwrap();
    ben.status().unwrap();
    assert_eq!(problem_of(ben.act("stop")).kind, ProblemKind::Forbidden);

    setup.principals.remove("anna", &path).unwrap();
    setup.principals.save(&path).unwrap();
    assert_eq!(problem_of(client.status()).kind, ProblemKind::Unauthenticated);
    // A busy machine may be so slow that the first wait, of one second, is over before it is noticed.
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < Duration::from_secs(60), "nobody has to wait");
        let refused = problem_of(setup.client("smsvmm_00").status());
        if refused.kind != ProblemKind::TooMany {
            continue;
        }
        assert_eq!(refused.status, 429);
        assert!(refused.remedy.unwrap().contains("second"));
        // All that come from there.
        if ben
            .status()
            .is_err_and(|error| problem_of::<()>(Err(error)).kind == ProblemKind::TooMany)
        {
            break;
        }
    }
    let refusals = setup.audit().iter().filter(|line| line["status"] == 401).count();
    assert!(refusals >= 7, "{refusals}");
}

#[test]
fn a_file_of_principals_that_cannot_be_read_lets_nobody_in() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    let client = setup.client(&token);
    client.status().unwrap();
    std::fs::write(setup.path("access.toml"), "principal = 7").unwrap();
    assert_eq!(problem_of(client.status()).kind, ProblemKind::Host);
    std::fs::remove_file(setup.path("access.toml")).unwrap();
    assert_eq!(problem_of(client.status()).kind, ProblemKind::Host);
    setup.principals.save(&setup.path("access.toml")).unwrap();
    client.status().unwrap();
}

#[test]
fn nothing_changes_that_cannot_be_logged() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    std::fs::remove_file(setup.path("audit.log")).unwrap();
    std::fs::create_dir(setup.path("audit.log")).unwrap();
    let client = setup.client(&token);
    client.status().unwrap();
    let refused = problem_of(client.act("stop"));
    assert!(refused.detail.contains("audit log"), "{refused}");
    assert!(setup.vm.calls.lock().unwrap().is_empty());
    std::fs::remove_dir(setup.path("audit.log")).unwrap();
    client.act("pause").unwrap();
}

#[test]
fn machines_that_one_may_not_know_are_not_there() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &["off"]);
    let other = problem_of(setup.client(&token).status());
    let nobody = problem_of(setup.client_of("nobody", Some(token.clone()), None).status());
    assert_eq!((other.kind, &other.detail), (nobody.kind, &nobody.detail));
    assert_eq!(other.kind, ProblemKind::NotFound);
    let off = problem_of(setup.client_of("off", Some(token.clone()), None).status());
    assert!(off.detail.contains("does not answer"), "{off}");
    let listed = curl(&setup, "GET", "/v1/vms", &token, "");
    assert!(listed.contains("\"off\"") && !listed.contains("web1"), "{listed}");
    let all = setup.add("ben", Role::Viewer, &[]);
    let listed = curl(&setup, "GET", "/v1/vms", &all, "");
    assert!(
        listed.contains("\"running\"") && listed.contains("does not answer"),
        "{listed}"
    );
}

/// As any other client of HTTP over TLS: the whole answer.
fn curl(setup: &Setup, method: &str, path: &str, token: &str, body: &str) -> String {
    let tls = ClientTls {
        authorities: setup.path("ca.pem"),
        certificate: None,
    };
    let name = "localhost".try_into().unwrap();
    let mut session = rustls::ClientConnection::new(tls.load().unwrap(), name).unwrap();
    let mut socket = TcpStream::connect(setup.address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    // It may answer before it has read all.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn conditions_and_tags_go_over_it() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    let seen = curl(&setup, "GET", "/v1/vms/db1", &token, "");
    assert!(seen.contains("\r\netag: \"1f\"\r\n"), "{seen}");
    // The header goes where curl() has the path.
    let refused = |condition: &str| {
        let answer = curl(
            &setup,
            "PUT",
            &format!("/v1/vms/db1 HTTP/1.1\r\n{condition}\r\nx-rest:"),
            &token,
            r#"{"config":""}"#,
        );
        answer.get(9..12).unwrap().to_owned()
    };
    assert_eq!(refused("if-match: \"1f\""), "200");
    assert_eq!(refused("if-match: \"1e\"\r\nif-match: \"1f\""), "200");
    assert_eq!(refused("if-match: \"1e\""), "412");
    assert_eq!(refused("if-none-match: *"), "412");
}

#[test]
fn the_log_has_what_was_changed_before_and_after() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    setup
        .client(&token)
        .attach_disk(&DiskConfig::new("/a.raw"))
        .unwrap();
    let limited = curl(
        &setup,
        "PATCH",
        "/v1/vms/web1/vm/disks/disk0",
        &token,
        r#"{"limits":{"iops":5}}"#,
    );
    assert!(limited.starts_with("HTTP/1.1 200"), "{limited}");
    let defined = curl(&setup, "PUT", "/v1/vms/db1", &token, r#"{"config":""}"#);
    assert!(defined.starts_with("HTTP/1.1 200"), "{defined}");
    let deleted = curl(&setup, "DELETE", "/v1/vms/nobody", &token, "");
    assert!(deleted.starts_with("HTTP/1.1 404"), "{deleted}");
    // A pool that does not tell its status: what is not known is left out.
    let delete = r#"{"to":"pool","request":{"operation":"delete-volume","name":"safe"}}"#;
    let unknown = curl(&setup, "POST", "/v1/storage", &token, delete);
    assert!(unknown.starts_with("HTTP/1.1 409"), "{unknown}");

    let audit = setup.audit();
    let of = |path: &str| {
        let first = audit.iter().find(|line| line["path"] == path).unwrap();
        let same = |line: &&Value| line["request"] == first["request"] && line.get("path").is_none();
        (first, audit.iter().find(same).unwrap())
    };
    let (first, second) = of("/v1/vms/web1/vm/disks/disk0");
    assert_eq!(first["before"]["id"], "disk0", "{first}");
    assert_eq!(second["after"]["id"], "disk0", "{second}");
    assert_ne!(first["before"], second["after"]);
    let (first, second) = of("/v1/vms/db1");
    assert_eq!(
        (&first["before"]["revision"], &second["after"]["revision"]),
        (&"1f".into(), &"1f".into())
    );
    assert!(first["before"].get("pid").is_none(), "{first}");
    let (first, second) = of("/v1/vms/nobody");
    assert!(first.get("before").is_some_and(Value::is_null) && second.get("after").is_none());
    let (first, second) = of("/v1/storage");
    assert!(
        first.get("before").is_none() && second["status"] == 409,
        "{first} {second}"
    );
}

#[test]
fn requests_that_are_wrong_are_told_so() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    for (method, path, body, status) in [
        ("GET", "/", "", "404"),
        ("GET", "/v1/vms/web1", "", "404"),
        ("GET", "/v1/vms/web1/nothing", "", "404"),
        ("POST", "/v1/vms", "", "405"),
        ("GET", "/openapi.json", "", "200"),
        ("GET", "/v1/vms/web1/metrics", "", "200"),
        ("GET", "/v1/vms/web1/openapi.json", "", "404"),
        ("GET", "/v1/vms/../vm", "", "404"),
        ("POST", "/v1/vms/web1/storage", "{", "400"),
        ("POST", "/v1/vms/web1/storage", "{\"to\": \"moon\"}", "400"),
        ("POST", "/v1/vms/web1/storage/transfer", "{}", "400"),
        ("POST", "/v1/vms/web1/storage", &"x".repeat(70_000), "413"),
        ("DELETE", "/v1/vms/web1/vm", "", "405"),
        ("GET", "/v1/vms/web1/events?after=x", "", "400"),
    ] {
        let answer = curl(&setup, method, path, &token, body);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{method} {path}: {answer}"
        );
    }
    assert!(curl(&setup, "GET", "/healthz", "", "").starts_with("HTTP/1.1 200"));
    assert!(curl(&setup, "GET", "/v1/vms", "", "").contains("www-authenticate: Bearer"));
}

#[test]
fn pages_and_keys_go_over_it_and_keys_are_each_principals_own() {
    let mut setup = setup();
    let (anna, ben) = (
        setup.add("anna", Role::Administrator, &[]),
        setup.add("ben", Role::Administrator, &[]),
    );
    let body = r#"{"image": "/a.raw"}"#;
    let attach = |token: &str| {
        let token = format!("{token}\r\nidempotency-key: one");
        curl(&setup, "POST", "/v1/vms/web1/vm/disks", &token, body)
    };
    assert!(!attach(&anna).contains("idempotency-replayed"));
    let again = attach(&anna);
    assert!(
        again.contains("201") && again.contains("idempotency-replayed: true"),
        "{again}"
    );
    assert!(attach(&ben).contains("\"disk1\""));
    let page = curl(&setup, "GET", "/v1/vms/web1/vm/disks?limit=1", &anna, "");
    assert!(
        page.contains("link: <?limit=1&after=disk0>; rel=\"next\""),
        "{page}"
    );
    let page = curl(&setup, "GET", "/v1/vms?limit=1", &anna, "");
    assert!(page.contains("200 OK"), "{page}");
}

#[test]
fn disks_go_over_it_in_both_directions() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Operator, &[]);
    let copy = TransferRequest::Copy(CopyRequest {
        path: "/from.dsk".into(),
        to: "/a.dsk".into(),
        thick: false,
        verify: false,
    });
    let (early, mut line) = setup.client(&token).transfer(&copy).unwrap();
    let data: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    line.write_all(&data).unwrap();
    line.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = early;
    line.read_to_end(&mut said).unwrap();
    assert!(said == [b"/from.dsk", data.as_slice()].concat());
    let viewer = setup.add("ben", Role::Viewer, &[]);
    assert_eq!(
        problem_of(setup.client(&viewer).transfer(&copy)).kind,
        ProblemKind::Forbidden
    );
}

#[test]
fn a_gateway_of_another_authority_or_name_is_not_spoken_to() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Operator, &[]);
    let other = tempfile::tempdir().unwrap();
    Authority::new(other.path(), "ca");
    let remote = |address: String, authorities: PathBuf| {
        let tls = ClientTls {
            authorities,
            certificate: None,
        };
        let remote = Remote {
            address,
            scope: Scope::Machine("web1".into()),
            tls,
            token: Some(token.clone()),
        };
        Client::new(management::Target::Remote(Box::new(remote)))
    };
    let port = setup.address.port();
    for (address, authorities) in [
        (format!("localhost:{port}"), other.path().join("ca.pem")),
        (format!("127.0.0.1:{port}"), setup.path("ca.pem")),
    ] {
        let error = remote(address, authorities).unwrap().status().unwrap_err();
        assert!(matches!(error, ClientError::Gateway { .. }), "{error:?}");
    }
    let wrong = remote("localhost".into(), setup.path("ca.pem"));
    assert!(matches!(wrong.unwrap_err(), ClientError::Address(_)));
    let missing = remote("localhost:1".into(), setup.path("nothing.pem"));
    assert!(matches!(missing.unwrap_err(), ClientError::Tls(_)));
}

/// Waits for something that comes soon.
fn soon<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_console_is_for_operators_one_types_and_the_log_has_when_it_was_closed() {
    let mut setup = setup();
    let viewer = setup.add("viewer", Role::Viewer, &[]);
    let (anna, ben) = (
        setup.add("anna", Role::Operator, &[]),
        setup.add("ben", Role::Operator, &["web1"]),
    );
    let typing = ConsoleRequest::default();
    let looking = ConsoleRequest { read_only: true };
    // The machine does not run.
    assert_eq!(
        problem_of(setup.client(&anna).console(&typing)).kind,
        ProblemKind::Conflict
    );
    let guest = std::os::unix::net::UnixListener::bind(setup.path("console.sock")).unwrap();
    for request in [&typing, &looking] {
        assert_eq!(
            problem_of(setup.client(&viewer).console(request)).kind,
            ProblemKind::Forbidden
        );
    }
    let (_, mut annas) = setup.client(&anna).console(&typing).unwrap();
    let (mut machine, _) = guest.accept().unwrap();
    machine.write_all(b"login: ").unwrap();
    let mut shown = [0; 7];
    annas.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"login: ");
    annas.write_all(b"root\n").unwrap();
    let mut typed = [0; 5];
    machine.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"root\n");

    assert_eq!(
        problem_of(setup.client(&ben).console(&typing)).kind,
        ProblemKind::Conflict
    );
    let (_, mut bens) = setup.client(&ben).console(&looking).unwrap();
    let (mut second, _) = guest.accept().unwrap();
    bens.write_all(b"rm -rf /\n").unwrap();
    second.write_all(b"# ").unwrap();
    bens.read_exact(&mut shown[..2]).unwrap();
    // Who is not known any more has to leave; what was typed went nowhere.
    setup.principals.all.retain(|principal| principal.name != "ben");
    setup.principals.save(&setup.path("access.toml")).unwrap();
    let mut rest = Vec::new();
    let _ = bens.read_to_end(&mut rest);
    second.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "{rest:?}");

    drop(annas);
    assert_eq!(machine.read(&mut shown).unwrap(), 0);
    let closed = soon(|| {
        let audit = setup.audit();
        let closed: Vec<Value> = audit
            .iter()
            .filter(|line| line.get("closed").is_some())
            .cloned()
            .collect();
        (closed.len() == 2).then_some((audit, closed))
    });
    let (audit, closed) = closed;
    for (line, name, why) in [
        (&closed[0], "ben", "who had it may not any more"),
        (&closed[1], "anna", "the client closed it"),
    ] {
        assert_eq!(
            (line["principal"].as_str(), line["closed"].as_str()),
            (Some(name), Some(why))
        );
        let opened = audit
            .iter()
            .find(|other| other["request"] == line["request"])
            .unwrap();
        assert_eq!(opened["path"], "/v1/vms/web1/console");
        assert!(
            audit
                .iter()
                .any(|other| other["request"] == line["request"] && other["status"] == 101)
        );
    }
    // The place is free again; and what is open when the gateway ends is in the log as well.
    let (_, open) = setup.client(&anna).console(&typing).unwrap();
    drop(setup.gateway.take());
    let last = setup.audit().pop().unwrap();
    assert_eq!(last["closed"], "the server ended");
    drop(open);
}

#[test]
fn the_console_of_a_managers_machine_goes_through_the_manager() {
    let mut setup = setup();
    let anna = setup.add("anna", Role::Operator, &[]);
    *setup.host.console.lock().unwrap() = Some(setup.path("serial.sock"));
    let guest = std::os::unix::net::UnixListener::bind(setup.path("serial.sock")).unwrap();
    let client = setup.client_of("db1", Some(anna), None);
    let (_, mut console) = client.console(&ConsoleRequest::default()).unwrap();
    let (mut machine, _) = guest.accept().unwrap();
    console.write_all(b"a").unwrap();
    let mut byte = [0];
    machine.read_exact(&mut byte).unwrap();
    machine.write_all(&byte).unwrap();
    console.read_exact(&mut byte).unwrap();
    assert_eq!(
        problem_of(client.console(&ConsoleRequest::default())).kind,
        ProblemKind::Conflict
    );
    // The guest ends it.
    drop(machine);
    assert_eq!(console.read(&mut byte).unwrap(), 0);
    soon(|| {
        setup
            .audit()
            .iter()
            .any(|line| line["closed"] == "the machine closed it")
            .then_some(())
    });
}

#[test]
fn clients_that_say_nothing_or_rubbish_keep_nobody_out() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Operator, &[]);
    let mut rubbish = TcpStream::connect(setup.address).unwrap();
    rubbish.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    rubbish.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = Vec::new();
    let _ = rubbish.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"));
    // Of one address there are 64, of which those that say nothing make room.
    let idle: Vec<TcpStream> = (0..1000)
        .map(|_| TcpStream::connect(setup.address).unwrap())
        .collect();
    let begin = Instant::now();
    setup.client(&token).status().unwrap();
    setup.client_for(Scope::All, Some(token), None).host().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    drop(idle);
}

#[test]
fn events_are_followed_over_it_as_long_as_one_may_see_them() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Viewer, &["web1"]);
    let other = setup.add("ben", Role::Viewer, &["off"]);
    let tls = ClientTls {
        authorities: setup.path("ca.pem"),
        certificate: None,
    };
    let config = tls.load().unwrap();
    let follow = |token: &str| {
        let name = "localhost".try_into().unwrap();
        let session = rustls::ClientConnection::new(Arc::clone(&config), name).unwrap();
        let socket = TcpStream::connect(setup.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut stream = rustls::StreamOwned::new(session, socket);
        let head = "GET /v1/vms/web1/events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\nlast-event-id: 1\r\n";
        let head = format!("{head}authorization: Bearer {token}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    // The answer up to `part`; all of it if that does not come.
    let until = |stream: &mut dyn Read, part: &str| {
        let mut text = String::new();
        let mut byte = [0];
        while !text.contains(part) && stream.read(&mut byte).is_ok_and(|length| length == 1) {
            text.push(char::from(byte[0]));
        }
        text
    };
    setup.vm.events.record(api::EventKind::Started);
    setup.vm.events.record(api::EventKind::Paused);
    let mut refused = follow(&other);
    assert!(until(&mut refused, "no such machine").contains(" 404 "));
    let mut stream = follow(&token);
    let text = until(&mut stream, "\"paused\"");
    assert!(
        text.contains("text/event-stream") && text.contains("id: 2\n"),
        "{text}"
    );
    assert!(!text.contains("id: 1\n"), "{text}");
    setup.vm.events.record(api::EventKind::Resumed);
    assert!(until(&mut stream, "\"resumed\"").contains("id: 3\n"));
    // From now on nobody may.
    Principals::default().save(&setup.path("access.toml")).unwrap();
    setup.vm.events.record(api::EventKind::PowerButtonPressed);
    let rest = until(&mut stream, "\0");
    assert!(!rest.contains("power-button"), "{rest}");
    assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
}

#[test]
fn a_manager_behind_the_gateway_is_for_those_who_may_know_the_whole_host() {
    let mut setup = setup();
    let all = |setup: &Setup, token: &str| setup.client_for(Scope::All, Some(token.to_owned()), None);
    let db: VmName = "db1".parse().unwrap();
    let viewer = setup.add("viewer", Role::Viewer, &[]);
    let operator = setup.add("operator", Role::Operator, &[]);
    let administrator = setup.add("root", Role::Administrator, &[]);
    let restricted = setup.add("db", Role::Administrator, &["db1"]);

    assert_eq!(all(&setup, &viewer).host().unwrap().name, "host1");
    let refused = problem_of(all(&setup, &viewer).act_on_machine(&db, "start"));
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    setup.host.calls.lock().unwrap().clear();
    all(&setup, &operator).act_on_machine(&db, "start").unwrap();
    let refused = problem_of(all(&setup, &operator).delete_machine(&db));
    assert_eq!(refused.kind, ProblemKind::Forbidden);
    all(&setup, &administrator).delete_machine(&db).unwrap();
    assert_eq!(
        *setup.host.calls.lock().unwrap(),
        ["start db1", "show db1", "delete db1", "show db1"]
    );

    // Somebody for one machine has that, and not the host's pools, not even through it.
    let own = setup.client_of("db1", Some(restricted.clone()), None);
    assert_eq!(own.status().unwrap().name.as_str(), "fake");
    all(&setup, &restricted).act_on_machine(&db, "stop").unwrap();
    assert_eq!(
        problem_of(all(&setup, &restricted).host()).kind,
        ProblemKind::NotFound
    );
    let pool = problem_of(own.storage(&StorageRequest::Status));
    assert_eq!(pool.kind, ProblemKind::Forbidden, "{pool}");
    let pool = problem_of(all(&setup, &restricted).storage(&StorageRequest::Status));
    assert_eq!(pool.kind, ProblemKind::NotFound, "{pool}");
    let other: VmName = "web1".parse().unwrap();
    let hidden = problem_of(all(&setup, &restricted).act_on_machine(&other, "start"));
    assert_eq!(hidden.kind, ProblemKind::NotFound);
    // A viewer may look at a pool by its name, and no more.
    let tank = setup.client_for(Scope::Pool("tank".into()), Some(viewer), None);
    let looked = problem_of(tank.storage(&StorageRequest::Status));
    assert_eq!(looked.detail, "the pool is not for this", "it was passed on");
    let settle = StorageRequest::Begin(api::storage::Operation::Settle);
    assert_eq!(problem_of(tank.storage(&settle)).kind, ProblemKind::Forbidden);
}

#[test]
fn what_its_description_says_is_there() {
    let mut setup = setup();
    let token = setup.add("anna", Role::Administrator, &[]);
    let client = setup.client(&token);
    client.attach_disk(&DiskConfig::new("/a.raw")).unwrap();
    client.attach_net(&NetConfig::new(NetBackend::User)).unwrap();
    let document = curl(&setup, "GET", "/openapi.json", &token, "");
    let (_, document) = document.split_once("\r\n\r\n").unwrap();
    let document: Value = serde_json::from_str(document).unwrap();
    let mut count = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let id = if path.contains("/nets/") { "net0" } else { "disk0" };
        let path = path.replace("{name}", "web1").replace("{id}", id);
        for (method, operation) in methods.as_object().unwrap() {
            let answer = curl(&setup, &method.to_uppercase(), &path, &token, "");
            let status = answer.get(9..12).unwrap();
            let described = &operation["responses"];
            assert!(described.get(status).is_some(), "{method} {path}: {answer}");
            // What needs a body says so; what does not, does it.
            let expected = match operation.get("requestBody") {
                Some(_) => "400",
                None if path.ends_with("/resume") => "409",
                None => "20",
            };
            assert!(status.starts_with(expected), "{method} {path}: {answer}");
            count += 1;
        }
    }
    assert!(count > 20, "{count}");
}
