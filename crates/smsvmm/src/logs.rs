//! Standard error: the log, and the last word.
//!
//! A console on "stdio" puts the terminal into raw mode, in which a line break moves down only; so on a terminal each line
//! ends with carriage return and line feed, which a terminal in its normal mode shows alike.
//!
//! As a service of systemd (`JOURNAL_STREAM` names standard error), each line begins with its priority, `<4>` for example, and has no time: the
//! journal knows it (sd-daemon(3)). A machine of a manager that is such a service writes its log to its file, and each line to the journal
//! as well, by the journal's own protocol, with the field `SMSVMM_VM`: its manager has said so by `SMSVMM_JOURNAL`. The socket is
//! connected before the sandbox is entered, and written to like a file.

use std::io::{self, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use anyhow::Context;
use rustix::fd::{AsFd, BorrowedFd};
use tracing::{Level, Metadata};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::exit::UsageError;

/// Where the journal takes messages.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// The journal's socket, and the machine's name, if this is a machine whose lines are to be there.
static MACHINE: OnceLock<(OwnedFd, String)> = OnceLock::new();

/// Priorities of syslog(3).
const ERROR: u8 = 3;
const WARNING: u8 = 4;
const NOTICE: u8 = 5;
const INFORMATION: u8 = 6;
const DEBUG: u8 = 7;

fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => ERROR,
        Level::WARN => WARNING,
        Level::INFO => INFORMATION,
        Level::DEBUG | Level::TRACE => DEBUG,
    }
}

/// Whether standard error leads to the journal.
pub(crate) fn to_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    is_named(&named, io::stderr().as_fd())
}

/// Whether a text names an open file as device:inode.
fn is_named(text: &str, file: BorrowedFd<'_>) -> bool {
    let numbers = text
        .split_once(':')
        .and_then(|(device, inode)| Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?)));
    let (Some(numbers), Ok(file)) = (numbers, file.try_clone_to_owned()) else {
        return false;
    };
    let file = std::fs::File::from(file).metadata();
    file.is_ok_and(|file| (file.dev(), file.ino()) == numbers)
}

/// The journal, for a machine whose manager wants that.
fn connect_to_journal() {
    let Ok(name) = std::env::var("SMSVMM_JOURNAL") else {
        return;
    };
    let connected = UnixDatagram::unbound().and_then(|socket| {
        socket.connect(JOURNAL)?;
        // Whoever cannot take a line does not get it; the file has it.
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    match connected {
        Ok(socket) => drop(MACHINE.set((socket.into(), name))),
        Err(error) => complain(&anyhow::Error::from(error).context("the journal cannot be reached")),
    }
}

/// A message as the journal takes it: fields, of which one with line breaks has its length before it.
fn entry(vm: &str, priority: u8, message: &str) -> Vec<u8> {
    let mut entry =
        format!("SYSLOG_IDENTIFIER=smsvmm\nSMSVMM_VM={vm}\nPRIORITY={priority}\nMESSAGE").into_bytes();
    if message.contains('\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&u64::try_from(message.len()).unwrap_or(0).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(message.as_bytes());
    entry.push(b'\n');
    entry
}

fn tell_journal(priority: u8, message: &str) {
    if let Some((socket, vm)) = MACHINE.get() {
        // Nobody can be told that nobody can be told.
        let _ = rustix::io::write(socket, &entry(vm, priority, message.trim_end()));
    }
}

/// Starts logging: `SMSVMM_LOG` if set ("debug", "warn,vmm::pci=trace"), else by the number of -v.
pub(crate) fn start(verbose: u8) -> anyhow::Result<()> {
    let filter =
        match std::env::var("SMSVMM_LOG") {
            Ok(text) if !text.is_empty() => text.parse::<Targets>().map_err(UsageError::new).with_context(
                || {
                    format!(
                        "SMSVMM_LOG={text} is not a filter; use for example \"info\" or \"warn,vmm=debug\""
                    )
                },
            )?,
            _ => Targets::new().with_default(match verbose {
                0 => LevelFilter::WARN,
                1 => LevelFilter::INFO,
                2 => LevelFilter::DEBUG,
                _ => LevelFilter::TRACE,
            }),
        };
    connect_to_journal();
    let (form, target) = (Form::of_stderr(), verbose > 1);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Lines::new(form))
        .with_ansi(form == Form::Terminal)
        .with_target(target);
    let lines = match form {
        Form::Journal => lines.without_time().boxed(),
        Form::Terminal | Form::Plain => lines.boxed(),
    };
    let journal = MACHINE.get().map(|_| {
        let lines = tracing_subscriber::fmt::layer().with_writer(Messages::default());
        let lines = lines.with_ansi(false).with_level(false).without_time();
        lines.with_target(target).with_filter(filter.clone())
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(journal)
        .init();
    Ok(())
}

/// Prints an error with all its causes.
pub(crate) fn complain(error: &anyhow::Error) {
    print(ERROR, &format!("smsvmm: {error:#}"));
}

/// Prints a line for people.
pub(crate) fn say(line: &str) {
    print(NOTICE, line);
}

fn print(priority: u8, line: &str) {
    let form = Form::of_stderr();
    tell_journal(priority, line);
    // Nobody is left to be told when standard error is gone.
    let _ = Lines { form, priority }.write_all(format!("{line}\n").as_bytes());
}

/// What lines on standard error look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Terminal,
    /// Each has its priority before it.
    Journal,
    Plain,
}

impl Form {
    fn of_stderr() -> Self {
        if io::stderr().is_terminal() {
            Self::Terminal
        } else if to_journal() {
            Self::Journal
        } else {
            Self::Plain
        }
    }

    /// The same text in this form.
    fn shape(self, priority: u8, text: &[u8]) -> Vec<u8> {
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        let shaped = lines.map(|line| match (self, line.strip_suffix(b"\n")) {
            (Self::Terminal, Some(bare)) => [bare, b"\r\n"].concat(),
            (Self::Journal, _) => [format!("<{priority}>").as_bytes(), line].concat(),
            _ => line.to_vec(),
        });
        shaped.collect::<Vec<_>>().concat()
    }
}

/// Standard error.
#[derive(Debug, Clone, Copy)]
struct Lines {
    form: Form,
    priority: u8,
}

impl Lines {
    fn new(form: Form) -> Self {
        Self {
            form,
            priority: INFORMATION,
        }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self {
        Self {
            priority: priority(*metadata.level()),
            ..*self
        }
    }
}

impl Write for Lines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        match self.form {
            Form::Plain => stderr.write_all(text)?,
            form => stderr.write_all(&form.shape(self.priority, text))?,
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Messages to the journal; each is written at once.
#[derive(Debug, Clone, Copy, Default)]
struct Messages {
    priority: u8,
}

impl<'a> MakeWriter<'a> for Messages {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self {
        Self {
            priority: priority(*metadata.level()),
        }
    }
}

impl Write for Messages {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        tell_journal(self.priority, &String::from_utf8_lossy(text));
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_form_of_where_they_go() {
        let text = b"one\ntwo\n";
        assert_eq!(Form::Plain.shape(WARNING, text), text);
        assert_eq!(Form::Terminal.shape(WARNING, text), b"one\r\ntwo\r\n");
        assert_eq!(Form::Journal.shape(WARNING, text), b"<4>one\n<4>two\n");
    }

    #[test]
    fn standard_error_is_the_journal_only_if_it_is_named() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let named = format!("{}:{}", metadata.dev(), metadata.ino());
        assert!(is_named(&named, file.as_fd()));
        for other in ["", "8", "8:x", "1:1"] {
            assert!(!is_named(other, file.as_fd()), "{other}");
        }
    }

    #[test]
    fn a_message_says_which_machine_it_is_about() {
        let one = entry("web1", WARNING, "low");
        assert_eq!(
            one,
            b"SYSLOG_IDENTIFIER=smsvmm\nSMSVMM_VM=web1\nPRIORITY=4\nMESSAGE=low\n"
        );
        let two = entry("web1", ERROR, "a\nb");
        assert!(two.ends_with(b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n"), "{two:?}");
    }
}
