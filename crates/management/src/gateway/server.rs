//! The gateway's thread: connections, and what is done with each request.

use std::fs::Metadata;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use access::{
    ClientCertificates, Credentials, Fingerprint, Principal, Principals, PrincipalsError, TlsError, TlsFiles,
    TokenHash, Unknown, Versions,
};
use api::virtual_disk::TransferRequest;
use api::{MachineEntry, MachineState, MachineStatus, Problem, ProblemKind, VmState, VmStatus};
use http_body_util::{BodyExt, Either, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use super::attempts::{Attempts, place};
use super::audit::{Audit, AuditError, Line};
use super::forward::{AnswerBody, Outgoing, forward};
use super::subject::Subject;
use crate::console::{Consoles, Guard};
use crate::rights::{Asked, Kind};
use crate::room::{Peer, Room};
use crate::{life, openapi, page, repeated, routes, sse};

/// Connections that are served at a time.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Those of one address.
pub(super) const MAX_OF_ONE: usize = 64;
/// How long a machine may take to say how it is, for the list of all.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest status of a machine in bytes.
const MAX_STATUS: usize = 1 << 20;
/// A client that has said nothing for so long is asked by the system whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long requests in progress may take to end when the gateway is stopped.
const GRACE: Duration = Duration::from_secs(1);

/// A machine of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name, by which it is asked for.
    pub name: String,
    /// Its management socket.
    pub socket: PathBuf,
    /// The socket of its serial console, if it leads to one.
    pub console: Option<PathBuf>,
}

/// What a gateway needs.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its certificate, and the authorities of its clients.
    pub tls: TlsFiles,
    /// Who may what: see [`Principals`].
    pub access: PathBuf,
    /// The audit log.
    pub audit: PathBuf,
    /// The machines, each with its own socket.
    pub machines: Vec<Machine>,
    /// The socket of the host's manager, which knows further machines, and has the pools.
    pub manager: Option<PathBuf>,
    /// Longest time of a TLS handshake.
    pub handshake: Duration,
}

/// A gateway cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file of principals.
    #[error(transparent)]
    Access(#[from] PrincipalsError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The address.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The answer.
        source: io::Error,
    },
    /// The thread.
    #[error("cannot start the gateway's thread")]
    Thread(#[source] io::Error),
}

/// Who may what, as the file says now.
#[derive(Debug)]
struct Access {
    path: PathBuf,
    /// What the file was when it was read.
    stamp: Option<(u64, i64, i64, u64)>,
    principals: Principals,
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64, u64) {
    (
        metadata.ino(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.size(),
    )
}

impl Access {
    fn open(path: PathBuf) -> Result<Self, PrincipalsError> {
        let mut access = Self {
            path,
            stamp: None,
            principals: Principals::default(),
        };
        access.refresh()?;
        Ok(access)
    }

    /// Reads the file again if it has changed. If it cannot be read, nobody is known.
    fn refresh(&mut self) -> Result<&Principals, PrincipalsError> {
        let now = std::fs::metadata(&self.path).ok().as_ref().map(stamp);
        if now.is_none() || now != self.stamp {
            self.stamp = None;
            self.principals = Principals::load(&self.path)?;
            self.stamp = now;
        }
        Ok(&self.principals)
    }
}

/// What all requests share.
struct Shared {
    machines: Vec<Machine>,
    manager: Option<PathBuf>,
    access: Mutex<Access>,
    audit: Arc<Mutex<Audit>>,
    attempts: Mutex<Attempts>,
    requests: AtomicU64,
    consoles: Consoles,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A gateway that listens and does not answer yet.
pub struct Gateway {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    handshake: Duration,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Gateway").finish_non_exhaustive()
    }
}

impl Gateway {
    /// Reads all files, and listens.
    ///
    /// # Errors
    /// A file is missing or wrong, or the address cannot be had.
    pub fn bind(config: GatewayConfig) -> Result<Self, GatewayError> {
        let GatewayConfig {
            listen,
            tls,
            access,
            audit,
            machines,
            manager,
            handshake,
        } = config;
        let tls = tls.load(Versions::Tls13, ClientCertificates::Accepted)?;
        let access = Access::open(access)?;
        let audit = Audit::open(&audit)?;
        let failed = |source| GatewayError::Listen {
            address: listen,
            source,
        };
        let listener = TcpListener::bind(listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            acceptor: TlsAcceptor::from(tls),
            handshake,
            shared: Arc::new(Shared {
                machines,
                manager,
                access: Mutex::new(access),
                audit: Arc::new(Mutex::new(audit)),
                attempts: Mutex::default(),
                requests: AtomicU64::new(0),
                consoles: Consoles::default(),
            }),
        })
    }

    /// Where it listens; the port is known even if none was named.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers, on a thread of its own, until what is returned is dropped.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(self) -> Result<Running, GatewayError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(4)
            .build()
            .map_err(GatewayError::Thread)?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("gateway".to_owned())
            .spawn(move || {
                if let Err(error) = runtime.block_on(self.serve(stopped)) {
                    warn!(%error, "the gateway cannot be served");
                }
                runtime.shutdown_background();
            })
            .map_err(GatewayError::Thread)?;
        Ok(Running {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    async fn serve(self, mut stopped: oneshot::Receiver<()>) -> io::Result<()> {
        let Self {
            listener,
            acceptor,
            handshake,
            shared,
        } = self;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let room = Room::new(MAX_CONNECTIONS);
        let mut connections = JoinSet::new();
        loop {
            let (stream, peer) = tokio::select! {
                _ = &mut stopped => break,
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        warn!(%error, "a connection to the gateway cannot be accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            while connections.try_join_next().is_some() {}
            let address = Peer::Address(place(peer.ip()));
            if room.is_full(address, MAX_OF_ONE) {
                yield_now().await;
            }
            let Some(entered) = room.enter(address, MAX_OF_ONE) else {
                debug!(%peer, "too many connections");
                continue;
            };
            // Requests are small, and answered at once.
            let _ = stream.set_nodelay(true);
            notice_the_dead(&stream);
            let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
            room.spawn(&mut connections, entered, async move {
                let secured = timeout(handshake, acceptor.accept(stream)).await;
                match secured {
                    Ok(Ok(stream)) => connection(stream, peer, shared).await,
                    Ok(Err(error)) => debug!(%error, %peer, "no TLS"),
                    Err(_) => debug!(%peer, "no TLS in time"),
                }
            });
        }
        drop(listener);
        let _ = timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
        Ok(())
    }
}

/// A running gateway. Dropping it ends the gateway: no new connections, a second for those that are being answered.
#[derive(Debug)]
pub struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the gateway's thread panicked");
        }
    }
}

/// Has the system notice clients that have gone without a word, of which an idle console would never hear.
fn notice_the_dead(stream: &TcpStream) {
    use rustix::net::sockopt;
    let told = sockopt::set_socket_keepalive(stream, true)
        .and_then(|()| sockopt::set_tcp_keepidle(stream, KEEPALIVE))
        .and_then(|()| sockopt::set_tcp_keepintvl(stream, KEEPALIVE / 3))
        .and_then(|()| sockopt::set_tcp_keepcnt(stream, 3));
    if let Err(error) = told {
        debug!(%error, "clients that have gone will not be noticed");
    }
}

async fn connection(stream: TlsStream<TcpStream>, address: SocketAddr, shared: Arc<Shared>) {
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let certificate = certificates
        .first()
        .map(|certificate| Fingerprint::of(certificate));
    let answer = move |request| {
        let (shared, certificate) = (Arc::clone(&shared), certificate.clone());
        async move { shared.answer(address, certificate, request).await }
    };
    life::serve(stream, answer).await;
}

/// A request that was passed on, until its end is in the audit log.
struct Open {
    audit: Arc<Mutex<Audit>>,
    request: u64,
    after: Option<Value>,
    status: Option<u16>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let line = Line {
            request: self.request,
            after: self.after.take(),
            status: self.status,
            reason: self
                .status
                .is_none()
                .then_some("the client did not wait for the answer"),
            ..Line::default()
        };
        if let Err(error) = lock(&self.audit).write(line, false) {
            warn!(%error, "the end of a request is not in the audit log");
        }
    }
}

impl Shared {
    async fn answer(
        self: &Arc<Self>,
        from: SocketAddr,
        certificate: Option<Fingerprint>,
        request: Request<Incoming>,
    ) -> Response<AnswerBody> {
        if request.uri().path() == "/healthz"
            && let Some(answer) = routes::common(&["healthz"], request.method(), openapi::GATEWAY)
        {
            return own(answer);
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let mut line = Line {
            request: number,
            from: Some(from),
            method: Some(method.as_str()),
            path: Some(&path),
            ..Line::default()
        };
        let principal = match self.who(from.ip(), certificate, &request) {
            Ok(principal) => principal,
            Err(refusal) => {
                let Refusal { problem, wait } = refusal;
                line.reason = Some(&problem.detail);
                line.status = Some(problem.status);
                self.note(line);
                let mut answer = own(routes::problem(&problem));
                let headers = answer.headers_mut();
                if problem.kind == ProblemKind::Unauthenticated {
                    headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                }
                if let Some(wait) = wait {
                    headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs() + 1));
                }
                return answer;
            }
        };
        line.principal = Some(&principal.name);
        match self.act(&principal, number, &mut line, request).await {
            Ok(answer) => answer,
            Err(problem) => {
                if matches!(problem.kind, ProblemKind::Forbidden) {
                    line.reason = Some(&problem.detail);
                    line.status = Some(problem.status);
                    self.note(line);
                }
                own(routes::problem(&problem))
            }
        }
    }

    /// A line that nothing waits for.
    fn note(&self, line: Line<'_>) {
        if let Err(error) = lock(&self.audit).write(line, false) {
            warn!(%error, "a refusal is not in the audit log");
        }
    }

    fn who(
        &self,
        address: IpAddr,
        certificate: Option<Fingerprint>,
        request: &Request<Incoming>,
    ) -> Result<Principal, Refusal> {
        let now = Instant::now();
        if let Some(wait) = lock(&self.attempts).wait(address, now) {
            let detail = format!("{address} has failed to show who it is too often");
            let problem = Problem::new(ProblemKind::TooMany, detail)
                .remedy(format!("try again in {} seconds", wait.as_secs() + 1));
            return Err(Refusal {
                problem,
                wait: Some(wait),
            });
        }
        let token = request.headers().get(AUTHORIZATION).map(|value| {
            let text = value.to_str().unwrap_or_default();
            let scheme = text
                .get(..7)
                .filter(|scheme| scheme.eq_ignore_ascii_case("bearer "));
            TokenHash::of(scheme.and_then(|_| text.get(7..)).unwrap_or_default().trim())
        });
        let credentials = Credentials { certificate, token };
        let mut access = lock(&self.access);
        let principals = access.refresh().map_err(|error| {
            warn!(error = %block_io::error_chain(&error), "nobody is let in");
            let problem = Problem::new(ProblemKind::Host, "the gateway cannot read who may what");
            Refusal {
                problem: problem.remedy("see its log"),
                wait: None,
            }
        })?;
        match principals.find(&credentials) {
            Ok(principal) => {
                lock(&self.attempts).succeeded(address);
                Ok(principal.clone())
            }
            Err(unknown) => {
                lock(&self.attempts).failed(address, now);
                let remedy = match unknown {
                    Unknown::Nothing => "use a client certificate, or the header Authorization: Bearer TOKEN",
                    Unknown::Wrong => {
                        "ask the administrator; `smsvmm principal list` shows who is known, and until when"
                    }
                };
                let problem = Problem::new(ProblemKind::Unauthenticated, unknown.to_string());
                Err(Refusal {
                    problem: problem.remedy(remedy),
                    wait: None,
                })
            }
        }
    }

    async fn act(
        self: &Arc<Self>,
        principal: &Principal,
        number: u64,
        line: &mut Line<'_>,
        mut request: Request<Incoming>,
    ) -> Result<Response<AnswerBody>, Problem> {
        let method = request.method().clone();
        let uri = request.uri().clone();
        let headers = repeated::of(&principal.name, request.headers());
        let parts: Vec<&str> = uri.path().trim_start_matches('/').split('/').collect();
        match (parts.as_slice(), &method) {
            (["v1", "vms"], &Method::GET | &Method::HEAD) => {
                return self.list(principal, &uri).await.map(own);
            }
            (["v1", "vms"], _) => return Ok(own(routes::not_allowed(&method, "GET"))),
            (other, _) => {
                if let Some(answer) = routes::common(other, &method, openapi::GATEWAY) {
                    return Ok(own(answer));
                }
            }
        }
        let Destination {
            name,
            socket,
            path,
            rest,
        } = self.destination(principal, &parts)?;
        let upgrade = request
            .headers()
            .get(UPGRADE)
            .map(|value| value.as_bytes().to_vec());
        let upgrade = upgrade.map(|protocol| (hyper::upgrade::on(&mut request), protocol));
        let body = routes::bytes(request.into_body()).await?;
        let storage;
        let asked = match Kind::of(&method, rest) {
            Kind::Storage => {
                storage = routes::parse(&body)?;
                Asked::Storage(&storage)
            }
            Kind::Transfer => {
                let _: TransferRequest = routes::parse(&body)?;
                Asked::Transfer
            }
            Kind::Path => Asked::Path(&method, rest),
        };
        let needed = asked.needs();
        if principal.role < needed {
            let detail = format!(
                "{} is {}, and this needs {needed}",
                principal.name, principal.role
            );
            return Err(Problem::new(ProblemKind::Forbidden, detail).about(name));
        }
        let mut open = None;
        let mut subject = None;
        if !asked.only_reads() {
            subject = Subject::of(&method, &path, rest, asked.storage());
            if let Some(subject) = &subject {
                line.before = subject.look(name, socket).await;
            }
            line.body = serde_json::from_slice(&body).ok();
            let written = lock(&self.audit).write(std::mem::take(line), true);
            if let Err(error) = written {
                warn!(error = %block_io::error_chain(&error), "a change is refused");
                let detail = "the audit log cannot be written, so nothing may be changed";
                return Err(Problem::new(ProblemKind::Host, detail).remedy("see the gateway's log"));
            }
            open = Some(Open {
                audit: Arc::clone(&self.audit),
                request: number,
                after: None,
                status: None,
            });
        }
        let mut path = path;
        if let Some(query) = uri.query() {
            path = format!("{path}?{query}");
        }
        let is_console = matches!(
            (&method, parts.as_slice()),
            (&Method::POST, ["v1", "vms", _, "console"])
        );
        let guard = is_console.then(|| self.guard(principal, number));
        let own = self.machines.iter().find(|machine| machine.name == name);
        let answered = match (guard, own) {
            (Some(guard), Some(machine)) => self.console(machine, upgrade, body, guard).await,
            (guard, _) => {
                let outgoing = Outgoing {
                    name,
                    socket,
                    method: method.clone(),
                    path: &path,
                    headers: &headers,
                    body,
                    upgrade,
                    guard,
                };
                forward(outgoing)
                    .await
                    .map(|answer| self.watch(principal, answer))
            }
        };
        if let Some(open) = &mut open {
            open.status = Some(match &answered {
                Ok(answer) => answer.status().as_u16(),
                Err(problem) => problem.status,
            });
            if let (Some(subject), Ok(answer)) = (&subject, &answered)
                && answer.status().is_success()
            {
                open.after = subject.look(name, socket).await;
            }
        }
        answered
    }

    /// The console of a machine of the gateway's own.
    async fn console(
        &self,
        machine: &Machine,
        upgrade: Option<(OnUpgrade, Vec<u8>)>,
        body: Bytes,
        guard: Guard,
    ) -> Result<Response<AnswerBody>, Problem> {
        let socket = machine.console.as_ref().ok_or_else(|| {
            Problem::new(ProblemKind::Conflict, "the machine's console leads to no socket")
                .about(&machine.name)
                .remedy("set console.serial = \"socket:PATH\" in its vm.toml, and start both anew")
        })?;
        let opened = self
            .consoles
            .open(&machine.name, socket, upgrade, body, guard)
            .await;
        opened.map(own)
    }

    /// A console may be used as long as who has it is known as it was, and the log has when it was closed, and why.
    fn guard(self: &Arc<Self>, principal: &Principal, number: u64) -> Guard {
        let (shared, who) = (Arc::clone(self), principal.clone());
        Guard {
            may_go_on: self.is_known(principal),
            ended: Box::new(move |why| {
                shared.note(Line {
                    request: number,
                    principal: Some(&who.name),
                    closed: Some(why),
                    ..Line::default()
                });
            }),
        }
    }

    /// Whether somebody is known as it was.
    fn is_known(self: &Arc<Self>, principal: &Principal) -> Box<dyn FnMut() -> bool + Send> {
        let (shared, principal) = (Arc::clone(self), principal.clone());
        Box::new(move || {
            let mut access = lock(&shared.access);
            let known = access.refresh().is_ok_and(|known| known.all.contains(&principal));
            known && !principal.has_expired()
        })
    }

    /// An answer that may last for ever lasts only as long as who asked is known as it was.
    fn watch(self: &Arc<Self>, principal: &Principal, answer: Response<AnswerBody>) -> Response<AnswerBody> {
        let kind = answer.headers().get(CONTENT_TYPE);
        if kind.is_none_or(|kind| kind.as_bytes() != sse::MEDIA_TYPE.as_bytes()) {
            return answer;
        }
        let may_go_on = self.is_known(principal);
        answer.map(|body| match body {
            Either::Right(body) => Either::Right(body.while_(may_go_on)),
            own @ Either::Left(_) => own,
        })
    }

    /// Where a request goes, if the principal may know that there is such a place.
    fn destination<'a>(
        &'a self,
        principal: &Principal,
        parts: &'a [&'a str],
    ) -> Result<Destination<'a>, Problem> {
        let nowhere = || Err(routes::no_such_path(&format!("/{}", parts.join("/"))));
        let path = format!("/{}", parts.join("/"));
        let (name, rest) = match parts {
            ["v1", "vms", name, rest @ ..] => (*name, rest),
            // A host as a whole is for those who may know all of it. Disks are not served over the network.
            ["v1", "attachments" | "scsi-adapters" | "vms"] => return nowhere(),
            ["v1", rest @ ..] if !rest.is_empty() && principal.knows_all() => {
                let Some(manager) = &self.manager else {
                    return nowhere();
                };
                return Ok(Destination {
                    name: "the manager",
                    socket: manager,
                    path,
                    rest,
                });
            }
            _ => return nowhere(),
        };
        let missing = || {
            Problem::new(ProblemKind::NotFound, "there is no such machine")
                .about(name)
                .remedy("GET /v1/vms lists those that you may know")
        };
        if !principal.knows(name) {
            return Err(missing());
        }
        let own = self.machines.iter().find(|machine| machine.name == name);
        match (own, &self.manager) {
            (Some(_), _) if rest.is_empty() => nowhere(),
            (Some(machine), _) => Ok(Destination {
                name,
                socket: &machine.socket,
                path: format!("/v1/{}", rest.join("/")),
                rest,
            }),
            // The pool of a manager has the disks of others, too.
            (None, Some(_)) if rest.first() == Some(&"storage") && !principal.knows_all() => {
                let detail = format!("{} may not use the pools of the whole host", principal.name);
                Err(Problem::new(ProblemKind::Forbidden, detail).about(name))
            }
            (None, Some(manager)) => Ok(Destination {
                name,
                socket: manager,
                path,
                // What is done to a machine as a whole, or is passed on to it.
                rest: match rest {
                    ["vm" | "storage" | "events" | "metrics", ..] => rest,
                    _ => &parts[1..],
                },
            }),
            (None, None) => Err(missing()),
        }
    }

    /// The machines that a principal may know.
    async fn list(&self, principal: &Principal, uri: &hyper::Uri) -> Result<routes::Answer, Problem> {
        let mut entries = self.own_machines(principal).await;
        if let Some(manager) = &self.manager {
            let managed: Vec<MachineStatus> = look(manager, "the manager", "/v1/vms").await?;
            let known = managed
                .into_iter()
                .filter(|machine| principal.knows(machine.name.as_str()));
            entries.extend(known.map(|machine| MachineEntry {
                name: machine.name.to_string(),
                state: match machine.state {
                    MachineState::Starting => Some(VmState::Starting),
                    MachineState::Running => Some(VmState::Running),
                    MachineState::Stopping => Some(VmState::Stopping),
                    MachineState::Stopped | MachineState::Waiting | MachineState::Failed => None,
                },
                problem: machine.pid.is_none().then(|| match machine.last_end {
                    Some(end) => format!("{}: {end}", machine.state),
                    None => machine.state.to_string(),
                }),
            }));
        }
        page::answer(uri, entries, |machine| machine.name.clone())
    }

    /// Those of the machines with sockets of their own.
    async fn own_machines(&self, principal: &Principal) -> Vec<MachineEntry> {
        let known = self
            .machines
            .iter()
            .filter(|machine| principal.knows(&machine.name));
        let mut entries = Vec::new();
        for machine in known {
            let (status, problem) = match timeout(
                LOOK_TIMEOUT,
                look::<VmStatus>(&machine.socket, &machine.name, "/v1/vm"),
            )
            .await
            {
                Ok(Ok(status)) => (Some(status), None),
                Ok(Err(problem)) => (None, Some(problem.detail)),
                Err(_) => (None, Some("it gives no answer".to_owned())),
            };
            entries.push(MachineEntry {
                name: machine.name.clone(),
                state: status.map(|status| status.state),
                problem,
            });
        }
        entries
    }
}

/// Where a request goes.
struct Destination<'a> {
    /// What that is called.
    name: &'a str,
    socket: &'a Path,
    /// The path there.
    path: String,
    /// What rights are about.
    rest: &'a [&'a str],
}

/// Has a look at something.
async fn look<T: DeserializeOwned>(socket: &Path, name: &str, path: &str) -> Result<T, Problem> {
    let answer = forward(Outgoing {
        name,
        socket,
        method: Method::GET,
        path,
        headers: &HeaderMap::new(),
        body: hyper::body::Bytes::new(),
        upgrade: None,
        guard: None,
    })
    .await?;
    let body = Limited::new(answer.into_body(), MAX_STATUS).collect().await;
    let body =
        body.map_err(|error| Problem::new(ProblemKind::Host, format!("its answer broke off: {error}")))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| {
        Problem::new(
            ProblemKind::Host,
            format!("its answer is not understood: {error}"),
        )
    })
}

/// Why somebody is not let in, and how long to wait.
struct Refusal {
    problem: Problem,
    wait: Option<Duration>,
}

fn own(answer: routes::Answer) -> Response<AnswerBody> {
    answer.map(Either::Left)
}
