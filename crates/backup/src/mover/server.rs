//! The server: one thread that accepts, one for each connection.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use access::{ClientCertificates, TlsError, TlsFiles, Versions};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::config::{MoverConfig, TlsConfig};
use super::session::{End, Patient, Reach, Served, serve};

/// What goes on when the mover is ended has so long to come to its next step.
const GRACE: Duration = Duration::from_secs(10);
/// Between two looks for connections.
const LOOK: Duration = Duration::from_millis(50);

/// A mover that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum MoverError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// Certificate and key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address cannot be had.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// It cannot be confined.
    #[error("cannot confine the mover")]
    Confine(#[source] io::Error),
}

/// A connection that has ended.
#[derive(Debug)]
pub struct Ended {
    /// From where it came.
    pub peer: SocketAddr,
    /// Who it was, if that is known.
    pub principal: Option<String>,
    /// What a person should know of how it was read.
    pub notes: Vec<String>,
    /// Why it ended, if not because the agent had done all that it wanted.
    pub reason: Option<String>,
}

/// A mover that serves agents until it is dropped.
#[derive(Debug)]
pub struct Mover {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Mover {
    /// Starts it. `reach` leads to the storage manager of a principal; `told` is called when a connection has ended.
    ///
    /// # Errors
    /// The configuration is impossible, or the address cannot be had.
    pub fn start(
        config: MoverConfig,
        reach: Reach,
        told: impl Fn(Ended) + Send + Sync + 'static,
    ) -> Result<Self, MoverError> {
        Self::start_confined(config, reach, told, || Ok(()))
    }

    /// The same, where `confine` is called by this thread when everything is open that is opened once, before there are others: the place for
    /// a sandbox.
    ///
    /// # Errors
    /// As [`Self::start`], or those of `confine`.
    pub fn start_confined(
        config: MoverConfig,
        reach: Reach,
        told: impl Fn(Ended) + Send + Sync + 'static,
        confine: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, MoverError> {
        config.check().map_err(MoverError::Config)?;
        let tls = config.tls.as_ref().map(load).transpose()?;
        let address = config.listen;
        let failed = |source| MoverError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        confine().map_err(MoverError::Confine)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let server = Server {
            tls,
            served: Served {
                config: Arc::new(config),
                reach,
                stopping: Arc::clone(&stopping),
            },
            told: Arc::new(told),
            connections: Arc::default(),
        };
        let accepting = thread::Builder::new()
            .name("mover".into())
            .spawn(move || server.run(&listener))
            .map_err(failed)?;
        Ok(Self {
            address,
            stopping,
            accepting: Some(accepting),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Mover {
    /// Ends what is going on at the next step; what there is of backups stays, to be gone on with.
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

struct Server {
    tls: Option<Arc<ServerConfig>>,
    served: Served,
    told: Arc<dyn Fn(Ended) + Send + Sync>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    fn run(&self, listener: &TcpListener) {
        let streams = Streams::default();
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !self.served.stopping.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, peer)) => match self.begin(stream, peer, &streams) {
                    Ok(thread) => threads.extend(thread),
                    Err(error) => (self.told)(Ended {
                        peer,
                        principal: None,
                        notes: Vec::new(),
                        reason: Some(error.to_string()),
                    }),
                },
                // Nobody is there, or there are no descriptors: either may change.
                Err(_) => thread::sleep(LOOK),
            }
            threads.retain(|thread| !thread.is_finished());
        }
        // Those who wait for a message would do so for long.
        for stream in streams.0.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }
        let end = Instant::now() + GRACE;
        while Instant::now() < end && threads.iter().any(|thread| !thread.is_finished()) {
            thread::sleep(LOOK);
        }
        // Nor for those who do not take what is sent.
        for stream in streams.0.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// None if there are too many.
    fn begin(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        streams: &Streams,
    ) -> io::Result<Option<JoinHandle<()>>> {
        if self.connections.load(Ordering::Relaxed) >= self.served.config.limits.connections {
            return Err(io::Error::other("there are as many connections as are allowed"));
        }
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let patience = Duration::from_secs(self.served.config.limits.patience);
        let number = streams.enter(stream.try_clone())?;
        self.connections.fetch_add(1, Ordering::Relaxed);
        let guard = Guard {
            connections: Arc::clone(&self.connections),
            streams: streams.clone(),
            number,
        };
        let timed = Timed {
            stream,
            patience,
            until: Instant::now() + patience,
        };
        let (served, tls, told) = (self.served.clone(), self.tls.clone(), Arc::clone(&self.told));
        let thread = thread::Builder::new().name("mover-agent".into()).spawn(move || {
            let (principal, notes, end) = match tls {
                None => serve(timed, &served),
                Some(tls) => match ServerConnection::new(tls) {
                    Ok(connection) => serve(StreamOwned::new(connection, timed), &served),
                    Err(error) => (None, Vec::new(), Err(End::from(io::Error::other(error)))),
                },
            };
            drop(guard);
            told(Ended {
                peer,
                principal,
                notes,
                reason: end.err().map(|end| crate::chain_of(&end)),
            });
        });
        thread.map(Some)
    }
}

/// The connections that there are.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<BTreeMap<u64, TcpStream>>>);

impl Streams {
    fn enter(&self, stream: io::Result<TcpStream>) -> io::Result<u64> {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = streams.last_key_value().map_or(0, |(last, _)| last + 1);
        streams.insert(number, stream?);
        Ok(number)
    }
}

/// A connection that is counted. Whatever happens, the other side hears that it is over.
struct Guard {
    connections: Arc<AtomicUsize>,
    streams: Streams,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut streams = self.streams.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.remove(&self.number) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection on which a frame must come, or be taken, whole in a time: one byte now and then does not help.
struct Timed {
    stream: TcpStream,
    patience: Duration,
    until: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the other side is too slow",
            )),
            false => Ok(left),
        }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Patient for Timed {
    fn begin_waiting(&mut self) {
        self.until = Instant::now() + self.patience;
    }

    fn is_gone(&self) -> bool {
        // A program that was killed leaves an end, or a reset; one that waits for an answer has said nothing. The other thread that has this
        // socket only shuts it.
        let looked = self
            .stream
            .set_nonblocking(true)
            .and_then(|()| self.stream.peek(&mut [0]));
        let blocking = self.stream.set_nonblocking(false);
        let waits = matches!(&looked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        blocking.is_err() || !(waits || matches!(looked, Ok(1..)))
    }
}

impl Patient for StreamOwned<ServerConnection, Timed> {
    fn begin_waiting(&mut self) {
        self.sock.begin_waiting();
    }

    fn is_gone(&self) -> bool {
        self.sock.is_gone()
    }
}

fn load(files: &TlsConfig) -> Result<Arc<ServerConfig>, MoverError> {
    let files = TlsFiles {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        client_authorities: None,
    };
    Ok(files.load(Versions::Tls13, ClientCertificates::Accepted)?)
}
