//! What a network card is connected to.
//!
//! A backend is opened once, before the guest starts, so that what cannot work is said before anything runs. It outlives
//! every reset and reboot of the guest: a device is built on an `Arc` of it and may be dropped and built again.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use api::MacAddress;

use super::launcher::Launcher;
use super::passt::{Passt, PasstOptions};
use super::port::Port;
use super::protocol::feature;
use super::stream::StreamPort;
use super::tap::Tap;

/// Why a network card's backend cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel has no tun driver here.
    #[error(
        "/dev/net/tun does not exist here; load the driver with `modprobe tun`, or give the container that device"
    )]
    TunAbsent {
        /// The operating system's answer.
        source: io::Error,
    },
    /// The tun device is closed to this user.
    #[error("no permission to open /dev/net/tun; its mode should be 0666: `chmod 666 /dev/net/tun`")]
    TunPermission {
        /// The operating system's answer.
        source: io::Error,
    },
    /// A name that no interface can have.
    #[error(
        "{name:?} cannot be the name of a tap interface; names have 1 to 15 characters, without `/`, `%` and spaces"
    )]
    TapName {
        /// As configured.
        name: String,
    },
    /// The interface does not exist.
    #[error(
        "there is no network interface {name}; make it with \
         `ip tuntap add dev {name} mode tap{multi_queue} user \"$USER\" && ip link set {name} up` as root"
    )]
    TapAbsent {
        /// Of the interface.
        name: String,
        /// A further argument for the command that makes it.
        multi_queue: &'static str,
    },
    /// Another process has the interface open.
    #[error("tap interface {name} is busy: another process uses it; `fuser -v /dev/net/tun` shows which do")]
    TapBusy {
        /// Of the interface.
        name: String,
    },
    /// The interface belongs to another user.
    #[error(
        "tap interface {name} belongs to another user; make it again with \
         `ip tuntap add dev {name} mode tap user NAME`, where NAME is who runs this"
    )]
    TapPermission {
        /// Of the interface.
        name: String,
    },
    /// Several queues were asked of an interface that has one, or the other way round.
    #[error(
        "tap interface {name} was not made for several queues; set `queues = 1`, or make it again with \
         `ip tuntap add dev {name} mode tap multi_queue`"
    )]
    TapQueues {
        /// Of the interface.
        name: String,
    },
    /// An interface of another kind.
    #[error("network interface {name} is not a tap interface, or not one for several queues")]
    NotATap {
        /// Of the interface.
        name: String,
    },
    /// Anything else about a tap interface.
    #[error("tap interface {name}: cannot {action}")]
    Tap {
        /// Of the interface.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The program of user-mode networking is not installed.
    #[error("user-mode networking needs the program {program}, which is not here; `apt install passt`")]
    PasstAbsent {
        /// Name or path.
        program: String,
    },
    /// The program ended at once.
    #[error("{program} ended at once ({status}); it says: {output}")]
    PasstFailed {
        /// Name or path.
        program: String,
        /// How it ended.
        status: String,
        /// What it wrote.
        output: String,
    },
    /// It could not be started.
    #[error("user-mode networking: cannot {action}")]
    Passt {
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The helper could not start it; its words.
    #[error("{0}")]
    Launcher(String),
    /// Settings that contradict each other or the backend.
    #[error("network card: {0}")]
    Options(String),
}

/// The host's side of a network card.
pub struct NetBackend {
    name: String,
    /// One per queue pair. The worker of the pair holds the lock while it runs; a worker that starts waits for the one before
    /// it to end.
    ports: Vec<Mutex<Port>>,
    /// Behind the ports, because passt ends by itself when its socket closes; it may not be allowed to be killed.
    kind: Kind,
    link_up: AtomicBool,
    mtu: Option<u16>,
    /// The card on it, for messages.
    card: OnceLock<String>,
}

enum Kind {
    Tap(Tap),
    Passt(Passt),
    Stream,
}

impl fmt::Debug for NetBackend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("NetBackend")
            .field("name", &self.name)
            .field("queue_pairs", &self.queue_pairs())
            .field("link_up", &self.link_up())
            .finish_non_exhaustive()
    }
}

impl NetBackend {
    /// The most queue pairs that a card may have: 8 threads serve any link that a guest of ours can fill.
    pub const MAX_QUEUE_PAIRS: u16 = 8;

    /// Opens what `config` says, for a card with address `mac`.
    ///
    /// # Errors
    /// The backend cannot be used; the message says what to do.
    pub fn open(config: &api::NetConfig, mac: MacAddress) -> Result<Arc<Self>, NetError> {
        match (config.backend, &config.tap) {
            (api::NetBackend::Tap, Some(name)) => Self::open_tap(name.as_str(), u16::from(config.queues)),
            (api::NetBackend::Tap, None) => Err(NetError::Options("a tap interface needs a name".into())),
            (api::NetBackend::User, _) if config.queues > 1 => Err(NetError::Options(format!(
                "user-mode networking has one queue pair, not {}; remove `queues`",
                config.queues
            ))),
            (api::NetBackend::User, _) => Self::start_passt(&PasstOptions {
                forward: config.forward.clone(),
                mtu: config.mtu,
                ..PasstOptions::new(mac)
            }),
        }
    }

    /// Opens the tap interface `name`, which exists already, with `queue_pairs` queues.
    ///
    /// # Errors
    /// The interface cannot be used; the message says what to do.
    pub fn open_tap(name: &str, queue_pairs: u16) -> Result<Arc<Self>, NetError> {
        if !(1..=Self::MAX_QUEUE_PAIRS).contains(&queue_pairs) {
            return Err(NetError::Options(format!(
                "{queue_pairs} queues were asked for tap interface {name}, 1 to {} are possible",
                Self::MAX_QUEUE_PAIRS
            )));
        }
        let tap = Tap::open(name, queue_pairs)?;
        Ok(Arc::new(Self {
            name: format!("tap interface {name}"),
            ports: tap
                .ports()
                .into_iter()
                .map(|port| Mutex::new(Port::Tap(port)))
                .collect(),
            link_up: AtomicBool::new(true),
            card: OnceLock::new(),
            mtu: tap.mtu(),
            kind: Kind::Tap(tap),
        }))
    }

    /// Starts `passt` for user-mode networking, which needs no privilege, and waits until it works: some 15 ms.
    ///
    /// # Errors
    /// The program is not installed or ends at once; the message says what to do.
    pub fn start_passt(options: &PasstOptions) -> Result<Arc<Self>, NetError> {
        let (passt, socket) = Passt::start(options)?;
        Self::passt(passt, socket, options)
    }

    /// As [`Self::start_passt`], for a process in a sandbox: has `launcher` start it.
    ///
    /// # Errors
    /// As there, or the launcher is gone.
    pub fn launch_passt(launcher: &Launcher, options: &PasstOptions) -> Result<Arc<Self>, NetError> {
        let (passt, socket) = launcher.passt(options)?;
        Self::passt(passt, socket, options)
    }

    fn passt(passt: Passt, socket: UnixStream, options: &PasstOptions) -> Result<Arc<Self>, NetError> {
        let port = StreamPort::new(socket).map_err(|source| NetError::Passt {
            action: "prepare its socket",
            source,
        })?;
        Ok(Arc::new(Self {
            name: "user-mode networking (passt)".into(),
            kind: Kind::Passt(passt),
            ports: vec![Mutex::new(Port::Stream(port))],
            link_up: AtomicBool::new(true),
            card: OnceLock::new(),
            mtu: options.mtu,
        }))
    }

    /// Uses a connected stream socket that carries frames, each preceded by its length in four bytes, most significant first.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn stream(name: &str, socket: UnixStream) -> Result<Arc<Self>, NetError> {
        let port = StreamPort::new(socket)
            .map_err(|source| NetError::Options(format!("socket {name} cannot be prepared: {source}")))?;
        Ok(Arc::new(Self {
            name: format!("socket {name}"),
            kind: Kind::Stream,
            ports: vec![Mutex::new(Port::Stream(port))],
            link_up: AtomicBool::new(true),
            card: OnceLock::new(),
            mtu: None,
        }))
    }

    /// What the backend is, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says which card is on it; the first one counts, another after a reboot has the same name.
    pub(super) fn serves(&self, card: &str) {
        let _ = self.card.set(card.to_owned());
    }

    /// Queue pairs that the backend has.
    pub fn queue_pairs(&self) -> usize {
        self.ports.len()
    }

    /// The MTU that the network behind it has, where it is not 1500.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Whether packets still go through. Once down it stays down: the interface was deleted or the peer is gone.
    pub fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// Features that this backend makes possible.
    pub(super) fn features(&self) -> u64 {
        match &self.kind {
            Kind::Tap(tap) => tap.features(),
            // passt of Debian 12 has no virtio header: whole frames with good checksums, both ways.
            Kind::Passt(_) | Kind::Stream => 0,
        }
    }

    /// The port of queue pair `pair`, as soon as nobody else has it.
    pub(super) fn port(&self, pair: usize) -> Option<MutexGuard<'_, Port>> {
        Some(
            self.ports
                .get(pair)?
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Lets the backend leave work to the driver, by `GUEST_*` feature bits.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.ask_tap(|tap| tap.set_offloads(features & feature::GUEST_OFFLOADS))
    }

    /// Spreads received packets over the first `pairs` queue pairs.
    pub(super) fn set_active_pairs(&self, pairs: usize) -> io::Result<()> {
        self.ask_tap(|tap| tap.set_active_pairs(pairs))
    }

    /// Asks something of a tap interface. One that was deleted agrees to all: no packet comes or goes whatever is set, and a
    /// driver that gets no answer may wait for one with a processor of the guest (Linux 6.1 does).
    fn ask_tap(&self, ask: impl FnOnce(&Tap) -> io::Result<()>) -> io::Result<()> {
        let Kind::Tap(tap) = &self.kind else {
            return Ok(());
        };
        match ask(tap) {
            Err(error) if tap.is_deleted() => {
                self.set_closed(&format!("it was deleted: {error}"));
                Ok(())
            }
            result => result,
        }
    }

    /// Notes that the backend is of no use any more, and says so once.
    pub(super) fn set_closed(&self, reason: &str) {
        if self.link_up.swap(false, Ordering::Relaxed) {
            let output = match &self.kind {
                Kind::Passt(passt) => passt.output(),
                Kind::Tap(_) | Kind::Stream => String::new(),
            };
            tracing::warn!(
                device = self.card.get().map_or("", String::as_str),
                backend = self.name,
                reason,
                output,
                "a network card lost its link"
            );
        }
    }

    /// The name of the tap interface, if it is one.
    pub fn tap_name(&self) -> Option<&str> {
        match &self.kind {
            Kind::Tap(tap) => Some(tap.name()),
            Kind::Passt(_) | Kind::Stream => None,
        }
    }

    /// The process that does the networking, if it is one.
    pub fn process_id(&self) -> Option<u32> {
        match &self.kind {
            Kind::Passt(passt) => Some(passt.process_id()),
            Kind::Tap(_) | Kind::Stream => None,
        }
    }
}
