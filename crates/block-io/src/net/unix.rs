//! The Unix sockets of servers: private from their first moment, never stolen from a living owner, gone with their owner.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::BACKLOG;

/// Why there is no socket at a path.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    /// Another process serves it.
    #[error("another process listens there")]
    Busy,
    /// Something else is there.
    #[error("it exists and is not a socket")]
    NotASocket,
    /// The operating system refused.
    #[error("cannot {action} it")]
    System {
        /// What was tried.
        action: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// The name of a socket in the file system, as long as it is ours: it is removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Makes a user the owner of the socket.
    ///
    /// # Errors
    /// Only root may.
    pub fn give_to(&self, user: u32) -> io::Result<()> {
        let user = rustix::process::Uid::from_raw(user);
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(
            rustix::fs::CWD,
            &self.path,
            Some(user),
            None,
            flags,
        )?)
    }

    /// Lets all users of the host connect.
    ///
    /// # Errors
    /// The mode cannot be changed.
    pub fn let_all_connect(&self) -> io::Result<()> {
        std::fs::set_permissions(&self.path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
    }
}

/// The supplementary groups that the process at the other end of a Unix socket had when it connected (`SO_PEERGROUPS`, Linux 4.13).
///
/// # Errors
/// It is no such socket, or the kernel does not know the question.
pub fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let socket = socket.as_fd().as_raw_fd();
    let mut groups = vec![0_u32; 64];
    loop {
        let mut length = libc::socklen_t::try_from(size_of_val(&*groups)).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: `groups` has room for `length` bytes, which is a valid place, too.
        let answer = unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
        if answer == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).map(|file| (file.dev(), file.ino()));
        if there.is_ok_and(|there| there == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
            // Who runs as a user of its own leaves that to who has started it.
            && error.kind() != io::ErrorKind::PermissionDenied
        {
            tracing::warn!(path = %self.path.display(), %error, "a socket cannot be removed");
        }
    }
}

/// Listens on `path`, for this user only (mode 0600), without blocking. A socket that a dead process left is replaced.
///
/// # Errors
/// Somebody else listens there, something else is there, or the system refuses.
pub fn listen_unix(path: &Path) -> Result<(UnixListener, SocketFile), UnixSocketError> {
    let system = |action| move |source| UnixSocketError::System { action, source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    // Two processes that find the same dead socket must not both replace it.
    let folder = fs::File::open(folder.unwrap_or(Path::new("."))).map_err(system("find the folder of"))?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive)
        .map_err(|error| system("lock the folder of")(error.into()))?;
    let listener = match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_dead(path)?;
            bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(system("create"))?;
    let file = fs::symlink_metadata(path).map_err(system("examine"))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (file.dev(), file.ino()),
    };
    Ok((listener, file))
}

/// A listening socket that nobody else can use, not even for a moment.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket, less the umask (unix(7) is silent, net/unix/af_unix.c is not).
    rustix::fs::fchmod(socket.as_fd(), Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket on which nobody listens.
fn remove_dead(path: &Path) -> Result<(), UnixSocketError> {
    let system = |action| move |source| UnixSocketError::System { action, source };
    let file = fs::symlink_metadata(path).map_err(system("examine"))?;
    if !file.file_type().is_socket() {
        return Err(UnixSocketError::NotASocket);
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that has ended");
            fs::remove_file(path).map_err(system("replace"))
        }
        // Also where its owner is too busy to accept, or we may not connect: it is somebody's.
        _ => Err(UnixSocketError::Busy),
    }
}
