//! The server: one thread with one tokio runtime, started for a machine that has a management socket.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use access::Role;
use api::{Host, Problem, ProblemKind, Share, Vm};
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::gateway::forward::AnswerBody;
use crate::host_routes::{self, HostContext};
use crate::lasting::Lasting;
use crate::life;
use crate::locals::{self, Locals};
use crate::repeated::{self, Keys};
use crate::room::{Peer, Room};
use crate::routes::{self, Content, Context};
use crate::share_routes::{self, ShareContext};
use crate::socket::{Listening, SocketError};
use block_io::SocketFile;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// The same for a host.
const MAX_HOST_CONNECTIONS: usize = 512;
/// Those of a user who has a role: he must leave room for root.
const MAX_OF_LOCAL: usize = 32;
/// Those of a user who may not manage: enough to be told so.
const MAX_OF_OTHERS: usize = 8;
/// Helper threads for requests that wait for the machine, one of which is for those that are answered at once.
const MAX_HELPERS: usize = 4;
/// The same for a host, which has several machines and pools; 8 are for those that are answered at once.
const MAX_HOST_HELPERS: usize = 64;
/// Of these, those for opening disks: machines that start must not wait for what administrators do.
const MAX_ATTACHING: usize = 16;
/// Requests at a time that may last. With streams of events, which are counted by themselves, they leave places for others.
const MAX_LASTING: usize = 32;
/// The same for a host.
const MAX_HOST_LASTING: usize = 192;
/// How long requests in progress may take to end when the server is stopped.
const GRACE: Duration = Duration::from_secs(1);
/// Stack of the thread and its helpers in bytes; touched pages only count.
const STACK_SIZE: usize = 512 << 10;

/// A management server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    listening: Listening,
    others: Others,
}

/// Who may ask, beside root and this process's user.
#[derive(Debug, Default)]
struct Others {
    /// He may ask everything.
    user: Option<u32>,
    locals: Locals,
}

impl Server {
    /// Listens on `path`. A file that a dead process left there is replaced.
    ///
    /// # Errors
    /// Somebody listens there already, or the file cannot be made.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let listening = Listening::bind(path)?;
        Ok(Self {
            listening,
            others: Others::default(),
        })
    }

    /// Lets a user ask, too, and connect.
    ///
    /// # Errors
    /// The socket cannot be given to this user.
    pub fn for_user(mut self, user: u32) -> io::Result<Self> {
        self.listening.give_to(user)?;
        self.others.user = Some(user);
        Ok(self)
    }

    /// Lets these ask, too, each what his role allows. If there are any, all users of the host can connect.
    ///
    /// # Errors
    /// The socket's mode cannot be changed.
    pub fn for_locals(mut self, locals: Locals) -> io::Result<Self> {
        if !locals.is_empty() {
            self.listening.let_all_connect()?;
        }
        self.others.locals = locals;
        Ok(self)
    }

    /// Starts to serve `vm`, on a thread of its own, until the handle is dropped. `on_start` runs first on that thread: the
    /// place for a sandbox. If it fails, nobody is served.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        self,
        vm: Arc<dyn Vm>,
        on_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<ServerHandle> {
        let lasting = Lasting::new(MAX_LASTING, MAX_HELPERS - 1);
        self.start_answering(Answering::Vm(Context::new(vm, lasting)), MAX_HELPERS, on_start)
    }

    /// As [`Self::start`], for a host.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_host(self, host: Arc<dyn Host>) -> io::Result<ServerHandle> {
        let context = Answering::Host(HostContext::new(
            host,
            Lasting::new(MAX_HOST_LASTING, MAX_HOST_HELPERS - MAX_ATTACHING - 8),
            Lasting::new(MAX_HOST_LASTING, MAX_ATTACHING),
        ));
        self.start_answering(context, MAX_HOST_HELPERS, || Ok(()))
    }

    /// As [`Self::start`], for disks that are given to others.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_share(self, share: Arc<dyn Share>) -> io::Result<ServerHandle> {
        let lasting = Lasting::new(MAX_LASTING, MAX_HELPERS - 1);
        let context = Answering::Share(ShareContext::new(share, lasting));
        self.start_answering(context, MAX_HELPERS, || Ok(()))
    }

    fn start_answering(
        self,
        context: Answering,
        helpers: usize,
        on_start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<ServerHandle> {
        let others = self.others;
        let (listener, file) = self.listening.into_parts();
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(helpers)
            .thread_name("management-helper")
            .thread_stack_size(STACK_SIZE)
            .build()?;
        let context = Arc::new(Served {
            answering: context,
            keys: Keys::default(),
        });
        let thread = std::thread::Builder::new()
            .name("management".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let served =
                    on_start().and_then(|()| runtime.block_on(serve(listener, others, context, stopped)));
                if let Err(error) = served {
                    warn!(%error, "the management socket cannot be served");
                }
                // A helper that still waits for the machine must not keep the process alive.
                runtime.shutdown_background();
            })?;
        Ok(ServerHandle {
            stop: Some(stop),
            thread: Some(thread),
            _file: file,
        })
    }
}

/// What is asked at the socket, with the requests that may be repeated.
struct Served {
    answering: Answering,
    keys: Keys,
}

/// What is asked at the socket.
enum Answering {
    Vm(Context),
    Host(HostContext),
    Share(ShareContext),
}

/// A running server. Dropping it ends the server: no new connections, a second for those that are being answered.
#[derive(Debug)]
pub struct ServerHandle {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _file: SocketFile,
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The server may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the management thread panicked");
        }
    }
}

/// Accepts until told to stop, then lets the requests in progress end.
async fn serve(
    listener: std::os::unix::net::UnixListener,
    others: Others,
    context: Arc<Served>,
    mut stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let most = match context.answering {
        Answering::Vm(_) | Answering::Share(_) => MAX_CONNECTIONS,
        Answering::Host(_) => MAX_HOST_CONNECTIONS,
    };
    let room = Room::new(most);
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            _ = &mut stopped => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors or memory: clients wait, and there may be some again soon.
                    warn!(%error, "a management connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        while connections.try_join_next().is_some() {}
        let (peer, may) = who(&stream, &others);
        let most_of_one = match may {
            May::All => most,
            May::As(..) => MAX_OF_LOCAL,
            May::Nothing(_) => MAX_OF_OTHERS,
        };
        if room.is_full(peer, most_of_one) {
            yield_now().await;
        }
        match room.enter(peer, most_of_one) {
            Some(place) => room.spawn(
                &mut connections,
                place,
                connection(stream, may, Arc::clone(&context)),
            ),
            None => refuse(&stream),
        }
    }
    drop(listener);
    match &context.answering {
        Answering::Vm(context) => context.events.end(),
        Answering::Host(context) => context.events.end(),
        Answering::Share(context) => context.events.end(),
    }
    let _ = timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

/// Serves one request of somebody who may do so much.
async fn connection(stream: UnixStream, may: May, context: Arc<Served>) {
    let answer = move |request: Request<Incoming>| {
        let (context, may) = (Arc::clone(&context), may.clone());
        async move {
            let permitted = match may {
                May::All => Ok(request.map(Either::Left)),
                May::As(user, role) => locals::permit(user, role, request).await.map(|mut request| {
                    // Keys of one are nobody else's.
                    let headers = repeated::of(&user.to_string(), request.headers());
                    *request.headers_mut() = headers;
                    request
                }),
                May::Nothing(problem) => Err(*problem),
            };
            match permitted {
                Ok(request) => answer(context, request).await,
                Err(problem) => routes::problem(&problem).map(Either::Left),
            }
        }
    };
    life::serve(stream, answer).await;
}

/// Answers a request, which may be a repetition.
async fn answer(context: Arc<Served>, request: Request<Content>) -> Response<AnswerBody> {
    let problem = |problem| routes::problem(&problem).map(Either::Left);
    let key = match repeated::key(&request) {
        Ok(None) => return context.answering.answer(request).await,
        Ok(Some(key)) => key,
        Err(found) => return problem(found),
    };
    let of_first = Arc::clone(&context);
    let route = move |request| async move { of_first.answering.answer(request).await };
    let room = || match &context.answering {
        Answering::Vm(context) => context.lasting.room(),
        Answering::Host(context) => context.lasting.room(),
        Answering::Share(context) => context.lasting.room(),
    };
    match context.keys.answer(key, request, room, route).await {
        Ok(answer) => answer.map(Either::Left),
        Err(found) => problem(found),
    }
}

impl Answering {
    async fn answer(&self, request: Request<Content>) -> Response<AnswerBody> {
        match self {
            Self::Vm(context) => routes::answer(context, request).await.map(Either::Left),
            Self::Host(context) => host_routes::answer(context, request).await,
            Self::Share(context) => share_routes::answer(context, request).await.map(Either::Left),
        }
    }
}

/// What somebody may ask.
#[derive(Debug, Clone)]
enum May {
    All,
    /// What this user's role allows.
    As(u32, Role),
    /// Why.
    Nothing(Box<Problem>),
}

/// Whose process is at the other end, and what it may.
fn who(stream: &UnixStream, others: &Others) -> (Peer, May) {
    let own = rustix::process::geteuid().as_raw();
    let forbidden = |detail| May::Nothing(Box::new(Problem::new(ProblemKind::Forbidden, detail)));
    let peer = match stream.peer_cred() {
        Ok(peer) => peer,
        Err(error) => {
            return (
                Peer::User(None),
                forbidden(format!("cannot find out who asks: {error}")),
            );
        }
    };
    let user = peer.uid();
    let may = if user == own || user == 0 || Some(user) == others.user {
        May::All
    } else {
        let role = if others.locals.is_empty() {
            Ok(None)
        } else {
            let groups = block_io::peer_groups(stream);
            groups.map(|mut groups| {
                groups.push(peer.gid());
                others.locals.role(user, &groups)
            })
        };
        match role {
            Ok(Some(role)) => May::As(user, role),
            Ok(None) => forbidden(format!("user {user} may not manage a machine of user {own}")),
            Err(error) => forbidden(format!("cannot find out in which groups user {user} is: {error}")),
        }
    };
    (Peer::User(Some(user)), may)
}

/// Tells a client that there are too many, if it listens at once.
fn refuse(stream: &UnixStream) {
    debug!("too many management connections");
    let body = routes::to_json(
        &Problem::new(
            ProblemKind::Exhausted,
            "as many requests as can be are worked on already",
        )
        .remedy("try again when one has ended"),
    );
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    // A client that cannot take some hundred bytes gets none.
    let _ = stream.try_write(&[head.as_bytes(), &body].concat());
}
