//! What the server says of itself is what it does: each operation of its document, asked of it, and the answers against their
//! schemas.
#![allow(clippy::unwrap_used)]

mod fake;
mod some_pool;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::storage::JobState;
use api::{DeviceId, EventKind, ExitReason, Vm, VmState};
use fake::FakeVm;
use management::{Server, ServerHandle};
use serde_json::Value;

struct Setup {
    vm: Arc<FakeVm>,
    path: PathBuf,
    _server: ServerHandle,
    _folder: tempfile::TempDir,
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.sock");
    let vm = FakeVm::new();
    *vm.pool.lock().unwrap() = Some(some_pool::some_pool());
    let server = Server::bind(&path)
        .unwrap()
        .start(Arc::clone(&vm) as Arc<dyn Vm>, || Ok(()))
        .unwrap();
    Setup {
        vm,
        path,
        _server: server,
        _folder: folder,
    }
}

struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

fn ask(path: &Path, method: &str, target: &str, headers: &str, body: &str) -> Reply {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let length = body.len();
    let method = method.to_uppercase();
    let text =
        format!("{method} {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer).unwrap();
    answer.truncate(length);
    let head = String::from_utf8_lossy(&answer).to_lowercase();
    if !head.contains("\r\ncontent-length:") {
        // Who has been answered 101, and who streams, waits for the end of what we send. Who has a long answer to give would take it
        // for a client that has gone.
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (first, rest) = head.split_once("\r\n").unwrap_or((head, ""));
    let headers = rest.lines().filter_map(|line| line.split_once(": "));
    Reply {
        status: first.split(' ').nth(1).unwrap().parse().unwrap(),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        body: body.to_owned(),
    }
}

/// What of JSON Schema the document uses (draft 2020-12); anything else is an error of this test. Patterns and formats are left
/// to schemathesis.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Value::Object(keywords) = schema else {
        return match schema {
            Value::Bool(true) => Ok(()),
            _ => Err(format!("{at}: nothing is allowed here")),
        };
    };
    let again = |schema: &Value| check(document, schema, value, at);
    let wrong = |what: String| Err(format!("{at}: {value} is {what}"));
    let items = value.as_array();
    let count = items.map(|items| items.len() as u64);
    for (keyword, wanted) in keywords {
        let list = || wanted.as_array().unwrap().iter();
        match keyword.as_str() {
            "$ref" => {
                let there = wanted.as_str().unwrap().trim_start_matches('#');
                check(document, document.pointer(there).unwrap(), value, at)?;
            }
            "type" => {
                let names: Vec<&str> = match wanted {
                    Value::Array(names) => names.iter().map(|name| name.as_str().unwrap()).collect(),
                    name => vec![name.as_str().unwrap()],
                };
                let is = |name: &str| match name {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "null" => value.is_null(),
                    other => panic!("type {other}"),
                };
                if !names.iter().any(|name| is(name)) {
                    return wrong(format!("none of {names:?}"));
                }
            }
            "const" if value != wanted => return wrong(format!("not {wanted}")),
            "enum" if !list().any(|one| one == value) => return wrong(format!("not in {wanted}")),
            "anyOf" if !list().any(|one| again(one).is_ok()) => return wrong(format!("nothing of {wanted}")),
            "oneOf" => {
                let fit = list().filter(|one| again(one).is_ok()).count();
                if fit != 1 {
                    return wrong(format!("{fit} of the alternatives {wanted}"));
                }
            }
            "allOf" => list().try_for_each(again)?,
            "minimum" if value.as_f64() < wanted.as_f64() => return wrong(format!("below {wanted}")),
            "maximum" if value.as_f64() > wanted.as_f64() => return wrong(format!("above {wanted}")),
            "required" => {
                for key in list() {
                    if value.is_object() && value.get(key.as_str().unwrap()).is_none() {
                        return wrong(format!("without {key}"));
                    }
                }
            }
            "properties" => {
                for (key, schema) in wanted.as_object().unwrap() {
                    if let Some(value) = value.get(key) {
                        check(document, schema, value, &format!("{at}.{key}"))?;
                    }
                }
            }
            "additionalProperties" => {
                let known = schema.get("properties");
                for (key, value) in value.as_object().into_iter().flatten() {
                    if known.is_none_or(|known| known.get(key).is_none()) {
                        check(document, wanted, value, &format!("{at}.{key}"))?;
                    }
                }
            }
            "items" => {
                for (number, item) in items.into_iter().flatten().enumerate() {
                    check(document, wanted, item, &format!("{at}[{number}]"))?;
                }
            }
            "minItems" if count < wanted.as_u64() => {
                return wrong(format!("fewer than {wanted}"));
            }
            "maxItems" if count > wanted.as_u64() => {
                return wrong(format!("more than {wanted}"));
            }
            "const" | "enum" | "anyOf" | "minItems" | "maxItems" | "minimum" | "maximum" | "description"
            | "default" | "format" | "pattern" => {}
            other => panic!("{at}: {other} is not known to this test"),
        }
    }
    Ok(())
}

/// Sees that an answer is one of those that the operation is said to have.
fn check_reply(document: &Value, operation: &Value, reply: &Reply) {
    let responses = &operation["responses"];
    let said = responses.get(reply.status.to_string()).unwrap_or_else(|| {
        panic!(
            "{} has no {}: {}",
            operation["operationId"], reply.status, reply.body
        )
    });
    let said = match said.get("$ref") {
        Some(there) => document
            .pointer(there.as_str().unwrap().trim_start_matches('#'))
            .unwrap(),
        None => said,
    };
    let Some(content) = said.get("content") else {
        assert_eq!(reply.body, if reply.status == 101 { "/a.dsk" } else { "" });
        return;
    };
    let kind = reply.headers["content-type"].split(';').next().unwrap();
    let schema = &content.get(kind).unwrap_or_else(|| panic!("{kind} in {content}"))["schema"];
    if kind.ends_with("json") {
        let value: Value = serde_json::from_str(&reply.body).unwrap();
        check(document, schema, &value, kind)
            .unwrap_or_else(|error| panic!("{}: {error}", operation["operationId"]));
    } else {
        assert_eq!(schema["type"], "string");
    }
    for header in said
        .get("headers")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|header| header.1["required"] == true)
    {
        assert!(
            reply.headers.contains_key(&header.0.to_lowercase()),
            "{}",
            header.0
        );
    }
}

/// Operations with what makes them succeed, in an order in which they do: name, parameters in the path, headers, body, status.
const CASES: [(&str, &str, &str, &str, u16); 27] = [
    ("getDescription", "", "", "", 200),
    ("getHealth", "", "", "", 200),
    ("getReadiness", "", "", "", 200),
    (
        "attachDisk",
        "",
        "",
        r#"{"image": "/a.raw", "limits": {"iops": 5}, "bus": "virtio-scsi", "target": 3}"#,
        201,
    ),
    (
        "attachNet",
        "",
        "",
        r#"{"forward": ["tcp:127.0.0.1:8022:22"], "mac": "02:00:00:12:34:56"}"#,
        201,
    ),
    ("getVm", "", "", "", 200),
    ("getMetrics", "", "", "", 200),
    ("pressPowerButton", "", "", "", 204),
    ("stop", "", "", "", 204),
    ("reset", "", "", "", 204),
    ("pause", "", "", "", 204),
    // The machine of this test does not like it.
    ("resume", "", "", "", 409),
    ("changeLimits", "bulk", "", r#"{"bytes": "10M"}"#, 200),
    ("listDisks", "", "", "", 200),
    ("getDisk", "disk0", "", "", 200),
    ("changeDisk", "disk0", "", r#"{"poll-us": 20}"#, 200),
    ("getTrace", "disk0", "", "", 200),
    ("getDebug", "", "", "", 200),
    ("detachDisk", "disk0", "", "", 202),
    ("listNets", "", "", "", 200),
    ("getNet", "net0", "", "", 200),
    ("detachNet", "net0", "", "", 202),
    ("storage", "", "", r#"{"to": "status"}"#, 200),
    (
        "storage",
        "",
        "",
        r#"{"to": "begin", "request": {"operation": "settle"}}"#,
        409,
    ),
    (
        "transfer",
        "",
        "connection: upgrade\r\nupgrade: smsvmm-transfer\r\n",
        r#"{"transfer": "copy", "path": "/a.dsk", "to": "/b.dsk"}"#,
        101,
    ),
    ("getEvents", "", "", "", 200),
    ("getEvents", "", "accept: text/event-stream\r\n", "", 200),
];

#[test]
fn every_operation_is_answered_as_the_document_says() {
    let setup = setup();
    let text = ask(&setup.path, "GET", "/openapi.json", "", "").body;
    let document: Value = serde_json::from_str(&text).unwrap();
    for kind in every_kind_of_event() {
        setup.vm.events.record(kind);
    }
    let mut operations = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            operations.insert(id, (path, method, operation));
            // What is not said to be possible is refused, with what is possible.
            for other in ["get", "put", "post", "patch", "delete", "query"] {
                if methods.get(other).is_none() {
                    let path = path
                        .replace("{id}", "disk0")
                        .replace("limit-groups/disk0", "limit-groups/x");
                    let reply = ask(&setup.path, other, &path, "", "");
                    assert_eq!(reply.status, 405, "{other} {path}");
                    let allowed = reply.headers["allow"].to_lowercase();
                    assert!(
                        allowed.split(", ").any(|one| one == method),
                        "{other} {path}: {allowed}"
                    );
                }
            }
        }
    }
    for (id, parameter, headers, body, status) in CASES {
        let (path, method, operation) = operations[id];
        let target = path.replace("{id}", parameter);
        let reply = ask(&setup.path, method, &target, headers, body);
        assert_eq!(reply.status, status, "{id}: {}", reply.body);
        check_reply(&document, operation, &reply);
    }
    for (id, (path, method, operation)) in operations {
        assert!(
            CASES.iter().any(|case| case.0 == id),
            "{id} has no case in this test"
        );
        // What is wrong with a request is told as the document says, too.
        if operation.get("requestBody").is_some() {
            let path = path.replace("{id}", "disk0");
            for (body, headers) in [("{", "upgrade: smsvmm-transfer\r\n"), ("[]", "")] {
                let reply = ask(&setup.path, method, &path, headers, body);
                assert_eq!(reply.status, 400, "{id}: {}", reply.body);
                check_reply(&document, operation, &reply);
            }
        }
        if path.contains("{id}") {
            let path = path.replace("{id}", "%2f");
            let reply = ask(&setup.path, method, &path, "", "{}");
            assert_eq!(reply.status, 400, "{id}");
            check_reply(&document, operation, &reply);
        }
    }
    // Serde would take arrays of fields for structures.
    for (method, path, body) in [
        ("POST", "/v1/vm/nets", "[]"),
        ("PATCH", "/v1/vm/disks/disk0", r#"{"limits": [null, null]}"#),
        ("POST", "/v1/vm/disks", r#"{"image": "/a", "path": [[1]]}"#),
        (
            "POST",
            "/v1/storage",
            r#"{"to": "pool", "request": {"operation": "add-devices", "devices": [["/dev/sda"]]}}"#,
        ),
        ("GET", "/v1/events", ""),
    ] {
        let reply = ask(&setup.path, method, path, "last-event-id: {}\r\n", body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
    }
    setup.vm.status.lock().unwrap().state = VmState::Paused;
    let reply = ask(&setup.path, "GET", "/readyz", "", "");
    assert_eq!((reply.status, reply.body.contains("paused")), (503, true));
    check_reply(&document, &document["paths"]["/readyz"]["get"], &reply);
    assert_eq!(ask(&setup.path, "GET", "/healthz", "", "").status, 200);
}

/// One of each, the last one of all at the end.
fn every_kind_of_event() -> Vec<EventKind> {
    let id: DeviceId = "disk0".parse().unwrap();
    let text = || "why".to_owned();
    vec![
        EventKind::Started,
        EventKind::Reset { cause: text() },
        EventKind::DeviceAttached { id: id.clone() },
        EventKind::DeviceRemoveRefused { id, reason: text() },
        EventKind::DebugLine {
            text: text(),
            microseconds: 7,
        },
        EventKind::GuestCommand {
            vm: None,
            command: text(),
            object: text(),
            failure: Some(text()),
        },
        EventKind::GuestJobEnded {
            vm: None,
            job: 7,
            what: text(),
            state: JobState::Failed,
            reason: Some(text()),
        },
        EventKind::Stopped {
            reason: ExitReason::Crash { cause: text() },
        },
    ]
}

#[test]
fn what_does_not_fit_a_schema_is_seen() {
    let document: Value =
        serde_json::from_str(include_str!("../../../docs/src/openapi/machine.json")).unwrap();
    let schema = |name: &str| document.pointer(&format!("/components/schemas/{name}")).unwrap();
    for (name, text, fits) in [
        (
            "Readiness",
            r#"{"ready": true, "state": "running", "more": 1}"#,
            true,
        ),
        ("Readiness", r#"{"ready": 1, "state": "running"}"#, false),
        ("Readiness", r#"{"ready": true}"#, false),
        ("DiskConfig", r#"{"image": "/a"}"#, true),
        ("DiskConfig", r#"{"imag": "/a"}"#, false),
        ("DiskConfig", r#"{"queue-size": 100}"#, false),
        ("DiskConfig", r#"{"poll-us": -1}"#, false),
        (
            "Event",
            r#"{"sequence": 1, "time_ms": 1, "event": "started"}"#,
            true,
        ),
        (
            "Event",
            r#"{"sequence": 1, "time_ms": 1, "event": "exploded"}"#,
            false,
        ),
    ] {
        let found = check(
            &document,
            schema(name),
            &serde_json::from_str(text).unwrap(),
            name,
        );
        assert_eq!(found.is_ok(), fits, "{text}: {found:?}");
    }
}
