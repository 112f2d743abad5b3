//! Where a machine is managed: a socket of this host, or a gateway elsewhere.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use access::ClientTls;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::client::ClientError;

/// Longest time until a gateway has accepted, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// A machine behind a gateway ([`crate::Gateway`]).
#[derive(Debug, Clone)]
pub struct Remote {
    /// `HOST:PORT`; the host is also the name that the gateway's certificate must have.
    pub address: String,
    /// What of it is meant.
    pub scope: Scope,
    /// The gateway's authority, and the certificate of who asks if it has one.
    pub tls: ClientTls,
    /// The token of who asks, if it has one.
    pub token: Option<String>,
}

/// What of that which is managed at an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scope {
    /// All of it: the machine whose socket it is, or a whole host.
    #[default]
    All,
    /// A machine, by its name.
    Machine(String),
    /// A pool, by its name.
    Pool(String),
}

impl Scope {
    /// A path of the API as it is known where there is more than this.
    fn path(&self, path: &str) -> String {
        let (kind, name) = match self {
            Self::All => return path.to_owned(),
            Self::Machine(name) => ("vms", name),
            Self::Pool(name) => ("pools", name),
        };
        format!("/v1/{kind}/{name}{}", path.strip_prefix("/v1").unwrap_or(path))
    }
}

/// Where a machine or a host is managed.
#[derive(Debug, Clone)]
pub enum Target {
    /// A machine's own Unix socket.
    Socket(PathBuf),
    /// The Unix socket of a host's manager.
    Manager(PathBuf, Scope),
    /// A gateway.
    Remote(Box<Remote>),
}

impl Target {
    /// It is a machine, and not a host or a pool of one.
    pub fn is_machine(&self) -> bool {
        match self {
            Self::Socket(_) => true,
            Self::Manager(_, scope) => matches!(scope, Scope::Machine(_)),
            Self::Remote(remote) => matches!(remote.scope, Scope::Machine(_)),
        }
    }
}

impl From<&Path> for Target {
    fn from(path: &Path) -> Self {
        Self::Socket(path.to_owned())
    }
}

impl From<&PathBuf> for Target {
    fn from(path: &PathBuf) -> Self {
        Self::Socket(path.clone())
    }
}

impl From<PathBuf> for Target {
    fn from(path: PathBuf) -> Self {
        Self::Socket(path)
    }
}

/// A target with what is needed to connect to it, again and again.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    Socket(PathBuf, Scope),
    Remote {
        address: String,
        scope: Scope,
        name: ServerName<'static>,
        tls: Arc<ClientConfig>,
        token: Option<String>,
    },
}

impl Way {
    pub(crate) fn to(target: Target) -> Result<Self, ClientError> {
        match target {
            Target::Socket(path) => Ok(Self::Socket(path, Scope::All)),
            Target::Manager(path, scope) => Ok(Self::Socket(path, scope)),
            Target::Remote(remote) => {
                let Remote {
                    address,
                    scope,
                    tls,
                    token,
                } = *remote;
                let host = address
                    .rsplit_once(':')
                    .map(|(host, _)| host.trim_matches(['[', ']']));
                let name = host.and_then(|host| ServerName::try_from(host.to_owned()).ok());
                let name = name.ok_or_else(|| ClientError::Address(address.clone()))?;
                Ok(Self::Remote {
                    tls: tls.load().map_err(ClientError::Tls)?,
                    address,
                    scope,
                    name,
                    token,
                })
            }
        }
    }

    /// The same way to something else there.
    pub(crate) fn of(&self, wanted: Scope) -> Self {
        let mut way = self.clone();
        let (Self::Socket(_, scope) | Self::Remote { scope, .. }) = &mut way;
        *scope = wanted;
        way
    }

    /// A path as the other side knows it.
    pub(crate) fn path(&self, path: &str) -> String {
        match self {
            Self::Socket(_, scope) | Self::Remote { scope, .. } => scope.path(path),
        }
    }

    pub(crate) fn token(&self) -> Option<&str> {
        match self {
            Self::Socket(..) => None,
            Self::Remote { token, .. } => token.as_deref(),
        }
    }

    pub(crate) async fn connect(&self) -> Result<Connection, ClientError> {
        match self {
            Self::Socket(path, _) => {
                let stream = UnixStream::connect(path).await;
                let stream = stream.map_err(|source| ClientError::Connect {
                    path: path.clone(),
                    source,
                })?;
                Ok(Connection::Unix(stream))
            }
            Self::Remote {
                address, name, tls, ..
            } => {
                let failed = |source| ClientError::Gateway {
                    address: address.clone(),
                    source,
                };
                let connect = async {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    TlsConnector::from(Arc::clone(tls))
                        .connect(name.clone(), stream)
                        .await
                };
                match timeout(CONNECT_TIMEOUT, connect).await {
                    Ok(connected) => connected
                        .map(|stream| Connection::Tls(Box::new(stream)))
                        .map_err(failed),
                    Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
                }
            }
        }
    }
}

/// A connection to a target.
pub(crate) enum Connection {
    Unix(UnixStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

macro_rules! either {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Connection::Unix($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Connection::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(context))
    }
}
