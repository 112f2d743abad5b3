//! The client: one request per call, blocking, for the command line.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::virtual_disk::TransferRequest;
use api::{
    Attachment, AttachmentMetrics, CONSOLE_PROTOCOL, ConsoleRequest, DebugDump, DeviceId, DiskChange,
    DiskConfig, DiskLimits, DiskStatus, EventKind, EventPage, HostStatus, MachineDefinition, MachineStatus,
    NetConfig, NetStatus, Problem, Removal, ShareDisk, ShareStatus, SharedDisk, StorageAnswer,
    StorageRequest, TracePage, VmName, VmStatus,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderName, IF_NONE_MATCH, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::share_routes::REMOVAL_TIMEOUT;
use crate::target::{Connection, Scope, Target, Way};
use crate::transfer::PROTOCOL;
use crate::{page, repeated};

/// Longest time for an answer, beyond what the request itself waits.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often something is asked again whose connection broke.
const RETRIES: u32 = 3;
/// Before each time.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// Entries of a list that are asked for at a time.
pub(crate) const PAGE: u32 = 500;
/// Largest answer in bytes.
pub(crate) const MAX_ANSWER: usize = 16 << 20;

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("nobody answers at {}; is it running, with this management socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody answers at the gateway, or it is another one.
    #[error("cannot reach the gateway {address}")]
    Gateway {
        /// Its address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// An address is none.
    #[error("`{0}` is not HOST:PORT")]
    Address(String),
    /// The files for TLS cannot be used.
    #[error(transparent)]
    Tls(access::TlsError),
    /// The process is out of something.
    #[error("cannot make a client")]
    Host(#[source] io::Error),
    /// The machine refused or failed.
    #[error(transparent)]
    Problem(Box<Problem>),
    /// The connection broke, for example because the machine ended.
    #[error("the connection to the machine broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No answer in time.
    #[error("the machine gave no answer within {} seconds", .0.as_secs())]
    Timeout(Duration),
    /// The answer is not one of smsvmm's.
    #[error(
        "the answer with status {status} is not understood; is this smsvmm's socket, and of this version?"
    )]
    NotUnderstood {
        /// The HTTP status.
        status: u16,
        /// Why.
        source: serde_json::Error,
    },
}

/// How a removal ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// The guest let the device go, and the host has closed it.
    Done,
    /// The guest does not let it go, for the reason given.
    Refused(String),
    /// The guest has not answered in the time given; it may still do so.
    Pending,
}

/// A machine, by its socket or behind a gateway.
#[derive(Debug)]
pub struct Client {
    way: Way,
    runtime: tokio::runtime::Runtime,
}

fn runtime() -> Result<tokio::runtime::Runtime, ClientError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ClientError::Host)
}

impl Client {
    /// A client for the machine at `target`. Nothing is connected yet.
    ///
    /// # Errors
    /// The process is out of descriptors, or a gateway's files or address cannot be used.
    pub fn new(target: impl Into<Target>) -> Result<Self, ClientError> {
        Ok(Self {
            way: Way::to(target.into())?,
            runtime: runtime()?,
        })
    }

    /// Another client for the same machine, for another thread.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn again(&self) -> Result<Self, ClientError> {
        Ok(Self {
            way: self.way.clone(),
            runtime: runtime()?,
        })
    }

    /// How the machine is.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all methods.
    pub fn status(&self) -> Result<VmStatus, ClientError> {
        self.get("/v1/vm")
    }

    /// One of "power-button", "stop", "reset", "pause", "resume".
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn act(&self, action: &str) -> Result<(), ClientError> {
        self.request(&Method::PUT, &format!("/v1/vm/{action}"), Vec::new(), TIMEOUT)
            .map(drop)
    }

    /// Adds a disk.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn attach_disk(&self, disk: &DiskConfig) -> Result<DiskStatus, ClientError> {
        self.post("/v1/vm/disks", disk, TIMEOUT)
    }

    /// Changes what can be changed of a disk while the guest uses it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn change_disk(&self, id: &DeviceId, change: &DiskChange) -> Result<DiskStatus, ClientError> {
        self.patch(&format!("/v1/vm/disks/{id}"), change)
    }

    /// Changes the limits that disks share; returns what holds now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn change_limits(&self, group: &DeviceId, change: &DiskLimits) -> Result<DiskLimits, ClientError> {
        self.patch(&format!("/v1/vm/limit-groups/{group}"), change)
    }

    /// Adds a network card.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn attach_net(&self, net: &NetConfig) -> Result<NetStatus, ClientError> {
        self.post("/v1/vm/nets", net, TIMEOUT)
    }

    /// Does something with the machine's pool.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn storage(&self, request: &StorageRequest) -> Result<StorageAnswer, ClientError> {
        let limit = crate::routes::STORAGE_TIMEOUT + TIMEOUT;
        match request.only_reads() {
            true => self.send(&Method::POST, "/v1/storage", request, limit),
            false => self.post("/v1/storage", request, limit),
        }
    }

    /// As [`Self::storage`], where the answer may be long: a list of files or disks is had page by page.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn storage_whole(&self, request: &StorageRequest) -> Result<StorageAnswer, ClientError> {
        let mut asked = request.clone();
        if !asked.begin_pages(PAGE) {
            return self.storage(request);
        }
        let mut whole = self.storage(&asked)?;
        while let Some(after) = whole.take_next() {
            asked.go_on_after(after);
            whole.append(self.storage(&asked)?);
        }
        Ok(whole)
    }

    /// Has data moved between the machine's pool and the connection that is returned, which blocks, with what has arrived already.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn transfer(
        &self,
        request: &TransferRequest,
    ) -> Result<(Vec<u8>, std::os::unix::net::UnixStream), ClientError> {
        self.connection(TRANSFER, PROTOCOL, request)
    }

    /// The console of a machine, of a manager or behind a gateway: what is read of the connection is shown, what is written is typed. With
    /// what has arrived already.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn console(
        &self,
        request: &ConsoleRequest,
    ) -> Result<(Vec<u8>, std::os::unix::net::UnixStream), ClientError> {
        self.connection("/v1/console", CONSOLE_PROTOCOL, request)
    }

    /// A connection that is taken out of HTTP.
    fn connection(
        &self,
        path: &'static str,
        protocol: &'static str,
        request: &impl Serialize,
    ) -> Result<(Vec<u8>, std::os::unix::net::UnixStream), ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Broken(error.into()))?;
        let way = self.way.clone();
        if matches!(way, Way::Socket(..)) {
            let exchange = upgrade(&way, path, protocol, body);
            let answered = self.runtime.block_on(async { timeout(TIMEOUT, exchange).await });
            let (early, connection) = answered.map_err(|_| ClientError::Timeout(TIMEOUT))??;
            let Connection::Unix(stream) = connection else {
                return Err(ClientError::Broken("the connection is not what was made".into()));
            };
            return Ok((early, blocking(stream)?));
        }
        // What is encrypted is carried by a thread, from and to a connection that is not.
        let (told, answer) = std::sync::mpsc::channel();
        let carry = move || {
            let runtime = match runtime() {
                Ok(runtime) => runtime,
                Err(error) => return drop(told.send(Err(error))),
            };
            runtime.block_on(async {
                let upgraded = timeout(TIMEOUT, upgrade(&way, path, protocol, body)).await;
                let upgraded = upgraded.map_err(|_| ClientError::Timeout(TIMEOUT)).flatten();
                let joined = upgraded.and_then(|(early, connection)| {
                    let (here, there) = UnixStream::pair().map_err(ClientError::Host)?;
                    Ok((early, connection, here, blocking(there)?))
                });
                match joined {
                    Err(error) => drop(told.send(Err(error))),
                    Ok((early, mut connection, mut here, there)) => {
                        if told.send(Ok((early, there))).is_ok() {
                            // Both ends see how it ended.
                            let _ = copy_bidirectional(&mut connection, &mut here).await;
                        }
                    }
                }
            });
        };
        let started = std::thread::Builder::new().name("carrier".into()).spawn(carry);
        started.map_err(ClientError::Host)?;
        answer
            .recv()
            .map_err(|_| ClientError::Broken("the thread that carries it has ended".into()))?
    }

    /// Asks the guest to let a disk or network card go; see [`Self::wait_for_removal`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn detach(&self, id: &DeviceId) -> Result<Removal, ClientError> {
        // Identifiers are unique over all kinds; the machine knows which it is.
        let is_net = self.status()?.nets.iter().any(|net| net.config.id == *id);
        let kind = if is_net { "nets" } else { "disks" };
        let answer = self.request(
            &Method::DELETE,
            &format!("/v1/vm/{kind}/{id}"),
            Vec::new(),
            TIMEOUT,
        )?;
        decode(&answer)
    }

    /// Waits up to `patience` until the guest has let the device go.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn wait_for_removal(&self, removal: &Removal, patience: Duration) -> Result<Removed, ClientError> {
        let deadline = Instant::now() + patience;
        let mut after = removal.after_event;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let page = self.events(after, left.min(Duration::from_secs(30)))?;
            for event in &page.events {
                match &event.kind {
                    EventKind::DeviceRemoved { id } if *id == removal.id => return Ok(Removed::Done),
                    EventKind::DeviceRemoveRefused { id, reason } if *id == removal.id => {
                        return Ok(Removed::Refused(reason.clone()));
                    }
                    _ => {}
                }
            }
            if page.missed > 0 && !self.has(&removal.id)? {
                return Ok(Removed::Done);
            }
            if left.is_zero() && page.events.is_empty() {
                return Ok(Removed::Pending);
            }
            after = page.last;
        }
    }

    /// Events with numbers above `after`; waits up to `wait` (at most a minute) for the first.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn events(&self, after: u64, wait: Duration) -> Result<EventPage, ClientError> {
        // Whole seconds, rounded up: a wait that is over in a moment must not become a busy loop.
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let path = format!("/v1/events?after={after}&wait={seconds}");
        decode(&self.request(&Method::GET, &path, Vec::new(), wait + TIMEOUT)?)
    }

    /// The last requests of a disk after a place in its trace, which is `next` of an earlier answer, or empty.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trace(&self, id: &DeviceId, after: &str) -> Result<TracePage, ClientError> {
        self.get(&format!("/v1/vm/disks/{id}/trace?after={after}"))
    }

    /// What the machine can tell of itself now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn dump(&self) -> Result<DebugDump, ClientError> {
        self.get("/v1/vm/debug")
    }

    /// The whole host, of a manager.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn host(&self) -> Result<HostStatus, ClientError> {
        self.get("/v1/host")
    }

    /// All disks of its pools that a manager serves.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn attachments(&self) -> Result<Vec<Attachment>, ClientError> {
        self.list("/v1/attachments")
    }

    /// What was asked of each disk that a manager serves since its machine has it; also if the client is for one pool of it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn attachment_counters(&self) -> Result<Vec<AttachmentMetrics>, ClientError> {
        let whole = Self {
            way: self.way.of(Scope::All),
            runtime: runtime()?,
        };
        whole.list("/v1/attachments/counters")
    }

    /// A machine of a manager.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn machine(&self, name: &VmName) -> Result<MachineStatus, ClientError> {
        self.get(&format!("/v1/vms/{name}"))
    }

    /// Has a manager know a machine.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn define(
        &self,
        name: &VmName,
        definition: &MachineDefinition,
    ) -> Result<MachineStatus, ClientError> {
        self.send(&Method::PUT, &format!("/v1/vms/{name}"), definition, TIMEOUT)
    }

    /// As [`Self::define`], only if the manager does not know it yet.
    ///
    /// # Errors
    /// See [`ClientError`]; a [`Precondition`](api::ProblemKind::Precondition) if it does.
    pub fn define_new(
        &self,
        name: &VmName,
        definition: &MachineDefinition,
    ) -> Result<MachineStatus, ClientError> {
        let body = serde_json::to_vec(definition).map_err(|error| ClientError::Broken(error.into()))?;
        let condition = Some((IF_NONE_MATCH, "*"));
        decode(&self.request_if(condition, &Method::PUT, &format!("/v1/vms/{name}"), body, TIMEOUT)?)
    }

    /// One of "start", "shutdown", "stop", of a machine of a manager.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn act_on_machine(&self, name: &VmName, action: &str) -> Result<MachineStatus, ClientError> {
        let path = format!("/v1/vms/{name}/{action}");
        decode(&self.request(&Method::PUT, &path, Vec::new(), TIMEOUT)?)
    }

    /// Has a manager forget a machine.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_machine(&self, name: &VmName) -> Result<(), ClientError> {
        self.request(&Method::DELETE, &format!("/v1/vms/{name}"), Vec::new(), TIMEOUT)
            .map(drop)
    }

    /// What `smsvmm share` serves, and to whom.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn share(&self) -> Result<ShareStatus, ClientError> {
        self.get("/v1/share")
    }

    /// Has `smsvmm share` serve one more disk.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn share_disk(&self, disk: &ShareDisk) -> Result<SharedDisk, ClientError> {
        self.post("/v1/share/disks", disk, REMOVAL_TIMEOUT + TIMEOUT)
    }

    /// Has `smsvmm share` serve a disk no more; it is free then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn unshare_disk(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/share/disks/{}", page::encode_whole(name));
        let limit = REMOVAL_TIMEOUT + TIMEOUT;
        self.request(&Method::DELETE, &path, Vec::new(), limit).map(drop)
    }

    /// Has `smsvmm share` end the connection of a client.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn disconnect_from_share(&self, client: &str) -> Result<(), ClientError> {
        let path = format!("/v1/share/clients/{}", page::encode_whole(client));
        let limit = REMOVAL_TIMEOUT + TIMEOUT;
        self.request(&Method::DELETE, &path, Vec::new(), limit).map(drop)
    }

    /// Has `smsvmm share` end.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop_share(&self) -> Result<(), ClientError> {
        self.request(&Method::PUT, "/v1/share/stop", Vec::new(), TIMEOUT)
            .map(drop)
    }

    fn has(&self, id: &DeviceId) -> Result<bool, ClientError> {
        let status = self.status()?;
        let disk = status.disks.iter().any(|disk| disk.config.id == *id);
        Ok(disk || status.nets.iter().any(|net| net.config.id == *id))
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        decode(&self.request(&Method::GET, path, Vec::new(), TIMEOUT)?)
    }

    /// A list, page by page.
    fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ClientError> {
        let mut all = Vec::new();
        let mut query = Some(format!("limit={PAGE}"));
        while let Some(asked) = query {
            let reply = self.request(&Method::GET, &format!("{path}?{asked}"), Vec::new(), TIMEOUT)?;
            all.extend(decode::<Vec<T>>(&reply)?);
            query = reply.next;
        }
        Ok(all)
    }

    /// Has something made, once: where the connection breaks, the same is asked again with the same key, of a server that still answers.
    fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Broken(error.into()))?;
        let key = repeated::new_key();
        let ask = || {
            self.request_if(
                Some((repeated::KEY, &key)),
                &Method::POST,
                path,
                body.clone(),
                limit,
            )
        };
        let mut answered = ask();
        for _ in 0..RETRIES {
            if !matches!(answered, Err(ClientError::Broken(_))) {
                break;
            }
            std::thread::sleep(RETRY_PAUSE);
            match ask() {
                // It has ended: how it ended the first time is what matters.
                Err(ClientError::Connect { .. } | ClientError::Gateway { .. }) => break,
                other => answered = other,
            }
        }
        decode(&answered?)
    }

    fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.send(&Method::PATCH, path, body, TIMEOUT)
    }

    fn send<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Broken(error.into()))?;
        decode(&self.request(method, path, body, limit)?)
    }

    fn request(
        &self,
        method: &Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Reply, ClientError> {
        self.request_if(None, method, path, body, limit)
    }

    fn request_if(
        &self,
        condition: Option<(HeaderName, &str)>,
        method: &Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Reply, ClientError> {
        let exchange = async {
            let answer = answer(&self.way, method, path, body, None, condition).await?;
            read_all(answer).await
        };
        let reply = self.runtime.block_on(async { timeout(limit, exchange).await });
        let reply = reply.map_err(|_| ClientError::Timeout(limit))??;
        if reply.status.is_success() {
            return Ok(reply);
        }
        Err(ClientError::Problem(Box::new(decode(&reply)?)))
    }
}

/// Where data are moved.
const TRANSFER: &str = "/v1/storage/transfer";

fn blocking(stream: UnixStream) -> Result<std::os::unix::net::UnixStream, ClientError> {
    let stream = stream.into_std().map_err(ClientError::Host)?;
    stream.set_nonblocking(false).map_err(ClientError::Host)?;
    Ok(stream)
}

/// Takes a connection out of HTTP; with what has arrived already.
async fn upgrade(
    way: &Way,
    path: &str,
    protocol: &str,
    body: Vec<u8>,
) -> Result<(Vec<u8>, Connection), ClientError> {
    let answer = answer(way, &Method::POST, path, body, Some(protocol), None).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(ClientError::Problem(Box::new(decode(&read_all(answer).await?)?)));
    }
    let upgraded = hyper::upgrade::on(answer).await;
    let upgraded = upgraded.map_err(|error| ClientError::Broken(error.into()))?;
    let parts = upgraded
        .downcast::<TokioIo<Connection>>()
        .map_err(|_| ClientError::Broken("the connection is not what was made".into()))?;
    Ok((parts.read_buf.to_vec(), parts.io.into_inner()))
}

/// Sends a request, and waits for the beginning of its answer.
async fn answer(
    way: &Way,
    method: &Method,
    path: &str,
    body: Vec<u8>,
    upgrade: Option<&str>,
    condition: Option<(HeaderName, &str)>,
) -> Result<Response<Incoming>, ClientError> {
    let stream = way.connect().await?;
    let mut builder = request(method, &way.path(path), upgrade.map(str::as_bytes));
    if let Some(token) = way.token() {
        builder = builder.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    if let Some((header, value)) = condition {
        builder = builder.header(header, value);
    }
    let request = builder
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| ClientError::Broken(error.into()))?;
    send(stream, request)
        .await
        .map_err(|error| ClientError::Broken(error.into()))
}

/// A request as machines take it; `upgrade`: what the connection is to become.
pub(crate) fn request(method: &Method, path: &str, upgrade: Option<&[u8]>) -> hyper::http::request::Builder {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "smsvmm")
        .header(CONTENT_TYPE, "application/json");
    match upgrade {
        Some(protocol) => request.header(CONNECTION, "upgrade").header(UPGRADE, protocol),
        None => request,
    }
}

/// Sends the one request of a connection, and waits for the beginning of its answer.
pub(crate) async fn send<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await
}

async fn read_all(answer: Response<Incoming>) -> Result<Reply, ClientError> {
    let (status, next) = (answer.status(), page::next(answer.headers()));
    let body = Limited::new(answer.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(ClientError::Broken)?;
    Ok(Reply {
        status,
        next,
        body: body.to_bytes(),
    })
}

struct Reply {
    status: StatusCode,
    /// The query of the next page, of a list.
    next: Option<String>,
    body: Bytes,
}

fn decode<T: DeserializeOwned>(reply: &Reply) -> Result<T, ClientError> {
    serde_json::from_slice(&reply.body).map_err(|source| ClientError::NotUnderstood {
        status: reply.status.as_u16(),
        source,
    })
}
