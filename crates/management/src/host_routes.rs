//! Requests to a host's manager.
//!
//! Lists take `?limit=` and `?after=`: see [`page`](crate::page).
//!
//! | method, path | does | answer |
//! |---|---|---|
//! | GET /v1/host | the whole host | 200 [`HostStatus`](api::HostStatus) |
//! | GET /v1/pools, /v1/pools/NAME | pools | 200 [`PoolEntry`](api::PoolEntry), [`PoolStatus`](api::storage::PoolStatus) |
//! | GET /v1/pools/NAME/jobs | its jobs | 200 [`JobStatus`](api::storage::JobStatus) |
//! | POST /v1/pools/NAME/storage, .../transfer | as /v1/storage of a machine | |
//! | POST /v1/storage, .../transfer | the same, where there is one pool only | |
//! | GET /v1/vms, /v1/vms/NAME | machines | 200 [`MachineStatus`](api::MachineStatus) |
//! | PUT /v1/vms/NAME | defines it: [`MachineDefinition`]; `If-Match`, `If-None-Match` | 200 `MachineStatus` |
//! | DELETE /v1/vms/NAME | forgets it; `If-Match` | 204 |
//! | PUT /v1/vms/NAME/start, shutdown, stop | as the methods of [`api::Host`] | 202 `MachineStatus` |
//! | POST /v1/vms/NAME/console, to be upgraded | its console: [`ConsoleRequest`](api::ConsoleRequest) | 101, then what is typed and shown |
//! | /v1/vms/NAME/vm/..., /v1/vms/NAME/storage/..., /v1/vms/NAME/events, /v1/vms/NAME/metrics | passed on to the machine's socket | |
//! | GET /v1/attachments | disks in use | 200 [`Attachment`](api::Attachment) |
//! | GET /v1/attachments/counters | what was asked of them | 200 [`AttachmentMetrics`](api::AttachmentMetrics) |
//! | POST /v1/attachments, to be upgraded | the disk of an [`AttachRequest`](api::AttachRequest) | 101, then vhost-user |
//! | PATCH /v1/attachments/VM/DEVICE | a [`DiskChange`](api::DiskChange) | 200 `Attachment` |
//! | GET /v1/attachments/VM/DEVICE/trace | its last requests | 200 [`TracePage`](api::TracePage) |
//! | PATCH /v1/attachments/VM/limit-groups/NAME | a [`DiskLimits`](api::DiskLimits) for disks that share them | 200 what holds now |
//! | POST /v1/scsi-adapters, to be upgraded | an [`AdapterRequest`](api::AdapterRequest) | 101, then vhost-user |
//! | GET /v1/events | events | 200 [`EventPage`](api::EventPage) |
//! | GET /metrics | numbers for Prometheus | 200 |
//! | GET /healthz, /readyz, /openapi.json | as of a machine | 200 |

use std::sync::Arc;
use std::time::Duration;

use api::{
    ATTACHMENT_PROTOCOL, Condition, DiskChange, DiskConfig, DiskLimits, Host, MachineDefinition,
    MachineStatus, Problem, ProblemKind, Readiness, StorageAnswer, StorageRequest, VmName,
};
use http_body_util::Either;
use hyper::header::{
    CACHE_CONTROL, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH, UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::console::{Consoles, Guard};
use crate::events::Events;
use crate::gateway::forward::{AnswerBody, Outgoing, forward};
use crate::lasting::{self, Lasting};
use crate::routes::{self, Answer, Content, MACHINE_TIMEOUT, STORAGE_TIMEOUT};

use crate::{metrics, openapi, page, transfer};

/// Disks in use at a time.
const MAX_ATTACHMENTS: usize = 4096;
/// For who asks for a disk and does not want the connection upgraded.
const OR_USE: &str = "name the manager in vm.toml";
/// Longest time until a disk is open: another one may have to let it go first, and journals may have to be replayed.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(60);

/// What requests work on.
pub(crate) struct HostContext {
    host: Arc<dyn Host>,
    transfers: Arc<Semaphore>,
    attachments: Arc<Semaphore>,
    consoles: Consoles,
    pub(crate) events: Events<dyn Host>,
    /// Those that may last.
    pub(crate) lasting: Lasting,
    /// Those for disks.
    attaching: Lasting,
}

impl HostContext {
    pub(crate) fn new(host: Arc<dyn Host>, lasting: Lasting, attaching: Lasting) -> Self {
        Self {
            events: Events::new(&host, |host| host.events()),
            host,
            transfers: Arc::new(Semaphore::new(transfer::MAX_TRANSFERS)),
            attachments: Arc::new(Semaphore::new(MAX_ATTACHMENTS)),
            consoles: Consoles::default(),
            lasting,
            attaching,
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        question: impl FnOnce(&dyn Host) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let host = Arc::clone(&self.host);
        routes::help(limit, move || question(&*host)).await
    }
}

/// Answers any request.
pub(crate) async fn answer(context: &HostContext, mut request: Request<Content>) -> Response<AnswerBody> {
    if request.method() == Method::HEAD {
        // The same answer, of which hyper sends the head only.
        *request.method_mut() = Method::GET;
    }
    match route(context, request).await {
        Ok(answer) => answer,
        Err(found) => own(routes::problem(&found)),
    }
}

fn own(answer: Answer) -> Response<AnswerBody> {
    answer.map(Either::Left)
}

async fn route(context: &HostContext, request: Request<Content>) -> Result<Response<AnswerBody>, Problem> {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    let method = request.method().clone();
    if let ["v1", "vms", name, rest @ ..] = parts.as_slice() {
        let name: VmName = name.parse().map_err(|error: api::InvalidValue| {
            Problem::new(ProblemKind::Invalid, error.to_string()).about("name")
        })?;
        return machine(context, name, rest, request).await;
    }
    let answered = match (parts.as_slice(), &method) {
        (["readyz"], &Method::GET) => routes::json(
            StatusCode::OK,
            &Readiness {
                ready: true,
                state: "running".to_owned(),
            },
        ),
        (["metrics"] | ["v1", "metrics"], &Method::GET) => {
            let metrics = context.ask(MACHINE_TIMEOUT, |host| Ok(host.metrics())).await?;
            metrics::answer(&metrics)
        }
        (["v1", "host"], &Method::GET) => {
            let status = context.ask(MACHINE_TIMEOUT, |host| Ok(host.status())).await?;
            routes::json(StatusCode::OK, &status)
        }
        (["v1", "vms"], &Method::GET) => {
            let machines = context.ask(MACHINE_TIMEOUT, |host| Ok(host.machines())).await?;
            page::answer(request.uri(), machines, |machine| machine.name.to_string())?
        }
        (["v1", "pools"], &Method::GET) => {
            let status = context.ask(MACHINE_TIMEOUT, |host| Ok(host.status())).await?;
            page::answer(request.uri(), status.pools, |pool| pool.name.clone())?
        }
        (["v1", "pools", name], &Method::GET) => {
            let name = (*name).to_owned();
            let ask = move |host: &dyn Host| host.storage(Some(&name), StorageRequest::Status);
            match context.ask(MACHINE_TIMEOUT, ask).await? {
                StorageAnswer::Status(status) => routes::json(StatusCode::OK, &status),
                other => routes::json(StatusCode::OK, &other),
            }
        }
        (["v1", "pools", name, "jobs"], &Method::GET) => {
            let name = (*name).to_owned();
            let ask = move |host: &dyn Host| host.storage(Some(&name), StorageRequest::Status);
            match context.ask(MACHINE_TIMEOUT, ask).await? {
                StorageAnswer::Status(status) => page::answer(request.uri(), status.jobs, |job| job.id)?,
                other => routes::json(StatusCode::OK, &other),
            }
        }
        (["v1", "storage", rest @ ..], _) => storage(context, None, rest, request).await?,
        (["v1", "pools", name, "storage", rest @ ..], _) => {
            storage(context, Some((*name).to_owned()), rest, request).await?
        }
        (["v1", "attachments", rest @ ..], _) => attachments(context, rest, request).await?,
        (["v1", "scsi-adapters"], &Method::POST) => {
            let room = attachment_room(context)?;
            let make = async |asked| {
                let host = Arc::clone(&context.host);
                context
                    .attaching
                    .help(ATTACH_TIMEOUT, move || host.attach_adapter(asked))
                    .await
            };
            transfer::take_out(request, ATTACHMENT_PROTOCOL, OR_USE, room, make).await?
        }
        (["v1", "scsi-adapters"], method) => routes::not_allowed(method, "POST"),
        (["v1", "events"], &Method::GET) => {
            let (events, lasting) = (&context.events, &context.lasting);
            events.answer(request.uri(), request.headers(), lasting).await?
        }
        (
            ["readyz" | "metrics"]
            | ["v1", "host" | "vms" | "pools" | "events" | "metrics"]
            | ["v1", "pools", _]
            | ["v1", "pools", _, "jobs"],
            method,
        ) => routes::not_allowed(method, "GET"),
        (other, method) => match routes::common(other, method, openapi::HOST) {
            Some(answer) => answer,
            None => return Err(routes::no_such_path(&path)),
        },
    };
    Ok(own(answered))
}

/// What is below /v1/storage, or /v1/pools/NAME/storage.
async fn storage(
    context: &HostContext,
    pool: Option<String>,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Answer, Problem> {
    match (rest, request.method()) {
        ([], &Method::POST) => {
            let asked: StorageRequest = routes::body(request.into_body()).await?;
            let is_quick = lasting::is_quick(&asked);
            let ask = move |host: &dyn Host| host.storage(pool.as_deref(), asked);
            let answered = match is_quick {
                true => context.ask(MACHINE_TIMEOUT, ask).await?,
                false => {
                    let host = Arc::clone(&context.host);
                    context.lasting.help(STORAGE_TIMEOUT, move || ask(&*host)).await?
                }
            };
            Ok(routes::json(StatusCode::OK, &answered))
        }
        (["transfer"], &Method::POST) => {
            let room = transfer::room(&context.transfers)?;
            let make = async |asked| {
                let ask = move |host: &dyn Host| host.transfer(pool.as_deref(), asked);
                context.ask(MACHINE_TIMEOUT, ask).await
            };
            transfer::take_out(request, transfer::PROTOCOL, "use `smsvmm disk`", room, make).await
        }
        ([] | ["transfer"], method) => Ok(routes::not_allowed(method, "POST")),
        _ => Err(routes::no_such_path(request.uri().path())),
    }
}

/// What is below /v1/attachments.
async fn attachments(
    context: &HostContext,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Answer, Problem> {
    match (rest, request.method()) {
        ([], &Method::GET) => {
            let attachments = context
                .ask(MACHINE_TIMEOUT, |host| Ok(host.attachments()))
                .await?;
            page::answer(request.uri(), attachments, |disk| {
                format!("{}/{}", disk.vm, disk.device)
            })
        }
        ([], &Method::POST) => {
            let room = attachment_room(context)?;
            let make = async |asked| {
                let host = Arc::clone(&context.host);
                context
                    .attaching
                    .help(ATTACH_TIMEOUT, move || host.attach(asked))
                    .await
            };
            transfer::take_out(request, ATTACHMENT_PROTOCOL, OR_USE, room, make).await
        }
        ([], method) => Ok(routes::not_allowed(method, "GET, POST")),
        ([vm, "limit-groups", group], &Method::PATCH) => {
            let (vm, group) = (machine_name(vm)?, routes::device_id(group)?);
            let change: DiskLimits = routes::body(request.into_body()).await?;
            let ask = move |host: &dyn Host| host.change_group(&vm, &group, &change);
            let limits = context.ask(MACHINE_TIMEOUT, ask).await?;
            Ok(routes::json(StatusCode::OK, &limits))
        }
        ([vm, device, "trace"], &Method::GET) => {
            let (vm, device) = (machine_name(vm)?, routes::device_id(device)?);
            let after = routes::trace_query(request.uri().query().unwrap_or_default())?;
            let ask = move |host: &dyn Host| host.trace_attachment(&vm, &device, &after);
            let page = context.ask(MACHINE_TIMEOUT, ask).await?;
            Ok(routes::json(StatusCode::OK, &page))
        }
        ([_, "limit-groups", _], method) => Ok(routes::not_allowed(method, "PATCH")),
        ([_, _, "trace"], method) => Ok(routes::not_allowed(method, "GET")),
        (["counters"], &Method::GET) => {
            let metrics = context.ask(MACHINE_TIMEOUT, |host| Ok(host.metrics())).await?;
            page::answer(request.uri(), metrics.attachments, |disk| {
                format!("{}/{}", disk.attachment.vm, disk.attachment.device)
            })
        }
        (["counters"], method) => Ok(routes::not_allowed(method, "GET")),
        ([vm, device], &Method::PATCH) => {
            let (vm, device) = (machine_name(vm)?, routes::device_id(device)?);
            let change: DiskChange = routes::body(request.into_body()).await?;
            let ask = move |host: &dyn Host| host.change_attachment(&vm, &device, &change);
            let attachment = context.ask(MACHINE_TIMEOUT, ask).await?;
            Ok(routes::json(StatusCode::OK, &attachment))
        }
        ([_, _], method) => Ok(routes::not_allowed(method, "PATCH")),
        _ => Err(routes::no_such_path(request.uri().path())),
    }
}

/// Room for one more connection of a disk or an adapter.
fn attachment_room(context: &HostContext) -> Result<OwnedSemaphorePermit, Problem> {
    Arc::clone(&context.attachments).try_acquire_owned().map_err(|_| {
        let detail = format!("{MAX_ATTACHMENTS} disks are in use already");
        Problem::new(ProblemKind::Exhausted, detail)
    })
}

fn machine_name(text: &str) -> Result<VmName, Problem> {
    text.parse()
        .map_err(|error: api::InvalidValue| Problem::new(ProblemKind::Invalid, error.to_string()).about("vm"))
}

type Act = fn(&dyn Host, &VmName) -> Result<MachineStatus, Problem>;

/// What is below /v1/vms/NAME.
async fn machine(
    context: &HostContext,
    name: VmName,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Response<AnswerBody>, Problem> {
    let act: (Act, StatusCode) = match (rest, request.method()) {
        ([], &Method::GET) => {
            let ask = move |host: &dyn Host| host.machine(&name);
            return Ok(own(tagged(&context.ask(MACHINE_TIMEOUT, ask).await?)));
        }
        ([], &Method::PUT) => {
            let condition = condition(request.headers())?;
            let definition: MachineDefinition = routes::body(request.into_body()).await?;
            let ask = move |host: &dyn Host| host.define(&name, definition, &condition);
            return Ok(own(tagged(&context.ask(MACHINE_TIMEOUT, ask).await?)));
        }
        ([], &Method::DELETE) => {
            let condition = condition(request.headers())?;
            context
                .ask(MACHINE_TIMEOUT, move |host| host.delete(&name, &condition))
                .await?;
            return Ok(own(routes::no_content()));
        }
        ([], method) => return Ok(own(routes::not_allowed(method, "GET, PUT, DELETE"))),
        (["start"], &Method::PUT) => (|host, name| host.start(name), StatusCode::ACCEPTED),
        (["shutdown"], &Method::PUT) => (|host, name| host.shut_down(name), StatusCode::ACCEPTED),
        (["stop"], &Method::PUT) => (|host, name| host.stop(name), StatusCode::ACCEPTED),
        (["start" | "shutdown" | "stop"], method) => return Ok(own(routes::not_allowed(method, "PUT"))),
        // It is not to be started again.
        (["vm", "stop"], &Method::PUT) => {
            context.ask(MACHINE_TIMEOUT, move |host| host.stop(&name)).await?;
            return Ok(own(routes::no_content()));
        }
        (["vm" | "storage" | "events" | "metrics", ..], _) => {
            return pass_on(context, name, rest, request).await;
        }
        (["console"], &Method::POST) => return console(context, name, request).await.map(own),
        (["console"], method) => return Ok(own(routes::not_allowed(method, "POST"))),
        _ => return Err(routes::no_such_path(request.uri().path())),
    };
    let (act, status) = act;
    let done = context.ask(MACHINE_TIMEOUT, move |host| act(host, &name)).await?;
    Ok(own(routes::json(status, &done)))
}

/// The console of a machine, if it leads to a socket.
async fn console(context: &HostContext, name: VmName, request: Request<Content>) -> Result<Answer, Problem> {
    let (upgrade, request) = upgrade_of(request);
    let body = routes::bytes(request.into_body()).await?;
    let machine = name.clone();
    let status = context
        .ask(MACHINE_TIMEOUT, move |host| host.machine(&machine))
        .await?;
    let socket = status.console.filter(|_| status.pid.is_some()).ok_or_else(|| {
        let detail = "the machine does not run, or its console leads to no socket";
        Problem::new(ProblemKind::Conflict, detail)
            .about(&name)
            .remedy("start it, with console.serial = \"socket:PATH\" or none in its definition")
    })?;
    let guard = Guard::none();
    context
        .consoles
        .open(name.as_str(), &socket, upgrade, body, guard)
        .await
}

/// What a connection is to become, if anything, with where that is to be had.
fn upgrade_of<B>(mut request: Request<B>) -> (Option<(OnUpgrade, Vec<u8>)>, Request<B>) {
    let protocol = request
        .headers()
        .get(UPGRADE)
        .map(|value| value.as_bytes().to_vec());
    let upgrade = protocol.map(|protocol| (hyper::upgrade::on(&mut request), protocol));
    (upgrade, request)
}

/// A machine, with its definition's tag. What else is in the answer changes without it, so nobody shall keep the answer.
fn tagged(status: &MachineStatus) -> Answer {
    let mut answer = routes::json(StatusCode::OK, status);
    if let Ok(tag) = HeaderValue::try_from(format!("\"{}\"", status.revision)) {
        let headers = answer.headers_mut();
        headers.insert(ETAG, tag);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    answer
}

/// What the client says must be so.
fn condition(headers: &HeaderMap) -> Result<Condition, Problem> {
    let value = |name: HeaderName| -> Result<Option<String>, Problem> {
        let values = headers.get_all(&name).iter().map(HeaderValue::to_str);
        let values: Result<Vec<&str>, _> = values.collect();
        let values = values.map_err(|_| {
            Problem::new(
                ProblemKind::Invalid,
                "the header has other than visible characters",
            )
            .about(&name)
        })?;
        Ok((!values.is_empty()).then(|| values.join(", ")))
    };
    let (matches, matches_not) = (value(IF_MATCH)?, value(IF_NONE_MATCH)?);
    Condition::parse(matches.as_deref(), matches_not.as_deref())
        .map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))
}

/// Passes a request on to the machine's own socket.
async fn pass_on(
    context: &HostContext,
    name: VmName,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Response<AnswerBody>, Problem> {
    let room = (rest.first() != Some(&"vm"))
        .then(|| context.lasting.room())
        .transpose()?;
    let machine = name.clone();
    let socket = context
        .ask(MACHINE_TIMEOUT, move |host| host.machine_socket(&machine))
        .await?;
    let (upgrade, request) = upgrade_of(request);
    let mut path = format!("/v1/{}", rest.join("/"));
    if let Some(query) = request.uri().query() {
        path = format!("{path}?{query}");
    }
    let (method, headers) = (request.method().clone(), request.headers().clone());
    let body = routes::bytes(request.into_body()).await?;
    if (rest, &method) == (&["vm", "disks"], &Method::POST)
        // What is wrong with it, the machine says.
        && let Ok(disk) = serde_json::from_slice::<DiskConfig>(&body)
    {
        let machine = name.clone();
        context
            .ask(MACHINE_TIMEOUT, move |host| host.allow_disk(&machine, &disk))
            .await?;
    }
    let answer = forward(Outgoing {
        name: name.as_str(),
        socket: &socket,
        method,
        path: &path,
        headers: &headers,
        body,
        upgrade,
        guard: None,
    })
    .await?;
    // It is kept until the answer has been passed on, which may be a stream.
    Ok(answer.map(|body| match (body, room) {
        (Either::Right(body), Some(room)) => Either::Right(body.while_(move || room.num_permits() > 0)),
        (body, _) => body,
    }))
}
