//! A server that says what a test wants.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::SendFlags;
use storage_virtualizer::vhost_user::message::{
    F_PROTOCOL_FEATURES, Header, InflightArea, config, protocol_feature, request,
};
use storage_virtualizer::vhost_user::socket::{receive, send};
use storage_virtualizer::virtio_blk::blk_feature;
use virtio_core::feature;

/// What the server does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// What it should.
    Obey,
    /// It hangs up.
    Close,
    /// Nothing, for ever.
    Silence,
    /// It says that it did not obey.
    Refuse,
    /// It answers another question.
    Mistake,
    /// It answers with bytes that are no message.
    Rubbish,
    /// It answers half, and no more.
    Half,
    /// It answers with a body of no use.
    Empty,
}

/// What kind of server it is.
#[derive(Clone)]
pub(crate) struct Character {
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) queues: u64,
    pub(crate) sectors: u64,
    pub(crate) act: Arc<dyn Fn(u32) -> Act + Send + Sync>,
}

impl Default for Character {
    fn default() -> Self {
        Self {
            features: feature::VERSION_1 | F_PROTOCOL_FEATURES | blk_feature::FLUSH | feature::RING_EVENT_IDX,
            protocol: protocol_feature::MQ
                | protocol_feature::REPLY_ACK
                | protocol_feature::BACKEND_REQ
                | protocol_feature::CONFIG
                | protocol_feature::INFLIGHT_SHMFD
                | protocol_feature::RESET_DEVICE,
            queues: 4,
            sectors: 2048,
            act: Arc::new(|_| Act::Obey),
        }
    }
}

impl Character {
    pub(crate) fn that(act: impl Fn(u32) -> Act + Send + Sync + 'static) -> Self {
        Self {
            act: Arc::new(act),
            ..Self::default()
        }
    }
}

/// A message as it came.
pub(crate) struct Heard {
    pub(crate) request: u32,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A server that runs until it is dropped; what is connected stays so until it hangs up itself.
pub(crate) struct Fake {
    pub(crate) path: PathBuf,
    pub(crate) heard: Arc<Mutex<Vec<Heard>>>,
    /// The latest connection.
    pub(crate) connection: Arc<Mutex<Option<UnixStream>>>,
    pub(crate) character: Arc<Mutex<Character>>,
    _folder: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn start(character: Character) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fake.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let fake = Self {
            path,
            heard: Arc::default(),
            connection: Arc::default(),
            character: Arc::new(Mutex::new(character)),
            _folder: folder,
        };
        let (heard, connection, character) = (
            fake.heard.clone(),
            fake.connection.clone(),
            fake.character.clone(),
        );
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                *connection.lock().unwrap() = Some(socket.try_clone().unwrap());
                let (heard, character) = (heard.clone(), character.lock().unwrap().clone());
                thread::spawn(move || serve(&socket, &heard, &character));
            }
        });
        fake
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn count(&self, request: u32) -> usize {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|heard| heard.request == request).count()
    }

    /// The descriptor that came last with `request`.
    pub(crate) fn descriptor(&self, request: u32) -> OwnedFd {
        let heard = self.heard.lock().unwrap();
        let last = heard.iter().rev().find(|heard| heard.request == request).unwrap();
        last.fds[0].try_clone().unwrap()
    }

    /// Ends the latest connection.
    pub(crate) fn hang_up(&self) {
        let connection = self.connection.lock().unwrap().take().unwrap();
        connection.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

/// Sends something on a connection.
pub(crate) fn say(socket: impl AsFd, request: u32, needs_reply: bool) {
    let header = Header {
        request,
        is_reply: false,
        needs_reply,
        size: 0,
    };
    send(socket, header, &[], &[], SendFlags::empty()).unwrap();
}

fn serve(socket: &UnixStream, heard: &Mutex<Vec<Heard>>, character: &Character) {
    while let Ok(received) = receive(socket) {
        let header = received.header;
        let (kind, body) = (header.request, received.body.clone());
        heard.lock().unwrap().push(Heard {
            request: kind,
            body: received.body,
            fds: received.fds,
        });
        let reply = Header {
            is_reply: true,
            needs_reply: false,
            ..header
        };
        let (mut answer, mut file) = (answer_to(kind, &body, character), None);
        if kind == request::GET_INFLIGHT_FD {
            let memory = memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&memory, 1 << 20).unwrap();
            file = Some(memory);
        }
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        let say = |header, body: &[u8]| send(socket, header, body, &fds, SendFlags::empty());
        let told = match (character.act)(kind) {
            Act::Obey => match (&mut answer, header.needs_reply) {
                (Some(answer), _) => say(reply, answer),
                (None, true) => say(reply, &[0; 8]),
                (None, false) => Ok(()),
            },
            Act::Refuse => say(reply, &1_u64.to_le_bytes()),
            Act::Silence => Ok(()),
            Act::Close => {
                socket.shutdown(std::net::Shutdown::Both).unwrap();
                return;
            }
            Act::Mistake => say(
                Header {
                    request: kind + 1,
                    ..reply
                },
                &[0; 8],
            ),
            Act::Rubbish => rustix::net::send(socket, &[0xaa; 64], SendFlags::NOSIGNAL)
                .map(drop)
                .map_err(Into::into),
            Act::Half => rustix::net::send(socket, &[1, 0, 0, 0, 5], SendFlags::NOSIGNAL)
                .map(drop)
                .map_err(Into::into),
            Act::Empty => say(reply, &[]),
        };
        if told.is_err() {
            return;
        }
    }
}

fn answer_to(kind: u32, body: &[u8], character: &Character) -> Option<Vec<u8>> {
    let number = |number: u64| Some(number.to_le_bytes().to_vec());
    match kind {
        request::GET_FEATURES => number(character.features),
        request::GET_PROTOCOL_FEATURES => number(character.protocol),
        request::GET_QUEUE_NUM => number(character.queues),
        request::GET_CONFIG => {
            let mut space = vec![0; body.len() - 12];
            space[..8].copy_from_slice(&character.sectors.to_le_bytes());
            Some(config(0, &space))
        }
        request::GET_VRING_BASE => Some(body.to_vec()),
        request::GET_INFLIGHT_FD => {
            let area = InflightArea {
                size: 1 << 20,
                offset: 0,
                queues: 1,
                entries: 64,
            };
            Some(area.encode_padded().to_vec())
        }
        _ => None,
    }
}
