//! The agent's side of a conversation with a mover. It blocks.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use backup::client::{Client, ClientError, Event, Tls};
//! # fn example(plan: &backup::plan::Plan, entries: Vec<backup::plan::Entry>) -> Result<(), ClientError> {
//! let tls = Tls { authorities: Some("/etc/sms/mover-ca.pem".as_ref()), name: None };
//! let stream = backup::client::connect("backup.example:10811", &tls, Duration::from_secs(60))?;
//! let mut client = Client::hello(stream, "the token", "sms-agent 0.1.0")?;
//! client.on_progress(|progress| eprintln!("{} entries", progress.entries));
//! let begun = client.begin(plan)?;
//! for entry in entries.iter().skip(usize::try_from(begun.entries).unwrap_or(usize::MAX)) {
//!     client.entry(entry)?;
//!     if entry.is_streamed() {
//!         client.content(0, b"bytes of the file")?;
//!         client.end_content(None)?;
//!     }
//! }
//! let made = client.finish()?;
//! println!("{}: {}", made.name, made.digest);
//! # Ok(())
//! # }
//! ```

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use access::{ClientTls, TlsError};
use api::Problem;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::frame::{FrameError, FrameReader, FrameWriter};
use crate::message::{
    BackupInfo, Begun, CONTENT, Hello, JSON, MAX_CONTENT, Progress, Reply, Request, Selection, VERSION,
    Welcome, content,
};
use crate::plan::{Content, Entry, Kind, MAX_BATCH, MAX_EXTENTS, Plan};

/// So many bytes of JSON are gathered before they are sent.
const BATCH_BYTES: usize = 1 << 20;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot reach the mover at {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The authorities cannot be used.
    #[error(transparent)]
    Authorities(#[from] TlsError),
    /// TLS cannot be begun.
    #[error("cannot begin TLS")]
    Tls(#[source] rustls::Error),
    /// The name cannot be one of a server.
    #[error("`{0}` is no name of a server")]
    Name(String),
    /// The mover refused, or failed.
    #[error(transparent)]
    Refused(Box<Problem>),
    /// The connection broke, or something came that is no frame.
    #[error("the connection to the mover broke")]
    Broken(#[from] FrameError),
    /// The mover said something that makes no sense here.
    #[error("the mover said something unexpected: {0}")]
    Unexpected(String),
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.into())
    }
}

/// Whom a client trusts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tls<'a> {
    /// The authorities of movers, or the mover's own certificate, in PEM format. Without it there is no TLS: only for a mover on the same
    /// host, or through a tunnel, as the token is not secret then.
    pub authorities: Option<&'a Path>,
    /// The name in the mover's certificate; the one in the address if none.
    pub name: Option<&'a str>,
}

/// A connection, with TLS or without.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Connects to `address`, which is `host:port`. No answer for `patience` is an error, now and later.
///
/// # Errors
/// Nobody is there, or it is not who it should be.
pub fn connect(address: &str, tls: &Tls<'_>, patience: Duration) -> Result<Box<dyn Stream>, ClientError> {
    connect_with(address, tls, patience, |_| ())
}

/// Like [`connect`]; `opened` is given the socket, for whoever wants to be able to shut it from elsewhere.
///
/// # Errors
/// See [`connect`].
pub fn connect_with(
    address: &str,
    tls: &Tls<'_>,
    patience: Duration,
    opened: impl FnOnce(&TcpStream),
) -> Result<Box<dyn Stream>, ClientError> {
    let failed = |source| ClientError::Connect {
        address: address.to_owned(),
        source,
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut connected = None;
    for socket in address.to_socket_addrs().map_err(failed)? {
        match TcpStream::connect_timeout(&socket, patience) {
            Ok(stream) => {
                connected = Some(stream);
                break;
            }
            Err(error) => last = error,
        }
    }
    let Some(stream) = connected else {
        return Err(failed(last));
    };
    opened(&stream);
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    stream.set_write_timeout(Some(patience)).map_err(failed)?;
    let Some(authorities) = tls.authorities else {
        return Ok(Box::new(stream));
    };
    let host = tls
        .name
        .unwrap_or_else(|| address.rsplit_once(':').map_or(address, |(host, _)| host));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).map_err(|_| ClientError::Name(host.to_owned()))?;
    let tls = ClientTls {
        authorities: authorities.to_owned(),
        certificate: None,
    };
    let connection = ClientConnection::new(tls.load()?, name);
    Ok(Box::new(TlsStream(StreamOwned::new(
        connection.map_err(ClientError::Tls)?,
        stream,
    ))))
}

/// A stream that says when it ends: the mover knows then that nothing was cut off.
struct TlsStream(StreamOwned<ClientConnection, TcpStream>);

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Drop for TlsStream {
    fn drop(&mut self) {
        self.0.conn.send_close_notify();
        // The mover may be gone.
        let _ = self.0.conn.write_tls(&mut self.0.sock);
    }
}

/// What comes in a restoration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An entry. Extents in it are of no meaning now.
    Entry(Box<Entry>),
    /// Some bytes of it; what is left out is a hole.
    Content {
        /// Where.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// That was the entry.
    EntryEnd {
        /// When the backup was made, it could not be read to its end, for this reason.
        problem: Option<String>,
    },
    /// That was all.
    End(Progress),
}

type OnProgress = Box<dyn FnMut(&Progress)>;

/// A conversation with a mover.
pub struct Client<S: Read + Write> {
    /// The frames that come.
    reader: FrameReader<S>,
    sent: u64,
    welcome: Welcome,
    batch: Vec<Entry>,
    batch_bytes: usize,
    entries: u64,
    /// The last entry is one whose content is being sent.
    streaming: bool,
    on_progress: Option<OnProgress>,
}

impl<S: Read + Write> Client<S> {
    /// Says who one is.
    ///
    /// # Errors
    /// The mover refuses the token or the version, or the connection breaks.
    pub fn hello(stream: S, token: &str, agent: &str) -> Result<Self, ClientError> {
        let mut client = Self {
            reader: FrameReader::new(stream, Some(0), Some(0)),
            sent: 0,
            welcome: Welcome {
                version: VERSION,
                mover: String::new(),
                principal: String::new(),
            },
            batch: Vec::new(),
            batch_bytes: 0,
            entries: 0,
            streaming: false,
            on_progress: None,
        };
        let hello = Hello {
            version: VERSION,
            token: token.to_owned(),
            agent: agent.to_owned(),
        };
        client.send(&Request::Hello(hello))?;
        match client.reply()? {
            Reply::Welcome(welcome) => client.welcome = welcome,
            other => return Err(unexpected(&other)),
        }
        Ok(client)
    }

    /// Whom the mover has recognised.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// `tell` is called when the mover says how far it is.
    pub fn on_progress(&mut self, tell: impl FnMut(&Progress) + 'static) {
        self.on_progress = Some(Box::new(tell));
    }

    /// The backups of this machine, complete or not, in the order in which their images were frozen.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all methods.
    pub fn list(&mut self) -> Result<Vec<BackupInfo>, ClientError> {
        self.send(&Request::List)?;
        match self.reply()? {
            Reply::Backups(list) => Ok(list),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins a backup, or goes on with one. Entries that are done already, by the answer, are not to be sent again.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn begin(&mut self, plan: &Plan) -> Result<Begun, ClientError> {
        self.send(&Request::Begin(Box::new(plan.clone())))?;
        match self.reply()? {
            Reply::Begun(begun) => {
                self.entries = begun.entries;
                self.batch.clear();
                self.batch_bytes = 0;
                self.streaming = false;
                Ok(begun)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// The next entry. They are gathered, and sent together. After one that is streamed come [`Self::content`] and
    /// [`Self::end_content`]. The content of an entry may have any number of extents; `more` in it is false.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn entry(&mut self, entry: &Entry) -> Result<(), ClientError> {
        if self.streaming {
            return Err(ClientError::Unexpected(
                "the content before this entry was not ended".into(),
            ));
        }
        self.entries += 1;
        if let Kind::File {
            size,
            content: Content::Extents { extents, .. },
        } = &entry.kind
            && extents.len() > MAX_EXTENTS
        {
            return self.fragmented(entry, *size, extents);
        }
        self.batch_bytes += estimate(entry);
        self.batch.push(entry.clone());
        if entry.is_streamed() {
            self.streaming = true;
            return self.send_batch();
        }
        match self.batch.len() >= MAX_BATCH / 4 || self.batch_bytes >= BATCH_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn fragmented(
        &mut self,
        entry: &Entry,
        size: u64,
        extents: &[crate::plan::Extent],
    ) -> Result<(), ClientError> {
        self.flush()?;
        let mut parts = extents.chunks(MAX_EXTENTS).peekable();
        let first = parts.next().unwrap_or_default().to_vec();
        let content = Content::Extents {
            extents: first,
            more: true,
        };
        let first = Entry {
            kind: Kind::File { size, content },
            ..entry.clone()
        };
        self.send(&Request::Entries(vec![first]))?;
        while let Some(part) = parts.next() {
            let more = parts.peek().is_some();
            let extents = part.to_vec();
            self.send(&Request::Extents { extents, more })?;
        }
        self.taken()
    }

    /// Sends the entries that were gathered, and waits until their content is in the archive.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.send_batch()?;
        self.taken()
    }

    fn send_batch(&mut self) -> Result<(), ClientError> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        self.send(&Request::Entries(batch))
    }

    fn taken(&mut self) -> Result<(), ClientError> {
        match self.reply()? {
            Reply::Taken(progress) => {
                self.tell(&progress);
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Bytes of the entry that is streamed, in ascending order. What is left out is a hole.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn content(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ClientError> {
        let mut offset = offset;
        for part in bytes.chunks(MAX_CONTENT) {
            self.write(CONTENT, &[&offset.to_le_bytes(), part])?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// That was the content; or the rest of it cannot be read, for the reason that is given.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn end_content(&mut self, problem: Option<String>) -> Result<(), ClientError> {
        self.streaming = false;
        self.send(&Request::ContentEnd { problem })?;
        self.taken()
    }

    /// All entries were given: the backup is complete and durable when this returns.
    ///
    /// # Errors
    /// See [`ClientError`]. Then there is no backup, but something that can be gone on with.
    pub fn finish(&mut self) -> Result<BackupInfo, ClientError> {
        self.flush()?;
        let entries = self.entries;
        self.send(&Request::Finish { entries })?;
        match self.reply()? {
            Reply::Finished(info) => Ok(*info),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives up the backup that was begun, and what there is of it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn abandon(&mut self) -> Result<(), ClientError> {
        self.send(&Request::Abandon)?;
        match self.reply()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the mover read a backup, and those that it needs, and check all checksums.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn verify(&mut self, name: &str) -> Result<Progress, ClientError> {
        let name = name.to_owned();
        self.send(&Request::Verify { name })?;
        match self.reply()? {
            Reply::Verified(progress) => Ok(progress),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the mover send a backup; [`Self::next_event`] gives what comes, until [`Event::End`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn restore(&mut self, selection: &Selection) -> Result<(), ClientError> {
        self.send(&Request::Restore(selection.clone()))
    }

    /// What comes next in a restoration.
    ///
    /// # Errors
    /// See [`ClientError`]. What has come before is not to be trusted further than the entries that have ended.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        let head = self.next_frame()?;
        if head == CONTENT {
            let (offset, bytes) = content(self.reader.payload())
                .ok_or_else(|| ClientError::Unexpected("content that makes no sense".into()))?;
            return Ok(Event::Content {
                offset,
                bytes: bytes.to_vec(),
            });
        }
        match self.decode(head)? {
            Reply::Working(progress) => {
                self.tell(&progress);
                self.next_event()
            }
            Reply::Entry(entry) => Ok(Event::Entry(entry)),
            Reply::EntryEnd { problem } => Ok(Event::EntryEnd { problem }),
            Reply::Restored(progress) => Ok(Event::End(progress)),
            Reply::Refused(problem) => Err(ClientError::Refused(problem)),
            other => Err(unexpected(&other)),
        }
    }

    fn tell(&mut self, progress: &Progress) {
        if let Some(tell) = &mut self.on_progress {
            tell(progress);
        }
    }

    /// The next reply that says more than that it takes longer.
    fn reply(&mut self) -> Result<Reply, ClientError> {
        loop {
            let kind = self.next_frame()?;
            match self.decode(kind)? {
                Reply::Working(progress) => self.tell(&progress),
                Reply::Refused(problem) => return Err(ClientError::Refused(problem)),
                other => return Ok(other),
            }
        }
    }

    fn next_frame(&mut self) -> Result<u16, ClientError> {
        match self.reader.read()? {
            Some(head) => Ok(head.kind),
            None => Err(FrameError::Truncated {
                number: self.reader.number(),
            }
            .into()),
        }
    }

    fn decode(&self, kind: u16) -> Result<Reply, ClientError> {
        if kind != JSON {
            return Err(ClientError::Unexpected(format!("a frame of kind {kind}")));
        }
        serde_json::from_slice(self.reader.payload())
            .map_err(|error| ClientError::Unexpected(error.to_string()))
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let json = serde_json::to_vec(request).map_err(io::Error::other)?;
        self.write(JSON, &[&json])
    }

    fn write(&mut self, kind: u16, parts: &[&[u8]]) -> Result<(), ClientError> {
        // One write for all of it: TLS would make a record of each part.
        let mut writer = FrameWriter::new(Vec::new(), 0, self.sent);
        writer.write(kind, parts)?;
        self.sent = writer.number();
        let frame = writer.into_inner();
        let stream = self.reader.get_mut();
        let written = stream.write_all(&frame).and_then(|()| stream.flush());
        match written {
            Ok(()) => Ok(()),
            Err(error) => Err(self.why(error)),
        }
    }

    /// A mover that refuses does not read what is still sent: why it refused is there to be read.
    fn why(&mut self, error: io::Error) -> ClientError {
        match self.reply() {
            Err(ClientError::Refused(problem)) => ClientError::Refused(problem),
            _ => error.into(),
        }
    }
}

impl<S: Read + Write> std::fmt::Debug for Client<S> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let welcome = &self.welcome;
        formatter
            .debug_struct("Client")
            .field("welcome", welcome)
            .finish_non_exhaustive()
    }
}

/// About how long an entry is in JSON.
fn estimate(entry: &Entry) -> usize {
    let xattrs: usize = entry
        .xattrs
        .iter()
        .map(|xattr| 32 + 4 * (xattr.name.0.len() + xattr.value.0.len()))
        .sum();
    let kind = match &entry.kind {
        Kind::File {
            content: Content::Extents { extents, .. },
            ..
        } => 96 * extents.len(),
        Kind::Symlink { target } => target.0.len(),
        Kind::HardLink { to } => to.0.len(),
        _ => 0,
    };
    256 + entry.path.0.len() + xattrs + kind
}

fn unexpected(reply: &Reply) -> ClientError {
    let mut text = format!("{reply:?}");
    text.truncate(text.floor_char_boundary(200));
    ClientError::Unexpected(text)
}
