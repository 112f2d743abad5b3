//! What a change is about, and how that is: for the audit log, which has it before and after.
//!
//! The gateway asks as anybody would, and takes little of the answer. It waits for [`LIMIT`] at most; what is not known by then is left out, and nothing
//! fails because of it.

use std::path::Path;
use std::time::Duration;

use api::StorageRequest;
use api::storage::Operation;
use http_body_util::{BodyExt, Limited};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, StatusCode};
use serde_json::Value;
use tokio::time::timeout;

use super::forward::{Outgoing, forward};

/// Longest time of a look; there are two at a change.
const LIMIT: Duration = Duration::from_millis(500);
/// Longest answer that is read, in bytes.
const MAX_STATUS: usize = 1 << 20;
/// Largest text of an object that is logged, in bytes.
const MAX_TEXT: usize = 4 << 10;

/// Which part of an answer is meant.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// A disk of a machine: all of it.
    Whole,
    /// A machine's definition.
    Definition,
    LimitGroup(String),
    /// Of one machine, by that and the disk's name in it.
    Attachment(String, String),
    Volume(String),
    Device(String),
}

/// An object that a request changes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Subject {
    method: Method,
    path: String,
    body: &'static str,
    part: Part,
}

impl Subject {
    /// That of a request to `path`, as its destination knows it; `rest` is what rights are about.
    pub(super) fn of(
        method: &Method,
        path: &str,
        rest: &[&str],
        storage: Option<&StorageRequest>,
    ) -> Option<Self> {
        let get = |path: &str, part| Self {
            method: Method::GET,
            path: path.to_owned(),
            body: "",
            part,
        };
        if let Some(StorageRequest::Pool(operation) | StorageRequest::Begin(operation)) = storage {
            return Some(Self {
                method: Method::POST,
                path: path.to_owned(),
                body: r#"{"to":"status"}"#,
                part: part_of_pool(operation)?,
            });
        }
        match (method, rest) {
            (&Method::PATCH, ["vm", "disks", _]) => Some(get(path, Part::Whole)),
            (&Method::PATCH, ["vm", "limit-groups", name]) => {
                let machine = path.strip_suffix(&format!("/limit-groups/{name}"))?;
                Some(get(machine, Part::LimitGroup((*name).to_owned())))
            }
            (&Method::PATCH, ["attachments", vm, device]) => {
                let part = Part::Attachment((*vm).to_owned(), (*device).to_owned());
                Some(get("/v1/attachments", part))
            }
            (&Method::PUT | &Method::DELETE, ["vms", _]) => Some(get(path, Part::Definition)),
            _ => None,
        }
    }

    /// How it is now; `null` if there is no such thing, none if that is not known.
    pub(super) async fn look(&self, name: &str, socket: &Path) -> Option<Value> {
        timeout(LIMIT, self.ask(name, socket)).await.ok().flatten()
    }

    async fn ask(&self, name: &str, socket: &Path) -> Option<Value> {
        let headers = HeaderMap::new();
        let answer = forward(Outgoing {
            name,
            socket,
            method: self.method.clone(),
            path: &self.path,
            headers: &headers,
            body: Bytes::from_static(self.body.as_bytes()),
            upgrade: None,
            guard: None,
        });
        let answer = answer.await.ok()?;
        match answer.status() {
            StatusCode::NOT_FOUND => return Some(Value::Null),
            status if !status.is_success() => return None,
            _ => {}
        }
        let body = Limited::new(answer.into_body(), MAX_STATUS)
            .collect()
            .await
            .ok()?;
        let part = self.pick(serde_json::from_slice(&body.to_bytes()).ok()?);
        (part.to_string().len() <= MAX_TEXT).then_some(part)
    }

    fn pick(&self, answer: Value) -> Value {
        let named = |list: &Value, is: &dyn Fn(&Value) -> bool| {
            let found = list.as_array().and_then(|all| all.iter().find(|one| is(one)));
            found.cloned().unwrap_or_default()
        };
        match &self.part {
            Part::Whole => answer,
            Part::Definition => {
                let kept = ["revision", "autostart", "restart", "cpus", "memory"];
                let kept = kept.iter().map(|key| ((*key).to_owned(), answer[*key].clone()));
                Value::Object(kept.collect())
            }
            Part::LimitGroup(name) => answer["limit-groups"][name].clone(),
            Part::Attachment(vm, device) => named(&answer, &|one| {
                one["vm"] == vm.as_str() && one["device"] == device.as_str()
            }),
            Part::Volume(name) => {
                let mut volume = named(&answer["answer"]["volumes"], &|one| one["name"] == name.as_str());
                if let Some(keys) = volume.as_object_mut() {
                    keys.remove("members");
                }
                volume
            }
            Part::Device(name) => named(&answer["answer"]["devices"], &|one| {
                ["name", "id", "path"].iter().any(|key| one[key] == name.as_str())
            }),
        }
    }
}

/// The volume or device that an operation changes.
fn part_of_pool(operation: &Operation) -> Option<Part> {
    match operation {
        Operation::RemoveDevice { device, .. }
        | Operation::EvacuateDevice { device, .. }
        | Operation::ReplaceDevice { device, .. } => Some(Part::Device(device.clone())),
        Operation::CreateVolume { name, .. }
        | Operation::SetReadPolicy { name, .. }
        | Operation::ResizeVolume { name, .. }
        | Operation::SetLayout { name, .. }
        | Operation::MoveVolume { name, .. }
        | Operation::DeleteVolume { name, .. } => Some(Part::Volume(name.clone())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn picked(part: Part, answer: Value) -> Value {
        let (method, path, body) = (Method::GET, String::new(), "");
        Subject {
            method,
            path,
            body,
            part,
        }
        .pick(answer)
    }

    #[test]
    fn what_a_change_is_about_is_known_and_little_of_it_is_kept() {
        let resize =
            r#"{"to":"pool","request":{"operation":"resize-volume","name":"safe","size":7,"shrink":false}}"#;
        let resize: StorageRequest = serde_json::from_str(resize).unwrap();
        let subject = Subject::of(&Method::POST, "/v1/storage", &["storage"], Some(&resize)).unwrap();
        assert_eq!(subject.part, Part::Volume("safe".into()));
        let status = json!({"from": "status", "answer": {
            "volumes": [{"name": "other"}, {"name": "safe", "size": 8, "members": [1, 2]}],
            "devices": [{"id": "d0", "name": "/dev/vdb"}],
        }});
        assert_eq!(subject.pick(status.clone()), json!({"name": "safe", "size": 8}));
        assert_eq!(picked(Part::Volume("none".into()), status.clone()), Value::Null);
        for name in ["d0", "/dev/vdb"] {
            assert_eq!(picked(Part::Device(name.into()), status.clone())["id"], "d0");
        }
        let scrub: StorageRequest =
            serde_json::from_str(r#"{"to":"pool","request":{"operation":"heal"}}"#).unwrap();
        assert!(Subject::of(&Method::POST, "/v1/storage", &["storage"], Some(&scrub)).is_none());

        let group = ["vm", "limit-groups", "bulk"];
        let group = Subject::of(&Method::PATCH, "/v1/vm/limit-groups/bulk", &group, None).unwrap();
        assert_eq!(group.path, "/v1/vm");
        assert_eq!(
            group.pick(json!({"limit-groups": {"bulk": {"iops": 5}}})),
            json!({"iops": 5})
        );
        let machine = Subject::of(&Method::PUT, "/v1/vms/db1", &["vms", "db1"], None).unwrap();
        let defined = machine.pick(json!({"name": "db1", "revision": "1f", "pid": 7}));
        assert_eq!((&defined["revision"], defined.get("pid")), (&"1f".into(), None));
        for other in [json!(null), json!([]), json!({"answer": 7, "volumes": 7})] {
            picked(Part::Volume("safe".into()), other.clone());
            picked(Part::LimitGroup("bulk".into()), other.clone());
            picked(Part::Definition, other);
        }
    }
}
