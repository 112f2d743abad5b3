//! A pseudo-terminal for a console: our end is the master, clients open the other end by its path.
//!
//! Clients come and go. The kernel says "hung up" at the master while nobody has the other end open, so it cannot be polled
//! then; who opens the other end is seen by watching its device file.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::fs::inotify::{CreateFlags, WatchFlags};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{QueueSelector, tcflush};

use super::{ConsoleError, terminal};

/// The master's side.
pub(super) struct PtyWatch {
    /// The source that reads the master.
    pub(super) source: u32,
    /// For writing to the clients.
    pub(super) writer: Arc<OwnedFd>,
    watch: Watch,
    present: bool,
}

/// How it is known whether there is a client.
enum Watch {
    /// The device file is watched.
    Inotify(OwnedFd),
    /// The host does not allow that: the other end is kept open, and a client assumed.
    Kept { _other_end: OwnedFd },
}

/// A new pseudo-terminal.
pub(super) struct Pty {
    pub(super) master: OwnedFd,
    /// Path of the other end.
    pub(super) path: PathBuf,
    other_end: OwnedFd,
}

/// A symbolic link to a pseudo-terminal; removed when dropped, if it is still ours.
#[derive(Debug)]
pub(super) struct Link {
    link: PathBuf,
    target: PathBuf,
}

impl Pty {
    pub(super) fn open() -> Result<Self, ConsoleError> {
        let failed = |action| move |source: io::Error| ConsoleError::System { action, source };
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)
            .and_then(|master| {
                // The description is ours alone.
                rustix::fs::fcntl_setfl(&master, OFlags::NONBLOCK)?;
                grantpt(&master)?;
                unlockpt(&master)?;
                Ok(master)
            })
            .map_err(|errno| failed("open a pseudo-terminal")(errno.into()))?;
        let path = ptsname(&master, Vec::new())
            .map_err(|errno| failed("find the name of a pseudo-terminal")(errno.into()))?;
        let other_end = ioctl_tiocgptpeer(&master, flags)
            .map_err(|errno| failed("open the other end of a pseudo-terminal")(errno.into()))?;
        terminal::make_raw(other_end.as_fd()).map_err(failed("configure a pseudo-terminal"))?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.into_bytes()));
        Ok(Self {
            master,
            path,
            other_end,
        })
    }
}

impl PtyWatch {
    /// Watches for clients of `pty`; `source` is the source that reads the master.
    pub(super) fn new(source: u32, pty: Pty) -> Result<(Self, OwnedFd), ConsoleError> {
        let Pty {
            master,
            path,
            other_end,
        } = pty;
        let writer = master.try_clone().map_err(|source| ConsoleError::System {
            action: "duplicate a pseudo-terminal",
            source,
        })?;
        let watch = match watch_file(&path) {
            // Closing our other end is what makes the master say "hung up" while there is no client.
            Ok(watch) => Watch::Inotify(watch),
            Err(error) => {
                let path = path.display();
                tracing::debug!(%path, %error, "cannot watch for clients of the pseudo-terminal");
                Watch::Kept {
                    _other_end: other_end,
                }
            }
        };
        let present = matches!(watch, Watch::Kept { .. });
        let writer = Arc::new(writer);
        Ok((
            Self {
                source,
                writer,
                watch,
                present,
            },
            master,
        ))
    }

    /// What becomes readable when clients come or go.
    pub(super) fn poll_fd(&self) -> Option<RawFd> {
        match &self.watch {
            Watch::Inotify(watch) => Some(watch.as_raw_fd()),
            Watch::Kept { .. } => None,
        }
    }

    /// Whether there is a client, as of the last look.
    pub(super) fn has_client(&self) -> bool {
        self.present
    }

    /// Finds out whether there is a client.
    pub(super) fn look(&mut self) {
        let Watch::Inotify(watch) = &self.watch else {
            return;
        };
        // The events say only that something happened: equal ones are merged.
        let mut events = [MaybeUninit::uninit(); 1024];
        while rustix::io::read(watch, &mut events).is_ok_and(|(read, _)| !read.is_empty()) {}
        let mut fds = [PollFd::new(&*self.writer, PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let polled = poll(&mut fds, Some(&now));
        self.present = polled.is_ok() && !fds[0].revents().contains(PollFlags::HUP);
    }

    /// Discards what the last client has not read: the next one is shown the history.
    pub(super) fn discard_unread(&self) {
        if let Err(errno) = tcflush(&*self.writer, QueueSelector::OFlush) {
            tracing::debug!(%errno, "cannot discard old output of a pseudo-terminal");
        }
    }
}

fn watch_file(path: &Path) -> io::Result<OwnedFd> {
    let watch = rustix::fs::inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let events = WatchFlags::OPEN | WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE;
    rustix::fs::inotify::add_watch(&watch, path, events)?;
    Ok(watch)
}

impl Link {
    /// Makes `link` point to `target`. An older symbolic link is replaced, nothing else.
    pub(super) fn new(link: &Path, target: &Path) -> Result<Self, ConsoleError> {
        let failed = |action| {
            move |source| ConsoleError::Path {
                action,
                path: link.to_owned(),
                source,
            }
        };
        if let Ok(metadata) = link.symlink_metadata() {
            if !metadata.file_type().is_symlink() {
                return Err(ConsoleError::Exists {
                    path: link.to_owned(),
                    kind: "symbolic link",
                });
            }
            std::fs::remove_file(link).map_err(failed("replace the symbolic link"))?;
        }
        std::os::unix::fs::symlink(target, link).map_err(failed("make the symbolic link"))?;
        Ok(Self {
            link: link.to_owned(),
            target: target.to_owned(),
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let ours = std::fs::read_link(&self.link).is_ok_and(|target| target == self.target);
        if ours && let Err(error) = std::fs::remove_file(&self.link) {
            tracing::debug!(link = %self.link.display(), %error, "a console's link stays behind");
        }
    }
}
