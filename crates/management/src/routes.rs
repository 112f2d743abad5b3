//! Requests to answers: which path does what.

use std::sync::Arc;
use std::time::Duration;

use api::{
    DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, Liveness, NetConfig, NetStatus, Problem,
    ProblemKind, Readiness, Removal, StorageAnswer, StorageRequest, Vm, VmState,
};
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::events::Events;
use crate::lasting::{self, Lasting};
use crate::sse::Feed;
use crate::{metrics, openapi, page, room, transfer};

/// Largest body of a request in bytes.
const MAX_BODY: usize = 64 << 10;
/// Longest time in which a client must have sent the body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that the machine may take to move data, for example to merge layers.
pub(crate) const STORAGE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Longest time that the machine may take for an answer.
pub(crate) const MACHINE_TIMEOUT: Duration = Duration::from_secs(20);

/// The body of an answer: made already, or a stream of events.
pub(crate) type Body = Either<Full<Bytes>, Feed>;
pub(crate) type Answer = Response<Body>;
/// The body of a request: from its connection, or read already.
pub(crate) type Content = Either<Incoming, Full<Bytes>>;

/// What requests work on.
pub(crate) struct Context {
    vm: Arc<dyn Vm>,
    /// Room for transfers.
    pub(crate) transfers: Arc<Semaphore>,
    pub(crate) events: Events<dyn Vm>,
    /// Those that may last.
    pub(crate) lasting: Lasting,
}

impl Context {
    pub(crate) fn new(vm: Arc<dyn Vm>, lasting: Lasting) -> Self {
        Self {
            events: Events::new(&vm, |vm| vm.events()),
            vm,
            transfers: Arc::new(Semaphore::new(transfer::MAX_TRANSFERS)),
            lasting,
        }
    }

    /// Asks the machine, on a helper thread, because it may take a moment.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Vm) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let vm = Arc::clone(&self.vm);
        help(MACHINE_TIMEOUT, move || question(&*vm)).await
    }

    async fn storage(&self, asked: StorageRequest) -> Result<StorageAnswer, Problem> {
        if lasting::is_quick(&asked) {
            return self.ask(move |vm| vm.storage(asked)).await;
        }
        let vm = Arc::clone(&self.vm);
        self.lasting
            .help(STORAGE_TIMEOUT, move || vm.storage(asked))
            .await
    }
}

/// Has a question answered on a helper thread.
pub(crate) async fn help<T: Send + 'static>(
    limit: Duration,
    question: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    match timeout(limit, tokio::task::spawn_blocking(question)).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Problem::new(
            ProblemKind::Host,
            "the request failed inside of smsvmm; see its log",
        )),
        Err(_) => Err(Problem::new(
            ProblemKind::Timeout,
            format!("there was no answer within {} seconds", limit.as_secs()),
        )),
    }
}

/// Answers any request.
pub(crate) async fn answer(context: &Context, mut request: Request<Content>) -> Answer {
    if request.method() == Method::HEAD {
        // The same answer, of which hyper sends the head only.
        *request.method_mut() = Method::GET;
    }
    match route(context, request).await {
        Ok(answer) => answer,
        Err(found) => problem(&found),
    }
}

async fn route(context: &Context, request: Request<Content>) -> Result<Answer, Problem> {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    let method = request.method().clone();
    match parts.as_slice() {
        ["v1", "vm"] => match method {
            Method::GET => Ok(json(StatusCode::OK, &context.ask(|vm| Ok(vm.status())).await?)),
            _ => Ok(not_allowed(&method, "GET")),
        },
        ["v1", "vm", "disks", id] if method == Method::PATCH => {
            let id = device_id(id)?;
            let change: DiskChange = body(request.into_body()).await?;
            let status = context.ask(move |vm| vm.change_disk(&id, &change)).await?;
            Ok(json(StatusCode::OK, &status))
        }
        ["v1", "vm", "disks", id, "trace"] => match method {
            Method::GET => {
                let id = device_id(id)?;
                let after = trace_query(request.uri().query().unwrap_or_default())?;
                let page = context.ask(move |vm| vm.trace(&id, &after)).await?;
                Ok(json(StatusCode::OK, &page))
            }
            _ => Ok(not_allowed(&method, "GET")),
        },
        ["v1", "vm", "debug"] => match method {
            Method::GET => Ok(json(StatusCode::OK, &context.ask(|vm| Ok(vm.dump())).await?)),
            _ => Ok(not_allowed(&method, "GET")),
        },
        ["v1", "vm", "limit-groups", name] => match method {
            Method::PATCH => {
                let name = device_id(name)?;
                let change: DiskLimits = body(request.into_body()).await?;
                let limits = context.ask(move |vm| vm.change_limits(&name, &change)).await?;
                Ok(json(StatusCode::OK, &limits))
            }
            _ => Ok(not_allowed(&method, "PATCH")),
        },
        ["v1", "vm", "disks", rest @ ..] => devices::<DiskConfig>(context, rest, request).await,
        ["v1", "vm", "nets", rest @ ..] => devices::<NetConfig>(context, rest, request).await,
        ["v1", "vm", action] => {
            let action = action_of(action).ok_or_else(|| no_such_path(&path))?;
            match method {
                Method::PUT => context.ask(action).await.map(|()| no_content()),
                _ => Ok(not_allowed(&method, "PUT")),
            }
        }
        ["v1", "storage"] => match method {
            Method::POST => {
                let asked: StorageRequest = body(request.into_body()).await?;
                Ok(json(StatusCode::OK, &context.storage(asked).await?))
            }
            _ => Ok(not_allowed(&method, "POST")),
        },
        ["v1", "storage", "transfer"] => match method {
            Method::POST => transfer::answer(context, request).await,
            _ => Ok(not_allowed(&method, "POST")),
        },
        ["v1", "events"] => match method {
            Method::GET => {
                let (events, lasting) = (&context.events, &context.lasting);
                events.answer(request.uri(), request.headers(), lasting).await
            }
            _ => Ok(not_allowed(&method, "GET")),
        },
        ["metrics"] | ["v1", "metrics"] => match method {
            Method::GET => Ok(metrics::answer(&context.ask(|vm| Ok(vm.metrics())).await?)),
            _ => Ok(not_allowed(&method, "GET")),
        },
        ["readyz"] => match method {
            Method::GET => Ok(ready(context.ask(|vm| Ok(vm.status())).await?.state)),
            _ => Ok(not_allowed(&method, "GET")),
        },
        rest => common(rest, &method, openapi::MACHINE).ok_or_else(|| no_such_path(&path)),
    }
}

/// What every server answers; `document` describes it.
pub(crate) fn common(path: &[&str], method: &Method, document: &'static str) -> Option<Answer> {
    let answer: fn(&'static str) -> Answer = match path {
        ["healthz"] => |_| json(StatusCode::OK, &Liveness::ok()),
        ["openapi.json"] => openapi::answer,
        _ => return None,
    };
    Some(match *method {
        Method::GET | Method::HEAD => answer(document),
        _ => not_allowed(method, "GET"),
    })
}

fn ready(state: VmState) -> Answer {
    let ready = state == VmState::Running;
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let state = state.to_string();
    json(status, &Readiness { ready, state })
}

type Action = fn(&dyn Vm) -> Result<(), Problem>;

fn action_of(name: &str) -> Option<Action> {
    Some(match name {
        "power-button" => |vm| vm.power_button(),
        "stop" => |vm| vm.stop("the administrator's request"),
        "reset" => |vm| vm.reset(),
        "pause" => |vm| vm.pause(),
        "resume" => |vm| vm.resume(),
        _ => return None,
    })
}

/// A kind of device: what is the same for disks and network cards.
trait Device: DeserializeOwned + Send + 'static {
    const PATH: &'static str;
    /// Methods for one of them.
    const METHODS: &'static str;
    type Status: Serialize + Send + 'static;

    /// Checks what the machine cannot know to be wrong.
    fn check(&self) -> Result<(), Problem>;
    fn attach(self, vm: &dyn Vm) -> Result<Self::Status, Problem>;
    fn list(vm: &dyn Vm) -> Vec<Self::Status>;
    fn id(status: &Self::Status) -> &DeviceId;
}

impl Device for DiskConfig {
    const PATH: &'static str = "/v1/vm/disks";
    const METHODS: &'static str = "GET, PATCH, DELETE";
    type Status = DiskStatus;

    fn check(&self) -> Result<(), Problem> {
        self.check().map_err(invalid_key)?;
        for (key, path) in [("image", &self.image), ("vhost-user", &self.vhost_user)] {
            let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) else {
                continue;
            };
            let detail = format!(
                "{} is a relative path; the machine has a folder of its own",
                path.display()
            );
            return Err(Problem::new(ProblemKind::Invalid, detail)
                .about(key)
                .remedy("give an absolute path"));
        }
        Ok(())
    }

    fn attach(self, vm: &dyn Vm) -> Result<DiskStatus, Problem> {
        vm.attach_disk(self)
    }

    fn list(vm: &dyn Vm) -> Vec<DiskStatus> {
        vm.status().disks
    }

    fn id(status: &DiskStatus) -> &DeviceId {
        &status.config.id
    }
}

impl Device for NetConfig {
    const PATH: &'static str = "/v1/vm/nets";
    const METHODS: &'static str = "GET, DELETE";
    type Status = NetStatus;

    fn check(&self) -> Result<(), Problem> {
        self.check().map_err(invalid_key)
    }

    fn attach(self, vm: &dyn Vm) -> Result<NetStatus, Problem> {
        vm.attach_net(self)
    }

    fn list(vm: &dyn Vm) -> Vec<NetStatus> {
        vm.status().nets
    }

    fn id(status: &NetStatus) -> &DeviceId {
        &status.config.id
    }
}

fn invalid_key((key, error): (&'static str, api::InvalidValue)) -> Problem {
    Problem::new(ProblemKind::Invalid, error.to_string()).about(key)
}

/// Everything below `D::PATH`.
async fn devices<D: Device>(
    context: &Context,
    rest: &[&str],
    request: Request<Content>,
) -> Result<Answer, Problem> {
    match (rest, request.method()) {
        ([], &Method::GET) => {
            let devices = context.ask(|vm| Ok(D::list(vm))).await?;
            page::answer(request.uri(), devices, |device| D::id(device).to_string())
        }
        ([], &Method::POST) => {
            let device: D = body(request.into_body()).await?;
            device.check()?;
            let status = context.ask(|vm| device.attach(vm)).await?;
            let mut answer = json(StatusCode::CREATED, &status);
            if let Ok(location) = HeaderValue::try_from(format!("{}/{}", D::PATH, D::id(&status))) {
                answer.headers_mut().insert(LOCATION, location);
            }
            Ok(answer)
        }
        ([], method) => Ok(not_allowed(method, "GET, POST")),
        ([id], &Method::GET) => {
            let id = device_id(id)?;
            let devices = context.ask(|vm| Ok(D::list(vm))).await?;
            let device = devices.iter().find(|device| *D::id(device) == id);
            device
                .map(|device| json(StatusCode::OK, device))
                .ok_or_else(|| no_such_device(&id))
        }
        ([id], &Method::DELETE) => {
            let id = device_id(id)?;
            context
                .ask(move |vm| detach::<D>(vm, &id))
                .await
                .map(|removal| json(StatusCode::ACCEPTED, &removal))
        }
        ([_], method) => Ok(not_allowed(method, D::METHODS)),
        _ => Err(no_such_path(request.uri().path())),
    }
}

fn detach<D: Device>(vm: &dyn Vm, id: &DeviceId) -> Result<Removal, Problem> {
    if !D::list(vm).iter().any(|device| D::id(device) == id) {
        return Err(no_such_device(id));
    }
    // Taken before, so that nothing that follows is missed by who asks for later events.
    let after_event = vm.events().last();
    vm.detach(id)?;
    Ok(Removal {
        id: id.clone(),
        state: api::DeviceState::Removing,
        after_event,
    })
}

pub(crate) fn device_id(text: &str) -> Result<DeviceId, Problem> {
    text.parse()
        .map_err(|error: api::InvalidValue| Problem::new(ProblemKind::Invalid, error.to_string()).about("id"))
}

fn no_such_device(id: &DeviceId) -> Problem {
    Problem::new(ProblemKind::NotFound, "the machine has no such device")
        .about(id)
        .remedy("`smsvmm vm status` lists the devices")
}

pub(crate) fn no_such_path(path: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, "there is nothing at this path").about(path)
}

/// The `after` of a request for a trace.
pub(crate) fn trace_query(text: &str) -> Result<String, Problem> {
    let mut after = String::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            // Some clients encode commas.
            Some(("after", value)) => after = value.replace("%2C", ",").replace("%2c", ","),
            _ => {
                let problem = Problem::new(ProblemKind::Invalid, "there is no such parameter");
                return Err(problem.about(pair).remedy("use after"));
            }
        }
    }
    Ok(after)
}

/// The body of a request as a `T`.
pub(crate) async fn body<T: DeserializeOwned>(body: Content) -> Result<T, Problem> {
    parse(&bytes(body).await?)
}

/// A `T` from JSON. All bodies are objects; serde would take an array for one as well.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if bytes.trim_ascii_start().starts_with(b"[") {
        let problem = Problem::new(ProblemKind::Invalid, "the body is an array");
        return Err(problem.remedy("send an object"));
    }
    serde_json::from_slice(bytes).map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))
}

/// The body of a request, not longer and not later than is allowed.
pub(crate) async fn bytes<B>(body: B) -> Result<Bytes, Problem>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let collected = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
    match collected {
        Ok(Ok(collected)) => {
            room::request_is_complete();
            Ok(collected.to_bytes())
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let detail = format!("the body has more than {MAX_BODY} bytes");
            Err(Problem::new(ProblemKind::TooLarge, detail))
        }
        Ok(Err(error)) => Err(Problem::new(
            ProblemKind::Invalid,
            format!("the body broke off: {error}"),
        )),
        Err(_) => Err(Problem::new(
            ProblemKind::Timeout,
            "the body did not come in time",
        )),
    }
}

/// `value` as JSON text with a line break at its end, for those who use curl.
pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    // The types of `api` have string keys only and no fallible serializers: nothing can fail.
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text
}

pub(crate) fn respond(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Answer {
    let mut answer = empty(status);
    *answer.body_mut() = Either::Left(Full::from(body));
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    respond(status, "application/json", to_json(value))
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Either::Left(Full::default()));
    *answer.status_mut() = status;
    answer
}

pub(crate) fn no_content() -> Answer {
    empty(StatusCode::NO_CONTENT)
}

pub(crate) fn problem(problem: &Problem) -> Answer {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    respond(status, "application/problem+json", to_json(problem))
}

/// What is answered to a method that is none of `allowed`; OPTIONS asks which those are.
pub(crate) fn not_allowed(method: &Method, allowed: &str) -> Answer {
    let mut answer = if method == Method::OPTIONS {
        no_content()
    } else {
        let detail = format!("{method} is not possible here");
        problem(&Problem::new(ProblemKind::MethodNotAllowed, detail).remedy(format!("use {allowed}")))
    };
    // RFC 9110, section 9.3.2: what can be got can be asked for its head.
    let head = if allowed.contains("GET") { ", HEAD" } else { "" };
    if let Ok(value) = HeaderValue::try_from(format!("{allowed}{head}, OPTIONS")) {
        answer.headers_mut().insert(ALLOW, value);
    }
    answer
}
