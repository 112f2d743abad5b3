//! Where an export is: the NBD URIs `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, and how to get there.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

/// The address of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdAddress {
    /// How to reach the server.
    pub server: NbdServer,
    /// The export's name; empty is the server's default.
    pub export: String,
}

/// How to reach a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdServer {
    /// A name or address, and a port. A name is looked up whenever a connection is made.
    Tcp {
        /// Name or address, an IPv6 address without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// An address that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is no NBD address: {reason}; write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
)]
pub struct NbdAddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for NbdAddress {
    type Err = NbdAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|reason| NbdAddressError {
            text: text.to_owned(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<NbdAddress, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(export)?;
    if export.len() > super::proto::LONGEST_TEXT {
        return Err("the export's name is longer than 4096 bytes");
    }
    let server = match scheme {
        "nbd" if query.is_some() => return Err("nbd:// takes no parameters"),
        "nbd" => tcp(authority)?,
        "nbd+unix" if !authority.is_empty() => return Err("nbd+unix:// is followed by a third slash"),
        "nbd+unix" => unix(query.unwrap_or_default())?,
        "nbds" | "nbds+unix" => return Err("TLS is not supported"),
        _ => return Err("the scheme is neither nbd nor nbd+unix"),
    };
    Ok(NbdAddress { server, export })
}

fn tcp(authority: &str) -> Result<NbdServer, &'static str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")))
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, Some("")),
        },
    };
    let port = match port.ok_or("a colon is missing before the port")? {
        "" => PORT,
        port => port.parse().map_err(|_| "the port is no number up to 65535")?,
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    Ok(NbdServer::Tcp {
        host: decode(host)?,
        port,
    })
}

fn unix(query: &str) -> Result<NbdServer, &'static str> {
    let mut path = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            Some(("socket", value)) if path.is_none() => path = Some(decode(value)?),
            _ => return Err("the one parameter is socket=PATH"),
        }
    }
    match path {
        Some(path) if !path.is_empty() => Ok(NbdServer::Unix(path.into())),
        _ => Err("the parameter socket=PATH is missing"),
    }
}

/// Replaces `%41` and the like.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err("a % is not followed by two hexadecimal digits");
        };
        bytes.push(u8::try_from(high * 16 + low).unwrap_or(u8::MAX));
    }
    if bytes.contains(&0) {
        return Err("it contains a zero byte");
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

fn encode(text: &str, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                write!(formatter, "{}", char::from(byte))?;
            }
            _ => write!(formatter, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            NbdServer::Tcp { host, port } => {
                if host.contains(':') {
                    write!(formatter, "nbd://[{host}]")?;
                } else {
                    write!(formatter, "nbd://{host}")?;
                }
                if *port != PORT {
                    write!(formatter, ":{port}")?;
                }
                formatter.write_str("/")?;
                encode(&self.export, formatter)
            }
            NbdServer::Unix(path) => {
                formatter.write_str("nbd+unix:///")?;
                encode(&self.export, formatter)?;
                formatter.write_str("?socket=")?;
                encode(&path.to_string_lossy(), formatter)
            }
        }
    }
}

impl NbdServer {
    /// A connected socket that does not block. Blocks for at most about `patience` for each address of the host, but for the
    /// name look-up, which has limits of its own.
    pub(super) fn connect(&self, patience: Duration) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp { host, port } => {
                let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host's name has no address");
                for address in (host.as_str(), *port).to_socket_addrs()?.take(8) {
                    match connect_tcp(&address, patience) {
                        Ok(socket) => return Ok(socket),
                        Err(error) => failure = error,
                    }
                }
                Err(failure)
            }
            Self::Unix(path) => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                // Connects at once, or fails with EAGAIN if the server's queue is full.
                connect(&socket, &SocketAddrUnix::new(path)?)?;
                Ok(socket)
            }
        }
    }
}

fn connect_tcp(address: &SocketAddr, patience: Duration) -> io::Result<OwnedFd> {
    let stream = TcpStream::connect_timeout(address, patience)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    sockopt::set_socket_keepalive(stream.as_fd(), true)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_and_shown_as_they_were_written() {
        for text in [
            "nbd://storage.example/",
            "nbd://10.0.0.1:10810/disk%201",
            "nbd://[fe80::1]:99/a/b",
            "nbd+unix:///?socket=/run/nbd.sock",
            "nbd+unix:///disk?socket=/tmp/a%3Fb",
        ] {
            let address: NbdAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        let address: NbdAddress = "nbd://host".parse().unwrap();
        assert_eq!(address.to_string(), "nbd://host/");
        let address: NbdAddress = "nbd+unix:///disk?socket=/tmp/a%3Fb".parse().unwrap();
        assert_eq!(address.export, "disk");
        assert_eq!(address.server, NbdServer::Unix("/tmp/a?b".into()));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, reason) in [
            ("/dev/nbd0", "no scheme"),
            ("nbd:///export", "host is missing"),
            ("nbd://host:70000/", "port"),
            ("nbd://[::1/", "bracket"),
            ("nbd://[::1]99/", "colon"),
            ("nbd://host/?socket=/a", "no parameters"),
            ("nbds://host/", "TLS"),
            ("http://host/", "scheme"),
            ("nbd+unix://host/?socket=/a", "third slash"),
            ("nbd+unix:///export", "socket=PATH is missing"),
            ("nbd+unix:///?socket=/a&socket=/b", "one parameter"),
            ("nbd://host/%4", "hexadecimal"),
            ("nbd://host/%00", "zero byte"),
            ("nbd://host/%ff", "UTF-8"),
        ] {
            let error = text.parse::<NbdAddress>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
