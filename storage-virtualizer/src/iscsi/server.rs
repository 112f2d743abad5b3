//! Listening, accepting, who is logged in, watching over connections, and the end.
//!
//! ```text
//!   IscsiServer (any thread)          │ worker
//!     start ──► bind ─────────────────┼─► acceptor per portal ──► connection, connection, …
//!                                     │   janitor: deadlines; pings to those from whom nothing is heard
//!     stop, drop ──► eventfd ─────────┼─► stopper: asks initiators to log out, then everything goes
//!   IscsiControl (any thread) ────────┼─► units that come and go, sessions that must: see `control`
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::{Arc, mpsc};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use block_io::{
    BlockDevice, Clock, EventWatch, ListenAddress, Listener, Stream, WorkerClock, WorkerHandle, spawn_local,
};

use super::access::{self, check_name};
use super::control::IscsiControl;
use super::counted::UnitDisk;
use super::keys::Parameters;
use super::life;
use super::link::{Allowance, Link};
use super::login::{Agreement, Refusal, Rules, status};
use super::options::{IscsiOptions, IscsiServerError, IscsiTarget, IscsiUnit};
use super::session::{PORTAL_GROUP, Session};
use crate::scsi::{Nexus, Target, TransportId};
use crate::sockets::buffers::Pool;
use crate::sockets::ending::{Bell, Ending, Running, start_task};
use crate::sockets::reach::Reach;

/// For the log.
const NAME: &str = "iSCSI target";
/// How often deadlines and silences are looked at, while there are connections.
const TICK: Duration = Duration::from_millis(500);
/// How long an initiator may take to close its side after everything is said.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted: it is not going to be better at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of unused buffers that are kept.
const POOL: usize = 32 << 20;
/// Asynchronous events (RFC 7143 §11.9.1).
pub(super) const LOGOUT_WANTED: u8 = 1;
pub(super) const ALL_DROPPED: u8 = 3;

/// A running target. Dropping it is [`Self::stop`].
#[derive(Debug)]
pub struct IscsiServer {
    addresses: Vec<ListenAddress>,
    /// Last: dropping it waits.
    _running: Running,
}

impl IscsiServer {
    /// Serves on `worker` the units that `make` makes there. To be called from another thread.
    ///
    /// # Errors
    /// An address cannot be used, or the options are impossible.
    pub fn start<D, M>(
        worker: &WorkerHandle,
        options: IscsiOptions,
        make: M,
    ) -> Result<Self, IscsiServerError>
    where
        D: BlockDevice + 'static,
        M: FnOnce() -> Vec<IscsiUnit<D>> + Send + 'static,
    {
        Self::start_managed(worker, options, make).map(|(server, _)| server)
    }

    /// The same, with what manages the target while it runs.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_managed<D, M>(
        worker: &WorkerHandle,
        options: IscsiOptions,
        make: M,
    ) -> Result<(Self, IscsiControl<D>), IscsiServerError>
    where
        D: BlockDevice + 'static,
        M: FnOnce() -> Vec<IscsiUnit<D>> + Send + 'static,
    {
        let (answer, started) = mpsc::channel();
        let here = worker.clone();
        worker.spawn(move || async move {
            // The caller waits below.
            drop(answer.send(Self::start_here(&here, &options, make())));
        });
        started.recv().unwrap_or(Err(IscsiServerError::NoWorker))
    }

    /// Serves `units` on `worker`, a task of which calls this. What it returns may go to another thread.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_here<D: BlockDevice + 'static>(
        worker: &WorkerHandle,
        options: &IscsiOptions,
        units: Vec<IscsiUnit<D>>,
    ) -> Result<(Self, IscsiControl<D>), IscsiServerError> {
        check_targets(&options.targets, &units)?;
        let targets: Vec<_> = options.targets.iter().map(|_| Target::default()).collect();
        for unit in units {
            let target: &Target<_> = targets.get(unit.target).ok_or(IscsiServerError::NoTarget)?;
            target.add(unit.lun, unit.unit, Rc::new(UnitDisk::new(unit.disk)))?;
        }
        let listeners: Vec<Listener> = options
            .listen
            .iter()
            .map(Listener::bind)
            .collect::<Result<_, _>>()?;
        let addresses: Vec<_> = listeners
            .iter()
            .map(|listener| listener.address().clone())
            .collect();
        let bell = Bell::new()?;
        let server = Rc::new(Server {
            targets,
            settings: options.clone(),
            pool: Pool::new(POOL),
            addresses: addresses.clone(),
            sessions: RefCell::default(),
            last_tsih: Cell::new(0),
            links: RefCell::default(),
            logging_in: RefCell::default(),
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
        let control = IscsiControl(Reach::new(&server, worker));
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

    /// Accepts nobody any more, asks initiators to log out, finishes what they have asked for, and ends the connections; waits
    /// for all that, at most [`IscsiOptions::patience`] for initiators, and for the disks as long as they take. To be called
    /// from a thread that is not the worker's.
    pub fn stop(self) {
        drop(self);
    }
}

/// Checks names, who may log in, and that there is a target for each unit.
fn check_targets<D>(targets: &[IscsiTarget], units: &[IscsiUnit<D>]) -> Result<(), IscsiServerError> {
    if targets.is_empty() || units.iter().any(|unit| unit.target >= targets.len()) {
        return Err(IscsiServerError::NoTarget);
    }
    for (place, target) in targets.iter().enumerate() {
        check_name(&target.name)?;
        if targets[..place].iter().any(|other| other.is(&target.name)) {
            return Err(IscsiServerError::Twice(target.name.clone()));
        }
        let own = units.iter().filter(|unit| unit.target == place);
        let luns: BTreeSet<u16> = own.map(|unit| unit.lun).collect();
        access::check(&target.access, &luns)?;
    }
    Ok(())
}

/// What all connections share.
pub(super) struct Server<D: BlockDevice + 'static> {
    /// The units of each target of the settings.
    pub(super) targets: Vec<Target<Rc<UnitDisk<D>>>>,
    pub(super) settings: IscsiOptions,
    pub(super) pool: Rc<Pool>,
    addresses: Vec<ListenAddress>,
    sessions: RefCell<Vec<Rc<Session<D>>>>,
    last_tsih: Cell<u16>,
    links: RefCell<Vec<Rc<Link>>>,
    /// Those of them that have not logged in.
    logging_in: RefCell<Vec<Rc<Link>>>,
    acceptors: Cell<usize>,
    ending: Ending,
    janitor: Rc<RefCell<Option<Waker>>>,
}

impl<D: BlockDevice + 'static> Drop for Server<D> {
    fn drop(&mut self) {
        // It finds nobody to watch over, and ends.
        if let Some(waker) = self.janitor.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// Counts as one while it lives.
struct Acceptor<D: BlockDevice + 'static>(Rc<Server<D>>);

impl<D: BlockDevice + 'static> Drop for Acceptor<D> {
    fn drop(&mut self) {
        self.0.acceptors.set(self.0.acceptors.get() - 1);
        self.0.ending.someone_left();
    }
}

/// The same for a connection.
struct Connected<D: BlockDevice + 'static> {
    server: Rc<Server<D>>,
    link: Rc<Link>,
}

impl<D: BlockDevice + 'static> Drop for Connected<D> {
    fn drop(&mut self) {
        self.link.kill();
        self.link.finish();
        self.server.login_ended(&self.link);
        self.server
            .links
            .borrow_mut()
            .retain(|link| !Rc::ptr_eq(link, &self.link));
        self.server.ending.someone_left();
    }
}

/// Where a new connection belongs.
pub(super) enum Joined<D: BlockDevice + 'static> {
    /// To a new session.
    New,
    /// To a new session in the place of this one.
    Instead(Rc<Session<D>>),
    /// To this session.
    Session(Rc<Session<D>>),
}

impl<D: BlockDevice + 'static> Rules for Server<D> {
    fn targets(&self) -> &[IscsiTarget] {
        &self.settings.targets
    }

    fn session(&self, target: usize, initiator: &str, isid: [u8; 6], tsih: u16) -> Option<Parameters> {
        self.find(target, initiator, isid, tsih)
            .map(|session| session.parameters)
    }
}

impl<D: BlockDevice + 'static> Server<D> {
    pub(super) fn is_stopping(&self) -> bool {
        self.ending.has_begun()
    }

    pub(super) fn sessions(&self) -> Vec<Rc<Session<D>>> {
        self.sessions.borrow().clone()
    }

    /// The sessions with a target.
    pub(super) fn sessions_with(&self, target: usize) -> Vec<Rc<Session<D>>> {
        let mut sessions = self.sessions();
        sessions.retain(|session| session.target == target && !session.is_discovery);
        sessions
    }

    /// The targets that may be told of in a session: what the initiator may use with what it has proved.
    pub(super) fn told_in(&self, session: &Session<D>) -> impl Iterator<Item = &IscsiTarget> {
        let targets = &self.settings.targets;
        let access = |target: &IscsiTarget| access::find(&target.access, &session.initiator).cloned();
        let proved = targets.get(session.target).and_then(access);
        let proved = proved.and_then(|access| access.chap);
        targets.iter().enumerate().filter_map(move |(place, target)| {
            let access = access(target)?;
            let may = session.is_discovery && (access.chap.is_none() || access.chap == proved);
            (may || place == session.target).then_some(target)
        })
    }

    fn find(&self, target: usize, initiator: &str, isid: [u8; 6], tsih: u16) -> Option<Rc<Session<D>>> {
        let sessions = self.sessions.borrow();
        let same = |session: &&Rc<Session<D>>| {
            (session.tsih, session.isid, session.target) == (tsih, isid, target)
                && session.initiator == initiator
        };
        sessions.iter().find(same).cloned()
    }

    /// The portals as an initiator can use them whose connection ends at `local`.
    pub(super) fn portals(&self, local: Option<SocketAddr>) -> Vec<SocketAddr> {
        let mut portals = Vec::new();
        for address in &self.addresses {
            let ListenAddress::Tcp(address) = address else {
                continue;
            };
            let ip = match local {
                // It listens on all addresses of one family: told is the one that was used.
                Some(local) if address.ip().is_unspecified() => local.ip(),
                _ => address.ip(),
            };
            let portal = SocketAddr::new(unmapped(ip), address.port());
            if !portals.contains(&portal) {
                portals.push(portal);
            }
        }
        portals
    }

    /// The login of a connection has ended.
    pub(super) fn login_ended(&self, link: &Rc<Link>) {
        self.logging_in
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, link));
    }

    /// Where a connection belongs that has agreed on something.
    pub(super) fn join(&self, agreement: &Agreement) -> Result<Joined<D>, Refusal> {
        if self.ending.has_begun() {
            return Err(Refusal(status::UNAVAILABLE, "the target is about to end"));
        }
        let first = &agreement.first;
        if first.tsih != 0 {
            let session = self
                .find(agreement.target, &agreement.initiator, first.isid, first.tsih)
                .ok_or(Refusal(status::NO_SESSION, "a session that does not exist"))?;
            let connections = session.connections.borrow();
            let others = connections.iter().filter(|other| other.cid != first.cid).count();
            let most = usize::try_from(session.parameters.connections).unwrap_or(1);
            if others >= most || session.is_discovery {
                return Err(Refusal(
                    status::TOO_MANY_CONNECTIONS,
                    "too many connections in its session",
                ));
            }
            drop(connections);
            return Ok(Joined::Session(session));
        }
        let sessions = self.sessions.borrow();
        let old = sessions.iter().find(|session| {
            session.initiator == agreement.initiator
                && session.isid == first.isid
                && session.is_discovery == agreement.is_discovery
                && (session.is_discovery || session.target == agreement.target)
        });
        Ok(old.map_or(Joined::New, |old| Joined::Instead(Rc::clone(old))))
    }

    /// Opens a session. None: there are as many as can be told apart.
    pub(super) fn open(self: &Rc<Self>, agreement: &Agreement) -> Option<Rc<Session<D>>> {
        let is_free = |tsih: u16| self.sessions.borrow().iter().all(|session| session.tsih != tsih);
        let start = self.last_tsih.get();
        let tsih = (1..=u16::MAX)
            .map(|step| start.wrapping_add(step))
            .find(|tsih| *tsih != 0 && is_free(*tsih))?;
        self.last_tsih.set(tsih);
        let id = TransportId::iscsi(&agreement.initiator, agreement.first.isid);
        let nexus = Arc::new(Nexus::new(id, PORTAL_GROUP));
        if !agreement.is_discovery
            && let Some(target) = self.targets.get(agreement.target)
        {
            target.connect(&nexus, agreement.access.visible());
        }
        let session = Session::new(Rc::clone(self), nexus, agreement, tsih);
        self.sessions.borrow_mut().push(Rc::clone(&session));
        Some(session)
    }

    /// A session has ended.
    pub(super) fn forget(&self, session: &Rc<Session<D>>) {
        self.sessions
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, session));
    }

    async fn accept(self: &Rc<Self>, listener: Listener) {
        let clock = WorkerClock::new();
        while let Some(accepted) = self.ending.or(listener.accept()).await {
            let (all, new) = (self.links.borrow().len(), self.logging_in.borrow().len());
            match accepted {
                Ok((stream, peer)) if all < self.settings.connections && new < self.settings.logins => {
                    self.connect(stream, peer);
                }
                Ok((_, peer)) => {
                    tracing::warn!(
                        peer,
                        "an iSCSI initiator is turned away: there are too many connections"
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an iSCSI initiator");
                    self.ending.or(clock.sleep(ACCEPT_PAUSE)).await;
                }
            }
        }
    }

    fn connect(self: &Rc<Self>, stream: Stream, peer: String) {
        let allowance = Allowance {
            memory: self.settings.memory,
            stall: self.settings.stall,
        };
        let link = Link::new(stream, peer, allowance);
        self.links.borrow_mut().push(Rc::clone(&link));
        self.logging_in.borrow_mut().push(Rc::clone(&link));
        if let Some(waker) = self.janitor.borrow_mut().take() {
            waker.wake();
        }
        let connected = Connected {
            server: Rc::clone(self),
            link: Rc::clone(&link),
        };
        let writer = Rc::clone(&link);
        // This is a task, so there is a worker.
        drop(spawn_local(async move { writer.write().await }));
        drop(spawn_local(async move {
            life::serve(Rc::clone(&connected.server), link).await;
            drop(connected);
        }));
    }

    /// Whether all connections and acceptors are gone.
    fn is_empty(&self) -> bool {
        self.acceptors.get() == 0 && self.links.borrow().is_empty()
    }

    /// Deadlines and silences.
    fn look_after(&self) {
        let now = Instant::now();
        let late = |link: &&Rc<Link>| link.deadline().is_some_and(|deadline| deadline <= now);
        let late: Vec<_> = self.links.borrow().iter().filter(late).cloned().collect();
        for link in late {
            tracing::info!(
                peer = link.peer,
                "an iSCSI initiator takes too long: its connection is cut"
            );
            link.kill();
        }
        let (ask, cut) = (self.settings.ping.0, self.settings.ping.0 + self.settings.ping.1);
        for session in self.sessions() {
            let connections = session.connections.borrow().clone();
            for connection in connections {
                let silence = connection.link.silence(now);
                if silence >= cut {
                    tracing::warn!(
                        peer = connection.link.peer,
                        "nothing is heard of an iSCSI initiator: its connection is cut"
                    );
                    connection.link.kill();
                } else if silence >= ask && connection.must_ping() {
                    connection.ping();
                }
            }
        }
    }
}

/// An IPv4 address in IPv6's notation is told as what it is.
fn unmapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(six) => six.to_ipv4_mapped().map_or(address, IpAddr::V4),
        IpAddr::V4(_) => address,
    }
}

async fn end_when_told<D: BlockDevice + 'static>(server: Rc<Server<D>>, mut watch: EventWatch) {
    if let Err(error) = watch.wait().await {
        tracing::error!(%error, "the iSCSI target cannot be told to stop, and stops");
    }
    server.ending.begin();
    let new = server.logging_in.borrow().clone();
    new.iter().for_each(|link| link.kill());
    let (logout, commands) = server.settings.patience;
    let seconds = u16::try_from(logout.as_secs()).unwrap_or(u16::MAX);
    for session in server.sessions() {
        let connections = session.connections.borrow().clone();
        for connection in connections {
            connection.notify(LOGOUT_WANTED, [0, 0, seconds]);
        }
    }
    if server.ending.left_within(logout, || server.is_empty()).await {
        return;
    }
    for session in server.sessions() {
        let connections = session.connections.borrow().clone();
        for connection in connections {
            connection.notify(ALL_DROPPED, [0, 2, 0]);
            // What is in flight is answered, and nothing more read.
            connection.link.end();
        }
    }
    if server.ending.left_within(commands, || server.is_empty()).await {
        return;
    }
    tracing::warn!("iSCSI initiators take too long to leave: their connections are cut");
    let links = server.links.borrow().clone();
    links.iter().for_each(|link| link.kill());
    server.sessions().iter().for_each(Session::close);
    server.ending.everyone_left(|| server.is_empty()).await;
}

async fn watch_over<D: BlockDevice + 'static>(server: Weak<Server<D>>, bell: Rc<RefCell<Option<Waker>>>) {
    let clock = WorkerClock::new();
    loop {
        let there = poll_fn(|context| {
            let Some(server) = server.upgrade() else {
                return Poll::Ready(false);
            };
            if !server.links.borrow().is_empty() {
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
        server.look_after();
    }
}
