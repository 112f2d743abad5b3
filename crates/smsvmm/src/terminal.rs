//! `smsvmm vm console`: this terminal as the machine's console.
//!
//! The console must lead to a socket or to a pseudo-terminal with a link, so that there is a path to connect to.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use management::Client;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use vmm::config::{ConsoleSpec, VmConfig};
use vmm::console::{ConsoleCommand, EscapeAction, EscapeFilter};

use crate::cli::ConsoleName;
use crate::exit::{Exit, UsageError};
use crate::logs;

pub(crate) fn console(config: Option<&Path>, name: ConsoleName) -> anyhow::Result<Exit> {
    let Some(path) = config else {
        return Err(
            UsageError::new("`vm console` needs --config, which says where the console leads").into(),
        );
    };
    let config = VmConfig::load(path, &[]).map_err(UsageError::new)?;
    let spec = match name {
        ConsoleName::Serial => Some(&config.console.serial),
        ConsoleName::Virtio => config.console.virtio.as_ref(),
    };
    let line = connect(
        spec.ok_or_else(|| UsageError::new("the machine has no virtio console; see console.virtio"))?,
    )?;
    let keyboard = io::stdin();
    let escape = config
        .console
        .escape
        .control_character()
        .filter(|_| isatty(&keyboard))
        .map(EscapeFilter::new);
    let management = config
        .management
        .map(|management| Client::new(&management.socket))
        .transpose()?;
    if let Some(escape) = &escape {
        logs::say(&format!(
            "Connected to {}; {} then d leaves.",
            config.name,
            escape.key_name()
        ));
    }
    let raw = RawTerminal::enter()?;
    let result = talk(&line, escape, management.as_ref());
    drop(raw);
    logs::say("");
    result?;
    Ok(Exit::Success)
}

/// The other end of the machine's console.
fn connect(spec: &ConsoleSpec) -> anyhow::Result<OwnedFd> {
    let remedy = "is the machine running, and nobody else connected?";
    match spec {
        ConsoleSpec::Socket(path) => {
            let stream = UnixStream::connect(path)
                .with_context(|| format!("cannot connect to the console {}; {remedy}", path.display()))?;
            Ok(stream.into())
        }
        ConsoleSpec::Pty(Some(path)) => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(path)
                .with_context(|| format!("cannot open the console {}; {remedy}", path.display()))?;
            Ok(file.into())
        }
        other => bail!(
            "this console leads to \"{other}\", which cannot be connected to; use \"socket:PATH\" or \"pty:LINK\""
        ),
    }
}

/// Copies both ways until one side ends or the person leaves.
fn talk(line: &OwnedFd, mut escape: Option<EscapeFilter>, management: Option<&Client>) -> anyhow::Result<()> {
    let keyboard = io::stdin();
    let mut screen = io::stdout();
    let mut buffer = [0; 16 << 10];
    let mut typing = true;
    loop {
        let mut fds = vec![PollFd::new(line, PollFlags::IN)];
        if typing {
            fds.push(PollFd::from_borrowed_fd(keyboard.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let (from_guest, from_keyboard) = (
            !fds[0].revents().is_empty(),
            fds.get(1).is_some_and(|fd| !fd.revents().is_empty()),
        );
        if from_guest {
            match rustix::io::read(line, &mut buffer) {
                // A pseudo-terminal whose other end has gone says EIO.
                Ok(0) | Err(rustix::io::Errno::IO) => return Ok(()),
                Ok(length) => {
                    screen.write_all(&buffer[..length])?;
                    screen.flush()?;
                }
                Err(error) => return Err(error).context("cannot read from the console"),
            }
        }
        if from_keyboard {
            let length =
                rustix::io::read(&keyboard, &mut buffer).context("cannot read from this terminal")?;
            typing = length > 0;
            let mut text = Vec::new();
            let actions = match &mut escape {
                Some(filter) => filter.feed(&buffer[..length], &mut text),
                None => {
                    text.extend_from_slice(&buffer[..length]);
                    Vec::new()
                }
            };
            write_all(line, &text).context("cannot write to the console")?;
            for action in actions {
                match action {
                    EscapeAction::Help => {
                        let help = escape.as_ref().map(EscapeFilter::help).unwrap_or_default();
                        screen.write_all(help.as_bytes())?;
                        screen.flush()?;
                    }
                    EscapeAction::Command(ConsoleCommand::Detach) => return Ok(()),
                    EscapeAction::Command(command) => command_machine(management, command),
                }
            }
        }
    }
}

fn write_all(line: &OwnedFd, mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        let written = rustix::io::write(line, text)?;
        text = &text[written..];
    }
    Ok(())
}

fn command_machine(management: Option<&Client>, command: ConsoleCommand) {
    let action = match command {
        ConsoleCommand::Stop => "stop",
        ConsoleCommand::PowerButton => "power-button",
        ConsoleCommand::Reset => "reset",
        ConsoleCommand::Detach => return,
    };
    match management.map(|client| client.act(action)) {
        Some(Ok(())) => {}
        Some(Err(error)) => logs::say(&format!("smsvmm: {error}")),
        None => logs::say("smsvmm: the configuration has no [management] socket to ask the machine by"),
    }
}

/// The terminal in raw mode until dropped; nothing if standard input is none.
struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        let keyboard = io::stdin();
        if !isatty(&keyboard) {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(&keyboard)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&keyboard, OptionalActions::Now, &raw)?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // The terminal may be gone; then there is nothing to restore.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
