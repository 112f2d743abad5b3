//! The client: one request per call, blocking, for the command line.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::virtual_disk::TransferRequest;
use api::{
    DeviceId, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventKind, EventPage, NetConfig, NetStatus,
    Problem, Removal, StorageAnswer, StorageRequest, VmStatus,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::transfer::PROTOCOL;

/// Longest time for an answer, beyond what the request itself waits.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot reach the machine at {}; is it running, with this socket under [management]?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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

/// A machine, by its socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client for the machine at `path`. Nothing is connected yet.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(path: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(Self {
            path: path.to_owned(),
            runtime,
        })
    }

    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
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
        self.post("/v1/storage", request, crate::routes::STORAGE_TIMEOUT + TIMEOUT)
    }

    /// Has data moved between the machine's pool and the connection that is returned, which blocks, with what has arrived already.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn transfer(
        &self,
        request: &TransferRequest,
    ) -> Result<(Vec<u8>, std::os::unix::net::UnixStream), ClientError> {
        let body = serde_json::to_vec(request).map_err(|error| ClientError::Broken(error.into()))?;
        let exchange = self.upgrade("/v1/storage/transfer", body);
        let answered = self.runtime.block_on(async { timeout(TIMEOUT, exchange).await });
        answered.map_err(|_| ClientError::Timeout(TIMEOUT))?
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

    fn has(&self, id: &DeviceId) -> Result<bool, ClientError> {
        let status = self.status()?;
        let disk = status.disks.iter().any(|disk| disk.config.id == *id);
        Ok(disk || status.nets.iter().any(|net| net.config.id == *id))
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        decode(&self.request(&Method::GET, path, Vec::new(), TIMEOUT)?)
    }

    fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ClientError> {
        self.send(&Method::POST, path, body, limit)
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
        let exchange = self.exchange(method, path, body);
        let reply = self.runtime.block_on(async { timeout(limit, exchange).await });
        let reply = reply.map_err(|_| ClientError::Timeout(limit))??;
        if reply.status.is_success() {
            return Ok(reply);
        }
        Err(ClientError::Problem(Box::new(decode(&reply)?)))
    }

    async fn exchange(&self, method: &Method, path: &str, body: Vec<u8>) -> Result<Reply, ClientError> {
        let answer = self.answer(method, path, body, None).await?;
        read_all(answer).await
    }

    async fn upgrade(
        &self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(Vec<u8>, std::os::unix::net::UnixStream), ClientError> {
        let broken = |error: io::Error| ClientError::Broken(error.into());
        let answer = self.answer(&Method::POST, path, body, Some(PROTOCOL)).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(ClientError::Problem(Box::new(decode(&read_all(answer).await?)?)));
        }
        let upgraded = hyper::upgrade::on(answer).await;
        let upgraded = upgraded.map_err(|error| ClientError::Broken(error.into()))?;
        let parts = upgraded
            .downcast::<TokioIo<UnixStream>>()
            .map_err(|_| broken(io::Error::other("the connection is not what was made")))?;
        let stream = parts.io.into_inner().into_std().map_err(broken)?;
        stream.set_nonblocking(false).map_err(broken)?;
        Ok((parts.read_buf.to_vec(), stream))
    }

    /// Sends a request, and waits for the beginning of its answer.
    async fn answer(
        &self,
        method: &Method,
        path: &str,
        body: Vec<u8>,
        upgrade: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let broken = |error: hyper::Error| ClientError::Broken(error.into());
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Connect {
                path: self.path.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "smsvmm")
            .header(CONTENT_TYPE, "application/json");
        if let Some(protocol) = upgrade {
            request = request.header(CONNECTION, "upgrade").header(UPGRADE, protocol);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Broken(error.into()))?;
        sender.send_request(request).await.map_err(broken)
    }
}

async fn read_all(answer: Response<Incoming>) -> Result<Reply, ClientError> {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(ClientError::Broken)?;
    Ok(Reply {
        status,
        body: body.to_bytes(),
    })
}

struct Reply {
    status: StatusCode,
    body: Bytes,
}

fn decode<T: DeserializeOwned>(reply: &Reply) -> Result<T, ClientError> {
    serde_json::from_slice(&reply.body).map_err(|source| ClientError::NotUnderstood {
        status: reply.status.as_u16(),
        source,
    })
}
