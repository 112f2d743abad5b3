//! Listening, accepting, watching over connections, and the end.
//!
//! ```text
//!   NbdServer (any thread)            │ worker
//!     start ──► bind ─────────────────┼─► acceptor per address ──► connection, connection, …
//!                                     │   janitor: deadlines of handshakes and of clients that take no replies
//!     stop, drop ──► eventfd ─────────┼─► stopper: no new connections, the others drain, then everything goes
//!   NbdControl (any thread) ──────────┼─► exports that come and go, clients that must: see `manage`
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::{Arc, mpsc};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use access::{ClientCertificates, TlsError, TlsFiles, Versions};
use block_io::{
    BlockDevice, Clock, EventWatch, ListenAddress, ListenError, Listener, Stream, WorkerClock, WorkerHandle,
    spawn_local,
};
use rustls::ServerConfig;

use super::connection;
use super::export::Export;
use super::link::{Allowance, Link};
use super::manage::NbdControl;
use super::negotiate::{Catalogue, Offer, TlsMode};
use crate::queue::QueueStatistics;
use crate::sockets::buffers::Pool;
use crate::sockets::ending::{Bell, Ending, Running, start_task};
use crate::sockets::reach::Reach;

/// For the log.
const NAME: &str = "NBD server";
/// How often deadlines are looked at, while there are some.
const TICK: Duration = Duration::from_millis(500);
/// How long a client may take to close its side after everything is said.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted: it is not going to be better at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of unused buffers that are kept.
const POOL: usize = 16 << 20;

/// How to serve.
#[derive(Debug, Clone)]
pub struct NbdOptions {
    /// Where to listen.
    pub listen: Vec<ListenAddress>,
    /// Whether clients may, or must, use TLS; with the files that it needs.
    pub tls: Option<(TlsMode, TlsFiles)>,
    /// Most connections at once; further ones are closed at once.
    pub connections: usize,
    /// Most requests of a connection that are not answered yet; then it is not read from.
    pub requests: u32,
    /// Most bytes of data of these requests; one request is always served.
    pub memory: usize,
    /// How long a client may take to choose an export.
    pub handshake: Duration,
    /// How long a client may take to accept anything of the replies that wait for it.
    pub stall: Duration,
    /// How long a stop waits for requests and clients.
    pub patience: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            tls: None,
            connections: 32,
            requests: 256,
            memory: 64 << 20,
            handshake: Duration::from_secs(10),
            stall: Duration::from_secs(300),
            patience: Duration::from_secs(10),
        }
    }
}

/// The server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NbdServerError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Clients could not tell exports from each other.
    #[error("two exports are called {0:?}: give them different names")]
    SameName(String),
    /// Nothing is added to a server that stops.
    #[error("the NBD server is about to end")]
    Stopping,
    /// A name that no client can ask for.
    #[error("the name of an export has {0} bytes; 4096 are the most")]
    LongName(usize),
    /// A block size that the protocol does not know.
    #[error("{name:?} has blocks of {block} bytes, which NBD does not know")]
    BlockSize {
        /// Its name.
        name: String,
        /// Bytes.
        block: u32,
    },
    /// The host lacks something.
    #[error("cannot start the NBD server")]
    System(#[from] io::Error),
    /// The worker has ended.
    #[error("cannot start the NBD server: its worker has ended")]
    NoWorker,
}

/// A running server. Dropping it is [`Self::stop`].
#[derive(Debug)]
pub struct NbdServer {
    addresses: Vec<ListenAddress>,
    /// Last: dropping it waits.
    _running: Running,
}

impl NbdServer {
    /// Serves on `worker` the exports that `make` makes there. To be called from another thread.
    ///
    /// # Errors
    /// An address or a file cannot be used, or the exports are not such as can be served.
    pub fn start<E, M>(worker: &WorkerHandle, options: NbdOptions, make: M) -> Result<Self, NbdServerError>
    where
        E: Export,
        M: FnOnce() -> Vec<E> + Send + 'static,
    {
        Self::start_managed(worker, options, make).map(|(server, _)| server)
    }

    /// The same, with what manages the server while it runs.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_managed<E, M>(
        worker: &WorkerHandle,
        options: NbdOptions,
        make: M,
    ) -> Result<(Self, NbdControl<E>), NbdServerError>
    where
        E: Export,
        M: FnOnce() -> Vec<E> + Send + 'static,
    {
        let (answer, started) = mpsc::channel();
        let here = worker.clone();
        worker.spawn(move || async move {
            // The caller waits below.
            drop(answer.send(Self::start_here(&here, &options, make())));
        });
        started.recv().unwrap_or(Err(NbdServerError::NoWorker))
    }

    /// Serves `exports` on `worker`, a task of which calls this. What it returns may go to another thread.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_here<E: Export>(
        worker: &WorkerHandle,
        options: &NbdOptions,
        exports: Vec<E>,
    ) -> Result<(Self, NbdControl<E>), NbdServerError> {
        let mut all = BTreeMap::new();
        for (number, export) in exports.into_iter().enumerate() {
            check(&export, all.values())?;
            all.insert(number, Rc::new(Served::new(number, export)));
        }
        let (tls_mode, tls) = match &options.tls {
            Some((mode, files)) if *mode != TlsMode::Off => (
                *mode,
                Some(files.load(Versions::Tls12And13, ClientCertificates::Required)?),
            ),
            _ => (TlsMode::Off, None),
        };
        let listeners: Vec<Listener> = options
            .listen
            .iter()
            .map(Listener::bind)
            .collect::<Result<_, _>>()?;
        let addresses = listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let bell = Bell::new()?;
        let server = Rc::new(Server {
            next_export: Cell::new(all.len()),
            exports: RefCell::new(all),
            next_link: Cell::new(1),
            settings: options.clone(),
            tls,
            tls_mode,
            pool: Pool::new(POOL),
            links: RefCell::default(),
            acceptors: Cell::new(0),
            ending: Ending::default(),
            janitor: Rc::default(),
        });
        for listener in listeners {
            server.acceptors.set(server.acceptors.get() + 1);
            let own = Acceptor(Rc::clone(&server));
            start_task(async move { own.0.accept(listener).await })?;
        }
        start_task(watch_over(Rc::downgrade(&server), Rc::clone(&server.janitor)))?;
        let control = NbdControl(Reach::new(&server, worker));
        let server = Self {
            addresses,
            _running: Running::start(NAME, bell, |watch| end_when_told(server, watch))?,
        };
        Ok((server, control))
    }

    /// Where it listens: ports are the actual ones.
    pub fn addresses(&self) -> &[ListenAddress] {
        &self.addresses
    }

    /// Accepts nobody any more, finishes what clients have asked for, sends the replies and ends the connections; waits for
    /// all that, at most [`NbdOptions::patience`] for clients, and for the disks as long as they take. To be called from a
    /// thread that is not the worker's.
    pub fn stop(self) {
        drop(self);
    }
}

/// Whether an export can be served beside these.
pub(super) fn check<'a, E: Export>(
    export: &E,
    mut others: impl Iterator<Item = &'a Rc<Served<E>>>,
) -> Result<(), NbdServerError> {
    let name = export.name();
    if name.len() > block_io::nbd::protocol::LONGEST_TEXT {
        return Err(NbdServerError::LongName(name.len()));
    }
    if others.any(|other| other.export.name() == name) {
        return Err(NbdServerError::SameName(name.to_owned()));
    }
    let block = export.disk().geometry().logical_block;
    if !block.is_power_of_two() || block > 64 << 10 {
        return Err(NbdServerError::BlockSize {
            name: name.to_owned(),
            block,
        });
    }
    Ok(())
}

/// An export while it is there; whoever uses it has a reference.
pub(super) struct Served<E> {
    /// No other export ever has it.
    pub(super) number: usize,
    pub(super) export: E,
    /// What clients have asked of it.
    pub(super) statistics: QueueStatistics,
}

impl<E> Served<E> {
    pub(super) fn new(number: usize, export: E) -> Self {
        Self {
            number,
            export,
            statistics: QueueStatistics::default(),
        }
    }
}

/// What all connections share.
pub(super) struct Server<E> {
    /// By their numbers.
    pub(super) exports: RefCell<BTreeMap<usize, Rc<Served<E>>>>,
    pub(super) next_export: Cell<usize>,
    next_link: Cell<u64>,
    pub(super) settings: NbdOptions,
    pub(super) pool: Rc<Pool>,
    tls: Option<Arc<ServerConfig>>,
    tls_mode: TlsMode,
    pub(super) links: RefCell<Vec<Rc<Link>>>,
    acceptors: Cell<usize>,
    pub(super) ending: Ending,
    janitor: Rc<RefCell<Option<Waker>>>,
}

impl<E> Drop for Server<E> {
    fn drop(&mut self) {
        // It finds nobody to watch over, and ends.
        if let Some(waker) = self.janitor.borrow_mut().take() {
            waker.wake();
        }
    }
}

impl<E: Export> Catalogue for Server<E> {
    fn all(&self) -> Vec<usize> {
        self.exports.borrow().keys().copied().collect()
    }

    fn name(&self, number: usize) -> Option<String> {
        let exports = self.exports.borrow();
        Some(exports.get(&number)?.export.name().to_owned())
    }

    fn offer(&self, number: usize) -> Option<Offer> {
        let exports = self.exports.borrow();
        let export = &exports.get(&number)?.export;
        let geometry = export.disk().geometry();
        let minimum = geometry.logical_block;
        let preferred = geometry.physical_block.max(4096).next_power_of_two();
        Some(Offer {
            name: export.name().to_owned(),
            description: export.description().to_owned(),
            size: geometry.size,
            minimum_block: minimum,
            preferred_block: preferred.clamp(minimum, 1 << 25),
            read_only: export.read_only(),
            zeroes_fast: export.zeroes_fast(),
            snapshots: export.snapshots(),
        })
    }
}

/// Counts as one while it lives.
struct Acceptor<E>(Rc<Server<E>>);

impl<E> Drop for Acceptor<E> {
    fn drop(&mut self) {
        self.0.acceptors.set(self.0.acceptors.get() - 1);
        self.0.ending.someone_left();
    }
}

/// The same for a connection.
struct Connected<E> {
    server: Rc<Server<E>>,
    link: Rc<Link>,
}

impl<E> Drop for Connected<E> {
    fn drop(&mut self) {
        self.link.kill();
        self.server
            .links
            .borrow_mut()
            .retain(|link| !Rc::ptr_eq(link, &self.link));
        self.server.ending.someone_left();
    }
}

impl<E> Server<E> {
    pub(super) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.clone()
    }

    pub(super) fn tls_mode(&self) -> TlsMode {
        self.tls_mode
    }
}

impl<E: Export> Server<E> {
    async fn accept(self: &Rc<Self>, listener: Listener) {
        let clock = WorkerClock::new();
        while let Some(accepted) = self.ending.or(listener.accept()).await {
            match accepted {
                Ok((stream, peer)) if self.links.borrow().len() < self.settings.connections => {
                    self.connect(stream, peer);
                }
                Ok((_, peer)) => {
                    tracing::warn!(
                        peer,
                        "an NBD client is turned away: there are too many connections"
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD client");
                    self.ending.or(clock.sleep(ACCEPT_PAUSE)).await;
                }
            }
        }
    }

    fn connect(self: &Rc<Self>, stream: Stream, peer: String) {
        let allowance = Allowance {
            requests: self.settings.requests.max(1),
            memory: self.settings.memory,
            stall: self.settings.stall,
        };
        let number = self.next_link.get();
        self.next_link.set(number + 1);
        let link = Link::new(stream, (number, peer), allowance, Rc::clone(&self.janitor));
        self.links.borrow_mut().push(Rc::clone(&link));
        let connected = Connected {
            server: Rc::clone(self),
            link,
        };
        // This is a task, so there is a worker.
        drop(spawn_local(async move {
            let (server, link) = (Rc::clone(&connected.server), Rc::clone(&connected.link));
            connection::serve(server, link).await;
            drop(connected);
        }));
    }

    /// Whether all connections and acceptors are gone.
    fn is_empty(&self) -> bool {
        self.acceptors.get() == 0 && self.links.borrow().is_empty()
    }
}

async fn end_when_told<E: Export>(server: Rc<Server<E>>, mut watch: EventWatch) {
    if let Err(error) = watch.wait().await {
        tracing::error!(%error, "the NBD server cannot be told to stop, and stops");
    }
    server.ending.begin();
    let links = server.links.borrow().clone();
    for link in &links {
        link.stop();
    }
    let patience = server.settings.patience;
    let patient = server.ending.left_within(patience, || server.is_empty()).await;
    if !patient {
        tracing::warn!("NBD clients take too long to leave: their connections are cut");
        for link in &links {
            link.kill();
        }
        server.ending.everyone_left(|| server.is_empty()).await;
    }
}

/// Ends connections whose time is up.
async fn watch_over<E: Export>(server: Weak<Server<E>>, bell: Rc<RefCell<Option<Waker>>>) {
    let clock = WorkerClock::new();
    loop {
        let there = poll_fn(|context| {
            let Some(server) = server.upgrade() else {
                return Poll::Ready(false);
            };
            if server.links.borrow().iter().any(|link| link.deadline().is_some()) {
                return Poll::Ready(true);
            }
            *bell.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        if !there {
            return;
        }
        clock.sleep(TICK).await;
        let Some(server) = server.upgrade() else { return };
        let now = Instant::now();
        let late = |link: &&Rc<Link>| link.deadline().is_some_and(|deadline| deadline <= now);
        let late: Vec<_> = server.links.borrow().iter().filter(late).cloned().collect();
        for link in late {
            tracing::info!(
                peer = link.peer,
                "an NBD client takes too long: its connection is cut"
            );
            link.kill();
        }
    }
}
