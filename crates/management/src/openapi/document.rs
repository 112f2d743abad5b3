//! The table as an OpenAPI document.
//!
//! A type has up to two schemas, as serde takes more than it gives: what is optional in a request is always there in an answer,
//! and a request with an unknown field is refused, while answers may get more fields with any version. Where both differ, that of
//! requests is called `...Input`.

use std::collections::{BTreeMap, BTreeSet};

use api::ProblemKind;
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use schemars::transform::{Transform, transform_subschemas};
use serde_json::{Map, Value, json};

use super::table::{self, In, Operation, Parameter};

const DEFINITIONS: &str = "/components/schemas";

/// The generators of both kinds of schemas.
struct Schemas {
    answers: SchemaGenerator,
    requests: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = DEFINITIONS.into();
                settings.meta_schema = None;
            })
        };
        Self {
            answers: settings().for_serialize().into_generator(),
            requests: settings().for_deserialize().into_generator(),
        }
    }

    /// All schemas, and the names of those of requests that got another one.
    fn finish(mut self) -> (BTreeMap<String, Value>, BTreeSet<String>) {
        let mut answers = self.answers.take_definitions(true);
        answers.values_mut().for_each(open_up);
        let requests = self.requests.take_definitions(true);
        let mut renamed: BTreeSet<String> = requests
            .iter()
            .filter(|(name, schema)| answers.get(*name).is_some_and(|other| other != *schema))
            .map(|(name, _)| name.clone())
            .collect();
        // What refers to one that differs differs as well.
        loop {
            let before = renamed.len();
            for (name, schema) in &requests {
                let refers = renamed.iter().any(|other| refers_to(schema, other));
                if refers && answers.contains_key(name) {
                    renamed.insert(name.clone());
                }
            }
            if renamed.len() == before {
                break;
            }
        }
        let mut all: BTreeMap<String, Value> = answers.into_iter().collect();
        for (name, mut schema) in requests {
            rename(&mut schema, &renamed);
            let name = if renamed.contains(&name) {
                format!("{name}Input")
            } else {
                name
            };
            all.insert(name, schema);
        }
        for schema in all.values_mut() {
            tidy(schema);
        }
        (all, renamed)
    }
}

fn reference(name: &str) -> String {
    format!("#{DEFINITIONS}/{name}")
}

fn refers_to(schema: &Value, name: &str) -> bool {
    match schema {
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| (key == "$ref" && *value == reference(name)) || refers_to(value, name)),
        Value::Array(items) => items.iter().any(|item| refers_to(item, name)),
        _ => false,
    }
}

/// Lets references lead to the schemas of requests.
fn rename(schema: &mut Value, renamed: &BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object.iter_mut() {
                let name = value
                    .as_str()
                    .filter(|_| key == "$ref")
                    .and_then(|text| text.rsplit('/').next())
                    .filter(|name| renamed.contains(*name));
                match name.map(|name| reference(&format!("{name}Input"))) {
                    Some(other) => *value = other.into(),
                    None => rename(value, renamed),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, renamed)),
        _ => {}
    }
}

/// Answers may get more fields, whatever is refused in requests.
fn open_up(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.retain(|key, value| key != "additionalProperties" || *value != Value::Bool(false));
            object.values_mut().for_each(open_up);
        }
        Value::Array(items) => items.iter_mut().for_each(open_up),
        _ => {}
    }
}

/// Texts without rustdoc's links, numbers with their limits.
fn tidy(value: &mut Value) {
    struct Tidy;
    impl Transform for Tidy {
        fn transform(&mut self, schema: &mut schemars::Schema) {
            if let Some(Value::String(text)) = schema.get_mut("description") {
                *text = without_links(text);
            }
            let most = match schema.get("format").and_then(Value::as_str) {
                Some("uint64" | "uint") => Some(u64::MAX),
                Some("uint32") => Some(u32::MAX.into()),
                _ => None,
            };
            if let Some(most) = most {
                schema.insert("maximum".to_owned(), most.into());
            }
            transform_subschemas(self, schema);
        }
    }
    if let Ok(schema) = value.try_into() {
        Tidy.transform(schema);
    }
}

/// "[`Name`](path)" and "[`Name`]" are "`Name`".
fn without_links(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::new();
    while let Some((before, after)) = rest.split_once("[`") {
        let Some((name, behind)) = after.split_once("`]") else {
            break;
        };
        plain.push_str(before);
        plain.push_str(&format!("`{name}`"));
        rest = behind;
        if let Some((_, behind)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            rest = behind;
        }
    }
    plain.push_str(rest);
    plain.replace('\n', " ")
}

fn parameter(parameter: &Parameter, schemas: &mut Schemas) -> Value {
    let place = match parameter.place {
        In::Path => "path",
        In::Query => "query",
        In::Header => "header",
    };
    let mut schema = (parameter.schema)(&mut schemas.requests).to_value();
    tidy(&mut schema);
    json!({
        "name": parameter.name,
        "in": place,
        "required": parameter.required,
        "description": parameter.about,
        "schema": schema,
    })
}

fn answers(operation: &Operation, further: &[ProblemKind], schemas: &mut Schemas) -> Value {
    let mut all = Map::new();
    for kind in operation.problems.iter().chain(further) {
        let name = format!("{kind:?}");
        let status = kind.status().to_string();
        // Several kinds have the same status: their texts are in the answer.
        all.entry(status)
            .or_insert_with(|| json!({"$ref": format!("#/components/responses/{name}")}));
    }
    for answer in &operation.answers {
        let content: Map<String, Value> = answer
            .content
            .iter()
            .map(|(media, schema)| {
                let schema = schema(&mut schemas.answers).to_value();
                ((*media).to_owned(), json!({"schema": schema}))
            })
            .collect();
        let mut found = json!({"description": answer.about});
        if !content.is_empty() {
            found["content"] = content.into();
        }
        for (name, about) in &answer.headers {
            found["headers"][*name] = json!({
                "description": about,
                "required": *name != table::SOMETIMES,
                "schema": {"type": "string"},
            });
        }
        all.insert(answer.status.to_string(), found);
    }
    all.insert(
        "default".to_owned(),
        json!({"$ref": "#/components/responses/Problem"}),
    );
    all.into()
}

/// What distinguishes the documents of servers.
struct Kind {
    title: &'static str,
    about: String,
    server: (&'static str, &'static str),
    /// Everybody has to show who it is.
    secured: bool,
}

/// Problems that any request may have at a server with principals.
const OF_STRANGERS: [ProblemKind; 2] = [ProblemKind::Unauthenticated, ProblemKind::TooMany];

fn document(kind: &Kind, operations: &[(String, Option<Parameter>, Operation)]) -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    table::problem(&mut schemas.answers);
    table::further(&mut schemas.answers);
    for (path, prefix, operation) in operations {
        let open = path == "/healthz";
        let further: &[ProblemKind] = if kind.secured && !open { &OF_STRANGERS } else { &[] };
        let mut found = json!({
            "operationId": operation.id,
            "tags": [operation.tag],
            "summary": operation.summary,
            "responses": answers(operation, further, &mut schemas),
        });
        if !operation.about.is_empty() {
            found["description"] = operation.about.into();
        }
        let parameters = prefix.iter().chain(&operation.parameters);
        let parameters: Vec<Value> = parameters.map(|one| parameter(one, &mut schemas)).collect();
        if !parameters.is_empty() {
            found["parameters"] = parameters.into();
        }
        if let Some(body) = operation.body {
            let schema = body(&mut schemas.requests).to_value();
            found["requestBody"] = json!({
                "required": true,
                "content": {"application/json": {"schema": schema}},
            });
        }
        if kind.secured && open {
            found["security"] = json!([]);
        }
        let entry = paths.entry(path.clone()).or_insert_with(|| json!({}));
        entry[operation.method] = found;
    }
    let (definitions, renamed) = schemas.finish();
    for (path, entry) in &mut paths {
        for (method, operation) in entry.as_object_mut().into_iter().flatten() {
            for part in ["requestBody", "parameters"] {
                if let Some(part) = operation.get_mut(part) {
                    rename(part, &renamed);
                }
            }
            assert!(operation["responses"].is_object(), "{method} {path}");
        }
    }
    let mut whole = json!({
        "openapi": "3.1.0",
        "info": {
            "title": kind.title,
            "version": "1",
            "description": kind.about,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": kind.server.0, "description": kind.server.1}],
        "paths": paths,
        "components": {"schemas": definitions, "responses": problems()},
    });
    if kind.secured {
        whole["components"]["securitySchemes"] = json!({
            "token": {"type": "http", "scheme": "bearer"},
            "certificate": {"type": "mutualTLS"},
        });
        whole["security"] = json!([{"token": []}, {"certificate": []}]);
    }
    whole
}

/// The answers that say what is wrong.
fn problems() -> Value {
    let content = json!({"application/problem+json": {"schema": {"$ref": reference("Problem")}}});
    let mut all = Map::new();
    for kind in ProblemKind::ALL {
        all.insert(
            format!("{kind:?}"),
            json!({"description": kind.title(), "content": content}),
        );
    }
    let about = "What is wrong, and what to do about it.";
    all.insert(
        "Problem".to_owned(),
        json!({"description": about, "content": content}),
    );
    all.into()
}

const RULE: &str = "Within /v1 nothing is taken away and no meaning changes. Answers may get more fields, events and problems more \
                    kinds, requests more optional fields, and there may be more paths: clients pass over what they do not know.";

fn machine() -> Value {
    let about = format!(
        "A machine of smsvmm, by its management socket: HTTP/1.1 on a Unix socket, one request per connection. {RULE}"
    );
    let kind = Kind {
        title: "smsvmm: a machine",
        about,
        server: (
            "http://localhost",
            "The Unix socket of `[management]`; the host in the URL does not matter.",
        ),
        secured: false,
    };
    let operations: Vec<_> = table::machine()
        .into_iter()
        .map(|operation| (operation.path.to_owned(), None, operation))
        .collect();
    document(&kind, &operations)
}

fn share() -> Value {
    let about = format!(
        "Disks that smsvmm gives to others, by the management socket of `smsvmm share`: HTTP/1.1 on a Unix socket, one request per connection. {RULE}"
    );
    let kind = Kind {
        title: "smsvmm: shared disks",
        about,
        server: (
            "http://localhost",
            "The Unix socket of `--management`; the host in the URL does not matter.",
        ),
        secured: false,
    };
    let operations: Vec<_> = table::share()
        .into_iter()
        .map(|operation| (operation.path.to_owned(), None, operation))
        .collect();
    document(&kind, &operations)
}

fn host() -> Value {
    let about = format!(
        "A host of smsvmm, by its manager's socket (`smsvmm serve`): HTTP/1.1 on a Unix socket, one request per connection. {RULE}"
    );
    let kind = Kind {
        title: "smsvmm: a host",
        about,
        server: (
            "http://localhost",
            "The Unix socket of `[management]` in host.toml; the host in the URL does not matter.",
        ),
        secured: false,
    };
    let own = table::host()
        .into_iter()
        .map(|operation| (operation.path.to_owned(), None, operation));
    // What a machine is asked has names of its own beside what its manager is.
    let passed_on = of_machines().map(|(path, parameter, operation)| {
        let id = format!("{}OfMachine", operation.id);
        (path, parameter, Operation { id, ..operation })
    });
    document(&kind, &own.chain(passed_on).collect::<Vec<_>>())
}

/// What is passed on to machines.
fn of_machines() -> impl Iterator<Item = (String, Option<Parameter>, Operation)> {
    table::machine().into_iter().filter_map(|operation| {
        let rest = operation.path.strip_prefix("/v1/")?;
        Some((
            format!("/v1/vms/{{name}}/{rest}"),
            Some(table::machine_name()),
            operation,
        ))
    })
}

fn gateway() -> Value {
    let about = format!(
        "The machines of a host, by `smsvmm gateway`: HTTP/1.1 over TLS 1.3, one request per connection. {RULE}"
    );
    let kind = Kind {
        title: "smsvmm: a gateway",
        about,
        server: ("https://localhost:7443", "The gateway."),
        secured: true,
    };
    let own = table::gateway()
        .into_iter()
        .map(|operation| (operation.path.to_owned(), None, operation));
    document(&kind, &own.chain(of_machines()).collect::<Vec<_>>())
}

#[test]
fn the_documents_in_the_tree_are_what_the_code_makes() {
    for (name, made, kept) in [
        ("machine", machine(), super::MACHINE),
        ("gateway", gateway(), super::GATEWAY),
        ("host", host(), super::HOST),
        ("share", share(), super::SHARE),
    ] {
        let text = format!("{made:#}\n");
        let path = format!(
            "{}/../../docs/src/openapi/{name}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        if std::env::var_os("SMSVMM_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
            continue;
        }
        let line = text
            .lines()
            .zip(kept.lines())
            .position(|(one, other)| one != other);
        assert!(
            text == kept,
            "{path} is not what the code makes (line {}); write it anew with `SMSVMM_BLESS=1 cargo test -p management openapi`",
            line.map_or(0, |line| line + 1)
        );
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_name_is_used_once() {
    for document in [machine(), gateway(), host(), share()] {
        let mut ids = BTreeSet::new();
        let paths = document["paths"].as_object().unwrap();
        for operation in paths
            .values()
            .flat_map(|entry| entry.as_object().unwrap().values())
        {
            assert!(
                ids.insert(operation["operationId"].as_str().unwrap()),
                "{operation}"
            );
        }
        let mut left = vec![&document];
        while let Some(value) = left.pop() {
            match value {
                Value::Object(object) => {
                    if let Some(Value::String(path)) = object.get("$ref") {
                        let there = document.pointer(path.trim_start_matches('#'));
                        assert!(there.is_some(), "{path}");
                    }
                    left.extend(object.values());
                }
                Value::Array(items) => left.extend(items),
                Value::String(text) => assert!(!text.contains("[`"), "{text}"),
                _ => {}
            }
        }
    }
}

#[test]
fn links_of_rustdoc_are_texts() {
    assert_eq!(
        without_links("always [`A::B`](crate::A), [`C`] or [d]"),
        "always `A::B`, `C` or [d]"
    );
}
