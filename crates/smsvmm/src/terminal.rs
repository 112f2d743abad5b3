//! `smsvmm vm console`: this terminal as the machine's console.
//!
//! The console must lead to a socket or to a pseudo-terminal with a link, so that there is a path to connect to; of a machine behind a gateway, to a
//! socket.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use api::ConsoleRequest;
use management::Client;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::termios::isatty;
use vmm::config::{ConsoleSpec, VmConfig};
use vmm::console::{ConsoleCommand, EscapeAction, EscapeFilter, terminal};

use crate::cli::ConsoleName;
use crate::exit::{Exit, UsageError};
use crate::logs;

/// So much may be typed before the guest takes it; more waits in the terminal.
const TYPED_AHEAD: usize = 64 << 10;
/// Ctrl-], where no configuration says otherwise.
const ESCAPE: u8 = 0x1d;

pub(crate) fn console(config: Option<&Path>, name: ConsoleName, read_only: bool) -> anyhow::Result<Exit> {
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
    let escape = config.console.escape.control_character();
    let management = config
        .management
        .map(|management| Client::new(&management.socket))
        .transpose()?;
    talk(
        line,
        &config.name.to_string(),
        escape,
        management.as_ref(),
        read_only,
    )
}

/// The console of a machine of another host.
pub(crate) fn remote_console(client: &Client, name: ConsoleName, read_only: bool) -> anyhow::Result<Exit> {
    if name == ConsoleName::Virtio {
        return Err(
            UsageError::new("of a machine behind a gateway only the serial console can be had").into(),
        );
    }
    let (early, line) = client.console(&ConsoleRequest { read_only })?;
    io::stdout().write_all(&early)?;
    talk(line.into(), "the console", Some(ESCAPE), Some(client), read_only)
}

/// Has the person at this terminal talk with the guest at the other end of `line`.
fn talk(
    line: OwnedFd,
    name: &str,
    escape: Option<u8>,
    management: Option<&Client>,
    read_only: bool,
) -> anyhow::Result<Exit> {
    let keyboard = io::stdin();
    let escape = escape.filter(|_| isatty(&keyboard)).map(EscapeFilter::new);
    if let Some(escape) = &escape {
        logs::say(&format!(
            "Connected to {name}; {} then d leaves.",
            escape.key_name()
        ));
    }
    if isatty(&keyboard) {
        terminal::enter_raw_mode(keyboard.as_fd()).context("cannot put this terminal into raw mode")?;
    }
    let result = Talk {
        line,
        keyboard: keyboard.as_fd(),
        screen: io::stdout(),
        escape,
        command: &mut |command| command_machine(management, command),
        typed: Vec::new(),
        read_only,
    }
    .run();
    terminal::restore();
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

/// A person and a console.
struct Talk<'a, Screen: Write> {
    line: OwnedFd,
    keyboard: BorrowedFd<'a>,
    screen: Screen,
    escape: Option<EscapeFilter>,
    /// Carries out what is asked of the VMM.
    command: &'a mut dyn FnMut(ConsoleCommand),
    /// What the guest has not taken yet.
    typed: Vec<u8>,
    /// Keys go nowhere.
    read_only: bool,
}

/// Whether a conversation goes on.
#[derive(PartialEq)]
enum Then {
    GoOn,
    Leave,
}

impl<Screen: Write> Talk<'_, Screen> {
    /// Copies both ways until one side ends or the person leaves.
    ///
    /// The line never makes us wait: a guest that must get rid of its output before it takes input would wait for us too.
    fn run(mut self) -> anyhow::Result<()> {
        fcntl_setfl(&self.line, fcntl_getfl(&self.line)? | OFlags::NONBLOCK)?;
        let mut typing = true;
        loop {
            let mut from_line = PollFlags::IN;
            from_line.set(PollFlags::OUT, !self.typed.is_empty());
            let mut fds = vec![PollFd::new(&self.line, from_line)];
            if typing && self.typed.len() < TYPED_AHEAD {
                fds.push(PollFd::from_borrowed_fd(self.keyboard, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (from_guest, from_keyboard) = (
                fds[0].revents().intersects(!PollFlags::OUT),
                fds.get(1).is_some_and(|fd| !fd.revents().is_empty()),
            );
            if from_guest && self.show()? == Then::Leave {
                return Ok(());
            }
            if from_keyboard {
                let mut buffer = [0; 16 << 10];
                let length =
                    rustix::io::read(self.keyboard, &mut buffer).context("cannot read from this terminal")?;
                typing = length > 0;
                if self.type_keys(&buffer[..length])? == Then::Leave {
                    return Ok(());
                }
            }
            if self.send()? == Then::Leave {
                return Ok(());
            }
        }
    }

    /// Shows what the guest says.
    fn show(&mut self) -> anyhow::Result<Then> {
        let mut buffer = [0; 16 << 10];
        match rustix::io::read(&self.line, &mut buffer) {
            // A pseudo-terminal whose other end has gone says EIO.
            Ok(0) | Err(Errno::IO | Errno::CONNRESET) => return Ok(Then::Leave),
            Ok(length) => {
                self.screen.write_all(&buffer[..length])?;
                self.screen.flush()?;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot read from the console"),
        }
        Ok(Then::GoOn)
    }

    /// Takes keys: for the guest, or for the VMM.
    fn type_keys(&mut self, keys: &[u8]) -> anyhow::Result<Then> {
        let actions = match &mut self.escape {
            Some(filter) => filter.feed(keys, &mut self.typed),
            None => {
                self.typed.extend_from_slice(keys);
                Vec::new()
            }
        };
        if self.read_only {
            self.typed.clear();
        }
        for action in actions {
            match action {
                EscapeAction::Help => {
                    let help = self.escape.as_ref().map(EscapeFilter::help).unwrap_or_default();
                    self.screen.write_all(help.as_bytes())?;
                    self.screen.flush()?;
                }
                EscapeAction::Command(ConsoleCommand::Detach) => {
                    // What the guest does not take now is not waited for: leaving must always be possible.
                    self.send()?;
                    return Ok(Then::Leave);
                }
                EscapeAction::Command(command) => (self.command)(command),
            }
        }
        Ok(Then::GoOn)
    }

    /// Sends as much of what was typed as the line takes.
    fn send(&mut self) -> anyhow::Result<Then> {
        while !self.typed.is_empty() {
            match rustix::io::write(&self.line, &self.typed) {
                Ok(count) => drop(self.typed.drain(..count)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::IO | Errno::CONNRESET) => return Ok(Then::Leave),
                Err(error) => return Err(error).context("cannot write to the console"),
            }
        }
        Ok(Then::GoOn)
    }
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// Talks with `other_end`, with `keys` typed as fast as they are taken; returns the screen and the commands.
    fn talk(
        keys: Vec<u8>,
        escape: Option<EscapeFilter>,
        other_end: impl FnOnce(UnixStream) + Send + 'static,
    ) -> (Vec<u8>, Vec<ConsoleCommand>) {
        let (line, guest) = UnixStream::pair().unwrap();
        let (keyboard, mut fingers) = io::pipe().unwrap();
        let (result, ended) = channel();
        std::thread::spawn(move || other_end(guest));
        // Stays open, as a keyboard does.
        std::thread::spawn(move || {
            fingers
                .write_all(&keys)
                .map(|()| std::thread::sleep(Duration::from_secs(60)))
        });
        std::thread::spawn(move || {
            let (mut screen, mut commands) = (Vec::new(), Vec::new());
            let talk = Talk {
                line: line.into(),
                keyboard: keyboard.as_fd(),
                screen: &mut screen,
                escape,
                command: &mut |command| commands.push(command),
                typed: Vec::new(),
                read_only: false,
            };
            talk.run().unwrap();
            result.send((screen, commands)).unwrap();
        });
        ended
            .recv_timeout(Duration::from_secs(20))
            .expect("the conversation hangs")
    }

    #[test]
    fn a_guest_that_echoes_all_that_is_pasted_does_not_block_itself() {
        let text: Vec<u8> = (0..100_000)
            .flat_map(|number: u32| number.to_le_bytes())
            .collect();
        let size = text.len() as u64;
        let (screen, _) = talk(text.clone(), None, move |guest| {
            // Takes nothing more until its answer has gone.
            let mut reader = guest.try_clone().unwrap().take(size);
            io::copy(&mut reader, &mut &guest).unwrap();
        });
        assert!(screen == text);
    }

    #[test]
    fn leaving_works_while_the_guest_takes_nothing() {
        let mut keys = vec![b'x'; 2 << 20];
        keys[40_000..40_004].copy_from_slice(b"\x1dr\x1dd");
        let (_, commands) = talk(keys, Some(EscapeFilter::new(0x1d)), |guest| {
            std::thread::sleep(Duration::from_secs(30));
            drop(guest);
        });
        assert_eq!(commands, [ConsoleCommand::Reset]);
    }

    #[test]
    fn the_conversation_ends_when_the_console_does() {
        let (screen, _) = talk(b"hello".to_vec(), None, |mut guest| {
            guest.write_all(b"bye").unwrap()
        });
        assert_eq!(screen, b"bye");
    }
}
