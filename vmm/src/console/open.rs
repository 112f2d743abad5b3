//! Opens consoles as configured.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use event_manager::MutEventSubscriber;

use super::doorbell::Doorbell;
use super::escape::EscapeFilter;
use super::history::History;
use super::listener::{Listener, SocketFile};
use super::pty::{Link, Pty, PtyWatch};
use super::service::Service;
use super::source::{ReadMode, Source};
use super::{CLOSE_TIMEOUT, CommandHandler, ConsoleError, ConsoleHandle, HISTORY_LIMIT, stdio, terminal};
use crate::config::ConsoleSpec;

/// What belongs to a console apart from where it leads.
pub struct ConsoleOptions {
    /// For logs, for example `serial`.
    pub name: String,
    /// The control character by which a person at a terminal gets the VMM's attention; none: all goes to the guest.
    pub escape: Option<u8>,
    /// Who carries out what the person wants.
    pub commands: CommandHandler,
}

/// An open console. Dropping it writes what is pending (for at most one second), restores the terminal and removes the
/// socket or the link; its handles lead nowhere then.
pub struct Console {
    handle: ConsoleHandle,
    service: Option<Service>,
    path: Option<PathBuf>,
    is_terminal: bool,
    link: Option<Link>,
    socket: Option<SocketFile>,
}

impl Console {
    /// Opens the console that `spec` describes.
    ///
    /// # Errors
    /// The file, socket, pseudo-terminal or terminal cannot be used. Nothing has been changed then.
    pub fn open(spec: &ConsoleSpec, options: ConsoleOptions) -> Result<Self, ConsoleError> {
        match spec {
            ConsoleSpec::Null => Ok(Self::null()),
            ConsoleSpec::Stdio => Self::stdio(options),
            ConsoleSpec::Pty(link) => Self::pty(link.as_deref(), options),
            ConsoleSpec::File(path) => Self::file(path, options),
            ConsoleSpec::Socket(path) => Self::socket(path, options),
        }
    }

    /// The way to the console for a device.
    pub fn handle(&self) -> ConsoleHandle {
        self.handle.clone()
    }

    /// The part that belongs on the main loop. There is one, so the second call gives `None`, as for a null console.
    pub fn take_subscriber(&mut self) -> Option<Box<dyn MutEventSubscriber + Send>> {
        let service = self.service.take()?;
        Some(Box::new(service))
    }

    /// Where clients find it: the path of the pseudo-terminal (not of the link) or of the socket.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    fn null() -> Self {
        Self {
            handle: ConsoleHandle::null(),
            service: None,
            path: None,
            is_terminal: false,
            link: None,
            socket: None,
        }
    }

    fn new(options: ConsoleOptions, history: Option<History>) -> Result<(Self, Service), ConsoleError> {
        let doorbell = Doorbell::new().map_err(|source| ConsoleError::System {
            action: "make a timer for a console",
            source,
        })?;
        let handle = ConsoleHandle::new(&options.name, Some(doorbell), history);
        let service = Service::new(handle.shared.clone(), options.commands);
        let mut console = Self::null();
        console.handle = handle;
        Ok((console, service))
    }

    fn stdio(options: ConsoleOptions) -> Result<Self, ConsoleError> {
        Self::on_descriptors(std::io::stdin().as_fd(), std::io::stdout().as_fd(), options)
    }

    /// A console on the given descriptors, which stay open and as they are.
    pub(super) fn on_descriptors(
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        options: ConsoleOptions,
    ) -> Result<Self, ConsoleError> {
        let escape = options.escape;
        let (mut console, mut service) = Self::new(options, None)?;
        let (writer, write_mode) = stdio::writer(output)?;
        let id = service.new_id();
        service.add_peer(id, Arc::new(writer), write_mode);
        // A terminal in whose background we run is left alone: reading it would stop the process.
        let is_terminal = rustix::termios::isatty(input);
        if !is_terminal || terminal::is_usable(input) {
            let (reader, read_mode) = stdio::reader(input)?;
            let mut source = Source::new(id, reader, read_mode);
            source.escape = escape.filter(|_| is_terminal).map(EscapeFilter::new);
            service.add_source(source);
            if is_terminal {
                terminal::enter_raw_mode(input).map_err(|source| ConsoleError::System {
                    action: "put the terminal into raw mode",
                    source,
                })?;
                console.is_terminal = true;
            }
        } else {
            let name = &console.handle.shared.name;
            tracing::info!(
                console = name,
                "running in the background: the terminal's keys do not reach the guest"
            );
        }
        console.service = Some(service);
        Ok(console)
    }

    fn pty(link: Option<&Path>, options: ConsoleOptions) -> Result<Self, ConsoleError> {
        let (mut console, mut service) = Self::new(options, Some(History::new(HISTORY_LIMIT)))?;
        let pty = Pty::open()?;
        let path = pty.path.clone();
        let id = service.new_id();
        let (watch, master) = PtyWatch::new(id, pty)?;
        service.add_source(Source::new(id, master, ReadMode::Read));
        if watch.has_client() {
            service.add_peer(id, watch.writer.clone(), super::peer::WriteMode::NonBlocking);
        }
        service.pty = Some(watch);
        console.link = link.map(|link| Link::new(link, &path)).transpose()?;
        console.path = Some(path);
        console.service = Some(service);
        Ok(console)
    }

    fn file(path: &Path, options: ConsoleOptions) -> Result<Self, ConsoleError> {
        let (mut console, mut service) = Self::new(options, None)?;
        let (file, mode) = stdio::open_file(path)?;
        let id = service.new_id();
        service.add_peer(id, Arc::new(file), mode);
        console.service = Some(service);
        Ok(console)
    }

    fn socket(path: &Path, options: ConsoleOptions) -> Result<Self, ConsoleError> {
        let (mut console, mut service) = Self::new(options, Some(History::new(HISTORY_LIMIT)))?;
        let (listener, file) = Listener::bind(path)?;
        service.listener = Some(listener);
        console.socket = Some(file);
        console.path = Some(path.to_owned());
        console.service = Some(service);
        Ok(console)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Nobody shall come any more.
        drop((self.socket.take(), self.link.take()));
        // The device holds the console and the console the device: let go.
        self.handle.set_input(None);
        let lost = self.handle.flush(CLOSE_TIMEOUT);
        if lost > 0 {
            tracing::warn!(
                console = self.handle.shared.name,
                lost,
                "output that nobody read is lost"
            );
        }
        // Whoever still has a handle writes to nobody.
        self.handle.shared.output().peers.clear();
        if self.is_terminal {
            terminal::restore();
        }
    }
}
